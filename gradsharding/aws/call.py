"""One invocation carries several tasks of one job; what they share is written once."""

import json
from collections.abc import Sequence
from typing import Any

from gradsharding import __version__
from gradsharding.errors import PlanTooLarge, UserError
from gradsharding.platform import PAYLOAD
from gradsharding.task import Job, Task
from gradsharding.value import Value


class Event(Value):
    """What an invocation is given."""

    release: str
    job: Job
    tasks: tuple[Task, ...]


def pack(job: Job, tasks: Sequence[Task]) -> bytes:
    """Write a job, with the terms that ``tasks`` read, and the tasks as the event of an invocation; raise PlanTooLarge beyond 6 MiB."""
    event = Event(release=__version__, job=job.narrowed(tasks), tasks=tuple(tasks))
    data = event.model_dump_json().encode()
    if len(data) > PAYLOAD:
        raise PlanTooLarge(
            f"an invocation with {len(tasks)} tasks of {max(task.inputs for task in tasks)} inputs takes {len(data)} bytes; "
            f"Lambda accepts {PAYLOAD}: aggregate fewer updates in one round, or use processes"
        )
    return data


def unpack(event: Any) -> tuple[Job, tuple[Task, ...]]:
    """Read the event of an invocation; raise UserError if another release wrote it."""
    if event["release"] != __version__:
        raise UserError(
            f"the function runs gradsharding {__version__}, and was called by {event['release']}; run `gradsharding deploy` to update it"
        )
    read = Event.model_validate_json(json.dumps(event))  # Lambda's runtime has parsed it, and strict values refuse lists from Python
    return read.job, read.tasks
