"""Notes and warnings of this package, as the command line shows them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_only() -> Iterator[None]:
    """Leave notes out, where what they say is printed anyway or was said before."""
    logger = logging.getLogger("aclip")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
