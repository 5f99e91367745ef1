"""What a round of training asks of stores: counted, as its nodes say, and planned, each in a column of its own."""

from gradsharding import ObjectStore
from gradsharding.usage import Ledger, Spent, Usage, since, together, total


class Books:
    """Kept by the server for one round after another."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        """Keep them beside ``ledger``, in which stores count what this process asks."""
        self._ledger = ledger or Ledger()
        self.open()

    def open(self) -> None:
        """Begin a round."""
        self._before = self._ledger.spent
        self.planned: Spent = {}
        """What the server was to ask beside the aggregation, at most, if nothing fails."""
        self.nodes: Usage | None = None
        """What nodes say that they have asked; None if none says so."""
        self.nodes_planned = Usage()
        """What nodes with the mod were to ask, at most, if nothing fails."""
        self._trained: Spent | None = None
        self._nodes_evaluating = Usage()

    def close(self) -> None:
        """End the training of the round: what comes now is its evaluation."""
        self._trained = self._ledger.spent

    @property
    def evaluation(self) -> Usage | None:
        """What was asked after the training, by the server and by nodes that say so; None for a round that was given up."""
        return None if self._trained is None else total(since(self._trained, self._ledger.spent)) + self._nodes_evaluating

    @property
    def counted(self) -> Spent:
        """What the server has asked in this round, beside the aggregation."""
        return since(self._before, self._ledger.spent)

    def plan(self, store: ObjectStore, *usages: Usage) -> None:
        """Enter what is to be asked of a store."""
        self.planned = together(self.planned, *({store.charges.kind: usage} for usage in usages))

    def told(self, usage: Usage | None) -> None:
        """Enter what a node says."""
        if usage and self._trained is None:
            self.nodes = (self.nodes or Usage()) + usage
        elif usage:
            self._nodes_evaluating += usage
