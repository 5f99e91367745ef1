"""The fold: sums += weight · elements, over bytes that may be cut anywhere. This module does no I/O.

Floats are summed in float64, integers exactly; the division happens once, at the end, and rounds once
(to nearest, ties to even). The result depends on the order of the additions and on nothing else: not on
where the vector or the stream of its bytes is cut. Sums may be written out, undivided, and merged elsewhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from gradsharding.dtypes import NUMPY, Array, Buffer, is_float, rounded, widen
from gradsharding.errors import InvalidUpdate
from gradsharding.layout import ITEM_SIZE, WIDTH, Run

Arithmetic = Literal["float64", "float32"]
"""What floats are summed in. float32 is there to compare with systems that do so; F64 is summed in float64 all the same."""

BLOCK = 32_768
"""Elements per step: the block and its temporaries stay in the second-level cache."""

SCRATCH = 4 << 20
"""Bytes that bound a fold's temporaries: a handful of blocks."""

RUN_SIZE = 512
"""Bytes that bound what is kept for a run beside its sums; the scratch has room for the first 2,048 of them."""

WIDE_SIZE = 80
"""Bytes that one exact wide integer sum takes: a pointer, a Python int of up to 120 bits, and either form in which it is written."""

_WORD = (1 << 64) - 1

_I128 = np.dtype([("low", "<u8"), ("high", "<i8")])


def is_wide(dtype: str, total: int) -> bool:
    """Tell whether sums of this integer ``dtype`` under ``total`` weight may overflow int64."""
    return not is_float(dtype) and 8 * ITEM_SIZE[dtype] + total.bit_length() > 63


def sum_dtype(dtype: str, total: int, arithmetic: Arithmetic = "float64") -> str:
    """Name the dtype of the sums of ``dtype`` elements under ``total`` weight: F64 or F32, I64 or I128."""
    if not is_float(dtype):
        return "I128" if is_wide(dtype, total) else "I64"
    return "F32" if arithmetic == "float32" and dtype != "F64" else "F64"


def sum_runs(runs: Iterable[Run], total: int, arithmetic: Arithmetic = "float64") -> tuple[Run, ...]:
    """Give the runs of the sums of ``runs``, one for one: what ``Fold.sums`` writes and ``Fold.merge`` reads."""
    return tuple(Run(sum_dtype(run.dtype, total, arithmetic), run.length) for run in runs)


def sum_bytes(runs: Iterable[Run], total: int, arithmetic: Arithmetic = "float64") -> int:
    """Bytes of memory that the sums of ``runs`` under ``total`` weight take, temporaries included."""
    kept = sum_runs(runs, total, arithmetic)
    return (
        SCRATCH + RUN_SIZE * max(0, len(kept) - 2_048) + sum(r.length * (WIDE_SIZE if r.dtype == "I128" else WIDTH[r.dtype]) for r in kept)
    )


class Fold:
    """Weighted sums of one slice.

    >>> fold = Fold([Run("F32", 2)], total=4)
    >>> fold.add([np.float32([1, 2]).tobytes()], 1)
    >>> fold.add([np.float32([5, 6]).tobytes()], 3)
    >>> np.frombuffer(fold.mean(), np.float32).tolist()
    [4.0, 5.0]
    """

    def __init__(self, runs: Sequence[Run], total: int, arithmetic: Arithmetic = "float64") -> None:
        """Start sums for ``runs``; ``total`` is the sum of all weights that will be in the mean, here or where these sums are merged."""
        self._runs = tuple(runs)
        self._sum_runs = sum_runs(runs, total, arithmetic)
        self._total = total
        self._arena = np.zeros(sum(min(run.nbytes, 8 * run.length) for run in self._sum_runs), np.uint8)
        self._sums = [*self._split()]
        self._scratch = np.empty(BLOCK, np.float64)
        self.finite = True
        """After ``mean`` or ``sums``: whether every float sum was finite."""

    def add(self, chunks: Iterable[Buffer], weight: int) -> None:
        """Add ``weight`` times one client's slice, whose bytes arrive as ``chunks``; raise InvalidUpdate if short."""
        with np.errstate(all="ignore"):  # ``finite`` tells
            for index, first, piece in _elements(self._runs, chunks):
                dtype, sums = self._runs[index].dtype, self._sums[index]
                for i in range(0, piece.size, BLOCK):
                    block = piece[i : i + BLOCK]
                    self._add_block(sums[first + i : first + i + block.size], block, dtype, weight)

    def merge(self, chunks: Iterable[Buffer]) -> None:
        """Add what ``sums`` of another fold, of the same runs, total and arithmetic, has written; raise InvalidUpdate if short."""
        with np.errstate(all="ignore"):
            for index, first, piece in _elements(self._sum_runs, chunks):
                sums = self._sums[index]
                for i in range(0, piece.size, BLOCK):
                    block, place = piece[i : i + BLOCK], sums[first + i : first + i + BLOCK]
                    place[: block.size] += _from_words(block) if block.dtype == _I128 else block

    def sums(self) -> list[Buffer]:
        """Give the sums, undivided: little-endian elements of ``sum_runs``, without a copy but of I128."""
        for run, sums in zip(self._sum_runs, self._sums, strict=True):
            if run.dtype[0] == "F":
                self.finite = self.finite and all(np.isfinite(sums[i : i + BLOCK]).all() for i in range(0, run.length, BLOCK))
        return [_to_words(sums).data if sums.dtype == object else sums.view(np.uint8).data for sums in self._sums if sums.size]

    def mean(self) -> memoryview:
        """Divide, round once and give the slice's bytes in its own dtypes. Ends the fold: the sums are overwritten.

        The result is packed into the front of the sums' own memory, so no second slice is ever held.
        """
        end = 0
        for run, sums in zip(self._runs, self._sums, strict=True):
            size = ITEM_SIZE[run.dtype]
            for i in range(0, run.length, BLOCK):
                with np.errstate(all="ignore"):
                    block = self._mean_block(sums[i : i + BLOCK], run.dtype)
                self._arena[end : end + block.size * size] = block.view(np.uint8)
                end += block.size * size
        return self._arena[:end].data

    def _split(self) -> Iterator[Array]:
        begin = 0
        for run in self._sum_runs:
            place = self._arena[begin : begin + min(run.nbytes, 8 * run.length)]
            begin += place.size
            yield np.zeros(run.length, object) if run.dtype == "I128" else place.view(NUMPY[run.dtype])

    def _add_block(self, sums: Array, block: Array, dtype: str, weight: int) -> None:
        if sums.dtype == object:
            sums += block.astype(object) * weight  # exact: Python integers do not overflow
            return
        product = self._scratch.view(sums.dtype)[: block.size]
        np.copyto(product, widen(block) if dtype == "BF16" else block)
        np.multiply(product, sums.dtype.type(weight), out=product)
        np.add(sums, product, out=sums)

    def _mean_block(self, sums: Array, dtype: str) -> Array:
        if not is_float(dtype):
            return _divide_integers(sums, self._total).astype(NUMPY[dtype])
        self.finite = self.finite and bool(np.isfinite(sums).all())
        mean = np.divide(sums, sums.dtype.type(self._total), out=self._scratch.view(sums.dtype)[: sums.size])
        return rounded(mean, dtype)


def first_nonfinite(runs: Sequence[Run], chunks: Iterable[Buffer]) -> int | None:
    """Find the first NaN or infinity in a slice's bytes: its offset in bytes, or None."""
    begins = np.cumsum([0, *(run.nbytes for run in runs)])
    for index, first, piece in _elements(runs, chunks):
        dtype = runs[index].dtype
        if is_float(dtype):
            bad = np.flatnonzero(~np.isfinite(widen(piece) if dtype == "BF16" else piece))
            if bad.size:
                return int(begins[index]) + (first + int(bad[0])) * ITEM_SIZE[dtype]
    return None


def _elements(runs: Sequence[Run], chunks: Iterable[Buffer]) -> Iterator[tuple[int, int, Array]]:
    """Give whole elements as (index of run, first element in it, array), whatever the cuts between chunks."""
    index, first, rest = 0, 0, b""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            if index == len(runs):
                raise InvalidUpdate(f"a read gave at least {len(view)} bytes more than the slice has; it was not answered by range")
            dtype = runs[index].dtype
            size = WIDTH[dtype]
            if rest or len(view) < size:  # an element lies across two chunks
                rest, view = rest + bytes(view[: size - len(rest)]), view[size - len(rest) :]
                if len(rest) < size:
                    continue
                piece, rest = memoryview(rest), b""
            else:
                take = size * min(len(view) // size, runs[index].length - first)
                piece, view = view[:take], view[take:]
            yield index, first, np.frombuffer(piece, _I128 if dtype == "I128" else NUMPY[dtype])
            first += len(piece) // size
            if first == runs[index].length:
                index, first = index + 1, 0
    if index < len(runs):
        raise InvalidUpdate(f"a read ended in the middle of a slice, at element {first} of run {index}; the object was cut short")


def _to_words(sums: Array) -> Array:
    """Turn Python integers into I128: two words each, the lower one first, in two's complement."""
    words = np.empty(sums.size, _I128)
    for i in range(0, sums.size, BLOCK):
        block = sums[i : i + BLOCK]
        words["low"][i : i + BLOCK] = (block & _WORD).astype(np.uint64)
        words["high"][i : i + BLOCK] = (block >> 64).astype(np.int64)
    return words.view(np.uint8)


def _from_words(block: Array) -> Array:
    """Turn I128 into Python integers."""
    return np.asarray(block["high"].astype(object) * (1 << 64) + block["low"].astype(object))


def _divide_integers(sums: Array, total: int) -> Array:
    """Divide exactly and round to nearest, ties to even; ``sums`` are int64 or Python integers."""
    quotient = sums // total
    twice = (sums - quotient * total) * 2
    quotient += (twice > total) | ((twice == total) & (quotient % 2 == 1))
    return quotient
