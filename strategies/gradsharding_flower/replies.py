"""What a node sends is read here, once, into checked values; whatever else goes wrong in the reading is that node's fault alone.

Numbers are bounded before anything is computed from them, and what is said of a reply is one line of bounded length.
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
from gradsharding_flower.reference import Reference, find

Kinds = tuple[str, tuple[tuple[str, int | None], ...]]
"""The name of a reply's MetricRecord, and each of its metrics, with its length if it is a list."""

SHOWN = 80
"""Letters of a value of a node's that are shown."""

LINE = 500
"""Letters of what is said of a node."""

BESIDE = 4 << 20
"""Bytes of metrics and settings that a reply may hold beside its arrays."""

ENTRY = 50
"""Bytes that a tensor takes in a header beside its name, at least."""


class Most(NamedTuple):
    """What a reply may hold, in bytes, by the model that was sent."""

    header: int
    """Of an update's header, and of a receipt: a few times that of the model."""
    data: int
    """Of an update."""

    @classmethod
    def of(cls, layout: Layout) -> "Most":
        """Reckon it from the model's tensors."""
        return cls(header=4 * len(layout.header()) + (64 << 10), data=most_bytes(layout.nbytes))


class Said(NamedTuple):
    """A reply to training that was read: what it adds, beside the records that are no arrays."""

    weight: float
    kinds: Kinds
    content: RecordDict
    """Its records; an empty one in the place of its arrays."""
    update: Reference | Offered | ArrayRecord


def line(text: str, most: int = LINE) -> str:
    """Give a text as one line of ``most`` letters or a few more, without characters that a terminal or a log would obey."""
    cut = text if len(text) <= most else f"{text[:most]} … ({len(text)} letters)"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut)


@contextmanager
def blaming() -> Iterator[None]:
    """Raise InvalidUpdate for whatever goes wrong within, where a node's reply is read: it is that node's fault."""
    try:
        yield
    except GradShardingError as error:
        error.message = line(error.message)
        raise
    except Exception as error:  # noqa: BLE001 - numpy, pydantic and Python itself raise many kinds for what they cannot take
        raise InvalidUpdate(f"its reply cannot be read ({type(error).__name__}); use the same Flower on all nodes") from None


def size_of(content: RecordDict) -> int:
    """Count bytes as Flower does; a record that Flower cannot count, such as one with an empty text, has none."""
    total = 0
    for record in content.values():
        try:
            total += record.count_bytes()
        except (ValueError, IndexError):
            continue
    return total


def read_training(reply: Message, weighted_by_key: str, most: Most) -> Said:
    """Read a reply to training; raise InvalidUpdate or InvalidWeight, which say why it is none."""
    with blaming():
        content = _content(reply)
        arrays = [(key, record) for key, record in content.items() if isinstance(record, ArrayRecord)]
        weight, kinds = _metrics(content, weighted_by_key, len(arrays))
        ((key, record),) = arrays
        update = _update(record, most)
        small = {name: ArrayRecord() if name == key else other for name, other in content.items()}
        return Said(weight, kinds, RecordDict(small), update)


def read_evaluation(reply: Message, weighted_by_key: str) -> tuple[Kinds, RecordDict]:
    """Read a reply to evaluation: its metrics' kinds, and its records without arrays; raise InvalidUpdate or InvalidWeight."""
    with blaming():
        content = _content(reply)
        _, kinds = _metrics(content, weighted_by_key, None)
        return kinds, RecordDict({name: record for name, record in content.items() if not isinstance(record, ArrayRecord)})


def common(kinds: Iterable[Kinds]) -> Kinds | None:
    """Give the most common metrics, of equally common ones the first in order of their names; None if there are none."""
    counts = Counter(kinds)
    return min(counts, key=lambda one: (-counts[one], _sortable(one)), default=None)


def others(kinds: Kinds, due: Kinds) -> str:
    """Say that a reply's metrics are not those of most replies: they could not be averaged with them."""
    return line(f"its metrics are {_names(kinds, due)}, where {_names(due, kinds)} are common")


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        raise InvalidUpdate(f"it answered with an error: {line(str(reply.error.reason))}")
    if not reply.has_content():
        raise InvalidUpdate("its reply holds neither records nor an error; use the same Flower on all nodes")
    content = reply.content
    beside = size_of(RecordDict({key: record for key, record in content.items() if not isinstance(record, ArrayRecord)}))
    if beside > BESIDE:
        raise InvalidUpdate(f"its reply holds {beside} bytes of metrics and settings, where {BESIDE} may be; send arrays as arrays")
    return content


def _metrics(content: RecordDict, weighted_by_key: str, arrays: int | None) -> tuple[float, Kinds]:
    """Read the weight, and the kinds of the metrics; ``arrays`` is the number of ArrayRecords, where one is due."""
    found = [(key, record) for key, record in content.items() if isinstance(record, MetricRecord)]
    if len(found) != 1 or arrays not in (None, 1):
        have = f"{len(found)} MetricRecords" if arrays is None else f"{arrays} ArrayRecords and {len(found)} MetricRecords"
        raise InvalidUpdate(f"its reply has {have}, where one{'' if arrays is None else ' of each'} is due")
    ((key, metrics),) = found
    weight = metrics.get(weighted_by_key)
    if type(weight) not in (int, float):
        raise InvalidWeight(f"its metrics say {weighted_by_key!r} is {quoted(weight)}, where a number is due")
    for name, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, int) and one.bit_length() > 64 for one in values):
            raise InvalidUpdate(f"its metric {quoted(name)} is {quoted(value)}, where 64 bits are due")
    kinds = sorted((name, len(value) if isinstance(value, list) else None) for name, value in metrics.items())
    return _weight(weight), (key, tuple(kinds))


def _weight(weight: Any) -> float:
    try:
        return check_weight(weight, "it")
    except InvalidWeight:
        raise InvalidWeight(f"it has weight {quoted(weight)}; use a positive number up to 2**53, such as its number of examples") from None


def _update(record: ArrayRecord, most: Most) -> Reference | Offered | ArrayRecord:
    """Read what stands for an update: a receipt, an offer, or the arrays themselves, whose number and bytes are bounded."""
    data, header = sum(len(array.data) for array in record.values()), sum(ENTRY + len(name) for name in record)
    if header > most.header:
        raise InvalidUpdate(f"it names {len(record)} tensors in {header} bytes, where {most.header} are a few times what the model takes")
    if data > most.data:
        raise InvalidUpdate(f"its arrays take {data} bytes, where {most.data} are permitted for this model")
    return find(record, most.header) or find_offer(record, most.header) or record


def _sortable(kinds: Kinds) -> tuple[str, list[tuple[str, int]]]:
    key, metrics = kinds
    return key, [(name, -1 if length is None else length) for name, length in metrics]


def _names(kinds: Kinds, beside: Kinds) -> str:
    """Name metrics: those that ``beside`` does not have too come first, as there may be many."""
    key, metrics = kinds
    theirs = set(beside[1])
    named = ", ".join(_name(one) for one in sorted(metrics, key=lambda one: (one in theirs, one[0]))[:10])
    more = f" and {len(metrics) - 10} more" if len(metrics) > 10 else ""
    return f"{named or 'none'}{more}{'' if key == beside[0] else f' in {quoted(key)}'}"


def _name(metric: tuple[str, int | None]) -> str:
    name, length = metric
    shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
    return shown if length is None else f"{shown}[{length}]"
