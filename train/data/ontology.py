"""Ontology terms of the obs columns: resolve a label or an id to a term, and look up its definition and synonyms.

The package `cellxgene-ontology-guide` has the terms of the CELLxGENE schema, offline. Each ontology is loaded on first
use (the Cell Ontology in 15 ms, MONDO in 150 ms). NCBITaxon is never loaded, because it takes 3 GB of memory:
`templates/labels.json` names the few organisms of a corpus.
"""

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmmgpt.commands.files import read_json
from scmmgpt.labels_scmmgpt import normalize_label


# The obs columns of labels, in the order of a corpus, and the ontologies of each (CELLxGENE schema, human cells).
ONTOLOGIES = {
    "cell_type": ("CL",),
    "tissue": ("UBERON",),
    "disease": ("MONDO", "PATO"),
    "assay": ("EFO",),
    "development_stage": ("HsapDv",),
    "sex": ("PATO",),
    "organism": (),
}
# Words of CELLxGENE and pandas for an unknown value.
MISSING = frozenset({"", "na", "nan", "none", "unknown", "unassigned", "<na>"})

ROOT_TYPE = "CL:0000000"  # cell
# Most subtypes of a label in `terms_below`. Among the labels of the release, "epithelial cell" has more; the next
# largest number is 161.
MOST_KINDS = 200
BLOOD = "UBERON:0000178"
LABELS_FILE = Path(__file__).parent / "templates" / "labels.json"


@dataclass(frozen=True)
class Term:
    """The meaning of a label of one obs column."""

    name: str | None  # of the term in the ontology, or the label itself if no term matched; None if unknown
    term_id: str | None  # such as `CL:0000236`
    # The rule that found the term: "id", "name", "synonym", "reviewed" (the table `templates/labels.json`),
    # "unmatched" or "missing"; "conflict" if the id decided and the label names another term.
    how: str


def is_missing(value: Any) -> bool:
    """Return whether an obs value is unknown: None, NaN, or a word of `MISSING`."""
    return value is None or value != value or str(value).strip().casefold() in MISSING


@functools.cache
def _parser() -> Any:
    try:
        from cellxgene_ontology_guide.ontology_parser import OntologyParser
    except ImportError as error:
        raise ImportError(
            "Definitions and synonyms of cell types come with `cellxgene-ontology-guide`, which is not installed. "
            "Install `scmmgpt[train]`."
        ) from error
    return OntologyParser()


@functools.cache
def _reviewed_labels() -> dict[str, dict[str, str]]:
    return {
        column: {normalize_label(label): term_id for label, term_id in table.items()}
        for column, table in read_json(LABELS_FILE)["labels"].items()
    }


@functools.cache
def _organisms() -> dict[str, str]:
    return read_json(LABELS_FILE)["organisms"]


@functools.cache
def _exact_names(ontology: str) -> dict[str, str]:
    return _parser().get_term_label_to_id_map(ontology)


def names_of(column: str) -> list[str]:
    """The names of all current terms that an obs column may hold, in the ontology's order."""
    return [
        name
        for ontology in ONTOLOGIES[column]
        for name, term_id in _exact_names(ontology).items()
        if not _parser().is_term_deprecated(term_id)
    ]


@functools.cache
def _names_to_ids(ontology: str, kind: str) -> dict[str, str]:
    """Map normalised names (or synonyms) of an ontology to term ids; leave out names that two terms share."""
    parser = _parser()
    ids: dict[str, str | None] = {}
    for label, term_id in _exact_names(ontology).items():
        if parser.is_term_deprecated(term_id):
            continue
        for name in [label] if kind == "name" else parser.get_term_synonyms(term_id):
            key = normalize_label(name)
            ids[key] = term_id if ids.get(key, term_id) == term_id else None
    return {key: term_id for key, term_id in ids.items() if key and term_id}


def ontology_version() -> str:
    """Return the version of the CELLxGENE schema, e.g. `7.1.0`."""
    return _parser().cxg_schema.version


@functools.cache
def term_name(term_id: str) -> str | None:
    """Return the name of a term, or of the replacement of a deprecated term; None if the id is not known."""
    if term_id in _organisms():
        return _organisms()[term_id]
    if term_id.startswith("NCBITaxon:") or not _parser().is_valid_term_id(term_id):
        return None
    if _parser().is_term_deprecated(term_id) and (replacement := _parser().get_term_replacement(term_id)):
        return term_name(replacement)
    return _parser().get_term_label(term_id)


@functools.cache
def match_label(column: str, label: str) -> tuple[str | None, str]:
    """Match a label to a term: by exact name, then by normalised name, reviewed table and synonym, in that order.

    Return `(term_id, how)`, or `(None, "unmatched")`. A synonym of two terms matches neither.
    """
    # Most labels equal a name exactly, which saves the normalisation of all names and synonyms.
    for ontology in ONTOLOGIES[column]:
        term_id = _exact_names(ontology).get(label)
        if term_id and not _parser().is_term_deprecated(term_id):
            return term_id, "name"
    tables = [("name", _names_to_ids(ontology, "name")) for ontology in ONTOLOGIES[column]]
    if column == "organism":
        tables.append(("name", {normalize_label(name): term_id for term_id, name in _organisms().items()}))
    tables.append(("reviewed", _reviewed_labels().get(column, {})))
    tables += [("synonym", _names_to_ids(ontology, "synonym")) for ontology in ONTOLOGIES[column]]
    key = normalize_label(label)
    # Annotations often have the plural, the ontology always has the singular.
    for spelling in (key, key.removesuffix("s")):
        for how, ids in tables:
            if spelling in ids:
                return ids[spelling], how
    return None, "unmatched"


@functools.cache
def resolve(column: str, label: Any = None, term_id: Any = None) -> Term:
    """Resolve a source's label and ontology id, either or both, to one term of an obs column of `ONTOLOGIES`.

    A valid id decides, so that one cell type has one name in all sources. Without a valid id, the label is matched. A
    label without a match is kept, without an id.
    """
    label = None if is_missing(label) else str(label).strip()
    term_id = None if is_missing(term_id) else str(term_id).strip()
    if term_id and (name := term_name(term_id)):
        matched = match_label(column, label)[0] if label and label != name else None
        return Term(name, term_id, "conflict" if matched and term_name(matched) != name else "id")
    if label is None:
        return Term(None, None, "missing")
    matched, how = match_label(column, label)
    return Term(term_name(matched) if matched else label, matched, how)


@functools.cache
def definition(term_id: str) -> str | None:
    """Return the definition of a term as clean sentences, or None.

    >>> definition("CL:0000236")
    'A lymphocyte of B lineage that is capable of B cell mediated immunity.'
    """
    if not _parser().is_valid_term_id(term_id):
        return None
    text = " ".join((_parser().get_term_description(term_id) or "").split())
    text = re.sub(r"\s*\[[^\[\]]*\]", "", text)  # literature references
    text = re.sub(r"^A\(n\) ([aeiou]?)", lambda m: f"A{'n' if m[1] else ''} {m[1]}", text, flags=re.IGNORECASE)
    if not text:
        return None
    return text[0].upper() + text[1:].rstrip(" ;,.") + "."


@functools.cache
def synonyms(term_id: str) -> tuple[str, ...]:
    """Return synonyms that suit prose: no short abbreviations, codes, plurals, or other spellings of the name."""
    if not _parser().is_valid_term_id(term_id):
        return ()
    seen, kept = {normalize_label(_parser().get_term_label(term_id))}, []
    for synonym in _parser().get_term_synonyms(term_id):
        key = normalize_label(synonym)
        prose = re.fullmatch(r"[\w ,+/'-]{5,}", synonym) and " " in synonym.replace("-", " ")
        if prose and key not in seen and not key.endswith("cells") and "sensu" not in key:
            seen.add(key)
            kept.append(synonym)
    return tuple(kept)


@functools.cache
def distance(term_id: str | None, other_id: str | None) -> float:
    """Count the steps between two terms through their nearest common ancestor; infinite if there is none.

    >>> distance("CL:0000236", "CL:0000945")  # B cell, lymphocyte of B lineage
    1
    """
    if term_id == other_id:
        return 0
    if not (_parser().is_valid_term_id(term_id) and _parser().is_valid_term_id(other_id)):
        return math.inf
    steps = _parser().get_distance_between_terms(term_id, other_id)
    return steps if steps >= 0 else math.inf


@functools.cache
def cell_types() -> dict[str, str]:
    """Name -> Cell Ontology id of every cell type except "cell" itself; a name that two types share is left out."""
    ids = set(_names_to_ids("CL", "name").values()) - {ROOT_TYPE}
    return {str(term_name(term_id)): term_id for term_id in sorted(ids)}


@functools.cache
def depth_share(term_id: str, true_id: str) -> float:
    """Share of the path from "cell" down to the true type that a term covers, by shortest paths.

    It is 1 for the true type itself, and for an ancestor 1 - (steps from the true type to the ancestor) / (steps from
    the true type to "cell"). It is 0 for all other terms, narrower types included.

    >>> depth_share("CL:0000945", "CL:0000236")  # lymphocyte of B lineage, where the cell is a B cell
    0.8333333333333334
    """
    if term_id == true_id:
        return 1.0
    if not (_parser().is_valid_term_id(term_id) and _parser().is_valid_term_id(true_id)):
        return 0.0
    above = _parser().get_term_ancestors_with_distances(true_id)
    if term_id not in above or ROOT_TYPE not in above:
        return 0.0
    return max(0.0, 1 - above[term_id] / above[ROOT_TYPE])


@functools.cache
def ancestors(term_id: str) -> tuple[str, ...]:
    """Return the terms above a term, the nearest first."""
    return tuple(_parser().get_term_ancestors(term_id)) if _parser().is_valid_term_id(term_id) else ()


def shared(term_id: str, others: Iterable[str]) -> list[str]:
    """Sorted ids that a term and its ancestors have in common with `others` and their ancestors."""
    of_others = {above for other in others for above in (other, *ancestors(other))}
    return sorted(of_others & {term_id, *ancestors(term_id)})


def all_synonyms(term_id: str) -> tuple[str, ...]:
    """Return every synonym of a term, for parsing texts (`synonyms` is for writing texts)."""
    return tuple(_parser().get_term_synonyms(term_id)) if _parser().is_valid_term_id(term_id) else ()


def label_terms(labels: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """List the Cell Ontology terms of labels (label -> id, or None) and of all their ancestors.

    A checkpoint stores this list, so that `annotate` understands synonyms and broader names without the ontology.
    Terms of fewer labels come first. Among terms of equally many labels, the curated classes of CELLxGENE come first
    ("T cell" before "mature alpha-beta T cell"), then the nearest ancestors.

    Returns:
        A mapping for each term: `id`, `name`, `names` (name and unambiguous synonyms, normalised) and `labels`, the
        labels that equal the term or are subtypes of the term.
    """
    below: dict[str, list[str]] = {}
    for label, given in labels.items():
        term_id = resolve("cell_type", label, given).term_id
        if term_id is not None and term_id.startswith("CL:") and term_name(term_id) is not None:
            for ancestor in [term_id, *_parser().get_term_ancestors(term_id)]:
                below.setdefault(ancestor, []).append(label)
    from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
    from cellxgene_ontology_guide.entities import CuratedOntologyTermList

    curated = set(get_curated_ontology_term_list(CuratedOntologyTermList.CELL_SUBCLASS))
    terms = []
    # Ancestors come nearest first, and sorting keeps their order.
    for term_id, names in sorted(below.items(), key=lambda item: (len(item[1]), item[0] not in curated)):
        terms.append(_described("cell_type", term_id, names))
    return terms


def terms_below(labels: Mapping[str, str], without: Collection[str] = ()) -> list[dict[str, Any]]:
    """List the subtypes of labels, so that `annotate` can score a subtype that was never trained by its label.

    A label with more than `MOST_KINDS` subtypes ("epithelial cell") is too broad to score a subtype by. The subtypes
    of such a label are left out, and so are the terms in `without`, which another list has.

    Returns:
        As [`label_terms`]; each term has one label, its nearest ancestor among the labels. Terms with several nearest
        ancestors are left out.
    """
    label_of = {term_id: label for label, term_id in labels.items()}
    below: dict[str, list[str]] = {label: [] for label in labels}
    for term_id in cell_types().values():
        labelled = [ancestor for ancestor in ancestors(term_id) if ancestor in label_of]
        above = {higher for ancestor in labelled for higher in ancestors(ancestor)}
        nearest = [ancestor for ancestor in labelled if ancestor not in above]
        if len(nearest) == 1 and term_id not in label_of and term_id not in without:
            below[label_of[nearest[0]]].append(term_id)
    few = ((label, ids) for label, ids in sorted(below.items()) if len(ids) <= MOST_KINDS)
    return [_described("cell_type", term_id, [label]) for label, ids in few for term_id in sorted(ids)]


def tissue_terms(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """List the tissues of labelled cells with their labels, so that `annotate` can restrict the labels to one tissue.

    A tissue (a name or an UBERON id) has the labels of its cells. An organ also has the labels of its parts. Every
    tissue has the labels of blood, because blood runs through every tissue. Pairs with a missing value are skipped.

    Returns:
        As [`label_terms`], sorted by name: `id` ("" for a name that UBERON lacks), `name`, `names` and `labels`.
    """
    from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
    from cellxgene_ontology_guide.entities import CuratedOntologyTermList

    organs = set(get_curated_ontology_term_list(CuratedOntologyTermList.ORGAN))
    labels_of: dict[str, set[str]] = {}
    for tissue, label in set(pairs):
        own = resolve("tissue", tissue, tissue)
        above = [] if own.term_id is None else [term for term in ancestors(own.term_id) if term in organs]
        for place in [] if own.name is None or is_missing(label) else [own.term_id or own.name, *above]:
            labels_of.setdefault(place, set()).add(label)
    of_blood = labels_of.get(BLOOD, set())
    terms = []
    for place, labels in labels_of.items():
        own, names = resolve("tissue", place, place), sorted({*labels, *of_blood})
        if own.term_id is not None:
            terms.append(_described("tissue", own.term_id, names))
        else:
            terms.append({"id": "", "name": place, "names": [normalize_label(place)], "labels": names})
    return sorted(terms, key=lambda term: term["name"])


def tissues_of(obs: Any, labels: Iterable[Any]) -> list[dict[str, Any]]:
    """[`tissue_terms`] of the obs column `tissue_ontology_term_id`, or else `tissue`; empty if obs has neither."""
    key = next((name for name in ("tissue_ontology_term_id", "tissue") if name in obs), None)
    return [] if key is None else tissue_terms(zip(obs[key], labels, strict=True))


def _described(column: str, term_id: str, labels: Sequence[str]) -> dict[str, Any]:
    """Entry of a checkpoint for a term: id, name, the normalised names of this term alone, and labels."""
    words = [str(term_name(term_id)), *all_synonyms(term_id)]
    reviewed = [word for word, known in _reviewed_labels().get(column, {}).items() if known == term_id]
    keys = dict.fromkeys([*map(normalize_label, words), *reviewed])
    own = [key for key in keys if key and match_label(column, key)[0] == term_id]
    return {"id": term_id, "name": words[0], "names": own, "labels": list(labels)}
