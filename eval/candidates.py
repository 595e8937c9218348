"""Evaluate `annotate --labels` on cells whose type is not a candidate, but whose class has another candidate type.

```
python -m scmmgpt.eval abstention --data ../shared/data --leave-out candidates --output candidates.json
```

Example: the candidates are "B cell" and "CD4-positive, alpha-beta T cell", and the file has CD8 T cells, a label of
the checkpoint. Each dataset is left out in turn, as in `eval.crossdata`. A case has one candidate type of a class with
several types, and all types of the other classes as candidates. Cells of the other types of the class are right if
they get the class.

* `readout`: the readout of the checkpoint; cells without a fitting candidate are scored by a regression that is
  restricted to the candidates;
* `readout, without the regression of the candidates`: the plain probabilities of the readout;
* `logistic regression of the candidates`: balanced, fitted to the cells of the candidates, on log1p(CP10k) of 4,000
  genes that the dataset measures;
* `nearest centroid of the candidates`: on the same genes.

`cells_of_no_candidate` is the accuracy of the class for cells without a candidate, averaged over cells and over cases.
`cells_of_candidates` is the accuracy of the class for cells of the other classes.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from scmmgpt.annotation_scmmgpt import label_probabilities
from scmmgpt.eval import baselines, crossdata
from scmmgpt.eval.crossdata import LeftOutSet
from scmmgpt.labels_scmmgpt import Candidates
from scmmgpt.readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout
from scmmgpt.refinement_scmmgpt import refine_by_cells


logger = logging.getLogger(__name__)

DOUBT = 0.05  # value that `train.left_out.fit_probabilities` fitted for the released checkpoint
MAX_CELLS = 100  # most cells of a label of a dataset
LEAST_CELLS = 5  # fewest cells of a case
N_GENES, INVERSE_PENALTY = 4000, 0.03  # of logistic regression; C is the middle one of `crossdata.INVERSE_PENALTIES`
READOUT = "readout"
WITHOUT = "readout, without the regression of the candidates"
REGRESSION = "logistic regression of the candidates"
CENTROIDS = "nearest centroid of the candidates"
SYSTEMS = READOUT, WITHOUT, REGRESSION, CENTROIDS


@dataclass(frozen=True)
class CandidateCase:
    """A choice of candidates in which one class has a single candidate type."""

    kept: tuple[str, str]  # the class, and its only candidate type
    places: np.ndarray  # int64: positions of the candidates in the types of the readout
    rows: np.ndarray  # int64: cells of the other types of the class
    others: np.ndarray  # int64: cells of the other classes


def cases_of(case: LeftOutSet, types: Sequence[tuple[str, str]]) -> Iterator[CandidateCase]:
    """Yield, for each class with several types, the cases in which one of the types is the only candidate.

    `types` are the (class, type) of each label of the readout.
    """
    classes, truth = np.array([label for label, _ in types]), case.test.labels
    for label in sorted(set(classes)):
        own = np.flatnonzero(classes == label)
        for place in own.tolist() if len(own) > 1 else ():
            mine = (truth == label) & (case.test.types != types[place][1]) & (case.test.types != "")
            if mine.sum() >= LEAST_CELLS:
                places = np.flatnonzero((classes != label) | (np.arange(len(types)) == place))
                yield CandidateCase(types[place], places, np.flatnonzero(mine), np.flatnonzero(truth != label))


def named_by_readout(
    case: LeftOutSet,
    readout: ScMMGPTLabelReadout,
    panel: PanelReadout,
    types: Sequence[tuple[str, str]],
    one: CandidateCase,
) -> dict[str, np.ndarray]:
    """Predict the class of each cell by the readout, with and without the regression of the candidates."""
    names = sorted({types[place][0] for place in one.places})
    owners = np.full(len(types), -1)
    owners[one.places] = [names.index(types[place][0]) for place in one.places]
    texts = [kind or label for label, kind in types]
    candidates = Candidates(names, texts, owners, np.zeros(len(types), bool), {})
    predicted = {}
    for system, judge in ((READOUT, readout.among(panel, one.places.tolist())), (WITHOUT, panel)):
        scores, parts = judge(case.test.cells), candidates.doubt_parts()
        pooled = candidates.pool(label_probabilities(scores, logit_scale=1.0, doubt=DOUBT, parts=parts))
        predicted[system] = np.array(names)[pooled.argmax(axis=1)]
    return predicted


def named_by_baselines(
    train: sparse.csr_matrix, pairs: np.ndarray, test: sparse.csr_matrix, model: Any, kept: tuple[str, str]
) -> dict[str, np.ndarray]:
    """Predict the class of each cell by systems that are fitted to the cells of the candidates only.

    Args:
        train, test: log1p(CP10k), `(n_cells, n_genes)`.
        pairs: Class and type of each training cell, `(n_train, 2)`.
        model: Unfitted regression.
        kept: The class with one candidate, and its candidate type.
    """
    rows = (pairs[:, 0] != kept[0]) | (pairs[:, 1] == kept[1])
    labels = pairs[rows, 0]
    centroids = baselines.nearest_centroid(train[rows], ["\t".join(pair) for pair in pairs[rows]], test).labels
    regression = baselines.fit_quietly(model, train[rows], labels).predict(test)
    return {REGRESSION: regression, CENTROIDS: np.array([name.split("\t")[0] for name in centroids])}


def leave_candidates_out(folder: str | Path) -> dict[str, Any]:
    """Leave out candidate types, in the files of `eval.crossdata`; see the module's docstring.

    Returns:
        JSON-able dict: `n_cases`, `n_cells` (without a candidate), `cells_of_no_candidate` and `cells_of_candidates`
        (means by system), `by_set` (means over the cases of a dataset) and `cases`.
    """
    sets, n_genes = crossdata.read_sets(folder, "coarse", MAX_CELLS)
    found = []
    for part in sets:
        case = crossdata.leave_out(sets, part.name, "all", n_genes, folder)
        if len(case.test.labels) == 0 or len(case.classes) < 2:
            continue
        readout, types = crossdata.fit_by_types(case, profiles=True)
        panel = refine_by_cells(readout, readout.for_genes(case.test.measured), case.test.cells)
        train, labels, test = crossdata.shared_expression(case, N_GENES)
        of_cells = np.concatenate([data.types[np.isin(data.labels, case.classes)] for data in case.train])
        pairs = np.stack([labels, of_cells], axis=1)
        model = crossdata.new_regression().set_params(C=INVERSE_PENALTY)
        for one in cases_of(case, types):
            named = named_by_readout(case, readout, panel, types, one)
            named |= named_by_baselines(train, pairs, test, model, one.kept)
            found.append(row_of(case, one, named))
        logger.info("candidates left out of %s", part.name)
    return summarise(found)


def row_of(case: LeftOutSet, one: CandidateCase, named: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of each system on the cells without a candidate, and on the cells of the other classes."""
    truth = case.test.labels
    row: dict[str, Any] = {"dataset": case.test.name, "class": one.kept[0], "candidate": one.kept[1]}
    row |= {"n_cells": len(one.rows), "n_others": len(one.others)}
    for name, rows in (("cells_of_no_candidate", one.rows), ("cells_of_candidates", one.others)):
        row[name] = (
            {system: float((got == truth)[rows].mean()) for system, got in named.items()} if len(rows) else None
        )
    return row


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average over cells and over cases, for all datasets together and for each dataset."""
    if not rows:
        raise ValueError("No dataset has a class of which two types are in the other datasets.")

    def means(part: str, size: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        kept = [row for row in rows if row[size]]
        weights = [row[size] for row in kept]
        return {
            system: {
                "mean_of_cells": float(np.average([row[part][system] for row in kept], weights=weights)),
                "mean_of_cases": float(np.mean([row[part][system] for row in kept])),
            }
            for system in (SYSTEMS if kept else ())
        }

    by_set = {}
    for name in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == name]
        of_set = means("cells_of_no_candidate", "n_cells", mine)
        by_set[name] = {"n_cases": len(mine)} | {system: of_set[system]["mean_of_cases"] for system in SYSTEMS}
    return {
        "n_cases": len(rows),
        "n_cells": sum(row["n_cells"] for row in rows),
        "cells_of_no_candidate": means("cells_of_no_candidate", "n_cells", rows),
        "cells_of_candidates": means("cells_of_candidates", "n_others", rows),
        "by_set": by_set,
        "cases": list(rows),
    }
