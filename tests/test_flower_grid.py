"""LocalGrid behaves as a Flower grid does; the plug-in's grid counts bytes, and waits until the timeout."""

import time
import weakref
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flower_federation import client, grid_of, initial, raising, record
from gradsharding_flower.grid import WatchedGrid
from gradsharding_flower.testing import LocalGrid


def asking(*nodes: int, server_round: int = 1) -> list[Message]:
    """Make training messages, one RecordDict for all, as Flower does."""
    content = RecordDict({"arrays": record(initial()), "config": ConfigRecord({"server-round": server_round})})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def keep(asked: Message, reply: Message) -> Message:  # noqa: ARG001
    """Keep a reply as it is."""
    return reply


def size(message: Message) -> int:
    """Count a message's bytes as Flower does."""
    return sum(part.count_bytes() for part in message.content.values())


def test_plain_flower_runs_on_it() -> None:
    """Flower's own FedAvg trains and evaluates on a LocalGrid."""
    result = FedAvg().start(grid_of(mods=[]), record(initial()), num_rounds=2)
    assert {1, 2} == set(result.train_metrics_clientapp) == set(result.evaluate_metrics_clientapp)


def test_replies_name_their_node_and_come_once() -> None:
    """A reply comes from the node that was asked, in the order asked for, and only once."""
    grid = grid_of(nodes=(5, 7), mods=[])
    ids = list(grid.push_messages(asking(7, 5)))
    assert 2 == len(set(ids))
    assert [5, 7] == [reply.metadata.src_node_id for reply in grid.pull_messages(reversed(ids))]
    assert [] == list(grid.pull_messages(ids))
    assert [5, 7] == sorted(grid.get_node_ids())


def test_an_exception_is_an_error_reply() -> None:
    """What a client raises comes back as its reply, with the kind and the text of the error."""
    good, bad = grid_of({1: client(raising, [])}, nodes=(2,), mods=[]).send_and_receive(asking(2, 1))
    assert not good.has_error()
    assert (True, 1, "OSError: node 1: no space left") == (bad.has_error(), bad.metadata.src_node_id, bad.error.reason)


def test_nodes_share_nothing() -> None:
    """What a client does to its message, or keeps of its reply, changes neither the server's nor another client's."""
    app = ClientApp()
    kept: list[RecordDict] = []

    @app.train()
    def _train(message: Message, context: Context) -> Message:  # noqa: ARG001
        seen = len(message.content)
        message.content["more"] = MetricRecord({"x": 1})
        kept.append(RecordDict({"metrics": MetricRecord({"seen": seen})}))
        return Message(kept[-1], reply_to=message)

    messages = asking(1, 2)
    replies = list(LocalGrid({1: app, 2: app}).send_and_receive(messages))
    kept[0]["late"] = MetricRecord({"x": 1})
    assert [{"arrays", "config"}] * 2 == [set(message.content) for message in messages]
    assert [["metrics"]] * 2 == [list(reply.content) for reply in replies]
    assert [2, 2] == [reply.content.metric_records["metrics"]["seen"] for reply in replies]


def test_nodes_keep_their_state() -> None:
    """A node's context lasts from message to message, and is its own."""
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        count = context.state.metric_records.setdefault("count", MetricRecord({"n": 0}))
        count["n"] = int(str(count["n"])) + context.node_id
        return Message(RecordDict({"metrics": MetricRecord({"n": count["n"]})}), reply_to=message)

    grid = LocalGrid({1: app, 10: app})
    seen = [reply.content.metric_records["metrics"]["n"] for _ in range(3) for reply in grid.send_and_receive(asking(1, 10))]
    assert [1, 10, 2, 20, 3, 30] == seen


def test_a_silent_node_does_not_answer_until_it_does() -> None:
    """A silent node keeps its message, and answers it when it speaks again."""
    grid = grid_of(nodes=(1, 2), mods=[])
    grid.silent.add(1)
    ids = list(grid.push_messages(asking(1, 2)))
    assert [2] == [reply.metadata.src_node_id for reply in grid.pull_messages(ids)]
    grid.silent.clear()
    assert [1] == [reply.metadata.src_node_id for reply in grid.pull_messages(ids)]


def test_traffic_is_what_flower_counts() -> None:
    """Sent and received bytes are the sums over all messages and replies, each once; an error has none."""
    watched = WatchedGrid(grid_of({3: client(raising, [])}, nodes=(1, 2), mods=[]), keep)
    messages = asking(1, 2, 3)
    replies = list(watched.send_and_receive(messages))
    assert sum(map(size, messages)) == watched.traffic.sent
    assert sum(size(reply) for reply in replies if reply.has_content()) == watched.traffic.received
    assert 2 * sum(array.nbytes for array in initial().values()) < watched.traffic.received
    list(watched.send_and_receive(messages[:1]))
    assert sum(map(size, messages)) + size(messages[0]) == watched.traffic.sent


def test_replies_that_may_bring_arrays_come_one_at_a_time() -> None:
    """``on_reply`` sees each of them before the next one is pulled, and what it gives is what is kept; what it drops is let go of."""
    trace: list[str] = []
    seen: list[weakref.ref[Message]] = []

    class Tracing(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            assert [] == [one for one in seen if one() is not None]
            replies = list(super().pull_messages(message_ids))
            trace.extend(f"pull {reply.metadata.src_node_id}" for reply in replies)
            seen.extend(map(weakref.ref, replies))
            return replies

    def shrink(asked: Message, reply: Message) -> Message:
        trace.append(f"seen {reply.metadata.src_node_id}")
        return Message(RecordDict(), reply_to=asked)

    watched = WatchedGrid(Tracing({node: client(mods=[]) for node in (1, 2, 3)}), shrink)
    replies = list(watched.send_and_receive(asking(1, 2, 3)))
    assert [line.replace("pull", "seen") for line in trace[::2]] == trace[1::2]
    assert 3 == len(set(trace[::2]))
    assert all(not reply.content for reply in replies)
    assert 3 * sum(array.nbytes for array in initial().values()) < watched.traffic.received


def test_waiting_ends_at_the_timeout() -> None:
    """Replies that are there are given; for the others, the wait is as long as the timeout, and no shorter."""
    grid = grid_of(nodes=(1, 2), mods=[])
    grid.silent.add(1)
    begun = time.monotonic()
    replies = list(WatchedGrid(grid, keep).send_and_receive(asking(1, 2), timeout=0.3))
    assert [2] == [reply.metadata.src_node_id for reply in replies]
    assert time.monotonic() - begun >= 0.3


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_late_reply_is_waited_for(timeout: float | None) -> None:
    """A node that answers at the third look is heard."""

    class Late(LocalGrid):
        looks = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.looks += 1
            return super().pull_messages(message_ids) if self.looks >= 3 else []

    replies = list(WatchedGrid(Late({1: client(mods=[])}), keep).send_and_receive(asking(1), timeout=timeout))
    assert [1] == [reply.metadata.src_node_id for reply in replies]


def test_nothing_to_send_is_nothing_to_wait_for() -> None:
    """Without messages, as when evaluation is off, the call ends at once; ids that Flower leaves empty are passed over."""

    class Refusing(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return ["" for _ in messages]

    watched = WatchedGrid(Refusing({1: client()}), keep)
    assert [] == list(watched.send_and_receive([]))
    assert [] == list(watched.send_and_receive(asking(1)))


def test_the_rest_passes_through() -> None:
    """Node ids, the run and new messages are the watched grid's."""
    grid = grid_of(nodes=(1, 2))
    watched = WatchedGrid(grid, keep)
    watched.set_run(7)
    assert list(grid.get_node_ids()) == list(watched.get_node_ids())
    assert grid.run is watched.run
    made = watched.create_message(RecordDict({"arrays": record({"w": np.ones(1)})}), dst_node_id=2, message_type="train")
    assert (2, "train") == (made.metadata.dst_node_id, made.metadata.message_type)
