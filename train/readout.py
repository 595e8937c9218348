"""The mathematics of the profile readout: a linear map from a cell's profile into the space of cells and texts.

1. The **profile** of a cell is the square root of every gene's share of its counts (Hellinger coordinates, length 1).
2. A multinomial logistic **regression** on profiles scores the labels (`fit_regressions`). Every label has the same
   weight, rare or common, which raises macro-F1 and, less, accuracy (`train/LOG.md`). If labels are few, it may be
   one on the principal components of all cells of the file (`FileComponents`).
3. The **readout** maps the regression's weights into the shared space (`readout_of`): the product of a cell's readout
   with the text of a label is the label's score.
4. The **label readout** keeps the regression's logits, with statistics of the cells from which `readout_scmmgpt`
   refits the regression on the genes of another file (`fit_label_readout`).
5. The **temperature** of the softmax over labels is fitted on held-out cells (`fit_temperature`).
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags, vstack
from scipy.sparse.linalg import LinearOperator, svds
from scipy.special import log_softmax, softmax
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import kneighbors_graph
from torch.nn import functional as F

from scmmgpt.cells_scmmgpt import Cells, hellinger_profile
from scmmgpt.readout_scmmgpt import PROFILE_SCALE, ScMMGPTLabelReadout


logger = logging.getLogger(__name__)

Strength: TypeAlias = float | str  # an inverse L2 penalty, or a name below
Profiles: TypeAlias = csr_matrix | np.ndarray  # (n_cells, n_genes), or coordinates along other axes

# The regression is fitted to profiles of norm `PROFILE_SCALE`; elsewhere in this file, profiles have norm 1.
STRENGTHS = (0.001, 0.003, 0.01, 0.03)  # candidates for the inverse L2 penalty, on that scale
MAX_ITERATIONS, TOLERANCE = 200, 1e-3
DEFAULT_STRENGTH = 0.01  # without held-out cells
ONE_SHOT_STRENGTH = 0.0001  # with one cell of each label, since single cells differ mostly by noise
COMPONENTS, SPREAD = "components", "spread"  # in place of a strength: regressions of `FileComponents`
MOST_BESIDE = 1000  # labelled cells for which held-out cells are asked about `KNOWN`, since more learn it themselves
KNOWN, KNOWN_COMPONENTS, KNOWN_SPREAD = "known", "known, components", "known, spread"  # beside what a checkpoint knows
N_COMPONENTS, SPREAD_COMPONENTS, SPREAD_NEIGHBOURS, SPREAD_SHARE, SPREAD_STEPS = 50, 20, 15, 0.5, 30
BELIEF, BELIEF_SHARE = 0.5, 0.9  # where a checkpoint knows labels: start of a cell without one; as `SPREAD_SHARE`
LOSS_SCALE = 10.0  # of cross-validated losses, by which regressions are averaged
FOLDS = 4  # folds of cross-validation if no cells are held out
# The factor model for missing genes. More than 64 factors do not improve the labels. The noise of each gene gets one
# mean variance of a gene on top, so that rare genes do not predict others by chance (`train/LOG.md`).
N_FACTORS, NOISE_FLOOR = 64, 1.0
FACTOR_CELLS = 20_000  # most cells from which the factors are fitted
TEMPERATURES = 2.0 ** np.arange(-7, 1.25, 0.25)


@dataclass
class LabelledProfiles:
    """Profiles (square roots of shares of counts) of labelled and unlabelled cells."""

    profiles: csr_matrix  # float32 (n_labelled, n_genes)
    targets: np.ndarray  # int64 (n_labelled,)
    n_labels: int
    train: np.ndarray  # int64, rows of `profiles`
    validation: np.ndarray  # int64, rows of `profiles`; may be empty
    unlabelled: csr_matrix  # float32 (n_unlabelled, n_genes)
    prior: "LinearModel | None" = None  # what a checkpoint knows of the labels (`train/prior.py`)


@dataclass
class LinearModel:
    """A multinomial logistic regression on profiles.

    Coefficients have mean 0 over the labels with training cells. Labels without training cells have coefficients of 0.
    """

    weights: np.ndarray  # float64 (n_labels, n_genes)
    bias: np.ndarray  # float64 (n_labels,)

    def scores(self, profiles: Profiles) -> np.ndarray:
        """Logits of the labels, float64 `(n_cells, n_labels)`."""
        return profiles @ self.weights.T + self.bias

    def __add__(self, other: "LinearModel") -> "LinearModel":
        return LinearModel(self.weights + other.weights, self.bias + other.bias)


@dataclass
class Regressions:
    """One regression, fitted to the training cells and to all labelled cells (the same if no cells are held out)."""

    strength: Strength  # in a mean of regressions, of the one with the largest share
    train: LinearModel
    everything: LinearModel
    losses: dict[Strength, float] = field(default_factory=dict)  # strength -> validation loss


def profile_matrix(cells: Cells, n_genes: int) -> csr_matrix:
    """Profiles (square roots of shares of counts) as a sparse matrix, float32 `(n_cells, n_genes)`."""
    return csr_matrix((hellinger_profile(cells), cells.gene_ids, cells.indptr), shape=(len(cells), n_genes))


def linear_model(weights: np.ndarray, bias: np.ndarray, seen: np.ndarray, n_labels: int) -> LinearModel:
    """Convert coefficients on `profiles * PROFILE_SCALE` to a model of all labels on profiles.

    Args:
        weights: `(n_rows, n_genes)`: a row for each label of `seen` or for every label; one row if there are two.
        bias: `(n_rows,)`.
        seen: Labels with training cells, int `(n_seen,)`.
        n_labels: Number of labels, with or without training cells.
    """
    weights, bias = np.atleast_2d(weights), np.atleast_1d(bias)
    if len(weights) == 1:  # scikit-learn has one logit for two classes
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    if len(weights) > len(seen):  # with rows for labels without training cells
        weights, bias = weights[seen], bias[seen]
    # Logits are defined up to a constant. Centring makes a label without training cells neither likely nor unlikely.
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


def fit_beside(
    profiles: Profiles, targets: np.ndarray, n_labels: int, strength: float, offsets: np.ndarray
) -> LinearModel:
    """Solve the regression that is added to given logits; scikit-learn has none.

    Coefficients of genes are sums over cells, found along the principal axes of the cells: the unknowns are few.
    With offsets of 0 the result is that of [`fit_regression`], for three labels or more.

    Args:
        profiles, targets, n_labels, strength: As for [`fit_regression`].
        offsets: The given logits, `(n_cells, n_labels)`.
    """
    points, (seen, own, counts) = profiles * PROFILE_SCALE, np.unique(targets, return_inverse=True, return_counts=True)
    if isinstance(points, np.ndarray):
        places, axes, parts = points, np.eye(points.shape[1]), np.eye(points.shape[1])
    else:
        squares, axes = np.linalg.eigh((points @ points.T).toarray().astype(np.float64))
        kept = squares > squares[-1] * np.finfo(np.float32).eps
        places, axes, parts = axes[:, kept] * squares[kept] ** 0.5, axes[:, kept] / squares[kept] ** 0.5, points
    given, truth = offsets[:, seen], np.eye(len(seen))[own]
    weights = strength * len(own) / (len(seen) * counts[own])[:, None]  # every label has the same weight

    shape = (places.shape[1] + 1, len(seen))

    def loss(unknowns: np.ndarray) -> tuple[float, np.ndarray]:
        slopes, bias = np.split(unknowns.reshape(shape), [-1])
        log_probabilities = log_softmax(places @ slopes + bias + given, axis=1)
        excess = weights * (np.exp(log_probabilities) - truth)
        value = 0.5 * (slopes**2).sum() - (weights * truth * log_probabilities).sum()
        gradient = np.concatenate([places.T @ excess + slopes, excess.sum(axis=0, keepdims=True)])
        return value, gradient.ravel()

    options = {"maxiter": MAX_ITERATIONS, "gtol": TOLERANCE * strength, "ftol": 0.0}
    found = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
    return linear_model((axes @ found[:-1]).T @ parts, found[-1], seen, n_labels)


def fit_regressions(data: LabelledProfiles, shots: int | None = None) -> Regressions:
    """Choose the kind and strength of the regression, and fit it.

    * With held-out cells: see [`choose_regression`].
    * Without held-out cells, but with unlabelled cells and at least `FOLDS` cells of a label: see [`cross_validate`].
    * With more unlabelled than labelled cells: label spreading.
    * Otherwise, a default strength.

    The last two are beside what a checkpoint knows of the labels.

    Args:
        data: Profiles and labels.
        shots: Number of cells of each label, if it was given.
    """
    if len(data.validation):
        return choose_regression(data)
    if data.unlabelled.shape[0] and np.bincount(data.targets[data.train]).max() >= FOLDS:
        return cross_validate(data)
    if data.unlabelled.shape[0] > len(data.train):
        model = FileComponents.of(data, data.train, SPREAD_COMPONENTS).fit_spread(beside=data.prior is not None)
        if data.prior is None:
            return Regressions(SPREAD, model, model)
        model = data.prior + model
        return Regressions(KNOWN_SPREAD, model, model)
    strength = ONE_SHOT_STRENGTH if shots == 1 else DEFAULT_STRENGTH
    profiles, targets = data.profiles[data.train], data.targets[data.train]
    if data.prior is None:
        model = fit_regression(profiles, targets, data.n_labels, strength)
    else:
        offsets = data.prior.scores(profiles)
        model = data.prior + fit_beside(profiles, targets, data.n_labels, strength, offsets)
    return Regressions(strength, model, model)


def choose_regression(data: LabelledProfiles) -> Regressions:
    """Choose the regression with the lowest validation loss over `STRENGTHS` and, with unlabelled cells, `SPREAD`.

    Of at most `MOST_BESIDE` cells also the best strength beside what a checkpoint knows of the labels.

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
    validation_losses = -search.scores_[0, 0]  # (n_strengths,) of the only fold
    best = validation_losses.argmin()
    losses: dict[Strength, float] = dict(zip(STRENGTHS, validation_losses.round(4).tolist(), strict=True))
    path = search.coefs_paths_[0, 0, best]  # weights, then bias, fitted to the training cells
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
    if (prior := data.prior) is not None and len(data.targets) <= MOST_BESIDE:
        offsets, strength = prior.scores(data.profiles), STRENGTHS[best]

        def beside(rows: np.ndarray) -> LinearModel:
            return prior + fit_beside(data.profiles[rows], data.targets[rows], data.n_labels, strength, offsets[rows])

        train = beside(data.train)
        loss = modest_loss(train.scores(data.profiles[data.validation]), data.targets[data.validation])
        losses[KNOWN] = round(loss, 4)
        if loss < losses[chosen.strength]:
            chosen = Regressions(KNOWN, train, beside(np.arange(len(data.targets))), losses)
    logger.info("Validation loss by strength of the readout: %s", losses)
    return chosen


def cross_validate(data: LabelledProfiles) -> Regressions:
    """A mean of regressions on all genes, on components, and on spread labels, weighted by cross-validated loss.

    The first two also enter beside what a checkpoint knows of the labels. A regression that is worse by a loss of
    1 / `LOSS_SCALE` has a share e times smaller. All enter at their best temperatures, times the mean temperature. The
    only cell of a label is never held out. Cells of the held-out fold count as unlabelled.
    """
    profiles, targets = data.profiles[data.train], data.targets[data.train]
    components = FileComponents.of(data, data.train, N_COMPONENTS)
    fits: dict[Strength, Callable[[np.ndarray], LinearModel]] = {
        DEFAULT_STRENGTH: lambda rows: fit_regression(profiles[rows], targets[rows], data.n_labels, DEFAULT_STRENGTH),
        COMPONENTS: components.fit,
        SPREAD: components.fit_spread,
    }
    if (prior := data.prior) is not None:
        offsets = prior.scores(profiles)

        def beside(rows: np.ndarray) -> LinearModel:
            return prior + fit_beside(profiles[rows], targets[rows], data.n_labels, DEFAULT_STRENGTH, offsets[rows])

        fits |= {KNOWN: beside, KNOWN_COMPONENTS: lambda rows: prior + components.fit(rows, True)}
    everything, counts = np.arange(len(targets)), np.bincount(targets)
    common = everything[counts[targets] > 1]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    scores = {name: np.zeros((len(targets), data.n_labels)) for name in fits}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # some labels have fewer cells than folds
        parts = [common[held_out] for _, held_out in folds.split(common, targets[common])]
    for held_out in parts:
        for name, fit in fits.items():
            scores[name][held_out] = fit(np.setdiff1d(everything, held_out)).scores(profiles[held_out])
    judged = {name: (values[common], targets[common]) for name, values in scores.items()}
    temperatures = np.array([best_temperature(*pair) for pair in judged.values()])
    losses = {name: round(calibrated_loss(*pair), 4) for name, pair in judged.items()}
    logger.info("Cross-validated loss by kind of readout: %s", losses)
    shares = softmax(-LOSS_SCALE * np.array(list(losses.values())))
    parts = [fit(everything) for fit in fits.values()]
    factors = shares / temperatures * (shares @ temperatures)
    weights = np.tensordot(factors, np.stack([part.weights for part in parts]), axes=1)
    model = LinearModel(weights, factors @ np.stack([part.bias for part in parts]))
    return Regressions(min(losses, key=lambda name: losses[name]), model, model, losses)


@dataclass
class FileComponents:
    """Principal components of the labelled and the unlabelled cells of a file, and regressions on them.

    These regressions are more accurate if few cells have a label, and less accurate if all have one (`train/LOG.md`).
    """

    pca: PCA
    points: np.ndarray  # float64 (n_cells, n_axes), labelled cells first
    targets: np.ndarray  # int64 (n_labelled,)
    n_labels: int
    offsets: np.ndarray | None  # (n_cells, n_labels): logits of a checkpoint that knows labels

    @classmethod
    def of(cls, data: LabelledProfiles, rows: np.ndarray, n_axes: int) -> "FileComponents":
        """Fit `n_axes` components to the labelled `rows` and all unlabelled cells."""
        profiles = vstack([data.profiles[rows], data.unlabelled], format="csr").astype(np.float64)
        pca = PCA(min(n_axes, min(profiles.shape) - 1), svd_solver="arpack", random_state=0)
        offsets = None if data.prior is None else data.prior.scores(profiles)
        return cls(pca, pca.fit_transform(profiles), data.targets[rows], data.n_labels, offsets)

    @cached_property
    def graph(self) -> csr_matrix:
        """The graph of nearest neighbours, which label spreading follows."""
        return neighbour_graph(self.points[:, :SPREAD_COMPONENTS])

    def fit(self, rows: np.ndarray, beside: bool = False) -> LinearModel:
        """Fit a regression to the labelled cells `rows`, `beside` what a checkpoint knows as [`fit_beside`] does."""
        return self.of_profiles(self._regression(self.points, rows, self.targets[rows], beside))

    def fit_spread(self, rows: np.ndarray | None = None, beside: bool = False) -> LinearModel:
        """Fit a regression to the labels that [`spread_labels`] gives to cells, from the labelled cells `rows`.

        By default, all labelled cells are used. Cells that no label reaches are left out. `beside` what a checkpoint
        knows, the probabilities of a regression on the same cells spread, too, with the weight `BELIEF`.
        """
        rows = np.arange(len(self.targets)) if rows is None else rows
        points, known = self.points[:, :SPREAD_COMPONENTS], np.full(len(self.points), -1)
        known[rows] = self.targets[rows]
        beliefs, share = np.zeros((len(points), self.n_labels)), SPREAD_SHARE
        if beside and self.offsets is not None:
            model = self._regression(points, rows, known[rows], beside)
            beliefs, share = BELIEF * softmax(model.scores(points) + self.offsets, axis=1), BELIEF_SHARE
        spread = spread_labels(self.graph, known, beliefs, share)
        reached = np.flatnonzero(spread >= 0)
        return self.of_profiles(self._regression(points, reached, spread[reached], beside))

    def _regression(self, points: np.ndarray, rows: np.ndarray, targets: np.ndarray, beside: bool) -> LinearModel:
        """Fit a regression to `rows` of points, without the offsets that it is `beside`."""
        if not beside or self.offsets is None:
            return fit_regression(points[rows], targets, self.n_labels, DEFAULT_STRENGTH)
        return fit_beside(points[rows], targets, self.n_labels, DEFAULT_STRENGTH, self.offsets[rows])

    def of_profiles(self, model: LinearModel) -> LinearModel:
        """Express a model of the first components as a model of profiles."""
        weights = model.weights @ self.pca.components_[: model.weights.shape[1]]
        return LinearModel(weights, model.bias - weights @ self.pca.mean_)


def spread_labels(graph: csr_matrix, targets: np.ndarray, beliefs: np.ndarray, share: float) -> np.ndarray:
    """Label spreading (Zhou et al. 2004) from labelled to unlabelled cells, with equal total weight for every label.

    Args:
        graph: Weights of neighbours, symmetric `(n_cells, n_cells)`.
        targets: Label of each cell, int64 `(n_cells,)`; -1 if unknown.
        beliefs: Shares of labels from which a cell without a label starts, `(n_cells, n_labels)`; a label has 1.
        share: Of a cell's shares, the part that comes from its neighbours.

    Returns:
        int64 `(n_cells,)`; -1 for cells that no label reaches.
    """
    roots = diags(np.asarray(graph.sum(axis=1)).ravel() ** -0.5)
    start = shares = np.where(targets[:, None] >= 0, np.eye(beliefs.shape[1])[targets], beliefs)
    for _ in range(SPREAD_STEPS):
        shares = share * (roots @ (graph @ (roots @ shares))) + (1 - share) * start
    nearest = (shares / shares.sum(axis=0).clip(min=np.finfo(np.float64).tiny)).argmax(axis=1)
    return np.where(targets >= 0, targets, np.where(shares.any(axis=1), nearest, -1))


def neighbour_graph(points: np.ndarray) -> csr_matrix:
    """The symmetric graph of nearest neighbours, with a weight of 1."""
    graph = kneighbors_graph(points, min(SPREAD_NEIGHBOURS, len(points) - 1), mode="connectivity")
    return graph.maximum(graph.T)


def fit_label_readout(
    data: LabelledProfiles, model: LinearModel, temperature: float, seed: int = 0
) -> ScMMGPTLabelReadout:
    """Combine the regression with statistics of the labelled cells, in which every label has the same weight.

    Args:
        data: Profiles and labels.
        model: The regression.
        temperature: Divisor of the regression's logits.
        seed: Seed of the sample of `FACTOR_CELLS` cells, if there are more.
    """
    rows = np.arange(len(data.targets))
    if len(rows) > FACTOR_CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, FACTOR_CELLS, replace=False))
    targets = data.targets[rows]
    counts = np.bincount(targets, minlength=data.n_labels)
    labels = csr_matrix((1 / counts[targets], (targets, np.arange(len(rows)))), shape=(data.n_labels, len(rows)))
    gene_ids = np.union1d(data.profiles[rows].indices, np.flatnonzero(model.weights.any(axis=0)))
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
    """Principal axes of weighted cells around `mean`, scaled by their standard deviations.

    Returns:
        The axes, `(n_factors, n_genes)`, and the residual variance of each gene, `(n_genes,)`.
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
    # ARPACK's own start is ones, which centred cells of equal weight map to 0.
    start = np.random.default_rng(0).standard_normal(min(profiles.shape))
    _, scales, axes = svds(centred, k=n_factors, v0=start)
    factors = scales[::-1, None] * axes[::-1]
    return factors, (variance - (factors**2).sum(axis=0)).clip(min=0)


def readout_of(model: LinearModel, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias of the readout whose products with the texts are the regression's logits.

    The minimum-norm solution lies in the span of the texts, so that a cell is a mixture of texts. With more labels
    than dimensions, the logits are approximated by least squares.

    Args:
        model: The regression.
        text_features: Embeddings of the labels, `(n_labels, projection_dim)`, on any device.

    Returns:
        Weights `(n_genes, projection_dim)` and bias `(projection_dim,)`, float32, on the CPU.
    """
    to_text_space = torch.linalg.pinv(text_features.cpu().double(), rcond=1e-4).t()  # (n_labels, projection_dim)
    weights = torch.from_numpy(model.weights).t() @ to_text_space
    bias = torch.from_numpy(model.bias) @ to_text_space
    return weights.float(), bias.float()


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, natural logarithm."""
    return F.cross_entropy(torch.from_numpy(np.asarray(logits, dtype=np.float64)), torch.from_numpy(targets)).item()


def losses_of_cells(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of the label of each cell, float64 `(n_cells,)`."""
    cells = torch.from_numpy(np.asarray(logits, dtype=np.float64)), torch.from_numpy(targets)
    return F.cross_entropy(*cells, reduction="none").numpy()


def best_temperature(scores: np.ndarray, targets: np.ndarray) -> float:
    """The temperature with the lowest loss, for scores of any scale; `TEMPERATURES` are for the range of cosines."""
    scale = max(np.abs(scores).max(), 1e-9)
    return float(scale * fit_temperature(scores / scale, targets))


def calibrated_loss(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean negative log-likelihood of scores of any scale, at the temperature with the lowest loss."""
    return negative_log_likelihood(scores / best_temperature(scores, targets), targets)


def fit_temperature(similarity: np.ndarray, targets: np.ndarray) -> float:
    """The one of `TEMPERATURES` with the lowest loss of the labels, for cosines `(n_cells, n_labels)`."""
    return float(min(TEMPERATURES, key=lambda t: negative_log_likelihood(similarity / t, targets)))


def fit_temperature_of_scores(scores: np.ndarray, targets: np.ndarray) -> float:
    """[`fit_temperature`] for logits of a regression; the result is at least 1, so that logits are never sharpened.

    Held-out cells of the same file are more similar to the training cells than cells of other files are. A penalised
    regression is underconfident on them, but a temperature below 1 makes it overconfident on other files
    (`train/LOG.md`).
    """
    return max(1.0, best_temperature(scores, targets))


def modest_loss(scores: np.ndarray, targets: np.ndarray) -> float:
    """Negative log-likelihood of scores of a regression at the temperature of [`fit_temperature_of_scores`]."""
    return negative_log_likelihood(scores / fit_temperature_of_scores(scores, targets), targets)


def fit_similarity_weight(logits: np.ndarray, similarity: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Fit the weight of similarities that are added to the readout's logits.

    Args:
        logits: Logits of the readout, `(n_cells, n_labels)`.
        similarity: Cosine similarities to the texts of the labels, `(n_cells, n_labels)`.
        targets: Labels, int64 `(n_cells,)`.

    Returns:
        The weight, and the sum with the lowest loss. The weight is 0 unless the mean gain in log-likelihood exceeds
        its standard error.
    """
    sums = {weight: logits + weight * similarity for weight in 1 / TEMPERATURES}
    best = min(sums, key=lambda weight: negative_log_likelihood(sums[weight], targets))
    gains = losses_of_cells(logits, targets) - losses_of_cells(sums[best], targets)
    earned = gains.mean() > gains.std() / np.sqrt(len(gains))
    return float(best) if earned else 0.0, sums[best]


def scores_of(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Loss, accuracy and macro-F1 of logits `(n_cells, n_labels)`."""
    predicted = logits.argmax(axis=1)
    return {
        "loss": round(negative_log_likelihood(logits, targets), 4),
        "accuracy": round(float((predicted == targets).mean()), 4),
        "macro_f1": round(float(f1_score(targets, predicted, average="macro", labels=np.unique(targets))), 4),
    }
