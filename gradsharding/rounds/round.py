"""A round is the objects under its prefix, each created once; which of them exist is its state. All keys are made here.

rounds/ID/round.json              the round, and where its result goes
rounds/ID/updates/CLIENT.safetensors
rounds/ID/receipts/CLIENT.json    one client's contribution
rounds/ID/manifest.json           sealed: the contributions, frozen
rounds/ID/plan.json               the plan, and the upload its parts go to
rounds/ID/partials/…              sums that one function leaves for another, until the result is there
rounds/ID/result.json             published: the last object, and the only one that says "done"
results/ID.safetensors            the result, unless the round names another place: it outlives the round's other objects
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy.typing as npt

from gradsharding.arithmetic.rules import MEAN, Rule
from gradsharding.arithmetic.weights import check_weight, integral_weights
from gradsharding.errors import (
    ChangedObject,
    DuplicateClient,
    InvalidId,
    MissingObject,
    ObjectExists,
    StoreRefused,
    TooFewClients,
    UserError,
    quoted,
)
from gradsharding.format.dtypes import Buffer
from gradsharding.format.encode import Raw, encode
from gradsharding.format.record import Record, read_record
from gradsharding.planning.manifest import Manifest, check_id
from gradsharding.planning.plan import Plan
from gradsharding.planning.projection import FIRST
from gradsharding.planning.task import NonFinitePolicy, Term
from gradsharding.rounds.records import RECORD, Begun, PlanRecord, Published, Receipt, ResultRecord, RoundRecord
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.updates import Update, data_digest, inspect, inspection
from gradsharding.stores.urls import exists, locate
from gradsharding.usage import SHARED, Usage, together

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what is made in it is its owner's alone
"""Where files are memory, on Linux: partial sums may pass through it between the processes of one machine."""

UNCHANGING = {FIRST, "manifest.json"}
"""Records that are written once and never deleted while their round is in use."""

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class Round:
    """A handle on one round in a store; all it keeps is what it has read or written of records that never change.

    >>> from gradsharding import MemoryStore
    >>> import numpy as np
    >>> round = Round.create(MemoryStore(), "r1")
    >>> round.submit("alice", {"w": np.float32([1, 2])}, weight=120).client
    'alice'
    >>> [(t.client, t.weight) for t in round.seal().terms]
    [('alice', 120)]
    """

    store: ObjectStore
    id: str
    _known: dict[str, Record] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Records that never change, by name."""
    _found: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Those that were there when this handle would have written them."""

    def __post_init__(self) -> None:
        """Raise InvalidId for what may not become part of a key."""
        check_id(self.id)

    @classmethod
    def create(cls, store: ObjectStore, id: str, *, output: str | None = None) -> Self:  # noqa: A002
        """Create a round, or find it if it was created alike; ``output`` is a reference, by default ``results/ID.safetensors``.

        Raise InvalidId, ObjectExists if the round is there and writes to another place, or StoreRefused if the store replaces what it is
        asked to create.
        """
        round_ = cls(store, id)
        found = round_._create(FIRST, RoundRecord(id=id, output=output or round_.result_key()))
        due = [output] if output else [round_.result_key(), round_.key("result.safetensors")]  # the first releases wrote to the second
        if found.output not in due:
            raise ObjectExists(f"round {id} exists and writes to {found.output}, not {due[0]}; use another id")
        return round_

    def key(self, name: str) -> str:
        """Key of one of the round's objects."""
        return f"rounds/{self.id}/{name}"

    def result_key(self) -> str:
        """Key under which a result belongs: beside the rounds, which a store may clear away after some days."""
        return f"results/{self.id}.safetensors"

    def update_key(self, client: str) -> str:
        """Key under which a client's update belongs."""
        return self.key(f"updates/{check_id(client)}.safetensors")

    def submit(self, client: str, arrays: Mapping[str, "npt.NDArray[Any] | Raw"], weight: float) -> Receipt:
        """Write a client's arrays as one object, and its receipt; the same again, after a crash say, changes nothing.

        Raise InvalidId, InvalidWeight, InvalidUpdate, DuplicateClient if the client gave another update, or UserError if the round is
        sealed without the client.
        """
        key, weight = self.update_key(client), check_weight(weight, client)
        layout, data = encode(arrays)
        self._require_not_left_out(client)
        try:
            stat = self.store.put(key, data)
        except ObjectExists:
            stat = self.store.head(key)
            if _digest(self.store.get(key, 0, stat.size)) != _digest(data):
                raise DuplicateClient(f"client {client} has an update in round {self.id} already; the first one stays") from None
        return self._receive(client, key, weight, Update(layout, memoryview(data[0]).nbytes, stat))

    def refer(self, client: str, source: str, weight: float, *, version: str | None = None, update: Update | None = None) -> Receipt:
        """Record an update that is already in a store. ``source`` is a reference; only its header is read.

        ``update`` is what ``inspect`` said of it, where that is known. Raise ChangedObject if the object is not at
        ``version``, DuplicateClient if the client gave another update, UserError if the round is sealed without the client, be it
        meanwhile. The manifest decides: a seal that had listed the receipts, and not yet written it, is seen by who asks again only.
        """
        check_id(client)
        weight = check_weight(weight, client)
        self._require_not_left_out(client)
        update = update or inspect(source, self.store)
        if version not in (None, update.stat.version):
            raise ChangedObject(f"{source} of client {client} is at version {update.stat.version}, not {version}: it was written again")
        return self._receive(client, source, weight, update)

    def _receive(self, client: str, source: str, weight: float, update: Update) -> Receipt:
        """Record an update, and see that the round was not sealed meanwhile."""
        layout, base, stat = update
        receipt = Receipt(client=client, source=source, version=stat.version, base=base, weight=weight, layout=layout.digest)
        if self._create(f"receipts/{client}.json", receipt) != receipt:
            raise DuplicateClient(f"client {client} is in round {self.id} already, with another update or weight; use one id per client")
        self._require_not_left_out(client)
        return receipt

    def _require_not_left_out(self, client: str) -> None:
        """Raise UserError if the round is sealed without the client, whatever receipt it has: the manifest decides."""
        if (manifest := self.sealed()) and client not in {term.client for term in manifest.terms}:
            raise UserError(f"round {self.id} is sealed, and client {client} is not in it; submit to the next round")

    def receipts(self) -> list[Receipt]:
        """All receipts, sorted by client."""
        keys = [key for key, _ in self.store.list(self.key("receipts/"))]
        found = (read_record(Receipt, data, self._place(key)) for key, data in self.store.fetch(keys))
        return sorted(found, key=lambda receipt: receipt.client)

    def seal(self, *, leave_out: Iterable[str] = ()) -> Manifest:
        """Freeze the set of contributions; a sealed round stays as it is.

        ``leave_out`` has the ids of clients that should not be in it. Raise TooFewClients if there is none, LayoutMismatch naming the
        tensor that differs, InvalidWeight, or InvalidRecord naming a receipt that is none.
        """
        return self.sealed() or self._collect(check_ids(leave_out))

    def sealed_by(self) -> tuple[Manifest, dict[str, Usage]]:
        """Seal; give the manifest, and what getting it and the round's own record takes, reckoned: not what was counted."""
        home = self.store.charges
        itself = Usage() if FIRST in self._known else Usage(gets=1, bytes_read=RECORD + len(self.output))
        if "manifest.json" in self._known:
            return self.seal(), {home.kind: itself}
        if found := self.sealed():
            return found, {home.kind: itself + Usage(gets=1, bytes_read=found.json_bytes)}
        manifest = self._collect(frozenset())
        clients, size = len(manifest.terms), manifest.json_bytes
        records = itself + Usage(gets=1 + clients, puts=1, bytes_read=clients * RECORD + size, bytes_written=size) + home.list(clients)
        where = locate(manifest.terms[0].source, self.store)[0].charges.kind
        return manifest, together({home.kind: records}, {where: inspection(len(manifest.layout.header()), manifest.layout.nbytes)})

    def _collect(self, leave_out: AbstractSet[str]) -> Manifest:
        receipts = [receipt for receipt in self.receipts() if receipt.client not in leave_out]
        if not receipts:
            raise TooFewClients(f"round {self.id} has no update to aggregate; submit at least one")
        first = receipts[0]
        layout = inspect(first.source, self.store).layout
        for other in receipts[1:]:
            if other.layout != first.layout:
                layout.require_same(inspect(other.source, self.store).layout, first.client, other.client)
        weights = integral_weights({receipt.client: receipt.weight for receipt in receipts})
        terms = (Term(client=r.client, source=r.source, version=r.version, base=r.base, weight=weights[r.client]) for r in receipts)
        return self.freeze(Manifest(round=self.id, layout=layout, terms=tuple(terms)))

    def sealed(self) -> Manifest | None:
        """The contributions, if the round is sealed."""
        return self._find("manifest.json", Manifest)

    def freeze(self, manifest: Manifest) -> Manifest:
        """Record the contributions; those recorded first stay, and are given back.

        >>> from gradsharding import MemoryStore, Round
        >>> from gradsharding.planning.manifest import Contribution, Manifest
        >>> from gradsharding.stores.updates import inspect
        >>> store = MemoryStore()
        >>> _ = store.put("a", encode({"w": [1.5]})[1])
        >>> Round(store, "r").freeze(Manifest.of("r", [Contribution("a", "a", inspect("a", store), weight=3)])).terms[0].client
        'a'
        """
        return self._create("manifest.json", manifest)

    def begin(
        self, plan: Plan, *, nonfinite: NonFinitePolicy = "raise", overwrite: bool = False, published: "Published | None" = None
    ) -> "Begun":
        """Record ``plan`` and begin its upload.

        An upload under way for the same plan and treatment of NaN goes on; one for another plan (of fewer shards, say) is
        given up, and its parts with it. ``published`` is what the round was found to have published, if that was looked for. Raise
        ObjectExists, unless ``overwrite``, if something else is where the result belongs.
        """
        target, key = locate(self.output, self.store)
        found = self._find("plan.json", PlanRecord)
        if (published or self.published()).stale:  # the result's object is gone, and so is its upload
            self.store.delete([self.key("result.json"), self.key("plan.json")])
            found = None
        if found and (found.digest, found.nonfinite) == (plan.digest, nonfinite):
            return Begun(found.upload, new=False)
        if found:
            self.abandon()
        if not overwrite and exists(target, key):
            raise ObjectExists(f"{self.output} is there already; let the round write to another place, or allow it to overwrite")
        upload = target.begin(key)
        record = PlanRecord(
            topology=plan.topology, rule=str(plan.rule), tasks=plan.functions, digest=plan.digest, nonfinite=nonfinite, upload=upload
        )
        kept = self._create("plan.json", record).upload
        if kept != upload:  # another process was faster
            target.abort(key, upload)
        return Begun(kept, new=kept == upload, dropped=found.tasks if found else 0)

    def forget_plan(self) -> None:
        """Drop a plan whose upload is gone."""
        self.store.delete([self.key("plan.json")])

    def partials(self, upload: str, *, shared_memory: bool = False) -> str:
        """Reference below which the partial sums of an upload's plan lie: in the store, or in the memory of this machine."""
        name = hashlib.sha256(f"{self.store.url}\n{upload}".encode()).hexdigest()[:16]
        return f"{SHARED}://{SHARED_MEMORY}/gradsharding-{name}" if shared_memory else self.key(f"partials/{name}")

    def forget_partials(self, upload: str, keys: Sequence[str] | None = None) -> None:
        """Delete the partial sums of an upload's plan, wherever they are: those under ``keys``, where it is known which they are."""
        shutil.rmtree(SHARED_MEMORY / self.partials(upload, shared_memory=True).rpartition("/")[2], ignore_errors=True)
        self.store.delete([key for key, _ in self.store.list(self.partials(upload) + "/")] if keys is None else keys)

    def abandon(self) -> None:
        """Give up the plan under way, if there is one, and the parts written for it."""
        if found := self._find("plan.json", PlanRecord):
            target, key = locate(self.output, self.store)
            target.abort(key, found.upload)
            self.forget_partials(found.upload)
            self.forget_plan()

    def publish(self, manifest: Manifest, version: str, rule: Rule = MEAN) -> ResultRecord:
        """Record the finished result: the round is done. If the rule vouches for its bits, it is read once, for its digest."""
        terms = manifest.terms
        record = ResultRecord(
            source=self.output,
            version=version,
            clients=tuple(term.client for term in terms),
            weight=sum(term.weight for term in terms),
            layout=manifest.layout,
            rule=rule,
            digest=data_digest(self.output, self.store, version=version, layout=manifest.layout) if rule.vouches else None,
        )
        return self._create("result.json", record)

    def result(self) -> ResultRecord | None:
        """The published result; None if there is none, or its object is gone, or was replaced or has another header since."""
        return self.published().record

    def published(self) -> "Published":
        """What the round has published, and whether that is gone: its version is looked at, and its header is read."""
        if not (record := self._find("result.json", ResultRecord)):
            return Published(None)
        (target, key), header = locate(record.source, self.store), record.layout.header()
        with contextlib.suppress(MissingObject, ChangedObject):
            if target.head(key).version == record.version:
                there = b"".join(map(bytes, target.get(key, 0, len(header), version=record.version)))
                return Published(record) if there == header else Published(None, stale=True, altered=True)
        return Published(None, stale=True)

    @property
    def output(self) -> str:
        """Reference of the object that the round writes."""
        return self._read(FIRST, RoundRecord).output

    @property
    def found(self) -> frozenset[str]:
        """Names of the records that this handle would have written, and that were there, from an earlier call say."""
        return frozenset(self._found)

    def _create(self, name: str, value: _R) -> _R:
        """Create a record; where there is one already, that one holds."""
        key, data = self.key(name), value.model_dump_json().encode()
        try:
            self.store.put(key, [data])
            if name == FIRST and self.store.charges.doubted:
                _see_it_refuse(self.store, key, data)
        except ObjectExists:
            self._found.add(name)
            return self._read(name, type(value))
        return self._keep(name, value)

    def _find(self, name: str, kind: type[_R]) -> _R | None:
        try:
            return self._read(name, kind)
        except MissingObject:
            return None

    def _read(self, name: str, kind: type[_R]) -> _R:
        if isinstance(known := self._known.get(name), kind):
            return known
        [(_, data)] = self.store.fetch([self.key(name)])
        return self._keep(name, read_record(kind, data, self._place(self.key(name))))

    def _place(self, key: str) -> str:
        """Say where a record lies."""
        return f"{key!r} in {self.store.url}"

    def _keep(self, name: str, value: _R) -> _R:
        if name in UNCHANGING:
            self._known[name] = value
        return value


def try_out(store: ObjectStore, id: str) -> None:  # noqa: A002
    """See that a store can keep rounds, by one of this id of which nothing stays; raise StoreRefused as ``Round.create`` does."""
    store.delete([Round.create(store, id).key(FIRST)])


def _see_it_refuse(store: ObjectStore, key: str, data: bytes) -> None:
    """Raise StoreRefused if the store replaces the object that was just created, on which all rests that a round decides; it is deleted."""
    try:
        store.put(key, [data, b"\n"])  # other bytes: the same might be taken for an answer that was lost
    except ObjectExists:
        return
    store.delete([key])
    raise StoreRefused(
        f"{store.url} replaces objects that it is asked to create (If-None-Match: *), so that what a round has decided could be lost; "
        "nothing was kept: use an S3 server that deploy/ENDPOINTS.md says to work",
        key=key,
    )


def _digest(data: Iterable[Buffer]) -> bytes:
    sha = hashlib.sha256()
    for buffer in data:
        sha.update(buffer)
    return sha.digest()


def check_ids(names: object) -> frozenset[str]:
    """Give several ids back as a set; raise InvalidId, for a text too, whose letters nobody means."""
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise InvalidId(f"{quoted(names)} should be several ids; write ['ann', 'bob'], say")
    return frozenset(map(check_id, names))
