"""Given labels against model and markers: pure functions of arrays.

Three witnesses judge the label that a cell was given. The other cells of the **file** give log odds of the best
other label against the given one, by a regression that is cross-validated on the given labels (`crossfit_scmmgpt`).
The **model** gives log odds from the probabilities of `annotate`. The **markers** of both labels, expressed and
silent, give log odds by themselves (`evidence_scmmgpt`). File and model are added with factors that were fitted on
the file; that is the score, above 0 where the label is doubtful. Where a label has too few cells for the file to
judge, the score is the sum of model and markers.

A label that is wrong in all its cells is what the file calls right: only the model can see it. It is contradicted as a
**whole** where model and markers contradict most of its cells. The score does not say so, as it ranks the cells of a
label against each other.

| verdict | when |
| --- | --- |
| contradicted | file and model give at least 19 to 1 against the label |
| | or the model alone does, and markers and file agree; or the label is contradicted as a whole |
| doubtful | another label is more probable; or model and markers contradict the label, and the file does not |
| supported | none is |
| not judged | the label has too few cells, and the checkpoint does not know it, or knows no cell like this one |
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


CONTRADICTED, DOUBTFUL, SUPPORTED, NOT_JUDGED = VERDICTS = ("contradicted", "doubtful", "supported", "not judged")
CERTAIN = float(np.log(19))  # log odds of 0.95 to 0.05
FLOOR = 1e-9  # of a probability
SHOWN_GENES = 10
WHOLE_SHARE = 0.5  # of the cells of a label that the model judges: more contradicted ones contradict the label


def judge(probabilities: np.ndarray, members: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best label that the given one does not mean, and its log odds against the given one.

    Args:
        probabilities: `(n_cells, n_labels)`.
        members: bool `(n_sets, n_labels)`: what each given label means.
        given: int64 `(n_cells,)`: the number of each cell's label.

    Returns:
        int64 and float64 `(n_cells,)`; -1 and NaN where the given label means none or all.

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
    """Log probabilities of given labels by the model, float64 `(n_cells, n_sets)`; NaN if one means none or all.

    Arguments are as for [`judge`].
    """
    known = members.any(axis=1) & ~members.all(axis=1)
    pooled = np.asarray(probabilities, dtype=np.float64) @ members.T
    return np.where(known, np.log(pooled.clip(min=FLOOR)), np.nan)


def nested_sets(members: np.ndarray) -> np.ndarray:
    """Pairs of given labels of which one is broader, "T cell" and "CD4 T cell", bool `(n_sets, n_sets)`.

    >>> nested_sets(np.array([[True, False], [True, True], [False, False]])).tolist()
    [[False, True, False], [True, False, False], [False, False, False]]
    """
    sizes = members.sum(axis=1)
    common = members.astype(np.int64) @ members.T.astype(np.int64)
    smaller = np.minimum(sizes[:, None], sizes)
    return (common == smaller) & (smaller > 0) & (sizes[:, None] != sizes)


@dataclass
class Audit:
    """The judgement of all cells; arrays have the shape `(n_cells,)`.

    Args:
        given: Given labels, str.
        suggested: Best other labels, str; empty where a cell is not judged.
        odds: Log odds of the model, NaN where a cell is not judged.
        marker_odds: Log odds of the markers; NaN without a readout.
        file_odds: Log odds of the other cells of the file; NaN where the label has too few.
        both_odds: Log odds of file and model; NaN likewise.
        genes: Genes that speak for the other label and against the given one.
        novel: bool: cells that are like nothing that the checkpoint knows.
        called: Labels of `annotate`, str.
        clusters: Clusters, or None.
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
        refuted = by_model & (self.odds >= CERTAIN) & (self.marker_odds > 0)  # NaN: there is no second witness
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
        """Judged cells, the most doubtful first, int64."""
        order = np.argsort(-np.nan_to_num(self.score, nan=-np.inf), kind="stable")
        return order[self.verdict[order] != NOT_JUDGED]

    def group_rows(self) -> list[dict[str, Any]]:
        """A row for each given label and each cluster, the share of contradicted cells falling.

        `level` ("label" or "cluster"), `name`, `cells`, shares of `contradicted`, `doubtful` and `not_judged` cells,
        `suggested` (the label that contradicted cells most often get; without these, and where the model judges no
        cell, what most are called)
        and `genes` (those most often named for it).
        """
        rows: list[dict[str, Any]] = []
        for level, names in (("label", self.given), ("cluster", self.clusters)):
            found: list[dict[str, Any]] = []
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
                found.append({**about, **shares, "suggested": suggested, "genes": words})
            rows += sorted(found, key=lambda row: (-row[CONTRADICTED], -row[DOUBTFUL], row["name"]))
        return rows

    def cell_rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each judged cell that is not supported, the most doubtful first."""
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
        """Cells of each verdict."""
        return {verdict: int((self.verdict == verdict).sum()) for verdict in VERDICTS}
