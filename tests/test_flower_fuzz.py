"""Whatever some nodes send, no exception leaves the run, and the mean is that of the honest nodes, to the bit.

``GRADSHARDING_FUZZ=20000 pytest tests/test_flower_fuzz.py`` draws as many replies; each run prints its fresh seed, and
``GRADSHARDING_FUZZ_SEED`` gives it again.
"""

import json
import logging
import os
import random
import secrets
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flower_federation import State, record, reply, sharding, state_of
from gradsharding import MemoryStore
from gradsharding.errors import GradShardingError
from gradsharding.stores.updates import load
from gradsharding.testing import assert_same, reference_mean
from gradsharding_flower import upload_mod
from gradsharding_flower.arrays import NPY, RAW, to_raw
from gradsharding_flower.mod import ORDERS
from gradsharding_flower.permits import KEY as OFFER_KEY
from gradsharding_flower.permits import STYPE as OFFER
from gradsharding_flower.permits import find_offer
from gradsharding_flower.reference import KEY, STYPE, Reference, client_id, find_reference
from gradsharding_flower.replies import Bounds, blaming, read_evaluation, read_training
from gradsharding_flower.testing import LocalGrid

REPLIES = int(os.environ.get("GRADSHARDING_FUZZ", "400"))
SEEDS = [20261128, int(os.environ.get("GRADSHARDING_FUZZ_SEED") or secrets.randbits(32))]
MODEL: State = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(5, np.int64)}
HONEST = (7, 1_000, 2_000)
PARALLEL_NODES = 40
"""Fuzzed nodes in a round."""

TEXTS = [
    "",
    "w",
    "n",
    "\0",
    "\ud800",
    "x\n\x1b[2J",
    "é" * 300,
    "y" * 200_000,
    "../../etc/passwd",
    KEY,
    OFFER_KEY,
    "__metadata__",
    ORDERS,
    "9" * 5_000,
]
INTS = [0, 1, -1, 2, 255, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**4301, True]
FLOATS = [0.0, -0.0, 1.0, -1.5, 1e-300, 5e-324, 1e308, 1.7e308, float("nan"), float("inf"), float("-inf")]


class Draw(random.Random):
    """Draws what a node might send."""

    def text(self) -> str:
        """A name or a sentence."""
        return self.choice(TEXTS)

    def bits(self) -> bytes:
        """Bytes of no meaning."""
        return self.randbytes(self.choice([0, 1, 7, 8, 24, 128, 500]))

    def shape(self) -> tuple[int, ...]:
        """Extents, sane and not."""
        return self.choice(
            [(), (2, 3), (0,), (3, 2), (1,) * 65, (1,) * 33, (-2, -3), (True,), (2**63,), (0, 2**63), (10**2200, 10**2200), (6,)]
        )

    def npy(self) -> bytes:
        """An .npy file of any version, sound or broken."""
        shape = (
            repr(self.shape())
            if self.random() < 0.8
            else self.choice(["(" * 900 + ")" * 900, "(2, 3", "None", "'a'", "(1.5,)", "(__import__,)"])
        )
        descr = self.choice(
            ["'<f4'", "'>f4'", "'<f8'", "'|O'", "'<c8'", "'<U9'", "'<i8'", "[('a','<f4')]", "'|V4'", "'?'", "'<M8[ns]'", "3", "'<f2'"]
        )
        head = f"{{'descr': {descr}, 'fortran_order': {self.choice(['True', 'False', '0'])}, 'shape': {shape}, }}".encode()
        head += b" " * (-len(head) % 64) + b"\n"
        version = self.choice([1, 2, 3, 4, 0])
        size = len(head).to_bytes(2 if version == 1 else 4, "little")
        data = b"\x93NUMPY" + bytes([version, self.choice([0, 0, 0, 1])]) + size + head + bytes(self.choice([0, 4, 8, 24, 24, 48]))
        return data if self.random() < 0.9 else self.mangled(data)

    def mangled(self, data: bytes) -> bytes:
        """Cut, or overwritten somewhere."""
        place = self.randrange(len(data) + 1)
        return self.choice([data[:place], data[:place] + self.bits() + data[place + 3 :], data + self.bits()])

    def value(self, depth: int = 0) -> Any:
        """Any JSON value."""
        if depth < 3 and self.random() < 0.3:
            return [self.value(depth + 1) for _ in range(self.randrange(3))]
        if depth < 3 and self.random() < 0.2:
            return {self.text(): self.value(depth + 1)}
        return self.choice([self.text(), self.choice(INTS[:-3]), None, True, self.choice(FLOATS[:6])])

    def altered(self, fields: dict[str, Any]) -> bytes:
        """JSON of fields, of which some are wrong, missing or too many."""
        for _ in range(self.randrange(3)):
            match self.randrange(3):
                case 0:
                    fields[self.choice([*fields])] = self.value()
                case 1:
                    fields[self.text()] = self.value()
                case _ if len(fields) > 1:
                    del fields[self.choice([*fields])]
        data = json.dumps(fields).encode("utf-8", "replace")
        if self.random() < 0.1:
            data = data.replace(b"1", b"9" * 4_301, 1)
        return data if self.random() < 0.8 else self.choice([self.mangled(data), b"[" * 100_000, b"\xff\xfe", b""])

    def receipt(self, places: list[str]) -> Array:
        """A reference, to its own place or another's."""
        source = self.choice([*places, self.text(), "file:///etc/passwd", "rounds/../../x", "http://127.0.0.1:1/x"])
        fields = {
            "source": source,
            "version": self.choice(["1", self.text()]),
            "nbytes": self.choice(INTS[:8]),
            "names": self.choice([["w", "n"], ["w", "w"], [self.text()], []]),
        }
        return Array(self.text(), self.shape(), STYPE, self.altered(fields))

    def offer(self) -> Array:
        """An offer, sound or not."""
        pieces = [
            {"size": self.choice([1, 150, *INTS[:12], 10**4000]), "md5": self.choice(["A" * 22 + "==", self.text()])}
            for _ in range(self.choice([0, 1, 1, 2, 30]))
        ]
        data = self.altered({"update": {"pieces": pieces}, "names": self.choice([["w", "n"], [self.text()], self.value()])})
        return Array("offer", (), OFFER, data)

    def array(self) -> Array:
        """An array of Flower's."""
        match self.randrange(5):
            case 0:
                return Array(self.choice(["float32", self.text()]), self.shape(), NPY, self.npy())
            case 1:
                return Array(
                    self.choice(["F32", "BF16", "U8", "F64", "BOOL", "F8", self.text()]),
                    self.shape(),
                    RAW,
                    bytes(self.choice([0, 1, 6, 12, 24, 48])),
                )
            case 2:
                return Array(self.text(), self.shape(), self.choice([NPY, RAW, STYPE, OFFER, self.text()]), self.bits())
            case 3:
                return Array(np.full((2, 3), self.choice([0.5, np.nan, np.inf, 1e30]), self.choice(["f4", "f8", ">f4", "f2"])))
            case _:
                return Array(self.choice([np.array(4, np.int64), np.zeros((2, 3), "c8"), np.zeros((2, 3), "U3"), np.array(4, ">i8")]))

    def arrays(self, places: list[str]) -> ArrayRecord:
        """What stands where an update would."""
        match self.randrange(6):
            case 0:
                return ArrayRecord({self.choice([KEY, KEY, KEY, "x"]): self.receipt(places)})
            case 1:
                return ArrayRecord({self.choice([OFFER_KEY, OFFER_KEY, "x"]): self.offer()})
            case 2:
                return ArrayRecord({self.text(): self.array() for _ in range(self.randrange(4))})
            case 3:
                return ArrayRecord({str(i): Array("F32", (0,), RAW, b"") for i in range(3_000 if self.random() < 0.05 else 1)})
            case _:
                return ArrayRecord({"w": self.array(), "n": self.array()})

    def number(self) -> Any:
        """A metric, whatever Flower lets through."""
        one = self.choice([self.choice(INTS[:-1]), self.choice(FLOATS), self.randrange(1, 200)])
        return [one] * self.choice([0, 1, 3]) if self.random() < 0.2 else one

    def metrics(self) -> MetricRecord:
        """Metrics with a weight, most of the time."""
        found = {"num-examples": self.number(), "loss": self.number()}
        for _ in range(self.randrange(2)):
            found[self.text()] = self.number()
        if self.random() < 0.1:
            del found["num-examples"]
        return MetricRecord(found)

    def settings(self) -> ConfigRecord:
        """Settings, usage among them."""
        values: list[Any] = [self.text(), b"", [], [""], 2**63, -1, True, self.text(), [self.text()]]
        keys = ["gets", "puts", "deletes", "bytes_read", "bytes_written", self.text()]
        return ConfigRecord({key: self.choice(values) for key in self.sample(keys, self.randrange(len(keys)))})

    def content(self, places: list[str]) -> RecordDict:
        """Records, most of the time one of arrays and one of metrics."""
        found: dict[str, Any] = {self.choice(["arrays", "arrays", self.text()]): self.arrays(places)}
        found[self.choice(["metrics", "metrics", self.text()])] = (
            self.metrics() if self.random() < 0.8 else MetricRecord({"num-examples": 1, "loss": 0.5})
        )
        for _ in range(self.choice([0, 0, 0, 1, 2])):
            found[self.choice([self.text(), ORDERS])] = self.choice([self.settings(), self.metrics(), self.arrays(places)])
        if self.random() < 0.1:
            found.pop(self.choice([*found]))
        return RecordDict(found)


class Fuzzed(LocalGrid):
    """A grid whose nodes, but for the honest ones, answer what is drawn."""

    def __init__(self, apps: dict[int, ClientApp], draw: Draw) -> None:
        super().__init__(apps)
        self.draw = draw
        self.replies = 0

    def pull_messages(self, message_ids: Any) -> Any:
        """Give replies, some of them twice, in any order."""
        found = list(super().pull_messages(message_ids))
        found += [self.draw.choice(found)] if found and self.draw.random() < 0.1 else []
        self.draw.shuffle(found)
        return found

    def _answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id in HONEST:
            return super()._answer(message)
        self.replies += 1
        draw, node = self.draw, message.metadata.dst_node_id
        orders = message.content.config_records.get(ORDERS, ConfigRecord({"round": "none"}))
        round_id = str(orders.get("round", "none"))
        places = [f"rounds/{round_id}/updates/{client_id(one)}.safetensors" for one in (node, *HONEST)]
        if draw.random() < 0.1:
            return Message(Error(draw.choice([0, 7]), draw.choice([None, draw.text()])), reply_to=message)
        made = Message(draw.content(places), reply_to=message)
        if draw.random() < 0.1:
            match draw.randrange(4):
                case 0:
                    made.metadata.__dict__["_src_node_id"] = draw.choice([*HONEST, 0, 2**64])
                case 1:
                    made.metadata.__dict__["_reply_to_message_id"] = draw.text()
                case 2:
                    made.metadata.__dict__["_message_type"] = draw.choice(["evaluate", "query", draw.text()])
                case _:
                    made.__dict__["_content"] = None
        return made


def honest(mods: Any) -> ClientApp:
    """Make a node that adds its id to its model, and evaluates it."""
    app = ClientApp(mods=mods)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        state = state_of(message.content.array_records["arrays"])
        return Message(reply({name: array + array.dtype.type(context.node_id) for name, array in state.items()}, 3), reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)

    return app


def mean_of(strategy: Any, store: MemoryStore, before: State) -> State | None:
    """Take the mean of the honest nodes and of those others that were let in, by numpy, from their objects in the store."""
    if not strategy.history:
        return None
    report = strategy.history[-1]
    assert {*HONEST} <= {*report.clients}, report.left_out
    weights = {term.client: term.weight for term in strategy.terms}
    prefix = f"rounds/{strategy._run}-{report.server_round:06d}/updates"
    given = {client_id(node): (load(f"{prefix}/{client_id(node)}.safetensors", store), weights[client_id(node)]) for node in report.clients}
    for node in HONEST:
        assert_same({name: array + array.dtype.type(node) for name, array in before.items()}, given[client_id(node)][0])
    return reference_mean(given)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let Flower log nothing, and numpy's parser warn of what it reads."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "fresh"])
def test_replies(seed: int, record_property: Callable[[str, object], None]) -> None:
    """In every mode, fuzzed replies end no run; the mean is numpy's of the honest updates and of those others that are sound."""
    print(f"GRADSHARDING_FUZZ_SEED={seed}")  # noqa: T201 - to draw the same again
    record_property("seed", seed)
    draw, done = Draw(seed), 0
    while done < REPLIES:
        mode = draw.choice(["direct", "relay", "mixed"])
        store, nodes = MemoryStore(), draw.sample(range(10, 900), PARALLEL_NODES)
        apps = {node: honest([] if mode == "relay" or (mode == "mixed" and node == 7) else [upload_mod]) for node in HONEST}
        grid = Fuzzed(apps | dict.fromkeys(nodes, honest([])), draw)
        strategy = sharding(store, FedAvg(), mode=mode, keep=True, shards=draw.choice([1, 3]))
        aggregated = strategy._aggregate

        def remembered(round_: Any, strategy: Any = strategy, aggregated: Any = aggregated) -> Any:
            result = aggregated(round_)
            strategy.terms = round_.seal().terms
            return result

        strategy._aggregate = remembered  # type: ignore[method-assign]
        result = strategy.start(grid, record(MODEL), num_rounds=1, timeout=0.02)
        expected = mean_of(strategy, store, MODEL)
        assert expected is not None, f"seed {seed}: the round was given up"
        assert_same(expected, state_of(result.arrays))
        assert max(map(len, strategy.history[0].left_out.values()), default=0) < 1_000
        done += grid.replies


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "fresh"])
@pytest.mark.slow
def test_readers(seed: int) -> None:
    """What reads arrays, receipts, offers and whole replies gives a value, or raises an error of ours whose message is short."""
    print(f"GRADSHARDING_FUZZ_SEED={seed}")  # noqa: T201 - to draw the same again
    draw = Draw(seed)
    most = Bounds(header=70_000, data=1 << 20)
    LocalGrid({})  # it says who sends
    asked = Message(RecordDict(), dst_node_id=3, message_type="train")
    readers: list[Callable[[], object]] = [
        lambda: to_raw(draw.text(), draw.array()),
        lambda: find_reference(ArrayRecord({KEY: draw.receipt([])}), most.header),
        lambda: find_offer(ArrayRecord({OFFER_KEY: draw.offer()}), most.header),
        lambda: read_training(Message(draw.content([]), reply_to=asked), "num-examples", most),
        lambda: read_evaluation(Message(draw.content([]), reply_to=asked), "num-examples"),
    ]
    read, refused = 0, set[str]()
    for reader in readers * REPLIES:
        try:
            with blaming():
                reader()
            read += 1
        except GradShardingError as error:
            refused.add(error.message)
    assert read > 0
    assert [] == [message for message in refused if len(message) >= 1_000 or not message.isprintable()]


def test_a_reference_is_bounded() -> None:
    """A receipt of more bytes than a few times the model's names is refused before it is parsed."""
    receipt = Reference(source="s", version="v", nbytes=1, names=tuple(str(i) for i in range(100_000)))
    with pytest.raises(GradShardingError, match=r"its receipt takes \d+ bytes; at most 70000"):
        find_reference(receipt.record(), 70_000)
