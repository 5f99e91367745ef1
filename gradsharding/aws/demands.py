"""Parameters that a bucket's owner demands of requests come from ``GRADSHARDING_S3_*``, and are added to each request here.

They are a KMS key, requester pays, the expected bucket owner and a canned ACL; the variables are named after S3's headers. Botocore's
model of S3 says which requests take which. They are signed like all headers, and are part of presigned URLs.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gradsharding.errors import UserError

PREFIX = "GRADSHARDING_S3_"

TRUST = f"{PREFIX}TRUST_NODES"
"""Set to 1, it declares that every node may do whatever the server's keys can, so that URLs are presigned for any S3 server."""

EQUAL_PARTS = f"{PREFIX}EQUAL_PARTS"
"""Set to 1, it declares that the server requires all parts of an object but the last to have one size."""

_SETTINGS = (TRUST, EQUAL_PARTS)
"""Variables that are not parameters of a request."""


class _Demand(NamedTuple):
    member: str
    """Name in botocore's model."""
    pattern: str
    allowed: str


_DEMANDS = {
    f"{PREFIX}SSE": _Demand("ServerSideEncryption", "AES256|aws:kms|aws:kms:dsse", "AES256, aws:kms or aws:kms:dsse"),
    f"{PREFIX}SSE_KMS_KEY_ID": _Demand("SSEKMSKeyId", "[A-Za-z0-9:/_.-]{1,2048}", "the id, the alias or the ARN of a key"),
    f"{PREFIX}REQUEST_PAYER": _Demand("RequestPayer", "requester", "requester"),
    f"{PREFIX}EXPECTED_BUCKET_OWNER": _Demand("ExpectedBucketOwner", "[0-9]{12}", "the 12 digits of an account"),
    f"{PREFIX}ACL": _Demand(
        "ACL", "private|bucket-owner-read|bucket-owner-full-control", "private, bucket-owner-read or bucket-owner-full-control"
    ),
}


def demanded() -> dict[str, str]:
    """Return the parameters that the environment demands, by their names in botocore's model; raise UserError for an invalid one."""
    found = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name not in _SETTINGS and value}
    for name, value in found.items():
        if name not in _DEMANDS:
            raise UserError(f"{name} is not a setting; unset it, or use one of {', '.join((*_DEMANDS, *_SETTINGS))}")
        if not re.fullmatch(_DEMANDS[name].pattern, value):
            raise UserError(f"{name} is {value!r}; set it to {_DEMANDS[name].allowed}, or unset it")
    if f"{PREFIX}SSE_KMS_KEY_ID" in found and not found.get(f"{PREFIX}SSE", "").startswith("aws:kms"):
        raise UserError(f"{PREFIX}SSE_KMS_KEY_ID names a key, and {PREFIX}SSE does not ask for it; set {PREFIX}SSE to aws:kms")
    return {_DEMANDS[name].member: value for name, value in found.items()}


@contextlib.contextmanager
def expecting(owner: str) -> Iterator[None]:
    """Within, have S3 check that this account owns each bucket, unless the environment demands another owner already."""
    name = f"{PREFIX}EXPECTED_BUCKET_OWNER"
    if os.environ.get(name):
        yield
        return
    os.environ[name] = owner
    try:
        yield
    finally:
        del os.environ[name]


def meet_demands(client: Any) -> None:
    """Make an S3 client of boto3 send with each request what the environment demands now."""
    if parameters := demanded():

        def add(params: Mapping[str, Any], model: Any, **_: Any) -> dict[str, Any]:
            return {name: value for name, value in parameters.items() if name in model.input_shape.members} | dict(params)

        client.meta.events.register("provide-client-params.s3", add)


def headers_of(client: Any, operation: str) -> dict[str, str]:
    """Return the headers that a request of an operation, such as PutObject, must have to meet the demands."""
    members = client.meta.service_model.operation_model(operation).input_shape.members
    return {members[name].serialization["name"]: value for name, value in demanded().items() if name in members}
