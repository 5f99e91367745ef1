"""``gradsharding deploy``, ``smoke`` and ``destroy``: text in, the stack put up, tried or taken down, text out."""

import re
import time
import uuid
from typing import Any

import click
import numpy as np

from gradsharding.aggregate import Result, aggregate, observed_memory
from gradsharding.aws.invoke import LambdaExecutor
from gradsharding.aws.stack import Account, Deployed, contents, put_up, take_down
from gradsharding.aws.wheels import MACHINES
from gradsharding.cost import bill
from gradsharding.errors import GradShardingError, UserError
from gradsharding.plan import mib
from gradsharding.platform import DEPLOYED_RUNTIME, DEPLOYED_TIMEOUT, MEMORY, RUNTIMES, TIMEOUT
from gradsharding.prices import HOME_REGION, load_prices
from gradsharding.round import Round
from gradsharding.store import open_store

name_option = click.option(
    "--name", default="gradsharding", show_default=True, callback=lambda _, __, name: _checked(name), help="Name of the stack."
)

SMOKE_CLIENTS, SMOKE_ELEMENTS = 4, 4 << 20

ALARMS = 2
"""CloudWatch alarms of the template."""


@click.command(short_help="Put the bucket and the function up on AWS.")
@name_option
@click.option("--architecture", type=click.Choice([*MACHINES]), help="[default: arm64]")
@click.option("--memory", type=click.IntRange(192, MEMORY[-1] >> 20), metavar="MIB", help="Memory of one function.  [default: 512]")
@click.option("--timeout", type=click.IntRange(3, TIMEOUT), metavar="SECONDS", help=f"At most {TIMEOUT}.  [default: {DEPLOYED_TIMEOUT}]")
@click.option("--concurrency", type=click.IntRange(-1), metavar="N", help="Invocations reserved for it; -1 for none.  [default: -1]")
@click.option("--expire-days", type=click.IntRange(1), metavar="DAYS", help="Days until rounds are deleted.  [default: 7]")
@click.option("--alarm-topic", metavar="ARN", help="SNS topic for alarms.")
@click.option("--runtime", type=click.Choice([*RUNTIMES]), help=f"[default: {DEPLOYED_RUNTIME}]")
def deploy(name: str, **options: Any) -> None:
    """Put up a bucket and a function, or bring them up to date: what is not given stays as it is.

    Endpoint, region and credentials are those of the usual AWS environment variables and profiles.
    """
    keys = {option: "".join(word.capitalize() for word in option.split("_")) for option in options}
    parameters = {keys[option]: str(value) for option, value in options.items() if value is not None}
    up = put_up(Account(), name, parameters, _tell)
    store, executor, prices = up.outputs["Store"], up.outputs["Executor"], load_prices()
    alarm, stored = prices.usd("alarm_month"), prices.usd("s3_gigabyte_month")
    click.echo(
        f"store:    {store}\nexecutor: {executor}\n\n"
        f"Try it:       gradsharding smoke{_named(name)}\n"
        f"Use it:       gradsharding aggregate {store}/in/a.safetensors:120 {store}/in/b.safetensors:80 "
        f"-o {store}/results/mean.safetensors --executor {executor}\n"
        f"              GradSharding(FedAvg(), store={store!r}, executor=open_executor({executor!r}))\n"
        f"Take it down: gradsharding destroy{_named(name)}\n\n"
        f"Left up and unused, it costs ${ALARMS * alarm} a month for {ALARMS} alarms, and ${stored} for each GB-month that lies in its "
        f"buckets (list prices of {HOME_REGION}); rounds are deleted after {up.parameters.get('ExpireDays', '7')} days, results stay."
    )


@click.command(short_help="Run a small real aggregation on what is deployed.")
@name_option
def smoke(name: str) -> None:
    """Average four updates of 16 MiB on the deployed stack, check every element, and print time, memory and the bill."""
    up = _found(name)
    store, draw = open_store(up.outputs["Store"]), np.random.default_rng(0)
    updates = {f"client-{i}": draw.normal(size=SMOKE_ELEMENTS).astype(np.float32) for i in range(SMOKE_CLIENTS)}
    round_ = Round.create(store, f"smoke-{uuid.uuid4().hex[:12]}")
    try:
        started = time.perf_counter()
        for weight, (client, update) in enumerate(updates.items(), 1):
            round_.submit(client, {"w": update}, weight)
        ready = time.perf_counter()
        result = aggregate(round_, executor=LambdaExecutor(up.outputs["Executor"].removeprefix("lambda:")))
        ended = time.perf_counter()
        sums = np.zeros(SMOKE_ELEMENTS)
        for weight, update in enumerate(updates.values(), 1):
            sums += np.float64(weight) * update
        expected = (sums / sum(range(1, SMOKE_CLIENTS + 1))).astype(np.float32)
        if not np.array_equal(expected, result.arrays()["w"]):
            raise GradShardingError("the average that the functions made is not the one that numpy makes; please report this")
    finally:
        store.delete([*(key for key, _ in store.list(round_.key(""))), round_.result_key()])
    click.echo(f"upload {ready - started:.1f} s, aggregation {ended - ready:.1f} s: {len(result.reports)} slices; every element is right")
    click.echo(bill_text(result))


@click.command(short_help="Take everything down again.")
@name_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def destroy(name: str, *, yes: bool) -> None:
    """Delete the stack, its bucket with all that is in it, its log and the function's code. It asks first."""
    account = Account()
    held = contents(account, name)
    what = f"bucket {held.bucket} with {held.objects} objects ({mib(held.nbytes)})" if held.bucket else "what is left of it"
    where = f"account {account.number}, {account.region}"
    if not yes and not click.confirm(f"Delete stack {name} in {where}: {what}, the function and its log?"):
        click.echo("nothing was deleted")
        raise click.exceptions.Exit(1)
    if left := take_down(account, name, _tell):
        raise GradShardingError(f"still there: {', '.join(left)}; run it again, or delete it in the console")
    click.echo(f"stack {name} is gone; nothing that is billed is left")


def bill_text(result: Result) -> str:
    """Memory and cost of a finished round, in list prices."""
    told = {report.invocation.request: report.invocation for report in result.reports if report.invocation}
    lines = [f"memory per function: {mib(result.plan.memory)} projected, {observed_memory(result)}"]
    if told:
        cold = sum(one.init_seconds is not None for one in told.values())
        largest, had = max(one.max_memory for one in told.values()), max(one.memory_size for one in told.values())
        lines.append(f"invocations: {len(told)}, {cold} of them cold starts; {mib(largest)} of {mib(had)} used")
    else:
        lines.append("invocations: Lambda told no figures, so that only requests to the store are counted")
    prices = load_prices(next((one.region for one in told.values() if one.region), HOME_REGION))
    billed = result.cost() or bill(result.reports, result.caller, result.plan, prices)
    return "\n".join([*lines, str(billed.aggregation), f"{prices.origin}; the clients' uploads are not in it"])


def _found(name: str) -> Deployed:
    found = Account().find(name)
    if not found or "Store" not in found.outputs:
        raise UserError(f"there is no stack {name!r} in this account and region; put it up with: gradsharding deploy{_named(name)}")
    return found


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,47}", name):
        raise UserError(f"{name!r} cannot name a stack; use up to 48 letters, digits and hyphens, a letter first")
    return name


def _named(name: str) -> str:
    return "" if name == "gradsharding" else f" --name {name}"


def _tell(line: str) -> None:
    click.echo(f"{line} …", err=True)
