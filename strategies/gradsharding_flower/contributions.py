"""What may enter the mean is averaged; what turns out to be unusable then is left out, and the rest is averaged again."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import RecordDict

from gradsharding import Result, Round
from gradsharding.errors import GradShardingError, NonFinite, TooFewClients, quoted
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Contribution as OfRound
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.projection import commanded
from gradsharding.rounds.records import RECORD
from gradsharding.stores.updates import Update
from gradsharding.usage import Usage, together
from gradsharding_flower.reference import client_id
from gradsharding_flower.tidy import tidying

log = logging.getLogger("flwr")

LeaveOut = Callable[[int, str], None]
"""Takes the node that is left out of a round, and why."""


@dataclass(frozen=True)
class Contribution:
    """What a node adds to the mean."""

    node: int
    content: RecordDict
    """Of its reply, without arrays."""
    weight: float
    source: str
    update: Update

    @property
    def client(self) -> str:
        """The node as the client of a round."""
        return client_id(self.node)

    @property
    def of_round(self) -> OfRound:
        """The same, for a round's manifest."""
        return OfRound(self.client, self.source, self.update, self.weight)


def mean(
    contributions: Sequence[Contribution], round_: Round, run: Callable[[Round], Result], at_least: int, leave_out: LeaveOut
) -> Result:
    """Average the contributions; those that turn out to be unusable are left out, and the rest is averaged again.

    Each attempt is a round of its own, ``run`` aggregates it; what attempts have asked of stores in vain is in the result. Raise
    TooFewClients, or what is no client's fault.
    """
    kept, vain = list(contributions), dict[str, Usage]()
    for attempt in range(len(kept) + 1):
        if len(kept) < max(at_least, 1):
            raise TooFewClients(f"{len(kept)} usable updates are too few, {max(at_least, 1)} are needed; see why the others were left out")
        trial = Round.create(round_.store, f"{round_.id}-{attempt}")
        try:
            manifest = trial.freeze(Manifest.of(trial.id, (one.of_round for one in kept)))
            records = commanded({}, trial.store.charges, manifest.json_bytes + RECORD, found=trial.found)
            return run(trial).within(vain, records)
        except GradShardingError as error:
            vain = together(vain, error.usage)
            with tidying("what a failed attempt has left"):
                trial.abandon()
            faults = _faults(error, kept[0].update.layout)
            if not faults:
                raise
            for one in kept:
                if one.client in faults:
                    leave_out(one.node, faults[one.client])
            kept = [one for one in kept if one.client not in faults]
    raise AssertionError("each attempt but the last leaves a client out")


def _faults(error: GradShardingError, layout: Layout) -> dict[str, str]:
    """Which clients an error is the fault of, and how; by tensor and index where it says a byte."""
    if isinstance(error, NonFinite):
        overflowing = {*error.details.get("overflowing", ())}
        return {client: _place(layout, byte, finite=client in overflowing) for client, byte in error.details["found"]}
    return {**error.details.get("clients", {})}


def _place(layout: Layout, byte: int, *, finite: bool) -> str:
    tensor, index = layout.locate(byte)
    what = "a value so large that sums overflow" if finite else "NaN or infinity"
    return f"tensor {quoted(tensor.name)} holds {what} at {list(index)}"
