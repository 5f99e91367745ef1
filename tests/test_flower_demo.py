"""What ``gradsharding demo`` shows of its two runs; that it trains them is in test_flower_processes.py."""

import re
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from gradsharding.errors import UserError
from gradsharding_flower.demo import plot
from gradsharding_flower.demo.contest import Contest, Trained
from gradsharding_flower.demo.demo import demo
from gradsharding_flower.demo.screen import BESIDE_ROWS, board, line, shown, spark, totals


def contest(rounds: int, sliced: int, plain: int) -> Contest:
    """Make a contest of ``rounds`` rounds in which some have ended; each has figures of its own."""
    made = Contest(rounds)
    made.sliced.rounds += [Trained(i / 1000, i / 10, 4_000 + i, 1_500_000) for i in range(1, sliced + 1)]
    made.plain.rounds += [Trained(0.5 + i / 1000, i / 20, 1_600_000, 0) for i in range(1, plain + 1)]
    return made


def console(columns: int, rows: int = 24, encoding: str = "utf-8") -> Console:
    """Make a console of this size that keeps what is printed."""
    file = TextIOWrapper(BytesIO(), encoding=encoding)
    return Console(file=file, width=columns, height=rows, force_terminal=True, color_system=None, legacy_windows=False)


def printed(there: Console) -> str:
    """Give what a console has printed, without the codes that move its cursor."""
    assert isinstance(there.file, TextIOWrapper)
    there.file.flush()
    there.file.seek(0)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", there.file.read())


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_board_shows_each_round_in_a_row(columns: int) -> None:
    """No row is wrapped or cut, nor is a header; the bytes past the server add up from round to round."""
    there = console(columns)
    there.print(board(contest(10, 3, 2), there))
    rows = [text.split() for text in printed(there).splitlines()]

    assert ["round", "accuracy", "plain", "Flower", "seconds", "the", "server", "so", "far"] in rows
    assert ["1", "0.0010", "0.5010", "0.1", "4.0", "kB", "1.5", "MB"] in rows
    assert ["2", "0.0020", "0.5020", "0.2", "4.0", "kB", "3.0", "MB"] in rows
    assert ["3", "0.0030", "0.3", "4.0", "kB", "4.5", "MB"] in rows
    assert ["gradsharding", "▁▁▁", "0.0030", "12.0", "kB", "4.5", "MB"] in rows
    assert ["plain", "Flower", "▅▅", "0.5020", "3.2", "MB"] in rows
    assert columns >= max(len(text) for text in printed(there).splitlines())


@pytest.mark.parametrize(("sliced", "plain"), [(0, 0), (1, 0), (40, 0), (100, 0), (100, 1), (100, 50), (100, 100)])
def test_board_of_many_rounds_fits_the_terminal(sliced: int, plain: int) -> None:
    """Of 100 rounds those around the round that has just ended are shown, and no more lines than a terminal of 24 has."""
    there = console(80)
    made = contest(100, sliced, plain)
    with there.capture() as captured:
        there.print(board(made, there, most_rows=there.height - BESIDE_ROWS))
    numbers = [int(found) for found in re.findall(r"^ +(\d+) +0\.\d{4}", captured.get(), re.MULTILINE)]

    assert 24 >= len(captured.get().splitlines()) + 2  # the line that says what goes on, and a blank one
    assert min(sliced, 24 - BESIDE_ROWS) == len(numbers)
    assert {plain or sliced} - {0} <= {*numbers}


def test_board_without_block_letters() -> None:
    """A terminal that shows ASCII only gets the numbers, and no bars."""
    there = console(80, encoding="ascii")
    there.print(board(contest(10, 3, 2), there))

    assert printed(there).isascii()
    assert ["gradsharding", "0.0030", "12.0", "kB", "4.5", "MB"] in [text.split() for text in printed(there).splitlines()]


def test_rounds_so_far_remain_after_an_interruption() -> None:
    """Ctrl-C leaves the rounds that have ended on the screen."""
    there = console(80)
    made = contest(10, 3, 0)
    with pytest.raises(KeyboardInterrupt), shown(made, there):
        raise KeyboardInterrupt
    last = [text.split()[:2] for text in printed(there).splitlines() if "MB" in text][-4:]

    assert [["1", "0.0010"], ["2", "0.0020"], ["3", "0.0030"], ["gradsharding", "▁▁▁"]] == last


def test_lines() -> None:
    """Elsewhere than in a terminal, each round is one line, which says what its row in the table would."""
    made = contest(10, 3, 2)

    assert "gradsharding, round  3: accuracy 0.0030, 0.3 s, 4.0 kB through the server, 4.5 MB past it so far" == line(made, made.sliced)
    assert "plain Flower, round  2: accuracy 0.5020, 0.1 s, 1.6 MB through the server" == line(made, made.plain)
    assert "gradsharding: 4.5 MB past the server, 12.0 kB through it; plain Flower: 3.2 MB through it" == totals(made)


def test_spark_ends_with_the_last_value() -> None:
    """However narrow it is, a spark line ends with the bar of the last round; numbers below 0 or above 1 do not occur."""
    shares = [i / 100 for i in range(101)]

    for width in (1, 2, 3, 50, 100, 101, 200):
        drawn = spark(shares, width)
        assert min(width, 101) == len(drawn)
        assert "█" == drawn[-1]
        assert sorted(drawn) == list(drawn)


def test_what_goes_on() -> None:
    """The line under the board names the round under way, and what takes long before and after."""
    names = [contest(2, *ended).doing for ended in ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2))]

    assert "starting" in names[0]
    assert ["gradsharding: round 2 of 2", "plain Flower: round 1 of 2", "plain Flower: round 2 of 2"] == names[1:4]
    assert "ending" in names[4]


@pytest.mark.parametrize(("name", "begins"), [("f.png", b"\x89PNG\r\n"), ("F.SVG", b"<?xml")])
def test_plot(tmp_path: Path, name: str, begins: bytes) -> None:
    """The figure is of the format that its name says, and shows both runs."""
    plot.check(tmp_path / name)
    plot.draw(contest(10, 10, 10), tmp_path / name)

    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("path", "remedy"), [("f.pdf", "end in .png or .svg"), ("none/f.png", "an existing directory"), ("d.png", "name a file")]
)
def test_plot_is_refused_before_anything_runs(path: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that could not be drawn or written is a mistake that the command names at once."""
    monkeypatch.chdir(tmp_path)
    Path("d.png").mkdir()
    ended = CliRunner().invoke(demo, ["--plot", path])

    assert isinstance(ended.exception, UserError)
    assert remedy in ended.exception.message
    assert "" == ended.output
    assert ["d.png"] == [found.name for found in tmp_path.iterdir()]


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where matplotlib is not installed, the command says how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python notes that there is none
    with pytest.raises(UserError, match="run: pip install matplotlib"):
        plot.check(tmp_path / "f.png")
