"""An update is one safetensors object: what we write the library reads, what it writes we read."""

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy

from gradsharding.errors import InvalidUpdate, MissingObject
from gradsharding.format.dtypes import Buffer
from gradsharding.format.encode import Raw, encode
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.updates import _Room, inspect, load, load_raw
from gradsharding.testing import CountingStore, assert_same, sample_updates

EVERY_DTYPE = sample_updates(1)["client-0"][0]


def written(arrays: Any) -> bytes:
    """Encode arrays into one piece."""
    return b"".join(encode(arrays)[1])


def stored(data: bytes) -> MemoryStore:
    """Make a store with one object, ``a``."""
    store = MemoryStore()
    store.put("a", [data])
    return store


def test_every_dtype() -> None:
    """Arrays of every dtype, also of no dimension and no elements, come back as they were."""
    store = stored(written(EVERY_DTYPE))
    bits = EVERY_DTYPE["bfloat16"]
    assert isinstance(bits, Raw)

    expected = {name: array for name, array in EVERY_DTYPE.items() if not isinstance(array, Raw)}
    widened = (np.frombuffer(bits.data, "<u2").astype("<u4") << 16).view("<f4")
    assert_same(expected | {"bfloat16": widened}, load("a", store))
    assert ("BF16", (7,), bits.data) == load_raw("a", store)["bfloat16"]


def test_the_library_reads_it() -> None:
    """The safetensors library reads the same dtypes, shapes and bytes from what we write."""
    found = dict(safetensors.deserialize(written(EVERY_DTYPE)))  # type: ignore[no-untyped-call]

    for name, raw in load_raw("a", stored(written(EVERY_DTYPE))).items():
        assert (raw.dtype, list(raw.shape), raw.data) == (found[name]["dtype"], found[name]["shape"], found[name]["data"])
    assert found.keys() == EVERY_DTYPE.keys()


def test_we_read_the_library() -> None:
    """We read what the safetensors library writes, metadata or not."""
    arrays = {name: array for name, array in EVERY_DTYPE.items() if not isinstance(array, Raw)}

    assert_same(arrays, load("a", stored(safetensors.numpy.save(arrays, {"format": "np"}))))


def test_same_bytes_as_the_library() -> None:
    """Tensors lie as the library would lay them: the widest dtype first, then by name."""
    arrays = {"b": np.ones(3, "f4"), "a": np.ones((2, 2), "f4"), "half": np.ones(5, "f2"), "n": np.ones(1, "i8"), "u": np.ones(3, "u1")}

    assert safetensors.numpy.save(arrays) == written(arrays)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12, dtype="i2")[::2].reshape(2, 3),
    ],
    ids=["big-endian", "fortran", "strided"],
)
def test_any_memory(array: npt.NDArray[Any]) -> None:
    """Arrays of any byte order and strides are written in C order, little-endian."""
    loaded = load("a", stored(written({"w": array})))["w"]

    assert array.tolist() == loaded.tolist()
    assert array.dtype.newbyteorder("<") == loaded.dtype


def test_without_a_copy() -> None:
    """Contiguous arrays are not copied to be written."""
    array = np.arange(1000.0)
    (_, data) = encode({"w": array})[1]

    assert np.shares_memory(array, np.frombuffer(data, "f8"))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(2, "c16"), "tensor 'w' has dtype 'complex128'; supported are F64"),
        (np.array(["a"]), "dtype '<U1'"),
        (np.array([{}]), "dtype 'object'"),
        (np.zeros(1, "M8[s]"), "dtype 'datetime64"),
        (Raw("BF16", (3,), b"1234"), r"tensor 'w': 4 bytes are not 'BF16' of shape \[3\]"),
        (Raw("F8_E4M3", (4,), b"1234"), r"4 bytes are not 'F8_E4M3' of shape \[4\]"),
    ],
)
def test_refuses(array: Any, says: str) -> None:
    """What safetensors, or the engine, has no dtype for raises InvalidUpdate, which names the tensor."""
    with pytest.raises(InvalidUpdate, match=says):
        encode({"w": array})


@pytest.mark.parametrize(("name", "says"), [("__metadata__", "which the format reserves"), ("\ud800", "half a surrogate pair")])
def test_refuses_a_name(name: str, says: str) -> None:
    """A name that a header cannot hold raises InvalidUpdate before anything is written."""
    with pytest.raises(InvalidUpdate, match=says):
        encode({name: np.zeros(1)})


@pytest.mark.parametrize("shape", [(0, 2**64 - 1), (1,) * 65, (0, 2**62, 2)])
def test_shapes_that_numpy_lacks(shape: tuple[int, ...]) -> None:
    """A shape that the format allows and numpy does not is read as bytes, and refused as an array."""
    store = stored(written({"w": Raw("U8", shape, bytes(math.prod(shape)))}))

    assert shape == load_raw("a", store)["w"].shape
    with pytest.raises(InvalidUpdate, match=r"tensor 'w' has shape \[.*load_raw gives its bytes"):
        load("a", store)


@pytest.mark.parametrize(("names", "gets"), [(10, 1), (3_000, 2)])
def test_inspect(names: int, gets: int) -> None:
    """A header is read by one request, or two where it is long; the data is not."""
    arrays = {f"layer.{i}.weight": np.zeros(100, "f4") for i in range(names)}
    store = CountingStore(stored(written(arrays)))
    update = inspect("a", store)

    assert encode(arrays)[0] == update.layout
    assert store.head("a") == update.stat
    assert store.head("a").size - 400 * names == update.base
    assert (gets, 2) == (store.gets, store.heads)  # the two above
    assert store.bytes_read <= max(64 << 10, update.base)


@pytest.mark.parametrize("names", [10, 3_000])
def test_largest_header(names: int) -> None:
    """A header that is longer than is allowed is refused, with both sizes, before it is read."""
    store = CountingStore(stored(written({f"layer.{i}.weight": np.zeros(1, "f4") for i in range(names)})))
    length = inspect("a", store).base - 8

    assert length + 8 == inspect("a", store, largest_header=length).base
    before = store.gets
    with pytest.raises(InvalidUpdate, match=f"^a: the header claims {length} bytes and at most {length - 1} are read"):
        inspect("a", store, largest_header=length - 1)
    assert 1 == store.gets - before


def test_long_headers_from_threads() -> None:
    """Threads share what long headers may take together: all are read, also one that is longer than that by itself."""
    room, most, now, lock = _Room(10), 0, 0, threading.Lock()

    def take(nbytes: int) -> None:
        nonlocal most, now
        with room.room(nbytes):
            with lock:
                now += min(nbytes, 10)
                most = max(most, now)
            time.sleep(0.001)
            with lock:
                now -= min(nbytes, 10)

    with ThreadPoolExecutor(8) as pool:
        assert 40 == len([*pool.map(take, [4, 1, 99, 6] * 10)])
    assert (10, 0) == (most, now)


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1])
def test_cut_short(keep: int) -> None:
    """An object that was cut short anywhere raises InvalidUpdate, which names it."""
    data = written({"w": np.ones(9, "f4")})

    with pytest.raises(InvalidUpdate, match=r"^a: .*(cut short|not JSON)"):
        inspect("a", stored(data[:keep]))


def test_missing() -> None:
    """An object that is not there raises MissingObject."""
    with pytest.raises(MissingObject, match="'b'"):
        inspect("b", MemoryStore())


class Lossy(MemoryStore):
    """A store whose long reads end a byte early, without a word."""

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Give all bytes but the last."""
        return super().get(key, start, stop - (start > 0), version=version)


def test_a_read_that_ends_early() -> None:
    """A read that ends early, though the object did not, raises InvalidUpdate rather than give zeros."""
    store = Lossy()
    store.put("a", encode({"w": np.ones(20_000, "f4"), "v": np.ones(2, "f2")})[1])

    with pytest.raises(InvalidUpdate, match="a: the data ended early"):
        load("a", store)
