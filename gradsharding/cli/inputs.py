"""Paths and URLs become a round: nothing here parses options or prints."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from gradsharding.arithmetic.rules import Rule
from gradsharding.arithmetic.weights import check_weight
from gradsharding.errors import DuplicateClient, InvalidId, InvalidUpdate, InvalidWeight, MissingObject, NonFinite, UserError, quoted
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Contribution, Manifest, check_id
from gradsharding.planning.projection import commanded
from gradsharding.planning.task import NonFinitePolicy
from gradsharding.rounds.records import RECORD
from gradsharding.rounds.round import Round
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore, check_key, root_of
from gradsharding.stores.updates import Update, inspect, inspection
from gradsharding.stores.urls import file_path, file_reference, locate, open_store
from gradsharding.usage import Usage, carried, together

NOWHERE = MemoryStore()
"""The store against which URLs are resolved: none of them lies in it."""

BAD_NAME = "a file's name may not contain a backslash, nor be .gradsharding; rename it"


class Given(NamedTuple):
    """An update as the user named it, with its header."""

    client: str
    place: "Place"
    weight: float
    header: Update

    lookups: int
    """Remote objects that were asked for until this one was found."""

    @property
    def contribution(self) -> Contribution:
        """The update as a round takes it."""
        return Contribution(self.client, self.place.reference, self.header, self.weight)


class Place(NamedTuple):
    """An object as the user named it: a local file, or an object in a remote store."""

    text: str
    reference: str
    """The object as every store names it: a URL."""
    path: Path | None
    """The file, if it is on this machine."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Parse a local path, a ``file://`` URL, or the URL of an object in a store."""
        if re.match("[a-z][a-z0-9+.-]*://", text) and not text.startswith("file://"):
            return cls(text, text, None)
        path = Path(file_path(text) if text.startswith("file://") else text)
        return cls(str(path), file_reference(path), path)

    @property
    def beside(self) -> str:
        """URL of the directory or prefix that contains the object."""
        return self.reference.rpartition("/")[0]

    def inspect(self) -> Update | InvalidUpdate | None:
        """Read the header of an update, in one request, or two if it is long. Return None if nothing is there, or why it is no update."""
        if not locate(self.reference, NOWHERE)[1] or (self.path and not os.path.exists(self.path)):  # noqa: PTH110 - Path.exists raises for a name too long
            return None
        if self.path and not self.path.is_file():
            return InvalidUpdate(f"{self.text} is a directory or special file; name a safetensors file")
        if self.path and not _is_key(self.path.name):
            return InvalidUpdate(f"{self.text}: {BAD_NAME}")
        try:
            return inspect(self.reference, NOWHERE)
        except MissingObject:
            if self.path:  # the file exists, but cannot be read
                raise
            return None
        except InvalidUpdate as error:
            return InvalidUpdate(error.message.replace(self.reference, self.text, 1))


def read_updates(texts: Sequence[str]) -> list[Given]:
    """Read updates written as ``[id=]path[:weight]``.

    A path may itself contain ":" and "=": of all readings of a text, the one whose file exists is taken.
    Raise UserError if there is no such file, or several; InvalidId, InvalidWeight, InvalidUpdate, DuplicateClient.
    """
    given: dict[str, Given] = {}
    with ThreadPoolExecutor(16) as pool:  # each remote update takes a few round trips
        updates = [*(pool.map if any("://" in text for text in texts) else map)(carried(_read_update), texts)]
    for update in updates:
        if other := given.get(update.client):
            raise DuplicateClient(
                f"client {update.client!r} is given twice, {other.place.text} and {update.place.text}; name each with ID=PATH"
            )
        given[update.client] = update
    return list(given.values())


def sample_layout(text: str) -> tuple[Layout, int | None]:
    """Return the layout of one update, and how many updates there are: None for a single file, a number for a directory or a remote prefix.

    Raise UserError if there is none, InvalidUpdate.
    """
    place = Place.of(text)
    if place.path and place.path.is_dir():
        store: ObjectStore = DirectoryStore(place.path)
        keys = sorted(path.name for path in place.path.glob("*.safetensors"))
    elif update := place.inspect():
        if isinstance(update, InvalidUpdate):
            raise update
        return update.layout, None
    elif place.path:
        raise UserError(f"there is no file or directory {text}; check the path")
    else:
        store = open_store(place.reference.rstrip("/"))
        keys = [key for key, _ in store.list("") if key.endswith(".safetensors")]
    if not keys:
        raise UserError(f"{text} contains no updates; updates are files or objects named *.safetensors")
    return inspect(keys[0], store).layout, len(keys)


def writable(text: str, taken: Sequence[Place]) -> Place:
    """Parse the place of an object to write; raise UserError, before any work is done, if it cannot be written.

    ``taken`` are the command's other objects, which it must not replace. Through a link, the link's target is written; the link stays.
    """
    if text == "-":
        raise UserError("- is not a place to write to, because results are not streamed; name a file (./- for a file of that name)")
    place = Place.of(text)
    if place.path:
        target = _followed(place.path)
        place = Place(place.text, file_reference(target), target)
    if not place.path and not locate(place.reference, NOWHERE)[1]:
        raise UserError(f"{text} names a store, not an object; name an object, such as {text}mean.safetensors")
    if place.reference in (other.reference for other in taken):
        raise UserError(f"{text} is one of this command's other files; write to another place")
    if path := place.path:
        _check_writable(path, [other.path for other in taken if other.path])
    return place


def _followed(path: Path) -> Path:
    """Return the target of a link, which need not exist yet; raise UserError if it leads to itself, or to a stream of this process."""
    target = path
    for _ in range(40):  # as many as Linux follows
        if target.parent.resolve().is_relative_to("/proc"):  # such as /dev/stdout
            raise UserError(f"{path} cannot be replaced: it is a stream, or a file of the system; choose another place")
        if not target.is_symlink():
            return target
        target = target.parent.resolve() / target.readlink()
    raise UserError(f"{path} is a link that leads to itself; name a file")


def _is_key(name: str) -> bool:
    try:
        return bool(check_key(name))
    except InvalidId:
        return False


def _check_writable(path: Path, taken: Sequence[Path]) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a directory or special file; name a regular file, new or to be replaced")
    if not _is_key(path.name):
        raise UserError(f"{path}: {BAD_NAME}")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} for {path.name}; make it first")
    if path.resolve() in (other.resolve() for other in taken):
        raise UserError(f"{path} is one of this command's other files; write to another place")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from None


@contextlib.contextmanager
def open_round(store: str | None, given: Sequence[Given], output: Place, nonfinite: NonFinitePolicy, rule: Rule) -> Iterator[Round]:
    """Open the round of these inputs and this output: in ``store``, where it can be resumed, or in a temporary place.

    If the round cannot or should not be resumed, nothing of it remains after an error.
    """
    with contextlib.ExitStack() as stack:
        home = open_store(store) if store else stack.enter_context(_store_near(output))
        round_ = Round.create(home, _round_id(given, output, nonfinite, rule), output=output.reference)
        try:
            round_.freeze(Manifest.of(round_.id, (update.contribution for update in given)))
            yield round_
        except BaseException as error:
            if not store or isinstance(error, UserError):
                round_.abandon()
            raise


def requests_around(given: Sequence[Given], round_: Round, *, emptied: bool) -> dict[str, Usage]:
    """Return what a command asks of stores before and after the aggregation; ``emptied``: it empties a temporary store of its own."""
    headers = dict[str, Usage]()
    for update in given:
        kind = update.place.reference.partition("://")[0]
        header = inspection(update.header.base, update.header.layout.nbytes)
        headers = together(headers, {kind: header + Usage(gets=max(0, update.lookups - 1))})
    manifest = round_.seal()  # this handle knows it already
    return commanded(headers, round_.store.charges, manifest.json_bytes + RECORD + len(round_.output), found=round_.found, emptied=emptied)


def located(error: NonFinite, given: Sequence[Given]) -> NonFinite:
    """Name the file, tensor and element of each value in the error."""
    found, finite = error.details["found"], {*error.details.get("overflowing", ())}
    bad = _places([(client, byte) for client, byte in found if client not in finite], given)
    overflowing = _places([(client, byte) for client, byte in found if client in finite], given)
    sentences = [f"NaN or infinity in {bad}; correct or leave out the update"] if bad else []
    if overflowing:
        sentences.append(f"finite values overflow when summed, in {overflowing}; scale them down")
    return NonFinite("; ".join(sentences), **error.details) if sentences else error


def _places(found: Sequence[tuple[str, int]], given: Sequence[Given]) -> str:
    """Name the files and elements of the first three values, and count the other files."""
    updates, places = {update.client: update for update in given}, []
    for client, byte in found[:3]:
        tensor, index = updates[client].header.layout.locate(byte)
        places.append(f"{updates[client].place.text} at {quoted(tensor.name)}{quoted(index)}")
    return ", ".join(places) + (f", and in {len(found) - 3} more" if len(found) > 3 else "")


def _read_update(text: str) -> Given:
    readings = [(*reading, reading[1].inspect()) for reading in _readings(text)]
    found = [reading for reading in readings if reading[3]]
    if not found:
        raise UserError(f"there is no file for {text!r}; an update is [ID=]PATH[:WEIGHT], its PATH a local path or a file:// or s3:// URL")
    if len(found) > 1:
        paths = " and ".join(repr(place.text) for _, place, *_ in found)
        raise UserError(f"{text!r} can be read in several ways, because {paths} exist; rename one of them")
    client, place, weight, header = found[0]
    if isinstance(header, InvalidUpdate):
        raise header
    assert header
    try:
        name = check_id(Path(place.path or place.text).stem if client is None else client)
        return Given(name, place, _weight(weight, name), header, sum(not place.path for _, place, *_ in readings))
    except InvalidId as error:
        raise InvalidId(f"{text!r}: {error.message}; name the client with ID=PATH") from None


def _readings(text: str) -> Iterator[tuple[str | None, Place, str]]:
    """Yield all readings of an update, as (id, place, weight)."""
    client, equals, rest = text.partition("=")
    for name, place in [(None, text), (client, rest)][: 1 + bool(equals)]:
        head, colon, weight = place.rpartition(":")
        for path, number in [(place, "1"), (head, weight)][: 1 + bool(colon and "/" not in weight)]:
            if path:
                yield name, Place.of(path), number


def _weight(text: str, client: str) -> float:
    number: float | None = None
    if re.fullmatch("[0-9]{1,16}", text):
        number = int(text)
    elif re.fullmatch("[-+.0-9A-Za-z]+", text):  # float() itself reads spaces, underscores and the digits of other scripts
        with contextlib.suppress(ValueError):
            number = float(text)
    if number is None:
        raise InvalidWeight(f"client {client} has weight {text!r}; use a positive number, such as its number of examples")
    return check_weight(number, client)


@contextlib.contextmanager
def _store_near(output: Place) -> Iterator[ObjectStore]:
    """Open a temporary store for one round, beside the output."""
    if output.path:
        with tempfile.TemporaryDirectory(prefix=".gradsharding-", dir=output.path.parent, ignore_cleanup_errors=True) as directory:
            yield DirectoryStore(directory)
        return
    store = open_store(f"{root_of(f'{output.beside}/')}rounds/gradsharding-{uuid.uuid4().hex}")
    try:
        yield store
    finally:
        store.delete(key for key, _ in store.list(""))


def _round_id(given: Sequence[Given], output: Place, nonfinite: NonFinitePolicy, rule: Rule) -> str:
    """Derive an id from everything that determines the result, so that the same command finds its round again."""
    inputs = sorted([u.client, u.place.reference, u.header.stat.version, u.weight] for u in given)
    return "r-" + hashlib.sha256(json.dumps([inputs, output.reference, nonfinite, str(rule)]).encode()).hexdigest()[:32]
