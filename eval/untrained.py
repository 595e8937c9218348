"""Evaluate the annotation of `train release` on labels left out of its training, one at a time.

```
python -m scmmgpt.eval abstention --data ../shared/data --leave-out labels --output labels.json
```

The groups of the label are removed from a fitted readout, and the regression is solved again. (The choice of genes and
the variance within groups still come from all cells.) The reference profile of the label, if there is one, then counts
as a profile of a type without cells. All sampled cells of a dataset are annotated as one file. A cell of the left-out
label is right if it gets the label, an ancestor, or `Unknown`.

* `known_laboratories`: the readout is fitted to all datasets, the annotated dataset included.
* `new_laboratory`: the annotated dataset is also left out; labels that no other dataset has are skipped.
* `known_cells`: only the dataset is left out; measures the loss of known labels to `Unknown`, broader types and
  profiles.
* `own_types`: cells whose type no other dataset has. `own_types_without_profile`: also without the reference profiles
  of these types.
* `named_by_profile`: precision of the names from reference profiles.

The settings of `train.left_out.calibrate` are fitted to the other datasets, with readouts of all labels.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scmmgpt.annotation_scmmgpt import (
    choose_labels,
    label_probabilities,
    least_scores,
    members_of_terms,
    name_by_profile,
)
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.novelty_scmmgpt import Novelty
from scmmgpt.profiles_scmmgpt import ProfiledTypes, broader_answers, kinds_of_terms
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.refinement_scmmgpt import refine_by_cells
from scmmgpt.regression_scmmgpt import solve_groups
from scmmgpt.tissues_scmmgpt import tissue_prior
from scmmgpt.train.data import ontology
from scmmgpt.train.pooled import Dataset
from scmmgpt.train.references import TypeProfiles


@dataclass(frozen=True)
class Fitted:
    """A readout of some types, and the other statistics that `annotate` needs."""

    readout: ScMMGPTLabelReadout
    types: list[str]  # Cell Ontology ids of the labels
    novelty: dict[str, Any]  # result of `fit_pooled_novelty`
    settings: dict[str, Any]  # result of `train.left_out.calibrate`
    tissues: list[dict[str, Any]]  # result of `release.tissues_of`

    def without(self, term: str) -> "Fitted":
        """Leave out the label with this Cell Ontology id."""
        readout = without_label(self.readout, self.types.index(term))
        return replace(self, readout=readout, types=[known for known in self.types if known != term])


def without_label(readout: ScMMGPTLabelReadout, place: int) -> ScMMGPTLabelReadout:
    """Solve the readout again without the groups that have a share of the label at position `place`."""
    a = {name: values for name, values in readout.arrays().items() if not name.startswith("profile")}
    n_labels, kept = len(a["bias"]), a["group_labels"][:, place] == 0
    own, left = a["group_labels"][:, place] * a["group_weights"], np.arange(n_labels) != place
    a["group_mean"] = (n_labels * a["group_mean"] - own / own.sum() @ a["groups"]) / (n_labels - 1)
    mentions = np.delete(a["group_labels"][kept], place, axis=1) * a["group_weights"][kept, None]
    mentions /= mentions.sum(axis=0) * mentions.shape[1]
    a["group_weights"] = mentions.sum(axis=1)
    a["group_labels"] = mentions / a["group_weights"][:, None]
    a["groups"], a["centroids"], a["bias"] = a["groups"][kept], a["centroids"][left], a["bias"][left]
    weights, bias = solve_groups(a, np.ones(len(a["gene_ids"]), bool))
    a["weights"], a["bias"] = weights[: n_labels - 1], bias[: n_labels - 1]
    return ScMMGPTLabelReadout.from_statistics(**a)


def annotate_file(
    fitted: Fitted, data: Dataset, rows: np.ndarray, profiles: TypeProfiles | None, alone: bool = False
) -> dict[str, np.ndarray]:
    """Annotate `rows` of a dataset as one file; with `alone`, each cell without the other cells.

    `profiles` are those of all types; profiles of the labels of `fitted` are left out.

    Returns:
        The columns of `annotate`; `forced`, the Cell Ontology id of the most probable label; and `by_profile`, whether
        the name comes from a reference profile.
    """
    n_genes = data.counts.shape[1]
    cells = Cells.from_csr(data.counts[rows], np.arange(n_genes))
    names = [str(ontology.term_name(term)) for term in fitted.types]
    ids = dict(zip(names, fitted.types, strict=True))
    terms = ontology.label_terms(ids)
    panel = replace(fitted.readout.for_genes(data.measured), temperature=1.0)
    units = {name: fitted.settings[name] for name in ("lead_unit", "batch_unit")}
    stored = fitted.novelty | ({} if panel.others is None else units)
    judge: Any = Novelty.of(stored, data.measured, n_genes, panel, members_of_terms(terms, names))
    neighbours = None if judge is None or alone else judge.with_neighbours(cells)
    judge = None if judge is None else replace(judge, neighbours=neighbours)
    if judge is not None and profiles is not None:
        types = profiles.without(fitted.types)
        types.add_to(fitted.readout)
        above = [
            {"id": t, "name": str(ontology.term_name(t)), "above": [t, *ontology.ancestors(t)]} for t in types.terms
        ]
        answers, kinds = broader_answers(names, terms, above), kinds_of_terms(names, terms, above)
        profiled = ProfiledTypes.of(fitted.readout, panel, answers, kinds)
        judge = profiled.beside(judge, profiled.with_types(neighbours, cells))
    scale, doubt = 1 / fitted.settings["temperature"], fitted.settings["doubt"]
    named_by = panel if alone else refine_by_cells(fitted.readout, panel, cells)
    scores = named_by(cells)
    probabilities = label_probabilities(scores, logit_scale=scale, doubt=doubt)
    if fitted.tissues and not alone:
        prior = tissue_prior(probabilities, names, fitted.tissues)
        probabilities = label_probabilities(scores, logit_scale=scale, doubt=doubt, prior=prior)
    novelty, broader, *named = (None, None) if judge is None else judge(cells).T
    least = least_scores(fitted.settings["min_score"], novelty)
    columns = choose_labels(probabilities, names, ids, least, novelty, terms, broader=broader)
    columns["forced"] = np.array(fitted.types)[probabilities.argmax(axis=1)]
    return columns | (name_by_profile(columns, above, *named) if named else {"by_profile": np.zeros(len(rows), bool)})


def row_of(columns: dict[str, np.ndarray], truth: np.ndarray, term: str) -> dict[str, Any]:
    """Summarise the names of the cells of a type: shares `called_it`, `ancestor`, `unknown`, and their sum `right`.

    `columns` is from [`annotate_file`]; `truth` has the Cell Ontology ids of all cells, `term` that of the type.
    """
    mine = truth == term
    it, unknown = columns["cl_id"][mine] == term, columns["cell_type"][mine] == UNKNOWN
    ancestor, named = np.isin(columns["cl_id"][mine], ontology.ancestors(term)), columns["by_profile"][mine]
    parts = {"called_it": it, "ancestor": ancestor, "unknown": unknown, "right": it | ancestor | unknown}
    numbers = {"n_cells": len(it), "by_profile": int(named.sum()), "wrongly": int((named & ~it & ~ancestor).sum())}
    return {"type": str(ontology.term_name(term)), **numbers, **{n: float(v.mean()) for n, v in parts.items()}}


def lost_of(columns: dict[str, np.ndarray], truth: Sequence[str], known: np.ndarray) -> dict[str, float]:
    """Accuracy of known cells if every cell gets a label, the loss of `annotate`, and the part lost to profiles."""
    right = (columns["forced"] == truth)[known]
    still = (columns["cl_id"] == truth)[known]
    return {
        "n_cells": int(known.sum()),
        "forced_accuracy": float(right.mean()),
        "accuracy": float(still.mean()),
        "lost": float(right.mean() - still.mean()),
        "lost_to_profiles": float((right & columns["by_profile"][known]).mean()),
    }


def weighted(rows: Collection[dict[str, Any]]) -> dict[str, float]:
    """Means of the float columns of rows, weighted by `n_cells`, and the sum of `n_cells`."""
    sizes = [row["n_cells"] for row in rows]
    names = [n for n in next(iter(rows), {}) if all(isinstance(row.get(n), float) for row in rows)]
    return {"n_cells": sum(sizes)} | {n: float(np.average([row[n] for row in rows], weights=sizes)) for n in names}


def mean_of_labels(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average rows over labels; the rows of a label in several datasets are weighted by `n_cells`."""
    by_label: dict[str, Any] = {}
    for kind in sorted({row["type"] for row in rows}):
        by_label[kind] = weighted([row for row in rows if row["type"] == kind])
    names = [name for name in next(iter(by_label.values()), {}) if name != "n_cells"]
    named, wrongly = (sum(row[name] for row in rows) for name in ("by_profile", "wrongly"))
    mean = {name: float(np.mean([row[name] for row in by_label.values()])) for name in names}
    precision = {"named_by_profile": 1 - wrongly / named} if named else {}
    return {"n_labels": len(by_label), "mean": mean | precision, "labels": by_label}
