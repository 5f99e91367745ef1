"""The books of a round: what it asks of its stores, as counted here, as reported by nodes, and as planned, kept apart."""

from gradsharding import ObjectStore
from gradsharding.usage import Ledger, Spent, Usage, since, together, total


class Books:
    """The server keeps them, round after round."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        """Read this process's usage from ``ledger``, in which its stores count."""
        self._ledger = ledger or Ledger()
        self.begin_round()

    def begin_round(self) -> None:
        """Start a round: all figures are zero again."""
        self._before = self._ledger.spent
        self.planned: Spent = {}
        """The most that the server asks for besides the aggregation, if nothing fails."""
        self.nodes: Usage | None = None
        """What nodes report that they asked for; None if no node reports."""
        self.nodes_planned = Usage()
        """The most that nodes with the mod ask for, if nothing fails."""
        self._trained: Spent | None = None
        self._nodes_evaluating = Usage()

    def end_training(self) -> None:
        """End the round's training: usage from now on belongs to its evaluation."""
        self._trained = self._ledger.spent

    @property
    def evaluation(self) -> Usage | None:
        """Usage after the training, of the server and of nodes that report; None if the round was given up."""
        return None if self._trained is None else total(since(self._trained, self._ledger.spent)) + self._nodes_evaluating

    @property
    def counted(self) -> Spent:
        """The server's usage in this round, besides the aggregation."""
        return since(self._before, self._ledger.spent)

    def plan(self, store: ObjectStore, *usages: Usage) -> None:
        """Add usage that is expected of a store."""
        self.planned = together(self.planned, *({store.charges.kind: usage} for usage in usages))

    def add_node_usage(self, usage: Usage | None) -> None:
        """Add what a node reports, if it does."""
        if usage and self._trained is None:
            self.nodes = (self.nodes or Usage()) + usage
        elif usage:
            self._nodes_evaluating += usage
