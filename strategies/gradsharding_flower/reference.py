"""A reference takes the place of arrays in a message: it names one safetensors object, pinned by version."""

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
"""Serialization type of a reference: code that does not know it fails, and does not average it."""

KEY = "gradsharding.reference"
"""The only key of an ArrayRecord that is a reference."""


class Reference(Value):
    """The place of a model's arrays, and the order in which its record names them."""

    source: str
    version: str
    nbytes: int
    """Of the data section."""
    names: tuple[str, ...]

    def record(self) -> ArrayRecord:
        """The ArrayRecord that is sent: one array of a few bytes, however large the model."""
        return ArrayRecord({KEY: Array("reference", (), STYPE, self.model_dump_json().encode())})

    @classmethod
    def to(cls, source: str, update: Update, names: tuple[str, ...] | None = None) -> Self:
        """Refer to an object whose header was read; ``names`` orders its tensors, by default as their bytes are ordered."""
        layout, stat = update.layout, update.stat
        return cls(source=source, version=stat.version, nbytes=layout.nbytes, names=names or tuple(t.name for t in layout.tensors))

    def load(self, store: ReadableStore) -> ArrayRecord:
        """Read the arrays; raise ChangedObject if the object was written again."""
        return to_record(load_raw(self.source, store, version=self.version), self.names)


def find_reference(record: ArrayRecord, most: int | None = None) -> Reference | None:
    """Return the reference in ``record``, or None if it holds arrays.

    Raise InvalidUpdate if the reference is malformed or takes more than ``most`` bytes.
    """
    array = record.get(KEY)
    if array is None or array.stype != STYPE:
        return None
    if most is not None and len(array.data) > most:
        raise InvalidUpdate(f"its receipt takes {len(array.data)} bytes; at most {most} are accepted, a few times the model's own")
    try:
        return Reference.model_validate_json(array.data)
    except ValidationError as error:
        raise InvalidUpdate(f"a malformed reference: {error.errors()[0]['msg'][:80]}; use the same gradsharding on all nodes") from None


def write_arrays(key: str, arrays: ArrayRecord, store: ObjectStore) -> Reference:
    """Write the arrays of a record as one object under ``key``, and refer to it; raise ObjectExists or InvalidUpdate."""
    return Reference.to(key, put_arrays(key, arrays, store), tuple(arrays))


def put_arrays(key: str, arrays: ArrayRecord, store: ObjectStore) -> Update:
    """Write the same; return what a reader of the header would find."""
    layout, buffers = serialized(arrays)
    return Update(layout, memoryview(buffers[0]).nbytes, store.put(key, buffers))


def serialized(arrays: ArrayRecord) -> tuple[Layout, list[Buffer]]:
    """Serialize the arrays of a record as one object: its layout, and its buffers in order; raise InvalidUpdate."""
    raws: Mapping[str, Raw] = {name: to_raw(name, array) for name, array in arrays.items()}
    return encode(raws)


def reference_to(source: str, store: ObjectStore, names: tuple[str, ...] | None = None) -> Reference:
    """Refer to an existing object; only its header is read."""
    return Reference.to(source, inspect(source, store), names)


def refer(path: str | os.PathLike[str], store: ObjectStore, names: Sequence[str] = ()) -> ArrayRecord:
    """Make initial arrays that refer to a local safetensors file, which all nodes can read; its data is not read here.

    Pass them to ``GradSharding.start`` as ``initial_arrays``: then no model is ever in the server's memory. ``names`` orders
    the tensors, for apps that rely on the order; by default they are ordered as their bytes in the file.
    """
    return reference_to(file_reference(path), store, tuple(names)).record()


def client_id(node_id: int) -> str:
    """A node's id as a client id, padded so that ids sort as text as they do as numbers."""
    return f"{node_id:020d}"
