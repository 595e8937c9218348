"""Figures of the report."""

import base64
import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from scmmgpt.train.curves import figure_style


if TYPE_CHECKING:
    from scmmgpt.eval.cells import LabelledCells

REAL, GENERATED = "#9aa5b1", "#c2410c"
MAX_VECTOR_POINTS = 3000  # more points are drawn as pixels inside the SVG, which would otherwise take megabytes
LEGEND_ROW = 0.2  # inches
MAX_GENES = 8  # most genes of a label in a figure of evidence
# Colours of numbers, dark for high values; the yellow end of viridis is hardly visible on white.
SEEN_ON_WHITE = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.2, 1, 256)))


def data_uri(figure: Figure) -> str:
    """Encode the figure as an SVG data URI, so that the page is a single file."""
    buffer = io.BytesIO()
    with figure_style():
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None}, dpi=150)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 34, break_long_words=False)) or label


def type_colors(labels: Sequence[str]) -> dict[str, Any]:
    """Assign one colour to each type, the same in every figure of a report.

    The first ten colours are distinguishable with colour-vision deficiency (Petroff 2021, arXiv:2107.02270).
    """
    names = ("petroff10", "Set2", "tab20b", "tab20c")
    colors = [color for name in names for color in matplotlib.color_sequences[name]]
    return {label: colors[i % len(colors)] for i, label in enumerate(sorted(set(labels)))}


def confusion_figure(confusion: Mapping) -> Figure:
    """Draw counts of true types (rows) x predicted types (columns), shaded by the share of the true type.

    `confusion` has `labels` of the rows, `columns`, `counts`, and optionally `rows_are`, the title of the rows.
    """
    counts = np.array(confusion["counts"])
    rows, columns = confusion["labels"], confusion["columns"]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with figure_style():
        figure = Figure(figsize=(2.8 + 0.5 * len(columns), 2.4 + 0.5 * len(rows)))
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i in range(len(rows)):
            for j in range(len(columns)):
                if counts[i, j]:
                    color = "white" if share[i, j] > 0.6 else "#1f2933"
                    axes.text(j, i, counts[i, j], ha="center", va="center", color=color)
        axes.set_xticks(range(len(columns)), map(_wrapped, columns), rotation=90, linespacing=0.9)
        axes.set_yticks(range(len(rows)), map(_wrapped, rows))
        axes.set_xlabel("predicted type")
        rows_are = confusion.get("rows_are", "true type")
        axes.set_ylabel(rows_are)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        bar = figure.colorbar(image, ax=axes, label=f"share of the {rows_are}", shrink=0.7, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def calibration_figure(calibration: Sequence[Mapping]) -> Figure:
    """Accuracy against confidence, one point for each bin; the area of a point grows with the number of cells."""
    with figure_style():
        figure = Figure(figsize=(3.6, 3.4))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=REAL, linewidth=1, linestyle="--")
        x, y = [b["confidence"] for b in calibration], [b["accuracy"] for b in calibration]
        axes.plot(x, y, color=GENERATED, linewidth=1)
        largest = max(b["n"] for b in calibration)
        axes.scatter(x, y, s=[20 + 160 * b["n"] / largest for b in calibration], color=GENERATED, alpha=0.8, zorder=3)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.05), xlabel="confidence", ylabel="accuracy", aspect="equal")
    return figure


def umap_coordinates(points: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Embed points `(n, d)` by UMAP, `(n, 2)`; deterministic for a seed.

    Neighbours are exact, from scikit-learn: umap would first compile its own search, and below 4,096 points would call
    a Python function for each pair of points.
    """
    points = np.asarray(points, dtype=np.float32)
    n_neighbors = min(15, len(points) - 1)
    distances, indices = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(points)
    with warnings.catch_warnings():
        # umap warns about optional back ends on import, and that new points can't be transformed.
        warnings.simplefilter("ignore")
        import umap

        options = {"min_dist": 0.3, "init": "pca", "random_state": seed, "n_jobs": 1}
        return umap.UMAP(n_neighbors, precomputed_knn=(indices, distances), **options).fit_transform(points)


def tsne_coordinates(points: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Embed points `(n, d)` by t-SNE, `(n, 2)`; for the one map of a report, t-SNE is faster than compiling UMAP."""
    perplexity = min(30.0, max((len(points) - 1) / 3, 1.0))
    init = "pca" if points.shape[1] >= 2 else "random"
    reducer = TSNE(perplexity=perplexity, init=init, max_iter=500, random_state=seed, n_jobs=-1)
    return reducer.fit_transform(np.asarray(points, dtype=np.float32))


def scatter_figure(points: np.ndarray, columns: Mapping[str, np.ndarray]) -> Figure:
    """Draw points `(n, 2)` with one panel for each column `(n,)`: numbers as shades, words as hues with a legend."""
    kinds = [len(set(map(str, values))) for values in columns.values() if np.asarray(values).dtype.kind not in "fiu"]
    height = 4.2 + LEGEND_ROW * -(-max(kinds, default=0) // 2)
    with figure_style():
        figure = Figure(figsize=(5.4 * len(columns), height), layout="constrained")
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        size = float(np.clip(6000 / max(len(points), 1), 2, 26))
        style: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": len(points) > MAX_VECTOR_POINTS}
        for axes, (name, values) in zip(panels, columns.items(), strict=True):
            if np.asarray(values).dtype.kind in "fiu":
                drawn = axes.scatter(points[:, 0], points[:, 1], c=values, cmap=SEEN_ON_WHITE, **style)
                figure.colorbar(drawn, ax=axes, shrink=0.7).outline.set_visible(False)
            else:
                labels = np.asarray(values, dtype=str)
                colors = type_colors(labels.tolist())
                for label, color in colors.items():
                    mine = labels == label
                    axes.scatter(points[mine, 0], points[mine, 1], color=color, **style)
                    axes.scatter([], [], s=30, color=color, label=_wrapped(label))
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=9)
            axes.set(xticks=[], yticks=[], title=name)
    return figure


def evidence_figure(table: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw the evidence for labels, one panel of genes for each label.

    `table` has the columns `name`, `rival`, `gene`, `term` and `expressing` of `Evidence.group_rows`.
    """
    columns = min(len(names), 3)
    rows = -(-len(names) // max(columns, 1))
    with figure_style():
        figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        shades = matplotlib.colormaps["Blues"]
        for axes, name in zip(panels, names, strict=False):
            mine = np.flatnonzero((table["name"] == name) & (table["term"] > 0))
            mine = mine[np.argsort(-table["term"][mine], kind="stable")][:MAX_GENES]
            colors = [shades(0.25 + 0.75 * float(share)) for share in table["expressing"][mine]]
            axes.barh(range(len(mine)), table["term"][mine], color=colors)
            axes.set_yticks(range(len(mine)), table["gene"][mine], fontsize=7)
            axes.invert_yaxis()
            axes.set_title(_wrapped(str(name)), loc="left", fontsize=8)
            rival = table["rival"][table["name"] == name][0]
            axes.set_xlabel("log odds against\n" + _wrapped(str(rival)), fontsize=7)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
    return figure


def map_figures(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, prompts: np.ndarray, colors: Mapping
) -> tuple[Figure, Figure]:
    """Draw maps of real cells `(n_real, 2)` and generated cells `(n_generated, 2)`, coloured by type and by origin."""
    raster = len(real) + len(generated) > MAX_VECTOR_POINTS
    size = float(np.clip(6000 / (len(real) + len(generated)), 3, 26))

    def draw(axes: Axes, points: np.ndarray, **style: Any) -> None:
        axes.scatter(points[:, 0], points[:, 1], **{"s": size, "rasterized": raster, **style})

    shown = [label for label in colors if (real_labels == label).any() or (prompts == label).any()]
    with figure_style():
        by_type, by_origin = Figure(figsize=(4.8, 5.6)), Figure(figsize=(4.8, 5.6))
        axes, other = by_type.add_subplot(), by_origin.add_subplot()
        for label in shown:
            draw(axes, real[real_labels == label], color=colors[label], alpha=0.55, linewidths=0)
            prompted = {"color": colors[label], "marker": "^", "edgecolors": "#1f2933", "linewidths": 0.5}
            draw(axes, generated[prompts == label], s=size * 1.3, **prompted)
            axes.scatter([], [], s=30, color=colors[label], label=_wrapped(label))
        axes.scatter([], [], s=30, color="white", edgecolors="#52606d", label="real, held out")
        axes.scatter([], [], s=36, color="white", edgecolors="#1f2933", marker="^", label="generated")
        draw(other, real, color=REAL, alpha=0.8, linewidths=0)
        draw(other, generated, color=GENERATED, alpha=0.6, linewidths=0, marker="^")
        other.scatter([], [], s=30, color=REAL, label="real, held out")
        other.scatter([], [], s=36, color=GENERATED, marker="^", label="generated")
        axes.set_title("by type")
        other.set_title("by origin")
        for each, columns in ((axes, 1 if max(map(len, shown)) > 24 else 2), (other, 2)):
            each.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
            each.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=columns, frameon=False, fontsize=8)
    return by_type, by_origin


def marker_genes(train: "LabelledCells") -> list[tuple[str, str]]:
    """Find three marker genes of each training type (scanpy, Wilcoxon); return pairs (type, gene), each gene once."""
    import anndata
    import pandas as pd
    import scanpy

    names, counts = np.unique(train.labels, return_counts=True)
    kept = np.isin(train.labels, names[counts > 1])
    adata = anndata.AnnData(
        train.expression[kept],
        obs=pd.DataFrame({"type": pd.Categorical(train.labels[kept])}, index=np.arange(kept.sum()).astype(str)),
        var=pd.DataFrame(index=train.genes),
    )
    with warnings.catch_warnings():
        # Fold changes are undefined for genes without counts in a group; the ranking does not use fold changes.
        warnings.simplefilter("ignore")
        scanpy.tl.rank_genes_groups(adata, "type", method="wilcoxon", n_genes=min(50, adata.n_vars))
    chosen: dict[str, str] = {}
    for label in names[counts > 1]:
        ranked = [str(gene) for gene in adata.uns["rank_genes_groups"]["names"][label]]
        for gene in [gene for gene in ranked if gene not in chosen][:3]:
            chosen[gene] = str(label)
    return [(label, gene) for gene, label in chosen.items()]


def marker_figure(
    markers: Sequence[tuple[str, str]], types: Sequence[str], real: np.ndarray, generated: np.ndarray
) -> Figure:
    """Draw the mean expression of marker genes, with real held-out cells above generated cells.

    The columns are the markers, pairs (type, gene), and the rows the types. `real` and `generated` are mean
    log1p(CP10k), `(n_types, n_markers)`.
    """
    scale = np.maximum(real.max(0), 1e-6)
    with figure_style():
        figure = Figure(figsize=(3.2 + 0.21 * len(markers), 1.6 + 0.64 * len(types)))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, values, title in ((panels[0], real, "real, held out"), (panels[1], generated, "generated")):
            image = axes.imshow(values / scale, cmap="magma_r", vmin=0, vmax=1, aspect="auto")
            axes.set_yticks(range(len(types)), map(_wrapped, types), fontsize=7)
            axes.set_title(title, loc="left")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            for j in range(1, len(markers)):
                if markers[j][0] != markers[j - 1][0]:
                    axes.axvline(j - 0.5, color="white", linewidth=2)
        panels[1].set_xticks(range(len(markers)), [gene for _, gene in markers], rotation=90, fontsize=7)
        bar = figure.colorbar(image, ax=list(panels), shrink=0.5, pad=0.02, label="share of the largest real mean")
        bar.outline.set_visible(False)
    return figure
