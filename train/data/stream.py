"""Cells from a corpus, shuffled, in batches: [`CellStream`].

```python
stream = CellStream("corpus", split="train", batch_size=64, seed=0)
for cells, obs in stream:                           # epoch 0: Cells, and {column: array of str, None where unknown}
    batch = feature_extractor(cells)
for cells, obs, epoch in stream.batches(epoch=3):   # any epoch
    batch = feature_extractor(cells, epoch=epoch)
```

[`CellOrder`] determines the order, and [`CellStream`] reads the cells in it. Threads decode the next pool while
the batches of the current one are used. Since the order within a pool is known in advance, each cell is copied from
its row group straight to its place in the pool; batches are views of the pool. `batches.py` turns batches into model
inputs.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.blocks import BlockReader, CellPool, MemoryReader, Obs, RowReader, results_ahead
from scmmgpt.train.data.corpus import OBS_COLUMNS, Corpus, open_corpus
from scmmgpt.train.data.order import CellOrder, EpochOrder


IN_MEMORY_BYTES = 2**28  # a split whose genes and counts take at most this when decoded is kept in memory
MAX_THREADS = 2  # threads that decode the next pool


class CellStream:
    """Shuffled batches of a corpus, or of a map-style dataset whose rows are cells.

    Args:
        corpus: A `Corpus`, or the path of one; or a dataset, as [`RowReader`] takes it, with the cells of one split.
        split: `"train"`, `"validation"` or `"test"` of a corpus.
        columns: Annotations to yield; default: `OBS_COLUMNS` without the barcode, and all other columns of a dataset.
        balance: An annotation, such as `"cell_type"` or `"dataset_id"`, whose rare labels are drawn more often.
        rank, world_size: Number of this process, from 0, and number of processes.
        order: `batch_size`, `seed` and further settings of [`CellOrder`]. Losses that compare the cells of all ranks
            need `batch_size`, which gives every rank the same number of cells.

    Raises:
        ValueError: If the corpus has no such annotation or split, or `rank` is outside `world_size`.
    """

    def __init__(
        self,
        corpus: Corpus | str | os.PathLike | Any,
        split: str = "train",
        *,
        columns: list[str] | None = None,
        balance: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        **order: Any,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}; ranks are numbered from 0.")
        self.split, self.balance, self.rank = split, balance, rank
        reader = open_reader(corpus, split, columns, balance)
        self.reader: BlockReader | RowReader | MemoryReader = reader
        self.columns: list[str] = reader.columns or []
        codes = None
        if balance is not None:
            labels = reader.labels(balance).combine_chunks().dictionary_encode()
            codes = labels.indices.fill_null(len(labels.dictionary)).to_numpy()  # cells without a label share one code
        self.order = CellOrder(reader.sizes, reader.lengths, label_codes=codes, world_size=world_size, **order)
        if reader.bytes_decoded <= IN_MEMORY_BYTES:
            self.reader = MemoryReader(reader)

    def __len__(self) -> int:
        """Batches of a rank in every epoch: the number of epoch 0 of the order; see `batches.py`."""
        return self.order.n_steps(0)

    @property
    def n_cells(self) -> int:
        """Cells of the split, over all ranks."""
        return int(self.order.block_sizes.sum())

    @property
    def batch_size(self) -> int | None:
        """Cells per batch."""
        return self.order.batch_size

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.order.world_size

    def for_rank(self, rank: int, world_size: int) -> "CellStream":
        """Return the share of rank `rank` of `world_size`; both streams use one copy of cells in memory."""
        other = copy.copy(self)
        other.rank, other.order = rank, dataclasses.replace(self.order, world_size=world_size)
        return other

    def identity(self) -> dict:
        """Settings and a hash of the content that determine the cells at a position in an epoch, as JSON types."""
        names = "batch_size token_budget max_genes shuffle seed world_size drop_last pool_size".split()
        return {
            "split": self.split,
            **{name: getattr(self.order, name) for name in names},
            "balance": None if self.balance is None else [self.balance, str(self.order.temperature)],
            "shards": hashlib.sha256(self.reader.content.encode()).hexdigest()[:16],
        }

    def __iter__(self) -> Iterator[tuple[Cells, Obs]]:
        """Cells and annotations of epoch 0."""
        for cells, obs, _ in self.batches():
            yield cells, obs

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[Cells, Obs, int], None, None]:
        """Yield cells, annotations, and the epoch of the order, from batch `start` of an epoch to its end."""
        n_left = len(self) - start
        own_epoch, step = self.order.locate(epoch * len(self) + start)
        while n_left > 0:
            with contextlib.closing(self._read(self.order.epoch(own_epoch), step)) as batches:
                for cells, obs in itertools.islice(batches, n_left):
                    n_left -= 1
                    yield cells, obs, own_epoch
            own_epoch, step = own_epoch + 1, 0

    def _read(self, order: EpochOrder, step: int) -> Generator[tuple[Cells, Obs], None, None]:
        """Yield batches from a step to the end of an epoch of the order, and read one pool ahead."""
        n_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        assembling, decoding = ThreadPoolExecutor(1), ThreadPoolExecutor(n_threads)
        jobs = (functools.partial(self._read_pool, order, decoding, *pool) for pool in order.pools(self.rank, step))
        try:
            for pool, bounds in results_ahead(assembling, jobs, 2):
                for start, stop in bounds.tolist():
                    yield pool[start:stop]
        finally:
            for executor in (assembling, decoding):
                executor.shutdown(wait=True, cancel_futures=True)

    def _read_pool(
        self, order: EpochOrder, decoding: ThreadPoolExecutor, first: int, last: int, begin: int, end: int
    ) -> tuple[CellPool, np.ndarray]:
        """Cells of a pool in the order of its batches, and the bounds of the batches `[begin, end)`."""
        pool = order.pool(first, last)
        cells = CellPool(pool.lengths, self.reader.counts_dtype, self.columns)
        for task in [decoding.submit(self.reader.fill, cells, *piece) for piece in pool.pieces]:
            task.result()
        return cells, pool.bounds[begin:end]


def open_reader(corpus: Any, split: str, columns: list[str] | None, balance: str | None) -> BlockReader | RowReader:
    """Open a reader of a split of a corpus, or of a map-style dataset; refuse an annotation that is absent."""
    wanted = [name for name in OBS_COLUMNS if name != "barcode"] if columns is None else list(columns)
    if not isinstance(corpus, Corpus | str | os.PathLike):
        reader = RowReader(corpus)
        present = reader.columns or []
        reader.columns = wanted + [name for name in present if name not in wanted] if columns is None else wanted
        if balance is not None and balance not in present:
            raise ValueError(f"The dataset has no column {balance!r}; it has {present}.")
        return reader
    for name in wanted if balance is None else [*wanted, balance]:
        if name not in OBS_COLUMNS:
            raise ValueError(f"A corpus has no annotation {name!r}; it has {list(OBS_COLUMNS)}.")
    return BlockReader(corpus if isinstance(corpus, Corpus) else open_corpus(corpus), split, wanted)
