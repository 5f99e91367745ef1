"""A federation in one process: a real ClientApp behind a small real Grid, for tests and for trying things out."""

import copy
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Runs ``apps[node]`` on each message to ``node``, when its reply is first asked for.

    A raised exception becomes an error reply, as a SuperNode makes it. Contents are copied both ways, so that nodes
    share nothing.
    """

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # who sends: Flower's runtime says so otherwise
        self.apps = dict(apps)
        self.silent: set[int] = set()
        """Nodes that never answer."""
        self._messages: dict[str, Message] = {}
        self._contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in self.apps}

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in."""
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = ids[-1]  # as Flower's own grids do: nothing public sets it
            self._messages[ids[-1]] = copy.deepcopy(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give replies, once each."""
        taken = [self._messages.pop(one) for one in message_ids if one in self._messages and not self._is_silent(one)]
        return [self._answer(message) for message in taken]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """Push, and pull at once."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:
        """There is one run only."""

    @property
    def run(self) -> Any:
        """None: there is one run only."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make a message."""
        return Message(*args, **kwargs)

    def _is_silent(self, message_id: str) -> bool:
        return self._messages[message_id].metadata.dst_node_id in self.silent

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            reply = copy.deepcopy(self.apps[node](message, self._contexts[node]))
        except Exception as error:  # noqa: BLE001 - whatever a client does wrong is its answer
            return Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        if reply.metadata.reply_to_message_id != message.metadata.message_id:  # a SuperLink takes no other
            return Message(Error(code=0, reason="what the ClientApp gave is no reply to its message"), reply_to=message)
        return reply
