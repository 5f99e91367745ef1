"""Federations over S3 whose nodes hold no credentials: the server signs what each may read and write."""

import datetime as dt
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from flower_federation import (
    NODES,
    RecordingGrid,
    averaged,
    client,
    grid_of,
    initial,
    record,
    reply,
    sharding,
    state_of,
    train,
    weight_of,
)
from gradsharding import DirectoryStore
from gradsharding.aws.s3.store import S3Store
from gradsharding.errors import InvalidUpdate, StoreRefused, UserError
from gradsharding.stores.lending import Offer, Piece
from gradsharding.stores.updates import load
from gradsharding.testing import assert_same
from gradsharding_flower import refer, upload_mod
from gradsharding_flower.mod import ORDERS
from gradsharding_flower.permits import ABANDONED, PERMIT, SPOOL_KEY, Lender, Offered
from gradsharding_flower.reference import Reference, client_id
from gradsharding_flower.testing import LocalGrid
from rigs.lambdas import LocalFunction, LocalLambda
from rigs.loopback import Loopback
from rigs.s3 import Ceph
from test_flower_processes import APP, CLIENTS, ROUNDS, assert_ends, assert_small_messages, expected


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let spools lie in this test's own directory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"gradsharding-spool-{os.getuid()}"


class Interfering(LocalGrid):
    """A LocalGrid in which something happens to the permits of one node."""

    def __init__(self, node: int, mishap: str) -> None:
        super().__init__({node: client() for node in NODES})
        self.node, self.mishap = node, mishap

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages, and let the mishap befall the permit."""
        pushed = [*messages]
        ids = [*super().push_messages(pushed)]
        for message_id, message in zip(ids, pushed, strict=True):
            if message.metadata.dst_node_id == self.node and PERMIT in message.content.config_records.get(ORDERS, {}):
                self.interfere(message_id)
        return ids

    def interfere(self, message_id: str) -> None:
        """Let the mishap happen."""
        match self.mishap:
            case "dies":
                self.silent.add(self.node)
            case "twice":
                self._answer(self._messages[message_id])
            case "another spool":
                self.spooled.unlink()
            case "changed spool":
                self.spooled.write_bytes(self.spooled.read_bytes()[:-1] + b"?")

    @property
    def spooled(self) -> Path:
        """What the node keeps."""
        (path,) = Path(os.environ["SPOOL"]).glob(f"*.{self.node:020d}.safetensors")
        return path


def left_in(directory: Path) -> list[str]:
    """Name what spools hold."""
    return [path.name for path in directory.iterdir()]


def test_same_model(ceph_store: S3Store, spool: Path) -> None:
    """The model is the one that the embedded store gives; the server sends no store and no credentials, and keeps no spool behind."""
    grid = RecordingGrid({node: client() for node in NODES})
    strategy = sharding(ceph_store)
    result = strategy.start(grid, record(initial()), num_rounds=2)

    first = averaged(NODES, 1, initial())
    assert_same(averaged(NODES, 2, first), state_of(result.arrays))
    orders = [content.config_records[ORDERS] for _, content in grid.sent]
    assert 2 * 2 * len(NODES) + 2 * len(NODES) == len(orders)  # training, permits and evaluation
    assert not any("store" in order for order in orders)
    assert all(os.environ["AWS_SECRET_ACCESS_KEY"] not in str(order) for order in orders)
    assert [] == left_in(spool)
    assert 0o700 == spool.stat().st_mode & 0o777
    assert {*NODES} == {*strategy.history[-1].clients}


@pytest.mark.slow
def test_two_runs_share_nodes(moto_store: S3Store) -> None:
    """Two runs whose nodes have the same ids and the same spool, one of which begins and ends amid the other, take nothing from it."""
    others = list[tuple[int, ...]]()

    def amid(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        other = sharding(moto_store)
        other.start(grid_of(), record(initial()), num_rounds=1)
        others.append(other.history[0].clients)
        return train(node, server_round, arrays)

    strategy = sharding(moto_store)
    strategy.start(grid_of({NODES[-1]: client(amid)}), record(initial()), num_rounds=2)

    everyone = tuple(sorted(NODES))
    assert [everyone] * 2 == others == [one.clients for one in strategy.history]


def test_what_a_node_keeps(moto_store: S3Store, spool: Path) -> None:
    """A node that begins a round deletes what it kept of rounds before, and what anyone has abandoned; all else may be needed."""
    spool.mkdir(mode=0o700)
    names = [f"{run}-000001.{client_id(node)}.{kind}" for run in ("young", "old") for node in (3, 99) for kind in ("safetensors", "ab.new")]
    for name in [*names, "old notes.txt"]:
        (spool / name).touch()
        if name.startswith("old"):
            os.utime(spool / name, (0, time.time() - ABANDONED - 60))

    def leaving(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        (spool / f"{strategy._run}-000000.{client_id(node)}.cd.new").touch()
        return train(node, server_round, arrays)

    strategy = sharding(moto_store)
    strategy.start(grid_of({3: client(leaving)}), record(initial()), num_rounds=1)

    assert {*names[:4], "old notes.txt"} == {*left_in(spool)}


def test_several_pieces(ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large updates are written in pieces, and the model is the same."""
    monkeypatch.setattr("gradsharding.aws.s3.presign.PIECE", 5 << 20)
    state = {"w": np.zeros(3 << 20, np.float32)}
    grid = RecordingGrid({node: client() for node in NODES})
    result = sharding(ceph_store).start(grid, record(state), num_rounds=1)

    assert_same(averaged(NODES, 1, state), state_of(result.arrays))
    offers = [
        Offer.model_validate_json(str(c.config_records[ORDERS]["update"])) for _, c in grid.sent if PERMIT in c.config_records[ORDERS]
    ]
    assert [3] * len(NODES) == [len(offer.pieces) for offer in offers]
    assert "Uploads" not in ceph_store.client.list_multipart_uploads(Bucket=ceph_store.bucket)


@pytest.mark.parametrize(
    ("mishap", "reason"),
    [
        ("dies", "it was permitted to write its update, and did not report in time that it has"),
        ("another spool", "nothing has arrived under .* bytes were offered and permitted"),
        ("changed spool", "it could not write its update: .*the update is not the one that was offered"),
    ],
)
@pytest.mark.usefixtures("clock")  # the timeout is over once all other work is done
def test_left_out(ceph_store: S3Store, spool: Path, monkeypatch: pytest.MonkeyPatch, mishap: str, reason: str) -> None:
    """A node whose update never arrives is left out of the round with the reason, and the others are averaged."""
    monkeypatch.setenv("SPOOL", str(spool))
    monkeypatch.setattr("gradsharding.aws.s3.presign.PIECE", 5 << 20)  # so that an upload is under way
    state = {"w": np.zeros(3 << 20, np.float32)} if mishap == "dies" else initial()
    strategy = sharding(ceph_store)
    result = strategy.start(Interfering(14, mishap), record(state), num_rounds=1, timeout=5)

    assert_same(averaged([node for node in NODES if node != 14], 1, state), state_of(result.arrays))
    (left,) = strategy.history[0].left_out.items()
    assert 14 == left[0]
    assert re.search(reason, left[1])
    assert "Uploads" not in ceph_store.client.list_multipart_uploads(Bucket=ceph_store.bucket)


def test_permit_twice(ceph_store: S3Store) -> None:
    """A permit that is delivered twice does no harm."""
    result = sharding(ceph_store).start(Interfering(14, "twice"), record(initial()), num_rounds=1)
    assert_same(averaged(NODES, 1, initial()), state_of(result.arrays))


def test_offer_too_large(ceph_store: S3Store) -> None:
    """An update far larger than the model is not permitted, and never written."""

    def large(node: int, server_round: int, arrays: Any) -> Any:  # noqa: ARG001
        return reply({"w": np.zeros(80 << 20, np.uint8)}, weight_of(node))

    strategy = sharding(ceph_store)
    strategy.start(grid_of({14: client(large)}), record(initial()), num_rounds=1)
    assert "it offers 83886" in strategy.history[0].left_out[14]
    assert "are permitted" in strategy.history[0].left_out[14]


def test_offer_cut_otherwise(ceph_store: S3Store) -> None:
    """Offers in pieces of another size than ordered are not permitted: S3 would refuse small ones at the end, and many cost time."""
    lender = Lender(ceph_store, 60)
    model = Reference(source="m", version="v", nbytes=100 << 20, names=("w",))
    piece = 64 << 20
    digest = "A" * 22 + "=="
    for sizes in ((piece, 1), (piece,), (5,)):
        lender.permit("r", "k", Offered(update=Offer(pieces=tuple(Piece(size=size, md5=digest) for size in sizes)), names=("w",)), model)
    for sizes in ((5, 5), (piece - 1, piece), (piece, 0), (0,)):
        offered = Offered(update=Offer(pieces=tuple(Piece(size=size, md5=digest) for size in sizes)), names=("w",))
        with pytest.raises(InvalidUpdate, match=f"it offers {len(sizes)} pieces; all but the last must have {piece} bytes"):
            lender.permit("r", "k", offered, model)
    lender.close()
    assert "Uploads" not in ceph_store.client.list_multipart_uploads(Bucket=ceph_store.bucket)


def test_mixed(ceph_store: S3Store) -> None:
    """Nodes with the mod write by permits, the others are relayed, and the mean is of both."""
    strategy = sharding(ceph_store, mode="mixed")
    grid = RecordingGrid({node: client(mods=[] if node == 3 else [upload_mod]) for node in NODES})
    result = strategy.start(grid, record(initial()), num_rounds=2)

    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))


def test_spool_of_someone_else(ceph_store: S3Store, tmp_path: Path) -> None:
    """A spool that is not this user's is refused, and the log says how to choose another."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    grid = grid_of()
    grid._contexts[14].node_config[SPOOL_KEY] = str(tmp_path / "link")
    strategy = sharding(ceph_store)
    strategy.start(grid, record(initial()), num_rounds=1)
    assert (
        "is a link or a file, but gradsharding needs a directory of its own there; set gradsharding-spool"
        in strategy.history[0].left_out[14]
    )


def test_refused_before_it_starts(ceph_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without URLs, seconds without sense, a model that no URL reaches and wrong credentials end it before any node trains."""
    with pytest.raises(UserError, match="cannot lend URLs; use an s3:// store"):
        sharding(DirectoryStore(tmp_path), presigned=True)
    for seconds in (0, 7 * 86_400 + 1):
        with pytest.raises(UserError, match=f"URLs cannot be valid for {seconds} seconds"):
            sharding(ceph_store, url_seconds=seconds)
    copy = DirectoryStore(tmp_path / "store")
    sharding(copy, keep=True).start(grid_of(), record(initial()), num_rounds=0)
    (path,) = (tmp_path / "store").glob("results/*")
    with pytest.raises(UserError, match=r"nodes cannot read file://.* by a URL of s3://"):
        sharding(ceph_store).start(grid_of(), refer(path, ceph_store), num_rounds=1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreRefused, match="the secret key does not belong to the access key"):
        sharding(ceph_store).start(grid_of(), record(initial()), num_rounds=1)


def test_credentials_that_end(ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture) -> None:
    """Credentials that end before URLs would are refused before any node trains; those that may end before a round does, are warned of."""
    grid = grid_of()

    def ends_in(seconds: int) -> None:
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).isoformat())

    ends_in(300)
    with pytest.raises(StoreRefused, match=r"URLs should last 900 s, and the credentials that sign them expire in \d+ s"):
        sharding(ceph_store).start(grid, record(initial()), num_rounds=1)
    for seconds, warned in ((3000, 1), (9000, 0)):
        ends_in(seconds)
        flower_log.clear()
        sharding(ceph_store).start(grid, record(initial()), num_rounds=0)
        warning = "expire in .* a round may take 3600 s, and URLs should be valid for 900 s: .* use credentials that last longer"
        assert warned == len(re.findall(warning, flower_log.text))


@pytest.mark.usefixtures("emulator")
def test_on_lambda(ceph_store: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Rounds whose slices are averaged by Lambda functions give the same model; the server logs how many functions it takes at once."""
    caplog.set_level(logging.INFO)
    with LocalLambda(LocalFunction(memory=512), concurrency=4, reserved=False) as front:
        for name, value in front.environment().items():
            monkeypatch.setenv(name, value)
        strategy = sharding(ceph_store, executor="lambda:gradsharding")
        result = strategy.start(grid_of(), record(initial()), num_rounds=2)

    assert_same(averaged(NODES, 2, averaged(NODES, 1, initial())), state_of(result.arrays))
    assert {"200"} == {call.outcome for call in front.calls}
    assert 2 * 2 == len(front.calls)  # three slices, two functions, two rounds
    [message] = [line for line in caplog.messages if line.startswith("Concurrency")]
    assert message.startswith("Concurrency: 2 of 4 unreserved invocations at once; the rest is left to others")


def test_nodes_with_rights_of_their_own(ceph_store: S3Store) -> None:
    """Without signed URLs, nodes use the environment's credentials, as with any store."""
    grid = RecordingGrid({node: client() for node in NODES})
    result = sharding(ceph_store, presigned=False).start(grid, record(initial()), num_rounds=1)

    assert_same(averaged(NODES, 1, initial()), state_of(result.arrays))
    assert {ceph_store.url} == {content.config_records[ORDERS]["store"] for _, content in grid.sent}


def environment_of(pid: int) -> set[str]:
    """Names in the environment of a process."""
    return {part.partition(b"=")[0].decode() for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}


@pytest.fixture
def loopback(ceph: Ceph, tmp_path: Path) -> Iterator[Loopback]:
    """Give a deployment whose server alone can reach Ceph."""
    with Loopback(tmp_path / "home", nodes=CLIENTS, server=ceph.server.environment()) as running:
        yield running
    assert_ends(tmp_path / "home")


@pytest.mark.flower
def test_deployment(loopback: Loopback, ceph: Ceph, ceph_store: S3Store, tmp_path: Path) -> None:
    """SuperNodes without credentials train over Ceph the model that the same SuperNodes train over a directory, bit for bit.

    Ceph has seen the requests that the server, its functions and the nodes report, and eight before the first round: it is tried out
    whether the store keeps what a round decides, the first model is written, and it is tried out what signed URLs let nodes do.
    """
    reports = {}
    for store in (ceph_store.url, str(tmp_path / "store")):
        path = tmp_path / "report.json"
        config = {"num-server-rounds": ROUNDS, "num-clients": CLIENTS, "strategy": "gradsharding", "store": store, "report": str(path)}
        with ceph.server.counting() as seen:
            loopback.run(APP, **config)  # type: ignore[arg-type]
        reports[store] = json.loads(path.read_text()), seen
    (over_s3, seen), (embedded, _) = reports.values()
    for kind in ("gets", "puts"):
        assert seen[kind] == 8 * (kind == "puts") + sum(one[kind] + one[f"nodes_{kind}"] for one in over_s3["rounds"])
        for one in over_s3["rounds"] + embedded["rounds"]:
            assert 0 < one[kind] <= one[f"projected_{kind}"] <= 1.1 * one[kind] + 1
            assert one[f"nodes_{kind}"] == one[f"projected_nodes_{kind}"]
    model = load(over_s3["model"], ceph_store)

    for name, process in loopback.processes.items():
        assert ("AWS_SECRET_ACCESS_KEY" in environment_of(process.pid)) == (name == "superlink")
    assert ROUNDS == len(over_s3["rounds"])
    assert all(one["server_received"] < 2000 * CLIENTS and one["server_sent"] < 5000 * CLIENTS for one in over_s3["rounds"])
    assert_small_messages(embedded)
    assert_same(load(embedded["model"], DirectoryStore(tmp_path / "store")), model)
    for name, array in expected().items():
        np.testing.assert_allclose(model[name], array, rtol=1e-3, atol=1e-5)
    assert "X-Amz-Signature" not in loopback.logs()
