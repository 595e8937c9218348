"""The labels of a file judged by the file itself: a regression that is cross-validated on the given labels.

A cell whose given label is improbable to a regression that was fitted without the cell has probably a wrong label
(confident learning, Northcutt et al. 2021, J. Artif. Intell. Res. 70:1373). The hash of a cell's counts decides its
fold, so that a cell has the same answer in every partition, whether the regression was fitted on it or not, and equal
cells are in one fold. How much the checkpoint counts beside the file is fitted, too: by the likelihood of the given
labels ([`FileRegression.believing`]).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from .cells_scmmgpt import Cells, fingerprints, normalize_log1p
from .kernels_scmmgpt import GOLDEN_GAMMA, mix64
from .regression_scmmgpt import sum_weights


# Chosen on five files of ../shared with planted labels, `train/LOG.md`.
N_FOLDS = 5
N_GENES = 4000  # with the largest variance in the file
N_AXES = 50  # principal axes, as scanpy takes by default
PENALTY = 10.0  # on half of the squared weights, of axes whose values have a standard deviation of 1 over all axes
LEAST_CELLS = 5  # of a label, and `LEAST_TRAINED` outside of a fold: fewer are not judged by the file
LEAST_TRAINED = 3
FILE_SCALES, MODEL_SCALES = (0.3, 0.5, 0.7, 1.0, 1.4), (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
LEAST_LOG = -5.0  # log probability of the checkpoint: one that is sure of a mistake is bounded
LEAST_LIKELIHOOD = -6.0  # of a cell, likewise: labels that are wrong do not decide how much is believed
NAMED_GENES = 10
EXACT = 2.0**20  # sums of `N_AXES` products of factors below 2**4 and 2**3 have 53 bits then, as a double has
ITERATIONS = 100  # of L-BFGS, most
SUBSPACE_STEPS, SPARE_AXES = 6, 10  # of the randomised search for axes (Halko et al. 2011, SIAM Review 53:217)


@dataclass
class FileRegression:
    """Multinomial logistic regressions of the labels of a file, one for each fold.

    Args:
        genes: int64 `(n_genes,)`, ascending ids of the vocabulary.
        axes: float32 `(n_genes, n_axes)`, of log1p(CP10k).
        weights: float32 `(N_FOLDS, n_axes, n_labels)`.
        bias: float32 `(N_FOLDS, n_labels)`; -inf for a label that a fold cannot judge.
        means: float32 `(n_labels, n_genes)`: the mean cell of each label.
        belief: float64 `(2,)`: factors of the log odds of the file and of the checkpoint.
    """

    genes: np.ndarray
    axes: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    means: np.ndarray
    belief: np.ndarray

    @classmethod
    def of(
        cls, cells: Cells, numbers: np.ndarray, n_labels: int, of_all: np.ndarray | None = None
    ) -> "FileRegression | None":
        """Of cells with labels; None if fewer than two labels have enough cells.

        Args:
            cells: Counts.
            numbers: int64 `(n_cells,)`, the label of each; -1 for none.
            n_labels: Of the file.
            of_all: The labels of all cells, where `cells` are drawn by label: labels are as probable as in the file.
        """
        usable = np.bincount(numbers[numbers >= 0], minlength=n_labels) >= LEAST_CELLS
        kept = np.flatnonzero((numbers >= 0) & usable[numbers] & (np.diff(cells.indptr) > 0))
        if usable.sum() < 2 or not len(kept):
            return None
        cells, numbers = cells[kept], numbers[kept]
        # Of cells that are drawn by label, the bias alone differs (Prentice and Pyke 1979, Biometrika 66:403).
        n_drawn, n_all = (
            np.bincount(part[part >= 0], minlength=n_labels).clip(min=1)
            for part in (numbers, numbers if of_all is None else of_all)
        )
        genes, values = _variable_genes(cells)
        axes = _principal_axes(values)
        places = values @ axes
        axes, places = axes / places.std(), places / places.std()
        folds = folds_of(cells)
        weights = np.zeros((N_FOLDS, axes.shape[1], n_labels), dtype=np.float32)
        bias = np.full((N_FOLDS, n_labels), -np.inf, dtype=np.float32)
        for fold in range(N_FOLDS):
            n_of = np.bincount(numbers[folds != fold], minlength=n_labels)
            judged = np.flatnonzero(n_of >= LEAST_TRAINED)
            rows = np.flatnonzero((folds != fold) & np.isin(numbers, judged))
            if len(judged) > 1:
                found = _fit(places[rows], np.searchsorted(judged, numbers[rows]), len(judged))
                weights[fold][:, judged], bias[fold, judged] = found
                bias[fold, judged] += np.log(n_all / n_drawn)[judged]
        means = np.zeros((n_labels, len(genes)), dtype=np.float32)
        for label in np.flatnonzero(usable):
            means[label] = values[numbers == label].mean(axis=0)
        return cls(genes, axes.astype(np.float32), weights, bias, means, np.array([1.0, 0.0]))

    def log_probabilities(self, cells: Cells) -> np.ndarray:
        """Log probabilities of the labels, float64 `(n_cells, n_labels)`, of a regression without the cell.

        -inf for labels that are not judged; NaN for a cell that expresses none of the genes.
        """
        indptr, positions, values = self.profiles(cells)
        places, folds = _exact(sum_weights(indptr, positions, values, self.axes)), folds_of(cells)
        scores = np.empty((len(cells), self.bias.shape[1]))
        for fold in range(N_FOLDS):
            scores[folds == fold] = places[folds == fold] @ _exact(self.weights[fold]) + self.bias[fold]
        best = scores.max(axis=1, keepdims=True)
        scores = scores - np.where(np.isfinite(best), best, 0)
        with np.errstate(divide="ignore"):
            logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        logs[(np.diff(indptr) == 0) | ~np.isfinite(best[:, 0])] = np.nan
        return logs

    def profiles(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log1p(CP10k) of the genes: `indptr`, positions in `genes` and values, ragged as `cells` are."""
        table = np.full(1 + max(self.genes.max(), cells.gene_ids.max(initial=0)), -1, dtype=np.int64)
        table[self.genes] = np.arange(len(self.genes))
        positions = table[cells.gene_ids]
        kept = positions >= 0
        n_of = np.bincount(cells.rows()[kept], minlength=len(cells))
        return np.concatenate([[0], np.cumsum(n_of)]), positions[kept], normalize_log1p(cells)[kept]

    def genes_for(self, cells: Cells, labels: np.ndarray, rivals: np.ndarray) -> list[np.ndarray]:
        """The expressed genes that speak for a label against a rival in each cell, as ids, the strongest first.

        A term is the weight of a gene, the mean over folds, times its value less the point halfway between the mean
        cells of both labels, as in `evidence_scmmgpt`. No gene where a label is -1.
        """
        indptr, positions, values = self.profiles(cells)
        weights_of: dict[tuple[int, int], np.ndarray] = {}
        found = []
        for cell, pair in enumerate(zip(labels.tolist(), rivals.tolist(), strict=True)):
            if pair[0] < 0:
                found.append(np.empty(0, dtype=np.int64))
                continue
            one, other = pair
            if pair not in weights_of:
                of_axes = (self.weights[:, :, one] - self.weights[:, :, other]).mean(axis=0)
                weights_of[pair] = self.axes @ of_axes
            here = slice(indptr[cell], indptr[cell + 1])
            at = positions[here]
            halfway = (self.means[one, at] + self.means[other, at]) / 2
            terms = weights_of[pair][at] * (values[here] - halfway) * (weights_of[pair][at] > 0)
            order = np.argsort(-terms, kind="stable")[:NAMED_GENES]
            found.append(self.genes[at[order[terms[order] > 0]]])
        return found

    def believing(self, logs: np.ndarray, model: np.ndarray, numbers: np.ndarray) -> "FileRegression":
        """The same with the factors under which the given labels are most probable.

        Args:
            logs: `(n_cells, n_labels)`, of [`log_probabilities`].
            model: Likewise, of the checkpoint; NaN for labels that it does not know.
            numbers: int64 `(n_cells,)`: the given labels.
        """
        known = np.flatnonzero(~np.isnan(model).any(axis=0))
        rows = np.isin(numbers, known) & np.isfinite(logs[np.arange(len(logs)), numbers])
        if len(known) < 2 or not rows.any():
            return self
        own = np.searchsorted(known, numbers[rows])
        logs, model = logs[np.ix_(rows, known)], model[np.ix_(rows, known)].clip(min=LEAST_LOG)
        best = -np.inf
        found = self.belief
        for file in FILE_SCALES:
            for checkpoint in MODEL_SCALES:
                scores = file * logs + checkpoint * model
                scores -= scores.max(axis=1, keepdims=True)
                given = scores[np.arange(len(own)), own] - np.log(np.exp(scores).sum(axis=1))
                if (value := given.clip(min=LEAST_LIKELIHOOD).mean()) > best:
                    best, found = value, np.array([file, checkpoint])
        return replace(self, belief=found)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """All as arrays, for a file."""
        return {f"regression_{name}": value for name, value in vars(self).items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "FileRegression | None":
        """From `as_arrays`, among others; None without."""
        if "regression_genes" not in arrays:
            return None
        return cls(**{name: arrays[f"regression_{name}"] for name in cls.__dataclass_fields__})


def _exact(values: np.ndarray) -> np.ndarray:
    """The nearest multiples of 1 / `EXACT`, float64: products are summed exactly, whatever cells are beside a cell."""
    return np.rint(values.astype(np.float64) * EXACT) / EXACT


def folds_of(cells: Cells) -> np.ndarray:
    """The fold of each cell, int64 `(n_cells,)`, by the hash of its counts."""
    return (mix64(fingerprints(cells) + GOLDEN_GAMMA) % np.uint64(N_FOLDS)).astype(np.int64)


def best_other_label(
    logs: np.ndarray, model: np.ndarray, given: np.ndarray, nested: np.ndarray, belief: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best label of the file beside the given one, by file and checkpoint.

    Args:
        logs: `(n_cells, n_labels)`, of [`FileRegression.log_probabilities`].
        model: Likewise, of the checkpoint; NaN where it has none, and only the file decides.
        given: int64 `(n_cells,)`.
        nested: bool `(n_labels, n_labels)`: pairs that are broader and narrower, which do not contradict each other.
        belief: Of [`FileRegression`].

    Returns:
        int64 `(n_cells,)`, -1 where the file does not judge; float64 log odds of both and of the file alone, then NaN.
    """
    every = np.arange(len(given))
    barred = nested[given] | (np.arange(logs.shape[1]) == given[:, None])
    with np.errstate(invalid="ignore"):
        file = logs - logs[every, given][:, None]
        file[barred | ~np.isfinite(file)] = -np.inf
        lead = model.clip(min=LEAST_LOG)
        both = belief[0] * file + belief[1] * np.nan_to_num(lead - lead[every, given][:, None])
    best = both.argmax(axis=1)
    odds, alone = both[every, best], file.max(axis=1)
    judged = np.isfinite(logs[every, given]) & np.isfinite(odds)
    return np.where(judged, best, -1), np.where(judged, odds, np.nan), np.where(judged, alone, np.nan)


def _variable_genes(cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the genes that vary most, ascending, and their log1p(CP10k), float32 `(n_cells, n_genes)`."""
    values, n_cells = normalize_log1p(cells), len(cells)
    mean = np.bincount(cells.gene_ids, weights=values) / n_cells
    variance = np.bincount(cells.gene_ids, weights=values.astype(np.float64) ** 2) / n_cells - mean**2
    genes = np.sort(np.argsort(-variance, kind="stable")[: min(N_GENES, int((mean > 0).sum()))])
    table = np.full(len(mean), -1, dtype=np.int64)
    table[genes] = np.arange(len(genes))
    positions, dense = table[cells.gene_ids], np.zeros((n_cells, len(genes)), dtype=np.float32)
    kept = positions >= 0
    np.add.at(dense, (cells.rows()[kept], positions[kept]), values[kept])
    return genes.astype(np.int64), dense


def _principal_axes(values: np.ndarray) -> np.ndarray:
    """The first right singular vectors of `values` `(n_cells, n_genes)`, float32 `(n_genes, n_axes)`.

    In float64: the last bits of products differ by the number of threads, and subspace iteration enlarges them.
    """
    values = values.astype(np.float64)
    n_axes = max(min(N_AXES, *(size - 1 for size in values.shape)), 1)
    start = np.random.default_rng(0).standard_normal((values.shape[1], min(n_axes + SPARE_AXES, values.shape[1])))
    found = np.linalg.qr(start)[0]
    for _ in range(SUBSPACE_STEPS):
        found = np.linalg.qr(values.T @ (values @ found))[0]
    inner = np.linalg.svd(values @ found, full_matrices=False)[2]
    return (found @ inner.T)[:, :n_axes].astype(np.float32)


def _fit(places: np.ndarray, numbers: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(n_axes, n_labels)` and bias of the multinomial logistic regression with a penalty on the weights.

    The gradient is that of autograd to the last bit, in two arrays of cells x labels that all steps share: autograd
    makes new ones in each, 1.2 GB in all for 600 labels.
    """
    x, y = torch.from_numpy(places.astype(np.float64)), torch.from_numpy(numbers)
    weights, bias = (torch.zeros(shape, dtype=torch.float64) for shape in ((x.shape[1], n_labels), n_labels))
    scores, logs = torch.empty((2, len(x), n_labels), dtype=torch.float64)
    every = torch.arange(len(x))
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=ITERATIONS, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        torch.mm(x, weights, out=scores).add_(bias)
        torch.log_softmax(scores, 1, out=logs)
        value = torch.nn.functional.nll_loss(logs, y, reduction="sum") + PENALTY / 2 * (weights**2).sum()
        scores.zero_()[every, y] = -1
        torch.ops.aten._log_softmax_backward_data.out(scores, logs, 1, torch.float64, out=scores)
        weights.grad = x.T @ scores + PENALTY * weights
        bias.grad = scores.sum(dim=0)
        return value

    with torch.inference_mode(False), torch.no_grad():
        optimizer.step(loss)
    return weights.numpy(), bias.numpy()
