"""From the scores of labels to an annotation: pure functions of arrays, independent of any model.

1. `candidate_columns`: labels in any words -> the texts to score, those of trained labels included.
2. `label_probabilities`: similarity and matching of each cell with each text -> probabilities of the texts.
3. `choose_labels`: the most probable label of each cell, and its certainty.
4. `summarize_annotation`: numbers of the whole, and warnings of an unlikely one.

`fit_mixture` fits temperature and matching weight, and `fit_label_sets` the thresholds of sets of labels, to cells of
known labels. A checkpoint keeps them, and the terms of its labels, in `config.annotation`.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


UNKNOWN = "Unknown"  # the label of a cell that gets none

# An annotation of at least this many cells is reported as collapsed if one label has at least this share of them.
COLLAPSE_MIN_CELLS, COLLAPSE_SHARE = 50, 0.98
SET_STEPS = 100  # of error rates, for which a checkpoint stores thresholds
MOST_LABELS = 0.9  # of a term that is an answer: "eukaryotic cell" excludes next to none
NOVEL_SHARE = 0.2  # an annotation with at least this share of novel cells gets a warning
DOUBTFUL_SHARE = 0.5  # an annotation with at least this share of low scores, where not all labels are candidates


# -- labels in other words --------------------------------------------------------------------------------------------


def normalize_label(label: str) -> str:
    """Reduce a label to lower-case words, so that spelling variants compare equal.

    >>> normalize_label("CD4+ T-cell, (naïve)") == normalize_label("CD4-positive T cell naïve")
    True
    """
    label = re.sub(r"(?<=\w)\+", " positive ", label.casefold())
    return " ".join(re.findall(r"[^\W_]+", label))


def labels_with_texts(labels: dict[str, str] | Sequence[str] | None, stored: dict[str, str]) -> dict[str, str]:
    """Label -> text that describes it: the given text, else the stored one, else the label itself.

    Given labels that differ in case alone are one, in the stored spelling or else the first.
    """
    if isinstance(labels, str):
        raise TypeError(f"labels is the one string {labels!r}; pass a list of labels, or a dict label -> text.")
    if labels is None and stored:
        return dict(stored)
    labels = {} if labels is None else labels
    if not isinstance(labels, dict):
        labels = {label: stored.get(label, label) for label in labels}
    labels = {str(label): str(text) for label, text in labels.items()}
    if not labels:
        raise ValueError("There are no labels to choose from; pass a list of labels, or a dict label -> text.")
    empty = [label for label, text in labels.items() if not text.strip()]
    if empty:
        raise ValueError(f"The text of {len(empty)} labels is empty: {empty[:5]}. Describe each, or leave it out.")
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(label.casefold(), []).append(label)
    merged = {}
    for same in spellings.values():
        name = next((label for label in same if label in stored), same[0])
        if len({labels[label] for label in same if labels[label] != label}) > 1:
            raise ValueError(f"{same} differ in case alone and have texts that differ; leave out all but one.")
        merged[name] = next((labels[label] for label in [name, *same] if labels[label] != label), name)
    return merged


def labels_of_tissue(tissue: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text of the stored labels that the training cells of a tissue had.

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
        known = ", ".join(str(term["name"]) for term in tissues)
        raise ValueError(f"The checkpoint saw no cells of the tissue {tissue!r}; it knows {known}.")
    return {label: text for label, text in stored["labels"].items() if label in found["labels"]}


def ids_of_labels(names: Sequence[str], given: dict[str, str], terms: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Label -> Cell Ontology id: the given one, else that of the stored term that the label means."""
    found = {name: term_of(name, terms) for name in names}
    return {name: term["id"] for name, term in found.items() if term is not None} | given


def trained_labels_of(
    label: str, cl_id: str | None, trained: Sequence[str], terms: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Trained labels that a label stands for: the label that it spells otherwise, or all its subtypes.

    The label's id decides, then its words: name, synonym, spelling, plural and case do not matter.

    `cl_id` is the Cell Ontology id of a label, if known; `terms` are those of the trained labels and all ancestors:
    `id`, `names` (normalised) and `labels` (trained ones, at or below it).

    >>> terms = [{"id": "CL:0000084", "names": ["t cell", "t lymphocyte"], "labels": ["CD4 T", "CD8 T"]}]
    >>> trained_labels_of("T-lymphocytes", None, ["CD4 T", "CD8 T", "B"], terms)
    ['CD4 T', 'CD8 T']
    """
    if label in trained:
        return [label]
    spellings = _spellings(label)
    same = [name for name in trained if spellings & _spellings(name)]
    if same:
        return same
    term = term_of(label, terms, cl_id)
    return [] if term is None else list(term["labels"])


def term_of(label: str, terms: Sequence[Mapping[str, Any]], cl_id: str | None = None) -> Mapping[str, Any] | None:
    """The term of an id, or that a label names, in any spelling; None if there is none."""
    wanted = cl_id or label.strip().upper()
    by_id = (term for term in terms if term["id"] == wanted)
    by_name = (term for term in terms if _spellings(label) & set(term["names"]))
    return next(by_id, None) or next(by_name, None)


def names_known_type(text: str, trained: Sequence[str], terms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a sentence names a trained label, or a term above one that is not above all.

    >>> names_known_type("Two NK cells from blood.", ["natural killer cell"], [])
    False
    >>> names_known_type("Natural killer cells from blood.", ["natural killer cell"], [])
    True
    """
    words = " ".join(word.removesuffix("s") for word in normalize_label(text).split())
    names = [normalize_label(label) for label in trained]
    names += [name for term in terms if len(term["labels"]) < len(trained) for name in term["names"]]
    singular = (" ".join(word.removesuffix("s") for word in name.split()) for name in names)
    return any(f" {name} " in f" {words} " for name in singular)


def _spellings(label: str) -> set[str]:
    """A label's words, and the same in the singular."""
    words = normalize_label(label)
    return {words, words.removesuffix("s")}


def broader_labels(label: str, trained: Collection[str], terms: Sequence[Mapping[str, Any]]) -> list[str]:
    """The trained labels of the narrowest term that a label's words end with: "monocyte" of "classical monocyte"."""
    spellings = tuple(f" {words}" for words in _spellings(label))
    named = [({normalize_label(name)}, [name]) for name in trained] + [(t["names"], t["labels"]) for t in terms]
    found = [v for names, v in named if any(s.endswith(f" {n}") for n in names if len(n) > 3 for s in spellings)]
    found = [labels for labels in found if len(labels) < len(trained) and "non" not in spellings[0].split()]
    return min(found, key=len, default=[])


@dataclass
class Candidates:
    """The texts that each cell is compared with, and the label that each text stands for."""

    names: list[str]  # the labels to choose from
    texts: list[str]  # (n_texts,) what is scored; every trained text is among them
    owners: np.ndarray  # int64 (n_texts,): position in `names`, or -1 for a trained label that is not a candidate
    unseen: np.ndarray  # bool (n_texts,): the label means no trained one
    meant: dict[str, list[str]]  # label -> the trained labels that it means

    def pool(self, probabilities: np.ndarray) -> np.ndarray:
        """`(n_cells, n_texts)` probabilities -> those of the labels, `(n_cells, n_names)`, which sum to 1 or less."""
        pooled = np.zeros((len(probabilities), len(self.names)), dtype=probabilities.dtype)
        for text, owner in enumerate(self.owners):
            if owner >= 0:
                pooled[:, owner] += probabilities[:, text]
        return pooled


def candidate_columns(
    labels: Mapping[str, str],
    trained: Mapping[str, str],
    cl_ids: Mapping[str, str],
    terms: Sequence[Mapping[str, Any]],
) -> Candidates:
    """The texts to score for some labels: theirs, and those of all trained labels.

    A label that means trained ones gets their texts' probability. Where two labels mean one trained label, it belongs
    to the narrower. A trained label that no candidate means competes too, so that a cell may be none of the labels,
    unless it is broader than an untrained label ("T cell" beside "gamma-delta T cell").

    Args:
        labels: Label -> text; the text of a label alone is the label itself, or that of training.
        trained: Label -> text of the trained labels.
        cl_ids: Label -> Cell Ontology id, where known.
        terms: As for [`trained_labels_of`].
    """
    names = list(labels)
    meant = {name: trained_labels_of(name, cl_ids.get(name), list(trained), terms) for name in names}
    widths = {label: [len(meant[name]) if label in meant[name] else math.inf for name in names] for label in trained}
    broader = {label for name in names if not meant[name] for label in broader_labels(name, trained, terms)}
    owner_of: dict[str, tuple[int, bool]] = {}
    for label, text in trained.items():
        width = min(widths[label])
        if not math.isinf(width):
            owner_of.setdefault(text, (widths[label].index(width), False))
        elif label not in broader:
            owner_of.setdefault(text, (-1, False))
    for number, (name, text) in enumerate(labels.items()):
        # The words of a label that means a trained one add nothing; a description of it, given by the user, may.
        if text not in owner_of and not (meant[name] and text == name):
            owner_of[text] = number, not meant[name]
    owners, unseen = zip(*owner_of.values(), strict=True)
    return Candidates(names, list(owner_of), np.asarray(owners), np.asarray(unseen), meant)


# -- scores -----------------------------------------------------------------------------------------------------------


def label_probabilities(
    similarity: np.ndarray,
    match: np.ndarray | None = None,
    *,
    logit_scale: float,
    matching_weight: float = 0.0,
    doubt: float = 0.0,
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
    return ((1 - doubt) * probabilities + doubt / probabilities.shape[1]).astype(np.float32)


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


def members_of_terms(terms: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[int]]:
    """Positions of each term's labels in `names`; none for a term that is no answer, of one label or of nearly all."""
    found = [[place for place, name in enumerate(names) if name in term["labels"]] for term in terms]
    return [members if 1 < len(members) <= MOST_LABELS * len(names) else [] for members in found]


def summarize_annotation(
    columns: Mapping[str, np.ndarray], candidates: Candidates, known: Sequence[str], min_score: float | None
) -> tuple[dict[str, Any], list[str]]:
    """Summary of an annotation, and warnings about an unlikely one.

    `columns` is the result of [`choose_labels`], `known` the labels of the checkpoint, and `min_score` that of
    [`choose_labels`], None for one of 0 that was fitted.

    Returns:
        `found`, `found_cells`, `mean_entropy`, `collapsed`, with novelty `novel_cells`; and the warnings.
    """
    found, found_cells = np.unique(columns["cell_type"], return_counts=True)
    n_cells, n_novel = len(columns["cell_type"]), int((columns.get("novelty", np.empty(0)) > 1).sum())
    share = found_cells.max() / n_cells
    several = len(candidates.names) > 1
    collapsed = several and n_cells >= COLLAPSE_MIN_CELLS and bool(share >= COLLAPSE_SHARE)
    warnings = []
    if len(candidates.texts) == 1:
        warnings.append(
            f"There is one label, {candidates.names[0]!r}, and no other that the checkpoint knows: every cell gets "
            "it, with score 1. Give two labels or more."
        )
    if n_novel >= NOVEL_SHARE * n_cells:
        given = "they are labelled all the same" if min_score == 0 else f"they are {UNKNOWN}"
        warnings.append(
            f"{n_novel} of {n_cells} cells are like nothing that this checkpoint knows ({len(known)} cell types, "
            f"such as {', '.join(map(repr, known[:3]))}): {given}. They are more like other cells, or express "
            "other genes; use a checkpoint of this tissue, or `finetune` with labelled cells of it."
        )
    elif not min_score and (candidates.owners < 0).any() and (low := int((columns["score"] < 0.5).sum())):
        if low >= DOUBTFUL_SHARE * n_cells:
            warnings.append(
                f"{low} of {n_cells} cells have a score below 0.5: known labels that are no candidates fit them "
                "better, or several candidates fit alike. Pass `min_score=`, or more `labels=`."
            )
    elif collapsed:
        warnings.append(
            f"{share:.0%} of {n_cells} cells were labelled {str(found[found_cells.argmax()])!r}, of "
            f"{len(candidates.names)} labels. If you don't expect that, look at uns['scmmgpt']['input']: the "
            "matrix or the genes may be the wrong ones, or the texts of the labels too alike."
        )
    numbers = {
        "found": np.asarray(found, dtype=object),
        "found_cells": found_cells,
        "mean_entropy": float(columns["entropy"].mean()),
        "collapsed": collapsed,
    }
    return numbers | ({"novel_cells": n_novel} if "novelty" in columns else {}), warnings


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
