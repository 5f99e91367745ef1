"""A topology turns a manifest into a plan, and nothing else."""

from collections.abc import Callable
from functools import partial

import pytest

from gradsharding.errors import PlanTooLarge, UserError
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import Job, Term
from gradsharding.planning.topologies import Topology, flat, lambda_fl, lifl, sharded, sharded_tree
from gradsharding.stores.reading import STREAM

MIB = 1 << 20
SEALED = Manifest(
    round="r",
    layout=Layout.of({"w": ("F32", (25 * MIB,))}),
    terms=(Term(client="a", source="a", version="v", base=8, weight=2), Term(client="b", source="b", version="v", base=8, weight=3)),
)


def test_flat() -> None:
    """Flat is one task over the whole vector and all clients."""
    (task,) = flat(SEALED, Limits()).tasks

    assert ("flat/0", 0, 100 * MIB, 2, 5) == (task.id, task.start, task.stop, task.part, task.total)
    assert (0, 2, "") == (task.first, task.last, task.reads)


@pytest.mark.parametrize(("grain", "expected"), [(8 * MIB, 13), (100 * MIB, 1), (1 << 40, 1), (MIB, 100)])
def test_grain(grain: int, expected: int) -> None:
    """Left alone, slices carry about the bytes that a store wants in one read."""
    assert expected == len(sharded(SEALED, Limits(memory=1 << 30), grain=grain).tasks)


def test_memory_comes_first() -> None:
    """Slices shrink until they fit the memory, whatever the store wants."""
    plan = sharded(SEALED, Limits(memory=80 * MIB), grain=1 << 40)

    assert 25 == plan.functions
    assert plan.memory <= 80 * MIB


def test_shards() -> None:
    """Asked for, a number of shards is what there will be, or PlanTooLarge says why not."""
    assert [f"sharded/{i}" for i in range(7)] == [task.id for task in sharded(SEALED, Limits(), shards=7).tasks]
    with pytest.raises(PlanTooLarge, match="use 1 to 26214400 shards"):
        sharded(SEALED, Limits(), shards=25 * MIB + 1)


def test_pure() -> None:
    """The same arguments make the same plan."""
    assert sharded(SEALED, Limits(), shards=7) == sharded(SEALED, Limits(), shards=7)


def test_nothing_to_average() -> None:
    """Updates without any element make a plan of one empty task."""
    empty = SEALED.model_copy(update={"layout": Layout.of({"a": ("F32", (0,))})})

    assert [(0, 0, ())] == [(task.start, task.stop, task.runs) for task in sharded(empty, Limits()).tasks]


def sealed(clients: int) -> Manifest:
    """Make a manifest of so many clients, of weights 1, 2, 3 and on."""
    terms = (Term(client=f"c{i:04d}", source=f"s{i}", version="v", base=8, weight=i + 1) for i in range(clients))
    return SEALED.model_copy(update={"terms": tuple(terms)})


@pytest.mark.parametrize(
    ("clients", "widths"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (9, (3, 1)), (20, (4, 1)), (21, (5, 1)), (1000, (32, 1))]
)
def test_lambda_fl(clients: int, widths: tuple[int, int]) -> None:
    """λ-FL has leaves of √N updates each, rounded up, and a root."""
    assert widths == lambda_fl(sealed(clients), Limits()).widths


@pytest.mark.parametrize(("clients", "widths"), [(1, (1, 1, 1)), (8, (4, 2, 1)), (20, (7, 3, 1)), (64, (16, 4, 1)), (1000, (100, 10, 1))])
def test_lifl(clients: int, widths: tuple[int, int, int]) -> None:
    """LIFL has leaf, middle and top aggregators of ∛N inputs each, rounded up, and 2 at least."""
    assert widths == lifl(sealed(clients), Limits()).widths


def test_any_depth() -> None:
    """A tree may have any fan-in and depth; the last level takes all that are left."""
    plan = lambda_fl(sealed(100), Limits(), fan_in=3, levels=4)

    assert ((34, 12, 4, 1), (3, 3, 3, 4)) == (plan.widths, plan.fan_ins)
    assert ((100,), (1,)) == (lambda_fl(sealed(100), Limits(), levels=1).fan_ins, lambda_fl(sealed(100), Limits(), levels=1).widths)


@pytest.mark.parametrize(("fan_in", "levels"), [(-1, 2), (3, 0), (3, -1)])
def test_no_tree(fan_in: int, levels: int) -> None:
    """What is no tree is refused."""
    with pytest.raises(UserError, match=r"is none; use at least 1 level"):
        lambda_fl(sealed(10), Limits(), fan_in=fan_in, levels=levels)


def test_sharded_tree() -> None:
    """A sharded tree is a tree for each slice; a task reads partial sums of its own slice only."""
    plan = sharded_tree(sealed(10), Limits(), shards=3, fan_in=4)

    assert ((3, 1), 3, 12) == (plan.widths, len(plan.slices), plan.functions)
    leaf, root = plan.stages[0].tasks[4], plan.stages[1].tasks[1]
    assert ("sharded-tree/0/1/1", "sharded-tree/1/1/0") == (leaf.id, root.id)
    assert ["c0004", "c0005", "c0006", "c0007"] == [term.client for term in job_of(plan).read_by(leaf)]
    assert ("sharded-tree/0/1/0", "sharded-tree/0/1/1", "sharded-tree/0/1/2") == root.partials
    assert ((leaf.start, leaf.stop), 0, 3) == ((root.start, root.stop), leaf.part, root.part)


@pytest.mark.parametrize("make", [flat, sharded, lambda_fl, lifl, sharded_tree, partial(lifl, shared_memory=True)])
@pytest.mark.parametrize("clients", [1, 2, 7, 20])
def test_figures_are_those_of_the_tasks(make: Topology, clients: int) -> None:
    """What a plan says of itself, from a few kinds of tasks, is the sum over all of its tasks; and it goes to JSON and back."""
    mixed = Layout.of({"w": ("F32", (999,)), "h": ("F16", (77,)), "n": ("I64", (5,)), "b": ("U8", (3,))})
    plan = make(sealed(clients).model_copy(update={"layout": mixed}), Limits(), grain=500, reading=STREAM)
    tasks = plan.tasks

    assert (len(tasks), sum(kind.times for kinds in plan.kinds for kind in kinds)) == (plan.functions, plan.functions)
    assert (sum(t.gets for t in tasks), sum(not t.written_to_memory for t in tasks)) == (plan.gets, plan.puts)
    assert (sum(t.bytes_read for t in tasks), sum(t.bytes_written for t in tasks)) == (plan.bytes_read, plan.bytes_written)
    assert max(t.memory for t in tasks) == plan.memory
    assert len({t.id for t in tasks}) == plan.functions
    for stage, inputs in zip(plan.stages, (clients, *plan.widths), strict=False):
        assert [*range(inputs)] == [i for t in stage.tasks if t.start == 0 for i in range(t.first, t.last)]
    assert plan == Plan.model_validate_json(plan.model_dump_json())


def job_of(plan: Plan) -> Job:
    """Make a job of a plan."""
    return Job(store="s", output="o", upload="u", terms=plan.terms)


@pytest.mark.parametrize("make", [sharded, partial(sharded_tree, fan_in=100)], ids=["sharded", "sharded-tree"])
def test_what_an_executor_is_given(make: Callable[..., Plan]) -> None:
    """The job names each update once, and tasks name ranges: 10,000 clients times 1,000 slices are a few megabytes, not 1.5 GB."""
    clients, slices = 10_000, 1_000
    plan = make(sealed(clients), Limits(memory=1 << 30), shards=slices)
    job = len(job_of(plan).model_dump_json())
    tasks = [len(task.model_dump_json()) for task in plan.stages[-1].tasks]

    assert slices == len(tasks)
    assert max(tasks) < 500
    assert 10 * max(tasks) * slices > job + sum(tasks)  # neither outweighs the other as both grow


def test_narrowed() -> None:
    """A job for some tasks names no more updates than they read, and each reads the same ones from it."""
    plan = sharded_tree(sealed(10), Limits(), shards=2, fan_in=4)
    job, (second, third), (root, _) = job_of(plan), plan.stages[0].tasks[1:3], plan.stages[1].tasks
    some = job.narrowed([second, third, root])

    assert (4, 6) == (some.first, len(some.terms))
    assert [job.read_by(task) for task in (second, third, root)] == [some.read_by(task) for task in (second, third, root)]
    assert job.narrowed([third]) == some.narrowed([third])
    assert () == job.narrowed([root]).terms
