"""An error of botocore's becomes one of ours, depending on the request that it answers."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained
from gradsharding.aws.demands import EQUAL_PARTS
from gradsharding.aws.reasons import scrubbed
from gradsharding.aws.refusals import READS, code_of
from gradsharding.errors import StoreRefused
from gradsharding.stores.protocol import changed, missing, no_upload, taken

REMEDY = "use an S3 server that deploy/ENDPOINTS.md lists as working"
"""What to do about a server that cannot be a store."""


class Request(NamedTuple):
    """A request to S3, as far as its errors depend on it."""

    operation: str
    """Its name in S3's API, such as GetObject."""
    key: str
    bucket: str
    url: str
    """The store's."""
    server: str
    """The endpoint's URL."""
    version: str | None = None
    """The version that it demands."""
    upload: str | None = None


def failure(error: BotoCoreError | ClientError, request: Request) -> Exception:
    """Return the error to raise for ``error``."""
    operation, key = request.operation, request.key
    match code_of(error):
        case "NoSuchUpload" if request.upload:
            return no_upload(key, request.upload)
        case "NoSuchKey" | "404":
            return missing(key, request.url)
        case "PreconditionFailed" | "412" if operation.startswith("Get"):
            return changed(key, request.version, "another")
        case "PreconditionFailed" | "ConditionalRequestConflict":
            return taken(key, request.url)
    explanation = _unable(error, request) or explained(error, f"{operation} of {request.url}/{key}")
    if operation in READS and "denied" in explanation.details:
        explanation.details["unread"] = f"{request.url}/{key}"
    return explanation


def _unable(error: BotoCoreError | ClientError, request: Request) -> StoreRefused | None:
    """The error for a bucket that does not exist, or a server that cannot do what is needed; None for any other."""
    operation, key = request.operation, request.key
    match code_of(error):
        case "NoSuchBucket":
            return StoreRefused(f"there is no bucket {request.bucket!r}; check its name and the region, or create it", key=key)
        case "NotImplemented" | "MethodNotAllowed":
            problem = f"{request.server} cannot do that ({scrubbed(error)})"
            return StoreRefused(f"{operation} of {request.url}/{key}: {problem}; {REMEDY}", key=key)
        case "InvalidPart" if "same length" in str(error):
            return StoreRefused(f"{request.server} requires parts of one size; set {EQUAL_PARTS}=1 and run it again", key=key)
    return None


@contextlib.contextmanager
def explaining(request: Request) -> Iterator[None]:
    """Within, turn errors of botocore's into ours."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise failure(error, request) from error
