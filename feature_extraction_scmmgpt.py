"""Counts in, model inputs out: `Cells`, a ragged batch of cells, and `ScMMGPTFeatureExtractor`, which tokenises it.

The extractor bins, selects and pads the expressed genes of a cell. All randomness is a hash of (seed, epoch, cell id,
gene id): a cell gives the same tokens in any order, batch, chunk, worker or process, and other draws in another epoch.
Compiled kernels and NumPy give the same bits; see `kernels_scmmgpt`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .cells_scmmgpt import (
    COUNTS_PER_10K,
    Cells,
    RandomStream,
    cell_keys,
    cells_of,
    gene_hashes,
    hellinger_profile,
    normalize_log1p,
)
from .kernels_scmmgpt import BITS_32, LAST_HASH, LOW_32, REPEATED, ZERO, fill_rows, kernels_pay


VALUE_MODES = ("binned", "log1p", "raw")
SELECTIONS = ("random", "top")
LARGEST_WHOLE = 2**24  # float32 holds every whole number up to here; larger counts are left to NumPy


def _draw_bins(indptr: np.ndarray, counts: np.ndarray, hashes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Bin each cell's counts by their quantiles, as scGPT does: `int64 (nnz,)`, from 1 to the number of levels.

    The edges are the quantiles of the cell's counts at the levels, of which a count has `upper` at or below it and
    `lower` below it. Its bin is `ceil(upper + u * (lower - upper))`, with `u` uniform in [0, 1), the low half of the
    gene's hash: counts that equal several edges spread evenly over the bins of these edges. Any increasing transform
    of a cell's counts gives the same bins. Bin 0 means "not expressed".
    """
    lower, upper = np.empty((2, len(counts)), dtype=np.int64)
    for start, stop in itertools.pairwise(indptr):
        if stop > start:
            edges = np.quantile(counts[start:stop], levels)
            lower[start:stop] = np.searchsorted(edges, counts[start:stop], side="left")
            upper[start:stop] = np.searchsorted(edges, counts[start:stop], side="right")
    # ceil(upper + u * (lower - upper)) = upper - floor(u * (upper - lower)), exactly, with u in units of 2^-32
    return upper - (((hashes & LOW_32) * (upper - lower).astype(np.uint64)) >> BITS_32).astype(np.int64)


def mask_genes(
    gene_ids: np.ndarray | torch.Tensor,
    cell_attention_mask: np.ndarray | torch.Tensor,
    cell_ids: np.ndarray,
    mask_ratio: float | Sequence[float] = 0.4,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray | torch.Tensor:
    """Draw the genes to hide in the pre-training objectives: an exact share of each cell, by hash.

    Args:
        gene_ids: `(n_cells, n_tokens)`, array or tensor, with `<cls>` first, as the extractor returns.
        cell_attention_mask: `(n_cells, n_tokens)`, 1 where there is a gene.
        cell_ids: `uint64 (n_cells,)`, as `Cells.cell_ids`.
        mask_ratio: Share of a cell's genes to hide, rounded down, but at least one gene; or several shares, of which
            each cell draws one (scGPT was pre-trained with 0.25, 0.5 and 0.75).
        seed, epoch: Other values give other draws, which are independent of the extractor's.

    Returns:
        Boolean `(n_cells, n_tokens)`, array or tensor as `gene_ids`: True at hidden genes, not at `<cls>` or padding.
    """
    genes, attended = np.asarray(gene_ids), np.asarray(cell_attention_mask).astype(bool)
    cell_ids = np.asarray(cell_ids)
    ratios = np.atleast_1d(np.asarray(mask_ratio, dtype=np.float64))
    if not ((ratios > 0) & (ratios <= 1)).all():
        raise ValueError(f"mask_ratio is {mask_ratio}; a share of a cell's genes must be above 0 and at most 1.")
    attended[:, :1] = False
    draws = cell_keys(cell_ids, seed=seed, epoch=epoch, stream=RandomStream.RATIO) % np.uint64(len(ratios))
    n_genes = attended.sum(axis=1)
    n_hidden = np.maximum(np.floor(ratios[draws.astype(np.int64)] * n_genes).astype(np.int64), np.minimum(n_genes, 1))
    keys_of_cells = cell_keys(cell_ids, seed=seed, epoch=epoch, stream=RandomStream.MASK)
    hashes = np.where(attended, gene_hashes(keys_of_cells[:, None], genes), LAST_HASH)
    threshold = np.take_along_axis(np.sort(hashes, axis=1), np.maximum(n_hidden - 1, 0)[:, None], axis=1)
    hidden = attended & (hashes <= threshold)
    return torch.from_numpy(hidden).to(gene_ids.device) if isinstance(gene_ids, torch.Tensor) else hidden


# -- feature extractor ------------------------------------------------------------------------------------------------


class ScMMGPTFeatureExtractor(FeatureExtractionMixin):
    """Convert [`Cells`] to the inputs of [`ScGPTModel`]: `<cls>` and up to `max_genes - 1` genes a cell.

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
        max_genes: int = 1200,
        n_bins: int = 51,
        value_mode: str = "binned",
        selection: str = "random",
        target_sum: float = COUNTS_PER_10K,
        cls_value: float = -2.0,
        pad_value: float = -2.0,
        seed: int = 0,
        pad_token_id: int = 0,
        cls_token_id: int = 1,
        return_profile: bool = False,
        **kwargs: Any,
    ) -> None:
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
        if n_bins < 2:
            raise ValueError(f"n_bins is {n_bins}; it must be at least 2: bin 0 is for genes that are not expressed.")
        self._check_selection(max_genes, selection)

    @staticmethod
    def _check_selection(max_genes: int, selection: str) -> None:
        if max_genes < 2:
            raise ValueError(f"max_genes is {max_genes}; it must be at least 2, for `<cls>` and one gene.")
        if selection not in SELECTIONS:
            raise ValueError(f"selection is {selection!r}; choose one of {SELECTIONS}.")

    def __call__(
        self,
        cells: Any,
        *,
        epoch: int = 0,
        return_tensors: str | None = "pt",
        max_genes: int | None = None,
        selection: str | None = None,
        padding: bool | str = True,
    ) -> BatchFeature:
        """Tokenise a batch of cells.

        Args:
            cells: [`Cells`], raw counts with their gene ids, or rows; see [`cells_of`].
            epoch: Pass over the data; each pass has other draws. Keep 0 for evaluation.
            return_tensors: `"pt"` or `"np"`.
            max_genes, selection: Values for this call, instead of the extractor's own.
            padding: `True` pads to the longest cell of the batch, `"max_length"` to `max_genes`.

        Returns:
            `gene_ids` (`int64`), `expression` (`float32`) and `cell_attention_mask` (`int64`, 1 = attend), all
            `(n_cells, n_tokens)`: `<cls>`, then the genes in the order of the cell, then `<pad>`. With
            `return_profile` also `profile_gene_ids` (`int64`) and `profile` (`float32`), both `(n_cells, longest)`:
            all expressed genes whatever `max_genes` is, and their [`hellinger_profile`], 0 at `<pad>`.
        """
        cells = cells_of(cells)
        max_genes = self.max_genes if max_genes is None else max_genes
        selection = self.selection if selection is None else selection
        self._check_selection(max_genes, selection)
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; choose True (to the longest cell) or 'max_length'.")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors is {return_tensors!r}; choose 'pt' or 'np'.")

        _check_counts(cells.counts)
        longest = int(np.diff(cells.indptr).max(initial=0))
        n_tokens = max_genes if padding == "max_length" else min(max_genes, 1 + longest)
        shape = (len(cells), n_tokens)
        gene_ids, attended = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        expression = np.empty(shape, dtype=np.float32)
        gene_ids[:, 0], expression[:, 0] = self.cls_token_id, self.cls_value
        is_float = cells.counts.dtype.kind == "f" or cells.counts.max(initial=0) <= LARGEST_WHOLE
        fill = fill_rows if kernels_pay(len(cells)) and is_float else _fill_rows_numpy
        fill(
            cells.indptr,
            cells.gene_ids.astype(np.int32, copy=False),
            cells.counts.astype(np.float32, copy=False) if is_float else cells.counts,
            self._values(cells),
            np.linspace(0, 1, self.n_bins - 1 if self.value_mode == "binned" else 0),
            cell_keys(cells.cell_ids, seed=self.seed, epoch=epoch, stream=RandomStream.TOKEN),
            max_genes - 1,
            selection == "top",
            self.pad_token_id,
            np.float32(self.pad_value),
            gene_ids,
            expression,
            attended,
        )
        arrays: dict[str, np.ndarray] = {"gene_ids": gene_ids, "expression": expression}
        arrays["cell_attention_mask"] = attended
        if self.return_profile:
            lengths = np.diff(cells.indptr)
            is_gene = np.arange(longest) < lengths[:, None]
            arrays["profile_gene_ids"] = np.full(is_gene.shape, self.pad_token_id, dtype=np.int64)
            arrays["profile_gene_ids"][is_gene] = cells.gene_ids
            arrays["profile"] = np.zeros(is_gene.shape, dtype=np.float32)
            arrays["profile"][is_gene] = hellinger_profile(cells)
        if return_tensors == "pt":
            return BatchFeature({name: torch.from_numpy(array) for name, array in arrays.items()})
        return BatchFeature(arrays)

    def _values(self, cells: Cells) -> np.ndarray:
        """`float32 (nnz,)`, or nothing where the counts are binned."""
        if self.value_mode == "log1p":
            return normalize_log1p(cells, self.target_sum)
        return cells.counts.astype(np.float32, copy=False) if self.value_mode == "raw" else np.empty(0, np.float32)


ScMMGPTFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")


def _check_counts(counts: np.ndarray) -> None:
    if not (counts.min(initial=1) > 0 and np.isfinite(counts.max(initial=1))):
        wrong = counts[~((counts > 0) & np.isfinite(counts))][0]
        raise ValueError(
            f"Cells holds counts above 0 only, but found {wrong}. "
            "Build it with `Cells.from_csr`, which drops zeros and checks the counts."
        )


def _fill_rows_numpy(
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
    """[`fill_rows`] in NumPy."""
    hashes = gene_hashes(np.repeat(cell_keys, np.diff(indptr)), gene_ids)
    if len(levels):
        values = _draw_bins(indptr, counts, hashes, levels)
    for row, (start, stop) in enumerate(itertools.pairwise(indptr)):
        genes, cell_values = gene_ids[start:stop], values[start:stop]
        if len(genes) > n_kept:
            places, cell_counts = hashes[start:stop], counts[start:stop]
            if by_count:  # only counts that tie for the last places keep their hashes
                tied = np.partition(cell_counts, -n_kept)[-n_kept]
                places = np.select([cell_counts > tied, cell_counts == tied], [ZERO, places], LAST_HASH)
            kept = places <= np.partition(places, n_kept - 1)[n_kept - 1]
            if kept.sum() > n_kept:
                raise ValueError(REPEATED)
            genes, cell_values = genes[kept], cell_values[kept]
        end = 1 + len(genes)
        attended_out[row, :end], attended_out[row, end:] = 1, 0
        gene_ids_out[row, 1:end], gene_ids_out[row, end:] = genes, pad_token_id
        expression_out[row, 1:end], expression_out[row, end:] = cell_values, pad_value
