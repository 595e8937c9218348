"""Cells from a corpus, shuffled, in batches: [`CellStream`].

```python
stream = CellStream("corpus", split="train", batch_size=64, seed=0)
for epoch in range(3):
    stream.set_epoch(epoch)
    for cells, obs in stream:           # Cells, and {column: array of str, None where unknown}
        batch = feature_extractor(cells, epoch=epoch)
```

**Order.** A plan permutes the row groups of all shards by (seed, epoch). Laid end to end in this order, the cells are
one long sequence; rank `r` of `n` owns the `r`-th of `n` equal stretches of it. A stretch is read in pools of
`pool_size` cells, which are some tens of row groups; while one pool is used, threads decode the next. Since the length
of every cell is known beforehand, a pool is permuted and cut into batches before it is read, and each cell is decoded
straight to its place: batches are views of the pool, in which no cell was moved twice.

**Ranks** yield the same number of batches. What this takes is said by [`CellStream.plan`]: with `uneven="wrap"` a few
cells are seen twice so that all are seen, with `"drop"` a few are left out; alone, a rank does neither.

**Resuming** is exact: the position is (epoch, batches handed out). Nothing of a pool is saved; the plan says what lies
where. `state_dict()` is the same on all ranks, and may be loaded by another number of them.

**Randomness** is hashes of (seed, epoch, place in the plan) here, and of (seed, epoch, cell id) in the feature
extractor: what a cell looks like depends neither on the batch size nor on the number of ranks or threads.

**Speed** comes from the training layout, built once by `python -m scmmgpt.train cache corpus` or `build_cache`.
Without it, the published layout is read, which takes some 20 microseconds of CPU more per cell.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numba
import numpy as np

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.cache import (
    CacheReader,
    MemoryReader,
    ParquetReader,
    Pool,
    build_cache,
    cache_matches,
    default_cache_dir,
)
from scmmgpt.train.data.corpus import OBS_COLUMNS, Corpus, open_corpus


logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 2**28  # splits that take less than this once decoded are kept in memory
MAX_REPEATS = 255  # times that balancing may show one cell in an epoch
Batch = tuple[Cells, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one rank reads in one epoch.

    Args:
        blocks: Row groups of the split in the order of this epoch, `int64 (n_blocks,)`.
        ends: For each of them, where it ends in the sequence of all cells, `int64 (n_blocks,)`.
        start: Where the stretch of this rank begins in the sequence.
        stop: Where it ends; past the end of the sequence it goes on at its beginning.
        n_steps: Batches that every rank yields.
        n_dropped: Cells of the epoch that no rank yields.
        n_repeated: Cells of the epoch that are yielded a second time to make ranks equal.
        repeats: How often each cell of the split occurs in the sequence, `uint8 (n_cells,)`; None for once.
    """

    blocks: np.ndarray
    ends: np.ndarray
    start: int
    stop: int
    n_steps: int
    n_dropped: int
    n_repeated: int
    repeats: np.ndarray | None = None


class CellStream:
    """Iterates over shuffled batches of a corpus as `(Cells, obs)`.

    Args:
        corpus: A `Corpus`, or the path of one.
        split: `"train"`, `"validation"` or `"test"`.
        batch_size: Cells per batch. Give this or `token_budget`. Losses that compare the cells of all ranks want this.
        token_budget: Tokens per batch, padding included: cells times the length of the longest, where a cell's length
            is its number of genes and one more for `<cls>`, at most `max_genes`.
        max_genes: Length at which the feature extractor cuts a cell.
        columns: Annotations to yield, of `OBS_COLUMNS`; all but the barcode by default.
        shuffle: Whether to permute. Without, cells come in stored order.
        sort_by_length: Whether batches hold cells of like length. By default only with a token budget: it saves
            padding, but cells of like length tend to be of like type, which contrastive learning does not want.
        balance: An annotation, such as `"cell_type"` or `"dataset_id"`, whose labels are to be seen more evenly. An
            epoch then draws as many cells as the split has, cells of rare labels several times and of frequent ones
            not always; other draws in every epoch.
        temperature: With `balance`, a label of `n` cells is drawn in proportion to `n ** (1 / temperature)`: 1 leaves
            things as they are, infinity makes all labels equal.
        weights: With `balance`, label -> factor on how often it is drawn; 1 for labels not named, 0 leaves one out.
            Cells without a label are named by None.
        max_repeats: With `balance`, how often a cell may be drawn in one epoch. A label with few cells then falls
            short of its share, and the epoch is that much smaller.
        seed: Seed of the order.
        epoch: First epoch; see [`CellStream.set_epoch`].
        rank: Which process this is.
        world_size: Of how many.
        uneven: What equal numbers of batches on all ranks cost: `"wrap"` repeats a few cells, `"drop"` leaves out a
            few. With one rank neither happens.
        drop_last: Whether to leave out the last batch of an epoch if it is smaller than `batch_size`.
        pool_size: Cells shuffled together. Two pools are in memory at a time, some 50 MB each.
        num_threads: Threads that decode the next pool.
        in_memory: Whether to keep all cells of the split decoded. By default if they take less than 256 MB.
        layout: `"cache"`, `"published"`, or `"auto"`: the cache if there is one. The order is the same.
        cache_dir: Where the cache lies; `cache` in the corpus by default.
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
        balance: str | None = None,
        temperature: float = float("inf"),
        weights: Mapping[str | None, float] | None = None,
        max_repeats: int = 10,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        uneven: str = "wrap",
        drop_last: bool = False,
        pool_size: int = 8192,
        num_threads: int | None = None,
        in_memory: bool | None = None,
        layout: str = "auto",
        cache_dir: str | os.PathLike | None = None,
    ):
        if (batch_size is None) == (token_budget is None):
            raise ValueError(f"Give batch_size ({batch_size}) or token_budget ({token_budget}), one of the two.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}; ranks are numbered from 0.")
        if uneven not in ("wrap", "drop"):
            raise ValueError(f"uneven is {uneven!r}; choose 'wrap' or 'drop'.")
        if token_budget is not None and token_budget < max_genes:
            raise ValueError(f"token_budget {token_budget} does not hold one cell of max_genes ({max_genes}) tokens.")
        if balance is None and weights is not None:
            raise ValueError("weights were given without balance; name the annotation that they are for.")
        if not 1 <= max_repeats <= MAX_REPEATS:
            raise ValueError(f"max_repeats is {max_repeats}; choose 1 to {MAX_REPEATS}.")
        if temperature < 1:
            raise ValueError(f"temperature is {temperature}; 1 keeps the frequencies, more makes them more even.")
        for name, value in (("batch_size", batch_size), ("pool_size", pool_size), ("num_threads", num_threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        columns = [name for name in OBS_COLUMNS if name != "barcode"] if columns is None else list(columns)
        for name in columns if balance is None else [*columns, balance]:
            if name not in OBS_COLUMNS:
                raise ValueError(f"A corpus has no annotation {name!r}; it has {list(OBS_COLUMNS)}.")
        self.corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
        self.split = split
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.max_genes = max_genes
        self.columns = columns
        self.shuffle = shuffle
        self.sort_by_length = token_budget is not None if sort_by_length is None else sort_by_length
        self.balance = balance
        self.temperature = float(temperature)
        self.weights = dict(weights or {})
        self.max_repeats = max_repeats
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.uneven = uneven
        self.drop_last = drop_last
        self.pool_size = pool_size
        self.num_threads = min(2, os.cpu_count() or 1) if num_threads is None else num_threads
        self._reader = self._make_reader(layout, cache_dir, in_memory)
        self._planned: tuple[int, int, Plan] | None = None  # for (epoch, rank)
        self._step = 0  # batches handed out in this epoch, under the present settings
        self._before: list[dict] = []  # settings, and batches handed out, earlier in this epoch
        self._resume = False  # whether the next iteration begins at `_step`, not at the beginning

    def _make_reader(self, layout: str, cache_dir, in_memory: bool | None):
        if layout not in ("auto", "cache", "published"):
            raise ValueError(f"layout is {layout!r}; choose 'auto', 'cache' or 'published'.")
        shards = self.corpus.shards(self.split)
        path = default_cache_dir(self.corpus) if cache_dir is None else Path(cache_dir)
        matches = layout != "published" and cache_matches(self.corpus, path)
        if layout == "cache" and (not matches or "barcode" in self.columns):
            raise ValueError(
                f"The cache at {path} has no barcodes. Leave them out of `columns`, or choose layout='auto'."
                if matches
                else f"There is no cache of this corpus at {path}. Make one with `python -m scmmgpt.train cache`, "
                "or choose layout='auto'."
            )
        if layout == "auto" and not matches and (path / "index.json").exists():
            logger.warning("The cache at %s is not used: it was built from another state of the corpus.", path)
        if matches and "barcode" not in self.columns:
            reader = CacheReader(self.corpus, self.split, self.columns, path)
        else:
            reader = ParquetReader(self.corpus, self.split, self.columns)
        bytes_per_value = 2 + max(np.dtype(shard.counts_dtype).itemsize for shard in shards)
        small = bytes_per_value * sum(shard.n_values for shard in shards) <= IN_MEMORY_BYTES
        return MemoryReader(reader) if (small if in_memory is None else in_memory) else reader

    def __len__(self) -> int:
        """Number of batches that every rank yields in the current epoch."""
        return self.plan().n_steps

    @property
    def n_cells(self) -> int:
        """Cells of the split, over all ranks."""
        return int(self._reader.sizes.sum())

    def for_rank(self, rank: int) -> "CellStream":
        """Return the stream of another rank. It shares what is in memory with this one."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank is {rank} of world_size {self.world_size}; ranks are numbered from 0.")
        other = copy.copy(self)
        other.rank = rank
        return other

    def for_single_process(self) -> "CellStream":
        """Return the stream that a process alone would read. It shares what is in memory with this one."""
        other = copy.copy(self)
        other.rank, other.world_size, other._planned = 0, 1, None
        return other

    # Position

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. A position loaded within this epoch is kept."""
        if epoch != self.epoch:
            self._go_to(epoch, 0, [], resume=False)

    def state_dict(self) -> dict:
        """Return the position, JSON-able and the same on all ranks, with what it depends on."""
        return {
            "epoch": self.epoch,
            "step": self._step,
            "before": self._before,
            **self._settings(),
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go to a saved position: the next iteration yields what was not handed out before.

        The number of ranks and the size of batches may differ from those that the position was saved with. The rest
        of the epoch then goes to the new ranks in new batches; still no cell is lost or seen again, but for those
        that make ranks equal.
        """
        for name, value in self._identity().items():
            if state.get(name, value) != value:
                raise ValueError(
                    f"The state was saved with {name}={state[name]!r}, but this stream has {value!r}: the position "
                    "would mean other cells. Use the same setting, or start at an epoch with `set_epoch`."
                )
        step, before = int(state["step"]), list(state.get("before", []))
        settings = {name: state.get(name, value) for name, value in self._settings().items()}
        if step and settings != self._settings():
            step, before = 0, [*before, {**settings, "step": step}]
        self._go_to(int(state["epoch"]), step, before, resume=True)

    def _go_to(self, epoch: int, step: int, before: list[dict], *, resume: bool) -> None:
        if before != self._before:
            self._planned = None
        self.epoch, self._step, self._before, self._resume = epoch, step, before, resume

    def seek(self, n_batches: int) -> None:
        """Go to where a rank is after `n_batches` batches from the beginning of epoch 0, epoch after epoch.

        A trainer that counts optimiser steps resumes with `seek(global_step * gradient_accumulation_steps)`; unlike
        the position of the stream, its count does not include batches that were fetched ahead.
        """
        self._go_to(0, 0, [], resume=True)
        while n_batches >= (n_steps := len(self)):
            n_batches -= n_steps
            self._go_to(self.epoch + 1, 0, [], resume=True)
        self._step = n_batches

    def _settings(self) -> dict:
        """What decides which rank gets which cells in which batch. It may change in the middle of an epoch."""
        names = "batch_size token_budget max_genes sort_by_length world_size uneven drop_last pool_size".split()
        return {name: getattr(self, name) for name in names}

    def _identity(self) -> dict:
        """What decides which cells an epoch has, and roughly in which order."""
        identity = {name: getattr(self, name) for name in ("split", "shuffle", "seed")}
        if self.balance is not None:
            weights = sorted((str(label), factor) for label, factor in self.weights.items())
            identity["balance"] = [self.balance, str(self.temperature), self.max_repeats, *map(list, weights)]
        content = "".join(shard.sha256 for shard in self.corpus.shards(self.split))
        return {**identity, "shards": hashlib.sha256(content.encode()).hexdigest()[:16]}

    # Plan

    def plan(self) -> Plan:
        """Return what this rank reads in the current epoch, and what equal ranks cost."""
        if self._planned is None or self._planned[:2] != (self.epoch, self.rank):
            self._planned = self.epoch, self.rank, self._make_plan()
        return self._planned[2]

    def _make_plan(self) -> Plan:
        repeats = self._draw_repeats()
        for settings in self._before:
            repeats = self._subtract(repeats, settings)
        return self._plan_over(repeats)

    def _subtract(self, repeats: np.ndarray | None, settings: dict) -> np.ndarray:
        """Take off what was handed out under other settings, earlier in the epoch."""
        left = np.ones(self.n_cells, np.int16) if repeats is None else repeats.astype(np.int16)
        earlier = copy.copy(self)
        vars(earlier).update({name: value for name, value in settings.items() if name != "step"})
        for rank in range(earlier.world_size):
            earlier.rank = rank
            plan = dataclasses.replace(earlier._plan_over(repeats), n_steps=settings["step"])
            for first, last, begin, end in earlier._schedule(plan, 0):
                pieces = earlier._pieces(plan, first, last)
                order, bounds = earlier._arrange(earlier._lengths(pieces), first)
                cells = np.concatenate([self._reader.starts[block] + rows for block, rows in pieces])[order]
                seen = np.concatenate([np.arange(start, stop) for start, stop in bounds[begin:end]])
                np.subtract.at(left, cells[seen], 1)
        return np.maximum(left, 0).astype(np.uint8)  # below 0 where ranks were made equal by repeating

    def _plan_over(self, repeats: np.ndarray | None) -> Plan:
        sizes = self._reader.sizes
        if repeats is not None:
            sizes = np.add.reduceat(repeats.astype(np.int64), self._reader.starts)
        blocks = np.arange(len(sizes))
        if self.shuffle:
            blocks = permutation(len(blocks), self.seed, self.epoch)
        ends = np.cumsum(sizes[blocks])
        total = int(ends[-1])
        share = total // self.world_size if self.uneven == "drop" else -(-total // self.world_size)
        if share == 0 and not self._before:  # else the epoch was over when the ranks changed
            raise ValueError(
                f"{total} cells of split {self.split!r} do not go round {self.world_size} ranks. "
                "Use fewer ranks, or uneven='wrap'."
            )
        plan = Plan(
            blocks=blocks,
            ends=ends,
            start=self.rank * share,
            stop=(self.rank + 1) * share,
            n_steps=-(-share // self.batch_size) if self.batch_size else 0,
            n_dropped=max(total - share * self.world_size, 0),
            n_repeated=max(share * self.world_size - total, 0),
            repeats=repeats,
        )
        if self.token_budget is not None:
            return self._equalise(plan)
        if self.drop_last and share % self.batch_size:
            if plan.n_steps == 1:
                raise ValueError(
                    f"drop_last leaves nothing of an epoch: a rank has {share} cells, batch_size is {self.batch_size}."
                )
            n_dropped = plan.n_dropped + share % self.batch_size * self.world_size
            return dataclasses.replace(plan, n_steps=plan.n_steps - 1, n_dropped=n_dropped)
        return plan

    def _equalise(self, plan: Plan) -> Plan:
        """Choose the number of steps where ranks would have unequal ones, and count what that costs."""
        share = plan.stop - plan.start
        if share == 0:
            return plan
        sizes = [self._batch_sizes(plan, rank * share) for rank in range(self.world_size)]
        n_steps = [len(own) for own in sizes]
        n_steps = min(n_steps) if self.uneven == "drop" else max(n_steps)
        return dataclasses.replace(
            plan,
            n_steps=n_steps,
            n_dropped=plan.n_dropped + sum(int(own[n_steps:].sum()) for own in sizes),
            n_repeated=plan.n_repeated + sum(int(np.resize(own, n_steps)[len(own) :].sum()) for own in sizes),
        )

    def _batch_sizes(self, plan: Plan, start: int) -> np.ndarray:
        """Number of cells of every batch of a stretch, in order."""
        sizes = []
        for first, last in self._pools(plan, start):
            _, bounds = self._arrange(self._lengths(self._pieces(plan, first, last)), first)
            sizes.append(bounds[:, 1] - bounds[:, 0])
        return np.concatenate(sizes)

    def _pools(self, plan: Plan, start: int) -> list[tuple[int, int]]:
        """Cut the stretch that begins at `start` into pools of about equal size, the last one no worse mixed."""
        share = plan.stop - plan.start
        unit = self.batch_size or 1  # whole batches per pool, so that only the last batch of an epoch can be smaller
        n_units = -(-share // unit)
        n_pools = max(-(-n_units // max(self.pool_size // unit, 1)), 1)
        edges = np.minimum(np.arange(n_pools + 1) * n_units // n_pools * unit, share) + start
        return list(itertools.pairwise(edges.tolist()))

    def _pieces(self, plan: Plan, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return the row groups, and their rows, that make up `[start, stop)` of the sequence."""
        total = int(plan.ends[-1])
        spans = []
        while start < stop:
            first = start % total
            last = min(first + stop - start, total)
            spans.append((first, last))
            start += last - first
        pieces = []
        for first, last in spans:
            low, high = np.searchsorted(plan.ends, [first, last - 1], side="right")
            for place in range(low, high + 1):
                block, end = int(plan.blocks[place]), int(plan.ends[place])
                begin = int(plan.ends[place - 1]) if place else 0
                rows = np.arange(self._reader.sizes[block])
                if plan.repeats is not None:
                    cells = self._reader.starts[block] + rows
                    rows = np.repeat(rows, plan.repeats[cells])
                rows = rows[max(first - begin, 0) : min(last, end) - begin]
                if len(rows):
                    pieces.append((block, rows))
        return pieces

    def _lengths(self, pieces: list[tuple[int, np.ndarray]]) -> np.ndarray:
        return np.concatenate([self._reader.n_genes[self._reader.starts[block] + rows] for block, rows in pieces])

    def _arrange(self, lengths: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Order the cells of the pool that begins at `start` and cut it into batches.

        Returns:
            The pool's cells in the order in which they are handed out, `int64 (n_cells,)`, and where batches begin
            and end, `int64 (n_batches, 2)`, in the order in which they are handed out.
        """
        order = np.arange(len(lengths))
        if self.shuffle:
            order = permutation(len(lengths), self.seed, self.epoch, start)
        if self.sort_by_length:
            order = order[np.argsort(lengths[order], kind="stable")]
        if self.token_budget is None:
            edges = np.append(np.arange(0, len(lengths), self.batch_size), len(lengths))
            n_movable = len(lengths) // self.batch_size  # a smaller batch stays the last
        else:
            tokens = np.minimum(lengths[order].astype(np.int64) + 1, self.max_genes)
            edges = _cut_by_tokens(tokens, self.token_budget)
            n_movable = len(edges) - 1
        bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        if self.shuffle and self.sort_by_length:
            bounds[:n_movable] = bounds[permutation(n_movable, self.seed, self.epoch, start, 1)]
        return order, bounds

    def _draw_repeats(self) -> np.ndarray | None:
        """With balancing, draw how often each cell of the split occurs in this epoch, `uint8 (n_cells,)`."""
        if self.balance is None:
            return None
        labels, codes = self._reader.label_codes(self.balance)
        n_cells = np.bincount(codes, minlength=len(labels))
        held = [label for label, n in zip(labels, n_cells, strict=True) if n]
        unknown = [label for label in self.weights if label not in held]
        if unknown:
            raise ValueError(
                f"weights names {unknown}, but {self.balance!r} of split {self.split!r} holds {held[:20]}."
            )
        shares = np.array([self.weights.get(label, 1.0) for label in labels]) * (n_cells > 0)
        shares = shares * np.maximum(n_cells, 1) ** (1 / self.temperature)
        if not shares.sum() > 0:
            raise ValueError(f"The weights {self.weights} leave no cell of split {self.split!r}.")
        expected = np.minimum(shares / shares.sum() * len(codes) / np.maximum(n_cells, 1), self.max_repeats)
        whole = np.floor(expected)
        # A cell occurs `whole` times, and once more with the probability that is left.
        threshold = ((expected - whole) * 2.0**64).clip(0, 2.0**64 - 2**12).astype(np.uint64)
        more = hashes(len(codes), self.seed, self.epoch, 2) < threshold[codes]
        return whole.astype(np.uint8)[codes] + more.astype(np.uint8)

    # Iteration

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, transform: Callable | None = None, *, workers: int = 1) -> Iterator:
        """Iterate over the current epoch, or the rest of it after `load_state_dict`.

        Args:
            transform: Called as `transform(cells, obs)` ahead of the consumer, in threads; its results are yielded in
                order. The position counts what was handed out, not what was prepared.
            workers: Threads that do so.
        """
        if not self._resume:
            self._go_to(self.epoch, 0, [], resume=False)
        self._resume = False
        prepared = self._iterate(self.plan(), self._step)
        if transform is not None:
            prepared = _transform_ahead(prepared, transform, workers)
        return self._hand_out(prepared)

    def _hand_out(self, batches: Iterator) -> Iterator:
        try:
            for batch in batches:
                self._step += 1
                yield batch
        finally:
            batches.close()

    def _iterate(self, plan: Plan, step: int) -> Iterator[Batch]:
        assembling, decoding = ThreadPoolExecutor(1), ThreadPoolExecutor(self.num_threads)
        pending: collections.deque = collections.deque()
        try:
            for first, last, begin, end in self._schedule(plan, step):
                pending.append((assembling.submit(self._read_pool, plan, first, last, decoding), begin, end))
                if len(pending) == 2:
                    yield from _cut(*pending.popleft())
            while pending:
                yield from _cut(*pending.popleft())
        finally:
            for executor in (assembling, decoding):
                executor.shutdown(wait=True, cancel_futures=True)

    def _schedule(self, plan: Plan, step: int) -> Iterator[tuple[int, int, int, int]]:
        """From a step on: pools as (start, stop, first batch, last batch), until all steps are done."""
        pools, at = self._pools(plan, plan.start), 0
        while at < plan.n_steps:
            for first, last in pools:
                if self.token_budget is None:
                    n_batches = -(-(last - first) // self.batch_size)
                else:
                    n_batches = len(self._arrange(self._lengths(self._pieces(plan, first, last)), first)[1])
                begin, end = max(step - at, 0), min(n_batches, plan.n_steps - at)
                if begin < end:
                    yield first, last, begin, end
                at += n_batches
                if at >= plan.n_steps:
                    return

    def _read_pool(self, plan: Plan, start: int, stop: int, decoding: ThreadPoolExecutor) -> tuple[Pool, np.ndarray]:
        pieces = self._pieces(plan, start, stop)
        lengths = self._lengths(pieces)
        order, bounds = self._arrange(lengths, start)
        dtypes = {self._reader.counts_dtype(block) for block, _ in pieces}
        pool = Pool.allocate(lengths[order], np.dtype("float32" if "float32" in dtypes else "uint16"), self.columns)
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        edges = np.cumsum([len(rows) for _, rows in pieces])[:-1]
        tasks = [
            decoding.submit(self._reader.fill, pool, block, rows, own)
            for (block, rows), own in zip(pieces, np.split(places, edges), strict=True)
        ]
        for task in tasks:
            task.result()
        return pool, bounds


def _cut(future, begin: int, end: int) -> Iterator[Batch]:
    pool, bounds = future.result()
    for start, stop in bounds[begin:end].tolist():
        yield pool[start:stop]


def _transform_ahead(batches: Iterator[Batch], transform: Callable, workers: int) -> Iterator:
    """Apply a function to batches in threads, in order, with two results per thread waiting."""
    pending: collections.deque = collections.deque()
    executor = ThreadPoolExecutor(workers)
    try:
        for cells, obs in batches:
            pending.append(executor.submit(transform, cells, obs))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        batches.close()


def as_dataset(
    stream: CellStream, collate: Callable[..., Mapping], *, num_epochs: int | None = None, workers: int = 1
):
    """Wrap a stream as a `datasets.IterableDataset` of which every example is one finished batch.

    The batch passes through untouched, tensors included: `datasets` touches batches, not cells. Collating runs ahead
    in threads. With `transformers.Trainer` and TRL's trainers:

    ```python
    arguments = TrainingArguments(
        per_device_train_batch_size=1,                    # one example is one batch
        max_steps=10_000,                                 # a stream has no end
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},   # every rank reads its own share
        ignore_data_skip=True,                            # when resuming, see below
    )
    trainer = Trainer(model, arguments, train_dataset=as_dataset(stream, collate), data_collator=take_batch)
    ```

    The dataset has one shard per rank of the stream, which `datasets.distributed.split_dataset_by_node` and accelerate
    deal out; what a rank then reads is the plan of the stream. With several ranks it must be split.

    A trainer that resumes skips batches by making them; to go there at once, call `stream.seek(batches trained)`
    before training and set `ignore_data_skip`.

    Args:
        stream: The stream, of any rank.
        collate: Called as `collate(cells, obs, epoch=epoch)` in a thread; returns the model's inputs by name.
        num_epochs: Epochs to yield from the stream's current one on, each in an order of its own; endless by default.
        workers: Threads that collate.

    Returns:
        `datasets.IterableDataset`.
    """
    import datasets

    batches = _EpochBatches(stream, collate, num_epochs, workers)
    return datasets.IterableDataset.from_generator(batches, gen_kwargs={"ranks": list(range(stream.world_size))})


class _EpochBatches:
    """The generator behind `as_dataset`.

    `datasets` pickles its generators, to hash and to copy them. A stream has open files and a collator may hold
    models, so what is pickled is only a name, under which the object is found again in the same or a forked process.
    """

    _alive: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()

    def __init__(self, stream: CellStream, collate: Callable[..., Mapping], num_epochs: int | None, workers: int):
        self.stream, self.collate, self.num_epochs, self.workers = stream, collate, num_epochs, workers
        self.name = uuid.uuid4().hex
        self._alive[self.name] = self

    def __reduce__(self):
        return _find_batches, (self.name,)

    def __call__(self, ranks: list[int]) -> Iterator[dict]:
        for rank in ranks:
            stream = self.stream if rank == self.stream.rank else self.stream.for_rank(rank)
            first = stream.epoch
            try:
                while self.num_epochs is None or stream.epoch < first + self.num_epochs:
                    finish = functools.partial(_finish_batch, self.collate, stream.epoch)
                    yield from stream.batches(finish, workers=self.workers)
                    stream.set_epoch(stream.epoch + 1)
            finally:
                if self.num_epochs is not None:
                    stream.set_epoch(first)  # so that an evaluation sees the same batches every time


def _find_batches(name: str) -> _EpochBatches:
    found = _EpochBatches._alive.get(name)
    if found is None:
        raise ValueError(
            "A dataset made by `as_dataset` can't be sent to a process that was not forked from its own. "
            "Use a DataLoader with num_workers=0: collating already runs ahead in threads (`workers`)."
        )
    return found


def _finish_batch(collate: Callable[..., Mapping], epoch: int, cells: Cells, obs: dict[str, np.ndarray]) -> dict:
    return dict(collate(cells, obs, epoch=epoch))


def take_batch(examples: list) -> Mapping:
    """Return the one example, which is the batch: the data collator for [`as_dataset`]."""
    (batch,) = examples
    return batch


@numba.njit(cache=True)
def _cut_by_tokens(tokens, budget):
    """Return the edges of the longest batches whose size times longest cell is within the budget."""
    edges = [0]
    longest = 0
    for i in range(len(tokens)):
        longest = max(longest, tokens[i])
        if longest * (i + 1 - edges[-1]) > budget:
            edges.append(i)
            longest = tokens[i]
    edges.append(len(tokens))
    return np.array(edges)


# Randomness that is the same on every platform and with every NumPy


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) of uint64, elementwise."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashes(n: int, *key: int) -> np.ndarray:
    """Return `n` random uint64 that depend on the key alone."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % 2**64))
    return _mix(_mix(np.arange(n, dtype=np.uint64)) ^ state)


def permutation(n: int, *key: int) -> np.ndarray:
    """Return a random permutation of `range(n)` that depends on the key alone."""
    return np.argsort(hashes(n, *key), kind="stable")


__all__ = ["CellStream", "Plan", "as_dataset", "build_cache", "take_batch"]
