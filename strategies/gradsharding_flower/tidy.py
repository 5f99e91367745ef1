"""A failed clean-up leaves objects behind and a line in the log; it never fails the work that it follows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gradsharding.errors import GradShardingError

log = logging.getLogger("flwr")


@contextmanager
def tidying(leftovers: str) -> Iterator[None]:
    """Log an error of a store that fails or refuses to delete ``leftovers``, and go on."""
    try:
        yield
    except (GradShardingError, OSError) as error:
        log.warning("%s could not be deleted: %s; they take space and do no harm", leftovers, error)
