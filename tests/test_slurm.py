"""The scripts of ``deploy/slurm`` run a benchmark to its end under a real Slurm, and tell it how they ended."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rigs.slurm import finish, slurm, slurm_missing

ROOT = Path(__file__).parents[1]
BENCHMARK = [str(ROOT / "benchmarks" / "topologies.py"), "--size", "2MB", "--clients", "5", "--repetitions", "1"]

pytestmark = [pytest.mark.slow, pytest.mark.rig]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    """Give the environment that leads to a Slurm of one node."""
    if why := slurm_missing():
        pytest.skip(why)
    with slurm() as environment:
        here = str(Path(sys.executable).parent)
        yield {
            **environment,
            "PATH": f"{here}:{environment['PATH']}",
            "GRADSHARDING_PYTHON": sys.executable,
            "GRADSHARDING_INTERFACE": "lo",
            "GRADSHARDING_SCHEDULER_HOST": "127.0.0.1",
            "DASK_JOBQUEUE__SLURM__INTERFACE": "lo",
        }


def submit(script: str, arguments: list[str], cluster: Mapping[str, str], log: Path, *options: str) -> str:
    """Submit a job; give its number."""
    command = ["sbatch", "--parsable", f"--output={log}", *options, str(ROOT / "deploy" / "slurm" / script), *arguments]
    return subprocess.run(command, env=cluster, cwd=log.parent, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("script", ["mpi.sbatch", "dask.sbatch"])
def test_job(cluster: Mapping[str, str], tmp_path: Path, script: str) -> None:
    """A job completes; its result says that the tasks ran in the pool's processes, and that all topologies gave the same bytes."""
    log, output = tmp_path / "log", tmp_path / "result.json"
    job = submit(script, [*BENCHMARK, "--output", str(output), "--dir", str(tmp_path)], cluster, log, "--ntasks", "3")

    assert "COMPLETED 0:0" == finish(job, cluster), log.read_text()
    found = json.loads(output.read_text())
    assert 64 == len(found["digest"])
    assert 6 == len(found["topologies"])
    assert (2_000_000, 5) == (found["setup"]["bytes"], found["setup"]["clients"])
    assert (3 if script == "dask.sbatch" else 2) == found["setup"]["at_once"]
    assert max(one["workers"] for one in found["topologies"].values()) >= 2
    assert ["log", "result.json"] == sorted(path.name for path in tmp_path.iterdir())  # it has cleaned up


@pytest.mark.parametrize("script", ["mpi.sbatch", "dask.sbatch"])
def test_failing_job(cluster: Mapping[str, str], tmp_path: Path, script: str) -> None:
    """A script that fails makes its job fail."""
    log = tmp_path / "log"
    job = submit(script, [*BENCHMARK, "--dir", str(tmp_path / "nowhere")], cluster, log, "--ntasks", "2")

    assert finish(job, cluster).startswith("FAILED"), log.read_text()
    assert "nowhere" in log.read_text()


def test_workers_as_jobs(cluster: Mapping[str, str], tmp_path: Path) -> None:
    """With dask-jobqueue, workers are Slurm jobs of their own, which are gone in the end."""
    output = tmp_path / "result.json"
    command = [sys.executable, *BENCHMARK, "--output", str(output), "--dir", str(tmp_path), "--pool", "dask-slurm:2"]
    ended = subprocess.run(command, env=cluster, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)

    assert 0 == ended.returncode, ended.stderr
    assert 2 == json.loads(output.read_text())["setup"]["at_once"]
    left = subprocess.run(["squeue", "--noheader", "--states=PENDING,RUNNING"], env=cluster, capture_output=True, text=True, check=True)
    assert "" == left.stdout.strip()
