"""What Lambda says instead of running a function: wait for it, try again, or refuse with the remedy. One row for each of its errors."""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from botocore.exceptions import ClientError

from gradsharding.aws.refusals import code_of


class Do(Enum):
    """What to do about an error."""

    WAIT = "wait"
    """Nothing ran, and time mends it: ask again for minutes, and count no failure."""
    AGAIN = "again"
    """It failed, and may not the next time: a few attempts."""
    REFUSE = "refuse"
    """It stays so until somebody mends it."""


class Verdict(NamedTuple):
    """What to do about an error of Lambda's, and why, for people."""

    do: Do
    why: str = ""
    """What is waited for, with the remedy if that is in vain; or what is wrong, with the remedy."""


_BUSY = "other work takes the account's concurrency; raise it, or reserve some for the function"
_BUSY_FUNCTION = "other work takes the function's reserved concurrency; reserve more, or run one round at a time"
_RATE = "more is asked a second than the account may; run fewer rounds at a time, or ask AWS for a higher rate"
_UPDATED = "the function is being created or updated; wait for that to end"
_NETWORK = "the function's network is not ready; look at its VPC settings"
_REBUILD = "deploy the function again"
_VPC = "correct the function's VPC settings"
_KMS = "the key of the function's environment variables"
_LARGE = "the event is larger than Lambda takes; aggregate fewer updates in one round, or use processes"
_CALL = "please report it: a call that this release makes is wrong"


def _rows(do: Do, whys: Mapping[str, str]) -> dict[str, Verdict]:
    return {f"{name}Exception": Verdict(do, why) for name, why in whys.items()}


VERDICTS: Mapping[str, Verdict] = MappingProxyType(
    _rows(
        Do.WAIT,
        {
            "TooManyRequests": _BUSY,
            "Throttling": _RATE,
            "EC2Throttled": "EC2 slows the set-up of the function's network down; use fewer invocations at once",
            "ResourceConflict": _UPDATED,
            "ResourceNotReady": _NETWORK,
            "ENINotReady": _NETWORK,
            "SnapStartNotReady": _UPDATED,
            "SnapStartRegenerationFailure": "the snapshot of the function is made anew; deploy it again if that does not end",
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
            "CodeArtifactUserFailed": f"the user that its code runs as could not be made; {_REBUILD}",
            "DurableExecutionAlreadyStarted": "it is a durable function, which runs no rounds; use an ordinary one",
            "EC2AccessDenied": "its role may not make network interfaces; attach AWSLambdaVPCAccessExecutionRole to it",
            "EFSMountFailure": "the file system in its settings cannot be mounted; correct or remove it",
            "ENILimitReached": "the VPC has no network interfaces left; ask AWS for more, or take the function out of the VPC",
            "InvalidParameterValue": _CALL,
            "InvalidRequestContent": _CALL,
            "InvalidRuntime": "Lambda no longer runs its runtime; choose a later one: gradsharding deploy --runtime",
            "InvalidSecurityGroupID": f"a security group in its settings is not there; {_VPC}",
            "InvalidSubnetID": f"a subnet in its settings is not there; {_VPC}",
            "InvalidZipFile": f"its code cannot be unpacked; {_REBUILD}",
            "KMSAccessDenied": f"its role may not use {_KMS}; allow it kms:Decrypt",
            "KMSDisabled": f"{_KMS} is disabled; enable it, or use another",
            "KMSInvalidState": f"{_KMS} is in no state to be used; look at it in KMS, or use another",
            "KMSNotFound": f"{_KMS} is not there; use another",
            "ModeNotSupported": "it cannot be called so that the caller waits for its answer; use an ordinary function",
            "NoPublishedVersion": f"it has no published version; name none, or {_REBUILD}",
            "RecursiveInvocation": "Lambda takes this for an endless loop, since a function calls it; call it from elsewhere",
            "RequestTooLarge": _LARGE,
            "ResourceNotFound": "it is not there",
            "S3FilesMountFailure": "the file system in its settings cannot be mounted; correct or remove it",
            "SerializedRequestEntityTooLarge": _LARGE,
            "ServiceQuotaExceeded": "the account has reached a quota; raise it in the console of Service Quotas",
            "SubnetIPAddressLimitReached": "its subnets have no address left; give it larger ones",
            "UnsupportedMediaType": _CALL,
        },
    )
)
"""By their names in botocore's model of the API (https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html), but for Throttling."""

_REASONS = {
    "ReservedFunctionConcurrentInvocationLimitExceeded": _BUSY_FUNCTION,
    "FunctionInvocationRateLimitExceeded": _RATE,
    "ReservedFunctionInvocationRateLimitExceeded": _RATE,
    "CallerRateLimitExceeded": _RATE,
}
"""What TooManyRequestsException may say of itself, where it is not the account's concurrency."""

_SLOWER = {"Throttling", "RequestLimitExceeded", "429"}
"""Codes of AWS's that are in no model and mean that too much is asked."""


def verdict(error: ClientError) -> Verdict | None:
    """Say what to do about what Lambda answered an invocation with; None if it is no matter of Lambda's, such as credentials."""
    code, answer = code_of(error), error.response
    details: Any = answer
    message = str(answer.get("Error", {}).get("Message", ""))
    if code in _SLOWER or (code.startswith("KMS") and "ThrottlingException" in message):  # KMS's own errors stand in the text
        return VERDICTS["ThrottlingException"]
    if code == "ResourceConflictException" and "state: Failed" in message:
        return Verdict(Do.REFUSE, f"it could not be created, and is in state Failed; {_REBUILD}")
    if code == "TooManyRequestsException" and details.get("Reason") in _REASONS:
        return Verdict(Do.WAIT, _REASONS[details["Reason"]])
    if code in VERDICTS:
        return VERDICTS[code]
    return Verdict(Do.AGAIN) if answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500 else None
