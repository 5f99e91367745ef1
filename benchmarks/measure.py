"""What the benchmarks share: a fresh process for each rival, its memory watched from outside, and the facts of the machine."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RIGS = Path(__file__).parents[1] / "tests"
"""Where the package ``rigs`` lies: a script that imports this module can import the servers of the tests, even before ``make`` has run."""

if str(RIGS) not in sys.path:
    sys.path.append(str(RIGS))

SAMPLE = 0.02
"""Seconds between two readings of a rival's memory."""

LOOKS_PER_WALK = 5
"""Readings between two searches for new children: a search through /proc takes a millisecond of CPU, which the rival would lack."""


class Watch(threading.Thread):
    """Watches the memory of a process and its descendants until stopped (Linux: /proc/PID/status)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.own = 0
        """Bytes: the largest sum, over all processes at one instant, of their own memory (RssAnon + RssShmem), without the page cache."""
        self.marks: dict[int, int] = {}
        """Bytes by process: its high-water mark (VmHWM), mapped files and libraries included."""
        self._root = psutil.Process(pid)
        self._done = threading.Event()

    def run(self) -> None:
        """Read until stopped, or until the process ends."""
        pids: list[int] = []
        looks = 0
        while not self._done.wait(SAMPLE):
            if looks % LOOKS_PER_WALK == 0:
                with contextlib.suppress(psutil.NoSuchProcess):
                    pids = [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
            looks += 1
            self._look(pids)

    def stop(self) -> dict[str, int]:
        """End the watch and return its figures, in bytes."""
        self._done.set()
        self.join()
        return {"own": self.own, "high_water_marks": sum(self.marks.values()), "processes": len(self.marks)}

    def _look(self, pids: Iterable[int]) -> None:
        own = 0
        for pid in pids:
            status = _status(pid)
            own += status.get("RssAnon", 0) + status.get("RssShmem", 0)
            if mark := status.get("VmHWM"):
                self.marks[pid] = max(mark, self.marks.get(pid, 0))
        self.own = max(self.own, own)


@dataclass(frozen=True)
class Range:
    """The values of all repetitions: median, least, most, and each in order."""

    median: float
    least: float
    most: float
    all: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Range":
        """Summarise ``values``."""
        found = tuple(values)
        return cls(statistics.median(found), min(found), max(found), found)


def in_fresh_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a Python script that prints its figures as one line of JSON; add the memory it took until it printed them.

    What the script does after that line is not watched.
    """
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        watch = Watch(process.pid)
        watch.start()
        line = process.stdout.readline()
        memory = watch.stop()
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}; its message is above")
    return {**json.loads(line), "memory": memory}


def settle() -> None:
    """Flush written data to the disk now, so that the next rival does not pay for it."""
    os.sync()
    time.sleep(0.2)


def machine(distributions: Sequence[str]) -> dict[str, Any]:
    """Return the facts about the machine that belong to every figure."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in distributions},
        "load_average_before": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def save(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


def shown(value: float | None, unit: float, form: str, name: str) -> str:
    """Write a figure for people, or a dash."""
    return "–" if value is None else f"{value / unit:{form}} {name}"


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; empty once the process has ended."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    return {}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The checkout's commit, "+" if files differ from it, other than results."""
    root = Path(__file__).parent.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, changed = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, check=True, text=True).stdout.strip()
            for command in (["describe", "--always", "--exclude=*"], ["status", "--porcelain", "--", ":(exclude)benchmarks/results"])
        )
        return commit + "+" * bool(changed)
    return "unknown"


def verdict(met: bool) -> str:  # noqa: FBT001 - its only argument
    """Say whether a target is met."""
    return "met" if met else "NOT met"
