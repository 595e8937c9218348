"""A condition in words: clusters beside it, and the measures of each system."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from scmmgpt.eval import condition


@pytest.fixture
def adata():
    """Two types of cells, of ten genes each; every other cell is stimulated and expresses five genes more."""
    rng = np.random.default_rng(0)
    types, stimulated = np.arange(120) % 2, np.arange(120) // 2 % 2
    counts = rng.poisson(1.0, (120, 30))
    for row, (kind, side) in enumerate(zip(types, stimulated, strict=True)):
        counts[row, kind * 10 : kind * 10 + 10] += rng.poisson(8, 10)
        counts[row, 20:25] += rng.poisson(8 * side, 5)
    obs = pd.DataFrame({"type": types, "condition": np.array(["control", "stimulated"])[stimulated]})
    obs.index = [f"c{i}" for i in range(120)]
    genes = pd.DataFrame(index=[f"g{i}" for i in range(30)])
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=genes)


def test_clusters_are_of_types_and_not_of_conditions(adata):
    clusters = condition.find_clusters(adata, adata.obs["condition"].to_numpy(), 2)
    assert (clusters == adata.obs["type"]).mean() in (0, 1)


def test_areas_are_within_clusters_and_pooled():
    truth, clusters = np.array([0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 2])
    scores = np.array([1.0, 2.0, 4.0, 3.0, 0.0])  # right in cluster 0, wrong in cluster 1; cluster 2 has one kind
    found = condition.areas(scores, truth == 1, clusters)
    assert {name: found[name] for name in ("auroc", "auroc_worst_cluster", "auroc_pooled")} == {
        "auroc": 0.5, "auroc_worst_cluster": 0, "auroc_pooled": pytest.approx(1 / 3),
    }  # fmt: skip
    assert {name: of["cells"] for name, of in found["clusters"].items()} == {"0": 2, "1": 2}


def test_a_small_cluster_weighs_by_its_pairs_and_widens_the_interval():
    rng = np.random.default_rng(0)
    clusters = np.repeat([0, 1], [200, 10])
    truth = np.arange(210) % 2 == 1
    scores = np.where(clusters == 0, truth * 5.0, 0) + rng.normal(size=210)  # the small cluster is a guess
    found = condition.areas(scores, truth, clusters)
    large, small = (found["clusters"][name] for name in "01")
    expected = [roc_auc_score(truth[clusters == of], scores[clusters == of]) for of in (0, 1)]
    assert [large["auroc"], small["auroc"]] == pytest.approx(expected)
    assert found["auroc"] == pytest.approx(np.mean(expected))
    assert found["auroc_by_pairs"] == pytest.approx(np.average(expected, weights=[10_000, 25]))
    assert np.diff(large["interval"])[0] < 0.01 < 0.3 < np.diff(small["interval"])[0]
    assert np.diff(found["intervals"]["auroc_by_pairs"])[0] < 0.02 < np.diff(found["intervals"]["auroc"])[0]


def test_every_system_scores_cells_of_clusters_that_it_has_not_seen(adata, tmp_path, monkeypatch, capsys):
    learned, scored = [], []

    def learn(train, labels, **options):
        learned.append((sorted(set(labels)), train.n_obs, options))

    def score(pipeline, cells, *words, by="similarity"):
        scored.append((cells.n_obs, by))
        return np.asarray(cells.X[:, 20:25].sum(axis=1)).ravel()

    monkeypatch.setattr(condition, "learn", learn)
    monkeypatch.setattr(condition, "log_odds", score)
    monkeypatch.setattr(condition, "search", score)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["--adata", str(tmp_path / "cells.h5ad"), "--condition-key", "condition", "--condition", "stimulated"]
    words += ["--text", "aroused", "--clusters", "2", "--gene-texts", "x.csv", "--output", str(tmp_path / "out.json")]
    assert condition.main(words) == 0
    assert learned == [
        (["control", "stimulated"], 60, {}),
        (["control", "stimulated"], 60, {}),
        (["group 0", "group 1"], 60, {"gene_texts": "x.csv"}),
    ]
    assert scored == [(60, "similarity")] * 4 + [(120, "genes")]
    systems = json.loads((tmp_path / "out.json").read_text())["systems"]
    assert systems["label, learned in other clusters"]["auroc"] > 0.99
    assert systems["search, learned in other clusters"]["auroc"] > 0.99
    assert systems["search by genes, condition not seen"]["auroc"] > 0.99
    assert systems["mean difference, other clusters"]["auroc"] > 0.99
    assert "search by genes, condition not seen" in capsys.readouterr().out


def test_log_odds_are_of_a_label_against_all_others(tiny_pipeline):
    from scmmgpt.synthetic import synthetic_adata

    tiny_pipeline.model.config.annotation = {"labels": {"B cell": "a B lymphocyte", "T cell": "a T lymphocyte"}}
    odds = [condition.log_odds(tiny_pipeline, synthetic_adata(5), label) for label in ("B cell", "T cell")]
    np.testing.assert_allclose(odds[0], -odds[1], rtol=1e-5)
