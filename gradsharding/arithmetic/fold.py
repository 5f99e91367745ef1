"""The fold: each input of a slice goes through the accumulators of a rule, as bytes that may be cut anywhere. This module does no I/O.

The result does not depend on where the vector or the stream of its bytes is cut. Whether it depends on the order of the inputs is the
rule's business.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gradsharding.arithmetic.accumulator import BLOCK, MergeableAccumulator
from gradsharding.arithmetic.rules import MEAN, Cohort, Rule
from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY, Array, Buffer, Run, is_float, widen

SCRATCH = 4 << 20
"""Bytes that bound a fold's temporaries: a handful of blocks."""

RUN_SIZE = 512
"""Bytes that bound an accumulator's bookkeeping; the scratch has room for that of the first 2,048 runs."""


def memory(runs: Iterable[Run], cohort: Cohort, rule: Rule = MEAN) -> int:
    """Bytes of memory that a fold takes at most, temporaries included."""
    sizes = [rule.size(run, cohort).memory for run in runs]
    return SCRATCH + RUN_SIZE * max(0, len(sizes) - 2_048) + sum(sizes)


class Fold:
    """One slice of all inputs, becoming one.

    >>> fold = Fold([Run("F32", 2)], Cohort(clients=2, weight=4))
    >>> fold.add([np.float32([1, 2]).tobytes()], 1)
    >>> fold.add([np.float32([5, 6]).tobytes()], 3)
    >>> np.frombuffer(fold.finalize(), np.float32).tolist()
    [4.0, 5.0]
    """

    def __init__(self, runs: Sequence[Run], cohort: Cohort, rule: Rule = MEAN) -> None:
        """Start the accumulators of ``runs``; ``cohort`` is the whole round's, also if others fold a part of it.

        Raise UserError if the rule cannot be computed in this thread.
        """
        self._runs = tuple(runs)
        places = [rule.size(run, cohort).place for run in self._runs]
        self._arena, scratch = np.zeros(sum(places), np.uint8), np.empty((3, BLOCK))
        ends = np.cumsum(places)
        self._accumulators = [
            rule.begin(run, cohort, self._arena[end - place : end], scratch)
            for run, place, end in zip(self._runs, places, ends, strict=True)
        ]

    @property
    def finite(self) -> bool:
        """After ``finalize`` or ``serialize``: whether no float was NaN or infinite, or became so."""
        return all(accumulator.finite for accumulator in self._accumulators)

    def add(self, chunks: Iterable[Buffer], weight: int) -> None:
        """Add one client's slice, whose bytes arrive as ``chunks``; raise InvalidUpdate if there are fewer or more than the slice has."""
        with np.errstate(all="ignore"):  # ``finite`` reports what numpy would warn of
            for index, first, elements in _blocks(self._runs, chunks):
                self._accumulators[index].add(first, elements, weight)

    def merge(self, chunks: Iterable[Buffer]) -> None:
        """Add what another fold of the same runs, cohort and rule has serialized; raise InvalidUpdate if it is cut short or too long."""
        stream = _Stream(chunks)
        with np.errstate(all="ignore"):
            for accumulator in self._mergeable():
                accumulator.merge(stream.read)
        stream.end()

    def serialize(self) -> list[Buffer]:
        """Return the state of all accumulators, run by run. Consumes the fold: the bytes lie in its own memory where they can."""
        return [buffer for accumulator in self._mergeable() for buffer in accumulator.serialize()]

    def finalize(self) -> memoryview:
        """Compute the result and return the slice's bytes in its own dtypes. Consumes the fold.

        The result is packed into the front of the accumulators' own memory, so that no second slice is ever held.
        """
        end = 0
        with np.errstate(all="ignore"):
            for accumulator in self._accumulators:
                for block in accumulator.finalize():
                    self._arena[end : end + block.nbytes] = block.view(np.uint8)
                    end += block.nbytes
        return self._arena[:end].data

    def _mergeable(self) -> Iterator[MergeableAccumulator]:
        """Yield the accumulators of a rule that merges: a plan has no tree for any other."""
        for accumulator in self._accumulators:
            if not isinstance(accumulator, MergeableAccumulator):
                raise TypeError(f"{type(accumulator).__name__} cannot be merged")
            yield accumulator


def first_beyond(runs: Sequence[Run], chunks: Iterable[Buffer], most: float = math.inf) -> int | None:
    """Find the first float of a slice that is NaN, infinite, or larger in magnitude than ``most``: its offset in bytes, or None."""
    begins = np.cumsum([0, *(run.nbytes for run in runs)])
    for index, first, elements in _blocks(runs, chunks):
        dtype = runs[index].dtype
        if is_float(dtype):
            values = widen(elements, dtype)
            bad = np.flatnonzero(~(np.isfinite(values) & (np.abs(values) <= most)))
            if bad.size:
                return int(begins[index]) + (first + int(bad[0])) * ITEM_SIZE[dtype]
    return None


def _blocks(runs: Sequence[Run], chunks: Iterable[Buffer]) -> Iterator[tuple[int, int, Array]]:
    """Yield elements as (index of run, place of the first one in it, at most ``BLOCK`` elements), wherever the chunks are cut."""
    stream = _Stream(chunks)
    for index, (dtype, length) in enumerate(runs):
        width, name = ITEM_SIZE[dtype], NUMPY[dtype]
        for first in range(0, length, BLOCK):
            yield index, first, np.frombuffer(stream.read(width * min(BLOCK, length - first)), name)
    stream.end()


class _Stream:
    """Reads an exact number of bytes at a time from chunks, each of which is valid until the next one is asked for."""

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks, self._rest, self._position = iter(chunks), memoryview(b""), 0

    def read(self, count: int) -> Buffer:
        """Return the next ``count`` bytes, without a copy where they lie in one chunk; raise InvalidUpdate if there are fewer."""
        joined = bytearray()
        while len(joined) + len(self._rest) < count:
            joined += self._rest
            chunk = next(self._chunks, None)
            if chunk is None:
                ended = self._position + len(joined)
                raise InvalidUpdate(f"a read ended after {ended} bytes, in the middle of a slice; the object was cut short")
            self._rest = memoryview(chunk).cast("B")
        missing = count - len(joined)
        last, self._rest = self._rest[:missing], self._rest[missing:]
        self._position += count
        if not joined:
            return last
        joined += last
        return joined

    def end(self) -> None:
        """Raise InvalidUpdate if there are bytes left."""
        if left := len(self._rest) or next(filter(None, (memoryview(chunk).nbytes for chunk in self._chunks)), 0):
            raise InvalidUpdate(f"a read gave at least {left} bytes more than the slice has; the server ignored the range")
