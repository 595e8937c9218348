"""Baselines: what anyone could do without the model, and what chance does.

Baselines learn from the model's own training cells and never read labels of test cells; hyper-parameters are chosen on
a part of the training cells.

* types: `majority_class`, `nearest_centroid`, `logistic_regression` (log1p CP10k, all genes, C by validation);
* texts: `label_only_captions`, `training_captions`;
* cells: `mean_cells`, `poisson_cells`;
* control: `shuffled` answers of the model itself.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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

INVERSE_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # C of the logistic regression
VALIDATION_SHARE = 0.2  # of the training cells, to choose C on
MAX_ITERATIONS = 500


@dataclass(frozen=True)
class TypePrediction:
    """Predicted types of cells, and what was chosen on the way.

    Args:
        labels: Shape `(n_cells,)`.
        confidences: Probability of each label, shape `(n_cells,)`, or `None`.
        choices: JSON-able record of chosen hyper-parameters.
    """

    labels: np.ndarray
    confidences: np.ndarray | None = None
    choices: dict | None = None

    def take(self, rows: np.ndarray) -> "TypePrediction":
        """The predictions at `rows`, in that order."""
        confidences = None if self.confidences is None else self.confidences[rows]
        return TypePrediction(self.labels[rows], confidences, self.choices)


def majority_class(train_labels: ArrayLike, n_cells: int) -> TypePrediction:
    """Call every cell the most frequent training type, with its share as confidence; ties go to the first by name."""
    names, counts = np.unique(np.asarray(train_labels).astype(str), return_counts=True)
    share = counts.max() / counts.sum()
    return TypePrediction(np.full(n_cells, names[counts.argmax()]), np.full(n_cells, share))


def nearest_centroid(
    train: np.ndarray | sparse.csr_matrix, train_labels: ArrayLike, test: np.ndarray | sparse.csr_matrix
) -> TypePrediction:
    """Call every cell the type whose mean log1p(CP10k) profile is nearest.

    Args:
        train: Training expression, shape `(n_train, n_genes)`, dense or scipy sparse.
        train_labels: Shape `(n_train,)`.
        test: Expression of the cells to name, shape `(n_cells, n_genes)`.
    """
    if len(np.unique(train_labels)) == 1:
        return majority_class(train_labels, test.shape[0])
    with warnings.catch_warnings():
        # A gene that does not vary within its types matters to other metrics of scikit-learn's class, not to this one.
        warnings.filterwarnings("ignore", message=".*within_class_std_dev_", category=UserWarning)
        model = NearestCentroid().fit(train, np.asarray(train_labels).astype(str))
    return TypePrediction(model.predict(test))


def logistic_regression(
    train: np.ndarray | sparse.csr_matrix,
    train_labels: ArrayLike,
    test: np.ndarray | sparse.csr_matrix,
    *,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    seed: int = 0,
) -> TypePrediction:
    """Multinomial logistic regression on log1p(CP10k) of all genes, the strongest simple annotator of small data.

    C is the one with the best accuracy on a part of the training cells (the smallest among equals); the model is then
    fitted on all of them.

    Args:
        train: Training expression, log1p(CP10k), shape `(n_train, n_genes)`, dense or scipy sparse.
        train_labels: Shape `(n_train,)`.
        test: Expression of the cells to name, shape `(n_cells, n_genes)`.
        inverse_penalties: Values of C to try.
        seed: Seed of that part.

    Returns:
        Labels, the probability of each, and in `choices` C and the validation accuracies.
    """
    labels = np.asarray(train_labels).astype(str)
    if len(np.unique(labels)) == 1:
        return majority_class(labels, test.shape[0])
    train, test = (sparse.csr_matrix(m) if sparse.issparse(m) else np.asarray(m) for m in (train, test))
    model = LogisticRegression(max_iter=MAX_ITERATIONS)
    best, accuracies = choose_penalty(model, train, labels, [_validation_part(labels, seed)], inverse_penalties)
    probabilities = fit_quietly(model.set_params(C=best), train, labels).predict_proba(test)
    return TypePrediction(
        labels=np.unique(labels)[probabilities.argmax(1)],
        confidences=probabilities.max(1),
        choices={"C": best, "validation_accuracy": {str(c): a for c, a in accuracies.items()}},
    )


def regression_on_shared_genes(train: LabelledCells, test: LabelledCells, *, seed: int = 0) -> TypePrediction:
    """`logistic_regression` from one split to another, over the genes that both have."""
    genes = np.intersect1d(train.genes, test.genes)
    if not len(genes):
        raise ValueError(
            f"Training cells ({train.genes[0]!r}, ...) and test cells ({test.genes[0]!r}, ...) share no gene."
        )
    logger.info("Fitting logistic regression on %d cells and %d genes.", len(train), len(genes))
    x_train, x_test = train.select_genes(genes).expression, test.select_genes(genes).expression
    return logistic_regression(x_train, train.labels, x_test, seed=seed)


def choose_penalty(
    model: LogisticRegression,
    x: np.ndarray | sparse.csr_matrix,
    labels: np.ndarray,
    folds: Iterable[tuple[np.ndarray, np.ndarray]],
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> tuple[float, dict[float, float]]:
    """The C with the best accuracy over folds, the smallest among equals, and the accuracy of each C.

    Args:
        model: Fitted for every C and fold.
        x: `(n_cells, n_features)`.
        labels: `(n_cells,)`.
        folds: Rows to fit on, and rows to predict.
        inverse_penalties: Values of C to try.
    """
    hits, n = dict.fromkeys(sorted(inverse_penalties), 0), 0
    for fitting, held_out in folds:
        n += len(held_out)
        for c in hits:
            predicted = fit_quietly(model.set_params(C=c), x[fitting], labels[fitting]).predict(x[held_out])
            hits[c] += int((predicted == labels[held_out]).sum())
    return max(hits, key=lambda c: hits[c]), {c: right / n for c, right in hits.items()}


def fit_quietly(
    model: LogisticRegression, x: np.ndarray | sparse.csr_matrix, labels: np.ndarray
) -> LogisticRegression:
    """Fit without warnings: a weakly penalised model whose fit did not finish is a candidate like any other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, labels)


def _validation_part(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose on; types with one cell stay among the former, where they can be learnt."""
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[codes] > 1)
    n_types = int((counts > 1).sum())
    n_validation = max(round(VALIDATION_SHARE * len(labels)), n_types)
    if n_types < 2 or len(repeated) - n_validation < n_types:
        raise ValueError(
            f"{len(labels)} training cells of {len(names)} types are too few to choose a penalty on a part of them. "
            "Give more training cells."
        )
    fitting, validation = train_test_split(
        repeated, test_size=n_validation, stratify=codes[repeated], random_state=seed
    )
    return np.concatenate([fitting, np.flatnonzero(counts[codes] == 1)]), validation


def shuffled(values: ArrayLike, *, seed: int = 0) -> np.ndarray:
    """The same values in random order over cells: what their frequencies alone are worth."""
    return np.random.default_rng(seed).permutation(np.asarray(values, dtype=object))


def label_only_captions(
    labels: Sequence[str] | np.ndarray, label_text: Callable[[str], str] = "cell type: {}.".format
) -> list[str]:
    """A caption of the type and nothing else, for each cell.

    Args:
        labels: Type of each cell, true or predicted.
        label_text: Writes the caption of a type.
    """
    texts = {label: label_text(label) for label in set(labels)}
    return [texts[label] for label in labels]


def training_captions(
    labels: ArrayLike, train_labels: ArrayLike, train_texts: Sequence[str], *, seed: int = 0
) -> list[str]:
    """For each label the text of a random training cell of that type.

    Args:
        labels: Type of each cell, true or predicted.
        train_labels: Types of the training cells.
        train_texts: Their texts.
        seed: Seed of the draw.
    """
    rows = sample_rows(labels, train_labels, seed=seed)
    return [train_texts[row] for row in rows]


def sample_rows(labels: ArrayLike, train_labels: ArrayLike, *, seed: int = 0) -> np.ndarray:
    """For each label a random row of `train_labels` with that label, drawn with replacement, int `(len(labels),)`."""
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
    """The mean log1p(CP10k) profile of the prompted type, the same for all cells of a type.

    Args:
        prompts: Prompted types, shape `(n_cells,)`.
        train: Training cells.

    Returns:
        float32 array `(n_cells, n_genes)`.
    """
    expression = train.expression
    means = {}
    for label in set(prompts):
        means[label] = np.asarray(expression[_rows_of(label, train.labels)].mean(0)).ravel().astype(np.float32)
    return np.stack([means[label] for label in prompts])


def poisson_cells(prompts: Sequence[str] | np.ndarray, train: LabelledCells, *, seed: int = 0) -> np.ndarray:
    """Cells drawn from the mean profile of their type with Poisson noise, at the library size of a real cell of it.

    Args:
        prompts: Prompted types, shape `(n_cells,)`.
        train: Training cells.
        seed: Seed of library sizes and noise.

    Returns:
        log1p(CP10k) of the drawn counts, float32 array `(n_cells, n_genes)`.
    """
    rng = np.random.default_rng(seed)
    rows = sample_rows(prompts, train.labels, seed=seed)
    shares = {}
    for label in set(prompts):
        of_type = _rows_of(label, train.labels)
        shares[label] = np.asarray(train.counts[of_type].sum(0)).ravel() / train.total_counts[of_type].sum()
    totals = train.total_counts[rows]
    counts = rng.poisson(np.stack([shares[label] for label in prompts]) * totals[:, None])
    return log1p_cp10k(counts, totals)
