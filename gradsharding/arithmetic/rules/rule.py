"""A rule says how the updates of a round become one: element by element, in the place where a plan, a task and a fold ask for it.

A rule is a value: compared by its parameters, written as text (``trimmed-mean:0.2``) in records, in tasks and on the command line.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from gradsharding.arithmetic.accumulator import Accumulator, Scratch, Size
from gradsharding.format.dtypes import Array, Run

if TYPE_CHECKING:  # functions apply rules, and read no headers
    from gradsharding.format.layout import Layout


class Cohort(NamedTuple):
    """The clients of a round."""

    clients: int
    """How many there are."""
    weight: int
    """The sum of their weights."""


class Effort(NamedTuple):
    """Time on the CPU, in units of the time that float64 sums need to add one byte of float32."""

    add: float
    """For one byte of an input, while it arrives."""
    finalize: float = 0
    """For one byte of the slice, after the last input: the time beyond what finalizing float64 sums takes."""


@dataclass(frozen=True)
class Rule(ABC):
    """How the updates of a round become one.

    A subclass is a frozen dataclass; its fields are the rule's parameters, in the order in which text has them.
    """

    name: ClassVar[str]
    """What text names it by."""
    merges: ClassVar[bool]
    """Whether accumulators can be merged: only then may a tree of functions share the work."""
    weighs: ClassVar[bool]
    """Whether the clients' weights count."""
    vouches: ClassVar[bool]
    """Whether the bits of the result depend on the contributions alone. Then a digest is published, and ``recompute`` can check it."""

    def admit(self, layout: "Layout", clients: int) -> None:  # noqa: B027 - most rules take every update
        """Raise UserError if the rule cannot be applied to ``clients`` updates of this ``layout``; nothing has been read yet."""

    @abstractmethod
    def size(self, run: Run, cohort: Cohort) -> Size:
        """Bytes that the accumulator of ``run`` takes: upper bounds, known before anything is read."""

    @abstractmethod
    def begin(self, run: Run, cohort: Cohort, place: Array, scratch: Scratch) -> Accumulator:
        """Start the accumulator of ``run``: a MergeableAccumulator, if the rule ``merges``.

        ``place`` has zeros (uint8), as many as ``size`` says. Raise UserError if this thread cannot compute it.
        """

    @abstractmethod
    def effort(self, clients: int) -> Effort:
        """Time that the rule takes for ``clients`` updates, beside that of reading them."""

    def recompute(self, dtype: str, columns: Sequence[Iterable[int]], weights: Sequence[int]) -> list[int]:
        """Compute the result again in Python's own numbers, by code that shares nothing with the accumulators.

        ``columns`` has the elements of each client, sorted by client id: integers, and floats as their bits; so has the result.
        A rule that ``vouches`` defines this.
        """
        raise NotImplementedError(f"the results of {self} cannot be checked")

    def __str__(self) -> str:
        """Write it as ``parse_rule`` reads it."""
        values = ",".join(str(getattr(self, field.name)) for field in fields(self))
        return f"{self.name}:{values}" if values else self.name
