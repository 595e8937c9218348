"""Types that no training cell has, named by their reference profiles where these explain a cell far better.

A checkpoint of `release` keeps mean profiles of types that none of its datasets has, such as hepatocytes. Each is a
group of one label in the regression of the readout ([`with_profiles`]), which the cells of the file are scored by. A
cell that is not plainly of a trained label gets the name of such a type if it leads over all labels and other types.

One cell is noisy evidence. With other cells of the file (`novelty_scmmgpt.Neighbours`) the scores of types are means
over the cells of the most similar labels. A name needs the cell and these means to agree. Where a type explains the
means about as well as the label does, which need not make a cell novel (a cytotoxic T cell is much like a natural
killer cell), the answer is the narrowest broader type of label and type, else `"Unknown"`.
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


# A type names a cell that it leads in by 2 over the root of the genes that the cell expresses: few genes, much chance.
# With labels and datasets left out, more than nine of ten of these cells are named rightly. At half the limit of
# novelty a quarter of the known cells are looked at (`train/LOG.md`).
NAMING_LEAD = 2.0
NAMING_NOVELTY = 0.5
# With other cells of the file: the lead at which a type explains cells about as well as their label, and the least
# score of a name; of scores that are about 1 for the right type. With fewer genes leads shrink, and chance does not.
SIBLING_LEAD, LEAD_IN_PANEL = -0.2, 0.05  # the second for `PANEL_GENES`; with fewer genes still, none
NAMING_SCORE = 0.5
MOST_OF_SIBLINGS = 0.4  # of the labels, of a broader type that is an answer
# A novel cell that no label and no type names may be of a broader type that has many kinds, such as a neuron: the
# scores of all kinds of a term add up. The lead is that of the sum over any type that is none of the kinds. A term of
# more than this share of the types is no answer, as a sum of many small scores says little (`train/LOG.md`).
TERM_SCORE, TERM_LEAD, MOST_OF_TERM = 0.5, 0.4, 0.12
UNKNOWN_SIBLING, NO_SIBLING = -1, -2  # in place of a broader type; the second for a label that is above the type


@dataclass
class ProfiledTypes:
    """Trained labels and all types that have a profile alone, for the genes of one file.

    Args:
        panel: The readout of trained labels for these genes; its profiles of cells are used.
        n_labels: Number of trained labels.
        weights: float32 `(n_genes, n_labels + n_types)`.
        bias: float32 `(n_labels + n_types,)`.
        broader: int `(n_labels, n_types)`, the answer of [`broader_answers`] for label and type, if it is known.
        lead: At which a type explains cells about as well as their label; infinite with few genes.
        kinds: Labels and types below each broader term, the preferred terms first; empty for a term that is no answer.
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
        """For the genes of a panel, of a readout with profiles."""
        arrays = readout.arrays()
        arrays = with_profiles(arrays, range(len(arrays["profiles"])))
        here = np.isin(arrays["gene_ids"], panel.gene_ids)
        weights, bias = solve_groups(arrays if here.all() else scale_groups(arrays, here), here)
        kept = len(readout.bias) + len(arrays["profiles"])  # kinds of other cells that are no type come last
        weights = np.ascontiguousarray(weights[:kept].T, dtype=np.float32)
        in_panel = LEAD_IN_PANEL if here.sum() in PANEL_GENES else np.inf
        lead = SIBLING_LEAD if here.sum() >= PANEL_GENES.stop else in_panel
        return cls(panel, len(readout.bias), weights, bias[:kept].astype(np.float32), broader, lead, kinds)

    def with_types(self, neighbours: Neighbours | None, cells: Cells) -> Neighbours | None:
        """Neighbours, which were made of `cells`, with the scores of types; without `broader`, as they are."""
        if neighbours is None or self.broader is None:
            return neighbours
        return replace(neighbours, types=sum_weights(*self.panel.profiles(cells), self.weights) + self.bias)

    def name(self, cells: Cells, novelty: np.ndarray, least: float = -np.inf) -> np.ndarray:
        """The type that names each cell, or -1, and its probability, float32 `(n_cells, 2)`.

        `novelty` float `(n_cells,)` is that of the cells' trained labels, 1 at the limit, and `least` the least score.
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
        named = (own >= least) & ((own - scores.max(axis=1)) * np.sqrt(np.diff(profiles[0])) >= NAMING_LEAD)
        found[rows[named]] = np.stack([best - self.n_labels, probability[every, best]], axis=1)[named]
        return found

    def judge(self, cells: Cells, novelty: np.ndarray, neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
        """Cells judged by the means over their neighbours.

        Args:
            cells: Counts.
            novelty: float `(n_cells, 2)`: novelty, 1 at the limit, and position of the broader type of a novel cell.
            neighbours: Cells of the file, [`with_types`]; else each cell has the name that it has alone.

        Returns:
            The same, where a cell that is not novel, and that a type without cells explains as well as its label,
            has a novelty above 1 and the position of its broader type (-1 for none), and a novel cell without one has
            that of [`term_of`]; and the result of [`name`].
        """
        if neighbours.types is None or self.broader is None:
            return novelty, self.name(cells, novelty[:, 0])
        own = self.panel.scores(cells)
        best, every = own.argmax(axis=1), np.arange(len(own))
        scores = neighbours.means(own, neighbours.types).astype(np.float32)
        number = scores[:, self.n_labels :].argmax(axis=1)
        place = self.n_labels + number
        lead = scores[every, place] - scores[every, best]
        names = self.name(cells, novelty[:, 0], NAMING_SCORE)
        names[names[:, 0] != number] = -1, 0
        answer = self.broader[best, number]
        is_sibling = (lead > self.lead) & (novelty[:, 0] <= 1) & (answer != NO_SIBLING)
        raised = np.stack([1 + np.maximum(lead - self.lead, 1e-3), answer], axis=1)
        novelty = np.where(is_sibling[:, None], raised, novelty)
        open_rows = np.flatnonzero((novelty[:, 0] > 1) & (novelty[:, 1] < 0) & (names[:, 0] < 0))
        novelty[open_rows, 1] = self.term_of(scores[open_rows])
        return novelty, names

    def term_of(self, scores: np.ndarray) -> np.ndarray:
        """The first term whose kinds explain a cell together, as no other type does, int `(n_cells,)`; -1 for none.

        `scores` are of labels and types, float `(n_cells, n_labels + n_types)`. With few genes no term is an answer.
        """
        found, best = np.full(len(scores), -1), scores.argmax(axis=1)
        if not np.isfinite(self.lead):
            return found
        for place in np.flatnonzero(self.members[:, best].any(axis=1)):
            members = self.members[place]
            rows = np.flatnonzero((found < 0) & members[best])
            if len(rows):
                total = scores[rows][:, members].sum(axis=1, dtype=np.float64)
                lead = total - scores[rows][:, ~members].max(axis=1, initial=-np.inf)
                found[rows[(total >= TERM_SCORE) & (lead >= TERM_LEAD)]] = place
        return found

    @functools.cached_property
    def members(self) -> np.ndarray:
        """Which labels and types are `kinds` of each term, bool `(n_terms, n_labels + n_types)`."""
        found = np.zeros((len(self.kinds), len(self.bias)), dtype=bool)
        for place, kinds in enumerate(self.kinds):
            found[place, kinds] = True
        return found

    def beside(
        self, novelty_of: Callable[[Cells], np.ndarray], neighbours: Neighbours | None = None
    ) -> Callable[[Cells], np.ndarray]:
        """The columns of a novelty, `(n_cells,)` or as [`judge`] has them, and then those of [`name`]."""

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
    """For each label and type without cells the narrowest term above both, int `(n_labels, n_types)`.

    `UNKNOWN_SIBLING` where none but broad terms is, `NO_SIBLING` where the label itself is above the type. None if a
    checkpoint does not say what is above its types.

    Args:
        labels: The trained labels.
        terms: Their broader terms, each with its `id` and `labels`, the narrowest first; labels are terms, too.
        types: Each with the ids of the terms that are `above` it.

    >>> terms = [{"id": "1", "name": "NK cell", "labels": ["NK cell"]}, {"id": "2", "name": "B", "labels": ["B"]}]
    >>> terms += [{"id": "3", "name": "lymphocyte", "labels": ["B", "NK cell"]}]
    >>> answers = broader_answers(["B", "NK cell", "A", "C", "D"], terms, [{"above": ["1", "3"]}, {"above": ["0"]}])
    >>> answers.tolist()
    [[2, -1], [-2, -1], [-1, -1], [-1, -1], [-1, -1]]
    """
    if not types or not all("above" in known for known in types):
        return None
    found = np.full((len(labels), len(types)), UNKNOWN_SIBLING)
    for column, known in enumerate(types):
        above = set(known["above"])
        shared = [(place, term) for place, term in enumerate(terms) if term["id"] in above]
        for row, label in enumerate(labels):
            mine = [(place, term) for place, term in shared if label in term["labels"]]
            if any(term["name"] == label for _, term in mine):
                found[row, column] = NO_SIBLING
            elif mine and len(mine[0][1]["labels"]) <= MOST_OF_SIBLINGS * len(labels):
                found[row, column] = mine[0][0]
    return found


def kinds_of_terms(
    labels: Sequence[str], terms: Sequence[Mapping[str, Any]], types: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Labels and types without cells below each term, as positions among the labels and then the types.

    Empty for a term of one of them, or of more than `MOST_OF_TERM` of all, and for all terms if a checkpoint does not
    say what is above its types. Arguments as for [`broader_answers`].

    >>> terms = [{"id": "1", "labels": ["B"]}, {"id": "2", "labels": ["A", "B"]}]
    >>> kinds_of_terms(["A", "B", *"CDEFGHIJKLMNOPQRSTUVWXYZ"], terms, [{"above": ["1"]}, {"above": ["3"]}])
    [[1, 26], [0, 1]]
    """
    known = bool(types) and all("above" in one for one in types)
    found = []
    for term in terms:
        own = [place for place, label in enumerate(labels) if label in term["labels"]]
        own += [len(labels) + place for place, one in enumerate(types) if known and term["id"] in one["above"]]
        is_answer = known and 1 < len(own) <= MOST_OF_TERM * (len(labels) + len(types))
        found.append(own if is_answer else [])
    return found


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
