"""How do time, CPU and memory go with the number of shards, on this machine?

The embedded default, a directory and one process for each CPU, on the same updates throughout. What many functions at once
would do to the time is for ``crossover.py`` and ``scale.py``, which model it: a machine has no more CPUs for more shards.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gradsharding import Limits, Sharded
from gradsharding.sizes import size
from measure import Range, machine, save, shown
from topologies import TOPOLOGIES, contribute, executor_of, observed, place, run

RESULTS = Path(__file__).parent / "results" / "shard_sweep.json"


def main() -> None:
    """Sweep, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default="128MB", help="of an update")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--pool", help="as in topologies.py")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = Table("shards", "time, median", "of one shard's", "CPU", "peak of a function", "projected", "GETs", "PUTs")
    found = {}
    with executor_of(options.pool) as (executor, at_once), place(None) as store:
        weights, limits = contribute(store, options.size, options.clients), Limits(memory=1 << 34)
        for i, shards in enumerate(options.shards):
            TOPOLOGIES["sweep"] = Sharded(shards=shards)
            runs = [
                run("sweep", i * (1 + options.repetitions) + j, store, weights, executor, limits) for j in range(1 + options.repetitions)
            ][1:]
            found[shards] = {**runs[0], "seconds": Range.of(figures["seconds"] for figures in runs).__dict__, **observed(runs)}
    assert 1 == len({figures.pop("digest") for figures in found.values()})
    first = found[options.shards[0]]["seconds"]["median"]
    for shards, figures in found.items():
        figures["of_the_first"] = figures["seconds"]["median"] / first
        table.add_row(
            str(shards),
            f"{figures['seconds']['median']:.2f} s",
            f"{figures['of_the_first']:.2f}",
            shown(figures["cpu_seconds"] and figures["cpu_seconds"]["median"], 1, ".2f", "s"),
            shown(figures["peak_memory"], 2**20, ",.0f", "MiB"),
            f"{figures['projected_memory'] / 2**20:,.0f} MiB",
            str(figures["gets"]),
            str(figures["puts"]),
        )
    Console(width=130).print(table)
    setup = {
        "bytes": options.size,
        "clients": options.clients,
        "repetitions": options.repetitions,
        "pool": options.pool,
        "at_once": at_once,
    }
    question = (__doc__ or "").splitlines()[0]
    save(options.output, {"question": question, "setup": setup, "machine": machine(["gradsharding", "numpy"]), "shards": found})


if __name__ == "__main__":
    main()
