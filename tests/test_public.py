"""What is public is what is meant to be, and the core imports no more than it says."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradsharding

ROOT = Path(__file__).parents[1]
EDGES = {"gradsharding.__main__", "gradsharding.aws", "gradsharding.cli", "gradsharding.testing"}
FOREIGN = {"aiobotocore", "boto3", "botocore", "click", "flwr", "hypothesis", "pytest", "rich", "safetensors", "torch"}


FOLDERS = ("gradsharding", "strategies", "benchmarks", "tests/rigs", "docs")
VAGUE = {"what", "told", "one", "some", "how", "said", "had"}
"""Names that do not say what a value is."""


def loaded(program: str) -> set[str]:
    """Run a program in a fresh process; give the modules that are loaded at its end."""
    script = f"import sys\n{program}\nprint(*sys.modules)"
    return {*subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()}


def test_all() -> None:
    """``__all__`` lists the public names in order; what type checkers read and what is imported on first use are the same."""
    for_checkers = {
        alias.name: node.module
        for node in ast.walk(ast.parse(Path(gradsharding.__file__).read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if str(node.module).startswith("gradsharding.")
    }

    assert sorted(gradsharding._HOMES) == gradsharding.__all__
    assert for_checkers == gradsharding._HOMES
    assert {*gradsharding.__all__} <= {*dir(gradsharding)}


def test_unknown_name() -> None:
    """A name that is not public is no attribute, and the error says so as Python's own does."""
    with pytest.raises(AttributeError, match="module 'gradsharding' has no attribute 'nothing'"):
        getattr(gradsharding, "nothing")  # noqa: B009 - a type checker refuses it
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'gradsharding'"):
        exec("from gradsharding import nothing")  # noqa: S102 - the same


def test_imported_on_first_use() -> None:
    """The package alone loads none of its modules, no numpy and no pydantic; each name loads what it needs when it is used."""
    idle, used = loaded("import gradsharding"), loaded("from gradsharding import Limits")

    assert {"gradsharding"} == {name for name in idle if name.partition(".")[0] in {"gradsharding", "numpy", "pydantic"}}
    assert "gradsharding.planning.plan" in used
    assert "gradsharding.rounds.aggregate" not in used


@pytest.mark.parametrize("name", gradsharding.__all__)
def test_documented(name: str) -> None:
    """Every public name has a docstring of its own."""
    thing = getattr(gradsharding, name)

    assert thing.__doc__
    assert inspect.getdoc(thing) not in {inspect.getdoc(base) for base in getattr(thing, "__bases__", ())}


def test_core_imports() -> None:
    """All modules of the core together import no framework, no cloud, no test tool: numpy and pydantic, no more."""
    names = [module.name for module in pkgutil.walk_packages(gradsharding.__path__, "gradsharding.")]
    core = {name for name in names if ".".join(name.split(".")[:2]) not in EDGES}
    found = loaded(f"import importlib\nfor name in {sorted(core)}: importlib.import_module(name)")

    assert {"gradsharding.advice.planner", "gradsharding.running.worker", "gradsharding.errors"} < core <= found
    assert set() == FOREIGN & found


def test_testing_imports() -> None:
    """The module for testing needs pytest, and neither hypothesis nor a framework."""
    assert {"pytest"} == FOREIGN & loaded("import gradsharding.testing")


def test_laws() -> None:
    """Every module opens with a sentence that says what it is."""
    for path in Path(gradsharding.__path__[0]).rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def bound(node: ast.AST) -> str | None:
    """Return the name of the parameter or variable that a node binds; None if it binds none."""
    match node:
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
            return name
        case ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
            return name
        case ast.alias(asname=name):
            return name
    return None


def test_names_say_what_they_are() -> None:
    """No parameter or variable has a name that could mean anything."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no pyproject.toml here: these tests run outside the checkout")
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    vague = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {bound(node)}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if bound(node) in VAGUE and hasattr(node, "lineno")
    ]

    assert {*FOLDERS} == {folder for folder in FOLDERS for path in paths if path.is_relative_to(ROOT / folder)}
    assert [] == vague


def test_import_contracts() -> None:
    """The contracts of pyproject.toml, layers and forbidden imports, are kept."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no pyproject.toml here: these tests run outside the checkout")
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", script, "--no-cache"], cwd=ROOT, check=False, capture_output=True, text=True)

    assert (0, True) == (done.returncode, "0 broken" in done.stdout), done.stdout + done.stderr
