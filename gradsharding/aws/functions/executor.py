"""Tasks as invocations of a Lambda function: bounded in number, and asked for again, by their identity, until each has answered."""

import base64
import json
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from gradsharding.advice.timing import suited
from gradsharding.aws.client import explained, lambda_client
from gradsharding.aws.functions.answers import Do, Verdict, verdict
from gradsharding.aws.functions.call import answered, deploying, pack
from gradsharding.aws.functions.tail import metered
from gradsharding.aws.refusals import code_of, scrubbed
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
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.platform import RUNTIME, TIMEOUT, Architecture
from gradsharding.planning.task import Invocation, Job, Task, TaskReport
from gradsharding.plugins import OURS, STORES
from gradsharding.running.executors import Outcome, Progress, run_eagerly
from gradsharding.running.pace import share
from gradsharding.sizes import mib
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import Reading
from gradsharding.stores.urls import locate
from gradsharding.usage import Spent, together

CONCURRENCY = 100
"""Invocations at once, where the account does not say what it allows."""

TURN_PATIENCE = 900.0
"""Seconds that tasks wait for their turn, or for a function that is being updated, before the round is given up."""

ONE_IN = 2
"""A run takes one in so many of the account's unreserved invocations, unless it is told a number: others run functions there, too."""

_KILLED = ("OutOfMemory", "signal: killed", "exited without providing a reason")

_NAME = re.compile(
    r"(?P<whole>(?:arn:(?:aws[a-zA-Z-]*)?:lambda:)?(?:(?P<region>[a-z]{2,4}(?:-[a-z]+)+-\d):)?(?:\d{12}:)?(?:function:)?"
    r"(?P<function>[A-Za-z0-9_-]+))(?::(?P<qualifier>\$LATEST|[A-Za-z0-9_-]+))?"
)
"""A function's name or ARN, whole or in part, with or without a version or alias, as Lambda's API reads it."""


class Settings(NamedTuple):
    """What the account says of a function; None where it does not tell."""

    memory: int | None
    """Bytes."""
    timeout: int | None
    """Seconds."""
    reserved: int | None
    """Invocations at once that are kept for the function, and its most; None also if none are kept."""
    unreserved: int | None
    """Invocations at once that the account has for all functions without a reservation."""
    architecture: Architecture | None
    version: str | None = None
    """The published version that was asked for, or that the alias led to."""

    @property
    def most(self) -> int | None:
        """Invocations at once that may be had, if others leave them."""
        return self.unreserved if self.reserved is None else self.reserved


class LambdaExecutor:
    """Tasks on the AWS Lambda function that ``gradsharding deploy`` puts up; it runs ``gradsharding.aws.functions.handler``."""

    def __init__(self, function: str, *, concurrency: int | None = None, attempts: int = 3) -> None:
        """Use ``function``: a name, ``name:qualifier`` or ARN; a qualifier is a version or an alias.

        ``concurrency`` bounds its invocations at once. By default they are all that are reserved for the function; where none are, half of
        what the account has unreserved. Raise UserError for what can name no function.
        """
        named = _NAME.fullmatch(function)
        if not named:
            raise UserError(f"{function!r} can name no Lambda function; give its name, NAME:ALIAS, NAME:VERSION or its ARN")
        self.function = function
        self.concurrency = concurrency
        self.attempts = attempts
        self._unqualified, self._region, self._name = named["whole"], named["region"], named["function"]
        self._qualifier = named["qualifier"]

    @cached_property
    def settings(self) -> Settings:
        """What the account says of the function, as far as these credentials may ask; raise StoreRefused if there is none.

        They are asked for once. Memory, time and architecture are the version's or alias's; concurrency is reserved for a function as a
        whole.
        """
        client = lambda_client()
        config = self._told(lambda: client.get_function_configuration(FunctionName=self.function)) or {}
        reserved = self._told(lambda: client.get_function_concurrency(FunctionName=self._unqualified)) or {}
        account = self._told(client.get_account_settings) or {}
        memory = config.get("MemorySize")
        return Settings(
            memory=memory and memory << 20,
            timeout=config.get("Timeout"),
            reserved=reserved.get("ReservedConcurrentExecutions"),
            unreserved=account.get("AccountLimit", {}).get("UnreservedConcurrentExecutions"),
            architecture=next(iter(config.get("Architectures", [])), None),
            version=config.get("Version") if self._qualifier else None,
        )

    @property
    def target(self) -> str:
        """What is invoked: the version that the alias led to, so that all tasks run the same code, also if the function is updated."""
        version = self.settings.version
        return f"{self._unqualified}:{version}" if version else self.function

    def limits(self, limits: Limits | None) -> Limits:
        """What the function has, if it is less than what is allowed; of concurrency, a part, or the number that is asked for."""
        memory = self.settings.memory
        room = memory - RUNTIME if memory else Limits().memory
        asked = [count for count in (self.concurrency, limits.concurrency if limits else None) if count is not None]
        most = self.settings.most
        at_once = min(asked, default=self._unasked)
        return Limits(memory=min(room, limits.memory) if limits else room, concurrency=at_once if most is None else min(at_once, most))

    @property
    def _unasked(self) -> int:
        """Invocations at once that are taken unasked."""
        reserved, unreserved = self.settings.reserved, self.settings.unreserved
        if reserved is not None:
            return reserved
        return CONCURRENCY if unreserved is None else min(unreserved, max(1, unreserved // ONE_IN))

    def taken(self, limits: Limits) -> str:
        """Say how many invocations at once a run takes, of how many."""
        count, reserved, unreserved = limits.concurrency, self.settings.reserved, self.settings.unreserved
        if reserved is not None:
            return f"{count} of {reserved} invocations at once that are reserved for {self._name}"
        if unreserved is None:
            return f"{count} invocations at once; these credentials may not ask how many the account has"
        more = "--concurrency N, or LambdaExecutor(..., concurrency=N), takes more"
        left = "" if count == unreserved else f"; the rest is left to others ({more})"
        return f"{count} of {unreserved} unreserved invocations at once{left}"

    def reading(self, plan: Plan, limits: Limits) -> Reading:
        """Give the reading by which invocations, which share the rate of requests that S3 takes, finish the plan soonest."""
        return suited(plan, limits.memory + RUNTIME, limits.concurrency)

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        places = {reference.rpartition("/")[0] for reference in (job.output, job.partials, *(term.source for term in job.terms))}
        for url in sorted({job.store, *(place for place in places if "://" in place)}):
            _check_reach(url, store)
        if not tasks:
            return []
        count = min(len(tasks), max(self.limits(limits).concurrency or 1, 1))
        levels = Counter(bool(task.reads) for task in tasks)
        run = _Run(self, job, limits, {reads: min(count, of) for reads, of in levels.items()})
        with ThreadPoolExecutor(count, thread_name_prefix="gradsharding-lambda") as pool:

            def submit(ready: Sequence[Task]) -> list[Future[list[Outcome]]]:
                return [pool.submit(run.batch, ready[i::count]) for i in range(min(count, len(ready)))]

            return run_eagerly(tasks, submit, progress, run.given_up.set)

    def _told(self, ask: Callable[[], Any]) -> Any:
        """What the account says; None if these credentials may not ask. Raise StoreRefused for a function that is not there."""
        try:
            return ask()
        except (BotoCoreError, ClientError) as error:
            if code_of(error) == "ResourceNotFoundException":
                raise self._absent() from error
            if code_of(error) in {"AccessDeniedException", "AccessDenied"}:
                return None
            raise explained(error, f"settings of function {self.function}") from error

    def _gone(self) -> StoreRefused:
        """Say what is no longer there, once a run has begun."""
        version = self.settings.version
        if version in (None, self._qualifier):
            return self._absent()
        return StoreRefused(
            f"version {version} of {self._name}, which {self.function} led to when this run began, is gone: the function was removed, or "
            "put up anew, meanwhile; run it again"
        )

    def _absent(self) -> StoreRefused:
        chosen, put_up = lambda_client().meta.region_name, deploying(self._name)
        if self._region not in (None, chosen):
            return StoreRefused(
                f"function {self.function!r} is in {self._region}, and the region chosen here is {chosen}; "
                f"set AWS_DEFAULT_REGION to {self._region}"
            )
        return StoreRefused(f"there is no function {self.function!r} in this account and region; put it up with: {put_up}")


class _Wait(Exception):
    """Nothing ran, and time may mend it."""

    def __init__(self, why: str) -> None:
        self.why = why


class _Failed(Exception):
    """The invocation may be tried again."""

    def __init__(self, error: GradShardingError, told: Invocation | None = None, *, lost: bool = True) -> None:
        self.error = error
        self.told = told
        """What it was billed, if Lambda said so."""
        self.lost = lost
        """Whether it gave no answer of its own, so that nobody knows what it asked of stores."""


class _Vain(NamedTuple):
    """What a task's attempts before the last one asked of stores, how many of them gave no answer, and what they were billed."""

    usage: Spent = MappingProxyType({})
    lost: int = 0
    invocations: tuple[Invocation, ...] = ()

    def then(self, failed: _Failed) -> "_Vain":
        """Add an attempt."""
        told = (failed.told,) if failed.told else ()
        return _Vain(together(self.usage, failed.error.usage), self.lost + failed.lost, self.invocations + told)

    def added(self, one: Outcome) -> Outcome:
        """Add this to what came of the attempt that was answered."""
        usage = together(self.usage, one.usage)
        if isinstance(one, NonFinite):
            one.usage = usage
            return one
        return one.model_copy(update={"usage": usage, "lost": one.lost + self.lost, "vain": self.invocations})


class _Run:
    """One call of ``LambdaExecutor.run``: what its invocations share."""

    def __init__(self, executor: LambdaExecutor, job: Job, limits: Limits, at_once: Mapping[bool, int]) -> None:
        self.given_up = threading.Event()
        self._executor = executor
        self._job = job
        self._limits = limits
        self._at_once = at_once
        """Functions that share what S3 bears: those that read partial sums (True), and those that read updates."""
        self._client = lambda_client(read_timeout=(executor.settings.timeout or TIMEOUT) + 30)

    def batch(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run tasks, in as few invocations as it takes, until each has its outcome; raise what ended it."""
        done: list[Outcome] = []
        vain = defaultdict[str, _Vain](_Vain)
        try:
            self._batch(tasks, done, vain)
        except GradShardingError as error:
            left = (one.usage for task, one in vain.items() if task not in {_task_of(one) for one in done})
            error.usage = together(error.usage, *left, *(one.usage for one in done))
            raise
        return done

    def _batch(self, tasks: Sequence[Task], done: list[Outcome], vain: dict[str, _Vain]) -> None:
        left = {task.id: task for task in tasks}
        size, asked, failures, waited = len(tasks), 0, 0, 0.0
        while left and not self.given_up.is_set():
            some = [*left.values()][:size]
            try:
                data = pack(self._job, some, share(max(self._at_once[bool(task.reads)] for task in some)))
            except UserError:
                if len(some) == 1:
                    raise
                size = len(some) // 2
                continue
            asked += 1
            try:
                outcomes = self._invoke(data, some, asked, vain)
            except _Wait as wait:
                waited += _pause(asked)
                if waited > TURN_PATIENCE:
                    raise TaskFailed(f"task {some[0].id} waited {waited:.0f} s for its turn: {wait.why}", task=some[0].id) from None
                continue
            except _Failed as failed:
                failures += 1
                vain.update((task.id, vain[task.id].then(failed)) for task in (some if failed.lost else some[:1]))
                if failures == self._executor.attempts:
                    raise type(failed.error)(f"{failed.error.message} ({failures} times)", **failed.error.details) from None
                size = 1  # so that one task does not take others down with it
                _pause(failures)
                continue
            for one in outcomes:
                del left[_task_of(one)]
            done += [vain[_task_of(one)].added(one) for one in outcomes]
            asked, failures, waited = 0, 0, 0.0

    def _invoke(self, data: bytes, tasks: Sequence[Task], asked: int, vain: dict[str, _Vain]) -> list[Outcome]:
        """Ask once: give the outcomes of the tasks that were done, at least one; note in ``vain`` what the next one asked, if it failed.

        Raise _Wait, _Failed, or what tries cannot mend.
        """
        name, first = self._executor.function, tasks[0].id
        try:
            answer = self._client.invoke(FunctionName=self._executor.target, Payload=data, LogType="Tail")
            payload = answer["Payload"].read()
        except ClientError as error:
            raise self._said(error, first) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            if isinstance(error, BotoCoreError) and isinstance(refused := explained(error, f"invocation of function {name}"), StoreRefused):
                raise refused from error
            raise _Failed(TaskFailed(f"task {first} failed: its answer was lost ({scrubbed(error)}); run it again", task=first)) from error
        log = base64.b64decode(answer.get("LogResult", "")).decode(errors="replace")
        told = self._metered(log, asked, len(tasks))
        broken = "FunctionError" in answer
        if found := answered(payload, error=broken):
            return self._answered(found, tasks, told, vain)
        if broken:
            raise self._broken(tasks[0], payload.decode(errors="replace"), told)
        raise UserError(f"function {name} runs other code than gradsharding's: it answered {quoted(payload)}; name another function")

    def _said(self, error: ClientError, task: str) -> Exception:
        """Give what to raise for what Lambda said instead of running the function."""
        if code_of(error) == "ResourceNotFoundException":
            return self._executor._gone()  # noqa: SLF001 - the same module
        doing, found = f"invocation of function {self._executor.function}", verdict(error)
        match found:
            case None:
                return explained(error, doing)
            case Verdict(Do.WAIT, why):
                return _Wait(why)
            case Verdict(Do.REFUSE, why):
                return StoreRefused(f"{doing}: {why} ({code_of(error)})", code=code_of(error))
        return _Failed(TaskFailed(f"task {task} failed: Lambda answered {code_of(error)}; run it again", task=task))

    def _answered(self, found: dict[str, Any], tasks: Sequence[Task], told: Invocation | None, vain: dict[str, _Vain]) -> list[Outcome]:
        """Read what the handler said."""
        reports: list[Outcome] = [
            TaskReport.model_validate_json(json.dumps(report)).model_copy(update={"invocation": told, "held_by": "AWS Lambda"})
            for report in found["reports"]
        ]
        if "error" not in found:
            return reports
        error = self._by_function(from_wire(found))
        if isinstance(error, NonFinite):
            return [*reports, error]
        if reports:
            failed = tasks[len(reports)].id  # it is asked for again
            vain[failed] = vain[failed].then(_Failed(error, told, lost=False))
            return reports
        if isinstance(error, OutOfMemory):
            raise self._too_small(tasks[0], error.message)
        raise _Failed(error, told, lost=False) if type(error) in (TaskFailed, StoreFailed) else error

    def _by_function(self, error: GradShardingError) -> GradShardingError:
        """Say whose rights or settings a refusal is about: they are the function's, and not the caller's."""
        if not isinstance(error, StoreRefused):
            return error
        found = StoreRefused(f"function {self._executor.function}, under its role: {error.message}", **error.details)
        found.usage = error.usage
        return found

    def _metered(self, log: str, asked: int, tasks: int) -> Invocation | None:
        """Read what Lambda measured, at the end of an invocation's log."""
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

    def _broken(self, task: Task, answer: str, told: Invocation | None) -> Exception:
        """Tell apart what ended a function before it could answer."""
        why = re.sub(r"^RequestId: \S+ (Error: )?", "", _message(answer))
        killed = any(sign in answer for sign in _KILLED)
        if killed and told and told.max_memory >= 0.95 * told.memory_size:
            return self._too_small(task, f"Lambda ended it at {mib(told.max_memory)}")
        if "Task timed out" in answer:
            advice = "use more shards, or give the function more time, or more memory, which makes it faster"
        elif killed:
            advice = "it may have outgrown its memory: use more shards, or give the function more"
        else:
            advice = "its log in CloudWatch says more"
        return _Failed(TaskFailed(f"task {task.id} failed: {why}; {advice}", task=task.id), told)

    def _too_small(self, task: Task, how: str) -> OutOfMemory:
        return OutOfMemory(
            f"task {task.id} outgrew the {mib(self._limits.memory)} that function {self._executor.function} has for it, though "
            f"{mib(task.memory)} were projected: {how}; use more shards, or give the function more memory",
            task=task.id,
        )


def _check_reach(url: str, home: ObjectStore) -> None:
    """Raise UserError if functions cannot reach a store: other machines cannot, or the function's code has none for such URLs."""
    store = home if url == home.url else locate(f"{url}/-", home)[0]
    if store.reach != "network" or url.partition("://")[0] not in OURS[STORES]:
        raise UserError(f"{url} cannot be reached by Lambda functions; use an s3:// store, and copy there what it does not have")


def _task_of(one: Outcome) -> str:
    return str(one.details["tasks"][0]) if isinstance(one, NonFinite) else one.task


def _message(answer: str) -> str:
    try:
        return str(json.loads(answer).get("errorMessage", answer))
    except (ValueError, AttributeError):
        return answer


def _pause(times: int) -> float:
    """Wait before asking again, longer each time up to 20 s, at random so that many do not come back together; give the seconds."""
    seconds = random.uniform(0, min(20.0, 0.1 * 2**times))
    time.sleep(seconds)
    return seconds
