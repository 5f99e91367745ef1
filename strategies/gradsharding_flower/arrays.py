"""An array is the same bytes in Flower and in safetensors, behind another header: converting computes nothing."""

import math
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord

from gradsharding import Raw
from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY

if TYPE_CHECKING:
    import torch

NPY = "numpy.ndarray"
"""Flower's own serialization type: the bytes of an .npy file."""

RAW = "gradsharding.raw.v1"
"""Our serialization type, for dtypes that numpy lacks: the plain bytes, little-endian, in C order."""

MAX_DIMS = 64
"""The most dimensions that an array may have; numpy's own limit."""

_NAMES = {np.dtype(text): name for name, text in NUMPY.items() if name != "BF16"}


def to_raw(name: str, array: Array) -> Raw:
    """View a Flower array as bytes; copy only what is big-endian or in Fortran order. Raise InvalidUpdate for a malformed array."""
    if array.stype == RAW:
        _check(name, array.dtype, array.shape, len(array.data))
        return Raw(array.dtype, tuple(array.shape), array.data)
    if array.stype != NPY:
        raise InvalidUpdate(f"tensor {name!r} is serialized as {array.stype[:80]!r}; send numpy arrays, or from_state_dict()'s")
    stream = BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # noqa: BLE001 - numpy's parser raises errors of many kinds
        raise InvalidUpdate(f"tensor {name!r} is not an .npy array ({type(error).__name__}); send numpy arrays") from None
    little = dtype.newbyteorder("<")
    if dtype.hasobject or little not in _NAMES:
        raise InvalidUpdate(f"tensor {name!r} has dtype {str(dtype)[:80]}; supported are {', '.join(NUMPY)}")
    data = memoryview(array.data)[stream.tell() :]
    _check(name, _NAMES[little], shape, len(data))
    if data and (fortran or dtype != little):
        loaded = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        data = np.ascontiguousarray(loaded, little).reshape(-1).view(np.uint8).data
    return Raw(_NAMES[little], shape, data)


def _check(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    """Raise InvalidUpdate unless an array of this dtype and shape takes ``nbytes``; extents are bounded before they are multiplied."""
    if dtype not in ITEM_SIZE:
        raise InvalidUpdate(f"tensor {name!r} has dtype {dtype[:80]!r}; supported are {', '.join(ITEM_SIZE)}")
    if len(shape) > MAX_DIMS or not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in shape):
        raise InvalidUpdate(f"tensor {name!r} has {len(shape)} extents; send at most {MAX_DIMS}, each an integer from 0 to 2**63 - 1")
    needed = math.prod(shape) * ITEM_SIZE[dtype]
    if nbytes != needed:
        expected = str(needed) if needed < 1 << 63 else "more than 2**63"
        raise InvalidUpdate(f"tensor {name!r} has {nbytes} bytes, but {dtype}{list(shape)[:8]} needs {expected}; send it again")


def from_raw(raw: Raw) -> Array:
    """Make a Flower array: an .npy file if numpy has the dtype, plain bytes otherwise."""
    if raw.dtype == "BF16":
        return Array(raw.dtype, raw.shape, RAW, bytes(raw.data))
    dtype, stream = np.dtype(NUMPY[raw.dtype]), BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": raw.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return Array(str(dtype), raw.shape, NPY, b"".join((stream.getvalue(), raw.data)))


def to_record(raws: Mapping[str, Raw], names: Iterable[str] | None = None) -> ArrayRecord:
    """Make an ArrayRecord, in the order of ``names``."""
    return ArrayRecord({name: from_raw(raws[name]) for name in names or raws})


def from_state_dict(state: "Mapping[str, torch.Tensor]") -> ArrayRecord:
    """Make an ArrayRecord of a torch ``state_dict``. It may hold bfloat16 tensors, which Flower itself cannot serialize."""
    import torch  # noqa: PLC0415 - not every federation has it installed

    arrays = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.dtype == torch.bfloat16:
            arrays[name] = from_raw(Raw("BF16", tuple(plain.shape), plain.view(torch.int16).numpy().tobytes()))
        else:
            arrays[name] = Array(plain.numpy())
    return ArrayRecord(arrays)


def to_state_dict(record: ArrayRecord) -> "dict[str, torch.Tensor]":
    """Make a torch ``state_dict`` of an ArrayRecord; the inverse of ``from_state_dict``."""
    import torch  # noqa: PLC0415 - as above

    state = {}
    for name, array in record.items():
        if array.stype == RAW:
            bits = torch.frombuffer(bytearray(array.data), dtype=torch.int16) if array.data else torch.empty(0, dtype=torch.int16)
            state[name] = bits.view(torch.bfloat16).reshape(array.shape)
        else:
            state[name] = torch.from_numpy(array.numpy().copy())
    return state
