"""A record states its format; a release reads the formats that it knows, and refuses any other with the remedy."""

from typing import Any, TypeVar

from pydantic import Field, ValidationError

from gradsharding.errors import InvalidRecord, quoted
from gradsharding.value import Value


def format_field(newest: int) -> Any:
    """Define the field ``format`` of a kind of record that is written in format ``newest``, and read in every format up to that."""
    return Field(default=newest, ge=1, le=newest)


class Record(Value):
    """A small object in a store, which other processes and other releases read."""

    format: int = format_field(1)
    """Of this kind of record. Increased whenever a field of it is added or removed, or changes its meaning. The first releases left it out,
    and meant 1."""


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], data: bytes, place: str) -> R:
    """Read the record at ``place``; raise InvalidRecord, which names the place, the fault and the remedy."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        faults = {fault["loc"]: fault for fault in error.errors(include_url=False, include_context=False)}
    newest: int = kind.model_fields["format"].default
    found = faults[("format",)]["input"] if ("format",) in faults else newest
    if type(found) is int and found > newest:
        raise InvalidRecord(
            f"{place} has format {quoted(found)}, and this release of gradsharding reads formats up to "
            f"{newest}: a later release wrote it; upgrade gradsharding here",
            place=place,
        )
    where, fault = next(iter(faults.items()))
    field = f" (at {quoted('.'.join(map(str, where)))})" if where else ""
    raise InvalidRecord(
        f"{place} is not a {kind.__name__} of gradsharding: {fault['msg']:.120}{field}; something else wrote it, or it is damaged: "
        "delete it, or use another id for the round",
        place=place,
    )
