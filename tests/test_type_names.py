"""Everyday names of groups of cells mean the types of the released checkpoint, in labels and in questions."""

import json
from pathlib import Path

import numpy as np
import pytest

from scmmgpt.commands.type_names import broader_types, names_of_types
from scmmgpt.evidence_scmmgpt import label_members
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.labels_scmmgpt import EVERYDAY, profiled_types, term_of, trained_labels_of


STORED = json.loads((Path(__file__).parents[1] / "config.json").read_text(encoding="utf-8"))["annotation"]
TERMS, KNOWN = STORED["terms"], list(STORED["labels"])


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Immune cells", "leukocyte"),
        ("blood cells", "hematopoietic cell"),
        ("ILC", "innate lymphoid cell"),
        ("Epithelial", "epithelial cell"),
        ("Ductal", "duct epithelial cell"),
        ("stromal", "stromal cell"),
        ("APCs", "professional antigen presenting cell"),
        ("alpha cells", "pancreatic A cell"),
        ("Beta cell", "type B pancreatic cell"),
        ("delta cell", "pancreatic D cell"),
    ],
)
def test_an_everyday_name_is_a_label(label, name):
    meant = trained_labels_of(name, None, KNOWN, TERMS)
    assert meant
    assert trained_labels_of(label, None, KNOWN, TERMS) == meant


def test_every_everyday_name_means_a_type_that_the_checkpoint_knows():
    known = [*TERMS, *STORED["kinds"], *STORED["profiles"]]
    assert [word for word in EVERYDAY if term_of(word, known) is None] == []
    (number,) = profiled_types({"platelets": "platelets"}, {}, KNOWN, STORED["profiles"]).values()
    assert STORED["profiles"][number]["name"] == "megakaryocyte"


@pytest.mark.parametrize("label", ["Unknown", "blood", "muscle", "doublet"])
def test_a_word_that_is_no_type_means_no_label(label):
    columns = {name: i for i, name in enumerate([*KNOWN, "hepatocyte"])}
    assert not np.any(label_members([label], columns, TERMS, STORED))


def test_questions_know_kinds_short_names_and_broader_types_of_profiles():
    terms = [term for term in TERMS if len(term["labels"]) < len(KNOWN)]
    names = [*KNOWN, *(term["name"] for term in terms)]
    types, stands_for = names_of_types(names, terms, STORED, GeneIndex({"VIP": 0, "LAMP5": 1}))
    assert types["epithelial"] == "epithelial cell"
    assert types["immune"] == "leukocyte"
    assert stands_for[types["kupffer cell"]] == "macrophage"
    assert stands_for[types["platelet"]] == "megakaryocyte"
    assert {"vip", "lamp5", "blood", "t"}.isdisjoint(types)  # genes, a tissue, a letter
    assert "epithelial cell" in broader_types(terms, STORED)["hepatocyte"]
