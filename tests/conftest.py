"""What all tests share."""

import os
import signal
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import botocore.loaders
import pytest
from hypothesis import settings

# Flower reads these when it is first imported: tests report to nobody.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

# They hold no tests and no examples, and pytest would import each of them to look.
collect_ignore = ["conftest.py", "cli/conftest.py", "rigs", "flower_app", "flower_federation.py", "vm_cgroup2.py"]

pytest.register_assert_rewrite("gradsharding.testing")

from gradsharding.aws.s3.store import S3Store  # noqa: E402 - its asserts are rewritten first
from rigs import processes  # noqa: E402
from rigs.endpoints import rclone_server, seaweed_server, server_missing  # noqa: E402
from rigs.lambdas import emulator_missing  # noqa: E402
from rigs.s3 import Ceph, S3Server, ceph_missing, ceph_server, moto_server  # noqa: E402
from rigs.stack import account_missing, local_account, tool  # noqa: E402

# A loaded machine is slow, not wrong: no example has a deadline. `make test-all` and CI load "full".
settings.register_profile("quick", deadline=None, max_examples=20)
settings.register_profile("full", deadline=None)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """Let Flower's own dependencies be as they are: typer uses what click 8.2 deprecates."""
    config.addinivalue_line("filterwarnings", r"ignore:'click\.:DeprecationWarning:typer")
    # As in a shell's background, or under nohup; all that tests start would ignore them, too.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


MARKS = {
    "ceph": "rig",
    "emulator": "rig",
    "ministack": "rig",
    "rclone": "rig",
    "seaweed": "rig",
    "sam": "rig",
    "checkov": "rig",
    "wheels": "slow",
    "embedded_figures": "slow",
}
"""Fixtures, and the mark that every test bears which uses one, directly or through another fixture."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures that they use, before pytest selects by marks; begin with those that take long."""
    for item in items:
        for mark in {MARKS[name] for name in getattr(item, "fixturenames", ()) if name in MARKS}:
            item.add_marker(mark)
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.get_closest_marker("flower")))  # the longest first


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let only tests that are marked so start programs: ``make test`` needs none."""
    marked = any(item.get_closest_marker(mark) for mark in ("rig", "flower"))
    processes.refusal = "" if marked else "a test that starts programs is marked rig, or uses a fixture that marks it (tests/conftest.py)"
    try:
        return (yield)
    finally:
        processes.refusal = ""


@pytest.fixture(scope="session", autouse=True)
def _one_loader() -> Iterator[None]:
    """Let all botocore sessions share one loader, as one session's clients do: each would parse megabytes of AWS's models again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", cache(botocore.loaders.create_loader))
        yield


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture Flower's log from INFO on."""
    caplog.set_level("INFO", logger="flwr")
    return caplog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Give a clock that moves only by sleeping: its list has what it shows."""
    now = [100.0]
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now[0])
        patch.setattr("time.sleep", lambda seconds: now.append(now.pop() + seconds))
        yield now


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """Moto's S3, in this process, for the whole session."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """Ceph's S3, a production server, for the whole session."""
    if why := ceph_missing():
        pytest.skip(why)
    with ceph_server() as running:
        yield running


@pytest.fixture(scope="session")
def seaweed() -> Iterator[S3Server]:
    """SeaweedFS, for the whole session."""
    if why := server_missing("weed"):
        pytest.skip(why)
    with seaweed_server() as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[S3Server]:
    """``rclone serve s3``, for the whole session."""
    if why := server_missing("rclone"):
        pytest.skip(why)
    with rclone_server() as server:
        yield server


@pytest.fixture(scope="session")
def ministack() -> Iterator[dict[str, str]]:
    """Give the environment that leads to ministack, which stands in for AWS accounts, for the whole session."""
    if why := account_missing():
        pytest.skip(why)
    with local_account() as environment:
        yield environment


@pytest.fixture(scope="session")
def emulator() -> None:
    """Skip where Lambda's runtime emulator is not installed: the test starts functions."""
    if why := emulator_missing():
        pytest.skip(why)


@pytest.fixture(scope="session")
def sam() -> Path:
    """Give the path of SAM's command line."""
    if not (path := tool("sam")):
        pytest.skip("no sam: make rig")
    return path


@pytest.fixture(scope="session")
def checkov() -> Path:
    """Give the path of checkov, which looks for unsafe settings in templates."""
    if not (path := tool("checkov")):
        pytest.skip("no checkov: make rig")
    return path


def _store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return S3Store(f"s3://{server.make_bucket()}/some prefix")


@pytest.fixture
def moto_store(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Give an empty store on moto, to which the environment leads."""
    return _store(moto, monkeypatch)


@pytest.fixture
def ceph_store(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Give an empty store on Ceph, to which the environment leads."""
    return _store(ceph.server, monkeypatch)
