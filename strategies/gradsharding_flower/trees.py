"""The same wrapper with the trees of other systems: their functions hold whole models, and only the topology differs."""

from typing import Any

from flwr.serverapp.strategy import FedAvg

from gradsharding import LambdaFLTree, LIFLTree
from gradsharding.errors import UserError
from gradsharding_flower.strategy import GradSharding


class LambdaFL(GradSharding):
    """GradSharding with λ-FL's topology: leaves sum whole models, and a root sums their sums.

    Parameters
    ----------
    inner : FedAvg
        The strategy to wrap.
    fan_in : int | None (default: None)
        Updates of a leaf; by default √N, rounded up.
    levels : int (default: 2)
        Levels of the tree.
    **settings
        Those of ``GradSharding``, except ``shards`` and ``topology``.
    """

    def __init__(self, inner: FedAvg, *, fan_in: int | None = None, levels: int = 2, **settings: Any) -> None:
        super().__init__(inner, topology=LambdaFLTree(fan_in=fan_in, levels=levels), **_without_shards("LambdaFL", settings))


class LIFL(GradSharding):
    """GradSharding with LIFL's topology: leaf, middle and top aggregators of whole models.

    Parameters
    ----------
    inner : FedAvg
        The strategy to wrap.
    fan_in : int | None (default: None)
        Inputs of a leaf or middle aggregator; by default ∛N, rounded up.
    shared_memory : bool (default: False)
        Pass partial sums through this machine's memory, as LIFL itself does; the functions must be processes of this machine.
    **settings
        Those of ``GradSharding``, except ``shards`` and ``topology``.
    """

    def __init__(self, inner: FedAvg, *, fan_in: int | None = None, shared_memory: bool = False, **settings: Any) -> None:
        super().__init__(inner, topology=LIFLTree(fan_in=fan_in, shared_memory=shared_memory), **_without_shards("LIFL", settings))


def _without_shards(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return ``settings``; raise UserError if they have ``shards``."""
    if "shards" in settings:
        raise UserError(f"{name} has no shards: its functions hold whole models; use GradSharding")
    return settings
