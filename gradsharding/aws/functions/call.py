"""One invocation carries several tasks of one job; what they share is written once. Back come reports, and what ended them early.

A fault is raised over there, so that Lambda counts it among the function's errors; the exception's message carries the whole answer.
"""

import json
from collections.abc import Sequence
from typing import Any

from gradsharding import __version__
from gradsharding.aws.secrets import without_secrets
from gradsharding.errors import GradShardingError, PlanTooLarge, StoreFailed, StoreRefused, TaskFailed, UserError, to_wire
from gradsharding.planning.platform import PAYLOAD
from gradsharding.planning.task import Job, Task
from gradsharding.running.pace import Share
from gradsharding.value import Value

STACK = "gradsharding"
"""Name of the stack, and of its function, that is meant where none is named."""

_FAULTS = (StoreFailed, StoreRefused, TaskFailed)


class Fault(Exception):
    """What ends an invocation that must count as failed; its message is the answer, as JSON."""


class Event(Value):
    """What an invocation is given."""

    release: str
    job: Job
    tasks: tuple[Task, ...]
    share: Share | None = None
    """What it may ask of S3 a second; None for as much as it can."""


def pack(job: Job, tasks: Sequence[Task], share: Share | None = None) -> bytes:
    """Write a job, with the terms that ``tasks`` read, and the tasks as the event of an invocation; raise PlanTooLarge beyond 6 MiB."""
    event = Event(release=__version__, job=job.narrowed(tasks), tasks=tuple(tasks), share=share)
    data = event.model_dump_json().encode()
    if len(data) > PAYLOAD:
        raise PlanTooLarge(
            f"an invocation with {len(tasks)} tasks of {max(task.inputs for task in tasks)} inputs takes {len(data)} bytes; "
            f"Lambda accepts {PAYLOAD}: aggregate fewer updates in one round, or use processes"
        )
    return data


def unpack(event: Any, function: str = STACK) -> tuple[Job, tuple[Task, ...], Share | None]:
    """Read the event of an invocation of ``function``; raise UserError if another release wrote it."""
    if event["release"] != __version__:
        raise UserError(
            f"the function runs gradsharding {__version__}, and was called by {event['release']}; to update it, run: {deploying(function)}"
        )
    read = Event.model_validate_json(json.dumps(event))  # Lambda's runtime has parsed it, and strict values refuse lists from Python
    return read.job, read.tasks, read.share


def is_fault(error: BaseException) -> bool:
    """Tell whether an error lies with the function, its store or its rights, and not with the updates that it was given."""
    return isinstance(error, _FAULTS) or not isinstance(error, GradShardingError)


def failed(error: BaseException, reports: Sequence[Any]) -> dict[str, Any]:
    """Answer that ``error`` has ended an invocation after some reports; raise it as a Fault if it is one."""
    answer = {**to_wire(error), "reports": [*reports]}
    answer["message"] = without_secrets(answer["message"])  # Lambda's runtime logs what is raised
    if is_fault(error):
        raise Fault(json.dumps(answer)) from None
    return answer


def answered(payload: bytes, *, error: bool) -> dict[str, Any] | None:
    """Read what the handler gave or, if Lambda says that there was an ``error``, raised; None for what does not come from our handler."""
    try:
        found = json.loads(payload)
        if error:
            found = json.loads(found["errorMessage"]) if found["errorType"] == Fault.__name__ else None
    except (ValueError, KeyError, TypeError):  # another's, or cut on the way
        return None
    return found if isinstance(found, dict) and "reports" in found else None


def deploying(function: str) -> str:
    """Name the command that puts a function up, or brings it up to date."""
    return "gradsharding deploy" + (f" --name {function}" if function != STACK else "")
