"""Functions that run at once share the request rate of one S3 prefix: each keeps to its share, and never waits beyond its own time limit.

All requests of a round are assumed to go to one prefix, even to one object: float64 sums require that all functions read the clients in
the same order, so that they read nearly the same object at the same time.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gradsharding.errors import StoreFailed
from gradsharding.planning.platform import FIGURES
from gradsharding.value import Value

MARGIN = 0.8
"""Fraction of the limit that a round uses: the rest is for other users of the prefix, and for uneven arrival of requests."""

GETS = MARGIN * FIGURES["get rate"].value
"""GET and HEAD requests per second that a round makes to one prefix, at most."""

PUTS = MARGIN * FIGURES["put rate"].value
"""Other requests per second that a round makes to one prefix, at most."""


class Share(Value):
    """Requests per second that one function may make."""

    gets: float
    """GET and HEAD by HTTP's own method: a LIST counts as GET here."""
    puts: float
    """All others."""


def share(at_once: int) -> Share:
    """Return the share of each of ``at_once`` functions.

    >>> share(1000)
    Share(gets=4.4, puts=2.8)
    """
    return Share(gets=GETS / at_once, puts=PUTS / at_once)


class _Turns:
    """Hands out turns at an even rate per second; threads may share it."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0
        self._lock = threading.Lock()

    def take(self, until: float) -> None:
        """Wait for the next turn; if it comes after ``until``, raise StoreFailed and leave the turn to others."""
        with self._lock:
            mine = max(self._next, now := time.monotonic())
            if mine > max(now, until):
                raise StoreFailed(
                    f"this function's turn for its next request to S3 comes in {mine - now:.3g} s, at its share of "
                    f"{1 / self._interval:.3g} requests/s, and {max(0.0, until - now):.3g} s of its time are left; "
                    "run fewer functions at once, or give them more time"
                )
            self._next = mine + self._interval
        if mine > now:
            time.sleep(mine - now)


class _Kept:
    """The turns of one function, and the end of its time."""

    def __init__(self, kept: Share | None, seconds: float) -> None:
        self.gets = _Turns(kept.gets) if kept else None
        self.puts = _Turns(kept.puts) if kept else None
        self.until = time.monotonic() + seconds


_kept = ContextVar[_Kept | None]("kept", default=None)


@contextmanager
def keeping(kept: Share | None, seconds: float) -> Iterator[None]:
    """Keep to a share, and wait no longer than ``seconds`` from now; this holds in threads that run ``usage.carried`` functions, too."""
    token = _kept.set(_Kept(kept, seconds))
    try:
        yield
    finally:
        _kept.reset(token)


def take_turn(*, reads: bool) -> None:
    """Wait until the share allows one more request, a GET or HEAD if it ``reads``; without a share, return at once.

    Raise StoreFailed at once if the turn comes too late.
    """
    if (kept := _kept.get()) and (turns := kept.gets if reads else kept.puts):
        turns.take(kept.until)


def time_left() -> float:
    """Return the seconds left for waiting; infinity outside of ``keeping``."""
    kept = _kept.get()
    return kept.until - time.monotonic() if kept else float("inf")
