"""The wrapped strategy averages the replies to an evaluation; those that it could not average are dropped first."""

import logging
from collections.abc import Iterable

from flwr.app import Error, Message

from gradsharding.errors import GradShardingError
from gradsharding_flower.books import Books
from gradsharding_flower.mod import take_usage
from gradsharding_flower.replies import MetricShapes, most_common, read_evaluation, uncommon

log = logging.getLogger("flwr")


class Evaluations:
    """The replies to one round's evaluation."""

    def __init__(self, server_round: int, weighted_by_key: str, books: Books) -> None:
        self._server_round = server_round
        self._weighted_by_key = weighted_by_key
        self._books = books
        self._metrics: dict[int, MetricShapes] = {}

    def receive(self, asked: Message, reply: Message) -> Message:
        """Check a reply. Return it without arrays, or an error in its place."""
        node = asked.metadata.dst_node_id
        usage, reply = take_usage(asked, reply)
        self._books.add_node_usage(usage)
        try:
            self._metrics[node], content = read_evaluation(reply, self._weighted_by_key)
        except GradShardingError as error:
            self._leave_out(node, error.message)
            return Message(Error(code=0, reason=error.message), reply_to=asked)
        return Message(content, reply_to=asked)

    def usable(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies with the most common metrics; log the nodes of the others."""
        usual = most_common(self._metrics.values())
        kept = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error() or usual is None:
                continue
            if self._metrics[node] == usual:
                kept.append(reply)
            else:
                self._leave_out(node, uncommon(self._metrics[node], usual))
        return kept

    def _leave_out(self, node: int, reason: str) -> None:
        log.warning("aggregate_evaluate: node %d is left out of the evaluation of round %d: %s", node, self._server_round, reason)
