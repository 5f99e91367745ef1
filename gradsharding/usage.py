"""What is asked of a store is counted where it is asked, by the store or its client, for the piece of work that asks.

A piece of work opens a ledger (``counting``); stores write into the ledger that is open (``count``). Ledgers do not add up by
themselves: what a task asks inside its own ledger is in its report, and not in its caller's.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

from gradsharding.value import Value

P = ParamSpec("P")
T = TypeVar("T")

SHARED = "shm"
"""The kind of store that is the memory of this machine: its bytes count, but nothing asked of it is a request."""


class Usage(Value):
    """Requests by the class that S3 bills them in (https://aws.amazon.com/s3/pricing/), and bytes of objects."""

    gets: int = 0
    """GET and HEAD."""
    puts: int = 0
    """PUT, COPY, POST and LIST."""
    deletes: int = 0
    """DELETE and the end of an upload without a result: free of charge."""
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Put two together."""
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in FIGURES})

    def __sub__(self, other: "Usage") -> "Usage":
        """What came since ``other``."""
        return Usage(**{name: getattr(self, name) - getattr(other, name) for name in FIGURES})

    def __mul__(self, times: int) -> "Usage":
        """Take the same several times."""
        return Usage(**{name: getattr(self, name) * times for name in FIGURES})


FIGURES = tuple(Usage.model_fields)

Spent = Mapping[str, Usage]
"""Usage by the kind of store: the scheme of its URL."""


def together(*spent: Spent) -> dict[str, Usage]:
    """Add up, kind by kind."""
    found: dict[str, Usage] = {}
    for one in spent:
        for kind, usage in one.items():
            found[kind] = found.get(kind, Usage()) + usage
    return found


def since(before: Spent, now: Spent) -> dict[str, Usage]:
    """What has been added to ``before``."""
    return {kind: usage - before.get(kind, Usage()) for kind, usage in now.items()}


def total(spent: Spent) -> Usage:
    """Add up all kinds of stores; what passes through shared memory counts in bytes only."""
    found = Usage()
    for kind, usage in spent.items():
        found += Usage(bytes_read=usage.bytes_read, bytes_written=usage.bytes_written) if kind == SHARED else usage
    return found


class Ledger:
    """Counts for one piece of work; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}

    def add(self, kind: str, figures: tuple[int, ...]) -> None:
        """Count, in the order of ``FIGURES``."""
        with self._lock:
            counts = self._counts.setdefault(kind, [0] * len(FIGURES))
            for i, figure in enumerate(figures):
                counts[i] += figure

    @property
    def spent(self) -> dict[str, Usage]:
        """What has been counted so far."""
        with self._lock:
            return {kind: Usage(**dict(zip(FIGURES, counts, strict=True))) for kind, counts in self._counts.items()}


_open = ContextVar[Ledger | None]("ledger", default=None)


@contextmanager
def counting() -> Iterator[Ledger]:
    """Open a ledger for what is asked within, in this thread and in those that ``carried`` functions run in."""
    ledger = Ledger()
    token = _open.set(ledger)
    try:
        yield ledger
    finally:
        _open.reset(token)


def count(kind: str, *, gets: int = 0, puts: int = 0, deletes: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
    """Count in the ledger that is open; nowhere, if none is."""
    if ledger := _open.get():
        ledger.add(kind, (gets, puts, deletes, bytes_read, bytes_written))


def carried(function: Callable[P, T]) -> Callable[P, T]:
    """Give ``function``, to be run in other threads, with all that is open here, such as the ledger."""
    context = copy_context()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(function, *args, **kwargs)  # of one context, one thread at a time can run in it

    return run
