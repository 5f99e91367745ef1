"""AWS accounts on loopback, played by ministack: it executes templates, keeps objects and runs functions."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from rigs.processes import answers, free_port, running, wait_until
from rigs.s3 import S3Server


def tool(name: str) -> Path | None:
    """Find a program of ``make rig``, each in an environment of its own: ``.venv/NAME/bin/NAME``. cfn-lint lies beside ``sam``."""
    path = Path(sys.prefix) / ("sam" if name == "cfn-lint" else name) / "bin" / name
    return path if path.exists() else None


def account_missing() -> str | None:
    """Say why no account can be started here; None if one can."""
    return None if tool("ministack") else "no ministack: make rig"


@contextlib.contextmanager
def local_account() -> Iterator[dict[str, str]]:
    """Start ministack; give the environment that leads clients to it. It checks no permissions and limits no function's memory."""
    program, port = tool("ministack"), free_port()
    assert program
    with tempfile.TemporaryDirectory(prefix="gradsharding-account-") as scratch:
        # functions run in the first Python on the PATH, which must be this one: ministack's own has no numpy
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "PATH": path, "TMPDIR": scratch}
        log, url = Path(scratch, "log"), f"http://127.0.0.1:{port}"
        with running([program], log, env, directory=Path(scratch), grace=20) as process:
            wait_until(lambda: answers(url), f"ministack at {url}", log, process)
            yield S3Server(url, "test", "test").environment() | {"AWS_ENDPOINT_URL": url}


def as_account(environment: Mapping[str, str], number: str) -> dict[str, str]:
    """Give the environment that leads to another account of the same ministack, which has one for every 12-digit number."""
    return {**environment, "AWS_ACCESS_KEY_ID": number}
