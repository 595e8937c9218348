"""Counts in, model inputs out: `Cells`, a ragged batch of cells, and `ScMMGPTFeatureExtractor`, which tokenises it.

A cell is the set of genes that it expresses, as ids of the gene vocabulary with their counts. The extractor bins,
selects, orders and pads them. All randomness is a hash of (seed, epoch, cell id, gene id): the same cell gives the
same tokens in any order, batch, chunk, worker or process, and another `epoch` gives another draw.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin


VALUE_MODES = ("binned", "log1p", "raw")
SELECTIONS = ("random", "top")

# SplitMix64 (Steele, Lea and Flood 2014): the counter's increment and the two multipliers of its finaliser.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
# Draws for different purposes come from different streams, so that a mask does not follow the selection.
TOKEN_STREAM, MASK_STREAM, RATIO_STREAM, NAME_STREAM = range(4)
LOW_32 = np.uint64(0xFFFFFFFF)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    return state ^ (state >> np.uint64(31))


def _cell_keys(cell_ids: np.ndarray, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """One 64-bit key a cell, `uint64 (n_cells,)`: where this cell's own random sequence starts."""
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key + GOLDEN_GAMMA + np.uint64(part % 2**64))
    return _mix(cell_ids.astype(np.uint64) ^ key)


def _gene_hashes(keys: np.ndarray, gene_ids: np.ndarray) -> np.ndarray:
    """The gene's element of its cell's random sequence: `keys` and `gene_ids` broadcast against each other."""
    return _mix(keys + (gene_ids.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA)


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
    if names.dtype.itemsize:
        characters = np.ascontiguousarray(names).view(np.uint32).reshape(len(names), -1)
        for column in characters.T:  # over the width of the longest name, all cells at once; NumPy pads with zeros
            state = np.where(column > 0, _mix(state + column * GOLDEN_GAMMA), state)
    return state


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
        for name, kinds in (("gene_ids", "iu"), ("counts", "iuf"), ("cell_ids", "u")):
            dtype = getattr(self, name).dtype
            if dtype.kind not in kinds:
                raise TypeError(
                    f"`{name}` has dtype {dtype}; Cells expects {'integers' if kinds != 'iuf' else 'numbers'}."
                )
        n_cells = len(self.indptr) - 1
        if n_cells < 0 or self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any():
            raise ValueError("`indptr` must start at 0 and never fall: entry i is where cell i starts.")
        for name, expected in (
            ("gene_ids", self.indptr[-1]),
            ("counts", self.indptr[-1]),
            ("cell_ids", n_cells),
            ("total_counts", n_cells),
        ):
            array = getattr(self, name)
            if array is not None and array.shape != (expected,):
                raise ValueError(f"`{name}` has shape {array.shape}, but `indptr` asks for ({expected},).")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, index) -> "Cells":
        """The cells at a slice, an array of positions or a boolean mask; a single position gives a batch of one."""
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Cell {index} of {len(self)}.")
            index = np.array([index])
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            stop = max(start, stop)
            entries = slice(self.indptr[start], self.indptr[stop])
            indptr = self.indptr[start : stop + 1] - self.indptr[start]
            rows = slice(start, stop)
        else:
            rows = np.arange(len(self))[index]
            lengths = np.diff(self.indptr)[rows]
            indptr = np.concatenate([[0], np.cumsum(lengths)])
            entries = np.repeat(self.indptr[rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        total_counts = None if self.total_counts is None else self.total_counts[rows]
        return Cells(indptr, self.gene_ids[entries], self.counts[entries], self.cell_ids[rows], total_counts)

    def library_sizes(self) -> np.ndarray:
        """`float32 (n_cells,)`: `total_counts`, or the sum of `counts` where the source did not say."""
        if self.total_counts is not None:
            return self.total_counts
        return np.bincount(self._rows(), weights=self.counts, minlength=len(self)).astype(np.float32)

    def _rows(self) -> np.ndarray:
        """The cell of every entry, `int64 (nnz,)`."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

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
            matrix: A CSR matrix `(n_cells, n_vars)` with `indptr`, `indices`, `data` and `shape`, as
                `scipy.sparse.csr_matrix`. Entries that are zero are dropped.
            vocabulary_ids: Integer `(n_vars,)`: the gene id of each column, -1 for a column to leave out. Columns with
                the same id are summed.
            cell_ids: `uint64 (n_cells,)`, best `hash_names(adata.obs_names)`. By default the row numbers, under which
                a cell's random draws depend on the chunk that it is read in.

        Returns:
            `Cells` whose `total_counts` are the sums over all columns, those left out included.
        """
        n_cells, n_vars = matrix.shape
        vocabulary_ids = np.asarray(vocabulary_ids)
        if vocabulary_ids.shape != (n_vars,):
            raise ValueError(
                f"`vocabulary_ids` has shape {vocabulary_ids.shape}, but the matrix has {n_vars} columns. "
                "Pass one id a column, -1 for a column to leave out."
            )
        rows = np.repeat(np.arange(n_cells), np.diff(matrix.indptr))
        data = np.asarray(matrix.data)
        if data.dtype.kind == "b":
            data = data.astype(np.uint16)
        wrong = ~(data >= 0) | ~np.isfinite(data)
        if wrong.any():
            first = np.flatnonzero(wrong)[0]
            raise ValueError(
                f"Expected counts, but found {data[first]} in row {rows[first]}, column {matrix.indices[first]}. "
                "Pass raw counts: negative, infinite and missing values are none."
            )
        total_counts = np.bincount(rows, weights=data, minlength=n_cells).astype(np.float32)
        gene_ids = vocabulary_ids[matrix.indices]
        kept = (gene_ids >= 0) & (data > 0)
        rows, gene_ids, data = rows[kept], gene_ids[kept], data[kept]
        order = np.lexsort((gene_ids, rows))
        rows, gene_ids, data = rows[order], gene_ids[order], data[order]
        first_of_gene = np.ones(len(rows), dtype=bool)
        first_of_gene[1:] = (rows[1:] != rows[:-1]) | (gene_ids[1:] != gene_ids[:-1])
        if not first_of_gene.all():
            dtype = data.dtype if data.dtype.kind == "f" else np.int64
            data = np.bincount(np.cumsum(first_of_gene) - 1, weights=data).astype(dtype)
            rows, gene_ids = rows[first_of_gene], gene_ids[first_of_gene]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_cells))])
        if cell_ids is None:
            cell_ids = np.arange(n_cells, dtype=np.uint64)
        return cls(indptr, gene_ids, data, cell_ids, total_counts)


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


def _edge_counts(cells: Cells, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """For every entry, how many of its cell's quantile edges are below it, and how many are below or equal.

    The `n_bins - 1` edges of a cell are `np.quantile(counts, np.linspace(0, 1, n_bins - 1))` to the last bit.

    Returns:
        `lower` and `upper`, both `int64 (nnz,)`.
    """
    rows, starts, lengths = cells._rows(), cells.indptr[:-1], np.diff(cells.indptr)
    order = np.lexsort((cells.counts, rows))
    ranked = cells.counts[order]  # ascending within each cell; a cell keeps its own range of positions

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
    return bounds[0], bounds[1]


def bin_counts(cells: Cells, n_bins: int = 51, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """scGPT's value binning: each cell's non-zero counts cut at their own quantiles.

    The edges are the quantiles of the cell's counts at `n_bins - 1` equally spaced levels. A count above `b` edges
    and not below `a` gets bin `ceil(a + u * (b - a))`, with `u` uniform in [0, 1): a count that equals several edges
    is spread evenly over their bins. `u` is the low half of the gene's hash, so it is the same in every batch.

    Args:
        cells: Raw counts. Any increasing transform of a cell's counts gives the same bins.
        n_bins: Bins including bin 0, which means "not expressed" and is never returned.
        seed: Seed of the experiment.
        epoch: Pass over the data; each draws anew.

    Returns:
        `int64 (nnz,)` in `1 .. n_bins - 1`, aligned with `cells.counts`.
    """
    if n_bins < 2:
        raise ValueError(f"n_bins is {n_bins}; bin 0 is for genes that are not expressed, so at least 2 are needed.")
    lower, upper = _edge_counts(cells, n_bins)
    hashes = _gene_hashes(
        _cell_keys(cells.cell_ids, seed=seed, epoch=epoch, stream=TOKEN_STREAM)[cells._rows()], cells.gene_ids
    )
    return upper - (((hashes & LOW_32) * (upper - lower).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def mask_genes(gene_ids, cell_attention_mask, cell_ids, mask_ratio=0.4, *, seed: int = 0, epoch: int = 0):
    """Chooses the genes to hide in the pre-training objectives: an exact share of each cell, by hash.

    Args:
        gene_ids: `(n_cells, n_tokens)`, array or tensor, with `<cls>` first, as the extractor returns.
        cell_attention_mask: `(n_cells, n_tokens)`, 1 where there is a gene.
        cell_ids: `uint64 (n_cells,)`, as `Cells.cell_ids`.
        mask_ratio: Share of a cell's genes to hide, rounded down, but at least one gene; or several shares, of which
            each cell draws one (scGPT was pre-trained with 0.25, 0.5 and 0.75).
        seed, epoch: As in [`bin_counts`]; the draw is independent of the extractor's own.

    Returns:
        Boolean `(n_cells, n_tokens)`, of the kind of `gene_ids`, True where a gene is hidden. `<cls>` and padding never are.
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
    keys = _cell_keys(cell_ids, seed=seed, epoch=epoch, stream=MASK_STREAM)
    hashes = np.where(attended, _gene_hashes(keys[:, None], genes), np.iinfo(np.uint64).max)
    # Genes differ within a cell and SplitMix64 is a bijection, so hashes do not tie.
    threshold = np.take_along_axis(np.sort(hashes, axis=1), np.maximum(n_hidden - 1, 0)[:, None], axis=1)
    hidden = attended & (hashes <= threshold) & (n_hidden > 0)[:, None]
    return torch.from_numpy(hidden).to(gene_ids.device) if isinstance(gene_ids, torch.Tensor) else hidden


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
        pad_token_id, cls_token_id (`int`): Ids of `<pad>` and `<cls>` in the gene vocabulary.
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
        if value_mode not in VALUE_MODES:
            raise ValueError(f"value_mode is {value_mode!r}; choose one of {VALUE_MODES}.")
        if n_bins < 2:
            raise ValueError(
                f"n_bins is {n_bins}; bin 0 is for genes that are not expressed, so at least 2 are needed."
            )
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
            max_genes, selection: In place of the extractor's own, for this call.
            padding: `True` pads to the longest cell of the batch, `"max_length"` to `max_genes`.

        Returns:
            `gene_ids` (`int64`), `expression` (`float32`) and `cell_attention_mask` (`int64`, 1 = attend), all
            `(n_cells, n_tokens)`: `<cls>`, then the genes in ascending order of id, then `<pad>`.
        """
        max_genes = self.max_genes if max_genes is None else max_genes
        selection = self.selection if selection is None else selection
        self._check_selection(max_genes, selection)
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; choose True (to the longest cell) or 'max_length'.")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors is {return_tensors!r}; choose 'pt' or 'np'.")
        lengths = np.diff(cells.indptr)
        kept_lengths = np.minimum(lengths, max_genes - 1)
        n_tokens = max_genes if padding == "max_length" else 1 + int(kept_lengths.max(initial=0))

        values = self._values(cells, epoch)
        kept = self._select(cells, max_genes - 1, selection, epoch)
        attended = np.arange(n_tokens) <= kept_lengths[:, None]
        is_gene = attended.copy()
        is_gene[:, 0] = False
        gene_ids = np.full((len(cells), n_tokens), self.pad_token_id, dtype=np.int64)
        expression = np.full((len(cells), n_tokens), self.pad_value, dtype=np.float32)
        gene_ids[:, 0], expression[:, 0] = self.cls_token_id, self.cls_value
        gene_ids[is_gene], expression[is_gene] = cells.gene_ids[kept], values[kept]
        arrays = {"gene_ids": gene_ids, "expression": expression, "cell_attention_mask": attended.astype(np.int64)}
        if return_tensors == "pt":
            arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return BatchFeature(arrays)

    def _values(self, cells, epoch):
        if self.value_mode == "binned":
            return bin_counts(cells, self.n_bins, seed=self.seed, epoch=epoch)
        return normalize_log1p(cells, self.target_sum) if self.value_mode == "log1p" else cells.counts

    def _select(self, cells, n_kept, selection, epoch):
        """Which entries stay, boolean `(nnz,)`: in cells with more than `n_kept`, the first by count or by hash."""
        lengths = np.diff(cells.indptr)
        kept = np.ones(len(cells.gene_ids), dtype=bool)
        crowded = np.repeat(lengths > n_kept, lengths)
        if crowded.any():
            rows = cells._rows()[crowded]
            keys = _cell_keys(cells.cell_ids, seed=self.seed, epoch=epoch, stream=TOKEN_STREAM)
            hashes = _gene_hashes(keys[rows], cells.gene_ids[crowded]) >> np.uint64(32)
            by = (hashes, rows) if selection == "random" else (hashes, -cells.counts[crowded].astype(np.float64), rows)
            order = np.lexsort(by)
            new_cell = np.ones(len(rows), dtype=bool)
            new_cell[1:] = rows[1:] != rows[:-1]
            start = np.flatnonzero(new_cell)[np.cumsum(new_cell) - 1]
            chosen = np.empty(len(rows), dtype=bool)
            chosen[order] = np.arange(len(rows)) - start < n_kept
            kept[crowded] = chosen
        return kept


ScMMGPTFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["Cells", "ScMMGPTFeatureExtractor", "bin_counts", "hash_names", "mask_genes", "normalize_log1p"]
