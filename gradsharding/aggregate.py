"""The whole story: seal → plan → check → run → publish. Called again after a crash, it goes on where the last call stopped."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gradsharding.cost import Bill, Cost, bill, forecast
from gradsharding.errors import IncompleteUpload, MissingObject, ObjectExists, PlanTooLarge, UserError
from gradsharding.executor import Executor, InlineExecutor, Progress
from gradsharding.kernel import Arithmetic
from gradsharding.plan import HEADER_PART, Limits, Plan, mib
from gradsharding.prices import HOME_REGION, load_prices
from gradsharding.reading import Reading, combined
from gradsharding.round import Manifest, ResultRecord, Round
from gradsharding.store import ObjectStore, exists, file_path, locate
from gradsharding.task import Job, NonFinitePolicy, TaskReport
from gradsharding.topology import Topology, sharded
from gradsharding.update import data_digest, load


@dataclass(frozen=True)
class Result:
    """A finished round: what was planned, what was seen, and where the result lies."""

    round: Round
    record: ResultRecord
    plan: Plan
    reports: tuple[TaskReport, ...]
    """Of the tasks that this call ran; a resumed round has fewer than its plan."""
    puts: int
    """PUT-class requests made by this call itself, beside its tasks'."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Read the result; BF16, which numpy lacks, comes as the equal float32."""
        return load(self.record.source, self.round.store)

    def digest(self) -> str:
        """SHA-256 (hex) of the result's data section: equal results have equal digests, whatever their shards."""
        return self.record.digest or data_digest(self.record.source, self.round.store, version=self.record.version)

    def cost(self) -> Cost | None:
        """Bill the round by what Lambda reported, at list prices; None if it ran elsewhere. Raise UserError for want of prices."""
        told = next((report.invocation for report in self.reports if report.invocation), None)
        if not told:
            return None
        prices = load_prices(told.region or HOME_REGION)
        return bill(self.reports, self.plan, prices, architecture=told.architecture or "arm64", puts=self.puts)

    def _cost(self) -> dict[str, Any] | None:
        try:
            billed = self.cost()
        except UserError as error:
            return {"problem": error.message}
        if not billed:
            return None
        told = next(report.invocation for report in self.reports if report.invocation)
        prices, arm = load_prices(told.region or HOME_REGION), told.architecture or "arm64"
        expected = forecast(self.plan, prices, told.memory_size, architecture=arm)
        return {
            "aggregation": _sums(expected.cost.aggregation, billed.aggregation),
            "round_trip": _sums(expected.cost.round_trip, billed.round_trip),
            "items": [{**item.model_dump(mode="json"), "usd": f"{item.usd:f}"} for item in billed.round_trip.items],
            "prices": prices.origin,
        }

    def _stages(self) -> list[dict[str, Any]]:
        seen = {report.task: report.model_dump() for report in self.reports}
        return [{"tasks": [seen[task.id] for task in stage.tasks if task.id in seen]} for stage in self.plan.stages]

    def report(self) -> dict[str, Any]:
        """Projected beside observed, as JSON values; bytes and seconds."""
        plan, reports = self.plan, self.reports
        return {
            "topology": plan.topology,
            "arithmetic": plan.arithmetic,
            "clients": plan.clients,
            "bytes": plan.result_bytes,
            "stages": self._stages(),
            "projected": _figures(plan.gets, plan.puts, plan.bytes_read, plan.bytes_written, plan.memory, None),
            "observed": _figures(
                sum(r.gets for r in reports),
                sum(r.puts for r in reports) + self.puts,
                sum(r.bytes_read for r in reports),
                sum(r.bytes_written for r in reports) + plan.header_bytes,
                max((r.peak_memory for r in reports), default=0),
                sum(r.seconds for r in reports),
            ),
            "cost": self._cost(),
            "digest": self.digest(),
        }


def aggregate(
    round: Round,  # noqa: A002
    *,
    topology: Topology = sharded,
    arithmetic: Arithmetic = "float64",
    limits: Limits | None = None,
    executor: Executor | None = None,
    nonfinite: NonFinitePolicy = "raise",
    progress: Callable[[Plan], Progress] | None = None,
    overwrite: bool = False,
) -> Result:
    """Average a round's updates, weighted, and publish the result as one safetensors object.

    Each stage of the story leaves one object behind, so a call that follows a crash, with the same arguments, runs only the
    tasks whose parts are missing. ``overwrite`` lets the result replace an object that is there.

    In ``"exact"`` arithmetic the result is the correctly rounded weighted mean of all contributions, whatever the topology, its slices,
    the executor and the order of anything; the result's record carries its digest. ``"float64"`` is faster, and takes less memory.

    Raise TooFewClients, LayoutMismatch, InvalidWeight, PlanTooLarge, ObjectExists (the output is taken) or UserError (exact sums
    of float64; a round that is done in other arithmetic) before any data is read; NonFinite, MissingObject, ChangedObject, InvalidUpdate,
    OutOfMemory or TaskFailed from a task, with nothing published.
    """
    executor = executor or InlineExecutor()
    limits = executor.limits(limits)
    manifest = round.seal()
    target, key = locate(round.output, round.store)
    plan = topology(manifest, limits, grain=target.grain, reading=_reading(round, manifest), arithmetic=arithmetic)
    plan.check(limits)
    if record := round.result():
        return Result(round, _summed_alike(record, plan, round), plan, (), 0)
    upload, begun = round.begin(plan, nonfinite=nonfinite, overwrite=overwrite)
    try:
        done = target.parts(key, upload)
    except MissingObject:  # completed by a call that died before it could say so, or lost
        if record := None if overwrite else _made_of(upload, round, manifest, plan):
            return Result(round, record, plan, (), 0)
        round.forget_plan()
        (upload, begun), done = round.begin(plan, nonfinite=nonfinite, overwrite=overwrite), {}
    job = _job(round, plan, upload, nonfinite)
    reports: list[TaskReport] = []
    tell = progress(plan) if progress else _ignore
    try:
        target.put_part(key, upload, HEADER_PART, 0, manifest.layout.header())
        reports += executor.run(plan.missing(done, _partials(plan, job, round.store)), job, round.store, limits, tell)
        stat = target.complete(key, upload, plan.parts, overwrite=overwrite)
    except (MissingObject, ObjectExists, IncompleteUpload):
        if record := round.result() or (None if overwrite else _made_of(upload, round, manifest, plan)):  # another call was faster
            return Result(round, record, plan, tuple(reports), 1 + begun)
        raise
    if len(plan.stages) > 1:
        round.forget_partials(upload)
    return Result(round, round.publish(manifest, stat.version, plan.arithmetic), plan, tuple(reports), 2 + begun)


def _summed_alike(record: ResultRecord, plan: Plan, round: Round) -> ResultRecord:  # noqa: A002
    """Give a published result back; raise UserError if it was summed in other arithmetic than is asked for now."""
    if record.arithmetic != plan.arithmetic:
        raise UserError(f"round {round.id} is done, in {record.arithmetic}; its result stays: for {plan.arithmetic}, make another round")
    return record


def _job(round: Round, plan: Plan, upload: str, nonfinite: NonFinitePolicy) -> Job:  # noqa: A002
    """What the tasks share; raise PlanTooLarge if this machine's memory has no room for the partial sums that should pass through it."""
    partials, shared = round.partials(upload, shared_memory=plan.shared_memory), plan.partial_bytes if plan.shared_memory else 0
    if shared:
        path = Path(file_path(partials))
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        if free < shared and not path.exists():
            raise PlanTooLarge(
                f"partial sums take {mib(shared)} of shared memory, and {path.parent} has {mib(free)} free; "
                "let them pass through the store, or use fewer clients or a larger fan-in",
                projected=shared,
                allowed=free,
            )
        path.mkdir(mode=0o700, exist_ok=True)
    return Job(store=round.store.url, output=round.output, upload=upload, partials=partials, shared_bytes=shared, nonfinite=nonfinite)


def _partials(plan: Plan, job: Job, home: ObjectStore) -> set[str]:
    """Name the tasks whose partial sums are there, from a call before this one."""
    tasks = {job.partial(task.id): task for stage in plan.stages[:-1] for task in stage.tasks}
    if not tasks:
        return set()
    store, prefix = locate(f"{job.partials}/", home)
    there = {f"{job.partials}/{key.removeprefix(prefix)}": stat.size for key, stat in store.list(prefix)}
    return {task.id for reference, task in tasks.items() if reference in there and task.may_have_written(there[reference])}


def _reading(round: Round, manifest: Manifest) -> Reading:  # noqa: A002
    """How the tasks should read: what the stores of the inputs, the output and the round itself want."""
    places = {term.source.rpartition("/")[0] if "://" in term.source else "" for term in manifest.terms}
    stores = [locate(f"{place}/-" if place else "-", round.store)[0] for place in places]
    return combined(store.reading for store in (*stores, round.store, locate(round.output, round.store)[0]))


def _made_of(upload: str, round: Round, manifest: Manifest, plan: Plan) -> ResultRecord | None:  # noqa: A002
    """Publish what another call has completed from the same upload; None if it is under way, or nothing came of it."""
    target, key = locate(round.output, round.store)
    try:
        target.parts(key, upload)
    except MissingObject:
        round.forget_partials(upload)
        return round.publish(manifest, target.head(key).version, plan.arithmetic) if exists(target, key) else None
    return None


def _sums(projected: Bill, observed: Bill) -> dict[str, str]:
    return {"projected": f"{projected.usd:f}", "observed": f"{observed.usd:f}"}


def _ignore(report: TaskReport) -> None:
    """Tell nobody."""


def _figures(gets: int, puts: int, bytes_read: int, bytes_written: int, peak_memory: int, seconds: float | None) -> dict[str, Any]:
    return {
        "gets": gets,
        "puts": puts,
        "bytes_read": bytes_read,
        "bytes_written": bytes_written,
        "peak_memory": peak_memory,
        "seconds": seconds,
    }
