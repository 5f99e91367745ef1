"""A manifest is what a round averages: its contributions, sorted by client, checked against each other, and frozen."""

import re
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Self

from gradsharding.arithmetic.weights import integral_weights
from gradsharding.errors import DuplicateClient, InvalidId, TooFewClients, quoted
from gradsharding.format.layout import Layout
from gradsharding.format.record import Record
from gradsharding.planning.task import Term
from gradsharding.stores.updates import Update


class Manifest(Record):
    """The contributions of a round, frozen: clients sorted by id, weights as integers."""

    round: str
    layout: Layout
    terms: tuple[Term, ...]

    @cached_property
    def json_bytes(self) -> int:
        """Size of the manifest as JSON, in bytes."""
        return len(self.model_dump_json().encode())

    @classmethod
    def of(cls, round_id: str, contributions: Iterable["Contribution"]) -> Self:
        """Check contributions against each other and freeze them.

        Raise TooFewClients if there are none, DuplicateClient, LayoutMismatch naming the tensor that differs, InvalidId, InvalidWeight.
        """
        sorted_ = sorted(contributions, key=lambda contribution: check_id(contribution.client))
        if not sorted_:
            raise TooFewClients(f"round {round_id} has no update to aggregate; submit at least one")
        first = sorted_[0]
        for before, after in pairwise(sorted_):
            if before.client == after.client:
                raise DuplicateClient(f"client {before.client} is given twice in round {round_id}; use one id per client")
            first.update.layout.require_same(after.update.layout, first.client, after.client)
        weights = integral_weights({contribution.client: contribution.weight for contribution in sorted_})
        terms = (
            Term(client=c.client, source=c.source, version=c.update.stat.version, base=c.update.base, weight=weights[c.client])
            for c in sorted_
        )
        return cls(round=round_id, layout=first.update.layout, terms=tuple(terms))


class Contribution(NamedTuple):
    """One client's part in a round: the place of its update, the update's header, and the weight."""

    client: str
    source: str
    """A key of the round's store, or a URL."""
    update: Update
    weight: float


def check_id(name: object) -> str:
    """Return an id that may become part of a key; raise InvalidId for any other."""
    if not isinstance(name, str):
        raise InvalidId(f"{quoted(name)} is not an id but of type {type(name).__name__}; ids are text: convert it with str()")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
        raise InvalidId(f"{quoted(name, 100)} is not an id; use 1 to 64 of A-Z a-z 0-9 _ . - and do not begin with . or -")
    return name
