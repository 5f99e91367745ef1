"""``gradsharding smoke`` has the deployed stack average the same updates in slices and in a tree, and compares both with numpy."""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping

import click
import numpy as np
import numpy.typing as npt

from gradsharding.advice.billing import bill_of, prices_of
from gradsharding.advice.cost import bill
from gradsharding.advice.prices import load_prices
from gradsharding.aws.client import lambda_client
from gradsharding.aws.demands import expecting
from gradsharding.aws.deploy.account import Account
from gradsharding.aws.deploy.commands import _found, name_option
from gradsharding.aws.deploy.drift import checked
from gradsharding.aws.functions.executor import LambdaExecutor
from gradsharding.errors import GradShardingError, UserError
from gradsharding.planning.topologies import Sharded, ShardedTree, Topology
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.result import Result, observed_memory
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor
from gradsharding.sizes import mib
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import open_store

CLIENTS, ELEMENTS = 4, 4 << 20
"""Number of updates, and of float32 values in each: 64 MiB in all."""

WAYS: Mapping[str, Topology] = {
    "4 slices": Sharded(shards=4),
    "2 slices in a tree of fan-in 2": ShardedTree(shards=2, fan_in=2),
}
"""The topologies: one with small slices, which are composed into parts, and one with large slices, which are parts, and partial sums."""


@click.command()
@name_option
def smoke(name: str) -> None:
    """Run two small aggregations on the deployed function.

    \b
    Examples:
      gradsharding smoke
      gradsharding smoke --name trial

    Four updates of 16 MiB are averaged in slices, and then in a tree. Every element is compared with numpy's. The command prints the time,
    the memory and the price of each aggregation, and deletes everything that it wrote, even if it fails or is interrupted.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    account = Account()
    up = checked(account, _found(account, name))
    with expecting(up.parameters.get("BucketOwner") or account.number):
        try_out(open_store(up.outputs["Store"]), LambdaExecutor(up.outputs["Executor"].removeprefix("lambda:")))


def try_out(store: ObjectStore, executor: Executor) -> None:
    """Average updates in each topology, check every element, and print the time, memory and cost.

    Raise GradShardingError if an element is wrong, or if something that was written could not be deleted.
    """
    draw, run = np.random.default_rng(0), uuid.uuid4().hex[:12]
    # fixed-point values, whose weighted sums are exact in float64, in any order of addition
    updates = [np.ldexp(draw.integers(-(1 << 23), 1 << 23, ELEMENTS, np.int32).astype(np.float32), -21) for _ in range(CLIENTS)]
    sums = np.zeros(ELEMENTS)
    for weight, update in enumerate(updates, 1):
        sums += weight * update.astype(np.float64)
    expected, rounds = (sums / sum(range(1, CLIENTS + 1))).astype(np.float32), list[Round]()
    with _deleted_after(rounds):
        started = time.perf_counter()
        for i in range(len(WAYS)):
            rounds.append(Round.create(store, f"smoke-{run}-{i}"))
        for weight, update in enumerate(updates, 1):
            rounds[0].submit(f"client-{weight}", {"w": update}, weight)
        for round_ in rounds[1:]:
            for weight in range(1, CLIENTS + 1):
                round_.refer(f"client-{weight}", rounds[0].update_key(f"client-{weight}"), weight)
        click.echo(f"upload of {mib(sum(update.nbytes for update in updates))}: {time.perf_counter() - started:.1f} s")
        for (way, topology), round_ in zip(WAYS.items(), rounds, strict=True):
            result = aggregate(round_, topology=topology, executor=executor)
            _compare(expected, result, way)
            click.echo(f"\n{way}: {result.plan.functions} functions, {result.seconds:.1f} s; every element is right\n{bill_text(result)}")


def _compare(expected: npt.NDArray[np.float32], result: Result, way: str) -> None:
    found = result.arrays()["w"]
    if not np.array_equal(expected, found):
        wrong = np.flatnonzero(expected != found)
        raise GradShardingError(
            f"{way}: {len(wrong):,} of {len(expected):,} elements differ from numpy's; the first is element {wrong[0]:,}, "
            f"{found[wrong[0]]} instead of {expected[wrong[0]]}; please report this"
        )


@contextlib.contextmanager
def _deleted_after(rounds: list[Round]) -> Iterator[None]:
    """On exit, delete all that rounds have written, and name what could not be deleted: in a GradShardingError if nothing else failed."""
    try:
        yield
    except BaseException:
        for line in _left(rounds):
            click.echo(f"gradsharding: could not delete {line}", err=True)
        raise
    if left := _left(rounds):
        raise GradShardingError(f"the averages are right, but this could not be deleted: {'; '.join(left)}")


def _left(rounds: list[Round]) -> list[str]:
    """Delete what rounds have written; return what is still there, and why."""
    left = []
    for round_ in rounds:
        store, prefix = round_.store, round_.key("")
        try:
            round_.abandon()
            store.delete([*(key for key, _ in store.list(prefix)), round_.result_key()])
            left += [f"{store.url}/{key}" for key, _ in store.list(prefix)]
        except GradShardingError as error:
            left.append(f"{store.url}/{prefix} ({error.message})")
        except KeyboardInterrupt:  # again
            left.append(f"{store.url}/{prefix} (interrupted)")
    return left


def bill_text(result: Result) -> str:
    """Return the memory and cost of a finished round, in list prices."""
    invocations = result.invocations
    lines = [f"memory per function: {mib(result.plan.memory)} projected, {observed_memory(result)}"]
    if invocations:
        cold = sum(invocation.init_seconds is not None for invocation in invocations)
        used = max(invocation.max_memory for invocation in invocations)
        allocated = max(invocation.memory_size for invocation in invocations)
        lines.append(f"invocations: {len(invocations)}, {cold} of them cold starts; {mib(used)} of {mib(allocated)} used")
    else:
        lines.append("invocations: Lambda reported no figures, so only requests to the store are billed here")
    try:
        prices = prices_of(result) if invocations else load_prices(lambda_client().meta.region_name)
        billed = (bill_of(result) or bill(result.reports, result.caller, result.plan, prices)).aggregation
    except UserError as error:  # the file of prices is wrong
        return "\n".join([*lines, f"no price: {error.message}"])
    if not prices.figures:
        return "\n".join([*lines, prices.origin])
    lacks = prices.lacking(billed.missing)
    return "\n".join([*lines, str(billed), *([lacks] if lacks else []), f"{prices.origin}; the clients' uploads are not in it"])
