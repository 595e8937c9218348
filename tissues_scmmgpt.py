"""Tissues of a checkpoint: the labels of each, advice to name one, and what the cells of a file say of theirs.

A checkpoint keeps its tissues in `config.annotation["tissues"]`: those of its labelled cells and reference profiles.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .labels_scmmgpt import term_of


STRANGE_SHARE, MIN_STRANGE = 0.02, 3  # cells, and labels, of other tissues that bring advice to name one
# Of the cells of a tissue, the share that may have any label: of 0.1, 0.3 and 0.5, that of the greatest likelihood of
# datasets left out (`train/LOG.md`).
FOREIGN = 0.3
ROUNDS = 100  # of expectation and maximisation; more change the shares little (`train/LOG.md`)


def tissue_prior(probabilities: np.ndarray, labels: Sequence[str], tissues: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """How common each label is in the tissues that the cells of a file are like, float64 `(n_labels,)`.

    The unit is the same share of every label. A pancreatic cell is unlikely among neurons, and a macrophage in blood.

    The cells are taken for a mixture of tissues, whose weights are those of maximum likelihood. A cell of a tissue has
    any of its labels with the same probability, or, in a share of `FOREIGN`, any label of all. One more component has
    any label: cells of a tissue that the checkpoint does not know. A label of no tissue may be in each: labelled cells
    may lack their tissue, and `calibrate` may give a label another name.

    Args:
        probabilities: `(n_cells, n_labels)`, of labels that are equally common; positive.
        labels: The labels.
        tissues: `labels` of each.

    >>> blood, islet = {"labels": ["T", "B"]}, {"labels": ["A"]}
    >>> tissue_prior(np.tile([0.6, 0.3, 0.1], (50, 1)), ["T", "B", "A"], [blood, islet]).round(1)
    array([1.3, 1.3, 0.3])
    """
    has = np.array([np.isin(labels, tissue["labels"]) for tissue in tissues]).reshape(len(tissues), len(labels))
    has = np.vstack([has[has.any(axis=1)] | ~has.any(axis=0), np.ones(len(labels), bool)])
    has = np.unique(has, axis=0)  # the same labels are one tissue
    shares = (1 - FOREIGN) * has / has.sum(axis=1, keepdims=True) + FOREIGN / len(labels)
    likelihood, weights = probabilities @ shares.T, np.full(len(shares), 1 / len(shares))
    for _ in range(ROUNDS):
        parts = likelihood * weights
        weights = (parts / parts.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights @ shares * len(labels)


def advice_on_tissues(where: Sequence[str], counts: Mapping[str, int], stored: Mapping[str, Any]) -> list[str]:
    """Advice to name a tissue, where cells of one tissue have labels that it lacks.

    Args:
        where: The tissues that the file names, if any.
        counts: Label -> cells.
        stored: `labels` and `tissues`, terms, of the checkpoint.
    """
    tissues = stored.get("tissues") or []
    named = [word for word in where if word]
    terms = [term for name in named if (term := term_of(name, tissues)) is not None]
    if not tissues or len(named) > 1:
        return []
    named = named if terms else []  # a tissue that the checkpoint does not know may be part of one: "lung tumour"

    def strange(term: Mapping[str, Any]) -> dict[str, int]:
        return {label: n for label, n in counts.items() if label in stored["labels"] and label not in term["labels"]}

    term = min(terms or tissues, key=lambda term: sum(strange(term).values()))
    others, n_cells = strange(term), sum(counts.values())
    if sum(others.values()) < STRANGE_SHARE * n_cells or (not named and len(others) < MIN_STRANGE):
        return []
    shown = ", ".join(sorted(others, key=lambda label: -others[label])[:3])
    if named:
        start = f"The file says that the tissue is {named[0]!r}; {sum(others.values())} of {n_cells} cells have labels"
        said = f"{start} that the checkpoint has of other tissues alone ({shown})."
        return [f"{said} `tissue='{term['name']}'` chooses among the others."]
    said = f"The {len(counts)} labels are of several tissues (beside {term['name']}: {shown})."
    return [f"{said} If the cells are of one, name it by `tissue=`, such as `tissue='{term['name']}'`."]


def labels_of_tissue(tissue: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text of the stored labels of a tissue.

    Args:
        tissue: In any spelling, a synonym, or an id of UBERON.
        stored: `labels` (label -> text) and `tissues`, terms as for [`trained_labels_of`].

    >>> liver = {"id": "UBERON:0002107", "name": "liver", "names": ["liver"], "labels": ["hepatocyte"]}
    >>> labels_of_tissue("Liver", {"labels": {"hepatocyte": "A cell.", "neuron": "A cell."}, "tissues": [liver]})
    {'hepatocyte': 'A cell.'}
    """
    tissues = stored.get("tissues") or []
    if not tissues:
        raise ValueError(
            "This checkpoint does not know which labels a tissue has: name the labels, or use a checkpoint of "
            "`release`, `finetune` or `calibrate` whose cells had a column 'tissue' in obs."
        )
    found = term_of(tissue, tissues)
    if found is None:
        known = [str(term["name"]) for term in tissues]
        near = difflib.get_close_matches(tissue.lower(), known, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"The checkpoint knows no tissue {tissue!r}; it knows {', '.join(known)}.{meant}")
    return {label: text for label, text in stored["labels"].items() if label in found["labels"]}
