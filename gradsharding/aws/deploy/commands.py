"""``gradsharding deploy``, ``status`` and ``destroy`` create, show and delete a stack."""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import click

from gradsharding.advice.prices import load_prices
from gradsharding.aws.deploy.account import Account, Stack
from gradsharding.aws.deploy.code import zipped
from gradsharding.aws.deploy.drift import checked, drift
from gradsharding.aws.deploy.options import NAMED, SERVICE_ROLE, chosen, deploy_options
from gradsharding.aws.deploy.stack import Change, Order, interrupted, put_up
from gradsharding.aws.deploy.teardown import Bucket, Cleared, Doomed, doomed, take_down
from gradsharding.errors import UserError
from gradsharding.sizes import mib
from gradsharding.text import columns, paragraph

name_option = click.option(
    "--name", default="gradsharding", show_default=True, callback=lambda _, __, name: _checked(name), help="Name of the stack."
)

ALARMS = 2
"""CloudWatch alarms of the template."""


@click.command()
@name_option
@deploy_options
def deploy(name: str, **options: Any) -> None:
    """Create or update the bucket and the function on AWS.

    \b
    Examples:
      gradsharding deploy
      gradsharding deploy --name trial --memory 1769 --expire-days 3

    It shows what will be created, changed and deleted, and asks first. In an update, an option that is not given keeps its value; an empty
    value, such as --kms-key "", resets it.

    Endpoint, region and credentials come from the usual AWS environment variables and profiles.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    asked, account = chosen(options), Account()
    order = Order(
        name, asked.parameters, asked.tags, asked.service_role, asked.termination_protection, asked.code_bucket, adopt=asked.adopt
    )
    with _recoverable(account, name):
        make = partial(zipped, locked=asked.locked)
        up = put_up(
            account,
            order,
            lambda changes: _agree(_table(changes), f"Make these changes to stack {name} in {account}?", yes=asked.yes),
            _tell,
            make,
        )
        if not up:
            click.echo("nothing was changed")
            raise click.exceptions.Exit(1)
        checked(account, up)
    store, executor = up.outputs["Store"], up.outputs["Executor"]
    click.echo(
        f"store:    {store}\nexecutor: {executor}\n\n"
        f"Try it:       gradsharding smoke{_named(name)}\n"
        f"Use it:       gradsharding aggregate {store}/in/a.safetensors:120 \\\n"
        f"                {store}/in/b.safetensors:80 \\\n"
        f"                -o {store}/results/mean.safetensors \\\n"
        f"                --executor {executor}\n"
        f"              GradSharding(FedAvg(), store={store!r}, executor=open_executor({executor!r}))\n"
        f"Take it down: gradsharding destroy{_named(name)}\n\n" + paragraph(f"Left up and unused, {standing(account.region)}; {_kept(up)}.")
    )


@click.command()
@name_option
def status(name: str) -> None:
    """Show what is deployed, and whether it is intact.

    \b
    Examples:
      gradsharding status
      gradsharding status --name trial

    It shows the stack's state, outputs and parameters, and compares each resource with what was deployed. If anything is missing or was
    changed, it ends with status 1.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    account = Account()
    up = _found(account, name)
    click.echo(f"stack {name} in {account}: {up.status}{', with termination protection' if up.protected else ''}")
    for title, values in (("outputs", up.outputs), ("parameters", up.parameters), ("tags", up.tags)):
        click.echo(f"{title}:" + "".join(f"\n  {key:<20} {value}" for key, value in sorted(values.items())))
    unseen = list[str]()
    wrong = drift(account, up, unseen.append)
    well = "all of it is there" if unseen else "all of it is there, and as it was deployed"
    click.echo("\n".join([*([f"wrong: {fault}" for fault in wrong] or [well]), *unseen]))
    if wrong:
        raise click.exceptions.Exit(1)


@click.command()
@name_option
@click.option("--delete-data", is_flag=True, help="Delete the bucket, too, with all that is in it.")
@SERVICE_ROLE.option()
@click.option("--yes", is_flag=True, help="Do not ask.")
def destroy(name: str, *, delete_data: bool, service_role: str | None, yes: bool) -> None:
    """Delete the deployed stack; its data stays by default.

    \b
    Examples:
      gradsharding destroy
      gradsharding destroy --name trial --delete-data

    It deletes the stack, its log and the function's code, and asks first. The bucket stays, with its data, unless --delete-data is given.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    account = Account()
    with _recoverable(account, name):
        targets = doomed(account, name, _tell)
        if not targets.stack and not (delete_data and (targets.buckets or targets.hidden)):
            cleared = take_down(account, name, targets, data=False, tell=_tell)  # remains of an interrupted run
            _say_gone(account, name, targets, cleared)
            return
        if not _agree(_listed(targets, data=delete_data), f"Delete stack {name} in {account}?", yes=yes):
            click.echo("nothing was deleted")
            raise click.exceptions.Exit(1)
        cleared = take_down(account, name, targets, data=delete_data, tell=_tell, role=service_role)
    click.echo(f"stack {name} in {account} is gone")
    _say_left(name, [*([] if delete_data else targets.buckets), *targets.earlier], targets, cleared)


def _listed(targets: Doomed, *, data: bool) -> str:
    """List what is deleted and what stays, one per line."""
    rows: list[tuple[str, ...]] = [
        ("keep" if resource.logical in targets.kept else "delete", resource.logical, resource.type, resource.physical)
        for resource in targets.resources
    ]
    lines = [_columns(rows)] if rows else []
    lines += [f"  {'delete' if data else 'keep  '}  {_weighed(bucket)}" for bucket in targets.buckets]
    lines += [f"  keep    {_weighed(bucket)}, which an earlier stack has left" for bucket in targets.earlier]
    lines += [f"  keep    bucket {targets.brought}, which the stack was given"] if targets.brought else []
    return "\n".join([*lines, *(f"  keep    {_hidden(bucket)}" for bucket in targets.hidden)])


def _say_gone(account: Account, name: str, targets: Doomed, cleared: Cleared) -> None:
    """Say that the stack is gone; raise UserError if it never existed here, as it may be in another region."""
    if not cleared.objects and not targets.buckets and not targets.hidden and not account.deleted(name):
        raise UserError(
            f"there is no stack {name} in {account}, and none was deleted there in the last 90 days; nothing was deleted now. "
            "If it is in another region, set AWS_DEFAULT_REGION"
        )
    more = f"; so is its code now, {cleared.objects} objects" if cleared.objects else " already"
    click.echo(f"stack {name} in {account} is gone{more}")
    _say_left(name, targets.buckets, targets, cleared)


def _say_left(name: str, left: list[Bucket], targets: Doomed, cleared: Cleared) -> None:
    for bucket in left:
        click.echo(f"left: {_weighed(bucket)}; its storage is billed. Delete it with: gradsharding destroy{_named(name)} --delete-data")
    others = [f"bucket {targets.brought}, which the stack was given, with its objects"] if targets.brought else []
    others += [*map(_hidden, targets.hidden), *([cleared.kept] if cleared.kept else [])]
    for other in others:
        click.echo(f"left: {other}")
    if not left and not others:
        click.echo("nothing that is billed is left")


def _hidden(bucket: str) -> str:
    return f"bucket {bucket}, which these credentials may not read: it may hold data of this stack"


def _weighed(bucket: Bucket) -> str:
    return f"bucket {bucket.name} with {'more than ' if bucket.more else ''}{bucket.objects} objects ({mib(bucket.nbytes)})"


def _table(changes: list[Change]) -> str:
    """List changes in columns, one per line."""
    return _columns([(change.action, change.logical, change.type, change.physical) for change in changes])


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Lay out rows in columns; if they are wider than the terminal, the last column goes below the others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    below = f"\n{' ' * (widths[0] + 4)}" if sum(widths) + 2 * len(widths) > columns() else "  "
    lines = []
    for *cells, last in rows:
        line = "  ".join(f"{text:<{width}}" for text, width in zip(cells, widths, strict=False)).rstrip(" " if below[0] == "\n" else "")
        lines.append(f"  {line}{below if last else ''}{last}".rstrip())
    return "\n".join(lines)


def _agree(changes: str, question: str, *, yes: bool) -> bool:
    """Show changes, and ask whether to make them; raise UserError without a terminal."""
    click.echo(changes)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("this asks before it changes anything, and there is no terminal to ask at; run it again with --yes")
    return click.confirm(question)


@contextlib.contextmanager
def _recoverable(account: Account, name: str) -> Iterator[None]:
    """On an interruption within, say what is left and how to continue."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, click.Abort):
        _tell("stopped; checking what is there now")
        click.echo(interrupted(account, name), err=True)
        raise


def _kept(stack: Stack) -> str:
    """Say which data of a stack is deleted, and when."""
    if bucket := stack.parameters.get("ExistingBucket"):
        return f"objects in {bucket} are deleted by its own rules; deploy/README.md has the rules that rounds need"
    return f"rounds are deleted after {stack.parameters.get('ExpireDays', '7')} days, results stay"


def standing(region: str) -> str:
    """Say what an unused stack costs, as far as the prices of its region are known."""
    try:
        prices = load_prices(region)
    except UserError as error:
        return f"what it costs is not known: {error.message}"
    if not prices.figures:
        return f"what it costs is not known: {prices.origin}"
    lacks, known = prices.lacking(["alarm_month", "s3_gigabyte_month"]), prices.figures
    parts = [f"${ALARMS * known['alarm_month'].usd} a month for {ALARMS} alarms"] if "alarm_month" in known else []
    if "s3_gigabyte_month" in known:
        parts.append(f"${known['s3_gigabyte_month'].usd} for each GB-month in its buckets")
    return f"it costs {', and '.join(parts)} (list prices of {region}{f'; {lacks}' if lacks else ''})"


def _found(account: Account, name: str) -> Stack:
    found = account.find(name)
    if not found or found.empty:
        raise UserError(
            f"there is no stack {name!r} in {account}; deploy it with: gradsharding deploy{_named(name)}, "
            "or set AWS_DEFAULT_REGION to its region"
        )
    return found


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,47}", name):  # older releases made stacks with names of up to 48
        raise UserError(f"{name!r} cannot name a stack; use up to {NAMED} letters, digits and hyphens, a letter first")
    return name


def _named(name: str) -> str:
    return "" if name == "gradsharding" else f" --name {name}"


def _tell(line: str) -> None:
    click.echo(f"{line} …", err=True)
