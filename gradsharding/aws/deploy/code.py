"""A function's code is stored in S3 under its own SHA-256, in a bucket of this account; it is compared, never trusted.

CloudFormation reads code from S3 only, and before the stack exists. Without ``--code-bucket``, the bucket is ours, one per region:
``gradsharding-code-ACCOUNT-REGION``; it is deleted with the last stack.
"""

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained
from gradsharding.aws.deploy.account import TAG, Account, Tell
from gradsharding.aws.deploy.bundle import build
from gradsharding.aws.reasons import scrubbed
from gradsharding.aws.refusals import DENIED, code_of
from gradsharding.errors import StackFailed, StoreRefused, UserError

CodeUri = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)/([A-Za-z0-9-]+)/([0-9a-f]{64})\.zip")
"""The code's address in a template: bucket, stack, SHA-256."""

_VERSION = re.compile(
    r"""\{"?Bucket"?: "?([a-z0-9][a-z0-9.-]+)"?, "?Key"?: "?([A-Za-z0-9-]+)/([0-9a-f]{64})\.zip"?, "?Version"?: "([^"\\]+)"\}"""
)
"""The same with the object's version, where the bucket keeps versions."""

UNVERSIONED = "null"
"""S3's version of an object that was written while its bucket kept no versions."""


class Code(NamedTuple):
    """A function's code in S3."""

    bucket: str
    name: str
    """Name of the stack."""
    digest: str
    """SHA-256 of the zip, hexadecimal."""
    version: str = UNVERSIONED
    """Version of the object, which makes sure that the deployed code is the compared one, even if it is overwritten meanwhile."""

    @property
    def key(self) -> str:
        """Its key in the bucket."""
        return f"{self.name}/{self.digest}.zip"

    @property
    def url(self) -> str:
        """Its URL, for people."""
        return f"s3://{self.bucket}/{self.key}"

    @property
    def uri(self) -> str:
        """Its address, for the template."""
        if self.version == UNVERSIONED:
            return self.url
        return f'{{Bucket: {self.bucket}, Key: {self.key}, Version: "{self.version}"}}'

    @property
    def sha256(self) -> str:
        """The digest in base64, as Lambda and S3 write it."""
        return base64.b64encode(bytes.fromhex(self.digest)).decode()


Zipped = Callable[[str, str, Tell], bytes]
"""Builds the zip of a function's code for an architecture and a runtime."""


def zipped(architecture: str, runtime: str, tell: Tell, *, locked: bool = False) -> bytes:
    """Build the bundle and return its zip; if ``locked``, from the packages that the release lists."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = build(Path(scratch) / "bundle", architecture, runtime.removeprefix("python"), locked=locked)
        path = Path(scratch) / "bundle.zip"
        size = bundle.zip(path)
        tell(f"bundle for {architecture}, {runtime}: {bundle.unzipped / 1e6:.1f} MB, zipped {size / 1e6:.1f} MB; {bundle.described()}")
        return path.read_bytes()


def code_of_template(template: str | Mapping[str, Any]) -> Code | None:
    """Find the code that our deployed template names; None if it names no code that deploy uploaded."""
    text = template if isinstance(template, str) else json.dumps(template)
    found = _VERSION.search(text) or CodeUri.search(text)
    return Code(*found.groups()) if found else None


def own_bucket(account: Account) -> str:
    """Name of the bucket that we create for code."""
    return f"gradsharding-code-{account.number}-{account.region}"


def put_code(account: Account, name: str, bucket: str | None, data: bytes, stale: str = "") -> Code:
    """Upload a zip for the template; upload it again if its version is ``stale``, as a function has other code than that version.

    Raise StoreRefused for a bucket of another account, UserError for other code under the same key.
    """
    code = Code(bucket or own_bucket(account), name, hashlib.sha256(data).hexdigest())
    try:
        if bucket is None:
            _make_bucket(account, code.bucket)
        has, version = _digest(account, code) or (code.digest, "")
        doubtful = {"", stale, *([UNVERSIONED] if _keeps_versions(account, code.bucket) else [])}
        if has == code.digest and version in doubtful:
            made = account.s3.put_object(  # S3 checks the digest
                Bucket=code.bucket, Key=code.key, Body=data, ChecksumSHA256=code.sha256, Metadata={TAG: name}
            )
            version = made.get("VersionId", UNVERSIONED)
            if version != UNVERSIONED:  # in a bucket that has just begun to keep versions, S3 may not find it at first
                account.s3.get_waiter("object_exists").wait(Bucket=code.bucket, Key=code.key, VersionId=version)
    except (BotoCoreError, ClientError) as error:
        raise _refused(account, code.bucket, error, "writing the function's code to") from error
    if has != code.digest:
        raise UserError(f"{code.url} holds other code: its SHA-256 is {has}; find out who wrote it, delete it, and run this again")
    return code._replace(version=version)


def forget_code(account: Account, name: str, bucket: str, keep: Code | None = None) -> int:
    """Delete a stack's code, except ``keep``, and our own bucket if it is empty then; return the number of deleted objects.

    In an existing bucket, delete only what we uploaded: an object with such a name may be the user's.
    """
    try:
        doomed = [version for version in _versions(account, bucket, f"{name}/") if CodeUri.fullmatch(f"s3://{bucket}/{version['Key']}")]
        doomed = [version for version in doomed if not keep or (bucket, version["Key"]) != (keep.bucket, keep.key)]
        if bucket != own_bucket(account):
            strange = {version["Key"] for version in doomed if not _is_ours(account, name, bucket, version)}
            doomed = [version for version in doomed if version["Key"] not in strange]
        delete_objects(account, bucket, doomed)
        if bucket == own_bucket(account) and not next(_versions(account, bucket), None):
            account.s3.delete_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        if code_of(error) not in ("NoSuchBucket", "BucketNotEmpty"):  # another stack's code has just been uploaded
            raise _refused(account, bucket, error, "deleting old code from") from error
        return 0
    return len(doomed)


def delete_objects(account: Account, bucket: str, objects: list[dict[str, str]]) -> None:
    """Delete versions of objects, given by Key and VersionId; raise StackFailed if S3 keeps one."""
    for i in range(0, len(objects), 1000):
        batch: Any = objects[i : i + 1000]
        if kept := account.s3.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True}).get("Errors"):
            raise StackFailed(
                f"bucket {bucket} keeps {len(kept)} objects, the first of them {kept[0].get('Key')!r}: {scrubbed(kept[0].get('Message'))}; "
                "remove the obstacle, and run this again"
            )


def _is_ours(account: Account, name: str, bucket: str, version: Mapping[str, str]) -> bool:
    """Whether ``put_code`` wrote a version of an object, according to its metadata; a delete marker has none, and may be deleted."""
    try:
        return account.s3.head_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])["Metadata"].get(TAG) == name
    except ClientError as error:
        if code_of(error) in ("403", "AccessDenied"):
            return False
        if code_of(error) in ("404", "405", "MethodNotAllowed"):
            return True
        raise


def _versions(account: Account, bucket: str, prefix: str = "") -> Iterator[dict[str, str]]:
    for page in account.s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
        for version in (*page.get("Versions", []), *page.get("DeleteMarkers", [])):
            yield {"Key": version["Key"], "VersionId": version["VersionId"]}


def _make_bucket(account: Account, bucket: str) -> None:
    """Create the bucket if it is missing, and close it to the public, each time: an earlier run may have been interrupted."""
    where: Any = {} if account.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": account.region}}
    try:
        account.s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if code_of(error) not in ("404", "NoSuchBucket"):
            raise
        with suppress(account.s3.exceptions.BucketAlreadyOwnedByYou):
            account.s3.create_bucket(Bucket=bucket, **where)
    block: Any = dict.fromkeys(("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True)
    account.s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=block)
    if not _keeps_versions(account, bucket):  # so that a template can name the exact object that was compared
        account.s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    only_tls = {
        "Sid": "TlsOnly",
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:{account.partition}:s3:::{bucket}", f"arn:{account.partition}:s3:::{bucket}/*"],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
    policy = _policy(account, bucket)
    if only_tls not in policy["Statement"]:  # statements of others stay
        kept = [statement for statement in policy["Statement"] if statement.get("Sid") != only_tls["Sid"]]
        account.s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({**policy, "Statement": [*kept, only_tls]}))
    tags = _tags(account, bucket)
    if tags.get(TAG) != "code":
        wanted: Any = [{"Key": key, "Value": value} for key, value in {**tags, TAG: "code"}.items() if not key.startswith("aws:")]
        account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": wanted})


def _policy(account: Account, bucket: str) -> dict[str, Any]:
    try:
        policy = json.loads(account.s3.get_bucket_policy(Bucket=bucket)["Policy"])
    except ClientError as error:
        if code_of(error) != "NoSuchBucketPolicy":
            raise
        policy = {"Version": "2012-10-17", "Statement": []}
    statements = policy["Statement"]
    return {**policy, "Statement": statements if isinstance(statements, list) else [statements]}


def _tags(account: Account, bucket: str) -> dict[str, str]:
    try:
        return {tag["Key"]: tag["Value"] for tag in account.s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}
    except ClientError as error:
        if code_of(error) != "NoSuchTagSet":
            raise
        return {}


def _keeps_versions(account: Account, bucket: str) -> bool:
    return account.s3.get_bucket_versioning(Bucket=bucket).get("Status") == "Enabled"


def _digest(account: Account, code: Code) -> tuple[str, str] | None:
    """Read the object under the code's key; return its SHA-256 and its version, or None if there is none."""
    try:
        found = account.s3.get_object(Bucket=code.bucket, Key=code.key)
    except ClientError as error:
        if code_of(error) in ("NoSuchKey", "404"):
            return None
        raise
    digest, body = hashlib.sha256(), found["Body"]
    with body:
        for chunk in body.iter_chunks(1 << 20):
            digest.update(chunk)
    return digest.hexdigest(), found.get("VersionId", UNVERSIONED)


def _refused(account: Account, bucket: str, error: BotoCoreError | ClientError, doing: str) -> Exception:
    if code_of(error) in DENIED or code_of(error) in ("BucketAlreadyExists", "NoSuchBucket"):
        return StoreRefused(
            f"{doing} bucket {bucket}: it is not account {account.number}'s, or it denies access to these credentials ({code_of(error)}); "
            "choose a bucket of yours with --code-bucket",
            code=code_of(error),
        )
    if code_of(error) == "OperationAborted":  # the name of a deleted bucket is not free at once
        return StackFailed(
            f"{doing} bucket {bucket}: S3 is still at work on a bucket of that name ({error}); run this again in a few minutes"
        )
    return explained(error, f"{doing} {bucket}")
