"""A text names a store, or an object in one.

Keys are relative paths with "/" between their segments. A *reference* is a key of the store at hand, or a URL that names a store and a
key in it (``file:///data/a.safetensors``); ``locate`` resolves both. URLs of files are percent-encoded, as everywhere; those of S3 are
plain text, as AWS's own tools print and take them.

The scheme of a URL names what opens it: ``open(url) -> ObjectStore``. It may have a method ``holding(reference) -> (store, key)``, for
stores in which any text is a key; without one, the key is what follows the last "/", percent-decoded.
"""

import os
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from gradsharding.errors import MissingObject, UserError
from gradsharding.plugins import STORES, find, names
from gradsharding.stores.protocol import ObjectStore, ReadableStore
from gradsharding.usage import SHARED

S = TypeVar("S", bound=ReadableStore)

KEPT = 256
"""Stores that stay open between two references to objects in them."""

_kept: dict[str, ObjectStore] = {}


def open_store(place: str | os.PathLike[str]) -> ObjectStore:
    """Open a store from a directory's path, ``file:///directory``, ``memory://name`` (this process only) or ``s3://bucket/prefix``.

    Installed packages may bring stores of other schemes. Raise UserError if none is known for the URL, or what it needs is not installed.
    """
    text = os.fspath(place)
    url = text if "://" in text else file_reference(text)
    store: ObjectStore = _opener(url)(url)
    return store


def exists(store: ObjectStore, key: str) -> bool:
    """Return whether there is an object under ``key``, by one request."""
    try:
        store.head(key)
    except MissingObject:
        return False
    return True


def locate(reference: str, home: S) -> tuple[S | ObjectStore, str]:
    """Resolve a reference to a store and a key in it; keys belong to ``home``."""
    if "://" not in reference:
        return home, reference
    if holding := getattr(_opener(reference), "holding", None):
        found: tuple[ObjectStore, str] = holding(reference)
        return found
    base, _, key = reference.rpartition("/")
    return _kept_open(base), os.fsdecode(unquote_to_bytes(key))


def file_path(url: str) -> str:
    """Return the local path of a ``file://`` URL, which may have any bytes; raise UserError unless it is absolute."""
    path = os.fsdecode(unquote_to_bytes(url.partition("://")[2])) or "/"
    if not path.startswith("/"):
        raise UserError(f"{url!r} names no local path; write file:///absolute/path")
    return path


def file_reference(path: str | os.PathLike[str]) -> str:
    """Return the URL of a local file: a reference that any store resolves."""
    return Path(path).absolute().as_uri()


def _opener(url: str) -> Any:
    """Return what opens stores of a URL's scheme; raise UserError if nothing does."""
    if opener := find(STORES, url.partition("://")[0]):
        return opener
    others = sorted({*names(STORES)} - {"file", "memory", "s3", SHARED})
    raise UserError(
        f"no store is known for {url!r}; use file:///directory, memory://name, s3://bucket/prefix or a directory's path"
        + (f", or a URL of {', '.join(others)}" if others else "")
    )


def _kept_open(url: str) -> ObjectStore:
    """Open a store once and keep it; one in this process's memory is not kept, as it lives only while somebody else holds it."""
    if kept := _kept.get(url):
        return kept
    store = open_store(url)
    if store.reach != "process":
        if len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[url] = store
    return store
