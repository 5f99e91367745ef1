"""A function's code is what was asked for, byte for byte, wherever it is built; and what is not is refused."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import boto3
import click
import pytest
from botocore.session import get_session

import gradsharding
from gradsharding.aws.deploy import bundle as bundles
from gradsharding.aws.deploy import wheels as wheeling
from gradsharding.aws.deploy.bundle import GIVEN, WANTED, Bundle, build, ours, probe
from gradsharding.aws.deploy.code import zipped
from gradsharding.aws.deploy.commands import deploy
from gradsharding.aws.deploy.wheels import MACHINES, PACKAGES, fetch, installed, listed
from gradsharding.errors import UserError
from gradsharding.planning.platform import DEPLOYED_RUNTIME, RUNTIMES
from rigs.lambdas import LocalFunction, LocalLambda

ROOT = Path(__file__).parents[1]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HERE = {"aarch64": "arm64"}.get(os.uname().machine, os.uname().machine), PYTHON
NOT_HERE = None if f"python{PYTHON}" in RUNTIMES else f"Lambda has no Python {PYTHON}"
ALL = [(architecture, name) for name in RUNTIMES for architecture in MACHINES]

pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=str(NOT_HERE))

Index = Callable[[Path], None]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip's index gives for a function like this machine; a directory that pip takes for an index."""
    directory = tmp_path_factory.mktemp("wheels")
    fetch(directory, RUNTIMES[f"python{PYTHON}"], HERE[0])
    return directory


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    """Make a directory of wheels pip's only index, by pip's own settings; what it holds then is what is listed."""

    def use(directory: Path) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
        lines = [f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}\n" for wheel in directory.glob("*.whl")]
        (tmp_path / "wheels.txt").write_text("".join(lines))
        monkeypatch.setattr(wheeling, "LIST", tmp_path / "wheels.txt")

    return use


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Bundle:
    """The function's code, for this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        return build(tmp_path_factory.mktemp("bundle"), *HERE)


def _command(*words: str | Path, python: str | Path = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "gradsharding.aws.deploy.bundle", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **env})


def test_bundle_holds_what_the_function_needs(bundle: Bundle) -> None:
    """A fresh process imports the handler from the bundle, and nothing that is in neither the bundle nor the Lambda runtime."""
    seen = probe(bundle)
    print(f"{bundle.unzipped / 1e6:.1f} MB unzipped; import {seen.seconds:.2f} s, {seen.resident / 1e6:.1f} MB resident")  # noqa: T201 - pytest -s

    assert {"numpy", "pydantic", "boto3"} <= seen.imports <= GIVEN | WANTED
    assert 0 < seen.seconds
    assert 20e6 < seen.resident < 100e6
    assert {path.name for path in bundle.directory.iterdir() if not path.name.endswith(".dist-info")} <= WANTED | {
        "bundle.json",
        "numpy.libs",
        "typing_extensions.py",
    }


class Finder(ModuleFinder):
    """Follows imports of our own by reading the code, those within functions too."""

    def import_hook(self, name: str, caller: Any = None, fromlist: Any = None, level: int = -1) -> Any:
        """Pass over what is not ours, and the package's public names, which nothing imports before they are used."""
        ours = name.partition(".")[0] == "gradsharding" and not (caller and caller.__name__ == "gradsharding")
        return super().import_hook(name, caller, fromlist, level) if ours else None


def test_bundle_holds_what_its_code_imports() -> None:
    """Its folders hold all that the handler and S3's store import, within functions too, and nothing that stands above a function."""
    entries = "gradsharding.aws.functions.handler", "gradsharding.aws.s3.store"
    finder = Finder(path=[str(ROOT)])
    for entry in entries:
        finder.import_hook(entry)
    program = f"import sys, {', '.join(entries)}; print(*(name for name in sys.modules if name.startswith('gradsharding')))"
    loaded = {*subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()}
    taken = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in ours()}

    assert {*entries} < loaded <= {*finder.modules} <= taken
    assert not [name for name in taken if re.match(r"gradsharding\.(cli|testing|advice|rounds|aws\.deploy)\b", name)]


def test_cold_start_loads_no_more_than_a_task_takes() -> None:
    """A function loads neither plans nor what stands above them, and no other store than that of its job."""
    program = "import sys, gradsharding.aws.functions.handler, gradsharding.aws.s3.store; print(*sys.modules)"
    loaded = {*subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()}
    rooms = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("gradsharding.")}

    assert not rooms & {f"gradsharding.{room}" for room in ("advice", "cli", "rounds", "testing")}
    assert not loaded & {f"gradsharding.planning.{name}" for name in ("manifest", "plan", "projection", "slices", "topologies")}
    assert not loaded & {f"gradsharding.{name}" for name in ("stores.directory", "stores.memory", "format.header", "running.executors")}


def test_bundle_has_the_callers_versions(bundle: Bundle) -> None:
    """Packages are those of the caller's environment; numpy is another only where its wheel is too new for the runtime, which is said."""
    differing = {name for name, has in bundle.versions.items() if has != metadata.version(name)}

    assert {"numpy", "pydantic", "pydantic_core"} <= bundle.versions.keys()
    assert differing <= (set() if RUNTIMES[f"python{PYTHON}"].glibc >= 28 else {"numpy"})
    assert bool(differing) == (f"numpy {bundle.versions['numpy']} (here it is {metadata.version('numpy')})" in bundle.described())


@pytest.mark.slow
def test_deployed_runtime_has_the_callers_versions(tmp_path: Path) -> None:
    """For what ``deploy`` puts up by default, each wheel has the version that is installed here."""
    found = fetch(tmp_path, RUNTIMES[DEPLOYED_RUNTIME], "arm64")

    assert installed() == {wheel.package: wheel.version for wheel in found}


def test_bundle_says_what_it_is_made_of(bundle: Bundle, wheels: Path) -> None:
    """``bundle.json`` names version, runtime and wheels, and digests that coreutils find, too."""

    def shell(words: str, cwd: Path) -> str:
        return subprocess.run(["sh", "-c", words], cwd=cwd, capture_output=True, check=True, text=True).stdout

    names, digest = "find . -type f ! -name bundle.json -printf '%P\\n' | LC_ALL=C sort", "xargs -d '\\n' sha256sum | sha256sum"
    label = bundle.label

    assert gradsharding.__version__ == label["gradsharding"]["version"]
    assert f"{label['gradsharding']['sha256']}  -\n" == shell(f"{names} | grep ^gradsharding/ | {digest}", bundle.directory)
    assert f"{label['sha256']}  -\n" == shell(f"{names} | {digest}", bundle.directory)
    assert (f"python{PYTHON}", HERE[0]) == (label["runtime"], label["architecture"])
    assert shell("LC_ALL=C sha256sum *", wheels) == "".join(f"{wheel['sha256']}  {wheel['file']}\n" for wheel in label["wheels"])
    assert {name.replace("_", "-"): version for name, version in bundle.versions.items()} == {
        wheel["package"]: wheel["version"] for wheel in label["wheels"]
    }


def test_bundle_is_the_same_everywhere(bundle: Bundle, wheels: Path, tmp_path: Path) -> None:
    """Another process, directory, time, time zone and umask give the same zip; all may read what is in it."""
    one, two, other = tmp_path / "one.zip", tmp_path / "two.zip", tmp_path / "a" / "b"
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    program = "from pathlib import Path; from gradsharding.aws.deploy.bundle import build; "
    program += f"build(Path({str(other)!r}), *{HERE}).zip(Path({str(two)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, umask=0o077, env={**os.environ, **env})
    entries = zipfile.ZipFile(two).infolist()

    assert bundle.zip(one) == one.stat().st_size
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()
    assert {0o100644} == {entry.external_attr >> 16 for entry in entries}
    assert {0o755, 0o644} == {path.stat().st_mode & 0o777 for path in other.rglob("*")}
    assert bundle.unzipped == sum(entry.file_size for entry in entries)
    assert bundle.unzipped < 100e6


def test_directory_that_is_in_use_is_refused(tmp_path: Path) -> None:
    """A bundle is built into an empty directory, as what lies in another would become part of it; the command says so in one line."""
    (tmp_path / "old.py").touch()
    refused = _command(tmp_path)

    assert (1, f"Error: {tmp_path} is not empty; a bundle is built into an empty directory\n") == (refused.returncode, refused.stderr)


@pytest.mark.usefixtures("emulator")
def test_function_logs_its_digest(bundle: Bundle) -> None:
    """On Lambda's runtime, a bundle's handler runs, and its first log says which bundle it is; its second does not."""
    with LocalLambda(LocalFunction(code=bundle.directory)) as front, pytest.MonkeyPatch.context() as patch:
        for name, value in front.environment().items():
            patch.setenv(name, value)
        client = boto3.client("lambda", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")  # noqa: S106
        answers = [client.invoke(FunctionName=front.function.name, Payload=b'{"release": "another"}', LogType="Tail") for _ in range(2)]
        said = [json.loads(answer["Payload"].read()) for answer in answers]
        logs = [base64.b64decode(answer["LogResult"]).decode() for answer in answers]

    assert [[], []] == [answer["reports"] for answer in said]
    assert ["cold start", bundle.label["sha256"]] == [_line(logs[0])[key] for key in ("message", "bundle")]
    assert "cold start" not in logs[1]


def _line(log: str) -> Any:
    return next(json.loads(line) for line in log.splitlines() if line.startswith("{"))


@pytest.mark.parametrize("renamed", [False, True], ids=["same name", "build tag"])
def test_other_wheel_than_the_listed_one_is_refused(wheels: Path, tmp_path: Path, index: Index, *, renamed: bool) -> None:
    """A wheel that an index gives for a listed version is refused if it is not the listed one; nothing is built."""
    index(shutil.copytree(wheels, tmp_path / "index"))
    wheel = next((tmp_path / "index").glob("typing_extensions-*.whl"))
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("sitecustomize.py", "raise SystemExit")
    wrong = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if renamed:  # which pip prefers to the same version without one
        wheel = wheel.rename(wheel.with_name(wheel.name.replace("-py3-", "-1-py3-")))

    told = rf"typing-extensions .* is not the published wheel: {wheel.name} .* SHA-256 {wrong}, listed is {right}; nothing was built"
    with pytest.raises(UserError, match=told):
        build(tmp_path / "bundle", *HERE)
    assert [] == [*(tmp_path / "bundle").iterdir()]


@pytest.mark.parametrize("locked", [False, True], ids=["installed", "locked"])
@pytest.mark.parametrize("suffix", ["+evil", ".0"])
def test_other_spelling_of_a_version_is_refused(wheels: Path, tmp_path: Path, index: Index, suffix: str, *, locked: bool) -> None:
    """A wheel whose version is the one asked for to pip, but is written otherwise, is on no list, and refused; nothing is built."""
    index(shutil.copytree(wheels, tmp_path / "index"))
    wheel = next((tmp_path / "index").glob("typing_extensions-*.whl"))
    version = wheel.name.split("-")[1]
    other = wheel.with_name(wheel.name.replace(version, f"{version}{suffix}"))
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("/METADATA"):
                data = data.replace(f"\nVersion: {version}\n".encode(), f"\nVersion: {version}{suffix}\n".encode())
            new.writestr(name.replace(f"-{version}.dist-info", f"-{version}{suffix}.dist-info"), data)
    if suffix == ".0":  # which pip prefers no more than the other, unlike a local version
        wheel.unlink()

    told = (
        f"typing-extensions {version} was asked for, and the index that pip uses gives {other.name}, whose version is {version}{suffix}; "
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}nothing was built"):
        build(tmp_path / "bundle", *HERE, locked=locked)
    assert [] == [*(tmp_path / "bundle").iterdir()]


def test_unlisted_version_is_said(wheels: Path, tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is on no list is taken as the index has it, which is said; what lies in the working directory is no pip."""
    index(wheels)
    lines = wheeling.LIST.read_text().splitlines(keepends=True)
    wheeling.LIST.write_text("".join(line for line in lines if "typing_inspection" not in line))
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__main__.py").write_text("raise SystemExit('this is not pip')")
    monkeypatch.chdir(tmp_path)
    told = build(tmp_path / "bundle", *HERE).described()

    assert [f"typing-inspection {metadata.version('typing-inspection')}"] == re.findall(
        r"([\w. -]+?) \(as the index has it", told.replace(", ", ",")
    )


def test_locked_bundle_has_the_listed_versions(wheels: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """If locked, what ``deploy`` sends has the first listed version of each package, whatever is installed; it shows the difference."""
    index(wheels)
    for module in (wheeling, bundles):
        monkeypatch.setattr(module, "installed", lambda: dict.fromkeys(PACKAGES, "0.0.1"))
    said: list[str] = []
    with zipfile.ZipFile(io.BytesIO(zipped(HERE[0], f"python{PYTHON}", said.append, locked=True))) as archive:
        label = json.loads(archive.read("bundle.json"))
    expected = sorted(listed(RUNTIMES[f"python{PYTHON}"], HERE[0]))

    assert [(wheel.file, wheel.sha256) for wheel in expected] == [(wheel["file"], wheel["sha256"]) for wheel in label["wheels"]]
    assert said[0].endswith(", ".join(f"{wheel.package} {wheel.version} (here it is 0.0.1)" for wheel in expected))


def test_wheel_is_unpacked_into_the_bundle_alone(tmp_path: Path) -> None:
    """Of a wheel, what is imported is unpacked, to where it is imported from; nothing lands outside, and no scripts, stubs or tests."""
    kept = {"a/__init__.py", "a-1.data/purelib/b.py", "a-1.data/platlib/c.so", "../outside.py", "/absolute.py", "a-1.dist-info/METADATA"}
    left = {
        "a/x.pyi",
        "a/lib/libx.a",
        "a/tests/test_a.py",
        "a/include/a.h",
        "a-1.data/scripts/a",
        "a-1.dist-info/RECORD",
        "numpy/f2py/f.py",
    }
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as archive:
        for name in kept | left:
            archive.writestr(name, name)
    bundles._unpack(tmp_path / "a-1-py3-none-any.whl", tmp_path / "bundle")
    found = {path.relative_to(tmp_path / "bundle").as_posix() for path in (tmp_path / "bundle").rglob("*") if path.is_file()}

    assert {"a/__init__.py", "b.py", "c.so", "outside.py", "absolute.py", "a-1.dist-info/METADATA"} == found
    assert {"bundle", "a-1-py3-none-any.whl"} == {path.name for path in tmp_path.iterdir()}


def test_package_that_comes_along_is_refused(wheels: Path, tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dependency that nobody pinned is refused, and the way out is said."""
    index(wheels)
    monkeypatch.setattr(wheeling, "PACKAGES", tuple(name for name in PACKAGES if name != "typing-inspection"))
    with pytest.raises(UserError, match=r"pip also downloaded typing-inspection .*, which functions do not have; build with --locked"):
        build(tmp_path / "bundle", *HERE)


def test_bundle_that_imports_more_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """A handler that imports what a function does not have is found out before it is sent."""
    copy = Bundle(tmp_path / "bundle", bundle.unzipped)
    shutil.copytree(bundle.directory, copy.directory)
    with (copy.directory / "gradsharding/aws/functions/handler.py").open("a") as file:
        file.write("\nimport click\n")
    with pytest.raises(UserError, match="the handler imports click, which a function does not have"):
        probe(copy)
    (copy.directory / "gradsharding/aws/functions/handler.py").write_text("import gradsharding.cli.main")
    with pytest.raises(UserError, match=r"the handler cannot be imported from .*No module named 'gradsharding.cli'"):
        probe(copy)


def test_bundle_that_lambda_does_not_take_is_refused(tmp_path: Path, wheels: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle beyond Lambda's limit, and one for a Python that Lambda has not, are refused with the numbers."""
    index(wheels)
    monkeypatch.setattr(bundles, "UNZIPPED", 1000)
    with pytest.raises(UserError, match=r"the bundle has \d+ bytes; Lambda takes 1000"):
        build(tmp_path / "large", *HERE)
    with pytest.raises(UserError, match=r"Lambda runs no Python 2\.7 that this package runs on; there are python3\.11, "):
        build(tmp_path / "old", "arm64", "2.7")


@pytest.mark.slow
def test_index_without_wheels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that has no such wheel, and one that cannot be reached, each end in one sentence with the way out."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"has no wheels for Python .* \(No matching distribution found for .*\); `pip config list` shows"):
        build(tmp_path / "one", *HERE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {"INDEX_URL": f"http://127.0.0.1:{port}/simple", "EXTRA_INDEX_URL": "", "FIND_LINKS": "", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(UserError, match=r"pip could not reach its package index; connect this machine, or name an index"):
        build(tmp_path / "two", *HERE)
    monkeypatch.setenv("PIP_INDEX_URL", "no such scheme")
    monkeypatch.setenv("PIP_REQUIRE_HASHES", "1")
    with pytest.raises(UserError, match=r"pip could not download the function's packages: .*hashes"):
        build(tmp_path / "three", *HERE)


@pytest.mark.slow
def test_missing_or_old_pip_is_told(tmp_path: Path) -> None:
    """An environment without pip, as uv makes them, and one with a pip of 2020 say how to mend it."""
    venv.create(tmp_path / "venv", with_pip=False)
    rest = tmp_path / "rest"
    rest.mkdir()
    for entry in Path(click.__file__).parents[1].iterdir():
        if not re.match(r"pip($|-)", entry.name):
            (rest / entry.name).symlink_to(entry)
    python, path = tmp_path / "venv/bin/python", f"{ROOT}{os.pathsep}{rest}"
    missing = _command(tmp_path / "one", python=python, PYTHONPATH=path)
    old = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(rest), "pip==20.2.4"]
    subprocess.run([sys.executable, *old], check=True, capture_output=True)
    outdated = _command(tmp_path / "two", python=python, PYTHONPATH=path)

    advice = "this Python environment has no pip, which downloads a function's packages; add it: uv pip install pip"
    assert (1, f"Error: {advice}\n") == (missing.returncode, missing.stderr)
    advice = "pip 20.2.4 is too old to choose a function's wheels; upgrade it: python -m pip install --upgrade pip"
    assert (1, f"Error: {advice}\n") == (outdated.returncode, outdated.stderr)


def test_runtimes_are_one_list() -> None:
    """The template, the command line, SAM's build and the page offer the same runtimes, with one default; Lambda's API has them all."""
    template = (ROOT / "deploy/template.yaml").read_text()
    section = re.search(r"^  Runtime:\n((?:    .*\n)*)", template, re.MULTILINE)
    assert section
    (offered,) = (one for one in deploy.params if one.name == "runtime")
    (built,) = (one for one in bundles.main.params if one.name == "python")
    page = re.findall(r"^\| `(python3\.\d+)` \| 2\.(\d+) \| (\S+) \|$", (ROOT / "deploy/README.md").read_text(), re.MULTILINE)
    known: Any = get_session().get_service_model("lambda").shape_for("Runtime")

    assert [*RUNTIMES] == re.findall(r"python[\d.]+", section[1].partition("AllowedValues:")[2].partition("\n")[0])
    assert f"    Default: {DEPLOYED_RUNTIME}\n" in section[1]
    assert isinstance(offered.type, click.Choice)
    assert [*RUNTIMES] == [*offered.type.choices]
    assert f"[default: {DEPLOYED_RUNTIME}]" in (getattr(offered, "help", None) or "")
    assert isinstance(built.type, click.Choice)
    assert [*RUNTIMES] == [f"python{python}" for python in built.type.choices]
    assert DEPLOYED_RUNTIME == f"python{built.default}"
    assert f"GRADSHARDING_PYTHON:-{DEPLOYED_RUNTIME.removeprefix('python')}" in (ROOT / "deploy/function/Makefile").read_text()
    assert [(name, str(runtime.glibc), runtime.until) for name, runtime in RUNTIMES.items()] == page
    assert {*RUNTIMES} <= {*known.enum}


@pytest.mark.parametrize(("architecture", "name"), ALL)
def test_list_has_wheels_for_every_runtime(architecture: str, name: str) -> None:
    """For each runtime and architecture the list has each package once or more, and no wheel for a newer glibc or another processor."""
    wheels = listed(RUNTIMES[name], architecture)

    assert {*PACKAGES} == {wheel.package for wheel in wheels}
    assert not [wheel.file for wheel in wheels if not re.search(rf"-none-any\.whl$|{MACHINES[architecture]}\.whl$", wheel.file)]
    for wheel in wheels:
        needed = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel.file)]
        assert not needed or min(needed) <= RUNTIMES[name].glibc
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "name"), ALL)
def test_list_is_what_the_index_declares(architecture: str, name: str, tmp_path: Path) -> None:
    """The SHA-256 that the index itself declares for a listed wheel is the listed one."""
    wheels = listed(RUNTIMES[name], architecture)
    first: dict[str, str] = {}
    for wheel in wheels:
        first.setdefault(wheel.package, wheel.version)
    platforms = [f"--platform=manylinux_2_{minor}_{MACHINES[architecture]}" for minor in range(RUNTIMES[name].glibc, 16, -1)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-requires-python", "--target", tmp_path / "none"]
    command += ["--only-binary=:all:", f"--python-version={RUNTIMES[name].python}", "--report", tmp_path / "report.json", *platforms]
    subprocess.run([*map(str, command), *(f"{name}=={version}" for name, version in first.items())], check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())["install"]
    declared = {
        (one["download_info"]["url"].rpartition("/")[2], one["download_info"]["archive_info"]["hashes"]["sha256"]) for one in report
    }

    assert len(PACKAGES) == len(declared)
    assert declared <= {(wheel.file, wheel.sha256) for wheel in wheels}
