"""The weighted mean by plain numpy, and sample updates. It shares no arithmetic with the engine."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from gradsharding.format.encode import Raw

Array = npt.NDArray[Any]
Arrays = dict[str, Array | Raw]
Updates = Mapping[str, tuple[Mapping[str, Array | Raw], float]]
"""Arrays and weight of each client."""

_FLOATS = {"F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}
"""Bits of the significand and smallest exponent of each float narrower than float64 (IEEE 754; bfloat16 alike)."""


def reference_mean(updates: Updates) -> dict[str, Array]:
    """Compute the weighted mean, each tensor whole, clients in the order of their ids.

    Floats are summed in float64 and rounded once; integers and bools are averaged exactly, ties to even. BF16, given
    as Raw, comes back as the equal float32.
    """
    clients = sorted(updates)
    weights = [updates[client][1] for client in clients]
    return {name: _mean([updates[client][0][name] for client in clients], weights) for name in updates[clients[0]][0]}


def sample_updates(clients: int = 3, *, size: int = 7, seed: int = 0) -> dict[str, tuple[Arrays, int]]:
    """Draw updates with ``size`` elements of every dtype, a scalar tensor and two empty ones; the weights count up from 1."""
    draw = np.random.default_rng(seed)

    def update() -> Arrays:
        arrays: Arrays = {t: draw.normal(size=size).astype(t) for t in ("float64", "float32", "float16")}
        for t in ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"):
            arrays[t] = draw.integers(np.iinfo(t).min, np.iinfo(t).max, size, t, endpoint=True)
        arrays["bool"] = draw.integers(0, 2, size).astype(bool)
        arrays["bfloat16"] = Raw("BF16", (size,), (draw.normal(size=size).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())
        arrays["scalar"], arrays["empty"], arrays["none"] = np.array(draw.normal(), "f4"), np.zeros((0, 3), "f4"), np.zeros((2, 0), "i8")
        return arrays

    return {f"client-{i}": (update(), i + 1) for i in range(clients)}


def _mean(arrays: Sequence[Array | Raw], weights: Sequence[float]) -> Array:
    first = arrays[0]
    if isinstance(first, Raw):
        wide = [(np.frombuffer(a.data, "<u2").astype("<u4") << 16).view("<f4").reshape(a.shape) for a in arrays if isinstance(a, Raw)]
        return _round(_mean_of_floats(wide, weights), *_FLOATS["BF16"]).astype("f4")
    plain = [np.asarray(a) for a in arrays]
    if first.dtype.kind != "f":
        return _mean_of_integers(plain, weights)
    mean = _mean_of_floats(plain, weights)
    return mean if first.dtype.itemsize == 8 else _round(mean, *_FLOATS[f"F{8 * first.dtype.itemsize}"]).astype(first.dtype)


def _mean_of_floats(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros(arrays[0].shape, np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += np.float64(weight) * array.astype(np.float64)
    return np.asarray(total / np.float64(sum(weights)))


def _mean_of_integers(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    elements = zip(*(array.reshape(-1).tolist() for array in arrays), strict=True)
    means = [round(sum(share * x for share, x in zip(shares, xs, strict=True))) for xs in elements]
    return np.array(means, arrays[0].dtype).reshape(arrays[0].shape)


def _round(values: Array, bits: int, least: int) -> Array:
    """Round float64 to ``bits`` of significand, ties to even, and to multiples of the smallest subnormal."""
    exponent = np.maximum(np.frexp(values)[1] - 1, least)
    return np.asarray(np.ldexp(np.rint(np.ldexp(values, bits - 1 - exponent)), exponent - bits + 1))


def round_float(values: Array, dtype: str) -> Array:
    """Round float64 once to the values of a narrower float dtype, ties to even; they stay float64."""
    return _round(values, *_FLOATS[dtype])


def assert_same(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> None:
    """Assert that arrays have equal names, dtypes, shapes and bits."""
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        assert (name, array.dtype, array.shape) == (name, actual[name].dtype, actual[name].shape)
        assert (name, array.tobytes()) == (name, actual[name].tobytes())
