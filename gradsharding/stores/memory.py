"""Objects in the memory of one process."""

import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NoReturn

from gradsharding.errors import UserError
from gradsharding.format.dtypes import Buffer
from gradsharding.stores.charges import Charges
from gradsharding.stores.protocol import Peeked, Reach, Stat, changed, check_arrived, check_key, missing, no_upload, taken
from gradsharding.stores.reading import STREAM
from gradsharding.usage import count


class MemoryStore:
    """Objects in this process's memory: for tests, threads and experiments."""

    known: ClassVar["weakref.WeakValueDictionary[str, MemoryStore]"] = weakref.WeakValueDictionary()
    grain = 8 << 20
    reading = STREAM
    charges = Charges(kind="memory")
    reach: ClassVar[Reach] = "process"
    in_memory = True

    def __init__(self, name: str | None = None) -> None:
        """Create an empty store, which ``open_store("memory://NAME")`` finds within this process while somebody holds it."""
        self.url = f"memory://{name or uuid.uuid4().hex}"
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()
        self.known[self.url] = self

    @classmethod
    def at(cls, url: str) -> "MemoryStore":
        """Find the store of this URL in this process; raise UserError if there is none."""
        try:
            return cls.known[url]
        except KeyError:
            raise UserError(f"{url} lives in another process, or is gone; use a file:// store to share between processes") from None

    def head(self, key: str) -> Stat:
        count("memory", gets=1)
        return _stat(self._object(key))

    def peek(self, key: str, nbytes: int) -> Peeked:
        count("memory", gets=1)
        found = self._object(key)
        first = found[0][:nbytes]
        count("memory", bytes_read=len(first))
        return Peeked(_stat(found), first)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        count("memory", gets=1)
        data, found = self._object(key)
        if version not in (None, found):
            raise changed(key, version, found)
        wanted = memoryview(data)[start:stop]
        count("memory", bytes_read=len(wanted))
        yield wanted

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        joined = b"".join(data)
        count("memory", puts=1, bytes_written=len(joined))
        with self._lock:
            return self._publish(check_key(key), joined, overwrite=False)

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        count("memory", puts=1)
        for key in sorted([*self._objects]):
            if key.startswith(prefix) and (found := self._objects.get(key)):  # another thread may delete it meanwhile
                yield key, _stat(found)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            count("memory", deletes=1)
            self._objects.pop(check_key(key), None)

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            count("memory", gets=1)
            data = self._object(key)[0]
            count("memory", bytes_read=len(data))
            yield key, data

    def begin(self, key: str) -> str:
        count("memory", puts=1)
        check_key(key)
        upload = uuid.uuid4().hex
        self._uploads[upload] = {}
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        count("memory", puts=1, bytes_written=memoryview(data).nbytes)
        part = bytes(data)
        with self._lock:
            self._parts(key, upload)[number] = part

    def parts(self, key: str, upload: str) -> dict[int, int]:
        count("memory", puts=1)
        with self._lock:
            return _sizes(self._parts(key, upload))

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        count("memory", puts=1)
        with self._lock:
            parts = self._parts(key, upload)
            check_arrived(key, sizes, _sizes(parts))
            stat = self._publish(key, b"".join(data for _, data in sorted(parts.items())), overwrite=overwrite)
            del self._uploads[upload]
        return stat

    def abort(self, key: str, upload: str) -> None:
        count("memory", deletes=1)
        self._uploads.pop(upload, None)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: in another process it would be another store."""
        raise UserError(f"{self.url} lives in the memory of one process; use a file:// store to share between processes")

    def _object(self, key: str) -> tuple[bytes, str]:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise missing(key, self.url) from None

    def _parts(self, key: str, upload: str) -> dict[int, bytes]:
        try:
            return self._uploads[upload]
        except KeyError:
            raise no_upload(key, upload) from None

    def _publish(self, key: str, data: bytes, *, overwrite: bool) -> Stat:
        if key in self._objects and not overwrite:
            raise taken(key, self.url)
        self._objects[key] = found = data, uuid.uuid4().hex
        return _stat(found)


def _stat(found: tuple[bytes, str]) -> Stat:
    return Stat(len(found[0]), found[1])


def _sizes(parts: Mapping[int, bytes]) -> dict[int, int]:
    return {number: len(data) for number, data in parts.items()}
