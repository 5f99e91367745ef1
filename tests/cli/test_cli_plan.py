"""``gradsharding plan``: what it shows, and what its options change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rigs.command import flowing


def test_plan_shows_topologies_side_by_side(call: Callable[..., str]) -> None:
    """A plan is a table, a row for each topology; what does not fit is marked, with the reason below, and one is recommended."""
    said = call("plan", "--size", "528MB", "--clients", "20", "--shards", "4", "--memory", "1GiB")
    rows = [line[2:].split() for line in said.splitlines()[2:9]]

    assert ["topology", "shards", "fan-in", "functions", "memory", "time", "cost"] == rows[0]
    assert ["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"] == [row[0] for row in rows[2:]]
    assert ["4", "-", "4", "640", "MiB"] == rows[3][1:6]
    assert ["x ", "* ", "x ", "x "] == [line[:2] for line in said.splitlines()[4:8]]
    text = flowing(said)
    assert "flat, lambda-fl and lifl do not fit: memory: a function needs 1200.0 MiB, and may have 1024.0 MiB." in text
    assert "Take sharded with 4 shards: about " in text
    assert "The clients' downloads of the new model cost another $0.885 a round, whatever the topology." in text
    assert "Lambda is cheaper than an always-on m7g.large ($0.0816 an hour, 90.2 s a round) at every rate that this" in text
    assert "Flower's own server would hold 10.8 GiB in memory: r7g.large" in text
    assert "Times are modelled medians, prices are list prices of us-east-1" in text


def test_plan_beside_a_server(call: Callable[..., str]) -> None:
    """An always-on machine is compared with Lambda only where a topology fits, and only if the machine meets the deadline itself."""
    plan = ("plan", "--size", "8MB", "--clients", "3", "--shards", "2")
    compared, alone, neither = (flowing(call(*plan, *options)) for options in ((), ("--budget", "0.000001"), ("--deadline", "0.001s")))

    assert "an always-on m7g.large" in compared.replace("An always-on", "an always-on")
    assert "No topology fits these limits." in alone
    assert "An always-on m7g.large ($0.0816 an hour, 0.2 s a round) can run " in alone
    assert "cheaper" not in alone
    assert "always-on" not in neither


def test_plan_in_detail(call: Callable[..., str]) -> None:
    """--detail shows all figures of the JSON, and AWS's limits with their sources."""
    plan = ("plan", "--size", "528MB", "--clients", "20", "--shards", "4", "--memory", "1GiB")
    brief, detail, figures = call(*plan), call(*plan, "--detail"), json.loads(call(*plan, "--json"))

    assert [] == [line for line in brief.splitlines() if line not in detail]
    assert "AWS's limit for the memory of a function: 10240.0 MiB (" in detail
    assert "https://docs.aws.amazon.com/lambda/" in detail
    assert "https:" not in brief
    table = [line[2:] for line in detail.partition("Requests and bytes")[2].splitlines()]
    for row in figures["topologies"]:
        requests = next(line.split() for line in table if line.startswith(f"{row['topology']} "))
        assert [f"{row[name]:,}" for name in ("waves", "gets", "puts")] == requests[1:4]


def test_plan_as_json(call: Callable[..., str]) -> None:
    """Three clients of 32 MiB: a task reads 8 MiB a time, and the caller asks besides; all figures are plain numbers."""
    said = json.loads(call("plan", "--size", "32MiB", "--clients", "3", "--shards", "4", "--json"))
    found = {row["topology"]: row for row in said["topologies"]}

    assert (32 << 20, 3, 10240 << 20) == (said["size"], said["clients"], said["needs"]["memory"])
    assert ["flat", "sharded", "lambda-fl", "lifl", "sharded-tree"] == [*found]
    keys = ("shards", "fan_in", "functions", "waves", "gets", "puts", "fits", "problem")
    # 3 headers, is there a result or a plan, the result's version, the parts that are joined; puts are in test_requests
    assert [1, None, 1, 1, 12 + 6 + 2, 16, True, None] == [found["flat"][k] for k in keys]
    assert [4, None, 4, 1, 12 + 6 + 2, 18, True, None] == [found["sharded"][k] for k in keys]
    assert 96 << 20 < found["flat"]["bytes_read"] < 103 << 20
    assert found["sharded"]["memory"] < found["flat"]["memory"] < found["flat"]["function_memory"]
    assert said["recommended"] in found
    for row in found.values():
        assert 0 < row["seconds"]["p50"] < row["seconds"]["p95"]
        assert 0 < float(row["usd"]["aggregation"]) < float(row["usd"]["round_trip"])
    assert all(server["rounds_an_hour"] > 0 for server in said["servers"])


def test_plan_keeps_to_what_is_asked(call: Callable[..., str]) -> None:
    """A deadline, a budget, an architecture and a concurrency change what is advised; JSON says what was asked."""

    def plan(*options: str) -> Any:
        return json.loads(call("plan", "--size", "5GB", "--clients", "50", "--shards", "600", "--json", *options))

    free, hurried = plan("--concurrency", "1000"), plan("--deadline", "30s", "--arch", "x86_64", "--concurrency", "2000")
    named = {row["topology"]: row for row in hurried["topologies"]}
    assert named[hurried["recommended"]]["seconds"]["p95"] <= 30
    assert (30, "x86_64", 2000) == tuple(hurried["needs"][k] for k in ("deadline", "architecture", "concurrency"))
    assert "time limit" in named["flat"]["problem"]
    assert ("time limit", 1_800, "seconds") == (named["flat"]["limit"], *(named["flat"]["figure"][k] for k in ("value", "unit")))
    assert ("get rate", 5_500) == (free["topologies"][1]["limit"], free["topologies"][1]["figure"]["value"])
    assert free["topologies"][1]["requests_a_second"]["paced"]
    assert not free["topologies"][0]["requests_a_second"]["paced"]
    assert (900, 1_200) == (free["needs"]["timeout"], plan("--timeout", "1200")["needs"]["timeout"])
    assert plan("--budget", "0.001")["recommended"] is None
    assert plan("--clients-on-aws", "--budget", "5", "--concurrency", "1000")["recommended"] == free["recommended"]
    assert plan("--deadline", "5m")["needs"]["deadline"] == 300


def test_exact_plan(narrow: list[str], call: Callable[..., str]) -> None:
    """``plan --exact`` plans exact sums, and says that figures of trees are bounds."""
    plain, exact = (json.loads(call("plan", "--size", "528MB", "--clients", "20", "--json", *flag)) for flag in ((), ("--exact",)))

    assert ("mean", "exact-mean") == (plain["rule"], exact["rule"])
    for one, other in zip(plain["topologies"], exact["topologies"], strict=True):
        assert one["bytes_written"] <= other["bytes_written"]
        assert float(one["usd"]["aggregation"]) < float(other["usd"]["aggregation"])
    assert "With exact-mean, the figures of trees are upper bounds" in call("plan", *narrow, "--exact")


def test_plan_of_express(call: Callable[..., str]) -> None:
    """A plan with S3 Express has its prices, and says that it is no store yet; one with the standard class says nothing of it."""
    plan = ("plan", "--size", "8MB", "--clients", "3")
    said, usual = call(*plan, "--storage", "express"), call(*plan)

    assert "S3 Express is priced, but not supported as a store yet: directory buckets list objects unsorted" in flowing(said)
    assert "Express" not in usual
    assert not json.loads(call(*plan, "--storage", "express", "--json"))["storage_supported"]


@pytest.mark.slow
def test_plan_elsewhere(call: Callable[..., str]) -> None:
    """In another region its prices count; one without any is planned for all the same, and one line says how to get what is missing."""
    plan = ("plan", "--size", "528MB", "--clients", "20")
    home, there, part, nowhere = (
        json.loads(call(*plan, "--region", region, "--json")) for region in ("us-east-1", "eu-central-1", "il-central-1", "mars-1")
    )
    advice = "no price for mars-1; fetch it with: gradsharding prices --refresh --region mars-1"
    priceless = {"aggregation": None, "round_trip": None}

    assert ([], None) == ([row for row in there["topologies"] if None in row["usd"].values()], there["prices_missing"])
    assert there["prices"].startswith("list prices of eu-central-1, ")
    for row, other in zip(home["topologies"], there["topologies"], strict=True):  # only S3 is dearer there, by 8%
        assert 1 < float(other["usd"]["aggregation"]) / float(row["usd"]["aggregation"]) < 1.08
    for without, said in ((part, part["prices_missing"]), (nowhere, advice)):
        assert home["recommended"] == without["recommended"]
        assert [row | {"usd": priceless} for row in home["topologies"]] == without["topologies"]
        assert ([], said) == (without["servers"], without["prices_missing"])
    assert "no price of lambda_second_arm64, lambda_request, transfer_out_gigabyte for il-central-1; fetch it" in part["prices_missing"]
    shown = call(*plan, "--region", "mars-1")
    assert f"N{advice[1:]}. The topologies are compared at the list prices of us-east-1." in flowing(shown)
    assert "$" not in shown
    assert (5, "Times are modelled medians. This has never run on real AWS.") == (shown.count("no price"), shown.splitlines()[-1])


def test_plan_of_express_without_its_prices(call: Callable[..., str]) -> None:
    """Where no price of S3 Express is known, a plan with it says so, and where to write it."""
    said = flowing(call("plan", "--size", "528MB", "--clients", "20", "--storage", "express", "--region", "eu-central-1"))

    assert "S3 Express is not supported as a store yet" in said
    assert "No price of express_get, express_put, " in said
    assert " for eu-central-1; it is not in the list that is fetched: write it into " in said


def test_plan_of_updates(updates: list[str], call: Callable[..., str], tmp_path: Path) -> None:
    """A plan of files is one of their tensors and clients; --from reads one of them, or a directory."""
    planned = json.loads(call("plan", *updates, "--json"))
    directory = tmp_path / "some"
    directory.mkdir()
    for update in updates:
        name = update.rpartition(":")[0].rpartition("=")[2] or update
        (directory / Path(name).name).write_bytes((tmp_path / name).read_bytes())
    found = json.loads(call("plan", "--from", "some", "--json"))
    one = json.loads(call("plan", "--from", f"some/{next(directory.iterdir()).name}", "--clients", str(len(updates)), "--json"))

    assert [row["bytes_read"] for row in planned["topologies"]] == [row["bytes_read"] for row in found["topologies"]]
    assert (planned["size"], len(updates)) == (found["size"], found["clients"])
    assert found == one
