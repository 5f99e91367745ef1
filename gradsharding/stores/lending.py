"""A store may lend its rights: by a signed URL, a node without credentials reads or writes one object, and does nothing else.

A node offers what it would write; the store's owner grants it a URL for each piece; once the bytes have arrived, the grant is settled.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pydantic import Field

from gradsharding.stores.protocol import Peeked
from gradsharding.usage import Usage
from gradsharding.value import Value

PIECES = 10_000
"""Pieces of an offer, at most: as many as ``ObjectStore.put_part`` takes parts of an object."""

EXPIRES = 900
"""Seconds for which a URL is valid, unless the caller chooses."""


class Piece(Value):
    """Bytes to be written by one request: their number, and their MD5 as the header Content-MD5 has it (RFC 1864).

    MD5, because S3 checks it on arrival, and so do servers, such as Ceph 16, that ignore checksums. Whoever steals the URL cannot find
    other bytes of the same MD5, which is easy with a CRC.
    """

    size: int = Field(ge=0)
    md5: str = Field(pattern=r"^[A-Za-z0-9+/]{22}==$")


class Offer(Value):
    """An object to be written, piece after piece; all pieces but the last have the same size."""

    pieces: tuple[Piece, ...] = Field(min_length=1, max_length=PIECES)

    @property
    def nbytes(self) -> int:
        """Bytes of the object."""
        return sum(piece.size for piece in self.pieces)


class Permit(Value):
    """A URL for each piece of an offer."""

    urls: tuple[str, ...] = Field(repr=False)


@dataclass(frozen=True)
class Grant:
    """A permit for an offer, and the upload that it goes into, if the offer has more than one piece."""

    key: str
    offer: Offer
    permit: Permit
    upload: str | None


class Lender(Protocol):
    """Signs URLs for one store; raises StoreRefused if it cannot."""

    @property
    def piece(self) -> int:
        """Bytes of a piece: an object of no more is written by one request."""
        ...

    def try_out(self) -> None:
        """Check, once for each store, that a URL permits nothing but what it was signed for."""
        ...

    def readable(self, key: str, seconds: int) -> str:
        """Return a URL by which anyone can read the object under ``key`` for ``seconds``."""
        ...

    def grant(self, key: str, offer: Offer, seconds: int) -> Grant:
        """Permit anyone with the URLs to create the offered object under ``key``, and no other, for ``seconds``."""
        ...

    def settle(self, granted: Grant) -> Peeked:
        """Check that the offered bytes have arrived, and publish them; return the first. Raise InvalidUpdate if they have not."""
        ...

    def settling(self, offer: Offer, header_bytes: int) -> Usage:
        """Return what ``grant``, ``settle`` and reading a header of ``header_bytes`` request, at most."""
        ...

    def withdraw(self, granted: Grant) -> None:
        """Forget a grant that was not settled."""
        ...

    def seconds_left(self) -> float | None:
        """Return the seconds until the credentials expire that sign; None if they are renewed, or do not say."""
        ...


@runtime_checkable
class Lending(Protocol):
    """A store that lends."""

    @property
    def lender(self) -> Lender:
        """Signs URLs for this store."""
        ...
