"""The client's side: real arrays for the training function, references for the wire."""

import traceback

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from gradsharding import ObjectStore, Round, open_store
from gradsharding.errors import ObjectExists
from gradsharding.usage import FIGURES, Usage, counting, total
from gradsharding_flower import trust
from gradsharding_flower.permits import PERMIT, PIECE, ByUrl
from gradsharding_flower.reference import Reference, client_id, describe, find, write
from gradsharding_flower.replies import line

ORDERS = "gradsharding"
"""Key of the ConfigRecord by which the strategy switches the mod on, for one message."""

FAILED = "failed"
"""In what the mod tells beside its figures: why its node failed. Flower's own error has no room for figures."""

STORE_KEY = "gradsharding-store"
"""Key of a node's own ``--node-config``: the store's URL as seen from this node, where it differs."""


def upload_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Load the global model from the store, and write the update there; only a receipt goes to the server.

    Put it first in ``ClientApp(mods=[upload_mod, ...])``: mods after it, such as differential privacy's, see real arrays
    both ways. A message from another strategy passes untouched, so one ClientApp serves both. Where the server lends its
    rights by URLs, the node needs no credentials: the update waits in a file until the server has permitted it. What is raised
    goes to the node's standard error, and to the server, which so learns what the node has asked of the store in vain.
    """
    if ORDERS not in message.content.config_records:
        return call_next(message, context)
    failed: dict[str, str] = {}
    with counting() as ledger:
        try:
            reply = _obeyed(message.content.config_records[ORDERS], message, context, call_next)
        except Exception as error:  # noqa: BLE001 - as Flower's own runtime does, whatever a client does wrong is its answer
            traceback.print_exc()
            reply, failed = Message(RecordDict(), reply_to=message), {FAILED: line(f"{type(error).__name__}: {error}")}
    if reply.has_content():
        reply.content[ORDERS] = ConfigRecord(total(ledger.spent).model_dump() | failed)
    return reply


def heard(asked: Message, reply: Message) -> tuple[Usage | None, Message]:
    """Take out of a reply what its node says that it has asked of the store, None if it says nothing that could be so.

    The reply of a node that has failed comes back as Flower's error.
    """
    if not reply.has_content() or not isinstance(told := reply.content.pop(ORDERS, None), ConfigRecord):
        return None, reply
    figures = {name: told.get(name) for name in FIGURES}
    possible = all(type(figure) is int and 0 <= figure < 1 << 53 for figure in figures.values())
    if FAILED in told:
        reply = Message(Error(code=0, reason=str(told[FAILED])), reply_to=asked)
    return Usage.model_validate(figures) if possible else None, reply


def _obeyed(orders: ConfigRecord, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Do what the server ordered, around the training."""
    if PERMIT in orders:
        ByUrl(orders, context).write()
        return Message(RecordDict(), reply_to=message)
    way = ByUrl(orders, context) if PIECE in orders else ByStore(orders, context)
    content = RecordDict({key: record for key, record in message.content.items() if key != ORDERS})
    for key, record in content.array_records.items():
        if reference := find(record):
            content[key] = way.load(reference)
    message.content = content
    reply = call_next(message, context)
    if message.metadata.message_type.startswith(MessageType.TRAIN) and reply.has_content():
        reply.content = RecordDict(
            {key: way.hand_over(record) if isinstance(record, ArrayRecord) else record for key, record in reply.content.items()}
        )
    return reply


def orders(store: ObjectStore, round_id: str) -> ConfigRecord:
    """What the server tells the mod of a node that reaches the store: where it is, and which round this is."""
    return ConfigRecord({"store": store.url, "round": round_id})


class ByStore:
    """What the mod of a node that reaches the store does with a model and an update."""

    def __init__(self, orders: ConfigRecord, context: Context) -> None:
        self._config = context.node_config
        self._store = open_store(str(context.node_config.get(STORE_KEY, orders["store"])))
        self._key = Round(self._store, str(orders["round"])).update_key(client_id(context.node_id))

    def load(self, reference: Reference) -> ArrayRecord:
        """Read the model."""
        return trust.load(reference, self._store, self._config)

    def hand_over(self, arrays: ArrayRecord) -> ArrayRecord:
        """Write the update; give its receipt."""
        try:
            return write(self._key, arrays, self._store).record()
        except ObjectExists:  # the message was delivered twice: what was uploaded first stands
            return describe(self._key, self._store, tuple(arrays)).record()
