"""What a bucket's owner demands of each request stands in ``GRADSHARDING_S3_*``, and is added to every request in one place.

A key of KMS's, the requester's payment, the owner who is expected, a canned ACL: the variables are named after S3's headers. Botocore's
model of S3 says which requests take which; they are signed with the others, and go into URLs that are lent.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gradsharding.errors import UserError

PREFIX = "GRADSHARDING_S3_"

TRUST = f"{PREFIX}TRUST_NODES"
"""Set to 1, it says that every node may do what the server's keys can, so that URLs are lent on any server."""

EQUAL_PARTS = f"{PREFIX}EQUAL_PARTS"
"""Set to 1, it says that the server wants all parts of an object but its last to be of one size."""

_OURS = (TRUST, EQUAL_PARTS)
"""What is no parameter of a request."""


class _Demand(NamedTuple):
    member: str
    """Name in botocore's model."""
    pattern: str
    says: str


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
    """Give the parameters that the environment demands, by their names in botocore's model; raise UserError for one that makes no sense."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name not in _OURS and value}
    for name, value in ours.items():
        if name not in _DEMANDS:
            raise UserError(f"{name} is set, and no such setting is known; use {', '.join((*_DEMANDS, *_OURS))}")
        if not re.fullmatch(_DEMANDS[name].pattern, value):
            raise UserError(f"{name} is {value!r}; set it to {_DEMANDS[name].says}, or unset it")
    if f"{PREFIX}SSE_KMS_KEY_ID" in ours and not ours.get(f"{PREFIX}SSE", "").startswith("aws:kms"):
        raise UserError(f"{PREFIX}SSE_KMS_KEY_ID names a key, and {PREFIX}SSE does not say what for; set that to aws:kms")
    return {_DEMANDS[name].member: value for name, value in ours.items()}


@contextlib.contextmanager
def expecting(owner: str) -> Iterator[None]:
    """Have S3 compare the owner of each bucket with this account within, unless the environment demands another already."""
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
    """Have an S3 client of boto3's send with each request what the environment demands now."""
    if wanted := demanded():

        def add(params: Mapping[str, Any], model: Any, **_: Any) -> dict[str, Any]:
            return {name: value for name, value in wanted.items() if name in model.input_shape.members} | dict(params)

        client.meta.events.register("provide-client-params.s3", add)


def headers_of(client: Any, operation: str) -> dict[str, str]:
    """Give the headers that stand for the demands in a request of an operation, such as PutObject, as whoever sends it must send them."""
    members = client.meta.service_model.operation_model(operation).input_shape.members
    return {members[name].serialization["name"]: value for name, value in demanded().items() if name in members}
