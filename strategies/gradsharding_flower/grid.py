"""The plug-in's grid handles each reply as it arrives: it counts bytes, calls a handler, and sends the follow-up that the handler asks for.

A reply belongs to the node that was asked, whoever it says it is from. Replies that may hold arrays are pulled one at a time, so that one
update is in memory, not all; other replies are pulled in batches. Threads of a pool wait for stores, and pulling goes on meanwhile.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from flwr.app import ArrayRecord, Error, Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from gradsharding.errors import quoted
from gradsharding.usage import carried
from gradsharding_flower.reference import KEY
from gradsharding_flower.replies import content_bytes

log = logging.getLogger("flwr")

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 3.0
"""Seconds between two pulls: short at first, for short rounds, and doubled up to what Flower itself waits."""

BATCH = 100
"""Replies without arrays that one call pulls."""

PARALLEL_NODES = 16
"""Nodes whose updates are permitted or inspected at once: each takes a few round trips to a remote store."""

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError, MemoryError, DecodeError)
"""Errors that a grid raises for a malformed reply; network errors are not among them."""


class FollowUp(NamedTuple):
    """Another message to the node that has replied; ``then`` handles the reply to it."""

    message: Message
    then: "Callable[[Message], Step]"


class Work(NamedTuple):
    """A call for a thread of the pool; ``then`` handles its result or its error, in the thread that handles replies."""

    do: Callable[[], Any]
    then: "Callable[[Callable[[], Any]], Step]"


Step: TypeAlias = Message | FollowUp | Work
"""What follows a reply: more messages or work, and at the end the message that is kept."""

OnReply = Callable[[Message, Message], Step]
"""Handles a reply; takes the message that was sent, and the reply to it."""


@dataclass
class Traffic:
    """Bytes of message contents, as Flower counts them."""

    sent: int = 0
    received: int = 0

    def __sub__(self, before: "Traffic") -> "Traffic":
        """The traffic since ``before``."""
        return Traffic(self.sent - before.sent, self.received - before.received)


class WatchedGrid(Grid):
    """Wraps a grid: each reply goes through ``on_reply`` as it arrives."""

    def __init__(self, grid: Grid, on_reply: OnReply) -> None:
        """Wrap ``grid``."""
        self.traffic = Traffic()
        self.alone = False
        """Whether every reply is pulled alone: true once a batch could not be read because of one reply in it."""
        self._grid = grid
        self._on_reply = on_reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages, and handle replies until all have come or ``timeout`` seconds have passed."""
        with ThreadPoolExecutor(PARALLEL_NODES, thread_name_prefix="gradsharding-intake") as pool:
            exchange = _Exchange(self, pool)
            exchange.send((message, self._handler(message)) for message in messages)
            return exchange.run(timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages, and return their ids."""
        pushed = list(messages)
        self.traffic.sent += sum(_bytes(message) for message in pushed)
        return self._grid.push_messages(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull the replies that have come."""
        replies = list(self._grid.pull_messages(message_ids))
        self.traffic.received += sum(_bytes(reply) for reply in replies)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        return self._grid.get_node_ids()

    def set_run(self, run: Any) -> None:
        """Forward to the wrapped grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the wrapped grid."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Forward to the wrapped grid."""
        return self._grid.create_message(*args, **kwargs)

    def _handler(self, message: Message) -> Callable[[Message], Step]:
        return lambda reply: self._on_reply(message, reply)


class _Asked(NamedTuple):
    message: Message
    then: Callable[[Message], Step]


class _Exchange:
    """One exchange: messages that wait for replies, work in progress, and the messages kept so far."""

    def __init__(self, grid: WatchedGrid, pool: ThreadPoolExecutor) -> None:
        self._grid = grid
        self._pool = pool
        self._asked: dict[str, _Asked] = {}
        self._working: dict[Future[Any], Callable[[Callable[[], Any]], Step]] = {}
        self._outbox: list[FollowUp] = []
        self._kept: list[Message] = []

    def send(self, pairs: Iterable[tuple[Message, Callable[[Message], Step]]]) -> None:
        """Push messages; those that Flower accepts then wait for replies."""
        asked = [_Asked(*pair) for pair in pairs]
        ids = list(self._grid.push_messages([entry.message for entry in asked]))
        if len(ids) != len(asked):  # a grid may leave out messages that it could not push
            accepted = {*ids}
            ids = [entry.message.metadata.message_id for entry in asked]
            ids = [message_id if message_id in accepted else "" for message_id in ids]
        self._asked |= {message_id: entry for message_id, entry in zip(ids, asked, strict=True) if message_id}

    def run(self, timeout: float | None) -> list[Message]:
        """Handle replies until all have come or ``timeout`` seconds have passed; return the messages that are kept."""
        end, pause = None if timeout is None else time.monotonic() + timeout, _FIRST_WAIT
        while self._asked or self._working or self._outbox:
            self._pull_all()
            self._finish(wait([*self._working], 0).done)
            if self._outbox:
                self.send(self._outbox)
                self._outbox, pause = [], _FIRST_WAIT
            left = _LONGEST_WAIT if end is None else end - time.monotonic()
            if left <= 0:
                break
            self._rest(min(pause, left))
            pause = min(2 * pause, _LONGEST_WAIT)
        self._finish([*self._working])  # work in progress is for nodes that replied in time
        return self._kept

    def _pull_all(self) -> None:
        for ids in self._batches():
            self._pull(ids)

    def _batches(self) -> Iterator[list[str]]:
        single = {message_id for message_id, entry in self._asked.items() if self._grid.alone or _may_bring_arrays(entry.message)}
        batched = sorted(self._asked.keys() - single)
        yield from ([message_id] for message_id in sorted(single))
        yield from (batched[i : i + BATCH] for i in range(0, len(batched), BATCH))

    def _pull(self, ids: Sequence[str]) -> None:
        try:
            replies = list(self._grid.pull_messages(ids))
        except UNREADABLE as error:
            if len(ids) == 1:
                asked = self._asked.pop(ids[0])
                self._follow(asked.then(_failed(asked.message, f"its reply cannot be read ({type(error).__name__})")))
                return
            self._grid.alone = True
            log.warning(
                "one of %d replies cannot be read (%s); replies are pulled one at a time from now on", len(ids), type(error).__name__
            )
            for message_id in ids:
                self._pull([message_id])
            return
        replies.reverse()
        while replies:
            self._take(replies.pop(), ids[0] if len(ids) == 1 else None)

    def _take(self, reply: Message, message_id: str | None) -> None:
        """Handle one reply; ``message_id`` is the message that it answers, if that is known."""
        metadata = reply.metadata
        asked = self._asked.pop(message_id or metadata.reply_to_message_id, None)
        if asked is None:
            log.warning("a reply from node %s answers no message that is waiting for one; it is dropped", quoted(metadata.src_node_id))
            return
        node = asked.message.metadata.dst_node_id
        if reply.has_content() and metadata.src_node_id != node:
            reply = _failed(asked.message, f"its reply says that it is from node {quoted(metadata.src_node_id)}")
        self._follow(asked.then(reply))

    def _follow(self, step: Step) -> None:
        match step:
            case FollowUp():
                self._outbox.append(step)
            case Work(do, then):
                self._working[self._pool.submit(carried(do))] = then
            case _:
                self._kept.append(step)

    def _finish(self, futures: Iterable[Future[Any]]) -> None:
        """Handle the results of finished work, in the order in which the work began."""
        finished = {*futures}
        for future in [future for future in self._working if future in finished]:
            self._follow(self._working.pop(future)(future.result))

    def _rest(self, seconds: float) -> None:
        """Wait until the next pull, or until there is nothing to wait for; handle work that finishes meanwhile."""
        until = time.monotonic() + seconds
        while self._working and (left := until - time.monotonic()) > 0:
            self._finish(wait([*self._working], left, FIRST_COMPLETED).done)
        if self._asked and not self._outbox:
            time.sleep(max(0.0, until - time.monotonic()))


def _failed(asked: Message, reason: str) -> Message:
    return Message(Error(code=0, reason=reason), reply_to=asked)


def _may_bring_arrays(message: Message) -> bool:
    """Whether the reply to a message may hold arrays: a node that got a reference replies without."""
    return any(isinstance(record, ArrayRecord) and KEY not in record for record in message.content.values())


def _bytes(message: Message) -> int:
    return content_bytes(message.content) if message.has_content() else 0
