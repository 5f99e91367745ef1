"""Lambda on loopback: a front that speaks Lambda's API, and AWS's runtime emulator, one for each execution environment."""

import base64
import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import unquote

from gradsharding.errors import UserError
from gradsharding.planning.platform import Architecture
from gradsharding.running.cgroup import Hold, MemoryCgroup
from rigs.processes import check_allowed, free_port
from rigs.serving import serving

Fault = Literal["raise", "kill", "timeout", "lost", "throttle", "twice", "error"]
"""What goes wrong with an invocation.

raise: the handler raises. kill: its process is killed while it runs. timeout: it does not end in time. lost: it runs, but its
answer is not delivered. throttle: 429. twice: it runs twice, and the second answer is delivered. error: 500, and nothing runs.
"""


class Said(NamedTuple):
    """What Lambda's API answers instead of running the function: status, name of the exception, message, reason for throttling."""

    status: int
    kind: str
    message: str = "said by a test"
    reason: str | None = None


PAYLOAD = 6 << 20
"""Largest synchronous request, in bytes."""

HERE: Architecture = "arm64" if os.uname().machine == "aarch64" else "x86_64"
"""This machine's architecture, as Lambda names it."""


def emulator() -> str | None:
    """Find the runtime interface emulator: ``$GRADSHARDING_RIE``, on the PATH, or beside this Python; None if it is not installed."""
    found = os.environ.get("GRADSHARDING_RIE") or shutil.which("aws-lambda-rie") or str(Path(sys.executable).with_name("aws-lambda-rie"))
    return found if Path(found).exists() else None


def emulator_missing() -> str | None:
    """Say why functions cannot run here; None if they can."""
    if not emulator():
        return "no aws-lambda-rie: make rig, or set GRADSHARDING_RIE to the one that comes with aws-sam-cli"
    return None if importlib.util.find_spec("awslambdaric") else "no awslambdaric: pip install awslambdaric"


def hold() -> Hold:
    """Say what limits a function's memory here: a cgroup, or nothing. RLIMIT_DATA would limit each of its processes separately."""
    trial = MemoryCgroup.create(PAYLOAD)
    if not trial:
        return "nothing"
    trial.close()
    return trial.hold


@dataclass(frozen=True)
class LocalFunction:
    """A function's configuration; ``memory`` in MiB, ``timeout`` in seconds."""

    name: str = "gradsharding"
    handler: str = "gradsharding.aws.functions.handler.handler"
    memory: int = 512
    timeout: int = 60
    code: Path | None = None
    """Directory that the handler is imported from; None for this checkout."""
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    """MiB that it is really limited to, if less than ``memory``."""
    log_format: Literal["Text", "JSON"] = "Text"
    """Format of START, END and REPORT, and of the runtime's own lines."""
    aliases: Mapping[str, str] = field(default_factory=lambda: {"live": "1"})
    """Its aliases, and the published version of each; all run the same code."""


@dataclass(frozen=True)
class Call:
    """An invocation that reached the front: its number, from 1, and its outcome: an HTTP status, "lost", or the type of an error."""

    number: int
    outcome: str
    log: str = ""
    """The end of its log."""
    qualifier: str = ""
    """The version or alias that was invoked."""
    event: bytes = field(default=b"", repr=False)
    """Its event, as JSON."""


class LocalLambda:
    """One function, in up to ``concurrency`` environments at once; further invocations get 429.

    A cgroup limits the memory of each environment, where one can be made (``hold``); where none can, a function with a ``limit`` is
    refused. Leaving the context ends all processes.
    """

    def __init__(
        self,
        function: LocalFunction,
        *,
        concurrency: int = 10,
        faults: Mapping[int, Fault | Said] | None = None,
        tells: bool = True,
        reserved: bool = True,
    ) -> None:
        """Keep ``faults`` by the number of the invocation, from 1. Unless it ``tells``, nobody may read its settings.

        ``reserved`` says whether the concurrency is reserved for the function, or is the account's unreserved one.
        """
        if function.limit and hold() == "nothing":
            raise UserError(f"nothing can hold a function to {function.limit} MiB here: no memory cgroup may be made; try as root")
        self.function = function
        self.concurrency = concurrency
        self.calls: list[Call] = []
        self.faults = dict(faults or {})
        self.tells = tells
        self.reserved = reserved
        self.aliases = dict(function.aliases)
        self._lock = threading.Lock()
        self._running = self._asked = 0
        self._idle: list[_Environment] = []
        self._all: list[_Environment] = []
        self._serving = contextlib.ExitStack()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Front,), {"front": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._serving.enter_context(serving(self._server))
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.close()
        for environment in self._all:
            environment.close()

    def environment(self) -> dict[str, str]:
        """Give the environment that leads a Lambda client here; credentials and region are S3Server's."""
        return {"AWS_ENDPOINT_URL_LAMBDA": self.endpoint}

    def settings(self, path: str) -> tuple[int, Any]:
        """Answer a GET of the account's or the function's settings: status and body."""
        if not self.tells:
            return 403, {"Message": "not authorized", "Code": "AccessDeniedException"}
        _, _, kind, *rest = path.rstrip("/").split("/")  # the first is empty, the second the API's date
        if kind == "account-settings":
            return 200, {"AccountLimit": {"ConcurrentExecutions": 1000, "UnreservedConcurrentExecutions": self.concurrency}}
        name, qualifier = _named(rest[0])
        if not self._has(name, qualifier):
            return 404, {"Message": f"Function not found: {unquote(rest[0])}", "Type": "User"}
        if rest[1:] == ["concurrency"]:
            if qualifier:
                return 400, {"Message": "concurrency is reserved for a function, not for a version or an alias", "Type": "User"}
            return 200, {"ReservedConcurrentExecutions": self.concurrency} if self.reserved else {}
        version = self.aliases.get(qualifier, qualifier or "$LATEST")
        known = {"FunctionName": name, "Version": version, "MemorySize": self.function.memory, "Timeout": self.function.timeout}
        return 200, known | {"Architectures": [HERE]}

    def _has(self, name: str, qualifier: str) -> bool:
        return name == self.function.name and qualifier in ("", "$LATEST", *self.aliases, *self.aliases.values())

    def invoke(self, name: str, body: bytes) -> tuple[int, dict[str, str], Any] | None:
        """Answer an invocation: status, headers, body; None if the answer is lost."""
        with self._lock:
            self._asked += 1
            number, fault = self._asked, self.faults.get(self._asked)
            full = self._running >= self.concurrency
            self._running += not full
        try:
            answer = self._answer(name, body, fault, full=full)
        finally:
            with self._lock:
                self._running -= not full
        outcome = str(answer[1].get("X-Amz-Function-Error", answer[0])) if fault != "lost" else "lost"
        log = base64.b64decode(answer[1].get("X-Amz-Log-Result", "")).decode(errors="replace")
        with self._lock:
            self.calls.append(Call(number, outcome, log, _named(name)[1], body))
        return None if fault == "lost" else answer

    def _answer(self, name: str, body: bytes, fault: Fault | Said | None, *, full: bool) -> tuple[int, dict[str, str], Any]:
        if isinstance(fault, Said):
            return _error(*fault)
        if not self._has(*_named(name)):
            return _error(404, "ResourceNotFoundException", f"Function not found: {name}")
        if len(body) > PAYLOAD:
            return _error(413, "RequestTooLargeException", f"Request must be smaller than {PAYLOAD} bytes for the InvokeFunction operation")
        if full or fault == "throttle":
            return _error(429, "TooManyRequestsException", "Rate Exceeded.")
        if fault == "error":
            return _error(500, "ServiceException", "Internal failure")
        with self._lock:
            environment = self._idle.pop() if self._idle else None
        if not environment:
            environment = _Environment(self.function)
            with self._lock:
                self._all.append(environment)
        for _ in range(2 if fault == "twice" else 1):
            failed, payload, log = environment.invoke(b"null" if fault == "raise" else body, fault)
        with self._lock:
            self._idle.append(environment)
        headers = {"X-Amz-Log-Result": base64.b64encode(log.encode()[-4096:]).decode()}
        return 200, headers | ({"X-Amz-Function-Error": "Unhandled"} if failed else {}), payload


class _Environment:
    """One execution environment: an emulator with its runtime. The emulator panics at a second invocation while one runs."""

    def __init__(self, function: LocalFunction) -> None:
        self._function = function
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed by close
        self._cgroup: MemoryCgroup | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._warm = False

    def invoke(self, body: bytes, fault: Fault | Said | None) -> tuple[bool, bytes, str]:
        """Run the function once; give whether it failed, its answer, and its log with Lambda's REPORT at the end."""
        cold, begun, request = not self._warm, time.perf_counter(), str(uuid.uuid4())
        if not self._process or self._process.poll() is not None:
            self._start()
        ready = time.perf_counter()
        self._log.seek(0, os.SEEK_END)
        start = self._log.tell()
        timers = {"kill": signal.SIGKILL, "timeout": signal.SIGSTOP}
        interference = threading.Timer(0.05, self._signal, [timers[fault]]) if isinstance(fault, str) and fault in timers else None
        if interference:
            interference.start()
        status, payload = self._ask(body)
        ended = time.perf_counter()
        if interference:
            interference.join()
        verdict, payload = self._judged(status, payload, request)
        killed, peak = (self._cgroup.kills() > 0, self._cgroup.peak() >> 20) if self._cgroup else (False, 0)
        self._warm = verdict != "ended" and not killed
        if not self._warm:
            self._end()
        used = (self._function.limit or self._function.memory) if killed else min(peak, self._function.memory)
        self._log.seek(start)
        log = re.sub(r"(?m)^(START|END|REPORT|INIT_).*\n?", "", self._log.read().decode(errors="replace"))
        size = self._function.limit or self._function.memory
        framed = _framed_as_json if self._function.log_format == "JSON" else _framed_as_text
        return verdict != "done", payload, framed(log, request, ended - ready, size, used, ready - begun if cold else None)

    def close(self) -> None:
        """End the processes."""
        self._end()
        self._log.close()

    def _start(self) -> None:
        self._end()
        function, (port, api) = self._function, (free_port(), free_port())
        code = str(function.code or Path(__file__).parents[2])
        env = {
            **os.environ,
            "AWS_LAMBDA_FUNCTION_NAME": function.name,
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function.memory),
            "AWS_LAMBDA_FUNCTION_TIMEOUT": str(function.timeout),
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_LOG_FORMAT": function.log_format,
            "LAMBDA_TASK_ROOT": code,
            "PYTHONPATH": code,
            **function.environment,
        }
        binary = emulator()
        assert binary
        check_allowed(binary)
        addresses = ["--runtime-interface-emulator-address", f"127.0.0.1:{port}", "--runtime-api-address", f"127.0.0.1:{api}"]
        self._port = port
        self._process = process = subprocess.Popen(
            [binary, *addresses, "--log-level", "info", sys.executable, "-m", "awslambdaric", function.handler],
            env=env,
            cwd=code,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._cgroup = MemoryCgroup.create((function.limit or function.memory) << 20)
        if self._cgroup and not self._cgroup.add(process.pid):  # before its first invocation starts the runtime
            self._end()
            raise UserError(f"the kernel does not let process {process.pid} be moved into {self._cgroup.path}")
        for _ in range(1_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.005)

    def _ask(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._function.timeout + 30)
        try:
            connection.request("POST", "/2015-03-31/functions/function/invocations", body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    @staticmethod
    def _judged(status: int, payload: bytes, request: str) -> tuple[Literal["done", "failed", "ended"], bytes]:
        """Tell answers from errors: the emulator answers a timeout, as plain text, and an exception with 200. After some it must end."""
        if payload.startswith(b"Task timed out"):
            text = f"RequestId: {request} Error: {payload.decode()}"
            return "ended", json.dumps({"errorType": "Sandbox.Timedout", "errorMessage": text}).encode()
        if status != 200:
            text = f"RequestId: {request} Error: Runtime exited without providing a reason"
            return "ended", payload or json.dumps({"errorType": "Runtime.ExitError", "errorMessage": text}).encode()
        return "failed" if payload.startswith((b'{"errorMessage"', b'{"errorType"')) else "done", payload

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the runtime, the emulator's child."""
        assert self._process
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for pid in (thread / children.name).read_text().split():
                    os.kill(int(pid), number)

    def _end(self) -> None:
        """End the processes and remove their cgroup: the next ones get a new one, whose counts begin at zero."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._cgroup:
            self._cgroup.close()
        self._process = self._cgroup = None


class _Front(BaseHTTPRequestHandler):
    """The part of Lambda's HTTP API that an executor needs."""

    front: LocalLambda
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # an answer goes in one segment; in two, the second would wait for an acknowledgement

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Give the function's settings."""
        status, answer = self.front.settings(self.path.partition("?")[0])
        kinds = {400: "InvalidParameterValueException", 403: "AccessDeniedException", 404: "ResourceNotFoundException"}
        self._send(status, {"x-amzn-ErrorType": kinds[status]} if status in kinds else {}, json.dumps(answer).encode())

    def do_POST(self) -> None:
        """Invoke the function."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].split("/")
        answer = self.front.invoke(path[3], body)
        if answer is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._send(*answer)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _error(status: int, kind: str, message: str, reason: str | None = None) -> tuple[int, dict[str, str], bytes]:
    why = {"Reason": reason} if reason else {}
    return status, {"x-amzn-ErrorType": kind}, json.dumps({"Type": "User", "Message": message, **why}).encode()


def _named(name: str) -> tuple[str, str]:
    """Split a function's name or ARN, as the API's URLs have it, into its name and its version or alias."""
    function, _, qualifier = unquote(name).rpartition("function:")[2].partition(":")
    return function, qualifier


def _framed_as_text(log: str, request: str, seconds: float, size: int, used: int, init: float | None) -> str:
    """Put a log between the lines that Lambda writes around it."""
    cold = "" if init is None else f"Init Duration: {1000 * init:.2f} ms\t"
    return (
        f"START RequestId: {request} Version: $LATEST\n{log}END RequestId: {request}\n"
        f"REPORT RequestId: {request}\tDuration: {1000 * seconds:.2f} ms\tBilled Duration: {int(1000 * seconds) + 1} ms\t"
        f"Memory Size: {size} MB\tMax Memory Used: {used} MB\t{cold}\n"
    )


def _framed_as_json(log: str, request: str, seconds: float, size: int, used: int, init: float | None) -> str:
    """Put a log between the events that Lambda writes around it if the function logs JSON.

    Their shape: https://docs.aws.amazon.com/lambda/latest/dg/telemetry-schema-reference.html#platform-report.
    """
    cold = {} if init is None else {"initDurationMs": round(1000 * init, 3)}
    metrics = {"durationMs": round(1000 * seconds, 3), "billedDurationMs": int(1000 * seconds) + 1, "memorySizeMB": size}
    start = {"type": "platform.start", "record": {"requestId": request, "version": "$LATEST"}}
    report = {"requestId": request, "metrics": {**metrics, "maxMemoryUsedMB": used, **cold}, "status": "success"}
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    before, after = (json.dumps({"time": now, **event}) for event in (start, {"type": "platform.report", "record": report}))
    return f"{before}\n{log}{after}\n"
