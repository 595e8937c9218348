"""Plots of results in the style of scverse. Each function returns a figure. Needs the extra `eval`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scmmgpt.rows_scmmgpt import layers_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 20_000  # most cells of a computed UMAP; further cells are left out
N_COMPONENTS = 30  # principal components for a UMAP without an embedding


def coordinates(adata: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Coordinates of cells in two dimensions.

    The coordinates are `obsm["X_umap"]`, if it has at least two columns of finite numbers. Otherwise they are a UMAP
    of `obsm["X_scmmgpt"]`, or else of principal components of log1p(CP10k) of the first matrix (`X`, layers, `raw`).
    Computed coordinates of all cells are stored in `obsm["X_umap"]`, if it does not exist.

    Returns:
        Coordinates `(n, 2)`; the rows of these cells, int64 `(n,)`; the source of the coordinates in words.

    Raises:
        ValueError: If there is no matrix, or a UMAP is needed for fewer than 5 cells.
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
        matrices = [adata.X, *layers_of(adata).values(), *([] if adata.raw is None else [adata.raw.X])]
        present = [matrix for matrix in matrices if matrix is not None]
        if not present:
            raise ValueError("The data have no matrix: X, layers and raw are empty. Write the file with its counts.")
        points, what = _components(present[0][rows], seed), "UMAP of principal components"
    if len(rows) < 5:
        raise ValueError(f"There are {len(rows)} cells; a UMAP needs 5 or more.")
    places = umap_coordinates(points, seed=seed)
    if len(rows) == adata.n_obs and "X_umap" not in adata.obsm:
        adata.obsm["X_umap"] = places
    return places, rows, what


def _components(matrix: Any, seed: int) -> np.ndarray:
    """Principal components of a matrix: counts become log1p(CP10k), other values are used unchanged."""
    from sklearn.decomposition import TruncatedSVD

    from scmmgpt.cells_scmmgpt import log1p_cp10k
    from scmmgpt.matrices_scmmgpt import inspect_matrix

    if inspect_matrix(matrix).kind.startswith("raw"):
        matrix = log1p_cp10k(matrix, np.asarray(matrix.sum(axis=1)).ravel())
    return TruncatedSVD(min(N_COMPONENTS, min(matrix.shape) - 1), random_state=seed).fit_transform(matrix)


def umap(adata: Any, color: str | Sequence[str] = "scmmgpt_cell_type", *, seed: int = 0) -> "Figure":
    """Scatter plots of cells at [`coordinates`], one panel for each column of `obs`, which gives the colours."""
    from scmmgpt.eval.figures import scatter_figure
    from scmmgpt.records_scmmgpt import need_columns

    columns = [color] if isinstance(color, str) else list(color)
    need_columns(adata.obs, *columns)
    places, rows, _ = coordinates(adata, seed)
    return scatter_figure(places, {name: adata.obs[name].iloc[rows].to_numpy() for name in columns})


def evidence(adata: Any, labels: Sequence[str] | None = None, *, key: str = "scmmgpt") -> "Figure":
    """Bars of the genes that speak for each label, from `uns[key]["explain"]`, the commonest labels first.

    The length of a bar is the gene's term in the log odds against the rival. The shade of a bar is the share of cells
    that express the gene.

    Raises:
        ValueError: If there is no evidence, or none for a label.
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
    """Confusion matrix: given labels in rows, predicted labels in columns, shaded by the share of the row."""
    from scmmgpt.eval.figures import confusion_figure
    from scmmgpt.records_scmmgpt import need_columns, words_of

    need_columns(adata.obs, label_key, predicted)
    given, called = (words_of(adata.obs, name) for name in (label_key, predicted))
    rows, columns = np.unique(given), np.unique(called)
    columns = np.asarray([*(name for name in rows if name in columns), *(c for c in columns if c not in rows)])
    counts = [[int(((given == row) & (called == column)).sum()) for column in columns] for row in rows]
    about = {"rows_are": "given label", "labels": rows.tolist(), "columns": columns.tolist(), "counts": counts}
    return confusion_figure(about)
