"""``gradsharding prices``: shows the prices in use; asked to, fetches AWS's public list, shows what changes, and keeps it."""

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
import urllib3
from rich.console import Console
from rich.table import Table

from gradsharding.advice.prices import HOME_REGION, PACKAGED, load_prices, price_file, user_file
from gradsharding.errors import StoreFailed, UserError
from gradsharding.stores.files import replace

LIST = "https://pricing.us-east-1.amazonaws.com"
"""AWS's bulk price list, for which no credentials are needed
(https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/using-the-aws-price-list-bulk-api.html)."""

_PREFIX = r"(?:[A-Z]{2,5}\d?-)?"
"""Of a usage type, outside us-east-1: a short name of the region."""


class Wanted(NamedTuple):
    """A figure of ours, and what marks its product in an offer's list."""

    name: str
    offer: str
    is_it: Callable[[Mapping[str, str]], bool]


def _group(group: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda a: a.get("group") == group and a.get("location") != "Any"


def _usage(pattern: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda a: re.fullmatch(_PREFIX + pattern, a.get("usagetype", "")) is not None


WANTED = (
    Wanted("lambda_second_x86_64", "AWSLambda", _group("AWS-Lambda-Duration")),
    Wanted("lambda_second_arm64", "AWSLambda", _group("AWS-Lambda-Duration-ARM")),
    Wanted("lambda_request", "AWSLambda", _group("AWS-Lambda-Requests-ARM")),
    Wanted("lambda_storage_second", "AWSLambda", _group("AWS-Lambda-Storage-Duration")),
    Wanted("s3_put", "AmazonS3", _usage("Requests-Tier1")),
    Wanted("s3_get", "AmazonS3", _usage("Requests-Tier2")),
    Wanted("s3_gigabyte_month", "AmazonS3", _usage("TimedStorage-ByteHrs")),
    Wanted("transfer_out_gigabyte", "AWSDataTransfer", _usage("DataTransfer-Out-Bytes")),
    Wanted("alarm_month", "AmazonCloudWatch", _usage("CW:AlarmMonitorUsage")),
)
"""What is looked for. S3 Express's usage types are not known for sure, and EC2's list takes hundreds of megabytes: those figures stay."""


@click.command(short_help="Show the prices in use, or fetch AWS's own.")
@click.option("--region", default=HOME_REGION, show_default=True, help="Of AWS.")
@click.option("--refresh", is_flag=True, help="Fetch AWS's price list, show what changes, and keep it in your own file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prices(region: str, *, refresh: bool, as_json: bool) -> None:
    """Show the list prices by which plans and rounds are reckoned, each with its source and date. Nothing is fetched unless asked for."""
    if refresh:
        click.echo(refreshed(region))
        return
    found = load_prices(region)
    if not found.figures:
        raise UserError(found.origin)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        return
    table = Table("price", "US dollars", "source", "date", box=None)
    for name, price in found.figures.items():
        source = found.sources[price.source]
        table.add_row(name, f"{price.usd:f}", source.name, str(source.date))
    for name, box in found.boxes.items():
        source = found.sources[box.source]
        table.add_row(f"{name}, an hour", f"{box.hour:f}", source.name, str(source.date))
    Console(width=120).print(table)
    click.echo(found.origin)


def refreshed(region: str) -> str:
    """Fetch a region's prices into the user's file, and say what has changed; raise StoreFailed or UserError, with nothing written."""
    known = _known(region)
    before = known["region"][region]
    lists = {offer: _fetch(offer, region) for offer in dict.fromkeys(wanted.offer for wanted in WANTED)}
    figures = {wanted.name: price for wanted in WANTED if (price := _find(wanted, lists[wanted.offer])) is not None}
    if not figures:
        raise UserError(f"AWS's price list has none of our prices for {region}; is that the name of a region?")
    lines = []
    for name in dict.fromkeys([*figures, *(name for name in before if name != "box")]):
        old = before.get(name, {}).get("usd")
        if name not in figures:
            lines.append(f"{name}: not looked for, or not found; it stays {old}, of {known['source'][before[name]['source']]['date']}")
        elif old is None or Decimal(old) != figures[name]:
            lines.append(f"{name}: {old or 'unknown'} → {figures[name]:f}")
    if before.get("box"):
        lines.append("EC2's list is too large to fetch: its prices stay")
    path = user_file()
    _write(path, known, region, figures, {offer: _published(found) for offer, found in lists.items()})
    load_prices(region, path)
    return "\n".join([*lines, f"{len(figures)} prices of {region} are now in {path}"])


def _known(region: str) -> dict[str, Any]:
    """Give what the user's own file has, and of the region, if that does not have it, what the release has.

    Other regions of the release stay out of the user's file: they would hide those of later releases.
    """
    own = {"source": {}, "region": {}} | (tomllib.loads(price_file().read_text()) if price_file() != PACKAGED else {})
    if region not in own["region"]:
        packaged = tomllib.loads(PACKAGED.read_text())
        figures = packaged["region"].get(region, {})
        used = {one["source"] for one in ({**figures, "box": None} | figures.get("box", {})).values() if one}
        own["source"] = {name: source for name, source in packaged["source"].items() if name in used} | own["source"]
        own["region"][region] = figures
    return own


def _fetch(offer: str, region: str) -> dict[str, Any]:
    """Get an offer's list; raise StoreFailed if it cannot be had, UserError if it is none."""
    base = os.environ.get("GRADSHARDING_PRICE_LIST", LIST).rstrip("/")
    place = urlsplit(base)
    if place.scheme != "https" and place.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"{base} is not https; prices are not taken from there")
    url = f"{base}/offers/v1.0/aws/{offer}/current/{region}/index.json"
    try:
        answer = urllib3.PoolManager().request(
            "GET", url, timeout=urllib3.Timeout(connect=10, read=60), retries=urllib3.Retry(3, backoff_factor=0.5, redirect=3)
        )
    except urllib3.exceptions.HTTPError as error:
        raise StoreFailed(f"AWS's price list cannot be reached ({error}); nothing was changed, and the prices in use stay") from error
    if answer.status in (403, 404):
        raise UserError(f"there is no list of {offer} for {region} at {url}; is that the name of a region?")
    if answer.status != 200:
        raise StoreFailed(f"{url} answered {answer.status}; nothing was changed, try again later")
    try:
        found = json.loads(answer.data)
        _published(found)
        assert isinstance(found["products"], dict)
        assert isinstance(found["terms"]["OnDemand"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"what {url} answered is not a price list ({error!r}); nothing was changed") from error
    return dict(found)


def _find(wanted: Wanted, offer: Mapping[str, Any]) -> Decimal | None:
    """The first paid tier of the product that is wanted; None if there is none, or there are several that differ."""
    found = set()
    for sku, product in offer["products"].items():
        if not wanted.is_it(product.get("attributes", {})):
            continue
        for term in offer["terms"]["OnDemand"].get(sku, {}).values():
            tiers = sorted(term["priceDimensions"].values(), key=lambda tier: Decimal(tier.get("beginRange", "0")))
            paid = [Decimal(tier["pricePerUnit"]["USD"]) for tier in tiers if Decimal(tier["pricePerUnit"]["USD"]) > 0]
            found.update(paid[:1])
    return found.pop() if len(found) == 1 else None


def _published(offer: Mapping[str, Any]) -> str:
    """The day a list was published."""
    return datetime.fromisoformat(offer["publicationDate"]).date().isoformat()


def _write(path: Path, known: dict[str, Any], region: str, figures: Mapping[str, Decimal], dates: Mapping[str, str]) -> None:
    """Write the user's file: what was known, with what was found."""
    offers = {wanted.name: wanted.offer for wanted in WANTED}
    sources = known["source"] | {
        f"{offer}-{region}": {
            "name": "AWS's price list",
            "page": f"{LIST}/offers/v1.0/aws/{offer}/current/{region}/index.json",
            "date": day,
        }
        for offer, day in dates.items()
    }
    found = {name: {"usd": f"{price:f}", "source": f"{offers[name]}-{region}"} for name, price in figures.items()}
    regions = known["region"]
    regions[region] |= found
    lines = ["# Fetched by `gradsharding prices --refresh`; delete this file to use the prices of the release."]
    for name, source in sources.items():
        lines += [
            "",
            f"[source.{_text(name)}]",
            f"name = {_text(source['name'])}",
            f"page = {_text(source['page'])}",
            f"date = {source['date']}",
        ]
    for name, values in regions.items():
        lines += ["", f"[region.{_text(name)}]"]
        lines += [f"{key} = {_inline(value)}" for key, value in values.items() if key != "box"]
        if boxes := values.get("box"):
            lines += ["", f"[region.{_text(name)}.box]", *(f"{_text(key)} = {_inline(value)}" for key, value in boxes.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "\n".join(lines) + "\n")


def _text(value: str) -> str:
    """TOML's basic strings are JSON's, for what occurs here."""
    return json.dumps(value)


def _inline(value: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {_text(v) if isinstance(v, str) else v}" for key, v in value.items()) + " }"
