"""The grid of the plug-in: counts what passes, shows each reply as it comes in, and asks a node once more where that is wanted."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 3.0
"""Seconds between two looks for replies: short for short rounds, growing to what Flower itself waits."""


class FollowUp(NamedTuple):
    """A second message to a node, and who is told its answer; the node's first reply counts from then on."""

    message: Message
    told: Callable[[Message], None]


OnReply = Callable[[Message], FollowUp | None]


@dataclass
class Traffic:
    """Bytes of message contents, as Flower counts them."""

    sent: int = 0
    received: int = 0

    def __sub__(self, before: "Traffic") -> "Traffic":
        """What came since ``before``."""
        return Traffic(self.sent - before.sent, self.received - before.received)


class WatchedGrid(Grid):
    """Another grid, whose replies pass ``on_reply`` one at a time, as they come in, before they are kept."""

    def __init__(self, grid: Grid, on_reply: OnReply) -> None:
        """Watch ``grid``; ``on_reply`` may replace a reply's content, which frees what it held, and may follow it up."""
        self.traffic = Traffic()
        self._grid = grid
        self._on_reply = on_reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push the messages and wait for replies until all are here or ``timeout`` seconds are over."""
        kept: list[Message] = []
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        followed: dict[str, tuple[Message, Callable[[Message], None]]] = {}
        end, wait = None if timeout is None else time.monotonic() + timeout, _FIRST_WAIT
        while waiting:
            for message_id in sorted(waiting):  # one id a call: so that one update is in memory at a time, not all
                for reply in self.pull_messages([message_id]):
                    waiting.discard(message_id)
                    if message_id in followed:
                        first, told = followed.pop(message_id)
                        told(reply)
                        kept.append(first)
                    elif more := self._on_reply(reply):
                        for new in filter(None, self.push_messages([more.message])):
                            followed[new] = reply, more.told
                            waiting.add(new)
                            wait = _FIRST_WAIT
                    else:
                        kept.append(reply)
            left = _LONGEST_WAIT if end is None else end - time.monotonic()
            if left <= 0:
                break
            if waiting:
                time.sleep(min(wait, left))
                wait = min(2 * wait, _LONGEST_WAIT)
        return kept

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


def _bytes(message: Message) -> int:
    return sum(record.count_bytes() for record in message.content.values()) if message.has_content() else 0
