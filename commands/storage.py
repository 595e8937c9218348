"""Addresses of object stores and hubs (`s3://`, `gs://`, `hf://`, ...) instead of paths, by fsspec.

`staged` replaces the addresses of a command line by paths of a staging folder. Inputs are downloaded before the work.
Outputs are uploaded after the work, if it succeeded: an object appears whole or not at all, and the files that make a
folder valid are uploaded last.

Each command line has its own staging folder in `SCMMGPT_STAGING` (default: the cache of the user), which workers of a
cluster must see under the same path. The folder is removed after success. After a failure, it is kept if it has
partitions or a build to continue.

Credentials come from the environment, as the library of each store expects them, and are never part of an address.
"""

import atexit
import contextlib
import functools
import gc
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scmmgpt.commands.errors import REWORDINGS, explain, run_command
from scmmgpt.commands.files import lock_folder


SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "memory")
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://(.+)")
OUTPUTS = ("-o", "--output", "--output_dir", "--table", "--evidence")  # options that name what is written
GROWING = ("index", "prepare")  # commands that add to a folder that exists
UNFINISHED = ("*.parts", ".build")  # unfinished work that the same command continues
OBJECTS_BETWEEN = 20_000  # threshold of garbage collection; with Python's 700, imports take 4.7 s instead of 4.1 s
LAST = ("config.json", "index.json", "manifest.json")  # files that make a folder valid, uploaded last


def root_folder() -> Path:
    """The folder of all staging folders."""
    return Path(os.environ.get("SCMMGPT_STAGING") or Path.home() / ".cache" / "scmmgpt" / "staging")


def run_staged(name: str, words: Sequence[str], command: Callable[[list[str]], int]) -> int:
    """Run a command with the addresses of its command line replaced by paths; return the exit status.

    Args:
        name: Name of the command, for errors of transfers.
        words: Command line.
        command: Function of the words that returns the exit status; outputs are uploaded for status 0 or 3.
    """
    # Libraries create a million objects; garbage collection would search them during imports and at exit.
    gc.set_threshold(OBJECTS_BETWEEN)
    atexit.register(gc.freeze)
    if not any(ADDRESS.fullmatch(word.partition("=")[2] if word.startswith("-") else word) for word in words):
        return command(list(words))

    def work() -> int:
        with staged(words) as (paths, upload):
            status = command(paths)
            if status in (0, 3):
                upload()
        return status

    return run_command(name, work, debug="--debug" in words, extra="storage")


@contextlib.contextmanager
def staged(words: Sequence[str]) -> Iterator[tuple[list[str], Callable[[], None]]]:
    """Download the inputs of a command line; yield the words with paths, and a function that uploads the outputs.

    Raises:
        ValueError: If another process runs the same command line.
    """
    folder = root_folder() / hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    paths, outputs, before, is_output = [], {}, "", False
    rename = functools.partial(as_addresses, folder=folder)
    lock = contextlib.ExitStack()
    lock.enter_context(lock_folder(folder))
    REWORDINGS.append(rename)
    try:
        for word in words:
            option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
            address = ADDRESS.fullmatch(value)
            if address is None:
                paths.append(word)
                before = word if word.startswith("-") else ""
                continue
            is_output = (option or before) in OUTPUTS
            path = folder / address[1] / address[2].strip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_output or words[0] in GROWING:
                download(value, path, may_lack=is_output)
            if is_output:
                outputs[path] = value, _state(path)
            paths.append(f"{option}{equals}{path}")
            before = "" if is_output else before

        def upload_all() -> None:
            for path, (target, known) in outputs.items():
                if path.exists():
                    upload(path, target, known)
            shutil.rmtree(folder, ignore_errors=True)

        yield paths, upload_all
    finally:
        REWORDINGS.remove(rename)
        if not any(True for pattern in UNFINISHED for _ in folder.rglob(pattern)):
            shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def as_addresses(text: str, folder: Path) -> str:
    """Replace the paths of a staging folder in a text by addresses.

    >>> as_addresses("/tmp/x/s3/bucket/cells.h5ad is empty", Path("/tmp/x"))
    's3://bucket/cells.h5ad is empty'
    """
    return re.sub(rf"{re.escape(str(folder))}/({'|'.join(SCHEMES)})/", r"\1://", text)


def _store(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    import fsspec

    scheme = address.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(scheme, str(error))
        raise ImportError(f"{scheme}:// needs {package}. Run `pip install {package}`.") from None


@contextlib.contextmanager
def _transfer(what: str, address: str) -> Iterator[None]:
    """Turn errors of a store into one `OSError` that names the address."""
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # each store raises its own types
        why = " ".join(explain(error).split())[:200] or type(error).__name__
        raise OSError(f"{address} cannot be {what} ({type(error).__name__}: {why}).") from None


def download(address: str, path: Path, *, may_lack: bool = False) -> None:
    """Copy a file, or all files of a folder, from an address to a path; skip complete local files.

    Raises:
        FileNotFoundError: If the address does not exist, unless `may_lack`.
        OSError: If the store refuses, or the disk has too little space.
    """
    with _transfer("downloaded", address):
        store, place = _store(address)
        place = place.rstrip("/")
        listing = {place: store.info(place)} if store.isfile(place) else store.find(place, detail=True)
        files = {name: int(info["size"] or 0) for name, info in listing.items() if info["type"] == "file"}
        targets = {name: path / name[len(place) :].strip("/") if name != place else path for name in files}
        missing = [n for n, t in targets.items() if not t.is_file() or files[n] and t.stat().st_size != files[n]]
        needed, free = sum(files[name] for name in missing), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(f"it has {needed:,} bytes, but {free:,} are free in {root_folder()}; set SCMMGPT_STAGING")
        for name in missing:
            targets[name].parent.mkdir(parents=True, exist_ok=True)
            temporary = targets[name].with_name(f".{targets[name].name}.tmp")
            store.get_file(name, str(temporary))
            with contextlib.suppress(NotImplementedError):  # commands recognise a file by its modification time
                changed = store.modified(name).timestamp()
                os.utime(temporary, (changed, changed))
            os.replace(temporary, targets[name])
    if not files and not may_lack:
        raise FileNotFoundError(f"There is nothing at {address}. Correct the address.")


def _state(path: Path) -> dict[Path, int]:
    """Files of a path -> modification times (ns)."""
    files = [path] if path.is_file() else path.rglob("*")
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def upload(path: Path, address: str, known: dict[Path, int]) -> None:
    """Copy a file, or the new and changed files of a folder, to an address.

    Object stores show an object once it is complete. Hidden files, such as locks, are not uploaded.

    Args:
        known: State of the files before the work; see [`_state`].
    """
    with _transfer("uploaded", address):
        store, place = _store(address)
        files = [file for file, time in _state(path).items() if known.get(file) != time]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        for file in sorted(files, key=lambda file: (file.name in LAST, file)):
            target = place.rstrip("/") + "/" + file.relative_to(path).as_posix() if path.is_dir() else place
            with contextlib.suppress(NotImplementedError):
                store.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.put_file(str(file), target)
