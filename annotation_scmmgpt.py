"""From the scores of labels to an annotation: pure functions of arrays, independent of any model.

1. `label_probabilities`: similarity and matching of each cell with each text -> probabilities of the labels.
2. `choose_labels`: the most probable label of each cell, its certainty, and the majority vote of clusters.

`fit_mixture` fits temperature and matching weight to cells of known labels.
"""

import math
from collections.abc import Sequence

import numpy as np


def label_probabilities(
    similarity: np.ndarray, match: np.ndarray | None = None, *, logit_scale: float, matching_weight: float = 0.0
) -> np.ndarray:
    """Probability of each label for each cell: a softmax over similarities, mixed with matching.

    The candidates of a cell are the labels that were matched with it. Matching redistributes the candidates' share of
    the softmax among the candidates; the probabilities of the other labels stay.

    Args:
        similarity: `(n_cells, n_labels)` cosine similarities.
        match: `(n_cells, n_labels)` probabilities that the label's text describes the cell; NaN for labels that are
            no candidates.
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
        # Without a match among the candidates, similarity decides alone.
        matched = candidates & (total > 0)
        redistributed = np.where(matched, share * match / np.where(total > 0, total, 1), probabilities)
        probabilities = (1 - matching_weight) * probabilities + matching_weight * redistributed
    return probabilities.astype(np.float32)


def normalized_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of each row over the entropy of a uniform row, float32 `(n_cells,)`: 0 = certain, 1 = uniform.

    >>> normalized_entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))
    array([0., 1.], dtype=float32)
    """
    if probabilities.shape[1] < 2:
        return np.zeros(len(probabilities), dtype=np.float32)
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros(probabilities.shape))
    return np.abs(-(probabilities * logs).sum(axis=1) / math.log(probabilities.shape[1])).astype(np.float32)


def choose_labels(
    probabilities: np.ndarray,
    names: Sequence[str],
    cl_ids: dict[str, str],
    min_score: float | None = None,
    clusters: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Choose the most probable label of each cell, and measure its certainty.

    Args:
        probabilities: `(n_cells, n_labels)`, as [`label_probabilities`] gives them.
        names: The labels.
        cl_ids: Label -> Cell Ontology id, of the labels that have one.
        min_score: Cells whose best label is less probable are labelled `"Unknown"`.
        clusters: `(n_cells,)` of str: cluster of each cell.

    Returns:
        Arrays of shape `(n_cells,)`: `cell_type` and `cl_id` (str), `score` (probability of the best label), `margin`
        (over the runner-up) and `entropy` ([`normalized_entropy`]), float32; with `clusters`, `cell_type_majority`.
    """
    best = probabilities.argmax(axis=1)
    ranked = np.sort(probabilities, axis=1)
    score = ranked[:, -1]
    cell_type = np.asarray(names, dtype=object)[best].astype(str)
    cl_id = np.asarray([cl_ids.get(name, "") for name in names], dtype=object)[best].astype(str)
    if min_score is not None:
        unknown = score < min_score
        cell_type, cl_id = np.where(unknown, "Unknown", cell_type), np.where(unknown, "", cl_id)
    margin = score - ranked[:, -2] if len(names) > 1 else score
    entropy = normalized_entropy(probabilities)
    columns = {"cell_type": cell_type, "cl_id": cl_id, "score": score, "margin": margin, "entropy": entropy}
    return columns if clusters is None else {**columns, "cell_type_majority": majority_vote(cell_type, clusters)}


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


def fit_mixture(
    similarity: np.ndarray, match: np.ndarray | None, target: np.ndarray, temperature: float
) -> dict[str, float]:
    """The temperature and the matching weight with the least negative log-likelihood of the true labels, on a grid.

    Args:
        similarity, match: As for [`label_probabilities`].
        target: Int `(n_cells,)`: index of each cell's true label.
        temperature: Middle of the grid, whose ends are an eighth of it and eight times of it.

    Returns:
        `temperature` and `matching_weight`, with their `nll` and `accuracy`.
    """
    best: dict[str, float] = {}
    for candidate in temperature * 2.0 ** np.arange(-3, 3.5, 0.5):
        for weight in np.linspace(0, 1, 11):
            probabilities = label_probabilities(similarity, match, logit_scale=1 / candidate, matching_weight=weight)
            nll = -np.log(np.maximum(probabilities[np.arange(len(target)), target], 1e-9)).mean()
            if not best or nll < best["nll"] - 1e-9:
                accuracy = float((probabilities.argmax(axis=1) == target).mean())
                fitted = {"temperature": float(candidate), "matching_weight": round(float(weight), 3)}
                best = {"nll": float(nll), "accuracy": accuracy, **fitted}
    return best
