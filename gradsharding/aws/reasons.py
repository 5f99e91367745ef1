"""Why a request to AWS failed, in one sentence that says what to do, and holds no secret."""

import os
from typing import NamedTuple

from gradsharding.aws.secrets import without_secrets
from gradsharding.errors import GradShardingError, plain

CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role is attached"

AGAIN = "run it again"


class Reason(NamedTuple):
    """Why a request failed."""

    kind: type[GradShardingError]
    """StoreRefused if the user can correct it, else StoreFailed."""
    text: str
    denied: bool = False
    """Whether it is, or looks like, a lack of permission."""


def scrubbed(text: object, most: int = 240) -> str:
    """Return the first line of a foreign text, cut and printable, without what may be a key, a token, a password or a signature."""
    line = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
    line = without_secrets(line)
    return plain("".join(letter if letter.isprintable() else " " for letter in line)[:most].strip().rstrip("."), most)


def profile() -> str:
    """Name of the AWS profile in use."""
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"


def files() -> str:
    """Path of AWS's configuration file."""
    return os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"


def login(command: str) -> str:
    """Advise to run ``command`` of AWS's command line for the profile in use."""
    name = profile()
    return f"run: aws {command}" if name == "default" else f"run: aws {command} --profile {plain(name)}"


def chosen_region() -> str:
    """The region that the environment sets, or ""."""
    return os.environ.get("AWS_DEFAULT_REGION", "")


def source() -> str:
    """Name the source of the credentials."""
    return "the environment" if os.environ.get("AWS_ACCESS_KEY_ID") else f"profile {plain(profile())}"
