"""Stores, and how a text names one.

Keys are relative paths with "/" between their segments. A *reference* is a key of the store at hand, or a URL
that names a store and a key in it (``file:///data/a.safetensors``); ``locate`` resolves both. URLs of files are percent-encoded, as
everywhere; those of S3 are plain text, as AWS's own tools print and take them.
"""

import os
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from gradsharding.errors import MissingObject, UserError
from gradsharding.stores.directory import DirectoryStore, SharedMemory
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore, Source
from gradsharding.usage import SHARED

S = TypeVar("S", bound=Source)

ELSEWHERE = {"s3": "gradsharding.aws.s3.store:S3Store"}
"""Stores that the core does not import, by the scheme of their URLs."""


def open_store(url: str | os.PathLike[str]) -> ObjectStore:
    """Open a store from ``file:///directory``, ``memory://name`` (this process only), ``s3://bucket/prefix`` or a directory's path."""
    text = os.fspath(url)
    if "://" not in text:
        return DirectoryStore(text)
    scheme = text.partition("://")[0]
    if scheme == "file":
        return DirectoryStore(file_path(text))
    if scheme == SHARED:
        return SharedMemory(file_path(text.replace(SHARED, "file", 1)))
    if scheme == "memory":
        try:
            return MemoryStore.known[text]
        except KeyError:
            raise UserError(f"{text} lives in another process, or is gone; use a file:// store to share between processes") from None
    if scheme in ELSEWHERE:
        store: ObjectStore = _elsewhere(text)(text)
        return store
    raise UserError(f"no store is known for {text!r}; use file:///directory, memory://name, s3://bucket/prefix or a directory's path")


def exists(store: ObjectStore, key: str) -> bool:
    """Tell whether there is an object under ``key``, by one request."""
    try:
        store.head(key)
    except MissingObject:
        return False
    return True


def locate(reference: str, home: S) -> tuple[S | ObjectStore, str]:
    """Resolve a reference to a store and a key in it; keys belong to ``home``."""
    if "://" not in reference:
        return home, reference
    if reference.partition("://")[0] in ELSEWHERE:
        found: tuple[ObjectStore, str] = _elsewhere(reference).holding(reference)
        return found
    base, _, key = reference.rpartition("/")
    return (open_store if base.startswith("memory:") else _open_once)(base), os.fsdecode(unquote_to_bytes(key))


def file_path(url: str) -> str:
    """Give the local path that a ``file://`` URL names, whatever its bytes; raise UserError unless it is absolute."""
    path = os.fsdecode(unquote_to_bytes(url.removeprefix("file://"))) or "/"
    if not path.startswith("/"):
        raise UserError(f"{url!r} names no local path; write file:///absolute/path")
    return path


def file_reference(path: str | os.PathLike[str]) -> str:
    """Name a local file as a reference that any store resolves."""
    return Path(path).absolute().as_uri()


def _elsewhere(url: str) -> Any:
    """Give the class of a store that the core does not import."""
    try:
        return resolve_name(ELSEWHERE[url.partition("://")[0]])
    except ImportError as error:
        raise UserError(f"{url} needs more than is installed here ({error}); install gradsharding[aws]") from error


@lru_cache(maxsize=256)
def _open_once(url: str) -> ObjectStore:
    """Open a store that may be kept: not one in memory, whose objects live as long as it does."""
    return open_store(url)
