"""How large a model does each topology aggregate in functions of a given memory? Found by running: what is too large is stopped.

The plan's own refusal is passed over; each function is a process that the kernel, or a limit on what it may allocate, holds to
the memory. A size stands if all functions of a round end well. Beside it, the largest size that the plan would have let through.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradsharding import DirectoryStore, Flat, LambdaFLTree, LIFLTree, Limits, ProcessExecutor, Round, Sharded, ShardedTree
from gradsharding.errors import OutOfMemory
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Job, Term
from gradsharding.planning.topologies import Topology
from gradsharding.sizes import size
from gradsharding.stores.reading import STREAM
from gradsharding.stores.urls import file_reference
from measure import machine, save
from paper.loop import functions, held
from paper.model import planned
from topologies import place

RESULTS = Path(__file__).parent / "results" / "memory_wall.json"

MIB = 1 << 20

TOPOLOGIES: dict[str, Topology] = {
    "flat": Flat(),
    "lambda-fl": LambdaFLTree(),
    "lifl": LIFLTree(),
    "sharded, 8 shards": Sharded(shards=8),
    "sharded-tree, 8 shards": ShardedTree(shards=8),
}

IN_PAPER = {"flat, paper's loop": "flat", "lambda-fl, paper's loop": "lambda-fl"}
"""The paper's functions, and the topology of each."""

NAMES = ("flat", "flat, paper's loop", "lambda-fl", "lambda-fl, paper's loop", "lifl", "sharded, 8 shards", "sharded-tree, 8 shards")

UPDATE = "update.safetensors"


def sealed(nbytes: int, clients: int, source: str = UPDATE, version: str = "") -> Manifest:
    """Make up a round whose clients all have the same update, one float32 tensor."""
    layout = Layout.of({"w": ("F32", (nbytes // 4,))})
    terms = (Term(client=f"c{i}", source=source, version=version, base=len(layout.header()), weight=1) for i in range(clients))
    return Manifest(round="r", layout=layout, terms=tuple(terms))


def projected(name: str, nbytes: int, clients: int) -> int:
    """Bytes of memory that the plan of a round projects for its largest function."""
    round_ = sealed(nbytes, clients)
    if name in IN_PAPER:
        return planned(IN_PAPER[name], round_).memory
    return TOPOLOGIES[name].plan(round_, grain=8 * MIB, reading=STREAM).memory


def stands(name: str, nbytes: int, clients: int, memory: int, store: DirectoryStore) -> bool:
    """Run a round's functions, whatever the plan projects; return whether all stayed within their memory."""
    path, header = Path(store.url.removeprefix("file://")) / UPDATE, sealed(nbytes, clients).layout.header()
    with path.open("wb") as file:  # a sparse file of zeros, which takes no disk space
        file.write(header)
        file.truncate(len(header) + nbytes)
    try:
        if name in IN_PAPER:
            return _paper_stands(IN_PAPER[name], nbytes, clients, memory, store)
        return _stands(TOPOLOGIES[name], sealed(nbytes, clients, file_reference(path), store.head(UPDATE).version), memory, store)
    finally:
        path.unlink()


def _stands(topology: Topology, round_: Manifest, memory: int, store: DirectoryStore) -> bool:
    plan, records = topology.plan(round_, grain=8 * MIB, reading=STREAM), Round.create(store, "r")
    upload = records.begin(plan)[0]
    job = Job(store=store.url, output=records.output, upload=upload, terms=plan.terms, partials=records.partials(upload))
    try:
        ProcessExecutor(1, attempts=1).run(plan.tasks, job, store, Limits(memory=memory), lambda _: None)
    except OutOfMemory:
        return False
    finally:
        records.abandon()
    return True


def _paper_stands(topology: str, nbytes: int, clients: int, memory: int, store: DirectoryStore) -> bool:
    """Run the paper's functions, each in a process of its own, on the first ``nbytes`` of the one update that all clients have."""
    plan = planned(topology, sealed(nbytes, clients))
    work = [*functions("paper", {f"c{i}": 1 for i in range(clients)}, plan)]
    written = {function.output for function in work}
    try:
        for function in work:
            inputs = tuple(key if key in written else UPDATE for key in function.inputs)
            if not held(function.model_copy(update={"inputs": inputs}), memory, store):
                return False
    finally:
        store.delete([key for key, _ in store.list("paper/")])
    return True


def largest(fits: Callable[[int], bool], most: int, step: int) -> int:
    """Find the largest multiple of ``step`` bytes that fits, below ``most``; 0 if none does."""
    low, high = 0, most // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def main() -> None:
    """Search, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=size, default="256MiB", help="memory of one function")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--step", type=size, default="4MiB", help="sizes are multiples of this")
    parser.add_argument("--most", type=size, default="1GiB", help="largest model to try")
    parser.add_argument(
        "--dir", type=Path, help="directory on a disk: files in memory would count as memory of the process that writes them"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = Table("topology", "largest model that ran", "of a function's memory", "largest that the plan admits")
    found: dict[str, Any] = {}
    with place(options.dir) as store:
        for name in options.only:
            ran = largest(lambda n, name=name: stands(name, n, options.clients, options.memory, store), options.most, options.step)  # type: ignore[misc]
            plan = largest(lambda n, name=name: projected(name, n, options.clients) <= options.memory, options.most, options.step)  # type: ignore[misc]
            found[name] = {"ran": ran, "planned": plan, "of_memory": ran / options.memory}
            beyond = " or more" if ran == options.most // options.step * options.step else ""
            table.add_row(name, f"{ran / MIB:,.0f} MiB{beyond}", f"{ran / options.memory:.2f}", f"{plan / MIB:,.0f} MiB")
            assert plan <= ran, f"{name}: the plan admits {plan} bytes, but the largest that ran had {ran}"
    Console(width=130).print(table)
    setup = {"memory": options.memory, "clients": options.clients, "step": options.step, "most": options.most}
    question = (__doc__ or "").splitlines()[0]
    save(options.output, {"question": question, "setup": setup, "machine": machine(["gradsharding", "numpy"]), "topologies": found})


if __name__ == "__main__":
    main()
