"""A contest is two runs of one federation: the rounds of each so far."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Trained(NamedTuple):
    """A finished round of training."""

    accuracy: float
    """Share of the test images that the new model classifies correctly."""
    seconds: float
    through_server: int
    """Bytes of messages to and from the clients, counted where they pass through the server."""
    past_server: int
    """Bytes that clients read from the store and wrote to it, counted by the clients."""


@dataclass
class Run:
    """The rounds that one strategy has trained so far."""

    name: str
    rounds: list[Trained] = field(default_factory=list)

    @property
    def through_server(self) -> int:
        """Bytes that have gone through the server so far."""
        return sum(trained.through_server for trained in self.rounds)

    @property
    def past_server(self) -> int:
        """Bytes that have gone past the server so far."""
        return sum(trained.past_server for trained in self.rounds)


@dataclass
class Contest:
    """Two runs of the same federation: first the sliced one, then Flower's own."""

    rounds: int
    sliced: Run = field(default_factory=lambda: Run("gradsharding"))
    plain: Run = field(default_factory=lambda: Run("plain Flower"))
    interrupted: bool = False

    @property
    def doing(self) -> str:
        """The step in progress, for people."""
        if self.interrupted:
            return "interrupted; ending Flower's simulation engine, which takes some seconds"
        if not self.sliced.rounds:
            return "starting Flower's simulation engine, which takes some seconds"
        under_way = next((run for run in (self.sliced, self.plain) if len(run.rounds) < self.rounds), None)
        return f"{under_way.name}: round {len(under_way.rounds) + 1} of {self.rounds}" if under_way else "ending Flower's simulation engine"
