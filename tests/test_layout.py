"""A layout reads every honest header, and no other."""

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gradsharding.errors import InvalidUpdate, LayoutMismatch
from gradsharding.format.dtypes import Run, join_runs
from gradsharding.format.layout import MAX_HEADER, Layout, Tensor, header_length
from gradsharding.value import Value

TWO = Layout.of({"w": ("F32", (2, 3)), "steps": ("I64", ())})


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    """Make one header entry, of 8 bytes unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_header() -> None:
    """A header is its length, then JSON in the order of the bytes, padded with spaces to 8 bytes."""
    text = b'{"steps":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'

    assert 113 == len(text)
    assert b"\x78\0\0\0\0\0\0\0" + text + b" " * 7 == TWO.header()
    assert b"\10\0\0\0\0\0\0\0{}      " == Layout.of({}).header()


def test_parse_own_header() -> None:
    """What a layout writes, it reads."""
    assert TWO == Layout.parse(TWO.header()[8:], 32)


def test_parse_foreign_header() -> None:
    """What the safetensors library writes, with metadata, is read; the order of the JSON does not matter."""
    data = safetensors.numpy.save({"b": np.zeros((2, 3), "f4"), "a": np.zeros(3, "f2")}, {"format": "np"})
    base = 8 + header_length(data, len(data))
    entries = json.loads(data[8:base])
    backwards = json.dumps(dict(reversed(entries.items()))).encode()

    expected = [Tensor(name="b", dtype="F32", shape=(2, 3), start=0, stop=24), Tensor(name="a", dtype="F16", shape=(3,), start=24, stop=30)]
    assert expected == list(Layout.parse(data[8:base], 30).tensors)
    assert expected == list(Layout.parse(backwards, 30).tensors)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"", "is not a JSON object"),
        (b"\xff", "its bytes are not UTF-8"),
        (b"{", "is not JSON at byte 1"),
        (b"[" * 100_000, "is not a JSON object"),
        (b'{"a":%s}' % (b"[" * 100_000), "malformed"),
        (b'{"a":{"b":%s}}' % (b"[" * 100_000), "is not JSON at byte 136 .more than 127 levels deep"),
        (b'{"a":%s}' % (b"1" * 5_000), "malformed"),
        (b'{"a":{"b":%s}}' % (b"1" * 5_000), "is not JSON at byte 5010 .a number is out of range"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "is not JSON at byte 1"),
        (b"[]", "is not a JSON object"),
        (b'{"b":{"dtype":"F32","dtype":"F64"}}', "tensor 'b' has a malformed header entry"),
        ({"__metadata__": 1}, "__metadata__ is not one map of strings"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is not one map of strings"),
        ({"__metadata__": entry()}, "__metadata__ is not one map of strings"),
        (b'{"__metadata__":null,"__metadata__":null}', "__metadata__ is not one map of strings"),
        ({"a": None}, "tensor 'a' has a malformed header entry"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "malformed"),
        ({"a": entry(dtype=32)}, "malformed"),
        ({"a": entry(shape=2)}, "malformed"),
        ({"a": entry(shape=[2.0])}, "malformed"),
        ({"a": entry(shape=[True, 2])}, "malformed"),
        ({"a": entry(shape=[-1, -2])}, "malformed"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', "malformed"),
        ({"a": entry(shape=[0, 1 << 64])}, "malformed"),
        ({"a": entry(offsets=[0, 8, 16])}, "malformed"),
        ({"a": entry(offsets=[-8, 0])}, "malformed"),
        ({"a": entry(dtype="F8_E4M3")}, "dtype 'F8_E4M3'; supported are F64, F32"),
        ({"a": entry(shape=[3])}, r"F32 of shape \[3\], needs 12 bytes but its offsets \[0, 8\] hold 8"),
        ({"a": entry(offsets=[8, 0])}, "hold -8"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, "is too large"),
        ({"a": entry(shape=[1 << 62, 4, 0], offsets=[0, 0]), "b": entry()}, "is too large"),
        ({"a": entry(offsets=[8, 16])}, "tensor 'a' starts at byte 8 instead of byte 0: tensors leave a gap"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "tensor 'b' starts at byte 4 instead of byte 8: tensors overlap"),
        ({}, "describes 0 bytes of data but the object holds 8"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, "describes 16 bytes of data but the object holds 8"),
    ],
)
def test_parse_refuses(header: Any, says: str) -> None:
    """A header that is malformed, or does not describe its data, raises InvalidUpdate, which says what is wrong."""
    with pytest.raises(InvalidUpdate, match=says):
        Layout.parse(header if isinstance(header, bytes) else json.dumps(header).encode(), 8)


def test_equal_headers_share_a_layout() -> None:
    """While a layout is in use, the same header gives the same one, and so does one that differs in its metadata alone."""
    header = TWO.header()[8:]
    first = Layout.parse(header, 32)

    assert first is Layout.parse(header, 32)
    assert first is Layout.parse(header.replace(b"{", b'{"__metadata__":{"by":"zoe"},', 1), 32)
    with pytest.raises(InvalidUpdate, match="is not a JSON object"):
        Layout.parse(TWO.header(), 32)


def test_unused_layouts_are_forgotten() -> None:
    """A layout that nobody uses takes no memory."""
    kept = weakref.ref(Layout.parse(Layout.of({"only here": ("U8", (3,))}).header()[8:], 3))
    gc.collect()

    assert None is kept()


def test_equal_headers_from_threads() -> None:
    """Threads that read equal headers at once get one layout."""
    header = Layout.of({f"w{i}": ("F32", (i,)) for i in range(2_000)}).header()[8:]
    with ThreadPoolExecutor(16) as pool:
        layouts = [*pool.map(Layout.parse, [header] * 64)]

    assert 1 == len({id(layout) for layout in layouts})


@pytest.mark.parametrize(
    ("prefix", "size", "says"),
    [
        (b"\2\0\0", 3, "has 3 bytes and a safetensors object has at least 8"),
        (b"\3\0\0\0\0\0\0\0{}", 10, "claims 3 bytes but the object has 10"),
        (b"\xff" * 8, 1 << 40, f"claims 18446744073709551615 bytes and at most {MAX_HEADER} are read"),
    ],
)
def test_header_length_refuses(prefix: bytes, size: int, says: str) -> None:
    """A length that cannot be true raises InvalidUpdate before anything is read."""
    with pytest.raises(InvalidUpdate, match=says):
        header_length(prefix, size)


def test_record() -> None:
    """In a record a layout is the text of its header, and one whose tensors overlap is refused."""

    class Record(Value):
        layout: Layout

    text = Record(layout=TWO).model_dump_json()
    assert json.loads(TWO.header()[8:]) == json.loads(json.loads(text)["layout"])
    assert TWO == Record.model_validate_json(text).layout
    with pytest.raises(ValueError, match="overlap"):
        Record.model_validate_json(text.replace("[8,32]", "[0,24]"))


def test_runs() -> None:
    """Neighbours of one dtype are one run, whatever their shapes; tensors of no elements are none."""
    layout = Layout.of({"a": ("F32", (2, 3)), "b": ("F32", ()), "c": ("I32", (0,)), "d": ("F32", (5,)), "e": ("U8", (2,))})

    assert (Run("F32", 12), Run("U8", 2)) == layout.runs
    assert (14, 50) == (layout.elements, layout.nbytes)
    assert () == join_runs([Run("F32", 0)])


def test_digest() -> None:
    """Layouts have one digest if they are equal, and only then."""
    same = Layout.of({"steps": ("I64", ()), "w": ("F32", (2, 3))})
    other = Layout.of({"steps": ("I64", ()), "w": ("F32", (3, 2))})

    assert TWO.digest == same.digest
    assert TWO.digest != other.digest


@pytest.mark.parametrize(("byte", "expected"), [(0, ("steps", ())), (7, ("steps", ())), (8, ("w", (0, 0))), (31, ("w", (1, 2)))])
def test_locate(byte: int, expected: tuple[str, tuple[int, ...]]) -> None:
    """A byte lies in one tensor, at one index."""
    tensor, index = TWO.locate(byte)

    assert expected == (tensor.name, index)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"steps": ("I64", ())}, r"tensor 'w' is F32\[2, 3\] at bytes 8 to 32 in ann but absent in bob"),
        ({"steps": ("I64", ()), "w": ("F32", (3, 2))}, r"tensor 'w' is F32\[2, 3\] .* in ann but F32\[3, 2\] .* in bob"),
        (
            {"steps": ("I64", ()), "w": ("F32", (2, 3)), "x": ("U8", (1,))},
            r"tensor 'x' is absent in ann but U8\[1\] at bytes 32 to 33 in bob",
        ),
    ],
)
def test_require_same(other: dict[str, tuple[str, tuple[int, ...]]], says: str) -> None:
    """Layouts that differ raise LayoutMismatch, which names the tensor and says what it is on either side."""
    TWO.require_same(TWO, "ann", "bob")
    with pytest.raises(LayoutMismatch, match=says):
        TWO.require_same(Layout.of(other), "ann", "bob")


def test_mismatch_names_the_cause() -> None:
    """Of tensors that differ, the one of another shape is named, not those that it moved."""
    ann, bob = (Layout.of({"a": ("F32", (2,)), "z": ("F64", (length,))}) for length in (1, 2))

    with pytest.raises(LayoutMismatch, match=r"tensor 'z' is F64\[1\]") as caught:
        ann.require_same(bob, "ann", "bob")
    assert {"tensor": "z"} == caught.value.details


@pytest.mark.parametrize("shape", [[2**62] * 64, [2] * 65, [0, 2**64], [3] + [1] * 100_000])
def test_hostile_shape(shape: list[int]) -> None:
    """A shape of very many or very large extents that does not fit is refused with a short message, at once."""
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    with pytest.raises(InvalidUpdate, match="'w'") as caught:
        Layout.parse(header, 4)

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("dtype", ["F32\nERROR: node 7 is compromised", "\x1b[2J", "\u202efdp", "X" * 5_000_000])
@pytest.mark.parametrize("name", ["w", "w\nWARNING: all is well", "w" * 5_000_000])
def test_foreign_text(dtype: str, name: str) -> None:
    """What a header says comes into a message in quotes, on one line, and cut short."""
    with pytest.raises(InvalidUpdate) as caught:
        Layout.parse(json.dumps({name: entry(dtype=dtype)}).encode(), 8)

    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
