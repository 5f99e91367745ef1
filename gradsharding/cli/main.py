"""The command line: text in, one call of the library, text out. Exit status 0 done, 2 the user's mistake, 1 anything else."""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradsharding import __version__
from gradsharding.advice import billing
from gradsharding.arithmetic.fold import Arithmetic
from gradsharding.cli.inputs import asked_around, located, open_round, read_updates, writable
from gradsharding.cli.plan import exact_option, memory_size, plan_command
from gradsharding.cli.terminal import printable, settle
from gradsharding.errors import GradShardingError, NonFinite, UserError
from gradsharding.planning.manifest import check_id
from gradsharding.planning.plan import MAX_PARTS, Limits, Plan
from gradsharding.planning.platform import CHARGES
from gradsharding.planning.task import NonFinitePolicy
from gradsharding.planning.topologies import Topology, flat, lambda_fl, lifl, sharded, sharded_tree
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.result import Result, observed_memory
from gradsharding.rounds.round import Round
from gradsharding.rounds.verify import verify
from gradsharding.running import executors
from gradsharding.sizes import mib
from gradsharding.stores.files import replace
from gradsharding.stores.urls import open_store
from gradsharding.usage import counting

TOPOLOGIES: dict[str, Callable[..., Plan]] = {
    "flat": flat, "sharded": sharded, "lambda-fl": lambda_fl, "lifl": lifl, "sharded-tree": sharded_tree,
}  # fmt: skip
"""What ``--topology`` knows; each is a row of ``gradsharding plan``."""

TAKES = {"shards": ("sharded", "sharded-tree"), "fan_in": ("lambda-fl", "lifl", "sharded-tree"), "shared_memory": ("lifl",)}
"""The topologies that an option goes with."""


class Commands(click.Group):
    """Our commands, and those that installed packages contribute under the entry points ``gradsharding.commands``.

    A contributed command is imported when it is called, not when it is listed: it may bring a whole framework along.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all commands."""
        return sorted({*super().list_commands(ctx), *entry_points(group="gradsharding.commands").names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command; a contributed one is a stub until ``resolve_command``."""
        stubs = (Contributed(entry) for entry in entry_points(group="gradsharding.commands", name=cmd_name))
        return super().get_command(ctx, cmd_name) or next(stubs, None)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called, and load it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, Contributed) else command, rest


class Contributed(click.Command):
    """Stands for a command of another package."""

    def __init__(self, entry: EntryPoint) -> None:
        self.package = entry.module.partition(".")[0]
        super().__init__(entry.name, short_help=f"Part of {self.package}; see: gradsharding {entry.name} --help")
        self.entry = entry

    def load(self) -> click.Command:
        """Import the command; raise UserError if what it needs is not installed."""
        try:
            command = self.entry.load()
        except ImportError as error:
            if self.package == "gradsharding":
                needed = "gradsharding[aws]"
            else:
                needed = f"gradsharding[{self.name}]" if self.package.startswith("gradsharding_") else self.package
            raise UserError(f"{self.name} needs more than is installed here ({error}); install {needed}") from error
        assert isinstance(command, click.Command)
        return command


shards_option = click.option(
    "--shards", type=click.IntRange(1, MAX_PARTS - 1), metavar="N", help="Number of slices.  [default: of 8 MiB, or what the memory allows]"
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, no_args_is_help=False)
@click.version_option(__version__)
def cli() -> None:
    """Aggregate models larger than any one function.

    \b
    Examples:
      gradsharding plan --size 528MB --clients 20
      gradsharding aggregate alice.safetensors:120 bob.safetensors:80 -o global.safetensors

    Exit status: 0 done; 2 your mistake, told in one line; 1 anything else (GRADSHARDING_DEBUG=1 shows where).
    """  # noqa: D301 - \b tells click to keep the lines that follow


@cli.command("aggregate", short_help="Average safetensors files, weighted, slice by slice.")
@click.argument("updates", nargs=-1, required=True, metavar="[ID=]PATH[:WEIGHT]...")
@click.option("-o", "--output", required=True, metavar="PATH", help="Where the average goes; a file there is replaced, at the very end.")
@shards_option
@click.option("--topology", type=click.Choice([*TOPOLOGIES]), default="sharded", show_default=True, help="How the work is divided.")
@click.option(
    "--fan-in", type=click.IntRange(1), metavar="N", help="Inputs of a function in a tree.  [default: a root of the number of updates]"
)
@click.option("--shared-memory", is_flag=True, help="With lifl: pass partial sums through this machine's memory.")
@click.option(
    "--memory", type=memory_size, metavar="SIZE", help="Memory that one function may use.  [default: 512MiB, or what a Lambda function has]"
)
@click.option(
    "--executor",
    "where",
    metavar="KIND",
    default="processes",
    show_default=True,
    help="inline, processes[:N], threads[:N] or lambda:FUNCTION[:QUALIFIER].",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    help="Invocations of a Lambda function at once.  [default: what is reserved for it, or half of what the account has unreserved]",
)
@click.option("--store", metavar="URL", help="Keep the round's records there, so that it can be resumed.  [default: keep none]")
@click.option(
    "--nonfinite", type=click.Choice(get_args(NonFinitePolicy)), default="raise", show_default=True, help="What NaN or infinity does."
)
@exact_option
@click.option("--report", metavar="PATH", help="Write what was projected and what was observed, as JSON.")
def aggregate_command(
    updates: tuple[str, ...],
    output: str,
    shards: int | None,
    topology: str,
    fan_in: int | None,
    memory: int | None,
    where: str,
    concurrency: int | None,
    store: str | None,
    nonfinite: NonFinitePolicy,
    report: str | None,
    *,
    shared_memory: bool,
    exact: bool,
) -> None:
    """Average safetensors files, weighted, into one, slice by slice: no function holds a whole model.

    \b
    Examples:
      gradsharding aggregate alice.safetensors:120 bob.safetensors:80 -o global.safetensors
      gradsharding aggregate a=run1/model.safetensors b=run2/model.safetensors -o mean.safetensors
      gradsharding aggregate *.safetensors -o out/mean.safetensors --memory 128MiB --report report.json
      gradsharding aggregate *.safetensors -o out/mean.safetensors --store work
      gradsharding aggregate s3://bucket/a.safetensors:120 s3://bucket/b.safetensors:80 -o s3://bucket/mean.safetensors \\
        --executor lambda:gradsharding:live

    PATH is a local path, a file:// URL or an s3:// URL. ID names the client; without it, the file's name does, less its ending. WEIGHT is
    a positive number, such as the client's number of examples; without it, 1. A PATH may itself hold ':' and '=': of all
    ways to read an update, the one whose file exists is meant; if several exist, that is an error.

    By default functions are worker processes, one for each CPU, each held to --memory. processes:N starts N of them;
    inline runs all in this process, which starts sooner and holds nobody to anything. lambda:FUNCTION runs them on AWS
    Lambda, where all that is read and written must be in S3. Endpoint, region and credentials are those of the usual AWS
    environment variables and profiles. It takes all invocations at once that are reserved for the function; where none are, half of
    what the account has unreserved, unless --concurrency says otherwise.

    The output is complete or not there. If the command is stopped, even by kill -9, the same command with the same --store
    goes on where it stopped; without --store it begins anew.

    With --exact the average is the weighted mean of real arithmetic, rounded once: the same bits, whatever the topology, the slices, the
    executor and the order of anything. It takes more memory and time. With --store too, `gradsharding verify` checks it afterwards.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    started = time.perf_counter()
    with counting() as around:
        given = read_updates(updates)
        inputs = [update.place for update in given]
        out = writable(output, inputs)
        report_path = writable(report, [*inputs, out]).path if report else None
        divide = _topology(topology, shards, fan_in, shared_memory=shared_memory)
        runner = executors.open_executor(where, concurrency=concurrency)
        limits = runner.limits(Limits(memory=memory) if memory is not None else None)
        arithmetic: Arithmetic = "exact" if exact else "float64"
        with open_round(store, given, out, nonfinite, arithmetic) as round_, _progress_bar() as bar:
            try:
                result = aggregate(
                    round_,
                    topology=divide,
                    arithmetic=arithmetic,
                    limits=limits,
                    executor=runner,
                    nonfinite=nonfinite,
                    progress=bar,
                    overwrite=True,
                )
            except NonFinite as error:
                located_error = located(error, given)
                raise NonFinite(f"{located_error.message}, or pass --nonfinite propagate", **error.details) from error
    around_it = asked_around(given, round_, emptied=not (store or out.path))
    result = result.within(around.spent, around_it, time.perf_counter() - started)
    if report_path:
        replace(report_path, json.dumps(billing.report(result), indent=2) + "\n")
    click.echo(_summary(result, output))
    if exact:
        click.echo(
            f"exact: SHA-256 {result.digest()}" + (f"; to check it: gradsharding verify {printable(store)} {round_.id}" if store else "")
        )


cli.add_command(plan_command)


@cli.command("verify", short_help="Compute parts of an exact result again, and compare bit for bit.")
@click.argument("store")
@click.argument("round_id", metavar="ROUND")
@click.option("--sample", type=click.IntRange(1), metavar="K", default=10, show_default=True, help="Slices to compute again.")
def verify_command(store: str, round_id: str, sample: int) -> None:
    """Check an exact result: its digest, and K slices of it, drawn at random, from the very updates that were sealed.

    \b
    Examples:
      gradsharding aggregate a.safetensors:120 b.safetensors:80 -o mean.safetensors --exact --store work
      gradsharding verify work r-0123456789abcdef0123456789abcdef

    STORE is the directory or s3:// URL that keeps the round's records, ROUND its id; `gradsharding aggregate` tells both. A slice has
    4,096 elements; they are computed by Python's integers, which share nothing with the engine. With K as large as the model
    has slices, every element is checked. A difference is an error that names the first element that differs, and exit status 1.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    verified = verify(Round(open_store(store), check_id(round_id)), sample=sample)
    record = verified.record
    elements = f"{verified.elements:,} of {record.layout.elements:,} elements"
    click.echo(f"round {round_id}: exact mean of {len(record.clients)} clients, {mib(record.layout.nbytes)}")
    click.echo(f"SHA-256 {record.digest}: as published")
    click.echo(f"{verified.slices:,} of {verified.of:,} slices ({elements}) computed again from the sealed updates: the same bits")


def _topology(name: str, shards: int | None, fan_in: int | None, *, shared_memory: bool) -> Topology:
    """Give a topology with the parameters that it takes."""
    given = {"shards": shards, "fan_in": fan_in, "shared_memory": shared_memory or None}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if name not in TAKES[option]:
            flag = f"--{option.replace('_', '-')}"
            raise click.UsageError(
                f"{flag} goes with --topology {' or '.join(TAKES[option])}, not with {name}.", click.get_current_context()
            )
    return partial(TOPOLOGIES[name], **given)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[Plan], executors.Progress]]:
    """Show slices as they are done, if somebody is watching standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:

        def begin(plan: Plan) -> executors.Progress:
            row = bar.add_task("slices" if len(plan.fan_ins) == 1 else "functions", total=plan.functions)
            return lambda _: bar.advance(row)

        yield begin


def _summary(result: Result, output: str) -> str:
    record, used = result.record, result.usage.get(CHARGES.kind)
    requests = f"\nrequests to S3: {used.gets:,} GET and HEAD, {used.puts:,} PUT, COPY, POST and LIST, counted" if used else ""
    made = f"{printable(output)}: mean of {len(record.clients)} clients, {mib(record.layout.nbytes)}"
    if not result.planned:
        return f"{made}, made by an earlier call\nnothing was left to do; {result.seconds:.2f} s{requests}"
    plan, now = result.plan, len(result.reports)
    unit = "slice" if len(plan.fan_ins) == 1 else "function"
    slices = f"{plan.functions} {unit}{'s' * (plan.functions > 1)}" + (f", {now} of them now" if now < plan.functions else "")
    return (
        f"{made}, {plan.topology}: {slices}\n"
        f"memory per function: {mib(plan.memory)} projected, {observed_memory(result)}; {result.seconds:.2f} s{requests}"
        + (f"\nconcurrency: {result.taken}" if result.taken else "")
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status; whatever goes wrong is one line on standard error."""
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
    """Give the exit status, and the line to say."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            return 130, "interrupted"
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "gradsharding"
            return 2, f"{error.format_message()} See '{command} --help'."
        case GradShardingError():
            return 2 if isinstance(error, UserError) else 1, error.message
        case OSError():
            return 2, f"{error}; check the path, its permissions, and the space left"
    return 1, f"{type(error).__name__}: {error}"
