"""Evaluate cells generated from words against real held-out cells, beside profiles that need no model.

python -m scmmgpt.eval generation --corpus corpus --generated generated.h5ad --output generation.json
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import numpy as np

from scmmgpt.eval import baselines
from scmmgpt.eval.annotation import MODEL_NAME
from scmmgpt.eval.cells import TARGET_SUM, LabelledCells, read_splits
from scmmgpt.eval.distances import discrepancy, distance_kernel, gaussian_kernel, median_distance
from scmmgpt.eval.metrics.generated_cell_knn.generated_cell_knn import KS, MIN_CELLS, fit_cell_space, knn_accuracy
from scmmgpt.eval.results import (
    BASELINE,
    CONTROL,
    MODEL,
    N_RESAMPLES,
    REFERENCE,
    Estimate,
    Measure,
    bootstrap_draws,
    format_table,
    mean_estimate,
    recentre,
    tabulate,
)
from scmmgpt.files import write_json


logger = logging.getLogger(__name__)

PROMPT_KEYS = ("label", "cell_type")  # obs columns of generated cells that may hold the prompted type
MIN_GENES = 20  # fewer shared genes do not tell types apart
MAX_VARIABLE_GENES = 2000  # of the correlation of profiles
RESERVED_SHARE = 0.2  # of the training cells, kept out of the components to serve as real cells beside generated ones
MAX_PER_TYPE = 500  # cells of a type on each side of a distance

MEASURES = {
    **{
        f"knn_accuracy_{k}": Measure(
            f"{k}-NN accuracy",
            True,
            f"Share of generated cells whose {k} nearest real held-out cells vote for the prompted type, averaged "
            "over types. Cells "
            "that are more typical than real ones score above real ones, so read it with the distances.",
        )
        for k in KS
    },
    "energy_distance": Measure(
        "E-distance",
        False,
        "Energy distance between generated and real held-out cells of one type, unbiased, averaged over types.",
    ),
    "mmd2": Measure(
        "MMD²",
        False,
        "Squared maximum mean discrepancy of the same cells, unbiased, with one bandwidth from all held-out cells.",
    ),
    "profile_correlation": Measure(
        "profile correlation",
        True,
        "Pearson correlation over genes of the type's mean profile minus the mean of all training cells, generated "
        "against real held-out, averaged over types.",
    ),
    "diversity": Measure(
        "diversity",
        None,
        "Mean distance between generated cells of a type over that between real ones: 1 is right, 0 one cell copied.",
    ),
}


def evaluate_generation(
    generated: np.ndarray,
    prompts: Sequence[str],
    genes: Sequence[str],
    train: LabelledCells,
    test: LabelledCells,
    *,
    ks: Sequence[int] = KS,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict:
    """Score generated cells beside the baselines, all in principal components of real training cells.

    Args:
        generated: log1p(CP10k), shape `(n_generated, n_genes)`.
        prompts: Type that each generated cell was asked for.
        genes: Symbols of the columns; those that no real cell has are left out.
        train: Real training cells: they define the space and the baselines.
        test: Real held-out cells: the truth.
        ks: Numbers of neighbours; those above the number of held-out cells are left out.
        n_resamples: Bootstrap replicates of the intervals.
        seed: Seed of everything that is drawn.

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `per_type` and sizes.
    """
    prompts = np.asarray(prompts).astype(str)
    generated, train, test = align_genes(generated, genes, train, test)
    kept = np.isin(prompts, test.labels) & np.isin(prompts, train.labels)
    if not kept.any():
        raise ValueError(
            f"No prompted type ({np.unique(prompts).tolist()}) is among the types of training and held-out cells "
            f"({np.intersect1d(test.labels, train.labels).tolist()}). "
            "Name the column of the prompts with --prompt-key."
        )
    if not kept.all():
        unknown = np.unique(prompts[~kept]).tolist()
        logger.warning("Left out %d generated cells of types without real cells: %s.", (~kept).sum(), unknown)
    generated, prompts = generated[kept], prompts[kept]
    reserved = reserve_cells(train.labels, seed=seed)
    # Components fitted on a cell hold some of its noise: cells that are compared must be new to them.
    space = fit_cell_space(train.expression[~reserved], seed=seed)
    real_cells, real_prompts = draw_real_cells(prompts, train.take(np.flatnonzero(reserved)), seed=seed)
    systems = {
        MODEL_NAME: (MODEL, generated, prompts),
        "mean profile + Poisson": (BASELINE, baselines.poisson_cells(prompts, train, seed=seed), prompts),
        "mean profile": (BASELINE, baselines.mean_cells(prompts, train), prompts),
        "shuffled prompts": (CONTROL, generated, baselines.shuffled(prompts, seed=seed).astype(str)),
        "real training cells": (REFERENCE, real_cells, real_prompts),
    }
    real = space.transform(test.expression)
    shared = {
        "real": real,
        "labels_of_real": test.labels,
        "bandwidth": median_distance(real, seed=seed),
        "ks": [k for k in ks if k <= len(real)],
        "profiles": _Profiles.of(train.expression, test),
        "n_resamples": n_resamples,
        "seed": seed,
    }
    estimates, per_type = {}, {}
    for name, (_, cells, labels) in systems.items():
        estimates[name], per_type[name] = _estimates(cells, labels, space.transform(cells), **shared)
    result = tabulate(MEASURES, {name: role for name, (role, _, _) in systems.items()}, estimates)
    return (
        {"task": "generation"}
        | result
        | {
            "n_generated": len(prompts),
            "n_left_out": int((~kept).sum()),
            "n_real": len(test),
            "n_train": len(train),
            "n_genes": len(test.genes),
            "n_components": int(space.n_components_),
            "bandwidth": shared["bandwidth"],
            "n_resamples": n_resamples,
            "seed": seed,
            "types_in_distances": sorted(per_type[MODEL_NAME]),
            "per_type": per_type,
        }
    )


class _Profiles:
    """Variable genes, the mean of all training cells and held-out cells over them."""

    def __init__(self, columns, center, real):
        self.columns, self.center, self.real = columns, center, real

    @classmethod
    def of(cls, train_expression, test):
        mean = np.asarray(train_expression.mean(0)).ravel()
        variance = np.asarray(train_expression.multiply(train_expression).mean(0)).ravel() - mean**2
        columns = np.sort(np.argsort(-variance, kind="stable")[:MAX_VARIABLE_GENES])
        return cls(columns, mean[columns], test.expression[:, columns].toarray())


def reserve_cells(labels: np.ndarray, *, share: float = RESERVED_SHARE, seed: int = 0) -> np.ndarray:
    """Mark a share of the cells of each type, at least one, but none of a type with a single cell; `(n_cells,)`."""
    rng = np.random.default_rng(seed)
    reserved = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            reserved[rng.choice(rows, max(round(share * len(rows)), 1), replace=False)] = True
    return reserved


def draw_real_cells(prompts: np.ndarray, cells: LabelledCells, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Real cells of the prompted types, each once: as many of a type as were generated, or as there are.

    Returns:
        log1p(CP10k) of shape `(n_cells, n_genes)`, and types.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for label, n in zip(*np.unique(prompts, return_counts=True), strict=True):
        rows.append(rng.permutation(np.flatnonzero(cells.labels == label))[:n])
    rows = np.concatenate(rows)
    return cells.expression[rows].toarray(), cells.labels[rows]


def align_genes(
    generated: np.ndarray, genes: Sequence[str], train: LabelledCells, test: LabelledCells
) -> tuple[np.ndarray, LabelledCells, LabelledCells]:
    """Bring generated, training and held-out cells onto the genes that all of them have."""
    genes = np.asarray(genes).astype(str)
    if generated.shape[1] != len(genes) or len(set(genes)) != len(genes):
        raise ValueError(
            f"Generated cells of shape {generated.shape} need as many distinct genes, but got {len(genes)}."
        )
    # A gene without a count in the held-out cells is a zero there, not a missing gene.
    shared = genes[np.isin(genes, train.genes)]
    if len(shared) < MIN_GENES:
        raise ValueError(
            f"Generated and real cells share {len(shared)} genes; at least {MIN_GENES} are needed. "
            "Generate the genes of the corpus, named by the symbols of its vocabulary."
        )
    if len(shared) < len(genes):
        logger.info(
            "%d of %d generated genes occur in no training cell and are left out.",
            len(genes) - len(shared),
            len(genes),
        )
    column = {gene: i for i, gene in enumerate(genes)}
    return (
        np.asarray(generated)[:, [column[gene] for gene in shared]],
        train.select_genes(shared),
        _with_genes(test, shared),
    )


def _with_genes(cells: LabelledCells, genes: np.ndarray) -> LabelledCells:
    """The cells over these genes; those in which no cell has a count are zero."""
    from scipy import sparse

    column = {gene: i for i, gene in enumerate(cells.genes)}
    where = np.array([column.get(gene, len(cells.genes)) for gene in genes])
    padded = sparse.hstack([cells.counts, sparse.csr_matrix((len(cells), 1), dtype=np.float32)], format="csc")
    return LabelledCells(
        counts=sparse.csr_matrix(padded[:, where]),
        total_counts=cells.total_counts,
        genes=np.asarray(genes),
        labels=cells.labels,
        names=cells.names,
        obs=cells.obs,
    )


def _estimates(cells, labels, points, *, real, labels_of_real, bandwidth, ks, profiles, n_resamples, seed):
    n = len(labels)
    draws = bootstrap_draws(n, n_resamples=n_resamples, seed=seed)
    hits = knn_accuracy(points, labels, real, labels_of_real, ks=ks) if ks else {}
    _, types, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    equal = 1 / sizes[types]  # every type weighs the same, however many of its cells there are
    estimates = {f"knn_accuracy_{k}": mean_estimate(hit, draws, weights=equal) for k, hit in hits.items()}
    per_type = {}
    for label in np.unique(labels):
        mine, theirs = np.flatnonzero(labels == label), np.flatnonzero(labels_of_real == label)
        mine, theirs = mine[:MAX_PER_TYPE], theirs[:MAX_PER_TYPE]
        if len(mine) < 2 or len(theirs) < MIN_CELLS:
            continue
        x, y = points[mine], real[theirs]
        wx = bootstrap_draws(len(x), n_resamples=n_resamples, seed=seed)
        wy = bootstrap_draws(len(y), n_resamples=n_resamples, seed=seed + 1)
        kernels = {
            "energy_distance": [distance_kernel(a, b) for a, b in ((x, x), (y, y), (x, y))],
            "mmd2": [gaussian_kernel(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y))],
        }
        measured = {
            name: (float(discrepancy(*k)), discrepancy(*k, x_weights=wx, y_weights=wy)) for name, k in kernels.items()
        }
        measured["profile_correlation"] = _profile_correlation(cells[mine], profiles, theirs, wx, wy)
        measured["diversity"] = _diversity(*kernels["energy_distance"][:2], wx, wy)
        per_type[str(label)] = measured
    for name in ("energy_distance", "mmd2", "profile_correlation", "diversity"):
        if per_type:
            values, replicates = zip(*(measured[name] for measured in per_type.values()), strict=True)
            value = float(np.mean(values))
            estimates[name] = Estimate(value, n, recentre(value, np.mean(replicates, axis=0)))
    return estimates, {
        label: {name: value for name, (value, _) in measured.items()}
        | {f"knn_accuracy_{k}": float(hit[labels == label].mean()) for k, hit in hits.items()}
        for label, measured in per_type.items()
    }


def _profile_correlation(cells, profiles, rows_of_real, wx, wy) -> tuple[float, np.ndarray]:
    def correlate(a, b):
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)

    x, y = np.asarray(cells)[:, profiles.columns], profiles.real[rows_of_real]
    value = correlate(x.mean(0, keepdims=True) - profiles.center, y.mean(0, keepdims=True) - profiles.center)[0]
    replicates = correlate(
        wx @ x / wx.sum(1, keepdims=True) - profiles.center, wy @ y / wy.sum(1, keepdims=True) - profiles.center
    )
    return float(value), replicates


def _diversity(k_xx, k_yy, wx, wy) -> tuple[float, np.ndarray]:
    def spread(kernel, weights):
        pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
        return ((weights @ -kernel) * weights).sum(1) / np.maximum(pairs, 1)

    ones_x, ones_y = np.ones((1, len(k_xx))), np.ones((1, len(k_yy)))
    value = spread(k_xx, ones_x)[0] / max(spread(k_yy, ones_y)[0], 1e-12)
    return float(value), spread(k_xx, wx) / np.maximum(spread(k_yy, wy), 1e-12)


def read_generated(path: str, *, prompt_key: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read generated cells.

    Args:
        path: What `scmmgpt generate` writes: `.h5ad` with gene symbols as `var_names`. With `layers["counts"]` and
            `obs["library_size"]`, the counts are normalised by the library size, as those of real cells are;
            otherwise `X` is log1p(CP10k).
        prompt_key: obs column of the prompted type; "label" or "cell_type" where `None`.

    Returns:
        log1p(CP10k) of shape `(n_cells, n_genes)`, prompted types, gene symbols.
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
        raise ValueError(f"{path} holds values that are not finite, {(~np.isfinite(matrix)).sum()} of {matrix.size}.")
    if sampled:
        sizes = adata.obs["library_size"].to_numpy(dtype=np.float64)
        matrix = np.log1p(matrix * (TARGET_SUM / sizes)[:, None]).astype(np.float32)
    return matrix, adata.obs[keys[0]].to_numpy().astype(str), adata.var_names.to_numpy().astype(str)


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Arguments that say where the generated cells are; shared with the report."""
    parser.add_argument("--generated", required=required, help=".h5ad of generated cells, log1p(CP10k) or counts")
    parser.add_argument(
        "--prompt-key", help="obs column of the prompted type (default: " + " or ".join(PROMPT_KEYS) + ")"
    )


def run(args: argparse.Namespace, train: LabelledCells, test: LabelledCells) -> dict:
    """Read the generated cells that the arguments name and evaluate them."""
    matrix, prompts, genes = read_generated(args.generated, prompt_key=args.prompt_key)
    return evaluate_generation(matrix, prompts, genes, train, test, seed=args.seed)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m scmmgpt.eval generation`."""
    from scmmgpt.eval.__main__ import task_parser

    parser = task_parser("generation", "Score generated cells beside profiles that need no model.")
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    result = run(args, *read_splits(args.corpus, label_key=args.label_key))
    sys.stdout.write(format_table(result))
    write_json(args.output, result)
    return 0
