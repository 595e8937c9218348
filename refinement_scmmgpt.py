"""The cells of a file as one more dataset of the readout that names them.

A laboratory differs from another more than cells of one type differ, and the file to annotate comes from a laboratory
that the readout has not seen. The cells of the file whose best label leads clearly are taken for cells of that label,
and their mean profile joins the groups of the label in the regression ([`FileMeans`]). It has little weight: what
several datasets agree on stays, and the file decides what they leave open. The result is one more set of weights, so
that a cell still has the same answer in every batch and partition of its file.

Of a narrow panel, whose few genes are chosen for what they tell, the likelihood of the counts is weighed in
([`log_shares`]).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .cells_scmmgpt import Cells
from .readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout
from .regression_scmmgpt import solve_groups, with_groups


# Chosen over datasets left out, with all genes and on panels (`train/LOG.md`).
LEAST_LEAD = 0.1  # of the best label's score over every other, of a cell that stands for its label
FILE_WEIGHT = 0.01  # of the file, beside all datasets that have the label, which are 1
SHRINKING_CELLS = 3  # of a label at which the file has half of this weight
MIN_FILE = 20  # cells: fewer leave the readout as it is
NARROW = 2000  # genes of the readout: a panel with fewer is a narrow one
LIKELIHOOD_WEIGHT = 0.5  # of a mean log likelihood, beside scores of about 1 for the right label and 0 for others
BACKGROUND = 0.3  # of the mean over labels in the profile of each, and `LEAST_ROOT` of each gene
LEAST_ROOT = 1e-3  # square root of CP10k


@dataclass
class FileMeans:
    """Mean profiles of the cells of a file that stand for a label.

    Args:
        means: float32 `(n_labels, n_genes)`, log1p(CP10k) on the scale of the panel; 0 for a label without a cell.
        n_cells: int64 `(n_labels,)`: the cells of each.
    """

    means: np.ndarray
    n_cells: np.ndarray

    @classmethod
    def of(cls, panel: PanelReadout, cells: Cells) -> "FileMeans":
        """Of the cells of a file, or of some from all over it; the labels are those of `panel`.

        A cell without a count, whose scores are the bias of the labels, stands for none.
        """
        scores, (indptr, positions, values) = panel.scores(cells), panel.last_profiles(cells)
        best, (n_labels, n_genes) = scores.argmax(axis=1), panel.weights.T.shape
        ahead = np.sort(np.pad(scores, ((0, 0), (1, 0)), constant_values=-np.inf), axis=1)
        lengths = np.diff(indptr)
        kept = (ahead[:, -1] - ahead[:, -2] >= LEAST_LEAD) & (lengths > 0)
        n_cells = np.bincount(best[kept], minlength=n_labels)
        entry, label = np.repeat(kept, lengths), np.repeat(best, lengths)
        places = label[entry] * n_genes + positions[entry]
        sums = np.bincount(places, weights=values[entry], minlength=n_labels * n_genes).reshape(n_labels, n_genes)
        return cls((sums / n_cells.clip(min=1)[:, None]).astype(np.float32), n_cells)

    def refine(self, readout: ScMMGPTLabelReadout, panel: PanelReadout, labels: Sequence[int]) -> PanelReadout:
        """The panel with weights for probabilities from groups and file; scores and novelty stay.

        Args:
            readout: With groups; what `panel` was solved from.
            panel: For the genes of the file.
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
    """The panel of all labels, refined by cells of one file; as it is for fewer than `MIN_FILE`."""
    if len(cells) < MIN_FILE:
        return panel
    return FileMeans.of(panel, cells).refine(readout, panel, range(len(panel.bias)))


def log_shares(a: dict[str, np.ndarray], here: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of `regression_scmmgpt.root_shares`, float32 `(n_here, n_labels)`: the likelihood of a cell's counts.

    It is multinomial, of the square roots of the counts, which few genes do not decide alone.

    Args:
        a: Of a readout with groups.
        here: bool `(num_genes,)`: the genes of the panel.
        labels: Positions of the labels.
    """
    mentions = (a["group_labels"] * a["group_weights"][:, None])[:, labels].T
    means = mentions @ np.expm1(a["groups"][:, here]).clip(min=0) / mentions.sum(axis=1, keepdims=True)
    roots = np.sqrt(means) + BACKGROUND * np.sqrt(np.expm1(a["group_mean"][here]).clip(min=0)) + LEAST_ROOT
    logs = LIKELIHOOD_WEIGHT * np.log(roots / roots.sum(axis=1, keepdims=True))
    return np.ascontiguousarray(logs.T, dtype=np.float32)
