"""The object layout of the GradsSharding paper, to compare with: one raw object for each client and slice, nothing pinned.

arXiv 2604.22072; its public replication package names the objects ``client_c_shard_m``. The plan is ``topology.paper``.
"""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from gradsharding.arithmetic.weights import integral_weights
from gradsharding.format.dtypes import Buffer
from gradsharding.format.encode import Raw, encode
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.slices import cut
from gradsharding.planning.task import Term
from gradsharding.rounds.round import Round


def submit(round: Round, updates: Mapping[str, tuple[Mapping[str, "npt.NDArray[Any] | Raw"], float]], shards: int) -> Manifest:  # noqa: A002
    """Write all updates of a round, given as (arrays, weight) by client, in ``shards`` objects each, and seal it.

    The arrays must be alike. Raise PlanTooLarge for more shards than elements, ObjectExists if an object is there.
    """
    weights = integral_weights({client: weight for client, (_, weight) in updates.items()})
    terms = []
    for client in sorted(updates):
        layout, (_, *buffers) = encode(updates[client][0])
        source, vector = round.key(f"updates/{client}"), _joined(buffers)
        for m, slice_ in enumerate(cut(layout.runs, shards)):
            round.store.put(f"{source}_shard_{m}", [vector[slice_.start : slice_.stop]])
        terms.append(Term(client=client, source=source, version=None, base=0, weight=weights[client]))
    return round.freeze(Manifest(round=round.id, layout=layout, terms=tuple(terms)))


def _joined(buffers: list[Buffer]) -> memoryview:
    return memoryview(b"".join(buffers))
