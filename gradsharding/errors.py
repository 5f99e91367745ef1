"""Every error derives from one base; its message says what is wrong, with the numbers, and what to do.

    GradShardingError
    ├── UserError (ValueError)            the caller can correct it; the command line exits with 2
    │   ├── InvalidUpdate                 not a well-formed safetensors object
    │   ├── LayoutMismatch                two updates do not hold the same tensors
    │   ├── InvalidWeight                 zero, negative, not finite, or too large
    │   ├── InvalidId                     an id that may not become part of a key
    │   ├── DuplicateClient               one client, two different updates
    │   ├── NonFinite                     NaN or infinity in updates, or in the sum of their values
    │   ├── TooFewClients                 no update, or too few, to aggregate
    │   ├── PlanTooLarge                  the plan breaks a limit; nothing has been read
    │   └── StoreRefused                  no credentials, no such bucket, wrong region, access denied
    ├── MissingObject (FileNotFoundError) no object under this key
    ├── ObjectExists (FileExistsError)    create-if-absent found one
    ├── ChangedObject                     the object is not the version that was sealed
    ├── InvalidRecord                     a round's record is from a later release, foreign, or damaged
    ├── IncompleteUpload                  parts are missing; the object was not published
    ├── StoreFailed                       a store was not reached, or failed, in several attempts
    ├── VerificationFailed                a published result differs from what its updates give
    ├── StackFailed                       CloudFormation failed to make the change
    └── TaskFailed                        a function failed, with its task's name
        └── OutOfMemory (MemoryError)     it exceeded the allowed memory

An error in a worker is sent to its caller as data (``to_wire``) and raised again there (``from_wire``).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from gradsharding.usage import Usage
from gradsharding.usage import together as added


class GradShardingError(Exception):
    """Base of all errors; ``details`` holds the facts behind the sentence, as JSON values."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.usage: Mapping[str, Usage] = {}
        """Usage of the failed work, by kind of store, as far as it is known."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild the error from data: process pools pickle errors."""
        return from_wire, (to_wire(self),)


class UserError(GradShardingError, ValueError):
    """The caller passed something wrong, and can correct it."""


class InvalidUpdate(UserError):
    """The object is not a well-formed safetensors file of supported dtypes."""


class LayoutMismatch(UserError):
    """Two updates differ in a tensor's name, dtype, shape or place."""


class InvalidWeight(UserError):
    """A weight is zero, negative, not finite, or beyond 2**53."""


class InvalidId(UserError):
    """An id has characters that must not become part of a key."""


class DuplicateClient(UserError):
    """A client has already contributed a different update to this round."""


class NonFinite(UserError):
    """Updates hold NaN or infinity, or finite values that overflow when they are summed.

    ``details["found"]`` lists ``[client, byte]`` of each client's first such value, ``details["overflowing"]`` the clients whose values are
    all finite, and ``details["tasks"]`` the tasks that found them.
    """

    @classmethod
    def of(cls, tasks: Sequence[str], found: Iterable[Sequence[Any]], overflowing: Iterable[str] = ()) -> Self:
        """The error for the values that tasks found, each as client and byte."""
        firsts: dict[str, int] = {}
        for client, byte in sorted(found, key=lambda value: int(value[1])):
            firsts.setdefault(client, byte)
        finite = sorted({*overflowing} & {*firsts})
        bad = [client for client in sorted(firsts) if client not in finite]
        where = f"task {tasks[0]}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
        problems = [f"clients {_few(bad)} hold NaN or infinity"] if bad else []
        if finite or not bad:
            problems.append(
                "finite values overflow when summed" + (f", those of clients {_few(finite)}" if finite else "") + "; scale them down"
            )
        return cls(
            f"{where}: {', and '.join(problems)}",
            found=[[client, firsts[client]] for client in sorted(firsts)],
            overflowing=finite,
            tasks=[*tasks],
        )

    @classmethod
    def together(cls, errors: Sequence["NonFinite"]) -> "NonFinite":
        """Merge the errors of several tasks."""
        if len(errors) == 1:
            return errors[0]
        details = [error.details for error in errors]
        found = [(client, byte, client in each["overflowing"]) for each in details for client, byte in each["found"]]
        bad = {client for client, _, overflows in found if not overflows}
        tasks = sorted((task for each in details for task in each["tasks"]), key=lambda name: (len(name), name))
        merged = cls.of(tasks, [place[:2] for place in found], [client for client, *_ in found if client not in bad])
        merged.usage = added(*(error.usage for error in errors))
        return merged


class TooFewClients(UserError):
    """A round has fewer usable updates than it needs."""


class PlanTooLarge(UserError):
    """A plan needs more than its limits allow."""


class StoreRefused(UserError):
    """A store or service refused the request: wrong credentials, bucket, region or permission."""


class MissingObject(GradShardingError, FileNotFoundError):
    """There is no object under this key."""


class ObjectExists(GradShardingError, FileExistsError):
    """The object exists already, and objects are created only once."""


class ChangedObject(GradShardingError):
    """The object is no longer the version that was pinned."""


class InvalidRecord(GradShardingError):
    """A record in a store cannot be read by this release; ``details["place"]`` names it."""


class IncompleteUpload(GradShardingError):
    """A multipart upload was completed with parts missing or overlapping."""


class StoreFailed(GradShardingError):
    """A store or service could not be reached, or failed, after several attempts."""


class StackFailed(GradShardingError):
    """CloudFormation failed to make the change; the message gives its reason."""


class VerificationFailed(GradShardingError):
    """A published result differs, in at least one bit, from what its updates give."""


class TaskFailed(GradShardingError):
    """A function failed; the message says why."""


class OutOfMemory(TaskFailed, MemoryError):
    """A function needed more memory than the plan allowed."""


@contextlib.contextmanager
def naming(client: str) -> Iterator[None]:
    """Add the client to any GradShardingError raised within, in its message and ``details["client"]``, unless it names one already."""
    try:
        yield
    except GradShardingError as error:
        if "client" in error.details:
            raise
        raise named(error, client) from error


def named(error: GradShardingError, client: str) -> GradShardingError:
    """Return the same error with the client's name."""
    copy = type(error)(f"client {plain(client)}: {error.message}", **error.details, client=client)
    copy.usage = error.usage
    return copy


def _few(clients: Sequence[str]) -> str:
    """Name at most ten clients, and count the rest."""
    return ", ".join(clients[:10]) + (f" and {len(clients) - 10} more" if len(clients) > 10 else "")


def quoted(foreign: object, most: int = 80) -> str:
    r"""Write foreign data, such as a name or a shape, for a message: on one line, without control characters, cut at ``most`` letters.

    >>> print(quoted("w"), quoted("\n\x1b[2J"), quoted("x" * 100, 8), quoted((2, 3)))
    'w' '\n\x1b[2J' 'xxxxxxxx'… [2, 3]
    """
    match foreign:
        case str() | bytes():
            return repr(foreign[:most]) + "…" * (len(foreign) > most)
        case int() if abs(foreign) >= 10**most:  # Python writes no number of more than 4,300 digits
            return f"a number of {foreign.bit_length()} bits"
        case tuple() | list():
            text = "[" + ", ".join(quoted(item, most) for item in foreign[:most]) + "]"
            return text if len(foreign) <= most and len(text) <= most else f"{text[:most]}…"
        case None | int() | float():
            return repr(foreign)
    try:
        return quoted(str(foreign), most)
    except Exception:  # noqa: BLE001 - a foreign type's __str__ may raise anything
        return f"a value of type {type(foreign).__name__}"


def plain(foreign: str, most: int = 200) -> str:
    """Write an id or a reference for a message: unchanged if it is short and printable, else quoted."""
    return foreign if foreign.isprintable() and len(foreign) <= most else quoted(foreign, most)


def to_wire(error: BaseException) -> dict[str, Any]:
    """Convert an exception to JSON values."""
    if isinstance(error, GradShardingError):
        usage = {kind: spent.model_dump() for kind, spent in error.usage.items()}
        return {"error": type(error).__name__, "message": error.message, "details": error.details, "usage": usage}
    return {"error": TaskFailed.__name__, "message": f"{type(error).__name__}: {error}", "details": {}, "usage": {}}


def from_wire(wire: dict[str, Any]) -> GradShardingError:
    """Convert the JSON values of ``to_wire`` back to an exception."""
    kinds = {kind.__name__: kind for kind in _tree(GradShardingError)}
    error = kinds.get(wire["error"], TaskFailed)(wire["message"], **wire["details"])
    error.usage = {kind: Usage(**spent) for kind, spent in wire.get("usage", {}).items()}
    return error


def _tree(kind: type[GradShardingError]) -> Iterator[type[GradShardingError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def listed(names: Sequence[str], conjunction: str) -> str:
    """Join names as a sentence does.

    >>> listed(["a", "b", "c"], "or"), listed(["a"], "or")
    ('a, b or c', 'a')
    """
    *most, last = names
    return f"{', '.join(most)} {conjunction} {last}" if most else last
