"""Conversion of the rows of an AnnData to `Cells`, chunk by chunk, as `choose_input` decided for the file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cells_scmmgpt import Cells, has_repeats, hash_names
from .genes_scmmgpt import GeneMatch
from .kernels_scmmgpt import kernels_pay
from .matrices_scmmgpt import TOTALS_COLUMN, MatrixVerdict, convert_rows
from .rows_scmmgpt import (
    LARGEST_VALUE,
    CountRows,
    is_expression,
    is_in_memory,
    matrix_of,
    modality_of,
    name_rows,
    read_rows,
    row_major,
    totals_of,
)


CHUNK_ROWS = 512  # rows of one read from a file; conversion needs a dozen arrays of this size
NAMED_ROWS = 4096  # rows of counts in memory, which `name_rows` reads in one pass
CACHED_ROWS = 128  # rows of another matrix in memory: their values stay in the processor's cache during conversion


@dataclass
class InputChoice:
    """The decision how to read a dataset; it holds for all chunks of the dataset."""

    source: str  # `X`, `raw`, or the name of a layer
    verdict: MatrixVerdict
    match: GeneMatch
    report: dict[str, Any]  # conversion adds numbers to `report["cells"]`
    totals_column: str | None = None  # column of `obs` with the counts per cell over all genes

    def convert(self, adata: Any) -> Cells:
        """Cells of `adata`: the data of this choice, or a chunk of the data with the same variables."""
        return _join(self.iter_cells(adata, n_named=adata.shape[0]), adata.shape[0])

    def iter_cells(self, adata: Any, *, n_named: int = NAMED_ROWS) -> Iterator[Cells]:
        """Cells of `adata` in chunks of at most `n_named` cells; a cell does not depend on the size of the chunks.

        Raises:
            ValueError: If `adata` has other variables than the data of this choice, or holds a NaN, a negative or a
                too large value.
        """
        adata = modality_of(adata)
        matrix = row_major(matrix_of(adata, self.source))
        n_cells, n_vars = matrix.shape
        if n_vars != len(self.match.ids):
            raise ValueError(
                f"{self.source} has {n_vars} variables, but the choice was made for {len(self.match.ids)}: "
                "chunks of one dataset have the same variables. Call `choose_input` for other data."
            )
        var = adata.raw.var if self.source == "raw" else adata.var
        names = adata.obs_names
        cell_ids = hash_names(names)
        from_column = self.verdict.evidence.get("target_sum_from") == TOTALS_COLUMN
        known_totals = totals_of(adata, self.totals_column) if from_column else None
        ids, sums_columns = self.match.ids.astype(np.int32), has_repeats(self.match.ids)
        n_rows = min(CHUNK_ROWS, CACHED_ROWS) if is_in_memory(matrix) else CHUNK_ROWS
        in_one_pass = (
            self.verdict.kind == "raw_integer"
            and not self.verdict.floor
            and self.match.is_gene.all()
            and not sums_columns
        )
        in_one_pass = in_one_pass and is_in_memory(matrix) and kernels_pay(n_cells)
        start = 0
        while True:
            named = name_rows(matrix, start, min(start + n_named, n_cells), ids) if in_one_pass else None
            in_one_pass, failed = named is not None, 0
            if named is not None:
                here = slice(start, start + named.shape[0])
                cells = Cells(named.indptr, named.indices, named.data, cell_ids[here], named.sums)
            else:
                here = slice(start, min(start + n_rows, n_cells))
                rows = read_rows(matrix, here.start, here.stop).columns(self.match.is_gene).above(self.verdict.floor)
                _check_values(rows, names[here], var.index, self.source)
                known = None if known_totals is None else known_totals[here]
                counts, totals, failed = convert_rows(rows, self.verdict, known)
                cells = Cells.from_csr(counts, ids, cell_ids[here], totals, sums_columns)
            self._count(cells, failed)
            yield cells
            start = here.stop
            if start >= n_cells:
                return

    def _count(self, cells: Cells, failed: int) -> None:
        lengths = np.diff(cells.indptr)
        report = self.report["cells"]
        report["converted"] = report.get("converted", 0) + len(cells)
        report["without_genes"] = report.get("without_genes", 0) + int((lengths == 0).sum())
        if self.verdict.exact:
            report["counts_not_recovered"] = report.get("counts_not_recovered", 0) + failed


def _join(parts: Iterator[Cells], n_cells: int) -> Cells:
    """`Cells.concatenate` in half the memory: each part is copied and freed in turn; a single part is not copied."""
    gene_ids, counts = np.empty(0, np.int32), np.empty(0, np.float32)
    lengths, cell_ids, totals, n = [], [], [], 0
    for part in parts:
        if len(part) == n_cells:
            return part
        lengths.append(np.diff(part.indptr))
        cell_ids.append(part.cell_ids)
        totals.append(part.library_sizes())
        start, n = n, n + len(part.counts)
        if n > len(counts):  # allocate for all cells, if the remaining cells have as many genes
            size = max(n, int(1.1 * n * n_cells / sum(map(len, lengths))))
            gene_ids = _grown(gene_ids[:start], size, part.gene_ids.dtype)
            counts = _grown(counts[:start], size, part.counts.dtype)
        gene_ids[start:n], counts[start:n] = part.gene_ids, part.counts
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return Cells(indptr, gene_ids[:n], counts[:n], np.concatenate(cell_ids), np.concatenate(totals))


def _grown(array: np.ndarray, size: int, dtype: np.dtype) -> np.ndarray:
    """`array` at the front of a larger array, whose rest is not initialised."""
    grown = np.empty(size, dtype)
    grown[: len(array)] = array
    return grown


def _check_values(rows: CountRows, names: Any, var_names: Any, source: str) -> None:
    """Raise ValueError for a NaN, a negative or a too large value, with the cell and gene of the first."""
    if is_expression(rows.data):
        return
    bad = ~((rows.data >= 0) & (rows.data.astype(np.float64) <= LARGEST_VALUE))
    cell, column = rows.locate(bad)
    raise ValueError(
        f"{source} holds {rows.data[bad][0]} at cell {str(names[cell])!r}, gene {str(var_names[column])!r} "
        f"({bad.sum()} such values in these {rows.shape[0]} cells): expression is finite and not negative. "
        "Drop these cells or genes, or pass another `layer=`."
    )
