"""Do the bits of a mean depend on the path? Many paths to one mean, in float64 and exactly: their digests are counted.

    python benchmarks/same_bits.py

A path is drawn at random: the order of the clients, the topology with its fan-in and levels, the number of slices, how functions read, the
executor, and, where tasks run in this process, the elements that are summed in one step.
"""

import argparse
import random
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

import measure
from gradsharding import DirectoryStore, MemoryStore, ObjectStore, Round, aggregate, open_executor
from gradsharding.arithmetic import exact, fold, sums
from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule
from gradsharding.format.encode import Raw
from gradsharding.planning.topologies import Flat, LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology
from gradsharding.rounds.verify import verify
from gradsharding.stores.reading import Reading

RESULTS = Path(__file__).parent / "results" / "same_bits.json"

KINDS = {"gradients": None, "a pair that cancels, 2**25 times as large": 25, "a pair that cancels, 2**40 times as large": 40}
"""The data, by binary magnitudes by which two updates exceed the others: masks of secure aggregation, say, or an update and its recall."""

Updates = list[tuple[dict[str, npt.NDArray[Any] | Raw], int]]


class Way(NamedTuple):
    """One path to the mean."""

    order: int
    """Seed of the clients' order."""
    topology: Topology
    reading: Reading
    executor: str
    block: int


def draw_updates(kind: str, clients: int = 12, elements: int = 1_000) -> Updates:
    """Draw updates with their weights: float32, float16, bfloat16 and integers, of magnitudes that differ from element to element."""
    draw, above = np.random.default_rng(7), KINDS[kind]
    scales = 10.0 ** draw.uniform(-6, -1, elements)
    values = draw.normal(size=(clients, elements)) * scales
    weights = [int(draw.integers(50, 5_000)) for _ in range(clients)]
    if above is not None:
        values[1] = values[0] = np.ldexp(values[0], above)
        values[1] *= -1
        weights[1] = weights[0]

    def update(row: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any] | Raw]:
        single = row.astype("<f4")
        halves = np.clip(row, -60_000, 60_000).astype("<f2")
        bits = (single.view("<u4") >> 16).astype("<u2")
        counts = draw.integers(-(1 << 62), 1 << 62, 50)
        return {"f32": single, "f16": halves, "bf16": Raw("BF16", bits.shape, bits.tobytes()), "i64": counts}

    return [(update(row), weight) for row, weight in zip(values, weights, strict=True)]


def draw_way(draw: random.Random) -> Way:
    """Draw a path."""
    shards, fan_in = draw.randint(1, 9), draw.randint(1, 5)
    topologies: list[Topology] = [
        Flat(),
        Sharded(shards=shards),
        LambdaFLTree(fan_in=fan_in, levels=draw.randint(1, 4)),
        LIFLTree(fan_in=fan_in, shared_memory=draw.random() < 0.5),
        ShardedTree(shards=shards, fan_in=fan_in, levels=draw.randint(1, 4)),
    ]
    topology = draw.choice(topologies)
    executor = draw.choices(["inline", "threads:3", "processes:2"], [70, 25, 5])[0]
    reading = Reading(chunk=draw.choice([0, 640, 5_000]), parallel=draw.randint(1, 3))
    return Way(draw.randrange(1 << 30), topology, reading, executor, draw.choice([64, 500, 4_096, exact.BLOCK]))


def walk(updates: Updates, way: Way, rule: Rule, *, check: bool = False) -> tuple[str, npt.NDArray[np.uint32]]:
    """Take a path; return the result's digest and its float32 as bits. ``check`` computes all of it again with Python's integers."""
    names = [f"c{i:02d}" for i in range(len(updates))]
    random.Random(way.order).shuffle(names)

    with ExitStack() as stack:
        if way.executor == "processes:2":
            store: ObjectStore = DirectoryStore(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            store = MemoryStore()
            for module, block in ((exact, way.block), (sums, 2 * way.block), (fold, 2 * way.block)):
                stack.enter_context(patch.object(module, "BLOCK", block))
        store.reading = way.reading
        round_ = Round.create(store, "r")
        for name, (arrays, weight) in zip(names, updates, strict=True):
            round_.submit(name, arrays, weight)
        result = aggregate(round_, topology=way.topology, rule=rule, executor=open_executor(way.executor))
        if check:
            verify(round_, sample=1 << 30)
        return result.digest(), result.arrays()["f32"].view("<u4")


def compare(kind: str, combinations: int) -> dict[str, Any]:
    """Take many paths in both arithmetics; count the different digests, and measure how far float64 is from the exact mean."""
    updates, draw = draw_updates(kind), random.Random(kind)
    ways = [draw_way(draw) for _ in range(combinations)]
    digests: dict[str, Counter[str]] = {"exact": Counter(), "float64": Counter()}
    _, right = walk(updates, ways[0], ExactMean(), check=True)
    wrong = np.zeros(right.size, np.int64)
    for way in ways:
        digests["exact"][walk(updates, way, ExactMean())[0]] += 1
        digest, bits = walk(updates, way, MEAN)
        digests["float64"][digest] += 1
        wrong += bits != right
    return {
        "exact": {"digests": len(digests["exact"])},
        "float64": {
            "digests": len(digests["float64"]),
            "paths_unlike_the_most_frequent": combinations - digests["float64"].most_common(1)[0][1],
            "elements": int(wrong.size * combinations),
            "elements_not_correctly_rounded": int(wrong.sum()),
        },
        "topologies": dict(Counter(way.topology.name for way in ways)),
        "executors": dict(Counter(way.executor for way in ways)),
    }


def main() -> None:
    """Compare, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--combinations", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    figures = {
        "question": "Do the bits of a weighted mean depend on the path, in float64 and in exact arithmetic?",
        "setup": {"combinations": options.combinations, "clients": 12, "elements_of_each_dtype": 1_000},
        "machine": measure.machine(["gradsharding", "numpy"]),
        "data": {kind: compare(kind, options.combinations) for kind in KINDS},
    }
    measure.save(options.output, figures)
    for kind, found in figures["data"].items():  # type: ignore[attr-defined]
        float64 = found["float64"]
        print(
            f"{kind}: {options.combinations:,} paths; exact: {found['exact']['digests']} digest(s); float64: {float64['digests']}, "
            f"{float64['elements_not_correctly_rounded']:,} of {float64['elements']:,} float32 not correctly rounded"
        )


if __name__ == "__main__":
    main()
