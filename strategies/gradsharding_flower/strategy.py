"""GradSharding wraps a strategy and takes over one thing: the weighted mean, which is computed slice by slice, elsewhere."""

import logging
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from gradsharding import Executor, LambdaFLTree, LIFLTree, Limits, ObjectStore, Round, Sharded, aggregate, open_executor, open_store
from gradsharding import Result as Averaged
from gradsharding.arithmetic.fold import Arithmetic
from gradsharding.errors import GradShardingError, PlanTooLarge, StoreRefused, UserError
from gradsharding.format.layout import Layout
from gradsharding.planning.manifest import Manifest
from gradsharding.planning.task import Term
from gradsharding.planning.topologies import Topology
from gradsharding.rounds.round import try_out
from gradsharding.running.executors import taken
from gradsharding.sizes import mib
from gradsharding.stores.lending import Lending
from gradsharding.stores.updates import inspect, loading
from gradsharding.stores.urls import locate
from gradsharding.usage import counting
from gradsharding_flower.books import Books
from gradsharding_flower.contributions import mean
from gradsharding_flower.evaluations import Evaluations
from gradsharding_flower.grid import Step, Traffic, WatchedGrid
from gradsharding_flower.intake import Intake
from gradsharding_flower.mod import ORDERS, orders
from gradsharding_flower.permits import Lender
from gradsharding_flower.reference import Reference, find, put
from gradsharding_flower.result import LazyResult, RoundReport
from gradsharding_flower.tidy import tidying
from gradsharding_flower.wrapped import needs_arrays

log = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Mode = Literal["direct", "relay", "mixed"]


class GradSharding(Strategy):
    """Any weighted-mean strategy, with its mean taken slice by slice from a store.

    Parameters
    ----------
    inner : FedAvg
        The strategy to wrap: FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad. With FedAvg and FedProx no array
        is ever in the server's memory; the others hold the average there once a round, to take their step.
    store : ObjectStore | str | PathLike
        Where updates and models lie; all nodes must reach it, unless ``mode`` is "relay".
    shards : int | None (default: None)
        Number of slices; by default as many as fit the limits and the store.
    executor : Executor | str (default: "processes")
        Where the slices are averaged.
    limits : Limits | None (default: None)
        What one function may use (default: 512 MiB, or what the Lambda function has).
    exact : bool (default: False)
        Sum exactly: the mean has the same bits whatever the topology, its slices, the executor and the order of anything.
        Takes more memory and time, and refuses float64 tensors; the server reads each mean once, for its digest.
    mode : str (default: "direct")
        "direct": every ClientApp has ``upload_mod``; updates go to the store and only receipts to the server.
        "relay": no ClientApp has it; the server writes updates to the store as they come in, one at a time.
        "mixed": both kinds in one federation; a node gets arrays until its first receipt, and references from then on.
    presigned : bool | None (default: None)
        Whether nodes with ``upload_mod`` read the model and write their updates by URLs that the server signs, for one object
        each, and hold no credentials; by default if the store can sign, as an s3:// store does.
    url_seconds : int (default: 900)
        Seconds that such a URL is good for: enough for a node to begin, and then to upload. It ends with the credentials that sign it;
        those that end in less than half of that, and cannot be renewed, lend none.
    min_replies : int (default: 1)
        A round with fewer usable updates is given up, with an error in the log, and the model stays.
    keep : bool (default: False)
        Keep all updates and models in the store, instead of the current and the previous model only.
    """

    def __init__(
        self,
        inner: FedAvg,
        *,
        store: ObjectStore | str | os.PathLike[str],
        shards: int | None = None,
        executor: Executor | str = "processes",
        limits: Limits | None = None,
        exact: bool = False,
        mode: Mode = "direct",
        presigned: bool | None = None,
        url_seconds: int = 900,
        min_replies: int = 1,
        keep: bool = False,
    ) -> None:
        self._needs_arrays = needs_arrays(inner)
        if mode not in ("direct", "relay", "mixed"):
            raise UserError(f"no mode is known as {mode!r}; use direct, relay or mixed")
        self.inner = inner
        self.store = open_store(store) if isinstance(store, str | os.PathLike) else store
        self.executor = open_executor(executor) if isinstance(executor, str) else executor
        self.limits = limits
        self.topology: Topology = Sharded(shards=shards)
        """How the mean is divided over functions."""
        self.arithmetic: Arithmetic = "exact" if exact else "float64"
        self.mode = mode
        self.min_replies = min_replies
        self.keep = keep
        lends = isinstance(self.store, Lending) if presigned is None else presigned
        self._lender = Lender(self.store, url_seconds) if lends and mode != "relay" else None
        self.history: list[RoundReport] = []
        """One report a round of training, of the last ``start``."""
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
        """What takes in replies, as they come."""

    def summary(self) -> None:
        """Log the configuration, then the wrapped strategy's."""
        log.info("\t├──> GradSharding settings:")
        log.info("\t│\t├── Store: %s | mode: %s", self.store.url, self.mode)
        log.info("\t│\t├── Topology: %s | executor: %s", self.topology, type(self.executor).__name__)
        log.info("\t│\t├── Arithmetic: %s", self.arithmetic)
        log.info("\t│\t├── Nodes reach the store %s", "by URLs that the server signs" if self._lender else "by themselves")
        log.info("\t│\t└── Allowed memory of a function: %s", mib(self.limits.memory) if self.limits else "what the executor has")
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

        ``evaluate_fn`` gets real arrays, read for each call; the result's ``arrays`` are read when first used.
        """
        self._run, self.history, self._direct_nodes, self._previous = uuid.uuid4().hex[:12], [], set(), None
        if self.store.charges.doubted:  # before anybody trains for a round that could not be kept
            try_out(self.store, self._round(0).id)
        if given := find(initial_arrays):
            self._model, self._layout = given, inspect(given.source, self.store).layout
        else:
            key = self._round(0).result_key()
            update = put(key, initial_arrays, self.store)
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
                self._materialised(evaluate_fn) if evaluate_fn else None,
            )
            self._note_evaluation()
        return LazyResult(result, self._model, self.store)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Let the wrapped strategy choose nodes and settings; references go where the model would."""
        self._note_evaluation()
        self._server_round = server_round
        self._before = replace(self._traffic)
        self._books.open()
        shown = self._load(arrays) if self._needs_arrays else arrays
        messages = self._address(self.inner.configure_train(server_round, shown, config, grid), arrays)
        self._asked = {message.metadata.dst_node_id for message in messages}
        if reference := find(arrays):
            direct = sum(reference == find(message.content.array_records[self.inner.arrayrecord_key]) for message in messages)
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
        """The same, for evaluation on the clients."""
        self._intake = Evaluations(server_round, self.inner.weighted_by_key, self._books)
        return self._address(self.inner.configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what can be averaged. The log names each node that is left out, and why.

        Too few usable updates, or a failure of the functions, end the round with an error in the log; the run goes on
        with the model it has.
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
            averaged = mean(kept, intake.round_, self._aggregate, self.min_replies, leave_out)
        except GradShardingError as error:
            if (
                isinstance(error, PlanTooLarge | StoreRefused) or type(error) is UserError
            ):  # a mistake in the set-up: so would every round end
                raise
            log.error("aggregate_train: round %d is given up, the model stays: %s", server_round, error.message)  # noqa: TRY400 - no bug: no traceback
            self._forget()
            return None, None
        kept = [one for one in kept if one.node not in left_out]
        log.info("aggregate_train: averaged %d updates in %d slices", len(kept), averaged.plan.functions)
        record = averaged.record
        model = Reference(source=record.source, version=record.version, nbytes=record.layout.nbytes, names=self._names(record.layout.names))
        self._layout = record.layout
        if self._needs_arrays:
            model = self._server_step(server_round, model)
        metrics = self.inner.train_metrics_aggr_fn([one.content for one in kept], self.inner.weighted_by_key)
        self._previous, self._model = self._model, model
        self._forget()
        self.history.append(RoundReport.of(server_round, kept, left_out, averaged, self._traffic - self._before, self._books))
        self._books.close()
        return model.record(), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The wrapped strategy's, of the replies whose metrics can be averaged."""
        assert isinstance(self._intake, Evaluations)
        return self.inner.aggregate_evaluate(server_round, self._intake.usable(replies))

    def _note_evaluation(self) -> None:
        """Enter the evaluation of the last round, which is over, into its report."""
        if asked := self._books.evaluation:
            self.history[-1] = replace(self.history[-1], evaluation_gets=asked.gets, evaluation_puts=asked.puts)

    def _round(self, server_round: int) -> Round:
        return Round(self.store, f"{self._run}-{server_round:06d}")

    def _check(self, layout: Layout) -> None:
        """Refuse, before any client trains, what no round could do."""
        halves = [tensor.name for tensor in layout.tensors if tensor.dtype == "BF16"]
        if self._needs_arrays and halves:
            step = type(self.inner).__name__
            raise UserError(f"{step} takes its step in numpy, which has no bfloat16 (tensor {halves[0]!r}); use FedAvg, or a float32 model")
        one = Term(client="", source="", version="", base=0, weight=1)
        manifest = Manifest(round="", layout=layout, terms=(one,))
        limits = self.executor.limits(self.limits)
        if said := taken(self.executor, limits):
            log.info("Concurrency: %s", said)
        store = self.store
        self.topology.plan(manifest, limits, grain=store.grain, reading=store.reading, arithmetic=self.arithmetic).check(limits)
        if self._lender and self._model:
            self._lender.orders("check", self._model)

    def _names(self, found: tuple[str, ...]) -> tuple[str, ...]:
        """Order the result's tensors as the model does; tensors that it does not have, as their bytes lie."""
        assert self._model
        return self._model.names if sorted(self._model.names) == sorted(found) else found

    def _load(self, arrays: ArrayRecord) -> ArrayRecord:
        reference = find(arrays)
        if not reference:
            return arrays
        self._books.plan(locate(reference.source, self.store)[0], loading(len(self._layout.header()), reference.nbytes))
        return reference.load(self.store)

    def _materialised(self, evaluate: EvaluateFn) -> EvaluateFn:
        return lambda server_round, arrays: evaluate(server_round, self._load(arrays))

    def _address(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        """Give each message what its node can read: a reference and the mod's orders, or arrays."""
        addressed = list(messages)
        told = self._orders()
        plain: ArrayRecord | None = None
        for message in addressed:
            direct = self.mode == "direct" or message.metadata.dst_node_id in self._direct_nodes
            if not direct:
                plain = plain or self._load(arrays)
            content = RecordDict(dict(message.content))
            content[self.inner.arrayrecord_key] = arrays if direct or plain is None else plain
            if self.mode != "relay":
                content[ORDERS] = told
            message.content = content
        return addressed

    def _orders(self) -> ConfigRecord:
        assert self._model
        name = self._round(self._server_round).id
        return self._lender.orders(name, self._model) if self._lender else orders(self.store, name)

    def _received(self, asked: Message, reply: Message) -> Step:
        """Take a reply in; one to a message that a wrapped strategy sends by itself is kept as it is."""
        return self._intake.take(asked, reply) if self._intake else reply

    def _aggregate(self, round_: Round) -> Averaged:
        return aggregate(round_, topology=self.topology, arithmetic=self.arithmetic, limits=self.limits, executor=self.executor)

    def _server_step(self, server_round: int, average: Reference) -> Reference:
        """Hand the wrapped strategy one reply, the average, of weight 1: x * 1.0 is x. Integers keep their dtype."""
        arrays = self._load(average.record())
        one = Message(RecordDict({self.inner.arrayrecord_key: arrays}), dst_node_id=0, message_type=MessageType.TRAIN)
        one.content["metrics"] = MetricRecord({self.inner.weighted_by_key: 1.0})
        stepped, _ = self.inner.aggregate_train(server_round, [one])
        assert stepped is not None
        for name, array in stepped.items():
            kind = np.dtype(arrays[name].dtype)
            if kind.kind in "iub":
                stepped[name] = Array(np.asarray(np.rint(array.numpy()), kind))
        key = self._round(server_round).result_key()
        written = put(key, stepped, self.store)
        self._books.plan(self.store, self.store.charges.put(written.stat.size))
        return Reference.to(key, written, tuple(stepped))

    def _forget(self) -> None:
        """Delete this run's objects but the current model and the one before it, which slow clients may still read."""
        with tidying("what nodes were permitted to write, and have not"):
            if self._lender:
                self._lender.close()
        if self.keep:
            return
        needed = {model.source for model in (self._model, self._previous) if model}
        with tidying("updates and models of past rounds"):
            for place in ("rounds", "results"):
                found = [key for key, _ in self.store.list(f"{place}/{self._run}-")]
                self._books.plan(self.store, self.store.charges.list(len(found)))
                self.store.delete(key for key in found if key not in needed)


class LambdaFL(GradSharding):
    """The same wrapper with λ-FL's topology: leaves sum whole models, a root sums the sums. Each function holds a whole model.

    Parameters
    ----------
    inner : FedAvg
        The strategy to wrap.
    fan_in : int | None (default: None)
        Updates that a leaf takes; by default √N, rounded up.
    levels : int (default: 2)
        Levels of the tree.
    **settings
        Those of ``GradSharding``, but for ``shards``.
    """

    def __init__(self, inner: FedAvg, *, fan_in: int | None = None, levels: int = 2, **settings: Any) -> None:
        super().__init__(inner, **_without_shards("LambdaFL", settings))
        self.topology: Topology = LambdaFLTree(fan_in=fan_in, levels=levels)


class LIFL(GradSharding):
    """The same wrapper with LIFL's topology: leaf, middle and top aggregators. Each function holds a whole model.

    Parameters
    ----------
    inner : FedAvg
        The strategy to wrap.
    fan_in : int | None (default: None)
        Inputs of a leaf or middle aggregator; by default ∛N, rounded up.
    shared_memory : bool (default: False)
        Pass partial sums through this machine's memory, as LIFL itself does; the functions must be processes on it.
    **settings
        Those of ``GradSharding``, but for ``shards``.
    """

    def __init__(self, inner: FedAvg, *, fan_in: int | None = None, shared_memory: bool = False, **settings: Any) -> None:
        super().__init__(inner, **_without_shards("LIFL", settings))
        self.topology: Topology = LIFLTree(fan_in=fan_in, shared_memory=shared_memory)


def _without_shards(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    if "shards" in settings:
        raise UserError(f"{name} has no shards: its functions hold whole models; use GradSharding")
    return settings
