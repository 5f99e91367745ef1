"""The fold sums wide, divides once and rounds once."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gradsharding.arithmetic.fold import SCRATCH, Fold, first_beyond, memory
from gradsharding.arithmetic.rules import Cohort
from gradsharding.arithmetic.sums import is_wide
from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import NUMPY, Buffer, Run, is_float, widen
from gradsharding.testing import assert_same, reference_mean

F32, F64 = np.dtype("f4"), np.dtype("f8")


def fold(dtype: str, *terms: tuple[list[Any], int]) -> list[Any]:
    """Average lists of values of one dtype, weighted."""
    folded = Fold([Run(dtype, len(terms[0][0]))], Cohort(len(terms), sum(weight for _, weight in terms)))
    for values, weight in terms:
        folded.add([np.array(values, NUMPY[dtype]).tobytes()], weight)
    mean: list[Any] = np.frombuffer(folded.finalize(), NUMPY[dtype]).tolist()
    return mean


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_floats(dtype: str) -> None:
    """Weights 2, 4, 2 of 1, 2, 3 make 2; of 1, 4, 7 they make 4; of 0, 1, 0 a half."""
    assert [2.0, 4.0, 0.5] == fold(dtype, ([1, 1, 0], 2), ([2, 4, 1], 4), ([3, 7, 0], 2))


@pytest.mark.parametrize("dtype", ["I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"])
def test_integers(dtype: str) -> None:
    """Integers are rounded to nearest, ties to even."""
    assert [0, 2, 2, 1, 4] == fold(dtype, ([0, 1, 2, 1, 3], 1), ([1, 2, 3, 1, 4], 1))
    assert [1, 1] == fold(dtype, ([0, 1], 1), ([1, 1], 3))


@pytest.mark.parametrize("dtype", ["I64", "I32", "I16", "I8"])
def test_negative_integers(dtype: str) -> None:
    """Ties go to even below zero, too; the extremes average to themselves."""
    least = np.iinfo(NUMPY[dtype]).min

    assert [0, -2, -2, least] == fold(dtype, ([0, -1, -2, least], 1), ([-1, -2, -3, least], 1))


@pytest.mark.parametrize("weight", [1, 1 << 40])
def test_wide_integers(weight: int) -> None:
    """Sums beyond int64 are exact: no bit of a large integer is lost, whatever its weight."""
    most = np.iinfo("u8").max

    assert [most, most - 1] == fold("U64", ([most, most - 1], weight), ([most, most - 1], weight))
    assert [(1 << 53) + 1] == fold("I64", ([(1 << 53) + 1], weight), ([(1 << 53) + 1], weight))


def test_bools() -> None:
    """Bools take the weighted majority; a tie is False, the even one."""
    assert [True, False, False] == fold("BOOL", ([True, True, False], 1), ([False, False, True], 1), ([True, False, False], 1))
    assert [False, True] == fold("BOOL", ([True, True], 1), ([False, True], 1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0x3F80, 0x3F81], 0x3F80),  # halfway between 1 and its successor: to the even one
        ([0x3F81, 0x3F82], 0x3F82),
        ([0x0000, 0x0001], 0x0000),  # half of the smallest subnormal
        ([0x0001, 0x0002], 0x0002),
        ([0x7F7F, 0x7F7F], 0x7F7F),  # the largest
        ([0x7F80, 0x3F80], 0x7F80),  # infinity
        ([0x7F80, 0xFF80], 0x7FC0),  # infinity less infinity is NaN
        ([0xBF80, 0xBF81], 0xBF80),
    ],
)
def test_bfloat16(values: list[int], expected: int) -> None:
    """A bfloat16 mean is rounded to nearest, ties to even, also at the ends of the range."""
    assert [expected] == fold("BF16", *(([value], 1) for value in values))


def test_bfloat16_rounds_once() -> None:
    """A mean just above the middle of two bfloat16 is rounded up, though float32 would call it the middle."""
    one, step = 0x3F80, 0x3F81
    many = 1 << 30

    assert [0x3F80] == fold("BF16", ([one], many), ([step], many))
    assert [0x3F81] == fold("BF16", ([one], many - 1), ([step], many + 1))
    assert [0x3F80] == fold("BF16", ([one], many + 1), ([step], many - 1))


def test_float16_rounds_once() -> None:
    """The same of float16."""
    step, many = 1 + 2**-10, 1 << 40

    assert [1.0] == fold("F16", ([1.0], many), ([step], many))
    assert [step] == fold("F16", ([1.0], many - 1), ([step], many + 1))


def test_float32_is_summed_in_float64() -> None:
    """What float32 would lose beside a large sum is kept."""
    assert [1.0] == fold("F32", ([2.0**40], 1), ([4.0], 1), ([-(2.0**40)], 1), ([0.0], 1))


def test_every_bfloat16() -> None:
    """Every bfloat16 is widened to the float32 with the same leading bits, and averages to itself."""
    every = np.arange(1 << 16).astype("<u2")
    finite = every[np.isfinite(widen(every, "BF16")) & (every != 0x8000)]

    assert (every.astype(np.uint32) << 16).tobytes() == widen(every, "BF16").tobytes()
    assert finite.tolist() == fold("BF16", (finite.tolist(), 3), (finite.tolist(), 4))


def test_every_float16() -> None:
    """Every float16 is widened to the float32 that numpy makes of it, NaN to NaN, and averages to itself."""
    every = np.arange(1 << 16).astype("<u2").view("<f2")
    finite = every[np.isfinite(every) & (every.view("<u2") != 0x8000)]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(every.astype("f4"), widen(every, "F16"), strict=True)

    assert finite.tolist() == fold("F16", (finite.tolist(), 3), (finite.tolist(), 4))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_random_floats(dtype: str) -> None:
    """Random values of all magnitudes have the bits of the reference."""
    draw = np.random.default_rng(1)
    arrays: list[npt.NDArray[Any]] = [
        np.ldexp(draw.normal(size=20_000), draw.integers(-30, 15, 20_000)).astype(NUMPY[dtype]) for _ in "abc"
    ]
    folded = Fold([Run(dtype, 20_000)], Cohort(3, 60))
    for array, weight in zip(arrays, (10, 20, 30), strict=True):
        folded.add([array.tobytes()], weight)

    expected = reference_mean({c: ({"w": a}, w) for c, a, w in zip("abc", arrays, (10, 20, 30), strict=True)})
    assert_same(expected, {"w": np.frombuffer(folded.finalize(), NUMPY[dtype])})


def test_mixed_runs() -> None:
    """Runs of any widths, wide sums among them, are packed one after the other."""
    runs = [Run("U8", 3), Run("I64", 2), Run("F16", 1), Run("BOOL", 2), Run("F64", 1)]
    data = b"".join(np.array(values, NUMPY[run.dtype]).tobytes() for run, values in zip(runs, MIXED, strict=True))
    folded = Fold(runs, Cohort(1, 1 << 20))
    folded.add([data], 1 << 20)

    assert data == bytes(folded.finalize())


MIXED: list[list[Any]] = [[1, 2, 255], [-(1 << 63), (1 << 63) - 1], [1.5], [True, False], [1e300]]


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([], "ended after 0 bytes, in the middle of a slice"),
        ([b"\0" * 4, b"\0" * 5], "ended after 9 bytes"),
        ([b"\0" * 13], "at least 1 bytes more than the slice has"),
        ([b"\0" * 12, b"\0" * 7], "at least 7 bytes more"),
    ],
)
def test_wrong_length(chunks: list[Buffer], says: str) -> None:
    """A read that is too short or too long raises InvalidUpdate, which says where."""
    with pytest.raises(InvalidUpdate, match=says):
        Fold([Run("F32", 3)], Cohort(1, 1)).add(chunks, 1)


@pytest.mark.parametrize(
    ("values", "weight", "finite"),
    [([1.0, -1.0], 1, True), ([np.nan, 1.0], 1, False), ([np.inf, 1.0], 1, False), ([1e308, 1.0], 1 << 53, False)],
)
def test_finite(values: list[float], weight: int, finite: bool) -> None:
    """A fold says whether its float sums were finite, without a warning, and NaN passes into the mean."""
    folded = Fold([Run("F64", 2), Run("I8", 1)], Cohort(2, 2 * weight))
    for _ in "ab":
        folded.add([np.array(values).tobytes(), b"\1"], weight)
    mean = np.frombuffer(folded.finalize()[:16], np.float64)

    assert finite == folded.finite == np.isfinite(mean).all()
    assert values[1] == mean[1]


def test_opposite_infinities() -> None:
    """Infinity less infinity is NaN, in silence."""
    assert [True] == np.isnan(fold("F32", ([np.inf], 1), ([-np.inf], 1))).tolist()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_beyond(dtype: str, bad: float) -> None:
    """The first NaN or infinity is found by its byte, past runs that cannot hold any, whatever the chunks."""
    values = np.array([1, 2, bad, 3, bad], "f4")
    data = b"\xff\xff\xff" + ((values.view("u4") >> 16).astype("<u2") if dtype == "BF16" else values.astype(NUMPY[dtype])).tobytes()
    runs = [Run("U8", 3), Run(dtype, 5)]
    size = (len(data) - 3) // 5

    assert 3 + 2 * size == first_beyond(runs, [data])
    assert 3 + 2 * size == first_beyond(runs, [data[i : i + 1] for i in range(len(data))])
    assert None is first_beyond([Run("U8", len(data))], [data])


@pytest.mark.parametrize(
    ("dtype", "total", "wide"),
    [("I64", 1, True), ("U32", (1 << 31) - 1, False), ("U32", 1 << 31, True), ("I8", 1 << 53, False), ("F64", 1 << 53, False)],
)
def test_wide(dtype: str, total: int, wide: bool) -> None:
    """Integers whose sums might pass int64 are summed as Python's; the memory says so."""
    assert wide is is_wide(dtype, total)
    assert SCRATCH + 10 * (80 if wide else 8) == memory([Run(dtype, 10)], Cohort(1, total))


def test_widest_sums_that_are_not_wide() -> None:
    """At the edge of int64, sums are still exact."""
    most, half = np.iinfo("u4").max, (1 << 30) - 1

    assert not is_wide("U32", 2 * half)
    assert [int(most)] == fold("U32", ([most], half), ([most], half))


def test_is_float() -> None:
    """Four dtypes are floats."""
    assert ["F64", "F32", "F16", "BF16"] == [dtype for dtype in NUMPY if is_float(dtype)]
