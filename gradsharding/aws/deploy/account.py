"""A stack is ours if it has our tag and our template's marker; any other stack of that name is refused, and left untouched.

The tag, ``gradsharding`` = the stack's name, says that we deployed it; the marker, in the template's metadata, says from what.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained, prepare, s3_settings, session
from gradsharding.aws.demands import demanded
from gradsharding.aws.refusals import code_of
from gradsharding.errors import StackFailed, UserError

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient
    from mypy_boto3_lambda import LambdaClient
    from mypy_boto3_logs import CloudWatchLogsClient
    from mypy_boto3_s3 import S3Client

TAG = "gradsharding"
"""Key of the tag on our resources; its value is the stack's name."""

WAITING = 3600
"""Seconds that a command waits for CloudFormation, at most."""

WORKING = {"CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE", "IMPORT_ROLLBACK_COMPLETE"}
"""States of a stack that is up and may be changed."""

BEGINNING = 60
"""Seconds until an operation appears in a stack's events, at most."""

DATA = ("Bucket", "AWS::S3::Bucket")
"""Logical id and type of the bucket in our template. Any other bucket in a stack of ours was added by somebody else."""

Tell = Callable[[str], None]

_AWS = re.compile(r"(^|\.)(amazonaws\.(com|com\.cn|eu)|api\.aws)$")
"""Hosts of AWS, including VPC endpoints."""

_CHANGE_SET = re.compile(r"gradsharding-[0-9a-f]{32}")

_MARKER = re.compile(r"^Metadata:[ ]*\n(?:(?:[ #].*)?\n)*?  Gradsharding:", re.MULTILINE)


class Stack(NamedTuple):
    """A stack as CloudFormation describes it."""

    name: str
    id: str
    """Its ARN, which no later stack of the same name shares."""
    status: str
    outputs: Mapping[str, str]
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    protected: bool
    """Whether its termination protection is on."""
    role: str = ""
    """ARN of the role with which CloudFormation changes the stack; "" if it uses the caller's rights."""

    @property
    def works(self) -> bool:
        """Whether all resources of its template exist, as far as CloudFormation knows."""
        return self.status in WORKING

    @property
    def empty(self) -> bool:
        """Whether a change set was created for it and never run: it has no resources."""
        return self.status == "REVIEW_IN_PROGRESS"

    @property
    def changing(self) -> bool:
        """Whether CloudFormation is changing it."""
        return self.status.endswith("_IN_PROGRESS") and not self.empty


class Resource(NamedTuple):
    """A resource of a stack in CloudFormation's records; it may have been deleted."""

    logical: str
    physical: str
    type: str
    status: str

    @property
    def is_data(self) -> bool:
        """Whether it is the bucket of our template."""
        return (self.logical, self.type) == DATA


class Account:
    """The account and region of the environment, with their clients; the one of S3 reaches this account's buckets only."""

    def __init__(self) -> None:
        """Look up the caller; raise StoreRefused if there are no credentials or no region."""
        self._session = own = session()
        try:
            who = own.client("sts").get_caller_identity()
            self.number, self.partition = who["Account"], who["Arn"].split(":")[1]
            self.s3: S3Client = own.client("s3", config=Config(**s3_settings(own._session, "")))  # noqa: SLF001 - botocore's own
            self.region = self.s3.meta.region_name
            self.formation: CloudFormationClient = own.client("cloudformation")
        except (BotoCoreError, ClientError) as error:
            raise explained(error, "looking up the account") from error
        self._check_endpoints()
        self.s3.meta.events.register("provide-client-params.s3", self._expect_owner)  # type: ignore[arg-type]  # what it gives is used
        prepare(self.s3)

    def _check_endpoints(self) -> None:
        """Raise UserError if S3 and CloudFormation have different servers: buckets that S3's server lacks would count as deleted."""
        hosts = [urlsplit(client.meta.endpoint_url).hostname or "" for client in (self.s3, self.formation)]
        if hosts[0] != hosts[1] and not hosts[0].endswith(f".{hosts[1]}") and not all(map(_AWS.search, hosts)):
            raise UserError(
                f"S3 requests go to {hosts[0]}, and CloudFormation at {hosts[1]} makes no buckets there; "
                "for this command, unset AWS_ENDPOINT_URL_S3, or remove endpoint_url of s3 from the profile"
            )

    @cached_property
    def anybodys_s3(self) -> "S3Client":
        """An S3 client that reaches any account's buckets; use it only to see whether a bucket exists."""
        client = self._session.client("s3", config=Config(**s3_settings(self._session._session, "")))  # noqa: SLF001 - botocore's own
        prepare(client)
        return client

    @cached_property
    def functions(self) -> "LambdaClient":
        """Client of Lambda."""
        return self._session.client("lambda")

    @cached_property
    def logs(self) -> "CloudWatchLogsClient":
        """Client of CloudWatch Logs."""
        return self._session.client("logs")

    @cached_property
    def roles(self) -> Any:
        """Client of IAM."""
        return self._session.client("iam")

    @cached_property
    def alarms(self) -> Any:
        """Client of CloudWatch."""
        return self._session.client("cloudwatch")

    def __str__(self) -> str:
        return f"account {self.number}, region {self.region}"

    def _expect_owner(self, params: Mapping[str, Any], model: Any, **_: Any) -> dict[str, Any]:
        """Add the expected owner to each request that can have one: a bucket's name does not show whose it is.

        Also add what the environment demands, as botocore uses only the first handler's answer, this one. An ACL is for objects only.
        """
        wanted = {**demanded(), "ExpectedBucketOwner": self.number}
        members = model.input_shape.members.keys() - ({"ACL"} if "Key" not in model.input_shape.members else set())
        return {**{name: value for name, value in wanted.items() if name in members}, **params}

    def look_up(self, name: str) -> Stack | None:
        """Find a stack by its name or its ARN, whether it is ours or not; a deleted one only by its ARN."""
        try:
            found = self.formation.describe_stacks(StackName=name)["Stacks"][0]
        except (BotoCoreError, ClientError) as error:
            if code_of(error) == "ValidationError" and "does not exist" in str(error):
                return None
            raise explained(error, f"stack {name} in {self}") from error
        if found["StackStatus"] == "DELETE_COMPLETE" and not name.startswith("arn:"):
            return None
        return Stack(
            found["StackName"],
            found["StackId"],
            found["StackStatus"],
            {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", [])},
            {parameter["ParameterKey"]: parameter.get("ParameterValue", "") for parameter in found.get("Parameters", [])},
            {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])},
            found.get("EnableTerminationProtection", False),
            found.get("RoleARN", ""),
        )

    def find(self, name: str) -> Stack | None:
        """Find our stack of a name; raise UserError if the stack of that name is not ours."""
        found = self.look_up(name)
        if found and (why := self.foreign(found)):
            raise UserError(
                f"stack {name} in {self} is not one of ours ({why}), and nothing of it was touched; choose another name with --name, "
                f"or, if an older release of gradsharding put it up, take it over with: gradsharding deploy --name {name} --adopt"
            )
        return found

    def foreign(self, stack: Stack) -> str:
        """Say why a stack is not ours; "" if it is."""
        if (
            stack.empty
            and (sets := self.change_sets(stack))
            and not all(self._is_prepared(stack, *change_set) for change_set in sets.items())
        ):
            return "others have prepared it"
        if stack.empty and sets and not stack.tags:  # CloudFormation may keep the tags in the change set until it is run
            return ""
        if (tag := stack.tags.get(TAG)) != stack.name:
            return f"its tag {TAG!r} is {tag!r}" if tag is not None else f"it has no tag {TAG!r}"
        return "" if stack.empty or is_marked(self.template(stack)) else "its template has not our marker"

    def template(self, stack: Stack) -> str | Mapping[str, Any]:
        """Return the template of a stack as it was sent: text, or the parsed JSON."""
        try:
            body: Any = self.formation.get_template(StackName=stack.id, TemplateStage="Original")["TemplateBody"]
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"the template of stack {stack.name}") from error
        return body if isinstance(body, str) else dict(body)

    def kept(self, stack: Stack) -> set[str]:
        """Return the logical ids of the resources that stay when a stack is deleted, according to its template after SAM's transform."""
        try:
            body: Any = self.formation.get_template(StackName=stack.id, TemplateStage="Processed")["TemplateBody"]
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"the template of stack {stack.name}") from error
        found = body.get("Resources", {}) if isinstance(body, Mapping) else {}
        return {logical for logical, resource in found.items() if str(resource.get("DeletionPolicy", "")).startswith("Retain")}

    def description(self, stack: Stack) -> str:
        """Return the description in a stack's template."""
        try:
            return self.formation.get_template_summary(StackName=stack.id).get("Description", "")
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"the template of stack {stack.name}") from error

    def resources(self, stack: Stack) -> list[Resource]:
        """List the resources that CloudFormation created for a stack, without those that it has deleted since."""
        try:
            pages = self.formation.get_paginator("list_stack_resources").paginate(StackName=stack.id)
            found = [summary for page in pages for summary in page["StackResourceSummaries"]]
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"the resources of stack {stack.name}") from error
        return [
            Resource(
                summary["LogicalResourceId"], summary.get("PhysicalResourceId", ""), summary["ResourceType"], summary["ResourceStatus"]
            )
            for summary in found
            if summary["ResourceStatus"] != "DELETE_COMPLETE"
        ]

    def buckets(self, stack: Stack) -> list[str]:
        """Return the bucket that CloudFormation created for a stack from our template; never an existing one, nor one that others added."""
        return [resource.physical for resource in self.resources(stack) if resource.is_data and resource.physical]

    def made(self, name: str) -> set[str]:
        """Return the buckets that CloudFormation created for our stacks of a name, by their events, which it keeps for 90 days."""
        now = self.look_up(name)
        found = set[str]()
        for stack in (*([now] if now and not self.foreign(now) else ()), *self._deleted(name)):
            try:
                pages = self.formation.get_paginator("describe_stack_events").paginate(StackName=stack.id)
                events: list[Any] = [event for page in pages for event in page["StackEvents"]]
            except (BotoCoreError, ClientError) as error:
                raise explained(error, f"events of stack {stack.name}") from error
            found |= {
                event.get("PhysicalResourceId", "") for event in events if (event["LogicalResourceId"], event["ResourceType"]) == DATA
            }
        return found - {""}

    def brought(self) -> set[str]:
        """Return the existing buckets that any stack of this region uses; raise StoreRefused if the stacks cannot be listed."""
        try:
            pages = self.formation.get_paginator("describe_stacks").paginate()
            given = [parameter for page in pages for stack in page["Stacks"] for parameter in stack.get("Parameters", [])]
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"the stacks of {self}") from error
        return {parameter.get("ParameterValue", "") for parameter in given if parameter.get("ParameterKey") == "ExistingBucket"} - {""}

    def done(self, stack: Stack, token: str, tell: Tell) -> Stack:
        """Wait until the operation that carries ``token`` has begun and ended; the stack's state alone may still be the old one."""
        until, pause = time.monotonic() + BEGINNING, 0.05
        while (now := self.look_up(stack.id)) and not now.changing and now.status != "DELETE_COMPLETE" and time.monotonic() < until:
            try:
                events = self.formation.describe_stack_events(StackName=stack.id)["StackEvents"]
            except (BotoCoreError, ClientError) as error:
                raise explained(error, f"events of stack {stack.name}") from error
            if any(event.get("ClientRequestToken") == token for event in events):
                now = self.look_up(stack.id)  # the previous look may have been before the first event
                break
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
        return self.settled(now, tell) if now else stack._replace(status="DELETE_COMPLETE")

    def settled(self, stack: Stack, tell: Tell) -> Stack:
        """Wait until CloudFormation has stopped changing a stack; return it as it is then. Raise StackFailed after ``WAITING`` seconds."""
        started, pause, shown = time.monotonic(), 0.1, ""
        while stack.changing:
            if time.monotonic() > started + WAITING:
                raise StackFailed(
                    f"stack {stack.name} in {self} is still {stack.status} after {WAITING} s; run the same command again to go on waiting"
                )
            if stack.status != shown:
                tell(f"stack {stack.name} is {stack.status}")
                shown = stack.status
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
            found = self.look_up(stack.id)
            if not found:
                return stack._replace(status="DELETE_COMPLETE")
            stack = found
        return stack

    def failure(self, stack: Stack, token: str) -> str:
        """Say why the operation that carried ``token`` failed, and why its rollback did; "" if its events do not say."""
        failed: list[str] = []
        try:
            pages = self.formation.get_paginator("describe_stack_events").paginate(StackName=stack.id)
            for page in pages:  # the newest first
                ours = [event for event in page["StackEvents"] if event.get("ClientRequestToken") == token]
                failed += [
                    f"{event.get('LogicalResourceId')}: {event['ResourceStatusReason']}"
                    for event in ours
                    if event.get("ResourceStatus", "").endswith("_FAILED")
                    and event.get("ResourceStatusReason")
                    and "cancelled" not in event["ResourceStatusReason"]
                ]
                if len(ours) < len(page["StackEvents"]):
                    break
        except (BotoCoreError, ClientError) as error:
            return f"its events cannot be read: {error}"
        if not failed:
            return ""
        if "DescribeEvents" in failed[-1]:  # it was refused before anything was created, and the reasons are in those events
            failed = self._validation(stack) or failed
        return failed[-1] if failed[-1] == failed[0] or "ROLLBACK_FAILED" not in stack.status else f"{failed[-1]}; then {failed[0]}"

    def _validation(self, stack: Stack) -> list[str]:
        """Return what CloudFormation found wrong with a template before it created anything; boto3 before November 2025 cannot ask."""
        if not hasattr(self.formation, "describe_events"):
            return []
        try:
            events = self.formation.describe_events(StackName=stack.id, Filters={"FailedEvents": True})["OperationEvents"]
        except (BotoCoreError, ClientError):
            return []  # the caller has another reason to show
        return [
            f"{event.get('LogicalResourceId')}: {event['ValidationStatusReason']}"
            for event in events
            if event.get("ValidationStatusReason")
        ]

    def deleted(self, name: str) -> Stack | None:
        """Find the newest of our deleted stacks of a name; CloudFormation keeps them for 90 days."""
        return next(self._deleted(name), None)

    def _deleted(self, name: str) -> Iterator[Stack]:
        """Find our deleted stacks of a name, by tag and marker; the newest first."""
        try:
            pages = self.formation.get_paginator("list_stacks").paginate(StackStatusFilter=["DELETE_COMPLETE"])
            ids = [summary["StackId"] for page in pages for summary in page["StackSummaries"] if summary["StackName"] == name]
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"deleted stacks in {self}") from error
        found = map(self.look_up, ids)
        return (stack for stack in found if stack and stack.tags.get(TAG) == name and not self.foreign(stack))

    def change_sets(self, stack: Stack) -> dict[str, str]:
        """Return all change sets of a stack, whoever created them: the ARN of each by its name."""
        try:
            pages = self.formation.get_paginator("list_change_sets").paginate(StackName=stack.name)
            return {summary["ChangeSetName"]: summary["ChangeSetId"] for page in pages for summary in page["Summaries"]}
        except (BotoCoreError, ClientError) as error:
            raise explained(error, f"change sets of stack {stack.name}") from error

    def _is_prepared(self, stack: Stack, name: str, arn: str) -> bool:
        """Whether a change set is ours, by its name and its tag; others may choose such a name, too."""
        if not _CHANGE_SET.fullmatch(name):
            return False
        try:
            tags = self.formation.describe_change_set(ChangeSetName=arn).get("Tags", [])
        except (BotoCoreError, ClientError) as error:
            if code_of(error) == "ChangeSetNotFound":
                return True  # it was deleted since it was listed
            raise explained(error, f"change set {name} of stack {stack.name}") from error
        return {"Key": TAG, "Value": stack.name} in tags


def is_marked(template: str | Mapping[str, Any]) -> bool:
    """Whether a template has our marker in its metadata."""
    if isinstance(template, str):
        return bool(_MARKER.search(template))
    metadata = template.get("Metadata")
    return isinstance(metadata, Mapping) and "Gradsharding" in metadata


def remedy(stack: Stack) -> str:
    """Say how to repair a stack that cannot be used or changed in its state; no remedy loses data."""
    if stack.changing:
        return "wait until that has ended; the same command waits for it"
    return {
        "REVIEW_IN_PROGRESS": f"go on: gradsharding deploy --name {stack.name}",
        "UPDATE_ROLLBACK_FAILED": (
            f"correct what its reason names, then: aws cloudformation continue-update-rollback --stack-name {stack.name}"
        ),
        "UPDATE_FAILED": f"first undo it: aws cloudformation rollback-stack --stack-name {stack.name}",
        "UPDATE_ROLLBACK_COMPLETE": "it is as it was before; correct what the reason names, and run this again",
        "ROLLBACK_COMPLETE": f"nothing of it is left; correct what the reason names, then: gradsharding deploy --name {stack.name}",
        "DELETE_COMPLETE": "another command has deleted it; run this again",
    }.get(stack.status, f"finish taking it down, which leaves its bucket: gradsharding destroy --name {stack.name}")
