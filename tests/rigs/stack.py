"""An account on loopback that executes what it is told: ministack makes stacks of templates, keeps objects and runs functions."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from rigs.s3 import S3Server, free_port


def tool(name: str) -> Path | None:
    """Find a program of ``make rig``: in its own environment beside this one, as ``.venv/NAME/bin/NAME``; ``sam`` also has cfn-lint."""
    path = Path(sys.prefix) / ("sam" if name == "cfn-lint" else name) / "bin" / name
    return path if path.exists() else None


def account_missing() -> str | None:
    """Why there is no account to be had here; None if there is."""
    return None if tool("ministack") else "no ministack: make rig"


@contextlib.contextmanager
def local_account() -> Iterator[dict[str, str]]:
    """Start an account; give the environment that leads to it. It checks no permissions, and holds functions to no memory."""
    program, port = tool("ministack"), free_port()
    assert program
    with tempfile.TemporaryDirectory(prefix="gradsharding-account-") as scratch:
        # functions run in the Python that is first on the path: this one, as ministack's own has no numpy
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "PATH": path, "TMPDIR": scratch}
        with Path(scratch, "log").open("wb") as log:
            process = subprocess.Popen([program], env=env, cwd=scratch, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            yield S3Server(url, "test", "test").environment() | {"AWS_ENDPOINT_URL": url}
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def as_account(environment: Mapping[str, str], number: str) -> dict[str, str]:
    """Give the environment that leads to another account beside it: ministack has as many as there are numbers of 12 digits."""
    return {**environment, "AWS_ACCESS_KEY_ID": number}


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310 - loopback
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"ministack did not answer at {url}")
