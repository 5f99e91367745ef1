"""A function's code is the core, numpy and pydantic, for its own architecture, and no more; its size is known before it is sent.

``python -m gradsharding.aws.bundle DIRECTORY`` builds it, prints what it weighs, and checks in a fresh process what it imports.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import click

from gradsharding.errors import UserError
from gradsharding.platform import FIGURES

UNZIPPED = FIGURES["code"].value
"""Bytes of an unzipped bundle, at most."""

WHEELS = {"arm64": "manylinux2014_aarch64", "x86_64": "manylinux2014_x86_64"}
"""What pip calls the platforms that Lambda offers; all of its Linuxes are new enough for these."""

ABSENT = (
    "__main__.py",
    "cli.py",
    "given.py",
    "paper.py",
    "planned.py",
    "planner.py",
    "prices.toml",
    "testing",
    "aws/bundle.py",
    "aws/commands.py",
    "aws/direct.py",
    "aws/fanout.py",
    "aws/invoke.py",
    "aws/presign.py",
    "aws/pricelist.py",
    "aws/stack.py",
)
"""What a function never imports of our own package."""

GIVEN = {"boto3", "botocore", "certifi", "s3transfer", "urllib3", "jmespath", "dateutil", "six"}
"""What the Lambda runtime brings along."""

WANTED = {"gradsharding", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}

_PROBE = """
import json, sys, time
from pathlib import Path
sys.modules["awscrt"] = None  # Lambda has none
before, started = set(sys.modules), time.perf_counter()
import gradsharding.aws.handler, gradsharding.aws.s3
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text()
resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
foreign = {name.partition(".")[0] for name in set(sys.modules) - before if not name.startswith("_")} - set(sys.stdlib_module_names)
print(json.dumps({"seconds": seconds, "resident": resident * 1024, "imports": sorted(foreign), "from": gradsharding.aws.handler.__file__}))
"""


class Bundle(NamedTuple):
    """A built bundle: its directory, and its bytes."""

    directory: Path
    unzipped: int

    def zip(self, path: Path) -> int:
        """Write it as a zip, the same bytes for the same files; give their number."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(found for found in self.directory.rglob("*") if found.is_file()):
                entry = zipfile.ZipInfo(file.relative_to(self.directory).as_posix(), (1980, 1, 1, 0, 0, 0))
                entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())
        return path.stat().st_size


class Probe(NamedTuple):
    """What a fresh process saw when it imported the handler from a bundle."""

    seconds: float
    resident: int
    """Bytes."""
    imports: frozenset[str]
    """Packages, the standard library's left out."""


def build(directory: Path, architecture: str, python: str) -> Bundle:
    """Build into ``directory`` for an architecture (arm64, x86_64) and a Python ("3.13"); wheels come from pip's index.

    Raise UserError if pip cannot, or if the bundle is larger than Lambda takes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ours = Path(__file__).parents[1]
    platforms = ["--platform", WHEELS[architecture], "--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(directory), *platforms]
    done = subprocess.run([*command, "numpy>=1.26", "pydantic>=2.7"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"pip found no numpy and pydantic for {architecture}, Python {python}: {done.stderr.strip().splitlines()[-1:]}")
    for waste in ("**/tests", "**/*.pyi", "**/__pycache__", "**/*.lib", "bin", "numpy/f2py", "**/include"):
        for path in [*directory.glob(waste)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(ours, directory / ours.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in ABSENT:
        path = directory / ours.name / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if size > UNZIPPED:
        raise UserError(f"the bundle has {size} bytes; Lambda takes {UNZIPPED}")
    return Bundle(directory, size)


def probe(bundle: Bundle) -> Probe:
    """Import the handler from a bundle that was built for this machine, in a fresh process; boto3 is this environment's.

    Raise UserError if it imports what neither the bundle nor the Lambda runtime has.
    """
    code = f"import sys; sys.path.insert(0, {str(bundle.directory)!r})\n" + _PROBE
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"the handler cannot be imported from {bundle.directory}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    if not str(found["from"]).startswith(str(bundle.directory)):
        raise UserError(f"the handler was imported from {found['from']}, not from the bundle")
    if foreign := {*found["imports"]} - GIVEN - WANTED:
        raise UserError(f"the handler imports {', '.join(sorted(foreign))}, which a function does not have")
    return Probe(found["seconds"], found["resident"], frozenset(found["imports"]))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--architecture", type=click.Choice([*WHEELS]), default="arm64", show_default=True)
@click.option("--python", default="3.13", show_default=True, help="Python of the function's runtime.")
def main(directory: Path, architecture: str, python: str) -> None:
    """Build a bundle, and print what it weighs."""
    bundle = build(directory, architecture, python)
    with tempfile.TemporaryDirectory() as scratch:
        zipped = bundle.zip(Path(scratch) / "bundle.zip")
    click.echo(f"unzipped {bundle.unzipped / 1e6:.1f} MB of {UNZIPPED / 1e6:.0f} MB allowed, zipped {zipped / 1e6:.1f} MB")
    here = {"aarch64": "arm64"}.get(platform.machine(), platform.machine()), f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != (architecture, python):
        click.echo(f"import time and memory: only a bundle for {here[0]}, Python {here[1]}, can be tried on this machine")
        return
    seen = probe(bundle)
    click.echo(f"import {seen.seconds:.2f} s, resident {seen.resident / 1e6:.1f} MB; imports {', '.join(sorted(seen.imports))}")


if __name__ == "__main__":
    main()
