"""What a function does in the paper: take all of an object, make an array of it, add it to float32 sums; then the next object.

The public replication package names a client's objects ``client_c_shard_m``. ``main`` runs functions as a process: each line of standard
input is a Function.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from gradsharding.running.cgroup import MemoryCgroup
from gradsharding.running.worker import limit_data
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import open_store
from gradsharding.value import Value
from paper.model import PaperPlan

Vector = npt.NDArray[np.float32]

OUT_OF_MEMORY = 3
"""Exit status where an allocation failed."""


class Function(Value):
    """What one function reads and writes: keys of objects of ``nbytes`` bytes of float32."""

    inputs: tuple[str, ...]
    weights: tuple[int, ...]
    """Of each input; 1 for sums of other functions."""
    nbytes: int
    output: str
    divisor: int = 1
    """Weight of the round for a function that writes a mean; 1 for one that writes sums."""


def submit(store: ObjectStore, round_: str, vectors: Mapping[str, Vector], plan: PaperPlan) -> None:
    """Write each client's vector in one object a slice."""
    for client, vector in vectors.items():
        start, data = 0, np.ascontiguousarray(vector, np.float32).data.cast("B")
        for m, nbytes in enumerate(plan.slices):
            store.put(_key(round_, client, m), [data[start : start + nbytes]])
            start += nbytes


def functions(round_: str, weights: Mapping[str, int], plan: PaperPlan) -> Iterator[Function]:
    """Give the functions of a round in an order in which they may run; ``weights`` are those of the clients."""
    total = sum(weights.values())
    for m, nbytes in enumerate(plan.slices):
        inputs = [(_key(round_, client, m), weight) for client, weight in weights.items()]
        for level, fan_in in enumerate(plan.fan_ins):
            last = level == len(plan.fan_ins) - 1
            groups = [inputs[i : i + fan_in] for i in range(0, len(inputs), fan_in)]
            inputs = [(_key(round_, "mean" if last else f"sums_{level}_{g}", m), 1) for g in range(len(groups))]
            for group, (output, _) in zip(groups, inputs, strict=True):
                keys, given = zip(*group, strict=True)
                yield Function(inputs=keys, weights=given, nbytes=nbytes, output=output, divisor=total if last else 1)


def run(function: Function, store: ObjectStore) -> None:
    """Run a function: at most it holds its sums, one object's bytes, and the array made of them."""
    sums = np.zeros(function.nbytes // 4, np.float32)
    for key, weight in zip(function.inputs, function.weights, strict=True):
        sums += _weighted(key, weight, function.nbytes, store)
    sums /= np.float32(function.divisor)
    store.put(function.output, [sums.data])


def aggregate(store: ObjectStore, round_: str, weights: Mapping[str, int], plan: PaperPlan) -> Vector:
    """Run all functions of a round here; give the mean."""
    for function in functions(round_, weights, plan):
        run(function, store)
    slices = [_read(_key(round_, "mean", m), nbytes, store) for m, nbytes in enumerate(plan.slices)]
    return np.frombuffer(b"".join(slices), np.float32)


def held(function: Function, memory: int, store: DirectoryStore) -> bool:
    """Run a function in a process that may take ``memory`` bytes; tell whether it did not outgrow them.

    A cgroup holds it where one can be made, otherwise a limit on what it may allocate. Raise CalledProcessError if it fails otherwise.
    """
    cgroup = MemoryCgroup.create(memory)
    command = [sys.executable, "-m", "paper.loop", store.url, *([] if cgroup else [str(memory)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment) as process:
            if cgroup and not cgroup.add(process.pid):
                process.kill()
                raise RuntimeError("the kernel refuses to move a process into the cgroup that it let us make")
            process.communicate(function.model_dump_json())
        if process.returncode == 0:
            return True
        if process.returncode == OUT_OF_MEMORY or (cgroup and cgroup.kills()):
            return False
        raise subprocess.CalledProcessError(process.returncode, command)
    finally:
        if cgroup:
            cgroup.close()


def _weighted(key: str, weight: int, nbytes: int, store: ObjectStore) -> Vector:
    array = np.frombuffer(_read(key, nbytes, store), np.float32).copy()
    array *= np.float32(weight)
    return array


def _read(key: str, nbytes: int, store: ObjectStore) -> bytearray:
    body, end = bytearray(nbytes), 0
    for chunk in store.get(key, 0, nbytes):
        start, end = end, end + memoryview(chunk).nbytes
        body[start:end] = chunk
    return body


def _key(round_: str, whose: str, m: int) -> str:
    return f"{round_}/{whose}_shard_{m}"


def main() -> None:
    """Run functions on the store whose URL is the first argument; the second is the bytes of memory that this process may take."""
    store = open_store(sys.argv[1])
    if sys.argv[2:]:
        limit_data(int(sys.argv[2]))
    for line in sys.stdin:
        try:
            run(Function.model_validate_json(line), store)
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
