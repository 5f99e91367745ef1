"""A stack is deleted before its data, and data only on request; what stays is named.

Only the bucket that CloudFormation created from our template is ever emptied. Once its stack is gone, it is recognized by our tag and
CloudFormation's, or by the stack's events. An existing bucket that a stack was given is never emptied, even if an earlier stack had
created it, nor is one that somebody added to the stack.
"""

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained
from gradsharding.aws.deploy.account import DATA, TAG, Account, Resource, Stack, Tell
from gradsharding.aws.deploy.code import code_of_template, delete_objects, forget_code, own_bucket
from gradsharding.aws.refusals import DENIED, code_of
from gradsharding.errors import StackFailed, StoreRefused, UserError

COUNTED = 100_000
"""Objects to count before the question, at most."""

_CLOUDFORMATION = "aws:cloudformation:"
_BY = f"{_CLOUDFORMATION}stack-name"
_LABEL = f"{TAG}-stack"
"""Key of our own tag with the stack's ARN."""


class Bucket(NamedTuple):
    """A bucket, and all versions of the objects in it."""

    name: str
    objects: int
    nbytes: int
    more: bool = False
    """Whether there are more than were counted."""


class Doomed(NamedTuple):
    """What there is to delete."""

    stack: Stack | None
    resources: list[Resource]
    """The stack's resources, except its buckets."""
    buckets: list[Bucket]
    """The stack's own buckets, or those that a deleted stack has left."""
    earlier: list[Bucket]
    """Buckets that earlier stacks of its name have left; they stay while it exists."""
    code: str
    """The bucket of its code."""
    held: tuple[Resource, ...] = ()
    """All resources of the stack, as shown."""
    hidden: tuple[str, ...] = ()
    """Buckets of this account that may belong to this or an earlier stack, and cannot be read."""
    brought: str = ""
    """The existing bucket that the stack was given; it stays."""
    kept: frozenset[str] = frozenset()
    """Logical ids of the resources that stay."""


class Cleared(NamedTuple):
    """The outcome for a stack's code."""

    objects: int
    """Number of deleted objects."""
    kept: str
    """Why code may be left; "" if none is."""


def doomed(account: Account, name: str, tell: Tell) -> Doomed:
    """Find what is to be deleted; raise UserError for a stack that is not ours, or is protected."""
    found = account.find(name)
    stack = account.settled(found, tell) if found else None
    left, hidden = _left(account, name)
    if not stack or stack.status == "DELETE_COMPLETE":
        before = account.deleted(name)
        brought = before.parameters.get("ExistingBucket", "") if before else ""
        return Doomed(None, [], [_counted(account, bucket) for bucket in left], [], _code_bucket(account, before), (), (*hidden,), brought)
    if stack.protected:
        raise UserError(
            f"stack {name} in {account} has termination protection, and nothing was deleted; switch it off first: "
            f"aws cloudformation update-termination-protection --no-enable-termination-protection --stack-name {name}"
        )
    held = account.resources(stack)
    there = {resource.physical: _exists(account, resource.physical) for resource in held if resource.is_data and resource.physical}
    hidden = [*{*hidden, *(bucket for bucket, seen in there.items() if seen is None)}]
    names = [bucket for bucket, seen in there.items() if seen and bucket not in hidden]
    earlier = [_counted(account, bucket) for bucket in left if bucket not in there]
    others = [resource for resource in held if not resource.is_data]
    kept = frozenset(account.kept(stack)) if others else frozenset[str]()
    own, code = [_counted(account, bucket) for bucket in names], _code_bucket(account, None if stack.empty else stack)
    return Doomed(stack, others, own, earlier, code, (*held,), (*hidden,), stack.parameters.get("ExistingBucket", ""), kept)


def take_down(account: Account, name: str, targets: Doomed, *, data: bool, tell: Tell, role: str | None = None) -> Cleared:
    """Delete the stack, with ``role`` if that is given; then, with ``data``, its buckets; then its code.

    Raise StackFailed with CloudFormation's reason if the stack is not deleted; all data is kept then. Raise UserError, before anything is
    deleted, if a bucket that may hold the stack's data cannot be read.
    """
    if data and targets.hidden:
        raise UserError(
            f"bucket {targets.hidden[0]} may hold data of stack {name}, and these credentials may not read it; nothing was deleted. "
            "Use credentials that may, or leave --delete-data out"
        )
    try:
        if targets.stack:
            _check_same(account, targets.stack, targets)
            for bucket in targets.buckets:
                _label(account, bucket.name, targets.stack)
            _delete_stack(account, targets.stack, role, tell)
        for bucket in targets.buckets if data else ():
            tell(f"emptying and deleting bucket {bucket.name}")
            _delete_bucket(account, bucket.name)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"taking down stack {name} in {account}") from error
    objects, kept = 0, ""
    try:
        objects += forget_code(account, name, targets.code)
    except StoreRefused as error:  # the stack is gone, and no later run could do it either
        owner = f"another account's by now, or closed to these credentials ({error.details.get('code')})"
        kept = f"code in bucket {targets.code}, which is {owner}"
    if targets.code != own_bucket(account):
        with suppress(StoreRefused):  # it may have code of an earlier deploy
            objects += forget_code(account, name, own_bucket(account))
    return Cleared(objects, kept)


def _check_same(account: Account, stack: Stack, targets: Doomed) -> None:
    """Raise StackFailed if a stack has changed since it was shown: nobody agreed to delete what was added since."""
    now = account.find(stack.name)
    held = {resource[:3] for resource in account.resources(now)} if now else set()
    if not now or now.id != stack.id or held != {resource[:3] for resource in targets.held}:
        raise StackFailed(
            f"stack {stack.name} in {account} was changed by another command since it was shown; nothing was deleted, run this again"
        )


def _delete_stack(account: Account, stack: Stack, role: str | None, tell: Tell) -> None:
    tell(f"deleting stack {stack.name}")
    token = f"gradsharding-{uuid.uuid4().hex}"
    taken: Any = {"RoleARN": role} if role else {}  # else CloudFormation uses the stack's own role
    account.formation.delete_stack(StackName=stack.id, ClientRequestToken=token, **taken)
    gone = account.done(stack, token, tell)
    if gone.status != "DELETE_COMPLETE":
        raise StackFailed(
            f"stack {stack.name} in {account} is {gone.status}: {account.failure(gone, token) or 'its events give no reason'}; "
            "no data was deleted; remove the obstacle, and run this again"
        )


def _code_bucket(account: Account, stack: Stack | None) -> str:
    """Name of the bucket with a stack's code; CloudFormation keeps the template of a deleted stack for 90 days."""
    code = code_of_template(account.template(stack)) if stack else None
    return code.bucket if code else own_bucket(account)


def _left(account: Account, name: str) -> tuple[list[str], list[str]]:
    """Return the buckets that stacks of a name have left in this region, and those that may be such but cannot be read.

    CloudFormation names them after the stack, and they have our tag.
    """
    try:
        pages = account.s3.get_paginator("list_buckets").paginate(Prefix=f"{name.lower()[:24]}", BucketRegion=account.region)
        names = [
            bucket["Name"]
            for page in pages
            for bucket in page.get("Buckets", [])
            if bucket.get("BucketRegion", account.region) == account.region
        ]
        tags = {bucket: _tags(account, bucket) for bucket in names}
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"buckets of {account}") from error
    begins, rest = re.escape(name.lower()[:24]), re.escape(name.lower()[24:])  # CloudFormation may shorten a long name
    called = re.compile(f"{begins}({rest})?-?{DATA[0].lower()}-[a-z0-9]+")  # any other bucket without access is somebody else's
    hidden = [bucket for bucket in names if tags[bucket] is None and called.fullmatch(bucket)]
    tagged = {bucket: own_tags for bucket, own_tags in tags.items() if own_tags and own_tags.get(TAG) == name}
    own = [bucket for bucket, own_tags in tagged.items() if _is_made(account, name, bucket, own_tags)]
    try:
        return [bucket for bucket in own if bucket not in account.brought()] if own else [], hidden
    except StoreRefused:  # they may be in use
        return [], [*hidden, *own]


def _is_made(account: Account, name: str, bucket: str, tags: Mapping[str, str]) -> bool:
    """Whether a bucket with our tag was created from our template; the tag alone proves nothing, as a stack's tags go to all its buckets.

    Only CloudFormation sets tags that begin with ``aws:``. Where it sets none, as in ministack, our label or the events decide.
    """
    if _BY not in tags:
        return f":stack/{name}/" in tags.get(_LABEL, "") or bucket in account.made(name)
    origin = account.look_up(tags[f"{_CLOUDFORMATION}stack-id"]) if f"{_CLOUDFORMATION}stack-id" in tags else None
    named = (tags[_BY], tags.get(f"{_CLOUDFORMATION}logical-id"))
    return named == (name, DATA[0]) and not (origin and account.foreign(origin))


def disown(account: Account, bucket: str) -> None:
    """Remove our tags from an existing bucket, so that no ``destroy`` takes it for a stack's own from now on; other tags stay."""
    tags = _tags(account, bucket) or {}
    kept = {key: value for key, value in tags.items() if key not in (TAG, _LABEL)}
    try:
        if kept and kept != tags:
            _tag(account, bucket, kept)
        elif tags and not kept:
            account.s3.delete_bucket_tagging(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"taking tag {TAG!r} off bucket {bucket}, so that it is yours and no stack's") from error


def _label(account: Account, bucket: str, stack: Stack) -> None:
    """Add our tag and the stack's ARN to its bucket before the stack is deleted, so that a later run finds it; other tags stay."""
    tags = _tags(account, bucket)
    if tags is not None and tags != (wanted := tags | {TAG: stack.name} | ({} if _BY in tags else {_LABEL: stack.id})):
        with suppress(account.s3.exceptions.NoSuchBucket):
            _tag(account, bucket, wanted)


def _tag(account: Account, bucket: str, tags: Mapping[str, str]) -> None:
    wanted: Any = [{"Key": key, "Value": value} for key, value in tags.items()]
    account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": wanted})


def _tags(account: Account, bucket: str) -> dict[str, str] | None:
    """Return a bucket's tags, empty if it is gone; None if it cannot be read."""
    try:
        return {tag["Key"]: tag["Value"] for tag in account.s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}
    except ClientError as error:
        if code_of(error) in ("NoSuchTagSet", "NoSuchBucket"):
            return {}
        if code_of(error) in DENIED:
            return None
        raise


def _counted(account: Account, bucket: str) -> Bucket:
    objects = nbytes = 0
    try:
        for version in _versions(account, bucket):
            objects, nbytes = objects + 1, nbytes + version.get("Size", 0)
            if objects == COUNTED:
                return Bucket(bucket, objects, nbytes, more=True)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"counting the objects of bucket {bucket}") from error
    return Bucket(bucket, objects, nbytes)


def _versions(account: Account, bucket: str) -> Iterator[Any]:
    with suppress(account.s3.exceptions.NoSuchBucket):
        for page in account.s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
            yield from (*page.get("Versions", []), *page.get("DeleteMarkers", []))


def _delete_bucket(account: Account, bucket: str) -> None:
    """Delete all versions and unfinished uploads, and the bucket; it may be gone already."""
    with suppress(account.s3.exceptions.NoSuchBucket):
        batch: list[dict[str, str]] = []
        for version in _versions(account, bucket):
            batch.append({"Key": version["Key"], "VersionId": version["VersionId"]})
            if len(batch) == 1000:  # S3 deletes at most 1000 keys in one request
                delete_objects(account, bucket, batch)
                batch = []
        delete_objects(account, bucket, batch)
        for page in account.s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket):
            for upload in page.get("Uploads", []):
                with suppress(account.s3.exceptions.NoSuchUpload):
                    account.s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        account.s3.delete_bucket(Bucket=bucket)


def _exists(account: Account, bucket: str) -> bool | None:
    """Whether a bucket exists in this account; None if it does, but cannot be read."""
    try:
        account.s3.head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        if code_of(error) in ("404", "NoSuchBucket"):
            return False
        if code_of(error) not in DENIED:
            raise explained(error, f"bucket {bucket}") from error
        try:  # S3 also denies another account's bucket; its list has this account's only
            pages = account.s3.get_paginator("list_buckets").paginate(Prefix=bucket)
            return None if any(listed["Name"] == bucket for page in pages for listed in page.get("Buckets", [])) else False
        except (BotoCoreError, ClientError):
            return None
    return True
