"""The pools that run a benchmark's tasks, each named by one word; any ``concurrent.futures`` pool will do."""

import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor as Pool
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import import_module
from typing import Any

KINDS = "processes:N, threads:N, mpi, dask:ADDRESS, dask-local:N or dask-slurm:N"


@contextlib.contextmanager
def pool(spec: str) -> Iterator[Pool]:
    """Open the pool that ``spec`` names, and close it at the end; raise ValueError for an unknown name.

    ``mpi`` needs to be started by ``mpiexec -n N python -m mpi4py.futures SCRIPT``: one process runs the script, the others its
    tasks. ``dask:ADDRESS`` joins a scheduler that runs already, whose address may be in a file, NAME.json; ``dask-slurm:N`` submits
    N workers as Slurm jobs of their own.
    """
    name, _, argument = spec.partition(":")
    makers: dict[str, Callable[[str], contextlib.AbstractContextManager[Pool]]] = {
        "processes": _processes,
        "threads": lambda count: ThreadPoolExecutor(int(count)),
        "mpi": _mpi,
        "dask": _dask,
        "dask-local": _dask_local,
        "dask-slurm": _dask_slurm,
    }
    counted = name in ("processes", "threads", "dask-local", "dask-slurm")
    if name not in makers or (counted and not re.fullmatch("[1-9][0-9]*", argument)) or (name == "dask" and not argument):
        raise ValueError(f"unknown pool {spec!r}; use {KINDS}")
    with makers[name](argument) as opened:
        yield opened


def workers(opened: Pool) -> int:
    """Number of tasks that a pool runs at once; 1 if the pool does not report it."""
    client = getattr(opened, "_client", None)
    if client is not None:
        return sum(client.nthreads().values())
    return int(getattr(opened, "_max_workers", 0) or getattr(opened, "num_workers", 0) or 1)


def _processes(count: str) -> Pool:
    return ProcessPoolExecutor(int(count), mp_context=multiprocessing.get_context("spawn"))


def _mpi(_: str) -> Pool:
    opened: Pool = import_module("mpi4py.futures").MPIPoolExecutor()
    return opened


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Pool]:
    distributed = import_module("distributed")
    where = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    with distributed.Client(**where) as client:
        client.wait_for_workers(int(os.environ.get("GRADSHARDING_WORKERS", "1")), timeout=120)
        yield client.get_executor(pure=False)


@contextlib.contextmanager
def _dask_local(count: str) -> Iterator[Pool]:
    distributed = import_module("distributed")
    settings = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    with distributed.LocalCluster(n_workers=int(count), **settings) as cluster, distributed.Client(cluster) as client:
        yield client.get_executor(pure=False)


@contextlib.contextmanager
def _dask_slurm(count: str) -> Iterator[Pool]:
    distributed, jobqueue = import_module("distributed"), import_module("dask_jobqueue")
    settings: dict[str, Any] = {"cores": 1, "processes": 1, "memory": os.environ.get("GRADSHARDING_WORKER_MEMORY", "1GB")}
    host = os.environ.get("GRADSHARDING_SCHEDULER_HOST")  # where workers find the scheduler; by default, this node's own name
    with jobqueue.SLURMCluster(
        **settings, scheduler_options={"dashboard_address": "127.0.0.1:0", **({"host": host} if host else {})}
    ) as cluster:
        cluster.scale(int(count))
        with distributed.Client(cluster) as client:
            client.wait_for_workers(int(count), timeout=300)
            yield client.get_executor(pure=False)
