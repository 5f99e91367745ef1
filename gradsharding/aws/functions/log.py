"""A function's log has one JSON object per line, with the keys of Powertools for AWS Lambda, and no secrets.

For the keys, see https://docs.aws.amazon.com/powertools/python/latest/core/logger. The lines are the same whether the function's log
format is text or JSON.
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
    """The context that Lambda's runtime passes with an invocation."""

    function_name: str
    memory_limit_in_mb: Any
    """A number, as text."""
    invoked_function_arn: str
    aws_request_id: str

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the function is stopped."""
        ...


class _Lines(logging.Handler):
    """Writes records to standard output, which Lambda appends to the log."""

    def emit(self, record: logging.LogRecord) -> None:
        print(_line(record), flush=True)  # noqa: T201 - Lambda's way to log


log = logging.getLogger(f"{SERVICE}.function")
log.setLevel(logging.INFO)  # Lambda itself drops records below the level in its settings
log.propagate = False  # the runtime's own handler would write it a second time
log.addHandler(_Lines())

_about: dict[str, Any] = {}
_seen: list[str] = []


@contextmanager
def about(context: Invoked) -> Iterator[None]:
    """Within, every line names the invocation and the function, and says whether the invocation was a cold start."""
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
