"""Log a line about work that takes more than a few seconds."""

import contextlib
import logging
import threading
from collections.abc import Iterator


logger = logging.getLogger(__name__)

SECONDS = 3  # seconds before the line


@contextlib.contextmanager
def log_if_slow(what: str) -> Iterator[None]:
    """Log `what` as a warning, which is shown by default, if the block takes longer than `SECONDS`."""
    timer = threading.Timer(SECONDS, logger.warning, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
