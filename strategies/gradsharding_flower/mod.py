"""The client's side: real arrays for the training function, references for the wire."""

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from gradsharding import ObjectStore, Round, open_store
from gradsharding.errors import ObjectExists
from gradsharding_flower.reference import describe, find, write

_Record = ArrayRecord | ConfigRecord | MetricRecord

ORDERS = "gradsharding"
"""Key of the ConfigRecord by which the strategy switches the mod on, for one message."""

STORE_KEY = "gradsharding-store"
"""Key of a node's own ``--node-config``: the store's URL as seen from this node, where it differs."""


def upload_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Load the global model from the store, and write the update there; only a receipt goes to the server.

    Put it first in ``ClientApp(mods=[upload_mod, ...])``: mods after it, such as differential privacy's, see real arrays
    both ways. A message from another strategy passes untouched, so one ClientApp serves both.
    """
    if ORDERS not in message.content.config_records:
        return call_next(message, context)
    orders = message.content.config_records[ORDERS]
    store = open_store(str(context.node_config.get(STORE_KEY, orders["store"])))
    message.content = RecordDict({key: _loaded(record, store) for key, record in message.content.items() if key != ORDERS})
    reply = call_next(message, context)
    if message.metadata.message_type.startswith(MessageType.TRAIN) and reply.has_content():
        update = Round(store, str(orders["round"])).update_key(client_id(context.node_id))
        reply.content = RecordDict({key: _uploaded(record, update, store) for key, record in reply.content.items()})
    return reply


def orders(store: ObjectStore, round_id: str) -> ConfigRecord:
    """What the server tells the mod: where the store is, and which round this is."""
    return ConfigRecord({"store": store.url, "round": round_id})


def client_id(node_id: int) -> str:
    """A node's id as a client's: so written that sorting by text is sorting by number."""
    return f"{node_id:020d}"


def _loaded(record: _Record, store: ObjectStore) -> _Record:
    reference = find(record) if isinstance(record, ArrayRecord) else None
    return reference.load(store) if reference else record


def _uploaded(record: _Record, key: str, store: ObjectStore) -> _Record:
    if not isinstance(record, ArrayRecord):
        return record
    try:
        return write(key, record, store).record()
    except ObjectExists:  # the message was delivered twice: what was uploaded first stands
        return describe(key, store, tuple(record)).record()
