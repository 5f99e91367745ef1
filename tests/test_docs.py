"""The documents' programs run, and print what the documents say."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from pydantic import BaseModel

import pictures
import readme
from gradsharding.aws.functions.call import Event
from gradsharding.errors import GradShardingError
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Invocation, Job, Task, TaskReport, Term
from gradsharding.rounds.records import PlanRecord, Receipt, ResultRecord, RoundRecord
from gradsharding.running.pace import Share
from gradsharding.stores.lending import Offer, Permit, Piece
from gradsharding.stores.reading import Reading
from gradsharding.usage import Usage
from gradsharding_flower.permits import Offered
from gradsharding_flower.reference import Reference
from gradsharding_flower.testing import LocalGrid
from rigs.s3 import S3Server

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
BLOCK = re.compile(r"(?:^<!-- not run: (?P<note>[^\n]+) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS_S3 = "<!-- needs: an S3 server -->"
"""A page with this line runs with an S3 server, and the bucket ``my-bucket``, in its environment."""

SHOWN = {"text", "diff", "toml", "ini", "pycon"}
"""Languages of blocks that are not programs."""


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str
    note: str | None
    """Why it is not run."""
    output: str | None
    """The text block that follows a program at once."""


def blocks(document: str) -> list[Block]:
    """Read the fenced blocks of a document."""
    text = (ROOT / document).read_text()
    found = list(BLOCK.finditer(text))
    following = [*found, None][1:]
    return [
        Block(
            one["language"],
            one["text"],
            one["note"],
            after["text"] if after and after["language"] == "text" and not text[one.end() : after.start()].strip() else None,
        )
        for one, after in zip(found, following, strict=True)
    ]


def assert_printed(expected: str, printed: str) -> None:
    """Compare what was printed; ``…`` stands for any text, and alone on a line for any lines."""
    lines = [re.escape(line.rstrip()).replace("…", ".*") for line in expected.splitlines()]
    pattern = "\n".join("(?s:.*)" if line == ".*" else line for line in lines)
    assert re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.splitlines())), f"expected:\n{expected}\nprinted:\n{printed}"


def run_python(block: Block, namespace: dict[str, object]) -> None:
    """Run a program, and compare its output with the text block that follows."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, "document", "exec"), namespace)  # noqa: S102 - our own document

    assert_printed(block.output or "", printed.getvalue())


def run_console(block: Block) -> None:
    """Run each command of a session (``$ …``), and compare what it prints."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    commands = re.findall(r"^\$ ((?:[^\n]*\\\n)*[^\n]*)\n((?:(?!\$ )[^\n]*\n)*)", block.text, re.MULTILINE)
    assert commands
    for command, expected in commands:
        ended = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
        )

        assert_printed(expected, ended.stdout)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(block.language in ("python", "console") for block in blocks(name))])
def test_programs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The programs and sessions of a document run from top to bottom, in one directory, and print what it says."""
    monkeypatch.chdir(tmp_path)
    if NEEDS_S3 in (ROOT / document).read_text():
        lead_to_s3(request.getfixturevalue("moto"), monkeypatch)
    namespace: dict[str, object] = {"__name__": "document"}
    for block in blocks(document):
        if block.note is None and block.language == "python":
            run_python(block, namespace)
        elif block.note is None and block.language == "console":
            run_console(block)


def lead_to_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the environment lead to a server, on which ``my-bucket`` is empty."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    import boto3  # noqa: PLC0415 - pages without S3 do without it

    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="my-bucket")
    for found in client.list_objects_v2(Bucket="my-bucket").get("Contents", []):
        client.delete_object(Bucket="my-bucket", Key=found["Key"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs_or_says_which_test_runs_the_same(document: str) -> None:
    """A block is a program that runs, or names a test or .ci/run that does the same, or is not a program."""
    assert (ROOT / document).read_text().count("\n```") == 2 * len(blocks(document)), "a block has no language, or is not closed"
    for block in blocks(document):
        if block.language in SHOWN:
            continue
        if block.language == "json":
            json.loads(block.text)
            continue
        assert block.language in ("python", "console", "sh"), f"{block.language} is not a language of the documents"
        if block.note is None:
            assert block.language != "sh", f"no test runs this, and it names none:\n{block.text}"
        else:
            named = re.findall(r"tests/[\w/]+\.py|\.ci/run", block.note)
            assert named, f"{block.note!r} names no test"
            assert [] == [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Each file that a document links to is there."""
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)

    assert [] == [link for link in links if not ((ROOT / document).parent / link).exists()]


def test_readme_is_short() -> None:
    """The README has at most 120 lines."""
    assert len(README.read_text().splitlines()) <= 120


def test_figures_come_from_the_result_files() -> None:
    """The documents' figures are what ``benchmarks/readme.py`` and ``benchmarks/pictures.py`` write from the committed results."""
    assert readme.BEGIN + readme.beside_flower() + readme.END in README.read_text()
    assert readme.BEGIN + readme.section() + readme.END in readme.PAGE.read_text()
    for name in pictures.PICTURES:
        assert pictures.drawn(name) == (pictures.RESULTS / f"{name}.svg").read_text()


def test_environment_variables_are_documented() -> None:
    """The page of environment variables has each one that the code reads."""
    files = [path for folder in ("gradsharding", "strategies", "deploy") for path in (ROOT / folder).rglob("*")]
    sources = [path.read_text() for path in files if path.is_file() and path.suffix in (".py", ".yaml", ".sbatch", "")]
    ours, literal = r"\b_?GRADSHARDING_[A-Z0-9_]*[A-Z0-9]\b", r'environ(?:\.get\(|\[)"(\w+)"'
    read = {name for source in sources for pattern in (ours, literal) for name in re.findall(pattern, source)}
    described = set(re.findall(r"`(_?[A-Z][A-Z0-9_]+)[`=]", (ROOT / "docs/reference/environment.md").read_text()))
    prefixes = {name for name in read if any(other.startswith(f"{name}_") for other in described)}

    assert read - prefixes <= described


def test_every_error_is_in_the_tree() -> None:
    """The page of errors shows the tree at the head of ``errors.py``, which has each of them."""
    tree = importlib.import_module("gradsharding.errors").__doc__ or ""

    assert [] == [
        kind.__name__ for kind in kinds(GradShardingError) if kind.__module__ == "gradsharding.errors" and kind.__name__ not in tree
    ]


def kinds(kind: type[GradShardingError]) -> Iterator[type[GradShardingError]]:
    """Give a kind of error, and all below it."""
    yield kind
    for child in kind.__subclasses__():
        yield from kinds(child)


SUBJECTS = {
    "advice",
    "arithmetic",
    "cli",
    "deploy",
    "documents",
    "flower",
    "format",
    "lambda",
    "planning",
    "rounds",
    "running",
    "s3",
    "stores",
    "tests",
}


@pytest.mark.parametrize("policy", ["aggregator", "node"])
def test_policies_are_shown_in_full(policy: str) -> None:
    """The guide to IAM shows the policies as they are."""
    shown = [json.loads(block.text) for block in blocks("docs/how-to/iam.md") if block.language == "json"]

    assert json.loads((ROOT / "deploy" / "policies" / f"{policy}.json").read_text()) in shown


def test_decisions_are_dated() -> None:
    """A decision has its title; its date, with which its name begins, and its subject; and a reason."""
    for path in (ROOT / "docs" / "decisions").glob("2*.md"):
        title, blank, dated, *reason = path.read_text().split("\n")
        date, subject = dated.split(", ")

        assert title.startswith("# ")
        assert ("", path.name[:10]) == (blank, date)
        assert subject in SUBJECTS
        assert any(reason)


def applied(diff: str, file: str) -> str:
    """Give a file of tests/flower_quickstart with the README's changes."""
    (changes,) = re.findall(rf"^\+\+\+ {file}\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE)
    source = (ROOT / "tests" / "flower_quickstart" / file).read_text()
    for hunk in re.split(r"^@@.*\n", changes, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] != dropped) for dropped in "+-")
        assert source.count(old) == 1, f"Flower's quickstart has no such lines:\n{old}"
        source = source.replace(old, new)
    return source


def made(source: str, name: str) -> ModuleType:
    """Make a module of its text."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - ours
    return module


@pytest.mark.slow
def test_flower_quickstart_with_the_diff(tmp_path: Path) -> None:
    """The README's diff turns Flower's quickstart into one whose updates go to the store, and whose model is the same."""
    (diff,) = (block.text for block in blocks("README.md") if block.language == "diff")
    edit: Callable[[str], str] = lambda file: applied(diff, file).replace("file:///shared/updates", tmp_path.as_uri())  # noqa: E731

    def model(server: str, client: str) -> list[npt.NDArray[Any]]:
        torch.manual_seed(7)
        server_app, client_app = made(server, "server_app").app, made(client, "client_app").app
        assert isinstance(server_app, ServerApp)
        assert isinstance(client_app, ClientApp)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"fraction-evaluate": 0.0})
        server_app(LocalGrid(dict.fromkeys((1, 2, 3), client_app)), context)
        return context.state.array_records["model"].to_numpy_ndarrays()

    plain = model(*((ROOT / "tests" / "flower_quickstart" / file).read_text() for file in ("server_app.py", "client_app.py")))
    wrapped = model(edit("server_app.py"), edit("client_app.py"))

    assert [*tmp_path.glob("results/*.safetensors")]
    for expected, actual in zip(plain, wrapped, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


RECORDS: tuple[type[BaseModel], ...] = (
    RoundRecord, Receipt, Manifest, Term, PlanRecord, ResultRecord, Event, Share, Job, Task, Reading, TaskReport, Usage, Invocation,
    Reference, Offered, Offer, Piece, Permit,
)  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_formats_are_documented(record: type[BaseModel]) -> None:
    """The page of formats has each field of each record and message, and no other."""
    page = (ROOT / "docs/reference/formats.md").read_text()
    (section,) = re.findall(rf"^### {record.__name__}\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    described = [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]

    assert sorted(record.model_fields) == sorted(described)
