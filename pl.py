"""Plots of results in the manner of scverse; each returns its figure. Needs the extra `eval`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 20_000  # cells that UMAP places; the others are left out of the picture
N_COMPONENTS = 30  # principal components, where nothing was embedded


def coordinates(adata: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Places of cells on a plane.

    They are `obsm["X_umap"]` if it has two columns of finite numbers, else UMAP of `obsm["X_scmmgpt"]`, else UMAP of
    principal components of log1p(CP10k) of `X`. Computed places of all cells are kept in
    `obsm["X_umap"]`, if it is free.

    Returns:
        float32 `(n, 2)`, the rows of these cells, int64 `(n,)`, and what the places are of.
    """
    from scmmgpt.eval.figures import umap_coordinates

    stored = np.asarray(adata.obsm["X_umap"]) if "X_umap" in adata.obsm else np.zeros((0, 0))
    if stored.shape[1] >= 2 and stored.dtype.kind in "fiu" and np.isfinite(stored).all():
        return stored[:, :2], np.arange(adata.n_obs), "UMAP of the file"
    rows = np.arange(adata.n_obs)
    if adata.n_obs > MAX_POINTS:
        rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:MAX_POINTS])
    if "X_scmmgpt" in adata.obsm:
        points, what = np.asarray(adata.obsm["X_scmmgpt"])[rows], "UMAP of the embedding"
    else:
        matrices = [adata.X, *adata.layers.values(), *([] if adata.raw is None else [adata.raw.X])]
        there = [matrix for matrix in matrices if matrix is not None]
        if not there:
            raise ValueError("The data have no matrix: X, layers and raw are empty. Write the file with its counts.")
        points, what = _components(there[0][rows], seed), "UMAP of principal components"
    if len(rows) < 5:
        raise ValueError(f"There are {len(rows)} cells; a UMAP needs 5 or more.")
    places = umap_coordinates(points, seed=seed)
    if len(rows) == adata.n_obs and "X_umap" not in adata.obsm:
        adata.obsm["X_umap"] = places
    return places, rows, what


def _components(matrix: Any, seed: int) -> np.ndarray:
    """Principal components of a matrix of any kind: counts are normalised, other values taken as they are."""
    from sklearn.decomposition import TruncatedSVD

    from scmmgpt.cells_scmmgpt import log1p_cp10k
    from scmmgpt.matrices_scmmgpt import inspect_matrix

    if inspect_matrix(matrix).kind.startswith("raw"):
        matrix = log1p_cp10k(matrix, np.asarray(matrix.sum(axis=1)).ravel())
    return TruncatedSVD(min(N_COMPONENTS, min(matrix.shape) - 1), random_state=seed).fit_transform(matrix)


def umap(adata: Any, color: str | Sequence[str] = "scmmgpt_cell_type", *, seed: int = 0) -> "Figure":
    """Cells on a plane, coloured by columns of `obs`, a panel each; see [`coordinates`]."""
    from scmmgpt.eval.figures import scatter_figure
    from scmmgpt.records_scmmgpt import need_columns

    columns = [color] if isinstance(color, str) else list(color)
    need_columns(adata.obs, *columns)
    places, rows, _ = coordinates(adata, seed)
    return scatter_figure(places, {name: adata.obs[name].iloc[rows].to_numpy() for name in columns})


def evidence(adata: Any, labels: Sequence[str] | None = None, *, key: str = "scmmgpt") -> "Figure":
    """The genes that speak for each label against the runner-up, by `uns[key]["explain"]`, the commonest labels first.

    The length of a bar is the term of the gene in the log odds, its shade the share of cells that express the gene.
    """
    from scmmgpt.eval.figures import evidence_figure

    table = _explained(adata, key)
    names = list(dict.fromkeys(table["name"])) if labels is None else list(labels)
    unknown = [name for name in names if name not in table["name"]]
    if unknown:
        raise ValueError(f"There is no evidence for {unknown}; there is for {sorted(set(table['name']))}.")
    cells = {name: table["cells"][np.flatnonzero(table["name"] == name)[0]] for name in names}
    return evidence_figure(table, sorted(names, key=lambda name: -cells[name]) if labels is None else names)


def _explained(adata: Any, key: str) -> Mapping[str, np.ndarray]:
    explained = (adata.uns.get(key) or {}).get("explain")
    if explained is None or "gene" not in explained:
        raise ValueError(f"uns[{key!r}] has no evidence: call `sm.tl.annotate` or `sm.tl.explain` first.")
    return {name: np.asarray(values) for name, values in explained.items() if name not in ("receipt", "label_key")}


def confusion(adata: Any, label_key: str, predicted: str = "scmmgpt_cell_type") -> "Figure":
    """Counts of given labels (down) by predicted ones (across), shaded by the share of the given label."""
    from scmmgpt.eval.figures import confusion_figure
    from scmmgpt.records_scmmgpt import need_columns, words_of

    need_columns(adata.obs, label_key, predicted)
    given, found = (words_of(adata.obs, name) for name in (label_key, predicted))
    rows, columns = np.unique(given), np.unique(found)
    columns = np.asarray([*(name for name in rows if name in columns), *(c for c in columns if c not in rows)])
    counts = [[int(((given == row) & (found == column)).sum()) for column in columns] for row in rows]
    about = {"rows_are": "given label", "labels": rows.tolist(), "columns": columns.tolist(), "counts": counts}
    return confusion_figure(about)
