"""Distances between two samples of points: MMD and energy distance, with bootstrap weights.

Both are the same statistic, `E k(x, x') + E k(y, y') - 2 E k(x, y)`, for two kernels: a Gaussian one gives the squared
maximum mean discrepancy (Gretton et al. 2012), the negative Euclidean distance gives the energy distance
(Székely & Rizzo 2013; scPerturb's E-distance without the square). Computed from kernel matrices, so that a thousand
bootstrap replicates cost three matrix products.
"""

import numpy as np
from scipy.spatial.distance import cdist, pdist


def median_distance(points: np.ndarray, *, max_points: int = 2000, seed: int = 0) -> float:
    """Median Euclidean distance between points, the usual bandwidth of a Gaussian kernel.

    Fix it on real data and use it for every system that is compared, or each is measured with a ruler of its own.

    Args:
        points: Shape `(n, d)`, n >= 2.
        max_points: More points than this are subsampled; the median hardly moves and the cost is quadratic.
        seed: Seed of the subsample.

    Returns:
        The median; the mean where more than half of all pairs coincide, and 1.0 where all do.
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) > max_points:
        points = points[np.random.default_rng(seed).choice(len(points), max_points, replace=False)]
    distances = pdist(points)
    return float(np.median(distances) or distances.mean() or 1.0)


def gaussian_kernel(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """`exp(-|x - y|^2 / (2 bandwidth^2))`, shape `(len(x), len(y))`."""
    return np.exp(-cdist(x, y, "sqeuclidean") / (2 * bandwidth**2))


def distance_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`-|x - y|`, shape `(len(x), len(y))`: the kernel whose discrepancy is the energy distance."""
    return -cdist(x, y)


def discrepancy(
    k_xx: np.ndarray,
    k_yy: np.ndarray,
    k_xy: np.ndarray,
    *,
    unbiased: bool = True,
    x_weights: np.ndarray | None = None,
    y_weights: np.ndarray | None = None,
) -> np.ndarray:
    """`E k(x, x') + E k(y, y') - 2 E k(x, y)` from the three kernel matrices.

    Args:
        k_xx: Kernel matrix of x with itself, shape `(n, n)`.
        k_yy: Kernel matrix of y with itself, shape `(m, m)`.
        k_xy: Kernel matrix of x with y, shape `(n, m)`.
        unbiased: Leave pairs of a point with itself out of the first two means. The result is then zero on average
            for two samples of one distribution, and may be negative.
        x_weights: Weights of the points of x, shape `(n_replicates, n)`; a bootstrap replicate is the count of each
            point in a draw with replacement. Copies of one point are one point in the sense of `unbiased`.
        y_weights: Weights of the points of y, shape `(n_replicates, m)`.

    Returns:
        Shape `(n_replicates,)`; a scalar array without weights.
    """
    single = x_weights is None and y_weights is None
    wx = np.ones((1, len(k_xx))) if x_weights is None else np.asarray(x_weights, dtype=np.float64)
    wy = np.ones((1, len(k_yy))) if y_weights is None else np.asarray(y_weights, dtype=np.float64)

    def within(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total, pairs = ((weights @ kernel) * weights).sum(1), weights.sum(1) ** 2
        if unbiased:
            total = total - (weights**2) @ np.diag(kernel)
            pairs = pairs - (weights**2).sum(1)
        # A replicate that drew one point only has no pair; NaN says so and percentiles leave it out.
        return np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 0)

    between = ((wx @ k_xy) * wy).sum(1) / (wx.sum(1) * wy.sum(1))
    result = within(k_xx, wx) + within(k_yy, wy) - 2 * between
    return result[0] if single else result


def mmd_squared(x: np.ndarray, y: np.ndarray, *, bandwidth: float | None = None, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel.

    Args:
        x: Sample of shape `(n, d)`, n >= 2.
        y: Sample of shape `(m, d)`, m >= 2.
        bandwidth: Width of the kernel; the median distance within `y`, the real data, where `None`.
        unbiased: The U-statistic, zero on average for equal distributions and possibly negative.

    Returns:
        MMD squared, between about 0 and 2.
    """
    x, y = _check_samples(x, y)
    bandwidth = median_distance(y) if bandwidth is None else bandwidth
    kernels = (gaussian_kernel(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y)))
    return float(discrepancy(*kernels, unbiased=unbiased))


def energy_distance(x: np.ndarray, y: np.ndarray, *, unbiased: bool = True) -> float:
    """Energy distance `2 E|x - y| - E|x - x'| - E|y - y'|`, in the units of the points.

    Args:
        x: Sample of shape `(n, d)`, n >= 2.
        y: Sample of shape `(m, d)`, m >= 2.
        unbiased: The U-statistic, zero on average for equal distributions and possibly negative.
    """
    x, y = _check_samples(x, y)
    return float(discrepancy(distance_kernel(x, x), distance_kernel(y, y), distance_kernel(x, y), unbiased=unbiased))


def _check_samples(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"Expected two samples (n, d) and (m, d) of the same width, but got {x.shape} and {y.shape}.")
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"A distance between samples needs two points in each, but got {len(x)} and {len(y)}.")
    return x, y
