"""Pause Python's garbage collection while a command starts.

Libraries and a checkpoint create half a million permanent objects, which the collector would search repeatedly.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Disable garbage collection until [`started`] is called, or until the end of the block; once per process.

    Objects that exist at the end of the first start are frozen: the collector never searches them. Later starts in the
    same process have no effect, because a server that runs many commands would otherwise freeze their garbage.
    """
    if not gc.get_freeze_count():
        gc.disable()
    try:
        yield
    finally:
        started()


def started() -> None:
    """Enable garbage collection for objects created from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
