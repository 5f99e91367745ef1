"""The grid of the plug-in: counts what passes, shows each reply as it comes in, and asks a node once more where that is wanted.

A reply belongs to the node that was asked, whatever it says of itself. Replies that may bring arrays are pulled one at a time, so that one
update is in memory, not all; others by the hundred. What takes a store's time is done beside the pulling, by a pool.
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
from gradsharding_flower.replies import size_of

log = logging.getLogger("flwr")

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 3.0
"""Seconds between two looks for replies: short for short rounds, growing to what Flower itself waits."""

TOGETHER = 100
"""Replies without arrays that are pulled by one call."""

AT_ONCE = 16
"""Nodes whose updates are permitted or looked at together: a remote store takes a few round trips for each."""

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError, MemoryError, DecodeError)
"""What a grid raises for a reply that is none; a network's errors are others."""


class FollowUp(NamedTuple):
    """A further message to the node that has answered, and what its answer leads to."""

    message: Message
    then: "Callable[[Message], Step]"


class Work(NamedTuple):
    """What a thread of the pool does; ``then`` gets its result, or its error, where replies are taken in, one at a time."""

    do: Callable[[], Any]
    then: "Callable[[Callable[[], Any]], Step]"


Step: TypeAlias = Message | FollowUp | Work
"""What a reply leads to: the message that is kept of it ends it."""

OnReply = Callable[[Message, Message], Step]
"""Takes the message that was sent, and the reply."""


@dataclass
class Traffic:
    """Bytes of message contents, as Flower counts them."""

    sent: int = 0
    received: int = 0

    def __sub__(self, before: "Traffic") -> "Traffic":
        """What came since ``before``."""
        return Traffic(self.sent - before.sent, self.received - before.received)


class WatchedGrid(Grid):
    """Another grid, whose replies pass ``on_reply`` as they come in, before they are kept."""

    def __init__(self, grid: Grid, on_reply: OnReply) -> None:
        """Watch ``grid``; ``on_reply`` says what is kept of a reply, or what comes before that."""
        self.traffic = Traffic()
        self.alone = False
        """Whether every reply is pulled alone: since one could not be read, and those that were pulled with it went with it."""
        self._grid = grid
        self._on_reply = on_reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push the messages and wait for replies until all are here or ``timeout`` seconds are over."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="gradsharding-intake") as pool:
            exchange = _Exchange(self, pool)
            exchange.send((message, self._begun(message)) for message in messages)
            return exchange.run(timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; give their ids."""
        pushed = list(messages)
        self.traffic.sent += sum(_bytes(message) for message in pushed)
        return self._grid.push_messages(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull the replies that are there."""
        replies = list(self._grid.pull_messages(message_ids))
        self.traffic.received += sum(_bytes(reply) for reply in replies)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        return self._grid.get_node_ids()

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run that the grid serves."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self._grid.create_message(*args, **kwargs)

    def _begun(self, message: Message) -> Callable[[Message], Step]:
        return lambda reply: self._on_reply(message, reply)


class _Asked(NamedTuple):
    message: Message
    then: Callable[[Message], Step]


class _Exchange:
    """Messages that are out, work that is under way, and what is kept of the replies."""

    def __init__(self, grid: WatchedGrid, pool: ThreadPoolExecutor) -> None:
        self._grid = grid
        self._pool = pool
        self._asked: dict[str, _Asked] = {}
        self._working: dict[Future[Any], Callable[[Callable[[], Any]], Step]] = {}
        self._outbox: list[FollowUp] = []
        self._kept: list[Message] = []

    def send(self, pairs: Iterable[tuple[Message, Callable[[Message], Step]]]) -> None:
        """Push messages; of those that Flower takes, wait for the replies."""
        asked = [_Asked(*pair) for pair in pairs]
        ids = list(self._grid.push_messages([one.message for one in asked]))
        if len(ids) != len(asked):  # a grid may leave out those that it could not push
            taken = {*ids}
            ids = [one.message.metadata.message_id for one in asked]
            ids = [message_id if message_id in taken else "" for message_id in ids]
        self._asked |= {message_id: one for message_id, one in zip(ids, asked, strict=True) if message_id}

    def run(self, timeout: float | None) -> list[Message]:
        """Take replies in until all are here or ``timeout`` seconds are over."""
        end, pause = None if timeout is None else time.monotonic() + timeout, _FIRST_WAIT
        while self._asked or self._working or self._outbox:
            self._look()
            self._end(wait([*self._working], 0).done)
            if self._outbox:
                self.send(self._outbox)
                self._outbox, pause = [], _FIRST_WAIT
            left = _LONGEST_WAIT if end is None else end - time.monotonic()
            if left <= 0:
                break
            self._rest(min(pause, left))
            pause = min(2 * pause, _LONGEST_WAIT)
        self._end([*self._working])  # what is under way is of nodes that have answered in time
        return self._kept

    def _look(self) -> None:
        for ids in self._batches():
            self._pull(ids)

    def _batches(self) -> Iterator[list[str]]:
        single = {message_id for message_id, one in self._asked.items() if self._grid.alone or _brings_arrays(one.message)}
        together = sorted(self._asked.keys() - single)
        yield from ([message_id] for message_id in sorted(single))
        yield from (together[i : i + TOGETHER] for i in range(0, len(together), TOGETHER))

    def _pull(self, ids: Sequence[str]) -> None:
        try:
            replies = list(self._grid.pull_messages(ids))
        except UNREADABLE as error:
            if len(ids) == 1:
                asked = self._asked.pop(ids[0])
                self._enter(asked.then(_failed(asked.message, f"its reply cannot be read ({type(error).__name__})")))
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
        """Take one reply in; ``message_id`` says to which message, where that is known."""
        metadata = reply.metadata
        asked = self._asked.pop(message_id or metadata.reply_to_message_id, None)
        if asked is None:
            log.warning("a reply from node %s is to no message that waits for one; it is dropped", quoted(metadata.src_node_id))
            return
        node = asked.message.metadata.dst_node_id
        if reply.has_content() and metadata.src_node_id != node:
            reply = _failed(asked.message, f"its reply says that it is from node {quoted(metadata.src_node_id)}")
        self._enter(asked.then(reply))

    def _enter(self, step: Step) -> None:
        match step:
            case FollowUp():
                self._outbox.append(step)
            case Work(do, then):
                self._working[self._pool.submit(carried(do))] = then
            case _:
                self._kept.append(step)

    def _end(self, futures: Iterable[Future[Any]]) -> None:
        """Take the results of work in, in the order in which it was begun."""
        ended = {*futures}
        for future in [one for one in self._working if one in ended]:
            self._enter(self._working.pop(future)(future.result))

    def _rest(self, seconds: float) -> None:
        """Let time pass until the next look, or until there is nothing to wait for, and take in what work ends meanwhile."""
        until = time.monotonic() + seconds
        while self._working and (left := until - time.monotonic()) > 0:
            self._end(wait([*self._working], left, FIRST_COMPLETED).done)
        if self._asked and not self._outbox:
            time.sleep(max(0.0, until - time.monotonic()))


def _failed(asked: Message, reason: str) -> Message:
    return Message(Error(code=0, reason=reason), reply_to=asked)


def _brings_arrays(message: Message) -> bool:
    """Tell whether the reply to a message may hold arrays: who got a reference answers without."""
    return any(isinstance(record, ArrayRecord) and KEY not in record for record in message.content.values())


def _bytes(message: Message) -> int:
    return size_of(message.content) if message.has_content() else 0
