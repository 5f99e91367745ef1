"""Every error has one base, says what is wrong with the numbers, and says what to do.

    GradShardingError
    ├── UserError (ValueError)            the caller can mend it; the command line exits with 2
    │   ├── InvalidUpdate                 not a well-formed safetensors object
    │   ├── LayoutMismatch                two updates do not hold the same tensors
    │   ├── InvalidWeight                 zero, negative, not finite, or too large
    │   ├── InvalidId                     an id that may not become part of a key
    │   ├── DuplicateClient               one client, two different updates
    │   ├── NonFinite                     NaN, infinity, or values whose sum is, in updates
    │   ├── TooFewClients                 nothing, or not enough, to aggregate
    │   ├── PlanTooLarge                  the plan breaks a limit; nothing has been read
    │   └── StoreRefused                  no credentials, no such bucket, another region, access denied
    ├── MissingObject (FileNotFoundError) no object under this key
    ├── ObjectExists (FileExistsError)    create-if-absent found one
    ├── ChangedObject                     the object is not the version that was sealed
    ├── InvalidRecord                     a round's record is of a later release, foreign, or damaged
    ├── IncompleteUpload                  parts are missing; the object was not published
    ├── StoreFailed                       a store could not be reached, or failed, after several attempts
    ├── VerificationFailed                a published result is not what its updates make
    ├── StackFailed                       CloudFormation did not do what it was asked for
    └── TaskFailed                        a function broke, with its task's name
        └── OutOfMemory (MemoryError)     it outgrew the allowed memory

An error in a worker crosses the wire as data (``to_wire``) and is raised again at the call (``from_wire``).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from gradsharding.usage import Usage
from gradsharding.usage import together as add_up


class GradShardingError(Exception):
    """Base of all errors; ``details`` holds the facts behind the sentence, as JSON values."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.usage: Mapping[str, Usage] = {}
        """What was asked of stores in vain, by kind of store, as far as it is known."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from data: a pool of processes hands errors over this way."""
        return from_wire, (to_wire(self),)


class UserError(GradShardingError, ValueError):
    """Something the caller gave is wrong, and the caller can mend it."""


class InvalidUpdate(UserError):
    """The object is not a well-formed safetensors file of supported dtypes."""


class LayoutMismatch(UserError):
    """Two updates differ in a tensor's name, dtype, shape or place."""


class InvalidWeight(UserError):
    """A weight is zero, negative, not finite, or beyond 2**53."""


class InvalidId(UserError):
    """An id has characters that may not become part of a key."""


class DuplicateClient(UserError):
    """A client has already contributed another update to this round."""


class NonFinite(UserError):
    """Updates hold NaN or infinity, or finite values that overflow when they are summed.

    ``details["found"]`` lists ``[client, byte]`` of the first such value of each client, ``details["overflowing"]`` the clients whose
    values are all finite, ``details["tasks"]`` the tasks that met them.
    """

    @classmethod
    def of(cls, tasks: Sequence[str], found: Iterable[Sequence[Any]], overflowing: Iterable[str] = ()) -> Self:
        """Say what some tasks have met."""
        firsts: dict[str, int] = {}
        for client, byte in sorted(found, key=lambda one: int(one[1])):
            firsts.setdefault(client, byte)
        finite = sorted({*overflowing} & {*firsts})
        bad = [client for client in sorted(firsts) if client not in finite]
        where = f"task {tasks[0]}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
        said = [f"clients {_few(bad)} hold NaN or infinity"] if bad else []
        if finite or not bad:
            said.append(
                "finite values overflow when summed" + (f", those of clients {_few(finite)}" if finite else "") + "; scale them down"
            )
        return cls(
            f"{where}: {', and '.join(said)}",
            found=[[client, firsts[client]] for client in sorted(firsts)],
            overflowing=finite,
            tasks=[*tasks],
        )

    @classmethod
    def together(cls, errors: Sequence["NonFinite"]) -> "NonFinite":
        """Make one of what several tasks have met."""
        if len(errors) == 1:
            return errors[0]
        details = [error.details for error in errors]
        found = [(client, byte, client in each["overflowing"]) for each in details for client, byte in each["found"]]
        bad = {client for client, _, overflows in found if not overflows}
        tasks = sorted((task for each in details for task in each["tasks"]), key=lambda name: (len(name), name))
        one = cls.of(tasks, [place[:2] for place in found], [client for client, *_ in found if client not in bad])
        one.usage = add_up(*(error.usage for error in errors))
        return one


class TooFewClients(UserError):
    """A round has fewer usable updates than it needs."""


class PlanTooLarge(UserError):
    """A plan needs more than its limits allow."""


class StoreRefused(UserError):
    """A store or service does not let us: credentials, bucket, region or permission are not right."""


class MissingObject(GradShardingError, FileNotFoundError):
    """There is no object under this key."""


class ObjectExists(GradShardingError, FileExistsError):
    """An object is already there, and objects are created once."""


class ChangedObject(GradShardingError):
    """The object is no longer the version that was pinned."""


class InvalidRecord(GradShardingError):
    """A record in a store is not one that this release can read; ``details["place"]`` says which."""


class IncompleteUpload(GradShardingError):
    """A multipart upload was completed with parts missing or overlapping."""


class StoreFailed(GradShardingError):
    """A store or service could not be reached, or failed, after several attempts."""


class StackFailed(GradShardingError):
    """CloudFormation did not do what it was asked for; the message gives its reason."""


class VerificationFailed(GradShardingError):
    """A published result is not, bit for bit, what its updates make."""


class TaskFailed(GradShardingError):
    """A function failed for a reason of its own."""


class OutOfMemory(TaskFailed, MemoryError):
    """A function needed more memory than the plan allowed."""


@contextlib.contextmanager
def naming(client: str) -> Iterator[None]:
    """Add the client to whatever error of ours its update leads to: to the sentence, and as ``details["client"]``, unless one is there."""
    try:
        yield
    except GradShardingError as error:
        if "client" in error.details:
            raise
        raise named(error, client) from error


def named(error: GradShardingError, client: str) -> GradShardingError:
    """Give the same error with the client's name."""
    found = type(error)(f"client {plain(client)}: {error.message}", **error.details, client=client)
    found.usage = error.usage
    return found


def _few(clients: Sequence[str]) -> str:
    """Name clients, the first ten of them."""
    return ", ".join(clients[:10]) + (f" and {len(clients) - 10} more" if len(clients) > 10 else "")


def quoted(foreign: object, most: int = 80) -> str:
    r"""Write what others have chosen, a name or a shape, for a message: in one line, without control characters, cut at ``most`` letters.

    >>> print(quoted("w"), quoted("\n\x1b[2J"), quoted("x" * 100, 8), quoted((2, 3)))
    'w' '\n\x1b[2J' 'xxxxxxxx'… [2, 3]
    """
    match foreign:
        case str() | bytes():
            return repr(foreign[:most]) + "…" * (len(foreign) > most)
        case int() if abs(foreign) >= 10**most:  # Python writes no number of more than 4,300 digits
            return f"a number of {foreign.bit_length()} bits"
        case tuple() | list():
            text = "[" + ", ".join(quoted(one, most) for one in foreign[:most]) + "]"
            return text if len(foreign) <= most and len(text) <= most else f"{text[:most]}…"
        case None | int() | float():
            return repr(foreign)
    try:
        return quoted(str(foreign), most)
    except Exception:  # noqa: BLE001 - whatever a foreign type does when it is written
        return f"a value of type {type(foreign).__name__}"


def plain(foreign: str, most: int = 200) -> str:
    """Write an id or a reference for a message: as it is, if that is short and on one line; else quoted."""
    return foreign if foreign.isprintable() and len(foreign) <= most else quoted(foreign, most)


def to_wire(error: BaseException) -> dict[str, Any]:
    """Turn any exception into JSON values."""
    if isinstance(error, GradShardingError):
        usage = {kind: one.model_dump() for kind, one in error.usage.items()}
        return {"error": type(error).__name__, "message": error.message, "details": error.details, "usage": usage}
    return {"error": TaskFailed.__name__, "message": f"{type(error).__name__}: {error}", "details": {}, "usage": {}}


def from_wire(wire: dict[str, Any]) -> GradShardingError:
    """Turn what ``to_wire`` made back into an exception."""
    kinds = {kind.__name__: kind for kind in _tree(GradShardingError)}
    error = kinds.get(wire["error"], TaskFailed)(wire["message"], **wire["details"])
    error.usage = {kind: Usage(**one) for kind, one in wire.get("usage", {}).items()}
    return error


def _tree(kind: type[GradShardingError]) -> Iterator[type[GradShardingError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)
