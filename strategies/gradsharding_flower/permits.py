"""Nodes need no credentials: the server lends URLs, one to read the model, and others to write the update that a node offers.

A node that has trained keeps its update in a file, its *spool*, and replies with an offer: sizes and digests. The server sends a permit,
in another message, and the node writes. No update passes through the server, and no credentials leave it.
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
from gradsharding_flower.trust import load_pinned

SPOOL_KEY = "gradsharding-spool"
"""Key in a node's ``--node-config``: the directory of its spool; by default, one in the system's directory for temporary files."""

MODEL, PIECE, PERMIT = "model", "piece", "permit"
"""Keys in the mod's orders: the model's URL; the bytes of a piece, which asks for an offer; a permit to write the update."""

KEY, STYPE = "gradsharding.offer", "gradsharding.offer.v1"
"""The only key of an ArrayRecord that is an offer, and the serialization type of its array."""

ABANDONED = 7 * 86_400
"""Seconds after which an update in a spool is deleted: no URL to write it is valid for longer."""

WIDEST_RATIO = 8
"""The widest dtype divided by the narrowest: an update may be that many times larger than its model."""

HEADROOM = 64 << 20
"""The most bytes of an update besides its tensors' data."""

PIECE_ENTRY_BYTES = 100
"""The most bytes that a piece takes in an offer."""


class Offered(Value):
    """A node's offer of an update: its bytes, and the order in which its record names the tensors."""

    update: Offer
    names: tuple[str, ...] = Field(max_length=1_000_000)

    def record(self) -> ArrayRecord:
        """The ArrayRecord that is sent."""
        return ArrayRecord({KEY: Array("offer", (), STYPE, self.model_dump_json().encode())})


def find_offer(record: ArrayRecord, names: int) -> Offered | None:
    """Return the offer in ``record``, or None if it holds none; raise InvalidUpdate if the offer is malformed.

    The names of its tensors may take ``names`` bytes at most.
    """
    array = record.get(KEY)
    if array is None or array.stype != STYPE:
        return None
    if len(array.data) > (most := names + PIECE_ENTRY_BYTES * MAX_PARTS):
        raise InvalidUpdate(f"its offer takes {len(array.data)} bytes; at most {most} are accepted, enough for {MAX_PARTS} pieces")
    try:
        return Offered.model_validate_json(array.data)
    except ValidationError as error:
        raise InvalidUpdate(f"a malformed offer: {error.errors()[0]['msg'][:80]}; use the same gradsharding on all nodes") from None


class ByUrl:
    """Access of a node without credentials."""

    def __init__(self, orders: ConfigRecord, context: Context) -> None:
        self._orders = orders
        self._client = client_id(context.node_id)
        chosen = context.node_config.get(SPOOL_KEY)
        spool = Path(str(chosen)) if chosen else Path(tempfile.gettempdir()) / f"gradsharding-spool-{os.getuid()}"
        self._directory = private_directory(spool, f"set {SPOOL_KEY} in the node's --node-config to a directory of its own")
        self._path = self._directory / f"{check_id(str(orders['round']))}.{self._client}.safetensors"

    def load(self, reference: Reference) -> ArrayRecord:
        """Read the model."""
        return load_pinned(reference, UrlSource(reference.source, str(self._orders[MODEL])), reference.source)

    def hand_over(self, arrays: ArrayRecord) -> ArrayRecord:
        """Keep the update in the spool, and return an offer of it."""
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
        """Write the update that was offered. If it is gone, the permit was delivered twice, and the update is written."""
        if not self._path.exists():
            return
        update, permit = (str(self._orders[name]) for name in ("update", PERMIT))
        write(self._path, Offer.model_validate_json(update), Permit.model_validate_json(permit))
        self._path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Delete this node's updates of other rounds of this run, and all that are too old; other runs may use the same spool."""
        run = str(self._orders["round"]).rpartition("-")[0]
        past = {*self._directory.glob(f"{run}-*.{self._client}.*")} - {*self._directory.glob(f"{self._path.stem}.*")}
        for kept in self._directory.glob(f"*.{'[0-9]' * len(self._client)}.*"):
            with contextlib.suppress(FileNotFoundError):  # another node deletes, too
                if kept in past or time.time() - kept.stat().st_mtime > ABANDONED:
                    kept.unlink()


class Lender:
    """The server's side: it lends URLs of its store, and checks that permitted updates arrive."""

    def __init__(self, store: ObjectStore, seconds: int) -> None:
        """Lend URLs that are valid for ``seconds``; raise UserError if the store has no URLs to lend."""
        if not isinstance(store, Lending):
            raise UserError(f"{store.url} cannot lend URLs; use an s3:// store, or nodes that reach the store themselves")
        if not 1 <= seconds <= 7 * 86_400:
            raise UserError(f"URLs cannot be valid for {seconds} seconds; use 1 to {7 * 86_400}, such as {EXPIRES}")
        self._url, self._lender = store.url, store.lender
        self._seconds = seconds
        self._open: dict[str, Grant] = {}

    def orders(self, round_id: str, model: Reference) -> ConfigRecord:
        """Orders for a node without credentials; raise UserError if no URL leads to the model, or as ``try_out`` does."""
        if "://" in model.source:
            raise UserError(f"nodes cannot read {model.source} by a URL of {self._url}; pass the first model as arrays")
        self._lender.try_out()
        url = self._lender.readable(model.source, self._seconds)
        return ConfigRecord({"round": round_id, MODEL: url, PIECE: self._piece_for(model)})

    def doubts(self, timeout: float) -> str | None:
        """Say why late updates of a round of ``timeout`` seconds cannot be permitted; None if nothing is known against it."""
        left = self._lender.seconds_left()
        if left is None or left - self._seconds / 2 >= timeout:
            return None
        return (
            f"the credentials in the environment expire in {left:.0f} s, a round may take {timeout:.0f} s, and URLs should be valid for "
            f"{self._seconds} s: late updates cannot be permitted; use credentials that last longer, or a role's"
        )

    def check(self, offered: Offered, model: Reference) -> None:
        """Raise InvalidUpdate if the update is larger than any of this model, or is cut into other pieces than ordered."""
        pieces, most, piece = offered.update.pieces, most_bytes(model.nbytes), self._piece_for(model)
        if any(cut.size > most for cut in pieces) or offered.update.nbytes > most:  # each before the sum: an offer may hold any number
            offers = sum(min(cut.size, most + 1) for cut in pieces)
            raise InvalidUpdate(f"it offers {offers} bytes or more; at most {most} are permitted for a model of {model.nbytes}")
        if any(cut.size != piece for cut in pieces[:-1]) or not 0 < pieces[-1].size <= piece:
            raise InvalidUpdate(f"it offers {len(pieces)} pieces; all but the last must have {piece} bytes, and the last no more")

    def permit(self, round_id: str, key: str, offered: Offered, model: Reference) -> ConfigRecord:
        """Permit a node to write the update that it offers, under ``key``; raise InvalidUpdate as ``check`` does."""
        self.check(offered, model)
        self._withdraw(key)
        self._open[key] = granted = self._lender.grant(key, offered.update, self._seconds)
        return ConfigRecord({"round": round_id, "update": granted.offer.model_dump_json(), PERMIT: granted.permit.model_dump_json()})

    def settle(self, key: str) -> Peeked:
        """Check that the update permitted under ``key`` has arrived, and return its first bytes; raise InvalidUpdate if it has not."""
        peeked = self._lender.settle(self._open[key])
        del self._open[key]
        return peeked

    def settling(self, offered: Offered, header_bytes: int) -> Usage:
        """The most that permitting and settling an offer asks of the store."""
        return self._lender.settling(offered.update, header_bytes)

    def close(self) -> None:
        """Withdraw the permits of updates that have not arrived."""
        for key in [*self._open]:
            self._withdraw(key)

    def _withdraw(self, key: str) -> None:
        if granted := self._open.pop(key, None):
            self._lender.withdraw(granted)

    def _piece_for(self, model: Reference) -> int:
        return max(self._lender.piece, -(-most_bytes(model.nbytes) // MAX_PARTS))


def most_bytes(nbytes: int) -> int:
    """The most bytes of an update of a model of ``nbytes``."""
    return WIDEST_RATIO * nbytes + HEADROOM
