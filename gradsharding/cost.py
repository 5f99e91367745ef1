"""What a round costs, in exact decimals: forecast from its plan, or billed from what the platform has reported of it."""

from collections.abc import Iterable
from decimal import Decimal
from typing import Literal, NamedTuple

from gradsharding.plan import Plan
from gradsharding.platform import Architecture
from gradsharding.prices import Prices
from gradsharding.task import TaskReport
from gradsharding.timing import Seconds, Speeds, forecast_seconds
from gradsharding.value import Value

Storage = Literal["standard", "express"]
"""S3's storage classes: Standard, or Express One Zone."""

GIB = 1 << 30
MONTH = Decimal(730)
"""Hours."""


class Item(Value):
    """So many units of something, at a price each."""

    what: str
    count: Decimal
    unit: str
    price: Decimal

    @property
    def usd(self) -> Decimal:
        """What it comes to."""
        return self.count * self.price


class Bill(Value):
    """Items, and what they come to."""

    items: tuple[Item, ...]

    @property
    def usd(self) -> Decimal:
        """What all items come to."""
        return sum((item.usd for item in self.items), Decimal(0))

    def __add__(self, other: "Bill") -> "Bill":
        """Put two bills together."""
        return Bill(items=self.items + other.items)

    def __str__(self) -> str:
        return "\n".join([*(f"{i.what}: {_plain(i.count)} {i.unit}, ${i.usd:.7f}" for i in self.items), f"in all: ${self.usd:.7f}"])


class Cost(NamedTuple):
    """A round in both accountings."""

    aggregation: Bill
    """What the functions take."""
    round_trip: Bill
    """That, the clients' uploads and downloads, and the storage meanwhile."""


class Usage(NamedTuple):
    """What functions took."""

    gib_seconds: Decimal
    invocations: int
    gets: int
    puts: int
    bytes_read: int
    bytes_written: int


class Forecast(NamedTuple):
    """A round before it runs."""

    seconds: Seconds
    cost: Cost


class Clients(NamedTuple):
    """What the clients have to do with the price."""

    on_aws: bool = False
    """In the region of the bucket, where nothing is charged for transfer; else their downloads pass through the internet."""
    hours: float = 1.0
    """For how long updates and result lie in the bucket."""


def forecast(
    plan: Plan,
    prices: Prices,
    memory: int,
    *,
    architecture: Architecture = "arm64",
    concurrency: int | None = None,
    speeds: Speeds | None = None,
    storage: Storage = "standard",
    clients: Clients | None = None,
) -> Forecast:
    """Forecast a round by functions of ``memory`` bytes, an invocation for each task that may run at once."""
    seconds = forecast_seconds(plan, memory, concurrency, speeds)
    at_once = [min(width * len(plan.slices), concurrency or width * len(plan.slices)) for width in plan.widths]
    gib_seconds = Decimal(memory) / GIB * Decimal(f"{seconds.billed:.3f}")
    usage = Usage(gib_seconds, sum(at_once), plan.gets, plan.puts, plan.bytes_read, plan.bytes_written)
    return Forecast(seconds, priced(usage, plan, prices, architecture, storage, clients))


def bill(
    reports: Iterable[TaskReport],
    plan: Plan,
    prices: Prices,
    *,
    architecture: Architecture = "arm64",
    puts: int = 3,
    storage: Storage = "standard",
    clients: Clients | None = None,
) -> Cost:
    """Bill a round by what its functions reported; ``puts`` are the caller's own. Functions that told no figures cost requests only."""
    seen = tuple(reports)
    invocations = {one.invocation.request: one.invocation for one in seen if one.invocation}.values()
    usage = Usage(
        sum((Decimal(str(one.billed_seconds)) * one.memory_size / GIB for one in invocations), Decimal(0)),
        len(invocations),
        sum(report.gets for report in seen),
        sum(report.puts for report in seen) + puts,
        sum(report.bytes_read for report in seen),
        sum(report.bytes_written for report in seen) + plan.header_bytes,
    )
    return priced(usage, plan, prices, architecture, storage, clients)


def priced(usage: Usage, plan: Plan, prices: Prices, architecture: Architecture, storage: Storage, clients: Clients | None) -> Cost:
    """Price what functions took for a plan, in both accountings."""
    functions = Bill(
        items=(
            _item("functions", usage.gib_seconds, "GiB-seconds", prices.lambda_second(architecture)),
            _item("invocations", usage.invocations, "requests", prices.usd("lambda_request")),
        )
    )
    aggregation = functions + _requests("functions' ", usage.gets, usage.puts, usage.bytes_read, usage.bytes_written, prices, storage)
    if plan.arithmetic == "exact":
        back = plan.result_bytes
        aggregation += _requests("the digest's ", plan.reading.requests(back), 0, back, 0, prices, storage)
    whose = clients or Clients()
    objects = len(plan.slices) if plan.cut_updates else 1
    reads = len(plan.slices) if plan.cut_updates else 3  # a stat, the header, the data
    moved = plan.clients * (plan.header_bytes + plan.result_bytes)
    trips = _requests("clients' ", plan.clients * reads, plan.clients * objects, moved, moved, prices, storage)
    name = "s3_gigabyte_month" if storage == "standard" else "express_gigabyte_month"
    stored = Decimal(moved + plan.bytes_written) / GIB * Decimal(str(whose.hours)) / MONTH
    rest = [_item("storage", stored, "GiB-months", prices.usd(name))]
    if not whose.on_aws:
        rest.append(_item("downloads through the internet", Decimal(moved) / GIB, "GiB", prices.usd("transfer_out_gigabyte")))
    return Cost(aggregation, aggregation + trips + Bill(items=tuple(rest)))


def _requests(whose: str, gets: int, puts: int, bytes_read: int, bytes_written: int, prices: Prices, storage: Storage) -> Bill:
    class_ = "s3" if storage == "standard" else "express"
    items = [
        _item(f"{whose}GETs", gets, "requests", prices.usd(f"{class_}_get")),
        _item(f"{whose}PUTs", puts, "requests", prices.usd(f"{class_}_put")),
    ]
    if storage == "express":
        items += [
            _item(f"{whose}reads", Decimal(bytes_read) / GIB, "GiB", prices.usd("express_gigabyte_out")),
            _item(f"{whose}writes", Decimal(bytes_written) / GIB, "GiB", prices.usd("express_gigabyte_in")),
        ]
    return Bill(items=tuple(item for item in items if item.count))


def _item(what: str, count: Decimal | int, unit: str, price: Decimal) -> Item:
    return Item(what=what, count=Decimal(count), unit=unit, price=price)


def _plain(count: Decimal) -> str:
    return f"{count:,f}" if count == count.to_integral_value() else f"{count:,.4f}"
