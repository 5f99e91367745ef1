"""The requests of a round's caller beside those of its tasks: each step of ``aggregate``, with its upper bound."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from pydantic import Field

from gradsharding.planning.platform import PARALLEL
from gradsharding.stores.charges import ONE_EACH, Charges
from gradsharding.stores.reading import STREAM, Reading
from gradsharding.usage import Spent, Usage, together
from gradsharding.value import Value

HEADER_PART = 1
"""Number of the part that holds the result's header. The caller writes it; the slices follow."""

FIRST = "round.json"
"""Name of a round's first record."""

RECORDS = 4
"""Records of a finished round: the round, its manifest, its plan and its result."""

READERS = 16
"""Headers or small records that are read at once; most of the time is latency."""


class Setting(Value):
    """The stores of a round, and the state in which its caller finds it."""

    home: Charges = ONE_EACH
    """Charges of the store that holds the round's records and partial sums."""
    output: Charges = ONE_EACH
    """Charges of the store that holds the result."""
    sources: dict[str, int] = Field(default_factory=dict)
    """Number of updates in each kind of store; if empty, it is taken from their references."""
    intake: dict[str, Usage] = Field(default_factory=dict)
    """Requests and bytes until the round is sealed, by kind of store."""
    record_bytes: int = 0
    """Size of the largest record, the manifest, in bytes."""
    overwrite: bool = False
    """Whether the result may replace an object; then nobody checks whether one exists."""
    resumed: bool = False
    """Whether an earlier call began the round and its upload still exists."""
    lost: bool = False
    """Whether an earlier call began the round and its upload no longer exists."""
    dropped: int = 0
    """Number of tasks in the plan of an earlier call, if this call discards that plan."""
    published: bool = False
    """Whether an earlier call published a result; then its object is looked up."""
    reading: Reading = STREAM
    """How the store of the result is read, for its digest."""
    concurrency: int | None = None
    """Functions that may run at once; None if unbounded."""
    digest: bool = False
    """Whether the caller reads the result once, for its digest."""


class Step(NamedTuple):
    """The requests and bytes of one step in one kind of store."""

    name: str
    kind: str
    usage: Usage
    at_once: int = 1
    """Requests in flight at the same time."""


def commanded(headers: Spent, home: Charges, record: int, *, found: Collection[str] = (), emptied: bool = False) -> dict[str, Usage]:
    """Requests and bytes of a command around its round: the updates' headers, and the round's first two records.

    The records named in ``found`` existed before and are read. With ``emptied``, the command empties its own store in the end.
    """
    first = home.put(record) if FIRST in found else home.first(record)
    records = first + Usage(puts=1, gets=len(found), bytes_read=len(found) * record, bytes_written=record)
    return together(headers, {home.kind: records + home.list(RECORDS) if emptied else records})


def steps(setting: Setting, parts: Mapping[int, int], partials: int) -> Iterator[Step]:
    """Yield the steps of a caller. The result has ``parts`` (bytes by number); the tasks leave ``partials`` objects in the home store."""
    home, output, record = setting.home, setting.output, setting.record_bytes
    for kind, intake in setting.intake.items():
        yield Step("read headers and seal the round", kind, intake, READERS)
    found = 2 * record if setting.resumed or setting.lost or setting.dropped or setting.published else 0
    yield Step("look for a result and a plan", home.kind, Usage(gets=2, bytes_read=found))
    if setting.published:
        yield Step("look up the published result", output.kind, Usage(gets=1))
    if setting.dropped:
        yield Step("discard another plan", home.kind, Usage(gets=1, bytes_read=record) + home.list(setting.dropped))
        yield Step("abort its upload", output.kind, output.list(setting.dropped + 1))
    if setting.lost:
        yield Step("find the upload gone", output.kind, Usage(gets=1, puts=1))
        yield Step("discard its plan", home.kind, Usage(gets=1, bytes_read=record) + home.list(partials))
    if setting.resumed:
        yield Step("list the parts that arrived", output.kind, output.parts(parts))
        if partials:
            yield Step("list the partial sums", home.kind, home.list(partials))
    else:
        if not setting.overwrite:
            yield Step("check that the output is free", output.kind, Usage(gets=1))
        yield Step("begin the upload", output.kind, Usage(puts=1))
        yield Step("record the plan", home.kind, home.put(record))
    yield Step("write the header", output.kind, output.put_parts([(0, parts[HEADER_PART])]))
    yield Step("complete the upload", output.kind, output.complete(parts, overwrite=setting.overwrite), PARALLEL)
    if setting.digest:
        nbytes = sum(parts.values()) - parts[HEADER_PART]
        usage = Usage(gets=setting.reading.requests(nbytes), bytes_read=nbytes)
        yield Step("read the result for its digest", output.kind, usage, setting.reading.parallel)
    yield Step("record the result", home.kind, home.put(record))
