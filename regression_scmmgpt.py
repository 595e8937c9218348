"""The regressions that solve a label readout for the genes of a file, from the stored statistics of the readout.

`a` is the result of [`ScMMGPTLabelReadout.arrays`], and `here`, bool `(num_genes,)`, says which of these genes a file
measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


LOG_STEPS = 28.0  # steps of a stored byte per unit of log1p(CP10k); the largest value, 255, is 9.1
LEAST_TOTAL = 0.5  # total probability of the candidates below which a cell more probably belongs to no candidate


@dataclass(frozen=True)
class AmongLabels:
    """A regression of the candidates alone, as if the other labels of a [`PanelReadout`] did not exist.

    Args:
        columns: int64 `(n_candidates,)`: positions of the candidates in the panel.
        weights: float32 `(n_genes, n_candidates)`, for profiles.
        bias: float32 `(n_candidates,)`.
    """

    columns: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def share_out(
        self, log_probabilities: np.ndarray, profiles: tuple[np.ndarray, np.ndarray, np.ndarray], panel: Any
    ) -> np.ndarray:
        """Divide the total probability of the candidates anew, for cells that more probably belong to no candidate.

        The regression of all labels separates such a cell from every candidate, and leaves to chance which candidate
        is second. The total probability of the candidates stays.

        Args:
            log_probabilities: float32 `(n_cells, n_labels)`, over the labels of the panel; changed in place.
            profiles: Ragged profiles of the cells.
            panel: The [`PanelReadout`], which has the temperature and `file_shares`.
        """
        total = np.logaddexp.reduce(log_probabilities[:, self.columns], axis=1, keepdims=True)
        rows = np.flatnonzero(total < np.log(LEAST_TOTAL))
        if len(rows):
            scores = sum_weights(*profiles, self.weights) + self.bias
            if panel.file_shares is not None:
                shares = np.ascontiguousarray(panel.file_shares[:, self.columns])
                scores = scores + sum_weights(*root_shares(*profiles), shares)
            logits = torch.from_numpy(scores[rows] / np.float32(panel.temperature))
            log_probabilities[np.ix_(rows, self.columns)] = total[rows] + logits.log_softmax(dim=1).numpy()
        return log_probabilities


def with_profiles(a: dict[str, np.ndarray], chosen: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays with a new label and a new group for each chosen profile.

    The new labels follow the trained ones; `weights` and `bias` have zeros for them. A kind of other cells is left out
    if a chosen profile is part of it: hepatocytes are part of the liver's other cells.

    Args:
        a: The arrays of a readout with groups and profiles.
        chosen: Numbers of the profiles.
    """
    chosen, n_labels, n_others = list(chosen), len(a["bias"]), a["group_labels"].shape[1] - len(a["bias"])
    kinds = n_labels + np.setdiff1d(np.arange(n_others), a["profile_others"][chosen])
    rows = np.tile(a["group_mean"], (len(chosen), 1))
    rows[:, a["profile_places"].astype(int)] = a["profiles"][chosen] / LOG_STEPS
    old = a["group_labels"][:, [*range(n_labels), *kinds]]
    has_label = old.any(axis=1)
    mentions = np.insert(old[has_label], [n_labels] * len(chosen), 0, axis=1) * a["group_weights"][has_label, None]
    new = np.eye(len(chosen), mentions.shape[1], n_labels)
    mentions = np.concatenate([mentions, new])
    mentions /= mentions.sum(axis=0) * mentions.shape[1]  # equal weights of all labels and kinds of other cells
    weights = mentions.sum(axis=1)
    return {
        **a,
        "groups": np.concatenate([a["groups"][has_label], rows]),
        "group_labels": mentions / weights[:, None],
        "group_weights": weights,
        "weights": np.pad(a["weights"], ((0, len(chosen)), (0, 0))),
        "bias": np.pad(a["bias"], (0, len(chosen))),
    }


def with_groups(
    a: dict[str, np.ndarray], rows: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays with one more group for some labels; the total weight of each label stays.

    Args:
        a: The arrays, in which all labels and kinds of other cells have equal weights.
        rows: `(n_new, num_genes)`, log1p(CP10k): profiles of the new groups.
        labels: `(n_new,)`: the label of each new group.
        weights: `(n_new,)`: weight of each new group, relative to all old groups of the label together.
    """
    n_columns = a["group_labels"].shape[1]
    new = np.eye(n_columns)[labels] * (weights / n_columns)[:, None]
    mentions = np.concatenate([a["group_labels"] * a["group_weights"][:, None], new])
    mentions /= mentions.sum(axis=0) * n_columns
    of_groups = mentions.sum(axis=1)
    return {
        **a,
        "groups": np.concatenate([a["groups"], rows]),
        "group_labels": mentions / of_groups[:, None],
        "group_weights": of_groups,
    }


def without_labels(a: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays with the groups of the labels `kept`, positions `(n_kept,)`, and of other cells.

    `bias` and `weights` stay as they are, for all labels.
    """
    columns = [*kept, *range(len(a["bias"]), a["group_labels"].shape[1])]
    mentions = (a["group_labels"] * a["group_weights"][:, None])[:, columns]
    has_label = mentions.any(axis=1)
    mentions = mentions[has_label] / mentions.sum(axis=0) / len(columns)  # equal weights of labels and other cells
    of_groups, groups = mentions.sum(axis=1), a["groups"][has_label]
    return {
        **a,
        "groups": groups,
        "group_mean": of_groups @ groups,
        "group_labels": mentions / of_groups[:, None],
        "group_weights": of_groups,
    }


def scale_groups(a: dict[str, np.ndarray], here: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays with the groups rescaled to the library size that cells have in a file of the genes `here`.

    CP10k in a panel divides by the counts of the panel alone. A cell of a type that expresses many genes of the panel
    therefore has lower values in each gene. The mean scale over the labels stays.
    """
    linear = np.expm1(a["groups"]).clip(min=0)  # removal of dataset effects may have left negative values
    shares = linear[:, here].sum(axis=1) / linear.sum(axis=1).clip(min=1e-12)
    of_labels = a["group_labels"][:, : len(a["bias"])].T * a["group_weights"]
    usual = (of_labels @ shares / of_labels.sum(axis=1).clip(min=1e-12)).mean()
    groups = np.log1p(linear * (usual / shares.clip(min=0.01 * usual))[:, None])
    mean = a["group_mean"] + a["group_weights"] @ (groups - a["groups"])
    return {**a, "groups": groups, "group_mean": mean}


def solve_groups(a: dict[str, np.ndarray], here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of the labels on the groups, for the genes `here`.

    The weights are Y^T X (X^T X + F^T F + D)^-1, by Woodbury's identity on groups and factors. X are the centred
    groups and Y the centred labels, both weighted, F the factors, and D the noise.

    Returns:
        Weights float64 `(num_labels + num_others, n_here)` and bias `(num_labels + num_others,)`.
    """
    mean, noise = a["group_mean"][here], a["noise"][here]
    roots = np.sqrt(a["group_weights"])[:, None]
    shares = a["group_weights"] @ a["group_labels"]  # mean of the labels over all groups
    x, y = roots * (a["groups"][:, here] - mean), roots * (a["group_labels"] - shares)
    parts = np.concatenate([x, a["factors"][:, here]])
    scaled, alone = parts / noise, (x.T @ y) / noise[:, None]
    inner = np.eye(len(parts)) + scaled @ parts.T
    weights = (alone - scaled.T @ np.linalg.solve(inner, parts @ alone)).T
    return weights, shares - weights @ mean


def solve_embedding(a: dict[str, np.ndarray], here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear map from profiles to embeddings among the groups, for the genes `here`.

    The model of a profile is `mean + X^T z + F^T u + noise`. X are the centred, weighted groups, F the factors of the
    variance within a group, and z, u ~ N(0, I). The expectation of z given the measured genes is a ridge regression,
    in which the factors absorb variation within types. Distances in z would weigh all directions equally, even those
    in which groups hardly differ. Distances in X^T z, the expected profiles, would be dominated by the few types that
    differ in many genes. The embedding `(X X^T)^(1/4) z`, with X over all genes, is a compromise (`train/LOG.md`).

    Returns:
        Weights float64 `(num_groups, n_here)` and bias `(num_groups,)`.
    """
    roots = np.sqrt(a["group_weights"])[:, None]
    scaled = a if here.all() else scale_groups(a, here)
    mean = scaled["group_mean"][here]
    x, whole = roots * (scaled["groups"][:, here] - mean), roots * (a["groups"] - a["group_mean"])
    parts = np.concatenate([x, a["factors"][:, here]])
    by_noise = parts / a["noise"][here]
    expected = np.linalg.solve(np.eye(len(parts)) + by_noise @ parts.T, by_noise)[: len(x)]
    values, axes = np.linalg.eigh(whole @ whole.T)
    weights = (axes * values.clip(min=0) ** 0.25) @ (axes.T @ expected)  # symmetric: the signs of the axes cancel
    return weights, -weights @ mean


def condition(a: dict[str, np.ndarray], here: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The conditional distribution of the scores given the genes `here`, under the factor model.

    F are the factors, D the noise, m the mean, and P and M the present and the absent genes. The expected factors of a
    cell x are S F_P D_P^-1 (x_P - m_P), where S = (I + F_P D_P^-1 F_P^T)^-1. The expectation of the absent genes is
    m_M plus their loadings on these factors.

    Returns:
        Weights float64 `(num_labels, n_here)` and bias `(num_labels,)` of the expected scores; covariance of the
        scores `(num_labels, num_labels)`.
    """
    w_here, w_absent = a["weights"][:, here], a["weights"][:, ~here]
    if here.all():
        return w_here, a["bias"], np.zeros((len(a["bias"]),) * 2)
    f_here, f_absent = a["factors"][:, here], a["factors"][:, ~here]
    scaled = f_here / a["noise"][here]
    posterior = np.linalg.inv(np.eye(len(f_here)) + scaled @ f_here.T)  # covariance of a cell's factors
    loadings = f_absent @ w_absent.T  # (num_factors, num_labels): the absent genes' part of the scores
    moved = (posterior @ loadings).T @ scaled
    bias = a["bias"] + w_absent @ a["mean"][~here] - moved @ a["mean"][here]
    covariance = loadings.T @ posterior @ loadings + (w_absent * a["noise"][~here]) @ w_absent.T
    return w_here + moved, bias, covariance


def others_of(
    a: dict[str, np.ndarray], here: np.ndarray, weights: np.ndarray, bias: np.ndarray, is_panel: bool
) -> dict[str, np.ndarray]:
    """`others`, `others_bias` and `typical` of a `PanelReadout`.

    Args:
        a: The arrays of a readout with groups.
        here: Which genes the file measures.
        weights, bias: The result of [`solve_groups`].
        is_panel: Whether `others` has the columns of the labels, too, before those of other cells.
    """
    n_labels = len(a["bias"])
    first = 0 if is_panel else n_labels
    shares = a["group_labels"][:, :n_labels].T * a["group_weights"] * (a["group_labels"].max(axis=1) > 0.5)
    shares /= shares.sum(axis=1, keepdims=True).clip(min=1e-12)
    scores = shares @ (a["groups"][:, here] @ weights.T + bias)  # scores of the labels' mean cells
    return {
        "others": np.ascontiguousarray(weights[first:].T, dtype=np.float32),
        "others_bias": bias[first:].astype(np.float32),
        "typical": scores,
    }


def root_shares(
    indptr: np.ndarray, positions: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Square roots of each cell's counts, divided by their sum, float32, ragged as the given log1p(CP10k) profiles."""
    lengths, roots = np.diff(indptr), np.sqrt(np.expm1(values))
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), weights=roots, minlength=len(lengths))
    return indptr, positions, (roots / np.repeat(sums, lengths).clip(min=1e-9)).astype(np.float32)


def sum_weights(indptr: np.ndarray, positions: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The product of ragged rows with `weights` `(n_genes, width)`, float32 `(n_cells, width)`, each row alone."""
    if not len(positions):
        return np.zeros((len(indptr) - 1, weights.shape[1]), dtype=np.float32)
    genes, starts = torch.from_numpy(positions), torch.from_numpy(indptr[:-1])
    per_entry = torch.from_numpy(values)
    bags = F.embedding_bag(genes, torch.from_numpy(weights), starts, mode="sum", per_sample_weights=per_entry)
    return bags.numpy()
