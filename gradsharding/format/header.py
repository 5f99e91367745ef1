"""A header is accepted if and only if the reference implementation of safetensors accepts it.

Its rules (https://github.com/huggingface/safetensors, ``safetensors/src/tensor.rs``) are those of Rust's serde and serde_json:

- The text is UTF-8 and JSON, at most 127 levels deep. Half a surrogate pair, or a number beyond float64, is refused wherever it stands.
- If a name occurs twice, the last entry counts. ``__metadata__`` occurs at most once: a map of strings, or null.
- A tensor's entry is ``{"dtype": …, "shape": …, "data_offsets": …}``, each field once and in any order, and other fields are skipped; or
  the three values alone, ``[…, …, …]``. ``{"F32": null}`` means ``"F32"``.
- Extents and offsets are whole numbers below 2**64, written without sign, point or exponent; extents multiplied from left to right, and
  then by the bits of an element, stay below 2**64. Tensors tile the data: sorted by their offsets, they leave no gap and no overlap.

One thing differs: dtypes that cannot be averaged here are refused by name. Skipped values build no objects, and tensors are columns, so
that reading a header takes a few times its own bytes of memory, whoever wrote it.
"""

import codecs
import json
import math
import re
from array import array
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import numpy as np

from gradsharding.errors import InvalidUpdate, quoted
from gradsharding.format.dtypes import ITEM_SIZE, Array

MOST = (1 << 64) - 1
"""Upper bound of a tensor's extents, elements and bits: the reference implementation counts in 64 bits."""

DEPTH = 127
"""Levels that the JSON may have, the header's own included: serde_json reads no more."""

_HEX = rb"[0-9a-fA-F]"
_SPACE = rb"[ \t\n\r]*+"
_STRING = (
    rb'"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u(?:[0-9a-cefA-CEF]' + _HEX + rb"{3}|[dD][0-7]" + _HEX + rb"{2}"
    rb"|[dD][89abAB]" + _HEX + rb"{2}\\u[dD][c-fC-F]" + _HEX + rb'{2}))*+"'
)
_WHOLE = rb"(?:0|[1-9][0-9]{0,19}+)"
_NUMBER = rb"-?(0|[1-9][0-9]*+)(?:\.([0-9]++))?(?:[eE]([+-]?)([0-9]++))?"
_PLAIN = rb"-?(?:0|[1-9][0-9]{0,199}+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]{1,2}+)?+(?![0-9.eE])"  # far from the end of float64
_SCALAR = rb"(?:" + _STRING + rb"|" + _PLAIN + rb"|true|false|null)"
_EMPTY = rb"\[" + _SPACE + rb"\]|\{" + _SPACE + rb"\}"


def _pattern(text: bytes) -> re.Pattern[bytes]:
    """Compile a pattern in which "~" stands for white space."""
    return re.compile(text.replace(b"~", _SPACE))


def _several(item: bytes) -> bytes:
    return rb"%b(?:~,~%b)*+" % (item, item)


_BEGIN = _pattern(rb"~\{~")
_END = _pattern(rb"~\Z")
_NEXT = _pattern(rb"~([,}])~")
_NAME = _pattern(rb"(" + _STRING + rb")~:~")
_METADATA = _pattern(rb"null|\{~(?:" + _several(_STRING + rb"~:~" + _STRING) + rb")?+~\}")
_USUAL = _pattern(
    rb'"([^"\\\x00-\x1f]*+)"~:~\{~"dtype"~:~"([A-Z0-9_]*+)"~,~"shape"~:~(\[[0-9, \t\n\r]*+\])~,'
    rb'~"data_offsets"~:~\[~(' + _WHOLE + rb")~,~(" + _WHOLE + rb")~\]~\}~([,}])~"
)
"""A tensor's entry as nearly every writer spells it, and the character that follows it."""
_MAP, _LIST = _pattern(rb"\{~"), _pattern(rb"\[~")
_COMMA, _LIST_END = _pattern(rb"~,~"), _pattern(rb"~\]")
_DTYPE = _pattern(rb"(" + _STRING + rb")|\{~(" + _STRING + rb")~:~null~\}")
_SHAPE = _pattern(rb"\[~(?:" + _several(_WHOLE) + rb")?+~\]")
_OFFSETS = _pattern(rb"\[~(" + _WHOLE + rb")~,~(" + _WHOLE + rb")~\]")
_EXTENT = re.compile(rb"[0-9]++")
_ANY_NUMBER = re.compile(_NUMBER)
_OPEN = _pattern(rb"([\[{])~")
_CLOSE = {b"[": _pattern(rb"~\]"), b"{": _pattern(rb"~\}")}


def _runs(value: bytes) -> dict[bytes, re.Pattern[bytes]]:
    """Patterns for consecutive values, by their container: the header, a list, or a map."""
    pair = _STRING + rb"~:~" + value
    return {b"": _pattern(value), b"[": _pattern(_several(value)), b"{": _pattern(value + rb"(?:~,~" + pair + rb")*+")}


_SCALARS, _FLAT = _runs(_SCALAR), _runs(rb"(?:" + _SCALAR + rb"|" + _EMPTY + rb")")
_FIELDS = {"dtype": _DTYPE, "shape": _SHAPE, "data_offsets": _OFFSETS}
_DTYPES = {name.encode(): name for name in ITEM_SIZE}


_CACHED = 4_096
"""Shapes that are cached while a header is read: most tensors have one of a few."""

_TOO_LARGE = MOST
"""Stands for a tensor's bytes where they are 2**61 or more: no tensor has exactly this number."""


class Columns(NamedTuple):
    """The tensors of a header, in the order of their bytes."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def read(header: bytes) -> Columns:
    """Read a header's JSON; raise InvalidUpdate."""
    _check_text(header)
    names, dtypes, shapes = list[str](), list[str](), list[tuple[int, ...]]()
    places = array("Q")
    cached = dict[bytes, _Shape]()
    for name, dtype, text, start, stop in _Reader(header).tensors():
        shape = cached.get(text) or _Shape.read(name, text)
        if len(cached) < _CACHED:
            cached[text] = shape
        if dtype not in ITEM_SIZE:
            raise unsupported(name, dtype)
        if start > MOST or stop > MOST:
            raise _malformed(name)
        size = ITEM_SIZE[dtype]
        names.append(name)
        dtypes.append(dtype)
        shapes.append(shape.extents)
        places.extend((start, stop, shape.elements * size if shape.elements <= MOST // 8 // size else _TOO_LARGE))
    rows, starts, stops, sizes = _in_order(names, np.frombuffer(places, np.uint64).reshape(-1, 3))
    columns = Columns(tuple(names[i] for i in rows), tuple(dtypes[i] for i in rows), tuple(shapes[i] for i in rows))
    _check_tiles(columns, starts, stops, sizes)
    return columns


def nbytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raise InvalidUpdate for an unsupported dtype, or for a size beyond the reference implementation's 64 bits."""
    if dtype not in ITEM_SIZE:
        raise unsupported(name, dtype)
    if any(not 0 <= extent <= MOST for extent in shape):
        raise InvalidUpdate(f"tensor {quoted(name)} has shape {quoted(shape)}; extents are whole numbers below 2**64")
    count = _elements(shape)
    if count > MOST // 8 // ITEM_SIZE[dtype]:
        raise InvalidUpdate(
            f"tensor {quoted(name)}, {dtype} of shape {quoted(shape)}, is too large: its bits do not fit into 64-bit numbers"
        )
    return count * ITEM_SIZE[dtype]


def unsupported(name: str, dtype: object) -> InvalidUpdate:
    """The error for a dtype that cannot be averaged."""
    return InvalidUpdate(f"tensor {quoted(name)} has dtype {quoted(dtype)}; supported are {', '.join(ITEM_SIZE)}")


def _elements(shape: tuple[int, ...]) -> int:
    """Multiply extents as the reference implementation does: it stops once the product is 2**64 or more, and returns that."""
    product = 1
    for extent in shape:
        product *= extent
        if product > MOST:
            break
    return product


class _Shape(NamedTuple):
    extents: tuple[int, ...]
    elements: int

    @classmethod
    def read(cls, name: str, text: bytes) -> "_Shape":
        if not _SHAPE.fullmatch(text):
            raise _malformed(name)
        extents = tuple(int(extent[0]) for extent in _EXTENT.finditer(text))
        if any(extent > MOST for extent in extents):
            raise _malformed(name)
        return cls(extents, _elements(extents))


class _Reader:
    """A position in a header, and the patterns that advance it."""

    def __init__(self, text: bytes) -> None:
        self._text, self._at = text, 0

    def tensors(self) -> Iterator[tuple[str, str, bytes, int, int]]:
        """Yield each tensor's name, dtype, shape as text, start and stop, in the order of the text; ``__metadata__`` is skipped."""
        if not self._take(_BEGIN):
            raise InvalidUpdate("the header is not a JSON object; is this a safetensors object?")
        described, delimiter = False, b"," if not self._take(_CLOSE[b"{"]) else b"}"
        while delimiter == b",":
            if (usual := self._take(_USUAL)) and usual[1] != b"__metadata__":
                yield usual[1].decode(), _DTYPES.get(usual[2]) or usual[2].decode(), usual[3], int(usual[4]), int(usual[5])
                delimiter = usual[6]
                continue
            name = "__metadata__" if usual else self._name()
            if name != "__metadata__":
                yield name, *self._tensor(name)
            elif described or not self._take(_METADATA):
                raise InvalidUpdate(
                    "the header's __metadata__ is not one map of strings; save the update again with the safetensors library"
                )
            else:
                described = True
            delimiter = self._need(_NEXT)[1]
        self._need(_END)

    def _tensor(self, name: str) -> tuple[str, bytes, int, int]:
        """Read an entry that is spelled in an unusual way."""
        found = dict[str, re.Match[bytes]]()
        if self._take(_LIST):
            for i, (field, pattern) in enumerate(_FIELDS.items()):
                if (i and not self._take(_COMMA)) or not (match := self._take(pattern)):
                    raise _malformed(name)
                found[field] = match
            if not self._take(_LIST_END):
                raise _malformed(name)
        elif self._take(_MAP):
            more = not self._take(_CLOSE[b"{"])
            while more:
                field = self._name()
                if field not in _FIELDS:
                    self._pass_over()
                elif field in found or not (match := self._take(_FIELDS[field])):
                    raise _malformed(name)
                else:
                    found[field] = match
                more = self._need(_NEXT)[1] == b","
        if len(found) < len(_FIELDS):
            raise _malformed(name)
        dtype, offsets = found["dtype"], found["data_offsets"]
        return json.loads(dtype[1] or dtype[2]), found["shape"][0], int(offsets[1]), int(offsets[2])

    def _pass_over(self) -> None:
        """Skip a value of an entry, of whatever kind."""
        opened = b""
        while True:
            if not self._flat(opened):
                opened += self._need(_OPEN)[1]
                if len(opened) + 2 > DEPTH:
                    self._fail(f"more than {DEPTH} levels deep")
                if not self._take(_CLOSE[opened[-1:]]):
                    if opened.endswith(b"{"):
                        self._name()
                    continue
                opened = opened[:-1]
            while opened and self._take(_CLOSE[opened[-1:]]):
                opened = opened[:-1]
            if not opened:
                return
            self._need(_COMMA)
            if opened.endswith(b"{"):
                self._name()

    def _flat(self, opened: bytes) -> bool:
        """Skip a value that nests nothing, and all such values after it in the same list or map."""
        if self._take((_FLAT if len(opened) + 3 <= DEPTH else _SCALARS)[opened[-1:]]):
            return True
        number = self._take(_ANY_NUMBER)
        if number and not _in_range(number):
            self._fail("a number is out of range")
        return bool(number)

    def _name(self) -> str:
        text = self._need(_NAME)[1]
        return json.loads(text) if b"\\" in text else text[1:-1].decode()

    def _take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        if found := pattern.match(self._text, self._at):
            self._at = found.end()
        return found

    def _need(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        return self._take(pattern) or self._fail("something else was expected")

    def _fail(self, why: str) -> NoReturn:
        raise InvalidUpdate(f"the header is not JSON at byte {self._at} ({why}); is this a safetensors object?")


def _check_text(header: bytes) -> None:
    """Raise InvalidUpdate unless a header is UTF-8. It is decoded in pieces, as a str takes up to four times its bytes."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        for start in range(0, len(header) + 1, 1 << 16):
            decode(header[start : start + (1 << 16)], start + (1 << 16) > len(header))
    except UnicodeDecodeError:
        raise InvalidUpdate("the header is not JSON: its bytes are not UTF-8; is this a safetensors object?") from None


def _in_range(number: re.Match[bytes]) -> bool:
    """Whether serde_json can hold a number in float64: it reads the digits that fit into 64 bits, times a power of ten."""
    whole, fraction, sign, exponent = number.groups(b"")
    significand, used = _digits(whole, 0)
    power = len(whole) - used
    significand, used = _digits(fraction, significand)
    power -= used
    if not significand:
        return True
    shift = exponent.lstrip(b"0") or b"0"
    if len(shift) > 10 or int(shift) >= 1 << 31:
        return sign == b"-"
    power += -int(shift) if sign == b"-" else int(shift)
    value = float(significand)
    return power <= 308 and (power <= 0 or math.isfinite(value * float(f"1e{power}")))


def _digits(text: bytes, significand: int) -> tuple[int, int]:
    """Append digits to a number while it stays below 2**64; return it, and the number of digits used."""
    zeros = 0 if significand else len(text) - len(text.lstrip(b"0"))
    for i in range(zeros, len(text)):
        longer = significand * 10 + text[i] - ord("0")
        if longer > MOST:
            return significand, i
        significand = longer
    return significand, len(text)


def _in_order(names: list[str], places: Array) -> tuple[list[int], Array, Array, Array]:
    """Order tensors by their offsets, keeping the last of equal names; return their rows, starts, stops and bytes."""
    rows = np.arange(len(names))
    if len(set(names)) < len(names):
        rows = np.array([*{name: i for i, name in enumerate(names)}.values()])
    rows = rows[np.lexsort((places[rows, 1], places[rows, 0]))]
    return rows.tolist(), *places[rows].T


def _check_tiles(columns: Columns, starts: Array, stops: Array, sizes: Array) -> None:
    """Raise InvalidUpdate unless each tensor has the bytes it needs, and begins where the previous one ends."""
    due = np.concatenate([np.zeros(1, np.uint64), stops])[:-1]
    wrong = (sizes == _TOO_LARGE) | (starts != due) | (stops - starts != sizes)
    if not wrong.any():
        return
    i = int(wrong.argmax())
    name, dtype, shape = columns.names[i], columns.dtypes[i], columns.shapes[i]
    size, start, stop, end = nbytes(name, dtype, shape), int(starts[i]), int(stops[i]), int(due[i])
    if stop - start != size:
        raise InvalidUpdate(
            f"tensor {quoted(name)}, {dtype} of shape {quoted(shape)}, needs {size} bytes but its offsets [{start}, {stop}] hold "
            f"{stop - start}; save the update again with the safetensors library"
        )
    raise InvalidUpdate(
        f"tensor {quoted(name)} starts at byte {start} instead of byte {end}: tensors {'overlap' if start < end else 'leave a gap'}; "
        "save the update again with the safetensors library"
    )


def _malformed(name: str) -> InvalidUpdate:
    return InvalidUpdate(
        f"tensor {quoted(name)} has a malformed header entry: it needs dtype, shape, data_offsets, once each, of whole numbers below 2**64"
    )
