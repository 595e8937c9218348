"""How well a file that lacks some genes separates each pair of labels, and which absent genes matter most."""

import numpy as np


LITTLE_EVIDENCE = 0.5  # share of the separation of two labels; a file that keeps less gets a warning
N_EXAMPLES = 3  # absent genes that a warning names


def compare_labels(
    a: dict[str, np.ndarray], here: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, dict[tuple[int, int], list[int]]]:
    """The share of the separation of labels that a file keeps, and the decisive absent genes.

    The separation of two labels is the lead of the right label over the other in the mean cells of both, summed.

    Args:
        a: The result of [`ScMMGPTLabelReadout.arrays`].
        here: bool `(num_genes,)`: which genes the file measures.
        weights: `(n_labels, n_here)`: weights of the readout for these genes.

    Returns:
        `evidence` and `decisive` of [`PanelReadout`].
    """

    def differences(scores: np.ndarray) -> np.ndarray:
        """Separations `(n_labels, n_labels)`, from scores of mean cells `(n_labels, n_labels)`."""
        own = np.diag(scores)
        return own[:, None] + own[None] - scores - scores.T

    centroids = a["centroids"]
    if "groups" in a:  # the weights are for log1p(CP10k), as the groups are
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
