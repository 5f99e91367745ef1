"""A stack is compared with reality: each resource is looked up, and the function's code is compared with the deployed zip.

A resource that was deleted by hand stays in CloudFormation's records, so that a change set finds nothing to change.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained
from gradsharding.aws.deploy.account import Account, Resource, Stack, Tell, remedy
from gradsharding.aws.deploy.code import UNVERSIONED, Code, code_of_template
from gradsharding.aws.refusals import DENIED, code_of
from gradsharding.errors import GradShardingError, UserError

DETECTING = 60
"""Seconds to wait for CloudFormation's own detection of drift."""

_CLOSED = ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")
"""Settings that close a bucket to the public."""

_GONE = {"404", "NoSuchBucket", "NoSuchEntity", "ResourceNotFoundException", "ResourceNotFound", "DashboardNotFoundError", "403"}
"""Codes for a resource that does not exist; S3 answers 403 for a bucket that another account has by now."""


class Wrong(NamedTuple):
    """A fault of a stack."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def drift(account: Account, stack: Stack, unseen: Tell = lambda _: None) -> list[Wrong]:
    """Return the faults of our stack, and what was changed by hand as far as CloudFormation detects it.

    ``unseen`` gets a line for each thing that could not be checked, so that nobody takes it for intact.
    """
    lost = missing(account, stack)
    lost += _opened(account, account.resources(stack), unseen) if not lost else []
    named = {fault.problem.partition(" ")[0] for fault in lost}
    return [*lost, *(fault for fault in _detected(account, stack, unseen) if fault.problem.partition(" ")[0] not in named)]


def missing(account: Account, stack: Stack) -> list[Wrong]:
    """Return the faults that keep our stack from working: its state, missing resources, other code."""
    if not stack.works:
        return [Wrong(f"stack {stack.name} is {stack.status}", remedy(stack))]
    resources = account.resources(stack)
    wrong, lost = list[Wrong](), set[str]()
    anew = _anew(account, stack, resources)
    for resource in resources:
        closed = False
        try:
            there = resource.type not in _LOOKS or _LOOKS[resource.type](account, resource.physical)
        except (BotoCoreError, ClientError) as error:
            if code_of(error) not in _GONE:
                raise explained(error, f"looking at {resource.logical} ({resource.physical})") from error
            there, closed = False, code_of(error) in DENIED
        if not there:
            lost.add(resource.logical)
            beside = "rounds run without it; to have it again, " if resource.type == "AWS::CloudWatch::Alarm" else ""
            beside = "if it is yours, allow these credentials to look at it; if not, " if closed else beside
            state = "another account's, or closed to these credentials" if closed else "gone"
            wrong.append(Wrong(f"{resource.logical} ({resource.type} {resource.physical}) is {state}", beside + anew))
    if (bucket := stack.parameters.get("ExistingBucket")) and _is_gone(account, stack, bucket):
        wrong.append(Wrong(f"bucket {bucket}, which the stack was given, is gone", anew))
    code = code_of_template(account.template(stack))
    again = "do not trust it: find out who changed it, then replace it: gradsharding deploy with the same options"
    if code and code.version == UNVERSIONED:
        again += f"; it sees the difference only if versioning is on for bucket {code.bucket}, so turn that on first"
    if code:
        present = [resource for resource in resources if resource.logical not in lost]
        for resource, has in others_code(account, present, code):
            problem = f"runs other code (SHA-256 {has}) than was deployed ({code.sha256})"
            wrong.append(Wrong(f"{resource.logical} ({resource.type} {resource.physical}) {problem}", again))
    return wrong


def _anew(account: Account, stack: Stack, resources: list[Resource]) -> str:
    """Say how to deploy the stack anew with the same bucket, if that exists; without its name, a new bucket would be created."""
    own = next((resource.physical for resource in resources if resource.is_data), "")
    brought, name = stack.parameters.get("ExistingBucket", ""), stack.name
    bucket = brought or own
    try:  # a bucket of the stack's is another account's if S3 denies it; an existing one may admit functions only
        there = not _is_gone(account, stack, brought) if brought else bool(own and account.s3.head_bucket(Bucket=own))
    except (BotoCoreError, ClientError):
        there = False
    destroy = f"make it anew: gradsharding destroy --name {name}{f', which leaves bucket {bucket} with its data' if there else ''}, then "
    return f"{destroy}gradsharding deploy --name {name}{f' --bucket {bucket}' if there else ''} and the options that it has"


def others_code(account: Account, resources: list[Resource], code: Code) -> Iterator[tuple[Resource, str]]:
    """Find the functions, and the targets of their aliases, that have other code; yield each with its SHA-256 as Lambda writes it."""
    for resource in resources:
        if resource.type in ("AWS::Lambda::Function", "AWS::Lambda::Alias"):
            try:
                has = account.functions.get_function_configuration(FunctionName=resource.physical)["CodeSha256"]
            except (BotoCoreError, ClientError) as error:
                if code_of(error) in _GONE:
                    continue
                raise explained(error, f"the configuration of {resource.physical}") from error
            if has != code.sha256:
                yield resource, has


def check_brought(account: Account, bucket: str, owner: str, tell: Tell) -> None:
    """Raise UserError unless an existing bucket that is named exists and has the named owner, as far as that can be seen."""
    try:
        account.s3.head_bucket(Bucket=bucket, ExpectedBucketOwner=owner or account.number)
    except (BotoCoreError, ClientError) as error:
        if code_of(error) in ("404", "NoSuchBucket"):
            raise UserError(f"there is no bucket {bucket}, and nothing was changed; check its name, or make it first") from error
        if code_of(error) not in ("403", "AccessDenied"):
            raise explained(error, f"looking at bucket {bucket}") from error
    else:
        return
    try:
        account.anybodys_s3.head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError):
        if owner:  # the function may have access where these credentials have none
            tell(f"bucket {bucket} could not be checked: it is not account {owner}'s, or it denies access to these credentials")
            return
        raise UserError(
            f"bucket {bucket} is not account {account.number}'s, or it denies access to these credentials (s3:ListBucket), and nothing was "
            "changed; if it is another account's, name that with --bucket-owner"
        ) from None
    raise UserError(
        f"bucket {bucket} is not account {owner or account.number}'s, and nothing was changed; name the account that owns it with "
        "--bucket-owner"
    )


def _is_gone(account: Account, stack: Stack, bucket: str) -> bool:
    """Whether an existing bucket is gone; these credentials may have no access to it, where functions have."""
    try:
        account.s3.head_bucket(Bucket=bucket, ExpectedBucketOwner=stack.parameters.get("BucketOwner") or account.number)
    except (BotoCoreError, ClientError) as error:
        if code_of(error) not in _GONE:
            raise explained(error, f"looking at bucket {bucket}") from error
        return code_of(error) != "403"
    return False


def _opened(account: Account, resources: list[Resource], unseen: Tell) -> list[Wrong]:
    """Return a fault for each bucket of a stack that is no longer as closed as in the template."""
    wrong, bucket = list[Wrong](), next((resource.physical for resource in resources if resource.logical == "Bucket"), "")
    for resource in resources:
        try:
            if (resource.logical, resource.type) == ("BucketPolicy", "AWS::S3::BucketPolicy"):
                account.s3.get_bucket_policy(Bucket=bucket)
            elif resource.type == "AWS::S3::Bucket":
                block = account.s3.get_public_access_block(Bucket=resource.physical)["PublicAccessBlockConfiguration"]
                if not all(block.get(key) for key in _CLOSED):
                    wrong.append(_open(resource))
        except (BotoCoreError, ClientError) as error:
            if code_of(error) == "NoSuchPublicAccessBlockConfiguration":
                wrong.append(_open(resource))
            elif code_of(error) == "NoSuchBucketPolicy":
                problem = f"{resource.logical} ({resource.type} {resource.physical}) is gone: bucket {bucket} accepts requests without TLS"
                wrong.append(Wrong(problem, "set it again by hand, as the template has it"))
            else:
                unseen(f"whether {resource.logical} ({resource.type} {resource.physical}) is unchanged could not be checked: {error}")
    return wrong


def _open(resource: Resource) -> Wrong:
    closing = ",".join(f"{key}=true" for key in _CLOSED)
    return Wrong(
        f"{resource.logical} ({resource.type} {resource.physical}) is not closed to the public",
        f"close it: aws s3api put-public-access-block --bucket {resource.physical} --public-access-block-configuration {closing}",
    )


def _detected(account: Account, stack: Stack, unseen: Tell) -> list[Wrong]:
    """Return what CloudFormation's own detection finds; ``unseen`` gets the reason if it cannot be run."""
    lacks = "changes by hand could not be detected"
    try:
        detection = account.formation.detect_stack_drift(StackName=stack.id)["StackDriftDetectionId"]
        until = time.monotonic() + DETECTING
        while True:
            state = account.formation.describe_stack_drift_detection_status(StackDriftDetectionId=detection)
            if state["DetectionStatus"] != "DETECTION_IN_PROGRESS":
                break
            if time.monotonic() > until:
                unseen(f"{lacks}: CloudFormation has not finished in {DETECTING} s; run this again")
                return []
            time.sleep(1)
        if state["DetectionStatus"] == "DETECTION_FAILED":  # for some resources; the others have been compared
            unseen(f"{lacks} everywhere: {state.get('DetectionStatusReason', 'CloudFormation gives no reason')}")
        found = account.formation.describe_stack_resource_drifts(
            StackName=stack.id, StackResourceDriftStatusFilters=["MODIFIED", "DELETED"]
        )
    except (BotoCoreError, ClientError) as error:
        unseen(f"{lacks}: {error}")
        return []
    wrong = []
    for resource in found["StackResourceDrifts"]:
        paths = ", ".join(
            f"{difference['PropertyPath']} is {difference['ActualValue']}, not {difference['ExpectedValue']}"
            for difference in resource.get("PropertyDifferences", [])[:3]
        )
        change = f"was changed by hand: {paths}" if paths else "was deleted or changed by hand"
        wrong.append(
            Wrong(
                f"{resource['LogicalResourceId']} ({resource['ResourceType']} {resource.get('PhysicalResourceId', '')}) {change}",
                "set it back by hand: deploy compares with what was deployed, and would see nothing to change",
            )
        )
    return wrong


def checked(account: Account, stack: Stack) -> Stack:
    """Return the stack if it works; raise GradShardingError with all faults if it does not."""
    if wrong := missing(account, stack):
        raise GradShardingError(f"stack {stack.name} in {account}: " + "; ".join(map(str, wrong)))
    return stack


def _alias(account: Account, arn: str) -> bool:
    function, _, name = arn.rpartition(":")
    return bool(account.functions.get_alias(FunctionName=function, Name=name))


_LOOKS: dict[str, Callable[[Account, str], bool]] = {
    "AWS::S3::Bucket": lambda account, bucket: bool(account.s3.head_bucket(Bucket=bucket)),
    "AWS::Lambda::Function": lambda account, name: bool(account.functions.get_function_configuration(FunctionName=name)),
    "AWS::Lambda::Version": lambda account, arn: bool(account.functions.get_function_configuration(FunctionName=arn)),
    "AWS::Lambda::Alias": _alias,
    "AWS::IAM::Role": lambda account, name: bool(account.roles.get_role(RoleName=name)),
    "AWS::Logs::LogGroup": lambda account, name: (
        name in {group["logGroupName"] for group in account.logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"]}
    ),
    "AWS::CloudWatch::Alarm": lambda account, name: bool(account.alarms.describe_alarms(AlarmNames=[name])["MetricAlarms"]),
    "AWS::CloudWatch::Dashboard": lambda account, name: bool(account.alarms.get_dashboard(DashboardName=name)),
}
"""How to look up a resource, by type; for other types, CloudFormation's detection says whether they exist."""
