"""Prices are data: dated, with their source, read from one file, and never written into code."""

import os
import tomllib
from collections.abc import Collection
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from gradsharding.errors import UserError
from gradsharding.planning.platform import Architecture
from gradsharding.value import Value

PACKAGED = Path(__file__).with_name("prices.toml")
"""The prices that this release brings along."""

HOME_REGION = "us-east-1"
"""The region that is meant where none is named."""

UNLISTED = "express_"
"""How the names of prices begin that ``gradsharding prices --refresh`` does not look for."""


def _money(text: Any) -> Decimal:
    """Read a price; a float would not be what was written."""
    if isinstance(text, Decimal):
        return text
    if not isinstance(text, str):
        raise ValueError(f'{text!r} is not a price; write it as text, like "0.09"')  # noqa: TRY004 - pydantic reports ValueErrors
    try:
        price = Decimal(text)
    except InvalidOperation:
        raise ValueError(f'{text!r} is not a price; write it like "0.09"') from None
    if not price.is_finite() or price < 0:
        raise ValueError(f"{text!r} is not a price; it must not be negative")
    return price


Money = Annotated[Decimal, BeforeValidator(_money)]
"""US dollars, exact."""


class Source(Value):
    """Where figures were found, and the day they were said to hold."""

    name: str
    page: str
    """The page or list that says so with authority."""
    date: date


class Price(Value):
    """A figure, and the name of its source."""

    usd: Money
    source: str


class Box(Value):
    """A machine on EC2, on demand: what an always-on server would be."""

    hour: Money
    vcpus: int
    memory_gib: int
    network_gbit: Money
    """Gbit/s that it may use for good; for a while, most may use more."""
    source: str


class Prices(Value):
    """List prices of one region: as many as are known of it, which may be none."""

    region: str
    sources: dict[str, Source]
    figures: dict[str, Price]
    boxes: dict[str, Box]
    file: str
    """The file they were read from."""

    def usd(self, name: str) -> Decimal:
        """Give a price in US dollars; raise UserError if none of that name is known."""
        if lacks := self.lacking([name]):
            raise UserError(lacks)
        return self.figures[name].usd

    def lacking(self, names: Collection[str]) -> str | None:
        """Say which of some prices are not known, and where to get them; None if all are."""
        absent = [name for name in dict.fromkeys(names) if name not in self.figures]
        if not absent:
            return None
        what = f"no price of {', '.join(absent)} for {self.region}" if self.figures else f"no price for {self.region}"
        if all(name.startswith(UNLISTED) for name in absent):
            return f"{what}; it is not in the list that is fetched: write it into {user_file()}"
        return f"{what}; {self._advice}"

    def completed(self, other: "Prices") -> "Prices":
        """Take from another region what is not known of this one: to compare plans by, not to bill by."""
        return self.model_copy(update={"figures": {**other.figures, **self.figures}, "sources": {**other.sources, **self.sources}})

    def lambda_second(self, architecture: Architecture) -> Decimal:
        """Price of a GiB-second of a function."""
        return self.usd(f"lambda_second_{architecture}")

    @property
    def origin(self) -> str:
        """Say which prices these are, and how old the oldest is; or that there are none."""
        if not self.figures:
            return f"no price for {self.region}; {self._advice}"
        used = {price.source for price in self.figures.values()}
        where = "as this release has them" if self.file == str(PACKAGED) else self.file
        return f"list prices of {self.region}, {min(self.sources[name].date for name in used)} or later, {where}"

    @property
    def _advice(self) -> str:
        return f"fetch it with: gradsharding prices --refresh --region {self.region}"


def user_file() -> Path:
    """Where ``gradsharding prices --refresh`` keeps what it has fetched."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gradsharding" / "prices.toml"


def price_file() -> Path:
    """The file in use: the one named by GRADSHARDING_PRICES, the user's, or the packaged one."""
    if named := os.environ.get("GRADSHARDING_PRICES"):
        return Path(named)
    return user_file() if user_file().is_file() else PACKAGED


def load_prices(region: str = HOME_REGION, path: Path | None = None) -> Prices:
    """Read the prices of a region, none if none are known; raise UserError if there is no such file, or it is wrong.

    Of a region that the user's own file does not have, the packaged prices count.
    """
    file = path or price_file()
    try:
        found = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as prices ({error}); unset GRADSHARDING_PRICES, or delete it to use the packaged ones"
        ) from error
    known = found.get("region", {}).get(region, {})
    if not known and file == user_file():
        return load_prices(region, PACKAGED)
    figures = {name: value for name, value in known.items() if name != "box"}
    try:
        prices = Prices(region=region, sources=found.get("source", {}), figures=figures, boxes=known.get("box", {}), file=str(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct it, or delete the file") from error
    for name, priced in (prices.figures | prices.boxes).items():
        if priced.source not in prices.sources:
            raise UserError(f"{file}: {name} of {region} names the source {priced.source!r}, which is not in the file")
    return prices
