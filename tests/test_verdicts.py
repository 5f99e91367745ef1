"""Sentences that a figure decides say the opposite where the figure does: each is tried with figures in which we lose."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import crossover
import readme
from crossover import Crossing
from gradsharding.advice.planner import Needs, recommend
from gradsharding.advice.prices import PACKAGED, load_prices
from gradsharding.aws.deploy.commands import ALARMS
from modelled import MB, manifest

RESULTS = Path(readme.__file__).parent / "results"


def results(name: str) -> Any:
    """Give a committed result, to be altered."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            {"a": Crossing(0, 10), "b": Crossing(99, 100)},
            "holds: from about 500 MiB on sharding is cheaper than λ-FL in each case, but it begins well below",
        ),
        (
            {"a": Crossing(0, 10), "b": Crossing(440, 450)},
            "holds: from about 500 MiB on sharding is cheaper than λ-FL in each case; it begins near there in b",
        ),
        (
            {"a": Crossing(0, 10), "b": Crossing(900, 910)},
            (
                "holds in part: from about 500 MiB on sharding is cheaper than λ-FL in 1 of 2 cases, "
                "and later in b (910 MiB), but it begins well below"
            ),
        ),
        ({"a": Crossing(10_240, math.inf)}, "does not hold: the crossing lies later in each case: a (beyond 10240 MiB)"),
    ],
)
def test_where_sharding_begins_to_be_cheaper(found: dict[str, Crossing], said: str) -> None:
    """The verdict of a crossing is that of its size."""
    assert said == crossover.starts(found, 500)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"a": 2.5, "b": 3.0}, "holds: as claimed in a, b"),
        ({"a": 2.5, "b": 1.5}, "holds in part: as claimed in a; cheaper, but less so: 1.50 times in b"),
        ({"a": 1.1, "b": 1.2}, "does not hold: cheaper, but less so: 1.10 times in a, 1.20 times in b"),
        ({"a": 2.7, "b": 0.5}, "holds in part: as claimed in a; not cheaper in b, where it costs 2.00 times as much"),
        ({"a": 0.0}, "does not hold: not cheaper in a, where it cannot be deployed"),
        (
            {"a": 0.03, "b": 0.5},
            "does not hold: not cheaper in a, where it costs 33.33 times as much, b, where it costs 2.00 times as much",
        ),
    ],
)
def test_how_many_times_cheaper(found: dict[str, float], said: str) -> None:
    """A verdict of a ratio is that of the ratio."""
    assert said == crossover.ratio(found, dict.fromkeys(found, 2.7))


def test_what_can_be_deployed() -> None:
    """The verdict of the memory ceiling is that of the largest models."""
    assert "holds: beyond 800 MiB in a" == crossover.ceiling({"a": 3_000.0}, {"a": 800.0})
    assert "does not hold: sharding ends no later than trees in a (800 MiB, and trees 800)" == crossover.ceiling({"a": 800.0}, {"a": 800.0})
    assert "holds in part: beyond 800 MiB in a; not in b (7 MiB, and trees 9)" == crossover.ceiling(
        {"a": 900.0, "b": 7.0}, {"a": 800.0, "b": 9.0}
    )


def test_a_configuration_in_which_sharding_loses() -> None:
    """Tiny models in very many slices, and one slice where memory counts: none of the three claims holds, and each says so."""
    config = {"sizes_mb": [1, 2], "coarse": 1, "clients": [20], "paper_shards": 64, "engine_shards": 256, "vgg_mb": 2}
    rows = crossover.crossings(config)
    cheaper, times, deployable = crossover.cheaper_from(rows, config), crossover.times_cheaper(config), crossover.deployable(config)
    one = crossover.deployable({**config, "paper_shards": 1, "engine_shards": 1})

    assert cheaper["verdict"].startswith("does not hold: the crossing lies later in each case")
    assert "at 1 MiB its best has 256 slices" in cheaper["model, this engine"]
    assert times["verdict"].startswith("does not hold: not cheaper in the paper's layout (round trip), where it costs ")
    assert deployable["verdict"].startswith("holds: beyond")
    assert one["verdict"].startswith("does not hold: sharding ends no later than trees in ")


@pytest.mark.slow
def test_no_function_is_drawn_that_does_not_exist() -> None:
    """The figure has no price for a model that no function of Lambda could hold; sharding in many slices has one."""
    config = {"paper_shards": 4, "figure_mb": [512, 10_240, 40_960]}
    lines = crossover.curves(config)["aggregation"]

    assert [True, False, False] == [usd is not None for usd in lines["λ-FL, paper's loop"]]
    assert [True, True, False] == [usd is not None for usd in lines["sharded, M=4, paper's layout"]]
    assert [True, False, False] == [usd is not None for usd in lines["λ-FL, this engine"]]
    assert [True, True, True] == [usd is not None for usd in lines["sharded, this engine"]]


def test_advice_for_a_tiny_model() -> None:
    """The planner does not take sharding where it does not pay, and says why."""
    advice = recommend(manifest(MB // 4, 3), Needs())

    assert "flat" == min(advice.options, key=lambda option: option.usd).name
    assert advice.sentences[0].startswith("Take flat: ")
    assert "It is the cheapest, and the fastest." == advice.sentences[1]


def test_embedded_where_we_lose() -> None:
    """The sentences beside Flower follow its figures."""
    found = results("embedded")
    ours, loop = (found["rivals"][name] for name in ("ours", "numpy"))
    ours["seconds"]["median"], ours["memory"]["own"]["median"] = 10 * loop["seconds"]["median"], 4 * loop["memory"]["own"]["median"]
    for phase, seconds in {"worker start": 2.0, "read": 0.25, "fold": 0.5, "write": 0.25}.items():  # twice what a second worker saves
        ours["phases"][phase]["median"] = seconds
    found["setup"] |= {"elements": 100_000_000, "clients": 8, "workers": 2}
    text = readme.embedded(found)
    found["setup"]["workers"] = 1

    assert "workers takes" not in readme.embedded(found)
    assert "takes 0.10 of our time and 0.25 of our memory" in text
    assert "to start 2 workers takes as long as they save on 8 updates of 800 MB" in text


def test_a_server_that_grows() -> None:
    """A server's peak grows with the model, or does not, as its figures say."""
    found = results("flower_round")
    kept, grown = copy.deepcopy(found), copy.deepcopy(found)
    peak = "server_app_peak_while_training"
    kept["figures"]["direct"][peak] = kept["figures"]["direct, small model"][peak] * 1.01
    grown["figures"]["direct"][peak] = grown["figures"]["direct, small model"][peak] + 2 * grown["model_bytes"]

    assert "it does not grow with the model (within 5%)" in readme.flower_round(kept)
    assert "it grows by 2.00 bytes for each byte of the model" in readme.flower_round(grown)


def test_bits_that_differ() -> None:
    """What is said of the two kinds of sums follows the digests."""
    one, many = {"digests": 1}, {"digests": 9}

    assert "Sums in float64 gave the same bits on every path for a; b. Exact sums did for all." == readme.advice(
        {"a": {"exact": one, "float64": one}, "b": {"exact": one, "float64": one}}
    )
    assert "Sums in float64 gave the same bits on every path for a, but not for b. Exact sums did not for a." == readme.advice(
        {"a": {"exact": many, "float64": one}, "b": {"exact": one, "float64": many}}
    )
    assert "Sums in float64 did not give the same bits for b. Exact sums did for all." == readme.advice(
        {"b": {"exact": one, "float64": many}}
    )


def test_routes_on_which_we_lose() -> None:
    """What is said of reading from S3 follows the rates."""
    routes = {"near": {"ours_of_raw": 0.5, "ours_of_serial": 0.9}, "far": {"ours_of_raw": 0.9, "ours_of_serial": 3.0}}

    assert (
        "We reach 0.85 of the requests' rate on every route but near (0.50). The loop is faster on near (0.90); "
        "we gain most at far: 3.00 times the loop's speed." == readme.reached(routes)
    )
    assert readme.reached({"far": routes["far"]}).startswith(
        "We reach 0.85 of the requests' rate on every route. The loop is slower on every"
    )


def test_what_an_unused_stack_costs() -> None:
    """The page's price of a stack that nobody uses is that of the packaged price list."""
    prices = load_prices(path=PACKAGED)
    alarms, stored = ALARMS * prices.usd("alarm_month"), prices.usd("s3_gigabyte_month")
    page = (readme.HERE.parent / "deploy" / "README.md").read_text()

    assert f"| two alarms | ${alarms} |" in page
    assert f"| bucket | ${stored} for each GB |" in page


def test_a_topology_that_is_faster() -> None:
    """The fastest topology is named, whichever it is."""
    assert "sharded" == readme.fastest({"sharded": {"of_the_fastest": 1.0}, "flat": {"of_the_fastest": 1.4}})
    assert "flat; sharded takes 1.40 times as long" == readme.fastest({"sharded": {"of_the_fastest": 1.4}, "flat": {"of_the_fastest": 1.0}})
