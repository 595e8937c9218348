"""The genes that drove a label: exact terms of the readout, named for people, tested by deletion."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmmgpt.__main__ import main
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.eval.evidence import evaluate_evidence
from scmmgpt.evidence_scmmgpt import (
    HIGHEST,
    LEVELS,
    N_GENES,
    NONE,
    Explainer,
    find_markers,
    label_members,
    labels_in_short,
    largest_entries,
    level_of,
    percentiles,
)
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.synthetic import MARKERS, synthetic_adata


TYPES = list(MARKERS)


@pytest.fixture
def explained(pipeline):
    """Annotated and explained cells, and their evidence."""
    adata = pipeline.annotate(synthetic_adata())
    return adata, pipeline.explain(adata)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), max_size=8), min_size=1, max_size=6), st.integers(1, 4))
def test_the_largest_entries_are_those_of_a_sort_row_by_row(rows, n):
    numbers = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    values = np.array([value for row in rows for value in row], dtype=np.float32)
    entries, places = largest_entries(numbers, values, n)
    for i, row in enumerate(rows):
        mine = numbers[entries] == i
        assert values[entries[mine]].tolist() == sorted((v for v in row if v > 0), reverse=True)[:n]
        assert places[mine].tolist() == list(range(mine.sum()))


def test_markers_are_genes_that_are_high_in_their_label_and_count_for_it():
    centroids = np.array([[9.0, 1, 5, 5], [1, 9, 5, 5]])
    weights = np.array([[1.0, -1], [-1, 1], [3, -3], [0, 0]])  # the third gene counts but differs not
    assert find_markers(weights, centroids, 2).tolist() == [[0, NONE], [1, NONE]]


def test_a_gene_that_separates_a_hundred_times_less_than_the_best_one_is_no_marker():
    weights = np.array([[1.0, 0], [0.5, 0], [0.1, 0]])
    assert find_markers(weights, np.array([[9.0, 1, 5.06], [1, 0, 5]])).tolist()[0][:3] == [0, 1, NONE]
    assert find_markers(weights, np.array([[9.0, 1, 6], [1, 0, 5]])).tolist()[0][:4] == [0, 1, 2, NONE]


@settings(max_examples=20, deadline=None)  # other jobs may hold the machine
@given(st.integers(0, 3), st.randoms(use_true_random=False))
def test_terms_of_all_genes_sum_to_the_odds_of_label_and_rival(pipeline, own, random):
    readout = pipeline.model.model.label_readout
    explainer = Explainer.of(readout, np.arange(100), np.zeros((0, 4), dtype=bool))
    panel = explainer.panel
    genes = np.array(random.sample(panel.gene_ids.tolist(), 12))
    cells = Cells([0, 12], genes, np.array([random.randint(1, 9) for _ in genes]), np.zeros(1, np.uint64))
    _, positions, values = panel.profiles(cells)
    profile = np.zeros(len(panel.gene_ids), dtype=np.float32)
    profile[positions] = values
    scores = (profile @ panel.weights + panel.bias) / panel.temperature
    rival = int(explainer.find_rivals(scores[None], np.array([own]))[0])
    terms, _ = explainer.terms(slice(None), profile, own, rival)
    halfway = (explainer.centroids[:, own] + explainer.centroids[:, rival]) / 2
    constant = ((halfway @ panel.weights + panel.bias) / panel.temperature)[[own, rival]]
    assert terms.sum() == pytest.approx(scores[own] - scores[rival] - (constant[0] - constant[1]), abs=1e-3)
    found, _ = explainer(cells, np.array([own]))
    named = found.genes[0][found.genes[0] != NONE]
    assert found.terms[0, : len(named)].tolist() == pytest.approx(terms[named].tolist(), abs=1e-4)


def test_a_level_grows_with_expression_and_percentiles_count_cells():
    levels = level_of(np.array([1.0, 2, 4, 400, 1e6]), np.full(5, 1e4))
    assert (np.diff(levels[:4].astype(int)) > 0).all()
    assert levels[4] == LEVELS - 1
    histogram = np.zeros((1, LEVELS), dtype=np.int64)
    histogram[0, [10, 20]] = 30, 10  # of a hundred cells; sixty have no count
    found = percentiles(histogram, 100, np.zeros(3, dtype=int), np.array([0, 10, 20]))
    assert found.tolist() == [30, 75, 95]


def test_the_evidence_for_a_type_is_its_planted_markers(explained):
    adata, evidence = explained
    for name, (_, markers) in MARKERS.items():
        genes = adata.obs["scmmgpt_evidence"][adata.obs["cell_type"] == name].str.split(", ")
        first = genes.map(lambda row, markers=markers: len(set(row[:4]) & set(markers)))
        assert first.min() >= 3, name
        table = pd.DataFrame(evidence.group_rows()).query("level == 'label' and name == @name")
        assert set(table.gene.head(4)) == set(markers)
        assert table[table.gene.isin(markers)].marker.all()
        assert (table.expressing > table.elsewhere)[table.gene.isin(markers)].all()
    assert adata.obs["scmmgpt_marker_support"].between(0, 1).all()
    assert (adata.obs["scmmgpt_rival"].astype(str) != adata.obs["scmmgpt_cell_type"].astype(str)).all()


def test_the_table_of_a_cell_has_its_counts_and_the_markers_that_it_lacks(explained):
    adata, evidence = explained
    rows = pd.DataFrame(list(evidence.cell_rows(adata.obs_names)))
    for row in rows.sample(200, random_state=0).itertuples():
        count = adata[row.name, row.gene].X.toarray().item()
        assert row.count == count
        values = adata[:, row.gene].X.toarray().ravel() / adata.X.sum(axis=1).A1
        mine = min(count / adata[row.name].X.sum(), HIGHEST / 1e4)  # higher rates share one level of expression
        values = values.clip(max=HIGHEST / 1e4)
        assert row.percentile >= 100 * (values < mine * 0.85).mean() - 1e-3
        assert row.percentile <= 100 * (values <= mine * 1.15).mean() + 1e-3
        if count == 0:
            assert (row.term, row.marker) == (0, True)


def test_evidence_does_not_depend_on_batches_other_cells_or_the_order_of_genes(pipeline, explained):
    adata, _ = explained
    other = adata[5:25, ::-1].copy()
    pipeline.explain(other, batch_size=3)
    assert other.obs["scmmgpt_evidence"].tolist() == adata.obs["scmmgpt_evidence"][5:25].tolist()


def test_the_runner_up_is_a_candidate_where_there_are_some(pipeline):
    adata = synthetic_adata()
    known = list(pipeline.model.config.annotation["labels"])
    of = {}
    for number in range(2, len(known) + 1):
        pipeline.annotate(adata, known[:number])
        rows = pipeline.explain(adata).group_rows()
        assert {row["rival"] for row in rows} <= set(known[:number])
        of[number] = adata.obs["scmmgpt_rival"].astype(str).to_numpy()
        assert set(of[number]) <= {*known[:number], ""}
    assert (of[2] != of[len(known)]).any(), "a label that is no candidate was the best other one"
    pipeline.annotate(adata, known[:1])
    pipeline.explain(adata)  # no other candidate: any label
    assert set(adata.obs["scmmgpt_rival"].astype(str)) & set(known[1:])


def test_any_labels_can_be_explained_broader_ones_and_unknown_ones_too(pipeline):
    adata = synthetic_adata()
    adata.obs["mine"] = adata.obs["cell_type"].astype(str).replace({"B cell": "Lymphocytes", "monocyte": "martian"})
    evidence = pipeline.explain(adata, "mine")
    of = adata.obs.groupby("mine", observed=True)["scmmgpt_rival"].unique().map(list).to_dict()
    assert of["Lymphocytes"] == ["monocyte"], "the only type that is not a lymphocyte"
    assert of["martian"] == [""]
    assert not {"martian"} & {row["name"] for row in evidence.group_rows()}
    assert (adata.obs["scmmgpt_evidence"][adata.obs["mine"] == "martian"] == "").all()
    assert adata.obs["scmmgpt_marker_support"].isna().sum() == 15


def test_labels_of_which_none_is_known_bring_a_warning_and_no_evidence(pipeline, caplog):
    adata = synthetic_adata()
    adata.obs["cluster"] = [str(i % 2) for i in range(adata.n_obs)]
    assert pipeline.explain(adata, "cluster").group_rows() == []
    assert "No cell has evidence: the checkpoint knows no label of obs['cluster'] ('0', '1')." in caplog.text
    caplog.clear()
    pipeline.explain(adata, "cell_type")
    assert "No cell has evidence" not in caplog.text


def test_members_are_found_in_any_words():
    terms = [{"id": "CL:1", "name": "t cell", "names": ["t cell"], "labels": ["CD4 T", "CD8 T"]}]
    members = label_members(["T cells", "CD8-T", UNKNOWN], {"CD4 T": 0, "B": 1, "CD8 T": 2}, terms)
    assert members.tolist() == [[True, False, True], [False, False, True], [False] * 3]
    kinds = ["gamma-delta T cells", "Naive CD4 T", "Non-T cell", "vitamin B"]  # kinds of trained labels mean these
    found = label_members(kinds, {"CD4 T": 0, "B": 1, "CD8 T": 2}, terms)
    assert found.tolist() == [[True, False, True], [True, False, False], [False] * 3, [False] * 3]
    with_genes = ["T Cell GZMK", "B cell CD79A", "T cell TRBV4-2_high", "NK/T Cell GNLY", "GZMK", "T CELL"]
    found = label_members(with_genes, {"CD4 T": 0, "B": 1, "B cell": 2}, terms)
    assert found.tolist() == [
        [True, False, False],
        [False, False, True],
        [True, False, False],
        [False] * 3,
        [False] * 3,
        [True, False, False],
    ]
    of_no_one_type = ["NK/T cells", "B and T cells", "not T cells", "Doublet T cells", "Low_quality T cells"]
    assert not label_members(of_no_one_type, {"CD4 T": 0, "B": 1, "CD8 T": 2}, terms).any()


def test_labels_in_the_words_of_files_mean_types_and_unclear_ones_mean_none():
    known = {
        "CD4 T": 0,
        "B": 1,
        "plasma cell": 2,
        "smooth muscle cell": 3,
        "endothelial cell": 4,
        "macrophage": 5,
        "monocyte": 6,
    }

    def term(number, names, labels):
        return {"id": f"CL:{number}", "name": names[0], "names": names, "labels": labels}

    terms = [
        term(1, ["cd4 t cell"], ["CD4 T"]),
        term(2, ["b cell", "b"], ["B"]),
        term(3, ["plasma cell"], ["plasma cell"]),
        term(4, ["lymphocyte of b lineage"], ["B", "plasma cell"]),
        term(5, ["smooth muscle cell"], ["smooth muscle cell"]),
        term(6, ["endothelial cell"], ["endothelial cell"]),
        term(7, ["mononuclear phagocyte"], ["macrophage"]),
        term(8, ["cell of the vessel"], ["smooth muscle cell", "endothelial cell", "macrophage"]),
    ]
    kinds = [term(9, ["vascular associated smooth muscle cell", "vsmc"], ["smooth muscle cell"])]
    tissues = [term(10, ["liver"], ["macrophage"])]
    meant = {
        "T_CD4": [0],
        "T_cells_CD4": [0],
        "VSMCs": [3],
        "Endo": [4],
        "MNPs": [5],
        "Macrophage Liver": [5],
        "liver_CD4_T": [0],
        "B_Plasma": [1, 2],
        "CD4 T Cell GZMK_high Liver": [0],
        "Macrophage C1QB+ Liver": [5],
        "Macrophage LTB_lo MARCO- Liver": [5],
        "Macrophage FCN3": [5],
        "B cell MS4A1+": [1],
        "T cell CD4": [0],
        "CD14_Mono": [6],
        "HSC": [],
        "B_Endo": [],
        "Macrophage and B": [],
        "liver": [],
        "Macrophage Moon": [],
        "Macrophage C1QB+ Moon": [],
        "cluster 7": [],
        "cluster 7 GZMK_high Liver": [],
        "GZMK_high": [],
        "GZMK_high Liver": [],
        "Liver GZMK_high": [],
        "Doublet Macrophage C1QB_high Liver": [],
    }
    found = label_members(list(meant), known, terms, {"kinds": kinds, "tissues": tissues})
    assert {label: np.flatnonzero(row).tolist() for label, row in zip(meant, found, strict=True)} == meant
    without = label_members(["VSMCs", "Macrophage Liver"], known, terms)  # the checkpoint has the kinds and tissues
    assert not without.any()


def test_a_type_may_be_named_without_the_word_cell_or_the_organ():
    names = {
        "A": ["pancreatic alpha cell"],
        "B": ["beta cell of pancreatic islet"],
        "NK": ["nk cell"],
        "D1": ["x d cell"],
    }
    terms = [{"names": words, "labels": [label]} for label, words in names.items()]
    terms += [{"names": ["mature alpha beta t cell"], "labels": ["T"]}, {"names": ["y d cell"], "labels": ["D2"]}]
    found = {label: labels_in_short(label, terms) for label in ("Alpha", "beta", "NK", "d", "alpha beta", "0")}
    assert found == {"Alpha": ["A"], "beta": ["B"], "NK": ["NK"], "d": [], "alpha beta": [], "0": []}
    terms += [{"names": ["nk cell", "z cell"], "labels": ["NK", "A"]}, {"names": ["x dd cell"], "labels": ["D1"]}]
    terms += [{"names": ["y dd cell"], "labels": ["D2"]}]
    assert labels_in_short("NK", terms) == ["NK"]  # the narrowest
    assert labels_in_short("dd", terms) == []  # of two types, of which neither is above the other


def test_a_checkpoint_without_a_readout_says_so(adata, tiny_pipeline):
    with pytest.raises(ValueError, match="no label readout"):
        tiny_pipeline.explain(adata, "cell_type")


def test_deleting_the_named_genes_lowers_the_score_more_than_random_genes(pipeline):
    result = evaluate_evidence(pipeline, synthetic_adata(seed=2), n_draws=2)
    assert result["n_cells"] == 60
    assert result["ways"]["random expressed genes"]["named_drop_more"] >= 0.95
    assert result["ways"]["named genes"]["drop"] > result["ways"]["random expressed genes"]["drop"]


def test_annotate_writes_a_table_of_evidence(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    out, table = tmp_path / "out.h5ad", tmp_path / "evidence.csv"
    words = ["annotate", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "checkpoint"), "-o", str(out)]
    assert main([*words, "--evidence", str(table), "--cluster-key", "donor_id", "--quiet"]) == 0
    rows = pd.read_csv(table)
    assert set(rows.level) == {"label", "cluster", "cell"}
    assert rows.query("level == 'cell'").groupby("name").size().max() <= 2 * N_GENES
    annotated = anndata.read_h5ad(out)
    assert annotated.obs["scmmgpt_evidence"].str.len().min() > 0
    assert annotated.uns["scmmgpt"]["explain"]["gene"].tolist() == rows.query("level == 'label'").gene.tolist()
    assert main(["verify", str(out), "--quiet"]) == 0
    assert main([*words, "--evidence", str(tmp_path / "evidence.png")]) == 2
