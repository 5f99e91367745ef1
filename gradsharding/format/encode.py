"""Named arrays are encoded as one safetensors object, in buffers; bytes are copied only where they must change."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradsharding.errors import InvalidUpdate, quoted
from gradsharding.format.dtypes import ITEM_SIZE, NUMPY, Buffer
from gradsharding.format.header import unsupported
from gradsharding.format.layout import Layout

_DTYPES = {np.dtype(text): name for name, text in NUMPY.items() if name != "BF16"}


class Raw(NamedTuple):
    """An array given as its bytes (C order, little-endian), for dtypes that numpy lacks."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


def encode(arrays: Mapping[str, "npt.NDArray[Any] | Raw"]) -> tuple[Layout, list[Buffer]]:
    """Encode named arrays as one safetensors object; return its layout and its buffers in order, without a copy where possible.

    Raise InvalidUpdate for a dtype that is not supported (complex, strings, objects).
    """
    raws = {name: _raw(name, array) for name, array in arrays.items()}
    layout = Layout.of({name: (raw.dtype, raw.shape) for name, raw in raws.items()})
    return layout, [layout.header(), *(raws[t.name].data for t in layout.tensors if t.stop > t.start)]


def _raw(name: str, array: "npt.NDArray[Any] | Raw") -> Raw:
    if isinstance(array, Raw):
        if math.prod(array.shape) * ITEM_SIZE.get(array.dtype, 0) != memoryview(array.data).nbytes:
            raise InvalidUpdate(
                f"tensor {quoted(name)}: {memoryview(array.data).nbytes} bytes are not {quoted(array.dtype)} of shape {quoted(array.shape)}"
            )
        return array
    little = np.asarray(array)
    little = little.astype(little.dtype.newbyteorder("<"), copy=False)
    if little.dtype not in _DTYPES:
        raise unsupported(name, little.dtype)
    flat = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    return Raw(_DTYPES[little.dtype], little.shape, flat.data)
