"""A topology is a pure function from a manifest to a plan."""

from typing import Any, Protocol, get_args

from gradsharding.arithmetic.fold import Arithmetic
from gradsharding.errors import UserError, quoted
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.slices import cut
from gradsharding.stores.reading import STREAM, Reading


class Topology(Protocol):
    """A manifest, the limits of a function, the bytes that suit a slice, how a function reads and what it sums in make a plan."""

    def __call__(self, manifest: Manifest, limits: Limits, *, grain: int, reading: Reading, arithmetic: Arithmetic = "float64") -> Plan:
        """Make the plan; the same arguments make the same plan."""
        ...


def flat(manifest: Manifest, limits: Limits, *, grain: int = 0, reading: Reading = STREAM, **how: Any) -> Plan:  # noqa: ARG001 - whatever it takes
    """One function averages everything: what a single server does."""
    return _plan("flat", manifest, reading, **how)


def sharded(
    manifest: Manifest, limits: Limits, *, grain: int = 8 << 20, reading: Reading = STREAM, shards: int | None = None, **how: Any
) -> Plan:
    """One function a slice, each reading its range of every update.

    ``shards`` is their number; by default, slices of about ``grain`` bytes, smaller where the limits demand it.
    """
    return _sliced(_plan("sharded", manifest, reading, **how), limits, grain, shards)


def lambda_fl(
    manifest: Manifest,
    limits: Limits,  # noqa: ARG001 - whatever it takes
    *,
    grain: int = 0,  # noqa: ARG001 - whole models
    reading: Reading = STREAM,
    fan_in: int | None = None,
    levels: int = 2,
    **how: Any,
) -> Plan:
    """A tree over the clients (λ-FL, FL-AAAI-22): leaves sum ``fan_in`` whole models each, the root sums the sums and divides.

    By default ``fan_in`` is the smallest number whose power to the ``levels`` is the number of clients or more: √N rounded up.
    """
    return _plan("lambda-fl", manifest, reading, _tree(manifest, fan_in, levels), **how)


def lifl(
    manifest: Manifest,
    limits: Limits,  # noqa: ARG001 - whatever it takes
    *,
    grain: int = 0,  # noqa: ARG001 - whole models
    reading: Reading = STREAM,
    fan_in: int | None = None,
    **how: Any,
) -> Plan:
    """A tree of leaf, middle and top aggregators (LIFL, arXiv 2405.10968), each of whole models.

    By default ``fan_in`` is the cube root of the number of clients, rounded up, and 2 at least. With ``shared_memory``, partial
    sums pass through the memory of the machine that all functions run on, as in LIFL itself; else through the store, as the
    GradsSharding paper has it re-implemented.
    """
    return _plan("lifl", manifest, reading, _tree(manifest, fan_in or max(2, _root(len(manifest.terms), 3)), 3), **how)


def sharded_tree(
    manifest: Manifest,
    limits: Limits,
    *,
    grain: int = 8 << 20,
    reading: Reading = STREAM,
    shards: int | None = None,
    fan_in: int | None = None,
    levels: int = 2,
    **how: Any,
) -> Plan:
    """A tree over the clients for each slice: for so many clients that one function could not read a slice of each in its time."""
    return _sliced(_plan("sharded-tree", manifest, reading, _tree(manifest, fan_in, levels), **how), limits, grain, shards)


def _plan(
    name: str,
    manifest: Manifest,
    reading: Reading,
    fan_ins: tuple[int, ...] | None = None,
    *,
    arithmetic: Arithmetic = "float64",
    **how: Any,
) -> Plan:
    if arithmetic not in get_args(Arithmetic):
        raise UserError(f"no arithmetic is known as {arithmetic!r}; use float64 or exact")
    if arithmetic == "exact":
        _require_narrow(manifest)
    return Plan(
        topology=name,
        header_bytes=len(manifest.layout.header()),
        slices=cut(manifest.layout.runs, 1),
        terms=manifest.terms,
        fan_ins=fan_ins or (len(manifest.terms),),
        reading=reading,
        arithmetic=arithmetic,
        **how,
    )


def _require_narrow(manifest: Manifest) -> None:
    """Raise UserError if there is a tensor that exact sums are not made for: a float64 would need 360 bytes an element."""
    wide = next((tensor.name for tensor in manifest.layout.tensors if tensor.dtype == "F64"), None)
    if wide is not None:
        raise UserError(
            f"tensor {quoted(wide)} is F64, and exact sums are of F32, F16 and BF16: convert it to F32, or leave exact out", tensor=wide
        )


def _sliced(plan: Plan, limits: Limits, grain: int, shards: int | None) -> Plan:
    """Cut into ``shards``, or into slices of about ``grain`` bytes: more of them until each fits, or no more can be made."""
    if shards:
        return plan.recut(shards)
    wanted = -(-plan.result_bytes // grain)
    return plan.fitting(limits.memory, wanted) or plan


def _tree(manifest: Manifest, fan_in: int | None, levels: int) -> tuple[int, ...]:
    """Inputs of a function at each level; the last one takes all that are left."""
    count = len(manifest.terms)
    each = fan_in or max(1, _root(count, levels))
    if levels < 1 or each < 1:
        raise UserError(f"a tree of {levels} levels with {each} inputs each is none; use at least 1 level, and 2 inputs")
    for _ in range(levels - 1):
        count = -(-count // each)
    return (*[each] * (levels - 1), count)


def _root(number: int, degree: int) -> int:
    """Smallest integer whose power to the ``degree`` is ``number`` or more.

    >>> [_root(20, 2), _root(20, 3), _root(64, 3)]
    [5, 3, 4]
    """
    return next(k for k in range(1, number + 1) if k**degree >= number)
