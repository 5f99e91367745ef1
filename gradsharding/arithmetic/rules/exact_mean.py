"""The weighted mean of real arithmetic, rounded once: the same bits, whatever the topology, the slices and the order of anything."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gradsharding.arithmetic import exact, integers, sums
from gradsharding.arithmetic.accumulator import MergeableAccumulator, Scratch, Size
from gradsharding.arithmetic.rules.rule import Cohort, Effort, Rule
from gradsharding.errors import UserError, quoted
from gradsharding.format.dtypes import Array, Run, is_float

if TYPE_CHECKING:  # functions apply rules, and read no headers
    from gradsharding.format.layout import Layout


@dataclass(frozen=True)
class ExactMean(Rule):
    """The mean of all updates, weighted. No bit of a sum is lost; the result is rounded once, to nearest, ties to even."""

    name: ClassVar[str] = "exact-mean"
    merges: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    vouches: ClassVar[bool] = True

    def admit(self, layout: "Layout", clients: int) -> None:  # noqa: ARG002 - any number of them
        """Raise UserError if a tensor is F64: its exact sums would take 360 bytes an element."""
        wide = next((tensor.name for tensor in layout.tensors if tensor.dtype == "F64"), None)
        if wide is not None:
            raise UserError(
                f"tensor {quoted(wide)} is F64, and exact sums are of F32, F16 and BF16: convert it to F32, or use another rule",
                tensor=wide,
            )

    def size(self, run: Run, cohort: Cohort) -> Size:
        """Of a float element, eight bytes for each 48 bits of its sum, and one; of an integer, what ``Mean`` takes."""
        if not is_float(run.dtype):
            return sums.size(run, cohort.weight)
        return exact.size(run, cohort.weight)

    def begin(self, run: Run, cohort: Cohort, place: Array, scratch: Scratch) -> MergeableAccumulator:
        """Start the sums; raise UserError if this thread treats subnormal numbers as zero."""
        if not is_float(run.dtype):
            return sums.begin(run, cohort.weight, place, scratch)
        return exact.ExactSums(run.dtype, run.length, cohort.weight, place, scratch)

    def effort(self, clients: int) -> Effort:  # noqa: ARG002 - the same for any number
        """Measured (``benchmarks/results/kernel_speed.json``): 1.7 GB/s beside 4.3 for an input, and 0.4 GB/s to serialize."""
        return Effort(add=4.3 / 1.7, finalize=4.3 / 0.4)

    def recompute(self, dtype: str, columns: Sequence[Iterable[int]], weights: Sequence[int]) -> list[int]:
        """Compute the mean again in Python's integers."""
        return integers.mean(dtype, columns, weights)
