"""Every way in which botocore fails before it sends a request, or without an answer, has a sentence.

Errors are known by their names: a function's botocore may be older than the caller's, and lack some of their classes.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import botocore
import botocore.session
from botocore.exceptions import BotoCoreError

from gradsharding.aws.reasons import AGAIN, CREDENTIALS, Reason, chosen_region, files, login, profile, scrubbed, source
from gradsharding.errors import StoreFailed, StoreRefused, plain, quoted


def unanswered(error: Exception) -> Reason:
    """Say why botocore failed; an exception that is not its own comes from settings that it cannot use."""
    facts = {**getattr(error, "kwargs", {}), "message": str(error)}
    for kind in type(error).__mro__:
        if kind.__name__ in FAILURES and kind.__module__ == BotoCoreError.__module__:
            return FAILURES[kind.__name__](facts)
    return _botocore(facts) if isinstance(error, BotoCoreError) else _unusable(error)


_Say = Callable[[Mapping[str, Any]], Reason]


def _refuse(text: str) -> _Say:
    """Return what refuses with a text, in which ``{message}`` stands for botocore's own."""
    return lambda facts: Reason(StoreRefused, text.replace("{message}", scrubbed(facts["message"])))


def _setting(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreRefused, f"{scrubbed(facts['message'])}; correct profile {plain(profile())} in {files()}, or the AWS_* variable that says so"
    )


def _botocore(facts: Mapping[str, Any]) -> Reason:
    problem = f"botocore {botocore.__version__} cannot do this ({scrubbed(facts['message'])})"
    return Reason(StoreFailed, f"{problem}; install a current one: pip install --upgrade 'gradsharding[aws]'")


def _named(facts: Mapping[str, Any]) -> Reason:
    return Reason(StoreRefused, f"{scrubbed(facts['message'].replace(chr(10), ' '))}; check the bucket's name or ARN, and the key")


def _silent(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreFailed, f"no answer after several attempts ({scrubbed(facts['message'])}); check the network and the endpoint, then {AGAIN}"
    )


def _damaged(facts: Mapping[str, Any]) -> Reason:
    return Reason(StoreFailed, f"bytes were damaged or lost on their way ({scrubbed(facts['message'])}); {AGAIN}")


def _waited(facts: Mapping[str, Any]) -> Reason:
    return Reason(StoreFailed, f"{scrubbed(facts['message'])}; check its state in the console, then {AGAIN}")


def _partial(facts: Mapping[str, Any]) -> Reason:
    where = {"env": "the environment"}.get(str(facts.get("provider")), f"profile {plain(profile())} ({scrubbed(facts.get('provider'))})")
    return Reason(StoreRefused, f"the credentials of {where} lack {scrubbed(facts.get('cred_var'))}; set it, or unset the others")


def _retrieval(facts: Mapping[str, Any]) -> Reason:
    provider, lines = str(facts.get("provider")), str(facts.get("error_msg")).strip().splitlines()
    why = scrubbed(lines[-1] if lines else "") or "without a reason"  # a program's last line says most
    if provider == "custom-process":
        return Reason(
            StoreRefused,
            f"the credential_process of profile {plain(profile())} failed ({why}); run that command by itself, and correct it in {files()}",
        )
    if provider == "container-role":
        return Reason(
            StoreRefused, f"the container's role gave no credentials ({why}); check the task's or the pod's role, or {CREDENTIALS}"
        )
    return Reason(StoreRefused, f"{scrubbed(provider)} gave no AWS credentials ({why}); log in again, or {CREDENTIALS}")


def _sso(_: Mapping[str, Any]) -> Reason:
    return Reason(StoreRefused, f"profile {plain(profile())} has no SSO login, or it has expired; {login('sso login')}")


def _signed_in(_: Mapping[str, Any]) -> Reason:
    return Reason(StoreRefused, f"profile {plain(profile())} has no login session, or it has expired; {login('login')}")


def _no_profile(facts: Mapping[str, Any]) -> Reason:
    try:
        there = sorted(botocore.session.get_session().available_profiles)
    except Exception:  # noqa: BLE001 - a file that cannot be read has no profiles
        there = []
    names = ", ".join(plain(name, 40) for name in there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    advice = f"set AWS_PROFILE to one that exists ({names}), or unset it" if there else f"unset AWS_PROFILE, or add it to {files()}"
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
    name = str(facts.get("region_name") or chosen_region())
    if name and (problem := _unknown(name)):
        return Reason(StoreRefused, problem)
    return Reason(StoreRefused, f"{scrubbed(facts['message'])}; check the region (it is {quoted(scrubbed(name))}) and the endpoint")


def _unknown(region: str) -> str:
    """Say that there is no such region, and name the closest; "" if there is one."""
    session = botocore.session.Session()
    partitions = session.get_available_partitions()
    names = sorted({name for partition in partitions for name in session.get_available_regions("s3", partition)})
    if region in names:
        return ""
    close = difflib.get_close_matches(region, names, 1) or ["eu-central-1"]
    release, advice = botocore.__version__, f"set AWS_DEFAULT_REGION to one that exists, such as {close[0]}"
    return f"botocore {release} knows no region {quoted(scrubbed(region))}; {advice}"


def _host(facts: Mapping[str, Any]) -> str:
    return scrubbed(urlsplit(str(facts.get("endpoint_url", ""))).netloc.rpartition("@")[2]) or "the endpoint"


def _not_connected(facts: Mapping[str, Any]) -> Reason:
    host, why = _host(facts), str(facts.get("error", ""))
    unresolved = "resolve" in why or "getaddrinfo" in why or "Name or service" in why
    found = re.search(r"\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?$", host.partition(":")[0])
    if unresolved and found and found[1] != "s3" and (problem := _unknown(found[1])):
        return Reason(StoreRefused, f"{host} has no address: {problem}")
    if unresolved:
        return Reason(
            StoreFailed, f"{host} has no address in DNS; check its name, AWS_ENDPOINT_URL and this machine's network, then {AGAIN}"
        )
    return _silent(facts)


def _tls(facts: Mapping[str, Any]) -> Reason:
    why = str(facts.get("error", ""))
    if "No such file" in why:  # the only file that is read to connect
        bundle = plain(os.environ.get("AWS_CA_BUNDLE") or f"ca_bundle in {files()}")
        return Reason(StoreRefused, f"the file of certificates that AWS_CA_BUNDLE names does not exist ({bundle}); correct it, or unset it")
    if "certificate" not in why.lower():
        return Reason(StoreFailed, f"TLS with {_host(facts)} failed ({scrubbed(why)}); check the endpoint and proxies, then {AGAIN}")
    found = re.search(r"certificate verify failed: ([^(']*)", why)
    problem = f"certificate verify failed{f': {scrubbed(found[1])}' if found else ''}"
    return Reason(
        StoreRefused,
        f"{_host(facts)} is not trusted ({problem}); if it has a CA of its own, set AWS_CA_BUNDLE to the file of its certificate",
    )


def _too_slow(facts: Mapping[str, Any]) -> Reason:
    return Reason(
        StoreFailed,
        f"{_host(facts)} accepted no connection in several attempts; check firewalls, in a VPC the gateway endpoint of S3 or NAT, "
        f"and whether HTTPS_PROXY must be set, then {AGAIN}",
    )


def _proxy(facts: Mapping[str, Any]) -> Reason:
    proxy = scrubbed(urlsplit(str(facts.get("proxy_url", ""))).netloc.rpartition("@")[2])
    return Reason(
        StoreRefused,
        f"the proxy {proxy} refuses the connection; correct HTTPS_PROXY or HTTP_PROXY, or name the endpoint in NO_PROXY",
    )


FAILURES: dict[str, _Say] = {
    **dict.fromkeys(("NoCredentialsError", "NoAuthTokenError"), _refuse(f"there are no AWS credentials; {CREDENTIALS}")),
    "PartialCredentialsError": _partial,
    "CredentialRetrievalError": _retrieval,
    **dict.fromkeys(("SSOError", "TokenRetrievalError"), _sso),
    "LoginError": _signed_in,
    "LoginInsufficientPermissions": lambda _: Reason(
        StoreRefused,
        f"profile {plain(profile())} may not renew its login; allow it signin:CreateOAuth2Token, then {login('login')}",
    ),
    "RefreshWithMFAUnsupportedError": _refuse(
        "the role asks for an MFA code again, which nobody can enter now; set the credentials of a long session: "
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
    "MD5UnavailableError": _refuse("this Python has no MD5, which S3 requires; use one without FIPS restrictions"),
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
"""The reason for each of botocore's errors, by its name; one that is not listed has that of its closest listed ancestor."""


def _unusable(error: Exception) -> Reason:
    """Say which of AWS's settings led to an exception that is not botocore's own, while it was set up."""
    where = f"correct profile {plain(profile())} in {files()}, or the AWS_* variables"
    match error:
        case json.JSONDecodeError():
            text = f"the credential_process of profile {plain(profile())} printed no JSON; run it by itself, and correct it in {files()}"
        case OSError():
            text = f"{scrubbed(error)}; {where}"
        case RuntimeError() if "still expired" in str(error):
            text = f"the credentials of {source()} have expired; renew them"
        case EOFError():
            text = "the role asks for an MFA code, and nobody can enter one here; set the credentials of a session that was begun elsewhere"
        case _:
            text = f"AWS's settings cannot be used ({type(error).__name__}: {scrubbed(error)}); {where}"
    return Reason(StoreRefused, text)
