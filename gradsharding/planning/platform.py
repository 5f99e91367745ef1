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
    """A limit that the platform sets, and who says so."""

    value: int
    unit: str
    of: str
    """What has so many at most."""
    source: str
    """URL of what says so."""
    date: str
    """The day of that source, or on which it was read; ISO 8601."""
    note: str = ""
    """What one should know beside it."""


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
            note="48.8 TiB: as many parts as there may be, each as large as it may be; older copies of the page say 5 TiB",
        ),
        "get rate": Figure(
            value=5_500,
            unit="requests a second",
            of="GET and HEAD requests to one prefix of a bucket",
            source=_S3_RATES,
            date="2026-11-28",
            note="what S3 bears at least; it splits a busy prefix by itself, which takes longer than a round",
        ),
        "put rate": Figure(
            value=3_500,
            unit="requests a second",
            of="PUT, COPY, POST and DELETE requests to one prefix of a bucket",
            source=_S3_RATES,
            date="2026-11-28",
            note="what S3 bears at least",
        ),
    }
)
"""The limits that a plan and a function's code must keep to. A page without a date has the day on which it was read."""

Architecture = Literal["arm64", "x86_64"]
"""What a function's processor may be."""

_AL2, _AL2023 = 26, 34


class Runtime(NamedTuple):
    """A Python that Lambda offers, and the system below it."""

    python: str
    """Its version, "3.13"."""
    glibc: int
    """Minor version of the system's glibc 2: Amazon Linux 2's or 2023's (https://docs.aws.amazon.com/linux/al2023/ug/glibc-gcc-and-binutils.html)."""
    until: str
    """The day on which AWS ends its support; ISO 8601."""


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
"""Runtimes that a function may have, by the names that Lambda gives them; 3.10 is older than this package takes.

From https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html, and the days of support as cfn-lint 1.58.0 has them; both read on
2026-11-28.
"""

DEPLOYED_RUNTIME = "python3.13"
"""What ``gradsharding deploy`` gives a function, unless told otherwise: supported as long as 3.14, with more wheels."""

MEMORY = range(128 << 20, FIGURES["memory"].value + 1, 1 << 20)
"""Bytes that a function may have."""

TIMEOUT = FIGURES["time limit"].value
"""Seconds that a function may be given for an invocation, at most."""

DEPLOYED_TIMEOUT = 900
"""Seconds that ``gradsharding deploy`` gives a function, unless told otherwise: what every account is known to take."""

PAYLOAD = FIGURES["payload"].value
"""Bytes of a synchronous invocation, at most."""

ACCOUNT_CONCURRENCY = FIGURES["concurrency"].value
"""Invocations at once in a region, unless the account says otherwise."""

ROUND_CONCURRENCY = ACCOUNT_CONCURRENCY // 2
"""Invocations at once that a round takes in an account that has so many: half of what is unreserved, as ``LambdaExecutor`` does."""

VCPU = 1_769 << 20
"""Bytes of memory that come with one vCPU; fewer bring their share of it."""

RUNTIME = 24 << 20
"""Bytes that bound Lambda's own runtime beside our code, within the function's memory. ``tests/test_lambda.py`` measures it."""

CHUNK = 8 << 20
"""Bytes of one ranged GET: AWS advises 8 to 16 MB (https://docs.aws.amazon.com/whitepapers/latest/s3-optimizing-performance-best-practices)."""

PARALLEL = connections(bandwidth=150e6, latency=0.05, rate=90e6, chunk=CHUNK)
"""Requests at once that fill twice the 75 MB/s reported for a Lambda function, at S3's usual latency and rate of a connection."""

RESIDENT = 48 << 20
"""Bytes that bound boto3 with its S3 client in a function. ``tests/test_memory.py`` measures it."""

READING = Reading(chunk=CHUNK, parallel=PARALLEL, resident=RESIDENT)
"""How a function reads from S3."""

GRAIN = 32 << 20
"""Bytes of a slice that suit S3."""

LARGEST_PUT = FIGURES["part size"].value
"""Bytes that S3 takes in one PUT or one part."""

LARGEST_OBJECT = FIGURES["object size"].value
"""Bytes of one object."""

DIRECTORY_BUCKETS = "directory buckets list objects unsorted, and only below prefixes that end in '/'"
"""Why those of S3 Express are no store (https://docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html)."""

CHARGES = Charges(kind="s3", page=1_000, largest=LARGEST_PUT, composes=True)
"""Requests that S3's verbs take: a thousand keys or parts a list, and small parts joined at the end."""
