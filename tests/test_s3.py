"""S3 is a store like any other, on moto and on Ceph, whatever the network does to it."""

import base64
import contextlib
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule
from gradsharding.aws.s3.body import Body
from gradsharding.aws.s3.direct import UrlSource, offer, write
from gradsharding.aws.s3.presign import grant, readable, settle
from gradsharding.aws.s3.store import S3Store
from gradsharding.cli.main import cli
from gradsharding.errors import (
    ChangedObject,
    IncompleteUpload,
    InvalidId,
    MissingObject,
    ObjectExists,
    StoreFailed,
    StoreRefused,
    UserError,
)
from gradsharding.format.encode import encode
from gradsharding.planning.plan import Limits
from gradsharding.planning.topologies import LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.rounds.verify import verify
from gradsharding.running.executors import InlineExecutor
from gradsharding.running.processes import ProcessExecutor
from gradsharding.stores.compose import LARGE, MINIMUM, Composed, compose, is_kept
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.urls import locate, open_store
from gradsharding.testing import StoreContract, assert_same, peak, read, reference_mean, sample_updates
from gradsharding.usage import Usage, counting, total
from rigs.proxy import Path, Proxy
from rigs.s3 import Ceph, S3Server, ceph_missing, ceph_server
from rigs.serving import serving

MIB = 1 << 20


class _OnS3(StoreContract):
    def raw_get(self, store: Any, key: str) -> bytes:
        """Read by boto3 alone."""
        data: bytes = store.client.get_object(Bucket=store.bucket, Key=store.prefix + key)["Body"].read()
        return data

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write by boto3 alone."""
        store.client.put_object(Bucket=store.bucket, Key=store.prefix + key, Body=data)


@pytest.mark.slow
class TestMoto(_OnS3):
    """The contract on moto."""

    @pytest.fixture
    def store(self, moto_store: S3Store) -> Any:
        """Give an empty store."""
        return moto_store

    @pytest.mark.skip(reason="moto answers 500 (a KeyError of its own) to two completions of one upload at once")
    def test_complete_at_once(self) -> None:  # type: ignore[override]
        """Left to Ceph."""


class TestCeph(_OnS3):
    """The contract on Ceph."""

    @pytest.fixture
    def store(self, ceph_store: S3Store) -> Any:
        """Give an empty store."""
        return ceph_store


@pytest.mark.parametrize("url", ["s3://", "s3:///a", "s3://A", "s3://ab", "s3://a b/c", "s3://arn:aws:s3:::bucket/a", "s3://-ab"])
def test_bad_urls(url: str) -> None:
    """A URL without a bucket's name is refused with an example."""
    for name in (S3Store, open_store, lambda url: locate(url, DirectoryStore("."))):
        with pytest.raises(UserError, match="names no bucket; write s3://bucket or s3://bucket/prefix"):
            name(url)


@pytest.mark.parametrize("bucket", ["name--usw2-az1--x-s3", "point--usw2-az1--xa-s3"])
def test_directory_buckets(bucket: str) -> None:
    """A directory bucket of S3 Express, or an access point of one, is refused before anything is asked of it."""
    for name in (S3Store, open_store, lambda url: locate(url, DirectoryStore("."))):
        for url in (f"s3://{bucket}", f"s3://{bucket}/prefix/a"):
            with pytest.raises(UserError, match=f"{bucket} is an S3 Express bucket.*list objects unsorted.*; use a general purpose bucket"):
                name(url)


@pytest.mark.parametrize(
    "bucket",
    [
        "bucket",
        "name--x-s3--a",
        "My_Bucket",
        "tenant:bucket",
        "arn:aws:s3:us-east-1:123456789012:accesspoint/ap1",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint:ap1",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/ap1",
    ],
)
def test_urls(bucket: str) -> None:
    """A store is found again by its URL, by a reference into it, and after a journey to another process; a URL is plain text."""
    store = open_store(f"s3://{bucket}/some %20prefix/")
    assert isinstance(store, S3Store)

    assert (bucket, "some %20prefix/", f"s3://{bucket}/some %20prefix") == (store.bucket, store.prefix, store.url)
    assert store.url == pickle.loads(pickle.dumps(store)).url  # noqa: S301 - our own bytes
    other, key = locate(f"{store.url}/a%20b", DirectoryStore("."))
    assert (store.url, "a%20b") == (other.url, key)
    assert (bucket, "") == (S3Store(f"s3://{bucket}").bucket, S3Store(f"s3://{bucket}/").prefix)


@given(st.text(min_size=1, max_size=20) | st.text("a%/+ \\.:=#?&2F", min_size=1, max_size=20))
def test_any_key_has_a_url(key: str) -> None:
    """Any key of S3's is found by its URL, which is the key behind the bucket's name; what HTTP would change on its way is refused."""
    url = f"s3://bucket/{key}"
    if {".", ".."} & {*key.split("/")} or "\0" in key:
        with pytest.raises(InvalidId, match="copy the object to another key"):
            locate(url, DirectoryStore("."))
        return
    store, last = locate(url, DirectoryStore("."))
    assert isinstance(store, S3Store)
    assert key == store.prefix + last
    assert not key.endswith("/") or last == ""


ODD_KEYS = ("drop50%41.safetensors", "a//b.safetensors", "/c.safetensors", "back\\slash.safetensors", "é=1:2+ ?#&.safetensors", "%2e%2e/d")


def test_keys_as_aws_prints_them(ceph_store: S3Store, tmp_path: Any) -> None:
    """Updates are read under keys that no other store takes, by the URLs that AWS's tools print; a result goes below a plain prefix."""
    bucket = f"s3://{ceph_store.bucket}"
    for i, key in enumerate(ODD_KEYS):
        ceph_store.client.put_object(Bucket=ceph_store.bucket, Key=key, Body=b"".join(encode({"w": np.full(2 * MIB, i, "f4")})[1]))
    given = [f"c{i}={bucket}/{key}" for i, key in enumerate(ODD_KEYS)]
    for output in (f"{bucket}/x/mean%20.safetensors", str(tmp_path / "mean.safetensors")):
        command = ["aggregate", *given, "-o", output, "--executor", "processes:1", "--shards", "2"]
        cli.main(command, standalone_mode=False)

    found = ceph_store.client.get_object(Bucket=ceph_store.bucket, Key="x/mean%20.safetensors")["Body"].read()
    assert (tmp_path / "mean.safetensors").read_bytes() == found
    assert np.full(2 * MIB, 2.5, "f4").tobytes() == found[-8 * MIB :]
    with pytest.raises(UserError, match=r"cannot hold new objects; choose a prefix without '//'"):
        open_store(f"{bucket}/a//b")


def test_buckets_of_ceph(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's bucket is read, and written in parts, by the name that Ceph gives it."""
    owner = ceph.user(f"u{uuid.uuid4().hex}", tenant="tenant")
    for name, value in owner.environment().items():
        monkeypatch.setenv(name, value)
    store = S3Store(f"s3://tenant:{owner.make_bucket()}/prefix")
    upload = store.begin("a")
    store.put_part("a", upload, 1, 0, b"kept")
    store.put_part("a", upload, 2, 4, b"x" * 6 * MIB)
    store.complete("a", upload, {1: 4, 2: 6 * MIB})

    assert b"kept" + b"x" * 6 * MIB == read(store, "a")
    assert ["a"] == [key for key, _ in store.list("")]
    store.put("b", [b"y"])
    assert [("b", b"y")] * 9 == [*store.fetch(["b"] * 9)]


@pytest.mark.parametrize("key", ["x" * 1025, "\ud800"])
def test_keys_for_s3(key: str) -> None:
    """A key that S3 cannot have is refused before it is sent."""
    with pytest.raises(InvalidId, match="is not a key for S3"):
        S3Store("s3://bucket").head(key)


def _into(shards: int) -> Topology:
    return Sharded(shards=shards)


def _composed(due: dict[int, int], kept: set[int]) -> list[Composed]:
    with contextlib.suppress(IncompleteUpload):
        return compose(due, kept)
    return []


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(MINIMUM - 2, LARGE + 2), st.just(3 * LARGE)), min_size=1, max_size=12))
def test_compose(sizes: list[int]) -> None:
    """Whatever the sizes, what is composed and what is not tile the object in order, and only the last is small; or it says why not."""
    due = dict(enumerate(sizes, 1))
    starts = {number: sum(sizes[: number - 1]) for number in due}
    kept = {number for number, size in due.items() if is_kept(starts[number], size)}
    if not (composed := _composed(due, kept)):
        assert not kept or max(sizes) - min(sizes) > LARGE - MINIMUM
        return
    places = {number: (starts[number], due[number]) for number in due if number not in kept}
    for part in composed:
        spans = [range(starts[span.number] + span.start, starts[span.number] + span.stop) for span in part.spans]
        assert all(a.stop == b.start for a, b in pairwise(spans))
        places[part.number] = spans[0].start, part.nbytes
    ordered = [places[number] for number in sorted(places)]
    ends = [0]
    for start, size in ordered:
        assert start == ends[-1]
        ends.append(start + size)
    assert sum(sizes) == ends[-1]
    assert all(size >= MINIMUM for _, size in ordered[:-1])


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 40), st.integers(0, 40), st.integers(1, 7))
def test_body(buffers: list[bytes], start: int, stop: int, count: int) -> None:
    """A body reads as its buffers joined, from any place, and so does a part of it."""
    whole = b"".join(buffers)
    for body, data in ((Body(buffers), whole), (Body(buffers).part(start, max(start, stop)), whole[start : max(start, stop)])):
        assert len(body) == len(data)
        body.seek(min(start, len(data)))
        assert data[start:] == b"".join(iter(lambda body=body: body.read(count), b""))  # type: ignore[misc]


@pytest.mark.parametrize("cut", range(10))
def test_checksum(cut: int) -> None:
    """A body's CRC-32 is that of its buffers joined, in base64: the check value of the catalogues is CBF43926."""
    whole = b"123456789"

    assert base64.b64encode(bytes.fromhex("CBF43926")).decode() == Body([whole[:cut], whole[cut:]]).crc32()
    assert "AAAAAA==" == Body([]).crc32()


def test_body_of_many_buffers() -> None:
    """Each read of a body, and each part of it, looks at a few of its buffers, however many there are."""
    looks = 0

    class Watched(list[int]):
        def __getitem__(self, at: Any) -> Any:
            nonlocal looks
            found = super().__getitem__(at)
            looks += len(found) if isinstance(at, slice) else 1
            return found

        def __iter__(self) -> Iterator[int]:
            nonlocal looks
            looks += len(self)
            return super().__iter__()

    body = Body([b"ab"] * 10_000)
    body._ends = Watched(body._ends)
    assert 20_000 == sum(len(chunk) for chunk in iter(lambda: body.read(2), b""))
    assert 20_000 == sum(len(body.part(start, start + 200)) for start in range(0, 20_000, 200))
    assert 10_000 < looks < 10_000 * 20 + 10_000 * 3


@pytest.mark.parametrize(
    "faults",
    [{1: "503", 2: "503"}, {1: "500"}, {1: "429"}, {1: "reset"}, {1: "lost"}, {1: "cut:1000000", 2: "cut:1", 3: "cut:2500000"}],
    ids=["503", "500", "429", "reset", "lost", "cut"],
)
def test_reads_go_on(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, faults: dict[int, str]) -> None:
    """A read that is refused for a while, or breaks off, goes on where it was, and gives the bytes once."""
    data = os.urandom(5 * MIB)
    moto_store.put("a", [data])
    with Proxy(moto.endpoint, Path(faults=faults)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        assert data == read(moto_store, "a")
        assert len(faults) + 1 == proxy.requests


def test_replaced_between_two_attempts(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that goes on never mixes two versions, even if none was asked for."""
    moto_store.put("a", [b"o" * 3 * MIB])
    with Proxy(moto.endpoint, Path(faults={1: "cut:1000000"})) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        chunks = moto_store.get("a", 0, 3 * MIB)
        next(chunks)
        moto_store.delete(["a"])
        moto_store.put("a", [b"n" * 3 * MIB])
        with pytest.raises(ChangedObject, match="'a'"):
            list(chunks)


@pytest.mark.parametrize(("fault", "seen"), [("503", b"ours"), ("reset", b"ours"), ("lost", b"ours")])
@pytest.mark.slow
def test_writes_are_tried_again(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, fault: str, seen: bytes) -> None:
    """A write whose answer is lost is ours when our bytes are found there, and not if they are another's."""
    moto_store.put("theirs", [b"theirs"])
    with Proxy(moto.endpoint, Path(faults={1: fault})) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        stat = moto_store.put("ours", [b"ou", b"rs"])
        assert proxy.requests > 1
    with Proxy(moto.endpoint, Path(faults={1: fault})) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(ObjectExists, match="'theirs'"):
            moto_store.put("theirs", [b"ours"])
    assert (seen, stat, b"theirs") == (read(moto_store, "ours"), moto_store.head("ours"), read(moto_store, "theirs"))


def test_gives_up(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that breaks off again and again raises StoreFailed, and says how often it was tried."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    moto_store.put("a", [b"x" * MIB])
    with Proxy(moto.endpoint, Path(faults=dict.fromkeys(range(1, 99), "cut:7"))) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(StoreFailed, match="broke off 6 times"):
            read(moto_store, "a")


def test_nobody_there(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer is StoreFailed, after some attempts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with counting() as ledger, pytest.raises(StoreFailed, match=r"no answer after several attempts.*check the network and the endpoint"):
        moto_store.head("a")
    assert 6 == ledger.spent["s3"].gets


def test_no_credentials(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials the error says how to give some."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreRefused, match="there are no AWS credentials; set AWS_ACCESS_KEY_ID"):
        moto_store.head("a")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("AWS_ACCESS_KEY_ID", "NOBODY", "there is no such access key"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "the secret key does not belong to the access key"),
    ],
)
def test_wrong_credentials(ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str) -> None:
    """Wrong credentials are told apart from a lack of permission."""
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreRefused, match=problem):
        ceph_store.put("a", [b"x"])


def test_denied(ceph: Ceph, ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these credentials may not do is StoreRefused, and says what was asked for."""
    for name, value in ceph.user(f"u{uuid.uuid4().hex}").environment().items():
        monkeypatch.setenv(name, value)
    for ask, verb in (
        (lambda: ceph_store.put("a", [b"x"]), "PutObject"),
        (lambda: ceph_store.head("a"), "HeadObject"),
        (lambda: read(ceph_store, "a"), "GetObject"),
        (lambda: list(ceph_store.list("")), "ListObjectsV2"),
        (lambda: ceph_store.begin("a"), "CreateMultipartUpload"),
        (lambda: ceph_store.delete(["a"]), "DeleteObjects"),
    ):
        with pytest.raises(StoreRefused, match=f"{verb} of s3://.*: access is denied"):
            ask()


@pytest.mark.usefixtures("moto_store")
def test_no_bucket() -> None:
    """A bucket that is not there is named."""
    store = S3Store("s3://there-is-no-such-bucket/x")
    for ask in (lambda: store.put("a", [b"x"]), lambda: list(store.list("")), lambda: store.begin("a")):
        with pytest.raises(StoreRefused, match="there is no bucket 'there-is-no-such-bucket'"):
            ask()


class _Elsewhere(BaseHTTPRequestHandler):
    """Answers as S3 does for a bucket of another region."""

    def do_GET(self) -> None:
        """Redirect for good, without saying where to."""
        self.send_response(301)
        self.send_header("x-amz-bucket-region", "eu-west-3")
        self.send_header("Content-Type", "application/xml")
        answer = b"<Error><Code>PermanentRedirect</Code><Message>use the other endpoint</Message></Error>"
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer if self.command == "GET" else b"")

    do_HEAD = do_GET  # noqa: N815 - http.server names it so

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_another_region(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that lies in another region is told with that region and the variable to set."""
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        for ask in (lambda: read(moto_store, "a"), lambda: list(moto_store.list("")), lambda: moto_store.head("a")):
            with pytest.raises(StoreRefused, match="the bucket is in region eu-west-3; set AWS_DEFAULT_REGION to that"):
                ask()


@pytest.mark.slow
@pytest.mark.rig
def test_over_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Over TLS, with a certificate that the environment trusts, a round runs, and signed URLs work; an unknown one is refused."""
    if why := ceph_missing():
        pytest.skip(why)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    made = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", "-x509", *made, "-out", chain, "-keyout", key], check=True, capture_output=True)
    with ceph_server(certificate=(chain, key)) as ceph:
        for name, value in (ceph.server.environment() | {"AWS_ENDPOINT_URL_S3": str(ceph.secure), "AWS_CA_BUNDLE": str(chain)}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        store, updates = S3Store(f"s3://{ceph.server.make_bucket()}"), {"a": ({"w": np.arange(4 * MIB, dtype="f4")}, 3)}
        round_ = Round.create(store, "r")
        round_.submit("a", *updates["a"])
        assert_same(reference_mean(updates), aggregate(round_, topology=Sharded(shards=2), executor=ProcessExecutor(2)).arrays())

        spool = tmp_path / "spool"
        spool.write_bytes(b"x" * (6 * MIB))
        granted = grant(store, "offered", offer(spool, 5 * MIB), 60)
        write(spool, granted.offer, granted.permit)
        settle(store, granted)
        assert b"xxx" == b"".join(bytes(chunk) for chunk in UrlSource("offered", readable(store, "offered", 60)).get("offered", 7, 10))

        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(StoreRefused, match=r"is not trusted \(certificate verify failed: .*set AWS_CA_BUNDLE"):
            store.head("offered")


def test_fetch_of_what_is_missing(moto_store: S3Store) -> None:
    """Of many small objects, one that is missing is named."""
    for i in range(20):
        moto_store.put(f"{i}", [b"%d" % i])
    with pytest.raises(MissingObject, match="'nothing'"):
        list(moto_store.fetch([*map(str, range(20)), "nothing"]))


@pytest.mark.slow
def test_put_in_parts(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object larger than S3 takes at once is put in parts, and created once all the same, in as many requests as its charges say."""
    monkeypatch.setattr("gradsharding.aws.s3.store.LARGEST_PUT", MIB)
    data = os.urandom(70 * MIB)
    with counting() as ledger:
        stat = moto_store.put("a", [data[:10], data[10:]])

    planned = moto_store.charges.model_copy(update={"largest": MIB}).put(70 * MIB)
    assert planned == ledger.spent["s3"] + Usage(gets=1)  # which asks for the version, where the server does not tell it
    assert (70 * MIB, stat) == (stat.size, moto_store.head("a"))
    assert data == read(moto_store, "a")
    with pytest.raises(ObjectExists):
        moto_store.put("a", [data])
    assert [] == moto_store.client.list_multipart_uploads(Bucket=moto_store.bucket).get("Uploads", [])


@pytest.mark.parametrize("shards", [1, 4, 30])
@pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor(2)], ids=["inline", "processes"])
def test_round(ceph_store: S3Store, executor: Any, shards: int) -> None:
    """A round on S3 has the bits of the reference, makes the requests that were planned, and leaves nothing hidden behind."""
    draw = np.random.default_rng(0)
    updates = sample_updates(3) if shards > 4 else {c: ({"w": draw.normal(size=8 * MIB).astype("f4")}, i + 1) for i, c in enumerate("abc")}
    round_ = Round.create(ceph_store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    result = aggregate(round_, topology=_into(shards), executor=executor)

    assert_same(reference_mean(updates), result.arrays())
    assert (result.plan.gets, result.plan.puts) == (total(result.usage).gets, total(result.usage).puts)
    assert [] == [key for key in _all_keys(ceph_store) if ".gradsharding" in key]
    assert [] == ceph_store.client.list_multipart_uploads(Bucket=ceph_store.bucket).get("Uploads", [])


@pytest.mark.parametrize("rule", [MEAN, ExactMean()], ids=str)
@pytest.mark.parametrize("make", [LambdaFLTree(), LIFLTree(), ShardedTree()], ids=["lambda-fl", "lifl", "sharded-tree"])
def test_trees(ceph_store: S3Store, make: Any, rule: Rule) -> None:
    """Trees make the requests on S3 that were planned, their partial sums are objects while they run, and gone when they end."""
    draw = np.random.default_rng(0)
    updates = {f"c{i}": ({"w": draw.normal(size=3 * MIB).astype("f4")}, i + 1) for i in range(5)}
    round_ = Round.create(ceph_store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    there = list[str]()
    told = lambda _: there.extend(key for key, _ in ceph_store.list("rounds/r/partials/"))  # noqa: E731
    limits = Limits(memory=1 << 30)
    result = aggregate(round_, topology=make, rule=rule, limits=limits, executor=ProcessExecutor(2), progress=lambda _: told)
    seen, planned = total(result.usage), total(result.plan.usage)

    assert_same(reference_mean(updates), result.arrays())
    assert there
    if rule.vouches:
        assert (seen.gets, seen.bytes_read) < (planned.gets, planned.bytes_read)
        assert verify(round_, sample=3).slices
    else:
        assert (planned.gets, planned.puts) == (seen.gets, seen.puts)
        assert seen.bytes_read <= planned.bytes_read < seen.bytes_read + MIB
    assert peak(result) <= result.plan.memory
    assert [] == [key for key, _ in ceph_store.list("rounds/r/partials/")]


def test_resumed(ceph_store: S3Store) -> None:
    """A round whose caller was killed goes on with the parts that S3 has, kept ones too."""
    updates = {c: ({"w": np.full(8 * MIB, i, "f4")}, 1) for i, c in enumerate("ab")}
    round_ = Round.create(ceph_store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)

    class Killed(InlineExecutor):
        def run(self, tasks: Any, *args: Any) -> Any:
            super().run(tasks[:2], *args)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aggregate(round_, topology=_into(4), executor=Killed())
    result = aggregate(round_, topology=_into(4))

    assert ["sharded/2", "sharded/3"] == [report.task for report in result.reports]
    assert_same(reference_mean(updates), result.arrays())


def test_upload_of_an_earlier_release(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload on AWS that declares CRC-32C, as earlier releases began them, is given up, and the round begins another."""
    monkeypatch.setattr("gradsharding.aws.dialect._suffixes", lambda: (".127.0.0.1",))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")  # a client of its own
    begun, client = list[str](), moto_store.client

    def add_checksum(parsed: dict[str, Any], **_: Any) -> None:
        """Answer ListParts as AWS does: moto says which checksum an upload declares in ListMultipartUploads only."""
        for upload in client.list_multipart_uploads(Bucket=moto_store.bucket).get("Uploads", []):
            if upload["UploadId"] == parsed.get("UploadId"):
                parsed["ChecksumAlgorithm"] = upload["ChecksumAlgorithm"]

    client.meta.events.register("after-call.s3.ListParts", add_checksum)

    def begin(store: S3Store, key: str) -> str:
        upload: str = client.create_multipart_upload(Bucket=store.bucket, Key=store.place(key), ChecksumAlgorithm="CRC32C")["UploadId"]
        begun.append(upload)
        return upload

    updates = sample_updates(3)
    round_ = Round.create(moto_store, "r")
    for client_id, (arrays, weight) in updates.items():
        round_.submit(client_id, arrays, weight)

    class Killed(InlineExecutor):
        def run(self, tasks: Any, *args: Any) -> Any:
            super().run(tasks[:2], *args)
            raise KeyboardInterrupt

    with monkeypatch.context() as earlier:
        earlier.setattr(S3Store, "begin", begin)
        with pytest.raises(KeyboardInterrupt):
            aggregate(round_, topology=_into(3), executor=Killed())
    result = aggregate(round_, topology=_into(3))

    assert 1 == len(begun)
    assert ["sharded/0", "sharded/1", "sharded/2"] == [report.task for report in result.reports]
    assert_same(reference_mean(updates), result.arrays())
    assert [] == client.list_multipart_uploads(Bucket=moto_store.bucket).get("Uploads", [])
    assert [] == [key for key in _all_keys(moto_store) if ".gradsharding" in key]


def _all_keys(store: S3Store) -> list[str]:
    return [found["Key"] for found in store.client.list_objects_v2(Bucket=store.bucket)["Contents"]]


def test_command_line(ceph_store: S3Store, tmp_path: Any) -> None:
    """``gradsharding aggregate`` reads and writes s3:// URLs, and leaves nothing but the output."""
    for i, client in enumerate(("ann", "bob")):
        ceph_store.put(f"in/{client}.safetensors", encode({"w": np.full(5, i, "f4")})[1])
    place = ceph_store.url
    command = [sys.executable, "-m", "gradsharding", "aggregate", f"{place}/in/ann.safetensors:1", f"bob={place}/in/bob.safetensors:3"]

    done = subprocess.run([*command, "-o", f"{place}/mean.safetensors"], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
    subprocess.run([*command, "-o", str(tmp_path / "mean.safetensors")], capture_output=True, check=True)
    assert (tmp_path / "mean.safetensors").read_bytes() == read(ceph_store, "mean.safetensors")
    assert ["in/ann.safetensors", "in/bob.safetensors", "mean.safetensors"] == [key for key, _ in ceph_store.list("")]
    assert b"\x00\x00@?" == read(ceph_store, "mean.safetensors")[-4:]

    plan = [sys.executable, "-m", "gradsharding", "plan", "--json", "--from"]
    planned = json.loads(subprocess.run([*plan, f"{place}/in/"], capture_output=True, check=True).stdout)
    assert (20, 2) == (planned["size"], planned["clients"])
    one = [f"{place}/in/ann.safetensors", "--clients", "2"]
    assert planned == json.loads(subprocess.run([*plan, *one], capture_output=True, check=True).stdout)

    missing = subprocess.run([*command, f"{place}/in/cid.safetensors", "-o", f"{place}/x"], capture_output=True, text=True, check=False)
    assert (2, True) == (missing.returncode, "there is no file for" in missing.stderr)


def test_limits_shape_the_plan(ceph_store: S3Store) -> None:
    """The buffers of parallel reads are within the memory that is allowed."""
    round_ = Round.create(ceph_store, "r")
    round_.submit("a", {"w": np.ones(16 * MIB, "f4")}, 1)
    result = aggregate(round_, limits=Limits(memory=192 * MIB), executor=ProcessExecutor(1))

    assert peak(result) <= result.plan.memory <= 192 * MIB


DEMANDS = {
    "GRADSHARDING_S3_SSE": "aws:kms",
    "GRADSHARDING_S3_SSE_KMS_KEY_ID": "alias/updates",
    "GRADSHARDING_S3_REQUEST_PAYER": "requester",
    "GRADSHARDING_S3_EXPECTED_BUCKET_OWNER": "123456789012",
    "GRADSHARDING_S3_ACL": "bucket-owner-full-control",
}


def test_demands(moto: S3Server, moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What the environment demands goes with each request, into all that is written, and with URLs that are lent."""
    for name, value in DEMANDS.items():
        monkeypatch.setenv(name, value)
    before, updates = len(moto.seen()), sample_updates(3)
    round_ = Round.create(moto_store, "r")
    for client, (arrays, weight) in updates.items():
        round_.submit(client, arrays, weight)
    result = aggregate(round_, topology=_into(3), executor=ProcessExecutor(1))
    spool = tmp_path / "spool"
    spool.write_bytes(b"x" * (6 * MIB))
    for key, piece in (("one", 64 * MIB), ("several", 5 * MIB)):
        granted = grant(moto_store, key, offer(spool, piece), 60)
        write(spool, granted.offer, granted.permit)
        settle(moto_store, granted)
        assert b"xxx" == b"".join(bytes(chunk) for chunk in UrlSource(key, readable(moto_store, key, 60)).get(key, 7, 10))
    [*moto_store.fetch(["one"] * 9)]

    assert_same(reference_mean(updates), result.arrays())
    seen = moto.seen()[before:]
    assert {("requester", "123456789012")} == {
        (one.headers.get("x-amz-request-payer"), one.headers.get("x-amz-expected-bucket-owner")) for one in seen
    }
    creating = [one for one in seen if (one.method == "PUT" and "partNumber=" not in one.target) or one.target.endswith("?uploads")]
    assert {("aws:kms", "alias/updates", "bucket-owner-full-control")} == {
        tuple(one.headers.get(f"x-amz-{name}") for name in ("server-side-encryption", "server-side-encryption-aws-kms-key-id", "acl"))
        for one in creating
    }


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SSE", "kms", "GRADSHARDING_S3_SSE is 'kms'; set it to AES256, aws:kms or aws:kms:dsse, or unset it"),
        ("REQUEST_PAYER", "me", "GRADSHARDING_S3_REQUEST_PAYER is 'me'; set it to requester"),
        ("EXPECTED_BUCKET_OWNER", "12", "set it to the 12 digits of an account"),
        ("ACL", "public-read", "GRADSHARDING_S3_ACL is 'public-read'; set it to private"),
        ("SSE_KMS_KEY_ID", "key", "GRADSHARDING_S3_SSE_KMS_KEY_ID names a key, and GRADSHARDING_S3_SSE does not ask for it; set"),
        ("SEE", "aws:kms", "GRADSHARDING_S3_SEE is not a setting; unset it, or use one of GRADSHARDING_S3_SSE"),
    ],
)
def test_demands_without_sense(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str) -> None:
    """A demand that makes no sense is refused in a sentence before anything is asked of S3."""
    monkeypatch.setenv(f"GRADSHARDING_S3_{name}", value)
    with pytest.raises(UserError, match=problem):
        moto_store.head("a")


def test_addressing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Buckets are addressed by paths, or as the profile says; access points by their hosts, as boto3 does. So are URLs that are lent."""
    config = tmp_path / "config"
    for name, value in {"AWS_CONFIG_FILE": str(config), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    point = "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/ap1"
    found = {}
    for style in ("", "virtual", "path"):
        config.write_text(
            f"[default]\nregion = us-east-1\ns3 =\n    addressing_style = {style}\n" if style else "[default]\nregion = us-east-1\n"
        )
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://{style or 'none'}.example.com")  # a client is kept for each environment
        found[style] = readable(S3Store("s3://bkt"), "k", 60).partition("?")[0]
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")

    expected = {"": "none.example.com/bkt/k", "virtual": "bkt.virtual.example.com/k", "path": "path.example.com/bkt/k"}
    assert {style: f"https://{place}" for style, place in expected.items()} == found
    assert readable(S3Store(point), "k", 60).startswith("https://ap1-123456789012.s3-accesspoint.us-east-1.amazonaws.com/k?")
