"""A task knows its memory, its reads and its bytes before it runs; what was seen of it is counted, and comes back in a report.

A function is told a Job and a Task, and nothing else; what comes back is a TaskReport. All three pass between machines as JSON.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from gradsharding.arithmetic import fold
from gradsharding.arithmetic.rules import MEAN, AnyRule, Cohort
from gradsharding.format.dtypes import Run
from gradsharding.planning.platform import Architecture
from gradsharding.stores.reading import Reading
from gradsharding.usage import Usage, total
from gradsharding.value import Value

RESERVED = 64 << 20
"""Bytes a worker takes before its first task: the interpreter, numpy, pydantic. ``tests/test_memory.py`` measures it."""

TERM_SIZE = 2 << 10
"""Bytes that bound one term of a job in a worker: its JSON, and the value made of it."""

FREE_TERMS = 8_192
"""Terms that the reserved memory has room for, 16 MiB of them; more are counted."""

PARTIAL = 0
"""The part of a task that writes none, but partial sums."""

NonFinitePolicy = Literal["raise", "propagate"]
"""What NaN or infinity in an update does: end the run and name it, or pass into the result."""


class Term(Value):
    """One weighted input: the data section of ``source`` begins at its byte ``base``."""

    client: str
    source: str
    version: str
    """Of the object, as sealed."""
    base: int
    weight: int


class Task(Value):
    """Sum bytes ``start`` to ``stop`` of the vector over inputs ``first`` to ``last``: terms of the job, or partial sums of other tasks.

    It names its inputs by a range, and does not carry them, so that its size depends on neither the number of clients nor that of
    slices. A task with a ``part`` divides, and writes it as one part of the result; one without writes its sums.
    """

    id: str
    start: int
    stop: int
    runs: tuple[Run, ...]
    first: int
    last: int
    reads: str = ""
    """Tasks ``READS/first`` to ``READS/last`` wrote the partial sums that it reads; empty where it reads the job's terms."""
    clients: int
    """Terms of the whole round; a worker may hold the list of them all."""
    weight: int
    """The sum of all weights of the whole round."""
    part: int = PARTIAL
    offset: int = 0
    reading: Reading
    rule: AnyRule = MEAN
    shared: bool = False
    """Whether partial sums pass through the memory of the machine, and not through the store."""

    @property
    def inputs(self) -> int:
        """Number of terms or partial sums."""
        return self.last - self.first

    @property
    def cohort(self) -> Cohort:
        """The clients of the whole round."""
        return Cohort(self.clients, self.weight)

    @property
    def predecessors(self) -> tuple[str, ...]:
        """Ids of the tasks whose partial sums it reads."""
        return tuple(f"{self.reads}/{i}" for i in range(self.first, self.last)) if self.reads else ()

    @property
    def nbytes(self) -> int:
        """Bytes of the slice."""
        return self.stop - self.start

    @property
    def partial_nbytes(self) -> int:
        """Bytes of its partial sums; at most, where that depends on their values."""
        return sum(self.rule.size(run, self.cohort).serialized for run in self.runs)

    @property
    def varies(self) -> bool:
        """Whether the bytes of partial sums, its own and its inputs', depend on their values."""
        return any(self.rule.size(run, self.cohort).varies for run in self.runs)

    def accepts_size(self, nbytes: int) -> bool:
        """Tell whether this task could have written partial sums of ``nbytes`` bytes."""
        return 0 < nbytes <= self.partial_nbytes if self.varies else nbytes == self.partial_nbytes

    @property
    def input_nbytes(self) -> int:
        """Bytes of each input."""
        return self.partial_nbytes if self.reads else self.nbytes

    @property
    def memory(self) -> int:
        """Projected peak memory in bytes: an upper bound. Beyond thousands of clients, their list counts."""
        listed = TERM_SIZE * max(0, self.clients - FREE_TERMS)
        return RESERVED + listed + self.reading.memory(self.input_nbytes) + fold.memory(self.runs, self.cohort, self.rule)

    @property
    def heads_per_input(self) -> int:
        """HEAD requests for each input: one where the size of partial sums depends on their values."""
        return int(bool(self.reads) and self.varies)

    @property
    def gets(self) -> int:
        """GET and HEAD requests to the store; at most, where partial sums vary."""
        return 0 if self.reads and self.shared else self.inputs * (self.heads_per_input + self.reading.requests(self.input_nbytes))

    @property
    def written_to_memory(self) -> bool:
        """Whether what it writes passes through the memory of the machine, and not through the store."""
        return self.part == PARTIAL and self.shared

    @property
    def bytes_read(self) -> int:
        """Bytes that it reads; at most, where partial sums vary."""
        return self.inputs * self.input_nbytes

    @property
    def bytes_written(self) -> int:
        """Bytes that it writes; at most, where partial sums vary."""
        return self.partial_nbytes if self.part == PARTIAL else self.nbytes


class Job(Value):
    """What the tasks of one run share: the round's store, the updates they read, the object they write, and how they treat NaN."""

    store: str
    output: str
    upload: str
    terms: tuple[Term, ...] = ()
    """The round's terms, or those of them that some tasks read."""
    first: int = 0
    """Place, among the round's terms, of the first one here."""
    partials: str = ""
    """Reference below which partial sums lie: a key of the store, or a URL."""
    shared_bytes: int = 0
    """Bytes of all partial sums, if they lie in the memory of the machine."""
    nonfinite: NonFinitePolicy = "raise"
    round: str = ""
    """Id of the round, for logs."""

    def read_by(self, task: Task) -> tuple[Term, ...]:
        """Give the terms that a task reads."""
        return () if task.reads else self.terms[task.first - self.first : task.last - self.first]

    def narrowed(self, tasks: Sequence[Task]) -> "Job":
        """Give the same job with no more terms than it takes to run ``tasks``."""
        spans = [(task.first, task.last) for task in tasks if not task.reads]
        first, last = min((first for first, _ in spans), default=self.first), max((last for _, last in spans), default=self.first)
        return self.model_copy(update={"terms": self.terms[first - self.first : last - self.first], "first": first})

    def partial(self, task: str) -> str:
        """Reference of the partial sums that a task writes."""
        return f"{self.partials}/{task.replace('/', '.')}"


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
    architecture: Architecture | None = None
    """Of the function, as far as the account tells."""
    region: str | None = None


class TaskReport(Value):
    """What was seen of one task: what its stores counted, its seconds, and the peak of its memory in bytes."""

    task: str
    worker: str
    usage: dict[str, Usage]
    """What it asked, by kind of store, retries and answered attempts that failed included."""
    peak_memory: int | None
    """Of a process that is the task's own while it runs; None where it is not, as ``unmeasured`` says."""
    unmeasured: str | None = None
    """Why there is no peak."""
    held_by: str = "nothing"
    """What stops its process if it outgrows the allowed memory: ``cgroup.Hold``, or ``AWS Lambda``."""
    seconds: float
    read_seconds: float
    write_seconds: float
    cpu_seconds: float | None
    """Of its process; None where other tasks ran in it at the same time."""
    lost: int = 0
    """Attempts before this one that gave no answer: what they asked is not in ``usage``."""
    invocation: Invocation | None = None
    vain: tuple[Invocation, ...] = ()
    """Invocations before that one, which did not do the task, and are billed, too."""

    @property
    def gets(self) -> int:
        """GET and HEAD requests."""
        return total(self.usage).gets

    @property
    def puts(self) -> int:
        """PUT, COPY, POST and LIST requests."""
        return total(self.usage).puts

    @property
    def bytes_read(self) -> int:
        """Bytes that stores brought."""
        return total(self.usage).bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes that stores were sent."""
        return total(self.usage).bytes_written


def invocations(reports: Iterable[TaskReport]) -> tuple[Invocation, ...]:
    """Give all that the platform reported of invocations, those in vain included, and each once, though it may have carried many tasks."""
    told = (one for report in reports for one in (*report.vain, report.invocation) if one)
    return tuple({one.request: one for one in told}.values())
