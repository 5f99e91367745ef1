"""The ``gradsharding`` command: which commands there are, and what exit status an error gets. No command is imported before it is used.

Exit status 0 is success, 2 the user's mistake, 1 any other failure, 130 an interrupt.
"""

import os
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

from gradsharding import __version__
from gradsharding.cli.terminal import printable, settle

MAX_HELP_WIDTH = 100
"""Columns of help text: longer lines are hard to read."""

GROUP = "gradsharding.commands"
"""Entry points by which other packages contribute commands."""


class Listed(NamedTuple):
    """A command of this project, as ``--help`` lists it."""

    target: str
    """Where the command is, as ``module:attribute``."""
    purpose: str
    """The first line of its own help."""
    extra: str | None = None
    """The optional dependencies that it needs."""


COMMANDS: Mapping[str, Mapping[str, Listed]] = {
    "Commands": {
        "demo": Listed("gradsharding_flower.demo.demo:demo", "Train a small model in a real federation on this machine.", "demo"),
        "plan": Listed("gradsharding.cli.plan:plan_command", "Compare the time, memory and price of each topology."),
        "aggregate": Listed("gradsharding.cli.aggregate:aggregate_command", "Average safetensors files into one, slice by slice."),
        "verify": Listed("gradsharding.cli.verify:verify_command", "Check a result against the updates it was made from."),
        "completion": Listed("gradsharding.cli.completion:completion_command", "Print the script that completes commands in your shell."),
    },
    "Commands for AWS": {
        "deploy": Listed("gradsharding.aws.deploy.commands:deploy", "Create or update the bucket and the function on AWS.", "aws"),
        "smoke": Listed("gradsharding.aws.smoke:smoke", "Run two small aggregations on the deployed function.", "aws"),
        "status": Listed("gradsharding.aws.deploy.commands:status", "Show what is deployed, and whether it is intact.", "aws"),
        "prices": Listed("gradsharding.aws.pricelist:prices", "Show the prices in use, or fetch the current ones from AWS.", "aws"),
        "destroy": Listed("gradsharding.aws.deploy.commands:destroy", "Delete the deployed stack; its data stays by default.", "aws"),
    },
}
"""The commands of this project, by the heading under which they are listed. A test compares each purpose with the command's help."""


class Commands(click.Group):
    """The commands of this project, and those that installed packages contribute by entry points.

    Listing and completing their names imports none of them: some import a whole framework.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all commands, in the order in which they are listed."""
        return [name for rows in self._purposes(ctx).values() for name in rows]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; raise ClickException if it needs packages that are not installed."""
        if command := super().get_command(ctx, cmd_name):
            return command
        for rows in COMMANDS.values():
            if listed := rows.get(cmd_name):
                return _imported(cmd_name, listed.target, f"gradsharding[{listed.extra}]" if listed.extra else "gradsharding")
        entry = next(iter(entry_points(group=GROUP, name=cmd_name)), None)
        return _imported(cmd_name, entry.value, _package(entry)) if entry else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; raise UsageError, with the name that may have been meant, if there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if similar := get_close_matches(args[0], self.list_commands(ctx), 1):
                raise click.UsageError(f"No such command {args[0]!r}; did you mean {similar[0]!r}?", ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List all commands with their purposes."""
        for title, rows in self._purposes(ctx).items():
            with formatter.section(title):
                formatter.write_dl([*rows.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command, or an option of the whole program."""
        rows = [row for rows in self._purposes(ctx).values() for row in rows.items()]
        names = [CompletionItem(name, help=purpose) for name, purpose in rows if name.startswith(incomplete)]
        return [*names, *super(click.Group, self).shell_complete(ctx, incomplete)]

    def _purposes(self, ctx: click.Context) -> dict[str, dict[str, str]]:
        """Give the purpose of each command, by heading."""
        found = {title: {name: listed.purpose for name, listed in rows.items()} for title, rows in COMMANDS.items()}
        known = {*super().list_commands(ctx)}.union(*found.values())
        others = {entry.name: _summary(entry) for entry in sorted(entry_points(group=GROUP)) if entry.name not in known}
        return found | ({"Commands of other packages": others} if others else {})


def _package(entry: EntryPoint) -> str:
    """Name the installed package that an entry point belongs to."""
    return entry.dist.name if entry.dist else entry.module.partition(".")[0]


def _summary(entry: EntryPoint) -> str:
    """Describe a contributed command by the summary of its package, which is read without importing it."""
    summary = entry.dist.metadata["Summary"] if entry.dist and "Summary" in entry.dist.metadata else None
    return printable(f"{summary} ({_package(entry)})" if summary else f"Part of {_package(entry)}.")


def _imported(name: str, target: str, needed: str) -> click.Command:
    try:
        command = resolve_name(target)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "gradsharding":
            raise  # our own mistake: nothing that the user could install mends it
        raise click.ClickException(f"{name} needs packages that are not installed ({error}); install {needed}") from error
    assert isinstance(command, click.Command)
    return command


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_HELP_WIDTH}, no_args_is_help=False
)
@click.version_option(__version__)
def cli() -> None:
    """Aggregate models larger than any one function.

    \b
    Examples:
      gradsharding plan --size 528MB --clients 20
      gradsharding aggregate alice.safetensors:120 bob.safetensors:80 \\
          -o global.safetensors

    Exit status: 0 success; 2 a mistake of yours, explained in one line; 1 any other failure (GRADSHARDING_DEBUG=1 prints the traceback).
    """  # noqa: D301 - \b tells click to keep the lines that follow


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; print any error as one line on standard error."""
    settle()
    try:
        return cli.main(args, prog_name="gradsharding", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a traceback is for those who ask for it
        status, message = _verdict(error)
        if status == 1 and os.environ.get("GRADSHARDING_DEBUG"):
            traceback.print_exc()
        click.echo(f"gradsharding: {printable(message)}", err=True)
        return status


def _verdict(error: BaseException) -> tuple[int, str]:
    """Give the exit status and the message of an error."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            return 130, "interrupted"
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "gradsharding"
            return 2, f"{error.format_message()} See '{command} --help'."
        case click.ClickException():
            return 2, error.format_message()
    from gradsharding.errors import GradShardingError, UserError  # noqa: PLC0415 - it imports pydantic, which --help does without

    match error:
        case GradShardingError():
            return 2 if isinstance(error, UserError) else 1, error.message
        case OSError():
            return 2, f"{error}; check the path, its permissions, and the space left"
    return 1, f"{type(error).__name__}: {error}"
