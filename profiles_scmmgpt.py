"""Types that no training cell has, named by their reference profiles where these explain a cell far better.

A checkpoint of `release` keeps mean profiles of types that none of its datasets has, such as hepatocytes. Each is a
group of one label in the regression of the readout ([`with_profiles`]), which the cells of the file are scored by. A
cell that is not plainly of a trained label gets the name of such a type if it leads over all labels and other types.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


try:  # as a package or as remote code
    from .cells_scmmgpt import Cells
    from .readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout, sum_weights
    from .regression_scmmgpt import scale_groups, solve_groups, with_profiles
except ImportError:  # beside the other files of a checkpoint
    from cells_scmmgpt import Cells
    from readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout, sum_weights
    from regression_scmmgpt import scale_groups, solve_groups, with_profiles


# A type names a cell that it leads in by 2 over the root of the genes that the cell expresses: few genes, much chance.
# With labels and datasets left out, more than nine of ten of these cells are named rightly. At half the limit of
# novelty a quarter of the known cells are looked at (`train/LOG.md`).
NAMING_LEAD = 2.0
NAMING_NOVELTY = 0.5


@dataclass
class ProfiledTypes:
    """Trained labels and all types that have a profile alone, for the genes of one file.

    Args:
        panel: The readout of trained labels for these genes; its profiles of cells are used.
        n_labels: Number of trained labels.
        weights: float32 `(n_genes, n_labels + n_types)`.
        bias: float32 `(n_labels + n_types,)`.
    """

    panel: PanelReadout
    n_labels: int
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, readout: ScMMGPTLabelReadout, panel: PanelReadout) -> "ProfiledTypes":
        """For the genes of a panel, of a readout with profiles."""
        arrays = readout.arrays()
        arrays = with_profiles(arrays, range(len(arrays["profiles"])))
        here = np.isin(arrays["gene_ids"], panel.gene_ids)
        weights, bias = solve_groups(arrays if here.all() else scale_groups(arrays, here), here)
        return cls(
            panel, len(readout.bias), np.ascontiguousarray(weights.T, dtype=np.float32), bias.astype(np.float32)
        )

    def name(self, cells: Cells, novelty: np.ndarray) -> np.ndarray:
        """The type that names each cell, or -1, and its probability, float32 `(n_cells, 2)`.

        `novelty` float `(n_cells,)` is that of the cells' trained labels, 1 at the limit.
        """
        found = np.tile(np.array([-1, 0], dtype=np.float32), (len(cells), 1))
        rows = np.flatnonzero(novelty > NAMING_NOVELTY)
        if not len(rows):
            return found
        profiles = some_rows(*self.panel.last_profiles(cells), rows)
        scores, every = sum_weights(*profiles, self.weights) + self.bias, np.arange(len(rows))
        best = self.n_labels + scores[:, self.n_labels :].argmax(axis=1)
        probability = torch.from_numpy(scores / np.float32(self.panel.temperature)).softmax(dim=1).numpy()
        own = scores[every, best]
        scores[every, best] = -np.inf
        named = (own - scores.max(axis=1)) * np.sqrt(np.diff(profiles[0])) >= NAMING_LEAD
        found[rows[named]] = np.stack([best - self.n_labels, probability[every, best]], axis=1)[named]
        return found

    def beside(self, novelty_of: Callable[[Cells], np.ndarray]) -> Callable[[Cells], np.ndarray]:
        """The columns of a novelty, `(n_cells,)` or `(n_cells, n)`, and then those of [`name`]."""

        def score(cells: Cells) -> np.ndarray:
            novelty = novelty_of(cells)
            novelty = novelty.reshape(len(cells), -1)
            return np.hstack([novelty, self.name(cells, novelty[:, 0])]).astype(np.float32)

        return score


def some_rows(
    starts: np.ndarray, positions: np.ndarray, values: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some rows of ragged profiles.

    >>> some_rows(np.array([0, 2, 3]), np.array([4, 5, 6]), np.array([1.0, 2.0, 3.0]), np.array([1]))
    (array([0, 1]), array([6]), array([3.]))
    """
    lengths = np.diff(starts)[rows]
    new = np.concatenate([[0], np.cumsum(lengths)])
    taken = np.arange(new[-1]) + np.repeat(starts[rows] - new[:-1], lengths)
    return new, positions[taken], values[taken]
