"""The midrange: the middle between the smallest and the largest value of each element. The example of the guide to writing a rule."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gradsharding.arithmetic.accumulator import Scratch, Size
from gradsharding.arithmetic.rules.rule import Cohort, Effort, Rule
from gradsharding.errors import UserError
from gradsharding.format.dtypes import Array, Run

if TYPE_CHECKING:  # a worker does not load it
    from gradsharding.format.layout import Layout


@dataclass(frozen=True)
class Midrange(Rule):
    """The middle between the smallest and the largest value of each float32 element; every client counts the same."""

    name: ClassVar[str] = "midrange"
    merges: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    vouches: ClassVar[bool] = False

    def admit(self, layout: "Layout", clients: int) -> None:
        """Raise UserError for a tensor that is not float32."""
        for tensor in layout.tensors:
            if tensor.dtype != "F32":
                raise UserError(f"tensor {tensor.name!r} is {tensor.dtype}, and a midrange is of F32: convert it", tensor=tensor.name)

    def size(self, run: Run, cohort: Cohort) -> Size:
        """Two float32 for each element, however many clients there are."""
        return Size(place=2 * run.nbytes, memory=2 * run.nbytes)

    def begin(self, run: Run, cohort: Cohort, place: Array, scratch: Scratch) -> "Extremes":
        """Start with a smallest value above, and a largest below, every float32."""
        low, high = place.view("<f4").reshape(2, run.length)
        low[:], high[:] = np.inf, -np.inf
        return Extremes(low, high)

    def effort(self, clients: int) -> Effort:
        """Two passes over each input."""
        return Effort(add=2)


class Extremes:
    """The smallest and the largest values so far."""

    def __init__(self, low: Array, high: Array) -> None:
        self.low, self.high, self.finite = low, high, True

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Take in elements of one client. A NaN stays."""
        part = slice(first, first + elements.size)
        np.minimum(self.low[part], elements, out=self.low[part])
        np.maximum(self.high[part], elements, out=self.high[part])

    def finalize(self) -> Iterator[Array]:
        """Yield the middles."""
        middle = (self.low.astype("f8") + self.high) / 2
        self.finite = bool(np.isfinite(middle).all())
        yield middle.astype("<f4")
