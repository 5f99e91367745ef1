"""Sums of the elements of one run, kept wide: floats in floating point, integers exactly. The mean divides once and rounds once.

Whatever keeps sums (``exact`` does so, too) is ``Sums`` to the fold.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gradsharding.format.dtypes import NUMPY, Array, Buffer, rounded, widen

BLOCK = 32_768
"""Elements per step: the block and its temporaries stay in the second-level cache."""

WIDE_SIZE = 80
"""Bytes that one wide integer sum takes: a pointer, a Python int of up to 120 bits, and either form in which it is written."""

Take = Callable[[int], Buffer]
"""Gives the next so many bytes of what is read, valid until it is called again."""

Scratch = npt.NDArray[np.float64]
"""Room for the temporaries of a step, which all sums of a fold share: three rows of ``BLOCK`` elements."""

_WORD = (1 << 64) - 1

_I128 = np.dtype([("low", "<u8"), ("high", "<i8")])


class Sums(Protocol):
    """Weighted sums of a run's elements; arrays have one dimension, and bfloat16 comes and goes as its bits."""

    @property
    def finite(self) -> bool:
        """After ``means`` or ``written``: whether every sum is finite."""
        ...

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add ``weight`` times ``elements``, ``BLOCK`` of them at most, from element ``first`` on, a multiple of ``BLOCK``."""
        ...

    def means(self) -> Iterator[Array]:
        """Divide, round once, and give the elements of the mean in their own dtype, some at a time."""
        ...

    def written(self) -> list[Buffer]:
        """Give the sums, undivided, as ``merge`` reads them. Ends them: it may be made in their own memory."""
        ...

    def merge(self, take: Take) -> None:
        """Add what other sums of the same dtype, length and total have written."""
        ...


class _NumberSums:
    """Sums in ``sums``, zeros of a dtype of numpy that is wide enough; ``dtype`` is that of the elements."""

    __slots__ = ("_dtype", "_scratch", "_sums", "_total")

    def __init__(self, dtype: str, total: int, sums: Array, scratch: Scratch) -> None:
        self._dtype, self._total, self._sums, self._scratch = dtype, total, sums, scratch[0].view(sums.dtype)

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add weighted elements."""
        sums, product = self._sums[first : first + elements.size], self._scratch[: elements.size]
        np.copyto(product, widen(elements, self._dtype))
        np.multiply(product, sums.dtype.type(weight), out=product)
        np.add(sums, product, out=sums)

    def written(self) -> list[Buffer]:
        """Give the sums as they are."""
        return [self._sums.view(np.uint8).data]

    def merge(self, take: Take) -> None:
        """Add other sums."""
        for sums in _blocks(self._sums):
            np.add(sums, np.frombuffer(take(sums.nbytes), sums.dtype), out=sums)


class FloatSums(_NumberSums):
    """Sums in float64, or in float32 to compare with systems that do so."""

    __slots__ = ("finite",)

    def __init__(self, dtype: str, total: int, sums: Array, scratch: Scratch) -> None:
        super().__init__(dtype, total, sums, scratch)
        self.finite = True

    def means(self) -> Iterator[Array]:
        """Divide and round."""
        for sums in _blocks(self._sums):
            self.finite = self.finite and bool(np.isfinite(sums).all())
            yield rounded(np.divide(sums, sums.dtype.type(self._total), out=self._scratch[: sums.size]), self._dtype)

    def written(self) -> list[Buffer]:
        """Give the sums as they are."""
        self.finite = all(np.isfinite(sums).all() for sums in _blocks(self._sums))
        return super().written()


class IntegerSums(_NumberSums):
    """Sums of integers that int64 holds."""

    __slots__ = ()

    finite = True

    def means(self) -> Iterator[Array]:
        """Divide and round."""
        return (_divided(sums, self._total).astype(NUMPY[self._dtype]) for sums in _blocks(self._sums))


class WideSums:
    """Sums that may not fit into int64, as Python's integers; written as two words each, the lower one first, in two's complement."""

    __slots__ = ("_dtype", "_sums", "_total")

    finite = True

    def __init__(self, dtype: str, length: int, total: int) -> None:
        self._dtype, self._total, self._sums = dtype, total, np.zeros(length, object)

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add weighted elements."""
        self._sums[first : first + elements.size] += elements.astype(object) * weight

    def means(self) -> Iterator[Array]:
        """Divide and round."""
        return (_divided(sums, self._total).astype(NUMPY[self._dtype]) for sums in _blocks(self._sums))

    def written(self) -> list[Buffer]:
        """Give the words of the sums."""
        words = np.empty(self._sums.size, _I128)
        for i, sums in zip(range(0, words.size, BLOCK), _blocks(self._sums), strict=True):
            words["low"][i : i + BLOCK] = (sums & _WORD).astype(np.uint64)
            words["high"][i : i + BLOCK] = (sums >> 64).astype(np.int64)
        return [words.view(np.uint8).data]

    def merge(self, take: Take) -> None:
        """Add other sums."""
        for sums in _blocks(self._sums):
            words = np.frombuffer(take(_I128.itemsize * sums.size), _I128)
            np.add(sums, words["high"].astype(object) * (1 << 64) + words["low"].astype(object), out=sums)


def _blocks(sums: Array) -> Iterator[Array]:
    return (sums[i : i + BLOCK] for i in range(0, sums.size, BLOCK))


def _divided(sums: Array, total: int) -> Array:
    """Divide exactly and round to nearest, ties to even; ``sums`` are int64 or Python integers."""
    quotient = sums // total
    twice = (sums - quotient * total) * 2
    quotient += (twice > total) | ((twice == total) & (quotient % 2 == 1))
    return quotient
