"""The invocations of one run: each batch of tasks is invoked, and invoked again, until every task has its outcome."""

import base64
import json
import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from gradsharding.aws.client import explained, lambda_client
from gradsharding.aws.functions.answers import Do, Verdict, verdict
from gradsharding.aws.functions.call import answered, pack
from gradsharding.aws.functions.tail import metered
from gradsharding.aws.reasons import scrubbed
from gradsharding.aws.refusals import code_of
from gradsharding.errors import (
    GradShardingError,
    NonFinite,
    OutOfMemory,
    StoreFailed,
    StoreRefused,
    TaskFailed,
    UserError,
    from_wire,
    quoted,
)
from gradsharding.planning.plan import Limits
from gradsharding.planning.platform import TIMEOUT
from gradsharding.planning.task import Invocation, Job, Task, TaskReport
from gradsharding.running.executors import Outcome
from gradsharding.running.pace import share
from gradsharding.sizes import mib
from gradsharding.usage import Spent, together

if TYPE_CHECKING:
    from gradsharding.aws.functions.executor import LambdaExecutor

TURN_PATIENCE = 900.0
"""Seconds that tasks wait for their turn, or for a function that is being updated, before the run fails."""

_KILLED = ("OutOfMemory", "signal: killed", "exited without providing a reason")


class _Wait(Exception):
    """Nothing ran, and waiting may help."""

    def __init__(self, why: str) -> None:
        self.why = why


class _Failed(Exception):
    """The invocation failed, and may be tried again."""

    def __init__(self, error: GradShardingError, billed: Invocation | None = None, *, lost: bool = True) -> None:
        self.error = error
        self.billed = billed
        """Its bill, if Lambda sent one."""
        self.lost = lost
        """Whether it sent no answer of its own, so that its requests to stores are not known."""


class _Vain(NamedTuple):
    """A task's failed attempts: their usage of stores, the number of those without an answer, and their bills."""

    usage: Spent = MappingProxyType({})
    lost: int = 0
    invocations: tuple[Invocation, ...] = ()

    def then(self, failed: _Failed) -> "_Vain":
        """Add an attempt."""
        billed = (failed.billed,) if failed.billed else ()
        return _Vain(together(self.usage, failed.error.usage), self.lost + failed.lost, self.invocations + billed)

    def added(self, outcome: Outcome) -> Outcome:
        """Return the outcome of the last attempt with these added."""
        usage = together(self.usage, outcome.usage)
        if isinstance(outcome, NonFinite):
            outcome.usage = usage
            return outcome
        return outcome.model_copy(update={"usage": usage, "lost": outcome.lost + self.lost, "vain": self.invocations})


class Run:
    """The state that the invocations of one call of ``LambdaExecutor.run`` share."""

    def __init__(self, executor: "LambdaExecutor", job: Job, limits: Limits, at_once: Mapping[bool, int]) -> None:
        self.given_up = threading.Event()
        self._executor = executor
        self._job = job
        self._limits = limits
        self._at_once = at_once
        """Functions that share S3's request rate: those that read partial sums (True), and those that read updates."""
        self._client = lambda_client(read_timeout=(executor.settings.timeout or TIMEOUT) + 30)

    def batch(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run tasks, in as few invocations as possible, until each has its outcome; raise the error that stopped them."""
        done: list[Outcome] = []
        vain = defaultdict[str, _Vain](_Vain)
        try:
            self._batch(tasks, done, vain)
        except GradShardingError as error:
            ended = {_task_of(outcome) for outcome in done}
            failed = (attempts.usage for task, attempts in vain.items() if task not in ended)
            error.usage = together(error.usage, *failed, *(outcome.usage for outcome in done))
            raise
        return done

    def _batch(self, tasks: Sequence[Task], done: list[Outcome], vain: dict[str, _Vain]) -> None:
        left = {task.id: task for task in tasks}
        size, asked, failures, waited = len(tasks), 0, 0, 0.0
        while left and not self.given_up.is_set():
            batch = [*left.values()][:size]
            try:
                data = pack(self._job, batch, share(max(self._at_once[bool(task.reads)] for task in batch)))
            except UserError:
                if len(batch) == 1:
                    raise
                size = len(batch) // 2
                continue
            asked += 1
            try:
                outcomes = self._invoke(data, batch, asked, vain)
            except _Wait as wait:
                waited += _pause(asked)
                if waited > TURN_PATIENCE:
                    raise TaskFailed(f"task {batch[0].id} waited {waited:.0f} s for its turn: {wait.why}", task=batch[0].id) from None
                continue
            except _Failed as failed:
                failures += 1
                vain.update((task.id, vain[task.id].then(failed)) for task in (batch if failed.lost else batch[:1]))
                if failures == self._executor.attempts:
                    raise type(failed.error)(f"{failed.error.message} ({failures} times)", **failed.error.details) from None
                size = 1  # so that one task does not make others fail
                _pause(failures)
                continue
            for outcome in outcomes:
                del left[_task_of(outcome)]
            done += [vain[_task_of(outcome)].added(outcome) for outcome in outcomes]
            asked, failures, waited = 0, 0, 0.0

    def _invoke(self, data: bytes, tasks: Sequence[Task], asked: int, vain: dict[str, _Vain]) -> list[Outcome]:
        """Invoke once; return the outcomes of the tasks that ended, at least one. If the next one failed, add its attempt to ``vain``.

        Raise _Wait, _Failed, or an error that another attempt cannot mend.
        """
        name, first = self._executor.function, tasks[0].id
        try:
            answer = self._client.invoke(FunctionName=self._executor.target, Payload=data, LogType="Tail")
            payload = answer["Payload"].read()
        except ClientError as error:
            raise self._refused(error, first) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            if isinstance(error, BotoCoreError) and isinstance(refused := explained(error, f"invocation of function {name}"), StoreRefused):
                raise refused from error
            raise _Failed(TaskFailed(f"task {first} failed: its answer was lost ({scrubbed(error)}); run it again", task=first)) from error
        log = base64.b64decode(answer.get("LogResult", "")).decode(errors="replace")
        billed = self._billed(log, asked, len(tasks))
        broken = "FunctionError" in answer
        if content := answered(payload, error=broken):
            return self._answered(content, tasks, billed, vain)
        if broken:
            raise self._broken(tasks[0], payload.decode(errors="replace"), billed)
        raise UserError(f"function {name} does not run gradsharding's code: it answered {quoted(payload)}; name another function")

    def _refused(self, error: ClientError, task: str) -> Exception:
        """Return the exception to raise where Lambda did not run the function."""
        if code_of(error) == "ResourceNotFoundException":
            return self._executor.gone()
        doing = f"invocation of function {self._executor.function}"
        match verdict(error):
            case None:
                return explained(error, doing)
            case Verdict(Do.WAIT, why):
                return _Wait(why)
            case Verdict(Do.REFUSE, why):
                return StoreRefused(f"{doing}: {why} ({code_of(error)})", code=code_of(error))
        return _Failed(TaskFailed(f"task {task} failed: Lambda answered {code_of(error)}; run it again", task=task))

    def _answered(self, content: dict[str, Any], tasks: Sequence[Task], billed: Invocation | None, vain: dict[str, _Vain]) -> list[Outcome]:
        """Read the handler's answer."""
        reports: list[Outcome] = [
            TaskReport.model_validate_json(json.dumps(report)).model_copy(update={"invocation": billed, "held_by": "AWS Lambda"})
            for report in content["reports"]
        ]
        if "error" not in content:
            return reports
        error = self._by_function(from_wire(content))
        if isinstance(error, NonFinite):
            return [*reports, error]
        if reports:
            failed = tasks[len(reports)].id  # it will be invoked again
            vain[failed] = vain[failed].then(_Failed(error, billed, lost=False))
            return reports
        if isinstance(error, OutOfMemory):
            raise self._too_small(tasks[0], error.message)
        raise _Failed(error, billed, lost=False) if type(error) in (TaskFailed, StoreFailed) else error

    def _by_function(self, error: GradShardingError) -> GradShardingError:
        """Add to a refusal that it concerns the function's rights or settings, and not the caller's."""
        if not isinstance(error, StoreRefused):
            return error
        refused = StoreRefused(f"function {self._executor.function}, under its role: {error.message}", **error.details)
        refused.usage = error.usage
        return refused

    def _billed(self, log: str, asked: int, tasks: int) -> Invocation | None:
        """Read an invocation's bill at the end of its log; None if it has none."""
        if not (found := metered(log)):
            return None
        return Invocation(
            request=found.request,
            attempts=asked,
            tasks=tasks,
            billed_seconds=found.billed,
            memory_size=found.memory_size,
            max_memory=found.max_memory,
            init_seconds=found.init,
            architecture=self._executor.settings.architecture,
            region=self._client.meta.region_name,
        )

    def _broken(self, task: Task, answer: str, billed: Invocation | None) -> Exception:
        """Return the exception to raise for a function that ended before it could answer, by the cause."""
        why = re.sub(r"^RequestId: \S+ (Error: )?", "", _message(answer))
        killed = any(sign in answer for sign in _KILLED)
        if killed and billed and billed.max_memory >= 0.95 * billed.memory_size:
            return self._too_small(task, f"Lambda ended it at {mib(billed.max_memory)}")
        if "Task timed out" in answer:
            advice = "use more shards, or give the function more time, or more memory, which makes it faster"
        elif killed:
            advice = "it may have exceeded its memory: use more shards, or give the function more memory"
        else:
            advice = "see its log in CloudWatch"
        return _Failed(TaskFailed(f"task {task.id} failed: {why}; {advice}", task=task.id), billed)

    def _too_small(self, task: Task, cause: str) -> OutOfMemory:
        return OutOfMemory(
            f"task {task.id} exceeded the {mib(self._limits.memory)} that function {self._executor.function} has for it, though "
            f"{mib(task.memory)} were projected: {cause}; use more shards, or give the function more memory",
            task=task.id,
        )


def _task_of(outcome: Outcome) -> str:
    return str(outcome.details["tasks"][0]) if isinstance(outcome, NonFinite) else outcome.task


def _message(answer: str) -> str:
    try:
        return str(json.loads(answer).get("errorMessage", answer))
    except (ValueError, AttributeError):
        return answer


def _pause(times: int) -> float:
    """Wait before another attempt, longer each time up to 20 s, and at random so that callers spread out; return the seconds."""
    seconds = random.uniform(0, min(20.0, 0.1 * 2**times))
    time.sleep(seconds)
    return seconds
