"""Score clusters and batches in embeddings of cells: AvgBIO and AvgBATCH as reported by scGPT.

python -m scmmgpt.eval clustering --cells FILE --label-key KEY --batch-key KEY --output FILE.json

AvgBIO is the mean of NMI and ARI of Leiden clusters against the types, at the resolution with the highest NMI, and of
the silhouette width of types. AvgBATCH is the mean of the graph connectivity of types and the silhouette width of
batches within types. Definitions are those of scIB (Luecken et al. 2022), with silhouettes scaled to 0..1. The share
of nearest cells with the same type is the precision of a search for similar cells. If `scib-metrics` is installed, its
recommended metrics are added; if `harmonypy` is installed, Harmony is a baseline (extra `integration`).
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples, silhouette_score
from sklearn.neighbors import NearestNeighbors

from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.files import write_json
from scmmgpt.eval import results
from scmmgpt.eval.annotators import expression
from scmmgpt.eval.cells import read_labelled
from scmmgpt.eval.task import NATURAL


logger = logging.getLogger(__name__)

RESOLUTIONS = np.arange(1, 11) / 5  # of Leiden clustering: 0.2 to 2
N_NEIGHBORS = 15
N_NEAREST = 10  # default number of hits of a search
N_COMPONENTS = 50
N_VARIABLE = 2000  # variable genes, as in scanpy's tutorials
LISI_NEIGHBORS = 90  # three times the perplexity, as in the paper of LISI
MEASURES = {
    "avg_bio": results.Measure("AvgBIO", True, "Mean of NMI, ARI and the silhouette width of types."),
    "nmi": results.Measure("NMI", True, "Normalised mutual information of Leiden clusters and types."),
    "ari": results.Measure("ARI", True, "Adjusted Rand index of the same."),
    "asw_type": results.Measure("ASW of types", True, "Silhouette width of types, 0 to 1."),
    "nearest": results.Measure("nearest cells", True, "Share of the ten nearest cells with a cell's type."),
    "avg_batch": results.Measure("AvgBATCH", True, "Mean of graph connectivity and silhouette width of batches."),
    "connectivity": results.Measure(
        "graph connectivity", True, "Share of a type in its largest connected component of the graph, mean over types."
    ),
    "asw_batch": results.Measure(
        "ASW of batches", True, "1 minus the absolute silhouette width of batches within a type, mean over types."
    ),
    "bras": results.Measure(
        "BRAS", True, "Batch removal adapted silhouette, which replaces the ASW of batches; scib-metrics."
    ),
    "ilisi": results.Measure("iLISI", True, "Mixing of batches among neighbours: 0 none, 1 complete; scib-metrics."),
    "clisi": results.Measure("cLISI", True, "Purity of types among neighbours: 1 is one type; scib-metrics."),
}


def evaluate_clustering(
    embeddings: Mapping[str, np.ndarray], types: np.ndarray, batches: np.ndarray | None = None, *, seed: int = 0
) -> dict:
    """Score the embedding `(n_cells, width)` of each system, ours under `results.MODEL_NAME`; see `results.tabulate`.

    Intervals are not computed, because clusters of resampled cells have no meaning. Measures of batches need at least
    two batches.
    """
    estimates = {
        system: {
            name: results.Estimate(value, len(types))
            for name, value in cluster_scores(np.asarray(points), types, batches, seed=seed).items()
        }
        for system, points in embeddings.items()
    }
    roles = dict.fromkeys(embeddings, results.BASELINE) | {results.MODEL_NAME: results.MODEL}
    return {"task": "clustering", "seed": seed} | results.tabulate(MEASURES, roles, estimates)


def cluster_scores(
    points: np.ndarray, types: np.ndarray, batches: np.ndarray | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Compute all measures of one embedding `(n_cells, width)`: measure -> value."""
    import scanpy

    adata = AnnData(obs={"type": types.astype(str)}, obsm={"X": points.astype(np.float32)})
    scanpy.pp.neighbors(adata, n_neighbors=min(N_NEIGHBORS, len(types) - 1), use_rep="X", random_state=seed)
    best = (-1.0, 0.0)
    for resolution in RESOLUTIONS:
        scanpy.tl.leiden(
            adata, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed
        )
        clusters = adata.obs["leiden"].to_numpy()
        best = max(best, (normalized_mutual_info_score(types, clusters), adjusted_rand_score(types, clusters)))
    width = float((silhouette_score(points, types) + 1) / 2)
    scores = {"avg_bio": float(np.mean([*best, width])), "nmi": best[0], "ari": best[1], "asw_type": width}
    scores["nearest"] = nearest_alike(points, types)
    if batches is None or len(np.unique(batches)) < 2:
        return scores
    graph, parts, widths = adata.obsp["connectivities"], [], []
    for label in np.unique(types):
        rows = np.flatnonzero(types == label)
        _, component = connected_components(graph[rows][:, rows], directed=False)
        parts.append(np.bincount(component).max() / len(rows))
        if 2 <= len(np.unique(batches[rows])) < len(rows):
            widths.append(float(np.mean(1 - np.abs(silhouette_samples(points[rows], batches[rows])))))
    scores["connectivity"] = float(np.mean(parts))
    if widths:
        scores["asw_batch"] = float(np.mean(widths))
        scores["avg_batch"] = (scores["connectivity"] + scores["asw_batch"]) / 2
    return scores | scib_scores(points, types, batches)


def nearest_alike(points: np.ndarray, types: np.ndarray) -> float:
    """Share of the `N_NEAREST` nearest other cells that have the type of a cell, averaged over cells."""
    n_nearest = min(N_NEAREST, len(types) - 1)
    nearest = NearestNeighbors(n_neighbors=n_nearest).fit(points).kneighbors(return_distance=False)
    return float((types[nearest] == types[:, None]).mean())


def scib_scores(points: np.ndarray, types: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Metrics that scib-metrics recommends; empty if the package is not installed."""
    if importlib.util.find_spec("scib_metrics") is None:
        return {}
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=min(LISI_NEIGHBORS, len(points))).fit(points).kneighbors(points)
    neighbors = NeighborsResults(indices=indices, distances=distances)
    return {
        "bras": float(scib_metrics.bras(points, types, batches)),
        "ilisi": float(scib_metrics.ilisi_knn(neighbors, batches)),
        "clisi": float(scib_metrics.clisi_knn(neighbors, types)),
    }


def components(train: np.ndarray, test: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Fit principal components to training cells and transform test cells; both log1p(CP10k) `(n_cells, n_genes)`."""
    width = min(N_COMPONENTS, *(n - 1 for n in train.shape))
    return PCA(width, random_state=seed).fit(train).transform(test)


def variable_genes(values: np.ndarray) -> np.ndarray:
    """Mark scanpy's `N_VARIABLE` highly variable genes of log1p(CP10k) `(n_cells, n_genes)`, bool `(n_genes,)`."""
    import scanpy

    table = scanpy.pp.highly_variable_genes(AnnData(values), n_top_genes=N_VARIABLE, inplace=False)
    return np.asarray(table["highly_variable"])


def harmony(points: np.ndarray, batches: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Correct principal components `(n_cells, width)` for batches by Harmony."""
    import harmonypy

    table = pd.DataFrame({"batch": batches})
    return np.asarray(harmonypy.run_harmony(points, table, "batch", random_state=seed, verbose=False).Z_corr)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval clustering", description="Score clusters and batches.")
    parser.add_argument("--cells", required=True, help="file of counts with types and batches in `obs`, or a corpus")
    parser.add_argument("--label-key", default="cell_type", help="obs column of types (%(default)s)")
    parser.add_argument("--batch-key", help="obs column of batches; default: batches are not scored")
    parser.add_argument("--model", help="checkpoint that embeds the cells; default: the checkpoint of the package")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--seed", type=NATURAL, default=0, help="seed of components and clusters (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    from scmmgpt.commands.checkpoints import root_checkpoint
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

    args = make_parser().parse_args(argv)
    adata, types = read_labelled(args.cells, args.label_key)
    if args.batch_key is not None and args.batch_key not in adata.obs:
        raise ValueError(f"{args.cells} has no obs column {args.batch_key!r}; it has {', '.join(adata.obs)}.")
    batches = None if args.batch_key is None else adata.obs[args.batch_key].to_numpy().astype(str)
    pipeline = ScMMGPTPipeline.from_pretrained(args.model or root_checkpoint())
    values = expression(adata).toarray()
    points = components(values, values, seed=args.seed)
    spaces = {results.MODEL_NAME: pipeline.embed(adata.copy()).obsm["X_scmmgpt"]}
    networks = {"cell-text": "network, space shared with texts", "cell": "cell model alone"}
    for of in (name for name in networks if name != pipeline.embedding_of()):
        spaces[networks[of]] = pipeline.embed(adata.copy(), of=of).obsm["X_scmmgpt"]
    spaces["principal components"] = points
    if values.shape[1] > N_VARIABLE:
        chosen = values[:, variable_genes(values)]
        spaces["principal components, variable genes"] = components(chosen, chosen, seed=args.seed)
    if batches is None or importlib.util.find_spec("harmonypy") is None:
        logger.warning("Harmony is left out: %s.", "no batches" if batches is None else "harmonypy is not installed")
    else:
        spaces["Harmony"] = harmony(points, batches, seed=args.seed)
    result = evaluate_clustering(spaces, types, batches, seed=args.seed)
    sys.stdout.write(results.markdown_table(result))
    write_json(args.output, result)
    return 0
