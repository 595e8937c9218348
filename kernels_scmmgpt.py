"""Compiled loops over the counts of cells, one cell at a time, in memory that fits the cache.

[`find_entries`] and [`name_genes`] convert rows of a dense or sparse matrix to genes of the vocabulary. [`fill_rows`]
bins, selects and pads. [`hash_rows`] is for receipts. Each loop has a NumPy twin with bit-identical results, in the
calling file, for machines without numba and for few cells.

In shapes, C is cells, V the variables (columns) of a file, E the entries (non-zero counts) of all cells, and T the
tokens of a cell. `indptr` is `int64 (C + 1,)`: cell `i` owns the entries `indptr[i]:indptr[i + 1]`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


try:
    from llvmlite import ir
    from numba import njit, types
    from numba.cpython.unsafe.numbers import trailing_zeros
    from numba.extending import intrinsic
    from numba.np.arrayobj import make_array
except ImportError:
    njit = None  # type: ignore[assignment]


# SplitMix64 (Steele, Lea and Flood 2014): increment of the counter, and the two multipliers of the finaliser.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
# Typed constants: numba promotes a mix of signed and unsigned integers to floats.
ZERO, ONE, BITS_27, BITS_30, BITS_31, BITS_32 = map(np.uint64, (0, 1, 27, 30, 31, 32))
BIT = np.uint32(1)
LOW_32, LAST_HASH = np.uint64(2**32 - 1), np.uint64(2**64 - 1)

# Loading the compiled loops takes some tenths of a second, and compiling takes seconds, once per machine. NumPy is
# faster for fewer cells than this number.
WARM_UP_CELLS = 5_000
LARGEST_VALUE = 1e10  # larger values are not plausible expression
LARGEST_TALLIED = 2**16  # integer counts up to this value are sorted by counting
WORD = 32  # columns that are compared with zero at once, one bit each
USUAL_BITS = 4  # bits of a word that are read without a branch; dense rows of single-cell counts have one or two
REPEATED = "A cell has the same gene twice. Build it with `Cells.from_csr`, which sums the counts of a gene."
_n_cells_seen = 0


def kernels_pay(n_cells: int) -> bool:
    """Whether the compiled loops are worth their start-up time, after `n_cells` more cells in this process."""
    global _n_cells_seen
    _n_cells_seen += n_cells
    return njit is not None and _n_cells_seen > WARM_UP_CELLS


def _compiled(function: Callable) -> Callable:
    """Compile a function at the first call, once per machine. Without numba, nothing calls the function."""
    if njit is None:
        return function
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba has no writable folder for its cache
        return njit(nogil=True)(function)


def mix64(state: Any) -> Any:
    """The finaliser of SplitMix64: a bijection of 64-bit words in which every input bit affects every output bit."""
    state = (state ^ (state >> BITS_30)) * MIX_1
    state = (state ^ (state >> BITS_27)) * MIX_2
    return state ^ (state >> BITS_31)


_mix64 = _compiled(mix64)


@_compiled
def hash_rows(indptr: np.ndarray, gene_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over each cell, uint64 (C,), of hashes of gene and count. `counts` are the bits of float32, as uint32."""
    sums = np.zeros(len(indptr) - 1, dtype=np.uint64)
    for cell in range(len(sums)):
        for i in range(indptr[cell], indptr[cell + 1]):
            gene = _mix64((np.uint64(gene_ids[i]) + ONE) * GOLDEN_GAMMA)
            sums[cell] += _mix64(gene ^ np.uint64(counts[i]))
    return sums


if njit is not None:  # numba has no vector comparison, so this one is written in LLVM

    def _compare_word(typing_context: Any, row: Any, first: Any) -> Any:
        """A word whose bit `i` is 1 if `row[first + i]` of a contiguous array is not 0."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = signature.args[0].dtype
            vector = ir.VectorType(context.get_data_type(kind), WORD)
            start = builder.gep(make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
            values = builder.load(builder.bitcast(start, vector.as_pointer()), align=1)
            compare = builder.fcmp_unordered if isinstance(kind, types.Float) else builder.icmp_unsigned
            return builder.bitcast(compare("!=", values, ir.Constant(vector, None)), ir.IntType(WORD))

        return types.uint32(row, types.int64), generate

    _filled_bits: Any = intrinsic(_compare_word)
    _lowest_bit: Any = trailing_zeros


@_compiled
def find_entries(
    matrix: np.ndarray, ids: np.ndarray, gene_ids: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
    """[`name_genes`] for a dense row-major matrix `(C, V)`, in which no two columns have the same gene.

    `gene_ids` and `counts` are buffers for the result; buffers that are too short are replaced by longer ones.
    """
    (n_rows, n_columns), n, are_sound = matrix.shape, ZERO, True
    whole, columns = n_columns - n_columns % WORD, np.empty(n_columns + 1, np.int32)
    indptr, totals = np.zeros(n_rows + 1, np.int64), np.empty(n_rows)
    for row in range(n_rows):
        if n + n_columns > len(counts):
            more = n_columns + len(counts) // 4
            gene_ids = np.append(gene_ids, np.empty(more, np.int32))
            counts = np.append(counts, np.empty(more, counts.dtype))
        values, n_found = matrix[row], ZERO
        for first in range(0, whole, WORD):
            bits = _filled_bits(values, first)
            for _ in range(USUAL_BITS):  # without a branch: the next column overwrites a surplus one
                columns[n_found] = first + _lowest_bit(bits)
                n_found += np.uint64(bits != 0)
                bits &= bits - BIT
            while bits:
                columns[n_found] = first + _lowest_bit(bits)
                n_found += ONE
                bits &= bits - BIT
        for column in range(whole, n_columns):
            columns[n_found] = column
            n_found += np.uint64(values[column] != 0)
        total, n_sound = 0.0, 0
        for i in range(n_found):
            place = np.uint32(columns[i])
            gene, value = ids[place], values[place]
            gene_ids[n], counts[n] = gene, value
            n += np.uint64(gene >= 0)
            total += value
            n_sound += (value >= 0) & (value <= LARGEST_VALUE)
        totals[row], are_sound = total, are_sound and n_sound == n_found
        indptr[row + 1] = n
    return indptr, gene_ids[:n], counts[:n], totals, are_sound


@_compiled
def name_genes(
    indptr: np.ndarray,
    columns: np.ndarray,
    data: np.ndarray,
    ids: np.ndarray,
    n_ids: int,
    has_repeats: bool,
    gene_ids: np.ndarray,
    counts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
    """Convert columns to genes of the vocabulary; counts of one gene are summed at its first entry.

    Args:
        indptr, columns, data: A CSR matrix; `columns` are `int32 (E,)`.
        ids: `int32 (V,)`: the gene of each column, below `n_ids`, or -1.
        n_ids: Upper bound of `ids`.
        has_repeats: Whether several columns may have the same gene.
        gene_ids, counts: Buffers `(E,)` for the result.

    Returns:
        `indptr`, `gene_ids` (`int32`) and `counts` of the entries with a gene, without stored zeros; the sum of all
        entries of each cell, `float64 (C,)`; whether all entries lie between 0 and `LARGEST_VALUE`.
    """
    new_indptr, totals, n = np.zeros(len(indptr), np.int64), np.empty(len(indptr) - 1), ZERO
    place_of, are_sound = np.full(n_ids, -1, np.int32), True
    for row in range(len(totals)):
        first, start, stop = n, indptr[row], indptr[row + 1]
        row_columns, row_data = columns[start:stop], data[start:stop]
        total, last, n_ascending, n_sound = 0.0, np.int32(-1), 0, 0
        for i in range(len(row_columns)):  # without a branch: the next entry overwrites a discarded one
            column, value = row_columns[i], row_data[i]
            gene = ids[np.uint32(column)]
            gene_ids[n], counts[n] = gene, value
            n += np.uint64((gene >= 0) & (value != 0))
            total += value
            n_sound += (value >= 0) & (value <= LARGEST_VALUE)
            n_ascending += column > last
            last = column
        totals[row], are_sound = total, are_sound and n_sound == stop - start
        if has_repeats or n_ascending < stop - start:
            end, n = n, first
            for entry in range(first, end):
                gene, count = gene_ids[entry], counts[entry]
                place = place_of[gene]
                if place >= np.int64(first):
                    counts[place] += count
                else:
                    place_of[gene], gene_ids[n], counts[n] = n, gene, count
                    n += ONE
        new_indptr[row + 1] = n
    return new_indptr, gene_ids[:n], counts[:n], totals, are_sound


@_compiled
def _rank_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each count, starting at 0, and the count at each rank."""
    ranks, n_whole = np.empty(len(counts), np.int32), 0
    for i in range(len(counts)):
        ranks[i] = np.int32(min(counts[i], np.float32(LARGEST_TALLIED)))
        n_whole += np.float32(ranks[i]) == counts[i]
    if n_whole == len(counts):  # small integers are their own rank
        return ranks, np.arange(ranks.max() + 1).astype(np.float32)
    values = np.unique(counts)
    return np.searchsorted(values, counts).astype(np.int32), values


@_compiled
def _count_edges(values: np.ndarray, in_order: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each rank, the number of quantile edges that do not exceed the count, and of edges that equal the count."""
    upper, n_equal = np.zeros(len(values), np.int32), np.zeros(len(values), np.uint64)
    last = len(in_order) - 1
    for level in levels:  # linear interpolation between order statistics, as in NumPy
        before = int(level * last)
        weight = level * last - before
        reached, after = in_order[before], in_order[min(before + 1, last)]
        step = values[after] - values[reached]  # in float32, the precision of the counts
        edge = values[reached] + step * weight if weight < 0.5 else values[after] - step * (1 - weight)
        reached = reached if edge <= values[reached] else after
        upper[reached] += 1
        n_equal[reached] += np.uint64(edge == values[reached])
    return np.cumsum(upper), n_equal


@_compiled
def _find_cutoff(hashes: np.ndarray, n_kept: int) -> np.uint64:
    """A number that exactly `n_kept` hashes do not exceed, by interpolation search, as hashes are uniform."""
    low, high, n_low, n_high = ZERO, LAST_HASH, 0, len(hashes)
    while low < high:
        share = min((n_kept - n_low) / (n_high - n_low), 0.999)
        cutoff = low + np.uint64(np.float64(high - low) * share)
        n_found = 0
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
    """Bin, select and pad each cell into its row of the outputs `(C, T)`, from position 1 on.

    Args:
        indptr: See the module.
        gene_ids: `int32 (E,)`.
        counts: `float32 (E,)`, above 0.
        values: `float32 (E,)`: values of the genes if there are no `levels`.
        levels: Quantile levels of the bin edges, `float64`, or empty.
        cell_keys: `uint64 (C,)`: seeds of the random draws.
        n_kept: Most genes per cell.
        by_count: Whether the genes with the largest counts are selected, not random genes.
        pad_token_id, pad_value: Gene id and value of padding.
        gene_ids_out, expression_out, attended_out: Outputs: `int64`, `float32`, `int64` (1 = attend).
    """
    for row in range(len(cell_keys)):
        start, stop, key = indptr[row], indptr[row + 1], cell_keys[row] + GOLDEN_GAMMA
        end = 1 + min(stop - start, n_kept)
        attended_out[row, :end], attended_out[row, end:] = 1, 0
        gene_ids_out[row, end:], expression_out[row, end:] = pad_token_id, pad_value
        if stop == start:
            continue
        genes, hashes = gene_ids[start:stop].copy(), np.empty(stop - start, np.uint64)  # reads memory fastest
        for i in range(len(genes)):
            hashes[i] = _mix64(key + np.uint64(genes[i]) * GOLDEN_GAMMA)
        ranks, ranked = _rank_counts(counts[start:stop].copy())
        tally = np.zeros((4, len(ranked)), np.int64)  # four tallies in turn: no increment waits for the last one
        for i in range(len(ranks)):
            tally[i & 3, np.uint32(ranks[i])] += 1
        in_order = np.repeat(np.arange(len(ranked)), tally.sum(axis=0))  # ranks, ascending
        kept = np.ones(len(genes), np.bool_)
        if len(genes) > n_kept and by_count:  # the draw is among counts that tie for the last places
            tied = in_order[-n_kept]
            n_above = len(genes) - np.searchsorted(in_order, tied, side="right")
            cutoff = _find_cutoff(hashes[ranks == tied], n_kept - n_above)
            kept = (ranks > tied) | (ranks == tied) & (hashes <= cutoff)
        elif len(genes) > n_kept:
            kept = hashes <= _find_cutoff(hashes, n_kept)
        upper, n_equal = _count_edges(ranked, in_order, levels)
        genes_out, values_out, entry, n = gene_ids_out[row, 1:end], expression_out[row, 1:end], ZERO, ZERO
        while n < np.uint64(len(genes_out)):  # without a branch, as above
            genes_out[n], rank = genes[entry], np.uint32(ranks[entry])
            if len(levels):  # a count that equals several edges is drawn into one of their bins
                values_out[n] = upper[rank] - np.int32((hashes[entry] & LOW_32) * n_equal[rank] >> BITS_32)
            else:
                values_out[n] = values[np.uint64(start) + entry]
            n += np.uint64(kept[entry])
            entry += ONE
