"""What surrounds a command costs none of its work, and leaves no files behind: closed streams, readers that leave, signals."""

import io
import os
import signal
import sys
from typing import Any, TextIO

ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT")
"""Signals that end a command as Ctrl-C does: it cleans up."""


class _Outlet(io.RawIOBase):
    """A stream whose reader may leave: what nobody reads goes nowhere. Another failure is raised, once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lost = False
        """An error was raised for it, once."""

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
    """Make this process, which is a command, fit to run in any surroundings; where others have set these up, they stay.

    Standard streams that are closed lead nowhere, before a file of the command's could take their place. A signal that is ignored,
    as under ``nohup``, stays so.
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
    """Give text for one line of a terminal or a log: names in foreign files, and of them, may hold anything."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _outlet(now: TextIO | None, first: TextIO | None, descriptor: int) -> TextIO:
    """Give a stream that bears a reader who leaves, in the place of the process's own; others have their own ways."""
    if now is not None and (now is not first or now.fileno() != descriptor):
        return now
    if now is not None:
        now.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(descriptor)),
        encoding=now.encoding if now is not None else "utf-8",
        errors=now.errors if now is not None else "replace",
        line_buffering=True,
    )


def _end(number: int, _: object) -> None:
    """End this process as an error would; the same signal again, as a closing terminal may send it, does not interrupt the cleaning up."""
    for name in ENDING:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    sys.exit(128 + number)
