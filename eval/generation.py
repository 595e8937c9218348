"""Evaluate cells generated from text against real held-out cells, with mean profiles as baselines.

python -m scmmgpt.eval generation --corpus corpus --generated generated.h5ad --output generation.json
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from scmmgpt.cells_scmmgpt import log1p_cp10k
from scmmgpt.eval import baselines, results
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.eval.metrics.generated_cell_knn import generated_cell_knn as knn
from scmmgpt.eval.task import run_task


logger = logging.getLogger(__name__)

PROMPT_KEYS = ("label", "cell_type")  # obs columns of generated cells that may hold the prompted type
MIN_GENES = 20  # fewer shared genes do not tell types apart
MAX_VARIABLE_GENES = 2000  # for the correlation of profiles
RESERVED_SHARE = 0.2  # of the training cells: not used for the components, but as real cells beside generated ones
MAX_PER_TYPE = 500  # cells of a type on each side of a distance

MEASURES = {
    **{
        f"knn_accuracy_{k}": results.Measure(
            f"{k}-NN accuracy",
            True,
            f"Share of generated cells whose {k} nearest real held-out cells vote for the prompted type, averaged "
            "over types. Cells more typical than real cells score above real cells: see the distances as well.",
        )
        for k in knn.KS
    },
    "energy_distance": results.Measure(
        "E-distance",
        False,
        "Unbiased energy distance between generated and real held-out cells of one type, averaged over types.",
    ),
    "mmd2": results.Measure(
        "MMD²",
        False,
        "Unbiased squared maximum mean discrepancy of the same cells, with one bandwidth from all held-out cells.",
    ),
    "profile_correlation": results.Measure(
        "profile correlation",
        True,
        "Pearson correlation over genes between the mean profiles of generated and real held-out cells of a type, "
        "each minus the mean of all training cells, averaged over types.",
    ),
    "diversity": results.Measure(
        "diversity",
        None,
        "Mean distance between generated cells of a type, divided by that between real cells, averaged over types: "
        "1 is right, 0 means copies of one cell. The interval leaves out bootstrap draws with a single real cell of a "
        "type, for which the ratio is undefined; if these are half of the draws or more, there is no interval.",
    ),
}


def evaluate_generation(
    generated: np.ndarray,
    prompts: ArrayLike,
    genes: ArrayLike,
    train: LabelledCells,
    test: LabelledCells,
    *,
    n_resamples: int = results.N_RESAMPLES,
    seed: int = 0,
) -> dict:
    """Score generated cells beside the baselines, all in principal components of real training cells.

    Args:
        generated: log1p(CP10k), shape `(n_generated, n_genes)`.
        prompts: Prompted type of each generated cell.
        genes: Symbols of the columns; genes that no training cell has are left out.
        train: Real training cells, for the space and the baselines.
        test: Real held-out cells, the truth.
        n_resamples: Bootstrap replicates of the intervals.
        seed: Seed of all random draws.

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `per_type` and sizes.
    """
    types = np.asarray(prompts).astype(str)
    generated, train, test = align_genes(generated, genes, train, test)
    kept = _types_with_real_cells(types, train, test)
    generated, types = generated[kept], types[kept]
    reserved = reserve_cells(train.labels, seed=seed)
    # Components fit some noise of their own cells: compared cells must not be among these.
    space = knn.fit_cell_space(train.expression[~reserved], seed=seed)
    real_cells, real_types = draw_real_cells(types, train.take(np.flatnonzero(reserved)), seed=seed)
    systems = {
        results.MODEL_NAME: (results.MODEL, generated, types),
        "mean profile + Poisson": (results.BASELINE, baselines.poisson_cells(types, train, seed=seed), types),
        "mean profile": (results.BASELINE, baselines.mean_cells(types, train), types),
        "shuffled prompts": (results.CONTROL, generated, baselines.shuffled(types, seed=seed).astype(str)),
        "real training cells": (results.REFERENCE, real_cells, real_types),
    }
    truth = HeldOutCells.of(train.expression, test, space.transform(test.expression), seed)
    estimates, per_type = {}, {}
    for name, (_, cells, labels) in systems.items():
        points = space.transform(cells)
        estimates[name], per_type[name] = _estimates(cells, labels, points, truth, n_resamples=n_resamples, seed=seed)
    roles = {name: role for name, (role, _, _) in systems.items()}
    result = {"task": "generation"} | results.tabulate(MEASURES, roles, estimates)
    result |= {"n_generated": len(types), "n_left_out": int((~kept).sum()), "n_real": len(test), "n_train": len(train)}
    result |= {"n_genes": len(test.genes), "n_components": int(space.n_components_), "bandwidth": truth.bandwidth}
    return result | {
        "n_resamples": n_resamples,
        "seed": seed,
        "types_in_distances": sorted(per_type[results.MODEL_NAME]),
        "per_type": per_type,
    }


def _types_with_real_cells(types: np.ndarray, train: LabelledCells, test: LabelledCells) -> np.ndarray:
    """Whether there are training and test cells of each prompted type, bool `(n_generated,)`."""
    kept = np.isin(types, test.labels) & np.isin(types, train.labels)
    if not kept.any():
        raise ValueError(
            f"No prompted type ({np.unique(types).tolist()}) is among the types of training and held-out cells "
            f"({np.intersect1d(test.labels, train.labels).tolist()}). "
            "Name the column of the prompts with --prompt-key."
        )
    if not kept.all():
        unknown = np.unique(types[~kept]).tolist()
        logger.warning("Left out %d generated cells of types without real cells: %s.", (~kept).sum(), unknown)
    return kept


@dataclass(frozen=True)
class HeldOutCells:
    """Real held-out cells in the form that comparisons with generated cells need."""

    points: np.ndarray  # principal components, `(n_real, n_components)`
    labels: np.ndarray  # types, `(n_real,)`
    bandwidth: float  # of the Gaussian kernel, for all systems
    columns: np.ndarray  # positions of the most variable genes of the training cells
    profiles: np.ndarray  # log1p(CP10k) of the held-out cells over the variable genes, `(n_real, n_columns)`
    center: np.ndarray  # mean log1p(CP10k) of all training cells over the variable genes, `(n_columns,)`

    @classmethod
    def of(
        cls, train_expression: sparse.csr_matrix, test: LabelledCells, points: np.ndarray, seed: int
    ) -> "HeldOutCells":
        """Choose the bandwidth from the held-out cells, and the genes of profiles from the training cells."""
        mean = np.asarray(train_expression.mean(0)).ravel()
        variance = np.asarray(train_expression.multiply(train_expression).mean(0)).ravel() - mean**2
        columns = np.sort(np.argsort(-variance, kind="stable")[:MAX_VARIABLE_GENES])
        profiles = test.expression[:, columns].toarray()
        return cls(points, test.labels, knn.median_distance(points, seed=seed), columns, profiles, mean[columns])


def reserve_cells(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Mark a share of the cells of each type, at least one, but never the only cell of a type; bool `(n_cells,)`."""
    rng = np.random.default_rng(seed)
    reserved = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            reserved[rng.choice(rows, max(round(RESERVED_SHARE * len(rows)), 1), replace=False)] = True
    return reserved


def draw_real_cells(prompts: np.ndarray, cells: LabelledCells, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """log1p(CP10k) `(n_cells, n_genes)` and types of random cells: of each type as many as prompts, or all cells."""
    rng = np.random.default_rng(seed)
    wanted = zip(*np.unique(prompts, return_counts=True), strict=True)
    rows = np.concatenate([rng.permutation(np.flatnonzero(cells.labels == label))[:n] for label, n in wanted])
    return cells.expression[rows].toarray(), cells.labels[rows]


def align_genes(
    generated: np.ndarray, genes: ArrayLike, train: LabelledCells, test: LabelledCells
) -> tuple[np.ndarray, LabelledCells, LabelledCells]:
    """Bring generated, training and held-out cells onto the genes that all of them have."""
    symbols = np.asarray(genes).astype(str)
    if generated.shape[1] != len(symbols) or len(set(symbols)) != len(symbols):
        raise ValueError(
            f"Generated cells of shape {generated.shape} need as many distinct genes, but got {len(symbols)}."
        )
    is_shared = np.isin(symbols, train.genes)
    shared = symbols[is_shared]
    if len(shared) < MIN_GENES:
        raise ValueError(
            f"Generated and real cells share {len(shared)} genes; at least {MIN_GENES} are needed. "
            "Generate the genes of the corpus, named by the symbols of its vocabulary."
        )
    if len(shared) < len(symbols):
        unknown = len(symbols) - len(shared)
        logger.info("Left out %d of %d generated genes: no training cell has them.", unknown, len(symbols))
    # A gene without a count in the held-out cells is a zero there, not a missing gene.
    return np.asarray(generated)[:, is_shared], train.select_genes(shared), test.select_genes(shared)


def _estimates(
    cells: np.ndarray, labels: np.ndarray, points: np.ndarray, truth: HeldOutCells, *, n_resamples: int, seed: int
) -> tuple[dict[str, results.Estimate], dict[str, dict[str, float | None]]]:
    """Estimates of one system, and values by type.

    The system has log1p(CP10k) `cells` `(n, n_genes)` of the prompted types `labels` `(n,)`, in principal components
    `points` `(n, n_components)`.
    """
    n = len(labels)
    draws = results.bootstrap_draws(n, n_resamples=n_resamples, seed=seed)
    ks = [k for k in knn.KS if k <= len(truth.points)]
    hits = knn.knn_accuracy(points, labels, truth.points, truth.labels, ks=ks) if ks else {}
    _, types, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    equal = 1 / sizes[types]  # all types have equal weight
    estimates = {f"knn_accuracy_{k}": results.mean_estimate(hit, draws, weights=equal) for k, hit in hits.items()}
    by_type = {}
    for label in np.unique(labels):
        mine, theirs = (np.flatnonzero(of == label)[:MAX_PER_TYPE] for of in (labels, truth.labels))
        if len(mine) >= 2 and len(theirs) >= knn.MIN_CELLS:
            by_type[str(label)] = _compare_samples(cells[mine], points[mine], truth, theirs, n_resamples, seed)
    for name in ("energy_distance", "mmd2", "profile_correlation", "diversity"):
        measured = [of_type[name] for of_type in by_type.values() if np.isfinite(of_type[name][0])]
        if measured:
            value = float(np.mean([value for value, _ in measured]))
            replicates = np.mean([replicates for _, replicates in measured], axis=0)
            usable = np.isfinite(replicates).mean() > 0.5 or name != "diversity"
            estimates[name] = results.Estimate(value, n, results.recentre(value, replicates) if usable else None)
    return estimates, {
        label: {name: value if np.isfinite(value) else None for name, (value, _) in measured.items()}
        | {f"knn_accuracy_{k}": float(hit[labels == label].mean()) for k, hit in hits.items()}
        for label, measured in by_type.items()
    }


def _compare_samples(
    cells: np.ndarray, x: np.ndarray, truth: HeldOutCells, rows: np.ndarray, n_resamples: int, seed: int
) -> dict[str, tuple[float, np.ndarray]]:
    """Value and replicates of each measure, for the cells (points x) of one type and the held-out cells `rows`."""
    y = truth.points[rows]
    wx = results.bootstrap_draws(len(x), n_resamples=n_resamples, seed=seed)
    wy = results.bootstrap_draws(len(y), n_resamples=n_resamples, seed=seed + 1)
    pairs = ((x, x), (y, y), (x, y))
    kernels = {
        "energy_distance": [knn.distance_kernel(a, b) for a, b in pairs],
        "mmd2": [knn.gaussian_kernel(a, b, truth.bandwidth) for a, b in pairs],
    }
    measured = {name: (float(knn.discrepancy(*k)), knn.discrepancy(*k, wx=wx, wy=wy)) for name, k in kernels.items()}
    profiles = cells[:, truth.columns], truth.profiles[rows]
    measured["profile_correlation"] = _profile_correlation(*profiles, truth.center, wx, wy)
    x_distances, y_distances, _ = (-k for k in kernels["energy_distance"])
    return measured | {"diversity": diversity(x_distances, y_distances, wx, wy)}


def _profile_correlation(
    x: np.ndarray, y: np.ndarray, center: np.ndarray, wx: np.ndarray, wy: np.ndarray
) -> tuple[float, np.ndarray]:
    """Correlation over genes of the mean profiles of x and y, both minus `center`, and its replicates."""

    def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)

    value = correlate(x.mean(0, keepdims=True) - center, y.mean(0, keepdims=True) - center)[0]
    replicates = correlate(wx @ x / wx.sum(1, keepdims=True) - center, wy @ y / wy.sum(1, keepdims=True) - center)
    return float(value), replicates


def diversity(x: np.ndarray, y: np.ndarray, wx: np.ndarray, wy: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean distance between generated cells over mean distance between real cells of one type, and its replicates.

    Args:
        x: Distances between generated cells, `(n, n)`.
        y: Distances between real cells, `(m, m)`.
        wx: How often each generated cell occurs in each bootstrap draw, `(n_resamples, n)`.
        wy: The same for real cells, `(n_resamples, m)`. Where all are copies of one cell, as in one of nine draws of
            three cells, the replicate is NaN.
    """

    def spread(distances: np.ndarray, weights: np.ndarray) -> np.ndarray:
        pairs = weights.sum(1) ** 2 - (weights**2).sum(1)  # copies of one cell are no pair
        return ((weights @ distances) * weights).sum(1) / np.maximum(pairs, 1)

    of_all = spread(y, np.ones((1, len(y))))[0]
    generated = np.concatenate([spread(x, np.ones((1, len(x)))), spread(x, wx)])
    real = np.concatenate([[of_all], spread(y, wy)])
    # Rounding leaves relative distances of about 1e-8 between equal cells.
    ratios = np.divide(generated, real, out=np.full_like(real, np.nan), where=real > 1e-6 * of_all)
    return float(ratios[0]), ratios[1:]


def read_generated(path: str, *, prompt_key: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log1p(CP10k) `(n_cells, n_genes)`, prompted types and gene symbols of generated cells.

    Args:
        path: The `.h5ad` of `scmmgpt generate`, with gene symbols as `var_names`. Where it has `layers["counts"]` and
            `obs["library_size"]`, the counts are normalised by the library size like those of real cells; otherwise
            `X` is log1p(CP10k).
        prompt_key: obs column of the prompted type; "label" or "cell_type" where `None`.
    """
    import anndata

    adata = anndata.read_h5ad(path)
    keys = [prompt_key] if prompt_key else [key for key in PROMPT_KEYS if key in adata.obs]
    if not keys or keys[0] not in adata.obs:
        raise ValueError(
            f"{path} has no obs column {prompt_key or ' or '.join(PROMPT_KEYS)!r}; it has {list(adata.obs.columns)}. "
            "Generate with --stored-labels, or name the column of the prompted types with --prompt-key."
        )
    sampled = "counts" in adata.layers and "library_size" in adata.obs
    matrix = adata.layers["counts"] if sampled else adata.X
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
    if not np.isfinite(matrix).all():
        n_wrong = (~np.isfinite(matrix)).sum()
        raise ValueError(f"{path} holds NaN or infinite values, {n_wrong} of {matrix.size}. Generate the cells again.")
    if sampled:
        matrix = log1p_cp10k(matrix, adata.obs["library_size"].to_numpy(dtype=np.float64))
    return matrix, adata.obs[keys[0]].to_numpy().astype(str), adata.var_names.to_numpy().astype(str)


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of the generated cells, which the report shares."""
    parser.add_argument("--generated", required=required, help=".h5ad of generated cells, log1p(CP10k) or counts")
    parser.add_argument("--prompt-key", help=f"obs column of the prompted type (default: {' or '.join(PROMPT_KEYS)})")


def evaluate_file(args: argparse.Namespace, train: LabelledCells, test: LabelledCells) -> dict:
    """Evaluate the generated cells."""
    matrix, prompts, genes = read_generated(args.generated, prompt_key=args.prompt_key)
    return evaluate_generation(matrix, prompts, genes, train, test, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    about = "Score generated cells beside profiles that need no model."
    return run_task("generation", about, add_arguments, evaluate_file, argv)
