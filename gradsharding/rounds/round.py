"""A round is the objects under its prefix, each created once; its state is which of them exist. All keys are made here.

rounds/ID/round.json              the round, and where its result goes
rounds/ID/updates/CLIENT.safetensors
rounds/ID/receipts/CLIENT.json    one client's contribution
rounds/ID/manifest.json           sealed: the contributions, frozen
rounds/ID/plan.json               the plan, and the upload its parts go to
rounds/ID/partials/…              partial sums that one function leaves for another, until the result is published
rounds/ID/result.json             published: the last object, which alone means that the round is done
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

from gradsharding.arithmetic.rules import Rule
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
"""The directory whose files are memory, on Linux: processes of one machine can pass partial sums through it."""

UNCHANGING = {FIRST, "manifest.json"}
"""Records that are never deleted while their round is in use."""

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class Round:
    """A handle on one round in a store; it keeps only records that never change, once it has read or written them.

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
    """Names of the records that already existed when this handle was about to write them."""

    def __post_init__(self) -> None:
        """Raise InvalidId if the id may not become part of a key."""
        check_id(self.id)

    @classmethod
    def create(cls, store: ObjectStore, id: str, *, output: str | None = None) -> Self:  # noqa: A002
        """Create a round, or find it if it was created the same way; ``output`` is a reference, by default ``results/ID.safetensors``.

        Raise InvalidId, ObjectExists if the round exists and writes to another place, or StoreRefused if the store does not refuse to
        create an object that exists.
        """
        round_ = cls(store, id)
        found = round_._create(FIRST, RoundRecord(id=id, output=output or round_.result_key()))
        due = [output] if output else [round_.result_key(), round_.key("result.safetensors")]  # the first releases wrote to the second
        if found.output not in due:
            raise ObjectExists(f"round {id} exists and writes to {found.output}, not {due[0]}; use another id")
        return round_

    def key(self, name: str) -> str:
        """Return the key of one of the round's objects."""
        return f"rounds/{self.id}/{name}"

    def result_key(self) -> str:
        """Return the key of the result by default: outside the rounds, which a store may delete after some days."""
        return f"results/{self.id}.safetensors"

    def update_key(self, client: str) -> str:
        """Return the key of a client's update."""
        return self.key(f"updates/{check_id(client)}.safetensors")

    def submit(self, client: str, arrays: Mapping[str, "npt.NDArray[Any] | Raw"], weight: float) -> Receipt:
        """Write a client's arrays as one object, and its receipt; the same call again, after a crash for example, changes nothing.

        Raise InvalidId, InvalidWeight, InvalidUpdate, DuplicateClient if the client has submitted another update, or UserError if the
        round was sealed without the client.
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

        ``update`` is what ``inspect`` returned for it, if that is known. Raise ChangedObject if the object is not at ``version``,
        DuplicateClient if the client has another update in the round, or UserError if the round was sealed without the client, even during
        this call. The manifest decides: of a seal that has listed the receipts but not yet written it, only a later call can know.
        """
        check_id(client)
        weight = check_weight(weight, client)
        self._require_not_left_out(client)
        update = update or inspect(source, self.store)
        if version not in (None, update.stat.version):
            raise ChangedObject(f"{source} of client {client} is at version {update.stat.version}, not {version}: it was written again")
        return self._receive(client, source, weight, update)

    def _receive(self, client: str, source: str, weight: float, update: Update) -> Receipt:
        """Record an update, and check that the round was not sealed without it meanwhile."""
        layout, base, stat = update
        receipt = Receipt(client=client, source=source, version=stat.version, base=base, weight=weight, layout=layout.digest)
        if self._create(f"receipts/{client}.json", receipt) != receipt:
            raise DuplicateClient(f"client {client} is in round {self.id} already, with another update or weight; use one id per client")
        self._require_not_left_out(client)
        return receipt

    def _require_not_left_out(self, client: str) -> None:
        """Raise UserError if the round is sealed without the client: the manifest decides, not the receipt."""
        if (manifest := self.sealed()) and client not in {term.client for term in manifest.terms}:
            raise UserError(f"round {self.id} is sealed, and client {client} is not in it; submit to the next round")

    def receipts(self) -> list[Receipt]:
        """Return all receipts, sorted by client."""
        keys = [key for key, _ in self.store.list(self.key("receipts/"))]
        found = (read_record(Receipt, data, self._place(key)) for key, data in self.store.fetch(keys))
        return sorted(found, key=lambda receipt: receipt.client)

    def seal(self, *, leave_out: Iterable[str] = ()) -> Manifest:
        """Freeze the set of contributions; a sealed round stays as it is.

        ``leave_out`` has the ids of clients to exclude. Raise TooFewClients if no contribution remains, LayoutMismatch naming the tensor
        that differs, InvalidWeight, or InvalidRecord naming a receipt that cannot be read as one.
        """
        return self.sealed() or self._collect(check_ids(leave_out))

    def sealed_by(self) -> tuple[Manifest, dict[str, Usage]]:
        """Seal; return the manifest, and the requests that getting it and the round's own record takes, as a plan reckons them."""
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
        """Return the manifest; None unless the round is sealed."""
        return self._find("manifest.json", Manifest)

    def freeze(self, manifest: Manifest) -> Manifest:
        """Record the contributions and return them; if the round is already sealed, return those it was sealed with.

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

        An upload in progress for the same plan and treatment of NaN continues; one for another plan, with fewer slices for example, is
        abandoned with its parts. ``published`` is the answer of ``published()``, if it is known. Raise ObjectExists, unless ``overwrite``,
        if another object has the result's key.
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
        kept = self._create("plan.json", record)
        if kept.upload != upload:  # another process was faster
            target.abort(key, upload)
            if (kept.digest, kept.nonfinite) != (plan.digest, nonfinite):  # with a plan whose parts must not be mixed with this one's
                return self.begin(plan, nonfinite=nonfinite, overwrite=overwrite)
        return Begun(kept.upload, new=kept.upload == upload, dropped=found.tasks if found else 0)

    def forget_plan(self) -> None:
        """Delete the record of a plan whose upload is gone."""
        self.store.delete([self.key("plan.json")])

    def partials(self, upload: str, *, shared_memory: bool = False) -> str:
        """Return the reference below which the partial sums of an upload's plan lie: in the store, or in this machine's memory."""
        name = hashlib.sha256(f"{self.store.url}\n{upload}".encode()).hexdigest()[:16]
        return f"{SHARED}://{SHARED_MEMORY}/gradsharding-{name}" if shared_memory else self.key(f"partials/{name}")

    def forget_partials(self, upload: str, keys: Sequence[str] | None = None) -> None:
        """Delete the partial sums of an upload's plan, in memory and in the store; ``keys`` names those in the store, if they are known."""
        shutil.rmtree(SHARED_MEMORY / self.partials(upload, shared_memory=True).rpartition("/")[2], ignore_errors=True)
        self.store.delete([key for key, _ in self.store.list(self.partials(upload) + "/")] if keys is None else keys)

    def abandon(self) -> None:
        """Abandon the plan in progress, if there is one, and the parts written for it."""
        if found := self._find("plan.json", PlanRecord):
            target, key = locate(self.output, self.store)
            target.abort(key, found.upload)
            self.forget_partials(found.upload)
            self.forget_plan()

    def publish(self, manifest: Manifest, version: str, rule: Rule) -> ResultRecord:
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
        """Return the published result; None if there is none, or its object is gone, was replaced or has another header."""
        return self.published().record

    def published(self) -> "Published":
        """Return what the round has published, and whether it is gone: its version is checked, and its header is read."""
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
        """Names of the records that already existed when this handle was about to write them, from an earlier call for example."""
        return frozenset(self._found)

    def _create(self, name: str, value: _R) -> _R:
        """Create a record and return it; if there is one already, return that one."""
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
        """Return a phrase on where a record lies."""
        return f"{key!r} in {self.store.url}"

    def _keep(self, name: str, value: _R) -> _R:
        if name in UNCHANGING:
            self._known[name] = value
        return value


def try_out(store: ObjectStore, id: str) -> None:  # noqa: A002
    """Check that a store can keep rounds, by creating one of this id and deleting it; raise StoreRefused as ``Round.create`` does."""
    store.delete([Round.create(store, id).key(FIRST)])


def _see_it_refuse(store: ObjectStore, key: str, data: bytes) -> None:
    """Delete a new object and raise StoreRefused if the store replaces it when it is created again: a round relies on that it does not."""
    try:
        store.put(key, [data, b"\n"])  # other bytes: the same ones might look like a retry after a lost answer
    except ObjectExists:
        return
    store.delete([key])
    raise StoreRefused(
        f"{store.url} replaces objects that it is asked to create (If-None-Match: *), so that a round's records could be lost; "
        "nothing was kept: use an S3 server that deploy/ENDPOINTS.md lists as working",
        key=key,
    )


def _digest(data: Iterable[Buffer]) -> bytes:
    sha = hashlib.sha256()
    for buffer in data:
        sha.update(buffer)
    return sha.digest()


def check_ids(names: object) -> frozenset[str]:
    """Return several ids as a set; raise InvalidId, also for a text, whose letters nobody means as ids."""
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise InvalidId(f"{quoted(names)} must be a list of ids, such as ['ann', 'bob']")
    return frozenset(map(check_id, names))
