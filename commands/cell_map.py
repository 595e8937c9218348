"""Data of the map of cells in the browser. `templates/map.js` draws the map, and reports the cells in a lasso."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.records_scmmgpt import words_of


HTML = '<p></p><canvas role="img" aria-label="Map of the cells"></canvas><ul></ul>'
CSS = """
canvas { width: 100%; aspect-ratio: 1; max-height: min(60vh, 520px); touch-action: none; cursor: crosshair;
         background: #fff; border: 1px solid #8884; border-radius: 6px }
p { margin: 0 0 4px; overflow-wrap: anywhere }
ul { display: flex; flex-wrap: wrap; gap: 2px 6px; list-style: none; margin: 6px 0; padding: 0; max-height: 19.3em;
     overflow: auto }
li, button { font-size: 13px }
button { padding: 1px 4px; border: 0; border-radius: 4px; background: none; color: inherit; font-weight: 400;
         cursor: pointer; text-align: left; text-decoration: underline dotted #8888 }
button:hover, button[aria-pressed=true] { background: #8883 } button:focus-visible { outline: 2px solid #1d4ed8 }
i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 5px; border: 1px solid #8886 }
"""
SCRIPT = Path(__file__).parent / "templates" / "map.js"
MAX_KINDS = 40  # most values of a text column that can colour the map
STEPS = 16  # shades of a column of numbers
PALEST = 0.2  # lightest shade that is visible on white
NEIGHBORS = 5  # nearest real cells that are candidates for the position of a generated cell
GREY = "#9aa5b1"


def draw(
    places: np.ndarray,
    title: str,
    values: pd.Series | None = None,
    marks: np.ndarray | None = None,
    rows: Sequence[int] | np.ndarray = (),
) -> dict:
    """Make the data of a map of cells, coloured by a column: numbers as shades, words as hues.

    High numbers and rare words have later colours in the palette, and are drawn above the other cells.

    Args:
        places: Positions of the cells, `(n, 2)`.
        title: A line above the map.
        values: Column `(n,)`; without it, all cells are grey.
        marks: Positions of generated cells `(m, 2)`, drawn as crosses.
        rows: Selected cells.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from scmmgpt.eval.figures import type_colors

    n = len(places)
    palette, color = [GREY], np.zeros(n, dtype=int)
    legend: list[tuple[str, str, int | None]] = []
    if values is not None and values.dtype.kind in "fiu":
        numbers = values.to_numpy(dtype=float)
        known = np.isfinite(numbers)
        low, high = (numbers[known].min(), numbers[known].max()) if known.any() else (0.0, 0.0)
        palette += [to_hex(colormaps["Blues"](PALEST + (1 - PALEST) * step / (STEPS - 1))) for step in range(STEPS)]
        share = (numbers[known] - low) / max(high - low, 1e-12)
        color[known] = 1 + np.minimum((share * STEPS).astype(int), STEPS - 1)
        legend = [(f"{low:.3g}", palette[1], None), (f"{high:.3g}", palette[-1], None)]
    elif values is not None:
        words = words_of(values.to_frame("values"), "values")
        names, codes, counts = np.unique(words, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        colors = type_colors(names.tolist())
        palette += [to_hex(colors[name]) for name in names[order]]
        color = 1 + np.argsort(order)[codes]
        legend = [(f"{names[k]} ({counts[k]:,})", palette[1 + i], 1 + i) for i, k in enumerate(order)]
    low, size = places.min(axis=0), np.ptp(places, axis=0)  # scale each axis to the map; the units have no meaning
    low, size = np.where(size > 0, low, low - 0.5), np.where(size > 0, size, 1.0)

    def scaled(points: np.ndarray) -> dict[str, list[int]]:
        x, y = np.clip((points - low) / size * 1000, -20, 1020).round().astype(int).T
        return {"x": x.tolist(), "y": y.tolist()}

    marked = scaled(marks) if marks is not None and len(marks) else {"x": [], "y": []}
    return {
        **scaled(places),
        "color": color.tolist(),
        "palette": palette,
        "legend": legend,
        "title": title,
        "marks": marked,
        "rows": np.asarray(rows, dtype=int).tolist(),
    }


def colors_of(obs: pd.DataFrame) -> list[str]:
    """Columns of `obs` that can colour a map: numbers, and text with at most `MAX_KINDS` values."""
    return [name for name in obs if obs[name].dtype.kind in "fiu" or obs[name].nunique() <= MAX_KINDS]


def checked_rows(rows: Sequence[Any], n: int) -> np.ndarray:
    """Check the rows that a browser selected; return unique ascending int64 without values outside `0 <= row < n`."""
    valid = [row for row in rows if isinstance(row, int) and not isinstance(row, bool) and 0 <= row < n]
    return np.unique(np.asarray(valid, dtype=np.int64))


def nearest_rows(places: np.ndarray, cells: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Choose a cell whose position represents each other cell: the medoid, on the map, of its nearest cells.

    A mean position could lie between two groups, where there are no cells.

    Args:
        places: Positions of the cells, `(n, 2)`.
        cells: Embeddings of the cells, `(n, d)`.
        others: Embeddings of the other cells, `(m, d)`.

    Returns:
        Rows of `cells`, `(m,)`.
    """
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(cells))).fit(cells)
    rows = nearest.kneighbors(others, return_distance=False)  # (m, k)
    near = places[rows]
    apart = np.linalg.norm(near[:, :, None] - near[:, None], axis=-1).sum(axis=-1)
    return rows[np.arange(len(rows)), apart.argmin(axis=1)]
