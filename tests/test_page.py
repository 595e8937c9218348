"""`scmmgpt report`: one self-contained page about the results of a file."""

import html.parser
import re

import anndata
import numpy as np
import pandas as pd
import pytest

from scmmgpt.__main__ import main
from scmmgpt.commands.report import audit_warnings, describe_some, evidence_rows, label_rows, report_page, warnings_of
from scmmgpt.synthetic import synthetic_adata


@pytest.fixture
def cells():
    """Cells with places on a map, so that no UMAP is computed."""
    adata = synthetic_adata()
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    return adata


class Page(html.parser.HTMLParser):
    """The words and the tags of a page, which is well formed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.unclosed = [], "", []
        self.feed(page)
        self.close()
        assert not self.unclosed

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta", "br"):
            self.unclosed.append(tag)

    def handle_endtag(self, tag):
        assert self.unclosed.pop() == tag

    def handle_data(self, data):
        self.text += f"{data} "

    @property
    def pictures(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def words_of(page):
    page = Page(page)
    return " ".join(page.text.split()), page.pictures


def test_many_cells_are_described_by_a_sample(pipeline, cells, monkeypatch):
    monkeypatch.setattr("scmmgpt.commands.report.DESCRIBED", 50)
    pipeline.annotate(cells)
    describe_some(pipeline, cells, None)
    assert (cells.obs["scmmgpt_description"] != "").sum() == 50
    words, _ = words_of(report_page(cells, "many"))
    assert "Of 50 cells that were drawn at random." in words


def test_a_rare_label_has_no_share_of_nothing(cells):
    cells = anndata.concat([cells] * 5, index_unique="-")
    cells.obs["scmmgpt_cell_type"], cells.obs["scmmgpt_score"] = ["mast cell", *["B cell"] * (cells.n_obs - 1)], 0.9
    page = report_page(cells, "many")
    words, _ = words_of(page)
    assert "labels: B cell (99.7 %), mast cell (0.3 %)." in words
    assert "B cell (99.7\N{NO-BREAK SPACE}%)" in page
    assert not re.search(r"\d %", page)  # a line would end between the two


def test_a_page_of_one_label_compares_it_with_no_other_cells(pipeline, cells):
    cells = cells[(cells.obs["cell_type"] == "B cell").to_numpy()][:3].copy()
    pipeline.annotate(cells)
    pipeline.explain(cells)
    pipeline.describe(cells, proof=True)
    words, _ = words_of(report_page(cells, "three"))
    assert "3 cells, 1 label: B cell (100 %)." in words
    assert "CD19 (100 %)" in words  # and no "0 %" of no cells
    assert "CD19 (100 % of its cells)" in words
    assert "of the others" not in words


def test_the_score_of_a_label_that_was_not_given_is_not_shown(pipeline, cells):
    pipeline.annotate(cells)
    kinds = cells.obs["scmmgpt_cell_type"].astype(str).to_numpy()
    cells.obs["scmmgpt_cell_type"] = np.where(np.arange(60) < 6, "Unknown", kinds)
    scores = {row["label"]: row["score"] for row in label_rows(cells)}
    assert scores.pop("Unknown") is None
    assert all(0 < score <= 1 for score in scores.values())


def test_a_page_has_labels_evidence_audit_descriptions_and_receipt(pipeline, cells):
    pipeline.annotate(cells, cluster_key="donor_id")
    pipeline.explain(cells)
    pipeline.describe(cells, max_new_tokens=2)
    given = cells.obs["cell_type"].astype(str)
    given["cell-0"] = "monocyte"
    cells.obs["given"] = given
    pipeline.audit(cells, "given")
    words, pictures = words_of(report_page(cells, "my cells", "given"))
    for part in (
        "my cells",
        "B cell",
        "CL:0000236",
        "25 %",
        "donor-1",
        "CD19",
        "Descriptions",
        "Audit of given",
        "torch",
    ):
        assert part in words, part
    assert "1 contradicted" in words
    assert "at least 19 to 1" in words  # what the verdict means
    assert "log odds (natural logarithm) of the suggested label" in words
    assert "markers expressed" in words
    assert "60 cells, 4 labels: B cell (25 %), " in words  # the answer, above all else
    assert re.search(r"cell-0 monocyte B cell", words)
    assert cells.uns["scmmgpt"]["annotate"]["receipt"]["weights"] in words
    assert len(pictures) == 4
    assert all(picture["src"].startswith("data:") and picture["alt"] for picture in pictures)


def test_a_page_needs_nothing_from_elsewhere_and_shows_names_as_text(pipeline, cells):
    cells.obs["given"] = np.where(np.arange(cells.n_obs) % 2, "<script>alert(1)</script>", "B & T")
    pipeline.annotate(cells)
    page = report_page(cells, "<b>title</b>", "given")
    assert "<script" not in page
    assert "<b>title" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)


def test_a_page_without_evidence_says_so(pipeline, cells):
    pipeline.annotate(cells)
    words, pictures = words_of(report_page(cells, "cells"))
    assert "labels in its set" not in words
    assert "markers expressed" not in words  # which is of the evidence
    kinds = cells.obs["scmmgpt_cell_type"].astype(str)
    cells.obs["scmmgpt_label_set"] = kinds.where(kinds != "B cell", "B cell | plasma cell")
    shown, _ = words_of(report_page(cells, "cells"))
    assert "labels in its set commonest set" in shown
    assert "2.0 B cell, plasma cell" in shown
    assert "There is no evidence for the labels" in words
    assert len(pictures) == 2
    with pytest.raises(ValueError, match="no column 'nothing'"):
        report_page(cells, "cells", "nothing")


def test_warnings_come_from_the_results(pipeline, cells):
    pipeline.annotate(cells)
    pipeline.explain(cells)
    assert warnings_of(cells) == []
    cells.uns["scmmgpt"]["annotate"] |= {"collapsed": True, "weak_labels": np.array(["B cell"])}
    cells.obs["scmmgpt_novelty"] = np.where(np.arange(60) < 8, 1.5, 0.5)
    cells.obs["scmmgpt_cell_type"] = np.where(np.arange(60) < 6, "Unknown", cells.obs["scmmgpt_cell_type"].astype(str))
    cells.obs["scmmgpt_score"] = 0.4
    text = " ".join(warnings_of(cells))
    for part in (
        "Nearly all cells have one label",
        "no type of the checkpoint: 6 of 60 cells, called Unknown",
        "every label: 2 of 60 cells, named by a broader type or a reference profile",
        "'B cell'",
        "With a score below 0.5: 60 of 60 cells",
    ):
        assert part in text


def test_warnings_of_one_kind_are_one_line_with_the_first_names(pipeline, cells):
    pipeline.annotate(cells)
    pipeline.explain(cells)
    cells.uns["scmmgpt"]["annotate"]["weak_labels"] = np.array([f"type {i}" for i in range(23)], dtype=object)
    assert warnings_of(cells) == [
        "The file lacks genes that tell 'type 0', 'type 1', 'type 2' and 20 more from another label."
    ]


def test_the_command_writes_the_page_of_results_and_of_plain_cells(pipeline, cells, tmp_path):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    model = ["--model", str(tmp_path / "checkpoint"), "--quiet"]
    source, annotated, page = (str(tmp_path / name) for name in ("cells.h5ad", "annotated.h5ad", "page.html"))
    cells.write_h5ad(source)
    assert main(["annotate", source, *model, "-o", annotated, "--evidence", str(tmp_path / "evidence.csv")]) == 0
    assert main(["report", annotated, "-o", page, "--label-key", "cell_type"]) == 0
    first = words_of((tmp_path / "page.html").read_text())[0]
    assert "annotated.h5ad" in first
    assert main(["report", source, "-o", page, *model]) == 0
    second = words_of((tmp_path / "page.html").read_text())[0]
    assert "CD79A" in first
    assert "CD79A" in second
    assert re.search(r"B cell 15 cells, 100 % B cell, shown by \w+ \(100 % of its cells", second)
    assert "X_umap" in anndata.read_h5ad(source).obsm
    with pytest.raises(ValueError, match="annotate them first"):
        report_page(cells, "cells")
    assert main(["report", annotated, "-o", str(tmp_path / "page.pdf")]) == 2


def test_the_page_begins_with_the_given_labels_that_an_audit_contradicts():
    verdicts = ["contradicted"] * 3 + ["supported"] * 3 + ["doubtful", "contradicted"]
    obs = {"given": list("aaabbbcb"), "scmmgpt_audit": verdicts, "scmmgpt_audit_suggested": list("xyyaaaax")}
    obs = pd.DataFrame(obs)
    assert audit_warnings(obs, "given") == [
        "The audit contradicts 4 of 8 given labels of given, the largest share of a (3 of 3 cells, y suggested), "
        "b (1 of 4 cells, x suggested)."
    ]
    assert audit_warnings(obs, "gone") == ["The audit contradicts 4 of 8 given labels."]
    assert audit_warnings(obs[3:7], "given") == []


def test_few_matched_genes_are_told_with_the_expression_that_they_have(pipeline, cells):
    pipeline.annotate(cells)
    pipeline.explain(cells)
    cells.uns["scmmgpt"]["input"]["genes"] |= {"share_matched": 0.46, "share_expression_matched": 0.992}
    said = "Only 46 % of the genes of the file are genes of the checkpoint, with 99.2 % of the expression."
    assert warnings_of(cells) == [said]


def test_small_shares_are_not_called_none_and_a_gene_that_no_cell_expresses_speaks_for_no_label(pipeline, cells):
    many = anndata.concat([cells] * 10, index_unique="-")
    pipeline.annotate(many)
    names = many.obs["scmmgpt_cell_type"].astype(str).to_numpy()
    names[:3] = "Unknown"
    many.obs["scmmgpt_cell_type"] = names
    shown, _ = words_of(report_page(many, "cells"))
    assert " 3 0.5 % " in shown
    explained = {"name": ["B cell"] * 2, "cells": [3] * 2, "rival": ["T cell"] * 2, "gene": ["CD19", "AQP1"]}
    explained |= {"term": [2.0, 1.0], "expressing": [0.5, 0.0], "elsewhere": [0.0, 0.1], "marker": [True, True]}
    (row,) = evidence_rows(explained)
    assert [gene["gene"] for gene in row["genes"]] == ["CD19"]
    assert row["missing"] == ["AQP1"]
