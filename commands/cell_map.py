"""Data of the map of cells in the browser. `templates/map.js` draws the map, and reports the cells inside a loop."""

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
MAX_KINDS = 40  # a column of words with more has no colours
STEPS = 16  # shades of a column of numbers
PALEST = 0.2  # of the shades, which is seen on white
NEIGHBORS = 5  # real cells, one of whose places is that of a generated cell
GREY = "#9aa5b1"


def draw(
    places: np.ndarray,
    title: str,
    values: pd.Series | None = None,
    marks: np.ndarray | None = None,
    rows: Sequence[int] | np.ndarray = (),
) -> dict:
    """The value of the map: cells `(n, 2)` coloured by a column `(n,)`, numbers by shade and words by hue.

    Args:
        places: Places of cells on a plane.
        title: A line above the map.
        values: The column; without it all cells are grey.
        marks: Places of generated cells `(m, 2)`, drawn as crosses.
        rows: Cells that are selected.

    What is high or rare has the later colours of the palette, and is drawn above the others.
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
        names, found, counts = np.unique(words, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        colors = type_colors(names.tolist())
        palette += [to_hex(colors[name]) for name in names[order]]
        color = 1 + np.argsort(order)[found]
        legend = [(f"{names[k]} ({counts[k]:,})", palette[1 + i], 1 + i) for i, k in enumerate(order)]
    low, size = places.min(axis=0), np.ptp(places, axis=0)  # each axis fills the map; the units mean nothing
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
    """Columns of `obs` that can colour a map: numbers, and words of a few kinds."""
    return [name for name in obs if obs[name].dtype.kind in "fiu" or obs[name].nunique() <= MAX_KINDS]


def checked_rows(rows: Sequence[Any], n: int) -> np.ndarray:
    """The rows that a browser selected, int64, in order, each once; a number that is not a row of `n` is left out."""
    found = [row for row in rows if isinstance(row, int) and not isinstance(row, bool) and 0 <= row < n]
    return np.unique(np.asarray(found, dtype=np.int64))


def nearest_rows(places: np.ndarray, cells: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Rows `(m,)` of the cells that other cells are like: of the nearest cells, the one amid the others on the map.

    A mean place could be between two groups, where no cell is.

    Args:
        places: Places of cells `(n, 2)`.
        cells: Embeddings of these cells `(n, d)`.
        others: Embeddings of the other cells `(m, d)`.
    """
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(cells))).fit(cells)
    rows = nearest.kneighbors(others, return_distance=False)  # (m, k)
    found = places[rows]
    apart = np.linalg.norm(found[:, :, None] - found[:, None], axis=-1).sum(axis=-1)
    return rows[np.arange(len(rows)), apart.argmin(axis=1)]
