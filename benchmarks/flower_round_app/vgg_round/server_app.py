"""The server of both rivals: plain FedAvg, or the same wrapped; it writes down when each round began and ended."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from gradsharding import open_store
from gradsharding.stores.updates import load
from gradsharding.stores.urls import file_reference
from gradsharding_flower import GradSharding, refer

app = ServerApp()


class _Timed(Strategy):
    """Notes the time and the bytes at both ends of each round's training."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        began = time.time()
        messages = list(super().configure_train(server_round, arrays, config, grid))  # type: ignore[safe-super]
        self.notes = [*getattr(self, "notes", []), {"began": began, "down": sum(map(_bytes, messages))}]
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        kept = list(replies)
        self.notes[-1].update(replied=time.time(), up=sum(map(_bytes, kept)))
        averaged = super().aggregate_train(server_round, kept)  # type: ignore[safe-super]
        self.notes[-1]["ended"] = time.time()
        return averaged


class PlainFedAvg(_Timed, FedAvg):
    """Flower's own, timed."""


class SlicedFedAvg(_Timed, GradSharding):
    """Ours, timed."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rival that the run's configuration names."""
    config = context.run_config
    store, rounds = open_store(str(config["store"])), int(str(config["rounds"]))
    sampling: dict[str, Any] = {"fraction_evaluate": 0.0}
    if config["rival"] == "plain":
        strategy: _Timed = PlainFedAvg(**sampling)
        initial = ArrayRecord({name: Array(array) for name, array in load(file_reference(str(config["model"])), store).items()})
    else:
        strategy = SlicedFedAvg(FedAvg(**sampling), store=store, executor="processes:2")
        initial = refer(str(config["model"]), store)
    result = strategy.start(grid, initial, num_rounds=rounds)
    Path(str(config["report"])).write_text(json.dumps({"rounds": strategy.notes, "peak_until_here": _peak(), "sums": _sums(result.arrays)}))


def _bytes(message: Message) -> int:
    return sum(record.count_bytes() for record in message.content.values()) if message.has_content() else 0


def _sums(arrays: ArrayRecord) -> dict[str, float]:
    """A number for each tensor, by which the rivals' results can be compared; read after the last round was timed."""
    return {name: float(np.sum(array.numpy(), dtype=np.float64)) for name, array in sorted(arrays.items())}


def _peak() -> int:
    """Bytes: this process's largest resident set so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
