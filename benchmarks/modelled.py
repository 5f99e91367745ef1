"""What the modelled benchmarks share: updates that nobody has, and the topologies as each system has them."""

from collections.abc import Callable
from typing import Any

from gradsharding import Limits, Plan, lambda_fl, lifl
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Term
from gradsharding.planning.topologies import flat, in_paper_loop, paper

MB = 1 << 20
"""The paper's megabytes are these."""


def manifest(nbytes: int, clients: int) -> Manifest:
    """Make up a round: so many updates of one float32 tensor."""
    version, source = '"0123456789abcdef0123456789abcdef"', "rounds/r/updates/client-{:06d}.safetensors"
    terms = (Term(client=f"client-{i:06d}", source=source.format(i), version=version, base=64, weight=1) for i in range(clients))
    return Manifest(round="r", layout=Layout.of({"parameters": ("F32", (nbytes // 4,))}), terms=tuple(terms))


def in_paper(topology: str, round_: Manifest, shards: int | None = None) -> Plan:
    """Plan as the paper's functions work: whole objects, one after another, in float32."""
    if topology == "paper":
        assert shards
        return paper(round_, Limits(), shards=shards)
    trees: dict[str, Callable[..., Any]] = {"lambda-fl": lambda_fl, "lifl": lifl, "flat": flat}
    return in_paper_loop(trees[topology](round_, Limits()))


def provisioned(plan: Plan) -> int:
    """Bytes that the paper gives a function: what its loop projects, in whole MiB."""
    return -(-plan.memory // MB) * MB
