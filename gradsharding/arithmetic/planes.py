"""Numbers in base 2**48: one plane of float64 holds one digit of every number, as a multiple of the plane's unit.

Here nothing is ever rounded away. A digit may outgrow its 48 bits by 5 before it would lose one, so that an addition is one numpy
pass a plane, and carries are put off. This is the long accumulator of U. Kulisch in the layout of the bins of J. Demmel and
H. D. Nguyen ("Fast reproducible floating-point summation", ARITH 2013), which drop what lies below the last of them; here a plane is
begun for whatever is there.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np

from gradsharding.format.dtypes import Array, Buffer

DIGIT = 48
"""Bits of a digit."""

DIGIT_BYTES = DIGIT // 8

PRODUCT = 53
"""Bits of float64: what is multiplied exactly must fit in."""

_HALF = 2.0 ** (DIGIT - 1)
"""A carried digit is at least minus this, and less than this."""

_MOST = 2.0**53 - 2.0**7
"""What a digit may reach in magnitude, in units: float64 holds every integer up to there, and a carry from below has room."""

_TOP = 50
"""Bits that an addend may have above the unit of the highest plane it goes to."""


@cache
def units(lowest: int, count: int) -> tuple[float, ...]:
    """Units of ``count`` planes, of which the lowest one's is ``2**lowest``."""
    return tuple(math.ldexp(1.0, lowest + DIGIT * p) for p in range(count))


class Digits:
    """The digits of some numbers, changed in place: ``planes[p]`` are multiples of ``units[p]``."""

    __slots__ = ("_bounds", "_planes", "_units")

    def __init__(self, planes: Array, units: tuple[float, ...], bounds: list[float] | None = None) -> None:
        """Take ``planes`` (float64, plane by number), all zeros or of magnitudes up to ``bounds``, in units."""
        self._planes, self._units = planes, units
        self._bounds = bounds or [0.0] * len(units)

    @property
    def size(self) -> int:
        """How many numbers."""
        return int(self._planes.shape[1])

    def add(self, start: int, values: Array, low: int, high: int, spare: Array) -> None:
        """Add ``values`` from number ``start`` on: multiples of ``2**low`` below ``2**high``. They and ``spare`` are overwritten."""
        lowest = math.frexp(self._units[0])[1] - 1
        last = (low - lowest) // DIGIT
        top = max(last, -(-(high - _TOP - lowest) // DIGIT))
        self._expect({**dict.fromkeys(range(last, top), _HALF), top: 2.0 ** (high - lowest - DIGIT * top)})
        for p in range(top, last, -1):
            digits = self._planes[p, start : start + values.size]
            _to_multiples(values, self._units[p], spare)
            np.add(digits, spare, out=digits)
            np.subtract(values, spare, out=values)
        digits = self._planes[last, start : start + values.size]
        np.add(digits, values, out=digits)

    def merge(self, p: int, digits: Array) -> None:
        """Add carried digits, in units, to plane ``p``."""
        self._expect({p: _HALF})
        self._planes[p] += digits * self._units[p]

    def head(self) -> Array:
        """Give the numbers to about float64's precision: their digits are carried, then added from the lowest to the highest."""
        self._carry()
        total = np.zeros(self.size)
        for p in self._used():
            total += self._planes[p]
        return total

    def sign(self) -> Array:
        """Give the exact sign of each number: that of its highest digit, as the others amount to less than one unit of it."""
        self._carry()
        sign = np.zeros(self.size)
        for p in self._used():
            digits = self._planes[p]
            sign = np.where(digits != 0, np.sign(digits), sign)
        return sign

    def carried(self) -> list[tuple[int, Array]]:
        """Give the planes that may hold something, and their carried digits in units, as int64: they are unique."""
        self._carry()
        return [(p, (self._planes[p] / self._units[p]).astype(np.int64)) for p in self._used()]

    def some(self, which: Array) -> "Digits":
        """Copy the digits of some of the numbers."""
        return Digits(self._planes[:, which], self._units, self._bounds.copy())

    def _used(self) -> list[int]:
        return [p for p, bound in enumerate(self._bounds) if bound]

    def _expect(self, addends: dict[int, float]) -> None:
        """Make room for addends up to so many units in some planes. The highest plane always has it: its owner counts to there."""
        if any(self._bounds[p] + units > _MOST for p, units in addends.items()):
            self._carry()
        for p, units in addends.items():
            self._bounds[p] += units

    def _carry(self) -> None:
        """Bring every digit but the highest below 48 bits: between minus and plus a half of the next unit."""
        units, bounds = self._units, self._bounds
        carried = np.empty(self.size)
        for p, (unit, following) in enumerate(pairwise(units)):
            if not bounds[p]:
                continue
            digits = self._planes[p]
            _to_multiples(digits, following, carried)
            digits -= carried
            ties = digits == _HALF * unit  # which were rounded to even, maybe down
            if ties.any():
                digits[ties] -= following
                carried[ties] += following
            bounds[p] = _HALF
            if carried.any():
                self._planes[p + 1] += carried
                bounds[p + 1] += 2.0 ** (54 - DIGIT)


def pack(digits: Array) -> tuple[int, int, Array]:
    """Give the bytes (uint8) of int64 digits, but not those that are zero in all of them below, or tell only the sign above.

    They are multiples of 256 to the first number that comes with them, and have so many bytes as the second says.
    """
    together, most = int(np.bitwise_or.reduce(digits)), max(int(digits.max()), -1 - int(digits.min()))
    if not together:
        return 0, 0, np.zeros(0, np.uint8)
    low = ((together & -together).bit_length() - 1) // 8
    high = most.bit_length() // 8 + 1
    return low, high - low, np.ascontiguousarray(digits.view(np.uint8).reshape(-1, 8)[:, low:high]).reshape(-1)


def unpack(data: Buffer, low: int, width: int) -> Array:
    """Give digits back from their bytes."""
    words = np.zeros((len(data) // width, 8), np.uint8)
    words[:, 8 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return words.view("<i8").reshape(-1) >> 8 * (8 - width) << 8 * low


def _to_multiples(values: Array, unit: float, out: Array) -> None:
    """Round to multiples of ``unit``, ties to even: beside 1.5 * 2**52 of them, float64 has no room for less."""
    magic = 1.5 * 2.0**52 * unit
    np.add(values, magic, out=out)
    np.subtract(out, magic, out=out)
