"""Measures of the variation of generated cells against real cells of the same types.

Independent noise around one mean profile has the right mean and about the right distances between cells. In real
cells, genes vary together along few axes. These measures detect the difference.
"""

import numpy as np
import ot
from scipy.spatial.distance import cdist
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors


N_TREES = 100
MIN_LEAF = 3
MAX_CLASSIFIED = 2000  # most cells on each side of the classifier
MAX_MATCHED = 200  # most points on each side of Gromov-Wasserstein, whose time is cubic
NUM_AXES = 5  # axes of the variation within types
MIN_CORRELATED = 10  # fewest cells of a type; correlations of fewer cells are noise


def two_sample_auc(generated: np.ndarray, real: np.ndarray, *, seed: int = 0) -> float:
    """Out-of-bag AUROC of a random forest that separates generated `(n, d)` from real points `(m, d)`.

    0.5 means no separation, 1 complete separation. Both sides must have the same proportions of types.
    """
    rng = np.random.default_rng(seed)
    sides = [side[rng.permutation(len(side))[:MAX_CLASSIFIED]] for side in (generated, real)]
    points, is_generated = np.concatenate(sides), np.repeat([1, 0], [len(side) for side in sides])
    forest = RandomForestClassifier(
        N_TREES, min_samples_leaf=MIN_LEAF, class_weight="balanced", oob_score=True, random_state=seed, n_jobs=-1
    ).fit(points, is_generated)
    scores = forest.oob_decision_function_[:, 1]
    known = np.isfinite(scores)  # a point in every bag has no out-of-bag score
    return float(roc_auc_score(is_generated[known], scores[known]))


def gromov_wasserstein(generated: np.ndarray, real: np.ndarray) -> float:
    """Difference between the distances among generated `(n, d)` and among real points `(m, d)`, at the best matching.

    The value is the root of POT's Gromov-Wasserstein loss, in units of the mean distance between real points. It does
    not depend on absolute positions.
    """
    inner = [cdist(thin, thin) for thin in (points[:: -(-len(points) // MAX_MATCHED)] for points in (generated, real))]
    unit = inner[1].mean() or 1.0
    loss = ot.gromov_wasserstein2(*(matrix / unit for matrix in inner), symmetric=True)
    return float(np.sqrt(max(loss, 0.0)))


def match_proportions(
    labels: np.ndarray, real_labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows of two sets of cells, with the same number of cells of each type on both sides."""
    mine, theirs = [], []
    for label in np.intersect1d(labels, real_labels):
        sides = [np.flatnonzero(side == label) for side in (labels, real_labels)]
        n = min(map(len, sides))
        mine.append(rng.permutation(sides[0])[:n])
        theirs.append(rng.permutation(sides[1])[:n])
    return np.concatenate(mine), np.concatenate(theirs)


def gene_correlation(cells: np.ndarray) -> tuple[float, float]:
    """Mean absolute correlation of pairs of genes, and the largest eigenvalue of the correlation matrix.

    A gene without variance has correlation 0. Both values grow as the number of cells falls, so compare equal numbers
    of cells.

    Args:
        cells: log1p(CP10k) of one type, `(n_cells, n_genes)`.
    """
    cells = np.asarray(cells, dtype=np.float64)
    varies = np.ptp(cells, axis=0) > 0
    matrix = np.eye(cells.shape[1])
    if varies.any():
        matrix[np.ix_(varies, varies)] = np.corrcoef(cells[:, varies], rowvar=False)
    off_diagonal = np.abs(matrix[np.triu_indices(len(matrix), 1)])
    return float(off_diagonal.mean()), float(np.linalg.eigvalsh(matrix)[-1])


def variation_axes(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Leading principal axes of real points `(n, d)`, centred by type; `(d, n_axes)`."""
    centred = np.concatenate(
        [points[labels == label] - points[labels == label].mean(0) for label in np.unique(labels)]
    )
    return np.linalg.svd(centred, full_matrices=False)[2][:NUM_AXES].T


def nearest_distances(points: np.ndarray, training_points: np.ndarray) -> np.ndarray:
    """Distance of each point `(n, d)` to the nearest of the training points `(m, d)`, `(n,)`: 0 for a copy."""
    if len(points) * len(training_points) <= 10_000_000:
        return cdist(points, training_points).min(axis=1)
    return NearestNeighbors(n_neighbors=1).fit(training_points).kneighbors(points)[0][:, 0]
