"""A topology turns a manifest into a plan, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsharding.errors import PlanTooLarge, UserError
from gradsharding.format.encode import encode
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import Job, Term
from gradsharding.planning.topologies import Flat, LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology, make_topology
from gradsharding.stores.reading import STREAM

MIB = 1 << 20
SEALED = Manifest(
    round="r",
    layout=Layout.of({"w": ("F32", (25 * MIB,))}),
    terms=(Term(client="a", source="a", version="v", base=8, weight=2), Term(client="b", source="b", version="v", base=8, weight=3)),
)


def test_flat() -> None:
    """Flat is one task over the whole vector and all clients."""
    (task,) = Flat().plan(SEALED, Limits()).tasks

    assert ("flat/0", 0, 100 * MIB, 2, 5) == (task.id, task.start, task.stop, task.part.number if task.part else None, task.weight)
    assert (0, 2, None) == (task.first, task.last, task.reads)


@pytest.mark.parametrize(("grain", "expected"), [(8 * MIB, 13), (100 * MIB, 1), (1 << 40, 1), (MIB, 100)])
def test_grain(grain: int, expected: int) -> None:
    """Left alone, slices carry about the bytes that a store wants in one read."""
    assert expected == len(Sharded().plan(SEALED, Limits(memory=1 << 30), grain=grain).tasks)


def test_memory_comes_first() -> None:
    """Slices shrink until they fit the memory, whatever the store wants."""
    plan = Sharded().plan(SEALED, Limits(memory=80 * MIB), grain=1 << 40)

    assert 25 == plan.functions
    assert plan.memory <= 80 * MIB


def test_shards() -> None:
    """Asked for, a number of shards is what there will be, or PlanTooLarge says why not."""
    assert [f"sharded/{i}" for i in range(7)] == [task.id for task in Sharded(shards=7).plan(SEALED, Limits()).tasks]
    tiny = SEALED.model_copy(update={"layout": Layout.of({"w": ("F32", (6,))})})
    with pytest.raises(PlanTooLarge, match="use 1 to 6 shards"):
        Sharded(shards=7).plan(tiny)


def test_pure() -> None:
    """The same arguments make the same plan."""
    assert Sharded(shards=7).plan(SEALED, Limits()) == Sharded(shards=7).plan(SEALED, Limits())


def test_nothing_to_average() -> None:
    """Updates without any element make a plan of one empty task."""
    empty = SEALED.model_copy(update={"layout": Layout.of({"a": ("F32", (0,))})})

    assert [(0, 0, ())] == [(task.start, task.stop, task.runs) for task in Sharded().plan(empty, Limits()).tasks]


def sealed(clients: int) -> Manifest:
    """Make a manifest of so many clients, of weights 1, 2, 3 and on."""
    terms = (Term(client=f"c{i:04d}", source=f"s{i}", version="v", base=8, weight=i + 1) for i in range(clients))
    return SEALED.model_copy(update={"terms": tuple(terms)})


@pytest.mark.parametrize(
    ("clients", "widths"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (9, (3, 1)), (20, (4, 1)), (21, (5, 1)), (1000, (32, 1))]
)
def test_lambda_fl(clients: int, widths: tuple[int, int]) -> None:
    """λ-FL has leaves of √N updates each, rounded up, and a root."""
    assert widths == LambdaFLTree().plan(sealed(clients), Limits()).widths


@pytest.mark.parametrize(("clients", "widths"), [(1, (1, 1, 1)), (8, (4, 2, 1)), (20, (7, 3, 1)), (64, (16, 4, 1)), (1000, (100, 10, 1))])
def test_lifl(clients: int, widths: tuple[int, int, int]) -> None:
    """LIFL has leaf, middle and top aggregators of ∛N inputs each, rounded up, and 2 at least."""
    assert widths == LIFLTree().plan(sealed(clients), Limits()).widths


def test_any_depth() -> None:
    """A tree may have any fan-in and depth; the last level takes all that are left."""
    plan = LambdaFLTree(fan_in=3, levels=4).plan(sealed(100), Limits())

    assert ((34, 12, 4, 1), (3, 3, 3, 4)) == (plan.widths, plan.fan_ins)
    flat = LambdaFLTree(levels=1).plan(sealed(100))
    assert ((100,), (1,)) == (flat.fan_ins, flat.widths)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lambda-fl", {"fan_in": -1}, "lambda-fl takes no fan-in of -1: it should be greater than or equal to 1"),
        ("sharded-tree", {"levels": 0}, "sharded-tree takes no levels of 0: it should be greater than or equal to 1"),
        ("sharded", {"shards": "7"}, "sharded takes no shards of '7': it should be a valid integer"),
        ("lifl", {"shared_memory": 1}, "lifl takes no shared-memory of 1: it should be a valid boolean"),
        ("flat", {"shards": 2}, "flat takes no shards; sharded and sharded-tree do"),
        ("sharded", {"fan_in": 2}, "sharded takes no fan-in; lambda-fl, lifl and sharded-tree do"),
        ("sharded", {"shared_memory": True}, "sharded takes no shared-memory; lifl does"),
        ("lifl", {"rings": 2}, "lifl takes no rings"),
        ("ring", {}, "no topology has the name 'ring'; use flat, sharded, lambda-fl, lifl or sharded-tree"),
    ],
)
def test_options_are_refused_in_one_sentence(name: str, options: dict[str, Any], said: str) -> None:
    """An option that a topology does not have, or a value that it does not take, is named with what would do."""
    with pytest.raises(UserError) as caught:
        make_topology(name, **options)
    assert said == caught.value.message


def test_a_topology_is_a_value() -> None:
    """Topologies are compared by content, printed with the options that were given, and made again from their name and JSON."""
    for topology in (Flat(), Sharded(shards=7), LambdaFLTree(fan_in=3), LIFLTree(shared_memory=True), ShardedTree(shards=2, levels=3)):
        assert topology == make_topology(topology.name, **json.loads(topology.model_dump_json()))
    assert 1 == len({Sharded(shards=7), Sharded(shards=7)})
    assert ["flat", "sharded (shards=7)", "lifl (fan_in=3, shared_memory=True)"] == [
        str(topology) for topology in (Flat(), Sharded(shards=7), LIFLTree(fan_in=3, shared_memory=True))
    ]


HALVED = """
import sys
from typing import Annotated, ClassVar
from pydantic import Field
from gradsharding.planning.topologies import TOPOLOGIES, Topology

class Halved(Topology):
    name: ClassVar = "halved"
    times: Annotated[int, Field(ge=1)] = Field(1, description="How often the vector is halved.  [default: 1]")

    def divided(self, whole, limits, grain):
        return whole.recut(2**self.times)

TOPOLOGIES["halved"] = Halved

from gradsharding.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""A program with one more topology: a class, and a place in the registry."""


def test_a_new_topology_is_a_class_and_a_place_in_the_registry(tmp_path: Path) -> None:
    """The command line and the planner take a registered topology with its options; what it averages is the same to the bit."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", HALVED, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    for client, value in (("a", 1.5), ("b", 4.0)):
        (tmp_path / f"{client}.safetensors").write_bytes(b"".join(encode({"w": np.full(8, value, "f4")})[1]))
    files = ("aggregate", "a.safetensors", "b.safetensors:3", "--executor", "inline")
    ended = run(*files, "-o", "halved", "--topology", "halved", "--times", "2")
    assert (0, True) == (ended.returncode, "halved" in ended.stdout and "4 slices" in ended.stdout), ended.stdout + ended.stderr
    assert 0 == run(*files, "-o", "flat", "--topology", "flat").returncode
    assert (tmp_path / "flat").read_bytes() == (tmp_path / "halved").read_bytes()

    refused = run(*files, "-o", "refused", "--topology", "halved", "--shards", "2")
    assert (2, True) == (refused.returncode, "halved takes no shards; sharded and sharded-tree do." in refused.stderr)
    planned = json.loads(run("plan", "--size", "8MiB", "--clients", "3", "--json").stdout)
    assert {"halved": 2, "flat": 1}.items() <= {row["topology"]: row["shards"] for row in planned["topologies"]}.items()
    assert "--times N" in run("aggregate", "--help").stdout


def test_sharded_tree() -> None:
    """A sharded tree is a tree for each slice; a task reads partial sums of its own slice only."""
    plan = ShardedTree(shards=3, fan_in=4).plan(sealed(10), Limits())

    assert ((3, 1), 3, 12) == (plan.widths, len(plan.slices), plan.functions)
    leaf, root = plan.stages[0][4], plan.stages[1][1]
    assert ("sharded-tree/0/1/1", "sharded-tree/1/1/0") == (leaf.id, root.id)
    assert ["c0004", "c0005", "c0006", "c0007"] == [term.client for term in job_of(plan).read_by(leaf)]
    assert ("sharded-tree/0/1/0", "sharded-tree/0/1/1", "sharded-tree/0/1/2") == root.predecessors
    assert ((leaf.start, leaf.stop), None, 3) == ((root.start, root.stop), leaf.part, root.part.number if root.part else None)


@pytest.mark.parametrize("make", [Flat(), Sharded(), LambdaFLTree(), LIFLTree(), ShardedTree(), LIFLTree(shared_memory=True)])
@pytest.mark.parametrize("clients", [1, 2, 7, 20])
def test_figures_are_those_of_the_tasks(make: Topology, clients: int) -> None:
    """What a plan says of itself, from a few kinds of tasks, is the sum over all of its tasks; and it goes to JSON and back."""
    mixed = Layout.of({"w": ("F32", (999,)), "h": ("F16", (77,)), "n": ("I64", (5,)), "b": ("U8", (3,))})
    plan = make.plan(sealed(clients).model_copy(update={"layout": mixed}), grain=500, reading=STREAM)
    tasks = plan.tasks

    assert (len(tasks), sum(kind.times for kinds in plan.kinds for kind in kinds)) == (plan.functions, plan.functions)
    assert (sum(t.gets for t in tasks), sum(not t.written_to_memory for t in tasks)) == (plan.gets, plan.puts)
    assert (sum(t.bytes_read for t in tasks), sum(t.bytes_written for t in tasks)) == (plan.bytes_read, plan.bytes_written)
    assert max(t.memory for t in tasks) == plan.memory
    assert len({t.id for t in tasks}) == plan.functions
    for stage, inputs in zip(plan.stages, (clients, *plan.widths), strict=False):
        assert [*range(inputs)] == [i for t in stage if t.start == 0 for i in range(t.first, t.last)]
    assert plan == Plan.model_validate_json(plan.model_dump_json())


def job_of(plan: Plan) -> Job:
    """Make a job of a plan."""
    return Job(store="s", output="o", upload="u", terms=plan.terms)


@pytest.mark.parametrize("make", [Sharded(shards=1_000), ShardedTree(shards=1_000, fan_in=100)], ids=["sharded", "sharded-tree"])
@pytest.mark.slow
def test_what_an_executor_is_given(make: Topology) -> None:
    """The job names each update once, and tasks name ranges: 10,000 clients times 1,000 slices are a few megabytes, not 1.5 GB."""
    clients, slices = 10_000, 1_000
    plan = make.plan(sealed(clients), Limits(memory=1 << 30))
    job = len(job_of(plan).model_dump_json())
    tasks = [len(task.model_dump_json()) for task in plan.stages[-1]]

    assert slices == len(tasks)
    assert max(tasks) < 500
    assert 10 * max(tasks) * slices > job + sum(tasks)  # neither outweighs the other as both grow


def test_narrowed() -> None:
    """A job for some tasks names no more updates than they read, and each reads the same ones from it."""
    plan = ShardedTree(shards=2, fan_in=4).plan(sealed(10), Limits())
    job, (second, third), (root, _) = job_of(plan), plan.stages[0][1:3], plan.stages[1]
    some = job.narrowed([second, third, root])

    assert (4, 6) == (some.first, len(some.terms))
    assert [job.read_by(task) for task in (second, third, root)] == [some.read_by(task) for task in (second, third, root)]
    assert job.narrowed([third]) == some.narrowed([third])
    assert () == job.narrowed([root]).terms
