"""One client for each service and account, made as the standard AWS environment says; what AWS refuses is said in a sentence."""

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
"""Connections that one client keeps open at most."""

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
"""Variables that a client is made by."""

_MAKING = threading.Lock()
"""A cache lets threads that ask at once each make a client, and each takes memory that no plan counts."""


LISTS = {"ListObjectsV2", "ListParts"}
"""Operations that S3 bills as LIST, and HTTP knows as GET."""

DELETES = {"DeleteObjects"}
"""Operations that S3 counts as DELETE (DeleteRequests in https://docs.aws.amazon.com/AmazonS3/latest/userguide/metrics-dimensions.html),
and HTTP knows as POST."""


def _before_send(request: Any, event_name: str, **_: Any) -> None:
    operation, method = event_name.rpartition(".")[2], request.method
    take_turn(reads=method in ("GET", "HEAD"))  # tasks have a share, whose threads may wait
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
    """Tell botocore how many seconds to wait before it asks again; None to take the answer as it is."""
    patience: Patience = request_dict["context"].setdefault(PATIENCE_KEY, Patience())
    if response is None:
        return patience.broke() if isinstance(caught_exception, (NotConnected, HTTPClientError)) else None
    status, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
    if status in BUSY or code in THROTTLES:
        response[1].setdefault("ResponseMetadata", {})[PATIENCE_KEY] = patience
        return patience.too_much()
    return patience.broke() if status in FAILURES or code in FAILED else None


def _with_md5(request: Any, **_: Any) -> None:
    """Add what a request that deletes many objects must have on servers older than boto3's CRC-32: Swift, and MinIO for years."""
    if "Content-MD5" not in request.headers:
        request.headers["Content-MD5"] = b64encode(hashlib.md5(request.body, usedforsecurity=False).digest()).decode()


def s3_client(bucket: str = "", signer: str | None = None) -> "S3Client":
    """Give the S3 client of the environment as it is now, for a bucket; threads may share it.

    ``signer`` names another signature than botocore's own. Raise UserError for a demand of the environment's that makes no sense, and
    StoreRefused as ``session`` does.
    """
    with _MAKING, _setting_up():
        return _s3_client(environment(), _is_arn(bucket), signer)


def s3_settings(session: Any, bucket: str) -> dict[str, Any]:
    """Give the settings of an S3 client of a session of botocore's, for a bucket.

    Buckets are addressed by paths, which all servers know, unless the profile says otherwise; an access point has no path.
    """
    style = "auto" if _is_arn(bucket) else (session.get_scoped_config().get("s3") or {}).get("addressing_style", "path")
    # A body is signed by its SHA-256 otherwise, which costs more than all the rest; TLS and the CRC-32 that we send protect it.
    return S3_CONFIG | {"s3": {"addressing_style": style, "payload_signing_enabled": False}}


def prepare(client: Any) -> None:
    """Have an S3 client of boto3's ask as ours do.

    It counts what it sends, keeps to its share, is patient, sends what is demanded, and takes Ceph's names of buckets, too.
    """
    # Botocore's standard mode takes what is too much for broken: six attempts, 15 s in the mean; and no more at all, whatever the request,
    # once a quota of the client's is spent: 500 tokens, of which each retry takes five, and a success gives but the last five back.
    client.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
    client.meta.events.register("needs-retry.s3", _needs_retry)
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)  # it refuses tenant:bucket; S3Store checks names
    client.meta.events.register("before-send.s3", _before_send)
    if not dialect(client.meta.endpoint_url).aws:
        client.meta.events.register("before-sign.s3.DeleteObjects", _with_md5)
    meet_demands(client)


def _is_arn(bucket: str) -> bool:
    return bucket.startswith("arn:")


def lambda_client(read_timeout: float = 60) -> "LambdaClient":
    """Give a Lambda client of the environment as it is now. It never tries again by itself: who calls it knows what may run twice."""
    with _MAKING, _setting_up():
        return _lambda_client(environment(), read_timeout)


def session() -> boto3.session.Session:
    """Give boto3's session of the environment as it is now, whose credentials have been found: none, if there are none.

    Raise StoreRefused for a profile, a file, a login or a program of the user's that gives none although it should.
    """
    with _MAKING, _setting_up():
        return _session(environment()).boto3


def seconds_left(least: float) -> float | None:
    """Seconds that the environment's credentials will last; None if they last, or do not say.

    Those that end in fewer than ``least`` seconds are renewed first, if they can be. Raise StoreRefused for a login that has ended.
    """
    found: Any = session().get_credentials()
    if not isinstance(found, RefreshableCredentials) or getattr(found, "_expiry_time", None) is None:
        return None
    own: Any = found  # botocore tells nobody when they end, and renews them by a time of its own only
    with _setting_up(), own._refresh_lock:  # noqa: SLF001
        if own.refresh_needed(least):
            own._protected_refresh(is_mandatory=True)  # noqa: SLF001
        return float(own._seconds_remaining())  # noqa: SLF001


def seconds_in_all() -> float | None:
    """Seconds after which the environment's credentials end, and nothing here can renew them; None if they last, or do not say."""
    found = session().get_credentials()
    return seconds_left(0) if found and found.method == "env" else None


def explained(error: Exception, doing: str) -> GradShardingError:
    """Say what AWS refused, or that it did not answer, and what to do; ``doing`` is what was asked for, such as "GetObject of s3://b/k".

    ``details["denied"]`` says that it is, or looks like, a lack of permission.
    """
    meta: Any = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
    patience: Patience | None = meta.get(PATIENCE_KEY)
    if patience:
        return patience.error(doing, refusals.code_of(error) or str(meta["HTTPStatusCode"]))
    why, code = refusals.reason(error), refusals.code_of(error)
    facts: dict[str, Any] = ({"code": code} if code else {}) | ({"denied": True} if why.denied else {})
    return why.kind(f"{doing}: {why.said}", **facts)


@contextmanager
def explaining(doing: str) -> Iterator[None]:
    """Turn what botocore raises within into our errors."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise explained(error, doing) from error


@contextmanager
def _setting_up() -> Iterator[None]:
    """Turn whatever botocore, a file or a program of the user's raises within into our errors."""
    try:
        yield
    except GradShardingError:
        raise
    except Exception as error:
        raise explained(error, "AWS") from error


class _Session(NamedTuple):
    """What clients are made of: they share the credentials, and when those are renewed."""

    botocore: botocore.session.Session
    boto3: boto3.session.Session


@lru_cache(maxsize=8)
def _session(_: Environment) -> _Session:
    found = botocore.session.get_session()
    if credentials := found.get_credentials():
        credentials.get_frozen_credentials()  # of a role, a login or a program: what goes wrong there is told now, not in a request
    return _Session(found, boto3.session.Session(botocore_session=found))


@lru_cache(maxsize=8)
def _s3_client(environment: Environment, arn: bool, signer: str | None) -> "S3Client":  # noqa: FBT001 - where lru_cache is used
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
    """Give what clients depend on: AWS's variables, and ours for S3."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GRADSHARDING_S3_"))))
