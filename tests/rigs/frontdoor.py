"""A proxy in front of ministack that adds what AWS does and ministack does not, and can stop a caller at a given request.

It compares a bucket's owner with the one that the request expects, keeps the role that CloudFormation was given for a stack, and records
all requests.
"""

import contextlib
import http.client
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from rigs.serving import serving
from rigs.stack import as_account

_SCOPE = re.compile(r"Credential=([^/]+)/\d+/[^/]+/([^/]+)/aws4_request")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Seen(NamedTuple):
    """A request that was received."""

    account: str
    service: str
    """The service in its signature: s3, cloudformation, lambda."""
    action: str
    """The name of the action, or method and path."""
    bucket: str
    owner: str | None
    """The account that it expects to own the bucket."""


class Stop(NamedTuple):
    """Sends a signal to a process at its request with this number, counted from 1 from now on."""

    pid: int
    number: int
    signum: signal.Signals
    answered: bool = False
    """Whether the request is carried out, so that only the answer is lost."""


@dataclass
class FrontDoor:
    """A proxy on loopback, served by threads of this process. It knows the buckets of ``accounts`` only."""

    plain: Mapping[str, str]
    """The environment that leads to ministack directly."""
    accounts: list[str]
    seen: list[Seen] = field(default_factory=list)
    stop: Stop | None = None
    roles: dict[str, str] = field(default_factory=dict)
    """ARN of the role of each stack, by ``ACCOUNT/STACK``."""
    closed: set[str] = field(default_factory=set)
    """Requests to deny, each as method and path with its query: ``HEAD /bucket``."""

    def __post_init__(self) -> None:
        """Open the port."""
        self.endpoint = self.plain["AWS_ENDPOINT_URL"]
        self._given: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._serving = contextlib.ExitStack()
        self._server = _Server(("127.0.0.1", 0), type("Bound", (_Relay,), {"door": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._serving.enter_context(serving(self._server))
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.close()

    def environment(self, account: str) -> dict[str, str]:
        """Return the environment that leads through this proxy to an account, whose buckets it knows from now on."""
        self.accounts += [account] if account not in self.accounts else []
        return {**as_account(self.plain, account), "AWS_ENDPOINT_URL": self.url, "AWS_ENDPOINT_URL_S3": self.url}

    def note(self, request: Seen) -> Stop | None:
        """Record a request; return the stop if this request is the one to stop at."""
        with self._lock:
            self.seen.append(request)
            if self.stop:
                self.stop = self.stop._replace(number=self.stop.number - 1)
                if self.stop.number == 0:
                    ended, self.stop = self.stop, None
                    return ended
        return None

    def denies(self, request: Seen) -> bool:
        """Tell whether the bucket belongs to another account than the request expects."""
        if not request.owner or not request.bucket or self._has(request.owner, request.bucket):
            return False
        return any(self._has(number, request.bucket) for number in self.accounts if number != request.owner)

    def keep_role(self, account: str, asked: Mapping[str, list[str]]) -> None:
        """Keep the role of a change set that is executed; forget it when its stack is deleted."""
        stack, change = (_name(asked.get(name, [""])[0]) for name in ("StackName", "ChangeSetName"))
        match asked["Action"][0]:
            case "CreateChangeSet" if "RoleARN" in asked:
                self._given[change] = (f"{account}/{stack}", asked["RoleARN"][0])
            case "ExecuteChangeSet" if change in self._given:
                self.roles.update([self._given[change]])
            case "DeleteStack":
                self.roles.pop(f"{account}/{stack}", None)

    def with_roles(self, account: str, described: bytes) -> bytes:
        """Add the roles to an answer of DescribeStacks."""

        def add(found: re.Match[bytes]) -> bytes:
            role = self.roles.get(f"{account}/{found[1].decode()}")
            return found[0] + (f"<RoleARN>{role}</RoleARN>".encode() if role else b"")

        return re.sub(rb"<StackName>([^<]*)</StackName>", add, described)

    def _has(self, account: str, bucket: str) -> bool:
        """Ask ministack, as the account, whether it has the bucket: ministack checks no signatures."""
        scope = f"AWS4-HMAC-SHA256 Credential={account}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        with contextlib.closing(http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=120)) as connection:
            connection.request("GET", f"/?prefix={bucket}", headers={"Authorization": scope})
            return f"<Name>{bucket}</Name>" in connection.getresponse().read().decode()


def _name(place: str) -> str:
    """Return the name in an ARN, or the name itself."""
    return place.split("/")[1] if place.startswith("arn:") else place


class _Server(ThreadingHTTPServer):
    """Ignores errors of clients that are gone: some are killed."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Report every other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Relay(BaseHTTPRequestHandler):
    """Forwards requests."""

    door: FrontDoor
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def relay(self) -> None:
        """Forward one request, or deny it."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        scope, path = _SCOPE.search(self.headers.get("Authorization", "")), urlsplit(self.path).path
        account, service = scope.groups() if scope else ("", "")
        asked = parse_qs(body.decode()) if service in ("cloudformation", "iam", "sts", "monitoring") else {}
        action = asked.get("Action", [""])[0]
        bucket = path.split("/")[1] if service == "s3" else ""
        request = Seen(account, service, action or f"{self.command} {path}", bucket, self.headers.get("x-amz-expected-bucket-owner"))
        stop = self.door.note(request)
        if stop and not stop.answered:
            os.kill(stop.pid, stop.signum)
            if stop.signum == signal.SIGKILL:
                self.close_connection = True
                return
        if self.door.denies(request) or f"{self.command} {self.path}" in self.door.closed:
            self._answer(403, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else _DENIED)
            return
        with contextlib.closing(http.client.HTTPConnection(urlsplit(self.door.endpoint).netloc, timeout=120)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):  # answered here
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            data, headers = answer.read(), dict(answer.getheaders())
        if service == "cloudformation":
            self.door.keep_role(account, asked)
            data = self.door.with_roles(account, data) if action == "DescribeStacks" else data
        if stop and stop.answered:
            os.kill(stop.pid, stop.signum)
        with contextlib.suppress(OSError):
            self._answer(answer.status, headers, data, answer.getheader("Content-Length"))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815 - http.server names them so

    def _answer(self, status: int, headers: Mapping[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", (length if self.command == "HEAD" else None) or str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def front_door(environment: Mapping[str, str], *accounts: str) -> Iterator[FrontDoor]:
    """Open a proxy to the accounts that an environment leads to."""
    with FrontDoor(environment, [*accounts]) as door:
        yield door
