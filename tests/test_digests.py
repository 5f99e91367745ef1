"""The bits of results stay from release to release: a table of inputs and digests, made once, is checked whenever the tests run.

``tests/digests.json`` is written anew by ``python tests/test_digests.py``; a change in it is a change of what users get.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gradsharding import (
    DirectoryStore,
    Flat,
    LambdaFLTree,
    LIFLTree,
    Limits,
    MemoryStore,
    ProcessExecutor,
    Round,
    Sharded,
    ShardedTree,
    aggregate,
)
from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule
from gradsharding.format.encode import Raw
from gradsharding.planning.topologies import Topology
from gradsharding.testing import read

TABLE = Path(__file__).with_name("digests.json")

INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
FLOATS = {"F64": (8, 52, 11), "F32": (4, 23, 8), "F16": (2, 10, 5), "BF16": (2, 7, 8)}
"""Bytes of an element, and bits of its fraction and of its exponent."""

TOPOLOGIES: dict[str, Topology] = {
    "flat": Flat(),
    "sharded:1": Sharded(shards=1),
    "sharded:7": Sharded(shards=7),
    "lambda-fl": LambdaFLTree(),
    "lifl": LIFLTree(),
    "sharded-tree:3": ShardedTree(shards=3, fan_in=2),
}

WEIGHTS: dict[str, tuple[float, ...]] = {
    "ones": (1,) * 5,
    "examples": (600, 1, 37, 4096, 250),
    "fractions": (0.5, 0.1, 3.75, 1e-3, 2.0),
}

SIZES = (1, 64, 4097)


ARITHMETIC: dict[str, Rule] = {"float64": MEAN, "exact": ExactMean()}
"""What the table calls the rules."""


def drawn(seed: str, dtype: str, elements: int) -> Raw:
    """Draw finite elements from SHAKE-256, which no release of numpy can change; floats lie within 2**12 of each other."""
    width = INTEGERS.get(dtype) or (FLOATS[dtype][0] if dtype in FLOATS else 1)
    data = hashlib.shake_256(f"{seed} {dtype} {elements}".encode()).digest(width * elements)
    if dtype == "BOOL":
        return Raw(dtype, (elements,), bytes(byte & 1 for byte in data))
    if dtype in FLOATS:
        _, fraction, exponent = FLOATS[dtype]
        bits = np.frombuffer(data, f"<u{width}").astype("<u8")
        middle = (1 << (exponent - 1)) - 7
        spread = (bits >> np.uint64(fraction)) % np.uint64(12) + np.uint64(middle - 6)
        sign = (bits >> np.uint64(fraction + exponent)) << np.uint64(fraction + exponent)
        bits = sign | spread << np.uint64(fraction) | bits & np.uint64((1 << fraction) - 1)
        data = bits.astype(f"<u{width}").tobytes()
    return Raw(dtype, (elements,), data)


def update(client: str, elements: int, arithmetic: str) -> dict[str, Raw]:
    """Give a client's tensors, one of each dtype; float64 cannot be summed exactly."""
    dtypes = [*INTEGERS, *FLOATS, "BOOL"]
    return {
        f"{dtype}.{i}": drawn(f"{client} {i}", dtype, elements)
        for dtype in dtypes
        if (dtype, arithmetic) != ("F64", "exact")
        for i in (0, 1)
    }


def rows() -> Iterator[tuple[str, str, str, str, int]]:
    """Name the rows of the table."""
    for arithmetic in ARITHMETIC:
        for topology in TOPOLOGIES:
            for weights in WEIGHTS:
                for elements in SIZES:
                    yield f"{arithmetic} {topology} {weights} {elements}", arithmetic, topology, weights, elements


def digest(arithmetic: str, topology: str, weights: str, elements: int) -> str:
    """Aggregate, and give the SHA-256 of the whole object that comes out, its header included."""
    round_ = Round.create(MemoryStore(), "r")
    for i, weight in enumerate(WEIGHTS[weights]):
        round_.submit(f"client-{i}", update(f"client-{i}", elements, arithmetic), weight)
    aggregate(round_, topology=TOPOLOGIES[topology], rule=ARITHMETIC[arithmetic], limits=Limits(memory=1 << 30))
    return hashlib.sha256(read(round_.store, round_.output)).hexdigest()


@pytest.mark.parametrize(("arithmetic", "topology"), [(a, t) for a in ARITHMETIC for t in TOPOLOGIES])
def test_table(arithmetic: str, topology: str) -> None:
    """Every row has the digest that it had when the table was made."""
    table = json.loads(TABLE.read_text())
    wanted = {name: table[name] for name, a, t, _, _ in rows() if (a, t) == (arithmetic, topology)}

    assert wanted == {name: digest(a, t, w, n) for name, a, t, w, n in rows() if (a, t) == (arithmetic, topology)}


def test_processes(tmp_path: Path) -> None:
    """Worker processes make the same object."""
    round_ = Round.create(DirectoryStore(tmp_path), "r")
    for i, weight in enumerate(WEIGHTS["examples"]):
        round_.submit(f"client-{i}", update(f"client-{i}", 4097, "exact"), weight)
    aggregate(round_, topology=TOPOLOGIES["sharded:7"], rule=ExactMean(), executor=ProcessExecutor(2))

    found = hashlib.sha256(read(round_.store, round_.output)).hexdigest()
    assert json.loads(TABLE.read_text())["exact sharded:7 examples 4097"] == found


if __name__ == "__main__":
    TABLE.write_text(json.dumps({name: digest(a, t, w, n) for name, a, t, w, n in rows()}, indent=1) + "\n")
