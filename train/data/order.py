"""The order of cells in training: [`CellOrder`]. It holds numbers alone; `stream.py` reads the cells.

1. **Blocks.** A permutation by (seed, epoch) orders the blocks of the split, which are row groups of its shards. The
   cells of the blocks in this order are the sequence of the epoch. Balancing repeats cells in the sequence, or leaves
   them out.
2. **Ranks.** Rank `r` of `n` owns the `r`-th of `n` equal stretches of the sequence. All ranks take equally many
   steps; if the division leaves a remainder, a few cells occur on two ranks. Without shuffling, batches of a fixed
   number of cells are dealt to the ranks in turn, rank 0 first, as transformers' `Trainer` deals a streamed dataset.
3. **Pools.** Each stretch is cut into pools of some 8,000 cells, which are read together.
4. **Batches.** Each pool is permuted and cut into batches, either of a fixed number of cells, or of cells of similar
   length within a number of tokens. The corpus stores the length of every cell in a column of its own, so batches are
   known before the cells are read.

All randomness is hashed from seed, epoch and position in the sequence. The order is therefore the same on every
platform, and any step of any epoch is found without the steps before it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numba
import numpy as np

from scmmgpt.cells_scmmgpt import hashes, permutation


BALANCE_TEMPERATURE = 2.0  # of `balance` in training: a label of n cells is drawn in proportion to n ** (1 / 2)
MAX_REPEATS = 10  # most times that balancing draws one cell in an epoch


@dataclasses.dataclass(frozen=True)
class Pool:
    """Cells that are read together, and how they are cut into batches."""

    # `(block, rows, places)`: rows to take from a block, and their places in the pool, both `int64 (n_rows,)`.
    pieces: list[tuple[int, np.ndarray, np.ndarray]]
    lengths: np.ndarray  # genes of every cell by its place in the pool, `uint16 (n_cells,)`
    bounds: (
        np.ndarray
    )  # `[start, stop)` of each batch in the pool, `int64 (n_batches, 2)`, in the order of the batches


@dataclasses.dataclass(frozen=True, eq=False)
class CellOrder:
    """The order of a split in all its epochs; give `batch_size` or `token_budget`."""

    block_sizes: np.ndarray  # cells of every block, `int64 (n_blocks,)`
    lengths: np.ndarray  # genes of every cell, `uint16 (n_cells,)`, block after block
    batch_size: int | None = None  # cells per batch
    # Most tokens per batch of cells of similar length, padding included: number of cells times tokens of the longest
    # cell. A cell has one token per gene and `<cls>`, and at most `max_genes` tokens.
    token_budget: int | None = None
    max_genes: int = 1200  # length at which the feature extractor cuts a cell
    shuffle: bool = True  # whether to permute blocks, pools and batches; otherwise cells come in stored order
    # Label of every cell, `int32 (n_cells,)`, for balanced draws; None draws every cell once. An epoch draws about as
    # many cells as the split has: cells of rare labels up to `MAX_REPEATS` times, and a random subset of the cells of
    # frequent labels, drawn again in every epoch.
    label_codes: np.ndarray | None = None
    # A label of n cells is drawn in proportion to n ** (1 / temperature): 1 keeps the frequencies, infinity makes them
    # equal.
    temperature: float = float("inf")
    seed: int = 0
    world_size: int = 1  # number of ranks
    drop_last: bool = False  # whether to leave out the last batch of an epoch if it is smaller than `batch_size`
    pool_size: int = 8192  # cells that are shuffled together; two pools, some 50 MB each, are in memory at a time
    _epochs: dict[int, "EpochOrder"] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _n_steps: dict[int, int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.token_budget is None):
            raise ValueError(f"Give either batch_size ({self.batch_size}) or token_budget ({self.token_budget}).")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.token_budget is not None and self.token_budget < self.max_genes:
            raise ValueError(
                f"token_budget is {self.token_budget}, which does not hold one cell of max_genes ({self.max_genes}) "
                "tokens. Raise token_budget or lower max_genes."
            )
        if self.temperature < 1:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 1, which keeps the frequencies.")

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Number of cells before each block, `int64 (n_blocks,)`."""
        return np.cumsum(self.block_sizes) - self.block_sizes

    def epoch(self, number: int) -> "EpochOrder":
        """The order within one epoch; the order of the latest epoch is cached."""
        if number not in self._epochs:
            self._epochs.clear()
            self._epochs[number] = EpochOrder(self, number)
        return self._epochs[number]

    def n_steps(self, epoch: int) -> int:
        """Batches of every rank in an epoch. The number varies by epoch with balancing and with a token budget."""
        if self.label_codes is None and self.token_budget is None:
            epoch = 0
        if epoch not in self._n_steps:
            self._n_steps[epoch] = self.epoch(epoch).n_steps
        return self._n_steps[epoch]

    def locate(self, n_steps: int) -> tuple[int, int]:
        """The epoch, and the step within it, after `n_steps` steps from the start of epoch 0."""
        epoch = 0
        while n_steps >= self.n_steps(epoch):
            n_steps -= self.n_steps(epoch)
            epoch += 1
        return epoch, n_steps

    def draw_repeats(self, epoch: int) -> np.ndarray | None:
        """Number of times that each cell occurs in an epoch, `uint8 (n_cells,)`; `None` if all occur once."""
        if self.label_codes is None:
            return None
        n_cells = np.bincount(self.label_codes)
        shares = np.where(n_cells > 0, np.maximum(n_cells, 1) ** (1 / self.temperature), 0)
        expected = shares / shares.sum() * len(self.label_codes) / np.maximum(n_cells, 1)
        expected = np.minimum(expected, MAX_REPEATS)
        whole = np.floor(expected)
        # A cell occurs `whole` times, and once more with probability `expected - whole`.
        threshold = ((expected - whole) * 2.0**64).clip(0, 2.0**64 - 2**12).astype(np.uint64)
        more = hashes(len(self.label_codes), self.seed, epoch, 2) < threshold[self.label_codes]
        return whole.astype(np.uint8)[self.label_codes] + more.astype(np.uint8)


class EpochOrder:
    """The order within one epoch; made by [`CellOrder.epoch`]. `n_steps` is the number of batches of every rank."""

    def __init__(self, cells: CellOrder, epoch: int) -> None:
        self.cells, self.epoch = cells, epoch
        self._repeats, sizes = cells.draw_repeats(epoch), cells.block_sizes
        if self._repeats is not None:
            sizes = np.add.reduceat(self._repeats.astype(np.int64), cells.starts)
        self._blocks = permutation(len(sizes), cells.seed, epoch) if cells.shuffle else np.arange(len(sizes))
        self._ends = np.cumsum(sizes[self._blocks])  # end of each block in the sequence of the epoch
        self._share = -(-int(self._ends[-1]) // cells.world_size)  # cells of a rank
        if cells.batch_size is None:
            ranks = range(cells.world_size)
            self.n_steps = max(sum(self._n_batches(*pool) for pool in self._cut(rank)) for rank in ranks)
        elif cells.drop_last:
            self.n_steps = self._share // cells.batch_size
            if self.n_steps == 0:
                raise ValueError(
                    f"drop_last leaves no batch in an epoch: a rank has {self._share} cells, batch_size is "
                    f"{cells.batch_size}. Lower batch_size, or keep the last batch."
                )
        else:
            self.n_steps = -(-self._share // cells.batch_size)

    def pools(self, rank: int, step: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """Yield the pools of a rank from a step to the end of the epoch.

        Yields:
            `first, last, begin, end`: the pool is `[first, last)` of the sequence; its batches `[begin, end)` are due.
        """
        pools, at = self._cut(rank), 0
        while at < self.n_steps:  # a rank with fewer batches than other ranks repeats its stretch
            for first, last in pools:
                n_batches = self._n_batches(first, last)
                begin, end = max(step - at, 0), min(n_batches, self.n_steps - at)
                if begin < end:
                    yield first, last, begin, end
                at += n_batches
                if at >= self.n_steps:
                    return

    def pool(self, first: int, last: int) -> Pool:
        """The pool that is `[first, last)` of the sequence."""
        pieces = self._pieces(first, last)
        lengths = self._lengths(pieces)
        order, bounds = self._arrange(lengths, first)
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        places_by_piece = np.split(places, np.cumsum([len(rows) for _, rows in pieces])[:-1])
        placed = [(block, rows, own) for (block, rows), own in zip(pieces, places_by_piece, strict=True)]
        return Pool(placed, lengths[order], bounds)

    def _cut(self, rank: int) -> list[tuple[int, int]]:
        """Cut the stretch of a rank into pools of similar size, because a small last pool would mix fewer cells."""
        unit = self.cells.batch_size or 1  # pools of whole batches: only the last batch of an epoch can be smaller
        n_units = -(-self._share // unit)
        n_pools = max(-(-n_units // max(self.cells.pool_size // unit, 1)), 1)
        edges = np.minimum(np.arange(n_pools + 1) * n_units // n_pools * unit, self._share) + rank * self._share
        return list(itertools.pairwise(edges.tolist()))

    def _n_batches(self, first: int, last: int) -> int:
        if self.cells.batch_size is not None:
            return -(-(last - first) // self.cells.batch_size)
        return len(self._arrange(self._lengths(self._pieces(first, last)), first)[1])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """`(block, rows)` of the cells `[start, stop)` of the stretches of all ranks."""
        positions, pieces = self._positions(start, stop), []
        places = np.searchsorted(self._ends, positions, side="right")
        for own in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(places)) + 1):
            place = places[own[0]]
            block, begin = int(self._blocks[place]), self._ends[place - 1] if place else 0
            rows = np.arange(self.cells.block_sizes[block])
            if self._repeats is not None:
                rows = np.repeat(rows, self._repeats[self.cells.starts[block] + rows])
            pieces.append((block, rows[positions[own] - begin]))
        return pieces

    def _positions(self, start: int, stop: int) -> np.ndarray:
        """Positions in the sequence of the cells `[start, stop)` of a rank's stretch, `int64 (n_cells,)`.

        The sequence repeats after its end. If the ranks take batches in turn, the last step divides the remaining
        cells evenly among the ranks, and repeats some cells if they don't divide.
        """
        at, n_cells = np.arange(start, stop), int(self._ends[-1])
        size, n_ranks = self.cells.batch_size, self.cells.world_size
        if self.cells.shuffle or size is None or n_ranks == 1:
            return at % n_cells
        rank = start // self._share
        at -= rank * self._share
        n_whole, n_left = divmod(n_cells, size * n_ranks)  # steps of whole batches, and the cells of the last step
        step, offset = np.divmod(at, size)
        left = rank * (self._share - n_whole * size) + at - n_whole * size
        in_turn = (step * n_ranks + rank) * size + offset
        return np.where(step < n_whole, in_turn, n_cells - n_left + left % max(n_left, 1))

    def _lengths(self, pieces: list[tuple[int, np.ndarray]]) -> np.ndarray:
        return np.concatenate([self.cells.lengths[self.cells.starts[block] + rows] for block, rows in pieces])

    def _arrange(self, lengths: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Permutation of the pool that begins at `start`, `int64 (n_cells,)`, and the `bounds` of its batches."""
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
    """Edges of batches of successive cells, each as large as the budget allows: cells times tokens of the longest."""
    edges = [0]
    longest = 0
    for i in range(len(tokens)):
        longest = max(longest, tokens[i])
        if longest * (i + 1 - edges[-1]) > budget:
            edges.append(i)
            longest = tokens[i]
    edges.append(len(tokens))
    return np.array(edges)
