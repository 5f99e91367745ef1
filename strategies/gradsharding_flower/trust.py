"""A node reads models from its own store, and from places that its owner allows; it refuses any other place that a server names.

A node's own store is the one in its ``--node-config``, or, by default, the one that the server tells it to upload to. A model is pinned by
its version, which is known only to those who can read the store: a node's errors reveal no version, and nothing that a file holds.
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
"""Key in a node's ``--node-config``: URLs, separated by blanks, below which models may be read besides the node's store."""


def load_model(reference: Reference, store: ObjectStore, config: Mapping[str, object]) -> ArrayRecord:
    """Read a model on a node: a key of its store, or a URL below the store's or below one that ``config`` allows.

    Raise UserError if the model may not be read, ChangedObject if the server's version of it is not there.
    """
    source = reference.source
    allowed = [store.url, *str(config.get(ALLOW_KEY, "")).split()]
    if "://" in source and not any(_below(source, url) for url in allowed):
        raise UserError(
            f"the model is at {quoted(source)}, and this node reads only its own store; whoever runs the node can allow more: "
            f"--node-config '{ALLOW_KEY}=\"URL\"' names a directory or a prefix"
        )
    return load_pinned(reference, *locate(source, store))


def load_pinned(reference: Reference, source: ReadableStore, key: str) -> ArrayRecord:
    """Read a model from its place, once its version is known to be the one that the server names."""
    if "://" in key:
        raise UserError(f"the model is at {quoted(reference.source)}, and this node reads only by URLs that the server lends")
    return reference.model_copy(update={"source": key}).load(_Pinned(source, reference))


class _Pinned(NamedTuple):
    """One version of one object; about any other version it reveals nothing."""

    source: ReadableStore
    reference: Reference

    def head(self, key: str) -> Stat:
        """Return the size and the version, both known to the server."""
        return self.peek(key, 1).stat

    def peek(self, key: str, nbytes: int) -> Peeked:
        """Return the first bytes."""
        try:
            peeked = self.source.peek(key, nbytes)
            if peeked.stat.version == self.reference.version:
                return peeked
            why = f"it is at version {peeked.stat.version}, not {quoted(self.reference.version)}"
        except (MissingObject, InvalidUpdate, OSError) as error:
            why = str(error)
        raise self._changed(why)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Stream bytes."""
        try:
            yield from self.source.get(key, start, stop, version=version)
        except (MissingObject, ChangedObject) as error:
            raise self._changed(str(error)) from None

    def _changed(self, why: str) -> ChangedObject:
        log.error("the model %s cannot be read: %s", quoted(self.reference.source), why)  # the node's own log
        return ChangedObject(
            f"{self.reference.source} is not on this node at the version that the server names: it is missing, unreadable, or "
            "was written again; see the node's log"
        )


def _below(url: str, directory: str) -> bool:
    """Whether a URL is below another, segment by segment; a URL with '.' or '..' as a segment is below none."""
    parts, base = _segments(url), _segments(directory)
    whole_machine = base == ["file://"]
    return not whole_machine and parts[: len(base)] == base and len(parts) > len(base) and not {".", ".."} & {*parts}


def _segments(url: str) -> list[str]:
    split = urlsplit(url)
    return [f"{split.scheme}://{split.netloc}", *filter(None, unquote(split.path).split("/"))]
