"""From which model size on is sharding cheaper than a tree, and what of the paper's three claims holds, under which assumption?

Modelled, with list prices and the time model of ``calibration.py``; nothing here runs on AWS. Each claim of arXiv 2604.22072
is held against its own measurements, against the model with the paper's layout and loop, and against this engine.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from gradsharding import Limits
from gradsharding.advice.cost import Cost
from gradsharding.advice.planner import Needs, recommend
from gradsharding.advice.prices import load_prices
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Plan
from gradsharding.planning.platform import ACCOUNT_CONCURRENCY, GRAIN, LARGEST_OBJECT, MEMORY, READING, RUNTIME
from gradsharding.planning.topologies import LambdaFLTree, Sharded
from measure import machine, save
from modelled import MB, manifest
from paper.model import PaperPlan
from paper.model import planned as in_paper

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
CONFIG = HERE / "configs" / "crossover.json"
RESULTS = HERE / "results" / "crossover.json"

Price = Callable[[int, int], Decimal | None]
"""Price of a round in US dollars, from its bytes and clients; None if no function has enough memory."""

CLAIMED_CROSSING = 492
"""MiB from which on the paper has sharding cheaper: its projection, N=50."""

NEAR = 0.2
"""A figure within this of a claim is as claimed."""

CAPS = (3008, 10240)
"""MiB of a function: the limit of the paper's account, and AWS's own limit."""


def paper_price(topology: str, accounting: str, shards: int | None = None) -> Price:
    """Price the paper's layout and loop, with the memory that it provisions."""
    prices = load_prices()

    def price(nbytes: int, clients: int) -> Decimal | None:
        plan = in_paper(topology, manifest(nbytes, clients), shards)
        return None if plan.provisioned > MEMORY[-1] else _sum(plan.cost(prices, plan.provisioned), accounting)

    return price


def engine_price(topology: str, accounting: str, shards: int | None = None) -> Price:
    """Price this engine, each topology at its best, or with ``shards``."""
    prices, needs = load_prices(), Needs(architecture="x86_64", concurrency=ACCOUNT_CONCURRENCY, on_aws=True)

    def price(nbytes: int, clients: int) -> Decimal | None:
        (option,) = recommend(manifest(nbytes, clients), needs, prices=prices, topologies=(topology,), shards=shards).options
        return None if option.memory > needs.memory else _sum(option.forecast.cost, accounting)

    return price


class Crossing(NamedTuple):
    """The model size from which on one way is cheaper than another, in MiB: between two sizes, of which one may be 0 or infinite."""

    least: float
    most: float

    def __str__(self) -> str:
        if self.least == 0:
            return f"below {self.most:.0f}"
        return f"beyond {self.least:.0f}" if math.isinf(self.most) else f"{self.most:.0f}"


def cheaper(price: Decimal | None, other: Decimal | None) -> bool:
    """Return whether a price is lower than another; None, for which no function has enough memory, is higher than any."""
    return price is not None and (other is None or price < other)


def crossing(price: Price, other: Price, clients: int, sizes: Sequence[int]) -> Crossing:
    """Find the size from which on ``price`` is lower than ``other``."""
    wins = [cheaper(price(size, clients), other(size, clients)) for size in sizes]
    if all(wins):
        return Crossing(0, sizes[0] / MB)
    if not wins[-1]:
        return Crossing(sizes[-1] / MB, math.inf)
    place = max(i for i, yes in enumerate(wins) if not yes)
    low, high = sizes[place], sizes[place + 1]
    while high / low > 1.01:
        middle = int(math.sqrt(low * high))
        low, high = (low, middle) if cheaper(price(middle, clients), other(middle, clients)) else (middle, high)
    return Crossing(low / MB, high / MB)


Row = dict[str, Any]


def crossings(config: dict[str, Any]) -> list[Row]:
    """Find all crossings: the layouts, the accountings, the numbers of clients."""
    sizes = [int(mb * MB) for mb in config["sizes_mb"]]
    found = []
    for clients in config["clients"]:
        for accounting in ("aggregation", "round trip"):
            row: Row = {"clients": clients, "accounting": accounting}
            for tree in ("lambda-fl", "lifl"):
                sharded = paper_price("paper", accounting, config["paper_shards"])
                row[f"paper: {tree}"] = crossing(sharded, paper_price(tree, accounting), clients, sizes)
                ours = engine_price("sharded", accounting, config.get("engine_shards"))
                row[f"ours: {tree}"] = crossing(ours, engine_price(tree, accounting), clients, sizes[:: config["coarse"]])
            found.append(row)
    return found


def published() -> dict[tuple[str, str], dict[str, Any]]:
    """Give the rounds whose prices the paper publishes, by model and topology; N=20."""
    points = json.loads((HERE / "configs" / "paper.json").read_text())["points"]
    return {(p["model"], p["topology"]): p for p in points if "round_trip" in p}


def published_crossing(tree: str) -> float:
    """Where the paper's own measured prices cross, in MiB: on the line between its two sizes, in logarithms, N=20, round trip."""
    points = published()
    price = {where: math.log(float(p["round_trip"])) for where, p in points.items()}
    size = {model: math.log(4 * p["parameters"] / MB) for (model, _), p in points.items()}
    small, large = "ResNet-18", "VGG-16"
    gaps = {model: price[model, "paper"] - price[model, tree] for model in (small, large)}
    return math.exp(size[small] + (size[large] - size[small]) * gaps[small] / (gaps[small] - gaps[large]))


def largest(plan: Callable[[int], Plan | PaperPlan | None], memory: int) -> float:
    """Find the largest model, in MiB, whose plan fits into functions of ``memory`` bytes, and that S3 takes as one object."""
    low, high = MB, LARGEST_OBJECT
    while high - low > MB:
        middle = (low + high) // 2
        made = plan(middle)
        low, high = (middle, high) if made and made.memory + RUNTIME <= memory else (low, middle)
    return low / MB


def starts(found: Mapping[str, Crossing], claimed: float) -> str:
    """Say whether sharding is the cheaper from a claimed size on, in which cases, and whether it begins there."""
    holds = [name for name, crossing in found.items() if crossing.most <= claimed * (1 + NEAR)]
    near = [name for name in holds if found[name].most >= claimed * (1 - NEAR) and found[name].least > 0]
    late = [f"{name} ({crossing} MiB)" for name, crossing in found.items() if name not in holds]
    if not holds:
        return f"does not hold: the crossing lies later in each case: {', '.join(late)}"
    where = "in each case" if not late else f"in {len(holds)} of {len(found)} cases, and later in {', '.join(late)}"
    begins = f"; it begins near there in {', '.join(near)}" if near else ", but it begins well below"
    return f"{'holds' if not late else 'holds in part'}: from about {claimed:.0f} MiB on sharding is cheaper than λ-FL {where}{begins}"


def ratio(found: Mapping[str, float], claimed: Mapping[str, float]) -> str:
    """Say whether sharding is as many times cheaper as claimed: ``found`` is the other's price by its own, of each case."""
    reached = [name for name, times in found.items() if times >= claimed[name] * (1 - NEAR)]
    less = [f"{times:.2f} times in {name}" for name, times in found.items() if name not in reached and times > 1]
    loses = [f"{name}, where it {_loss(times)}" for name, times in found.items() if times <= 1]
    verdict = "holds" if len(reached) == len(found) else "does not hold" if not reached else "holds in part"
    parts = [f"as claimed in {', '.join(reached)}"] if reached else []
    parts += [f"cheaper, but less so: {', '.join(less)}"] if less else []
    parts += [f"not cheaper in {', '.join(loses)}"] if loses else []
    return f"{verdict}: {'; '.join(parts)}"


def _loss(times: float) -> str:
    return f"costs {1 / times:.2f} times as much" if times else "cannot be deployed"


def ceiling(sharded: Mapping[str, float], trees: Mapping[str, float]) -> str:
    """Say whether sharding fits where trees do not: the largest models of each, in MiB, of each case."""
    wins = [f"{trees[name]:,.0f} MiB in {name}" for name in sharded if sharded[name] > trees[name]]
    loses = [f"{name} ({sharded[name]:,.0f} MiB, and trees {trees[name]:,.0f})" for name in sharded if sharded[name] <= trees[name]]
    if not wins:
        return f"does not hold: sharding ends no later than trees in {', '.join(loses)}"
    return f"{'holds in part' if loses else 'holds'}: beyond {', '.join(wins)}" + (f"; not in {', '.join(loses)}" if loses else "")


LAYOUTS = {"the paper's layout": "paper", "this engine": "ours"}
"""The paper's objects and loop, and ours, with their names in the rows."""

ACCOUNTINGS = {"round trip": "round_trip", "aggregation": "agg_only"}
"""The accountings, with their names in the paper's figures."""


def claims(found: list[Row], config: dict[str, Any]) -> list[dict[str, str]]:
    """Compare each claim with the published and the modelled figures; each verdict is computed from the figures beside it."""
    return [cheaper_from(found, config), times_cheaper(config), deployable(config)]


def cheaper_from(rows: list[Row], config: dict[str, Any]) -> dict[str, str]:
    """From which size on is sharding cheaper than λ-FL?"""
    twenty = {row["accounting"]: row for row in rows if row["clients"] == 20}
    found = {_case(layout, a): twenty[a][f"{who}: lambda-fl"] for layout, who in LAYOUTS.items() for a in ACCOUNTINGS}
    smallest = config["sizes_mb"][0]
    needs, shards = Needs(concurrency=ACCOUNT_CONCURRENCY, on_aws=True), config.get("engine_shards")
    (best,) = recommend(manifest(int(smallest * MB), 20), needs, topologies=("sharded",), shards=shards).options
    slices = f"; at {smallest} MiB its best has {len(best.plan.slices)} slice" + "s" * (len(best.plan.slices) > 1)
    return {
        "claim": "sharding is cheaper from about 500 MB on",
        "paper": f"{CLAIMED_CROSSING} MiB in its projection (N=50, no transfer from S3 in the Lambda time); its measured prices "
        f"(N=20, round trip) cross at {published_crossing('lambda-fl'):.0f} MiB against λ-FL and {published_crossing('lifl'):.0f} "
        "MiB against LIFL",
        **_columns(lambda layout: _each(layout, lambda case: f"{found[case]} MiB") + slices * (layout == "this engine")),
        "verdict": f"{starts(found, CLAIMED_CROSSING)} (20 clients)",
    }


def times_cheaper(config: dict[str, Any]) -> dict[str, str]:
    """How many times cheaper is sharding than λ-FL at VGG-16?"""
    nbytes, shards, known = int(config["vgg_mb"] * MB), config["paper_shards"], published()
    trees = {"the paper's layout": paper_price, "this engine": engine_price}
    slices = {"the paper's layout": ("paper", shards), "this engine": ("sharded", config.get("engine_shards"))}
    theirs, ours = known["VGG-16", "lambda-fl"], known["VGG-16", "paper"]
    claimed = {a: float(theirs[key]) / float(ours[key]) for a, key in ACCOUNTINGS.items()}
    found = {}
    for layout, price in trees.items():
        name, count = slices[layout]
        for a in ACCOUNTINGS:
            found[_case(layout, a)] = _by(price("lambda-fl", a)(nbytes, 20), price(name, a, count)(nbytes, 20))
    flat = _by(paper_price("flat", "round trip")(nbytes, 20), paper_price("paper", "round trip", shards)(nbytes, 20))
    return {
        "claim": "2.7 times cheaper at VGG-16 (512 MB)",
        "paper": _each("", lambda case: f"{claimed[case.rpartition('(')[2][:-1]]:.2f}")
        + f"; {theirs['memory_mb'] / ours['memory_mb']:.2f} of it is the memory provisioned",
        **_columns(lambda layout: _each(layout, lambda case: f"{found[case]:.2f}")),
        "verdict": ratio(found, {_case(layout, a): times for layout in LAYOUTS for a, times in claimed.items()})
        + f"; one flat function, which the paper leaves out, costs {flat:.2f} times sharding",
    }


def deployable(config: dict[str, Any]) -> dict[str, str]:
    """How large a model can trees, and sharding, be deployed for?"""
    made, shards = partial(manifest, clients=20), config["paper_shards"]

    def tree(nbytes: int, _: int) -> Plan:
        return LambdaFLTree().plan(made(nbytes), Limits(), grain=GRAIN, reading=READING)

    def slices(nbytes: int, memory: int) -> Plan | None:
        return _in_slices(made(nbytes), memory, config.get("engine_shards"))

    def paper_tree(nbytes: int, _: int) -> PaperPlan:
        return in_paper("lambda-fl", made(nbytes))

    def paper_slices(nbytes: int, _: int) -> PaperPlan:
        return in_paper("paper", made(nbytes), shards)

    def most(plan: Callable[[int, int], Plan | PaperPlan | None], cap: int, room: int) -> float:
        return largest(lambda nbytes: plan(nbytes, cap * MB), cap * MB + room)

    trees, sharding = dict[str, float](), dict[str, float]()
    for cap in CAPS:
        at = f"at {cap:,} MB"
        # the paper's rule counts the runtime in: no room for it is asked for beside
        for layout, room, of_tree, of_slices in (
            ("the paper's layout", RUNTIME, paper_tree, paper_slices),
            ("this engine", 0, tree, slices),
        ):
            trees[_case(layout, at)], sharding[_case(layout, at)] = most(of_tree, cap, room), most(of_slices, cap, room)

    def sizes(of: Mapping[str, float], layout: str) -> str:
        return ", ".join(f"{of[_case(layout, f'at {cap:,} MB')]:,.0f} MiB at {cap:,} MB" for cap in CAPS)

    return {
        "claim": "only sharding can be deployed past the memory ceiling",
        "paper": "trees not deployed from 2,953 MB on, at an account cap of 3,008 MB; AWS allows 10,240 MB",
        **_columns(lambda layout: f"trees fit up to {sizes(trees, layout)}; sharding up to {sizes(sharding, layout)}"),
        "verdict": ceiling(sharding, trees),
    }


def _case(layout: str, circumstance: str) -> str:
    return f"{layout} ({circumstance})"


def _each(layout: str, text: Callable[[str], str]) -> str:
    """Write a figure for each accounting."""
    return ", ".join(f"{text(_case(layout, a))} {a}" for a in ACCOUNTINGS)


def _columns(text: Callable[[str], str]) -> dict[str, str]:
    return {"model, paper's layout": text("the paper's layout"), "model, this engine": text("this engine")}


def _by(price: Decimal | None, other: Decimal | None) -> float:
    """Divide a price by another; 0 if the other is missing, infinity if the price itself is."""
    if other is None:
        return 0.0
    return math.inf if price is None else float(price / other)


def _in_slices(round_: Manifest, memory: int, shards: int | None) -> Plan | None:
    """Cut into ``shards``, or into as many slices as the memory demands; None if that is impossible."""
    plan = Sharded(shards=1).plan(round_, Limits(), grain=GRAIN, reading=READING)
    return plan.recut(shards) if shards else plan.fitting(memory - RUNTIME)


def curves(config: dict[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Price the sizes of the figure, at 20 clients, in US dollars a thousand rounds; None where no function has the memory."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for accounting in ("aggregation", "round trip"):
        lines = {
            f"sharded, M={config['paper_shards']}, paper's layout": paper_price("paper", accounting, config["paper_shards"]),
            "λ-FL, paper's loop": paper_price("lambda-fl", accounting),
            "LIFL, paper's loop": paper_price("lifl", accounting),
            "sharded, this engine": engine_price("sharded", accounting, config.get("engine_shards")),
            "λ-FL, this engine": engine_price("lambda-fl", accounting),
        }
        found[accounting] = {
            name: [None if (usd := price(int(mb * MB), 20)) is None else 1000 * float(usd) for mb in config["figure_mb"]]
            for name, price in lines.items()
        }
    return found


def draw(config: dict[str, Any], found: dict[str, dict[str, list[float | None]]], path: Path) -> None:
    """Draw both accountings side by side; a line ends with a cross where no function has the memory for the next size."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    styles = ["C0-", "C1-", "C2-", "C0--", "C1--"]
    for axis, (accounting, lines) in zip(axes, found.items(), strict=True):
        for style, (name, values) in zip(styles, lines.items(), strict=True):
            there = [(mb, usd) for mb, usd in zip(config["figure_mb"], values, strict=True) if usd is not None]
            axis.loglog([mb for mb, _ in there], [usd for _, usd in there], style, label=name)
            if there and len(there) < len(values):
                axis.plot(*there[-1], style[:2] + "x")
        axis.axvline(500, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel="model, MiB (×: no function can hold the next)", title=f"{accounting}, N = 20 (modelled)")
    axes[0].set_ylabel("US dollars for 1,000 rounds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _sum(cost: Cost, accounting: str) -> Decimal:
    return (cost.aggregation if accounting == "aggregation" else cost.round_trip).usd


def main() -> None:
    """Model, print, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    rows = crossings(config)
    table = claims(rows, config)
    lines = curves(config)
    console = Console(width=200)
    shown = Table(*table[0], show_lines=True)
    for claim in table:
        shown.add_row(*claim.values())
    console.print(shown)
    sizes = Table(*rows[0], title="smallest model, in MiB, from which sharding is cheaper")
    for row in rows:
        sizes.add_row(*map(str, row.values()))
    console.print(sizes)
    question = (__doc__ or "").splitlines()[0]
    memory = {"largest_function_mib": MEMORY[-1] // MB, "prices": load_prices().origin}
    shown_rows = [{name: str(value) if isinstance(value, Crossing) else value for name, value in row.items()} for row in rows]
    found = {"claims": table, "crossings": shown_rows, "curves": lines}
    save(options.output, {"question": question, "machine": machine(["gradsharding"]), **memory, "config": config, **found})
    draw(config, lines, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
