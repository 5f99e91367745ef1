"""An executor runs tasks, each as soon as its inputs exist. Tasks are idempotent, so that it may run them again."""

import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor, wait
from concurrent.futures import Executor as Pool
from functools import lru_cache, partial
from inspect import signature
from queue import SimpleQueue
from typing import Protocol, runtime_checkable

from gradsharding.errors import GradShardingError, NonFinite, TaskFailed, UserError
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.plugins import EXECUTORS, OURS, find, names
from gradsharding.running import worker
from gradsharding.running.cgroup import usable_cpus
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import Reading
from gradsharding.usage import together

Progress = Callable[[TaskReport], None]
"""Called after each task, from one thread at a time."""

Outcome = TaskReport | NonFinite
"""The report of a task, or the NaN that it met: the other tasks go on, so that all clients that sent NaN are found at once."""

Submit = Callable[[Sequence[Task]], Iterable["Future[list[Outcome]]"]]
"""Submits tasks whose inputs exist, in one batch or several."""

SENT = 64 << 20
"""Bytes of a job that a pool is sent, at most, as long as 64 batches of tasks are enough."""


class Executor(Protocol):
    """Runs tasks. ``gradsharding.testing.ExecutorContract`` states it as tests."""

    def limits(self, limits: Limits | None) -> Limits:
        """Return ``limits``, reduced to what the functions have; None allows all that they have, or a default."""
        ...

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        """Run all tasks, each once the partial sums that it reads are written; return their reports in the order of ``tasks``.

        ``tasks`` come stage by stage; partial sums of tasks that are not among them already exist. ``store`` is the job's. Raise what a
        task raised, or TaskFailed; tasks that have not begun are then cancelled. After NonFinite all other tasks run whose inputs exist: it
        is raised at the end, and names each client that any of them has found.
        """
        ...


@runtime_checkable
class Sharing(Protocol):
    """An executor whose functions use a capacity that others share, such as an account's concurrency."""

    def taken(self, limits: Limits) -> str:
        """Return a sentence on how many functions a run within ``limits`` uses at once, and of how many."""
        ...


def taken(executor: Executor, limits: Limits) -> str | None:
    """Return a sentence on the share of a capacity that a run within ``limits`` uses; None if nobody else uses that capacity."""
    return executor.taken(limits) if isinstance(executor, Sharing) else None


@runtime_checkable
class Pacing(Protocol):
    """An executor whose functions keep to a rate of requests that they share, so that it chooses how they read."""

    def reading(self, plan: Plan, limits: Limits) -> Reading:
        """Return the reading by which functions within ``limits`` finish ``plan`` soonest; it fits into their memory."""
        ...


def suited(executor: Executor, plan: Plan, limits: Limits) -> Reading:
    """Return the reading that suits an executor's functions: the plan's own, unless they share a rate of requests."""
    return executor.reading(plan, limits) if isinstance(executor, Pacing) else plan.reading


class GivenLimits:
    """Base of executors whose functions have whatever they are allowed."""

    def limits(self, limits: Limits | None) -> Limits:
        return limits or Limits()


class InlineExecutor(GivenLimits):
    """One task after another, in this process."""

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        reports, bad = list[TaskReport](), list[NonFinite]()
        for task in tasks:
            if bad and task.reads:  # its inputs may not have been written
                continue
            result = outcome(partial(worker.run, task, job, store, unmeasured="it ran in the calling process"))
            if isinstance(result, NonFinite):
                bad.append(result)
                continue
            reports.append(result)
            progress(result)
        if bad:
            raise NonFinite.together(bad)
        return reports


class FuturesExecutor(GivenLimits):
    """Tasks on any ``concurrent.futures.Executor``: threads, mpi4py's MPIPoolExecutor, dask's ``client.get_executor()``.

    A pool of other processes needs a store that they can open too, such as a directory.
    """

    def __init__(self, pool: Pool) -> None:
        """Use ``pool``, which stays its owner's to shut down."""
        self.pool = pool

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        shared, run = job.model_dump_json(), uuid.uuid4().hex

        def submit(ready: Sequence[Task]) -> list["Future[list[Outcome]]"]:
            batches = min(len(ready), max(64, SENT // len(shared)))  # each takes the job along
            return [self.pool.submit(_run_some, ready[i::batches], shared, store, run) for i in range(batches)]

        try:
            return run_eagerly(tasks, submit, progress)
        except BrokenExecutor as error:
            raise TaskFailed(f"the pool lost a process and takes no more tasks ({error}); run the round again with a new pool") from error


def open_executor(spec: str, *, concurrency: int | None = None) -> Executor:
    """Make an executor from ``inline``, ``processes[:N]``, ``threads[:N]``, ``lambda:FUNCTION[:QUALIFIER]`` or what packages bring.

    What the first word names is called with the text after the colon, "" if there is none, and with ``concurrency``, which bounds the
    functions that run at once, if it is given. Raise UserError if there is no such executor, if it needs what is not installed, or if it
    takes no concurrency.
    """
    name, colon, rest = spec.partition(":")
    if bool(colon) != bool(rest) or not (opener := find(EXECUTORS, name)):
        raise unknown(spec)
    if concurrency is None:
        executor: Executor = opener(rest)
        return executor
    if "concurrency" not in signature(opener).parameters:
        raise UserError(f"a concurrency of {concurrency} applies to lambda:FUNCTION, not to {spec}; use processes:{concurrency}")
    bounded: Executor = opener(rest, concurrency=concurrency)
    return bounded


def unknown(spec: str) -> UserError:
    """The error for a specification that names no executor."""
    others = sorted({*names(EXECUTORS)} - {*OURS[EXECUTORS]})
    also = f", or {', '.join(others)}" if others else ""
    return UserError(f"no executor is known for {spec!r}; use inline, processes:N, threads:N or lambda:FUNCTION{also}")


def inline(rest: str) -> InlineExecutor:
    """Make the executor that ``inline`` names."""
    if rest:
        raise unknown(f"inline:{rest}")
    return InlineExecutor()


def threads(rest: str) -> FuturesExecutor:
    """Make the executor that ``threads`` or ``threads:N`` names."""
    return FuturesExecutor(ThreadPoolExecutor(counted("threads", rest) or usable_cpus()))


def counted(name: str, rest: str) -> int | None:
    """Read the number of workers in a specification; None if it has none. Raise UserError unless it is 1 to 9,999."""
    if not rest:
        return None
    if not re.fullmatch("[1-9][0-9]{0,3}", rest):
        raise UserError(f"{name}:{rest} names no number of workers; use a number from 1 to 9,999, such as {name}:4")
    return int(rest)


def run_eagerly(tasks: Sequence[Task], submit: Submit, progress: Progress, give_up: Callable[[], None] = lambda: None) -> list[TaskReport]:
    """Submit each task as soon as the tasks whose partial sums it reads are done; return the reports in the order of ``tasks``.

    Tasks that read partial sums of a task that met NaN do not run; NonFinite is raised once all others have ended. At any other failure
    ``give_up`` is called, tasks that have not begun are cancelled, and running ones are waited for: none may still write after this call.
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
            for result in future.result():
                if isinstance(result, NonFinite):
                    bad.append(result)
                    continue
                reports[result.task] = result
                progress(result)
                start(waiting.after(result.task))
    except BaseException as error:
        give_up()
        for future in under_way:
            future.cancel()
        ended = [future for future in under_way if not future.cancelled()]
        wait(ended)
        if isinstance(error, GradShardingError):
            error.usage = together(error.usage, *(nan.usage for nan in bad))
            _add_up(error, ended, progress)
        raise
    if bad:
        raise NonFinite.together(bad)
    return [reports[task.id] for task in tasks]


def _add_up(error: GradShardingError, ended: Iterable["Future[list[Outcome]]"], progress: Progress) -> None:
    """Report the tasks that were running at the first failure and succeeded; add the usage of those that failed, too, to the error."""
    for future in ended:
        other = future.exception()
        if other is None:
            for result in future.result():
                if isinstance(result, NonFinite):
                    error.usage = together(error.usage, result.usage)
                else:
                    progress(result)
        elif isinstance(other, GradShardingError):
            error.usage = together(error.usage, other.usage)


class _Waiting:
    """Which tasks wait for which."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        given = {task.id for task in tasks}
        self._needs = {task.id: {*task.predecessors} & given for task in tasks}
        self._readers = defaultdict[str, list[Task]](list)
        for task in tasks:
            for need in self._needs[task.id]:
                self._readers[need].append(task)

    def ready(self) -> list[Task]:
        """Return the tasks that wait for no other."""
        return [task for task in self._tasks if not self._needs[task.id]]

    def after(self, done: str) -> list[Task]:
        """Return the tasks that have waited for no other than ``done``."""
        found = []
        for reader in self._readers[done]:
            self._needs[reader.id].remove(done)
            if not self._needs[reader.id]:
                found.append(reader)
        return found


def outcome(run: Callable[[], TaskReport]) -> Outcome:
    """Run a task; NaN is an outcome, not a failure."""
    try:
        return run()
    except NonFinite as error:
        return error


def _run_some(tasks: Sequence[Task], shared: str, store: ObjectStore, run: str) -> list[Outcome]:  # noqa: ARG001
    """Run tasks one after another, in a pool's process.

    ``run`` differs from run to run: dask answers a call with equal arguments by the result, or the error, of the earlier call.
    """
    job, done = _job(shared), list[Outcome]()
    why = "its process holds more than the task: it is a pool's, or the caller's"
    for task in tasks:
        try:
            done.append(outcome(partial(worker.run, task, job, store, unmeasured=why)))
        except GradShardingError as error:
            error.usage = together(error.usage, *(result.usage for result in done))
            raise
    return done


@lru_cache(maxsize=2)
def _job(text: str) -> Job:
    """Parse a job, once in each process: many tasks share it, and it may name thousands of updates."""
    return Job.model_validate_json(text)
