"""How far does it go: what do 100,000 clients and models of a terabyte take, and how long does the planner take to say so?

Modelled; nothing here runs on AWS. The planner's own times are measured, on this machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from gradsharding import Limits, Plan, Sharded, ShardedTree
from gradsharding.advice.planner import Needs, recommend
from gradsharding.advice.prices import load_prices
from gradsharding.planning.platform import READING
from measure import machine, save, verdict
from modelled import manifest

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
CONFIG = HERE / "configs" / "scale.json"
RESULTS = HERE / "results" / "scale.json"

TARGET = 2.0
"""Target, in seconds, for a plan of 10,000 functions."""


def round_of(nbytes: int, clients: int, concurrency: int) -> dict[str, Any]:
    """Plan a round the best way, and give the reason against each other topology."""
    made = manifest(nbytes, clients)
    started = time.perf_counter()
    advice = recommend(made, Needs(concurrency=concurrency, on_aws=True), prices=load_prices())
    seconds = time.perf_counter() - started
    against = {option.name: option.problem for option in advice.options if option.problem}
    row = {"bytes": nbytes, "clients": clients, "concurrency": concurrency, "planned_in": seconds, "against": against}
    if not (best := advice.best):
        return {**row, "topology": None}
    return {
        **row,
        "topology": best.name,
        "shards": len(best.plan.slices),
        "fan_ins": best.plan.fan_ins,
        "functions": best.plan.functions,
        "waves": best.waves,
        "function_memory": best.memory,
        "gets": best.plan.gets,
        "puts": best.plan.puts,
        "bytes_read": best.plan.bytes_read,
        "p50": best.forecast.seconds.p50,
        "p95": best.forecast.seconds.p95,
        "usd_aggregation": f"{best.usd:f}",
        "usd_round_trip": f"{best.forecast.cost.round_trip.usd:f}",
        "binds": best.limited_by,
    }


def planning() -> dict[str, float]:
    """Time a plan of about 10,000 functions, sharded and as a tree, with all its figures."""
    found = {}
    few, many = manifest(10**12, 100), manifest(10**11, 2_000)
    makers: dict[str, Callable[[], Plan]] = {
        "sharded, 9,999 functions": lambda: Sharded(shards=9_999).plan(few, Limits(), reading=READING),
        "sharded-tree, 10,010 functions": lambda: ShardedTree(shards=910, fan_in=200).plan(many, Limits(), reading=READING),
    }
    for name, make in makers.items():
        started = time.perf_counter()
        plan = make()
        assert plan.memory + plan.gets + plan.puts + plan.bytes_read + plan.bytes_written
        found[name] = time.perf_counter() - started
        started = time.perf_counter()
        assert len(plan.tasks) == plan.functions
        found[f"{name}, its tasks made"] = time.perf_counter() - started
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time and price by the number of clients, one line per model size."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for nbytes in sorted({row["bytes"] for row in rows}):
        line = [row for row in rows if row["bytes"] == nbytes and row["topology"]]
        clients = [row["clients"] for row in line]
        axes[0].loglog(clients, [row["p50"] for row in line], "o-", label=f"{nbytes / 1e9:g} GB")
        axes[1].loglog(clients, [float(row["usd_aggregation"]) for row in line], "o-")
    axes[0].set(xlabel="clients", ylabel="seconds a round, p50", title="time (modelled, 1,000 functions at once)")
    axes[1].set(xlabel="clients", ylabel="US dollars a round, aggregation", title="price (modelled)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Plan, print, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    rows = [round_of(nbytes, clients, config["concurrency"]) for nbytes in config["bytes"] for clients in config["clients"]]
    table = Table("model", "clients", "topology", "functions", "waves", "p50", "$ aggregation", "binds", "planned in")
    for row in rows:
        figures = ("", "", "", "", "; ".join(f"{name}: {why}" for name, why in row["against"].items()))
        if row["topology"]:
            price = f"{float(row['usd_aggregation']):,.4f}"
            figures = (f"{row['functions']:,}", str(row["waves"]), f"{row['p50']:,.0f} s", price, row["binds"])
        who = (f"{row['bytes'] / 1e9:g} GB", f"{row['clients']:,}", row["topology"] or "none fits")
        table.add_row(*who, *figures, f"{row['planned_in']:.2f} s")
    console = Console(width=170)
    console.print(table)
    planned = planning()
    for name, seconds in planned.items():
        console.print(f"{name}: {seconds:.2f} s")
    slowest = max(seconds for name, seconds in planned.items() if "made" not in name)
    console.print(f"target: a plan of 10,000 functions in {TARGET:g} s; the slowest took {slowest:.2f} s: {verdict(slowest <= TARGET)}")
    question = (__doc__ or "").splitlines()[0]
    save(
        options.output,
        {"question": question, "machine": machine(["gradsharding"]), "config": config, "rounds": rows, "planning_seconds": planned},
    )
    draw(rows, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
