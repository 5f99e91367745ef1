"""What file systems do in different ways, done so that the promise is the same: take a free name at once, lock, flush a directory."""

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
"""How a file system says that it has no such operation."""

NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EMLINK}
"""How one says that a file has one name only (exFAT, some network mounts)."""

NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}

PATIENCE = 300
"""Seconds to wait for another process's lock: it holds one while it writes a part, or flushes an object."""

_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def claim(draft: Path, path: Path) -> None:
    """Give a finished file the name ``path``, at once, if nothing has it; else raise FileExistsError. The name ``draft`` is gone then.

    Renaming without replacing does it, as the last change of the file's inode. Where the file system cannot do that, a second link does,
    and the first is removed; where there are no links, a look and a renaming, while the directory is locked against others who do the same.
    """
    try:
        if not _rename(draft, path) and not _link(draft, path):
            _rename_locked(draft, path)
    except FileExistsError:
        if not draft.samefile(path):
            raise
        draft.unlink()  # linked by a process that died before it could remove the first name


def seize(draft: Path, path: Path) -> None:
    """Give a finished file the name ``path``, at once, whatever has it. The name ``draft`` is gone then."""
    draft.replace(path)
    draft.unlink(missing_ok=True)  # renaming does nothing where both were names of one file


def _rename(draft: Path, path: Path) -> bool:
    """Tell whether the system can rename without replacing (Linux, most of its file systems), and do it."""
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
    """Hold a lock (flock) on an open file, alone or with other holders of shared ones; the kernel ends it with its process.

    Some network mounts have no locks: there one process at a time should write. Raise StoreFailed if another process keeps its lock
    for ``PATIENCE`` seconds.
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
                held = f"another process has had {path} locked for {PATIENCE} seconds"
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
    """Tell whether ``path`` is the name of an open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError as error:
        if error.errno in GONE:
            return False
        raise


def sync_directory(path: Path) -> None:
    """Let the names in a directory reach the disk; some file systems cannot be asked to, and one that is gone need not be."""
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
    """Act in a directory, which is made if need be; another writer may prune it, empty as it still is, before we act: then both again."""
    for last in (*[False] * 99, True):
        try:
            return act()
        except FileNotFoundError:
            if last:
                raise
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file in its place, or it was pruned as it was made
            if directory.is_file() or last:
                raise
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError("unreachable")


def is_memory(path: Path) -> bool:
    """Whether files there are memory (tmpfs, ramfs): their pages cannot be given back. False where that cannot be told."""
    found = ctypes.create_string_buffer(256)  # struct statfs; its first field is the file system's magic number, see statfs(2)
    if ctypes.CDLL(None).statfs(os.fsencode(path), found):
        return False
    return ctypes.c_ulong.from_buffer(found).value & 0xFFFFFFFF in (0x01021994, 0x858458F6)


def take_after(draft: Path, path: Path) -> None:
    """Give a draft the mode and, where we may, the owner and the group of the file that it will replace, if there is one."""
    with suppress(FileNotFoundError):
        there = path.stat()
        for owner, group in ((there.st_uid, -1), (-1, there.st_gid)):
            with suppress(OSError):
                os.chown(draft, owner, group)
        with suppress(OSError):  # a file system without modes
            draft.chmod(S_IMODE(there.st_mode))


def replace(path: Path, text: str) -> None:
    """Write a file, all of it or nothing; a link stays, and a file that is there gives its mode and its owner to the new one."""
    path = path.resolve()
    draft = path.with_name(f".gradsharding-{uuid.uuid4().hex}")
    try:
        draft.touch(0o600 if path.exists() else 0o666)
        draft.write_text(text)
        take_after(draft, path)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
