"""Requests to a store are counted by the store, or by its client, in the ledger of the piece of work that makes them.

A piece of work opens a ledger (``counting``), and stores count in the ledger that is open (``count``). Ledgers do not nest: a task's
requests are in its own ledger and report, and not in its caller's.
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
"""The kind of store that is this machine's shared memory: its bytes are counted, but access to it is not a request."""


class Usage(Value):
    """Requests by the class in which S3 bills them (https://aws.amazon.com/s3/pricing/), and bytes of objects."""

    gets: int = 0
    """GET and HEAD."""
    puts: int = 0
    """PUT, COPY, POST and LIST."""
    deletes: int = 0
    """DELETE, and AbortMultipartUpload: free of charge."""
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Add, figure by figure."""
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in FIGURES})

    def __sub__(self, other: "Usage") -> "Usage":
        """Subtract, figure by figure."""
        return Usage(**{name: getattr(self, name) - getattr(other, name) for name in FIGURES})

    def __mul__(self, times: int) -> "Usage":
        """Multiply each figure."""
        return Usage(**{name: getattr(self, name) * times for name in FIGURES})


FIGURES = tuple(Usage.model_fields)

Spent = Mapping[str, Usage]
"""Usage by kind of store: the scheme of its URL."""


def together(*spent: Spent) -> dict[str, Usage]:
    """Add up, kind by kind."""
    sums: dict[str, Usage] = {}
    for part in spent:
        for kind, usage in part.items():
            sums[kind] = sums.get(kind, Usage()) + usage
    return sums


def since(before: Spent, now: Spent) -> dict[str, Usage]:
    """Usage between ``before`` and ``now``."""
    return {kind: usage - before.get(kind, Usage()) for kind, usage in now.items()}


def total(spent: Spent) -> Usage:
    """Add up all kinds of stores; of shared memory, only the bytes count."""
    sums = Usage()
    for kind, usage in spent.items():
        sums += Usage(bytes_read=usage.bytes_read, bytes_written=usage.bytes_written) if kind == SHARED else usage
    return sums


class Ledger:
    """Usage of one piece of work; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}

    def add(self, kind: str, figures: tuple[int, ...]) -> None:
        """Add figures, in the order of ``FIGURES``."""
        with self._lock:
            counts = self._counts.setdefault(kind, [0] * len(FIGURES))
            for i, figure in enumerate(figures):
                counts[i] += figure

    @property
    def spent(self) -> dict[str, Usage]:
        """Usage so far."""
        with self._lock:
            return {kind: Usage(**dict(zip(FIGURES, counts, strict=True))) for kind, counts in self._counts.items()}


_open = ContextVar[Ledger | None]("ledger", default=None)


@contextmanager
def counting() -> Iterator[Ledger]:
    """Open a ledger for the requests made within, in this thread and in threads that run ``carried`` functions."""
    ledger = Ledger()
    token = _open.set(ledger)
    try:
        yield ledger
    finally:
        _open.reset(token)


def count(kind: str, *, gets: int = 0, puts: int = 0, deletes: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
    """Count in the open ledger, if there is one."""
    if ledger := _open.get():
        ledger.add(kind, (gets, puts, deletes, bytes_read, bytes_written))


def carried(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function`` bound to this thread's context, the open ledger above all, so that another thread can run it."""
    context = copy_context()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(function, *args, **kwargs)  # only one thread at a time can run in a context

    return run
