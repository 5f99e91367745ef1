"""A federation in one process: real ClientApps behind a small real Grid, for tests and experiments."""

import copy
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Runs ``apps[node]`` on a message to ``node`` when its reply is pulled.

    An exception becomes an error reply, as on a SuperNode. Contents are copied both ways, so that nodes share nothing.
    """

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # the sender, which Flower's runtime sets otherwise
        self.apps = dict(apps)
        self.silent: set[int] = set()
        """Nodes that never reply."""
        self._messages: dict[str, Message] = {}
        self._contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in self.apps}

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages, and return their new ids."""
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = ids[-1]  # as Flower's own grids do: nothing public sets it
            self._messages[ids[-1]] = copy.deepcopy(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies, each of them once."""
        taken = [self._messages.pop(id_) for id_ in message_ids if id_ in self._messages and not self._is_silent(id_)]
        return [self._answer(message) for message in taken]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """Push messages, and pull their replies at once."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:
        """Do nothing: there is only one run."""

    @property
    def run(self) -> Any:
        """None: there is only one run."""
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
        except Exception as error:  # noqa: BLE001 - a client may fail in any way
            return Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        if reply.metadata.reply_to_message_id != message.metadata.message_id:  # a SuperLink takes no other
            return Message(Error(code=0, reason="the ClientApp's reply is not to the message that it got"), reply_to=message)
        return reply
