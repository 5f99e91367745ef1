"""Which files of a directory are opened, by any process, as the kernel says (inotify, Linux)."""

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

IN_OPEN = 0x20
"""A file of the directory was opened (inotify(7))."""

HEADER = struct.Struct("iIII")
"""Watch, mask, cookie, and the length of the name that follows."""


@contextlib.contextmanager
def opens(directory: Path) -> Iterator[Callable[[], list[str]]]:
    """Watch a directory, not the ones below it; give a function that returns the names that were opened since it was last called."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if watch < 0 or libc.inotify_add_watch(watch, os.fsencode(directory), IN_OPEN) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))

    def opened() -> list[str]:
        names, events = list[str](), b""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(watch, 1 << 16):
                events += data
        while events:
            *_, length = HEADER.unpack_from(events)
            name = events[HEADER.size : HEADER.size + length].rstrip(b"\0")
            names += [os.fsdecode(name)] if name else []  # none: the directory itself
            events = events[HEADER.size + length :]
        return names

    try:
        yield opened
    finally:
        os.close(watch)
