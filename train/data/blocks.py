"""Decode row groups of a corpus ([`BlockReader`]), or read rows of a dataset ([`RowReader`]), into a [`CellPool`]."""

import collections
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import numba
import numpy as np
import pyarrow as pa

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.collator_scmmgpt import read_rows
from scmmgpt.train.data.cache import is_cached, open_cached
from scmmgpt.train.data.corpus import CELL_COLUMNS, MAX_VOCABULARY_SIZE, ROW_GROUP_SIZE, Corpus, table_to_cells


T = TypeVar("T")
FLOAT = np.dtype(np.float32)
OPEN_FILES = 32  # shards that each thread keeps open
Obs = dict[str, np.ndarray]  # annotation -> object array of str, None for null


def results_ahead(executor: Executor, jobs: Iterable[Callable[[], T]], n_ahead: int) -> Iterator[T]:
    """Yield the results of jobs in order; `n_ahead` jobs are submitted before the first result is taken."""
    pending: collections.deque[Future[T]] = collections.deque()
    for job in jobs:
        pending.append(executor.submit(job))
        if len(pending) == n_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class CellPool:
    """Buffer for cells in the order of their batches, and for their annotations; `fill` writes into the buffer.

    `lengths` are the numbers of genes of the cells, int `(n_cells,)`.
    """

    def __init__(self, lengths: np.ndarray, counts_dtype: np.dtype, columns: list[str]) -> None:
        indptr = np.append(0, np.cumsum(lengths, dtype=np.int64))
        self.cells = Cells(
            indptr=indptr,
            gene_ids=np.empty(indptr[-1], dtype=np.uint16),
            counts=np.empty(indptr[-1], dtype=counts_dtype),
            cell_ids=np.empty(len(lengths), dtype=np.uint64),
            total_counts=np.empty(len(lengths), dtype=np.float32),
        )
        self.obs: Obs = {name: np.empty(len(lengths), dtype=object) for name in columns}

    def __getitem__(self, cells: slice) -> tuple[Cells, Obs]:
        return self.cells[cells], {name: values[cells] for name, values in self.obs.items()}

    def fill(self, rows: np.ndarray, places: np.ndarray, cells: Cells, obs: Obs) -> None:
        """Copy `rows` of other cells to `places` of this pool."""
        own = self.cells
        _copy_rows(cells.indptr, rows, cells.gene_ids, own.indptr, places, own.gene_ids)
        _copy_rows(cells.indptr, rows, cells.counts, own.indptr, places, own.counts)
        own.cell_ids[places] = cells.cell_ids[rows]
        own.library_sizes()[places] = cells.library_sizes()[rows]  # `library_sizes` returns `total_counts` itself
        for name, values in self.obs.items():
            values[places] = obs[name][rows]


@numba.njit(nogil=True, cache=True)
def _copy_rows(
    source: np.ndarray, rows: np.ndarray, values: np.ndarray, target: np.ndarray, places: np.ndarray, out: np.ndarray
) -> None:
    """Copy the values of `rows` of a ragged array to their `places` in another."""
    for i in range(len(rows)):
        start, stop = source[rows[i]], source[rows[i] + 1]
        out[target[places[i]] : target[places[i]] + stop - start] = values[start:stop]


class BlockReader:
    """Decodes the row groups ("blocks") of a split, from the Arrow copy of a shard (`cache.py`) if there is one.

    Attributes:
        columns: Annotations to decode.
        sizes: Cells of every block, `int64 (n_blocks,)`, over all shards in order.
        lengths: Genes of every cell, `uint16 (n_cells,)`.
        content: Checksums of the shards: a saved position is valid for this content alone.
        counts_dtype: uint16, or float32 if any shard of the split has float32 counts.
        bytes_decoded: Size of all gene ids and counts after decoding.
    """

    def __init__(self, corpus: Corpus, split: str, columns: list[str]) -> None:
        self.corpus, self.columns, self.shards = corpus, columns, corpus.shards(split)
        sizes, self._places = [], []  # a place is the number of a shard, and of a row group in the shard
        for index, shard in enumerate(self.shards):
            for group, first in enumerate(range(0, shard.n_cells, shard.row_group_size)):
                sizes.append(min(shard.row_group_size, shard.n_cells - first))
                self._places.append((index, group))
        self.sizes = np.array(sizes, dtype=np.int64)
        self.lengths = corpus.obs(split, ["n_genes"])["n_genes"].to_numpy()
        self.content = "".join(shard.sha256 for shard in self.shards)
        self.counts_dtype = np.result_type(*{shard.counts_dtype for shard in self.shards})
        self.bytes_decoded = sum(s.n_values * (2 + np.dtype(s.counts_dtype).itemsize) for s in self.shards)
        self._cached = [is_cached(corpus, shard) for shard in self.shards]
        self._local = threading.local()

    def labels(self, name: str) -> pa.ChunkedArray:
        """Annotation `name` of every cell."""
        return self.corpus.obs(self.shards[0].split, [name])[name]

    def read(self, block: int) -> tuple[Cells, Obs]:
        """Decode one block.

        Raises:
            ValueError: If the row group is damaged; the message names the row group and the shard.
        """
        index, group = self._places[block]
        if not hasattr(self._local, "open"):  # a ParquetFile serves one thread at a time
            self._local.open = functools.lru_cache(OPEN_FILES)(self._open)
        table = self._local.open(index)(group)
        return table_to_cells(table), {name: _strings(table[name]) for name in self.columns}

    def fill(self, pool: CellPool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        pool.fill(rows, places, *self.read(block))

    def _open(self, index: int) -> Callable[[int], pa.Table]:
        """Open a shard, or its copy, and return a function that reads a row group."""
        shard, columns = self.shards[index], [*CELL_COLUMNS, *self.columns]
        if self._cached[index]:
            copy = open_cached(self.corpus, shard, columns)
            return lambda group: pa.Table.from_batches([copy.get_batch(group)])
        file = self.corpus.open_shard(shard)

        def read(group: int) -> pa.Table:
            try:
                return file.read_row_group(group, columns=columns, use_threads=False)
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(
                    f"Row group {group} of {self.corpus.path / shard.path} can't be read: {error}. "
                    "The shard is damaged: restore it, or delete it and run `prepare` again."
                ) from error

        return read


class RowReader:
    """Reads blocks of `ROW_GROUP_SIZE` rows of any map-style dataset; see [`table_to_examples`] and [`read_rows`].

    The dataset is a `datasets.Dataset`, or has `__len__` and items that are rows, one cell each. Attributes are those
    of [`BlockReader`]; `columns` are all columns except `CELL_COLUMNS`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.columns: list[str] | None = None
        self.sizes = np.diff(np.append(np.arange(0, len(dataset), ROW_GROUP_SIZE), len(dataset)))
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._is_table = hasattr(dataset, "with_format")
        self.content = str(getattr(dataset, "_fingerprint", len(dataset)))
        lengths: list[np.ndarray] = []
        kinds: list[np.dtype] = [np.dtype(np.uint16)]
        for block in range(len(self.sizes)):
            cells, obs = self.read(block)
            lengths.append(np.diff(cells.indptr))
            kinds.append(np.min_scalar_type(cells.counts.max(initial=0)) if cells.counts.dtype.kind in "iu" else FLOAT)
            if len(cells.gene_ids) and not 0 <= cells.gene_ids.min() <= cells.gene_ids.max() < MAX_VOCABULARY_SIZE:
                raise ValueError(
                    f"gene_ids of the dataset run from {cells.gene_ids.min()} to {cells.gene_ids.max()}; the ids of a "
                    f"gene vocabulary run from 0 to {MAX_VOCABULARY_SIZE - 1}."
                )
            if self.columns is None:
                self.columns = list(obs)
        if not lengths:
            raise ValueError("The dataset has no rows.")
        self.lengths = np.concatenate(lengths)
        self.counts_dtype = FLOAT if FLOAT in kinds else np.result_type(*kinds)
        self.bytes_decoded = int(self.lengths.sum()) * (2 + self.counts_dtype.itemsize)

    def labels(self, name: str) -> pa.ChunkedArray:
        """Annotation `name` of every cell."""
        return pa.chunked_array([pa.array(self.read(block)[1][name]) for block in range(len(self.sizes))])

    def read(self, block: int) -> tuple[Cells, Obs]:
        """Read one block."""
        return self._rows(range(self._starts[block], self._starts[block] + self.sizes[block]))

    def fill(self, pool: CellPool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        different, own = np.unique(rows, return_inverse=True)
        pool.fill(own, places, *self._rows(self._starts[block] + different))

    def _rows(self, rows: Sequence[int] | np.ndarray) -> tuple[Cells, Obs]:
        if self._is_table:
            return table_to_examples(self.dataset.with_format("arrow")[list(rows)], self.columns)
        cells, columns = read_rows([self.dataset[int(row)] for row in rows])
        if cells is None or len(cells) != len(rows):
            raise ValueError(
                f"{len(rows)} rows of the dataset hold {0 if cells is None else len(cells)} cells; a row is one cell, "
                "with `cell_id`, `gene_ids` and `counts`, or with `cells`."
            )
        return cells, _select(columns, self.columns, len(rows))


class MemoryReader:
    """Decodes a whole split once, and keeps it in memory."""

    def __init__(self, reader: BlockReader | RowReader) -> None:
        self.lengths, self.content = reader.lengths, reader.content
        self._starts, self.counts_dtype = np.cumsum(reader.sizes) - reader.sizes, reader.counts_dtype
        blocks = [reader.read(block) for block in range(len(reader.sizes))]
        self._cells = Cells.concatenate([cells for cells, _ in blocks])
        self._obs = {name: np.concatenate([obs[name] for _, obs in blocks]) for name in reader.columns or []}

    def fill(self, pool: CellPool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        pool.fill(self._starts[block] + rows, places, self._cells, self._obs)


def table_to_examples(table: pa.Table, columns: list[str] | None = None) -> tuple[Cells, Obs]:
    """Convert a table with a cell in every row to cells and annotations; refuse rows without a cell.

    The default annotations are all columns except `CELL_COLUMNS`. An absent column becomes all None.
    """
    check_columns(table.column_names)
    for name in CELL_COLUMNS[:-1]:
        if table[name].null_count:
            raise ValueError(f"The dataset has nulls in the column {name!r}; leave out rows without a cell.")
    kinds = {name: table[name].type for name in CELL_COLUMNS if name in table.column_names}
    for name in ("gene_ids", "counts"):
        kinds[name] = pa.list_(kinds[name].value_type)
    if not pa.types.is_uint64(kinds["cell_id"]):
        kinds["cell_id"] = pa.int64()
    cells = table_to_cells(pa.table({name: table[name].cast(kind) for name, kind in kinds.items()}))
    others = {name: _values(table[name]) for name in table.column_names if name not in CELL_COLUMNS}
    return cells, _select(others, columns, len(table))


def check_columns(names: Sequence[str]) -> None:
    """Refuse a dataset that lacks `cell_id`, `gene_ids` or `counts`."""
    if missing := [name for name in CELL_COLUMNS[:-1] if name not in names]:
        raise ValueError(
            f"The dataset has no column {missing[0]!r}; its columns are {list(names)}. A row of a cell has `cell_id` "
            "(an integer of 64 bits), `gene_ids` and `counts` (lists)."
        )


def _select(values: Mapping[str, np.ndarray], columns: list[str] | None, n_rows: int) -> Obs:
    names = list(values) if columns is None else columns
    return {name: values.get(name, np.full(n_rows, None)) for name in names}


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column as an object array."""
    if pa.types.is_string(column.type) or pa.types.is_dictionary(column.type):
        return _strings(column)
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_pylist()
    return values


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    """A string column as an object array, None for null; equal labels are one object."""
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy(zero_copy_only=False)
    codes = column.combine_chunks()
    labels = np.array([*codes.dictionary.to_pylist(), None], dtype=object)
    return labels[codes.indices.fill_null(len(labels) - 1).to_numpy()]
