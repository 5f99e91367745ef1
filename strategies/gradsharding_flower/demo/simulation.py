"""Strategies train the same federation one after another, in one run of Flower's simulation engine; an interruption ends all of it."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.simulation import run_simulation

from gradsharding_flower import GradSharding, upload_mod
from gradsharding_flower.arrays import from_state_dict, to_state_dict
from gradsharding_flower.demo.contest import Trained
from gradsharding_flower.demo.federation import Indices, Net, accuracy, client_app, initial_model, split
from gradsharding_flower.grid import Traffic, WatchedGrid

OnRound = Callable[[Strategy, Trained], None]
"""Is called after each round, in another thread."""


def simulate(
    strategies: Sequence[Strategy], on_round: OnRound, on_interrupt: Callable[[], None], *, clients: int, rounds: int, seed: int
) -> None:
    """Train ``rounds`` rounds by each strategy, from the same first model.

    When this thread is interrupted, ``on_interrupt`` is called and the training ends; then the exception goes on, and no store is in use.
    """
    stop, training = threading.Event(), threading.Lock()
    client = client_app([upload_mod], seed=seed)  # the mod lets messages of other strategies pass
    server = ServerApp()

    @client.query()
    def _query(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
        return Message(RecordDict(), reply_to=message)

    @server.main()
    def _main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - as above
        with training, contextlib.suppress(_Stopped):
            watched = _StoppableGrid(grid, stop)
            watched.wait_for_nodes(clients)
            for strategy in strategies:
                start = from_state_dict(initial_model(seed).state_dict())
                look = _Look(strategy, split(clients, seed)[1], watched.traffic, on_round)
                strategy.start(watched, start, num_rounds=rounds, evaluate_fn=look)

    # Ray can crash if an exception interrupts one of its calls: it runs in another thread, and ends in order.
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(run_simulation, server, client, clients)
        try:
            engine.result()
        except (KeyboardInterrupt, SystemExit):
            on_interrupt()
            logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # a stopped round logs errors
            raise
        finally:
            stop.set()
            with training:  # it has ended, or will not begin
                pass


class _Look:
    """Flower's ``evaluate_fn``: tests the model of each round, and reports the round."""

    def __init__(self, strategy: Strategy, test: Indices, traffic: Traffic, on_round: OnRound) -> None:
        self._strategy = strategy
        self._test = test
        self._traffic = traffic
        self._on_round = on_round
        self._begin()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seconds = time.perf_counter() - self._began
        through = self._traffic - self._before
        model = Net()
        model.load_state_dict(to_state_dict(arrays))
        reached = accuracy(model, self._test)
        if server_round:  # 0 is the first model, before any training
            self._on_round(self._strategy, Trained(reached, seconds, through.sent + through.received, self._past_server(server_round)))
        self._begin()
        return MetricRecord({"accuracy": reached})

    def _past_server(self, server_round: int) -> int:
        history = self._strategy.history if isinstance(self._strategy, GradSharding) else []
        return sum((report.nodes_read or 0) + (report.nodes_written or 0) for report in history if report.server_round == server_round)

    def _begin(self) -> None:
        self._began, self._before = time.perf_counter(), Traffic(self._traffic.sent, self._traffic.received)


class _Stopped(BaseException):
    """Ends a strategy's work; no exception that a strategy would take for a node's fault."""


class _StoppableGrid(WatchedGrid):
    """Counts bytes, and raises ``_Stopped`` once ``stop`` is set."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        super().__init__(grid, lambda _, reply: reply)
        self._stop = stop

    def wait_for_nodes(self, count: int) -> None:
        """Return once ``count`` nodes have answered: the engine has started, and the first round takes no longer than the others."""
        while len(nodes := [*self.get_node_ids()]) < count:
            time.sleep(0.05)
        self.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes])

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._check()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check()
        return super().pull_messages(message_ids)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped
