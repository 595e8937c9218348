"""Refinement: the cells of a file as one more dataset of the label readout (self-training).

Differences between laboratories exceed differences between cells of one type, and a file usually comes from a
laboratory that the readout has not seen. Cells of the file whose best label leads clearly are taken as cells of that
label, and their mean profile joins the groups of the label in the regression ([`FileMeans`]). The file gets little
weight: what several datasets agree on stays, and the file decides the rest. The result is one more set of weights, so
a cell gets the same label in every batch and partition of the file.

In a narrow panel, whose few genes were chosen as markers, the likelihood of the counts is added to the scores
([`log_shares`]).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .cells_scmmgpt import Cells
from .readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout
from .regression_scmmgpt import solve_groups, with_groups


# These constants were chosen on left-out datasets, with all genes and on panels (`train/LOG.md`).
LEAST_LEAD = 0.1  # least lead of the best score over all others for a cell to join the mean of its best label
FILE_WEIGHT = 0.01  # weight of the file for a label; all datasets that have the label weigh 1 together
SHRINKING_CELLS = 3  # number of cells of a label at which the file has half of this weight
MIN_FILE = 20  # a file with fewer cells does not refine the readout
NARROW = 2000  # a panel with fewer genes of the readout is narrow
LIKELIHOOD_WEIGHT = 0.5  # weight of the mean log-likelihood, added to scores of about 1 (right label) and 0 (others)
BACKGROUND = 0.3  # share of the mean profile of all labels that is added to the profile of each label
LEAST_ROOT = 1e-3  # square root of CP10k that is added to every gene: no logarithm of zero


@dataclass
class FileMeans:
    """Mean profiles of the confidently labelled cells of a file.

    Args:
        means: float32 `(n_labels, n_genes)`, log1p(CP10k) on the scale of the panel; 0 for a label without cells.
        n_cells: int64 `(n_labels,)`: number of cells in each mean.
    """

    means: np.ndarray
    n_cells: np.ndarray

    @classmethod
    def of(cls, panel: PanelReadout, cells: Cells) -> "FileMeans":
        """Mean profiles by the labels of `panel`, of all cells of a file or of a sample from the whole file.

        A cell without counts is left out, as its scores are the bias alone.
        """
        scores, (indptr, positions, values) = panel.scores(cells), panel.last_profiles(cells)
        best, (n_labels, n_genes) = scores.argmax(axis=1), panel.weights.T.shape
        ahead = np.sort(np.pad(scores, ((0, 0), (1, 0)), constant_values=-np.inf), axis=1)
        lengths = np.diff(indptr)
        is_clear = (ahead[:, -1] - ahead[:, -2] >= LEAST_LEAD) & (lengths > 0)
        n_cells = np.bincount(best[is_clear], minlength=n_labels)
        entry, label = np.repeat(is_clear, lengths), np.repeat(best, lengths)
        places = label[entry] * n_genes + positions[entry]
        sums = np.bincount(places, weights=values[entry], minlength=n_labels * n_genes).reshape(n_labels, n_genes)
        return cls((sums / n_cells.clip(min=1)[:, None]).astype(np.float32), n_cells)

    def refine(self, readout: ScMMGPTLabelReadout, panel: PanelReadout, labels: Sequence[int]) -> PanelReadout:
        """The panel with `file_weights` and `file_bias`, solved from the groups of the readout and these means.

        Only the probabilities change. The scores of the labels, and so novelty, stay.

        Args:
            readout: The readout that `panel` was solved from; it has groups.
            panel: The readout for the genes of the file.
            labels: Positions in the readout of the labels of `panel`.
        """
        a = readout.arrays()
        here = np.isin(a["gene_ids"], panel.gene_ids)
        seen, places = np.flatnonzero(self.n_cells), np.asarray(labels, dtype=np.int64)
        weights = FILE_WEIGHT * self.n_cells[seen] / (self.n_cells[seen] + SHRINKING_CELLS)
        rows = np.tile(a["group_mean"], (len(seen), 1))
        rows[:, here] = self.means[seen]
        solved = [
            solve_groups(with_groups(version, rows, places[seen], weights), here)
            for version in readout.versions(a, here)
        ]
        of_labels, bias = (np.mean(parts, axis=0)[places] for parts in zip(*solved, strict=True))
        of_labels = np.ascontiguousarray(of_labels.T, dtype=np.float32)
        is_narrow = len(solved) > 1 and here.sum() < NARROW
        shares = log_shares(a, here, places) if is_narrow else None
        return replace(panel, file_weights=of_labels, file_bias=bias.astype(np.float32), file_shares=shares)


def refine_by_cells(readout: ScMMGPTLabelReadout, panel: PanelReadout, cells: Cells) -> PanelReadout:
    """The panel, which has all labels of the readout, refined by cells of one file; unchanged below `MIN_FILE`."""
    if len(cells) < MIN_FILE:
        return panel
    return FileMeans.of(panel, cells).refine(readout, panel, range(len(panel.bias)))


def log_shares(a: dict[str, np.ndarray], here: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of a multinomial log-likelihood of each label, for the profiles of `regression_scmmgpt.root_shares`.

    The likelihood is of the square roots of the counts, so that a few highly expressed genes do not decide alone.

    Args:
        a: The arrays of a readout with groups.
        here: bool `(num_genes,)`: which genes of the readout the panel has.
        labels: Positions of the labels in the readout.

    Returns:
        float32 `(n_here, n_labels)`: `LIKELIHOOD_WEIGHT` times the log share of each gene.
    """
    mentions = (a["group_labels"] * a["group_weights"][:, None])[:, labels].T
    means = mentions @ np.expm1(a["groups"][:, here]).clip(min=0) / mentions.sum(axis=1, keepdims=True)
    roots = np.sqrt(means) + BACKGROUND * np.sqrt(np.expm1(a["group_mean"][here]).clip(min=0)) + LEAST_ROOT
    logs = LIKELIHOOD_WEIGHT * np.log(roots / roots.sum(axis=1, keepdims=True))
    return np.ascontiguousarray(logs.T, dtype=np.float32)
