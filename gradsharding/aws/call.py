"""One invocation carries several tasks of one job; what they share is written once."""

import json
from collections.abc import Sequence
from typing import Any

from gradsharding import __version__
from gradsharding.errors import PlanTooLarge, UserError
from gradsharding.platform import PAYLOAD
from gradsharding.task import Job, Task


def pack(job: Job, tasks: Sequence[Task]) -> bytes:
    """Write a job and tasks as the event of an invocation; raise PlanTooLarge beyond 6 MiB."""
    shared = {id(task.terms): task.terms for task in tasks}
    places = {identity: place for place, identity in enumerate(shared)}
    event = {
        "release": __version__,
        "job": job.model_dump(mode="json"),
        "terms": [[term.model_dump(mode="json") for term in terms] for terms in shared.values()],
        "tasks": [task.model_dump(mode="json", exclude={"terms"}) | {"terms": places[id(task.terms)]} for task in tasks],
    }
    data = json.dumps(event, separators=(",", ":")).encode()
    if len(data) > PAYLOAD:
        raise PlanTooLarge(
            f"an invocation with {len(tasks)} tasks of {max(len(task.terms) for task in tasks)} updates takes {len(data)} bytes; "
            f"Lambda accepts {PAYLOAD}: aggregate fewer updates in one round, or use processes"
        )
    return data


def unpack(event: Any) -> tuple[Job, list[Task]]:
    """Read the event of an invocation; raise UserError if another release wrote it."""
    if event["release"] != __version__:
        raise UserError(
            f"the function runs gradsharding {__version__}, and was called by {event['release']}; run `gradsharding deploy` to update it"
        )
    tasks = [json.dumps(task | {"terms": event["terms"][task["terms"]]}) for task in event["tasks"]]
    return Job.model_validate_json(json.dumps(event["job"])), [Task.model_validate_json(task) for task in tasks]
