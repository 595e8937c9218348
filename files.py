"""Atomic writing: other processes, and runs after a crash, find a whole file or none."""

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

    The file is synced to disk before it is renamed. If the block fails, `path` stays as it was. The folder of `path`
    must exist. With `keep_existing`, a `path` that exists at the end of the block is not replaced.

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
    _sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path`, with all its files, if the block succeeds.

    A `path` that another process made in the meantime stays, and the new folder is removed. The parent must exist.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for entry in [temporary, *temporary.rglob("*")]:
            (_sync_folder if entry.is_dir() else _sync_file)(entry)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless the name is taken; a rename would replace the other file."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.rename(temporary, path)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON, atomically; missing folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Contents of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
