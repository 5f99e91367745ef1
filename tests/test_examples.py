"""The store and the executor that the guides show keep the contracts, and work from the command line."""

import os
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from command_executor import CommandExecutor
from gradsharding.running.executors import Executor
from gradsharding.stores.protocol import ObjectStore
from gradsharding.testing import ExecutorContract, StoreContract, assert_same, reference_mean
from sqlite_store import SQLiteStore

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Declare the examples' entry points, as pip would from their pyproject.toml; give the directory that holds them."""
    info = tmp_path / "site" / "gradsharding_examples-1.0.dist-info"
    info.mkdir(parents=True)
    groups = tomllib.loads((EXAMPLES / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        line for group, entries in groups.items() for line in (f"[{group}]", *(f"{name} = {place}" for name, place in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradsharding-examples\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(info.parent)
    return info.parent


def test_command_line(installed: Path, tmp_path: Path) -> None:
    """An installed package's store and executor are named on the command line; worker processes open the store themselves."""
    updates = {"ann": ({"w": np.arange(12, dtype="f4")}, 1), "bob": ({"w": np.arange(12, dtype="f4") * 4}, 3)}
    for name, (arrays, _) in updates.items():
        safetensors.numpy.save_file(arrays, tmp_path / f"{name}.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(EXAMPLES), *sys.path])}
    inputs = [f"{tmp_path}/ann.safetensors:1", f"{tmp_path}/bob.safetensors:3", "-o", f"{tmp_path}/mean.safetensors"]
    command = [sys.executable, "-m", "gradsharding", "aggregate", *inputs, "--store", f"sqlite://{tmp_path}/rounds.db"]
    for executor in ("command", "processes:2"):
        ended = subprocess.run([*command, "--executor", executor], capture_output=True, text=True, check=False, env=environment)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert_same(reference_mean(updates), safetensors.numpy.load_file(tmp_path / "mean.safetensors"))


class TestSQLiteStore(StoreContract):
    """The store of the guide to writing a store."""

    @pytest.fixture
    def store(self, tmp_path: Path, installed: Path) -> ObjectStore:  # noqa: ARG002 - so that its URL can be opened
        """Give an empty store."""
        return SQLiteStore(f"sqlite://{tmp_path}/objects.db")

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read an object by SQL."""
        with sqlite3.connect(store._path) as db:
            return bytes(db.execute("SELECT data FROM objects WHERE key = ?", (key,)).fetchone()[0])

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write an object by SQL."""
        with sqlite3.connect(store._path) as db:
            db.execute("INSERT OR REPLACE INTO objects VALUES (?, hex(randomblob(8)), ?)", (key, data))

    @pytest.mark.slow
    def test_parts_while_completed(self, store: ObjectStore) -> None:
        """Writers that race for SQLite's one lock wait for seconds."""
        super().test_parts_while_completed(store)


@pytest.mark.slow
class TestCommandExecutor(ExecutorContract):
    """The executor of the guide to writing an executor; `test_command_line` runs it, too, and is not slow."""

    @pytest.fixture
    def executor(self) -> Executor:
        """Give an executor that runs this Python."""
        return CommandExecutor()
