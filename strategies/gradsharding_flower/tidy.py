"""Tidying up that fails leaves something behind, and a line in the log; it never ends what it was done for."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gradsharding.errors import GradShardingError

log = logging.getLogger("flwr")


@contextmanager
def tidying(what: str) -> Iterator[None]:
    """Go on if a store fails, or refuses, to delete ``what``."""
    try:
        yield
    except (GradShardingError, OSError) as error:
        log.warning("%s could not be deleted: %s; what is left takes room, and does no harm", what, error)
