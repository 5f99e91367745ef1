"""Functions that run at once share what one prefix of S3 bears: each asks no faster than its share, and waits no longer than its time.

The requests of a function are taken to go to one prefix, and be it one object: float64 sums demand that all functions read the
clients in one order, so that they read much the same object at the same time.
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
"""Share of the limit that a round takes: the rest is for whoever else uses the prefix, and for requests that come unevenly."""

GETS = MARGIN * FIGURES["get rate"].value
"""GET and HEAD requests a second that a round makes of one prefix, at most."""

PUTS = MARGIN * FIGURES["put rate"].value
"""Other requests a second that a round makes of one prefix, at most."""


class Share(Value):
    """Requests a second that one function may make."""

    gets: float
    """GET and HEAD, by HTTP's own name: a LIST is a GET here."""
    puts: float
    """All others."""


def share(at_once: int) -> Share:
    """Give what each of so many functions may ask of one prefix.

    >>> share(1000)
    Share(gets=4.4, puts=2.8)
    """
    return Share(gets=GETS / at_once, puts=PUTS / at_once)


class _Turns:
    """Gives turns, so many a second, evenly; threads may share it."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0
        self._lock = threading.Lock()

    def take(self, until: float) -> None:
        """Wait until it is one's turn; raise StoreFailed, and leave the turn to others, if it lies beyond ``until``."""
        with self._lock:
            mine = max(self._next, now := time.monotonic())
            if mine > max(now, until):
                raise StoreFailed(
                    f"this function's turn to ask S3 again comes in {mine - now:.3g} s, at its share of {1 / self._interval:.3g} "
                    f"requests/s, and {max(0.0, until - now):.3g} s of its time are left; run fewer functions at once, or give "
                    f"them more time"
                )
            self._next = mine + self._interval
        if mine > now:
            time.sleep(mine - now)


class _Kept:
    """What a function keeps to."""

    def __init__(self, kept: Share | None, seconds: float) -> None:
        self.gets = _Turns(kept.gets) if kept else None
        self.puts = _Turns(kept.puts) if kept else None
        self.until = time.monotonic() + seconds


_kept = ContextVar[_Kept | None]("kept", default=None)


@contextmanager
def keeping(kept: Share | None, seconds: float) -> Iterator[None]:
    """Keep to a share, and wait no longer than ``seconds`` from now, here and in threads that ``usage.carried`` functions run in."""
    token = _kept.set(_Kept(kept, seconds))
    try:
        yield
    finally:
        _kept.reset(token)


def take_turn(*, reads: bool) -> None:
    """Wait until the share allows one more request, which is a GET or HEAD if it ``reads``; where there is no share, do not wait.

    Raise StoreFailed at once if that is later than may be waited.
    """
    if (kept := _kept.get()) and (turns := kept.gets if reads else kept.puts):
        turns.take(kept.until)


def time_left() -> float:
    """Give the seconds that may still be waited; infinity outside of ``keeping``."""
    kept = _kept.get()
    return kept.until - time.monotonic() if kept else float("inf")
