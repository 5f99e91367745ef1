"""A result is verified by computing slices of it again from the pinned updates, in Python's own numbers, and comparing bit for bit.

The rule computes them, by ``recompute``, which shares nothing with the code that made the result.
"""

import random
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

from gradsharding.arithmetic.integers import BINARY, CODES
from gradsharding.arithmetic.rules import RULES, Rule, forms
from gradsharding.errors import UserError, VerificationFailed, naming, quoted
from gradsharding.format.dtypes import ITEM_SIZE, Run
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Term
from gradsharding.rounds.records import ResultRecord
from gradsharding.rounds.round import Round
from gradsharding.stores.updates import data_digest
from gradsharding.stores.urls import locate

SLICE = 4_096
"""Elements of a slice that is computed again."""

READERS = 16
"""Updates that are read at once: most of the time is spent waiting for the store."""


class Verified(NamedTuple):
    """A result that was verified, and how much of it was computed again."""

    record: ResultRecord
    slices: int
    """Slices that were computed again."""
    of: int
    """Slices of the whole result."""
    elements: int
    """Elements that were computed again."""


def verify(round: Round, *, sample: int = 10) -> Verified:  # noqa: A002
    """Check a round's result: its header, the digest of its data, and ``sample`` slices, drawn at random; all, if there are fewer.

    Raise VerificationFailed if the header, the digest or a bit differs, which names the first such element; UserError if the round has no
    result, or its rule does not vouch for the bits; MissingObject or ChangedObject if an update is missing or was written again.
    """
    record, manifest = _published(round)
    found = data_digest(record.source, round.store, version=record.version, layout=record.layout)
    if found != record.digest:
        raise VerificationFailed(f"round {round.id}: the result's data have SHA-256 {found}, and {record.digest} was published")
    base, counts = len(record.layout.header()), _counts(manifest.layout.runs)
    chosen = [*_chosen(manifest.layout.runs, counts, sample)]
    with ThreadPoolExecutor(READERS) as readers:
        for start, run in chosen:
            published = _elements(run.dtype, _read(record.source, record.version, base + start, run, round))
            _compare(start, run, published, manifest, record.rule, round, readers)
    return Verified(record, len(chosen), counts[-1], sum(run.length for _, run in chosen))


def _published(round_: Round) -> tuple[ResultRecord, Manifest]:
    """Return a round's result and manifest; raise UserError or VerificationFailed if it cannot be verified."""
    (record, _, altered), manifest = round_.published(), round_.sealed()
    if altered:
        raise VerificationFailed(
            f"round {round_.id}: the result's header is not the one that was published: "
            "names, dtypes or shapes of its tensors were altered; aggregate again, into another place"
        )
    if not record or not manifest:
        raise UserError(
            f"round {round_.id} has no result in {round_.store.url}, or it was replaced since; aggregate it first{_others(round_)}"
        )
    if not (record.rule.vouches and record.digest):
        raise UserError(
            f"round {round_.id} was made by the rule {record.rule}, whose last bits depend on the path, so that they cannot be verified: "
            f"aggregate with the rule {forms(kind for kind in RULES if kind.vouches)}"
        )
    if (record.clients, record.layout) != (tuple(term.client for term in manifest.terms), manifest.layout):
        raise VerificationFailed(f"round {round_.id}: the result was not published for the clients and tensors that are sealed")
    return record, manifest


def _counts(runs: Sequence[Run]) -> list[int]:
    """Count the slices of the vector, each of one dtype: return their number before each run, and the total."""
    return [*accumulate((-(-run.length // SLICE) for run in runs), initial=0)]


def _chosen(runs: Sequence[Run], counts: list[int], sample: int) -> Iterator[tuple[int, Run]]:
    """Draw distinct slices; yield the first byte of each, and its elements as a run, in order."""
    begins = [*accumulate((run.nbytes for run in runs), initial=0)]
    for number in sorted(random.SystemRandom().sample(range(counts[-1]), min(sample, counts[-1]))):
        i = bisect_right(counts, number) - 1
        first = (number - counts[i]) * SLICE
        yield begins[i] + first * ITEM_SIZE[runs[i].dtype], Run(runs[i].dtype, min(SLICE, runs[i].length - first))


def _others(round_: Round) -> str:
    """Return a sentence that names some rounds with a result; "" if there are none."""
    keys = [key.split("/") for key, _ in round_.store.list("rounds/") if key.endswith("/result.json")]
    names = sorted(key[1] for key in keys if len(key) == 3)
    return f". Rounds that are done: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else ""


def _compare(
    start: int, run: Run, published: Iterable[int], manifest: Manifest, rule: Rule, round_: Round, readers: ThreadPoolExecutor
) -> None:
    """Compute the elements of ``run``, which begins at byte ``start`` of the vector, again, and compare them with those ``published``."""

    def read(term: Term) -> bytes:
        with naming(term.client):
            return _read(term.source, term.version, term.base + start, run, round_)

    columns = [_elements(run.dtype, data) for data in readers.map(read, manifest.terms)]
    expected = rule.recompute(run.dtype, columns, [term.weight for term in manifest.terms])
    for i, (wanted, got) in enumerate(zip(expected, published, strict=True)):
        if wanted != got:
            raise VerificationFailed(
                f"round {round_.id}: {_place(manifest.layout, start + i * ITEM_SIZE[run.dtype])} is {_shown(run.dtype, got)}, "
                f"but its updates give {_shown(run.dtype, wanted)}"
            )


def _read(source: str, version: str | None, start: int, run: Run, round_: Round) -> bytes:
    store, key = locate(source, round_.store)
    data = b"".join(bytes(chunk) for chunk in store.get(key, start, start + run.nbytes, version=version))
    if len(data) != run.nbytes:
        raise UserError(f"{source} ended early, {len(data)} of {run.nbytes} bytes from byte {start} on were read; it was cut short")
    return data


def _elements(dtype: str, data: bytes) -> Iterator[int]:
    """Decode elements lazily, so that only the bytes of many clients are in memory."""
    return (element for (element,) in struct.iter_unpack(f"<{CODES[dtype]}", data))


def _place(layout: Layout, byte: int) -> str:
    tensor, index = layout.locate(byte)
    return f"{quoted(tensor.name)}{quoted(index)}"


def _shown(dtype: str, element: int) -> str:
    return f"{element:#0{2 + 2 * ITEM_SIZE[dtype]}x} (the bits of a {dtype})" if dtype in BINARY else str(element)
