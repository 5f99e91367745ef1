"""A plan knows its cost, and refuses with a remedy that works."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradsharding.errors import PlanTooLarge
from gradsharding.kernel import SCRATCH
from gradsharding.layout import ITEM_SIZE, Layout
from gradsharding.plan import MAX_PARTS, Limits, Plan, mib
from gradsharding.reading import STAGING
from gradsharding.round import Manifest
from gradsharding.task import RESERVED, Term
from gradsharding.topology import flat, sharded

FIXED = RESERVED + STAGING + SCRATCH
MIB = 1 << 20


def manifest(shapes: dict[str, tuple[str, int]], weights: tuple[int, ...] = (1, 2, 3)) -> Manifest:
    """Make a manifest of vectors, by dtype and length."""
    layout = Layout.of({name: (dtype, (length,)) for name, (dtype, length) in shapes.items()})
    terms = tuple(Term(client=f"c{i}", source=f"s{i}", version="v", base=64, weight=weight) for i, weight in enumerate(weights))
    return Manifest(round="r", layout=layout, terms=terms)


def test_counts() -> None:
    """Three clients, 11 elements of 4 and 3 of 8 bytes, 4 shards: counted by hand, the tasks' alone."""
    sealed = manifest({"w": ("F32", 11), "n": ("I64", 3)})
    plan = sharded(sealed, Limits(), shards=4)
    header = len(sealed.layout.header())

    assert [(0, 16), (16, 32), (32, 48), (48, 68)] == [(task.start, task.stop) for task in plan.tasks]
    assert [2, 3, 4, 5] == [task.part for task in plan.tasks]
    assert [header, header + 16, header + 32, header + 48] == [task.offset for task in plan.tasks]
    assert (12, 4, 3 * 68, 68) == (plan.gets, plan.puts, plan.bytes_read, plan.bytes_written)
    assert (3, header, 68, 1) == (plan.clients, plan.header_bytes, plan.result_bytes, len(plan.stages))
    # two I64: a pointer and an int of up to 120 bits each; one I64 and two F32; four F32; five F32
    assert [FIXED + 160, FIXED + 80 + 16, FIXED + 32, FIXED + 40] == [task.memory for task in plan.tasks]
    assert FIXED + 160 == plan.memory


@pytest.mark.parametrize("clients", [1, 5, 500])
def test_memory_does_not_depend_on_clients(clients: int) -> None:
    """More clients make more requests and bytes, and no more memory."""
    plan = sharded(manifest({"w": ("F32", 1000)}, (1,) * clients), Limits(), shards=10)

    assert FIXED + 800 == plan.memory
    assert (10 * clients, 4000 * clients) == (plan.gets, plan.bytes_read)


def test_json() -> None:
    """A plan goes to JSON and back."""
    plan = sharded(manifest({"w": ("F32", 11), "n": ("I64", 3)}), Limits(), shards=4)

    assert plan == Plan.model_validate_json(plan.model_dump_json())


def test_digest() -> None:
    """Plans have one digest if they are equal; a shard, a weight, a version or a place makes another."""
    sealed = manifest({"w": ("F32", 11)})
    first, *others = (
        sharded(sealed, Limits(), shards=2),
        sharded(sealed, Limits(), shards=3),
        sharded(manifest({"w": ("F32", 12)}), Limits(), shards=2),
        sharded(manifest({"w": ("I32", 11)}), Limits(), shards=2),
        sharded(manifest({"w": ("F32", 11)}, (1, 2, 4)), Limits(), shards=2),
        sharded(
            sealed.model_copy(update={"terms": tuple(t.model_copy(update={"version": "w"}) for t in sealed.terms)}), Limits(), shards=2
        ),
    )

    assert first.digest == sharded(manifest({"w": ("F32", 11)}), Limits(), shards=2).digest
    assert len({plan.digest for plan in others} | {first.digest}) == 6


@pytest.mark.parametrize(
    ("text", "expected"), [("512MiB", 512 * MIB), ("2GB", 2 * 10**9), ("80.5 MiB", 80 * MIB + MIB // 2), (123, 123), ("64 KiB", 64 << 10)]
)
def test_limits(text: str | int, expected: int) -> None:
    """Memory is a number of bytes, or text with a unit."""
    assert expected == Limits(memory=text).memory  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0.0 MiB"), (1, "0.1 MiB"), (MIB, "1.0 MiB"), (MIB + 1, "1.1 MiB"), (MIB * 3 // 2, "1.5 MiB")]
)
def test_mib(count: int, expected: str) -> None:
    """Bytes are written in MiB, rounded up: whoever allows what is written allows enough."""
    assert expected == mib(count)
    assert count <= Limits(memory=mib(count)).memory  # type: ignore[arg-type]


def test_fits() -> None:
    """A plan that fits to the byte is not refused; one byte less is."""
    plan = flat(manifest({"w": ("F32", MIB)}), Limits())
    plan.check(Limits(memory=FIXED + 8 * MIB))

    with pytest.raises(
        PlanTooLarge, match=r"^task flat/0 projects 80.0 MiB of 80.0 MiB allowed; use at least 2 shards, or allow 80.0 MiB$"
    ) as caught:
        plan.check(Limits(memory=FIXED + 8 * MIB - 1))
    assert {"projected": FIXED + 8 * MIB, "allowed": FIXED + 8 * MIB - 1} == caught.value.details


def test_too_little_memory_for_anything() -> None:
    """Where not even one element fits, the message says what a function needs."""
    plan = flat(manifest({"w": ("F32", 10)}), Limits())

    with pytest.raises(PlanTooLarge, match=r"a function needs 72.0 MiB before its first byte: allow more memory"):
        plan.check(Limits(memory="64MiB"))  # type: ignore[arg-type]


def test_more_shards_than_there_may_be() -> None:
    """Where shards cannot help, none are advised."""
    wide = flat(manifest({"n": ("U64", 1)}), Limits())
    with pytest.raises(PlanTooLarge, match=r"allowed; allow 72.1 MiB$"):
        wide.check(Limits(memory=FIXED + 79))

    large = flat(manifest({"w": ("F32", 100 * MAX_PARTS)}), Limits())
    with pytest.raises(PlanTooLarge, match=r"allowed; allow 79.7 MiB$"):
        large.check(Limits(memory=FIXED + 100))


def test_too_many_parts() -> None:
    """An object has at most 10,000 parts; the message says how many shards that makes."""
    sealed = manifest({"w": ("F32", 2 * MAX_PARTS)})
    with pytest.raises(PlanTooLarge, match=r"10000 shards make 10001 parts; an object has at most 10000\. Use at most 9999 shards"):
        sharded(sealed, Limits(), shards=MAX_PARTS).check(Limits())

    sharded(sealed, Limits(), shards=9_999).check(Limits())


@given(
    lengths=st.dictionaries(st.sampled_from(sorted(ITEM_SIZE)), st.integers(0, 300_000), min_size=1),
    weight=st.sampled_from([1, 1000, 1 << 45, 1 << 50]),
    room=st.integers(1 << 12, 4 * MIB),
    shards=st.integers(1, 9),
)
def test_remedy_works(lengths: dict[str, int], weight: int, room: int, shards: int) -> None:
    """Whoever follows the advice of a refusal, either half of it, is not refused again."""
    sealed = manifest({dtype.lower(): (dtype, length) for dtype, length in lengths.items()}, (weight, weight))
    limits = Limits(memory=FIXED + room)
    plan = sharded(sealed, limits, shards=min(shards, max(1, sealed.layout.elements)))
    assume(plan.memory > limits.memory)
    with pytest.raises(PlanTooLarge) as caught:
        plan.check(limits)

    if advised := re.search(r"use at least (\d+) shards", caught.value.message):
        sharded(sealed, limits, shards=int(advised[1])).check(limits)
    allowed = re.search(r"allow ([\d.]+ MiB)$", caught.value.message)
    assert allowed
    plan.check(Limits(memory=allowed[1]))  # type: ignore[arg-type]


@given(lengths=st.dictionaries(st.sampled_from(sorted(ITEM_SIZE)), st.integers(0, MIB), min_size=1), room=st.integers(1 * MIB, 40 * MIB))
def test_default_shards_fit(lengths: dict[str, int], room: int) -> None:
    """Left to itself, the topology makes as many shards as the memory demands."""
    sealed = manifest({dtype.lower(): (dtype, length) for dtype, length in lengths.items()}, (1 << 50, 1))

    sharded(sealed, Limits(memory=FIXED + room)).check(Limits(memory=FIXED + room))


def test_large_model() -> None:
    """A plan for 700 billion parameters is made and refused, or not, in no time: it is numbers only."""
    sealed = manifest({"w": ("BF16", 700 * 10**9)}, (1,) * 10)
    plan = sharded(sealed, Limits(memory="1GiB"))  # type: ignore[arg-type]

    plan.check(Limits(memory="1GiB"))  # type: ignore[arg-type]
    assert 10 * 1_400 * 10**9 == plan.bytes_read
    assert np.isclose(len(plan.tasks), 1_400 * 10**9 / plan.tasks[0].nbytes, rtol=1e-3)
