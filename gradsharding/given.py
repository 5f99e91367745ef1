"""What a user names, by paths and URLs of this machine, becomes a round. Nothing here parses options or prints."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gradsharding.errors import DuplicateClient, InvalidId, InvalidUpdate, InvalidWeight, NonFinite, UserError
from gradsharding.plan import NonFinitePolicy
from gradsharding.round import Round, check_id, check_weight
from gradsharding.store import DirectoryStore, MemoryStore, file_path, file_reference, open_store
from gradsharding.update import Update, inspect


class Given(NamedTuple):
    """An update as a user named it, its header read."""

    client: str
    path: Path
    weight: float
    header: Update

    @property
    def reference(self) -> str:
        """The update's name for any store."""
        return file_reference(self.path)

    def refer(self, round_: Round) -> None:
        """Record the update in a round; its data stay where they are."""
        round_.refer(self.client, self.reference, self.weight, update=self.header)


def read_updates(texts: Sequence[str]) -> list[Given]:
    """Read updates written as ``[id=]path[:weight]``.

    A path may itself hold ":" and "=": of all ways to read a text, the one whose file exists is meant.
    Raise UserError for no such file, or several; InvalidId, InvalidWeight, InvalidUpdate, DuplicateClient.
    """
    given: dict[str, Given] = {}
    for text in texts:
        update = _read_update(text)
        if other := given.get(update.client):
            raise DuplicateClient(f"client {update.client!r} is given twice, {other.path} and {update.path}; name each with ID=PATH")
        given[update.client] = update
    return list(given.values())


def writable(text: str, taken: Sequence[Path]) -> Path:
    """Read the path of a file to write; raise UserError, before any work is done, if that cannot be done.

    ``taken`` are the files that it must not be.
    """
    path = _local(text)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a directory or special file; name a regular file, new or to be replaced")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} for {path.name}; make it first")
    if path.resolve() in (other.resolve() for other in taken):
        raise UserError(f"{path} is one of this command's other files; write to another place")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from None
    return path


def replace(path: Path, text: str) -> None:
    """Write a file, all of it or nothing."""
    draft = path.with_name(f".gradsharding-{uuid.uuid4().hex}")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def open_round(store: str | None, given: Sequence[Given], output: Path, nonfinite: NonFinitePolicy) -> Iterator[Round]:
    """Give the one round of these inputs and this output: in ``store``, where it can be resumed, or in a temporary place.

    A round that nobody can or should resume leaves nothing behind.
    """
    with contextlib.ExitStack() as stack:
        home = open_store(store) if store else DirectoryStore(stack.enter_context(_directory_beside(output)))
        round_ = Round.create(home, _round_id(given, output, nonfinite), output=file_reference(output))
        try:
            for update in given:
                update.refer(round_)
            yield round_
        except BaseException as error:
            if not store or isinstance(error, UserError):
                round_.abandon()
            raise


def located(error: NonFinite, given: Sequence[Given]) -> NonFinite:
    """Say in which file, tensor and element the values are."""
    found, updates = error.details["found"], {update.client: update for update in given}
    if not found:  # finite values whose sum is not
        return error
    places = []
    for client, byte in found[:3]:
        tensor, index = updates[client].header.layout.locate(byte)
        places.append(f"{updates[client].path} at {tensor.name!r}{list(index)}")
    more = f", and in {len(found) - 3} more" if len(found) > 3 else ""
    return NonFinite(f"NaN or infinity in {', '.join(places)}{more}; mend or leave out the update", **error.details)


def _read_update(text: str) -> Given:
    found = [reading for reading in _readings(text) if os.path.exists(reading[1])]  # noqa: PTH110 - Path.exists raises for a name too long
    if not found:
        raise UserError(f"there is no file for {text!r}; an update is [ID=]PATH[:WEIGHT], its PATH a local path or a file:// URL")
    if len(found) > 1:
        paths = " and ".join(repr(str(path)) for _, path, _ in found)
        raise UserError(f"{text!r} can be read in several ways, for {paths} exist; rename one of them")
    client, path, weight = found[0]
    if not path.is_file():
        raise UserError(f"{path} is a directory or special file; name a safetensors file")
    try:
        name = check_id(path.stem if client is None else client)
        return Given(name, path, _weight(weight, name), inspect(file_reference(path), MemoryStore()))
    except InvalidId as error:
        raise InvalidId(f"{text!r}: {error.message}; name the client with ID=PATH") from None
    except InvalidUpdate as error:
        raise InvalidUpdate(error.message.replace(file_reference(path), str(path), 1)) from None


def _readings(text: str) -> Iterator[tuple[str | None, Path, str]]:
    """All ways to read an update, as (id, path, weight)."""
    client, equals, rest = text.partition("=")
    for name, place in [(None, text), (client, rest)][: 1 + bool(equals)]:
        head, colon, weight = place.rpartition(":")
        for path, number in [(place, "1"), (head, weight)][: 1 + bool(colon and "/" not in weight)]:
            if path:
                yield name, _local(path), number


def _local(text: str) -> Path:
    return Path(file_path(text) if text.startswith("file://") else text)


def _weight(text: str, client: str) -> float:
    try:
        return check_weight(int(text) if re.fullmatch("[0-9]{1,16}", text) else float(text), client)
    except InvalidWeight:
        raise
    except ValueError:
        raise InvalidWeight(f"client {client} has weight {text!r}; use a positive number, such as its number of examples") from None


def _directory_beside(output: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".gradsharding-", dir=output.parent, ignore_cleanup_errors=True)


def _round_id(given: Sequence[Given], output: Path, nonfinite: NonFinitePolicy) -> str:
    """Derive an id from all that decides the result, so that the same call finds its round again."""
    inputs = sorted([u.client, u.reference, u.header.stat.version, u.weight] for u in given)
    return "r-" + hashlib.sha256(json.dumps([inputs, file_reference(output), nonfinite]).encode()).hexdigest()[:32]
