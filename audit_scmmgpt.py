"""Audit of given labels by file, model and markers: pure functions of arrays.

Three sources give log odds of the best other label against the given label of a cell. The other cells of the **file**
do so by a regression that is cross-validated on the given labels (`crossfit_scmmgpt`). The **model** does so by the
probabilities of `annotate`. The **markers** of both labels, expressed and silent, do so by themselves
(`evidence_scmmgpt`). The score is the weighted sum of file and model, with weights that were fitted on the file; the
label is doubtful if the score is above 0. If a label has too few cells for the file to judge, the score is the sum of
model and markers.

The file cannot find a label that is wrong in all its cells; only the model can. Such a label is contradicted as a
**whole** if model and markers contradict most of its cells. The score does not include this verdict, as the score
ranks the cells of one label.

| verdict | when |
| --- | --- |
| contradicted | file and model give at least 19 to 1 against the label |
| | or the model alone does, and markers and file agree; or the label is contradicted as a whole |
| doubtful | another label is more probable; or model and markers contradict the label, and the file does not |
| supported | none of the above |
| not judged | the label has too few cells, and the checkpoint does not know it, or knows no cell like this one |
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


CONTRADICTED, DOUBTFUL, SUPPORTED, NOT_JUDGED = VERDICTS = ("contradicted", "doubtful", "supported", "not judged")
CERTAIN = float(np.log(19))  # log odds of 0.95 to 0.05
FLOOR = 1e-9  # smallest probability in log odds
SHOWN_GENES = 10
WHOLE_SHARE = 0.5  # a label is contradicted as a whole if a greater share of its judged cells is contradicted


def judge(probabilities: np.ndarray, members: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best label that the given label does not mean, and its log odds against the given label.

    Args:
        probabilities: `(n_cells, n_labels)`: probabilities of the model.
        members: bool `(n_sets, n_labels)`: the labels that each given label means.
        given: int64 `(n_cells,)`: the number of each cell's given label.

    Returns:
        int64 and float64 `(n_cells,)`; -1 and NaN if the given label means no label or all labels.

    >>> judge(np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([[False, True], [False, False]]), np.array([0, 1]))
    (array([ 0, -1]), array([1.09861229,        nan]))
    """
    mine = members[given]
    known = mine.any(axis=1) & ~mine.all(axis=1)
    best = np.where(mine, -1.0, probabilities).argmax(axis=1)
    others = probabilities[np.arange(len(best)), best].astype(np.float64)
    own = (probabilities * mine).sum(axis=1, dtype=np.float64)
    odds = np.log(others.clip(min=FLOOR)) - np.log(own.clip(min=FLOOR))
    return np.where(known, best, -1), np.where(known, odds, np.nan)


def log_pooled(probabilities: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Log probabilities of the given labels by the model, float64 `(n_cells, n_sets)`.

    NaN for a given label that means no label or all labels. Arguments are as in [`judge`].
    """
    known = members.any(axis=1) & ~members.all(axis=1)
    pooled = np.asarray(probabilities, dtype=np.float64) @ members.T
    return np.where(known, np.log(pooled.clip(min=FLOOR)), np.nan)


def nested_sets(members: np.ndarray) -> np.ndarray:
    """Pairs of a broader and a narrower label, such as "T cell" and "CD4 T cell", bool `(n_sets, n_sets)`.

    >>> nested_sets(np.array([[True, False], [True, True], [False, False]])).tolist()
    [[False, True, False], [True, False, False], [False, False, False]]
    """
    sizes = members.sum(axis=1)
    common = members.astype(np.int64) @ members.T.astype(np.int64)
    smaller = np.minimum(sizes[:, None], sizes)
    return (common == smaller) & (smaller > 0) & (sizes[:, None] != sizes)


@dataclass
class Audit:
    """Verdicts on the given labels of all cells. Arrays have the shape `(n_cells,)`.

    Args:
        given: str: the given labels.
        suggested: str: the best other label; empty if the cell is not judged.
        odds: Log odds of the model; NaN if the model does not judge the cell.
        marker_odds: Log odds of the markers; NaN without a readout.
        file_odds: Log odds of the file; NaN if the label has too few cells.
        both_odds: Log odds of file and model together; NaN if the label has too few cells.
        genes: str: genes that speak for the other label against the given label, comma-separated.
        novel: bool: cells that the model does not judge, as they resemble no type that the checkpoint knows.
        called: str: labels of `annotate`.
        clusters: str, or None.

    Attributes:
        by_model: bool: cells that the model judges.
        score: float32: above 0 for a doubtful label; NaN if the cell is not judged.
        whole: bool: contradicted cells of a label that is contradicted as a whole.
        verdict: str: one of `VERDICTS`.
    """

    given: np.ndarray
    suggested: np.ndarray
    odds: np.ndarray
    marker_odds: np.ndarray
    file_odds: np.ndarray
    both_odds: np.ndarray
    genes: np.ndarray
    novel: np.ndarray
    called: np.ndarray
    clusters: np.ndarray | None = None

    def __post_init__(self) -> None:
        by_model, by_file = ~np.isnan(self.odds) & ~self.novel, ~np.isnan(self.both_odds)
        self.by_model: np.ndarray = by_model
        score = np.where(by_model, self.odds + np.nan_to_num(self.marker_odds), np.nan)
        self.score = np.where(by_file, self.both_odds, score).astype(np.float32)
        refuted = by_model & (self.odds >= CERTAIN) & (self.marker_odds > 0)  # NaN (no markers) is False
        _, numbers = np.unique(self.given, return_inverse=True)
        n_judged, n_refuted = np.bincount(numbers, weights=by_model), np.bincount(numbers, weights=refuted)
        self.whole: np.ndarray = (n_refuted > WHOLE_SHARE * n_judged)[numbers] & refuted
        agreed = refuted & (self.file_odds > 0)
        certain = np.where(by_file, (self.both_odds >= CERTAIN) | agreed | self.whole, refuted)
        doubtful = np.where(by_file, (self.both_odds > 0) | refuted, self.odds > 0)
        judged = by_model | by_file
        verdicts = [certain, doubtful, judged]
        self.verdict = np.select([judged & made for made in verdicts], VERDICTS[:3], NOT_JUDGED)

    def order(self) -> np.ndarray:
        """Rows of the judged cells, the most doubtful first, int64 `(n_judged,)`."""
        order = np.argsort(-np.nan_to_num(self.score, nan=-np.inf), kind="stable")
        return order[self.verdict[order] != NOT_JUDGED]

    def group_rows(self) -> list[dict[str, Any]]:
        """A row for each given label and each cluster, sorted by the share of contradicted cells, descending.

        Columns: `level` ("label" or "cluster"), `name`, `cells`; shares of `contradicted`, `doubtful` and `not_judged`
        cells; `suggested`, the commonest suggestion for contradicted cells; `genes`, the genes most often named for
        this suggestion. If no cell is contradicted and the model judges none, `suggested` is the commonest label of
        `annotate`.
        """
        rows: list[dict[str, Any]] = []
        for level, names in (("label", self.given), ("cluster", self.clusters)):
            level_rows: list[dict[str, Any]] = []
            for name in np.unique(names) if names is not None else ():
                mine = names == name
                bad = mine & (self.verdict == CONTRADICTED)
                labels = self.suggested[bad] if (bad | self.by_model)[mine].any() else self.called[mine]
                suggested = str(Counter(labels.tolist()).most_common(1)[0][0]) if len(labels) else ""
                told = self.genes[bad & (self.suggested == suggested)]
                genes = Counter(gene for words in told.tolist() for gene in words.split(", ") if gene)
                verdicts = (CONTRADICTED, DOUBTFUL, NOT_JUDGED)
                shares = {v.replace(" ", "_"): round(float((self.verdict[mine] == v).mean()), 4) for v in verdicts}
                words = ", ".join(gene for gene, _ in genes.most_common(SHOWN_GENES))
                about = {"level": level, "name": str(name), "cells": int(mine.sum())}
                level_rows.append({**about, **shares, "suggested": suggested, "genes": words})
            rows += sorted(level_rows, key=lambda row: (-row[CONTRADICTED], -row[DOUBTFUL], row["name"]))
        return rows

    def cell_rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each contradicted or doubtful cell, the most doubtful first; `names` are those of the cells."""
        return [
            {
                "level": "cell",
                "name": str(names[i]),
                "cells": 1,
                "given": str(self.given[i]),
                "suggested": str(self.suggested[i]),
                "verdict": str(self.verdict[i]),
                "score": round(float(self.score[i]), 4),
                "file_odds": round(float(self.file_odds[i]), 4),
                "model_odds": round(float(self.odds[i]), 4),
                "marker_odds": round(float(self.marker_odds[i]), 4),
                "genes": str(self.genes[i]),
            }
            for i in self.order()
            if self.verdict[i] in (CONTRADICTED, DOUBTFUL)
        ]

    def summary(self) -> dict[str, int]:
        """Number of cells with each verdict."""
        return {verdict: int((self.verdict == verdict).sum()) for verdict in VERDICTS}
