"""A layout reads every honest header, and no other."""

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gradsharding.errors import InvalidUpdate, LayoutMismatch
from gradsharding.layout import MAX_HEADER, Layout, Run, Tensor, header_length, join_runs

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
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":%s}' % (b"1" * 5_000), "is not JSON"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "half a surrogate pair"),
        (b"[]", "is not a JSON object"),
        (b'{"a":1,"a":2}', "names 'a' twice"),
        (b'{"b":{"dtype":"F32","dtype":"F64"}}', "names 'dtype' twice"),
        ({"__metadata__": 1}, "__metadata__ is not a map of strings"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is not a map of strings"),
        ({"a": None}, "tensor 'a' has a malformed header entry"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "malformed"),
        ({"a": entry(more=1)}, "malformed"),
        ({"a": entry(dtype=32)}, "malformed"),
        ({"a": entry(shape=2)}, "malformed"),
        ({"a": entry(shape=[2.0])}, "malformed"),
        ({"a": entry(shape=[True, 2])}, "malformed"),
        ({"a": entry(shape=[-1, -2])}, "malformed"),
        ({"a": entry(shape=[1 << 63])}, "malformed"),
        ({"a": entry(offsets=[0, 8, 16])}, "malformed"),
        ({"a": entry(offsets=[-8, 0])}, "malformed"),
        ({"a": entry(dtype="F8_E4M3")}, "dtype F8_E4M3; supported are F64, F32"),
        ({"a": entry(shape=[3])}, r"F32 of shape \[3\], needs 12 bytes but its offsets \[0, 8\] hold 8"),
        ({"a": entry(offsets=[8, 0])}, "hold -8"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, "needs 850705917302346158658436518579420528"),
        ({"a": entry(offsets=[8, 16])}, "tensor 'a' starts at byte 8, where byte 0 is due: tensors leave a gap"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "tensor 'b' starts at byte 4, where byte 8 is due: tensors overlap"),
        ({}, "describes 0 bytes of data but the object holds 8"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, "describes 16 bytes of data but the object holds 8"),
    ],
)
def test_parse_refuses(header: Any, says: str) -> None:
    """A header that is malformed, or does not describe its data, raises InvalidUpdate, which says what is wrong."""
    with pytest.raises(InvalidUpdate, match=says):
        Layout.parse(header if isinstance(header, bytes) else json.dumps(header).encode(), 8)


@pytest.mark.parametrize(
    ("prefix", "size", "says"),
    [
        (b"\2\0\0", 3, "has 3 bytes and a safetensors object at least 8"),
        (b"\3\0\0\0\0\0\0\0{}", 10, "claims 3 bytes but the object has 10"),
        (b"\xff" * 8, 1 << 40, f"claims 18446744073709551615 bytes and at most {MAX_HEADER} are read"),
    ],
)
def test_header_length_refuses(prefix: bytes, size: int, says: str) -> None:
    """A length that cannot be true raises InvalidUpdate before anything is read."""
    with pytest.raises(InvalidUpdate, match=says):
        header_length(prefix, size)


def test_validates() -> None:
    """A record that holds a layout cannot hold one whose tensors overlap, or bear one name."""
    tensor = {"name": "a", "dtype": "F32", "shape": [2], "start": 0, "stop": 8}
    assert 8 == Layout.model_validate_json(json.dumps({"tensors": [tensor]})).nbytes

    for other, says in (tensor | {"name": "b"}, "overlap"), (tensor | {"start": 8, "stop": 16}, "occurs twice"):
        with pytest.raises(ValueError, match=says):
            Layout.model_validate_json(json.dumps({"tensors": [tensor, other]}))


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


def test_hostile_shape() -> None:
    """A shape of very many or very large extents is refused with a short message, at once."""
    for shape in ([2**62] * 64, [2] * 65, [1] * 100_000):
        header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        with pytest.raises(InvalidUpdate, match="'w'") as caught:
            Layout.parse(header, 4)
        assert len(str(caught.value)) < 5_000
