"""Each safetensors dtype in numpy's terms: its name, its bits, and how to round float64 to it in a single rounding."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Buffer = bytes | bytearray | memoryview
Array = npt.NDArray[Any]

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element of each supported dtype, by its safetensors name."""

NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""numpy's name of each dtype. BF16, which numpy lacks, is handled as its bits."""


class Run(NamedTuple):
    """``length`` consecutive elements of one ``dtype``: all that arithmetic needs to know about a layout."""

    dtype: str
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.length * ITEM_SIZE[self.dtype]


def join_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join adjacent runs of equal dtype, and drop empty ones."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].dtype == run.dtype:
            joined[-1] = Run(run.dtype, joined[-1].length + run.length)
        elif run.length:
            joined.append(run)
    return tuple(joined)


class Format(NamedTuple):
    """A binary float with a sign, an exponent and ``mantissa`` bits; finite values are multiples of ``2**least`` below ``2**greatest``."""

    bits: str
    """numpy's name of the unsigned integer that holds its bits."""
    mantissa: int
    least: int
    greatest: int


FORMATS = {"F32": Format("<u4", 23, -149, 128), "F16": Format("<u2", 10, -24, 16), "BF16": Format("<u2", 7, -133, 128)}
"""The floats narrower than float64 (IEEE 754, and bfloat16)."""


def is_float(dtype: str) -> bool:
    """Tell whether a safetensors ``dtype`` is a float."""
    return dtype in ("F64", "F32", "F16", "BF16")


def widen(elements: Array, dtype: str) -> Array:
    """Return elements in a dtype that numpy computes with: bfloat16, which it lacks, and float16, which it converts slowly, as float32."""
    if dtype == "BF16":
        bits = elements.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.take(_halves(), elements.view(np.uint16)) if dtype == "F16" else elements


@cache
def _halves() -> npt.NDArray[np.float32]:
    """Table of every float16 as float32, indexed by its bits: 256 KiB, which fit in the second-level cache."""
    with np.errstate(invalid="ignore"):
        return np.arange(1 << 16, dtype="<u2").view("<f2").astype(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """Round float64 to the nearest value of a float ``dtype``, ties to even, in a single rounding; bfloat16 is returned as its bits."""
    return _to_bfloat16(values) if dtype == "BF16" else values.astype(NUMPY[dtype])


def _to_bfloat16(values: Array) -> Array:
    """Round float64 to bfloat16 bits.

    Going through float32 would round twice. Rounding to float32 *to odd* first keeps the information that the second
    rounding needs (S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    fix = (back != values) & (bits & 1 == 0)
    bits += np.where(fix, np.where(np.abs(values) > np.abs(back), 1, -1), 0).astype(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
