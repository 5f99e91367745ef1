"""A round is its records: each is created once, and says who gave what."""

import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gradsharding.arithmetic.rules import MEAN
from gradsharding.arithmetic.weights import MAX_WEIGHT, integral_weights
from gradsharding.errors import (
    ChangedObject,
    DuplicateClient,
    InvalidId,
    InvalidRecord,
    InvalidUpdate,
    InvalidWeight,
    LayoutMismatch,
    MissingObject,
    ObjectExists,
    TooFewClients,
    UserError,
    quoted,
)
from gradsharding.format.encode import encode
from gradsharding.planning.manifest import Contribution, Manifest, check_id
from gradsharding.planning.plan import Limits
from gradsharding.planning.topologies import Sharded
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import Stat
from gradsharding.stores.updates import inspect
from gradsharding.stores.urls import file_reference
from gradsharding.testing import CountingStore, FlakyStore

W = {"w": np.array([1, 2, 3], "f4")}
V = {"w": np.array([4, 5, 6], "f4")}


@pytest.fixture
def round_() -> Round:
    """Give an empty round in memory."""
    return Round.create(MemoryStore(), "r")


@pytest.mark.parametrize("name", ["r", "R2-D2", "_x", "0", "a.b", "x" * 64])
def test_ids(name: str) -> None:
    """Ids are letters, digits, and _ . - inside, at most 64."""
    round_ = Round.create(MemoryStore(), name)
    round_.submit(name, W, 1)

    assert [name] == [receipt.client for receipt in round_.receipts()]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "ä", "a\n", "a\0", "a\\b", "%2e", "x" * 65])
def test_bad_ids(round_: Round, name: str) -> None:
    """What may not become part of a key is refused, as a round and as a client, before anything is written."""
    with pytest.raises(InvalidId, match=re.escape(f"{name!r} is not an id; use 1 to 64")):
        Round.create(MemoryStore(), name)
    gives: list[Callable[[], object]] = [lambda: round_.submit(name, W, 1), lambda: round_.refer(name, "a", 1)]
    for give in gives:
        with pytest.raises(InvalidId, match="is not an id"):
            give()
    assert ["rounds/r/round.json"] == [key for key, _ in round_.store.list("")]


NO_TEXT: list[Any] = [None, 7, 1.5, True, b"ann", ["ann"], ("a", "b"), object(), np.int64(7), 10**5000]


@pytest.mark.parametrize("name", NO_TEXT, ids=lambda name: quoted(name, 20))
def test_ids_that_are_no_text(round_: Round, name: Any) -> None:
    """What is not even text is refused by its type, with what to do, wherever an id is taken; nothing is written."""
    store = MemoryStore()
    store.put("a", encode(W)[1])
    update = inspect("a", store)
    takes: list[Callable[[], object]] = [
        lambda: Round(MemoryStore(), name),
        lambda: Round.create(MemoryStore(), name),
        lambda: round_.submit(name, W, 1),
        lambda: round_.refer(name, "a", 1),
        lambda: round_.seal(leave_out=["ann", name]),
        lambda: round_.update_key(name),
        lambda: Manifest.of("r", [Contribution("ann", "a", update, 1), Contribution(name, "a", update, 1)]),
        lambda: check_id(name),
    ]
    for take in takes:
        with pytest.raises(InvalidId, match=rf"is not an id but of type {type(name).__name__}; ids are text: convert it with str\(\)$"):
            take()
    assert ["rounds/r/round.json"] == [key for key, _ in round_.store.list("")]


@pytest.mark.parametrize("names", ["ann", b"ann", None, 7])
def test_one_id_in_the_place_of_several(round_: Round, names: Any) -> None:
    """A text, whose letters are no clients, is refused where ids should be: nobody is left out by mistake, or stays."""
    for client in ("a", "ann", "n"):
        round_.submit(client, W, 1)

    with pytest.raises(InvalidId, match=r"must be a list of ids, such as \['ann', 'bob'\]"):
        round_.seal(leave_out=names)
    assert None is round_.sealed()


GOOD_WEIGHTS: list[Any] = [
    1, 7, 1.0, 0.1, 1e-300, 5e-324, MAX_WEIGHT, float(MAX_WEIGHT), np.float64(2.5), np.float32(2.5), np.int64(7), np.uint8(7),
]  # fmt: skip
BAD_WEIGHTS: list[Any] = [
    0, 0.0, -0.0, -1, -0.5, -1e-300, -MAX_WEIGHT, math.inf, -math.inf, math.nan, -math.nan,
    MAX_WEIGHT + 1, 1 << 60, 1 << 64, 10**400, -(10**400), 10**5000, np.float64("nan"), np.bool_(True),
    1e300, 9.1e15, float(MAX_WEIGHT) * 2, True, False,
    None, "1", "", b"1", [], [1], {}, (), 1j, Fraction(1, 2), object(),
]  # fmt: skip


@pytest.mark.parametrize("weight", GOOD_WEIGHTS)
def test_weights(round_: Round, weight: float) -> None:
    """A weight is any positive number up to 2**53, and the receipt keeps it."""
    assert weight == round_.submit("ann", W, weight).weight


@pytest.mark.parametrize("weight", BAD_WEIGHTS, ids=lambda weight: quoted(weight, 20))
def test_bad_weights(round_: Round, weight: Any) -> None:
    """Anything else raises InvalidWeight, which names the client, before anything is written."""
    with pytest.raises(InvalidWeight, match="client ann has weight"):
        round_.submit("ann", W, weight)
    assert ["rounds/r/round.json"] == [key for key, _ in round_.store.list("")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([120, 80], [120, 80]),
        ([2.0, 4.0], [2, 4]),
        ([0.5, 0.25, 1], [2, 1, 4]),
        ([0.5, 0.5], [1, 1]),
        ([5e-324, 5e-324], [1, 1]),
        ([1.5, 1 << 20], [3, 1 << 21]),
    ],
)
def test_integral_weights(given: list[float], expected: list[int]) -> None:
    """Whole weights stay; others are scaled by a power of two, and reduced by one."""
    assert expected == list(integral_weights({str(i): weight for i, weight in enumerate(given)}).values())


def test_scaled_weights_are_close() -> None:
    """Scaled weights keep their ratios within 2**-29, the documented error."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        given = {str(i): float(w) for i, w in enumerate(np.exp(draw.uniform(-5, 5, 20)) * 2.0 ** draw.integers(-900, 30))}
        whole = integral_weights(given)
        unit = Fraction(given["0"]) / whole["0"]

        scale = 2 ** round(math.log2(unit))  # a power of two, exactly
        worst = max(abs(whole[c] * Fraction(scale) / Fraction(given[c]) - 1) for c in given)
        assert worst <= Fraction(1, 1 << 29)


@pytest.mark.parametrize("weights", [[MAX_WEIGHT, 1], [1e-9, 1e7], [0.1] + [1e6] * 40, [5e-324, 1e15]])
def test_weights_too_far_apart(weights: list[float]) -> None:
    """Weights whose integers would pass 2**53 raise InvalidWeight, which says what to use."""
    with pytest.raises(InvalidWeight, match=r"as integers they pass 2\*\*53: use whole numbers of examples"):
        integral_weights({str(i): weight for i, weight in enumerate(weights)})


def test_create_twice(round_: Round) -> None:
    """A round that is created again is the same round, unless its result should go elsewhere."""
    assert round_ == Round.create(round_.store, "r")
    with pytest.raises(ObjectExists, match=r"round r exists and writes to results/r\.safetensors, not elsewhere"):
        Round.create(round_.store, "r", output="elsewhere")


def test_result_outlives_the_round(round_: Round) -> None:
    """A result lies beside the rounds, so that what clears them away leaves it."""
    assert "results/r.safetensors" == round_.output
    assert not round_.output.startswith("rounds/")


@pytest.mark.parametrize(
    ("former", "rule"),
    [({}, "mean"), ({"arithmetic": "float64"}, "mean"), ({"arithmetic": "exact", "digest": "0" * 64}, "exact-mean")],
    ids=["before arithmetics", "float64", "exact"],
)
def test_results_of_format_1(former: dict[str, Any], rule: str) -> None:
    """A result of before there were rules is read: its arithmetic is the rule, and asked for by another rule it stays."""
    round_ = done_round()
    record = round_.result()
    assert record
    fields = json.loads(record.model_dump_json(exclude={"rule", "digest"})) | {"format": 1} | former
    rewritten(round_, "result", json.dumps(fields).encode())
    found = Round(round_.store, "r").result()
    other = "mean" if rule == "exact-mean" else "exact-mean"

    assert found
    assert (rule, former.get("digest"), record.version) == (str(found.rule), found.digest, found.version)
    assert found == aggregate(Round(round_.store, "r"), rule=rule).record
    with pytest.raises(UserError, match=f"round r is done, by the rule {rule}; its result stays: for {other}, create another round"):
        aggregate(Round(round_.store, "r"), rule=other)


def test_plan_of_format_1() -> None:
    """A plan of a release without rules is not taken for one of today's: it is given up, and its upload with it."""
    round_ = Round.create(MemoryStore(), "r")
    round_.submit("ann", W, 1)
    upload = round_.store.begin("results/r.safetensors")
    fields = {"format": 1, "topology": "sharded", "tasks": 1, "digest": "0" * 64, "nonfinite": "raise", "upload": upload}
    round_.store.put("rounds/r/plan.json", [json.dumps(fields).encode()])

    assert W["w"].tolist() == aggregate(round_).arrays()["w"].tolist()
    with pytest.raises(MissingObject):
        round_.store.parts("results/r.safetensors", upload)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rule": "no-such-rule:7"}, "no rule is named 'no-such-rule'; use mean"),
        ({"rule": "mean", "arithmetic": "float64"}, "Extra inputs are not permitted"),
        ({"rule": 7}, "is not a rule but of type int"),
    ],
)
def test_results_of_unknown_rules(fields: dict[str, Any], says: str) -> None:
    """A result by a rule that this release does not have is refused with the place, and with the rules that there are."""
    round_ = done_round()
    ((_, data),) = round_.store.fetch([round_.key("result.json")])
    rewritten(round_, "result", json.dumps(json.loads(data) | fields).encode())

    with pytest.raises(InvalidRecord, match=says) as caught:
        round_.result()
    assert "rounds/r/result.json' in memory://" in caught.value.message


def test_rounds_of_earlier_releases() -> None:
    """Records without a format, whose result lies among them, are read, found by ``create``, and written to as they say."""
    store = MemoryStore()
    layout, data = encode(W)
    stat = store.put("rounds/r/result.safetensors", data)
    update = store.put("rounds/r/updates/ann.safetensors", data)
    said: dict[str, Any] = {
        "round": {"id": "r", "output": "rounds/r/result.safetensors"},
        "receipts/ann": {
            "client": "ann", "source": "rounds/r/updates/ann.safetensors", "version": update.version, "base": len(data[0]), "weight": 2,
            "layout": layout.digest,
        },
        "result": {
            "source": "rounds/r/result.safetensors", "version": stat.version, "clients": ["ann"], "weight": 2, "arithmetic": "float64",
            "layout": {"tensors": [{"name": "w", "dtype": "F32", "shape": [3], "start": 0, "stop": 12}]}, "digest": None,
        },
    }  # fmt: skip
    for name, fields in said.items():
        store.put(f"rounds/r/{name}.json", [json.dumps(fields).encode()])
    round_ = Round.create(store, "r")
    record = round_.result()

    assert "rounds/r/result.safetensors" == round_.output
    assert record
    assert (stat.version, ("ann",), "mean", layout) == (record.version, record.clients, str(record.rule), record.layout)
    assert ["ann"] == [term.client for term in round_.seal().terms]
    assert W["w"].tolist() == aggregate(round_).arrays()["w"].tolist()


FORMATS = {"round": 1, "receipts/ann": 1, "manifest": 1, "plan": 2, "result": 2}
"""The newest format of each kind of record, by name."""

RECORDS = tuple(FORMATS)


def done_round() -> Round:
    """Give a round that has every kind of record."""
    round_ = Round.create(MemoryStore(), "r")
    round_.submit("ann", W, 1)
    aggregate(round_)
    return Round(round_.store, "r")


def reads(round_: Round, name: str) -> Callable[[], object]:
    """Give a call that reads a record."""
    plan = Sharded(shards=1).plan(Round(done_round().store, "r").seal(), Limits())
    return {
        "round": lambda: round_.output,
        "receipts/ann": round_.receipts,
        "manifest": round_.sealed,
        "plan": lambda: round_.begin(plan),
        "result": round_.result,
    }[name]


def rewritten(round_: Round, name: str, data: bytes) -> None:
    """Replace a record."""
    key = round_.key(f"{name}.json")
    round_.store.delete([key])
    round_.store.put(key, [data])


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_later_releases(name: str) -> None:
    """Each record tells its format; one of a later release is not read half, but said to be one, with what to do."""
    round_ = done_round()
    ((_, data),) = round_.store.fetch([round_.key(f"{name}.json")])
    fields = json.loads(data)
    newest = fields["format"]
    assert FORMATS[name] == newest
    rewritten(round_, name, json.dumps(fields | {"format": newest + 1, "later": "field"}).encode())

    says = rf"has format {newest + 1}, and this release .* reads formats up to {newest}: .* upgrade gradsharding"
    with pytest.raises(InvalidRecord, match=says) as caught:
        reads(round_, name)()
    assert f"rounds/r/{name}.json' in memory://" in caught.value.message


SCRIBBLES = {
    "text": b"scribble", "nothing": b"", "no object": b"[1]", "another": b'{"client":"b","later":"field"}', "binary": bytes(range(256)),
    "another format": b'{"format":"v2"}', "a huge format": b'{"format":1' + b"0" * 4000 + b"}",
    "a huge name": b'{"' + b"x" * 100_000 + b'":1}',
    "half": b'{"format":1,', "deep": b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("scribble", SCRIBBLES.values(), ids=SCRIBBLES)
@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_none(name: str, scribble: bytes) -> None:
    """What is in a record's place and is none is named, in a sentence, by our own error; nothing else is raised."""
    round_ = done_round()
    rewritten(round_, name, scribble)

    with pytest.raises(InvalidRecord, match=re.escape(f"rounds/r/{name}.json' in memory://")) as caught:
        reads(round_, name)()
    assert len(caught.value.message) < 600


TENSOR = {"name": "w", "dtype": "F32", "shape": [3], "start": 0, "stop": 12}
LAYOUTS: list[Any] = [
    7, None, [], {}, {"tensors": 7}, {"tensors": [7]}, {"tensors": [{}]}, {"tensors": [TENSOR | {"stop": 13}]},
    {"tensors": [TENSOR | {"shape": "x"}]}, {"tensors": [TENSOR | {"name": 7}]}, "", "{", "[]", "\ud800", '{"w":7}',
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=json.dumps)
def test_layouts_that_are_none(layout: Any) -> None:
    """A record whose layout is none, in the form of today or of the first releases, is told to be no record."""
    round_ = done_round()
    ((_, data),) = round_.store.fetch([round_.key("manifest.json")])
    rewritten(round_, "manifest", json.dumps(json.loads(data) | {"layout": layout}).encode())

    with pytest.raises(InvalidRecord, match=r"rounds/r/manifest.json' in memory://"):
        round_.sealed()


def test_foreign_receipt(round_: Round) -> None:
    """A receipt that is none stops the seal, which names it."""
    round_.submit("ann", W, 1)
    round_.store.put("rounds/r/receipts/b.json", [b'{"client":"b","later":"field"}'])

    with pytest.raises(InvalidRecord, match=r"^'rounds/r/receipts/b.json' in memory://.* is not a Receipt of gradsharding: .*delete it"):
        round_.seal()


def test_duplicates(round_: Round) -> None:
    """A client counts once: the same again changes nothing, another update or weight raises DuplicateClient."""
    receipt = round_.submit("ann", W, 1)
    assert receipt == round_.submit("ann", W, 1)
    assert receipt == round_.refer("ann", receipt.source, 1)

    others: list[Callable[[], object]] = [
        lambda: round_.submit("ann", V, 1),
        lambda: round_.submit("ann", W, 2),
        lambda: round_.refer("ann", receipt.source, 2),
    ]
    for give in others:
        with pytest.raises(DuplicateClient, match="client ann"):
            give()
    assert [receipt] == round_.receipts()


def test_submit_after_a_crash() -> None:
    """A client that dies at any request of its submission, or loses any answer, may submit again."""
    whole = FlakyStore(MemoryStore(), {})
    Round(whole, "r").submit("ann", W, 3)
    assert {"get": 2, "put": 2, "any": 4} == whole.calls  # is it sealed? the update, its receipt, and: is it sealed now?

    for call in range(1, 5):
        for when in ("before", "after"):
            store = MemoryStore()
            with pytest.raises(ConnectionError):
                Round(FlakyStore(store, {(when, "any", call): ConnectionError()}), "r").submit("ann", W, 3)
            Round(store, "r").submit("ann", W, 3)
            assert [("ann", 3)] == [(term.client, term.weight) for term in Round(store, "r").seal().terms]


def test_refer(tmp_path: Any) -> None:
    """An update may lie anywhere; only its header is read, and its version is pinned."""
    data = b"".join(encode({"w": np.zeros(1_000_000, "f4")})[1])
    (tmp_path / "ann.safetensors").write_bytes(data)
    elsewhere = DirectoryStore(tmp_path)
    version = elsewhere.head("ann.safetensors").version
    round_ = Round.create(CountingStore(MemoryStore()), "r")
    receipt = round_.refer("ann", file_reference(tmp_path / "ann.safetensors"), 3, version=version)

    assert (version, len(data) - 4_000_000) == (receipt.version, receipt.base)
    with pytest.raises(ChangedObject, match=r"of client bob is at version .*, not 1: it was written again"):
        round_.refer("bob", file_reference(tmp_path / "ann.safetensors"), 3, version="1")


def test_refer_to_nothing(round_: Round) -> None:
    """What is not there, or is no update, is refused, and the round stays as it was."""
    round_.store.put("text", [b"not a safetensors object"])

    with pytest.raises(MissingObject, match="'nothing'"):
        round_.refer("ann", "nothing", 1)
    with pytest.raises(InvalidUpdate, match="text: "):
        round_.refer("ann", "text", 1)
    assert [] == round_.receipts()


def test_seal(round_: Round) -> None:
    """A sealed round holds its clients by id, pinned; whoever comes later is told so."""
    for client, weight in (("bob", 0.5), ("Ann", 1), ("ann", 2.25)):
        round_.submit(client, W, weight)
    manifest = round_.seal()
    with pytest.raises(UserError, match="round r is sealed, and client zoe is not in it"):
        round_.submit("zoe", W, 1)
    assert "bob" == round_.submit("bob", W, 0.5).client  # the same again changes nothing

    assert [("Ann", 4), ("ann", 9), ("bob", 2)] == [(term.client, term.weight) for term in manifest.terms]
    assert [round_.store.head(term.source).version for term in manifest.terms] == [term.version for term in manifest.terms]
    assert encode(W)[0] == manifest.layout
    assert manifest == round_.seal() == round_.seal(leave_out=["bob"])


class Sealing(CountingStore):
    """Another process seals the round before the receipt of ``late`` is there."""

    def put(self, key: str, data: Any) -> Stat:
        """Create an object, late."""
        if key.endswith("receipts/late.json"):
            Round(self.store, "r").seal()
        return super().put(key, data)


def test_seal_in_the_middle_of_a_submission() -> None:
    """Whoever is left out by a seal that came between is told so, the first time and each time after; so is who was left out by name."""
    store = MemoryStore()
    round_ = Round.create(store, "r")
    round_.submit("early", W, 1)
    round_.submit("bad", W, 1)
    says = "round r is sealed, and client late is not in it; submit to the next round"
    for handle in (Round(Sealing(store), "r"), Round(Sealing(store), "r"), Round(store, "r")):
        with pytest.raises(UserError, match=says):
            handle.submit("late", W, 1)
        with pytest.raises(UserError, match=says):
            handle.refer("late", "rounds/r/updates/late.safetensors", 1)

    assert ["bad", "early"] == [term.client for term in round_.seal().terms]
    other = Round.create(store, "s")
    for client in ("early", "bad"):
        other.submit(client, W, 1)
    other.seal(leave_out=["bad"])
    with pytest.raises(UserError, match="client bad is not in it"):
        other.submit("bad", W, 1)
    assert "early" == other.submit("early", W, 1).client


def test_late_update_is_not_sent(round_: Round) -> None:
    """A client that comes late is told so before its update travels."""
    round_.submit("early", W, 1)
    round_.seal()
    counting = CountingStore(round_.store)

    with pytest.raises(UserError, match="client late is not in it"):
        Round(counting, "r").submit("late", W, 1)
    assert (1, 0) == (counting.gets, counting.puts)


def test_seal_leaves_out(round_: Round) -> None:
    """Clients may be left out of a round as it is sealed."""
    for client in ("ann", "bob"):
        round_.submit(client, W, 1)

    assert ["bob"] == [term.client for term in round_.seal(leave_out=["ann", "nobody"]).terms]


def test_seal_nothing(round_: Round) -> None:
    """A round without updates is not sealed, and may be later."""
    with pytest.raises(TooFewClients, match="round r has no update"):
        round_.seal()
    round_.submit("ann", W, 1)
    assert 1 == len(round_.seal().terms)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"w": np.zeros(4, "f4")}, r"tensor 'w' is F32\[3\] .* in ann but F32\[4\]"),
        ({"w": np.zeros(3, "f2")}, r"tensor 'w' is F32\[3\] .* in ann but F16\[3\]"),
        ({"x": np.zeros(3, "f4")}, r"tensor 'w' is F32\[3\] .* in ann but absent in zoe"),
        (W | {"b": np.zeros(0, "u1")}, r"tensor 'b' is absent in ann but U8\[0\] .* in zoe"),
    ],
)
def test_layouts_differ(round_: Round, other: Any, says: str) -> None:
    """Updates that do not hold the same tensors raise LayoutMismatch, which names the tensor and both clients."""
    round_.submit("ann", W, 1)
    round_.submit("bob", V, 1)
    round_.submit("zoe", other, 1)

    with pytest.raises(LayoutMismatch, match=says):
        round_.seal()


def test_same_tensors_in_another_order() -> None:
    """Headers that tell the same tensors in another order, empty ones among them, make one layout."""
    store = MemoryStore()
    entry = b'"%s":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}'
    entries = [entry % (b"a", 0, 0, 0), entry % (b"b", 0, 0, 0), entry % (b"w", 2, 0, 8)]
    round_ = Round.create(store, "r")
    for client, order in (("ann", entries), ("bob", entries[::-1])):
        header = b"{" + b",".join(order) + b"}"
        store.put(client, [len(header).to_bytes(8, "little"), header, b"12345678"])
        round_.refer(client, client, 1)

    assert ["ann", "bob"] == [term.client for term in round_.seal().terms]


def test_begin(round_: Round) -> None:
    """A plan is begun once; the same plan finds its upload, another one gives the first upload up."""
    round_.submit("ann", W, 1)
    manifest = round_.seal()
    plans = [Sharded(shards=shards).plan(manifest, Limits()) for shards in (2, 3)]
    first, begun, dropped = round_.begin(plans[0])
    assert (True, 0) == (begun, dropped)
    assert (first, False, 0) == round_.begin(plans[0])

    second, begun, dropped = round_.begin(plans[1])
    assert (True, 2) == (begun, dropped)
    assert first != second
    assert {} == round_.store.parts(round_.output, second)
    with pytest.raises(MissingObject):
        round_.store.parts(round_.output, first)


def test_publish(round_: Round) -> None:
    """A round is done when its result is recorded, and then for good."""
    round_.submit("ann", W, 2)
    round_.submit("bob", W, 3)
    assert None is round_.result()
    version = round_.store.put(round_.output, encode(W)[1]).version
    record = round_.publish(round_.seal(), version, MEAN)

    assert (("ann", "bob"), 5, version) == (record.clients, record.weight, record.version)
    assert record == round_.result() == round_.publish(round_.seal(), "v2", MEAN)
    round_.store.delete([round_.output])
    assert None is round_.result()
