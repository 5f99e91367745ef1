"""How fast one core folds: GB/s of input for float64 and exact sums, beside reading memory and copying it, in the same run.

    python benchmarks/kernel_speed.py

In each repetition every rival has its turn at every size; a turn takes some tenths of a second, over the same input again and again. The
input is made like gradients: normal, of magnitudes that differ from tensor to tensor, some of them zero.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import measure
from gradsharding.arithmetic.fold import Fold
from gradsharding.arithmetic.rules import MEAN, Cohort, ExactMean, Rule
from gradsharding.format.dtypes import Run

RESULTS = Path(__file__).parent / "results" / "kernel_speed.json"
SIZES = tuple(1 << shift for shift in (16, 18, 20, 22, 24, 26))
"""Bytes of float32 input."""
TENSOR = 8_192
"""Elements of one magnitude."""
WEIGHT, TOTAL = 317, 20_000

COHORT = Cohort(clients=TOTAL // WEIGHT, weight=TOTAL)

RULES: dict[str, Rule] = {"float64": MEAN, "exact": ExactMean()}
"""What the results call the rules."""
EXACT_AT_LEAST = 0.6
"""GB/s: what exact sums should do."""
FLOAT64_AT_LEAST = 2.0
"""Times exact: what float64, the default, should do."""

Work = Callable[[], object]
DTYPES = ("F32", "F16", "BF16")


def gradients(nbytes: int) -> npt.NDArray[np.float32]:
    """Draw float32 that is like gradients."""
    draw, count = np.random.default_rng(0), nbytes // 4
    values = draw.standard_normal(count, np.float32)
    for i in range(0, count, TENSOR):
        values[i : i + TENSOR] *= 10.0 ** draw.uniform(-6, -1)
    values[draw.random(count) < 0.05] = 0
    return values


def narrowed(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Give float32 as bytes of another dtype."""
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def rivals(values: npt.NDArray[np.float32]) -> Iterator[tuple[str, int, Work]]:
    """Give a name, the bytes that one call takes in, and the call."""
    source, copy = values, np.empty_like(values)
    yield "read", source.nbytes, lambda: np.bitwise_or.reduce(source.view("<u8"))
    yield "copy", source.nbytes, lambda: np.copyto(copy, source)
    for dtype in DTYPES:
        data = narrowed(values, dtype)
        for label, rule in RULES.items():
            name = f"{label}, {dtype}"
            fold = Fold([Run(dtype, values.size)], COHORT, rule)
            yield name, len(data), lambda fold=fold, data=data: fold.add([data], WEIGHT)  # type: ignore[misc]


def ends(values: npt.NDArray[np.float32]) -> dict[str, float]:
    """Bytes of float32 slice a second, of the steps that run once: the mean, serializing partial sums, merging them (their bytes)."""
    data, found = values.tobytes(), dict[str, float]()
    for label, rule in RULES.items():
        source, target = (Fold([Run("F32", values.size)], COHORT, rule) for _ in "ab")
        for weight in range(1, 9):
            source.add([data], weight)
            target.add([data], weight + 8)
        seconds, written = timed(source.serialize)
        nbytes = sum(memoryview(buffer).nbytes for buffer in written)
        found[f"{label}, write"] = len(data) / seconds
        found[f"{label}, merge"] = nbytes / timed(lambda target=target, written=written: target.merge(written))[0]  # type: ignore[misc]
        found[f"{label}, mean"] = len(data) / timed(target.finalize)[0]
        found[f"{label}, bytes written an element"] = nbytes / values.size
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its value."""
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


def rate(nbytes: int, work: Work, least: float) -> float:
    """Bytes per second over repeated calls that take at least ``least`` seconds in all, after one warm-up call."""
    work()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < least:
        work()
        calls += 1
    return calls * nbytes / elapsed


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="sizes of the input, in bytes")
    parser.add_argument("--seconds", type=float, default=0.2, help="least duration of one turn")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = measure.machine(["gradsharding", "numpy"])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    values = {size: gradients(size) for size in options.sizes}
    rates: dict[int, dict[str, list[float]]] = {size: {} for size in options.sizes}
    last: dict[str, list[float]] = {}
    for _ in range(options.repetitions):
        for size in options.sizes:
            for name, nbytes, work in rivals(values[size]):
                rates[size].setdefault(name, []).append(rate(nbytes, work, options.seconds))
        for name, found in ends(values[max(options.sizes)]).items():
            last.setdefault(name, []).append(found)
    ranges = {str(size): {name: vars(measure.Range.of(each)) for name, each in found.items()} for size, found in rates.items()}
    figures = {
        "question": "How many bytes of input a second does one core fold, in float64 and exactly, beside reading and copying memory?",
        "setup": {"repetitions": options.repetitions, "sizes": [*options.sizes], "seconds": options.seconds, "total": TOTAL},
        "machine": facts,
        "rates": ranges,
        "ends": {name: vars(measure.Range.of(each)) for name, each in last.items()},
    }
    figures["targets"] = targets(ranges)
    measure.save(options.output, figures)
    report(figures)


def targets(rates: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Compare each rate with its target, at the size where it is worst."""
    exact = {size: found["exact, F32"]["median"] for size, found in rates.items()}
    faster = {size: found["float64, F32"]["median"] / exact[size] for size, found in rates.items()}
    return {
        "exact, GB/s": {"found": min(exact.values()) / 1e9, "at_least": EXACT_AT_LEAST},
        "float64 of exact": {"found": min(faster.values()), "at_least": FLOAT64_AT_LEAST},
    }


def report(figures: dict[str, Any]) -> None:
    """Print a table of medians in GB/s, and the targets."""
    print(f"{'GB/s of input':>14} " + " ".join(f"{name:>14}" for name in next(iter(figures["rates"].values()))))
    for size, found in figures["rates"].items():
        print(f"{int(size) >> 10:>10} KiB " + " ".join(f"{each['median'] / 1e9:>14.2f}" for each in found.values()))
    for name, each in figures["ends"].items():
        print(f"{name}: {each['median'] / (1 if 'element' in name else 1e9):.2f}{'' if 'element' in name else ' GB/s'}")
    for name, target in figures["targets"].items():
        met = measure.verdict(target["found"] >= target["at_least"])
        print(f"{name}: {target['found']:.2f}, target at least {target['at_least']}: {met}")


if __name__ == "__main__":
    main()
