"""A layout says where each tensor's bytes lie in one safetensors object. It reads headers, never data.

The format (https://github.com/huggingface/safetensors#format): eight bytes, little-endian: the header's length;
the header, JSON: name → dtype, shape, data_offsets; then the data section. Offsets count from its first byte.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from pydantic import model_validator

from gradsharding.errors import InvalidUpdate, LayoutMismatch
from gradsharding.value import Value

MAX_HEADER = 10_000_000
"""Bytes: some 100,000 tensors. The reference implementation reads ten times as much, but parsing takes about 30 times a
header's bytes of memory, and a header may come from anybody."""

MAX_DIMS = 64
"""Dimensions of a tensor, as in numpy: so that a hostile shape's product stays a number one can print."""

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Supported dtypes, by their safetensors names, with the bytes of one element."""


class Tensor(Value):
    """One named array: ``shape`` elements of ``dtype`` in bytes ``start`` to ``stop`` of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Run(NamedTuple):
    """``length`` neighbouring elements of one ``dtype``: all that arithmetic needs to know of a layout."""

    dtype: str
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.length * ITEM_SIZE[self.dtype]


class Layout(Value):
    """The tensors of an update in the order of their bytes, without gap or overlap.

    >>> layout = Layout.of({"w": ("F32", (2, 3)), "steps": ("I64", ())})
    >>> [(t.name, t.start, t.stop) for t in layout.tensors], layout.nbytes
    ([('steps', 0, 8), ('w', 8, 32)], 32)
    """

    tensors: tuple[Tensor, ...]

    @model_validator(mode="after")
    def _tiles(self) -> "Layout":
        _check_tiling(self.tensors)
        return self

    @classmethod
    def of(cls, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> "Layout":
        """Lay out named ``(dtype, shape)`` pairs as the safetensors library does: widest dtype first, then by name."""
        tensors, end = [], 0
        for name in sorted(arrays, key=lambda n: (-_item_size(n, arrays[n][0]), n)):
            dtype, shape = arrays[name]
            start, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
            tensors.append(Tensor(name=name, dtype=dtype, shape=shape, start=start, stop=end))
        _check_tiling(tensors)  # here, too: a validator's errors would lose their kind
        return cls(tensors=tuple(tensors))

    @classmethod
    def parse(cls, header: bytes, data_size: int) -> "Layout":
        """Read the JSON ``header`` of an object whose data section has ``data_size`` bytes; raise InvalidUpdate."""
        entries = _json_object(header)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
            raise InvalidUpdate("the header's __metadata__ is not a map of strings")
        tensors = [_tensor(name, entry) for name, entry in entries.items()]
        tensors.sort(key=lambda t: (t.start, t.stop))
        _check_tiling(tensors)
        layout = cls(tensors=tuple(tensors))
        if layout.nbytes != data_size:
            raise InvalidUpdate(
                f"the header describes {layout.nbytes} bytes of data but the object holds {data_size}: "
                "it was cut short or altered; write or upload it again"
            )
        return layout

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the data section."""
        return self.tensors[-1].stop if self.tensors else 0

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The vector as runs of one dtype; neighbours of equal dtype are joined."""
        return join_runs(Run(t.dtype, math.prod(t.shape)) for t in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical header: equal layouts have equal digests."""
        return hashlib.sha256(self.header()).hexdigest()

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(run.length for run in self.runs)

    def header(self) -> bytes:
        """The bytes before the data section of an object with this layout: length, then JSON padded to 8 bytes."""
        entries = {t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.stop]} for t in self.tensors}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def locate(self, byte: int) -> tuple[Tensor, tuple[int, ...]]:
        """Find the tensor, and the index within it, whose element holds ``byte`` of the data section."""
        tensor = next(t for t in self.tensors if t.start <= byte < t.stop)
        flat, index = (byte - tensor.start) // ITEM_SIZE[tensor.dtype], []
        for extent in reversed(tensor.shape):
            flat, i = divmod(flat, extent)
            index.append(i)
        return tensor, tuple(reversed(index))

    def require_same(self, other: "Layout", mine: str, theirs: str) -> None:
        """Raise LayoutMismatch, naming the first tensor that differs between ``mine`` and ``theirs``."""
        if self == other:
            return
        ours, others = ({t.name: t for t in layout.tensors} for layout in (self, other))
        differing = [name for name in sorted(ours.keys() | others.keys()) if ours.get(name) != others.get(name)]
        if differing:  # one other dtype or shape moves the tensors after it: those that only moved come last
            name = min(differing, key=lambda n: _form(ours.get(n)) == _form(others.get(n)))
            raise LayoutMismatch(
                f"tensor {name!r} is {_describe(ours.get(name))} in {mine} but {_describe(others.get(name))} in {theirs}; "
                "all updates of a round must hold the same tensors",
                tensor=name,
            )


def join_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join neighbours of one dtype and drop empty runs."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].dtype == run.dtype:
            joined[-1] = Run(run.dtype, joined[-1].length + run.length)
        elif run.length:
            joined.append(run)
    return tuple(joined)


def header_length(prefix: bytes, size: int) -> int:
    """Read the header's length from the first bytes of an object of ``size`` bytes; raise InvalidUpdate if it lies."""
    length = int.from_bytes(prefix[:8], "little")
    if size < 8:
        problem = f"the object has {size} bytes and a safetensors object at least 8: it was cut short"
    elif length > MAX_HEADER:
        problem = f"the header claims {length} bytes and at most {MAX_HEADER} are read"
    elif length > size - 8:
        problem = f"the header claims {length} bytes but the object has {size} in all: it was cut short"
    else:
        return length
    raise InvalidUpdate(f"{problem}, or is not safetensors; write or upload it again")


def _json_object(header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(a for (a, _), (b, _) in pairwise(sorted(pairs, key=lambda p: p[0])) if a == b)
            raise InvalidUpdate(f"the header names {twice!r} twice; names must be unique")
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except InvalidUpdate:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise InvalidUpdate(f"the header is not JSON ({error}); is this a safetensors object?") from None
    if not isinstance(entries, dict):
        raise InvalidUpdate("the header is not a JSON object; is this a safetensors object?")
    return entries


def _tensor(name: str, entry: Any) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop], **rest} if not rest:
            numbers = [*shape, start, stop]
            if len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
                return Tensor(name=name, dtype=dtype, shape=tuple(shape), start=start, stop=stop)
    raise InvalidUpdate(
        f"tensor {name!r} has a malformed header entry; it needs dtype, a shape of at most {MAX_DIMS} extents, and data_offsets"
    )


def _check_tiling(tensors: Sequence[Tensor]) -> None:
    end = 0
    for tensor in tensors:
        _check_tensor(tensor)
        if tensor.start != end:
            kind = "overlap" if tensor.start < end else "leave a gap"
            raise InvalidUpdate(
                f"tensor {tensor.name!r} starts at byte {tensor.start}, where byte {end} is due: tensors {kind}; "
                "save the update again with the safetensors library"
            )
        end = tensor.stop
    if any(tensor.name == "__metadata__" for tensor in tensors):
        raise InvalidUpdate("a tensor is named __metadata__, which the format keeps for itself; rename the tensor")
    if any("\ud800" <= letter <= "\udfff" for tensor in tensors for letter in tensor.name):
        raise InvalidUpdate("a tensor name has half a surrogate pair, which UTF-8 cannot hold; rename the tensor")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise InvalidUpdate("a tensor name occurs twice; names must be unique")


def _check_tensor(tensor: Tensor) -> None:
    needed = math.prod(tensor.shape) * _item_size(tensor.name, tensor.dtype)
    if tensor.stop - tensor.start != needed:
        raise InvalidUpdate(
            f"tensor {tensor.name!r}, {tensor.dtype} of shape {list(tensor.shape)}, needs {needed} bytes "
            f"but its offsets [{tensor.start}, {tensor.stop}] hold {tensor.stop - tensor.start}; "
            "save the update again with the safetensors library"
        )


def _item_size(name: str, dtype: str) -> int:
    if dtype not in ITEM_SIZE:
        raise InvalidUpdate(f"tensor {name!r} has dtype {dtype}; supported are {', '.join(ITEM_SIZE)}")
    return ITEM_SIZE[dtype]


def _form(tensor: Tensor | None) -> tuple[str, tuple[int, ...]] | None:
    return (tensor.dtype, tensor.shape) if tensor else None


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tensor.dtype}{list(tensor.shape)} at bytes {tensor.start} to {tensor.stop}"
