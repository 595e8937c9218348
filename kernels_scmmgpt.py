"""Compiled loops over the counts of cells, one cell at a time, in memory that fits the cache.

A count passes three of them on its way to a token: [`find_entries`] leaves the zeros of a dense matrix out,
[`name_genes`] turns columns of a file into genes of the vocabulary, and [`fill_rows`] bins, selects and pads. Each has
a twin in NumPy that gives the same bits: in `matrices_scmmgpt`, `cells_scmmgpt` and `feature_extraction_scmmgpt`. The
twins work where numba is not installed, and until there are enough cells for compiling to pay.

Arrays, where C is cells, V the variables (columns) of a file, E the entries (non-zero counts) of all cells and T the
tokens of a cell: `indptr` is `int64 (C + 1,)`, and cell `i` owns the entries `indptr[i]:indptr[i + 1]`; `columns` and
`gene_ids` are `int32 (E,)`, `hashes` `uint64 (E,)`. Functions with an underscore take the arrays of one cell.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


try:
    from numba import njit
except ImportError:
    njit: Any = None


# SplitMix64 (Steele, Lea and Flood 2014): the counter's increment and the two multipliers of its finaliser.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
# Constants with a type, because numba promotes a mix of signed and unsigned integers to floats.
ZERO, ONE, BITS_27, BITS_30, BITS_31, BITS_32 = map(np.uint64, (0, 1, 27, 30, 31, 32))
LOW_32, LAST_HASH = np.uint64(2**32 - 1), np.uint64(2**64 - 1)

# Compiling takes seconds, once a machine, and loading what was compiled some tenths: in NumPy so many cells take less.
WARM_UP_CELLS = 5_000
LARGEST_TALLIED = 2**16  # whole counts up to here are sorted by tallying them
REPEATED = "A cell has the same gene twice. Build it with `Cells.from_csr`, which sums the counts of a gene."
_n_cells_seen = 0


def kernels_pay(n_cells: int) -> bool:
    """Adds to the cells seen so far, and tells whether they are enough to compile for."""
    global _n_cells_seen
    _n_cells_seen += n_cells
    return njit is not None and _n_cells_seen > WARM_UP_CELLS


def _compiled(function: Callable) -> Callable:
    """Compiles at the first call, once a machine; without numba the function stays as it is and is never called."""
    if njit is None:
        return function
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no place to keep the machine code
        return njit(nogil=True)(function)


def mix64(state: Any) -> Any:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    state = (state ^ (state >> BITS_30)) * MIX_1
    state = (state ^ (state >> BITS_27)) * MIX_2
    return state ^ (state >> BITS_31)


_mix64 = _compiled(mix64)


@_compiled
def find_entries(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`indptr`, `columns` and values `(E,)` of what is not zero in a row-major matrix `(C, V)`."""
    n_rows, n_columns = matrix.shape
    is_filled, indptr, n = np.zeros(-(-n_columns // 4) * 4, np.uint8), np.zeros(n_rows + 1, np.int64), ZERO
    fours = is_filled.view(np.uint32)  # four columns each
    busy, room = np.empty(len(fours), np.int32), n_columns + 4
    size = room + n_rows * n_columns // 8  # one entry in eight, to begin with
    columns, data = np.empty(size, np.int32), np.empty(size, matrix.dtype)
    for row in range(n_rows):
        if n + room > len(columns):
            columns, data = np.append(columns, np.empty_like(columns)), np.append(data, np.empty_like(data))
        values, n_busy = matrix[row], ZERO
        for column in range(n_columns):  # a loop of its own, which the compiler turns into vector instructions
            is_filled[column] = values[column] != 0
        for i in range(len(fours)):  # most are empty; without a branch: the next one overwrites an empty one
            busy[n_busy] = 4 * i
            n_busy += np.uint64(fours[i] != 0)
        for first in busy[:n_busy]:
            for column in range(first, first + 4):
                columns[n] = column
                n += np.uint64(is_filled[column])
        for entry in range(indptr[row], n):
            data[entry] = values[columns[entry]]
        indptr[row + 1] = n
    return indptr, columns[:n], data[:n]


@_compiled
def name_genes(
    indptr: np.ndarray, columns: np.ndarray, data: np.ndarray, ids: np.ndarray, n_ids: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turns columns into genes of the vocabulary; counts of one gene add up at its first place.

    `ids` is `int32 (V,)`: the gene of each column, below `n_ids`, or -1. Returns `indptr`, `gene_ids` and `counts` of
    the entries that have a gene, and the sums of all entries of each cell, `float64 (C,)`.
    """
    kept_indptr, place_of = np.zeros(len(indptr), np.int64), np.full(n_ids, -1, np.int32)
    gene_ids, counts, n = np.empty(len(data), np.int32), np.empty(len(data), data.dtype), 0
    totals = np.zeros(len(indptr) - 1)
    for row in range(len(totals)):
        first, total = n, 0.0
        for entry in range(indptr[row], indptr[row + 1]):
            value, gene = data[entry], ids[np.uint32(columns[entry])]
            total += value
            if gene < 0:
                continue
            place = place_of[np.uint32(gene)]
            if place >= first:
                counts[place] += value
            else:
                place_of[np.uint32(gene)], gene_ids[n], counts[n] = n, gene, value
                n += 1
        kept_indptr[row + 1], totals[row] = n, total
    return kept_indptr, gene_ids[:n], counts[:n], totals


@_compiled
def _rank_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rank of each count, the count of each rank, and how many counts are not above it."""
    ranks, largest, n_whole = np.empty(len(counts), np.int32), np.int32(0), 0
    for i in range(len(counts)):
        ranks[i] = np.int32(min(counts[i], np.float32(LARGEST_TALLIED)))
        n_whole += np.float32(ranks[i]) == counts[i]
        largest = max(largest, ranks[i])
    if n_whole == len(counts):  # whole numbers are their own rank
        values = np.arange(largest + 1).astype(counts.dtype)
    else:
        values = np.unique(counts)
        ranks[:] = np.searchsorted(values, counts)
    tally = np.zeros((4, len(values)), np.int64)  # in turns: an element can't be raised again at once
    for i in range(len(ranks)):
        tally[i & 3, np.uint32(ranks[i])] += 1
    return ranks, values, np.cumsum(tally.sum(axis=0))


@_compiled
def _count_edges(values: np.ndarray, ends: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each rank, how many of the cell's quantile edges are not above its count, and how many equal it."""
    n, rank, edges = ends[-1], 0, np.empty(len(levels))
    for k in range(len(levels)):  # by linear interpolation between neighbours in order of size, as NumPy does
        level = levels[k] * (n - 1)
        before = np.int64(np.floor(level))
        weight = level - before
        while ends[rank] <= before:
            rank += 1
        after = rank
        while ends[after] <= min(before + 1, n - 1):
            after += 1
        step = values[after] - values[rank]  # in the precision of the counts
        edges[k] = values[rank] + step * weight if weight < 0.5 else values[after] - step * (1 - weight)
    upper, n_equal = np.empty(len(values), np.int32), np.empty(len(values), np.uint64)
    n_below, n_reached = 0, 0
    for rank in range(len(values)):
        while n_below < len(edges) and edges[n_below] < values[rank]:
            n_below += 1
        while n_reached < len(edges) and edges[n_reached] <= values[rank]:
            n_reached += 1
        upper[rank], n_equal[rank] = n_reached, n_reached - n_below
    return upper, n_equal


@_compiled
def _find_cutoff(hashes: np.ndarray, ranks: np.ndarray, ends: np.ndarray, n_kept: int, by_count: bool) -> np.uint64:
    """A number that exactly `n_kept` of the hashes do not exceed, by interpolation: hashes are spread evenly.

    If `by_count`, only counts that tie for the last places keep their hashes; larger ones get 0, others the last hash.
    """
    low, high, n_low, n_high, n_passes = ZERO, LAST_HASH, 0, len(hashes), 0
    if by_count:
        tied = np.searchsorted(ends, len(hashes) - n_kept, side="right")
        n_low, n_high = len(hashes) - ends[tied], len(hashes) - (ends[tied - 1] if tied else 0)
        for i in range(len(hashes)):
            if ranks[i] != tied:
                hashes[i] = ZERO if ranks[i] > tied else LAST_HASH
    while low < high:
        share = min((n_kept - n_low) / (n_high - n_low), 0.999) if n_passes < 16 else 0.5
        cutoff = low + np.uint64(np.float64(high - low) * share)
        n_found, n_passes = 0, n_passes + 1
        for i in range(len(hashes)):
            n_found += hashes[i] <= cutoff
        if n_found == n_kept:
            return cutoff
        if n_found < n_kept:
            low, n_low = cutoff + ONE, n_found
        else:
            high, n_high = cutoff, n_found
    raise ValueError(REPEATED)


@_compiled
def _fill_row(
    gene_ids: np.ndarray,
    counts: np.ndarray,
    values: np.ndarray,
    levels: np.ndarray,
    cell_key: np.uint64,
    by_count: bool,
    gene_ids_out: np.ndarray,
    expression_out: np.ndarray,
) -> None:
    """Bins the genes of a cell and selects as many as there is room for."""
    gene_ids, counts = gene_ids.copy(), counts.copy()  # nothing reads memory as fast as a copy
    hashes = np.empty(len(gene_ids), np.uint64)
    for i in range(len(gene_ids)):
        hashes[i] = _mix64(cell_key + (np.uint64(gene_ids[i]) + ONE) * GOLDEN_GAMMA)
    ranks, ranked, ends = _rank_counts(counts)
    if len(levels):
        values = np.empty(len(counts), np.float32)
        upper, n_equal = _count_edges(ranked, ends, levels)
        for i in range(len(ranks)):  # a count that equals several edges gets one of their bins by its hash
            rank = np.uint32(ranks[i])
            values[i] = upper[rank] - np.int32((hashes[i] & LOW_32) * n_equal[rank] >> BITS_32)
    entry, n, n_kept, cutoff = ZERO, ZERO, len(gene_ids_out), LAST_HASH
    if len(gene_ids) > n_kept:
        cutoff = _find_cutoff(hashes, ranks, ends, n_kept, by_count)
    while n < np.uint64(n_kept):  # without a branch, as in `find_entries`
        gene_ids_out[n], expression_out[n] = gene_ids[entry], values[entry]
        n += np.uint64(hashes[entry] <= cutoff)
        entry += ONE


@_compiled
def fill_rows(
    indptr: np.ndarray,
    gene_ids: np.ndarray,
    counts: np.ndarray,
    values: np.ndarray,
    levels: np.ndarray,
    cell_keys: np.ndarray,
    n_kept: int,
    by_count: bool,
    pad_token_id: int,
    pad_value: np.float32,
    gene_ids_out: np.ndarray,
    expression_out: np.ndarray,
    attended_out: np.ndarray,
) -> None:
    """Bins, selects and pads every cell into its row of the outputs `(C, T)`, from position 1 on.

    `counts` are `float32` or `uint32 (E,)`, above 0. They are binned at the quantile `levels`; if there are none, the
    `values` `float32 (E,)` are taken. Of each cell `n_kept` genes stay: those of the largest counts if `by_count`,
    else any, as `cell_keys`, `uint64 (C,)`, decide. Outputs are `int64`, `float32` and `int64` (1 = attend).
    """
    for row in range(len(cell_keys)):
        start, stop = indptr[row], indptr[row + 1]
        n_tokens = 1 + min(stop - start, n_kept)
        if stop > start:
            _fill_row(
                gene_ids[start:stop],
                counts[start:stop],
                values[start:stop],
                levels,
                cell_keys[row],
                by_count,
                gene_ids_out[row, 1:n_tokens],
                expression_out[row, 1:n_tokens],
            )
        gene_ids_out[row, n_tokens:], expression_out[row, n_tokens:] = pad_token_id, pad_value
        attended_out[row, :n_tokens], attended_out[row, n_tokens:] = 1, 0
