"""A node opens what lies in its own store, and what its owner allows; whatever else a server names stays shut.

A node's own store is the one that its ``--node-config`` names, or, where it names none, the one that it is told to upload to. A model is
pinned by its version, which only who can read the store knows: a node's errors tell of no version, and of nothing that is in a file.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from flwr.app import ArrayRecord

from gradsharding import ObjectStore
from gradsharding.errors import ChangedObject, InvalidUpdate, MissingObject, UserError, quoted
from gradsharding.format.dtypes import Buffer
from gradsharding.stores.protocol import Peeked, ReadableStore, Stat
from gradsharding.stores.urls import locate
from gradsharding_flower.reference import Reference

log = logging.getLogger("flwr")

ALLOW_KEY = "gradsharding-allow"
"""Key of a node's own ``--node-config``: URLs, with blanks between them, below which models may be read beside the node's store."""


def load(reference: Reference, store: ObjectStore, config: Mapping[str, object]) -> ArrayRecord:
    """Read a model as a node: a key of its store, or a URL below that, or below one that ``config`` allows.

    Raise UserError if it may not be opened, ChangedObject if it is not there at the version that the server names.
    """
    source = reference.source
    allowed = [store.url, *str(config.get(ALLOW_KEY, "")).split()]
    if "://" in source and not any(_below(source, url) for url in allowed):
        raise UserError(
            f"the model lies at {quoted(source)}, and this node opens only its own store; whoever runs the node can allow it: "
            f"--node-config '{ALLOW_KEY}=\"URL\"' names a directory or a prefix"
        )
    return pinned(reference, *locate(source, store))


def pinned(reference: Reference, source: ReadableStore, key: str) -> ArrayRecord:
    """Read a model from its place, after its version was found to be the one that the server names."""
    if "://" in key:
        raise UserError(f"the model lies at {quoted(reference.source)}, and this node reads by URLs that the server lends, or not at all")
    return reference.model_copy(update={"source": key}).load(_Pinned(source, reference))


class _Pinned(NamedTuple):
    """One version of one object: where anything else is found, it tells nothing of it."""

    source: ReadableStore
    reference: Reference

    def head(self, key: str) -> Stat:
        """Tell the size and the version that the server knows."""
        return self.peek(key, 1).stat

    def peek(self, key: str, nbytes: int) -> Peeked:
        """Give the first bytes."""
        try:
            peeked = self.source.peek(key, nbytes)
            if peeked.stat.version == self.reference.version:
                return peeked
            why = f"it is at version {peeked.stat.version}, not {quoted(self.reference.version)}"
        except (MissingObject, InvalidUpdate, OSError) as error:
            why = str(error)
        raise self._another(why)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Stream bytes."""
        try:
            yield from self.source.get(key, start, stop, version=version)
        except (MissingObject, ChangedObject) as error:
            raise self._another(str(error)) from None

    def _another(self, why: str) -> ChangedObject:
        log.error("the model %s cannot be read: %s", quoted(self.reference.source), why)  # the node's own log
        return ChangedObject(
            f"{self.reference.source} is not on this node at the version that the server names: it is missing, it may not be read, or it "
            "was written again; see the node's log"
        )


def _below(url: str, directory: str) -> bool:
    """Tell whether a URL lies below another, segment by segment; one with dots for segments lies nowhere."""
    parts, base = _segments(url), _segments(directory)
    whole_machine = base == ["file://"]
    return not whole_machine and parts[: len(base)] == base and len(parts) > len(base) and not {".", ".."} & {*parts}


def _segments(url: str) -> list[str]:
    split = urlsplit(url)
    return [f"{split.scheme}://{split.netloc}", *filter(None, unquote(split.path).split("/"))]
