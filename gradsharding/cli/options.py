"""Options that several commands have, and types of options that explain a wrong value."""

import contextlib
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import click

from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule, forms, parse_rule
from gradsharding.cli.command import option
from gradsharding.errors import UserError
from gradsharding.planning.plan import MAX_PARTS
from gradsharding.sizes import positive, size

SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
"""Seconds in each unit of time."""


def any_size(text: str) -> int:
    """Read a size, in bytes."""
    with _as_usage():
        return size(text)


def memory_size(text: str) -> int:
    """Read a size of memory, in bytes; it must not be 0."""
    with _as_usage():
        return positive(size(text))


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    """Raise a UserError as an error in the option's value."""
    try:
        yield
    except UserError as error:
        raise click.BadParameter(f"{error.message}.") from None


def duration(text: str) -> float:
    """Read a time, in seconds."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text)
    if not parts or float(parts[1]) == 0:
        raise click.BadParameter(f"{text!r} is not a time; write it like 60s, 5m or 1h.")
    return float(parts[1]) * SECONDS[parts[2]]


def dollars(text: str) -> Decimal:
    """Read a sum in US dollars."""
    if not re.fullmatch(r"\$?\d+(\.\d+)?", text):
        raise click.BadParameter(f"{text!r} is not a sum of money; write it in US dollars, like 0.05.")
    return Decimal(text.removeprefix("$"))


SHARDS = click.IntRange(1, MAX_PARTS - 1)
"""Slices of a model: an object has ``MAX_PARTS`` parts at most, and one is its header."""


def rule_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--rule`` and ``--exact``; ``chosen_rule`` reads both."""
    rule = option("--rule", type=_rule, metavar="RULE", section="Result", help=f"How updates become one: {forms()}.  [default: {MEAN}]")
    exact = option("--exact", is_flag=True, section="Result", help="Sum exactly: the same bits for every topology, executor and order.")
    return rule(exact(command))


def chosen_rule(rule: Rule | None, *, exact: bool) -> Rule:
    """Return the rule that the options name; raise UsageError if they name two."""
    if exact and rule not in (None, ExactMean()):
        raise click.UsageError(f"--exact means --rule {ExactMean()}, not {rule}: give one of them.", click.get_current_context())
    return ExactMean() if exact else rule or MEAN


def _rule(text: str) -> Rule:
    """Read a rule."""
    with _as_usage():
        return parse_rule(text)
