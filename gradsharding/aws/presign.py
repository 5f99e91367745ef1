"""The server lends out its right to read or write one object: each URL is bound to key, verb, size and digest, and soon expires."""

import contextlib
from dataclasses import dataclass

from gradsharding.aws.direct import Offer, Permit
from gradsharding.aws.s3 import S3Store
from gradsharding.errors import InvalidUpdate, MissingObject, ObjectExists
from gradsharding.store.protocol import Peeked
from gradsharding.update import FIRST_READ, inspection
from gradsharding.usage import Usage

EXPIRES = 900
"""Seconds that a URL is good for."""

PIECE = 64 << 20
"""Bytes of a piece: an object of no more is written by one request."""


@dataclass(frozen=True)
class Grant:
    """What was permitted, and the upload that it goes into, if it is more than one piece."""

    key: str
    offer: Offer
    permit: Permit
    upload: str | None


def readable(store: S3Store, key: str, seconds: int) -> str:
    """Give a URL by which anyone may read the object under ``key`` for so many seconds."""
    return store.client.generate_presigned_url("get_object", Params={"Bucket": store.bucket, "Key": store.place(key)}, ExpiresIn=seconds)


def grant(store: S3Store, key: str, offer: Offer, seconds: int) -> Grant:
    """Permit to create the object that is offered, and no other, under ``key``, within so many seconds.

    One piece is written once: its URL demands that there be no such object. Several go into an upload, which ``settle`` completes.
    """
    place = {"Bucket": store.bucket, "Key": store.place(key)}
    if len(offer.pieces) == 1:
        (piece,) = offer.pieces
        bound = {"ContentLength": piece.size, "ContentMD5": piece.md5, "IfNoneMatch": "*"}
        url = store.client.generate_presigned_url("put_object", Params=place | bound, ExpiresIn=seconds)
        return Grant(key, offer, Permit(urls=(url,)), None)
    upload = store.begin(key, checksum=False)
    urls = [
        store.client.generate_presigned_url(
            "upload_part",
            Params=place | {"UploadId": upload, "PartNumber": number, "ContentLength": piece.size, "ContentMD5": piece.md5},
            ExpiresIn=seconds,
        )
        for number, piece in enumerate(offer.pieces, 1)
    ]
    return Grant(key, offer, Permit(urls=tuple(urls)), upload)


def settle(store: S3Store, granted: Grant) -> Peeked:
    """See that what was permitted has arrived, and publish it; give its first bytes. Again, it changes nothing.

    Raise InvalidUpdate if it has not arrived.
    """
    key, offer = granted.key, granted.offer
    try:
        if granted.upload:
            with contextlib.suppress(MissingObject, ObjectExists):  # completed before, maybe
                store.complete(key, granted.upload, {number: piece.size for number, piece in enumerate(offer.pieces, 1)})
        peeked = store.peek(key, FIRST_READ)
    except MissingObject:
        raise InvalidUpdate(f"nothing has arrived under {key}, where {offer.nbytes} bytes were offered and permitted") from None
    if peeked.stat.size != offer.nbytes:
        raise InvalidUpdate(f"{peeked.stat.size} bytes have arrived under {key}, where {offer.nbytes} were offered and permitted")
    return peeked


def settling(store: S3Store, offer: Offer, header_bytes: int) -> Usage:
    """What permitting and settling an offer of an update, and reading its header, asks of the store at most."""
    count = len(offer.pieces)
    upload = Usage(puts=1) + store.charges.whole(count) if count > 1 else Usage()
    return upload + inspection(header_bytes, offer.nbytes - header_bytes)


def withdraw(store: S3Store, granted: Grant) -> None:
    """Forget what was permitted and has not been settled; URLs of single pieces expire by themselves."""
    if granted.upload:
        store.abort(granted.key, granted.upload)
