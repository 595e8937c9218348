"""Regressions that a label readout is solved by for the genes of a file, from the statistics that it stores.

Arguments named `a` are [`ScMMGPTLabelReadout.arrays`], `here` says which of its genes a file measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


LOG_STEPS = 28.0  # of log1p(CP10k) in a byte of a profile, which then reaches 9.1
LEAST_TOTAL = 0.5  # probability of the candidates together: a cell with less is more probably of no candidate


@dataclass(frozen=True)
class AmongLabels:
    """A regression of some labels of a [`PanelReadout`], as if there were no others.

    Args:
        columns: int64 `(n_some,)`: positions of the labels in the panel.
        weights: float32 `(n_genes, n_some)`, for profiles, and `bias` float32 `(n_some,)`.
    """

    columns: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def share_out(
        self, found: np.ndarray, profiles: tuple[np.ndarray, np.ndarray, np.ndarray], panel: Any
    ) -> np.ndarray:
        """Log probabilities where a cell of no candidate divides what the candidates have as this regression says.

        The regression of all labels tells such a cell from every candidate, and which is next is chance. The
        probability of the candidates together stays.

        Args:
            found: Log probabilities of the labels of the panel, float32 `(n_cells, n_labels)`.
            profiles: Of the same cells, ragged.
            panel: The [`PanelReadout`], for its temperature and `file_shares`.
        """
        total = np.logaddexp.reduce(found[:, self.columns], axis=1, keepdims=True)
        rows = np.flatnonzero(total < np.log(LEAST_TOTAL))
        if len(rows):
            scores = sum_weights(*profiles, self.weights) + self.bias
            if panel.file_shares is not None:
                shares = np.ascontiguousarray(panel.file_shares[:, self.columns])
                scores = scores + sum_weights(*root_shares(*profiles), shares)
            logits = torch.from_numpy(scores[rows] / np.float32(panel.temperature))
            found[np.ix_(rows, self.columns)] = total[rows] + logits.log_softmax(dim=1).numpy()
        return found


def with_profiles(a: dict[str, np.ndarray], chosen: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays with the profiles of some types as groups of further labels, which follow the others.

    Kinds of other cells that these types are part of are left out: hepatocytes are the liver's other cells. `weights`
    and `bias` have zeros for the new labels.
    """
    chosen, n_labels, n_others = list(chosen), len(a["bias"]), a["group_labels"].shape[1] - len(a["bias"])
    kinds = n_labels + np.setdiff1d(np.arange(n_others), a["profile_others"][chosen])
    rows = np.tile(a["group_mean"], (len(chosen), 1))
    rows[:, a["profile_places"].astype(int)] = a["profiles"][chosen] / LOG_STEPS
    old = a["group_labels"][:, [*range(n_labels), *kinds]]
    kept = old.any(axis=1)
    mentions = np.insert(old[kept], [n_labels] * len(chosen), 0, axis=1) * a["group_weights"][kept, None]
    new = np.eye(len(chosen), mentions.shape[1], n_labels)
    mentions = np.concatenate([mentions, new])
    mentions /= mentions.sum(axis=0) * mentions.shape[1]  # every label and kind has the same weight
    weights = mentions.sum(axis=1)
    return {
        **a,
        "groups": np.concatenate([a["groups"][kept], rows]),
        "group_labels": mentions / weights[:, None],
        "group_weights": weights,
        "weights": np.pad(a["weights"], ((0, len(chosen)), (0, 0))),
        "bias": np.pad(a["bias"], (0, len(chosen))),
    }


def with_groups(
    a: dict[str, np.ndarray], rows: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays with one more group for some labels.

    Args:
        a: Of labels and kinds of other cells of equal weight.
        rows: Log1p(CP10k), `(n_new, num_genes)`.
        labels: The label of each.
        weights: `(n_new,)`, of all groups of the label together before; each label then has its weight again.
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
    """The arrays without the groups of labels that are not `kept`, positions `(n_kept,)`; other cells stay.

    `bias` and `weights` are those of before.
    """
    columns = [*kept, *range(len(a["bias"]), a["group_labels"].shape[1])]
    mentions = (a["group_labels"] * a["group_weights"][:, None])[:, columns]
    here = mentions.any(axis=1)
    mentions = mentions[here] / mentions.sum(axis=0) / len(columns)  # every label and kind has the same weight
    of_groups, groups = mentions.sum(axis=1), a["groups"][here]
    return {
        **a,
        "groups": groups,
        "group_mean": of_groups @ groups,
        "group_labels": mentions / of_groups[:, None],
        "group_weights": of_groups,
    }


def scale_groups(a: dict[str, np.ndarray], here: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays with each group on the scale that its cells have in a file of the genes that are `here`.

    A cell's counts are of the genes at hand, so that what these genes take of its type's expression is lost: a cell of
    a type that expresses many of a panel's genes has lower values in each. The mean over the labels stays.
    """
    linear = np.expm1(a["groups"]).clip(min=0)  # means freed of the datasets' levels may lie below: no expression
    shares = linear[:, here].sum(axis=1) / linear.sum(axis=1).clip(min=1e-12)
    of_labels = a["group_labels"][:, : len(a["bias"])].T * a["group_weights"]
    usual = (of_labels @ shares / of_labels.sum(axis=1).clip(min=1e-12)).mean()
    groups = np.log1p(linear * (usual / shares.clip(min=0.01 * usual))[:, None])
    mean = a["group_mean"] + a["group_weights"] @ (groups - a["groups"])
    return {**a, "groups": groups, "group_mean": mean}


def solve_groups(a: dict[str, np.ndarray], here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of the labels on the groups, for the genes that are `here`.

    With X the groups around their mean and Y their labels, both weighted, F the factors and D the noise, the weights
    are Y^T X (X^T X + F^T F + D)^-1, by Woodbury's identity on groups and factors.

    Args:
        a: The arrays of [`ScMMGPTLabelReadout`].
        here: bool `(num_genes,)`.

    Returns:
        Weights `(num_labels + num_others, n_here)` and bias, those of other cells last.
    """
    mean, noise = a["group_mean"][here], a["noise"][here]
    roots = np.sqrt(a["group_weights"])[:, None]
    shares = a["group_weights"] @ a["group_labels"]  # of the labels
    x, y = roots * (a["groups"][:, here] - mean), roots * (a["group_labels"] - shares)
    parts = np.concatenate([x, a["factors"][:, here]])
    scaled, alone = parts / noise, (x.T @ y) / noise[:, None]
    inner = np.eye(len(parts)) + scaled @ parts.T
    weights = (alone - scaled.T @ np.linalg.solve(inner, parts @ alone)).T
    return weights, shares - weights @ mean


def solve_embedding(a: dict[str, np.ndarray], here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A place of cells among the groups, for the genes that are `here`.

    A profile is taken for `mean + X^T z + F^T u + noise`, with X the groups around their mean, weighted, F the factors
    of the variance within a group, and z, u ~ N(0, I). The expectation of z given the genes at hand is a ridge
    regression; what the factors explain of the cell does not move it. The distance of two cells in z would count each
    direction alike, also those in which groups hardly differ; that of X^T z, the expected profiles, would count what
    sets apart few types of many genes alone. `(X X^T)^(1/4) z`, over all genes, is half way (`train/LOG.md`).

    Args:
        a: The arrays of [`ScMMGPTLabelReadout`].
        here: bool `(num_genes,)`.

    Returns:
        Weights `(num_groups, n_here)` and bias.
    """
    roots = np.sqrt(a["group_weights"])[:, None]
    scaled = a if here.all() else scale_groups(a, here)
    mean = scaled["group_mean"][here]
    x, whole = roots * (scaled["groups"][:, here] - mean), roots * (a["groups"] - a["group_mean"])
    parts = np.concatenate([x, a["factors"][:, here]])
    by_noise = parts / a["noise"][here]
    expected = np.linalg.solve(np.eye(len(parts)) + by_noise @ parts.T, by_noise)[: len(x)]
    values, axes = np.linalg.eigh(whole @ whole.T)
    weights = (axes * values.clip(min=0) ** 0.25) @ (axes.T @ expected)  # symmetric: no sign of an axis matters
    return weights, -weights @ mean


def condition(a: dict[str, np.ndarray], here: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The expectation of the scores given the genes that are `here`, and what it leaves open.

    With F the factors, D the noise, w the weights, and P and M the present and the absent genes: the factors of a
    cell are expected at S F_P D_P^-1 (x_P - m_P), where S = (I + F_P D_P^-1 F_P^T)^-1, and each absent gene at its
    mean plus its loadings on them.

    Args:
        a: The arrays of [`ScMMGPTLabelReadout`].
        here: bool `(num_genes,)`.

    Returns:
        Weights `(num_labels, n_here)`, bias `(num_labels,)`, covariance of the scores `(num_labels, num_labels)`.
    """
    w_here, w_absent = a["weights"][:, here], a["weights"][:, ~here]
    if here.all():
        return w_here, a["bias"], np.zeros((len(a["bias"]),) * 2)
    f_here, f_absent = a["factors"][:, here], a["factors"][:, ~here]
    scaled = f_here / a["noise"][here]
    posterior = np.linalg.inv(np.eye(len(f_here)) + scaled @ f_here.T)  # covariance of a cell's factors
    loadings = f_absent @ w_absent.T  # (num_factors, num_labels): of the absent part of the scores
    moved = (posterior @ loadings).T @ scaled
    bias = a["bias"] + w_absent @ a["mean"][~here] - moved @ a["mean"][here]
    covariance = loadings.T @ posterior @ loadings + (w_absent * a["noise"][~here]) @ w_absent.T
    return w_here + moved, bias, covariance


def others_of(
    a: dict[str, np.ndarray], here: np.ndarray, weights: np.ndarray, bias: np.ndarray, is_panel: bool
) -> dict[str, np.ndarray]:
    """`others`, `others_bias` and `typical` of a `PanelReadout`, from the result of [`solve_groups`]."""
    n_labels = len(a["bias"])
    first = 0 if is_panel else n_labels
    shares = a["group_labels"][:, :n_labels].T * a["group_weights"] * (a["group_labels"].max(axis=1) > 0.5)
    shares /= shares.sum(axis=1, keepdims=True).clip(min=1e-12)
    scores = shares @ (a["groups"][:, here] @ weights.T + bias)  # of the labels' mean cells
    return {
        "others": np.ascontiguousarray(weights[first:].T, dtype=np.float32),
        "others_bias": bias[first:].astype(np.float32),
        "typical": scores,
    }


def root_shares(
    indptr: np.ndarray, positions: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Square roots of a cell's counts, of sum 1, ragged as its profile of log1p(CP10k)."""
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
