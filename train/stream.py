"""Cells from a corpus, shuffled, in batches, for ever: [`CellStream`].

```python
stream = CellStream("corpus", split="train", batch_size=64, seed=0)
for epoch in range(3):
    stream.set_epoch(epoch)
    for cells, obs in stream:           # Cells and {column: array of str, None where unknown}
        batch = feature_extractor(cells, epoch=epoch)
```

**Order.** A plan permutes the row groups of all shards by (seed, epoch). Laid end to end in this order, the cells are
one long sequence; rank `r` of `n` owns the `r`-th of `n` equal stretches of it. A stretch is read in pools of
`pool_size` cells: some tens of row groups, of which one or two threads decode the next pool while the current one is
used. A pool is permuted, cut into batches, and the batches are permuted. Batches are views of the pool.

**Ranks** see the same number of batches. What this takes is said by [`CellStream.plan`]: with `uneven="wrap"` a few
cells are seen twice so that all are seen, with `"drop"` a few are left out; alone, a rank does neither.

**Resuming** is exact: the position is (epoch, batches handed out), nothing of a pool is saved, and the plan says where
that is. `state_dict()` is the same on all ranks.

**Randomness** is hashes of (seed, epoch, place in the plan), and of the cell id in the feature extractor: what a cell
looks like depends neither on the batch size nor on the number of ranks.
"""

import collections
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scmmgpt.feature_extraction_scmmgpt import Cells
from scmmgpt.train.corpus import CELL_COLUMNS, OBS_COLUMNS, Corpus, open_corpus, table_to_cells


IN_MEMORY_BYTES = 2**28  # splits that take less than this once decoded are kept in memory
OPEN_FILES = 32  # shards kept open by each thread that decodes them


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one rank reads in one epoch.

    Args:
        blocks: Row groups of the split in the order of this epoch, `int64 (n_blocks,)`.
        ends: For each of them, where it ends in the sequence of all cells, `int64 (n_blocks,)`.
        start, stop: The stretch of the sequence that this rank owns; past the end it goes on at the beginning.
        n_steps: Batches that every rank yields.
        n_dropped: Cells of the epoch that no rank yields.
        n_repeated: Cells of the epoch that are yielded twice.
    """

    blocks: np.ndarray
    ends: np.ndarray
    start: int
    stop: int
    n_steps: int
    n_dropped: int
    n_repeated: int


class CellStream:
    """Iterates over shuffled batches of a corpus as `(Cells, obs)`.

    Args:
        corpus: A `Corpus`, or the path of one.
        split: `"train"`, `"validation"` or `"test"`.
        batch_size: Cells per batch. Give this or `token_budget`.
        token_budget: Tokens per batch, padding included: cells times the length of the longest, where a cell's length
            is its number of genes and one more for `<cls>`, at most `max_genes`.
        max_genes: Length at which the feature extractor cuts a cell.
        columns: Annotations to yield, of `OBS_COLUMNS`; all but the barcode by default.
        shuffle: Whether to permute. Without, cells come in stored order.
        sort_by_length: Whether batches hold cells of like length. By default only with a token budget: it saves
            padding, but cells of like length tend to be of like type, which contrastive learning does not want.
        seed: Seed of the order.
        epoch: First epoch; see [`CellStream.set_epoch`].
        rank, world_size: Which of how many processes this is.
        uneven: What equal numbers of batches on all ranks cost: `"wrap"` repeats a few cells, `"drop"` leaves out a
            few. With one rank neither happens.
        drop_last: Whether to leave out the last batch of an epoch if it is smaller than `batch_size`.
        pool_size: Cells shuffled together. Two pools are in memory at a time.
        num_threads: Threads that decode the next pool.
        in_memory: Whether to keep decoded cells. By default if the split takes less than 256 MB.
    """

    def __init__(
        self,
        corpus: Corpus | str | os.PathLike,
        split: str = "train",
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        max_genes: int = 1200,
        columns: list[str] | None = None,
        shuffle: bool = True,
        sort_by_length: bool | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        uneven: str = "wrap",
        drop_last: bool = False,
        pool_size: int = 8192,
        num_threads: int | None = None,
        in_memory: bool | None = None,
    ):
        if (batch_size is None) == (token_budget is None):
            raise ValueError(f"Give batch_size ({batch_size}) or token_budget ({token_budget}), one of the two.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}; ranks are numbered from 0.")
        if uneven not in ("wrap", "drop"):
            raise ValueError(f"uneven is {uneven!r}; choose 'wrap' or 'drop'.")
        if token_budget is not None and token_budget < max_genes:
            raise ValueError(
                f"token_budget ({token_budget}) does not hold one cell of max_genes ({max_genes}) tokens."
            )
        for name, value in (("batch_size", batch_size), ("pool_size", pool_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
        self.split = split
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.max_genes = max_genes
        self.columns = [name for name in OBS_COLUMNS if name != "barcode"] if columns is None else list(columns)
        unknown = sorted(set(self.columns) - set(OBS_COLUMNS))
        if unknown:
            raise ValueError(f"columns names {unknown}, which a corpus does not have; it has {list(OBS_COLUMNS)}.")
        self.shuffle = shuffle
        self.sort_by_length = token_budget is not None if sort_by_length is None else sort_by_length
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.uneven = uneven
        self.drop_last = drop_last
        self.pool_size = pool_size
        if batch_size is not None:
            # Whole batches per pool, so that only the last batch of an epoch can be smaller.
            self.pool_size = max(1, round(pool_size / batch_size)) * batch_size
        self.num_threads = min(2, os.cpu_count() or 1) if num_threads is None else num_threads
        n_values = sum(shard.n_values for shard in self.corpus.shards(split))
        self.in_memory = 6 * n_values <= IN_MEMORY_BYTES if in_memory is None else in_memory
        self._reader = _ParquetReader(self.corpus, split, self.columns)
        self._kept: dict[int, _Block] = {}
        self._step = 0  # batches handed out in this epoch
        self._resume = False  # whether the next iteration begins at `_step`, not at the beginning

    def __len__(self) -> int:
        """Number of batches that this rank yields in the current epoch."""
        return self.plan().n_steps

    @property
    def n_cells(self) -> int:
        """Cells of the split, over all ranks."""
        return int(self._reader.sizes.sum())

    # position

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. A position loaded within this epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._step, self._resume = epoch, 0, False

    def state_dict(self) -> dict:
        """Return the position, JSON-able and the same on all ranks, with what it depends on."""
        return {"epoch": self.epoch, "step": self._step, **self._identity()}

    def load_state_dict(self, state: Mapping) -> None:
        """Go to a saved position: the next iteration yields the batches that were not handed out before.

        To resume from a number of optimiser steps, change `state["step"]`, the number of batches.
        """
        for name, value in self._identity().items():
            if name in state and state[name] != value:
                raise ValueError(
                    f"The state was saved with {name}={state[name]!r}, but this stream has {value!r}: the position "
                    "would mean other cells. Use the same setting, or start at an epoch with `set_epoch`."
                )
        self.epoch, self._step, self._resume = int(state["epoch"]), int(state["step"]), True

    def _identity(self) -> dict:
        """What the order of cells depends on, the epoch aside."""
        names = (
            "split",
            "batch_size",
            "token_budget",
            "max_genes",
            "shuffle",
            "sort_by_length",
            "seed",
            "world_size",
            "uneven",
            "drop_last",
            "pool_size",
        )
        shards = ",".join(shard.sha256 for shard in self.corpus.shards(self.split))
        return {name: getattr(self, name) for name in names} | {"corpus": f"{_hash_text(shards):016x}"}

    # plan

    def plan(self, rank: int | None = None) -> Plan:
        """Return what a rank, by default this one, reads in the current epoch."""
        rank = self.rank if rank is None else rank
        blocks = np.arange(len(self._reader.sizes))
        if self.shuffle:
            blocks = _permutation(len(blocks), self.seed, self.epoch)
        ends = np.cumsum(self._reader.sizes[blocks])
        total = int(ends[-1])
        share, rest = divmod(total, self.world_size)
        if rest and self.uneven == "wrap":
            share += 1
        n_steps = self._count_steps(share)
        n_yielded = share
        if self.drop_last and self.batch_size is not None:
            n_yielded = share // self.batch_size * self.batch_size
        over = n_yielded * self.world_size - total
        start = rank * share
        return Plan(blocks, ends, start, start + share, n_steps, max(-over, 0), max(over, 0))

    def _count_steps(self, share: int) -> int:
        if self.token_budget is not None:
            raise NotImplementedError
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    # iteration

    def __iter__(self) -> Iterator[tuple[Cells, dict[str, np.ndarray]]]:
        if not self._resume:
            self._step = 0
        self._resume = False
        return self._iterate(self.plan(), self.epoch)

    def _iterate(self, plan: Plan, epoch: int) -> Iterator[tuple[Cells, dict[str, np.ndarray]]]:
        batches_per_pool = self.pool_size // self.batch_size
        pool, skip = divmod(self._step, batches_per_pool)
        starts = list(range(plan.start + pool * self.pool_size, plan.stop, self.pool_size))
        with ThreadPoolExecutor(1) as assembling, ThreadPoolExecutor(self.num_threads) as decoding:
            pending = collections.deque()
            for start in starts:
                stop = min(start + self.pool_size, plan.stop)
                pending.append(assembling.submit(self._read_pool, plan, start, stop, decoding))
                if len(pending) < 2:
                    continue
                yield from self._batches(pending.popleft().result(), plan, skip)
                skip = 0
            while pending:
                yield from self._batches(pending.popleft().result(), plan, skip)
                skip = 0

    def _batches(self, pool: "_Pool", plan: Plan, skip: int):
        for start, stop in pool.bounds[skip:]:
            if self._step == plan.n_steps:
                return
            self._step += 1
            yield pool.cells[start:stop], {name: values[start:stop] for name, values in pool.obs.items()}

    def _read_pool(self, plan: Plan, start: int, stop: int, decoding: ThreadPoolExecutor) -> "_Pool":
        total = int(plan.ends[-1])
        spans = [(start, min(stop, total)), (0, stop - total)] if stop > total > start else [(start, stop)]
        if start >= total:
            spans = [(start - total, stop - total)]
        pieces = []
        for first, last in spans:
            low, high = np.searchsorted(plan.ends, [first, last - 1], side="right")
            for place in range(low, high + 1):
                block = int(plan.blocks[place])
                size = int(self._reader.sizes[block])
                begin = int(plan.ends[place]) - size
                pieces.append((block, max(first - begin, 0), min(last - begin, size)))
        blocks = list(decoding.map(self._read_block, [block for block, _, _ in pieces]))
        cells = Cells.concatenate([b.cells[i:j] for b, (_, i, j) in zip(blocks, pieces, strict=True)])
        obs = {
            name: np.concatenate([b.obs[name][i:j] for b, (_, i, j) in zip(blocks, pieces, strict=True)])
            for name in self.columns
        }
        order, bounds = self._arrange(np.diff(cells.indptr), start)
        return _Pool(cells[order], {name: values[order] for name, values in obs.items()}, bounds)

    def _arrange(self, lengths: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of a pool's cells and the bounds of its batches, `(n_batches, 2)`."""
        order = np.arange(len(lengths))
        if self.shuffle:
            order = _permutation(len(lengths), self.seed, self.epoch, start)
        if self.sort_by_length:
            order = order[np.argsort(lengths[order], kind="stable")]
        edges = np.append(np.arange(0, len(lengths), self.batch_size), len(lengths))
        bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        if self.shuffle:
            whole = len(lengths) // self.batch_size  # a smaller batch stays the last
            bounds[:whole] = bounds[_permutation(whole, self.seed, self.epoch, start, 1)]
        return order, bounds

    def _read_block(self, block: int) -> "_Block":
        found = self._kept.get(block)
        if found is None:
            found = self._reader.read(block)
            if self.in_memory:
                self._kept[block] = found
        return found


def as_dataset(stream: CellStream, collate: Callable[..., Mapping]):
    """Wrap a stream as a `datasets.IterableDataset` of which every example is one finished batch.

    The batch passes through untouched, tensors included, so that `datasets` costs some 30 microseconds per batch.
    Train with `per_device_train_batch_size=1` and `data_collator=take_batch`.

    Args:
        stream: The stream.
        collate: Called as `collate(cells, obs, epoch=epoch)`, returns the model's inputs by name.

    Returns:
        `datasets.IterableDataset`.
    """
    import datasets

    def batches():
        for cells, obs in stream:
            yield dict(collate(cells, obs, epoch=stream.epoch))

    return datasets.IterableDataset.from_generator(batches)


def take_batch(examples: list) -> Mapping:
    """Data collator for [`as_dataset`]: the one example is the batch."""
    (batch,) = examples
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Block:
    """One decoded row group."""

    cells: Cells
    obs: dict[str, np.ndarray]


@dataclasses.dataclass
class _Pool:
    """Cells that were shuffled together, in the order in which they are handed out; `bounds` are the batches."""

    cells: Cells
    obs: dict[str, np.ndarray]
    bounds: np.ndarray


class _ParquetReader:
    """Reads row groups of the published layout. `sizes` are their numbers of cells, over all shards of the split."""

    def __init__(self, corpus: Corpus, split: str, columns: list[str]):
        self.corpus = corpus
        self.columns = columns
        self.shards = corpus.shards(split)
        sizes, self._places = [], []
        for index, shard in enumerate(self.shards):
            for group, first in enumerate(range(0, shard.n_cells, shard.row_group_size)):
                sizes.append(min(shard.row_group_size, shard.n_cells - first))
                self._places.append((index, group))
        self.sizes = np.array(sizes, dtype=np.int64)
        self._local = threading.local()

    def read(self, block: int) -> _Block:
        index, group = self._places[block]
        if not hasattr(self._local, "open"):  # a ParquetFile serves one thread at a time
            self._local.open = functools.lru_cache(OPEN_FILES)(self._open)
        file = self._local.open(index)
        try:
            table = file.read_row_group(group, columns=[*CELL_COLUMNS, *self.columns], use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"Row group {group} of {self.corpus.path / self.shards[index].path} can't be read: {error}. "
                "The shard is damaged: copy it anew, or delete it and run `prepare` again."
            ) from error
        return _Block(table_to_cells(table), {name: _strings(table[name]) for name in self.columns})

    def _open(self, index: int) -> pq.ParquetFile:
        return self.corpus.open_shard(self.shards[index])


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    """Return a string column as an object array, None for null."""
    column = column.combine_chunks()
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy(zero_copy_only=False)
    labels = np.append(column.dictionary.to_numpy(zero_copy_only=False), None)
    return labels[column.indices.fill_null(len(labels) - 1).to_numpy()]


# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014) of uint64, elementwise."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _hashes(n: int, *key: int) -> np.ndarray:
    """Return `n` random uint64 that depend on the key alone, on any platform and NumPy."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part & (2**64 - 1)))
    return _mix(_mix(np.arange(n, dtype=np.uint64)) ^ state)


def _permutation(n: int, *key: int) -> np.ndarray:
    """Return a random permutation of `range(n)` that depends on the key alone."""
    return np.argsort(_hashes(n, *key), kind="stable")


def _hash_text(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
