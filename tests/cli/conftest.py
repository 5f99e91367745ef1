"""What the tests of the command line share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from gradsharding.cli.main import main
from rigs.command import WEIGHTS, model, signals_kept


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The command within this process, for what does not need another one; gives what it said, having ended well."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> str:
        status = main(args)
        said, complaint = capsys.readouterr()
        assert (0, "") == (status, complaint)
        return str(said)

    with signals_kept():
        yield call


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The same for a mistake: gives the line that it ends with."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args: str, status: int = 2) -> str:
        ended = main(args)
        said, complaint = capsys.readouterr()
        assert (status, "", 1) == (ended, said, complaint.count("\n"))
        return str(complaint)

    with signals_kept():
        yield refuse


@pytest.fixture
def updates(tmp_path: Path) -> list[str]:
    """Three clients' files in the working directory, as arguments."""
    for seed, client in enumerate(WEIGHTS):
        safetensors.torch.save_file(model(seed), tmp_path / f"{client}.safetensors")
    return [f"{client}.safetensors:{weight}" for client, weight in WEIGHTS.items()]


@pytest.fixture
def narrow(updates: list[str], tmp_path: Path) -> list[str]:
    """The same files, without float64."""
    for seed, client in enumerate(WEIGHTS):
        state = {name: tensor for name, tensor in model(seed).items() if tensor.dtype != torch.float64}
        safetensors.torch.save_file(state, tmp_path / f"{client}.safetensors")
    return updates


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two updates of 8 MiB: enough for a run of 1,000 slices to be caught in the middle."""
    directory = tmp_path_factory.mktemp("large")
    for seed, client in enumerate("ab"):
        values = np.random.default_rng(seed).standard_normal(2 << 20, dtype=np.float32)
        safetensors.numpy.save_file({"w": values}, directory / f"{client}.safetensors")
    return directory
