"""How many requests each verb of a store is, so that a plan knows them before they are made. Pure arithmetic.

A directory or a memory takes one for each. S3 lists by pages, and takes more where an object is made of parts that it would not take
as they are (``compose``).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate

from gradsharding.stores.compose import MINIMUM, Composed, compose, compose_equal, is_kept, piece
from gradsharding.usage import Usage
from gradsharding.value import Value


class Charges(Value):
    """What a store's verbs take, at most; the numbers say in what the store differs from one that takes one request for each.

    >>> Charges(kind="s3", page=1000).list(2001).puts, Charges().list(2001).puts
    (3, 1)
    """

    kind: str = "file"
    """Scheme of its URLs."""
    page: int = 0
    """Keys, or parts, that one request lists; 0 for all."""
    largest: int = 0
    """Bytes that one request writes, at most; 0 for any number."""
    composes: bool = False
    """Small parts wait as objects until the upload is completed, which joins them."""
    equal: bool = False
    """All parts wait so, and are cut into pieces of one size."""
    doubted: bool = False
    """Nobody knows whether it refuses to create what is there, so that whoever begins a round sees to it."""

    def list(self, keys: int) -> Usage:
        """Listing so many keys or parts."""
        return Usage(puts=max(1, -(-keys // self.page)) if self.page else 1)

    def put(self, nbytes: int) -> Usage:
        """Creating an object."""
        if not self.largest or nbytes <= self.largest:
            return Usage(puts=1, bytes_written=nbytes)
        count = -(-nbytes // piece(nbytes))
        return Usage(puts=1 + count, bytes_written=nbytes) + self.whole(count)

    def first(self, nbytes: int) -> Usage:
        """Creating the first object of a round; of a store that is doubted, it is tried to create it again."""
        return self.put(nbytes) + (self.put(nbytes) if self.doubted else Usage())

    def keeps(self, offset: int, size: int) -> bool:
        """Whether a part waits as an object until the upload is completed."""
        return self.composes and (self.equal or is_kept(offset, size))

    def composed(self, sizes: Mapping[int, int], kept: Collection[int]) -> Sequence[Composed]:
        """Give the parts to make of those that were ``kept``; raise IncompleteUpload as ``compose`` does."""
        return compose_equal(sizes) if self.equal and kept else compose(sizes, kept)

    def put_parts(self, parts: Iterable[tuple[int, int]]) -> Usage:
        """Writing parts, given as (offset, bytes); before one is kept, S3 is asked whether its upload is there."""
        puts = nbytes = 0
        for offset, size in parts:
            puts += 2 if self.keeps(offset, size) else 1
            nbytes += size
        return Usage(puts=puts, bytes_written=nbytes)

    def parts(self, sizes: Mapping[int, int]) -> Usage:
        """Telling which parts have arrived, of these by number."""
        if not self.composes:
            return Usage(puts=1)
        kept = self._kept(sizes)
        return self.list(len(sizes) - len(kept)) + self.list(len(kept))

    def complete(self, sizes: Mapping[int, int], *, overwrite: bool) -> Usage:
        """Publishing the object that parts of these bytes, by number, make end to end."""
        if not self.composes:
            return Usage(puts=1)
        kept = self._kept(sizes)
        return self._complete(len(sizes) - len(kept), self.composed(sizes, kept), len(kept), overwrite=overwrite)

    def whole(self, count: int) -> Usage:
        """Publishing, as a new object, so many parts that the store takes as they are."""
        return self._complete(count, (), 0, overwrite=False) if self.composes else Usage(puts=1)

    def _kept(self, sizes: Mapping[int, int]) -> tuple[int, ...]:
        numbers = sorted(sizes)
        offsets = accumulate((sizes[number] for number in numbers), initial=0)
        return tuple(number for number, offset in zip(numbers, offsets, strict=False) if self.keeps(offset, sizes[number]))

    def _complete(self, written: int, composed: Sequence[Composed], kept: int, *, overwrite: bool) -> Usage:
        # parts listed, the key looked at, parts composed, all listed again, completed; a server may not tell the version: then it is asked
        taken = self.list(written) + self.list(kept) + self.list(written + len(composed)) + Usage(puts=1, gets=1 if overwrite else 2)
        for part in composed:
            copied = len(part.spans) == 1 and part.nbytes >= MINIMUM
            through_here = 0 if copied else part.nbytes
            gets = 0 if copied else sum(span.stop > span.start for span in part.spans)
            taken += Usage(puts=1, gets=gets, bytes_read=through_here, bytes_written=through_here)
        return taken


ONE_EACH = Charges()
"""One request for each verb."""
