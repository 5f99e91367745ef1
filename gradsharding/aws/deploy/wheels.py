"""A wheel goes into a function only if it has exactly the requested version, and a listed SHA-256, if any is listed for it.

The list is ``wheels.txt``, as ``sha256sum`` writes it, and is part of the release.
``python -m gradsharding.aws.deploy.wheels numpy==2.4.6 > wheels.txt`` rebuilds it: the newest versions first, then those that are named.
"""

import contextlib
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

from gradsharding.errors import UserError
from gradsharding.planning.platform import RUNTIMES, Runtime

LIST = Path(__file__).with_name("wheels.txt")

MACHINES = {"arm64": "aarch64", "x86_64": "x86_64"}
"""Names of Lambda's architectures in wheels."""

PACKAGES = ("annotated-types", "numpy", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection")
"""Packages of a function beside our own code and those of Lambda's runtime."""

OLDEST = ("numpy>=1.26", "pydantic>=2.7")
"""The oldest versions that work; these two need the others."""

PIP = (20, 3)
"""The first pip that accepts several platforms, and wheels named after a glibc (https://pip.pypa.io/en/stable/news/#v20-3)."""


class Wheel(NamedTuple):
    """A wheel's file name, which has its package, version and platform, and the hexadecimal SHA-256 of its bytes."""

    file: str
    sha256: str

    @property
    def package(self) -> str:
        """The package, as indexes spell it."""
        return _spelled(self.file.split("-")[0])

    @property
    def version(self) -> str:
        """The package's version."""
        return self.file.split("-")[1]

    def fits(self, runtime: Runtime, architecture: str) -> bool:
        """Whether it is built for a runtime's Python and an architecture, or for all of them."""
        python, _, system = self.file.removesuffix(".whl").rsplit("-", 3)[1:]
        return system == "any" or (python == f"cp{runtime.python.replace('.', '')}" and system.endswith(MACHINES[architecture]))


def listed(runtime: Runtime, architecture: str) -> list[Wheel]:
    """Return the wheels listed for a runtime and an architecture; of a package's versions, the first is preferred."""
    lines = (line.split() for line in LIST.read_text("ascii").splitlines())
    return [wheel for digest, file in lines if (wheel := Wheel(file, digest)).fits(runtime, architecture)]


def installed() -> dict[str, str]:
    """Return the installed version of each package of ``PACKAGES``."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # older releases of pydantic lack some
            found[name] = metadata.version(name)
    return found


def fetch(directory: Path, runtime: Runtime, architecture: str, *, locked: bool = False) -> list[Wheel]:
    """Download a function's wheels into ``directory`` by pip, with its own configuration, and compare each SHA-256 with the list.

    The versions are those of this environment. If numpy has no such wheel for the function, its listed version is used; as a last
    resort, the listed versions of all packages. If ``locked``, they are used in any case.

    Raise UserError if pip fails, if a wheel is not the listed one, or if a version needs a package that functions do not have.
    """
    first: dict[str, str] = {}
    for wheel in listed(runtime, architecture):
        first.setdefault(wheel.package, wheel.version)
    here = installed()
    for pins in [first] if locked else [here, here | {"numpy": first["numpy"]}, first]:
        if not (why := _download(directory, [f"{name}=={version}" for name, version in pins.items()], runtime, architecture)):
            return [_checked(path, pins, runtime, architecture) for path in sorted(directory.glob("*.whl"))]
    raise UserError(
        f"pip's index has no wheels for Python {runtime.python}, {architecture} ({why}); `pip config list` shows which index that is"
    )


def _download(directory: Path, requirements: Iterable[str], runtime: Runtime, architecture: str) -> str:
    """Download wheels by pip; return what is missing if the index has no such version, else ""."""
    _require_pip()
    machine = MACHINES[architecture]
    tags = [*(f"manylinux_2_{minor}_{machine}" for minor in range(runtime.glibc, 16, -1)), f"manylinux2014_{machine}"]
    options = [f"--platform={tag}" for tag in tags]
    options += ["--python-version", runtime.python, "--implementation", "cp", "--only-binary", ":all:", "--dest", str(directory)]
    # -P: a directory called pip in the working directory is not pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-color", *options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    if "after connection broken by" in done.stderr:
        raise UserError("pip could not reach its package index; connect this machine, or name an index that it reaches in PIP_INDEX_URL")
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    if errors and errors[-1].startswith("No matching distribution found for "):
        return errors[-1]
    why = errors[0] if errors else done.stderr.strip() or f"exit status {done.returncode}"
    raise UserError(f"pip could not download the function's packages: {why} (`pip config list` shows pip's configuration)")


def _require_pip() -> None:
    """Raise UserError if this Python has no pip, or too old a one."""
    if not importlib.util.find_spec("pip"):  # as in environments that uv creates
        raise UserError("this Python environment has no pip, which downloads a function's packages; add it: uv pip install pip")
    has = metadata.version("pip")
    if tuple(int(number) for number in re.findall(r"\d+", has)[:2]) < PIP:
        raise UserError(f"pip {has} is too old to choose a function's wheels; upgrade it: python -m pip install --upgrade pip")


def _checked(path: Path, pins: Mapping[str, str], runtime: Runtime, architecture: str) -> Wheel:
    """Return a downloaded wheel; raise UserError if it is not the listed one, or if no pin asked for its package and version."""
    wheel = Wheel(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    name = f"{wheel.package} {wheel.version}"
    if wheel.package not in pins:
        raise UserError(f"pip also downloaded {name}, which functions do not have; build with --locked, or go back to an older pydantic")
    if wheel.version != pins[wheel.package]:  # pip also accepts 1.0+local and 1.0.0 for 1.0, which no list has
        raise UserError(
            f"{wheel.package} {pins[wheel.package]} was asked for, and the index that pip uses gives {wheel.file}, whose version is "
            f"{wheel.version}; nothing was built; name an index that has the published wheel in PIP_INDEX_URL"
        )
    known = [entry for entry in listed(runtime, architecture) if (entry.package, entry.version) == (wheel.package, wheel.version)]
    if known and wheel.sha256 not in {entry.sha256 for entry in known}:
        raise UserError(
            f"{name} is not the published wheel: {wheel.file} from the index that pip uses has SHA-256 {wheel.sha256}, listed is "
            f"{', '.join(entry.sha256 for entry in known)}; nothing was built; name an index that has the published one in PIP_INDEX_URL"
        )
    return wheel


def _spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@click.command()
@click.argument("requirements", nargs=-1)
def main(requirements: tuple[str, ...]) -> None:
    """Print the list: the newest wheels for each runtime and architecture, then those of the versions that are named."""
    lines: dict[str, None] = {}
    for runtime in RUNTIMES.values():
        for architecture in MACHINES:
            for wanted in (OLDEST, *((requirement, *OLDEST) for requirement in requirements)):
                with tempfile.TemporaryDirectory() as scratch:
                    if why := _download(Path(scratch), wanted, runtime, architecture):
                        click.echo(f"Python {runtime.python}, {architecture}: {why}", err=True)
                    for path in sorted(Path(scratch).glob("*.whl")):
                        lines[f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"] = None
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
