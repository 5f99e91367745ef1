"""What AWS Lambda runs: the worker's tasks, one after another, as many as fit into the time that is left."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradsharding.aws.functions.call import failed, is_fault, unpack
from gradsharding.aws.functions.log import Invoked, about, log
from gradsharding.errors import GradShardingError, UserError
from gradsharding.planning.task import Job, Task
from gradsharding.running import worker
from gradsharding.running.pace import keeping
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import open_store

MARGIN = 1.5
"""Another task is begun only if so many times the longest one so far is left."""

LAST = 5.0
"""Seconds before the end of its time, or half of it, in which a function no longer waits for S3, so that it can say what it waited for."""

BUNDLE = Path(__file__).parents[3] / "bundle.json"
"""What the code is made of, where it was built for a function."""

if BUNDLE.exists():  # once for each cold start: the log says which code ran
    log.info("cold start", extra={"facts": {"bundle": json.loads(BUNDLE.read_text())["sha256"]}})


def handler(event: Any, context: Invoked) -> dict[str, Any]:
    """Run an invocation's tasks; give the reports of those that were done, and the error that ended them, if one did.

    Raise Fault, which carries the same, for an error that lies with the function.
    """
    with about(context):
        try:
            job, tasks, share = unpack(event, context.function_name)
        except UserError as error:
            log.error(error.message)
            return failed(error, [])
        left = context.get_remaining_time_in_millis() / 1000
        with keeping(share, max(left - LAST, left / 2)):
            return _run(job, tasks, context)


def _run(job: Job, tasks: tuple[Task, ...], context: Invoked) -> dict[str, Any]:
    reports, longest = list[Any](), 0.0
    for task in tasks:
        if reports and context.get_remaining_time_in_millis() < 1000 * MARGIN * longest:
            break
        try:
            report = worker.run_alone(task, job, _opened(job.store))
        except Exception as error:  # noqa: BLE001 - it crosses the wire and is raised again at the call
            _tell(error, job, task)
            return failed(error, reports)
        reports.append(report.model_dump(mode="json"))
        longest = max(longest, report.seconds)
    facts = {"round": job.round, "tasks": [one["task"] for one in reports], "seconds": sum(one["seconds"] for one in reports)}
    log.info("%d of %d tasks done", len(reports), len(tasks), extra={"facts": facts})
    return {"reports": reports}


def _tell(error: Exception, job: Job, task: Task) -> None:
    """Log what has ended a task: a fault with the place in our code, where it is a bug of ours."""
    ours = isinstance(error, GradShardingError)
    facts = {"round": job.round, "task": task.id, "error": type(error).__name__}
    say = log.error if is_fault(error) else log.warning
    say(error.message if isinstance(error, GradShardingError) else str(error), extra={"facts": facts}, exc_info=None if ours else error)


@lru_cache(maxsize=16)
def _opened(url: str) -> ObjectStore:
    return open_store(url)
