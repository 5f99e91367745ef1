"""CRC-32C, which S3 checks on arrival: by awscrt where it is installed, by numpy in a function's bundle. The values are the same.

The polynomial is Castagnoli's (RFC 3720, 12.1). Bits are reflected: in a register, bit 31 - i is the coefficient of x^i.
"""

import base64
from functools import cache

import numpy as np
import numpy.typing as npt

from gradsharding.format.dtypes import Buffer

try:
    from awscrt.checksums import crc32c as _native
except ImportError:
    _native = None

_POLYNOMIAL, _ONES = 0x82F63B78, 0xFFFFFFFF
_SHORT = 512
"""Bytes below which a loop is as fast as numpy."""

Words = npt.NDArray[np.uint32]


def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C of ``data``, which follows bytes whose CRC-32C is ``crc``."""
    view = memoryview(data).cast("B")
    return int(_native(view, crc)) if _native else by_numpy(view, crc)


def encoded(crc: int) -> str:
    """Write a CRC as the header ``x-amz-checksum-crc32c`` does: base64 of its bytes, the highest first."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def by_numpy(view: memoryview, crc: int = 0) -> int:
    """The same without awscrt, in rows of words: each column is a polynomial of its own, and they are joined at the end."""
    if len(view) < _SHORT:
        return _bytewise(view, crc)
    lanes = 16_384 if len(view) >= 1 << 20 else 64
    row = 4 * lanes
    first = len(view) % row
    first += row if first < 4 else 0
    head = np.zeros(-(-first // row) * row, np.uint8)  # zeros before the data leave a register of zero as it is
    head[-first:] = np.frombuffer(view[:first], np.uint8)
    head[-first:][:4] ^= np.frombuffer((crc ^ _ONES).to_bytes(4, "little"), np.uint8)
    body = np.frombuffer(view[first:], "<u4").reshape(-1, lanes)
    low, high = _tables(_power(32 * lanes), 16)
    sums, part, index = np.zeros(lanes, np.uint32), np.empty(lanes, np.uint32), np.empty(lanes, np.uint32)
    for words in (*head.view("<u4").reshape(-1, lanes), *body):
        np.bitwise_and(sums, 0xFFFF, out=index)
        np.take(low, index, out=part, mode="clip")
        np.right_shift(sums, 16, out=index)
        np.take(high, index, out=sums, mode="clip")
        np.bitwise_xor(sums, part, out=sums)
        np.bitwise_xor(sums, words, out=sums)
    while lanes > 1:
        lanes //= 2
        sums = _times(sums[:lanes], _power(32 * lanes)) ^ sums[lanes:]
    return int(_times(sums, _power(32))[0]) ^ _ONES


def _bytewise(view: memoryview, crc: int) -> int:
    table, register = _byte_table(), crc ^ _ONES
    for byte in view:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ _ONES


@cache
def _byte_table() -> list[int]:
    return [int(value) for value in _times(np.arange(256, dtype=np.uint32), _power(8))]


def _times(words: Words, factor: int) -> Words:
    """Multiply each word by ``factor``, modulo the polynomial."""
    tables = _tables(factor, 8)
    product: Words = tables[0][words & 0xFF]
    for place in (1, 2, 3):
        product ^= tables[place][words >> (8 * place) & 0xFF]
    return product


@cache
def _tables(factor: int, bits: int) -> tuple[Words, ...]:
    """Products of ``factor`` with all values of each ``bits`` of a word, the lowest first."""
    tables: list[Words] = [np.zeros(1, np.uint32) for _ in range(32 // bits)]
    for bit in range(32):
        known = tables[bit // bits]
        tables[bit // bits] = np.concatenate([known, known ^ np.uint32(_product(1 << bit, factor))])
    return tuple(tables)


@cache
def _power(n: int) -> int:
    """X to the power ``n``, a power of two, modulo the polynomial."""
    return 1 << 30 if n == 1 else _product(half := _power(n // 2), half)


def _product(a: int, b: int) -> int:
    product = 0
    for place in range(31, -1, -1):
        product ^= b if a >> place & 1 else 0
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
