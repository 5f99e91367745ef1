"""S3 as a store. Its peculiarities (parts of 5 MiB, pages, empty ranges, lost answers) are hidden here; its client counts requests."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from gradsharding.aws.client import PATIENCE_KEY, s3_client
from gradsharding.aws.dialect import Dialect, dialect
from gradsharding.aws.patience import ATTEMPTS, THROTTLES, Patience, pause
from gradsharding.aws.refusals import code_of
from gradsharding.aws.s3 import address
from gradsharding.aws.s3.body import Body
from gradsharding.aws.s3.failures import REMEDY, Request, explaining, failure
from gradsharding.aws.s3.ranged import Answer, Ask, first_of, stream
from gradsharding.errors import InvalidId, MissingObject, StoreFailed, StoreRefused, UserError
from gradsharding.format.dtypes import Buffer
from gradsharding.planning.platform import CHARGES, GRAIN, LARGEST_PUT, PARALLEL, READING
from gradsharding.stores.charges import Charges
from gradsharding.stores.compose import MINIMUM, Composed, piece
from gradsharding.stores.protocol import Peeked, Reach, Stat, changed, check_arrived, check_key, no_upload, root_of, taken
from gradsharding.usage import carried, count

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import PartTypeDef

    from gradsharding.stores.lending import Lender

BROKEN = (HTTPClientError, IncompleteReadError)
"""The errors that boto3 raises when a body breaks off."""

CHECKSUM = "CRC32"
"""The checksum that S3 checks on arrival, by its name in S3's API; zlib computes it, in a function too
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)."""

FORMER = "CRC32C"
"""The checksum that uploads of earlier releases declare. Each part must have the checksum that its upload declares."""

FETCHING = 32
"""Small objects to read at the same time, at most; more threads read no faster in one process."""

LISTED = ("PartNumber", "ETag", f"Checksum{CHECKSUM}")
"""What the request that completes an upload must say about each part."""


class S3Store:
    """Objects in a bucket, below a prefix: ``s3://bucket/prefix``. Endpoint, region and credentials come from the AWS environment.

    The bucket may be an access point's ARN. What follows it is plain text, as ``aws s3 ls`` prints it: nothing in it is decoded.
    Unfinished work is kept in ``.gradsharding/`` below the prefix, and in multipart uploads; for an object in ``results/``, that
    directory is beside ``results/``.
    """

    grain = GRAIN
    reading = READING
    reach: ClassVar[Reach] = "network"
    in_memory = False

    def __init__(self, url: str) -> None:
        """Use the bucket and prefix of ``url``, without a request. Raise UserError for no bucket, one of S3 Express, or an odd prefix."""
        self.bucket, prefix = address.split(url)
        prefix = prefix.removesuffix("/")
        try:
            self.prefix = f"{check_key(prefix)}/" if prefix else ""
        except InvalidId:
            raise UserError(f"{url!r} cannot hold new objects; choose a prefix without '//', backslashes, '.' and '..'") from None
        self._check: Callable[[str], object] = check_key
        self._root = self.prefix
        self.url = f"s3://{self.bucket}/{self.prefix}".removesuffix("/")

    @classmethod
    def holding(cls, url: str) -> "tuple[S3Store, str]":
        """Return the store that holds an object, and the object's key there: "" if the URL names none, else any key that HTTP can carry.

        Raise UserError for a URL without a bucket, or with one of S3 Express; InvalidId for "." and "..", which HTTP clients resolve.
        """
        bucket, whole = address.split(url)
        head, slash, key = whole.rpartition("/")
        if {".", ".."} & {*whole.split("/")} or "\0" in whole:
            raise InvalidId(f"{url!r} cannot be requested, since HTTP resolves '.' and '..'; copy the object to another key")
        store = cls(f"s3://{bucket}")
        store.prefix, store._check, store._root = head + slash, str, root_of(head + slash)
        store.url = f"s3://{bucket}/{head}".removesuffix("/")
        return store, key

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        """Pickle the URL: another process opens the store anew."""
        return S3Store, (self.url,)

    @property
    def lender(self) -> "Lender":
        """What signs URLs for nodes without credentials."""
        from gradsharding.aws.s3.presign import S3Lender  # noqa: PLC0415 - functions sign nothing

        return S3Lender(self)

    @property
    def client(self) -> "S3Client":
        """boto3's client for the environment as it is now."""
        return s3_client(self.bucket)

    @property
    def dialect(self) -> Dialect:
        """The dialect of the server that the environment names now."""
        return dialect(self.client.meta.endpoint_url)

    @property
    def charges(self) -> Charges:
        """Number of requests that each verb takes on that server."""
        return CHARGES.model_copy(update={"equal": self.dialect.equal_parts, "doubted": not self.dialect.aws})

    def place(self, key: str) -> str:
        """Return S3's own key for a key of this store; raise InvalidId."""
        self._check(key)
        with contextlib.suppress(UnicodeEncodeError):
            if len((self.prefix + key).encode()) <= 1024:
                return self.prefix + key
        raise InvalidId(f"{key!r} is not a key for S3; with its prefix it must be UTF-8 of at most 1,024 bytes")

    def head(self, key: str) -> Stat:
        with self._asking("HeadObject", key):
            found = self.client.head_object(Bucket=self.bucket, Key=self.place(key))
        return Stat(found["ContentLength"], _quoted(found["ETag"]))

    def peek(self, key: str, nbytes: int) -> Peeked:
        ask = self._ranged(key)
        if not (answer := ask(0, nbytes, None)):  # an empty object has no range
            return Peeked(self.head(key), b"")
        first = first_of(answer, ask, nbytes, f"GetObject of {self.url}/{key}", BROKEN)
        return Peeked(Stat(answer.size, _quoted(answer.version)), first)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        return stream(self._ranged(key), start, stop, version, f"GetObject of {self.url}/{key}", BROKEN)

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        body = Body(data)
        if len(body) > LARGEST_PUT:
            return self._put_in_parts(key, body)
        digest = self._digest(body)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                written = self.client.put_object(
                    Bucket=self.bucket, Key=self.place(key), Body=cast("IO[bytes]", body), IfNoneMatch="*", **digest
                )
                return Stat(len(body), _quoted(written["ETag"]))
            except (BotoCoreError, ClientError) as error:
                code = code_of(error)
                if (
                    code == "ConditionalRequestConflict" and attempt < ATTEMPTS
                ):  # two writers at once: S3 has not decided yet which one wins
                    pause(attempt)
                    continue
                retried = isinstance(error, ClientError) and error.response["ResponseMetadata"]["RetryAttempts"]
                if code == "PreconditionFailed" and retried and (ours := self._written(key, body)):
                    return ours
                raise failure(error, self._request("PutObject", key)) from error
        raise AssertionError("unreachable")

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        found = self._list(self.prefix + prefix)
        for place, stat in found if self.dialect.aws else sorted(found):  # SeaweedFS lists directory by directory
            with contextlib.suppress(InvalidId):  # hidden keys, and the "folders" of AWS's console
                yield check_key(place.removeprefix(self.prefix)), stat

    def delete(self, keys: Iterable[str]) -> None:
        self._delete([self.place(key) for key in keys])

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        wanted = [*keys]
        if len(wanted) < 2:  # mostly it is one record, which needs no thread
            yield from zip(wanted, map(self._whole, wanted), strict=True)
            return
        with ThreadPoolExecutor(min(FETCHING, len(wanted)), thread_name_prefix="gradsharding-fetch") as pool:
            yield from zip(wanted, [*pool.map(carried(self._whole), wanted)], strict=True)

    def _whole(self, key: str) -> bytes:
        """Read a small object."""
        with self._asking("GetObject", key):
            return self._all(self.client.get_object(Bucket=self.bucket, Key=self.place(key))["Body"])

    def begin(self, key: str, *, checksum: bool = True) -> str:
        """Begin an upload. With ``checksum``, AWS refuses a part without its CRC-32; other servers check an MD5 where a part has one."""
        kind: Any = {"ChecksumAlgorithm": CHECKSUM} if checksum and self.dialect.aws else {}
        with self._asking("CreateMultipartUpload", key):
            return self.client.create_multipart_upload(Bucket=self.bucket, Key=self.place(key), **kind)["UploadId"]

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        body = Body([data])
        if len(body) > LARGEST_PUT:
            raise UserError(f"part {number} of {key} has {len(body)} bytes; S3 takes at most {LARGEST_PUT} in one part: use more shards")
        if not self.charges.keeps(offset, len(body)):
            self._upload_part(key, upload, number, body)
            return
        with self._asking("ListParts", key, upload=upload):  # raises if there is no such upload
            self.client.list_parts(Bucket=self.bucket, Key=self.place(key), UploadId=upload, MaxParts=1)
        with self._asking("PutObject", key):
            self.client.put_object(
                Bucket=self.bucket, Key=self._keeping(upload, number), Body=cast("IO[bytes]", body), **self._digest(body)
            )

    def parts(self, key: str, upload: str) -> dict[int, int]:
        written, kept = self._arrived(key, upload)
        return {number: part["Size"] for number, part in written.items()} | kept

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        written, kept = self._arrived(key, upload)
        check_arrived(key, sizes, {number: part["Size"] for number, part in written.items()} | kept)
        if not overwrite and self._is_there(key):  # Ceph before 20 ignores the condition below
            raise taken(key, self.url)
        composed = self.charges.composed(sizes, kept)
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="gradsharding-compose") as pool:
            [*pool.map(carried(partial(self._compose, key, upload)), composed)]
        final = (sizes.keys() - kept.keys()) | {part.number for part in composed}
        written = self._written_parts(key, upload)
        if not final <= written.keys():  # SeaweedFS lists no parts of an upload that another caller has just completed
            raise no_upload(key, upload)
        self._check_composed(key, written, composed)
        listed: Any = [{name: value for name, value in written[number].items() if name in LISTED} for number in sorted(final)]
        condition: Any = {} if overwrite else {"IfNoneMatch": "*"}
        with self._asking("CompleteMultipartUpload", key, upload=upload):
            done = self.client.complete_multipart_upload(
                Bucket=self.bucket, Key=self.place(key), UploadId=upload, MultipartUpload={"Parts": listed}, **condition
            )
        self._delete([self._keeping(upload, number) for number in kept])
        if not done["ETag"].strip('"'):  # Ceph 16 returns none
            return self.head(key)
        return Stat(sum(sizes.values()), _quoted(done["ETag"]))

    def abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(MissingObject), self._asking("AbortMultipartUpload", key, upload=upload):
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=self.place(key), UploadId=upload)
        self._delete([place for place, _ in self._list(self._keeping(upload))])

    def _ranged(self, key: str) -> Ask:
        """Return the function that requests a range of an object."""
        place = self.place(key)

        def ask(start: int, stop: int, version: str | None) -> Answer | None:
            condition: Any = {"IfMatch": version} if version else {}
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=place, Range=f"bytes={start}-{stop - 1}", **condition)
            except (BotoCoreError, ClientError) as error:
                if code_of(error) == "InvalidRange":
                    return None
                raise failure(error, self._request("GetObject", key, version=version)) from error
            if version and _quoted(answer["ETag"]) != version:  # rclone, for example, ignores conditions
                answer["Body"].close()
                raise changed(key, version, answer["ETag"])
            return Answer(answer["ETag"], int(answer["ContentRange"].rpartition("/")[2]), answer["Body"])

        return ask

    def _asking(self, operation: str, key: str, *, upload: str | None = None) -> "contextlib.AbstractContextManager[None]":
        """Within, turn errors of botocore's into ours."""
        return explaining(self._request(operation, key, upload=upload))

    def _request(self, operation: str, key: str, *, version: str | None = None, upload: str | None = None) -> Request:
        return Request(operation, key, self.bucket, self.url, self.client.meta.endpoint_url, version, upload)

    def _digest(self, body: Body) -> Any:
        """The checksum that the server compares a body with: CRC-32 on AWS, and elsewhere MD5, which every server knows."""
        return {f"Checksum{CHECKSUM}": body.crc32()} if self.dialect.aws else {"ContentMD5": body.md5()}

    def _check_composed(self, key: str, written: "Mapping[int, PartTypeDef]", composed: Sequence[Composed]) -> None:
        """Raise StoreRefused unless each composed part has its length: rclone answers 200 to a copy, and copies nothing."""
        for part in composed:
            if (found := written[part.number]["Size"]) != part.nbytes:
                raise StoreRefused(
                    f"{self.client.meta.endpoint_url} made part {part.number} of {self.url}/{key} of {found} bytes, not of "
                    f"{part.nbytes}; nothing was published: {REMEDY}",
                    key=key,
                )

    @staticmethod
    def _all(body: "StreamingBody") -> bytes:
        """Read the whole body of a small answer."""
        data = body.read()
        count("s3", bytes_read=len(data))
        return data

    def _is_there(self, key: str) -> bool:
        with contextlib.suppress(MissingObject):
            return bool(self.head(key))
        return False

    def _written(self, key: str, body: Body) -> Stat | None:
        """Return the stat of the object under ``key`` if its bytes are those of ``body``: then it is ours, and only the answer was lost."""
        stat, sent = self.head(key), hashlib.sha256()
        for buffer in body.buffers:
            sent.update(buffer)
        found = hashlib.sha256()
        for chunk in self.get(key, 0, stat.size, version=stat.version):
            found.update(chunk)
        return stat if found.digest() == sent.digest() else None

    def _put_in_parts(self, key: str, body: Body) -> Stat:
        """Create an object that is too large for one request."""
        size = piece(len(body))
        starts = dict(enumerate(range(0, len(body), size), 1))
        upload = self.begin(key)
        try:
            for number, start in starts.items():
                self._upload_part(key, upload, number, body.part(start, start + size))
            return self.complete(key, upload, {number: min(size, len(body) - start) for number, start in starts.items()})
        except BaseException:
            self.abort(key, upload)
            raise

    def _upload_part(self, key: str, upload: str, number: int, body: Body) -> None:
        with self._asking("UploadPart", key, upload=upload):
            self.client.upload_part(
                Bucket=self.bucket,
                Key=self.place(key),
                UploadId=upload,
                PartNumber=number,
                Body=cast("IO[bytes]", body),
                **self._digest(body),
            )

    def _compose(self, key: str, upload: str, part: Composed) -> None:
        """Write a part that consists of kept parts: S3 copies it if it lies within one of them, else it is read and uploaded."""
        spans = [(self._keeping(upload, span.number), f"bytes={span.start}-{span.stop - 1}", span) for span in part.spans]
        if len(spans) == 1 and part.nbytes >= MINIMUM:
            place, wanted, _ = spans[0]
            with self._asking("UploadPartCopy", key, upload=upload):
                self.client.upload_part_copy(
                    Bucket=self.bucket,
                    Key=self.place(key),
                    UploadId=upload,
                    PartNumber=part.number,
                    CopySource={"Bucket": self.bucket, "Key": place},
                    CopySourceRange=wanted,
                )
            return
        data = []
        for place, wanted, span in spans:
            if span.stop > span.start:
                with self._asking("GetObject", key):
                    data.append(self._all(self.client.get_object(Bucket=self.bucket, Key=place, Range=wanted)["Body"]))
        self._upload_part(key, upload, part.number, Body(data))

    def _arrived(self, key: str, upload: str) -> "tuple[dict[int, PartTypeDef], dict[int, int]]":
        """Return the parts that S3 lists, and the bytes of those that are kept as objects."""
        written = self._written_parts(key, upload)
        kept = {int(place.rpartition("/")[2]): stat.size for place, stat in self._list(self._keeping(upload))}
        # where all parts are kept, those that S3 lists come from a composition that was interrupted
        return ({} if kept and self.charges.equal else written), kept

    def _written_parts(self, key: str, upload: str) -> "dict[int, PartTypeDef]":
        with self._asking("ListParts", key, upload=upload):
            pages = [*self.client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=self.place(key), UploadId=upload)]
        if pages[0].get("ChecksumAlgorithm") == FORMER:  # parts that are missing cannot be written: the upload counts as lost
            self.abort(key, upload)
            raise no_upload(key, upload)
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}

    def _keeping(self, upload: str, number: int | None = None) -> str:
        """S3's key of a part that is kept as an object, or the prefix of all that an upload keeps."""
        place = f"{self._root}.gradsharding/uploads/{hashlib.sha256(upload.encode()).hexdigest()[:32]}/"
        return place if number is None else f"{place}{number:05d}"

    def _list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Yield S3's own keys that begin with ``prefix``."""
        with self._asking("ListObjectsV2", prefix):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for found in page.get("Contents", []):
                    yield found["Key"], Stat(found["Size"], _quoted(found["ETag"]))

    def _delete(self, places: Sequence[str]) -> None:
        for i in range(0, len(places), 1000):
            left, patience = places[i : i + 1000], Patience()
            while left:
                key, batch = left[0].removeprefix(self.prefix), {"Objects": [{"Key": place} for place in left], "Quiet": True}
                with self._asking("DeleteObjects", key):
                    failed = self.client.delete_objects(Bucket=self.bucket, Delete=cast("Any", batch)).get("Errors", [])
                left = [item.get("Key", "") for item in failed]
                for item in failed[:1]:
                    code, wait = item.get("Code", ""), patience.after(item.get("Code", ""))
                    metadata: Any = {PATIENCE_KEY: patience} if code in THROTTLES else {}
                    answer: Any = {"Error": {"Code": code, "Message": item.get("Message", "")}, "ResponseMetadata": metadata}
                    error = failure(ClientError(answer, "DeleteObjects"), self._request("DeleteObjects", key))
                    if wait is None or not isinstance(error, StoreFailed):
                        raise error
                    time.sleep(wait)  # S3 throttles, and Ceph fails where another caller deletes the same object at the same time


def _quoted(etag: str) -> str:
    """Return an ETag with its quotes, which some servers omit in XML."""
    return etag if etag.startswith('"') else f'"{etag}"'
