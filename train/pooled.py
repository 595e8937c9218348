"""A readout of labels from several datasets, which may measure different genes: [`fit_pooled_readout`].

Differences between laboratories are larger than those between cells of one type. Every label has the same weight, and
within a label every dataset that has it, so that neither a large dataset nor a frequent label decides. A gene that a
dataset does not measure takes the mean over all labels, which is evidence for no label. (The mean of the
cell's own label would be a predictor without noise: the regression then rests on imputed values, see `LOG.md`.) The
weights are those of ridge regression. The readout is solved again for the genes of a file: see `readout_scmmgpt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, diags
from sklearn.linear_model import Ridge
from sklearn.utils.extmath import randomized_svd

from scmmgpt.readout_scmmgpt import PROFILE_SCALE, ScMMGPTLabelReadout
from scmmgpt.train.readout import N_FACTORS, NOISE_FLOOR


N_GENES = 4000  # the most variable ones
PENALTY = 3.0  # of the ridge, in mean variances of a gene
WIDE = 0.5  # a dataset of this share of the most genes that a dataset measures counts as a whole transcriptome
TEMPERATURE = 0.1  # of the ridge's scores, which are about 1 for the right label and 0 for the others


@dataclass(frozen=True)
class Dataset:
    """Labelled cells of one source."""

    counts: csr_matrix  # (n_cells, vocabulary size), linear values of any scale
    measured: np.ndarray  # int64: vocabulary ids of the genes that it measures, ascending
    targets: np.ndarray  # int64 (n_cells,): positions in the list of labels


def expected_shares(datasets: Sequence[Dataset], n_labels: int) -> np.ndarray:
    """Share of a cell's counts that each gene is expected to have, `(vocabulary size,)`; 0 for unmeasured genes.

    The mean over the labels and then over the datasets that measure whole transcriptomes (see `WIDE`).
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


def dense_profiles(data: Dataset, genes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Profiles of a dataset over `genes` on the scale of whole transcriptomes, float32 `(n_cells, n_genes)`."""
    known = data.measured[shares[data.measured] > 0]
    totals = np.asarray(data.counts[:, known].sum(axis=1)).ravel().clip(min=1e-12)
    scaled = diags(shares[known].sum() / totals) @ data.counts[:, genes]
    return (PROFILE_SCALE * np.sqrt(scaled.toarray())).astype(np.float32)


def two_way_means(cells: np.ndarray, known: np.ndarray, n_rounds: int = 10) -> np.ndarray:
    """Means of the labels, freed of the datasets' own levels: `(n_labels, n_genes)`, NaN where nothing is known.

    Args:
        cells: Mean of each label in each dataset, `(n_labels, n_datasets, n_genes)`.
        known: bool, likewise: whether the dataset has the label and measures the gene.
        n_rounds: Turns of least squares for labels and for datasets; a dataset's level is shrunk by one label.
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


def fit_pooled_readout(datasets: Sequence[Dataset], n_labels: int, *, penalty: float = PENALTY) -> ScMMGPTLabelReadout:
    """Ridge regression of the labels on the cells of all datasets, with what it is solved from for other genes.

    Raises:
        ValueError: If a label has no cell.
    """
    missing = sorted(set(range(n_labels)) - set(np.concatenate([data.targets for data in datasets]).tolist()))
    if missing:
        raise ValueError(f"{len(missing)} of {n_labels} labels have no cell: {missing[:5]}; leave them out.")
    shares = expected_shares(datasets, n_labels)
    candidates = np.flatnonzero(shares)
    genes = candidates[variable_genes(datasets, candidates, shares)]
    profiles = [dense_profiles(data, genes, shares) for data in datasets]
    measured = np.stack([np.isin(genes, data.measured) for data in datasets])
    present = np.stack([np.bincount(data.targets, minlength=n_labels) > 0 for data in datasets], axis=1)

    means = np.stack([label_means(x, d.targets, n_labels) for x, d in zip(profiles, datasets, strict=True)], axis=1)
    centroids = two_way_means(means, present[:, :, None] & measured[None])
    mean = np.nanmean(centroids, axis=0)
    centroids = np.where(np.isnan(centroids), mean, centroids)

    rows, targets, weights = [], [], []
    for number, (data, x) in enumerate(zip(datasets, profiles, strict=True)):
        x[:, ~measured[number]] = mean[~measured[number]]
        n_cells = np.bincount(data.targets, minlength=n_labels)[data.targets]
        weights.append(1 / (n_labels * present.sum(axis=1)[data.targets] * n_cells))
        rows.append((x - mean) * np.sqrt(weights[-1])[:, None])
        targets.append(data.targets)
    matrix, target = np.concatenate(rows).astype(np.float32), np.concatenate(targets)
    root = np.sqrt(np.concatenate(weights))[:, None]
    variance = (matrix**2).sum(axis=0)
    ridge = Ridge(alpha=penalty * float(variance.mean()), fit_intercept=False, solver="cholesky")
    ridge.fit(matrix, ((np.eye(n_labels)[target] - 1 / n_labels) * root).astype(np.float32))
    _, scales, axes = randomized_svd(matrix, min(N_FACTORS, *matrix.shape), random_state=0)
    factors = scales[:, None] * axes
    rest = (variance - (factors**2).sum(axis=0)).clip(min=0)
    coefficients = np.atleast_2d(ridge.coef_)
    return ScMMGPTLabelReadout.from_statistics(
        gene_ids=genes,
        weights=coefficients,
        bias=1 / n_labels - coefficients @ mean,
        centroids=centroids,
        factors=factors,
        mean=mean,
        noise=rest + NOISE_FLOOR * variance.mean(),
        shares=shares[genes],
        temperature=np.array(TEMPERATURE),
    )


def variable_genes(datasets: Sequence[Dataset], candidates: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Positions in `candidates` of the `N_GENES` of highest mean variance over the datasets that measure them."""
    total, seen = np.zeros(len(candidates)), np.zeros(len(candidates))
    for data in datasets:
        here = np.flatnonzero(np.isin(candidates, data.measured))
        total[here] += dense_profiles(data, candidates[here], shares).var(axis=0)
        seen[here] += 1
    variance = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    return np.sort(np.argsort(-variance, kind="stable")[:N_GENES])
