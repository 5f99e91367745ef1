"""Stores and executors are found by name: our own in a table, those of other packages by their entry points.

A table works where no package is installed: a Lambda function's bundle and a source tree have no entry points. Our own names come first,
so that no other package can take them.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any

from gradsharding.errors import UserError

STORES = "gradsharding.stores"
"""Entry-point group of stores: each is named after the scheme of its URLs."""

EXECUTORS = "gradsharding.executors"
"""Entry-point group of executors: each is named after the first word of its specification."""

OURS: Mapping[str, Mapping[str, str]] = {
    STORES: {
        "file": "gradsharding.stores.directory:DirectoryStore.at",
        "memory": "gradsharding.stores.memory:MemoryStore.at",
        "s3": "gradsharding.aws.s3.store:S3Store",
        "shm": "gradsharding.stores.directory:SharedMemory.at",
    },
    EXECUTORS: {
        "inline": "gradsharding.running.executors:inline",
        "lambda": "gradsharding.aws.functions.executor:LambdaExecutor",
        "processes": "gradsharding.running.processes:processes",
        "threads": "gradsharding.running.executors:threads",
    },
}
"""Our own, by group and name; each is imported when it is used."""


@lru_cache(maxsize=64)  # looking through the installed packages takes milliseconds, and each reference to an object is looked up
def find(group: str, name: str) -> Any:
    """Import the store or executor of that name; None if there is none.

    Raise UserError if it cannot be imported, or is not callable, which names the package; or if two packages bring one of that name.
    """
    if ours := OURS[group].get(name):
        return _imported(partial(resolve_name, ours), name, f"gradsharding[{ours.split('.')[1]}]")  # an extra is named after its room
    found = [*entry_points(group=group, name=name)]
    if len({entry.value for entry in found}) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in found))
        raise UserError(f"{packages} both bring {name!r} ({group}); uninstall all but one of them")
    return _imported(found[0].load, name, _package(found[0])) if found else None


def names(group: str) -> list[str]:
    """List the names in a group, those of other packages included."""
    return sorted({*OURS[group], *entry_points(group=group).names})


def _imported(load: Callable[[], Any], name: str, package: str) -> Any:
    try:
        found = load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name} needs more than is installed here ({error}); install {package}") from error
    except Exception as error:
        raise UserError(f"{name} fails while it is imported ({type(error).__name__}: {error}); repair or uninstall {package}") from error
    if not callable(found):
        raise UserError(f"{name} names an object of type {type(found).__name__}, which cannot be called; repair or uninstall {package}")
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module
