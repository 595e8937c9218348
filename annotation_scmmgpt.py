"""From the scores of labels to an annotation: pure functions of arrays, independent of any model.

`annotate_scores` takes these steps for the cells of a file, or of a part of a file:

1. `label_probabilities`: similarity and matching of each cell with each text -> probabilities of the texts.
2. `choose_labels`: the most probable label of each cell, or a broader term, with measures of certainty.
3. `name_by_profile`: names of the cells that a profiled type explains (`profiles_scmmgpt`).
4. `label_sets`: the labels that a cell may have, at an error rate.

`fit_mixture` fits the temperature and the matching weight, and `fit_label_sets` the thresholds of label sets, to
labelled cells. `config.annotation` stores these values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .labels_scmmgpt import UNKNOWN, members_of_terms


SET_STEPS = 100  # a checkpoint stores thresholds for error rates in steps of 1 / SET_STEPS


def annotate_scores(
    similarity: np.ndarray,
    match: np.ndarray | None,
    novelty: np.ndarray | None,
    is_empty: np.ndarray,
    labelling: Any,
    stored: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of `obs`, and probabilities of the labels, float32 `(n_cells, n_labels)`.

    Args:
        similarity, match: As in [`label_probabilities`], for the texts of the candidates.
        novelty: float32 `(n_cells,)`; None if it is not computed. Two columns if broader terms name novel cells: the
            second column is the result of [`Novelty`]. Four columns if profiled types name cells, too: the last two
            are the result of [`ProfiledTypes.name`].
        is_empty: bool `(n_cells,)`: whether the cell expresses no gene.
        labelling: The decisions for the file, [`Labelling`].
        stored: `config.annotation` of the checkpoint.
    """
    candidates, scale = labelling.candidates, 1 / labelling.settings["temperature"]
    similarity = similarity + labelling.unseen_bonus * candidates.unseen
    weights = {"matching_weight": labelling.settings["matching_weight"], "doubt": stored.get("doubt", 0.0)}
    parts = candidates.doubt_parts()

    def pooled(prior: np.ndarray | None = None) -> np.ndarray:
        options = {"logit_scale": scale, "parts": parts, "prior": prior, **weights}
        return candidates.pool(label_probabilities(similarity, match, **options))

    probabilities = without_prior = pooled()
    if labelling.prior is not None:
        probabilities = pooled(labelling.prior)
    if stored.get("novelty") and novelty is None:
        novelty = np.full(len(similarity), np.nan, dtype=np.float32)
    broader, named = None, None
    if novelty is not None and novelty.ndim > 1:
        novelty, broader, *named = novelty.T
    names, others = candidates.names, bool((candidates.owners < 0).any())
    least: Any = labelling.min_score
    if labelling.fitted_score is not None:
        least = least_scores(labelling.fitted_score, novelty)
    columns = choose_labels(probabilities, names, labelling.cl_ids, least, novelty, labelling.broader, others, broader)
    if named:
        if labelling.min_score is not None:
            named[0] = np.where(named[1] < labelling.min_score, -1, named[0])
        columns |= name_by_profile(columns, stored["profiles"], *named)
    if labelling.min_score != 0:  # an empty cell has no evidence for any label
        for name, word in (("cell_type", UNKNOWN), ("cl_id", "")):
            columns[name] = np.where(is_empty, word, columns[name])
    if labelling.error_rate is not None:
        # The thresholds were fitted without a prior. The label of the cell joins the set.
        sets = label_sets(without_prior, names, set_threshold(stored["label_sets"], labelling.error_rate))
        type_names = [profiled["name"] for profiled in stored.get("profiles", [])]
        is_label = np.isin(columns["cell_type"], [*names, *type_names])
        rows = zip(is_label, columns["cell_type"], sets, strict=True)
        columns["label_set"] = np.array(
            [with_label(name, labels) if joins else labels for joins, name, labels in rows]
        )
    return columns, probabilities


# -- scores -----------------------------------------------------------------------------------------------------------


def label_probabilities(
    similarity: np.ndarray,
    match: np.ndarray | None = None,
    *,
    logit_scale: float,
    matching_weight: float = 0.0,
    doubt: float = 0.0,
    parts: int | np.ndarray | None = None,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Probability of each label for each cell: a softmax over similarities, mixed with matching.

    Matching scores some labels of each cell, the candidates. Matching redistributes the candidates' share of the
    softmax among the candidates; the probabilities of the other labels stay.

    Args:
        similarity: `(n_cells, n_labels)` cosine similarities.
        match: `(n_cells, n_labels)` probabilities that the label's text describes the cell; NaN for labels that are
            no candidates.
        logit_scale: Inverse temperature of the softmax over labels.
        matching_weight: 0 = similarity alone, 1 = matching alone decides among the candidates.
        doubt: Share of cells whose scores carry no information; bounds every probability away from 1.
        parts: int, or int `(n_labels,)`: each label gets `doubt / parts`; by default the number of labels.
        prior: `(n_labels,)`: frequency of each label, divided by the mean frequency; by default all are equal.

    Returns:
        float32 `(n_cells, n_labels)`; each row sums to 1.

    >>> label_probabilities(np.array([[0.5, 0.5, -9.0]]), np.array([[0.9, 0.3, np.nan]]), logit_scale=1.0,
    ...                     matching_weight=1.0).round(2)
    array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    logits = np.asarray(similarity, dtype=np.float64) * logit_scale
    if prior is not None:
        logits += np.log(prior)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    if match is not None and matching_weight:
        candidates = ~np.isnan(match)
        match = np.where(candidates, match, 0.0)
        share = (probabilities * candidates).sum(axis=1, keepdims=True)
        total = match.sum(axis=1, keepdims=True)
        # If all matches are 0, similarity decides alone.
        matched = candidates & (total > 0)
        redistributed = np.where(matched, share * match / np.where(total > 0, total, 1), probabilities)
        probabilities = (1 - matching_weight) * probabilities + matching_weight * redistributed
    parts = probabilities.shape[1] if parts is None else parts
    return ((1 - doubt) * probabilities + doubt / parts).astype(np.float32)


def normalized_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of each row, divided by the entropy of a uniform row, float32 `(n_cells,)`: 0 = certain, 1 = uniform.

    >>> normalized_entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))
    array([0., 1.], dtype=float32)
    """
    if probabilities.shape[1] < 2:
        return np.zeros(len(probabilities), dtype=np.float32)
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros(probabilities.shape))
    return np.abs(-(probabilities * logs).sum(axis=1) / math.log(probabilities.shape[1])).astype(np.float32)


def least_scores(min_score: float, novelty: np.ndarray | None) -> float | np.ndarray:
    """The least score for a label, for each cell: the stored value times (1 + novelty).

    Cells of new types have low scores, or express genes that no known type expresses; many cells have a little of
    both.

    >>> least_scores(0.2, np.array([0.0, 0.5, np.nan])).round(2)
    array([0.2, 0.3, 0.2])
    """
    return min_score if novelty is None else min_score * (1 + np.nan_to_num(novelty.astype(np.float64)))


def choose_labels(
    probabilities: np.ndarray,
    names: Sequence[str],
    cl_ids: dict[str, str],
    min_score: float | np.ndarray | None = None,
    novelty: np.ndarray | None = None,
    terms: Sequence[Mapping[str, Any]] = (),
    others_compete: bool = False,
    broader: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Choose the most probable label of each cell, and measure certainty.

    Args:
        probabilities: `(n_cells, n_labels)`. A row sums to 1 or less; the rest is the probability of known labels that
            are no candidates.
        names: The labels.
        cl_ids: Label -> Cell Ontology id, for the labels that have one.
        min_score: Cells with a lower score get a broader term of `terms`, else `"Unknown"`. With 0 every cell gets a
            label. An array has a value for each cell, see [`least_scores`].
        novelty: Float `(n_cells,)`: cells above 1 are `"Unknown"`; NaN if the file measures too few genes.
        terms: Broader terms, as in [`trained_labels_of`], the preferred ones first. A cell below `min_score` gets the
            first term that includes the best label and has a total probability of at least
            `chance + (1 - chance) * min_score`. `chance` is the term's share of the labels.
        others_compete: Whether known labels that are no candidates count as one more label in the entropy.
        broader: Float `(n_cells,)`: position in `terms` of the term that names a cell above 1; -1 for `"Unknown"`.

    Returns:
        Arrays of shape `(n_cells,)`: `cell_type` and `cl_id` (str), `score` (probability of the label), `margin` (of
        the best candidate over the second best), `entropy` ([`normalized_entropy`]) and `novelty`, if given.
    """
    best = probabilities.argmax(axis=1)
    ranked = np.sort(probabilities, axis=1)
    score = ranked[:, -1].copy()
    cell_type = np.asarray(names, dtype=object)[best]
    cl_id = np.asarray([cl_ids.get(name, "") for name in names], dtype=object)[best]
    if min_score is not None:
        low = score < min_score
        for term, members in zip(terms, members_of_terms(terms, names), strict=True):
            if not members:
                continue
            total, chance = probabilities[:, members].sum(axis=1), len(members) / len(names)
            reached = total >= chance + (1 - chance) * np.asarray(min_score)
            gets_term = low & np.isin(best, members) & reached
            cell_type[gets_term], cl_id[gets_term], score[gets_term] = term["name"], term["id"], total[gets_term]
            low &= ~gets_term
        cell_type[low], cl_id[low] = UNKNOWN, ""
    labels_all = np.isscalar(min_score) and min_score == 0  # a fitted 0 is an array
    if novelty is not None and not labels_all:
        cell_type[novelty > 1], cl_id[novelty > 1] = UNKNOWN, ""
        for number in np.unique(broader[broader >= 0]).astype(int) if broader is not None else ():
            term, novel = terms[number], (broader == number) & (novelty > 1)
            cell_type[novel], cl_id[novel] = term["name"], term["id"]
            score[novel] = probabilities[novel][:, np.isin(names, term["labels"])].sum(axis=1)
    cell_type, cl_id = cell_type.astype(str), cl_id.astype(str)
    margin = ranked[:, -1] - ranked[:, -2] if len(names) > 1 else ranked[:, -1]
    others = np.maximum(1 - probabilities.sum(axis=1, keepdims=True), 0)
    entropy = normalized_entropy(np.hstack([probabilities, others]) if others_compete else probabilities)
    columns = {"cell_type": cell_type, "cl_id": cl_id, "score": score, "margin": margin, "entropy": entropy}
    if novelty is not None:
        columns["novelty"] = novelty
    return columns


def name_by_profile(
    columns: Mapping[str, np.ndarray], types: Sequence[Mapping[str, Any]], numbers: np.ndarray, score: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns `cell_type`, `cl_id` and `score` after naming by profiled types, and `by_profile`, bool.

    Args:
        columns: The result of [`choose_labels`].
        types: The profiled types, each with `name` and `id`.
        numbers: `(n_cells,)`: position in `types` of the type that names the cell, -1 for none.
        score: `(n_cells,)`: probability of the type.
    """
    by_profile, places = numbers >= 0, numbers.astype(np.int64)
    named = {"score": np.where(by_profile, score, columns["score"]).astype(np.float32), "by_profile": by_profile}
    for name, key in (("cell_type", "name"), ("cl_id", "id")):
        of_types = np.array([str(profiled[key]) for profiled in types])
        named[name] = np.where(by_profile, of_types[places], columns[name])
    return named


def fit_mixture(
    similarity: np.ndarray,
    match: np.ndarray | None,
    target: np.ndarray,
    temperature: float,
    doubt: float = 0.0,
    prior_at: Callable[[float], np.ndarray | None] = lambda temperature: None,
) -> dict[str, float]:
    """Fit the temperature and the matching weight: the least negative log-likelihood of the true labels, on a grid.

    Args:
        similarity, match, doubt: As in [`label_probabilities`].
        target: Int `(n_cells,)`: index of each cell's true label.
        temperature: Middle of the grid, which reaches from an eighth of the value to eight times the value.
        prior_at: The prior of the labels at a temperature, as in [`label_probabilities`].

    Returns:
        `temperature` and `matching_weight`, with their `nll` and `accuracy`.
    """
    best: dict[str, float] = {}
    for candidate in temperature * 2.0 ** np.arange(-3, 3.5, 0.5):
        prior = prior_at(float(candidate))
        for weight in np.linspace(0, 1, 11) if match is not None else (0.0,):
            options: dict[str, Any] = {"logit_scale": 1 / candidate, "matching_weight": weight, "doubt": doubt}
            probabilities = label_probabilities(similarity, match, prior=prior, **options)
            nll = -np.log(np.maximum(probabilities[np.arange(len(target)), target], 1e-9)).mean()
            if not best or nll < best["nll"] - 1e-9:
                accuracy = float((probabilities.argmax(axis=1) == target).mean())
                fitted = {"temperature": float(candidate), "matching_weight": round(float(weight), 3)}
                best = {"nll": float(nll), "accuracy": accuracy, **fitted}
    return best


# -- sets of labels ---------------------------------------------------------------------------------------------------


def fit_label_sets(probabilities: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Fit the thresholds of [`label_sets`] on held-out labelled cells, by split-conformal prediction.

    Let p be the probability that a new cell gives to its true label. If the new cell and the n held-out cells are
    exchangeable, p is below the k-th smallest held-out value with a chance of at most k / (n + 1) (least ambiguous
    sets: Sadinle et al. 2019, JASA 114:223).

    Args:
        probabilities: `(n_cells, n_labels)`.
        target: Int `(n_cells,)`: index of each cell's true label.

    Returns:
        `n_cells`, and `thresholds` for error rates from 1 / `SET_STEPS` to 1 / 2.
    """
    own = np.sort(probabilities[np.arange(len(target)), target].astype(np.float64))
    smallest = np.arange(1, SET_STEPS // 2 + 1) * (len(own) + 1) // SET_STEPS
    thresholds = np.where(smallest > 0, own[np.maximum(smallest, 1) - 1], 0.0)
    return {"n_cells": len(own), "thresholds": [float(f"{value:.6g}") for value in thresholds]}


def least_error_rate(n_cells: int) -> float:
    """The least error rate that `n_cells` held-out cells support, `n_cells >= 1 / rate - 1`.

    At a lower rate every set holds all labels. The result is a multiple of 1 / `SET_STEPS`.

    >>> least_error_rate(99), least_error_rate(98), least_error_rate(19)
    (0.01, 0.02, 0.05)
    """
    return math.ceil(SET_STEPS / (n_cells + 1)) / SET_STEPS


def advice_on_sets(n_cells: int, n_before: int = 0) -> list[str]:
    """Warnings about label sets that are fitted on `n_cells` held-out cells, after a fit on `n_before`.

    >>> advice_on_sets(1000, 500)
    []
    """
    warnings, least = [], least_error_rate(n_cells)
    if n_before > n_cells:
        warnings.append(
            f"Label sets (`error_rate=`) now rest on {n_cells:,} cells; they rested on {n_before:,} cells."
        )
    if least > 1 / SET_STEPS:
        warnings.append(
            f"{n_cells:,} cells support error rates of {least:g} and more: at a lower rate, every label set holds all "
            f"labels (a rate of {1 / SET_STEPS:g} needs {SET_STEPS - 1} cells)."
        )
    return warnings


def set_threshold(stored: Mapping[str, Any] | None, error_rate: float) -> float:
    """The least probability of a label in a set, for an error rate of at most `error_rate`.

    Raises:
        ValueError: If the checkpoint stores no thresholds, or none for this rate.
    """
    if not stored:
        raise ValueError(
            "This checkpoint stores no thresholds of label sets: run `finetune` with held-out cells, or "
            "`scmmgpt calibrate`."
        )
    step = int(error_rate * SET_STEPS + 1e-9)
    if not 1 <= step <= len(stored["thresholds"]):
        least, most = 1 / SET_STEPS, len(stored["thresholds"]) / SET_STEPS
        raise ValueError(f"error_rate={error_rate} is not supported; choose a rate from {least} to {most}.")
    return stored["thresholds"][step - 1]


def label_sets(probabilities: np.ndarray, names: Sequence[str], threshold: float) -> np.ndarray:
    """The labels of each cell with a probability of at least `threshold`, else the most probable label.

    str `(n_cells,)`, joined by " | ", the most probable label first.

    >>> label_sets(np.array([[0.25, 0.75], [0.125, 0.125]]), ["B", "T"], 0.25).tolist()
    ['T | B', 'B']
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    n = np.maximum((probabilities >= threshold).sum(axis=1), 1)
    return np.array([" | ".join(names[i] for i in row[:k]) for row, k in zip(order, n, strict=True)], dtype=str)


def with_label(label: str, labels: str) -> str:
    """A label set that includes `label`; a missing label is added in front.

    >>> with_label("T", "B | NK"), with_label("B", "NK | B")
    ('T | B | NK', 'NK | B')
    """
    return labels if label in labels.split(" | ") else f"{label} | {labels}"
