"""Do a round's report and its plan tell the requests that the S3 server sees?

Random rounds of the command line, of the API, resumed after a crash, and of Flower, on a real server on this machine: each class of
requests, as it is billed, is counted by the server (Ceph's own log, or moto's front), by the report, and by the plan. What is reported
must equal what the server saw; what was planned must be no less, and at most a tenth more where sizes do not vary. Then four rounds of
fixed sizes.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import statistics
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg
from rich.console import Console
from rich.table import Table

from gradsharding import Flat, InlineExecutor, Limits, Round, aggregate
from gradsharding.arithmetic.rules import MEAN, ExactMean
from gradsharding.aws.s3.store import S3Store
from gradsharding.cli.main import cli
from gradsharding.format.encode import encode
from gradsharding.planning.topologies import TOPOLOGIES, make_topology
from gradsharding.rounds.records import PlanRecord
from gradsharding.usage import Usage
from gradsharding_flower import LIFL, GradSharding, LambdaFL, upload_mod
from gradsharding_flower.result import RoundReport
from gradsharding_flower.testing import LocalGrid
from measure import machine, save
from rigs.s3 import S3Server, ceph_server, moto_server

RESULTS = Path(__file__).parent / "results" / "request_counts.json"

MIB = 1 << 20

ROUNDS = {"moto": 200, "ceph": 50}

SLACK, UNKNOWN = 1.1, 1
"""Where sizes do not vary, a plan may exceed the count by the factor SLACK or by UNKNOWN requests, whichever is more. The latter matters in
the smallest rounds: no plan knows whether the server's answer names the version of a completed object, or takes one more request."""

Arrays = dict[str, Any]


class Counted(NamedTuple):
    """A round, counted three times."""

    kind: str
    case: str
    seen: dict[str, int]
    """At the server."""
    reported: Usage
    planned: Usage
    varies: bool
    """Whether partial sums are as long as their values need, so that the plan is a bound only."""

    @property
    def problem(self) -> str | None:
        """Describe the first difference; None if there is none."""
        for name in ("gets", "puts"):
            seen, reported, planned = self.seen[name], getattr(self.reported, name), getattr(self.planned, name)
            loose = planned > max(SLACK * reported, reported + UNKNOWN) and not self.varies
            if seen != reported or reported > planned or loose:
                return f"{self.kind} ({self.case}): {name}: {seen} at the server, {reported} reported, {planned} planned"
        if self.kind == "flower":  # it tells no deletes, and the bytes of data alone
            return None
        if self.seen["deletes"] != self.reported.deletes:
            return f"{self.kind} ({self.case}): deletes: {self.seen['deletes']} at the server, {self.reported.deletes} reported"
        if self.reported.bytes_read > self.planned.bytes_read or self.reported.bytes_written > self.planned.bytes_written:
            return f"{self.kind} ({self.case}): more bytes than planned: {self.reported}, {self.planned}"
        return None

    def excess(self, name: str) -> float:
        """Planned by reported."""
        return float(getattr(self.planned, name) / max(1, getattr(self.reported, name)))


def updates(draw: random.Random, *, exact: bool) -> list[Arrays]:
    """Draw models: mostly small, some with a long header, some with slices that S3 takes as they are."""
    numbers = np.random.default_rng(draw.randrange(1 << 30))
    clients, shape = draw.randint(2, 6), draw.choice(["small", "small", "many tensors", "large"])
    sizes = {
        "small": [draw.randint(5, 5_000) for _ in range(draw.randint(1, 4))],
        "many tensors": [3] * 1_500,
        "large": [draw.randint(2 * MIB, 7 * MIB)],
    }[shape]
    dtypes = ["f4", "f2", "i4"] if exact else ["f4", "f8", "i8"]
    kinds = [draw.choice(dtypes) for _ in sizes] if shape == "small" else ["f4"] * len(sizes)
    return [
        {f"t{i:04d}": (numbers.normal(size=n) * 100).astype(kind) for i, (n, kind) in enumerate(zip(sizes, kinds, strict=True))}
        for _ in range(clients)
    ]


def parameters(draw: random.Random, name: str) -> dict[str, int]:
    """Draw a topology's options."""
    options = TOPOLOGIES[name].model_fields
    shards = {"shards": draw.randint(1, 5)} if "shards" in options else {}
    return shards | ({"fan_in": draw.randint(2, 3)} if "fan_in" in options else {})


def is_tree(name: str) -> bool:
    """Whether functions of a topology pass partial sums on."""
    return "fan_in" in TOPOLOGIES[name].model_fields


def command(draw: random.Random, store: S3Store, server: S3Server) -> Counted:
    """A whole command, its records kept in S3 or not, its output in S3 or not."""
    name, exact = draw.choice([*TOPOLOGIES]), draw.random() < 0.4
    models, base = updates(draw, exact=exact), f"in-{uuid.uuid4().hex[:8]}"
    for i, arrays in enumerate(models):
        store.put(f"{base}/c{i}.safetensors", encode(arrays)[1])
    weighted = draw.random() < 0.5
    given = [f"{store.url}/{base}/c{i}.safetensors" + f":{i + 1}" * weighted for i in range(len(models))]
    options = [f"--{key.replace('_', '-')}={value}" for key, value in parameters(draw, name).items()] + ["--exact"] * exact
    options += ["--executor", draw.choice(["inline", "inline", "inline", "threads:3", "processes:1"]), "--memory", "2GiB"]
    options += ["--store", f"{store.url}/kept"] * (draw.random() < 0.4)
    with tempfile.TemporaryDirectory() as place:
        here = draw.random() < 0.2
        output = f"{place}/out.safetensors" if here else f"{store.url}/out/{uuid.uuid4().hex[:8]}.safetensors"
        arguments = ["aggregate", *given, "-o", output, "--topology", name, *options, "--report", f"{place}/report.json"]
        with server.counting() as seen, contextlib.redirect_stdout(None):
            cli.main(arguments, standalone_mode=False)
        report = json.loads(Path(place, "report.json").read_text())
    observed, planned = (Usage(**report[which]["stores"]["s3"]) for which in ("observed", "projected"))
    case = f"{name}{', exact' * exact}{', its output here' * here}"
    return Counted("command", case, dict(seen), observed, planned, exact and is_tree(name))


class Dying(InlineExecutor):
    """Runs some tasks, then dies."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def run(self, tasks: Sequence[Any], *args: Any) -> list[Any]:
        """Die in the middle."""
        super().run(tasks[: self.tasks], *args)
        raise KeyboardInterrupt


def leave(draw: random.Random, round_: Round, topology: Any, options: dict[str, Any]) -> None:
    """Leave a round as calls before may have left it."""
    state = draw.choice(["died", "died, other plan", "lost its upload", "done", "done, and its result is gone"])
    if state.startswith("done"):
        done = aggregate(round_, topology=topology, **options)
        if "gone" in state:
            round_.store.delete([done.record.source])
        return
    first = Flat() if "other" in state else topology
    with contextlib.suppress(KeyboardInterrupt):
        aggregate(round_, topology=first, executor=Dying(draw.randint(0, 3)), **options)
    if "lost" in state:
        plan = PlanRecord.model_validate_json(b"".join(map(bytes, round_.store.get(round_.key("plan.json"), 0, 1 << 20))))
        round_.store.abort(round_.output, plan.upload)


def call(draw: random.Random, store: S3Store, server: S3Server, *, dies: bool = False) -> Counted:
    """A call of ``aggregate``: of a round with receipts, or sealed, or as a call before has left it."""
    name, exact = draw.choice([*TOPOLOGIES]), draw.random() < 0.4
    round_ = Round.create(store, f"r-{uuid.uuid4().hex[:12]}")
    for i, arrays in enumerate(updates(draw, exact=exact)):
        round_.submit(f"c{i}", arrays, i + 1)
    options: dict[str, Any] = {"rule": ExactMean() if exact else MEAN, "limits": Limits(memory=1 << 31), "overwrite": draw.random() < 0.3}
    state = draw.choice(["receipts", "sealed", "known"])
    if state != "receipts":
        round_.seal()
    topology = make_topology(name, **parameters(draw, name))
    if dies:
        leave(draw, round_, topology, options)
    with server.counting() as seen:
        handle = round_ if state == "known" else Round(store, round_.id)
        report = aggregate(handle, topology=topology, **options).report()
    observed, planned = (Usage(**(report[which] or report["observed"])["stores"]["s3"]) for which in ("observed", "projected"))
    varies = dies or (exact and is_tree(name))  # of what was left, a plan knows less
    return Counted("resumed" if dies else "call", f"{name}{', exact' * exact}, {state}", dict(seen), observed, planned, varies)


def client(node: int) -> ClientApp:
    """Make a client that adds its number to the model; those of relayed nodes have no mod."""
    app = ClientApp(mods=[upload_mod] if node < 100 else [])

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        changed = ArrayRecord({name: Array(array.numpy() + np.float32(context.node_id)) for name, array in arrays.items()})
        return Message(RecordDict({"arrays": changed, "metrics": MetricRecord({"num-examples": 1.0 + context.node_id})}), reply_to=message)

    return app


def watched(kind: type[GradSharding], server: S3Server, note: Callable[[dict[str, int], RoundReport], None]) -> Callable[..., GradSharding]:
    """Give the same strategy, each of whose rounds is counted by the server, from its first word to its last."""

    class Watched(kind):  # type: ignore[misc,valid-type]
        """The same, watched."""

        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
            self.stack = contextlib.ExitStack()
            self.seen = self.stack.enter_context(server.counting())
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            result = super().aggregate_train(server_round, replies)
            self.stack.close()
            note(dict(self.seen), self.history[-1])
            return result

    return Watched


def requests_of(report: RoundReport) -> tuple[Usage, Usage]:
    """Give a round's requests, the server's and the nodes', as they were counted and as they were planned."""
    counted = Usage(gets=report.gets + (report.nodes_gets or 0), puts=report.puts + (report.nodes_puts or 0))
    gets, puts = report.projected_gets + report.projected_nodes_gets, report.projected_puts + report.projected_nodes_puts
    return counted, Usage(gets=gets, puts=puts)


def federation(draw: random.Random, store: S3Store, server: S3Server) -> list[Counted]:
    """A Flower run of two rounds, whose requests are counted round by round."""
    kind: type[GradSharding] = draw.choice([GradSharding, LambdaFL, LIFL])
    found: list[Counted] = []

    def note(seen: dict[str, int], report: RoundReport) -> None:
        case, varies = f"{kind.__name__}, {mode}{', exact' * exact}", exact and kind is not GradSharding
        found.append(Counted("flower", case, seen, *requests_of(report), varies))

    mode, exact = draw.choice(["direct", "direct", "relay", "mixed"]), draw.random() < 0.3
    (model, *_) = updates(draw, exact=True)
    model = {name: array.astype("f4") for name, array in model.items()}
    first = {"direct": 1, "relay": 101, "mixed": 99}[mode]
    nodes = range(first, first + draw.randint(2, 5))
    inner: Any = FedAvg if exact else draw.choice([FedAvg, FedAvg, FedAdam])
    options: dict[str, Any] = {"shards": draw.randint(1, 4)} if kind is GradSharding else {}
    options |= {"presigned": draw.random() < 0.7, "keep": draw.random() < 0.3, "exact": exact, "limits": Limits(memory=1 << 31)}
    strategy = watched(kind, server, note)(inner(fraction_evaluate=0.0), store=store, executor="inline", mode=mode, **options)
    initial = ArrayRecord({name: Array(array) for name, array in model.items()})
    strategy.start(LocalGrid({node: client(node) for node in nodes}), initial, num_rounds=2)
    left_out = [f"{mode}: node {node}: {why}" for report in strategy.history for node, why in report.left_out.items()]
    assert (2, []) == (len(found), left_out), "a round was given up, or went on without a node"
    return found


def rounds(seed: int, count: int, store: S3Store, server: S3Server) -> Iterator[Counted]:
    """Count random rounds."""
    draw, made = random.Random(seed), 0
    for kind in cycle(["command", "flower", "call", "command", "resumed"]):
        if made >= count:
            return
        if kind == "flower":
            counted = federation(draw, store, server)
        else:
            counted = [command(draw, store, server) if kind == "command" else call(draw, store, server, dies=kind == "resumed")]
        made += len(counted)
        yield from counted


def fixed(store: S3Store, server: S3Server) -> dict[str, Any]:
    """Count four rounds of fixed sizes, each as a command with all in S3."""
    found = {}
    four = {
        "sharded, 6 × 8 MiB, 4 slices": (6, 8, ["--shards", "4"]),
        "sharded, 6 × 64 MiB, 4 slices": (6, 64, ["--shards", "4"]),
        "lambda-fl, 5 × 12 MiB": (5, 12, ["--topology", "lambda-fl"]),
        "sharded-tree, 5 × 24 MiB": (5, 24, ["--topology", "sharded-tree"]),
    }
    for name, (clients, size, options) in four.items():
        base = f"in-{uuid.uuid4().hex[:8]}"
        for i in range(clients):
            store.put(f"{base}/c{i}.safetensors", encode({"w": np.full(size << 18, i, "f4")})[1])
        with tempfile.TemporaryDirectory() as place:
            given = [f"{store.url}/{base}/c{i}.safetensors" for i in range(clients)]
            more = ["--executor", "inline", "--memory", "2GiB", "--report", f"{place}/r.json"]
            with server.counting() as seen, contextlib.redirect_stdout(None):
                cli.main(["aggregate", *given, "-o", f"{store.url}/out-{base}.safetensors", *options, *more], standalone_mode=False)
            report = json.loads(Path(place, "r.json").read_text())
        figures = {which: {k: report[which][k] for k in ("gets", "puts")} for which in ("observed", "projected")}
        found[name] = {"server": {k: seen[k] for k in ("gets", "puts")}, **figures}
    return found


@contextlib.contextmanager
def server_of(name: str) -> Iterator[S3Server]:
    """Start a server, and let this process's environment lead to it."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(moto_server()) if name == "moto" else stack.enter_context(ceph_server()).server
        before = {key: os.environ.get(key) for key in server.environment()}
        os.environ.update(server.environment())
        try:
            yield server
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def summary(found: Sequence[Counted]) -> dict[str, Any]:
    """Say how many rounds there were, and how near the plan was."""
    exact = [counted for counted in found if not counted.varies]
    return {
        "rounds": len(found),
        "kinds": dict(Counter(counted.kind for counted in found)),
        "what": dict(sorted(Counter(counted.case.partition(",")[0] for counted in found).items())),
        "requests_at_the_server": {name: sum(counted.seen[name] for counted in found) for name in ("gets", "puts", "deletes")},
        "reported_as_seen": sum(
            counted.seen["gets"] == counted.reported.gets and counted.seen["puts"] == counted.reported.puts for counted in found
        ),
        "planned_at_least_reported": sum(
            counted.reported.gets <= counted.planned.gets and counted.reported.puts <= counted.planned.puts for counted in found
        ),
        "planned_of_reported": {
            name: {"median": statistics.median(ratios), "most": max(ratios)}
            for name in ("gets", "puts")
            if (ratios := [counted.excess(name) for counted in exact])
        },
        "planned_of_reported_where_sizes_vary": {
            name: max((counted.excess(name) for counted in found if counted.varies), default=None) for name in ("gets", "puts")
        },
    }


def main() -> None:
    """Count, print, save; end with an error if a count is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=[*ROUNDS], default=[*ROUNDS])
    parser.add_argument("--rounds", type=int, help="on each server (default: 200 on moto, 50 on Ceph)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    facts = machine(["gradsharding", "boto3", "moto", "flwr"])
    console, results, problems = Console(width=130), dict[str, Any](), list[str]()
    for name in options.servers:
        with server_of(name) as server:
            store = S3Store(f"s3://{server.make_bucket()}/p")
            found = [*rounds(options.seed, options.rounds or ROUNDS[name], store, server)]
            results[name] = {**summary(found), "fixed": fixed(store, server)}
            problems += [counted.problem for counted in found if counted.problem]
        result = results[name]
        same, within = result["reported_as_seen"], result["planned_at_least_reported"]
        console.print(f"{name}: {result['rounds']} rounds, {same} reported as the server saw them, {within} within their plan")
        table = Table("round", "at the server: GET", "PUT", "reported: GET", "PUT", "planned: GET", "PUT")
        for title, counted in result["fixed"].items():
            table.add_row(title, *(str(counted[which][k]) for which in ("server", "observed", "projected") for k in ("gets", "puts")))
        console.print(table)
    for problem in problems:
        console.print(f"NOT as it must be: {problem}", markup=False)
    question = (__doc__ or "").splitlines()[0]
    save(options.output, {"question": question, "machine": facts, "seed": options.seed, "problems": problems, "servers": results})
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
