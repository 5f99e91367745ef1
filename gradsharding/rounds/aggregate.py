"""A round from end to end: seal → plan → check → run → publish. Called again after a crash, it continues where the last call stopped."""

import contextlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from gradsharding.arithmetic.rules import MEAN, Rule, as_rule
from gradsharding.errors import (
    ChangedObject,
    GradShardingError,
    IncompleteUpload,
    MissingObject,
    NonFinite,
    ObjectExists,
    PlanTooLarge,
    StoreFailed,
    StoreRefused,
    TaskFailed,
    UserError,
    named,
    naming,
)
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.projection import HEADER_PART, READERS
from gradsharding.planning.task import Job, NonFinitePolicy, TaskReport, Term
from gradsharding.planning.topologies import Topology, as_topology
from gradsharding.rounds.records import RECORD, ResultRecord
from gradsharding.rounds.result import Result
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, InlineExecutor, Progress, suited, taken
from gradsharding.running.worker import blame
from gradsharding.sizes import mib
from gradsharding.stores.private import private_directory
from gradsharding.stores.protocol import ObjectStore, changed
from gradsharding.stores.reading import Reading, combined
from gradsharding.stores.urls import locate
from gradsharding.usage import carried, counting, together


def aggregate(
    round: Round,  # noqa: A002
    *,
    topology: Topology | None = None,
    rule: Rule | str = MEAN,
    limits: Limits | None = None,
    executor: Executor | None = None,
    nonfinite: NonFinitePolicy = "raise",
    progress: Callable[[Plan], Progress] | None = None,
    overwrite: bool = False,
) -> Result:
    """Aggregate a round's updates by a rule, and publish the result as one safetensors object.

    ``topology`` divides the work; the default is ``Sharded()``. After a crash, the same call runs only the tasks whose parts are missing.
    A round that is done stays as it is: its result is returned, whatever the other arguments, if the same rule made it. ``overwrite`` lets
    the result replace an existing object.

    The ``rule``, a value or its text, combines the updates; the default is the weighted mean. With a rule that vouches, such as
    ``exact-mean``, the result has the same bits whatever the topology, its slices, the executor and the order of arrival, and its record
    has the digest of its data.

    Raise TooFewClients, LayoutMismatch, InvalidWeight, PlanTooLarge, ObjectExists (the output exists) or UserError (a rule that does not
    exist, or does not fit the updates or the topology; what is not a topology; a round that was done by another rule) before any data is
    read. Raise NonFinite, MissingObject, ChangedObject, InvalidUpdate, OutOfMemory or TaskFailed from a task, with nothing published. If
    updates are missing or were written again, ``details["clients"]`` has the reason for each such client. An error's ``usage`` has the
    requests that the call made in vain, as far as they are known: workers that were killed report none.
    """
    reports: list[TaskReport] = []
    runner, started = executor or InlineExecutor(), time.perf_counter()
    with counting() as ledger:
        try:
            topology, rule = as_topology(topology), as_rule(rule)
            record, plan, used = _aggregated(round, topology, rule, limits, runner, nonfinite, progress, reports, overwrite)
            _require_made_by(rule, record, round)  # another call may have made it, also during this one
        except GradShardingError as raised:
            error = _seen_from_here(raised, round)
            if "client" in error.details and not isinstance(error, StoreFailed | TaskFailed):  # a store's failure is no client's fault
                error.details["clients"] = _lost(round) | {error.details["client"]: error.message}
            error.usage = together(raised.usage, ledger.spent, *(report.usage for report in reports))
            if error is raised:
                raise
            raise error from raised
    shared = taken(runner, used) if used else None
    return Result(round, record, plan, tuple(reports), ledger.spent, time.perf_counter() - started, used, shared)


def _aggregated(
    round_: Round,
    topology: Topology,
    rule: Rule,
    limits: Limits | None,
    executor: Executor,
    nonfinite: NonFinitePolicy,
    progress: Callable[[Plan], Progress] | None,
    reports: list[TaskReport],
    overwrite: bool,  # noqa: FBT001
) -> tuple[ResultRecord, Plan | None, Limits | None]:
    """Aggregate; return the record, the plan and its limits, of which the last two are None if the round was already done.

    ``reports`` receives those of the tasks that have ended, even if this raises.
    """
    published = round_.published()
    if published.record:
        return published.record, None, None
    limits = executor.limits(limits)
    manifest, intake = round_.sealed_by()
    target, key = locate(round_.output, round_.store)
    plan = topology.plan(manifest, limits, grain=target.grain, reading=_reading(round_, manifest), rule=rule)
    plan = plan.replace(reading=suited(executor, plan, limits))
    plan = plan.placed(
        home=round_.store.charges,
        output=target.charges,
        intake=intake,
        record_bytes=manifest.json_bytes + RECORD + len(round_.output),
        overwrite=overwrite,
        reading=target.reading,
        digest=rule.vouches,
        published=published.stale,
        concurrency=limits.concurrency,
    )
    plan.check(limits)
    begun = round_.begin(plan, nonfinite=nonfinite, overwrite=overwrite, published=published)
    plan, done = plan.placed(resumed=not begun.new, dropped=begun.dropped), dict[int, int]()
    if not begun.new:
        try:
            done = target.parts(key, begun.upload)
        except MissingObject:  # completed by a call that died before it recorded the result, or lost
            plan = plan.placed(resumed=False, lost=True)
            if record := None if overwrite else _made_of(begun.upload, round_, manifest, plan):
                return record, plan, limits
            round_.forget_plan()
            begun = round_.begin(plan, nonfinite=nonfinite, overwrite=overwrite, published=published)
    job = _job(round_, plan, begun.upload, nonfinite)
    tell = progress(plan) if progress else _ignore

    def ended(report: TaskReport) -> None:
        reports.append(report)
        with counting():  # requests of the progress callback are not this call's
            tell(report)

    try:
        target.put_part(key, begun.upload, HEADER_PART, 0, manifest.layout.header())
        partials = set[str]() if begun.new else _partials(plan, job, round_.store)
        reports[:] = executor.run(plan.missing(done, partials), job, round_.store, limits, ended)
        stat = target.complete(key, begun.upload, plan.parts, overwrite=overwrite)
    except (MissingObject, ObjectExists, IncompleteUpload):
        if record := round_.result() or (None if overwrite else _another_made(begun.upload, round_, manifest, plan)):
            return record, plan, limits
        raise
    except NonFinite as error:
        raise _named(error, plan, round_.store) from error
    if len(plan.stages) > 1:
        left = [] if plan.shared_memory else [job.partial(task.id) for stage in plan.stages[:-1] for task in stage]
        round_.forget_partials(begun.upload, left)
    return round_.publish(manifest, stat.version, plan.rule), plan, limits


def _seen_from_here(error: GradShardingError, round: Round) -> GradShardingError:  # noqa: A002
    """Say why a task could not read an object: to callers without the right to list, as functions are, S3 denies missing objects, too."""
    if not (reference := error.details.get("unread")):
        return error
    client, (store, key) = error.details.get("client"), locate(reference, round.store)
    done = "sealed; put it back, or begin another round" if client else "written; run it again"
    try:
        store.head(key)
    except MissingObject:
        seen: GradShardingError = MissingObject(f"{reference} is gone: it was deleted after it was {done}", key=key)
    except GradShardingError:  # this caller cannot tell, either
        return error
    else:
        seen = StoreRefused(
            f"{reference} is there, and the task that needs it may not read it ({error.details.get('code')}); allow its function's role, "
            "or the credentials that it has, s3:GetObject there, and kms:Decrypt if a key of KMS's encrypts it"
        )
    return named(seen, client) if client else seen


def _lost(round: Round) -> dict[str, str]:  # noqa: A002
    """Check each update of a round once; return the reason, by client, for each that has changed: one retry can leave out all."""
    manifest = round.sealed()
    places = [(term, *locate(term.source, round.store)) for term in manifest.terms if term.version] if manifest else []

    def look(place: tuple[Term, ObjectStore, str]) -> str | None:
        term, store, key = place
        try:
            with naming(term.client):
                if (found := store.head(key).version) != term.version:
                    raise changed(key, term.version, found)
        except (MissingObject, ChangedObject) as error:
            return error.message
        except GradShardingError:  # a fault of the store, not of the client
            return None
        return None

    with ThreadPoolExecutor(READERS) as readers:
        looked = readers.map(carried(look), places)
        return {term.client: why for (term, *_), why in zip(places, looked, strict=True) if why}


def _named(error: NonFinite, plan: Plan, home: ObjectStore) -> NonFinite:
    """Name the clients whose finite values overflow only when a tree's partial sums are merged: those tasks know no clients."""
    if error.details["found"]:
        return error
    tasks = {*error.details["tasks"]}
    found = NonFinite.together([blame(task, plan.terms, home) for task in plan.tasks if task.id in tasks])
    found.usage = error.usage
    return found


def _require_made_by(rule: Rule, record: ResultRecord, round: Round) -> None:  # noqa: A002
    """Raise UserError if another rule made a published result."""
    if record.rule != rule:
        raise UserError(f"round {round.id} is done, by the rule {record.rule}; its result stays: for {rule}, create another round")


def _job(round: Round, plan: Plan, upload: str, nonfinite: NonFinitePolicy) -> Job:  # noqa: A002
    """Return what the tasks share; raise PlanTooLarge if the shared memory of this machine has no room for the partial sums."""
    partials, shared = round.partials(upload, shared_memory=plan.shared_memory), plan.partial_bytes if plan.shared_memory else 0
    if shared:
        path = Path(urlsplit(partials).path)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        if free < shared and not path.exists():
            raise PlanTooLarge(
                f"partial sums take {mib(shared)} of shared memory, and {path.parent} has {mib(free)} free; "
                "let them pass through the store, or use fewer clients or a larger fan-in",
                projected=shared,
                allowed=free,
            )
        private_directory(path, "remove it, or let partial sums pass through the store")
    return Job(
        store=round.store.url,
        output=round.output,
        upload=upload,
        terms=plan.terms,
        partials=partials,
        shared_bytes=shared,
        nonfinite=nonfinite,
        round=round.id,
    )


def _partials(plan: Plan, job: Job, home: ObjectStore) -> set[str]:
    """Return the ids of the tasks whose partial sums an earlier call has left."""
    tasks = {job.partial(task.id): task for stage in plan.stages[:-1] for task in stage}
    if not tasks:
        return set()
    store, prefix = locate(f"{job.partials}/", home)
    there = {f"{job.partials}/{key.removeprefix(prefix)}": stat.size for key, stat in store.list(prefix)}
    return {task.id for reference, task in tasks.items() if reference in there and task.accepts_size(there[reference])}


def _reading(round: Round, manifest: Manifest) -> Reading:  # noqa: A002
    """Return how the tasks should read, given the stores of the updates, of the output and of the round itself."""
    places = {term.source.rpartition("/")[0] if "://" in term.source else "" for term in manifest.terms}
    stores = [locate(f"{place}/-" if place else "-", round.store)[0] for place in places]
    return combined(store.reading for store in (*stores, round.store, locate(round.output, round.store)[0]))


def _another_made(upload: str, round: Round, manifest: Manifest, plan: Plan) -> ResultRecord | None:  # noqa: A002
    """Publish what another call has completed from the same upload; return None if the upload is in progress, or was abandoned."""
    target, key = locate(round.output, round.store)
    try:
        target.parts(key, upload)
    except MissingObject:
        return _made_of(upload, round, manifest, plan)
    return None


def _made_of(upload: str, round: Round, manifest: Manifest, plan: Plan) -> ResultRecord | None:  # noqa: A002
    """Publish what was completed from an upload that is gone; return None if it was abandoned."""
    target, key = locate(round.output, round.store)
    round.forget_partials(upload)
    with contextlib.suppress(MissingObject):
        return round.publish(manifest, target.head(key).version, plan.rule)
    return None


def _ignore(report: TaskReport) -> None:
    """Ignore a report."""
