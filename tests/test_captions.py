"""Captions, class prompts and answers: what a text says, and that it depends on its cell alone."""

import re

import numpy as np
import pytest


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CaptionSampler, find_markers, parse_cell_type, with_article


PBMC68K_LABELS = {
    "CD14+ Monocyte": "CL:0001054",
    "CD19+ B": "CL:0000236",
    "CD34+": "CL:0008001",
    "CD4+/CD25 T Reg": "CL:0000792",
    "CD4+/CD45RA+/CD25- Naive T": "CL:0000895",
    "CD4+/CD45RO+ Memory": "CL:0000897",
    "CD56+ NK": "CL:0000623",
    "CD8+ Cytotoxic T": "CL:0000794",
    "CD8+/CD45RA+ Naive Cytotoxic": "CL:0000900",
    "Dendritic": "CL:0000451",
}


def make_cells(rows):
    """Build ragged cells from a list of {gene id: count}."""
    return Cells(
        indptr=np.cumsum([0] + [len(row) for row in rows]),
        gene_ids=np.array([g for row in rows for g in sorted(row)]),
        counts=np.array([row[g] for row in rows for g in sorted(row)]),
        total_counts=np.array([sum(row.values()) for row in rows], dtype=np.float32),
        cell_ids=np.arange(len(rows), dtype=np.uint64),
    )


@pytest.fixture(scope="module")
def obs():
    n = 60
    return {
        "cell_type": ["B cell", "natural killer cell", None] * (n // 3),
        "tissue": ["blood", "lung", "lung"] * (n // 3),
        "disease": ["normal", "systemic lupus erythematosus", None] * (n // 3),
        "sex": ["male", "unknown", None] * (n // 3),
        "development_stage": ["45-year-old stage", "third decade stage", None] * (n // 3),
    }


@pytest.fixture(scope="module")
def cell_ids():
    return np.arange(60, dtype=np.uint64)


def test_the_paper_set_is_the_published_template(cell_ids):
    texts = CaptionSampler("paper").caption({"cell_type": ["B cell", "my cluster"]}, cell_ids=cell_ids[:2])
    assert texts == [
        "cell type: B cell. A lymphocyte of B lineage that is capable of B cell mediated immunity.",
        "cell type: my cluster.",
    ]


def test_a_caption_does_not_depend_on_the_batch(obs, cell_ids):
    together = CaptionSampler(seed=3).caption(obs, epoch=2, cell_ids=cell_ids)
    sampler = CaptionSampler(seed=3)
    for i in reversed(range(len(cell_ids))):
        alone = sampler.caption({k: v[i : i + 1] for k, v in obs.items()}, epoch=2, cell_ids=cell_ids[i : i + 1])
        assert alone == together[i : i + 1]


def test_cells_of_one_type_read_differently_and_epochs_redraw(cell_ids):
    obs = {"cell_type": ["B cell"] * 60, "tissue": ["blood"] * 60}
    first, second = (CaptionSampler().caption(obs, epoch=epoch, cell_ids=cell_ids) for epoch in (0, 1))
    assert len(set(first)) >= 8
    assert first != second
    assert CaptionSampler(seed=1).caption(obs, epoch=0, cell_ids=cell_ids) != first


def test_templates_are_drawn_by_their_weights():
    sampler = CaptionSampler()
    texts = sampler.caption({"cell_type": [None] * 4000, "tissue": ["lung"] * 4000}, cell_ids=np.arange(4000))
    starts = ("A cell from", "A cell of", "cell type")
    shares = [np.mean([text.startswith(start) for text in texts]) for start in starts]
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.2], atol=0.03)


def test_no_template_leaves_a_hole(obs, cell_ids):
    sampler = CaptionSampler()
    for subset in ([], ["cell_type"], ["tissue"], ["cell_type", "sex"], list(obs)):
        columns = {column: obs[column] for column in subset}
        for epoch in range(5):
            for text in sampler.caption(columns, epoch=epoch, cell_ids=cell_ids):
                assert not re.search(r"[{}\[\]\0]|  |None|unknown stage|\.\.| ,| \.|^\s|\s$", text), text


def test_an_unknown_type_is_never_given_a_name(obs, cell_ids):
    for i, text in enumerate(CaptionSampler().caption(obs, cell_ids=cell_ids)):
        named = parse_cell_type(text, ["B cell", "natural killer cell"])
        assert named == obs["cell_type"][i]


def test_the_donor_is_said_in_words():
    sampler = CaptionSampler()
    full = {"cell_type": ["B cell"] * 200, "tissue": ["lung"] * 200, "sex": ["female"] * 200}
    full |= {"development_stage": ["45-year-old stage"] * 200, "disease": ["lung adenocarcinoma"] * 200}
    texts = sampler.caption(full, cell_ids=np.arange(200))
    assert any("the lung of a 45-year-old female donor with lung adenocarcinoma" in text for text in texts)


def test_ids_name_the_term_where_the_label_is_absent_or_old():
    sampler = CaptionSampler("paper")
    obs = {"cell_type": [None, "B lymphocyte"], "cell_type_ontology_term_id": ["CL:0000236", None]}
    assert [text.split(".")[0] for text in sampler.caption(obs, cell_ids=[1, 2])] == ["cell type: B cell"] * 2


def test_markers_are_the_genes_far_above_their_mean():
    symbols = ("<pad>", "CD79A", "GNLY", "ACTB", "MT-CO1", "RARE1")
    means = np.array([0, 0.01, 0.01, 0.5, 0.4, 0.0001])
    cells = make_cells([{1: 30, 3: 50, 4: 200}, {2: 25, 3: 50, 5: 2}, {3: 50}])
    assert find_markers(cells, symbols, means) == [["CD79A"], ["GNLY"], []]


def test_markers_enter_captions_only_where_the_cell_has_them():
    symbols, means = ("<pad>", "CD79A", "ACTB"), np.array([0, 0.01, 0.5])
    cells = make_cells([{1: 30, 2: 50}, {2: 50}] * 50)
    texts = CaptionSampler(gene_means=means).caption({"cell_type": ["B cell"] * 100}, cells, symbols)
    assert any("CD79A" in text for text in texts[::2])
    assert not any("CD79A" in text or "ACTB" in text for text in texts[1::2])


def test_answers_can_be_parsed_back(cell_ids):
    labels = [ontology.term_name(term_id) for term_id in PBMC68K_LABELS.values()]
    obs = {"cell_type": labels * 2, "tissue": ["blood"] * 20}
    answers = CaptionSampler().answer(obs, cell_ids=cell_ids[:20])
    assert [parse_cell_type(answer, labels) for answer in answers] == obs["cell_type"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This cell is a CD14-positive monocyte.", "CD14-positive monocyte"),
        ("Probably monocytes, not B cells", "monocyte"),
        ("an NK cell from blood", "natural killer cell"),
        ("A B lymphocyte. It is not a T cell.", "B cell"),
        ("A cell of the subB cell kind", None),
        ("", None),
    ],
)
def test_parsing_takes_the_first_and_longest_name(text, expected):
    assert parse_cell_type(text, ["monocyte", "CD14-positive monocyte", "B cell", "natural killer cell"]) == expected


@pytest.mark.parametrize(("label", "term_id"), PBMC68K_LABELS.items())
def test_the_labels_of_pbmc68k_are_resolved(label, term_id):
    assert ontology.resolve("cell_type", label).term_id == term_id


def test_reviewed_labels_point_to_terms_that_exist():
    for column, table in ontology._reviewed_labels().items():
        for label, term_id in table.items():
            assert ontology.term_name(term_id), (column, label)


@pytest.mark.parametrize(
    ("column", "label", "term_id", "expected"),
    [
        ("cell_type", "T-cells", None, ontology.Term("T cell", "CL:0000084", "name")),
        ("cell_type", "B lymphocyte", None, ontology.Term("B cell", "CL:0000236", "synonym")),
        ("cell_type", "cluster 7", None, ontology.Term("cluster 7", None, "unmatched")),
        ("cell_type", "unknown", None, ontology.Term(None, None, "missing")),
        ("cell_type", "B cell", "CL:0000084", ontology.Term("T cell", "CL:0000084", "conflict")),
        ("disease", "healthy", None, ontology.Term("normal", "PATO:0000461", "reviewed")),
        ("sex", "F", None, ontology.Term("female", "PATO:0000383", "reviewed")),
        ("organism", "human", None, ontology.Term("Homo sapiens", "NCBITaxon:9606", "reviewed")),
    ],
)
def test_labels_and_ids_resolve_to_one_term(column, label, term_id, expected):
    assert ontology.resolve(column, label, term_id) == expected


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("B cell", "a"), ("NK cell", "an"), ("oligodendrocyte", "an"), ("unipotent cell", "a"), ("M cell", "an"),
     ("MAIT cell", "a"), ("IgA plasma cell", "an"), ("eosinophil", "an"), ("CD4-positive T cell", "a")],
)  # fmt: skip
def test_articles_follow_the_sound(phrase, article):
    assert with_article(phrase) == f"{article} {phrase}"


def test_a_class_prompt_needs_a_type():
    with pytest.raises(ValueError, match="needs a cell type"):
        CaptionSampler().label_text("unknown")


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 values for 3 cells"):
        CaptionSampler().caption({"tissue": ["lung", "lung"]}, cell_ids=[1, 2, 3])


def test_a_wrong_template_file_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "version": 1, "captions": [{"text": "{colour}"}], "answers": [], "label": ""}')
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        CaptionSampler(path)
    with pytest.raises(FileNotFoundError, match="one of .'default', 'markers', 'paper'"):
        CaptionSampler("missing")
