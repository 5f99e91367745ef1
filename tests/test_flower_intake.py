"""What replies lead to: they belong to who was asked, go together or not, and cost the server no more calls than they need."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from flower_federation import NODES, averaged, client, grid_of, initial, record, reply, sharding, state_of
from gradsharding import MemoryStore
from gradsharding.arithmetic.weights import integral_weights
from gradsharding.errors import InvalidUpdate, StoreFailed
from gradsharding.format.layout import Layout
from gradsharding.stores.protocol import Stat
from gradsharding.stores.updates import Update
from gradsharding.testing import FlakyStore, assert_same
from gradsharding_flower import upload_mod
from gradsharding_flower.ballot import Ballot
from gradsharding_flower.grid import BATCH, FollowUp, WatchedGrid, Work
from gradsharding_flower.permits import find_offer
from gradsharding_flower.testing import LocalGrid
from gradsharding_flower.weighing import incompatible_weights


def asking(*nodes: int, arrays: bool = False) -> list[Message]:
    """Make messages, which carry arrays or none."""
    content = {"arrays": record(initial())} if arrays else {}
    return [Message(RecordDict(content), dst_node_id=node, message_type="train") for node in nodes]  # type: ignore[arg-type]


def keep(asked: Message, reply: Message) -> Message:  # noqa: ARG001
    """Keep a reply as it is."""
    return reply


class Echo(LocalGrid):
    """Answers each message with the node's id, changed by ``forge``; keeps how many replies each call was to give."""

    def __init__(self, nodes: Iterable[int], forge: Callable[[Message], None] = lambda _: None) -> None:
        super().__init__({node: client() for node in nodes})
        self.calls: list[int] = []
        self.forge = forge

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Count, and pass on."""
        self.calls.append(len(ids := list(message_ids)))
        return super().pull_messages(ids)

    def _answer(self, message: Message) -> Message:
        made = Message(RecordDict({"metrics": MetricRecord({"id": message.metadata.dst_node_id})}), reply_to=message)
        self.forge(made)
        return made


@pytest.mark.parametrize(("arrays", "calls"), [(False, [BATCH, BATCH, 50]), (True, [1] * 250)])
def test_replies_without_arrays_come_together(arrays: bool, calls: list[int]) -> None:
    """Who was sent arrays may send some back, and is asked alone; the others are asked by the hundred."""
    grid = Echo(range(1, 251))
    replies = list(WatchedGrid(grid, keep).send_and_receive(asking(*range(1, 251), arrays=arrays)))
    assert calls == grid.calls
    assert {*range(1, 251)} == {reply.content.metric_records["metrics"]["id"] for reply in replies}


def test_a_reply_belongs_to_who_was_asked() -> None:
    """A reply that says it is another node's is an error of its own node's; the other node's own reply stands."""

    def forge(made: Message) -> None:
        if made.metadata.src_node_id == 2:
            made.metadata.__dict__["_src_node_id"] = 1

    replies = {reply.metadata.src_node_id: reply for reply in WatchedGrid(Echo((1, 2), forge), keep).send_and_receive(asking(1, 2))}
    assert 1 == replies[1].content.metric_records["metrics"]["id"]
    assert "its reply says that it is from node 1" == replies[2].error.reason


def test_a_reply_to_nothing_is_dropped(flower_log: pytest.LogCaptureFixture) -> None:
    """A reply to a message that nobody sent, or that was answered before, changes nothing, and the log says so."""

    class Double(Echo):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [one for reply in super().pull_messages(message_ids) for one in (reply, reply)]

    replies = list(WatchedGrid(Double((1, 2)), keep).send_and_receive(asking(1, 2), timeout=5))
    assert [1, 2] == sorted(reply.metadata.src_node_id for reply in replies)
    assert 2 == flower_log.text.count("answers no message that is waiting for one; it is dropped")


def test_a_reply_that_cannot_be_pulled(flower_log: pytest.LogCaptureFixture) -> None:
    """A reply that the grid itself cannot read costs its own node the round; replies are pulled alone from then on."""

    class Broken(Echo):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            ids = list(message_ids)
            if any(self._messages[one].metadata.dst_node_id == 2 for one in ids if one in self._messages):
                raise KeyError("no such class")
            return super().pull_messages(ids)

    watched = WatchedGrid(Broken((1, 2, 3)), keep)
    replies = {reply.metadata.src_node_id: reply for reply in watched.send_and_receive(asking(1, 2, 3), timeout=5)}
    assert {1: False, 2: True, 3: False} == {node: reply.has_error() for node, reply in replies.items()}
    assert "its reply cannot be read (KeyError)" == replies[2].error.reason
    assert watched.alone
    assert "replies are pulled one at a time from now on" in flower_log.text


def test_work_runs_side_by_side() -> None:
    """What replies ask of a store is done at the same time, each node's next message goes out, and all answers come."""
    under_way, most = [0], [0]

    def work() -> str:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        under_way[0] -= 1
        return "done"

    def on_reply(asked: Message, reply: Message) -> Any:
        node = asked.metadata.dst_node_id
        follow_up = asking(node)[0]
        return Work(
            work, lambda result: FollowUp(follow_up, lambda again: Message(again.content, reply_to=asked)) if result() == "done" else reply
        )

    replies = list(WatchedGrid(Echo(range(1, 33)), on_reply).send_and_receive(asking(*range(1, 33)), timeout=60))
    assert list(range(1, 33)) == sorted(reply.metadata.src_node_id for reply in replies)
    assert most[0] > 1


amounts = st.one_of(st.integers(1, 2**53), st.floats(min_value=5e-324, max_value=2.0**53), st.sampled_from([1, 100, 2**53, 0.5, 1e-12]))


@given(st.dictionaries(st.integers(1, 40), amounts, min_size=1, max_size=12))
def test_weights_that_stay_go_together(weights: dict[int, float]) -> None:
    """Those who stay have integers that sum to 2**53 at most; somebody stays, unless equal weights alone are too many."""
    gone = incompatible_weights(weights)
    stay = {str(node): weight for node, weight in weights.items() if node not in gone}
    if stay and (len({*stay.values()}) > 1 or sum(stay.values()) <= 2**53):
        assert sum(integral_weights(stay).values()) <= 2**53
    assert not {weights[node] for node in gone} & {*stay.values()}


@pytest.mark.parametrize(
    ("weights", "gone"),
    [
        ([100, 2**53], [2**53]),
        ([2**53, 100, 120], [2**53]),
        ([1.5, 1e-12, 1.5], [1e-12]),
        ([100, 2**53, 2**53], [2**53]),
        ([5e-324, 1e-300, 100, 100, 100], [5e-324, 1e-300]),
        ([2**52, 2**52], []),
        ([0.25, 1000], []),
    ],
)
def test_the_outlier_is_left_out(weights: list[float], gone: list[float]) -> None:
    """Whose weight is too far from those of most is left out, in whatever order and under whatever ids they come."""
    for order in itertools.permutations(weights):
        left_out = incompatible_weights(dict(enumerate(order)))
        assert {*gone} == {order[node] for node in left_out}


@pytest.mark.parametrize("heavy", [1, 2])
def test_a_node_that_claims_all(heavy: int, flower_log: pytest.LogCaptureFixture) -> None:
    """Of two nodes the one that claims 2**53 is left out, with the numbers, and the honest one makes the model."""

    def answer(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        return reply({"w": np.full(2, node, np.float32)}, 2**53 if node == heavy else 100)

    grid = grid_of({node: client(answer) for node in (1, 2)}, nodes=())
    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0), shards=1)
    result = strategy.start(grid, record({"w": np.zeros(2, np.float32)}), num_rounds=1)
    assert_same({"w": np.full(2, 3 - heavy, np.float32)}, state_of(result.arrays))
    assert "its weight 9007199254740992 does not fit the weights of 1 other nodes, 100 to 100" in flower_log.text


layouts = [Layout.of({"w": (dtype, (size,))}) for dtype, size in (("F32", 2), ("F64", 2), ("F16", 2), ("F32", 3), ("F32", 4))]


@given(st.lists(st.integers(0, 4), max_size=12), st.randoms())
def test_the_vote_does_not_depend_on_the_order(votes: list[int], order: Any) -> None:
    """The layout that is elected is that of most updates that fit the model, in any order of arrival; of equals, the model's own."""
    ballots = []
    for _ in range(2):
        ballot = Ballot(layouts[0])
        seen = [ballot.enter(Update(layouts[vote], 8, Stat(8, "v"))) for vote in votes]
        ballots.append(ballot.elected.digest)
        assert [layouts[vote].digest == ballots[0] for vote in votes] == [not ballot.problem(one) for one in seen]
        order.shuffle(votes)
    assert ballots[0] == ballots[1]
    fitting = [vote for vote in votes if vote < 3] or votes or [0]
    counts = [fitting.count(vote) for vote in range(5)]
    assert max(counts) == counts[[layout.digest for layout in layouts].index(ballots[0])]


EVALUATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no weight": ({"total": 1.0}, "'num-examples' is None"),
    "weight zero": ({"num-examples": 0, "total": 1.0}, "it has weight 0"),
    "negative weight": ({"num-examples": -8, "total": 1.0}, "it has weight -8"),
    "list for a number": (
        {"num-examples": 1, "total": [1.0]},
        "its metrics are total[1], num-examples, while most replies have total, num-examples",
    ),
    "another name": ({"num-examples": 1, "x" * 5000: 1.0}, "its metrics are xxxxx"),
    "thousands of bits": ({"num-examples": 1, "total": 10**4400}, "its metric 'total' is a number of"),
}


@pytest.mark.parametrize("fault", EVALUATIONS)
def test_bad_evaluations_are_left_out(fault: str, flower_log: pytest.LogCaptureFixture) -> None:
    """A reply to evaluation that could not be averaged with the others is left out of that, and the run goes on."""
    metrics, words = EVALUATIONS[fault]

    class Lying(LocalGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.dst_node_id == 3 and message.metadata.message_type == "evaluate":
                return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
            return super()._answer(message)

    result = sharding(MemoryStore()).start(Lying({node: client() for node in NODES}), record(initial()), num_rounds=2)
    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))
    assert [1, 2] == sorted(result.evaluate_metrics_clientapp)
    lines = [line.getMessage() for line in flower_log.records if "is left out of the evaluation of round" in line.getMessage()]
    assert 2 == sum(words in line for line in lines) == len(lines)
    assert max(map(len, lines)) < 700


@pytest.mark.parametrize("error", [StoreFailed("no answer"), FileNotFoundError("pruned"), PermissionError("read-only")])
@pytest.mark.parametrize("verb", ["list", "delete"])
def test_tidying_that_fails_ends_nothing(verb: str, error: Exception, flower_log: pytest.LogCaptureFixture) -> None:
    """A store that fails to list or delete what is past leaves it there, and a line in the log; the run goes on."""
    store = FlakyStore(MemoryStore(), {("before", verb, 1): error})
    result = sharding(store).start(grid_of(), record(initial()), num_rounds=2)
    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))
    assert f"updates and models of past rounds could not be deleted: {error}" in flower_log.text


def test_only_this_runs_rounds_are_looked_at() -> None:
    """What is deleted after a round is asked for by this run's prefix alone."""
    asked: list[str] = []

    class Listing(MemoryStore):
        def list(self, prefix: str) -> Any:
            asked.append(prefix)
            return super().list(prefix)

    strategy = sharding(Listing())
    strategy.start(grid_of(), record(initial()), num_rounds=1)
    assert [] == [prefix for prefix in asked if not prefix.startswith((f"rounds/{strategy._run}-", f"results/{strategy._run}-"))]
    assert [] != asked


def test_a_header_beyond_the_models_is_refused(flower_log: pytest.LogCaptureFixture) -> None:
    """An update whose header is many times the model's is left out before it is read, relayed or not."""
    for mods in (list[Any](), [upload_mod]):

        def wide(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
            sent = ArrayRecord({f"{i:06d}": Array("F32", (0,), "gradsharding.raw.v1", b"") for i in range(2_000)})
            return RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": 1, "loss": 1.0})})

        app = client(wide, mods)
        strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0))
        result = strategy.start(grid_of({3: app}), record(initial()), num_rounds=1)
        assert [3] == [*strategy.history[0].left_out]
        assert_same(averaged((1, 2, 14), 1, initial()), state_of(result.arrays))
    assert "its arrays" not in flower_log.text
    assert 1 == flower_log.text.count("its 2000 tensors need a header of ")
    assert 1 == flower_log.text.count("are read")


def test_offers_are_bounded() -> None:
    """An offer of more bytes than any could have is refused before it is parsed."""
    long = ArrayRecord({"gradsharding.offer": Array("offer", (), "gradsharding.offer.v1", b" " * 2_000_000)})
    with pytest.raises(InvalidUpdate, match="its offer takes 2000000 bytes"):
        find_offer(long, 100_000)


def test_errors_are_one_short_line(flower_log: pytest.LogCaptureFixture) -> None:
    """What a node sends as its error is one line in the log, cut, and no terminal obeys it."""

    class Shouting(LocalGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.dst_node_id == 3:
                return Message(Error(0, "\x1b[2Jgone\nERROR : node 1 is bad\n" + "x" * 10**6), reply_to=message)
            return super()._answer(message)

    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0))
    strategy.start(Shouting({node: client() for node in NODES}), record(initial()), num_rounds=1)
    reason = strategy.history[0].left_out[3]
    assert r"\x1b[2Jgone\nERROR" in reason
    assert reason.isprintable()
    assert len(reason) < 700
    assert "x" * 1000 not in flower_log.text


def test_settings_that_flower_cannot_count() -> None:
    """A reply with an empty text, which Flower's own count of bytes does not know, ends no run."""

    def odd(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        content = reply({name: array + np.float32(node) for name, array in state_of(arrays).items() if name != "n"}, server_round)
        content["empty"] = ConfigRecord({"text": "", "list": []})
        return content

    start = {name: array for name, array in initial().items() if name != "n"}
    strategy = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0))
    strategy.start(grid_of({node: client(odd) for node in (1, 2)}, nodes=()), record(start), num_rounds=1)
    assert (1, 2) == strategy.history[0].clients
