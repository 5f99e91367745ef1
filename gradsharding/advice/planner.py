"""Which topology, how many shards, how much memory: every way is planned and priced, and the one to take is named with its reason."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple

from gradsharding.advice.cost import GIB, Bill, Clients, Forecast, Storage, forecast
from gradsharding.advice.prices import HOME_REGION, PACKAGED, Money, Prices, load_prices
from gradsharding.advice.timing import Rates, Speeds, at_once, borne, bottleneck, rates, suited, unlucky, working
from gradsharding.arithmetic.fold import Arithmetic
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
from gradsharding.planning.topologies import flat, lambda_fl, lifl, sharded, sharded_tree
from gradsharding.rounds.records import RECORD
from gradsharding.running.pace import share
from gradsharding.sizes import mib
from gradsharding.stores.updates import inspection
from gradsharding.value import Value

MIB = 1 << 20

SIZES = tuple(size * MIB for size in (256, 384, 512, 640, 768, 1024, 1280, 1769, 2560, 3538, 5120, 7168, 10240))
"""Memory sizes of a function that are tried, beside the least that does."""

SMALLEST_SLICE = 1 << 20
"""Bytes: smaller slices than this are not tried; each would be a request that is mostly latency."""

DEEP = 10_000
"""Clients beyond which a tree of three levels is tried, too."""

WORTH = Decimal("1.1")
"""Up to so many times the least price is paid for the least time."""

NEAR = 0.95
"""What takes this share of a limit, or more, is bound by it."""


NAMES = ("flat", "sharded", "lambda-fl", "lifl", "sharded-tree")
"""The topologies that are planned, as they are shown."""

Maker = Callable[..., Plan]
"""A topology, with its parameters."""


class Needs(Value):
    """What a round must keep to, and where it would run."""

    deadline: float | None = None
    """Seconds within which 95 rounds of 100 must be done."""
    budget: Money | None = None
    """US dollars that a round may cost, all in all."""
    memory: int = MEMORY[-1]
    """Bytes that one function may have."""
    timeout: int = DEPLOYED_TIMEOUT
    """Seconds that one function may take: those that it is deployed with."""
    concurrency: int = ROUND_CONCURRENCY
    """Functions that may run at once."""
    architecture: Architecture = "arm64"
    storage: Storage = "standard"
    on_aws: bool = False
    """Whether the clients are in the bucket's region; else their downloads are paid for."""


class Bound(NamedTuple):
    """A limit that a plan goes beyond, or comes next to."""

    limit: str
    """Its name: one of ``FIGURES``, or "deadline" or "budget"."""
    says: str
    """What the plan takes, and what there is."""
    fits: bool
    """Whether the plan keeps to it."""

    @property
    def figure(self) -> Figure | None:
        """What the platform allows, whatever was asked for; None if the limit is not the platform's."""
        return FIGURES.get(self.limit)

    def __str__(self) -> str:
        """For people."""
        return f"{self.limit}: {self.says}"


class Option(NamedTuple):
    """One way to do it, and what stands against it, if something does."""

    plan: Plan
    memory: int
    """Bytes that its functions should have."""
    forecast: Forecast
    waves: int
    bound: Bound | None
    """The limit that it goes beyond, or else the one that it comes next to; None where there is neither."""
    bottleneck: str
    """What its functions wait for most."""
    rates: Rates
    """Requests a second that its functions would make of S3 if they did not wait."""

    @property
    def problem(self) -> str | None:
        """The limit that it does not keep to, with the numbers."""
        return str(self.bound) if self.bound and not self.bound.fits else None

    @property
    def binds(self) -> str:
        """What keeps it from being done, or from being faster or cheaper."""
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
        """The topology's parameters, for people."""
        fan_in = f"fan-in {self.plan.fan_ins[0]}" if len(self.plan.fan_ins) > 1 else ""
        shards = f"{len(self.plan.slices)} shards" if len(self.plan.slices) > 1 else ""
        return ", ".join(filter(None, (shards, fan_in)))


class Server(NamedTuple):
    """An always-on machine that would do the same, by ``gradsharding aggregate`` on it."""

    name: str
    hour: Decimal
    seconds: float
    """Of one round, reading from S3 at the rate that the machine may keep up."""
    worth_from: Decimal | None
    """Rounds an hour from which on it is cheaper than the functions; None if it cannot do so many."""

    @property
    def most(self) -> float:
        """Rounds an hour that it can do."""
        return 3600 / self.seconds


class Advice(NamedTuple):
    """Every topology at its best, and which to take."""

    options: tuple[Option, ...]
    best: Option | None
    why: str
    servers: tuple[Server, ...]
    missing: str | None
    """Which prices the region lacks for the costs of these options, and where to get them; the options are then compared by another's."""


def recommend(
    manifest: Manifest,
    needs: Needs | None = None,
    *,
    prices: Prices | None = None,
    speeds: Speeds | None = None,
    shards: int | None = None,
    topologies: Collection[str] = NAMES,
    arithmetic: Arithmetic = "float64",
) -> Advice:
    """Plan every topology on Lambda and S3 at its best, and name the one to take: the fastest of those that cost next to the least.

    ``shards`` fixes their number; only ``topologies`` are considered. Nothing is read or run. What ``prices`` do not know of their region
    is left out of the costs; to compare, the packaged ones of ``HOME_REGION`` take its place. Raise UserError for exact sums of F64, for
    functions that Lambda does not offer, and for a budget where a price is missing.
    """
    needs = needs or Needs()
    if needs.memory > MEMORY[-1]:
        raise UserError(f"a function cannot have {mib(needs.memory)}; Lambda gives it {mib(MEMORY[-1])} at most: allow no more")
    if needs.timeout > TIMEOUT:
        raise UserError(f"a function cannot take {needs.timeout:,} s; Lambda gives it {TIMEOUT:,} s at most: allow no more")
    prices = prices or load_prices()
    search = _Search(manifest, needs, prices.completed(load_prices(path=PACKAGED)), speeds or Speeds(), arithmetic)
    ways = _ways(manifest, shards)
    options = tuple(search.best_of(*ways[name]) for name in NAMES if name in topologies)
    fit = [option for option in options if option.problem is None]
    best = _choose(fit)
    servers = search.servers(best) if not prices.lacking([f"lambda_second_{needs.architecture}", "lambda_request"]) else ()
    shown = tuple(option._replace(forecast=search.forecast(option.plan, option.memory, prices)) for option in options)
    missing = prices.lacking([name for option in shown for name in option.forecast.cost.round_trip.missing])
    if missing and needs.budget is not None:
        raise UserError(f"a budget cannot be kept without prices: {missing}")
    why = _why(best, fit, search.needs, f", in list prices of {HOME_REGION}" if missing else "")
    return Advice(shown, next((new for new, old in zip(shown, options, strict=True) if old is best), None), why, servers, missing)


def _ways(manifest: Manifest, shards: int | None) -> dict[str, tuple[Maker, list[dict[str, int]]]]:
    """Give each topology, with the parameters that are worth a try."""
    most = max(1, min(MAX_PARTS - 1, manifest.layout.elements, manifest.layout.nbytes // SMALLEST_SLICE))
    counts, few = ([shards] if shards else [*_ladder(1, most, step)] for step in (1.5, 1.8))
    clients = len(manifest.terms)
    root, half = math.isqrt(clients), clients // 2  # with a larger fan-in, there would be one leaf
    fans: list[dict[str, int]] = [{}, *({"fan_in": fan} for fan in _ladder(max(2, root // 8), min(half, 8 * root), 4) if 2 <= fan <= half)]
    if clients > DEEP:
        fans.append({"levels": 3})
    return {
        "flat": (flat, [{}]),
        "sharded": (sharded, [{"shards": count} for count in counts]),
        "lambda-fl": (lambda_fl, fans),
        "lifl": (lifl, [shape for shape in fans if "levels" not in shape]),
        "sharded-tree": (sharded_tree, [{"shards": count, **fan} for count in few for fan in fans]),
    }


def _ladder(least: int, most: int, step: float) -> Iterable[int]:
    """Numbers from ``least`` to ``most``, each about ``step`` times the one before."""
    rung = float(least)
    while rung < most:
        yield int(rung)
        rung = max(rung * step, int(rung) + 1)
    yield max(least, most)


class _Search:
    """What all options of one search share."""

    def __init__(self, manifest: Manifest, needs: Needs, prices: Prices, speeds: Speeds, arithmetic: Arithmetic) -> None:
        self.manifest, self.needs, self.prices, self.speeds, self.arithmetic = manifest, needs, prices, speeds, arithmetic

    @cached_property
    def setting(self) -> dict[str, Any]:
        """All in S3, as by ``gradsharding aggregate`` of updates whose paths can be read in one way."""
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
            "digest": self.arithmetic == "exact",
        }

    @cached_property
    def term_bytes(self) -> float:
        """Bytes that a term takes in an invocation, in the mean of some."""
        some = self.manifest.terms[:100]
        return sum(len(term.model_dump_json()) + 1 for term in some) / len(some)

    def best_of(self, make: Maker, shapes: Iterable[dict[str, int]]) -> Option:
        """Give a topology at its best: the one that fits and is best to take, or the one that comes nearest to fitting."""
        limits = Limits(memory=self.needs.memory)
        how = {"grain": GRAIN, "reading": READING, "arithmetic": self.arithmetic}
        plans = [make(self.manifest, limits, **how, **shape).placed(**self.setting) for shape in shapes]
        options = [option for plan in plans for option in self.options(plan)]
        return _choose(option for option in options if option.problem is None) or min(options, key=self.distance)

    def distance(self, option: Option) -> tuple[bool, float, float]:
        """How far an option is from fitting: memory first, then time."""
        seconds = option.forecast.seconds
        return option.plan.memory > self.needs.memory - RUNTIME, max(seconds.longest, self.needs.timeout), seconds.p95

    def options(self, made: Plan) -> Iterator[Option]:
        """Give the options of a plan: one for each size of function that is worth a try."""
        plans = {made.reading: made}
        needed = max(MEMORY[0], -(-(made.memory + RUNTIME) // MIB) * MIB)
        for memory in (needed, *(size for size in SIZES if needed < size <= self.needs.memory)):
            reading = suited(made, memory, self.needs.concurrency, self.speeds)
            if reading not in plans:
                plans[reading] = made.but(reading=reading)
            plan = plans[reading]
            expected = self.forecast(plan, memory, self.prices)
            waves = plan.waves(Limits(memory=memory, concurrency=self.needs.concurrency))
            asked = rates(plan, memory, self.needs.concurrency, self.speeds)
            bound = min(self.bounds(plan, memory, expected, waves, asked), key=lambda bound: bound.fits, default=None)
            slowest = max((kind.task for kinds in plan.kinds for kind in kinds), key=lambda task: task.bytes_read)
            yield Option(plan, memory, expected, waves, bound, bottleneck(slowest, memory, self.speeds), asked)

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
            clients=Clients(on_aws=self.needs.on_aws),
        )

    def bounds(self, plan: Plan, memory: int, expected: Forecast, waves: int, asked: Rates) -> Iterator[Bound]:
        """Give the limits that a plan comes next to, or goes beyond."""
        if waves > len(plan.fan_ins) and not asked.much:
            yield Bound("concurrency", f"{plan.functions:,} functions run {self.needs.concurrency:,} at a time", fits=True)
        for limit, taken, allowed, says in self.measured(plan, memory, expected):
            if taken > NEAR * allowed:
                yield Bound(limit, says, fits=taken <= allowed)
        if asked.much:
            yield requests(plan, memory, self.needs.concurrency, asked, self.speeds)

    def measured(self, plan: Plan, memory: int, expected: Forecast) -> Iterator[tuple[str, float, float, str]]:
        """Give each limit with what the plan takes of it, what there is, and the same in words."""
        needs, seconds, cost = self.needs, expected.seconds, expected.cost.round_trip.usd
        yield "memory", memory, needs.memory, f"a function needs {mib(memory)}, and may have {mib(needs.memory)}"
        parts = len(plan.slices) + 1
        yield "parts", parts, MAX_PARTS, f"{parts - 1:,} slices and a header are {parts:,} parts, and an object may have {MAX_PARTS:,}"
        largest, result = max(kind.task.nbytes for kind in plan.kinds[-1]), plan.result_bytes
        yield "object size", result, LARGEST_OBJECT, f"the result takes {mib(result)}, and an object {mib(LARGEST_OBJECT)} at most"
        yield "part size", largest, LARGEST_PUT, f"a slice takes {mib(largest)}, and a part of an object {mib(LARGEST_PUT)} at most"
        named = max(kind.task.inputs for kind in plan.kinds[0]) * self.term_bytes
        yield "payload", named, PAYLOAD, f"an invocation would name its updates in {mib(int(named))}, and takes {mib(PAYLOAD)} at most"
        longest = unlucky(seconds.longest, self.speeds)
        more = "; give it more by --timeout, in deploy and in plan" if needs.timeout < longest <= TIMEOUT else ""
        says = f"on a slow day its slowest function takes {longest:,.0f} s, and Lambda ends it after {needs.timeout} s{more}"
        yield "time limit", longest, needs.timeout, says
        if (deadline := needs.deadline) is not None:
            yield "deadline", seconds.p95, deadline, f"95 rounds of 100 take up to {seconds.p95:,.1f} s, and {deadline:g} s are allowed"
        if (budget := needs.budget) is not None:
            yield "budget", float(cost), float(budget), f"a round costs ${cost:.4f} all in all, and ${budget} is allowed"

    def servers(self, best: Option | None) -> tuple[Server, ...]:
        """Hold the machines of the price list against the functions."""
        found = []
        nbytes = self.manifest.layout.nbytes * len(self.manifest.terms)
        for name, box in self.prices.boxes.items():
            rate = min(float(box.network_gbit) * 1e9 / 8, working(box.vcpus, self.arithmetic, self.speeds))
            seconds = nbytes / rate + self.speeds.latency
            alike = None
            if best:  # what both pay S3 falls out
                items = best.forecast.cost.aggregation.items
                functions = Bill(items=tuple(item for item in items if item.what in ("functions", "invocations"))).usd
                rounds = box.hour / functions
                alike = rounds if rounds <= Decimal(3600 / seconds) else None
            found.append(Server(name, box.hour, seconds, alike))
        return tuple(found)


def requests(plan: Plan, memory: int, concurrency: int, asked: Rates, speeds: Speeds | None = None) -> Bound:
    """Say how many requests S3 would be asked for a second, what one prefix bears, and what each function keeps to."""
    count, free = max(at_once(plan, concurrency)), borne((kind.task for kinds in plan.kinds for kind in kinds), memory, speeds)
    says = f"S3 would be asked for {asked.gets:,.0f} GETs a second, and one prefix bears {FIGURES['get rate'].value:,}"
    kept = f": each of {count:,} functions keeps to {share(count).gets:,.1f}; {free:,} at once would not have to wait" if asked.much else ""
    return Bound("get rate", says + kept, fits=True)


def _choose(fit: Iterable[Option]) -> Option | None:
    """The fastest of those that cost at most ``WORTH`` of the cheapest."""
    options = [*fit]
    if not options:
        return None
    least = min(option.usd for option in options)
    return min((o for o in options if o.usd <= WORTH * least), key=lambda o: (o.forecast.seconds.p50, o.usd, o.plan.functions))


def _why(best: Option | None, fit: list[Option], needs: Needs, by: str) -> str:
    if best is None:
        return "no topology keeps to what is asked; allow more memory, concurrency, time or money"
    others = [option for option in fit if option is not best]
    pace = best.forecast.seconds.p50
    rest = "; ".join(
        f"{o.name} costs {o.usd / best.usd:.2f} times as much and takes {o.forecast.seconds.p50 / pace:.1f} times as long" for o in others
    )
    asked = f" within {needs.deadline:g} s" if needs.deadline else ""
    return (
        f"the fastest of those{asked} that cost at most {WORTH} of the least{by}"
        + (f": {rest}" if rest else "; nothing else fits")
        + f". What binds it: {best.binds}"
    )


def flower_server(manifest: Manifest, prices: Prices) -> tuple[str, int] | None:
    """The cheapest machine that holds what Flower's own server does, the updates and two models; and those bytes. None if none does."""
    nbytes = (len(manifest.terms) + 2) * manifest.layout.nbytes
    roomy = [(box.hour, name) for name, box in prices.boxes.items() if box.memory_gib * GIB >= nbytes]
    return (min(roomy)[1], nbytes) if roomy else None
