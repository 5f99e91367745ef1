"""One CloudFormation stack is all there is: put up from the template, found again by its name, taken down without a rest.

The function's code has to lie in S3 before the stack is made, so it lies in a bucket beside it, ``gradsharding-code-ACCOUNT-REGION``,
below the stack's name; the last stack that is taken down takes that bucket along.
"""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import boto3
from botocore.exceptions import BotoCoreError, ClientError, WaiterError

from gradsharding.aws.bundle import build
from gradsharding.aws.client import code_of, explained, s3_client
from gradsharding.errors import StackFailed, UserError
from gradsharding.platform import DEPLOYED_RUNTIME

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient
    from mypy_boto3_s3 import S3Client

TEMPLATES = (Path(__file__).with_name("template.yaml"), Path(__file__).parents[2] / "deploy/template.yaml")
"""Where the template is: in an installed package, or in a checkout."""

Tell = Callable[[str], None]


class Deployed(NamedTuple):
    """A stack that is up: what its outputs and parameters say."""

    name: str
    status: str
    outputs: Mapping[str, str]
    parameters: Mapping[str, str]


class Contents(NamedTuple):
    """What taking a stack down deletes beside it."""

    bucket: str | None
    objects: int
    nbytes: int


class Account:
    """The account, region and credentials of the environment, and the clients they give."""

    def __init__(self) -> None:
        """Ask who we are; raise StoreRefused if there are no credentials or no region."""
        session = boto3.session.Session()
        try:
            self.number = session.client("sts").get_caller_identity()["Account"]
            self.region = session.client("s3").meta.region_name
            self.formation: CloudFormationClient = session.client("cloudformation")
            self.logs = session.client("logs")
            self.s3: S3Client = s3_client()
        except (BotoCoreError, ClientError) as error:
            raise explained(error, "looking up the account") from error
        self.code_bucket = f"gradsharding-code-{self.number}-{self.region}"

    def find(self, name: str) -> Deployed | None:
        """Look a stack up by its name."""
        try:
            found = self.formation.describe_stacks(StackName=name)["Stacks"][0]
        except (BotoCoreError, ClientError) as error:
            if code_of(error) == "ValidationError":
                return None
            raise explained(error, f"stack {name}") from error
        outputs = {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", [])}
        parameters = {one["ParameterKey"]: one.get("ParameterValue", "") for one in found.get("Parameters", [])}
        return Deployed(name, found["StackStatus"], outputs, parameters)


def put_up(account: Account, name: str, parameters: Mapping[str, str], tell: Tell) -> Deployed:
    """Make the stack, or change it to ``parameters``; what they leave out stays as it is.

    Raise UserError where the stack is in a state that must be mended first, StackFailed with CloudFormation's reason.
    """
    found = account.find(name)
    if found and found.status == "REVIEW_IN_PROGRESS":  # a change set was made and never run: there is nothing yet
        found = None
    if found and not found.status.endswith(("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE")):
        advice = (
            "wait until it is done" if found.status.endswith("_IN_PROGRESS") else f"take it down first: gradsharding destroy --name {name}"
        )
        raise UserError(f"stack {name} is in state {found.status}; {advice}")
    text = next(path for path in TEMPLATES if path.exists()).read_text()
    takes = parameters_of(text)  # an older template's may be gone, and CloudFormation refuses what it does not know
    known = {name: value for name, value in {**(found.parameters if found else {}), **parameters}.items() if name in takes}
    code = _upload_code(account, name, known.get("Architecture", "arm64"), known.get("Runtime", DEPLOYED_RUNTIME), tell)
    body = text.replace("CodeUri: function/", f"CodeUri: {code}")
    tell(f"{'changing' if found else 'making'} stack {name}")
    change = f"gradsharding-{int(time.time())}"
    given: Any = [{"ParameterKey": key, "ParameterValue": value} for key, value in known.items()]
    kind: Any = "UPDATE" if found else "CREATE"
    try:
        account.formation.create_change_set(
            StackName=name,
            ChangeSetName=change,
            ChangeSetType=kind,
            TemplateBody=body,
            Parameters=given,
            Capabilities=["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
        )
        if not _is_empty(account, name, change):
            account.formation.execute_change_set(StackName=name, ChangeSetName=change)
            account.formation.get_waiter("stack_update_complete" if found else "stack_create_complete").wait(
                StackName=name, WaiterConfig={"Delay": 2, "MaxAttempts": 450}
            )
    except WaiterError as error:
        raise StackFailed(f"stack {name}: {_reason(account, name) or error}") from error
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"stack {name}") from error
    done = account.find(name)
    assert done
    return done


def parameters_of(template: str) -> frozenset[str]:
    """Give the names of a template's parameters."""
    section = re.search(r"^Parameters:\n((?:[ ].*\n|\n)*)", template, re.MULTILINE)
    return frozenset(re.findall(r"^  (\w+):$", section[1], re.MULTILINE)) if section else frozenset()


def contents(account: Account, name: str) -> Contents:
    """Count what the stack's bucket holds."""
    found = account.find(name)
    bucket = found.outputs.get("Bucket") if found else None
    objects = [*_objects(account, bucket)] if bucket else []
    return Contents(bucket, len(objects), sum(size for _, size in objects))


def take_down(account: Account, name: str, tell: Tell) -> list[str]:
    """Delete the stack, its bucket with all objects, its logs and its code; give what is still there: nothing, if all went well."""
    bucket, code = contents(account, name).bucket, account.code_bucket
    try:
        for one, prefix in ((bucket, ""), (code, f"{name}/")):
            if one:
                tell(f"emptying {one}/{prefix}")
                _empty(account, one, prefix)
        tell(f"deleting stack {name}")
        account.formation.delete_stack(StackName=name)
        account.formation.get_waiter("stack_delete_complete").wait(StackName=name, WaiterConfig={"Delay": 2, "MaxAttempts": 450})
        with suppress(account.logs.exceptions.ResourceNotFoundException):
            account.logs.delete_log_group(logGroupName=_log_group(name))
        if _bucket_exists(account, code) and not _objects(account, code):  # else, another stack's code lies there
            account.s3.delete_bucket(Bucket=code)
    except WaiterError as error:
        raise StackFailed(f"stack {name}: {_reason(account, name) or error}") from error
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"taking down stack {name}") from error
    left = [bucket] if bucket and _bucket_exists(account, bucket) else []
    left += [f"{code}/{name}/"] if _objects(account, code, f"{name}/") else []
    groups = account.logs.describe_log_groups(logGroupNamePrefix=_log_group(name))["logGroups"]
    stack = account.find(name)
    return [*left, *(group["logGroupName"] for group in groups if group["logGroupName"] == _log_group(name)), *([name] if stack else [])]


def _upload_code(account: Account, name: str, architecture: str, runtime: str, tell: Tell) -> str:
    """Build the bundle and put it into the code bucket, under the stack's name and its own digest; give its s3:// URL."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = build(Path(scratch) / "bundle", architecture, runtime.removeprefix("python"))
        path = Path(scratch) / "bundle.zip"
        size = bundle.zip(path)
        tell(f"bundle for {architecture}, {runtime}: {bundle.unzipped / 1e6:.1f} MB, zipped {size / 1e6:.1f} MB; {bundle.told()}")
        key = f"{name}/{hashlib.sha256(path.read_bytes()).hexdigest()}.zip"
        try:
            if not _bucket_exists(account, account.code_bucket):
                where: Any = {} if account.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": account.region}}
                account.s3.create_bucket(Bucket=account.code_bucket, **where)
                block: Any = dict.fromkeys(("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True)
                account.s3.put_public_access_block(Bucket=account.code_bucket, PublicAccessBlockConfiguration=block)
            account.s3.put_object(Bucket=account.code_bucket, Key=key, Body=path.read_bytes())
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"writing the function's code to {account.code_bucket}") from error
    return f"s3://{account.code_bucket}/{key}"


def _is_empty(account: Account, name: str, change: str) -> bool:
    """Wait until the change set is there; tell whether it changes nothing."""
    try:
        account.formation.get_waiter("change_set_create_complete").wait(
            StackName=name, ChangeSetName=change, WaiterConfig={"Delay": 2, "MaxAttempts": 90}
        )
    except WaiterError as error:
        why = str(account.formation.describe_change_set(StackName=name, ChangeSetName=change).get("StatusReason", ""))
        if "didn't contain changes" in why or "No updates" in why:
            account.formation.delete_change_set(StackName=name, ChangeSetName=change)
            return True
        raise StackFailed(f"stack {name}: {why or error}") from error
    return False


def _reason(account: Account, name: str) -> str:
    """Why the stack failed: the first failure among its events."""
    with suppress(BotoCoreError, ClientError):
        events = account.formation.describe_stack_events(StackName=name)["StackEvents"]
        failed = [event for event in events if event.get("ResourceStatus", "").endswith("FAILED") and event.get("ResourceStatusReason")]
        if failed:
            return f"{failed[-1].get('LogicalResourceId')}: {failed[-1]['ResourceStatusReason']}"
    return ""


def _objects(account: Account, bucket: str, prefix: str = "") -> list[tuple[Mapping[str, str], int]]:
    """Every version and delete marker below a prefix of a bucket, with its bytes."""
    found: list[Any] = []
    with suppress(account.s3.exceptions.NoSuchBucket):
        for page in account.s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
            found += (*page.get("Versions", []), *page.get("DeleteMarkers", []))
    return [({"Key": one["Key"], "VersionId": one["VersionId"]}, one.get("Size", 0)) for one in found]


def _empty(account: Account, bucket: str, prefix: str) -> None:
    """Delete all objects and all unfinished uploads below a prefix of a bucket."""
    objects: Any = [one for one, _ in _objects(account, bucket, prefix)]
    for i in range(0, len(objects), 1000):
        account.s3.delete_objects(Bucket=bucket, Delete={"Objects": objects[i : i + 1000], "Quiet": True})
    with suppress(account.s3.exceptions.NoSuchBucket):
        for page in account.s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Uploads", []):
                account.s3.abort_multipart_upload(Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])


def _bucket_exists(account: Account, bucket: str) -> bool:
    try:
        account.s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if code_of(error) == "404":
            return False
        raise
    return True


def _log_group(name: str) -> str:
    return f"/aws/lambda/{name}"
