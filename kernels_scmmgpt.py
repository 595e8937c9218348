"""Compiled loops over the counts of cells, one cell at a time, in memory that fits the cache.

A count passes three of them on its way to a token: [`find_entries`] leaves the zeros of a dense matrix out,
[`name_genes`] turns columns of a file into genes of the vocabulary, and [`fill_rows`] bins, selects and pads. Each has
a twin in NumPy that gives the same bits: in `matrices_scmmgpt`, `cells_scmmgpt` and `feature_extraction_scmmgpt`. The
twins work where numba is not installed, and until there are enough cells for compiling to pay.

Arrays, where C is cells, V the variables (columns) of a file, E the entries (non-zero counts) of all cells and T the
tokens of a cell: `indptr` is `int64 (C + 1,)`, and cell `i` owns the entries `indptr[i]:indptr[i + 1]`; `columns` and
`gene_ids` are `int32 (E,)`, `hashes` `uint64 (E,)`. Functions that begin with an underscore get those of one cell.
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
GROUP = 8  # columns whose flags are looked at at once
_n_cells_seen = 0


def kernels_pay(n_cells: int) -> bool:
    """Counts cells, and says whether there were enough to take the compiled path from here on."""
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
    indptr = np.zeros(n_rows + 1, np.int64)
    size = n_columns + GROUP + n_rows * n_columns // 8  # room for one entry in eight, to begin with
    columns, data = np.empty(size, np.int32), np.empty(size, matrix.dtype)
    n_groups = -(-n_columns // GROUP)
    is_filled, groups = np.zeros(n_groups * GROUP, np.uint8), np.empty(n_groups + 1, np.uint32)
    group_flags = is_filled.view(np.uint64)
    n = ZERO
    for row in range(n_rows):
        if n + n_columns + GROUP > len(columns):
            columns, data = np.append(columns, np.empty_like(columns)), np.append(data, np.empty_like(data))
        values = matrix[row]
        for column in range(n_columns):
            is_filled[column] = values[column] != 0
        # Most groups are empty. Every place is written, and kept only if the next one moves on: branches that no
        # processor can foresee would take longer.
        n_found = ZERO
        for group in range(n_groups):
            groups[n_found] = group
            n_found += np.uint64(group_flags[group] != 0)
        for group in groups[:n_found]:
            for i in range(GROUP):
                column = group * np.uint32(GROUP) + np.uint32(i)
                columns[n] = column
                n += np.uint64(is_filled[column])
        for i in range(indptr[row], n):
            data[i] = values[columns[i]]
        indptr[row + 1] = n
    return indptr, columns[:n], data[:n]


@_compiled
def name_genes(
    indptr: np.ndarray, columns: np.ndarray, data: np.ndarray, ids: np.ndarray, n_ids: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turns columns into genes of the vocabulary; counts of one gene add up at its first place.

    `ids` is `int32 (V,)`, the gene of each column or -1, and `n_ids` the largest and one more. Returns `indptr`,
    `gene_ids` and `counts` of the entries that have a gene, and the sums of all entries of each cell, `float64 (C,)`.
    """
    kept_indptr, place_of = np.zeros(len(indptr), np.int64), np.full(n_ids, -1, np.int32)
    gene_ids, counts, n = np.empty(len(data), np.int32), np.empty(len(data), data.dtype), 0
    totals = np.zeros(len(indptr) - 1)
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            totals[row] += data[entry]
            gene = ids[columns[entry]]
            if gene < 0:
                continue
            if place_of[gene] >= kept_indptr[row]:
                counts[place_of[gene]] += data[entry]
            else:
                place_of[gene] = n
                gene_ids[n], counts[n] = gene, data[entry]
                n += 1
        kept_indptr[row + 1] = n
    return kept_indptr, gene_ids[:n], counts[:n], totals


@_compiled
def _rank_counts(counts: np.ndarray, rank_of: np.ndarray, values: np.ndarray, ends: np.ndarray) -> int:
    """Ranks the counts of a cell; whole numbers are their own rank.

    `rank_of` receives the rank of each count, `values` the count of each rank, and `ends` how many counts are not
    above it. Returns the number of ranks.
    """
    largest, n_whole = np.int32(0), 0
    for i in range(len(counts)):
        whole = np.int32(min(counts[i], np.float32(LARGEST_TALLIED)))
        rank_of[i] = whole
        n_whole += whole == counts[i]
        largest = max(largest, whole)
    if n_whole == len(counts):
        ends[: largest + 1] = 0
        for rank in rank_of[: len(counts)]:
            ends[rank] += 1
        for rank in range(largest + 1):
            values[rank] = rank
            ends[rank] += ends[max(rank - 1, 0)]
        return int(largest) + 1
    order, n_ranks = np.argsort(counts), 0
    for position in range(len(counts)):
        count = counts[order[position]]
        if position == 0 or count > values[n_ranks - 1]:
            values[n_ranks] = count
            n_ranks += 1
        rank_of[order[position]] = n_ranks - 1
        ends[n_ranks - 1] = position + 1
    return n_ranks


@_compiled
def _count_edges(
    values: np.ndarray, ends: np.ndarray, levels: np.ndarray, upper: np.ndarray, n_equal: np.ndarray
) -> None:
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
    n_below, n_reached = 0, 0
    for rank in range(len(values)):
        while n_below < len(edges) and edges[n_below] < values[rank]:
            n_below += 1
        while n_reached < len(edges) and edges[n_reached] <= values[rank]:
            n_reached += 1
        upper[rank], n_equal[rank] = n_reached, n_reached - n_below


@_compiled
def _find_cutoff(hashes: np.ndarray, n_kept: int, n_low: int, n_high: int) -> np.uint64:
    """A number that `n_kept` of the hashes do not exceed, of which `n_low` are 0 and `n_high` below the last.

    Hashes are spread evenly, so that interpolation finds it in about four counts of them, where sorting takes longer.
    """
    low, high = ZERO, LAST_HASH
    while high - low > ONE:
        share = (n_kept - n_low + 0.5) / (n_high - n_low + 1)
        cutoff = low + max(np.uint64(np.float64(high - low) * share), ONE)
        n_found = 0
        for i in range(len(hashes)):
            n_found += hashes[i] <= cutoff
        if n_found == n_kept:
            return cutoff
        if n_found < n_kept:
            low, n_low = cutoff, n_found
        else:
            high, n_high = cutoff, n_found
    raise ValueError(REPEATED)


@_compiled
def _put_large_first(hashes: np.ndarray, rank_of: np.ndarray, ends: np.ndarray, n_kept: int) -> tuple[int, int]:
    """Keeps the hashes of the counts that tie for the last places, and lets 0 or the last hash decide for the others.

    Returns how many counts are above the tie, and how many are not below it.
    """
    n, tied = len(hashes), len(ends) - 1
    while tied > 0 and ends[tied - 1] > n - n_kept:
        tied -= 1
    for i in range(n):
        hashes[i] = hashes[i] if rank_of[i] == tied else ZERO if rank_of[i] > tied else LAST_HASH
    return n - ends[tied], n - (ends[tied - 1] if tied else 0)


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

    `counts` are `float32` or `uint32 (E,)`, above 0. They are binned at the quantile `levels`, unless there are other
    `values` `float32 (E,)`. Of each cell `n_kept` genes stay: those of the largest counts if `by_count`, else any, as
    `cell_keys`, `uint64 (C,)`, decide. Outputs are `int64`, `float32` and `int64` (1 = attend).
    """
    longest = 0
    for row in range(len(cell_keys)):
        longest = max(longest, indptr[row + 1] - indptr[row])
    hashes, kept, rank_of = (
        np.empty(longest, np.uint64),
        np.empty(longest + 1, np.uint32),
        np.empty(longest, np.uint32),
    )
    most_ranks = max(longest, LARGEST_TALLIED + 1)
    ranked_counts, ends = np.empty(most_ranks, counts.dtype), np.empty(most_ranks, np.int64)
    upper, n_equal = np.empty(most_ranks, np.int32), np.empty(most_ranks, np.uint32)
    is_binned, bins, n_ranks = len(values) == 0, np.empty(longest, np.float32), 0
    for row in range(len(cell_keys)):
        start, stop = indptr[row], indptr[row + 1]
        n, genes, row_values = stop - start, gene_ids[start:stop], values[start:stop]
        for i in range(n):
            hashes[i] = _mix64(cell_keys[row] + (np.uint64(genes[i]) + ONE) * GOLDEN_GAMMA)
        if n and (is_binned or (by_count and n > n_kept)):
            n_ranks = _rank_counts(counts[start:stop], rank_of, ranked_counts, ends)
        if n and is_binned:
            _count_edges(ranked_counts[:n_ranks], ends[:n_ranks], levels, upper, n_equal)
            row_values = bins[:n]
            for i in range(n):
                rank = rank_of[i]
                row_values[i] = upper[rank] - np.int32((hashes[i] & LOW_32) * n_equal[rank] >> BITS_32)
        n_tokens = 1 + min(n, n_kept)
        if n > n_kept:
            n_low, n_high = _put_large_first(hashes[:n], rank_of, ends[:n_ranks], n_kept) if by_count else (0, n)
            cutoff, n_found = _find_cutoff(hashes[:n], n_kept, n_low, n_high), ZERO
            for i in range(n):  # without a branch: what is not kept is overwritten by the next that is
                kept[n_found] = i
                n_found += np.uint64(hashes[i] <= cutoff)
        else:
            for i in range(n):
                kept[i] = i
        for i in range(n_tokens - 1):
            gene_ids_out[row, i + 1], expression_out[row, i + 1] = genes[kept[i]], row_values[kept[i]]
        gene_ids_out[row, n_tokens:], expression_out[row, n_tokens:] = pad_token_id, pad_value
        attended_out[row, :n_tokens], attended_out[row, n_tokens:] = 1, 0
