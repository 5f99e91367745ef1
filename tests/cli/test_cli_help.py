"""``--help``, and the commands of other packages."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradsharding.cli.main import COMMANDS
from rigs.command import (
    done,
    gradsharding,
)

ROOT = Path(__file__).parents[2]


OURS = {name: listed for rows in COMMANDS.values() for name, listed in rows.items()}


LIGHT = {name: listed for name, listed in OURS.items() if name != "demo"}
"""All commands but the one that imports Flower and torch."""


@pytest.mark.parametrize("name", LIGHT)
def test_every_command_has_help(call: Callable[..., str], name: str) -> None:
    """A command's help begins with its purpose, as ``gradsharding --help`` lists it; it has examples, and fits 80 columns."""
    usage, purpose = call(name, "--help").split("\n\n", 2)[:2]
    said = call(name, "--help")

    assert usage.startswith(f"Usage: gradsharding {name} ")
    assert f"  {LIGHT[name].purpose}" == purpose
    assert "  Examples:\n    gradsharding " in said
    assert [] == [line for line in said.splitlines() if len(line) > 80]


def test_purposes_are_those_of_the_commands() -> None:
    """The purpose of each listed command is the first line of its docstring, which is read here without importing it."""
    for listed in OURS.values():
        module, _, attribute = listed.target.partition(":")
        file = next(path for root in (ROOT, ROOT / "strategies") if (path := root / f"{module.replace('.', '/')}.py").exists())
        docstrings = {
            node.name: ast.get_docstring(node) or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
        }

        assert listed.purpose == docstrings[attribute].splitlines()[0]


def test_help_lists_every_command_on_one_line(call: Callable[..., str]) -> None:
    """``--help`` gives each command one line, with its purpose, within 80 columns."""
    lines = call("--help").splitlines()

    for name, listed in OURS.items():
        assert 1 == sum(line.split() == [name, *listed.purpose.split()] for line in lines)
    assert [] == [line for line in lines if len(line) > 80]


def test_help_imports_no_command(tmp_path: Path) -> None:
    """``--help`` imports none of the commands, and nothing that they need."""
    script = "import sys; from gradsharding.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    heavy = {"boto3", "flwr", "numpy", "pydantic", "rich", "torch"} | {f"gradsharding.{room}" for room in ("aws", "planning", "rounds")}

    assert set() == heavy & {*run.stderr.split()}


def test_version(call: Callable[..., str]) -> None:
    """--version tells it."""
    assert call("--version").startswith("gradsharding, version ")


def contribute(site: Path, command: str, module: str, source: str) -> None:
    """Install a package that contributes one command, as pip would: a module and its metadata."""
    info = site / f"{module}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\nSummary: Says hello.\n")
    (info / "entry_points.txt").write_text(f"[gradsharding.commands]\n{command} = {module}:main\n")
    (site / f"{module}.py").write_text(source)


HELLO = """
import click, pathlib
pathlib.Path("imported").touch()
@click.command()
@click.option("--name", default="world")
def main(name: str) -> None:
    "Greet."
    click.echo(f"hello {name}")
"""


def test_other_packages_contribute_commands(tmp_path: Path) -> None:
    """A command of another package is listed without being imported, and runs with its own options and help."""
    contribute(tmp_path / "site", "hello", "hello_package", HELLO)
    path = f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"

    assert "hello  Says hello. (hello_package)\n" in done(gradsharding("--help", cwd=tmp_path, PYTHONPATH=path))
    assert not (tmp_path / "imported").exists()
    assert "hello you\n" == done(gradsharding("hello", "--name", "you", cwd=tmp_path, PYTHONPATH=path))
    assert "Greet." in done(gradsharding("hello", "--help", cwd=tmp_path, PYTHONPATH=path))


def test_contributed_command_without_its_packages(tmp_path: Path) -> None:
    """A command whose packages are missing says which extra to install."""
    contribute(tmp_path, "show", "gradsharding_shows", "import package_that_nobody_has")

    run = gradsharding("show", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    assert (2, "", 1) == (run.returncode, run.stdout, run.stderr.count("\n"))
    assert "package_that_nobody_has" in run.stderr
    assert "install gradsharding_shows" in run.stderr
