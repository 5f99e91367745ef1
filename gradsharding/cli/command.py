"""The form of a command: options below headings in its help text, and completion of their values."""

from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem


class Option(click.Option):
    """An option that is listed under a heading of its own choice."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help lists its options under their headings, in the order of their declaration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each below its heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                sections.setdefault(getattr(param, "section", "Other options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


command = partial(click.command, cls=Command)
option = partial(click.option, cls=Option)


def completed_as(kind: str, *texts: str) -> Any:
    """Give the completion of an option or argument: ``texts``, or else the names of ``kind``, "file" or "dir", that the shell knows."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        matching = [CompletionItem(text) for text in texts if text.startswith(incomplete)]
        return matching if texts else [CompletionItem(incomplete, type=kind)]

    return complete
