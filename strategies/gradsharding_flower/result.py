"""A run leaves a report of each round, and a result whose arrays are read when they are first used."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result

from gradsharding import ObjectStore
from gradsharding import Result as Averaged
from gradsharding.usage import together, total
from gradsharding_flower.books import Books
from gradsharding_flower.contributions import Contribution
from gradsharding_flower.grid import Traffic
from gradsharding_flower.reference import Reference


@dataclass(frozen=True)
class RoundReport:
    """The figures of one round of training; sizes in bytes."""

    server_round: int
    clients: tuple[int, ...]
    """Node ids whose updates were averaged."""
    left_out: dict[int, str]
    """Node ids whose updates were not, and the reasons."""
    server_sent: int
    """Messages through the Flower server, to the clients."""
    server_received: int
    """Messages through the Flower server, from the clients."""
    uploaded: int
    """The clients' updates, in the store."""
    read: int
    """Read from the store by the functions."""
    written: int
    """Written to the store by the functions."""
    gets: int
    """GET and HEAD requests of the server and the functions for the training, as counted, including failed attempts."""
    puts: int
    """Their PUT, COPY, POST and LIST requests."""
    projected_gets: int
    """The most that was planned, if nothing fails."""
    projected_puts: int
    nodes_gets: int | None
    """GET and HEAD requests of the nodes with ``upload_mod``, as they report; None if none does."""
    nodes_puts: int | None
    projected_nodes_gets: int
    projected_nodes_puts: int
    nodes_read: int | None
    """Bytes of models that the nodes with ``upload_mod`` read from the store, as they report; None if none does."""
    nodes_written: int | None
    """Bytes of updates that they wrote to it."""
    evaluation_gets: int | None
    """GET and HEAD requests of the evaluation that followed, of the server and the nodes; None until it is over."""
    evaluation_puts: int | None
    functions: int
    peak_memory: int | None
    """The largest of a function; None if functions share their process's memory (inline, threads, pools)."""
    projected_memory: int
    seconds: float
    digest: str | None
    """SHA-256 (hex) of the result's data section, if the rule vouches for its bits; else None."""

    @classmethod
    def of(
        cls, server_round: int, kept: Sequence[Contribution], left_out: dict[int, str], averaged: Averaged, traffic: Traffic, books: Books
    ) -> "RoundReport":
        """Collect the figures of a round."""
        tasks = averaged.reports
        counted, planned = total(together(books.counted, averaged.usage)), total(together(books.planned, averaged.plan.usage))
        return cls(
            server_round=server_round,
            clients=tuple(contribution.node for contribution in kept),
            left_out=left_out,
            server_sent=traffic.sent,
            server_received=traffic.received,
            uploaded=sum(contribution.update.stat.size for contribution in kept),
            read=sum(report.bytes_read for report in tasks),
            written=sum(report.bytes_written for report in tasks),
            gets=counted.gets,
            puts=counted.puts,
            projected_gets=planned.gets,
            projected_puts=planned.puts,
            nodes_gets=books.nodes.gets if books.nodes else None,
            nodes_puts=books.nodes.puts if books.nodes else None,
            projected_nodes_gets=books.nodes_planned.gets,
            projected_nodes_puts=books.nodes_planned.puts,
            nodes_read=books.nodes.bytes_read if books.nodes else None,
            nodes_written=books.nodes.bytes_written if books.nodes else None,
            evaluation_gets=None,
            evaluation_puts=None,
            functions=len(tasks),
            peak_memory=averaged.peak_memory,
            projected_memory=averaged.plan.memory,
            seconds=sum(report.seconds for report in tasks),
            digest=averaged.record.digest,
        )


class LazyResult(Result):
    """Flower's Result; its ``arrays`` are read from the store when they are first used."""

    def __init__(self, result: Result, model: Reference, store: ObjectStore) -> None:
        """Take the metrics of ``result``, and ``model`` in place of its arrays."""
        self.model = model
        """Reference to the final model: ``model.source`` names its safetensors object."""
        self._store = store
        self.train_metrics_clientapp = result.train_metrics_clientapp
        self.evaluate_metrics_clientapp = result.evaluate_metrics_clientapp
        self.evaluate_metrics_serverapp = result.evaluate_metrics_serverapp

    @cached_property
    def arrays(self) -> ArrayRecord:  # type: ignore[override]
        """The final model's arrays."""
        return self.model.load(self._store)
