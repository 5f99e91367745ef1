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
        """Bytes of its record."""
        return len(self.model_dump_json().encode())

    @classmethod
    def of(cls, round_id: str, given: Iterable["Contribution"]) -> Self:
        """Check contributions against each other, and freeze them.

        Raise TooFewClients if there is none, DuplicateClient, LayoutMismatch naming the tensor that differs, InvalidId, InvalidWeight.
        """
        sorted_ = sorted(given, key=lambda one: check_id(one.client))
        if not sorted_:
            raise TooFewClients(f"round {round_id} has no update to aggregate; submit at least one")
        first = sorted_[0]
        for one, other in pairwise(sorted_):
            if one.client == other.client:
                raise DuplicateClient(f"client {one.client} is given twice in round {round_id}; use one id per client")
            first.update.layout.require_same(other.update.layout, first.client, other.client)
        weights = integral_weights({one.client: one.weight for one in sorted_})
        terms = (
            Term(client=one.client, source=one.source, version=one.update.stat.version, base=one.update.base, weight=weights[one.client])
            for one in sorted_
        )
        return cls(round=round_id, layout=first.update.layout, terms=tuple(terms))


class Contribution(NamedTuple):
    """What one client adds to a round: where its update is, what its header says, and its weight."""

    client: str
    source: str
    """A key of the round's store, or a URL."""
    update: Update
    weight: float


def check_id(name: object) -> str:
    """Give an id back if it may become part of a key; raise InvalidId."""
    if not isinstance(name, str):
        raise InvalidId(f"{quoted(name)} is not an id but of type {type(name).__name__}; ids are text: convert it, by str() say")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
        raise InvalidId(f"{quoted(name, 100)} is not an id; use 1 to 64 of A-Z a-z 0-9 _ . - and begin with none of the last two")
    return name
