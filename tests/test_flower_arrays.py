"""Flower's arrays, safetensors' bytes and torch's tensors are the same numbers, whatever dtype, shape and order in memory."""

import contextlib
import struct
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flower_federation import client, grid_of, record, sharding, state_of
from gradsharding import MemoryStore
from gradsharding.errors import InvalidUpdate
from gradsharding.testing import assert_same
from gradsharding_flower import from_state_dict, to_state_dict, upload_mod
from gradsharding_flower.arrays import NPY, RAW, from_raw, to_raw, to_record
from gradsharding_flower.reference import write_arrays

DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
arrays = hnp.arrays(
    st.sampled_from(DTYPES).flatmap(lambda text: st.sampled_from([np.dtype("<" + text), np.dtype(">" + text)])),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
orders = st.sampled_from(["C", "F"])


def npy(array: npt.NDArray[Any]) -> Array:
    """Make Flower's array of any numpy array as it lies in memory; Flower's own constructor would do as much."""
    stream = BytesIO()
    np.save(stream, array)
    return Array(str(array.dtype), array.shape, NPY, stream.getvalue())


@given(arrays, orders)
def test_array_to_raw_and_back(array: npt.NDArray[Any], order: Any) -> None:
    """Any array, big-endian or in Fortran order, becomes little-endian bytes in C order, and the same numbers again."""
    given_ = np.array(array, order=order)
    raw = to_raw("x", npy(given_))
    assert given_.astype(given_.dtype.newbyteorder("<")).tobytes("C") == bytes(raw.data)
    back = from_raw(raw)
    assert (NPY, given_.shape, given_.dtype.newbyteorder("=").name) == (back.stype, tuple(back.shape), back.dtype)
    loaded = back.numpy()
    assert given_.dtype.newbyteorder("<") == loaded.dtype
    assert given_.astype(loaded.dtype).tobytes() == loaded.tobytes()  # NaN equals itself here
    assert raw == to_raw("x", back)._replace(data=raw.data)


@given(st.dictionaries(st.text("abcxyz.01", min_size=1, max_size=5), arrays, max_size=5), st.randoms())
def test_model_through_the_store(state: Mapping[str, npt.NDArray[Any]], random: Any) -> None:
    """A model comes out of the store as it went in: names in their order, dtypes, shapes, bits."""
    names = list(state)
    random.shuffle(names)
    store = MemoryStore()
    reference = write_arrays("model.safetensors", ArrayRecord({name: npy(state[name]) for name in names}), store)
    loaded = reference.load(store)
    assert names == list(loaded)
    little = {name: np.asarray(state[name]).astype(state[name].dtype.newbyteorder("<")) for name in names}
    assert_same(little, state_of(loaded))
    assert sum(array.nbytes for array in state.values()) == reference.nbytes


def test_no_copy_of_plain_bytes() -> None:
    """Little-endian bytes in C order are viewed where they are."""
    array = npy(np.arange(1000, dtype=np.float32))
    assert memoryview(array.data).obj is memoryview(to_raw("x", array).data).obj


HEADER = "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}"


def forged(descr: str, fortran: bool, shape: str, data: bytes) -> bytes:
    """Make an .npy file whose header says what it likes."""
    header = HEADER.format(descr, fortran, shape).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


BROKEN = {
    "nothing": b"",
    "magic only": b"\x93NUMPY\x01\x00",
    "no header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 10) + b"((((((((((",
    "unknown dtype": forged("'<f3'", False, "(1,)", b"123"),
    "object": forged("'|O'", False, "(1,)", b"12345678"),
    "text": forged("'<U2'", False, "(1,)", b"12345678"),
    "complex": forged("'<c8'", False, "(1,)", b"12345678"),
    "structure": forged("[('a', '<f4')]", False, "(1,)", b"1234"),
    "too short": forged("'<f4'", False, "(2,)", b"1234567"),
    "too short in Fortran order": forged("'<f4'", True, "(2, 2)", b"1234567"),
    "too short, big-endian": forged("'>f4'", False, "(2, 2)", b"1234567"),
    "too long": forged("'<f4'", False, "()", b"12345"),
    "negative extents": forged("'<f4'", True, "(-1, -1)", b"1234"),
    "an extent of 2**63": forged("'>f4'", False, "(9223372036854775808, 0)", b""),
    "an extent that is true": forged("'<f4'", True, "(True,)", b"1234"),
    "65 dimensions, Fortran order": forged("'<f4'", True, f"({'1,' * 65})", b"1234"),
    "65 dimensions, big-endian": forged("'>f4'", False, f"({'1,' * 65})", b"1234"),
    "a product of 4,401 digits": forged("'<f4'", False, f"({10**2200}, {10**2200})", b"1234"),
    "nested parentheses": forged("'<f4'", False, "(" * 900 + ")" * 900, b"1234"),
    "one negative extent": forged("'<f4'", False, "(-1,)", b""),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_npy_is_refused(data: bytes) -> None:
    """What is no array of a supported dtype is InvalidUpdate, which names the tensor."""
    with pytest.raises(InvalidUpdate, match="tensor 'w'"):
        to_raw("w", Array("float32", (1,), NPY, data))


@given(st.binary(max_size=40), st.integers(0, 140), arrays, orders)
def test_mangled_npy_never_fails_otherwise(noise: bytes, place: int, array: npt.NDArray[Any], order: Any) -> None:
    """Bytes overwritten anywhere in an .npy file are read, or refused with InvalidUpdate; the server sees no other error."""
    data = bytearray(npy(np.array(array, order=order)).data)
    data[place : place + len(noise)] = noise
    with contextlib.suppress(InvalidUpdate):
        raw = to_raw("w", Array("float32", (1,), NPY, bytes(data)))
        assert len(raw.data) == write_arrays("key", to_record({"w": raw}), MemoryStore()).nbytes


@pytest.mark.parametrize("data", [BROKEN["no header"], BROKEN["too short in Fortran order"]])
def test_broken_npy_in_relay_mode(data: bytes, flower_log: pytest.LogCaptureFixture) -> None:
    """A client whose arrays the server cannot read is left out; the server lives."""

    def broken(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
        content = {"arrays": ArrayRecord({"w": Array("float32", (1,), NPY, data)}), "metrics": MetricRecord({"num-examples": 1})}
        return RecordDict(content)  # type: ignore[arg-type]

    start = {"w": np.zeros(3, np.float32)}
    strategy = sharding(MemoryStore(), mode="relay")
    strategy.start(grid_of({3: client(broken, mods=[])}, mods=[]), record(start), num_rounds=1)
    assert {3} == set(strategy.history[0].left_out)
    assert "tensor 'w'" in strategy.history[0].left_out[3]
    assert "node 3 is left out" in flower_log.text


def test_other_serializations_are_refused() -> None:
    """An array of a serialization that is not known is named."""
    with pytest.raises(InvalidUpdate, match="tensor 'w' is serialized as 'pickle'"):
        to_raw("w", Array("float32", (1,), "pickle", b"1234"))


def test_state_dict_and_back() -> None:
    """Tensors of every kind come back as they were: bfloat16, no dimension, no element, integers, not contiguous."""
    state = {
        "half": torch.tensor([[1.5, -2.25], [3e38, 1e-40]], dtype=torch.bfloat16).T,
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "steps": torch.tensor(2**62 + 1),
        "flags": torch.tensor([True, False]),
        "small": torch.tensor([1, -1], dtype=torch.int8),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "sixteen": torch.tensor([0.1], dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)[:, 0]),
    }
    arrays_ = from_state_dict(state)
    assert {"half": RAW, "scalar": RAW, "empty": RAW} == {name: a.stype for name, a in arrays_.items() if a.stype != NPY}
    back = to_state_dict(arrays_)
    assert list(state) == list(back)
    for name, tensor in state.items():
        assert (name, tensor.dtype, tensor.shape) == (name, back[name].dtype, back[name].shape)
        assert torch.equal(tensor.detach(), back[name])
    for name in ("half", "sixteen"):  # tensors may be written to, and share nothing with what they came from
        back[name].add_(1)
        assert torch.equal(state[name], to_state_dict(arrays_)[name])


@pytest.mark.parametrize("mode", ["direct", "relay"])
def test_bfloat16_federation(mode: Any) -> None:
    """A bfloat16 model goes through a federation; each number is the float64 mean, rounded once."""
    draw = torch.Generator().manual_seed(5)
    start = {
        "w": torch.zeros(5, 7, dtype=torch.bfloat16),
        "scale": torch.tensor(1.0, dtype=torch.bfloat16),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "n": torch.tensor(4),
        "a": torch.zeros(3),
    }
    answers: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def train(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
        state = to_state_dict(arrays)
        assert {name: tensor.dtype for name, tensor in start.items()} == {name: tensor.dtype for name, tensor in state.items()}
        for name, tensor in state.items():
            state[name] = tensor + node if name == "n" else tensor + torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        answers[server_round, node] = state
        return RecordDict({"arrays": from_state_dict(state), "metrics": MetricRecord({"num-examples": node})})

    nodes = (1, 3, 12)
    app = client(train, [upload_mod] if mode == "direct" else [])
    result = sharding(MemoryStore(), FedAvg(fraction_evaluate=0.0), mode=mode).start(
        grid_of(dict.fromkeys(nodes, app), nodes=()), from_state_dict(start), num_rounds=2
    )
    reached = to_state_dict(result.arrays)
    assert list(start) == list(reached)
    for name in ("w", "scale", "a"):
        total = torch.zeros(start[name].shape, dtype=torch.float64)
        for node in nodes:
            total += node * answers[2, node][name].double()
        assert torch.equal(nearest(total / 16, start[name].dtype), reached[name])
    assert torch.equal(start["empty"], reached["empty"])
    assert torch.equal(torch.tensor(24), reached["n"])  # each round adds (1 + 9 + 144) / 16 = 9.625 and rounds: 4, 14, 24


def nearest(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 once, to the nearer of two neighbours; torch itself rounds to float32 first."""
    low = wide.to(dtype)
    best = low
    for direction in (float("-inf"), float("inf")):
        other = torch.nextafter(low, torch.full_like(low, direction))
        nearer = (other.double() - wide).abs() < (best.double() - wide).abs()
        best = torch.where(nearer, other, best)
    return best
