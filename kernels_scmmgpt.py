"""Compiled kernels: counts of cells -> tokens, one cell at a time, in memory that fits the cache."""

import numpy as np


try:
    from numba import njit
except ImportError:
    njit = None


# SplitMix64 (Steele, Lea and Flood 2014): the counter's increment and the two multipliers of its finaliser.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)

# Constants with a type, because numba promotes a mix of signed and unsigned integers to floats.
ZERO, ONE, TWO, FOUR = map(np.uint64, (0, 1, 2, 4))
BITS_6, BITS_27, BITS_30, BITS_31, BITS_32, BITS_56, BITS_64 = map(np.uint64, (6, 27, 30, 31, 32, 56, 64))
LOW_32 = np.uint64(0xFFFFFFFF)
LAST_HASH = np.uint64(0xFFFFFFFFFFFFFFFF)
# Integers up to here, and the bits of finite floats, are the keys of counts in the compiled path.
LARGEST_KEY, LARGEST_FLOAT_KEY = np.uint32(2**31 - 1), np.uint32(0x7F7FFFFF)
LARGEST_WHOLE = np.float32(2**24)  # float32 holds every whole number up to here


def mix64(state):
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    state = (state ^ (state >> BITS_30)) * MIX_1
    state = (state ^ (state >> BITS_27)) * MIX_2
    return state ^ (state >> BITS_31)


# Compiling takes seconds, once a machine, and loading what was compiled some tenths: in NumPy so many cells take less.
WARM_UP_CELLS = 5_000
_n_cells_seen = 0


def kernels_pay(n_cells):
    """Counts cells, and says whether there were enough to take the compiled path from here on."""
    global _n_cells_seen
    _n_cells_seen += n_cells
    return njit is not None and _n_cells_seen > WARM_UP_CELLS


def _compiled(function):
    """Compiles at the first call, once a machine; without numba the function stays as it is and is never called."""
    if njit is None:
        return function
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no place to keep the machine code
        return njit(nogil=True)(function)


# Counts below this are sorted by counting, larger ones (the tail) by radix; most cells have a tail of a few genes.
TAIL = 255
INSERTION_SORT_LENGTH = 48
RADIX_BITS, RADIX_SIZE = np.uint64(8), 256
LARGEST_BITMAP = 2**17
LOW_6, EVEN_BITS, EVEN_PAIRS = np.uint64(63), np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
EVEN_NIBBLES, BYTES_OF_ONE = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)

mix64_kernel = _compiled(mix64)


@_compiled
def _sort_by_upper_half(words, n, spare):
    """Sorts `words[:n]` by their upper 32 bits, ties in place, and returns the array that holds them."""
    if n <= INSERTION_SORT_LENGTH:
        for i in range(1, n):
            word = words[i]
            j = i
            while j > 0 and words[j - 1] >> BITS_32 > word >> BITS_32:
                words[j] = words[j - 1]
                j -= 1
            words[j] = word
        return words
    used_bits = ZERO
    for i in range(n):
        used_bits |= words[i]
    slots, digit_mask = np.empty(RADIX_SIZE, np.uint64), np.uint64(RADIX_SIZE - 1)
    shift = BITS_32
    while shift < BITS_64 and used_bits >> shift:
        slots[:] = ZERO
        for i in range(n):
            slots[(words[i] >> shift) & digit_mask] += ONE
        end = ZERO
        for digit in range(RADIX_SIZE):
            end, slots[digit] = end + slots[digit], end
        for i in range(n):
            digit = (words[i] >> shift) & digit_mask
            spare[slots[digit]] = words[i]
            slots[digit] += ONE
        words, spare = spare, words
        shift += RADIX_BITS
    return words


@_compiled
def _find_cutoff(hashes, n, n_kept, n_low, n_high):
    """A word that exactly `n_kept` of the distinct `hashes[:n]` do not exceed.

    Hashes are spread evenly, so that interpolation finds it in about four counts of them, each a few instructions.

    Args:
        hashes: `uint64 (n,)`, in which 0 and [`LAST_HASH`] may repeat.
        n: How many.
        n_kept: At least 1, and fewer than `n`.
        n_low: How many of them are 0.
        n_high: How many of them are not [`LAST_HASH`].
    """
    low, high = ZERO, LAST_HASH
    while True:
        share = (n_kept - n_low + 0.5) / (n_high - n_low + 1)
        cutoff = low + max(np.uint64(np.float64(high - low) * share), ONE)
        n_found = 0
        for i in range(n):
            n_found += hashes[i] <= cutoff
        if n_found == n_kept:
            return cutoff
        if n_found < n_kept:
            low, n_low = cutoff, n_found
        else:
            high, n_high = cutoff, n_found


@_compiled
def _rank_keys(keys, n_small, histogram, packed, spare, run_keys, run_ends):
    """Sorts the keys of a cell into runs of equal keys: those below `n_small` by counting, the others by radix.

    `run_keys` and `run_ends` receive the ascending keys, and how many keys are not above each.

    Returns:
        The number of runs; the others, the tail, in order, each key in the upper half of a word and its position in
        the lower; and the length of the tail.
    """
    n, n_runs, n_tail, end = len(keys), 0, 0, 0
    largest = np.uint32(0)
    for i in range(n):
        largest = max(largest, keys[i])
    if n_small:
        # Four histograms in turn: more than half of the counts are 1, and a counter waits for its own last write.
        histogram[:] = 0
        for i in range(0, n - 3, 4):
            for lane in range(4):
                histogram[lane, min(keys[i + lane], np.uint32(TAIL))] += 1
        for i in range(n - n % 4, n):
            histogram[0, min(keys[i], np.uint32(TAIL))] += 1
        for key in range(1, min(np.int64(largest) + 1, n_small)):
            repeats = histogram[0, key] + histogram[1, key] + histogram[2, key] + histogram[3, key]
            end += repeats
            run_keys[n_runs] = key
            run_ends[n_runs] = end
            n_runs += repeats > 0
    if end < n:
        for i in range(n):
            packed[n_tail] = np.uint64(keys[i]) << BITS_32 | np.uint64(i)
            n_tail += keys[i] >= n_small
    tail = _sort_by_upper_half(packed, n_tail, spare)
    for i in range(n_tail):
        if n_runs == 0 or run_keys[n_runs - 1] != tail[i] >> BITS_32:
            run_keys[n_runs] = tail[i] >> BITS_32
            n_runs += 1
        run_ends[n_runs - 1] = n - n_tail + i + 1
    return n_runs, tail, n_tail


@_compiled
def _draw_bin(entry, gene_hash):
    """The bin of a count from its entry in the table of [`_bin_cell`]: highest bin, and how many edges it equals."""
    return np.float32(np.int32(entry >> BITS_32) - np.int32(((gene_hash & LOW_32) * (entry & LOW_32)) >> BITS_32))


@_compiled
def _bin_cell(is_float, n, hashes, levels, run_values, run_ends, n_runs, tail, n_tail, edges, table, bins):
    """Quantile bins of one cell; see [`bin_counts`].

    `table` receives an entry for each count that is not in the tail, and `bins` the bins of the tail.
    """
    n_edges, run = len(levels), 0
    for k in range(n_edges):
        level = levels[k] * (n - 1)
        before = int(np.floor(level))
        weight = level - before
        while run_ends[run] <= before:
            run += 1
        low = high = run_values[run]
        if run_ends[run] == before + 1 and before + 1 < n:
            high = run_values[run + 1]
        # NumPy subtracts in the precision of the values.
        step = np.float64(np.float32(high) - np.float32(low)) if is_float else high - low
        edges[k] = low + step * weight if weight < 0.5 else high - step * (1 - weight)

    lower, upper, start = 0, 0, 0
    for run in range(n_runs):
        value = run_values[run]
        while lower < n_edges and edges[lower] < value:
            lower += 1
        while upper < n_edges and edges[upper] <= value:
            upper += 1
        entry = np.uint64(upper) << BITS_32 | np.uint64(upper - lower)
        if start < n - n_tail:
            table[np.int64(value)] = entry
        else:
            for rank in range(start, run_ends[run]):
                i = tail[rank - (n - n_tail)] & LOW_32
                bins[i] = _draw_bin(entry, hashes[i])
        start = run_ends[run]


@_compiled
def fill_rows(
    indptr,
    gene_ids,
    keys,
    is_float,
    values,
    levels,
    cell_keys,
    n_kept,
    by_count,
    pad_token_id,
    pad_value,
    gene_ids_out,
    expression_out,
    attended_out,
):
    """Bins, selects and pads every cell into its row of the outputs, from position 1 on.

    Args:
        indptr: `int64 (n_cells + 1,)`.
        gene_ids: `int32 (nnz,)`.
        keys: `uint32 (nnz,)`: the counts, or the bits of float32 counts.
        is_float: Whether they are the bits of floats.
        values: `float32 (nnz,)`; empty to bin the counts.
        levels: `float64 (n_bins - 1,)`, the quantile levels of the bin edges.
        cell_keys: `uint64 (n_cells,)`, the start of each cell's random sequence.
        n_kept: Most genes of a cell that may stay.
        by_count: Whether those with the largest counts stay, or any.
        pad_token_id: Id of `<pad>`.
        pad_value: float32 expression of `<pad>`.
        gene_ids_out: `int64 (n_cells, n_tokens)`.
        expression_out: `float32 (n_cells, n_tokens)`.
        attended_out: `int64 (n_cells, n_tokens)`.

    Returns:
        False as soon as a cell has an entry that is no count, or genes that do not ascend.
    """
    longest = 0
    for row in range(len(cell_keys)):
        longest = max(longest, indptr[row + 1] - indptr[row])
    hashes, places = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    packed, spare = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    whole_keys, run_keys = np.empty(longest, np.uint32), np.empty(longest + TAIL + 1, np.uint32)
    run_ends, run_values = np.empty(longest + TAIL + 1, np.int64), np.empty(longest + TAIL + 1, np.float64)
    histogram, table = np.empty((4, TAIL + 1), np.int32), np.zeros(TAIL + 1, np.uint64)
    bins, edges, kept = np.empty(longest, np.float32), np.empty(len(levels)), np.empty(longest, np.uint32)
    is_binned, largest_key = len(values) == 0, LARGEST_FLOAT_KEY if is_float else LARGEST_KEY

    for row in range(len(cell_keys)):
        start, stop = indptr[row], indptr[row + 1]
        n = stop - start
        row_genes, row_keys = gene_ids[start:stop], keys[start:stop]
        genes_row, expression_row, attended_row = gene_ids_out[row], expression_out[row], attended_out[row]
        n_wrong = 0
        for i in range(n):
            n_wrong += row_keys[i] - np.uint32(1) >= largest_key  # 0 wraps around
        for i in range(1, n):
            n_wrong += row_genes[i] <= row_genes[i - 1]
        if n_wrong:
            return False

        is_crowded = n > n_kept
        for i in range(n):
            hashes[i] = mix64_kernel(cell_keys[row] + (np.uint64(row_genes[i]) + ONE) * GOLDEN_GAMMA)

        row_values, is_tabled = bins if is_binned else values[start:stop], False
        if n and (is_binned or (is_crowded and by_count)):
            # Floats that are whole numbers are treated as integers, as far as float32 represents them all.
            is_fraction = is_float
            if is_float:
                floats = row_keys.view(np.float32)
                n_whole = 0
                for i in range(n):
                    whole_keys[i] = np.uint32(min(floats[i], LARGEST_WHOLE))
                    n_whole += np.float32(whole_keys[i]) == floats[i]
                is_fraction = n_whole < n
                if not is_fraction:
                    row_keys = whole_keys[:n]
            n_small = 0 if is_fraction else TAIL
            n_runs, tail, n_tail = _rank_keys(row_keys, n_small, histogram, packed, spare, run_keys, run_ends)
            if is_binned:
                if is_fraction:
                    run_values[:n_runs] = run_keys[:n_runs].view(np.float32)
                else:
                    run_values[:n_runs] = run_keys[:n_runs]
                _bin_cell(
                    is_fraction,
                    n,
                    hashes,
                    levels,
                    run_values,
                    run_ends,
                    n_runs,
                    tail,
                    n_tail,
                    edges,
                    table,
                    bins,
                )
                # Without a tail, only the genes that stay are looked up.
                is_tabled = n_tail == 0
                if 0 < n_tail < n:
                    for i in range(n):
                        if row_keys[i] < n_small:
                            bins[i] = _draw_bin(table[row_keys[i]], hashes[i])

        n_tokens = 1 + min(n, n_kept)
        if is_crowded:
            ranks, n_low, n_high = hashes, 0, n
            if by_count:
                run = n_runs - 1
                while run > 0 and run_ends[run - 1] > n - n_kept:
                    run -= 1
                smallest = run_keys[run]
                n_low, n_high = n - run_ends[run], n - (run_ends[run - 1] if run else 0)
                for i in range(n):
                    places[i] = hashes[i] if row_keys[i] == smallest else ZERO if row_keys[i] > smallest else LAST_HASH
                ranks = places
            cutoff = _find_cutoff(ranks, n, n_kept, n_low, n_high)
            n_found = ZERO
            for i in range(n):  # without a branch: what is not kept is overwritten by the next that is
                kept[n_found] = i
                n_found += np.uint64(ranks[i] <= cutoff)
            for i in range(n_kept):
                genes_row[i + 1] = row_genes[kept[i]]
            if is_tabled:
                for i in range(n_kept):
                    expression_row[i + 1] = _draw_bin(table[row_keys[kept[i]]], hashes[kept[i]])
            else:
                for i in range(n_kept):
                    expression_row[i + 1] = row_values[kept[i]]
        else:
            for i in range(n):
                genes_row[i + 1] = row_genes[i]
            if is_tabled:
                for i in range(n):
                    expression_row[i + 1] = _draw_bin(table[row_keys[i]], hashes[i])
            else:
                for i in range(n):
                    expression_row[i + 1] = row_values[i]
        attended_row[:n_tokens] = 1
        attended_row[n_tokens:] = 0
        genes_row[n_tokens:] = pad_token_id
        expression_row[n_tokens:] = pad_value
    return True


@_compiled
def _count_bits(word):
    """Bits set in a 64-bit word; compilers know this form and emit one instruction."""
    word = word - ((word >> ONE) & EVEN_BITS)
    word = (word & EVEN_PAIRS) + ((word >> TWO) & EVEN_PAIRS)
    return (((word + (word >> FOUR)) & EVEN_NIBBLES) * BYTES_OF_ONE) >> BITS_56


@_compiled
def _column_codes(ids):
    """Gene ids as `uint32`, with the next after the largest for columns to leave out.

    Returns:
        The codes; that one; whether the others ascend; and a bitmap of all codes.
    """
    left_out = max(np.int64(ids.max()) + 1, 0) if len(ids) else 0
    codes = np.empty(len(ids), np.uint32)
    for column in range(len(ids)):
        codes[column] = left_out if ids[column] < 0 else ids[column]
    last, column = -1, 0
    while column < len(ids) and (ids[column] < 0 or ids[column] > last):
        last = max(last, ids[column])
        column += 1
    bitmap = np.zeros(left_out // 64 + 1 if left_out <= LARGEST_BITMAP else 0, np.uint64)
    return codes, np.uint64(left_out), column == len(ids), bitmap


@_compiled
def _add_counts(data, n):
    """Sum of `data[:n]` as [`_row_sums`] adds, and whether all are counts."""
    # Whole numbers add up to the same in any order.
    n_whole, total = 0, 0
    for i in range(n):
        whole = np.int32(min(max(data[i], 0), LARGEST_WHOLE))
        n_whole += whole == data[i]
        total += whole
    if n_whole == n:
        return np.float64(total), True
    n_right = 0
    for i in range(n):
        n_right += (data[i] >= 0) & (data[i] < np.inf)
    lane_0, lane_1, lane_2, lane_3 = 0.0, 0.0, 0.0, 0.0
    for i in range(0, n - 3, 4):
        lane_0 += data[i]
        lane_1 += data[i + 1]
        lane_2 += data[i + 2]
        lane_3 += data[i + 3]
    for i in range(n - n % 4, n):
        lane_0 += data[i]
    return (lane_0 + lane_1) + (lane_2 + lane_3), n_right == n


@_compiled
def _read_row(columns, data, n, codes, left_out, is_ascending, row_codes, bitmap, ranks, gene_ids_out, counts_out):
    """Sorts the entries of one row by gene id into the outputs, without columns to leave out.

    Returns:
        How many entries stay, and whether genes may repeat among them.
    """
    n_falls = 0
    for i in range(1, n):
        n_falls += columns[i] <= columns[i - 1]
    if is_ascending and n_falls == 0:
        n_kept = ZERO
        for i in range(n):
            code = codes[np.uint32(columns[i])]
            gene_ids_out[n_kept] = code
            counts_out[n_kept] = data[i]
            n_kept += np.uint64(code < left_out)
        return np.int64(n_kept), False

    # A gene's place is the number of bits set before its own.
    n_kept, n_genes = 0, ZERO
    if len(bitmap):
        for i in range(n):
            code = np.uint64(codes[np.uint32(columns[i])])
            row_codes[i] = code
            n_kept += code < left_out
            bitmap[code >> BITS_6] |= ONE << (code & LOW_6)
        for word in range(len(bitmap)):
            ranks[word] = n_genes
            n_genes += _count_bits(bitmap[word])
    if np.int64(n_genes) == n_kept + (n_kept < n):
        for i in range(n):
            code = np.uint64(row_codes[i])
            word = code >> BITS_6
            place = ranks[word] + _count_bits(bitmap[word] & ((ONE << (code & LOW_6)) - ONE))
            gene_ids_out[place] = row_codes[i]
            counts_out[place] = data[i]
        bitmap[:] = ZERO
        return n_kept, False

    # A gene has several columns, or the ids are too large for the bitmap.
    bitmap[:] = ZERO
    words, spare, n_kept = np.empty(n, np.uint64), np.empty(n, np.uint64), 0
    for i in range(n):
        words[i] = np.uint64(codes[np.uint32(columns[i])]) << BITS_32 | np.uint64(i)
        n_kept += words[i] >> BITS_32 < left_out
    words = _sort_by_upper_half(words, n, spare)
    for i in range(n_kept):
        gene_ids_out[i] = words[i] >> BITS_32
        counts_out[i] = data[words[i] & LOW_32]
    return n_kept, True


@_compiled
def read_csr(indptr, columns, data, ids):
    """Reads a CSR matrix of counts.

    Args:
        indptr: `int64 (n_rows + 1,)`.
        columns: `int32 (nnz,)`, in any order within a row.
        data: Numbers, `(nnz,)`.
        ids: `int32 (n_columns,)`, the gene id of each column or -1.

    Returns:
        `indptr` (`int64`), `gene_ids` (`int32`, ascending within a row) and `counts` of the entries that stay, the
        sums of all entries of each row (`float32`), whether all entries are counts, and whether genes may repeat.
    """
    n_rows, n_kept, longest, is_valid, may_repeat = len(indptr) - 1, 0, 0, True, False
    for row in range(n_rows):
        longest = max(longest, indptr[row + 1] - indptr[row])
    codes, left_out, is_ascending, bitmap = _column_codes(ids)
    row_codes, ranks = np.empty(longest, np.uint32), np.empty(len(bitmap), np.uint64)
    kept_indptr, totals = np.zeros(n_rows + 1, np.int64), np.empty(n_rows, np.float32)
    gene_ids, counts = np.empty(len(data), np.int32), np.empty(len(data), data.dtype)
    for row in range(n_rows):
        start, stop = indptr[row], indptr[row + 1]
        row_data = data[start:stop]
        totals[row], row_is_valid = _add_counts(row_data, stop - start)
        n, row_may_repeat = _read_row(
            columns[start:stop],
            row_data,
            stop - start,
            codes,
            left_out,
            is_ascending,
            row_codes,
            bitmap,
            ranks,
            gene_ids[n_kept:],
            counts[n_kept:],
        )
        n_kept += n
        is_valid &= row_is_valid
        may_repeat |= row_may_repeat
        kept_indptr[row + 1] = n_kept
    return kept_indptr, gene_ids[:n_kept], counts[:n_kept], totals, is_valid, may_repeat


@_compiled
def _nonzero_bits(values, first, n):
    """A word whose bit `i` says whether `values[first + i]` is not zero, for `i` below `n`."""
    word = ZERO
    for i in range(n):
        word |= np.uint64(values[first + np.uint64(i)] != 0) << np.uint64(i)
    return word


@_compiled
def _find_nonzero(values, found, data):
    """Writes where values are not zero, and those values, and rubbish behind them (up to 6 places); counts them."""
    n = ZERO
    for block in range(-(-len(values) // 64)):
        first = np.uint64(block) * np.uint64(64)
        n_left = len(values) - block * 64
        # A constant length is what compilers make vectors of.
        word = _nonzero_bits(values, first, 64) if n_left >= 64 else _nonzero_bits(values, first, n_left)
        n_next = n + _count_bits(word)
        # Six at a time without a branch: most words of a sparse row need no second turn.
        while word:
            for i in range(6):
                column = first + (_count_bits(~word & (word - ONE)) & LOW_6)  # the lowest bit set, or 0 for none
                found[n + np.uint64(i)] = column
                data[n + np.uint64(i)] = values[column]
                word &= word - ONE
            n += np.uint64(6)
        n = n_next
    return np.int64(n)


@_compiled
def find_entries(matrix):
    """CSR arrays (`int64`, `int32` and as the matrix) of what is not zero in a dense matrix."""
    n_rows, n_columns = matrix.shape
    indptr = np.zeros(n_rows + 1, np.int64)
    size = n_columns + n_rows * n_columns // 8 + 6  # room for one entry in eight, to begin with
    columns, data = np.empty(size, np.int32), np.empty(size, matrix.dtype)
    for row in range(n_rows):
        start = indptr[row]
        if start + n_columns + 6 > len(columns):
            longer_columns, longer_data = np.empty(2 * len(columns), np.int32), np.empty(2 * len(data), matrix.dtype)
            longer_columns[:start], longer_data[:start] = columns[:start], data[:start]
            columns, data = longer_columns, longer_data
        indptr[row + 1] = start + _find_nonzero(matrix[row], columns[start:], data[start:])
    return indptr, columns[: indptr[-1]], data[: indptr[-1]]
