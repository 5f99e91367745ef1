"""A URL lends one right for a while: to read one object, or to write one object of known bytes once."""

import logging
import time
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pytest
import urllib3

from gradsharding.aws.direct import Offer, Permit, UrlSource, offer, write
from gradsharding.aws.presign import grant, readable, settle, withdraw
from gradsharding.aws.s3 import S3Store
from gradsharding.errors import ChangedObject, IncompleteUpload, InvalidUpdate, MissingObject, StoreFailed, StoreRefused
from gradsharding.testing import read
from gradsharding.testing.proxy import Path as Route
from gradsharding.testing.proxy import Proxy
from gradsharding.update import encode, load

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


def test_expired(ceph_store: S3Store, spooled: Path) -> None:
    """URLs that have expired neither read nor write, and the error says so without saying the URL."""
    ceph_store.put("model", [b"x"])
    granted, url = grant(ceph_store, KEY, offered(spooled), 1), readable(ceph_store, "model", 1)
    time.sleep(2)
    with pytest.raises(StoreRefused, match=r"^writing the update: the URL has expired, or this machine's clock is wrong; [^?]*$"):
        write(spooled, granted.offer, granted.permit)
    with pytest.raises(StoreRefused, match=r"^reading model: the URL has expired[^?]*$"):
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


def test_no_answer(spooled: Path) -> None:
    """A server that does not answer is told in a sentence that keeps the URL to itself, as its cause does."""
    url = "http://127.0.0.1:9/bucket/key?X-Amz-Signature=secret"
    permit = Permit(urls=(url,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradsharding.aws.direct._HTTP", urllib3.PoolManager(retries=False))
        with pytest.raises(StoreFailed, match=r"no answer after several attempts \(NewConnectionError\); check the network") as caught:
            write(spooled, offered(spooled), permit)
    assert caught.value.__suppress_context__
    assert "secret" not in repr(permit) + str(caught.value) + repr(UrlSource(KEY, url))
