"""Parts that are too small for S3 are composed into larger ones. Pure arithmetic: which bytes go into which part.

Every part of an S3 object but the last has at least 5 MiB (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html).
A part that might violate this is *kept* as an object of its own until the upload is completed: a small part, and one that follows
less than 5 MiB, such as a header. Whether a part is kept depends only on its own offset and size, so that writers need not know
of each other. Some servers want all parts but the last to have the same size. There every part is kept, and the object is cut again,
into pieces as small as possible, so that most pieces lie within one kept part and the server copies them by itself.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from gradsharding.errors import IncompleteUpload

MINIMUM = 5 << 20
"""Bytes that S3 requires in each part but the last."""

LARGE = 6 << 20
"""Bytes of a part that can stand alone. One MiB above the minimum, so that of slices whose sizes differ by up to a MiB each is legal."""


PIECES = 9_000
"""Pieces that an object is cut into, at most; S3 accepts 10,000."""


class Span(NamedTuple):
    """Bytes ``start`` to ``stop`` of a part that was kept."""

    number: int
    start: int
    stop: int


class Composed(NamedTuple):
    """A part for S3: its number, and the bytes that it consists of."""

    number: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return _size(self.spans)


def is_kept(offset: int, size: int) -> bool:
    """Return whether a part must be kept until the object is composed."""
    return offset < MINIMUM or size < LARGE


def compose(sizes: Mapping[int, int], kept: Collection[int]) -> list[Composed]:
    """Return the parts to compose from those that were ``kept``; ``sizes`` has all parts of the object.

    Each composed part has the number of the first part in it, so that it falls into place between the parts already written.
    Raise IncompleteUpload if fewer than 5 MiB lie between two large parts.

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
    """Cut an object, all of whose parts are kept, into pieces of equal size; the last may be smaller.

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
    """Cut a run of kept parts into groups of at least 5 MiB; a large part stays alone, except for bytes that its neighbours lack."""
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
    """Split off the bytes that the parts before ``span`` lack, if the rest can stand alone."""
    if lack and span.stop - span.start >= lack + MINIMUM:
        yield Span(span.number, 0, lack)
        yield Span(span.number, lack, span.stop)
    else:
        yield span


def _size(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def piece(nbytes: int) -> int:
    """Return the piece size for an object that is too large for one request: 64 MiB, or more if there would be too many pieces."""
    return max(64 << 20, -(-nbytes // PIECES))
