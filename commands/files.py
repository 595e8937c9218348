"""Files and folders: check outputs before the work, and write them whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any


RESULTS = (".h5ad", ".csv", ".html")  # outputs of commands; other files in an input folder belong to the input

LOCK = ".lock"  # lock file of a folder

TABLES = (".csv", ".tsv", ".txt")  # also compressed
COMPRESSED = (".gz", ".bz2", ".xz")

BOOT, NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")  # of Linux
# Name of a temporary file: machine, process, random digits.
TEMPORARY = re.compile(r"\..*?(?P<machine>[0-9a-f]{16})-(?P<process>[0-9]+)-[0-9a-f]{32}\.tmp(\.[^.]*)?", re.DOTALL)

# -- before the work --------------------------------------------------------------------------------------------------


def check_paths(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Refuse an output that is an input or another output, even under another name of the same file.

    Args:
        inputs: Option -> path or paths; words that are not existing files are ignored.
        outputs: Option -> path to write, or None.

    Raises:
        ValueError: If an output would replace an input or another output.
    """
    written = {option: Path(path) for option, path in outputs.items() if path is not None}
    for (option, path), (other, other_path) in combinations(written.items(), 2):
        if is_same(path, other_path):
            raise ValueError(
                f"{option} and {other} are both {str(path)!r}: one would replace the other. Name two files."
            )
    for name, given in inputs.items():
        for word in given if isinstance(given, list | tuple) else [given]:
            source = Path(word) if isinstance(word, str | Path) else None
            if source is None or not exists(source):
                continue
            for option, path in written.items():
                if is_same(path, source) or is_part(path, source):
                    raise ValueError(
                        f"{option} {str(path)!r} would replace a file of the input {name} {str(source)!r}; name "
                        "another file."
                    )


def check_results(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Refuse results if one of them is an input file, even under another name of the file."""
    known = {(found.st_dev, found.st_ino) for path in inputs if exists(path) for found in [path.stat()]}
    for path in filter(exists, outputs):
        if (path.stat().st_dev, path.stat().st_ino) in known:
            raise ValueError(f"The result {str(path)!r} would replace an input of that name; name another folder.")


def exists(path: Path) -> bool:
    """Whether a path exists; False for a text that is too long for a path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_same(path: Path, other: Path) -> bool:
    """Whether two paths are the same file or folder, also through links or other spellings."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return os.path.realpath(path) == os.path.realpath(other)


def is_part(path: Path, source: Path) -> bool:
    """Whether writing `path` would change the input `source`, a folder or a matrix with tables in the same folder."""
    folder = source if source.is_dir() else source.parent
    if not (source.is_dir() or source.name.endswith((".mtx", ".mtx.gz"))):
        return False
    inside = Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
    is_store = any((folder / marker).exists() for marker in (".zgroup", ".zattrs", "zarr.json"))
    return inside and (is_store or path.is_file() and path.suffix not in RESULTS)


def check_file(path: str | os.PathLike, n_bytes: int = 0) -> None:
    """Refuse a file that cannot be written, or a disk with fewer than `n_bytes` free; leave no files behind.

    Temporary files that a killed process left in the folder are removed, see [`remove_leftovers`].

    Raises:
        FileNotFoundError: If the folder of the file does not exist.
        OSError: If the path is a folder or a device, is write-protected, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"The output {str(path)!r} is {'a folder' if path.is_dir() else 'not a file'}; name a file.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of the output {str(path)!r} does not exist; create it first.")
    _try_folder(folder, path)
    remove_leftovers(folder)
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(f"The output {str(path)!r} exists and is protected against writing; name another file.")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(
            f"The output {str(path)!r} takes some {n_bytes:,} bytes, but only {free:,} are free on its disk. "
            "Make room, or name another disk."
        )


def check_folder(path: str | os.PathLike) -> None:
    """Refuse a folder (possibly new) in which no file can be written; leave no files behind.

    Raises:
        OSError: If the path is a file, or lies in a file, or the folder is not writable.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OSError(f"The output folder {str(path)!r} is a file; name another folder.")
    folder = Path(os.path.realpath(path))
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OSError(
            f"The output folder {str(path)!r} lies in {str(folder)!r}, which is a file; name another folder."
        )
    _try_folder(folder, path)
    remove_leftovers(folder)
    remove_leftovers(Path(os.path.realpath(path)).parent)  # of new folders


def _try_folder(folder: Path, path: Path) -> None:
    """Create and remove a file, because permissions alone do not show whether a folder is writable."""
    temporary = folder / temporary_name()
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"The output {str(path)!r} cannot be written ({error.strerror}). Name another place.") from None
    temporary.unlink()


def temporary_name(stem: str = "", suffix: str = "") -> str:
    """Name of a new temporary file or folder of this process, hidden in listings."""
    return f".{stem}{_machine() or 16 * '0'}-{os.getpid()}-{uuid.uuid4().hex}.tmp{suffix}"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a folder whose process was killed.

    Files of running processes stay, and so do files of other machines, of other containers, and of the time before a
    restart of this machine: nothing here shows whether their process still runs. Systems other than Linux keep all.
    """
    machine = _machine()
    if machine is None or not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".")]
    for found in filter(None, map(TEMPORARY.fullmatch, names)):
        if found["machine"] == machine and not _is_running(int(found["process"])):
            path = folder / found[0]
            is_folder = path.is_dir() and not path.is_symlink()
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if is_folder else path.unlink()


@functools.cache
def _machine() -> str | None:
    """16 hexadecimal digits of this machine since its start, and of its container; None without Linux."""
    try:
        parts = socket.gethostname(), BOOT.read_text(encoding="utf-8"), os.readlink(NAMESPACE)
    except OSError:
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True


def table_suffix(path: Path) -> str:
    """Suffix of a table, without the suffix of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


# -- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, keep_existing: bool = False, synced: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, with the same suffix; rename it to `path` if the block succeeds.

    If the block fails, `path` does not change. The folder of `path` must exist. With `keep_existing`, a `path` that
    exists at the end of the block is not replaced. A link is followed.

    The file is synced to disk before it is renamed. Without `synced`, the system decides when to sync: a power loss
    may damage the file, but a killed process does not.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "answer.txt"
    >>> with whole_file(path) as temporary:
    ...     _ = temporary.write_text("42")
    ...     path.exists()
    False
    >>> path.read_text()
    '42'
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(temporary_name(suffix=path.suffix))
    try:
        yield temporary
        if synced:
            _sync_file(temporary)
        if keep_existing:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if synced:
        _sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder in the parent of `path`; rename it to `path` if the block succeeds.

    If another process has created `path` in the meantime, the temporary folder is removed. The parent must exist.
    """
    path = Path(path).absolute()
    temporary = path.with_name(temporary_name(f"{path.name}."))
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


@contextlib.contextmanager
def filled_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder; move its files into `path`, which may exist, if the block succeeds.

    If the block fails, for example on a full disk, `path` does not change. Missing parents are created.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name())
    temporary.mkdir()
    try:
        yield temporary
        files = [entry for entry in sorted(temporary.rglob("*")) if entry.is_file()]
        for file in files:
            _sync_file(file)
        obey_umask(temporary)
        for file in files:
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, created if missing; the system releases the lock when the process ends, even if it is killed.

    On a system or file system without locks, nothing is locked.

    Raises:
        ValueError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"Another command is at work on {folder} ({file.read().strip() or 'unknown'}). Wait until it ends, or "
                "stop it and give this command again to continue."
            ) from None
        except (ImportError, OSError):
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _link(temporary: Path, path: Path) -> None:
    """Name a file unless the name is taken; a rename would replace the existing file."""
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
    """Write `value` as indented JSON, atomically; missing folders are created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike, kind: type | None = None) -> Any:
    """Read a JSON file, and check the type of its content if `kind` (`dict` or `list`) is given.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not JSON, or its content has another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Excel and Windows editors write a byte-order mark
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Write or copy it again.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deep. Write or copy it again.") from None
    if kind is not None and not isinstance(value, kind):
        names = {"dict": "an object", "list": "a list"}
        actual, wanted = (names.get(t.__name__, f"a {t.__name__}") for t in (type(value), kind))
        raise ValueError(f"{path} holds {actual} instead of {wanted}. Write or copy it again.")
    return value


def obey_umask(folder: str | os.PathLike) -> None:
    """Give private files of a folder the permissions of the umask.

    Safetensors writes files that only the owner may read, and colleagues on a shared disk could not load such a
    checkpoint.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            with contextlib.suppress(PermissionError):  # the file belongs to another user
                path.chmod(0o666 & ~umask)
