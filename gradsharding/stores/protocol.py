"""A store keeps objects under keys: each is created once and never changes, and every request is counted.

A store counts (``gradsharding.usage.count``) each request that it makes and each byte that it reads or writes, under the scheme of its
URL, and states beforehand how many requests each verb takes (``Charges``).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from gradsharding.errors import ChangedObject, IncompleteUpload, InvalidId, MissingObject, ObjectExists
from gradsharding.format.dtypes import Buffer
from gradsharding.stores.charges import Charges
from gradsharding.stores.reading import Reading

Reach = Literal["process", "machine", "network"]
"""Who can open a store by its URL: this process alone; others that see the same files, on this machine, say; or any machine."""


class Stat(NamedTuple):
    """An object's size in bytes, and a text that changes whenever the object does (S3 calls it ETag)."""

    size: int
    version: str


class Peeked(NamedTuple):
    """An object's size and version, and its first bytes, all from one request."""

    stat: Stat
    first: bytes


class ReadableStore(Protocol):
    """The verbs that read an object."""

    def head(self, key: str) -> Stat:
        """Return an object's size and version; raise MissingObject."""
        ...

    def peek(self, key: str, nbytes: int) -> Peeked:
        """Return an object's size, version and first ``nbytes`` bytes, in one request; raise MissingObject."""
        ...

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Stream bytes ``start`` to ``stop`` in buffers of any size; a buffer is valid until the next one is requested.

        The stream ends early where the object does. Raise MissingObject, or ChangedObject if the object is not at ``version``, or changes
        while it is read.
        """
        ...


class ObjectStore(ReadableStore, Protocol):
    """What the engine needs from a store. ``gradsharding.testing.StoreContract`` states it as tests."""

    url: str
    """``open_store`` opens the same store from it."""
    grain: int
    """Bytes of a slice that suits the store: large enough that a request costs little beside the transfer of its bytes."""
    reading: Reading
    """How a function should read from the store."""

    @property
    def reach(self) -> Reach:
        """Who can open the same store by its URL."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether its objects take memory of this machine, which is charged to whoever writes them."""
        ...

    @property
    def charges(self) -> Charges:
        """How many requests each verb takes."""
        ...

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        """Create an object from buffers, all of it or nothing; raise ObjectExists if the key is taken."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Iterate over all keys that begin with ``prefix``, sorted, with their stats."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are ignored."""
        ...

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Read many small objects in full, in the order of ``keys``; raise MissingObject."""
        ...

    def begin(self, key: str) -> str:
        """Begin a multipart upload; return its id."""
        ...

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        """Write one part at its ``offset``; a part written again is replaced. Numbers, 1 to 10,000, ascend with the offsets."""
        ...

    def parts(self, key: str, upload: str) -> dict[int, int]:
        """Return the sizes of the parts that have arrived, in bytes, by number; raise MissingObject if there is no such upload."""
        ...

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        """Publish the object: its parts, of ``sizes`` bytes by number, joined in order.

        Raise IncompleteUpload unless exactly these parts have arrived; ObjectExists if the key is taken, unless ``overwrite``.
        """
        ...

    def abort(self, key: str, upload: str) -> None:
        """Drop an upload and its parts."""
        ...


def root_of(place: str) -> str:
    """Return the part of a prefix before ``results/``, or all of it if it has none; ``place`` ends in "/".

    Rounds and unfinished uploads lie beside ``results/``, where a bucket's lifecycle rules find and expire them.

    >>> [root_of(place) for place in ("s3://bucket/fl/results/2026/", "results/", "s3://bucket/models/", "s3://results/results/x/")]
    ['s3://bucket/fl/', '', 's3://bucket/models/', 's3://results/']
    """
    return re.split(r"(?:^|(?<=[^/]/))results/", place, maxsplit=1)[0]  # after "//" stands a bucket, even if its name is "results"


def check_key(key: str) -> str:
    """Return ``key`` if it is a plain relative path; raise InvalidId otherwise."""
    if not is_key(key):
        raise InvalidId(f"{key!r} is not a key; use a relative path without empty, '.' or '..' segments or backslashes")
    return key


def is_key(key: str) -> bool:
    """Return whether ``key`` is a plain relative path."""
    segments = key.split("/")
    return not (any(s in ("", ".", "..") for s in segments) or "\0" in key or "\\" in key or segments[0] == ".gradsharding")


def check_arrived(key: str, sizes: Mapping[int, int], arrived: Mapping[int, int]) -> None:
    """Raise IncompleteUpload unless exactly the parts in ``sizes`` have ``arrived``, with those sizes."""
    for number in sorted({*sizes, *arrived}):
        due, found = sizes.get(number), arrived.get(number)
        if due != found:
            seen = "has not arrived" if found is None else f"has {found} bytes"
            wanted = "none of that number is due" if due is None else f"{due} bytes are due"
            raise IncompleteUpload(f"{key}: part {number} {seen}, where {wanted}; write the parts anew", key=key)


def missing(key: str, url: str, why: str | None = None) -> MissingObject:
    """Return the error for a key without an object, or with one that cannot be read."""
    return MissingObject(f"there is no object {key!r} in {url}" + (f" that can be read ({why})" if why else ""), key=key)


def taken(key: str, url: str) -> ObjectExists:
    """Return the error for creating an object that exists."""
    return ObjectExists(f"{key!r} is already in {url}; objects are created once", key=key)


def changed(key: str, version: str | None, found: str, reason: str = "it was written again") -> ChangedObject:
    """Return the error for an object that is at another version than expected."""
    return ChangedObject(f"{key!r} is at version {found}, not {version} as sealed: {reason}", key=key)


def no_upload(key: str, upload: str) -> MissingObject:
    """Return the error for an upload that is not in progress."""
    return MissingObject(f"there is no upload {upload} of {key!r}; it was completed or aborted", key=key)
