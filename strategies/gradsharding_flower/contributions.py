"""What of the replies may enter the mean: each is checked by itself, then against the others, then by what it holds."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from flwr.app import Message, RecordDict

from gradsharding import Result, Round
from gradsharding.errors import (
    ChangedObject,
    GradShardingError,
    InvalidUpdate,
    InvalidWeight,
    LayoutMismatch,
    NonFinite,
    TooFewClients,
)
from gradsharding.layout import Layout
from gradsharding.projection import commanded
from gradsharding.round import RECORD, Manifest
from gradsharding.round import Contribution as OfRound
from gradsharding.update import Update, inspect
from gradsharding.usage import Usage, carried, together
from gradsharding.weights import check_weight
from gradsharding_flower.reference import Reference, client_id, find

log = logging.getLogger("flwr")

AT_ONCE = 16
"""Nodes whose updates are looked at together: a remote store takes a few round trips for each."""

LeaveOut = Callable[[int, str], None]
"""Takes the node that is left out of a round, and why."""


@dataclass(frozen=True)
class Contribution:
    """A reply that may enter the mean."""

    node: int
    content: RecordDict
    weight: float
    reference: Reference
    update: Update

    @property
    def client(self) -> str:
        """The node as the client of a round."""
        return client_id(self.node)

    @property
    def of_round(self) -> OfRound:
        """The same, for a round's manifest."""
        return OfRound(self.client, self.reference.source, self.update, self.weight)


def collect(
    replies: Iterable[Message], round_: Round, weighted_by_key: str, like: Layout, known: Mapping[str, Update], leave_out: LeaveOut
) -> list[Contribution]:
    """Give the usable replies, sorted by node; ``leave_out`` is told of the others.

    ``known`` are the updates, by key, whose headers need not be read: the server wrote them, or saw them arrive.
    They hold the tensors of ``like``, the model that was sent, if any reply does; all have the most common dtypes and
    the most common metrics.
    """
    found = []
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="gradsharding-collect") as pool:
        answers = sorted(replies, key=lambda m: m.metadata.src_node_id)
        check = carried(partial(_check, round_, weighted_by_key, known))
        for message, one in zip(answers, pool.map(check, answers), strict=True):
            if isinstance(one, str):
                leave_out(message.metadata.src_node_id, one)
            else:
                found.append(one)
    return _alike(_with_common_metrics(found, leave_out), like, leave_out)


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
            records = commanded({}, trial.store.charges, manifest.json_bytes + RECORD, found=len(trial.found))
            return run(trial).within(vain, records)
        except GradShardingError as error:
            vain = together(vain, error.usage)
            trial.abandon()
            faults = _faults(error, kept[0].update.layout)
            if not faults:
                raise
            for one in kept:
                if one.client in faults:
                    leave_out(one.node, faults[one.client])
            kept = [one for one in kept if one.client not in faults]
    raise AssertionError("each attempt but the last leaves a client out")


def _check(round_: Round, weighted_by_key: str, known: Mapping[str, Update], message: Message) -> Contribution | str:
    """Check one reply by itself; give it as a contribution, or say why it is none."""
    if message.has_error():
        return f"it answered with an error: {message.error.reason}"
    try:
        return _checked(message.metadata.src_node_id, message.content, round_, weighted_by_key, known)
    except GradShardingError as error:
        return error.message


def _checked(node: int, content: RecordDict, round_: Round, weighted_by_key: str, known: Mapping[str, Update]) -> Contribution:
    """Check its records, its weight, and that its receipt tells the truth."""
    arrays, metrics = list(content.array_records.values()), list(content.metric_records.values())
    if len(arrays) != 1 or len(metrics) != 1:
        raise InvalidUpdate(f"its reply has {len(arrays)} ArrayRecords and {len(metrics)} MetricRecords, where one of each is due")
    weight = metrics[0].get(weighted_by_key)
    if not isinstance(weight, (int, float)):
        raise InvalidWeight(f"its metrics say {weighted_by_key!r} is {weight!r}, where a number is due")
    check_weight(weight, client_id(node))
    reference, place = find(arrays[0]), round_.update_key(client_id(node))
    if reference is None or reference.source != place:
        raise InvalidUpdate(f"its receipt is for {reference.source if reference else 'nothing'}, where {place} is due")
    update = known.get(place) or inspect(place, round_.store)
    if update.stat.version != reference.version:
        raise ChangedObject(f"{place} is at version {update.stat.version}, not {reference.version} as in its receipt")
    if sorted(reference.names) != sorted(tensor.name for tensor in update.layout.tensors):
        raise InvalidUpdate(f"its receipt names {len(reference.names)} tensors, others than the {len(update.layout.tensors)} in {place}")
    return Contribution(node, content, weight, reference, update)


def _with_common_metrics(found: Sequence[Contribution], leave_out: LeaveOut) -> list[Contribution]:
    """Keep the replies whose metrics have the most common names and lengths: others could not be averaged with them."""
    kinds = {one.node: _metrics(one) for one in found}
    common = max(kinds.values(), key=Counter(kinds.values()).__getitem__, default=())
    for one in found:
        if kinds[one.node] != common:
            leave_out(one.node, f"its metrics are {_names(kinds[one.node])}, where {_names(common)} are common")
    return [one for one in found if kinds[one.node] == common]


def _metrics(one: Contribution) -> tuple[tuple[str, int | None], ...]:
    """Name each metric, with its length if it is a list."""
    (metrics,) = one.content.metric_records.values()
    return tuple(sorted((name, len(value) if isinstance(value, list) else None) for name, value in metrics.items()))


def _names(kinds: Iterable[tuple[str, int | None]]) -> str:
    return ", ".join(name if length is None else f"{name}[{length}]" for name, length in kinds)


def _alike(found: Sequence[Contribution], like: Layout, leave_out: LeaveOut) -> list[Contribution]:
    if not found:
        return []
    shapes = {tensor.name: tensor.shape for tensor in like.tensors}
    fitting = [one for one in found if {t.name: t.shape for t in one.update.layout.tensors} == shapes] or found
    counts = Counter(one.update.layout.digest for one in fitting)
    model = max(fitting, key=lambda one: (counts[one.update.layout.digest], one.update.layout.digest == like.digest))
    alike = []
    for one in found:
        try:
            model.update.layout.require_same(one.update.layout, f"node {model.node}'s update", "its own")
            alike.append(one)
        except LayoutMismatch as error:
            leave_out(one.node, error.message)
    return alike


def _faults(error: GradShardingError, layout: Layout) -> dict[str, str]:
    """Which clients an error is the fault of, and how; by tensor and index where it says a byte."""
    if isinstance(error, NonFinite):
        return {client: _place(layout, byte) for client, byte in error.details["found"]}
    return {error.details["client"]: error.message} if "client" in error.details else {}


def _place(layout: Layout, byte: int) -> str:
    tensor, index = layout.locate(byte)
    return f"tensor {tensor.name!r} holds NaN or infinity at {list(index)}"
