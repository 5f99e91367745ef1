"""IAM policies checked against real requests: which actions and resources a program needs, and whether a policy allows them."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import botocore.client

_S3: Mapping[str, tuple[str, ...]] = {
    "AbortMultipartUpload": ("AbortMultipartUpload",),
    "CompleteMultipartUpload": ("PutObject",),
    "CreateMultipartUpload": ("PutObject",),
    "DeleteObjects": ("DeleteObject", "DeleteObjectVersion"),
    "GetObject": ("GetObject",),
    "GetPublicAccessBlock": ("GetBucketPublicAccessBlock",),
    "HeadBucket": ("ListBucket",),
    "HeadObject": ("GetObject",),
    "ListBuckets": ("ListAllMyBuckets",),
    "ListMultipartUploads": ("ListBucketMultipartUploads",),
    "ListObjectVersions": ("ListBucketVersions",),
    "ListObjectsV2": ("ListBucket",),
    "ListParts": ("ListMultipartUploadParts",),
    "PutPublicAccessBlock": ("PutBucketPublicAccessBlock",),
    "UploadPart": ("PutObject",),
    "UploadPartCopy": ("GetObject", "PutObject"),
}
"""The actions of S3 operations whose names differ
(https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html)."""

_OBJECTS = {"AbortMultipartUpload", "DeleteObject", "DeleteObjectVersion", "GetObject", "ListMultipartUploadParts", "PutObject"}

_ANYWHERE = re.compile(
    "sts:.*|s3:ListAllMyBuckets|lambda:GetAccountSettings|cloudformation:(ListStacks|DescribeStackDriftDetectionStatus)|"
    "cloudwatch:DescribeAlarms|logs:DescribeLogGroups"
)
"""Actions that take no resource, or are only granted for all resources."""


_NAMES = ("StackName", "ChangeSetName", "FunctionName", "RoleName", "logGroupName", "DashboardName")
"""Parameters that name a resource."""


class Need(NamedTuple):
    """An action on a resource."""

    action: str
    resource: str


class _Sent(NamedTuple):
    service: str
    operation: str
    parameters: Mapping[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[_Sent]]:
    """Record, in order, the requests of boto3's clients in this process."""
    sent: list[_Sent] = []
    ask = botocore.client.BaseClient._make_api_call  # type: ignore[attr-defined]

    def noting(self: Any, operation: str, parameters: Mapping[str, Any]) -> Any:
        sent.append(_Sent(self.meta.service_model.service_name, operation, dict(parameters)))
        return ask(self, operation, parameters)

    botocore.client.BaseClient._make_api_call = noting  # type: ignore[attr-defined]
    try:
        yield sent
    finally:
        botocore.client.BaseClient._make_api_call = ask  # type: ignore[attr-defined]


def needs(sent: Iterable[_Sent], account: str, region: str) -> set[Need]:
    """Return the actions that requests need, on the resources that they name."""
    found = set[Need]()
    for request in sent:
        service = {"monitoring": "cloudwatch"}.get(request.service, request.service)
        names = _S3.get(request.operation, (request.operation,)) if service == "s3" else (request.operation,)
        names = ("InvokeFunction",) if (service, request.operation) == ("lambda", "Invoke") else names
        for name in names:
            action = f"{service}:{name}"
            places = ["*"] if _ANYWHERE.fullmatch(action) else _resources(service, name, request.parameters, f"{region}:{account}")
            found |= {Need(action, place) for place in places}
    return found


def _resources(service: str, action: str, asked: Mapping[str, Any], where: str) -> list[str]:
    """Return the ARNs that a request names."""
    if service == "s3":
        bucket = f"arn:aws:s3:::{asked['Bucket']}"
        keys = [asked["Key"]] if "Key" in asked else [item["Key"] for item in asked.get("Delete", {}).get("Objects", [])]
        return [f"{bucket}/{key}" for key in keys] if action in _OBJECTS else [bucket]
    name = next((str(asked[key]) for key in _NAMES if key in asked), "")
    if service == "lambda":
        name += f":{asked['Name']}" if action == "GetAlias" else f":{asked['Qualifier']}" if "Qualifier" in asked else ""
    if name.startswith("arn:"):
        return [name]
    account = where.partition(":")[2]
    kinds = {
        "cloudformation": f"{where}:stack/{name}/id",
        "lambda": f"{where}:function:{name}",
        "iam": f":{account}:role/{name}",
        "logs": f"{where}:log-group:{name}",
        "cloudwatch": f":{account}:dashboard/{name}",
    }
    return [f"arn:aws:{service}:{kinds[service]}"]


def allows(policies: Iterable[Mapping[str, Any]], need: Need) -> bool:
    """Tell whether policies allow an action, if all their conditions are met."""
    statements = [
        statement for policy in policies for statement in policy["Statement"] if _matches(statement["Action"], need.action, re.IGNORECASE)
    ]
    effects = {statement["Effect"] for statement in statements if _matches(statement["Resource"], need.resource)}
    return effects == {"Allow"}


def actions(policy: Mapping[str, Any]) -> set[str]:
    """Return all actions that a policy allows."""
    return {action for statement in policy["Statement"] if statement["Effect"] == "Allow" for action in _several(statement["Action"])}


def _matches(patterns: str | list[str], text: str, flags: int = 0) -> bool:
    return any(
        re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text, flags | re.DOTALL) for pattern in _several(patterns)
    )


def _several(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]
