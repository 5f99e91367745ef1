"""Faults: the log names the node, the mean of the others is exact, and the run goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import FedAdam, FedAvg

from flower_federation import (
    NODES,
    Train,
    averaged,
    client,
    grid_of,
    initial,
    raising,
    record,
    reply,
    sharding,
    state_of,
    train,
    trained,
    weight_of,
)
from gradsharding import DirectoryStore, InlineExecutor, MemoryStore, ObjectStore
from gradsharding.errors import PlanTooLarge, TaskFailed, UserError
from gradsharding.planning.plan import Limits
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.running.executors import Progress
from gradsharding.testing import assert_same
from gradsharding_flower import from_state_dict, upload_mod
from gradsharding_flower.reference import KEY, STYPE, Reference, client_id, find_reference, write_arrays
from rigs.opens import opens

BAD, GOOD = 3, (1, 2, 14)


def lines(log: pytest.LogCaptureFixture, level: str = "WARNING") -> list[str]:
    """Give the log's lines of one level."""
    return [line.getMessage() for line in log.records if line.levelname == level]


def with_state(**changes: Any) -> Train:
    """Make a client that answers other arrays under some names; None removes a name."""

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        state = {**trained(node, server_round, state_of(arrays)), **changes}
        return reply({name: array for name, array in state.items() if array is not None}, weight_of(node))

    return answer


def with_value(name: str, index: tuple[int, ...], value: float) -> Train:
    """Make a client one of whose numbers is ``value``."""

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        state = trained(node, server_round, state_of(arrays))
        state[name][index] = value
        return reply(state, weight_of(node))

    return answer


def with_weight(weight: Any) -> Train:
    """Make a client that claims ``weight``."""
    return lambda node, server_round, arrays: reply(trained(node, server_round, state_of(arrays)), weight)


def with_records(change: Callable[[RecordDict], object]) -> Train:
    """Make a client whose reply is changed at last."""

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        change(content := train(node, server_round, arrays))
        return content

    return answer


FAULTS: dict[str, tuple[Train, list[str]]] = {
    "dtype": (with_state(b=np.zeros((3, 4), np.float64)), ["tensor 'b'", "F32[3, 4]", "F64[3, 4]"]),
    "shape": (with_state(b=np.zeros((4, 3), np.float32)), ["tensor 'b'", "F32[3, 4]", "F32[4, 3]"]),
    "broadcast": (with_state(b=np.zeros((1, 4), np.float32)), ["tensor 'b'", "F32[3, 4]", "F32[1, 4]"]),
    "longer": (with_state(a=np.zeros(8, np.float32)), ["tensor 'a'", "F32[7]", "F32[8]"]),
    "missing tensor": (with_state(a=None), ["tensor 'a'", "absent"]),
    "extra tensor": (with_state(z=np.zeros(1, np.float32)), ["tensor 'z'", "absent"]),
    "unsupported dtype": (with_state(b=np.zeros((3, 4), np.complex64)), ["tensor 'b'", "complex64"]),
    "zero weight": (with_weight(0), ["weight 0"]),
    "NaN weight": (with_weight(float("nan")), ["weight nan"]),
    "negative weight": (with_weight(-1), ["weight -1"]),
    "infinite weight": (with_weight(float("inf")), ["weight inf"]),
    "huge weight": (with_weight(2**53 + 2), ["weight 9007199254740994"]),
    "list weight": (with_weight([1, 2]), ["'num-examples' is [1, 2]"]),
    "missing weight": (with_records(lambda content: content.metric_records["metrics"].pop("num-examples")), ["'num-examples' is None"]),
    "NaN": (with_value("b", (1, 2), float("nan")), ["tensor 'b' holds NaN or infinity at [1, 2]"]),
    "infinity": (with_value("a", (6,), float("-inf")), ["tensor 'a' holds NaN or infinity at [6]"]),
    "error": (raising, ["OSError: node 3: no space left"]),
    "two array records": (with_records(lambda content: content.update({"more": record(initial())})), ["2 ArrayRecords"]),
    "no array record": (with_records(lambda content: content.pop("arrays")), ["0 ArrayRecords"]),
    "two metric records": (with_records(lambda content: content.update({"more": MetricRecord({"x": 1})})), ["2 MetricRecords"]),
    "no metric record": (with_records(lambda content: content.pop("metrics")), ["0 MetricRecords"]),
}


@pytest.mark.parametrize("mode", ["direct", "relay"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_client_is_left_out(fault: str, mode: Any, flower_log: pytest.LogCaptureFixture) -> None:
    """One client's fault is one line of the log that names it; the mean is that of the others, to the bit."""
    answer, words = FAULTS[fault]
    mods = [upload_mod] if mode == "direct" else []
    strategy = sharding(MemoryStore(), mode=mode)
    result = strategy.start(grid_of({BAD: client(answer, mods)}, mods=mods), record(initial()), num_rounds=1)
    [line] = lines(flower_log)
    assert line.startswith(f"aggregate_train: node {BAD} is left out of round 1: ")
    assert [] == [word for word in words if word not in line]
    assert [] == lines(flower_log, "ERROR")
    assert [BAD] == list(strategy.history[0].left_out)
    assert GOOD == strategy.history[0].clients
    assert line.endswith(strategy.history[0].left_out[BAD])
    assert_same(averaged(GOOD, 1, initial()), state_of(result.arrays))


Change = Callable[[ObjectStore, Reference, RecordDict], object]
"""What befalls a receipt, in its reply, or its object, in the store."""


def after_upload(store: ObjectStore, change: Change) -> Sequence[Mod]:
    """Make the mods of a client to whose receipt ``change`` happens once it has uploaded."""

    def tamper(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        answer = call_next(message, context)
        if reference := next(map(find_reference, answer.content.array_records.values()), None):
            change(store, reference, answer.content)
        return answer

    return [tamper, upload_mod]


def point_at(**changes: Any) -> Change:
    """Change fields of the receipt."""
    return lambda _, reference, content: content.update({"arrays": reference.model_copy(update=changes).record()})


def point_at_another(store: ObjectStore, reference: Reference, content: RecordDict) -> None:
    """Claim the update of node 1."""
    point_at(source=reference.source.replace(client_id(BAD), client_id(1)))(store, reference, content)


def replaced_by(data: bytes) -> Change:
    """Replace the receipt's JSON."""
    return lambda _, __, content: content.update({"arrays": ArrayRecord({KEY: Array("reference", (), STYPE, data)})})


def deleted(store: ObjectStore, reference: Reference, _: RecordDict) -> None:
    """Delete the object."""
    store.delete([reference.source])


def altered(store: ObjectStore, reference: Reference, _: RecordDict) -> None:
    """Write the object again, with other values of the same layout."""
    store.delete([reference.source])
    write_arrays(reference.source, record(initial()), store)


def garbage(store: ObjectStore, reference: Reference, content: RecordDict) -> None:
    """Put what is no model in the object's place, and pin that."""
    store.delete([reference.source])
    point_at(version=store.put(reference.source, [b"no model at all"]).version)(store, reference, content)


RECEIPTS: dict[str, tuple[Change, list[str]]] = {
    "deleted": (deleted, ["there is no object 'rounds/", f"{client_id(BAD)}.safetensors'"]),
    "altered": (altered, ["is at version", "its receipt for"]),
    "garbage": (garbage, [f"{client_id(BAD)}.safetensors: ", "safetensors"]),
    "another version": (point_at(version="1"), ["its receipt for '1'"]),
    "another's key": (
        point_at_another,
        [f"updates/{client_id(1)}.safetensors', not for", "own key", f"updates/{client_id(BAD)}.safetensors"],
    ),
    "passwords": (point_at(source="file:///etc/passwd"), ["its receipt is for 'file:///etc/passwd', not for its own key"]),
    "upwards": (point_at(source="../../etc/passwd"), ["its receipt is for '../../etc/passwd', not for its own key"]),
    "other names": (point_at(names=("a", "b", "c")), ["its receipt names 3 tensors, and", "holds 3 with other names"]),
    "fewer names": (point_at(names=("a", "b")), ["its receipt names 2 tensors"]),
    "a name twice": (point_at(names=("a", "b", "b")), ["its receipt names 3 tensors"]),
    "no JSON": (replaced_by(b"{"), ["a malformed reference", "use the same gradsharding on all nodes"]),
    "no text": (replaced_by(b"\xff\xfe"), ["a malformed reference"]),
    "missing fields": (replaced_by(b'{"source": "a"}'), ["a malformed reference: Field required"]),
    "more fields": (replaced_by(b'{"source": "a", "version": "b", "nbytes": 1, "names": [], "x": 1}'), ["a malformed reference: Extra"]),
    "two receipts": (lambda _, reference, content: content.update({"more": reference.record()}), ["2 ArrayRecords"]),
}


@pytest.mark.parametrize("fault", RECEIPTS)
def test_a_bad_receipt_is_left_out(fault: str, flower_log: pytest.LogCaptureFixture) -> None:
    """A receipt that lies, or whose object is gone or changed, is one line of the log; the mean is that of the others."""
    change, words = RECEIPTS[fault]
    strategy = sharding(store := MemoryStore())
    result = strategy.start(grid_of({BAD: client(mods=after_upload(store, change))}), record(initial()), num_rounds=1)
    [line] = lines(flower_log)
    assert line.startswith(f"aggregate_train: node {BAD} is left out of round 1: ")
    assert [] == [word for word in words if word not in line]
    assert [BAD] == list(strategy.history[0].left_out)
    assert_same(averaged(GOOD, 1, initial()), state_of(result.arrays))


def test_a_foreign_path_is_never_opened(tmp_path: Path) -> None:
    """A receipt for a file outside its place is refused before the file is opened, however good the file is."""
    foreign = DirectoryStore(tmp_path / "foreign")
    write_arrays("model.safetensors", record(initial()), foreign)
    version = foreign.head("model.safetensors").version
    with opens(foreign.root) as opened:
        lie = point_at(source=f"{foreign.url}/model.safetensors", version=version)
        grid = grid_of({BAD: client(mods=after_upload(foreign, lie))})
        strategy = sharding(tmp_path / "store")
        strategy.start(grid, record(initial()), num_rounds=1)

        assert [] == opened()
        assert (foreign.root / "model.safetensors").read_bytes()
        assert ["model.safetensors"] == opened()
    assert [BAD] == list(strategy.history[0].left_out)


class Meddling(InlineExecutor):
    """Changes the store after the updates were checked, once, and before they are read."""

    def __init__(self, meddle: Callable[[Job], None]) -> None:
        self.meddle: Callable[[Job], None] | None = meddle

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        """Meddle, then run."""
        meddle, self.meddle = self.meddle, None
        if meddle:
            meddle(job)
        return super().run(tasks, job, store, limits, progress)


@pytest.mark.parametrize(("again", "words"), [(False, "there is no object"), (True, "it was written again")], ids=["deleted", "altered"])
def test_an_update_lost_during_aggregation(again: bool, words: str, flower_log: pytest.LogCaptureFixture) -> None:
    """An update that goes or changes between check and read is left out, and the others are averaged again."""
    store = MemoryStore()

    def meddle(job: Job) -> None:
        [source] = [term.source for term in job.terms if term.client == client_id(BAD)]
        store.delete([source])
        if again:
            write_arrays(source, record(initial()), store)

    result = sharding(store, executor=Meddling(meddle)).start(grid_of(), record(initial()), num_rounds=1)
    [line] = lines(flower_log)
    assert f"node {BAD} is left out of round 1: " in line
    assert words in line
    assert_same(averaged(GOOD, 1, initial()), state_of(result.arrays))


def test_a_silent_node_is_left_out(flower_log: pytest.LogCaptureFixture) -> None:
    """A node that does not answer within the timeout is named; the round does without it, and the next one asks it again."""
    grid = grid_of()
    grid.silent.add(BAD)
    strategy = sharding(MemoryStore())

    def speak(server_round: int, arrays: ArrayRecord) -> None:  # noqa: ARG001
        if server_round == 1:
            grid.silent.clear()

    result = strategy.start(grid, record(initial()), num_rounds=2, timeout=0.2, evaluate_fn=speak)
    assert [f"aggregate_train: node {BAD} is left out of round 1: it did not answer in time"] == lines(flower_log)
    assert [GOOD, (1, 2, 3, 14)] == [report.clients for report in strategy.history]
    assert_same(averaged(NODES, 2, averaged(GOOD, 1, initial())), state_of(result.arrays))


@pytest.mark.parametrize("shards", [1, 3])
def test_two_bad_clients_at_once(shards: int, flower_log: pytest.LogCaptureFixture) -> None:
    """Two clients with NaN, whether one slice shows both or two slices one each, are both named."""
    apps = {1: client(with_value("a", (0,), np.nan)), 14: client(with_value("b", (2, 3), np.inf))}
    strategy = sharding(MemoryStore(), shards=shards)
    result = strategy.start(grid_of(apps), record(initial()), num_rounds=1)
    assert [
        "node 1 is left out of round 1: tensor 'a' holds NaN or infinity at [0]",
        "node 14 is left out of round 1: tensor 'b' holds NaN or infinity at [2, 3]",
    ] == sorted(line.removeprefix("aggregate_train: ") for line in lines(flower_log))
    assert {1, 14} == set(strategy.history[0].left_out)
    assert_same(averaged((2, 3), 1, initial()), state_of(result.arrays))


def test_different_faults_at_once(flower_log: pytest.LogCaptureFixture) -> None:
    """An error, a wrong shape and a NaN in one round leave the one good client's update, unchanged."""
    apps = {1: client(raising), 2: client(with_state(a=np.zeros(8, np.float32))), 14: client(with_value("a", (3,), np.nan))}
    result = sharding(MemoryStore()).start(grid_of(apps), record(initial()), num_rounds=1)
    assert 3 == len(lines(flower_log))
    assert_same(averaged((3,), 1, initial()), state_of(result.arrays))


@pytest.mark.parametrize("fault", [raising, with_value("a", (0,), np.nan), with_weight(0)], ids=["error", "NaN", "weight"])
def test_a_round_without_a_good_client_is_given_up(fault: Train, flower_log: pytest.LogCaptureFixture) -> None:
    """When no update is usable, one error line says so, the model stays, and the next round works."""

    def first_bad(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        return (fault if server_round == 1 else train)(node, server_round, arrays)

    strategy = sharding(MemoryStore())
    seen = {}

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        seen[server_round] = state_of(arrays)

    result = strategy.start(grid_of({node: client(first_bad) for node in NODES}), record(initial()), num_rounds=2, evaluate_fn=evaluate)
    [line] = lines(flower_log, "ERROR")
    assert line.startswith("aggregate_train: round 1 is given up, the model stays: too few usable updates: 0 (at least 1 needed)")
    assert len(NODES) == len(lines(flower_log))
    assert_same(initial(), seen[1])
    assert_same(averaged(NODES, 2, initial()), state_of(result.arrays))
    assert [2] == [report.server_round for report in strategy.history]
    assert [2] == list(result.train_metrics_clientapp)


def test_a_run_without_a_good_round_ends_with_the_first_model() -> None:
    """If every round is given up, the result is the model that the run began with."""
    result = sharding(MemoryStore()).start(grid_of({node: client(raising) for node in NODES}), record(initial()), num_rounds=2)
    assert_same(initial(), state_of(result.arrays))


@pytest.mark.parametrize(("least", "rounds"), [(3, [1]), (4, [])])
def test_min_replies(least: int, rounds: list[int], flower_log: pytest.LogCaptureFixture) -> None:
    """A round with fewer usable updates than ``min_replies`` is given up; one with as many is not."""
    strategy = sharding(MemoryStore(), min_replies=least)
    result = strategy.start(grid_of({BAD: client(with_value("a", (0,), np.nan))}), record(initial()), num_rounds=1)
    assert rounds == [report.server_round for report in strategy.history]
    assert_same(averaged(GOOD, 1, initial()) if rounds else initial(), state_of(result.arrays))
    assert (not rounds) == any("too few usable updates: 3 (at least 4 needed)" in line for line in lines(flower_log, "ERROR"))


def test_a_failure_of_the_functions_gives_the_round_up(flower_log: pytest.LogCaptureFixture) -> None:
    """When a function breaks, no client is blamed: the round is given up with the reason, and the next one works."""

    def fail(job: Job) -> None:
        raise TaskFailed(f"{len(job.terms)} updates were not read, in 3 attempts")

    strategy = sharding(MemoryStore(), executor=Meddling(fail))
    result = strategy.start(grid_of(), record(initial()), num_rounds=2)
    assert ["aggregate_train: round 1 is given up, the model stays: 4 updates were not read, in 3 attempts"] == lines(flower_log, "ERROR")
    assert [] == lines(flower_log)
    assert_same(averaged(NODES, 2, initial()), state_of(result.arrays))


def test_too_many_shards_are_said() -> None:
    """More slices than the model has elements are refused with the numbers, before any client trains."""
    with pytest.raises(PlanTooLarge, match="an update of 20 elements cannot be cut into 64 shards; use 1 to 20 shards"):
        sharding(MemoryStore(), shards=64).start(grid_of(), record(initial()), num_rounds=1)


def test_too_little_memory_is_said() -> None:
    """A model that no number of slices fits into the allowed memory is refused before any client trains."""
    with pytest.raises(PlanTooLarge, match="allow more memory"):
        sharding(MemoryStore(), limits=Limits(memory=1 << 20)).start(grid_of(), record(initial()), num_rounds=1)


def test_server_step_on_bfloat16_is_refused() -> None:
    """A strategy that computes on the server cannot take a bfloat16 model, and says so before any client trains."""
    half = from_state_dict({"w": torch.zeros(3, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match="FedAdam computes in numpy, which has no bfloat16"):
        sharding(MemoryStore(), FedAdam()).start(grid_of(), half, num_rounds=1)


def test_equally_common_layouts(flower_log: pytest.LogCaptureFixture) -> None:
    """Where as many clients send one layout as another, the model's own is kept, whichever node sent it."""
    wide = {"w": np.zeros(2), "b": np.zeros(1)}

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        dtype = "f8" if node == 1 else "f4"
        sent = ArrayRecord({name: Array(np.full(value.shape, node, dtype)) for name, value in wide.items()})
        return RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": 1})})

    model = ArrayRecord({name: Array(value.astype("f4")) for name, value in wide.items()})
    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0))
    result = strategy.start(grid_of({node: client(answer) for node in (1, 2)}, nodes=()), model, num_rounds=1)
    assert np.float32 == result.arrays["w"].numpy().dtype
    [line] = lines(flower_log, "WARNING")[-1:]
    assert "node 1 is left out" in line


def test_no_training_is_no_failure(flower_log: pytest.LogCaptureFixture) -> None:
    """A strategy that asks nobody to train gets no warning that nobody answered."""
    result = sharding(MemoryStore(), FedAvg(fraction_train=0.0)).start(grid_of(), record(initial()), num_rounds=1)
    assert [] == lines(flower_log, "ERROR")
    assert_same(initial(), state_of(result.arrays))


def answering(arrays: Callable[[int], dict[str, Any]], metrics: Callable[[int], dict[str, Any]] = lambda _: {"num-examples": 1}) -> Any:
    """Make a client that answers with given arrays and metrics, whatever it is asked."""

    def answer(node: int, server_round: int, received: ArrayRecord) -> RecordDict:  # noqa: ARG001
        sent = ArrayRecord({name: Array(value) for name, value in arrays(node).items()})
        return RecordDict({"arrays": sent, "metrics": MetricRecord(metrics(node))})

    return client(answer)


def federation(app: Any, flower_log: pytest.LogCaptureFixture) -> tuple[dict[str, Any], list[str], tuple[int, ...]]:
    """Run one round of nodes 1 to 3 on a model of two vectors; give the arrays, the warnings, and who was averaged."""
    model = ArrayRecord({"b": Array(np.zeros(2, "f4")), "a": Array(np.zeros(3, "f4"))})
    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0), shards=1)
    result = strategy.start(grid_of(dict.fromkeys((1, 2, 3), app), nodes=()), model, num_rounds=1)
    averaged_nodes = strategy.history[0].clients if strategy.history else ()
    return {name: array.numpy() for name, array in result.arrays.items()}, lines(flower_log, "WARNING"), averaged_nodes


def model_of(node: int) -> dict[str, Any]:
    """An honest answer."""
    return {"b": np.full(2, node, "f4"), "a": np.full(3, node, "f4")}


def test_majority_does_not_choose_the_model(flower_log: pytest.LogCaptureFixture) -> None:
    """Two of three clients that send other tensors than the model has are left out; the model keeps its own."""
    app = answering(lambda node: model_of(node) if node == 3 else {"zzz": np.ones(4, "f4")})
    arrays, warnings, nodes = federation(app, flower_log)
    assert (["b", "a"], (3,)) == (list(arrays), nodes)
    assert 2 == sum("is left out" in line and "tensor 'a'" in line for line in warnings)


def test_clients_do_not_order_the_model(flower_log: pytest.LogCaptureFixture) -> None:
    """A client that names its tensors in another order does not change the model's."""
    arrays, _, nodes = federation(answering(lambda node: dict(sorted(model_of(node).items()))), flower_log)
    assert (["b", "a"], (1, 2, 3)) == (list(arrays), nodes)


def test_metrics_of_another_kind(flower_log: pytest.LogCaptureFixture) -> None:
    """A client whose metrics could not be averaged with the others' is left out, and its metrics are named."""
    app = answering(model_of, lambda node: {"num-examples": 1, "loss": [1.0, 2.0] if node == 2 else 0.5})
    _, warnings, nodes = federation(app, flower_log)
    assert (1, 3) == nodes
    assert "its metrics are loss[2], num-examples, while most replies have loss, num-examples" in warnings[-1]


@pytest.mark.parametrize("weight", [2**53, 1e-12])
def test_extreme_weight(flower_log: pytest.LogCaptureFixture, weight: float) -> None:
    """A weight that does not fit the others' costs its own client the round, not the others."""
    app = answering(model_of, lambda node: {"num-examples": weight if node == 2 else 1.5})
    _, warnings, nodes = federation(app, flower_log)
    assert (1, 3) == nodes
    assert any("node 2 is left out" in line and "does not fit the weights of 2 other nodes" in line for line in warnings)


def test_set_up_that_cannot_work_ends_the_run() -> None:
    """A store that the executor cannot share is an error at once; no round is given up for it."""
    with pytest.raises(UserError, match="cannot be shared with worker processes"):
        sharding(MemoryStore(), executor="processes:1").start(grid_of(), record(initial()), num_rounds=2)


def test_values_that_overflow_cost_their_own_node_the_round() -> None:
    """A node whose finite float64 values make the sum overflow is named and left out; the others are averaged."""

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        return reply({"w": np.full(2, 1.7e308 if node == 2 else float(node))}, 10)

    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0), shards=1)
    grid = grid_of({node: client(answer) for node in (1, 2, 3)}, nodes=())
    result = strategy.start(grid, record({"w": np.zeros(2)}), num_rounds=1)
    assert ["tensor 'w' holds a value so large that sums overflow at [0]"] == [*strategy.history[0].left_out.values()]
    assert_same({"w": np.full(2, 2.0)}, state_of(result.arrays))
