"""How long is a whole round of a VGG-16-sized model, and who holds it? GradSharding's direct mode beside plain FedAvg.

One SuperLink, two SuperNodes, one ServerApp and the ClientApps, all real processes on this machine's loopback; the store is
a directory on its disk. Run ``python benchmarks/flower_round.py``; it writes ``results/flower_round.json``.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from embedded import Shapes, small, vgg16
from gradsharding.format.encode import encode
from gradsharding.stores.directory import DirectoryStore
from measure import machine, save, verdict
from rigs.loopback import Loopback

APP = Path(__file__).parent / "flower_round_app"
RESULTS = Path(__file__).parent / "results"
KINDS = {
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
    "gradsharding.running.worker": "function",
}
"""What to look for in a process's command line, and what to call it."""


TARGET = 0.4
"""Of plain FedAvg's round time."""

SERVER_PEAK = "server_app_peak_while_training"


class Census(threading.Thread):
    """Watches all processes below this one: the largest resident set of each kind, in bytes, and of all together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self._done = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self._done.wait(0.1):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    kind, size = _kind(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                total += size
                if kind:
                    self.peaks[kind] = max(size, self.peaks.get(kind, 0))
            self.peaks["all processes"] = max(total, self.peaks.get("all processes", 0))

    def stop(self) -> dict[str, int]:
        """End the watch; give the peaks."""
        self._done.set()
        self.join()
        return self.peaks


def main() -> None:
    """Run both rivals in turn and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each rival")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each run")
    parser.add_argument("--dir", type=Path, default=None, help="where the store and the model lie (needs about 5 GB)")
    parser.add_argument("--quick", action="store_true", help="a small model, one run: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "flower_round.json")
    options = parser.parse_args()
    repeat, layers = (1, small()) if options.quick else (options.repeat, vgg16())
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "direct": []}
    facts = machine(["flwr", "numpy", "gradsharding"])
    with tempfile.TemporaryDirectory(prefix="flower-round-", dir=options.dir) as directory:
        model = _write_model(Path(directory), layers)
        for i in range(repeat):
            for rival, found in runs.items():
                print(f"run {i + 1} of {repeat}: {rival}", flush=True)
                found.append(_run(rival, model, Path(directory) / f"{rival}-{i}", options.rounds))
        (Path(directory) / "small").mkdir()
        tiny = _run("direct", _write_model(Path(directory) / "small", small()), Path(directory) / "direct-small", options.rounds)
    figures = {rival: _summary(found) for rival, found in runs.items()}
    figures["direct, small model"] = _summary([tiny])
    _same_result(runs)
    _print(figures)
    sizes = {"model_bytes": sum(map(_nbytes, layers.values())), "small_model_bytes": sum(map(_nbytes, small().values()))}
    save(options.output, {"machine": facts, **sizes, "figures": figures, "runs": {**runs, "direct, small model": [tiny]}})


def _write_model(directory: Path, layers: Shapes) -> Path:
    """Random weights: equal bytes would be sent once only, by Flower's own deduplication."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in layers.items()}
    DirectoryStore(directory).put("initial.safetensors", encode(arrays)[1])
    return directory / "initial.safetensors"


def _run(rival: str, model: Path, directory: Path, rounds: int) -> dict[str, Any]:
    """One federation from start to end."""
    (directory / "store").mkdir(parents=True)
    first, report = directory / "store" / "initial.safetensors", directory / "report.json"
    first.hardlink_to(model)  # nodes open what lies in their store
    with Loopback(directory / "flower") as loopback:
        census, wire = Census(), _loopback_bytes()
        census.start()
        loopback.run(APP, rival=rival, model=str(first), store=str(directory / "store"), report=str(report), rounds=rounds)
        peaks, wire = census.stop(), _loopback_bytes() - wire
    for file in (directory / "store").rglob("*.safetensors"):
        file.unlink()
    return {**json.loads(report.read_text()), "peaks": peaks, "wire": wire}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all rounds of all runs; seconds and bytes."""
    rounds = [round_ for run in runs for round_ in run["rounds"]]
    seconds = [round_["ended"] - round_["began"] for round_ in rounds]
    return {
        "round_seconds": statistics.median(seconds),
        "round_seconds_range": [min(seconds), max(seconds)],
        "aggregate_seconds": statistics.median(round_["ended"] - round_["replied"] for round_ in rounds),
        "messages_bytes_per_round": statistics.median(round_["down"] + round_["up"] for round_ in rounds),
        "loopback_bytes_per_round": statistics.median(run["wire"] / len(run["rounds"]) for run in runs),
        SERVER_PEAK: statistics.median(run["peak_until_here"] for run in runs),
        "peaks": {kind: statistics.median(run["peaks"].get(kind, 0) for run in runs) for kind in [*KINDS.values(), "all processes"]},
    }


def _same_result(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Both rivals train the same: their results agree within float32 rounding."""
    for plain, direct in zip(runs["plain"], runs["direct"], strict=True):
        for name, expected in plain["sums"].items():
            if abs(direct["sums"][name] - expected) > 1e-3 * max(1.0, abs(expected)):
                raise SystemExit(f"the results differ in {name}: {expected} and {direct['sums'][name]}")


def _print(figures: dict[str, dict[str, Any]]) -> None:
    plain, direct, little = figures["plain"], figures["direct"], figures["direct, small model"]
    table = Table("", "plain FedAvg", "direct", "ratio", title="one round, medians")

    def row(name: str, before: float, after: float, scale: float = 1e6, unit: str = "MB") -> None:
        table.add_row(name, f"{before / scale:,.1f} {unit}", f"{after / scale:,.1f} {unit}", f"{after / before:.3f}" if before else "")

    def figure(name: str, key: str, scale: float = 1e6, unit: str = "MB") -> None:
        row(name, plain[key], direct[key], scale, unit)

    figure("round time", "round_seconds", 1, "s")
    figure("of it, averaging", "aggregate_seconds", 1, "s")
    figure("messages through the SuperLink", "messages_bytes_per_round")
    figure("bytes over loopback", "loopback_bytes_per_round")
    figure("peak RSS: ServerApp", SERVER_PEAK)
    for kind, peak in plain["peaks"].items():
        if kind != "ServerApp":  # at the end it reads the result, to compare it; the row above was noted before
            row(f"peak RSS: {kind}", peak, direct["peaks"][kind])
    Console().print(table)
    large, small_peak = direct[SERVER_PEAK] / 1e6, little[SERVER_PEAK] / 1e6
    print(f"the ServerApp's peak in direct mode: {large:.1f} MB; with a small model: {small_peak:.1f} MB")
    met = direct["round_seconds"] <= TARGET * plain["round_seconds"]
    print(f"target: at most {TARGET} of plain FedAvg's round time: {verdict(met)}")


def _kind(command: list[str]) -> str | None:
    return next((kind for text, kind in KINDS.items() if any(text in word for word in command)), None)


def _loopback_bytes() -> int:
    """Bytes received on the loopback interface since the machine started."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_recv)


def _nbytes(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape))


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"took {time.time() - started:.0f} s")
