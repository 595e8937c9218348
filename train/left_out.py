"""What a readout of several datasets says of a dataset that it has not seen: [`leave_each_out`] and [`calibrate`].

Cells of the next file come from another laboratory than those of training, and a readout is less sure of them than of
held-out cells of its own datasets. Temperature, thresholds of sets of labels and the least score of an answer are
therefore fitted to the cells of each dataset by a readout of all the others.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from scmmgpt.annotation_scmmgpt import fit_label_sets, label_probabilities
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.labels_scmmgpt import MOST_LABELS
from scmmgpt.novelty_scmmgpt import Neighbours, Novelty
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.refinement_scmmgpt import refine_by_cells
from scmmgpt.train.pooled import Dataset, fit_pooled_novelty, fit_pooled_readout
from scmmgpt.train.references import Reference


logger = logging.getLogger(__name__)

TEMPERATURES = np.geomspace(0.05, 0.5, 41)  # around `pooled.TEMPERATURE`
DOUBTS = np.linspace(0, 0.2, 5)  # shares of cells whose scores say nothing
LOST = 0.02  # share of the rightly named cells that may get no name
LEAST_UNIT = 0.25  # of novelty by other cells: a cell with most of the lead of its label is never novel
MIN_CELLS = 100  # of known types, to calibrate on
ABSENT = np.float32(-1e9)  # log probability of a label that no other dataset has


@dataclass(frozen=True)
class LeftOut:
    """Cells of one type each, and their scores by a readout of the other datasets.

    `scores` are of the readout that the cells of the dataset refined, `alone` of each cell by itself.
    """

    scores: np.ndarray  # float32 (n_cells, n_labels): log probabilities at a temperature of 1; `ABSENT`
    targets: np.ndarray  # int64 (n_cells,): the label
    datasets: np.ndarray  # int64 (n_cells,): position of the dataset
    rows: np.ndarray  # int64 (n_cells,): row in the dataset
    novelty: np.ndarray  # float32 (n_cells,), by the other datasets, and not yet over the unit; NaN where not judged
    of_terms: np.ndarray  # float32 (n_cells, n_terms), likewise, of broader terms; inf where they are no answer
    alone: np.ndarray  # as `scores`

    @property
    def known(self) -> np.ndarray:
        """Whether another dataset has a cell of the label, bool `(n_cells,)`."""
        return self.scores[np.arange(len(self.targets)), self.targets] > ABSENT

    def take(self, kept: np.ndarray) -> "LeftOut":
        """Some of the cells."""
        return LeftOut(*(getattr(self, part.name)[kept] for part in fields(self)))

    @classmethod
    def join(cls, parts: Sequence["LeftOut"]) -> "LeftOut":
        """The cells of several parts."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def with_neighbours(cells: LeftOut) -> LeftOut:
    """The same cells, each with the novelty that `annotate` finds if the cells of a dataset are one file."""
    novelty, of_terms = cells.novelty.copy(), cells.of_terms.copy()
    for number in np.unique(cells.datasets):
        rows = np.flatnonzero(cells.datasets == number)
        scores = cells.alone[np.ix_(rows, (cells.alone[rows] > ABSENT).any(axis=0))]
        file = Neighbours(Neighbours.of_scores(scores), cells.novelty[rows])
        added = file.difference(scores, cells.novelty[rows])
        novelty[rows] += added
        of_terms[rows] += added[:, None]
    return replace(cells, novelty=novelty, of_terms=of_terms)


def with_cells(datasets: Sequence[Dataset], meanings: np.ndarray) -> tuple[list[Dataset], np.ndarray, np.ndarray]:
    """What is left of datasets and `meanings` over the labels that have a cell of their own; and these labels.

    Cells of a broad target count for those of its labels that are left, if any.
    """
    used = np.unique(np.concatenate([data.targets for data in datasets]))
    own = used[(meanings[used] > 0).sum(axis=1) == 1]
    labels = np.flatnonzero((meanings[own] > 0).any(axis=0))
    kept = used[(meanings[used][:, labels] > 0).any(axis=1)]
    left = []
    for data in datasets:
        rows = np.flatnonzero(np.isin(data.targets, kept))
        if len(rows):
            targets = np.searchsorted(kept, data.targets[rows])
            left.append(replace(data, counts=data.counts[rows], targets=targets))
    shares = meanings[np.ix_(kept, labels)]
    return left, shares / shares.sum(axis=1, keepdims=True), labels


def fit_known(
    datasets: Sequence[Dataset], meanings: np.ndarray, reference: Reference | None = None
) -> tuple[ScMMGPTLabelReadout, np.ndarray]:
    """The readout of the labels that have a cell of their own, and their positions."""
    parts, shares, labels = with_cells(datasets, meanings)
    if reference is not None:
        parts, shares = reference.join(parts, shares, labels)
    return fit_pooled_readout(parts, len(labels), meanings=shares), labels


def leave_out(
    datasets: Sequence[Dataset],
    meanings: np.ndarray,
    group: Sequence[int],
    reference: Reference | None = None,
    terms: Sequence[Sequence[int]] = (),
    tests: Sequence[Dataset] | None = None,
) -> LeftOut:
    """Score the cells of the datasets of `group` by readout and novelty of the others (see `fit_pooled_readout`).

    Cells of a broad target have no label, and are not scored. `terms` are the labels of broader terms. `tests` are
    scored in place of the datasets, such as fewer genes of them.
    """
    train, parts = [data for place, data in enumerate(datasets) if place not in group], []
    n_genes = train[0].counts.shape[1]
    readout, own = fit_known(train, meanings, reference)
    stored = (fit_pooled_novelty(train, n_genes) or {}) | ({} if reference is None else {"lead_unit": 1.0})
    in_terms = [np.flatnonzero(np.isin(own, term)).tolist() for term in terms]
    in_terms = [term if 1 < len(term) <= MOST_LABELS * len(own) else [] for term in in_terms]
    for number in group:
        data = (tests or datasets)[number]
        rows = np.flatnonzero((meanings[data.targets] > 0).sum(axis=1) == 1)
        cells = Cells.from_csr(data.counts[rows], np.arange(n_genes))
        panel = replace(readout.for_genes(data.measured), temperature=1.0)
        scores, alone = np.full((2, len(rows), meanings.shape[1]), ABSENT, dtype=np.float32)
        alone[:, own] = panel(cells)
        scores[:, own] = refine_by_cells(readout, panel, cells)(cells)
        measure = Novelty.of(stored, data.measured, n_genes, panel)
        novelty = np.full((len(rows), 1 + len(terms)), np.inf, dtype=np.float32)
        found = np.full((len(rows), 1), np.nan) if measure is None else measure.raw(cells, in_terms)
        novelty[:, : found.shape[1]] = found
        labels, place = meanings[data.targets[rows]].argmax(axis=1), np.full(len(rows), number)
        parts.append(LeftOut(scores, labels, place, rows, novelty[:, 0], novelty[:, 1:], alone))
    return LeftOut.join(parts)


def leave_each_out(
    datasets: Sequence[Dataset],
    meanings: np.ndarray,
    reference: Reference | None = None,
    terms: Sequence[Sequence[int]] = (),
    tests: Sequence[Dataset] | None = None,
) -> LeftOut | None:
    """Leave out each dataset in turn, see [`leave_out`]; None for one dataset alone."""
    if len(datasets) < 2:
        return None
    parts = []
    for number in range(len(datasets)):
        parts.append(leave_out(datasets, meanings, [number], reference, terms, tests))
        logger.info("%d of %d datasets left out", number + 1, len(datasets))
    return LeftOut.join(parts)


def probabilities_of(
    cells: LeftOut, temperature: float, doubt: float = 0.0, prior: np.ndarray | None = None
) -> np.ndarray:
    """Probabilities of the labels, float32 `(n_cells, n_labels)`; 0 for a label without scores.

    `prior` covers the labels with scores; see `label_probabilities`.
    """
    scored = (cells.scores > ABSENT).any(axis=0)
    found = np.zeros(cells.scores.shape, dtype=np.float32)
    options: dict[str, Any] = {"logit_scale": 1 / temperature, "doubt": doubt, "prior": prior}
    found[:, scored] = label_probabilities(cells.scores[:, scored], **options)
    return found


def fit_probabilities(cells: LeftOut) -> tuple[float, float]:
    """Fit temperature and doubt: the least negative log-likelihood of the true labels.

    The tissue prior of `annotate` is left out: with it, the fit is worse for other laboratories (`train/LOG.md`).
    """
    rows, n_labels = np.arange(len(cells.targets)), (cells.scores > ABSENT).sum(axis=1)
    losses = {}
    for temperature in TEMPERATURES:
        own = probabilities_of(cells, temperature)[rows, cells.targets].astype(np.float64)
        for doubt in DOUBTS:
            likelihood = (1 - doubt) * own + doubt / n_labels
            losses[temperature, doubt] = -np.log(likelihood.clip(min=1e-30)).mean()
    temperature, doubt = min(losses, key=losses.__getitem__)
    return round(float(temperature), 4), round(float(doubt), 4)


def calibrate(cells: LeftOut | None, with_others: bool = False) -> dict[str, Any]:
    """`temperature`, `doubt`, `min_score`, `label_sets` and units of novelty from the cells whose labels were known.

    With `min_score` and novelty (`annotation_scmmgpt.least_scores`), `LOST` of the cells that are named rightly lose
    their name, each dataset counting alike. Nearly all of these are novel where there are other cells, since novelty
    finds more new cells than a low score; they get a broader term where that is not novel. `lead_unit` is of cells
    alone, `batch_unit` of cells [`with_neighbours`], both by labels of cells alone, as novelty is.
    """
    if cells is None or cells.known.sum() < MIN_CELLS:
        return {}
    of_batch = with_neighbours(cells).novelty[cells.known] if with_others else cells.novelty[cells.known]
    cells = cells.take(cells.known)
    temperature, doubt = fit_probabilities(cells)
    probabilities = probabilities_of(cells, temperature, doubt)
    right = probabilities.argmax(axis=1) == cells.targets
    right_alone = cells.alone.argmax(axis=1) == cells.targets

    def quantile(values: np.ndarray, rows: np.ndarray, share: float) -> float:
        weights = 1 / np.bincount(cells.datasets[rows])[cells.datasets[rows]]
        return float(np.quantile(values[rows], share, weights=weights, method="inverted_cdf"))

    unit, batch_unit, least = 1.0, 1.0, 0.0
    if with_others and right_alone.any():
        units = (quantile(novelty, right_alone, 1 - LOST) for novelty in (cells.novelty, of_batch))
        unit, batch_unit = (round(max(unit, LEAST_UNIT), 4) for unit in units)
    novelty = np.nan_to_num(cells.novelty / unit).clip(min=0)
    if right.any():
        least = quantile(np.where(novelty > 1, 0, probabilities.max(axis=1) / (1 + novelty)), right, LOST)
    return {
        "temperature": temperature,
        "doubt": doubt,
        "min_score": round(least, 4),
        "lead_unit": unit,
        "batch_unit": batch_unit,
        "label_sets": fit_label_sets(probabilities, cells.targets),
    }
