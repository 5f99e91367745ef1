"""What people see: every command in real terminals of several widths, and without one."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gradsharding.aws.deploy import commands
from rigs.command import slow

UPDATES = ["a.safetensors:120", "b.safetensors:80"]
SESSION = {
    "help": ["--help"],
    "plan": ["plan", "--size", "528MB", "--clients", "20"],
    "plan in detail": ["plan", "--size", "500GB", "--clients", "300", "--shards", "9000", "--memory", "2GiB", "--detail"],
    "plan of express": ["plan", "--size", "8MB", "--clients", "3", "--storage", "express", "--exact", "--detail"],
    "plan without prices": ["plan", "--size", "8MB", "--clients", "3", "--region", "mars-1"],
    "aggregate": ["aggregate", *UPDATES, "-o", "out", "--exact", "--store", "kept", "--executor", "inline"],
    "aggregate again": ["aggregate", *UPDATES, "-o", "out", "--exact", "--store", "kept", "--executor", "inline"],
    "prices": ["prices"],
    **{f"help of {name}": [name, "--help"] for name in ("plan", "aggregate", "verify", "completion")},
}
"""Commands, one after the other in one process: starting each by itself would take most of the time."""

DRIVER = "import json, sys; from gradsharding.cli.main import main\nfor args in json.loads(sys.argv[1]): main(args); print('\\x1e')"


def outputs(run: str) -> dict[str, str]:
    """Split what a session printed by command, without the colours and the moves of a terminal."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", run)
    return dict(zip(SESSION, plain.split("\x1e\n")[:-1], strict=True))


def in_terminal(width: int, cwd: Path) -> str:
    """Run the session in a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
    with subprocess.Popen([*command()], cwd=cwd, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as run:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while piece := os.read(ours, 65_536):
                seen += piece
        os.close(ours)
    assert 0 == run.returncode
    return seen.decode()


def command() -> Sequence[str]:
    """Give the command that runs the session."""
    return [sys.executable, "-c", DRIVER, json.dumps([*SESSION.values()])]


@pytest.fixture(scope="module", params=[(80,), slow((80, 100, 160))], ids=str)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What the session prints, by the width of its terminal; 0 is a pipe."""
    cwd = tmp_path_factory.mktemp("session")
    for seed, name in enumerate("ab"):
        values = np.random.default_rng(seed).standard_normal(1 << 10, dtype=np.float32)
        safetensors.numpy.save_file({"w": values}, cwd / f"{name}.safetensors")
    piped = subprocess.run(command(), cwd=cwd, capture_output=True, text=True, check=True).stdout
    return {0: piped, **{width: in_terminal(width, cwd) for width in request.param}}


def test_lines_fit(runs: dict[int, str]) -> None:
    """No line is longer than the terminal, or than 80 columns without one, and no cell is cut off."""
    for width, run in runs.items():
        for name, text in outputs(run).items():
            assert [] == [line for line in text.splitlines() if len(line) > (width or 80)], f"{name} in {width} columns"
            assert "…" not in text


@pytest.mark.parametrize("physical", ["", "gradsharding", "arn:aws:lambda:us-east-1:000000000000:function:gradsharding"])
def test_changes_of_a_stack_fit(physical: str) -> None:
    """What ``deploy`` and ``destroy`` list has a row for each resource, or two where the row would not fit 80 columns."""
    rows = [("Modify", "EventInvokeConfig", "AWS::Lambda::EventInvokeConfig", physical), ("Add", "Role", "AWS::IAM::Role", "")]
    lines = commands._columns(rows).splitlines()

    assert [] == [line for line in lines if len(line) > 80]
    assert [cell for row in rows for cell in row if cell] == " ".join(lines).split()
    assert (3 if physical.startswith("arn") else 2) == len(lines)


def test_tables_do_not_depend_on_the_terminal(runs: dict[int, str]) -> None:
    """Rows of tables are the same in every width: only paragraphs are wrapped."""
    for name in ("plan", "plan in detail", "plan of express", "prices"):
        parts = [outputs(run)[name].partition("\nTake")[0].partition("[1]  ")[0] for run in runs.values()]
        tables = [re.findall(r"^.*  .*\d.*$", part, re.MULTILINE) for part in parts]

        assert len(tables[0]) >= 5
        assert [tables[0]] * len(runs) == tables


def test_words_do_not_depend_on_the_terminal(runs: dict[int, str]) -> None:
    """Every width shows the same words, and marks the recommended row; colour is for terminals only."""
    for name in ("help", "plan", "plan in detail", "plan of express", "plan without prices", "aggregate again"):
        texts = [re.sub(r"\d+\.\d\d s|-{3,}", "", " ".join(outputs(run)[name].split())) for run in runs.values()]

        assert [texts[0]] * len(runs) == texts
    assert "\x1b" not in runs[0]
    assert "\x1b[1m* sharded " in runs[80]
