"""A node without credentials reads an object by a presigned URL, offers an object, and writes exactly that by presigned URLs.

A URL is as good as a password until it expires: it appears in no error and in no log. The headers that are signed with it, because the
bucket's owner demands them, follow its "#", which is not sent.
"""

import base64
import contextlib
import hashlib
import logging
import mmap
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import parse_qsl, urlencode

import urllib3
from urllib3.exceptions import HTTPError

from gradsharding.aws.patience import BUSY, FAILURES, Patience, times
from gradsharding.aws.s3.body import Body
from gradsharding.aws.s3.ranged import Answer, first_of, stream
from gradsharding.aws.secrets import without_secrets
from gradsharding.errors import ChangedObject, GradShardingError, StoreFailed, StoreRefused
from gradsharding.format.dtypes import Buffer
from gradsharding.stores.lending import Offer, Permit, Piece
from gradsharding.stores.protocol import Peeked, Stat, changed, missing
from gradsharding.usage import carried, count

PARALLEL = 4
"""Pieces that are sent at the same time."""


def offer(path: Path, piece: int) -> Offer:
    """Return the offer of a file, in pieces of ``piece`` bytes."""
    pieces = []
    with path.open("rb") as file:
        while data := file.read(piece):
            pieces.append(Piece(size=len(data), md5=base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()))
    return Offer(pieces=tuple(pieces))


def write(path: Path, offered: Offer, permit: Permit) -> None:
    """Write a file as it was offered; pieces that are there already stay.

    Raise StoreRefused if the permit has expired, ChangedObject if the file is not the one that was offered, or StoreFailed.
    """
    with path.open("rb") as file:
        data = Body([memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))])  # unmapped with its last view
    single, ends = len(offered.pieces) == 1, accumulate(piece.size for piece in offered.pieces)
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="gradsharding-upload") as pool:
        uploads = [
            pool.submit(carried(_put), piece, url, data.part(end - piece.size, end), single=single)
            for piece, url, end in zip(offered.pieces, permit.urls, ends, strict=True)
        ]
    for upload in uploads:
        upload.result()


def attempt(piece: Piece, url: str, headers: dict[str, str]) -> bool:
    """Write an empty piece by a URL, with more headers than were signed; return whether the store accepted it."""
    answer = _request("PUT", url, "trying out a signed URL", headers=_bound(piece) | headers, body=Body([]))
    answer.drain_conn()
    if answer.status >= 500:
        raise _refused(answer.status, "trying out a signed URL")
    return answer.status < 300


class UrlSource:
    """One object, which is read by a presigned URL."""

    def __init__(self, key: str, url: str) -> None:
        self.key = key
        self._url = url

    def head(self, key: str) -> Stat:
        """Return the object's size and version; raise MissingObject or StoreRefused."""
        return self.peek(key, 1)[0]

    def peek(self, key: str, nbytes: int) -> Peeked:
        """Return the same and the first bytes, as stores do."""
        if key != self.key:
            raise missing(key, f"a URL of {self.key}")
        if not (answer := self._ask(0, nbytes, None)):
            return Peeked(Stat(0, ""), b"")
        return Peeked(Stat(answer.size, answer.version), first_of(answer, self._ask, nbytes, f"reading {key}"))

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Stream bytes ``start`` to ``stop``, as stores do; raise MissingObject, ChangedObject, StoreRefused or StoreFailed."""
        return stream(self._ask, start, stop, version, f"reading {key}")

    def _ask(self, start: int, stop: int, version: str | None) -> Answer | None:
        headers = {"Range": f"bytes={start}-{stop - 1}"} | ({"If-Match": version} if version else {})
        answer = _request("GET", self._url, f"reading {self.key}", headers=headers)
        if answer.status == 206:
            if version and answer.headers["ETag"] != version:  # some servers ignore conditions
                answer.close()
                raise changed(self.key, version, answer.headers["ETag"])
            return Answer(answer.headers["ETag"], int(answer.headers["Content-Range"].rpartition("/")[2]), answer)
        answer.close()
        match answer.status:
            case 416:
                return None
            case 404:
                raise missing(self.key, "the store")
            case 412:
                raise changed(self.key, version, "another")
        raise _refused(answer.status, f"reading {self.key}")


def _put(piece: Piece, url: str, body: Body, *, single: bool) -> None:
    headers = _bound(piece) | ({"If-None-Match": "*"} if single else {})
    answer = _request("PUT", url, "writing the update", headers=headers, body=body)
    answer.drain_conn()
    if answer.status == 400:
        raise ChangedObject("the update is not the one that was offered; offer it anew")
    if answer.status not in (200, 412):  # 412: it was written before, and the URL allows no other bytes
        raise _refused(answer.status, "writing the update")


def _bound(piece: Piece) -> dict[str, str]:
    return {"Content-Length": str(piece.size), "Content-MD5": piece.md5}


def with_headers(url: str, headers: Mapping[str, str]) -> str:
    """Append to a URL, behind "#", the ``x-amz-*`` headers that must be sent with it."""
    return f"{url}#{urlencode(headers)}" if headers else url


def _request(method: str, url: str, doing: str, *, headers: dict[str, str], body: Body | None = None) -> urllib3.BaseHTTPResponse:
    url, _, signed = url.partition("#")
    headers = {name: value for name, value in parse_qsl(signed) if name.lower().startswith("x-amz-")} | headers
    patience, content = Patience(), cast("IO[bytes] | None", body)
    ask = partial(_HTTP.request, method, url, headers=headers, body=content, preload_content=False, decode_content=False, redirect=False)
    while True:
        try:
            answer = ask()
        except (HTTPError, OSError) as error:  # urllib3's message and traceback contain the URL
            if (seconds := patience.broke()) is None:
                broken = f"no answer, {times(patience.broken)} ({type(error).__name__})"
                raise StoreFailed(f"{doing}: {broken}; check the network") from None
        else:
            if answer.status in BUSY:
                code = _code(answer) or str(answer.status)
                if (seconds := patience.too_much()) is None:
                    answer.close()
                    raise patience.error(doing, code, by_url=True)
            elif answer.status not in FAILURES or (seconds := patience.broke()) is None:
                return answer
            answer.drain_conn()
        time.sleep(seconds)
        if body is not None:
            body.seek(0)


def _code(answer: urllib3.BaseHTTPResponse) -> str:
    """Read S3's error code from an answer; "" if there is none, or it does not arrive."""
    with contextlib.suppress(HTTPError, OSError):
        return found[1].decode() if (found := re.search(rb"<Code>(\w{1,64})</Code>", answer.read(4096))) else ""
    return ""


def _refused(status: int, doing: str) -> GradShardingError:
    if status == 403:
        return StoreRefused(
            f"{doing}: the URL, or the session that signed it, has expired, or this machine's clock is wrong; "
            "let URLs last longer, sign them with credentials that last longer, or set the clock"
        )
    return StoreFailed(f"{doing}: the store answered HTTP {status}; run it again")


class _Discreet(logging.Filter):
    """Removes secrets from urllib3's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (safe := without_secrets(text)) != text:
            record.msg, record.args = safe, ()
        return True


for _name in ("urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_Discreet())


class _CountingPool(urllib3.HTTPConnectionPool):
    """Counts each request as it is sent."""

    def urlopen(self, method: str, url: str, body: Any = None, *args: Any, **kwargs: Any) -> urllib3.BaseHTTPResponse:
        count("s3", gets=method == "GET", puts=method == "PUT", bytes_written=0 if body is None else len(body))
        return super().urlopen(method, url, body, *args, **kwargs)


class _CountingSecurePool(_CountingPool, urllib3.HTTPSConnectionPool):
    """The same over TLS."""


_HTTP = urllib3.PoolManager(
    maxsize=PARALLEL,
    blocksize=256 << 10,
    timeout=urllib3.Timeout(connect=10, read=60),
    retries=False,  # ``_request`` retries
)
_HTTP.pool_classes_by_scheme = {"http": _CountingPool, "https": _CountingSecurePool}
