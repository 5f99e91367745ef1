"""A reply is read once, into checked values; any error while it is read is the fault of its node alone.

Numbers are bounded before anything is computed from them, and a message about a reply is one line of bounded length.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from gradsharding.arithmetic.weights import check_weight
from gradsharding.errors import GradShardingError, InvalidUpdate, InvalidWeight, quoted
from gradsharding.format.layout import Layout
from gradsharding_flower.permits import Offered, find_offer, most_bytes
from gradsharding_flower.reference import Reference, find_reference

MetricShapes = tuple[str, tuple[tuple[str, int | None], ...]]
"""The name of a reply's MetricRecord, and each of its metrics, with its length if it is a list."""

SHOWN_LETTERS = 80
"""The most letters of a node's value that a message shows."""

LINE_LETTERS = 500
"""Letters of a message about a node."""

MAX_OTHER_BYTES = 4 << 20
"""The most bytes of metrics and settings in a reply, besides its arrays."""

ENTRY_BYTES = 50
"""The least bytes that a tensor takes in a header, besides its name."""


class Bounds(NamedTuple):
    """The most bytes that a reply may hold, which depend on the model that was sent."""

    header: int
    """Of an update's header, and of a receipt: a few times the model's header."""
    data: int
    """Of an update's arrays."""

    @classmethod
    def of(cls, layout: Layout) -> "Bounds":
        """Derive the bounds from the model's layout."""
        return cls(header=4 * len(layout.header()) + (64 << 10), data=most_bytes(layout.nbytes))


class TrainingReply(NamedTuple):
    """A checked reply to training."""

    weight: float
    metrics: MetricShapes
    content: RecordDict
    """Its records, with an empty one in place of its arrays."""
    update: Reference | Offered | ArrayRecord


def one_line(text: str, most: int = LINE_LETTERS) -> str:
    """Cut a text to one line of about ``most`` letters, and escape the control characters in it."""
    cut = text if len(text) <= most else f"{text[:most]} … ({len(text)} letters)"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut)


@contextmanager
def blaming() -> Iterator[None]:
    """Turn any error while a node's reply is read into InvalidUpdate, as it is the node's fault."""
    try:
        yield
    except GradShardingError as error:
        error.message = one_line(error.message)
        raise
    except Exception as error:  # noqa: BLE001 - numpy, pydantic and Python itself raise errors of many kinds
        raise InvalidUpdate(f"its reply cannot be read ({type(error).__name__}); use the same version of Flower on all nodes") from None


def content_bytes(content: RecordDict) -> int:
    """Count bytes as Flower does; a record that Flower fails to count, such as one with an empty text, counts 0."""
    total = 0
    for record in content.values():
        try:
            total += record.count_bytes()
        except (ValueError, IndexError):
            continue
    return total


def read_training(reply: Message, weighted_by_key: str, bounds: Bounds) -> TrainingReply:
    """Read a reply to training; raise InvalidUpdate or InvalidWeight, with the reason, if it is malformed."""
    with blaming():
        content = _content(reply)
        arrays = [(key, record) for key, record in content.items() if isinstance(record, ArrayRecord)]
        weight, shapes = _metrics(content, weighted_by_key, len(arrays))
        ((key, record),) = arrays
        update = _update(record, bounds)
        small = {name: ArrayRecord() if name == key else other for name, other in content.items()}
        return TrainingReply(weight, shapes, RecordDict(small), update)


def read_evaluation(reply: Message, weighted_by_key: str) -> tuple[MetricShapes, RecordDict]:
    """Read a reply to evaluation: the shapes of its metrics, and its records without arrays; raise InvalidUpdate or InvalidWeight."""
    with blaming():
        content = _content(reply)
        _, shapes = _metrics(content, weighted_by_key, None)
        return shapes, RecordDict({name: record for name, record in content.items() if not isinstance(record, ArrayRecord)})


def most_common(replies: Iterable[MetricShapes]) -> MetricShapes | None:
    """Find the most common metrics, in a tie the first by name; None if there are no replies."""
    counts = Counter(replies)
    return min(counts, key=lambda shapes: (-counts[shapes], _sortable(shapes)), default=None)


def uncommon(shapes: MetricShapes, usual: MetricShapes) -> str:
    """Say how a reply's metrics differ from the usual ones, with which they cannot be averaged."""
    return one_line(f"its metrics are {_names(shapes, usual)}, while most replies have {_names(usual, shapes)}")


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        raise InvalidUpdate(f"it answered with an error: {one_line(str(reply.error.reason))}")
    if not reply.has_content():
        raise InvalidUpdate("its reply holds neither records nor an error; use the same version of Flower on all nodes")
    content = reply.content
    nbytes = content_bytes(RecordDict({key: record for key, record in content.items() if not isinstance(record, ArrayRecord)}))
    if nbytes > MAX_OTHER_BYTES:
        raise InvalidUpdate(f"its reply holds {nbytes} bytes besides arrays; at most {MAX_OTHER_BYTES} are accepted: send arrays as arrays")
    return content


def _metrics(content: RecordDict, weighted_by_key: str, arrays: int | None) -> tuple[float, MetricShapes]:
    """Read the weight, and the shapes of the metrics; ``arrays`` is the number of ArrayRecords if there must be one."""
    records = [(key, record) for key, record in content.items() if isinstance(record, MetricRecord)]
    if len(records) != 1 or arrays not in (None, 1):
        have = f"{len(records)} MetricRecords" if arrays is None else f"{arrays} ArrayRecords and {len(records)} MetricRecords"
        raise InvalidUpdate(f"its reply has {have}; send one{'' if arrays is None else ' of each'}")
    ((key, metrics),) = records
    weight = metrics.get(weighted_by_key)
    if type(weight) not in (int, float):
        raise InvalidWeight(f"its metric {weighted_by_key!r} is {quoted(weight)}; send a number")
    for name, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number.bit_length() > 64 for number in values):
            raise InvalidUpdate(f"its metric {quoted(name)} is {quoted(value)}; send a number of at most 64 bits")
    shapes = sorted((name, len(value) if isinstance(value, list) else None) for name, value in metrics.items())
    return _weight(weight), (key, tuple(shapes))


def _weight(weight: Any) -> float:
    try:
        return check_weight(weight, "it")
    except InvalidWeight:
        raise InvalidWeight(f"it has weight {quoted(weight)}; use a positive number up to 2**53, such as its number of examples") from None


def _update(record: ArrayRecord, bounds: Bounds) -> Reference | Offered | ArrayRecord:
    """Read an update: a receipt, an offer, or the arrays themselves, whose number and bytes are bounded."""
    data, header = sum(len(array.data) for array in record.values()), sum(ENTRY_BYTES + len(name) for name in record)
    if header > bounds.header:
        raise InvalidUpdate(f"its {len(record)} tensors need a header of {header} bytes; at most {bounds.header} are accepted")
    if data > bounds.data:
        raise InvalidUpdate(f"its arrays take {data} bytes; at most {bounds.data} are accepted for this model")
    return find_reference(record, bounds.header) or find_offer(record, bounds.header) or record


def _sortable(shapes: MetricShapes) -> tuple[str, list[tuple[str, int]]]:
    key, metrics = shapes
    return key, [(name, -1 if length is None else length) for name, length in metrics]


def _names(shapes: MetricShapes, other: MetricShapes) -> str:
    """Name ten metrics at most; those that ``other`` lacks come first."""
    key, metrics = shapes
    theirs = set(other[1])
    named = ", ".join(_name(metric) for metric in sorted(metrics, key=lambda metric: (metric in theirs, metric[0]))[:10])
    more = f" and {len(metrics) - 10} more" if len(metrics) > 10 else ""
    return f"{named or 'none'}{more}{'' if key == other[0] else f' in {quoted(key)}'}"


def _name(metric: tuple[str, int | None]) -> str:
    name, length = metric
    shown = name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}…"
    return shown if length is None else f"{shown}[{length}]"
