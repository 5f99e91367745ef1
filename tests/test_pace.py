"""Functions at once share what a prefix of S3 bears, and keep to it: by a clock that tests move, and on Lambda."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.aws.functions.executor import LambdaExecutor
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import StoreFailed
from gradsharding.planning.platform import FIGURES
from gradsharding.planning.topologies import Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.running.pace import GETS, PUTS, Share, keeping, share, take_turn, time_left
from gradsharding.testing import assert_same, reference_mean
from gradsharding.usage import carried
from rigs.lambdas import LocalFunction, LocalLambda


@given(st.integers(1, 10_000))
def test_shares(at_once: int) -> None:
    """All shares together are what a round takes of a prefix, which is less than the prefix bears."""
    kept = share(at_once)

    assert pytest.approx((GETS, PUTS)) == (at_once * kept.gets, at_once * kept.puts)
    assert (GETS, PUTS) < (FIGURES["get rate"].value, FIGURES["put rate"].value)


def test_turns(clock: list[float]) -> None:
    """The first request goes at once, each later one in its turn, reads and writes by rates of their own; idle time is not saved up."""
    with keeping(share(4_400), 60.0):
        went = []
        for reads in (True, True, True, False, False):
            take_turn(reads=reads)
            went.append(clock[0])
        clock[0] += 30
        take_turn(reads=True)
        take_turn(reads=True)

    assert pytest.approx([100, 101, 102, 102, 102 + 4_400 / PUTS]) == went
    assert pytest.approx(102 + 4_400 / PUTS + 30 + 1) == clock[0]


def test_no_turn_beyond_its_time(clock: list[float]) -> None:
    """A turn beyond the function's time is refused at once, with the numbers, and left to others; what need not wait is let through."""
    with keeping(share(44_000), 25.0):  # 0.1 GETs a second
        for _ in range(3):
            take_turn(reads=True)
        says = r"comes in 10 s, at its share of 0\.1 requests/s, and 5 s of its time are left; run fewer functions at once, or give"
        for _ in range(2):
            with pytest.raises(StoreFailed, match=says):
                take_turn(reads=True)
        assert 120.0 == clock[0]
        clock[0] += 60
        take_turn(reads=True)
        with pytest.raises(StoreFailed, match=r"comes in 10 s, .* and 0 s of its time are left"):
            take_turn(reads=True)
    assert 180.0 == clock[0]


def test_without_a_share(clock: list[float]) -> None:
    """Who has no share does not wait; who has nothing to keep to may wait for ever."""
    for _ in range(100):
        take_turn(reads=True)
    with keeping(None, 7.0):
        take_turn(reads=False)
        assert 7.0 == time_left()
    assert (100.0, float("inf")) == (clock[0], time_left())


def test_threads_keep_to_it(clock: list[float]) -> None:
    """Threads that carried functions run in keep to the share together; others know nothing of it."""
    with ThreadPoolExecutor(4) as pool, keeping(share(4_400), 60.0):
        [*pool.map(carried(partial(take_turn, reads=True)), ())]
        for _ in range(3):
            pool.submit(carried(partial(take_turn, reads=True))).result()
        for _ in range(9):
            pool.submit(partial(take_turn, reads=True)).result()

    assert pytest.approx(102) == clock[0]


@contextmanager
def _at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[LocalLambda]:
    """Run a function, so many at once, to which the environment leads."""
    with LocalLambda(LocalFunction(memory=512), concurrency=count) as front:
        for name, value in front.environment().items():
            monkeypatch.setenv(name, value)
        yield front


def _average(store: S3Store) -> None:
    """Have two functions average some updates, and see that they do it right."""
    draw = np.random.default_rng(0)
    updates = {f"c{i}": ({"w": draw.normal(size=60_000).astype("f4")}, i + 1) for i in range(3)}
    round_ = Round.create(store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    result = aggregate(round_, topology=Sharded(shards=2), executor=LambdaExecutor("gradsharding", attempts=1))

    assert_same(reference_mean(updates), result.arrays())


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("count", [1, 2])
def test_functions_are_told_their_share(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """On Lambda, each function is told its share among those that run at once."""
    with _at_once(monkeypatch, count) as front:
        _average(moto_store)

    assert {share(count)} == {Share.model_validate(json.loads(call.event)["share"]) for call in front.calls}


@pytest.mark.usefixtures("emulator")
def test_functions_keep_to_it(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Lambda, a function whose share lets it ask once in its time asks no second time, and says why."""
    monkeypatch.setattr("gradsharding.running.pace.GETS", 0.02)  # each of two has its second turn after 100 s, and a minute in all
    says = r"comes in [\d.]+ s, at its share of 0\.01 requests/s, and [\d.]+ s of its time are left; run fewer functions at once"
    with _at_once(monkeypatch, 2), pytest.raises(StoreFailed, match=says):
        _average(moto_store)
