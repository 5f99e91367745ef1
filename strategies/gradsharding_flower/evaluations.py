"""Replies to evaluation are averaged by the wrapped strategy, once those that it could not average are out."""

import logging
from collections.abc import Iterable

from flwr.app import Error, Message

from gradsharding.errors import GradShardingError
from gradsharding_flower.books import Books
from gradsharding_flower.mod import heard
from gradsharding_flower.replies import Kinds, common, others, read_evaluation

log = logging.getLogger("flwr")


class Evaluations:
    """Takes in a round's replies to evaluation."""

    def __init__(self, server_round: int, weighted_by_key: str, books: Books) -> None:
        self._server_round = server_round
        self._weighted_by_key = weighted_by_key
        self._books = books
        self._kinds: dict[int, Kinds] = {}

    def take(self, asked: Message, reply: Message) -> Message:
        """Take a reply in; give it, without arrays, or an error in its place."""
        node = asked.metadata.dst_node_id
        usage, reply = heard(asked, reply)
        self._books.told(usage)
        try:
            self._kinds[node], content = read_evaluation(reply, self._weighted_by_key)
        except GradShardingError as error:
            self._leave_out(node, error.message)
            return Message(Error(code=0, reason=error.message), reply_to=asked)
        return Message(content, reply_to=asked)

    def usable(self, replies: Iterable[Message]) -> list[Message]:
        """Give the replies with the most common metrics; the log names the nodes of the others."""
        due = common(self._kinds.values())
        found = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error() or due is None:
                continue
            if self._kinds[node] == due:
                found.append(reply)
            else:
                self._leave_out(node, others(self._kinds[node], due))
        return found

    def _leave_out(self, node: int, reason: str) -> None:
        log.warning("aggregate_evaluate: node %d is left out of the evaluation of round %d: %s", node, self._server_round, reason)
