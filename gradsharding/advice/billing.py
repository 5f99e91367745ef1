"""What a finished round cost: its bill, and its report with the bill beside the forecast. Nothing here asks a store or a cloud."""

from typing import Any

from gradsharding.advice.cost import Bill, Cost, bill, forecast, known
from gradsharding.advice.prices import HOME_REGION, Prices, load_prices
from gradsharding.errors import UserError
from gradsharding.rounds.result import Result


def prices_of(result: Result) -> Prices:
    """Return the list prices of the region in which a round's functions ran; raise UserError if the price file cannot be read."""
    return load_prices(next((invocation.region for invocation in result.invocations if invocation.region), HOME_REGION))


def bill_of(result: Result) -> Cost | None:
    """Bill a round at list prices, by what Lambda reported and stores counted; None if its functions ran elsewhere.

    A bill's ``missing`` names the prices that are unknown for the region. Raise UserError if the price file cannot be read.
    """
    if not result.invocations:
        return None
    architecture = result.invocations[0].architecture or "arm64"
    return bill(result.reports, result.caller, result.plan, prices_of(result), architecture=architecture)


def report(result: Result) -> dict[str, Any]:
    """Return ``result.report()`` and the round's ``cost``, as JSON values; amounts are decimal text, in US dollars.

    ``cost`` is null if it is unknown, and so is each sum in it; ``cost_missing`` then says why.
    """
    found = result.report()  # first: it reads the result for its digest, and the bill has those requests too
    cost, missing = _cost(result)
    return {**found, "cost": cost, "cost_missing": missing}


def _cost(result: Result) -> tuple[dict[str, Any] | None, str | None]:
    """Return a round's bill beside its forecast; and why there is none, or which prices it lacks."""
    try:
        billed, prices = bill_of(result), prices_of(result)
    except UserError as error:
        return None, error.message
    if not billed:
        return None, "no Lambda invocation was reported: nothing to bill"
    if not prices.figures:
        return None, prices.origin
    first, setting = result.invocations[0], result.plan.setting
    expected = forecast(
        result.plan,
        prices,
        first.memory_size,
        architecture=first.architecture or "arm64",
        concurrency=setting.concurrency if setting else None,
    )
    return {
        "aggregation": _sums(expected.cost.aggregation, billed.aggregation),
        "round_trip": _sums(expected.cost.round_trip, billed.round_trip),
        "items": [{**item.model_dump(mode="json"), "usd": known(item.usd)} for item in billed.round_trip.items],
        "prices": prices.origin,
    }, prices.lacking(billed.round_trip.missing)


def _sums(projected: Bill, observed: Bill) -> dict[str, str | None]:
    return {"projected": known(projected.known), "observed": known(observed.known)}
