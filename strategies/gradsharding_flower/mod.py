"""On a node the training function sees arrays, and the wire carries references: the mod translates between them."""

import traceback

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from gradsharding import ObjectStore, Round, open_store
from gradsharding.errors import ObjectExists
from gradsharding.usage import FIGURES, Usage, counting, total
from gradsharding_flower import trust
from gradsharding_flower.permits import PERMIT, PIECE, ByUrl
from gradsharding_flower.reference import Reference, client_id, find_reference, reference_to, write_arrays
from gradsharding_flower.replies import one_line

ORDERS = "gradsharding"
"""Key of the ConfigRecord by which the strategy switches the mod on for a message."""

FAILED = "failed"
"""Key of the error in the mod's report: it travels with the usage figures, for which Flower's own error has no field."""

STORE_KEY = "gradsharding-store"
"""Key in a node's ``--node-config``: the store's URL as seen from this node, if it differs from the server's."""


def upload_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Load the global model from the store, and write the update to it; only a receipt goes to the server.

    Put it first in ``ClientApp(mods=[upload_mod, ...])``: the mods after it, such as differential privacy, see real arrays
    both ways. Messages of other strategies pass unchanged, so one ClientApp serves both. If the server lends URLs, the node
    needs no credentials: the update waits in a file until the server permits it. An exception goes to the node's standard
    error, and to the server together with the node's usage of the store.
    """
    if ORDERS not in message.content.config_records:
        return call_next(message, context)
    failed: dict[str, str] = {}
    with counting() as ledger:
        try:
            reply = _run(message.content.config_records[ORDERS], message, context, call_next)
        except Exception as error:  # noqa: BLE001 - a client may fail in any way; Flower's own runtime catches the same
            traceback.print_exc()
            reply, failed = Message(RecordDict(), reply_to=message), {FAILED: one_line(f"{type(error).__name__}: {error}")}
    if reply.has_content():
        reply.content[ORDERS] = ConfigRecord(total(ledger.spent).model_dump() | failed)
    return reply


def take_usage(asked: Message, reply: Message) -> tuple[Usage | None, Message]:
    """Split a reply into the usage that its node reports, None if it reports nothing plausible, and the rest.

    The reply of a failed node is returned as Flower's error.
    """
    if not reply.has_content() or not isinstance(report := reply.content.pop(ORDERS, None), ConfigRecord):
        return None, reply
    figures = {name: report.get(name) for name in FIGURES}
    plausible = all(type(figure) is int and 0 <= figure < 1 << 53 for figure in figures.values())
    if FAILED in report:
        reply = Message(Error(code=0, reason=str(report[FAILED])), reply_to=asked)
    return Usage.model_validate(figures) if plausible else None, reply


def _run(orders: ConfigRecord, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Carry out the server's orders, around the training."""
    if PERMIT in orders:
        ByUrl(orders, context).write()
        return Message(RecordDict(), reply_to=message)
    access = ByUrl(orders, context) if PIECE in orders else ByStore(orders, context)
    content = RecordDict({key: record for key, record in message.content.items() if key != ORDERS})
    for key, record in content.array_records.items():
        if reference := find_reference(record):
            content[key] = access.load(reference)
    message.content = content
    reply = call_next(message, context)
    if message.metadata.message_type.startswith(MessageType.TRAIN) and reply.has_content():
        reply.content = RecordDict(
            {key: access.hand_over(record) if isinstance(record, ArrayRecord) else record for key, record in reply.content.items()}
        )
    return reply


def store_orders(store: ObjectStore, round_id: str) -> ConfigRecord:
    """Orders for a node that reaches the store itself: the store's URL, and the round."""
    return ConfigRecord({"store": store.url, "round": round_id})


class ByStore:
    """Access of a node that reaches the store itself."""

    def __init__(self, orders: ConfigRecord, context: Context) -> None:
        self._config = context.node_config
        self._store = open_store(str(context.node_config.get(STORE_KEY, orders["store"])))
        self._key = Round(self._store, str(orders["round"])).update_key(client_id(context.node_id))

    def load(self, reference: Reference) -> ArrayRecord:
        """Read the model."""
        return trust.load_model(reference, self._store, self._config)

    def hand_over(self, arrays: ArrayRecord) -> ArrayRecord:
        """Write the update, and return its receipt."""
        try:
            return write_arrays(self._key, arrays, self._store).record()
        except ObjectExists:  # the message was delivered twice: the first upload counts
            return reference_to(self._key, self._store, tuple(arrays)).record()
