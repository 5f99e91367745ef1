"""Tasks on Lambda: the real handler under the official runtime emulator, on Ceph, whatever goes wrong with an invocation."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsharding.aggregate import aggregate
from gradsharding.aws.call import pack, unpack
from gradsharding.aws.invoke import LambdaExecutor, Settings
from gradsharding.aws.s3 import S3Store
from gradsharding.aws.smoke import bill_text
from gradsharding.errors import OutOfMemory, PlanTooLarge, StoreRefused, TaskFailed, UserError
from gradsharding.executor import Executor, ProcessExecutor, open_executor
from gradsharding.kernel import Arithmetic
from gradsharding.plan import Limits
from gradsharding.platform import PAYLOAD, RUNTIME
from gradsharding.prices import load_prices
from gradsharding.reading import STREAM
from gradsharding.round import Round
from gradsharding.store import DirectoryStore, ObjectStore
from gradsharding.task import Job, Task, Term
from gradsharding.testing import ExecutorContract, assert_same, peak, read, reference_mean, sample_updates
from gradsharding.testing.executors import Started
from gradsharding.testing.lambdas import LocalFunction, LocalLambda, emulator_missing, hold
from gradsharding.testing.s3 import Ceph
from gradsharding.topology import Topology, lambda_fl, sharded, sharded_tree

MIB = 1 << 20
RUNS_HERE = pytest.mark.skipif(bool(emulator_missing()), reason=str(emulator_missing()))

Start = Callable[..., LocalLambda]


@pytest.fixture
def start(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Give a way to start a function, to which the environment then leads."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> LocalLambda:
            function = LocalFunction(**{key: settings.pop(key) for key in ("memory", "timeout", "limit") if key in settings})
            front = stack.enter_context(LocalLambda(function, **settings))
            for name, value in {**ceph.server.environment(), **front.environment()}.items():
                monkeypatch.setenv(name, value)
            return front

        yield begin


@RUNS_HERE
class TestLambda(ExecutorContract):
    """The contract on a function of 512 MiB, at most two at once."""

    @pytest.fixture
    def executor(self, start: Start) -> Executor:
        """Give an executor on a running function."""
        return open_executor(f"lambda:{start(concurrency=2).function.name}")

    @pytest.fixture
    def store(self, ceph_store: S3Store) -> ObjectStore:
        """Give an empty store."""
        return ceph_store


def _round(store: ObjectStore, updates: Any) -> Round:
    round_ = Round.create(store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    return round_


@RUNS_HERE
@pytest.mark.parametrize("fault", ["raise", "kill", "timeout", "lost", "throttle", "twice", "error"])
def test_faults(ceph_store: S3Store, start: Start, fault: str) -> None:
    """Whatever goes wrong with three invocations, the result has the bits of the reference."""
    updates = sample_updates(3, size=1000)
    front = start(timeout=3, concurrency=2, faults={1: fault, 2: fault, 4: fault})
    result = aggregate(_round(ceph_store, updates), topology=partial(sharded, shards=5), executor=LambdaExecutor("gradsharding"))

    assert_same(reference_mean(updates), result.arrays())
    assert len(front.calls) >= (4 if fault != "twice" else 2)
    assert all(report.invocation and report.invocation.billed_seconds > 0 for report in result.reports)


@RUNS_HERE
def test_figures(ceph_store: S3Store, start: Start) -> None:
    """A report says what the platform measured: a cold start first, warm ones after it, memory, and how many tasks went together."""
    start(concurrency=1, memory=512)
    result = aggregate(
        _round(ceph_store, sample_updates()), topology=partial(sharded, shards=3), executor=LambdaExecutor("gradsharding:live")
    )
    again = Started.of(ceph_store, sample_updates(), shards=3, name="again").run(LambdaExecutor("gradsharding"))

    cold, warm = result.reports[0].invocation, again[0].invocation
    assert cold
    assert warm
    assert (3, 1, 3, 1, 512 * MIB) == (cold.tasks, cold.attempts, warm.tasks, warm.attempts, cold.memory_size)
    assert cold.init_seconds is not None
    assert warm.init_seconds is None
    assert 0 < warm.max_memory <= 512 * MIB


@RUNS_HERE
def test_bill_stands_beside_the_forecast(ceph_store: S3Store, start: Start) -> None:
    """The report of a round on Lambda bills what the platform told, exactly, beside what was forecast, in both accountings."""
    start(concurrency=2, memory=512)
    result = aggregate(_round(ceph_store, sample_updates()), topology=partial(sharded, shards=3), executor=LambdaExecutor("gradsharding"))
    told = {report.invocation.request: report.invocation for report in result.reports if report.invocation}
    cost, prices = result.report()["cost"], load_prices()

    seconds = sum(Decimal(str(one.billed_seconds)) / 2 for one in told.values())
    observed = result.report()["observed"]["stores"]["s3"]
    requests = observed["gets"] * prices.usd("s3_get") + observed["puts"] * prices.usd("s3_put")
    expected = seconds * prices.lambda_second("x86_64") + len(told) * prices.usd("lambda_request") + requests
    assert expected == Decimal(cost["aggregation"]["observed"])
    for accounting in ("aggregation", "round_trip"):
        assert Decimal(cost[accounting]["projected"]) > 0
    assert Decimal(cost["round_trip"]["observed"]) == sum(Decimal(item["usd"]) for item in cost["items"])
    assert cost["prices"].startswith("list prices of us-east-1, ")
    shown = bill_text(result)
    assert re.search(r"invocations: \d, \d of them cold starts; .* of 512\.0 MiB used", shown)
    assert "GiB-seconds" in shown
    assert prices.origin in shown


@RUNS_HERE
def test_settings(start: Start) -> None:
    """Memory, time and concurrency are read from the account, and narrow what is allowed; who may not ask goes by defaults."""
    start(memory=256, timeout=7, concurrency=3)
    executor = LambdaExecutor("gradsharding")
    assert Settings(256 * MIB, 7, 3, "x86_64") == executor.settings
    assert Limits(memory=256 * MIB - RUNTIME, concurrency=3) == executor.limits(None)
    assert Limits(memory=128 * MIB, concurrency=2) == LambdaExecutor("gradsharding", concurrency=2).limits(Limits(memory=128 * MIB))

    start(memory=256, tells=False)
    assert Settings(None, None, None, None) == LambdaExecutor("gradsharding").settings
    assert Limits() == LambdaExecutor("gradsharding").limits(None)


@RUNS_HERE
def test_refused_before_it_runs(ceph_store: S3Store, start: Start) -> None:
    """A plan that the function's memory or concurrency cannot carry is refused, with the remedy, and no invocation."""
    round_ = _round(ceph_store, {"a": ({"w": np.ones(16 * MIB, "f4")}, 1)})
    front = start(memory=256)
    with pytest.raises(PlanTooLarge, match=r"projects .* of 232.0 MiB allowed; use at least \d+ shards"):
        aggregate(round_, topology=partial(sharded, shards=1), executor=LambdaExecutor("gradsharding"))
    stopped = start(concurrency=0)
    with pytest.raises(PlanTooLarge, match="no function may run: their concurrency is 0"):
        aggregate(round_, executor=LambdaExecutor("gradsharding"))
    assert [] == front.calls == stopped.calls


@RUNS_HERE
def test_no_such_function(ceph_store: S3Store, start: Start) -> None:
    """A function that is not there is named, with the command that puts one up."""
    start()
    with pytest.raises(StoreRefused, match="there is no function 'other' in this account and region; put it up with: gradsharding deploy"):
        aggregate(_round(ceph_store, sample_updates()), executor=LambdaExecutor("other"))


@RUNS_HERE
@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("timeout", r"Task timed out after 1.00 seconds; use more shards, or give the function more time.* \(3 times\)"),
        ("kill", r"(signal: killed|without providing a reason); it may have outgrown its memory: use more shards.* \(3 times\)"),
        ("raise", r"its log in CloudWatch says more \(3 times\)"),
        ("error", r"Lambda answered ServiceException; run it again \(3 times\)"),
        ("lost", r"its answer was lost .* \(3 times\)"),
    ],
)
def test_gives_up(ceph_store: S3Store, start: Start, fault: str, advice: str) -> None:
    """A task that fails three times ends the round with its name and advice; nothing is published, and the round can go on."""
    updates = sample_updates()
    start(timeout=1, faults=dict.fromkeys(range(1, 40), fault))
    round_ = _round(ceph_store, updates)
    with pytest.raises(TaskFailed, match=rf"task sharded/\d failed: .*{advice}"):
        aggregate(round_, topology=partial(sharded, shards=2), executor=LambdaExecutor("gradsharding"))
    assert round_.result() is None

    start()
    assert_same(reference_mean(updates), aggregate(round_, executor=LambdaExecutor("gradsharding")).arrays())


@RUNS_HERE
def test_throttled_for_too_long(ceph_store: S3Store, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that get no turn for a quarter of an hour end the round, and it says what takes their place."""
    monkeypatch.setattr("gradsharding.aws.invoke.PATIENCE", 0.2)
    start(faults=dict.fromkeys(range(1, 99), "throttle"))
    with pytest.raises(TaskFailed, match=r"was throttled for .* other work takes the account's concurrency"):
        aggregate(_round(ceph_store, sample_updates()), executor=LambdaExecutor("gradsharding"))


def test_what_functions_cannot_reach(ceph_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store, an update or an output on this machine is refused by name."""
    monkeypatch.setattr(LambdaExecutor, "settings", Settings(None, None, None, None))
    with pytest.raises(UserError, match=r"file://.* cannot be reached by Lambda functions; use an s3:// store"):
        aggregate(_round(DirectoryStore(tmp_path), sample_updates()), executor=LambdaExecutor("gradsharding"))
    round_ = Round.create(ceph_store, "r2")
    round_.refer("a", f"{DirectoryStore(tmp_path).url}/rounds/r/updates/client-0.safetensors", 1)
    with pytest.raises(UserError, match=r"updates cannot be reached|client-0.safetensors cannot be reached"):
        aggregate(round_, executor=LambdaExecutor("gradsharding"))


def _call(clients: int) -> tuple[Job, Task]:
    terms = (Term(client=f"client-{i}", source=f"rounds/r/updates/client-{i}", version='"x"', base=8, weight=1) for i in range(clients))
    task = Task(id="t/2", start=0, stop=0, runs=(), first=0, last=clients, listed=clients, total=clients, part=2, offset=8, reading=STREAM)
    return Job(store="s3://bucket", output="o", upload="u", terms=tuple(terms)), task


def test_call() -> None:
    """An invocation's event reads back as what was written; updates that tasks share are written once."""
    job, task = _call(1000)
    twin = task.model_copy(update={"id": "t/3", "part": 3})
    event = pack(job, [task, twin])

    assert (job, (task, twin)) == unpack(json.loads(event))
    assert len(event) < 1.1 * len(pack(job, [task]))
    half = task.model_copy(update={"first": 500})
    assert (job.narrowed([half]), (half,)) == unpack(json.loads(pack(job, [half])))
    assert len(pack(job, [half])) < 0.6 * len(event)


def test_call_too_large() -> None:
    """More updates than an event can name are refused with the numbers."""
    job, task = _call(80_000)
    with pytest.raises(PlanTooLarge, match=rf"1 tasks of 80000 inputs takes \d+ bytes; Lambda accepts {PAYLOAD}"):
        pack(job, [task])


def test_call_of_another_release() -> None:
    """A function of another release says so, and what to do."""
    event = {"release": "0.0.1", "job": {}, "tasks": []}
    with pytest.raises(UserError, match=re.escape("was called by 0.0.1; run `gradsharding deploy` to update it")):
        unpack(event)


@RUNS_HERE
@pytest.mark.parametrize("arithmetic", ["float64", "exact"])
def test_one_digest(ceph_store: S3Store, start: Start, tmp_path: Path, arithmetic: Arithmetic) -> None:
    """A directory with processes, Ceph with processes and Ceph with Lambda give one digest; exact, they do as trees, too."""
    draw = np.random.default_rng(0)
    updates = {f"c{i}": ({"w": draw.normal(size=3 * MIB).astype("f4"), "n": np.array(i)}, i + 1) for i in range(4)}
    start(concurrency=2)
    copy = S3Store(f"{ceph_store.url}/copy")
    places: list[tuple[ObjectStore, Executor]] = [
        (DirectoryStore(tmp_path), ProcessExecutor(2)),
        (ceph_store, ProcessExecutor(2)),
        (copy, LambdaExecutor("gradsharding")),
    ]
    trees: list[Topology] = [partial(sharded, shards=3)] * 3 if arithmetic == "float64" else [sharded, lambda_fl, sharded_tree]
    results = [
        aggregate(_round(store, updates), topology=topology, arithmetic=arithmetic, limits=Limits(memory=600 << 20), executor=executor)
        for (store, executor), topology in zip(places, trees, strict=True)
    ]

    assert 1 == len({result.digest() for result in results})
    assert_same(reference_mean(updates), results[-1].arrays())


@RUNS_HERE
def test_killed_for_its_memory(ceph_store: S3Store, start: Start) -> None:
    """A function that has less memory than it says is killed; the round reports it with the remedy, and goes on with more slices."""
    if hold() == "nothing":
        with pytest.raises(UserError, match=r"^nothing can hold a function to 160 MiB here: no memory cgroup may be made; try as root$"):
            start(memory=512, limit=160)
        pytest.skip("this machine lets nobody make a memory cgroup here")
    updates = {c: ({"w": np.full(16 * MIB, i, "f4")}, 1) for i, c in enumerate("ab")}
    front = start(memory=512, limit=160)
    round_ = _round(ceph_store, updates)
    with pytest.raises(
        OutOfMemory, match=r"task sharded/0 outgrew .* Lambda ended it at 160.0 MiB; use more shards, or give the function more"
    ):
        aggregate(round_, topology=partial(sharded, shards=1), executor=LambdaExecutor("gradsharding"))
    assert ["Unhandled"] == [call.outcome for call in front.calls]

    result = aggregate(round_, topology=partial(sharded, shards=16), executor=LambdaExecutor("gradsharding"))
    assert_same(reference_mean(updates), result.arrays())


@pytest.mark.slow
@RUNS_HERE
def test_a_gigabyte_in_256_megabytes(ceph_store: S3Store, start: Start) -> None:
    """A function held to 256 MiB averages a model of 1 GB of 8 clients, within the memory that was projected."""
    elements, spots = 250_000_000, (0, 1, 123_456_789, 249_999_999)
    round_, draw = Round.create(ceph_store, "r"), np.random.default_rng(0)
    values = draw.normal(size=(2, len(spots))).astype("f4")
    for client in range(8):
        if client < 2:
            update = np.full(elements, client, "f4")
            update[list(spots)] = values[client]
            round_.submit(f"c{client}", {"w": update}, client + 1)
            continue
        # the server's own copies: 8 GB of updates take what 2 GB take in its memory
        source, key = (ceph_store.place(round_.update_key(f"c{one}")) for one in (client % 2, client))
        ceph_store.client.copy_object(Bucket=ceph_store.bucket, Key=key, CopySource={"Bucket": ceph_store.bucket, "Key": source})
        round_.refer(f"c{client}", round_.update_key(f"c{client}"), client + 1)
    expected = sum((client + 1) * values[client % 2].astype("f8") for client in range(8)) / 36
    start(memory=256, timeout=300, concurrency=2)
    result = aggregate(round_, executor=LambdaExecutor("gradsharding"))

    told = [report.invocation for report in result.reports]
    most = max(one.max_memory for one in told if one)
    print(f"{len(told)} tasks, peak {most >> 20} MiB of 256, projected {(result.plan.memory + RUNTIME) >> 20}")  # noqa: T201 - pytest -s
    base = ceph_store.head(round_.output).size - 4 * elements
    found = [read(ceph_store, round_.output, base + 4 * i, base + 4 * i + 4) for i in (*spots, 2)]
    assert [np.float32(value).tobytes() for value in (*expected, (2 + 4 + 6 + 8) / 36)] == [bytes(one) for one in found]
    assert most <= result.plan.memory + RUNTIME <= 256 * MIB
    assert peak(result) <= result.plan.memory
