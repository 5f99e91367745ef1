"""The rivals of ``s3_worker.py``, each run as a process of its own: ``python s3_rivals.py NAME TASK.json``.

Each reads the same updates from S3, as the AWS environment leads it there, and prints its figures as one line of JSON. The
clock starts when the client has been made and has asked once, so that neither imports nor the first connection are measured.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gradsharding.aws.s3.store import S3Store
from gradsharding.planning.task import Job, Task
from gradsharding.running import worker

Figures = dict[str, Any]


def ours(task: Task, job: Job, store: S3Store) -> Figures:
    """Run the task as every function does: read ahead, fold in float64, write one part."""
    report = worker.run(task, job, store)
    return {"seconds": report.seconds, "write_seconds": report.write_seconds, "bytes": report.bytes_read}


def raw(task: Task, job: Job, store: S3Store) -> Figures:
    """Request the same ranges with the same client, with the same concurrency, and discard the data."""

    def get(key: str, start: int, stop: int) -> int:
        return len(store.client.get_object(Bucket=store.bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"].read())

    return _in_parallel(task, job, store, get)


def serial(task: Task, job: Job, store: S3Store) -> Figures:
    """Read one whole object after another and add each to the sums, as a first draft would: ``get_object().read()`` and ``np.add``."""
    begun, count = time.perf_counter(), 0
    sums = np.zeros(task.nbytes // 4, np.float32)
    for term in job.terms:
        data = store.client.get_object(Bucket=store.bucket, Key=store.place(term.source))["Body"].read()
        count += len(data)
        update = np.frombuffer(data, np.float32, offset=term.base)
        np.add(sums, update * np.float32(term.weight / task.weight), out=sums)
    written = time.perf_counter()
    store.client.put_object(Bucket=store.bucket, Key=store.place(f"{job.output}.serial"), Body=sums.tobytes())
    ended = time.perf_counter()
    return {"seconds": ended - begun, "write_seconds": ended - written, "bytes": count}


def obstore(task: Task, job: Job, store: S3Store) -> Figures:
    """Make the same requests with obstore, a client written in Rust, and discard the data."""
    from obstore.store import S3Store as Obstore

    meta = store.client.meta
    options: dict[str, Any] = {"endpoint": meta.endpoint_url, "region": meta.region_name, "virtual_hosted_style_request": False}
    other = Obstore(store.bucket, **options, client_options={"allow_http": True})

    def get(key: str, start: int, stop: int) -> int:
        return len(other.get_range(key, start=start, end=stop))

    return _in_parallel(task, job, store, get)


RIVALS: dict[str, Callable[[Task, Job, S3Store], Figures]] = {"ours": ours, "raw": raw, "serial": serial, "obstore": obstore}


def _in_parallel(task: Task, job: Job, store: S3Store, get: Callable[[str, int, int], int]) -> Figures:
    """Get all pieces of all updates, with the concurrency of the task's reading."""
    begun, size = time.perf_counter(), task.reading.piece(task.nbytes)
    with ThreadPoolExecutor(task.reading.parallel) as pool:
        futures = [
            pool.submit(get, store.place(term.source), term.base + start, term.base + min(start + size, task.nbytes))
            for term in job.terms
            for start in range(0, task.nbytes, size)
        ]
        count = sum(future.result() for future in futures)
    return {"seconds": time.perf_counter() - begun, "write_seconds": 0.0, "bytes": count}


def main() -> None:
    """Run one rival; print its figures and the most that its memory grew by."""
    name, path = sys.argv[1:]
    given = json.loads(Path(path).read_text())
    task, job = Task.model_validate_json(json.dumps(given["task"])), Job.model_validate_json(json.dumps(given["job"]))
    store = S3Store(job.store)
    store.head(job.terms[0].source)
    worker.forget_peak()
    before = worker.peak_memory()
    figures = RIVALS[name](task, job, store)
    print(json.dumps({**figures, "idle": before, "grown": worker.peak_memory() - before}), flush=True)


if __name__ == "__main__":
    main()
