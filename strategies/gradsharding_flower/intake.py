"""A round takes in what nodes say, node by node: each becomes a contribution, or a sentence that says why it is none."""

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
from gradsharding_flower.ballot import Ballot, Seen
from gradsharding_flower.books import Books
from gradsharding_flower.contributions import Contribution, LeaveOut
from gradsharding_flower.grid import AT_ONCE, FollowUp, Step, Work
from gradsharding_flower.mod import ORDERS, heard
from gradsharding_flower.permits import Lender, Offered
from gradsharding_flower.reference import Reference, client_id, encoded
from gradsharding_flower.replies import Kinds, Most, Said, blaming, common, line, others, read_training
from gradsharding_flower.weighing import too_far


class Receipt(NamedTuple):
    """What is kept of a receipt until its update's header is read."""

    version: str
    tensors: int
    """Of its tensors."""
    names: str
    """A digest of its tensors' names, in no order."""


class Entry(NamedTuple):
    """What a node adds to the round, as far as it is known."""

    weight: float
    kinds: Kinds
    content: RecordDict
    update: Receipt | Seen


@dataclass
class Intake:
    """Takes in a round's replies to training."""

    round_: Round
    model: Reference
    layout: Layout
    """Of the model that was sent."""
    weighted_by_key: str
    lender: Lender | None
    books: Books
    direct: set[int]
    """Nodes with the mod, of all rounds: those whose receipts or offers have come are added."""
    refused: dict[int, str] = field(default_factory=dict)
    """Why nodes that have answered are left out."""

    def __post_init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._ballot = Ballot(self.layout)
        self._most = Most.of(self.layout)
        self._names = frozenset(self.model.names)
        self._named = _digest(self._names)

    @property
    def elected(self) -> Layout:
        """The tensors of the contributions."""
        return self._ballot.elected

    def take(self, asked: Message, reply: Message) -> Step:
        """Take a reply in: write arrays that came with it to the store, permit what it offers, note its receipt."""
        node = asked.metadata.dst_node_id
        usage, reply = heard(asked, reply)
        self.books.told(usage)
        try:
            said = read_training(reply, self.weighted_by_key, self._most)
            match said.update:
                case Reference():
                    self.direct.add(node)
                    self.books.nodes_planned += self.round_.store.charges.put(self.layout.nbytes + len(self.layout.header()))
                    return self._note(asked, said, self._receipt(node, said.update))
                case Offered() if self.lender:
                    self.direct.add(node)
                    return self._permitted(self.lender, asked, said, said.update)
                case ArrayRecord():
                    return self._note(asked, said, self._relayed(node, said.update))
            raise InvalidUpdate("it offers an update, and this store permits none; use the same gradsharding on all nodes")
        except StoreRefused:  # ours, not the node's: so would every update end
            raise
        except (GradShardingError, OSError) as error:
            return self._refuse(asked, error)

    def contributions(self, leave_out: LeaveOut) -> list[Contribution]:
        """Give the contributions, sorted by node; ``leave_out`` is told of the other nodes that have answered.

        All have the most common metrics, the tensors of the model that was sent, if any has them, with the most common dtypes, and weights
        that go together.
        """
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="gradsharding-collect") as pool:
            seen = dict(zip(self._entries, pool.map(carried(self._seen), self._entries.items()), strict=True))
        fitting: dict[int, tuple[Entry, Seen]] = {}
        for node, one in sorted(seen.items()):
            if isinstance(one, str):
                self.refused[node] = one
            else:
                fitting[node] = self._entries[node], one
        for node, reason in sorted(self.refused.items()):
            leave_out(node, reason)
        due = common(entry.kinds for entry, _ in fitting.values())
        without(fitting, {n: others(entry.kinds, due) for n, (entry, _) in fitting.items() if due and entry.kinds != due}, leave_out)
        without(fitting, {n: line(why) for n, (_, one) in fitting.items() if (why := self._ballot.problem(one))}, leave_out)
        without(fitting, too_far({node: entry.weight for node, (entry, _) in fitting.items()}), leave_out)
        return [
            Contribution(node, entry.content, entry.weight, self._place(node), Update(self.elected, one.base, one.stat))
            for node, (entry, one) in fitting.items()
        ]

    def _relayed(self, node: int, arrays: ArrayRecord) -> Seen:
        """Write arrays that came with a reply to the store, so that the server lets go of them."""
        with blaming():
            layout, buffers = encoded(arrays)
        base = memoryview(buffers[0]).nbytes
        if base > self._most.header:
            raise InvalidUpdate(f"its update has a header of {base} bytes, where {self._most.header} are a few times that of the model")
        stat = self.round_.store.put(self._place(node), buffers)
        self.books.plan(self.round_.store, self.round_.store.charges.put(stat.size))
        return self._ballot.enter(Update(layout, base, stat))

    def _receipt(self, node: int, reference: Reference) -> Receipt:
        if reference.source != self._place(node):
            raise InvalidUpdate(f"its receipt is for {quoted(reference.source)}, where {self._place(node)} is due")
        names = frozenset(reference.names)
        if len(names) != len(reference.names):
            raise InvalidUpdate(f"its receipt names {len(reference.names)} tensors, some of them twice; name each once")
        return Receipt(reference.version[:200], len(names), self._naming(names))

    def _permitted(self, lender: Lender, asked: Message, said: Said, offered: Offered) -> Step:
        """Permit a node to write what it offers; when it says that it has, see what arrived."""
        node = asked.metadata.dst_node_id
        place = self._place(node)
        lender.check(offered, self.model)
        self.refused[node] = "it was permitted to write its update, and has not said in time that it did"

        def permitted(permit: Callable[[], ConfigRecord]) -> Step:
            group, kind = asked.metadata.group_id, asked.metadata.message_type
            try:
                message = Message(RecordDict({ORDERS: permit()}), dst_node_id=node, message_type=kind, group_id=group)
            except StoreRefused:  # as above
                raise
            except (GradShardingError, OSError) as error:
                return self._refuse(asked, error)
            return FollowUp(message, told)

        def told(answer: Message) -> Step:
            usage, answer = heard(asked, answer)
            self.books.told(usage)
            if answer.has_error():
                return self._refuse(asked, InvalidUpdate(f"it could not write its update: {line(str(answer.error.reason))}"))
            return Work(lambda: self._arrived(lender, place), arrived)

        def arrived(seen: Callable[[], Seen]) -> Step:
            try:
                found = seen()
            except (GradShardingError, OSError) as error:
                return self._refuse(asked, error)
            self.books.nodes_planned += Usage(puts=len(offered.update.pieces), bytes_written=offered.update.nbytes)
            self.books.plan(self.round_.store, lender.settling(offered, found.base))
            del self.refused[node]
            return self._note(asked, said, found)

        return Work(lambda: lender.permit(self.round_.id, place, offered, self.model), permitted)

    def _arrived(self, lender: Lender, place: str) -> Seen:
        """See that what was permitted has arrived."""
        peeked = lender.settle(place)
        with blaming():
            return self._ballot.enter(inspect(place, self.round_.store, peeked, largest_header=self._most.header))

    def _seen(self, one: tuple[int, Entry]) -> Seen | str:
        """Read the header of an update that a receipt tells of, and see that the receipt tells the truth."""
        node, entry = one
        if isinstance(entry.update, Seen):
            return entry.update
        place, receipt = self._place(node), entry.update
        try:
            with blaming():
                update = inspect(place, self.round_.store, largest_header=self._most.header)
                if update.stat.version != receipt.version:
                    raise ChangedObject(f"{place} is at version {update.stat.version}, not {quoted(receipt.version)} as in its receipt")
                if receipt.names != self._naming(frozenset(update.layout.names)):
                    raise InvalidUpdate(
                        f"its receipt names {receipt.tensors} tensors, others than the {len(update.layout.names)} in {place}"
                    )
                return self._ballot.enter(update)
        except GradShardingError as error:
            return error.message

    def _note(self, asked: Message, said: Said, update: Receipt | Seen) -> Message:
        self._entries[asked.metadata.dst_node_id] = Entry(said.weight, said.kinds, said.content, update)
        return Message(said.content, reply_to=asked)

    def _refuse(self, asked: Message, error: Exception) -> Message:
        reason = error.message if isinstance(error, GradShardingError) else f"its update could not be written: {error}"
        self.refused[asked.metadata.dst_node_id] = line(reason)
        return Message(Error(code=0, reason=line(reason)), reply_to=asked)

    def plan_headers(self, kept: Iterable[Contribution]) -> None:
        """Enter what it takes to read the headers of updates that only receipts tell of."""
        told = [one for one in kept if isinstance(self._entries[one.node].update, Receipt)]
        self.books.plan(self.round_.store, *(inspection(one.update.base, one.update.layout.nbytes) for one in told))

    def _naming(self, names: frozenset[str]) -> str:
        return self._named if names == self._names else _digest(names)

    def _place(self, node: int) -> str:
        return self.round_.update_key(client_id(node))


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256(repr(sorted(names)).encode()).hexdigest()


def without(fitting: dict[int, tuple[Entry, Seen]], reasons: Mapping[int, str], leave_out: LeaveOut) -> None:
    """Leave nodes out, each for its reason."""
    for node, reason in reasons.items():
        leave_out(node, reason)
        del fitting[node]
