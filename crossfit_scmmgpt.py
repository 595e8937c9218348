"""Check of the labels of a file by the file itself: a regression that is cross-validated on the given labels.

If a regression that was fitted without a cell gives the cell's label a low probability, the label is probably wrong
(confident learning, Northcutt et al. 2021, J. Artif. Intell. Res. 70:1373). The hash of a cell's counts decides its
fold. A cell therefore gets the same result in every partition of the file, and equal cells share a fold. The weights
of file and checkpoint are those that maximise the likelihood of the given labels ([`FileRegression.believing`]).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from .cells_scmmgpt import Cells, fingerprints, normalize_log1p
from .kernels_scmmgpt import GOLDEN_GAMMA, mix64
from .regression_scmmgpt import sum_weights


# These constants were chosen on five development files with planted wrong labels (`train/LOG.md`).
N_FOLDS = 5
N_GENES = 4000  # genes of the largest variance
N_AXES = 50  # principal components, the default of scanpy
PENALTY = 10.0  # ridge penalty on half the squared weights; all component values have a joint standard deviation of 1
LEAST_CELLS = 5  # the file does not judge labels with fewer cells, or with fewer than LEAST_TRAINED outside a fold
LEAST_TRAINED = 3
# The grid of weights for the log probabilities of the file and of the checkpoint.
FILE_SCALES, MODEL_SCALES = (0.3, 0.5, 0.7, 1.0, 1.4), (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
LEAST_LOG = -5.0  # floor of a log probability of the checkpoint: bounds the effect of a confident mistake
LEAST_LIKELIHOOD = -6.0  # floor of a cell's log-likelihood: wrong labels do not decide the weights
NAMED_GENES = 10
EXACT = 2.0**20  # rounding unit: sums of `N_AXES` products of factors below 2**4 and 2**3 fit the 53 bits of a double
ITERATIONS = 100  # most iterations of L-BFGS
SUBSPACE_STEPS, SPARE_AXES = 6, 10  # randomised subspace iteration (Halko et al. 2011, SIAM Review 53:217)


@dataclass
class FileRegression:
    """Multinomial logistic regressions of the labels of a file on principal components, one for each fold.

    Args:
        genes: int64 `(n_genes,)`: vocabulary ids, ascending.
        axes: float32 `(n_genes, n_axes)`: maps log1p(CP10k) to scaled principal components.
        weights: float32 `(N_FOLDS, n_axes, n_labels)`.
        bias: float32 `(N_FOLDS, n_labels)`; -inf for a label that a fold cannot judge.
        means: float32 `(n_labels, n_genes)`: mean log1p(CP10k) of each label.
        belief: float64 `(2,)`: weights of the log odds of the file and of the checkpoint.
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
        """Fit the regressions; None if fewer than two labels have `LEAST_CELLS` cells.

        Args:
            cells: Raw counts.
            numbers: int64 `(n_cells,)`: the number of each cell's label; -1 for none.
            n_labels: Number of labels in the file.
            of_all: Numbers for all cells of the file, if `cells` is a sample in which rare labels are enriched.
        """
        usable = np.bincount(numbers[numbers >= 0], minlength=n_labels) >= LEAST_CELLS
        rows = np.flatnonzero((numbers >= 0) & usable[numbers] & (np.diff(cells.indptr) > 0))
        if usable.sum() < 2 or not len(rows):
            return None
        cells, numbers = cells[rows], numbers[rows]
        # Sampling by label changes the bias alone (Prentice and Pyke 1979, Biometrika 66:403).
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
                solved = _fit(places[rows], np.searchsorted(judged, numbers[rows]), len(judged))
                weights[fold][:, judged], bias[fold, judged] = solved
                bias[fold, judged] += np.log(n_all / n_drawn)[judged]
        means = np.zeros((n_labels, len(genes)), dtype=np.float32)
        for label in np.flatnonzero(usable):
            means[label] = values[numbers == label].mean(axis=0)
        return cls(genes, axes.astype(np.float32), weights, bias, means, np.array([1.0, 0.0]))

    def log_probabilities(self, cells: Cells) -> np.ndarray:
        """Out-of-fold log probabilities of the labels, float64 `(n_cells, n_labels)`.

        -inf for a label that the fold cannot judge; NaN for a cell that expresses none of the genes.
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
        """Ragged log1p(CP10k) over `genes`: `indptr`, positions in `genes`, values."""
        table = np.full(1 + max(self.genes.max(), cells.gene_ids.max(initial=0)), -1, dtype=np.int64)
        table[self.genes] = np.arange(len(self.genes))
        positions = table[cells.gene_ids]
        in_genes = positions >= 0
        n_of = np.bincount(cells.rows()[in_genes], minlength=len(cells))
        return np.concatenate([[0], np.cumsum(n_of)]), positions[in_genes], normalize_log1p(cells)[in_genes]

    def genes_for(self, cells: Cells, labels: np.ndarray, rivals: np.ndarray) -> list[np.ndarray]:
        """Expressed genes that speak for a label against a rival in each cell, as vocabulary ids, the strongest first.

        The evidence of a gene is weight * (value - midpoint), as in `evidence_scmmgpt`. The weight is the mean over
        folds, and the midpoint lies halfway between the mean cells of both labels.

        Args:
            cells: Raw counts.
            labels, rivals: int64 `(n_cells,)`: numbers of the labels; a cell with a label of -1 gets no genes.
        """
        indptr, positions, values = self.profiles(cells)
        weights_of: dict[tuple[int, int], np.ndarray] = {}
        genes = []
        for cell, pair in enumerate(zip(labels.tolist(), rivals.tolist(), strict=True)):
            if pair[0] < 0:
                genes.append(np.empty(0, dtype=np.int64))
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
            genes.append(self.genes[at[order[terms[order] > 0]]])
        return genes

    def believing(self, logs: np.ndarray, model: np.ndarray, numbers: np.ndarray) -> "FileRegression":
        """Fit `belief`: the weights of file and checkpoint that maximise the likelihood of the given labels.

        Args:
            logs: `(n_cells, n_labels)`: the result of [`log_probabilities`].
            model: `(n_cells, n_labels)`: log probabilities of the checkpoint; NaN for labels that it does not know.
            numbers: int64 `(n_cells,)`: numbers of the given labels.
        """
        known = np.flatnonzero(~np.isnan(model).any(axis=0))
        rows = np.isin(numbers, known) & np.isfinite(logs[np.arange(len(logs)), numbers])
        if len(known) < 2 or not rows.any():
            return self
        own = np.searchsorted(known, numbers[rows])
        logs, model = logs[np.ix_(rows, known)], model[np.ix_(rows, known)].clip(min=LEAST_LOG)
        best = -np.inf
        belief = self.belief
        for file in FILE_SCALES:
            for checkpoint in MODEL_SCALES:
                scores = file * logs + checkpoint * model
                scores -= scores.max(axis=1, keepdims=True)
                given = scores[np.arange(len(own)), own] - np.log(np.exp(scores).sum(axis=1))
                if (value := given.clip(min=LEAST_LIKELIHOOD).mean()) > best:
                    best, belief = value, np.array([file, checkpoint])
        return replace(self, belief=belief)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """The fields as arrays with a prefix, for a file of arrays."""
        return {f"regression_{name}": value for name, value in vars(self).items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "FileRegression | None":
        """The inverse of [`as_arrays`], among other arrays; None if the arrays are absent."""
        if "regression_genes" not in arrays:
            return None
        return cls(**{name: arrays[f"regression_{name}"] for name in cls.__dataclass_fields__})


def _exact(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 1 / `EXACT`, float64: sums of products are exact, and so independent of the batch."""
    return np.rint(values.astype(np.float64) * EXACT) / EXACT


def folds_of(cells: Cells) -> np.ndarray:
    """The fold of each cell, int64 `(n_cells,)`, from the hash of the cell's counts."""
    return (mix64(fingerprints(cells) + GOLDEN_GAMMA) % np.uint64(N_FOLDS)).astype(np.int64)


def best_other_label(
    logs: np.ndarray, model: np.ndarray, given: np.ndarray, nested: np.ndarray, belief: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best label besides the given label, by file and checkpoint together.

    Args:
        logs: `(n_cells, n_labels)`: the result of [`FileRegression.log_probabilities`].
        model: `(n_cells, n_labels)`: log probabilities of the checkpoint; NaN leaves the decision to the file.
        given: int64 `(n_cells,)`: numbers of the given labels.
        nested: bool `(n_labels, n_labels)`: pairs of a broader and a narrower label, which do not contradict.
        belief: `belief` of [`FileRegression`].

    Returns:
        Number of the best other label, int64 `(n_cells,)`; log odds of this label against the given label by file and
        checkpoint, and by the file alone, float64. If the file does not judge a cell, -1, NaN and NaN.
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
    """Ids of the most variable genes, ascending, and their log1p(CP10k), float32 `(n_cells, n_genes)`."""
    values, n_cells = normalize_log1p(cells), len(cells)
    mean = np.bincount(cells.gene_ids, weights=values) / n_cells
    variance = np.bincount(cells.gene_ids, weights=values.astype(np.float64) ** 2) / n_cells - mean**2
    genes = np.sort(np.argsort(-variance, kind="stable")[: min(N_GENES, int((mean > 0).sum()))])
    table = np.full(len(mean), -1, dtype=np.int64)
    table[genes] = np.arange(len(genes))
    positions, dense = table[cells.gene_ids], np.zeros((n_cells, len(genes)), dtype=np.float32)
    in_genes = positions >= 0
    np.add.at(dense, (cells.rows()[in_genes], positions[in_genes]), values[in_genes])
    return genes.astype(np.int64), dense


def _principal_axes(values: np.ndarray) -> np.ndarray:
    """The first right singular vectors of `values` `(n_cells, n_genes)`, float32 `(n_genes, n_axes)`.

    The computation is in float64: the last bits of a product depend on the number of threads, and subspace iteration
    amplifies the difference.
    """
    values = values.astype(np.float64)
    n_axes = max(min(N_AXES, *(size - 1 for size in values.shape)), 1)
    start = np.random.default_rng(0).standard_normal((values.shape[1], min(n_axes + SPARE_AXES, values.shape[1])))
    basis = np.linalg.qr(start)[0]
    for _ in range(SUBSPACE_STEPS):
        basis = np.linalg.qr(values.T @ (values @ basis))[0]
    inner = np.linalg.svd(values @ basis, full_matrices=False)[2]
    return (basis @ inner.T)[:, :n_axes].astype(np.float32)


def _fit(places: np.ndarray, numbers: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(n_axes, n_labels)` and bias of a multinomial logistic regression with a ridge penalty.

    The gradient equals that of autograd to the last bit. All steps share two arrays of cells x labels; autograd would
    allocate new arrays in each step, 1.2 GB in all for 600 labels.
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
