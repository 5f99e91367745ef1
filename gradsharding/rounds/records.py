"""The records of a round: each is one JSON object in the store, written once and checked when it is read."""

from typing import NamedTuple

from pydantic import AliasChoices, Field

from gradsharding.arithmetic.rules import MEAN, RecordedRule
from gradsharding.format.layout import Layout
from gradsharding.format.record import Record, format_field
from gradsharding.planning.task import NonFinitePolicy

RECORD = 2 << 10
"""Bytes, at most, of a record that does not grow with the round, such as a receipt or a plan's."""


class RoundRecord(Record):
    """The place of a round's result: a key of its store, or a URL."""

    id: str
    output: str


class Receipt(Record):
    """One client's contribution: the place of its update, pinned by version, and its weight."""

    client: str
    source: str
    version: str
    base: int
    weight: int | float
    layout: str
    """Digest of the update's layout."""


class PlanRecord(Record):
    """The plan in progress, by its digest, and the multipart upload that collects its parts."""

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
    """The upload that collects the parts of a plan."""

    upload: str
    new: bool
    """Whether this call began it, so that no part has arrived yet."""
    dropped: int = 0
    """Tasks of the earlier plan that was abandoned for it."""


class Published(NamedTuple):
    """The result that a round has published, if it is still there."""

    record: ResultRecord | None
    stale: bool = False
    """Whether a result was published whose object is gone, or was replaced or altered."""
    altered: bool = False
    """Whether the object has the published version, but another header than the published one."""
