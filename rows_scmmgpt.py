"""Rows of a matrix of an AnnData, from any form of matrix: dense, sparse, on disk, lazy.

This file travels with the weights, so it imports neither AnnData nor SciPy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cells_scmmgpt import segment
from .kernels_scmmgpt import LARGEST_VALUE, find_entries, kernels_pay, name_genes


N_SAMPLED_ROWS, N_BLOCKS = 512, 8  # rows of the sample that a verdict rests on, in blocks spread over the matrix
N_SAMPLED_VALUES = 1_000_000  # most values of the sample: dense rows are sampled more sparsely
# A matrix has a floor in place of zeros if at most this share of its values is zero, and if each row has the floor in
# this share of the genes.
MOST_ZEROS, FLOOR_SHARE = 0.001, 0.2
COUNTED_SHARE, MIN_COUNTED_ROWS = 0.5, 10  # for integers, such as counts + 1


def modality_of(adata: Any) -> Any:
    """The AnnData itself, or the RNA of a MuData."""
    modalities = getattr(adata, "mod", None)
    if not isinstance(modalities, Mapping):
        return adata
    for name in ("rna", "gex", "RNA", "GEX"):
        if name in modalities:
            return modalities[name]
    raise ValueError(
        f"The MuData has no `rna` modality (it has {', '.join(modalities)}). Pass the AnnData of the RNA."
    )


def layers_of(adata: Any) -> dict[str, Any]:
    """Layers by name. anndata lists `X` among them from version 0.13 on, under the name None."""
    return {name: matrix for name, matrix in adata.layers.items() if name is not None}


def matrix_of(adata: Any, source: str) -> Any:
    """The matrix called `source`: `X`, `raw` or a layer."""
    if source == "X":
        return adata.X
    return adata.raw.X if source == "raw" else adata.layers[source]


def totals_of(adata: Any, column: str | None) -> np.ndarray | None:
    """Total counts per cell over all genes, float64 `(n_cells,)`, from a column of `obs`; None without a column."""
    return None if column is None else np.asarray(adata.obs[column]).astype(np.float64)


@dataclass
class CountRows:
    """Rows of a sparse matrix without stored zeros: the three arrays of CSR, and a shape."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    shape: tuple[int, int]
    positions: np.ndarray | None = None  # int64 (n_rows,): row numbers in the sampled matrix
    sums: np.ndarray | None = None  # float64 (n_rows,): sums over all columns, if `indices` are gene ids

    def entries(self, chosen: np.ndarray) -> "CountRows":
        """These rows with the entries in the mask `chosen`, bool `(nnz,)`."""
        n_before = np.concatenate(([0], np.cumsum(chosen)))
        return replace(self, indptr=n_before[self.indptr], indices=self.indices[chosen], data=self.data[chosen])

    def columns(self, keep: np.ndarray) -> "CountRows":
        """These rows with the entries of the columns in the mask `keep`, bool `(n_vars,)`; the shape stays."""
        return self if keep.all() else self.entries(keep[self.indices])

    def locate(self, wanted: np.ndarray) -> list[int]:
        """Row (in the sampled matrix) and column of the first entry in the mask `wanted`, bool `(nnz,)`."""
        entry = int(np.flatnonzero(wanted)[0])
        row = int(np.searchsorted(self.indptr, entry, side="right")) - 1
        return [row if self.positions is None else int(self.positions[row]), int(self.indices[entry])]

    def floor(self) -> float:
        """The value that stands for a count of zero, such as log(pseudocount); 0 if zero itself does.

        Most counts of a cell are zero: a matrix without zeros has another value in their place if the least value is
        the same in every row, and frequent. Integers are counts of at least one, as their genes were filtered, unless
        half of every row are the least: no genes that are found in many cells have so few counts.
        """
        n_rows, n_vars = self.shape
        if not len(self.data) or len(self.data) < n_rows * n_vars * (1 - MOST_ZEROS):
            return 0.0
        least, share = self.data.min(), FLOOR_SHARE
        if (self.data == np.rint(self.data)).all():
            if n_rows < MIN_COUNTED_ROWS or least == self.data.max():
                return 0.0
            share = COUNTED_SHARE
        rows = np.repeat(np.arange(n_rows), np.diff(self.indptr))
        at_floor = np.bincount(rows[self.data == least], minlength=n_rows)
        return float(least) if (at_floor >= share * n_vars).all() else 0.0

    def above(self, floor: float) -> "CountRows":
        """These rows minus `floor`, without the entries at the floor."""
        if not floor:
            return self
        return replace(self, data=self.data - self.data.dtype.type(floor)).entries(self.data != floor)

    def row_sums(self, values: np.ndarray | None = None) -> np.ndarray:
        """Row sums of `data`, or of `values` `(nnz,)`, float64 `(n_rows,)`."""
        values = self.data if values is None else values
        return segment(np.add, values.astype(np.float64, copy=False), self.indptr)


def row_major(matrix: Any) -> Any:
    """The matrix in a form whose rows can be sliced; a column-major sparse matrix is converted."""
    if getattr(matrix, "format", "csr") != "csr":
        if hasattr(matrix, "to_memory"):  # AnnData's view of a column-major matrix on disk
            matrix = matrix.to_memory()
        matrix = matrix.tocsr()
    return matrix


def is_in_memory(matrix: Any) -> bool:
    """Whether the matrix is a NumPy array, or a SciPy matrix of NumPy arrays."""
    return isinstance(matrix, np.ndarray) or isinstance(getattr(matrix, "data", None), np.ndarray)


def is_expression(values: np.ndarray, *, signed: bool = False) -> bool:
    """Whether all values are finite, at most `LARGEST_VALUE` and, unless `signed`, not negative."""
    if not len(values):
        return True
    # A NaN makes both comparisons false.
    return float(values.max()) <= LARGEST_VALUE and float(values.min()) >= (-LARGEST_VALUE if signed else 0)


def read_rows(matrix: Any, start: int, stop: int) -> CountRows:
    """Rows `start:stop` of a NumPy, SciPy, HDF5, Zarr, Dask or backed AnnData matrix: no zeros, same dtype.

    Raises:
        ValueError: If the matrix does not have two dimensions.
        TypeError: If the matrix does not hold real numbers.
    """
    if getattr(matrix, "format", None) == "csr" and is_in_memory(matrix):  # a slice by SciPy would copy the entries
        entries = slice(matrix.indptr[start], matrix.indptr[stop])
        indptr = matrix.indptr[start : stop + 1].astype(np.int64) - entries.start
        rows = CountRows(indptr, matrix.indices[entries], matrix.data[entries], (stop - start, matrix.shape[1]))
        is_filled = rows.data != 0
        return _checked(rows if is_filled.all() else rows.entries(is_filled))
    block = matrix[start:stop]
    for method in ("to_memory", "compute"):
        if hasattr(block, method):
            block = getattr(block, method)()
    if hasattr(block, "tocsr"):
        return read_rows(block.tocsr(), 0, block.shape[0])
    block = np.asarray(block)
    if block.ndim != 2:
        raise ValueError(f"The matrix has shape {block.shape}; expected two dimensions, (n_cells, n_genes).")
    # Numba supports no half floats, no foreign byte order and no text.
    is_supported = block.dtype.isnative and (block.dtype.kind in "biu" or block.dtype in (np.float32, np.float64))
    block = np.ascontiguousarray(block)
    if not (is_supported and kernels_pay(len(block))):
        return _checked(CountRows(*_find_entries_numpy(block), block.shape))
    indptr, columns, data, *_ = find_entries(block, np.arange(block.shape[1], dtype=np.int32), *_room(block))
    return _checked(CountRows(indptr, columns, data, block.shape))


def name_rows(matrix: Any, start: int, stop: int, ids: np.ndarray) -> CountRows | None:
    """Rows `start:stop` of a matrix of counts in memory, with gene ids for columns, in one pass of a compiled loop.

    Args:
        matrix: Counts, `(n_cells, n_vars)`.
        start, stop: The rows.
        ids: int32 `(n_vars,)`: the gene of each column, or -1; no gene may occur twice.

    Returns:
        Rows with `sums`, without the entries of columns without a gene. None if the loop does not support the matrix
        (such as short integers), or if a value is not plausible as a count: use [`read_rows`] and `Cells.from_csr`.
    """
    data, is_sparse = getattr(matrix, "data", None), getattr(matrix, "format", None) == "csr"
    values = data if is_sparse else matrix
    if not (isinstance(values, np.ndarray) and values.dtype.isnative):
        return None
    if not (values.dtype in (np.float32, np.float64) or values.dtype.kind in "iu" and values.dtype.itemsize >= 4):
        return None
    if not is_sparse:
        block = np.ascontiguousarray(matrix[start:stop])
        indptr, gene_ids, data, sums, are_sound = find_entries(block, ids, *_room(block))
    elif matrix.indices.dtype == np.int32:
        entries = slice(matrix.indptr[start], matrix.indptr[stop])
        indptr = matrix.indptr[start : stop + 1].astype(np.int64) - entries.start
        columns, values, n_ids = matrix.indices[entries], matrix.data[entries], int(ids.max(initial=-1)) + 1
        room = np.empty(len(columns), np.int32), np.empty_like(values)
        indptr, gene_ids, data, sums, are_sound = name_genes(indptr, columns, values, ids, n_ids, False, *room)
    else:
        return None
    return CountRows(indptr, gene_ids, data, (stop - start, len(ids)), sums=sums) if are_sound else None


def _room(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays for the entries of a dense matrix, sized by a sample of rows: allocating memory takes time."""
    some = block[:: 1 + len(block) // 128]
    # `count_nonzero` is eight times faster on booleans than on numbers.
    size = block.shape[1] + int(1.1 * len(block) * np.count_nonzero(some != 0) / max(1, len(some)))
    return np.empty(size, np.int32), np.empty(size, block.dtype)


def _checked(rows: CountRows) -> CountRows:
    """The rows; bool becomes int8, and a dtype that is no real number raises TypeError."""
    if rows.data.dtype == bool:
        rows.data = rows.data.astype(np.int8)
    if not np.issubdtype(rows.data.dtype, np.number) or np.issubdtype(rows.data.dtype, np.complexfloating):
        raise TypeError(
            f"The matrix holds values of type {rows.data.dtype}; expected numbers. "
            "Convert it with `adata.X = adata.X.astype('float32')`, or pass another `layer=`."
        )
    return rows


def _find_entries_numpy(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[`find_entries`] in NumPy."""
    places = np.flatnonzero(matrix != 0)  # several times faster on booleans than on numbers
    rows, columns = np.divmod(places, max(matrix.shape[1], 1))
    return np.searchsorted(rows, np.arange(len(matrix) + 1)), columns.astype(np.int32), matrix.ravel()[places]


def sample_rows(matrix: Any) -> CountRows:
    """About `N_SAMPLED_ROWS` rows in contiguous blocks, spread evenly over the matrix; fewer if rows are dense."""
    n_cells, n_vars = matrix.shape
    if n_cells <= N_SAMPLED_ROWS:
        starts, size = [0], n_cells
    else:
        size = N_SAMPLED_ROWS // N_BLOCKS
        starts = np.linspace(0, n_cells - size, N_BLOCKS).astype(int).tolist()
    parts = [read_rows(matrix, start, start + size) for start in starts]
    positions = np.concatenate([np.arange(start, start + size) for start in starts])
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    sampled = np.zeros(len(lengths), dtype=bool)
    sampled[:: 1 + int(lengths.sum()) // N_SAMPLED_VALUES] = True
    entries = np.repeat(sampled, lengths)
    return CountRows(
        np.concatenate(([0], np.cumsum(lengths[sampled]))),
        np.concatenate([part.indices for part in parts])[entries],
        np.concatenate([part.data for part in parts])[entries],
        (int(sampled.sum()), n_vars),
        positions[sampled],
    )
