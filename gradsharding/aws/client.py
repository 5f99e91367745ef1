"""One client for each service and account, made as the standard AWS environment says; what AWS refuses is said in a sentence."""

import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as NotConnected
from botocore.handlers import validate_bucket_name

from gradsharding.aws.demands import meet_demands
from gradsharding.aws.keepalive import keep_alive
from gradsharding.aws.patience import BUSY, FAILED, FAILURES, THROTTLES, Patience
from gradsharding.errors import GradShardingError, StoreFailed, StoreRefused
from gradsharding.pace import take_turn
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
"""Botocore's settings for S3, also aiobotocore's."""

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role is attached"

_REFUSALS = {
    "InvalidAccessKeyId": f"there is no such access key; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_CREDENTIALS}",
    "ExpiredToken": "the session has expired; renew the credentials",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "KeyTooLongError": "the key is longer than 1,024 bytes; use shorter names",
}

_DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled", "403", "Forbidden"}

_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "BadRequest"}


PATIENCE = "gradsharding.patience"
"""Where botocore keeps, with a request and with its answer, how patient we have been."""

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
    take_turn(reads=method in ("GET", "HEAD"))  # tasks have a share, whose threads may wait; event loops have none
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
    patience: Patience = request_dict["context"].setdefault(PATIENCE, Patience())
    if response is None:
        return patience.broke() if isinstance(caught_exception, (NotConnected, HTTPClientError)) else None
    status, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
    if status in BUSY or code in THROTTLES:
        response[1].setdefault("ResponseMetadata", {})[PATIENCE] = patience
        return patience.too_much()
    return patience.broke() if status in FAILURES or code in FAILED else None


def s3_client(bucket: str = "", signer: str | None = None) -> "S3Client":
    """Give the S3 client of the environment as it is now, for a bucket; threads may share it.

    ``signer`` names another signature than botocore's own. Raise UserError for a demand of the environment's that makes no sense.
    """
    with _MAKING:
        return _s3_client(environment(), _is_arn(bucket), signer)


def s3_settings(session: Any, bucket: str) -> dict[str, Any]:
    """Give the settings of an S3 client of a session of botocore's or aiobotocore's, for a bucket.

    Buckets are addressed by paths, which all servers know, unless the profile says otherwise; an access point has no path.
    """
    style = "auto" if _is_arn(bucket) else (session.get_scoped_config().get("s3") or {}).get("addressing_style", "path")
    # A body is signed by its SHA-256 otherwise, which costs more than all the rest; TLS and a CRC-32C that we send protect it.
    return S3_CONFIG | {"s3": {"addressing_style": style, "payload_signing_enabled": False}}


def prepare(client: Any) -> None:
    """Have an S3 client, boto3's or aiobotocore's, ask as ours do.

    It counts what it sends, keeps to its share, is patient, sends what is demanded, and takes Ceph's names of buckets, too.
    """
    # Botocore's standard mode takes what is too much for broken: six attempts, 15 s in the mean; and no more at all, whatever the request,
    # once a quota of the client's is spent: 500 tokens, of which each retry takes five, and a success gives but the last five back.
    client.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
    client.meta.events.register("needs-retry.s3", _needs_retry)
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)  # it refuses tenant:bucket; S3Store checks names
    client.meta.events.register("before-send.s3", _before_send)
    meet_demands(client)


def _is_arn(bucket: str) -> bool:
    return bucket.startswith("arn:")


def lambda_client(read_timeout: float = 60) -> "LambdaClient":
    """Give a Lambda client of the environment as it is now. It never tries again by itself: who calls it knows what may run twice."""
    with _MAKING:
        return _lambda_client(environment(), read_timeout)


def code_of(error: Exception) -> str:
    """AWS's name for what went wrong, such as NoSuchKey; "" if AWS did not answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def explained(error: BotoCoreError | ClientError, doing: str) -> GradShardingError:
    """Say what AWS refused, or that it did not answer, and what to do; ``doing`` is what was asked for, such as "GetObject of s3://b/k"."""
    match error:
        case NoCredentialsError() | PartialCredentialsError() | CredentialRetrievalError():
            return StoreRefused(f"{doing}: there are no AWS credentials; {_CREDENTIALS}")
        case NoRegionError():
            return StoreRefused(f"{doing}: no AWS region is chosen; set AWS_DEFAULT_REGION")
        case ProfileNotFound():
            return StoreRefused(f"{doing}: {error}; set AWS_PROFILE to one that exists")
        case ClientError():
            return _refused(error, doing)
    return StoreFailed(f"{doing}: no answer after several attempts ({error}); check the network and the endpoint, then run it again")


def _refused(error: ClientError, doing: str) -> GradShardingError:
    code, answer = code_of(error), error.response
    meta: Any = answer.get("ResponseMetadata", {})
    status, region = meta.get("HTTPStatusCode", 0), meta.get("HTTPHeaders", {}).get("x-amz-bucket-region")
    region = region or answer.get("Error", {}).get("Region")
    if patience := meta.get(PATIENCE):
        error_: GradShardingError = patience.error(doing, code)
        return error_
    if code in _REFUSALS:
        return StoreRefused(f"{doing}: {_REFUSALS[code]}", code=code)
    if code in _ELSEWHERE and (region or code != "BadRequest"):
        return StoreRefused(
            f"{doing}: it lies in {f'region {region}' if region else 'another region'}; set AWS_DEFAULT_REGION to that", code=code
        )
    if code in _DENIED:
        return StoreRefused(f"{doing}: access is denied ({code}); allow these credentials this action there, or use others", code=code)
    message = answer.get("Error", {}).get("Message", "")
    return StoreFailed(f"{doing}: AWS answered {status} {code} {message}".rstrip() + "; run it again", code=code)


@lru_cache(maxsize=8)
def _s3_client(_: Environment, arn: bool, signer: str | None) -> "S3Client":  # noqa: FBT001 - where lru_cache is used
    session = botocore.session.get_session()
    config = Config(**s3_settings(session, "arn:" if arn else ""))
    client = boto3.session.Session(botocore_session=session).client("s3", config=config)
    prepare(client)
    if signer:
        client.meta.events.register("choose-signer.s3", lambda **_: signer)  # type: ignore[arg-type]  # what it gives is used
    return client


@lru_cache(maxsize=8)
def _lambda_client(_: Environment, read_timeout: float) -> "LambdaClient":
    config = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=1_000,
        connect_timeout=10,
        read_timeout=read_timeout,
    )
    session = botocore.session.get_session()
    client = boto3.session.Session(botocore_session=session).client("lambda", config=config)
    keep_alive(client, session.get_config_variable("ca_bundle"))
    return client


def environment() -> Environment:
    """Give what clients depend on: AWS's variables, and ours for S3."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GRADSHARDING_S3_"))))
