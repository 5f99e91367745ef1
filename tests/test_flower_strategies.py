"""Wrapped strategies give what they give unwrapped, and the mean's bits are those of a float64 reference."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from flower_federation import NODES, State, averaged, client, grid_of, initial, record, reply, sharding, state_of, train, trained, weight_of
from gradsharding import DirectoryStore, MemoryStore, Round, ShardedTree
from gradsharding.errors import UserError
from gradsharding.rounds.verify import verify
from gradsharding.stores.updates import load
from gradsharding.testing import assert_same, reference_mean
from gradsharding_flower import LIFL, GradSharding, LambdaFL, upload_mod
from gradsharding_flower.reference import client_id

INNER: dict[str, Callable[[], FedAvg]] = {
    "FedAvg": FedAvg,
    "FedProx": lambda: FedProx(proximal_mu=0.1),
    "FedAvgM": FedAvgM,
    "FedAvgM with momentum": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
}
every_inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())


@every_inner
def test_wrapped_equals_unwrapped(make: Callable[[], FedAvg]) -> None:
    """Three rounds give the model and the metrics of plain Flower, up to the rounding of float32."""
    wrapped = sharding(MemoryStore(), make()).start(grid_of(), record(initial()))
    plain = make().start(grid_of(), record(initial()))
    assert list(plain.arrays) == list(wrapped.arrays)
    for name in ("a", "b"):
        expected, actual = plain.arrays[name].numpy(), wrapped.arrays[name].numpy()
        assert expected.dtype == actual.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert plain.train_metrics_clientapp.keys() == wrapped.train_metrics_clientapp.keys() == {1, 2, 3}
    for server_round, metrics in plain.train_metrics_clientapp.items():
        assert metrics["loss"] == pytest.approx(wrapped.train_metrics_clientapp[server_round]["loss"])
    for server_round, metrics in plain.evaluate_metrics_clientapp.items():
        assert metrics["total"] == pytest.approx(wrapped.evaluate_metrics_clientapp[server_round]["total"], rel=1e-4)


@every_inner
def test_average_is_the_reference_bit_for_bit(make: Callable[[], FedAvg]) -> None:
    """Each round's average has the bits of a float64 mean of the stored updates, in the order of the node ids."""
    strategy = sharding(store := MemoryStore(), make(), keep=True)
    strategy.start(grid_of(), record(initial()))
    averages = [key for key, _ in store.list("results/") if key.endswith("-0.safetensors")]
    assert 3 == len(averages)
    for average in averages:
        updates = f"rounds/{average.removeprefix('results/').removesuffix('-0.safetensors')}/updates"
        given = {client_id(node): (load(f"{updates}/{client_id(node)}.safetensors", store), weight_of(node)) for node in NODES}
        assert_same(reference_mean(given), load(average, store))


@pytest.mark.parametrize("make", [FedAvg, FedProx, FedAvgM])
def test_model_is_the_reference_bit_for_bit(make: Callable[[], FedAvg]) -> None:
    """Where the server takes no step of its own, so has the model after three rounds; a round of FedAvgM is x * 1.0."""
    result = sharding(MemoryStore(), make()).start(grid_of(), record(initial()))
    expected: State = initial()
    for server_round in (1, 2, 3):
        expected = averaged(NODES, server_round, expected)
    assert_same(expected, state_of(result.arrays))


def test_shards_do_not_change_the_bits() -> None:
    """One slice, many, and numbers that divide nothing give the same bits."""
    start = {**initial(), "w": np.zeros(100, np.float32)}
    for shards in (1, 2, 3, 7, 64):
        strategy = sharding(MemoryStore(), shards=shards)
        assert_same(averaged(NODES, 1, start), state_of(strategy.start(grid_of(), record(start), num_rounds=1).arrays))
        assert shards == strategy.history[0].functions


def test_default_shards_and_processes(tmp_path: Path) -> None:
    """Worker processes, and the number of slices left to the plan, give the same bits as well."""
    strategy = GradSharding(FedAvg(), store=f"file://{tmp_path}", executor="processes:2")
    result = strategy.start(grid_of(), record(initial()), num_rounds=1)
    assert_same(averaged(NODES, 1, initial()), state_of(result.arrays))


def test_counters_keep_their_dtype() -> None:
    """An int64 counter is averaged exactly, half to even, and stays int64; plain Flower makes a float64 of it."""

    def count(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        return reply({"n": np.array(2**60 + node, np.int64), "flag": np.array([node == 1, node == 2])}, 5)

    start = {"n": np.array(0, np.int64), "flag": np.array([False, False])}
    for mode in ("direct", "relay"):
        apps = {node: client(count, [upload_mod] if mode == "direct" else []) for node in (1, 2)}
        result = sharding(MemoryStore(), mode=mode).start(grid_of(apps, nodes=()), record(start), num_rounds=1)
        assert_same({"n": np.array(2**60 + 2, np.int64), "flag": np.array([False, False])}, state_of(result.arrays))
    plain = FedAvg().start(grid_of({node: client(count) for node in (1, 2)}, nodes=()), record(start), num_rounds=1)
    assert np.float64 == plain.arrays["n"].numpy().dtype


@pytest.mark.parametrize("make", [lambda: FedAvgM(server_learning_rate=0.5), FedAdam])
def test_server_step_keeps_counters(make: Callable[[], FedAvg]) -> None:
    """Counters stay integers when the server takes a step."""
    result = sharding(MemoryStore(), make()).start(grid_of(), record(initial()))
    assert np.int64 == result.arrays["n"].numpy().dtype
    assert () == result.arrays["n"].numpy().shape


def test_server_step_rounds_counters() -> None:
    """Half the way from 10 to an average of 13 is 11.5, and the counter says 12; from 10 to 11 it is 10.5, and it says 10."""

    def count(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        return reply({"n": np.array([13, 11], np.int64)}, 1)

    grid = grid_of({node: client(count) for node in (1, 2)}, nodes=())
    result = sharding(MemoryStore(), FedAvgM(server_learning_rate=0.5), shards=1).start(
        grid, record({"n": np.array([10, 10], np.int64)}), num_rounds=1
    )
    assert_same({"n": np.array([12, 10], np.int64)}, state_of(result.arrays))


def test_sums_go_by_the_number_of_the_node() -> None:
    """Node 2 is added before node 14: 2**53 and its negative cancel before the 1 comes, which it would otherwise swallow."""
    values = {1: 2.0**53, 2: -(2.0**53), 14: 1.0}

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        return reply({"w": np.array([values[node]])}, 1)

    for mode in ("direct", "relay"):
        mods = [upload_mod] if mode == "direct" else []
        grid = grid_of({node: client(answer, mods) for node in (14, 2, 1)}, nodes=())
        result = sharding(MemoryStore(), shards=1, mode=mode).start(grid, record({"w": np.zeros(1)}), num_rounds=1)
        assert_same({"w": np.array([1 / 3])}, state_of(result.arrays))


def test_own_keys_and_metrics() -> None:
    """Record keys, the weight's key and the functions that aggregate metrics are the wrapped strategy's."""

    def weights(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"weights": sorted(int(str(c["metrics"][key])) for c in contents)})

    def train_elsewhere(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        content = train(node, server_round, arrays)
        return RecordDict({"update": content.array_records["arrays"], "metrics": MetricRecord({"size": weight_of(node)})})

    def rename(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        message.content = RecordDict({"arrays": message.content["model"], "config": message.content["settings"]})
        return call_next(message, context)

    inner = FedAvg(
        arrayrecord_key="model", configrecord_key="settings", weighted_by_key="size", fraction_evaluate=0.0, train_metrics_aggr_fn=weights
    )
    apps = {node: client(train_elsewhere, [upload_mod, rename]) for node in NODES}
    result = sharding(MemoryStore(), inner).start(grid_of(apps), record(initial()), num_rounds=1)
    assert_same(averaged(NODES, 1, initial()), state_of(result.arrays))
    assert sorted(map(weight_of, NODES)) == result.train_metrics_clientapp[1]["weights"]


WHOLE = "distances between whole updates"
SERVER, CLIENT = "the server must clip each whole update", "it changes the average on the server"
REFUSED: list[tuple[Callable[[], Strategy], str]] = [
    (Krum, WHOLE),
    (MultiKrum, WHOLE),
    (Bulyan, WHOLE),
    (lambda: QFedAvg(client_learning_rate=0.1), "norm of its whole update"),
    (FedMedian, "it takes a median"),
    (FedTrimmedAvg, "it takes a trimmed mean"),
    (FedXgbBagging, "it joins trees"),
    (FedXgbCyclic, "one client's trees"),
    (lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2), SERVER),
    (lambda: DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 1.0, 100), SERVER),
    (lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 2), CLIENT),
    (lambda: DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 1.0, 100), CLIENT),
    (lambda: GradSharding(FedAvg(), store=MemoryStore()), "aggregate_train of its own"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refuses_by_name_and_with_the_reason(make: Callable[[], Strategy], reason: str) -> None:
    """A strategy that is no weighted mean is refused when it is wrapped, before anything runs."""
    inner = make()
    with pytest.raises(UserError, match=reason) as refused:
        GradSharding(inner, store=MemoryStore())  # type: ignore[arg-type]
    assert refused.value.message.startswith(f"{type(inner).__name__} ")


def test_a_subclass_of_a_refused_strategy_is_refused() -> None:
    """A user's own Krum is refused for Krum's reason."""

    class Mine(Krum):
        pass

    with pytest.raises(UserError, match=f"Mine cannot be sharded: .*{WHOLE}"):
        GradSharding(Mine(), store=MemoryStore())


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_a_subclass_with_its_own_aggregation_is_refused(kind: type[FedAvg]) -> None:
    """A user's subclass that overrides aggregate_train may use more than the mean."""

    class Mine(kind):  # type: ignore[valid-type, misc]
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
            result: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(server_round, replies)
            return result

    with pytest.raises(UserError, match="Mine has an aggregate_train of its own"):
        GradSharding(Mine(), store=MemoryStore())


def test_a_subclass_that_leaves_aggregation_alone_is_accepted() -> None:
    """A user's subclass that chooses other clients or settings is asked for them."""

    class Decaying(FedAvg):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
            config["lr"] = 0.5**server_round
            return super().configure_train(server_round, arrays, config, grid)

    seen: list[float] = []

    def learn(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if "lr" in message.content["config"]:
            seen.append(float(str(message.content["config"]["lr"])))
        return call_next(message, context)

    result = sharding(MemoryStore(), Decaying()).start(grid_of(mods=[upload_mod, learn]), record(initial()), num_rounds=2)
    assert [0.5] * 4 + [0.25] * 4 == seen
    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))


def test_unknown_mode_is_refused() -> None:
    """A mode that does not exist is named, and those that do."""
    with pytest.raises(UserError, match="'fast' is not a mode; use direct, relay or mixed"):
        GradSharding(FedAvg(), store=MemoryStore(), mode="fast")  # type: ignore[arg-type]


def test_summary_names_the_settings(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    """The summary in the log tells the plug-in's settings, then the wrapped strategy's."""
    sharding(tmp_path, FedAvgM(server_momentum=0.9)).summary()
    text = flower_log.text
    assert f"Store: {tmp_path.as_uri()} | mode: direct" in text
    places = [
        text.index(line) for line in ("Topology: sharded (shards=3) | executor: InlineExecutor", "FedAvgM settings", "Fraction: train")
    ]
    assert sorted(places) == places


@pytest.mark.parametrize(("rule", "line"), [("mean", "Rule: mean"), ("trimmed-mean:0.2", "trimmed-mean:0.2 | weights do not count: each")])
def test_summary_says_whether_weights_count(tmp_path: Path, flower_log: pytest.LogCaptureFixture, rule: str, line: str) -> None:
    """The summary names the rule, and says so where the clients' weights do not count."""
    sharding(tmp_path, FedAvg(), rule=rule).summary()

    assert line in flower_log.text
    assert ("weights do not count" in flower_log.text) is (rule != "mean")


TREES: dict[str, Callable[..., GradSharding]] = {
    "LambdaFL": LambdaFL,
    "LambdaFL, 3 levels": partial(LambdaFL, fan_in=2, levels=3),
    "LIFL": LIFL,
    "by name": partial(GradSharding, topology="sharded-tree", shards=2),
    "by value": partial(GradSharding, topology=ShardedTree(fan_in=2, levels=3)),
    "LIFL, shared memory": partial(LIFL, shared_memory=True, executor="processes:2"),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("inner", ["FedAvg", pytest.param("FedAdam", marks=pytest.mark.slow)])
def test_other_topologies(name: str, inner: str, tmp_path: Path) -> None:
    """Trees train the model that slices train; only who sums what is another."""
    settings = {"store": tmp_path / "tree", "executor": "inline"}
    tree = TREES[name](INNER[inner](), **settings | dict(getattr(TREES[name], "keywords", {})))
    one = GradSharding(INNER[inner](), store=tmp_path / "one", executor="inline")
    found, expected = (strategy.start(grid_of(), record(initial())) for strategy in (tree, one))

    assert [len(report.clients) for report in one.history] == [len(report.clients) for report in tree.history]
    for tensor in ("a", "b"):
        np.testing.assert_array_max_ulp(found.arrays[tensor].numpy(), expected.arrays[tensor].numpy(), maxulp=1)


@every_inner
def test_exact(make: Callable[[], FedAvg]) -> None:
    """With ``exact=True`` every topology trains the same model to the last bit, and each round's report has the digest of its mean."""
    strategies = [sharding(MemoryStore(), make(), shards=shards, exact=True) for shards in (1, 5)]
    strategies += [kind(make(), store=MemoryStore(), executor="inline", exact=True) for kind in (LambdaFL, LIFL)]
    models = [state_of(strategy.start(grid_of(), record(initial())).arrays) for strategy in strategies]

    for strategy, model in zip(strategies, models, strict=True):
        assert_same(models[0], model)
        assert [report.digest for report in strategies[0].history] == [report.digest for report in strategy.history]
        assert 3 == len({report.digest for report in strategy.history} - {None})


def test_exact_is_verified_in_the_store(tmp_path: Path) -> None:
    """With ``keep=True`` the rounds of a run can be verified afterwards, element by element."""
    strategy = sharding(tmp_path, exact=True, keep=True)
    strategy.start(grid_of(), record(initial()), num_rounds=2)
    names = sorted(path.parent.name for path in (tmp_path / "rounds").glob("*/result.json"))
    verified = [verify(Round(DirectoryStore(tmp_path), name)) for name in names]

    assert [report.digest for report in strategy.history] == [one.record.digest for one in verified]
    assert {20} == {one.elements for one in verified}


def test_rule() -> None:
    """A trimmed mean of three updates that cuts one on each side is their median, whatever their weights."""
    strategy = sharding(MemoryStore(), rule="trimmed-mean:0.34", min_replies=3)
    result = strategy.start(grid_of(nodes=NODES[:3]), record(initial()), num_rounds=1)
    states = [trained(node, 1, initial()) for node in NODES[:3]]

    medians = {name: np.median([state[name] for state in states], axis=0).astype(like.dtype) for name, like in initial().items()}
    assert_same(medians, state_of(result.arrays))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "median"}, "no rule is named 'median'"),
        ({"rule": "mean", "exact": True}, "exact=True means rule='exact-mean', not 'mean': give one of them"),
        ({"rule": "trimmed-mean:0.2"}, "would cut nothing from 1 client, .* it needs at least 5.* as few as min_replies=1: raise that"),
    ],
)
def test_rules_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    """A rule that is none, is one of two, or could not be applied to the fewest replies, is refused before any client trains."""
    with pytest.raises(UserError, match=says):
        sharding(MemoryStore(), **options).start(grid_of(), record(initial()))


def test_exact_refuses_float64() -> None:
    """A model with a float64 tensor is refused by its name, before any client trains."""
    with pytest.raises(UserError, match="tensor 'w' is F64, and exact sums are of F32, F16 and BF16"):
        sharding(MemoryStore(), exact=True).start(grid_of(), record({"w": np.zeros(3)}))


@pytest.mark.parametrize("strategy", [LambdaFL, LIFL])
def test_trees_have_no_shards(strategy: Callable[..., GradSharding]) -> None:
    """A tree of whole models takes no number of shards, and says so."""
    with pytest.raises(UserError, match="has no shards: its functions hold whole models; use GradSharding"):
        strategy(FedAvg(), store=MemoryStore(), shards=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "ring"}, "no topology has the name 'ring'; use flat, sharded, "),
        ({"topology": "flat", "shards": 2}, "flat takes no shards; sharded and sharded-tree do"),
        ({"topology": ShardedTree(), "shards": 2}, "shards=2 goes with a topology's name, and sharded-tree is a value"),
    ],
)
def test_topology_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    """A topology is a registered name, with shards if it has slices, or a value, which has its own options; all else is refused at once."""
    with pytest.raises(UserError, match=message):
        GradSharding(FedAvg(), store=MemoryStore(), **settings)
