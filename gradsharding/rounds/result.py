"""What a call of ``aggregate`` returns: the round's record, what was planned, and what was counted and measured."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy.typing as npt

from gradsharding.errors import UserError
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.task import Invocation, TaskReport, invocations
from gradsharding.rounds.records import ResultRecord
from gradsharding.rounds.round import Round
from gradsharding.sizes import mib
from gradsharding.stores.updates import data_digest, load
from gradsharding.usage import Spent, Usage, counting, together, total

FREE = {"deletes"}
"""Figures of ``Usage`` that cost nothing, so that no plan projects them."""


@dataclass(frozen=True, repr=False)
class Result:
    """A finished round: its record, what was planned, and what was counted and measured."""

    round: Round
    record: ResultRecord
    planned: Plan | None
    """The call's plan, with its setting; None if the round was already done, so that the call planned nothing."""
    reports: tuple[TaskReport, ...]
    """One for each task that this call ran; a resumed round has fewer than its plan has tasks."""
    asked: Spent
    """Requests and bytes of the call itself, beside its tasks, by kind of store."""
    seconds: float
    """Wall-clock seconds of the whole call."""
    limits: Limits | None = None
    """Limits of its functions, as the executor gave them; None if the round was already done."""
    taken: str | None = None
    """How much its functions took of a capacity that others share, as a sentence; None if they share none."""

    def __repr__(self) -> str:
        """Write the result in one line: its round, its rule, its clients and its bytes."""
        record = self.record
        return f"Result(round={self.round.id!r}, rule={str(record.rule)!r}, clients={len(record.clients)}, nbytes={record.layout.nbytes})"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Read the result; BF16, which numpy lacks, becomes float32 of the same values. Raise ChangedObject if it was replaced."""
        return load(self.record.source, self.round.store, version=self.record.version)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the result's data section: equal results have equal digests, whatever their slices."""
        return self.record.digest or self._read_back[0]

    @cached_property
    def _read_back(self) -> tuple[str, Spent]:
        """Read the result for its digest, once; return the digest, and the requests that it took."""
        with counting() as ledger:
            digest = data_digest(self.record.source, self.round.store, version=self.record.version, layout=self.record.layout)
        return digest, ledger.spent

    @property
    def plan(self) -> Plan:
        """The plan of the whole call; once ``digest`` has read the result, that reading is part of it.

        Raise UserError if the round was already done before the call.
        """
        if not self.planned:
            raise UserError(f"round {self.round.id} was done before this call, which has planned nothing; see its record instead")
        return self._planned_with_digest if "_read_back" in self.__dict__ else self.planned

    @cached_property
    def _planned_with_digest(self) -> Plan:
        assert self.planned
        return self.planned.placed(digest=True)

    @property
    def caller(self) -> Spent:
        """Requests and bytes beside the tasks, by kind of store: of the call, and of ``digest`` once it has read the result."""
        return together(self.asked, self._read_back[1]) if "_read_back" in self.__dict__ else self.asked

    @property
    def usage(self) -> dict[str, Usage]:
        """Requests and bytes of the call and its tasks, by kind of store."""
        return together(self.caller, *(report.usage for report in self.reports))

    @property
    def peak_memory(self) -> int | None:
        """The largest peak of a task, in bytes; None if none was measured: ``unmeasured`` says why."""
        return max((report.peak_memory for report in self.reports if report.peak_memory is not None), default=None)

    @property
    def unmeasured(self) -> str | None:
        """Why no peak was measured; None if one was."""
        if self.peak_memory is not None:
            return None
        return next((report.unmeasured for report in self.reports), "nothing was left to do")

    @property
    def held_by(self) -> list[str]:
        """What limits the memory of a task's process; several, if tasks ran in different places."""
        return sorted({report.held_by for report in self.reports})

    def within(self, around: Spent, planned: Spent, seconds: float | None = None) -> "Result":
        """Return the result of a whole command of ``seconds``, which requested ``around`` beside the call; ``planned`` projects that."""
        plan = self.planned
        if plan and plan.setting:
            plan = plan.placed(intake=together(plan.setting.intake, planned))
        whole = replace(self, planned=plan, asked=together(self.asked, around), seconds=self.seconds if seconds is None else seconds)
        whole.__dict__.update({name: found for name, found in self.__dict__.items() if name == "_read_back"})
        return whole

    @property
    def invocations(self) -> tuple[Invocation, ...]:
        """What Lambda reported of each invocation, failed ones included; empty if the round ran elsewhere, or Lambda reported nothing."""
        return invocations(self.reports)

    def _stages(self) -> list[dict[str, Any]]:
        seen = {report.task: report.model_dump() | total(report.usage).model_dump() for report in self.reports}
        return [{"tasks": [seen[task.id] for task in stage if task.id in seen]} for stage in self.plan.stages]

    def report(self) -> dict[str, Any]:
        """Return projected and observed figures as JSON values, in bytes and seconds.

        ``digest`` is that of the result, which is read once if its record has none. Requests are counted as they are billed: ``gets`` are
        GET and HEAD, ``puts`` are PUT, COPY, POST and LIST, ``deletes`` are free.
        ``seconds`` is the sum over all tasks; ``wall_seconds`` is the time of the call, or of the command around it. If the round was
        already done, ``made_by`` is "an earlier call", ``topology`` and ``projected`` are null, and there are no ``stages``.
        ``concurrency`` and ``taken`` are null unless something limits how many functions run at once.
        """
        digest = self.digest()
        plan = self.plan if self.planned else None
        return {
            "made_by": "this call" if plan else "an earlier call",
            "topology": plan.topology if plan else None,
            "rule": str(self.record.rule),
            "clients": len(self.record.clients),
            "bytes": self.record.layout.nbytes,
            "stages": self._stages() if plan else [],
            "concurrency": self.limits.concurrency if self.limits else None,
            "taken": self.taken,
            "projected": _projected(plan) if plan else None,
            "observed": {
                **total(self.usage).model_dump(),
                "peak_memory": self.peak_memory,
                "unmeasured": self.unmeasured,
                "held_by": self.held_by,
                "seconds": sum(report.seconds for report in self.reports),
                "wall_seconds": self.seconds,
                "stores": _by_kind(self.usage),
                "caller": _by_kind(self.caller),
                "lost_attempts": sum(report.lost for report in self.reports),
            },
            "digest": digest,
        }


def _projected(plan: Plan) -> dict[str, Any]:
    """Return a plan's figures as JSON values."""
    return {
        **total(plan.usage).model_dump(exclude=FREE),
        "peak_memory": plan.memory,
        "stores": _by_kind(plan.usage, exclude=FREE),
        "caller": [{"step": step.name, "store": step.kind, **step.usage.model_dump(exclude=FREE)} for step in plan.steps],
    }


def observed_memory(result: Result) -> str:
    """Return a phrase on the peak memory of a result's tasks, and what limited it; or on why it is unknown."""
    if result.peak_memory is None:
        return f"not observed ({result.unmeasured})"
    held = "" if result.held_by == ["nothing"] else f"; limited by {' and '.join(result.held_by)}"
    return f"{mib(result.peak_memory)} observed{held}"


def _by_kind(usage: Spent, exclude: set[str] | None = None) -> dict[str, dict[str, int]]:
    return {kind: total({kind: spent}).model_dump(exclude=exclude) for kind, spent in sorted(usage.items())}
