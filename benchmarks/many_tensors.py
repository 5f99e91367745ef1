"""Models of very many small tensors: the command beside a plain script with safetensors and torch, on the same files.

``python benchmarks/many_tensors.py`` writes two files of 60,000 tensors (low-rank adapters on experts have as many), averages them by
each means in turn, each a process of its own, and compares the results: time of the whole process, and memory.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from measure import Range, Watch, machine, save, settle, verdict

RESULT = Path(__file__).parent / "results" / "many_tensors.json"

TARGET = 2.0
"""Times the script's seconds that the command may take."""

SCRIPT = """
import sys
from safetensors.torch import load_file, save_file
first, second = load_file(sys.argv[1]), load_file(sys.argv[2])
for name, tensor in first.items():
    tensor.add_(second[name]).div_(2)
save_file(first, sys.argv[3])
"""
COMMAND = [sys.executable, "-m", "gradsharding", "aggregate"]
WAYS: dict[str, Callable[[str, str, str], list[str]]] = {
    "safetensors and torch": lambda a, b, out: [sys.executable, "-c", SCRIPT, a, b, out],
    "gradsharding, inline": lambda a, b, out: [*COMMAND, a, b, "-o", out, "--executor", "inline"],
    "gradsharding, processes": lambda a, b, out: [*COMMAND, a, b, "-o", out, "--executor", "processes:2"],
}
BASE = "safetensors and torch"


def write(directory: Path, tensors: int) -> list[str]:
    """Write two updates; give their paths."""
    from safetensors.numpy import save_file

    paths = [directory / f"{client}.safetensors" for client in "ab"]
    for seed, path in enumerate(paths):
        numbers = np.random.default_rng(seed)
        names = (f"base_model.model.model.layers.{i // 768}.mlp.experts.{i // 6 % 128}.{i % 6}.lora.weight" for i in range(tensors))
        save_file({name: numbers.standard_normal((8, 4), dtype="f4") for name in names}, path)
    return [str(path) for path in paths]


def run(command: list[str]) -> tuple[float, int]:
    """Run a process; give its seconds, and the bytes of memory that were its own at most."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        watch = Watch(process.pid)
        watch.start()
        assert process.stderr
        errors = process.stderr.read()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}: {errors}")
    return seconds, watch.stop()["own"]


def tensors_of(path: str) -> dict[str, Any]:
    """Read a result by the reference implementation."""
    from safetensors.numpy import load_file

    return load_file(path)


def main() -> None:
    """Measure, compare, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=60_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    memory: dict[str, list[int]] = {way: [] for way in WAYS}
    facts = machine(["safetensors", "torch", "numpy", "pydantic"])
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        given = write(directory, options.tensors)
        size = Path(given[0]).stat().st_size
        for _ in range(options.repeat):
            for way, command in WAYS.items():
                out = directory / "mean.safetensors"
                out.unlink(missing_ok=True)
                settle()
                took, own = run(command(given[0], given[1], str(out)))
                seconds[way].append(took)
                memory[way].append(own)
                out.replace(directory / f"{way}.safetensors")
        results = [tensors_of(str(directory / f"{way}.safetensors")) for way in WAYS]
    furthest = max(float(np.abs(each[name] - results[0][name]).max()) for each in results[1:] for name in results[0])
    ranges = {way: Range.of(found) for way, found in seconds.items()}
    ratios = {way: found.median / ranges[BASE].median for way, found in ranges.items()}
    figures = {
        "machine": facts,
        "tensors": options.tensors,
        "file_bytes": size,
        "seconds": {way: vars(found) for way, found in ranges.items()},
        "memory_bytes": {way: max(found) for way, found in memory.items()},
        "times_the_script": ratios,
        "largest_difference": furthest,
        "target": TARGET,
        "verdict": verdict(max(ratios.values()) <= TARGET),
    }
    save(options.out, figures)
    for way, ratio in ratios.items():
        print(f"{way:24} {ranges[way].median:6.2f} s  {ratio:5.2f} times  {max(memory[way]) / 2**20:6.0f} MiB")
    print(f"at most {TARGET} times the script: {figures['verdict']}; largest difference {furthest:g}")


if __name__ == "__main__":
    main()
