"""Fit a label readout to several datasets, which may measure different genes: [`fit_pooled_readout`].

- A group is one label in one dataset. Datasets differ more than cells of one type do, so every label has the same
  weight, and within a label every dataset. A large dataset or a frequent label then has no larger weight.
- The readout stores the mean of each group, and the variance within groups as a few factors plus noise. No cell is
  stored. In a group whose dataset does not measure a gene, the gene has the mean over labels, which favours no label.
- `regression_scmmgpt.solve_groups` solves the ridge regression of the labels from these statistics, for the genes
  of a file.

`LOG.md` has the choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, diags
from sklearn.utils.extmath import randomized_svd

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.novelty_scmmgpt import HELD_OUT_QUANTILE, MIN_MEASURED, MIN_UNIT, _pack, absent_genes, novelty_of
from scmmgpt.readout_scmmgpt import PROFILE_SCALE, ScMMGPTLabelReadout
from scmmgpt.regression_scmmgpt import solve_groups


N_GENES = 12_000  # most genes of the readout, by variance; many, because a panel may have any of them
N_FACTORS = 32
PENALTY = 0.3  # ridge penalty, relative to the mean variance of a gene
WIDE = 0.5  # a dataset with this share of the genes of the widest dataset counts as a whole transcriptome
MIN_DATASETS = 2  # a gene can be absent from all known types only if this number of datasets measures it
TEMPERATURE = 0.1  # of the ridge scores, which are about 1 for the right label and 0 for other labels


@dataclass(frozen=True)
class Dataset:
    """Labelled cells of one source."""

    counts: csr_matrix  # (n_cells, vocabulary size), linear values of any scale
    measured: np.ndarray  # int64: vocabulary ids of the measured genes, ascending
    targets: np.ndarray  # int64 (n_cells,): positions in the list of labels


def expected_shares(datasets: Sequence[Dataset], n_labels: int) -> np.ndarray:
    """Expected share of each gene in a cell's counts, float64 `(vocabulary size,)`; 0 for unmeasured genes.

    The shares are averaged over the labels of a dataset, then over the datasets of whole transcriptomes (see `WIDE`).
    """
    widest = max(len(data.measured) for data in datasets)
    total, seen = np.zeros((2, datasets[0].counts.shape[1]))
    for data in datasets:
        if len(data.measured) < WIDE * widest:
            continue
        shares = diags(1 / np.asarray(data.counts.sum(axis=1)).ravel().clip(min=1e-12)) @ data.counts
        total += label_means(shares, data.targets, n_labels)[np.unique(data.targets)].mean(axis=0)
        seen[data.measured] += 1
    shares = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    return shares / shares.sum()


def label_means(rows: csr_matrix | np.ndarray, targets: np.ndarray, n_labels: int) -> np.ndarray:
    """Mean of the rows of each label, `(n_labels, n_columns)`; 0 for labels without a row."""
    weights = 1 / np.bincount(targets, minlength=n_labels)[targets]
    average = csr_matrix((weights, (targets, np.arange(len(targets)))), shape=(n_labels, len(targets))) @ rows
    return average.toarray() if hasattr(average, "toarray") else np.asarray(average)


def dense_expression(data: Dataset, genes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """CP10k of a dataset over `genes` on the scale of whole transcriptomes, float32 `(n_cells, n_genes)`."""
    known = data.measured[shares[data.measured] > 0]
    totals = np.asarray(data.counts[:, known].sum(axis=1)).ravel().clip(min=1e-12)
    scaled = diags(PROFILE_SCALE**2 * shares[known].sum() / totals) @ data.counts[:, genes]
    return scaled.toarray().astype(np.float32)


def two_way_means(cells: np.ndarray, known: np.ndarray, n_rounds: int = 10) -> np.ndarray:
    """Fit a two-way additive model, mean = label effect + dataset effect, and return the label effects.

    Alternating least squares shrink the effect of a dataset as if one more label had effect 0.

    Args:
        cells: Mean of each label in each dataset, `(n_labels, n_datasets, n_genes)`.
        known: bool, same shape: whether the dataset has the label and measures the gene.

    Returns:
        float64 `(n_labels, n_genes)`; NaN for a gene that no dataset with the label measures.
    """
    n_known = known.sum(axis=1)
    levels = np.zeros(cells.shape[1:])
    labels = np.zeros((len(cells), cells.shape[2]))
    for _ in range(n_rounds):
        sums = np.where(known, cells - levels, 0).sum(axis=1)
        labels = np.divide(sums, n_known, out=np.full(sums.shape, np.nan), where=n_known > 0)
        centred = np.where(known, cells - np.nan_to_num(labels)[:, None], 0)
        levels = centred.sum(axis=0) / (known.sum(axis=0) + 1)
    return labels


def fit_pooled_readout(
    datasets: Sequence[Dataset], n_labels: int, *, meanings: np.ndarray | None = None
) -> ScMMGPTLabelReadout:
    """Fit a ridge regression of the labels to the cells of all datasets, stored as statistics of groups.

    The statistics let the regression be solved for any subset of the genes.

    Args:
        meanings: Shares of the labels in each target, `(n_targets, n_labels + n_others)`, rows of sum 1. A cell of a
            broad target ("T cell") is divided among the narrow labels. The last columns are classes of other cells,
            which are not labels. Default: each target is a label.
    """
    meanings = np.eye(n_labels) if meanings is None else meanings
    n_targets = len(meanings)
    present = np.stack([np.bincount(data.targets, minlength=n_targets) > 0 for data in datasets])
    of_dataset, of_target = np.nonzero(present)  # dataset and target of each group
    mentions = meanings[of_target]
    missing = np.flatnonzero(mentions.sum(axis=0) == 0).tolist()
    if missing:
        n_all = meanings.shape[1]
        raise ValueError(f"{len(missing)} of {n_all} labels have no cell: {missing[:5]}; leave them out.")
    mentions = mentions / mentions.sum(axis=0) / meanings.shape[1]  # a label's weight, divided among its groups
    weights = mentions.sum(axis=1)
    shares = expected_shares(datasets, n_targets)
    genes = variable_genes(datasets, np.flatnonzero(shares), shares)
    measured = np.stack([np.isin(genes, data.measured) for data in datasets])[of_dataset]

    groups, roots = np.zeros((2, len(weights), len(genes)), dtype=np.float32)
    rows = []
    for number, data in enumerate(datasets):
        counts = dense_expression(data, genes, shares)
        logs = np.log1p(counts)
        for group in np.flatnonzero(of_dataset == number):
            cells = np.flatnonzero(data.targets == of_target[group])
            groups[group], roots[group] = logs[cells].mean(axis=0), np.sqrt(counts[cells]).mean(axis=0)
            rows.append((logs[cells] - groups[group]) * np.float32(np.sqrt(weights[group] / len(cells))))
    within = np.concatenate(rows)
    variance = (within**2).sum(axis=0)
    _, scales, axes = randomized_svd(within, min(N_FACTORS, *within.shape), random_state=0)
    factors = scales[:, None] * axes
    noise = (variance - (factors**2).sum(axis=0)).clip(min=0)
    of_labels = mentions[:, :n_labels]
    centroids = two_way_means(*spread_out(roots, measured, of_labels, of_dataset))
    typical = np.nanmean(centroids, axis=0)
    mean = np.nanmean(two_way_means(*spread_out(groups, measured, of_labels, of_dataset)), axis=0)
    groups = np.where(measured, groups, mean)
    variance += weights @ (groups - mean) ** 2
    arrays = {
        "gene_ids": genes,
        "centroids": np.where(np.isnan(centroids), typical, centroids),
        "mean": typical,
        "factors": factors,
        "noise": noise + PENALTY * variance.mean(),
        "shares": shares[genes],
        "temperature": np.array(TEMPERATURE),
        "groups": groups,
        "group_mean": mean,
        "group_labels": mentions / weights[:, None],
        "group_weights": weights,
    }
    weights, bias = solve_groups(arrays, np.ones(len(genes), bool))
    arrays["weights"], arrays["bias"] = weights[:n_labels], bias[:n_labels]
    return ScMMGPTLabelReadout.from_statistics(**arrays)


def spread_out(
    means: np.ndarray, measured: np.ndarray, mentions: np.ndarray, of_dataset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Turn means of groups into means of labels in datasets, float64 `(n_labels, n_datasets, n_genes)`.

    Return also whether the dataset has the label and measures the gene, bool of the same shape.
    """
    n_datasets = of_dataset.max() + 1
    of_label = np.zeros((mentions.shape[1], n_datasets, len(mentions)))
    for number in range(n_datasets):
        of_label[:, number, of_dataset == number] = mentions[of_dataset == number].T
    totals = of_label.sum(axis=2, keepdims=True)
    of_label = np.divide(of_label, totals, out=np.zeros_like(of_label), where=totals > 0)
    has_gene = np.stack([measured[of_dataset == number].any(axis=0) for number in range(n_datasets)])
    return of_label @ means, (totals > 0) & has_gene


def variable_genes(
    datasets: Sequence[Dataset], candidates: np.ndarray, shares: np.ndarray, n_genes: int = N_GENES
) -> np.ndarray:
    """Choose the ids of the `n_genes` candidates with the highest variance of log1p(CP10k), averaged over datasets.

    Only datasets that measure a gene count for its average. The ids are ascending.
    """
    total, seen = np.zeros((2, len(candidates)))
    for data in datasets:
        here = np.flatnonzero(np.isin(candidates, data.measured))
        total[here] += np.log1p(dense_expression(data, candidates[here], shares)).var(axis=0)
        seen[here] += 1
    variance = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    return np.sort(candidates[np.argsort(-variance, kind="stable")[:n_genes]])


def fit_pooled_novelty(datasets: Sequence[Dataset], n_genes: int) -> dict[str, Any] | None:
    """Fit the novelty score (see `novelty_scmmgpt.fit_novelty`) to several datasets; None for fewer than two.

    - A gene is absent if `MIN_DATASETS` datasets measure the gene and no type in any of them expresses it.
    - The unit of the score comes from held-out datasets: cells of each dataset whose types occur in other datasets,
      with the genes that are absent from the other datasets.
    - Panels with too few genes for a novelty score (`novelty_scmmgpt.MIN_MEASURED`) do not contribute to the unit.
    """
    cells = [Cells.from_csr(data.counts, np.arange(n_genes)) for data in datasets]
    measured = np.stack([np.isin(np.arange(n_genes), data.measured) for data in datasets])
    silent = np.stack([absent_genes(own, d.targets, n_genes) for own, d in zip(cells, datasets, strict=True)])
    silent |= ~measured
    absent = np.asarray(silent.all(axis=0) & (measured.sum(axis=0) >= MIN_DATASETS))
    expressed = np.asarray(measured.any(axis=0) & ~silent.all(axis=0))
    shares = []
    for number, data in enumerate(datasets):
        if expressed[data.measured].sum() < MIN_MEASURED * expressed.sum():
            continue
        others = np.arange(len(datasets)) != number
        if not others.any():
            return None
        known = np.concatenate([other.targets for i, other in enumerate(datasets) if i != number])
        rows = np.flatnonzero(np.isin(data.targets, known))
        if len(rows):
            of_others = silent[others].all(axis=0) & (measured[others].sum(axis=0) >= min(MIN_DATASETS, others.sum()))
            shares.append(novelty_of(cells[number][rows], of_others))
    if not shares or not absent.any():
        return None
    unit = max(float(np.quantile(np.concatenate(shares), HELD_OUT_QUANTILE)), MIN_UNIT)
    return {"absent_genes": _pack(absent), "expressed_genes": _pack(expressed), "unit": round(unit, 6)}
