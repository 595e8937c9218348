"""Given labels are judged by model and markers, and planted wrong ones come first."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from scmmgpt import crossfit_scmmgpt, judging_scmmgpt, synthetic
from scmmgpt.__main__ import main
from scmmgpt.audit_scmmgpt import Audit, judge
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.crossfit_scmmgpt import FileRegression, best_other_label, folds_of
from scmmgpt.eval.audit import best_other, confident_scores, evaluate_audit, overlap, plant, precision_at
from scmmgpt.eval.audit import main as evaluate
from scmmgpt.synthetic import synthetic_adata


SWAPPED = {"cell-0": "monocyte", "cell-5": "natural killer cell"}  # a B cell and a T cell


@pytest.fixture
def swapped():
    """Cells of which two have wrong labels."""
    adata = synthetic_adata()
    labels = adata.obs["cell_type"].astype(str)
    for name, label in SWAPPED.items():
        labels[name] = label
    adata.obs["given"] = labels
    return adata


def audit_of(odds, marker_odds, novel=(), clusters=None, file=None, given=None):
    n = len(odds)
    is_novel = np.isin(np.arange(n), novel)
    words = np.full(n, "B"), np.full(n, "T"), np.full(n, "CD3E, CD3D", dtype=object)
    file = np.full((2, n), np.nan) if file is None else np.array([file, file], float)
    arrays = np.array(odds, float), np.array(marker_odds, float), *file, words[2], is_novel, words[1]
    return Audit(words[0] if given is None else np.array(given), words[1], *arrays, clusters)


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.integers(0, 2))
def test_the_best_other_label_never_means_the_given_one(weights, own):
    p = np.array([weights]) / sum(weights)
    best, odds = judge(p, np.eye(3, dtype=bool), np.array([own]))
    others = np.delete(p[0], own)
    assert best[0] != own
    assert odds[0] == pytest.approx(np.log(others.max() / p[0, own]))
    assert (odds[0] > 0) == (p[0].argmax() != own) or np.isclose(odds[0], 0)


def test_a_broad_label_has_the_probability_of_all_that_it_means():
    p, members = np.array([[0.3, 0.3, 0.4]]), np.array([[True, True, False]])
    best, odds = judge(p, members, np.array([0]))
    assert best[0] == 2
    assert odds[0] == pytest.approx(np.log(0.4 / 0.6))


def test_verdicts_need_both_witnesses_and_a_model_that_knows_the_cell():
    audit = audit_of([5, 5, 5, 1, -1, np.nan, 5], [2, -2, np.nan, 2, 2, 2, 2], novel=[6])
    verdicts = ["contradicted", "doubtful", "doubtful", "doubtful", "supported", "not judged", "not judged"]
    assert audit.verdict.tolist() == verdicts
    assert audit.order().tolist() == [0, 2, 1, 3, 4]
    assert [row["verdict"] for row in audit.cell_rows("abcdefg")] == verdicts[:1] + ["doubtful"] * 3


def test_the_file_outweighs_a_model_that_contradicts_few_cells_of_a_label():
    file = [5, -5, -5, -5, 1, np.nan]
    audit = audit_of([np.nan, 9, -5, -5, -5, 9], np.ones(6), file=file)
    verdicts = ["contradicted", "doubtful", "supported", "supported", "doubtful", "contradicted"]
    assert audit.verdict.tolist() == verdicts
    assert audit.score[:5].tolist() == file[:5]
    assert audit.score[5] == 10  # of a label with few cells: model and markers


def test_a_label_that_the_model_contradicts_as_a_whole_is_contradicted_though_the_file_supports_it():
    given = np.array(["right"] * 4 + ["wrong"] * 4)
    audit = audit_of([-5, -5, -5, 9, 9, 9, 9, -5], np.ones(8), file=[-5] * 8, given=given)
    assert audit.verdict.tolist() == ["supported"] * 3 + ["doubtful"] + ["contradicted"] * 3 + ["supported"]
    assert [row["name"] for row in audit.group_rows()] == ["wrong", "right"]


def test_labels_that_are_swapped_or_renamed_as_a_whole_are_contradicted(pipeline):
    for renamed in ({"B cell": "monocyte", "monocyte": "B cell"}, {"T cell": "erythrocyte", "B cell": "T cell"}):
        adata = synthetic_adata(200)
        truth = adata.obs["cell_type"].astype(str)
        adata.obs["given"] = truth.replace(renamed)
        audit = pipeline.audit(adata, "given")
        known = truth.isin(renamed) & (adata.obs["given"] != "erythrocyte")  # the model does not know this one
        assert set(adata.obs["scmmgpt_audit"][known]) == {"contradicted"}
        assert set(adata.obs["scmmgpt_audit"][~known]) == {"supported"}
        assert (audit.file_odds < 0).all()  # the file sees nothing
        assert (adata.obs["scmmgpt_audit_suggested"][known] == truth[known]).all()


def test_a_label_that_the_checkpoint_does_not_know_is_judged_by_the_file(pipeline):
    adata = synthetic_adata(200)
    truth = adata.obs["cell_type"].astype(str).replace({"B cell": "blarb", "T cell": "twonk"})
    adata.obs["given"] = truth
    first = int(np.flatnonzero(truth == "blarb")[0])
    adata.obs.iloc[first, adata.obs.columns.get_loc("given")] = "twonk"
    audit = pipeline.audit(adata, "given")
    assert audit.order()[0] == first
    assert audit.suggested[first] == "blarb"
    assert set(audit.genes[first].split(", ")[:3]) <= set(synthetic.MARKERS["B cell"][1])
    assert audit.verdict[first] in ("contradicted", "doubtful")
    assert set(np.delete(audit.verdict, first)) == {"supported"}


def test_a_label_of_one_cell_is_judged_by_the_model_alone(pipeline):
    adata = synthetic_adata(100)
    given = adata.obs["cell_type"].astype(str).to_numpy().astype(object)
    lone = int(np.flatnonzero(given == "B cell")[0])
    given[lone] = "CD4-positive, alpha-beta T cell"
    adata.obs["given"] = given
    audit = pipeline.audit(adata, "given")
    assert np.isnan(audit.file_odds[lone])
    assert np.isfinite(np.delete(audit.file_odds, lone)).all()


def cells_of_two_types(n_cells, seed):
    """Counts of 40 genes, of which the first half is higher in the first half of the cells."""
    rng = np.random.default_rng(seed)
    types = np.arange(n_cells) * 2 // n_cells
    counts = rng.poisson(np.where((np.arange(40) < 20) == (types[:, None] == 0), 6, 1))
    ids = np.arange(n_cells, dtype=np.uint64)
    return Cells.from_csr(csr_matrix(counts.astype(np.float32)), np.arange(40), ids), types


def test_the_file_knows_types_and_no_labels_drawn_at_random():
    cells, types = cells_of_two_types(200, 0)
    every = np.arange(200)
    given = np.where(every == 7, 1 - types, types)
    logs = FileRegression.of(cells, given, 2).log_probabilities(cells)
    assert (logs.argmax(axis=1) == types).all()  # also of the cell with the wrong label, which was not fitted with it
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1)
    found = []
    for seed in range(10):
        drawn = np.random.default_rng(seed).integers(2, size=200)
        found.append((FileRegression.of(cells, drawn, 2).log_probabilities(cells).argmax(axis=1) == drawn).mean())
    assert np.mean(found) < 0.55  # each cell by a regression without it: none has learned labels by heart


def test_equal_cells_do_not_vouch_for_each_other_and_arrays_restore_a_regression():
    cells, types = cells_of_two_types(200, 0)
    assert (folds_of(cells) == folds_of(cells[np.arange(200)[::-1]])[::-1]).all()
    twice = Cells.concatenate([cells, cells])
    assert (folds_of(twice)[:200] == folds_of(twice)[200:]).all()
    file = FileRegression.of(cells, types, 2)
    again = FileRegression.of_arrays({**file.as_arrays(), "sets": np.array(["a"])})
    np.testing.assert_array_equal(again.log_probabilities(cells[:9]), file.log_probabilities(cells)[:9])
    assert FileRegression.of_arrays({"sets": np.array(["a"])}) is None


def test_a_checkpoint_that_is_no_better_than_chance_counts_for_nothing_beside_the_file():
    cells, types = cells_of_two_types(200, 0)
    file = FileRegression.of(cells, types, 2)
    logs = file.log_probabilities(cells)
    noise = np.log(np.random.default_rng(2).dirichlet(np.ones(2), size=200))
    assert file.believing(logs, noise, types).belief[1] <= 0.1
    right = np.log(np.where(np.arange(2) == types[:, None], 0.99, 0.01))
    assert file.believing(np.zeros((200, 2)), right, types).belief[1] > 0


def test_clusters_are_ranked_by_their_share_of_contradicted_cells():
    audit = audit_of([5, 5, -5, 5], [1, 1, 1, 1], clusters=np.array(["x", "y", "x", "y"]))
    clusters = [row for row in audit.group_rows() if row["level"] == "cluster"]
    assert [(row["name"], row["contradicted"], row["suggested"]) for row in clusters] == [
        ("y", 1, "T"),
        ("x", 0.5, "T"),
    ]
    assert clusters[0]["genes"] == "CD3E, CD3D"


def test_planted_labels_come_first_with_the_right_suggestion_and_its_genes(pipeline, swapped):
    truth = swapped.obs["cell_type"].astype(str)
    audit = pipeline.audit(swapped, "given")
    rows = pd.DataFrame(audit.cell_rows(swapped.obs_names)).head(2)
    assert set(rows.name) == set(SWAPPED)
    assert (rows.verdict == "contradicted").all()
    for row in rows.itertuples():
        assert row.suggested == truth[row.name]
        assert set(row.genes.split(", ")[:3]) <= set(synthetic.MARKERS[truth[row.name]][1])
    assert swapped.obs["scmmgpt_audit"].value_counts().to_dict() == {"supported": 58, "contradicted": 2}
    assert swapped.uns["scmmgpt"]["audit"]["contradicted"] == 2


def test_labels_in_other_words_are_judged_and_unknown_ones_are_not(pipeline, swapped, caplog):
    words = {"B cell": "B-cells", "T cell": "Lymphocyte", "natural killer cell": "NK weird"}
    swapped.obs["mine"] = swapped.obs["cell_type"].astype(str).replace(words)
    rows = {row["name"]: row for row in pipeline.audit(swapped, "mine").group_rows()}
    assert rows["NK weird"]["suggested"] == "natural killer cell"
    assert "100% of the cells with 'NK weird' are 'natural killer cell'" in caplog.text
    verdicts = swapped.obs.groupby("mine", observed=True)["scmmgpt_audit"].unique().map(list)
    assert verdicts.to_dict() == {
        "B-cells": ["supported"],
        "Lymphocyte": ["supported"],
        "NK weird": ["supported"],
        "monocyte": ["supported"],
    }
    assert "1 of 4 labels of obs['mine'] mean no type that the checkpoint knows ('NK weird'" in caplog.text


def test_cells_without_a_label_are_not_judged_and_no_label_is_called_nan(pipeline, swapped, caplog):
    swapped.obs["mine"] = swapped.obs["cell_type"].astype(object)
    swapped.obs.iloc[:6, swapped.obs.columns.get_loc("mine")] = np.nan
    audit = pipeline.audit(swapped, "mine")
    assert "6 of 60 cells have no label in obs['mine']: not judged." in caplog.text
    assert "mean no type" not in caplog.text
    assert set(audit.verdict[:6]) == {"not judged"}
    assert "nan" not in {row["name"] for row in audit.group_rows()}


def test_the_order_and_the_batches_of_the_cells_change_no_judgement(pipeline, swapped):
    turned = swapped[::-1].copy()
    pipeline.audit(swapped, "given")
    pipeline.audit(turned, "given", batch_size=2)
    for name in ("scmmgpt_audit", "scmmgpt_audit_suggested", "scmmgpt_audit_genes"):
        assert turned.obs[name].tolist()[::-1] == swapped.obs[name].tolist()
    scores = turned.obs["scmmgpt_audit_score"].to_numpy()[::-1]
    assert scores.tolist() == pytest.approx(swapped.obs["scmmgpt_audit_score"].tolist(), abs=1e-2)


def test_a_cell_without_counts_is_not_judged(pipeline, swapped):
    swapped.X = swapped.X.toarray()
    swapped.X[0] = 0
    pipeline.audit(swapped, "given")
    assert swapped.obs["scmmgpt_audit"].iloc[0] == "not judged"


def test_a_checkpoint_without_a_readout_judges_by_model_and_file(tiny_pipeline, adata):
    tiny_pipeline.model.config.annotation = {"labels": {"B cell": "a B cell", "T cell": "a T cell"}}
    tiny_pipeline.audit(adata, "cell_type")
    assert "contradicted" not in set(adata.obs["scmmgpt_audit"])
    unknown = adata[adata.obs["cell_type"] == "monocyte"]  # the file judges these
    assert set(unknown.obs["scmmgpt_audit"]) <= {"supported", "doubtful"}


def test_an_audit_leaves_the_annotation_of_the_cells_as_it_is(pipeline, swapped):
    pipeline.annotate(swapped, ["T cell", "monocyte"])
    before = swapped.obs["scmmgpt_cell_type"].tolist(), dict(swapped.uns["scmmgpt"]["annotate"])
    audit = pipeline.audit(swapped, "given")
    assert (swapped.obs["scmmgpt_cell_type"].tolist(), dict(swapped.uns["scmmgpt"]["annotate"])) == before
    assert audit.summary()["contradicted"] == 2


def test_the_command_writes_obs_and_a_ranked_table(pipeline, swapped, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    swapped.write_h5ad(tmp_path / "cells.h5ad")
    out, table = str(tmp_path / "out.h5ad"), tmp_path / "table.csv"
    words = ["audit", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "checkpoint"), "-o", out, "--quiet"]
    words += ["--label-key", "given", "--cluster-key", "donor_id", "--table", str(table), "--json"]
    capsys.readouterr()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["contradicted"] == 2
    rows = pd.read_csv(table)
    assert (
        rows[rows.level == "cell"].name.head(2).tolist()
        == anndata.read_h5ad(out)
        .obs.query("scmmgpt_audit == 'contradicted'")
        .sort_values("scmmgpt_audit_score", ascending=False)
        .index.tolist()
    )
    assert rows.level.unique().tolist() == ["label", "cluster", "cell"]
    assert main(["verify", out, "--quiet"]) == 0


def test_planting_replaces_the_share_and_precision_counts_it():
    truth = np.repeat(["a", "b"], 50)
    given = plant(truth, 0.1, 0)
    assert (given != truth).sum() == 10
    assert plant(truth, 0.1, 0, np.full(100, "c")).tolist().count("c") == 10
    assert precision_at((given != truth).astype(float), given != truth, 10) == 1
    assert best_other(np.array([[1.0, 4.0]]), np.array(["a", "b"]), np.array(["a"])).tolist() == [3]


def test_the_evaluation_ranks_planted_labels_above_chance(pipeline):
    train, test = synthetic_adata(200, seed=3), synthetic_adata(120, seed=4)
    labels = [np.asarray(cells.obs["cell_type"]).astype(str) for cells in (train, test)]
    result = evaluate_audit(pipeline, test, labels[1], test, (train, labels[0]), seeds=1)
    for kind in ("any", "near"):
        precision = result["kinds"][kind]["precision"]
        assert precision["audit: file and model"] == [1]
        assert min(precision["markers of the labels"]) > 0.5
        assert max(precision["random"]) < 0.5
    assert confident_scores(test, labels[1], 0).max() < 0


def test_a_label_that_means_a_common_type_is_no_planted_fault():
    names = np.array(["B cell", "CD4 T cell", "T cell"])
    same = overlap(np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=bool), names)
    truth = np.repeat(["B cell", "CD4 T cell", "T cell"], 20)
    given = plant(truth, 0.5, 0, same=same)
    assert set(given[truth != "B cell"]) == {"B cell", "CD4 T cell", "T cell"}
    assert not ((given == "T cell") & (truth == "CD4 T cell")).any()
    assert not ((given == "CD4 T cell") & (truth == "T cell")).any()
    with pytest.raises(ValueError, match=r"No wrong label can be planted for 'CD4 T cell'.*exclude each other"):
        overlap(np.array([[1, 0], [1, 1]], dtype=bool), names[1:])


def test_the_evaluation_judges_all_cells_by_a_checkpoint_as_it_is(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    adata = synthetic_adata(120, seed=4)
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    labels[:7] = "neither known nor judged"
    adata.obs["cell_type"] = labels
    adata.X = np.log1p(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X)  # counts are recovered
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["--adata", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "out"), "--seeds", "2"]
    capsys.readouterr()
    assert evaluate([*words, "--model", str(tmp_path / "checkpoint")]) == 0
    assert '"n_cells": 113, "n_planted": 6, "left_out": {"neither known nor judged": 7}' in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    precision = result["kinds"]["any"]["precision"]
    assert precision["audit: file and model"] == [1, 1]
    assert min(precision["markers of the labels"]) > 0.5
    assert max(precision["random"]) < 0.5


def test_many_labels_are_judged_a_few_cells_at_a_time_with_the_same_answers(pipeline, monkeypatch):
    found, sizes = [], []

    def spied(logs, *rest):
        sizes.append(len(logs))
        return best_other_label(logs, *rest)

    monkeypatch.setattr(judging_scmmgpt, "best_other_label", spied)
    for at_once in (512, 16):
        monkeypatch.setattr(judging_scmmgpt, "CELLS_AT_ONCE", at_once)
        adata = synthetic_adata(100)
        adata.obs["given"] = [f"cluster {i % 9}" for i in range(100)]
        audit = pipeline.audit(adata, "given")
        found.append([audit.verdict, audit.score, audit.suggested, audit.genes, audit.file_odds])
    assert sizes == [100, 16, 16, 16, 16, 16, 16, 4]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_regression_of_a_fold_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    numbers = rng.integers(4, size=300)
    places = (rng.normal(size=(300, 6)) + numbers[:, None] * np.arange(6) / 4).astype(np.float32)
    weights, bias = crossfit_scmmgpt._fit(places, numbers, 4)
    sklearn = LogisticRegression(C=1 / crossfit_scmmgpt.PENALTY, tol=1e-8).fit(places, numbers)
    np.testing.assert_allclose(weights.T, sklearn.coef_, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(
        bias - bias.mean(), sklearn.intercept_ - sklearn.intercept_.mean(), rtol=0.01, atol=0.01
    )


def test_a_rare_label_of_a_large_file_is_among_the_cells_that_are_fitted(pipeline, monkeypatch):
    monkeypatch.setattr(judging_scmmgpt, "FITTED_CELLS", 128)
    adata = synthetic_adata(700)
    labels = adata.obs["cell_type"].astype(str).to_numpy().astype(object)
    rare = np.arange(300, 324, 4)  # of one type, in rows that no block has
    labels[rare] = "rare"
    adata.obs["given"] = labels
    audit = pipeline.audit(adata, "given")
    assert np.isfinite(audit.file_odds[rare]).all()
    blocks = judging_scmmgpt.spread_rows(700, 128)
    assert judging_scmmgpt.rows_of_rare(np.searchsorted(np.unique(labels), labels), blocks, 4096)[:2] != []
    assert not any(start <= row < stop for row in rare for start, stop in blocks)


def test_labels_that_are_drawn_more_often_are_as_probable_as_in_the_file():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, size=(400, 40)).astype(np.float32)  # nothing tells the labels apart
    cells = Cells.from_csr(csr_matrix(counts), np.arange(40), np.arange(400, dtype=np.uint64))
    drawn, of_all = np.arange(400) % 2, np.arange(4000) % 10 // 9
    p = np.exp(FileRegression.of(cells, drawn, 2, of_all).log_probabilities(cells))
    assert p[:, 1].mean() == pytest.approx(0.1, abs=0.03)
