"""One client for each service and account, made from the standard AWS environment; each of AWS's errors becomes one sentence."""

import hashlib
import os
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NotConnected
from botocore.handlers import validate_bucket_name

from gradsharding.aws import refusals
from gradsharding.aws.demands import meet_demands
from gradsharding.aws.dialect import dialect
from gradsharding.aws.keepalive import keep_alive
from gradsharding.aws.patience import BUSY, FAILED, FAILURES, THROTTLES, Patience
from gradsharding.errors import GradShardingError
from gradsharding.running.pace import take_turn
from gradsharding.usage import count

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient
    from mypy_boto3_s3 import S3Client

CONNECTIONS = 64
"""Connections that one client keeps open, at most."""

S3_CONFIG: dict[str, Any] = {
    "signature_version": "s3v4",
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "retries": {"mode": "standard"},  # which ``prepare`` replaces
    "max_pool_connections": CONNECTIONS,
    "connect_timeout": 10,
    "read_timeout": 60,
    "tcp_keepalive": True,
}
"""Botocore's settings for S3."""

PATIENCE_KEY = "gradsharding.patience"
"""Key of the Patience that botocore carries with each request, and with its answer."""

Environment = tuple[tuple[str, str], ...]
"""The environment variables from which a client is made."""

_MAKING = threading.Lock()
"""Held while a client is made: ``lru_cache`` alone lets several threads each make one, and each takes memory that no plan counts."""

LISTS = {"ListObjectsV2", "ListParts"}
"""Operations that S3 bills as LIST, although their HTTP method is GET."""

DELETES = {"DeleteObjects"}
"""Operations that S3 counts as DELETE, although their HTTP method is POST
(DeleteRequests in https://docs.aws.amazon.com/AmazonS3/latest/userguide/metrics-dimensions.html)."""


def _before_send(request: Any, event_name: str, **_: Any) -> None:
    operation, method = event_name.rpartition(".")[2], request.method
    take_turn(reads=method in ("GET", "HEAD"))  # a task waits for its share of S3's request rate
    if operation in DELETES or method == "DELETE":
        count("s3", deletes=1)
    elif operation in LISTS:
        count("s3", puts=1)
    elif method in ("GET", "HEAD"):
        count("s3", gets=1)
    else:
        objects = operation in ("PutObject", "UploadPart")
        count("s3", puts=1, bytes_written=int(request.headers.get("Content-Length") or 0) if objects else 0)


def _needs_retry(response: Any, caught_exception: Exception | None, request_dict: dict[str, Any], **_: Any) -> float | None:
    """Return the seconds that botocore waits before it retries; None to accept the answer."""
    patience: Patience = request_dict["context"].setdefault(PATIENCE_KEY, Patience())
    if response is None:
        return patience.broke() if isinstance(caught_exception, (NotConnected, HTTPClientError)) else None
    status, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
    if status in BUSY or code in THROTTLES:
        response[1].setdefault("ResponseMetadata", {})[PATIENCE_KEY] = patience
        return patience.too_much()
    return patience.broke() if status in FAILURES or code in FAILED else None


def _with_md5(request: Any, **_: Any) -> None:
    """Add the MD5 that servers from before boto3's CRC-32 require in DeleteObjects: Swift, and MinIO for years."""
    if "Content-MD5" not in request.headers:
        request.headers["Content-MD5"] = b64encode(hashlib.md5(request.body, usedforsecurity=False).digest()).decode()


def s3_client(bucket: str = "", signer: str | None = None) -> "S3Client":
    """Return the S3 client of the environment as it is now, for a bucket; threads may share it.

    ``signer`` names a signature in place of botocore's own. Raise UserError for an invalid demand of the environment, and StoreRefused
    as ``session`` does.
    """
    with _MAKING, _setting_up():
        return _s3_client(environment(), _is_arn(bucket), signer)


def s3_settings(session: Any, bucket: str) -> dict[str, Any]:
    """Return the settings of an S3 client of a botocore session, for a bucket.

    Buckets are addressed by path, which every server supports, unless the profile says otherwise; access points have no path.
    """
    style = "auto" if _is_arn(bucket) else (session.get_scoped_config().get("s3") or {}).get("addressing_style", "path")
    # By default a body is signed by its SHA-256, which costs more than all the rest; TLS and our CRC-32 protect it.
    return S3_CONFIG | {"s3": {"addressing_style": style, "payload_signing_enabled": False}}


def prepare(client: Any) -> None:
    """Make an S3 client of boto3 behave as ours do.

    It counts its requests, keeps to its share, retries patiently, meets the demands, and accepts Ceph's bucket names.
    """
    # Botocore's standard mode treats throttling as failure: six attempts, 15 s on average. And it stops retrying any request once the
    # client's quota is spent: 500 tokens, of which each retry takes five, and a success returns only the last five.
    client.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
    client.meta.events.register("needs-retry.s3", _needs_retry)
    client.meta.events.unregister(
        "before-parameter-build.s3", validate_bucket_name
    )  # it refuses tenant:bucket; S3Store checks names itself
    client.meta.events.register("before-send.s3", _before_send)
    if not dialect(client.meta.endpoint_url).aws:
        client.meta.events.register("before-sign.s3.DeleteObjects", _with_md5)
    meet_demands(client)


def _is_arn(bucket: str) -> bool:
    return bucket.startswith("arn:")


def lambda_client(read_timeout: float = 60) -> "LambdaClient":
    """Return a Lambda client of the environment as it is now. It never retries: only its caller knows what may run twice."""
    with _MAKING, _setting_up():
        return _lambda_client(environment(), read_timeout)


def session() -> boto3.session.Session:
    """Return boto3's session of the environment as it is now, with the credentials resolved, if there are any.

    Raise StoreRefused if a profile, a file, a login or a program of the user's should give credentials, and fails to.
    """
    with _MAKING, _setting_up():
        return _session(environment()).boto3


def seconds_left(least: float) -> float | None:
    """Return the seconds until the environment's credentials expire; None if they never expire, or their expiry is not known.

    Credentials that expire in fewer than ``least`` seconds are renewed first, if possible. Raise StoreRefused for a login that has expired.
    """
    found: Any = session().get_credentials()
    if not isinstance(found, RefreshableCredentials) or getattr(found, "_expiry_time", None) is None:
        return None
    own: Any = found  # botocore has no public way to read the expiry, or to renew before a chosen time
    with _setting_up(), own._refresh_lock:  # noqa: SLF001
        if own.refresh_needed(least):
            own._protected_refresh(is_mandatory=True)  # noqa: SLF001
        return float(own._seconds_remaining())  # noqa: SLF001


def seconds_in_all() -> float | None:
    """Return the seconds until credentials expire that cannot be renewed here; None if they can be, or their expiry is not known."""
    found = session().get_credentials()
    return seconds_left(0) if found and found.method == "env" else None


def explained(error: Exception, doing: str) -> GradShardingError:
    """Return our error for an error of botocore's, with the remedy; ``doing`` names the request, such as "GetObject of s3://b/k".

    ``details["denied"]`` is set if it is, or looks like, a lack of permission.
    """
    metadata: Any = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
    patience: Patience | None = metadata.get(PATIENCE_KEY)
    if patience:
        return patience.error(doing, refusals.code_of(error) or str(metadata["HTTPStatusCode"]))
    reason, code = refusals.reason(error), refusals.code_of(error)
    facts: dict[str, Any] = ({"code": code} if code else {}) | ({"denied": True} if reason.denied else {})
    return reason.kind(f"{doing}: {reason.text}", **facts)


@contextmanager
def explaining(doing: str) -> Iterator[None]:
    """Within, turn errors of botocore's into ours."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise explained(error, doing) from error


@contextmanager
def _setting_up() -> Iterator[None]:
    """Within, turn whatever botocore, or a file or a program of the user's, raises into our errors."""
    try:
        yield
    except GradShardingError:
        raise
    except Exception as error:
        raise explained(error, "AWS") from error


class _Session(NamedTuple):
    """Sessions from which clients are made, so that they share credentials and their renewal."""

    botocore: botocore.session.Session
    boto3: boto3.session.Session


@lru_cache(maxsize=8)
def _session(_: Environment) -> _Session:
    found = botocore.session.get_session()
    if credentials := found.get_credentials():
        credentials.get_frozen_credentials()  # a role, a login or a program may fail: better now than in a request
    return _Session(found, boto3.session.Session(botocore_session=found))


@lru_cache(maxsize=8)
def _s3_client(environment: Environment, arn: bool, signer: str | None) -> "S3Client":  # noqa: FBT001 - for lru_cache
    session = _session(environment)
    client = session.boto3.client("s3", config=Config(**s3_settings(session.botocore, "arn:" if arn else "")))
    prepare(client)
    if signer:
        client.meta.events.register("choose-signer.s3", lambda **_: signer)  # type: ignore[arg-type]  # what it gives is used
    return client


@lru_cache(maxsize=8)
def _lambda_client(environment: Environment, read_timeout: float) -> "LambdaClient":
    config = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=1_000,
        connect_timeout=10,
        read_timeout=read_timeout,
    )
    session = _session(environment)
    client = session.boto3.client("lambda", config=config)
    keep_alive(client, session.botocore.get_config_variable("ca_bundle"))
    return client


def environment() -> Environment:
    """Return the variables on which clients depend: AWS's, and ours for S3."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GRADSHARDING_S3_"))))
