"""The contract of an Executor, as tests to inherit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pytest

from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule
from gradsharding.errors import ChangedObject, GradShardingError, MissingObject, NonFinite, TaskFailed, UserError
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import Job, Task, TaskReport
from gradsharding.planning.topologies import Flat, LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology
from gradsharding.rounds.result import Result
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, InlineExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.updates import load
from gradsharding.testing.reference import Array, Updates, assert_same, reference_mean, sample_updates
from gradsharding.testing.stores import read


def peak(seen: TaskReport | Result) -> int:
    """Return the peak memory of a task, or of the largest task of a result, in bytes; it must have been measured."""
    assert seen.peak_memory is not None, seen.unmeasured
    return seen.peak_memory


def puts(task: Task, store: ObjectStore) -> int:
    """Return the number of PUT-class requests that a task should make."""
    charges = store.charges
    return (charges.put_parts([(task.part.offset, task.nbytes)]) if task.part else charges.put(task.bytes_written)).puts


class ExecutorContract:
    """What every Executor promises. Supply the fixture ``executor``; override ``store`` if the workers cannot open a directory."""

    shares_memory: ClassVar = False
    """Whether its tasks can use a MemoryStore of this process."""

    waits: ClassVar = True
    """Whether a failed run waits for the tasks under way. False for pools that cancel the futures of tasks that still run."""

    @pytest.fixture
    def executor(self) -> Executor:
        """Return an executor."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        """Return an empty store that the executor's workers can open."""
        return DirectoryStore(tmp_path)

    def left_by(self, started: "Started") -> set[str]:
        """Return the ids of the tasks whose output a failed run has left; assert that no more are added."""
        left = started.written()
        time.sleep(0.05)
        assert left == started.written() or not self.waits
        return left

    def test_reports(self, executor: Executor, store: ObjectStore) -> None:
        """Reports are returned in the order of the tasks, progress gets each once, and the parts make the mean."""
        updates, progress = sample_updates(), list[TaskReport]()
        started = Started.of(store, updates)
        reports = started.run(executor, progress.append)

        assert [task.id for task in started.plan.tasks] == [report.task for report in reports]
        assert sorted(reports, key=lambda r: r.task) == sorted(progress, key=lambda r: r.task)
        assert [(t.gets, puts(t, store), 3 * t.nbytes, t.nbytes) for t in started.plan.tasks] == [
            (r.gets, r.puts, r.bytes_read, r.bytes_written) for r in reports
        ]
        assert [{store.charges.kind}] * len(reports) == [{*report.usage} for report in reports]
        assert all((report.peak_memory is None) == bool(report.unmeasured) for report in reports)
        assert_same(reference_mean(updates), started.complete())

    def test_no_tasks(self, executor: Executor, store: ObjectStore) -> None:
        """A run of no tasks returns no reports."""
        started = Started.of(store, sample_updates())

        assert [] == executor.run([], started.job, store, Limits(), lambda _: None)

    def test_twice(self, executor: Executor, store: ObjectStore) -> None:
        """Tasks that run again write the same bytes again."""
        updates = sample_updates()
        started = Started.of(store, updates)
        started.run(executor)
        parts = store.parts(started.job.output, started.job.upload)
        started.run(executor)

        assert parts == store.parts(started.job.output, started.job.upload)
        assert_same(reference_mean(updates), started.complete())

    @pytest.mark.parametrize("make", [LambdaFLTree(), LIFLTree(), ShardedTree(shards=3)], ids=["lambda-fl", "lifl", "sharded-tree"])
    def test_tree(self, executor: Executor, store: ObjectStore, make: Topology) -> None:
        """A task that reads partial sums runs after they are written; reports are still in the order of the tasks."""
        updates = sample_updates(5)
        started = Started.of(store, updates, make=make)
        reports = started.run(executor)

        assert [task.id for task in started.plan.tasks] == [report.task for report in reports]
        assert [(t.gets, puts(t, store), t.bytes_read, t.bytes_written) for t in started.plan.tasks] == [
            (r.gets, r.puts, r.bytes_read, r.bytes_written) for r in reports
        ]
        expected, found = reference_mean(updates), started.complete()
        last_bits = {"float64"}  # summed in another order
        assert_same(*({name: a for name, a in arrays.items() if name not in last_bits} for arrays in (expected, found)))
        np.testing.assert_allclose(found["float64"], expected["float64"], rtol=1e-14)

    @pytest.mark.parametrize("make", [Sharded(), LambdaFLTree(), ShardedTree()], ids=["sharded", "lambda-fl", "sharded-tree"])
    def test_exact(self, executor: Executor, store: ObjectStore, make: Topology) -> None:
        """Exact sums, in any topology, make the bits that one function makes in this process."""
        updates = _without_float64(sample_updates(5))
        started = Started.of(store, updates, make=make, rule=ExactMean())
        alone = Started.of(MemoryStore(), updates, make=Flat(), rule=ExactMean())
        reports = started.run(executor)
        alone.run(InlineExecutor())

        assert_same(alone.complete(), started.complete())
        for task, report in zip(started.plan.tasks, reports, strict=True):
            assert (0, 0) < (report.gets, report.bytes_read) <= (task.gets, task.bytes_read)
            assert 0 < report.bytes_written <= task.bytes_written

    def test_nonfinite(self, executor: Executor, store: ObjectStore) -> None:
        """A task that finds NaN makes the run raise NonFinite, with the client and the byte."""
        bad = {"a": [1, 2, 3], "b": [1, np.nan, 3]}
        started = Started.of(store, {client: ({"w": np.array(values, "f4")}, 1) for client, values in bad.items()}, shards=3)

        with pytest.raises(NonFinite, match=r"sharded/1: clients b hold NaN") as caught:
            started.run(executor)
        assert {"found": [["b", 4]], "overflowing": [], "tasks": ["sharded/1"]} == caught.value.details

    def test_all_nonfinite(self, executor: Executor, store: ObjectStore) -> None:
        """NaN does not stop the other tasks: they end, and one NonFinite names all clients that sent NaN, in whichever slice."""
        updates: Updates = {f"c{i}": ({"w": np.array([np.nan if i == j else j for j in range(8)], "f4")}, 1) for i in range(6)}
        started, progress = Started.of(store, updates, shards=8), list[TaskReport]()

        with pytest.raises(NonFinite, match="task sharded/0 and 5 more: clients c0, c1, c2, c3, c4, c5 hold NaN or infinity") as caught:
            started.run(executor, progress.append)
        assert [[f"c{i}", 4 * i] for i in range(6)] == caught.value.details["found"]
        assert ["sharded/6", "sharded/7"] == sorted(report.task for report in progress)
        assert [1, 8, 9] == sorted(store.parts(started.job.output, started.job.upload))

    def test_overflow(self, executor: Executor, store: ObjectStore) -> None:
        """Finite values with an infinite sum are distinguished from NaN, and the clients with the large values are named."""
        updates: Updates = {c: ({"w": np.array([1.0, large])}, 100) for c, large in (("a", 2.0), ("b", 1.7e308), ("c", 3.0))}
        started = Started.of(store, updates, shards=2)

        with pytest.raises(NonFinite, match="sharded/1: finite values overflow when summed, those of clients b; scale them down") as caught:
            started.run(executor)
        assert {"found": [["b", 8]], "overflowing": ["b"], "tasks": ["sharded/1"]} == caught.value.details

    def test_task_fails(self, executor: Executor, store: ObjectStore) -> None:
        """A task that fails ends the run: its error is raised, nothing is written later, and a second run makes the mean."""
        updates = _without_float64(sample_updates(5))  # which a tree may round in another last bit
        started, reports = Started.of(store, updates, make=ShardedTree(shards=3)), list[TaskReport]()

        def lose(report: TaskReport) -> None:
            if not reports:  # a leaf, whose sums the last task of its slice will not find
                store.delete([started.job.partial(report.task)])
            reports.append(report)

        with pytest.raises(MissingObject):
            started.run(executor, lose)
        left = self.left_by(started)
        assert {report.task for report in reports} - {reports[0].task} <= left < {task.id for task in started.plan.tasks}

        started.run(executor)
        assert_same(reference_mean(updates), started.complete())

    def test_progress_fails(self, executor: Executor, store: ObjectStore) -> None:
        """An error in ``progress`` ends the run and reaches the caller; nothing is written later, and a second run makes the mean."""
        updates = sample_updates()
        started = Started.of(store, updates)

        def fail(report: TaskReport) -> None:
            raise LookupError(report.task)

        with pytest.raises(LookupError, match=r"^sharded/\d$"):
            started.run(executor, fail)
        self.left_by(started)

        started.run(executor)
        assert_same(reference_mean(updates), started.complete())

    @pytest.mark.parametrize(("replace", "kind"), [(False, MissingObject), (True, ChangedObject)])
    def test_input_gone(self, executor: Executor, store: ObjectStore, replace: bool, kind: type[GradShardingError]) -> None:  # noqa: FBT001
        """A missing input makes the run raise MissingObject, a replaced one ChangedObject; the error names the client."""
        started = Started.of(store, sample_updates())
        key = started.round.update_key("client-1")
        data = read(store, key)
        store.delete([key])
        if replace:
            store.put(key, [data[:-1], bytes([data[-1] ^ 1])])

        with pytest.raises(kind, match=r"client client-1: .*client-1\.safetensors") as caught:
            started.run(executor)
        assert "client-1" == caught.value.details["client"]

    def test_memory_store(self, executor: Executor) -> None:
        """A MemoryStore is used by an executor that can share it, and refused by one that cannot, with the remedy."""
        updates = sample_updates()
        started = Started.of(MemoryStore(), updates)

        if self.shares_memory:
            started.run(executor)
            assert_same(reference_mean(updates), started.complete())
        else:
            with pytest.raises(UserError, match=r"use (a file|an s3):// store"):
                started.run(executor)


class ProcessContract(ExecutorContract):
    """What an Executor promises, too, if its tasks run in other processes of this machine."""

    replaces: ClassVar = True
    """Whether a process that dies is replaced; if not, the run ends with TaskFailed."""

    def test_idle_worker_dies(self, executor: Executor, store: ObjectStore) -> None:
        """If a process dies after its task, it is replaced or the run raises TaskFailed; the next run makes the mean."""
        updates = _without_float64(sample_updates(5))
        started, killed = Started.of(store, updates, make=LambdaFLTree()), set[str]()

        def kill(report: TaskReport) -> None:
            if not killed:  # it has summed a leaf, whose sums other tasks wait for
                os.kill(int(report.worker), signal.SIGKILL)
                killed.add(report.worker)

        if self.replaces:
            reports = started.run(executor, kill)
            assert killed < {report.worker for report in reports}
            assert reports[-1].worker not in killed
        else:
            with pytest.raises(TaskFailed, match="run the round again with a new pool"):
                started.run(executor, kill)
            started.run(InlineExecutor())
        assert_same(reference_mean(updates), started.complete())


def _without_float64(updates: Updates) -> Updates:
    return {client: ({name: a for name, a in arrays.items() if name != "float64"}, weight) for client, (arrays, weight) in updates.items()}


class Started(NamedTuple):
    """A sealed round with a plan and an upload: what an executor needs."""

    round: Round
    plan: Plan
    job: Job

    @classmethod
    def of(
        cls,
        store: ObjectStore,
        updates: Updates,
        *,
        shards: int = 5,
        name: str = "r",
        make: Topology | None = None,
        rule: Rule = MEAN,
    ) -> Self:
        """Submit updates, seal the round, plan it and begin its upload."""
        round_ = Round.create(store, name)
        for client, (arrays, weight) in updates.items():
            round_.submit(client, arrays, weight)
        manifest = round_.seal()
        plan = (make or Sharded(shards=shards)).plan(manifest, grain=store.grain, reading=store.reading, rule=rule)
        upload = round_.begin(plan)[0]
        job = Job(store=store.url, output=round_.output, upload=upload, terms=plan.terms, partials=round_.partials(upload))
        store.put_part(job.output, job.upload, 1, 0, manifest.layout.header())
        return cls(round_, plan, job)

    def run(self, executor: Executor, progress: Callable[[TaskReport], None] = lambda _: None) -> list[TaskReport]:
        """Run all tasks."""
        return executor.run(self.plan.tasks, self.job, self.round.store, Limits(), progress)

    def written(self) -> set[str]:
        """Return the ids of the tasks whose output is in the store."""
        parts = self.round.store.parts(self.job.output, self.job.upload)
        partials = {key for key, _ in self.round.store.list(f"{self.job.partials}/")}
        return {task.id for task in self.plan.tasks if (task.part and task.part.number in parts) or self.job.partial(task.id) in partials}

    def complete(self) -> dict[str, Array]:
        """Publish the result; return its arrays."""
        self.round.store.complete(self.job.output, self.job.upload, self.plan.parts)
        return load(self.job.output, self.round.store)
