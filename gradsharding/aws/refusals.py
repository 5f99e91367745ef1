"""Every answer by which AWS refuses a request has a sentence that says what to do."""

import re
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from gradsharding.aws.reasons import AGAIN, CREDENTIALS, Reason, chosen_region, login, scrubbed, source
from gradsharding.aws.unanswered import unanswered
from gradsharding.errors import StoreFailed, StoreRefused, plain

_ROLE = "let cloudformation.amazonaws.com assume that role, or name another one with --service-role"

READS = frozenset({"GetObject", "HeadObject"})
"""Operations for which S3 denies access also if the object does not exist, unless the caller may list the bucket
(https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html, "Permissions")."""

DENIED = frozenset(
    {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled", "403", "Forbidden", "ForbiddenException"}
)

ELSEWHERE = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307"})
"""AWS's codes for a bucket in another region; an answer of 400 to a HEAD means the same if it names a region."""


def code_of(error: Exception) -> str:
    """AWS's code for an error, such as NoSuchKey; "" if AWS did not answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def reason(error: Exception) -> Reason:
    """Say why botocore failed, or what AWS answered, and what to do."""
    return _answered(error) if isinstance(error, ClientError) else unanswered(error)


_FETCHES: dict[str, Callable[[], str]] = {
    "AssumeRole": lambda: "check role_arn and external_id, and that the role trusts the caller",
    "AssumeRoleWithWebIdentity": lambda: "check the role's ARN, its trust in the issuer of the token, and that the token is a fresh one",
    "GetRoleCredentials": lambda: f"check sso_account_id and sso_role_name, or {login('sso login')}",
    "CreateToken": lambda: login("sso login"),
    "CreateOAuth2Token": lambda: login("login"),
}
"""Operations by which botocore gets credentials, before the request itself."""


def _answered(error: ClientError) -> Reason:
    code, answer = code_of(error), error.response
    meta: Any = answer.get("ResponseMetadata", {})
    message = str(answer.get("Error", {}).get("Message", ""))
    if error.operation_name in _FETCHES:
        advice = _ANSWERS[code](message) if code in _ANSWERS else _FETCHES[error.operation_name]()
        return Reason(StoreRefused, f"AWS gave {source()} no credentials ({error.operation_name}: {plain(code)}); {advice}")
    status, region = meta.get("HTTPStatusCode", 0), meta.get("HTTPHeaders", {}).get("x-amz-bucket-region")
    region = region or answer.get("Error", {}).get("Region")
    if code in ELSEWHERE or (region and code in ("BadRequest", "400")):
        return Reason(
            StoreRefused, f"the bucket is in {f'region {scrubbed(region)}' if region else 'another region'}; set AWS_DEFAULT_REGION to that"
        )
    if code in _ANSWERS:
        return Reason(StoreRefused, _ANSWERS[code](message))
    if code.startswith("KMS"):
        return Reason(
            StoreRefused,
            f"the KMS key that encrypts it cannot be used ({plain(code)}); enable it, and allow the caller to use it",
        )
    if code in DENIED:
        return Reason(StoreRefused, _denied(code, message, error.operation_name), denied=True)
    kind, then = (StoreRefused, _ROLE) if "is invalid or cannot be assumed" in message else (StoreFailed, AGAIN)
    return Reason(kind, f"AWS answered {status} {plain(code)} {scrubbed(message)}".rstrip() + f"; {then}")


def _clock(_: str) -> str:
    return "this machine's clock is wrong; set it"


def _stranger(_: str) -> str:
    return (
        f"there is no such access key, or its session token is missing or wrong, or region {chosen_region() or '?'} is not enabled for the "
        f"account; {CREDENTIALS}"
    )


def _forged(message: str) -> str:
    if re.search("(?i)signature (expired|not yet current)", message):  # STS and Lambda say by this that it is too old
        return _clock(message)
    return f"the secret key does not belong to the access key; {CREDENTIALS}"


def _expired(_: str) -> str:
    return f"the session has expired; renew the credentials of {source()}"


def _incomplete(_: str) -> str:
    return f"the credentials are incomplete, or the session token is not valid; {CREDENTIALS}"


def _not_enabled(_: str) -> str:
    return f"the account may not use this service, or not in region {chosen_region() or '?'}; enable it, or choose another region"


def _headless(_: str) -> str:
    return (
        "the request was refused without a reason, as the answer to a HEAD has none: the session may have expired, or the bucket is in "
        f"another region; renew the credentials of {source()}, and check AWS_DEFAULT_REGION"
    )


_ANSWERS: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"), _clock),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException", "UnrecognizedClient", "AuthFailure"), _stranger
    ),
    **dict.fromkeys(("SignatureDoesNotMatch", "InvalidSignatureException", "InvalidSignature"), _forged),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), _expired),
    **dict.fromkeys(
        (
            "IncompleteSignature",
            "IncompleteSignatureException",
            "MissingAuthenticationToken",
            "MissingAuthenticationTokenException",
            "MissingSecurityHeader",
            "InvalidToken",
            "InvalidTokenException",
            "InvalidSecurity",
        ),
        _incomplete,
    ),
    **dict.fromkeys(
        ("OptInRequired", "SubscriptionRequiredException", "NotSignedUp", "AccountProblem", "RegionDisabledException"), _not_enabled
    ),
    **dict.fromkeys(("400", "BadRequest"), _headless),
    "KeyTooLongError": lambda _: "the key is longer than 1,024 bytes; use shorter names",
    "InvalidBucketName": lambda _: "this is not a valid bucket name; correct it",
    "NoSuchAccessPoint": lambda _: "there is no such access point; check its ARN and the region",
    "InvalidObjectState": lambda _: "the object is in an archive, such as Glacier; restore it first",
}
"""What to do about AWS's codes that the user can correct, in the spelling of each service
(https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html)."""


def _denied(code: str, message: str, operation: str) -> str:
    action = re.search(r"not authorized to perform: ([A-Za-z0-9-]+:[A-Za-z0-9*]+)", message)
    because = re.search(r"because ([^.]{1,160})", message)
    text = f"access is denied ({code}{f', {scrubbed(because[0])}' if because else ''})"
    text += f"; allow the caller {action[1] if action else 'this action'} there, or use other credentials"
    if operation in READS:
        text += "; without s3:ListBucket, S3 denies access also to an object that does not exist"
    return text
