"""The server presigns URLs that read or write one object: each is bound to key, verb, size and digest, and expires soon.

The store must refuse ``x-amz-*`` headers that are not signed. Otherwise the holder of a URL for writing could do more: with
``x-amz-copy-source``, a PUT copies any object that the signer's keys can read; with ``x-amz-acl``, it makes one public. AWS requires
every such header to be signed (https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html) and answers AccessDenied,
"There were headers present in the request which were not signed". Ceph 16 obeys them. There, URLs are *sealed*: the signature covers the
names of headers that are absent, so that adding one of them breaks it. A trial before the first URL shows which of the two a store needs;
if neither helps, no URL is presigned.
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
from gradsharding.aws.demands import TRUST, demanded, headers_of
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
"""Shortest useful life of a URL, in seconds."""

PIECE = 64 << 20
"""Bytes of a piece; an object of at most one piece is written by one request."""

SEALED = "gradsharding-sealed"
"""Name of the signature of sealed URLs in botocore."""

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
    """Return a URL by which anyone can read the object under ``key`` for ``lasting(seconds)`` seconds."""
    return _signed(store.client, "get_object", "GetObject", {"Bucket": store.bucket, "Key": store.place(key)}, lasting(seconds))


def lasting(seconds: int) -> int:
    """Return the seconds for which a URL is valid: at most ``seconds``, as it expires with the credentials that sign it.

    Credentials that expire before half of ``seconds`` are renewed first. Raise StoreRefused if they cannot be renewed, or if the new ones
    do not last half of ``seconds`` either. A session token without an expiry time is assumed to last.
    """
    left = seconds_left(seconds / 2)
    if left is None or left >= seconds:
        return seconds
    if left < max(seconds / 2, 1):
        ends = f"expire in {left:.0f} s" if left >= 0 else "have expired"
        shorter = f"let URLs last {int(left)} s, or " if left >= MINUTE else ""
        raise StoreRefused(
            f"URLs should last {seconds} s, and the credentials that sign them {ends}, and the URLs with them; "
            f"{shorter}use credentials that last longer"
        )
    return int(left)


def grant(store: S3Store, key: str, offer: Offer, seconds: int) -> Grant:
    """Permit the creation of the offered object, and of no other, under ``key``, for ``lasting(seconds)`` seconds.

    The URL of a single piece requires that the object does not exist. Several pieces go into an upload, which ``settle`` completes.
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
    """Check that the permitted bytes have arrived, publish them, and return the first of them. A second call changes nothing.

    Raise InvalidUpdate if they have not arrived, or if other bytes have.
    """
    key, offer = granted.key, granted.offer
    try:
        if granted.upload:
            with contextlib.suppress(MissingObject, ObjectExists):  # an earlier call may have completed it
                store.complete(key, granted.upload, {number: piece.size for number, piece in enumerate(offer.pieces, 1)})
        peeked = store.peek(key, FIRST_READ)
    except MissingObject:
        raise InvalidUpdate(f"nothing has arrived under {key}, where {offer.nbytes} bytes were offered and permitted") from None
    size, version = peeked.stat
    if size != offer.nbytes:
        raise InvalidUpdate(f"{size} bytes have arrived under {key}, where {offer.nbytes} were offered and permitted")
    if version.strip('"') != etag(offer) and not _as_offered(store, key, offer, version):
        raise InvalidUpdate(f"the {size} bytes that have arrived under {key} are not those that were offered and permitted")
    return peeked


def etag(offer: Offer) -> str:
    """Return the ETag of an object that was written as offered, unless S3 encrypts it with a KMS key or a customer's key.

    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html; for several parts, it is the MD5 of their MD5s, and their number.)
    """
    digests = [b64decode(piece.md5) for piece in offer.pieces]
    return digests[0].hex() if len(digests) == 1 else f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def settling(store: S3Store, offer: Offer, header_bytes: int) -> Usage:
    """Upper bound of the usage for permitting and settling an offer of an update, and reading its header.

    An update that is encrypted with a KMS key is read once more, to compare its digest; this is counted only if the environment demands
    the key, and not if the bucket uses one by default.
    """
    count = len(offer.pieces)
    upload = Usage(puts=1) + store.charges.whole(count) if count > 1 else Usage()
    if demanded().get("ServerSideEncryption", "").startswith("aws:kms"):
        upload += Usage(gets=count, bytes_read=offer.nbytes)
    return upload + inspection(header_bytes, offer.nbytes - header_bytes)


def withdraw(store: S3Store, granted: Grant) -> None:
    """Withdraw a permit that has not been settled; the URL of a single piece just expires."""
    if granted.upload:
        store.abort(granted.key, granted.upload)


def try_out(store: S3Store) -> "S3Client":
    """Return the client that signs URLs for writing: one whose URLs permit nothing but what they say.

    The first call for a store tries it with empty objects below ``.gradsharding/``, which it deletes: three PUT requests on AWS, five on
    Ceph 16. Raise StoreRefused if the store obeys headers that are not signed, or if it cannot be written to.
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
        f"{plain.meta.endpoint_url} obeys an x-amz-copy-source header that a presigned URL does not sign: a node could read all that the "
        f"server's keys can; use another S3 server, or give nodes keys of their own (presigned=False), or, if each node may do what the "
        f"server's keys can, set {TRUST}=1"
    )


_EMPTY = Piece(size=0, md5=b64encode(hashlib.md5(b"", usedforsecurity=False).digest()).decode())


def _writable(signer: "S3Client", store: S3Store, place: str, piece: Piece, seconds: int, **bound: Any) -> str:
    """Return a URL for writing a piece: as an object, or as a part if ``bound`` names an upload."""
    verb, operation = ("upload_part", "UploadPart") if "UploadId" in bound else ("put_object", "PutObject")
    parameters = {"Bucket": store.bucket, "Key": place, "ContentLength": piece.size, "ContentMD5": piece.md5}
    return _signed(signer, verb, operation, parameters | bound, seconds)


def _signed(signer: "S3Client", verb: str, operation: str, parameters: Any, seconds: int) -> str:
    with explaining(f"signing a URL for {operation} of s3://{parameters['Bucket']}/{parameters['Key']}"):
        url = signer.generate_presigned_url(verb, Params=parameters, ExpiresIn=seconds)
    return with_headers(url, headers_of(signer, operation))


def _as_offered(store: S3Store, key: str, offer: Offer, version: str) -> bool:
    """Whether the object has the digests that were offered; it is read."""
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
    """Signs the names of all headers that S3 knows; the canonical request has only those that are present."""

    def signed_headers(self, headers_to_sign: Any) -> str:
        """Return their names, sorted."""
        names: str = super().signed_headers(headers_to_sign)
        return ";".join(sorted({*names.split(";"), *_known_headers()}))


AUTH_TYPE_MAPS[f"{SEALED}-query"] = _Sealed


@cache
def _known_headers() -> frozenset[str]:
    """The ``x-amz-*`` headers of S3's writing requests, copies included, according to botocore."""
    model = botocore.session.get_session().get_service_model("s3")
    shapes = (model.operation_model(name).input_shape for name in ("PutObject", "CopyObject", "UploadPart", "UploadPartCopy"))
    members = (member.serialization for shape in shapes if shape for member in shape.members.values())
    names = {member["name"].lower() for member in members if member.get("location") == "header"}
    return frozenset(name for name in names if name.startswith("x-amz-"))
