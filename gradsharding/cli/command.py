"""The form of a command: options below headings in its help text, and completion of their values."""

from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem


class Option(click.Option):
    """An option that is listed below a heading."""

    def __init__(self, *args: Any, section: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help lists its options below their headings, those without one last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading, in the order of their declaration."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        sections = [*dict.fromkeys(getattr(option, "section", "") for option in options)]
        for section in sorted(sections, key=lambda title: not title):
            records = [option.get_help_record(ctx) for option in options if getattr(option, "section", "") == section]
            with formatter.section(section or ("Other options" if len(sections) > 1 else "Options")):
                formatter.write_dl([record for record in records if record])


command = partial(click.command, cls=Command)
option = partial(click.option, cls=Option)


def completed_by(*texts: str) -> Any:
    """Return the ``shell_complete`` of an option whose value is one of these texts, or begins with one."""
    return lambda _ctx, _param, incomplete: [CompletionItem(text) for text in texts if text.startswith(incomplete)]


def completed_as(kind: str) -> Any:
    """Return the ``shell_complete`` of a parameter that names a file ("file") or a directory ("dir"): the shell knows them."""
    return lambda _ctx, _param, incomplete: [CompletionItem(incomplete, type=kind)]
