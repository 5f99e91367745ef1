"""The rivals of ``embedded.py``, each run as a process of its own: ``python rivals.py NAME DIRECTORY``.

Each averages the updates in a directory and prints its figures as one line of JSON as soon as it has them; what it may do
after that line is not measured.
"""

import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Figures = dict[str, Any]

WEIGHTS = (120, 80, 200, 45, 310, 96, 64, 150)
"""Examples of each client."""

WORKERS = 2

BLOCK = 32_768
"""Elements per step of the numpy rival: its three buffers fit the second-level cache."""

OURS, EXACT = (f"{name}/results/vgg16.safetensors" for name in ("ours", "exact"))
FLOWERS, NUMPYS = "flower.safetensors", "numpy.safetensors"
"""Where each leaves its result."""


def exact(directory: Path) -> None:
    """The same by the exact mean."""
    ours(directory, "exact-mean")


def ours(directory: Path, rule: str = "mean") -> None:
    """Aggregate with this library: seal, plan, start workers, fold, sync, publish."""
    from gradsharding import DirectoryStore, ProcessExecutor, Round, aggregate
    from gradsharding.planning.plan import Limits
    from gradsharding.planning.task import Job, Task, TaskReport
    from gradsharding.running.executors import Progress
    from gradsharding.stores.protocol import ObjectStore
    from gradsharding.stores.urls import file_reference

    class Timed(ProcessExecutor):
        """Records when the tasks began, when each worker began its first task, and when all tasks had ended."""

        def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
            def note(report: TaskReport) -> None:
                self.ready.setdefault(report.worker, time.perf_counter() - report.seconds)
                progress(report)

            self.ready: dict[str, float] = {}
            self.began = time.perf_counter()
            reports = super().run(tasks, job, store, limits, note)
            self.ended = time.perf_counter()
            return reports

    round_ = Round.create(DirectoryStore(directory / ("ours" if rule == "mean" else "exact")), "vgg16")
    for path, weight in zip(updates(directory), WEIGHTS, strict=True):
        round_.refer(path.stem, file_reference(path), weight)
    timed = Timed(WORKERS)
    started = time.perf_counter()
    result = aggregate(round_, rule=rule, executor=timed)
    ended = time.perf_counter()

    reports, count = result.reports, len(timed.ready)
    start = sum(ready - timed.began for ready in timed.ready.values()) / count
    read, write, busy = (sum(getattr(r, name) for r in reports) / count for name in ("read_seconds", "write_seconds", "seconds"))
    phases = {
        "seal, plan, begin": timed.began - started,
        "worker start": start,
        "read": read,
        "fold": busy - read - write,
        "write": write,
        "idle, handing out, worker end": timed.ended - timed.began - start - busy,
        "sync, publish": ended - timed.ended,
    }
    memory = {"worker_projected": result.plan.memory, "worker_observed": result.peak_memory}
    give({"seconds": ended - started, "phases": phases, "tasks": len(reports), **memory})


def flower(directory: Path) -> None:
    """Aggregate with Flower's FedAvg; afterwards leave its result as a file, for comparison."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as Flower's own processes do at their start
    logging.getLogger("flwr").setLevel(logging.WARNING)
    started = time.perf_counter()
    replies = []
    for node, (path, weight) in enumerate(zip(updates(directory), WEIGHTS, strict=True)):
        base, tensors = header(path)
        arrays = ArrayRecord({name: Array(from_file(path, base, **entry)) for name, entry in tensors.items()})
        asked = Message(RecordDict(), dst_node_id=node + 1, message_type="train")
        replies.append(Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})}), reply_to=asked))
    built = time.perf_counter()
    averaged, _ = FedAvg().aggregate_train(1, replies)
    ended = time.perf_counter()
    give({"seconds": ended - started, "phases": {"read files, build replies": built - started, "aggregate_train": ended - built}})
    assert averaged
    with updates(directory)[0].open("rb") as first, (directory / FLOWERS).open("wb") as file:
        file.write(first.read(base))
        for name in tensors:
            averaged[name].numpy().tofile(file)


def numpy(directory: Path) -> None:
    """Aggregate with a loop over plain bytes, not tensors: for each block, add all updates, divide once, round once."""
    started = time.perf_counter()
    files = [os.open(path, os.O_RDONLY) for path in updates(directory)]
    base, end = header(updates(directory)[0])[0], os.fstat(files[0]).st_size
    elements, product, sums = np.empty(BLOCK, "<f4"), np.empty(BLOCK), np.empty(BLOCK)
    with (directory / NUMPYS).open("wb", buffering=0) as output:
        output.write(os.pread(files[0], base, 0))
        for offset in range(base, end, elements.nbytes):
            n = min(BLOCK, (end - offset) // elements.itemsize)
            x, p, s = elements[:n], product[:n], sums[:n]
            s.fill(0)
            for file, weight in zip(files, WEIGHTS, strict=True):
                assert os.preadv(file, [x.data], offset) == x.nbytes
                np.copyto(p, x)
                np.multiply(p, float(weight), out=p)
                np.add(s, p, out=s)
            np.divide(s, float(sum(WEIGHTS)), out=s)
            np.copyto(x, s, casting="same_kind")
            output.write(x.data)
        written = time.perf_counter()
        os.fsync(output.fileno())
    ended = time.perf_counter()
    give({"seconds": ended - started, "phases": {"read, fold, write": written - started, "sync": ended - written}})


def read(directory: Path) -> None:
    """Read all files once: by one process, then shared between two."""
    files = updates(directory)
    started, ended = read_files(files)
    with ProcessPoolExecutor(2) as pool:
        times = [*pool.map(read_files, (files[::2], files[1::2]))]
    together = max(ended for _, ended in times) - min(started for started, _ in times)
    size = sum(path.stat().st_size for path in files)
    give({"seconds": ended - started, "phases": {"one process": ended - started, "two processes": together}, "bytes": size})


RIVALS: dict[str, Callable[[Path], None]] = {"ours": ours, "exact": exact, "flower": flower, "numpy": numpy, "read": read}


def give(figures: Figures) -> None:
    """Print figures for the process that started this one."""
    print(json.dumps(figures), flush=True)


def updates(directory: Path) -> list[Path]:
    """Files of the updates, in the order of their clients."""
    return [directory / f"client-{i}.safetensors" for i in range(len(WEIGHTS))]


def header(path: Path) -> tuple[int, dict[str, Figures]]:
    """Return the offset at which a safetensors file's data begins, and its tensors in the order of their bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def from_file(path: Path, base: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> npt.NDArray[np.float32]:
    """Read one tensor, of float32, by numpy's most direct way."""
    assert dtype == "F32"
    return np.fromfile(path, "<f4", math.prod(shape), offset=base + data_offsets[0]).reshape(shape)


def read_files(files: Sequence[Path]) -> tuple[float, float]:
    """Read files into one reused buffer; return the start and the end time."""
    buffer, started = bytearray(1 << 20), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            for offset in itertools.count(0, len(buffer)):
                if os.preadv(file.fileno(), [buffer], offset) < len(buffer):
                    break
    return started, time.perf_counter()


if __name__ == "__main__":
    RIVALS[sys.argv[1]](Path(sys.argv[2]))
