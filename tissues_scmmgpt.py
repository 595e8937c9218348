"""Tissues of a checkpoint: the labels of a tissue, a prior over labels from the cells of a file, and advice to users.

`config.annotation["tissues"]` holds the tissues of the labelled training cells and of the reference profiles.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .labels_scmmgpt import term_of


STRANGE_SHARE = 0.02  # least share of cells with labels of other tissues for the advice to name a tissue
MIN_STRANGE = 3  # least number of such labels, if the file names no tissue
# Share of a tissue's cells that may have any label. Among 0.1, 0.3 and 0.5, the value 0.3 gave the highest likelihood
# on left-out datasets (`train/LOG.md`).
FOREIGN = 0.3
ROUNDS = 100  # EM iterations; more iterations change the weights little (`train/LOG.md`)


def tissue_prior(probabilities: np.ndarray, labels: Sequence[str], tissues: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Prior of each label, estimated from the cells of a file. A pancreatic cell is unlikely in a file of neurons.

    The cells are modelled as a mixture of tissues. Expectation-maximisation finds the mixture weights of maximum
    likelihood. In a tissue, a share `FOREIGN` of the cells is spread evenly over all labels, and the other cells are
    spread evenly over the labels of the tissue. One more component, for tissues that the checkpoint does not know, has
    all labels. A label that is listed in no tissue belongs to every tissue: training cells may lack a tissue, and
    `calibrate` may rename a label.

    Args:
        probabilities: `(n_cells, n_labels)`, positive, computed as if all labels were equally common.
        labels: Names of the labels.
        tissues: Terms; each has its `labels`.

    Returns:
        float64 `(n_labels,)` of mean 1: the frequency of each label, divided by the mean frequency.

    >>> blood, islet = {"labels": ["T", "B"]}, {"labels": ["A"]}
    >>> tissue_prior(np.tile([0.6, 0.3, 0.1], (50, 1)), ["T", "B", "A"], [blood, islet]).round(1)
    array([1.3, 1.3, 0.3])
    """
    has = np.array([np.isin(labels, tissue["labels"]) for tissue in tissues]).reshape(len(tissues), len(labels))
    has = np.vstack([has[has.any(axis=1)] | ~has.any(axis=0), np.ones(len(labels), bool)])
    has = np.unique(has, axis=0)  # tissues with equal labels are one component
    shares = (1 - FOREIGN) * has / has.sum(axis=1, keepdims=True) + FOREIGN / len(labels)
    likelihood, weights = probabilities @ shares.T, np.full(len(shares), 1 / len(shares))
    for _ in range(ROUNDS):
        parts = likelihood * weights
        weights = (parts / parts.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights @ shares * len(labels)


def advice_on_tissues(where: Sequence[str], counts: Mapping[str, int], stored: Mapping[str, Any]) -> list[str]:
    """Advice to pass `tissue=` if many cells have labels of other tissues: a list of one message or none.

    A file that names several tissues gets no advice.

    Args:
        where: Tissues that the file names, if any.
        counts: Label -> number of cells.
        stored: `config.annotation` of the checkpoint: `labels`, and `tissues` as terms.
    """
    tissues = stored.get("tissues") or []
    named = [word for word in where if word]
    terms = [term for name in named if (term := term_of(name, tissues)) is not None]
    if not tissues or len(named) > 1:
        return []
    named = named if terms else []  # an unknown tissue may be part of a known one: "lung tumour"

    def strange(term: Mapping[str, Any]) -> dict[str, int]:
        return {label: n for label, n in counts.items() if label in stored["labels"] and label not in term["labels"]}

    term = min(terms or tissues, key=lambda term: sum(strange(term).values()))
    others, n_cells = strange(term), sum(counts.values())
    if sum(others.values()) < STRANGE_SHARE * n_cells or (not named and len(others) < MIN_STRANGE):
        return []
    shown = ", ".join(sorted(others, key=lambda label: -others[label])[:3])
    if named:
        finding = (
            f"The file names the tissue {named[0]!r}, but {sum(others.values())} of {n_cells} cells have labels of "
            f"other tissues only ({shown})."
        )
        return [f"{finding} Pass `tissue='{term['name']}'` to choose among the labels of this tissue."]
    finding = f"The {len(counts)} labels belong to several tissues (beside {term['name']}: {shown})."
    return [f"{finding} If all cells come from one tissue, pass `tissue=`, such as `tissue='{term['name']}'`."]


def labels_of_tissue(tissue: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """The stored labels of a tissue with their texts.

    Args:
        tissue: Name in any spelling, synonym, or UBERON id.
        stored: `config.annotation`: `labels` (label -> text), and `tissues`, terms as in [`trained_labels_of`].

    Raises:
        ValueError: If the checkpoint stores no tissues, or does not know this one.

    >>> liver = {"id": "UBERON:0002107", "name": "liver", "names": ["liver"], "labels": ["hepatocyte"]}
    >>> labels_of_tissue("Liver", {"labels": {"hepatocyte": "A cell.", "neuron": "A cell."}, "tissues": [liver]})
    {'hepatocyte': 'A cell.'}
    """
    tissues = stored.get("tissues") or []
    if not tissues:
        raise ValueError(
            "This checkpoint stores no tissues. Pass `labels=`, or use a checkpoint of `release`, `finetune` or "
            "`calibrate` whose cells had a column 'tissue' in obs."
        )
    term = term_of(tissue, tissues)
    if term is None:
        names = [str(stored_term["name"]) for stored_term in tissues]
        near = difflib.get_close_matches(tissue.lower(), names, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"The checkpoint knows no tissue {tissue!r}; it knows {', '.join(names)}.{meant}")
    return {label: text for label, text in stored["labels"].items() if label in term["labels"]}
