"""The paper's memory, seconds and dollars, by formulas of its own; prices, and the parameters of the time model, are those we use for us.

Each function reads whole objects, one after another, and sums them in float32. Sharded, a client uploads one object for each slice;
in a tree, or flat, it uploads one object.
"""

from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

from gradsharding import LambdaFLTree, LIFLTree
from gradsharding.advice.cost import GIB, MONTH, Bill, Cost, Item, priced_functions
from gradsharding.advice.prices import Prices
from gradsharding.advice.timing import Speeds, stage_seconds
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.platform import CHARGES, VCPU, Architecture
from gradsharding.planning.slices import cut
from gradsharding.usage import Usage

MB = 1 << 20
"""The paper's megabytes are these."""

RUNTIME = 450 * MB
"""Bytes that the paper provisions for a function beside its data: the runtime with its libraries."""


class Functions(NamedTuple):
    """Functions of one level that take the same number of inputs of the same size."""

    number: int
    inputs: int
    nbytes: int
    """Of each input, and of what the function writes: both are float32."""

    def seconds(self, memory: int, speeds: Speeds) -> float:
        """Predict the mean seconds of one function of ``memory`` bytes: nothing goes on while anything else does."""
        cpu = min(1.0, memory / VCPU)
        read = self.inputs * (speeds.latency + self.nbytes * (1 / speeds.connection_rate + 1 / (cpu * speeds.fold_rate)))
        return read + speeds.latency + self.nbytes / speeds.write_rate


class PaperPlan(NamedTuple):
    """Slices of the vector times a tree over the clients, in the paper's loop."""

    topology: str
    clients: int
    update_bytes: int
    """Bytes of an update with a safetensors header."""
    slices: tuple[int, ...]
    """Bytes of each."""
    widths: tuple[int, ...]
    """Functions of each level, for one slice."""
    fan_ins: tuple[int, ...]
    """Inputs of a function of each level, at most."""

    @property
    def memory(self) -> int:
        """Bytes of the largest function: the sums, an object's bytes, the array made of them, and the runtime."""
        return RUNTIME + 3 * max(self.slices)

    @property
    def provisioned(self) -> int:
        """Bytes that the paper gives a function, in whole MiB."""
        return -(-self.memory // MB) * MB

    @property
    def levels(self) -> tuple[tuple[Functions, ...], ...]:
        """The functions of each level."""
        return tuple(tuple(self._level(level)) for level in range(len(self.widths)))

    @property
    def usage(self) -> Usage:
        """Requests and bytes of all functions."""
        functions = [kind for level in self.levels for kind in level]
        return Usage(
            gets=sum(kind.number * kind.inputs for kind in functions),
            puts=sum(kind.number for kind in functions),
            bytes_read=sum(kind.number * kind.inputs * kind.nbytes for kind in functions),
            bytes_written=sum(kind.number * kind.nbytes for kind in functions),
        )

    @property
    def objects(self) -> int:
        """Objects that a client uploads, and downloads."""
        return len(self.slices)

    def seconds(self, memory: int, concurrency: int | None = None, speeds: Speeds | None = None) -> tuple[float, float]:
        """Predict the median wall time of a round by functions of ``memory`` bytes, and the seconds that they are billed in all.

        To the stages come three requests of the caller: the result's begin, its header, its end.
        """
        known = speeds or Speeds()
        each = [[(kind.number, kind.seconds(memory, known)) for kind in level] for level in self.levels]
        wall = 3 * known.latency + sum(stage_seconds(level, concurrency, known)[0] for level in each)
        return wall, sum(count * seconds for level in each for count, seconds in level)

    def cost(self, prices: Prices, memory: int, architecture: Architecture = "x86_64") -> Cost:
        """Price a round by functions of ``memory`` bytes, in both of the paper's accountings."""
        gib_seconds = Decimal(memory) / GIB * Decimal(f"{self.seconds(memory)[1]:.3f}")
        return self.priced(priced_functions(gib_seconds, sum(self.widths) * len(self.slices), prices, architecture), prices)

    def priced(self, functions: Bill, prices: Prices, hours: int = 1) -> Cost:
        """Add requests, and the storage of updates and results for ``hours``, to the price of functions; clients are on AWS."""
        usage, moved = self.usage, self.clients * self.update_bytes
        aggregation = functions + self._requests("functions' ", usage, prices)
        trip = Usage(gets=self.objects, puts=self.objects) if self.topology == "paper" else Usage(gets=2) + CHARGES.put(self.update_bytes)
        stored = Decimal(moved + usage.bytes_written) / GIB * hours / MONTH
        trips = self._requests("clients' ", trip * self.clients, prices)
        storage = Bill(items=(_item("storage", stored, "GiB-months", prices, "s3_gigabyte_month"),))
        return Cost(aggregation, aggregation + trips + storage)

    def _level(self, level: int) -> Iterator[Functions]:
        """Give the functions of a level: all groups are full but, maybe, the last."""
        before, fan_in = self.widths[level - 1] if level else self.clients, self.fan_ins[level]
        full, rest = divmod(before, fan_in)
        for nbytes in {*self.slices}:
            count = self.slices.count(nbytes)
            if full:
                yield Functions(count * full, fan_in, nbytes)
            if rest:
                yield Functions(count, rest, nbytes)

    def _requests(self, whose: str, usage: Usage, prices: Prices) -> Bill:
        gets = _item(f"{whose}GETs", usage.gets, "requests", prices, "s3_get")
        puts = _item(f"{whose}PUTs", usage.puts, "requests", prices, "s3_put")
        return Bill(items=(gets, puts))


def _item(name: str, count: Decimal | int, unit: str, prices: Prices, figure: str) -> Item:
    return Item(name=name, count=Decimal(count), unit=unit, figure=figure, price=prices.usd(figure))


def planned(topology: str, manifest: Manifest, shards: int | None = None) -> PaperPlan:
    """Plan a round: ``paper`` in ``shards`` slices, or ``flat``, ``lambda-fl``, ``lifl`` over whole models.

    Raise PlanTooLarge for more shards than elements.
    """
    clients = len(manifest.terms)
    widths: tuple[int, ...] = (1,)
    fan_ins: tuple[int, ...] = (clients,)
    if topology in ("lambda-fl", "lifl"):
        tree = {"lambda-fl": LambdaFLTree(), "lifl": LIFLTree()}[topology].plan(manifest)
        widths, fan_ins = tree.widths, tree.fan_ins
    slices = tuple(s.stop - s.start for s in cut(manifest.layout.runs, shards or 1))
    return PaperPlan(topology, clients, len(manifest.layout.header()) + manifest.layout.nbytes, slices, widths, fan_ins)
