"""A plan knows its cost, and refuses with a remedy that works."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradsharding.arithmetic.fold import SCRATCH
from gradsharding.errors import PlanTooLarge, UserError
from gradsharding.format.dtypes import ITEM_SIZE
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import MAX_PARTS, Limits, Plan
from gradsharding.planning.platform import READING
from gradsharding.planning.task import RESERVED, Term
from gradsharding.planning.topologies import Flat, Sharded
from gradsharding.sizes import mib, size
from gradsharding.stores.reading import STAGING

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
    plan = Sharded(shards=4).plan(sealed, Limits())
    header = len(sealed.layout.header())

    assert [(0, 16), (16, 32), (32, 48), (48, 68)] == [(task.start, task.stop) for task in plan.tasks]
    assert [(2, header), (3, header + 16), (4, header + 32), (5, header + 48)] == [task.part for task in plan.tasks]
    assert (12, 4, 3 * 68, 68) == (plan.gets, plan.puts, plan.bytes_read, plan.bytes_written)
    assert (3, header, 68, 1) == (plan.clients, plan.header_bytes, plan.result_bytes, len(plan.stages))
    # two I64: a pointer and an int of up to 120 bits each; one I64 and two F32; four F32; five F32
    assert [FIXED + 160, FIXED + 80 + 16, FIXED + 32, FIXED + 40] == [task.memory for task in plan.tasks]
    assert FIXED + 160 == plan.memory


@pytest.mark.parametrize("clients", [1, 5, 500])
def test_memory_does_not_depend_on_clients(clients: int) -> None:
    """More clients make more requests and bytes, and no more memory."""
    plan = Sharded(shards=10).plan(manifest({"w": ("F32", 1000)}, (1,) * clients), Limits())

    assert FIXED + 800 == plan.memory
    assert (10 * clients, 4000 * clients) == (plan.gets, plan.bytes_read)


def test_json() -> None:
    """A plan goes to JSON and back."""
    plan = Sharded(shards=4).plan(manifest({"w": ("F32", 11), "n": ("I64", 3)}), Limits())

    assert plan == Plan.model_validate_json(plan.model_dump_json())


def test_digest() -> None:
    """Plans have one digest if they write the same, however they read; a shard, a weight, a version or a place makes another."""
    sealed = manifest({"w": ("F32", 11)})
    first, *others = (
        Sharded(shards=2).plan(sealed, Limits()),
        Sharded(shards=3).plan(sealed, Limits()),
        Sharded(shards=2).plan(manifest({"w": ("F32", 12)}), Limits()),
        Sharded(shards=2).plan(manifest({"w": ("I32", 11)}), Limits()),
        Sharded(shards=2).plan(manifest({"w": ("F32", 11)}, (1, 2, 4)), Limits()),
        Sharded(shards=2).plan(
            sealed.model_copy(update={"terms": tuple(t.model_copy(update={"version": "w"}) for t in sealed.terms)}), Limits()
        ),
    )

    assert first.digest == Sharded(shards=2).plan(manifest({"w": ("F32", 11)}), Limits()).digest
    assert first.digest == Sharded(shards=2).plan(manifest({"w": ("F32", 11)}), Limits(), reading=READING).digest
    assert len({plan.digest for plan in others} | {first.digest}) == 6


@pytest.mark.parametrize(
    ("text", "expected"), [("512MiB", 512 * MIB), ("2GB", 2 * 10**9), ("80.5 MiB", 80 * MIB + MIB // 2), (123, 123), ("64 KiB", 64 << 10)]
)
def test_limits(text: str | int, expected: int) -> None:
    """Memory is a number of bytes, or text with a unit."""
    assert expected == Limits(memory=text).memory


def test_json_limits() -> None:
    """Limits go to JSON and back, as a number of bytes."""
    limits = Limits(memory="2GB", concurrency=7)

    assert limits == Limits.model_validate_json(limits.model_dump_json())
    assert '{"memory":2000000000,"concurrency":7}' == limits.model_dump_json()


ODD_SIZES = [
    "", " ", "MiB", "14,5GB", "1.024,5MB", "2GB/2", "500MB and more", "10 GB x 20", "1,024MB", "0x10", "1e9", "5 ", "-5", "5pounds",
    "1.GB", ".5GB", "1.5.5GB", "5  GB", "5\tGB", "5GB ", " 5GB", "5GB\n", "5K", "5M", "5Gb/s", "5 G B", "٥GB", "5KB", "９GB", "inf", "nan",
    "9" * 21, "9" * 5000 + "GB", "1." + "0" * 21,
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_SIZES, ids=lambda text: ascii(text)[:20])
def test_no_size(text: str) -> None:
    """Whatever is not a number with one unit is refused whole, with examples of what is meant."""
    with pytest.raises(UserError, match=r"is not a size; write a number, a unit and nothing else, like 512MiB, 2GB or 80.5 MiB$"):
        Limits(memory=text)


BYTES = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "": 1,
}  # fmt: skip
"""Bytes of a unit (IEC 80000-13)."""


@given(
    whole=st.integers(0, 10**20 - 1), part=st.none() | st.text("0123456789", min_size=1, max_size=20),
    unit=st.sampled_from(["", *(space + unit for space in ("", " ") for unit in BYTES if unit)]),
)  # fmt: skip
def test_sizes_are_exact(whole: int, part: str | None, unit: str) -> None:
    """A size is read by the rules of decimal numbers, to the byte, however large it is; a part of a byte is dropped."""
    bytes_each = BYTES[unit.strip()]
    text = f"{whole}{f'.{part}' if part else ''}{unit}"

    assert whole * bytes_each + (int(part) * bytes_each // 10 ** len(part) if part else 0) == size(text) == size(text.upper())


@given(text=st.text(st.sampled_from("0123456789.,kKMGTiBb \nx/K٥"), max_size=8) | st.text(max_size=8))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    """Text is a size if what is left without its unit is a plain decimal number; any other is refused."""
    number = text
    for unit in sorted(BYTES, key=len, reverse=True):
        if unit and text.isascii() and text.lower().endswith(unit.lower()):
            number = text[: -len(unit)].removesuffix(" ")
            break
    digits, dot, rest = number.partition(".")
    plain = all(part and set(part) <= set("0123456789") for part in (digits, *([rest] if dot else [])))
    if plain:
        assert size(text) >= int(digits)
    else:
        with pytest.raises(UserError, match="is not a size"):
            size(text)


@pytest.mark.parametrize("memory", [0, -1, "0", "0B", "0.0 MiB", "0.9B"])
def test_no_memory(memory: str | int) -> None:
    """No function runs in no memory."""
    with pytest.raises(UserError, match=r"bytes of memory are too few; allow more, like 512MiB or 2GB$"):
        Limits(memory=memory)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0.0 MiB"), (1, "0.1 MiB"), (MIB, "1.0 MiB"), (MIB + 1, "1.1 MiB"), (MIB * 3 // 2, "1.5 MiB")]
)
def test_mib(count: int, expected: str) -> None:
    """Bytes are written in MiB, rounded up: whoever allows what is written allows enough."""
    assert expected == mib(count)
    assert count <= size(mib(count))


def test_fits() -> None:
    """A plan that fits to the byte is not refused; one byte less is."""
    plan = Flat().plan(manifest({"w": ("F32", MIB)}), Limits())
    plan.check(Limits(memory=FIXED + 8 * MIB))

    with pytest.raises(
        PlanTooLarge, match=r"^task flat/0 projects 80.0 MiB of 80.0 MiB allowed; use at least 2 shards, or allow 80.0 MiB$"
    ) as caught:
        plan.check(Limits(memory=FIXED + 8 * MIB - 1))
    assert {"projected": FIXED + 8 * MIB, "allowed": FIXED + 8 * MIB - 1} == caught.value.details


def test_too_little_memory_for_anything() -> None:
    """Where not even one element fits, the message says what a function needs."""
    plan = Flat().plan(manifest({"w": ("F32", 10)}), Limits())

    with pytest.raises(PlanTooLarge, match=r"a function needs 72.0 MiB before its first byte: allow more memory"):
        plan.check(Limits(memory="64MiB"))


def test_more_shards_than_there_may_be() -> None:
    """Where shards cannot help, none are advised."""
    wide = Flat().plan(manifest({"n": ("U64", 1)}), Limits())
    with pytest.raises(PlanTooLarge, match=r"allowed; allow 72.1 MiB$"):
        wide.check(Limits(memory=FIXED + 79))

    large = Flat().plan(manifest({"w": ("F32", 100 * MAX_PARTS)}), Limits())
    with pytest.raises(PlanTooLarge, match=r"allowed; allow 79.7 MiB$"):
        large.check(Limits(memory=FIXED + 100))


def test_too_many_parts() -> None:
    """An object has at most 10,000 parts; the message says how many shards that makes."""
    sealed = manifest({"w": ("F32", 2 * MAX_PARTS)})
    with pytest.raises(PlanTooLarge, match=r"10000 shards make 10001 parts; an object has at most 10000\. Use at most 9999 shards"):
        Sharded(shards=MAX_PARTS).plan(sealed, Limits()).check(Limits())

    Sharded(shards=9_999).plan(sealed, Limits()).check(Limits())


@given(
    lengths=st.dictionaries(st.sampled_from(sorted(ITEM_SIZE)), st.integers(0, 300_000), min_size=1),
    weight=st.sampled_from([1, 1000, 1 << 45, 1 << 50]),
    room=st.integers(1 << 12, 4 * MIB),
    shards=st.integers(1, 9),
)
@pytest.mark.slow
def test_remedy_works(lengths: dict[str, int], weight: int, room: int, shards: int) -> None:
    """Whoever follows the advice of a refusal, either half of it, is not refused again."""
    sealed = manifest({dtype.lower(): (dtype, length) for dtype, length in lengths.items()}, (weight, weight))
    limits = Limits(memory=FIXED + room)
    plan = Sharded(shards=min(shards, max(1, sealed.layout.elements))).plan(sealed, limits)
    assume(plan.memory > limits.memory)
    with pytest.raises(PlanTooLarge) as caught:
        plan.check(limits)

    if advised := re.search(r"use at least (\d+) shards", caught.value.message):
        Sharded(shards=int(advised[1])).plan(sealed, limits).check(limits)
    allowed = re.search(r"allow ([\d.]+ MiB)$", caught.value.message)
    assert allowed
    plan.check(Limits(memory=allowed[1]))


@given(lengths=st.dictionaries(st.sampled_from(sorted(ITEM_SIZE)), st.integers(0, MIB), min_size=1), room=st.integers(1 * MIB, 40 * MIB))
def test_default_shards_fit(lengths: dict[str, int], room: int) -> None:
    """Left to itself, the topology makes as many shards as the memory demands."""
    sealed = manifest({dtype.lower(): (dtype, length) for dtype, length in lengths.items()}, (1 << 50, 1))

    Sharded().plan(sealed, Limits(memory=FIXED + room)).check(Limits(memory=FIXED + room))


def test_large_model() -> None:
    """A plan for 700 billion parameters is made and refused, or not, in no time: it is numbers only."""
    sealed = manifest({"w": ("BF16", 700 * 10**9)}, (1,) * 10)
    plan = Sharded().plan(sealed, Limits(memory="1GiB"))

    plan.check(Limits(memory="1GiB"))
    assert 10 * 1_400 * 10**9 == plan.bytes_read
    assert np.isclose(len(plan.tasks), 1_400 * 10**9 / plan.tasks[0].nbytes, rtol=1e-3)
