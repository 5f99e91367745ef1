"""A benchmark runs over any pool that it is told to, with the same bytes as ever."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pools import pool

BENCHMARK = str(Path(__file__).parents[1] / "benchmarks" / "topologies.py")


def benchmark(tmp_path: Path, *arguments: str, start: tuple[str, ...] = ()) -> Any:
    """Run a small comparison, in a process of its own."""
    output = tmp_path / "result.json"
    command = [*start, BENCHMARK, "--size", "400kB", "--clients", "5", "--repetitions", "1", "--output", str(output), *arguments]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert 0 == ended.returncode, ended.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["threads:2", "processes:2", "dask-local:2", "mpi"])
def test_pool(tmp_path: Path, spec: str) -> None:
    """Whatever the pool, all topologies give the bytes that our own processes give, and no more requests than planned.

    What a task's memory is beside its pool's, nobody knows: then there is no peak, and a reason.
    """
    start = ("mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures") if spec == "mpi" else (sys.executable,)
    expected = benchmark(tmp_path, start=(sys.executable,))
    found = benchmark(tmp_path, "--pool", spec, start=start)

    assert expected["digest"] == found["digest"]
    assert (2, spec) == (found["setup"]["at_once"], found["setup"]["pool"])
    for own, pooled in zip(expected["topologies"].values(), found["topologies"].values(), strict=True):
        assert 0 < own["peak_memory"] <= own["projected_memory"]
        assert (None, True) == (pooled["peak_memory"], "holds more than the task" in pooled["unmeasured"])
        assert (own["gets"], own["puts"]) == (pooled["gets"], pooled["puts"])
        if spec != "threads:2":  # there, tasks may share a process, and then nobody knows
            assert pooled["cpu_seconds"]["median"] > 0


@pytest.mark.parametrize("spec", ["", "mpl", "processes", "processes:0", "threads:x", "dask:", "dask-slurm:"])
def test_no_pool(spec: str) -> None:
    """A pool that is not known is refused with those that are."""
    with pytest.raises(ValueError, match=r"unknown pool .*; use processes:N, threads:N, mpi"), pool(spec):
        pass
