"""Whatever the shards and the executor, the result has the bits of the plain mean; whatever dies, the round goes on."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gradsharding.advice.billing import bill_of
from gradsharding.errors import (
    ChangedObject,
    GradShardingError,
    MissingObject,
    NonFinite,
    ObjectExists,
    PlanTooLarge,
    StoreFailed,
    TaskFailed,
    TooFewClients,
    UserError,
)
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import TaskReport
from gradsharding.planning.topologies import Flat, LambdaFLTree, Sharded, Topology
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.records import PlanRecord
from gradsharding.rounds.result import Result
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, InlineExecutor
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import file_reference
from gradsharding.testing import CountingStore, FlakyStore, assert_same, read, reference_mean, sample_updates
from gradsharding.usage import total

SAMPLE = sample_updates(4, size=50)
SMALL = {client: ({"w": np.arange(6, dtype="f4") + i, "n": np.array(i)}, i + 1) for i, client in enumerate("abc")}


def submitted(store: ObjectStore, updates: Any, *, output: str | None = None) -> Round:
    """Create a round and submit all updates."""
    round_ = Round.create(store, "r", output=output)
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    return round_


def into(shards: int) -> Topology:
    """Cut into so many slices."""
    return Sharded(shards=shards)


@pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor(2)], ids=["inline", "processes"])
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 64])
def test_every_dtype(tmp_path: Path, executor: Executor, shards: int) -> None:
    """Every dtype, tensors of no dimension and of no elements: the bits are those of the reference."""
    result = aggregate(submitted(DirectoryStore(tmp_path), SAMPLE), topology=into(shards), executor=executor)

    assert_same(reference_mean(SAMPLE), result.arrays())
    assert shards == len(result.reports) == len(result.plan.tasks)


@pytest.mark.parametrize("shards", [1, 64, 3_000])
def test_many_tensors(shards: int) -> None:
    """A model of 3,000 tensors, of 0 to 3 elements, is one vector like any other."""
    draw = np.random.default_rng(0)
    updates = {c: ({f"layer.{i}": draw.normal(size=i % 4).astype("f4") for i in range(3_000)}, w) for c, w in (("a", 3), ("b", 4))}

    assert_same(reference_mean(updates), aggregate(submitted(MemoryStore(), updates), topology=into(shards)).arrays())


@pytest.mark.parametrize("weights", [(1, 2), (0.1, 0.7), (1e-9, 3e-9), (1 << 52, 1 << 52)])
def test_weights(weights: tuple[float, float]) -> None:
    """Whole weights give the bits of the reference; others come within the documented error of it."""
    updates = {c: ({"w": np.array(values)}, w) for c, values, w in zip("ab", ([1.0, 2.0], [3.0, 5.0]), weights, strict=True)}
    expected, actual = reference_mean(updates)["w"], aggregate(submitted(MemoryStore(), updates)).arrays()["w"]

    assert np.allclose(expected, actual, rtol=2.0**-28, atol=0)
    assert weights[0] < 1 or expected.tobytes() == actual.tobytes()


def test_one_client() -> None:
    """The mean of one update is that update, to the bit (but for the sign of zero)."""
    updates = {"a": SAMPLE["client-0"]}

    assert_same(reference_mean(updates), aggregate(submitted(MemoryStore(), updates)).arrays())


def test_order_of_arrival() -> None:
    """The order of arrival changes no bit."""
    digests = {aggregate(submitted(MemoryStore(), dict(order))).digest() for order in (SAMPLE.items(), reversed(SAMPLE.items()))}

    assert 1 == len(digests)


@pytest.mark.parametrize("arrays", [{}, {"a": np.zeros((0, 3), "f4")}, {"a": np.zeros((0, 3), "f4"), "b": np.zeros((2, 0), "u1")}])
def test_nothing_in_it(arrays: Any) -> None:
    """Updates without an element, or without a tensor, make a result that is so, too."""
    updates = {"a": (arrays, 1), "b": (arrays, 2)}

    assert_same(arrays, aggregate(submitted(MemoryStore(), updates)).arrays())


def test_the_library_reads_the_result(tmp_path: Path) -> None:
    """The result is a file that the safetensors library reads, wherever it is wanted."""
    output = tmp_path / "out" / "global model.safetensors"
    result = aggregate(submitted(MemoryStore(), SMALL, output=file_reference(output)), topology=into(3))

    assert_same(reference_mean(SMALL), safetensors.numpy.load_file(output))
    assert [output.name] == [path.name for path in output.parent.rglob("*") if path.is_file()]
    assert hashlib.sha256(output.read_bytes()[-32:]).hexdigest() == result.digest()


@pytest.mark.parametrize("asked", ["less memory", "other shards", "another topology"])
def test_done_round_asked_again(asked: str) -> None:
    """A round that is done gives its result, whatever is asked for now; the report has an earlier call's work, and projects nothing."""
    round_ = submitted(MemoryStore(), SMALL)
    first = aggregate(round_, topology=into(4))
    ways: dict[str, dict[str, Any]] = {
        "less memory": {"limits": Limits(memory="1MiB")},
        "other shards": {"topology": into(1)},
        "another topology": {"topology": LambdaFLTree()},
    }
    again = aggregate(Round(round_.store, "r"), **ways[asked])
    report = again.report()

    assert first.record == again.record
    assert_same(reference_mean(SMALL), again.arrays())
    assert ("an earlier call", None, None, []) == tuple(report[name] for name in ("made_by", "topology", "projected", "stages"))
    assert [first.report()[name] for name in ("rule", "clients", "bytes", "digest")] == [
        report[name] for name in ("rule", "clients", "bytes", "digest")
    ]
    # the result's record is read, the result looked at, and its header read
    assert (3, 0) == (again.asked["memory"].gets, again.asked["memory"].puts)
    assert None is bill_of(again)
    with pytest.raises(UserError, match="round r was done before this call, which has planned nothing"):
        _ = again.plan


def test_report() -> None:
    """A report sets what was planned beside what was seen: 12 reads of slices, 3 receipts, 3 records looked for, and so on."""
    report = aggregate(submitted(MemoryStore(), SMALL), topology=into(4)).report()

    assert ("this call", "sharded", 3, 32) == (report["made_by"], report["topology"], report["clients"], report["bytes"])
    projected, observed = report["projected"], report["observed"]
    # gets: 12 slices; is there a manifest, 3 receipts, a header; is there a result, a plan, an output; the digest
    # puts: a list of receipts, the manifest; the upload's begin, header, 4 slices, end; the plan's record and the result's
    assert (21, 11) == (observed["gets"], observed["puts"])
    assert (21, 11) == (projected["gets"], projected["puts"])
    assert 96 + 32 < observed["bytes_read"] <= projected["bytes_read"]
    assert 32 < observed["bytes_written"] <= projected["bytes_written"]
    assert {"memory": {k: observed[k] for k in ("gets", "puts", "deletes", "bytes_read", "bytes_written")}} == observed["stores"]
    assert (9, 7) == (observed["caller"]["memory"]["gets"], observed["caller"]["memory"]["puts"])
    assert [(3, 1)] * 4 == [(task["gets"], task["puts"]) for task in report["stages"][0]["tasks"]]
    assert (None, "it ran in the calling process") == (observed["peak_memory"], observed["unmeasured"])
    assert 4 == len(report["stages"][0]["tasks"])
    assert 64 == len(report["digest"])


def test_digest_is_counted_once_it_is_read() -> None:
    """A result's figures are those of the call, and of its digest from then on that it was asked for; it is read once."""
    result = aggregate(submitted(MemoryStore(), SMALL), topology=into(4))
    before = (result.plan.gets, total(result.usage).gets)
    for _ in range(2):
        assert 64 == len(result.digest())

    assert (20, 20) == before
    assert (21, 21) == (result.plan.gets, total(result.usage).gets)


def test_progress() -> None:
    """Progress hears of the plan first, then of each task."""
    heard: list[Plan | TaskReport] = []

    def progress(plan: Plan) -> Callable[[TaskReport], None]:
        heard.append(plan)
        return heard.append

    result = aggregate(submitted(MemoryStore(), SMALL), topology=into(3), progress=progress)
    assert [result.plan, *result.reports] == heard


def test_again() -> None:
    """A finished round is not run again: the same call gives the same result, and asks for no data."""
    store = MemoryStore()
    first = aggregate(submitted(store, SMALL))
    counting = CountingStore(store)
    again = aggregate(Round(counting, "r"))

    assert (first.record, ()) == (again.record, again.reports)
    assert (0, 0) == (counting.puts, counting.bytes_written)


@pytest.mark.parametrize("topology", ["sharded", Sharded, 7])
def test_not_a_topology(topology: Any) -> None:
    """A name, a class or anything else in the place of a topology is refused, with what to write."""
    with pytest.raises(UserError, match=r"is not a topology but of type \w+; use a value, such as Sharded\(\), or make_topology\(name\)"):
        aggregate(Round.create(MemoryStore(), "r"), topology=topology)


def test_refused_before_any_data() -> None:
    """A round that is too small, or a plan that is too large, reads no data and writes no part."""
    store = CountingStore(MemoryStore(), only=lambda key: "updates" in key or key.startswith("results/"))
    with pytest.raises(TooFewClients):
        aggregate(Round.create(store, "empty"))
    round_ = submitted(store, SMALL)
    puts, gets = store.puts, store.gets
    with pytest.raises(PlanTooLarge, match="allow more memory"):
        aggregate(round_, topology=Flat(), limits=Limits(memory=64 << 20))

    # headers at most: the first one is the layout's
    assert (puts, gets + 1) == (store.puts, store.gets)
    assert_same(reference_mean(SMALL), aggregate(round_, topology=Flat()).arrays())


@pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor(2)], ids=["inline", "processes"])
def test_nonfinite(tmp_path: Path, executor: Executor) -> None:
    """NaN in an update names client, tensor and index, and publishes nothing; "propagate" lets it pass."""
    updates = {c: ({"n": np.arange(5), "w": np.ones((2, 3), "f4")}, 1) for c in "abc"}
    updates["b"][0]["w"][1, 0] = -np.inf
    updates["c"][0]["w"][1, 1] = np.nan
    round_ = submitted(DirectoryStore(tmp_path), updates)
    with pytest.raises(NonFinite, match="clients b, c hold NaN or infinity") as caught:
        aggregate(round_, executor=executor)

    assert [["b", 52], ["c", 56]] == caught.value.details["found"]
    assert [("w", (1, 0)), ("w", (1, 1))] == [
        (t.name, i) for t, i in (round_.seal().layout.locate(b) for _, b in caught.value.details["found"])
    ]
    assert None is round_.result()

    passed = aggregate(round_, executor=executor, nonfinite="propagate").arrays()
    assert_same(reference_mean({c: ({"n": a["n"]}, w) for c, (a, w) in updates.items()}), {"n": passed["n"]})
    assert [[1, 1, 1], [-np.inf, "nan", 1]] == [[x if x == x else "nan" for x in row] for row in passed["w"].tolist()]  # noqa: PLR0124


def test_overflow() -> None:
    """Finite values whose sum is not are told from NaN in an update; the clients that are to blame are named, and no others."""
    updates = {c: ({"w": np.array([value])}, 1 << 50) for c, value in (("a", 1e308), ("b", 1e308), ("c", 1e290))}

    with pytest.raises(NonFinite, match="finite values overflow when summed, those of clients a, b; scale them down"):
        aggregate(submitted(MemoryStore(), updates))


@pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor(2)], ids=["inline", "processes"])
def test_all_lost_updates_at_once(tmp_path: Path, executor: Executor) -> None:
    """Of all clients whose updates are gone, or were written again, the first error says so; those that are well are not among them."""
    store = DirectoryStore(tmp_path)
    round_ = submitted(store, {f"c{i}": ({"w": np.ones(4, "f4")}, 1) for i in range(6)})
    round_.seal()
    store.delete([round_.update_key(client) for client in ("c1", "c4")])
    (tmp_path / round_.update_key("c3")).write_bytes(b"another")

    with pytest.raises((MissingObject, ChangedObject)) as caught:
        aggregate(round_, executor=executor)
    why = caught.value.details["clients"]
    assert ["c1", "c3", "c4"] == sorted(why)
    assert all(text.startswith(f"client {client}: ") for client, text in why.items())
    assert "written again" in why["c3"]
    assert "there is no object" in why["c1"]


@pytest.mark.parametrize("failure", [StoreFailed("asked for too much at once", code="SlowDown"), TaskFailed("killed", task="t")], ids=repr)
def test_no_client_is_blamed_for_the_store(failure: GradShardingError) -> None:
    """A store that fails as a client's update is read is no fault of that client's: nobody is named to be left out."""
    store = MemoryStore()
    round_ = submitted(store, {f"c{i}": ({"w": np.ones(4, "f4")}, 1) for i in range(3)})
    round_.seal()
    flaky = FlakyStore(store, {("before", "get", 5): failure})

    with pytest.raises(type(failure), match=failure.message) as caught:
        aggregate(Round(flaky, round_.id))
    assert "c0" == caught.value.details["client"]
    assert "clients" not in caught.value.details


def test_arrays_are_those_published(tmp_path: Path) -> None:
    """A result whose object was written again is not read as if it were the one that was published."""
    result = aggregate(submitted(DirectoryStore(tmp_path), SMALL))
    path = tmp_path / result.record.source
    path.write_bytes(path.read_bytes())

    with pytest.raises(ChangedObject, match="written again"):
        result.arrays()


def test_all_nonfinite_at_once() -> None:
    """Ten clients with NaN in ten slices are all named by the first attempt; the second one succeeds."""
    rows = {f"c{i:02d}": np.array([np.nan if i == j < 10 else 1.0 for j in range(16)], "f4") for i in range(16)}
    with pytest.raises(NonFinite) as caught:
        aggregate(submitted(MemoryStore(), {client: ({"w": row}, 1) for client, row in rows.items()}), topology=into(16))
    bad = {client for client, _ in caught.value.details["found"]}

    assert {f"c{i:02d}" for i in range(10)} == bad
    good = {client: ({"w": row}, 1) for client, row in rows.items() if client not in bad}
    assert_same({"w": np.ones(16, "f4")}, aggregate(submitted(MemoryStore(), good), topology=into(16)).arrays())


@pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor(2)], ids=["inline", "processes"])
def test_input_changes_after_the_seal(tmp_path: Path, executor: Executor) -> None:
    """An input that is replaced after the seal fails the round with its client's name; nothing is published."""
    store = DirectoryStore(tmp_path)
    round_ = submitted(store, SMALL)
    round_.seal()
    data = read(store, round_.update_key("b"))
    store.delete([round_.update_key("b")])

    with pytest.raises(MissingObject, match="client b: there is no object"):
        aggregate(round_, executor=executor)
    store.put(round_.update_key("b"), [data])
    with pytest.raises(ChangedObject, match=r"client b: .* is at version .* not .* as sealed") as caught:
        aggregate(round_, executor=executor)
    assert "b" == caught.value.details["client"]
    assert None is round_.result()
    assert "results/r.safetensors" not in dict(store.list(""))


def test_output_is_taken(tmp_path: Path) -> None:
    """An object in the place of the result stays, unless it may be replaced; nothing is read before that is found."""
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    round_ = submitted(MemoryStore(), SMALL, output=file_reference(output))
    with pytest.raises(ObjectExists, match=r"out\.safetensors is there already"):
        aggregate(round_)
    assert b"mine" == output.read_bytes()

    result = aggregate(round_, overwrite=True)
    assert 1 == len(result.reports)
    assert_same(reference_mean(SMALL), result.arrays())


def test_lost_result(tmp_path: Path) -> None:
    """A finished round whose result was removed since makes it again; one that was replaced is not taken for the result."""
    output = tmp_path / "out.safetensors"
    round_ = submitted(MemoryStore(), SMALL, output=file_reference(output))
    first = aggregate(round_).digest()
    output.unlink()
    again = aggregate(round_)
    assert 1 == len(again.reports)
    assert first == again.digest()

    output.unlink()
    output.write_bytes(b"another's")
    with pytest.raises(ObjectExists, match="is there already"):
        aggregate(round_)
    assert b"another's" == output.read_bytes()


def test_other_treatment_of_nan() -> None:
    """Parts that were written when NaN might pass are not taken for parts that were checked."""
    store = MemoryStore()
    round_ = Round.create(store, "r")
    round_.submit("ann", {"w": np.array([1, np.nan, 3, 4], "f4")}, 1)
    broken = Round(FlakyStore(store, {("before", "complete", 1): ConnectionError()}), "r")
    with pytest.raises(ConnectionError):
        aggregate(broken, topology=into(2), nonfinite="propagate")

    with pytest.raises(NonFinite):
        aggregate(round_, topology=into(2))
    assert None is round_.result()


def test_another_plan() -> None:
    """A round that could not be finished by one plan is finished by another; the first one's parts are gone."""
    store = MemoryStore()
    round_ = submitted(store, SMALL)
    broken = Round(FlakyStore(store, {("before", "put_part", 4): ConnectionError()}), "r")
    with pytest.raises(ConnectionError):
        aggregate(broken, topology=into(7))

    result = aggregate(round_, topology=into(2))
    assert ["sharded/0", "sharded/1"] == [report.task for report in result.reports]
    assert_same(reference_mean(SMALL), result.arrays())
    assert {} == store._uploads


WHOLE = aggregate(submitted(MemoryStore(), SMALL), topology=into(3))


def calls_of_a_whole_run() -> int:
    """Count the requests of a run in which nothing fails."""
    store = FlakyStore(submitted(MemoryStore(), SMALL).store, {})
    aggregate(Round(store, "r"), topology=into(3))
    return store.calls["any"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [MemoryStore, DirectoryStore])
def test_crash_at_every_call(tmp_path: Path, kind: Any, when: str) -> None:
    """A run that dies at any request goes on where it stopped: the same bits, and only what is missing is done again."""
    calls = calls_of_a_whole_run()
    assert 20 < calls

    for call in range(1, calls + 1):
        store = kind(*[tmp_path / str(call)] * (kind is DirectoryStore))
        submitted(store, SMALL)
        with pytest.raises(ConnectionError, match="died"):
            aggregate(Round(FlakyStore(store, {(when, "any", call): ConnectionError("died")}), "r"), topology=into(3))
        done = parts_done(store)
        resumed = aggregate(Round(store, "r"), topology=into(3))

        assert (call, WHOLE.digest()) == (call, resumed.digest())
        assert (call, [f"sharded/{i}" for i in range(3) if i + 2 not in done]) == (call, [report.task for report in resumed.reports])
        assert resumed.record == Round(store, "r").result()


def parts_done(store: ObjectStore) -> set[int]:
    """Tell which parts a dead run has left: all, if it had published the object."""
    if "results/r.safetensors" in dict(store.list("")):
        return {1, 2, 3, 4}
    if "rounds/r/plan.json" not in dict(store.list("")):
        return set()
    record = PlanRecord.model_validate_json(read(store, "rounds/r/plan.json"))
    return set(store.parts("results/r.safetensors", record.upload))


def test_lost_upload() -> None:
    """A round whose upload was aborted, by a lifecycle rule say, begins again."""
    store = MemoryStore()
    round_ = submitted(store, SMALL)
    upload, *_ = round_.begin(into(3).plan(round_.seal(), grain=store.grain, reading=store.reading))
    store.abort(round_.output, upload)

    result: Result = aggregate(round_, topology=into(3))
    assert 3 == len(result.reports)
    assert WHOLE.digest() == result.digest()


def test_two_calls_at_once(tmp_path: Path) -> None:
    """Two calls on one round at the same time both give the one result."""
    store = DirectoryStore(tmp_path)
    submitted(store, SMALL)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: aggregate(Round(store, "r"), topology=into(6)), range(2)))

    assert results[0].record == results[1].record
    assert_same(reference_mean(SMALL), results[1].arrays())


class Interrupted(MemoryStore):
    """Calls ``meanwhile`` once, when an upload has begun: another caller is faster then."""

    def __init__(self, meanwhile: Callable[[Round], object]) -> None:
        super().__init__()
        self._meanwhile = [meanwhile]

    def begin(self, key: str) -> str:
        """Begin an upload, and let the other caller begin one too."""
        upload = super().begin(key)
        if self._meanwhile:
            self._meanwhile.pop()(Round(self, "r"))
        return upload


class Killed(InlineExecutor):
    """Dies after two tasks."""

    def run(self, tasks: Any, *args: Any) -> Any:
        """Run two tasks, and die."""
        super().run(tasks[:2], *args)
        raise KeyboardInterrupt


@pytest.mark.parametrize("other", [{"rule": "mean"}, {"nonfinite": "propagate"}], ids=str)
def test_parts_of_two_plans_are_not_mixed(other: dict[str, Any]) -> None:
    """A call whose plan another call was about to record does not go on with that one's parts: they are by another rule, or unchecked."""

    def meanwhile(round_: Round) -> None:
        with pytest.raises(KeyboardInterrupt):
            aggregate(round_, topology=into(4), executor=Killed(), **{"rule": "trimmed-mean:0.34", **other})

    store = Interrupted(meanwhile)
    round_ = submitted(store, {client: ({"w": np.full(8, value, "f4")}, 1) for client, value in zip("abc", (1, 2, 30), strict=True)})
    result = aggregate(round_, topology=into(4), rule="trimmed-mean:0.34")

    assert [f"sharded/{i}" for i in range(4)] == [report.task for report in result.reports]
    assert [2] * 8 == result.arrays()["w"].tolist()
    assert {} == store._uploads


def test_result_of_another_rule_during_the_call() -> None:
    """A call during which another call finishes the round by another rule is refused: it does not return that one's result as its own."""

    class Late(InlineExecutor):
        def run(self, *args: Any) -> Any:
            aggregate(Round(store, "r"), topology=into(2), rule="exact-mean")
            return super().run(*args)

    store = MemoryStore()
    round_ = submitted(store, SMALL)
    with pytest.raises(UserError, match="round r is done, by the rule exact-mean; its result stays: for mean, create another round"):
        aggregate(round_, topology=into(2), executor=Late())

    assert "exact-mean" == str(aggregate(round_, rule="exact-mean").record.rule)


def test_result_is_written_in_one_line() -> None:
    """What a notebook shows of a result is its round, its rule, its clients and its bytes."""
    assert "Result(round='r', rule='mean', clients=3, nbytes=32)" == repr(aggregate(submitted(MemoryStore(), SMALL)))
