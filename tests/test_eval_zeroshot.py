"""Left-out labels: measures with known answers, what systems get to see, and the bonus for unseen texts."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.eval import zeroshot
from scmmgpt.eval.zeroshot import LabelTexts, LeftOutLabel
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.train.data import ontology
from scmmgpt.unseen_scmmgpt import predict_centroids


IDS = {"B cell": "CL:0000236", "T cell": "CL:0000084", "monocyte": "CL:0000576"}


@pytest.fixture
def adata():
    """Ninety cells of three types over fifteen genes, five of which mark each."""
    rng = np.random.default_rng(0)
    types = np.array(list(IDS))[np.arange(90) % 3]
    counts = rng.poisson(5.0, (90, 15))
    for row, name in enumerate(types):
        block = list(IDS).index(name) * 5
        counts[row, block : block + 5] += rng.poisson(15, 5)
    obs = pd.DataFrame({"label": types, "term": [IDS[t] for t in types]}, index=[f"c{i}" for i in range(90)])
    genes = pd.DataFrame(index=[f"g{i}" for i in range(15)])
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=genes)


def test_measures_of_a_perfect_and_of_a_blind_system():
    truth = np.array([0, 1, 2, 0, 1, 2])
    steps = np.array([[0, 1, 4], [1, 0, 3], [4, 3, 0]], dtype=float)
    perfect = zeroshot.measure(np.eye(3)[truth], truth, 1, steps)
    assert perfect == {"unseen": 1, "seen": 1, "harmonic": 1, "steps": 0, "among unseen": 1}
    blind = np.eye(3)[np.where(truth == 1, 2, truth)]  # never answers label 1
    assert zeroshot.measure(blind, truth, 1, steps) == {
        "unseen": 0, "seen": 1, "harmonic": 0, "steps": 3, "among unseen": 0.5,
    }  # fmt: skip


def test_no_system_sees_a_cell_of_the_label_that_is_left_out(adata, tmp_path, monkeypatch, capsys):
    seen = []

    def spy(case):
        seen.append((case.left_out, sorted(set(case.targets)), case.train.n_obs, case.test.n_obs))
        return {"spy": np.zeros((case.test.n_obs, 3))}

    monkeypatch.setitem(zeroshot.SYSTEMS, "chance", spy)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["--adata", str(tmp_path / "cells.h5ad"), "--label-key", "label", "--ontology-key", "term"]
    words += ["--output", str(tmp_path / "out"), "--systems", "chance"]
    assert zeroshot.main(words) == 0
    assert [(left_out, targets) for left_out, targets, *_ in seen] == [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])]
    assert {rest[3] for rest in seen} == {23}
    assert "| spy |" in capsys.readouterr().out
    assert zeroshot.main(words) == 0
    assert len(seen) == 3, "what is done was done again"
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 3


def test_a_centroid_is_predicted_from_the_text_between_those_of_seen_labels():
    centroids, texts = np.array([[9.0, 1.0], [1.0, 9.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    between = predict_centroids(centroids, texts, np.array([[0.5, 0.5]]))[0]
    np.testing.assert_allclose(between, [5, 5])
    known = predict_centroids(centroids, texts, texts[:1])[0]
    # Along the difference of the texts, the kernel is 1 and the penalty 1/2: 2/3 of the way from the mean.
    np.testing.assert_allclose(known, [5 + 8 / 3, 5 - 8 / 3])


def test_a_bonus_finds_no_fewer_cells_of_the_label_that_is_left_out(monkeypatch):
    angles = np.array([0.0, 0.4, 0.8, 1.2])  # four labels in a row, in texts and in cells
    texts = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    monkeypatch.setattr(zeroshot, "embed_texts", lambda _: texts)
    rng = np.random.default_rng(0)
    truth = np.arange(80) % 4
    rates = 100 * np.stack([np.cos(angles), np.sin(angles), np.ones(4)], axis=1)[truth]
    cells = anndata.AnnData(csr_matrix(rng.poisson(rates).astype(np.float32)))
    labels = LabelTexts(list("abcd"), list("abcd"), [None] * 4)
    kept = np.flatnonzero(truth != 1)
    case = LeftOutLabel(cells[kept], truth[kept], cells, labels, 1, 0, "")
    raised, plain = (scores.argmax(axis=1) for scores in zeroshot.text_centroids(case).values())
    assert (raised[truth == 1] == 1).mean() >= (plain[truth == 1] == 1).mean()
    assert (plain[truth != 1] == truth[truth != 1]).mean() > 0.9


def test_steps_follow_the_ontology():
    t_cell, lymphocyte, leukocyte, erythrocyte = "CL:0000084", "CL:0000542", "CL:0000738", "CL:0000232"
    steps = [ontology.distance(t_cell, term) for term in (t_cell, lymphocyte, leukocyte, erythrocyte)]
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert ontology.distance(t_cell, "nonsense") == np.inf


def test_annotate_adds_the_bonus_to_texts_that_were_not_trained_alone(adata, tiny_pipeline):
    from scmmgpt.synthetic import synthetic_adata

    cells = synthetic_adata(20)
    texts = {"B cell": "a B lymphocyte", "T cell": "a T lymphocyte"}
    tiny_pipeline.model.config.annotation = {"labels": {"B cell": "a B lymphocyte"}, "unseen_bonus": 5.0}
    tiny_pipeline.annotate(cells, texts, matching_weight=0.0)
    assert set(cells.obs["scmmgpt_cell_type"]) == {"T cell"}
    tiny_pipeline.annotate(cells, texts, matching_weight=0.0, unseen_bonus=-5.0)
    assert set(cells.obs["scmmgpt_cell_type"]) == {"B cell"}
    tiny_pipeline.annotate(cells, {"B cell": "a B lymphocyte"}, matching_weight=0.0)
    with_bonus = cells.obsm["scmmgpt_probabilities"].copy()
    tiny_pipeline.annotate(cells, {"B cell": "a B lymphocyte"}, matching_weight=0.0, unseen_bonus=0.0)
    np.testing.assert_array_equal(with_bonus, cells.obsm["scmmgpt_probabilities"])


def test_a_pipeline_is_asked_for_all_labels_by_their_texts(tiny_pipeline):
    from scmmgpt.synthetic import synthetic_adata

    assert isinstance(tiny_pipeline, ScMMGPTPipeline)
    labels = LabelTexts(["B cell", "T cell"], ["a B lymphocyte", "a T lymphocyte"], [None, None])
    cells = synthetic_adata(6)
    case = LeftOutLabel(cells, np.zeros(6, dtype=int), cells, labels, 1, 0, "")
    scores = zeroshot.scores_of_pipeline(tiny_pipeline, case)
    assert scores.shape == (6, 2)
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)


def test_cells_are_generated_for_labels_that_no_generator_has_seen(tmp_path, monkeypatch, capsys):
    from scmmgpt.eval import realism, zeroshot_cells
    from scmmgpt.train import states

    rng, seen = np.random.default_rng(0), []
    types = np.array(list(IDS))[np.arange(120) % 3]
    counts = rng.poisson(2.0, (120, 30))
    for row, name in enumerate(types):
        counts[row, list(IDS).index(name) * 10 : list(IDS).index(name) * 10 + 10] += rng.poisson(9, 10)
    obs = pd.DataFrame({"label": types}, index=[f"c{i}" for i in range(120)])
    genes = pd.DataFrame(index=[f"g{i}" for i in range(30)])
    cells = anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=genes)
    cells.write_h5ad(tmp_path / "cells.h5ad")

    def spy(prompt, n, seed):
        seen.append((prompt.left_out, prompt.seen.tolist(), len(prompt.train)))
        return zeroshot_cells.from_states(prompt, n, seed)

    monkeypatch.setitem(zeroshot_cells.SYSTEMS, "scMMGPT", spy)
    monkeypatch.setattr(zeroshot, "embed_texts", lambda texts: np.eye(len(texts)))
    for module, name in ((states, "MAX_FACTOR_STEPS"), (realism, "N_TREES")):
        monkeypatch.setattr(module, name, 20)  # for speed
    words = ["--adata", str(tmp_path / "cells.h5ad"), "--label-key", "label", "--output", str(tmp_path / "out")]
    assert zeroshot.main([*words, "--generate", "20", "--test-share", "0.5"]) == 0
    assert seen == [(0, [1, 2], 40), (1, [0, 2], 40), (2, [0, 1], 40)]
    (split,) = json.loads((tmp_path / "out" / "generation.json").read_text())["splits"]
    distances = {row["system"]: row["value"] for row in split["rows"] if row["metric"] == "energy_distance"}
    assert distances["mean profile + Poisson"] < distances["ridge + Poisson"]
    assert "cells of the nearest text" in capsys.readouterr().out


def test_classes_name_the_column_and_the_pooled_labels(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    fine = {name: {"fine": term} for name, term in IDS.items()} | {"monocyte": {"fine": None}}
    (tmp_path / "classes.json").write_text(json.dumps({"cells": {"_col": "label", **fine}}), encoding="utf-8")
    words = ["--adata", str(tmp_path / "cells.h5ad"), "--classes", str(tmp_path / "classes.json")]
    assert zeroshot.main([*words, "--output", str(tmp_path / "out"), "--systems", "chance"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {run["label"] for run in results["runs"]} == {IDS["B cell"], IDS["T cell"]}
    (tmp_path / "cells.h5ad").rename(tmp_path / "others.h5ad")
    with pytest.raises(ValueError, match="has no dataset 'others', only .'cells'."):
        zeroshot.read_cells_with_labels(
            zeroshot.argparse.Namespace(adata=tmp_path / "others.h5ad", classes=tmp_path / "classes.json")
        )
