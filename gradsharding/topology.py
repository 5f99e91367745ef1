"""A topology is a pure function from a manifest to a plan."""

from collections.abc import Sequence
from typing import Protocol

from gradsharding.plan import HEADER_PART, MAX_PARTS, Limits, Plan, Stage, Task
from gradsharding.reading import STREAM, Reading
from gradsharding.round import Manifest
from gradsharding.sharding import Slice, cut


class Topology(Protocol):
    """A manifest, the limits of a function, the bytes that suit a slice, and how a function reads, make a plan."""

    def __call__(self, manifest: Manifest, limits: Limits, *, grain: int, reading: Reading) -> Plan:
        """Make the plan; the same arguments make the same plan."""
        ...


def flat(manifest: Manifest, limits: Limits, *, grain: int = 0, reading: Reading = STREAM) -> Plan:  # noqa: ARG001 - whatever it takes
    """One function averages everything: what a single server does."""
    return _final("flat", manifest, cut(manifest.layout.runs, 1), reading)


def sharded(manifest: Manifest, limits: Limits, *, grain: int = 8 << 20, reading: Reading = STREAM, shards: int | None = None) -> Plan:
    """One function a slice, each reading its range of every update.

    ``shards`` is their number; by default, slices of about ``grain`` bytes, smaller where the limits demand it.
    """
    count = shards or _count(manifest, limits, grain, reading)
    return _final("sharded", manifest, cut(manifest.layout.runs, count), reading)


def _count(manifest: Manifest, limits: Limits, grain: int, reading: Reading) -> int:
    """Slices of about ``grain`` bytes: more of them until each fits, or no more can be made."""
    most = max(1, min(manifest.layout.elements, MAX_PARTS - 1))
    count = min(most, max(1, -(-manifest.layout.nbytes // grain)))
    while count < most and _final("sharded", manifest, cut(manifest.layout.runs, count), reading).memory > limits.memory:
        count = min(most, 2 * count)
    return count


def _final(name: str, manifest: Manifest, slices: Sequence[Slice], reading: Reading) -> Plan:
    """A stage whose tasks write the parts of the result, after part 1, its header."""
    header = len(manifest.layout.header())
    tasks = tuple(
        Task(
            id=f"{name}/{i}",
            start=s.start,
            stop=s.stop,
            runs=s.runs,
            terms=manifest.terms,
            part=HEADER_PART + 1 + i,
            offset=header + s.start,
            reading=reading,
        )
        for i, s in enumerate(slices)
    )
    return Plan(
        topology=name,
        clients=len(manifest.terms),
        header_bytes=header,
        result_bytes=manifest.layout.nbytes,
        stages=(Stage(tasks=tasks),),
    )
