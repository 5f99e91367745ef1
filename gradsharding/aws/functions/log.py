"""What a function logs: one JSON object a line, with the keys of Powertools for AWS Lambda, and nothing that is secret.

The keys are those of https://docs.aws.amazon.com/powertools/python/latest/core/logger; the lines are the same whether the function is
set to log text or JSON.
"""

import datetime as dt
import json
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from gradsharding.aws.secrets import without_secrets

SERVICE = "gradsharding"


class Invoked(Protocol):
    """What the runtime tells of an invocation."""

    function_name: str
    memory_limit_in_mb: Any
    """A number, as text."""
    invoked_function_arn: str
    aws_request_id: str

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the function is stopped."""
        ...


class _Lines(logging.Handler):
    """Writes records to standard output, which Lambda takes for the log."""

    def emit(self, record: logging.LogRecord) -> None:
        print(_line(record), flush=True)  # noqa: T201 - Lambda's way to log


log = logging.getLogger(f"{SERVICE}.function")
log.setLevel(logging.INFO)  # Lambda itself leaves out what its setting of a level does not want
log.propagate = False  # the runtime's own handler would write it again
log.addHandler(_Lines())

_about: dict[str, Any] = {}
_seen: list[str] = []


@contextmanager
def about(context: Invoked) -> Iterator[None]:
    """Have all lines within say which invocation of which function wrote them, and whether it was the first in its environment."""
    _about.update(
        cold_start=not _seen,
        function_name=context.function_name,
        function_memory_size=int(context.memory_limit_in_mb),
        function_arn=context.invoked_function_arn,
        function_request_id=context.aws_request_id,
    )
    _seen[:] = [context.aws_request_id]
    try:
        yield
    finally:
        _about.clear()


def _line(record: logging.LogRecord) -> str:
    time = dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line: dict[str, Any] = {
        "level": record.levelname,
        "location": f"{record.funcName}:{record.lineno}",
        "message": without_secrets(record.getMessage()),
        "timestamp": time,
        "service": os.environ.get("POWERTOOLS_SERVICE_NAME", SERVICE),
        **_about,
        **getattr(record, "facts", {}),
    }
    if record.exc_info and record.exc_info[0]:
        line["exception_name"] = record.exc_info[0].__name__
        line["exception"] = without_secrets("".join(traceback.format_exception(*record.exc_info)))
    if trace := os.environ.get("_X_AMZN_TRACE_ID"):
        line["xray_trace_id"] = trace.partition(";")[0].removeprefix("Root=")
    return json.dumps(line)
