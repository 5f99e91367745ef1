"""The weighted mean in Python's own integers, which round nothing: what checks exact results. It shares nothing with the accumulators.

A float is an integer times the format's least subnormal; so a weighted sum is an integer, and the mean a quotient of two.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

CODES = {
    "F32": "I", "F16": "H", "BF16": "H",
    "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?",
}  # fmt: skip
"""What ``struct`` reads elements as: integers, and floats as their bits."""


class Binary(NamedTuple):
    """A float format of IEEE 754, or bfloat16: bits of the exponent, and of the significand but the leading one."""

    exponent: int
    fraction: int


BINARY = {"F32": Binary(8, 23), "F16": Binary(5, 10), "BF16": Binary(8, 7)}


def mean(dtype: str, columns: Sequence[Iterable[int]], weights: Sequence[int]) -> list[int]:
    """Give the weighted mean of each place of the columns, rounded once to nearest, ties to even; elements are as ``CODES`` has them.

    >>> one, two, three = 0x3F800000, 0x40000000, 0x40400000  # as float32
    >>> mean("F32", [[one, three], [three, three]], [1, 1]) == [two, three]
    True
    """
    one = _mean_of_floats if dtype in BINARY else _mean_of_integers
    return [one(dtype, elements, weights) for elements in zip(*columns, strict=True)]


def _mean_of_integers(_: str, elements: Sequence[int], weights: Sequence[int]) -> int:
    return _nearest(sum(weight * element for element, weight in zip(elements, weights, strict=True)), sum(weights))


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
        one = specials.pop()
        plain = not specials and one & infinity == one & ~(1 << form.exponent + form.fraction)
        return one if plain else infinity | 1 << (form.fraction - 1)
    return _rounded(abs(total), sum(weights), form) | (total < 0) << form.exponent + form.fraction


def _rounded(total: int, weight: int, form: Binary) -> int:
    """Give the bits of the positive float next to a quotient, in units of the least subnormal."""
    shift = max((total // weight).bit_length() - form.fraction - 1, 0)
    return (shift << form.fraction) + _nearest(total, weight << shift)  # the leading bit of the second adds one to the exponent


def _nearest(numerator: int, denominator: int) -> int:
    """Divide and round to nearest, ties to even."""
    quotient, rest = divmod(numerator, denominator)
    return quotient + (2 * rest > denominator or (2 * rest == denominator and quotient % 2 == 1))
