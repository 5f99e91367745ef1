"""A stream of bytes goes on where it broke off: what has come is good, and the rest is asked for again."""

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, Protocol, cast

from urllib3.exceptions import HTTPError

from gradsharding import usage
from gradsharding.aws.patience import ATTEMPTS, pause
from gradsharding.errors import StoreFailed
from gradsharding.format.dtypes import Buffer

STAGE = 256 << 10
"""Bytes of a read buffer: fits the second-level cache."""


class _Readable(Protocol):
    def close(self) -> None: ...


class Answer(NamedTuple):
    """What a ranged request brought: the object's version, its size in bytes, and a body with ``readinto`` and ``close``."""

    version: str
    size: int
    body: _Readable


Ask = Callable[[int, int, str | None], Answer | None]
"""Asks for bytes ``start`` to ``stop`` of an object at a version, or at whichever it is; None if all of it lies beyond the end."""


def stream(ask: Ask, start: int, stop: int, version: str | None, what: str, broken: tuple[type[Exception], ...] = ()) -> Iterator[Buffer]:
    """Give bytes ``start`` to ``stop``, all of one version.

    Raise what ``ask`` raises, or StoreFailed, which names ``what``, when the body has broken off six times. ``broken`` are the
    errors, beside urllib3's and the system's, by which a client says that it did.
    """
    breaks: tuple[type[Exception], ...] = (HTTPError, OSError, *broken)
    buffer, failures = memoryview(bytearray(max(0, min(STAGE, stop - start)))), 0
    while start < stop and (answer := ask(start, stop, version)):
        version, stop = answer.version, min(stop, answer.size)
        try:
            with contextlib.closing(answer.body) as body:
                while start < stop and (count := cast("IO[bytes]", body).readinto(buffer)):  # type: ignore[attr-defined]
                    usage.count("s3", bytes_read=count)
                    yield buffer[:count]
                    start += count
        except breaks as error:
            failures += 1
            if failures == ATTEMPTS:
                raise StoreFailed(f"{what} broke off {ATTEMPTS} times ({type(error).__name__}); run it again") from None
            pause(failures)


def first_of(answer: Answer, ask: Ask, nbytes: int, what: str, broken: tuple[type[Exception], ...] = ()) -> bytes:
    """Give the first ``nbytes`` bytes of an object, from an ``answer`` that is there already; where it breaks off, the rest by ``ask``."""
    there = iter([answer])
    asked = stream(lambda *range_: next(there, None) or ask(*range_), 0, nbytes, answer.version, what, broken)
    return b"".join(bytes(chunk) for chunk in asked)
