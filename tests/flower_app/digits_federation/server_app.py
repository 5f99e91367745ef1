"""The server: it runs the federation and leaves a JSON report; the final model stays in the store."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from gradsharding import open_store
from gradsharding_flower import GradSharding, from_state_dict
from gradsharding_flower.demo.federation import initial_model
from gradsharding_flower.reference import write_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run either strategy; the report names the final model's key in the store, and what each round did."""
    config = context.run_config
    nodes, rounds = int(config["num-clients"]), int(config["num-server-rounds"])
    store = open_store(str(config["store"]))
    initial = from_state_dict(initial_model(7).state_dict())
    average = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    if config["strategy"] == "fedavg":
        result = average.start(grid, initial, num_rounds=rounds)
        report: dict[str, Any] = {"model": write_arrays("plain.safetensors", result.arrays, store).source}
    else:
        strategy = GradSharding(average, store=store, shards=3, executor="processes:1")
        model = strategy.start(grid, initial, num_rounds=rounds).model
        report = {"model": model.source, "rounds": [asdict(one) for one in strategy.history]}
    Path(str(config["report"])).write_text(json.dumps(report))
