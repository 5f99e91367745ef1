"""A weight is a positive number. The weights of a round become integers in the same ratio, which sum to at most 2**53."""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from gradsharding.errors import InvalidWeight, quoted

MAX_WEIGHT = 1 << 53
"""The weights of a round sum to at most this: float64 holds every integer up to here."""

_SCALE = 28
"""Non-integral weights are scaled so that the smallest has this many bits: a relative error of at most 2**-29."""


def check_weight(weight: float, client: str) -> float:
    """Return a weight as a plain number; raise InvalidWeight unless it is positive and at most 2**53."""
    number = weight.item() if isinstance(weight, np.generic) else weight
    if type(number) not in (int, float) or not 0 < number <= MAX_WEIGHT:
        raise InvalidWeight(
            f"client {client} has weight {quoted(number)}; use a positive number up to 2**53, such as its number of examples"
        )
    return number


def integral_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Return integers in the ratio of ``weights``: the weights themselves if they are whole, otherwise scaled by a power of two.

    >>> integral_weights({"a": 120, "b": 80.0}), integral_weights({"a": 0.5, "b": 1.25})
    ({'a': 120, 'b': 80}, {'a': 2, 'b': 5})
    """
    for client, weight in weights.items():
        check_weight(weight, client)
    if all(weight == int(weight) for weight in weights.values()):
        whole = {client: int(weight) for client, weight in weights.items()}
    else:
        shift = _SCALE + 1 - math.frexp(min(weights.values()))[1]
        whole = {client: round(Fraction(weight) * Fraction(2) ** shift) for client, weight in weights.items()}
        common = math.gcd(*whole.values())
        whole = {client: weight // (common & -common) for client, weight in whole.items()}
    if sum(whole.values()) > MAX_WEIGHT:
        middle = sorted(weights.values())[len(weights) // 2]
        extreme = max(weights, key=lambda client: abs(math.frexp(weights[client])[1] - math.frexp(middle)[1]))
        raise InvalidWeight(
            f"the weights sum to {sum(weights.values()):g} over {len(weights)} clients, from {min(weights.values()):g} "
            f"to {max(weights.values()):g}; as integers they pass 2**53: use whole numbers of examples",
            client=extreme,
        )
    return whole
