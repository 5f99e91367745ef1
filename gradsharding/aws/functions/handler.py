"""AWS Lambda runs this handler: it runs the tasks of an invocation one after another, as many as fit in the time that is left."""

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

RESERVE = 1.5
"""Start another task only while the time left is this many times that of the longest task so far."""

LAST = 5.0
"""Seconds before the timeout, at most half of the time left, in which a function no longer waits for S3, so that it can still answer."""

BUNDLE = Path(__file__).parents[3] / "bundle.json"
"""Contents of the code, if it was built for a function."""

if BUNDLE.exists():  # once in each cold start, so that the log names the code that ran
    log.info("cold start", extra={"facts": {"bundle": json.loads(BUNDLE.read_text())["sha256"]}})


def handler(event: Any, context: Invoked) -> dict[str, Any]:
    """Run an invocation's tasks; return the reports of those that were completed, and the error that stopped them, if there was one.

    Raise Fault, which carries the same, for an error of the function.
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
        if reports and context.get_remaining_time_in_millis() < 1000 * RESERVE * longest:
            break
        try:
            report = worker.run_alone(task, job, _opened(job.store))
        except Exception as error:  # noqa: BLE001 - it is sent to the caller, and raised again there
            _log_error(error, job, task)
            return failed(error, reports)
        reports.append(report.model_dump(mode="json"))
        longest = max(longest, report.seconds)
    seconds = sum(report["seconds"] for report in reports)
    facts = {"round": job.round, "tasks": [report["task"] for report in reports], "seconds": seconds}
    log.info("%d of %d tasks done", len(reports), len(tasks), extra={"facts": facts})
    return {"reports": reports}


def _log_error(error: Exception, job: Job, task: Task) -> None:
    """Log the error that ended a task, with a traceback if it is not a GradShardingError, which makes it a bug."""
    ours = isinstance(error, GradShardingError)
    facts = {"round": job.round, "task": task.id, "error": type(error).__name__}
    write = log.error if is_fault(error) else log.warning
    write(error.message if isinstance(error, GradShardingError) else str(error), extra={"facts": facts}, exc_info=None if ours else error)


@lru_cache(maxsize=16)
def _opened(url: str) -> ObjectStore:
    return open_store(url)
