"""Counts in, model inputs out: `Cells`, a ragged batch of cells, and `ScMMGPTFeatureExtractor`, which tokenises it.

A cell is the set of genes that it expresses, as ids of the gene vocabulary with their counts. The extractor bins,
selects, orders and pads them. All randomness is a hash of (seed, epoch, cell id, gene id): the same cell gives the
same tokens in any order, batch, chunk, worker or process, and another `epoch` gives another draw.

Where numba is installed, compiled kernels take over after the first few thousand cells, and release the GIL; before,
and without numba, NumPy does the work. Both give the same bits.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin


try:
    from numba import njit
except ImportError:
    njit = None


VALUE_MODES = ("binned", "log1p", "raw")
SELECTIONS = ("random", "top")

# SplitMix64 (Steele, Lea and Flood 2014): the counter's increment and the two multipliers of its finaliser.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
# Draws for different purposes come from different streams, so that a mask does not follow the selection.
TOKEN_STREAM, MASK_STREAM, RATIO_STREAM, NAME_STREAM = range(4)

# Constants with a type, because numba promotes a mix of signed and unsigned integers to floats.
ZERO, ONE, TWO, FOUR = map(np.uint64, (0, 1, 2, 4))
BITS_6, BITS_27, BITS_30, BITS_31, BITS_32, BITS_56, BITS_64 = map(np.uint64, (6, 27, 30, 31, 32, 56, 64))
LOW_32 = np.uint64(0xFFFFFFFF)
LAST_HASH = np.uint64(0xFFFFFFFFFFFFFFFF)
# Integers up to here, and the bits of finite floats, are the keys of counts in the compiled path.
LARGEST_KEY, LARGEST_FLOAT_KEY = np.uint32(2**31 - 1), np.uint32(0x7F7FFFFF)
LARGEST_WHOLE = np.float32(2**24)  # float32 holds every whole number up to here


# ---------------------------------------------------------------------------------------------------------------------
# Random draws
# ---------------------------------------------------------------------------------------------------------------------


def _mix(state):
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    state = (state ^ (state >> BITS_30)) * MIX_1
    state = (state ^ (state >> BITS_27)) * MIX_2
    return state ^ (state >> BITS_31)


@functools.lru_cache(maxsize=64)
def _stream_key(seed, epoch, stream):
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key + GOLDEN_GAMMA + np.uint64(part % 2**64))
    return key


def _cell_keys(cell_ids: np.ndarray, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """One 64-bit key a cell, `uint64 (n_cells,)`: where this cell's own random sequence starts."""
    return _mix(cell_ids.astype(np.uint64, copy=False) ^ _stream_key(seed, epoch, stream))


def _gene_hashes(cell_keys: np.ndarray, gene_ids: np.ndarray) -> np.ndarray:
    """The gene's element of its cell's random sequence, `uint64`; the arguments broadcast. No two of a cell tie."""
    return _mix(cell_keys + (gene_ids.astype(np.uint64) + ONE) * GOLDEN_GAMMA)


def hash_names(names) -> np.ndarray:
    """Stable 64-bit identities of cells from their barcodes.

    The hash depends on the characters alone: not on the process, the other names, or their order.

    Args:
        names: Strings, shape `(n_cells,)`, such as `adata.obs_names`.

    Returns:
        `uint64 (n_cells,)`.
    """
    names = np.asarray(names).astype(np.str_)
    if names.ndim != 1:
        raise ValueError(f"Expected one name a cell, but `names` has shape {names.shape}. Pass `adata.obs_names`.")
    state = _cell_keys(np.zeros(len(names), dtype=np.uint64), seed=0, epoch=0, stream=NAME_STREAM)
    characters = np.ascontiguousarray(names).view(np.uint32).reshape(len(names), names.dtype.itemsize // 4)
    for column in characters.T:  # over the width of the longest name, all cells at once; NumPy pads with zeros
        state = np.where(column > 0, _mix(state + column * GOLDEN_GAMMA), state)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cells:
    """A ragged batch of cells in CSR layout, genes already as ids of the gene vocabulary.

    Args:
        indptr: `int64 (n_cells + 1,)`; cell `i` owns `gene_ids[indptr[i]:indptr[i + 1]]`, and so its `counts`.
        gene_ids: Integer `(nnz,)`; within a cell unique and ascending.
        counts: Integer or float32 `(nnz,)`, above 0: raw counts (or the values at hand), never their log.
        cell_ids: `uint64 (n_cells,)`: the stable identity of each cell, from which all its randomness derives.
            [`hash_names`] makes it of barcodes.
        total_counts: `float32 (n_cells,)`: library size over all genes of the source, whether or not they are in the
            vocabulary. `None` stands for the sum of `counts`.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    counts: np.ndarray
    cell_ids: np.ndarray
    total_counts: np.ndarray | None = None

    def __post_init__(self):
        self.indptr = np.asarray(self.indptr, dtype=np.int64)
        self.gene_ids = np.asarray(self.gene_ids)
        self.counts = np.asarray(self.counts)
        if self.counts.dtype.kind == "f":
            self.counts = self.counts.astype(np.float32, copy=False)
        self.cell_ids = np.asarray(self.cell_ids)
        if self.cell_ids.dtype.kind == "i":
            self.cell_ids = self.cell_ids.astype(np.uint64)
        if self.total_counts is not None:
            self.total_counts = np.asarray(self.total_counts, dtype=np.float32)
        for name, kinds, wanted in (
            ("gene_ids", "iu", "integers"),
            ("counts", "iuf", "integers or floats"),
            ("cell_ids", "u", "64-bit integers"),
        ):
            if getattr(self, name).dtype.kind not in kinds:
                raise TypeError(f"`{name}` has dtype {getattr(self, name).dtype}, but Cells holds {wanted} there.")
        n_cells = len(self.indptr) - 1
        if n_cells < 0 or self.indptr[0] != 0 or (self.indptr[1:] < self.indptr[:-1]).any():
            raise ValueError("`indptr` must start at 0 and never fall: entry i is where cell i starts.")
        for name, length in (
            ("gene_ids", self.indptr[-1]),
            ("counts", self.indptr[-1]),
            ("cell_ids", n_cells),
            ("total_counts", n_cells),
        ):
            array = getattr(self, name)
            if array is not None and array.shape != (length,):
                raise ValueError(f"`{name}` has shape {array.shape}, but `indptr` asks for ({length},).")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, index) -> "Cells":
        """The cells at a slice, an array of positions or a boolean mask; a single position gives a batch of one."""
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Cell {index} was asked for, but there are {len(self)}.")
            index = np.array([index])
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            stop = max(start, stop)
            rows, entries = slice(start, stop), slice(self.indptr[start], self.indptr[stop])
            indptr = self.indptr[start : stop + 1] - self.indptr[start]
        else:
            rows = np.arange(len(self))[index]
            lengths = np.diff(self.indptr)[rows]
            indptr = np.concatenate([[0], np.cumsum(lengths)])
            entries = np.repeat(self.indptr[rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        total_counts = None if self.total_counts is None else self.total_counts[rows]
        return Cells(indptr, self.gene_ids[entries], self.counts[entries], self.cell_ids[rows], total_counts)

    def library_sizes(self) -> np.ndarray:
        """`float32 (n_cells,)`: `total_counts`, or the sum of `counts` where the source did not say."""
        return _row_sums(self.counts, self.indptr) if self.total_counts is None else self.total_counts

    @classmethod
    def concatenate(cls, batches) -> "Cells":
        """Joins batches of cells, in order. Library sizes are written out if any batch has its own."""
        batches = list(batches)
        if not batches:
            raise ValueError("There is no batch to concatenate.")
        offsets = np.cumsum([0] + [batch.indptr[-1] for batch in batches])
        indptr = [batch.indptr[:-1] + offset for batch, offset in zip(batches, offsets, strict=False)]
        known = any(batch.total_counts is not None for batch in batches)
        return cls(
            np.concatenate([*indptr, offsets[-1:]]),
            np.concatenate([batch.gene_ids for batch in batches]),
            np.concatenate([batch.counts for batch in batches]),
            np.concatenate([batch.cell_ids for batch in batches]),
            np.concatenate([batch.library_sizes() for batch in batches]) if known else None,
        )

    @classmethod
    def from_csr(cls, matrix, vocabulary_ids, cell_ids=None) -> "Cells":
        """Reads a CSR matrix of counts.

        Args:
            matrix: `(n_cells, n_vars)` with `indptr`, `indices` and `data`, as `scipy.sparse.csr_matrix`.
            vocabulary_ids: Integer `(n_vars,)`: the gene id of each column, -1 for a column to leave out. Columns with
                the same id are summed.
            cell_ids: `uint64 (n_cells,)`, best `hash_names(adata.obs_names)`. By default the row numbers, under which
                a cell's random draws depend on the chunk that it is read in.

        Returns:
            `Cells` whose `total_counts` are the sums over all columns, those left out included.
        """
        indptr, columns, data = (np.asarray(array) for array in (matrix.indptr, matrix.indices, matrix.data))
        if data.min(initial=1) == 0:  # stored zeros
            indptr = np.concatenate([[0], np.cumsum(data != 0)])[indptr]
            columns, data = columns[data != 0], data[data != 0]
        ids, pays = _column_ids(vocabulary_ids, matrix.shape[1]), _kernels_pay(len(indptr) - 1)
        return cls._from_entries(indptr, columns, data, ids, cell_ids, pays)

    @classmethod
    def from_dense(cls, matrix, vocabulary_ids, cell_ids=None) -> "Cells":
        """Reads a dense array of counts, `(n_cells, n_vars)`; the other arguments are those of [`Cells.from_csr`]."""
        matrix = np.ascontiguousarray(matrix)
        if matrix.ndim != 2:
            raise ValueError(f"Expected a matrix of cells by genes, but its shape is {matrix.shape}.")
        ids, pays = _column_ids(vocabulary_ids, matrix.shape[1]), _kernels_pay(len(matrix))
        return cls._from_entries(*(_find_entries if pays else _find_entries_numpy)(matrix), ids, cell_ids, pays)

    @classmethod
    def _from_entries(cls, indptr, columns, data, ids, cell_ids, is_compiled):
        """Cells of CSR arrays without zeros."""
        indptr, columns = indptr.astype(np.int64, copy=False), columns.astype(np.int32, copy=False)
        if data.dtype.kind == "b":
            data = data.astype(np.uint16)
        read = _read_csr if is_compiled else _read_csr_numpy
        kept_indptr, gene_ids, counts, total_counts, is_valid, may_repeat = read(indptr, columns, data, ids)
        if not is_valid:
            _refuse_entries(indptr, columns, data)
        if may_repeat:
            kept_indptr, gene_ids, counts = _sum_repeats(kept_indptr, gene_ids, counts)
        if cell_ids is None:
            cell_ids = np.arange(len(indptr) - 1, dtype=np.uint64)
        return cls(kept_indptr, gene_ids, counts, cell_ids, total_counts)


def _sum_repeats(indptr, gene_ids, counts):
    """The same entries with those of one gene, which are neighbours, added up."""
    repeats = np.zeros(len(gene_ids), dtype=bool)
    repeats[1:] = gene_ids[1:] == gene_ids[:-1]
    repeats[indptr[:-1][indptr[:-1] < indptr[1:]]] = False
    if not repeats.any():
        return indptr, gene_ids, counts
    gene_of = np.cumsum(~repeats)
    dtype = np.int64 if counts.dtype.kind in "iu" else counts.dtype
    counts = np.bincount(gene_of - 1, weights=counts).astype(dtype)
    return np.concatenate([[0], gene_of])[indptr], gene_ids[~repeats], counts


def _column_ids(vocabulary_ids, n_vars):
    vocabulary_ids = np.asarray(vocabulary_ids)
    if vocabulary_ids.shape != (n_vars,) or vocabulary_ids.dtype.kind not in "iu":
        raise ValueError(
            f"`vocabulary_ids` is {vocabulary_ids.dtype} of shape {vocabulary_ids.shape}, but the matrix has {n_vars} "
            "columns. Pass one integer a column, -1 for a column to leave out."
        )
    return vocabulary_ids.astype(np.int32)


def _refuse_entries(indptr, columns, data):
    wrong = np.flatnonzero(~(np.isfinite(data) & (data >= 0)))[0]
    row = np.searchsorted(indptr, wrong, side="right") - 1
    raise ValueError(
        f"Expected counts, but found {data[wrong]} in row {row}, column {columns[wrong]}. "
        "Pass raw counts: negative, infinite and missing values are none."
    )


def _row_sums(data, indptr):
    """Sums of a ragged array's rows, `float32 (n_rows,)`.

    They are added in float64 and in four lanes, which take the entries of a row in turns but for the last few, which
    the first lane takes: so a processor adds four at once, and every path adds in the same order.
    """
    lengths = np.diff(indptr)
    lanes = np.arange(len(data)) - np.repeat(indptr[:-1], lengths)
    lanes = np.where(lanes < np.repeat(lengths // 4 * 4, lengths), lanes % 4, 0)
    lanes += np.repeat(np.arange(len(lengths)) * 4, lengths)
    sums = np.bincount(lanes, weights=data, minlength=4 * len(lengths)).reshape(-1, 4)
    return ((sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])).astype(np.float32)


def _find_entries_numpy(matrix):
    """What [`_find_entries`] does, in NumPy."""
    columns = np.flatnonzero(matrix != 0)  # via booleans: several times faster than on numbers
    rows = columns // max(matrix.shape[1], 1)
    columns -= rows * matrix.shape[1]
    return np.searchsorted(rows, np.arange(len(matrix) + 1)), columns, matrix[rows, columns]


def _read_csr_numpy(indptr, columns, data, ids):
    """What [`_read_csr`] does, in NumPy."""
    rows, gene_ids = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), ids[columns]
    is_valid = bool(data.min(initial=0) >= 0 and np.isfinite(data.max(initial=0)))
    order = _sorting_order(gene_ids.view(np.uint32), rows)
    order = order[gene_ids[order] >= 0]
    kept_indptr = np.searchsorted(rows[order], np.arange(len(indptr)))
    return kept_indptr, gene_ids[order], data[order], _row_sums(data, indptr), is_valid, True


def _sorting_order(keys, rows):
    """The order that sorts by row, then by unsigned key; ties stay in place. NumPy sorts 16-bit digits by radix."""
    digits = [
        digit
        for key in (keys, rows)
        for digit in key.view(np.uint16).reshape(len(key), key.dtype.itemsize // 2).T
        if digit.any()
    ]
    return np.lexsort(digits) if digits else np.arange(len(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def normalize_log1p(cells: Cells, target_sum: float = 1e4) -> np.ndarray:
    """log1p of counts scaled to a library of `target_sum`, as `scanpy.pp.normalize_total` and `log1p`.

    Args:
        cells: Raw counts. The library size is `cells.total_counts`: genes outside the vocabulary count too.
        target_sum: Counts per cell after scaling.

    Returns:
        `float32 (nnz,)`, aligned with `cells.counts`: ln(1 + count / library size * target_sum).
    """
    scale = target_sum / np.maximum(cells.library_sizes().astype(np.float64), np.finfo(np.float32).tiny)
    return np.log1p(cells.counts * np.repeat(scale, np.diff(cells.indptr))).astype(np.float32)


def hellinger_profile(cells: Cells) -> np.ndarray:
    """Square root of each gene's share of its cell's counts: the coordinates in which Euclidean is Hellinger distance.

    The square root evens out the variance of counts, which grows with their mean, so that neither the few strongly
    expressed genes nor the many that are seen once decide alone; and every cell has length 1, whatever its depth.

    Args:
        cells: Raw counts. The library size is `cells.total_counts`: genes outside the vocabulary count too.

    Returns:
        `float32 (nnz,)`, aligned with `cells.counts`: sqrt(count / library size).
    """
    scale = 1 / np.maximum(cells.library_sizes().astype(np.float64), np.finfo(np.float32).tiny)
    return np.sqrt(cells.counts * np.repeat(scale, np.diff(cells.indptr))).astype(np.float32)


def bin_counts(cells: Cells, n_bins: int = 51, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """The value binning of scGPT: each cell's non-zero counts cut at their own quantiles.

    The edges are the quantiles of the cell's counts at `n_bins - 1` equally spaced levels. A count with `a` edges
    below or equal and `b` edges below gets bin `ceil(a + u * (b - a))`, with `u` uniform in [0, 1): a count that
    equals several edges is spread evenly over their bins. `u` is the low half of the gene's hash.

    Args:
        cells: Raw counts. Any increasing transform of a cell's counts gives the same bins.
        n_bins: Bins including bin 0, which means "not expressed" and is never returned.
        seed: Seed of the experiment.
        epoch: Pass over the data; each draws anew.

    Returns:
        `int64 (nnz,)` in `1 .. n_bins - 1`, aligned with `cells.counts`.
    """
    _check_bins(n_bins)
    lower, upper = _edge_counts(cells.indptr, cells.counts, n_bins)
    cell_keys = _cell_keys(cells.cell_ids, seed=seed, epoch=epoch, stream=TOKEN_STREAM)
    hashes = _gene_hashes(np.repeat(cell_keys, np.diff(cells.indptr)), cells.gene_ids)
    # ceil(a + u * (b - a)) = a - floor(u * (a - b)), exactly, with u in units of 2^-32
    return upper - (((hashes & LOW_32) * (upper - lower).astype(np.uint64)) >> BITS_32).astype(np.int64)


def _check_bins(n_bins):
    if n_bins < 2:
        raise ValueError(f"n_bins is {n_bins}; bin 0 is for genes that are not expressed, so at least 2 are needed.")


def _sort_keys(counts):
    """Unsigned integers in the order of the counts: floats above 0 are ordered as their bits.

    What is no count, because it is negative or not finite, gets a key beyond [`LARGEST_KEY`] or that of infinity.
    """
    if counts.dtype.itemsize == 4:
        return counts.view(np.uint32)
    is_large = counts.dtype.itemsize > 4 and counts.max(initial=0) > LARGEST_KEY
    return counts.astype(np.uint64 if is_large else np.uint32)


def _edge_counts(indptr, counts, n_bins):
    """Where every entry lies among its cell's quantile edges.

    The `n_bins - 1` edges of a cell are `np.quantile(counts, np.linspace(0, 1, n_bins - 1))` to the last bit.

    Returns:
        `lower` and `upper`, both `int64 (nnz,)`: how many edges are below the entry, and how many below or equal.
    """
    starts, lengths = indptr[:-1], np.diff(indptr)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = _sorting_order(_sort_keys(counts), rows)
    ranked = counts[order]  # ascending within each cell; a cell keeps its own range of positions

    # step 1: the edges, by NumPy's linear interpolation between order statistics
    filled = np.flatnonzero(lengths)
    last = lengths[filled, None] - 1
    level = np.linspace(0, 1, n_bins - 1) * last
    below = np.floor(level).astype(np.int64)
    weight = level - below
    before = starts[filled, None] + below
    after = starts[filled, None] + np.minimum(below + 1, last)
    step = ranked[after] - ranked[before]
    edges = np.where(weight < 0.5, ranked[before] + step * weight, ranked[after] - step * (1 - weight))

    # step 2: the first entry that reaches each edge, and the first that passes it
    is_new = np.ones(len(ranked), dtype=bool)
    is_new[1:] = (ranked[1:] != ranked[:-1]) | (rows[1:] != rows[:-1])
    run = np.cumsum(is_new) - 1
    run_bounds = np.append(np.flatnonzero(is_new), len(ranked))
    reaches = np.where(edges > ranked[before], after, run_bounds[run[before]])
    passes = np.where(edges < ranked[after], before + 1, run_bounds[run[after] + 1])

    # step 3: count edges along the sorted entries; all edges of the cells before lie behind, so they are taken off
    edges_before = np.repeat(np.cumsum(lengths > 0) - 1, lengths) * (n_bins - 1)
    bounds = []
    for edge_positions in (passes, reaches):
        passed = np.cumsum(np.bincount(edge_positions.ravel(), minlength=len(ranked) + 1))[:-1] - edges_before
        unsorted = np.empty(len(ranked), dtype=np.int64)
        unsorted[order] = passed
        bounds.append(unsorted)
    return bounds


def mask_genes(gene_ids, cell_attention_mask, cell_ids, mask_ratio=0.4, *, seed: int = 0, epoch: int = 0):
    """Chooses the genes to hide in the pre-training objectives: an exact share of each cell, by hash.

    Args:
        gene_ids: `(n_cells, n_tokens)`, array or tensor, with `<cls>` first, as the extractor returns.
        cell_attention_mask: `(n_cells, n_tokens)`, 1 where there is a gene.
        cell_ids: `uint64 (n_cells,)`, as `Cells.cell_ids`.
        mask_ratio: Share of a cell's genes to hide, rounded down, but at least one gene; or several shares, of which
            each cell draws one (scGPT was pre-trained with 0.25, 0.5 and 0.75).
        seed: Seed of the experiment.
        epoch: Pass over the data; each draws anew, independently of the extractor's own draws.

    Returns:
        Boolean `(n_cells, n_tokens)`, array or tensor as `gene_ids`: True where a gene is hidden. `<cls>` and padding
        never are.
    """
    genes, attended = np.asarray(gene_ids), np.asarray(cell_attention_mask).astype(bool)
    cell_ids = np.asarray(cell_ids)
    ratios = np.atleast_1d(np.asarray(mask_ratio, dtype=np.float64))
    if not ((ratios > 0) & (ratios <= 1)).all():
        raise ValueError(f"mask_ratio is {mask_ratio}; a share of a cell's genes lies above 0 and at most at 1.")
    attended[:, :1] = False
    draws = _cell_keys(cell_ids, seed=seed, epoch=epoch, stream=RATIO_STREAM) % np.uint64(len(ratios))
    n_genes = attended.sum(axis=1)
    n_hidden = np.maximum(np.floor(ratios[draws.astype(np.int64)] * n_genes).astype(np.int64), np.minimum(n_genes, 1))
    cell_keys = _cell_keys(cell_ids, seed=seed, epoch=epoch, stream=MASK_STREAM)
    hashes = np.where(attended, _gene_hashes(cell_keys[:, None], genes), LAST_HASH)
    threshold = np.take_along_axis(np.sort(hashes, axis=1), np.maximum(n_hidden - 1, 0)[:, None], axis=1)
    hidden = attended & (hashes <= threshold)
    return torch.from_numpy(hidden).to(gene_ids.device) if isinstance(gene_ids, torch.Tensor) else hidden


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractor
# ---------------------------------------------------------------------------------------------------------------------


class ScMMGPTFeatureExtractor(FeatureExtractionMixin):
    r"""Turns [`Cells`] into the inputs of [`ScGPTModel`]: `<cls>` and up to `max_genes - 1` genes a cell.

    Args:
        max_genes (`int`, defaults to 1200): Longest sequence, `<cls>` included (scGPT's `max_length`).
        n_bins (`int`, defaults to 51): Bins of `value_mode="binned"`, bin 0 included.
        value_mode (`str`, defaults to `"binned"`): `"binned"` is scGPT's quantile binning over all expressed genes of
            the cell, before any are left out; `"log1p"` is log1p of counts per `target_sum`; `"raw"` the counts.
        selection (`str`, defaults to `"random"`): Which genes stay when a cell has more than `max_genes - 1`:
            `"random"` draws them uniformly, as scGPT does; `"top"` takes the largest counts, and draws among those
            that tie for the last places.
        target_sum (`float`, defaults to 10000): Library size of `value_mode="log1p"`.
        cls_value (`float`, defaults to -2): Expression of `<cls>`, as in scGPT's embedding recipe.
        pad_value (`float`, defaults to -2): Expression of `<pad>`.
        seed (`int`, defaults to 0): Seed of every draw.
        pad_token_id (`int`, defaults to 0): Id of `<pad>` in the gene vocabulary.
        cls_token_id (`int`, defaults to 1): Id of `<cls>` in the gene vocabulary.
        return_profile (`bool`, defaults to `False`): Whether to also return every expressed gene's share of the cell,
            as [`hellinger_profile`], for models with a profile readout.
    """

    model_input_names = ["gene_ids", "expression", "cell_attention_mask"]

    def __init__(
        self,
        max_genes=1200,
        n_bins=51,
        value_mode="binned",
        selection="random",
        target_sum=1e4,
        cls_value=-2.0,
        pad_value=-2.0,
        seed=0,
        pad_token_id=0,
        cls_token_id=1,
        return_profile=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.max_genes = max_genes
        self.n_bins = n_bins
        self.value_mode = value_mode
        self.selection = selection
        self.target_sum = target_sum
        self.cls_value = cls_value
        self.pad_value = pad_value
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.cls_token_id = cls_token_id
        self.return_profile = return_profile
        if value_mode not in VALUE_MODES:
            raise ValueError(f"value_mode is {value_mode!r}; choose one of {VALUE_MODES}.")
        _check_bins(n_bins)
        self._check_selection(max_genes, selection)

    @staticmethod
    def _check_selection(max_genes, selection):
        if max_genes < 2:
            raise ValueError(f"max_genes is {max_genes}; `<cls>` and one gene take 2.")
        if selection not in SELECTIONS:
            raise ValueError(f"selection is {selection!r}; choose one of {SELECTIONS}.")

    def __call__(
        self,
        cells: Cells,
        *,
        epoch: int = 0,
        return_tensors: str | None = "pt",
        max_genes: int | None = None,
        selection: str | None = None,
        padding: bool | str = True,
    ) -> BatchFeature:
        """Tokenises a batch of cells.

        Args:
            cells: Raw counts with their gene ids.
            epoch: Pass over the data; each draws anew. Keep 0 for evaluation.
            return_tensors: `"pt"` or `"np"`.
            max_genes: In place of the extractor's own, for this call.
            selection: In place of the extractor's own, for this call.
            padding: `True` pads to the longest cell of the batch, `"max_length"` to `max_genes`.

        Returns:
            `gene_ids` (`int64`), `expression` (`float32`) and `cell_attention_mask` (`int64`, 1 = attend), all
            `(n_cells, n_tokens)`: `<cls>`, then the genes in ascending order of id, then `<pad>`. With
            `return_profile` also `profile_gene_ids` (`int64`) and `profile` (`float32`), both `(n_cells, longest)`:
            all expressed genes whatever `max_genes` is, and their [`hellinger_profile`], 0 at `<pad>`.
        """
        max_genes = self.max_genes if max_genes is None else max_genes
        selection = self.selection if selection is None else selection
        self._check_selection(max_genes, selection)
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; choose True (to the longest cell) or 'max_length'.")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors is {return_tensors!r}; choose 'pt' or 'np'.")

        longest = int(np.diff(cells.indptr).max(initial=0))
        n_tokens = max_genes if padding == "max_length" else min(max_genes, 1 + longest)
        shape = (len(cells), n_tokens)
        gene_ids, attended = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        expression = np.empty(shape, dtype=np.float32)
        gene_ids[:, 0], expression[:, 0] = self.cls_token_id, self.cls_value
        arguments = (
            cells.indptr,
            cells.gene_ids.astype(np.int32, copy=False),
            _sort_keys(cells.counts),
            cells.counts.dtype.kind == "f",
            self._values(cells),
            np.linspace(0, 1, self.n_bins - 1),
            _cell_keys(cells.cell_ids, seed=self.seed, epoch=epoch, stream=TOKEN_STREAM),
            max_genes - 1,
            selection == "top",
            self.pad_token_id,
            np.float32(self.pad_value),
            gene_ids,
            expression,
            attended,
        )
        # The kernel checks the entries as it goes and leaves to NumPy what it was not made for, large counts included.
        if not _kernels_pay(len(cells)) or arguments[2].dtype != np.uint32 or not _fill_rows(*arguments):
            _check_entries(cells)
            _fill_rows_numpy(*arguments)
        arrays = {"gene_ids": gene_ids, "expression": expression, "cell_attention_mask": attended}
        if self.return_profile:
            lengths = np.diff(cells.indptr)
            is_gene = np.arange(longest) < lengths[:, None]
            arrays["profile_gene_ids"] = np.full(is_gene.shape, self.pad_token_id, dtype=np.int64)
            arrays["profile_gene_ids"][is_gene] = cells.gene_ids
            arrays["profile"] = np.zeros(is_gene.shape, dtype=np.float32)
            arrays["profile"][is_gene] = hellinger_profile(cells)
        if return_tensors == "pt":
            arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return BatchFeature(arrays)

    def _values(self, cells):
        """`float32 (nnz,)`, or nothing where the kernel bins the counts itself."""
        if self.value_mode == "log1p":
            return normalize_log1p(cells, self.target_sum)
        return cells.counts.astype(np.float32, copy=False) if self.value_mode == "raw" else np.empty(0, np.float32)


ScMMGPTFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")


def _check_entries(cells):
    """Refuses counts that are not above 0, and genes that do not ascend."""
    if not (cells.counts.min(initial=1) > 0 and np.isfinite(cells.counts.max(initial=1))):
        wrong = cells.counts[~((cells.counts > 0) & np.isfinite(cells.counts))][0]
        raise ValueError(
            f"Cells holds counts above 0 only, but found {wrong}. "
            "Build it with `Cells.from_csr`, which drops zeros and refuses what is no count."
        )
    ascending = cells.gene_ids[1:] > cells.gene_ids[:-1]
    starts = cells.indptr[1:-1]
    ascending[starts[(starts > 0) & (starts < cells.indptr[-1])] - 1] = True
    if not ascending.all():
        row = np.searchsorted(cells.indptr, np.flatnonzero(~ascending)[0], side="right") - 1
        raise ValueError(f"The gene ids of cell {row} repeat or do not ascend. `Cells.from_csr` sorts and sums them.")


def _fill_rows_numpy(
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
    """What [`_fill_rows`] does, in NumPy."""
    lengths = np.diff(indptr)
    hashes = _gene_hashes(np.repeat(cell_keys, lengths), gene_ids)
    if not len(values):
        lower, upper = _edge_counts(indptr, keys.view(np.float32) if is_float else keys, len(levels) + 1)
        values = upper - (((hashes & LOW_32) * (upper - lower).astype(np.uint64)) >> BITS_32).astype(np.int64)
    kept = np.ones(len(gene_ids), dtype=bool)
    crowded = lengths > n_kept
    if crowded.any():
        of_crowded = np.repeat(crowded, lengths)
        in_row = np.arange(lengths[crowded].max()) < lengths[crowded, None]
        places = np.full(in_row.shape, LAST_HASH)
        places[in_row] = hashes[of_crowded]
        if by_count:
            ranks = np.zeros(in_row.shape, dtype=keys.dtype)
            ranks[in_row] = keys[of_crowded]
            cutoff = np.partition(ranks, -n_kept, axis=1)[:, -n_kept, None]
            places = np.select([ranks > cutoff, ranks == cutoff], [ZERO, places], LAST_HASH)
        last_place = np.partition(places, n_kept - 1, axis=1)[:, n_kept - 1, None]
        kept[of_crowded] = (places <= last_place)[in_row]
    attended_out[:] = np.arange(attended_out.shape[1]) <= np.minimum(lengths, n_kept)[:, None]
    is_gene = attended_out[:, 1:] == 1
    gene_ids_out[:, 1:], expression_out[:, 1:] = pad_token_id, pad_value
    gene_ids_out[:, 1:][is_gene], expression_out[:, 1:][is_gene] = gene_ids[kept], values[kept]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled kernels: the same, one cell at a time, in memory that fits the cache
# ---------------------------------------------------------------------------------------------------------------------


# Compiling takes seconds, once a machine, and loading what was compiled some tenths: in NumPy so many cells take less.
WARM_UP_CELLS = 5_000
_n_cells_seen = 0


def _kernels_pay(n_cells):
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

_mix_kernel = _compiled(_mix)


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
def _fill_rows(
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
            hashes[i] = _mix_kernel(cell_keys[row] + (np.uint64(row_genes[i]) + ONE) * GOLDEN_GAMMA)

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
def _read_csr(indptr, columns, data, ids):
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
def _find_entries(matrix):
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


__all__ = [
    "Cells",
    "ScMMGPTFeatureExtractor",
    "bin_counts",
    "hash_names",
    "hellinger_profile",
    "mask_genes",
    "normalize_log1p",
]
