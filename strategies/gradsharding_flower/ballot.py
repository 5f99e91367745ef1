"""Which tensors a round's updates hold is counted without keeping what each holds: two layouts are kept, whatever nodes send.

The tensors' names and shapes are those of the model that was sent, if any update has them; dtypes go by the majority.
"""

import threading
from collections import Counter
from typing import NamedTuple

from gradsharding.errors import LayoutMismatch
from gradsharding.format.layout import Layout
from gradsharding.stores.protocol import Stat
from gradsharding.stores.updates import Update


class Seen(NamedTuple):
    """What is kept of an update whose header was read."""

    base: int
    stat: Stat
    nbytes: int
    """Of its data section."""
    digest: str
    """Of its layout."""


class Ballot:
    """Takes updates in, in any order and from any thread; who is elected does not depend on it."""

    def __init__(self, like: Layout) -> None:
        """Begin with the layout of the model that was sent."""
        self.like = like
        self._shapes = dict(zip(like.names, like.shapes, strict=True))
        self._counts = Counter[str]()
        self._mismatches: dict[str, str] = {}
        self._leaders: dict[bool, Layout] = {}
        """By whether it fits the model: the layout that most updates have so far."""
        self._lock = threading.Lock()

    def enter(self, update: Update) -> Seen:
        """Count an update, and let go of its layout, unless it leads."""
        layout = update.layout
        digest = layout.digest
        with self._lock:
            if digest not in self._mismatches:
                self._mismatches[digest] = mismatch(self.like, layout, "the model", "its update")
            self._counts[digest] += 1
            fits = dict(zip(layout.names, layout.shapes, strict=True)) == self._shapes
            leader = self._leaders.get(fits)
            if leader is None or self._rank(digest) > self._rank(leader.digest):
                self._leaders[fits] = layout
        return Seen(update.base, update.stat, layout.nbytes, digest)

    @property
    def elected(self) -> Layout:
        """The layout that most updates have, of those that fit the model; of all, if none fits. Of equals, the model's own."""
        return self._leaders.get(True) or self._leaders.get(False) or self.like

    def problem(self, seen: Seen) -> str:
        """Say how an update's tensors differ from those elected; empty if they do not."""
        if seen.digest == self.elected.digest:
            return ""
        return self._mismatches[seen.digest] or mismatch(self.elected, self.like, "most updates", "its own")

    def _rank(self, digest: str) -> tuple[int, bool, str]:
        return self._counts[digest], digest == self.like.digest, digest


def mismatch(one: Layout, other: Layout, mine: str, theirs: str) -> str:
    """Say in which tensor two layouts differ; empty if in none."""
    try:
        one.require_same(other, mine, theirs)
    except LayoutMismatch as error:
        return error.message
    return ""
