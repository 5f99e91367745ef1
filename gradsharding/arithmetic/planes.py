"""Numbers in base 2**48: one plane of float64 holds one digit of every number, as a multiple of the plane's unit.

No bit is ever rounded away. A digit has room for 53 bits, so carries can wait, and an addition is one numpy pass over each plane. This
is U. Kulisch's long accumulator in the layout of the bins of J. Demmel and H. D. Nguyen ("Fast reproducible floating-point summation",
ARITH 2013). Their lowest bin drops smaller bits; here there is a plane for every bit.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np

from gradsharding.format.dtypes import Array, Buffer

DIGIT = 48
"""Bits of a carried digit."""

DIGIT_BYTES = DIGIT // 8

PRODUCT = 53
"""Bits of float64's significand: an exact product must fit into them."""

_HALF = 2.0 ** (DIGIT - 1)
"""A carried digit, in units, is at least ``-_HALF`` and less than ``_HALF``."""

_MOST = 2.0**53 - 2.0**7
"""Largest magnitude of a digit, in units: float64 holds every integer up to here, and a carry from below still fits."""

_TOP = 50
"""Bits that an addend may have above the unit of the highest plane that it is added to."""


@cache
def units(lowest: int, count: int) -> tuple[float, ...]:
    """Return the units of ``count`` planes; the lowest is ``2**lowest``."""
    return tuple(math.ldexp(1.0, lowest + DIGIT * p) for p in range(count))


class Digits:
    """The digits of many numbers, changed in place: ``planes[p]`` has multiples of ``units[p]``."""

    __slots__ = ("_bounds", "_planes", "_units")

    def __init__(self, planes: Array, units: tuple[float, ...], bounds: list[float] | None = None) -> None:
        """Use ``planes`` (float64, plane by number). They are zeros, or have magnitudes up to ``bounds``, in units."""
        self._planes, self._units = planes, units
        self._bounds = bounds or [0.0] * len(units)

    @property
    def size(self) -> int:
        """Number of numbers."""
        return int(self._planes.shape[1])

    def add(self, start: int, values: Array, low: int, high: int, spare: Array) -> None:
        """Add ``values``, multiples of ``2**low`` below ``2**high``, to the numbers from ``start`` on. Overwrites both arrays."""
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
        """Return the numbers in about float64's precision: carry, then add the digits from the lowest to the highest."""
        self._carry()
        total = np.zeros(self.size)
        for p in self._used():
            total += self._planes[p]
        return total

    def sign(self) -> Array:
        """Return the exact sign of each number: that of its highest digit, since the lower ones amount to less than one unit of it."""
        self._carry()
        sign = np.zeros(self.size)
        for p in self._used():
            digits = self._planes[p]
            sign = np.where(digits != 0, np.sign(digits), sign)
        return sign

    def carried(self) -> list[tuple[int, Array]]:
        """Return the planes that may have nonzero digits, with their carried digits in units (int64). Equal numbers have equal digits."""
        self._carry()
        return [(p, (self._planes[p] / self._units[p]).astype(np.int64)) for p in self._used()]

    def select(self, indices: Array) -> "Digits":
        """Copy the digits of the numbers at ``indices``."""
        return Digits(self._planes[:, indices], self._units, self._bounds.copy())

    def _used(self) -> list[int]:
        return [p for p, bound in enumerate(self._bounds) if bound]

    def _expect(self, addends: dict[int, float]) -> None:
        """Carry first if ``addends`` (magnitude by plane, in units) could push a digit beyond ``_MOST``. The top plane is sized for all."""
        if any(self._bounds[p] + units > _MOST for p, units in addends.items()):
            self._carry()
        for p, units in addends.items():
            self._bounds[p] += units

    def _carry(self) -> None:
        """Carry: bring every digit but the highest between minus and plus half of the next plane's unit."""
        units, bounds = self._units, self._bounds
        carried = np.empty(self.size)
        for p, (unit, following) in enumerate(pairwise(units)):
            if not bounds[p]:
                continue
            digits = self._planes[p]
            _to_multiples(digits, following, carried)
            digits -= carried
            ties = digits == _HALF * unit  # rounded to even, so possibly down
            if ties.any():
                digits[ties] -= following
                carried[ties] += following
            bounds[p] = _HALF
            if carried.any():
                self._planes[p + 1] += carried
                bounds[p + 1] += 2.0 ** (54 - DIGIT)


def pack(digits: Array) -> tuple[int, int, Array]:
    """Strip the bytes that are zero in every digit (low end), or only extend the sign (high end).

    Return the bytes stripped at the low end, the bytes kept of each digit, and these (uint8), digit by digit.
    """
    together, most = int(np.bitwise_or.reduce(digits)), max(int(digits.max()), -1 - int(digits.min()))
    if not together:
        return 0, 0, np.zeros(0, np.uint8)
    low = ((together & -together).bit_length() - 1) // 8
    high = most.bit_length() // 8 + 1
    return low, high - low, np.ascontiguousarray(digits.view(np.uint8).reshape(-1, 8)[:, low:high]).reshape(-1)


def unpack(data: Buffer, low: int, width: int) -> Array:
    """Restore digits (int64) from the bytes that ``pack`` kept."""
    words = np.zeros((len(data) // width, 8), np.uint8)
    words[:, 8 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return words.view("<i8").reshape(-1) >> 8 * (8 - width) << 8 * low


def _to_multiples(values: Array, unit: float, out: Array) -> None:
    """Round to multiples of ``unit``, ties to even, by adding 1.5 * 2**52 units: such a float64 has no bits below one unit."""
    magic = 1.5 * 2.0**52 * unit
    np.add(values, magic, out=out)
    np.subtract(out, magic, out=out)
