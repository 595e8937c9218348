"""Clusters and batches in embeddings of cells: AvgBIO and AvgBATCH as scGPT reports them.

AvgBIO is the mean of NMI and ARI of Leiden clusters against the types, at the resolution with the highest NMI, and of
the silhouette width of types. AvgBATCH is the mean of the graph connectivity of types and the silhouette width of
batches within types. Definitions are those of scIB (Luecken et al. 2022), silhouettes scaled to 0..1.
"""

from collections.abc import Mapping

import numpy as np
from anndata import AnnData
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples, silhouette_score

from scmmgpt.eval import results


RESOLUTIONS = np.arange(1, 11) / 5  # of Leiden: 0.2 to 2
N_NEIGHBORS = 15
N_COMPONENTS = 50
MEASURES = {
    "avg_bio": results.Measure("AvgBIO", True, "Mean of NMI, ARI and the silhouette width of types."),
    "nmi": results.Measure("NMI", True, "Normalised mutual information of Leiden clusters and types."),
    "ari": results.Measure("ARI", True, "Adjusted Rand index of the same."),
    "asw_type": results.Measure("ASW of types", True, "Silhouette width of types, 0 to 1."),
    "avg_batch": results.Measure("AvgBATCH", True, "Mean of graph connectivity and silhouette width of batches."),
    "connectivity": results.Measure(
        "graph connectivity", True, "Share of a type in its largest connected part of the graph, mean over types."
    ),
    "asw_batch": results.Measure(
        "ASW of batches", True, "1 minus the absolute silhouette width of batches within a type, mean over types."
    ),
}


def evaluate_clustering(
    embeddings: Mapping[str, np.ndarray], types: np.ndarray, batches: np.ndarray | None = None, *, seed: int = 0
) -> dict:
    """Score embeddings `(n_cells, width)` of each system, ours first under `results.MODEL_NAME`.

    Measures of batches need at least two batches. There are no intervals, since resampled cells have no clusters.
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
    """All measures of one embedding."""
    import scanpy

    adata = AnnData(obs={"type": types.astype(str)}, obsm={"X": points.astype(np.float32)})
    scanpy.pp.neighbors(adata, n_neighbors=min(N_NEIGHBORS, len(types) - 1), use_rep="X", random_state=seed)
    best = (-1.0, 0.0)
    for resolution in RESOLUTIONS:
        scanpy.tl.leiden(
            adata, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed
        )
        clusters = adata.obs["leiden"].to_numpy()
        found = normalized_mutual_info_score(types, clusters), adjusted_rand_score(types, clusters)
        best = max(best, found)
    width = float((silhouette_score(points, types) + 1) / 2)
    scores = {"avg_bio": float(np.mean([*best, width])), "nmi": best[0], "ari": best[1], "asw_type": width}
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
    return scores


def components(train: np.ndarray, test: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Principal components of test cells, fitted to training cells; log1p(CP10k) `(n_cells, n_genes)`, both."""
    width = min(N_COMPONENTS, *(n - 1 for n in train.shape))
    return PCA(width, random_state=seed).fit(train).transform(test)
