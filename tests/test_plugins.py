"""Stores and executors of other packages are found by name, and go wherever our own go."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gradsharding import open_executor, open_store
from gradsharding.errors import UserError
from gradsharding.plugins import EXECUTORS, OURS, STORES, find, names
from gradsharding.testing import assert_same, reference_mean

ROOT = Path(__file__).parents[1]

STORE = '''
from gradsharding.stores.charges import Charges
from gradsharding.stores.directory import DirectoryStore

class Mem2(DirectoryStore):
    """Objects of ``mem2://NAME/...`` are files below the directory that MEM2 names."""

    charges = Charges(kind="mem2")

    def __init__(self, url):
        import os
        super().__init__(os.path.join(os.environ["MEM2"], url.removeprefix("mem2://")))
        self.url = url
'''

EXECUTOR = '''
from gradsharding.running.executors import GivenLimits
from gradsharding.running import worker

class Backwards(GivenLimits):
    """Runs tasks in this process, and says so."""

    def __init__(self, rest, *, concurrency=None):
        self.rest, self.concurrency = rest, concurrency

    def run(self, tasks, job, store, limits, progress):
        print(f"backwards {self.rest} {self.concurrency}: {len(tasks)} tasks in {store.url}")
        reports = [worker.run(task, job, store, unmeasured="it ran in the calling process") for task in tasks]
        for report in reports:
            progress(report)
        return reports
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Install a package that brings a store and an executor: a module, and the metadata that pip would write."""
    site = tmp_path / "site"
    info = site / "mem2-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mem2.py").write_text(STORE + EXECUTOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mem2\nVersion: 1.0\n")
    stores = "[gradsharding.stores]\nmem2 = mem2:Mem2\ns3 = mem2:Mem2\nlost = mem2_extras:Lost\n"
    (info / "entry_points.txt").write_text(f"{stores}\n[gradsharding.executors]\nbackwards = mem2:Backwards\n")
    return site


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package is installed."""
    path = os.pathsep.join([str(site), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "MEM2": str(site.parent / "mem2")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_command(site: Path, tmp_path: Path) -> None:
    """The command line averages updates that lie in a package's store, by a package's executor, and keeps its round in that store."""
    updates = {name: ({"w": np.arange(12, dtype="f4") * i}, i) for i, name in enumerate(("ann", "bob"), 1)}
    (tmp_path / "mem2/in").mkdir(parents=True)
    for name, (arrays, _) in updates.items():
        safetensors.numpy.save_file(arrays, tmp_path / f"mem2/in/{name}.safetensors")
    given = ["mem2://in/ann.safetensors:1", "mem2://in/bob.safetensors:2", "-o", "mem2://out/mean.safetensors"]
    command = ["-m", "gradsharding", "aggregate", *given, "--store", "mem2://rounds", "--executor", "backwards:x"]
    done = run(site, *command, "--concurrency", "3", "--shards", "2")

    assert (0, "") == (done.returncode, done.stderr)
    assert "backwards x 3: 2 tasks in mem2://rounds" in done.stdout
    assert_same(reference_mean(updates), safetensors.numpy.load_file(tmp_path / "mem2/out/mean.safetensors"))
    assert [*(tmp_path / "mem2/rounds/rounds").glob("*/result.json")]


def test_processes_and_functions(site: Path) -> None:
    """Worker processes open a package's store themselves; a Lambda function's code has none of it, which is said before anything runs."""
    program = """
import numpy as np
from gradsharding import Round, aggregate, open_executor, open_store
from gradsharding.aws.functions import executor
round_ = Round.create(open_store("mem2://r"), "r")
round_.submit("ann", {"w": np.ones(4, "f4")}, 1)
print(aggregate(round_, executor=open_executor("processes:1")).arrays()["w"].tolist())
executor.LambdaExecutor("f")
executor._check_reach("mem2://r", round_.store)
"""
    done = run(site, "-c", program)

    assert "[1.0, 1.0, 1.0, 1.0]\n" == done.stdout
    assert "UserError: mem2://r cannot be reached by Lambda functions; use an s3:// store" in done.stderr


def test_listed_where_nothing_is_known(site: Path) -> None:
    """A message that says what there is names what packages bring; one that cannot be imported names the package."""
    program = "import gradsharding, sys; getattr(gradsharding, sys.argv[1])(sys.argv[2])"
    asked = (("open_store", "ftp://a"), ("open_executor", "nothing:3"), ("open_store", "lost://a"))
    said = [run(site, "-c", program, *words).stderr.splitlines()[-1] for words in asked]

    assert said[0].endswith("or a directory's path, or a URL of lost, mem2")
    assert said[1].endswith("use inline, processes:N, threads:N or lambda:FUNCTION, or backwards")
    assert said[2].endswith("lost needs more than is installed here (No module named 'mem2_extras'); install mem2")


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("raise RuntimeError('no licence')", r"broken fails while it is imported \(RuntimeError: no licence\); repair or uninstall broken"),
        ("def (", r"broken fails while it is imported \(SyntaxError: .*\); repair or uninstall broken"),
        ("Store = 7", "broken names an object of type int, which cannot be called; repair or uninstall broken"),
    ],
)
def test_broken_package(tmp_path: Path, module: str, says: str) -> None:
    """Whatever a package's module does when it is imported, the error is the user's to mend, and names the package."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (tmp_path / "broken_module.py").write_text(module)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gradsharding.stores]\nbroken = broken_module:Store\n")
    failed = run(tmp_path, "-c", "import gradsharding; gradsharding.open_store('broken://a')")

    assert re.search(f"UserError: {says}", failed.stderr)


def test_looked_up_once(site: Path) -> None:
    """The installed packages are looked through once for each name, and not for each reference to an object."""
    program = """
from importlib import metadata
from gradsharding import MemoryStore, plugins
from gradsharding.stores.urls import locate
asked = []
plugins.entry_points = lambda **names: asked.append(names) or metadata.entry_points(**names)
for i in range(5):
    locate(f"mem2://a/{i}", MemoryStore())
print(len(asked))
"""
    assert "1\n" == run(site, "-c", program).stdout


def test_our_names_are_ours(site: Path) -> None:
    """No package can take one of our names; two packages that bring the same name are both refused, by name."""
    other = site / "mem3-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: mem3\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[gradsharding.stores]\nmem2 = mem3:Mem2\n")
    program = "import sys; from gradsharding import open_store; print(type(open_store(sys.argv[1])).__module__)"

    assert "gradsharding.aws.s3.store\n" == run(site, "-c", program, "s3://bucket").stdout
    assert (
        "mem2 and mem3 both bring 'mem2' (gradsharding.stores); uninstall all but one of them"
        in run(site, "-c", program, "mem2://a").stderr
    )


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, ours in OURS.items() for name in ours])
def test_ours(group: str, name: str) -> None:
    """Each of our own can be imported, and the package's metadata declares the same."""
    assert callable(find(group, name))
    assert name in names(group)
    if (project := ROOT / "pyproject.toml").exists():  # these tests also run outside the checkout
        assert OURS[group] == tomllib.loads(project.read_text())["project"]["entry-points"][group]


def test_unknown() -> None:
    """What nobody brings is None, and is refused with what there is."""
    assert (None, None) == (find(STORES, "ftp"), find(EXECUTORS, "ftp"))
    with pytest.raises(UserError, match="no store is known for 'ftp://a'; use file:///directory, "):
        open_store("ftp://a")
    with pytest.raises(UserError, match="no executor is known for 'ftp:a'; use inline, "):
        open_executor("ftp:a")


@pytest.mark.parametrize("spec", ["processes:0", "processes:-1", "processes:many", "threads:x", "threads:10000"])
def test_number_of_workers(spec: str) -> None:
    """A number of workers that cannot be is refused with those that can."""
    with pytest.raises(
        UserError, match=rf"^{spec} names no number of workers; use a number from 1 to 9,999, such as {spec.split(':', maxsplit=1)[0]}:4$"
    ):
        open_executor(spec)
