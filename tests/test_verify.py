"""Verification computes an exact result again by Python's integers, and finds every bit that is not what it should be."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding import DirectoryStore, MemoryStore, Round, aggregate
from gradsharding.arithmetic.integers import mean
from gradsharding.arithmetic.rules import ExactMean
from gradsharding.errors import ChangedObject, MissingObject, ObjectExists, UserError, VerificationFailed
from gradsharding.format.dtypes import FORMATS, Buffer
from gradsharding.rounds.records import ResultRecord
from gradsharding.rounds.verify import SLICE, verify
from gradsharding.testing import read
from test_arithmetic import EVERYTHING, narrow
from test_exact import DTYPES, KINDS, bits, draw, expected
from test_trees import submitted


def published(updates: dict[str, Any] | None = None) -> Round:
    """Make a round that has an exact result."""
    round_ = submitted(updates or narrow(3), MemoryStore())
    aggregate(round_, rule=ExactMean())
    return round_


def publish_instead(round_: Round, change: Callable[[bytearray, ResultRecord], None], **fields: Any) -> None:
    """Put another object where the result is, and a record that vouches for it."""
    record = round_.result()
    assert record
    data = bytearray(read(round_.store, record.source))
    change(data, record)
    round_.store.delete([record.source, round_.key("result.json")])
    version = round_.store.put(record.source, [bytes(data)]).version
    digest = hashlib.sha256(data[len(record.layout.header()) :]).hexdigest()
    told = record.model_copy(update={"version": version, "digest": digest, **fields})
    round_.store.put(round_.key("result.json"), [told.model_dump_json().encode()])


def test_whole_result() -> None:
    """With enough of a sample every element of every dtype is computed again, none of them twice."""
    round_ = published()
    layout, verified = round_.seal().layout, verify(round_, sample=EVERYTHING)

    assert (len(layout.runs), layout.elements) == (verified.of, verified.elements)
    assert verified.record == round_.result()


def test_sample() -> None:
    """A sample is so many slices of 4,096 elements, others each time."""
    round_ = published({"a": ({"w": np.arange(50 * SLICE, dtype="f4")}, 3), "b": ({"w": np.ones(50 * SLICE, "f4")}, 4)})
    verified = verify(round_, sample=7)

    assert (7, 50, 7 * SLICE) == (verified.slices, verified.of, verified.elements)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64", "uint8", "scalar"])
def test_wrong_bit_is_found(name: str) -> None:
    """One bit of one element that is wrong, in an object whose digest is told rightly, is found and named."""
    round_ = published()

    def flip(data: bytearray, record: ResultRecord) -> None:
        tensor = next(tensor for tensor in record.layout.tensors if tensor.name == name)
        data[len(record.layout.header()) + tensor.stop - 1] ^= 1

    publish_instead(round_, flip)
    with pytest.raises(VerificationFailed, match=rf"round r: '{name}'\[(6)?\] is .*, but its updates give"):
        verify(round_, sample=EVERYTHING)


def test_long_name_is_cut_short() -> None:
    """A name that a client has chosen comes into the message in quotes, on one line, and cut."""
    name = "w\nERROR: " + "x" * 10_000
    round_ = published({"a": ({name: np.ones(3, "f4")}, 1)})
    publish_instead(round_, lambda data, _: data.__setitem__(-1, data[-1] ^ 1))

    with pytest.raises(VerificationFailed, match=r"'w..?nERROR: x{71}'…\[2\] is") as caught:
        verify(round_)
    assert caught.value.message.isprintable()


def test_wrong_digest_is_found() -> None:
    """A digest that is not that of the object is found before anything is computed."""
    round_ = published()
    publish_instead(round_, lambda *_: None, digest="00" * 32)

    with pytest.raises(VerificationFailed, match=r"have SHA-256 [0-9a-f]{64}, and 0000"):
        verify(round_, sample=1)


def test_other_clients_are_found() -> None:
    """A result that names other clients than were sealed is none of theirs."""
    round_ = published()
    publish_instead(round_, lambda *_: None, clients=("mallory",))

    with pytest.raises(VerificationFailed, match="was not published for the clients and tensors that are sealed"):
        verify(round_)


ALTERED = [(b'"float32"', b'"FLOAT32"'), (b'"F32"', b'"U32"'), (b'"shape":[7]', b'"shape":[8]'), (b"}}", b"} ")]
"""What is in a header, and something else of its length."""


class Altered(MemoryStore):
    """A store that gives the published result with something else in its header, at the version that it had."""

    change: tuple[bytes, bytes] | None = None

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Give bytes of the altered object."""
        data = b"".join(map(bytes, super().get(key, 0, self.head(key).size, version=version)))
        if self.change and key.startswith("results/"):
            assert self.change[0] in data
            data = data.replace(*self.change, 1)
        yield data[start:stop]


@pytest.mark.parametrize("change", ALTERED)
def test_altered_header_is_found(change: tuple[bytes, bytes]) -> None:
    """A result whose header was altered, its data and version being what they were, is not verified, and not given out."""
    store = Altered()
    round_ = submitted(narrow(3), store)
    aggregate(round_, rule=ExactMean())
    assert verify(round_).slices
    store.change = change

    assert None is round_.result()
    with pytest.raises(VerificationFailed, match="header is not the one that was published"):
        verify(round_)
    with pytest.raises(ObjectExists, match="is there already"):
        aggregate(round_, rule=ExactMean())
    store.change = None
    aggregate(round_, rule=ExactMean(), overwrite=True)
    assert verify(round_).slices


def test_altered_file_is_found(tmp_path: Path) -> None:
    """A file that was altered in place, its time of change set back, is not verified, and not given out."""
    round_ = submitted(narrow(3), DirectoryStore(tmp_path))
    aggregate(round_, rule=ExactMean())
    path = tmp_path / round_.output
    before = path.stat()
    with path.open("r+b") as file:
        file.write(path.read_bytes().replace(b'"F32"', b'"U32"', 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert None is round_.result()
    with pytest.raises((VerificationFailed, UserError), match=r"header is not the one|was replaced since"):
        verify(round_)
    with pytest.raises(ObjectExists, match="is there already"):
        aggregate(round_, rule=ExactMean())


@pytest.mark.parametrize(("replaced", "kind"), [(True, ChangedObject), (False, MissingObject)])
def test_updates_are_those_that_were_sealed(replaced: bool, kind: type[Exception]) -> None:
    """An update that was replaced since, or is gone, ends it with the client's name."""
    round_ = published()
    key = round_.update_key("client-1")
    data = read(round_.store, key)
    round_.store.delete([key])
    if replaced:
        round_.store.put(key, [data[:-1] + b"\7"])

    with pytest.raises(kind, match="client client-1: "):
        verify(round_, sample=EVERYTHING)


def test_only_exact_results() -> None:
    """A float64 result cannot be verified, and a round without one neither: both are said, with what there is."""
    store = MemoryStore()
    aggregate(submitted(narrow(2), store, "plain"))
    submitted(narrow(2), store, "begun").seal()

    with pytest.raises(UserError, match=r"round plain was made by the rule mean, .* aggregate with the rule exact-mean"):
        verify(Round(store, "plain"))
    for name in ("begun", "never"):
        with pytest.raises(UserError, match=rf"round {name} has no result in .*\. Rounds that are done: plain$"):
            verify(Round(store, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**32))
def test_mean_of_floats(kind: str, dtype: str, clients: int, length: int, seed: int) -> None:
    """The mean by integers has the bits that rational numbers give."""
    terms = draw(kind, dtype, clients, length, seed)
    columns = [bits(dtype, values).astype(FORMATS[dtype].bits).tolist() for values, _ in terms]

    assert expected(dtype, terms) == mean(dtype, columns, [weight for _, weight in terms])


@pytest.mark.parametrize(
    ("dtype", "elements", "wanted"),
    [
        ("F32", [0x7F800000, 0x3F800000], 0x7F800000),
        ("F32", [0x7F800000, 0xFF800000], 0x7FC00000),
        ("BF16", [0xFF80, 0xFF80], 0xFF80),
        ("BF16", [0xFFC1, 0x3F80], 0x7FC0),
        ("F16", [0x7C00, 0x7E01], 0x7E00),
        ("F32", [0x80000000, 0x80000000], 0),
        ("F32", [0x80000001, 0], 0x80000000),
        ("I8", [-1, -2], -2),
        ("BOOL", [True, False], 0),
        ("U64", [(1 << 64) - 1, (1 << 64) - 1], (1 << 64) - 1),
    ],
)
def test_mean_of_specials(dtype: str, elements: list[int], wanted: int) -> None:
    """Infinities, NaN, zeros of both signs, ties, and the widest integers."""
    assert [wanted] == mean(dtype, [[element] for element in elements], [1, 1])
