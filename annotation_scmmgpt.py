"""From the scores of labels to an annotation: pure functions of arrays, independent of any model.

`annotate_scores` takes the steps for the cells of a file, or of a part of one:

1. `label_probabilities`: similarity and matching of each cell with each text -> probabilities of the texts.
2. `choose_labels`: the most probable label of each cell or a broader term, and its certainty.
3. `name_by_profile`: the types of cells that are like a reference profile and no trained label.
4. `label_sets`: the labels that a cell may have, at an error rate.

`fit_mixture` fits temperature and matching weight, and `fit_label_sets` the thresholds of sets of labels, to cells of
known labels. A checkpoint keeps them, and the terms of its labels, in `config.annotation`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .labels_scmmgpt import UNKNOWN, members_of_terms


SET_STEPS = 100  # of error rates, for which a checkpoint stores thresholds


def annotate_scores(
    similarity: np.ndarray,
    match: np.ndarray | None,
    novelty: np.ndarray | None,
    is_empty: np.ndarray,
    labelling: Any,
    stored: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of `obs`, and probabilities of the labels `(n_cells, n_labels)`.

    Args:
        similarity, match: As for [`label_probabilities`], for the texts of the candidates.
        novelty: float32 `(n_cells,)`, NaN where the file measures too few genes; None without a threshold. With other
            cells in the readout `(n_cells, 2)`: the second is the position of a novel cell's answer in the broader
            terms, see [`Novelty`]; with types that have a profile alone `(n_cells, 4)`, see [`ProfiledTypes.name`].
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

    probabilities = of_sets = pooled()
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
    if labelling.min_score != 0:  # nothing speaks for a label of a cell without a single gene
        for name, word in (("cell_type", UNKNOWN), ("cl_id", "")):
            columns[name] = np.where(is_empty, word, columns[name])
    if labelling.error_rate is not None:
        # Their thresholds are of cells by themselves. The label that the cell has is one more of its set.
        sets = label_sets(of_sets, names, set_threshold(stored["label_sets"], labelling.error_rate))
        is_label = np.isin(columns["cell_type"], [*names, *(known["name"] for known in stored.get("profiles", []))])
        rows = zip(is_label, columns["cell_type"], sets, strict=True)
        columns["label_set"] = np.array([with_label(name, found) if is_own else found for is_own, name, found in rows])
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

    The candidates of a cell are the labels that were matched with it. Matching redistributes the candidates' share of
    the softmax among the candidates; the probabilities of the other labels stay.

    Args:
        similarity: `(n_cells, n_labels)` cosine similarities.
        match: `(n_cells, n_labels)` probabilities that the label's text describes the cell; NaN for labels that are
            no candidates.
        logit_scale: Inverse temperature of the softmax over labels.
        matching_weight: 0 = similarity alone, 1 = matching alone decides among the candidates.
        doubt: Share of cells whose scores say nothing, so that no probability is quite 1.
        parts: Parts into which the doubt is divided, of which a label gets one, int `(n_labels,)`; by default the
            number of labels.
        prior: How common each label is, over the mean of all, float `(n_labels,)`; by default all are alike.

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
        # Without a match among the candidates, similarity decides alone.
        matched = candidates & (total > 0)
        redistributed = np.where(matched, share * match / np.where(total > 0, total, 1), probabilities)
        probabilities = (1 - matching_weight) * probabilities + matching_weight * redistributed
    parts = probabilities.shape[1] if parts is None else parts
    return ((1 - doubt) * probabilities + doubt / parts).astype(np.float32)


def normalized_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of each row over the entropy of a uniform row, float32 `(n_cells,)`: 0 = certain, 1 = uniform.

    >>> normalized_entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))
    array([0., 1.], dtype=float32)
    """
    if probabilities.shape[1] < 2:
        return np.zeros(len(probabilities), dtype=np.float32)
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros(probabilities.shape))
    return np.abs(-(probabilities * logs).sum(axis=1) / math.log(probabilities.shape[1])).astype(np.float32)


def least_scores(min_score: float, novelty: np.ndarray | None) -> float | np.ndarray:
    """The least score of an answer that a checkpoint stores, for each cell: twice as much at a novelty of 1.

    Cells of new types have low scores or express genes that no known type does, and many have a little of both.

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
    """Choose the most probable label of each cell, and measure its certainty.

    Args:
        probabilities: `(n_cells, n_labels)`, as [`label_probabilities`] gives them; what is missing to 1 is the
            probability of a known label that is not a candidate.
        names: The labels.
        cl_ids: Label -> Cell Ontology id, of the labels that have one.
        min_score: Cells whose best label is less probable get a broader term of `terms`, else `"Unknown"`. With 0
            every cell gets a label. An array has one for each cell, see [`least_scores`].
        novelty: Float `(n_cells,)`: cells above 1 are `"Unknown"`; NaN where too few genes are measured.
        broader: Position in `terms` of the answer for a cell of a novelty above 1, float `(n_cells,)`; -1 for none.
        terms: Broader terms, as for [`trained_labels_of`], the preferred ones first: a cell below `min_score` gets the
            first one above its best label whose labels together go that share of the way from chance to certainty:
            half of the labels have half of the probability of a cell that is like none.
        others_compete: Whether known labels compete that are not candidates: one more label of the entropy, with what
            is missing to 1.

    Returns:
        Arrays of shape `(n_cells,)`: `cell_type` and `cl_id` (str), `score` (probability of the label), `margin` (of
        the best candidate over the runner-up) and `entropy` ([`normalized_entropy`]), float32; with `novelty`,
        `novelty`.
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
            found = low & np.isin(best, members) & reached
            cell_type[found], cl_id[found], score[found] = term["name"], term["id"], total[found]
            low &= ~found
        cell_type[low], cl_id[low] = UNKNOWN, ""
    if novelty is not None and not (
        np.isscalar(min_score) and min_score == 0
    ):  # 0 of the user, not one that was fitted
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
    """Columns of cells whose type has a profile alone: name, id, score; and `by_profile`, whether a cell is one.

    Args:
        columns: Of [`choose_labels`].
        types: `name` and `id` of each.
        numbers: Position in `types` `(n_cells,)`, -1 for a cell of a trained label.
        score: Probability of the type `(n_cells,)`.
    """
    by_profile, places = numbers >= 0, numbers.astype(np.int64)
    found = {"score": np.where(by_profile, score, columns["score"]).astype(np.float32), "by_profile": by_profile}
    for name, key in (("cell_type", "name"), ("cl_id", "id")):
        of_types = np.array([str(known[key]) for known in types])
        found[name] = np.where(by_profile, of_types[places], columns[name])
    return found


def fit_mixture(
    similarity: np.ndarray,
    match: np.ndarray | None,
    target: np.ndarray,
    temperature: float,
    doubt: float = 0.0,
    prior_at: Callable[[float], np.ndarray | None] = lambda temperature: None,
) -> dict[str, float]:
    """The temperature and the matching weight with the least negative log-likelihood of the true labels, on a grid.

    Args:
        similarity, match, doubt: As for [`label_probabilities`].
        target: Int `(n_cells,)`: index of each cell's true label.
        temperature: Middle of the grid, whose ends are an eighth of it and eight times of it.
        prior_at: How common each label is, given the temperature, as for [`label_probabilities`].

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
    """The thresholds of [`label_sets`] from held-out cells of known labels, by split-conformal prediction.

    The probability of the true label of a new cell is below the k-th smallest of n held-out ones with a chance of
    k / (n + 1) at most, if the cell is like these (least ambiguous sets: Sadinle et al. 2019, JASA 114:223).

    `probabilities` are `(n_cells, n_labels)`, `target` the true labels, int `(n_cells,)`. Returns `n_cells`, and
    `thresholds` by error rate, in steps of 1 / `SET_STEPS` to a half.
    """
    own = np.sort(probabilities[np.arange(len(target)), target].astype(np.float64))
    smallest = np.arange(1, SET_STEPS // 2 + 1) * (len(own) + 1) // SET_STEPS
    thresholds = np.where(smallest > 0, own[np.maximum(smallest, 1) - 1], 0.0)
    return {"n_cells": len(own), "thresholds": [float(f"{value:.6g}") for value in thresholds]}


def least_error_rate(n_cells: int) -> float:
    """The least error rate for which `n_cells` held-out cells say anything: `n_cells >= 1 / rate - 1`.

    The sets of a lower one hold every label. It is a multiple of 1 / `SET_STEPS`.

    >>> least_error_rate(99), least_error_rate(98), least_error_rate(19)
    (0.01, 0.02, 0.05)
    """
    return math.ceil(SET_STEPS / (n_cells + 1)) / SET_STEPS


def advice_on_sets(n_cells: int, n_before: int = 0) -> list[str]:
    """What a user should know of sets that rest on `n_cells` held-out cells, in place of `n_before`.

    >>> advice_on_sets(1000, 500)
    []
    """
    said, least = [], least_error_rate(n_cells)
    if n_before > n_cells:
        said.append(f"Sets of labels (`error_rate=`) rest on these {n_cells} cells now, and on {n_before} before.")
    if least > 1 / SET_STEPS:
        said.append(
            f"{n_cells} cells serve error rates of {least:g} and more: at a lower one, every set holds all labels "
            f"(a rate of {1 / SET_STEPS:g} needs {SET_STEPS - 1} cells)."
        )
    return said


def set_threshold(stored: Mapping[str, Any] | None, error_rate: float) -> float:
    """The probability from which a label is in the set, for an error rate of at most `error_rate`."""
    if not stored:
        raise ValueError(
            "This checkpoint stores no held-out cells, which sets of labels need: run `finetune` with held-out cells, "
            "or `scmmgpt calibrate`."
        )
    step = int(error_rate * SET_STEPS + 1e-9)
    if not 1 <= step <= len(stored["thresholds"]):
        least, most = 1 / SET_STEPS, len(stored["thresholds"]) / SET_STEPS
        raise ValueError(f"error_rate={error_rate} is not served; choose one from {least} to {most}.")
    return stored["thresholds"][step - 1]


def label_sets(probabilities: np.ndarray, names: Sequence[str], threshold: float) -> np.ndarray:
    """The labels that a cell may have, the most probable first, joined by " | ", str `(n_cells,)`; never none.

    >>> label_sets(np.array([[0.25, 0.75], [0.125, 0.125]]), ["B", "T"], 0.25).tolist()
    ['T | B', 'B']
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    n = np.maximum((probabilities >= threshold).sum(axis=1), 1)
    return np.array([" | ".join(names[i] for i in row[:k]) for row, k in zip(order, n, strict=True)], dtype=str)


def with_label(label: str, labels: str) -> str:
    """A set of labels that has a label, in front if it was missing.

    >>> with_label("T", "B | NK"), with_label("B", "NK | B")
    ('T | B | NK', 'NK | B')
    """
    return labels if label in labels.split(" | ") else f"{label} | {labels}"
