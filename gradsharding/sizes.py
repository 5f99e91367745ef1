"""A size is read as a number and one unit, such as 512MiB, 2GB or 80.5 MiB, or as bytes without a unit; it is written in MiB."""

import re
from fractions import Fraction

from gradsharding.errors import UserError

UNITS = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))} | {
    unit: 1024**power for power, unit in enumerate(("b", "kib", "mib", "gib", "tib"))
}
"""Bytes of each unit, in lower case; case does not matter."""

_SIZE = re.compile(rf"([0-9]{{1,20}}(?:\.[0-9]{{1,20}})?)(?: ?({'|'.join(UNITS)}))?", re.ASCII | re.IGNORECASE)


def size(text: str) -> int:
    """Read a size in bytes, rounded down to a whole byte; raise UserError for any other text.

    >>> size("512MiB"), size("2 GB"), size("0.5kB"), size("4096")
    (536870912, 2000000000, 500, 4096)
    """
    parts = _SIZE.fullmatch(text)
    if not parts:
        raise UserError(f"{text[:40]!r} is not a size; write a number, a unit and nothing else, like 512MiB, 2GB or 80.5 MiB")
    return int(Fraction(parts[1]) * UNITS[(parts[2] or "b").lower()])


def positive(nbytes: int) -> int:
    """Return a size if it is more than 0 bytes; else raise UserError."""
    if nbytes <= 0:
        raise UserError(f"{nbytes} bytes of memory are too few; allow more, like 512MiB or 2GB")
    return nbytes


def mib(nbytes: int) -> str:
    """Write a size in MiB, rounded up to a tenth.

    >>> mib(1), mib(1 << 20)
    ('0.1 MiB', '1.0 MiB')
    """
    return f"{-(-nbytes * 10 // (1 << 20)) / 10:.1f} MiB"
