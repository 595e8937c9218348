"""Baselines that need no trained model, and the shuffled control.

Baselines are fitted to the training cells of the model and never see labels of test cells. Hyper-parameters are chosen
on a part of the training cells.

* types: `majority_class`, `nearest_centroid`, `logistic_regression`;
* texts: `training_captions`, and in `description` the caption of the label alone;
* cells: `mean_cells`, `poisson_cells`, `negative_binomial_cells`;
* control: `shuffled` outputs of the model.
"""

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestCentroid

from scmmgpt.cells_scmmgpt import log1p_cp10k
from scmmgpt.eval.cells import LabelledCells


logger = logging.getLogger(__name__)

INVERSE_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # C of the logistic regression, ascending
MAX_ITERATIONS = 500

Matrix: TypeAlias = np.ndarray | sparse.csr_matrix  # expression or components, `(n_cells, n_features)`


@dataclass(frozen=True)
class TypePrediction:
    """Predicted types of cells."""

    labels: np.ndarray  # str `(n_cells,)`
    confidences: np.ndarray | None = None  # probability of each prediction, `(n_cells,)`
    choices: dict | None = None  # chosen hyper-parameters, JSON-able

    def take(self, rows: np.ndarray) -> "TypePrediction":
        """The predictions at `rows`, in that order."""
        confidences = None if self.confidences is None else self.confidences[rows]
        return TypePrediction(self.labels[rows], confidences, self.choices)


def majority_class(train_labels: ArrayLike, n_cells: int) -> TypePrediction:
    """Predict the most frequent training type (in a tie, the first by name), with its share as confidence."""
    names, counts = np.unique(np.asarray(train_labels).astype(str), return_counts=True)
    share = counts.max() / counts.sum()
    return TypePrediction(np.full(n_cells, names[counts.argmax()]), np.full(n_cells, share))


def nearest_centroid(train: Matrix, train_labels: ArrayLike, test: Matrix) -> TypePrediction:
    """Predict the type whose mean log1p(CP10k) profile is nearest."""
    if len(np.unique(train_labels)) == 1:
        return majority_class(train_labels, test.shape[0])
    with warnings.catch_warnings():
        # Genes without variance within types matter only to other metrics of scikit-learn's class.
        warnings.filterwarnings("ignore", message=".*within_class_std_dev_", category=UserWarning)
        model = NearestCentroid().fit(train, np.asarray(train_labels).astype(str))
    return TypePrediction(model.predict(test))


def logistic_regression(train: Matrix, train_labels: ArrayLike, test: Matrix, *, seed: int = 0) -> TypePrediction:
    """Multinomial logistic regression on log1p(CP10k), the strongest simple annotator of small data.

    C is chosen on a random fifth of the training cells; the model is then fitted to all training cells. `choices` has
    C and the validation accuracies.
    """
    labels = np.asarray(train_labels).astype(str)
    if len(np.unique(labels)) == 1:
        return majority_class(labels, test.shape[0])
    train, test = (sparse.csr_matrix(m) if sparse.issparse(m) else np.asarray(m) for m in (train, test))
    model = LogisticRegression(max_iter=MAX_ITERATIONS)
    best, accuracies = choose_penalty(model, train, labels, [_validation_part(labels, seed)])
    probabilities = fit_quietly(model.set_params(C=best), train, labels).predict_proba(test)
    return TypePrediction(
        labels=np.unique(labels)[probabilities.argmax(1)],
        confidences=probabilities.max(1),
        choices={"C": best, "validation_accuracy": {str(c): a for c, a in accuracies.items()}},
    )


def regression_on_shared_genes(train: LabelledCells, test: LabelledCells, *, seed: int = 0) -> TypePrediction:
    """Fit [`logistic_regression`] to the genes that both splits share."""
    genes = np.intersect1d(train.genes, test.genes)
    if not len(genes):
        raise ValueError(
            f"Training cells ({train.genes[0]}, ...) and test cells ({test.genes[0]}, ...) share no gene."
        )
    logger.info("Fitting logistic regression on %d cells and %d genes.", len(train), len(genes))
    x_train, x_test = train.select_genes(genes).expression, test.select_genes(genes).expression
    return logistic_regression(x_train, train.labels, x_test, seed=seed)


def choose_penalty(
    model: LogisticRegression, x: Matrix, labels: np.ndarray, folds: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, dict[float, float]]:
    """Choose C by accuracy over folds (rows to fit, rows to predict); return C and the accuracy of each C.

    In a tie, the smallest C is chosen.
    """
    hits, n = dict.fromkeys(INVERSE_PENALTIES, 0), 0
    for fitting, held_out in folds:
        n += len(held_out)
        for c in hits:
            predicted = fit_quietly(model.set_params(C=c), x[fitting], labels[fitting]).predict(x[held_out])
            hits[c] += int((predicted == labels[held_out]).sum())
    return max(hits, key=lambda c: hits[c]), {c: right / n for c, right in hits.items()}


def fit_quietly(model: Any, x: Matrix, labels: np.ndarray) -> Any:
    """Fit without convergence warnings, because a model that did not converge is still a valid candidate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, labels)


def _validation_part(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows, stratified, into rows to fit and a fifth to choose C on; the only cell of a type is fitted."""
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[codes] > 1)
    n_types = int((counts > 1).sum())
    n_validation = max(round(0.2 * len(labels)), n_types)
    if n_types < 2 or len(repeated) - n_validation < n_types:
        raise ValueError(
            f"{len(labels)} training cells of {len(names)} types are too few to hold out a part for the choice of C. "
            "Give more training cells."
        )
    fitting, validation = train_test_split(
        repeated, test_size=n_validation, stratify=codes[repeated], random_state=seed
    )
    return np.concatenate([fitting, np.flatnonzero(counts[codes] == 1)]), validation


def shuffled(values: ArrayLike, *, seed: int = 0) -> np.ndarray:
    """Shuffle the values over cells: a control that keeps only their frequencies."""
    return np.random.default_rng(seed).permutation(np.asarray(values, dtype=object))


def training_captions(
    labels: ArrayLike, train_labels: ArrayLike, train_texts: Sequence[str], *, seed: int = 0
) -> list[str]:
    """Draw, for each label, the text of a random training cell with this label."""
    return [train_texts[row] for row in sample_rows(labels, train_labels, seed=seed)]


def sample_rows(labels: ArrayLike, train_labels: ArrayLike, *, seed: int = 0) -> np.ndarray:
    """Draw, for each label, a row of `train_labels` with this label, with replacement, int64 `(len(labels),)`."""
    rng = np.random.default_rng(seed)
    wanted, available = np.asarray(labels).astype(str), np.asarray(train_labels).astype(str)
    rows = np.empty(len(wanted), dtype=np.int64)
    for label in np.unique(wanted):
        rows[wanted == label] = rng.choice(_rows_of(label, available), (wanted == label).sum())
    return rows


def _rows_of(label: str, train_labels: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(train_labels == label)
    if not len(rows):
        raise ValueError(
            f"No training cell is of type {str(label)!r}; the types are {np.unique(train_labels).tolist()}."
        )
    return rows


def mean_cells(prompts: Sequence[str] | np.ndarray, train: LabelledCells) -> np.ndarray:
    """Mean log1p(CP10k) of the training cells of each prompted type, float32 `(n_cells, n_genes)`."""
    (names, places), expression = np.unique(prompts, return_inverse=True), train.expression
    means = [np.asarray(expression[_rows_of(name, train.labels)].mean(0)).ravel() for name in names]
    return np.stack(means).astype(np.float32)[places]


def poisson_cells(prompts: Sequence[str] | np.ndarray, train: LabelledCells, *, seed: int = 0) -> np.ndarray:
    """Draw Poisson counts around the mean profile of each prompted type; log1p(CP10k), float32 `(n_cells, n_genes)`.

    Library sizes come from random training cells of the type.
    """
    totals, mean = _expected_counts(prompts, train, seed)
    return log1p_cp10k(np.random.default_rng(seed).poisson(mean), totals)


def negative_binomial_cells(prompts: Sequence[str] | np.ndarray, train: LabelledCells, *, seed: int = 0) -> np.ndarray:
    """As `poisson_cells`, with negative binomial counts; each gene has one dispersion, by the method of moments."""
    rng = np.random.default_rng(seed)
    totals, mean = _expected_counts(prompts, train, seed)
    excess, squares = np.zeros(len(train.genes)), np.zeros(len(train.genes))
    for label in np.unique(train.labels):
        of_type = train.labels == label
        counts, own = train.counts[of_type].toarray(), train.total_counts[of_type]
        expected = counts.sum(0) / own.sum() * own[:, None]
        excess += ((counts - expected) ** 2 - expected).sum(0)
        squares += (expected**2).sum(0)
    dispersion = np.divide(excess, squares, out=np.zeros_like(excess), where=squares > 0).clip(1e-6, 100)
    return log1p_cp10k(rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape)), totals)


def _expected_counts(
    prompts: Sequence[str] | np.ndarray, train: LabelledCells, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw library sizes of training cells of the types, `(n_cells,)`; compute mean counts, `(n_cells, n_genes)`.

    The mean counts are the mean shares of the type times the library size.
    """
    totals = train.total_counts[sample_rows(prompts, train.labels, seed=seed)]
    names, places = np.unique(prompts, return_inverse=True)
    of_types = [_rows_of(name, train.labels) for name in names]
    shares = [np.asarray(train.counts[rows].sum(0)).ravel() / train.total_counts[rows].sum() for rows in of_types]
    return totals, np.stack(shares)[places] * totals[:, None]
