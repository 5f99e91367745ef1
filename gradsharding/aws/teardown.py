"""A stack is deleted before its data, and data only if that was asked for; what stays is named.

Only a bucket that CloudFormation made for the stack, or that carries our tag with the stack's name, is ever emptied; one that was brought
is not.
"""

import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.account import TAG, Account, Resource, Stack, Tell
from gradsharding.aws.client import code_of, explained
from gradsharding.aws.code import code_of_template, delete_objects, forget_code, own_bucket
from gradsharding.errors import StackFailed, StoreRefused, UserError

COUNTED = 100_000
"""Objects that are counted, at most, before the question."""


class Bucket(NamedTuple):
    """A bucket, and what lies in it: all versions of objects."""

    name: str
    objects: int
    nbytes: int
    more: bool = False
    """There are more than were counted."""


class Doomed(NamedTuple):
    """What is there to be taken down."""

    stack: Stack | None
    resources: list[Resource]
    """The stack's, but for its buckets."""
    buckets: list[Bucket]
    """The stack's own; of a stack that is gone, those that it left."""
    earlier: list[Bucket]
    """Those that earlier stacks of its name left; they stay while it is there."""
    code: str
    """The bucket of its code."""


def doomed(account: Account, name: str, tell: Tell) -> Doomed:
    """Look for what is to be taken down; raise UserError for a stack that is not ours, or is protected."""
    found = account.find(name)
    stack = account.settled(found, tell) if found else None
    left = _left(account, name)
    if not stack or stack.status == "DELETE_COMPLETE":
        before = account.deleted(name)
        return Doomed(None, [], [_counted(account, bucket) for bucket in left], [], _code_bucket(account, before))
    if stack.protected:
        raise UserError(
            f"stack {name} in {account} is protected against being deleted, and nothing was deleted; take that off first: "
            f"aws cloudformation update-termination-protection --no-enable-termination-protection --stack-name {name}"
        )
    names = [bucket for bucket in account.buckets(stack) if _exists(account, bucket)]
    earlier = [_counted(account, bucket) for bucket in left if bucket not in names]
    others = [one for one in account.resources(stack) if one.type != "AWS::S3::Bucket"]
    own = [_counted(account, bucket) for bucket in names]
    return Doomed(stack, others, own, earlier, _code_bucket(account, None if stack.empty else stack))


def take_down(account: Account, name: str, what: Doomed, *, data: bool, tell: Tell) -> int:
    """Delete the stack, then, with ``data``, its buckets, then its code; give the number of objects of code.

    Raise StackFailed with CloudFormation's reason if it does not delete the stack; then all data is there.
    """
    try:
        if what.stack:
            for bucket in what.buckets:
                _label(account, bucket.name, name)
            _delete_stack(account, what.stack, tell)
        for bucket in what.buckets if data else ():
            tell(f"emptying and deleting bucket {bucket.name}")
            _delete_bucket(account, bucket.name)
        cleared = forget_code(account, name, what.code)
        with suppress(StoreRefused):  # code of an earlier deploy may lie there, too, if it is ours
            cleared += forget_code(account, name, own_bucket(account))
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"taking down stack {name} in {account}") from error
    return cleared


def _delete_stack(account: Account, stack: Stack, tell: Tell) -> None:
    tell(f"deleting stack {stack.name}")
    token = f"gradsharding-{uuid.uuid4().hex}"
    account.formation.delete_stack(StackName=stack.id, ClientRequestToken=token)
    gone = account.done(stack, token, tell)
    if gone.status != "DELETE_COMPLETE":
        raise StackFailed(
            f"stack {stack.name} in {account} is {gone.status}: {account.failure(gone, token) or 'its events give no reason'}; "
            "no data was deleted; take that hindrance away, and run this again"
        )


def _code_bucket(account: Account, stack: Stack | None) -> str:
    """Name the bucket that a stack's code lies in; CloudFormation gives the template of a deleted one for 90 days."""
    code = code_of_template(account.template(stack)) if stack else None
    return code.bucket if code else own_bucket(account)


def _left(account: Account, name: str) -> list[str]:
    """Name the buckets that stacks of that name left in this region: CloudFormation names them after the stack, and they carry our tag."""
    try:
        pages = account.s3.get_paginator("list_buckets").paginate(Prefix=f"{name.lower()[:24]}", BucketRegion=account.region)
        names = [
            one["Name"] for page in pages for one in page.get("Buckets", []) if one.get("BucketRegion", account.region) == account.region
        ]
        return [bucket for bucket in names if (_tags(account, bucket) or {}).get(TAG) == name]
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"buckets of {account}") from error


def _label(account: Account, bucket: str, name: str) -> None:
    """See that a stack's bucket carries our tag before the stack goes, so that a later run finds it; other tags stay."""
    tags = _tags(account, bucket)
    if tags is not None and tags.get(TAG) != name:
        wanted: Any = [{"Key": key, "Value": value} for key, value in (tags | {TAG: name}).items()]
        account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": wanted})


def _tags(account: Account, bucket: str) -> dict[str, str] | None:
    """Give a bucket's tags; None if it is gone, or not to be looked into."""
    try:
        return {tag["Key"]: tag["Value"] for tag in account.s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}
    except ClientError as error:
        if code_of(error) == "NoSuchTagSet":
            return {}
        if code_of(error) in ("NoSuchBucket", "AccessDenied"):
            return None
        raise


def _counted(account: Account, bucket: str) -> Bucket:
    objects = nbytes = 0
    try:
        for one in _versions(account, bucket):
            objects, nbytes = objects + 1, nbytes + one.get("Size", 0)
            if objects == COUNTED:
                return Bucket(bucket, objects, nbytes, more=True)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"counting what lies in bucket {bucket}") from error
    return Bucket(bucket, objects, nbytes)


def _versions(account: Account, bucket: str) -> Iterator[Any]:
    with suppress(account.s3.exceptions.NoSuchBucket):
        for page in account.s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
            yield from (*page.get("Versions", []), *page.get("DeleteMarkers", []))


def _delete_bucket(account: Account, bucket: str) -> None:
    """Delete all versions, all unfinished uploads, and the bucket; it may be gone already."""
    with suppress(account.s3.exceptions.NoSuchBucket):
        some: list[dict[str, str]] = []
        for one in _versions(account, bucket):
            some.append({"Key": one["Key"], "VersionId": one["VersionId"]})
            if len(some) == 1000:  # what S3 deletes at once
                delete_objects(account, bucket, some)
                some = []
        delete_objects(account, bucket, some)
        for page in account.s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket):
            for upload in page.get("Uploads", []):
                with suppress(account.s3.exceptions.NoSuchUpload):
                    account.s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        account.s3.delete_bucket(Bucket=bucket)


def _exists(account: Account, bucket: str) -> bool:
    try:
        account.s3.head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        if code_of(error) in ("404", "NoSuchBucket", "403", "AccessDenied"):  # gone, or another account's by now
            return False
        raise explained(error, f"bucket {bucket}") from error
    return True
