"""``gradsharding completion``: the script by which a shell asks this program to complete what was typed."""

import click
from click.shell_completion import get_completion_class

from gradsharding.cli.command import command

VARIABLE = "_GRADSHARDING_COMPLETE"
"""Environment variable by which the script asks."""


@command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands in your shell.

    \b
    Examples:
      gradsharding completion bash >> ~/.bashrc
      gradsharding completion zsh >> ~/.zshrc
      gradsharding completion fish > ~/.config/fish/completions/gradsharding.fish

    The script takes effect in the next shell. It completes commands, options, their values and the names of files.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    complete = get_completion_class(shell)
    assert complete
    program = ctx.find_root()
    click.echo(complete(program.command, {}, "gradsharding", VARIABLE).source())
