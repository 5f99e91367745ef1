"""What a run leaves: a result that is read when it is used, reports, and a store with the last two models in it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from flower_federation import NODES, averaged, client, files, grid_of, initial, record, reply, sharding, state_of, train, trained
from gradsharding import DirectoryStore, MemoryStore
from gradsharding.errors import ChangedObject
from gradsharding.testing import CountingStore, assert_same
from gradsharding_flower import from_state_dict, refer, upload_mod
from gradsharding_flower.reference import find_reference
from gradsharding_flower.testing import LocalGrid
from gradsharding_flower.trust import ALLOW_KEY


@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
@pytest.mark.parametrize("mode", ["direct", "relay"])
def test_order_of_names_survives(inner: type[FedAvg], mode: Any) -> None:
    """Names come back in the model's order, to clients, ``evaluate_fn`` and the result: Flower's numpy lists rely on it."""
    start = ArrayRecord([np.full(i, i, np.float32) for i in range(12)])
    seen: list[list[str]] = []

    def look(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        seen.append(list(arrays))
        return train(node, server_round, arrays)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(list(arrays))
        shapes = [array.shape for array in arrays.to_numpy_ndarrays()]
        return MetricRecord({"right": int([(i,) for i in range(12)] == shapes), "round": server_round})

    apps = {node: client(look, [upload_mod] if mode == "direct" else []) for node in NODES}
    result = sharding(MemoryStore(), inner(), mode=mode).start(grid_of(apps), start, num_rounds=2, evaluate_fn=evaluate)
    assert {tuple(map(str, range(12)))} == set(map(tuple, [*seen, list(result.arrays)]))
    assert 2 * len(NODES) + 3 == len(seen)
    assert [(1, 0), (1, 1), (1, 2)] == [(m["right"], m["round"]) for m in result.evaluate_metrics_serverapp.values()]


def test_evaluate_sees_each_rounds_model() -> None:
    """``evaluate_fn`` gets the model as real arrays: the first one, then that of each round."""
    seen: dict[int, Any] = {}

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        seen[server_round] = state_of(arrays)

    sharding(MemoryStore()).start(grid_of(), record(initial()), num_rounds=2, evaluate_fn=evaluate)
    first = averaged(NODES, 1, initial())
    for server_round, expected in enumerate([initial(), first, averaged(NODES, 2, first)]):
        assert_same(expected, seen[server_round])


def test_arrays_are_read_when_used_and_once() -> None:
    """A run without ``evaluate_fn`` reads no model on the server; ``result.arrays`` does, when it is first used."""
    store = CountingStore(MemoryStore(), only=lambda key: key.startswith("results/") and key.endswith("-0.safetensors"))
    result = sharding(store).start(grid_of(), record(initial()), num_rounds=2)
    assert 0 == store.bytes_read
    assert averaged(NODES, 2, averaged(NODES, 1, initial())).keys() == result.arrays.keys()
    read = store.bytes_read
    assert read > sum(array.nbytes for array in initial().values())
    assert result.arrays is result.arrays
    assert read == store.bytes_read


def test_result_is_a_safetensors_file(tmp_path: Path) -> None:
    """The final model is a file that the safetensors library reads, at ``result.model.source`` of the store."""
    start = {"w": torch.zeros(4, 3, dtype=torch.bfloat16), "b": torch.zeros(3)}

    def ones(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        state = {name: torch.full_like(tensor, node) for name, tensor in start.items()}
        return RecordDict({"arrays": from_state_dict(state), "metrics": MetricRecord({"num-examples": 1})})

    apps = {node: client(ones) for node in (1, 2)}
    strategy = sharding(tmp_path, FedAvg(fraction_evaluate=0.0))
    result = strategy.start(grid_of(apps, nodes=()), from_state_dict(start), num_rounds=1)
    loaded = safetensors.torch.load_file(tmp_path / result.model.source)
    for name, tensor in start.items():
        assert torch.equal(torch.full_like(tensor, 1.5), loaded[name])


def allowing(directory: Path) -> LocalGrid:
    """Make a grid of nodes that may read models below a directory."""
    grid = grid_of()
    for context in grid._contexts.values():
        context.node_config[ALLOW_KEY] = directory.as_uri()
    return grid


def test_initial_model_by_reference(tmp_path: Path) -> None:
    """A safetensors file can be the initial model: it is not copied to the store, and the server never reads its data."""
    path = tmp_path / "first model.safetensors"
    safetensors.numpy.save_file(initial(), path)
    elsewhere = DirectoryStore(tmp_path / "store")
    store = CountingStore(elsewhere)
    reference = refer(path, store)
    found = find_reference(reference)
    assert found is not None
    assert (path.as_uri(), sum(array.nbytes for array in initial().values())) == (found.source, found.nbytes)
    assert 0 == store.puts == store.gets
    untouched = sharding(store).start(grid_of(), reference, num_rounds=0)
    assert 0 == store.puts
    assert_same(initial(), state_of(untouched.arrays))
    result = sharding(store).start(allowing(tmp_path), reference, num_rounds=2)
    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))
    assert path.exists()
    assert ["results"] * 2 == [name.partition("/")[0] for name in files(elsewhere.root)]


def test_a_model_that_changed_is_not_loaded(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    """If the file behind a reference is written again, no node trains on it, and no result is made of it."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(initial(), path)
    reference = refer(path, store := MemoryStore())
    path.unlink()
    safetensors.numpy.save_file({**initial(), "n": np.array(6)}, path)
    result = sharding(store, FedAvg(fraction_evaluate=0.0)).start(allowing(tmp_path), reference, num_rounds=1)
    assert len(NODES) == flower_log.text.count("ChangedObject: file://")
    with pytest.raises(ChangedObject, match="it was written again"):
        _ = result.arrays


def test_reports_tell_what_passed(tmp_path: Path) -> None:
    """A round's report counts what it says: clients, bytes through the store, functions, memory."""
    strategy = sharding(tmp_path, keep=True)
    strategy.start(grid_of(), record(initial()), num_rounds=2)
    for report in strategy.history:
        updates = list(tmp_path.glob(f"rounds/*-{report.server_round:06d}/updates/*"))
        data = sum(array.nbytes for array in initial().values())
        assert tuple(sorted(NODES)) == report.clients
        assert len(NODES) == len(updates)
        assert sum(path.stat().st_size for path in updates) == report.uploaded
        assert len(NODES) * data == report.read
        assert report.uploaded == report.nodes_written
        assert report.nodes_read is not None
        assert len(NODES) * data < report.nodes_read < len(NODES) * (data + 2000)  # and the header
        assert data == report.written
        assert 3 == report.functions
        assert report.peak_memory is None  # its functions ran in this process
        assert data < report.projected_memory
    assert [1, 2] == [report.server_round for report in strategy.history]


@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
@pytest.mark.parametrize("mode", ["direct", "relay"])
def test_the_last_two_models_remain(inner: type[FedAvg], mode: Any, tmp_path: Path) -> None:
    """After a run the store holds the model and the one before it, and no update, receipt, part or draft."""
    grid = grid_of(mods=[upload_mod] if mode == "direct" else [])
    result = sharding(tmp_path, inner(), mode=mode).start(grid, record(initial()), num_rounds=4)
    left = files(tmp_path)
    assert 2 == len(left)
    assert result.model.source == left[1]
    assert all("-00000" in name and name.endswith(".safetensors") for name in left)


def sick(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
    """Answer NaN in even rounds."""
    state = trained(node, server_round, state_of(arrays))
    if server_round % 2 == 0:
        state["a"][3] = np.nan
    return reply(state, 1)


@pytest.mark.parametrize(("bad", "rounds"), [((3,), [1, 2, 3, 4]), (NODES, [1, 3])], ids=["one", "all"])
def test_failed_attempts_leave_nothing(bad: tuple[int, ...], rounds: list[int], tmp_path: Path) -> None:
    """Parts written for a mean that was given up are removed, and so are the updates of a round that was."""
    strategy = sharding(tmp_path)
    result = strategy.start(grid_of({node: client(sick) for node in bad}), record(initial()), num_rounds=4)
    assert rounds == [report.server_round for report in strategy.history]
    left = files(tmp_path)
    assert 2 == len(left)
    assert result.model.source == left[1]


def test_keep_keeps_all(tmp_path: Path) -> None:
    """With ``keep`` every update and every model stays, and each can be read."""
    sharding(tmp_path, keep=True).start(grid_of(), record(initial()))
    left = list(tmp_path.rglob("*.safetensors"))
    assert 3 * len(NODES) == sum(path.parent.name == "updates" for path in left)
    assert 1 + 3 == sum(path.parent.name == "results" for path in left)
    assert all(set(safetensors.numpy.load_file(path)) == set(initial()) for path in left)


def test_runs_share_a_store(tmp_path: Path) -> None:
    """Runs in one store, one after another or one in the middle of another, do not see each other's objects."""

    def nesting(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        if (node, server_round) == (2, 2):
            inside.append(sharding(tmp_path).start(grid_of(), record(initial()), num_rounds=3))
        return train(node, server_round, arrays)

    inside: list[Any] = []
    strategy = sharding(tmp_path)
    outside = strategy.start(grid_of({2: client(nesting)}), record(initial()), num_rounds=3)
    again = strategy.start(grid_of(), record(initial()), num_rounds=3)
    models = [state_of(run.arrays) for run in (outside, *inside, again)]
    assert 3 == len(models)
    for model in models[1:]:
        assert_same(models[0], model)
    assert 3 * 2 == len(files(tmp_path))
    assert 3 == len(strategy.history)
