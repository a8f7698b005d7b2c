"""Notes and warnings of this package, as the command line shows them."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _ToStandardError(logging.Handler):
    """Writes to what sys.stderr is at that moment, so that a progress bar can make room."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record).encode(errors="backslashreplace").decode()  # file names may hold any bytes
        sys.stderr.write(text + "\n")


def show_log(debug: bool) -> None:
    """Show notes and warnings of this package as lines on standard error."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("aclip: %(message)s"))
    logger = logging.getLogger("aclip")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


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
