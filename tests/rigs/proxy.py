"""A slow or faulty path to an HTTP server: a proxy that delays, paces, refuses, cuts or loses answers, and changes no byte.

``python -m rigs.proxy`` runs one in its own process, so that its work does not slow its clients down.
"""

import contextlib
import http.client
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self
from urllib.parse import urlsplit

from rigs.serving import serving

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "proxy-connection"}
_CHUNK = 256 << 10
_DOWN = b"<html><body><h1>503 Service Unavailable</h1>\nNo server is available to handle this request.\n</body></html>\n"
"""HAProxy's answer when no server is left."""
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Path:
    """Delays, rates and faults of a path.

    ``faults`` by the request's number, from 1: "503", "429" or "500" answers that, as S3 does, and forwards nothing; "down" answers 503,
    as a load balancer without servers does; "reset" breaks the connection before anything is forwarded; "lost" forwards, and
    breaks it instead of answering; "cut:N" after N bytes of the body.
    """

    latency: float = 0.0
    """Seconds before each answer begins."""
    per_connection: float = math.inf
    """Bytes/s of each answer."""
    total: float = math.inf
    """Bytes/s of all answers together."""
    faults: Mapping[int, str] = field(default_factory=dict)


class Proxy:
    """A path to ``endpoint``, on loopback, served by threads of this process.

    Subclasses may drop headers (``dropped``, in lower case) and answer requests themselves (``refusal``).
    """

    dropped: ClassVar[frozenset[str]] = frozenset()
    status: ClassVar[int] = 400
    """HTTP status of a refusal."""

    def __init__(self, endpoint: str, path: Path) -> None:
        self.target = urlsplit(endpoint).netloc
        self.path = path
        self.requests = 0
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._serving = contextlib.ExitStack()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Relay,), {"proxy": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._serving.enter_context(serving(self._server))
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.close()

    def refusal(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes | None:  # noqa: ARG002
        """Return the document that answers a request, or None to forward it. Names of headers are in lower case."""
        return None

    def next_fault(self) -> str:
        """Count a request; return its fault, or an empty string."""
        with self._lock:
            self.requests += 1
            return self.path.faults.get(self.requests, "")

    def pace(self, count: int) -> None:
        """Wait until ``count`` more bytes may pass at the total rate."""
        if self.path.total < math.inf:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + count / self.path.total
                until = self._free_at
            time.sleep(max(0.0, until - time.monotonic()))


class _Relay(BaseHTTPRequestHandler):
    """Forwards requests; each client's connection has one to the target, which lives as long."""

    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def setup(self) -> None:
        """Open both connections."""
        super().setup()
        self.upstream = http.client.HTTPConnection(self.proxy.target, timeout=120)

    def finish(self) -> None:
        """Close both."""
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def relay(self) -> None:
        """Forward one request, or answer it."""
        body, fault = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.proxy.next_fault()
        time.sleep(self.proxy.path.latency)
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, refused = self.proxy.status, None
        if fault.isdigit():
            status, refused = int(fault), _BUSY
        elif fault == "down":
            status, refused = 503, _DOWN
        else:
            refused = self.proxy.refusal(self.command, self.path, headers, body)
        if refused is not None:
            self._answer(status, {"Content-Type": "text/html" if fault == "down" else "application/xml"}, len(refused))
            self.wfile.write(b"" if self.command == "HEAD" else refused)
            return None
        if fault == "reset":
            return self._break()
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect" and name.lower() not in self.proxy.dropped:  # "expect" is answered here
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body or None)
        answer = self.upstream.getresponse()
        if fault == "lost":
            answer.read()
            return self._break()
        length = answer.getheader("Content-Length")
        data = b"" if length is not None else answer.read()
        self._answer(answer.status, dict(answer.getheaders()), int(length) if length is not None else len(data))
        self.wfile.write(data)
        left = int(fault.removeprefix("cut:")) if fault else math.inf
        buffer, begun, sent = memoryview(bytearray(_CHUNK)), time.monotonic(), 0
        while left > 0 and (count := answer.readinto(buffer[: int(min(_CHUNK, left))])):
            self.proxy.pace(count)
            sent, left = sent + count, left - count
            time.sleep(max(0.0, begun + sent / self.proxy.path.per_connection - time.monotonic()))
            self.wfile.write(buffer[:count])
        if fault:
            self._break()
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815 - http.server names them so

    def _answer(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _break(self) -> None:
        self.close_connection = True
        self.upstream.close()
        self.connection.close()


@contextlib.contextmanager
def slow_path(endpoint: str, *, latency: float = 0.0, per_connection: float = math.inf, total: float = math.inf) -> Iterator[str]:
    """Start a slow path to ``endpoint`` in its own process; give the endpoint to use instead."""
    settings = {"latency": latency, "per_connection": per_connection, "total": total}
    command = [sys.executable, "-m", "rigs.proxy", endpoint, json.dumps(settings)]
    path = os.pathsep.join(
        [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )  # where rigs is, for a script that found it
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin
        assert process.stdout
        try:
            if not (address := process.stdout.readline().strip()):  # requests would go to AWS
                raise RuntimeError(f"the slow path to {endpoint} did not start")
            yield address
        finally:
            process.stdin.close()  # which ends it, also when this process is killed


if __name__ == "__main__":
    with Proxy(sys.argv[1], Path(**json.loads(sys.argv[2]))) as _proxy:
        print(_proxy.endpoint, flush=True)  # noqa: T201 - read by the parent process
        sys.stdin.read()
