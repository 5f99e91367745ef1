"""A Lambda function runs a plan's tasks, in as many invocations at the same time as the account and the caller allow."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.advice.timing import suited
from gradsharding.aws.client import explained, lambda_client
from gradsharding.aws.functions.call import deploying
from gradsharding.aws.functions.invocations import Run
from gradsharding.aws.refusals import code_of
from gradsharding.errors import (
    StoreRefused,
    UserError,
)
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.platform import RUNTIME, Architecture
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.plugins import OURS, STORES
from gradsharding.running.executors import Outcome, Progress, run_eagerly
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.reading import Reading
from gradsharding.stores.urls import locate

CONCURRENCY = 100
"""Invocations at the same time, if the account's limit is not known."""

SHARE = 0.5
"""Share of the account's unreserved invocations that a run uses by default: others run functions there, too."""

_NAME = re.compile(
    r"(?P<whole>(?:arn:(?:aws[a-zA-Z-]*)?:lambda:)?(?:(?P<region>[a-z]{2,4}(?:-[a-z]+)+-\d):)?(?:\d{12}:)?(?:function:)?"
    r"(?P<function>[A-Za-z0-9_-]+))(?::(?P<qualifier>\$LATEST|[A-Za-z0-9_-]+))?"
)
"""A function's name or ARN, complete or partial, with or without a version or alias, as Lambda's API accepts it."""


class Settings(NamedTuple):
    """Settings of a function and its account; None for those that are not known."""

    memory: int | None
    """Bytes."""
    timeout: int | None
    """Seconds."""
    reserved: int | None
    """Invocations at the same time that are reserved for the function, which are its limit; None also if none are reserved."""
    unreserved: int | None
    """Invocations at the same time that the account allows all functions without a reservation."""
    architecture: Architecture | None
    version: str | None = None
    """The published version that was named, or that the alias points to."""

    @property
    def ceiling(self) -> int | None:
        """Invocations at the same time that are possible, if other functions use none of them."""
        return self.unreserved if self.reserved is None else self.reserved


class LambdaExecutor:
    """Runs tasks on the AWS Lambda function that ``gradsharding deploy`` creates, whose code is ``gradsharding.aws.functions.handler``."""

    def __init__(self, function: str, *, concurrency: int | None = None, attempts: int = 3) -> None:
        """Use ``function``: a name, ``name:qualifier`` or ARN; a qualifier is a version or an alias.

        ``concurrency`` is the number of invocations at the same time, at most. By default it is all that are reserved for the function or,
        if none are, half of the account's unreserved ones. Raise UserError for a text that names no function.
        """
        named = _NAME.fullmatch(function)
        if not named:
            raise UserError(f"{function!r} is not the name of a Lambda function; give its name, NAME:ALIAS, NAME:VERSION or its ARN")
        self.function = function
        self.concurrency = concurrency
        self.attempts = attempts
        self._unqualified, self._region, self._name = named["whole"], named["region"], named["function"]
        self._qualifier = named["qualifier"]

    @cached_property
    def settings(self) -> Settings:
        """Settings of the function, as far as these credentials may read them; raise StoreRefused if there is no such function.

        They are read once. Memory, timeout and architecture belong to the version or alias; concurrency is reserved for the whole function.
        """
        client = lambda_client()
        config = self._read(lambda: client.get_function_configuration(FunctionName=self.function)) or {}
        reserved = self._read(lambda: client.get_function_concurrency(FunctionName=self._unqualified)) or {}
        account = self._read(client.get_account_settings) or {}
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
        """What is invoked: the version that the alias points to, so that all tasks run the same code even if the function is updated."""
        version = self.settings.version
        return f"{self._unqualified}:{version}" if version else self.function

    def limits(self, limits: Limits | None) -> Limits:
        """Return the memory that the function has and ``limits`` allow, and the concurrency: the default, or what is asked for."""
        memory = self.settings.memory
        room = memory - RUNTIME if memory else Limits().memory
        asked = [count for count in (self.concurrency, limits.concurrency if limits else None) if count is not None]
        ceiling = self.settings.ceiling
        at_once = min(asked, default=self._default)
        return Limits(
            memory=min(room, limits.memory) if limits else room, concurrency=at_once if ceiling is None else min(at_once, ceiling)
        )

    @property
    def _default(self) -> int:
        """Invocations at the same time, if no number is asked for."""
        reserved, unreserved = self.settings.reserved, self.settings.unreserved
        if reserved is not None:
            return reserved
        return CONCURRENCY if unreserved is None else min(unreserved, max(1, int(unreserved * SHARE)))

    def taken(self, limits: Limits) -> str:
        """Say how many invocations a run makes at the same time, and how many there are."""
        count, reserved, unreserved = limits.concurrency, self.settings.reserved, self.settings.unreserved
        if reserved is not None:
            return f"{count} of {reserved} invocations at once that are reserved for {self._name}"
        if unreserved is None:
            return f"{count} invocations at once; these credentials may not read how many the account has"
        more = "--concurrency N, or LambdaExecutor(..., concurrency=N), uses more"
        left = "" if count == unreserved else f"; the rest is left to others ({more})"
        return f"{count} of {unreserved} unreserved invocations at once{left}"

    def reading(self, plan: Plan, limits: Limits) -> Reading:
        """Return the reading with which invocations, which share S3's request rate, finish the plan soonest."""
        return suited(plan, limits.memory + RUNTIME, limits.concurrency)

    def run(self, tasks: Sequence[Task], job: Job, store: ObjectStore, limits: Limits, progress: Progress) -> list[TaskReport]:
        places = {reference.rpartition("/")[0] for reference in (job.output, job.partials, *(term.source for term in job.terms))}
        for url in sorted({job.store, *(place for place in places if "://" in place)}):
            _check_reach(url, store)
        if not tasks:
            return []
        count = min(len(tasks), max(self.limits(limits).concurrency or 1, 1))
        levels = Counter(bool(task.reads) for task in tasks)
        run = Run(self, job, limits, {reads: min(count, of) for reads, of in levels.items()})
        with ThreadPoolExecutor(count, thread_name_prefix="gradsharding-lambda") as pool:

            def submit(ready: Sequence[Task]) -> list[Future[list[Outcome]]]:
                return [pool.submit(run.batch, ready[i::count]) for i in range(min(count, len(ready)))]

            return run_eagerly(tasks, submit, progress, run.given_up.set)

    def _read(self, ask: Callable[[], Any]) -> Any:
        """Return the answer; None if these credentials may not ask. Raise StoreRefused if the function does not exist."""
        try:
            return ask()
        except (BotoCoreError, ClientError) as error:
            if code_of(error) == "ResourceNotFoundException":
                raise self._absent() from error
            if code_of(error) in {"AccessDeniedException", "AccessDenied"}:
                return None
            raise explained(error, f"settings of function {self.function}") from error

    def gone(self) -> StoreRefused:
        """The error for a function, or a version, that has disappeared since the run began."""
        version = self.settings.version
        if version in (None, self._qualifier):
            return self._absent()
        return StoreRefused(
            f"version {version} of {self._name}, to which {self.function} pointed when this run began, is gone: the function was deleted, "
            "or deployed anew, meanwhile; run it again"
        )

    def _absent(self) -> StoreRefused:
        chosen, command = lambda_client().meta.region_name, deploying(self._name)
        if self._region not in (None, chosen):
            return StoreRefused(
                f"function {self.function!r} is in {self._region}, and the region set here is {chosen}; "
                f"set AWS_DEFAULT_REGION to {self._region}"
            )
        return StoreRefused(f"there is no function {self.function!r} in this account and region; deploy it with: {command}")


def _check_reach(url: str, home: ObjectStore) -> None:
    """Raise UserError if functions cannot reach a store: it is on this machine only, or the function's code cannot open such URLs."""
    store = home if url == home.url else locate(f"{url}/-", home)[0]
    if store.reach != "network" or url.partition("://")[0] not in OURS[STORES]:
        raise UserError(f"{url} cannot be reached by Lambda functions; use an s3:// store, and copy to it what it lacks")
