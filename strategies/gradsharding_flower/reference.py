"""A reference stands in a message where arrays would: it names one safetensors object, pinned by version."""

import os
from collections.abc import Mapping, Sequence
from typing import Self

from flwr.app import Array, ArrayRecord
from pydantic import ValidationError

from gradsharding import ObjectStore, Raw
from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import Buffer
from gradsharding.format.encode import encode
from gradsharding.format.layout import Layout
from gradsharding.stores.protocol import ReadableStore
from gradsharding.stores.updates import Update, inspect, load_raw
from gradsharding.stores.urls import file_reference
from gradsharding.value import Value
from gradsharding_flower.arrays import to_raw, to_record

STYPE = "gradsharding.reference.v1"
"""The serialization type of a reference; code that does not know it fails on it, instead of averaging it."""

KEY = "gradsharding.reference"
"""The one key of an ArrayRecord that is a reference."""


class Reference(Value):
    """Where a model's arrays lie, and the order in which its record names them."""

    source: str
    version: str
    nbytes: int
    names: tuple[str, ...]

    def record(self) -> ArrayRecord:
        """The ArrayRecord that travels: one array of a few bytes, whatever the model."""
        return ArrayRecord({KEY: Array("reference", (), STYPE, self.model_dump_json().encode())})

    @classmethod
    def to(cls, source: str, update: Update, names: tuple[str, ...] | None = None) -> Self:
        """Make one to an object whose header was read; ``names`` orders its tensors, by default as their bytes lie."""
        layout, stat = update.layout, update.stat
        return cls(source=source, version=stat.version, nbytes=layout.nbytes, names=names or tuple(t.name for t in layout.tensors))

    def load(self, store: ReadableStore) -> ArrayRecord:
        """Read the arrays; raise ChangedObject if they were written again."""
        return to_record(load_raw(self.source, store, version=self.version), self.names)


def find(record: ArrayRecord, most: int | None = None) -> Reference | None:
    """Read the reference that ``record`` is, or None if it holds arrays.

    Raise InvalidUpdate if it is malformed, or has more than ``most`` bytes.
    """
    array = record.get(KEY)
    if array is None or array.stype != STYPE:
        return None
    if most is not None and len(array.data) > most:
        raise InvalidUpdate(f"its receipt takes {len(array.data)} bytes, where {most} are a few times what the model takes")
    try:
        return Reference.model_validate_json(array.data)
    except ValidationError as error:
        raise InvalidUpdate(f"a malformed reference: {error.errors()[0]['msg'][:80]}; use the same gradsharding on all nodes") from None


def write(key: str, arrays: ArrayRecord, store: ObjectStore) -> Reference:
    """Write the arrays of a record as one object under ``key``; raise ObjectExists or InvalidUpdate."""
    return Reference.to(key, put(key, arrays, store), tuple(arrays))


def put(key: str, arrays: ArrayRecord, store: ObjectStore) -> Update:
    """Do the same; give what a reader of the header would find."""
    layout, buffers = encoded(arrays)
    return Update(layout, memoryview(buffers[0]).nbytes, store.put(key, buffers))


def encoded(arrays: ArrayRecord) -> tuple[Layout, list[Buffer]]:
    """Lay out the arrays of a record as one object: its buffers, in order; raise InvalidUpdate."""
    raws: Mapping[str, Raw] = {name: to_raw(name, array) for name, array in arrays.items()}
    return encode(raws)


def describe(source: str, store: ObjectStore, names: tuple[str, ...] | None = None) -> Reference:
    """Make a reference to an object that is there, reading its header only."""
    return Reference.to(source, inspect(source, store), names)


def refer(path: str | os.PathLike[str], store: ObjectStore, names: Sequence[str] = ()) -> ArrayRecord:
    """Make initial arrays of a local safetensors file that all nodes can read, without reading its data.

    Give it to ``GradSharding.start`` as ``initial_arrays``: then no model is ever in the server's memory. ``names`` orders
    the tensors, for apps that go by their order; without it, that of their bytes in the file holds.
    """
    return describe(file_reference(path), store, tuple(names)).record()


def client_id(node_id: int) -> str:
    """A node's id as a client's: so written that sorting by text is sorting by number."""
    return f"{node_id:020d}"
