"""The coordinate-wise trimmed mean: of each element, the smallest and the largest values are cut, and the rest is averaged.

It withstands clients that send anything, as long as they are at most the share that is cut on each side (D. Yin, Y. Chen, K. Ramchandran,
P. Bartlett, "Byzantine-robust distributed learning", ICML 2018). Weights do not count: a client that could claim any weight could
outweigh the cut. All values of an element are held at once; so slices must be smaller than for a mean.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gradsharding.arithmetic import integers
from gradsharding.arithmetic.accumulator import Accumulator, Scratch, Size
from gradsharding.arithmetic.rules.rule import Cohort, Effort, Rule
from gradsharding.arithmetic.sums import WIDE_SIZE, divided, is_wide
from gradsharding.errors import UserError, quoted
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY, Array, Run, is_float, rounded, widen

if TYPE_CHECKING:  # functions apply rules, and read no headers
    from gradsharding.format.layout import Layout

STEP = 1 << 20
"""Bytes that are sorted at once: they stay in the second-level cache."""

FEW = 16
"""Clients whose values a network sorts faster than ``numpy.sort``, which spends 100 ns on each element's values, however few they are."""


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """The mean of what is left of each element when ``floor(share * clients)`` values are cut on each side; every client counts the same.

    Floats are summed in float64, in the order of their size; so the bits depend on the values alone. A zero is +0. A NaN is never cut:
    with ``nonfinite="propagate"``, an element of which any client has NaN becomes NaN.

    >>> TrimmedMean(0.2).cut(10), TrimmedMean(0.29).cut(100)
    (2, 29)
    """

    share: float
    """Of the clients, on each side: 0 or more, and less than 0.5."""

    name: ClassVar[str] = "trimmed-mean"
    merges: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    vouches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise UserError for a share that is no number, or leaves nothing."""
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share < 0.5:
            raise UserError(f"a trimmed mean cannot cut a share of {quoted(self.share)} on each side; use 0 or more, and less than 0.5")
        object.__setattr__(self, "share", float(self.share) + 0.0)  # one text for both zeros

    def cut(self, clients: int) -> int:
        """Values that are cut on each side; the share is taken as the decimal number that it is written as."""
        return math.floor(Fraction(str(self.share)) * clients)

    def admit(self, layout: "Layout", clients: int) -> None:  # noqa: ARG002 - every dtype can be sorted
        """Raise UserError if there are too few clients for anything to be cut."""
        if self.share and not self.cut(clients):
            raise UserError(
                f"{self} would cut nothing from {clients} client{'s' * (clients > 1)}, so it would not be robust; it needs at least "
                f"{math.ceil(1 / Fraction(str(self.share)))}; use a larger share or more clients, or {self.name}:0 for the unweighted mean"
            )

    def size(self, run: Run, cohort: Cohort) -> Size:
        """The elements of all clients, and the temporaries of one step."""
        place = -(-cohort.clients * run.nbytes // 8) * 8
        each = WIDE_SIZE + 8 if is_wide(run.dtype, cohort.clients) else 24
        return Size(place, place + each * cohort.clients * min(run.length, _step(run.dtype, cohort.clients)))

    def begin(self, run: Run, cohort: Cohort, place: Array, scratch: Scratch) -> Accumulator:  # noqa: ARG002 - it has its own temporaries
        """Start to collect values."""
        return _Values(run.dtype, self.cut(cohort.clients), place[: cohort.clients * run.nbytes].reshape(cohort.clients, run.nbytes))

    def effort(self, clients: int) -> Effort:
        """Fitted on a small machine, not taken from a committed result: sorting takes 9 units a byte and client, or 2 if they are few."""
        return Effort(add=1, finalize=(2 if clients <= FEW else 9) * clients)

    def recompute(self, dtype: str, columns: Sequence[Iterable[int]], weights: Sequence[int]) -> list[int]:
        """Sort and add again, in Python's own numbers."""
        cut, clients = self.cut(len(weights)), len(weights)
        kept = slice(cut, clients - cut)
        if not is_float(dtype):
            return [integers.nearest(sum(sorted(elements)[kept]), clients - 2 * cut) for elements in zip(*columns, strict=True)]
        means = []
        for elements in zip(*columns, strict=True):
            values, total = [integers.to_float(dtype, element) for element in elements], 0.0
            for value in [math.nan] if any(map(math.isnan, values)) else sorted(values)[kept]:
                total += value
            means.append(integers.to_bits(dtype, total / (clients - 2 * cut)))
        return means


class _Values:
    """The elements of one run of all clients; ``place`` has a row (uint8) for each client."""

    __slots__ = ("_cut", "_dtype", "_rows", "_taken", "finite")

    def __init__(self, dtype: str, cut: int, place: Array) -> None:
        self._dtype, self._cut, self._rows = dtype, cut, place.view(NUMPY[dtype])
        self._taken = 0
        self.finite = True

    def add(self, first: int, elements: Array, weight: int) -> None:  # noqa: ARG002 - every client counts the same
        """Keep elements of the next client."""
        self._taken += first == 0
        self._rows[self._taken - 1, first : first + elements.size] = elements
        if is_float(self._dtype):
            self.finite = self.finite and bool(np.isfinite(widen(elements, self._dtype)).all())

    def finalize(self) -> Iterator[Array]:
        """Sort, cut, and average what is left."""
        clients, length = self._rows.shape
        assert self._taken == clients, f"{self._taken} of {clients} inputs"
        step = _step(self._dtype, clients)
        for i in range(0, length, step):
            values = widen(self._rows[:, i : i + step], self._dtype).copy()
            _sort(values)
            kept = values[self._cut : clients - self._cut]
            yield self._mean_of_floats(kept, np.isnan(values[-1])) if is_float(self._dtype) else self._mean_of_integers(kept)

    def _mean_of_floats(self, kept: Array, spoilt: Array) -> Array:
        total = np.zeros(kept.shape[1])
        for row in kept:
            np.add(total, row, out=total)
        mean = np.divide(total, len(kept), out=total)
        mean[spoilt | np.isnan(mean)] = np.nan  # the same NaN on every machine
        self.finite = self.finite and bool(np.isfinite(mean).all())
        return rounded(mean, self._dtype)

    def _mean_of_integers(self, kept: Array) -> Array:
        total = kept.astype(object if is_wide(self._dtype, len(kept)) else np.int64).sum(0)
        return divided(total, len(kept)).astype(NUMPY[self._dtype])


def _sort(values: Array) -> None:
    """Sort each column; if it has a NaN, the last row has one."""
    if len(values) > FEW:
        values.sort(axis=0)
        return
    low = np.empty_like(values[0])
    for i, j in _network(len(values)):
        np.minimum(values[i], values[j], out=low)
        np.maximum(values[i], values[j], out=values[j])
        values[i] = low


@cache
def _network(rows: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of rows that are compared, in order (K. Batcher, "Sorting networks and their applications", 1968)."""
    pairs, merged = [], 1
    while merged < rows:
        apart = merged
        while apart:
            for start in range(apart % merged, rows - apart, 2 * apart):
                firsts = range(start, start + min(apart, rows - start - apart))
                pairs += [(i, i + apart) for i in firsts if i // (2 * merged) == (i + apart) // (2 * merged)]
            apart //= 2
        merged *= 2
    return tuple(pairs)


def _step(dtype: str, clients: int) -> int:
    """Elements that are sorted at once."""
    return max(16, STEP // (clients * (WIDE_SIZE if is_wide(dtype, clients) else max(4, ITEM_SIZE[dtype]))))
