"""What a store promises: few verbs, what it asks is counted, objects are created once and never change.

A store counts (``gradsharding.usage.count``) each request it makes and each byte it brings or sends, under the scheme of its URL,
and says beforehand how many requests each verb takes (``Charges``).
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
    """What one request tells of an object, and its first bytes."""

    stat: Stat
    first: bytes


class Source(Protocol):
    """What reading an object asks of a store."""

    def head(self, key: str) -> Stat:
        """Tell an object's size and version; raise MissingObject."""
        ...

    def peek(self, key: str, nbytes: int) -> Peeked:
        """Tell an object's size and version, and give its first ``nbytes`` bytes, in one request; raise MissingObject."""
        ...

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        """Stream bytes ``start`` to ``stop``, cut anywhere; a buffer is valid until the next one is asked for.

        Raise MissingObject, or ChangedObject if the object is not, or ceases to be, at ``version``.
        Bytes beyond the object's end are not given.
        """
        ...


class ObjectStore(Source, Protocol):
    """What the engine asks of a store. ``gradsharding.testing.StoreContract`` states it as tests."""

    url: str
    """Text from which ``open_store`` opens the same store again."""
    grain: int
    """Bytes of a slice that suit it: a request for so many, and a part of so many, cost next to nothing beside their bytes."""
    reading: Reading
    """How a function should read from it."""

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
        """Requests that its verbs take."""
        ...

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        """Create an object from buffers, all at once or not at all; raise ObjectExists if there is one."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Give all keys that begin with ``prefix``, sorted, with their stats."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are missing are passed over."""
        ...

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Read many small objects, whole, in the order of ``keys``; raise MissingObject."""
        ...

    def begin(self, key: str) -> str:
        """Begin an object that will be written in parts; give the upload's id."""
        ...

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        """Write one part at its ``offset``; writing it again replaces it. Numbers, 1 to 10,000, ascend with offsets."""
        ...

    def parts(self, key: str, upload: str) -> dict[int, int]:
        """Tell which parts have arrived, and their bytes, by number; raise MissingObject if there is no such upload."""
        ...

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        """Publish the object that parts of ``sizes`` bytes, by number, make end to end.

        Raise IncompleteUpload unless just these have arrived, ObjectExists unless ``overwrite``.
        """
        ...

    def abort(self, key: str, upload: str) -> None:
        """Forget an upload and its parts."""
        ...


def root_of(place: str) -> str:
    """Give what stands before ``results/`` in a place that ends in "/", all of it if that is not in it.

    Beside results, a store has its rounds and what is unfinished; a bucket's rules, which clear those away, look for them there.

    >>> [root_of(place) for place in ("s3://bucket/fl/results/2026/", "results/", "s3://bucket/models/", "s3://results/results/x/")]
    ['s3://bucket/fl/', '', 's3://bucket/models/', 's3://results/']
    """
    return re.split(r"(?:^|(?<=[^/]/))results/", place, maxsplit=1)[0]  # what follows "//" is a bucket, whatever it is called


def check_key(key: str) -> str:
    """Give ``key`` back if it is a plain relative path; raise InvalidId."""
    if not is_key(key):
        raise InvalidId(f"{key!r} is not a key; use a relative path without empty, '.' or '..' segments or backslashes")
    return key


def is_key(key: str) -> bool:
    """Tell whether ``key`` is a plain relative path."""
    segments = key.split("/")
    return not (any(s in ("", ".", "..") for s in segments) or "\0" in key or "\\" in key or segments[0] == ".gradsharding")


def check_arrived(key: str, sizes: Mapping[int, int], arrived: Mapping[int, int]) -> None:
    """Raise IncompleteUpload unless the parts that have ``arrived`` are those of ``sizes`` bytes."""
    for number in sorted({*sizes, *arrived}):
        due, found = sizes.get(number), arrived.get(number)
        if due != found:
            seen = "has not arrived" if found is None else f"has {found} bytes"
            wanted = "none of that number is due" if due is None else f"{due} bytes are due"
            raise IncompleteUpload(f"{key}: part {number} {seen}, where {wanted}; write the parts anew", key=key)


def missing(key: str, url: str, why: str | None = None) -> MissingObject:
    """The error for a key without an object, or with one that cannot be read."""
    return MissingObject(f"there is no object {key!r} in {url}" + (f" that can be read ({why})" if why else ""), key=key)


def taken(key: str, url: str) -> ObjectExists:
    """The error for creating what is there."""
    return ObjectExists(f"{key!r} is already in {url}; objects are created once", key=key)


def changed(key: str, version: str | None, found: str, how: str = "it was written again") -> ChangedObject:
    """The error for an object that is at another version."""
    return ChangedObject(f"{key!r} is at version {found}, not {version} as sealed: {how}", key=key)


def no_upload(key: str, upload: str) -> MissingObject:
    """The error for an upload that is not under way."""
    return MissingObject(f"there is no upload {upload} of {key!r}; it was completed or aborted", key=key)
