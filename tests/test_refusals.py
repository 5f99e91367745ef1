"""Whatever AWS refuses, and however botocore fails, is one line that says what to do, and holds no secret."""

import hashlib
import importlib.util
import json
import logging
import os
import random
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained, explaining, lambda_client, session
from gradsharding.aws.functions.call import Fault, failed
from gradsharding.aws.functions.log import _line
from gradsharding.aws.reasons import scrubbed
from gradsharding.aws.refusals import reason
from gradsharding.aws.s3.direct import _Discreet
from gradsharding.aws.s3.store import S3Store
from gradsharding.aws.secrets import without_secrets
from gradsharding.aws.unanswered import FAILURES
from gradsharding.errors import GradShardingError, StoreFailed, StoreRefused
from gradsharding.testing import read
from rigs.s3 import S3Server
from rigs.serving import serving

SECRET = "wJalrXUtnFEMI+K7MDENG/bPxRfiCYEXAMPLEKEY"  # noqa: S105 - AWS's own example
KEY = "AKIAIOSFODNN7EXAMPLE"

KINDS = [
    kind
    for kind in vars(botocore.exceptions).values()
    if isinstance(kind, type) and issubclass(kind, BotoCoreError) and kind.__module__ == BotoCoreError.__module__
]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give an empty config file, which is all that this machine knows of AWS."""
    for name in [*os.environ]:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    file = tmp_path / "config"
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))  # where logins are kept
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    return file


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_all_of_botocore(settings: Path, kind: type[BotoCoreError]) -> None:  # noqa: ARG001
    """Each of botocore's errors, but for the base of all, has a sentence of one line with a remedy, and keeps a secret in it to itself."""
    fields = {name for _, name, _, _ in string.Formatter().parse(kind.fmt) if name}
    more: Any = {"last_response": {}} if kind is botocore.exceptions.WaiterError else {}
    error = kind(**dict.fromkeys(fields, f"x {KEY} {SECRET}\n"), **more)
    found = explained(error, "GetObject of s3://b/k")

    assert kind is BotoCoreError or any(one.__name__ in FAILURES for one in kind.__mro__)
    assert found.message.startswith("GetObject of s3://b/k: ")
    assert "; " in found.message
    assert found.message.isprintable()
    assert not [secret for secret in (KEY, SECRET) if secret in found.message]


CONFIG = """
[profile sso]
sso_session = work
sso_account_id = 123456789012
sso_role_name = Admin
[sso-session work]
sso_region = eu-central-1
sso_start_url = https://example.awsapps.com/start
sso_registration_scopes = sso:account:access
[profile old-sso]
sso_start_url = https://example.awsapps.com/start
sso_region = eu-central-1
sso_account_id = 123456789012
sso_role_name = Admin
[profile login]
login_session = arn:aws:iam::123456789012:user/ann
[profile process]
credential_process = /bin/sh -c "echo debug >&2; echo vault: not logged in, token=hush >&2; exit 3"
[profile words]
credential_process = /bin/echo hello
[profile nothing]
credential_process = /bin/echo '{"Version":1}'
[profile program]
credential_process = /no/such/program
[profile loop]
role_arn = arn:aws:iam::123456789012:role/a
source_profile = loop2
[profile loop2]
role_arn = arn:aws:iam::123456789012:role/b
source_profile = loop
[profile nowhere]
role_arn = arn:aws:iam::123456789012:role/a
source_profile = gone
[profile web]
role_arn = arn:aws:iam::123456789012:role/a
web_identity_token_file = /no/such/token
[profile half]
aws_access_key_id = AKIAIOSFODNN7EXAMPLE
"""

PROFILES = {
    "sso": r"^AWS: profile sso has no SSO login, or it has expired; run: aws sso login --profile sso$",
    "old-sso": r"^AWS: profile old-sso has no SSO login, or it has expired; run: aws sso login --profile old-sso$",
    "login": r"^AWS: profile login has no login session, or it has expired; run: aws login --profile login$"
    if importlib.util.find_spec("awscrt")
    else r"^AWS: this needs the package awscrt .*; install it: pip install 'boto3\[crt\]'$",
    "process": r"^AWS: the credential_process of profile process failed \(vault: not logged in, token=…\); run that command by itself",
    "words": r"^AWS: the credential_process of profile words printed no JSON; run it by itself, and correct it in .*config$",
    "nothing": r"^AWS: the credential_process of profile nothing failed \(Missing required key in response: 'AccessKeyId'\); run that",
    "program": r"No such file or directory: '/no/such/program'; correct profile program in .*config",
    "loop": r"Infinite loop in credential configuration detected.*; correct profile loop in .*config",
    "nowhere": r'The source_profile "gone" referenced in the profile "nowhere" does not exist; correct profile nowhere in .*config',
    "web": r"No such file or directory: '/no/such/token'; correct profile web in .*config",
    "half": r"^AWS: the credentials of profile half \(config-file\) lack aws_secret_access_key; set it, or unset the others$",
    "absent": r"^AWS: there is no profile 'absent'; set AWS_PROFILE to one that exists \(half, login, .* and 2 more\), or unset it$",
}


@pytest.mark.parametrize("name", PROFILES)
def test_profiles(settings: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that gives no credentials is told with what is wrong, and with the command or the file that mends it."""
    settings.write_text(CONFIG)
    monkeypatch.setenv("AWS_PROFILE", name)
    for ask in (lambda: S3Store("s3://bucket").head("a"), lambda_client, session):
        with pytest.raises(StoreRefused, match=PROFILES[name]):
            ask()


VARIABLES: dict[str, tuple[dict[str, str], str]] = {
    "half": ({"AWS_SECRET_ACCESS_KEY": ""}, r"the credentials of the environment lack AWS_SECRET_ACCESS_KEY; set it, or unset the others"),
    "over": ({"AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z"}, r"the credentials of the environment have expired; renew them"),
    "region": ({"AWS_DEFAULT_REGION": "a_region!"}, r"knows no region 'a_region!'; set AWS_DEFAULT_REGION to one that exists"),
    "endpoint": ({"AWS_ENDPOINT_URL": "bucket-host"}, r"Invalid endpoint: bucket-host\); correct profile default in .*, or the AWS_\* var"),
    "retries": ({"AWS_DEFAULTS_MODE": "fast"}, r"Client configured with invalid defaults mode: fast.*; correct profile default in"),
}


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.usefixtures("settings")
def test_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of AWS's that makes no sense is named, before anything is asked."""
    given, says = VARIABLES[name]
    for variable, value in ({"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET} | given).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(StoreRefused, match=says) as caught:
        S3Store("s3://bucket").head("a")
    assert KEY not in caught.value.message


@pytest.mark.parametrize("text", ["[default", "region = x", "[profile a]\n x\n"])
def test_malformed(settings: Path, text: str) -> None:
    """A config file that cannot be read is named."""
    settings.write_text(text)
    with pytest.raises(
        StoreRefused, match=rf"^AWS: AWS's configuration {settings} cannot be read \(.*\); correct it, or set AWS_CONFIG_FILE$"
    ):
        session()


def test_command_line(settings: Path, tmp_path: Path) -> None:
    """The command line says it in exactly one line, and exits with 2, whatever is asked of AWS; a login that has expired is none."""
    settings.write_text(CONFIG)
    cache = settings.parent / ".aws/sso/cache"
    cache.mkdir(parents=True)
    login = {
        "accessToken": "hush",
        "expiresAt": "2020-01-01T00:00:00Z",
        "region": "eu-central-1",
        "startUrl": "https://example.awsapps.com",
    }
    (cache / f"{hashlib.sha1(b'work', usedforsecurity=False).hexdigest()}.json").write_text(json.dumps(login))
    aggregate = ["aggregate", "s3://bucket/a", "-o", "s3://bucket/mean"]
    asked = {
        "sso": aggregate,
        "process": [*aggregate, "--executor", "lambda:f"],
        "old-sso": ["deploy"],
        "absent": ["destroy", "--yes"],
    }
    begun = {
        name: subprocess.Popen(
            [sys.executable, "-m", "gradsharding", *words],
            env=os.environ | {"AWS_PROFILE": name},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, words in asked.items()
    }
    for name, process in begun.items():
        out, err = process.communicate(timeout=120)
        assert (2, "", 1) == (process.returncode, out, len(err.splitlines())), err
        message = err.removeprefix("gradsharding: ").strip()
        with pytest.raises(StoreRefused, match=PROFILES[name]):
            raise StoreRefused(message)


# What AWS answers, in the forms that its services have.

Answer = tuple[int, dict[str, str], bytes]


def _xml(code: str, message: str, more: str = "") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message>{more}<RequestId>r</RequestId></Error>".encode()


def _query(code: str, message: str) -> bytes:
    return b"<ErrorResponse>" + _xml(code, message).replace(b"<RequestId>r</RequestId>", b"") + b"<RequestId>r</RequestId></ErrorResponse>"


def _as(form: str, status: int, code: str, message: str, more: str = "", **headers: str) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    match form:
        case "s3":
            return status, sent | {"Content-Type": "application/xml"}, _xml(code, message, more)
        case "query":
            return status, sent | {"Content-Type": "text/xml"}, _query(code, message)
        case "rest-json":
            return status, sent | {"x-amzn-ErrorType": code}, json.dumps({"Message": message}).encode()
    return status, sent | {"Content-Type": "application/x-amz-json-1.1"}, json.dumps({"__type": code, "message": message}).encode()


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Run a server that answers each request so, on loopback; give its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # it answers Expect: 100-continue, for which botocore waits a second

        def do_GET(self) -> None:
            status, headers, body = answer
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - http.server names them so

        def log_message(self, *_: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


Ask = Callable[[], object]


def _ask(service: str) -> Ask:
    store = S3Store("s3://bucket")
    return {
        "s3": lambda: read(store, "a"),
        "head": lambda: store.head("a"),
        "put": lambda: store.put("a", [b"x"]),
        "list": lambda: [*store.list("")],
        "fetch": lambda: [*store.fetch([f"{i}" for i in range(9)])],
        "sts": lambda: session().client("sts").get_caller_identity(),
        "cloudformation": lambda: session().client("cloudformation").describe_stacks(StackName="x"),
        "lambda": lambda: lambda_client().get_account_settings(),
        "logs": lambda: session().client("logs").describe_log_groups(),
    }[service]


FORMS = {"sts": "query", "cloudformation": "query", "lambda": "rest-json", "logs": "json"}

STRANGER, FORGED, OVER = "there is no such access key", "the secret key does not belong", "the session has expired; renew the credentials"
CLOCK, TORN, OFF = "this machine's clock is wrong; set it", "the credentials are incomplete", "the account may not use this service"
LIES = r"the bucket is in region eu-west-3; set AWS_DEFAULT_REGION to that"

ECHO = f"The AWS Access Key Id {KEY} ... The Canonical String for this request should have been 'GET /?X-Amz-Security-Token={SECRET}'"
OLD = "Signature expired: 20261128T000000Z is now earlier than 20261128T060000Z (20261128T061500Z - 15 min.)"
BY = "User: arn:aws:sts::1:assumed-role/r/s is not authorized to perform: {0} on resource: x because no {1} policy allows the {0} action"

ANSWERS: list[tuple[str, int, str, str, str]] = [
    ("s3", 403, "InvalidAccessKeyId", ECHO, STRANGER),
    ("sts", 403, "InvalidClientTokenId", "The security token included in the request is invalid", STRANGER),
    ("cloudformation", 403, "InvalidClientTokenId", "The security token included in the request is invalid.", STRANGER),
    (
        "cloudformation",
        400,
        "ValidationError",
        "Role arn:aws:iam::123456789012:role/gone is invalid or cannot be assumed",
        "ValidationError Role .*gone .*; let cloudformation.amazonaws.com assume that role, or name another one with --service-role$",
    ),
    ("lambda", 403, "UnrecognizedClientException", "The security token included in the request is invalid.", STRANGER),
    ("logs", 400, "UnrecognizedClientException", "The security token included in the request is invalid.", STRANGER),
    ("s3", 403, "SignatureDoesNotMatch", ECHO, FORGED),
    ("sts", 403, "SignatureDoesNotMatch", ECHO, FORGED),
    ("lambda", 403, "InvalidSignatureException", ECHO, FORGED),
    ("logs", 400, "InvalidSignatureException", ECHO, FORGED),
    ("sts", 403, "SignatureDoesNotMatch", OLD, CLOCK),
    ("lambda", 403, "InvalidSignatureException", OLD, CLOCK),
    ("s3", 403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.", CLOCK),
    ("cloudformation", 400, "RequestExpired", "Request has expired.", CLOCK),
    ("s3", 400, "ExpiredToken", f"The provided token has expired: {SECRET}", OVER),
    ("s3", 400, "TokenRefreshRequired", "The provided token must be refreshed.", OVER),
    ("put", 400, "ExpiredToken", "The provided token has expired.", OVER),
    ("list", 400, "ExpiredToken", "The provided token has expired.", OVER),
    ("fetch", 400, "ExpiredToken", "The provided token has expired.", OVER),
    ("sts", 403, "ExpiredToken", "The security token included in the request is expired", OVER),
    ("cloudformation", 403, "ExpiredToken", "The security token included in the request is expired", OVER),
    ("lambda", 403, "ExpiredTokenException", "The security token included in the request is expired", OVER),
    ("logs", 400, "ExpiredTokenException", "The security token included in the request is expired", OVER),
    ("s3", 400, "InvalidToken", "The provided token is malformed or otherwise invalid.", TORN),
    ("sts", 403, "MissingAuthenticationToken", "Request is missing Authentication Token", TORN),
    ("cloudformation", 400, "IncompleteSignature", ECHO, TORN),
    ("lambda", 403, "MissingAuthenticationTokenException", "Missing Authentication Token", TORN),
    ("cloudformation", 403, "OptInRequired", "The AWS Access Key Id needs a subscription for the service", OFF),
    ("s3", 403, "NotSignedUp", "Your account is not signed up for the Amazon S3 service.", OFF),
    (
        "s3",
        403,
        "InvalidObjectState",
        "The operation is not valid for the object's storage class",
        "is in an archive, such as Glacier; restore",
    ),
    ("s3", 400, "KMS.DisabledException", "arn is disabled.", "the KMS key that encrypts it cannot be used .*; enable it"),
    (
        "s3",
        403,
        "AccessDenied",
        "Access Denied",
        r"denied \(AccessDenied\); allow the caller this action there, .*; without s3:ListBucket, S3 denies access also to",
    ),
    (
        "put",
        403,
        "AccessDenied",
        BY.format("s3:PutObject", "identity-based"),
        "no identity-based policy allows .*; allow the caller s3:PutObject there",
    ),
    ("head", 403, "", "", r"access is denied \(403\); .*; without s3:ListBucket, S3 denies access also to an object that does not exist$"),
    ("head", 400, "", "", r"refused without a reason, .*; renew the credentials of the environment, and check AWS_DEFAULT_REGION"),
    ("sts", 403, "AccessDenied", BY.format("sts:GetCallerIdentity", "session"), "allow the caller sts:GetCallerIdentity there, or"),
    (
        "lambda",
        403,
        "AccessDeniedException",
        BY.format("lambda:GetAccountSettings", "boundary"),
        "allow the caller lambda:GetAccountSettings there",
    ),
    (
        "logs",
        400,
        "AccessDeniedException",
        BY.format("logs:DescribeLogGroups", "x"),
        "allow the caller logs:DescribeLogGroups there",
    ),
]


@pytest.mark.parametrize(("service", "status", "code", "message", "says"), ANSWERS, ids=lambda one: str(one)[:24])
@pytest.mark.usefixtures("settings")
def test_answers(service: str, status: int, code: str, message: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AWS answers, in the spelling of each service, is told with its remedy, and without what the answer echoes."""
    with answering(_as(FORMS.get(service, "s3"), status, code, message)) as url:
        for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreRefused, match=says) as caught, explaining("asking"):
            _ask(service)()
    assert not [secret for secret in (KEY, SECRET, "X-Amz") if secret in caught.value.message]
    assert (says[:6] in ("access", "denied", "no ide", "allow ")) == caught.value.details.get("denied", False)


@pytest.mark.parametrize("service", ["s3", "head", "put", "list"])
@pytest.mark.parametrize(
    ("status", "code", "more"),
    [
        (301, "PermanentRedirect", ""),
        (400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"),
        (400, "IllegalLocationConstraintException", ""),
    ],
)
@pytest.mark.usefixtures("settings")
def test_elsewhere(service: str, status: int, code: str, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of another region is told with that region, whatever is asked, also where the answer has no body."""
    with answering(_as("s3", status, code, "use the other endpoint", more, x_amz_bucket_region="eu-west-3")) as url:
        for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreRefused, match=LIES):
            _ask(service)()


SOURCE = (
    f"[profile s]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n[profile r]\nrole_arn = arn:aws:iam::123456789012:role/a\n"
)

ROLES = {
    "denied": ("source_profile = s", "AccessDenied", r"\(AssumeRole: AccessDenied\); check role_arn and external_id, and that"),
    "expired": ("source_profile = s", "ExpiredToken", r"\(AssumeRole: ExpiredToken\); the session has expired; renew the credentials"),
    "region": ("source_profile = s", "RegionDisabledException", r"; the account may not use this service, or not in region eu-central-1; "),
    "web": ("web_identity_token_file = {token}", "InvalidIdentityToken", r"\(AssumeRoleWithWeb\w+: Inv\w+\); check the role's ARN, its"),
}
"""How a role's credentials are asked for, what AWS answers, and what to say."""


@pytest.mark.parametrize("name", ROLES)
def test_role_without_credentials(settings: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A role that gives no credentials is told as such, not as a lack of rights to what is asked for."""
    given, code, says = ROLES[name]
    token = settings.with_name("token")
    token.write_text("a token")
    settings.write_text(SOURCE + given.format(token=token) + "\n")
    monkeypatch.setenv("AWS_PROFILE", "r")
    with answering(_as("query", 403, code, BY.format("sts:AssumeRole", "x"))) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(StoreRefused, match=rf"^AWS: AWS gave profile r no credentials .*{says}"):
            S3Store("s3://bucket").head("a")


def _unsent(kind: str, **facts: Any) -> BotoCoreError:
    error: BotoCoreError = getattr(botocore.exceptions, kind)(**facts)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            _unsent("EndpointConnectionError", endpoint_url="https://s3.eu-cenral-1.amazonaws.com/b", error="Failed to resolve 's3'"),
            StoreRefused,
            r"^s3\.eu-cenral-1\.amazonaws\.com has no address: .* no region 'eu-cenral-1'; set AWS_DEFAULT_REGION to .* eu-central-1$",
        ),
        (
            _unsent("EndpointConnectionError", endpoint_url="https://s3.eu-central-1.amazonaws.com/b", error="Failed to resolve 's3'"),
            StoreFailed,
            r"^s3\.eu-central-1\.amazonaws\.com has no address in DNS; check its name",
        ),
        (
            _unsent("EndpointConnectionError", endpoint_url="http://me:hush@minio:9000/b", error="[Errno 111] Connection refused"),
            StoreFailed,
            r'^no answer after several attempts \(Could not connect to the endpoint URL: "http://…@minio:9000/b"\); check the network',
        ),
        (
            _unsent("ProxyConnectionError", proxy_url="http://me:hush@proxy:3128", error="407"),
            StoreRefused,
            r"^the proxy proxy:3128 refuses the connection; correct HTTPS_PROXY",
        ),
        (
            _unsent("ConnectTimeoutError", endpoint_url="https://s3.eu-central-1.amazonaws.com/b", error="timed out"),
            StoreFailed,
            r"^s3\.eu-central-1\.amazonaws\.com accepted no connection in several attempts; check firewalls, in a VPC the gateway endpoint",
        ),
        (
            _unsent(
                "SSLError",
                endpoint_url="https://minio/b",
                error="('x', SSLCertVerificationError(1, 'certificate verify failed: self-signed'))",
            ),
            StoreRefused,
            r"^minio is not trusted \(certificate verify failed: self-signed\); .* set AWS_CA_BUNDLE",
        ),
        (
            _unsent("SSLError", endpoint_url="https://minio/b", error="EOF occurred"),
            StoreFailed,
            r"^TLS with minio failed \(EOF occurred\)",
        ),
        (
            _unsent("MetadataRetrievalError", error_msg="timed out"),
            StoreRefused,
            r"^this machine's metadata gave no .*; attach a role to it",
        ),
        (EOFError(), StoreRefused, r"asks for an MFA code, and nobody can enter one here; set the credentials"),
        (
            ClientError({"Error": {"Code": "InternalError", "Message": "We"}}, "PutObject"),
            StoreFailed,
            r"^AWS answered 0 InternalError We; run it",
        ),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
@pytest.mark.usefixtures("settings")
def test_network(error: Exception, kind: type[GradShardingError], says: str) -> None:
    """What stands between us and AWS is named: a region or a host that is not there, a firewall, a proxy, a certificate, a role."""
    found = reason(error)
    with pytest.raises(kind, match=says):
        raise found.kind(found.text)
    assert "hush" not in found.text


def test_no_file_of_certificates(moto: S3Server, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of certificates that is not there is told as such, over TLS."""
    for name, value in (moto.environment() | {"AWS_ENDPOINT_URL_S3": moto.endpoint.replace("http:", "https:")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(settings))
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    with pytest.raises(StoreRefused, match=r"the file of certificates that AWS_CA_BUNDLE names does not exist \(.no.such.bundle\)"):
        S3Store("s3://bucket").head("a")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("one\ntwo", "one"),
        (f"The key {KEY} is unknown", "The key … is unknown"),
        (f"no such {SECRET} here", "no such … here"),
        ("see https://a:b@host/x?X-Amz-Signature=1&y=2 now", "see https://…@host/x?… now"),
        ("SecretAccessKey: abc, session_token = 'def' password=x", "SecretAccessKey: …, session_token = '…' password=…"),
        ("The Canonical String for this request should have been 'GET", ""),
        ("a\x1b[2Jb", "a [2Jb"),
        ("aws_session_token=IQoJb3JpZ2lu/x==, aws_access_key_id = x", "aws_session_token=…, aws_access_key_id = …"),
        ('{"SecretAccessKey": "/a+b", "Code": "x"} of \'Token\': \'y\'', '{"SecretAccessKey": "…", "Code": "x"} of \'Token\': \'…\''),
        (r"in {\"sessionToken\": \"abc\"}", r"in {\"sessionToken\": \"…\"}"),
        ("<SessionToken>IQoJ</SessionToken> ends", "<SessionToken>…</SessionToken> ends"),
        ("proxy http://ann:p@ss:word@proxy:3128/ says no", "proxy http://…@proxy:3128/ says no"),
        ("Authorization: Bearer abc.def-g was sent", "Authorization: Bearer … was sent"),
        ("Credential=ASIAIOSFODNN7EXAMPLE/20261128/eu-west-1", "Credential=…/20261128/eu-west-1"),
        ("no arn:aws:secretsmanager:eu-west-1:1:secret:db-AbC there", "no arn:aws:secretsmanager:eu-west-1:1:secret:db-AbC there"),
        ("'/run/secrets/token: x' and /a/b.token: gone", "'/run/secrets/token: x' and /a/b.token: gone"),
    ],
)
def test_scrubbed(text: str, left: str) -> None:
    """What others wrote comes into a message on one line, and into a log as it is, without keys, tokens, passwords and signatures."""
    assert left == scrubbed(text)
    logged = logging.LogRecord("urllib3.connectionpool", logging.DEBUG, "", 1, "%s", (text,), None)
    assert _Discreet().filter(logged)
    [first, *_] = without_secrets(text).splitlines() or [""]
    assert first == json.loads(_line(logged))["message"].partition("\n")[0]
    assert left == scrubbed(first)


LABELS = (
    "aws_secret_access_key = {}",
    '"SecretAccessKey": "{}"',
    "secret key: {}",
    "AWS_SECRET_ACCESS_KEY={}",
    "<SecretAccessKey>{}</SecretAccessKey>",
)

_ALPHABET = string.ascii_letters + string.digits + "+/"


def _drawn(size: int, count: int) -> list[str]:
    """Draw strings of the letters that secret keys and tokens of AWS's have."""
    draw = random.Random(20261128)
    return ["".join(draw.choices(_ALPHABET, k=size)) for _ in range(count)]


@pytest.mark.parametrize("label", LABELS)
def test_drawn_keys_with_a_label(label: str) -> None:
    """A secret key that is called one is always left out."""
    assert [label.format("…")] * 200 == [without_secrets(label.format(key)) for key in _drawn(40, 200)]


def test_drawn_keys_without_a_label() -> None:
    """A secret key alone is left out but for one in thousands, which changes its case seldom; a token always."""
    assert 2 >= sum("no … here" != without_secrets(f"no {key} here") for key in _drawn(40, 5000))
    assert ["…"] * 200 == [without_secrets(token) for token in _drawn(400, 200)]
    assert ["…"] * 200 == [without_secrets(token.translate(str.maketrans("+/", "-_")) + "==") for token in _drawn(86, 200)]


@pytest.mark.parametrize(
    "text",
    [
        "No such file or directory: '/home/someuser/projects/federated/learning/secrets/token'",
        "/home/Ann/projects/FederatedLearning2/Data/round1/clients/Hospital7/update.safetensors",
        "/Users/AnnLee/Library/Application Support/Code/User/workspaceStorage/GradSharding2026/State",
        "/usr/local/lib/python3.13/site-packages/gradsharding/aws/refusals.py",
        "C:/Users/AnnLee/AppData/Local/Programs/Python/Python313/Lib/site-packages/botocore",
        "/nix/store/3f2a9c0b1d4e5f60718293a4b5c6d7e8-python3-3.13.0/lib/python3.13/site-packages",
        "arn:aws:sts::123456789012:assumed-role/FederatedLearningRoundAggregatorFunctionRoleForHospitals2026/i-0abc",
        "arn:aws:iam::123456789012:role/aws-reserved/sso.amazonaws.com/AWSReservedSSO_AdministratorAccess_0a1b2c3d4e5f6a7b",
        "arn:aws:iam::123456789012:role/AWSServiceRoleForAmazonElasticFileSystemAndLambdaReplication",
        "arn:aws:lambda:eu-central-1:123456789012:function:gradsharding-Parent-1AB2CD3EF4GH-Function-1AB2CD3EF4GH",
        "arn:aws:kms:eu-central-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "s3://gradsharding-updatesbucket-x1y2z3a4b5c6/Experiment/FedAvgOnMNIST/Round0001/Clients/Hospital42/update",
        "gradsharding/3f2a9c0b1d4e5f60718293a4b5c6d7e83f2a9c0b1d4e5f60718293a4b5c6d7e8.zip",
        "gradsharding-code-123456789012-eu-central-1.s3.dualstack.eu-central-1.amazonaws.com",
        "internal-GradShardingLoadBalancer-1234567890.eu-central-1.elb.amazonaws.com",
        "how-to-run-it-on-a-gpu-in-the-eu-or-us-west-with-names-of-short-words",
        "models%2FLlama%2FRound0001%2FClients%2FHospital42%2Fupdate",
    ],
)
def test_names_stay(text: str) -> None:
    """Paths, ARNs, keys and hosts' names, however long, stay: a message is about them."""
    assert text == without_secrets(text) == scrubbed(text)


def test_every_line_of_a_log() -> None:
    """A traceback keeps its lines, and loses what is secret in each of them."""
    error = OSError("no\naws_session_token=IQoJ\nredis://:hush@host:6379/0")
    error.__cause__ = KeyError(f"https://b.s3.amazonaws.com/k?X-Amz-Credential={KEY}%2F2026&X-Amz-Signature=0a1b2c")
    record = logging.LogRecord("x", logging.ERROR, "", 1, "broken", (), (OSError, error, None))
    text = json.loads(_line(record))["exception"]
    assert "KeyError: 'https://b.s3.amazonaws.com/k?…'" in text.splitlines()
    assert ["OSError: no", "aws_session_token=…", "redis://…@host:6379/0"] == text.splitlines()[-3:]


def test_fault_tells_no_secret() -> None:
    """What a function raises, which Lambda logs, holds no secret."""
    with pytest.raises(Fault) as caught:
        failed(KeyError("aws_session_token=hush https://b/k?X-Amz-Signature=hush"), [])
    assert "hush" not in str(caught.value)


@pytest.mark.usefixtures("settings")
def test_what_a_server_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server that is not AWS's says of what it cannot do is told in one line, cut, and without a secret."""
    with answering(_as("s3", 501, "NotImplemented", f"no, {SECRET}, {'never ' * 1000}\nat all")) as url:
        for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreRefused, match=r"cannot do that \(.*NotImplemented.*: no, …, never .*\); ") as caught:
            S3Store("s3://bucket").put("a", [b"x"])
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700
