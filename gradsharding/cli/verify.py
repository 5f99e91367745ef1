"""``gradsharding verify``: parts of a result, computed again and compared bit for bit."""

import click

from gradsharding.cli.command import command, completed_as, option
from gradsharding.planning.manifest import check_id
from gradsharding.rounds.round import Round
from gradsharding.rounds.verify import verify
from gradsharding.sizes import mib
from gradsharding.stores.urls import open_store
from gradsharding.text import labelled, paragraph


@command("verify")
@click.argument("store", shell_complete=completed_as("dir"))
@click.argument("round_id", metavar="ROUND")
@option("--sample", type=click.IntRange(1), metavar="K", default=10, show_default=True, help="Slices to compute again.")
def verify_command(store: str, round_id: str, sample: int) -> None:
    """Check a result against the updates it was made from.

    \b
    Examples:
      gradsharding aggregate a.safetensors:120 b.safetensors:80 \\
          -o mean.safetensors --exact --store work
      gradsharding verify work r-0123456789abcdef0123456789abcdef

    STORE is the directory or s3:// URL that keeps the round's records, and ROUND is its id: `gradsharding aggregate --exact --store` prints
    both.

    The result's digest is compared with the published one, and K slices of 4,096 elements, drawn at random, are computed again from the
    sealed updates. That uses Python's own numbers, and shares no code with the engine. If K is at least the model's number of slices, every
    element is checked. If something differs, the command names the first element that does, and ends with status 1.

    The bits of some results, such as those of the default rule, depend on the path that was taken: they cannot be checked.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    verified = verify(Round(open_store(store), check_id(round_id)), sample=sample)
    record = verified.record
    elements = f"{verified.elements:,} of {record.layout.elements:,} elements"
    click.echo(paragraph(f"round {round_id}: {record.rule} of {len(record.clients)} clients, {mib(record.layout.nbytes)}"))
    rows = [
        ("SHA-256", f"{record.digest}, as published"),
        ("recomputed", f"{verified.slices:,} of {verified.of:,} slices ({elements}), from the sealed updates: the same bits"),
    ]
    click.echo(labelled(rows))
