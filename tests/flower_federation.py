"""A small federation for the Flower tests: what its clients answer is a function of node, round and model alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import FedAvg

from gradsharding.testing import reference_mean
from gradsharding_flower import GradSharding, upload_mod
from gradsharding_flower.testing import LocalGrid

State = dict[str, npt.NDArray[Any]]
Train = Callable[[int, int, ArrayRecord], RecordDict]
"""What a client does: its node's id, the round and the model it got make its reply."""

NODES = (3, 14, 1, 2)
"""Not in order; and as texts, 14 would come before 2."""


def record(state: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Make Flower's record of arrays."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in state.items()})


def state_of(arrays: ArrayRecord) -> State:
    """Make arrays of Flower's record."""
    return {name: array.numpy() for name, array in arrays.items()}


def initial() -> State:
    """Start with names out of order, three shapes and a counter."""
    return {"b": np.zeros((3, 4), np.float32), "a": np.zeros(7, np.float32), "n": np.array(5, np.int64)}


def trained(node: int, server_round: int, state: State) -> State:
    """Add noise to floats, and the node's id to integers; the counter's dtype is the client's own."""
    draw = np.random.default_rng([node, server_round])
    noise = {name: draw.standard_normal(array.shape) for name, array in sorted(state.items())}
    return {name: np.asarray(a + node, np.int64) if name == "n" else (a + noise[name]).astype(np.float32) for name, a in state.items()}


def weight_of(node: int) -> int:
    """Give a node's number of examples."""
    return 10 * node + 1


def reply(state: Mapping[str, npt.NDArray[Any]], weight: Any, loss: float = 0.0) -> RecordDict:
    """Make what a client answers."""
    return RecordDict({"arrays": record(state), "metrics": MetricRecord({"num-examples": weight, "loss": loss})})


def train(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:
    """Train as a good client does."""
    return reply(trained(node, server_round, state_of(arrays)), weight_of(node), float(node))


def raising(node: int, server_round: int, arrays: ArrayRecord) -> RecordDict:  # noqa: ARG001
    """Fail as clients do."""
    raise OSError(f"node {node}: no space left")


def client(answer: Train = train, mods: Sequence[Mod] = (upload_mod,)) -> ClientApp:
    """Make a ClientApp that trains, and that evaluates by adding its floats up."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        server_round = message.content.config_records["config"]["server-round"]
        assert isinstance(server_round, int)
        return Message(answer(context.node_id, server_round, message.content.array_records["arrays"]), reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001
        total = sum(float(array.sum()) for name, array in state_of(message.content.array_records["arrays"]).items() if name != "n")
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "total": total})}), reply_to=message)

    return app


def grid_of(special: Mapping[int, ClientApp] | None = None, nodes: Iterable[int] = NODES, mods: Sequence[Mod] = (upload_mod,)) -> LocalGrid:
    """Make a grid of good clients, and the ``special`` ones."""
    return LocalGrid({node: client(mods=mods) for node in nodes} | dict(special or {}))


def sharding(store: Any, inner: FedAvg | None = None, **options: Any) -> GradSharding:
    """Wrap FedAvg, with tasks in this process."""
    return GradSharding(inner or FedAvg(), **{"store": store, "executor": "inline", "shards": 3, **options})


def averaged(nodes: Iterable[int], server_round: int, state: State) -> State:
    """Give the model that a round of these nodes makes of ``state``: summed in float64 by node id, divided and rounded once."""
    return reference_mean({f"{node:020d}": (trained(node, server_round, state), weight_of(node)) for node in nodes})


def files(root: Path) -> list[str]:
    """Name all files below a directory, hidden ones too."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


class RecordingGrid(LocalGrid):
    """A LocalGrid that keeps what passes through the server, as pairs of node and content."""

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        super().__init__(apps)
        self.sent: list[tuple[int, RecordDict]] = []
        self.received: list[tuple[int, RecordDict]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep them, and pass them on."""
        pushed = list(messages)
        self.sent += [(m.metadata.dst_node_id, RecordDict(dict(m.content))) for m in pushed]
        return super().push_messages(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Keep them, and pass them on; the strategy may change a reply's content afterwards."""
        replies = list(super().pull_messages(message_ids))
        self.received += [(m.metadata.src_node_id, RecordDict(dict(m.content))) for m in replies if m.has_content()]
        return replies
