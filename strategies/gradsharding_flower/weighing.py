"""The weights of a round must sum to at most 2**53 as integers: the largest group of nodes whose weights do is kept.

Only the weights decide, never whose they are: equal weights stay or go together, and of two groups of one size the lighter is kept. A node
that claims 2**53 is left out, whoever else is there; so is one that claims 1e-12 among hundreds.
"""

import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

from gradsharding.arithmetic.weights import MAX_WEIGHT, integral_weights
from gradsharding.errors import InvalidWeight

_BITS = 29
"""Non-integral weights are scaled so that the smallest has this many bits (``gradsharding.arithmetic.weights``)."""


def incompatible_weights(weights: Mapping[int, float]) -> dict[int, str]:
    """Find the nodes whose weights are too far from those of the largest group, and say why; empty if all fit together.

    >>> list(incompatible_weights({1: 100, 2: 2**53})), list(incompatible_weights({1: 1.5, 2: 1e-12, 3: 1.5}))
    ([2], [2])
    >>> incompatible_weights({1: 100, 2: 0.5})
    {}
    """
    if _all_fit(weights):
        return {}
    counts = Counter(weights.values())
    low, high = _largest([(amount, counts[amount]) for amount in sorted(counts)])
    kept = sum(low <= weight <= high for weight in weights.values())
    return {
        node: f"its weight {weight:.17g} does not fit the weights of {kept} other nodes, {low:.17g} to {high:.17g}: "
        "as integers they would sum to more than 2**53; use numbers of examples"
        for node, weight in weights.items()
        if not low <= weight <= high
    }


def _all_fit(weights: Mapping[int, float]) -> bool:
    try:
        integral_weights({str(node): weight for node, weight in weights.items()})
    except InvalidWeight:
        return False
    return True


def _largest(amounts: list[tuple[float, int]]) -> tuple[float, float]:
    """Find the range of amounts that fit together and belong to most nodes; ``amounts`` has each amount and its number of nodes, sorted."""
    sums = list(accumulate((Fraction(amount) * count for amount, count in amounts), initial=Fraction(0)))
    nodes = list(accumulate((count for _, count in amounts), initial=0))
    broken = list(accumulate((amount != int(amount) for amount, _ in amounts), initial=0))

    def fits(first: int, end: int) -> bool:
        total = sums[end] - sums[first]
        if broken[end] > broken[first]:  # they are scaled, and each is rounded
            total = total * Fraction(2) ** (_BITS - math.frexp(amounts[first][0])[1]) + nodes[end] - nodes[first]
        return total <= MAX_WEIGHT

    best, end = (0, 1), 0
    for first in range(len(amounts)):
        end = max(end, first + 1)
        while end < len(amounts) and fits(first, end + 1):
            end += 1
        if nodes[end] - nodes[first] > nodes[best[1]] - nodes[best[0]] and fits(first, end):
            best = first, end
    return amounts[best[0]][0], amounts[best[1] - 1][0]
