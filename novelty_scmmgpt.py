"""Novelty: how far a cell is from all known cell types, and the broader term that a novel cell still gets.

A cell of an unseen type expresses genes that no known type expresses ([`novelty_of`], fitted by [`fit_novelty`]). If
the readout has reference profiles of other cells, the label of an unseen cell also fails to lead over these profiles
(`readout_scmmgpt.PanelReadout.novelty`). [`Novelty`] combines both measures for the genes of a file.

A single cell is noisy evidence, and a file usually has many cells of a new type. If other cells of the file are given,
novelty is averaged with the cells of the most similar label scores: [`Neighbours`].
"""

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .cells_scmmgpt import COUNTS_PER_10K, Cells, permutation, segment


logger = logging.get_logger(__name__)

# These constants separated known from new cell types best on cells of other laboratories, over six training sets
# (`train/LOG.md`).
ABSENT_BELOW = 0.3  # CP10k: a gene whose mean is lower in every known cell type counts as absent
# The unit is this quantile over held-out cells, times a margin, as laboratories differ more than held-out cells do.
HELD_OUT_QUANTILE, MARGIN = 0.98, 1.6
MIN_UNIT = 0.02  # lower bound of the unit, in case no held-out cell has a count in an absent gene
NOVELTY_FOLDS = 5
MIN_NOVELTY_CELLS = 100  # fewer cells express too few genes to call all other genes absent
ABSENT_WEIGHT = 0.1  # weight of the share of absent genes, beside the missing lead over other cells
BROADER_NOVELTY = 0.1  # highest novelty, in units, of a broader term that names a novel cell
N_NEIGHBOURS, NEIGHBOUR_WEIGHT = 12, 0.8  # nearest neighbours by label scores, and the weight of their mean novelty
# In a panel of this many genes, the leads of known cells vary more, so a missing lead is multiplied by the weight. In
# a smaller panel all leads are small, and a new cell is given a wrong label more often than it is called novel.
PANEL_GENES, PANEL_WEIGHT = range(500, 2000), 0.85
SCORE_STEPS, MOST_STEPS = 256, 512  # rounded scores, at most 2: products over up to 64 labels are exact in float32
# `others_unit` divided a lead that was neither on the scale of the panel nor divided by its spread.
OLD_UNIT = (
    "The checkpoint stores `others_unit`, the unit of an earlier measure of novelty (scmmgpt-human 0.3.0), which this "
    "code does not compute. Novelty therefore rests on genes that no known type expresses, and on nothing else. Use "
    "the checkpoint of this repository, or build one with `python -m scmmgpt.train release`."
)
MIN_MEASURED = 0.5  # a file with a smaller share of the genes that known cells express cannot show absent genes


def novelty_of(cells: Cells, absent: np.ndarray) -> np.ndarray:
    """Share of each cell's expression that lies in absent genes, by square roots of counts.

    The measure transfers between laboratories: a cell type keeps its silent genes, while distances between cells grow
    (`train/LOG.md`).

    Args:
        cells: Raw counts.
        absent: bool `(n_genes,)`, by vocabulary id.

    Returns:
        float32 `(n_cells,)`, from 0 to 1; 0 for a cell without counts.
    """
    roots, in_absent = np.sqrt(cells.counts, dtype=np.float64), np.flatnonzero(absent[cells.gene_ids])
    total = segment(np.add, roots, cells.indptr)
    novel = segment(np.add, roots[in_absent], np.searchsorted(in_absent, cells.indptr))
    return (novel / np.maximum(total, 1e-9)).astype(np.float32)


def absent_genes(cells: Cells, targets: np.ndarray, n_genes: int) -> np.ndarray:
    """Genes whose mean CP10k is below `ABSENT_BELOW` in every label, bool `(n_genes,)`.

    Args:
        cells: Raw counts.
        targets: int `(n_cells,)`: the number of each cell's label.
        n_genes: Size of the vocabulary.
    """
    rows = cells.rows()
    sizes = np.maximum(np.bincount(rows, weights=cells.counts, minlength=len(cells)), 1e-9)
    of_label = targets[rows]
    absent = np.ones(n_genes, dtype=bool)
    for label in np.unique(targets):
        mine = of_label == label
        shares = cells.counts[mine] / sizes[rows[mine]]
        means = np.bincount(cells.gene_ids[mine], weights=shares, minlength=n_genes) / (targets == label).sum()
        absent &= means * COUNTS_PER_10K < ABSENT_BELOW
    return absent


def fit_novelty(cells: Cells, targets: np.ndarray, measured: np.ndarray, n_genes: int) -> dict[str, Any] | None:
    """Fit the values by which `annotate` recognises cells that resemble no known type.

    Args:
        cells: Raw counts of training cells.
        targets: int `(n_cells,)`: the number of each cell's label.
        measured: Vocabulary ids of the genes that the file measures.
        n_genes: Size of the vocabulary.

    Returns:
        `absent_genes` and `expressed_genes` (one bit per gene, packed, in base64), and `unit`, the share of absent
        genes above which a cell is novel, from cross-validation in `NOVELTY_FOLDS` folds. None with fewer than
        `MIN_NOVELTY_CELLS` cells, and if no gene is absent or none is expressed.
    """
    if len(cells) < MIN_NOVELTY_CELLS:
        return None
    fold = permutation(len(cells), NOVELTY_FOLDS) % NOVELTY_FOLDS
    is_measured = np.zeros(n_genes, dtype=bool)
    is_measured[measured] = True
    shares = np.empty(len(cells), dtype=np.float32)
    for part in range(NOVELTY_FOLDS):
        absent = absent_genes(cells[fold != part], targets[fold != part], n_genes)
        shares[fold == part] = novelty_of(cells[fold == part], absent & is_measured)
    unit = max(float(np.quantile(shares, HELD_OUT_QUANTILE)) * MARGIN, MIN_UNIT)
    absent = absent_genes(cells, targets, n_genes) & is_measured
    expressed = is_measured & ~absent
    if not absent.any() or not expressed.any():
        return None
    return {"absent_genes": _pack(absent), "expressed_genes": _pack(expressed), "unit": round(unit, 6)}


def _pack(mask: np.ndarray) -> str:
    """A bool array as base64 text, one bit per element."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def _unpack(text: str, n_genes: int) -> np.ndarray:
    """The bool array `(n_genes,)` of [`_pack`]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n_genes).astype(bool)


@dataclass
class Neighbours:
    """Cells of a file among which [`Novelty`] looks for nearest neighbours.

    Args:
        scores: int16 `(n_cells, n_labels)`: centred label scores in steps, from [`of_scores`].
        novelty: float32 `(n_cells,)`: novelty of each cell alone, before division by the unit.
        types: float32 `(n_cells, n_labels + n_types)`: scores of the labels, then of types without training cells
            (`profiles_scmmgpt`). None unless needed.
    """

    scores: np.ndarray
    novelty: np.ndarray
    types: np.ndarray | None = None
    _last: Any = field(default=None, init=False, repr=False)  # the last argument of [`nearest`], and its result

    @functools.cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and half the squared norm of each cell's steps: multiples of a half, which float32 holds exactly."""
        steps = self.scores.astype(np.float32)
        return steps, (steps**2).sum(axis=1) / 2

    @staticmethod
    def of_scores(scores: np.ndarray) -> np.ndarray:
        """Label scores, minus their mean over the labels of a cell, in steps of 1 / `SCORE_STEPS`, int16."""
        around = scores - scores.mean(axis=1, keepdims=True, dtype=np.float64)
        return np.rint(SCORE_STEPS * around).clip(-MOST_STEPS, MOST_STEPS).astype(np.int16)

    def nearest(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest neighbours of cells: the `N_NEIGHBOURS` smallest Euclidean distances between steps, with all ties.

        Ties count in full, so that a cell has the same neighbours in any batch. The result is cached for the last
        array of scores.

        Args:
            scores: float32 `(n_cells, n_labels)`.

        Returns:
            Offset of each cell's neighbours in the second array, int64 `(n_cells,)`; positions of the neighbours.
        """
        if self._last is None or self._last[0] is not scores:
            steps, half = self._steps
            last, gaps = min(N_NEIGHBOURS, len(steps)), self.of_scores(scores).astype(np.float32) @ steps.T
            np.subtract(half, gaps, out=gaps)  # half the squared distance, minus half the squared norm of the cell
            farthest = torch.from_numpy(gaps).topk(last, dim=1, largest=False).values[:, -1:].numpy()
            rows, near = np.divmod(np.flatnonzero(gaps <= farthest), len(steps))
            self._last = scores, np.searchsorted(rows, np.arange(len(scores))), near
        return self._last[1:]

    def means(self, scores: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Means over the nearest neighbours of each cell, `(n_cells, ...)`.

        Args:
            scores: float32 `(n_cells, n_labels)`.
            values: `(len(self.scores), ...)`: a value for each cell that may be a neighbour.
        """
        starts, near = self.nearest(scores)
        sizes = np.diff([*starts, len(near)]).reshape(-1, *[1] * (values.ndim - 1))
        return np.add.reduceat(values[near], starts, axis=0) / sizes if len(starts) else values[:0]

    def difference(self, scores: np.ndarray, novelty: np.ndarray) -> np.ndarray:
        """Change of each cell's novelty towards the mean of its neighbours, float32 `(n_cells,)`.

        Args:
            scores: float32 `(n_cells, n_labels)`.
            novelty: float32 `(n_cells,)`: novelty of each cell alone, before division by the unit.
        """
        mean = self.means(scores, self.novelty.astype(np.float64))
        return (NEIGHBOUR_WEIGHT * (mean - novelty)).astype(np.float32)


@dataclass
class Novelty:
    """Novelty of cells, for the genes of one file.

    Args:
        absent: bool `(n_genes,)`: genes that no known type expresses; None if the file measures too few genes.
        unit: Share of absent genes above which a cell is novel.
        panel: `readout_scmmgpt.PanelReadout` with reference profiles of other cells, or None.
        lead_unit: Missing lead over the other cells above which a cell is novel (fitted by `train.left_out`).
        terms: Labels of each broader term, as positions in the panel; the preferred terms first.
        batch_unit: Replaces `lead_unit` if neighbours are given.
        neighbours: Cells of the file, or None.
    """

    absent: np.ndarray | None
    unit: float
    panel: Any = None
    lead_unit: float = 1.0
    terms: Sequence[Sequence[int]] = ()
    batch_unit: float | None = None
    neighbours: Neighbours | None = None

    @classmethod
    def of(
        cls,
        stored: Mapping[str, Any] | None,
        measured: np.ndarray,
        n_genes: int,
        panel: Any = None,
        terms: Sequence[Sequence[int]] = (),
    ) -> "Novelty | None":
        """Novelty for a file.

        Args:
            stored: `config.annotation["novelty"]`.
            measured: Vocabulary ids of the genes that the file measures.
            n_genes: Size of the vocabulary.
            panel: The readout for `measured`, if the checkpoint has one.
            terms: As in the class.

        Returns:
            None if the checkpoint stores no novelty. Also None if the file measures less than `MIN_MEASURED` of the
            expressed genes, unless the panel has other cells.
        """
        if not stored:
            return None
        absent, unit = None, stored.get("unit", 1.0)
        if "expressed_genes" in stored:
            expressed = _unpack(stored["expressed_genes"], n_genes)
            if expressed[measured].sum() >= MIN_MEASURED * expressed.sum():
                absent = _unpack(stored["absent_genes"], n_genes)
        if panel is not None and panel.others is not None:
            if "lead_unit" in stored:
                return cls(absent, unit, panel, stored["lead_unit"], terms, stored.get("batch_unit"))
            if "others_unit" in stored:
                logger.warning(OLD_UNIT)
        return None if absent is None else cls(absent, unit)

    def __call__(self, cells: Cells) -> np.ndarray:
        """Novelty of each cell, float32 `(n_cells,)`; a cell above 1 resembles no known type.

        With `terms` the result is `(n_cells, 2)`. The second column holds, for cells above 1, the first term that
        includes the best label and has a novelty of at most `BROADER_NOVELTY`; else -1.
        """
        if self.panel is None and self.absent is not None:
            return novelty_of(cells, self.absent) / np.float32(self.unit)
        share, unit, added = self._share(cells), self.lead_unit, np.zeros((len(cells), 1), dtype=np.float32)
        raw = self._missing_lead(cells) + share
        if self.neighbours is not None and self.batch_unit is not None:
            unit, added = self.batch_unit, self.neighbours.difference(self.panel.scores(cells), raw[:, 0])[:, None]
        novelty = (raw + added)[:, 0] / np.float32(unit)
        if not self.terms:
            return novelty.clip(min=0)
        raw = self._missing_lead(cells, self.terms, novelty > 1) + share
        broader = first_term((raw + added)[:, 1:], unit).astype(np.float32)
        return np.stack([novelty.clip(min=0), broader], axis=1)

    def with_neighbours(self, cells: Cells) -> "Neighbours | None":
        """Neighbours made of `cells`; None if the readout has no other cells, or no `batch_unit` is stored."""
        if self.panel is None or self.batch_unit is None:
            return None
        return Neighbours(Neighbours.of_scores(self.panel.scores(cells)), self.raw(cells)[:, 0])

    def raw(self, cells: Cells, terms: Sequence[Sequence[int]] = ()) -> np.ndarray:
        """Novelty by the best label, then by `terms`, `(n_cells, 1 + n_terms)`, before division by the unit."""
        return self._share(cells) if self.panel is None else self._missing_lead(cells, terms) + self._share(cells)

    def _missing_lead(
        self, cells: Cells, terms: Sequence[Sequence[int]] = (), is_novel: np.ndarray | None = None
    ) -> np.ndarray:
        """`readout_scmmgpt.PanelReadout.novelty`, times `PANEL_WEIGHT` in a panel of `PANEL_GENES`."""
        missing = self.panel.novelty(cells, terms, is_novel)
        return missing * np.float32(PANEL_WEIGHT if len(self.panel.gene_ids) in PANEL_GENES else 1)

    def _share(self, cells: Cells) -> np.ndarray:
        """Novelty by absent genes, float32 `(n_cells, 1)`, times `ABSENT_WEIGHT` if there is a panel."""
        if self.absent is None:
            return np.zeros((len(cells), 1), dtype=np.float32)
        share = novelty_of(cells, self.absent)[:, None] / np.float32(self.unit)
        return share if self.panel is None else np.float32(ABSENT_WEIGHT) * share


def first_term(novelty: np.ndarray, unit: float) -> np.ndarray:
    """Position of the first term with a novelty of at most `BROADER_NOVELTY`, int `(n_cells,)`; -1 for none.

    Args:
        novelty: `(n_cells, n_terms)`, before division by the unit.
        unit: The unit.
    """
    fits = novelty <= BROADER_NOVELTY * unit
    return np.where(fits.any(axis=1), fits.argmax(axis=1), -1) if fits.shape[1] else np.full(len(fits), -1)
