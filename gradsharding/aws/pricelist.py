"""``gradsharding prices`` shows the prices in use; with ``--refresh`` it fetches AWS's public list, shows what changes, and keeps it."""

import json
import os
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
import urllib3

from gradsharding.advice.prices import (
    HOME_REGION,
    PACKAGED,
    Price,
    PriceFile,
    Region,
    Source,
    former_user_file,
    load_prices,
    price_file,
    read_prices,
    user_file,
)
from gradsharding.errors import StoreFailed, UserError
from gradsharding.stores.files import replace
from gradsharding.text import labelled, paragraph, table

LIST = "https://pricing.us-east-1.amazonaws.com"
"""AWS's bulk price list, for which no credentials are needed
(https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/using-the-aws-price-list-bulk-api.html)."""

_PREFIX = r"(?:[A-Z]{2,5}\d?-)?"
"""Prefix of a usage type outside us-east-1: a short name of the region."""


class Wanted(NamedTuple):
    """One of our prices, and how to recognize its product in an offer's list."""

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
"""The prices to fetch. S3 Express's usage types are not known for sure, and EC2's list takes hundreds of megabytes: those prices stay."""


@click.command()
@click.option("--region", default=HOME_REGION, show_default=True, help="AWS region.")
@click.option("--refresh", is_flag=True, help="Fetch AWS's price list, show what changes, and save it in your own file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prices(region: str, *, refresh: bool, as_json: bool) -> None:
    """Show the prices in use, or fetch the current ones from AWS.

    \b
    Examples:
      gradsharding prices
      gradsharding prices --refresh --region eu-central-1

    Plans and bills use these list prices; each has its source and date. Nothing is fetched without --refresh.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    if refresh:
        click.echo(refreshed(region))
        return
    found = load_prices(region)
    if not found.figures:
        raise UserError(found.origin)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        return
    priced = [(name, price.usd, price.source) for name, price in found.figures.items()]
    priced += [(f"{name}, an hour", box.hour, box.source) for name, box in found.boxes.items()]
    used = [*dict.fromkeys(source for *_, source in priced)]
    notes = {name: f"[{number}]" for number, name in enumerate(used, 1)}
    rows = [(name, f"{usd:f}", str(found.sources[source].date), notes[source]) for name, usd, source in priced]
    for line in table(("price", "US dollars", "date", "source"), rows, "<<<<"):
        click.echo(line)
    sources = [(note, f"{found.sources[name].name}: {found.sources[name].page}") for name, note in notes.items()]
    click.echo(f"\n{labelled(sources)}\n")
    click.echo(paragraph(found.origin))


def refreshed(region: str) -> str:
    """Fetch a region's prices into the user's file, and say what changed; raise StoreFailed or UserError, with nothing written."""
    before = _before(region)
    known = before.region[region]
    lists = {offer: _fetch(offer, region) for offer in dict.fromkeys(wanted.offer for wanted in WANTED)}
    figures = {
        wanted.name: Price(usd=usd, source=f"{wanted.offer}-{region}")
        for wanted in WANTED
        if (usd := _find(wanted, lists[wanted.offer])) is not None
    }
    if not figures:
        raise UserError(f"AWS's price list has none of our prices for {region}; is that the name of a region?")
    lines = []
    for name in figures | known.figures:
        old = known.figures.get(name)
        if name not in figures:
            kept = known.figures[name]
            lines.append(f"{name}: the list does not have it; it stays {kept.usd:f}, of {before.source[kept.source].date}")
        elif not old or old.usd != figures[name].usd:
            lines.append(f"{name}: {f'{old.usd:f}' if old else 'unknown'} → {figures[name].usd:f}")
    if known.box:
        lines.append("EC2's list is too large to fetch: its prices stay")
    sources = {
        f"{offer}-{region}": Source(name="AWS's price list", page=f"{LIST}{_path(offer, region)}", date=_published(found))
        for offer, found in lists.items()
    }
    after = PriceFile(
        source=before.source | sources, region={**before.region, region: Region(box=known.box, **{**known.figures, **figures})}
    )
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, after.model_dump_json(indent=2) + "\n")
    if former_user_file().is_file():
        lines.append(f"{former_user_file()} is no longer read, and can be deleted")
    return "\n".join([*lines, f"{len(figures)} prices of {region} are now in {path}; delete that file to use the packaged prices"])


def _before(region: str) -> PriceFile:
    """Read the user's own file; give it the packaged prices of the region if it lacks that.

    Other packaged regions stay out of the user's file: there they would hide those of later releases.
    """
    own = read_prices(price_file()) if price_file() != PACKAGED else PriceFile()
    if region in own.region:
        return own
    packaged = read_prices(PACKAGED)
    known = packaged.region.get(region, Region())
    used = {priced.source for priced in (known.figures | known.box).values()}
    sources = {name: source for name, source in packaged.source.items() if name in used}
    return PriceFile(source=sources | own.source, region={**own.region, region: known})


def _path(offer: str, region: str) -> str:
    """Path of an offer's list."""
    return f"/offers/v1.0/aws/{offer}/current/{region}/index.json"


def _fetch(offer: str, region: str) -> dict[str, Any]:
    """Fetch an offer's list; raise StoreFailed if it cannot be fetched, UserError if the answer is not a price list."""
    base = os.environ.get("GRADSHARDING_PRICE_LIST", LIST).rstrip("/")
    place = urlsplit(base)
    if place.scheme != "https" and place.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"{base} is not https; prices are not taken from there")
    url = f"{base}{_path(offer, region)}"
    try:
        answer = urllib3.PoolManager().request(
            "GET", url, timeout=urllib3.Timeout(connect=10, read=60), retries=urllib3.Retry(3, backoff_factor=0.5, redirect=3)
        )
    except urllib3.exceptions.HTTPError as error:
        raise StoreFailed(f"AWS's price list cannot be reached ({error}); nothing was changed, and the prices in use stay") from error
    if answer.status in (403, 404):
        raise UserError(f"there is no list of {offer} for {region} at {url}; is that the name of a region?")
    if answer.status != 200:
        raise StoreFailed(f"{url} answered {answer.status}; nothing was changed; try again later")
    try:
        found = json.loads(answer.data)
        _published(found)
        assert isinstance(found["products"], dict)
        assert isinstance(found["terms"]["OnDemand"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"the answer of {url} is not a price list ({error!r}); nothing was changed") from error
    return dict(found)


def _find(wanted: Wanted, offer: Mapping[str, Any]) -> Decimal | None:
    """Price of the product's first paid tier; None if there is no such product, or several whose prices differ."""
    found = set()
    for sku, product in offer["products"].items():
        if not wanted.is_it(product.get("attributes", {})):
            continue
        for term in offer["terms"]["OnDemand"].get(sku, {}).values():
            tiers = sorted(term["priceDimensions"].values(), key=lambda tier: Decimal(tier.get("beginRange", "0")))
            paid = [Decimal(tier["pricePerUnit"]["USD"]) for tier in tiers if Decimal(tier["pricePerUnit"]["USD"]) > 0]
            found.update(paid[:1])
    return found.pop() if len(found) == 1 else None


def _published(offer: Mapping[str, Any]) -> date:
    """The day on which a list was published."""
    return datetime.fromisoformat(offer["publicationDate"]).date()
