"""A value that crosses a trust boundary is frozen, strict and forbids what it does not know."""

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """Base of every record, task and report: immutable, compared by content, JSON both ways."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
