"""Exact rounds have the same bits whatever the path, from the command line to the partial sums of trees; float64 has not always."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsharding import DirectoryStore, Limits, MemoryStore, Round, aggregate
from gradsharding.arithmetic.fold import Fold
from gradsharding.arithmetic.rules import MEAN, Cohort, ExactMean, Rule
from gradsharding.errors import InvalidUpdate, NonFinite, UserError
from gradsharding.format.dtypes import Run
from gradsharding.planning.plan import Plan
from gradsharding.planning.topologies import LambdaFLTree, Sharded
from gradsharding.rounds.records import ResultRecord
from gradsharding.rounds.verify import verify
from gradsharding.testing import CountingStore, FlakyStore, read, sample_updates
from same_bits import KINDS, Updates, draw_updates, draw_way, walk
from test_trees import TREES, Interrupted, submitted

EVERYTHING = 1 << 30


def narrow(clients: int, **how: Any) -> dict[str, Any]:
    """Draw updates with every dtype but float64."""
    return {
        client: ({name: array for name, array in arrays.items() if name != "float64"}, weight)
        for client, (arrays, weight) in sample_updates(clients, **how).items()
    }


def digests(updates: Updates, paths: int, rule: Rule, seed: int = 5) -> set[str]:
    """Take paths that are drawn at random."""
    draw = random.Random(seed)
    return {walk(updates, draw_way(draw), rule)[0] for _ in range(paths)}


@pytest.mark.slow
def test_new_paths() -> None:
    """500 orders, topologies, slices, ways to read, executors and sizes of a step, others each time, make one digest: the right one."""
    updates = draw_updates("a pair that cancels, 2**40 times as large", clients=7, elements=300)
    right, _ = walk(updates, draw_way(random.Random(0)), ExactMean(), check=True)
    seed = random.SystemRandom().randrange(1 << 32)

    assert (seed, {right}) == (seed, digests(updates, 500, ExactMean(), seed))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "gradients" else pytest.mark.slow) for kind in KINDS])
def test_many_paths(kind: str) -> None:
    """Whatever the data, exact rounds have one digest; in float64, data that cancel have several."""
    updates = draw_updates(kind, elements=300)

    assert 1 == len(digests(updates, 10, ExactMean()))
    assert (1 == len(digests(updates, 10, MEAN))) is (kind == "gradients")


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("clients", [1, 3, 20])
def test_every_dtype(name: str, clients: int) -> None:
    """Tensors of every dtype but float64, of no elements and of no dimension, are the correctly rounded mean, in every topology."""
    round_ = submitted(narrow(clients), MemoryStore())
    result = aggregate(round_, topology=TREES[name], rule=ExactMean())
    one = aggregate(submitted(narrow(clients), MemoryStore()), rule=ExactMean())

    assert verify(round_, sample=EVERYTHING).elements == result.record.layout.elements
    assert one.digest() == result.digest()


@pytest.mark.parametrize("name", TREES)
def test_plan_is_a_bound(name: str) -> None:
    """What an exact plan says of requests and bytes is at least what the store sees, and just that where no partial sums are."""
    store = MemoryStore()
    submitted(narrow(20, size=2_000), store).seal()
    counting = CountingStore(store, only=lambda key: "/updates/" in key or "/partials/" in key)
    result = aggregate(Round(counting, "r"), topology=TREES[name], rule=ExactMean())
    plan, seen = result.plan, result.reports
    through_store = [report for report, task in zip(seen, plan.tasks, strict=True) if not (task.shared and task.reads)]

    assert sum(report.gets for report in seen) == counting.gets + counting.heads
    assert sum(report.bytes_read for report in through_store) == counting.bytes_read
    for task, report in zip(plan.tasks, seen, strict=True):
        assert (0 if task.written_to_memory else 1) == report.puts
        for figure in ("gets", "bytes_read", "bytes_written"):
            planned, found = getattr(task, figure), getattr(report, figure)
            assert planned == found or (planned > found and (task.reads or task.part is None))
    assert plan.memory == max(task.memory for task in plan.tasks)


def test_partial_sums_of_gradients_are_compact() -> None:
    """Partial sums of gradients pass between functions in fewer bytes than float64 sums take, and in a quarter of what values may need."""
    updates = {f"c{i}": ({"w": np.random.default_rng(i).normal(0, 1e-3, 20_000).astype("f4")}, 50 + i) for i in range(9)}
    result = aggregate(submitted(updates, MemoryStore()), topology=LambdaFLTree(), rule=ExactMean())
    root, planned = result.reports[-1], result.plan.tasks[-1]

    assert 6 * 3 * 20_000 < root.bytes_read < 8 * 3 * 20_000
    assert planned.bytes_read > 4 * root.bytes_read


def test_chunks_that_vary_in_number() -> None:
    """Partial sums that are read in chunks take a request for their size, and as many as their bytes need."""
    store = MemoryStore()
    submitted(narrow(9, size=5_000), store).seal()
    counting = CountingStore(store, only=lambda key: "/partials/" in key)
    counting.reading = counting.reading.model_copy(update={"chunk": 20_000, "parallel": 3})
    result = aggregate(Round(counting, "r"), topology=LambdaFLTree(), rule=ExactMean())
    task, report = result.plan.tasks[-1], result.reports[-1]

    assert (3, 3) == (task.heads_per_input * task.inputs, counting.heads)
    assert counting.gets + counting.heads == report.gets < task.gets
    assert verify(Round(store, "r"), sample=EVERYTHING).slices


@pytest.mark.parametrize("name", ["sharded", "lambda-fl", "sharded-tree"])
def test_float64_is_refused(name: str) -> None:
    """A float64 tensor is refused by its name before anything is read, with what to do."""
    round_ = submitted(sample_updates(3), MemoryStore())

    with pytest.raises(UserError, match="tensor 'float64' is F64, and exact sums are of F32, F16 and BF16: convert it to F32"):
        aggregate(round_, topology=TREES[name], rule=ExactMean())


def test_result_carries_its_digest() -> None:
    """``result.json`` has the rule and, if the rule vouches for the bits, the digest."""
    store = MemoryStore()
    found = {}
    for rule in ("exact-mean", "mean"):
        result = aggregate(submitted(narrow(3), store, rule), rule=rule)
        found[rule] = json.loads(read(store, f"rounds/{rule}/result.json"))
        assert result.record == ResultRecord.model_validate_json(read(store, f"rounds/{rule}/result.json"))
    data = read(store, "results/exact-mean.safetensors")[len(result.record.layout.header()) :]

    assert ("exact-mean", hashlib.sha256(data).hexdigest()) == (found["exact-mean"]["rule"], found["exact-mean"]["digest"])
    assert ("mean", None) == (found["mean"]["rule"], found["mean"]["digest"])


def test_finished_by_another_rule() -> None:
    """A round that is done is not done again by another rule: an error says so, and the result stays."""
    round_ = submitted(narrow(3), MemoryStore())
    first = aggregate(round_, rule=ExactMean())

    with pytest.raises(UserError, match="round r is done, by the rule exact-mean; its result stays: for mean, create another round"):
        aggregate(round_)
    assert first.record == aggregate(round_, rule=ExactMean()).record


def stop_after(count: int, done: list[str]) -> Callable[[Plan], Any]:
    """Give a progress that ends the call after so many tasks."""

    def told(report: Any) -> None:
        done.append(report.task)
        if len(done) == count:
            raise Interrupted

    return lambda _: told


@pytest.mark.parametrize("name", ["lambda-fl", "lifl, shared memory", "sharded-tree"])
@pytest.mark.parametrize("after", [1, 3])
def test_resumed(tmp_path: Path, name: str, after: int) -> None:
    """An exact call that ended midway is gone on with: partial sums that are there, whatever their size, are not made again."""
    updates, done = narrow(9), list[str]()
    with pytest.raises(Interrupted):
        aggregate(submitted(updates, DirectoryStore(tmp_path)), topology=TREES[name], rule=ExactMean(), progress=stop_after(after, done))
    result = aggregate(Round(DirectoryStore(tmp_path), "r"), topology=TREES[name], rule=ExactMean())

    assert {*done}.isdisjoint({report.task for report in result.reports})
    assert after + len(result.reports) == result.plan.functions
    assert result.digest() == aggregate(submitted(updates, MemoryStore()), rule=ExactMean()).digest()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["sharded", "lambda-fl"])
def test_crash_at_every_call(name: str, when: str) -> None:
    """An exact call that dies at any request, also while it takes the digest, is gone on with, to the same published record."""
    updates = narrow(5)
    counting = FlakyStore(submitted(updates, MemoryStore()).store, {})
    whole = aggregate(Round(counting, "r"), topology=TREES[name], rule=ExactMean())
    assert 30 < counting.calls["any"]

    for call in range(1, counting.calls["any"] + 1):
        store = submitted(updates, MemoryStore()).store
        broken = Round(FlakyStore(store, {(when, "any", call): ConnectionError("died")}), "r")
        with pytest.raises(ConnectionError, match="died"):
            aggregate(broken, topology=TREES[name], rule=ExactMean())
        resumed = aggregate(Round(store, "r"), topology=TREES[name], rule=ExactMean())

        assert (call, whole.record.digest) == (call, resumed.record.digest)
        assert resumed.record == Round(store, "r").result()
        assert [] == [key for key, _ in store.list("rounds/r/partials/")]


def test_resumed_by_another_rule(tmp_path: Path) -> None:
    """Partial sums of float64 are not taken for exact ones: a round that goes on exactly begins anew."""
    updates, done = narrow(9), list[str]()
    with pytest.raises(Interrupted):
        aggregate(submitted(updates, DirectoryStore(tmp_path)), topology=LambdaFLTree(), progress=stop_after(2, done))
    result = aggregate(Round(DirectoryStore(tmp_path), "r"), topology=LambdaFLTree(), rule=ExactMean())

    assert result.plan.functions == len(result.reports)
    assert verify(result.round, sample=EVERYTHING).slices


def test_nan() -> None:
    """NaN and infinity are refused with the client's name, or pass through a tree as real arithmetic has them."""
    values = [[1, np.inf, -np.inf, np.nan], [1, np.inf, np.inf, 1], [1, 5, 5, 5], [1, 5, 5, 5]]
    updates = {f"c{i}": ({"w": np.array(row, "f4")}, i + 1) for i, row in enumerate(values)}
    with pytest.raises(NonFinite, match="lambda-fl/0/0: clients c0, c1 hold NaN or infinity"):
        aggregate(submitted(updates, MemoryStore()), topology=LambdaFLTree(), rule=ExactMean())
    round_ = submitted(updates, MemoryStore())
    found = aggregate(round_, topology=LambdaFLTree(), rule=ExactMean(), nonfinite="propagate").arrays()["w"]

    assert ["1.0", "inf", "nan", "nan"] == [str(x) for x in found]
    assert verify(round_, sample=EVERYTHING).elements == 4


def test_partial_sums_cut_short() -> None:
    """Exact partial sums that lost their end are refused, and not read as less."""
    one, other = (Fold([Run("F32", 100), Run("I64", 3)], Cohort(2, 8), ExactMean()) for _ in "ab")
    one.add([np.arange(100, dtype="f4").tobytes(), bytes(24)], 3)
    written = b"".join(one.serialize())

    for data, says in (
        (written[:-1], "in the middle of a slice"),
        (written + b"\0", "at least 1 bytes more"),
        (b"", "ended after 0 bytes"),
    ):
        with pytest.raises(InvalidUpdate, match=says):
            other.merge([data])


def pieces(data: bytes, cut: int) -> Iterator[bytes]:
    """Cut bytes into chunks."""
    return (data[i : i + cut] for i in range(0, len(data), cut))


@pytest.mark.parametrize("cut", [7, 1_000, 1 << 20])
def test_partial_sums_come_in_any_chunks(cut: int) -> None:
    """However the bytes of exact partial sums are cut on their way, they are merged to the same bits; so are elements."""
    draw = np.random.default_rng(0)
    runs = [Run("F32", 40_000), Run("U8", 3), Run("BF16", 5), Run("F16", 20_000), Run("I64", 2)]
    patterns = draw.integers(0, 256, sum(run.nbytes for run in runs)).astype(np.uint8).tobytes()
    wanted = Fold(runs, Cohort(2, 7), ExactMean())
    wanted.add([patterns], 3)
    wanted.add([patterns[::-1]], 4)
    left, right = Fold(runs, Cohort(2, 7), ExactMean()), Fold(runs, Cohort(2, 7), ExactMean())
    left.add(pieces(patterns, cut), 3)
    right.add([patterns[::-1]], 4)
    written = b"".join(right.serialize())
    left.merge(pieces(written, cut))

    assert len(written) <= sum(ExactMean().size(run, Cohort(2, 7)).serialized for run in runs)
    assert bytes(wanted.finalize()) == bytes(left.finalize())


def test_planned_before_it_runs() -> None:
    """Exact sums of float32 take 7 digits of 8 bytes and a byte, 6 under small weights: more slices are cut where memory is short."""
    elements = 4 << 20
    manifest = submitted({"a": ({"w": np.zeros(elements, "f4")}, 1)}, MemoryStore()).seal()
    limits = Limits(memory=150 << 20)
    plain, exact = (Sharded().plan(manifest, limits, rule=rule) for rule in (MEAN, ExactMean()))

    assert [49, 49, 57, 57] == [
        ExactMean().size(Run("F32", elements), Cohort(1, total)).memory // elements for total in (1, 511, 512, 1 << 53)
    ]
    assert len(plain.slices) < len(exact.slices)
    assert exact.memory <= limits.memory
