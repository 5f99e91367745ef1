"""Exact sums of floats: no bit is ever rounded away, so a sum depends on nothing but the set of its weighted elements.

It does not depend on their order, on how they were grouped, or on where the vector was cut. The mean is that of real arithmetic, rounded
once: to nearest, ties to even.

An exact zero is +0; a mean that is not zero keeps its sign, even if it rounds to zero. A NaN, or infinities of both signs, make NaN;
infinities of one sign make that infinity. The mean of finite elements cannot overflow.
"""

import math
from collections.abc import Iterator

import numpy as np

from gradsharding.arithmetic.accumulator import ReadExactly, Scratch, Size
from gradsharding.arithmetic.planes import DIGIT, DIGIT_BYTES, PRODUCT, Digits, pack, units, unpack
from gradsharding.errors import InvalidUpdate, UserError
from gradsharding.format.dtypes import FORMATS, NUMPY, Array, Buffer, Format, Run, rounded, widen

BLOCK = 16_384
"""Elements per step: a block, its digits and its temporaries stay in the second-level cache."""

BLOCK_SIZE = 1 << 10
"""Bytes that bound a block's bookkeeping, beside its digits."""

_CLOSE = 2.0**-50
"""Twice the largest relative error of a quotient."""

NAN, PLUS, MINUS = 1, 2, 4
"""Flags: which non-finite addends an element has seen."""


def planes(dtype: str, total: int) -> int:
    """Return how many digits a sum of ``dtype`` elements (F32, F16 or BF16) may have, if the weights sum to ``total``.

    >>> planes("F32", 1000), planes("BF16", 1000), planes("F16", 1000)
    (7, 6, 2)
    """
    bits = FORMATS[dtype].greatest - _lowest(dtype) + total.bit_length() + 1
    return -(-bits // DIGIT)


def size(run: Run, total: int) -> Size:
    """Bytes that the sums of ``run`` take if the weights sum to ``total``."""
    dtype, length = run
    count, blocks = planes(dtype, total), -(-length // BLOCK)
    memory = length * (8 * count + 1) + BLOCK_SIZE * blocks
    serialized = 1 + 2 * count * blocks + length * (DIGIT_BYTES * count + 1)
    return Size(8 * length * count, memory, serialized, varies=True)


class ExactSums:
    """Exact sums of a run of ``length`` elements of F32, F16 or BF16; ``total`` is the sum of the weights of all inputs, at most 2**53.

    >>> sums = ExactSums("F32", 1, 3, np.zeros(8 * planes("F32", 3), np.uint8), np.empty((3, BLOCK)))
    >>> for value in (2.0**60, 1.0, -(2.0**60)):
    ...     sums.add(0, np.float32([value]), 1)
    >>> next(sums.finalize()).tolist() == [np.float32(1 / 3)]
    True
    """

    __slots__ = ("_blocks", "_bytes", "_dtype", "_length", "_scratch", "_specials", "_total")

    def __init__(self, dtype: str, length: int, total: int, place: Array, scratch: Scratch) -> None:
        """Keep the sums in ``place``: zeros (uint8), 8 for each element and plane. Raise UserError if this thread loses subnormal numbers.

        ``scratch`` has at least three rows of ``BLOCK`` elements.
        """
        _require_subnormals()
        self._dtype, self._length, self._total, self._scratch = dtype, length, total, scratch
        each = units(_lowest(dtype), planes(dtype, total))
        self._bytes, digits = place.reshape(len(each), 8 * length), place.view("<f8").reshape(len(each), length)
        self._blocks = [Digits(digits[:, i : i + BLOCK], each) for i in range(0, length, BLOCK)]
        self._specials: Array | None = None

    @property
    def finite(self) -> bool:
        """Whether all addends are finite."""
        return self._specials is None

    def add(self, first: int, elements: Array, weight: int) -> None:
        """Add ``weight`` times ``elements`` to the sums from ``first`` on, a multiple of ``BLOCK``."""
        for i in range(0, elements.size, BLOCK):
            self._add(first + i, elements[i : i + BLOCK], weight)

    def finalize(self) -> Iterator[Array]:
        """Yield the means, rounded once to the elements' dtype, block by block."""
        for b in range(len(self._blocks)):
            yield self._mean(b)

    def serialize(self) -> list[Buffer]:
        """Return the sums as bytes that ``merge`` reads; equal sums have equal bytes. Consumes the sums: their memory is reused.

        The first byte is 1 if any addend was not finite, else 0. A table has two bytes for each plane and block: those stripped and those
        kept, as ``pack`` returns them. The digits follow, plane by plane, little-endian in two's complement. If the first byte is 1, the
        flags of all elements come last, one byte each.
        """
        table = np.zeros((len(self._bytes), len(self._blocks), 2), np.uint8)
        ends = [0] * len(self._bytes)
        for b, block in enumerate(self._blocks):
            for p, digits in block.carried():
                low, width, packed = pack(digits)
                table[p, b] = low, width
                self._bytes[p, ends[p] : ends[p] + packed.size] = packed
                ends[p] += packed.size
        rows: list[Buffer] = [row[:end].data for row, end in zip(self._bytes, ends, strict=True) if end]
        flags: list[Buffer] = [] if self._specials is None else [self._specials.data]
        return [bytes([bool(flags)]), table.data, *rows, *flags]

    def merge(self, read: ReadExactly) -> None:
        """Add other serialized sums of the same dtype, length and total; raise InvalidUpdate if the bytes are not such sums."""
        flagged, shape = read(1)[0], (len(self._bytes), len(self._blocks), 2)
        table = np.frombuffer(bytes(read(math.prod(shape))), np.uint8).reshape(shape)
        if (table.sum(2) > DIGIT_BYTES).any():
            raise InvalidUpdate("partial sums have digits wider than 48 bits; they are not exact sums of this release")
        for p, row in enumerate(table):
            for block, (low, width) in zip(self._blocks, row.tolist(), strict=True):
                if width:
                    block.merge(p, unpack(read(width * block.size), low, width))
        if flagged:
            for b, block in enumerate(self._blocks):
                self._flag(b * BLOCK, np.frombuffer(read(block.size), np.uint8))

    def _add(self, first: int, elements: Array, weight: int) -> None:
        """Add to one block."""
        form, size = FORMATS[self._dtype], elements.size
        product, spare, bits = self._scratch[0, :size], self._scratch[1, :size], self._scratch[2].view(form.bits)[:size]
        most = _magnitudes(elements, form, bits)
        if most >= _infinity(form):
            elements = self._set_aside(first, elements)
            most = _magnitudes(elements, form, bits)
        if not most:
            return
        np.subtract(bits, 1, out=bits)  # zeros wrap round
        low, high = _last_place(form, int(bits.min()) + 1), _last_place(form, most) + form.mantissa + 1
        values = widen(elements, self._dtype)
        for part, shift in _parts(weight, PRODUCT - form.mantissa - 1):
            np.copyto(product, values)
            np.multiply(product, math.ldexp(part, shift), out=product)  # exact
            self._blocks[first // BLOCK].add(first % BLOCK, product, low + shift, high + shift + part.bit_length(), spare)

    def _mean(self, b: int) -> Array:
        """Return the means of block ``b``. Where the error of the quotient leaves two neighbours possible, the exact sum decides."""
        block = self._blocks[b]
        near = block.head() / float(self._total)  # relative error at most 2**-51: of the sum of the digits, and of the division
        mean, above = rounded(near * (1 - _CLOSE), self._dtype), rounded(near * (1 + _CLOSE), self._dtype)
        undecided = np.flatnonzero(mean != above)
        if undecided.size:
            below, above = (widen(bound[undecided], self._dtype).astype(np.float64) for bound in (mean, above))
            mean[undecided] = self._decided(block.select(undecided), below, above)
        if self._specials is not None:
            flags = self._specials[b * BLOCK : b * BLOCK + block.size]
            value = np.where(flags & PLUS, np.inf, -np.inf)
            value[(flags & NAN != 0) | (flags & (PLUS | MINUS) == PLUS | MINUS)] = np.nan
            mean[flags != 0] = rounded(value, self._dtype)[flags != 0]
        return mean

    def _decided(self, sums: Digits, below: Array, above: Array) -> Array:
        """Choose between two neighbours by the exact sign of the sum minus ``total`` times their middle. Overwrites the sums."""
        form, middle = FORMATS[self._dtype], (below + above) / 2  # exact: at most one bit more than an element has
        least = math.frexp(float(np.abs(middle).min()))[1] - form.mantissa - 2
        low, high = max(least, _lowest(self._dtype)), math.frexp(float(np.abs(middle).max()))[1]
        for part, shift in _parts(self._total, PRODUCT - form.mantissa - 2):
            sums.add(0, middle * -math.ldexp(part, shift), low + shift, high + shift + part.bit_length(), np.empty(middle.size))
        sign, farther = sums.sign(), np.where(middle > 0, 1, -1)  # ``above`` is the one farther from zero
        return rounded(np.where(sign == 0, middle, np.where(sign == farther, above, below)), self._dtype)

    def _set_aside(self, first: int, elements: Array) -> Array:
        """Flag the elements that are not finite; return the elements with zeros in their place."""
        values = widen(elements, self._dtype)
        flags = NAN * np.isnan(values) + PLUS * (values == np.inf) + MINUS * (values == -np.inf)
        self._flag(first, flags.astype(np.uint8))
        return np.where(flags != 0, 0, elements).astype(elements.dtype)

    def _flag(self, first: int, flags: Array) -> None:
        if self._specials is None:
            self._specials = np.zeros(self._length, np.uint8)
        self._specials[first : first + flags.size] |= flags


def _lowest(dtype: str) -> int:
    """Exponent of the lowest plane's unit: half of the least subnormal, which the middle between two elements may need."""
    return FORMATS[dtype].least - 1


def _last_place(form: Format, bits: int) -> int:
    """Exponent of the unit in the last place of a positive element, given as its bits."""
    return form.least - 1 + max(bits >> form.mantissa, 1)


def _magnitudes(elements: Array, form: Format, out: Array) -> int:
    """Write the elements' bits without their signs, which as integers are ordered like the magnitudes; return the largest."""
    np.bitwise_and(elements.view(form.bits), _infinity(form) | ((1 << form.mantissa) - 1), out=out)
    return int(out.max())


def _infinity(form: Format) -> int:
    """Bits of infinity; larger ones are NaN."""
    return (2 * form.greatest - 1) << form.mantissa


def _parts(weight: int, bits: int) -> list[tuple[int, int]]:
    """Split a weight into parts of at most ``bits`` bits, each with its shift; omit parts that are zero."""
    mask = (1 << bits) - 1
    return [(part, shift) for shift in range(0, weight.bit_length(), bits) if (part := weight >> shift & mask)]


def _require_subnormals() -> None:
    """Raise UserError if this thread treats subnormal numbers as zero: products and means would lose them."""
    if not np.array([1e-45], NUMPY["F32"]).astype(np.float64)[0] or not np.array([1e-45]).astype(NUMPY["F32"])[0]:
        raise UserError(
            "this thread treats subnormal numbers as zero, and exact sums need them: "
            "call torch.set_flush_denormal(False), or use worker processes"
        )
