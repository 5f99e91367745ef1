"""``gradsharding plan``: the planner's advice, as a table or as JSON."""

import contextlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import click
from pydantic import ByteSize
from rich import box
from rich.console import Console
from rich.table import Table

from gradsharding.advice.cost import known
from gradsharding.advice.planner import Advice, Needs, Option, Server, flower_server, recommend, requests
from gradsharding.advice.prices import HOME_REGION, Prices, load_prices
from gradsharding.cli.inputs import found, read_updates
from gradsharding.errors import UserError
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import MAX_PARTS
from gradsharding.planning.platform import DEPLOYED_TIMEOUT, DIRECTORY_BUCKETS, MEMORY, ROUND_CONCURRENCY, TIMEOUT, Figure
from gradsharding.planning.task import Term
from gradsharding.rounds.round import Round
from gradsharding.sizes import mib, size, some
from gradsharding.stores.memory import MemoryStore

MOST_CLIENTS = 100_000
"""Clients that a plan is made for: with more, a list of them alone takes gigabytes."""

UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def model_size(text: str) -> int:
    """Read a size, in bytes."""
    with _as_usage():
        return size(text)


def memory_size(text: str) -> int:
    """Read a size of memory, in bytes, which is more than nothing."""
    with _as_usage():
        return some(size(text))


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    """Tell a mistake as one in an option."""
    try:
        yield
    except UserError as error:
        raise click.BadParameter(f"{error.message}.") from None


def duration(text: str) -> float:
    """Read a number of seconds, with a unit or without."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text)
    if not parts or float(parts[1]) == 0:
        raise click.BadParameter(f"{text!r} is not a time; write it like 60s, 5m or 1h.")
    return float(parts[1]) * UNITS[parts[2]]


def dollars(text: str) -> Decimal:
    """Read a sum in US dollars."""
    if not re.fullmatch(r"\$?\d+(\.\d+)?", text):
        raise click.BadParameter(f"{text!r} is not a sum; write it in US dollars, like 0.05.")
    return Decimal(text.removeprefix("$"))


exact_option = click.option("--exact", is_flag=True, help="Sum exactly: the same bits, whatever the path.")


@click.command("plan", short_help="Show what each topology takes, before anything runs.")
@click.argument("updates", nargs=-1, metavar="[[ID=]PATH[:WEIGHT]...]")
@click.option("--size", "nbytes", type=model_size, metavar="SIZE", help="Bytes of the model's float32 parameters, such as 528MB.")
@click.option("--from", "place", metavar="PLACE", help="A real update, or a directory or s3:// prefix of some: their headers are read.")
@click.option("--clients", type=click.IntRange(1, MOST_CLIENTS), metavar="N", help="Number of updates.")
@click.option("--shards", type=click.IntRange(1, MAX_PARTS - 1), metavar="N", help="Number of slices.  [default: what is best]")
@click.option("--deadline", type=duration, metavar="TIME", help="95 rounds of 100 must be done within this.")
@click.option("--budget", type=dollars, metavar="USD", help="A round may cost this, all in all.")
@click.option(
    "--memory", type=memory_size, metavar="SIZE", default=f"{MEMORY[-1] >> 20}MiB", show_default=True, help="That one function may have."
)
@click.option(
    "--timeout",
    type=click.IntRange(3, TIMEOUT),
    metavar="SECONDS",
    default=DEPLOYED_TIMEOUT,
    show_default=True,
    help=f"That one function may take: as it is deployed, at most {TIMEOUT}.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    default=ROUND_CONCURRENCY,
    show_default=True,
    help="Functions at once: by default, half of what AWS gives an account, as a round takes it.",
)
@click.option(
    "--arch", "architecture", type=click.Choice(["arm64", "x86_64"]), default="arm64", show_default=True, help="Of the functions."
)
@click.option(
    "--storage",
    type=click.Choice(["standard", "express"]),
    default="standard",
    show_default=True,
    help="S3's storage class. Express is priced, and not supported as a store yet.",
)
@click.option("--region", default=HOME_REGION, show_default=True, help="Whose prices count.")
@click.option("--clients-on-aws", "on_aws", is_flag=True, help="The clients are in that region: their downloads are free.")
@exact_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes, times in seconds and sums in US dollars.")
def plan_command(
    updates: tuple[str, ...],
    nbytes: int | None,
    place: str | None,
    clients: int | None,
    shards: int | None,
    region: str,
    *,
    exact: bool,
    as_json: bool,
    **needs: Any,
) -> None:
    """Show what each topology takes on AWS Lambda and S3, side by side, before anything runs, and which to take.

    \b
    Examples:
      gradsharding plan --size 528MB --clients 20
      gradsharding plan --size 14GB --clients 100 --deadline 60s --memory 3008MiB --json
      gradsharding plan --from s3://bucket/rounds/7/updates/ --budget 0.50
      gradsharding plan alice.safetensors:120 bob.safetensors:80

    \b
    functions             tasks, one for each slice and group of clients
    waves                 how many times over the functions at once must run
    memory                what a function should have; what it projects is below that
    gets, puts            requests to S3 in a whole round, at most: GET and HEAD; PUT, COPY, POST and LIST
    read, written         bytes of all that, at most
    p50, p95              time of half of all rounds, and of 95 of 100
    aggregation           US dollars a round for the functions and all these requests
    round trip            that, the clients' uploads and downloads, and an hour of storage

    Times come from a model that was held against measurements of others (benchmarks/calibration.py); this project has never
    run on AWS. Prices are list prices, without free tiers: see `gradsharding prices`.

    With --exact, what passes between the functions of a tree takes as many bytes as the updates' values need; memory, requests, bytes,
    times and prices of trees are then upper bounds.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    manifest = _manifest(updates, nbytes, place, clients)
    prices, wanted = load_prices(region), Needs(**needs)
    advice = recommend(manifest, wanted, prices=prices, shards=shards, arithmetic="exact" if exact else "float64")
    if as_json:
        click.echo(json.dumps(_as_json(advice, manifest, wanted, prices), indent=2))
    else:
        _show(advice, manifest, wanted, prices)


def _manifest(updates: Sequence[str], nbytes: int | None, place: str | None, clients: int | None) -> Manifest:
    """Seal the updates, or made-up ones: alike one that is there, or of one float32 tensor."""
    if bool(updates) + (place is not None) + (nbytes is not None) != 1 or (updates and clients):
        raise click.UsageError("Give --size and --clients, --from, or updates.", click.get_current_context())
    if updates:
        round_ = Round.create(MemoryStore(), "plan")
        return round_.freeze(Manifest.of(round_.id, (update.contribution for update in read_updates(updates))))
    if place is not None:
        layout, there = found(place)
        count = clients or there
        if not count:
            raise click.UsageError(f"{place} is one update: give --clients, too.", click.get_current_context())
    else:
        if clients is None or nbytes is None or nbytes < 4:
            raise click.UsageError("Give both --size, of at least 4 bytes, and --clients.", click.get_current_context())
        layout, count = Layout.of({"parameters": ("F32", (nbytes // 4,))}), clients
    version, source = '"0123456789abcdef0123456789abcdef"', "rounds/plan/updates/client-{:06d}.safetensors"  # as long as they may be
    terms = (Term(client=f"client-{i:06d}", source=source.format(i), version=version, base=0, weight=1) for i in range(count))
    return Manifest(round="plan", layout=layout, terms=tuple(terms))


def _as_json(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> dict[str, Any]:
    flower = flower_server(manifest, prices)
    return {
        "size": manifest.layout.nbytes,
        "clients": len(manifest.terms),
        "needs": needs.model_dump(mode="json"),
        "storage_supported": needs.storage == "standard",
        "arithmetic": advice.options[0].plan.arithmetic,
        "topologies": [_row(option) for option in advice.options],
        "recommended": advice.best.name if advice.best else None,
        "why": advice.why,
        "servers": [
            {
                "name": s.name,
                "usd_hour": str(s.hour),
                "seconds": s.seconds,
                "most_rounds_an_hour": s.most,
                "worth_from": _number(s.worth_from),
            }
            for s in advice.servers
        ],
        "flower_server": {"name": flower[0], "bytes": flower[1]} if flower else None,
        "prices": prices.origin,
        "prices_missing": advice.missing,
    }


def _row(option: Option) -> dict[str, Any]:
    plan, (seconds, cost) = option.plan, option.forecast
    return {
        "topology": option.name,
        "shards": len(plan.slices),
        "fan_in": plan.fan_ins[0] if len(plan.fan_ins) > 1 else None,
        "levels": len(plan.fan_ins),
        "functions": plan.functions,
        "waves": option.waves,
        "memory": plan.memory,
        "function_memory": option.memory,
        "gets": plan.gets,
        "puts": plan.puts,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "seconds": {"p50": seconds.p50, "p95": seconds.p95},
        "requests_a_second": {"gets": option.rates.gets, "puts": option.rates.puts, "paced": option.rates.much},
        "usd": {"aggregation": known(cost.aggregation.known), "round_trip": known(cost.round_trip.known)},
        "fits": option.problem is None,
        "problem": option.problem,
        "binds": option.binds,
        "limit": option.bound.limit if option.bound else None,
        "figure": option.bound.figure._asdict() if option.bound and option.bound.figure else None,
    }


def _number(value: Decimal | None) -> float | None:
    return None if value is None else float(value)


def _show(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> None:
    layout, count = manifest.layout, len(manifest.terms)
    click.echo(f"{count} updates of {mib(layout.nbytes)}; a function may have {mib(needs.memory)}, {needs.concurrency:,} at once")
    table = Table("topology", "", box=box.SIMPLE_HEAD)
    for column in ("functions", "waves", "memory", "gets", "puts", "read", "written", "p50", "p95", "aggregation", "round trip"):
        table.add_column(column, justify="right")
    for option in advice.options:
        plan, (seconds, cost) = option.plan, option.forecast
        table.add_row(
            option.name,
            option.shape,
            f"{plan.functions:,}",
            f"{option.waves:,}",
            f"{option.memory >> 20:,} MiB",
            f"{plan.gets:,}",
            f"{plan.puts:,}",
            _bytes(plan.bytes_read),
            _bytes(plan.bytes_written),
            f"{seconds.p50:,.1f} s",
            f"{seconds.p95:,.1f} s",
            *("no price" if bill.known is None else f"${bill.known:,.5f}" for bill in cost),
            style="bold" if option is advice.best else None,
        )
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    for option in advice.options:
        if option.problem:
            click.echo(f"{option.name} does not fit: {option.problem}.")
    click.echo(textwrap.fill(f"Take {advice.best.name}: {advice.why}." if advice.best else f"{_capital(advice.why)}.", 150))
    shown = [option.bound for option in advice.options if option.bound and (option is advice.best or option.problem)]
    for figure in dict.fromkeys(bound.figure for bound in shown if bound.figure):
        click.echo(f"AWS allows {_figure(figure)}.")
    if advice.options[0].plan.arithmetic == "exact":
        click.echo("Exact sums: a tree's figures are upper bounds, and each takes in that the result is read once, for its digest.")
    if needs.storage == "express":
        click.echo(f"S3 Express is {'' if advice.missing else 'priced, and '}not supported as a store yet: {DIRECTORY_BUCKETS}.")
    for line in (*_money(advice, manifest, needs, prices), *_rates(advice.best, needs), *_servers(advice, manifest, needs, prices)):
        click.echo(line)
    click.echo(_capital(f"{prices.origin}; times are modelled." if prices.figures else "times are modelled."))


def _money(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> Iterator[str]:
    """Say which prices are missing, and what downloads cost."""
    if advice.missing:
        yield _capital(advice.missing)
    if not needs.on_aws and not prices.lacking(["transfer_out_gigabyte"]):
        moved = Decimal(len(manifest.terms) * manifest.layout.nbytes) / (1 << 30) * prices.usd("transfer_out_gigabyte")
        yield f"Of each round trip, ${moved:,.5f} are downloads of the new model through the internet, whatever the topology."


def _rates(best: Option | None, needs: Needs) -> list[str]:
    """Say how fast S3 would be asked, where that is a good part of what it bears, and is not said yet."""
    bound = requests(best.plan, best.memory, needs.concurrency, best.rates) if best and best.rates.busy else None
    return [f"{bound.says}."] if bound and best and best.bound != bound else []


def _servers(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> list[str]:
    """Say what an always-on machine would cost, and from how many rounds an hour on it would be cheaper."""
    lines = []
    if advice.servers:
        quick = [s for s in advice.servers if needs.deadline is None or s.seconds <= needs.deadline]
        server: Server = min(quick or advice.servers, key=lambda s: (s.hour, s.name))
        worth = f"from {server.worth_from:,.0f} rounds an hour on" if server.worth_from is not None else "at no number of rounds"
        lines.append(
            f"An always-on {server.name}, ${server.hour} an hour, takes {server.seconds:,.1f} s a round, "
            f"{server.most:,.1f} an hour at most, and is cheaper {worth}."
        )
    if flower := flower_server(manifest, prices):
        name, nbytes = flower
        lines.append(f"Flower's own server would hold {_bytes(nbytes)}: {name}, ${prices.boxes[name].hour} an hour.")
    return lines


def _figure(figure: Figure) -> str:
    """Say what the platform allows, and who says so."""
    most = {"bytes": mib, "seconds": "{:,} s".format}.get(figure.unit, "{:,}".format)(figure.value)
    return f"{figure.of}: {most} at most ({figure.source}, {figure.date}{figure.note and f'; {figure.note}'})"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _bytes(count: int) -> str:
    """Write a number of bytes for people, in the unit that suits."""
    return re.sub(r"(?<=\d)(?=[A-Z])", " ", ByteSize(count).human_readable())
