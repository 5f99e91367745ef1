"""The time that a plan takes on Lambda, from a few named parameters: each was measured, or is marked as assumed.

``benchmarks/calibration.py`` compares them with measured rounds, point by point, and prints the residuals.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

from gradsharding.arithmetic.rules import Effort
from gradsharding.planning.plan import Kind, Plan
from gradsharding.planning.platform import ACCOUNT_CONCURRENCY, RUNTIME, VCPU
from gradsharding.planning.task import Task
from gradsharding.running.pace import GETS, Share, share
from gradsharding.stores.reading import Reading
from gradsharding.value import Value


class Speeds(Value):
    """The parameters: rates in bytes per second, times in seconds, spreads as standard deviations of the logarithm."""

    connection_rate: float = 60 * 2**20
    """Of one GET, after its first byte."""
    function_rate: float = 75e6
    """Of all connections of a function: 600 Mbit/s, as others have measured at any memory (sjakthol/aws-network-benchmark on GitHub)."""
    latency: float = 0.03
    """Until the first byte of a request's answer."""
    write_rate: float = 79e6
    """Of one PUT."""
    shared_rate: float = 1.5e9
    """Of shared memory, written or read. Measured on a small machine (``benchmarks/results/topologies.json``)."""
    fold_rate: float = 4.3e9
    """Of adding an input to float64 sums, on one vCPU: the unit of a rule's effort."""
    client_rate: float = 250e6
    """Of receiving bytes through boto3, on one vCPU. Measured on a small machine (``benchmarks/results/s3_worker.json``)."""
    spread: float = 0.19
    """Of functions that do the same work: it makes the slowest of many slow."""
    invoke: float = 0.06
    """From the request for an invocation until it begins."""
    cold_start: float = 2.5
    """Of a function's first invocation: part of the 95th percentile, not of the median."""
    round_spread: float = 0.28
    """Of rounds that do the same work, on different days."""


class Seconds(NamedTuple):
    """The seconds of a round, and the billed seconds of its functions."""

    p50: float
    p95: float
    billed: float
    """Expected, of all functions together, when warm."""
    longest: float
    """Of the slowest function, which must stay within Lambda's time limit."""


class Rates(NamedTuple):
    """Requests per second to one S3 prefix, as functions would make them that do not pace themselves.

    The limit of PUTs is lower by a factor of 1.6, but the limit of GETs binds first: a function makes at least one GET for each of its
    inputs, and then one PUT, so that it makes two GETs or more for each PUT, unless its slice has a single input.
    """

    gets: float
    puts: float

    @property
    def much(self) -> bool:
        """Whether it exceeds a round's part of the limit, so that its functions must be paced."""
        return self.gets > GETS

    @property
    def busy(self) -> bool:
        """Whether it exceeds half of that."""
        return self.gets > GETS / 2


def forecast_seconds(plan: Plan, memory: int, concurrency: int | None = None, speeds: Speeds | None = None) -> Seconds:
    """Forecast a round by functions of ``memory`` bytes, ``concurrency`` of them at once, each of which keeps to its share."""
    known = speeds or Speeds()
    assembly = _assembly_seconds(plan, known)
    shares = [share(count) for count in at_once(plan, concurrency)]
    stages = [_stage(kinds, memory, concurrency, known, kept) for kinds, kept in zip(plan.kinds, shares, strict=True)]
    p50 = assembly + sum(wall for wall, _ in stages)
    billed = sum(k.times * task_seconds(k.task, memory, known, kept) for kinds, kept in zip(plan.kinds, shares, strict=True) for k in kinds)
    p95 = unlucky(p50, known) + known.cold_start * len(stages)
    return Seconds(p50, p95, billed, max(longest for _, longest in stages))


def stage_seconds(
    each: Sequence[tuple[int, float]], concurrency: int | None, speeds: Speeds, kept: Share | None = None
) -> tuple[float, float]:
    """Seconds until a stage's last function has ended, and of its slowest one.

    ``each`` gives the number of functions of each kind with their seconds in the mean; ``concurrency`` of them run at once.
    """
    functions = sum(count for count, _ in each)
    most = min(functions, concurrency or functions)
    mean = sum(count * seconds for count, seconds in each) / functions
    mean = max(mean, 1 / kept.puts) if kept else mean  # one after another, each writes an object
    waves = -(-functions // most)
    # a function of the next wave begins as soon as one of this wave has ended: only those of the last one are waited for
    last = max(seconds for _, seconds in each) * slowest(functions - (waves - 1) * most, speeds.spread)
    return waves * speeds.invoke + (waves - 1) * mean + last, last


def at_once(plan: Plan, concurrency: int | None = None) -> list[int]:
    """Return, for each level of a plan, how many functions share a prefix: those that read updates share one, all others another."""
    functions = [width * len(plan.slices) for width in plan.widths]
    return [min(count, concurrency or count) for count in (functions[0], *[sum(functions[1:])] * len(functions[1:]))]


def rates(plan: Plan, memory: int, concurrency: int | None = None, speeds: Speeds | None = None) -> Rates:
    """Forecast the peak request rate to one prefix of functions that are not paced, ``concurrency`` of them at once."""
    levels = zip(at_once(plan, concurrency), plan.kinds, strict=True)
    found = [(count, _asked(kind.task, memory, speeds)) for count, kinds in levels for kind in kinds]
    return Rates(max(count * rate.gets for count, rate in found), max(count * rate.puts for count, rate in found))


def borne(tasks: Iterable[Task], memory: int, speeds: Speeds | None = None) -> int:
    """Return how many functions of ``memory`` bytes can run ``tasks`` at once without being paced: at least one."""
    gets = max(_asked(task, memory, speeds).gets for task in tasks)
    return max(1, int(GETS / gets)) if gets else ACCOUNT_CONCURRENCY


def suited(plan: Plan, memory: int, concurrency: int | None, speeds: Speeds | None = None) -> Reading:
    """Return the reading by which ``concurrency`` functions of ``memory`` bytes finish the plan soonest: its own, or one of fewer requests.

    Fewer requests are faster if the functions would exceed the rate of a prefix, and have the memory for larger ones. Without a
    ``concurrency``, the number of functions is unknown and none is paced: the plan's own reading stays.
    """
    if not concurrency or not plan.reading.chunk or not rates(plan, memory, concurrency, speeds).much:
        return plan.reading
    known, shares = speeds or Speeds(), [share(count) for count in at_once(plan, concurrency)]
    found = []
    for reading in (plan.reading, *plan.reading.rarer()):
        levels = [tuple(Kind(kind.times, kind.task.model_copy(update={"reading": reading})) for kind in kinds) for kinds in plan.kinds]
        most = max(kind.task.memory for kinds in levels for kind in kinds)
        if reading is plan.reading or most + RUNTIME <= memory:
            walls = (_stage(kinds, memory, concurrency, known, kept)[0] for kinds, kept in zip(levels, shares, strict=True))
            found.append((sum(walls), most, reading))
    return min(found, key=lambda option: option[:2])[2]


def task_seconds(task: Task, memory: int, speeds: Speeds, kept: Share | None = None) -> float:
    """Forecast the mean seconds of a task in a function of ``memory`` bytes, which keeps to the share ``kept``."""
    to_store = speeds.latency + task.bytes_written / speeds.write_rate
    written = task.bytes_written / speeds.shared_rate if task.written_to_memory else to_store
    cpu = min(1.0, memory / VCPU)
    ended = task.nbytes * task.rule.effort(task.clients).finalize / (cpu * speeds.fold_rate)
    paced = (task.gets - 1) / kept.gets if kept else 0  # the first request need not wait
    return max(_read_seconds(task, cpu, speeds), paced) + ended + written


def cpu_rate(cpu: float, effort: Effort, speeds: Speeds) -> float:
    """Return the bytes per second that ``cpu`` vCPUs can receive and add, by a rule of this ``effort``."""
    return cpu / (1 / speeds.client_rate + effort.add / speeds.fold_rate)


def unlucky(seconds: float, speeds: Speeds) -> float:
    """Return the 95th percentile, given the median."""
    return seconds * math.exp(speeds.round_spread * NormalDist().inv_cdf(0.95))


def bottleneck(task: Task, memory: int, speeds: Speeds) -> str:
    """Name what limits the speed of a function of ``memory`` bytes."""
    rates = {
        "the network of a function": speeds.function_rate,
        "S3's connections": task.reading.parallel * _connection(task, speeds),
        "CPU, which comes with memory": cpu_rate(min(1.0, memory / VCPU), task.rule.effort(task.clients), speeds),
    }
    return min(rates, key=lambda name: rates[name])


def slowest(functions: int, spread: float) -> float:
    """Return the expected time of the slowest of several functions, relative to the mean (Blom's formula for the largest normal deviate).

    >>> slowest(1, 0.1), round(slowest(100, 0.1), 2)
    (1.0, 1.28)
    """
    return math.exp(spread * NormalDist().inv_cdf((functions - 0.375) / (functions + 0.25)))


def _assembly_seconds(plan: Plan, speeds: Speeds) -> float:
    """Return the caller's own seconds: its requests, one after another, and the bytes that it reads, such as for the digest.

    Without a setting, these are the three requests that every result takes: begin the upload, write the header, complete it.
    """
    if not plan.steps:
        return 3 * speeds.latency
    rounds = sum((step.usage.gets + step.usage.puts) / step.at_once for step in plan.steps)
    return rounds * speeds.latency + sum(step.usage.bytes_read for step in plan.steps) / speeds.client_rate


def _asked(task: Task, memory: int, speeds: Speeds | None) -> Rates:
    """Return a function's request rates: of GETs while it reads, and of PUTs from task to task."""
    known = speeds or Speeds()
    reading = _read_seconds(task, min(1.0, memory / VCPU), known)
    return Rates(task.gets / reading, 0 if task.written_to_memory else 1 / (known.invoke + task_seconds(task, memory, known)))


def _stage(kinds: tuple[Kind, ...], memory: int, concurrency: int | None, speeds: Speeds, kept: Share) -> tuple[float, float]:
    """Return the seconds until a stage's last function has ended, and those of its slowest function."""
    return stage_seconds([(kind.times, task_seconds(kind.task, memory, speeds, kept)) for kind in kinds], concurrency, speeds, kept)


def _read_seconds(task: Task, cpu: float, speeds: Speeds) -> float:
    """Return the seconds of reading and adding all inputs on ``cpu`` vCPUs."""
    nbytes, reading, effort = task.bytes_read, task.reading, task.rule.effort(task.clients)
    if task.reads and task.shared:
        return nbytes * (1 / speeds.shared_rate + effort.add / (cpu * speeds.fold_rate))
    rate = min(speeds.function_rate, reading.parallel * _connection(task, speeds), cpu_rate(cpu, effort, speeds))
    return speeds.latency + nbytes / rate


def _connection(task: Task, speeds: Speeds) -> float:
    """Return the bytes per second of one connection, request after request."""
    piece = max(1, task.reading.piece(task.input_nbytes))
    return piece / (speeds.latency + piece / speeds.connection_rate)
