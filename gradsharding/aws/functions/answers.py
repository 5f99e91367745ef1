"""Each error by which Lambda refuses to run a function has one row: wait, try again, or refuse with the remedy."""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from botocore.exceptions import ClientError

from gradsharding.aws.refusals import code_of


class Do(Enum):
    """What to do about an error."""

    WAIT = "wait"
    """Nothing ran, and it will pass: invoke again, for minutes, without counting a failure."""
    AGAIN = "again"
    """It failed, and may succeed the next time: make a few attempts."""
    REFUSE = "refuse"
    """It fails until somebody corrects it."""


class Verdict(NamedTuple):
    """What to do about an error of Lambda's, and the reason, for people."""

    do: Do
    why: str = ""
    """What to wait for, and the remedy if it does not come; or what is wrong, and the remedy."""


_BUSY = "other work uses the account's concurrency; raise the quota, or reserve concurrency for the function"
_BUSY_FUNCTION = "other work uses the function's reserved concurrency; reserve more, or run one round at a time"
_RATE = "requests exceed the account's rate; run fewer rounds at a time, or ask AWS for a higher rate"
_UPDATED = "the function is being created or updated; wait until that has ended"
_NETWORK = "the function's network is not ready; check its VPC settings"
_REBUILD = "deploy the function again"
_VPC = "correct the function's VPC settings"
_KMS = "the key of the function's environment variables"
_LARGE = "the event is larger than Lambda takes; aggregate fewer updates in one round, or use processes"
_CALL = "this release made a wrong call; please report it"


def _rows(do: Do, whys: Mapping[str, str]) -> dict[str, Verdict]:
    return {f"{name}Exception": Verdict(do, why) for name, why in whys.items()}


VERDICTS: Mapping[str, Verdict] = MappingProxyType(
    _rows(
        Do.WAIT,
        {
            "TooManyRequests": _BUSY,
            "Throttling": _RATE,
            "EC2Throttled": "EC2 throttles the creation of the function's network interfaces; run fewer invocations at the same time",
            "ResourceConflict": _UPDATED,
            "ResourceNotReady": _NETWORK,
            "ENINotReady": _NETWORK,
            "SnapStartNotReady": _UPDATED,
            "SnapStartRegenerationFailure": "the function's snapshot is being made again; deploy the function again if that does not end",
            "CodeArtifactUserPending": _UPDATED,
        },
    )
    | _rows(
        Do.AGAIN,
        dict.fromkeys(
            [
                "Service",
                "EC2Unexpected",
                "SnapStart",
                "SnapStartTimeout",
                "EFSIO",
                "EFSMountConnectivity",
                "EFSMountTimeout",
                "S3FilesMountConnectivity",
                "S3FilesMountTimeout",
            ],
            "",
        ),
    )
    | _rows(
        Do.REFUSE,
        {
            "CodeArtifactUserDeleted": f"its code has lost the user it runs as; {_REBUILD}",
            "CodeArtifactUserFailed": f"the user that its code runs as could not be created; {_REBUILD}",
            "DurableExecutionAlreadyStarted": "it is a durable function, which runs no rounds; use an ordinary one",
            "EC2AccessDenied": "its role may not create network interfaces; attach AWSLambdaVPCAccessExecutionRole to it",
            "EFSMountFailure": "the file system in its settings cannot be mounted; correct or remove it",
            "ENILimitReached": "the VPC has no network interfaces left; ask AWS for more, or remove the function from the VPC",
            "InvalidParameterValue": _CALL,
            "InvalidRequestContent": _CALL,
            "InvalidRuntime": "Lambda no longer runs its runtime; choose a later one: gradsharding deploy --runtime",
            "InvalidSecurityGroupID": f"a security group in its settings does not exist; {_VPC}",
            "InvalidSubnetID": f"a subnet in its settings does not exist; {_VPC}",
            "InvalidZipFile": f"its code cannot be unpacked; {_REBUILD}",
            "KMSAccessDenied": f"its role may not use {_KMS}; allow it kms:Decrypt",
            "KMSDisabled": f"{_KMS} is disabled; enable it, or use another",
            "KMSInvalidState": f"{_KMS} is in a state in which it cannot be used; check it in KMS, or use another",
            "KMSNotFound": f"{_KMS} does not exist; use another",
            "ModeNotSupported": "it cannot be invoked synchronously; use an ordinary function",
            "NoPublishedVersion": f"it has no published version; leave the version out, or {_REBUILD}",
            "RecursiveInvocation": "Lambda has stopped this as an endless loop, as a function invokes it; invoke it from elsewhere",
            "RequestTooLarge": _LARGE,
            "ResourceNotFound": "it does not exist",
            "S3FilesMountFailure": "the file system in its settings cannot be mounted; correct or remove it",
            "SerializedRequestEntityTooLarge": _LARGE,
            "ServiceQuotaExceeded": "the account has reached a quota; raise it in the Service Quotas console",
            "SubnetIPAddressLimitReached": "its subnets have no addresses left; use larger subnets",
            "UnsupportedMediaType": _CALL,
        },
    )
)
"""Verdicts by the error's name in botocore's model (https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html), plus Throttling."""

_REASONS = {
    "ReservedFunctionConcurrentInvocationLimitExceeded": _BUSY_FUNCTION,
    "FunctionInvocationRateLimitExceeded": _RATE,
    "ReservedFunctionInvocationRateLimitExceeded": _RATE,
    "CallerRateLimitExceeded": _RATE,
}
"""What a reason in TooManyRequestsException means, other than the account's concurrency."""

_SLOWER = {"Throttling", "RequestLimitExceeded", "429"}
"""AWS's codes for throttling that are in no model."""


def verdict(error: ClientError) -> Verdict | None:
    """Return what to do about Lambda's answer to an invocation; None if the error is not Lambda's own, such as one of credentials."""
    code, answer = code_of(error), error.response
    details: Any = answer
    message = str(answer.get("Error", {}).get("Message", ""))
    if code in _SLOWER or (code.startswith("KMS") and "ThrottlingException" in message):  # KMS's own errors are in the text
        return VERDICTS["ThrottlingException"]
    if code == "ResourceConflictException" and "state: Failed" in message:
        return Verdict(Do.REFUSE, f"it could not be created, and is in state Failed; {_REBUILD}")
    if code == "TooManyRequestsException" and details.get("Reason") in _REASONS:
        return Verdict(Do.WAIT, _REASONS[details["Reason"]])
    if code in VERDICTS:
        return VERDICTS[code]
    return Verdict(Do.AGAIN) if answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500 else None
