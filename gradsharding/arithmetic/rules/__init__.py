"""Every rule has a file here and a place in ``RULES``; no module outside ``arithmetic`` knows one by name but for the default, ``MEAN``."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from gradsharding.arithmetic.rules.exact_mean import ExactMean
from gradsharding.arithmetic.rules.mean import Mean
from gradsharding.arithmetic.rules.rule import Cohort, Effort, Rule
from gradsharding.arithmetic.rules.trimmed_mean import TrimmedMean
from gradsharding.errors import UserError, listed, quoted

__all__ = [
    "MEAN",
    "RULES",
    "AnyRule",
    "Cohort",
    "Effort",
    "ExactMean",
    "Mean",
    "RecordedRule",
    "Rule",
    "TrimmedMean",
    "as_rule",
    "forms",
    "parse_rule",
]

RULES: tuple[type[Rule], ...] = (
    Mean,
    ExactMean,
    TrimmedMean,
)
"""Every rule that there is."""

MEAN = Mean()
"""The rule where none is named."""

_FORMER = {"float64": MEAN, "exact": ExactMean()}
"""The arithmetics of the first releases."""


def parse_rule(text: str) -> Rule:
    """Read a rule as ``str`` writes it: its name, a colon, and its parameters, with commas between them.

    Raise UserError if there is no such rule, or if a parameter is wrong.

    >>> parse_rule("mean"), str(parse_rule("exact-mean"))
    (Mean(), 'exact-mean')
    """
    name, colon, rest = text.partition(":")
    kind = next((kind for kind in RULES if kind.name == name), None)
    if kind is None:
        raise UserError(f"no rule is named {quoted(name)}; use {forms()}")
    values, types = rest.split(",") if colon else [], _types(kind)
    if len(values) != len(types):
        raise UserError(f"{quoted(text)} gives {len(values)} of {len(types)} parameters; write {_form(kind)}")
    try:
        return kind(*(TypeAdapter(type_).validate_strings(value) for type_, value in zip(types, values, strict=True)))
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"{quoted(text)}: {quoted(fault['input'])} is not what {_form(kind)} takes: {fault['msg']}") from None


def as_rule(rule: Rule | str) -> Rule:
    """Give a rule that may be written as text; raise UserError as ``parse_rule`` does, or if it is neither."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise UserError(f"{quoted(rule)} is not a rule but of type {type(rule).__name__}; use {forms()}")
    return parse_rule(rule)


def forms(kinds: Iterable[type[Rule]] | None = None) -> str:
    """List, for people, how rules are written: all of them, or those of some ``kinds``.

    >>> forms([Mean, ExactMean])
    'mean or exact-mean'
    """
    return listed([_form(kind) for kind in (RULES if kinds is None else kinds)], "or")


def _form(kind: type[Rule]) -> str:
    parameters = ",".join(field.name.upper() for field in fields(kind))
    return f"{kind.name}:{parameters}" if parameters else kind.name


def _types(kind: type[Rule]) -> list[Any]:
    return [field.type for field in fields(kind)]


def _recorded(rule: Rule | str) -> Rule:
    return _FORMER[rule] if isinstance(rule, str) and rule in _FORMER else as_rule(rule)


AnyRule = Annotated[Rule, PlainValidator(as_rule), PlainSerializer(str, return_type=str)]
"""A rule as a field of a value; JSON has its text."""

RecordedRule = Annotated[Rule, PlainValidator(_recorded), PlainSerializer(str, return_type=str)]
"""The same in a record, which may have a name from before there were rules: that of an arithmetic."""
