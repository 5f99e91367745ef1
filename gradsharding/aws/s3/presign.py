"""The server lends out its right to read or write one object: each URL is bound to key, verb, size and digest, and soon expires.

The store must refuse ``x-amz-*`` headers that are not signed. Otherwise who holds a URL for writing can ask for more: with
``x-amz-copy-source`` a PUT copies any object that the lender's keys can read, and with ``x-amz-acl`` it publishes one. AWS demands that
each such header be signed (https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html) and answers AccessDenied, "There
were headers present in the request which were not signed". Ceph 16 obeys them. There a URL is *sealed*: it signs the names of headers that
do not come, and one that comes breaks the signature. Which of the two a store needs is tried out before the first URL is lent; where
neither helps, no URL is lent.
"""

import contextlib
import hashlib
import os
import secrets
import threading
from base64 import b64decode, b64encode
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import botocore.session
from botocore.auth import AUTH_TYPE_MAPS, S3SigV4QueryAuth

from gradsharding.aws.client import Environment, environment, explaining, s3_client, seconds_in_all, seconds_left
from gradsharding.aws.s3.demands import TRUST, demanded, headers_of
from gradsharding.aws.s3.direct import attempt, with_headers
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import InvalidUpdate, MissingObject, ObjectExists, StoreRefused
from gradsharding.stores.lending import Grant, Offer, Permit, Piece
from gradsharding.stores.protocol import Peeked
from gradsharding.stores.updates import FIRST_READ, inspection
from gradsharding.usage import Usage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MINUTE = 60
"""Seconds for which it makes sense to lend a URL, at least."""

PIECE = 64 << 20
"""Bytes of a piece: an object of no more is written by one request."""

SEALED = "gradsharding-sealed"
"""Botocore's name for the signature of sealed URLs."""

_TRYING = threading.Lock()


@dataclass(frozen=True)
class S3Lender:
    """The functions of this module for one store: what ``S3Store.lender`` gives."""

    store: S3Store

    @property
    def piece(self) -> int:
        """Bytes of a piece."""
        return PIECE

    def try_out(self) -> None:
        """See that URLs let nobody do more than they say."""
        try_out(self.store)

    def readable(self, key: str, seconds: int) -> str:
        """Sign a URL for reading an object."""
        return readable(self.store, key, seconds)

    def grant(self, key: str, offer: Offer, seconds: int) -> Grant:
        """Sign URLs for writing what is offered."""
        return grant(self.store, key, offer, seconds)

    def settle(self, granted: Grant) -> Peeked:
        """See that it has arrived, and publish it."""
        return settle(self.store, granted)

    def settling(self, offer: Offer, header_bytes: int) -> Usage:
        """Requests and bytes of ``grant`` and ``settle``."""
        return settling(self.store, offer, header_bytes)

    def withdraw(self, granted: Grant) -> None:
        """Forget a grant."""
        withdraw(self.store, granted)

    def seconds_left(self) -> float | None:
        """Seconds for which the credentials in the environment can sign."""
        return seconds_in_all()


def readable(store: S3Store, key: str, seconds: int) -> str:
    """Give a URL by which anyone may read the object under ``key`` for so many seconds, or as many as ``lasting`` gives."""
    return _signed(store.client, "get_object", "GetObject", {"Bucket": store.bucket, "Key": store.place(key)}, lasting(seconds))


def lasting(seconds: int) -> int:
    """Give the seconds that a URL is good for which should be good for ``seconds``: it ends with the credentials that sign it.

    Those that end before half of that are renewed first. Raise StoreRefused if they cannot be, or then do not last half as long either.
    A session token that comes without a time when it expires is taken to last: nobody can know.
    """
    left = seconds_left(seconds / 2)
    if left is None or left >= seconds:
        return seconds
    if left < max(seconds / 2, 1):
        ends = f"end in {left:.0f} s" if left >= 0 else "have expired"
        shorter = f"lend URLs for {int(left)} s, or " if left >= MINUTE else ""
        raise StoreRefused(
            f"URLs should be good for {seconds} s, and the credentials that sign them {ends}, when the URLs end, too; "
            f"{shorter}use credentials that last longer"
        )
    return int(left)


def grant(store: S3Store, key: str, offer: Offer, seconds: int) -> Grant:
    """Permit to create the object that is offered, and no other, under ``key``, within so many seconds, or as many as ``lasting`` gives.

    One piece is written once: its URL demands that there be no such object. Several go into an upload, which ``settle`` completes.
    Raise StoreRefused as ``lasting`` does, and as ``try_out``, which the first grant calls.
    """
    signer, place, seconds = try_out(store), store.place(key), lasting(seconds)
    if len(offer.pieces) == 1:
        return Grant(key, offer, Permit(urls=(_writable(signer, store, place, offer.pieces[0], seconds, IfNoneMatch="*"),)), None)
    upload = store.begin(key, checksum=False)
    urls = (
        _writable(signer, store, place, piece, seconds, UploadId=upload, PartNumber=number) for number, piece in enumerate(offer.pieces, 1)
    )
    return Grant(key, offer, Permit(urls=tuple(urls)), upload)


def settle(store: S3Store, granted: Grant) -> Peeked:
    """See that what was permitted has arrived, byte for byte, and publish it; give its first bytes. Again, it changes nothing.

    Raise InvalidUpdate if it has not arrived, or something else has.
    """
    key, offer = granted.key, granted.offer
    try:
        if granted.upload:
            with contextlib.suppress(MissingObject, ObjectExists):  # completed before, maybe
                store.complete(key, granted.upload, {number: piece.size for number, piece in enumerate(offer.pieces, 1)})
        peeked = store.peek(key, FIRST_READ)
    except MissingObject:
        raise InvalidUpdate(f"nothing has arrived under {key}, where {offer.nbytes} bytes were offered and permitted") from None
    size, version = peeked.stat
    if size != offer.nbytes:
        raise InvalidUpdate(f"{size} bytes have arrived under {key}, where {offer.nbytes} were offered and permitted")
    if version.strip('"') != etag(offer) and not _as_offered(store, key, offer, version):
        raise InvalidUpdate(f"other bytes have arrived under {key} than were offered and permitted, though as many: {size}")
    return peeked


def etag(offer: Offer) -> str:
    """Give the ETag that S3 gives to an object that was written as it was offered, unless it encrypts it with a key of KMS's or its own.

    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html; of several parts, it is the MD5 of their MD5s, and their number.)
    """
    digests = [b64decode(piece.md5) for piece in offer.pieces]
    return digests[0].hex() if len(digests) == 1 else f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def settling(store: S3Store, offer: Offer, header_bytes: int) -> Usage:
    """What permitting and settling an offer of an update, and reading its header, asks of the store at most.

    Where it is encrypted with a key of KMS's, it is read once more, to compare its digest; this knows of that only if the environment
    demands it, and not if the bucket does it by default.
    """
    count = len(offer.pieces)
    upload = Usage(puts=1) + store.charges.whole(count) if count > 1 else Usage()
    if demanded().get("ServerSideEncryption", "").startswith("aws:kms"):
        upload += Usage(gets=count, bytes_read=offer.nbytes)
    return upload + inspection(header_bytes, offer.nbytes - header_bytes)


def withdraw(store: S3Store, granted: Grant) -> None:
    """Forget what was permitted and has not been settled; URLs of single pieces expire by themselves."""
    if granted.upload:
        store.abort(granted.key, granted.upload)


def try_out(store: S3Store) -> "S3Client":
    """Give the client to sign URLs for writing with: one whose URLs let nobody do more than they say.

    The first call for a store tries that out with empty objects below ``.gradsharding/``, which it deletes: by three PUT requests on AWS,
    by five on Ceph 16. Raise StoreRefused if the store obeys headers that are not signed, or if it cannot be written to.
    """
    with _TRYING:
        return _try_out(store.url, environment())


@lru_cache(maxsize=64)
def _try_out(url: str, _: Environment) -> "S3Client":
    store = S3Store(url)
    plain, sealed = store.client, s3_client(store.bucket, SEALED)
    if os.environ.get(TRUST) == "1":
        return plain
    own, *others = (f"{store.prefix}.gradsharding/signing/{secrets.token_hex(16)}" for _ in range(6))
    unsigned, free = ({"x-amz-copy-source": quote(f"/{store.bucket}/{own}")}, {"x-amz-acl": "public-read"}), iter(others)

    def writes(signer: "S3Client", headers: dict[str, str]) -> bool:
        return attempt(_EMPTY, _writable(signer, store, next(free), _EMPTY, 60), headers)

    with explaining(f"PutObject of {store.url}/.gradsharding/signing/"):
        plain.put_object(Bucket=store.bucket, Key=own, Body=b"")
    try:
        for signer in (plain, sealed):
            if not any(writes(signer, headers) for headers in unsigned) and (signer is plain or writes(signer, {})):
                return signer
    finally:
        store._delete([own, *others])  # noqa: SLF001 - hidden keys are no keys of the store
    raise StoreRefused(
        f"{plain.meta.endpoint_url} obeys x-amz-copy-source on a signed URL, although it is not signed: a node could read all that the "
        f"server's keys can; use another S3 server, or give nodes keys of their own (presigned=False), or, if each node may do what the "
        f"server's keys can, set {TRUST}=1"
    )


_EMPTY = Piece(size=0, md5=b64encode(hashlib.md5(b"", usedforsecurity=False).digest()).decode())


def _writable(signer: "S3Client", store: S3Store, place: str, piece: Piece, seconds: int, **bound: Any) -> str:
    """Give a URL for writing a piece: as an object, or as a part, if ``bound`` says of which upload."""
    verb, operation = ("upload_part", "UploadPart") if "UploadId" in bound else ("put_object", "PutObject")
    what = {"Bucket": store.bucket, "Key": place, "ContentLength": piece.size, "ContentMD5": piece.md5}
    return _signed(signer, verb, operation, what | bound, seconds)


def _signed(signer: "S3Client", verb: str, operation: str, what: Any, seconds: int) -> str:
    with explaining(f"signing a URL for {operation} of s3://{what['Bucket']}/{what['Key']}"):
        url = signer.generate_presigned_url(verb, Params=what, ExpiresIn=seconds)
    return with_headers(url, headers_of(signer, operation))


def _as_offered(store: S3Store, key: str, offer: Offer, version: str) -> bool:
    """Whether what has arrived has the digests that were offered, told by reading it."""
    start = 0
    for piece in offer.pieces:
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in store.get(key, start, start + piece.size, version=version):
            digest.update(chunk)
        if digest.digest() != b64decode(piece.md5):
            return False
        start += piece.size
    return True


class _Sealed(S3SigV4QueryAuth):
    """Signs the names of all headers that S3 knows; the canonical request has only those that come."""

    def signed_headers(self, headers_to_sign: Any) -> str:
        """Name them in order."""
        names: str = super().signed_headers(headers_to_sign)
        return ";".join(sorted({*names.split(";"), *_known_headers()}))


AUTH_TYPE_MAPS[f"{SEALED}-query"] = _Sealed


@cache
def _known_headers() -> frozenset[str]:
    """The ``x-amz-*`` headers that botocore knows of S3's requests which write: those of a copy, too."""
    model = botocore.session.get_session().get_service_model("s3")
    shapes = (model.operation_model(name).input_shape for name in ("PutObject", "CopyObject", "UploadPart", "UploadPartCopy"))
    members = (member.serialization for shape in shapes if shape for member in shape.members.values())
    names = {one["name"].lower() for one in members if one.get("location") == "header"}
    return frozenset(name for name in names if name.startswith("x-amz-"))
