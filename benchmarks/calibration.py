"""How well does the time model predict rounds that others have measured on AWS, and does the cost model give their prices?

Nothing here runs on AWS: the measured points are those of arXiv 2604.22072 (``configs/paper.json``). Each campaign of theirs
had a bandwidth of its own, which is fitted, one number a campaign; everything else is the model's defaults. ``--fit`` shows
how the defaults were found: by random search for the least of the largest residuals.
"""

import argparse
import json
import math
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradsharding.advice.cost import Bill, priced_functions
from gradsharding.advice.prices import load_prices
from gradsharding.advice.timing import Speeds
from measure import machine, save, verdict
from modelled import MB, manifest
from paper.model import PaperPlan
from paper.model import planned as in_paper

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "calibration.json"

TARGET = 0.15
"""Largest residual that is allowed, of a wall time."""

SHARED = ("latency", "spread", "fold_rate", "write_rate")
"""Parameters that all campaigns share, and ``--fit`` searches for."""

Point = dict[str, Any]


def points() -> list[tuple[Point, PaperPlan]]:
    """Give the measured points, each with the plan that was run."""
    known = json.loads((HERE / "configs" / "paper.json").read_text())
    return [(p, in_paper(p["topology"], manifest(4 * p["parameters"], known["clients"]), p.get("shards"))) for p in known["points"]]


def predicted(point: Point, plan: PaperPlan, speeds: Speeds) -> float:
    """Predict the wall time of a point, in seconds."""
    return plan.seconds(point["memory_mb"] * MB, point.get("concurrency"), speeds)[0]


def fitted(campaign: list[tuple[Point, PaperPlan]], speeds: Speeds) -> float:
    """Find the bandwidth of a campaign, in bytes a second, with the least of its largest residuals."""
    rates = [20 * MB * 1.005**i for i in range(400)]
    return min(rates, key=lambda rate: max(abs(_residual(p, plan, speeds, rate)) for p, plan in campaign))


def calibrate(speeds: Speeds) -> dict[str, Any]:
    """Hold the model against all points."""
    measured = points()
    campaigns = dict.fromkeys(p["campaign"] for p, _ in measured)
    rates = {name: fitted([(point, plan) for point, plan in measured if point["campaign"] == name], speeds) for name in campaigns}
    found = []
    for point, plan in measured:
        own = predicted(point, plan, speeds.model_copy(update={"connection_rate": rates[point["campaign"]]}))
        default = predicted(point, plan, speeds)
        found.append(
            {
                **point,
                "predicted": own,
                "residual": own / point["wall"] - 1,
                "by_default": default,
                "residual_by_default": default / point["wall"] - 1,
            }
        )
    return {
        "rates_mb_s": {name: rate / MB for name, rate in rates.items()},
        "default_rate_mb_s": speeds.connection_rate / MB,
        "points": found,
        "largest_residual": max(abs(p["residual"]) for p in found),
        "largest_residual_by_default": max(abs(p["residual_by_default"]) for p in found),
    }


def costs() -> list[dict[str, Any]]:
    """Reckon the prices of the rounds whose prices are published, in both accountings.

    Seconds of single functions are not published where these points come from, but for the whole round and its phases; so
    they follow from the price of the aggregation, and are held against the measured phases. The round trip's price is then predicted.
    """
    prices, found = load_prices(), []
    for point, plan in points():
        if "agg_only" not in point:
            continue
        given, memory = Decimal(point["agg_only"]) / 1000, Decimal(point["memory_mb"]) / 1024
        requests = plan.priced(Bill(items=()), prices, hours=0)
        seconds = (given - requests.aggregation.usd) / prices.lambda_second("x86_64") / memory
        functions = priced_functions(seconds * memory, 0, prices, "x86_64")
        cost = plan.priced(functions, prices, hours=0)
        # the paper counts one GET for each object of a client's download
        trips = Bill(items=tuple(item for item in cost.round_trip.items if item.name == "clients' PUTs")).usd
        reads = plan.clients * plan.objects * prices.usd("s3_get")
        slowest = point.get("phases") or [point["wall"]]
        at_most = sum(width * len(plan.slices) * phase for width, phase in zip(plan.widths, slowest, strict=True))
        found.append(
            {
                "model": point["model"],
                "topology": point["topology"],
                "agg_only": f"{1000 * cost.aggregation.usd:.3f}",
                "agg_only_published": point["agg_only"],
                "round_trip": f"{1000 * (cost.aggregation.usd + trips + reads):.2f}",
                "round_trip_published": point["round_trip"],
                "function_seconds": float(seconds),
                "of_the_slowest": float(seconds) / at_most,
            }
        )
    return found


def search(steps: int) -> dict[str, float]:
    """Find the shared parameters by random search from the defaults; rates of the campaigns go along."""
    draw = random.Random(1)
    best = {name: getattr(Speeds(), name) for name in SHARED}
    least = calibrate(Speeds(**best))["largest_residual"]
    for _ in range(steps):
        tried = {name: value * math.exp(draw.gauss(0, 0.08)) for name, value in best.items()}
        if 0.03 <= tried["latency"] <= 0.1 and (found := calibrate(Speeds(**tried))["largest_residual"]) < least:
            least, best = found, tried
    return best


def _residual(point: Point, plan: PaperPlan, speeds: Speeds, rate: float) -> float:
    return math.log(predicted(point, plan, speeds.model_copy(update={"connection_rate": rate})) / point["wall"])


def _show(found: dict[str, Any]) -> None:
    table = Table("campaign", "model", "topology", "measured", "predicted", "residual", "with the default rate")
    for p in found["points"]:
        shards = f", M={p['shards']}" if "shards" in p else ""
        table.add_row(
            p["campaign"],
            p["model"],
            p["topology"] + shards,
            f"{p['wall']:.1f} s",
            f"{p['predicted']:.1f} s",
            f"{p['residual']:+.1%}",
            f"{p['residual_by_default']:+.1%}",
        )
    console = Console(width=130)
    console.print(table)
    worst = found["largest_residual"]
    console.print(
        f"largest residual {worst:.1%}, target {TARGET:.0%}: {verdict(worst <= TARGET)}; rates of the campaigns: {found['rates_mb_s']}"
    )
    table = Table("model", "topology", "aggregation, $/1k", "published", "round trip, $/1k", "published", "mean function of the slowest")
    for row in found["costs"]:
        table.add_row(
            row["model"],
            row["topology"],
            row["agg_only"],
            row["agg_only_published"],
            row["round_trip"],
            row["round_trip_published"],
            f"{row['of_the_slowest']:.2f}",
        )
    console.print(table)


def main() -> None:
    """Calibrate, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--fit", type=int, metavar="STEPS", help="search for the shared parameters, print them, and save nothing")
    options = parser.parse_args()
    if options.fit:
        print(search(options.fit))
        return
    found = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "machine": machine(["gradsharding"]),
        **calibrate(Speeds()),
        "costs": costs(),
    }
    _show(found)
    save(options.output, found)


if __name__ == "__main__":
    main()
