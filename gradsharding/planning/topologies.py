"""A topology is a value: from the same manifest and limits it makes the same plan.

``TOPOLOGIES`` is the registry that the command line, the planner and ``make_topology`` read. A new topology is a subclass of ``Topology``
and a place in the registry; its fields become its options everywhere.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from gradsharding.arithmetic.rules import MEAN, Rule
from gradsharding.errors import UserError, listed, quoted
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.slices import cut
from gradsharding.stores.reading import STREAM, Reading
from gradsharding.value import Value

AtLeastOne = Annotated[int, Field(ge=1)]

_SHARDS = Field(None, description="Number of slices.  [default: slices of 8 MiB, or as --memory allows]")
_FAN_IN = Field(None, description="Inputs of each function in a tree.  [default: a root of the number of updates]")
_LEVELS = Field(2, description="Levels of a tree.  [default: 2]")


class Topology(Value):
    """How the work of a round is divided among functions.

    A subclass sets ``name``, has its options as fields, and overrides ``fan_ins``, ``divided``, or both. Raise UserError for an option that
    it does not have, or whose value it does not take.
    """

    name: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise UserError(_refused(self.name, error)) from error

    def plan(
        self,
        manifest: Manifest,
        limits: Limits | None = None,
        *,
        grain: int = 8 << 20,
        reading: Reading = STREAM,
        rule: Rule = MEAN,
    ) -> Plan:
        """Plan a round: functions with ``limits`` read slices of about ``grain`` bytes by ``reading``, and apply the ``rule``.

        Raise PlanTooLarge for more slices than the update has elements, UserError for a rule that does not fit the updates, or cannot
        be applied by a tree.
        """
        rule.admit(manifest.layout, len(manifest.terms))
        if self.merges(len(manifest.terms)) and not rule.merges:
            raise UserError(f"{rule} needs all values of an element at once, and {self.name} is a tree of partial sums: use sharded")
        whole = Plan(
            topology=self.name,
            header_bytes=len(manifest.layout.header()),
            slices=cut(manifest.layout.runs, 1),
            terms=manifest.terms,
            fan_ins=self.fan_ins(len(manifest.terms)),
            reading=reading,
            rule=rule,
        )
        return self.divided(whole, limits or Limits(), grain)

    def fan_ins(self, clients: int) -> tuple[int, ...]:
        """Give the inputs of a function at each level of the tree over the clients; the last level has one function a slice."""
        return (clients,)

    def merges(self, clients: int) -> bool:
        """Tell whether functions merge the partial sums of others: whether it is a tree."""
        return len(self.fan_ins(clients)) > 1

    def divided(self, whole: Plan, limits: Limits, grain: int) -> Plan:  # noqa: ARG002 - for subclasses
        """Divide a plan of one slice into slices of about ``grain`` bytes, if the topology has slices."""
        return whole

    def __str__(self) -> str:
        """Give the name with the options that differ from their defaults: ``sharded (shards=7)``."""
        options = ", ".join(f"{option}={value}" for option, value in self if value != type(self).model_fields[option].default)
        return f"{self.name} ({options})" if options else self.name


class Flat(Topology):
    """One function averages everything, as a single server does."""

    name: ClassVar = "flat"


class Sharded(Topology):
    """One function for each slice; it reads its range of every update.

    >>> Sharded(shards=7), str(Sharded(shards=7)), str(Sharded())
    (Sharded(shards=7), 'sharded (shards=7)', 'sharded')
    """

    name: ClassVar = "sharded"

    shards: AtLeastOne | None = _SHARDS
    """Number of slices; by default, slices of about ``grain`` bytes, smaller where the limits demand it."""

    def divided(self, whole: Plan, limits: Limits, grain: int) -> Plan:
        """Cut the vector into slices."""
        return _cut(whole, self.shards, limits, grain)


class LambdaFLTree(Topology):
    """A tree over the clients (λ-FL, FL-AAAI-22): leaves sum ``fan_in`` whole models each, the root merges the sums and divides."""

    name: ClassVar = "lambda-fl"

    fan_in: AtLeastOne | None = _FAN_IN
    """By default the smallest number whose power to the ``levels`` is the number of clients or more: √N rounded up."""
    levels: AtLeastOne = _LEVELS

    def fan_ins(self, clients: int) -> tuple[int, ...]:
        """Give a tree of ``levels``."""
        return _tree(clients, self.fan_in, self.levels)


class LIFLTree(Topology):
    """A tree of leaf, middle and top aggregators (LIFL, arXiv 2405.10968), each of whole models."""

    name: ClassVar = "lifl"

    fan_in: AtLeastOne | None = _FAN_IN
    """By default the cube root of the number of clients, rounded up, and at least 2."""
    shared_memory: bool = Field(default=False, description="Pass partial sums through this machine's memory.")
    """Pass partial sums through the memory of the machine that all functions run on, as LIFL itself does. Otherwise they pass through the
    store, as in the re-implementation of the GradsSharding paper."""

    def fan_ins(self, clients: int) -> tuple[int, ...]:
        """Give a tree of three levels."""
        return _tree(clients, self.fan_in or max(2, _root(clients, 3)), 3)

    def divided(self, whole: Plan, limits: Limits, grain: int) -> Plan:  # noqa: ARG002 - whole models
        """Place the partial sums."""
        return whole.replace(shared_memory=self.shared_memory)


class ShardedTree(Topology):
    """A tree over the clients for each slice, where one function could not read a slice of every client in its time."""

    name: ClassVar = "sharded-tree"

    shards: AtLeastOne | None = _SHARDS
    """As of ``Sharded``."""
    fan_in: AtLeastOne | None = _FAN_IN
    """As of ``LambdaFLTree``."""
    levels: AtLeastOne = _LEVELS

    def fan_ins(self, clients: int) -> tuple[int, ...]:
        """Give a tree of ``levels``."""
        return _tree(clients, self.fan_in, self.levels)

    def divided(self, whole: Plan, limits: Limits, grain: int) -> Plan:
        """Cut the vector into slices."""
        return _cut(whole, self.shards, limits, grain)


TOPOLOGIES: dict[str, type[Topology]] = {topology.name: topology for topology in (Flat, Sharded, LambdaFLTree, LIFLTree, ShardedTree)}
"""All topologies by name, in the order in which they are listed."""


def make_topology(name: str, **options: Any) -> Topology:
    """Make a registered topology from its name; raise UserError for an unknown name, and for an option that it does not take.

    >>> make_topology("sharded-tree", shards=3, fan_in=2)
    ShardedTree(shards=3, fan_in=2, levels=2)
    """
    if name not in TOPOLOGIES:
        raise UserError(f"no topology has the name {quoted(name)}; use {listed([*TOPOLOGIES], 'or')}")
    return TOPOLOGIES[name](**options)


def as_topology(topology: Topology | None) -> Topology:
    """Return a topology, ``Sharded()`` in place of None; raise UserError for what is none, such as a name or a class."""
    if topology is None:
        return Sharded()
    if not isinstance(topology, Topology):
        kind = type(topology).__name__
        raise UserError(f"{quoted(topology)} is not a topology but of type {kind}; use a value, such as Sharded(), or make_topology(name)")
    return topology


def _refused(name: str, error: ValidationError) -> str:
    """Say in one sentence which option a topology does not take, or which value."""
    first = error.errors()[0]
    field = str(first["loc"][0])
    option = field.replace("_", "-")
    if first["type"] != "extra_forbidden":
        return f"{name} takes no {option} of {first['input']!r}: {first['msg'].replace('Input', 'it', 1)}"
    takers = [topology.name for topology in TOPOLOGIES.values() if field in topology.model_fields]
    return f"{name} takes no {option}" + (f"; {listed(takers, 'and')} do" if len(takers) > 1 else f"; {takers[0]} does" if takers else "")


def _cut(whole: Plan, shards: int | None, limits: Limits, grain: int) -> Plan:
    """Cut a plan of one slice into ``shards``, or into slices of about ``grain`` bytes that the limits allow."""
    if shards:
        return whole.recut(shards)
    return whole.fitting(limits.memory, -(-whole.result_bytes // grain)) or whole


def _tree(clients: int, fan_in: int | None, levels: int) -> tuple[int, ...]:
    """Inputs of a function at each level; the last one takes all that are left."""
    each, left = fan_in or _root(clients, levels), clients
    for _ in range(levels - 1):
        left = -(-left // each)
    return (*[each] * (levels - 1), left)


def _root(number: int, degree: int) -> int:
    """Smallest integer whose power to the ``degree`` is ``number`` or more.

    >>> [_root(20, 2), _root(20, 3), _root(64, 3)]
    [5, 3, 4]
    """
    return next(k for k in range(1, number + 1) if k**degree >= number)
