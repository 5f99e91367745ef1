"""``gradsharding aggregate``: the round of one command, run and summarized."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradsharding.advice import billing
from gradsharding.arithmetic.rules import Rule
from gradsharding.cli.command import command, completed_as, completed_by, option
from gradsharding.cli.inputs import located, open_round, read_updates, requests_around, writable
from gradsharding.cli.options import chosen_rule, memory_size, rule_options
from gradsharding.cli.terminal import printable
from gradsharding.cli.topologies import topology_options
from gradsharding.errors import NonFinite
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.platform import CHARGES
from gradsharding.planning.task import NonFinitePolicy
from gradsharding.planning.topologies import Topology
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.result import Result, observed_memory
from gradsharding.running import executors
from gradsharding.sizes import mib
from gradsharding.stores.files import replace
from gradsharding.text import labelled
from gradsharding.usage import counting

DIVISION, EXECUTION, RESULT = "How the work is divided", "Where it runs", "Result"
"""Headings of the options."""


@command("aggregate")
@click.argument("updates", nargs=-1, required=True, metavar="[ID=]PATH[:WEIGHT]...", shell_complete=completed_as("file"))
@option(
    "-o",
    "--output",
    required=True,
    metavar="PATH",
    section=RESULT,
    shell_complete=completed_as("file"),
    help="Write the average there; an existing file is replaced once the average is complete.",
)
@rule_options
@option(
    "--nonfinite",
    type=click.Choice(get_args(NonFinitePolicy)),
    default="raise",
    show_default=True,
    section=RESULT,
    help="Stop at NaN or infinity, or let them pass into the average.",
)
@option(
    "--report",
    metavar="PATH",
    section=RESULT,
    shell_complete=completed_as("file"),
    help="Write the projected and the observed memory, requests, bytes and time there, as JSON.",
)
@option(
    "--store",
    metavar="URL",
    section=RESULT,
    shell_complete=completed_as("dir"),
    help="Keep the round's records in this directory or s3:// URL, so that the command can be resumed.  [default: keep none]",
)
@topology_options(DIVISION)
@option(
    "--executor",
    metavar="KIND",
    default="processes",
    show_default=True,
    section=EXECUTION,
    shell_complete=completed_by("processes", "threads", "inline", "lambda:"),
    help="inline, processes[:N], threads[:N] or lambda:FUNCTION[:QUALIFIER].",
)
@option(
    "--memory",
    type=memory_size,
    metavar="SIZE",
    section=EXECUTION,
    help="Memory of one function.  [default: 512MiB, or that of the Lambda function]",
)
@option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    section=EXECUTION,
    help="Lambda invocations at once.  [default: those reserved for the function, or half of the account's unreserved ones]",
)
def aggregate_command(
    updates: tuple[str, ...],
    output: str,
    topology: Topology,
    memory: int | None,
    executor: str,
    concurrency: int | None,
    store: str | None,
    nonfinite: NonFinitePolicy,
    report: str | None,
    rule: Rule | None,
    *,
    exact: bool,
) -> None:
    """Average safetensors files into one, slice by slice.

    \b
    Examples:
      gradsharding aggregate alice.safetensors:120 bob.safetensors:80 \\
          -o global.safetensors
      gradsharding aggregate a=run1/model.safetensors b=run2/model.safetensors \\
          -o mean.safetensors
      gradsharding aggregate *.safetensors -o out/mean.safetensors \\
          --memory 128MiB --report report.json
      gradsharding aggregate s3://bucket/a.safetensors:120 \\
          s3://bucket/b.safetensors:80 -o s3://bucket/mean.safetensors \\
          --executor lambda:gradsharding:live

    The average is weighted, and no function holds a whole model.

    PATH is a local path, a file:// URL or an s3:// URL. ID names the client; the default is the file's name without its ending. WEIGHT is
    a positive number, such as the client's number of examples; the default is 1. A PATH may itself hold ':' and '='. If an argument can be
    read in several ways, the reading whose file exists is taken; if several exist, the command stops.

    By default the functions are worker processes, one for each CPU, and each is held to --memory. processes:N starts N of them. inline runs
    all tasks in this process: it starts sooner, and nothing limits its memory. lambda:FUNCTION runs them on AWS Lambda; then all updates
    and the output must be in S3. Endpoint, region and credentials come from the usual AWS environment variables and profiles.

    The output is either complete or not there. If the command is stopped, even by kill -9, the same command with the same --store continues
    where it stopped; without --store it starts again.

    With --exact the result is the weighted mean of real arithmetic, rounded once: the same bits for every topology, number of slices,
    executor and order. It takes more memory and time. If --store is given too, `gradsharding verify` can check the result later.

    With --rule trimmed-mean:0.2, each element is averaged without the fifth of the clients that have its smallest values, and the fifth
    that have its largest: up to a fifth of the clients may send anything. Weights do not count, and there are no trees.
    """  # noqa: D301 - \b tells click to keep the lines that follow
    started = time.perf_counter()
    with counting() as around:
        given = read_updates(updates)
        inputs = [update.place for update in given]
        out = writable(output, inputs)
        report_path = writable(report, [*inputs, out]).path if report else None
        runner = executors.open_executor(executor, concurrency=concurrency)
        limits = runner.limits(Limits(memory=memory) if memory is not None else None)
        rule = chosen_rule(rule, exact=exact)
        with open_round(store, given, out, nonfinite, rule) as round_, _progress_bar() as bar:
            try:
                result = aggregate(
                    round_,
                    topology=topology,
                    rule=rule,
                    limits=limits,
                    executor=runner,
                    nonfinite=nonfinite,
                    progress=bar,
                    overwrite=True,
                )
            except NonFinite as error:
                located_error = located(error, given)
                raise NonFinite(f"{located_error.message}, or pass --nonfinite propagate", **error.details) from error
    around_it = requests_around(given, round_, emptied=not (store or out.path))
    result = result.within(around.spent, around_it, time.perf_counter() - started)
    if report_path:
        replace(report_path, json.dumps(billing.report(result), indent=2) + "\n")
    facts = _facts(result)
    if not rule.weighs:
        facts["weights"] = "do not count: each client counts the same"
    if rule.vouches:
        facts["SHA-256"] = result.digest()
        facts |= {"check it": f"gradsharding verify {printable(store)} {round_.id}"} if store else {}
    record = result.record
    click.echo(f"{printable(output)}: {rule} of {_count(len(record.clients), 'client')}, {mib(record.layout.nbytes)}")
    click.echo(labelled([*facts.items()]))


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[Plan], executors.Progress]]:
    """Show how many slices are done, if standard error is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:

        def begin(plan: Plan) -> executors.Progress:
            row = bar.add_task("slices" if len(plan.fan_ins) == 1 else "functions", total=plan.functions)
            return lambda _: bar.advance(row)

        yield begin


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _facts(result: Result) -> dict[str, str]:
    """Say how the result was made, and what that took."""
    if result.planned:
        plan, now = result.plan, len(result.reports)
        unit = "slice" if len(plan.fan_ins) == 1 else "function"
        work = _count(plan.functions, unit) + (f", {now:,} of them now" if now < plan.functions else "")
        facts = {
            "topology": f"{plan.topology}: {work}",
            "memory": f"{mib(plan.memory)} projected for a function, {observed_memory(result)}",
        }
    else:
        facts = {"made": "by an earlier call; nothing was left to do"}
    facts["time"] = f"{result.seconds:.2f} s"
    if used := result.usage.get(CHARGES.kind):
        facts["requests"] = f"{used.gets:,} GET and HEAD, {used.puts:,} PUT, COPY, POST and LIST, counted at the client of S3"
    if result.taken:
        facts["concurrency"] = result.taken
    return facts
