"""From the scores of labels to an annotation: pure functions of arrays, which decide and do not know any model.

1. `labels_with_texts`: the candidate labels, each with the text that describes it.
2. `label_probabilities`: similarity and matching of each cell with each text -> probabilities of the labels.
3. `choose_labels`: the most probable label of each cell, and how certain it is.
4. `majority_vote`, `is_collapsed`: what can be told of many cells together only.

`fit_mixture` finds, on cells whose labels are known, how similarity and matching are best mixed.
"""

import math
from collections.abc import Sequence

import numpy as np


UNKNOWN = "Unknown"
# Above this share of one label among at least as many cells, an annotation is reported as collapsed.
COLLAPSE_SHARE, COLLAPSE_MIN_CELLS = 0.98, 50


def labels_with_texts(labels: dict[str, str] | Sequence[str] | None, known: dict[str, str]) -> dict[str, str]:
    """Label -> text that describes it. A label without a text of its own gets that of `known`, or is its own text."""
    if isinstance(labels, str):
        raise TypeError(f"labels is the one string {labels!r}; pass a list of labels, or a dict label -> text.")
    if labels is None:
        labels = known
    elif not isinstance(labels, dict):
        labels = {label: known.get(label, label) for label in labels}
    labels = {str(label): str(text) for label, text in labels.items()}
    if not labels:
        raise ValueError(
            "There are no labels to choose from: this checkpoint stores none. Pass labels, a list of cell types "
            "or a dict of cell type -> description."
        )
    empty = [label for label, text in labels.items() if not text.strip()]
    if empty:
        raise ValueError(f"The text of {len(empty)} labels is empty: {empty[:5]}. Describe each, or leave it out.")
    return labels


def label_probabilities(
    similarity: np.ndarray, match: np.ndarray | None = None, *, logit_scale: float, matching_weight: float = 0.0
) -> np.ndarray:
    """Probability of each label for each cell: a softmax over similarities, mixed with matching where that is known.

    The candidates of a cell are the labels that were matched with it. Matching redistributes the probability that
    similarity gave to the candidates; the other labels keep theirs, and every row sums to 1.

    Args:
        similarity: `(n_cells, n_labels)` cosine similarities.
        match: `(n_cells, n_labels)` probabilities that the label's text describes the cell; NaN off the candidates.
        logit_scale: Inverse temperature of the softmax over labels.
        matching_weight: 0 = similarity alone, 1 = matching alone decides among the candidates.

    Returns:
        float32 `(n_cells, n_labels)`; each row sums to 1.

    >>> label_probabilities(np.array([[0.5, 0.5, -9.0]]), np.array([[0.9, 0.3, np.nan]]), logit_scale=1.0,
    ...                     matching_weight=1.0).round(2)
    array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    logits = np.asarray(similarity, dtype=np.float64) * logit_scale
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    if match is not None and matching_weight:
        candidates = ~np.isnan(match)
        match = np.where(candidates, match, 0.0)
        share = (probabilities * candidates).sum(axis=1, keepdims=True)
        total = match.sum(axis=1, keepdims=True)
        redistributed = np.where(candidates, share * match / np.where(total > 0, total, 1), probabilities)
        # Where no candidate matches, matching does not tell them apart.
        redistributed = np.where(total > 0, redistributed, probabilities)
        probabilities = (1 - matching_weight) * probabilities + matching_weight * redistributed
    return probabilities.astype(np.float32)


def normalized_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of each row over the entropy of a uniform row, so 0 = certain and 1 = no idea, `(n_cells,)` float32.

    >>> normalized_entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))
    array([0., 1.], dtype=float32)
    """
    if probabilities.shape[1] < 2:
        return np.zeros(len(probabilities), dtype=np.float32)
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros(probabilities.shape))
    return np.abs(-(probabilities * logs).sum(axis=1) / math.log(probabilities.shape[1])).astype(np.float32)


def choose_labels(
    probabilities: np.ndarray, names: Sequence[str], cl_ids: dict[str, str], min_score: float | None = None
) -> dict[str, np.ndarray]:
    """Name each cell by its most probable label, and measure how certain that name is.

    Args:
        probabilities: `(n_cells, n_labels)`, as [`label_probabilities`] gives them.
        names: The labels.
        cl_ids: Label -> Cell Ontology id, of the labels that have one.
        min_score: Cells whose best label is less probable are called `"Unknown"`.

    Returns:
        Arrays of shape `(n_cells,)`: `cell_type` and `cl_id` (str), `score` (probability of the best label), `margin`
        (over the runner-up) and `entropy` (0 certain .. 1 no idea), float32.
    """
    best = probabilities.argmax(axis=1)
    ranked = np.sort(probabilities, axis=1)
    score = ranked[:, -1]
    cell_type = np.asarray(names, dtype=object)[best].astype(str)
    cl_id = np.asarray([cl_ids.get(name, "") for name in names], dtype=object)[best].astype(str)
    if min_score is not None:
        unknown = score < min_score
        cell_type, cl_id = np.where(unknown, UNKNOWN, cell_type), np.where(unknown, "", cl_id)
    margin = score - ranked[:, -2] if len(names) > 1 else score
    entropy = normalized_entropy(probabilities)
    return {"cell_type": cell_type, "cl_id": cl_id, "score": score, "margin": margin, "entropy": entropy}


def majority_vote(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The commonest label of each cell's cluster; ties go to the label that sorts first.

    >>> majority_vote(np.array(["B", "B", "T", "T"]), np.array(["0", "0", "0", "1"]))
    array(['B', 'B', 'B', 'T'], dtype='<U1')
    """
    voted = np.empty_like(labels)
    for cluster in np.unique(clusters):
        members = clusters == cluster
        names, counts = np.unique(labels[members], return_counts=True)
        voted[members] = names[counts.argmax()]
    return voted


def is_collapsed(found_cells: np.ndarray, n_labels: int) -> bool:
    """Whether nearly all of many cells got one label, of several; `found_cells` has the number of cells of each."""
    n_cells = found_cells.sum()
    return bool(n_labels > 1 and n_cells >= COLLAPSE_MIN_CELLS and found_cells.max() / n_cells >= COLLAPSE_SHARE)


def fit_mixture(
    similarity: np.ndarray, match: np.ndarray | None, target: np.ndarray, temperature: float
) -> dict[str, float]:
    """The temperature and the matching weight with the least negative log-likelihood of the true labels, on a grid.

    Args:
        similarity, match: As for [`label_probabilities`].
        target: Int `(n_cells,)`: number of each cell's true label.
        temperature: Middle of the grid, which reaches from an eighth of it to eight times of it.

    Returns:
        `temperature`, `matching_weight`, and the `nll` and `accuracy` that they give.
    """
    best: dict[str, float] = {}
    for candidate in temperature * 2.0 ** np.arange(-3, 3.5, 0.5):
        for weight in np.linspace(0, 1, 11):
            probabilities = label_probabilities(similarity, match, logit_scale=1 / candidate, matching_weight=weight)
            nll = -np.log(np.maximum(probabilities[np.arange(len(target)), target], 1e-9)).mean()
            if not best or nll < best["nll"] - 1e-9:
                best = {
                    "nll": float(nll),
                    "accuracy": float((probabilities.argmax(axis=1) == target).mean()),
                    "temperature": float(candidate),
                    "matching_weight": round(float(weight), 3),
                }
    return best


__all__ = [
    "choose_labels",
    "fit_mixture",
    "is_collapsed",
    "label_probabilities",
    "labels_with_texts",
    "majority_vote",
    "normalized_entropy",
]
