"""The cost of a round, in exact decimals: forecast from its plan, or billed by what Lambda reported and stores counted."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Literal, NamedTuple

from gradsharding.advice.prices import Prices
from gradsharding.advice.timing import Seconds, Speeds, forecast_seconds
from gradsharding.errors import UserError
from gradsharding.planning.plan import Plan
from gradsharding.planning.platform import CHARGES, Architecture
from gradsharding.planning.task import TaskReport, invocations
from gradsharding.usage import Spent, Usage, together, total
from gradsharding.value import Value

Storage = Literal["standard", "express"]
"""S3's storage classes: Standard, or Express One Zone."""

GIB = 1 << 30
MONTH = Decimal(730)
"""Hours."""


class Item(Value):
    """A number of units, and the price of one."""

    name: str
    count: Decimal
    unit: str
    figure: str
    """The price's name in the price list."""
    price: Decimal | None
    """None if the region's price is unknown."""

    @property
    def usd(self) -> Decimal | None:
        """The amount; None if the price is unknown. Zero units cost nothing, whatever the price."""
        if not self.count:
            return Decimal(0)
        return None if self.price is None else self.count * self.price


class Bill(Value):
    """Items and their total."""

    items: tuple[Item, ...]

    @property
    def usd(self) -> Decimal:
        """Total of all items; raise UserError if a price is missing."""
        if (sum_ := self.known) is None:
            raise UserError(f"there is no total: {self._without}")
        return sum_

    @property
    def known(self) -> Decimal | None:
        """Total of all items; None if a price is missing."""
        amounts = [item.usd for item in self.items]
        return None if None in amounts else sum((usd for usd in amounts if usd is not None), Decimal(0))

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the missing prices, without which there is no total."""
        return tuple(dict.fromkeys(item.figure for item in self.items if item.usd is None))

    @property
    def _without(self) -> str:
        return f"no price of {', '.join(self.missing)}"

    def __add__(self, other: "Bill") -> "Bill":
        """Join two bills."""
        return Bill(items=self.items + other.items)

    def __str__(self) -> str:
        lines = [f"{i.name}: {_plain(i.count)} {i.unit}, {'no price' if i.usd is None else f'${i.usd:.7f}'}" for i in self.items]
        return "\n".join([*lines, f"in all: {self._without if self.known is None else f'${self.known:.7f}'}"])


class Cost(NamedTuple):
    """The cost of a round, without and with its clients."""

    aggregation: Bill
    """Of the functions and of all requests of the round."""
    round_trip: Bill
    """The same, the clients' uploads and downloads, and storage meanwhile."""


class Forecast(NamedTuple):
    """Time and cost of a round before it runs."""

    seconds: Seconds
    cost: Cost


class ClientTraffic(NamedTuple):
    """Where the clients are, and how long their objects are stored."""

    on_aws: bool = False
    """Whether the clients are in the bucket's region, where transfer is free; else they download through the internet."""
    hours: float = 1.0
    """Hours for which updates and result are stored."""


def forecast(
    plan: Plan,
    prices: Prices,
    memory: int,
    *,
    architecture: Architecture = "arm64",
    concurrency: int | None = None,
    speeds: Speeds | None = None,
    storage: Storage = "standard",
    clients: ClientTraffic | None = None,
) -> Forecast:
    """Forecast a round run by functions of ``memory`` bytes, with one invocation for each task that may run at once."""
    seconds = forecast_seconds(plan, memory, concurrency, speeds)
    at_once = [min(width * len(plan.slices), concurrency or width * len(plan.slices)) for width in plan.widths]
    functions = priced_functions(Decimal(memory) / GIB * Decimal(f"{seconds.billed:.3f}"), sum(at_once), prices, architecture)
    asked = {"functions' ": total(plan.tasks_usage), "the caller's ": total(together(*({s.kind: s.usage} for s in plan.steps)))}
    return Forecast(seconds, priced(functions, asked, plan, prices, storage, clients))


def bill(
    reports: Iterable[TaskReport],
    caller: Spent,
    plan: Plan,
    prices: Prices,
    *,
    architecture: Architecture = "arm64",
    storage: Storage = "standard",
    clients: ClientTraffic | None = None,
) -> Cost:
    """Bill a round by what Lambda reported of its functions, and by the requests to S3 that were counted.

    ``caller`` has the requests beside those of the tasks. Functions of which Lambda reported nothing cost their requests only.
    """
    seen = tuple(reports)
    invoked = invocations(seen)
    gib_seconds = sum((Decimal(str(call.billed_seconds)) * call.memory_size / GIB for call in invoked), Decimal(0))
    functions = priced_functions(gib_seconds, len(invoked), prices, architecture)
    asked = {"functions' ": _of_s3(together(*(report.usage for report in seen))), "the caller's ": _of_s3(caller)}
    return priced(functions, asked, plan, prices, storage, clients)


def _of_s3(spent: Spent) -> Usage:
    return spent.get(CHARGES.kind, Usage())


def priced_functions(gib_seconds: Decimal, invocations: int, prices: Prices, architecture: Architecture) -> Bill:
    """Price the time and invocations of functions."""
    return Bill(
        items=(
            _item("functions", gib_seconds, "GiB-seconds", prices, f"lambda_second_{architecture}"),
            _item("invocations", invocations, "requests", prices, "lambda_request"),
        )
    )


def priced(
    functions: Bill, asked: Mapping[str, Usage], plan: Plan, prices: Prices, storage: Storage, clients: ClientTraffic | None
) -> Cost:
    """Price a plan's functions, and the requests to S3 in ``asked``, by whose they are; without and with the clients."""
    aggregation = functions
    for whose_requests, usage in asked.items():
        aggregation += _requests(whose_requests, usage, prices, storage)
    whose = clients or ClientTraffic()
    nbytes = plan.header_bytes + plan.result_bytes
    # each client writes an update, and reads the header and the data of the new model
    each = Usage(gets=2) + CHARGES.put(nbytes)
    trips = _requests("clients' ", (each + Usage(bytes_read=nbytes)) * plan.clients, prices, storage)
    moved = plan.clients * nbytes
    name = "s3_gigabyte_month" if storage == "standard" else "express_gigabyte_month"
    stored = Decimal(moved + total(plan.tasks_usage).bytes_written) / GIB * Decimal(str(whose.hours)) / MONTH
    rest = [_item("storage", stored, "GiB-months", prices, name)]
    if not whose.on_aws:
        rest.append(_item("downloads through the internet", Decimal(moved) / GIB, "GiB", prices, "transfer_out_gigabyte"))
    return Cost(aggregation, aggregation + trips + Bill(items=tuple(rest)))


def _requests(whose: str, usage: Usage, prices: Prices, storage: Storage) -> Bill:
    class_ = "s3" if storage == "standard" else "express"
    items = [
        _item(f"{whose}GETs", usage.gets, "requests", prices, f"{class_}_get"),
        _item(f"{whose}PUTs", usage.puts, "requests", prices, f"{class_}_put"),
    ]
    if storage == "express":
        items += [
            _item(f"{whose}reads", Decimal(usage.bytes_read) / GIB, "GiB", prices, "express_gigabyte_out"),
            _item(f"{whose}writes", Decimal(usage.bytes_written) / GIB, "GiB", prices, "express_gigabyte_in"),
        ]
    return Bill(items=tuple(item for item in items if item.count))


def _item(name: str, count: Decimal | int, unit: str, prices: Prices, figure: str) -> Item:
    known = prices.figures.get(figure)
    return Item(name=name, count=Decimal(count), unit=unit, figure=figure, price=known.usd if known else None)


def known(usd: Decimal | None) -> str | None:
    """Write an amount in US dollars as text for JSON; None stays None."""
    return None if usd is None else f"{usd:f}"


def _plain(count: Decimal) -> str:
    return f"{count:,f}" if count == count.to_integral_value() else f"{count:,.4f}"
