"""The proposals of the model, which [`Proof`] checks against the counts: genes for a type, and alternative types."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers.utils import logging

from .cells_scmmgpt import Cells
from .evidence_scmmgpt import NONE, Explainer


MIN_ALTERNATIVE = 0.1  # least probability of a runner-up


@dataclass
class Other:
    """An alternative type for each cell.

    Args:
        names: str `(n_cells,)`: the alternative; "" for none.
        against: str `(n_cells,)`: the type that the alternative is compared with.
        genes: As `candidates` of [`Proposals`], for the alternative.
    """

    names: np.ndarray
    against: np.ndarray
    genes: np.ndarray


class Proposals:
    """Genes for the type of each cell; on demand, alternative types with their genes.

    Args:
        cells: All cells.
        explainer: One set of trained labels for each of `kinds`; a set of no or nearly all labels has no evidence.
        gene_ids: int64 `(n_genes,)`, ascending: vocabulary ids of the columns of the counts.
        kinds: Types of the cells.
        labels: Labels of the readout, in order.
        kind_of_cell: int64 `(n_cells,)`: positions in `kinds`.
        probabilities: `(n_cells, n_labels)`.
        batch_size: Cells per batch.

    Attributes:
        candidates: int64 `(n_cells, n)`: columns of genes that speak for the type, `NONE` for none. Expressed markers
            come first, then the evidence.
        is_broad: bool `(n_cells,)`: whether the type stands for several trained labels.
    """

    def __init__(
        self,
        cells: Cells,
        explainer: Explainer,
        gene_ids: np.ndarray,
        kinds: Sequence[str],
        labels: Sequence[str],
        kind_of_cell: np.ndarray,
        probabilities: np.ndarray,
        batch_size: int,
    ) -> None:
        self.cells, self.explainer, self.batch_size, self.kind_of_cell = cells, explainer, batch_size, kind_of_cell
        self.names = np.asarray([*kinds, *labels, ""], dtype=object)
        self.columns = np.append(np.searchsorted(gene_ids, explainer.panel.gene_ids), NONE)
        mine = explainer.members[kind_of_cell]
        self.is_broad = mine.sum(axis=1) > 1
        inside = np.argsort(-np.where(mine, probabilities, -1), axis=1, kind="stable")[:, :2] + explainer.first_label
        outside = np.where(mine, -1, probabilities)
        first = np.where(outside.max(axis=1) >= MIN_ALTERNATIVE, outside.argmax(axis=1) + explainer.first_label, NONE)
        self.first = np.where(self.is_broad, inside[:, 0], np.where(mine.any(axis=1), first, NONE))
        self.second = np.where(self.is_broad, inside[:, 1], kind_of_cell)
        self.candidates = self._genes(np.arange(len(cells)), kind_of_cell)

    def _genes(self, rows: np.ndarray, names: np.ndarray, rivals: np.ndarray | None = None) -> np.ndarray:
        """Columns of genes that speak for `names`, the types of cells `rows`, against `rivals` or the runner-up."""
        found = [np.empty((0, 0), dtype=np.int64)] * (not len(rows))
        what = "Looking for genes"
        for start in logging.tqdm(range(0, len(rows), self.batch_size), desc=what, unit="batch", delay=3):
            part = slice(start, start + self.batch_size)
            name, against = names[part], None if rivals is None else rivals[part]
            evidence, _ = self.explainer(self.cells[rows[part]], name, against)
            markers = np.where(evidence.markers, self.explainer.markers[name], NONE)
            found.append(np.hstack([markers, evidence.genes]))
        return self.columns[np.concatenate(found)]

    def others(self, rows: np.ndarray) -> tuple[Other, Other]:
        """The runner-up of the cells `rows` (int64), and a second alternative for cells of a broad type."""
        first, second, is_broad = self.first[rows], self.second[rows], self.is_broad[rows]
        nothing = np.full(len(rows), NONE)
        against = np.where(is_broad, first, nothing)
        of_first = self._genes(rows, np.maximum(first, 0), np.where(first == NONE, NONE, second))
        of_second = self._genes(rows, np.maximum(second, 0), np.where(second == NONE, NONE, against))
        names = self.names
        return (
            Other(names[first], names[np.where(first == NONE, NONE, second)], of_first),
            Other(names[np.where(is_broad, second, nothing)], names[against], of_second),
        )
