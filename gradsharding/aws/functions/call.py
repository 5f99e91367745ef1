"""One invocation carries several tasks of one job, and what they share once; its answer has reports, and the error that stopped it.

A fault is raised in the function, so that Lambda counts it as an error of the function; the exception's message is the whole answer.
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
"""Default name of the stack, and of its function."""

_FAULTS = (StoreFailed, StoreRefused, TaskFailed)


class Fault(Exception):
    """Ends an invocation that must count as failed; its message is the answer, as JSON."""


class Event(Value):
    """The event of an invocation."""

    release: str
    job: Job
    tasks: tuple[Task, ...]
    share: Share | None = None
    """Requests to S3 that it may make per second; None for no limit."""


def pack(job: Job, tasks: Sequence[Task], share: Share | None = None) -> bytes:
    """Serialize a job, with the terms that ``tasks`` read, and the tasks as an invocation's event; raise PlanTooLarge beyond 6 MiB."""
    event = Event(release=__version__, job=job.narrowed(tasks), tasks=tuple(tasks), share=share)
    data = event.model_dump_json().encode()
    if len(data) > PAYLOAD:
        raise PlanTooLarge(
            f"an invocation with {len(tasks)} tasks of {max(task.inputs for task in tasks)} inputs takes {len(data)} bytes; "
            f"Lambda accepts {PAYLOAD}: aggregate fewer updates in one round, or use processes"
        )
    return data


def unpack(event: Any, function: str = STACK) -> tuple[Job, tuple[Task, ...], Share | None]:
    """Parse the event of an invocation of ``function``; raise UserError if another release wrote it."""
    if event["release"] != __version__:
        raise UserError(
            f"the function runs gradsharding {__version__}, the caller {event['release']}; to update it, run: {deploying(function)}"
        )
    read = Event.model_validate_json(json.dumps(event))  # the runtime has parsed it to lists, which strict values refuse
    return read.job, read.tasks, read.share


def is_fault(error: BaseException) -> bool:
    """Whether an error is due to the function, its store or its rights, and not to the updates."""
    return isinstance(error, _FAULTS) or not isinstance(error, GradShardingError)


def failed(error: BaseException, reports: Sequence[Any]) -> dict[str, Any]:
    """Return the answer of an invocation that ``error`` ended after some reports; raise it as a Fault if it is one."""
    answer = {**to_wire(error), "reports": [*reports]}
    answer["message"] = without_secrets(answer["message"])  # Lambda's runtime logs what is raised
    if is_fault(error):
        raise Fault(json.dumps(answer)) from None
    return answer


def answered(payload: bytes, *, error: bool) -> dict[str, Any] | None:
    """Parse the handler's answer or, if Lambda reports an ``error``, the exception; None for a payload that is not our handler's."""
    try:
        found = json.loads(payload)
        if error:
            found = json.loads(found["errorMessage"]) if found["errorType"] == Fault.__name__ else None
    except (ValueError, KeyError, TypeError):  # another program's, or truncated
        return None
    return found if isinstance(found, dict) and "reports" in found else None


def deploying(function: str) -> str:
    """Return the command that deploys or updates a function."""
    return "gradsharding deploy" + (f" --name {function}" if function != STACK else "")
