"""The algebra, on hundreds of random layouts and rounds."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.arithmetic.fold import Fold, first_beyond
from gradsharding.arithmetic.rules import Cohort
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY, join_runs
from gradsharding.format.encode import Raw, encode
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Limits
from gradsharding.planning.slices import cut
from gradsharding.planning.topologies import Flat, Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.result import Result
from gradsharding.rounds.round import Round
from gradsharding.stores.memory import MemoryStore
from gradsharding.testing import CountingStore, assert_same, reference_mean
from gradsharding.usage import total

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
layouts = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.tuples(st.sampled_from(sorted(ITEM_SIZE)), shapes), max_size=8
)
whole_weights = st.integers(1, 1000) | st.integers(1, 1 << 50)


class Drawn(NamedTuple):
    """A round as hypothesis draws it: of each client, its arrays and its weight; and a number of shards."""

    updates: dict[str, tuple[dict[str, Any], int]]
    shards: int

    def submit(self) -> Round:
        """Submit everything to a store in memory."""
        round_ = Round.create(MemoryStore(), "r")
        for client, (arrays, weight) in self.updates.items():
            round_.submit(client, arrays, weight)
        return round_

    def aggregate(self, shards: int) -> Result:
        """Run the round in so many slices."""
        return aggregate(self.submit(), topology=Sharded(shards=shards))


@st.composite
def rounds(draw: st.DrawFn) -> Drawn:
    """Draw a round of 1 to 4 clients; the bits of its elements are random, but finite, and of sums that are."""
    layout = draw(layouts)
    bits = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    clients = draw(st.lists(st.text("abcXYZ019_", min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
    updates = {
        client: ({name: _array(bits, dtype, shape) for name, (dtype, shape) in layout.items()}, draw(whole_weights)) for client in clients
    }
    elements = sum(math.prod(shape) for _, shape in layout.values())
    return Drawn(updates, draw(st.integers(1, max(1, elements))))


def _array(bits: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    """Make an array, or Raw, of random bits."""
    count = math.prod(shape)
    if dtype == "BOOL":
        return bits.integers(0, 2, shape).astype(bool)
    if dtype == "F64":
        return np.ldexp(bits.normal(size=shape), bits.integers(-1060, 900, shape))
    array = np.frombuffer(bits.bytes(count * ITEM_SIZE[dtype]), NUMPY[dtype])
    if dtype == "BF16":
        return Raw(dtype, shape, np.where(array & 0x7F80 == 0x7F80, 0, array).tobytes())
    return (np.where(np.isfinite(array), array, 0).astype(array.dtype) if dtype in ("F32", "F16") else array).reshape(shape)


@given(rounds())
def test_equals_the_reference(drawn: Drawn) -> None:
    """The result has the bits of the plain mean, whatever the dtypes, the shapes, the weights and the slices."""
    assert_same(reference_mean(drawn.updates), drawn.aggregate(drawn.shards).arrays())


@given(rounds(), st.integers(1, 60))
def test_shards_change_nothing(drawn: Drawn, shards: int) -> None:
    """One slice or many: the same object, byte for byte."""
    most = max(1, drawn.submit().seal().layout.elements)

    assert drawn.aggregate(1).digest() == drawn.aggregate(min(shards, most)).digest()


@given(rounds(), st.integers(1, 3))
def test_unit_of_weight(drawn: Drawn, power: int) -> None:
    """Weights count against each other only: twice, four or eight times all of them change no bit."""
    scaled = {client: (arrays, weight << power) for client, (arrays, weight) in drawn.updates.items()}

    if sum(weight for _, weight in scaled.values()) <= 1 << 53:
        assert drawn.aggregate(drawn.shards).digest() == drawn._replace(updates=scaled).aggregate(drawn.shards).digest()


@given(rounds())
def test_plan_counts(drawn: Drawn) -> None:
    """What a plan says of its tasks is what a store counts: GETs of updates, and PUTs of the result, with three that assemble it."""
    round_ = drawn.submit()
    round_.seal()  # reads headers, which is no plan's business
    updates = CountingStore(round_.store, only=lambda key: "/updates/" in key)
    result = CountingStore(updates, only=lambda key: key == round_.output)
    plan = aggregate(Round(result, "r"), topology=Sharded(shards=drawn.shards)).plan

    asked = total(plan.tasks_usage)
    assert (asked.gets, asked.bytes_read) == (updates.gets, updates.bytes_read)
    assert (asked.puts + 3, asked.bytes_written + plan.header_bytes) == (result.puts, result.bytes_written)
    assert (0, 0) == (updates.puts, result.gets)


@given(layouts, st.data())
def test_slices_tile(drawn: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    """Slices follow each other without gap or overlap, begin on edges of elements, and hold one at least."""
    layout = Layout.of(drawn)
    slices = cut(layout.runs, count := data.draw(st.integers(1, max(1, layout.elements))))

    assert [0, *(s.stop for s in slices)] == [*(s.start for s in slices), layout.nbytes]
    assert count == len(slices)
    assert layout.runs == join_runs(run for s in slices for run in s.runs)
    for s in slices:
        assert s.stop - s.start == sum(run.nbytes for run in s.runs)
        assert s.stop > s.start or not layout.elements
        assert not s.runs or layout.locate(s.start)[0].dtype == s.runs[0].dtype
        assert not s.runs or (s.start - layout.locate(s.start)[0].start) % ITEM_SIZE[s.runs[0].dtype] == 0


@given(layouts, st.data())
def test_slices_are_nearly_equal(drawn: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    """Where elements are few, no slice has more than its share and two elements."""
    layout = Layout.of(drawn)
    count = data.draw(st.integers(1, max(1, layout.elements // 8)))

    assert max(s.stop - s.start for s in cut(layout.runs, count)) <= layout.nbytes / count + 16


@given(rounds(), st.data())
def test_bytes_may_be_cut_anywhere(drawn: Drawn, data: st.DataObject) -> None:
    """However a stream of bytes is cut into buffers, empty ones among them, the fold has the same bits."""
    cohort = Cohort(len(drawn.updates), sum(weight for _, weight in drawn.updates.values()))
    pieces: list[Any] = []
    for arrays, weight in drawn.updates.values():
        layout, buffers = encode(arrays)
        whole = b"".join(buffers[1:])
        edges = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
        pieces.append((weight, whole, [whole[a:b] for a, b in pairwise([0, *edges, len(whole)])]))

    folds = Fold(layout.runs, cohort), Fold(layout.runs, cohort)
    for weight, whole, chunks in pieces:
        folds[0].add([whole], weight)
        folds[1].add(chunks, weight)
        assert None is first_beyond(layout.runs, chunks)
    assert bytes(folds[0].finalize()) == bytes(folds[1].finalize())


@given(rounds())
def test_update_is_safetensors(drawn: Drawn) -> None:
    """An update is read back by its header, and by the safetensors library, as it was written."""
    for arrays, _ in drawn.updates.values():
        layout, buffers = encode(arrays)
        data = b"".join(buffers)

        assert layout == Layout.parse(bytes(buffers[0][8:]), len(data) - len(buffers[0]))
        found: Sequence[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        assert {t.name: (t.dtype, list(t.shape)) for t in layout.tensors} == {name: (f["dtype"], f["shape"]) for name, f in found}
        assert {t.name: data[len(buffers[0]) :][t.start : t.stop] for t in layout.tensors} == {name: f["data"] for name, f in found}


@given(rounds(), st.integers(1, 20))
def test_records_survive_json(drawn: Drawn, shards: int) -> None:
    """Manifests and plans go to JSON and back, and plans of the same manifest have the same digest."""
    manifest = drawn.submit().seal()
    again = Manifest.model_validate_json(manifest.model_dump_json())
    plans = [Sharded(shards=min(shards, max(1, m.layout.elements))).plan(m, Limits()) for m in (manifest, again)]

    assert manifest == again
    assert plans[0] == plans[1] == type(plans[0]).model_validate_json(plans[0].model_dump_json())
    assert plans[0].digest == plans[1].digest
    assert Flat().plan(manifest, Limits()).memory >= plans[0].memory
