"""Write the result of a command, without loading matrices if possible.

Commands read matrices in chunks and never change them. The result of an `.h5ad` file, a Zarr store or a SOMA is
therefore a copy with new `obs`, `obsm` and `uns`, and memory does not grow with the matrices. Cells of other formats
are in memory.
"""

import contextlib
import itertools
import logging
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import anndata
import h5py
import numpy as np
import pandas as pd

from scmmgpt.commands.files import check_file, table_suffix, whole_file
from scmmgpt.commands.progress import log_if_slow
from scmmgpt.commands.writing import make_writable, nullable_strings, size_in_memory, writable_frame
from scmmgpt.readers.cell_files import CellFile
from scmmgpt.readers.mtx_folders import is_zarr
from scmmgpt.readers.soma import is_soma
from scmmgpt.records_scmmgpt import in_few_lines


logger = logging.getLogger(__name__)

Cells: TypeAlias = anndata.AnnData | CellFile


ENTRIES_AT_ONCE = 2**22  # entries per read of an array of a Zarr store
SHOWN = 3  # files that a message names
ROWS_AT_ONCE = 50_000  # rows per write of a table
ROWS_COPIED = 4096  # rows per copy of a matrix
BYTES_COPIED = 2**24  # bytes per copy of a file


@dataclass
class RowBlocks:
    """A float32 array `(n_rows, n_columns)` in blocks of rows; rows without a block are NaN.

    Args:
        shape: `(n_rows, n_columns)`.
        blocks: Function that returns an iterator over `(first row, block)`, in order.
        totals: Column sums of each block, without NaN, `(n_blocks, n_columns)`.
    """

    shape: tuple[int, int]
    blocks: Callable[[], Iterator[tuple[int, np.ndarray]]]
    totals: np.ndarray

    def to_memory(self) -> np.ndarray:
        """Load the whole array."""
        array = np.empty(self.shape, dtype=np.float32)
        self.fill(array)
        return array

    def fill(self, array: Any) -> None:
        """Copy the blocks into an array in memory or in a file; rows without a block become NaN."""
        end = 0
        for start, block in self.blocks():
            if start > end:
                array[end:start] = np.nan
            end = start + len(block)
            array[start:end] = block
        if end < self.shape[0]:
            array[end:] = np.nan


def can_copy(path: Path) -> bool:
    """Whether the result can be a copy of a path: an `.h5ad` file of anndata 0.7 or newer, a Zarr store or a SOMA."""
    if path.is_dir() or is_soma(path):
        return is_zarr(path) or is_soma(path)
    if not path.is_file():
        return False
    try:
        with h5py.File(path) as file:
            is_cells = "obs" in file and "var" in file and "mod" not in file
            # Before anndata 0.7, each table was one dataset, to which columns can't be added.
            return is_cells and not any(isinstance(file.get(name), h5py.Dataset) for name in ("obs", "obsm", "uns"))
    except OSError:  # another format, or a truncated or locked file, for which `read_file` raises the error
        return False


def rehearse(cells: Cells, source: Path, output: Path) -> None:
    """Before the computation, change the parts that `.h5ad` cannot store, and check the free space for `output`."""
    if isinstance(cells, CellFile):
        changes: list[str] = []
        cells.obs = writable_frame(cells.obs, "obs", changes)
        for change in in_few_lines(changes):
            logger.warning(change)
        files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
        check_file(output, sum(file.stat().st_size for file in files))
    else:
        make_writable(cells)
        check_file(output, size_in_memory(cells))


class CopiesAhead:
    """Copies `.h5ad` files in a thread during the computation; results are added to the copies later.

    Args:
        copies: File -> path of its copy.
    """

    def __init__(self, copies: Mapping[Path, Path]) -> None:
        self.copies = copies
        self._made: dict[Path, Future[None]] = {source: Future() for source in copies}
        self._stopped = threading.Event()
        for copy in copies.values():
            copy.parent.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start copying; call this after the check of free space, because copies use that space."""
        threading.Thread(target=self._copy, daemon=True).start()  # a failing command does not wait for a daemon thread

    def _copy(self) -> None:
        for source, copy in self.copies.items():
            if self._stopped.is_set():
                return
            try:
                _copy_file(source, copy)
                self._made[source].set_result(None)
            except OSError as error:
                self._made[source].set_exception(error)

    def take(self, source: Path) -> Path | None:
        """Wait for the copy of a file and return its path; None for a source without a copy."""
        if source not in self.copies:
            return None
        self._made[source].result()
        return self.copies[source]

    def remove(self) -> None:
        """Stop copying, and remove all unused copies."""
        self._stopped.set()
        for copy in self.copies.values():
            copy.unlink(missing_ok=True)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file with direct writes on Linux, which take less CPU time and evict no cached pages.

    The buffer is private and has huge pages, because small shared pages take several times the CPU time.
    """
    if sys.platform == "linux":
        with (
            contextlib.suppress(OSError),
            source.open("rb", buffering=0) as given,
            mmap.mmap(-1, BYTES_COPIED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer,
        ):
            buffer.madvise(mmap.MADV_HUGEPAGE)
            copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
            try:
                while n := given.readinto(buffer):
                    n_written = -(-n // mmap.PAGESIZE) * mmap.PAGESIZE  # direct writes need whole pages
                    if os.write(copy, memoryview(buffer)[:n_written]) < n_written:
                        raise OSError("The disk is full.")
                os.ftruncate(copy, given.tell())
                return
            finally:
                os.close(copy)
    shutil.copyfile(source, target)  # for other systems and file systems; a full disk fails here again


def write_cells(cells: Cells, source: Path, output: Path, copies: CopiesAhead | None = None) -> None:
    """Write cells with their results, and all content of their source, to an `.h5ad` file, whole or not at all."""
    with log_if_slow(f"Writing {output}"), whole_file(output) as temporary:
        write_result(cells, source, temporary, None if copies is None else copies.take(source))


def table_of(cells: Cells, columns: Sequence[str] = (), *, short: bool = False) -> pd.DataFrame:
    """Table of the given columns of `obs`, and of the columns that a command added.

    Args:
        columns: Columns that come first.
        short: Whether to remove the prefix `scmmgpt_` of the added columns, unless the short name is taken.
    """
    added = [name for name in cells.obs.columns if name.startswith("scmmgpt_")]
    table = cells.obs[list(dict.fromkeys([*columns, *added]))].copy()
    names = {name: name.removeprefix("scmmgpt_") for name in added}
    return table.rename(columns={name: new for name, new in names.items() if new not in table}) if short else table


@contextlib.contextmanager
def after(outputs: Sequence[Path]) -> Iterator[None]:
    """Let an error in this block, which writes tables, say that the cells are written already."""
    try:
        yield
    except Exception as error:
        shown = ", ".join(map(str, outputs[:SHOWN])) + (", ..." if len(outputs) > SHOWN else "")
        error.add_note(f"The cells with all results are written ({shown}), the table is not.")
        raise


def write_table(path: Path, rows: Any, index_label: str | None = None) -> None:
    """Write a table, whole or not at all.

    Args:
        path: Path; the suffixes determine separator and compression.
        rows: A data frame, or an iterable of mappings, which is written in parts. The first `ROWS_AT_ONCE` mappings
            determine the columns.
        index_label: Name of the column for the index of a data frame; None leaves the index out.
    """
    separator = "\t" if table_suffix(path) == ".tsv" else ","
    with whole_file(path) as temporary:
        if isinstance(rows, pd.DataFrame):
            rows.to_csv(temporary, sep=separator, index=index_label is not None, index_label=index_label)
            return
        rows, columns, n = iter(rows), None, 0
        while (part := list(itertools.islice(rows, ROWS_AT_ONCE))) or not n:
            columns = list(dict.fromkeys(name for row in part for name in row)) if columns is None else columns
            frame = pd.DataFrame(part, columns=columns)
            frame.to_csv(temporary, sep=separator, index=False, header=not n, mode="a" if n else "w")
            n += max(len(part), 1)


@nullable_strings()
def write_result(cells: Cells, source: Path, target: Path, copy: Path | None = None) -> None:
    """Write cells with their results to the `.h5ad` file `target`.

    Args:
        cells: Cells in memory, or a [`CellFile`], a view of `source`.
        source: File or folder of the cells.
        target: File to write.
        copy: Copy of `source` on the disk of `target`, which is renamed to `target`; None makes a copy.
    """
    if not isinstance(cells, CellFile):
        for name in list(cells.obsm):
            if isinstance(cells.obsm[name], RowBlocks):
                cells.obsm[name] = cells.obsm[name].to_memory()
        cells.write_h5ad(target)
        return
    if copy is not None:
        os.replace(copy, target)
    elif is_soma(source):
        _copy_rows(cells, target)
    elif source.is_dir():
        _copy_store(cells.handle, target)
    else:
        _copy_file(source, target)
    with h5py.File(target, "r+") as file:
        _replace(file, "obs", cells.obs)
        for part, added in (("obsm", cells.obsm), ("uns", {"scmmgpt": cells.uns["scmmgpt"]})):
            if part not in file:
                anndata.io.write_elem(file, part, {})
            for name, value in added.items():
                _replace(file[part], name, value)


def _replace(group: h5py.Group, name: str, value: Any) -> None:
    if name in group:
        del group[name]
    if not isinstance(value, RowBlocks):
        anndata.io.write_elem(group, name, value)
        return
    array = group.create_dataset(name, value.shape, np.float32)  # no fill value, which would be written first
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    value.fill(array)


def _copy_rows(cells: CellFile, target: Path) -> None:
    """Write tables and sparse matrices of cells to an `.h5ad` file, `ROWS_COPIED` rows at a time."""
    with h5py.File(target, "w") as file:
        anndata.io.write_elem(file, "/", anndata.AnnData(obs=cells.obs, var=cells.var))
        for name, matrix in {"X": cells.X, **{f"layers/{name}": m for name, m in cells.layers.items()}}.items():
            if name in file:
                del file[name]
            first = matrix[:ROWS_COPIED]
            first.indptr = first.indptr.astype(np.int64)  # all rows together can have more entries than int32 holds
            anndata.io.write_elem(file, name, first)
            stored = anndata.io.sparse_dataset(file[name])
            for start in range(ROWS_COPIED, cells.n_obs, ROWS_COPIED):
                stored.append(matrix[start : start + ROWS_COPIED])


def _copy_store(store: Any, target: Path) -> None:
    """Copy the AnnData of a Zarr group into an `.h5ad` file: tables through memory, arrays a part at a time."""
    with h5py.File(target, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in store:
            if name in ("layers", "obsm", "obsp", "raw") and hasattr(store[name], "keys"):
                group = file.create_group(name)
                group.attrs.update(_attributes(store[name]))
                for key in store[name]:
                    _copy_part(store[name][key], group, key)
            else:
                _copy_part(store[name], file, name)


def _copy_part(part: Any, group: h5py.Group, name: str) -> None:
    """Copy a matrix or numeric array in parts; copy other elements as a whole."""
    if hasattr(part, "keys") and part.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        matrix = group.create_group(name)
        matrix.attrs.update(_attributes(part))
        for key in part:
            _copy_part(part[key], matrix, key)
    elif not hasattr(part, "keys") and part.ndim and np.dtype(part.dtype).kind in "biuf":
        chunks = tuple(min(n, chunk) for n, chunk in zip(part.shape, part.chunks, strict=True)) if part.size else None
        array = group.create_dataset(
            name, part.shape, part.dtype, chunks=chunks, compression="gzip" if chunks else None
        )
        array.attrs.update(_attributes(part))
        step = max(1, ENTRIES_AT_ONCE // max(1, part.size // max(1, part.shape[0])))
        for start in range(0, part.shape[0], step):
            array[start : start + step] = part[start : start + step]
    else:
        anndata.io.write_elem(group, name, anndata.io.read_elem(part))


def _attributes(part: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(part.attrs).items() if value is not None}


# -- tables -----------------------------------------------------------------------------------------------------------


def evidence_rows(evidence: Any, adata: Any) -> Iterator[dict[str, Any]]:
    """Rows of the table of evidence: groups, then the cells with evidence."""
    names = adata.obs_names[adata.obs["scmmgpt_evidence"].notna()]
    return itertools.chain(evidence.group_rows(), evidence.cell_rows(names))


def audit_rows(audit: Any, adata: Any) -> list[dict[str, Any]]:
    """Rows of the table of an audit: groups, then doubtful cells."""
    return [*audit.group_rows(), *audit.cell_rows(adata.obs_names[adata.obs["scmmgpt_audit"].notna()])]


def audit_summary(audit: Any) -> dict[str, Any]:
    """Summary of an audit, with the groups that have the most contradicted cells."""
    worst = {row["name"]: row["contradicted"] for row in audit.group_rows()[:5] if row["contradicted"]}
    return {**audit.summary(), "most contradicted": worst}


def render_hits(hits: list[dict[str, Any]]) -> list[str]:
    """Format the hits of a search as lines of a table."""
    head = f"{'rank':>4}  {'score':>7}  {'z':>6}  cell"
    return [head, *(f"{hit['rank']:>4}  {hit['score']:>7.4f}  {hit['z']:>6.2f}  {hit['cell']}" for hit in hits)]
