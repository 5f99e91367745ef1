"""What the caller of a round asks of its stores beside the tasks: each step of ``aggregate``, and what it takes at most."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from pydantic import Field

from gradsharding.planning.platform import PARALLEL
from gradsharding.stores.charges import ONE_EACH, Charges
from gradsharding.stores.reading import STREAM, Reading
from gradsharding.usage import Spent, Usage, together
from gradsharding.value import Value

HEADER_PART = 1
"""The result's first part is its header, written by the caller; the slices follow."""


FIRST = "round.json"
"""Name of the record by which a round begins."""

RECORDS = 4
"""Records that a round leaves: of itself, its seal, its plan and its result."""

READERS = 16
"""Headers, or small records, that are read at once: most of the time goes in waiting for the store."""


class Setting(Value):
    """Where a round's objects lie, and in what state its caller finds it."""

    home: Charges = ONE_EACH
    """Of the store of the round's records and partial sums."""
    output: Charges = ONE_EACH
    """Of the store of the result."""
    sources: dict[str, int] = Field(default_factory=dict)
    """How many updates lie in each kind of store, where that is known; else it is seen from their references."""
    intake: dict[str, Usage] = Field(default_factory=dict)
    """What it takes until the round is sealed, by kind of store."""
    record_bytes: int = 0
    """Bytes that bound any one record: those of the manifest."""
    overwrite: bool = False
    """Whether the result may replace an object, so that none needs to be looked for."""
    resumed: bool = False
    """Whether an earlier call began the round, and its upload is there."""
    lost: bool = False
    """Whether an earlier call began the round, and its upload is gone."""
    dropped: int = 0
    """Tasks of another plan that an earlier call began, and that is given up."""
    published: bool = False
    """Whether a result was published before; its object is looked for."""
    reading: Reading = STREAM
    """How the store of the result is read, for its digest."""
    concurrency: int | None = None
    """Functions that may run at once, where something bounds them."""
    digest: bool = False
    """Whether the result is read once for its digest."""


class Step(NamedTuple):
    """What one step takes, of one kind of store."""

    name: str
    kind: str
    usage: Usage
    at_once: int = 1
    """Requests under way at the same time."""


def commanded(headers: Spent, home: Charges, record: int, *, found: Collection[str] = (), emptied: bool = False) -> dict[str, Usage]:
    """What a command asks around its round: the updates' headers, and the round's first two records.

    Those that are ``found``, by name, were there already, and were read; ``emptied`` says that the command empties a store of its own
    in the end.
    """
    first = home.put(record) if FIRST in found else home.first(record)
    records = first + Usage(puts=1, gets=len(found), bytes_read=len(found) * record, bytes_written=record)
    return together(headers, {home.kind: records + home.list(RECORDS) if emptied else records})


def steps(setting: Setting, parts: Mapping[int, int], partials: int) -> Iterator[Step]:
    """Give the steps of a caller whose result has ``parts`` (bytes by number), and whose tasks leave ``partials`` objects at home."""
    home, output, record = setting.home, setting.output, setting.record_bytes
    for kind, usage in setting.intake.items():
        yield Step("the updates, and the round's seal", kind, usage, READERS)
    found = 2 * record if setting.resumed or setting.lost or setting.dropped or setting.published else 0
    yield Step("is there a result, or a plan?", home.kind, Usage(gets=2, bytes_read=found))
    if setting.published:
        yield Step("is it there?", output.kind, Usage(gets=1))
    if setting.dropped:
        yield Step("another plan is given up", home.kind, Usage(gets=1, bytes_read=record) + home.list(setting.dropped))
        yield Step("and its upload", output.kind, output.list(setting.dropped + 1))
    if setting.lost:
        yield Step("an upload is gone", output.kind, Usage(gets=1, puts=1))
        yield Step("and its plan is given up", home.kind, Usage(gets=1, bytes_read=record) + home.list(partials))
    if setting.resumed:
        yield Step("which parts have arrived?", output.kind, output.parts(parts))
        if partials:
            yield Step("which partial sums are there?", home.kind, home.list(partials))
    else:
        if not setting.overwrite:
            yield Step("is the result's place free?", output.kind, Usage(gets=1))
        yield Step("the upload's begin", output.kind, Usage(puts=1))
        yield Step("the plan's record", home.kind, home.put(record))
    yield Step("the header", output.kind, output.put_parts([(0, parts[HEADER_PART])]))
    yield Step("the result's publication", output.kind, output.complete(parts, overwrite=setting.overwrite), PARALLEL)
    if setting.digest:
        nbytes = sum(parts.values()) - parts[HEADER_PART]
        yield Step("the digest", output.kind, Usage(gets=setting.reading.requests(nbytes), bytes_read=nbytes), setting.reading.parallel)
    yield Step("the result's record", home.kind, home.put(record))
