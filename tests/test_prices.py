"""Prices are exact, dated and sourced; AWS's list is fetched only when asked, and nothing is half-written."""

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gradsharding.advice.prices import PACKAGED, former_user_file, load_prices, price_file, read_prices, user_file
from gradsharding.cli import main as cli
from gradsharding.errors import UserError
from rigs.serving import serving

Session = pytest.importorskip("boto3", reason="boto3 is not installed").session.Session

TODAY, EARLIEST = datetime.now(UTC).date(), date(2023, 1, 1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a home of its own, without price files."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GRADSHARDING_PRICES", raising=False)
    monkeypatch.delenv("GRADSHARDING_PRICE_LIST", raising=False)
    return tmp_path


def test_every_figure_has_a_source_and_a_date() -> None:
    """Each packaged price names a source that the file describes, whose date is not to come."""
    known = tomllib.loads(PACKAGED.read_text())
    today, used = datetime.now(UTC).date(), set[str]()

    assert all(source["date"] <= today and source["page"].startswith("https://") for source in known["source"].values())
    for region in known["region"]:
        prices = load_prices(region)
        used |= {price.source for price in prices.figures.values()} | {machine.source for machine in prices.boxes.values()}
        assert used <= {*prices.sources}
    assert {*known["source"]} == used


def faults(text: str) -> list[str]:
    """Hold a file of prices against what is true of AWS's in each region; give what is not."""
    known = tomllib.loads(text)
    real = {region for partition in ("aws", "aws-us-gov") for region in Session().get_available_regions("s3", partition_name=partition)}
    home, found = known["region"]["us-east-1"], list[str]()
    for region, figures in known["region"].items():
        if region not in real:
            found.append(f"{region} is no region")
        usd = {name: Decimal(figure["usd"]) for name, figure in figures.items() if name != "box"}
        found += [f"{region}: nothing is known as {name}" for name in usd if name not in home]
        found += [
            f"{region}: {name} is {usd[name] / Decimal(home[name]['usd']):.1f} times that of us-east-1"
            for name in usd
            if name in home and not Decimal("0.5") < usd[name] / Decimal(home[name]["usd"]) < 2
        ]
        for less, more in (("lambda_second_arm64", "lambda_second_x86_64"), ("s3_get", "s3_put"), ("lambda_request", "s3_get")):
            if less in usd and more in usd and not usd[less] < usd[more]:
                found.append(f"{region}: {less} is not less than {more}")
        sources = [figure["source"] for name, figure in figures.items() if name != "box"]
        found += [f"{region}: there is no source {source}" for source in sources if source not in known["source"]]
    found += [
        f"{name}: {one['date']} is no day of the past" for name, one in known["source"].items() if not EARLIEST < one["date"] <= TODAY
    ]
    return found


def test_packaged_prices() -> None:
    """Regions are real, figures within twice of the home region's, Arm cheaper than x86, GET than PUT; each has a source of the past."""
    assert [] == faults(PACKAGED.read_text())


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ('s3_put = { usd = "0.0000054"', 's3_put = { usd = "0.000054"', "eu-central-1: s3_put is 10.8 times that of us-east-1"),
        ('s3_gigabyte_month = { usd = "0.0405"', 's3_gigabyte_month = { usd = "0.0505"', "sa-east-1: s3_gigabyte_month is 2.2 times"),
        (
            'lambda_second_arm64 = { usd = "0.00001768"',
            'lambda_second_arm64 = { usd = "0.0000222"',
            "af-south-1: lambda_second_arm64 is not",
        ),
        ('s3_get = { usd = "0.00000037"', 's3_got = { usd = "0.00000037"', "ap-northeast-1: nothing is known as s3_got"),
        ("[region.eu-central-1]", "[region.eu-central-9]", "eu-central-9 is no region"),
        ('usd = "0.0245", source = "quoted_s3"', 'usd = "0.0245", source = "hearsay"', "eu-central-1: there is no source hearsay"),
        ("date = 2024-09-25", "date = 2124-09-25", "wetzel: 2124-09-25 is no day of the past"),
    ],
)
def test_wrong_packaged_prices(right: str, wrong: str, said: str) -> None:
    """A decimal point in the wrong place, a wrong name, region or source, or a day to come is found."""
    text = PACKAGED.read_text()
    assert right in text

    assert faults(text.replace(right, wrong, 1))[0].startswith(said)


def test_a_region_of_which_a_part_is_known() -> None:
    """What is known of a region is there, what is not says where to get it; S3 Express is not in the list that is fetched."""
    prices = load_prices("il-central-1")

    assert Decimal("0.0000055") == prices.usd("s3_put")
    assert prices.lacking(["s3_put", "s3_get"]) is None
    advice = "fetch it with: gradsharding prices --refresh --region il-central-1"
    assert f"no price of lambda_request for il-central-1; {advice}" == prices.lacking(["lambda_request", "s3_put"])
    assert f"write it into {user_file()}" in (load_prices("eu-central-1").lacking(["express_put"]) or "")


def test_exact() -> None:
    """A price is the decimal that was written, not the float next to it."""
    prices = load_prices()

    assert Decimal("0.0000166667") == prices.lambda_second("x86_64")
    assert Decimal("0.0000133334") == prices.lambda_second("arm64")
    assert "0.0000133334" == str(prices.usd("lambda_second_arm64").__format__("f"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3_put = { usd = 0.5, source = 'a' }", "0.5 is not a price; write it as text"),
        ("s3_put = { usd = '-1', source = 'a' }", "must not be negative"),
        ("s3_put = { usd = 'NaN', source = 'a' }", "is not a price"),
        ("s3_put = { usd = 'cheap', source = 'a' }", "'cheap' is not a price"),
        ("s3_put = { usd = '1', source = 'b' }", "names the source 'b', which is not in the file"),
        ("s3_put = { usd = '1' }", "source: Field required"),
        ("s3_put = ", "cannot be read as prices"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, why: str) -> None:
    """A file with a wrong figure is refused with the figure and the reason."""
    file = tmp_path / "prices.toml"
    file.write_text(f"[source.a]\nname = 'a'\npage = 'https://a'\ndate = 2026-01-01\n[region.us-east-1]\n{text}\n")

    with pytest.raises(UserError, match=why):
        load_prices(path=file)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"s3_put": {"usd": 0.5, "source": "a"}}', "region.us-east-1.s3_put.usd: 0.5 is not a price; write it as text"),
        ('{"s3_put": {"usd": "1", "source": "b"}}', "s3_put of us-east-1 names the source 'b', which is not in the file; correct it"),
        ('{"s3_put": ', r"cannot be read as prices \(Invalid JSON"),
    ],
)
def test_wrong_files_in_json(tmp_path: Path, text: str, why: str) -> None:
    """The same goes for a file in JSON."""
    file = tmp_path / "prices.json"
    file.write_text(f'{{"source": {{"a": {{"name": "a", "page": "https://a", "date": "2026-01-01"}}}}, "region": {{"us-east-1": {text}}}}}')

    with pytest.raises(UserError, match=why):
        load_prices(path=file)


def test_unknown() -> None:
    """Of a region that is in no file nothing is known, and it says how to get that; who asks for a price gets the same as an error."""
    nothing = load_prices("mars-1")
    said = "no price for mars-1; fetch it with: gradsharding prices --refresh --region mars-1"

    assert ({}, {}, said, said) == (nothing.figures, nothing.boxes, nothing.origin, nothing.lacking(["s3_put"]))
    with pytest.raises(UserError, match=f"^{said}$"):
        nothing.usd("s3_put")
    with pytest.raises(
        UserError, match=r"^no price of tea for us-east-1; fetch it with: gradsharding prices --refresh --region us-east-1$"
    ):
        load_prices().usd("tea")


def test_which_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is named comes first, then the user's, then the one that an earlier release wrote, then the packaged one."""
    assert PACKAGED == price_file()
    user_file().parent.mkdir(parents=True)
    for file, text in (
        (former_user_file(), PACKAGED.read_text().replace("0.0000133334", "0.1")),
        (user_file(), read_prices(PACKAGED).model_dump_json().replace("0.0000133334", "0.2")),
    ):
        file.write_text(text)
        assert file == price_file()
        assert str(file) in load_prices().origin
        file.write_text(text.replace("eu-central-1", "other"))
        assert load_prices("eu-central-1", PACKAGED) == load_prices("eu-central-1")  # what the user's file does not have
    assert Decimal("0.2") == load_prices().lambda_second("arm64")
    for name in ("mine.toml", "mine.json"):
        monkeypatch.setenv("GRADSHARDING_PRICES", str(home / name))
        assert home / name == price_file()
        with pytest.raises(UserError, match=f"{name} cannot be read as prices"):
            load_prices()


def offer(products: dict[str, tuple[dict[str, str], list[tuple[str, str]]]]) -> dict[str, Any]:
    """Write an offer as AWS's price list does: products, and their tiers as (begin, dollars)."""
    return {
        "formatVersion": "v1.0",
        "publicationDate": "2026-11-20T12:00:00Z",
        "products": {sku: {"sku": sku, "attributes": attributes} for sku, (attributes, _) in products.items()},
        "terms": {
            "OnDemand": {
                sku: {
                    f"{sku}.T": {
                        "priceDimensions": {
                            f"{sku}.T.{i}": {"beginRange": begin, "pricePerUnit": {"USD": usd}} for i, (begin, usd) in enumerate(tiers)
                        }
                    }
                }
                for sku, (_, tiers) in products.items()
            }
        },
    }


def lists(prefix: str = "") -> dict[str, Any]:
    """Give the offers of a region."""
    here = {"location": "US East (N. Virginia)"}
    return {
        "AWSLambda": offer(
            {
                "A": ({"group": "AWS-Lambda-Duration", **here}, [("6000000000", "0.0000150000"), ("0", "0.0000166667")]),
                "B": ({"group": "AWS-Lambda-Duration-ARM", **here}, [("0", "0.0000120000")]),
                "C": ({"group": "AWS-Lambda-Requests-ARM", **here}, [("0", "0.0000002000")]),
                "D": ({"group": "AWS-Lambda-Duration", "location": "Any"}, [("0", "0.0000000000")]),
            }
        ),
        "AmazonS3": offer(
            {
                "E": ({"usagetype": f"{prefix}Requests-Tier1"}, [("0", "0.0000050000")]),
                "F": ({"usagetype": f"{prefix}Requests-Tier2"}, [("0", "0.0000004000")]),
                "G": ({"usagetype": f"{prefix}TimedStorage-ByteHrs"}, [("0", "0.0230000000"), ("51200", "0.0220000000")]),
                "H": ({"usagetype": f"{prefix}EarlyDelete-ByteHrs"}, [("0", "9")]),
            }
        ),
        "AWSDataTransfer": offer({"I": ({"usagetype": f"{prefix}DataTransfer-Out-Bytes"}, [("0", "0"), ("100", "0.0800000000")])}),
        "AmazonCloudWatch": offer({"J": ({"usagetype": f"{prefix}CW:AlarmMonitorUsage"}, [("0", "0.1000000000")])}),
    }


class Lists:
    """AWS's price list, on this machine."""

    def __init__(self) -> None:
        self.regions: dict[str, dict[str, Any]] = {"us-east-1": lists(), "eu-west-1": lists("EU-")}
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lists]:
    """Serve price lists over HTTP on loopback."""
    known = Lists()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known.asked.append(self.path)
            _, _, _, _, name, _, region, _ = self.path.split("/")
            found = known.regions.get(region, {}).get(name)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(b"" if found is None else found if isinstance(found, bytes) else json.dumps(found).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Keep quiet."""

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as known.url:
        monkeypatch.setenv("GRADSHARDING_PRICE_LIST", known.url)
        yield known


def test_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Prices are shown with their sources and dates; nothing is asked of anybody."""
    assert 0 == cli.main(["prices"])
    said = capsys.readouterr().out
    assert "s3_put" in said
    assert "0.000005" in said
    assert "2026-03-08" in said
    assert 0 == cli.main(["prices", "--json"])
    assert "0.000005" == json.loads(capsys.readouterr().out)["figures"]["s3_put"]["usd"]


def test_shown_of_another_region(capsys: pytest.CaptureFixture[str]) -> None:
    """Another region's prices are its own, with their sources; of one of which nothing is known, that is an error."""
    assert 0 == cli.main(["prices", "--region", "eu-central-1"])
    said = capsys.readouterr().out
    assert re.search(r"s3_put +0\.0000054 +2026-08-31 +\[2\]\n", said)
    assert re.search(r"  \[2\]  AWS.s list, quoted in ", said)
    assert "list prices of eu-central-1, 2026-08-31 or later" in said
    assert 2 == cli.main(["prices", "--region", "mars-1"])
    assert "no price for mars-1; fetch it with: gradsharding prices --refresh --region mars-1\n" in capsys.readouterr().err


@pytest.mark.usefixtures("served")
def test_refresh(capsys: pytest.CaptureFixture[str]) -> None:
    """What changes is shown, the user's file is written with source and date, and counts from then on; the first paid tier is taken."""
    before = load_prices()
    assert 0 == cli.main(["prices", "--refresh"])
    said, after = capsys.readouterr().out, load_prices()

    assert "lambda_second_arm64: 0.0000133334 → 0.0000120000" in said
    assert "transfer_out_gigabyte: 0.09 → 0.0800000000" in said
    assert "s3_put" not in said
    assert "express_put: the list does not have it; it stays 0.00000113, of 2025-04-10" in said
    assert "EC2's list is too large to fetch: its prices stay" in said
    assert f"8 prices of us-east-1 are now in {user_file()}" in said
    assert str(user_file()) == after.file
    assert (Decimal("0.000012"), Decimal("0.0000166667")) == (after.lambda_second("arm64"), after.lambda_second("x86_64"))
    assert before.boxes == after.boxes
    assert "2026-11-20" == str(after.sources[after.figures["s3_get"].source].date)
    assert after.sources[after.figures["s3_get"].source].page.endswith("/offers/v1.0/aws/AmazonS3/current/us-east-1/index.json")
    assert [] == [path.name for path in user_file().parent.iterdir() if path != user_file()]
    assert 0 == cli.main(["prices", "--refresh"])
    assert "→" not in capsys.readouterr().out


@pytest.mark.usefixtures("served", "capsys")
def test_refresh_through_a_link(tmp_path: Path) -> None:
    """A user's file that is a link, to where all such files are kept say, stays one; what it leads to keeps its mode."""
    kept = tmp_path / "kept.json"
    assert 0 == cli.main(["prices", "--refresh"])
    user_file().rename(kept)
    kept.chmod(0o600)
    user_file().symlink_to(kept)
    assert 0 == cli.main(["prices", "--refresh", "--region", "eu-west-1"])

    assert (True, 0o600) == (user_file().is_symlink(), kept.stat().st_mode & 0o7777)
    assert ["us-east-1", "eu-west-1"] == [*json.loads(kept.read_text())["region"]]


@pytest.mark.usefixtures("served")
def test_refresh_of_another_region(capsys: pytest.CaptureFixture[str]) -> None:
    """Other regions name their products with a prefix; what the list does not have stays."""
    assert 0 == cli.main(["prices", "--refresh", "--region", "eu-west-1"])
    assert "transfer_out_gigabyte: 0.09 → 0.0800000000" in capsys.readouterr().out
    assert "AWS's price list" == load_prices("eu-west-1").sources["AmazonS3-eu-west-1"].name
    assert Decimal("0.000005") == load_prices("eu-west-1").usd("s3_put")
    assert load_prices("eu-west-1").usd("lambda_storage_second") == load_prices("eu-west-1", PACKAGED).usd("lambda_storage_second")


def test_refresh_of_a_region_that_was_unknown(served: Lists, capsys: pytest.CaptureFixture[str]) -> None:
    """What a line without a price advises gives the price; the file then has that region only, so that later releases' others count."""
    served.regions["mx-central-1"] = lists("MXC1-")
    assert load_prices("mx-central-1").lacking(["s3_put"])
    assert 0 == cli.main(["prices", "--refresh", "--region", "mx-central-1"])
    assert "s3_put: unknown → 0.0000050000" in capsys.readouterr().out
    assert Decimal("0.000005") == load_prices("mx-central-1").usd("s3_put")
    assert load_prices().figures == load_prices(path=PACKAGED).figures
    assert ["mx-central-1"] == [*json.loads(user_file().read_text())["region"]]
    assert 0 == cli.main(["prices", "--refresh"])
    assert ["mx-central-1", "us-east-1"] == [*json.loads(user_file().read_text())["region"]]


@pytest.mark.usefixtures("served")
def test_refresh_of_an_earlier_release(capsys: pytest.CaptureFixture[str]) -> None:
    """What the user's file in TOML says is read, and carried over into the one in JSON; the user learns which of them counts."""
    former_user_file().parent.mkdir(parents=True)
    source = 'name = "an offer"\npage = "https://example.com"\ndate = 2026-01-01'
    figures = 's3_put = { usd = "0.000004", source = "ours" }\nexpress_put = { usd = "0.00000003", source = "ours" }'
    former_user_file().write_text(f"[source.ours]\n{source}\n[region.us-east-1]\n{figures}\n")
    assert Decimal("0.000004") == load_prices().usd("s3_put")
    assert 0 == cli.main(["prices", "--refresh"])
    said, after = capsys.readouterr().out, load_prices()

    assert "s3_put: 0.000004 → 0.0000050000" in said
    assert f"{former_user_file()} is no longer read, and can be deleted" in said
    assert (str(user_file()), Decimal("0.000005"), Decimal("0.00000003")) == (after.file, after.usd("s3_put"), after.usd("express_put"))
    assert "an offer" == after.sources[after.figures["express_put"].source].name


@pytest.mark.usefixtures("served")
def test_no_such_region(capsys: pytest.CaptureFixture[str]) -> None:
    """A region without a list is the user's mistake; nothing is written."""
    assert 2 == cli.main(["prices", "--refresh", "--region", "mars-1"])
    assert "is that the name of a region?" in capsys.readouterr().err
    assert not user_file().exists()


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"publicationDate": "today"}', b'{"publicationDate": "2026-01-01", "products": []}'])
def test_no_price_list(served: Lists, capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    """What is not a price list is refused; nothing is written."""
    served.regions["us-east-1"]["AmazonS3"] = body
    assert 2 == cli.main(["prices", "--refresh"])
    assert "is not a price list" in capsys.readouterr().err
    assert not user_file().exists()


def test_unreachable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the list cannot be reached, one error says so; nothing is written."""
    monkeypatch.setenv("GRADSHARDING_PRICE_LIST", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    assert 1 == cli.main(["prices", "--refresh"])
    assert "AWS's price list cannot be reached" in capsys.readouterr().err
    assert not user_file().exists()


def test_no_plain_http(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices are not taken over plain HTTP from elsewhere."""
    monkeypatch.setenv("GRADSHARDING_PRICE_LIST", "http://prices.example")
    assert 2 == cli.main(["prices", "--refresh"])
    assert "is not https" in capsys.readouterr().err


def test_nothing_else_fetches(served: Lists) -> None:
    """Planning asks nobody for prices."""
    assert 0 == cli.main(["plan", "--size", "1MB", "--clients", "2", "--json"])
    assert [] == served.asked
