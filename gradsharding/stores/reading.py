"""Requests run ahead of the arithmetic: a few at once, into a few buffers, whose bytes come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import Buffer
from gradsharding.usage import carried
from gradsharding.value import Value

STAGING = 4 << 20
"""Bytes that a store holds, at most, of all requests of one task while it passes them on."""

_ALIGNED = 64
"""Requests begin at multiples of this number of bytes within the slice, so that no element is split between two of them."""


class Reading(Value):
    """How a function reads its slice of an update.

    Without a ``chunk`` it makes one request and adds the bytes as they arrive. With one, it makes a request for each chunk, into
    ``parallel + 2`` buffers: ``parallel`` requests are in progress while one buffer is being added and one is ready.

    >>> Reading(chunk=8 << 20, parallel=4).requests(20 << 20), STREAM.requests(20 << 20)
    (3, 1)
    """

    chunk: int = 0
    """Bytes of one request, at most; 0 means one request for the whole slice."""
    parallel: int = 1
    """Requests in progress at once."""
    resident: int = 0
    """Bytes of memory that the store's client library takes in a function."""

    def requests(self, nbytes: int, most: int | None = None) -> int:
        """Requests needed for ``nbytes``, if pieces are sized for a slice of ``most`` bytes; by default, of ``nbytes``."""
        return -(-nbytes // self.piece(most or nbytes)) if nbytes else 1

    def piece(self, nbytes: int) -> int:
        """Bytes of each request for a slice of ``nbytes``; the last request may be smaller."""
        count = -(-nbytes // self.chunk) if self.chunk else 1
        even = -(-nbytes // max(count, 1))
        return min(nbytes, -(-even // _ALIGNED) * _ALIGNED)

    def rarer(self) -> "Iterator[Reading]":
        """Iterate over readings with fewer requests: chunks of two or four times the size, and at most as many requests at once.

        >>> [(one.chunk >> 20, one.parallel) for one in Reading(chunk=8 << 20, parallel=2).rarer()]
        [(16, 1), (16, 2), (32, 1), (32, 2)]
        """
        for times in (2, 4):
            for parallel in range(1, self.parallel + 1):
                yield self.model_copy(update={"parallel": parallel, "chunk": times * self.chunk})

    def memory(self, nbytes: int) -> int:
        """Bytes of memory that reading slices of ``nbytes`` takes, at most."""
        buffers = self.parallel + 2 if self.chunk else 0
        return self.resident + STAGING + buffers * self.piece(nbytes)


STREAM = Reading()
"""One request for the whole slice, added as it arrives: suits a local store."""


def combined(readings: Iterable[Reading]) -> Reading:
    """Combine the readings of several stores in one task: the most requests at once, and memory for the largest client library."""
    found = {*readings}
    widest = max(found, key=lambda reading: reading.parallel)
    return widest.model_copy(update={"resident": max(reading.resident for reading in found)})


def connections(bandwidth: float, latency: float, rate: float, chunk: int) -> int:
    """Return how many requests of ``chunk`` bytes must run at once to fill ``bandwidth``; rates in bytes/s, ``latency`` in seconds.

    One connection carries ``chunk / (latency + chunk / rate)``; half as many connections again make up for varying latencies.

    >>> connections(bandwidth=75e6, latency=0.03, rate=90e6, chunk=4 << 20)
    3
    """
    return max(1, -int(-1.5 * bandwidth * (latency / chunk + 1 / rate) // 1))


class Request(NamedTuple):
    """The number of bytes of a request, and how to make it."""

    size: int
    open: Callable[[], Iterator[Buffer]]


def divided(nbytes: int, size: int, read: Callable[[int, int], Iterator[Buffer]]) -> Iterator[Request]:
    """Iterate over requests of ``size`` bytes that cover bytes 0 to ``nbytes``; even zero bytes take one request."""
    for start in range(0, max(1, nbytes), size):
        stop = min(start + size, nbytes)
        yield Request(stop - start, partial(read, start, stop))


def read_ahead(requests: Iterable[Request], reading: Reading, size: int) -> Generator[memoryview, None, None]:
    """Make requests of at most ``size`` bytes each; yield the bytes of each, in order, valid until the next are requested.

    A request's error is raised in its turn. An answer may be short; one that is longer than its request raises InvalidUpdate.
    """
    free = deque(memoryview(bytearray(size)) for _ in range(reading.parallel + 2))
    under_way = deque[Future[memoryview]]()
    pool = ThreadPoolExecutor(reading.parallel, thread_name_prefix="gradsharding-read")
    fill = carried(_fill)
    try:
        for request in requests:
            under_way.append(pool.submit(fill, request, free.popleft()))
            if not free:
                filled = under_way.popleft().result()
                yield filled
                free.append(memoryview(filled.obj))
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _fill(request: Request, buffer: memoryview) -> memoryview:
    end = 0
    for chunk in request.open():
        start, end = end, end + memoryview(chunk).nbytes
        if end > request.size:
            raise InvalidUpdate(f"a read gave at least {end} bytes where {request.size} were asked for; the server ignored the range")
        buffer[start:end] = memoryview(chunk).cast("B")
    return buffer[:end]
