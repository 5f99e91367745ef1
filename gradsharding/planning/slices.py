"""A slice is a range of the vector that starts and ends between two elements, anywhere, also inside a tensor."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from gradsharding.errors import PlanTooLarge
from gradsharding.format.dtypes import ITEM_SIZE, Run


class Slice(NamedTuple):
    """Bytes ``start`` to ``stop`` of the data section, and the runs of elements in them."""

    start: int
    stop: int
    runs: tuple[Run, ...]


def cut(runs: Sequence[Run], count: int) -> tuple[Slice, ...]:
    """Cut the vector into ``count`` slices of nearly equal bytes that tile it; none is empty.

    Raise PlanTooLarge if there are more slices than elements.

    >>> [(s.start, s.stop) for s in cut([Run("F32", 10)], 3)]
    [(0, 12), (12, 24), (24, 40)]
    """
    vector = _Vector(runs)
    most = max(vector.elements, 1)
    if not 1 <= count <= most:
        raise PlanTooLarge(f"an update of {vector.elements} elements cannot be cut into {count} shards; use 1 to {most} shards")
    edges = [0]
    for i in range(1, count):
        wanted = vector.element_at(vector.nbytes * i // count)
        edges.append(min(max(wanted, edges[-1] + 1), vector.elements - (count - i)))
    edges.append(vector.elements)
    return tuple(vector.slice(first, last) for first, last in pairwise(edges))


class _Vector:
    """Runs with the prefix sums that turn bytes into elements and back."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._firsts = [0, *accumulate(run.length for run in runs)]
        self._bytes = [0, *accumulate(run.nbytes for run in runs)]
        self.elements, self.nbytes = self._firsts[-1], self._bytes[-1]

    def element_at(self, byte: int) -> int:
        """Index of the element that holds ``byte``."""
        i = bisect_right(self._bytes, byte) - 1
        return self._firsts[i] + (byte - self._bytes[i]) // ITEM_SIZE[self.runs[i].dtype]

    def byte_of(self, element: int) -> int:
        """First byte of an element, or the vector's end."""
        i = bisect_right(self._firsts, element) - 1
        if i == len(self.runs):
            return self.nbytes
        return self._bytes[i] + (element - self._firsts[i]) * ITEM_SIZE[self.runs[i].dtype]

    def slice(self, first: int, last: int) -> Slice:
        """Elements ``first`` to ``last``."""
        found, i = [], bisect_right(self._firsts, first) - 1
        while i < len(self.runs) and self._firsts[i] < last:
            count = min(last, self._firsts[i + 1]) - max(first, self._firsts[i])
            found.append(Run(self.runs[i].dtype, count))
            i += 1
        return Slice(self.byte_of(first), self.byte_of(last), tuple(found))
