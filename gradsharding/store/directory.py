"""Objects as files: whole or not there, whenever a process or the machine dies."""

import contextlib
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_IMODE, S_ISREG
from typing import IO, NamedTuple, TypeVar

from gradsharding.charges import Charges
from gradsharding.dtypes import Buffer
from gradsharding.errors import InvalidId, MissingObject
from gradsharding.reading import STREAM
from gradsharding.store.protocol import Peeked, Stat, changed, check_arrived, check_key, missing, no_upload, taken
from gradsharding.usage import SHARED, count

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes of a read buffer: fits the second-level cache."""


class _Mark(NamedTuple):
    """A part that was written: its place in the object and its bytes' checksum."""

    offset: int
    size: int
    crc: int


class DirectoryStore:
    """Objects as files below a directory, also one that several hosts share.

    An object is published by linking a finished, synced file to its name, so that readers see all of it or nothing,
    whenever a process or the machine dies. Unfinished work lies in ``.gradsharding/`` and nowhere else.
    """

    grain = 8 << 20
    reading = STREAM
    charges = Charges(kind="file")

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use ``root``, which is made when the first object is."""
        self.root = Path(root).absolute()
        self.url = self.root.as_uri()
        self._hidden = self.root / ".gradsharding"

    def head(self, key: str) -> Stat:
        self._count(gets=1)
        return self._look(key)

    def peek(self, key: str, nbytes: int) -> Peeked:
        self._count(gets=1)
        with self._open(key) as file:
            stat, first = _stat(os.fstat(file.fileno())), os.pread(file.fileno(), nbytes, 0)
        self._count(bytes_read=len(first))
        return Peeked(stat, first)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        self._count(gets=1)
        with self._open(key) as file:
            self._require(key, file.fileno(), version)
            buffer = memoryview(bytearray(max(0, min(CHUNK, stop - start))))
            while start < stop:
                came = os.preadv(file.fileno(), [buffer[: stop - start]], start)
                if not came:
                    break
                self._count(bytes_read=came)
                yield buffer[:came]
                start += came
            self._require(key, file.fileno(), version)

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        path, draft = self._path(key), self._hidden / "drafts" / uuid.uuid4().hex
        self._count(puts=1, bytes_written=sum(memoryview(buffer).nbytes for buffer in data))
        try:
            with _inside(draft.parent, lambda: draft.open("xb", buffering=0)) as file:
                for buffer in data:
                    _write(file.fileno(), buffer)
                os.fsync(file.fileno())
            return self._publish(key, draft, path, overwrite=False)
        finally:
            draft.unlink(missing_ok=True)
            self._prune(draft.parent)

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        self._count(puts=1)
        top = self.root / Path(prefix).parent if "/" in prefix else self.root
        found = (path for path in top.rglob("*") if path.is_file() and self._hidden not in path.parents)
        keys = sorted(path.relative_to(self.root).as_posix() for path in found)
        for key in (key for key in keys if key.startswith(prefix)):
            with contextlib.suppress(MissingObject):  # deleted while we list
                yield key, self._look(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            self._count(deletes=1)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            self._prune(path.parent)

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            self._count(gets=1)
            try:
                data = self._path(key).read_bytes()
            except OSError as error:
                raise missing(key, self.url, error.strerror) from None
            self._count(bytes_read=len(data))
            yield key, data

    def begin(self, key: str) -> str:
        self._count(puts=1)
        self._path(key)
        upload = uuid.uuid4().hex
        _inside(self._upload(upload).parent, self._upload(upload).mkdir)
        (self._upload(upload) / "parts").mkdir()
        # What replaces a file may be as private as that one is: nobody else reads it until it is known.
        (self._upload(upload) / "data").touch(0o600 if self._path(key).exists() else 0o666)
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        self._count(puts=1, bytes_written=memoryview(data).nbytes)
        with self._data(key, upload) as file:
            _write(file.fileno(), data, offset)
        mark = self._upload(upload) / "parts" / f"{number:05d}"
        draft = mark.with_suffix(f".{uuid.uuid4().hex}")
        try:
            draft.write_text(f"{offset} {memoryview(data).nbytes} {zlib.crc32(data)}")
            draft.replace(mark)
        except FileNotFoundError:  # completed or aborted meanwhile
            raise no_upload(key, upload) from None

    def parts(self, key: str, upload: str) -> dict[int, int]:
        self._count(puts=1)
        # A mark may outlive its bytes if the machine dies before they reach the disk: so the bytes themselves are asked.
        with self._data(key, upload) as file:
            try:
                return {n: mark.size for n, mark in self._marks(upload).items() if _crc(file.fileno(), mark) == mark.crc}
            except FileNotFoundError:  # completed or aborted by another meanwhile
                raise no_upload(key, upload) from None

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        self._count(puts=1)
        data = self._upload(upload) / "data"
        try:
            with self._data(key, upload) as file:
                check_arrived(key, sizes, {n: mark.size for n, mark in self._marks(upload).items()})
                os.ftruncate(file.fileno(), sum(sizes.values()))  # the last part may have been longer before it was written again
                os.fsync(file.fileno())
            if overwrite:
                take_after(data, self._path(key))
            stat = self._publish(key, data, self._path(key), overwrite=overwrite)
        except FileNotFoundError:  # completed or aborted by another meanwhile
            raise no_upload(key, upload) from None
        self._forget(upload)
        return stat

    def abort(self, key: str, upload: str) -> None:
        self._count(deletes=1)
        self._forget(upload)

    def _forget(self, upload: str) -> None:
        (self._upload(upload) / "data").unlink(missing_ok=True)  # first: an upload that lacks it is gone, whatever else is left
        shutil.rmtree(self._upload(upload), ignore_errors=True)
        self._prune(self._hidden / "uploads")

    def _count(self, **figures: int) -> None:
        count(self.charges.kind, **figures)

    def _look(self, key: str) -> Stat:
        path = self._path(key)
        with contextlib.suppress(OSError):  # no such file, a loop of links, a directory that may not be entered
            stat = path.stat()
            if S_ISREG(stat.st_mode):
                return _stat(stat)
        raise missing(key, self.url)

    def _open(self, key: str) -> IO[bytes]:
        self._look(key)  # what is not a regular file, such as a pipe, could block for ever
        try:
            return self._path(key).open("rb", buffering=0)
        except OSError as error:
            raise missing(key, self.url, error.strerror) from None

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _upload(self, upload: str) -> Path:
        if not re.fullmatch("[0-9a-f]{32}", upload):
            raise InvalidId(f"{upload!r} is not an upload's id; use what begin() gave")
        return self._hidden / "uploads" / upload

    def _data(self, key: str, upload: str) -> IO[bytes]:
        try:
            return (self._upload(upload) / "data").open("rb+", buffering=0)
        except FileNotFoundError:
            raise no_upload(key, upload) from None

    def _marks(self, upload: str) -> dict[int, _Mark]:
        found = {}
        for mark in sorted((self._upload(upload) / "parts").iterdir()):
            if not mark.suffix:
                found[int(mark.name)] = _Mark(*map(int, mark.read_text().split()))
        return found

    def _require(self, key: str, file: int, version: str | None) -> None:
        found = _stat(os.fstat(file)).version
        if version not in (None, found):
            raise changed(key, version, found)

    def _publish(self, key: str, draft: Path, path: Path, *, overwrite: bool) -> Stat:
        try:
            _inside(path.parent, lambda: draft.replace(path) if overwrite else os.link(draft, path))
        except FileExistsError:
            if not draft.samefile(path):  # published by a process that died before it cleaned up
                raise taken(key, self.url) from None
        _sync_directory(path.parent)
        return self._look(key)

    def _prune(self, directory: Path) -> None:
        """Remove directories that have become empty, below the root."""
        with contextlib.suppress(OSError):
            while directory != self.root:
                directory.rmdir()
                directory = directory.parent


class SharedMemory(DirectoryStore):
    """Files that are memory, below /dev/shm: for what the processes of one machine hand to each other. ``shm:///directory``."""

    charges = Charges(kind=SHARED)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use ``root``."""
        super().__init__(root)
        self.url = f"{SHARED}://{self.url.removeprefix('file://')}"


def take_after(draft: Path, path: Path) -> None:
    """Give a draft the mode and, where we may, the owner and the group of the file that it will replace, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        there = path.stat()
        for owner, group in ((there.st_uid, -1), (-1, there.st_gid)):
            with contextlib.suppress(OSError):
                os.chown(draft, owner, group)
        with contextlib.suppress(OSError):  # a file system without modes
            draft.chmod(S_IMODE(there.st_mode))


def _inside(directory: Path, act: Callable[[], T]) -> T:
    """Make a directory and act in it; another writer may prune it, empty as it still is, between the two: then both again."""
    for last in (*[False] * 99, True):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file in its place, or it was pruned as it was made
            if directory.is_file() or last:
                raise
        except FileNotFoundError:
            if last:
                raise
        try:
            return act()
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError("unreachable")


def _stat(stat: os.stat_result) -> Stat:
    return Stat(stat.st_size, f"{stat.st_size:x}-{stat.st_ino:x}-{stat.st_mtime_ns:x}")


def _write(file: int, data: Buffer, offset: int | None = None) -> None:
    view = memoryview(data).cast("B")
    while view:
        went = os.write(file, view) if offset is None else os.pwrite(file, view, offset)
        view, offset = view[went:], None if offset is None else offset + went


def _crc(file: int, mark: _Mark) -> int:
    crc, offset, end = 0, mark.offset, mark.offset + mark.size
    while offset < end and (data := os.pread(file, min(CHUNK, end - offset), offset)):
        crc, offset = zlib.crc32(data, crc), offset + len(data)
    return crc


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
