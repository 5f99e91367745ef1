"""Every topology gives the same weighted mean, and does just what its plan says."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding import DirectoryStore, InlineExecutor, Limits, MemoryStore, Result, Round, aggregate, open_executor
from gradsharding.arithmetic.fold import Fold
from gradsharding.arithmetic.rules import MEAN, Cohort, ExactMean, Rule
from gradsharding.errors import NonFinite, PlanTooLarge, UserError
from gradsharding.format.dtypes import Run
from gradsharding.planning.plan import Plan
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.planning.topologies import Flat, LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology
from gradsharding.rounds.round import SHARED_MEMORY
from gradsharding.rounds.verify import verify
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import Reading
from gradsharding.testing import CountingStore, FlakyStore, assert_same, peak, reference_mean, sample_updates
from gradsharding.testing.reference import Updates
from gradsharding.usage import total

TREES: Mapping[str, Topology] = {
    "flat": Flat(),
    "sharded": Sharded(shards=3),
    "lambda-fl": LambdaFLTree(),
    "lambda-fl, 3 levels": LambdaFLTree(fan_in=2, levels=3),
    "lifl": LIFLTree(),
    "lifl, shared memory": LIFLTree(shared_memory=True),
    "sharded-tree": ShardedTree(shards=3),
}


def submitted(updates: Updates, store: ObjectStore, name: str = "r") -> Round:
    """Make a round of updates."""
    round_ = Round.create(store, name)
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    return round_


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a directory of shared memory that is this test's own: other processes of this machine use it, too."""
    with TemporaryDirectory(dir=SHARED_MEMORY) as place:
        monkeypatch.setattr("gradsharding.rounds.round.SHARED_MEMORY", Path(place))
        yield Path(place)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("clients", [1, 3, 20])
def test_every_dtype(shared_memory: Path, name: str, clients: int) -> None:
    """Whatever the topology, tensors of every dtype come out as numpy has them, bit for bit, and no partial sums are left behind."""
    updates, store = sample_updates(clients), MemoryStore()
    result = aggregate(submitted(updates, store), topology=TREES[name])
    expected, found = reference_mean(updates), result.arrays()

    for dtype in {*expected} - {"float64"}:  # summed in another order, a float64 may differ in its last bit
        assert_same({dtype: expected[dtype]}, {dtype: found[dtype]})
    np.testing.assert_allclose(found["float64"], expected["float64"], rtol=1e-14)
    assert [] == [key for key, _ in store.list("rounds/r/partials/")]
    assert [] == [*shared_memory.iterdir()]


@given(
    weights=st.lists(st.integers(1, 1 << 29), min_size=1, max_size=30) | st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=30),
    kind=st.sampled_from([LambdaFLTree, ShardedTree, LIFLTree]),
    fan_in=st.integers(1, 7),
    levels=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "float16", "float64", "int64", "int8", "uint32", "bool"]),
    seed=st.integers(0, 1 << 20),
)
def test_same_mean(weights: list[float], kind: type[Topology], fan_in: int, levels: int, dtype: str, seed: int) -> None:
    """Over random clients, weights, fan-ins, depths and dtypes, a tree gives the weighted mean: integers exactly, floats to a last bit."""
    draw = np.random.default_rng(seed)
    numbers = draw.normal(size=(len(weights), 11)) * 10 ** draw.integers(0, 3)
    updates = {f"c{i:02d}": ({"w": x.astype(dtype)}, w) for i, (x, w) in enumerate(zip(numbers, weights, strict=True))}
    shape = {"fan_in": fan_in} | ({"levels": levels} if kind is not LIFLTree else {})
    round_ = submitted(updates, MemoryStore())
    found = aggregate(round_, topology=kind(**shape)).arrays()["w"]
    one = aggregate(submitted(updates, MemoryStore()), topology=Flat()).arrays()["w"]

    if np.dtype(dtype).kind == "f":
        size = np.abs(numbers).max()  # where a sum cancels, its last bits are those of what was added
        np.testing.assert_allclose(found, one, rtol=2 * float(np.finfo(dtype).eps), atol=1e-14 * float(size))
    else:
        assert one.tobytes() == found.tobytes()


@pytest.mark.parametrize(
    ("topology", "gets", "puts"),
    [(Sharded(shards=4), 80, 4), (Sharded(shards=8), 160, 8), (LambdaFLTree(), 24, 5), (LIFLTree(), 30, 11)],
    ids=["M=4", "M=8", "lambda-fl", "lifl"],
)
def test_requests_of_the_paper(topology: Topology, gets: int, puts: int) -> None:
    """At 20 clients the functions make as many requests as the paper's formulas have, counted at the store."""
    store = MemoryStore()
    round_ = submitted(sample_updates(20), store)
    round_.seal()
    counting = CountingStore(store, only=lambda key: any(part in key for part in ("/updates/", "/partials/", "results/")))
    result = aggregate(Round(counting, "r"), topology=topology)
    assembly = 3  # the upload's begin, its header and its end: the paper leaves results in pieces

    assert (gets, puts + assembly) == (counting.gets, counting.puts)
    assert (gets, puts) == (sum(r.gets for r in result.reports), sum(r.puts for r in result.reports))


def average_of_averages(values: list[Any], fan_in: int) -> Any:
    """What the public re-implementation of LIFL computes: each level averages its inputs, unweighted."""
    for _ in range(2):
        groups = [values[i : i + fan_in] for i in range(0, len(values), fan_in)]
        values = [sum(group) / len(group) for group in groups]
    return sum(values) / len(values)


def test_bias_of_averaged_averages() -> None:
    """In the public re-implementation of LIFL, two of 20 clients weigh 1/6 and the others 1/27; here each weighs 1/20."""
    unit = np.eye(20)
    updates = {f"c{i:02d}": ({"w": unit[i]}, 1) for i in range(20)}
    biased = average_of_averages([*unit], 3)
    plan_round = submitted(updates, MemoryStore())
    result = aggregate(plan_round, topology=LIFLTree())

    assert (7, 3, 1) == result.plan.widths
    np.testing.assert_allclose(biased, [1 / 27] * 18 + [1 / 6] * 2)
    np.testing.assert_array_equal(result.arrays()["w"], np.full(20, 1 / 20))


def assert_nearly(expected: dict[str, Any], result: Result) -> None:
    """Compare to the precision that float64 sums leave."""
    for name, array in result.arrays().items():
        if array.dtype.kind in "iub":
            np.testing.assert_array_equal(array, expected[name])
        else:
            np.testing.assert_allclose(array, expected[name], rtol=2 * np.finfo(array.dtype).eps, atol=1e-10)


def random_round(draw: random.Random, store: ObjectStore, name: str) -> tuple[Round, Topology, Rule, dict[str, Any]]:
    """Draw updates, a topology with its parameters, what it sums in, and how functions read."""
    clients, elements = draw.randint(1, 12), draw.choice([1, 7, 200, 20_000])
    heaviest = 1 << draw.choice([1, 10, 20, 40])  # the heaviest make integer sums wide, which are slow
    known = ["f4", "f2", "f8"] if elements > 200 else ["f4", "f2", "f8", "i8", "u4", "i1", "?"]  # the reference is slow with integers
    rule: Rule = draw.choice([MEAN, MEAN, ExactMean()])
    dtypes = draw.sample(known, draw.randint(1, 3)) if rule == MEAN else draw.sample(known, 2)
    if rule.vouches:
        dtypes = [dtype for dtype in dtypes if dtype != "f8"]
    numbers = np.random.default_rng(draw.randrange(1 << 30))
    updates = {
        f"c{i:02d}": ({t: (100 * numbers.normal(size=elements)).astype(t) for t in dtypes}, draw.randint(1, heaviest))
        for i in range(clients)
    }
    shards, fan_in = draw.randint(1, min(6, elements)), draw.randint(1, 5)
    reading = Reading(chunk=draw.choice([0, 64 if elements <= 200 else 4_096, 10_000]), parallel=draw.randint(1, 3))
    store.reading = reading
    topologies: list[Topology] = [
        Flat(),
        Sharded(shards=shards),
        LambdaFLTree(fan_in=fan_in, levels=draw.randint(1, 4)),
        LIFLTree(fan_in=fan_in, shared_memory=draw.random() < 0.5),
        ShardedTree(shards=shards, fan_in=fan_in),
    ]
    return submitted(updates, store, name), draw.choice(topologies), rule, updates


NURSERY = """
import json, os, sys
from gradsharding.running import worker
from gradsharding.planning.task import Job, Task
from gradsharding.stores.urls import open_store
for line in sys.stdin:
    if os.fork() == 0:
        job, *tasks = json.loads(line)
        job = Job.model_validate_json(job)
        for task in tasks:
            worker.forget_peak()
            print(worker.answer(Task.model_validate_json(task), job, open_store(job.store)), flush=True)
        os._exit(0)
    os.wait()
"""
"""A process that has imported what a worker does, and nothing else; each round is run by a child of its own, begun in no time."""


class Nursery(InlineExecutor):
    """Runs each round in a fresh process."""

    def __init__(self) -> None:
        """Start."""
        command, environment = [sys.executable, "-P", "-c", NURSERY], {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def run(self, tasks: Sequence[Task], job: Job, *_: Any) -> list[TaskReport]:
        """Run the tasks in their order, which is one that trees allow."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([job.model_dump_json(), *(task.model_dump_json() for task in tasks)]) + "\n")
        self.process.stdin.flush()
        return [TaskReport.model_validate_json(self.process.stdout.readline()) for _ in tasks]

    def close(self) -> None:
        """End it."""
        self.process.communicate()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    """Give an executor whose processes are fresh."""
    executor = Nursery()
    yield executor
    executor.close()


@pytest.mark.slow
def test_plan_is_observation(nursery: Nursery, shared_memory: Path) -> None:
    """500 random plans: what the store sees and a fresh process takes is what the plan said; memory is a bound, and all of exact trees."""
    draw, kinds = random.Random(20), Counter[str]()
    for _ in range(500):
        seed = draw.randrange(1 << 30)
        counting = CountingStore(MemoryStore(), only=lambda key: any(p in key for p in ("/updates/", "/partials/", "results/")))
        round_, topology, rule, updates = random_round(random.Random(seed), counting, "r")
        round_.seal()
        counting.gets = counting.puts = counting.bytes_read = counting.bytes_written = 0
        inline = aggregate(round_, topology=topology, rule=rule)
        plan, shared = inline.plan, inline.plan.partial_bytes if inline.plan.shared_memory else 0
        read_shared = sum(task.bytes_read for task in plan.tasks if task.reads and task.shared)
        kinds.update((plan.topology, str(plan.rule)))

        if rule.vouches:
            assert verify(round_, sample=1).elements
        else:
            asked = total(plan.tasks_usage)  # and beside the tasks: the output looked at, begin, header, end
            assert (asked.gets, asked.puts + 3) == (counting.gets, counting.puts), plan
            assert asked.bytes_read - read_shared == counting.bytes_read, plan
            assert asked.bytes_written - shared + plan.header_bytes == counting.bytes_written, plan
        assert_nearly(reference_mean(updates), inline)

        with TemporaryDirectory(dir=SHARED_MEMORY) as place:  # the disk is none of its concern
            round_, topology, *_ = random_round(random.Random(seed), DirectoryStore(place), "r")
            processes = aggregate(round_, topology=topology, rule=rule, executor=nursery, limits=Limits(memory=1 << 30))
            assert inline.digest() == processes.digest()
        projected = {task.id: task for task in processes.plan.tasks}
        for report in processes.reports:
            task = projected[report.task]
            planned, seen = ((of.gets, of.bytes_read, of.bytes_written) for of in (task, report))
            assert (0 if task.written_to_memory else 1) == report.puts
            assert planned == seen or (task.varies and all(least <= most for most, least in zip(planned, seen, strict=True)))
            assert peak(report) <= task.memory, (task, report)
    assert {"flat", "sharded", "lambda-fl", "lifl", "sharded-tree", "mean", "exact-mean"} == {*kinds}
    assert kinds["exact-mean"] > 100
    assert [] == [*shared_memory.iterdir()]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("spec", ["inline", "threads:4", pytest.param("processes:2", marks=pytest.mark.slow)])
def test_executors(tmp_path: Path, name: str, spec: str) -> None:
    """Whoever runs the tasks, and in whatever order they end, the bytes are the same."""
    updates = sample_updates(10, size=1000)
    expected = aggregate(submitted(updates, MemoryStore()), topology=TREES[name]).digest()

    assert expected == aggregate(submitted(updates, DirectoryStore(tmp_path)), topology=TREES[name], executor=open_executor(spec)).digest()


class Interrupted(Exception):
    """What ends a call in these tests."""


@pytest.mark.parametrize("name", ["lambda-fl", "lifl", "lifl, shared memory", "sharded-tree"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_resume(tmp_path: Path, shared_memory: Path, name: str, after: int) -> None:
    """A call that ended midway is gone on with: partial sums that were written are not made again."""
    updates, store = sample_updates(9), DirectoryStore(tmp_path)
    done = list[str]()

    def stop(_: Plan) -> Any:
        def told(report: Any) -> None:
            done.append(report.task)
            if len(done) == after:
                raise Interrupted

        return told

    with pytest.raises(Interrupted):
        aggregate(submitted(updates, store), topology=TREES[name], progress=stop)
    result = aggregate(Round(store, "r"), topology=TREES[name])
    assert_all_but_last_bits(reference_mean(updates), result)
    assert {*done}.isdisjoint({r.task for r in result.reports})
    assert after + len(result.reports) == result.plan.functions
    assert [] == [*shared_memory.iterdir()]


def assert_all_but_last_bits(expected: dict[str, Any], result: Result) -> None:
    """Compare, letting float64 differ in the last bit."""
    for name, array in result.arrays().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-14, err_msg=name)


def test_another_plan(tmp_path: Path, shared_memory: Path) -> None:
    """When a round goes on with another topology, what the first one left is deleted."""
    updates, store = sample_updates(9), DirectoryStore(tmp_path)

    def stop(_: Plan) -> Any:
        def told(_: Any) -> None:
            raise Interrupted

        return told

    for name in ("lifl", "lifl, shared memory", "lambda-fl"):
        with pytest.raises(Interrupted):
            aggregate(submitted(updates, store), topology=TREES[name], progress=stop)
    result = aggregate(Round(store, "r"), topology=Sharded())

    assert_same(reference_mean(updates), result.arrays())
    assert [] == [key for key, _ in store.list("rounds/r/partials/")]
    assert [] == [*shared_memory.iterdir()]


def test_nan_in_a_leaf() -> None:
    """A leaf that meets NaN names the client; nothing is published."""
    updates = {f"c{i}": ({"w": np.array([1.0, np.nan if i == 5 else 2.0])}, 1) for i in range(9)}
    round_ = submitted(updates, MemoryStore())

    with pytest.raises(NonFinite, match=r"lambda-fl/0/1: clients c5 hold NaN"):
        aggregate(round_, topology=LambdaFLTree())
    assert round_.result() is None
    assert np.isnan(aggregate(round_, topology=LambdaFLTree(), nonfinite="propagate").arrays()["w"][1])


def test_sums_that_overflow_on_the_way() -> None:
    """Finite sums that overflow only where they are merged are told from NaN in an update, and the clients are named all the same."""
    updates = {f"c{i}": ({"w": np.array([1.0, 1.5e308 if i != 1 else 3.0])}, 1) for i in range(3)}
    round_ = submitted(updates, MemoryStore())

    with pytest.raises(NonFinite, match=r"lambda-fl/1/0: finite values overflow when summed, those of clients c0, c2") as caught:
        aggregate(round_, topology=LambdaFLTree(fan_in=1))
    assert [["c0", 8], ["c2", 8]] == caught.value.details["found"]


def test_partial_sums_that_vanish(tmp_path: Path) -> None:
    """Partial sums that somebody deletes under way end the call with their name; a second call makes them again."""
    updates, store = sample_updates(9), DirectoryStore(tmp_path)

    def delete(_: Plan) -> Any:
        return lambda report: store.delete([k for k, _ in store.list("rounds/r/partials/")]) if report.task == "lambda-fl/0/1" else None

    with pytest.raises(Exception, match=r"there is no object 'rounds/r/partials/[0-9a-f]{16}/lambda-fl\.0\.0'"):
        aggregate(submitted(updates, store), topology=LambdaFLTree(), progress=delete)
    assert_all_but_last_bits(reference_mean(updates), aggregate(Round(store, "r"), topology=LambdaFLTree()))


def test_shared_memory_is_private(tmp_path: Path, shared_memory: Path) -> None:
    """Partial sums in shared memory can be read by their owner alone."""
    modes = list[int]()

    def look(_: Plan) -> Any:
        return lambda _: modes.extend(path.stat().st_mode & 0o777 for path in shared_memory.iterdir())

    aggregate(submitted(sample_updates(4), DirectoryStore(tmp_path)), topology=TREES["lifl, shared memory"], progress=look)
    assert {0o700} == {*modes}


def test_no_room_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums that shared memory has no room for are refused before anything runs."""
    usage = os.statvfs(SHARED_MEMORY)
    updates = sample_updates(4)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())

    assert usage.f_bavail
    with pytest.raises(PlanTooLarge, match=r"partial sums take .* of shared memory, and /dev/shm has 0\.1 MiB free"):
        aggregate(submitted(updates, MemoryStore()), topology=TREES["lifl, shared memory"])


def test_lambda_shares_no_memory() -> None:
    """Functions in the cloud have no memory in common: LIFL's own data plane is refused there."""
    invoke = pytest.importorskip("gradsharding.aws.functions.executor", reason="boto3 is not installed")
    plan = TREES["lifl, shared memory"].plan(submitted(sample_updates(4), MemoryStore()).seal())
    job = Job(store="s3://bucket", output="r", upload="u", partials="shm:///dev/shm/gradsharding-0")
    with pytest.raises(UserError, match="cannot be reached by Lambda functions"):
        invoke.LambdaExecutor("f").run(plan.tasks, job, MemoryStore(), Limits(), lambda _: None)


def test_merge_takes_what_sums_gives() -> None:
    """Sums written by one fold and merged by another are the sums of both, also those beyond 64 bits."""
    runs, cohort = [Run("U64", 3), Run("F32", 2)], Cohort(2, 1 << 40)
    whole = Fold(runs, cohort)
    parts = [Fold(runs, cohort) for _ in range(2)]
    for i, weight in enumerate((1 << 39, 1 << 39)):
        data = np.array([0, 5, (1 << 64) - 1 - i], "u8").tobytes() + np.array([i, -2.5], "f4").tobytes()
        whole.add([data], weight)
        parts[i].add([data], weight)
    merged = Fold(runs, cohort)
    for part in parts:
        merged.merge(iter(part.serialize()))

    assert bytes(whole.finalize()) == bytes(merged.finalize())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_fails(when: Any) -> None:
    """Where writing partial sums fails, or its answer is lost, the call ends with the store's error; the next one goes on."""
    updates = sample_updates(4)
    store = MemoryStore()
    submitted(updates, store).seal()
    flaky = FlakyStore(store, {(when, "put", 2): OSError("the store is away")})  # the first put is the plan's record
    with pytest.raises(OSError, match="the store is away"):
        aggregate(Round(flaky, "r"), topology=LambdaFLTree())
    result = aggregate(Round(store, "r"), topology=LambdaFLTree())

    assert (3 if when == "before" else 2) == len(result.reports)
    assert_all_but_last_bits(reference_mean(updates), result)
