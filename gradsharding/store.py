"""An object store has few verbs; one call is one request. Objects are created once and never change.

Keys are relative paths with "/" between their segments. A *reference* is a key of the store at hand, or a URL
that names a store and a key in it (``file:///data/a.safetensors``); ``locate`` resolves both.
"""

import contextlib
import os
import re
import shutil
import threading
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR
from typing import IO, ClassVar, NamedTuple, NoReturn, Protocol
from urllib.parse import unquote, urlsplit

from gradsharding.errors import ChangedObject, IncompleteUpload, InvalidId, MissingObject, ObjectExists, UserError
from gradsharding.kernel import Buffer

CHUNK = 1 << 20
"""Bytes of a read buffer: fits the second-level cache."""


class Stat(NamedTuple):
    """An object's size in bytes, and a text that changes whenever the object does (S3 calls it ETag)."""

    size: int
    version: str


class Part(NamedTuple):
    """A part that has arrived: its place in the object, in bytes."""

    offset: int
    size: int


class ObjectStore(Protocol):
    """What the engine asks of a store. ``gradsharding.testing.StoreContract`` states it as tests."""

    url: str
    """Text from which ``open_store`` opens the same store again."""
    grain: int
    """Bytes that one read should carry, so that asking for them costs next to nothing."""

    def head(self, key: str) -> Stat:
        """Tell an object's size and version; raise MissingObject."""
        ...

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Stream bytes ``start`` to ``stop``, cut anywhere; a buffer is valid until the next one is asked for.

        Raise MissingObject, or ChangedObject if the object is not, or ceases to be, at ``version``.
        Bytes beyond the object's end are not given.
        """
        ...

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        """Create an object from buffers, all at once or not at all; raise ObjectExists if there is one."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Give all keys that begin with ``prefix``, sorted, with their stats."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are missing are passed over."""
        ...

    def begin(self, key: str) -> str:
        """Begin an object that will be written in parts; give the upload's id."""
        ...

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        """Write one part at its ``offset``; writing it again replaces it."""
        ...

    def parts(self, key: str, upload: str) -> dict[int, Part]:
        """Tell which parts have arrived, by number; raise MissingObject if there is no such upload."""
        ...

    def complete(self, key: str, upload: str, *, overwrite: bool = False) -> Stat:
        """Publish the object once its parts tile it; raise IncompleteUpload or ObjectExists."""
        ...

    def abort(self, key: str, upload: str) -> None:
        """Forget an upload and its parts."""
        ...


class MemoryStore:
    """Objects in this process's memory: for tests, threads, and trying things out."""

    known: ClassVar["weakref.WeakValueDictionary[str, MemoryStore]"] = weakref.WeakValueDictionary()
    grain = 8 << 20

    def __init__(self, name: str | None = None) -> None:
        """Make an empty store that ``open_store("memory://NAME")`` finds within this process."""
        self.url = f"memory://{name or uuid.uuid4().hex}"
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._uploads: dict[str, dict[int, tuple[int, bytes]]] = {}
        self._lock = threading.Lock()
        self.known[self.url] = self

    def head(self, key: str) -> Stat:
        data, version = self._object(key)
        return Stat(len(data), version)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        data, found = self._object(key)
        if version not in (None, found):
            raise _changed(key, version, found)
        yield memoryview(data)[start:stop]

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        return self._publish(check_key(key), b"".join(data), overwrite=False)

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        for key in sorted(self._objects):
            if key.startswith(prefix):
                yield key, self.head(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._objects.pop(check_key(key), None)

    def begin(self, key: str) -> str:
        check_key(key)
        upload = uuid.uuid4().hex
        self._uploads[upload] = {}
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        self._parts(key, upload)[number] = offset, bytes(data)

    def parts(self, key: str, upload: str) -> dict[int, Part]:
        return {n: Part(offset, len(data)) for n, (offset, data) in sorted(self._parts(key, upload).items())}

    def complete(self, key: str, upload: str, *, overwrite: bool = False) -> Stat:
        check_tiling(key, self.parts(key, upload))
        data = b"".join(data for _, data in sorted(self._parts(key, upload).values()))
        stat = self._publish(key, data, overwrite=overwrite)
        self.abort(key, upload)
        return stat

    def abort(self, key: str, upload: str) -> None:
        self._uploads.pop(upload, None)

    def __reduce__(self) -> NoReturn:
        """Refuse to be sent to another process, where it would be another store."""
        raise UserError(f"{self.url} lives in the memory of one process; use a file:// store to share between processes")

    def _object(self, key: str) -> tuple[bytes, str]:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise _missing(key, self.url) from None

    def _parts(self, key: str, upload: str) -> dict[int, tuple[int, bytes]]:
        try:
            return self._uploads[upload]
        except KeyError:
            raise _no_upload(key, upload) from None

    def _publish(self, key: str, data: bytes, *, overwrite: bool) -> Stat:
        with self._lock:
            if key in self._objects and not overwrite:
                raise _exists(key, self.url)
            self._objects[key] = data, uuid.uuid4().hex
        return self.head(key)


class DirectoryStore:
    """Objects as files below a directory, also one that several hosts share.

    An object is published by linking a finished, synced file to its name, so that readers see all of it or nothing,
    whenever a process or the machine dies. Unfinished work lies in ``.gradsharding/`` and nowhere else.
    """

    grain = 8 << 20

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use ``root``, which is made when the first object is."""
        self.root = Path(root).absolute()
        self.url = self.root.as_uri()
        self._hidden = self.root / ".gradsharding"

    def head(self, key: str) -> Stat:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            stat = self._path(key).stat()
            if not S_ISDIR(stat.st_mode):
                return _stat(stat)
        raise _missing(key, self.url)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        try:
            file = self._path(key).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _missing(key, self.url) from None
        with file:
            self._require(key, file.fileno(), version)
            buffer = memoryview(bytearray(max(0, min(CHUNK, stop - start))))
            while start < stop:
                count = os.preadv(file.fileno(), [buffer[: stop - start]], start)
                if not count:
                    break
                yield buffer[:count]
                start += count
            self._require(key, file.fileno(), version)

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        path, draft = self._path(key), self._hidden / "drafts" / uuid.uuid4().hex
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("xb", buffering=0) as file:
                for buffer in data:
                    _write(file.fileno(), buffer)
                os.fsync(file.fileno())
            return self._publish(key, draft, path, overwrite=False)
        finally:
            draft.unlink(missing_ok=True)
            self._prune(draft.parent)

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        top = self.root / Path(prefix).parent if "/" in prefix else self.root
        found = (path for path in top.rglob("*") if path.is_file() and self._hidden not in path.parents)
        keys = sorted(path.relative_to(self.root).as_posix() for path in found)
        for key in (key for key in keys if key.startswith(prefix)):
            with contextlib.suppress(MissingObject):  # deleted while we list
                yield key, self.head(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            self._prune(path.parent)

    def begin(self, key: str) -> str:
        self._path(key)
        upload = uuid.uuid4().hex
        (self._upload(upload) / "parts").mkdir(parents=True)
        (self._upload(upload) / "data").touch()
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        with self._data(key, upload) as file:
            _write(file.fileno(), data, offset)
        mark = self._upload(upload) / "parts" / f"{number:05d}"
        draft = mark.with_suffix(f".{uuid.uuid4().hex}")
        draft.write_text(f"{offset} {memoryview(data).nbytes} {zlib.crc32(data)}")
        draft.replace(mark)

    def parts(self, key: str, upload: str) -> dict[int, Part]:
        # A mark may outlive its bytes if the machine dies before they reach the disk: so the bytes themselves are asked.
        with self._data(key, upload) as file:
            return {n: part for n, (part, crc) in self._marks(upload).items() if _crc(file.fileno(), part) == crc}

    def complete(self, key: str, upload: str, *, overwrite: bool = False) -> Stat:
        data = self._upload(upload) / "data"
        with self._data(key, upload) as file:
            end = check_tiling(key, {n: part for n, (part, _) in self._marks(upload).items()})
            os.ftruncate(file.fileno(), end)  # the last part may have been longer before it was written again
            os.fsync(file.fileno())
        stat = self._publish(key, data, self._path(key), overwrite=overwrite)
        self.abort(key, upload)
        return stat

    def abort(self, key: str, upload: str) -> None:
        (self._upload(upload) / "data").unlink(missing_ok=True)  # first: an upload that lacks it is gone, whatever else is left
        shutil.rmtree(self._upload(upload), ignore_errors=True)
        self._prune(self._hidden / "uploads")

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
            raise _no_upload(key, upload) from None

    def _marks(self, upload: str) -> dict[int, tuple[Part, int]]:
        """The parts that were written, each with the checksum of its bytes."""
        found = {}
        for mark in sorted((self._upload(upload) / "parts").iterdir()):
            if not mark.suffix:
                offset, size, crc = map(int, mark.read_text().split())
                found[int(mark.name)] = Part(offset, size), crc
        return found

    def _require(self, key: str, file: int, version: str | None) -> None:
        found = _stat(os.fstat(file)).version
        if version not in (None, found):
            raise _changed(key, version, found)

    def _publish(self, key: str, draft: Path, path: Path, *, overwrite: bool) -> Stat:
        for last in (False, False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if overwrite:
                    draft.replace(path)
                else:
                    os.link(draft, path)
                break
            except FileExistsError:
                if draft.samefile(path):  # published by a process that died before it cleaned up
                    break
                raise _exists(key, self.url) from None
            except FileNotFoundError:  # another process pruned the directory between the two calls
                if last:
                    raise
        _sync_directory(path.parent)
        return self.head(key)

    def _prune(self, directory: Path) -> None:
        """Remove directories that have become empty, below the root."""
        with contextlib.suppress(OSError):
            while directory != self.root:
                directory.rmdir()
                directory = directory.parent


def open_store(url: str | os.PathLike[str]) -> ObjectStore:
    """Open a store from ``file:///directory``, ``memory://name`` (this process only) or a directory's path."""
    text = os.fspath(url)
    if "://" not in text:
        return DirectoryStore(text)
    scheme = urlsplit(text).scheme
    if scheme == "file":
        return DirectoryStore(unquote(urlsplit(text).path) or "/")
    if scheme == "memory":
        try:
            return MemoryStore.known[text]
        except KeyError:
            raise UserError(f"{text} lives in another process, or is gone; use a file:// store to share between processes") from None
    raise UserError(f"no store is known for {text!r}; use file:///directory, memory://name or a directory's path")


def exists(store: ObjectStore, key: str) -> bool:
    """Tell whether there is an object under ``key``, by one request."""
    try:
        store.head(key)
    except MissingObject:
        return False
    return True


def locate(reference: str, home: ObjectStore) -> tuple[ObjectStore, str]:
    """Resolve a reference to a store and a key in it; keys belong to ``home``."""
    if "://" not in reference:
        return home, reference
    base, _, key = reference.rpartition("/")
    return _open_once(base), unquote(key)


def file_reference(path: str | os.PathLike[str]) -> str:
    """Name a local file as a reference that any store resolves."""
    return Path(path).absolute().as_uri()


def check_key(key: str) -> str:
    """Give ``key`` back if it is a plain relative path; raise InvalidId."""
    segments = key.split("/")
    if any(s in ("", ".", "..") for s in segments) or "\0" in key or "\\" in key or segments[0] == ".gradsharding":
        raise InvalidId(f"{key!r} is not a key; use a relative path without empty, '.' or '..' segments")
    return key


def check_tiling(key: str, parts: dict[int, Part]) -> int:
    """Give the size of the object that ``parts`` make; raise IncompleteUpload unless they lie end to end from byte 0."""
    end = 0
    for number, part in sorted(parts.items(), key=lambda item: (item[1].offset, item[1].size)):
        if part.offset != end:
            raise IncompleteUpload(f"{key}: part {number} is at byte {part.offset}, where byte {end} is due; write the missing parts")
        end += part.size
    return end


@lru_cache(maxsize=256)
def _open_once(url: str) -> ObjectStore:
    return open_store(url)


def _stat(stat: os.stat_result) -> Stat:
    return Stat(stat.st_size, f"{stat.st_size:x}-{stat.st_ino:x}-{stat.st_mtime_ns:x}")


def _write(file: int, data: Buffer, offset: int | None = None) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.write(file, view) if offset is None else os.pwrite(file, view, offset)
        view, offset = view[count:], None if offset is None else offset + count


def _crc(file: int, part: Part) -> int:
    crc, offset, end = 0, part.offset, part.offset + part.size
    while offset < end and (data := os.pread(file, min(CHUNK, end - offset), offset)):
        crc, offset = zlib.crc32(data, crc), offset + len(data)
    return crc


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _missing(key: str, url: str) -> MissingObject:
    return MissingObject(f"there is no object {key!r} in {url}", key=key)


def _exists(key: str, url: str) -> ObjectExists:
    return ObjectExists(f"{key!r} is already in {url}; objects are created once", key=key)


def _changed(key: str, version: str | None, found: str) -> ChangedObject:
    return ChangedObject(f"{key!r} is at version {found}, not {version} as sealed: it was written again", key=key)


def _no_upload(key: str, upload: str) -> MissingObject:
    return MissingObject(f"there is no upload {upload} of {key!r}; it was completed or aborted", key=key)
