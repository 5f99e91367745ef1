"""``--topology`` and an option for each field of the registered topologies."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import click

from gradsharding.cli.command import option
from gradsharding.errors import UserError, listed
from gradsharding.planning.topologies import TOPOLOGIES, Topology, make_topology

Command = Callable[..., None]


def topology_options(section: str) -> Callable[[Command], Command]:
    """Give a command ``--topology`` and the options of all topologies, below a heading; it receives them as a Topology in ``topology``."""
    return lambda command: _with_topology(command, section)


def _with_topology(command: Command, section: str) -> Command:
    options = _options(section)

    def with_topology(*args: Any, topology: str, **given: Any) -> None:
        chosen = {name: value for name in options if (value := given.pop(name)) not in (None, False)}
        try:
            made = make_topology(topology, **chosen)
        except UserError as error:
            raise click.UsageError(f"{error.message}.", click.get_current_context()) from error
        command(*args, topology=made, **given)

    decorated: Command = update_wrapper(with_topology, command)
    choice, text = click.Choice([*TOPOLOGIES]), "How functions share the work."
    named = option("--topology", type=choice, default="sharded", show_default=True, section=section, help=text)
    for add in (*reversed(options.values()), named):
        decorated = add(decorated)
    return decorated


def _options(section: str) -> dict[str, Callable[[Any], Any]]:
    """Make a click option of each field of any topology: a flag, or a whole number with its bounds."""
    fields = {name: _schema(topology, name) for topology in TOPOLOGIES.values() for name in topology.model_fields}
    return {name: _option(name, schema, section) for name, schema in fields.items()}


def _schema(topology: type[Topology], field: str) -> dict[str, Any]:
    """Give a field's JSON schema; of one that may be null, that of its other values."""
    schema: dict[str, Any] = topology.model_json_schema()["properties"][field]
    return schema | next((kind for kind in schema.get("anyOf", []) if kind["type"] != "null"), {})


def _option(name: str, schema: dict[str, Any], section: str) -> Callable[[Any], Any]:
    takers = listed([topology for topology, kind in TOPOLOGIES.items() if name in kind.model_fields], "or")
    flag, text = f"--{name.replace('_', '-')}", f"With {takers}: {schema['description'][0].lower()}{schema['description'][1:]}"
    if schema["type"] == "boolean":
        return option(flag, is_flag=True, section=section, help=text)
    bounds = click.IntRange(schema.get("minimum"), schema.get("maximum"))
    return option(flag, type=bounds, metavar="N", section=section, help=text)
