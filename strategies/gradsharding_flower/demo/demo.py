"""``gradsharding demo``: a real federation on this machine, sliced, and then plain Flower with the same seeds."""

import logging
import os
import tempfile
import warnings
from pathlib import Path

import click
from flwr.serverapp.strategy import FedAvg, Strategy
from rich.console import Console

from gradsharding.sizes import mib
from gradsharding_flower import GradSharding
from gradsharding_flower.demo import plot
from gradsharding_flower.demo.contest import Contest, Trained
from gradsharding_flower.demo.federation import split
from gradsharding_flower.demo.screen import is_live, line, shown, totals
from gradsharding_flower.demo.simulation import simulate

NEXT = """
Next, in your own app: GradSharding(FedAvg(), store="/shared/updates") for the server, ClientApp(mods=[upload_mod]) for the clients.
What a larger model takes: gradsharding plan --size 528MB --clients 20"""


@click.command()
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1, 100), help="Rounds of training.")
@click.option("--clients", default=5, show_default=True, type=click.IntRange(2, 50), help="Clients, each with data of its own.")
@click.option("--shards", default=4, show_default=True, type=click.IntRange(1, 1000), help="Slices of the model.")
@click.option("--seed", default=7, show_default=True, help="Fixes the data's split, the first weights and the training.")
@click.option("--plot", "figure", metavar="PATH", type=click.Path(path_type=Path), help="Draw both runs as a figure, PNG or SVG.")
def demo(rounds: int, clients: int, shards: int, seed: int, figure: Path | None) -> None:
    """Train a small model in a real federation on this machine.

    \b
    Examples:
      gradsharding demo
      gradsharding demo --rounds 3 --clients 8 --plot demo.png

    Every update is averaged slice by slice. Real Flower clients train on scikit-learn's images of digits (part of the
    package: nothing is downloaded). Their updates go to a directory, and worker processes average one slice each; the
    Flower server sees receipts only. Then the same clients train by plain Flower FedAvg, with the same seeds, for
    comparison. Ctrl-C ends it at any time, and leaves nothing behind.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    if figure:
        plot.check(figure)
    quiet()
    console, contest = Console(highlight=False), Contest(rounds)
    parts, _ = split(clients, seed)

    def say(text: str) -> None:
        console.print(text, soft_wrap=not console.is_terminal, markup=False)

    say(f"{clients} clients with {', '.join(str(len(part)) for part in parts)} images; {rounds} rounds, {shards} slices")
    with tempfile.TemporaryDirectory(prefix="gradsharding-demo-") as directory:
        sliced = GradSharding(_fed_avg(clients), store=directory, shards=shards, executor="processes:2")

        def on_round(strategy: Strategy, trained: Trained) -> None:
            run = contest.sliced if strategy is sliced else contest.plain
            run.rounds.append(trained)
            if not is_live(console):
                say(line(contest, run))

        def on_interrupt() -> None:
            contest.interrupted = True

        with shown(contest, console):
            simulate([sliced, _fed_avg(clients)], on_round, on_interrupt, clients=clients, rounds=rounds, seed=seed)
    if not is_live(console):
        say(totals(contest))
    if peaks := [report.peak_memory for report in sliced.history if report.peak_memory]:
        say(f"memory of a worker process: {mib(max(peaks))} at most, {mib(sliced.history[-1].projected_memory)} projected")
    reached = (f"{run.name} {run.rounds[-1].accuracy:.4f}" for run in (contest.sliced, contest.plain))
    say(f"accuracy after {rounds} rounds: {', '.join(reached)}")
    if figure:
        plot.draw(contest, figure)
        say(f"figure: {figure}")
    say(NEXT)


def quiet() -> None:
    """Leave the terminal to the demo: Flower and Ray print errors only, and send no telemetry."""
    os.environ.update(FLWR_LOG_LEVEL="ERROR", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")
    for name in ("flwr", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _fed_avg(clients: int) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
