"""What is public is what is meant to be, and the core imports no more than it says."""

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradsharding

ROOT = Path(__file__).parents[1]
EDGES = {"gradsharding.__main__", "gradsharding.aws", "gradsharding.cli.main", "gradsharding.cli.plan", "gradsharding.testing"}
FOREIGN = {"aiobotocore", "boto3", "botocore", "click", "flwr", "hypothesis", "pytest", "rich", "safetensors", "torch"}


def test_all() -> None:
    """``__all__`` is every visible name that is not a module, in order."""
    visible = [name for name, value in vars(gradsharding).items() if not name.startswith("_") and not inspect.ismodule(value)]

    assert sorted(visible) == gradsharding.__all__


@pytest.mark.parametrize("name", gradsharding.__all__)
def test_documented(name: str) -> None:
    """Every public name has a docstring of its own."""
    thing = getattr(gradsharding, name)

    assert thing.__doc__
    assert inspect.getdoc(thing) not in {inspect.getdoc(base) for base in getattr(thing, "__bases__", ())}


def test_core_imports() -> None:
    """All modules of the core together import no framework, no cloud, no test tool: numpy and pydantic, no more."""
    modules = {module.name for module in pkgutil.iter_modules(gradsharding.__path__, "gradsharding.")} - EDGES
    script = f"import importlib, sys\nfor name in {sorted(modules)}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()

    assert modules <= {*loaded}
    assert set() == FOREIGN & {*loaded}


def test_testing_imports() -> None:
    """The module for testing needs pytest, and neither hypothesis nor a framework."""
    script = "import gradsharding.testing, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()

    assert {"pytest"} == FOREIGN & {*loaded}


def test_laws() -> None:
    """Every module opens with a sentence that says what it is."""
    for path in Path(gradsharding.__path__[0]).rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def test_import_contracts() -> None:
    """The contracts of pyproject.toml, layers and forbidden imports, are kept."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no pyproject.toml here: these tests run outside the checkout")
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", script, "--no-cache"], cwd=ROOT, check=False, capture_output=True, text=True)

    assert (0, True) == (done.returncode, "0 broken" in done.stdout), done.stdout + done.stderr
