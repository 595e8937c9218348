"""Tasks for workers of a Dask cluster, in a module that they import fast."""

import os
import time
from pathlib import Path

import psutil


_KEPT: list[bytes] = []


def die(path: Path) -> str:
    """A task during which the worker dies, unless the file is there already."""
    if not path.exists():
        path.touch()
        os._exit(9)
    if path.name == "poison":
        os._exit(9)
    if path.name == "error":
        raise ValueError("no such cell")
    return path.name


def nap(path: Path) -> int:
    """A task of half a second that writes a file, whole; returns the process."""
    time.sleep(0.5)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(path.name)
    temporary.rename(path)
    return os.getpid()


def fill(n_bytes: float) -> int:
    """A task after which the worker has about so many bytes; returns the process."""
    process = psutil.Process()
    _KEPT.append(os.urandom(int(n_bytes - process.memory_info().rss)))
    return process.pid


def overfill(n_bytes: float) -> int:
    """The same, in a task that goes on for a minute with it."""
    found = fill(n_bytes)
    time.sleep(60)
    return found
