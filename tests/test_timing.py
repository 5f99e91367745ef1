"""The time model: laws that it keeps, and measured rounds that it predicts."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calibration
from gradsharding import Flat, Limits, Sharded
from gradsharding.advice.timing import (
    Seconds,
    Speeds,
    at_once,
    borne,
    bottleneck,
    forecast_seconds,
    rates,
    slowest,
    suited,
    task_seconds,
)
from gradsharding.arithmetic.rules import MEAN, ExactMean
from gradsharding.planning.platform import CHARGES, READING, RUNTIME
from gradsharding.planning.topologies import LambdaFLTree, LIFLTree, ShardedTree, Topology
from gradsharding.running.pace import GETS, PUTS, share
from gradsharding.stores.reading import STREAM
from modelled import MB, manifest

GIB = 1 << 30
RESULT = Path(calibration.__file__).parent / "results" / "calibration.json"


def seconds(shards: int, memory: int = 2 * GIB, concurrency: int | None = None, clients: int = 20) -> Seconds:
    """Forecast a round of 512 MiB."""
    return forecast_seconds(Sharded(shards=shards).plan(manifest(512 * MB, clients), Limits(), reading=READING), memory, concurrency)


@pytest.mark.parametrize("make", [Sharded(), LambdaFLTree(), LIFLTree()])
def test_exact_sums_take_longer(make: Topology) -> None:
    """Exact sums are added and written more slowly, more passes between functions, and the result is read once."""
    sealed = manifest(100 * MB, 20)
    plain, exact = (
        make.plan(sealed, reading=READING, rule=rule).placed(output=CHARGES, digest=rule.vouches, reading=READING)
        for rule in (MEAN, ExactMean())
    )
    one, read, other = (forecast_seconds(plan, GIB) for plan in (plain, plain.placed(digest=True), exact))
    latency = Speeds().latency * READING.requests(plain.result_bytes) / READING.parallel

    assert pytest.approx(plain.result_bytes / Speeds().client_rate + latency) == read.p50 - one.p50
    assert one.billed == read.billed < other.billed
    assert read.p50 < other.p50


def test_more_functions_are_faster_and_the_slowest_counts() -> None:
    """Twice the shards take about half the time, less what the slowest of more functions loses; what is billed stays nearly the same."""
    one, two, many = seconds(1), seconds(2), seconds(64)

    assert one.p50 / 2 < two.p50 < one.p50 / 1.5
    assert many.billed == pytest.approx(one.billed, rel=0.1)
    assert all(s.p50 < s.p95 and s.longest <= s.p50 for s in (one, two, many))


@given(shards=st.integers(1, 200), concurrency=st.integers(1, 50))
def test_waves(shards: int, concurrency: int) -> None:
    """Fewer functions at once never make a round faster, nor its bill larger; a round of w waves takes at least w mean functions."""
    free, bound = seconds(shards), seconds(shards, concurrency=concurrency)

    assert bound.p50 >= 0.7 * free.p50  # the last wave may be smaller, and its slowest less slow
    assert bound.billed <= free.billed  # they need not wait for each other's requests
    assert bound.p50 >= -(-shards // concurrency) * bound.billed / shards


def test_memory_brings_cpu() -> None:
    """A small function waits for its CPU, a larger one for the network; beyond that, more memory buys nothing."""
    (task,) = Sharded(shards=1).plan(manifest(64 * MB, 20), Limits(), reading=READING).tasks

    assert "CPU, which comes with memory" == bottleneck(task, 256 * MB, Speeds())
    assert "the network of a function" == bottleneck(task, 1024 * MB, Speeds())
    assert seconds(8, 256 * MB).p50 > 1.5 * seconds(8, 1024 * MB).p50
    assert seconds(8, 2048 * MB) == seconds(8, 4096 * MB)


def test_stages_add_up() -> None:
    """A tree takes the time of its levels one after another; through shared memory, less."""
    made = manifest(512 * MB, 20)
    one, two, three = (forecast_seconds(way.plan(made, reading=READING), 4 * GIB) for way in (Flat(), LambdaFLTree(), LIFLTree()))
    shared = forecast_seconds(LIFLTree(shared_memory=True).plan(made, Limits(), reading=READING), 4 * GIB)

    assert one.billed < two.billed < three.billed
    assert shared.p50 < three.p50


def test_paced_by_hand() -> None:
    """Of a thousand functions, one that reads 1 MiB of each of 100 updates waits for its requests: 99 intervals, and it writes."""
    plan = Sharded(shards=1_000).plan(manifest(1_000 * MB, 100), Limits(), reading=READING)
    known, kept = Speeds(), share(1_000)
    ((_, task),) = plan.kinds[0]
    free = task_seconds(task, GIB, known)
    written = known.latency + task.bytes_written / known.write_rate

    assert pytest.approx(99 / (0.8 * 5.5) + written) == task_seconds(task, GIB, known, kept)
    assert pytest.approx(1_000 * 100 / (free - written)) == rates(plan, GIB).gets
    assert rates(plan, GIB).gets > 60_000
    assert rates(plan, GIB).much


@given(shards=st.integers(1, 2_000), concurrency=st.integers(1, 2_000), size=st.sampled_from([MB, 100 * MB, 10_000 * MB]))
def test_borne(shards: int, concurrency: int, size: int) -> None:
    """So many functions at once as a prefix bears need not be paced, and read as they are; one more would have to be."""
    plan = Sharded(shards=min(shards, size // 4)).plan(manifest(size, 10), Limits(), reading=READING)
    most = borne((kind.task for kinds in plan.kinds for kind in kinds), GIB)
    (functions,) = at_once(plan, concurrency)

    assert rates(plan, GIB, concurrency).much == (functions > most)
    if functions <= most:
        assert READING == suited(plan, GIB, concurrency)


@given(
    divide=st.sampled_from([Sharded(), LambdaFLTree(), LIFLTree(), ShardedTree()]),
    size=st.sampled_from([4_000, MB, 100 * MB, 10_000 * MB]),
    clients=st.integers(2, 200),
    memory=st.sampled_from([256 * MB, GIB, 10 * GIB]),
    concurrency=st.integers(1, 2_000),
)
def test_gets_bind(divide: Topology, size: int, clients: int, memory: int, concurrency: int) -> None:
    """Of two inputs or more, functions come nearer to the limit of GETs than to that of PUTs."""
    asked = rates(divide.plan(manifest(size, clients), reading=READING), memory, concurrency)

    assert asked.gets / GETS > asked.puts / PUTS


def test_suited() -> None:
    """Where a thousand functions would be paced, they ask for more at a time, as far as their memory goes, and are as fast as one alone."""
    plan = Sharded(shards=1_000).plan(manifest(32_000 * MB, 20), Limits(), reading=READING)
    roomy = suited(plan, 1_769 * MB, 1_000)
    alone = forecast_seconds(plan, 1_769 * MB, 100).billed
    paced, larger = (forecast_seconds(plan.replace(reading=reading), 1_769 * MB, 1_000) for reading in (READING, roomy))

    assert 8_900 < rates(plan, 1_769 * MB).gets < 9_000
    assert paced.billed > 1.8 * alone
    assert larger.billed < 1.01 * alone
    assert rates(plan.replace(reading=roomy), 1_769 * MB).gets < 4_500
    assert paced.p50 > 1.8 * larger.p50
    assert READING == suited(plan, 1_769 * MB, None)  # nobody knows how many there are
    assert STREAM == suited(plan.replace(reading=STREAM), 1_769 * MB, 1_000)


@pytest.mark.parametrize("more", [0, 40 * MB, 400 * MB])
def test_suited_to_the_memory(more: int) -> None:
    """What functions ask for at a time is no more than they have memory for, and with more of it they are no slower."""
    plan = Sharded(shards=1_000).plan(manifest(128_000 * MB, 20), Limits(), reading=READING)
    memory = plan.memory + RUNTIME + more
    chosen = plan.replace(reading=suited(plan, memory, 1_000))

    assert plan.reading != chosen.reading
    assert chosen.memory <= memory - RUNTIME
    assert forecast_seconds(plan, memory, 1_000).p50 > forecast_seconds(chosen, memory, 1_000).p50


def test_levels_have_shares_of_their_own() -> None:
    """The few functions that bring partial sums together do not keep to the share of the many that wrote them."""
    plan = ShardedTree(shards=100, fan_in=10).plan(manifest(3_000 * MB, 100), Limits(), reading=READING)

    assert [1_000, 100] == at_once(plan)
    assert [700, 100] == at_once(plan, 700)


def test_slowest() -> None:
    """The slowest of more functions is slower; one alone is as fast as it is."""
    assert 1 == slowest(1, 0.5)
    assert sorted(found := [slowest(n, 0.2) for n in (1, 2, 5, 100)]) == found


def test_measured_rounds_are_predicted() -> None:
    """Each wall time of others that is known is met within 15 %, with one bandwidth for each of their campaigns."""
    found = calibration.calibrate(Speeds())

    assert 14 == len(found["points"])
    assert found["largest_residual"] <= calibration.TARGET
    committed = json.loads(RESULT.read_text())
    assert [p["residual"] for p in committed["points"]] == pytest.approx([p["residual"] for p in found["points"]])


def test_published_prices() -> None:
    """The prices published of six rounds come out to the cent, in both accountings; functions' mean is a fraction of the slowest's time."""
    rows = calibration.costs()

    assert 6 == len(rows)
    for row in rows:
        assert (row["agg_only_published"], row["round_trip_published"]) == (row["agg_only"], row["round_trip"])
        assert 0.75 < row["of_the_slowest"] < 1
