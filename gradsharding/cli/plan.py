"""``gradsharding plan``: what is to be averaged, as options or updates, and the planner's advice, as text or as JSON."""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import click

from gradsharding.advice.cost import known
from gradsharding.advice.planner import Advice, Needs, Option, flower_server, recommend
from gradsharding.advice.prices import HOME_REGION, Prices, load_prices
from gradsharding.arithmetic.rules import Rule
from gradsharding.cli.advice import describe
from gradsharding.cli.command import command, completed_as, option
from gradsharding.cli.inputs import read_updates, sample_layout
from gradsharding.cli.options import SHARDS, any_size, chosen_rule, dollars, duration, memory_size, rule_options
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.platform import DEPLOYED_TIMEOUT, MEMORY, ROUND_CONCURRENCY, TIMEOUT
from gradsharding.planning.task import Term
from gradsharding.rounds.round import Round
from gradsharding.stores.memory import MemoryStore

MOST_CLIENTS = 100_000
"""Clients of a plan, at most: a list of more takes gigabytes."""

UPDATES, ALLOWED, PLACE, OUTPUT = "What to average", "What a round may take", "Where it would run", "Output"
"""Headings of the options."""


@command("plan")
@click.argument("updates", nargs=-1, metavar="[[ID=]PATH[:WEIGHT]...]", shell_complete=completed_as("file"))
@option("--size", "nbytes", type=any_size, metavar="SIZE", section=UPDATES, help="Bytes of the model's float32 parameters, such as 528MB.")
@option("--clients", type=click.IntRange(1, MOST_CLIENTS), metavar="N", section=UPDATES, help="Number of updates.")
@option(
    "--from",
    "place",
    metavar="PLACE",
    section=UPDATES,
    shell_complete=completed_as("file"),
    help="An update, or a directory or s3:// prefix of updates; only headers are read.",
)
@option("--shards", type=SHARDS, metavar="N", section=UPDATES, help="Number of slices.  [default: the best]")
@rule_options
@option("--deadline", type=duration, metavar="TIME", section=ALLOWED, help="Time in which 95 of 100 rounds must be finished, such as 60s.")
@option("--budget", type=dollars, metavar="USD", section=ALLOWED, help="Price of a round, transfers and storage included, such as 0.50.")
@option(
    "--memory",
    type=memory_size,
    metavar="SIZE",
    default=f"{MEMORY[-1] >> 20}MiB",
    show_default=True,
    section=ALLOWED,
    help="Memory of one function, at most.",
)
@option(
    "--timeout",
    type=click.IntRange(3, TIMEOUT),
    metavar="SECONDS",
    default=DEPLOYED_TIMEOUT,
    show_default=True,
    section=ALLOWED,
    help=f"Time of one function, as it is deployed; at most {TIMEOUT}.",
)
@option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    default=ROUND_CONCURRENCY,
    show_default=True,
    section=ALLOWED,
    help="Functions that run at once. The default is half of what AWS grants an account.",
)
@option("--region", default=HOME_REGION, show_default=True, section=PLACE, metavar="REGION", help="AWS region of the prices.")
@option(
    "--arch",
    "architecture",
    type=click.Choice(["arm64", "x86_64"]),
    default="arm64",
    show_default=True,
    section=PLACE,
    help="Processor of the functions.",
)
@option(
    "--storage",
    type=click.Choice(["standard", "express"]),
    default="standard",
    show_default=True,
    section=PLACE,
    help="S3 storage class. Express is priced, but not supported as a store yet.",
)
@option("--clients-on-aws", "on_aws", is_flag=True, section=PLACE, help="The clients are in the same region, so their downloads are free.")
@option("--detail", is_flag=True, section=OUTPUT, help="Also show requests, bytes, p95, round-trip prices and the limits of AWS.")
@option(
    "--json",
    "as_json",
    is_flag=True,
    section=OUTPUT,
    help="Print everything as JSON: sizes in bytes, times in seconds, prices in US dollars.",
)
def plan_command(
    updates: tuple[str, ...],
    nbytes: int | None,
    place: str | None,
    clients: int | None,
    shards: int | None,
    region: str,
    rule: Rule | None,
    *,
    exact: bool,
    detail: bool,
    as_json: bool,
    **needs: Any,
) -> None:
    """Compare the time, memory and price of each topology.

    \b
    Examples:
      gradsharding plan --size 528MB --clients 20
      gradsharding plan --size 14GB --clients 100 --deadline 60s --memory 3008MiB
      gradsharding plan --from s3://bucket/rounds/7/updates/ --budget 0.50
      gradsharding plan alice.safetensors:120 bob.safetensors:80 --json

    Nothing runs, and nothing but the headers of updates is read. Each topology is planned at its best for AWS Lambda and S3, and the
    fastest of those that cost at most 10% more than the cheapest is recommended.

    \b
    functions    tasks: one for each slice and group of clients
    memory       memory size that a function should have
    time         median of a round
    cost         functions and requests of a round, in US dollars

    \b
    With --detail:
    waves        times that the allowed number of functions must run in turn
    GET, PUT     requests of a round, at most, as S3 bills them:
                 GET and HEAD; PUT, COPY, POST and LIST
    p95          time that 95 of 100 rounds do not exceed
    aggregation  the cost above
    round trip   also the clients' transfers and an hour of storage

    Times come from a model that was compared with measurements of others (benchmarks/calibration.py); this project has never run on real
    AWS. Prices are list prices without free tiers: see `gradsharding prices`. With --exact, the figures of trees are upper bounds.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    manifest = _manifest(updates, nbytes, place, clients)
    prices, wanted = load_prices(region), Needs(**needs)
    advice = recommend(manifest, wanted, prices=prices, shards=shards, rule=chosen_rule(rule, exact=exact))
    if as_json:
        click.echo(json.dumps(_as_json(advice, manifest, wanted, prices), indent=2))
    else:
        for line in describe(advice, manifest, wanted, prices, detail=detail):
            click.echo(line)


def _manifest(updates: Sequence[str], nbytes: int | None, place: str | None, clients: int | None) -> Manifest:
    """Return a manifest of the updates, or of invented ones: with the tensors of a real update, or with one float32 tensor."""
    if bool(updates) + (place is not None) + (nbytes is not None) != 1 or (updates and clients):
        raise click.UsageError("Give one of these: --size and --clients; --from; updates.", click.get_current_context())
    if updates:
        round_ = Round.create(MemoryStore(), "plan")
        return round_.freeze(Manifest.of(round_.id, (update.contribution for update in read_updates(updates))))
    if place is not None:
        layout, there = sample_layout(place)
        count = clients or there
        if count is None:
            raise click.UsageError(f"{place} is one update: give --clients, too.", click.get_current_context())
    else:
        if clients is None or nbytes is None or nbytes < 4:
            raise click.UsageError("Give both --size, of at least 4 bytes, and --clients.", click.get_current_context())
        layout, count = Layout.of({"parameters": ("F32", (nbytes // 4,))}), clients
    version, source = '"0123456789abcdef0123456789abcdef"', "rounds/plan/updates/client-{:06d}.safetensors"  # as long as real ones may be
    terms = (Term(client=f"client-{i:06d}", source=source.format(i), version=version, base=0, weight=1) for i in range(count))
    return Manifest(round="plan", layout=layout, terms=tuple(terms))


def _as_json(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> dict[str, Any]:
    flower = flower_server(manifest, prices)
    return {
        "size": manifest.layout.nbytes,
        "clients": len(manifest.terms),
        "needs": needs.model_dump(mode="json"),
        "storage_supported": needs.storage == "standard",
        "rule": str(advice.options[0].plan.rule),
        "topologies": [_row(option) for option in advice.options],
        "recommended": advice.best.name if advice.best else None,
        "advice": advice.sentences,
        "servers": [
            {
                "name": s.name,
                "usd_hour": str(s.hour),
                "seconds": s.seconds,
                "rounds_an_hour": s.rounds_per_hour,
                "cheaper_from_rounds_an_hour": _number(s.cheaper_from),
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
        "limited_by": option.limited_by,
        "limit": option.bound.limit if option.bound else None,
        "figure": option.bound.figure._asdict() if option.bound and option.bound.figure else None,
    }


def _number(value: Decimal | None) -> float | None:
    return None if value is None else float(value)
