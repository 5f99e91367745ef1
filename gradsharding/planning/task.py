"""A task knows its memory, requests and bytes before it runs; the report that comes back has the counted ones.

A function receives a Job and a Task, and nothing else; it returns a TaskReport. All three pass between machines as JSON.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from gradsharding.arithmetic import fold
from gradsharding.arithmetic.rules import MEAN, AnyRule, Cohort
from gradsharding.format.dtypes import Run
from gradsharding.planning.platform import Architecture
from gradsharding.stores.reading import Reading
from gradsharding.usage import Usage, total
from gradsharding.value import Value

RESERVED = 64 << 20
"""Memory of a worker before its first task, in bytes: the interpreter, numpy, pydantic. ``tests/test_memory.py`` measures it."""

TERM_SIZE = 2 << 10
"""Upper bound of the memory of one term in a worker, in bytes: its JSON and its value."""

FREE_TERMS = 8_192
"""Terms that fit into the reserved memory, 16 MiB in all; the memory of further terms is added."""

NonFinitePolicy = Literal["raise", "propagate"]
"""What happens to NaN or infinity in an update: it ends the run with an error, or passes into the result."""


class Term(Value):
    """One weighted input: the data section of ``source`` begins at its byte ``base``."""

    client: str
    source: str
    version: str
    """Version of the object when the round was sealed."""
    base: int
    weight: int


class Part(NamedTuple):
    """A part of the result."""

    number: int
    offset: int
    """First byte of the part in the result's object."""


class Task(Value):
    """Sum bytes ``start`` to ``stop`` of the vector over inputs ``first`` to ``last``: terms of the job, or partial sums of other tasks.

    A task names its inputs by a range and does not carry them, so that its size depends neither on the number of clients nor on the number
    of slices.
    """

    id: str
    start: int
    stop: int
    runs: tuple[Run, ...]
    first: int
    last: int
    reads: str | None = None
    """The task reads the partial sums of tasks ``READS/first`` to ``READS/last``; None if it reads terms of the job."""
    clients: int
    """Terms of the whole round; a worker may hold the list of them all."""
    weight: int
    """The sum of all weights of the whole round."""
    part: Part | None = None
    """The part of the result that the task finalizes and writes; None if it writes its partial sums."""
    reading: Reading
    rule: AnyRule = MEAN
    shared: bool = False
    """Whether partial sums pass through the memory of the machine and not through the store."""

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
        """GET and HEAD requests to the store; an upper bound if partial sums vary in size."""
        return 0 if self.reads and self.shared else self.inputs * (self.heads_per_input + self.reading.requests(self.input_nbytes))

    @property
    def written_to_memory(self) -> bool:
        """Whether its output passes through the memory of the machine and not through the store."""
        return self.part is None and self.shared

    @property
    def bytes_read(self) -> int:
        """Bytes that it reads; an upper bound if partial sums vary in size."""
        return self.inputs * self.input_nbytes

    @property
    def bytes_written(self) -> int:
        """Bytes that it writes; an upper bound if partial sums vary in size."""
        return self.partial_nbytes if self.part is None else self.nbytes


class Job(Value):
    """What all tasks of a run share: the round's store, the updates, the result's object, and the treatment of NaN."""

    store: str
    output: str
    upload: str
    terms: tuple[Term, ...] = ()
    """The round's terms, or a range of them."""
    first: int = 0
    """Index of the first of these terms among all terms of the round."""
    partials: str = ""
    """Reference below which partial sums lie: a key of the store, or a URL."""
    shared_bytes: int = 0
    """Bytes of all partial sums, if they lie in the memory of the machine."""
    nonfinite: NonFinitePolicy = "raise"
    round: str = ""
    """Id of the round, for logs."""

    def read_by(self, task: Task) -> tuple[Term, ...]:
        """Return the terms that a task reads."""
        return () if task.reads else self.terms[task.first - self.first : task.last - self.first]

    def narrowed(self, tasks: Sequence[Task]) -> "Job":
        """Return the same job with only the terms that ``tasks`` read."""
        spans = [(task.first, task.last) for task in tasks if not task.reads]
        first, last = min((first for first, _ in spans), default=self.first), max((last for _, last in spans), default=self.first)
        return self.model_copy(update={"terms": self.terms[first - self.first : last - self.first], "first": first})

    def partial(self, task: str) -> str:
        """Reference of the partial sums that a task writes."""
        return f"{self.partials}/{task.replace('/', '.')}"


class Invocation(Value):
    """The platform's report on the invocation that ran a task, perhaps with other tasks; memory in bytes."""

    request: str
    """Id that the platform gave it."""
    attempts: int
    """Number of attempts to invoke it."""
    tasks: int
    """Number of tasks that it ran."""
    billed_seconds: float
    memory_size: int
    max_memory: int
    init_seconds: float | None
    """Duration of the cold start; None for a warm start."""
    architecture: Architecture | None = None
    """Architecture of the function; None if unknown."""
    region: str | None = None


class TaskReport(Value):
    """Measurements of one task: requests and bytes by kind of store, seconds, and peak memory in bytes."""

    task: str
    worker: str
    usage: dict[str, Usage]
    """Requests and bytes by kind of store, with retries and failed attempts that were answered."""
    peak_memory: int | None
    """Peak memory of the task's process; None if other work shares the process."""
    unmeasured: str | None = None
    """Reason for a missing peak."""
    held_by: str = "nothing"
    """Mechanism that stops the process if it exceeds the allowed memory: a ``cgroup.Hold``, or ``AWS Lambda``."""
    seconds: float
    read_seconds: float
    write_seconds: float
    cpu_seconds: float | None
    """CPU time of the process; None if other tasks ran in it at the same time."""
    lost: int = 0
    """Earlier attempts without an answer; their requests are not in ``usage``."""
    invocation: Invocation | None = None
    vain: tuple[Invocation, ...] = ()
    """Earlier invocations that did not finish the task; they are billed too."""

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
        """Bytes received from stores."""
        return total(self.usage).bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes sent to stores."""
        return total(self.usage).bytes_written


def invocations(reports: Iterable[TaskReport]) -> tuple[Invocation, ...]:
    """Return each reported invocation once, whatever number of tasks it ran; failed ones are included."""
    reported = (invocation for report in reports for invocation in (*report.vain, report.invocation) if invocation)
    return tuple({invocation.request: invocation for invocation in reported}.values())
