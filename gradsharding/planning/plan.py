"""A plan knows its memory, requests and bytes before anything runs: it adds up the figures of its tasks.

A plan is a product: slices of the vector times a tree over the clients. It computes its figures from a few kinds of tasks, whatever their
number, and makes the tasks themselves when they run.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, model_validator

from gradsharding.arithmetic.rules import MEAN, AnyRule
from gradsharding.errors import PlanTooLarge
from gradsharding.format.dtypes import Run, join_runs
from gradsharding.planning.platform import FIGURES
from gradsharding.planning.projection import HEADER_PART, Setting, Step, steps
from gradsharding.planning.slices import Slice, cut
from gradsharding.planning.task import Part, Task, Term
from gradsharding.sizes import mib, positive, size
from gradsharding.stores.reading import Reading
from gradsharding.usage import SHARED, Usage, together, total
from gradsharding.value import Value

MAX_PARTS = FIGURES["parts"].value
"""Largest number of parts of an object: S3's limit, which every store observes."""


class Limits(Value):
    """The limits of a function. Memory may be text, such as "512MiB" or "2GB"; raise UserError if the text is not a size.

    >>> Limits(memory="512MiB").memory
    536870912
    """

    memory: int = 512 << 20
    """Allowed memory of one function, in bytes, the interpreter included."""

    concurrency: int | None = None
    """Functions that may run at once; None if unbounded."""

    def __init__(self, *, memory: int | str = 512 << 20, concurrency: int | None = None) -> None:
        BaseModel.__init__(self, memory=size(memory) if isinstance(memory, str) else memory, concurrency=concurrency)
        positive(self.memory)


class Kind(NamedTuple):
    """Tasks of a stage that differ in their places only."""

    times: int
    """Number of these tasks."""
    task: Task
    """One of them."""


class Plan(Value):
    """Slices of the vector times a tree over the terms, and the header that makes the slices one safetensors object.

    A function of level 0 reads ``fan_ins[0]`` terms of one slice. A function of the next level reads the partial sums of ``fan_ins[1]``
    functions of level 0, and so on. The last level has one function for each slice, which writes it. A single level has no partial sums.
    """

    topology: str
    header_bytes: int
    slices: tuple[Slice, ...] = Field(min_length=1)
    terms: tuple[Term, ...] = Field(min_length=1)
    fan_ins: tuple[int, ...] = Field(min_length=1)
    reading: Reading
    rule: AnyRule = MEAN
    shared_memory: bool = False
    """Whether partial sums pass through the memory of one machine, on which all functions must run."""
    setting: Setting | None = None
    """Where the plan runs. With a setting, requests and bytes are those of the whole round; without one, those of the tasks alone, in a
    store that makes one request for each operation."""

    @model_validator(mode="after")
    def _ends_in_one(self) -> "Plan":
        if min(self.fan_ins) < 1 or self.widths[-1] != 1:
            raise ValueError(f"a tree with fan-ins {self.fan_ins} does not merge {len(self.terms)} terms into one")
        return self

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Functions of each level, for one slice."""
        widths, width = [], len(self.terms)
        for fan_in in self.fan_ins:
            width = -(-width // fan_in)
            widths.append(width)
        return tuple(widths)

    @cached_property
    def weight(self) -> int:
        """The sum of all weights of the round."""
        return sum(term.weight for term in self.terms)

    @cached_property
    def stages(self) -> tuple[tuple[Task, ...], ...]:
        """The tasks of each level, slice by slice. They may run together: a task reads partial sums of the level before its own only."""
        return tuple(
            tuple(self._task(level, j, g) for j in range(len(self.slices)) for g in range(width)) for level, width in enumerate(self.widths)
        )

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of all stages."""
        return tuple(task for stage in self.stages for task in stage)

    @cached_property
    def kinds(self) -> tuple[tuple[Kind, ...], ...]:
        """The kinds of tasks of each level: slices of one shape, times groups of one size."""
        shapes = Counter((s.stop - s.start, s.runs) for s in self.slices)
        firsts = {(s.stop - s.start, s.runs): j for j, s in reversed([*enumerate(self.slices)])}
        return tuple(
            tuple(
                Kind(count * groups, self._task(level, firsts[shape], g))
                for groups, g in self._sizes(level)
                for shape, count in shapes.items()
            )
            for level in range(len(self.fan_ins))
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides the bytes of its tasks: the setting and the reading do not."""
        return hashlib.sha256(self.model_dump_json(exclude={"setting", "reading"}).encode()).hexdigest()

    @property
    def clients(self) -> int:
        """Number of updates."""
        return len(self.terms)

    @property
    def result_bytes(self) -> int:
        """Bytes of the result's data section."""
        return self.slices[-1].stop

    @property
    def functions(self) -> int:
        """Number of tasks."""
        return len(self.slices) * sum(self.widths)

    @cached_property
    def memory(self) -> int:
        """Projected peak memory of the largest function, in bytes."""
        return self.largest.memory

    @cached_property
    def largest(self) -> Task:
        """A task with the largest projected memory."""
        return max((kind.task for kinds in self.kinds for kind in kinds), key=lambda task: task.memory)

    @cached_property
    def tasks_usage(self) -> dict[str, Usage]:
        """Upper bound of the requests and bytes of all tasks, by kind of store."""
        where = self.setting or Setting()
        kinds = where.sources or Counter(
            term.source.partition("://")[0] if "://" in term.source else where.home.kind for term in self.terms
        )
        updates = Usage(
            gets=sum(self.reading.requests(s.stop - s.start) for s in self.slices), bytes_read=sum(s.stop - s.start for s in self.slices)
        )
        between, kept = Usage(), SHARED if self.shared_memory else where.home.kind
        for level, of_level in enumerate(self.kinds):
            for times, task in of_level:
                if level:
                    between += Usage(gets=task.gets, bytes_read=task.bytes_read) * times
                if task.part is None:
                    between += where.home.put(task.bytes_written) * times
        written = where.output.put_parts((self.header_bytes + s.start, s.stop - s.start) for s in self.slices)
        return together({kind: updates * count for kind, count in kinds.items()}, {kept: between}, {where.output.kind: written})

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the caller beside the tasks; none without a setting."""
        through_store = 0 if self.shared_memory else self.functions - len(self.slices)
        return tuple(steps(self.setting, self.parts, through_store)) if self.setting else ()

    @cached_property
    def usage(self) -> dict[str, Usage]:
        """Upper bound of requests and bytes, by kind of store: of the whole round or, without a setting, of its tasks."""
        return together(self.tasks_usage, *({step.kind: step.usage} for step in self.steps))

    @cached_property
    def gets(self) -> int:
        """GET and HEAD requests, at most."""
        return total(self.usage).gets

    @cached_property
    def puts(self) -> int:
        """PUT, COPY, POST and LIST requests, at most."""
        return total(self.usage).puts

    @cached_property
    def bytes_read(self) -> int:
        """Bytes read, at most."""
        return total(self.usage).bytes_read

    @cached_property
    def bytes_written(self) -> int:
        """Bytes written, at most."""
        return total(self.usage).bytes_written

    @property
    def partial_bytes(self) -> int:
        """Bytes of all partial sums; all of them are kept until the result is published."""
        return sum(kind.times * kind.task.bytes_written for kinds in self.kinds[:-1] for kind in kinds)

    @property
    def parts(self) -> dict[int, int]:
        """Bytes of each part of the result, by number."""
        return {HEADER_PART: self.header_bytes} | {_number(j): s.stop - s.start for j, s in enumerate(self.slices)}

    def missing(self, parts: Mapping[int, int], partials: AbstractSet[str]) -> list[Task]:
        """Return the tasks that are still to run, stage by stage, if ``parts`` of the result and the partial sums of ``partials`` exist."""
        missing: list[Task] = []
        needed: set[str] = set()
        for stage in reversed(self.stages):
            absent = [t for t in stage if (parts.get(t.part.number) != t.nbytes if t.part else t.id in needed)]
            needed = {predecessor for task in absent for predecessor in task.predecessors} - partials
            missing = absent + missing
        return missing

    def waves(self, limits: Limits) -> int:
        """Number of batches in which the tasks run, stage after stage, if the limits bound the functions at once."""
        return sum(-(-width * len(self.slices) // (limits.concurrency or width * len(self.slices))) for width in self.widths)

    def replace(self, **changes: Any) -> "Plan":
        """Return a copy with some fields changed and cached figures dropped; ``model_copy`` would keep them."""
        return Plan.model_construct(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def placed(self, **setting: Any) -> "Plan":
        """Return the same plan in a setting with some fields changed; without a setting, from the default."""
        return self.replace(setting=(self.setting or Setting()).model_copy(update=setting))

    def recut(self, count: int) -> "Plan":
        """Return the same plan with ``count`` slices; raise PlanTooLarge if there are fewer elements."""
        return self.replace(slices=cut(self._runs, count))

    def fitting(self, allowed: int, least: int = 1) -> "Plan | None":
        """Return the plan in ``least`` slices, or in as many more as fit ``allowed`` bytes each; None if the largest number does not fit.

        The number is searched, since wide sums take more memory than the slice has bytes.
        """
        room, most = allowed - self._empty, min(sum(run.length for run in self._runs), MAX_PARTS - 1)
        if room <= 0:
            return None
        count = max(1, min(most, max(least, -(-(self.memory - self._empty) * len(self.slices) // room))))
        while (plan := self.recut(count)).memory > allowed:
            if count >= most:
                return None
            count = min(most, count + -(-count // 8))
        return plan

    def check(self, limits: Limits) -> None:
        """Raise PlanTooLarge, with the numbers and the remedy, if the plan exceeds the limits."""
        if limits.concurrency == 0:
            raise PlanTooLarge("no function may run: the concurrency is 0; raise it for the function, or in the account")
        if len(self.slices) + 1 > MAX_PARTS:
            raise PlanTooLarge(
                f"{len(self.slices)} shards make {len(self.slices) + 1} parts; an object has at most {MAX_PARTS}. "
                f"Use at most {MAX_PARTS - 1} shards, or allow more memory"
            )
        if self.memory > limits.memory:
            raise PlanTooLarge(
                f"task {self.largest.id} projects {mib(self.memory)} of {mib(limits.memory)} allowed; {self._remedy(limits)}",
                projected=self.memory,
                allowed=limits.memory,
            )

    def _remedy(self, limits: Limits) -> str:
        if limits.memory <= self._empty:
            return f"a function needs {mib(self._empty)} before its first byte: allow more memory"
        fit = self.fitting(limits.memory)
        return f"{f'use at least {len(fit.slices)} shards, or ' if fit else ''}allow {mib(self.memory)}"

    @property
    def _empty(self) -> int:
        """Memory of the largest function that does not depend on the number of slices, in bytes."""
        return self.largest.model_copy(update={"stop": self.largest.start, "runs": ()}).memory

    @cached_property
    def _runs(self) -> tuple[Run, ...]:
        return join_runs(run for s in self.slices for run in s.runs)

    def _task(self, level: int, j: int, g: int) -> Task:
        """Make the task of slice ``j`` and group ``g`` of a level, without validation, as a plan may make millions."""
        slice_, last = self.slices[j], level == len(self.fan_ins) - 1
        before, fan_in = self.widths[level - 1] if level else len(self.terms), self.fan_ins[level]
        return Task.model_construct(
            id=f"{self._ids(level, j)}/{g}" if len(self.fan_ins) > 1 else f"{self.topology}/{j}",
            start=slice_.start,
            stop=slice_.stop,
            runs=slice_.runs,
            first=g * fan_in,
            last=min((g + 1) * fan_in, before),
            reads=self._ids(level - 1, j) if level else None,
            clients=len(self.terms),
            weight=self.weight,
            part=Part(_number(j), self.header_bytes + slice_.start) if last else None,
            reading=self.reading,
            rule=self.rule,
            shared=self.shared_memory,
        )

    def _ids(self, level: int, j: int) -> str:
        """Return the prefix of the ids of a level's tasks for slice ``j``; the group's number follows."""
        return f"{self.topology}/{level}/{j}" if len(self.slices) > 1 else f"{self.topology}/{level}"

    def _sizes(self, level: int) -> Iterator[tuple[int, int]]:
        """Yield the number of groups of each size in a level, and one of these groups. Only the last group may be smaller."""
        last = self.widths[level] - 1
        if last:
            yield last, 0
        yield 1, last


def _number(j: int) -> int:
    """Number of the part that holds slice ``j``."""
    return HEADER_PART + 1 + j
