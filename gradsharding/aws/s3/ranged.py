"""A read that breaks off continues at the byte where it stopped, with another request for the rest."""

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, Protocol, cast

from urllib3.exceptions import HTTPError

from gradsharding import usage
from gradsharding.aws.patience import ATTEMPTS, pause
from gradsharding.errors import StoreFailed
from gradsharding.format.dtypes import Buffer

STAGE = 256 << 10
"""Bytes of a read buffer, which fits in the second-level cache."""


class _Readable(Protocol):
    def close(self) -> None: ...


class Answer(NamedTuple):
    """The answer to a ranged request: the object's version, its size in bytes, and a body with ``readinto`` and ``close``."""

    version: str
    size: int
    body: _Readable


Ask = Callable[[int, int, str | None], Answer | None]
"""Requests bytes ``start`` to ``stop`` of an object at a version, or at any if it is None; None if the range is beyond the end."""


def stream(ask: Ask, start: int, stop: int, version: str | None, doing: str, broken: tuple[type[Exception], ...] = ()) -> Iterator[Buffer]:
    """Yield bytes ``start`` to ``stop``, all of one version.

    Raise what ``ask`` raises, or StoreFailed, which begins with ``doing``, once the body has broken off six times. ``broken`` are the
    errors that a client raises when a body breaks off, beside urllib3's and the system's.
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
                raise StoreFailed(f"{doing} broke off {ATTEMPTS} times ({type(error).__name__}); run it again") from None
            pause(failures)


def first_of(answer: Answer, ask: Ask, nbytes: int, doing: str, broken: tuple[type[Exception], ...] = ()) -> bytes:
    """Return the first ``nbytes`` bytes of an object from an ``answer``; where that breaks off, request the rest by ``ask``."""
    answers = iter([answer])
    chunks = stream(lambda *range_: next(answers, None) or ask(*range_), 0, nbytes, answer.version, doing, broken)
    return b"".join(bytes(chunk) for chunk in chunks)
