"""A contest is drawn as it stands: as a board in a terminal, as a line for each round elsewhere."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gradsharding_flower.demo.contest import Contest, Run

BARS = "▁▂▃▄▅▆▇█"
BESIDE_ROWS = 11
"""Lines of the board besides the rows of its table."""


def line(contest: Contest, run: Run) -> str:
    """Describe the last round of ``run`` in one line."""
    number, last = len(run.rounds), run.rounds[-1]
    past = f", {decimal(run.past_server)} past it so far" if run is contest.sliced else ""
    return (
        f"{run.name}, round {number:>{len(str(contest.rounds))}}: accuracy {last.accuracy:.4f}, {last.seconds:.1f} s, "
        f"{decimal(last.through_server)} through the server{past}"
    )


def board(contest: Contest, console: Console, *, most_rows: int | None = None) -> RenderableType:
    """Draw both runs: a table, of which the last ``most_rows`` rounds are shown, and under it a line for each run."""
    return Group(_table(contest, most_rows or contest.rounds), _totals(contest, console))


def totals(contest: Contest) -> str:
    """Count in one line the bytes that went through the server, and those that went past it."""
    sliced, plain = contest.sliced, contest.plain
    return (
        f"{sliced.name}: {decimal(sliced.past_server)} past the server, {decimal(sliced.through_server)} through it; "
        f"{plain.name}: {decimal(plain.through_server)} through it"
    )


def spark(shares: Sequence[float], width: int) -> str:
    """Draw numbers from 0 to 1 as bars, at most ``width`` of them: of more numbers, evenly chosen ones, and always the last.

    >>> spark([0, 0.5, 1], 80), spark([i / 100 for i in range(101)], 4)
    ('▁▅█', '▂▄▆█')
    """
    count = min(len(shares), width)
    chosen = (shares[(i + 1) * len(shares) // count - 1] for i in range(count))
    return "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in chosen)


def decimal(nbytes: int) -> str:
    """Write a number of bytes in the largest unit that it fills.

    >>> decimal(999), decimal(4_100), decimal(1_550_000), decimal(20 * 10**9)
    ('999 B', '4.1 kB', '1.6 MB', '20.0 GB')
    """
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.1f} {unit}"
    return f"{nbytes} B"


@contextmanager
def shown(contest: Contest, console: Console) -> Iterator[None]:
    """Show the contest while it goes on, if the console is a terminal; all finished rounds remain on it, also after an interruption."""
    if not is_live(console):
        yield
        return
    spinner = Spinner("dots")

    def now() -> RenderableType:
        spinner.update(text=contest.doing)
        return Group(board(contest, console, most_rows=max(1, console.height - BESIDE_ROWS)), Text(""), spinner)

    try:
        with Live(get_renderable=now, console=console, refresh_per_second=8, transient=True):
            yield
    finally:
        if contest.sliced.rounds:
            console.print(board(contest, console))


def is_live(console: Console) -> bool:
    """Whether the console can redraw its last lines."""
    return console.is_terminal and not console.is_dumb_terminal


def _table(contest: Contest, most_rows: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for header in ("round", "accuracy", "accuracy,\nplain Flower", "seconds", "through\nthe server", "past it,\nso far"):
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    past = [*itertools.accumulate(trained.past_server for trained in contest.sliced.rounds)]
    under_way = len(contest.plain.rounds or contest.sliced.rounds)
    first = max(0, min(len(past) - most_rows, under_way - most_rows // 2))
    for number, trained in [*enumerate(contest.sliced.rounds)][first : first + most_rows]:
        plain = f"{contest.plain.rounds[number].accuracy:.4f}" if number < len(contest.plain.rounds) else ""
        table.add_row(
            str(number + 1),
            f"{trained.accuracy:.4f}",
            plain,
            f"{trained.seconds:.1f}",
            decimal(trained.through_server),
            decimal(past[number]),
        )
    return table


def _totals(contest: Contest, console: Console) -> RenderableType:
    grid = Table(box=None, pad_edge=True, header_style="bold")
    grid.add_column("")
    grid.add_column("accuracy, round by round", min_width=24)
    for header in ("now", "through the server", "past it"):
        grid.add_column(header, justify="right", no_wrap=True)
    for run, style in ((contest.sliced, "cyan"), (contest.plain, "magenta")):
        if run.rounds:
            bars = "" if console.options.ascii_only else spark([trained.accuracy for trained in run.rounds], console.width - 60)
            past = decimal(run.past_server) if run is contest.sliced else ""
            grid.add_row(run.name, Text(bars, style), f"{run.rounds[-1].accuracy:.4f}", decimal(run.through_server), past)
    return grid if grid.rows else Text("")
