"""Reads that run ahead come in order, in bounded memory, and fail in their turn."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.errors import InvalidUpdate, MissingObject
from gradsharding.format.dtypes import Buffer
from gradsharding.planning.topologies import Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.reading import STAGING, STREAM, Reading, Request, combined, connections, read_ahead
from gradsharding.testing import CountingStore, assert_same, reference_mean, sample_updates
from gradsharding.usage import total


@given(nbytes=st.integers(0, 10_000), chunk=st.integers(0, 50).map(lambda n: 64 * n))
def test_pieces_tile_the_slice(nbytes: int, chunk: int) -> None:
    """Requests of one size, no larger than the chunk, tile the slice; only the last may be smaller."""
    reading = Reading(chunk=chunk, parallel=2)
    count, size = reading.requests(nbytes), reading.piece(nbytes)

    assert count - 1 == max(0, nbytes - 1) // max(size, 1)
    assert size <= (chunk or nbytes)


def test_memory() -> None:
    """One request at a time takes a store's own buffer; several take two buffers more than there are requests."""
    assert STAGING == STREAM.memory(1 << 40)
    assert 7 + STAGING + 6 * (8 << 20) == Reading(chunk=8 << 20, parallel=4, resident=7).memory(1 << 30)
    assert 7 + STAGING + 6 * 1024 == Reading(chunk=8 << 20, parallel=4, resident=7).memory(1024)


def test_combined() -> None:
    """Of several stores' wishes the widest holds, with room for all of their libraries."""
    narrow, wide = Reading(chunk=8, parallel=2, resident=30), Reading(chunk=64, parallel=4, resident=20)

    assert Reading(chunk=64, parallel=4, resident=30) == combined([narrow, wide, STREAM])


@pytest.mark.parametrize(
    ("bandwidth", "latency", "chunk", "expected"),
    [(75e6, 0.03, 4 << 20, 3), (75e6, 0.1, 4 << 20, 4), (600e6, 0.03, 4 << 20, 17), (1, 0, 1, 1)],
)
def test_connections(bandwidth: float, latency: float, chunk: int, expected: int) -> None:
    """The faster the network and the slower the answers, the more requests run at once; never none."""
    assert expected == connections(bandwidth, latency, 90e6, chunk)


def _answer(data: bytes, gate: threading.Semaphore | None = None) -> Iterator[Buffer]:
    if gate:
        gate.acquire()
    yield from (data[i : i + 3] for i in range(0, len(data), 3))


def test_order() -> None:
    """Bytes come in the order of the requests, though later ones are answered first."""
    gates = [threading.Semaphore(0) for _ in range(20)]
    data = [b"%02d" % i * (i % 5) for i in range(20)]
    requests = [Request(len(d), partial(_answer, d, gate)) for d, gate in zip(data, gates, strict=True)]

    def open_gates() -> None:
        for i in range(0, 20, 4):
            for gate in reversed(gates[i : i + 4]):
                gate.release()

    opener = threading.Thread(target=open_gates)
    opener.start()
    assert data == [bytes(view) for view in read_ahead(requests, Reading(parallel=4), 8)]
    opener.join()


def test_bounded() -> None:
    """No more requests are made than there are buffers, until the reader asks for more."""
    made: list[int] = []

    def make(i: int) -> Iterator[Buffer]:
        made.append(i)
        yield b"x"

    views = read_ahead((Request(1, partial(make, i)) for i in range(100)), Reading(parallel=3), 1)
    for _ in range(10):
        next(views)
    time.sleep(0.05)  # let whoever would run further ahead do so
    assert {*range(14)} >= {*made} >= {*range(10)}
    views.close()
    assert len(made) <= 15


def test_errors_in_turn() -> None:
    """What fails is raised when its turn comes; what came before it is given, and nothing after it is asked for."""

    def fail() -> Iterator[Buffer]:
        raise MissingObject("gone")
        yield b""

    requests = [Request(2, partial(_answer, b"ab")), Request(2, fail), Request(2, partial(_answer, b"cd"))]
    views = read_ahead(requests, Reading(parallel=2), 2)

    assert b"ab" == bytes(next(views))
    with pytest.raises(MissingObject, match="gone"):
        next(views)


def test_too_long() -> None:
    """An answer longer than was asked for is refused, not folded."""
    with pytest.raises(InvalidUpdate, match="at least 3 bytes where 2 were asked for"):
        list(read_ahead([Request(2, partial(_answer, b"abc"))], Reading(parallel=2), 8))


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize(("chunk", "parallel"), [(64, 1), (64, 2), (128, 5), (1 << 20, 3), (0, 1)])
def test_worker_reads_ahead(chunk: int, parallel: int, shards: int) -> None:
    """A round gives the same bytes however its tasks read, and they make as many requests as the plan says."""
    store, updates = CountingStore(MemoryStore(), only=lambda key: "/updates/" in key), sample_updates()
    round_ = Round.create(store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    round_.seal()
    before, store.reading = store.gets, Reading(chunk=chunk, parallel=parallel)
    result = aggregate(round_, topology=Sharded(shards=shards))

    assert_same(reference_mean(updates), result.arrays())
    asked = total(result.plan.tasks_usage)
    assert (asked.gets, asked.gets) == (store.gets - before, sum(report.gets for report in result.reports))
    assert asked.bytes_read == sum(report.bytes_read for report in result.reports)
