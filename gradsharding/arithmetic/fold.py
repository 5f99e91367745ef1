"""The fold: sums += weight · elements, over bytes that may be cut anywhere. This module does no I/O.

Floats are summed in float64, or exactly; integers always exactly; the division happens once, at the end, and rounds once
(to nearest, ties to even). In float64 the result depends on the order of the additions and on nothing else: not on where the
vector or the stream of its bytes is cut. Exact, it does not depend on that either. Sums may be written out, undivided, and
merged elsewhere.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from gradsharding.arithmetic import exact
from gradsharding.arithmetic.exact import ExactSums
from gradsharding.arithmetic.sums import BLOCK, WIDE_SIZE, FloatSums, IntegerSums, Scratch, Sums, WideSums
from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY, Array, Buffer, Run, is_float, widen

Arithmetic = Literal["float64", "exact"]
"""What floats are summed in."""

SCRATCH = 4 << 20
"""Bytes that bound a fold's temporaries: a handful of blocks."""

RUN_SIZE = 512
"""Bytes that bound what is kept for a run beside its sums; the scratch has room for the first 2,048 of them."""


class Size(NamedTuple):
    """Bytes that the sums of a run take, temporaries not counted."""

    place: int
    """Of the fold's own array."""
    memory: int
    """In all, at most."""
    written: int
    """As they are written, at most."""


def is_wide(dtype: str, total: int) -> bool:
    """Tell whether sums of this integer ``dtype`` under ``total`` weight may overflow int64."""
    return not is_float(dtype) and 8 * ITEM_SIZE[dtype] + total.bit_length() > 63


def is_exact(dtype: str, arithmetic: Arithmetic) -> bool:
    """Tell whether elements of ``dtype`` have exact float sums, which take as many bytes as their values need when they are written."""
    return arithmetic == "exact" and is_float(dtype)


def size(run: Run, total: int, arithmetic: Arithmetic = "float64") -> Size:
    """Bytes that the sums of ``run`` under ``total`` weight take."""
    dtype, length = run
    if is_exact(dtype, arithmetic):
        return Size(8 * length * exact.planes(dtype, total), exact.memory(dtype, length, total), exact.written_bytes(dtype, length, total))
    if is_wide(dtype, total):
        return Size(8 * length, WIDE_SIZE * length, 16 * length)
    return Size(*3 * [8 * length])


def sum_bytes(runs: Iterable[Run], total: int, arithmetic: Arithmetic = "float64") -> int:
    """Bytes of memory that the sums of ``runs`` under ``total`` weight take at most, temporaries included."""
    sizes = [size(run, total, arithmetic).memory for run in runs]
    return SCRATCH + RUN_SIZE * max(0, len(sizes) - 2_048) + sum(sizes)


class Fold:
    """Weighted sums of one slice.

    >>> fold = Fold([Run("F32", 2)], total=4)
    >>> fold.add([np.float32([1, 2]).tobytes()], 1)
    >>> fold.add([np.float32([5, 6]).tobytes()], 3)
    >>> np.frombuffer(fold.mean(), np.float32).tolist()
    [4.0, 5.0]
    """

    def __init__(self, runs: Sequence[Run], total: int, arithmetic: Arithmetic = "float64") -> None:
        """Start sums for ``runs``; ``total`` is the sum of all weights that will be in the mean, here or where these sums are merged.

        Raise UserError if exact sums are asked for where subnormal numbers are lost.
        """
        self._runs = tuple(runs)
        places = [size(run, total, arithmetic).place for run in self._runs]
        self._arena, scratch = np.zeros(sum(places), np.uint8), np.empty((3, BLOCK))
        ends = np.cumsum(places)
        self._sums = [
            _begin(run, total, arithmetic, self._arena[end - place : end], scratch)
            for run, place, end in zip(self._runs, places, ends, strict=True)
        ]

    @property
    def finite(self) -> bool:
        """After ``mean`` or ``sums``: whether every float sum was finite."""
        return all(sums.finite for sums in self._sums)

    def add(self, chunks: Iterable[Buffer], weight: int) -> None:
        """Add ``weight`` times one client's slice, whose bytes arrive as ``chunks``; raise InvalidUpdate if short."""
        with np.errstate(all="ignore"):  # ``finite`` tells
            for index, first, elements in _blocks(self._runs, chunks):
                self._sums[index].add(first, elements, weight)

    def merge(self, chunks: Iterable[Buffer]) -> None:
        """Add what ``sums`` of another fold, of the same runs, total and arithmetic, has written; raise InvalidUpdate if short."""
        stream = _Stream(chunks)
        with np.errstate(all="ignore"):
            for sums in self._sums:
                sums.merge(stream.take)
        stream.end()

    def sums(self) -> list[Buffer]:
        """Give the sums, undivided, run by run. Ends the fold: they are made in their own memory, where they can be."""
        return [buffer for sums in self._sums for buffer in sums.written()]

    def mean(self) -> memoryview:
        """Divide, round once and give the slice's bytes in its own dtypes. Ends the fold: the sums are overwritten.

        The result is packed into the front of the sums' own memory, so no second slice is ever held.
        """
        end = 0
        with np.errstate(all="ignore"):
            for sums in self._sums:
                for block in sums.means():
                    self._arena[end : end + block.nbytes] = block.view(np.uint8)
                    end += block.nbytes
        return self._arena[:end].data


def first_beyond(runs: Sequence[Run], chunks: Iterable[Buffer], most: float = math.inf) -> int | None:
    """Find the first float in a slice's bytes that is NaN or infinite, or whose size is beyond ``most``: its offset in bytes, or None."""
    begins = np.cumsum([0, *(run.nbytes for run in runs)])
    for index, first, elements in _blocks(runs, chunks):
        dtype = runs[index].dtype
        if is_float(dtype):
            values = widen(elements, dtype)
            bad = np.flatnonzero(~(np.isfinite(values) & (np.abs(values) <= most)))
            if bad.size:
                return int(begins[index]) + (first + int(bad[0])) * ITEM_SIZE[dtype]
    return None


def _begin(run: Run, total: int, arithmetic: Arithmetic, place: Array, scratch: Scratch) -> Sums:
    """Begin the sums of a run in its ``place``."""
    dtype, length = run
    if is_exact(dtype, arithmetic):
        return ExactSums(dtype, length, total, place, scratch)
    if is_wide(dtype, total):
        return WideSums(dtype, length, total)  # the place is for the mean
    if is_float(dtype):
        return FloatSums(dtype, total, place.view("<f8"), scratch)
    return IntegerSums(dtype, total, place.view("<i8"), scratch)


def _blocks(runs: Sequence[Run], chunks: Iterable[Buffer]) -> Iterator[tuple[int, int, Array]]:
    """Give elements as (index of run, first element in it, array of ``BLOCK`` elements at most), whatever the cuts between chunks."""
    stream = _Stream(chunks)
    for index, (dtype, length) in enumerate(runs):
        width, name = ITEM_SIZE[dtype], NUMPY[dtype]
        for first in range(0, length, BLOCK):
            yield index, first, np.frombuffer(stream.take(width * min(BLOCK, length - first)), name)
    stream.end()


class _Stream:
    """The bytes of chunks, of which each is valid until the next is asked for."""

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks, self._rest, self._taken = iter(chunks), memoryview(b""), 0

    def take(self, count: int) -> Buffer:
        """Give the next ``count`` bytes, without a copy where they lie in one chunk; raise InvalidUpdate if there are fewer."""
        joined = bytearray()
        while len(joined) + len(self._rest) < count:
            joined += self._rest
            chunk = next(self._chunks, None)
            if chunk is None:
                ended = self._taken + len(joined)
                raise InvalidUpdate(f"a read ended after {ended} bytes, in the middle of a slice; the object was cut short")
            self._rest = memoryview(chunk).cast("B")
        missing = count - len(joined)
        last, self._rest = self._rest[:missing], self._rest[missing:]
        self._taken += count
        if not joined:
            return last
        joined += last
        return joined

    def end(self) -> None:
        """Raise InvalidUpdate if there are bytes left."""
        if left := len(self._rest) or next(filter(None, (memoryview(chunk).nbytes for chunk in self._chunks)), 0):
            raise InvalidUpdate(f"a read gave at least {left} bytes more than the slice has; it was not answered by range")
