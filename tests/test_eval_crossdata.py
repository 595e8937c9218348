"""Datasets left out: who sees which cells, a readout pooled over datasets of different genes, and learning curves."""

import json
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.sparse import csr_matrix

from scmmgpt.eval import abstention, candidates, crossdata, learning_curve
from scmmgpt.eval.annotation import hierarchical_f1, resampled_scores
from scmmgpt.regression_scmmgpt import solve_groups
from scmmgpt.train import pooled
from scmmgpt.train.pooled import Dataset, fit_pooled_readout


MARKERS = {"B cell": ["MS4A1", "CD79A"], "T cell": ["CD3D", "CD3E"], "myeloid": ["LYZ", "CD14"]}
GENES = [gene for pair in MARKERS.values() for gene in pair]
GENES += "ACTB GAPDH B2M RPL3 RPS6 RPL5 RPL7 RPS3 RPS4X TMSB4X RPL8 RPL9 RPL11 RPL12 RPL13 RPL14 RPL15 RPL18".split()


def labelled_counts(types, genes, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(4.0, (len(types), len(GENES)))
    for row, name in enumerate(types):
        for marker in GENES[:6]:
            counts[row, GENES.index(marker)] = rng.poisson(30 if marker in MARKERS[name] else 0.5)
    counts = counts * rng.uniform(0.5, 2, len(GENES)).round(1)  # every laboratory has its own scale of a gene
    return counts.round()[:, [GENES.index(gene) for gene in genes]]


@pytest.fixture
def folder(tmp_path):
    """Three files: two of all genes, and a panel without one marker of each type."""
    panel = [gene for gene in GENES if gene not in ("MS4A1", "CD3E", "CD14")]
    (tmp_path / "tables").mkdir()
    table = {name: {"coarse": name, "fine": f"{name}, fine"} for name in MARKERS}
    classes = {name: {"_col": "own", **table, "doublet": None} for name in ("one", "two", "panel")}
    (tmp_path / "tables" / "label_classes.json").write_text(json.dumps(classes))
    for seed, (name, genes) in enumerate({"one": GENES, "two": GENES, "panel": panel}.items()):
        types = np.array(list(MARKERS))[np.arange(60) % 3]
        counts = csr_matrix(labelled_counts(types, genes, seed).astype(np.float32))
        own = np.where(np.arange(60) < 57, types, "doublet")
        obs = pd.DataFrame({"own": own}, index=[f"{name}{i}" for i in range(60)])
        anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


def test_no_cell_of_the_left_out_dataset_is_trained_on(folder):
    sets, n_genes = crossdata.read_sets(folder, "coarse", max_cells=10)
    assert [len(part.labels) for part in sets] == [30, 30, 30]  # ten of a label, no doublets
    case = crossdata.leave_out(sets, "panel", "all", n_genes)
    assert [part.name for part in case.train] == ["one", "two"]
    assert case.classes == sorted(MARKERS)
    assert len(case.test.measured) == len(GENES) - 3


def test_a_share_of_the_training_cells_keeps_every_label(folder):
    sets, _ = crossdata.read_sets(folder, "coarse", max_cells=10)
    for share, n_cells in ((0.3, 9), (0.01, 3)):
        part = crossdata.thin(sets[0], share)
        assert len(part.cells) == len(part.types) == n_cells
        assert set(part.labels) == set(MARKERS)


def test_the_task_writes_a_table_and_resumes(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    names = [crossdata.MODEL, "logistic regression, 4,000 genes"]
    words = ["--data", str(folder), "--output", str(out), "--systems", *names]
    assert crossdata.main(words) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["system"] for row in rows] == names
    assert rows[0]["by_set"]["panel"] > 0.95
    assert rows[0]["interval"][0] <= rows[0]["mean"] <= rows[0]["interval"][1]
    table = capsys.readouterr().out
    assert "| pooled readout |" in table
    (entry,) = yaml.safe_load((out / "eval_results.yaml").read_text())
    assert entry["value"] == round(rows[0]["mean"], 4)
    monkeypatch.setattr(crossdata, "SYSTEMS", dict.fromkeys(crossdata.SYSTEMS))  # nothing is computed again
    assert crossdata.main(words) == 0
    with pytest.raises(ValueError, match="--sets names"):
        crossdata.main([*words, "--sets", "three"])
    with pytest.raises(ValueError, match="other cells or options"):
        crossdata.main([*words, "--max-cells", "5"])


def test_a_dataset_whose_classes_no_other_has_is_not_scored(folder, tmp_path):
    table = json.loads((folder / "tables" / "label_classes.json").read_text())
    for name in MARKERS:
        table["panel"][name] = {"coarse": f"{name} of the panel"}
    (folder / "tables" / "label_classes.json").write_text(json.dumps(table))
    words = ["--data", str(folder), "--output", str(tmp_path / "out"), "--systems", crossdata.MODEL]
    assert crossdata.main(words) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert sorted(row["by_set"]) == ["one", "two"]


def test_a_class_that_the_datasets_hardly_show_is_known_by_its_reference_profile(folder):
    table = json.loads((folder / "tables" / "label_classes.json").read_text())
    terms = {"B cell": "CL:0000236", "T cell": "CL:0000084", "myeloid": "CL:0000235"}
    for labels in table.values():
        labels |= {name: {"coarse": name, "fine": term} for name, term in terms.items()}
    (folder / "tables" / "label_classes.json").write_text(json.dumps(table))
    words = ["--data", str(folder), "--output", str(folder / "out"), "--systems", crossdata.WITH_PROFILES]
    with pytest.raises(FileNotFoundError, match="with reference profiles' needs; leave it out"):
        crossdata.main(words)
    assert crossdata.WITH_PROFILES not in crossdata.chosen_systems(None, folder)
    own = {"B cell": "B cell_CordBlood1", "T cell": "T cell_CordBlood1", "myeloid": "Macrophage_AdultLung1"}
    profiles = {own[name]: [50.0 if gene in MARKERS[name] else 1.0 for gene in GENES] for name in MARKERS}
    profiles["Hepatocyte_AdultLiver1"] = [50.0 if gene == "B2M" else 1.0 for gene in GENES]
    path = folder / "tables" / "hcl_pseudobulk_ref.csv.gz"
    pd.DataFrame(profiles, index=GENES).to_csv(path)
    assert crossdata.chosen_systems(None, folder) == list(crossdata.SYSTEMS)
    sets, n_genes = crossdata.read_sets(folder, "coarse", max_cells=20)
    sets[0] = sets[0].take(np.flatnonzero(sets[0].labels != "B cell"))
    for part in sets[1:2]:  # the B cells of the other dataset are those of an empty drop
        part.cells.counts[np.repeat(part.labels == "B cell", np.diff(part.cells.indptr))] = 1
    case = crossdata.leave_out(sets, "panel", "all", n_genes, folder)
    names = np.array(case.classes)
    found = {
        known: names[crossdata.pooled_by_types(case, profiles=known).argmax(axis=1)] == case.test.labels
        for known in (False, True)
    }
    b_cells = case.test.labels == "B cell"
    assert found[True][b_cells].mean() > found[False][b_cells].mean() + 0.3
    assert found[True].mean() > 0.9


@pytest.mark.parametrize("words", [["--max-cells", "0"], []])
def test_a_wrong_command_line_is_an_error_of_one_line(words, capsys):
    with pytest.raises(SystemExit):
        crossdata.main(words)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_labels_of_datasets_are_freed_of_the_datasets_levels():
    cells = np.array([[[1.0], [11.0]], [[3.0], [0.0]]])  # two labels in the first dataset, one in the second
    known = np.array([[[True], [True]], [[True], [False]]])
    means = pooled.two_way_means(cells, known, n_rounds=500)
    difference = (means[1] - means[0]).item()
    assert -1 < difference < 2  # 3 - 1 where a dataset has both, shrunk; the plain means differ by 3 - 6
    unmeasured = pooled.two_way_means(cells[:, :, [0, 0]], np.concatenate([known, known & False], axis=2))
    assert np.isnan(unmeasured[:, 1]).all()


def test_every_label_and_every_dataset_has_the_same_weight():
    rng = np.random.default_rng(0)
    few = Dataset(csr_matrix(rng.poisson(5.0, (6, 4)).astype(np.float32)), np.arange(4), np.array([0, 0, 0, 1, 1, 1]))
    rows = np.repeat(np.arange(6), 5)
    many = Dataset(few.counts[rows], few.measured, few.targets[rows])
    once, often = fit_pooled_readout([few], 2), fit_pooled_readout([many], 2)
    np.testing.assert_allclose(once.weights, often.weights, atol=2e-3)
    both = fit_pooled_readout([few, many], 2)
    np.testing.assert_allclose(both.weights, once.weights, atol=2e-3)


def test_a_label_without_a_cell_is_refused():
    data = Dataset(csr_matrix(np.ones((2, 3), dtype=np.float32)), np.arange(3), np.array([0, 1]))
    with pytest.raises(ValueError, match="1 of 3 labels have no cell"):
        fit_pooled_readout([data], 3)


def test_resampled_scores_are_macro_f1_of_the_resampled_cells():
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice(["a", "b", "c"], 40), rng.choice(["a", "b", "c", "d"], 40)
    draws = rng.integers(40, size=(5, 40))
    expected = [crossdata.macro_f1(truth[rows], predicted[rows]) for rows in draws]
    counts = np.stack([np.bincount(rows, minlength=40) for rows in draws])
    np.testing.assert_allclose(resampled_scores(predicted, truth, counts)["macro_f1"], expected)


def test_the_lead_is_that_of_the_row_with_reference_profiles_by_dataset():
    truth = np.array(["B cell", "T cell"] * 20)
    half = np.where(np.arange(40) < 20, truth, "B cell")
    answers = {crossdata.MODEL: half, crossdata.WITH_PROFILES: truth, "other": half}
    records = [{"system": name, "set": one, "predicted": a} for name, a in answers.items() for one in ("one", "two")]
    records[-1]["predicted"] = truth  # of the other system in the second dataset
    rows = {row["system"]: row for row in crossdata.summarise(records, {"one": truth, "two": truth})}
    lead = 1 - crossdata.macro_f1(truth, half)
    assert "lead" not in rows[crossdata.WITH_PROFILES]
    assert rows[crossdata.MODEL]["lead"] == pytest.approx(lead)
    value, (low, high) = rows["other"]["lead_by_set"]["one"]
    assert 0 < low < value < high < 1
    assert value == pytest.approx(lead)
    assert rows["other"]["lead_by_set"]["two"] == [0, [0, 0]]


def test_the_readout_of_groups_is_the_ridge_regression_on_the_genes_at_hand():
    rng = np.random.default_rng(0)
    a = {
        "groups": rng.normal(size=(5, 12)),
        "group_mean": rng.normal(size=12),
        "group_weights": np.full(5, 0.2),
        "group_labels": np.eye(3)[[0, 0, 1, 1, 2]],
        "factors": rng.normal(size=(2, 12)),
        "noise": rng.uniform(0.5, 1, 12),
    }
    here = np.arange(12) < 7
    weights, bias = solve_groups(a, here)
    x = (a["groups"] - a["group_mean"])[:, here]
    target = a["group_labels"] - [0.4, 0.4, 0.2]
    moments = x.T @ x / 5 + a["factors"][:, here].T @ a["factors"][:, here] + np.diag(a["noise"][here])
    np.testing.assert_allclose(weights, np.linalg.solve(moments, x.T @ target / 5).T)
    np.testing.assert_allclose(bias, [0.4, 0.4, 0.2] - weights @ a["group_mean"][here])


def test_a_cell_of_a_broad_type_counts_for_each_narrow_type_a_part():
    rng = np.random.default_rng(0)
    counts = csr_matrix(rng.poisson(5.0, (6, 4)).astype(np.float32))
    data = Dataset(counts, np.arange(4), np.array([0, 0, 1, 1, 2, 2]))
    readout = fit_pooled_readout([data], 2, meanings=np.array([[1, 0], [0, 1], [0.5, 0.5]]))
    np.testing.assert_allclose(readout.group_labels, [[1, 0], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(readout.group_weights, [1 / 3, 1 / 3, 1 / 3])


def test_a_cell_may_have_the_classes_of_its_tissue_and_of_blood():
    def part(name, labels, tissue):
        n = len(labels)
        return crossdata.LabelledSet(
            name, None, np.arange(3), np.array(labels), np.array([""] * n), np.full(n, tissue)
        )

    sets = [part("a", ["B cell", "T cell"], "blood"), part("b", ["hepatocyte"], "liver"), part("c", ["neuron"], "")]
    classes = ["B cell", "T cell", "hepatocyte", "neuron"]
    found = crossdata.tissue_candidates(sets, np.array(["Liver", "blood", "", "kidney"]), classes)
    assert found.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_a_neighbour_in_the_ontology_is_half_right():
    t_cell, b_cell, neuron = "CL:0000084", "CL:0000236", "CL:0000540"
    truth, ids = np.array([t_cell, t_cell]), {name: name for name in (t_cell, b_cell, neuron)}
    scores = [
        hierarchical_f1(np.array([t_cell, name]), truth, ids, np.ones((1, 2))).value
        for name in (t_cell, b_cell, neuron)
    ]
    assert scores[0] == 1
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3


@pytest.fixture
def folds(folder):
    sets, n_genes = crossdata.read_sets(folder, "coarse", max_cells=10)
    return learning_curve.make_folds(sets, ["one", "two", "panel"], n_genes)


def test_cells_to_annotate_are_never_trained_on(folds):
    assert [[part.name for part in fold.new] for fold in folds] == [["one"], ["two"], ["panel"]]
    for fold in folds:
        for trained, held_out in zip(fold.train, fold.known, strict=True):
            assert not set(trained.cells.cell_ids) & set(held_out.cells.cell_ids)
            assert (len(trained.labels), len(held_out.labels)) == (24, 6)  # two of ten cells of each type
        assert not {part.name for part in fold.new} & {part.name for part in fold.train}


def test_tokens_are_the_most_expressed_genes_that_a_dataset_measures(folds):
    fold = folds[2]
    data, genes = fold.dataset(fold.new[0]), np.arange(fold.n_genes)
    measured = [fold.dataset(part) for part in fold.train]
    shares = learning_curve.expected_shares(measured, len(fold.classes))
    genes = np.flatnonzero(shares)
    ids, expression, mask = learning_curve.tokenise(data, genes, shares)
    assert (ids[:, 0] == 1).all()
    assert (mask[:, 0] == 1).all()
    first = data.counts[0].toarray().ravel()[genes]
    n_expressed = int((first > 0).sum())
    assert mask[0].sum() == 1 + n_expressed
    assert ids[0, 1] - learning_curve.N_SPECIAL == first.argmax()
    assert (np.diff(expression[0, 1 : 1 + n_expressed]) <= 0).all()


def test_the_other_folds_choose_whether_the_network_counts(folds):
    truth = [
        [np.searchsorted(fold.classes, part.labels)[:, None] == np.arange(3) for part in fold.parts] for fold in folds
    ]
    right = [[np.where(own, -0.1, -5.0) for own in of] for of in truth]
    wrong = [[np.where(own, -5.0, -0.1) for own in of] for of in truth]
    for wide, deep, alone in ((right, wrong, True), (wrong, right, False)):
        chosen = list(learning_curve.stack(folds, wide, deep))
        assert [multiple == 0 for multiple, _ in chosen] == [alone] * 3
        for fold, (_, scores) in zip(folds, chosen, strict=True):
            assert set(learning_curve.scores_of_parts(fold, scores)["new"].values()) == {1.0}


def test_the_learning_curve_computes_no_scores_twice(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["--data", str(folder), "--sets", "one", "two", "panel", "--steps", "2", "--output", str(out)]
    words += ["--shares", "0.1", "1", "--seeds", "2"]
    assert learning_curve.main(words) == 0
    assert "| datasets left out | 10 %" in capsys.readouterr().out
    result = json.loads((out / "results.json").read_text())
    (row,) = (row for row in result["rows"] if (row["system"], row["place"]) == ("linear", "new"))
    assert row["means"]["1.0"][0] > 95
    assert row["slope"][0] >= -1
    monkeypatch.setattr(learning_curve, "SYSTEMS", dict.fromkeys(learning_curve.SYSTEMS))  # nothing is computed again
    assert learning_curve.main(words) == 0
    with pytest.raises(ValueError, match="other cells or options"):
        learning_curve.main([*words, "--steps", "3"])
    with pytest.raises(ValueError, match="three or more"):
        learning_curve.main(["--data", str(folder), "--sets", "one", "two", "--output", str(tmp_path / "other")])


def test_each_type_of_a_class_is_the_only_candidate_of_the_class_in_turn():
    types = [("B cell", "B"), ("T cell", "CD4"), ("T cell", "CD8")]
    labels, own = np.repeat(["B cell", "T cell"], [2, 14]), np.repeat(["B", "CD4", "", "CD8"], [2, 6, 3, 5])
    test = crossdata.LabelledSet("one", None, np.arange(3), labels, own, labels)
    cases = list(candidates.cases_of(crossdata.LeftOutSet([], test, ["B cell", "T cell"], 3, None), types))
    assert [case.kept[1] for case in cases] == ["CD4", "CD8"]
    assert [case.places.tolist() for case in cases] == [[0, 1], [0, 2]]
    assert [case.rows.tolist() for case in cases] == [[11, 12, 13, 14, 15], [2, 3, 4, 5, 6, 7]]  # not the unknown
    assert [case.others.tolist() for case in cases] == [[0, 1], [0, 1]]


def test_a_dataset_of_one_class_has_no_cells_of_other_classes():
    case = crossdata.LeftOutSet([], SimpleNamespace(labels=np.array(["T cell"] * 4), name="one"), [], 3, None)
    one = candidates.CandidateCase(("T cell", "CD4"), np.arange(1), np.arange(4), np.arange(0))
    named = dict.fromkeys(candidates.SYSTEMS, np.array(["T cell", "T cell", "T cell", "B cell"]))
    row = candidates.row_of(case, one, named)
    other = row | {"n_others": 2, "cells_of_candidates": dict.fromkeys(candidates.SYSTEMS, 0.5)}
    result = candidates.summarise([row, other])
    assert result["cells_of_no_candidate"][candidates.READOUT] == {"mean_of_cells": 0.75, "mean_of_cases": 0.75}
    assert result["cells_of_candidates"][candidates.READOUT] == {"mean_of_cells": 0.5, "mean_of_cases": 0.5}
    assert candidates.summarise([row])["cells_of_candidates"] == {}


def test_cells_of_no_candidate_are_named_by_the_command(folder, capsys):
    kinds = {"B cell": ["B1", "B2"], "T cell": ["T1", "T2"], "myeloid": ["M"]}
    table = json.loads((folder / "tables" / "label_classes.json").read_text())
    for name, labels in table.items():
        labels |= {kind: {"coarse": cell, "fine": kind} for cell, of in kinds.items() for kind in of}
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        places = zip(adata.obs["own"].astype(str), range(60), strict=True)
        adata.obs["own"] = [kinds[cell][row % len(kinds[cell])] if cell in kinds else cell for cell, row in places]
        adata.write_h5ad(folder / f"{name}.h5ad")
    (folder / "tables" / "label_classes.json").write_text(json.dumps(table))
    words = ["--data", str(folder), "--leave-out", "candidates"]
    assert abstention.main([*words, "--output", str(folder / "out.json")]) == 0
    result = json.loads((folder / "out.json").read_text())
    cases = [(row["dataset"], row["candidate"]) for row in result["cases"]]
    assert cases == [(name, kind) for name in ("one", "two", "panel") for kind in ("B1", "B2", "T1", "T2")]
    assert result["n_cells"] == sum(row["n_cells"] for row in result["cases"])
    for system in candidates.SYSTEMS:
        assert result["cells_of_candidates"][system]["mean_of_cells"] > 0.95
        shares = [row["cells_of_no_candidate"][system] for row in result["cases"]]
        assert result["cells_of_no_candidate"][system]["mean_of_cases"] == pytest.approx(np.mean(shares))
    found = {system: means["mean_of_cells"] for system, means in result["cells_of_no_candidate"].items()}
    assert found[candidates.READOUT] > max(found[candidates.WITHOUT], 0.9)
    with pytest.raises(ValueError, match="candidates does not take --genes"):
        abstention.main([*words, "--genes", "5"])
