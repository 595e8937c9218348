"""What a file without some genes keeps of the difference between two labels of a readout, and which genes decide.

Arguments named `a` are [`ScMMGPTLabelReadout.arrays`], `here` says which of its genes a file measures.
"""

import numpy as np


LITTLE_EVIDENCE = 0.5  # of the score that separates two labels; a file that keeps less gets a warning
N_EXAMPLES = 3  # absent genes that a warning names


def compare_labels(
    a: dict[str, np.ndarray], here: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, dict[tuple[int, int], list[int]]]:
    """What is left of the scores that separate labels, and which absent genes decide; see [`PanelReadout`]."""

    def differences(scores: np.ndarray) -> np.ndarray:
        """From the scores `(labels, labels)` of mean cells: own minus other score, of two cells of a pair together."""
        own = np.diag(scores)
        return own[:, None] + own[None] - scores - scores.T

    centroids = a["centroids"]
    if "groups" in a:  # in the space of their weights
        of_labels = a["group_labels"][:, : len(a["bias"])].T * a["group_weights"]
        centroids = of_labels @ a["groups"] / of_labels.sum(axis=1, keepdims=True).clip(min=1e-12)
    whole = differences(centroids @ a["weights"].T)
    left = differences(centroids[:, here] @ weights.T)
    evidence = np.divide(left, whole, out=np.ones_like(whole), where=whole > 1e-9)
    np.fill_diagonal(evidence, np.nan)
    decisive = {}
    absent = np.flatnonzero(~here)
    for i, j in zip(*np.nonzero(np.triu(evidence < LITTLE_EVIDENCE)), strict=True):
        part = (a["weights"][i, absent] - a["weights"][j, absent]) * (centroids[i, absent] - centroids[j, absent])
        decisive[int(i), int(j)] = a["gene_ids"][absent[np.argsort(-part)[:N_EXAMPLES]]].tolist()
    return evidence, decisive
