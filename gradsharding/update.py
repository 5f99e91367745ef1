"""An update is one safetensors object: arrays in, arrays out, its header read without its data."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradsharding.dtypes import NUMPY, Buffer, widen
from gradsharding.errors import InvalidUpdate
from gradsharding.layout import ITEM_SIZE, Layout, header_length
from gradsharding.reading import divided, read_ahead
from gradsharding.store import ObjectStore, Source, Stat, locate

_FIRST_READ = 64 << 10
"""Bytes of the first read of an object: most headers are shorter, so that one request is enough."""

_DTYPES = {np.dtype(text): name for name, text in NUMPY.items() if name != "BF16"}


class Raw(NamedTuple):
    """An array as its bytes (C order, little-endian), for dtypes that numpy does not have."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


class Update(NamedTuple):
    """What an object's header says, and where its data section begins."""

    layout: Layout
    base: int
    stat: Stat


def encode(arrays: Mapping[str, "npt.NDArray[Any] | Raw"]) -> tuple[Layout, list[Buffer]]:
    """Lay out named arrays as one safetensors object: its buffers, in order, without a copy where bytes allow.

    Raise InvalidUpdate for a dtype that is not supported (complex, strings, objects).
    """
    raws = {name: _raw(name, array) for name, array in arrays.items()}
    layout = Layout.of({name: (raw.dtype, raw.shape) for name, raw in raws.items()})
    return layout, [layout.header(), *(raws[t.name].data for t in layout.tensors if t.stop > t.start)]


def inspect(reference: str, store: Source) -> Update:
    """Read and verify an object's header (two or three requests); raise InvalidUpdate, which names ``reference``."""
    source, key = locate(reference, store)
    stat = source.head(key)
    first = _read(source, key, 0, min(stat.size, _FIRST_READ), stat)
    try:
        base = 8 + header_length(first, stat.size)
        rest = b"" if base <= len(first) else _read(source, key, len(first), base, stat)
        return Update(Layout.parse((first + rest)[8:base], stat.size - base), base, stat)
    except InvalidUpdate as error:
        raise InvalidUpdate(f"{reference}: {error.message}", **error.details) from None


def data_digest(reference: str, store: ObjectStore, *, version: str | None = None) -> str:
    """SHA-256 (hex) of an object's data section, read as its store wants it. Raise ChangedObject if it is not at ``version``."""
    update = inspect(reference, store)
    source, key = locate(reference, store)
    base, nbytes, pinned = update.base, update.layout.nbytes, version or update.stat.version
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


def load(reference: str, store: Source) -> dict[str, npt.NDArray[Any]]:
    """Read a whole object into arrays; BF16, which numpy lacks, comes as the equal float32."""
    return {
        name: widen(np.frombuffer(raw.data, NUMPY["BF16"]), "BF16").reshape(raw.shape)
        if raw.dtype == "BF16"
        else np.frombuffer(raw.data, NUMPY[raw.dtype]).reshape(raw.shape)
        for name, raw in load_raw(reference, store).items()
    }


def load_raw(reference: str, store: Source) -> dict[str, Raw]:
    """Read a whole object, by one streaming request after its header; each tensor in memory of its own."""
    update = inspect(reference, store)
    source, key = locate(reference, store)
    arrays = {t.name: Raw(t.dtype, t.shape, bytearray(t.stop - t.start)) for t in update.layout.tensors}
    spaces = iter([memoryview(arrays[t.name].data) for t in update.layout.tensors if t.stop > t.start])
    space = memoryview(b"")
    for chunk in source.get(key, update.base, update.stat.size, version=update.stat.version):
        view = memoryview(chunk)
        while view:
            space = space or next(spaces)
            count = min(len(space), len(view))
            space[:count], space, view = view[:count], space[count:], view[count:]
    if space or next(spaces, memoryview(b"")):
        raise InvalidUpdate(f"{reference}: the data ended early; the object was cut short")
    return arrays


def _read(source: Source, key: str, start: int, stop: int, stat: Stat) -> bytes:
    return b"".join(bytes(chunk) for chunk in source.get(key, start, stop, version=stat.version))


def _raw(name: str, array: "npt.NDArray[Any] | Raw") -> Raw:
    if isinstance(array, Raw):
        if math.prod(array.shape) * ITEM_SIZE.get(array.dtype, 0) != memoryview(array.data).nbytes:
            raise InvalidUpdate(f"tensor {name!r}: {memoryview(array.data).nbytes} bytes are not {array.dtype}{list(array.shape)}")
        return array
    little = np.asarray(array)
    little = little.astype(little.dtype.newbyteorder("<"), copy=False)
    if little.dtype not in _DTYPES:
        raise InvalidUpdate(f"tensor {name!r} has dtype {little.dtype}; supported are {', '.join(ITEM_SIZE)}")
    flat = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    return Raw(_DTYPES[little.dtype], little.shape, flat.data)
