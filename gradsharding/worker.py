"""What every function does: read one range of each input, fold, write one part. It keeps nothing between tasks.

``main`` is the same as a process: a Job on the first line of standard input, then a Task a line; for each, a
TaskReport or an error comes back as one line. A Lambda invocation carries the same two values.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Generator, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from gradsharding.errors import GradShardingError, NonFinite, OutOfMemory, to_wire
from gradsharding.kernel import Buffer, Fold, first_nonfinite
from gradsharding.plan import Job, Task, TaskReport, Term, mib
from gradsharding.reading import Request, read_ahead
from gradsharding.store import ObjectStore, locate, open_store


def run(task: Task, job: Job, store: ObjectStore) -> TaskReport:
    """Run one task; run it again and it writes the same bytes.

    Raise NonFinite (unless the job lets it pass), MissingObject, ChangedObject or InvalidUpdate, each naming the client
    in ``details["client"]``.
    """
    started = time.perf_counter()
    watch = _Watch()
    fold = Fold(task.runs, task.weight)
    with contextlib.closing(_slices(task, store)) as slices:
        for term, chunks in zip(task.terms, slices, strict=True):
            with _naming(term):
                fold.add(watch.reading(chunks), term.weight)
    result = fold.mean()
    if not fold.finite and job.nonfinite == "raise":
        raise _nonfinite(task, store)
    written = time.perf_counter()
    target, key = locate(job.output, store)
    target.put_part(key, job.upload, task.part, task.offset, result)
    ended = time.perf_counter()
    return TaskReport(
        task=task.id,
        worker=str(os.getpid()),
        gets=task.gets,
        puts=1,
        bytes_read=watch.count,
        bytes_written=len(result),
        peak_memory=peak_memory(),
        seconds=ended - started,
        read_seconds=watch.seconds,
        write_seconds=ended - written,
    )


def peak_memory() -> int:
    """Bytes: the largest resident set of this process, all pages counted, since ``forget_peak`` or its start.

    Read from the kernel's own high-water mark; 0 where there is no /proc.
    """
    return _status("VmHWM")


def forget_peak() -> None:
    """Let ``peak_memory`` count from now on, where the kernel allows it (Linux, own process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


class _Watch:
    """Counts the bytes and the seconds that pass in reading."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def reading(self, chunks: Iterator[Buffer]) -> Iterator[Buffer]:
        while True:
            asked = time.perf_counter()
            chunk = next(chunks, None)
            self.seconds += time.perf_counter() - asked
            if chunk is None:
                return
            self.count += memoryview(chunk).nbytes
            yield chunk


def _slices(task: Task, store: ObjectStore) -> Generator[Iterator[Buffer], None, None]:
    """Give the chunks of each term's slice, one term after another, read as the plan says."""
    if not task.reading.chunk:
        yield from (_chunks(task.start, task.stop, term, store) for term in task.terms)
        return
    count, size = task.reading.requests(task.nbytes), task.reading.piece(task.nbytes)
    starts = [task.start + i * size for i in range(count)]
    requests = (
        Request(min(size, task.stop - start), partial(_chunks, start, min(start + size, task.stop), term, store))
        for term in task.terms
        for start in starts
    )
    with contextlib.closing(read_ahead(requests, task.reading, size)) as pieces:
        yield from (islice(pieces, count) for _ in task.terms)


def _chunks(start: int, stop: int, term: Term, store: ObjectStore) -> Iterator[Buffer]:
    """Stream bytes ``start`` to ``stop`` of a term's vector; nothing is asked before the first is wanted."""
    source, key = locate(term.source, store)
    yield from source.get(key, term.base + start, term.base + stop, version=term.version)


@contextlib.contextmanager
def _naming(term: Term) -> Iterator[None]:
    """Add the client to whatever goes wrong with its input."""
    try:
        yield
    except GradShardingError as error:
        raise type(error)(f"client {term.client}: {error.message}", **error.details, client=term.client) from error


def _nonfinite(task: Task, store: ObjectStore) -> NonFinite:
    """Read the slice once more to say whose value it is; only a failing task pays for this."""
    found: list[list[str | int]] = []  # as JSON has it, so that it is the same on either side of the wire
    for term in task.terms:
        byte = first_nonfinite(task.runs, _chunks(task.start, task.stop, term, store))
        if byte is not None:
            found.append([term.client, task.start + byte])
    if not found:
        return NonFinite(f"task {task.id}: finite F64 values overflow when summed; scale them down", found=found)
    return NonFinite(f"task {task.id}: clients {', '.join(str(client) for client, _ in found)} hold NaN or infinity", found=found)


def main() -> None:
    """Serve tasks until standard input ends. ``--memory BYTES`` caps what the process may allocate, by its own means."""
    if sys.argv[1:2] == ["--memory"]:
        _limit_data(int(sys.argv[2]))
    _die_with_parent()
    job = Job.model_validate_json(sys.stdin.readline())
    store = open_store(job.store)
    for line in sys.stdin:
        forget_peak()
        print(answer(Task.model_validate_json(line), job, store), flush=True)


def answer(task: Task, job: Job, store: ObjectStore) -> str:
    """Run a task; give its report, or what it raised, as JSON."""
    try:
        return run(task, job, store).model_dump_json()
    except MemoryError:
        error: BaseException = OutOfMemory(f"an allocation failed at a peak of {mib(peak_memory())}")
    except Exception as raised:  # noqa: BLE001 - it crosses the wire and is raised again at the call
        error = raised
    return json.dumps(to_wire(error))


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends (Linux, PR_SET_PDEATHSIG): nobody would want its answer."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _limit_data(allowed: int) -> None:
    """Cap private writable memory so that the resident set cannot pass ``allowed`` bytes (Linux, RLIMIT_DATA).

    Limits on the address space would count libraries and reserved stacks too; so the cap is what the process has
    mapped now, plus what ``allowed`` leaves beyond the memory it really uses now.
    """
    now = _status("VmData") + max(0, allowed - _status("VmRSS"))
    resource.setrlimit(resource.RLIMIT_DATA, (now, now))
