"""The weighted mean in float64: fast, small, and its last bits depend on the order of the additions."""

from dataclasses import dataclass
from typing import ClassVar

from gradsharding.arithmetic import sums
from gradsharding.arithmetic.accumulator import MergeableAccumulator, Scratch, Size
from gradsharding.arithmetic.rules.rule import Cohort, Effort, Rule
from gradsharding.format.dtypes import Array, Run


@dataclass(frozen=True)
class Mean(Rule):
    """The mean of all updates, weighted. Floats are summed in float64, integers exactly; the result is rounded once."""

    name: ClassVar[str] = "mean"
    merges: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    vouches: ClassVar[bool] = False

    def size(self, run: Run, cohort: Cohort) -> Size:
        """Eight bytes an element, or ``WIDE_SIZE`` where integers may overflow int64."""
        return sums.size(run, cohort.weight)

    def begin(self, run: Run, cohort: Cohort, place: Array, scratch: Scratch) -> MergeableAccumulator:
        """Start the sums."""
        return sums.begin(run, cohort.weight, place, scratch)

    def effort(self, clients: int) -> Effort:  # noqa: ARG002 - the same for any number
        """By definition."""
        return Effort(add=1)
