"""How fast and how lean is the embedded default beside Flower's own aggregation?

Eight updates of VGG-16 lie on a local disk, in the page cache. Each rival averages them in a fresh process, in turn, several times:

ours     aggregate() with two worker processes: seal, plan, worker start, fold, result synced and published in a directory
exact    the same, summed exactly; the result read once more, for its digest
flower   the files read into replies, then FedAvg().aggregate_train; the result stays in memory, nothing is written
numpy    one process, one loop, the same arithmetic without this library; the result written and synced
read     the files read once into one buffer: what the machine allows, by one process and by two
"""

import argparse
import hashlib
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from gradsharding.format.encode import encode
from measure import Range, in_fresh_process, machine, save, settle, verdict
from rivals import EXACT, FLOWERS, NUMPYS, OURS, RIVALS, WEIGHTS, WORKERS, Figures, header, updates

Shapes = dict[str, tuple[int, ...]]

TIME_TARGET, MEMORY_TARGET = 0.4, 1 / 8
"""Of Flower's time and of Flower's peak memory."""

RESULTS = Path(__file__).parent / "results" / "embedded.json"


def vgg16() -> Shapes:
    """Name the arrays of torchvision's vgg16 with their shapes: 138,357,544 elements in 32 arrays."""
    shapes: Shapes = {}
    layers = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
    layers += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
    for i, inputs, outputs in layers:
        shapes |= {f"features.{i}.weight": (outputs, inputs, 3, 3), f"features.{i}.bias": (outputs,)}
    for i, inputs, outputs in [(0, 512 * 7 * 7, 4096), (3, 4096, 4096), (6, 4096, 1000)]:
        shapes |= {f"classifier.{i}.weight": (outputs, inputs), f"classifier.{i}.bias": (outputs,)}
    assert (32, 138_357_544) == (len(shapes), sum(map(math.prod, shapes.values())))
    return shapes


def small() -> Shapes:
    """Give a model for a smoke test: 1.2 million elements."""
    return {"hidden.weight": (1000, 1000), "hidden.bias": (1000,), "out.weight": (200, 1000), "out.bias": (200,)}


def write_updates(directory: Path, shapes: Shapes) -> float:
    """Write an update of random weights for each client; the largest magnitude in all of them."""
    largest = 0.0
    for i, path in enumerate(updates(directory)):
        random = np.random.default_rng(i)
        arrays = {name: random.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}
        largest = max(largest, *(float(np.abs(array).max()) for array in arrays.values()))
        with path.open("wb") as file:
            file.writelines(encode(arrays)[1])
    return largest


def compete(directory: Path, repetitions: int) -> dict[str, list[Figures]]:
    """Run each rival once in each repetition; a different rival goes first each time."""
    names = [*RIVALS]
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    run("read", directory)  # warms the cache
    for i in range(repetitions):
        print(f"repetition {i + 1} of {repetitions}", flush=True)
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if name in ("ours", "exact"):
                shutil.rmtree(directory / name, ignore_errors=True)
            settle()
            runs[name].append(run(name, directory))
    return runs


def run(name: str, directory: Path) -> Figures:
    """Run one rival once."""
    return in_fresh_process([str(Path(__file__).parent / "rivals.py"), name, str(directory)])


def verify(directory: Path, largest: float) -> Figures:
    """Compare results: ours and numpy's by their bits, Flower's within the rounding errors of float32 sums; count what exact sums change.

    Flower rounds each weight, each product and each sum: 3·N roundings at most, of values that ``largest`` bounds.
    """
    mine, exact, numpys, flowers = (data(directory / name) for name in (OURS, EXACT, NUMPYS, FLOWERS))
    digests = [hashlib.sha256(array.data).hexdigest() for array in (mine, numpys)]
    step = 1 << 20
    distance = max(float(np.abs(mine[i : i + step] - flowers[i : i + step]).max()) for i in range(0, mine.size, step))
    bound = 3 * len(WEIGHTS) * 2.0**-24 * largest
    if digests[0] != digests[1] or mine.size != flowers.size or not distance <= bound:
        raise SystemExit(
            f"the results differ: ours {digests[0]}, numpy {digests[1]}, Flower by {distance:g}, where at most {bound:g} is allowed"
        )
    unlike = sum(int(np.count_nonzero(mine[i : i + step] != exact[i : i + step])) for i in range(0, mine.size, step))
    return {
        "ours_equals_numpy_bit_for_bit": True,
        "digest": digests[0],
        "elements_where_exact_differs": unlike,
        "flower_differs_by": distance,
        "flower_may_differ_by": bound,
    }


def data(path: Path) -> npt.NDArray[np.float32]:
    """A result's elements, mapped."""
    return np.memmap(path, "<f4", "r", offset=header(path)[0])


def summarise(runs: Sequence[Figures]) -> Figures:
    """Summarize a rival's repetitions as ranges: seconds, phases, bytes of memory."""
    return {
        **runs[-1],
        "seconds": asdict(Range.of(run["seconds"] for run in runs)),
        "phases": {name: asdict(Range.of(run["phases"][name] for run in runs)) for name in runs[0]["phases"]},
        "memory": {name: asdict(Range.of(run["memory"][name] for run in runs)) for name in runs[0]["memory"]},
    }


def compare(rivals: Figures) -> Figures:
    """Compare with the targets beside Flower: ratios of medians."""
    mine, flowers = rivals["ours"], rivals["flower"]
    time = mine["seconds"]["median"] / flowers["seconds"]["median"]
    memory = mine["memory"]["own"]["median"] / flowers["memory"]["own"]["median"]
    alone = mine["seconds"]["median"] / flowers["phases"]["aggregate_train"]["median"]
    return {
        "time": {"at_most": TIME_TARGET, "found": time, "met": time <= TIME_TARGET},
        "memory": {"at_most": MEMORY_TARGET, "found": memory, "met": memory <= MEMORY_TARGET},
        "time_beside_aggregate_train_alone": alone,
    }


def show(figures: Figures) -> None:
    """Print the comparison as tables."""
    rivals, flowers, console = figures["rivals"], figures["rivals"]["flower"], Console(width=132, highlight=False)
    table = Table("", "seconds", "of Flower's", "peak memory, MiB", "of Flower's", "mapped files included", title=figures["setup"]["title"])
    phases = Table("", "where the time goes", "seconds", "share", title="median (least to most)")
    for name, rival in rivals.items():
        seconds, memory = rival["seconds"], rival["memory"]
        time_ratio = f"{seconds['median'] / flowers['seconds']['median']:.2f}"
        memory_ratio = f"{memory['own']['median'] / flowers['memory']['own']['median']:.3f}"
        marks = spread(memory["high_water_marks"], 1 << 20, 0)
        table.add_row(name, spread(seconds), time_ratio, spread(memory["own"], 1 << 20, 0), memory_ratio, marks)
        for i, (phase, found) in enumerate(rival["phases"].items()):
            phases.add_row("" if i else name, phase, spread(found), f"{found['median'] / seconds['median']:.0%}")
    console.print(table, phases)
    rates = [rivals["read"]["bytes"] / found["median"] / 1e9 for found in rivals["read"]["phases"].values()]
    console.print(f"The cache is warm: one process reads the files at {rates[0]:.1f} GB/s, two at {rates[1]:.1f} GB/s.")
    console.print("Flower writes nothing: its result stays in memory. Ours and numpy's are written and synced to the disk.")
    projected, observed = (rivals["ours"][name] / (1 << 20) for name in ("worker_projected", "worker_observed"))
    console.print(f"Ours: {rivals['ours']['tasks']} tasks; a worker was projected {projected:.0f} MiB and took {observed:.0f} MiB.")
    unlike = figures["verified"]["elements_where_exact_differs"]
    console.print(f"The exact mean differs from ours, in float64, in {unlike:,} of {figures['setup']['elements']:,} elements.")
    console.print(f"The bits of ours and numpy's are equal; Flower's differ by at most {figures['verified']['flower_differs_by']:.1e}.")
    for quantity in ("time", "memory"):
        target = figures["targets"][quantity]
        answer = verdict(target["met"])
        console.print(f"{quantity}: {target['found']:.3f} of Flower's, where at most {target['at_most']:g} is the target: {answer}")
    alone = figures["targets"]["time_beside_aggregate_train_alone"]
    console.print(f"Beside aggregate_train alone, all replies already in Flower's memory, our time is {alone:.2f} of it.")


def spread(found: Figures, unit: float = 1, digits: int = 2) -> str:
    """Format a range as text."""
    median, least, most = (f"{found[name] / unit:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def main() -> None:
    """Write the updates, let the rivals run, verify, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="a directory on a local disk, for 6 GB of files that are deleted at the end"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, help="the JSON file to write (default: results/embedded.json, none if --quick)")
    options = parser.parse_args()
    facts, shapes = machine(["gradsharding", "numpy", "flwr"]), small() if options.quick else vgg16()
    with tempfile.TemporaryDirectory(prefix=".gradsharding-embedded-", dir=options.dir) as name:
        directory = Path(name).absolute()
        largest = write_updates(directory, shapes)
        runs = compete(directory, options.repetitions)
        verified = verify(directory, largest)
    elements = sum(map(math.prod, shapes.values()))
    title = f"{len(WEIGHTS)} updates of {elements:,} float32 in {len(shapes)} arrays, {options.repetitions} repetitions"
    title += ": too small to measure anything" if options.quick else ""
    rivals = {name: summarise(found) for name, found in runs.items()}
    figures = {
        "question": (__doc__ or "").partition("\n")[0],
        "setup": {"title": title, "clients": len(WEIGHTS), "elements": elements, "arrays": len(shapes), "workers": WORKERS},
        "machine": facts,
        "rivals": rivals,
        "targets": compare(rivals),
        "verified": verified,
    }
    show(figures)
    if output := options.output or (None if options.quick else RESULTS):
        save(output, figures)


if __name__ == "__main__":
    main()
