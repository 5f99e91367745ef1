"""Tasks run in worker processes of this machine, each limited in memory; a worker that dies is replaced, and its task runs again."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

from gradsharding.errors import OutOfMemory, TaskFailed, UserError, from_wire
from gradsharding.planning.plan import Limits
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.running.cgroup import Hold, MemoryCgroup, usable_cpus
from gradsharding.running.executors import GivenLimits, Outcome, Progress, counted, outcome, run_eagerly
from gradsharding.sizes import mib
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import locate
from gradsharding.usage import Spent

STOPPED = 10
"""Seconds after which a worker that was stopped (SIGSTOP) is killed and replaced."""


def processes(rest: str) -> "ProcessExecutor":
    """Make the executor that ``processes`` or ``processes:N`` names."""
    return ProcessExecutor(counted("processes", rest))


class ProcessExecutor(GivenLimits):
    """Tasks in ``count`` fresh worker processes, each limited to the allowed memory.

    A worker that exceeds it is stopped: by a cgroup where one can be created, otherwise by a limit on what it may allocate beyond what it
    had when it started (``RLIMIT_DATA``). A worker that dies for another reason is replaced, and its task runs again, up to ``attempts``
    times in all.
    """

    def __init__(self, count: int | None = None, *, attempts: int = 3, use_cgroup: bool = True) -> None:
        """Use ``count`` processes; by default, one for each CPU that this process may use, or as many as its cgroup's quota is worth."""
        self.count = count or usable_cpus()
        self.attempts = attempts
        self.use_cgroup = use_cgroup

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        if store.reach == "process":
            raise UserError(f"{job.store} cannot be shared with worker processes; use a file:// store, or the inline executor")
        count = min(self.count, len(tasks))
        with contextlib.ExitStack() as stack:
            shared = job.model_dump_json().encode() + b"\n"
            # shared memory, and files on a tmpfs, are charged to the cgroup of the process that writes them
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
            for process in workers:  # all at once: each takes a moment to end
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
"""The program of a worker process. It ends with its caller, even if the caller ends before the first line runs."""


class _WorkerDied(Exception):
    """A worker process ended without an answer."""


class _Worker:
    """One process that serves tasks over its standard input and output; a replacement starts with the next task."""

    def __init__(self, job: bytes, allowed: int, held: int | None) -> None:
        """Serve ``job``, a line of JSON, in ``allowed`` bytes of memory, enforced by a cgroup of ``held`` bytes if that is not None."""
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
        """Run a task in the process; raise what it raised, OutOfMemory, or _WorkerDied."""
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
        """Send what is unsent and return the answer, one line; it is incomplete if the process died, or was stopped for too long."""
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
                except BrokenPipeError:  # what it wrote before may still come
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
        """Let the process end: there are no more tasks."""
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def give_up(self) -> None:
        """Kill the process: its answer is no longer wanted."""
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
            process_group=0,  # Ctrl-C reaches the caller alone, which then kills its workers
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # idle BLAS threads cost memory
        )
        if self._cgroup and not self._cgroup.add(self._process.pid):
            self._stop()
            self._cgroup.close()
            self._cgroup = None
            return self._start()
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)  # a stopped worker reads nothing
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

    def _too_small(self, task: Task, reason: str, usage: Spent) -> OutOfMemory:
        error = OutOfMemory(
            f"task {task.id} outgrew the {mib(self._allowed)} allowed, though {mib(task.memory)} were projected: {reason}; "
            "use more shards, or allow more memory",
            task=task.id,
        )
        error.usage = usage
        return error


def _is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped a process; one that a debugger has stopped does not count."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _left_in_memory(tasks: Sequence[Task], job: Job, store: ObjectStore) -> int:
    """Return the bytes, at most, that a worker leaves in files on a tmpfs, such as ``/tmp`` often is."""
    places = {is_part: locate(reference, store)[0] for is_part, reference in ((True, job.output), (False, f"{job.partials}/-"))}
    kept = {is_part for is_part, place in places.items() if place.in_memory}
    return sum(task.bytes_written for task in tasks if not task.written_to_memory and (task.part is not None) in kept)
