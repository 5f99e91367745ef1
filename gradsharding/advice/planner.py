"""Which topology, how many shards, how much memory: the planner prices every choice, and recommends one with its reasons."""

import math
from collections.abc import Collection, Iterable, Iterator
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple

from gradsharding.advice.cost import GIB, Bill, ClientTraffic, Forecast, Storage, forecast
from gradsharding.advice.prices import PACKAGED, Money, Prices, load_prices
from gradsharding.advice.timing import Rates, Speeds, at_once, borne, bottleneck, cpu_rate, rates, suited, unlucky
from gradsharding.arithmetic.rules import MEAN, Rule, as_rule
from gradsharding.errors import UserError
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import MAX_PARTS, Limits, Plan
from gradsharding.planning.platform import (
    CHARGES,
    DEPLOYED_TIMEOUT,
    FIGURES,
    GRAIN,
    LARGEST_OBJECT,
    LARGEST_PUT,
    MEMORY,
    PAYLOAD,
    READING,
    ROUND_CONCURRENCY,
    RUNTIME,
    TIMEOUT,
    Architecture,
    Figure,
)
from gradsharding.planning.projection import commanded
from gradsharding.planning.topologies import TOPOLOGIES, Topology, make_topology
from gradsharding.rounds.records import RECORD
from gradsharding.running.pace import share
from gradsharding.sizes import mib
from gradsharding.stores.updates import inspection
from gradsharding.value import Value

MIB = 1 << 20

SIZES = tuple(size * MIB for size in (256, 384, 512, 640, 768, 1024, 1280, 1769, 2560, 3538, 5120, 7168, 10240))
"""Memory sizes of a function that are tried, beside the smallest that suffices; bytes."""

SMALLEST_SLICE = 1 << 20
"""Bytes. Smaller slices are not tried: their requests would be mostly latency."""

DEEP = 10_000
"""With more clients than this, trees of three levels are tried too."""

PRICE_TOLERANCE = Decimal("0.1")
"""Prefer the fastest plan that costs at most this share more than the cheapest."""

NEAR = 0.95
"""Share of a limit from which on a plan is said to be close to it."""


class Needs(Value):
    """The limits of a round, and where it would run."""

    deadline: float | None = None
    """Seconds within which 95 of 100 rounds must be finished."""
    budget: Money | None = None
    """US dollars that a round may cost, the clients' transfers and the storage included."""
    memory: int = MEMORY[-1]
    """Bytes of memory that one function may have."""
    timeout: int = DEPLOYED_TIMEOUT
    """Seconds that one function may run: the timeout that it is deployed with."""
    concurrency: int = ROUND_CONCURRENCY
    """Functions that may run at once."""
    architecture: Architecture = "arm64"
    storage: Storage = "standard"
    on_aws: bool = False
    """Whether the clients are in the bucket's region; otherwise their downloads are charged."""


class Bound(NamedTuple):
    """A limit that a plan exceeds, or comes close to."""

    limit: str
    """Its name: one of ``FIGURES``, or "deadline" or "budget"."""
    text: str
    """What the plan needs, and what is allowed."""
    fits: bool
    """Whether the plan keeps to the limit."""

    @property
    def figure(self) -> Figure | None:
        """The platform's limit; None if the limit is the user's own."""
        return FIGURES.get(self.limit)

    def __str__(self) -> str:
        """For people."""
        return f"{self.limit}: {self.text}"


class Option(NamedTuple):
    """A topology with its parameters and memory size, and its forecast."""

    plan: Plan
    memory: int
    """Bytes that its functions should have."""
    forecast: Forecast
    waves: int
    """How many times over the allowed number of functions must run, one after the other."""
    bound: Bound | None
    """The limit that it exceeds, or else the one that it comes close to; None if there is neither."""
    bottleneck: str
    """What its functions wait for most."""
    rates: Rates
    """Requests a second that its functions would make to S3 if they were not paced."""

    @property
    def problem(self) -> str | None:
        """The limit that it exceeds, with the numbers; None if it fits."""
        return str(self.bound) if self.bound and not self.bound.fits else None

    @property
    def limited_by(self) -> str:
        """The limit that it exceeds or comes close to, or else its bottleneck."""
        return str(self.bound or self.bottleneck)

    @property
    def name(self) -> str:
        """The topology."""
        return self.plan.topology

    @property
    def usd(self) -> Decimal:
        """Price of the aggregation."""
        return self.forecast.cost.aggregation.usd

    @property
    def shape(self) -> str:
        """The topology's parameters, for people; empty if it has none."""
        shards = f"{len(self.plan.slices):,} shards" if len(self.plan.slices) > 1 else ""
        fan_in = f"fan-in {self.plan.fan_ins[0]:,}" if len(self.plan.fan_ins) > 1 else ""
        return " and ".join(filter(None, (shards, fan_in)))


class Server(NamedTuple):
    """An always-on machine that would do the same work with ``gradsharding aggregate``."""

    name: str
    hour: Decimal
    """US dollars an hour."""
    seconds: float
    """Of one round, read from S3 at the machine's sustained network rate."""
    cheaper_from: Decimal | None
    """Rounds an hour from which on it is cheaper than the functions; None if it cannot run that many, or if no option fits."""

    @property
    def rounds_per_hour(self) -> float:
        """Rounds that it can run in an hour."""
        return 3600 / self.seconds


class Advice(NamedTuple):
    """Every topology at its best, and a recommendation."""

    options: tuple[Option, ...]
    best: Option | None
    sentences: tuple[str, ...]
    """What to take, why, and what limits it; or why nothing fits."""
    servers: tuple[Server, ...]
    missing: str | None
    """Which prices the region lacks, and where to get them; the options are then compared at the prices of ``HOME_REGION``."""


def recommend(
    manifest: Manifest,
    needs: Needs | None = None,
    *,
    prices: Prices | None = None,
    speeds: Speeds | None = None,
    shards: int | None = None,
    topologies: Collection[str] | None = None,
    rule: Rule | str = MEAN,
) -> Advice:
    """Plan every topology on Lambda and S3 at its best, and recommend the fastest of those that cost little more than the cheapest.

    ``shards`` fixes the number of slices; only ``topologies`` are considered, by default all that are registered and can apply the
    ``rule``. Nothing is read or run. Costs whose prices are missing from ``prices`` are unknown; the options are then compared at the
    packaged prices of ``HOME_REGION``. Raise UserError for a rule that does not exist, or does not fit the updates or a topology, for a
    topology that is not registered, for functions that Lambda does not offer, and for a budget if a price is missing.
    """
    needs = needs or Needs()
    if needs.memory > MEMORY[-1]:
        raise UserError(f"a function cannot have {mib(needs.memory)}; Lambda offers {mib(MEMORY[-1])} at most: allow no more")
    if needs.timeout > TIMEOUT:
        raise UserError(f"a function cannot run for {needs.timeout:,} s; Lambda offers {TIMEOUT:,} s at most: allow no more")
    prices = prices or load_prices()
    search = _Search(manifest, needs, prices.completed(load_prices(path=PACKAGED)), speeds or Speeds(), as_rule(rule))
    options = tuple(search.best_of(_ways(name, manifest, shards)) for name in (search.applicable if topologies is None else topologies))
    fit = [option for option in options if option.problem is None]
    best = _choose(fit)
    servers = search.servers(best) if not prices.lacking([f"lambda_second_{needs.architecture}", "lambda_request"]) else ()
    shown = tuple(option._replace(forecast=search.forecast(option.plan, option.memory, prices)) for option in options)
    missing = prices.lacking([name for option in shown for name in option.forecast.cost.round_trip.missing])
    if missing and needs.budget is not None:
        raise UserError(f"a budget cannot be kept without prices: {missing}")
    sentences = _reasons(best, fit, None if missing else best and best.usd)
    return Advice(shown, next((new for new, old in zip(shown, options, strict=True) if old is best), None), sentences, servers, missing)


def _ways(name: str, manifest: Manifest, shards: int | None) -> list[Topology]:
    """Return a topology with each choice of its options that is worth a try; raise UserError for an unknown name."""
    options = type(make_topology(name)).model_fields
    most = max(1, min(MAX_PARTS - 1, manifest.layout.elements, manifest.layout.nbytes // SMALLEST_SLICE))
    step = 1.8 if "fan_in" in options else 1.5  # fewer where each is tried with many trees
    counts = [shards] if shards else [*_ladder(1, most, step)]
    clients = len(manifest.terms)
    root, half = math.isqrt(clients), clients // 2  # with a larger fan-in, there would be one leaf
    fans = [fan for fan in _ladder(max(2, root // 8), min(half, 8 * root), 4) if 2 <= fan <= half]
    trees: list[dict[str, int]] = [{}, *({"fan_in": fan} for fan in fans if "fan_in" in options)]
    if clients > DEEP and "levels" in options:
        trees.append({"levels": 3})
    cuts = [{"shards": count} for count in counts] if "shards" in options else [{}]
    return [make_topology(name, **slices, **tree) for slices in cuts for tree in trees]


def _ladder(least: int, most: int, step: float) -> Iterable[int]:
    """Yield numbers from ``least`` to ``most``, each about ``step`` times the one before."""
    rung = float(least)
    while rung < most:
        yield int(rung)
        rung = max(rung * step, int(rung) + 1)
    yield max(least, most)


class _Search:
    """What all options of one search have in common."""

    def __init__(self, manifest: Manifest, needs: Needs, prices: Prices, speeds: Speeds, rule: Rule) -> None:
        self.manifest, self.needs, self.prices, self.speeds, self.rule = manifest, needs, prices, speeds, rule

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The setting of ``gradsharding aggregate`` with all objects in S3, and updates whose paths can be read in one way only."""
        record = self.manifest.json_bytes + RECORD
        headers = inspection(len(self.manifest.layout.header()), self.manifest.layout.nbytes) * len(self.manifest.terms)
        return {
            "home": CHARGES,
            "output": CHARGES,
            "sources": {CHARGES.kind: len(self.manifest.terms)},
            "intake": commanded({CHARGES.kind: headers}, CHARGES, record, emptied=True),
            "record_bytes": record,
            "overwrite": True,
            "reading": READING,
            "digest": self.rule.vouches,
        }

    @property
    def applicable(self) -> list[str]:
        """Names of the topologies that can apply the rule."""
        clients = len(self.manifest.terms)
        return [name for name in TOPOLOGIES if self.rule.merges or not make_topology(name).merges(clients)]

    @cached_property
    def term_bytes(self) -> float:
        """Bytes of a term in an invocation: the mean of the first hundred."""
        sample = self.manifest.terms[:100]
        return sum(len(term.model_dump_json()) + 1 for term in sample) / len(sample)

    def best_of(self, ways: Iterable[Topology]) -> Option:
        """Return the best option of some topologies, or the one that comes closest to fitting if none fits."""
        limits = Limits(memory=self.needs.memory)
        made = (way.plan(self.manifest, limits, grain=GRAIN, reading=READING, rule=self.rule) for way in ways)
        plans = [plan.placed(**self.setting) for plan in made]
        options = [option for plan in plans for option in self.options(plan)]
        return _choose(option for option in options if option.problem is None) or min(options, key=self.distance)

    def distance(self, option: Option) -> tuple[bool, float, float]:
        """Rank an option by how far it is from fitting: memory first, then time."""
        seconds = option.forecast.seconds
        return option.plan.memory > self.needs.memory - RUNTIME, max(seconds.longest, self.needs.timeout), seconds.p95

    def options(self, made: Plan) -> Iterator[Option]:
        """Yield the options of a plan: one for each memory size to try."""
        plans = {made.reading: made}
        needed = max(MEMORY[0], -(-(made.memory + RUNTIME) // MIB) * MIB)
        for memory in (needed, *(size for size in SIZES if needed < size <= self.needs.memory)):
            reading = suited(made, memory, self.needs.concurrency, self.speeds)
            if reading not in plans:
                plans[reading] = made.replace(reading=reading)
            plan = plans[reading]
            expected = self.forecast(plan, memory, self.prices)
            waves = plan.waves(Limits(memory=memory, concurrency=self.needs.concurrency))
            wanted = rates(plan, memory, self.needs.concurrency, self.speeds)
            bound = min(self.bounds(plan, memory, expected, waves, wanted), key=lambda bound: bound.fits, default=None)
            slowest = max((kind.task for kinds in plan.kinds for kind in kinds), key=lambda task: task.bytes_read)
            yield Option(plan, memory, expected, waves, bound, bottleneck(slowest, memory, self.speeds), wanted)

    def forecast(self, plan: Plan, memory: int, prices: Prices) -> Forecast:
        """Forecast a plan by functions of ``memory`` bytes."""
        return forecast(
            plan,
            prices,
            memory,
            architecture=self.needs.architecture,
            concurrency=self.needs.concurrency,
            speeds=self.speeds,
            storage=self.needs.storage,
            clients=ClientTraffic(on_aws=self.needs.on_aws),
        )

    def bounds(self, plan: Plan, memory: int, expected: Forecast, waves: int, wanted: Rates) -> Iterator[Bound]:
        """Yield the limits that a plan exceeds, or comes close to."""
        if waves > len(plan.fan_ins) and not wanted.much:
            yield Bound("concurrency", f"{plan.functions:,} functions run {self.needs.concurrency:,} at a time", fits=True)
        for limit, needed, allowed, text in self.measured(plan, memory, expected):
            if needed > NEAR * allowed:
                yield Bound(limit, text, fits=needed <= allowed)
        if wanted.much:
            yield request_rate(plan, memory, self.needs.concurrency, wanted, self.speeds)

    def measured(self, plan: Plan, memory: int, expected: Forecast) -> Iterator[tuple[str, float, float, str]]:
        """Yield each limit as its name, what the plan needs, what is allowed, and both in words."""
        needs, seconds, cost = self.needs, expected.seconds, expected.cost.round_trip.usd
        yield "memory", memory, needs.memory, f"a function needs {mib(memory)}, and may have {mib(needs.memory)}"
        parts = len(plan.slices) + 1
        yield "parts", parts, MAX_PARTS, f"{parts - 1:,} slices and a header are {parts:,} parts; an object may have {MAX_PARTS:,}"
        largest, result = max(kind.task.nbytes for kind in plan.kinds[-1]), plan.result_bytes
        yield "object size", result, LARGEST_OBJECT, f"the result has {mib(result)}; an object may have {mib(LARGEST_OBJECT)}"
        yield "part size", largest, LARGEST_PUT, f"a slice has {mib(largest)}; a part of an object may have {mib(LARGEST_PUT)}"
        named = max(kind.task.inputs for kind in plan.kinds[0]) * self.term_bytes
        yield "payload", named, PAYLOAD, f"the names of a function's updates take {mib(int(named))}; an invocation may have {mib(PAYLOAD)}"
        longest = unlucky(seconds.longest, self.speeds)
        more = "; raise it with --timeout, in deploy and in plan" if needs.timeout < longest <= TIMEOUT else ""
        text = f"the slowest function takes {longest:,.0f} s on a slow day; Lambda stops it after {needs.timeout:,} s{more}"
        yield "time limit", longest, needs.timeout, text
        if (deadline := needs.deadline) is not None:
            yield "deadline", seconds.p95, deadline, f"95 of 100 rounds take up to {seconds.p95:,.1f} s; the deadline is {deadline:g} s"
        if (budget := needs.budget) is not None:
            yield "budget", float(cost), float(budget), f"a round costs ${cost:.4f} in total; the budget is ${budget}"

    def servers(self, best: Option | None) -> tuple[Server, ...]:
        """Compare the machines of the price list with the functions."""
        compared = []
        nbytes = self.manifest.layout.nbytes * len(self.manifest.terms)
        for name, box in self.prices.boxes.items():
            rate = min(float(box.network_gbit) * 1e9 / 8, cpu_rate(box.vcpus, self.rule.effort(len(self.manifest.terms)), self.speeds))
            seconds = nbytes / rate + self.speeds.latency
            cheaper_from = None
            if best:  # both pay S3 for the same requests, so only the functions count
                items = best.forecast.cost.aggregation.items
                functions = Bill(items=tuple(item for item in items if item.name in ("functions", "invocations"))).usd
                rounds = box.hour / functions
                cheaper_from = rounds if rounds <= Decimal(3600 / seconds) else None
            compared.append(Server(name, box.hour, seconds, cheaper_from))
        return tuple(compared)


def request_rate(plan: Plan, memory: int, concurrency: int, wanted: Rates, speeds: Speeds | None = None) -> Bound:
    """Compare the requests that a plan would make to S3 each second with what one prefix serves; a plan that would make more is paced."""
    count, free = max(at_once(plan, concurrency)), borne((kind.task for kinds in plan.kinds for kind in kinds), memory, speeds)
    text = f"its functions would make {wanted.gets:,.0f} GETs a second, and one prefix of S3 serves {FIGURES['get rate'].value:,}"
    paced = f"; so each of {count:,} functions is held to {share(count).gets:,.1f}, and {free:,} at once would need no pacing"
    return Bound("get rate", text + (paced if wanted.much else ""), fits=True)


def _choose(fit: Iterable[Option]) -> Option | None:
    """Return the fastest of those that cost at most ``PRICE_TOLERANCE`` more than the cheapest; None if there are none."""
    options = [*fit]
    if not options:
        return None
    most = (1 + PRICE_TOLERANCE) * min(option.usd for option in options)
    return min((o for o in options if o.usd <= most), key=lambda o: (o.forecast.seconds.p50, o.usd, o.plan.functions))


def _reasons(best: Option | None, fit: list[Option], usd: Decimal | None) -> tuple[str, ...]:
    """Say in whole sentences what to take, why, and what limits it; ``usd`` is its price, if that is known."""
    if best is None:
        return ("No topology fits these limits.", "Allow more memory, concurrency, time or money.")
    shape = f" with {best.shape}" if best.shape else ""
    price = f" and {dollars_text(usd)}" if usd is not None else ""
    take = f"Take {best.name}{shape}: about {time_text(best.forecast.seconds.p50)}{price} a round."
    if best.bound:
        return take, _why(best, fit), f"Watch the {best.bound.limit}: {best.bound.text}."
    return take, _why(best, fit), f"Its speed is limited by {best.bottleneck}."


def _why(best: Option, fit: list[Option]) -> str:
    """Compare the best option with the cheapest and the fastest ones that fit."""
    if len(fit) == 1:
        return "No other topology fits."
    cheapest = min(fit, key=lambda o: (o.usd, o is not best))
    fastest = min(fit, key=lambda o: (o.forecast.seconds.p50, o is not best))
    faster, dearer = _pace(best, fastest), best.usd / cheapest.usd - 1
    but = f"; {fastest.name} is {faster:.1f} times as fast, but costs {fastest.usd / best.usd:.1f} times as much" if faster >= 1.05 else ""
    if best is cheapest:
        return f"It is the cheapest{but or ', and the fastest'}."
    price = f"{dearer:.0%} more than" if round(dearer, 2) else "as much as"
    return f"It costs {price} {cheapest.name}, the cheapest, and is {_pace(cheapest, best):.1f} times as fast{but}."


def _pace(option: Option, other: Option) -> float:
    """How many times as fast as ``option`` the other is."""
    return option.forecast.seconds.p50 / other.forecast.seconds.p50


def time_text(seconds: float) -> str:
    """Write a time for people, in the unit that suits.

    >>> time_text(11.04), time_text(148), time_text(1_583_640)
    ('11.0 s', '2.5 min', '439.9 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def dollars_text(usd: Decimal, like: Iterable[Decimal] = ()) -> str:
    """Write a price with three digits that count: of the least price among ``like``, if there are some, so that they compare.

    >>> dollars_text(Decimal("0.0018123")), dollars_text(Decimal(15634)), dollars_text(Decimal(2), like=[Decimal("0.0018")])
    ('$0.00181', '$15,634.00', '$2.00000')
    """
    least = min((price for price in (usd, *like) if price), default=Decimal(0))
    return f"${usd:,.{max(2, 2 - least.adjusted())}f}"


def flower_server(manifest: Manifest, prices: Prices) -> tuple[str, int] | None:
    """Return the cheapest machine that holds the updates and two models, as Flower's own server does, and the bytes; None if none does."""
    nbytes = (len(manifest.terms) + 2) * manifest.layout.nbytes
    roomy = [(box.hour, name) for name, box in prices.boxes.items() if box.memory_gib * GIB >= nbytes]
    return (min(roomy)[1], nbytes) if roomy else None
