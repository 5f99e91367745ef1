"""An accumulator takes in the elements of one run, input by input, and gives the elements of the result. Each rule brings its own.

Arrays have one dimension; their dtype is the one that ``NUMPY`` names, so that bfloat16 elements come and go as their bits.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gradsharding.format.dtypes import Array, Buffer

BLOCK = 32_768
"""Elements per step: a block and its temporaries stay in the second-level cache."""

ReadExactly = Callable[[int], Buffer]
"""Return the next n bytes of a stream; they are valid until the next call. Raise InvalidUpdate if the stream has fewer."""

Scratch = npt.NDArray[np.float64]
"""Memory for temporaries, shared by all accumulators of a fold: three rows of ``BLOCK`` elements."""


class Size(NamedTuple):
    """Bytes that the accumulator of one run takes; temporaries in the scratch are not counted."""

    place: int
    """In the fold's array; at least the bytes of the run itself, since the result is packed into the same array."""
    memory: int
    """In all, at most."""
    serialized: int = 0
    """When it is serialized, at most."""
    varies: bool = False
    """Whether the serialized bytes depend on the values, so that there may be fewer."""


class Accumulator(Protocol):
    """Takes in the elements of one run from every input, and computes the elements of the result."""

    @property
    def finite(self) -> bool:
        """After ``finalize`` or ``serialize``: whether neither an input nor the result has NaN or infinity."""
        ...

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Take in ``elements``, at most ``BLOCK`` of them, of an input of this ``weight``.

        ``first`` is the place of the first one in the run, a multiple of ``BLOCK``. An input's blocks come in order, and one input after
        another.
        """
        ...

    def finalize(self) -> Iterator[Array]:
        """Yield the elements of the result in the run's own dtype, block by block. Consumes the accumulator."""
        ...


@runtime_checkable
class MergeableAccumulator(Accumulator, Protocol):
    """An accumulator that a tree can pass on: it is serialized by one function and merged by another."""

    def serialize(self) -> list[Buffer]:
        """Return the state as bytes that ``merge`` reads. Consumes the accumulator: the bytes may lie in its own memory."""
        ...

    def merge(self, read: ReadExactly) -> None:
        """Add the serialized state of another accumulator of the same dtype, length and cohort."""
        ...
