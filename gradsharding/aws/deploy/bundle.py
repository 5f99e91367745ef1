"""A function's code is a list of our folders, and the caller's versions of numpy and pydantic for the function's architecture.

``python -m gradsharding.aws.deploy.bundle DIRECTORY`` builds it, prints its size, and checks in a fresh process what it imports. The same
wheels and the same code give the same files, wherever and whenever they are built, and ``bundle.json`` among them lists what they are made
of. The zip of the files is the same where zlib is.
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
"""Folders of this package whose modules, without those of subfolders, make up a function's code; its handler imports from no other."""

GIVEN = {"boto3", "botocore", "certifi", "s3transfer", "urllib3", "jmespath", "dateutil", "six"}
"""Packages that the Lambda runtime has."""

WANTED = {"gradsharding", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
"""Packages that a bundle has."""

WASTE = re.compile(r"(^|/)(tests|include)/|^numpy/f2py/|\.(pyi|lib|a)$|\.data/|\.dist-info/RECORD$")
"""Files of wheels that a function does not need, and ``RECORD``, which lists them."""

LABEL = "bundle.json"
"""The file that lists what a bundle is made of."""

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
    """A built bundle: its directory, and the size of its files in bytes."""

    directory: Path
    unzipped: int

    @property
    def versions(self) -> dict[str, str]:
        """Version of each package in the bundle except our own, by the bundle's own metadata."""
        return {package.name: package.version for package in metadata.distributions(path=[str(self.directory)])}

    @property
    def label(self) -> dict[str, Any]:
        """Our version, the runtime, each wheel with its SHA-256, and the digest of all files."""
        read: dict[str, Any] = json.loads((self.directory / LABEL).read_text())
        return read

    def described(self) -> str:
        """Return the versions for people, with those of this environment that differ, and note wheels that the release does not list."""
        here, label = installed(), self.label
        known = {wheel.sha256 for wheel in listed(RUNTIMES[label["runtime"]], label["architecture"])}
        return ", ".join(
            f"{wheel['package']} {wheel['version']}"
            + (f" (here it is {has})" if (has := here.get(wheel["package"], wheel["version"])) != wheel["version"] else "")
            + ("" if wheel["sha256"] in known else " (as the index has it: not on this release's list)")
            for wheel in label["wheels"]
        )

    def zip(self, path: Path) -> int:
        """Write the bundle as a zip, with the same bytes for the same files; return its size in bytes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in _files(self.directory):
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr, entry.compress_type = 3, 0o100644 << 16, zipfile.ZIP_DEFLATED
                archive.writestr(entry, (self.directory / name).read_bytes())
        return path.stat().st_size


class Probe(NamedTuple):
    """What importing the handler from a bundle took in a fresh process."""

    seconds: float
    resident: int
    """Peak resident memory, in bytes."""
    imports: frozenset[str]
    """Packages that were imported, without the standard library."""


def build(directory: Path, architecture: str, python: str, *, locked: bool = False) -> Bundle:
    """Build a bundle in an empty ``directory`` for an architecture (arm64, x86_64) and a Python ("3.13"), of wheels from ``wheels.fetch``.

    Raise UserError if the directory is not empty, if pip cannot download the right wheels, or if the bundle is larger than Lambda accepts.
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
    for path in directory.rglob("*"):  # the function runs as another user, whatever this user's umask is
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
    label = {
        "gradsharding": {"version": __version__, "sha256": _digest(directory, code)},
        "runtime": runtime,
        "architecture": architecture,
        "wheels": [{"package": wheel.package, "version": wheel.version, "file": wheel.file, "sha256": wheel.sha256} for wheel in wheels],
        "sha256": _digest(directory, _files(directory)),
    }
    return json.dumps(label, indent=1).encode() + b"\n"


def _digest(directory: Path, files: list[str]) -> str:
    """Return the SHA-256 of what ``sha256sum`` prints for the files, sorted by name."""
    lines = [f"{hashlib.sha256((directory / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def probe(bundle: Bundle) -> Probe:
    """Import the handler from a bundle that was built for this machine, in a fresh process, with this environment's boto3.

    Raise UserError if it imports a package that neither the bundle nor the Lambda runtime has.
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
    """Build a bundle, and print its size."""
    try:
        _show(build(directory, architecture, python, locked=locked), architecture, python)
    except UserError as error:
        raise click.ClickException(error.message) from error


def _show(bundle: Bundle, architecture: str, python: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        zipped = bundle.zip(Path(scratch) / "bundle.zip")
    click.echo(f"unzipped {bundle.unzipped / 1e6:.1f} MB of {UNZIPPED / 1e6:.0f} MB allowed, zipped {zipped / 1e6:.1f} MB")
    click.echo(f"{bundle.described()}\nsha256 {bundle.label['sha256']}")
    here = {"aarch64": "arm64"}.get(platform.machine(), platform.machine()), f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != (architecture, python):
        click.echo(f"import time and memory: only a bundle for {here[0]}, Python {here[1]}, can be tried on this machine")
        return
    seen = probe(bundle)
    click.echo(f"import {seen.seconds:.2f} s, resident {seen.resident / 1e6:.1f} MB; imports {', '.join(sorted(seen.imports))}")


if __name__ == "__main__":
    main()
