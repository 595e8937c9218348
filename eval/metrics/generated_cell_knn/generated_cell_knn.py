"""Generated cells judged by real ones: k-NN accuracy of the prompted type, and distances to real cells of that type.

The protocol of Cell2Sentence (k = 3, 5, 10, 25, neighbours among real held-out cells), in a space that no model under
test has learnt: principal components of real *training* cells.

>>> import evaluate
>>> metric = evaluate.load("eval/metrics/generated_cell_knn")                                         # doctest: +SKIP
>>> metric.compute(references=prompted_types, generated=generated, real=real, real_labels=labels,
...                train=train)                                                                       # doctest: +SKIP
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import ot
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from scmmgpt.eval.distances import energy_distance, median_distance, mmd_squared


KS = (3, 5, 10, 25)
N_COMPONENTS = 50
N_PROJECTIONS = 200  # directions of the sliced Wasserstein distance
MIN_CELLS = 3  # of a type on each side; with fewer, the distance between two samples is mostly noise

_DESCRIPTION = """
Judges generated cells by real ones in the principal components of real training cells: the accuracy with which k
nearest real neighbours give a generated cell the type it was asked for, and the energy distance, MMD squared and
sliced Wasserstein distance to the real cells of that type, averaged over types.
"""

_KWARGS_DESCRIPTION = """
Args:
    references (list of str): the type that each generated cell was asked for.
    generated (array of shape (n_generated, n_genes)): generated expression, log1p of counts per 10,000.
    real (array or scipy sparse of shape (n_real, n_genes)): held-out real cells, the same genes and units.
    real_labels (list of str): types of the real cells.
    train (array or scipy sparse of shape (n_train, n_genes)): real training cells, which define the space.
    ks (sequence of int): numbers of neighbours, default 3, 5, 10, 25; those above n_real are left out.
    n_components (int): principal components, default 50.
Returns:
    knn_accuracy_<k> for each k, energy_distance, mmd2, sliced_wasserstein (NaN where no type has enough cells).
"""


def fit_cell_space(train, *, n_components: int = N_COMPONENTS, seed: int = 0) -> PCA:
    """Principal components of real training cells.

    Args:
        train: log1p(CP10k) expression, shape `(n_train, n_genes)`, dense or scipy sparse.
        n_components: At most this many; fewer where there are fewer cells or genes.
        seed: Seed of the truncated solvers.
    """
    n_components = min(n_components, min(train.shape) - 1)
    if n_components < 1:
        raise ValueError(f"Principal components need two cells and two genes at least, but got {train.shape}.")
    solver = "arpack" if sparse.issparse(train) else "auto"
    return PCA(n_components, svd_solver=solver, random_state=seed).fit(train)


def knn_accuracy(
    points: np.ndarray,
    labels: Sequence[str],
    reference_points: np.ndarray,
    reference_labels: Sequence[str],
    *,
    ks: Sequence[int] = KS,
) -> dict[int, np.ndarray]:
    """Whether the k nearest reference points vote for each point's own label.

    Args:
        points: Shape `(n, d)`.
        labels: The label that each point should get.
        reference_points: Shape `(m, d)`.
        reference_labels: Labels of the reference points.
        ks: Numbers of neighbours, each at most m.

    Returns:
        For each k a boolean array `(n,)`; its mean is the accuracy.
    """
    labels, reference_labels = np.asarray(labels).astype(str), np.asarray(reference_labels).astype(str)
    if max(ks) > len(reference_points):
        raise ValueError(
            f"Asked for {max(ks)} neighbours among {len(reference_points)} real cells. "
            "Pass a smaller `ks`, or more cells."
        )
    return {k: KNeighborsClassifier(k).fit(reference_points, reference_labels).predict(points) == labels for k in ks}


def distances_by_type(
    points: np.ndarray,
    labels: Sequence[str],
    reference_points: np.ndarray,
    reference_labels: Sequence[str],
    *,
    bandwidth: float | None = None,
    min_cells: int = MIN_CELLS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Distances between the points and the reference points of each type.

    Args:
        points: Shape `(n, d)`.
        labels: Type of each point.
        reference_points: Shape `(m, d)`.
        reference_labels: Type of each reference point.
        bandwidth: Of the MMD's kernel; the median distance between reference points where `None`.
        min_cells: Types with fewer cells on either side are left out.
        seed: Seed of the directions of the sliced Wasserstein distance.

    Returns:
        `{type: {"energy_distance", "mmd2", "sliced_wasserstein"}}`.
    """
    labels, reference_labels = np.asarray(labels).astype(str), np.asarray(reference_labels).astype(str)
    bandwidth = median_distance(reference_points) if bandwidth is None else bandwidth
    result = {}
    for label in np.unique(reference_labels):
        x, y = points[labels == label], reference_points[reference_labels == label]
        if min(len(x), len(y)) < max(min_cells, 2):
            continue
        result[str(label)] = {
            "energy_distance": energy_distance(x, y),
            "mmd2": mmd_squared(x, y, bandwidth=bandwidth),
            "sliced_wasserstein": float(
                ot.sliced_wasserstein_distance(
                    np.asarray(x, dtype=np.float64),
                    np.asarray(y, dtype=np.float64),
                    n_projections=N_PROJECTIONS,
                    seed=seed,
                )
            ),
        }
    return result


def generated_cell_scores(
    generated,
    prompts: Sequence[str],
    real,
    real_labels: Sequence[str],
    train,
    *,
    ks: Sequence[int] = KS,
    n_components: int = N_COMPONENTS,
    seed: int = 0,
) -> dict[str, float]:
    """All scores of generated cells, see the module.

    Args:
        generated: log1p(CP10k), shape `(n_generated, n_genes)`, dense or scipy sparse.
        prompts: The type that each generated cell was asked for.
        real: Held-out real cells, shape `(n_real, n_genes)`.
        real_labels: Types of the real cells.
        train: Real training cells, shape `(n_train, n_genes)`.
        ks: Numbers of neighbours; those above n_real are left out.
        n_components: Principal components of the training cells.
        seed: Seed of the solvers and of the sliced Wasserstein distance.
    """
    widths = {name: matrix.shape[1] for name, matrix in (("generated", generated), ("real", real), ("train", train))}
    if len(set(widths.values())) > 1:
        raise ValueError(f"Expected the same genes in every matrix, but got widths {widths}. Select the shared genes.")
    space = fit_cell_space(train, n_components=n_components, seed=seed)
    points, reference_points = space.transform(generated), space.transform(real)
    hits = knn_accuracy(
        points, prompts, reference_points, real_labels, ks=[k for k in ks if k <= len(reference_points)]
    )
    distances = distances_by_type(points, prompts, reference_points, real_labels, seed=seed).values()
    return {f"knn_accuracy_{k}": float(hit.mean()) for k, hit in hits.items()} | {
        name: float(np.mean([d[name] for d in distances])) if distances else float("nan")
        for name in ("energy_distance", "mmd2", "sliced_wasserstein")
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class GeneratedCellKnn(evaluate.Metric):
    """`evaluate` module around `generated_cell_scores`; the matrices never enter `evaluate`'s table."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"references": datasets.Value("string")}),
        )

    def _compute(self, references, *, generated, real, real_labels, train, **options):
        return generated_cell_scores(generated, references, real, real_labels, train, **options)
