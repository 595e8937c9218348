"""Labels of clusters by votes of their cells along the ontology, and the summary of an annotation with warnings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .evidence_scmmgpt import likely_label
from .labels_scmmgpt import MOST_LABELS, UNKNOWN, Candidates
from .records_scmmgpt import MISSING


CLUSTER_SHARE = 0.8  # least share of a cluster's cells with a type, for the type to name the cluster
N_VOTES = 4  # number of labels in the column `votes`

# Warnings about an annotation: one label has this share of at least this many cells; this share of the cells is novel;
# this share of the cells has a score below 0.5 while known labels are no candidates.
COLLAPSE_MIN_CELLS, COLLAPSE_SHARE = 50, 0.98
NOVEL_SHARE = 0.2
DOUBTFUL_SHARE = 0.5


def cluster_answers(
    labels: np.ndarray,
    clusters: np.ndarray,
    names: Sequence[str],
    cl_ids: Mapping[str, str],
    terms: Sequence[Mapping[str, Any]] = (),
    types_alone: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The narrowest type that includes at least `CLUSTER_SHARE` of the cells of each cluster.

    A cell votes for its label and for all broader terms. Cells of two kinds of T cells together elect "T cell", where
    a majority vote would elect one kind.

    Args:
        labels: str `(n_cells,)`: labels of the cells; some may be names of `terms`.
        clusters: str `(n_cells,)`: clusters of the cells.
        names: Labels to choose from.
        cl_ids: Label -> Cell Ontology id.
        terms: Broader terms, as in [`choose_labels`], the preferred ones first.
        types_alone: Name -> Cell Ontology id of profiled types. A type that is also a term counts as the term.

    Returns:
        For each cluster a row of `cluster`, `cells`, `label` (`"Unknown"` if no type includes enough cells), `cl_id`,
        `share` (of cells with the label or a kind of the label) and `votes` (the commonest labels with their shares).

    >>> t_cell = {"id": "CL:0000084", "name": "T cell", "names": ["t cell"], "labels": ["CD4 T", "CD8 T"]}
    >>> labels, names = np.array(["CD4 T", "CD4 T", "CD8 T", "CD8 T", "T cell"]), ["CD4 T", "CD8 T", "B"]
    >>> (answer,) = cluster_answers(labels, np.zeros(5, str), names, {}, [t_cell])
    >>> answer["label"], answer["share"], answer["votes"]
    ('T cell', 1.0, 'CD4 T 40 %, CD8 T 40 %, T cell 20 %')
    """
    alone = {name: term_id for name, term_id in (types_alone or {}).items() if name not in {t["name"] for t in terms}}
    kinds = {str(term["name"]): set(term["labels"]) for term in terms} | {name: {name} for name in [*names, *alone]}
    types = [(name, {**cl_ids, **alone}.get(name, ""), {name}) for name in [*names, *alone]]
    types += [
        (t["name"], t["id"], set(t["labels"]))
        for t in terms
        if 1 < len(set(t["labels"]) & set(names)) <= MOST_LABELS * len(names)
    ]
    rows = []
    for cluster in np.unique(clusters[clusters != MISSING]):
        present, counts = np.unique(labels[clusters == cluster], return_counts=True)
        order, total = np.argsort(-counts, kind="stable"), int(counts.sum())
        row = {"cluster": str(cluster), "cells": total, "label": UNKNOWN, "cl_id": "", "share": 0.0}
        for name, term_id, members in types:
            votes = sum(n for label, n in zip(present, counts, strict=True) if kinds.get(label, {""}) <= members)
            if votes >= CLUSTER_SHARE * total:
                row |= {"label": str(name), "cl_id": str(term_id), "share": float(votes / total)}
                break
        shares = [f"{present[i]} {counts[i] / total:.0%}".replace("%", " %") for i in order[:N_VOTES]]
        rows.append({**row, "votes": ", ".join(shares)})
    return rows


def majority_vote(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The commonest label in each cell's cluster. A cell without a cluster keeps its own label.

    In a tie the label that sorts first wins.

    >>> majority_vote(np.array(["B", "B", "T", "T"]), np.array(["0", "0", "0", "1"]))
    array(['B', 'B', 'B', 'T'], dtype='<U1')
    """
    voted = labels.copy()
    for cluster in np.unique(clusters[clusters != MISSING]):
        members = clusters == cluster
        names, counts = np.unique(labels[members], return_counts=True)
        voted[members] = names[counts.argmax()]
    return voted


def summarize_annotation(
    columns: Mapping[str, np.ndarray],
    candidates: Candidates,
    known: Sequence[str],
    min_score: float | None,
    terms: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Summary of an annotation, and warnings about unlikely results.

    Args:
        columns: The result of [`choose_labels`].
        candidates: The labels to choose from.
        known: Labels of the checkpoint.
        min_score: As in [`choose_labels`]; None for a fitted value of 0.
        terms: Terms of the checkpoint.

    Returns:
        `found` (labels that cells have), `found_cells` (number of cells of each), `mean_entropy`, `collapsed`, and
        `novel_cells` if there is novelty; the warnings.
    """
    counted = Counter(np.asarray(columns["cell_type"]).tolist())  # faster than np.unique on strings
    found = sorted(counted)
    found_cells = np.array([counted[name] for name in found])
    n_cells, is_novel = len(columns["cell_type"]), columns.get("novelty", np.zeros(1)) > 1
    n_novel, n_unknown = int(is_novel.sum()), int((is_novel & (np.asarray(columns["cell_type"]) == UNKNOWN)).sum())
    share = found_cells.max() / n_cells
    several = len(candidates.names) > 1
    collapsed = several and n_cells >= COLLAPSE_MIN_CELLS and bool(share >= COLLAPSE_SHARE)
    warnings = []
    if len(candidates.texts) == 1:
        warnings.append(
            f"There is one label, {candidates.names[0]!r}, and the checkpoint knows no other label: every cell is "
            f"{candidates.names[0]!r}, with score 1. Pass two labels or more."
        )
    pairs = zip(candidates.owners.tolist(), candidates.unseen.tolist(), strict=True)
    new = [candidates.names[owner] for owner, unseen in pairs if unseen and owner >= 0 and known]
    if n_new := sum(counted[name] for name in new):
        commonest = sorted(new, key=lambda name: -counted[name])[:3]
        shown = ", ".join(map(repr, commonest))
        guesses = {name: guess for name in commonest if (guess := likely_label(name, known, terms)) is not None}
        questions = "".join(f" Do you mean {guess!r} by {name!r}?" for name, guess in guesses.items())
        warnings.append(
            f"{n_new} of {n_cells} cells have labels without training cells ({shown}). Only the texts of these labels "
            "decide, and such a label takes cells of other types, above all if the file has no cell of the label. "
            f"Remove a label that cannot occur, or replace it by a known label.{questions}"
        )
    if n_novel >= NOVEL_SHARE * n_cells:
        some = (
            f"{n_unknown:,} of these cells {'is' if n_unknown == 1 else 'are'}"
            if n_unknown
            else "none of these cells is"
        )
        outcome = f"{some} {UNKNOWN}, the others have a broader or a profiled type"
        outcome = f"these cells are {UNKNOWN}" if n_unknown == n_novel else outcome
        outcome = "these cells are labelled nevertheless" if min_score == 0 else outcome
        warnings.append(
            f"{n_novel} of {n_cells} cells resemble no type that this checkpoint knows ({len(known)} cell types, "
            f"such as {', '.join(map(repr, known[:3]))}): {outcome}. The cells are closer to reference profiles of "
            "other cells, or express other genes. Use a checkpoint of this tissue, or run `finetune` with labelled "
            "cells of the tissue."
        )
    elif not min_score and (candidates.owners < 0).any() and (low := int((columns["score"] < 0.5).sum())):
        if low >= DOUBTFUL_SHARE * n_cells:
            warnings.append(
                f"{low} of {n_cells} cells have a score below 0.5: a known label that is no candidate fits better, or "
                "several candidates fit equally well. Pass `min_score=`, or more `labels=`."
            )
    elif collapsed:
        warnings.append(
            f"{share:.0%} of {n_cells} cells were labelled {str(found[found_cells.argmax()])!r}, of "
            f"{len(candidates.names)} labels. If this is unexpected, look at uns['scmmgpt']['input']: the matrix or "
            "the genes may be wrong, or the texts of the labels too similar."
        )
    numbers = {
        "found": np.asarray(found, dtype=object),
        "found_cells": found_cells,
        "mean_entropy": float(columns["entropy"].mean()),
        "collapsed": collapsed,
    }
    return numbers | ({"novel_cells": n_novel} if "novelty" in columns else {}), warnings
