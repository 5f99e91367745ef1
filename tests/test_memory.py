"""The memory that a plan projects is the truth: measured in fresh processes, by the kernel's own high-water mark.

What is measured counts shared pages too, so it is more than a function is charged for; the projection still covers it.
"""

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule
from gradsharding.arithmetic.sums import is_wide
from gradsharding.arithmetic.weights import MAX_WEIGHT
from gradsharding.aws.s3.store import S3Store
from gradsharding.format.dtypes import FORMATS, ITEM_SIZE, NUMPY, Run
from gradsharding.format.layout import Layout
from gradsharding.planning.plan import Limits
from gradsharding.planning.platform import RESIDENT
from gradsharding.planning.task import RESERVED, Job, Part, Task, Term
from gradsharding.planning.topologies import Flat, LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, FuturesExecutor, InlineExecutor
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.reading import STREAM
from gradsharding.stores.urls import file_reference
from gradsharding.testing import Started, peak, read
from pools import pool

MIB = 1 << 20

slow = partial(pytest.param, marks=pytest.mark.slow)


def test_idle_worker() -> None:
    """A worker that waits for its first task has taken less than what is reserved for it."""
    script = "from gradsharding.running.worker import peak_memory; print(peak_memory())"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    peak = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment).stdout)

    assert RESERVED // 2 < peak <= RESERVED


def test_client_of_s3(ceph_store: S3Store) -> None:
    """boto3 with a client that threads ask for at once takes less than what is counted for it, and is made once."""
    script = (
        "import sys; from concurrent.futures import ThreadPoolExecutor;"
        "from gradsharding.running.worker import peak_memory; idle = peak_memory();"
        "from gradsharding.stores.urls import open_store; store = open_store(sys.argv[1]); pool = ThreadPoolExecutor(8);"
        "clients = {id(client) for client in pool.map(lambda _: store.client, range(8))}; [*store.list('')];"
        "print(len(clients), peak_memory() - idle)"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", script, ceph_store.url], check=True, capture_output=True, env=environment).stdout
    clients, taken = map(int, told.split())

    assert 1 == clients
    assert RESIDENT // 2 < taken <= RESIDENT


@pytest.mark.parametrize(("dtype", "elements"), [("F32", 16 * MIB), ("BF16", 2 * MIB)])
def test_projected_covers_measured_on_s3(ceph_store: S3Store, dtype: str, elements: int) -> None:
    """Reading ahead from S3 keeps within the projection, which counts its buffers and its client, for 3 and for 9 clients."""
    data = np.random.default_rng(0).integers(0, 64, elements).astype(NUMPY[dtype]).tobytes()
    ceph_store.put("update", [Layout.of({"w": (dtype, (elements,))}).header(), data])
    peaks, projected = list[int](), set()
    for clients in (3, 9):
        round_ = Round.create(ceph_store, f"r{clients}")
        for i in range(clients):
            round_.refer(f"c{i}", "update", 1)
        result = aggregate(round_, topology=Flat(), executor=ProcessExecutor(1))
        peaks.append(peak(result))
        projected.add(result.plan.memory)
        assert data == read(ceph_store, round_.output)[-len(data) :]

    (bound,) = projected
    assert max(peaks) <= bound
    assert bound - 64 * MIB < min(peaks)
    assert max(peaks) <= 1.1 * min(peaks)


@pytest.mark.parametrize(
    ("dtype", "elements"),
    [
        ("F32", MIB),
        *(slow("F32", 8 * MIB), slow("F64", 4 * MIB), slow("BF16", 8 * MIB)),
        *(slow("I64", MIB // 4), slow("U16", 4 * MIB), slow("BOOL", 8 * MIB)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value / MIB:g}Mi",
)
def test_projected_covers_measured(tmp_path: Path, dtype: str, elements: int) -> None:
    """Measured peaks keep within the projection, and are the same for 4 and for 32 clients."""
    path = tmp_path / "update.safetensors"
    most = {"BOOL": 1, "I64": (1 << 63) - 1}.get(dtype, 64)
    data = np.random.default_rng(0).integers(0, most, elements, endpoint=True).astype(NUMPY[dtype]).tobytes()
    path.write_bytes(Layout.of({"w": (dtype, (elements,))}).header() + data)
    peaks, projected = {}, set()
    for clients in (4, 32):
        round_ = Round.create(DirectoryStore(tmp_path), f"r{clients}")
        for i in range(clients):
            round_.refer(f"c{i}", file_reference(path), MAX_WEIGHT // clients if is_wide(dtype, clients) else 1)
        result = aggregate(round_, topology=Flat(), executor=ProcessExecutor(1))
        peaks[clients] = peak(result)
        projected.add(result.plan.memory)
        assert data == read(round_.store, round_.output)[-len(data) :]

    (bound,) = projected
    assert max(peaks.values()) <= bound
    assert bound - 32 * MIB < min(peaks.values())
    assert max(peaks.values()) <= 1.05 * min(peaks.values())


def finite(dtype: str, elements: int) -> bytes:
    """Draw elements of all magnitudes, none of them a zero: the mean of a value with itself is that value."""
    form = FORMATS[dtype]
    draw, width = np.random.default_rng(0), 8 * np.dtype(form.bits).itemsize
    magnitudes = draw.integers(1, (2 * form.greatest - 1) << form.mantissa, elements)
    return (magnitudes | draw.integers(0, 2, elements) << (width - 1)).astype(form.bits).tobytes()


@pytest.mark.parametrize("make", [Flat(), slow(LambdaFLTree())], ids=["flat", "lambda-fl"])
@pytest.mark.parametrize(("dtype", "elements"), [slow("F32", 4 * MIB), slow("F16", 4 * MIB), ("BF16", 2 * MIB)])
def test_projected_covers_exact_sums(tmp_path: Path, dtype: str, elements: int, make: Topology) -> None:
    """Exact sums of values of all magnitudes keep within the projection, and so do functions that pass them on; the largest is near it."""
    path = tmp_path / "update.safetensors"
    data = finite(dtype, elements)
    path.write_bytes(Layout.of({"w": (dtype, (elements,))}).header() + data)
    near = list[int]()
    for clients in (3, 9):
        round_ = Round.create(DirectoryStore(tmp_path), f"r{clients}")
        for i in range(clients):
            round_.refer(f"c{i}", file_reference(path), 1_000 + i)
        result = aggregate(round_, topology=make, rule=ExactMean(), executor=ProcessExecutor(1), limits=Limits(memory=1 << 30))
        assert data == read(round_.store, round_.output)[-len(data) :]
        for task, report in zip(result.plan.tasks, result.reports, strict=True):
            assert peak(report) <= task.memory
        near.append(result.plan.memory - peak(result))

    assert max(near) < 32 * MIB + elements  # a byte an element is for what is not finite


@pytest.mark.slow
def test_projected_covers_exact_sums_with_nan(tmp_path: Path) -> None:
    """Where a value is not finite, and everything is undecided between two neighbours, the projection holds as well."""
    elements = 4 * MIB
    halves = [np.where(np.arange(elements) % 2 == 0, 0x3F800000, 0x3F800001 + i).astype("<u4").view("<f4") for i in (0, 2)]
    halves[0][7] = np.nan
    round_ = Round.create(DirectoryStore(tmp_path), "r")
    for client, values in zip("ab", halves, strict=True):
        round_.submit(client, {"w": values}, 1)
    limits = Limits(memory=1 << 30)
    result = aggregate(round_, topology=LambdaFLTree(), rule=ExactMean(), executor=ProcessExecutor(1), nonfinite="propagate", limits=limits)

    assert np.isnan(result.arrays()["w"][7])
    for task, report in zip(result.plan.tasks, result.reports, strict=True):
        assert peak(report) <= task.memory


@pytest.mark.slow
@pytest.mark.parametrize("rule", [MEAN, ExactMean()], ids=str)
@pytest.mark.parametrize(("clients", "tensors"), [(20_000, 1), (2, 60_000)], ids=["many clients", "many runs"])
def test_projected_covers_long_lists(tmp_path: Path, clients: int, tensors: int, rule: Rule) -> None:
    """A small model with very many clients, or with very many changes of dtype, keeps within its projection too."""
    dtypes = ("F32", "F16")
    sizes = [ITEM_SIZE[dtypes[i % 2]] for i in range(tensors)]
    path = tmp_path / "update"
    path.write_bytes(bytes(sum(sizes)))
    runs = tuple(Run(dtypes[i % 2], 1) for i in range(tensors))
    source, version = file_reference(path), DirectoryStore(tmp_path).head("update").version
    terms = tuple(Term(client=f"client-{i:06d}", source=source, version=version, base=0, weight=1) for i in range(clients))
    task = Task(
        id="t",
        start=0,
        stop=sum(sizes),
        runs=runs,
        first=0,
        last=clients,
        clients=clients,
        weight=clients,
        part=Part(1, 0),
        reading=STREAM,
        rule=rule,
    )
    store = DirectoryStore(tmp_path / "store")
    job = Job(store=store.url, output="result", upload=store.begin("result"), terms=terms)
    [report] = ProcessExecutor(1).run([task], job, store, Limits(memory=task.memory), lambda _: None)

    assert clients == report.gets
    assert peak(report) <= task.memory


def random_round(draw: random.Random, store: DirectoryStore, name: str) -> Started:
    """Draw a round of any topology, of updates from a few kB to 12 MB."""
    elements, shards = draw.choice([1_000, 300_000, 1_000_000, 3_000_000]), draw.randint(2, 5)
    makes: list[Any] = [Flat(), Sharded(shards=shards), LambdaFLTree(), LIFLTree(), ShardedTree(shards=shards)]
    numbers = np.random.default_rng(draw.randrange(1 << 30))
    updates = {
        f"c{i}": ({"w": numbers.normal(size=elements).astype("f4"), "h": numbers.normal(size=elements // 7).astype("f2")}, i + 1)
        for i in range(draw.randint(2, 5))
    }
    rule: Rule = draw.choice([MEAN, ExactMean()])
    return Started.of(store, updates, name=name, make=draw.choice(makes), rule=rule)


@pytest.mark.slow
def test_a_peak_is_the_tasks_own(tmp_path: Path) -> None:
    """A task's peak is that of the same task in a fresh process, within a tenth, whatever its process did before; or there is none.

    50 random rounds: in worker processes; inline, in threads, in a pool of processes and in Dask's. (MPI's is in test_pools.)
    """
    draw, others = random.Random(5), dict[str, Executor]({"inline": InlineExecutor()})
    with ThreadPoolExecutor(3) as threads, pool("processes:2") as processes, pool("dask-local:2") as dask:
        others |= {"threads": FuturesExecutor(threads), "processes": FuturesExecutor(processes), "dask": FuturesExecutor(dask)}
        for i in range(50):
            started = random_round(draw, DirectoryStore(tmp_path / str(i)), "r")
            run = partial(ProcessExecutor(1).run, job=started.job, store=started.round.store, limits=Limits(memory=1 << 32), progress=print)
            warm = run(started.plan.tasks)
            chosen = draw.randrange(len(warm))
            (fresh,) = run([started.plan.tasks[chosen]])
            assert peak(fresh) == pytest.approx(peak(warm[chosen]), rel=0.1), started.plan.tasks[chosen].id
            assert all(peak(report) <= task.memory for report, task in zip(warm, started.plan.tasks, strict=True))
            name = draw.choice([*others])
            for report in started.run(others[name]):
                assert (None, True) == (report.peak_memory, bool(report.unmeasured)), name
            shutil.rmtree(tmp_path / str(i))


@pytest.mark.slow
def test_eight_gigabytes(tmp_path: Path) -> None:
    """A result of 8 GB is made by two functions of 512 MiB at most, whose peaks keep within what was projected."""
    elements = 2 * 10**9
    layout = Layout.of({"w": ("F32", (elements,))})
    spots = {0: (1.0, 5.0, 4.0), 1: (2.0, 2.0, 2.0), 999_999_999: (-8.0, 0.0, -2.0), elements - 1: (0.5, 0.25, 0.3125)}
    round_ = Round.create(DirectoryStore(tmp_path / "store"), "r")
    for client, weight in enumerate((1, 3)):
        path = tmp_path / f"client{client}.safetensors"
        with path.open("wb") as file:  # sparse: its zeros take no place on the disk
            file.write(layout.header())
            file.truncate(len(layout.header()) + layout.nbytes)
            for index, values in spots.items():
                file.seek(len(layout.header()) + 4 * index)
                file.write(np.float32(values[client]).tobytes())
        round_.refer(f"client{client}", file_reference(path), weight)

    result = aggregate(round_, topology=Sharded(shards=36), limits=Limits(memory=512 * MIB), executor=ProcessExecutor(2))
    size, base = round_.store.head(round_.output).size, len(layout.header())
    most, seconds = peak(result), sum(report.seconds for report in result.reports)
    found = {i: np.frombuffer(read(round_.store, round_.output, base + 4 * i, base + 4 * i + 4), "f4")[0] for i in spots}
    print(f"{len(result.reports)} slices, {seconds:.0f} task seconds, peak {most >> 20} of {result.plan.memory >> 20} MiB")  # noqa: T201 - pytest -s
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()

    assert base + 8 * 10**9 == size
    assert most <= result.plan.memory <= 512 * MIB
    assert {index: values[2] for index, values in spots.items()} == found
