"""GradSharding wraps a strategy and replaces its weighted mean, which is computed slice by slice, outside the server."""

import logging
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from gradsharding import Executor, Limits, ObjectStore, Round, Sharded, aggregate, open_executor, open_store
from gradsharding import Result as Averaged
from gradsharding.arithmetic.rules import MEAN, ExactMean, Rule, as_rule
from gradsharding.errors import GradShardingError, PlanTooLarge, StoreRefused, UserError
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Term
from gradsharding.planning.topologies import Topology, make_topology
from gradsharding.rounds.round import try_out
from gradsharding.running.executors import taken
from gradsharding.sizes import mib
from gradsharding.stores.lending import Lending
from gradsharding.stores.updates import inspect, loading
from gradsharding.stores.urls import locate
from gradsharding.usage import counting
from gradsharding_flower.books import Books
from gradsharding_flower.contributions import average_usable
from gradsharding_flower.evaluations import Evaluations
from gradsharding_flower.grid import Step, Traffic, WatchedGrid
from gradsharding_flower.intake import Intake
from gradsharding_flower.mod import ORDERS, store_orders
from gradsharding_flower.permits import Lender
from gradsharding_flower.reference import Reference, find_reference, put_arrays
from gradsharding_flower.result import LazyResult, RoundReport
from gradsharding_flower.tidy import tidying
from gradsharding_flower.wrapped import needs_arrays

log = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""Flower's: takes the round's number and the model, and returns metrics."""
Mode = Literal["direct", "relay", "mixed"]


class GradSharding(Strategy):
    """A weighted-mean strategy whose mean is computed slice by slice, from updates in a store.

    Parameters
    ----------
    inner : FedAvg
        The strategy to wrap: FedAvg, FedProx, FedAvgM, FedAdam, FedYogi or FedAdagrad. With FedAvg and FedProx no array
        is ever in the server's memory; the others load the average once a round, for their server step.
    store : ObjectStore | str | PathLike
        The store of updates and models; all nodes must reach it, unless ``mode`` is "relay".
    shards : int | None (default: None)
        Number of slices; by default chosen to fit the limits and the store.
    executor : Executor | str (default: "processes")
        What averages the slices.
    topology : Topology | str | None (default: None)
        How functions share the work, as a value such as ``ShardedTree(fan_in=10)`` or as a registered name; by default ``Sharded()``.
    limits : Limits | None (default: None)
        Memory that one function may use (default: 512 MiB, or the memory of the Lambda function).
    rule : Rule | str | None (default: None)
        How updates become one, as a value or as text such as "trimmed-mean:0.2", which ignores weights (default: their weighted mean).
    exact : bool (default: False)
        The same as ``rule="exact-mean"``: the bits of the mean do not depend on the topology, the slices, the executor or any order.
        Exact sums take more memory and time, and refuse float64 tensors; the server reads each mean once, for its digest.
    mode : str (default: "direct")
        "direct": every ClientApp has ``upload_mod``; updates go to the store, and only receipts to the server.
        "relay": no ClientApp has it; the server writes each update to the store as it arrives, one at a time.
        "mixed": some have it; a node gets arrays until its first receipt, and references from then on.
    presigned : bool | None (default: None)
        Whether nodes with ``upload_mod`` have no credentials and use URLs that the server signs, each for one object, to read
        the model and write their updates; by default if the store can sign URLs, as on S3.
    url_seconds : int (default: 900)
        Seconds for which such a URL is valid: enough for a node to begin, and then to upload. A URL expires with the credentials that
        sign it; credentials that expire in less than half of that time and cannot be renewed sign none.
    min_replies : int (default: 1)
        A round with fewer usable updates is given up with an error in the log, and the model stays as it is.
    keep : bool (default: False)
        Keep all updates and models in the store, and not only the current and the previous model.
    """

    def __init__(
        self,
        inner: FedAvg,
        *,
        store: ObjectStore | str | os.PathLike[str],
        shards: int | None = None,
        executor: Executor | str = "processes",
        topology: Topology | str | None = None,
        limits: Limits | None = None,
        exact: bool = False,
        rule: Rule | str | None = None,
        mode: Mode = "direct",
        presigned: bool | None = None,
        url_seconds: int = 900,
        min_replies: int = 1,
        keep: bool = False,
    ) -> None:
        self._needs_arrays = needs_arrays(inner)
        if mode not in ("direct", "relay", "mixed"):
            raise UserError(f"{mode!r} is not a mode; use direct, relay or mixed")
        self.inner = inner
        self.store = open_store(store) if isinstance(store, str | os.PathLike) else store
        self.executor = open_executor(executor) if isinstance(executor, str) else executor
        self.limits = limits
        self.topology = _topology(topology, shards)
        """How the work is divided among functions."""
        self.rule = _rule(rule, exact=exact)
        self.mode = mode
        self.min_replies = min_replies
        self.keep = keep
        lends = isinstance(self.store, Lending) if presigned is None else presigned
        self._lender = Lender(self.store, url_seconds) if lends and mode != "relay" else None
        self.history: list[RoundReport] = []
        """A report of each round of training of the last ``start``."""
        self._run = ""
        self._layout = Layout.of({})
        self._model: Reference | None = None
        self._previous: Reference | None = None
        self._asked: set[int] = set()
        self._direct_nodes: set[int] = set()
        self._traffic = self._before = Traffic()
        self._server_round = 0
        self._books = Books()
        self._intake: Intake | Evaluations | None = None
        """Handles replies as they arrive."""

    def summary(self) -> None:
        """Log the configuration, then the wrapped strategy's."""
        log.info("\t├──> GradSharding settings:")
        log.info("\t│\t├── Store: %s | mode: %s", self.store.url, self.mode)
        log.info("\t│\t├── Topology: %s | executor: %s", self.topology, type(self.executor).__name__)
        log.info("\t│\t├── Rule: %s%s", self.rule, "" if self.rule.weighs else " | weights do not count: each client counts the same")
        log.info("\t│\t├── Nodes reach the store %s", "by URLs that the server signs" if self._lender else "themselves")
        log.info("\t│\t└── Memory of a function, at most: %s", mib(self.limits.memory) if self.limits else "the executor's")
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> LazyResult:
        """Run the federation, as ``Strategy.start`` does. ``initial_arrays`` may be a reference (``refer``).

        ``evaluate_fn`` gets real arrays, which are read for each call; the result's ``arrays`` are read when they are first used.
        """
        self._run, self.history, self._direct_nodes, self._previous = uuid.uuid4().hex[:12], [], set(), None
        if self.store.charges.doubted:  # before nodes train for a round that the store could not keep
            try_out(self.store, self._round(0).id)
        if reference := find_reference(initial_arrays):
            self._model, self._layout = reference, inspect(reference.source, self.store).layout
        else:
            key = self._round(0).result_key()
            update = put_arrays(key, initial_arrays, self.store)
            self._model, self._layout = Reference.to(key, update, tuple(initial_arrays)), update.layout
        self._check(self._layout)
        if self._lender and (doubts := self._lender.doubts(timeout)):
            log.warning("%s", doubts)
        watched = WatchedGrid(grid, self._received)
        self._traffic = watched.traffic
        with counting() as ledger:
            self._books = Books(ledger)
            result = super().start(
                watched,
                self._model.record(),
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                self._with_arrays(evaluate_fn) if evaluate_fn else None,
            )
            self._note_evaluation()
        return LazyResult(result, self._model, self.store)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Let the wrapped strategy choose nodes and settings; send references in place of the model."""
        self._note_evaluation()
        self._server_round = server_round
        self._before = replace(self._traffic)
        self._books.begin_round()
        real = self._load(arrays) if self._needs_arrays else arrays
        messages = self._address(self.inner.configure_train(server_round, real, config, grid), arrays)
        self._asked = {message.metadata.dst_node_id for message in messages}
        if reference := find_reference(arrays):
            direct = sum(reference == find_reference(message.content.array_records[self.inner.arrayrecord_key]) for message in messages)
            self._books.nodes_planned += loading(len(self._layout.header()), reference.nbytes) * direct
        assert self._model
        self._intake = Intake(
            round_=self._round(server_round),
            model=self._model,
            layout=self._layout,
            weighted_by_key=self.inner.weighted_by_key,
            lender=self._lender,
            books=self._books,
            direct=self._direct_nodes,
        )
        return messages

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Do the same for evaluation on the clients."""
        self._intake = Evaluations(server_round, self.inner.weighted_by_key, self._books)
        return self._address(self.inner.configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the usable updates. The log names each node that is left out, and the reason.

        With too few usable updates, or if the functions fail, the round is given up with an error in the log, and the run
        goes on with its last model.
        """
        if not self._asked:
            return None, None
        intake = self._intake
        assert isinstance(intake, Intake)
        left_out: dict[int, str] = {}

        def leave_out(node: int, reason: str) -> None:
            left_out[node] = reason
            log.warning("aggregate_train: node %d is left out of round %d: %s", node, server_round, reason)

        answered = {answer.metadata.src_node_id for answer in replies}
        for node in sorted(self._asked - answered - intake.refused.keys()):
            leave_out(node, "it did not answer in time")
        kept = intake.contributions(leave_out)
        intake.plan_headers(kept)
        try:
            averaged = average_usable(kept, intake.round_, self._aggregate, self.min_replies, leave_out)
        except GradShardingError as error:
            if isinstance(error, PlanTooLarge | StoreRefused) or type(error) is UserError:
                raise  # a mistake in the set-up, which would end every round
            log.error("aggregate_train: round %d is given up, the model stays: %s", server_round, error.message)  # noqa: TRY400 - not a bug: no traceback
            self._forget()
            return None, None
        kept = [contribution for contribution in kept if contribution.node not in left_out]
        log.info("aggregate_train: averaged %d updates with %d function(s)", len(kept), averaged.plan.functions)
        record = averaged.record
        model = Reference(source=record.source, version=record.version, nbytes=record.layout.nbytes, names=self._names(record.layout.names))
        self._layout = record.layout
        if self._needs_arrays:
            model = self._server_step(server_round, model)
        metrics = self.inner.train_metrics_aggr_fn([contribution.content for contribution in kept], self.inner.weighted_by_key)
        self._previous, self._model = self._model, model
        self._forget()
        self.history.append(RoundReport.of(server_round, kept, left_out, averaged, self._traffic - self._before, self._books))
        self._books.end_training()
        return model.record(), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the wrapped strategy average the metrics that can be averaged."""
        assert isinstance(self._intake, Evaluations)
        return self.inner.aggregate_evaluate(server_round, self._intake.usable(replies))

    def _note_evaluation(self) -> None:
        """Add the evaluation of the last round, now that it is over, to the round's report."""
        if usage := self._books.evaluation:
            self.history[-1] = replace(self.history[-1], evaluation_gets=usage.gets, evaluation_puts=usage.puts)

    def _round(self, server_round: int) -> Round:
        return Round(self.store, f"{self._run}-{server_round:06d}")

    def _check(self, layout: Layout) -> None:
        """Raise UserError, before any client trains, if no round could succeed."""
        halves = [tensor.name for tensor in layout.tensors if tensor.dtype == "BF16"]
        if self._needs_arrays and halves:
            step = type(self.inner).__name__
            raise UserError(f"{step} computes in numpy, which has no bfloat16 (tensor {halves[0]!r}); use FedAvg, or a float32 model")
        try:
            self.rule.admit(layout, self.min_replies)
        except UserError as error:
            self.rule.admit(layout, 1 << 20)  # raises itself if more updates would not help
            raise UserError(f"{error.message}; a round may have as few as min_replies={self.min_replies}: raise that") from error
        fewest = tuple(Term(client=str(i), source="", version="", base=0, weight=1) for i in range(max(1, self.min_replies)))
        manifest = Manifest(round="", layout=layout, terms=fewest)
        limits = self.executor.limits(self.limits)
        if concurrency := taken(self.executor, limits):
            log.info("Concurrency: %s", concurrency)
        store = self.store
        self.topology.plan(manifest, limits, grain=store.grain, reading=store.reading, rule=self.rule).check(limits)
        if self._lender and self._model:
            self._lender.orders("check", self._model)

    def _names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Order the result's names as the model's, if they are the same names."""
        assert self._model
        return self._model.names if sorted(self._model.names) == sorted(names) else names

    def _load(self, arrays: ArrayRecord) -> ArrayRecord:
        reference = find_reference(arrays)
        if not reference:
            return arrays
        self._books.plan(locate(reference.source, self.store)[0], loading(len(self._layout.header()), reference.nbytes))
        return reference.load(self.store)

    def _with_arrays(self, evaluate: EvaluateFn) -> EvaluateFn:
        return lambda server_round, arrays: evaluate(server_round, self._load(arrays))

    def _address(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        """Put into each message what its node can read: a reference and the mod's orders, or arrays."""
        addressed = list(messages)
        orders = self._orders()
        plain: ArrayRecord | None = None
        for message in addressed:
            direct = self.mode == "direct" or message.metadata.dst_node_id in self._direct_nodes
            if not direct:
                plain = plain or self._load(arrays)
            content = RecordDict(dict(message.content))
            content[self.inner.arrayrecord_key] = arrays if direct or plain is None else plain
            if self.mode != "relay":
                content[ORDERS] = orders
            message.content = content
        return addressed

    def _orders(self) -> ConfigRecord:
        assert self._model
        round_id = self._round(self._server_round).id
        return self._lender.orders(round_id, self._model) if self._lender else store_orders(self.store, round_id)

    def _received(self, asked: Message, reply: Message) -> Step:
        """Handle a reply; one to a message that the wrapped strategy sends by itself is kept unchanged."""
        return self._intake.receive(asked, reply) if self._intake else reply

    def _aggregate(self, round_: Round) -> Averaged:
        return aggregate(round_, topology=self.topology, rule=self.rule, limits=self.limits, executor=self.executor)

    def _server_step(self, server_round: int, average: Reference) -> Reference:
        """Pass the average to the wrapped strategy, as the only reply, of weight 1: x * 1.0 is x. Integers keep their dtype."""
        arrays = self._load(average.record())
        reply = Message(RecordDict({self.inner.arrayrecord_key: arrays}), dst_node_id=0, message_type=MessageType.TRAIN)
        reply.content["metrics"] = MetricRecord({self.inner.weighted_by_key: 1.0})
        stepped, _ = self.inner.aggregate_train(server_round, [reply])
        assert stepped is not None
        for name, array in stepped.items():
            kind = np.dtype(arrays[name].dtype)
            if kind.kind in "iub":
                stepped[name] = Array(np.asarray(np.rint(array.numpy()), kind))
        key = self._round(server_round).result_key()
        update = put_arrays(key, stepped, self.store)
        self._books.plan(self.store, self.store.charges.put(update.stat.size))
        return Reference.to(key, update, tuple(stepped))

    def _forget(self) -> None:
        """Delete this run's objects, except the current model and the one before it, which slow clients may still read."""
        with tidying("permitted updates that have not arrived"):
            if self._lender:
                self._lender.close()
        if self.keep:
            return
        needed = {model.source for model in (self._model, self._previous) if model}
        with tidying("updates and models of past rounds"):
            for folder in ("rounds", "results"):
                keys = [key for key, _ in self.store.list(f"{folder}/{self._run}-")]
                self._books.plan(self.store, self.store.charges.list(len(keys)))
                self.store.delete(key for key in keys if key not in needed)


def _topology(topology: Topology | str | None, shards: int | None) -> Topology:
    """Return the topology that the options choose; raise UserError for an unknown name, and for ``shards`` beside a value."""
    if isinstance(topology, Topology):
        if shards is not None:
            raise UserError(f"shards={shards} goes with a topology's name, and {topology} is a value: give it the option instead")
        return topology
    options = {} if shards is None else {"shards": shards}
    return make_topology(Sharded.name if topology is None else topology, **options)


def _rule(rule: Rule | str | None, *, exact: bool) -> Rule:
    """Return the rule that was asked for; raise UserError if ``exact`` asks for another one."""
    chosen = as_rule(rule) if rule is not None else ExactMean() if exact else MEAN
    if exact and chosen != ExactMean():
        raise UserError(f"exact=True means rule={str(ExactMean())!r}, not {str(chosen)!r}: give one of them")
    return chosen
