"""A function's code is some of our folders, and the caller's numpy and pydantic for the function's architecture, byte for byte.

``python -m gradsharding.aws.deploy.bundle DIRECTORY`` builds it, prints what it weighs, and checks in a fresh process what it imports. The
same wheels and the same code of ours give the same files, wherever and whenever they are built, and ``bundle.json`` among them says what
they are; so the same zip, where zlib is the same.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import click

from gradsharding import __version__
from gradsharding.aws.deploy.wheels import MACHINES, Wheel, fetch, installed, listed
from gradsharding.errors import UserError
from gradsharding.planning.platform import DEPLOYED_RUNTIME, FIGURES, RUNTIMES

UNZIPPED = FIGURES["code"].value
"""Bytes of an unzipped bundle, at most."""

ROOMS = ("", "arithmetic", "arithmetic/rules", "aws", "aws/functions", "aws/s3", "format", "planning", "running", "stores")
"""Folders of this package whose modules a function's code holds, subfolders excepted: its handler imports nothing from any other."""

GIVEN = {"boto3", "botocore", "certifi", "s3transfer", "urllib3", "jmespath", "dateutil", "six"}
"""What the Lambda runtime brings along."""

WANTED = {"gradsharding", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}

WASTE = re.compile(r"(^|/)(tests|include)/|^numpy/f2py/|\.(pyi|lib|a)$|\.data/|\.dist-info/RECORD$")
"""Files of wheels that a function does without; ``RECORD`` lists those, too."""

LABEL = "bundle.json"
"""The file that says what a bundle is made of."""

_PROBE = """
import json, sys, time
from pathlib import Path
sys.modules["awscrt"] = None  # Lambda has none
before, started = set(sys.modules), time.perf_counter()
import gradsharding.aws.functions.handler as handler, gradsharding.aws.s3.store
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text()
resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
foreign = {name.partition(".")[0] for name in set(sys.modules) - before if not name.startswith("_")} - set(sys.stdlib_module_names)
print(json.dumps({"seconds": seconds, "resident": resident * 1024, "imports": sorted(foreign), "from": handler.__file__}))
"""


class Bundle(NamedTuple):
    """A built bundle: its directory, and its bytes."""

    directory: Path
    unzipped: int

    @property
    def versions(self) -> dict[str, str]:
        """Version of each package that it holds beside our own, as the bundle itself says."""
        return {one.name: one.version for one in metadata.distributions(path=[str(self.directory)])}

    @property
    def label(self) -> dict[str, Any]:
        """What it is made of: our version, the runtime, each wheel with its SHA-256, and the digest of all its files."""
        read: dict[str, Any] = json.loads((self.directory / LABEL).read_text())
        return read

    def told(self) -> str:
        """The versions for people; where this environment has another one, and where the release does not list the wheel, that too."""
        here, label = installed(), self.label
        known = {wheel.sha256 for wheel in listed(RUNTIMES[label["runtime"]], label["architecture"])}
        return ", ".join(
            f"{wheel['package']} {wheel['version']}"
            + (f" (here it is {has})" if (has := here.get(wheel["package"], wheel["version"])) != wheel["version"] else "")
            + ("" if wheel["sha256"] in known else " (as the index has it: not on this release's list)")
            for wheel in label["wheels"]
        )

    def zip(self, path: Path) -> int:
        """Write it as a zip, the same bytes for the same files; give their number."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in _files(self.directory):
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr, entry.compress_type = 3, 0o100644 << 16, zipfile.ZIP_DEFLATED
                archive.writestr(entry, (self.directory / name).read_bytes())
        return path.stat().st_size


class Probe(NamedTuple):
    """What a fresh process saw when it imported the handler from a bundle."""

    seconds: float
    resident: int
    """Bytes."""
    imports: frozenset[str]
    """Packages, the standard library's left out."""


def build(directory: Path, architecture: str, python: str, *, locked: bool = False) -> Bundle:
    """Build into an empty ``directory`` for an architecture (arm64, x86_64) and a Python ("3.13"); wheels are what ``wheels.fetch`` gives.

    Raise UserError if the directory is not empty, if pip cannot give the right wheels, or if the bundle is larger than Lambda takes.
    """
    name = f"python{python}"
    if name not in RUNTIMES:
        raise UserError(f"Lambda runs no Python {python} that this package runs on; there are {', '.join(RUNTIMES)}")
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; a bundle is built into an empty directory")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = fetch(Path(scratch), RUNTIMES[name], architecture, locked=locked)
        for wheel in wheels:
            _unpack(Path(scratch) / wheel.file, directory)
    parent = Path(__file__).parents[3]
    for source in ours():
        _write(directory / source.relative_to(parent), source.read_bytes())
    _write(directory / LABEL, _label(directory, name, architecture, wheels))
    for path in directory.rglob("*"):  # the function's user is another one, whatever this one's umask is
        path.chmod(0o755 if path.is_dir() else 0o644)
    size = sum((directory / file).stat().st_size for file in _files(directory))
    if size > UNZIPPED:
        raise UserError(f"the bundle has {size} bytes; Lambda takes {UNZIPPED}")
    return Bundle(directory, size)


def ours() -> list[Path]:
    """List the files of this package that a function's code holds: the modules of ``ROOMS``."""
    package = Path(__file__).parents[2]
    return sorted(path for room in ROOMS for path in (package / room).glob("*.py"))


def _unpack(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            entry.filename = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
            if not WASTE.search(entry.filename):
                archive.extract(entry, directory)


def _label(directory: Path, runtime: str, architecture: str, wheels: list[Wheel]) -> bytes:
    code = [file for file in _files(directory) if file.startswith("gradsharding/")]
    said = {
        "gradsharding": {"version": __version__, "sha256": _digest(directory, code)},
        "runtime": runtime,
        "architecture": architecture,
        "wheels": [{"package": wheel.package, "version": wheel.version, "file": wheel.file, "sha256": wheel.sha256} for wheel in wheels],
        "sha256": _digest(directory, _files(directory)),
    }
    return json.dumps(said, indent=1).encode() + b"\n"


def _digest(directory: Path, files: list[str]) -> str:
    """SHA-256 of what ``sha256sum`` prints for files, sorted by their names."""
    lines = [f"{hashlib.sha256((directory / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def probe(bundle: Bundle) -> Probe:
    """Import the handler from a bundle that was built for this machine, in a fresh process; boto3 is this environment's.

    Raise UserError if it imports what neither the bundle nor the Lambda runtime has.
    """
    code = f"import sys; sys.path.insert(0, {str(bundle.directory)!r})\n" + _PROBE
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"the handler cannot be imported from {bundle.directory}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])  # the handler writes to its log, too
    if not str(found["from"]).startswith(str(bundle.directory)):
        raise UserError(f"the handler was imported from {found['from']}, not from the bundle")
    if foreign := {*found["imports"]} - GIVEN - WANTED:
        raise UserError(f"the handler imports {', '.join(sorted(foreign))}, which a function does not have")
    return Probe(found["seconds"], found["resident"], frozenset(found["imports"]))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--architecture", type=click.Choice([*MACHINES]), default="arm64", show_default=True)
@click.option(
    "--python",
    type=click.Choice([runtime.python for runtime in RUNTIMES.values()]),
    default=RUNTIMES[DEPLOYED_RUNTIME].python,
    show_default=True,
    help="Python of the function's runtime.",
)
@click.option("--locked", is_flag=True, help="Take the versions that this release lists, whatever is installed here.")
def main(directory: Path, architecture: str, python: str, *, locked: bool) -> None:
    """Build a bundle, and print what it weighs."""
    try:
        _show(build(directory, architecture, python, locked=locked), architecture, python)
    except UserError as error:
        raise click.ClickException(error.message) from error


def _show(bundle: Bundle, architecture: str, python: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        zipped = bundle.zip(Path(scratch) / "bundle.zip")
    click.echo(f"unzipped {bundle.unzipped / 1e6:.1f} MB of {UNZIPPED / 1e6:.0f} MB allowed, zipped {zipped / 1e6:.1f} MB")
    click.echo(f"{bundle.told()}\nsha256 {bundle.label['sha256']}")
    here = {"aarch64": "arm64"}.get(platform.machine(), platform.machine()), f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != (architecture, python):
        click.echo(f"import time and memory: only a bundle for {here[0]}, Python {here[1]}, can be tried on this machine")
        return
    seen = probe(bundle)
    click.echo(f"import {seen.seconds:.2f} s, resident {seen.resident / 1e6:.1f} MB; imports {', '.join(sorted(seen.imports))}")


if __name__ == "__main__":
    main()
