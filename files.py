"""Writing files whole: a reader, or a run that comes after a crash, meets all of a file or none of it."""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file, beside `path` and of its suffix, that becomes `path` if the block succeeds.

    The file is on the disk, not only in a cache, before it gets its name. If the block fails, `path` stays as it was.
    Permissions are those that the process gives to new files.

    Args:
        path: Where the file is to be. Its folder has to exist.
        keep_existing: Whether a `path` that is there by the end of the block stays, instead of being replaced.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "answer.txt"
    >>> with whole_file(path) as temporary:
    ...     _ = temporary.write_text("42")
    ...     path.exists()
    False
    >>> path.read_text()
    '42'
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        yield temporary
        _sync_file(temporary)
        if keep_existing:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path`, with all its files, if the block succeeds.

    A `path` that another process has made in the meantime stays, and the new folder is dropped.

    Args:
        path: Where the folder is to be. Its parent has to exist.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for entry in [temporary, *temporary.rglob("*")]:
            (sync_folder if entry.is_dir() else _sync_file)(entry)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless the name is taken, which a rename cannot do."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.rename(temporary, path)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON, whole; folders that are missing are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Return what a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
