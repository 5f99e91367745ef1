"""Weighted sums in numbers wide enough for them: floats in float64, integers exactly. The mean divides once and rounds once."""

from collections.abc import Iterator

import numpy as np

from gradsharding.arithmetic.accumulator import BLOCK, MergeableAccumulator, ReadExactly, Scratch, Size
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY, Array, Buffer, Run, is_float, rounded, widen

WIDE_SIZE = 80
"""Bytes that one wide integer sum takes: a pointer, a Python int of up to 120 bits, and either form in which it is serialized."""

_WORD = (1 << 64) - 1

_I128 = np.dtype([("low", "<u8"), ("high", "<i8")])


def is_wide(dtype: str, total: int) -> bool:
    """Tell whether sums of this integer ``dtype`` may overflow int64 if the weights sum to ``total``."""
    return not is_float(dtype) and 8 * ITEM_SIZE[dtype] + total.bit_length() > 63


def size(run: Run, total: int) -> Size:
    """Bytes that the sums of ``run`` take if the weights sum to ``total``."""
    place = 8 * run.length
    return Size(place, WIDE_SIZE * run.length, 16 * run.length) if is_wide(run.dtype, total) else Size(place, place, place)


def begin(run: Run, total: int, place: Array, scratch: Scratch) -> MergeableAccumulator:
    """Start the sums of ``run``; ``total`` is the sum of the weights of all inputs, ``place`` has zeros (uint8) of ``size(…).place``."""
    dtype, length = run
    if is_wide(dtype, total):
        return WideSums(dtype, length, total)  # the place is for the mean
    if is_float(dtype):
        return FloatSums(dtype, total, place.view("<f8"), scratch)
    return IntegerSums(dtype, total, place.view("<i8"), scratch)


def divided(sums: Array, total: int) -> Array:
    """Divide integers exactly and round to nearest, ties to even; ``sums`` are int64 or Python integers."""
    quotient = sums // total
    twice = (sums - quotient * total) * 2
    quotient += (twice > total) | ((twice == total) & (quotient % 2 == 1))
    return quotient


class _NumberSums:
    """Sums in ``sums``, zeros of a numpy dtype that is wide enough; ``dtype`` is that of the elements."""

    __slots__ = ("_dtype", "_scratch", "_sums", "_total")

    def __init__(self, dtype: str, total: int, sums: Array, scratch: Scratch) -> None:
        self._dtype, self._total, self._sums, self._scratch = dtype, total, sums, scratch[0].view(sums.dtype)

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add ``weight`` times the elements."""
        sums, product = self._sums[first : first + elements.size], self._scratch[: elements.size]
        np.copyto(product, widen(elements, self._dtype))
        np.multiply(product, sums.dtype.type(weight), out=product)
        np.add(sums, product, out=sums)

    def serialize(self) -> list[Buffer]:
        """Return the sums as they lie in memory."""
        return [self._sums.view(np.uint8).data]

    def merge(self, read: ReadExactly) -> None:
        """Add other sums."""
        for sums in _blocks(self._sums):
            np.add(sums, np.frombuffer(read(sums.nbytes), sums.dtype), out=sums)


class FloatSums(_NumberSums):
    """Sums of floats in float64."""

    __slots__ = ("finite",)

    def __init__(self, dtype: str, total: int, sums: Array, scratch: Scratch) -> None:
        super().__init__(dtype, total, sums, scratch)
        self.finite = True

    def finalize(self) -> Iterator[Array]:
        """Divide and round."""
        for sums in _blocks(self._sums):
            self.finite = self.finite and bool(np.isfinite(sums).all())
            yield rounded(np.divide(sums, sums.dtype.type(self._total), out=self._scratch[: sums.size]), self._dtype)

    def serialize(self) -> list[Buffer]:
        """Return the sums as they lie in memory."""
        self.finite = all(np.isfinite(sums).all() for sums in _blocks(self._sums))
        return super().serialize()


class IntegerSums(_NumberSums):
    """Sums of integers that int64 holds."""

    __slots__ = ()

    finite = True

    def finalize(self) -> Iterator[Array]:
        """Divide and round."""
        return (divided(sums, self._total).astype(NUMPY[self._dtype]) for sums in _blocks(self._sums))


class WideSums:
    """Sums that int64 may not hold, as Python integers; serialized as two words each, the lower one first, in two's complement."""

    __slots__ = ("_dtype", "_sums", "_total")

    finite = True

    def __init__(self, dtype: str, length: int, total: int) -> None:
        self._dtype, self._total, self._sums = dtype, total, np.zeros(length, object)

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add ``weight`` times the elements."""
        self._sums[first : first + elements.size] += elements.astype(object) * weight

    def finalize(self) -> Iterator[Array]:
        """Divide and round."""
        return (divided(sums, self._total).astype(NUMPY[self._dtype]) for sums in _blocks(self._sums))

    def serialize(self) -> list[Buffer]:
        """Return the words of the sums."""
        words = np.empty(self._sums.size, _I128)
        for i, sums in zip(range(0, words.size, BLOCK), _blocks(self._sums), strict=True):
            words["low"][i : i + BLOCK] = (sums & _WORD).astype(np.uint64)
            words["high"][i : i + BLOCK] = (sums >> 64).astype(np.int64)
        return [words.view(np.uint8).data]

    def merge(self, read: ReadExactly) -> None:
        """Add other sums."""
        for sums in _blocks(self._sums):
            words = np.frombuffer(read(_I128.itemsize * sums.size), _I128)
            np.add(sums, words["high"].astype(object) * (1 << 64) + words["low"].astype(object), out=sums)


def _blocks(sums: Array) -> Iterator[Array]:
    return (sums[i : i + BLOCK] for i in range(0, sums.size, BLOCK))
