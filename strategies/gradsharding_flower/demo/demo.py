"""``gradsharding demo``: a real federation on this machine, sliced, and beside it plain Flower with the same seeds."""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence

import click
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.simulation import run_simulation
from rich.console import Console

from gradsharding.sizes import mib
from gradsharding_flower import GradSharding, upload_mod
from gradsharding_flower.arrays import from_state_dict, to_state_dict
from gradsharding_flower.demo.federation import Net, accuracy, client_app, initial_model, split

_ROW = "{:>5}  {:>8}  {:>14}  {:>13}  {:>15}  {:>12}"

OnRound = Callable[[int, float], None]
"""Told the round's number and the model's accuracy on the test images."""


@click.command()
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1, 100), help="Rounds of training.")
@click.option("--clients", default=5, show_default=True, type=click.IntRange(2, 50), help="Clients, each with data of its own.")
@click.option("--shards", default=4, show_default=True, type=click.IntRange(1, 1000), help="Slices of the model.")
@click.option("--seed", default=7, show_default=True, help="Fixes the data's split, the first weights and the training.")
def demo(rounds: int, clients: int, shards: int, seed: int) -> None:
    """Train a small model in a real federation on this machine.

    \b
    Examples:
      gradsharding demo
      gradsharding demo --rounds 3 --clients 8

    Every update is averaged slice by slice. Real Flower clients train on scikit-learn's images of digits (part of the
    package: nothing is downloaded). Their updates go to a directory, and worker processes average one slice each; the
    Flower server sees receipts only. At the end the same federation runs on plain Flower FedAvg, with the same seeds,
    for comparison.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    quiet()
    console = Console()
    parts, _ = split(clients, seed)
    console.print(f"{clients} clients with {', '.join(str(len(part)) for part in parts)} images; {rounds} rounds, {shards} slices")
    with tempfile.TemporaryDirectory(prefix="gradsharding-demo-") as directory:
        strategy = GradSharding(_fed_avg(clients), store=directory, shards=shards, executor="processes:2")
        with console.status("starting Flower's simulation engine"):
            sliced = federate(strategy, [upload_mod], clients, rounds, seed, _printer(console, strategy))
    with console.status("the same with plain Flower FedAvg, with the same seeds"):
        plain = federate(_fed_avg(clients), [], clients, rounds, seed, lambda _, __: None)
    console.print(f"accuracy after {rounds} rounds: gradsharding {sliced:.4f}, plain Flower FedAvg {plain:.4f}")


def federate(strategy: Strategy, mods: Sequence[Mod], clients: int, rounds: int, seed: int, on_round: OnRound) -> float:
    """Run a federation on Flower's simulation engine; give the final accuracy on the test images."""
    test, reached = split(clients, seed)[1], [0.0]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = Net()
        model.load_state_dict(to_state_dict(arrays))
        reached[0] = accuracy(model, test)
        on_round(server_round, reached[0])
        return MetricRecord({"accuracy": reached[0]})

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
        initial = from_state_dict(initial_model(seed).state_dict())
        strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate)

    run_simulation(app, client_app(mods, seed=seed), clients)
    return reached[0]


def quiet() -> None:
    """Leave the terminal to the demo: Flower and Ray speak of problems only, and report to nobody."""
    os.environ.update(FLWR_LOG_LEVEL="ERROR", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _fed_avg(clients: int) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)


def _printer(console: Console, strategy: GradSharding) -> OnRound:
    def tell(server_round: int, reached: float) -> None:
        if not server_round:
            console.print(_ROW.format("round", "accuracy", "via the server", "via the store", "function's peak", "of projected"))
            return
        if not strategy.history:  # nothing was averaged yet, as the log says
            console.print(f"{server_round:>5}    {reached:.4f}")
            return
        report = strategy.history[-1]
        console.print(
            _ROW.format(
                server_round,
                f"{reached:.4f}",
                f"{(report.server_sent + report.server_received) / 1000:,.1f} kB",
                f"{(report.uploaded + report.read + report.written) / 1000:,.1f} kB",
                "-" if report.peak_memory is None else mib(report.peak_memory),
                mib(report.projected_memory),
            )
        )

    return tell
