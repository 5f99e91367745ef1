"""How an S3 server differs from AWS's is told from its endpoint's name, and from the environment where the name does not tell.

What every server knows is asked of those that are not AWS's: bodies carry their MD5, where AWS gets a CRC-32, and a listing is sorted
here. ``deploy/ENDPOINTS.md`` says which servers were tried.
"""

import os
from functools import cache
from typing import NamedTuple
from urllib.parse import urlsplit

import botocore.session

from gradsharding.aws.s3.demands import EQUAL_PARTS
from gradsharding.errors import UserError

R2 = ".r2.cloudflarestorage.com"
"""Cloudflare's endpoints. All parts of an object but its last are of one size there
(https://developers.cloudflare.com/r2/objects/multipart-objects)."""


class Dialect(NamedTuple):
    """What a server does."""

    aws: bool
    """Whether it is AWS's own: it refuses to create what is there, checks CRC-32, tells the checksums of parts, and lists sorted."""
    equal_parts: bool
    """Whether all parts of an object but its last must be of one size."""


def dialect(endpoint: str) -> Dialect:
    """Give the dialect of the server at a URL; raise UserError for a setting that makes no sense."""
    if (wanted := os.environ.get(EQUAL_PARTS, "")) not in ("", "0", "1"):
        raise UserError(f"{EQUAL_PARTS} is {wanted!r}; set it to 1 for a server that wants parts of one size, or unset it")
    host = f".{urlsplit(endpoint).hostname}"
    return Dialect(aws=host.endswith(_suffixes()), equal_parts=wanted == "1" or (host.endswith(R2) and wanted != "0"))


@cache
def _suffixes() -> tuple[str, ...]:
    """What the names of AWS's endpoints end in, in all its partitions."""
    partitions = botocore.session.get_session().get_data("partitions")["partitions"]
    outputs = (one["outputs"] for one in partitions)
    return tuple(sorted({f".{found[name]}" for found in outputs for name in ("dnsSuffix", "dualStackDnsSuffix")}))
