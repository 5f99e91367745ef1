"""A URL lends one right for a while: to read one object, or to write one object of known bytes once."""

import datetime as dt
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit, urlunsplit

import numpy as np
import pytest
import urllib3

from gradsharding.aws.demands import TRUST
from gradsharding.aws.patience import ATTEMPTS
from gradsharding.aws.s3.direct import UrlSource, offer, write
from gradsharding.aws.s3.presign import etag, grant, readable, settle, try_out, withdraw
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import ChangedObject, IncompleteUpload, InvalidUpdate, MissingObject, StoreFailed, StoreRefused
from gradsharding.format.encode import encode
from gradsharding.stores.lending import Offer, Permit
from gradsharding.stores.updates import FIRST_READ, load
from gradsharding.testing import read
from gradsharding.usage import counting
from rigs.proxy import Path as Route
from rigs.proxy import Proxy
from rigs.s3 import Ceph

MIB = 1 << 20
KEY = "rounds/r/updates/a b.safetensors"


@pytest.fixture
def spooled(tmp_path: Path) -> Path:
    """Give a file of a little more than 12 MiB."""
    path = tmp_path / "update"
    path.write_bytes(np.random.default_rng(0).bytes(12 * MIB + 5))
    return path


def offered(path: Path, *, pieces: int = 1) -> Offer:
    """Offer a file in one piece, or in several of 5 MiB and more."""
    return offer(path, {1: 64 * MIB, 2: 8 * MIB, 3: 5 * MIB}[pieces])


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_write_and_read(ceph_store: S3Store, spooled: Path, pieces: int) -> None:
    """What was offered and permitted is written, in one piece or in several, published by the server, and read by a URL."""
    granted = grant(ceph_store, KEY, offered(spooled, pieces=pieces), 60)
    write(spooled, granted.offer, granted.permit)
    settle(ceph_store, granted)
    settle(ceph_store, granted)  # an answer that was lost is asked for again
    source = UrlSource(KEY, readable(ceph_store, KEY, 60))
    stat = ceph_store.head(KEY)

    assert pieces == len(granted.offer.pieces) == len(granted.permit.urls)
    assert spooled.read_bytes() == read(ceph_store, KEY) == b"".join(bytes(chunk) for chunk in source.get(KEY, 0, stat.size))
    assert stat == source.head(KEY)
    assert spooled.read_bytes()[7:99] == b"".join(bytes(chunk) for chunk in source.get(KEY, 7, 99, version=stat.version))
    assert b"" == b"".join(source.get(KEY, stat.size, stat.size + 9))


@pytest.mark.parametrize("pieces", [1, 3])
def test_written_again(ceph_store: S3Store, spooled: Path, pieces: int) -> None:
    """A permit that is used twice changes nothing, and is no error."""
    granted = grant(ceph_store, KEY, offered(spooled, pieces=pieces), 60)
    write(spooled, granted.offer, granted.permit)
    write(spooled, granted.offer, granted.permit)
    settle(ceph_store, granted)
    version = ceph_store.head(KEY).version
    if pieces == 1:
        write(spooled, granted.offer, granted.permit)

    assert version == ceph_store.head(KEY).version


@pytest.mark.parametrize("pieces", [1, 3])
def test_other_bytes(ceph_store: S3Store, spooled: Path, pieces: int) -> None:
    """Other bytes than were offered are refused by the server, and nothing is published."""
    granted = grant(ceph_store, KEY, offered(spooled, pieces=pieces), 60)
    spooled.write_bytes(spooled.read_bytes()[:-1] + b"?")
    with pytest.raises(ChangedObject, match="the update is not the one that was offered"):
        write(spooled, granted.offer, granted.permit)
    with pytest.raises((InvalidUpdate, IncompleteUpload)):
        settle(ceph_store, granted)
    with pytest.raises(MissingObject):
        ceph_store.head(KEY)


def test_bound(ceph_store: S3Store, spooled: Path) -> None:
    """A URL serves for no other key, verb, size or digest, and not without the condition that there be no object."""
    what = offered(spooled)
    (piece,), (url,) = what.pieces, grant(ceph_store, KEY, what, 60).permit.urls
    data, http, parts = spooled.read_bytes(), urllib3.PoolManager(), urlsplit(url)
    headers = {"Content-MD5": piece.md5, "If-None-Match": "*"}
    elsewhere = urlunsplit(parts._replace(path=parts.path.replace("a%20b", "c")))
    tried = {
        "another key": http.request("PUT", elsewhere, body=data, headers=headers),
        "without the condition": http.request("PUT", url, body=data, headers={"Content-MD5": piece.md5}),
        "another size": http.request("PUT", url, body=data[:-1], headers=headers),
        "without a digest": http.request("PUT", url, body=data, headers={"If-None-Match": "*"}),
        "reading": http.request("GET", url),
        "deleting": http.request("DELETE", url),
    }

    assert dict.fromkeys(tried, 403) == {what: answer.status for what, answer in tried.items()}
    assert [] == [*ceph_store.list("")]


VICTIM = "rounds/r/updates/victim.safetensors"

FORBIDDEN = {
    "copy": {"x-amz-copy-source": "/{bucket}/some%20prefix/" + VICTIM},
    "copy, written otherwise": {"X-Amz_Copy-SOURCE": "/{bucket}/some%20prefix/" + VICTIM},
    "copy of a range": {"x-amz-copy-source": "/{bucket}/some%20prefix/" + VICTIM, "x-amz-copy-source-range": "bytes=0-9"},
    "copy from another bucket": {"x-amz-copy-source": "/{other}/secret"},
    "copy of nothing": {"x-amz-copy-source": ""},
    "publish": {"x-amz-acl": "public-read"},
    "grant": {"x-amz-grant-full-control": 'uri="http://acs.amazonaws.com/groups/global/AllUsers"'},
    "lock": {"x-amz-object-lock-mode": "COMPLIANCE", "x-amz-object-lock-retain-until-date": "2090-01-01T00:00:00Z"},
    "tag": {"x-amz-tagging": "a=b"},
    "another storage class": {"x-amz-storage-class": "GLACIER"},
    "a key of its own": {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
}


@pytest.mark.parametrize("pieces", [1, 2])
def test_no_more_than_it_says(ceph: Ceph, ceph_store: S3Store, tmp_path: Path, pieces: int) -> None:
    """With headers that are not signed, a URL copies nothing, publishes nothing, and replaces nothing: Ceph refuses them."""
    path, other, http = tmp_path / "spool", ceph.server.make_bucket(), urllib3.PoolManager()
    data = b"o" * (1_000 if pieces == 1 else 5 * MIB + 1_000)
    path.write_bytes(data)
    ceph_store.put(VICTIM, [b"v" * 1_000])
    ceph_store.client.put_object(Bucket=other, Key="secret", Body=b"s" * 1_000)
    granted = grant(ceph_store, KEY, offered(path, pieces=3), 60)
    piece, url = granted.offer.pieces[0], granted.permit.urls[0]
    headers = {"Content-MD5": piece.md5} | ({"If-None-Match": "*"} if pieces == 1 else {})

    def tried() -> dict[str, int]:
        answers = {}
        for what, more in FORBIDDEN.items():
            named = {name: value.format(bucket=ceph_store.bucket, other=other) for name, value in more.items()}
            answers[what] = http.request("PUT", url, body=data[: piece.size], headers=headers | named).status
        return answers

    expected = dict.fromkeys(FORBIDDEN, 403) | ({"copy of nothing": 400} if pieces == 1 else {})
    assert expected == tried()
    assert [VICTIM] == [key for key, _ in ceph_store.list("")]
    write(path, granted.offer, granted.permit)
    stat = settle(ceph_store, granted).stat
    assert expected == tried()
    assert (pieces, stat, data) == (len(granted.offer.pieces), ceph_store.head(KEY), read(ceph_store, KEY))
    assert 403 == http.request("GET", url.partition("?")[0]).status


def test_a_server_that_obeys(moto_store: S3Store, spooled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that obeys what is not signed is lent nothing, unless its owner says that nodes may have the server's keys."""
    monkeypatch.delenv(TRUST)
    with pytest.raises(
        StoreRefused, match=rf"obeys an x-amz-copy-source header that .* does not sign: .*\(presigned=False\).*set {TRUST}=1$"
    ):
        grant(moto_store, KEY, offered(spooled), 60)
    assert [] == [*moto_store._list("")]
    monkeypatch.setenv(TRUST, "1")
    granted = grant(moto_store, KEY, offered(spooled), 60)
    write(spooled, granted.offer, granted.permit)
    assert spooled.stat().st_size == settle(moto_store, granted).stat.size


def test_tried_out_once(ceph: Ceph, ceph_store: S3Store, spooled: Path) -> None:
    """What a store does with headers that are not signed is tried out before the first URL only, and leaves nothing there."""
    with ceph.server.counting() as first:
        try_out(ceph_store)
    with ceph.server.counting() as again:
        try_out(ceph_store)
        grant(ceph_store, KEY, offered(spooled), 60)

    assert ({"gets": 0, "puts": 5, "deletes": 1}, {"gets": 0, "puts": 0, "deletes": 0}) == (first, again)
    assert [] == [*ceph_store._list("")]


def test_who_may_not_write_lends_nothing(ceph: Ceph, ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that may not write to the store are told so, before anything is lent."""
    for name, value in ceph.user(f"u{ceph_store.bucket}").environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreRefused, match=r"PutObject of s3://.*/\.gradsharding/signing/: access is denied"):
        try_out(ceph_store)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("server", ["moto", pytest.param("ceph", marks=pytest.mark.rig)])
def test_other_bytes_of_the_same_size(request: pytest.FixtureRequest, spooled: Path, server: str, pieces: int) -> None:
    """Other bytes than were offered are found out by their digest, on a server that lets them through, even if they are as many."""
    store: S3Store = request.getfixturevalue(f"{server}_store")
    granted = grant(store, KEY, offered(spooled, pieces=pieces), 60)
    other = [bytes(piece.size) for piece in granted.offer.pieces]
    if granted.upload:
        for number, data in enumerate(other, 1):
            store.client.upload_part(Bucket=store.bucket, Key=store.place(KEY), UploadId=granted.upload, PartNumber=number, Body=data)
    else:
        store.put(KEY, other)
    with pytest.raises(InvalidUpdate, match=rf"the 12\d* bytes that have arrived under {KEY} are not those that were offered"):
        settle(store, granted)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("server", ["moto", pytest.param("ceph", marks=pytest.mark.rig)])
def test_etags_are_known(request: pytest.FixtureRequest, spooled: Path, server: str, pieces: int) -> None:
    """The ETag that an offer leads to is the one that the server gives, and settling reads no data then."""
    store: S3Store = request.getfixturevalue(f"{server}_store")
    granted = grant(store, KEY, offered(spooled, pieces=pieces), 60)
    write(spooled, granted.offer, granted.permit)
    with counting() as ledger:
        version = settle(store, granted).stat.version

    assert version == f'"{etag(granted.offer)}"'
    assert FIRST_READ == ledger.spent["s3"].bytes_read


def test_expired(ceph_store: S3Store, spooled: Path) -> None:
    """URLs that have expired neither read nor write, and the error says so without saying the URL."""
    ceph_store.put("model", [b"x"])
    granted, url = grant(ceph_store, KEY, offered(spooled), 1), readable(ceph_store, "model", 1)
    time.sleep(2)
    with pytest.raises(
        StoreRefused, match=r"^writing the update: the URL, or the session that signed it, has expired, or this machine's clock[^?]*$"
    ):
        write(spooled, granted.offer, granted.permit)
    with pytest.raises(StoreRefused, match=r"^reading model: the URL, or the session that signed it, has expired[^?]*$"):
        UrlSource("model", url).head("model")


def test_what_is_not_there(ceph_store: S3Store) -> None:
    """A missing object, another version and another key are told apart, as by a store."""
    source = UrlSource(KEY, readable(ceph_store, KEY, 60))
    with pytest.raises(MissingObject, match="there is no object"):
        source.head(KEY)
    ceph_store.put(KEY, [b"xyz"])
    with pytest.raises(ChangedObject, match="it was written again"):
        [*source.get(KEY, 0, 2, version='"other"')]
    with pytest.raises(MissingObject):
        source.head("another")


def test_nothing_arrives(ceph_store: S3Store, spooled: Path) -> None:
    """Permits that nobody used are told with the bytes due; withdrawn, they leave no upload behind."""
    for pieces, error in ((1, InvalidUpdate), (3, IncompleteUpload)):
        granted = grant(ceph_store, KEY, offered(spooled, pieces=pieces), 60)
        with pytest.raises(error, match=r"nothing has arrived|part 1 has not arrived"):
            settle(ceph_store, granted)
        withdraw(ceph_store, granted)
    assert "Uploads" not in ceph_store.client.list_multipart_uploads(Bucket=ceph_store.bucket)


@pytest.mark.parametrize("fault", ["503", "429", "reset", "lost", "cut:1000"])
def test_faults(ceph_store: S3Store, spooled: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that fail are tried again, and no signature is logged, however much is."""
    caplog.set_level(logging.DEBUG, logger="urllib3")
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)
    with Proxy(ceph_store.client.meta.endpoint_url, Route()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = S3Store(ceph_store.url)
        _, buffers = encode({"w": np.arange(5 * MIB, dtype="f4")})
        spooled.write_bytes(b"".join(buffers))
        granted = grant(store, KEY, offered(spooled, pieces=3), 60)
        proxy.path = Route(faults={proxy.requests + 1: fault, proxy.requests + 3: fault})
        write(spooled, granted.offer, granted.permit)
        settle(store, granted)
        source = UrlSource(KEY, readable(store, KEY, 60))
        proxy.path = Route(faults={proxy.requests + 1: fault, proxy.requests + 3: fault})
        assert np.arange(5 * MIB, dtype="f4").tobytes() == load(KEY, source)["w"].tobytes()

    assert "X-Amz-Signature" not in caplog.text
    assert "?…" in caplog.text


def test_no_answer(spooled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer is asked six times, and told in a sentence that keeps the URL to itself, as its cause does."""
    url = "http://127.0.0.1:9/bucket/key?X-Amz-Signature=secret"
    permit = Permit(urls=(url,))
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)
    says = r"^writing the update: no answer, 6 times in a row \(NewConnectionError\); check the network$"
    with counting() as ledger, pytest.raises(StoreFailed, match=says) as caught:
        write(spooled, offered(spooled), permit)
    assert ATTEMPTS == ledger.spent["s3"].puts
    assert caught.value.__suppress_context__
    assert "secret" not in repr(permit) + str(caught.value) + repr(UrlSource(KEY, url))


@pytest.mark.parametrize("fault", ["500", "502", "504", "reset", "lost"])
def test_as_often_as_any_client(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A server that fails is asked by a URL as often as by boto3, and each time by one request; then the URL's reader is told."""
    moto_store.put("a", [b"x"])
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)
    with Proxy(moto_store.client.meta.endpoint_url, Route(faults=dict.fromkeys(range(1, 100), fault))) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        asked = []
        for source in (UrlSource("a", readable(moto_store, "a", 60)), moto_store):
            with counting() as ledger, pytest.raises(StoreFailed):
                source.head("a")
            asked.append((ledger.spent["s3"].gets, proxy.requests))

    assert [(ATTEMPTS, ATTEMPTS), (ATTEMPTS, 2 * ATTEMPTS)] == asked


def lent(seconds: int) -> tuple[int, str]:
    """Lend a URL; give the seconds that it is good for, and the id of the key that signed it."""
    query = parse_qs(urlsplit(readable(S3Store("s3://bucket"), KEY, seconds).partition("#")[0]).query)
    return int(query["X-Amz-Expires"][0]), query["X-Amz-Credential"][0].partition("/")[0]


def in_seconds(seconds: int) -> str:
    """Write a time that many seconds from now."""
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give an empty config file, whose profile p is in use."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CREDENTIAL_EXPIRATION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"CONFIG_FILE": str(tmp_path / "config"), "PROFILE": "p", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    return tmp_path / "config"


def test_urls_of_a_role(ministack: Mapping[str, str], profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL ends with the session of the role that signs it; if that does not last half as long as the URL should, it is refused."""
    profile.write_text(
        "[profile p]\nrole_arn = arn:aws:iam::000000000000:role/r\nsource_profile = s\nduration_seconds = 1800\n"
        "[profile s]\naws_access_key_id = test\naws_secret_access_key = test\n"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", ministack["AWS_ENDPOINT_URL"])
    (short, first), (longer, second) = lent(900), lent(3000)

    assert (900, first) == (short, second)
    assert 1500 <= longer <= 1800
    assert "test" != first
    with pytest.raises(
        StoreRefused, match=r"last 7200 s, and the credentials that sign them expire in 1\d+ s, .*; let URLs last 1\d+ s, or use"
    ):
        lent(7200)


def test_credentials_are_renewed_before_urls_are_lent(profile: Path, tmp_path: Path) -> None:
    """Credentials that end too soon are renewed before a URL is lent, once; where that fails, the error says why."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import json, pathlib
calls = pathlib.Path({str(tmp_path / "calls")!r})
number = int(calls.read_text()) + 1 if calls.exists() else 1
calls.write_text(str(number))
ends = {json.dumps([in_seconds(1200), in_seconds(7000)])}
if number > len(ends):
    raise SystemExit("locked")
print(json.dumps(dict(Version=1, AccessKeyId=f"KEY{{number}}", SecretAccessKey="s", SessionToken="t", Expiration=ends[number - 1])))
""")
    profile.write_text(f"[profile p]\ncredential_process = {sys.executable} {script}\n")

    assert [(900, "KEY1"), (3600, "KEY2"), (3600, "KEY2")] == [lent(900), lent(3600), lent(3600)]
    with pytest.raises(StoreRefused, match=r"^AWS: the credential_process of profile p failed \(locked\); run that command by itself"):
        lent(7 * 86_400)


def test_credentials_that_nobody_can_renew(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a session in the environment its end counts, if it is given; if not, nobody knows it, and URLs are lent as asked for."""
    profile.write_text("[profile p]\n")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", name)
    assert (900, "ACCESS_KEY_ID") == lent(900)
    for left, says in ((400, r"expire in \d+ s, .*; let URLs last \d+ s, or use"), (40, r"expire in \d+ s, and the URLs with them; use")):
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", in_seconds(left))
        with pytest.raises(StoreRefused, match=rf"last 900 s, and the credentials that sign them {says} credentials that last"):
            lent(900)
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", in_seconds(700))
    assert 450 <= lent(900)[0] <= 700


def test_no_credentials_to_sign_by(profile: Path) -> None:
    """Who has no credentials signs nothing, and is told so."""
    profile.write_text("[profile p]\n")
    with pytest.raises(
        StoreRefused, match=r"^signing a URL for GetObject of s3://bucket/rounds/r/updates/a b\.saf.*: there are no AWS cre"
    ):
        lent(900)
