"""The rival from the paper, in ``benchmarks/paper``: its loop averages, and its formulas are those of its own counts."""

from decimal import Decimal

import numpy as np
import pytest

from gradsharding import DirectoryStore, LambdaFLTree, Limits, MemoryStore
from gradsharding.advice.cost import forecast
from gradsharding.advice.prices import load_prices
from gradsharding.advice.timing import Speeds
from gradsharding.testing import CountingStore
from modelled import MB, manifest
from paper.loop import Function, Vector, aggregate, functions, held, submit
from paper.model import PaperPlan, planned

GIB = 1 << 30
PRICES = load_prices()
PLANS = {"M=4": ("paper", 4), "M=8": ("paper", 8), "flat": ("flat", 1), "lambda-fl": ("lambda-fl", 1), "lifl": ("lifl", 1)}


def averaged(plan: PaperPlan, vectors: dict[str, Vector], weights: dict[str, int]) -> Vector:
    """Run the paper's round."""
    store = MemoryStore()
    submit(store, "r", vectors, plan)
    return aggregate(store, "r", weights, plan)


@pytest.mark.parametrize("name", PLANS)
def test_loop_does_what_its_formulas_say(name: str) -> None:
    """The loop gives the weighted mean; requests and bytes at the store are those of the plan."""
    vectors = {f"c{i:02d}": np.arange(30, dtype=np.float32) * (i - 9) for i in range(20)}
    weights = {client: i + 1 for i, client in enumerate(vectors)}
    plan = planned(PLANS[name][0], manifest(120, 20), PLANS[name][1])
    counting = CountingStore(MemoryStore())
    submit(counting, "r", vectors, plan)
    uploads, counting.puts, counting.bytes_written = counting.puts, 0, 0
    mean = aggregate(counting, "r", weights, plan)
    expected = sum(weights[client] * vector.astype("f8") for client, vector in vectors.items()) / 210

    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    assert 20 * plan.objects == uploads
    collected = plan.objects  # GETs by which the mean was read in the end
    usage = plan.usage
    assert (usage.gets + collected, usage.puts) == (counting.gets, counting.puts)
    assert (usage.bytes_read + 120, usage.bytes_written) == (counting.bytes_read, counting.bytes_written)


@pytest.mark.parametrize(("name", "gets", "puts"), [("M=4", 80, 4), ("M=8", 160, 8), ("lambda-fl", 24, 5), ("lifl", 30, 11)])
def test_requests_of_the_paper(name: str, gets: int, puts: int) -> None:
    """At 20 clients a plan has as many requests as the paper publishes."""
    usage = planned(PLANS[name][0], manifest(MB, 20), PLANS[name][1]).usage

    assert (gets, puts) == (usage.gets, usage.puts)


@pytest.mark.parametrize(("elements", "provisioned"), [(134_301_514, 1987), (134_301_514 // 4 + 1, 835), (11_181_642 // 4, 482)])
def test_memory_of_the_paper(elements: int, provisioned: int) -> None:
    """A plan projects what the paper provisioned: three times the object, and 450 MiB."""
    assert provisioned * MB == planned("flat", manifest(4 * elements, 20)).provisioned


def test_float32_sums() -> None:
    """Summed in float32, a tree and a flat sum differ in many last bits."""
    draw = np.random.default_rng(7)
    vectors = {f"c{i:02d}": draw.normal(size=10_000).astype(np.float32) for i in range(20)}
    flat, tree = (averaged(planned(name, manifest(40_000, 20)), vectors, dict.fromkeys(vectors, 1)) for name in ("flat", "lambda-fl"))

    assert 0.4 < np.mean(flat != tree) < 0.8
    assert np.abs(flat - tree).max() < 1e-6


def test_seconds_by_hand() -> None:
    """One function takes a latency and a stream for each input, folding, a latency and a stream for the result."""
    known = Speeds(connection_rate=50e6, latency=0.1, write_rate=25e6, fold_rate=1e9, spread=0.3, invoke=1.0)
    plan = planned("flat", manifest(100_000_000, 4))
    wall, billed = plan.seconds(2 * GIB, None, known)

    assert pytest.approx(4 * (0.1 + 2) + 0.4 + 0.1 + 4) == billed
    assert pytest.approx(4 * (0.1 + 2) + 0.8 + 0.1 + 4) == plan.seconds(1769 * MB // 2, None, known)[1]
    assert pytest.approx(0.3 + 1 + 12.9) == wall


def test_objects_are_paid_for() -> None:
    """With an object for each client and slice, uploads and downloads are N·M requests; a tree's clients pay for them as ours do."""
    cost = planned("paper", manifest(64 * MB, 20), 4).cost(PRICES, GIB).round_trip
    amounts = {item.name: item.usd for item in cost.items}
    tree = planned("lambda-fl", manifest(64 * MB, 20)).cost(PRICES, GIB).round_trip
    ours = forecast(LambdaFLTree().plan(manifest(64 * MB, 20), Limits()), PRICES, GIB).cost.round_trip

    assert (80 * Decimal("0.000005"), 80 * Decimal("0.0000004")) == (amounts["clients' PUTs"], amounts["clients' GETs"])
    for item in ("clients' PUTs", "clients' GETs"):
        assert [i.usd for i in ours.items if i.name == item] == [i.usd for i in tree.items if i.name == item]


def test_a_function_is_held_to_its_memory(tmp_path: object) -> None:
    """A function writes its mean in enough memory, and is stopped where it outgrows its memory."""
    store = DirectoryStore(str(tmp_path))
    plan, ones = planned("flat", manifest(16 * MB, 2)), np.ones(4 * MB, np.float32)
    submit(store, "r", {"a": ones, "b": 3 * ones}, plan)
    (function,) = functions("r", {"a": 1, "b": 1}, plan)

    assert held(function, 192 * MB, store)
    (mean,) = {*np.frombuffer(b"".join(store.get(function.output, 0, 16 * MB)), np.float32).tolist()}
    assert 2 == mean
    assert not held(Function.model_validate({**function.model_dump(), "output": "r/again"}), 64 * MB, store)
