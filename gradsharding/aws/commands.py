"""``gradsharding deploy`` and ``destroy``: text in, the stack put up or taken down, text out."""

import re
from typing import Any

import click

from gradsharding.aws.stack import Account, Deployed, contents, put_up, take_down
from gradsharding.aws.wheels import MACHINES
from gradsharding.errors import GradShardingError, UserError
from gradsharding.plan import mib
from gradsharding.platform import DEPLOYED_RUNTIME, DEPLOYED_TIMEOUT, MEMORY, RUNTIMES, TIMEOUT
from gradsharding.prices import load_prices

name_option = click.option(
    "--name", default="gradsharding", show_default=True, callback=lambda _, __, name: _checked(name), help="Name of the stack."
)

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
    account = Account()
    up = put_up(account, name, parameters, _tell)
    store, executor = up.outputs["Store"], up.outputs["Executor"]
    click.echo(
        f"store:    {store}\nexecutor: {executor}\n\n"
        f"Try it:       gradsharding smoke{_named(name)}\n"
        f"Use it:       gradsharding aggregate {store}/in/a.safetensors:120 {store}/in/b.safetensors:80 "
        f"-o {store}/results/mean.safetensors --executor {executor}\n"
        f"              GradSharding(FedAvg(), store={store!r}, executor=open_executor({executor!r}))\n"
        f"Take it down: gradsharding destroy{_named(name)}\n\n"
        f"Left up and unused, {standing(account.region)}; "
        f"rounds are deleted after {up.parameters.get('ExpireDays', '7')} days, results stay."
    )


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


def standing(region: str) -> str:
    """Say what a stack costs that is left up and unused, as far as the prices of its region are known."""
    try:
        prices = load_prices(region)
    except UserError as error:
        return f"what it costs is not known: {error.message}"
    if not prices.figures:
        return f"what it costs is not known: {prices.origin}"
    lacks, known = prices.lacking(["alarm_month", "s3_gigabyte_month"]), prices.figures
    parts = [f"${ALARMS * known['alarm_month'].usd} a month for {ALARMS} alarms"] if "alarm_month" in known else []
    if "s3_gigabyte_month" in known:
        parts.append(f"${known['s3_gigabyte_month'].usd} for each GB-month that lies in its buckets")
    return f"it costs {', and '.join(parts)} (list prices of {region}{f'; {lacks}' if lacks else ''})"


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
