"""Invocations that take longer than networks remember a silent connection: TCP's probes, behind NAT that really forgets."""

import datetime as dt
import ipaddress
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ReadTimeoutError, SSLError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gradsharding.aws import keepalive
from gradsharding.aws.client import lambda_client
from gradsharding.aws.functions.executor import LambdaExecutor
from gradsharding.aws.s3.store import S3Store
from gradsharding.planning.topologies import Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.testing import assert_same, reference_mean, sample_updates
from rigs.lambdas import LocalFunction, LocalLambda
from rigs.nat import ForgetfulNat, nat_missing
from rigs.s3 import Ceph
from rigs.serving import serving

NAT_HERE = pytest.mark.skipif(bool(nat_missing()), reason=str(nat_missing()))


class _Works(BaseHTTPRequestHandler):
    """Answers an invocation with an empty object, after ``seconds``."""

    protocol_version = "HTTP/1.1"
    seconds = 0.0
    seen: list[str]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer."""
        self.seen.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.seconds)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


def _server(seconds: float = 0.0) -> tuple[ThreadingHTTPServer, list[str]]:
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Works,), {"seconds": seconds, "seen": seen}))
    server.daemon_threads = True
    return server, seen


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have credentials of nobody."""
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def slow() -> Iterator[str]:
    """Give the endpoint of a function that works for eight seconds."""
    with serving(_server(8)[0]) as url:
        yield url


def _ask(client: Any) -> bytes:
    answer: bytes = client.invoke(FunctionName="f", Payload=b"{}")["Payload"].read()
    return answer


@NAT_HERE
@pytest.mark.slow
def test_answers_outlast_nat(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer comes after 8 s through NAT that forgets silent connections after 5 s; by botocore's own connection, it does not."""
    monkeypatch.setattr(keepalive, "PROBES", keepalive.Probes(idle=2, every=2, most=9))
    with ForgetfulNat(slow, 5) as nat, ThreadPoolExecutor(2) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", nat.endpoint)
        once = Config(read_timeout=10, tcp_keepalive=True, retries={"total_max_attempts": 1})
        others = pool.submit(_ask, boto3.client("lambda", config=once))
        ours = pool.submit(_ask, lambda_client(60))
        assert b"{}" == ours.result()
        with pytest.raises(ReadTimeoutError):
            others.result()
    assert nat.probes >= 2
    assert nat.forgotten == 1


@NAT_HERE
@pytest.mark.slow
@pytest.mark.usefixtures("emulator")
def test_round_outlasts_nat(ceph_store: S3Store, ceph: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A round of functions that take longer than NAT remembers asks for each task once, with the probes that users get."""
    forgets = 1.25 * keepalive.PROBES.idle
    (tmp_path / "slow.py").write_text(
        "import time\nfrom gradsharding.aws.functions.handler import handler as real\n\n\n"
        f"def handler(event, context):\n    time.sleep({1.5 * forgets})\n    return real(event, context)\n"
    )
    paths = f"{tmp_path}:{Path(__file__).parents[1]}"
    function = LocalFunction(handler="slow.handler", code=tmp_path, timeout=120, environment={"PYTHONPATH": paths})
    updates = sample_updates()
    with LocalLambda(function, concurrency=2) as front, ForgetfulNat(front.endpoint, forgets) as nat:
        for name, value in {**ceph.server.environment(), "AWS_ENDPOINT_URL_LAMBDA": nat.endpoint}.items():
            monkeypatch.setenv(name, value)
        round_ = Round.create(ceph_store, "r")
        for client, (arrays, weight) in updates.items():
            round_.submit(client, arrays, weight)
        result = aggregate(round_, topology=Sharded(shards=2), executor=LambdaExecutor("gradsharding", concurrency=2))
    assert_same(reference_mean(updates), result.arrays())
    assert ["200", "200"] == [call.outcome for call in front.calls]
    assert nat.probes >= 2


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invocations go through the proxy that the environment names."""
    server, seen = _server()
    with serving(server) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", "http://lambda.invalid")
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert b"{}" == _ask(lambda_client(5))
    assert ["http://lambda.invalid/2015-03-31/functions/f/invocations"] == seen


def test_certificates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server is believed by the certificates that AWS_CA_BUNDLE names, and by no others."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), today, today + dt.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    bundle, secret = tmp_path / "ca.pem", tmp_path / "key.pem"
    bundle.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    secret.write_bytes(key.private_bytes(*formats))
    server, _ = _server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle, secret)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", url.replace("http:", "https:"))
        with pytest.raises(SSLError):
            _ask(lambda_client(5))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        assert b"{}" == _ask(lambda_client(5))
