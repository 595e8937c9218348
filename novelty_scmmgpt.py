"""How far a cell is from all that a checkpoint knows, and what a cell that is far may still be called.

A cell of a type that was never seen expresses genes that no known type does ([`novelty_of`], fitted by
[`fit_novelty`]), and its label does not lead over the reference profiles of other cells, where the readout has them
(`readout_scmmgpt.PanelReadout.novelty`). [`Novelty`] is both for the genes of a file.

One cell is noisy evidence, and cells of a new type come in numbers. With other cells of the file at hand, a cell is
judged with the cells that have the most similar scores: [`Neighbours`].
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

# Novelty. The values are those that told apart known and new cell types best on cells of other laboratories, over six
# training sets (`train/LOG.md`).
ABSENT_BELOW = 0.3  # counts per 10,000: a gene below it in every known cell type is absent from them
HELD_OUT_QUANTILE, MARGIN = 0.98, 1.6  # other laboratories differ more than held-out cells of the same one
MIN_UNIT = 0.02  # for known cells without a single count in an absent gene
NOVELTY_FOLDS = 5
MIN_NOVELTY_CELLS = 100  # with fewer cells, too few genes are seen to call the others absent
ABSENT_WEIGHT = 0.1  # of the share of absent genes, in its unit, beside the missing lead over other cells
BROADER_NOVELTY = 0.1  # at most, of a broader term that a novel cell gets
N_NEIGHBOURS, NEIGHBOUR_WEIGHT = 12, 0.8  # cells of similar scores, and the weight of the mean of their novelty
# In panels of so many genes leads of known cells vary more, and what a lead lacks counts less. With fewer genes than
# those all leads are small, and cells are called wrongly rather than novel.
PANEL_GENES, PANEL_WEIGHT = range(500, 2000), 0.85
SCORE_STEPS, MOST_STEPS = 256, 512  # whole steps of a score: sums of products of up to 64 labels are exact in float32
# `others_unit` was the unit of a lead that was neither brought to the scale of a panel nor divided by its spread.
OLD_UNIT = (
    "The checkpoint has `others_unit`, the unit of an earlier measure of novelty (scmmgpt-human 0.3.0), which this "
    "code does not compute: novelty is judged by the genes that no known type expresses, and by nothing else. Use the "
    "checkpoint of this repository, or build one with `python -m scmmgpt.train release`."
)
MIN_MEASURED = 0.5  # share of the genes that known cells express: below it, a panel is no evidence of novelty


def novelty_of(cells: Cells, absent: np.ndarray) -> np.ndarray:
    """Share of each cell in absent genes, float32 `(n_cells,)`, 0 to 1; each gene counts by the root of its count.

    A cell of a type that was never seen expresses genes that no known type does, and a type keeps its silent genes
    from laboratory to laboratory, while distances between cells grow: see `train/LOG.md`. `absent` is bool
    `(n_genes,)`, by vocabulary id.
    """
    roots, kept = np.sqrt(cells.counts, dtype=np.float64), np.flatnonzero(absent[cells.gene_ids])
    total = segment(np.add, roots, cells.indptr)
    novel = segment(np.add, roots[kept], np.searchsorted(kept, cells.indptr))
    return (novel / np.maximum(total, 1e-9)).astype(np.float32)


def absent_genes(cells: Cells, targets: np.ndarray, n_genes: int) -> np.ndarray:
    """Genes below `ABSENT_BELOW` counts per 10,000 in the mean of every label, bool `(n_genes,)`.

    `targets` are the labels of the cells, int `(n_cells,)`.
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
    """Values by which `annotate` recognises cells that resemble no known type; `None` for too few cells.

    `targets` are the labels of the cells, int `(n_cells,)`, and `measured` vocabulary ids of their genes.

    Returns:
        `absent_genes` and `expressed_genes` (a bit a gene, packed, in base64), and `unit`: the share of absent genes
        above which a cell is novel, from cells that were left out when the absent genes were found.
    """
    if len(cells) < MIN_NOVELTY_CELLS:
        return None
    fold = permutation(len(cells), NOVELTY_FOLDS) % NOVELTY_FOLDS
    known = np.zeros(n_genes, dtype=bool)
    known[measured] = True
    shares = np.empty(len(cells), dtype=np.float32)
    for part in range(NOVELTY_FOLDS):
        absent = absent_genes(cells[fold != part], targets[fold != part], n_genes)
        shares[fold == part] = novelty_of(cells[fold == part], absent & known)
    unit = max(float(np.quantile(shares, HELD_OUT_QUANTILE)) * MARGIN, MIN_UNIT)
    absent = absent_genes(cells, targets, n_genes) & known
    expressed = known & ~absent
    if not absent.any() or not expressed.any():
        return None
    return {"absent_genes": _pack(absent), "expressed_genes": _pack(expressed), "unit": round(unit, 6)}


def _pack(mask: np.ndarray) -> str:
    """A bool array as text: a bit each, in base64."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def _unpack(text: str, n_genes: int) -> np.ndarray:
    """The bool array `(n_genes,)` of [`_pack`]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n_genes).astype(bool)


@dataclass
class Neighbours:
    """Cells of a file, by which [`Novelty`] judges its cells.

    Args:
        scores: int16 `(n_cells, n_labels)`, as [`of_scores`] makes them.
        novelty: float32 `(n_cells,)`, of each cell alone and not yet over the unit.
        types: Scores of labels and of types that have a profile alone (`profiles_scmmgpt`), float32 `(n_cells, n)`.
    """

    scores: np.ndarray
    novelty: np.ndarray
    types: np.ndarray | None = None
    _last: Any = field(default=None, init=False, repr=False)  # the last scores, with the answer of [`nearest`]

    @functools.cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores, and half the squared length of those of each cell; multiples of a half, exact in float32."""
        steps = self.scores.astype(np.float32)
        return steps, (steps**2).sum(axis=1) / 2

    @staticmethod
    def of_scores(scores: np.ndarray) -> np.ndarray:
        """Scores of labels around their mean over the labels of a cell, in whole steps."""
        around = scores - scores.mean(axis=1, keepdims=True, dtype=np.float64)
        return np.rint(SCORE_STEPS * around).clip(-MOST_STEPS, MOST_STEPS).astype(np.int16)

    def nearest(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cells of the most similar scores: the first place of each cell in the second array, and positions.

        Of equal distances all count, so that a cell has the same ones in any batch. `scores` are float32
        `(n_cells, n_labels)`; the answer for the last array is kept.
        """
        if self._last is None or self._last[0] is not scores:
            steps, half = self._steps
            last, gaps = min(N_NEIGHBOURS, len(steps)), self.of_scores(scores).astype(np.float32) @ steps.T
            np.subtract(half, gaps, out=gaps)  # half of the squared distance, less the length of the cell
            farthest = torch.from_numpy(gaps).topk(last, dim=1, largest=False).values[:, -1:].numpy()
            rows, near = np.divmod(np.flatnonzero(gaps <= farthest), len(steps))
            self._last = scores, np.searchsorted(rows, np.arange(len(scores))), near
        return self._last[1:]

    def means(self, scores: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Means of `values`, `(n_neighbours, ...)`, over the nearest of each cell, `(n_cells, ...)`."""
        starts, near = self.nearest(scores)
        sizes = np.diff([*starts, len(near)]).reshape(-1, *[1] * (values.ndim - 1))
        return np.add.reduceat(values[near], starts, axis=0) / sizes if len(starts) else values[:0]

    def difference(self, scores: np.ndarray, novelty: np.ndarray) -> np.ndarray:
        """What neighbours add to the novelty of cells, float32 `(n_cells,)`: the same for a cell in any batch.

        Args:
            scores: float32 `(n_cells, n_labels)`.
            novelty: float32 `(n_cells,)`, of each cell alone.
        """
        mean = self.means(scores, self.novelty.astype(np.float64))
        return (NEIGHBOUR_WEIGHT * (mean - novelty)).astype(np.float32)


@dataclass
class Novelty:
    """The stored result of [`fit_novelty`] and the unit of novelty by other cells, if any, for the genes at hand."""

    absent: np.ndarray | None  # bool (n_genes,); None where too few genes are measured
    unit: float
    panel: Any = None  # of a readout with other cells (`readout_scmmgpt.PanelReadout`)
    lead_unit: float = 1.0  # of the missing lead over other cells (`train.left_out` fits it)
    terms: Sequence[Sequence[int]] = ()  # labels of the panel in broader terms, the preferred terms first
    batch_unit: float | None = None  # in place of `lead_unit`, with neighbours
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
        """None if the checkpoint has none, or if `measured`, vocabulary ids, are too few of the expressed genes.

        With other cells in the readout, whose `panel` for `measured` is given, no genes are too few.
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

        With `terms`, `(n_cells, 2)`: beside the novelty the first term above the best label that is no more novel than
        `BROADER_NOVELTY`, of a cell above 1; else -1.
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
        """The cells as neighbours of others; None where novelty is not by other cells, or no unit is stored."""
        if self.panel is None or self.batch_unit is None:
            return None
        return Neighbours(Neighbours.of_scores(self.panel.scores(cells)), self.raw(cells)[:, 0])

    def raw(self, cells: Cells, terms: Sequence[Sequence[int]] = ()) -> np.ndarray:
        """Novelty for labels and for `terms`, `(n_cells, 1 + n_terms)`, not yet over the unit."""
        return self._share(cells) if self.panel is None else self._missing_lead(cells, terms) + self._share(cells)

    def _missing_lead(
        self, cells: Cells, terms: Sequence[Sequence[int]] = (), asked: np.ndarray | None = None
    ) -> np.ndarray:
        """As `readout_scmmgpt.PanelReadout.novelty`, less in a panel of few genes."""
        missing = self.panel.novelty(cells, terms, asked)
        return missing * np.float32(PANEL_WEIGHT if len(self.panel.gene_ids) in PANEL_GENES else 1)

    def _share(self, cells: Cells) -> np.ndarray:
        """Novelty by absent genes, float32 `(n_cells, 1)`, 0 where too few are measured; with a panel, its part."""
        if self.absent is None:
            return np.zeros((len(cells), 1), dtype=np.float32)
        share = novelty_of(cells, self.absent)[:, None] / np.float32(self.unit)
        return share if self.panel is None else np.float32(ABSENT_WEIGHT) * share


def first_term(novelty: np.ndarray, unit: float) -> np.ndarray:
    """The first term that is no more novel than `BROADER_NOVELTY`, int `(n_cells,)`; -1 for none.

    `novelty` is `(n_cells, n_terms)`, not yet over the unit.
    """
    fits = novelty <= BROADER_NOVELTY * unit
    return np.where(fits.any(axis=1), fits.argmax(axis=1), -1) if fits.shape[1] else np.full(len(fits), -1)
