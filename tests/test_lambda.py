"""Tasks on Lambda: the real handler under the official runtime emulator, on Ceph, whatever goes wrong with an invocation."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import pytest

from gradsharding.advice import billing
from gradsharding.advice.cost import forecast
from gradsharding.advice.planner import Needs
from gradsharding.advice.prices import load_prices
from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule
from gradsharding.aws.functions.answers import VERDICTS, Do, Verdict
from gradsharding.aws.functions.call import answered, pack, unpack
from gradsharding.aws.functions.executor import LambdaExecutor, Settings
from gradsharding.aws.functions.tail import Metered, metered
from gradsharding.aws.s3.store import S3Store
from gradsharding.aws.smoke import bill_text
from gradsharding.cli.main import main
from gradsharding.errors import GradShardingError, NonFinite, OutOfMemory, PlanTooLarge, StoreRefused, TaskFailed, UserError
from gradsharding.planning.plan import Limits
from gradsharding.planning.platform import ACCOUNT_CONCURRENCY, PAYLOAD, RUNTIME
from gradsharding.planning.task import Job, Part, Task, Term
from gradsharding.planning.topologies import LambdaFLTree, Sharded, ShardedTree, Topology
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, open_executor
from gradsharding.running.pace import share
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import STREAM
from gradsharding.testing import ExecutorContract, assert_same, peak, read, reference_mean, sample_updates
from gradsharding.testing.executors import Started
from rigs.lambdas import HERE, Fault, LocalFunction, LocalLambda, Said, hold
from rigs.s3 import Ceph

MIB = 1 << 20
UNKNOWN = Settings(None, None, None, None, None)
RUNS_HERE = pytest.mark.usefixtures("emulator")

Start = Callable[..., LocalLambda]


@pytest.fixture
def start(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Give a way to start a function, to which the environment then leads."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> LocalLambda:
            function = LocalFunction(**{key: settings.pop(key) for key in LocalFunction.__dataclass_fields__ if key in settings})
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
    front = start(timeout=3 if fault == "timeout" else 60, concurrency=2, faults={1: fault, 2: fault, 4: fault})
    executor = LambdaExecutor("gradsharding", attempts=9)  # on a busy machine more may take longer than they should
    result = aggregate(_round(ceph_store, updates), topology=Sharded(shards=5), executor=executor)

    assert_same(reference_mean(updates), result.arrays())
    assert len(front.calls) >= (4 if fault != "twice" else 2)
    assert all(report.invocation and report.invocation.billed_seconds > 0 for report in result.reports)


@RUNS_HERE
@pytest.mark.parametrize("log_format", ["Text", "JSON"])
def test_figures(ceph_store: S3Store, start: Start, log_format: str) -> None:
    """A report says what the platform measured: a cold start first, warm ones after it, memory, and how many tasks went together."""
    start(concurrency=1, memory=512, log_format=log_format)
    result = aggregate(_round(ceph_store, sample_updates()), topology=Sharded(shards=3), executor=LambdaExecutor("gradsharding:live"))
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
    result = aggregate(_round(ceph_store, sample_updates()), topology=Sharded(shards=3), executor=LambdaExecutor("gradsharding"))
    told = {report.invocation.request: report.invocation for report in result.reports if report.invocation}
    cost, prices = billing.report(result)["cost"], load_prices()

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
@pytest.mark.parametrize("log_format", ["Text", "JSON"])
def test_failed_invocations_are_billed(ceph_store: S3Store, start: Start, tmp_path: Path, log_format: str) -> None:
    """Invocations that failed, with an answer or without, are billed as the others are, each of them once."""
    (tmp_path / "buggy.py").write_text(_BUGGY.replace("== 2", "== 1"))
    paths = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    front = start(
        concurrency=1, code=tmp_path, handler="buggy.handler", environment=paths, log_format=log_format, faults={2: "raise"}, memory=512
    )
    result = aggregate(_round(ceph_store, sample_updates()), topology=Sharded(shards=2), executor=LambdaExecutor("gradsharding"))

    assert ["Unhandled", "Unhandled", "200", "200"] == [call.outcome for call in front.calls]
    made = [found for call in front.calls if (found := metered(call.log))]
    assert [one.request for one in made] == [one.request for one in result.invocations]
    assert [2, 0] == [len(report.vain) for report in result.reports]
    cost = billing.bill_of(result)
    assert cost
    counts = {item.name: item.count for item in cost.aggregation.items}
    assert (Decimal(4), sum((Decimal(str(one.billed)) for one in made), Decimal()) / 2) == (counts["invocations"], counts["functions"])


@RUNS_HERE
def test_settings(start: Start) -> None:
    """Memory, time and concurrency are read from the account, and narrow what is allowed; who may not ask goes by defaults."""
    start(memory=256, timeout=7, concurrency=3)
    executor = LambdaExecutor("gradsharding")
    assert Settings(256 * MIB, 7, 3, 3, HERE) == executor.settings
    assert Limits(memory=256 * MIB - RUNTIME, concurrency=3) == executor.limits(None)
    assert Limits(memory=128 * MIB, concurrency=2) == LambdaExecutor("gradsharding", concurrency=2).limits(Limits(memory=128 * MIB))

    start(memory=256, tells=False)
    assert UNKNOWN == LambdaExecutor("gradsharding").settings
    assert Limits(concurrency=100) == LambdaExecutor("gradsharding").limits(None)


@RUNS_HERE
def test_refused_before_it_runs(ceph_store: S3Store, start: Start) -> None:
    """A plan that the function's memory or concurrency cannot carry is refused, with the remedy, and no invocation."""
    round_ = _round(ceph_store, {"a": ({"w": np.ones(16 * MIB, "f4")}, 1)})
    front = start(memory=256)
    with pytest.raises(PlanTooLarge, match=r"projects .* of 232.0 MiB allowed; use at least \d+ shards"):
        aggregate(round_, topology=Sharded(shards=1), executor=LambdaExecutor("gradsharding"))
    stopped = start(concurrency=0)
    with pytest.raises(PlanTooLarge, match="no function may run: the concurrency is 0"):
        aggregate(round_, executor=LambdaExecutor("gradsharding"))
    assert [] == front.calls == stopped.calls


@RUNS_HERE
def test_no_such_function(ceph_store: S3Store, start: Start) -> None:
    """A function that is not there is named, with the command that puts one up."""
    start()
    round_ = _round(ceph_store, sample_updates())
    for name, command in {
        "other": "gradsharding deploy --name other",
        "gradsharding:gone": "gradsharding deploy",
        "arn:aws:lambda:us-east-1:123456789012:function:other:live": "gradsharding deploy --name other",
    }.items():
        said = re.escape(f"there is no function {name!r} in this account and region; deploy it with: {command}")
        with pytest.raises(StoreRefused, match=f"^{said}$"):
            aggregate(round_, executor=LambdaExecutor(name))
    elsewhere = "arn:aws:lambda:eu-west-1:123456789012:function:other"
    said = f"^function '{elsewhere}' is in eu-west-1, and the region set here is us-east-1; set AWS_DEFAULT_REGION to eu-west-1$"
    with pytest.raises(StoreRefused, match=said):
        aggregate(round_, executor=LambdaExecutor(elsewhere))


def test_no_name() -> None:
    """What can name no function is refused before anything is asked."""
    with pytest.raises(
        UserError, match=r"^'a b' is not the name of a Lambda function; give its name, NAME:ALIAS, NAME:VERSION or its ARN$"
    ):
        open_executor("lambda:a b")


@RUNS_HERE
@pytest.mark.parametrize("name", ["gradsharding:live", "123456789012:function:gradsharding:live"])
def test_qualifiers(start: Start, name: str) -> None:
    """A version or an alias has its own memory and time; its concurrency is the function's."""
    start(memory=256, timeout=7, concurrency=3)
    assert Settings(256 * MIB, 7, 3, 3, HERE, "1") == LambdaExecutor(name).settings


@RUNS_HERE
def test_alias_is_looked_up_once(ceph_store: S3Store, start: Start) -> None:
    """All tasks run on the version that an alias leads to at first, also if it is moved meanwhile."""
    updates = sample_updates()
    front = start(concurrency=2)
    executor = open_executor("lambda:arn:aws:lambda:us-east-1:123456789012:function:gradsharding:live")
    assert executor.limits(None).concurrency == 2
    front.aliases.update(live="2", old="1")
    assert_same(reference_mean(updates), aggregate(_round(ceph_store, updates), executor=executor).arrays())
    assert {"1"} == {call.qualifier for call in front.calls}


@RUNS_HERE
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gradsharding:live", "version 1 of gradsharding, to which gradsharding:live pointed when this run began, is gone: .*"),
        ("gradsharding:1", "there is no function 'gradsharding:1' in this account and region; deploy it with: gradsharding deploy"),
    ],
)
def test_version_is_gone(ceph_store: S3Store, start: Start, name: str, said: str) -> None:
    """A version that goes away during a run is named; an alias that led to it is not said to be missing."""
    front = start(concurrency=2)
    executor = LambdaExecutor(name)
    assert executor.settings.version == "1"
    front.aliases.update(live="2")
    with pytest.raises(StoreRefused, match=f"^{said}$"):
        aggregate(_round(ceph_store, sample_updates()), executor=executor)


@pytest.mark.parametrize(
    ("reserved", "unreserved", "asked", "at_once", "said"),
    [
        (None, 100, None, 50, "50 of 100 unreserved invocations at once; the rest is left to others (--concurrency N, or "),
        (None, 100, 70, 70, "70 of 100 unreserved invocations at once; the rest is left to others (--concurrency N, or "),
        (None, 100, 300, 100, "100 of 100 unreserved invocations at once"),
        (None, 1, None, 1, "1 of 1 unreserved invocations at once"),
        (None, 0, None, 0, "0 of 0 unreserved invocations at once"),
        (20, 100, None, 20, "20 of 20 invocations at once that are reserved for f"),
        (20, 100, 30, 20, "20 of 20 invocations at once that are reserved for f"),
        (0, 100, None, 0, "0 of 0 invocations at once that are reserved for f"),
        (None, None, None, 100, "100 invocations at once; these credentials may not read how many the account has"),
        (None, None, 300, 300, "300 invocations at once; these credentials may not read how many the account has"),
    ],
)
def test_invocations_at_once(
    monkeypatch: pytest.MonkeyPatch, reserved: int | None, unreserved: int | None, asked: int | None, at_once: int, said: str
) -> None:
    """A run takes what is reserved for the function, else half of what the account has left, else the number it is told; and says so."""
    monkeypatch.setattr(LambdaExecutor, "settings", Settings(None, None, reserved, unreserved, None))
    executor = LambdaExecutor("f:live", concurrency=asked)
    limits = executor.limits(None)
    assert Limits(concurrency=at_once) == limits == executor.limits(limits)
    assert Limits(concurrency=at_once) == LambdaExecutor("f").limits(Limits(concurrency=asked))
    told = executor.taken(limits)
    assert told.startswith(said)
    assert told == said or said.endswith("or ")


@RUNS_HERE
def test_taken(ceph_store: S3Store, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary and the report say how many of the account's invocations a run took; its forecast goes by the same number."""
    round_, half = _round(ceph_store, sample_updates()), "2 of 4 unreserved invocations at once; the rest is left to others"
    start(concurrency=4, reserved=False)
    result = aggregate(round_, topology=Sharded(shards=4), executor=LambdaExecutor("gradsharding"))
    report = billing.report(result)
    assert (2, True) == (report["concurrency"], str(report["taken"]).startswith(half))
    expected = forecast(result.plan, load_prices(), 512 * MIB, architecture=HERE, concurrency=2).cost
    assert f"{expected.aggregation.usd:f}" == report["cost"]["aggregation"]["projected"]

    update = f"{ceph_store.url}/{round_.update_key('client-0')}"
    command = ["aggregate", update, "-o", f"{ceph_store.url}/mean.safetensors", "--executor", "lambda:gradsharding:live"]
    assert main([*command, "--concurrency", "3"]) == 0
    assert "concurrency 3 of 4 unreserved invocations at once; the rest is left to others" in " ".join(capsys.readouterr().out.split())


def test_concurrency_of_processes() -> None:
    """A concurrency is refused beside an executor that counts otherwise."""
    assert main(["aggregate", __file__, "-o", "x", "--executor", "processes", "--concurrency", "3"]) == 2
    with pytest.raises(UserError, match=r"^a concurrency of 3 applies to lambda:FUNCTION, not to inline; use processes:3$"):
        open_executor("inline", concurrency=3)


@RUNS_HERE
@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("timeout", r"Task timed out after 1.00 seconds; use more shards, or give the function more time.* \(3 times\)"),
        ("kill", r"(signal: killed|without providing a reason); it may have exceeded its memory: use more shards.* \(3 times\)"),
        ("raise", r"see its log in CloudWatch \(3 times\)"),
        ("error", r"Lambda answered ServiceException; run it again \(3 times\)"),
        ("lost", r"its answer was lost .* \(3 times\)"),
    ],
)
def test_gives_up(ceph_store: S3Store, start: Start, fault: str, advice: str) -> None:
    """A task that fails three times ends the round with its name and advice; nothing is published, and the round can go on."""
    updates = sample_updates()
    start(timeout=1 if fault == "timeout" else 60, faults=dict.fromkeys(range(1, 40), fault))
    round_ = _round(ceph_store, updates)
    with pytest.raises(TaskFailed, match=rf"task sharded/\d failed: .*{advice}"):
        aggregate(round_, topology=Sharded(shards=2), executor=LambdaExecutor("gradsharding"))
    assert round_.result() is None

    start()
    assert_same(reference_mean(updates), aggregate(round_, executor=LambdaExecutor("gradsharding")).arrays())


@RUNS_HERE
def test_throttled_for_too_long(ceph_store: S3Store, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that get no turn for a quarter of an hour end the round, and it says what takes their place."""
    monkeypatch.setattr("gradsharding.aws.functions.invocations.TURN_PATIENCE", 0.2)
    start(faults=dict.fromkeys(range(1, 99), "throttle"))
    with pytest.raises(TaskFailed, match=r"waited .* s for its turn: other work uses the account's concurrency"):
        aggregate(_round(ceph_store, sample_updates()), executor=LambdaExecutor("gradsharding"))


@RUNS_HERE
def test_each_turn_has_its_patience(ceph_store: S3Store, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one task waited for its turn is not counted against the next task."""
    monkeypatch.setattr("gradsharding.aws.functions.invocations._pause", lambda _: 600.0)
    updates = sample_updates()
    front = start(concurrency=1, faults={1: "raise", 2: "throttle", 4: "throttle"})  # after a failure, tasks go one by one
    result = aggregate(_round(ceph_store, updates), topology=Sharded(shards=2), executor=LambdaExecutor("gradsharding"))
    assert_same(reference_mean(updates), result.arrays())
    assert ["Unhandled", "429", "200", "429", "200"] == [call.outcome for call in front.calls]


@RUNS_HERE
def test_updated_meanwhile(ceph_store: S3Store, start: Start) -> None:
    """While the function is being updated, tasks wait, and count no failure."""
    updates = sample_updates()
    busy = Said(409, "ResourceConflictException", "An update is in progress for resource")
    front = start(concurrency=1, faults=dict.fromkeys(range(1, 4), busy))
    result = aggregate(_round(ceph_store, updates), topology=Sharded(shards=2), executor=LambdaExecutor("gradsharding"))
    assert_same(reference_mean(updates), result.arrays())
    assert ["409"] * 3 + ["200"] == [call.outcome for call in front.calls]


def _of_model() -> dict[str, int]:
    """Names of all exceptions that Invoke may raise, by botocore's model of the API, and their HTTP status."""
    shapes = botocore.session.get_session().get_service_model("lambda").operation_model("Invoke").error_shapes
    return {shape.name: int(shape.metadata["error"]["httpStatusCode"]) for shape in shapes}


@pytest.fixture(scope="module")
def told() -> Iterator[LocalLambda]:
    """Give a front that runs nothing."""
    with LocalLambda(LocalFunction()) as front:
        yield front


def _end_of(said: Said | Fault, front: LocalLambda, monkeypatch: pytest.MonkeyPatch, **settings: str) -> tuple[GradShardingError, int]:
    """Give what a task raises if Lambda says this whenever it is asked, and how often it was; waiting takes no time."""
    monkeypatch.setattr("gradsharding.aws.functions.invocations.TURN_PATIENCE", -1.0)
    monkeypatch.setattr(LambdaExecutor, "settings", UNKNOWN)
    account = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**account, **front.environment(), **settings}.items():
        monkeypatch.setenv(name, value)
    (job, task), before = _call(1), len(front.calls)
    front.faults.update(dict.fromkeys(range(before + 1, before + 9), said))
    with pytest.raises(GradShardingError) as caught:
        LambdaExecutor("gradsharding", attempts=2).run([task], job, MemoryStore(), Limits(), lambda _: None)
    return caught.value, len(front.calls) - before


@pytest.mark.parametrize(("kind", "status"), sorted(_of_model().items()))
def test_all_that_lambda_says(told: LocalLambda, monkeypatch: pytest.MonkeyPatch, kind: str, status: int) -> None:
    """Each exception of Lambda's API is waited for, tried again, or refused with the remedy; a new one must be given its row."""
    error, asked = _end_of(Said(status, kind), told, monkeypatch)
    match VERDICTS[kind]:
        case Verdict(Do.WAIT, why):
            assert re.fullmatch(rf"task t/2 waited 0 s for its turn: {re.escape(why)}", error.message)
            assert 1 == asked
        case Verdict(Do.AGAIN, why):
            assert (f"task t/2 failed: Lambda answered {kind}; run it again (2 times)", "") == (error.message, why)
            assert 2 == asked
        case Verdict(Do.REFUSE, why):
            absent = "there is no function 'gradsharding' in this account and region; deploy it with: gradsharding deploy"
            refused = f"invocation of function gradsharding: {why} ({kind})"
            assert (absent if kind == "ResourceNotFoundException" else refused) == error.message
            assert isinstance(error, StoreRefused)
            assert 1 == asked


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Said(400, "ThrottlingException"), "waited 0 s for its turn: requests exceed the account's rate"),
        (
            Said(502, "KMSAccessDeniedException", "KMS Exception: ThrottlingException"),
            "waited 0 s for its turn: requests exceed the account's rate",
        ),
        (Said(502, "KMSAccessDeniedException", "KMS Exception: AccessDeniedException"), "allow it kms:Decrypt"),
        (Said(409, "ResourceConflictException", "The function is currently in the following state: Pending"), "being created or updated"),
        (Said(409, "ResourceConflictException", "The function is currently in the following state: Failed"), "could not be created"),
        (
            Said(429, "TooManyRequestsException", reason="ReservedFunctionConcurrentInvocationLimitExceeded"),
            "other work uses the function's reserved concurrency",
        ),
        (Said(503, "SomethingNewException"), "Lambda answered SomethingNewException; run it again (2 times)"),
        (Said(403, "AccessDeniedException"), "access is denied"),
    ],
)
def test_what_lambda_adds(told: LocalLambda, monkeypatch: pytest.MonkeyPatch, said: Said, message: str) -> None:
    """What an exception's text and reason say of it decides, too; of others, the status does."""
    assert message in _end_of(said, told, monkeypatch)[0].message


def test_lost_answer_keeps_secrets(told: LocalLambda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in the endpoint's address is not in what is said of an answer that was lost."""
    named = told.endpoint.replace("http://", "http://user:pass1234@")
    error, _ = _end_of("lost", told, monkeypatch, AWS_ENDPOINT_URL_LAMBDA=named)
    assert re.match(r"task t/2 failed: its answer was lost \(.*//…@127\.0\.0\.1.*\); run it again \(2 times\)$", error.message)
    assert "pass1234" not in error.message


def test_what_functions_cannot_reach(ceph_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store, an update or an output on this machine is refused by name."""
    monkeypatch.setattr(LambdaExecutor, "settings", UNKNOWN)
    with pytest.raises(UserError, match=r"file://.* cannot be reached by Lambda functions; use an s3:// store"):
        aggregate(_round(DirectoryStore(tmp_path), sample_updates()), executor=LambdaExecutor("gradsharding"))
    round_ = Round.create(ceph_store, "r2")
    round_.refer("a", f"{DirectoryStore(tmp_path).url}/rounds/r/updates/client-0.safetensors", 1)
    with pytest.raises(UserError, match=r"updates cannot be reached|client-0.safetensors cannot be reached"):
        aggregate(round_, executor=LambdaExecutor("gradsharding"))


def test_plans_take_what_rounds_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unasked, ``plan`` reckons with as many invocations at once as a round takes in an account that has what AWS gives to each."""
    monkeypatch.setattr(LambdaExecutor, "settings", Settings(None, None, None, ACCOUNT_CONCURRENCY, None))

    assert LambdaExecutor("gradsharding").limits(None).concurrency == Needs().concurrency


def _call(clients: int) -> tuple[Job, Task]:
    terms = (Term(client=f"client-{i}", source=f"rounds/r/updates/client-{i}", version='"x"', base=8, weight=1) for i in range(clients))
    task = Task(id="t/2", start=0, stop=0, runs=(), first=0, last=clients, clients=clients, weight=clients, part=Part(2, 8), reading=STREAM)
    return Job(store="s3://bucket", output="o", upload="u", terms=tuple(terms)), task


def test_call() -> None:
    """An invocation's event reads back as what was written; updates that tasks share are written once."""
    job, task = _call(1000)
    twin = task.model_copy(update={"id": "t/3", "part": Part(3, 8)})
    event = pack(job, [task, twin])

    assert (job, (task, twin), None) == unpack(json.loads(event))
    assert len(event) < 1.1 * len(pack(job, [task]))
    half = task.model_copy(update={"first": 500})
    assert (job.narrowed([half]), (half,), share(7)) == unpack(json.loads(pack(job, [half], share(7))))
    assert len(pack(job, [half])) < 0.6 * len(event)


def test_call_too_large() -> None:
    """More updates than an event can name are refused with the numbers."""
    job, task = _call(80_000)
    with pytest.raises(PlanTooLarge, match=rf"1 tasks of 80000 inputs takes \d+ bytes; Lambda accepts {PAYLOAD}"):
        pack(job, [task])


def test_call_of_another_release() -> None:
    """A function of another release says so, and what to do."""
    event = {"release": "0.0.1", "job": {}, "tasks": []}
    with pytest.raises(UserError, match=r"the caller 0\.0\.1; to update it, run: gradsharding deploy --name other$"):
        unpack(event, "other")


_BUGGY = """
from gradsharding.running import worker

real, asked = worker.run_alone, []


def run_alone(task, job, store):
    asked.append(task.id)
    if len(asked) == 2:
        raise KeyError("at https://bucket.example/key?X-Amz-Signature=0a1b, by AKIAIOSFODNN7EXAMPLE")
    return real(task, job, store)


worker.run_alone = run_alone
from gradsharding.aws.functions.handler import handler
"""


def _lines(log: str) -> list[dict[str, Any]]:
    """Give our own lines of a log."""
    objects = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in objects if line.get("service") == "gradsharding"]


@RUNS_HERE
@pytest.mark.parametrize("log_format", ["Text", "JSON"])
def test_faults_are_counted(ceph_store: S3Store, start: Start, tmp_path: Path, log_format: str) -> None:
    """A bug counts among the function's errors, is in its log with its place and without secrets, and loses no report of other tasks."""
    (tmp_path / "buggy.py").write_text(_BUGGY)
    paths, updates = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}, sample_updates()
    front = start(concurrency=1, code=tmp_path, handler="buggy.handler", environment=paths, log_format=log_format)
    result = aggregate(_round(ceph_store, updates), topology=Sharded(shards=3), executor=LambdaExecutor("gradsharding"))
    assert_same(reference_mean(updates), result.arrays())
    failed, good = front.calls
    assert ("Unhandled", "200") == (failed.outcome, good.outcome)
    assert [failed.log.count(one.invocation.request) > 0 for one in result.reports if one.invocation] == [True, False, False]
    assert [0, 0, 0] == [one.lost for one in result.reports]

    [error], [done] = _lines(failed.log), _lines(good.log)
    assert ("ERROR", "sharded/1", "r", True, "KeyError") == tuple(
        error[key] for key in ("level", "task", "round", "cold_start", "exception_name")
    )
    assert "in run_alone" in error["exception"]
    assert ("INFO", "2 of 2 tasks done", ["sharded/1", "sharded/2"], False) == tuple(
        done[key] for key in ("level", "message", "tasks", "cold_start")
    )
    for line in (error, done):
        assert {"timestamp", "location", "function_name", "function_memory_size", "function_arn", "function_request_id"} <= line.keys()
        assert ("gradsharding", 512) == (line["function_name"], line["function_memory_size"])
    assert not re.search("0a1b|AKIA", failed.log)


@RUNS_HERE
def test_refusals_are_counted(ceph_store: S3Store, start: Start) -> None:
    """A function that its store refuses counts among the function's errors, and the caller hears why."""
    front = start(concurrency=1, environment={"AWS_ACCESS_KEY_ID": "nobody"})
    with pytest.raises(StoreRefused, match="there is no such access key"):
        aggregate(_round(ceph_store, sample_updates()), executor=LambdaExecutor("gradsharding"))
    [call] = front.calls
    assert "Unhandled" == call.outcome
    assert [("ERROR", "StoreRefused")] == [(line["level"], line["error"]) for line in _lines(call.log)]


@RUNS_HERE
def test_bad_updates_are_not(ceph_store: S3Store, start: Start) -> None:
    """An update that holds NaN is a warning in the log, and no error of the function's."""
    front = start(concurrency=1)
    with pytest.raises(NonFinite, match="clients bad hold NaN"):
        aggregate(_round(ceph_store, {"bad": ({"w": np.array([np.nan], "f4")}, 1)}), executor=LambdaExecutor("gradsharding"))
    [call] = front.calls
    assert "200" == call.outcome
    assert [("WARNING", "NonFinite")] == [(line["level"], line["error"]) for line in _lines(call.log)]


@RUNS_HERE
def test_foreign_function(ceph_store: S3Store, start: Start, tmp_path: Path) -> None:
    """A function that is not ours is told apart from one that fails, by what it answers."""
    (tmp_path / "foreign.py").write_text("def handler(event, context):\n    return {'statusCode': 200}\n")
    front = start(concurrency=1, code=tmp_path, handler="foreign.handler")
    said = r"^function gradsharding does not run gradsharding's code: it answered b'{\"statusCode\": ?200}'; name another function$"
    with pytest.raises(UserError, match=said):
        aggregate(_round(ceph_store, sample_updates()), executor=LambdaExecutor("gradsharding"))
    assert 1 == len(front.calls)


def test_cut_fault() -> None:
    """Of a fault whose text was cut on the way, the error is taken as any other of the function's."""
    cut = {"errorType": "Fault", "errorMessage": '{"error": "StoreFailed", "mess'}
    assert answered(json.dumps(cut).encode(), error=True) is None


_REQUEST = "6d68ca91-49c9-448d-89b8-7ca3e6dc66aa"
_MEASURED = Metered(_REQUEST, 0.694, 128 * MIB, 84 * MIB, 397.68 / 1000)
"""The platform's example at https://docs.aws.amazon.com/lambda/latest/dg/telemetry-schema-reference.html#platform-report."""

_METRICS = {"billedDurationMs": 694, "durationMs": 693.92, "initDurationMs": 397.68, "maxMemoryUsedMB": 84, "memorySizeMB": 128}
_EVENT = {"time": "2022-10-12T00:01:15.000Z", "type": "platform.report", "record": {"metrics": _METRICS, "requestId": _REQUEST}}
_JSON = f'a task\'s {{"type"\n{json.dumps(_EVENT)}\n'
_TEXT = (
    f"END RequestId: {_REQUEST}\nREPORT RequestId: {_REQUEST}\tDuration: 693.92 ms\tBilled Duration: 694 ms\tMemory Size: 128 MB\t"
    "Max Memory Used: 84 MB\tInit Duration: 397.68 ms\t\nXRAY TraceId: 1-5759e988\tSegmentId: 07f99ef3\tSampled: true\n"
)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (_JSON, _MEASURED),
        (_TEXT, _MEASURED),
        ('{"type":"platform.report","record":{"metrics":{}}}\n[1]\n{"type": "function"}\nREPORT\n', None),
        ("", None),
    ],
)
def test_metered(log: str, expected: Metered | None) -> None:
    """What was billed is read from a log of either format, whatever else is in it."""
    assert expected == metered(log)


@RUNS_HERE
@pytest.mark.parametrize("rule", [MEAN, ExactMean()], ids=str)
def test_one_digest(ceph_store: S3Store, start: Start, tmp_path: Path, rule: Rule) -> None:
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
    trees: list[Topology] = [Sharded(shards=3)] * 3 if rule == MEAN else [Sharded(), LambdaFLTree(), ShardedTree()]
    results = [
        aggregate(_round(store, updates), topology=topology, rule=rule, limits=Limits(memory=600 << 20), executor=executor)
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
        OutOfMemory, match=r"task sharded/0 exceeded .* Lambda ended it at 160.0 MiB; use more shards, or give the function more"
    ):
        aggregate(round_, topology=Sharded(shards=1), executor=LambdaExecutor("gradsharding"))
    assert ["Unhandled"] == [call.outcome for call in front.calls]

    result = aggregate(round_, topology=Sharded(shards=16), executor=LambdaExecutor("gradsharding"))
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
