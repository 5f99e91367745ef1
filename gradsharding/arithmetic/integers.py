"""Elements as Python's own numbers, and their weighted mean: what checks results. It shares nothing with the accumulators.

A float is an integer times the format's least subnormal; so a weighted sum is an integer, and the mean a quotient of two.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

CODES = {
    "F64": "Q", "F32": "I", "F16": "H", "BF16": "H",
    "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?",
}  # fmt: skip
"""What ``struct`` reads elements as: integers, and floats as their bits."""


class Binary(NamedTuple):
    """A float format of IEEE 754, or bfloat16: bits of the exponent, and of the significand but the leading one."""

    exponent: int
    fraction: int


BINARY = {"F64": Binary(11, 52), "F32": Binary(8, 23), "F16": Binary(5, 10), "BF16": Binary(8, 7)}


def mean(dtype: str, columns: Sequence[Iterable[int]], weights: Sequence[int]) -> list[int]:
    """Give the weighted mean of each place of the columns, rounded once to nearest, ties to even; elements are as ``CODES`` has them.

    >>> one, two, three = 0x3F800000, 0x40000000, 0x40400000  # as float32
    >>> mean("F32", [[one, three], [three, three]], [1, 1]) == [two, three]
    True
    """
    mean_of = _mean_of_floats if dtype in BINARY else _mean_of_integers
    return [mean_of(dtype, elements, weights) for elements in zip(*columns, strict=True)]


def _mean_of_integers(_: str, elements: Sequence[int], weights: Sequence[int]) -> int:
    return nearest(sum(weight * element for element, weight in zip(elements, weights, strict=True)), sum(weights))


def _mean_of_floats(dtype: str, elements: Sequence[int], weights: Sequence[int]) -> int:
    """Give the bits of the mean of floats, given as bits."""
    form = BINARY[dtype]
    infinity = ((1 << form.exponent) - 1) << form.fraction
    total, specials = 0, set[int]()
    for element, weight in zip(elements, weights, strict=True):
        sign, size = element >> form.exponent + form.fraction, element & ((1 << form.exponent + form.fraction) - 1)
        if size >= infinity:
            specials.add(element)
        else:
            exponent, fraction = size >> form.fraction, size & ((1 << form.fraction) - 1)
            magnitude = fraction | 1 << form.fraction if exponent else fraction
            total += (-weight if sign else weight) * (magnitude << max(exponent - 1, 0))
    if specials:
        special = specials.pop()
        plain = not specials and special & infinity == special & ~(1 << form.exponent + form.fraction)
        return special if plain else infinity | 1 << (form.fraction - 1)
    return _rounded(abs(total), sum(weights), form) | (total < 0) << form.exponent + form.fraction


def _rounded(total: int, weight: int, form: Binary) -> int:
    """Give the bits of the positive float next to a quotient, in units of the least subnormal."""
    shift = max((total // weight).bit_length() - form.fraction - 1, 0)
    return (shift << form.fraction) + nearest(total, weight << shift)  # the leading bit of the second adds one to the exponent


def nearest(numerator: int, denominator: int) -> int:
    """Divide and round to nearest, ties to even."""
    quotient, rest = divmod(numerator, denominator)
    return quotient + (2 * rest > denominator or (2 * rest == denominator and quotient % 2 == 1))


def to_float(dtype: str, element: int) -> float:
    """Give a float, which has the value of an element given as bits.

    >>> to_float("BF16", 0x3FC0), to_float("F64", 1), to_float("F16", 0xFC00)
    (1.5, 5e-324, -inf)
    """
    form = BINARY[dtype]
    sign, size = element >> form.exponent + form.fraction, element & ((1 << form.exponent + form.fraction) - 1)
    exponent, fraction = size >> form.fraction, size & ((1 << form.fraction) - 1)
    if exponent == (1 << form.exponent) - 1:
        magnitude = math.nan if fraction else math.inf
    else:
        magnitude = math.ldexp(fraction | 1 << form.fraction if exponent else fraction, max(exponent, 1) - _bias(form))
    return -magnitude if sign else magnitude


def to_bits(dtype: str, value: float) -> int:
    """Give the bits of the element next to a float, ties to even; every NaN has the same bits.

    >>> hex(to_bits("BF16", 1.5)), hex(to_bits("F16", 1e9)), hex(to_bits("F32", -0.1))
    ('0x3fc0', '0x7c00', '0xbdcccccd')
    """
    form = BINARY[dtype]
    infinity = ((1 << form.exponent) - 1) << form.fraction
    if math.isnan(value):
        return infinity | 1 << (form.fraction - 1)
    if math.isinf(value):
        size = infinity
    else:
        units = abs(Fraction(value)) * Fraction(2) ** (_bias(form) - 1)
        size = min(infinity, _rounded(units.numerator, units.denominator, form))
    return size | (math.copysign(1, value) < 0) << form.exponent + form.fraction


def _bias(form: Binary) -> int:
    """Exponent of the least subnormal, negated, plus one."""
    return (1 << (form.exponent - 1)) - 2 + form.fraction + 1
