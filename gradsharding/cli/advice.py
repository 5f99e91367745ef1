"""The planner's advice as text: a table of what decides, a few sentences, and, if wanted, all figures."""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

import click
from pydantic import ByteSize

from gradsharding.advice.planner import Advice, Needs, Option, dollars_text, flower_server, request_rate, time_text
from gradsharding.advice.prices import HOME_REGION, Prices
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.platform import DIRECTORY_BUCKETS
from gradsharding.sizes import mib
from gradsharding.text import paragraph, table

NONE = "-"
"""What a cell holds that does not apply."""


def describe(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices, *, detail: bool = False) -> Iterator[str]:
    """Yield the lines of an advice."""
    count, size = len(manifest.terms), mib(manifest.layout.nbytes)
    yield paragraph(f"{count:,} updates of {size}; a function may have {_memory(needs.memory)}, and {needs.concurrency:,} may run at once")
    yield ""
    yield from _marked(advice, _main_table(advice))
    if detail:
        yield from ("", "Requests and bytes of a round, at most", "", *_marked(advice, _request_table(advice)))
        yield from ("", "Times and prices of a round", "", *_marked(advice, _price_table(advice)))
    yield ""
    yield from map(paragraph, advice.sentences)
    yield from map(paragraph, _refusals(advice))
    yield ""
    notes = [*_money(advice, manifest, needs, prices), *_servers(advice, manifest, needs, prices), *_notes(advice, needs)]
    if detail:
        notes += [*_rates(advice.best, needs), *_figures(advice)]
    yield from map(paragraph, notes)
    yield paragraph(
        f"Times are modelled medians{f', prices are {prices.origin}' if prices.figures else ''}. This has never run on real AWS."
    )


def _marked(advice: Advice, lines: Iterator[str]) -> Iterator[str]:
    """Mark the row of the recommended option with ``*``, and those of options that do not fit with ``x``."""
    yield from (f"  {next(lines)}", f"  {next(lines)}")
    for option, line in zip(advice.options, lines, strict=True):
        if option is advice.best:
            yield click.style(f"* {line}", bold=True)
        else:
            yield click.style(f"x {line}", dim=True) if option.problem else f"  {line}"


def _main_table(advice: Advice) -> Iterator[str]:
    known = [usd for option in advice.options if (usd := option.forecast.cost.aggregation.known) is not None]
    rows = [
        (
            option.name,
            f"{len(option.plan.slices):,}",
            f"{option.plan.fan_ins[0]:,}" if len(option.plan.fan_ins) > 1 else NONE,
            f"{option.plan.functions:,}",
            _memory(option.memory),
            time_text(option.forecast.seconds.p50),
            _price(option.forecast.cost.aggregation.known, known),
        )
        for option in advice.options
    ]
    return table(("topology", "shards", "fan-in", "functions", "memory", "time", "cost"), rows)


def _request_table(advice: Advice) -> Iterator[str]:
    rows = [
        (
            option.name,
            f"{option.waves:,}",
            f"{option.plan.gets:,}",
            f"{option.plan.puts:,}",
            _bytes(option.plan.bytes_read),
            _bytes(option.plan.bytes_written),
        )
        for option in advice.options
    ]
    return table(("topology", "waves", "GET", "PUT", "read", "written"), rows)


def _price_table(advice: Advice) -> Iterator[str]:
    costs = [option.forecast.cost for option in advice.options]
    known = [usd for cost in costs if (usd := cost.aggregation.known) is not None]
    rows = [
        (
            option.name,
            time_text(option.forecast.seconds.p50),
            time_text(option.forecast.seconds.p95),
            _price(cost.aggregation.known, known),
            _price(cost.round_trip.known, known),
        )
        for option, cost in zip(advice.options, costs, strict=True)
    ]
    return table(("topology", "p50", "p95", "aggregation", "round trip"), rows)


def _refusals(advice: Advice) -> Iterator[str]:
    """Say which topologies do not fit, and why; those with the same reason together."""
    names: dict[str, list[str]] = {}
    for option in advice.options:
        if option.bound and not option.bound.fits:
            names.setdefault(str(option.bound), []).append(option.name)
    for reason, those in names.items():
        *first, last = those
        subject = f"{', '.join(first)} and {last} do" if first else f"{last} does"
        yield f"{subject} not fit: {reason}."


def _money(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> Iterator[str]:
    """Say which prices are missing, and what the clients' downloads cost."""
    if advice.missing:
        yield f"{_capital(advice.missing)}. The topologies are compared at the list prices of {HOME_REGION}."
    if not needs.on_aws and not prices.lacking(["transfer_out_gigabyte"]):
        moved = Decimal(len(manifest.terms) * manifest.layout.nbytes) / (1 << 30) * prices.usd("transfer_out_gigabyte")
        yield f"The clients' downloads of the new model cost another {dollars_text(moved)} a round, whatever the topology."


def _servers(advice: Advice, manifest: Manifest, needs: Needs, prices: Prices) -> Iterator[str]:
    """Compare with the cheapest always-on machine that meets the deadline, and with Flower's own server."""
    if quick := [server for server in advice.servers if needs.deadline is None or server.seconds <= needs.deadline]:
        server = min(quick, key=lambda s: (s.hour, s.name))
        machine = f"an always-on {server.name} (${server.hour} an hour, {time_text(server.seconds)} a round)"
        most = f"{server.rounds_per_hour:,.1f} rounds an hour"
        if not advice.best:
            yield f"{_capital(machine)} can run {most}."
        elif server.cheaper_from is None:
            yield f"Lambda is cheaper than {machine} at every rate that this machine can sustain."
        else:
            yield f"{_capital(machine)} is cheaper than Lambda from {server.cheaper_from:,.1f} rounds an hour on; it can run {most}."
    if flower := flower_server(manifest, prices):
        name, nbytes = flower
        yield f"Flower's own server would hold {_bytes(nbytes)} in memory: {name}, ${prices.boxes[name].hour} an hour."


def _notes(advice: Advice, needs: Needs) -> Iterator[str]:
    rule = advice.options[0].plan.rule
    if any(kind.task.varies for option in advice.options for kinds in option.plan.kinds for kind in kinds):
        yield f"With {rule}, the figures of trees are upper bounds."
    if rule.vouches:
        yield f"With {rule}, the result is read once, for its digest; the figures include that."
    if not rule.merges:
        yield f"With {rule}, there are no trees: a function needs all values of an element at once."
    if not rule.weighs:
        yield f"With {rule}, weights do not count: each client counts the same."
    if needs.storage == "express":
        yield f"S3 Express is {'' if advice.missing else 'priced, but '}not supported as a store yet: {DIRECTORY_BUCKETS}."


def _rates(best: Option | None, needs: Needs) -> Iterator[str]:
    """State the rate of requests to S3, if it is a good part of what S3 serves and is not stated as a limit already."""
    if best and best.rates.busy:
        bound = request_rate(best.plan, best.memory, needs.concurrency, best.rates)
        if best.bound != bound:
            yield f"{_capital(bound.text)}."


def _figures(advice: Advice) -> Iterator[str]:
    """State the limits of AWS that matter here, with their sources."""
    shown = [option.bound for option in advice.options if option.bound and (option is advice.best or option.problem)]
    for figure in dict.fromkeys(bound.figure for bound in shown if bound.figure):
        most = {"bytes": mib, "seconds": "{:,} s".format}.get(figure.unit, "{:,}".format)(figure.value)
        yield f"AWS's limit for the {figure.of}: {most}{figure.note and f' ({figure.note})'}. Source, of {figure.date}: {figure.source}"


def _price(usd: Decimal | None, others: Sequence[Decimal]) -> str:
    return "no price" if usd is None else dollars_text(usd, others)


def _memory(nbytes: int) -> str:
    return f"{nbytes >> 20:,} MiB"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _bytes(count: int) -> str:
    """Write a number of bytes for people, in the unit that suits."""
    return re.sub(r"(?<=\d)(?=[A-Z])", " ", ByteSize(count).human_readable())
