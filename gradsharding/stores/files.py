"""File operations with the same guarantees on every file system: claim a free name atomically, lock, flush a directory."""

import ctypes
import errno
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import TypeVar

from gradsharding.errors import StoreFailed
from gradsharding.stores.trouble import GONE

T = TypeVar("T")

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error codes of an operation that the file system does not have."""

NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EMLINK}
"""Error codes of a file system without hard links, such as exFAT and some network mounts."""

NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}

PATIENCE = 300
"""Seconds to wait for another process's lock, which it holds while it writes a part or flushes an object."""

_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def claim(draft: Path, path: Path) -> None:
    """Rename a finished file to ``path`` atomically; raise FileExistsError if the name is taken.

    This is one rename that does not replace, and the last change of the file's inode. Where the file system cannot do that, a second link
    is made and the first removed. Where it has no links, the name is checked and the file renamed while the directory is locked against
    others who do the same.
    """
    try:
        if not _rename(draft, path) and not _link(draft, path):
            _rename_locked(draft, path)
    except FileExistsError:
        if not draft.samefile(path):
            raise
        draft.unlink()  # linked by a process that died before it removed the first link


def seize(draft: Path, path: Path) -> None:
    """Rename a finished file to ``path`` atomically; a file of that name is replaced."""
    draft.replace(path)
    draft.unlink(missing_ok=True)  # a rename does nothing if both are names of one file


def _rename(draft: Path, path: Path) -> bool:
    """Rename without replacing; return False if the system cannot (Linux and most of its file systems can)."""
    at_cwd, noreplace = -100, 1
    if not _renameat2:
        return False
    sys.audit("os.rename", draft, path, -1, -1)
    if not _renameat2(at_cwd, os.fsencode(draft), at_cwd, os.fsencode(path), noreplace):
        return True
    if (code := ctypes.get_errno()) in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(draft), None, str(path))


def _link(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno in NO_LINKS:
            return False
        raise
    draft.unlink()
    return True


def _rename_locked(draft: Path, path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with locked(directory, path, exclusive=True):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            draft.rename(path)
    finally:
        os.close(directory)


@contextmanager
def locked(file: int, path: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold an exclusive or shared lock (flock) on an open file; the kernel releases it when the process ends.

    Some network mounts have no locks: there, only one process at a time should write. Raise StoreFailed if another process holds its
    lock for ``PATIENCE`` seconds.
    """
    operation, pause, end = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, 0.0005, time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                break
            if error.errno != errno.EWOULDBLOCK:
                raise
            if time.monotonic() > end:
                held = f"another process has held its lock on {path} for {PATIENCE} seconds"
                raise StoreFailed(f"{held}; end it if it hangs, then call again", path=str(path)) from None
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        else:
            break
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def is_at(file: int, path: Path) -> bool:
    """Return whether ``path`` is a name of this open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError as error:
        if error.errno in GONE:
            return False
        raise


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk; do nothing if the file system cannot, or the directory is gone."""
    try:
        directory = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in GONE:
            return
        raise
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(directory)


def inside(directory: Path, act: Callable[[], T]) -> T:
    """Call ``act``, which needs a directory; create the directory if it is missing, again if another writer prunes it meanwhile."""
    for last in (*[False] * 99, True):
        try:
            return act()
        except FileNotFoundError:
            if last:
                raise
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file is in its place, or it was pruned while it was created
            if directory.is_file() or last:
                raise
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError("unreachable")


def is_memory(path: Path) -> bool:
    """Return whether files there are memory (tmpfs, ramfs), whose pages cannot be reclaimed; False if that is unknown."""
    found = ctypes.create_string_buffer(256)  # struct statfs; its first field is the file system's magic number, see statfs(2)
    if ctypes.CDLL(None).statfs(os.fsencode(path), found):
        return False
    return ctypes.c_ulong.from_buffer(found).value & 0xFFFFFFFF in (0x01021994, 0x858458F6)


def take_after(draft: Path, path: Path) -> None:
    """Give a draft the mode and, if permitted, the owner and group of the file that it will replace, if there is one."""
    with suppress(FileNotFoundError):
        there = path.stat()
        for owner, group in ((there.st_uid, -1), (-1, there.st_gid)):
            with suppress(OSError):
                os.chown(draft, owner, group)
        with suppress(OSError):  # a file system without modes
            draft.chmod(S_IMODE(there.st_mode))


def replace(path: Path, text: str) -> None:
    """Write a file, all of it or nothing; a link stays a link, and a file that is replaced passes on its mode and owner."""
    path = path.resolve()
    draft = path.with_name(f".gradsharding-{uuid.uuid4().hex}")
    try:
        draft.touch(0o600 if path.exists() else 0o666)
        draft.write_text(text)
        take_after(draft, path)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
