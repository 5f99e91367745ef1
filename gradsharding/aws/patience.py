"""What a store refuses as too much at once is asked again for minutes; what breaks is asked again a few times: one law for all clients."""

import random
import time

from gradsharding.errors import StoreFailed
from gradsharding.running.pace import time_left

PATIENCE = 300.0
"""Seconds that one request waits, all in all, while the store says that it is too much."""

LONGEST = 20.0
"""Seconds of one wait, at most."""

ATTEMPTS = 6
"""How often a request that is broken or not answered is made, a read that breaks off goes on, and a write in conflict is tried."""

BUSY = {429, 503}
"""HTTP statuses that say so."""

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
"""Codes that say so, be it of one key in an answer of status 200."""

FAILURES = {500, 502, 504}
"""HTTP statuses of a server that has failed."""

FAILED = {"InternalError", "RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"}
"""Codes of a server that has failed."""


FEWER = "run fewer functions at once, use fewer shards, or keep the updates below another prefix"
"""What to do against too much at once, for whoever runs a round."""

LATER = "run it again later, and if it stays so, tell whoever gave the URL"
"""The same, for a node, which has nothing but a URL."""


class Patience:
    """What one request has waited; what is too much does not count as broken, nor the other way about."""

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds, all in all, because it was too much."""
        self.refused = 0
        """How often it was too much."""
        self.broken = 0
        """How often it broke, or was not answered."""

    def after(self, code: str) -> float | None:
        """Count what the store calls ``code``, as what it is."""
        return self.too_much() if code in THROTTLES else self.broke()

    def too_much(self) -> float | None:
        """Count a refusal; give the seconds to wait, at random so that many do not come back together; None if it has been long enough."""
        self.refused += 1
        seconds = random.uniform(0.5, 1) * min(LONGEST, 0.1 * 2.0 ** min(self.refused, 30))
        if self.waited + seconds > PATIENCE or seconds > time_left():
            return None
        self.waited += seconds
        return seconds

    def broke(self) -> float | None:
        """Count a failure; give the seconds to wait before another attempt; None if there have been enough."""
        self.broken += 1
        seconds = random.uniform(0, 2.0 ** (self.broken - 1))
        return None if self.broken == ATTEMPTS or seconds > time_left() else seconds

    def error(self, doing: str, code: str, *, by_url: bool = False) -> StoreFailed:
        """Say that it was refused for too long; ``doing`` is what was asked for, ``code`` what the store calls it, or else the HTTP status.

        A 503 without a code of S3's may as well come from a gateway whose servers are gone. ``by_url`` says that a node reads this.
        """
        through = f"through {self.waited:.3g} s of waiting" if self.waited else "with no time left to wait"
        remedy = LATER if by_url else FEWER
        if code in THROTTLES or code == "429":
            said = f"the store was asked for too much at once, and has said so {times(self.refused)} ({code}), {through}; {remedy}"
        else:
            look = "" if by_url else "look at it, or "
            said = f"the server answered {code} {times(self.refused)}, {through}: it may be down or overloaded; {look}{remedy}"
        return StoreFailed(f"{doing}: {said}", code=code)


def times(count: int) -> str:
    """Say how often something went wrong.

    >>> times(1), times(6)
    ('once', '6 times in a row')
    """
    return "once" if count == 1 else f"{count} times in a row"


def pause(failures: int) -> None:
    """Wait before trying again: up to 0.1 s, doubled each time, at random so that many do not come back together, if there is time."""
    time.sleep(min(random.uniform(0, 0.1 * 2**failures), max(0.0, time_left())))
