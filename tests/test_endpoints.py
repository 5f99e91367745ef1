"""S3 servers that are not AWS's: those that can be had keep the store's contract, or are refused before anything is written."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.aws.demands import EQUAL_PARTS
from gradsharding.aws.dialect import Dialect, dialect
from gradsharding.aws.s3.direct import UrlSource, offer, write
from gradsharding.aws.s3.presign import grant, readable, settle
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import ChangedObject, ObjectExists, StoreRefused, UserError
from gradsharding.format.encode import encode
from gradsharding.planning.topologies import LambdaFLTree, Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, InlineExecutor
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.compose import MINIMUM, compose_equal
from gradsharding.testing import StoreContract, assert_same, read, reference_mean
from gradsharding.usage import total
from gradsharding_flower import GradSharding
from gradsharding_flower.testing import LocalGrid
from rigs.endpoints import (
    EqualParts,
    Unconditional,
    Unimplemented,
)
from rigs.s3 import Ceph, S3Server

MIB = 1 << 20

PAGE = Path(__file__).parents[1] / "deploy" / "ENDPOINTS.md"


@pytest.fixture(scope="module")
def ministack_s3(ministack: Mapping[str, str]) -> S3Server:
    """Ministack's S3."""
    return S3Server(ministack["AWS_ENDPOINT_URL_S3"], ministack["AWS_ACCESS_KEY_ID"], ministack["AWS_SECRET_ACCESS_KEY"], checks=False)


@pytest.fixture(scope="module")
def equal_parts(ceph: Ceph) -> Iterator[S3Server]:
    """Ceph behind R2's rule."""
    with EqualParts(ceph.server.endpoint) as proxy:
        yield S3Server(proxy.endpoint, ceph.server.access_key, ceph.server.secret_key, seen=ceph.server.seen)


WORKING = {"SeaweedFS": "seaweed", "MiniStack": "ministack_s3", "Ceph, with R2's rule before it": "equal_parts"}
"""Servers that work, as the page names them; moto and Ceph run the same in ``test_s3.py``."""

CONTRACT = [name for name in WORKING if name != "MiniStack"]
"""Those that run the store's contract here. MiniStack keeps it, too: it was tried by hand, as it costs half a minute."""

REFUSED = {"rclone serve s3": "rclone", "moto, without conditions": "unconditional", "moto, refusing conditions": "unimplemented"}
"""Servers that are refused."""


def _lead_to(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def _server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> S3Server:
    server: S3Server = request.getfixturevalue(WORKING[name])
    _lead_to(server, monkeypatch)
    if WORKING[name] == "equal_parts":
        monkeypatch.setenv(EQUAL_PARTS, "1")
    return server


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.rig) for name in WORKING])
def working(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Give each server that works, to which the environment leads."""
    return _server(request, monkeypatch, request.param)


class TestContract(StoreContract):
    """The contract on each."""

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read by boto3 alone."""
        data: bytes = store.client.get_object(Bucket=store.bucket, Key=store.prefix + key)["Body"].read()
        return data

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write by boto3 alone."""
        store.client.put_object(Bucket=store.bucket, Key=store.prefix + key, Body=data)

    @pytest.fixture(params=[pytest.param(name, marks=pytest.mark.rig) for name in CONTRACT])
    def store(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Give an empty store."""
        return S3Store(f"s3://{_server(request, monkeypatch, request.param).make_bucket()}/some prefix")


def _nothing_hidden(store: S3Store) -> bool:
    keys = [found["Key"] for found in store.client.list_objects_v2(Bucket=store.bucket).get("Contents", [])]
    return not [key for key in keys if ".gradsharding" in key]


def test_round(working: S3Server) -> None:
    """A round whose caller is killed goes on, has the bits of the reference, makes the requests that were planned, and leaves nothing."""
    draw = np.random.default_rng(0)
    updates = {c: ({"w": draw.normal(size=5 * MIB).astype("f4")}, i + 1) for i, c in enumerate("ab")}
    store = S3Store(f"s3://{working.make_bucket()}/some prefix")

    class Killed(InlineExecutor):
        def run(self, tasks: Any, *args: Any) -> Any:
            super().run(tasks[:1], *args)
            raise KeyboardInterrupt

    runs: dict[str, list[Executor]] = {"whole": [ProcessExecutor(2)], "killed": [Killed(), InlineExecutor()]}
    for name, executors in runs.items():
        round_ = Round.create(store, name)
        for client, (arrays, weight) in updates.items():
            round_.submit(client, arrays, weight)
        for executor in executors[:-1]:
            with pytest.raises(KeyboardInterrupt):
                aggregate(round_, topology=Sharded(shards=3), executor=executor)
        result = aggregate(round_, topology=Sharded(shards=3), executor=executors[-1])
        assert_same(reference_mean(updates), result.arrays())
        if name == "whole":
            assert result.plan
            seen, planned = total(result.usage), total(result.plan.usage)
            assert seen.gets in (planned.gets, planned.gets - 1)  # which asks for the version, where the server does not tell it
            assert planned.puts == seen.puts
        else:
            assert ["sharded/1", "sharded/2"] == [report.task for report in result.reports]
    assert _nothing_hidden(store)


def test_tree(working: S3Server) -> None:
    """Partial sums pass through the store between processes."""
    draw = np.random.default_rng(0)
    updates = {f"c{i}": ({"w": draw.normal(size=MIB).astype("f4")}, i + 1) for i in range(5)}
    store = S3Store(f"s3://{working.make_bucket()}")
    round_ = Round.create(store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)

    assert_same(reference_mean(updates), aggregate(round_, topology=LambdaFLTree(), executor=ProcessExecutor(1)).arrays())


def test_command(working: S3Server, tmp_path: Path) -> None:
    """``gradsharding aggregate`` reads and writes s3:// URLs there, and leaves nothing but the output."""
    store = S3Store(f"s3://{working.make_bucket()}")
    for i, client in enumerate("ab"):
        store.put(f"in/{client}.safetensors", encode({"w": np.full(2 * MIB, i, "f4")})[1])
    command = [sys.executable, "-m", "gradsharding", "aggregate", f"{store.url}/in/a.safetensors", f"{store.url}/in/b.safetensors"]
    for output in (f"{store.url}/mean.safetensors", str(tmp_path / "mean.safetensors")):
        done = subprocess.run([*command, "-o", output, "--shards", "3"], capture_output=True, text=True, check=False)
        assert (0, "") == (done.returncode, done.stderr)

    assert (tmp_path / "mean.safetensors").read_bytes() == read(store, "mean.safetensors")
    assert ["in/a.safetensors", "in/b.safetensors", "mean.safetensors"] == [key for key, _ in store.list("")]


@pytest.mark.parametrize("piece", [64 * MIB, 5 * MIB], ids=["one piece", "three pieces"])
def test_signed_urls(working: S3Server, tmp_path: Path, piece: int) -> None:
    """A node writes its update by signed URLs, and reads by one."""
    store, spool, data = S3Store(f"s3://{working.make_bucket()}"), tmp_path / "spool", os.urandom(12 * MIB)
    spool.write_bytes(data)
    granted = grant(store, "offered", offer(spool, piece), 60)
    write(spool, granted.offer, granted.permit)

    assert len(data) == settle(store, granted).stat.size
    assert data == b"".join(map(bytes, UrlSource("offered", readable(store, "offered", 60)).get("offered", 0, len(data))))


@contextlib.contextmanager
def _refused_server(request: pytest.FixtureRequest, name: str) -> Iterator[S3Server]:
    rules = {"unconditional": Unconditional, "unimplemented": Unimplemented}
    if not (rule := rules.get(REFUSED[name])):
        yield request.getfixturevalue(REFUSED[name])
        return
    moto: S3Server = request.getfixturevalue("moto")
    with rule(moto.endpoint) as proxy:
        yield S3Server(proxy.endpoint, moto.access_key, moto.secret_key, checks=False)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.rig) if name.startswith("rclone") else name for name in REFUSED])
def test_refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A server that would replace what is to be created once, or cannot say so, is refused in a sentence, and nothing stays there."""
    with _refused_server(request, name) as server:
        _lead_to(server, monkeypatch)
        store = S3Store(f"s3://{server.make_bucket()}")
        for i in range(2):
            store.client.put_object(Bucket=store.bucket, Key=f"in/{i}.safetensors", Body=b"".join(encode({"w": np.full(9, i, "f4")})[1]))
        command = [sys.executable, "-m", "gradsharding", "aggregate", f"{store.url}/in/0.safetensors", f"{store.url}/in/1.safetensors"]
        done = subprocess.run([*command, "-o", f"{store.url}/mean.safetensors"], capture_output=True, text=True, check=False)
        with pytest.raises(StoreRefused, match=r"use an S3 server that deploy/ENDPOINTS\.md lists as working"):
            Round.create(store, "r")
        left = [key for key, _ in store.list("")]

    assert (2, 1) == (done.returncode, done.stderr.count("\n"))
    assert re.search("If-None-Match|not implemented", done.stderr)
    assert ["in/0.safetensors", "in/1.safetensors"] == left


@pytest.mark.parametrize("name", ["moto, without conditions", pytest.param("rclone serve s3", marks=pytest.mark.rig)])
def test_flower_refuses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A federation does not begin on such a server: no node is asked, and nothing stays in the store."""
    with _refused_server(request, name) as server:
        _lead_to(server, monkeypatch)
        store = S3Store(f"s3://{server.make_bucket()}")
        strategy = GradSharding(FedAvg(), store=store)
        with pytest.raises(StoreRefused, match="replaces objects that it is asked to create"):
            strategy.start(LocalGrid({}), ArrayRecord({"w": Array(np.ones(9, np.float32))}), num_rounds=1)
        assert [] == [*store.list("")]


def test_begun_once(moto: S3Server, moto_store: S3Store) -> None:
    """A store that refuses what is there is tried once for a round, by a request that its charges know; the round's record stays."""
    with moto.counting() as once:
        Round.create(moto_store, "r")
    first = read(moto_store, "rounds/r/round.json")
    with moto.counting() as again:
        Round.create(moto_store, "r")

    assert {"gets": 0, "puts": moto_store.charges.first(len(first)).puts, "deletes": 0} == once
    assert {"gets": 1, "puts": moto_store.charges.put(len(first)).puts, "deletes": 0} == again
    assert first == read(moto_store, "rounds/r/round.json")
    with pytest.raises(ObjectExists, match="writes to"):
        Round.create(moto_store, "r", output="elsewhere")


def test_no_condition_on_reads(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server ignores the version that a read demands, the answer's own version is looked at."""
    _lead_to(rclone, monkeypatch)
    store = S3Store(f"s3://{rclone.make_bucket()}")
    store.client.put_object(Bucket=store.bucket, Key="a", Body=b"old")
    old = store.head("a").version
    store.client.put_object(Bucket=store.bucket, Key="a", Body=b"new")

    assert b"new" == store.client.get_object(Bucket=store.bucket, Key="a", IfMatch=old)["Body"].read()
    with pytest.raises(ChangedObject, match="'a'"):
        read(store, "a", version=old)


def test_copy_that_copies_nothing(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server says that it has copied a part, and has not, nothing is published."""
    _lead_to(rclone, monkeypatch)
    store = S3Store(f"s3://{rclone.make_bucket()}")
    upload, sizes = store.begin("a"), {1: 6 * MIB, 2: 9}
    store.put_part("a", upload, 1, 0, bytes(6 * MIB))
    store.put_part("a", upload, 2, 6 * MIB, bytes(9))

    with pytest.raises(StoreRefused, match=r"made part 1 of .* of 0 bytes, not of 6291456; nothing was published"):
        store.complete("a", upload, sizes)
    assert [] == [*store.list("")]


def test_equal_parts_are_asked_for(equal_parts: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wants parts of one size says so when it is given others, and the error names the setting, with which the round ends."""
    _lead_to(equal_parts, monkeypatch)
    updates = {c: ({"w": np.full(5 * MIB, i, "f4")}, 1) for i, c in enumerate("ab")}
    round_ = Round.create(S3Store(f"s3://{equal_parts.make_bucket()}"), "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    with pytest.raises(StoreRefused, match=rf"requires parts of one size; set {EQUAL_PARTS}=1 and run it again"):
        aggregate(round_, topology=Sharded(shards=3))
    monkeypatch.setenv(EQUAL_PARTS, "1")

    assert_same(reference_mean(updates), aggregate(round_, topology=Sharded(shards=3)).arrays())


def test_interrupted_composition(equal_parts: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that a composition left behind when it was interrupted are no parts of the object: the next call composes it anew."""
    _lead_to(equal_parts, monkeypatch)
    monkeypatch.setenv(EQUAL_PARTS, "1")
    store, data = S3Store(f"s3://{equal_parts.make_bucket()}"), os.urandom(13 * MIB)
    upload, sizes = store.begin("a"), {1: 6 * MIB, 2: 7 * MIB}
    store.put_part("a", upload, 1, 0, data[: 6 * MIB])
    store.put_part("a", upload, 2, 6 * MIB, data[6 * MIB :])
    for part in compose_equal(sizes):
        store._compose("a", upload, part)

    assert sizes == store.parts("a", upload)
    store.complete("a", upload, sizes)
    assert data == read(store, "a")


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(MINIMUM - 2, 3 * MINIMUM)), min_size=1, max_size=12))
def test_compose_equal(sizes: list[int]) -> None:
    """Whatever the sizes, the pieces tile the object in order, are of one size, and the last is no larger."""
    parts = compose_equal(dict(enumerate(sizes, 1)))
    starts = {number: sum(sizes[: number - 1]) for number in range(1, len(sizes) + 1)}
    spans = [range(starts[span.number] + span.start, starts[span.number] + span.stop) for part in parts for span in part.spans]

    assert [*range(1, len(parts) + 1)] == [part.number for part in parts]
    assert sum(sizes) == sum(map(len, spans)) == sum(part.nbytes for part in parts)
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert {MINIMUM} >= {part.nbytes for part in parts[:-1]}
    assert parts[-1].nbytes <= MINIMUM


def test_pieces_of_large_objects() -> None:
    """An object too large for 10,000 pieces of 5 MiB is cut into larger ones."""
    parts = compose_equal(dict.fromkeys(range(1, 101), 1 << 30))

    assert 9_000 == len(parts)
    assert 1 == len({part.nbytes for part in parts[:-1]})


@pytest.mark.parametrize(
    ("endpoint", "setting", "expected"),
    [
        ("https://s3.amazonaws.com", "", Dialect(aws=True, equal_parts=False)),
        ("https://s3.eu-central-1.amazonaws.com", "", Dialect(aws=True, equal_parts=False)),
        ("https://s3.cn-north-1.amazonaws.com.cn", "", Dialect(aws=True, equal_parts=False)),
        ("https://bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com", "", Dialect(aws=True, equal_parts=False)),
        ("https://s3.dualstack.us-east-1.api.aws", "", Dialect(aws=True, equal_parts=False)),
        ("https://s3.amazonaws.com.example.org", "", Dialect(aws=False, equal_parts=False)),
        ("https://notamazonaws.com", "", Dialect(aws=False, equal_parts=False)),
        ("http://127.0.0.1:9000", "", Dialect(aws=False, equal_parts=False)),
        ("http://[::1]:9000", "1", Dialect(aws=False, equal_parts=True)),
        ("https://0123abcd.r2.cloudflarestorage.com", "", Dialect(aws=False, equal_parts=True)),
        ("https://0123abcd.eu.r2.cloudflarestorage.com", "", Dialect(aws=False, equal_parts=True)),
        ("https://0123abcd.r2.cloudflarestorage.com", "0", Dialect(aws=False, equal_parts=False)),
    ],
)
def test_dialects(monkeypatch: pytest.MonkeyPatch, endpoint: str, setting: str, expected: Dialect) -> None:
    """A server's dialect is told from its endpoint's name, and from the setting."""
    monkeypatch.setenv(EQUAL_PARTS, setting)

    assert expected == dialect(endpoint)


def test_equal_parts_without_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that makes no sense is refused."""
    monkeypatch.setenv(EQUAL_PARTS, "yes")
    with pytest.raises(UserError, match=f"{EQUAL_PARTS} is 'yes'; set it to 1"):
        dialect("http://127.0.0.1")


@pytest.mark.parametrize("aws", [True, False])
def test_what_protects_bodies(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, aws: bool) -> None:
    """Each body carries its CRC-32 to AWS, and its MD5, which every server knows, elsewhere; so do deletions of many."""
    if aws:
        monkeypatch.setattr("gradsharding.aws.dialect._suffixes", lambda: (".127.0.0.1",))
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")  # a client of its own
    before = len(moto.seen())
    upload = moto_store.begin("a")
    moto_store.put_part("a", upload, 1, 0, bytes(6 * MIB))
    moto_store.put_part("a", upload, 2, 6 * MIB, bytes(6 * MIB))
    moto_store.complete("a", upload, {1: 6 * MIB, 2: 6 * MIB})
    moto_store.put("b", [b"b"])
    moto_store.delete(["b"])
    bodies = [one for one in moto.seen()[before:] if one.method == "PUT" and "x-amz-copy-source" not in one.headers]

    assert 3 == len(bodies)
    assert all(("x-amz-checksum-crc32" in one.headers, "content-md5" in one.headers) == (aws, not aws) for one in bodies)
    assert aws == any("x-amz-checksum-algorithm" in one.headers for one in moto.seen()[before:] if one.target.endswith("?uploads"))
    deletions = [one for one in moto.seen()[before:] if one.billed == "deletes"]
    assert [not aws] * 2 == ["content-md5" in one.headers for one in deletions]  # of the part that was kept, and of b


def test_page() -> None:
    """The page's table names each server that the tests run, says of each whether it works, and no server twice."""
    rows = {cells[1].strip(): cells[2].strip() for line in PAGE.read_text().splitlines() if len(cells := line.split("|")) > 4}
    tried = {name for name in rows if "`tests/" in next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))}

    assert {*WORKING, *REFUSED, "Ceph", "moto"} == tried
    assert {"works"} == {rows[name] for name in (*WORKING, "Ceph", "moto")}
    assert {"refused"} == {rows[name] for name in REFUSED}
