"""A plan knows its memory, requests and bytes before anything runs; every byte count is made here."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter

from gradsharding.errors import PlanTooLarge
from gradsharding.kernel import sum_bytes
from gradsharding.layout import Run, join_runs
from gradsharding.reading import Reading
from gradsharding.sharding import cut
from gradsharding.value import Value

RESERVED = 64 << 20
"""Bytes a worker takes before its first task: the interpreter, numpy, pydantic. ``tests/test_memory.py`` measures it."""

TERM_SIZE = 2 << 10
"""Bytes that bound one term in a worker: its JSON, and the value made of it."""

FREE_TERMS = 8_192
"""Terms that the reserved memory has room for, 16 MiB of them; more are counted."""

HEADER_PART = 1
"""The result's first part is its header, written by the caller; the slices follow."""

MAX_PARTS = 10_000
"""Parts of one object, at most: S3's limit (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)."""

Bytes = Annotated[int, BeforeValidator(lambda v: int(TypeAdapter(ByteSize).validate_python(v)))]
"""A number of bytes; text such as "512MiB" or "2GB" is read too."""

NonFinitePolicy = Literal["raise", "propagate"]
"""What NaN or infinity in an update does: end the run and name it, or pass into the result."""


class Limits(Value):
    """What a function may use.

    >>> Limits(memory="512MiB").memory
    536870912
    """

    memory: Bytes = 512 << 20
    """Allowed memory of one function, in bytes, the interpreter included."""

    concurrency: int | None = None
    """Functions that may run at once; None where nothing bounds them."""


class Term(Value):
    """One weighted input: the data section of ``source`` begins at its byte ``base``."""

    client: str
    source: str
    version: str
    base: int
    weight: int


class Task(Value):
    """Average bytes ``start`` to ``stop`` of the vector over all terms, and write them as one part of the result."""

    id: str
    start: int
    stop: int
    runs: tuple[Run, ...]
    terms: tuple[Term, ...]
    part: int
    offset: int
    reading: Reading

    @property
    def weight(self) -> int:
        """Sum of the terms' weights."""
        return sum(term.weight for term in self.terms)

    @property
    def nbytes(self) -> int:
        """Bytes of the slice."""
        return self.stop - self.start

    @property
    def memory(self) -> int:
        """Projected peak memory in bytes: an upper bound. Beyond thousands of clients, the list of their terms counts."""
        return _fixed(len(self.terms)) + self.reading.memory(self.nbytes) + sum_bytes(self.runs, self.weight)

    @property
    def gets(self) -> int:
        """GET requests."""
        return len(self.terms) * self.reading.requests(self.nbytes)


class Job(Value):
    """What the tasks of one run share: the round's store, the object they write, and how they treat NaN."""

    store: str
    output: str
    upload: str
    nonfinite: NonFinitePolicy = "raise"


class Invocation(Value):
    """What the platform reported of the invocation that carried a task, maybe with others; memory in bytes."""

    request: str
    """The platform's id of it."""
    attempts: int
    """How often it was asked for."""
    tasks: int
    """How many tasks it carried."""
    billed_seconds: float
    memory_size: int
    max_memory: int
    init_seconds: float | None
    """Of a cold start; None for a warm one."""


class TaskReport(Value):
    """What one task did: requests, bytes, seconds, and the peak memory of its process in bytes."""

    task: str
    worker: str
    gets: int
    puts: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    seconds: float
    read_seconds: float
    write_seconds: float
    invocation: Invocation | None = None


class Stage(Value):
    """Tasks that may run together."""

    tasks: tuple[Task, ...]


class Plan(Value):
    """Stages of tasks, and the header that makes their slices one safetensors object."""

    topology: str
    clients: int
    header_bytes: int
    result_bytes: int
    stages: tuple[Stage, ...] = Field(min_length=1)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of all stages."""
        return tuple(task for stage in self.stages for task in stage.tasks)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole plan: equal plans have equal digests."""
        sha, known = hashlib.sha256(self.topology.encode()), dict[tuple[int, ...], bytes]()
        for task in self.tasks:
            sha.update(task.model_dump_json(exclude={"terms"}).encode())
            shared = tuple(map(id, task.terms))  # tasks share their terms: each set of them is written out once
            if shared not in known:
                known[shared] = hashlib.sha256("".join(t.model_dump_json() for t in task.terms).encode()).digest()
            sha.update(known[shared])
        return sha.hexdigest()

    @cached_property
    def memory(self) -> int:
        """Projected peak memory of the largest function, in bytes."""
        return max(task.memory for task in self.tasks)

    @property
    def gets(self) -> int:
        """GET requests of all tasks."""
        return sum(task.gets for task in self.tasks)

    @property
    def puts(self) -> int:
        """PUT-class requests: a part for each task, one for the header, and the upload's begin and end."""
        return len(self.tasks) + 3

    @property
    def parts(self) -> dict[int, int]:
        """Bytes of each part of the result, by number."""
        return {HEADER_PART: self.header_bytes} | {task.part: task.nbytes for task in self.stages[-1].tasks}

    @property
    def bytes_read(self) -> int:
        """Bytes that all tasks read."""
        return sum(len(task.terms) * task.nbytes for task in self.tasks)

    @property
    def bytes_written(self) -> int:
        """Bytes of the result, its header included."""
        return self.header_bytes + self.result_bytes

    def waves(self, limits: Limits) -> int:
        """How many times over the functions that may run at once must run, one stage after another."""
        return sum(-(-len(stage.tasks) // (limits.concurrency or len(stage.tasks))) for stage in self.stages)

    def check(self, limits: Limits) -> None:
        """Raise PlanTooLarge, with the numbers and the remedy, if a task cannot keep the limits."""
        if limits.concurrency == 0:
            raise PlanTooLarge("no function may run: their concurrency is 0; raise it for the function, or in the account")
        if len(self.tasks) + 1 > MAX_PARTS:
            raise PlanTooLarge(
                f"{len(self.tasks)} shards make {len(self.tasks) + 1} parts; an object has at most {MAX_PARTS}. "
                f"Use at most {MAX_PARTS - 1} shards, or allow more memory"
            )
        worst = max(self.tasks, key=lambda task: task.memory)
        if worst.memory > limits.memory:
            raise PlanTooLarge(
                f"task {worst.id} projects {mib(worst.memory)} of {mib(limits.memory)} allowed; {self._remedy(limits)}",
                projected=worst.memory,
                allowed=limits.memory,
            )

    def _remedy(self, limits: Limits) -> str:
        least = self._fixed + self._reading.memory(0) + sum_bytes((), 1)
        if limits.memory <= least:
            return f"a function needs {mib(least)} before its first byte: allow more memory"
        shards = self._shards(limits.memory)
        return f"{f'use at least {shards} shards, or ' if shards else ''}allow {mib(self.memory)}"

    @property
    def _fixed(self) -> int:
        """Bytes of a function that no number of slices changes."""
        return _fixed(max(len(task.terms) for task in self.tasks))

    @property
    def _reading(self) -> Reading:
        return self.stages[-1].tasks[0].reading

    def _shards(self, allowed: int) -> int | None:
        """Find a number of slices that fit; None where even the most do not. Bytes alone do not tell: sums may be wide."""
        last, weight = self.stages[-1].tasks, self.tasks[0].weight

        def memory(runs: Sequence[Run], nbytes: int) -> int:
            return self._fixed + self._reading.memory(nbytes) + sum_bytes(runs, weight)

        runs = join_runs(run for task in last for run in task.runs)
        most = min(sum(run.length for run in runs), MAX_PARTS - 1)
        count = -(-(sum_bytes(runs, weight) - sum_bytes((), weight)) // (allowed - memory((), 0)))
        while count <= most:
            if all(memory(slice_.runs, slice_.stop - slice_.start) <= allowed for slice_ in cut(runs, count)):
                return count
            count += -(-count // 8)
        return None


def _fixed(terms: int) -> int:
    """Bytes that a task of so many terms takes beside what it reads and sums."""
    return RESERVED + TERM_SIZE * max(0, terms - FREE_TERMS)


def mib(count: int) -> str:
    """Write a number of bytes for people: rounded up to a tenth of a MiB."""
    return f"{-(-count * 10 // (1 << 20)) / 10:.1f} MiB"
