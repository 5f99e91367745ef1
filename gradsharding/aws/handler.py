"""What AWS Lambda runs: the worker's tasks, one after another, as many as fit into the time that is left."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from gradsharding import worker
from gradsharding.aws.call import unpack
from gradsharding.errors import UserError, to_wire
from gradsharding.store import ObjectStore, open_store

MARGIN = 1.5
"""Another task is begun only if so many times the longest one so far is left."""

BUNDLE = Path(__file__).parents[2] / "bundle.json"
"""What the code is made of, where it was built for a function."""

if BUNDLE.exists():  # once for each cold start: the log says which code ran
    print(json.dumps({"level": "INFO", "message": "cold start", "bundle": json.loads(BUNDLE.read_text())["sha256"]}))  # noqa: T201 - Lambda's log


class Invoked(Protocol):
    """What the runtime tells of an invocation."""

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the function is stopped."""
        ...


def handler(event: Any, context: Invoked) -> dict[str, Any]:
    """Run an invocation's tasks; give the reports of those that were done, and the error that ended them, if one did."""
    try:
        job, tasks = unpack(event)
    except UserError as error:
        return {"reports": [], **to_wire(error)}
    store, reports, longest = _opened(job.store), list[Any](), 0.0
    for task in tasks:
        if reports and context.get_remaining_time_in_millis() < 1000 * MARGIN * longest:
            break
        answer = json.loads(worker.answer(task, job, store))
        if "error" in answer:
            return {"reports": reports, **answer}
        reports.append(answer)
        longest = max(longest, answer["seconds"])
    return {"reports": reports}


@lru_cache(maxsize=16)
def _opened(url: str) -> ObjectStore:
    return open_store(url)
