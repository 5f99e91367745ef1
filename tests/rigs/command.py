"""The command line as tests run it, and the reference that its results are compared with."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsharding.cli.terminal import ENDING

COMMAND = str(Path(sys.executable).parent / "gradsharding")


WEIGHTS = {"ann": 120, "bob": 80, "cyd": 3}


def gradsharding(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command and wait for it."""
    return subprocess.run([COMMAND, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Undo what a command within this process has done to its signals."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in ENDING}
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def done(run: subprocess.CompletedProcess[str]) -> str:
    """Give what a run that ended well said, having said nothing else."""
    assert (0, "") == (run.returncode, run.stderr)
    return run.stdout


def flowing(text: str) -> str:
    """Give text as one line with single spaces, however it was wrapped."""
    return " ".join(text.split())


def everything(directory: Path) -> list[Path]:
    """All that lies below a directory, hidden files included."""
    return sorted(directory.rglob("*"))


def model(seed: int) -> dict[str, torch.Tensor]:
    """A small state dict with every kind of tensor that training leaves behind."""
    g = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=g),
        "head.weight": torch.randn(17, 5, generator=g, dtype=torch.float64),
        "half": torch.randn(31, generator=g).half(),
        "brain": torch.randn(37, generator=g).bfloat16(),
        "temperature": torch.randn((), generator=g),
        "none": torch.empty(0, 4),
        "num_batches_tracked": torch.tensor(1000 + 7 * seed),
    }


def reference(states: Sequence[dict[str, torch.Tensor]], weights: Sequence[int]) -> dict[str, torch.Tensor]:
    """The weighted mean by the book: float64, clients in order, one rounding; integers exactly, halves to even."""
    mean = {}
    for name, like in states[0].items():
        if not like.is_floating_point():
            exact = Fraction(sum(w * int(state[name]) for state, w in zip(states, weights, strict=True)), sum(weights))
            mean[name] = torch.tensor(round(exact), dtype=like.dtype)
            continue
        total = np.zeros(tuple(like.shape))
        for state, weight in zip(states, weights, strict=True):
            total += weight * state[name].double().numpy()
        mean[name] = once_rounded(total / sum(weights), like.dtype)
    return mean


def once_rounded(values: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """Round float64 once; bfloat16, which torch reaches by way of float32, by a look into the list of all its values."""
    if dtype != torch.bfloat16:
        return torch.from_numpy(np.asarray(values, {torch.float64: "f8", torch.float32: "f4", torch.float16: "f2"}[dtype]))
    known = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).double().numpy()
    below = np.searchsorted(known, np.abs(values), "right") - 1
    middle = (known[below] + known[below + 1]) / 2
    up = (np.abs(values) > middle) | ((np.abs(values) == middle) & (below % 2 == 1))
    return torch.from_numpy(np.copysign(known[below + up], values)).bfloat16()


def bits(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """A state dict as values that compare bit for bit."""
    return {n: (t.dtype, list(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for n, t in state.items()}


slow = partial(pytest.param, marks=pytest.mark.slow)

LARGE = ["a.safetensors:2", "b.safetensors"]


def start(large: Path, *output_and_options: str) -> "subprocess.Popen[str]":
    """Start a run in a process group of its own, as a shell does."""
    command = [COMMAND, "aggregate", *LARGE, "-o", *output_and_options]
    return subprocess.Popen(command, cwd=large, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_slices(run: "subprocess.Popen[Any]", directory: Path, count: int) -> None:
    """Wait until a run has written ``count`` slices; part 1 is the header."""
    for _ in range(60_000):
        assert run.poll() is None, "the run ended before it could be stopped"
        if len([part for part in directory.glob(".gradsharding/uploads/*/parts/*") if not part.suffix]) > count:
            return
        time.sleep(0.001)
    raise AssertionError("no parts were written")
