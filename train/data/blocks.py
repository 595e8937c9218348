"""Row groups of a corpus as arrays ([`BlockReader`]), and the pools that cells are copied to ([`CellPool`])."""

import dataclasses
import functools
import threading
from collections.abc import Callable

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.cache import is_cached, open_cached
from scmmgpt.train.data.corpus import CELL_COLUMNS, Corpus, table_to_cells


OPEN_FILES = 32  # shards kept open by each thread that decodes them
Obs = dict[str, np.ndarray]  # annotation -> object array of str, None for null


@dataclasses.dataclass
class CellPool:
    """Cells in the order in which they are handed out, and their annotations."""

    cells: Cells
    obs: Obs

    @classmethod
    def allocate(cls, lengths: np.ndarray, counts_dtype: np.dtype, columns: list[str]) -> "CellPool":
        """Make room for cells of these numbers of genes."""
        indptr = np.append(0, np.cumsum(lengths, dtype=np.int64))
        cells = Cells(
            indptr=indptr,
            gene_ids=np.empty(indptr[-1], dtype=np.uint16),
            counts=np.empty(indptr[-1], dtype=counts_dtype),
            cell_ids=np.empty(len(lengths), dtype=np.uint64),
            total_counts=np.empty(len(lengths), dtype=np.float32),
        )
        return cls(cells, {name: np.empty(len(lengths), dtype=object) for name in columns})

    def __getitem__(self, cells: slice) -> tuple[Cells, Obs]:
        return self.cells[cells], {name: values[cells] for name, values in self.obs.items()}

    def fill(self, rows: np.ndarray, places: np.ndarray, cells: Cells, obs: Obs) -> None:
        """Copy `rows` of other cells to `places` of this pool."""
        own = self.cells
        assert own.total_counts is not None
        assert cells.total_counts is not None
        _copy_rows(cells.indptr, rows, cells.gene_ids, own.indptr, places, own.gene_ids)
        _copy_rows(cells.indptr, rows, cells.counts, own.indptr, places, own.counts)
        own.cell_ids[places] = cells.cell_ids[rows]
        own.total_counts[places] = cells.total_counts[rows]
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
    """Reads the row groups ("blocks") of a split, from the copy that `cache.py` makes where there is one.

    Attributes:
        columns: Annotations that are read.
        sizes: Cells of every block of the split, `int64 (n_blocks,)`, over all shards in order.
        places: Number of the shard, and of the row group in it.
        bytes_decoded: Bytes of gene ids and counts of the split, decoded.
    """

    def __init__(self, corpus: Corpus, split: str, columns: list[str]) -> None:
        self.corpus, self.columns, self.shards = corpus, columns, corpus.shards(split)
        sizes, self.places = [], []
        for index, shard in enumerate(self.shards):
            for group, first in enumerate(range(0, shard.n_cells, shard.row_group_size)):
                sizes.append(min(shard.row_group_size, shard.n_cells - first))
                self.places.append((index, group))
        self.sizes = np.array(sizes, dtype=np.int64)
        self.bytes_decoded = sum(s.n_values * (2 + np.dtype(s.counts_dtype).itemsize) for s in self.shards)
        self._cached = [is_cached(corpus, shard) for shard in self.shards]
        self._local = threading.local()

    @functools.cached_property
    def n_genes(self) -> np.ndarray:
        """Number of genes of every cell of the split, `uint16 (n_cells,)`."""
        tables = [pq.read_table(self.corpus.path / shard.path, columns=["n_genes"]) for shard in self.shards]
        return np.concatenate([table["n_genes"].to_numpy() for table in tables])

    def label_codes(self, column: str) -> np.ndarray:
        """The code of every cell's label, `int32 (n_cells,)`; cells without a label have one in common."""
        tables = [
            pq.read_table(self.corpus.path / shard.path, columns=[column], read_dictionary=[column])
            for shard in self.shards
        ]
        tables = [table.replace_schema_metadata(None) for table in tables]
        values = pa.concat_tables(tables).unify_dictionaries()[column].combine_chunks()
        return values.indices.fill_null(len(values.dictionary)).to_numpy()

    def counts_dtype(self, block: int) -> str:
        """`"uint16"` or `"float32"`."""
        return self.shards[self.places[block][0]].counts_dtype

    def read(self, block: int) -> tuple[Cells, Obs]:
        """Decode one block.

        Raises:
            ValueError: With the row group and its shard, if it is damaged.
        """
        index, group = self.places[block]
        if not hasattr(self._local, "open"):  # a ParquetFile serves one thread at a time
            self._local.open = functools.lru_cache(OPEN_FILES)(self._open)
        table = self._local.open(index)(group)
        return table_to_cells(table), {name: _strings(table[name]) for name in self.columns}

    def fill(self, pool: CellPool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        cells, obs = self.read(block)
        pool.fill(rows, places, cells, obs)

    def _open(self, index: int) -> Callable[[int], pa.Table]:
        """Open a shard, or its copy; returns a function that reads a row group."""
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
                    "The shard is damaged: copy it anew, or delete it and run `prepare` again."
                ) from error

        return read


class MemoryReader:
    """Decodes a whole split once and keeps it."""

    def __init__(self, reader: BlockReader) -> None:
        self._starts, self.counts_dtype = np.cumsum(reader.sizes) - reader.sizes, reader.counts_dtype
        blocks = [reader.read(block) for block in range(len(reader.sizes))]
        self._cells = Cells.concatenate([cells for cells, _ in blocks])
        self._obs = {name: np.concatenate([obs[name] for _, obs in blocks]) for name in reader.columns}

    def fill(self, pool: CellPool, block: int, rows: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of a block to their `places` in a pool."""
        pool.fill(self._starts[block] + rows, places, self._cells, self._obs)


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    """A string column as an object array, None for null."""
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy(zero_copy_only=False)
    parts = []
    for chunk in column.chunks:
        labels = np.full(len(chunk.dictionary) + 1, None, dtype=object)
        labels[:-1] = chunk.dictionary.to_numpy(zero_copy_only=False)
        parts.append(labels[chunk.indices.fill_null(len(labels) - 1).to_numpy()])
    return np.concatenate(parts) if parts else np.empty(0, dtype=object)
