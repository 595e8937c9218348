"""Labels in any words: the trained labels that a label means, and the texts that are scored for the label.

`config.annotation` stores the trained labels and the ontology terms above them.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


UNKNOWN = "Unknown"  # the label of a cell without a cell type
CL_ID = re.compile(r"CL[:_]\d+", re.IGNORECASE)  # an id of the Cell Ontology
MOST_LABELS = 0.9  # a term with a greater share of the labels, such as "eukaryotic cell", is no answer
# Abbreviations in files that are no ontology synonyms. Ambiguous abbreviations are left out ("HSC" of blood or liver,
# "EC", "PC"). Sources: Azimuth references of blood (Hao et al. 2021, Cell 184:3573; "Mono", "Eryth") and motor cortex
# (Bakken et al. 2021, Nature 598:111; "Astro", "Oligo", "OPC", "Endo"); a kidney atlas (Stewart et al. 2019, Science
# 365:1461; "MNP"). "smc" is the singular of a synonym of CL:0000192; "tcell" and "bcell" are names in one word.
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
# Everyday names of groups, in the singular, that are no ontology synonyms -> names of the Cell Ontology, chosen by the
# definitions of the ontology. Its "blood cell" (CL:0000081) has no lymphocytes below it. Platelets hold the RNA of the
# megakaryocytes that shed them (Rowley et al. 2011, Blood 118:e101). Ambiguous names are left out: "stem cell".
EVERYDAY = {
    "immune": "leukocyte",
    "immune cell": "leukocyte",
    "white cell": "leukocyte",
    "blood cell": "hematopoietic cell",
    "red cell": "erythroid lineage cell",
    "pbmc": "mononuclear leukocyte",
    "lymphoid": "lymphocyte",
    "lymphoid cell": "lymphocyte",
    "ilc": "innate lymphoid cell",
    "apc": "professional antigen presenting cell",
    "antigen presenting cell": "professional antigen presenting cell",
    "killer cell": "natural killer cell",
    "platelet": "megakaryocyte",
    "thrombocyte": "megakaryocyte",
    "ductal": "duct epithelial cell",
    "ductal cell": "duct epithelial cell",
    "biliary cell": "cholangiocyte",
    "biliary epithelial cell": "cholangiocyte",
    "islet cell": "pancreatic endocrine cell",
    "alpha cell": "pancreatic a cell",
    "beta cell": "type b pancreatic cell",
    "delta cell": "pancreatic d cell",
    "glia": "glial cell",
    "helper t cell": "cd4 positive helper t cell",
    "t helper cell": "cd4 positive helper t cell",
    "cytotoxic t cell": "cd8 positive alpha beta cytotoxic t cell",
}
# Tissues, of which "X" does not mean "X cell".
TISSUE_WORDS = ("adipose", "blood", "cartilage", "fat", "muscle", "nerve", "tendon")


def normalize_label(label: str) -> str:
    """Reduce a label to its words in lower case, so that spelling variants compare equal.

    >>> normalize_label("CD4+ T-cell, (naïve)") == normalize_label("CD4-positive T cell naïve")
    True
    """
    label = re.sub(r"(?<=\w)\+", " positive ", label.casefold())
    return " ".join(re.findall(r"[^\W_]+", label))


def labels_with_texts(labels: dict[str, str] | Sequence[str] | None, stored: dict[str, str]) -> dict[str, str]:
    """Label -> text that describes the label: the given text, else the stored text, else the label itself.

    Labels that differ in case only are merged into one label, in the stored spelling or else the first spelling.

    Raises:
        TypeError: If `labels` is a string, or a label or a text is none, such as a missing value.
        ValueError: If there is no label, a text is empty, a label is "Unknown", or spellings of one label have
            different texts.
    """
    if isinstance(labels, str):
        raise TypeError(f"labels is the one string {labels!r}; pass a list of labels, or a dict label -> text.")
    if labels is None and stored:
        return dict(stored)
    labels = {} if labels is None else labels
    if not isinstance(labels, dict):
        labels = {label: stored.get(label, label) for label in labels}
    if strange := [word for pair in labels.items() for word in pair if not isinstance(word, str)]:
        raise TypeError(
            f"labels has {strange[0]!r}, which is no text; remove missing values, and write numbers as names of types."
        )
    labels = {str(label): str(text) for label, text in labels.items()}
    if not labels:
        raise ValueError("There are no labels to choose from; pass a list of labels, or a dict label -> text.")
    if reserved := [label for label in labels if label.strip().casefold() == UNKNOWN.casefold()]:
        raise ValueError(f"{reserved[0]!r} is reserved for cells without a label; remove it from the labels.")
    empty = [label for label, text in labels.items() if not text.strip()]
    if empty:
        raise ValueError(f"The text of {len(empty)} labels is empty: {empty[:5]}. Describe or remove each label.")
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(label.casefold(), []).append(label)
    merged = {}
    for same in spellings.values():
        name = next((label for label in same if label in stored), same[0])
        if len({labels[label] for label in same if labels[label] != label}) > 1:
            raise ValueError(f"{same} differ in case only and have different texts; remove all but one.")
        merged[name] = next((labels[label] for label in [name, *same] if labels[label] != label), name)
    return merged


def ids_of_labels(names: Sequence[str], given: dict[str, str], terms: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Label -> Cell Ontology id: the given id, else the id of the stored term that the label means."""
    meant = {name: term_of(name, terms) for name in names}
    return {name: term["id"] for name, term in meant.items() if term is not None} | given


def trained_labels_of(
    label: str, cl_id: str | None, trained: Sequence[str], terms: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Trained labels that a label means: the same label in another spelling, or all its subtypes.

    The Cell Ontology id decides first, then the words. Synonyms, plurals and case are matched.

    Args:
        label: The label.
        cl_id: Cell Ontology id of the label, if known.
        trained: The trained labels.
        terms: Terms of the trained labels and of all their ancestors. A term has an `id`, normalised `names`, and
            `labels`, the trained labels at or below the term. A term with a `text` is a profiled type
            ([`with_types`]), and means all labels of the term.

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
    """The term with this id, else the term that the label names in any spelling, else None.

    A `label` may itself be an id.
    """
    wanted = (cl_id or label).strip().upper().replace("CL_", "CL:")
    by_id = (term for term in terms if term["id"] == wanted)
    by_name = (term for term in terms if _spellings(label) & set(term["names"]))
    return next(by_id, None) or next(by_name, None)


def with_types(terms: Sequence[Mapping[str, Any]], types: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Terms of trained labels and of profiled types. A profiled type also means the trained labels below it.

    >>> known = {"id": "CL:0000165", "names": ["neuroendocrine cell"]}
    >>> terms = [{**known, "labels": ["D cell"]}]
    >>> with_types(terms, [{**known, "labels": ["neuroendocrine cell"], "text": "A cell."}])[0]["labels"]
    ['neuroendocrine cell', 'D cell']
    """
    below = {term["id"]: term["labels"] for term in terms}
    merged = {
        profiled["id"]: {**profiled, "labels": [*profiled["labels"], *below.get(profiled["id"], [])]}
        for profiled in types
    }
    return [*(term for term in terms if term["id"] not in merged), *merged.values()]


def profiled_types(
    labels: Mapping[str, str],
    cl_ids: Mapping[str, str],
    trained: Collection[str],
    types: Sequence[Mapping[str, Any]],
) -> dict[str, int]:
    """Text -> position in `types`, of the profiled types that labels mean; types that are trained labels are left out.

    Args:
        labels: Label -> text.
        cl_ids, trained: As in [`candidate_columns`].
        types: Terms of the profiled types, each with a `text`.

    >>> liver = {"id": "CL:0000182", "name": "hepatocyte", "names": ["hepatocyte"], "text": "A liver cell."}
    >>> profiled_types({"Hepatocytes": "Hepatocytes"}, {}, {}, [liver])
    {'A liver cell.': 0}
    """
    numbers = {profiled["id"]: number for number, profiled in enumerate(types)}
    ids = {cl_ids.get(name) for name in trained}
    new = (name for name in labels if not trained_labels_of(name, None, list(trained), []))
    meant = (term_of(name, types, cl_ids.get(name)) for name in new)
    places = sorted(numbers[term["id"]] for term in meant if term is not None and term["id"] not in ids)
    return {types[number]["text"]: number for number in places}


def terms_of_kinds(
    labels: Collection[str],
    cl_ids: Mapping[str, str],
    trained: Sequence[str],
    terms: Sequence[Mapping[str, Any]],
    kinds: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """Terms of the labels that are scored as the trained label above them; `name` of a term is the label.

    "Kupffer cell" is below the trained label "macrophage" and can be scored as "macrophage", if no other label means
    "macrophage" or a kind of it: training cells cannot distinguish two kinds, or a kind from the whole.

    Args:
        labels: The labels to choose from.
        cl_ids, trained, terms: As in [`candidate_columns`].
        kinds: Terms below trained labels, each with its `labels`, the trained labels above the term.

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
    kind_of = {name: term_of(name, kinds, cl_ids.get(name)) for name in labels if not meant[name]}
    below = {name: term for name, term in kind_of.items() if term is not None}
    taken = [label for wanted in meant.values() for label in wanted]
    taken += [label for term in below.values() for label in term["labels"]]
    return [{**term, "name": name} for name, term in below.items() if [taken.count(x) for x in term["labels"]] == [1]]


def names_known_type(text: str, trained: Sequence[str], terms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a sentence names a trained label, or a term above some but not all trained labels.

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
    """The normalised label, its singular, and the name with "cell"; of an everyday name the name in the ontology.

    >>> sorted(_spellings("Immune cells")), sorted(_spellings("Epithelial"))
    (['leukocyte'], ['epithelial', 'epithelial cell'])
    """
    words = normalize_label(label)
    one = words.removesuffix("s")
    if one in EVERYDAY:
        return {EVERYDAY[one]}
    is_short = len(one) < 3 or one in TISSUE_WORDS or one.endswith("cell")
    return {words, one} if is_short else {words, one, f"{one} cell"}


def broader_labels(label: str, trained: Collection[str], terms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trained labels of the narrowest term that the label ends with: those of "monocyte" for "classical monocyte"."""
    words = normalize_label(label)
    spellings = f" {words}", f" {words.removesuffix('s')}"
    named = [({normalize_label(name)}, [name]) for name in trained] + [(t["names"], t["labels"]) for t in terms]
    ends = [v for names, v in named if any(s.endswith(f" {n}") for n in names if len(n) > 3 for s in spellings)]
    ends = [labels for labels in ends if len(labels) < len(trained) and "non" not in spellings[0].split()]
    return min(ends, key=len, default=[])


@dataclass
class Candidates:
    """The texts that are scored for each cell, and the label of each text.

    Args:
        names: The labels to choose from.
        texts: The texts that are scored, trained texts included.
        owners: int64 `(n_texts,)`: position in `names`, or -1 for a trained label that is no candidate.
        unseen: bool `(n_texts,)`: whether the label means no trained label.
        meant: Label -> the trained labels that the label means.
    """

    names: list[str]
    texts: list[str]
    owners: np.ndarray
    unseen: np.ndarray
    meant: dict[str, list[str]]

    def pool(self, probabilities: np.ndarray) -> np.ndarray:
        """Add the probabilities of texts, `(n_cells, n_texts)`, by label: `(n_cells, n_names)`, rows of sum <= 1."""
        pooled = np.zeros((len(probabilities), len(self.names)), dtype=probabilities.dtype)
        for text, owner in enumerate(self.owners):
            if owner >= 0:
                pooled[:, owner] += probabilities[:, text]
        return pooled

    def doubt_parts(self) -> np.ndarray:
        """Divisors of the doubt for each text, int64 `(n_texts,)`, so that every label gets an equal share.

        A known label that is no candidate counts as one label. Equal shares of texts would favour a label of many
        texts: "T cell", which means three trained labels, would get the cells without evidence for any candidate.
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
    """The texts to score for some labels: texts of these labels, and of all trained labels.

    A label gets the probability of the trained labels that it means. A trained label that two labels mean belongs to
    the narrower label. A trained label that no label means competes, too, so that a cell may get none of the labels.
    A trained label does not compete with its own untrained kind ("T cell" with "gamma-delta T cell").

    Args:
        labels: Label -> text; for a label without a description, the label itself or the trained text.
        trained: Label -> text of the trained labels.
        cl_ids: Label -> Cell Ontology id, if known.
        terms: As in [`trained_labels_of`].

    Raises:
        ValueError: If a label is a Cell Ontology id of no trained label: the id has no text.
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
        # A label that means a trained one needs a text of its own only if the user describes it.
        if text not in owner_of and not (meant[name] and text == name):
            owner_of[text] = number, not meant[name]
    owners, unseen = zip(*owner_of.values(), strict=True)
    return Candidates(names, list(owner_of), np.asarray(owners), np.asarray(unseen), meant)


def members_of_terms(terms: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[int]]:
    """Positions of each term's labels in `names`; empty for a term with one label or more than `MOST_LABELS`."""
    positions = [[place for place, name in enumerate(names) if name in term["labels"]] for term in terms]
    return [members if 1 < len(members) <= MOST_LABELS * len(names) else [] for members in positions]
