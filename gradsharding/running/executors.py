"""An executor runs tasks, somewhere, each as soon as its inputs are there. Tasks are idempotent, so it may try again."""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor as Pool
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from pkgutil import resolve_name
from queue import SimpleQueue
from typing import Any, Protocol, Self, runtime_checkable

from gradsharding.errors import GradShardingError, NonFinite, OutOfMemory, TaskFailed, UserError, from_wire
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import PARTIAL, Job, Task, TaskReport
from gradsharding.running import worker
from gradsharding.running.cgroup import Hold, MemoryCgroup, usable_cpus
from gradsharding.sizes import mib
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.files import is_memory
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import Reading
from gradsharding.stores.urls import locate
from gradsharding.usage import Spent, together

ELSEWHERE = {"lambda": "gradsharding.aws.functions.executor:LambdaExecutor"}
"""Executors that the core does not import, by the first word of their specification."""

Progress = Callable[[TaskReport], None]
"""Called after each task, from one thread at a time."""

Outcome = TaskReport | NonFinite
"""What comes of a task that ends well, or that meets NaN: the others go on, so that all who sent some are found at once."""

Submit = Callable[[Sequence[Task]], Iterable["Future[list[Outcome]]"]]
"""Begins tasks that wait for nothing, in one batch or several."""

SENT = 64 << 20
"""Bytes that a pool is sent of a job, at most, as long as 64 batches of tasks are enough."""

STOPPED = 10
"""Seconds after which a worker that somebody has stopped (SIGSTOP) is killed, and replaced."""


class Executor(Protocol):
    """Where tasks run. ``gradsharding.testing.ExecutorContract`` states it as tests."""

    def limits(self, limits: Limits | None) -> Limits:
        """Narrow what is allowed to what its functions have; None allows all they have, or a default."""
        ...

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        """Run all tasks, each once the partial sums that it reads are written, and give their reports in the order of ``tasks``.

        ``tasks`` come stage by stage; partial sums of tasks that are not among them are there already. ``store`` is the job's. Raise what
        a task raised, or TaskFailed; tasks not yet begun are then given up. Only after NonFinite all others run that can: it is raised at
        the end, and names whatever client any of them has found.
        """
        ...


@runtime_checkable
class Sharing(Protocol):
    """An executor whose functions are taken out of what others use, too, such as those of an account."""

    def taken(self, limits: Limits) -> str:
        """Say how many functions at once a run within ``limits`` takes, and of how many."""
        ...


def taken(executor: Executor, limits: Limits) -> str | None:
    """Say what a run within ``limits``, which the executor has given, takes away from others; None if it is nothing."""
    return executor.taken(limits) if isinstance(executor, Sharing) else None


@runtime_checkable
class Pacing(Protocol):
    """An executor whose functions keep to a rate of requests that they share, so that it chooses how they read."""

    def reading(self, plan: Plan, limits: Limits) -> Reading:
        """Give the reading by which functions within ``limits`` finish ``plan`` soonest; it fits into their memory."""
        ...


def suited(executor: Executor, plan: Plan, limits: Limits) -> Reading:
    """Give the reading that suits an executor's functions: the plan's own, unless they share a rate of requests."""
    return executor.reading(plan, limits) if isinstance(executor, Pacing) else plan.reading


class _Local:
    """Functions on this machine have what they are allowed."""

    def limits(self, limits: Limits | None) -> Limits:
        return limits or Limits()


class InlineExecutor(_Local):
    """One task after another, in this process."""

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        reports, bad = list[TaskReport](), list[NonFinite]()
        for task in tasks:
            if bad and task.reads:  # what it reads may not have been written
                continue
            one = outcome(partial(worker.run, task, job, store, unmeasured="it ran in the calling process"))
            if isinstance(one, NonFinite):
                bad.append(one)
                continue
            reports.append(one)
            progress(one)
        if bad:
            raise NonFinite.together(bad)
        return reports


class FuturesExecutor(_Local):
    """Tasks on any ``concurrent.futures.Executor``: threads, mpi4py's MPIPoolExecutor, dask's ``client.get_executor()``.

    A pool of other processes needs a store that they can open too, such as a directory.
    """

    def __init__(self, pool: Pool) -> None:
        """Use ``pool``, which stays its owner's to shut down."""
        self.pool = pool

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        shared = job.model_dump_json()

        def submit(ready: Sequence[Task]) -> list["Future[list[Outcome]]"]:
            batches = min(len(ready), max(64, SENT // len(shared)))  # each takes the job along
            return [self.pool.submit(_run_some, ready[i::batches], shared, store) for i in range(batches)]

        return run_eagerly(tasks, submit, progress)


class ProcessExecutor(_Local):
    """Tasks in ``count`` fresh worker processes, each held to the allowed memory.

    A worker that outgrows it is stopped: by a cgroup where one can be made, otherwise by a limit on what it may
    allocate beyond what it had at its start (``RLIMIT_DATA``). A worker that dies for another reason is replaced and its
    task tried again, ``attempts`` times in all.
    """

    def __init__(self, count: int | None = None, *, attempts: int = 3, use_cgroup: bool = True) -> None:
        """Use ``count`` processes, by default one for each CPU that this one may run on, or as many as its cgroup's quota is worth."""
        self.count = count or usable_cpus()
        self.attempts = attempts
        self.use_cgroup = use_cgroup

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        if job.store.startswith("memory:"):
            raise UserError(f"{job.store} cannot be shared with worker processes; use a file:// store, or the inline executor")
        count = min(self.count, len(tasks))
        with contextlib.ExitStack() as stack:
            shared = job.model_dump_json().encode() + b"\n"
            # what a process writes into memory that is shared, or taken for files, is charged to its cgroup, though it is not the process's
            held = limits.memory + job.shared_bytes + _left_in_memory(tasks, job, store) if self.use_cgroup else None
            workers = [stack.enter_context(_Worker(shared, limits.memory, held)) for _ in range(count)]
            pool = stack.enter_context(ThreadPoolExecutor(max(count, 1), thread_name_prefix="gradsharding"))
            idle = workers.copy()

            def once(task: Task) -> list[Outcome]:
                process = idle.pop()  # there are as many workers as threads
                try:
                    return [outcome(partial(self._try, process, task))]
                finally:
                    idle.append(process)

            def give_up() -> None:
                for process in workers:
                    process.give_up()

            reports = run_eagerly(tasks, lambda ready: [pool.submit(once, task) for task in ready], progress, give_up)
            for process in workers:  # all at once: they take a moment to end
                process.dismiss()
            return reports

    def _try(self, process: "_Worker", task: Task) -> TaskReport:
        for attempt in range(1, self.attempts + 1):
            try:
                return process.ask(task).model_copy(update={"lost": attempt - 1})
            except _WorkerDied as died:
                if attempt == self.attempts or process.given_up:
                    raise TaskFailed(f"task {task.id} failed {attempt} times; {died}", task=task.id) from None
        raise AssertionError("unreachable")


_BOOT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the kernel ends this process when its parent ends
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("its caller has ended")
from gradsharding.running.worker import main
main()
"""
"""What a worker process runs. Nobody would want the answer of one whose caller is gone, also if that went before the first line."""


class _WorkerDied(Exception):
    """A worker process ended without an answer."""


class _Worker:
    """One process that serves tasks over its standard input and output; started when first asked."""

    def __init__(self, job: bytes, allowed: int, held: int | None) -> None:
        """Serve ``job``, a line of JSON, in ``allowed`` bytes of memory; by a cgroup of ``held`` bytes, if one is wanted."""
        self._job = job
        self._unsent = bytearray()
        self._why = ""
        self._allowed = allowed
        self._cgroup = MemoryCgroup.create(held) if held else None
        self._kills = 0
        self.given_up = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._errors.close()
        if self._cgroup:
            self._cgroup.close()

    def ask(self, task: Task) -> TaskReport:
        """Run a task over there; raise what it raised, OutOfMemory, or _WorkerDied."""
        process = self._process or self._start()
        self._unsent += task.model_dump_json().encode() + b"\n"
        answer = self._exchange(process)
        if not answer.endswith(b"\n"):
            raise self._death(task)
        wire: dict[str, Any] = json.loads(answer)
        if "error" not in wire:
            return TaskReport.model_validate_json(answer).model_copy(update={"held_by": self._hold})
        error = from_wire(wire)
        raise self._too_small(task, error.message, error.usage) if isinstance(error, OutOfMemory) else error

    def _exchange(self, process: "subprocess.Popen[bytes]") -> bytes:
        """Send what is to be sent, and give the line that comes back; what ends early is a process that died, or was stopped too long."""
        assert process.stdin
        assert process.stdout
        answer, stopped, poll = bytearray(), 0, select.poll()
        poll.register(process.stdin, select.POLLOUT)
        poll.register(process.stdout, select.POLLIN)
        while not answer.endswith(b"\n"):
            ready = dict(poll.poll(1000))
            if process.stdout.fileno() in ready:
                if not (data := process.stdout.read(1 << 16)):
                    break
                answer += data
            elif process.stdin.fileno() in ready:
                try:
                    del self._unsent[: process.stdin.write(self._unsent[: 1 << 16]) or 0]
                except BrokenPipeError:  # its last words may still come
                    self._unsent.clear()
                if not self._unsent:
                    poll.unregister(process.stdin)
            elif _is_stopped(process.pid):
                stopped += 1
                if stopped == STOPPED:
                    self._why = f"its worker was stopped for {STOPPED} s, and was killed"
                    process.kill()
            else:
                stopped = 0
        return bytes(answer)

    @property
    def _hold(self) -> Hold:
        return self._cgroup.hold if self._cgroup else "RLIMIT_DATA"

    def dismiss(self) -> None:
        """Let the process end: there is nothing more to ask."""
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def give_up(self) -> None:
        """Kill the process: its answer is not wanted any more."""
        self.given_up = True
        if process := self._process:
            process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        limit = [] if self._cgroup else ["--memory", str(self._allowed)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, str(os.getpid()), *limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            process_group=0,  # Ctrl-C is for this process alone, which then gives its workers up
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # idle BLAS threads cost memory
        )
        if self._cgroup and not self._cgroup.add(self._process.pid):
            self._stop()
            self._cgroup.close()
            self._cgroup = None
            return self._start()
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)  # a worker that is stopped reads nothing
        self._unsent, self._why = bytearray(self._job), ""
        return self._process

    def _stop(self) -> None:
        if self._process:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()
            self._process.wait()
            self._process = None

    def _death(self, task: Task) -> Exception:
        assert self._process
        status = self._process.wait()
        self._stop()
        if self._cgroup and self._cgroup.kills() > self._kills:
            self._kills = self._cgroup.kills()
            return self._too_small(task, "the kernel killed its worker", {})
        if self._why:
            return _WorkerDied(self._why)
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return _WorkerDied(f"its worker ended with status {status}" + "".join(f": {line}" for line in last))

    def _too_small(self, task: Task, how: str, usage: Spent) -> OutOfMemory:
        error = OutOfMemory(
            f"task {task.id} outgrew the {mib(self._allowed)} allowed, though {mib(task.memory)} were projected: {how}; "
            "use more shards, or allow more memory",
            task=task.id,
        )
        error.usage = usage
        return error


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process; one that a debugger has stopped is left alone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _left_in_memory(tasks: Sequence[Task], job: Job, store: ObjectStore) -> int:
    """Bytes, at most, that a worker may leave in files on a tmpfs, as ``/tmp`` often is."""
    places = {part: locate(reference, store)[0] for part, reference in ((True, job.output), (False, f"{job.partials}/-"))}
    kept = {part for part, place in places.items() if isinstance(place, DirectoryStore) and is_memory(place.root)}
    return sum(task.bytes_written for task in tasks if not task.written_to_memory and (task.part != PARTIAL) in kept)


def open_executor(spec: str, *, concurrency: int | None = None) -> Executor:
    """Make an executor from ``inline``, ``processes``, ``processes:N``, ``threads:N`` or ``lambda:FUNCTION[:QUALIFIER]``.

    ``concurrency`` bounds a function's invocations at once; raise UserError for it beside an executor that counts otherwise.
    """
    name, _, number = spec.partition(":")
    if concurrency is not None and name not in ELSEWHERE:
        raise UserError(f"a concurrency of {concurrency} goes with lambda:FUNCTION, not with {spec}; use processes:{concurrency}, say")
    if re.fullmatch(r"inline|(processes|threads)(:[1-9][0-9]{0,3})?", spec):
        count = int(number) if number else None
        if name == "processes":
            return ProcessExecutor(count)
        return FuturesExecutor(ThreadPoolExecutor(count or usable_cpus())) if name == "threads" else InlineExecutor()
    if name in ELSEWHERE and number:
        try:
            kind = resolve_name(ELSEWHERE[name])
        except ImportError as error:
            raise UserError(f"{spec} needs more than is installed here ({error}); install gradsharding[aws]") from error
        executor: Executor = kind(number, concurrency=concurrency)
        return executor
    raise UserError(f"no executor is known for {spec!r}; use inline, processes:N, threads:N or lambda:FUNCTION")


def run_eagerly(tasks: Sequence[Task], submit: Submit, progress: Progress, give_up: Callable[[], None] = lambda: None) -> list[TaskReport]:
    """Submit each task as soon as those whose partial sums it reads are done; give the reports in the order of ``tasks``.

    What reads partial sums of a task that met NaN does not run; NonFinite is raised once all others have ended. At any other failure
    ``give_up`` is called, what has not begun is cancelled, and what is under way is waited for: none may still write when this call
    has ended.
    """
    waiting, done = _Waiting(tasks), SimpleQueue[Future[list[Outcome]]]()
    under_way, reports, bad = set[Future[list[Outcome]]](), dict[str, TaskReport](), list[NonFinite]()

    def start(ready: Sequence[Task]) -> None:
        for future in submit(ready) if ready else ():
            under_way.add(future)
            future.add_done_callback(done.put)

    try:
        start(waiting.ready())
        while under_way:
            future = done.get()
            under_way.remove(future)
            for one in future.result():
                if isinstance(one, NonFinite):
                    bad.append(one)
                    continue
                reports[one.task] = one
                progress(one)
                start(waiting.after(one.task))
    except BaseException as error:
        give_up()
        for future in under_way:
            future.cancel()
        ended = [future for future in under_way if not future.cancelled()]
        wait(ended)
        if isinstance(error, GradShardingError):
            error.usage = together(error.usage, *(one.usage for one in bad))
            _add_up(error, ended, progress)
        raise
    if bad:
        raise NonFinite.together(bad)
    return [reports[task.id] for task in tasks]


def _add_up(error: GradShardingError, ended: Iterable["Future[list[Outcome]]"], progress: Progress) -> None:
    """Tell of the tasks that were under way at the first failure and ended well; add to it what the others asked of stores in vain."""
    for future in ended:
        other = future.exception()
        if other is None:
            for one in future.result():
                if isinstance(one, NonFinite):
                    error.usage = together(error.usage, one.usage)
                else:
                    progress(one)
        elif isinstance(other, GradShardingError):
            error.usage = together(error.usage, other.usage)


class _Waiting:
    """Which tasks wait for which."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        given = {task.id for task in tasks}
        self._needs = {task.id: {*task.partials} & given for task in tasks}
        self._readers = defaultdict[str, list[Task]](list)
        for task in tasks:
            for need in self._needs[task.id]:
                self._readers[need].append(task)

    def ready(self) -> list[Task]:
        """Give the tasks that wait for nothing."""
        return [task for task in self._tasks if not self._needs[task.id]]

    def after(self, done: str) -> list[Task]:
        """Give the tasks that waited for this one alone."""
        found = []
        for reader in self._readers[done]:
            self._needs[reader.id].remove(done)
            if not self._needs[reader.id]:
                found.append(reader)
        return found


def outcome(run: Callable[[], TaskReport]) -> Outcome:
    """Run a task; NaN in it is an outcome, and no failure."""
    try:
        return run()
    except NonFinite as error:
        return error


def _run_some(tasks: Sequence[Task], shared: str, store: ObjectStore) -> list[Outcome]:
    """Run tasks one after another, in a pool's process."""
    job, done = _job(shared), list[Outcome]()
    why = "its process holds more than the task: it is a pool's, or the caller's"
    for task in tasks:
        try:
            done.append(outcome(partial(worker.run, task, job, store, unmeasured=why)))
        except GradShardingError as error:
            error.usage = together(error.usage, *(one.usage for one in done))
            raise
    return done


@lru_cache(maxsize=2)
def _job(text: str) -> Job:
    """Read a job, once in each process: it is the same for many tasks, and may name thousands of updates."""
    return Job.model_validate_json(text)
