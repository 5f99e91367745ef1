"""The bucket and the key in a URL ``s3://bucket/key``."""

import re

from gradsharding.errors import UserError
from gradsharding.planning.platform import DIRECTORY_BUCKETS

_URL = re.compile(
    r"""s3://(
        arn:aws[a-z-]*:s3:[a-z0-9-]*:[0-9]{12}:accesspoint[/:][A-Za-z0-9.-]{1,63} |
        arn:aws[a-z-]*:s3-outposts:[a-z0-9-]+:[0-9]{12}:outpost[/:][A-Za-z0-9-]{1,63}[/:]accesspoint[/:][A-Za-z0-9-]{1,63} |
        (?:[A-Za-z0-9_]+:)? [A-Za-z0-9] [A-Za-z0-9._-]{1,253} [A-Za-z0-9]
    )(?:/(.*))?""",
    re.VERBOSE | re.DOTALL,
)
"""The bucket, and the rest. Ceph allows capitals and "_" in a bucket's name, and a tenant and ":" before it."""


def split(url: str) -> tuple[str, str]:
    """Return the bucket of a URL, a name or an access point's ARN, and the rest; raise UserError for no bucket, or one of S3 Express.

    >>> split("s3://bucket/updates/ann.safetensors")
    ('bucket', 'updates/ann.safetensors')
    """
    if not (found := _URL.fullmatch(url)):
        raise UserError(f"{url!r} names no bucket; write s3://bucket or s3://bucket/prefix")
    if found[1].endswith(("--x-s3", "--xa-s3")):  # AWS reserves these endings for S3 Express
        raise UserError(f"{found[1]} is an S3 Express bucket, which is no store: {DIRECTORY_BUCKETS}; use a general purpose bucket")
    return found[1], found[2] or ""
