"""The end of an invocation's log has its bill: a line that begins with REPORT or, if the function logs JSON, an object."""

import json
import re
from typing import NamedTuple

_REPORT = re.compile(
    r"REPORT RequestId: (?P<request>\S+)\s.*?Billed Duration: (?P<billed>[0-9.]+) ms\s+Memory Size: (?P<size>\d+) MB\s+"
    r"Max Memory Used: (?P<used>\d+) MB(?:\s+Init Duration: (?P<init>[0-9.]+) ms)?"
)


class Metered(NamedTuple):
    """Lambda's measurements of an invocation, in bytes and seconds."""

    request: str
    billed: float
    memory_size: int
    max_memory: int
    init: float | None
    """Duration of the cold start; None for a warm start."""


def metered(log: str) -> Metered | None:
    """Read the last report in a log, in either format; None if there is none.

    Both have the same content (https://docs.aws.amazon.com/lambda/latest/dg/monitoring-cloudwatchlogs-logformat.html,
    https://docs.aws.amazon.com/lambda/latest/dg/telemetry-schema-reference.html#platform-report).

    >>> metered('{"type":"platform.report","record":{"requestId":"r","metrics":'
    ...         '{"durationMs":9.1,"billedDurationMs":10,"memorySizeMB":512,"maxMemoryUsedMB":84}}}').billed
    0.01
    """
    for line in reversed(log.splitlines()):
        if found := _from_text(line) or _from_json(line):
            return found
    return None


def _from_text(line: str) -> Metered | None:
    found = _REPORT.match(line)
    return found and _metered(found["request"], found["billed"], found["size"], found["used"], found["init"])


def _from_json(line: str) -> Metered | None:
    """Read a line if it is the platform's report; not our own lines, nor the rest of one that was cut."""
    try:
        event = json.loads(line)
        if event["type"] != "platform.report":
            return None
        request, metrics = event["record"]["requestId"], event["record"]["metrics"]
        init = metrics.get("initDurationMs")
        return _metered(request, metrics["billedDurationMs"], metrics["memorySizeMB"], metrics["maxMemoryUsedMB"], init)
    except (ValueError, KeyError, TypeError):
        return None


def _metered(request: str, billed: float | str, size: int | str, used: int | str, init: float | str | None) -> Metered:
    """Convert Lambda's figures from milliseconds and MiB to seconds and bytes."""
    return Metered(request, float(billed) / 1000, int(size) << 20, int(used) << 20, None if init is None else float(init) / 1000)
