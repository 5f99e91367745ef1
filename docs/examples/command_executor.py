"""Tasks as commands, such as ``ssh node7 python``: an executor in forty lines, and the example of the guide to writing one."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from gradsharding.errors import NonFinite, TaskFailed, UserError, from_wire
from gradsharding.planning.plan import Limits
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.running.executors import GivenLimits, Outcome, Progress, run_eagerly
from gradsharding.stores.protocol import ObjectStore


class CommandExecutor(GivenLimits):
    """One process for each task: ``command -m gradsharding.running.worker``, at most ``concurrency`` of them at once."""

    def __init__(self, command: str = "", *, concurrency: int = 2) -> None:
        """Run ``command``, such as ``ssh node7 python3``; by default this Python."""
        self._command = shlex.split(command) or [sys.executable]
        self._concurrency = concurrency

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        if store.reach == "process":
            raise UserError(f"{store.url} cannot be reached by another process; use a file:// store")
        with ThreadPoolExecutor(self._concurrency) as threads:

            def submit(ready: Sequence[Task]) -> list["Future[list[Outcome]]"]:
                return [threads.submit(self._once, task, job, limits) for task in ready]

            return run_eagerly(tasks, submit, progress)

    def _once(self, task: Task, job: Job, limits: Limits) -> list[Outcome]:
        command = [*self._command, "-m", "gradsharding.running.worker", "--memory", str(limits.memory)]
        lines = f"{job.model_dump_json()}\n{task.model_dump_json()}\n"
        ended = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
        if not ended.stdout:
            raise TaskFailed(f"task {task.id} gave no answer (exit status {ended.returncode}): {ended.stderr[-500:]}", task=task.id)
        answer = json.loads(ended.stdout)
        if "error" not in answer:
            return [TaskReport.model_validate_json(ended.stdout)]
        error = from_wire(answer)
        if isinstance(error, NonFinite):
            return [error]  # the other tasks go on, so that all clients at fault are found in one run
        raise error
