"""What the modelled benchmarks share: a round that nobody has submitted."""

from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Term
from paper.model import MB

__all__ = ["MB", "manifest"]


def manifest(nbytes: int, clients: int) -> Manifest:
    """Make up a round of ``clients`` updates of one float32 tensor of ``nbytes`` bytes."""
    version, source = '"0123456789abcdef0123456789abcdef"', "rounds/r/updates/client-{:06d}.safetensors"
    terms = (Term(client=f"client-{i:06d}", source=source.format(i), version=version, base=64, weight=1) for i in range(clients))
    return Manifest(round="r", layout=Layout.of({"parameters": ("F32", (nbytes // 4,))}), terms=tuple(terms))
