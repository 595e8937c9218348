"""The fine-tuning table: the same cells for all systems, nothing of the test part in training, honest summaries."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.eval import annotators, finetuning
from scmmgpt.eval.annotators import LabelBudget, System
from scmmgpt.eval.cells import read_labelled
from scmmgpt.eval.finetuning import ALL, OTHER_SPLITS


@pytest.fixture
def adata():
    """Eighty cells of two types that one gene tells apart; one cell has no label."""
    rng = np.random.default_rng(0)
    types = np.array(["B", "T"])[np.arange(80) % 2]
    counts = rng.poisson(20.0, (80, 12))
    counts[types == "B", 0] += 60
    obs = pd.DataFrame({"label": np.where(np.arange(80) == 7, "unknown", types)}, index=[f"c{i}" for i in range(80)])
    return anndata.AnnData(
        csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(12)])
    )


@pytest.fixture
def budget(adata):
    labels = adata.obs["label"].replace("unknown", "T").to_numpy().astype(str)
    return LabelBudget(adata[:60].copy(), labels[:60], np.arange(20), adata[60:].copy(), 0)


def draw(labels, **options):
    return finetuning.draw_runs(labels, **{"shots": [2], "seeds": 3, "splits": 2, "test_share": 0.25, **options})


def test_no_test_cell_is_in_training_and_few_labels_are_shown():
    labels = np.array(["a", "b"])[np.arange(40) % 2]
    runs = draw(labels)
    assert [run["setting"] for run in runs] == ["2"] * 3 + [ALL] * 3 + [OTHER_SPLITS]
    for run in runs:
        assert not set(run["train"]) & set(run["test"])
        assert len(run["train"]) + len(run["test"]) == 40
    for run in runs[:3]:
        shown = labels[run["train"]][run["shown"]]
        assert sorted(shown) == ["a", "a", "b", "b"]
    assert len({tuple(run["shown"]) for run in runs[:3]}) == 3
    assert len({tuple(run["test"]) for run in runs}) == 2
    assert [run["setting"] for run in draw(labels, splits=0)] == ["2"] * 3


@pytest.mark.parametrize("system", [annotators.regression, annotators.component_regression, annotators.centroid])
def test_baselines_learn_a_gene_that_tells_types_apart(budget, system):
    truth = np.array(["B", "T"])[np.arange(60, 80) % 2]
    assert (system(budget) == truth).mean() > 0.9


def test_scores_of_a_checkpoint_are_features_of_a_regression(budget):
    truth = np.array(["B", "T"])[np.arange(60, 80) % 2]
    told = {name: 10.0 * (row % 2) - 5 for row, name in enumerate(budget.adata.obs_names)}
    told |= dict(zip(budget.test.obs_names, np.where(truth == "T", 5.0, -5.0), strict=True))
    budget.adata.X, budget.test.X = (
        np.random.default_rng(0).poisson(9.0, part.shape) for part in (budget.adata, budget.test)
    )
    scores = lambda adata: np.array([[told[name]] for name in adata.obs_names])  # noqa: E731
    assert (annotators.component_regression(budget, scores) == truth).all()


def test_celltypist_trains_on_the_shown_cells(budget):
    pytest.importorskip("celltypist", exc_type=ImportError)
    answers = annotators.celltypist(budget)
    assert (answers == np.array(["B", "T"])[np.arange(60, 80) % 2]).mean() > 0.9


def test_one_cell_of_each_label_is_enough_for_a_regression():
    x = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert annotators.cross_validated_regression(x, np.array(["a", "b"]), x).tolist() == ["a", "b"]


def test_answers_that_no_seed_changes_are_computed_once(adata):
    calls = []

    def count(budget):
        calls.append(len(budget.shown))
        return np.full(budget.test.n_obs, "T")

    labels = np.array(["B", "T"])[np.arange(80) % 2]
    runs = draw(labels)
    records = list(finetuning.evaluate(adata, labels, {"it": System(count)}, runs))
    assert len(records) == len(runs) == 7
    assert len(calls) == 5  # three draws of few cells, all cells once, and another split
    again = list(finetuning.evaluate(adata, labels, {"it": System(count)}, runs, done=records))
    assert again == records
    assert len(calls) == 5


def test_what_reads_unlabelled_cells_is_left_out_where_all_are_labelled(adata):
    labels = np.array(["B", "T"])[np.arange(80) % 2]
    systems = {"semi": System(lambda budget: np.full(budget.test.n_obs, "T"), semi_supervised=True)}
    settings = [record["setting"] for record in finetuning.evaluate(adata, labels, systems, draw(labels))]
    assert settings == ["2"] * 3


def test_summaries_and_comparisons_are_over_seeds():
    def record(system, seed, right):
        return {
            "setting": "1", "seed": seed, "system": system, "seconds": 1.0, "right": right,
            "accuracy": right.count("1") / len(right), "macro_f1": 0.5,
        }  # fmt: skip

    records = [
        record("finetune", 0, "1111"),
        record("finetune", 1, "1100"),
        record("x", 0, "1110"),
        record("x", 1, "1110"),
    ]
    ours, theirs = finetuning.summarise(records)
    assert (ours["accuracy"], round(ours["accuracy_sd"], 3)) == (0.75, 0.354)
    assert theirs["accuracy_sd"] == 0
    (comparison,) = finetuning.compare(records, "finetune")
    assert comparison["difference"] == 0
    assert comparison["better_in"] == "1 of 2"
    assert "| finetune | **0.750** ± 0.354 |" in finetuning.table_of([ours, theirs])


def test_cells_without_a_label_and_values_that_are_no_counts(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read, labels = read_labelled(tmp_path / "cells.h5ad", "label")
    assert len(read) == len(labels) == 79
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "halves.h5ad")
    with pytest.raises(ValueError, match="no counts"):
        read_labelled(tmp_path / "halves.h5ad", "label")


def test_the_command_writes_a_table_and_goes_on_where_it_stopped(adata, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    output = tmp_path / "out"
    words = ["--adata", str(tmp_path / "cells.h5ad"), "--label-key", "label", "--output", str(output)]
    words += ["--shots", "2", "--seeds", "1", "--splits", "1", "--systems"]
    assert finetuning.main([*words, "majority class"]) == 0
    assert finetuning.main([*words, "nearest centroid"]) == 0  # what other systems have done stays
    assert "| nearest centroid |" in capsys.readouterr().out
    assert len(json.loads((output / "results.json").read_text())["runs"]) == 4
    assert {path.name for path in output.iterdir()} == {"results.json", "results.csv", "table.md", "shots.png"}
    with pytest.raises(ValueError, match="other cells or options"):
        finetuning.main([*words, "majority class", "--", "--use_cpu", "True"])


def test_finetune_sees_only_the_labels_that_are_shown(monkeypatch):
    seen = {}

    class Pipeline:
        def annotate(self, adata):
            adata.obs["scmmgpt_cell_type"] = "T"
            return adata

    def fake(adata, output, *, label_key, seed, options):
        seen.update(labels=adata.obs[label_key].tolist(), options=options, seed=seed)
        return Pipeline()

    monkeypatch.setattr(annotators, "run_finetune", fake)
    counts = csr_matrix(np.ones((6, 3), dtype=np.float32))
    adata = anndata.AnnData(counts)
    budget = LabelBudget(adata, np.array(["B", "T", "B", "T", "B", "T"]), np.array([0, 1]), adata.copy(), 4)
    annotators.finetuned(budget, label_key="label")
    assert seen == {"labels": ["B", "T"], "options": ["--shots", 1], "seed": 4}
    annotators.finetuned(budget, label_key="label", unlabelled=True)
    assert seen["labels"] == ["B", "T", None, None, None, None]
