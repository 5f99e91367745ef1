"""What does each topology take on the same contributions: time, CPU, bytes, requests, and memory of a function?

Every topology runs in turn on the same updates, in a directory; all is done by real processes, here or in the pool of ``--pool``.
The results of all must be the same bytes.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ByteSize, TypeAdapter
from rich.console import Console
from rich.table import Table

from gradsharding import (
    DirectoryStore,
    Executor,
    FuturesExecutor,
    Limits,
    ProcessExecutor,
    Round,
    aggregate,
    flat,
    lambda_fl,
    lifl,
    sharded,
    sharded_tree,
)
from gradsharding.plan import Plan
from measure import Range, machine, save
from pools import KINDS, pool, workers

RESULTS = Path(__file__).parent / "results" / "topologies.json"

TOPOLOGIES: dict[str, Callable[..., Plan]] = {
    "flat": flat,
    "sharded": sharded,
    "lambda-fl": lambda_fl,
    "lifl, through the store": lifl,
    "lifl, through shared memory": partial(lifl, shared_memory=True),
    "sharded-tree": sharded_tree,
}

Figures = dict[str, Any]


def contribute(store: DirectoryStore, nbytes: int, clients: int) -> dict[str, float]:
    """Write updates of random numbers, once for all topologies; give their weights by reference."""
    draw, weights = np.random.default_rng(0), dict[str, float]()
    round_ = Round.create(store, "updates")
    for i in range(clients):
        update = draw.standard_normal(nbytes // 4, np.float32)
        weights[round_.submit(f"client-{i:04d}", {"w": update}, i % 7 + 1).source] = i % 7 + 1
    return weights


def run(name: str, number: int, store: DirectoryStore, weights: dict[str, float], executor: Executor, limits: Limits) -> Figures:
    """Aggregate once, by one topology."""
    round_ = Round.create(store, f"run-{number}")
    for i, (source, weight) in enumerate(weights.items()):
        round_.refer(f"client-{i:04d}", source, weight)
    round_.seal()
    started = time.perf_counter()
    result = aggregate(round_, topology=TOPOLOGIES[name], executor=executor, limits=limits)
    seconds = time.perf_counter() - started
    plan, reports = result.plan, result.reports
    figures = {
        "digest": result.digest(),
        "seconds": seconds,
        "cpu_seconds": sum(report.cpu_seconds for report in reports),
        "peak_memory": max(report.peak_memory for report in reports),
        "projected_memory": plan.memory,
        "functions": plan.functions,
        "widths": plan.widths,
        "shards": len(plan.slices),
        "gets": sum(report.gets for report in reports),
        "puts": sum(report.puts for report in reports) + result.puts,
        "bytes_read": sum(report.bytes_read for report in reports),
        "bytes_written": sum(report.bytes_written for report in reports) + plan.header_bytes,
        "workers": len({report.worker for report in reports}),
    }
    assert (plan.gets, plan.puts, plan.bytes_read, plan.bytes_written) == tuple(
        figures[key] for key in ("gets", "puts", "bytes_read", "bytes_written")
    )
    store.delete([key for key, _ in store.list(f"rounds/{round_.id}/")])
    return figures


def compare(store: DirectoryStore, nbytes: int, clients: int, executor: Executor, repetitions: int) -> Figures:
    """Run all topologies in turn, so many times."""
    weights, limits = contribute(store, nbytes, clients), Limits(memory=1 << 34)
    runs: dict[str, list[Figures]] = {name: [] for name in TOPOLOGIES}
    run("sharded", 0, store, weights, executor, limits)  # warms workers and the page cache
    for repetition in range(repetitions):
        for i, name in enumerate(TOPOLOGIES):
            runs[name].append(run(name, 1 + repetition * len(TOPOLOGIES) + i, store, weights, executor, limits))
    (digest,) = {one["digest"] for some in runs.values() for one in some}
    least = min(Range.of(one["seconds"] for one in some).median for some in runs.values())
    found = {}
    for name, some in runs.items():
        seconds = Range.of(one["seconds"] for one in some)
        memory = max(one["peak_memory"] for one in some)
        measured = {
            "seconds": seconds.__dict__,
            "cpu_seconds": Range.of(one["cpu_seconds"] for one in some).__dict__,
            "peak_memory": memory,
        }
        found[name] = {**some[0], **measured, "of_the_fastest": seconds.median / least}
        del found[name]["digest"]
    return {"digest": digest, "topologies": found}


@contextlib.contextmanager
def place(directory: Path | None) -> Iterator[DirectoryStore]:
    """Open a store in a directory of its own, which is deleted in the end."""
    made = Path(tempfile.mkdtemp(prefix="topologies-", dir=directory))
    try:
        yield DirectoryStore(made)
    finally:
        shutil.rmtree(made)


@contextlib.contextmanager
def executor_of(spec: str | None) -> Iterator[tuple[Executor, int]]:
    """Open an executor: ours on this machine, or one over a pool; and tell how many tasks run at once."""
    if spec is None:
        yield ProcessExecutor(), len(os.sched_getaffinity(0))
    else:
        with pool(spec) as opened:
            yield FuturesExecutor(opened), workers(opened)


def _show(found: Figures, console: Console) -> None:
    table = Table(
        "topology", "functions", "time, median", "of the fastest", "CPU", "peak of a function", "projected", "GETs", "PUTs", "read"
    )
    for name, one in found["topologies"].items():
        table.add_row(
            name,
            f"{one['functions']} ({'+'.join(map(str, one['widths']))} × {one['shards']})",
            f"{one['seconds']['median']:.2f} s",
            f"{one['of_the_fastest']:.2f}",
            f"{one['cpu_seconds']['median']:.2f} s",
            f"{one['peak_memory'] / 2**20:,.0f} MiB",
            f"{one['projected_memory'] / 2**20:,.0f} MiB",
            str(one["gets"]),
            str(one["puts"]),
            f"{one['bytes_read'] / 1e6:,.0f} MB",
        )
    console.print(table)


def main() -> None:
    """Compare, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=TypeAdapter(ByteSize).validate_python, default="64MB", help="of an update")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pool", help=f"{KINDS}; by default, one worker process for each CPU, held to its memory")
    parser.add_argument("--dir", type=Path, help="a directory that all workers reach; by default, the one for temporary files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=150)
    with executor_of(options.pool) as (executor, at_once), place(options.dir) as store:
        found = compare(store, options.size, options.clients, executor, options.repetitions)
    _show(found, console)
    console.print(f"all results are the same bytes: {found['digest'][:16]}…")
    setup = {
        "bytes": options.size,
        "clients": options.clients,
        "repetitions": options.repetitions,
        "pool": options.pool,
        "at_once": at_once,
    }
    question = (__doc__ or "").splitlines()[0]
    save(options.output, {"question": question, "setup": setup, "machine": machine(["gradsharding", "numpy"]), **found})


if __name__ == "__main__":
    main()
