"""How large a model does each topology aggregate in functions of a given memory? Found by running: what is too large is stopped.

The plan's own refusal is passed over; each function is a process that the kernel, or a limit on what it may allocate, holds to
the memory. A size stands if all functions of a round end well. Beside it, the largest size that the plan would have let through.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradsharding import DirectoryStore, Limits, ProcessExecutor, Round, flat, lambda_fl, lifl, sharded, sharded_tree
from gradsharding.errors import OutOfMemory
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Plan
from gradsharding.planning.task import Job, Term
from gradsharding.planning.topologies import in_paper_loop
from gradsharding.sizes import size
from gradsharding.stores.reading import STREAM
from gradsharding.stores.urls import file_reference
from measure import machine, save
from topologies import place

RESULTS = Path(__file__).parent / "results" / "memory_wall.json"

MIB = 1 << 20

TOPOLOGIES: dict[str, Callable[..., Plan]] = {
    "flat": flat,
    "flat, paper's loop": lambda *args, **how: in_paper_loop(flat(*args, **how)),
    "lambda-fl": lambda_fl,
    "lambda-fl, paper's loop": lambda *args, **how: in_paper_loop(lambda_fl(*args, **how)),
    "lifl": lifl,
    "sharded, 8 shards": partial(sharded, shards=8),
    "sharded-tree, 8 shards": partial(sharded_tree, shards=8),
}


def planned(make: Callable[..., Plan], nbytes: int, clients: int, source: str) -> Plan:
    """Plan a round whose clients all have the same update, one float32 tensor."""
    layout = Layout.of({"w": ("F32", (nbytes // 4,))})
    terms = (Term(client=f"c{i}", source=source, version=None, base=len(layout.header()), weight=1) for i in range(clients))
    return make(Manifest(round="r", layout=layout, terms=tuple(terms)), Limits(), grain=8 * MIB, reading=STREAM)


def stands(make: Callable[..., Plan], nbytes: int, clients: int, memory: int, store: DirectoryStore) -> bool:
    """Run a round's functions, whatever the plan says; tell whether none outgrew its memory."""
    path = Path(store.url.removeprefix("file://")) / "update.safetensors"
    layout = Layout.of({"w": ("F32", (nbytes // 4,))})
    with path.open("wb") as file:  # zeros, which take no place
        file.write(layout.header())
        file.truncate(len(layout.header()) + layout.nbytes)
    plan, round_ = planned(make, nbytes, clients, file_reference(path)), Round.create(store, "r")
    upload = round_.begin(plan)[0]
    job = Job(store=store.url, output=round_.output, upload=upload, terms=plan.terms, partials=round_.partials(upload))
    try:
        ProcessExecutor(1, attempts=1).run(plan.tasks, job, store, Limits(memory=memory), lambda _: None)
    except OutOfMemory:
        return False
    finally:
        round_.abandon()
        path.unlink()
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
    parser.add_argument("--memory", type=size, default="256MiB", help="of one function")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--step", type=size, default="4MiB", help="sizes are multiples of this")
    parser.add_argument("--most", type=size, default="1GiB", help="no larger models are tried")
    parser.add_argument("--dir", type=Path, help="on a disk: files in memory would be charged to who writes them")
    parser.add_argument("--only", nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = Table("topology", "largest model that ran", "of a function's memory", "largest that the plan lets through")
    found: dict[str, Any] = {}
    with place(options.dir) as store:
        for name in options.only:
            make = TOPOLOGIES[name]
            ran = largest(lambda n, make=make: stands(make, n, options.clients, options.memory, store), options.most, options.step)  # type: ignore[misc]
            plan = largest(lambda n, make=make: planned(make, n, options.clients, "u").memory <= options.memory, options.most, options.step)  # type: ignore[misc]
            found[name] = {"ran": ran, "planned": plan, "of_memory": ran / options.memory}
            beyond = " or more" if ran == options.most // options.step * options.step else ""
            table.add_row(name, f"{ran / MIB:,.0f} MiB{beyond}", f"{ran / options.memory:.2f}", f"{plan / MIB:,.0f} MiB")
            assert plan <= ran, f"{name}: the plan lets {plan} bytes through, and {ran} is all that ran"
    Console(width=130).print(table)
    setup = {"memory": options.memory, "clients": options.clients, "step": options.step, "most": options.most}
    question = (__doc__ or "").splitlines()[0]
    save(options.output, {"question": question, "setup": setup, "machine": machine(["gradsharding", "numpy"]), "topologies": found})


if __name__ == "__main__":
    main()
