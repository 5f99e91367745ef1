"""An update is one safetensors object in a store: its header is read without its data, or all of it into arrays."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradsharding.errors import ChangedObject, InvalidUpdate, plain, quoted
from gradsharding.format.dtypes import NUMPY, Buffer, widen
from gradsharding.format.encode import Raw
from gradsharding.format.layout import MAX_HEADER, Layout, header_length
from gradsharding.stores.protocol import ObjectStore, Peeked, ReadableStore, Stat
from gradsharding.stores.reading import divided, read_ahead
from gradsharding.stores.urls import locate
from gradsharding.usage import Usage

FIRST_READ = 64 << 10
"""Bytes of the first request for an object: most headers are shorter, so that one request is enough."""

HEADERS = 16 << 20
"""Bytes of long headers that all threads together may read at once; a single header may be longer."""


class Update(NamedTuple):
    """An object's layout, as its header states it, and the offset of its data section in bytes."""

    layout: Layout
    base: int
    stat: Stat


def inspect(reference: str, store: ReadableStore, peeked: Peeked | None = None, *, largest_header: int = MAX_HEADER) -> Update:
    """Read and verify an object's header (one request; two, if it is long); raise InvalidUpdate, which names ``reference``.

    ``peeked`` has the first bytes, if they were read already. A header of more than ``largest_header`` bytes is refused before it is
    read. Updates with equal headers share one layout while any of them is in use.
    """
    return _inspected(reference, store, peeked, largest_header)[0]


def inspection(header_bytes: int, nbytes: int) -> Usage:
    """Return what ``inspect`` requests for an object with a header of ``header_bytes`` and ``nbytes`` of data."""
    return Usage(gets=1 if header_bytes <= FIRST_READ else 2, bytes_read=min(header_bytes + nbytes, max(header_bytes, FIRST_READ)))


def loading(header_bytes: int, nbytes: int) -> Usage:
    """Return what ``load_raw`` requests for an object with a header of ``header_bytes`` and ``nbytes`` of data."""
    size, first = header_bytes + nbytes, max(header_bytes, FIRST_READ)
    return inspection(header_bytes, nbytes) + Usage(gets=int(size > first), bytes_read=max(0, size - first))


def data_digest(reference: str, store: ObjectStore, *, version: str | None = None, layout: Layout | None = None) -> str:
    """Return the SHA-256 (hex) of an object's data section. Raise ChangedObject if the object is not at ``version``.

    If ``layout`` is given with ``version``, the header is not read.
    """
    source, key = locate(reference, store)
    if layout is None or version is None:
        update = inspect(reference, store)
        layout, base, version = update.layout, update.base, version or update.stat.version
    else:
        base = len(layout.header())
    nbytes, pinned = layout.nbytes, version
    sha, size = hashlib.sha256(), max(1, source.reading.piece(nbytes))

    def read(start: int, stop: int) -> Iterator[Buffer]:
        return source.get(key, base + start, base + stop, version=pinned)

    if not source.reading.chunk:
        for chunk in read(0, nbytes):
            sha.update(chunk)
        return sha.hexdigest()
    with contextlib.closing(read_ahead(divided(nbytes, size, read), source.reading, size)) as pieces:
        for piece in pieces:
            sha.update(piece)
    return sha.hexdigest()


def load(reference: str, store: ReadableStore, *, version: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """Read a whole object into arrays; BF16, which numpy lacks, becomes float32 of the same values. Raise as ``load_raw`` does."""
    return {name: _array(name, raw) for name, raw in load_raw(reference, store, version=version).items()}


def load_raw(reference: str, store: ReadableStore, *, version: str | None = None) -> dict[str, Raw]:
    """Read a whole object, by one streaming request after its header; each tensor has memory of its own.

    Raise MissingObject, InvalidUpdate, or ChangedObject if the object is not at ``version``.
    """
    update, first = _inspected(reference, store)
    source, key = locate(reference, store)
    if version not in (None, update.stat.version):
        raise ChangedObject(f"{plain(reference)} is at version {update.stat.version}, not {version}: it was written again")
    arrays = {t.name: Raw(t.dtype, t.shape, bytearray(t.stop - t.start)) for t in update.layout.tensors}
    spaces = iter([memoryview(arrays[t.name].data) for t in update.layout.tensors if t.stop > t.start])
    space = memoryview(b"")
    rest = source.get(key, len(first), update.stat.size, version=update.stat.version) if len(first) < update.stat.size else ()
    for chunk in chain([first[update.base :]], rest):
        view = memoryview(chunk)
        while view:
            space = space or next(spaces)
            count = min(len(space), len(view))
            space[:count], space, view = view[:count], space[count:], view[count:]
    if space or next(spaces, memoryview(b"")):
        raise InvalidUpdate(f"{plain(reference)}: the data ended early; the object was cut short")
    return arrays


def _array(name: str, raw: Raw) -> npt.NDArray[Any]:
    elements = np.frombuffer(raw.data, NUMPY[raw.dtype])
    try:
        return (widen(elements, "BF16") if raw.dtype == "BF16" else elements).reshape(raw.shape)
    except (ValueError, OverflowError):
        raise InvalidUpdate(
            f"tensor {quoted(name)} has shape {quoted(raw.shape)}, and numpy's arrays have at most 64 dimensions, "
            "and fewer than 2**63 bytes: load_raw gives its bytes"
        ) from None


def _inspected(reference: str, store: ReadableStore, peeked: Peeked | None = None, largest: int = MAX_HEADER) -> tuple[Update, bytes]:
    """Read an object's header; return it with the bytes of the object that were read."""
    source, key = locate(reference, store)
    stat, first = peeked or source.peek(key, FIRST_READ)
    try:
        base = 8 + header_length(first, stat.size, largest)
        if base <= len(first):
            return Update(Layout.parse(first[8:base], stat.size - base), base, stat), first
        with _long_headers.room(base):
            first = b"".join([first, *map(bytes, source.get(key, len(first), base, version=stat.version))])
            return Update(Layout.parse(first[8:], stat.size - base), base, stat), first
    except InvalidUpdate as error:
        raise InvalidUpdate(f"{plain(reference)}: {error.message}", **error.details) from None


class _Room:
    """A number of bytes that threads share; a thread that wants more than all of them waits until nobody holds any."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._taken, self._freed = nbytes, 0, threading.Condition()

    @contextlib.contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Hold ``nbytes`` of them."""
        wanted = min(nbytes, self._nbytes)
        with self._freed:
            self._freed.wait_for(lambda: self._taken + wanted <= self._nbytes)
            self._taken += wanted
        try:
            yield
        finally:
            with self._freed:
                self._taken -= wanted
                self._freed.notify_all()


_long_headers = _Room(HEADERS)
