"""Closed streams, readers that leave and signals neither spoil a command's work nor leave files behind."""

import io
import os
import signal
import sys
from typing import Any, TextIO

ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT")
"""Signals that end a command as Ctrl-C does, after it has cleaned up."""


class _Outlet(io.RawIOBase):
    """A stream whose reader may leave: what is written after that is dropped. Any other failure is raised once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lost = False
        """Whether the reader has left, or a failure was raised."""

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int | None:
        if self._lost:
            return len(data)
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return None
        except BrokenPipeError:
            self._lost = True
            return len(data)
        except OSError:  # such as a full disk
            self._lost = True
            raise


def settle() -> None:
    """Prepare the standard streams and the signals of this process for a command; streams that somebody else has replaced stay.

    Closed standard streams are opened on the null device, before a file of the command could take their number. A signal that is ignored,
    as under ``nohup``, stays ignored.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout, sys.stderr = _outlet(sys.stdout, sys.__stdout__, 1), _outlet(sys.stderr, sys.__stderr__, 2)
    for name in ENDING:
        if signal.getsignal(number := signal.Signals[name]) != signal.SIG_IGN:
            signal.signal(number, _end)


def printable(text: str) -> str:
    """Make text fit for one line of a terminal or a log: foreign names may contain any character."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _outlet(now: TextIO | None, first: TextIO | None, descriptor: int) -> TextIO:
    """Wrap the process's own stream, so that its reader may leave; return any other stream as it is."""
    if now is not None and (now is not first or now.fileno() != descriptor):
        return now
    if now is not None:
        now.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(descriptor)),
        encoding=now.encoding if now is not None else "utf-8",
        errors="replace" if now is None or now.errors == "strict" else now.errors,  # a character that the terminal lacks is no failure
        line_buffering=True,
    )


def _end(number: int, _: object) -> None:
    """End this process as an error would; a second signal, as a closing terminal may send, does not interrupt the cleanup."""
    for name in ENDING:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    sys.exit(128 + number)
