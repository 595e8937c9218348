"""Generated against real cells: k-NN accuracy of the prompted type, and distances to real cells of the same type.

The protocol is that of Cell2Sentence: k = 3, 5, 10, 25, with neighbours among real held-out cells. The space is
principal components of further real cells (`train`). These cells must not be the training cells of the generator,
because components fit noise of their cells, and must not be among the compared cells.

MMD and energy distance are one statistic with two kernels, the unbiased `E k(x, x') + E k(y, y') - 2 E k(x, y)`. It is
zero on average for two samples of one distribution, and may be negative. A Gaussian kernel gives the squared maximum
mean discrepancy (Gretton et al. 2012), the negative Euclidean distance the energy distance (Székely & Rizzo 2013;
scPerturb's E-distance without the square). From kernel matrices, a thousand bootstrap replicates cost three products.

`evaluate.load` reads this file by its path: it imports nothing of the package, and the package may import it.

>>> import evaluate
>>> metric = evaluate.load("eval/metrics/generated_cell_knn")                                         # doctest: +SKIP
>>> metric.compute(references=prompted_types, generated=generated, real=real, real_labels=labels,
...                train=further_real)                                                                # doctest: +SKIP
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import ot
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier


CITATION = """@inproceedings{levine2024cell2sentence,
  title={Cell2Sentence: Teaching Large Language Models the Language of Biology},
  author={Levine, Daniel and others},
  booktitle={International Conference on Machine Learning},
  year={2024}
}
@article{gretton2012kernel,
  title={A Kernel Two-Sample Test},
  author={Gretton, Arthur and Borgwardt, Karsten M. and Rasch, Malte J. and Schoelkopf, Bernhard and Smola, Alexander},
  journal={Journal of Machine Learning Research},
  volume={13},
  year={2012}
}"""
KS = (3, 5, 10, 25)
N_COMPONENTS = 50
MIN_CELLS = 3  # fewest cells of a type on each side; the distance of smaller samples is mostly noise


def median_distance(points: np.ndarray, *, seed: int = 0) -> float:
    """Median Euclidean distance between points `(n, d)`, the usual bandwidth of a Gaussian kernel.

    The cost is quadratic, so larger samples are cut to 2,000 points. A median of 0 is replaced by the mean, and a mean
    of 0 by 1. Compute the bandwidth once, on real data: distances under different bandwidths cannot be compared.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) > 2000:
        points = points[np.random.default_rng(seed).choice(len(points), 2000, replace=False)]
    distances = pdist(points)
    return float(np.median(distances) or distances.mean() or 1.0)


def gaussian_kernel(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """`exp(-|x - y|^2 / (2 bandwidth^2))`, shape `(len(x), len(y))`."""
    return np.exp(-cdist(x, y, "sqeuclidean") / (2 * bandwidth**2))


def distance_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`-|x - y|`, shape `(len(x), len(y))`: the kernel of the energy distance."""
    return -cdist(x, y)


def discrepancy(
    k_xx: np.ndarray, k_yy: np.ndarray, k_xy: np.ndarray, *, wx: np.ndarray | None = None, wy: np.ndarray | None = None
) -> np.ndarray:
    """`E k(x, x') + E k(y, y') - 2 E k(x, y)` from the three kernel matrices, without pairs of a point with itself.

    Args:
        k_xx: Kernel matrix of x with itself, shape `(n, n)`.
        k_yy: Kernel matrix of y with itself, shape `(m, m)`.
        k_xy: Kernel matrix of x with y, shape `(n, m)`.
        wx: Weights of the points of x, shape `(n_replicates, n)`. The weights of a bootstrap replicate are the counts
            of each point in a draw with replacement; two copies of one point are not a pair.
        wy: Weights of the points of y, shape `(n_replicates, m)`.

    Returns:
        Shape `(n_replicates,)`; a scalar array without weights.
    """
    single = wx is None and wy is None
    wx = np.ones((1, len(k_xx))) if wx is None else np.asarray(wx, dtype=np.float64)
    wy = np.ones((1, len(k_yy))) if wy is None else np.asarray(wy, dtype=np.float64)

    def within(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total = ((weights @ kernel) * weights).sum(1) - (weights**2) @ np.diag(kernel)
        pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
        # A replicate of one repeated point has no pair. Its value is NaN, which percentiles leave out.
        return np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 0)

    between = ((wx @ k_xy) * wy).sum(1) / (wx.sum(1) * wy.sum(1))
    result = within(k_xx, wx) + within(k_yy, wy) - 2 * between
    return result[0] if single else result


def kernel_matrices(kernel: Callable[..., np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """The three matrices that [`discrepancy`] takes, of samples `(n, d)` and `(m, d)`, n, m >= 2."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"Samples of shapes {x.shape} and {y.shape} cannot be compared. Give two of the same width.")
    if len(x) < 2 or len(y) < 2:
        raise ValueError(
            f"Samples of {len(x)} and {len(y)} points have no distance. Give at least two points of each."
        )
    return [kernel(a, b) for a, b in ((x, x), (y, y), (x, y))]


def fit_cell_space(train: np.ndarray | sparse.csr_matrix, *, n_components: int = N_COMPONENTS, seed: int = 0) -> PCA:
    """Fit principal components to log1p(CP10k) `(n_train, n_genes)`; fewer for fewer cells or genes."""
    n_components = min(n_components, min(train.shape) - 1)
    if n_components < 1:
        raise ValueError(f"Cells of shape {train.shape} have no components. Give at least two cells and two genes.")
    solver = "arpack" if sparse.issparse(train) else "auto"
    return PCA(n_components, svd_solver=solver, random_state=seed).fit(train)


def knn_accuracy(
    points: np.ndarray,
    labels: ArrayLike,
    reference_points: np.ndarray,
    reference_labels: ArrayLike,
    *,
    ks: Sequence[int] = KS,
) -> dict[int, np.ndarray]:
    """For each k, whether the k nearest of m reference points vote for the label of each point, bool `(n,)`.

    Points have the shapes `(n, d)` and `(m, d)`.
    """
    of_point, of_reference = np.asarray(labels).astype(str), np.asarray(reference_labels).astype(str)
    if max(ks) > len(reference_points):
        raise ValueError(
            f"There are no {max(ks)} neighbours among {len(reference_points)} real cells. "
            "Pass a smaller `ks`, or more cells."
        )
    return {k: KNeighborsClassifier(k).fit(reference_points, of_reference).predict(points) == of_point for k in ks}


def distances_by_type(
    points: np.ndarray, labels: ArrayLike, reference_points: np.ndarray, reference_labels: ArrayLike, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Distances between points `(n, d)` and reference points `(m, d)` of each type, with one bandwidth for all types.

    They are `{type: {"energy_distance", "mmd2", "sliced_wasserstein"}}` of types with `MIN_CELLS` cells on each side.
    """
    of_point, of_reference = np.asarray(labels).astype(str), np.asarray(reference_labels).astype(str)
    gaussian = functools.partial(gaussian_kernel, bandwidth=median_distance(reference_points))
    result = {}
    for label in np.unique(of_reference):
        x = np.asarray(points[of_point == label], dtype=np.float64)
        y = np.asarray(reference_points[of_reference == label], dtype=np.float64)
        if min(len(x), len(y)) >= MIN_CELLS:
            result[str(label)] = {
                "energy_distance": float(discrepancy(*kernel_matrices(distance_kernel, x, y))),
                "mmd2": float(discrepancy(*kernel_matrices(gaussian, x, y))),
                "sliced_wasserstein": float(ot.sliced_wasserstein_distance(x, y, n_projections=200, seed=seed)),
            }
    return result


def generated_cell_scores(
    generated: np.ndarray | sparse.csr_matrix,
    references: ArrayLike,
    real: np.ndarray | sparse.csr_matrix,
    real_labels: ArrayLike,
    train: np.ndarray | sparse.csr_matrix,
    *,
    ks: Sequence[int] = KS,
    n_components: int = N_COMPONENTS,
    seed: int = 0,
) -> dict[str, float]:
    """All scores of generated cells.

    Args:
        generated: log1p(CP10k), shape `(n_generated, n_genes)`, dense or scipy sparse.
        references: Prompted type of each generated cell.
        real: Held-out real cells, shape `(n_real, n_genes)`.
        real_labels: Types of the real cells.
        train: Real cells for the principal components, shape `(n_train, n_genes)`; no generator may have seen them.
        ks: Numbers of neighbours; values above n_real are left out.
        n_components: Number of principal components.
        seed: Seed of the solvers and of the 200 directions of the sliced Wasserstein distance.

    Returns:
        `knn_accuracy_<k>` for each k, and `energy_distance`, `mmd2` and `sliced_wasserstein`, averaged over types with
        at least three cells on each side; NaN if there is no such type.
    """
    widths = {name: matrix.shape[1] for name, matrix in (("generated", generated), ("real", real), ("train", train))}
    if len(set(widths.values())) > 1:
        raise ValueError(f"The matrices have different numbers of genes, {widths}. Select the shared genes.")
    for what, cells, types in (("generated", generated, references), ("real", real, real_labels)):
        n_types = len(np.asarray(types))
        if cells.shape[0] != n_types or not n_types:
            raise ValueError(
                f"Expected one type for each of the {what} cells, but got {n_types} types for {cells.shape[0]} cells."
            )
    space = fit_cell_space(train, n_components=n_components, seed=seed)
    points, reference_points = space.transform(generated), space.transform(real)
    hits = knn_accuracy(
        points, references, reference_points, real_labels, ks=[k for k in ks if k <= len(reference_points)]
    )
    distances = distances_by_type(points, references, reference_points, real_labels, seed=seed).values()
    return {f"knn_accuracy_{k}": float(hit.mean()) for k, hit in hits.items()} | {
        name: float(np.mean([d[name] for d in distances])) if distances else float("nan")
        for name in ("energy_distance", "mmd2", "sliced_wasserstein")
    }


class GeneratedCellKnn(evaluate.Metric):
    """`evaluate` module around `generated_cell_scores`; the matrices never enter `evaluate`'s table."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=generated_cell_scores.__doc__,
            features=datasets.Features({"references": datasets.Value("string")}),
        )

    def _compute(self, references: list[str], **inputs: Any) -> dict[str, float]:
        return generated_cell_scores(references=references, **inputs)
