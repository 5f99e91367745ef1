"""Contributions are averaged; those that turn out to be unusable are left out, and the others are averaged again."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import RecordDict

from gradsharding import Result, Round
from gradsharding.errors import GradShardingError, NonFinite, TooFewClients, quoted
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Contribution as Sealed
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.projection import commanded
from gradsharding.rounds.records import RECORD
from gradsharding.stores.updates import Update
from gradsharding.usage import Usage, together
from gradsharding_flower.reference import client_id
from gradsharding_flower.tidy import tidying

log = logging.getLogger("flwr")

LeaveOut = Callable[[int, str], None]
"""Is called with a node that is left out of the round, and the reason."""


@dataclass(frozen=True)
class Contribution:
    """What a node contributes to the mean."""

    node: int
    content: RecordDict
    """The records of its reply, without arrays."""
    weight: float
    source: str
    update: Update

    @property
    def client(self) -> str:
        """The node's id as a client of the round."""
        return client_id(self.node)

    @property
    def sealed(self) -> Sealed:
        """The same, as a round's manifest takes it."""
        return Sealed(self.client, self.source, self.update, self.weight)


def average_usable(
    contributions: Sequence[Contribution], round_: Round, run: Callable[[Round], Result], at_least: int, leave_out: LeaveOut
) -> Result:
    """Average the contributions; leave out those that turn out to be unusable, and average the others again.

    Each attempt is a round of its own, which ``run`` aggregates. The result includes what failed attempts asked of stores. Raise
    TooFewClients if fewer than ``at_least`` remain; raise an error that is no client's fault as it is.
    """
    kept, wasted = list(contributions), dict[str, Usage]()
    for attempt in range(len(kept) + 1):
        if len(kept) < max(at_least, 1):
            raise TooFewClients(
                f"too few usable updates: {len(kept)} (at least {max(at_least, 1)} needed); the log says why others were left out"
            )
        trial = Round.create(round_.store, f"{round_.id}-{attempt}")
        try:
            manifest = trial.freeze(Manifest.of(trial.id, (contribution.sealed for contribution in kept)))
            records = commanded({}, trial.store.charges, manifest.json_bytes + RECORD, found=trial.found)
            return run(trial).within(wasted, records)
        except GradShardingError as error:
            wasted = together(wasted, error.usage)
            with tidying("the objects of a failed attempt"):
                trial.abandon()
            faults = _faults(error, kept[0].update.layout)
            if not faults:
                raise
            for contribution in kept:
                if contribution.client in faults:
                    leave_out(contribution.node, faults[contribution.client])
            kept = [contribution for contribution in kept if contribution.client not in faults]
    raise AssertionError("each attempt but the last leaves a client out")


def _faults(error: GradShardingError, layout: Layout) -> dict[str, str]:
    """Find the clients that caused an error, and what is wrong with each; a byte offset becomes a tensor and an index."""
    if isinstance(error, NonFinite):
        overflowing = {*error.details.get("overflowing", ())}
        return {client: _place(layout, byte, finite=client in overflowing) for client, byte in error.details["found"]}
    return {**error.details.get("clients", {})}


def _place(layout: Layout, byte: int, *, finite: bool) -> str:
    tensor, index = layout.locate(byte)
    value = "a value so large that sums overflow" if finite else "NaN or infinity"
    return f"tensor {quoted(tensor.name)} holds {value} at {list(index)}"
