"""Real Flower processes: the simulation engine, ``flwr run``, a SuperLink with SuperNodes, and the demo."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.serverapp.strategy import FedAvg

from flower_federation import State, files, state_of
from gradsharding_flower import from_state_dict
from gradsharding_flower.demo.federation import client_app, initial_model
from gradsharding_flower.testing import LocalGrid
from rigs.loopback import Loopback

pytestmark = pytest.mark.flower

APP = Path(__file__).parent / "flower_app"
ROUNDS, CLIENTS = 2, 2

SIMULATION = f"""
import sys
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from gradsharding_flower import GradSharding, from_state_dict, upload_mod
from gradsharding_flower.demo.federation import client_app, initial_model

app = ServerApp()

@app.main()
def main(grid, context):
    strategy = GradSharding(FedAvg(fraction_evaluate=0.0), store=sys.argv[1], shards=3, executor="processes:1")
    result = strategy.start(grid, from_state_dict(initial_model(7).state_dict()), num_rounds={ROUNDS})
    print("model:", result.model.source)

run_simulation(app, client_app([upload_mod], seed=7), {CLIENTS})
"""


@cache
def expected() -> State:
    """Train the same federation in this process, on plain Flower."""
    grid = LocalGrid({node: client_app([], seed=7) for node in range(1, CLIENTS + 1)})
    for partition, context in enumerate(grid._contexts.values()):
        context.node_config.update({"partition-id": partition, "num-partitions": CLIENTS})
    initial = from_state_dict(initial_model(7).state_dict())
    return state_of(FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=ROUNDS).arrays)


def assert_is_expected(model: Path) -> None:
    """Compare a final model with the one trained in this process: the order of the sum differs, and rounding with it."""
    loaded = safetensors.numpy.load_file(model)
    assert expected().keys() == loaded.keys()
    for name, array in expected().items():
        np.testing.assert_allclose(loaded[name], array, rtol=1e-3, atol=1e-5)


def run_python(arguments: list[str], home: Path) -> str:
    """Run this interpreter; return its output, or fail with all that it printed."""
    ended = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "FLWR_HOME": str(home)}, capture_output=True, text=True, timeout=600, check=False
    )
    assert 0 == ended.returncode, ended.stdout + ended.stderr
    return ended.stdout


def running(home: Path) -> list[str]:
    """Find the processes that belong to a deployment, by the FLWR_HOME that they and their children inherit."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended, or is not ours
            continue
    return found


def assert_ends(home: Path) -> None:
    """Wait for a deployment's processes to be gone."""
    end = time.monotonic() + 30
    while (left := running(home)) and time.monotonic() < end:
        time.sleep(0.2)
    assert [] == left


def run_app(loopback: Loopback, directory: Path, strategy: str) -> dict[str, Any]:
    """Run the app; give its report."""
    path, store = directory / f"{strategy}.json", directory / "store"
    config = {"num-server-rounds": ROUNDS, "num-clients": CLIENTS, "strategy": strategy, "store": str(store), "report": str(path)}
    loopback.run(APP, **config)  # type: ignore[arg-type]
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def assert_small_messages(report: dict[str, Any]) -> None:
    """See that each round sent receipts through the server, and arrays through the store."""
    size = sum(array.nbytes for array in expected().values())
    assert ROUNDS == len(report["rounds"])
    for one in report["rounds"]:
        assert CLIENTS == len(one["clients"])
        assert {} == one["left_out"]
        assert 0 < one["server_sent"] < 1000 * CLIENTS
        assert 0 < one["server_received"] < 1000 * CLIENTS
        assert CLIENTS * size < one["uploaded"] < CLIENTS * (size + 2000)


def test_run_simulation(tmp_path: Path) -> None:
    """Flower's simulation engine, started from Python, trains the same model."""
    printed = run_python(["-c", SIMULATION, str(tmp_path / "store")], tmp_path / "home")
    model = re.search(r"model: (\S+)", printed)
    assert model
    assert_is_expected(tmp_path / "store" / model[1])
    assert 2 == len(files(tmp_path / "store"))


def test_flwr_run_on_a_simulation(tmp_path: Path) -> None:
    """``flwr run`` on a SuperLink that simulates its nodes trains the same model."""
    home = tmp_path / "home"
    with Loopback(home, nodes=CLIENTS, simulation=True) as loopback:
        report = run_app(loopback, tmp_path, "gradsharding")
        assert running(home)
    assert_ends(home)
    assert_is_expected(tmp_path / "store" / report["model"])
    assert_small_messages(report)


def test_flwr_run_on_a_deployment(tmp_path: Path) -> None:
    """A SuperLink and SuperNodes train the same model as plain Flower with the same app, and leave no process behind."""
    home = tmp_path / "home"
    with Loopback(home, nodes=CLIENTS) as loopback:
        report = run_app(loopback, tmp_path, "gradsharding")
        assert 1 + CLIENTS <= len(running(home))
        plain = run_app(loopback, tmp_path, "fedavg")
    assert_ends(home)
    assert_small_messages(report)
    assert_is_expected(tmp_path / "store" / report["model"])
    assert_is_expected(tmp_path / "store" / plain["model"])
    assert 2 + 1 == len(files(tmp_path / "store"))


def test_a_failing_app_is_told_with_its_logs(tmp_path: Path) -> None:
    """When ``flwr run`` refuses an app, the error has its output, and the SuperLink ends all the same."""
    home = tmp_path / "home"
    with Loopback(home, nodes=0) as loopback, pytest.raises(RuntimeError, match=r"flwr run ended with [1-9]"):
        loopback.run(tmp_path / "no such app")
    assert_ends(home)


DEMO = [sys.executable, "-m", "gradsharding", "demo", "--clients", "3"]


def demo_environment(directory: Path) -> dict[str, str]:
    """Make an environment whose processes ``running`` finds, and whose temporary files lie in a directory."""
    (directory / "tmp").mkdir()
    own = {"FLWR_HOME": str(directory / "home"), "TMPDIR": str(directory / "tmp"), "TERM": "xterm-256color"}
    return {**os.environ, **own, "RAY_TMPDIR": "/tmp"}  # noqa: S108 - where names of sockets are short enough


def test_demo(tmp_path: Path) -> None:
    """In a terminal, ``gradsharding demo`` trains both ways and shows it; what passed plain Flower's server went past ours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [*DEMO, "--rounds", "2", "--plot", str(tmp_path / "figure.png")]
    with subprocess.Popen(command, env=demo_environment(tmp_path), stdin=theirs, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        raw = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody has it open any more
            while came := os.read(ours, 1 << 16):
                raw += came
    os.close(ours)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    assert 0 == run.returncode, shown
    assert "gradsharding: round 2 of 2" in shown
    assert "plain Flower: round 2 of 2" in shown
    last = re.search(r"accuracy after 2 rounds: gradsharding ([0-9.]+), plain Flower ([0-9.]+)", shown)
    assert last, shown
    sliced, plain = map(float, last.groups())
    assert 0.3 < sliced
    assert sliced == pytest.approx(plain, abs=0.01)
    totals = dict(re.findall(r"^ (gradsharding|plain Flower) .* 0\.\d{4} +(.*?)\s*$", shown, re.MULTILINE))
    through, past = re.split(" {2,}", totals["gradsharding"])
    assert through.endswith(" kB")
    assert past.endswith(" MB")
    assert totals["plain Flower"].endswith(" MB")
    assert float(past[:-3]) == pytest.approx(float(totals["plain Flower"][:-3]), rel=0.06)  # 3 clients × 2 rounds × 2 ways × 152 kB
    assert shown.rstrip().endswith("gradsharding plan --size 528MB --clients 20")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    """Without a terminal each round is a line; Ctrl-C ends the demo after those it has shown, and leaves no process, file or traceback."""
    environment = demo_environment(tmp_path)
    command = [*DEMO, "--rounds", "100"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout
        lines = [run.stdout.readline() for _ in range(3)]
        assert 1 == len([*(tmp_path / "tmp").glob("gradsharding-demo-*")])
        os.killpg(run.pid, signal.SIGINT)
        output, complaint = run.communicate(timeout=120)

    assert (130, "gradsharding: interrupted") == (run.returncode, complaint.strip())
    assert re.fullmatch(r"3 clients with [0-9, ]+ images; 100 rounds, 4 slices\n", lines[0])
    for number, text in enumerate([*lines[1:], *output.splitlines()], start=1):
        assert re.match(rf"gradsharding, round +{number}: accuracy 0\.\d{{4}}, \d+\.\d s, ", text)
    assert_ends(tmp_path / "home")
    assert [] == [*(tmp_path / "tmp").glob("gradsharding-*")]
