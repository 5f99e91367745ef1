"""How fast and how lean does one function read and average its slice from S3, beside what its client could read at all?

A real S3 server (Ceph) on this machine; latency and rates are injected by a path to it, a process of its own. In each
repetition the rivals take turns on the same updates:

ours     read ahead by ranged requests, fold in float64, write one part
raw      the same requests with the same client, thrown away
serial   ``get_object().read()`` of one whole object after another, and ``np.add``
obstore  the requests of raw with another client, written in Rust
"""

import argparse
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from gradsharding import Limits, Round
from gradsharding.aws.s3.store import S3Store
from gradsharding.planning.plan import Plan
from gradsharding.planning.task import Job
from gradsharding.planning.topologies import Flat
from measure import Range, in_fresh_process, machine, save, verdict
from rigs.proxy import slow_path
from rigs.s3 import ceph_missing, ceph_server
from s3_rivals import RIVALS

Figures = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "s3_worker.json"

CLIENTS, UPDATE = 20, 128_000_000

PER_CONNECTION = 90e6
"""Bytes/s of one connection to S3, about; ``LAMBDA`` is the rate that a function is reported to reach over all its connections."""

LAMBDA = 75e6

RAW_TARGET, SERIAL_TARGET = 0.85, 2.0


class Route(NamedTuple):
    """A path to the server; seconds, bytes/s."""

    name: str
    latency: float
    per_connection: float
    total: float


ROUTES = (
    Route("loopback, direct", 0.0, math.inf, math.inf),
    *(Route(f"{latency} ms, 90 MB/s a connection", latency / 1000, PER_CONNECTION, math.inf) for latency in (0, 20, 100)),
    *(Route(f"{latency} ms, 90 MB/s a connection, 75 MB/s in all", latency / 1000, PER_CONNECTION, LAMBDA) for latency in (0, 20, 100)),
)


def prepare(clients: int, nbytes: int) -> tuple[Round, Plan]:
    """Write updates of different random numbers; plan one function for all of it."""
    round_, draw = Round.create(S3Store(f"s3://{os.environ['BUCKET']}/bench"), "r"), np.random.default_rng(0)
    for i in range(clients):
        round_.submit(f"client-{i:02d}", {"w": draw.standard_normal(nbytes // 4, np.float32)}, i + 1)
    return round_, Flat().plan(round_.seal(), Limits(memory=4 << 30), reading=round_.store.reading)


def compete(round_: Round, plan: Plan, directory: Path, repetitions: int) -> dict[str, dict[str, list[Figures]]]:
    """Run each rival once in each repetition on each route; a different rival goes first each time."""
    names, found = [*RIVALS], {route.name: {name: list[Figures]() for name in RIVALS} for route in ROUTES}
    for i in range(repetitions):
        for route in ROUTES:
            print(f"repetition {i + 1} of {repetitions}: {route.name}", flush=True)
            with via(route):
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    found[route.name][name].append(run(name, round_, plan, directory))
    return found


@contextlib.contextmanager
def via(route: Route) -> Iterator[None]:
    """Set the environment so that requests take a route."""
    direct = os.environ["AWS_ENDPOINT_URL_S3"]
    if route.latency or route.per_connection < math.inf:
        with slow_path(direct, latency=route.latency, per_connection=route.per_connection, total=route.total) as endpoint:
            os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
            try:
                yield
            finally:
                os.environ["AWS_ENDPOINT_URL_S3"] = direct
    else:
        yield


def run(name: str, round_: Round, plan: Plan, directory: Path) -> Figures:
    """Run one rival once, in a fresh process, in an upload of its own."""
    upload = round_.store.begin(round_.output)
    job = Job(store=round_.store.url, output=round_.output, upload=upload, terms=plan.terms)
    (task,), path = plan.tasks, directory / "task.json"
    path.write_text(json.dumps({"job": job.model_dump(mode="json"), "task": task.model_dump(mode="json")}))
    try:
        return in_fresh_process([str(Path(__file__).parent / "s3_rivals.py"), name, str(path)])
    finally:
        round_.store.abort(round_.output, upload)


def summarise(runs: dict[str, list[Figures]], nbytes: int) -> Figures:
    """Summarize each rival: median rate of reading (without writing), seconds in all, memory in slices; and ratios of medians."""
    found = {
        name: {
            "read_rate": asdict(Range.of(run["bytes"] / (run["seconds"] - run["write_seconds"]) for run in figures)),
            "seconds": asdict(Range.of(run["seconds"] for run in figures)),
            "grown": asdict(Range.of(run["grown"] for run in figures)),
            "grown_slices": max(run["grown"] for run in figures) / nbytes,
        }
        for name, figures in runs.items()
    }
    rates = {name: rival["read_rate"]["median"] for name, rival in found.items()}
    return {
        "rivals": found,
        "ours_of_raw": rates["ours"] / rates["raw"],
        "ours_of_serial": found["serial"]["seconds"]["median"] / found["ours"]["seconds"]["median"],
        "obstore_of_raw": rates["obstore"] / rates["raw"],
    }


def show(figures: Figures) -> None:
    """Print the comparison as a table."""
    console = Console(width=140, highlight=False)
    ratios = ("ours of raw", "ours of serial", "obstore of raw")
    table = Table("", *RIVALS, *ratios, title=figures["setup"]["title"], caption="MB/s read, median")
    for name, route in figures["routes"].items():
        rates = [f"{route['rivals'][rival]['read_rate']['median'] / 1e6:.0f}" for rival in RIVALS]
        table.add_row(name, *rates, *(f"{route[ratio.replace(' ', '_')]:.2f}" for ratio in ratios))
    console.print(table)
    for quantity, target in figures["targets"].items():
        console.print(f"{quantity}: {target['found']:.3f}, {target['wanted']}: {verdict(target['met'])}")


def targets(routes: dict[str, Figures], plan: Plan) -> Figures:
    """Compare the figures with their targets."""
    (task,) = plan.tasks
    allowed = 8 * task.nbytes // 4 + (task.reading.parallel + 2) * task.reading.piece(task.nbytes)
    least = min(routes.values(), key=lambda route: float(route["ours_of_raw"]))["ours_of_raw"]
    at_20 = routes["20 ms, 90 MB/s a connection"]["ours_of_serial"]
    grown = max(route["rivals"]["ours"]["grown"]["most"] for route in routes.values())
    serial = max(route["rivals"]["serial"]["grown_slices"] for route in routes.values())
    room = 8 << 20  # blocks of the fold, stages of the connections
    return {
        "rate beside raw requests, the worst route": {"found": least, "wanted": f"at least {RAW_TARGET}", "met": least >= RAW_TARGET},
        "time of serial beside ours at 20 ms": {"found": at_20, "wanted": f"at least {SERIAL_TARGET}", "met": at_20 >= SERIAL_TARGET},
        "memory in accumulators and buffers": {
            "found": grown / allowed,
            "wanted": f"at most 1, and {room >> 20} MiB for blocks",
            "met": grown <= allowed + room,
        },
        "memory of serial in slices": {"found": serial, "wanted": "about 3, for comparison", "met": serial >= 2.5},
    }


def main() -> None:
    """Start the server, write the updates, run the rivals, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="use small updates, to check that the script works; the figures mean nothing")
    parser.add_argument("--output", type=Path, help="the JSON file to write (default: results/s3_worker.json, none if --quick)")
    options = parser.parse_args()
    if why := ceph_missing():
        raise SystemExit(f"{why} (make rig does)")
    clients, nbytes = (3, 12_000_000) if options.quick else (CLIENTS, UPDATE)
    facts = machine(["gradsharding", "numpy", "boto3", "obstore"])
    with ceph_server() as ceph, tempfile.TemporaryDirectory(prefix="gradsharding-s3-") as name:
        os.environ.update(ceph.server.environment(), BUCKET=ceph.server.make_bucket())
        round_, plan = prepare(clients, nbytes)
        runs = compete(round_, plan, Path(name), options.repetitions)
    title = f"one function, {clients} updates of {nbytes / 1e6:.0f} MB on Ceph, {options.repetitions} repetitions"
    routes = {route.name: summarise(runs[route.name], plan.tasks[0].nbytes) for route in ROUTES}
    reading = plan.tasks[0].reading
    figures = {
        "question": (__doc__ or "").partition("\n")[0],
        "setup": {"title": title, "clients": clients, "bytes": nbytes, "chunk": reading.chunk, "parallel": reading.parallel},
        "machine": facts,
        "routes": routes,
        "targets": targets(routes, plan),
    }
    show(figures)
    if output := options.output or (None if options.quick else RESULTS):
        save(output, figures)


if __name__ == "__main__":
    main()
