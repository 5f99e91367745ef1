"""What S3 refuses as too much is asked for again for minutes, whoever asks; what breaks, a few times; in the end, it says so."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.aws.client import s3_client
from gradsharding.aws.patience import ATTEMPTS, FEWER, LATER, PAUSE, TOTAL, Patience, pause
from gradsharding.aws.s3.direct import UrlSource, offer, write
from gradsharding.aws.s3.presign import grant, readable, settle
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import StoreFailed
from gradsharding.planning.topologies import Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.running.pace import keeping
from gradsharding.running.processes import ProcessExecutor
from gradsharding.testing import assert_same, read, reference_mean
from gradsharding.usage import counting, total
from rigs.proxy import Path, Proxy
from rigs.s3 import Ceph, S3Server

REFUSED = {i: "503" if i % 2 else "429" for i in range(1, 13)} | {4: "500", 7: "reset", 10: "500"}
"""What goes wrong, by the request's number: more refusals than failures are mended, and some of these between them."""


def waits(ask: Callable[[], float | None]) -> list[float]:
    """Ask until there is no more waiting."""
    return [*iter(ask, None)]


def test_minutes() -> None:
    """Waits grow to a bound, are at random, and add up to minutes, and no more."""
    one, other = (waits(Patience().too_much) for _ in range(2))

    assert one != other
    assert one[0] <= 0.2
    assert TOTAL - PAUSE < sum(one) <= TOTAL
    assert PAUSE / 2 < max(one) <= PAUSE


@given(st.lists(st.booleans(), max_size=20))
def test_apart(order: list[bool]) -> None:
    """What is too much takes none of the attempts of what breaks, nor the other way about."""
    patience, failures = Patience(), 0
    for refused in order:
        if refused:
            assert patience.too_much() is not None
        else:
            failures += 1
            assert (patience.broke() is None) == (failures == ATTEMPTS)
    assert order.count(True) == patience.refused


@pytest.mark.parametrize("count", [Patience.too_much, Patience.broke])
def test_no_longer_than_its_time(clock: list[float], count: Callable[[Patience], float | None]) -> None:
    """A function that is soon ended does not wait beyond that, whatever has gone wrong."""
    with keeping(None, 3.0):
        patience = Patience()
        while (seconds := count(patience)) is not None:
            time.sleep(seconds)
    assert 100.0 < clock[0] <= 103.0
    with keeping(None, 0.0):
        assert count(Patience()) is None


def test_pause(clock: list[float]) -> None:
    """A pause ends with the function's time, and is none after it."""
    with keeping(None, 3.0):
        for _ in range(2):
            pause(60)
            assert 103.0 == clock[0]
        clock[0] += 9
        pause(60)
    assert 112.0 == clock[0]


def _presigned_write(store: S3Store, spool: File) -> None:
    granted = grant(store, "offered", offer(spool, 1 << 20), 60)
    write(spool, granted.offer, granted.permit)
    settle(store, granted)


VERBS: dict[str, Callable[[S3Store, File], Any]] = {
    "head": lambda store, _: store.head("a"),
    "peek": lambda store, _: store.peek("a", 10),
    "get": lambda store, _: read(store, "a"),
    "put": lambda store, _: store.put("b", [b"x"]),
    "list": lambda store, _: [*store.list("")],
    "delete": lambda store, _: store.delete(["a"]),
    "fetch": lambda store, _: [*store.fetch(["a"])],
    "fetch of many": lambda store, _: [*store.fetch(["a"] * 9)],
    "begin": lambda store, _: store.begin("b"),
    "read by a URL": lambda store, _: [*UrlSource("a", readable(store, "a", 60)).get("a", 0, 10)],
    "write by a URL": _presigned_write,
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: File, verb: str) -> None:
    """Each verb goes on after many refusals and some failures between them, and each request counts."""
    spool = tmp_path / "spool"
    spool.write_bytes(b"y" * 100)
    moto_store.put("a", [b"x" * 100])
    monkeypatch.setattr("gradsharding.aws.patience.PAUSE", 0.0)
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)
    with Proxy(moto.endpoint, Path(faults=REFUSED)) as path:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", path.endpoint)
        with counting() as ledger:
            VERBS[verb](moto_store, spool)
    asked = total(ledger.spent)

    assert path.requests > len(REFUSED)
    assert 0 <= path.requests - (asked.gets + asked.puts + asked.deletes) <= 1  # aiohttp sends again over a connection that was reset


SAYS = {
    "503": r"the store is throttling requests: it answered SlowDown \d+ times in a row, through (2[89]\d|300) s of waiting; ",
    "down": r"the server answered 503 \d+ times in a row, through (2[89]\d|300) s of waiting: it may be down or overloaded; ",
}
"""What is said in the end, by the fault."""


@pytest.mark.parametrize("fault", SAYS)
@pytest.mark.parametrize("verb", ["get", "fetch of many", "read by a URL"])
def test_gives_up(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: File, verb: str, fault: str) -> None:
    """After minutes it says what was answered, how often, for how long it has waited, and what whoever asks can do about it."""

    async def at_once(*_: object) -> None:
        """Do not sleep."""

    moto_store.put("a", [b"x" * 100])
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("asyncio.sleep", at_once)
    with Proxy(moto.endpoint, Path(faults=dict.fromkeys(range(1, 1_000), fault))) as path:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", path.endpoint)
        remedy = LATER if verb == "read by a URL" else FEWER if fault == "503" else f"check it, or {FEWER}"
        with pytest.raises(StoreFailed, match=f"{SAYS[fault]}{remedy}$"):
            VERBS[verb](moto_store, tmp_path)


def test_gives_up_at_once() -> None:
    """A function without time to wait says that it was refused once."""
    with keeping(None, 0.0):
        patience = Patience()
        patience.too_much()
    assert f"it: the server answered 503 once, with no time left to wait: it may be down or overloaded; check it, or {FEWER}" == str(
        patience.error("it", "503")
    )


def test_botocores_own_law_is_off(moto_store: S3Store) -> None:
    """No other handler than ours says when S3 is asked again: botocore's would end it sooner."""
    client = s3_client(moto_store.bucket)

    class Answer:
        status_code = 503
        headers: dict[str, str] = {}  # noqa: RUF012 - nobody changes it

    request: Any = {"context": {"client_region": "us-east-1"}, "headers": {}}
    parsed: Any = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {}}
    operation = client.meta.service_model.operation_model("GetObject")
    told = client.meta.events.emit(
        "needs-retry.s3.GetObject",
        response=(Answer(), parsed),
        endpoint=None,
        operation=operation,
        attempts=1,
        caught_exception=None,
        request_dict=request,
    )
    assert 1 == len([one for _, one in told if one is not None])


def test_a_round_through_a_narrow_path(ceph: Ceph, ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: File) -> None:
    """An aggregation by processes, of whose requests every second one is refused, has the right bits; clocks run twenty times as fast."""
    draw = np.random.default_rng(0)
    updates = {f"c{i}": ({"w": draw.normal(size=40_000).astype("f4")}, i + 1) for i in range(4)}
    round_ = Round.create(ceph_store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    (tmp_path / "sitecustomize.py").write_text("import time; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 20)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with Proxy(ceph.server.endpoint, Path(faults=dict.fromkeys(range(2, 1_000, 2), "503"))) as path:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", path.endpoint)
        monkeypatch.setattr("gradsharding.aws.patience.PAUSE", 0.05)  # here
        result = aggregate(round_, topology=Sharded(shards=4), executor=ProcessExecutor(2))
        refused = path.requests // 2
    sent = total(result.usage)

    assert_same(reference_mean(updates), result.arrays())
    assert (result.plan.gets + result.plan.puts) == sent.gets + sent.puts + sent.deletes - refused - 1
    assert refused > len(updates) * len(result.plan.slices)
