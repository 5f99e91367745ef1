"""The replies of a round become contributions, node by node; a node that contributes nothing leaves the reason, in one sentence."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from gradsharding import Round
from gradsharding.errors import ChangedObject, GradShardingError, InvalidUpdate, StoreRefused, quoted
from gradsharding.format.layout import Layout
from gradsharding.stores.updates import Update, inspect, inspection
from gradsharding.usage import Usage, carried
from gradsharding_flower.ballot import Ballot, Inspected
from gradsharding_flower.books import Books
from gradsharding_flower.contributions import Contribution, LeaveOut
from gradsharding_flower.grid import PARALLEL_NODES, FollowUp, Step, Work
from gradsharding_flower.mod import ORDERS, take_usage
from gradsharding_flower.permits import Lender, Offered
from gradsharding_flower.reference import Reference, client_id, serialized
from gradsharding_flower.replies import Bounds, MetricShapes, TrainingReply, blaming, most_common, one_line, read_training, uncommon
from gradsharding_flower.weighing import incompatible_weights


class Receipt(NamedTuple):
    """The facts kept about a receipt until the header of its update is read."""

    version: str
    tensors: int
    """The number of tensors."""
    names: str
    """Digest of their names, which does not depend on their order."""


class Entry(NamedTuple):
    """The facts kept about a node's reply."""

    weight: float
    metrics: MetricShapes
    content: RecordDict
    update: Receipt | Inspected


@dataclass
class Intake:
    """The replies to one round's training."""

    round_: Round
    model: Reference
    layout: Layout
    """Layout of the model that was sent."""
    weighted_by_key: str
    lender: Lender | None
    books: Books
    direct: set[int]
    """Nodes with the mod, of all rounds; a node is added when its first receipt or offer comes."""
    refused: dict[int, str] = field(default_factory=dict)
    """Nodes that have replied and are left out, and the reasons."""

    def __post_init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._ballot = Ballot(self.layout)
        self._bounds = Bounds.of(self.layout)
        self._names = frozenset(self.model.names)
        self._named = _digest(self._names)

    @property
    def elected(self) -> Layout:
        """The layout of the contributions."""
        return self._ballot.elected

    def receive(self, asked: Message, reply: Message) -> Step:
        """Handle a reply: write its arrays to the store, permit the update that it offers, or note its receipt."""
        node = asked.metadata.dst_node_id
        usage, reply = take_usage(asked, reply)
        self.books.add_node_usage(usage)
        try:
            read = read_training(reply, self.weighted_by_key, self._bounds)
            match read.update:
                case Reference():
                    self.direct.add(node)
                    self.books.nodes_planned += self.round_.store.charges.put(self.layout.nbytes + len(self.layout.header()))
                    return self._note(asked, read, self._receipt(node, read.update))
                case Offered() if self.lender:
                    self.direct.add(node)
                    return self._permit(self.lender, asked, read, read.update)
                case ArrayRecord():
                    return self._note(asked, read, self._relay(node, read.update))
            raise InvalidUpdate("it offers an update, but this store lends no URLs; use the same gradsharding on all nodes")
        except StoreRefused:  # our mistake, not the node's: every update would be refused
            raise
        except (GradShardingError, OSError) as error:
            return self._refuse(asked, error)

    def contributions(self, leave_out: LeaveOut) -> list[Contribution]:
        """Return the contributions, sorted by node; call ``leave_out`` for each other node that has replied.

        All contributions have the most common metrics, the layout that won the vote (``Ballot``), and weights that fit together.
        """
        with ThreadPoolExecutor(PARALLEL_NODES, thread_name_prefix="gradsharding-collect") as pool:
            inspected = dict(zip(self._entries, pool.map(carried(self._inspect), self._entries.items()), strict=True))
        fitting: dict[int, tuple[Entry, Inspected]] = {}
        for node, update in sorted(inspected.items()):
            if isinstance(update, str):
                self.refused[node] = update
            else:
                fitting[node] = self._entries[node], update
        for node, reason in sorted(self.refused.items()):
            leave_out(node, reason)
        usual = most_common(entry.metrics for entry, _ in fitting.values())
        odd = {node: uncommon(entry.metrics, usual) for node, (entry, _) in fitting.items() if usual and entry.metrics != usual}
        drop(fitting, odd, leave_out)
        drop(fitting, {node: one_line(why) for node, (_, update) in fitting.items() if (why := self._ballot.problem(update))}, leave_out)
        drop(fitting, incompatible_weights({node: entry.weight for node, (entry, _) in fitting.items()}), leave_out)
        return [
            Contribution(node, entry.content, entry.weight, self._key(node), Update(self.elected, update.base, update.stat))
            for node, (entry, update) in fitting.items()
        ]

    def _relay(self, node: int, arrays: ArrayRecord) -> Inspected:
        """Write arrays that came in a reply to the store, so that the server can free them."""
        with blaming():
            layout, buffers = serialized(arrays)
        base = memoryview(buffers[0]).nbytes
        if base > self._bounds.header:
            raise InvalidUpdate(f"its header takes {base} bytes; at most {self._bounds.header} are accepted, a few times the model's own")
        stat = self.round_.store.put(self._key(node), buffers)
        self.books.plan(self.round_.store, self.round_.store.charges.put(stat.size))
        return self._ballot.enter(Update(layout, base, stat))

    def _receipt(self, node: int, reference: Reference) -> Receipt:
        if reference.source != self._key(node):
            raise InvalidUpdate(f"its receipt is for {quoted(reference.source)}, not for its own key {self._key(node)}")
        names = frozenset(reference.names)
        if len(names) != len(reference.names):
            raise InvalidUpdate(f"its receipt names {len(reference.names)} tensors, some of them twice; name each of them once")
        return Receipt(reference.version[:200], len(names), self._naming(names))

    def _permit(self, lender: Lender, asked: Message, read: TrainingReply, offered: Offered) -> Step:
        """Permit a node to write the update that it offers; when it says that it has written, inspect the update."""
        node = asked.metadata.dst_node_id
        key = self._key(node)
        lender.check(offered, self.model)
        self.refused[node] = "it was permitted to write its update, and did not report in time that it has"

        def permitted(permit: Callable[[], ConfigRecord]) -> Step:
            group, kind = asked.metadata.group_id, asked.metadata.message_type
            try:
                message = Message(RecordDict({ORDERS: permit()}), dst_node_id=node, message_type=kind, group_id=group)
            except StoreRefused:  # our mistake, as above
                raise
            except (GradShardingError, OSError) as error:
                return self._refuse(asked, error)
            return FollowUp(message, written)

        def written(answer: Message) -> Step:
            usage, answer = take_usage(asked, answer)
            self.books.add_node_usage(usage)
            if answer.has_error():
                return self._refuse(asked, InvalidUpdate(f"it could not write its update: {one_line(str(answer.error.reason))}"))
            return Work(lambda: self._settle(lender, key), settled)

        def settled(result: Callable[[], Inspected]) -> Step:
            try:
                update = result()
            except (GradShardingError, OSError) as error:
                return self._refuse(asked, error)
            self.books.nodes_planned += Usage(puts=len(offered.update.pieces), bytes_written=offered.update.nbytes)
            self.books.plan(self.round_.store, lender.settling(offered, update.base))
            del self.refused[node]
            return self._note(asked, read, update)

        return Work(lambda: lender.permit(self.round_.id, key, offered, self.model), permitted)

    def _settle(self, lender: Lender, key: str) -> Inspected:
        """Check that a permitted update has arrived, and read its header."""
        peeked = lender.settle(key)
        with blaming():
            return self._ballot.enter(inspect(key, self.round_.store, peeked, largest_header=self._bounds.header))

    def _inspect(self, node_and_entry: tuple[int, Entry]) -> Inspected | str:
        """Read the header of an update, and check that its receipt is true; return the reason if the update cannot be used."""
        node, entry = node_and_entry
        if isinstance(entry.update, Inspected):
            return entry.update
        key, receipt = self._key(node), entry.update
        try:
            with blaming():
                update = inspect(key, self.round_.store, largest_header=self._bounds.header)
                if update.stat.version != receipt.version:
                    raise ChangedObject(f"{key} is at version {update.stat.version}, its receipt for {quoted(receipt.version)}")
                if receipt.names != self._naming(frozenset(update.layout.names)):
                    raise InvalidUpdate(
                        f"its receipt names {receipt.tensors} tensors, and {key} holds {len(update.layout.names)} with other names"
                    )
                return self._ballot.enter(update)
        except GradShardingError as error:
            return error.message

    def _note(self, asked: Message, read: TrainingReply, update: Receipt | Inspected) -> Message:
        self._entries[asked.metadata.dst_node_id] = Entry(read.weight, read.metrics, read.content, update)
        return Message(read.content, reply_to=asked)

    def _refuse(self, asked: Message, error: Exception) -> Message:
        reason = error.message if isinstance(error, GradShardingError) else f"its update could not be written: {error}"
        self.refused[asked.metadata.dst_node_id] = one_line(reason)
        return Message(Error(code=0, reason=one_line(reason)), reply_to=asked)

    def plan_headers(self, kept: Iterable[Contribution]) -> None:
        """Plan the requests that read the headers of updates known by receipts."""
        updates = [contribution.update for contribution in kept if isinstance(self._entries[contribution.node].update, Receipt)]
        self.books.plan(self.round_.store, *(inspection(update.base, update.layout.nbytes) for update in updates))

    def _naming(self, names: frozenset[str]) -> str:
        return self._named if names == self._names else _digest(names)

    def _key(self, node: int) -> str:
        return self.round_.update_key(client_id(node))


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256(repr(sorted(names)).encode()).hexdigest()


def drop(fitting: dict[int, tuple[Entry, Inspected]], reasons: Mapping[int, str], leave_out: LeaveOut) -> None:
    """Leave out the nodes that have a reason, and remove them from ``fitting``."""
    for node, reason in reasons.items():
        leave_out(node, reason)
        del fitting[node]
