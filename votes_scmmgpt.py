"""From the labels of cells to answers for clusters, which agree with the ontology, and to numbers of the whole."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .evidence_scmmgpt import likely_label
from .labels_scmmgpt import MOST_LABELS, UNKNOWN, Candidates
from .records_scmmgpt import MISSING


CLUSTER_SHARE = 0.8  # of the cells of a cluster, for its type
N_VOTES = 4  # labels that are shown

# An annotation of at least this many cells is reported as collapsed if one label has at least this share of them.
COLLAPSE_MIN_CELLS, COLLAPSE_SHARE = 50, 0.98
NOVEL_SHARE = 0.2  # an annotation with at least this share of novel cells gets a warning
DOUBTFUL_SHARE = 0.5  # an annotation with at least this share of low scores, where not all labels are candidates


def cluster_answers(
    labels: np.ndarray,
    clusters: np.ndarray,
    names: Sequence[str],
    cl_ids: Mapping[str, str],
    terms: Sequence[Mapping[str, Any]] = (),
    types_alone: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The narrowest type that nearly all cells of each cluster have, and their votes.

    Cells of two kinds of T cells are no vote against each other for "T cell", where a majority would name one kind.

    Args:
        labels, clusters: str `(n_cells,)`: labels, of which some may be names of `terms`.
        names: Labels to choose from.
        cl_ids: Label -> Cell Ontology id.
        terms: Broader terms, as for [`choose_labels`].
        types_alone: Name -> Cell Ontology id, of further types; one that is among `terms`, too, is the term.

    Returns:
        For each cluster `cluster`, `cells`, `label` (`"Unknown"` if no type has `CLUSTER_SHARE` of the cells),
        `cl_id`, `share` (of the cells with the label or a kind of it) and `votes` (the commonest labels with shares).

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
        found, counts = np.unique(labels[clusters == cluster], return_counts=True)
        order, total = np.argsort(-counts, kind="stable"), int(counts.sum())
        row = {"cluster": str(cluster), "cells": total, "label": UNKNOWN, "cl_id": "", "share": 0.0}
        for name, term_id, members in types:
            votes = sum(n for label, n in zip(found, counts, strict=True) if kinds.get(label, {""}) <= members)
            if votes >= CLUSTER_SHARE * total:
                row |= {"label": str(name), "cl_id": str(term_id), "share": float(votes / total)}
                break
        shares = [f"{found[i]} {counts[i] / total:.0%}".replace("%", " %") for i in order[:N_VOTES]]
        rows.append({**row, "votes": ", ".join(shares)})
    return rows


def majority_vote(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The commonest label of each cell's cluster, its own without one; ties go to the label that sorts first.

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
    """Summary of an annotation, and warnings about an unlikely one.

    `columns` is the result of [`choose_labels`], `known` the labels of the checkpoint, `min_score` that of
    [`choose_labels`], None for one of 0 that was fitted, and `terms` those of the checkpoint.

    Returns:
        `found`, `found_cells`, `mean_entropy`, `collapsed`, with novelty `novel_cells`; and the warnings.
    """
    counted = Counter(np.asarray(columns["cell_type"]).tolist())  # faster than a sort of words
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
            f"There is one label, {candidates.names[0]!r}, and no other that the checkpoint knows: every cell gets "
            "it, with score 1. Give two labels or more."
        )
    pairs = zip(candidates.owners.tolist(), candidates.unseen.tolist(), strict=True)
    new = [candidates.names[owner] for owner, unseen in pairs if unseen and owner >= 0 and known]
    if n_new := sum(counted[name] for name in new):
        commonest = sorted(new, key=lambda name: -counted[name])[:3]
        shown = ", ".join(map(repr, commonest))
        guesses = {name: guess for name in commonest if (guess := likely_label(name, known, terms)) is not None}
        asked = "".join(f" Do you mean {guess!r} by {name!r}?" for name, guess in guesses.items())
        warnings.append(
            f"{n_new} of {n_cells} cells have labels that no training cell had ({shown}): their texts alone decide, "
            "and such a label takes cells of other types, most of all where none of its own are there. Leave it out "
            f"if it cannot occur, or write a known label in its place.{asked}"
        )
    if n_novel >= NOVEL_SHARE * n_cells:
        given = f"{n_unknown} of them are {UNKNOWN}, the others have a broader type or that of a reference profile"
        given = f"they are {UNKNOWN}" if n_unknown == n_novel else given
        given = "they are labelled all the same" if min_score == 0 else given
        warnings.append(
            f"{n_novel} of {n_cells} cells are like nothing that this checkpoint knows ({len(known)} cell types, "
            f"such as {', '.join(map(repr, known[:3]))}): {given}. They are more like other cells, or express "
            "other genes; use a checkpoint of this tissue, or `finetune` with labelled cells of it."
        )
    elif not min_score and (candidates.owners < 0).any() and (low := int((columns["score"] < 0.5).sum())):
        if low >= DOUBTFUL_SHARE * n_cells:
            warnings.append(
                f"{low} of {n_cells} cells have a score below 0.5: known labels that are no candidates fit them "
                "better, or several candidates fit alike. Pass `min_score=`, or more `labels=`."
            )
    elif collapsed:
        warnings.append(
            f"{share:.0%} of {n_cells} cells were labelled {str(found[found_cells.argmax()])!r}, of "
            f"{len(candidates.names)} labels. If you don't expect that, look at uns['scmmgpt']['input']: the "
            "matrix or the genes may be the wrong ones, or the texts of the labels too alike."
        )
    numbers = {
        "found": np.asarray(found, dtype=object),
        "found_cells": found_cells,
        "mean_entropy": float(columns["entropy"].mean()),
        "collapsed": collapsed,
    }
    return numbers | ({"novel_cells": n_novel} if "novelty" in columns else {}), warnings
