"""The mathematics of the profile readout: a linear map from a cell's profile into the space of cells and texts.

1. The **profile** of a cell is the square root of every gene's share of its counts (Hellinger coordinates, length 1).
2. A multinomial logistic **regression** on profiles scores the labels (`fit_regressions`). Every label has the same
   weight, rare or common, which raises macro-F1 and, less, accuracy (`train/LOG.md`). If labels are few, it may be
   one on the principal components of all cells of the file (`FileComponents`).
3. The **readout** maps the regression's weights into the shared space (`readout_of`): the product of a cell's readout
   with the text of a label is the label's score.
4. The **label readout** keeps the regression's own scores, with the statistics of the cells from which
   `readout_scmmgpt` solves it again for the genes of another file (`fit_label_readout`).
5. Held-out cells give the **temperature** of the softmax over labels (`fit_temperature`).
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from scipy.sparse.linalg import LinearOperator, svds
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import kneighbors_graph
from sklearn.semi_supervised import LabelSpreading
from torch.nn import functional as F

from scmmgpt.cells_scmmgpt import Cells, hellinger_profile
from scmmgpt.readout_scmmgpt import PROFILE_SCALE, ScMMGPTLabelReadout


logger = logging.getLogger(__name__)

Strength: TypeAlias = float | str  # an inverse L2 penalty, `COMPONENTS` or `SPREAD`
Profiles: TypeAlias = csr_matrix | np.ndarray  # (n_cells, n_genes), or coordinates along other axes

# The regression sees profiles of length `PROFILE_SCALE`; elsewhere in this file a profile has length 1.
STRENGTHS = (0.001, 0.003, 0.01, 0.03)  # inverse L2 penalties to try, on that scale
MAX_ITERATIONS, TOLERANCE = 200, 1e-3
DEFAULT_STRENGTH = 0.01  # where nothing is held out
ONE_SHOT_STRENGTH = 0.0001  # with one cell of each label, since single cells differ mostly by noise
COMPONENTS, SPREAD = "components", "spread"  # in place of a strength: regressions of `FileComponents`
N_COMPONENTS, SPREAD_COMPONENTS, SPREAD_NEIGHBOURS, SPREAD_SHARE = 50, 20, 15, 0.5
FOLDS = 4  # of the labelled cells, where no others are held out
# Of the factor model. More factors than 64 restore no more labels where genes are absent, and a noise of one mean
# variance of a gene beside its own keeps rare genes from being predicted by chance: see `train/LOG.md`.
N_FACTORS, NOISE_FLOOR = 64, 1.0
FACTOR_CELLS = 20_000  # at most
TEMPERATURES = 2.0 ** np.arange(-7, 1.25, 0.25)


@dataclass
class LabelledProfiles:
    """Profiles of labelled and unlabelled cells."""

    profiles: csr_matrix  # float32 (n_labelled, n_genes)
    targets: np.ndarray  # int64 (n_labelled,)
    n_labels: int
    train: np.ndarray  # rows of `profiles`
    validation: np.ndarray  # likewise; may be empty
    unlabelled: csr_matrix  # float32 (n_unlabelled, n_genes)


@dataclass
class LinearModel:
    """A multinomial logistic regression on profiles, of mean 0 over the labels that it saw, and 0 for the others."""

    weights: np.ndarray  # float64 (n_labels, n_genes)
    bias: np.ndarray  # float64 (n_labels,)

    def scores(self, profiles: Profiles) -> np.ndarray:
        """Logits of the labels, float64 `(n_cells, n_labels)`."""
        return profiles @ self.weights.T + self.bias


@dataclass
class Regressions:
    """One regression, fitted to the training cells and to all labelled cells (the same where none are held out)."""

    strength: Strength
    train: LinearModel
    everything: LinearModel
    losses: dict[Strength, float] = field(default_factory=dict)  # of validation, by strength


def profile_matrix(cells: Cells, n_genes: int) -> csr_matrix:
    """Profiles as a sparse matrix `(n_cells, n_genes)`."""
    return csr_matrix((hellinger_profile(cells), cells.gene_ids, cells.indptr), shape=(len(cells), n_genes))


def linear_model(weights: np.ndarray, bias: np.ndarray, seen: np.ndarray, n_labels: int) -> LinearModel:
    """The coefficients of a regression on `profiles * PROFILE_SCALE`, as a model of all labels on profiles."""
    weights, bias = np.atleast_2d(weights), np.atleast_1d(bias)
    if len(weights) == 1:  # scikit-learn keeps one score for two classes
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    if len(weights) > len(seen):  # of labels without a cell, too
        weights, bias = weights[seen], bias[seen]
    # Scores are defined up to a constant: centred, a label without a cell is neither likely nor unlikely.
    model = LinearModel(np.zeros((n_labels, weights.shape[1])), np.zeros(n_labels))
    model.weights[seen] = (weights - weights.mean(axis=0)) * PROFILE_SCALE
    model.bias[seen] = bias - bias.mean()
    return model


def fit_regression(profiles: Profiles, targets: np.ndarray, n_labels: int, strength: float) -> LinearModel:
    """Solve the regression for one strength; `n_labels` includes labels without a cell."""
    regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # early stopping is one more penalty
        regression.fit(profiles * PROFILE_SCALE, targets)
    return linear_model(regression.coef_, regression.intercept_, regression.classes_, n_labels)


def fit_regressions(data: LabelledProfiles, shots: int | None = None) -> Regressions:
    """Choose the strength, on held-out cells where there are some, and fit.

    If nothing is held out, cross-validation chooses whether cells without a label take part. With fewer cells
    of each label than `FOLDS`, labels spread where most cells have none. `shots` is the number of cells of each label,
    if it was given.
    """
    if len(data.validation):
        return choose_regression(data)
    if data.unlabelled.shape[0] and np.bincount(data.targets[data.train]).max() >= FOLDS:
        return cross_validate(data)
    if data.unlabelled.shape[0] > len(data.train):
        model = FileComponents.of(data, data.train, SPREAD_COMPONENTS).fit_spread()
        return Regressions(SPREAD, model, model)
    strength = ONE_SHOT_STRENGTH if shots == 1 else DEFAULT_STRENGTH
    model = fit_regression(data.profiles[data.train], data.targets[data.train], data.n_labels, strength)
    return Regressions(strength, model, model)


def choose_regression(data: LabelledProfiles) -> Regressions:
    """The regression with the lowest validation loss over `STRENGTHS`, and `SPREAD` where cells have no label.

    Each loss is at the temperature that [`fit_temperature_of_scores`] fits later: a strong penalty is not sharpened.
    """
    seen = np.unique(data.targets[data.train])

    def score(regression: LogisticRegression, profiles: csr_matrix, targets: np.ndarray) -> float:
        model = linear_model(regression.coef_, regression.intercept_, seen, data.n_labels)
        return -modest_loss(model.scores(profiles / PROFILE_SCALE), targets)

    search = LogisticRegressionCV(
        Cs=STRENGTHS,
        l1_ratios=(0.0,),
        cv=[(data.train, data.validation)],
        class_weight="balanced",
        scoring=score,
        max_iter=MAX_ITERATIONS,
        tol=TOLERANCE,
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        search.fit(data.profiles * PROFILE_SCALE, data.targets)
    validation_losses = -search.scores_[0, 0]  # of one fold, by strength
    best = validation_losses.argmin()
    losses: dict[Strength, float] = dict(zip(STRENGTHS, validation_losses.round(4).tolist(), strict=True))
    path = search.coefs_paths_[0, 0, best]  # fitted to the training cells: weights, then bias
    train = linear_model(path[:, :-1], path[:, -1], seen, data.n_labels)
    everything = linear_model(search.coef_, search.intercept_, search.classes_, data.n_labels)
    chosen = Regressions(STRENGTHS[best], train, everything, losses)
    if data.unlabelled.shape[0]:
        train = FileComponents.of(data, data.train, SPREAD_COMPONENTS).fit_spread()
        loss = modest_loss(train.scores(data.profiles[data.validation]), data.targets[data.validation])
        losses[SPREAD] = round(loss, 4)
        if loss < validation_losses[best]:
            rows = np.arange(len(data.targets))
            everything = FileComponents.of(data, rows, SPREAD_COMPONENTS).fit_spread()
            chosen = Regressions(SPREAD, train, everything, losses)
    logger.info("Validation loss by strength of the readout: %s", losses)
    return chosen


def cross_validate(data: LabelledProfiles) -> Regressions:
    """Of the regressions on all genes, on components and on spread labels, that of the lowest cross-validated loss.

    The only cell of a label is never held out. Cells of the fold that is held out count as unlabelled.
    """
    profiles, targets = data.profiles[data.train], data.targets[data.train]
    components = FileComponents.of(data, data.train, N_COMPONENTS)
    fits: Mapping[Strength, Callable[[np.ndarray], LinearModel]] = {
        DEFAULT_STRENGTH: lambda rows: fit_regression(profiles[rows], targets[rows], data.n_labels, DEFAULT_STRENGTH),
        COMPONENTS: components.fit,
        SPREAD: components.fit_spread,
    }
    everything, counts = np.arange(len(targets)), np.bincount(targets)
    common = everything[counts[targets] > 1]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    scores = {name: np.zeros((len(targets), data.n_labels)) for name in fits}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of labels with fewer cells than folds
        parts = [common[held_out] for _, held_out in folds.split(common, targets[common])]
    for held_out in parts:
        for name, fit in fits.items():
            scores[name][held_out] = fit(np.setdiff1d(everything, held_out)).scores(profiles[held_out])
    losses = {name: round(calibrated_loss(values[common], targets[common]), 4) for name, values in scores.items()}
    logger.info("Cross-validated loss by kind of readout: %s", losses)
    best = min(losses, key=lambda name: losses[name])
    model = fits[best](everything)
    return Regressions(best, model, model, losses)


@dataclass
class FileComponents:
    """Principal components of the labelled and the unlabelled cells of a file, and regressions on them.

    They gain where labels are few, and lose where all cells have one: see `train/LOG.md`.
    """

    pca: PCA
    points: np.ndarray  # float64 (n_cells, n_axes), labelled cells first
    targets: np.ndarray  # int64 (n_labelled,)
    n_labels: int

    @classmethod
    def of(cls, data: LabelledProfiles, rows: np.ndarray, n_axes: int) -> "FileComponents":
        """Components of the labelled `rows` and of all unlabelled cells."""
        profiles = vstack([data.profiles[rows], data.unlabelled], format="csr").astype(np.float64)
        pca = PCA(min(n_axes, min(profiles.shape) - 1), svd_solver="arpack", random_state=0)
        return cls(pca, pca.fit_transform(profiles), data.targets[rows], data.n_labels)

    def fit(self, rows: np.ndarray) -> LinearModel:
        """The regression on the labelled cells `rows`."""
        return self._regression(self.points[rows], self.targets[rows])

    def fit_spread(self, rows: np.ndarray | None = None) -> LinearModel:
        """The regression on all cells that a label reaches from the labelled cells `rows`, by default all of them.

        The labels spread along a graph of neighbours.
        """
        known = np.full(len(self.points), -1)
        rows = np.arange(len(self.targets)) if rows is None else rows
        known[rows] = self.targets[rows]
        points = self.points[:, :SPREAD_COMPONENTS]
        spread = spread_labels(points, known)
        reached = spread >= 0
        return self._regression(points[reached], spread[reached])

    def _regression(self, points: np.ndarray, targets: np.ndarray) -> LinearModel:
        """A regression on the first components, as a model of profiles."""
        model = fit_regression(points, targets, self.n_labels, DEFAULT_STRENGTH)
        axes = self.pca.components_[: points.shape[1]]
        weights = model.weights @ axes
        return LinearModel(weights, model.bias - weights @ self.pca.mean_)


def spread_labels(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Label spreading (Zhou et al. 2004) from labelled to unlabelled cells, with equal total weight for every label.

    Args:
        points: `(n_cells, n_axes)`.
        targets: int64 `(n_cells,)`, -1 where unknown; in the result, where no label reached the cell.
    """
    spreading = LabelSpreading(kernel=neighbour_graph, alpha=SPREAD_SHARE).fit(points, targets)
    shares = spreading.label_distributions_
    nearest = spreading.classes_[(shares / shares.sum(axis=0)).argmax(axis=1)]
    return np.where(targets >= 0, targets, np.where(shares.any(axis=1), nearest, -1))


def neighbour_graph(points: np.ndarray, _: np.ndarray) -> csr_matrix:
    """The graph that joins a cell with its nearest neighbours, symmetric; a kernel for scikit-learn."""
    graph = kneighbors_graph(points, min(SPREAD_NEIGHBOURS, len(points) - 1), mode="connectivity")
    return graph.maximum(graph.T)


def fit_label_readout(
    data: LabelledProfiles, model: LinearModel, temperature: float, seed: int = 0
) -> ScMMGPTLabelReadout:
    """The regression with the statistics of all labelled cells, in which every label has the same weight.

    `temperature` divides the regression's scores; `seed` draws the cells of the factor model from more than
    `FACTOR_CELLS`.
    """
    rows = np.arange(len(data.targets))
    if len(rows) > FACTOR_CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, FACTOR_CELLS, replace=False))
    targets = data.targets[rows]
    counts = np.bincount(targets, minlength=data.n_labels)
    labels = csr_matrix((1 / counts[targets], (targets, np.arange(len(rows)))), shape=(data.n_labels, len(rows)))
    gene_ids = np.unique(data.profiles[rows].indices)
    profiles = (data.profiles[rows][:, gene_ids] * PROFILE_SCALE).astype(np.float64)
    centroids = (labels @ profiles).toarray()
    mean = centroids[counts > 0].mean(axis=0)
    centroids[counts == 0] = mean
    share = (labels @ profiles.power(2)).toarray()[counts > 0].mean(axis=0) / PROFILE_SCALE**2
    cell_weights = 1 / (counts[targets] * (counts > 0).sum())
    factors, rest = principal_factors(profiles, mean, cell_weights)
    return ScMMGPTLabelReadout.from_statistics(
        gene_ids=gene_ids,
        weights=model.weights[:, gene_ids] / PROFILE_SCALE,
        bias=model.bias,
        centroids=centroids,
        factors=factors,
        mean=mean,
        noise=rest + NOISE_FLOOR * (rest + (factors**2).sum(axis=0)).mean(),
        shares=share,
        temperature=np.array(temperature),
    )


def principal_factors(
    profiles: csr_matrix, mean: np.ndarray, cell_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes of weighted cells around `mean`, as long as their standard deviation, and what is left.

    Returns:
        `(n_factors, n_genes)`, and the variance of each gene beside the factors `(n_genes,)`.
    """
    roots = np.sqrt(cell_weights)
    centred = LinearOperator(
        profiles.shape,
        matvec=lambda v: roots * (profiles @ v.ravel() - mean @ v.ravel()),
        rmatvec=lambda u: profiles.T @ (roots * u.ravel()) - mean * (roots @ u.ravel()),
        dtype=np.float64,
    )
    variance = profiles.power(2).T @ cell_weights - 2 * mean * (profiles.T @ cell_weights) + mean**2
    n_factors = min(N_FACTORS, min(profiles.shape) - 1)
    _, scales, axes = svds(centred, k=n_factors, v0=np.ones(min(profiles.shape)))
    factors = scales[::-1, None] * axes[::-1]
    return factors, (variance - (factors**2).sum(axis=0)).clip(min=0)


def readout_of(model: LinearModel, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(n_genes, projection_dim)` and bias whose products with the texts are the regression's scores.

    The shortest such vectors lie in the span of the texts, which makes a cell a mixture of texts. With more labels
    than dimensions the scores are met in the least-squares sense. `text_features` are `(n_labels, projection_dim)`, on
    any device; the results are float32, on the CPU.
    """
    to_text_space = torch.linalg.pinv(text_features.cpu().double(), rcond=1e-4).t()  # (n_labels, projection_dim)
    weights = torch.from_numpy(model.weights).t() @ to_text_space
    bias = torch.from_numpy(model.bias) @ to_text_space
    return weights.float(), bias.float()


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over cells of -log softmax(logits)[target]."""
    return F.cross_entropy(torch.from_numpy(np.asarray(logits, dtype=np.float64)), torch.from_numpy(targets)).item()


def losses_of_cells(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each cell."""
    cells = torch.from_numpy(np.asarray(logits, dtype=np.float64)), torch.from_numpy(targets)
    return F.cross_entropy(*cells, reduction="none").numpy()


def at_best_temperature(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Logits of scores of any scale."""
    scores = scores / max(np.abs(scores).max(), 1e-9)  # in the range of cosines, as `TEMPERATURES` expects
    return scores / fit_temperature(scores, targets)


def calibrated_loss(scores: np.ndarray, targets: np.ndarray) -> float:
    """Negative log-likelihood of scores of any scale, at the temperature that fits them best."""
    return negative_log_likelihood(at_best_temperature(scores, targets), targets)


def fit_temperature(similarity: np.ndarray, targets: np.ndarray) -> float:
    """The temperature of `TEMPERATURES` whose softmax of the cosines `(n_cells, n_labels)` fits the labels best."""
    return float(min(TEMPERATURES, key=lambda t: negative_log_likelihood(similarity / t, targets)))


def fit_temperature_of_scores(scores: np.ndarray, targets: np.ndarray) -> float:
    """As [`fit_temperature`], for scores of a regression, which it never sharpens (1 or more).

    Held-out cells of a file are more like the training cells than those of the next file: a temperature that sharpens
    there, where a penalised regression is modest, makes errors on other files certain (`train/LOG.md`).
    """
    scale = max(np.abs(scores).max(), 1e-9)
    return max(1.0, float(scale * fit_temperature(scores / scale, targets)))


def modest_loss(scores: np.ndarray, targets: np.ndarray) -> float:
    """Negative log-likelihood of scores of a regression at the temperature of [`fit_temperature_of_scores`]."""
    return negative_log_likelihood(scores / fit_temperature_of_scores(scores, targets), targets)


def fit_similarity_weight(logits: np.ndarray, similarity: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """The weight of similarities beside the readout's logits, both `(n_cells, n_labels)`, and the best sum.

    The weight is 0 unless the log-likelihood of the labels gains more than the standard error of its gain.
    """
    sums = {weight: logits + weight * similarity for weight in 1 / TEMPERATURES}
    best = min(sums, key=lambda weight: negative_log_likelihood(sums[weight], targets))
    gains = losses_of_cells(logits, targets) - losses_of_cells(sums[best], targets)
    earned = gains.mean() > gains.std() / np.sqrt(len(gains))
    return float(best) if earned else 0.0, sums[best]


def scores_of(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Loss, accuracy and macro-F1 of `(n_cells, n_labels)` logits."""
    predicted = logits.argmax(axis=1)
    return {
        "loss": round(negative_log_likelihood(logits, targets), 4),
        "accuracy": round(float((predicted == targets).mean()), 4),
        "macro_f1": round(float(f1_score(targets, predicted, average="macro", labels=np.unique(targets))), 4),
    }
