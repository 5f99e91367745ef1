"""What every function does: read one range of each input, fold, write one part or partial sums. It keeps nothing between tasks.

``main`` is the same as a process: a Job on the first line of standard input, then a Task a line; for each, a
TaskReport or an error comes back as one line. A Lambda invocation carries the same two values.
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
    """Run one task; run it again and it writes the same bytes.

    ``unmeasured`` says why the process's memory is not the task's, where it is not; then the report has no peak. Raise NonFinite
    (unless the job lets it pass), MissingObject, ChangedObject or InvalidUpdate, each naming the client in ``details["client"]``; such
    an error says in ``usage`` what was asked of stores in vain.
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
    """Bytes: the largest resident set of this process, all pages counted, since ``forget_peak`` or its start.

    Read from the kernel's own high-water mark; 0 where there is no /proc.
    """
    return _status("VmHWM")


def forget_peak() -> bool:
    """Let ``peak_memory`` count from now on, without what earlier tasks have let go of; tell whether the kernel allows it (Linux does)."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory for later
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_memory() > 0


def _status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


_present: set["_Guest"] = set()
"""The tasks that run in this process."""

_presence = threading.Lock()


class _Guest:
    """A task in this process, and whether it has been alone in it."""

    alone = True


@contextlib.contextmanager
def _company() -> Iterator[Callable[[], bool]]:
    """Give what tells whether no other task has run in this process meanwhile."""
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
    """Counts the seconds that pass in reading."""

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
    """Where an input's bytes are: its byte 0 is at ``base`` of the object."""

    reference: str
    version: str | None
    base: int
    nbytes: int


def _inputs(task: Task, job: Job, store: ObjectStore) -> list[_Input]:
    """Give where the slice of each term is, or each partial sum; those whose size varies are asked for it."""
    if not task.reads:
        return [_of_term(term, task) for term in job.read_by(task)]
    references = [job.partial(one) for one in task.predecessors]
    sizes: Iterable[int] = [task.partial_nbytes] * len(references)
    if task.heads_per_input:
        with ThreadPoolExecutor(task.reading.parallel) as pool:
            sizes = pool.map(carried(partial(_size, store=store)), references)
    return [_Input(reference, None, 0, nbytes) for reference, nbytes in zip(references, sizes, strict=True)]


def _of_term(term: Term, task: Task) -> _Input:
    """Where a task's slice of an update is."""
    return _Input(term.source, term.version, term.base + task.start, task.nbytes)


def _size(reference: str, store: ObjectStore) -> int:
    source, key = locate(reference, store)
    return source.head(key).size


def _slices(inputs: Sequence[_Input], task: Task, store: ObjectStore) -> Generator[Iterator[Buffer], None, None]:
    """Give the chunks of each input, one input after another, read as the plan says."""
    if not task.reading.chunk:
        for one in inputs:
            yield _chunks(one, store, 0, one.nbytes)
        return
    size = max(1, task.reading.piece(task.input_nbytes))
    requests = (request for one in inputs for request in divided(one.nbytes, size, partial(_chunks, one, store)))
    with contextlib.closing(read_ahead(requests, task.reading, size)) as pieces:
        yield from (islice(pieces, task.reading.requests(one.nbytes, task.input_nbytes)) for one in inputs)


def _chunks(one: _Input, store: ObjectStore, start: int, stop: int) -> Iterator[Buffer]:
    """Stream bytes ``start`` to ``stop`` of an input; nothing is asked before the first is wanted."""
    source, key = locate(one.reference, store)
    yield from source.get(key, one.base + start, one.base + stop, version=one.version)


def _write(result: Sequence[Buffer], task: Task, job: Job, store: ObjectStore) -> None:
    """Write a part of the result, or partial sums; those may be there already, from a try whose answer was lost."""
    if task.part:
        [data] = result
        target, key = locate(job.output, store)
        target.put_part(key, job.upload, task.part.number, task.part.offset, data)
        return
    target, key = locate(job.partial(task.id), store)
    with contextlib.suppress(ObjectExists):
        target.put(key, result)


def blame(task: Task, terms: Sequence[Term], store: ObjectStore) -> NonFinite:
    """Read a task's slice of ``terms`` once more to say whose values made its sums NaN or infinite; only a failing task pays for this.

    Where all values are finite, those are to blame whose weighted value is larger than an equal share of what float64 holds: without
    such a one, no sum overflows.
    """
    found, overflowing = list[list[str | int]](), list[str]()  # as JSON has them, so that they are the same on either side of the wire
    for accused in (None, terms):
        for term in terms:
            one = _of_term(term, task)
            most = math.inf if accused is None else sys.float_info.max / (len(terms) * (term.weight if task.rule.weighs else 1))
            byte = first_beyond(task.runs, _chunks(one, store, 0, one.nbytes), most)
            if byte is not None:
                found.append([term.client, task.start + byte])
                overflowing += [] if accused is None else [term.client]
        if found:
            break
    return NonFinite.of([task.id], found, overflowing)


def main() -> None:
    """Serve tasks until standard input ends. ``--memory BYTES`` caps what the process may allocate, by its own means."""
    if sys.argv[1:2] == ["--memory"]:
        limit_data(int(sys.argv[2]))
    job = Job.model_validate_json(sys.stdin.readline())
    store = open_store(job.store)
    for line in sys.stdin:
        print(answer(Task.model_validate_json(line), job, store), flush=True)


def answer(task: Task, job: Job, store: ObjectStore) -> str:
    """Run a task in a process that is its own; give its report, or what it raised, as JSON."""
    try:
        return run_alone(task, job, store).model_dump_json()
    except Exception as raised:  # noqa: BLE001 - it crosses the wire and is raised again at the call
        return json.dumps(to_wire(raised))


def run_alone(task: Task, job: Job, store: ObjectStore) -> TaskReport:
    """Run a task in a process that is its own; raise what ``run`` raises, and OutOfMemory where an allocation fails."""
    unmeasured = None if forget_peak() else "this system does not tell the peak of a task alone"
    try:
        return run(task, job, store, unmeasured=unmeasured)
    except MemoryError:
        peak = peak_memory()
    raise OutOfMemory(f"an allocation failed at a peak of {mib(peak)}")  # here, so that no frame of the task's is kept with it


def limit_data(allowed: int) -> None:
    """Cap private writable memory so that the resident set cannot pass ``allowed`` bytes (Linux, RLIMIT_DATA).

    Limits on the address space would count libraries and reserved stacks too; so the cap is what the process has
    mapped now, plus what ``allowed`` leaves beyond the memory it really uses now.
    """
    now = _status("VmData") + max(0, allowed - _status("VmRSS"))
    resource.setrlimit(resource.RLIMIT_DATA, (now, now))


if __name__ == "__main__":
    main()
