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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gradsharding import (
    DirectoryStore,
    Executor,
    Flat,
    FuturesExecutor,
    LambdaFLTree,
    LIFLTree,
    Limits,
    ProcessExecutor,
    Round,
    Sharded,
    ShardedTree,
    aggregate,
)
from gradsharding.planning.topologies import Topology
from gradsharding.sizes import size
from gradsharding.usage import total
from measure import Range, machine, save, shown
from pools import KINDS, pool, workers

RESULTS = Path(__file__).parent / "results" / "topologies.json"

TOPOLOGIES: dict[str, Topology] = {
    "flat": Flat(),
    "sharded": Sharded(),
    "lambda-fl": LambdaFLTree(),
    "lifl, through the store": LIFLTree(),
    "lifl, through shared memory": LIFLTree(shared_memory=True),
    "sharded-tree": ShardedTree(),
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
    plan, reports, asked = result.plan, result.reports, total(result.usage)  # before the result is read, to compare it
    figures = {
        "digest": result.digest(),
        "seconds": seconds,
        "cpu_seconds": None if any(r.cpu_seconds is None for r in reports) else sum(r.cpu_seconds or 0 for r in reports),
        "peak_memory": result.peak_memory,
        "unmeasured": result.unmeasured,
        "projected_memory": plan.memory,
        "functions": plan.functions,
        "widths": plan.widths,
        "shards": len(plan.slices),
        **asked.model_dump(),
        "workers": len({report.worker for report in reports}),
    }
    for figure in ("gets", "puts", "bytes_read", "bytes_written"):
        assert figures[figure] <= getattr(plan, figure), f"{name}: {figures[figure]} {figure} were counted, {getattr(plan, figure)} planned"
    store.delete([*(key for key, _ in store.list(round_.key(""))), round_.output])
    return figures


def compare(store: DirectoryStore, nbytes: int, clients: int, executor: Executor, repetitions: int) -> Figures:
    """Run all topologies in turn, ``repetitions`` times."""
    weights, limits = contribute(store, nbytes, clients), Limits(memory=1 << 34)
    runs: dict[str, list[Figures]] = {name: [] for name in TOPOLOGIES}
    run("sharded", 0, store, weights, executor, limits)  # warms workers and the page cache
    for repetition in range(repetitions):
        for i, name in enumerate(TOPOLOGIES):
            runs[name].append(run(name, 1 + repetition * len(TOPOLOGIES) + i, store, weights, executor, limits))
    (digest,) = {figures["digest"] for repeated in runs.values() for figures in repeated}
    least = min(Range.of(figures["seconds"] for figures in repeated).median for repeated in runs.values())
    found = {}
    for name, repeated in runs.items():
        seconds = Range.of(figures["seconds"] for figures in repeated)
        measured = {"seconds": seconds.__dict__, **observed(repeated)}
        found[name] = {**repeated[0], **measured, "of_the_fastest": seconds.median / least}
        del found[name]["digest"]
    return {"digest": digest, "topologies": found}


def observed(runs: list[Figures]) -> Figures:
    """Return the CPU time of repetitions as a range, and the largest peak; None for a figure that the pool's processes cannot measure."""
    cpu, peaks = ([figures[name] for figures in runs] for name in ("cpu_seconds", "peak_memory"))
    return {"cpu_seconds": None if None in cpu else Range.of(cpu).__dict__, "peak_memory": None if None in peaks else max(peaks)}


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
    """Open an executor, ours on this machine or one over a pool; yield it with the number of tasks that run at once."""
    if spec is None:
        yield ProcessExecutor(), len(os.sched_getaffinity(0))
    else:
        with pool(spec) as opened:
            yield FuturesExecutor(opened), workers(opened)


def _show(found: Figures, console: Console) -> None:
    table = Table(
        "topology", "functions", "time, median", "of the fastest", "CPU", "peak of a function", "projected", "GETs", "PUTs", "read"
    )
    for name, row in found["topologies"].items():
        table.add_row(
            name,
            f"{row['functions']} ({'+'.join(map(str, row['widths']))} × {row['shards']})",
            f"{row['seconds']['median']:.2f} s",
            f"{row['of_the_fastest']:.2f}",
            shown(row["cpu_seconds"] and row["cpu_seconds"]["median"], 1, ".2f", "s"),
            shown(row["peak_memory"], 2**20, ",.0f", "MiB"),
            f"{row['projected_memory'] / 2**20:,.0f} MiB",
            str(row["gets"]),
            str(row["puts"]),
            f"{row['bytes_read'] / 1e6:,.0f} MB",
        )
    console.print(table)
    for why in sorted({row["unmeasured"] for row in found["topologies"].values() if row["unmeasured"]}):
        console.print(f"– a function's peak is not known: {why}; without --pool, each is measured")


def main() -> None:
    """Compare, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default="64MB", help="of an update")
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
