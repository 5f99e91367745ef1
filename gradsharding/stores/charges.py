"""The number of requests that each verb of a store makes, so that a plan can count them beforehand. Pure arithmetic.

A directory makes one request for each verb. S3 lists in pages, and needs more requests to complete an object from parts that it would
not accept as they are (``compose``).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate

from gradsharding.stores.compose import MINIMUM, Composed, compose, compose_equal, is_kept, piece
from gradsharding.usage import Usage
from gradsharding.value import Value


class Charges(Value):
    """The requests of a store's verbs, at most; the fields state how the store differs from one that makes one request for each verb.

    >>> Charges(kind="s3", page=1000).list(2001).puts, Charges().list(2001).puts
    (3, 1)
    """

    kind: str = "file"
    """Scheme of the store's URLs."""
    page: int = 0
    """Keys or parts that one request lists; 0 means all of them."""
    largest: int = 0
    """Bytes that one request can write; 0 means any number."""
    composes: bool = False
    """Small parts are kept as objects until the upload is completed, which joins them."""
    equal: bool = False
    """All parts are kept so, and cut into pieces of equal size."""
    doubted: bool = False
    """Whether the store refuses to create an object that exists is unknown: a round tests it when it begins."""

    def list(self, keys: int) -> Usage:
        """Return what listing ``keys`` keys or parts takes."""
        return Usage(puts=max(1, -(-keys // self.page)) if self.page else 1)

    def put(self, nbytes: int) -> Usage:
        """Return what creating an object of ``nbytes`` takes."""
        if not self.largest or nbytes <= self.largest:
            return Usage(puts=1, bytes_written=nbytes)
        count = -(-nbytes // piece(nbytes))
        return Usage(puts=1 + count, bytes_written=nbytes) + self.whole(count)

    def first(self, nbytes: int) -> Usage:
        """Return what creating the first object of a round takes; in a doubted store, it is created a second time as a test."""
        return self.put(nbytes) + (self.put(nbytes) if self.doubted else Usage())

    def keeps(self, offset: int, size: int) -> bool:
        """Return whether a part is kept as an object until the upload is completed."""
        return self.composes and (self.equal or is_kept(offset, size))

    def composed(self, sizes: Mapping[int, int], kept: Collection[int]) -> Sequence[Composed]:
        """Return the parts to compose from those that were ``kept``; raise IncompleteUpload as ``compose`` does."""
        return compose_equal(sizes) if self.equal and kept else compose(sizes, kept)

    def put_parts(self, parts: Iterable[tuple[int, int]]) -> Usage:
        """Return what writing parts takes, given as (offset, bytes); before a part is kept, one request checks that its upload exists."""
        puts = nbytes = 0
        for offset, size in parts:
            puts += 2 if self.keeps(offset, size) else 1
            nbytes += size
        return Usage(puts=puts, bytes_written=nbytes)

    def parts(self, sizes: Mapping[int, int]) -> Usage:
        """Return what listing the parts of an upload takes, given their sizes by number."""
        if not self.composes:
            return Usage(puts=1)
        kept = self._kept(sizes)
        return self.list(len(sizes) - len(kept)) + self.list(len(kept))

    def complete(self, sizes: Mapping[int, int], *, overwrite: bool) -> Usage:
        """Return what completing an upload takes, given the sizes of its parts by number."""
        if not self.composes:
            return Usage(puts=1)
        kept = self._kept(sizes)
        return self._complete(len(sizes) - len(kept), self.composed(sizes, kept), len(kept), overwrite=overwrite)

    def whole(self, count: int) -> Usage:
        """Return what completing a new object of ``count`` parts takes, none of which must be composed."""
        return self._complete(count, (), 0, overwrite=False) if self.composes else Usage(puts=1)

    def _kept(self, sizes: Mapping[int, int]) -> tuple[int, ...]:
        numbers = sorted(sizes)
        offsets = accumulate((sizes[number] for number in numbers), initial=0)
        return tuple(number for number, offset in zip(numbers, offsets, strict=False) if self.keeps(offset, sizes[number]))

    def _complete(self, written: int, composed: Sequence[Composed], kept: int, *, overwrite: bool) -> Usage:
        # list the parts, HEAD the key, compose parts, list all again, complete; HEAD once more if the answer has no version
        taken = self.list(written) + self.list(kept) + self.list(written + len(composed)) + Usage(puts=1, gets=1 if overwrite else 2)
        for part in composed:
            copied = len(part.spans) == 1 and part.nbytes >= MINIMUM
            through_here = 0 if copied else part.nbytes
            gets = 0 if copied else sum(span.stop > span.start for span in part.spans)
            taken += Usage(puts=1, gets=gets, bytes_read=through_here, bytes_written=through_here)
        return taken


ONE_EACH = Charges()
"""One request for each verb."""
