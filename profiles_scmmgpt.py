"""Profiled types: cell types with a reference profile and no training cells, which may name a cell of a file.

A checkpoint of `release` stores mean profiles of types that no training dataset has, such as hepatocytes. Each profile
becomes a group with its own label in the regression of the readout ([`with_profiles`]), and the regression scores the
cells of the file. A profiled type names a cell that is rather novel if the type's score leads over all other scores.

A single cell is noisy evidence. If other cells of the file are given (`novelty_scmmgpt.Neighbours`), the scores of
types are averaged over the nearest neighbours, and a type names a cell only if the cell and the average agree. A type
may explain the average about as well as the label without making the cell novel: a cytotoxic T cell resembles a
natural killer cell. The cell then gets the narrowest term above both the label and the type, else `"Unknown"`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .cells_scmmgpt import Cells
from .novelty_scmmgpt import PANEL_GENES, Neighbours
from .readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout
from .regression_scmmgpt import scale_groups, solve_groups, sum_weights, with_profiles


# A type names a cell if its score leads by NAMING_LEAD / sqrt(number of expressed genes): scores from few genes are
# noisy. On left-out labels and datasets, more than nine of ten of these names are right. Only cells above
# NAMING_NOVELTY are considered, which includes a quarter of the known cells (`train/LOG.md`).
NAMING_LEAD = 2.0
NAMING_NOVELTY = 0.5
# With neighbours: the lead of a type over the label above which the type explains the cells about as well as the
# label, and the least score of a type that names a cell (the score of the right type is about 1). Leads shrink in a
# panel and noise does not, so the lead is higher for `PANEL_GENES`, and infinite for fewer genes.
SIBLING_LEAD, LEAD_IN_PANEL = -0.2, 0.05
NAMING_SCORE = 0.5
MOST_OF_SIBLINGS = 0.4  # a broader term with a greater share of the labels is no answer
# A novel cell without a name may belong to a broader term with many kinds, such as "neuron". The scores of the kinds
# are added. The sum must reach TERM_SCORE, and lead by TERM_LEAD over each label and type outside the term. A term
# with more than MOST_OF_TERM of all labels and types is no answer: a sum of many small scores is noise
# (`train/LOG.md`).
TERM_SCORE, TERM_LEAD, MOST_OF_TERM = 0.5, 0.4, 0.12
UNKNOWN_SIBLING, NO_SIBLING = -1, -2  # no narrow common term; the label itself is above the type


@dataclass
class ProfiledTypes:
    """Scores of the trained labels and of all profiled types, for the genes of one file.

    Args:
        panel: The readout of the trained labels for these genes, which computes the profiles of cells.
        n_labels: Number of trained labels.
        weights: float32 `(n_genes, n_labels + n_types)`.
        bias: float32 `(n_labels + n_types,)`.
        broader: int `(n_labels, n_types)`: the result of [`broader_answers`], or None.
        lead: The lead of a type over the label above which the type explains a cell about as well as the label.
        kinds: The result of [`kinds_of_terms`].
    """

    panel: PanelReadout
    n_labels: int
    weights: np.ndarray
    bias: np.ndarray
    broader: np.ndarray | None = None
    lead: float = SIBLING_LEAD
    kinds: Sequence[Sequence[int]] = ()

    @classmethod
    def of(
        cls,
        readout: ScMMGPTLabelReadout,
        panel: PanelReadout,
        broader: np.ndarray | None = None,
        kinds: Sequence[Sequence[int]] = (),
    ) -> "ProfiledTypes":
        """The scores for the genes of `panel`; `readout` has profiles, and the other arguments are as in the class."""
        arrays = readout.arrays()
        arrays = with_profiles(arrays, range(len(arrays["profiles"])))
        here = np.isin(arrays["gene_ids"], panel.gene_ids)
        weights, bias = solve_groups(arrays if here.all() else scale_groups(arrays, here), here)
        n_scores = len(readout.bias) + len(arrays["profiles"])  # other cells that are no profiled type come last
        weights = np.ascontiguousarray(weights[:n_scores].T, dtype=np.float32)
        in_panel = LEAD_IN_PANEL if here.sum() in PANEL_GENES else np.inf
        lead = SIBLING_LEAD if here.sum() >= PANEL_GENES.stop else in_panel
        return cls(panel, len(readout.bias), weights, bias[:n_scores].astype(np.float32), broader, lead, kinds)

    def with_types(self, neighbours: Neighbours | None, cells: Cells) -> Neighbours | None:
        """The neighbours, made of `cells`, with the scores of labels and types; unchanged without `broader`."""
        if neighbours is None or self.broader is None:
            return neighbours
        return replace(neighbours, types=sum_weights(*self.panel.profiles(cells), self.weights) + self.bias)

    def name(self, cells: Cells, novelty: np.ndarray, least: float = -np.inf) -> np.ndarray:
        """Profiled types that name cells, each cell judged alone.

        Args:
            cells: Raw counts.
            novelty: `(n_cells,)`: novelty by the trained labels; a cell above 1 is novel.
            least: The least score of a type that names a cell.

        Returns:
            float32 `(n_cells, 2)`: the number of the type and its probability; -1 and 0 for a cell without a name.
        """
        named_by = np.tile(np.array([-1, 0], dtype=np.float32), (len(cells), 1))
        rows = np.flatnonzero(novelty > NAMING_NOVELTY)
        if not len(rows):
            return named_by
        profiles = some_rows(*self.panel.last_profiles(cells), rows)
        scores, every = sum_weights(*profiles, self.weights) + self.bias, np.arange(len(rows))
        best = self.n_labels + scores[:, self.n_labels :].argmax(axis=1)
        probability = torch.from_numpy(scores / np.float32(self.panel.temperature)).softmax(dim=1).numpy()
        own = scores[every, best]
        scores[every, best] = -np.inf
        named = (own >= least) & ((own - scores.max(axis=1)) * np.sqrt(np.diff(profiles[0])) >= NAMING_LEAD)
        named_by[rows[named]] = np.stack([best - self.n_labels, probability[every, best]], axis=1)[named]
        return named_by

    def judge(self, cells: Cells, novelty: np.ndarray, neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
        """Novelty, broader terms and names of cells, by the mean scores of their neighbours.

        A known cell becomes novel if a profiled type explains its neighbours about as well as its label; the cell then
        gets the broader term of label and type. A novel cell without a name and a broader term gets the result of
        [`term_of`]. A type names a cell only if it is also the best type of the neighbours.

        Args:
            cells: Raw counts.
            novelty: `(n_cells, 2)`: novelty, and the position of the broader term, -1 for none.
            neighbours: Cells of the file, from [`with_types`]. If their `types` are None, [`name`] alone decides.

        Returns:
            `novelty` with these changes, `(n_cells, 2)`; names as from [`name`], `(n_cells, 2)`.
        """
        if neighbours.types is None or self.broader is None:
            return novelty, self.name(cells, novelty[:, 0])
        own = self.panel.scores(cells)
        best, every = own.argmax(axis=1), np.arange(len(own))
        scores = neighbours.means(own, neighbours.types).astype(np.float32)
        best_type = scores[:, self.n_labels :].argmax(axis=1)
        lead = scores[every, self.n_labels + best_type] - scores[every, best]
        names = self.name(cells, novelty[:, 0], NAMING_SCORE)
        names[names[:, 0] != best_type] = -1, 0
        answer = self.broader[best, best_type]
        is_sibling = (lead > self.lead) & (novelty[:, 0] <= 1) & (answer != NO_SIBLING)
        raised = np.stack([1 + np.maximum(lead - self.lead, 1e-3), answer], axis=1)
        novelty = np.where(is_sibling[:, None], raised, novelty)
        open_rows = np.flatnonzero((novelty[:, 0] > 1) & (novelty[:, 1] < 0) & (names[:, 0] < 0))
        novelty[open_rows, 1] = self.term_of(scores[open_rows])
        return novelty, names

    def term_of(self, scores: np.ndarray) -> np.ndarray:
        """The first term whose kinds together explain a cell, int `(n_cells,)`; -1 for none, and for a small panel.

        Args:
            scores: `(n_cells, n_labels + n_types)`.
        """
        terms, best = np.full(len(scores), -1), scores.argmax(axis=1)
        if not np.isfinite(self.lead):
            return terms
        for place in np.flatnonzero(self.members[:, best].any(axis=1)):
            members = self.members[place]
            rows = np.flatnonzero((terms < 0) & members[best])
            if len(rows):
                total = scores[rows][:, members].sum(axis=1, dtype=np.float64)
                lead = total - scores[rows][:, ~members].max(axis=1, initial=-np.inf)
                terms[rows[(total >= TERM_SCORE) & (lead >= TERM_LEAD)]] = place
        return terms

    @functools.cached_property
    def members(self) -> np.ndarray:
        """`kinds` as a mask, bool `(n_terms, n_labels + n_types)`."""
        mask = np.zeros((len(self.kinds), len(self.bias)), dtype=bool)
        for place, kinds in enumerate(self.kinds):
            mask[place, kinds] = True
        return mask

    def beside(
        self, novelty_of: Callable[[Cells], np.ndarray], neighbours: Neighbours | None = None
    ) -> Callable[[Cells], np.ndarray]:
        """A function of cells: the columns of `novelty_of`, then the two columns of [`name`], float32.

        With neighbours and two columns of novelty, [`judge`] may change all of the columns.
        """

        def score(cells: Cells) -> np.ndarray:
            novelty = novelty_of(cells)
            novelty = novelty.reshape(len(cells), -1)
            if neighbours is None or novelty.shape[1] < 2:
                return np.hstack([novelty, self.name(cells, novelty[:, 0])]).astype(np.float32)
            return np.hstack(self.judge(cells, novelty, neighbours)).astype(np.float32)

        return score


def broader_answers(
    labels: Sequence[str], terms: Sequence[Mapping[str, Any]], types: Sequence[Mapping[str, Any]]
) -> np.ndarray | None:
    """The narrowest term above each pair of a trained label and a profiled type.

    Args:
        labels: The trained labels.
        terms: Terms at or above the labels, each with `id`, `name` and `labels`; the narrowest first.
        types: The profiled types, each with `above`, the ids of its ancestors.

    Returns:
        int `(n_labels, n_types)`: a position in `terms`; `UNKNOWN_SIBLING` if every common term has too many labels;
        `NO_SIBLING` if the label itself is above the type. None if the checkpoint stores no ancestors of types.

    >>> terms = [{"id": "1", "name": "NK cell", "labels": ["NK cell"]}, {"id": "2", "name": "B", "labels": ["B"]}]
    >>> terms += [{"id": "3", "name": "lymphocyte", "labels": ["B", "NK cell"]}]
    >>> answers = broader_answers(["B", "NK cell", "A", "C", "D"], terms, [{"above": ["1", "3"]}, {"above": ["0"]}])
    >>> answers.tolist()
    [[2, -1], [-2, -1], [-1, -1], [-1, -1], [-1, -1]]
    """
    if not types or not all("above" in profiled for profiled in types):
        return None
    answers = np.full((len(labels), len(types)), UNKNOWN_SIBLING)
    for column, profiled in enumerate(types):
        above = set(profiled["above"])
        shared = [(place, term) for place, term in enumerate(terms) if term["id"] in above]
        for row, label in enumerate(labels):
            mine = [(place, term) for place, term in shared if label in term["labels"]]
            if any(term["name"] == label for _, term in mine):
                answers[row, column] = NO_SIBLING
            elif mine and len(mine[0][1]["labels"]) <= MOST_OF_SIBLINGS * len(labels):
                answers[row, column] = mine[0][0]
    return answers


def kinds_of_terms(
    labels: Sequence[str], terms: Sequence[Mapping[str, Any]], types: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Trained labels and profiled types below each term, as positions among the labels, then the types.

    The list is empty for a term with one kind, and for a term with more than `MOST_OF_TERM` of all labels and types.
    All lists are empty if the checkpoint stores no ancestors of types. Arguments are as in [`broader_answers`].

    >>> terms = [{"id": "1", "labels": ["B"]}, {"id": "2", "labels": ["A", "B"]}]
    >>> kinds_of_terms(["A", "B", *"CDEFGHIJKLMNOPQRSTUVWXYZ"], terms, [{"above": ["1"]}, {"above": ["3"]}])
    [[1, 26], [0, 1]]
    """
    has_ancestors = bool(types) and all("above" in profiled for profiled in types)
    kinds = []
    for term in terms:
        own = [place for place, label in enumerate(labels) if label in term["labels"]]
        own += [
            len(labels) + place
            for place, profiled in enumerate(types)
            if has_ancestors and term["id"] in profiled["above"]
        ]
        is_answer = has_ancestors and 1 < len(own) <= MOST_OF_TERM * (len(labels) + len(types))
        kinds.append(own if is_answer else [])
    return kinds


def some_rows(
    starts: np.ndarray, positions: np.ndarray, values: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The given rows of ragged profiles.

    >>> some_rows(np.array([0, 2, 3]), np.array([4, 5, 6]), np.array([1.0, 2.0, 3.0]), np.array([1]))
    (array([0, 1]), array([6]), array([3.]))
    """
    lengths = np.diff(starts)[rows]
    new = np.concatenate([[0], np.cumsum(lengths)])
    taken = np.arange(new[-1]) + np.repeat(starts[rows] - new[:-1], lengths)
    return new, positions[taken], values[taken]
