"""Labels in any words: which labels of training they mean, and the texts that are scored for them.

A checkpoint keeps its labels, and the terms above them, in `config.annotation`.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


UNKNOWN = "Unknown"  # the label of a cell that gets none
MOST_LABELS = 0.9  # of a term that is an answer: "eukaryotic cell" excludes next to none
CL_ID = re.compile(r"CL[:_]\d+", re.IGNORECASE)  # of the Cell Ontology
# Short forms that files use and the names of terms lack; a word of several meanings is left out ("HSC": of the blood,
# or of the liver; "EC", "PC"). Sources: the labels of Azimuth's references of blood (Hao et al. 2021, Cell 184:3573;
# "Mono", "Eryth") and motor cortex (Bakken et al. 2021, Nature 598:111; "Astro", "Oligo", "OPC", "Endo"); of a kidney
# (Stewart et al. 2019, Science 365:1461; "MNP"); the others are the type in one word, or a plural of CL:0000192.
ABBREVIATIONS = {
    "mono": "monocyte",
    "eryth": "erythroid lineage cell",
    "astro": "astrocyte",
    "oligo": "oligodendrocyte",
    "opc": "oligodendrocyte precursor cell",
    "endo": "endothelial cell",
    "mnp": "mononuclear phagocyte",
    "smc": "smooth muscle cell",
    "tcell": "t cell",
    "bcell": "b cell",
}


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
    if reserved := [label for label in labels if label.strip().casefold() == UNKNOWN.casefold()]:
        raise ValueError(f"{reserved[0]!r} is the answer for cells of no label; leave it out of the labels.")
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
    `id`, `names` (normalised) and `labels` (trained ones, at or below it). A term with a `text` is a type that has a
    profile alone ([`with_types`]): its label means all labels of the term.

    >>> terms = [{"id": "CL:0000084", "names": ["t cell", "t lymphocyte"], "labels": ["CD4 T", "CD8 T"]}]
    >>> trained_labels_of("T-lymphocytes", None, ["CD4 T", "CD8 T", "B"], terms)
    ['CD4 T', 'CD8 T']
    """
    term = term_of(label, terms, cl_id)
    if term is not None and "text" in term:
        return list(term["labels"])
    if label in trained:
        return [label]
    spellings = _spellings(label)
    same = [name for name in trained if spellings & _spellings(name)]
    return same or ([] if term is None else list(term["labels"]))


def term_of(label: str, terms: Sequence[Mapping[str, Any]], cl_id: str | None = None) -> Mapping[str, Any] | None:
    """The term of an id, or that a label names, in any spelling; None if there is none."""
    wanted = (cl_id or label).strip().upper().replace("CL_", "CL:")
    by_id = (term for term in terms if term["id"] == wanted)
    by_name = (term for term in terms if _spellings(label) & set(term["names"]))
    return next(by_id, None) or next(by_name, None)


def with_types(terms: Sequence[Mapping[str, Any]], types: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Terms with those of types that have a profile alone, which mean the trained labels below them as well.

    >>> known = {"id": "CL:0000165", "names": ["neuroendocrine cell"]}
    >>> terms = [{**known, "labels": ["D cell"]}]
    >>> with_types(terms, [{**known, "labels": ["neuroendocrine cell"], "text": "A cell."}])[0]["labels"]
    ['neuroendocrine cell', 'D cell']
    """
    below = {term["id"]: term["labels"] for term in terms}
    merged = {known["id"]: {**known, "labels": [*known["labels"], *below.get(known["id"], [])]} for known in types}
    return [*(term for term in terms if term["id"] not in merged), *merged.values()]


def profiled_types(
    labels: Mapping[str, str],
    cl_ids: Mapping[str, str],
    trained: Collection[str],
    types: Sequence[Mapping[str, Any]],
) -> dict[str, int]:
    """Text -> position in `types`, of the types that labels mean, but for those that a trained label is.

    Args:
        labels: Label -> text.
        cl_ids, trained: As for [`candidate_columns`].
        types: Terms of types that have a reference profile and no cells, each with a `text`.

    >>> liver = {"id": "CL:0000182", "name": "hepatocyte", "names": ["hepatocyte"], "text": "A liver cell."}
    >>> profiled_types({"Hepatocytes": "Hepatocytes"}, {}, {}, [liver])
    {'A liver cell.': 0}
    """
    numbers = {known["id"]: number for number, known in enumerate(types)}
    ids = {cl_ids.get(name) for name in trained}
    new = (name for name in labels if not trained_labels_of(name, None, list(trained), []))
    found = (term_of(name, types, cl_ids.get(name)) for name in new)
    asked = sorted(numbers[term["id"]] for term in found if term is not None and term["id"] not in ids)
    return {types[number]["text"]: number for number in asked}


def terms_of_kinds(
    labels: Collection[str],
    cl_ids: Mapping[str, str],
    trained: Sequence[str],
    terms: Sequence[Mapping[str, Any]],
    kinds: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """Terms of those labels that stand for the trained label that they are a kind of, `name` being the label.

    A label that means no trained one stands for it if no other label means the same: what tells apart two kinds of it,
    or a kind and all others, the trained cells do not say.

    Args:
        labels: The labels to choose from.
        cl_ids, trained, terms: As for [`candidate_columns`].
        kinds: Terms below trained labels, each with the `labels` that it is a kind of.

    >>> kupffer = {"id": "CL:0000091", "names": ["kupffer cell"], "labels": ["macrophage"]}
    >>> terms_of_kinds(["Kupffer cells", "B cell"], {}, ["macrophage", "B cell"], [], [kupffer])[0]["name"]
    'Kupffer cells'
    >>> terms_of_kinds(["Kupffer cells", "macrophage"], {}, ["macrophage", "B cell"], [], [kupffer])
    []
    >>> terms_of_kinds(["Kupffer cells"], {}, ["B cell"], [], [kupffer])
    []
    """
    meant = {name: trained_labels_of(name, cl_ids.get(name), trained, terms) for name in labels}
    kinds = [term for term in kinds if set(term["labels"]) <= set(trained)]
    found = {name: term_of(name, kinds, cl_ids.get(name)) for name in labels if not meant[name]}
    below = {name: term for name, term in found.items() if term is not None}
    taken = [label for wanted in meant.values() for label in wanted]
    taken += [label for term in below.values() for label in term["labels"]]
    return [{**term, "name": name} for name, term in below.items() if [taken.count(x) for x in term["labels"]] == [1]]


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

    def doubt_parts(self) -> np.ndarray:
        """Parts of the doubt of which each text gets one, int64 `(n_texts,)`: every label has the same share of it.

        A known label that is no candidate counts as a label. Else "T cell", which means three trained labels, would
        get the cells of which no score speaks for a candidate.
        """
        owned = self.owners >= 0
        texts_of = np.bincount(self.owners[owned], minlength=1)
        of_owner = np.where(owned, texts_of[self.owners.clip(min=0)], 1)
        return of_owner * (np.count_nonzero(texts_of) + np.count_nonzero(~owned))


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

    Raises:
        ValueError: If a label is an id of the Cell Ontology that means no trained label: no text stands for it.
    """
    names = list(labels)
    meant = {name: trained_labels_of(name, cl_ids.get(name), list(trained), terms) for name in names}
    for name, text in labels.items():
        if not meant[name] and text == name and CL_ID.fullmatch(name.strip()):
            raise ValueError(f"The checkpoint knows no type of the id {name!r}; name the type in words in its place.")
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


def members_of_terms(terms: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[int]]:
    """Positions of each term's labels in `names`; none for a term that is no answer, of one label or of nearly all."""
    found = [[place for place, name in enumerate(names) if name in term["labels"]] for term in terms]
    return [members if 1 < len(members) <= MOST_LABELS * len(names) else [] for members in found]
