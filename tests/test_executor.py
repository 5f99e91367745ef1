"""Executors keep the contract; worker processes may die, and may not outgrow their memory."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsharding import LambdaFLTree, Round, Sharded
from gradsharding.errors import MissingObject, OutOfMemory, TaskFailed, UserError
from gradsharding.planning.plan import Limits
from gradsharding.planning.task import TaskReport
from gradsharding.planning.topologies import Topology
from gradsharding.running import processes, worker
from gradsharding.running.cgroup import MemoryCgroup, usable_cpus
from gradsharding.running.executors import Executor, FuturesExecutor, InlineExecutor, open_executor
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.testing import ExecutorContract, ProcessContract, SlowStore, Started, assert_same, peak, reference_mean, sample_updates

MIB = 1 << 20


class TestInline(ExecutorContract):
    """The contract in this process."""

    shares_memory = True

    @pytest.fixture
    def executor(self) -> Executor:
        """Give the executor."""
        return InlineExecutor()


class TestThreads(ExecutorContract):
    """The contract on threads."""

    shares_memory = True

    @pytest.fixture
    def executor(self) -> Any:
        """Give the executor."""
        with ThreadPoolExecutor(3) as pool:
            yield FuturesExecutor(pool)


@pytest.mark.slow
class TestProcesses(ProcessContract):
    """The contract on worker processes."""

    @pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)])
    def executor(self, request: pytest.FixtureRequest) -> Executor:
        """Give the executor, with one worker and with two."""
        return ProcessExecutor(request.param)


@pytest.mark.slow
class TestProcessPool(ProcessContract):
    """The contract on the standard library's pool of processes."""

    replaces = False

    @pytest.fixture
    def executor(self) -> Any:
        """Give the executor."""
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            yield FuturesExecutor(pool)


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    """Start dask in this process."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with distributed.Client(processes=False, dashboard_address="127.0.0.1:0", n_workers=1, threads_per_worker=2) as client:
        yield client


@pytest.mark.slow
class TestDask(ExecutorContract):
    """The contract on dask, as on a cluster but in this process: dask serializes what it is given all the same."""

    waits = False  # dask cancels the future of a task that runs, and does not say when the task has ended

    @pytest.fixture
    def executor(self, dask: Any) -> Executor:
        """Give the executor."""
        return FuturesExecutor(dask.get_executor())

    def test_memory_store(self, executor: Executor) -> None:
        """A store in memory is refused; dask puts an error of its own around our sentence."""
        with pytest.raises(TypeError, match="Could not serialize") as caught:
            Started.of(MemoryStore(), sample_updates()).run(executor)
        assert "use a file:// store" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("inline", InlineExecutor), ("processes", ProcessExecutor), ("processes:3", ProcessExecutor), ("threads:2", FuturesExecutor)],
)
def test_open(spec: str, kind: type) -> None:
    """An executor opens from a word, and a number of workers."""
    executor = open_executor(spec)

    assert kind is type(executor)
    assert not isinstance(executor, ProcessExecutor) or executor.count == (3 if ":" in spec else usable_cpus())


@pytest.mark.parametrize("spec", ["", "lambda:", "processes:", "inline:2"])
def test_open_what_is_not_known(spec: str) -> None:
    """Any other text raises UserError, which says what there is."""
    with pytest.raises(UserError, match="use inline, processes:N, threads:N or lambda:FUNCTION"):
        open_executor(spec)


def started(root: Path, *, shards: int, elements: int) -> Started:
    """Begin a round of three clients with one large tensor each."""
    updates = {client: ({"w": np.full(elements, i, "f4")}, 1) for i, client in enumerate("abc")}
    return Started.of(DirectoryStore(root), updates, shards=shards)


class Kill:
    """Kills the worker that has given the first report."""

    def __init__(self) -> None:
        """Start with nobody killed."""
        self.killed = ""

    def __call__(self, report: TaskReport) -> None:
        """Kill once."""
        if not self.killed:
            self.killed = report.worker
            os.kill(int(report.worker), signal.SIGKILL)


def test_killed_worker(tmp_path: Path) -> None:
    """A worker killed -9 is replaced, its task is tried again, and the result is whole."""
    ready, kill = started(tmp_path, shards=40, elements=10 * MIB), Kill()
    reports = ready.run(ProcessExecutor(1), kill)

    assert [task.id for task in ready.plan.tasks] == [report.task for report in reports]
    assert 2 == len({report.worker for report in reports})
    assert kill.killed == reports[0].worker != reports[-1].worker
    assert_same({"w": np.ones(10 * MIB, "f4")}, ready.complete())


@pytest.mark.slow
def test_worker_killed_too_often(tmp_path: Path) -> None:
    """A task whose attempts are used up raises TaskFailed, with its name and how its worker ended."""
    with pytest.raises(TaskFailed, match=r"^task sharded/\d+ failed 1 times; its worker ended with status -9") as caught:
        started(tmp_path, shards=40, elements=10 * MIB).run(ProcessExecutor(1, attempts=1), Kill())
    assert TaskFailed is type(caught.value)
    assert re.fullmatch(r"sharded/\d+", caught.value.details["task"])


@pytest.mark.parametrize("use_cgroup", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_out_of_memory(tmp_path: Path, use_cgroup: bool) -> None:
    """A worker that outgrows the allowed memory is stopped: OutOfMemory names the task and says the numbers."""
    if use_cgroup:
        if not (cgroup := MemoryCgroup.create(100 * MIB)):
            pytest.skip("this machine lets nobody make a memory cgroup here")
        cgroup.close()
    ready = started(tmp_path, shards=1, elements=16 * MIB)  # 128 MiB of sums

    with pytest.raises(OutOfMemory, match=r"^task sharded/0 outgrew the 100.0 MiB allowed, though 200.0 MiB were projected: .*; use more"):
        ProcessExecutor(1, use_cgroup=use_cgroup).run(
            ready.plan.tasks, ready.job, ready.round.store, Limits(memory=100 * MIB), lambda _: None
        )
    assert [1] == list(ready.round.store.parts(ready.job.output, ready.job.upload))  # the header


@pytest.mark.parametrize("use_cgroup", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_enough_memory(tmp_path: Path, use_cgroup: bool) -> None:
    """A worker is not stopped at what the plan projects."""
    ready = started(tmp_path, shards=1, elements=16 * MIB)
    limits = Limits(memory=ready.plan.memory)
    (report,) = ProcessExecutor(1, use_cgroup=use_cgroup).run(ready.plan.tasks, ready.job, ready.round.store, limits, lambda _: None)

    assert report.held_by == "RLIMIT_DATA" or (use_cgroup and report.held_by.startswith("cgroup v"))
    assert peak(report) <= ready.plan.memory


@pytest.mark.slow
@pytest.mark.parametrize("topology", [Sharded(shards=1), LambdaFLTree()], ids=["sharded", "lambda-fl"])
def test_enough_memory_on_a_tmpfs(topology: Topology) -> None:
    """A store whose files are memory takes none of what a worker is allowed, though the kernel charges it with what it writes there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-executor-") as root:
        updates = {client: ({"w": np.full(16 * MIB, i, "f4")}, 1) for i, client in enumerate("abc")}
        ready = Started.of(DirectoryStore(root), updates, make=topology)
        limits = Limits(memory=ready.plan.memory)
        reports = ProcessExecutor(1).run(ready.plan.tasks, ready.job, ready.round.store, limits, lambda _: None)

        assert max(peak(report) for report in reports) <= ready.plan.memory
        assert_same({"w": np.ones(16 * MIB, "f4")}, ready.complete())


def test_no_cgroup_stays(tmp_path: Path) -> None:
    """The cgroup of a worker is removed with it."""
    if not (cgroup := MemoryCgroup.create(100 * MIB)):
        pytest.skip("this machine lets nobody make a memory cgroup here")
    cgroup.close()
    ProcessExecutor(2).run(
        (ready := started(tmp_path, shards=2, elements=9)).plan.tasks, ready.job, ready.round.store, Limits(), lambda _: None
    )

    assert [] == list(cgroup.path.parent.glob(f"gradsharding-{os.getpid()}-*"))


def test_broken_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot even start raises TaskFailed with the last line that it wrote."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TaskFailed, match=r"task sharded/0 failed 3 times; its worker ended with status 1"):
        started(tmp_path, shards=1, elements=9).run(ProcessExecutor(1))

    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first >&2; echo no numpy here >&2; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(TaskFailed, match=r"status 3: no numpy here$"):
        started(tmp_path / "again", shards=1, elements=9).run(ProcessExecutor(1))


def test_failure_stops_the_rest() -> None:
    """After a failure no task is left running or begun: nothing is written once the call has ended."""
    updates: Any = {"a": ({"w": np.ones(64)}, 1)}
    with ThreadPoolExecutor(1) as pool:
        ready = Started.of(SlowStore(MemoryStore(), latency=0.002), updates, shards=64)

        def lose(_: TaskReport) -> None:
            ready.round.store.delete([ready.round.update_key("a")])

        with pytest.raises(MissingObject, match="client a: there is no object"):
            ready.run(FuturesExecutor(pool), lose)
        parts = ready.round.store.parts(ready.job.output, ready.job.upload)
        pool.submit(threading.Event().wait, 0.05).result()
        assert parts == ready.round.store.parts(ready.job.output, ready.job.upload)
    assert len(parts) < 64


def test_one_task_inline() -> None:
    """A task is a function of the store: run by hand, it tells what it did."""
    updates = sample_updates()
    ready = Started.of(MemoryStore(), updates, shards=1)
    report = worker.run(ready.plan.tasks[0], ready.job, ready.round.store)

    assert (3, 1, str(os.getpid())) == (report.gets, report.puts, report.worker)
    assert 0 < report.read_seconds + report.write_seconds < report.seconds
    assert_same(reference_mean(updates), ready.complete())


CALLER = """
import os, signal, sys
from gradsharding import DirectoryStore, Limits, Round, Sharded
from gradsharding.running import processes
from gradsharding.planning.task import Job
round_ = Round(DirectoryStore(sys.argv[1]), "r")
plan = Sharded().plan(round_.seal())
upload = round_.begin(plan).upload
job = Job(store=round_.store.url, output=round_.output, upload=upload, terms=plan.terms)
exchange = processes._Worker._exchange
def send(self, process):
    os.set_blocking(process.stdin.fileno(), True)
    os.write(process.stdin.fileno(), bytes(self._unsent))
    print(upload, process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
processes._Worker._exchange = send
processes.ProcessExecutor(1).run(plan.tasks, job, round_.store, Limits(), print)
"""


@pytest.mark.slow
def test_worker_of_a_caller_killed_at_once(tmp_path: Path) -> None:
    """A caller that is killed before its worker has begun to live takes it along: its task, asked for already, is not run."""
    round_ = Round.create(DirectoryStore(tmp_path), "r")
    round_.submit("a", {"w": np.ones(9, "f4")}, 1)
    ended = subprocess.run([sys.executable, "-c", CALLER, str(tmp_path)], capture_output=True, text=True, check=False)
    upload, pid = ended.stdout.split()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)

    assert -signal.SIGKILL == ended.returncode
    assert not Path(f"/proc/{pid}").exists()
    assert {} == round_.store.parts(round_.output, upload)


def test_idle_worker_is_killed(tmp_path: Path) -> None:
    """A worker that dies when it has nothing to do does not end a run whose tasks are done, also if it was never asked."""
    ready = Started.of(DirectoryStore(tmp_path), sample_updates(2), make=LambdaFLTree())  # a leaf, then the root: one at a time
    begun: list[int] = []
    start = processes._Worker._start

    def note(self: Any) -> Any:
        process = start(self)
        begun.append(process.pid)
        return process

    def kill(report: TaskReport) -> None:
        if report.task == ready.plan.tasks[-1].id:
            for pid in begun:
                os.kill(pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes._Worker, "_start", note)
        reports = ready.run(ProcessExecutor(2), kill)

    assert (2, 2) == (len(begun), len(reports))
    assert_same(reference_mean(sample_updates(2)), ready.complete())


@pytest.mark.slow
def test_stopped_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that somebody stops is not waited for without end: it is killed after some seconds, and its task is run again."""
    monkeypatch.setattr("gradsharding.running.processes.STOPPED", 2)
    ready, stopped = started(tmp_path, shards=6, elements=600), list[str]()

    def stop(report: TaskReport) -> None:
        if not stopped:
            stopped.append(report.worker)
            os.kill(int(report.worker), signal.SIGSTOP)

    reports = ready.run(ProcessExecutor(1), stop)

    assert [task.id for task in ready.plan.tasks] == [report.task for report in reports]
    assert [1] == [report.lost for report in reports if report.lost]
    assert 2 == len({report.worker for report in reports})
    stopped.clear()
    again = started(tmp_path / "again", shards=6, elements=600)
    with pytest.raises(TaskFailed, match="its worker was stopped for 2 s, and was killed"):
        again.run(ProcessExecutor(1, attempts=1), stop)
