"""All clients retry alike: a throttled request for minutes, and a failed one a few times."""

import random
import time

from gradsharding.errors import StoreFailed
from gradsharding.running.pace import time_left

TOTAL = 300.0
"""Seconds that one request waits in all, while the store throttles it."""

PAUSE = 20.0
"""Seconds of one wait, at most."""

ATTEMPTS = 6
"""Attempts at a request that fails or is not answered, at a read that breaks off, and at a write in conflict."""

BUSY = {429, 503}
"""HTTP statuses of throttling."""

THROTTLES = {
    "SlowDown",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "TooManyRequestsException",
}
"""Codes of throttling, also for one key in an answer of status 200."""

FAILURES = {500, 502, 504}
"""HTTP statuses of a server's failure."""

FAILED = {"InternalError", "RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"}
"""Codes of a server's failure."""

FEWER = "run fewer functions at once, use fewer shards, or keep the updates below another prefix"
"""Remedy against throttling, for whoever runs a round."""

LATER = "run it again later; if that does not help, tell whoever gave the URL"
"""Remedy against throttling, for a node, which has nothing but a URL."""


class Patience:
    """Counts how one request was throttled and how it failed, each by itself."""

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds, in all, because of throttling."""
        self.refused = 0
        """Times it was throttled."""
        self.broken = 0
        """Times it failed, or was not answered."""

    def after(self, code: str) -> float | None:
        """Count an error with the store's ``code``; return the seconds to wait, or None."""
        return self.too_much() if code in THROTTLES else self.broke()

    def too_much(self) -> float | None:
        """Count a throttling; return the seconds to wait, at random so that callers spread out; None if it has waited long enough."""
        self.refused += 1
        seconds = random.uniform(0.5, 1) * min(PAUSE, 0.1 * 2.0 ** min(self.refused, 30))
        if self.waited + seconds > TOTAL or seconds > time_left():
            return None
        self.waited += seconds
        return seconds

    def broke(self) -> float | None:
        """Count a failure; return the seconds to wait before another attempt; None if there were enough."""
        self.broken += 1
        seconds = random.uniform(0, 2.0 ** (self.broken - 1))
        return None if self.broken == ATTEMPTS or seconds > time_left() else seconds

    def error(self, doing: str, code: str, *, by_url: bool = False) -> StoreFailed:
        """Return the error for a request that was throttled for too long; ``doing`` names it, ``code`` is the store's, or the HTTP status.

        A 503 without a code of S3's may also come from a gateway whose servers are down. ``by_url`` says that a node will read it.
        """
        through = f"through {self.waited:.3g} s of waiting" if self.waited else "with no time left to wait"
        remedy = LATER if by_url else FEWER
        if code in THROTTLES or code == "429":
            problem = f"the store is throttling requests: it answered {code} {times(self.refused)}, {through}; {remedy}"
        else:
            check = "" if by_url else "check it, or "
            problem = f"the server answered {code} {times(self.refused)}, {through}: it may be down or overloaded; {check}{remedy}"
        return StoreFailed(f"{doing}: {problem}", code=code)


def times(count: int) -> str:
    """Write how often something failed.

    >>> times(1), times(6)
    ('once', '6 times in a row')
    """
    return "once" if count == 1 else f"{count} times in a row"


def pause(failures: int) -> None:
    """Wait before another attempt: up to 0.1 s, doubled each time, at random so that callers spread out, and no longer than is left."""
    time.sleep(min(random.uniform(0, 0.1 * 2**failures), max(0.0, time_left())))
