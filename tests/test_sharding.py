"""Slices tile the vector, on the edges of its elements."""

import pytest

from gradsharding.errors import PlanTooLarge
from gradsharding.format.dtypes import Run
from gradsharding.planning.slices import Slice, cut

MIXED = (Run("F64", 2), Run("F16", 4), Run("U8", 3))  # 16 + 8 + 3 bytes, 9 elements


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(0, 27, MIXED)]),
        (2, [(0, 8, (Run("F64", 1),)), (8, 27, (Run("F64", 1), Run("F16", 4), Run("U8", 3)))]),
        (3, [(0, 8, (Run("F64", 1),)), (8, 18, (Run("F64", 1), Run("F16", 1))), (18, 27, (Run("F16", 3), Run("U8", 3)))]),
        (
            9,
            [(0, 8, (Run("F64", 1),)), (8, 16, (Run("F64", 1),))]
            + [(i, i + 2, (Run("F16", 1),)) for i in (16, 18, 20, 22)]
            + [(i, i + 1, (Run("U8", 1),)) for i in (24, 25, 26)],
        ),
    ],
)
def test_cut(count: int, expected: list[tuple[int, int, tuple[Run, ...]]]) -> None:
    """A cut falls before the element that holds the ideal byte; every slice has an element."""
    assert [Slice(*slice_) for slice_ in expected] == list(cut(MIXED, count))


def test_nearly_equal() -> None:
    """Slices of one dtype differ by one element at most."""
    sizes = {s.stop - s.start for s in cut((Run("F32", 1_000_003),), 64)}

    assert {15_625 * 4, 15_626 * 4} == sizes


def test_nothing() -> None:
    """An empty vector has one empty slice."""
    assert (Slice(0, 0, ()),) == cut((), 1)


@pytest.mark.parametrize(("runs", "count", "says"), [(MIXED, 10, "use 1 to 9 shards"), (MIXED, 0, "use 1 to 9"), ((), 2, "use 1 to 1")])
def test_too_many(runs: tuple[Run, ...], count: int, says: str) -> None:
    """More slices than elements raise PlanTooLarge, which says how many there may be."""
    with pytest.raises(PlanTooLarge, match=says):
        cut(runs, count)
