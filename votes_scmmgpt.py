"""From the labels of cells to an answer for each cluster, which agrees with the ontology and shows its votes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


try:  # as a package or as remote code
    from .annotation_scmmgpt import MOST_LABELS, UNKNOWN
except ImportError:  # beside the other files of a checkpoint
    from annotation_scmmgpt import MOST_LABELS, UNKNOWN

CLUSTER_SHARE = 0.8  # of the cells of a cluster, for its type
N_VOTES = 4  # labels that are shown


def cluster_answers(
    labels: np.ndarray,
    clusters: np.ndarray,
    names: Sequence[str],
    cl_ids: Mapping[str, str],
    terms: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The narrowest type that nearly all cells of each cluster have, and their votes.

    Cells of two kinds of T cells are no vote against each other for "T cell", where a majority would name one kind.

    Args:
        labels, clusters: str `(n_cells,)`: labels, of which some may be names of `terms`.
        names: Labels to choose from.
        cl_ids: Label -> Cell Ontology id.
        terms: Broader terms, as for [`choose_labels`].

    Returns:
        For each cluster `cluster`, `cells`, `label` (`"Unknown"` if no type has `CLUSTER_SHARE` of the cells),
        `cl_id`, `share` (of the cells with the label or a kind of it) and `votes` (the commonest labels with shares).

    >>> t_cell = {"id": "CL:0000084", "name": "T cell", "names": ["t cell"], "labels": ["CD4 T", "CD8 T"]}
    >>> labels, names = np.array(["CD4 T", "CD4 T", "CD8 T", "CD8 T", "T cell"]), ["CD4 T", "CD8 T", "B"]
    >>> (answer,) = cluster_answers(labels, np.zeros(5, str), names, {}, [t_cell])
    >>> answer["label"], answer["share"], answer["votes"]
    ('T cell', 1.0, 'CD4 T 40 %, CD8 T 40 %, T cell 20 %')
    """
    kinds = {str(term["name"]): set(term["labels"]) for term in terms} | {name: {name} for name in names}
    types = [(name, cl_ids.get(name, ""), {name}) for name in names]
    types += [
        (t["name"], t["id"], set(t["labels"]))
        for t in terms
        if 1 < len(set(t["labels"]) & set(names)) <= MOST_LABELS * len(names)
    ]
    rows = []
    for cluster in np.unique(clusters):
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
