"""Types that no cell of training has, named by their reference profiles, with labels and datasets left out.

```
python -m scmmgpt.eval abstention --data ../shared/data --leave-out labels --output labels.json
```

The groups of a label are taken out of the readout of all datasets (its genes, and the variance within groups, have
seen the cells), and the profile of the label (`train.references.TypeProfiles`), if there is one, is kept. Rows:

* `called_it`, `other_type`, `unknown_or_broader`: as `annotate` names the cells by default, where all types that have
  a profile alone may name a cell (`profiles_scmmgpt`);
* `as_candidate`: the label is one more candidate, as with `annotate --labels`, by its profile. `called_it` and
  `unknown` are shares of its cells.

What known cells lose is counted on datasets left out: the share of rightly named cells that get the name of a type by
its profile, and the share that one more candidate takes, mean over every tenth type that has a profile alone.
"""

from typing import Any

import numpy as np

from scmmgpt.annotation_scmmgpt import name_by_profile
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.novelty_scmmgpt import Novelty
from scmmgpt.profiles_scmmgpt import ProfiledTypes
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.regression_scmmgpt import solve_groups
from scmmgpt.train.data import ontology
from scmmgpt.train.left_out import LeftOut
from scmmgpt.train.pooled import Dataset
from scmmgpt.train.references import TypeProfiles


EVERY = 10  # of the types that have a profile alone, one is tried as a candidate


def without_label(readout: ScMMGPTLabelReadout, place: int) -> ScMMGPTLabelReadout:
    """The readout of groups without those that mention a label."""
    a = readout.arrays()
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


def with_types(fitted: ScMMGPTLabelReadout, known: set[str], types: TypeProfiles) -> TypeProfiles:
    """Add the profiles of all types that are not among the `known` to a readout; returns these."""
    left = types.without(known)
    left.add_to(fitted)
    return left


def name_by_types(
    fitted: ScMMGPTLabelReadout, types: TypeProfiles, data: Dataset, rows: np.ndarray, columns: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The columns of `eval.left_out.annotate` for `rows` of a dataset, as `annotate` names the cells by profiles."""
    cells = Cells.from_csr(data.counts[rows], np.arange(data.counts.shape[1]))
    found = ProfiledTypes.of(fitted, fitted.for_genes(data.measured)).name(cells, columns["novelty"])
    terms = [{"name": str(ontology.term_name(term)), "id": term} for term in types.terms]
    return columns | name_by_profile(columns, terms, *found.T)


def as_candidate(
    fitted: ScMMGPTLabelReadout, number: int, data: Dataset, rows: np.ndarray, settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each cell is called the type of a profile that is one more candidate; and whether it is novel."""
    n_genes = data.counts.shape[1]
    cells = Cells.from_csr(data.counts[rows], np.arange(n_genes))
    panel = fitted.for_genes(data.measured, [number])
    called = panel(cells).argmax(axis=1) == len(fitted.bias)
    measure = Novelty.of({"lead_unit": settings["lead_unit"]}, data.measured, n_genes, panel)
    novel = np.zeros(len(rows), bool) if measure is None else measure(cells) > 1
    return called & ~novel, novel


def rows_of_label(
    fitted: ScMMGPTLabelReadout,
    types: TypeProfiles,
    term: str,
    data: Dataset,
    cells: LeftOut,
    columns: dict[str, np.ndarray],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The numbers of the module for the cells of a label, all of one dataset, that is left out."""
    above = set(ontology.ancestors(term))
    named = name_by_types(fitted, types, data, cells.rows, columns)
    row: dict[str, Any] = {
        "called_it": float((named["cl_id"] == term).mean()),
        "unknown_or_broader": float(np.mean([not found or found in above for found in named["cl_id"]])),
        "other_type": float((named["by_profile"] & (named["cl_id"] != term)).mean()),
    }
    if term in types.terms:
        called, novel = as_candidate(fitted, types.terms.index(term), data, cells.rows, settings)
        row["as_candidate"] = {"called_it": float(called.mean()), "unknown": float(novel.mean())}
    return row


def lost_by_types(
    fitted: ScMMGPTLabelReadout,
    types: TypeProfiles,
    data: Dataset,
    cells: LeftOut,
    columns: dict[str, np.ndarray],
    term_of_target: list[str],
    settings: dict[str, Any],
) -> dict[str, float]:
    """Shares of the known, rightly named cells of a dataset left out that types with a profile alone take."""
    right = columns["cl_id"] == np.asarray(term_of_target)[cells.targets]
    rows = cells.rows[right]
    some = {name: values[right] for name, values in columns.items()}
    named = name_by_types(fitted, types, data, rows, some)["by_profile"]
    tried = range(0, len(types.terms), EVERY)
    taken = [as_candidate(fitted, number, data, rows, settings)[0].mean() for number in tried]
    return {"n_cells": len(rows), "lost_by_default": float(named.mean()), "lost_by_a_candidate": float(np.mean(taken))}


def summary(new: list[dict[str, Any]], known: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Means of the numbers of the module: over the cells of all labels that are left out, and over the labels."""
    rows = [row for row in new if "profiles" in row]
    if not rows:
        return {}
    flat = [{**row["profiles"], "before": row["unknown_or_broader"], **row} for row in rows]
    flat = [row | {f"candidate_{k}": v for k, v in row.get("as_candidate", {}).items()} for row in flat]
    found: dict[str, Any] = {}
    for part, some in (("all", flat), ("with_a_profile", [row for row in flat if "as_candidate" in row])):
        if not some:
            continue
        names = [n for n, value in some[0].items() if isinstance(value, float) and all(n in row for row in some)]
        sizes, types = np.array([row["n_cells"] for row in some]), np.array([row["type"] for row in some])
        of_cells = {n: float(np.average([row[n] for row in some], weights=sizes)) for n in names}
        each = [types == kind for kind in np.unique(types)]
        table = {n: np.array([row[n] for row in some]) for n in names}
        of_labels = {n: float(np.mean([np.average(table[n][m], weights=sizes[m]) for m in each])) for n in names}
        found[part] = {"n_labels": len(each), "cells": of_cells, "labels": of_labels}
    lost = {n: float(np.mean([row[n] for row in known.values()])) for n in ("lost_by_default", "lost_by_a_candidate")}
    return {"by_profiles": found, "known_lost_mean_of_datasets": lost}
