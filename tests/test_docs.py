"""The README's programs run, and print what the README says."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import readme

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCK = re.compile(r"(?P<note><!-- not run: [^\n]+ -->\n)?```python\n(?P<code>.*?)```\n(\n```text\n(?P<output>.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("block", [found for found in BLOCK.finditer(README) if not found["note"]])
def test_readme_program_prints_what_the_readme_says(block: re.Match[str]) -> None:
    """A Python block of the README runs as it stands and prints the text block that follows it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block["code"], "README.md", "exec"), {"__name__": "readme"})  # noqa: S102 - our own README

    assert block["output"] == printed.getvalue()


def test_readme_session_is_what_the_command_prints() -> None:
    """A console block of the README shows what its command prints, to the letter but for spaces at the ends of lines."""
    sessions = re.findall(r"```console\n\$ gradsharding ([^\n]+)\n(.*?)```", README, re.DOTALL)
    assert sessions
    for arguments, expected in sessions:
        command = [sys.executable, "-m", "gradsharding", *shlex.split(arguments)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

        assert [line.rstrip() for line in expected.splitlines()] == [line.rstrip() for line in printed.splitlines()]


def test_every_block_runs_or_says_why_not() -> None:
    """No Python block of the README escapes the test above without a reason."""
    blocks = list(BLOCK.finditer(README))

    assert README.count("```python") == len(blocks)
    assert any(not block["note"] for block in blocks)


def test_readme_figures_come_from_the_result_files() -> None:
    """The README's figures are what ``benchmarks/readme.py`` writes from the committed results."""
    assert readme.BEGIN + readme.section() + readme.END in README


def test_documents_do_not_name_missing_files() -> None:
    """Each file that the README links to is there."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)

    assert [] == [link for link in links if not (Path(__file__).parent.parent / link).exists()]
