"""A small real federation: a CNN on scikit-learn's digits, with unequal and unlike data on each client."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from sklearn.datasets import load_digits
from torch import nn

from gradsharding_flower.arrays import from_state_dict, to_state_dict

Indices = npt.NDArray[np.int64]

_TEST_SHARE = 5
"""One image of this number is kept for testing."""


class Net(nn.Module):
    """Two convolutions and two linear layers for 8 x 8 grey images of ten digits: 37,994 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of shape (n, 10) for images of shape (n, 1, 8, 8)."""
        scores: torch.Tensor = self.layers(images)
        return scores


@cache
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 images as float32 in 0..1, shape (n, 1, 8, 8), and their digits; part of scikit-learn, nothing is downloaded."""
    digits = load_digits()
    return torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(digits.target)


def split(clients: int, seed: int) -> tuple[list[Indices], Indices]:
    """Indices of each client's images, and of the test images.

    Each digit's images are dealt in shares drawn from a Dirichlet distribution (alpha 0.5), so that clients hold different
    digits and different numbers of images.
    """
    rng = np.random.default_rng(seed)
    digits = images()[1].numpy()
    order = rng.permutation(len(digits))
    test, rest = order[::_TEST_SHARE], np.delete(order, np.s_[::_TEST_SHARE])
    dealt: list[list[Indices]] = [[] for _ in range(clients)]
    for digit in range(10):
        mine = rest[digits[rest] == digit]
        cuts = (np.cumsum(rng.dirichlet([0.5] * clients))[:-1] * len(mine)).astype(int)
        for client, part in zip(dealt, np.split(mine, cuts), strict=True):
            client.append(part)
    return [np.concatenate(parts) for parts in dealt], test


def initial_model(seed: int) -> Net:
    """A model whose weights depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return Net()


def accuracy(model: Net, indices: Indices) -> float:
    """Share of the images at ``indices`` that the model classifies correctly."""
    pixels, digits = images()
    with torch.no_grad():
        return float((model(pixels[indices]).argmax(1) == digits[indices]).float().mean())


def train(model: Net, indices: Indices, *, epochs: int, seed: int) -> float:
    """Train on the images at ``indices``; return the last batch's mean loss. The same arguments give the same weights."""
    pixels, digits = images()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss = torch.zeros(())
    for _ in range(epochs):
        for batch in torch.from_numpy(indices)[torch.randperm(len(indices), generator=generator)].split(32):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(pixels[batch]), digits[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return float(loss.detach())


def client_app(mods: Sequence[Mod], *, seed: int, epochs: int = 2) -> ClientApp:
    """A ClientApp that trains on its partition: the usual Flower code, which knows nothing of ``mods``."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        partition = int(context.node_config["partition-id"])
        mine = split(int(context.node_config["num-partitions"]), seed)[0][partition]
        model = Net()
        model.load_state_dict(to_state_dict(message.content.array_records["arrays"]))
        server_round = int(str(message.content.config_records["config"]["server-round"]))
        loss = train(model, mine, epochs=epochs, seed=seed + 1000 * server_round + partition)
        metrics = MetricRecord({"num-examples": len(mine), "loss": loss})
        return Message(RecordDict({"arrays": from_state_dict(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app
