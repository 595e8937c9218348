"""Evaluate cells generated from text against real held-out cells, with mean profiles as baselines.

python -m scmmgpt.eval generation --corpus corpus --generated generated.h5ad --output generation.json

Principal components fit some noise of the cells that they are computed from. In components of its own training cells,
a generator therefore looks better than real cells. The components here come from one half of the held-out cells, and
the other half is compared; then the halves are swapped. Halves and cells are drawn several times, and every measure
has its mean and its spread over the draws. The row "real training cells" shows the best values to expect.
"""

import argparse
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances

from scmmgpt.cells_scmmgpt import log1p_cp10k
from scmmgpt.eval import baselines, realism, results
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.eval.metrics.generated_cell_knn import generated_cell_knn as knn
from scmmgpt.eval.task import run_task


logger = logging.getLogger(__name__)

PROMPT_KEYS = ("label", "cell_type")  # obs columns of generated cells that may hold the prompted type
MIN_GENES = 20  # fewer shared genes do not separate types
MAX_VARIABLE_GENES = 2000  # for the correlation of profiles
NUM_TOP_GENES = 100  # the most expressed, for the correlation of genes
MAX_PER_TYPE = 500  # most cells of a type on each side of a distance
N_DRAWS = 3
CELLS_PER_DRAW = 100  # cells of a type in a draw; distances of fewer cells are mostly noise
REAL_NAME = "real held-out cells"

MEASURES = {
    "energy_distance": results.Measure(
        "E-distance",
        False,
        "Unbiased energy distance between generated and real held-out cells of one type, averaged over types.",
    ),
    "energy_distance_all_genes": results.Measure(
        "E-distance, all genes",
        False,
        "The same for log1p(CP10k) of all genes instead of components. Count noise dominates the distances of cells. "
        f"At most {CELLS_PER_DRAW} cells of a type on each side.",
    ),
    "two_sample_auc": results.Measure(
        "two-sample AUC",
        False,
        "AUROC of a random forest that separates generated from real held-out cells, with equal numbers of cells of "
        "each type on both sides: 0.5 means no separation.",
    ),
    "gromov_wasserstein": results.Measure(
        "Gromov-Wasserstein",
        False,
        "Difference between the distances among generated and among real held-out cells, with equal numbers of cells "
        "of each type, at the best matching of cells, in mean distances of real cells.",
    ),
    "diversity": results.Measure(
        "diversity",
        None,
        f"Variance of the cells of a type along the {realism.NUM_AXES} leading axes of the variation within types of "
        "other real held-out cells, divided by that of real cells: 1 is right, 0 means copies of one cell, and "
        "independent noise around one mean is far below 1.",
        right="1",
    ),
    "gene_correlation": results.Measure(
        f"gene correlation, top {NUM_TOP_GENES}",
        None,
        f"Mean absolute correlation of the {NUM_TOP_GENES} most expressed genes over the cells of a type, averaged "
        "over types, with equal numbers of cells in all rows. The row of the real held-out cells is right.",
    ),
    "largest_eigenvalue": results.Measure(
        "largest eigenvalue",
        None,
        "Largest eigenvalue of the correlation matrix of the same genes and cells.",
    ),
    "zero_fraction": results.Measure("zeros", None, "Share of zeros among the values of a cell, averaged over types."),
    "detected_genes": results.Measure("genes", None, "Genes with a count in a cell, averaged over types."),
    "library_size": results.Measure("library size", None, "Mean library size of a cell, averaged over types."),
    "nearest_training_cell": results.Measure(
        "nearest training cell",
        None,
        "Distance of a cell to the nearest training cell, averaged over types: 0 for a copy. A value below that of "
        "real held-out cells means partial copies.",
    ),
    "mmd2": results.Measure(
        "MMD²",
        False,
        "Unbiased squared maximum mean discrepancy of the same cells as for the E-distance, with one bandwidth from "
        "all held-out cells.",
    ),
    "profile_correlation": results.Measure(
        "profile correlation",
        True,
        "Pearson correlation over genes between the mean profiles of generated and real held-out cells of a type, "
        "each minus the mean of all training cells, averaged over types.",
    ),
    **{
        f"knn_accuracy_{k}": results.Measure(
            f"{k}-NN accuracy",
            True,
            f"Share of generated cells whose {k} nearest real held-out cells vote for the prompted type, averaged "
            "over types. Cells more typical than real cells score above real cells: see the distances as well.",
        )
        for k in knn.KS
    },
}
RESAMPLED = ("energy_distance", "mmd2", "profile_correlation")  # averages over types with bootstrap replicates


class GeneratedCells(NamedTuple):
    """Generated cells."""

    expression: np.ndarray  # log1p(CP10k), `(n_cells, n_genes)`
    prompts: np.ndarray  # prompted types, `(n_cells,)`
    genes: np.ndarray  # gene symbols, `(n_genes,)`
    library_sizes: np.ndarray | None = None  # `(n_cells,)`; None if the cells are mean profiles

    def take(self, rows: np.ndarray) -> "GeneratedCells":
        """The cells at `rows`, in that order."""
        sizes = None if self.library_sizes is None else self.library_sizes[rows]
        return GeneratedCells(self.expression[rows], self.prompts[rows], self.genes, sizes)


def evaluate_generation(
    generated: GeneratedCells,
    train: LabelledCells,
    test: LabelledCells,
    *,
    others: Mapping[str, tuple[str, GeneratedCells]] | None = None,
    n_resamples: int = results.N_RESAMPLES,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> dict:
    """Score generated cells, the baselines and real cells against held-out cells.

    Args:
        generated: Generated cells; genes that no training cell has are left out.
        train: Real training cells, for the baselines.
        test: Real held-out cells, for the space and as the truth; no generator may have seen them.
        others: System -> role and cells for the same prompts, over all genes of the training cells.
        n_resamples: Bootstrap replicates of the intervals, over all draws.
        n_draws: Draws of halves of the held-out cells and of cells of every system.
        seed: Seed of all random draws.

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `per_type` and sizes.
    """
    generated, train, test = align_genes(generated, train, test)
    kept = _types_with_real_cells(generated.prompts, train, test)
    generated = generated.take(np.flatnonzero(kept))
    others = {
        name: (role, select(cells, test.genes, generated.prompts)) for name, (role, cells) in (others or {}).items()
    }
    per_draw = -(-n_resamples // (2 * n_draws))
    parts: dict[str, list[list[Scores]]] = defaultdict(list)
    roles: dict[str, str] = {}
    n_components = 0
    for draw in range(n_draws):
        systems = draw_systems(generated, train, test, draw, n_draws, seed + draw)
        systems |= {name: (role, draw_part(cells, draw, n_draws)) for name, (role, cells) in others.items()}
        roles = {name: role for name, (role, _) in systems.items()}
        first_half = halve(test.labels, seed=seed + draw)
        folds = [HeldOutCells.of(train, test, half, seed + draw) for half in (first_half, ~first_half)]
        n_components = folds[0].n_components
        prompts = systems[results.MODEL_NAME][1].prompts
        for name, (_, cells) in systems.items():
            of_cells = score_cells(cells, prompts, train, test, seed + draw)
            if name != REAL_NAME:
                of_cells |= score_all_genes(cells, test, seed + draw)
            in_space = [
                {"nearest_training_cell": nearest_score(fold.points, fold.labels, fold)}
                if name == REAL_NAME
                else score_in_space(cells, fold, per_draw, seed + draw)
                for fold in folds
            ]
            parts[name].append([of_cells | of_fold for of_fold in in_space])
    estimates = {name: combine(draws) for name, draws in parts.items()}
    result = {"task": "generation"} | results.tabulate(MEASURES, roles, estimates)
    result |= {"n_generated": len(generated.prompts), "n_left_out": int((~kept).sum()), "n_real": len(test)}
    result |= {"n_train": len(train), "n_genes": len(test.genes), "n_components": n_components, "n_draws": n_draws}
    per_type = {name: _by_type(draws) for name, draws in parts.items()}
    return result | {
        "n_resamples": n_resamples,
        "seed": seed,
        "types_in_distances": sorted(
            label for label, values in per_type[results.MODEL_NAME].items() if "energy_distance" in values
        ),
        "per_type": per_type,
    }


def _types_with_real_cells(types: np.ndarray, train: LabelledCells, test: LabelledCells) -> np.ndarray:
    """Mark the generated cells whose type has training and test cells, bool `(n_generated,)`."""
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


def draw_systems(
    generated: GeneratedCells, train: LabelledCells, test: LabelledCells, draw: int, n_draws: int, seed: int
) -> dict[str, tuple[str, GeneratedCells]]:
    """Draw the cells of every system: system -> role and cells."""
    rng, ours = np.random.default_rng(seed), draw_part(generated, draw, n_draws)
    prompts, genes = ours.prompts, ours.genes
    # `poisson_cells` draws the same rows, and so the same library sizes.
    poisson_sizes = train.total_counts[baselines.sample_rows(prompts, train.labels, seed=seed)]
    poisson = GeneratedCells(baselines.poisson_cells(prompts, train, seed=seed), prompts, genes, poisson_sizes)
    means = GeneratedCells(baselines.mean_cells(prompts, train), prompts, genes)
    shuffled = ours._replace(prompts=baselines.shuffled(prompts, seed=seed).astype(str))
    return {
        results.MODEL_NAME: (results.MODEL, ours),
        "mean profile + Poisson": (results.BASELINE, poisson),
        "mean profile": (results.BASELINE, means),
        "shuffled prompts": (results.CONTROL, shuffled),
        "real training cells": (results.REFERENCE, draw_real_cells(prompts, train, rng)),
        REAL_NAME: (results.REFERENCE, draw_real_cells(prompts, test, rng)),
    }


def select(cells: GeneratedCells, genes: np.ndarray, prompts: np.ndarray) -> GeneratedCells:
    """Select the cells of these prompts, and these genes in this order."""
    place = {gene: i for i, gene in enumerate(cells.genes)}
    chosen = cells._replace(expression=cells.expression[:, [place[gene] for gene in genes]], genes=genes)
    return chosen.take(np.flatnonzero(np.isin(cells.prompts, prompts)))


def draw_part(cells: GeneratedCells, draw: int, n_draws: int) -> GeneratedCells:
    """Select the generated cells of one draw.

    Draws are disjoint for a type with `CELLS_PER_DRAW` cells for each draw. Otherwise every draw has all its cells. A
    draw has at most `MAX_PER_TYPE` cells of a type.
    """
    rows = []
    for label in np.unique(cells.prompts):
        own = np.random.default_rng(len(cells.prompts)).permutation(np.flatnonzero(cells.prompts == label))
        part = np.array_split(own, n_draws)[draw]
        rows.append(part[:MAX_PER_TYPE] if len(part) >= CELLS_PER_DRAW else own[:MAX_PER_TYPE])
    return cells.take(np.concatenate(rows))


def draw_real_cells(prompts: np.ndarray, cells: LabelledCells, rng: np.random.Generator) -> GeneratedCells:
    """Draw real cells: as many of each type as there are prompts, or all cells of the type if there are fewer."""
    wanted = zip(*np.unique(prompts, return_counts=True), strict=True)
    rows = np.concatenate([rng.permutation(np.flatnonzero(cells.labels == label))[:n] for label, n in wanted])
    taken = cells.take(rows)
    return GeneratedCells(taken.expression.toarray(), taken.labels, cells.genes, taken.total_counts)


def halve(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Mark a random half of the cells of each type, bool `(n_cells,)`; the half of an odd cell is random."""
    rng = np.random.default_rng(seed)
    marked = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        marked[rows[: (len(rows) + int(rng.integers(2))) // 2]] = True
    return marked


@dataclass(frozen=True)
class HeldOutCells:
    """One half of the real held-out cells, in principal components of the other half."""

    space: knn.PCA
    points: np.ndarray  # principal components of the compared half, `(n_real, n_components)`
    labels: np.ndarray  # types, `(n_real,)`
    bandwidth: float  # of the Gaussian kernel, for all systems
    axes: np.ndarray  # leading axes of the variation within types of the other half, `(n_components, n_axes)`
    training_points: np.ndarray  # `(n_train, n_components)`
    columns: np.ndarray  # positions of the most variable genes of the training cells
    profiles: np.ndarray  # log1p(CP10k) of the held-out cells over the variable genes, `(n_real, n_columns)`
    center: np.ndarray  # mean log1p(CP10k) of all training cells over the variable genes, `(n_columns,)`

    @property
    def n_components(self) -> int:
        """Dimensions of the space."""
        return int(self.space.n_components_)

    @classmethod
    def of(cls, train: LabelledCells, test: LabelledCells, for_space: np.ndarray, seed: int) -> "HeldOutCells":
        """Fit the components to the test cells of the mask `for_space`, and transform the other test cells."""
        fitting, compared = (test.take(np.flatnonzero(mask)) for mask in (for_space, ~for_space))
        space = knn.fit_cell_space(fitting.expression, seed=seed)
        points = space.transform(compared.expression)
        axes = realism.variation_axes(space.transform(fitting.expression), fitting.labels)
        expression = train.expression
        mean = np.asarray(expression.mean(0)).ravel()
        variance = np.asarray(expression.multiply(expression).mean(0)).ravel() - mean**2
        columns = np.sort(np.argsort(-variance, kind="stable")[:MAX_VARIABLE_GENES])
        profiles = compared.expression[:, columns].toarray()
        bandwidth = knn.median_distance(points, seed=seed)
        near = space.transform(expression)
        return cls(space, points, compared.labels, bandwidth, axes, near, columns, profiles, mean[columns])


@dataclass(frozen=True)
class Score:
    """A value of a measure, with bootstrap replicates (or None) and values by type (or None)."""

    value: float
    n: int
    replicates: np.ndarray | None = None
    by_type: Mapping[str, float] | None = None


Scores = dict[str, Score]


def score_cells(
    cells: GeneratedCells, prompts: np.ndarray, train: LabelledCells, test: LabelledCells, seed: int
) -> Scores:
    """Score cells by the measures that need no components.

    Args:
        prompts: Prompted types of the model's cells. Correlations use the same number of cells of a type in all rows.
    """
    rng = np.random.default_rng(seed)
    top = np.argsort(-np.asarray(train.expression.mean(0)).ravel(), kind="stable")[:NUM_TOP_GENES]
    measured: dict[str, dict[str, float]] = defaultdict(dict)
    for label in np.unique(cells.prompts):
        rows = np.flatnonzero(cells.prompts == label)
        detected = (cells.expression[rows] > 0).sum(axis=1).mean()
        measured["detected_genes"][label] = float(detected)
        measured["zero_fraction"][label] = float(1 - detected / cells.expression.shape[1])
        if cells.library_sizes is not None:
            measured["library_size"][label] = float(cells.library_sizes[rows].mean())
        n = min(int((side == label).sum()) for side in (prompts, train.labels, test.labels))
        if min(n, len(rows)) >= realism.MIN_CORRELATED:
            chosen = cells.expression[rng.permutation(rows)[:n]][:, top]
            mean, largest = realism.gene_correlation(chosen)
            measured["gene_correlation"][label], measured["largest_eigenvalue"][label] = mean, largest
    n = len(cells.prompts)
    return {name: Score(float(np.mean([*of.values()])), n, None, of) for name, of in measured.items()}


def score_all_genes(cells: GeneratedCells, test: LabelledCells, seed: int) -> Scores:
    """Compute the energy distance over log1p(CP10k) of all genes, averaged over types."""
    rng, by_type = np.random.default_rng(seed), {}
    for label in np.unique(cells.prompts):
        sides = (np.flatnonzero(of == label) for of in (cells.prompts, test.labels))
        ours, real = (rng.permutation(side)[:CELLS_PER_DRAW] for side in sides)
        if len(ours) >= 2 and len(real) >= knn.MIN_CELLS:
            x, y = cells.expression[ours], test.expression[real].toarray()
            kernels = (-euclidean_distances(a, b) for a, b in ((x, x), (y, y), (x, y)))  # faster than `cdist` here
            by_type[str(label)] = float(knn.discrepancy(*kernels))
    if not by_type:
        return {}
    return {"energy_distance_all_genes": Score(float(np.mean([*by_type.values()])), len(cells.prompts), None, by_type)}


def nearest_score(points: np.ndarray, labels: np.ndarray, truth: HeldOutCells) -> Score:
    """Mean distance of points `(n, n_components)` to the nearest training cell, averaged over the types `(n,)`."""
    near = realism.nearest_distances(points, truth.training_points)
    by_type = {str(label): float(near[labels == label].mean()) for label in np.unique(labels)}
    return Score(float(np.mean([*by_type.values()])), len(points), None, by_type)


def score_in_space(cells: GeneratedCells, truth: HeldOutCells, n_resamples: int, seed: int) -> Scores:
    """Score cells against one half of the held-out cells, in components of the other half."""
    points, labels, n = truth.space.transform(cells.expression), cells.prompts, len(cells.prompts)
    scores = {"nearest_training_cell": nearest_score(points, labels, truth)}
    mine, theirs = realism.match_proportions(labels, truth.labels, np.random.default_rng(seed))
    if len(mine) >= knn.MIN_CELLS:
        auc = realism.two_sample_auc(points[mine], truth.points[theirs], seed=seed)
        scores["two_sample_auc"] = Score(auc, len(mine))
        matched = realism.gromov_wasserstein(points[mine], truth.points[theirs])
        scores["gromov_wasserstein"] = Score(matched, len(mine))
    ks = [k for k in knn.KS if k <= len(truth.points)]
    hits = knn.knn_accuracy(points, labels, truth.points, truth.labels, ks=ks) if ks else {}
    _, types, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    draws = results.bootstrap_draws(n, n_resamples=n_resamples, seed=seed)
    for k, hit in hits.items():
        estimate = results.mean_estimate(hit, draws, weights=1 / sizes[types])  # all types have equal weight
        shares = {str(label): float(hit[labels == label].mean()) for label in np.unique(labels)}
        scores[f"knn_accuracy_{k}"] = Score(estimate.value, n, estimate.replicates, shares)
    by_type, variances = {}, {}
    for label in np.unique(labels):
        ours, real = (np.flatnonzero(of == label)[:MAX_PER_TYPE] for of in (labels, truth.labels))
        if len(ours) >= 2 and len(real) >= knn.MIN_CELLS:
            by_type[str(label)] = _compare_samples(
                cells.expression[ours], points[ours], truth, real, n_resamples, seed
            )
            pair = [realism.variance_along(truth.axes, sample) for sample in (points[ours], truth.points[real])]
            variances[str(label)] = pair[0], pair[1]
    for name in RESAMPLED if by_type else ():
        measured = {label: of_type[name] for label, of_type in by_type.items()}
        value = float(np.mean([value for value, _ in measured.values()]))
        replicates = results.recentre(value, np.mean([replicates for _, replicates in measured.values()], axis=0))
        scores[name] = Score(value, n, replicates, {label: value for label, (value, _) in measured.items()})
    return scores | diversity(variances, n)


def diversity(variances: Mapping[str, tuple[float, float]], n: int) -> Scores:
    """Variance of generated cells divided by the variance of real cells; types without real variance are left out.

    Args:
        variances: Type -> variance of generated cells, variance of real cells.
        n: Number of generated cells.
    """
    varied = {label: pair for label, pair in variances.items() if pair[1] > 1e-9}
    if not varied:
        return {}
    ours, real = np.sum([*varied.values()], axis=0)
    return {"diversity": Score(float(ours / real), n, None, {label: x / y for label, (x, y) in varied.items()})}


def _compare_samples(
    cells: np.ndarray, x: np.ndarray, truth: HeldOutCells, rows: np.ndarray, n_resamples: int, seed: int
) -> dict[str, tuple[float, np.ndarray]]:
    """Compare generated cells of one type (components `x`) with the held-out cells `rows`: value and replicates."""
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
    return measured | {"profile_correlation": _profile_correlation(*profiles, truth.center, wx, wy)}


def _profile_correlation(
    x: np.ndarray, y: np.ndarray, center: np.ndarray, wx: np.ndarray, wy: np.ndarray
) -> tuple[float, np.ndarray]:
    """Correlation over genes of the mean profiles of `x` and `y`, both minus `center`, and its replicates."""

    def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)

    value = correlate(x.mean(0, keepdims=True) - center, y.mean(0, keepdims=True) - center)[0]
    replicates = correlate(wx @ x / wx.sum(1, keepdims=True) - center, wy @ y / wy.sum(1, keepdims=True) - center)
    return float(value), replicates


def combine(draws: Sequence[Sequence[Scores]]) -> dict[str, results.Estimate]:
    """Combine the scores of draws and halves to an estimate of each measure: mean, spread over draws, and replicates.

    A measure without replicates has no interval, because a few draws of the same cells are not a sample of cells.
    """
    estimates = {}
    for name in MEASURES:
        scores = [[half[name] for half in draw if name in half] for draw in draws]
        scores = [of_draw for of_draw in scores if of_draw]
        if not scores:
            continue
        means = [float(np.mean([score.value for score in of_draw])) for of_draw in scores]
        value, every = float(np.mean(means)), [score for of_draw in scores for score in of_draw]
        pieces = [results.recentre(value, score.replicates) for score in every if score.replicates is not None]
        replicates = np.concatenate(pieces) if pieces else None
        estimates[name] = results.Estimate(value, every[0].n, replicates, float(np.std(means)))
    return estimates


def _by_type(draws: Sequence[Sequence[Scores]]) -> dict[str, dict[str, float]]:
    """Mean over draws and halves of every measure of each type."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for half in (half for draw in draws for half in draw):
        for name, score in half.items():
            for label, value in (score.by_type or {}).items():
                values[label][name].append(value)
    return {
        label: {name: float(np.mean(measured)) for name, measured in of_type.items()}
        for label, of_type in values.items()
    }


def align_genes(
    generated: GeneratedCells, train: LabelledCells, test: LabelledCells
) -> tuple[GeneratedCells, LabelledCells, LabelledCells]:
    """Restrict generated, training and held-out cells to the genes that generated and training cells share."""
    symbols, shape = np.asarray(generated.genes).astype(str), generated.expression.shape
    if shape[1] != len(symbols) or len(set(symbols)) != len(symbols):
        raise ValueError(f"Generated cells of shape {shape} need as many distinct genes, but got {len(symbols)}.")
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
    ours = generated._replace(expression=np.asarray(generated.expression)[:, is_shared], genes=shared)
    return ours, train.select_genes(shared), test.select_genes(shared)


def read_generated(path: str, *, prompt_key: str | None = None) -> GeneratedCells:
    """Read generated cells.

    Args:
        path: File of `scmmgpt generate` (`.h5ad`), with gene symbols as `var_names`. Counts in `layers["counts"]` are
            normalised by `obs["library_size"]`, as for real cells; without these two, `X` is log1p(CP10k).
        prompt_key: obs column of the prompted type; default: "label" or "cell_type".
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
    prompts, genes, sizes = adata.obs[keys[0]].to_numpy().astype(str), adata.var_names.to_numpy().astype(str), None
    if sampled:
        sizes = adata.obs["library_size"].to_numpy(dtype=np.float64)
        matrix = log1p_cp10k(matrix, sizes)
    return GeneratedCells(matrix, prompts, genes, sizes)


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of this task, which the report also takes."""
    parser.add_argument("--generated", required=required, help=".h5ad of generated cells, log1p(CP10k) or counts")
    parser.add_argument("--prompt-key", help=f"obs column of the prompted type (default: {' or '.join(PROMPT_KEYS)})")
    parser.add_argument("--datasets", nargs="+", metavar="ID", help="real cells of these datasets (default: of all)")


def of_datasets(cells: LabelledCells, datasets: Sequence[str]) -> LabelledCells:
    """Select the cells of some datasets: a gene that a panel does not measure is not 0 in its cells."""
    of_cells = cells.obs["dataset_id"].astype(str)
    if unknown := sorted(set(datasets) - set(of_cells)):
        raise ValueError(f"No cell is of {unknown}. The datasets of these cells are {np.unique(of_cells).tolist()}.")
    return cells.take(np.flatnonzero(np.isin(of_cells, datasets)))


def evaluate_file(args: argparse.Namespace, train: LabelledCells, test: LabelledCells) -> dict:
    """Evaluate the generated cells."""
    generated = read_generated(args.generated, prompt_key=args.prompt_key)
    if args.datasets:
        train, test = (of_datasets(cells, args.datasets) for cells in (train, test))
    return evaluate_generation(generated, train, test, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    about = "Score generated cells, with profiles that need no model as baselines."
    return run_task("generation", about, add_arguments, evaluate_file, argv)
