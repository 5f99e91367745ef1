"""Direct, relay and mixed federations: who sees arrays, who sees references, and what passes the server."""

import random
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import FedAdam, FedAvg

from flower_federation import NODES, RecordingGrid, averaged, client, grid_of, initial, record, reply, sharding, state_of, trained
from gradsharding import DirectoryStore, InlineExecutor, MemoryStore
from gradsharding.testing import assert_same
from gradsharding_flower import upload_mod
from gradsharding_flower.arrays import NPY
from gradsharding_flower.mod import ORDERS, STORE_KEY
from gradsharding_flower.reference import KEY, STYPE
from gradsharding_flower.testing import LocalGrid


def recording(mods: Sequence[Mod] = (upload_mod,)) -> RecordingGrid:
    """Make a grid of good clients that keeps what passes."""
    return RecordingGrid({node: client(mods=mods) for node in NODES})


def stypes(contents: Sequence[tuple[int, RecordDict]]) -> set[str]:
    """Collect how the arrays of messages are serialized."""
    return {array.stype for _, content in contents for arrays in content.array_records.values() for array in arrays.values()}


@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
def test_direct_sends_references_only(inner: type[FedAvg]) -> None:
    """With the mod, no array passes the server in any message, of training or evaluation, either way."""
    sharding(MemoryStore(), inner()).start(grid := recording(), record(initial()), num_rounds=2)
    assert {STYPE} == stypes(grid.sent) == stypes(grid.received)
    assert 2 * 2 * len(NODES) == len(grid.sent) == len(grid.received)


def test_traffic_does_not_grow_with_the_model() -> None:
    """A model of 1 kB and one of 4 MB send as many bytes through the server, but for a few digits of their sizes."""

    def traffic(elements: int) -> tuple[int, int]:
        strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0))
        strategy.start(recording(), record({"w": np.zeros(elements, np.float32)}), num_rounds=2)
        return strategy.history[1].server_sent, strategy.history[1].server_received

    small, large = traffic(250), traffic(1_000_000)
    assert large[0] - small[0] <= 8 * len(NODES)
    assert large[1] - small[1] <= 8 * len(NODES)


def test_relay_serves_clients_without_the_mod() -> None:
    """A federation of plain clients gets arrays and answers arrays; the result has the same bits."""
    result = sharding(MemoryStore(), mode="relay").start(grid := recording(mods=[]), record(initial()), num_rounds=2)
    assert {NPY} == stypes(grid.sent) == stypes(grid.received)
    assert not any(ORDERS in content for _, content in grid.sent)
    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))


def test_relay_holds_one_update_at_a_time() -> None:
    """When the server takes the next update in, it has let go of those before: only their receipts are left."""
    held: list[int] = []
    taken: list[weakref.ref[Message]] = []

    class Holding(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            held.append(sum(one() is not None for one in taken))
            replies = list(super().pull_messages(message_ids))
            taken.extend(map(weakref.ref, replies))
            return replies

    sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0), mode="relay").start(
        Holding({node: client(mods=[]) for node in NODES}), record(initial()), num_rounds=1
    )
    assert [0] * len(NODES) == held


def test_mixed_serves_both_kinds() -> None:
    """A node gets arrays until its first receipt, and references from its second round on; the others keep getting arrays."""
    apps = {node: client(mods=[upload_mod] if node in (1, 14) else []) for node in NODES}
    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0), mode="mixed")
    result = strategy.start(grid := RecordingGrid(apps), record(initial()), num_rounds=3)
    first, later = grid.sent[:4], grid.sent[4:]
    assert {NPY} == stypes(first)
    assert {STYPE} == stypes([(node, content) for node, content in later if node in (1, 14)])
    assert {NPY} == stypes([(node, content) for node, content in later if node in (2, 3)])
    assert {STYPE} == stypes([(node, content) for node, content in grid.received if node in (1, 14)])
    expected = initial()
    for server_round in (1, 2, 3):
        expected = averaged(NODES, server_round, expected)
    assert_same(expected, state_of(result.arrays))


@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
def test_mod_leaves_other_strategies_alone(inner: type[FedAvg]) -> None:
    """Under plain Flower the mod passes every message as it is: with and without it, the result has the same bits."""
    models = []
    for mods in ([], [upload_mod]):
        random.seed(4)  # Flower samples nodes by this generator, and sums in the order of its sample
        models.append(state_of(inner().start(grid_of(mods=mods), record(initial())).arrays))
    assert_same(*models)


@pytest.mark.parametrize("mode", ["direct", "mixed"])
def test_mods_after_it_see_arrays_both_ways(mode: str) -> None:
    """A mod placed after ``upload_mod``, as for differential privacy, gets and gives real arrays under the names of old."""
    seen: list[tuple[str, ...]] = []

    def look(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        answer = call_next(message, context)
        for content in (message.content, answer.content):
            assert ORDERS not in content
            for arrays in content.array_records.values():
                assert KEY not in arrays
                seen.append((*arrays, *(array.stype for array in arrays.values())))
        return answer

    sharding(MemoryStore(), mode=mode).start(grid_of(mods=[upload_mod, look]), record(initial()), num_rounds=2)
    assert {("b", "a", "n", NPY, NPY, NPY)} == set(seen)
    assert 2 * len(NODES) * 3 == len(seen)


def test_flowers_own_privacy_mod() -> None:
    """Flower's LocalDpMod, placed after ``upload_mod``, clips the update against the model that was loaded."""
    clip = LocalDpMod(clipping_norm=0.5, sensitivity=0.0, epsilon=1.0, delta=0.1)  # sensitivity 0: no noise
    start = {name: array for name, array in initial().items() if name != "n"}
    apps = {node: client(lambda n, r, a: reply(trained(n, r, state_of(a)), 1), [upload_mod, clip]) for node in (1, 2)}
    result = sharding(MemoryStore()).start(grid_of(apps, nodes=()), record(start), num_rounds=1)
    expected = {}
    for name in start:
        updates = [trained(node, 1, start) for node in (1, 2)]
        norms = [np.sqrt(sum(float((update[other] ** 2).sum()) for other in start)) for update in updates]
        expected[name] = sum(update[name] * 0.5 / norm for update, norm in zip(updates, norms, strict=True)) / 2
    for name, array in state_of(result.arrays).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5)


def test_direct_without_the_mod_is_said(flower_log: pytest.LogCaptureFixture) -> None:
    """A client that lacks the mod in a direct federation is left out; its own error names what it could not read."""
    result = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0)).start(grid_of({3: client(mods=[])}), record(initial()), num_rounds=1)
    warnings = [line.getMessage() for line in flower_log.records if "aggregate_train" in line.getMessage() and line.levelname == "WARNING"]
    assert 1 == len(warnings)
    assert "node 3 is left out of round 1" in warnings[0]
    assert STYPE in warnings[0]
    assert_same(averaged((1, 2, 14), 1, initial()), state_of(result.arrays))


def test_one_store_under_two_urls(tmp_path: Path) -> None:
    """A node whose own config names the store reads and writes there, whatever URL the server has."""
    (tmp_path / "as-the-node-sees-it").symlink_to(tmp_path / "store")
    store = DirectoryStore(tmp_path / "store")
    store.url = "nowhere://that/a/node/can/open"
    grid = grid_of()
    for context in grid._contexts.values():
        context.node_config[STORE_KEY] = (tmp_path / "as-the-node-sees-it").as_uri()
    strategy = sharding(store, executor=InlineExecutor())
    result = strategy.start(grid, record(initial()), num_rounds=1)
    assert_same(averaged(NODES, 1, initial()), state_of(result.arrays))
    assert {} == strategy.history[0].left_out


def test_message_delivered_twice_keeps_the_first_upload() -> None:
    """When a node gets one message twice and trains to another end, what it uploaded first is averaged."""

    class Twice(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            again = Message(RecordDict(dict(message.content)), dst_node_id=message.metadata.dst_node_id, message_type="train")
            again.metadata.__dict__["_message_id"] = message.metadata.message_id
            super().__call__(again, context)
            return super().__call__(message, context)

    counts = Counter[int]()
    apps: dict[int, ClientApp] = {}
    for node in (1, 2):
        app = Twice(mods=[upload_mod])

        @app.train()
        def _train(message: Message, context: Context) -> Message:
            counts[context.node_id] += 1
            ones = np.full(3, context.node_id * counts[context.node_id], np.float32)
            return Message(reply({"w": ones}, 1), reply_to=message)

        apps[node] = app
    result = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0)).start(
        grid_of(apps, nodes=()), record({"w": np.zeros(3, np.float32)}), num_rounds=1
    )
    assert Counter({1: 2, 2: 2}) == counts
    assert_same({"w": np.full(3, 1.5, np.float32)}, state_of(result.arrays))
