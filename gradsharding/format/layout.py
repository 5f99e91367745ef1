"""A layout says where each tensor's bytes lie in one safetensors object. It reads headers, never data.

The format (https://github.com/huggingface/safetensors#format) is the header's length in eight bytes, little-endian; the header, a JSON
object of name → dtype, shape, data_offsets; and the data section. Offsets count from the first byte of the data section.
"""

import hashlib
import json
import math
import threading
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from json.encoder import encode_basestring
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from gradsharding.errors import InvalidUpdate, LayoutMismatch, quoted
from gradsharding.format import header
from gradsharding.format.dtypes import ITEM_SIZE, Run, join_runs

MAX_HEADER = 100_000_000
"""Bytes of a header, at most: the reference implementation reads no longer one."""


class Tensor(NamedTuple):
    """One named array: ``shape`` elements of ``dtype`` in bytes ``start`` to ``stop`` of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The tensors of an update in the order of their bytes. Each begins where the previous one ends, so that no offsets are stored.

    Create it by ``of`` or ``parse``. In a record it is stored as the text of its header.

    >>> layout = Layout.of({"w": ("F32", (2, 3)), "steps": ("I64", ())})
    >>> [(t.name, t.start, t.stop) for t in layout.tensors], layout.nbytes
    ([('steps', 0, 8), ('w', 8, 32)], 32)
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> "Layout":
        """Lay out named ``(dtype, shape)`` pairs as the safetensors library does: widest dtype first, then by name."""
        for name, (dtype, shape) in arrays.items():
            _check_name(name)
            header.nbytes(name, dtype, shape)
        names = sorted(arrays, key=lambda name: (-ITEM_SIZE[arrays[name][0]], name))
        return cls(tuple(names), tuple(arrays[name][0] for name in names), tuple(tuple(map(int, arrays[name][1])) for name in names))

    @classmethod
    def parse(cls, text: bytes, data_size: int | None = None) -> "Layout":
        """Read the JSON header of an object whose data section has ``data_size`` bytes, if that is known; raise InvalidUpdate.

        While a layout is in use, equal headers share it, and are read once. Headers are read one at a time, as reading takes memory.
        """
        key = hashlib.sha256(text).digest()
        with _reading:
            if not (layout := _in_use.get(key)):
                layout = cls(*header.read(text))
                layout = _in_use.setdefault(layout.digest, layout)
                _in_use[key] = layout
        if data_size not in (None, layout.nbytes):
            raise InvalidUpdate(
                f"the header describes {layout.nbytes} bytes of data but the object holds {data_size}: "
                "it was cut short or altered; write or upload it again"
            )
        return layout

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, built on each access."""
        return tuple(map(Tensor, self.names, self.dtypes, self.shapes, self._edges, self._edges[1:]))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the data section."""
        return self._edges[-1]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The data section as runs of one dtype; adjacent tensors of equal dtype are joined."""
        return join_runs(Run(dtype, math.prod(shape)) for dtype, shape in zip(self.dtypes, self.shapes, strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical header: equal layouts have equal digests."""
        return hashlib.sha256(self.header()).hexdigest()

    @cached_property
    def elements(self) -> int:
        """Number of elements in all tensors."""
        return sum(run.length for run in self.runs)

    def header(self) -> bytes:
        """The bytes before the data section of an object with this layout: length, then JSON padded to 8 bytes."""
        return self._header

    def locate(self, byte: int) -> tuple[Tensor, tuple[int, ...]]:
        """Find the element that holds ``byte`` of the data section; return its tensor and its index."""
        i = bisect_right(self._edges, byte) - 1
        tensor = Tensor(self.names[i], self.dtypes[i], self.shapes[i], self._edges[i], self._edges[i + 1])
        flat, index = (byte - tensor.start) // ITEM_SIZE[tensor.dtype], []
        for extent in reversed(tensor.shape):
            flat, i = divmod(flat, extent)
            index.append(i)
        return tensor, tuple(reversed(index))

    def require_same(self, other: "Layout", mine: str, theirs: str) -> None:
        """Raise LayoutMismatch, naming the first tensor that differs between ``mine`` and ``theirs``."""
        if self is other or self == other:
            return
        ours, others = ({tensor.name: tensor for tensor in layout.tensors} for layout in (self, other))
        differing = [name for name in sorted(ours.keys() | others.keys()) if ours.get(name) != others.get(name)]
        if differing:  # a different dtype or shape moves all tensors after it: those that only moved are named last
            name = min(differing, key=lambda n: _form(ours.get(n)) == _form(others.get(n)))
            raise LayoutMismatch(
                f"tensor {quoted(name)} is {_describe(ours.get(name))} in {mine} but {_describe(others.get(name))} in {theirs}; "
                "all updates of a round must hold the same tensors",
                tensor=name,
            )

    @cached_property
    def _edges(self) -> tuple[int, ...]:
        """The byte at which each tensor begins, and at which the last one ends."""
        sizes = (math.prod(shape) * ITEM_SIZE[dtype] for dtype, shape in zip(self.dtypes, self.shapes, strict=True))
        return tuple(accumulate(sizes, initial=0))

    @cached_property
    def _header(self) -> bytes:
        text = bytearray(8) + b"{"  # entries are appended one by one: a list of them would take several times their bytes
        for name, dtype, shape, start, stop in zip(self.names, self.dtypes, self.shapes, self._edges, self._edges[1:], strict=False):
            extents = str([*shape]).replace(" ", "")
            entry = f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":{extents},"data_offsets":[{start},{stop}]}},'
            text += entry.encode()
        text[len(text) - bool(self.names) :] = b"}"
        text += b" " * (-len(text) % 8)
        text[:8] = (len(text) - 8).to_bytes(8, "little")
        return bytes(text)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In JSON, a layout is the text of its header."""
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_plain_validator_function(_of_record),
            python_schema=core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda layout: layout.header()[8:].rstrip(b" ").decode(), return_schema=core_schema.str_schema(), when_used="json"
            ),
        )


_in_use = WeakValueDictionary[bytes | str, Layout]()
"""Layouts by their digest, and by the SHA-256 of each header from which they were read."""

_reading = threading.Lock()


def _of_record(value: Any) -> Layout:
    """Read a layout from a record: the text of its header, or, in records of the first releases, a list of tensors."""
    if isinstance(value, str):
        return Layout.parse(value.encode())
    try:
        tensors = [Tensor(**tensor) for tensor in value["tensors"]]
        entries = {t.name + "": {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.start, t.stop]} for t in tensors}
        return Layout.parse(json.dumps(entries).encode())
    except (TypeError, KeyError):
        raise InvalidUpdate("the record's layout is not the text of a header") from None


def header_length(prefix: bytes, size: int, largest: int = MAX_HEADER) -> int:
    """Read a header's length from the first bytes of an object of ``size`` bytes; raise InvalidUpdate beyond that, or ``largest``."""
    length, largest = int.from_bytes(prefix[:8], "little"), min(largest, MAX_HEADER)
    if size < 8:
        problem = f"the object has {size} bytes and a safetensors object has at least 8: it was cut short"
    elif length > largest:
        problem = f"the header claims {length} bytes and at most {largest} are read"
    elif length > size - 8:
        problem = f"the header claims {length} bytes but the object has {size} in all: it was cut short"
    else:
        return length
    raise InvalidUpdate(f"{problem}, or is not safetensors; write or upload it again")


def _check_name(name: str) -> None:
    if name == "__metadata__":
        raise InvalidUpdate("a tensor is named __metadata__, which the format reserves; rename the tensor")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise InvalidUpdate(f"tensor {quoted(name)} has half a surrogate pair in its name, which UTF-8 cannot hold; rename the tensor")


def _form(tensor: Tensor | None) -> tuple[str, tuple[int, ...]] | None:
    return (tensor.dtype, tensor.shape) if tensor else None


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tensor.dtype}{quoted(tensor.shape)} at bytes {tensor.start} to {tensor.stop}"
