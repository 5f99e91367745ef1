"""Errors are one tree, and cross the wire as data."""

import json
import pickle
from collections.abc import Iterator

import pytest

from gradsharding import errors
from gradsharding.errors import GradShardingError, OutOfMemory, TaskFailed, from_wire, to_wire
from gradsharding.usage import Usage


def tree(kind: type[GradShardingError], depth: int = 0) -> Iterator[tuple[int, type[GradShardingError]]]:
    """Walk a class and its subclasses, in the order of their definition."""
    yield depth, kind
    for child in kind.__subclasses__():
        yield from tree(child, depth + 1)


KINDS = [kind for _, kind in tree(GradShardingError)]


@pytest.mark.parametrize("kind", KINDS)
def test_wire(kind: type[GradShardingError]) -> None:
    """An error arrives as it was sent: by JSON, and by pickle."""
    error = kind("what, and what to do", client="ann", found=[["ann", 8]])

    for again in from_wire(json.loads(json.dumps(to_wire(error)))), pickle.loads(pickle.dumps(error)):  # noqa: S301 - our own bytes
        assert kind is type(again)
        assert (str(error), error.details) == (str(again), again.details)


@pytest.mark.parametrize(
    ("raised", "says"), [(ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"), (KeyError("a"), "KeyError: 'a'")]
)
def test_foreign_error(raised: Exception, says: str) -> None:
    """An exception of another library arrives as TaskFailed, with its name."""
    again = from_wire(to_wire(raised))

    assert (TaskFailed, says) == (type(again), again.message)


def test_unknown_kind() -> None:
    """An error that a newer worker knows arrives as TaskFailed."""
    assert TaskFailed is type(from_wire({"error": "Strange", "message": "m", "details": {}}))


def test_drawn_tree() -> None:
    """The tree drawn in the module's docstring is the tree of the classes, with their built-in parents."""
    assert errors.__doc__
    drawn = []
    for line in errors.__doc__.splitlines():
        name, _, rest = line.lstrip(" │├└─").partition(" ")
        if name in vars(errors) and line.startswith("    "):
            depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
            drawn.append((depth, name, rest.split(")")[0][1:] if rest.startswith("(") else None))

    assert len(KINDS) == len(drawn)
    assert sorted(drawn, key=str) == sorted(((depth, kind.__name__, builtin(kind)) for depth, kind in tree(GradShardingError)), key=str)


def builtin(kind: type[GradShardingError]) -> str | None:
    """Name the parent that is not ours, if there is one."""
    return next((base.__name__ for base in kind.__bases__ if not issubclass(base, GradShardingError) and base is not Exception), None)


def test_builtin_parents() -> None:
    """Whoever knows only Python's own errors catches ours."""
    assert issubclass(OutOfMemory, MemoryError)
    assert issubclass(errors.MissingObject, FileNotFoundError)
    assert issubclass(errors.UserError, ValueError)


def test_naming() -> None:
    """An error gets the client's name once, keeps what it knows, and a name that is no id comes in quotes."""
    first = errors.MissingObject("gone", key="k")
    first.usage = {"s3": Usage(gets=3)}
    with pytest.raises(errors.MissingObject) as caught, errors.naming("bob"), errors.naming("ann"):
        raise first
    assert ("client ann: gone", {"key": "k", "client": "ann"}) == (caught.value.message, caught.value.details)
    assert {"s3": Usage(gets=3)} == caught.value.usage

    with pytest.raises(errors.UserError) as other, errors.naming("x\nERROR: y"):
        raise errors.UserError("no")
    assert r"client 'x\nERROR: y': no" == other.value.message


HUGE = 10**5_000


@pytest.mark.parametrize(
    "foreign",
    ["x\n\x1b[2J\u202e" * 99, HUGE, -HUGE, [HUGE] * 5, ("a" * 10**6,) * 99, b"\0" * 999, None, 1.5],
    ids=["text", "huge", "-huge", "huge numbers", "texts", "bytes", "none", "float"],
)
def test_quoted(foreign: object) -> None:
    """Whatever others have chosen comes into a message on one line, and short."""
    text = errors.quoted(foreign)

    assert text.isprintable()
    assert len(text) < 1_000
