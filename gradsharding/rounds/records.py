"""The records of a round: each is one JSON object in the store, written once and checked when it is read."""

from typing import NamedTuple

from pydantic import AliasChoices, Field

from gradsharding.arithmetic.rules import MEAN, RecordedRule
from gradsharding.format.layout import Layout
from gradsharding.format.record import Record, format_field
from gradsharding.planning.task import NonFinitePolicy

RECORD = 2 << 10
"""Bytes that bound a record which does not grow with the round: a receipt, a plan's."""


class RoundRecord(Record):
    """Where a round's result goes: a key of its store, or a URL."""

    id: str
    output: str


class Receipt(Record):
    """One client's contribution: where its update lies, pinned by version, and how much it weighs."""

    client: str
    source: str
    version: str
    base: int
    weight: int | float
    layout: str
    """Digest of the update's layout."""


class PlanRecord(Record):
    """Which plan is under way, by digest, and the multipart upload that collects its parts."""

    format: int = format_field(2)
    """Format 1 had no rule."""
    topology: str
    rule: str | None = None
    tasks: int
    digest: str
    nonfinite: NonFinitePolicy
    upload: str


class ResultRecord(Record):
    """A published result: one safetensors object."""

    format: int = format_field(2)
    """In format 1, the rule was called ``arithmetic``, "float64" or "exact"."""
    source: str
    version: str
    clients: tuple[str, ...]
    weight: int
    layout: Layout
    rule: RecordedRule = Field(default=MEAN, validation_alias=AliasChoices("rule", "arithmetic"))
    digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 (hex) of the data section, if the rule vouches that it depends on the contributions alone; else None."""


class Begun(NamedTuple):
    """An upload that collects the parts of a plan."""

    upload: str
    new: bool
    """Whether this call has begun it: nothing has arrived yet."""
    dropped: int = 0
    """Tasks of the plan that was given up for it."""


class Published(NamedTuple):
    """A round's result."""

    record: ResultRecord | None
    stale: bool = False
    """Whether there was one, whose object is gone, was replaced, or was altered."""
    altered: bool = False
    """Whether that object is of the version that was published, and its header is not the one that was."""
