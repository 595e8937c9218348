"""Matrices and tables on disk (HDF5 or Zarr); a slice of rows is loaded into memory."""

from functools import cached_property
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmmgpt.readers.disk_checks import attribute, check_indices, check_stored, load, where
from scmmgpt.readers.text_tables import FileError


COLUMN_BLOCK_BYTES = 2**27  # `DiskColumns`: size of the block of rows that is kept in memory
COLUMN_ENTRIES = 2**23  # `DiskColumns`: entries loaded at a time


class DiskRows:
    """A sparse matrix on disk (HDF5 or Zarr), compressed by row (CSR); a slice of rows is a matrix in memory.

    `anndata.io.sparse_dataset` is as fast for slices of 1,024 rows, but five times slower for slices of 64 rows, as in
    samples of cells. It also requires attributes that 10x files lack. `shape` is cells x variables.
    """

    layout = "sparse, by row"
    compressed_axis = 0

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        self.data, self.indices, self.shape, self.dtype = data, indices, shape, data.dtype
        self.n_bytes = data.shape[0] * (data.dtype.itemsize + indices.dtype.itemsize)
        size, n_pointers = shape[self.compressed_axis], indptr.shape[0]
        for array in (data, indices, indptr):
            check_stored(array)
        # Compare the lengths before loading the pointers: a damaged length may exceed the memory.
        self.indptr = np.asarray(load(indptr, slice(n_pointers if n_pointers == size + 1 else 0)), dtype=np.int64)
        last = int(self.indptr[-1]) if len(self.indptr) else 0
        sound = len(self.indptr) and last == data.shape[0] == indices.shape[0] and not self.indptr[0]
        if not sound or (np.diff(self.indptr) < 0).any():
            raise FileError(
                f"{where(data)}: a sparse matrix of {size} {('rows', 'columns')[self.compressed_axis]} has "
                f"{n_pointers} pointers up to {last}, {data.shape[0]} values and {indices.shape[0]} positions: the "
                "file is damaged. Write or copy it again."
            )

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop = bounds(rows, self.shape[0])
        return sp.csr_matrix(self._entries(start, stop), shape=(stop - start, self.shape[1]))

    def _entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Data, indices and indptr of rows `start` to `stop` (of columns, for `DiskColumns`)."""
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        indices = load(self.indices, slice(first, last))
        check_indices(indices, self.shape[1 - self.compressed_axis], where(self.indices))
        return load(self.data, slice(first, last)), indices, self.indptr[start : stop + 1] - first


class DiskColumns(DiskRows):
    """A sparse matrix on disk, compressed by column (CSC); a slice of rows is a matrix in memory.

    Gathering a block of rows takes a pass over the whole matrix, and only the last block is kept. Load rows in order.
    `anndata.io.sparse_dataset` would load the whole matrix for every slice of rows.
    """

    layout = "sparse, by column"
    compressed_axis = 1

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        super().__init__(data, indices, indptr, shape)
        self._block_rows = max(1, min(shape[0], shape[0] * COLUMN_BLOCK_BYTES // max(1, self.n_bytes)))
        self._block, self._rows = -1, sp.csr_matrix((0, shape[1]))

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop = bounds(rows, self.shape[0])
        parts = []
        for block in range(start // self._block_rows, max(stop - 1, start) // self._block_rows + 1):
            first = block * self._block_rows
            if block != self._block:
                self._block, self._rows = -1, self._rows[:0]  # free the last block before gathering the next
                self._rows = self._gather(first, min(first + self._block_rows, self.shape[0]))
                self._block = block
            parts.append(self._rows[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _gather(self, start: int, stop: int) -> sp.csr_matrix:
        """Gather rows `start` to `stop` from one run of columns after another."""
        parts, first = [], 0
        while first < self.shape[1]:
            last = int(np.searchsorted(self.indptr, self.indptr[first] + COLUMN_ENTRIES, side="right")) - 1
            last = min(max(last, first + 1), self.shape[1])
            columns = sp.csc_matrix(self._entries(first, last), shape=(self.shape[0], last - first))
            parts.append(columns[start:stop])
            first = last
        return sp.hstack(parts, format="csr")


class DiskDense:
    """A dense cells x genes array on disk."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.shape = check_stored(array), array.dtype, tuple(array.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return load(self.array, rows)


class DiskTransposed(DiskDense):
    """A dense genes x cells array on disk, presented as cells x genes."""

    def __init__(self, array: Any) -> None:
        super().__init__(array)
        self.shape = self.shape[::-1]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return load(self.array, (slice(None), rows)).T


class RowSlice:
    """Consecutive rows of a matrix on disk, not yet loaded."""

    def __init__(self, matrix: Any, start: int, stop: int) -> None:
        self.matrix, self.start, self.dtype = matrix, start, matrix.dtype
        self.shape = (stop - start, matrix.shape[1])

    def __getitem__(self, rows: slice) -> Any:
        start, stop = bounds(rows, self.shape[0])
        return self.matrix[self.start + start : self.start + stop]


def bounds(rows: slice, n_rows: int) -> tuple[int, int]:
    """First row of a slice, and the row after its last; steps are ignored."""
    start, stop, _ = rows.indices(n_rows)
    return start, max(start, stop)


class DiskTable:
    """A table of an AnnData on disk. `table[name]` loads a column, and `table.index` the names of the rows.

    Args:
        group: The HDF5 or Zarr group of the table.
        start, stop: Range of rows; all rows by default.
    """

    def __init__(self, group: Any, start: int = 0, stop: int | None = None) -> None:
        self.group = group
        self._names = group[attribute(group, "_index")]
        self.columns = [str(name) for name in group.attrs["column-order"]]
        self.rows = slice(start, self._names.shape[0] if stop is None else stop)

    @staticmethod
    def can_read(group: Any) -> bool:
        """Whether anndata 0.8 or newer wrote the table."""
        version = attribute(group, "encoding-version") if hasattr(group, "keys") else None
        return version == "0.2.0" and hasattr(group[attribute(group, "_index")], "shape")

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> pd.Series:
        column = self.group.get(name)
        if column is not None and hasattr(column, "keys"):
            stored = column.get("codes", column.get("values"))
        else:
            stored = column
        if stored is None or stored.shape[0] != self._names.shape[0]:
            raise FileError(f"Column {name!r} is missing or too short: the file is damaged. Write or copy it again.")
        return pd.Series(self._read(column), index=self.index, name=name)

    @cached_property
    def index(self) -> pd.Index:
        """Names of the rows, loaded at the first access."""
        return pd.Index(self._read(self._names))

    @property
    def iloc(self) -> "_RowsOfTable":
        """`table.iloc[start:stop]` is a `DiskTable` of these rows."""
        return _RowsOfTable(self)

    def _read(self, column: Any) -> Any:
        kind = attribute(column, "encoding-type")
        if kind == "categorical":
            codes, categories = load(column["codes"], self.rows), anndata.io.read_elem(column["categories"])
            return pd.Categorical.from_codes(codes, categories, ordered=bool(attribute(column, "ordered")))
        if hasattr(column, "keys"):  # values and mask
            return anndata.io.read_elem(column)[self.rows]
        if np.dtype(column.dtype).kind in "biuf":
            return load(column, self.rows)
        return (column.asstr() if isinstance(column, h5py.Dataset) else column)[self.rows].astype(object)


class _RowsOfTable:
    """Slices of rows of a `DiskTable`."""

    def __init__(self, table: DiskTable) -> None:
        self.table = table

    def __getitem__(self, rows: slice) -> DiskTable:
        start, stop = bounds(rows, len(self.table))
        return DiskTable(self.table.group, self.table.rows.start + start, self.table.rows.start + stop)
