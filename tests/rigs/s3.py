"""S3 servers on loopback: moto in this process; Ceph's RADOS Gateway, a production server, as three processes."""

import contextlib
import http.client
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rigs.processes import check_allowed, free_port, listens, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CEPH_PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
"""Debian's packages that ``ceph_server`` needs."""


class Request(NamedTuple):
    """A request as the server received it."""

    method: str
    target: str
    """Path and query."""
    headers: Mapping[str, str] = {}
    """Names in lower case. Empty where the server does not record headers: only moto does."""

    @property
    def billed(self) -> Literal["gets", "puts", "deletes"]:
        """The class that S3 bills it in, by HTTP alone: a LIST is a GET of a bucket's keys or of an upload's parts, and billed as a PUT."""
        query = "&" + self.target.partition("?")[2]
        if self.method == "DELETE" or (self.method == "POST" and "&delete" in query):
            return "deletes"
        if self.method in ("GET", "HEAD"):
            return "puts" if "&list-type=" in query or "&uploadId=" in query else "gets"
        return "puts"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server, and the keys of one of its users."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    checks: bool = True
    """Whether it checks signatures."""
    seen: Callable[[], list[Request]] = field(default=list, repr=False, compare=False)
    """Gives all requests since the server's start, whoever made them, by its own log."""

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Count the requests that reach the server within the context, by billed class; the counts are complete once it is left."""
        counts, before = Counter[str](gets=0, puts=0, deletes=0), len(self.seen())
        yield counts
        counts.update(request.billed for request in self.seen()[before:])

    def environment(self) -> dict[str, str]:
        """Give the AWS environment that leads every client here and hides the profiles of this machine's user."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "GRADSHARDING_S3_TRUST_NODES": "0" if self.checks else "1",
        }

    def client(self) -> "S3Client":
        """Give a client of this user."""
        import boto3  # noqa: PLC0415 - many tests need no boto3
        from botocore.config import Config  # noqa: PLC0415

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(
                s3={"addressing_style": "path", "payload_signing_enabled": False},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make_bucket(self) -> str:
        """Make an empty bucket; give its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


@contextlib.contextmanager
def moto_server() -> Iterator[S3Server]:
    """Start moto in this process. It checks no signatures, no expiry and no checksums."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server.start()
    seen: list[Request] = []
    app = server._server.app  # type: ignore[union-attr]

    def logging_app(environ: dict[str, Any], start_response: Any) -> Any:
        headers = {name[5:].replace("_", "-").lower(): str(value) for name, value in environ.items() if name.startswith("HTTP_")}
        seen.append(Request(environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}", headers))
        return app(environ, start_response)

    server._server.app = logging_app  # type: ignore[union-attr]
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", "moto", secrets.token_hex(8), checks=False, seen=seen.copy)
    finally:
        server.stop()


def ceph_missing() -> str | None:
    """Say why Ceph cannot be started here; None if it can."""
    programs = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph-authtool", "ceph")
    absent = [program for program in programs if not shutil.which(program)]
    return f"{', '.join(absent)} not found: apt-get install --no-install-recommends {CEPH_PACKAGES}" if absent else None


@dataclass(frozen=True)
class Ceph:
    """A running Ceph: one monitor, one store in memory, one gateway."""

    server: S3Server
    """Its first user."""
    configuration: Path
    secure: str | None
    """The TLS endpoint, if it has one."""

    def user(self, name: str, tenant: str = "") -> S3Server:
        """Make another user, of a tenant if one is named, who owns nothing and may do what bucket policies allow."""
        keys = replace(self.server, access_key=_key(), secret_key=secrets.token_urlsafe(24))
        _add_user(self.configuration, f"{tenant}${name}" if tenant else name, keys)
        return keys


@contextlib.contextmanager
def ceph_server(*, day: int | None = None, certificate: tuple[Path, Path] | None = None) -> Iterator[Ceph]:
    """Start Ceph, in a second or two, with all its state in memory; raise RuntimeError if it does not start.

    ``day`` is the number of seconds that a lifecycle rule counts as a day; ``certificate``, a chain and its key, adds TLS.
    """
    check_allowed("Ceph")
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - sockets' paths must be short, too
    with tempfile.TemporaryDirectory(prefix="ceph-", dir=base, ignore_cleanup_errors=True) as name, contextlib.ExitStack() as stack:
        directory, port, tls = Path(name), free_port(), free_port()
        configuration = directory / "ceph.conf"
        settings = _settings(directory, port, tls, day, certificate)
        configuration.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        seen = partial(_seen_by_ceph, directory / "client.rgw.log", port)
        server = S3Server(f"http://127.0.0.1:{port}", _key(), secrets.token_urlsafe(24), seen=seen)
        stack.callback(_stop, directory)
        _start(directory, configuration, settings, server)
        yield Ceph(server, configuration, f"https://127.0.0.1:{tls}" if certificate else None)


def _start(directory: Path, configuration: Path, settings: dict[str, object], server: S3Server) -> None:
    for sub in ("mon.a", "osd.0", "run", "rgw"):
        (directory / sub).mkdir()
    map_, keyring, osd = str(directory / "monmap"), str(directory / "keyring"), str(uuid.uuid4())
    for command in (
        ["monmaptool", "--create", "--clobber", "--fsid", str(settings["fsid"]), "--addv", "a", str(settings["mon host"]), map_],
        ["ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"],
        ["ceph-mon", "--mkfs", "-i", "a", "--monmap", map_, "--keyring", keyring],
        ["ceph-mon", "-i", "a"],
        ["ceph", "osd", "new", osd],
        ["ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd],
        ["ceph-osd", "-i", "0"],
        ["ceph-authtool", "--create-keyring", str(directory / "rgw/keyring"), "--gen-key", "-n", "client.rgw"],
    ):
        _run(configuration, command)
    _add_user(configuration, "tester", server)
    _run(configuration, ["radosgw", "-n", "client.rgw"])
    port = int(server.endpoint.rpartition(":")[2])
    wait_until(lambda: listens(port), f"radosgw on port {port}", directory / "client.rgw.log")


def _stop(directory: Path) -> None:
    # In this order, by SIGKILL: a store that ends in order waits for ever for a monitor that is gone.
    for name in ("client.rgw", "osd.0", "mon.a"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((directory / f"{name}.pid").read_text()), signal.SIGKILL)


def _seen_by_ceph(log: Path, port: int) -> list[Request]:
    """Read the gateway's log, once it holds a request that is made here to mark its end."""
    mark = uuid.uuid4().hex
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", f"/mark-{mark}")
    connection.getresponse().read()
    connection.close()
    text, before, end = log.read_text(), "", time.monotonic() + 30
    while mark not in text or text != before:  # a request answered at the same time may be logged a moment later
        if time.monotonic() > end:
            raise RuntimeError(f"the gateway has not logged a request for 30 s: {log}")
        time.sleep(0.02)
        text, before = log.read_text(), text
    found = (Request(line[1], line[2]) for line in re.finditer(r'beast: .*?"([A-Z]+) (\S+) HTTP/', text))
    return [request for request in found if not request.target.startswith("/mark-")]


def _add_user(configuration: Path, name: str, keys: S3Server) -> None:
    who = [f"--uid={name}", f"--display-name={name}", f"--access-key={keys.access_key}", f"--secret={keys.secret_key}"]
    _run(configuration, ["radosgw-admin", "user", "create", *who])


def _run(configuration: Path, command: list[str]) -> None:
    env = {**os.environ, "CEPH_CONF": str(configuration)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def _key() -> str:
    return secrets.token_hex(10).upper()


def _settings(directory: Path, port: int, tls: int, day: int | None, certificate: tuple[Path, Path] | None) -> dict[str, object]:
    secure = f" ssl_endpoint=127.0.0.1:{tls} ssl_certificate={certificate[0]} ssl_private_key={certificate[1]}" if certificate else ""
    return {
        "fsid": uuid.uuid4(),
        "mon host": f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]",
        "public network": "127.0.0.0/8",
        "ms bind ipv6": "false",
        "auth cluster required": "none",
        "auth service required": "none",
        "auth client required": "none",
        "ms mon client mode": "crc",  # the gateway would insist on "secure", which needs the keys of cephx
        "paxos propose interval": 0.01,  # a second a step otherwise: twelve to start
        "paxos min wait": 0.01,
        "run dir": directory / "run",
        "admin socket": directory / "run/$name.$pid.asok",
        "log file": directory / "$name.log",
        "mon cluster log file": directory / "cluster.log",
        "pid file": directory / "$name.pid",
        "mon data": directory / "mon.$id",
        "osd data": directory / "osd.$id",
        "osd objectstore": "memstore",
        "memstore device bytes": 16 << 30,
        "osd pool default size": 1,
        "osd pool default min size": 1,
        "osd pool default pg num": 8,
        "osd crush chooseleaf type": 0,
        "mon allow pool size one": "true",
        "osd class load list": "*",
        "osd class default list": "*",
        "rgw data": directory / "rgw",
        "rgw frontends": f"beast tcp_nodelay=1 endpoint=127.0.0.1:{port}{secure}",  # 45 ms a small answer without nodelay
        "rgw enable usage log": "false",
        "rgw dynamic resharding": "false",
        "rgw override bucket index max shards": 1,
        "rgw gc obj min wait": 5,  # memory of what was deleted is soon used again
        "rgw gc processor period": 5,
        "rgw gc processor max time": 4,
        "rgw lc debug interval": -1 if day is None else day,
        "debug rgw": 1,  # a line for each request
        "debug osd": 0,
        "debug ms": 0,
    }
