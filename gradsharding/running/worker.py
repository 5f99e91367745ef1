"""What every function does: read one range of each input, fold it, write a part of the result or partial sums. It keeps no state.

``main`` does the same as a process. Its standard input has a Job on the first line and a Task on each further line; for each task, it
prints a TaskReport or an error on one line. A Lambda invocation has the same two values.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gradsharding.arithmetic.fold import Fold, first_beyond
from gradsharding.errors import GradShardingError, NonFinite, ObjectExists, OutOfMemory, naming, to_wire
from gradsharding.format.dtypes import Buffer
from gradsharding.planning.task import Job, Task, TaskReport, Term
from gradsharding.sizes import mib
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import divided, read_ahead
from gradsharding.stores.urls import locate, open_store
from gradsharding.usage import Ledger, carried, counting, together


def run(task: Task, job: Job, store: ObjectStore, *, unmeasured: str | None = None) -> TaskReport:
    """Run one task. Running it again writes the same bytes.

    If the process is not the task's alone, ``unmeasured`` says why its peak memory is not reported. Raise NonFinite (unless the job lets it
    pass), MissingObject, ChangedObject or InvalidUpdate, each with the client in ``details["client"]``; ``usage`` of such an error has the
    requests that were made in vain.
    """
    with counting() as ledger, _company() as alone:
        try:
            return _run(task, job, store, ledger, alone, unmeasured)
        except GradShardingError as error:
            error.usage = together(error.usage, ledger.spent)
            raise


def _run(task: Task, job: Job, store: ObjectStore, ledger: Ledger, alone: Callable[[], bool], unmeasured: str | None) -> TaskReport:
    started, busy = time.perf_counter(), time.process_time()
    watch = _Watch()
    fold = Fold(task.runs, task.cohort, task.rule)
    inputs = _inputs(task, job, store)
    with contextlib.closing(_slices(inputs, task, store)) as slices:
        if task.reads:
            for chunks in slices:
                fold.merge(watch.reading(chunks))
        for term, chunks in zip(job.read_by(task), slices, strict=False):
            with naming(term.client):
                fold.add(watch.reading(chunks), term.weight)
    result = fold.serialize() if task.part is None else [fold.finalize()]
    if not fold.finite and job.nonfinite == "raise":
        raise blame(task, job.read_by(task), store)
    written = time.perf_counter()
    _write(result, task, job, store)
    ended = time.perf_counter()
    return TaskReport(
        task=task.id,
        worker=str(os.getpid()),
        usage=ledger.spent,
        peak_memory=None if unmeasured else peak_memory(),
        unmeasured=unmeasured,
        seconds=ended - started,
        read_seconds=watch.seconds,
        write_seconds=ended - written,
        cpu_seconds=time.process_time() - busy if alone() else None,
    )


def peak_memory() -> int:
    """Largest resident set of this process, in bytes, since ``forget_peak`` or its start.

    The kernel keeps it as a high-water mark, which counts all pages. 0 if there is no /proc.
    """
    return _status("VmHWM")


def forget_peak() -> bool:
    """Return freed memory to the system and restart ``peak_memory``; return whether the kernel allows that (Linux does)."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory for later
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_memory() > 0


def _status(field: str) -> int:
    """Return a field of /proc/self/status, in bytes; 0 if it is missing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


_present: set["_Guest"] = set()
"""The tasks that run in this process."""

_presence = threading.Lock()


class _Guest:
    """A task in this process."""

    alone = True
    """Whether no other task has run in the process at the same time."""


@contextlib.contextmanager
def _company() -> Iterator[Callable[[], bool]]:
    """Register a task; yield a function that tells whether it has been alone in this process since."""
    me = _Guest()
    with _presence:
        _present.add(me)
        if len(_present) > 1:
            for guest in _present:
                guest.alone = False
    try:
        yield lambda: me.alone
    finally:
        with _presence:
            _present.remove(me)


class _Watch:
    """Measures the seconds spent waiting for input."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def reading(self, chunks: Iterator[Buffer]) -> Iterator[Buffer]:
        while True:
            asked = time.perf_counter()
            chunk = next(chunks, None)
            self.seconds += time.perf_counter() - asked
            if chunk is None:
                return
            yield chunk


class _Input(NamedTuple):
    """Where the bytes of an input are: the first is at byte ``base`` of the object."""

    reference: str
    version: str | None
    base: int
    nbytes: int


def _inputs(task: Task, job: Job, store: ObjectStore) -> list[_Input]:
    """Locate the task's inputs. If the sizes of partial sums vary, request each of them."""
    if not task.reads:
        return [_of_term(term, task) for term in job.read_by(task)]
    references = [job.partial(predecessor) for predecessor in task.predecessors]
    sizes: Iterable[int] = [task.partial_nbytes] * len(references)
    if task.heads_per_input:
        with ThreadPoolExecutor(task.reading.parallel) as pool:
            sizes = pool.map(carried(partial(_size, store=store)), references)
    return [_Input(reference, None, 0, nbytes) for reference, nbytes in zip(references, sizes, strict=True)]


def _of_term(term: Term, task: Task) -> _Input:
    """Locate a task's slice of an update."""
    return _Input(term.source, term.version, term.base + task.start, task.nbytes)


def _size(reference: str, store: ObjectStore) -> int:
    source, key = locate(reference, store)
    return source.head(key).size


def _slices(inputs: Sequence[_Input], task: Task, store: ObjectStore) -> Generator[Iterator[Buffer], None, None]:
    """Yield the chunks of each input, one input after another, read in the way that the task states."""
    if not task.reading.chunk:
        for input_ in inputs:
            yield _chunks(input_, store, 0, input_.nbytes)
        return
    size = max(1, task.reading.piece(task.input_nbytes))
    requests = (request for input_ in inputs for request in divided(input_.nbytes, size, partial(_chunks, input_, store)))
    with contextlib.closing(read_ahead(requests, task.reading, size)) as pieces:
        yield from (islice(pieces, task.reading.requests(input_.nbytes, task.input_nbytes)) for input_ in inputs)


def _chunks(input_: _Input, store: ObjectStore, start: int, stop: int) -> Iterator[Buffer]:
    """Stream bytes ``start`` to ``stop`` of an input; no request is made before the first chunk is taken."""
    source, key = locate(input_.reference, store)
    yield from source.get(key, input_.base + start, input_.base + stop, version=input_.version)


def _write(result: Sequence[Buffer], task: Task, job: Job, store: ObjectStore) -> None:
    """Write a part of the result, or partial sums. Partial sums may exist already, from an attempt whose answer was lost."""
    if task.part:
        [data] = result
        target, key = locate(job.output, store)
        target.put_part(key, job.upload, task.part.number, task.part.offset, data)
        return
    target, key = locate(job.partial(task.id), store)
    with contextlib.suppress(ObjectExists):
        target.put(key, result)


def blame(task: Task, terms: Sequence[Term], store: ObjectStore) -> NonFinite:
    """Read a task's slice of ``terms`` once more, to name the clients whose values made the result NaN or infinite.

    If all values are finite, a sum overflowed: then those clients are named who have a weighted value above float64's largest number
    divided by the number of clients. Without such a value, no sum overflows.
    """
    found, overflowing = list[list[str | int]](), list[str]()  # lists and not tuples: JSON keeps them as they are
    for finite in (False, True):
        for term in terms:
            input_, weight = _of_term(term, task), term.weight if task.rule.weighs else 1
            most = sys.float_info.max / (len(terms) * weight) if finite else math.inf
            byte = first_beyond(task.runs, _chunks(input_, store, 0, input_.nbytes), most)
            if byte is not None:
                found.append([term.client, task.start + byte])
                overflowing += [term.client] if finite else []
        if found:
            break
    return NonFinite.of([task.id], found, overflowing)


def main() -> None:
    """Run tasks until standard input ends. With ``--memory BYTES``, the process limits its own allocations."""
    if sys.argv[1:2] == ["--memory"]:
        limit_data(int(sys.argv[2]))
    job = Job.model_validate_json(sys.stdin.readline())
    store = open_store(job.store)
    for line in sys.stdin:
        print(answer(Task.model_validate_json(line), job, store), flush=True)


def answer(task: Task, job: Job, store: ObjectStore) -> str:
    """Run a task in a process of its own; return its report, or the error that it raised, as JSON."""
    try:
        return run_alone(task, job, store).model_dump_json()
    except Exception as raised:  # noqa: BLE001 - it crosses the wire and is raised again at the call
        return json.dumps(to_wire(raised))


def run_alone(task: Task, job: Job, store: ObjectStore) -> TaskReport:
    """Run a task in a process of its own. Raise OutOfMemory if an allocation fails; else raise what ``run`` raises."""
    unmeasured = None if forget_peak() else "this system does not report the peak of a single task"
    try:
        return run(task, job, store, unmeasured=unmeasured)
    except MemoryError:
        peak = peak_memory()
    raise OutOfMemory(f"an allocation failed at a peak of {mib(peak)}")  # here: the traceback would keep the task's memory


def limit_data(allowed: int) -> None:
    """Limit private writable memory so that the resident set cannot exceed ``allowed`` bytes (Linux, RLIMIT_DATA).

    A limit on the address space would count libraries and reserved stacks too. This limit is the memory that the process has mapped now,
    plus the difference between ``allowed`` and the memory that it uses now.
    """
    now = _status("VmData") + max(0, allowed - _status("VmRSS"))
    resource.setrlimit(resource.RLIMIT_DATA, (now, now))


if __name__ == "__main__":
    main()
