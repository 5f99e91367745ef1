"""Exact sums of floats: each is a number in base 2**48 whose digits lie in planes, and no bit of it is ever rounded away.

So a sum is a function of the set of weighted elements that are in it. It cannot depend on their order, on how they were grouped,
or on where the vector was cut; and the mean is what real arithmetic gives, rounded once: to nearest, ties to even.

A plane holds one digit of every element, in float64, as a multiple of the plane's unit. A digit may outgrow its 48 bits by 5 before it
would lose one, so that an addition is one numpy pass a plane, and carries are put off. This is the long accumulator of U. Kulisch in
the layout of the bins of J. Demmel and H. D. Nguyen ("Fast reproducible floating-point summation", ARITH 2013), which drop what lies
below the last of them; here a plane is begun for whatever is there.

An exact zero is +0; a mean that is not zero keeps its sign, though it may round to zero. Any NaN, or infinities of both signs, make
NaN; of one sign, that infinity. The mean of finite elements cannot overflow.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from gradsharding.dtypes import FORMATS, NUMPY, Array, Buffer, Format, rounded, widen
from gradsharding.errors import InvalidUpdate, UserError

BLOCK = 16_384
"""Elements per step: the block, its digits and the temporaries stay in the second-level cache."""

BLOCK_SIZE = 1 << 10
"""Bytes that bound what is kept of a block beside its digits."""

DIGIT = 48
"""Bits of a digit."""

DIGIT_BYTES = DIGIT // 8

_HALF = 2.0 ** (DIGIT - 1)
"""A carried digit is at least minus this, and less than this."""

_MOST = 2.0**53 - 2.0**7
"""What a digit may reach in magnitude, in units: float64 holds every integer up to there, and a carry from below has room."""

_TOP = 50
"""Bits that an addend may have above the unit of the highest plane it goes to."""

_PRODUCT = 53
"""Bits of float64: an element times a part of a weight must fit in."""

_CLOSE = 2.0**-50
"""A quotient is known to at most half of this, relatively."""

NAN, PLUS, MINUS = 1, 2, 4
"""What is told of an element that had no finite addends only."""


def planes(dtype: str, total: int) -> int:
    """Number of digits that sums of ``dtype`` elements (F32, F16 or BF16) under ``total`` weight may have.

    >>> planes("F32", 1000), planes("BF16", 1000), planes("F16", 1000)
    (7, 6, 2)
    """
    form = FORMATS[dtype]
    bits = form.greatest - _lowest(dtype) + total.bit_length() + 1
    return -(-bits // DIGIT)


def memory(dtype: str, length: int, total: int) -> int:
    """Bytes of memory that bound such sums, temporaries not counted."""
    return length * (8 * planes(dtype, total) + 1) + BLOCK_SIZE * -(-length // BLOCK)


def written_bytes(dtype: str, length: int, total: int) -> int:
    """Bytes that bound such sums as they are written."""
    count = planes(dtype, total)
    return 1 + 2 * count * -(-length // BLOCK) + length * (DIGIT_BYTES * count + 1)


class ExactSums:
    """Sums of ``length`` elements of F32, F16 or BF16; ``total`` is the sum of all weights that will be in the mean, 2**53 at most.

    Arrays have one dimension; those of elements have the dtype that ``NUMPY`` names, so that bfloat16 comes and goes as its bits.

    >>> sums = ExactSums("F32", 1, 3, np.zeros(8 * planes("F32", 3), np.uint8))
    >>> for value in (2.0**60, 1.0, -(2.0**60)):
    ...     sums.add(0, np.float32([value]), 1)
    >>> sums.mean(0, 1).tolist() == [np.float32(1 / 3)]
    True
    """

    def __init__(self, dtype: str, length: int, total: int, place: Array) -> None:
        """Keep sums in ``place``: uint8 zeros, 8 for each element and plane. Raise UserError where subnormal numbers are lost."""
        _require_subnormals()
        self._dtype, self._form, self._length, self._total = dtype, FORMATS[dtype], length, total
        units = _units(dtype, total)
        self._bytes, digits = place.reshape(len(units), 8 * length), place.view("<f8").reshape(len(units), length)
        self._blocks = [_Block(digits[:, i : i + BLOCK], units) for i in range(0, length, BLOCK)]
        self._scratch = _Scratch(min(length, BLOCK), self._form.bits)
        self._specials: Array | None = None

    @property
    def finite(self) -> bool:
        """Whether all that was added is finite."""
        return self._specials is None

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add ``weight`` times ``elements``, from element ``first`` on; they lie within one block."""
        form, scratch = self._form, self._scratch
        bits, product = scratch.bits[: elements.size], scratch.product[: elements.size]
        most = _magnitudes(elements, form, bits)
        if most >= _infinity(form):
            elements = self._set_aside(first, elements)
            most = _magnitudes(elements, form, bits)
        if not most:
            return
        np.subtract(bits, 1, out=bits)  # zeros wrap round
        low, high = _last_place(form, int(bits.min()) + 1), _last_place(form, most) + form.mantissa + 1
        block, start = self._blocks[first // BLOCK], first % BLOCK
        values = widen(elements) if self._dtype == "BF16" else elements
        for part, shift in _parts(weight, _PRODUCT - form.mantissa - 1):
            np.copyto(product, values)
            np.multiply(product, math.ldexp(part, shift), out=product)  # exact
            block.add(start, product, low + shift, high + shift + part.bit_length(), scratch.rounded[: elements.size])

    def mean(self, first: int, count: int) -> Array:
        """Give the ``count`` means of the block that begins at element ``first``, rounded once to the elements' dtype."""
        block, total = self._blocks[first // BLOCK], float(self._total)
        near = block.head() / total  # off by 2**-51 of itself at most: by the sum of the digits, and by the division
        below, above = rounded(near * (1 - _CLOSE), self._dtype), rounded(near * (1 + _CLOSE), self._dtype)
        undecided = np.flatnonzero(below != above)
        if undecided.size:
            below[undecided] = self._decided(block, undecided, *(self._wide(some[undecided]) for some in (below, above)))
        if self._specials is not None:
            told = self._specials[first : first + count]
            value = np.where(told & PLUS, np.inf, -np.inf)
            value[(told & NAN != 0) | (told & (PLUS | MINUS) == PLUS | MINUS)] = np.nan
            below[told != 0] = rounded(value, self._dtype)[told != 0]
        return below

    def written(self) -> list[Buffer]:
        """Give the sums in a form that ``merge`` reads, equal bytes for equal sums. Ends them: it is made in their own memory.

        A table has two bytes for each plane and block: a digit is a multiple of 256 to the first, and has so many bytes as the second says.
        The digits follow, plane by plane, little-endian in two's complement; where an element was not finite, a byte for each tells.
        """
        table = np.zeros((len(self._bytes), len(self._blocks), 2), np.uint8)
        ends = [0] * len(self._bytes)
        for b, block in enumerate(self._blocks):
            block.carry()
            for p, digits in block.used():
                low, width, packed = _pack(digits)
                table[p, b] = low, width
                self._bytes[p, ends[p] : ends[p] + packed.size] = packed
                ends[p] += packed.size
        rows: list[Buffer] = [row[:end].data for row, end in zip(self._bytes, ends, strict=True) if end]
        told: list[Buffer] = [] if self._specials is None else [self._specials.data]
        return [bytes([bool(told)]), table.data, *rows, *told]

    def merge(self, take: Callable[[int], Buffer]) -> None:
        """Add what other sums of the same dtype, length and total have written; ``take`` gives the next so many bytes of it.

        Raise InvalidUpdate if they were not written so.
        """
        told = take(1)[0]
        table = np.frombuffer(bytes(take(2 * len(self._bytes) * len(self._blocks))), np.uint8).reshape(
            len(self._bytes), len(self._blocks), 2
        )
        if (table.sum(2) > DIGIT_BYTES).any():
            raise InvalidUpdate("partial sums have digits wider than 48 bits; they were not written as exact sums of this release")
        for p, row in enumerate(table.tolist()):
            for block, (low, width) in zip(self._blocks, row, strict=True):
                if width:
                    block.merge(p, _unpack(take(width * block.size), low, width))
        if told:
            self._know(0, np.frombuffer(take(self._length), np.uint8))

    def _set_aside(self, first: int, elements: Array) -> Array:
        """Note which elements are not finite, and give zeros in their place."""
        values = widen(elements) if self._dtype == "BF16" else elements
        told = NAN * np.isnan(values) + PLUS * (values == np.inf) + MINUS * (values == -np.inf)
        self._know(first, told.astype(np.uint8))
        return np.where(told != 0, 0, elements).astype(elements.dtype)

    def _know(self, first: int, told: Array) -> None:
        if self._specials is None:
            self._specials = np.zeros(self._length, np.uint8)
        self._specials[first : first + told.size] |= told

    def _wide(self, elements: Array) -> Array:
        return (widen(elements) if self._dtype == "BF16" else elements).astype(np.float64)

    def _decided(self, block: "_Block", some: Array, below: Array, above: Array) -> Array:
        """Decide between two neighbours by the exact sign of the sum less their middle's share of the total."""
        middle = (below + above) / 2  # exact: at most one bit more than an element has
        least = math.frexp(float(np.abs(middle).min()))[1] - self._form.mantissa - 2
        low, high = max(least, _lowest(self._dtype)), math.frexp(float(np.abs(middle).max()))[1]
        rest = block.some(some)
        for part, shift in _parts(self._total, _PRODUCT - self._form.mantissa - 2):
            rest.add(0, middle * -math.ldexp(part, shift), low + shift, high + shift + part.bit_length(), np.empty(some.size))
        sign, farther = rest.sign(), np.where(middle > 0, 1, -1)  # ``above`` is the one farther from zero
        return rounded(np.where(sign == 0, middle, np.where(sign == farther, above, below)), self._dtype)


class _Scratch:
    """Room for one block's temporaries."""

    def __init__(self, size: int, bits: str) -> None:
        self.product, self.rounded, self.bits = np.empty(size), np.empty(size), np.empty(size, bits)


class _Block:
    """The digits of some elements: ``digits[p]`` are multiples of ``units[p]``, of magnitude ``bounds[p]`` at most, in units."""

    __slots__ = ("_bounds", "_digits", "_units")

    def __init__(self, digits: Array, units: list[float], bounds: list[float] | None = None) -> None:
        self._digits, self._units = digits, units
        self._bounds = bounds or [0.0] * len(units)

    @property
    def size(self) -> int:
        return int(self._digits.shape[1])

    def add(self, start: int, values: Array, low: int, high: int, spare: Array) -> None:
        """Add ``values``, which are multiples of ``2**low`` below ``2**high``; they are overwritten."""
        units, lowest = self._units, math.frexp(self._units[0])[1] - 1
        last = (low - lowest) // DIGIT
        top = max(last, -(-(high - _TOP - lowest) // DIGIT))
        self._expect({**dict.fromkeys(range(last, top), _HALF), top: 2.0 ** (high - lowest - DIGIT * top)})
        for p in range(top, last, -1):
            digits = self._digits[p, start : start + values.size]
            _to_multiples(values, units[p], spare)
            np.add(digits, spare, out=digits)
            np.subtract(values, spare, out=values)
        digits = self._digits[last, start : start + values.size]
        np.add(digits, values, out=digits)

    def merge(self, p: int, digits: Array) -> None:
        """Add carried digits, in units, to plane ``p``."""
        self._expect({p: _HALF})
        self._digits[p] += digits * self._units[p]

    def carry(self) -> None:
        """Bring every digit but the highest below 48 bits: between minus and plus a half of the next unit. They are then unique."""
        units, bounds = self._units, self._bounds
        carried = np.empty(self.size)
        for p, (unit, following) in enumerate(pairwise(units)):
            if not bounds[p]:
                continue
            digits = self._digits[p]
            _to_multiples(digits, following, carried)
            digits -= carried
            ties = digits == _HALF * unit  # which were rounded to even, maybe down
            if ties.any():
                digits[ties] -= following
                carried[ties] += following
            bounds[p] = _HALF
            if carried.any():
                self._digits[p + 1] += carried
                bounds[p + 1] += 2.0 ** (54 - DIGIT)

    def head(self) -> Array:
        """Give the sums to about float64's precision: the digits are carried, then added from the lowest to the highest."""
        self.carry()
        total = np.zeros(self.size)
        for p in range(len(self._units)):
            if self._bounds[p]:
                total += self._digits[p]
        return total

    def sign(self) -> Array:
        """Give the exact sign of each sum: that of its highest digit, as the others amount to less than one unit of it."""
        self.carry()
        sign = np.zeros(self.size)
        for p in range(len(self._units)):
            if self._bounds[p]:
                digits = self._digits[p]
                sign = np.where(digits != 0, np.sign(digits), sign)
        return sign

    def used(self) -> list[tuple[int, Array]]:
        """Give the planes that may hold something, and their digits in units."""
        return [(p, (self._digits[p] / unit).astype(np.int64)) for p, unit in enumerate(self._units) if self._bounds[p]]

    def some(self, which: Array) -> "_Block":
        """Copy the digits of some of the elements."""
        return _Block(self._digits[:, which], self._units, self._bounds.copy())

    def _expect(self, addends: dict[int, float]) -> None:
        """Make room for addends up to so many units in some planes. The highest plane always has it: ``planes`` counts to there."""
        if any(self._bounds[p] + units > _MOST for p, units in addends.items()):
            self.carry()
        for p, units in addends.items():
            self._bounds[p] += units


def _lowest(dtype: str) -> int:
    """Exponent of the lowest plane's unit: half of the least subnormal, which a middle between two elements may need."""
    return FORMATS[dtype].least - 1


def _units(dtype: str, total: int) -> list[float]:
    return [math.ldexp(1.0, _lowest(dtype) + DIGIT * p) for p in range(planes(dtype, total))]


def _to_multiples(values: Array, unit: float, out: Array) -> None:
    """Round to multiples of ``unit``, ties to even: beside 1.5 * 2**52 of them, float64 has no room for less."""
    magic = 1.5 * 2.0**52 * unit
    np.add(values, magic, out=out)
    np.subtract(out, magic, out=out)


def _last_place(form: Format, bits: int) -> int:
    """Exponent of the unit in the last place of a positive element with these bits."""
    return form.least - 1 + max(bits >> form.mantissa, 1)


def _magnitudes(elements: Array, form: Format, out: Array) -> int:
    """Write the bits of elements without their signs, and give the largest: as integers, they are in the order of the magnitudes."""
    np.bitwise_and(elements.view(form.bits), _infinity(form) | ((1 << form.mantissa) - 1), out=out)
    return int(out.max())


def _infinity(form: Format) -> int:
    """Bits of infinity: a larger number is NaN."""
    return (2 * form.greatest - 1) << form.mantissa


def _parts(weight: int, bits: int) -> list[tuple[int, int]]:
    """Cut a weight into parts of so many bits, and the shift of each; parts that are zero are left out."""
    mask = (1 << bits) - 1
    return [(part, shift) for shift in range(0, weight.bit_length(), bits) if (part := weight >> shift & mask)]


def _pack(digits: Array) -> tuple[int, int, Array]:
    """Give the bytes of digits without those that are zero in all of them below, or tell only the sign above."""
    together, most = int(np.bitwise_or.reduce(digits)), max(int(digits.max()), -1 - int(digits.min()))
    if not together:
        return 0, 0, np.zeros(0, np.uint8)
    low = ((together & -together).bit_length() - 1) // 8
    high = most.bit_length() // 8 + 1
    return low, high - low, np.ascontiguousarray(digits.view(np.uint8).reshape(-1, 8)[:, low:high]).reshape(-1)


def _unpack(data: Buffer, low: int, width: int) -> Array:
    """Give digits back from their bytes."""
    words = np.zeros((len(data) // width, 8), np.uint8)
    words[:, 8 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return words.view("<i8").reshape(-1) >> 8 * (8 - width) << 8 * low


def _require_subnormals() -> None:
    """Raise UserError if this thread takes subnormal numbers for zero: products would lose them, and so would means."""
    if not np.array([1e-45], NUMPY["F32"]).astype(np.float64)[0] or not np.array([1e-45]).astype(NUMPY["F32"])[0]:
        raise UserError(
            "this thread takes subnormal numbers for zero, and exact sums need them: "
            "call torch.set_flush_denormal(False), or use worker processes"
        )
