"""Which cells come when: [`CellOrder`]. Numbers in, numbers out; `stream.py` reads the cells.

1. **Blocks.** A permutation by (seed, epoch) orders the blocks of the split, which are row groups of its shards. Laid
   end to end in this order, the cells of the epoch are one long sequence. With balancing, a cell occurs in the
   sequence as often as it was drawn for this epoch.
2. **Ranks.** Rank `r` of `n` owns the `r`-th of `n` equal stretches of the sequence. All ranks take as many steps:
   where the division leaves a remainder, a few cells occur on two ranks.
3. **Pools.** A stretch is cut into pools of some 8,000 cells, which are read together.
4. **Batches.** A pool is permuted and cut into batches: of so many cells, or of cells of like length within a number
   of tokens. The length of every cell is known beforehand, so batches are known before anything is read.

All randomness is hashes of (seed, epoch, place in the sequence): the order depends on nothing else, is the same on
every platform, and any step of any epoch can be found without the steps before it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numba
import numpy as np

from scmmgpt.cells_scmmgpt import hashes, permutation


POOL_SIZE = 8192  # cells that are shuffled together; two pools are in memory at a time, some 50 MB each
MAX_REPEATS = 10  # times that balancing may show one cell in an epoch


@dataclasses.dataclass(frozen=True)
class Pool:
    """Cells that are read together, and the batches that they make.

    Args:
        pieces: What to read: a block, rows of it, and the place in the pool that each of these rows takes.
        lengths: Genes of every cell of the pool, in the order of places, `uint16 (n_cells,)`.
        bounds: First place of every batch and the one after its last, `int64 (n_batches, 2)`, in order.
    """

    pieces: list[tuple[int, np.ndarray, np.ndarray]]
    lengths: np.ndarray
    bounds: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class CellOrder:
    """The order of a split in all its epochs.

    Args:
        block_sizes: Cells of every block, `int64 (n_blocks,)`.
        lengths: Genes of every cell, `uint16 (n_cells,)`, block after block.
        batch_size: Cells per batch. Give this or `token_budget`.
        token_budget: Tokens per batch, padding included: cells times the length of the longest, where a cell's length
            is its number of genes and one more for `<cls>`, at most `max_genes`. Batches hold cells of like length.
        max_genes: Length at which the feature extractor cuts a cell.
        shuffle: Whether to permute. Without, cells come in stored order.
        label_codes: Label of every cell, `int (n_cells,)`, of which an epoch is to hold a more even share: it draws as
            many cells as the split has, those of rare labels several times (`MAX_REPEATS` at most), those of frequent
            ones not always, and others in every epoch. None: every cell once.
        temperature: A label of `n` cells is drawn in proportion to `n ** (1 / temperature)`: 1 leaves things as they
            are, infinity makes all labels equal.
        seed: Seed of the order.
        world_size: Number of ranks.
        drop_last: Whether to leave out the last batch of an epoch if it is smaller than `batch_size`.
        pool_size: Cells that are shuffled together.
    """

    block_sizes: np.ndarray
    lengths: np.ndarray
    batch_size: int | None = None
    token_budget: int | None = None
    max_genes: int = 1200
    shuffle: bool = True
    label_codes: np.ndarray | None = None
    temperature: float = float("inf")
    seed: int = 0
    world_size: int = 1
    drop_last: bool = False
    pool_size: int = POOL_SIZE

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.token_budget is None):
            raise ValueError(
                f"Give batch_size ({self.batch_size}) or token_budget ({self.token_budget}), one of the two."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.token_budget is not None and self.token_budget < self.max_genes:
            raise ValueError(
                f"token_budget {self.token_budget} does not hold one cell of max_genes ({self.max_genes}) tokens."
            )
        if self.temperature < 1:
            raise ValueError(f"temperature is {self.temperature}; 1 keeps the frequencies, more makes them more even.")

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Number of cells before each block, `int64 (n_blocks,)`."""
        return np.cumsum(self.block_sizes) - self.block_sizes

    @functools.cached_property
    def _epochs(self) -> dict[int, "EpochOrder"]:
        return {}

    @functools.cached_property
    def _n_steps(self) -> dict[int, int]:
        return {}

    def epoch(self, number: int) -> "EpochOrder":
        """The order within one epoch. The latest is remembered."""
        if number not in self._epochs:
            self._epochs.clear()
            self._epochs[number] = EpochOrder.of(self, number)
        return self._epochs[number]

    def n_steps(self, epoch: int) -> int:
        """Batches of every rank in an epoch. Epochs differ with balancing and with a token budget."""
        if self.label_codes is None and self.token_budget is None:
            epoch = 0
        if epoch not in self._n_steps:
            self._n_steps[epoch] = self.epoch(epoch).n_steps
        return self._n_steps[epoch]

    def locate(self, n_steps: int) -> tuple[int, int]:
        """The epoch, and the step within it, that follow on so many steps from the beginning of epoch 0."""
        epoch = 0
        while n_steps >= self.n_steps(epoch):
            n_steps -= self.n_steps(epoch)
            epoch += 1
        return epoch, n_steps

    def draw_repeats(self, epoch: int) -> np.ndarray | None:
        """How often each cell occurs in an epoch, `uint8 (n_cells,)`; None for once."""
        if self.label_codes is None:
            return None
        n_cells = np.bincount(self.label_codes)
        shares = np.where(n_cells > 0, np.maximum(n_cells, 1) ** (1 / self.temperature), 0)
        expected = shares / shares.sum() * len(self.label_codes) / np.maximum(n_cells, 1)
        expected = np.minimum(expected, MAX_REPEATS)
        whole = np.floor(expected)
        # A cell occurs `whole` times, and once more with the probability that is left.
        threshold = ((expected - whole) * 2.0**64).clip(0, 2.0**64 - 2**12).astype(np.uint64)
        more = hashes(len(self.label_codes), self.seed, epoch, 2) < threshold[self.label_codes]
        return whole.astype(np.uint8)[self.label_codes] + more.astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order within one epoch; made by [`CellOrder.epoch`].

    Args:
        cells: The order that it belongs to.
        epoch: Which epoch.
        blocks: Blocks in the order of this epoch, `int64 (n_blocks,)`.
        ends: For each of them, where it ends in the sequence of all cells, `int64 (n_blocks,)`.
        repeats: How often each cell occurs in the sequence, `uint8 (n_cells,)`; None for once.
        share: Cells of the stretch of each rank.
        n_steps: Batches that every rank takes.
    """

    cells: CellOrder
    epoch: int
    blocks: np.ndarray
    ends: np.ndarray
    repeats: np.ndarray | None
    share: int
    n_steps: int

    @classmethod
    def of(cls, cells: CellOrder, epoch: int) -> "EpochOrder":
        """Permute the blocks and divide the sequence among the ranks."""
        repeats, sizes = cells.draw_repeats(epoch), cells.block_sizes
        if repeats is not None:
            sizes = np.add.reduceat(repeats.astype(np.int64), cells.starts)
        blocks = permutation(len(sizes), cells.seed, epoch) if cells.shuffle else np.arange(len(sizes))
        ends = np.cumsum(sizes[blocks])
        share = -(-int(ends[-1]) // cells.world_size)
        order = cls(cells, epoch, blocks, ends, repeats, share, n_steps=0)
        if cells.batch_size is None:
            ranks = range(cells.world_size)
            n_steps = max(sum(order._n_batches(*pool) for pool in order._cut(rank)) for rank in ranks)
        elif cells.drop_last:
            n_steps = share // cells.batch_size
            if n_steps == 0:
                raise ValueError(
                    f"drop_last leaves nothing of an epoch: a rank has {share} cells, batch_size is "
                    f"{cells.batch_size}."
                )
        else:
            n_steps = -(-share // cells.batch_size)
        return dataclasses.replace(order, n_steps=n_steps)

    def pools(self, rank: int, step: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """The pools of a rank from a step on, until all steps are done.

        Yields:
            Where the pool begins and ends in the sequence, and its first batch to be used and the one after the last.
        """
        pools, at = self._cut(rank), 0
        while at < self.n_steps:  # a rank with too few batches begins its stretch again
            for first, last in pools:
                n_batches = self._n_batches(first, last)
                begin, end = max(step - at, 0), min(n_batches, self.n_steps - at)
                if begin < end:
                    yield first, last, begin, end
                at += n_batches
                if at >= self.n_steps:
                    return

    def pool(self, first: int, last: int) -> Pool:
        """What the pool `[first, last)` of the sequence reads, and the batches that it makes."""
        pieces = self._pieces(first, last)
        lengths = self._lengths(pieces)
        order, bounds = self._arrange(lengths, first)
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        edges = np.cumsum([len(rows) for _, rows in pieces])[:-1]
        own_places = np.split(places, edges)
        placed = [(block, rows, own) for (block, rows), own in zip(pieces, own_places, strict=True)]
        return Pool(placed, lengths[order], bounds)

    def _cut(self, rank: int) -> list[tuple[int, int]]:
        """Cut the stretch of a rank into pools of about equal size, the last one no worse mixed."""
        unit = self.cells.batch_size or 1  # whole batches per pool: only the last of an epoch can be smaller
        n_units = -(-self.share // unit)
        n_pools = max(-(-n_units // max(self.cells.pool_size // unit, 1)), 1)
        edges = np.minimum(np.arange(n_pools + 1) * n_units // n_pools * unit, self.share) + rank * self.share
        return list(itertools.pairwise(edges.tolist()))

    def _n_batches(self, first: int, last: int) -> int:
        if self.cells.batch_size is not None:
            return -(-(last - first) // self.cells.batch_size)
        return len(self._arrange(self._lengths(self._pieces(first, last)), first)[1])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """The blocks, and their rows, that make up `[start, stop)` of the sequence; past its end it begins again."""
        total = int(self.ends[-1])
        spans = []
        while start < stop:
            first = start % total
            last = min(first + stop - start, total)
            spans.append((first, last))
            start += last - first
        pieces = []
        for first, last in spans:
            low, high = np.searchsorted(self.ends, [first, last - 1], side="right")
            for place in range(low, high + 1):
                block, end = int(self.blocks[place]), int(self.ends[place])
                begin = int(self.ends[place - 1]) if place else 0
                rows = np.arange(self.cells.block_sizes[block])
                if self.repeats is not None:
                    rows = np.repeat(rows, self.repeats[self.cells.starts[block] + rows])
                rows = rows[max(first - begin, 0) : min(last, end) - begin]
                if len(rows):
                    pieces.append((block, rows))
        return pieces

    def _lengths(self, pieces: list[tuple[int, np.ndarray]]) -> np.ndarray:
        return np.concatenate([self.cells.lengths[self.cells.starts[block] + rows] for block, rows in pieces])

    def _arrange(self, lengths: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Order the cells of the pool that begins at `start` and cut it into batches.

        Returns:
            The cells in the order in which they are handed out, `int64 (n_cells,)`, and the bounds of [`Pool`].
        """
        cells, order = self.cells, np.arange(len(lengths))
        if cells.shuffle:
            order = permutation(len(lengths), cells.seed, self.epoch, start)
        if cells.token_budget is None:
            edges = np.append(np.arange(0, len(lengths), cells.batch_size), len(lengths))
            return order, np.stack([edges[:-1], edges[1:]], axis=1)
        order = order[np.argsort(lengths[order], kind="stable")]
        tokens = np.minimum(lengths[order].astype(np.int64) + 1, cells.max_genes)
        edges = _cut_by_tokens(tokens, cells.token_budget)
        bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        if cells.shuffle:
            bounds = bounds[permutation(len(bounds), cells.seed, self.epoch, start, 1)]
        return order, bounds


@numba.njit(cache=True)
def _cut_by_tokens(tokens: np.ndarray, budget: int) -> np.ndarray:
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
