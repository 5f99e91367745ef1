"""The demo's figure shows both runs: accuracy by round, and bytes through the server so far."""

import os
from importlib.util import find_spec
from io import BytesIO
from itertools import accumulate
from pathlib import Path

from gradsharding.errors import UserError
from gradsharding_flower.demo.contest import Contest

FORMATS = (".png", ".svg")


def check(path: Path) -> None:
    """Raise UserError if no figure can be drawn or written at ``path``."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is not a figure's name; let it end in {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written; name a file in an existing directory that you may write to")
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed; run: pip install matplotlib")


def draw(contest: Contest, path: Path) -> None:
    """Write the figure, as PNG or SVG by the ending of ``path``."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second to import, and only --plot needs it

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, traffic = figure.subplots(1, 2)
    for run, style in ((contest.sliced, "o-"), (contest.plain, "s--")):
        numbers = range(1, len(run.rounds) + 1)
        accuracy.plot(numbers, [trained.accuracy for trained in run.rounds], style, markersize=4, label=run.name)
        passed = [*accumulate(trained.through_server / 1e6 for trained in run.rounds)]
        traffic.plot(numbers, passed, style, markersize=4, label=run.name)
    accuracy.set(xlabel="round", ylabel="accuracy on the test images", ylim=(0, 1))
    traffic.set(xlabel="round", ylabel="MB through the server, so far", yscale="log")
    traffic.yaxis.set_major_formatter("{x:g}")
    for axes in (accuracy, traffic):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="best", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=160)
    path.write_bytes(drawn.getvalue())
