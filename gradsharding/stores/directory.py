"""Objects as files: complete or absent, whenever a process or the machine dies."""

import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO, ClassVar, NamedTuple, Self

from gradsharding.errors import InvalidId
from gradsharding.format.dtypes import Buffer
from gradsharding.stores.charges import Charges
from gradsharding.stores.files import claim, inside, is_at, is_memory, locked, seize, sync_directory, take_after
from gradsharding.stores.protocol import Peeked, Reach, Stat, changed, check_arrived, check_key, is_key, missing, no_upload, taken
from gradsharding.stores.reading import STREAM
from gradsharding.stores.trouble import GONE, NO_OBJECT, refused, translated
from gradsharding.stores.urls import file_path
from gradsharding.usage import SHARED, count

CHUNK = 1 << 20
"""Bytes of a read buffer: it fits into the second-level cache."""

STALE = 7 * 86_400
"""Seconds without a write after which an unfinished upload or draft is taken to be a dead writer's."""


class _Mark(NamedTuple):
    """A part that was written: its offset and size, and the CRC-32 of its bytes."""

    offset: int
    size: int
    crc: int


class DirectoryStore:
    """Objects as files below a directory, also one that several hosts share.

    An object is published by renaming a finished, synced file, so that readers see all of it or nothing, whenever a process or the
    machine dies. Unfinished work lies in ``.gradsharding/`` and nowhere else.

    An object's version has the time when its inode last changed, which no program can set. So a file that was written to is detected,
    even if its size and times look the same; so is one whose mode, owner or number of links was changed.
    """

    grain = 8 << 20
    reading = STREAM
    charges = Charges(kind="file")
    reach: ClassVar[Reach] = "machine"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use ``root``; it is created with the first object."""
        self.root = Path(root).absolute()
        self.url = self.root.as_uri()
        self._hidden = self.root / ".gradsharding"
        self._drafts, self._uploads = self._hidden / "drafts", self._hidden / "uploads"

    @classmethod
    def at(cls, url: str) -> Self:
        """Open the directory that ``file:///directory`` names; raise UserError unless its path is absolute."""
        return cls(file_path(url))

    @property
    def in_memory(self) -> bool:
        """Whether its files are memory, as those of a tmpfs are."""
        return is_memory(self.root)

    def head(self, key: str) -> Stat:
        self._count(gets=1)
        try:
            found = self._path(key).stat()
        except OSError as error:
            raise self._unreadable(key, error) from None
        if not S_ISREG(found.st_mode):
            raise missing(key, self.url)
        return _stat(found)

    def peek(self, key: str, nbytes: int) -> Peeked:
        self._count(gets=1)
        with self._open(key) as file, translated(self._path(key), need=os.R_OK):
            stat, first = _stat(os.fstat(file.fileno())), os.pread(file.fileno(), nbytes, 0)
        self._count(bytes_read=len(first))
        return Peeked(stat, first)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        self._count(gets=1)
        with self._open(key) as file, translated(self._path(key), need=os.R_OK):
            opened = os.fstat(file.fileno())
            _require(key, opened, version)
            buffer = memoryview(bytearray(max(0, min(CHUNK, stop - start))))
            while start < stop:
                came = os.preadv(file.fileno(), [buffer[: stop - start]], start)
                if version and not _alike(found := os.fstat(file.fileno()), opened):  # nothing is returned that changed while it was read
                    _require(key, found, version)
                if not came:
                    break
                self._count(bytes_read=came)
                yield buffer[:came]
                start += came

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        path, draft = self._path(key), self._drafts / uuid.uuid4().hex
        nbytes = sum(memoryview(buffer).nbytes for buffer in data)
        self._count(puts=1, bytes_written=nbytes)
        with translated(draft, path, nbytes=nbytes):
            try:
                with inside(draft.parent, lambda: draft.open("xb", buffering=0)) as file:
                    for buffer in data:
                        _write(file.fileno(), buffer)
                    os.fsync(file.fileno())
                    return self._publish(key, file, lambda: claim(draft, path))
            except BaseException:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
                self._prune(path.parent)
                raise

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        self._count(puts=1)
        above = prefix.rpartition("/")[0]
        if above and not is_key(above):
            return
        levels = [self._entries(f"{above}/" if above else "", prefix)]
        while levels:
            key, entry = next(levels[-1], ("", None))
            if not entry:
                levels.pop()
            elif key.endswith("/"):
                levels.append(self._entries(key, prefix))
            else:
                try:
                    found = entry.stat()
                except OSError as error:
                    if error.errno not in NO_OBJECT:
                        raise refused(error, self.root / key, need=os.R_OK) from error
                else:
                    if S_ISREG(found.st_mode):
                        yield key, _stat(found)

    def _entries(self, directory: str, prefix: str) -> "Iterator[tuple[str, os.DirEntry[str]]]":
        """Iterate over a directory's entries in the order of their keys; a subdirectory's key ends in "/"."""
        try:
            with os.scandir(self.root / directory) as entries:
                found = [(f"{directory}{entry.name}{'/' * entry.is_dir(follow_symlinks=False)}", entry) for entry in entries]
        except OSError as error:
            if error.errno in GONE:  # deleted meanwhile
                return
            raise refused(error, self.root / directory, need=os.R_OK) from error
        for key, entry in sorted(found, key=lambda item: item[0]):
            if key.startswith(prefix) and is_key(key.removesuffix("/")):
                yield key, entry

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            self._count(deletes=1)
            try:
                path.unlink()
            except OSError as error:
                if error.errno not in NO_OBJECT:
                    raise refused(error, path) from error
            self._prune(path.parent)
        self._prune(self._drafts)

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            self._count(gets=1)
            with self._open(key) as file, translated(self._path(key), need=os.R_OK):
                data = file.read()
            self._count(bytes_read=len(data))
            yield key, data

    def begin(self, key: str) -> str:
        self._count(puts=1)
        self._path(key)
        self._sweep()
        upload = uuid.uuid4().hex
        place = self._upload(upload)
        with translated(place):
            try:
                inside(place.parent, place.mkdir)
                (place / "parts").mkdir()
                (place / "gate").touch()
                # a file that may replace a private one is readable by nobody else until that is known
                (place / "data").touch(0o600 if self._path(key).exists() else 0o666)
            except BaseException:
                self._forget(upload)
                raise
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        place, nbytes = self._upload(upload), memoryview(data).nbytes
        self._count(puts=1, bytes_written=nbytes)
        mark = place / "parts" / f"{number:05d}"
        draft = mark.with_suffix(f".{uuid.uuid4().hex}")
        with translated(place / "data", nbytes=nbytes), self._data(key, upload, exclusive=False) as file:
            _write(file.fileno(), data, offset)
            try:
                draft.write_text(f"{offset} {nbytes} {zlib.crc32(data)}")
                draft.replace(mark)
            except BaseException:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
                raise

    def parts(self, key: str, upload: str) -> dict[int, int]:
        self._count(puts=1)
        # if the machine dies, a mark may survive whose bytes have not reached the disk: the checksum of the bytes decides
        data = self._upload(upload) / "data"
        with translated(data, need=os.R_OK), _under_way(key, upload), data.open("rb", buffering=0) as file:
            return {n: mark.size for n, mark in self._marks(upload).items() if _crc(file.fileno(), mark) == mark.crc}

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        self._count(puts=1)
        path, data, nbytes = self._path(key), self._upload(upload) / "data", sum(sizes.values())
        with translated(data, path, nbytes=nbytes), self._data(key, upload, exclusive=True) as file:
            check_arrived(key, sizes, {n: mark.size for n, mark in self._marks(upload).items()})
            os.ftruncate(file.fileno(), nbytes)  # the last part may have been longer before it was written again
            os.fsync(file.fileno())
            if overwrite:
                take_after(data, path)
            stat = self._publish(key, file, lambda: (seize if overwrite else claim)(data, path))
        with suppress(OSError):  # it is published
            self._forget(upload)
        return stat

    def abort(self, key: str, upload: str) -> None:
        self._count(deletes=1)
        with translated(self._upload(upload)):
            self._forget(upload)

    def _forget(self, upload: str) -> None:
        place = self._upload(upload)
        gone = place.with_suffix(".gone")
        with suppress(FileNotFoundError):
            place.rename(gone)  # atomically: writers that are still at work find no upload
        shutil.rmtree(gone, ignore_errors=True)
        self._prune(self._uploads)

    def _sweep(self) -> None:
        """Remove what dead writers have left behind."""
        last = time.time() - STALE
        for place in (*_names(self._uploads), *_names(self._drafts)):
            with suppress(OSError):
                files = [place, *_names(place)] if place.is_dir() else [place]
                found = [file.stat() for file in files]
                # a file with a second link is also an object, whose version would change if the link were removed
                if all(stat.st_mtime < last and (stat.st_nlink == 1 or not S_ISREG(stat.st_mode)) for stat in found):
                    if place.is_dir() and not place.suffix:
                        self._forget(place.name)
                    elif place.is_dir():
                        shutil.rmtree(place)
                    else:
                        place.unlink()

    def _count(self, **figures: int) -> None:
        count(self.charges.kind, **figures)

    def _open(self, key: str) -> IO[bytes]:
        try:
            file = open(self._path(key), "rb", buffering=0, opener=_opened)  # noqa: SIM115 - Path.open takes no opener; the caller closes
        except OSError as error:
            raise self._unreadable(key, error) from None
        if S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        raise missing(key, self.url)

    def _unreadable(self, key: str, error: OSError) -> Exception:
        return missing(key, self.url) if error.errno in NO_OBJECT else refused(error, self._path(key), need=os.R_OK)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _upload(self, upload: str) -> Path:
        if not re.fullmatch("[0-9a-f]{32}", upload):
            raise InvalidId(f"{upload!r} is not an upload's id; use the one that begin() returned")
        return self._uploads / upload

    @contextmanager
    def _data(self, key: str, upload: str, *, exclusive: bool) -> Iterator[IO[bytes]]:
        """Open an upload's data under a lock, shared by writers of parts or exclusive: nobody writes into a published object.

        Whoever wants the exclusive lock holds the gate meanwhile, so that later writers wait for it, and not it for them.
        """
        data, gate = self._upload(upload) / "data", self._upload(upload) / "gate"
        with ExitStack() as held:
            with _under_way(key, upload), gate.open("rb+", buffering=0) as entry, locked(entry.fileno(), gate, exclusive=exclusive):
                file = held.enter_context(data.open("rb+", buffering=0))
                held.enter_context(locked(file.fileno(), data, exclusive=exclusive))
            held.enter_context(_under_way(key, upload))
            if not is_at(file.fileno(), data):
                raise no_upload(key, upload)
            yield file

    def _marks(self, upload: str) -> dict[int, _Mark]:
        found = {}
        for mark in sorted((self._upload(upload) / "parts").iterdir()):
            if not mark.suffix and re.fullmatch("[0-9]+ [0-9]+ [0-9]+", text := mark.read_text()):  # an empty mark had not reached the disk
                found[int(mark.name)] = _Mark(*map(int, text.split()))
        return found

    def _publish(self, key: str, file: IO[bytes], name: Callable[[], None]) -> Stat:
        """Rename an open, finished file to its key; after that its version is final."""
        path = self._path(key)
        try:
            inside(path.parent, name)
        except FileExistsError:
            if path.is_dir():
                raise
            raise taken(key, self.url) from None
        sync_directory(path.parent)
        return _stat(os.fstat(file.fileno()))

    def _prune(self, directory: Path) -> None:
        """Remove empty directories, from ``directory`` up to the root."""
        with suppress(OSError):
            while directory != self.root:
                directory.rmdir()
                directory = directory.parent


class SharedMemory(DirectoryStore):
    """Files in memory, below /dev/shm, for data that processes of one machine hand to each other: ``shm:///directory``."""

    charges = Charges(kind=SHARED)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use ``root``."""
        super().__init__(root)
        self.url = f"{SHARED}://{self.url.removeprefix('file://')}"


@contextmanager
def _under_way(key: str, upload: str) -> Iterator[None]:
    """Raise MissingObject if an upload's files are gone: it was completed or aborted, possibly by another process just now."""
    try:
        yield
    except OSError as error:
        if error.errno in GONE:
            raise no_upload(key, upload) from None
        raise


def _opened(path: str, flags: int) -> int:
    """Open a file for reading without blocking, which a pipe would do."""
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:  # a regular file that a file server has leased
        return os.open(path, flags)


def _names(directory: Path) -> list[Path]:
    with suppress(OSError):
        return [*directory.iterdir()]
    return []


def _stat(stat: os.stat_result) -> Stat:
    return Stat(stat.st_size, f"{stat.st_size:x}-{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}")


def _alike(first: os.stat_result, second: os.stat_result) -> bool:
    """Return whether both are the same version of a file."""
    return first.st_ctime_ns == second.st_ctime_ns and _stat(first) == _stat(second)


def _require(key: str, stat: os.stat_result, version: str | None) -> None:
    """Raise ChangedObject if a file is not at ``version``."""
    found = _stat(stat).version
    if version not in (None, found):
        written = "it was written again, or its inode was changed (by chmod, chown or a hard link)"
        raise changed(key, version, found, written if stat.st_nlink else "it was deleted or replaced")


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
