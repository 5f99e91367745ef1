"""Text for people: paragraphs, tables and labelled lines that fit a terminal of 80 columns or more. No cell is ever cut off."""

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence

PLAIN_WIDTH = 80
"""Columns where standard output is not a terminal, so that its text is the same everywhere."""

MAX_WIDTH = 100
"""Columns of a paragraph in a wide terminal: longer lines are hard to read."""


def columns() -> int:
    """Return the number of columns to write in."""
    if sys.stdout is None or not sys.stdout.isatty():  # None where it was closed before the program began
        return PLAIN_WIDTH
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns


def paragraph(text: str, indent: str = "", first: str = "") -> str:
    """Wrap text at spaces; a longer word, such as a path, has a line of its own. ``first`` begins the first line, ``indent`` the others."""
    return textwrap.fill(
        text, min(MAX_WIDTH, columns()), initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def labelled(rows: Collection[tuple[str, str]]) -> str:
    """Lay out texts beside their labels, one below the other."""
    wide = max(len(label) for label, _ in rows)
    return "\n".join(paragraph(text, " " * (wide + 4), f"  {label:<{wide}}  ") for label, text in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "<") -> Iterator[str]:
    """Lay out a table, one line for each row below the header. ``align`` has "<" or ">" for each column; the columns after them are ">"."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for i, row in enumerate((header, ["-" * width for width in widths], *rows)):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align.ljust(len(widths), ">"), widths, strict=True)]
        yield ("--" if i == 1 else "  ").join(cells).rstrip()
