"""Costs are exact decimals, in two accountings, of what is planned and of what was reported."""

from decimal import Decimal

import pytest

from gradsharding import Limits, Sharded
from gradsharding.advice.cost import Bill, ClientTraffic, Cost, Item, Storage, bill, forecast
from gradsharding.advice.prices import Prices, load_prices
from gradsharding.errors import UserError
from gradsharding.planning.plan import Plan
from gradsharding.planning.platform import CHARGES, READING
from gradsharding.planning.task import Invocation, TaskReport
from gradsharding.planning.topologies import LambdaFLTree
from gradsharding.usage import Usage
from modelled import MB, manifest

PRICES = load_prices()


def plan(shards: int = 4, clients: int = 20, mb: int = 64) -> Plan:
    """Plan a round."""
    return Sharded(shards=shards).plan(manifest(mb * MB, clients), Limits(), reading=READING)


def report(task: str, request: str | None, seconds: float = 1.5, gets: int = 40) -> TaskReport:
    """Make up what a function said; ``request`` names the invocation that carried it."""
    told = None
    if request:
        told = Invocation(
            request=request, attempts=1, tasks=1, billed_seconds=seconds, memory_size=512 * MB, max_memory=100 * MB, init_seconds=None
        )
    return TaskReport(
        task=task, worker="1", usage={"s3": Usage(gets=gets, puts=1, bytes_read=10, bytes_written=5)}, peak_memory=1,
        seconds=1, read_seconds=1, write_seconds=0,
        cpu_seconds=0.5, invocation=told,
    )  # fmt: skip


def amounts(cost: Bill) -> dict[str, Decimal]:
    """Give a bill's items by name."""
    return {item.name: Bill(items=(item,)).usd for item in cost.items}


def test_exact() -> None:
    """A third of a cent a thousand times is exact; floats are nowhere."""
    cost = Bill(items=tuple(Item(name="x", count=Decimal(1), unit="", figure="x", price=Decimal("0.0000133334")) for _ in range(1000)))

    assert Decimal("0.0133334") == cost.usd
    assert all(isinstance(item.usd, Decimal) for item in forecast(plan(), PRICES, 512 * MB).cost.round_trip.items)


def test_digest_is_paid_for() -> None:
    """A result that is read once for its digest takes 8 more requests of 8 MiB, on the caller's account."""
    bills = [
        amounts(forecast(plan().placed(digest=digest, reading=READING), PRICES, 512 * MB).cost.aggregation) for digest in (False, True)
    ]

    assert 8 * Decimal("0.0000004") == bills[1]["the caller's GETs"] - bills[0]["the caller's GETs"]


def test_forecast_by_hand() -> None:
    """Functions, their invocations and requests, the caller's; then uploads, downloads, storage and transfer."""
    found = forecast(plan().placed(home=CHARGES, output=CHARGES, record_bytes=5_000), PRICES, 512 * MB, architecture="x86_64")
    one, all_ = (amounts(part) for part in found.cost)

    assert Decimal(f"{found.seconds.billed:.3f}") / 2 * Decimal("0.0000166667") == one["functions"]
    assert 4 * Decimal("0.0000002") == one["invocations"]
    assert 160 * Decimal("0.0000004") == one["functions' GETs"]
    # of four slices of 16 MiB, the first begins before 5 MiB: it waits as an object, after a look at its upload
    assert 5 * Decimal("0.000005") == one["functions' PUTs"]
    # is there a result, a plan, an output, and again at the end; its version; the kept header, and so much of the slice as it lacks
    assert 7 * Decimal("0.0000004") == one["the caller's GETs"]
    # begin; look, keep the header; three lists, two parts composed, the end; two records
    assert (1 + 2 + 3 + 2 + 1 + 2) * Decimal("0.000005") == one["the caller's PUTs"]
    assert 6 == len(one)
    assert (20 * Decimal("0.000005"), 40 * Decimal("0.0000004")) == (all_["clients' PUTs"], all_["clients' GETs"])
    moved = Decimal(20 * (64 * MB + plan().header_bytes)) / (1 << 30)
    assert moved * Decimal("0.09") == all_["downloads through the internet"]
    assert pytest.approx(float(moved) * 21 / 20 * 0.023 / 730, rel=1e-4) == float(all_["storage"])
    assert found.cost.round_trip.usd == sum(all_.values())


def test_clients_on_aws_pay_no_transfer() -> None:
    """In the bucket's region, downloads are free; nothing else changes."""
    here, there = (forecast(plan(), PRICES, 512 * MB, clients=ClientTraffic(on_aws=on_aws)).cost for on_aws in (True, False))

    assert here.aggregation == there.aggregation
    assert there.round_trip.usd - here.round_trip.usd == amounts(there.round_trip)["downloads through the internet"]


def test_express() -> None:
    """S3 Express asks less for a request, and something for each byte."""
    cost = amounts(forecast(plan(), PRICES, 512 * MB, storage="express").cost.aggregation)

    assert 160 * Decimal("0.00000003") == cost["functions' GETs"]
    assert Decimal(20 * 64 * MB) / (1 << 30) * Decimal("0.0006") == cost["functions' reads"]


def test_architectures() -> None:
    """arm64 costs what its price says, x86_64 what its does."""
    arm, x86 = (amounts(forecast(plan(), PRICES, 512 * MB, architecture=a).cost.aggregation)["functions"] for a in ("arm64", "x86_64"))

    assert Decimal("0.0000133334") / Decimal("0.0000166667") == pytest.approx(arm / x86)


def test_waves_share_invocations() -> None:
    """Tasks beyond the concurrency are carried by the invocations that there are."""
    assert 10 * Decimal("0.0000002") == amounts(forecast(plan(40), PRICES, 512 * MB, concurrency=10).cost.aggregation)["invocations"]
    tree = LambdaFLTree().plan(manifest(64 * MB, 20), Limits(), reading=READING)
    assert 5 * Decimal("0.0000002") == amounts(forecast(tree, PRICES, 512 * MB).cost.aggregation)["invocations"]


def test_bill() -> None:
    """A bill counts each invocation once, whatever it carried, and the requests of all tasks and of the caller."""
    reports = [report("sharded/0", "a"), report("sharded/1", "a"), report("sharded/2", "b", 2.25), report("sharded/3", "b", 2.25)]
    caller = {"s3": Usage(gets=9, puts=7), "file": Usage(gets=1_000, puts=1_000)}  # a directory bills nobody
    found: Cost = bill(reports, caller, plan(), PRICES, architecture="x86_64")
    one = amounts(found.aggregation)

    assert (Decimal("1.5") + Decimal("2.25")) / 2 * Decimal("0.0000166667") == one["functions"]
    assert (2 * Decimal("0.0000002"), 160 * Decimal("0.0000004")) == (one["invocations"], one["functions' GETs"])
    assert 4 * Decimal("0.000005") == one["functions' PUTs"]
    assert (9 * Decimal("0.0000004"), 7 * Decimal("0.000005")) == (one["the caller's GETs"], one["the caller's PUTs"])
    assert "GiB-seconds" in str(found.aggregation)
    assert f"in all: ${found.aggregation.usd:.7f}" in str(found.aggregation)


def test_bill_without_figures() -> None:
    """Functions that told nothing of the platform cost their requests."""
    found = amounts(bill([report("sharded/0", None)], {}, plan(), PRICES).aggregation)

    assert (Decimal(0), Decimal(0), 40 * Decimal("0.0000004")) == (found["functions"], found["invocations"], found["functions' GETs"])


def priced_without(*names: str) -> Prices:
    """Give the home region's prices, less some."""
    return PRICES.model_copy(update={"region": "xx-test-1", "figures": {n: one for n, one in PRICES.figures.items() if n not in names}})


@pytest.mark.parametrize(
    ("name", "aggregation", "round_trip"),
    [
        ("lambda_second_arm64", False, False),
        ("lambda_request", False, False),
        ("s3_get", False, False),
        ("s3_put", False, False),
        ("s3_gigabyte_month", True, False),
        ("transfer_out_gigabyte", True, False),
        ("lambda_second_x86_64", True, True),
        ("express_get", True, True),
        ("alarm_month", True, True),
    ],
)
def test_without_a_price(name: str, aggregation: bool, round_trip: bool) -> None:
    """What a missing price would count into has no sum; all else is as it was, and what has no use for it has its sum."""
    whole, found = (forecast(plan(), prices, 512 * MB).cost for prices in (PRICES, priced_without(name)))

    for known, one, all_ in zip((aggregation, round_trip), found, whole, strict=True):
        assert (known, () if known else (name,)) == (one.known is not None, one.missing)
        assert [None if item.figure == name else item.usd for item in all_.items] == [item.usd for item in one.items]
        if known:
            assert all_.usd == one.usd == one.known
        else:
            with pytest.raises(UserError, match=f"there is no total: no price of {name}"):
                _ = one.usd
            assert str(one).endswith(f"in all: no price of {name}")
            assert ", no price\n" in str(one)


def test_nothing_costs_nothing() -> None:
    """A bill that counts none of something needs no price for it."""
    found = bill([report("sharded/0", None)], {}, plan(), priced_without("lambda_second_arm64", "lambda_request")).aggregation

    assert 40 * Decimal("0.0000004") + Decimal("0.000005") == found.usd


def test_each_item_names_its_price() -> None:
    """An item's figure is the name under which the list has its price."""
    storages: tuple[Storage, ...] = ("standard", "express")
    for storage in storages:
        for item in forecast(plan(), PRICES, 512 * MB, storage=storage).cost.round_trip.items:
            assert PRICES.usd(item.figure) == item.price
