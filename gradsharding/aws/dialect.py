"""How an S3 server differs from AWS's follows from its endpoint's name, and from the environment where the name is not enough.

A server that is not AWS's gets only requests that every server knows: bodies carry an MD5, where AWS gets a CRC-32, and listings are
sorted here. ``deploy/ENDPOINTS.md`` lists the servers that were tried.
"""

import os
from functools import cache
from typing import NamedTuple
from urllib.parse import urlsplit

import botocore.session

from gradsharding.aws.demands import EQUAL_PARTS
from gradsharding.errors import UserError

R2 = ".r2.cloudflarestorage.com"
"""End of the names of Cloudflare's endpoints. There, all parts of an object but the last must have one size
(https://developers.cloudflare.com/r2/objects/multipart-objects)."""


class Dialect(NamedTuple):
    """How a server behaves."""

    aws: bool
    """Whether it is AWS's own: it refuses to replace what exists, checks CRC-32, lists the checksums of parts, and lists keys sorted."""
    equal_parts: bool
    """Whether all parts of an object but the last must have one size."""


def dialect(endpoint: str) -> Dialect:
    """Return the dialect of the server at a URL; raise UserError for an invalid setting."""
    if (setting := os.environ.get(EQUAL_PARTS, "")) not in ("", "0", "1"):
        raise UserError(f"{EQUAL_PARTS} is {setting!r}; set it to 1 for a server that requires parts of one size, or unset it")
    host = f".{urlsplit(endpoint).hostname}"
    return Dialect(aws=host.endswith(_suffixes()), equal_parts=setting == "1" or (host.endswith(R2) and setting != "0"))


@cache
def _suffixes() -> tuple[str, ...]:
    """Domains of AWS's endpoints, in all its partitions."""
    partitions = botocore.session.get_session().get_data("partitions")["partitions"]
    outputs = (partition["outputs"] for partition in partitions)
    return tuple(sorted({f".{output[name]}" for output in outputs for name in ("dnsSuffix", "dualStackDnsSuffix")}))
