"""Errors of a file system are translated into ours, which name the path, the numbers and the remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

from gradsharding.errors import GradShardingError, StoreFailed, StoreRefused

GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
"""There is no file of this name; NFS says ESTALE for one that another host has just removed."""

NO_OBJECT = GONE | {errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG}
"""The name leads to no object, but possibly to a directory, a loop of links or a socket."""


@contextmanager
def translated(*places: Path, nbytes: int = 0, need: int = os.W_OK) -> Iterator[None]:
    """Raise StoreRefused for a request that the file system denies, and StoreFailed if it fails; our own errors pass through.

    ``places`` are the files that the body reads or writes, the most important last; the body writes ``nbytes`` there. ``need`` is
    os.R_OK or os.W_OK.
    """
    try:
        yield
    except GradShardingError:
        raise
    except OSError as error:
        raise refused(error, *places, nbytes=nbytes, need=need) from error


def refused(error: OSError, *places: Path, nbytes: int = 0, need: int = os.W_OK) -> GradShardingError:
    """Return our error for one of the file system, with the arguments of ``translated``."""
    path = places[-1]
    facts = {"path": str(path), "errno": error.errno}
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            whole = os.statvfs(_there(path)[-1])
            free = whole.f_bavail * whole.f_frsize
            facts |= {"wanted": nbytes, "free": free}
            problem = f"{nbytes} bytes were to be written to {path}, and {_limit(error, whole, free)}; make room, or use another place"
        case errno.EROFS:
            problem = f"{path} is on a file system that is mounted read-only; use another place"
        case errno.EACCES | errno.EPERM:
            problem = _barred(error, places, need)
        case errno.EXDEV:
            problem = f"{path} is on another file system than {places[0].parent}; open a store in that file system"
        case errno.ENOTDIR | errno.EEXIST | errno.EISDIR:
            problem = f"{path} cannot be written: a file is in a directory's place, or the reverse; check the path, or use another key"
        case errno.ENAMETOOLONG:
            problem = f"{path} is a longer name than its file system takes; use a shorter key"
        case _:
            reason = error.strerror or type(error).__name__
            return StoreFailed(f"the file system failed at {path}: {reason} (errno {error.errno}); see to it, then call again", **facts)
    return StoreRefused(problem, **facts)


def _limit(error: OSError, whole: os.statvfs_result, free: int) -> str:
    if error.errno == errno.EDQUOT:
        return f"the quota of uid {os.geteuid()} there is used up"
    if error.errno == errno.EFBIG:
        return "no file may be so long there (ulimit -f, or the file system's own limit)"
    if whole.f_files and not whole.f_favail:
        return f"its file system has its most files already, {whole.f_files}"
    return f"its file system has {free} bytes free"


def _barred(error: OSError, places: tuple[Path, ...], need: int) -> str:
    """Name the file or directory that this user may not use, and its owner."""
    for place in (place for path in places for place in _there(path) if not _allowed(place, path, need)):
        found, mend = place.stat(), "g+rwxs" if place.is_dir() else "g+rw"
        return (
            f"uid {os.geteuid()} may not use {place}, which belongs to uid {found.st_uid} and gid {found.st_gid} with mode "
            f"{S_IMODE(found.st_mode):o}; to share a store, let the owner run chmod {mend} on it for a common group, "
            "and all its users set umask 002"
        )
    return f"uid {os.geteuid()} may not use {places[-1]} ({error.strerror}); check its permissions"


def _there(path: Path) -> list[Path]:
    """Return the existing directories above ``path``, from the top, and ``path`` itself if it exists."""
    return [place for place in (*reversed(path.parents), path) if os.path.lexists(place)]


def _allowed(place: Path, path: Path, need: int) -> bool:
    """Return whether this user may pass through ``place`` on the way to ``path``, or use it if the way ends there."""
    if not place.is_dir():
        return os.access(place, need, effective_ids=True)
    deepest = [there for there in _there(path) if there.is_dir()][-1]
    used = place == deepest and (need == os.W_OK or place == path)
    return os.access(place, os.X_OK | (need if used else 0), effective_ids=True)
