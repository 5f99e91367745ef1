"""Prices are data: dated, with their source, read from one file, never written into code."""

import os
import tomllib
from collections.abc import Collection
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from gradsharding.errors import UserError
from gradsharding.planning.platform import Architecture
from gradsharding.value import Value

PACKAGED = Path(__file__).with_name("prices.toml")
"""The prices that come with this release."""

HOME_REGION = "us-east-1"
"""The region if none is named."""

UNLISTED = "express_"
"""Prefix of the prices that ``gradsharding prices --refresh`` does not fetch."""


def _money(text: Any) -> Decimal:
    """Read a price from text; a float would not be the decimal that was written."""
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


def _plain(price: Decimal) -> str:
    """Write a price without an exponent.

    >>> _plain(Decimal("4E-7"))
    '0.0000004'
    """
    return f"{price:f}"


Money = Annotated[Decimal, BeforeValidator(_money), PlainSerializer(_plain, return_type=str, when_used="json")]
"""US dollars, exact."""


class Source(Value):
    """The origin of prices, and the day for which they were stated."""

    name: str
    page: str
    """URL of AWS's own page or list, which is authoritative."""
    date: date


class Price(Value):
    """A price, and the name of its source."""

    usd: Money
    source: str


class Box(Value):
    """An EC2 machine, on demand, such as a server that is always on would use."""

    hour: Money
    vcpus: int
    memory_gib: int
    network_gbit: Money
    """Sustained Gbit/s; most machines exceed it for a while."""
    source: str


class Region(Value):
    """One region in a price file: prices by name, and machines under ``box``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Price] = Field(init=False)
    box: dict[str, Box] = Field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Price]:
        """The prices."""
        return self.__pydantic_extra__


class PriceFile(Value):
    """A price file, in TOML or JSON."""

    source: dict[str, Source] = Field(default_factory=dict)
    region: dict[str, Region] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _every_source_is_there(self) -> Self:
        for name, region in self.region.items():
            for figure, priced in (region.figures | region.box).items():
                if priced.source not in self.source:
                    raise ValueError(f"{figure} of {name} names the source {priced.source!r}, which is not in the file")
        return self


class Prices(Value):
    """The known list prices of one region, possibly none."""

    region: str
    sources: dict[str, Source]
    figures: dict[str, Price]
    boxes: dict[str, Box]
    file: str
    """The file from which they were read."""

    def usd(self, name: str) -> Decimal:
        """Return a price in US dollars; raise UserError if it is unknown."""
        if lacks := self.lacking([name]):
            raise UserError(lacks)
        return self.figures[name].usd

    def lacking(self, names: Collection[str]) -> str | None:
        """Return a sentence on which of these prices are unknown, and how to get them; None if all are known."""
        absent = [name for name in dict.fromkeys(names) if name not in self.figures]
        if not absent:
            return None
        problem = f"no price of {', '.join(absent)} for {self.region}" if self.figures else f"no price for {self.region}"
        if all(name.startswith(UNLISTED) for name in absent):
            return f"{problem}; it is not in the list that is fetched: write it into {user_file()}"
        return f"{problem}; {self._advice}"

    def completed(self, other: "Prices") -> "Prices":
        """Fill in unknown prices from another region, to compare plans, not to make a bill."""
        return self.model_copy(update={"figures": {**other.figures, **self.figures}, "sources": {**other.sources, **self.sources}})

    def lambda_second(self, architecture: Architecture) -> Decimal:
        """Return the price of a function's GiB-second."""
        return self.usd(f"lambda_second_{architecture}")

    @property
    def origin(self) -> str:
        """A phrase on which prices these are, the date of the oldest, and the file; or that there are none."""
        if not self.figures:
            return f"no price for {self.region}; {self._advice}"
        used = {price.source for price in self.figures.values()}
        place = "packaged with this release" if self.file == str(PACKAGED) else f"from {self.file}"
        return f"list prices of {self.region}, {min(self.sources[name].date for name in used)} or later, {place}"

    @property
    def _advice(self) -> str:
        return f"fetch it with: gradsharding prices --refresh --region {self.region}"


def user_file() -> Path:
    """Return the file that ``gradsharding prices --refresh`` writes."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gradsharding" / "prices.json"


def former_user_file() -> Path:
    """Return the file that earlier releases wrote; it is used as long as there is no ``user_file``."""
    return user_file().with_suffix(".toml")


def price_file() -> Path:
    """Return the file in use: that of GRADSHARDING_PRICES, the user's, or the packaged one."""
    if named := os.environ.get("GRADSHARDING_PRICES"):
        return Path(named)
    return next((path for path in (user_file(), former_user_file()) if path.is_file()), PACKAGED)


def read_prices(file: Path) -> PriceFile:
    """Read a price file: TOML if its name ends in ``.toml``, else JSON. Raise UserError if it is missing or invalid."""
    try:
        text = file.read_text()
        return PriceFile.model_validate(tomllib.loads(text)) if file.suffix == ".toml" else PriceFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] != "json_invalid":
            place = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{file}: {f'{place}: ' if place else ''}{reason}; correct it, or delete the file") from error
        problem = first["msg"]
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    raise UserError(f"{file} cannot be read as prices ({problem}); unset GRADSHARDING_PRICES, or delete the file to use the packaged ones")


def load_prices(region: str = HOME_REGION, path: Path | None = None) -> Prices:
    """Read the known prices of a region; raise UserError as ``read_prices`` does.

    If the user's own file lacks the region, the packaged prices are used.
    """
    file = path or price_file()
    found = read_prices(file)
    known = found.region.get(region, Region())
    if not known.figures and file in (user_file(), former_user_file()):
        return load_prices(region, PACKAGED)
    return Prices(region=region, sources=found.source, figures=known.figures, boxes=known.box, file=str(file))
