"""A topology turns a manifest into a plan, and nothing else."""

import pytest

from gradsharding.errors import PlanTooLarge
from gradsharding.layout import Layout
from gradsharding.plan import Limits, Term
from gradsharding.round import Manifest
from gradsharding.topology import flat, sharded

MIB = 1 << 20
SEALED = Manifest(
    round="r",
    layout=Layout.of({"w": ("F32", (25 * MIB,))}),
    terms=(Term(client="a", source="a", version="v", base=8, weight=2), Term(client="b", source="b", version="v", base=8, weight=3)),
)


def test_flat() -> None:
    """Flat is one task over the whole vector and all clients."""
    (task,) = flat(SEALED, Limits()).tasks

    assert ("flat/0", 0, 100 * MIB, 2, 5) == (task.id, task.start, task.stop, task.part, task.weight)
    assert SEALED.terms == task.terms


@pytest.mark.parametrize(("grain", "expected"), [(8 * MIB, 13), (100 * MIB, 1), (1 << 40, 1), (MIB, 100)])
def test_grain(grain: int, expected: int) -> None:
    """Left alone, slices carry about the bytes that a store wants in one read."""
    assert expected == len(sharded(SEALED, Limits(memory=1 << 30), grain=grain).tasks)


def test_memory_comes_first() -> None:
    """Slices shrink until they fit the memory, whatever the store wants."""
    plan = sharded(SEALED, Limits(memory=80 * MIB), grain=1 << 40)

    assert 32 == len(plan.tasks)
    assert plan.memory <= 80 * MIB


def test_shards() -> None:
    """Asked for, a number of shards is what there will be, or PlanTooLarge says why not."""
    assert [f"sharded/{i}" for i in range(7)] == [task.id for task in sharded(SEALED, Limits(), shards=7).tasks]
    with pytest.raises(PlanTooLarge, match="use 1 to 26214400 shards"):
        sharded(SEALED, Limits(), shards=25 * MIB + 1)


def test_pure() -> None:
    """The same arguments make the same plan."""
    assert sharded(SEALED, Limits(), shards=7) == sharded(SEALED, Limits(), shards=7)


def test_nothing_to_average() -> None:
    """Updates without any element make a plan of one empty task."""
    empty = SEALED.model_copy(update={"layout": Layout.of({"a": ("F32", (0,))})})

    assert [(0, 0, ())] == [(task.start, task.stop, task.runs) for task in sharded(empty, Limits()).tasks]
