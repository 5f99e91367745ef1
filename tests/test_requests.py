"""Requests are counted at the server: a report says what the server saw, and a plan no less."""

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp.strategy import FedAvg

import request_counts
from flower_federation import client, grid_of, initial, record, sharding
from gradsharding import (
    Flat,
    FuturesExecutor,
    InlineExecutor,
    LambdaFLTree,
    LIFLTree,
    ProcessExecutor,
    Round,
    Sharded,
    ShardedTree,
    aggregate,
)
from gradsharding.advice import billing
from gradsharding.aws.functions.executor import LambdaExecutor
from gradsharding.aws.s3.direct import UrlSource
from gradsharding.aws.s3.presign import readable
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import NonFinite
from gradsharding.running.executors import Executor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.testing import CountingStore, sample_updates
from gradsharding.usage import Usage, carried, count, counting, total
from gradsharding_flower import GradSharding, upload_mod
from gradsharding_flower.result import RoundReport
from gradsharding_flower.testing import LocalGrid
from rigs.lambdas import LocalFunction, LocalLambda
from rigs.proxy import Path as Route
from rigs.proxy import Proxy
from rigs.s3 import Ceph, Request, S3Server

FEW, MOTO, CEPH = 6, 30, 12
"""Rounds of each run of these tests; ``benchmarks/request_counts.py`` counts 200 and 50."""


def submitted(store: ObjectStore, updates: Any, name: str = "r") -> Round:
    """Make a round of updates."""
    round_ = Round.create(store, name)
    for who, (arrays, weight) in updates.items():
        round_.submit(who, arrays, weight)
    return round_


@pytest.mark.parametrize(
    ("method", "target", "billed"),
    [
        ("GET", "/b/key", "gets"),
        ("HEAD", "/b/key", "gets"),
        ("GET", "/b?list-type=2&prefix=a", "puts"),
        ("GET", "/b/key?uploadId=7", "puts"),
        ("PUT", "/b/key?partNumber=1&uploadId=7", "puts"),
        ("POST", "/b/key?uploads", "puts"),
        ("POST", "/b?delete", "deletes"),
        ("DELETE", "/b/key?uploadId=7", "deletes"),
    ],
)
def test_classes(method: str, target: str, billed: str) -> None:
    """A request's class is told from HTTP alone, as S3 bills it."""
    assert billed == Request(method, target).billed


@pytest.mark.parametrize(
    ("server", "count"),
    [("moto", FEW), pytest.param("moto", MOTO, marks=pytest.mark.slow), pytest.param("ceph", CEPH, marks=pytest.mark.rig)],
)
@pytest.mark.slow
def test_random_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, server: str, count: int) -> None:
    """Random rounds by command, call, after a crash and in Flower: the server saw what is reported, no more than was planned."""
    store: S3Store = request.getfixturevalue(f"{server}_store")
    found: Any = request.getfixturevalue(server)
    at: S3Server = found.server if isinstance(found, Ceph) else found
    monkeypatch.setattr("tempfile.tempdir", None)
    seed = random.SystemRandom().randrange(1 << 30)
    counted = [*request_counts.rounds(seed, count, store, at)]

    assert (seed, []) == (seed, [one.problem for one in counted if one.problem])
    assert {"command", "flower", "call", "resumed"} == {one.kind for one in counted}


@pytest.mark.parametrize(
    "topology",
    [Flat(), Sharded(shards=3), LambdaFLTree(), LIFLTree(fan_in=2), ShardedTree(shards=2)],
    ids=["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"],
)
@pytest.mark.usefixtures("emulator")
def test_lambda(ceph: Ceph, ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch, topology: Any) -> None:
    """On Lambda, the functions' requests are in their reports, and with the caller's they are what the server saw; the bill is of these."""
    round_ = submitted(ceph_store, sample_updates(5, size=3_000))
    with LocalLambda(LocalFunction(memory=512), concurrency=2) as front:
        for name, value in front.environment().items():
            monkeypatch.setenv(name, value)
        with ceph.server.counting() as seen:
            result = aggregate(round_, topology=topology, executor=LambdaExecutor("gradsharding"))
            report = billing.report(result)

    observed, projected = report["observed"], report["projected"]
    assert (seen["gets"], seen["puts"], seen["deletes"]) == tuple(observed[name] for name in ("gets", "puts", "deletes"))
    assert (observed["gets"], observed["puts"]) == (projected["gets"], projected["puts"])
    billed = {item["name"]: float(item["count"]) for item in report["cost"]["items"]}
    for kind in ("gets", "puts"):
        class_ = f"{kind[:-1].upper()}s"
        assert seen[kind] == billed[f"functions' {class_}"] + billed[f"the caller's {class_}"]


@pytest.mark.usefixtures("emulator")
def test_a_lost_answer_is_told(ceph: Ceph, ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt whose answer was lost has asked nobody knows what: the report counts such attempts, and no more than it knows."""
    round_ = submitted(ceph_store, sample_updates(3, size=100))
    with LocalLambda(LocalFunction(memory=512), concurrency=1, faults={1: "lost"}) as front:
        for name, value in front.environment().items():
            monkeypatch.setenv(name, value)
        with ceph.server.counting() as seen:
            observed = aggregate(round_, executor=LambdaExecutor("gradsharding")).report()["observed"]

    assert 1 == observed["lost_attempts"]
    assert 3 == seen["gets"] - observed["gets"]


class Killing(ProcessExecutor):
    """Kills the worker of each first attempt."""

    def run(self, *args: Any) -> Any:
        """Kill, once."""
        self.killed = False
        return super().run(*args)

    def _try(self, process: Any, task: Any) -> Any:
        if not self.killed:
            self.killed = True
            os.kill(process._process.pid, signal.SIGKILL)
        return super()._try(process, task)


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    """An attempt whose worker was killed is counted as lost."""
    result = aggregate(submitted(DirectoryStore(tmp_path), sample_updates()), executor=Killing(1))

    assert 1 == result.report()["observed"]["lost_attempts"]


@pytest.mark.parametrize(
    "executor", [InlineExecutor(), pytest.param(ProcessExecutor(1), marks=pytest.mark.slow)], ids=["inline", "processes"]
)
def test_retries_count(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, executor: Executor) -> None:
    """Requests that are refused and made again, and reads that break off and go on, count each time."""
    round_ = submitted(moto_store, {c: ({"w": np.full(100_000, i, "f4")}, 1) for i, c in enumerate("abc")})
    plan = aggregate(submitted(moto_store, sample_updates(), "plan"), executor=executor).plan  # what a round of three takes
    faults = {7: "503", 12: "cut:1000", 15: "500"}
    with Proxy(moto.endpoint, Route(faults=faults)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        result = aggregate(round_, executor=executor)
    observed = total(result.usage)

    lost = observed.gets + observed.puts + observed.deletes - proxy.requests
    assert 0 <= lost <= len(faults)  # sent over a connection that a fault had closed: made, and never arrived
    assert observed.gets + observed.puts > plan.gets + plan.puts


def test_urls_count(ceph: Ceph, ceph_store: S3Store) -> None:
    """What a node reads by a signed URL counts as any other request."""
    ceph_store.put("a", [bytes(300_000)])
    source = UrlSource("a", readable(ceph_store, "a", 60))
    with ceph.server.counting() as seen, counting() as ledger:
        source.head("a")
        source.peek("a", 1_000)
        assert 300_000 == sum(memoryview(chunk).nbytes for chunk in source.get("a", 0, 300_000))

    assert Usage(gets=3, bytes_read=1 + 1_000 + 300_000) == ledger.spent["s3"]
    assert 3 == seen["gets"]


def test_a_failed_call_says_what_it_has_asked(ceph: Ceph, ceph_store: S3Store) -> None:
    """An error of a call has in it what the call has asked of stores in vain, its tasks' requests too."""
    round_ = submitted(ceph_store, {"a": ({"w": np.array([1, np.nan], "f4")}, 1), "b": ({"w": np.array([1, 2], "f4")}, 1)})
    for executor in (InlineExecutor(), ProcessExecutor(1)):
        with ceph.server.counting() as seen, pytest.raises(NonFinite) as caught:
            aggregate(round_, executor=executor)
        assert (seen["gets"], seen["puts"]) == (caught.value.usage["s3"].gets, caught.value.usage["s3"].puts)


@pytest.mark.parametrize("executor", ["inline", pytest.param("processes:1", marks=pytest.mark.slow)])
def test_attempts_of_flower_that_fail(moto: S3Server, moto_store: S3Store, executor: str) -> None:
    """Where a node's NaN makes a round be aggregated twice, the requests of both times are reported, as the server saw them."""
    app, found = ClientApp(mods=[upload_mod]), list[tuple[dict[str, int], RoundReport]]()

    @app.train()
    def _train(message: Message, context: Context) -> Message:  # noqa: ARG001
        arrays = ArrayRecord({"w": Array(np.full(5_000, np.nan, np.float32))})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1.0})}), reply_to=message)

    grid = LocalGrid({node: request_counts.client(node) for node in (1, 2, 3)} | {4: app})
    watched = request_counts.watched(GradSharding, moto, lambda seen, report: found.append((seen, report)))
    strategy = watched(FedAvg(fraction_evaluate=0.0), store=moto_store, executor=executor, shards=3)
    strategy.start(grid, ArrayRecord({"w": Array(np.ones(5_000, np.float32))}), num_rounds=1)
    ((seen, report),) = found
    counted, planned = request_counts.requests_of(report)

    assert [4] == [*report.left_out]
    assert (seen["gets"], seen["puts"]) == (counted.gets, counted.puts)
    assert counted.gets > planned.gets  # a plan is of a round in which nothing fails


@pytest.mark.parametrize("mode", ["direct", "relay"])
@pytest.mark.slow
def test_evaluation_is_told_too(moto: S3Server, moto_store: S3Store, mode: Any) -> None:
    """What evaluation asks, on the nodes and on the server, is in the report of the round before: with it, a whole run is told."""
    grid = grid_of(mods=() if mode == "relay" else (upload_mod,))
    strategy = sharding(moto_store, mode=mode)
    with moto.counting() as seen:
        strategy.start(grid, record(initial()), num_rounds=2, evaluate_fn=lambda _, arrays: MetricRecord({"n": len(arrays)}))

    first = {"gets": 1, "puts": 3}  # the store is tried out, the first model is written, and evaluated before there is a round
    for kind in ("gets", "puts"):
        told = [(getattr(one, kind), getattr(one, f"nodes_{kind}") or 0, getattr(one, f"evaluation_{kind}")) for one in strategy.history]
        assert seen[kind] == first[kind] + sum(map(sum, told)), told
    assert strategy.history[0].evaluation_gets


@pytest.mark.parametrize("presigned", [True, False])
@pytest.mark.slow
def test_nodes_that_fail_say_what_they_have_asked(moto: S3Server, moto_store: S3Store, presigned: bool) -> None:
    """What a node that fails has asked before is told in the report, of training and of evaluation; so is why it failed."""

    def failing(message: Message, context: Context, call_next: ClientAppCallable) -> Message:  # noqa: ARG001
        raise OSError(f"node {context.node_id}: no space left")

    strategy = sharding(moto_store, presigned=presigned)
    with moto.counting() as seen:
        strategy.start(grid_of({14: client(mods=(upload_mod, failing))}), record(initial()), num_rounds=2)

    for kind, first in (("gets", 0), ("puts", 3)):  # the store is tried out and the first model is written before there is a round
        told = [(getattr(one, kind), getattr(one, f"nodes_{kind}"), getattr(one, f"evaluation_{kind}")) for one in strategy.history]
        assert seen[kind] == first + sum(map(sum, told)), told
    reasons = {14: "it answered with an error: OSError: node 14: no space left"}
    assert [reasons] * 2 == [one.left_out for one in strategy.history]


def test_threads_that_fail_say_what_they_have_asked(tmp_path: Path) -> None:
    """Of tasks that run at once, one that fails is raised with what all of them have asked."""
    updates = {c: ({"w": np.full(4_000, value, "f4")}, 1) for c, value in (("a", np.nan), ("b", 1.0))}
    submitted(DirectoryStore(tmp_path), updates)
    store = CountingStore(DirectoryStore(tmp_path))
    with ThreadPoolExecutor(4) as pool, pytest.raises(NonFinite) as caught:
        aggregate(Round(store, "r"), topology=Sharded(shards=4), executor=FuturesExecutor(pool))

    usage = total(caught.value.usage)
    assert (store.gets + store.heads, store.puts + store.lists) == (usage.gets, usage.puts)


def test_threads_carry_the_ledger() -> None:
    """A function that is carried counts in the ledger that was open where it was handed over; one that is not counts nowhere."""

    def ask(_: int) -> None:
        count("s3", gets=1)

    with ThreadPoolExecutor(4) as pool, counting() as ledger:
        [*pool.map(carried(ask), range(50))]
        [*pool.map(ask, range(50))]
    count("s3", gets=1)

    assert {"s3": Usage(gets=50)} == ledger.spent
