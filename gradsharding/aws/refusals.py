"""Every way in which AWS refuses, or botocore fails before it asks, is one sentence that says what to do, and holds no secret.

Errors are known by their names: the botocore of a function may be older than the caller's, and lack some of their classes.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import botocore
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.secrets import without_secrets
from gradsharding.errors import GradShardingError, StoreFailed, StoreRefused, plain, quoted

CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role is attached"

AGAIN = "run it again"

_ROLE = "let cloudformation.amazonaws.com assume that role, or name another one with --service-role"

READS = frozenset({"GetObject", "HeadObject"})
"""Operations to which S3 answers that access is denied also where there is no object, unless the asker may list the bucket
(https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html, "Permissions")."""

DENIED = frozenset(
    {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled", "403", "Forbidden", "ForbiddenException"}
)

ELSEWHERE = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307"})
"""AWS's codes for a bucket of another region; a HEAD that is answered 400 means the same if the answer names a region."""


class Reason(NamedTuple):
    """Why something failed."""

    kind: type[GradShardingError]
    """StoreRefused where the user can mend it, else StoreFailed."""
    said: str
    denied: bool = False
    """Whether it is a lack of permission, or looks like one."""


def code_of(error: Exception) -> str:
    """AWS's name for what went wrong, such as NoSuchKey; "" if AWS did not answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def reason(error: Exception) -> Reason:
    """Say why botocore failed, or what AWS answered, and what to do; any other exception is one of its settings that cannot be used."""
    if isinstance(error, ClientError):
        return _answered(error)
    facts = {**getattr(error, "kwargs", {}), "message": str(error)}
    for kind in type(error).__mro__:
        if kind.__name__ in _FAILURES and kind.__module__ == BotoCoreError.__module__:
            return _FAILURES[kind.__name__](facts)
    if isinstance(error, BotoCoreError):
        return _botocore(facts)
    return _unusable(error)


def scrubbed(text: object, most: int = 240) -> str:
    """Give the first line of what others wrote, printable and cut, without what may be a key, a token, a password or a signature."""
    line = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
    line = without_secrets(line)
    return plain("".join(letter if letter.isprintable() else " " for letter in line)[:most].strip().rstrip("."), most)


def profile() -> str:
    """Name the profile that is in use."""
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"


def _files() -> str:
    return os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"


def _login(how: str) -> str:
    name = profile()
    return f"run: aws {how}" if name == "default" else f"run: aws {how} --profile {plain(name)}"


def _region() -> str:
    return os.environ.get("AWS_DEFAULT_REGION", "")


# What botocore raises before it asks, or without an answer.

_Say = Callable[[Mapping[str, Any]], Reason]


def _refuse(text: str) -> _Say:
    """Refuse with a text, in which ``{message}`` is botocore's own."""
    return lambda facts: Reason(StoreRefused, text.replace("{message}", scrubbed(facts["message"])))


def _setting(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreRefused, f"{scrubbed(facts['message'])}; correct profile {plain(profile())} in {_files()}, or the AWS_* variable that says so"
    )


def _botocore(facts: Mapping[str, Any]) -> Reason:
    said = f"botocore {botocore.__version__} cannot do this ({scrubbed(facts['message'])})"
    return Reason(StoreFailed, f"{said}; install a current one: pip install --upgrade 'gradsharding[aws]'")


def _named(facts: Mapping[str, Any]) -> Reason:
    return Reason(StoreRefused, f"{scrubbed(facts['message'].replace(chr(10), ' '))}; check the bucket's name or ARN, and the key")


def _silent(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreFailed, f"no answer after several attempts ({scrubbed(facts['message'])}); check the network and the endpoint, then {AGAIN}"
    )


def _damaged(facts: Mapping[str, Any]) -> Reason:
    return Reason(StoreFailed, f"bytes were damaged or lost on their way ({scrubbed(facts['message'])}); {AGAIN}")


def _waited(facts: Mapping[str, Any]) -> Reason:
    return Reason(StoreFailed, f"{scrubbed(facts['message'])}; look at its state in the console, then {AGAIN}")


def _partial(facts: Mapping[str, Any]) -> Reason:
    where = {"env": "the environment"}.get(str(facts.get("provider")), f"profile {plain(profile())} ({scrubbed(facts.get('provider'))})")
    return Reason(StoreRefused, f"the credentials of {where} lack {scrubbed(facts.get('cred_var'))}; set it, or unset the others")


def _retrieval(facts: Mapping[str, Any]) -> Reason:
    provider, lines = str(facts.get("provider")), str(facts.get("error_msg")).strip().splitlines()
    why = scrubbed(lines[-1] if lines else "") or "without a reason"  # a program's last word says most
    if provider == "custom-process":
        return Reason(
            StoreRefused,
            f"the credential_process of profile {plain(profile())} failed ({why}); run that command by itself, and mend it in {_files()}",
        )
    if provider == "container-role":
        return Reason(
            StoreRefused, f"the container's role gave no credentials ({why}); check the task's or the pod's role, or {CREDENTIALS}"
        )
    return Reason(StoreRefused, f"AWS credentials could not be had from {scrubbed(provider)} ({why}); log in anew, or {CREDENTIALS}")


def _sso(_: Mapping[str, Any]) -> Reason:
    return Reason(StoreRefused, f"profile {plain(profile())} has no SSO login, or it has expired; {_login('sso login')}")


def _signed_in(_: Mapping[str, Any]) -> Reason:
    return Reason(StoreRefused, f"profile {plain(profile())} has no login session, or it has expired; {_login('login')}")


def _no_profile(facts: Mapping[str, Any]) -> Reason:
    try:
        there = sorted(botocore.session.get_session().available_profiles)
    except Exception:  # noqa: BLE001 - a file that cannot be read has no profiles
        there = []
    names = ", ".join(plain(name, 40) for name in there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    advice = f"set AWS_PROFILE to one that exists ({names}), or unset it" if there else f"unset AWS_PROFILE, or add it to {_files()}"
    return Reason(StoreRefused, f"there is no profile {quoted(scrubbed(facts.get('profile')))}; {advice}")


def _unread(facts: Mapping[str, Any]) -> Reason:
    why = f" ({scrubbed(facts['error'])})" if facts.get("error") else ""
    return Reason(
        StoreRefused, f"AWS's configuration {scrubbed(facts.get('path'))} cannot be read{why}; correct it, or set AWS_CONFIG_FILE"
    )


def _metadata(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreRefused,
        f"this machine's metadata gave no credentials ({scrubbed(facts.get('error_msg'))}); attach a role to it, or {CREDENTIALS}",
    )


def _no_region(facts: Mapping[str, Any]) -> Reason:
    name = str(facts.get("region_name") or _region())
    if name and (said := _unknown(name)):
        return Reason(StoreRefused, said)
    return Reason(StoreRefused, f"{scrubbed(facts['message'])}; check the region (it is {quoted(scrubbed(name))}) and the endpoint")


def _unknown(region: str) -> str:
    """Say that there is no such region, and which is meant; "" if there is one."""
    session = botocore.session.Session()
    known = sorted({one for partition in session.get_available_partitions() for one in session.get_available_regions("s3", partition)})
    if region in known:
        return ""
    close = difflib.get_close_matches(region, known, 1) or ["eu-central-1"]
    release, advice = botocore.__version__, f"set AWS_DEFAULT_REGION to one that exists, such as {close[0]}"
    return f"botocore {release} knows no region {quoted(scrubbed(region))}; {advice}"


def _host(facts: Mapping[str, Any]) -> str:
    return scrubbed(urlsplit(str(facts.get("endpoint_url", ""))).netloc.rpartition("@")[2]) or "the endpoint"


def _not_connected(facts: Mapping[str, Any]) -> Reason:
    host, why = _host(facts), str(facts.get("error", ""))
    unresolved = "resolve" in why or "getaddrinfo" in why or "Name or service" in why
    found = re.search(r"\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?$", host.partition(":")[0])
    if unresolved and found and found[1] != "s3" and (said := _unknown(found[1])):
        return Reason(StoreRefused, f"{host} has no address: {said}")
    if unresolved:
        return Reason(
            StoreFailed, f"{host} has no address in DNS; check its name, AWS_ENDPOINT_URL and this machine's network, then {AGAIN}"
        )
    return _silent(facts)


def _tls(facts: Mapping[str, Any]) -> Reason:
    why = str(facts.get("error", ""))
    if "No such file" in why:  # it is the one file that is read to connect
        bundle = plain(os.environ.get("AWS_CA_BUNDLE") or f"ca_bundle in {_files()}")
        return Reason(StoreRefused, f"there is no file of certificates where AWS_CA_BUNDLE says ({bundle}); correct it, or unset it")
    if "certificate" not in why.lower():
        return Reason(StoreFailed, f"TLS with {_host(facts)} failed ({scrubbed(why)}); check the endpoint and proxies, then {AGAIN}")
    found = re.search(r"certificate verify failed: ([^(']*)", why)
    said = f"certificate verify failed{f': {scrubbed(found[1])}' if found else ''}"
    return Reason(
        StoreRefused, f"{_host(facts)} is not trusted ({said}); if it has a CA of its own, set AWS_CA_BUNDLE to the file of its certificate"
    )


def _too_slow(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreFailed,
        f"{_host(facts)} took no connection, after several attempts; check firewalls, in a VPC the gateway endpoint of S3 or NAT, "
        f"and whether HTTPS_PROXY must be set, then {AGAIN}",
    )


def _proxy(facts: Mapping[str, Any]) -> Reason:
    proxy = scrubbed(urlsplit(str(facts.get("proxy_url", ""))).netloc.rpartition("@")[2])
    return Reason(
        StoreRefused,
        f"the proxy {proxy} does not let us through; correct HTTPS_PROXY or HTTP_PROXY, or name the endpoint in NO_PROXY",
    )


_FAILURES: dict[str, _Say] = {
    **dict.fromkeys(("NoCredentialsError", "NoAuthTokenError"), _refuse(f"there are no AWS credentials; {CREDENTIALS}")),
    "PartialCredentialsError": _partial,
    "CredentialRetrievalError": _retrieval,
    **dict.fromkeys(("SSOError", "TokenRetrievalError"), _sso),
    "LoginError": _signed_in,
    "LoginInsufficientPermissions": lambda _: Reason(
        StoreRefused,
        f"profile {plain(profile())} may not renew its login; allow it signin:CreateOAuth2Token, then {_login('login')}",
    ),
    "RefreshWithMFAUnsupportedError": _refuse(
        "the role asks for an MFA code again, which nobody can type now; set the credentials of a session that lasts: "
        "aws sts assume-role --serial-number … --token-code …"
    ),
    "ProfileNotFound": _no_profile,
    **dict.fromkeys(("ConfigParseError", "ConfigNotFound"), _unread),
    "MetadataRetrievalError": _metadata,
    "NoRegionError": _refuse("no AWS region is chosen; set AWS_DEFAULT_REGION"),
    **dict.fromkeys(
        (
            "InvalidRegionError",
            "UnknownRegionError",
            "ServiceNotInRegionError",
            "BaseEndpointResolverError",
            "EndpointProviderError",
        ),
        _no_region,
    ),
    **dict.fromkeys(
        (
            "InvalidConfigError",
            "UnknownCredentialError",
            "UnknownTokenProviderError",
            "InvalidS3AddressingStyleError",
            "InvalidEndpointDiscoveryConfigurationError",
            "InvalidRetryConfigurationError",
            "InvalidS3UsEast1RegionalEndpointConfigError",
            "InvalidSTSRegionalEndpointsConfigError",
            "InvalidDefaultsMode",
            "InvalidChecksumConfigError",
            "InvalidEndpointConfigurationError",
            "InvalidIMDSEndpointError",
            "InvalidIMDSEndpointModeError",
            "InvalidProxiesConfigError",
            "UnsupportedS3ConfigurationError",
            "UnsupportedS3ControlConfigurationError",
        ),
        _setting,
    ),
    **dict.fromkeys(
        (
            "ValidationError",
            "ParamValidationError",
            "MissingParametersError",
            "InvalidDNSNameError",
            "InvalidHostLabelError",
            "UnsupportedS3ArnError",
            "UnsupportedS3ControlArnError",
            "UnsupportedOutpostResourceError",
            "UnsupportedS3AccesspointConfigurationError",
        ),
        _named,
    ),
    "EndpointConnectionError": _not_connected,
    "SSLError": _tls,
    "ConnectTimeoutError": _too_slow,
    "ProxyConnectionError": _proxy,
    **dict.fromkeys(("HTTPClientError", "ConnectionError", "IncompleteReadError", "CapacityNotAvailableError"), _silent),
    **dict.fromkeys(("ChecksumError", "FlexibleChecksumError", "AwsChunkedWrapperError", "UnseekableStreamError"), _damaged),
    **dict.fromkeys(("WaiterError", "PaginationError"), _waited),
    "MissingDependencyException": _refuse("this needs the package awscrt ({message}); install it: pip install 'boto3[crt]'"),
    "MD5UnavailableError": _refuse("this Python has no MD5, which S3 asks for; use one that is not held to FIPS"),
    **dict.fromkeys(
        (
            "DataNotFoundError",
            "ApiVersionNotFoundError",
            "UnknownSignatureVersionError",
            "UnsupportedSignatureVersionError",
            "UnknownServiceStyle",
            "OperationNotPageableError",
            "InvalidExpressionError",
            "WaiterConfigError",
            "UnknownClientMethodError",
            "StubResponseError",
            "UnsupportedServiceProtocolsError",
        ),
        _botocore,
    ),
}
"""What to say of each of botocore's errors, by its name; one that is not named here goes by the first of its ancestors that is."""


def _unusable(error: Exception) -> Reason:
    """Say which of AWS's settings led to an exception that is not botocore's own, as it sets itself up."""
    where = f"correct profile {plain(profile())} in {_files()}, or the AWS_* variables"
    match error:
        case json.JSONDecodeError():
            said = f"the credential_process of profile {plain(profile())} printed no JSON; run it by itself, and mend it in {_files()}"
        case OSError():
            said = f"{scrubbed(error)}; {where}"
        case RuntimeError() if "still expired" in str(error):
            said = f"the credentials of {_source()} have expired; renew them"
        case EOFError():
            said = "the role asks for an MFA code, and nobody can type one here; set the credentials of a session that has begun elsewhere"
        case _:
            said = f"AWS's settings cannot be used ({type(error).__name__}: {scrubbed(error)}); {where}"
    return Reason(StoreRefused, said)


def _source() -> str:
    """Name where credentials come from."""
    return "the environment" if os.environ.get("AWS_ACCESS_KEY_ID") else f"profile {plain(profile())}"


# What AWS answers.

_FETCHES: dict[str, Callable[[], str]] = {
    "AssumeRole": lambda: "check role_arn and external_id, and that the role trusts who asks",
    "AssumeRoleWithWebIdentity": lambda: "check the role's ARN, its trust in the issuer of the token, and that the token is a fresh one",
    "GetRoleCredentials": lambda: f"check sso_account_id and sso_role_name, or {_login('sso login')}",
    "CreateToken": lambda: _login("sso login"),
    "CreateOAuth2Token": lambda: _login("login"),
}
"""What botocore asks to get credentials, before it asks what we want."""


def _answered(error: ClientError) -> Reason:
    code, answer = code_of(error), error.response
    meta: Any = answer.get("ResponseMetadata", {})
    message = str(answer.get("Error", {}).get("Message", ""))
    if error.operation_name in _FETCHES:
        advice = _ANSWERS[code](message) if code in _ANSWERS else _FETCHES[error.operation_name]()
        return Reason(StoreRefused, f"AWS gave {_source()} no credentials ({error.operation_name}: {plain(code)}); {advice}")
    status, region = meta.get("HTTPStatusCode", 0), meta.get("HTTPHeaders", {}).get("x-amz-bucket-region")
    region = region or answer.get("Error", {}).get("Region")
    if code in ELSEWHERE or (region and code in ("BadRequest", "400")):
        return Reason(
            StoreRefused, f"it lies in {f'region {scrubbed(region)}' if region else 'another region'}; set AWS_DEFAULT_REGION to that"
        )
    if code in _ANSWERS:
        return Reason(StoreRefused, _ANSWERS[code](message))
    if code.startswith("KMS"):
        return Reason(
            StoreRefused,
            f"the key of KMS that encrypts it cannot be used ({plain(code)}); enable it, and allow its use to whoever asks",
        )
    if code in DENIED:
        return Reason(StoreRefused, _denied(code, message, error.operation_name), denied=True)
    kind, then = (StoreRefused, _ROLE) if "is invalid or cannot be assumed" in message else (StoreFailed, AGAIN)
    return Reason(kind, f"AWS answered {status} {plain(code)} {scrubbed(message)}".rstrip() + f"; {then}")


def _clock(_: str) -> str:
    return "this machine's clock is wrong; set it"


def _stranger(_: str) -> str:
    return (
        f"there is no such access key, or its session token is missing or wrong, or region {_region() or '?'} is not enabled for the "
        f"account; {CREDENTIALS}"
    )


def _forged(message: str) -> str:
    if re.search("(?i)signature (expired|not yet current)", message):  # STS and Lambda say by this that it is too old
        return _clock(message)
    return f"the secret key does not belong to the access key; {CREDENTIALS}"


def _expired(_: str) -> str:
    return f"the session has expired; renew the credentials of {_source()}"


def _incomplete(_: str) -> str:
    return f"the credentials are not whole, or the session token is not valid; {CREDENTIALS}"


def _not_enabled(_: str) -> str:
    return f"the account may not use this service, or not in region {_region() or '?'}; enable it, or choose another region"


def _headless(_: str) -> str:
    return (
        "the request was refused without a reason, for a HEAD is answered without one: the session may have expired, or the bucket lies in "
        f"another region; renew the credentials of {_source()}, and check AWS_DEFAULT_REGION"
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
    "InvalidBucketName": lambda _: "that is no name for a bucket; correct it",
    "NoSuchAccessPoint": lambda _: "there is no such access point; check its ARN and the region",
    "InvalidObjectState": lambda _: "the object lies in an archive, such as Glacier; restore it first",
}
"""What to say of AWS's codes that the user can mend, in whatever service's spelling
(https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html)."""


def _denied(code: str, message: str, operation: str) -> str:
    action = re.search(r"not authorized to perform: ([A-Za-z0-9-]+:[A-Za-z0-9*]+)", message)
    because = re.search(r"because ([^.]{1,160})", message)
    said = f"access is denied ({code}{f', {scrubbed(because[0])}' if because else ''})"
    said += f"; allow {action[1] if action else 'this action'} there to whoever asks, or ask with other credentials"
    if operation in READS:
        said += "; without s3:ListBucket, S3 says so of an object that is not there, too"
    return said
