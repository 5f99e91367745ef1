"""What AWS Lambda and S3 allow and take, as numbers; each limit of theirs with its source and its date.

Nothing is computed here, and nothing of AWS needs to be installed.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from gradsharding.stores.charges import Charges
from gradsharding.stores.reading import Reading, connections

_LAMBDA = "https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"
_S3 = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"
_S3_RATES = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"


class Figure(NamedTuple):
    """A limit of the platform, with its source."""

    value: int
    unit: str
    of: str
    """The quantity that is limited."""
    source: str
    """URL of the page or package that states it."""
    date: str
    """Date of the source, or the day on which it was read; ISO 8601."""
    note: str = ""
    """Caveats."""


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "memory": Figure(
            value=10_240 << 20,
            unit="bytes",
            of="memory of a function",
            source=_LAMBDA,
            date="2026-11-28",
            note="the API's model takes 32,768 MB, which no page grants an ordinary function; new accounts are often held to 3,008 MB",
        ),
        "time limit": Figure(
            value=1_800,
            unit="seconds",
            of="time of an invocation",
            source="https://pypi.org/project/botocore/1.44.7/",
            date="2026-11-19",
            note="by the API's model; the page of quotas still says 900, and no account was tried",
        ),
        "payload": Figure(
            value=6 << 20,
            unit="bytes",
            of="payload of a synchronous invocation",
            source=_LAMBDA,
            date="2026-11-28",
            note="an asynchronous one takes 1 MB",
        ),
        "concurrency": Figure(
            value=1_000,
            unit="invocations",
            of="invocations at once in a region",
            source=_LAMBDA,
            date="2026-11-28",
            note="AWS raises it on request; new accounts often have 10",
        ),
        "code": Figure(value=250 << 20, unit="bytes", of="unzipped code of a function", source=_LAMBDA, date="2026-11-28"),
        "parts": Figure(value=10_000, unit="parts", of="parts of an object", source=_S3, date="2026-11-28"),
        "part size": Figure(value=5 << 30, unit="bytes", of="size of a part", source=_S3, date="2026-11-28", note="and of one PUT"),
        "object size": Figure(
            value=50_000 << 30,
            unit="bytes",
            of="size of an object",
            source=_S3,
            date="2026-11-28",
            note="48.8 TiB: the largest number of parts, each of the largest size; older copies of the page say 5 TiB",
        ),
        "get rate": Figure(
            value=5_500,
            unit="requests a second",
            of="GET and HEAD requests to one prefix of a bucket",
            source=_S3_RATES,
            date="2026-11-28",
            note="S3 sustains at least this; it splits a busy prefix by itself, which takes longer than a round",
        ),
        "put rate": Figure(
            value=3_500,
            unit="requests a second",
            of="PUT, COPY, POST and DELETE requests to one prefix of a bucket",
            source=_S3_RATES,
            date="2026-11-28",
            note="S3 sustains at least this",
        ),
    }
)
"""The limits that a plan and a function's code must keep to. A page without a date has the day on which it was read."""

Architecture = Literal["arm64", "x86_64"]
"""Processor of a function."""

_AL2, _AL2023 = 26, 34


class Runtime(NamedTuple):
    """A Python version that Lambda offers, and its operating system."""

    python: str
    """Version, such as "3.13"."""
    glibc: int
    """Minor version of the system's glibc 2: Amazon Linux 2's or 2023's (https://docs.aws.amazon.com/linux/al2023/ug/glibc-gcc-and-binutils.html)."""
    until: str
    """Day on which AWS ends support; ISO 8601."""


RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        f"python{runtime.python}": runtime
        for runtime in (
            Runtime("3.11", _AL2, "2027-06-30"),
            Runtime("3.12", _AL2023, "2028-10-31"),
            Runtime("3.13", _AL2023, "2029-06-30"),
            Runtime("3.14", _AL2023, "2029-06-30"),
        )
    }
)
"""Runtimes of a function, by Lambda's names. This package does not support Python 3.10.

From https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html, and the days of support from cfn-lint 1.58.0; both read on
2026-11-28.
"""

DEPLOYED_RUNTIME = "python3.13"
"""Default runtime of ``gradsharding deploy``: supported as long as 3.14, and more packages have wheels for it."""

MEMORY = range(128 << 20, FIGURES["memory"].value + 1, 1 << 20)
"""Memory that a function may have, in bytes."""

TIMEOUT = FIGURES["time limit"].value
"""Longest time limit of an invocation, in seconds."""

DEPLOYED_TIMEOUT = 900
"""Default time limit of ``gradsharding deploy``, in seconds: every account is known to accept it."""

PAYLOAD = FIGURES["payload"].value
"""Largest payload of a synchronous invocation, in bytes."""

ACCOUNT_CONCURRENCY = FIGURES["concurrency"].value
"""Default limit of an account on invocations at once in a region."""

ROUND_CONCURRENCY = ACCOUNT_CONCURRENCY // 2
"""Invocations at once of a round in an account with the default limit: half of the unreserved ones, as ``LambdaExecutor`` takes."""

VCPU = 1_769 << 20
"""Bytes of memory that come with one vCPU; less memory comes with a proportional share."""

RUNTIME = 24 << 20
"""Upper bound of the memory of Lambda's own runtime, which counts as the function's; bytes. ``tests/test_lambda.py`` measures it."""

CHUNK = 8 << 20
"""Bytes of one ranged GET: AWS advises 8 to 16 MB (https://docs.aws.amazon.com/whitepapers/latest/s3-optimizing-performance-best-practices)."""

PARALLEL = connections(bandwidth=150e6, latency=0.05, rate=90e6, chunk=CHUNK)
"""Concurrent requests that fill twice the 75 MB/s reported for a Lambda function, at S3's usual latency and rate of a connection."""

RESIDENT = 48 << 20
"""Upper bound of the memory of boto3 with its S3 client, in bytes. ``tests/test_memory.py`` measures it."""

READING = Reading(chunk=CHUNK, parallel=PARALLEL, resident=RESIDENT)
"""How a function reads from S3."""

GRAIN = 32 << 20
"""Slice size that suits S3, in bytes."""

LARGEST_PUT = FIGURES["part size"].value
"""Largest PUT, and largest part, in bytes."""

LARGEST_OBJECT = FIGURES["object size"].value
"""Largest object, in bytes."""

DIRECTORY_BUCKETS = "directory buckets list objects unsorted, and only below prefixes that end in '/'"
"""Why directory buckets of S3 Express cannot be a store (https://docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html)."""

CHARGES = Charges(kind="s3", page=1_000, largest=LARGEST_PUT, composes=True)
"""Requests of each operation on S3: LIST returns 1,000 keys or parts, and small parts are joined at the end."""
