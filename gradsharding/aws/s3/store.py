"""S3 as a store: its own rules (5 MiB parts, pages, empty ranges, lost answers) end here. Its client counts what it sends."""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from gradsharding.aws.client import PATIENCE, explained, s3_client
from gradsharding.aws.patience import ATTEMPTS, THROTTLES, Patience, pause
from gradsharding.aws.refusals import READS, code_of, scrubbed
from gradsharding.aws.s3.body import Body
from gradsharding.aws.s3.demands import EQUAL_PARTS
from gradsharding.aws.s3.dialect import Dialect, dialect
from gradsharding.aws.s3.ranged import Answer, Ask, first_of, stream
from gradsharding.errors import InvalidId, MissingObject, StoreFailed, StoreRefused, UserError
from gradsharding.format.dtypes import Buffer
from gradsharding.planning.platform import CHARGES, DIRECTORY_BUCKETS, GRAIN, LARGEST_PUT, PARALLEL, READING
from gradsharding.stores.charges import Charges
from gradsharding.stores.compose import MINIMUM, Composed, piece
from gradsharding.stores.protocol import Peeked, Reach, Stat, changed, check_arrived, check_key, missing, no_upload, root_of, taken
from gradsharding.usage import carried, count

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import PartTypeDef

    from gradsharding.stores.lending import Lender

BROKEN = (HTTPClientError, IncompleteReadError)
"""By what boto3 says that an answer broke off."""

CHECKSUM = "CRC32"
"""What S3 compares each body with on arrival, by the name in its API: zlib computes it, in a function too
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)."""

FORMER = "CRC32C"
"""The checksum that uploads of earlier releases declare. All parts of an upload must come with the one that it declares."""

FETCHING = 32
"""Small objects that are read at the same time, at most: more threads do not get more out of one process."""

LISTED = ("PartNumber", "ETag", f"Checksum{CHECKSUM}")
"""What a request to complete an upload must say about each part."""

OTHERS = "use an S3 server that deploy/ENDPOINTS.md says to work"
"""What to do where a server will not do."""

_BUCKET = re.compile(
    r"""s3://(
        arn:aws[a-z-]*:s3:[a-z0-9-]*:[0-9]{12}:accesspoint[/:][A-Za-z0-9.-]{1,63} |
        arn:aws[a-z-]*:s3-outposts:[a-z0-9-]+:[0-9]{12}:outpost[/:][A-Za-z0-9-]{1,63}[/:]accesspoint[/:][A-Za-z0-9-]{1,63} |
        (?:[A-Za-z0-9_]+:)? [A-Za-z0-9] [A-Za-z0-9._-]{1,253} [A-Za-z0-9]
    )(?:/(.*))?""",
    re.VERBOSE | re.DOTALL,
)
"""A bucket's name, and what follows. Ceph allows capitals and "_", and a tenant before a ":"."""


class S3Store:
    """Objects in a bucket, below a prefix: ``s3://bucket/prefix``. Endpoint, region and credentials come from the AWS environment.

    A URL is plain text after the bucket, as ``aws s3 ls`` prints it: nothing in it is decoded. A bucket may be an access point's ARN.
    Unfinished work lies in ``.gradsharding/`` below the prefix, and in multipart uploads; that of an object which a URL names in
    ``results/`` lies beside ``results/``.
    """

    grain = GRAIN
    reading = READING
    reach: ClassVar[Reach] = "network"
    in_memory = False

    def __init__(self, url: str) -> None:
        """Use what ``url`` names; nothing is asked of it yet. Raise UserError for no bucket, one of S3 Express, or an odd prefix."""
        self.bucket, prefix = _parsed(url)
        prefix = prefix.removesuffix("/")
        try:
            self.prefix = f"{check_key(prefix)}/" if prefix else ""
        except InvalidId:
            raise UserError(f"{url!r} is no place for new objects; choose a prefix without '//', backslashes, '.' and '..'") from None
        self._check: Callable[[str], object] = check_key
        self._root = self.prefix
        self.url = f"s3://{self.bucket}/{self.prefix}".removesuffix("/")

    @classmethod
    def holding(cls, url: str) -> "tuple[S3Store, str]":
        """Give the store that an object lies in, and its key there: "" if the URL names none. Any key will do that HTTP can carry.

        Raise UserError for a URL that names no bucket, or one of S3 Express, InvalidId for "." and "..", which HTTP clients resolve.
        """
        bucket, whole = _parsed(url)
        head, slash, key = whole.rpartition("/")
        if {".", ".."} & {*whole.split("/")} or "\0" in whole:
            raise InvalidId(f"{url!r} cannot be asked for as it is, for HTTP resolves '.' and '..'; copy the object to another key")
        store = cls(f"s3://{bucket}")
        store.prefix, store._check, store._root = head + slash, str, root_of(head + slash)
        store.url = f"s3://{bucket}/{head}".removesuffix("/")
        return store, key

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        """Another process opens it anew."""
        return S3Store, (self.url,)

    @property
    def lender(self) -> "Lender":
        """What signs URLs for nodes without credentials."""
        from gradsharding.aws.s3.presign import S3Lender  # noqa: PLC0415 - functions sign nothing

        return S3Lender(self)

    @property
    def client(self) -> "S3Client":
        """boto3's client of the environment as it is now."""
        return s3_client(self.bucket)

    @property
    def dialect(self) -> Dialect:
        """What the server does that the environment leads to now."""
        return dialect(self.client.meta.endpoint_url)

    @property
    def charges(self) -> Charges:
        """Requests that the verbs take there."""
        return CHARGES.model_copy(update={"equal": self.dialect.equal_parts, "doubted": not self.dialect.aws})

    def place(self, key: str) -> str:
        """S3's own key for a key of this store; raise InvalidId."""
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
                if code == "ConditionalRequestConflict" and attempt < ATTEMPTS:  # who wins is not decided yet
                    pause(attempt)
                    continue
                tried_again = isinstance(error, ClientError) and error.response["ResponseMetadata"]["RetryAttempts"]
                if code == "PreconditionFailed" and tried_again and (ours := self._written(key, body)):
                    return ours
                raise self._error(error, "PutObject", key) from error
        raise AssertionError("unreachable")

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        found = self._list(self.prefix + prefix)
        for place, stat in found if self.dialect.aws else sorted(found):  # SeaweedFS lists directory by directory
            with contextlib.suppress(InvalidId):  # hidden, or a console's "folder"
                yield check_key(place.removeprefix(self.prefix)), stat

    def delete(self, keys: Iterable[str]) -> None:
        self._delete([self.place(key) for key in keys])

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        wanted = [*keys]
        if len(wanted) < 2:  # most often it is one record: no thread is started for it
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
            raise UserError(f"part {number} of {key} has {len(body)} bytes; S3 takes {LARGEST_PUT} in one part: use more shards")
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
        if not overwrite and self._is_there(key):  # Ceph before 20 does not know the condition below
            raise taken(key, self.url)
        composed = self.charges.composed(sizes, kept)
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="gradsharding-compose") as pool:
            [*pool.map(carried(partial(self._compose, key, upload)), composed)]
        final = (sizes.keys() - kept.keys()) | {part.number for part in composed}
        written = self._written_parts(key, upload)
        if not final <= written.keys():  # SeaweedFS lists no parts of an upload that another has completed meanwhile
            raise no_upload(key, upload)
        self._check_composed(key, written, composed)
        listed: Any = [{name: value for name, value in written[number].items() if name in LISTED} for number in sorted(final)]
        condition: Any = {} if overwrite else {"IfNoneMatch": "*"}
        with self._asking("CompleteMultipartUpload", key, upload=upload):
            done = self.client.complete_multipart_upload(
                Bucket=self.bucket, Key=self.place(key), UploadId=upload, MultipartUpload={"Parts": listed}, **condition
            )
        self._delete([self._keeping(upload, number) for number in kept])
        if not done["ETag"].strip('"'):  # Ceph 16 does not tell
            return self.head(key)
        return Stat(sum(sizes.values()), _quoted(done["ETag"]))

    def abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(MissingObject), self._asking("AbortMultipartUpload", key, upload=upload):
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=self.place(key), UploadId=upload)
        self._delete([place for place, _ in self._list(self._keeping(upload))])

    def _ranged(self, key: str) -> Ask:
        """Give what asks for a range of an object."""
        place = self.place(key)

        def ask(start: int, stop: int, version: str | None) -> Answer | None:
            condition: Any = {"IfMatch": version} if version else {}
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=place, Range=f"bytes={start}-{stop - 1}", **condition)
            except (BotoCoreError, ClientError) as error:
                if code_of(error) == "InvalidRange":
                    return None
                raise self._error(error, "GetObject", key, version=version) from error
            if version and _quoted(answer["ETag"]) != version:  # rclone, for one, knows no conditions
                answer["Body"].close()
                raise changed(key, version, answer["ETag"])
            return Answer(answer["ETag"], int(answer["ContentRange"].rpartition("/")[2]), answer["Body"])

        return ask

    def _asking(self, verb: str, key: str, *, upload: str | None = None) -> "contextlib.AbstractContextManager[None]":
        """Turn what AWS answers into our errors."""
        return _translating(lambda error: self._error(error, verb, key, upload=upload))

    def _error(
        self, error: BotoCoreError | ClientError, verb: str, key: str, *, version: str | None = None, upload: str | None = None
    ) -> Exception:
        match code_of(error):
            case "NoSuchBucket":
                return StoreRefused(f"there is no bucket {self.bucket!r}; check its name and the region, or create it", key=key)
            case "NoSuchUpload" if upload:
                return no_upload(key, upload)
            case "NoSuchKey" | "404":
                return missing(key, self.url)
            case "PreconditionFailed" | "412" if verb.startswith("Get"):
                return changed(key, version, "another")
            case "PreconditionFailed" | "ConditionalRequestConflict":
                return taken(key, self.url)
        found = self._unable(error, verb, key) or explained(error, f"{verb} of {self.url}/{key}")
        if verb in READS and "denied" in found.details:
            found.details["unread"] = f"{self.url}/{key}"
        return found

    def _unable(self, error: BotoCoreError | ClientError, verb: str, key: str) -> StoreRefused | None:
        """Say what a server that is not AWS's cannot do, if that is what it answers."""
        match code_of(error):
            case "NotImplemented" | "MethodNotAllowed":
                return StoreRefused(f"{verb} of {self.url}/{key}: {self._server} cannot do that ({scrubbed(error)}); {OTHERS}", key=key)
            case "InvalidPart" if "same length" in str(error):
                return StoreRefused(f"{self._server} wants parts of one size; set {EQUAL_PARTS}=1 and run it again", key=key)
        return None

    @property
    def _server(self) -> str:
        """The server's name, for people."""
        return self.client.meta.endpoint_url

    def _digest(self, body: Body) -> Any:
        """The checksum that the server compares a body with: CRC-32 on AWS, and elsewhere MD5, which every server knows."""
        return {f"Checksum{CHECKSUM}": body.crc32()} if self.dialect.aws else {"ContentMD5": body.md5()}

    def _check_composed(self, key: str, written: "Mapping[int, PartTypeDef]", composed: Sequence[Composed]) -> None:
        """Raise StoreRefused unless what was composed is as long as it should be: rclone answers 200 to a copy, and copies nothing."""
        for part in composed:
            if (found := written[part.number]["Size"]) != part.nbytes:
                raise StoreRefused(
                    f"{self._server} was told to make part {part.number} of {self.url}/{key} from {part.nbytes} bytes, and it has {found}; "
                    f"nothing was published: {OTHERS}",
                    key=key,
                )

    @staticmethod
    def _all(body: "StreamingBody") -> bytes:
        """Read a small answer."""
        data = body.read()
        count("s3", bytes_read=len(data))
        return data

    def _is_there(self, key: str) -> bool:
        with contextlib.suppress(MissingObject):
            return bool(self.head(key))
        return False

    def _written(self, key: str, body: Body) -> Stat | None:
        """What is under ``key``, if it is ``body``: an answer that was lost on its way said that it has been written."""
        stat, sent = self.head(key), hashlib.sha256()
        for buffer in body.buffers:
            sent.update(buffer)
        found = hashlib.sha256()
        for chunk in self.get(key, 0, stat.size, version=stat.version):
            found.update(chunk)
        return stat if found.digest() == sent.digest() else None

    def _put_in_parts(self, key: str, body: Body) -> Stat:
        """Create an object that is too large for one PUT."""
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
        """Write a part that is made of kept ones: by S3 itself if it lies in one of them, else through here."""
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
        """The parts that S3 has, and the bytes of those that are kept as objects."""
        written = self._written_parts(key, upload)
        kept = {int(place.rpartition("/")[2]): stat.size for place, stat in self._list(self._keeping(upload))}
        # where all are kept, those that S3 has are of a composition that was interrupted
        return ({} if kept and self.charges.equal else written), kept

    def _written_parts(self, key: str, upload: str) -> "dict[int, PartTypeDef]":
        with self._asking("ListParts", key, upload=upload):
            pages = [*self.client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=self.place(key), UploadId=upload)]
        if pages[0].get("ChecksumAlgorithm") == FORMER:  # its missing parts cannot be written: it counts as lost, and is begun anew
            self.abort(key, upload)
            raise no_upload(key, upload)
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}

    def _keeping(self, upload: str, number: int | None = None) -> str:
        """Place of a part that is kept as an object, or of all of an upload."""
        place = f"{self._root}.gradsharding/uploads/{hashlib.sha256(upload.encode()).hexdigest()[:32]}/"
        return place if number is None else f"{place}{number:05d}"

    def _list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Give S3's own keys that begin with ``prefix``."""
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
                left = [one.get("Key", "") for one in failed]
                for one in failed[:1]:
                    code, wait = one.get("Code", ""), patience.after(one.get("Code", ""))
                    told: Any = {PATIENCE: patience} if code in THROTTLES else {}
                    meta: Any = {"Error": {"Code": code, "Message": one.get("Message", "")}, "ResponseMetadata": told}
                    error = self._error(ClientError(meta, "DeleteObjects"), "DeleteObjects", key)
                    if wait is None or not isinstance(error, StoreFailed):
                        raise error
                    time.sleep(wait)  # S3 may be asked for too much, and Ceph fails where another deletes the same object at the same time


@contextlib.contextmanager
def _translating(translate: Callable[[BotoCoreError | ClientError], Exception]) -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise translate(error) from error


def _parsed(url: str) -> tuple[str, str]:
    """Give the bucket of a URL, and what follows it; raise UserError."""
    if not (found := _BUCKET.fullmatch(url)):
        raise UserError(f"{url!r} names no bucket; write s3://bucket or s3://bucket/prefix")
    if found[1].endswith(("--x-s3", "--xa-s3")):  # by AWS's rules, no other bucket's or access point's name may end so
        raise UserError(f"{found[1]} is an S3 Express bucket, which is no store: {DIRECTORY_BUCKETS}; use a general purpose bucket")
    return found[1], found[2] or ""


def _quoted(etag: str) -> str:
    """An ETag as HTTP writes it; some servers omit the quotes in XML."""
    return etag if etag.startswith('"') else f'"{etag}"'
