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
"""What nobody is billed for, and no plan projects."""


@dataclass(frozen=True)
class Result:
    """A finished round: what was planned, what was seen, and where the result lies."""

    round: Round
    record: ResultRecord
    planned: Plan | None
    """Of the call, with its setting; None if the round was done before, so that the call has planned nothing."""
    reports: tuple[TaskReport, ...]
    """Of the tasks that this call ran; a resumed round has fewer than its plan."""
    asked: Spent
    """What the call itself has asked, beside its tasks, by kind of store."""
    seconds: float
    """Of the whole call, by the clock on the wall."""
    limits: Limits | None = None
    """Of its functions, as the executor had them; None if the round was done before."""
    taken: str | None = None
    """What the functions took of what others use, too, in words; None if it was nothing."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Read the result; BF16, which numpy lacks, comes as the equal float32. Raise ChangedObject if it is not what was published."""
        return load(self.record.source, self.round.store, version=self.record.version)

    def digest(self) -> str:
        """SHA-256 (hex) of the result's data section: equal results have equal digests, whatever their shards."""
        return self.record.digest or self._read_back[0]

    @cached_property
    def _read_back(self) -> tuple[str, Spent]:
        """Read the result for its digest, once; give what that has asked, too."""
        with counting() as ledger:
            digest = data_digest(self.record.source, self.round.store, version=self.record.version, layout=self.record.layout)
        return digest, ledger.spent

    @property
    def plan(self) -> Plan:
        """What was planned: of the whole call, and of reading the result for its digest, once that was asked for.

        Raise UserError if the round was done before the call.
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
        """What was asked beside the tasks, by kind of store: by the call, and for the digest, once that was asked for."""
        return together(self.asked, self._read_back[1]) if "_read_back" in self.__dict__ else self.asked

    @property
    def usage(self) -> dict[str, Usage]:
        """What the call and its tasks have asked, by kind of store."""
        return together(self.caller, *(report.usage for report in self.reports))

    @property
    def peak_memory(self) -> int | None:
        """Bytes: the largest peak of a task; None if none was measured, as ``unmeasured`` says."""
        return max((report.peak_memory for report in self.reports if report.peak_memory is not None), default=None)

    @property
    def unmeasured(self) -> str | None:
        """Why there is no peak."""
        if self.peak_memory is not None:
            return None
        return next((report.unmeasured for report in self.reports), "nothing was left to do")

    @property
    def held_by(self) -> list[str]:
        """What stopped, or would have stopped, a task that outgrows its memory; several, if tasks ran in unlike places."""
        return sorted({report.held_by for report in self.reports})

    def within(self, around: Spent, planned: Spent, seconds: float | None = None) -> "Result":
        """Give the same result with what was asked, and planned to be asked, around the call: that of a whole command, of ``seconds``."""
        plan = self.planned
        if plan and plan.setting:
            plan = plan.placed(intake=together(plan.setting.intake, planned))
        whole = replace(self, planned=plan, asked=together(self.asked, around), seconds=self.seconds if seconds is None else seconds)
        whole.__dict__.update({name: found for name, found in self.__dict__.items() if name == "_read_back"})
        return whole

    @property
    def invocations(self) -> tuple[Invocation, ...]:
        """What Lambda reported, once for each invocation, also a failed one; nothing if it told no figures, or the round ran elsewhere."""
        return invocations(self.reports)

    def _stages(self) -> list[dict[str, Any]]:
        seen = {report.task: report.model_dump() | total(report.usage).model_dump() for report in self.reports}
        return [{"tasks": [seen[task.id] for task in stage.tasks if task.id in seen]} for stage in self.plan.stages]

    def report(self) -> dict[str, Any]:
        """Projected beside observed, as JSON values; bytes and seconds. It tells a digest: for that, a float64 result is read once.

        Requests are counted as they are billed: ``gets`` are GET and HEAD, ``puts`` are PUT, COPY, POST and LIST, ``deletes`` are free.
        ``seconds`` are those of all tasks together; ``wall_seconds`` those of the call, or of the command around it. Of a round that was
        done before the call, ``made_by`` is "an earlier call"; then there is no ``topology``, no stage, and nothing ``projected``.
        ``concurrency`` is that of its functions, and ``taken`` says of how many, where others use them, too; else they are null.
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
    """A plan's figures, as JSON values."""
    return {
        **total(plan.usage).model_dump(exclude=FREE),
        "peak_memory": plan.memory,
        "stores": _by_kind(plan.usage, exclude=FREE),
        "caller": [{"step": step.name, "store": step.kind, **step.usage.model_dump(exclude=FREE)} for step in plan.steps],
    }


def observed_memory(result: Result) -> str:
    """Say what the tasks of a result took at most, or why that is not known, and what held them to it, if anything did."""
    if result.peak_memory is None:
        return f"not observed ({result.unmeasured})"
    held = "" if result.held_by == ["nothing"] else f", held by {' and '.join(result.held_by)}"
    return f"{mib(result.peak_memory)} observed{held}"


def _by_kind(usage: Spent, exclude: set[str] | None = None) -> dict[str, dict[str, int]]:
    return {kind: total({kind: one}).model_dump(exclude=exclude) for kind, one in sorted(usage.items())}
