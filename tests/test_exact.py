"""Exact sums have the bits of real arithmetic, rounded once, whatever the order, the grouping and the data."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.arithmetic import exact
from gradsharding.arithmetic.exact import ExactSums, planes
from gradsharding.errors import InvalidUpdate, UserError
from gradsharding.format.dtypes import FORMATS, NUMPY, Array, Format, Run, widen

Terms = Sequence[tuple[Array, int]]

DTYPES = ["F32", "F16", "BF16"]
KINDS = ["any bits", "gradients", "cancelling", "subnormal", "halfway", "far apart", "neighbours"]


def bits(dtype: str, values: Array) -> Array:
    """Give elements as their bits."""
    return values.view(FORMATS[dtype].bits)


def wide(dtype: str, values: Array) -> Array:
    """Give the equal float64 values; float32's casts are exact."""
    return widen(values, dtype).astype(np.float64)


def expected(dtype: str, terms: Terms) -> list[int]:
    """Give the bits of the correctly rounded mean, by Python's integers and rational numbers alone."""
    total, form = sum(weight for _, weight in terms), FORMATS[dtype]
    # in the format's smallest unit, every element is an integer, and float64 holds it
    columns = zip(*(np.ldexp(wide(dtype, values), -form.least).tolist() for values, _ in terms), strict=True)
    sums = (sum(w * int(x) for x, (_, w) in zip(column, terms, strict=True)) for column in columns)
    return [rounded(Fraction(found, total), form) for found in sums]


def rounded(mean: Fraction, form: Format) -> int:
    """Round a number of units to nearest, ties to even: bits of the format. Those of finite elements are in the order of magnitudes."""
    magnitude = abs(mean)
    exponent: int = max(0, int(magnitude).bit_length() - form.mantissa - 1)
    found = (exponent << form.mantissa) + round(magnitude / (1 << exponent))  # the leading bit is the one that makes the exponent 1
    sign = 1 << (8 * np.dtype(form.bits).itemsize - 1)
    return found | (sign if mean < 0 else 0)


def sums(dtype: str, length: int, total: int) -> ExactSums:
    """Begin sums in memory of their own."""
    return ExactSums(dtype, length, total, np.zeros(8 * length * planes(dtype, total), np.uint8), np.empty((3, exact.BLOCK)))


def mean(of: ExactSums, dtype: str) -> list[int]:
    """Give the bits of the mean."""
    return [int(x) for block in of.finalize() for x in bits(dtype, block)]


def merge(into: ExactSums, other: ExactSums) -> bytes:
    """Write sums and merge them into others; give what was written."""
    data = b"".join(other.serialize())
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        place += count
        return data[place - count : place]

    into.merge(take)
    assert place == len(data)
    return data


def draw(kind: str, dtype: str, clients: int, length: int, seed: int) -> list[tuple[Array, int]]:
    """Draw terms that are hard to add."""
    rng, form = np.random.default_rng(seed), FORMATS[dtype]
    kept, infinity = np.dtype(form.bits), (2 * form.greatest - 1) << form.mantissa
    sign = 1 << (8 * kept.itemsize - 1)

    def some(least: int, most: int) -> Array:
        return (rng.integers(least, most, (clients, length)) + rng.integers(0, 2, (clients, length)) * sign).astype(kept)

    one = (form.greatest - 1) << form.mantissa
    match kind:
        case "gradients":
            elements = some(one - (9 << form.mantissa), one)
        case "subnormal":
            elements = some(0, 3 << form.mantissa)
        case "halfway":
            elements = one + rng.integers(0, 4, (clients, length))
        case "far apart":
            elements = np.where(rng.integers(0, 2, (clients, length)) == 1, some(infinity - 9, infinity), some(0, 9))
        case "neighbours":
            elements = some(0, infinity - 3)[:1] + rng.integers(0, 3, (clients, length))
        case "cancelling":
            elements = some(0, infinity - 1)  # one more is still finite
        case _:
            elements = some(0, infinity)
    weights = [int(2 ** rng.uniform(0, rng.choice([1, 10, 29, 44]))) for _ in range(clients)]
    if kind == "halfway":
        weights = [int(rng.integers(1, 3))] * clients
    elements = elements.astype(kept)
    if kind == "cancelling" and clients > 1:
        elements[1::2] = elements[: clients - 1 : 2] ^ kept.type(sign)
        elements[1, ::3] += kept.type(1)
        weights[1::2] = weights[: clients - 1 : 2]
    named = elements.view(NUMPY[dtype])
    return [(row, weight) for row, weight in zip(named, weights, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**32), st.data())
def test_correctly_rounded(kind: str, dtype: str, clients: int, length: int, seed: int, data: st.DataObject) -> None:
    """In any order, grouped in any way, the mean has the bits that rational numbers give."""
    terms = draw(kind, dtype, clients, length, seed)
    total = sum(weight for _, weight in terms)
    order = data.draw(st.permutations(terms))
    cut = data.draw(st.integers(0, clients))
    whole, left, right = (sums(dtype, length, total) for _ in range(3))
    for values, weight in terms:
        whole.add(0, values, weight)
    for values, weight in order[:cut]:
        left.add(0, values, weight)
    for values, weight in order[cut:]:
        right.add(0, values, weight)
    merge(left, right)

    wanted = expected(dtype, terms)
    assert wanted == mean(whole, dtype)
    assert wanted == mean(left, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_elements(kind: str, dtype: str) -> None:
    """A million elements, 50,000 of each dtype and kind over several blocks, have the bits that rational numbers give."""
    terms = draw(kind, dtype, 4, 50_000, 7)
    total = sum(weight for _, weight in terms)
    found = sums(dtype, 50_000, total)
    for values, weight in terms:
        found.add(0, values, weight)

    assert expected(dtype, terms) == mean(found, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_alike(dtype: str) -> None:
    """Equal sums are written as equal bytes, however they came about, and within what is projected."""
    terms = draw("any bits", dtype, 6, 40_000, 3)
    total = sum(weight for _, weight in terms)
    written = set()
    for order in (terms, terms[::-1]):
        one, other = sums(dtype, 40_000, total), sums(dtype, 40_000, total)
        for values, weight in order[:3]:
            one.add(0, values, weight)
        for values, weight in order[3:]:
            other.add(0, values, weight)
        merge(one, other)
        written.add(b"".join(one.serialize()))

    assert 1 == len(written)
    assert len(written.pop()) <= exact.size(Run(dtype, 40_000), total).serialized


def test_written_compactly() -> None:
    """Sums of gradients take 7 to 10 bytes an element, though there is room for 42."""
    rng, total = np.random.default_rng(0), 0
    kept = sums("F32", 50_000, 10_000)
    for _ in range(20):
        kept.add(0, rng.normal(0, 1e-3, 50_000).astype("f4"), weight := int(rng.integers(50, 500)))
        total += weight

    assert total <= 10_000
    assert 7 <= sum(memoryview(part).nbytes for part in kept.serialize()) / 50_000 <= 10


def test_many_additions() -> None:
    """Carries come in time: 5,000 additions of the largest and of the least elements, of one sign, lose nothing."""
    values = np.array([1, 1 << 23, 0x7F7FFFFF, 0x3F800001], "<u4").view("<f4")
    weight = (1 << 29) - 1
    kept = sums("F32", 4, 5_000 * weight)
    for _ in range(5_000):
        kept.add(0, values, weight)

    assert bits("F32", values).tolist() == mean(kept, "F32")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([np.nan, 1], "nan"),
        ([np.inf, 1], "inf"),
        ([-np.inf, np.inf], "nan"),
        ([-np.inf, -1], "-inf"),
        ([-np.inf, np.nan], "nan"),
        ([-0.0, -0.0], "0.0"),
        ([0.0, -0.0], "0.0"),
        ([-1e-45, 0.0], "-0.0"),
    ],
)
def test_specials(values: list[float], wanted: str) -> None:
    """Any NaN, or both infinities, make NaN; an exact zero is +0; a mean that rounds to zero keeps its sign. Merged ones alike."""
    one, other = sums("F32", 3, 4), sums("F32", 3, 4)
    for into, value, weight in zip((one, other), values, (1, 3), strict=True):
        into.add(0, np.array([7, value, 7], "f4"), weight)
    merge(one, other)

    assert ["7.0", wanted, "7.0"] == [str(float(x)) for x in next(one.finalize())]
    assert (wanted in ("nan", "inf", "-inf")) != one.finite


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_elements(dtype: str) -> None:
    """Sums of no elements can be made, written and merged."""
    kept = sums(dtype, 0, 3)

    assert b"\0" == merge(kept, sums(dtype, 0, 3))
    assert [] == mean(kept, dtype)


def test_wider_digits_are_refused() -> None:
    """Partial sums that no release of this arithmetic has written are refused."""
    with pytest.raises(InvalidUpdate, match="wider than 48 bits"):
        sums("F16", 1, 1).merge(lambda count: bytes([0]) if count == 1 else bytes([3, 4] * (count // 2)))


def test_subnormals_are_needed() -> None:
    """In a thread that treats subnormal numbers as zero, as torch can make it do, exact sums refuse to begin."""

    def begin() -> str:
        torch.set_flush_denormal(True)
        with pytest.raises(UserError) as raised:
            sums("F32", 1, 1)
        return raised.value.message

    with ThreadPoolExecutor(1) as pool:
        assert "torch.set_flush_denormal(False)" in pool.submit(begin).result()
    assert [1] == mean_of_one(1)


def mean_of_one(pattern: int) -> list[int]:
    """Average one element with itself."""
    kept = sums("F32", 1, 1)
    kept.add(0, np.array([pattern], "<u4").view("<f4"), 1)
    return mean(kept, "F32")
