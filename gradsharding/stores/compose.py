"""Parts that S3 would not take are composed into parts that it takes. Pure arithmetic: which bytes make which part.

All parts of an S3 object but its last have 5 MiB or more (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html).
A part that might break this is *kept* as an object of its own until the upload is completed: a small one, and the one that
follows what is less than 5 MiB, such as a header. Whether a part is kept depends on nothing but its own place and size, so that
writers need not know of each other. Where a server wants all parts but the last to be of one size, all are kept, and the object is cut
anew: as small as may be, so that most pieces lie within one kept part, and the server copies them by itself.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from gradsharding.errors import IncompleteUpload

MINIMUM = 5 << 20
"""Bytes that S3 wants in each part but the last."""

LARGE = 6 << 20
"""Bytes of a part that needs no others. A MiB more than the minimum: among slices alike to a MiB, one alone between large ones is legal."""


PIECES = 9_000
"""Pieces that an object is cut into at most; S3 takes 10,000."""


class Span(NamedTuple):
    """Bytes ``start`` to ``stop`` of a part that was kept."""

    number: int
    start: int
    stop: int


class Composed(NamedTuple):
    """A part for S3: its number, and the bytes it is made of."""

    number: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return _size(self.spans)


def is_kept(offset: int, size: int) -> bool:
    """Tell whether a part must be kept until the object is composed."""
    return offset < MINIMUM or size < LARGE


def compose(sizes: Mapping[int, int], kept: Collection[int]) -> list[Composed]:
    """Give the parts to make of those that were ``kept``, of all that make the object.

    Each takes the number of the first part in it, so that they fall into place between those already written.
    Raise IncompleteUpload where less than 5 MiB lie between two large parts.

    >>> [(part.number, part.nbytes) for part in compose({1: 300, 2: 8 << 20, 3: 8 << 20, 4: 9}, kept={1, 2, 4})]
    [(1, 8388908), (4, 9)]
    """
    found, held = [], frozenset(kept)
    for is_run, numbers in groupby(sorted(sizes), key=held.__contains__):
        run = [*numbers]
        if is_run:
            groups = _groups([Span(number, 0, sizes[number]) for number in run], last=run[-1] == max(sizes))
            found += [Composed(group[0].number, tuple(group)) for group in groups]
    return found


def compose_equal(sizes: Mapping[int, int]) -> list[Composed]:
    """Cut an object, all of whose parts are kept, into pieces of one size, and a last one that is no larger.

    >>> [(part.number, part.nbytes, len(part.spans)) for part in compose_equal({1: 300, 2: 8 << 20, 5: 4 << 20})]
    [(1, 5242880, 2), (2, 5242880, 2), (3, 2097452, 1)]
    """
    size = max(MINIMUM, -(-sum(sizes.values()) // PIECES))
    pieces: list[list[Span]] = [[]]
    for number in sorted(sizes):
        start = 0
        while start < sizes[number]:
            if (room := size - _size(pieces[-1])) == 0:
                pieces.append([])
                room = size
            stop = min(sizes[number], start + room)
            pieces[-1].append(Span(number, start, stop))
            start = stop
    return [Composed(number, tuple(spans)) for number, spans in enumerate(pieces, 1)]


def _groups(run: Sequence[Span], *, last: bool) -> list[list[Span]]:
    """Cut a run of kept parts into groups of 5 MiB or more; what is large stays by itself, but for what its neighbours lack."""
    groups: list[list[Span]] = []
    pending: list[Span] = []
    for span in run:
        for piece in _topped_up(span, MINIMUM - _size(pending) if pending else 0):
            pending.append(piece)
            if _size(pending) >= MINIMUM:
                groups.append(pending)
                pending = []
    if pending and (last or not groups):
        groups.append(pending)
    elif pending:
        groups[-1] += pending
    if not last and _size(groups[-1]) < MINIMUM:
        raise IncompleteUpload(
            f"parts {run[0].number} to {run[-1].number} have {_size(run)} bytes and lie between larger ones; S3 wants {MINIMUM} "
            "in each part but the last: cut the object into parts of equal size"
        )
    return groups


def _topped_up(span: Span, lack: int) -> Iterator[Span]:
    """Split off the bytes that the parts before ``span`` lack, if enough is left to stand alone."""
    if lack and span.stop - span.start >= lack + MINIMUM:
        yield Span(span.number, 0, lack)
        yield Span(span.number, lack, span.stop)
    else:
        yield span


def _size(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def piece(nbytes: int) -> int:
    """Bytes of a piece of an object that is too large for one request: 64 MiB, or more where there would be too many."""
    return max(64 << 20, -(-nbytes // PIECES))
