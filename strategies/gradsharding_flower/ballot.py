"""The updates of a round vote on its layout, in constant memory: at most two layouts are kept, however many updates come.

A layout with the names and shapes of the model that was sent wins over any other; among those, the one most updates have wins.
"""

import threading
from collections import Counter
from typing import NamedTuple

from gradsharding.errors import LayoutMismatch
from gradsharding.format.layout import Layout
from gradsharding.stores.protocol import Stat
from gradsharding.stores.updates import Update


class Inspected(NamedTuple):
    """The facts kept about an update whose header was read."""

    base: int
    """Offset of its data section."""
    stat: Stat
    digest: str
    """Digest of its layout."""


class Ballot:
    """Counts updates, in any order and from any thread; the winner does not depend on either."""

    def __init__(self, like: Layout) -> None:
        """Start with ``like``, the layout of the model that was sent."""
        self.like = like
        self._shapes = dict(zip(like.names, like.shapes, strict=True))
        self._counts = Counter[str]()
        self._mismatches: dict[str, str] = {}
        self._leaders: dict[bool, Layout] = {}
        """The most frequent layout so far: at True, of those with the model's names and shapes; at False, of the others."""
        self._lock = threading.Lock()

    def enter(self, update: Update) -> Inspected:
        """Count an update. Its layout is kept only while it is the most frequent."""
        layout = update.layout
        digest = layout.digest
        with self._lock:
            if digest not in self._mismatches:
                self._mismatches[digest] = difference(self.like, layout, "the model", "its update")
            self._counts[digest] += 1
            fits = dict(zip(layout.names, layout.shapes, strict=True)) == self._shapes
            leader = self._leaders.get(fits)
            if leader is None or self._rank(digest) > self._rank(leader.digest):
                self._leaders[fits] = layout
        return Inspected(update.base, update.stat, digest)

    @property
    def elected(self) -> Layout:
        """The most frequent layout that has the model's names and shapes, or of all if none has; in a tie, the model's own."""
        return self._leaders.get(True) or self._leaders.get(False) or self.like

    def problem(self, update: Inspected) -> str:
        """Say how an update's tensors differ from the winner's; empty if they do not."""
        if update.digest == self.elected.digest:
            return ""
        return self._mismatches[update.digest] or difference(self.elected, self.like, "most updates", "its own")

    def _rank(self, digest: str) -> tuple[int, bool, str]:
        return self._counts[digest], digest == self.like.digest, digest


def difference(layout: Layout, other: Layout, owner: str, other_owner: str) -> str:
    """Name the first tensor in which two layouts differ; empty if they are equal."""
    try:
        layout.require_same(other, owner, other_owner)
    except LayoutMismatch as error:
        return error.message
    return ""
