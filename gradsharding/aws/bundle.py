"""A function's code is the core and the caller's numpy and pydantic, for its own architecture; its size is known before it is sent.

``python -m gradsharding.aws.bundle DIRECTORY`` builds it, prints what it weighs, and checks in a fresh process what it imports.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

from gradsharding.errors import UserError
from gradsharding.platform import FIGURES

UNZIPPED = FIGURES["code"].value
"""Bytes of an unzipped bundle, at most."""

MACHINES = {"arm64": "aarch64", "x86_64": "x86_64"}
"""What wheels call the architectures that Lambda offers."""

GLIBC, GLIBC_OF_AL2 = 34, {"3.11": 26}
"""Minor version of glibc 2 in the runtimes: Amazon Linux 2023's, and Amazon Linux 2's for the Pythons that still have it
(https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html)."""

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

PACKAGES = ("numpy", "pydantic", "pydantic_core", "annotated-types", "typing_extensions", "typing-inspection")
"""What they come from, but for our own."""

OLDEST = {"numpy": "numpy>=1.26", "pydantic": "pydantic>=2.7"}
"""The versions that will do."""

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

    @property
    def versions(self) -> dict[str, str]:
        """Version of each package that it holds beside our own, as the bundle itself says."""
        return {one.name: one.version for one in metadata.distributions(path=[str(self.directory)])}

    def told(self) -> str:
        """The versions for people; where this environment has another one, that too."""
        here = _installed()
        return ", ".join(
            f"{name} {version}" + (f" (here {here[name]}, which has no wheel for it)" if here.get(name, version) != version else "")
            for name, version in sorted(self.versions.items())
        )

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


def _installed() -> dict[str, str]:
    """Version that this environment has of each package that a bundle holds beside our own."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # older pydantics do without some
            found[name] = metadata.version(name)
    return found


def build(directory: Path, architecture: str, python: str) -> Bundle:
    """Build into ``directory`` for an architecture (arm64, x86_64) and a Python ("3.13"); wheels come from pip's index.

    Packages have the versions that this environment has. Where numpy has no such wheel for the function, it has the newest one with a
    wheel, and so, in the last resort, have the others.

    Raise UserError if pip cannot, or if the bundle is larger than Lambda takes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ours = Path(__file__).parents[1]
    tags = [f"manylinux_2_{minor}_{MACHINES[architecture]}" for minor in range(GLIBC_OF_AL2.get(python, GLIBC), 16, -1)]
    tags.append(f"manylinux2014_{MACHINES[architecture]}")
    platforms = [word for tag in tags for word in ("--platform", tag)]
    platforms += ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(directory), *platforms]
    pins = {name: f"{name}=={version}" for name, version in _installed().items()}
    for wanted in (pins, pins | {"numpy": OLDEST["numpy"]}, OLDEST):
        done = subprocess.run([*command, *wanted.values()], capture_output=True, text=True, check=False)
        if not done.returncode:
            break
    else:
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
@click.option("--architecture", type=click.Choice([*MACHINES]), default="arm64", show_default=True)
@click.option("--python", default="3.13", show_default=True, help="Python of the function's runtime.")
def main(directory: Path, architecture: str, python: str) -> None:
    """Build a bundle, and print what it weighs."""
    bundle = build(directory, architecture, python)
    with tempfile.TemporaryDirectory() as scratch:
        zipped = bundle.zip(Path(scratch) / "bundle.zip")
    click.echo(f"unzipped {bundle.unzipped / 1e6:.1f} MB of {UNZIPPED / 1e6:.0f} MB allowed, zipped {zipped / 1e6:.1f} MB")
    click.echo(bundle.told())
    here = {"aarch64": "arm64"}.get(platform.machine(), platform.machine()), f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != (architecture, python):
        click.echo(f"import time and memory: only a bundle for {here[0]}, Python {here[1]}, can be tried on this machine")
        return
    seen = probe(bundle)
    click.echo(f"import {seen.seconds:.2f} s, resident {seen.resident / 1e6:.1f} MB; imports {', '.join(sorted(seen.imports))}")


if __name__ == "__main__":
    main()
