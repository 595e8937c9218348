"""Python's search for garbage, put off while a command starts.

Libraries and a checkpoint are half a million objects that stay. Python would search them again and again as they come.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Search for no garbage until [`started`] is called, at the end of the block at the latest; once in a process.

    What is there at the end of the first start is never searched. A server that runs commands in its process would
    keep the garbage of all, if each had a start.
    """
    if not gc.get_freeze_count():
        gc.disable()
    try:
        yield
    finally:
        started()


def started() -> None:
    """Search for garbage again, among what comes from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
