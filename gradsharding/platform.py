"""What AWS Lambda and S3 allow and take, as numbers. Nothing is computed here, and nothing of AWS needs to be installed.

Quotas: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html and https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html.
"""

from typing import Literal

from gradsharding.charges import Charges
from gradsharding.reading import Reading, connections

Architecture = Literal["arm64", "x86_64"]
"""What a function's processor may be."""

MEMORY = range(128 << 20, (10_240 << 20) + 1, 1 << 20)
"""Bytes that a function may have. New accounts are often held to 3,008 MiB at first."""

TIMEOUT = 900
"""Seconds that an invocation may take."""

PAYLOAD = 6 << 20
"""Bytes of a synchronous invocation, at most."""

ACCOUNT_CONCURRENCY = 1_000
"""Invocations at once in a region, unless the account says otherwise; new accounts often have 10."""

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

LARGEST_PUT = 5 << 30
"""Bytes that S3 takes in one PUT or one part."""

LARGEST_OBJECT = 5 << 40
"""Bytes of one object. (AWS has announced more; clients that know of it are rare.)"""

CHARGES = Charges(kind="s3", page=1_000, largest=LARGEST_PUT, composes=True)
"""Requests that S3's verbs take: a thousand keys or parts a list, and small parts joined at the end."""
