"""Nodes without credentials: the model comes by a URL; an update is offered, permitted and written, and the server describes it.

A node that has trained keeps its update in a file, its *spool*, and replies with an offer: sizes and digests. The server answers
with a permit, in a message of its own, and the node writes. No update passes the server, and no credentials leave it.
"""

import contextlib
import os
import secrets
import tempfile
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from pydantic import Field, ValidationError

from gradsharding import ObjectStore
from gradsharding.aws.s3.direct import UrlSource, offer, write
from gradsharding.errors import InvalidUpdate, UserError
from gradsharding.format.encode import encode
from gradsharding.planning.manifest import check_id
from gradsharding.planning.plan import MAX_PARTS
from gradsharding.stores.lending import EXPIRES, Grant, Lending, Offer, Permit
from gradsharding.stores.private import private_directory
from gradsharding.stores.protocol import Peeked
from gradsharding.usage import Usage
from gradsharding.value import Value
from gradsharding_flower.arrays import to_raw
from gradsharding_flower.reference import Reference, client_id
from gradsharding_flower.trust import pinned

SPOOL_KEY = "gradsharding-spool"
"""Key of a node's own ``--node-config``: the directory that its updates wait in; by default, one in the system's for temporary files."""

MODEL, PIECE, PERMIT = "model", "piece", "permit"
"""In the mod's orders: a URL of the model; bytes of a piece, which asks for an offer; a permit, which asks to write what was offered."""

KEY, STYPE = "gradsharding.offer", "gradsharding.offer.v1"
"""The one key of an ArrayRecord that is an offer, and its array's serialization type."""

ABANDONED = 7 * 86_400
"""Seconds after which an update in a spool is nobody's: no URL by which it could still be written is good for longer."""

WIDEST = 8
"""No dtype is wider than so many times another: a larger update than the model would be in it is not permitted."""

ROOM = 64 << 20
"""Bytes that an update may take beside its tensors' data."""

A_PIECE = 100
"""Bytes of a piece in an offer, at most."""


class Offered(Value):
    """What a node says of the update that it would write: its bytes, and the order in which its record names the tensors."""

    update: Offer
    names: tuple[str, ...] = Field(max_length=1_000_000)

    def record(self) -> ArrayRecord:
        """The ArrayRecord that travels."""
        return ArrayRecord({KEY: Array("offer", (), STYPE, self.model_dump_json().encode())})


def find_offer(record: ArrayRecord, names: int) -> Offered | None:
    """Read the offer that ``record`` is, or None if it is none; raise InvalidUpdate if it is malformed.

    ``names`` bounds the bytes that the names of its tensors take.
    """
    array = record.get(KEY)
    if array is None or array.stype != STYPE:
        return None
    if len(array.data) > (most := names + A_PIECE * MAX_PARTS):
        raise InvalidUpdate(f"its offer takes {len(array.data)} bytes, where {most} are enough for {MAX_PARTS} pieces")
    try:
        return Offered.model_validate_json(array.data)
    except ValidationError as error:
        raise InvalidUpdate(f"a malformed offer: {error.errors()[0]['msg'][:80]}; use the same gradsharding on all nodes") from None


class ByUrl:
    """The node's side: what its mod does with a model and an update."""

    def __init__(self, orders: ConfigRecord, context: Context) -> None:
        self._orders = orders
        self._client = client_id(context.node_id)
        given = context.node_config.get(SPOOL_KEY)
        place = Path(str(given)) if given else Path(tempfile.gettempdir()) / f"gradsharding-spool-{os.getuid()}"
        self._directory = private_directory(place, f"set {SPOOL_KEY} in the node's --node-config to a directory of its own")
        self._path = self._directory / f"{check_id(str(orders['round']))}.{self._client}.safetensors"

    def load(self, reference: Reference) -> ArrayRecord:
        """Read the model."""
        return pinned(reference, UrlSource(reference.source, str(self._orders[MODEL])), reference.source)

    def hand_over(self, arrays: ArrayRecord) -> ArrayRecord:
        """Keep the update in its spool; give the offer of it."""
        self._tidy()
        piece = self._orders[PIECE]
        assert isinstance(piece, int)
        new = self._path.with_suffix(f".{secrets.token_hex(8)}.new")
        with new.open("wb") as file:
            file.writelines(encode({name: to_raw(name, array) for name, array in arrays.items()})[1])
        offered = Offered(update=offer(new, piece), names=tuple(arrays))
        new.replace(self._path)
        return offered.record()

    def write(self) -> None:
        """Write what was offered; if it is not there any more, a permit has come twice: the server knows what has arrived."""
        if not self._path.exists():
            return
        update, permit = (str(self._orders[name]) for name in ("update", PERMIT))
        write(self._path, Offer.model_validate_json(update), Permit.model_validate_json(permit))
        self._path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Delete what this node kept of other rounds of this run, and what anyone has abandoned: other runs may use the same spool now."""
        run = str(self._orders["round"]).rpartition("-")[0]
        past = {*self._directory.glob(f"{run}-*.{self._client}.*")} - {*self._directory.glob(f"{self._path.stem}.*")}
        for kept in self._directory.glob(f"*.{'[0-9]' * len(self._client)}.*"):
            with contextlib.suppress(FileNotFoundError):  # another node tidies, too
                if kept in past or time.time() - kept.stat().st_mtime > ABANDONED:
                    kept.unlink()


class Lender:
    """The server's side: it permits, in the store's name, what a node offers, and sees that it arrives."""

    def __init__(self, store: ObjectStore, seconds: int) -> None:
        """Lend for ``seconds``; raise UserError if the store knows no URLs."""
        if not isinstance(store, Lending):
            raise UserError(f"{store.url} can give no URLs; use an s3:// store, or nodes that reach the store by themselves")
        if not 1 <= seconds <= 7 * 86_400:
            raise UserError(f"URLs cannot be good for {seconds} seconds; use 1 to {7 * 86_400}, such as {EXPIRES}")
        self._url, self._lender = store.url, store.lender
        self._seconds = seconds
        self._open: dict[str, Grant] = {}

    def orders(self, round_id: str, model: Reference) -> ConfigRecord:
        """What the mod is told beside the model's reference; raise UserError if no URL can lead to the model, or as ``try_out`` does."""
        if "://" in model.source:
            raise UserError(f"nodes cannot reach {model.source} by a URL of {self._url}; give the first model's arrays themselves")
        self._lender.try_out()
        url = self._lender.readable(model.source, self._seconds)
        return ConfigRecord({"round": round_id, MODEL: url, PIECE: self._piece_for(model)})

    def doubts(self, timeout: float) -> str | None:
        """Say why late updates of a round of ``timeout`` seconds cannot be permitted; None if they can, as far as is known."""
        left = self._lender.seconds_left()
        if left is None or left - self._seconds / 2 >= timeout:
            return None
        return (
            f"the credentials in the environment end in {left:.0f} s, a round may take {timeout:.0f} s, and URLs should be good for "
            f"{self._seconds} s: updates that come late cannot be permitted; use credentials that last longer, or a role's"
        )

    def check(self, offered: Offered, model: Reference) -> None:
        """Raise InvalidUpdate if no update of the model can be so large, or if it is not cut as nodes are told to."""
        pieces, most, piece = offered.update.pieces, most_bytes(model.nbytes), self._piece_for(model)
        if any(one.size > most for one in pieces) or offered.update.nbytes > most:  # each before their sum: any number may be in an offer
            offers = sum(min(one.size, most + 1) for one in pieces)
            raise InvalidUpdate(f"it offers {offers} bytes or more, where the model has {model.nbytes} and {most} are permitted")
        if any(one.size != piece for one in pieces[:-1]) or not 0 < pieces[-1].size <= piece:
            raise InvalidUpdate(f"it offers {len(pieces)} pieces that are not of {piece} bytes each, and one for the rest")

    def permit(self, round_id: str, key: str, offered: Offered, model: Reference) -> ConfigRecord:
        """Permit what a node offers, under ``key``; raise InvalidUpdate if it may not be."""
        self.check(offered, model)
        self._withdraw(key)
        self._open[key] = granted = self._lender.grant(key, offered.update, self._seconds)
        return ConfigRecord({"round": round_id, "update": granted.offer.model_dump_json(), PERMIT: granted.permit.model_dump_json()})

    def settle(self, key: str) -> Peeked:
        """See that what was permitted under ``key`` has arrived, and give its first bytes; raise InvalidUpdate if it has not."""
        peeked = self._lender.settle(self._open[key])
        del self._open[key]
        return peeked

    def settling(self, offered: Offered, header_bytes: int) -> Usage:
        """What permitting and settling an offer asks of the store, at most."""
        return self._lender.settling(offered.update, header_bytes)

    def close(self) -> None:
        """Withdraw what was permitted and has not arrived."""
        for key in [*self._open]:
            self._withdraw(key)

    def _withdraw(self, key: str) -> None:
        if granted := self._open.pop(key, None):
            self._lender.withdraw(granted)

    def _piece_for(self, model: Reference) -> int:
        return max(self._lender.piece, -(-most_bytes(model.nbytes) // MAX_PARTS))


def most_bytes(nbytes: int) -> int:
    """Bytes that an update of a model of ``nbytes`` may have."""
    return WIDEST * nbytes + ROOM
