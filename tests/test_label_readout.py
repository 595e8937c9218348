"""The readout of labels for the genes that a file has: absent genes are absent, not zero."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.eval.annotators import run_finetune
from scmmgpt.novelty_scmmgpt import novelty_of
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout, panel_profiles
from scmmgpt.regression_scmmgpt import condition
from scmmgpt.train import readout


HORMONES = {"alpha": "GCG", "beta": "INS", "delta": "SST"}
# Alpha has a second gene; beta and delta differ in INS and SST alone.
GENES = [*HORMONES.values(), "TTR", *(f"RPL{i}" for i in (3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 21))]
SIZES = json.dumps(
    {
        "cell_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        "qformer_config": {"num_hidden_layers": 1},
        "model_config": {"num_query_tokens": 2, "projection_dim": 16},
    }
)


def islet_cells(n_cells=240, seed=0):
    """Cells of three types that hormones tell apart; an alpha cell expresses TTR as strongly as GCG."""
    rng = np.random.default_rng(seed)
    types = np.array(list(HORMONES))[np.arange(n_cells) % 3]
    rates = np.full((n_cells, len(GENES)), 4.0)
    rates[:, :4] = 0.2
    for row, name in enumerate(types):
        rates[row, GENES.index(HORMONES[name])] = 40
    rates[types == "alpha", GENES.index("TTR")] = 40
    counts = csr_matrix(rng.poisson(rates).astype(np.float32))
    obs = pd.DataFrame({"label": types}, index=[f"c{seed}-{i}" for i in range(n_cells)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def checkpoint(bert, tmp_path_factory):
    path = tmp_path_factory.mktemp("islets")
    run_finetune(islet_cells(), path, label_key="label", options=["--bert", bert, "--new_model", SIZES])
    return str(path / "checkpoint")


@pytest.fixture
def pipeline(checkpoint):
    return ScMMGPTPipeline.from_pretrained(checkpoint, device="cpu")


def annotate_without(pipeline, *absent):
    cells = islet_cells(90, seed=1)
    annotated = pipeline.annotate(cells[:, [gene not in absent for gene in GENES]].copy())
    truth = np.asarray(annotated.obs["label"])
    right = np.asarray(annotated.obs["scmmgpt_cell_type"]).astype(str) == truth
    return annotated, {name: right[truth == name].mean() for name in HORMONES}


def test_with_all_genes_the_scores_are_those_of_the_regression(pipeline):
    annotated, right = annotate_without(pipeline)
    assert min(right.values()) == 1
    assert len(annotated.uns["scmmgpt"]["annotate"]["weak_labels"]) == 0
    assert annotated.obs["scmmgpt_score"].min() > 0.9


def test_an_alpha_cell_without_glucagon_is_known_by_its_other_gene(pipeline, caplog):
    _, right = annotate_without(pipeline, "GCG")
    assert min(right.values()) > 0.95


def test_a_label_whose_decisive_genes_are_absent_says_so_and_loses_confidence(pipeline, caplog):
    annotated, right = annotate_without(pipeline, "INS", "SST")
    assert right["alpha"] > 0.95
    assert list(annotated.uns["scmmgpt"]["annotate"]["weak_labels"]) == ["beta", "delta"]
    (said,) = [message for message in caplog.messages if "lacks genes" in message]
    assert any(f"lower for it: {genes} (" in said for genes in ("INS, SST", "SST, INS"))
    assert said.count("of the evidence left") == 1  # of the pair, not of each label
    doubtful = annotated[annotated.obs["label"] != "alpha"].obs["scmmgpt_score"]
    assert 0.4 < doubtful.median() < 0.7
    assert annotated[annotated.obs["label"] == "alpha"].obs["scmmgpt_score"].median() > 0.8


def test_a_gene_of_zeros_is_not_an_absent_gene(pipeline):
    cells = islet_cells(90, seed=1).to_df()
    cells["GCG"] = 0
    annotated = pipeline.annotate(anndata.AnnData(csr_matrix(cells), obs=cells[[]], var=pd.DataFrame(index=GENES)))
    absent, _ = annotate_without(pipeline, "GCG")
    scores = annotated.obsm["scmmgpt_probabilities"][:, 0], absent.obsm["scmmgpt_probabilities"][:, 0]
    assert scores[0][::3].mean() < scores[1][::3].mean()  # alpha: measured and not found is evidence against it


def test_a_cell_alone_has_the_scores_that_it_has_in_a_batch(pipeline):
    cells = islet_cells(30, seed=2)[:, [gene != "GCG" for gene in GENES]].copy()
    together = pipeline.annotate(cells.copy()).obsm["scmmgpt_probabilities"]
    alone = [pipeline.annotate(cells[i : i + 1].copy()).obsm["scmmgpt_probabilities"][0] for i in (0, 7, 29)]
    np.testing.assert_array_equal(together[[0, 7, 29]], alone)


def test_the_transformer_does_not_run_where_it_changes_nothing(pipeline, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the cell model was run")

    monkeypatch.setattr(pipeline.model.cell_model, "forward", fail)
    annotate_without(pipeline)


def test_the_statistics_are_saved_in_half_precision_and_load_as_they_were(pipeline, checkpoint):
    stored = pipeline.model.label_readout
    kinds = {name: value.dtype for name, value in stored.named_buffers()}
    assert {kinds[name] for name in ("weights", "centroids", "factors")} == {torch.float16}
    assert kinds["noise"] == torch.float32
    assert stored.gene_ids.tolist() == sorted(set(stored.gene_ids.tolist()))
    assert stored.shares.sum().item() == pytest.approx(1, abs=1e-3)


def test_calibration_of_a_readout_gives_the_probabilities_that_it_reports(pipeline):
    cells = islet_cells(90, seed=1)
    truth = [list(pipeline.annotation_settings()["labels"]).index(name) for name in cells.obs["label"]]

    def loss(**options):
        probabilities = pipeline.annotate(cells.copy(), **options).obsm["scmmgpt_probabilities"]
        return -np.log(probabilities[np.arange(len(truth)), truth]).mean()

    before = loss()
    temperature = pipeline.annotation_settings()["temperature"]
    for _ in range(2):  # a second calibration starts where the first one ended
        done = pipeline.calibrate(cells, "label")
        assert done["temperature"] < temperature  # a penalised regression is modest about cells like its own
        assert loss() == pytest.approx(done["nll"], abs=1e-6)
        assert loss() < before
    assert loss(temperature=temperature) == pytest.approx(before, rel=1e-5)


def test_some_of_the_labels_compete_among_themselves(pipeline):
    annotated = pipeline.annotate(islet_cells(30, seed=1), labels=["delta", "alpha"])
    assert set(annotated.obs["scmmgpt_cell_type"]) <= {"alpha", "delta"}
    truth = annotated.obs["label"] == "delta"
    assert (annotated.obs["scmmgpt_cell_type"][truth] == "delta").all()


def test_the_scores_without_genes_are_their_expectation_given_the_other_genes():
    rng = np.random.default_rng(0)
    a = {
        "weights": rng.normal(size=(3, 12)),
        "bias": rng.normal(size=3),
        "factors": rng.normal(size=(2, 12)),
        "noise": rng.uniform(0.5, 1, 12),
        "mean": rng.normal(size=12),
    }
    here = np.arange(12) < 7
    weights, bias, covariance = condition(a, here)
    total = a["factors"].T @ a["factors"] + np.diag(a["noise"])
    solve = total[~here][:, here] @ np.linalg.inv(total[here][:, here])
    cell = rng.normal(size=12)
    expected_absent = a["mean"][~here] + solve @ (cell - a["mean"])[here]
    expected = a["weights"][:, here] @ cell[here] + a["weights"][:, ~here] @ expected_absent + a["bias"]
    np.testing.assert_allclose(weights @ cell[here] + bias, expected)
    left = total[~here][:, ~here] - solve @ total[here][:, ~here]
    np.testing.assert_allclose(covariance, a["weights"][:, ~here] @ left @ a["weights"][:, ~here].T)


def test_factors_and_rest_give_the_variance_of_every_gene():
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.0, (50, 8)).astype(float)
    weights = np.full(50, 1 / 50)
    factors, rest = readout.principal_factors(csr_matrix(dense), dense.mean(axis=0), weights)
    assert factors.shape == (7, 8)
    np.testing.assert_allclose((factors**2).sum(axis=0) + rest, dense.var(axis=0))


def test_a_panel_has_profiles_on_the_scale_of_the_whole_transcriptome():
    cells = Cells.from_csr(csr_matrix([[1, 3, 12], [0, 0, 4]]), np.array([5, 6, 7]))
    indptr, positions, values = panel_profiles(cells, np.array([5, 6]), share=0.25)
    assert indptr.tolist() == [0, 2, 2]
    assert positions.tolist() == [0, 1]
    # A quarter of the expression is expected here, of which gene 5 has a quarter: 1 of the 16 counts of the cell.
    np.testing.assert_allclose(values, [100 * (1 / 16) ** 0.5, 100 * (3 / 16) ** 0.5], rtol=1e-6)


def test_a_cell_without_a_gene_of_the_panel_has_an_empty_profile_and_no_novelty():
    cells = Cells.from_csr(csr_matrix([[0, 0, 0], [4, 0, 0], [4, 9, 1]]), np.array([5, 6, 7]))
    indptr, positions, values = panel_profiles(cells, np.array([6, 7]), share=1.0)
    assert (indptr.tolist(), positions.tolist()) == ([0, 0, 0, 2], [0, 1])
    np.testing.assert_allclose(values, [100 * 0.9**0.5, 100 * 0.1**0.5], rtol=1e-6)
    absent = np.arange(8) >= 6
    np.testing.assert_allclose(novelty_of(cells, absent), [0, 0, 4 / 6], rtol=1e-6)


def test_a_file_without_a_gene_of_the_training_cells_is_refused():
    stored = ScMMGPTLabelReadout(num_labels=2, num_genes=3, num_factors=1)
    with pytest.raises(ValueError, match="none of the genes"):
        stored.for_genes(np.array([7, 8]))


def test_alpha_cells_of_a_pancreas_without_glucagon_are_alpha_cells(shared_data, bert, tmp_path):
    cells = read_file(shared_data / "pancreas_baron_human.h5ad")
    label = np.asarray(cells.obs["cell_type"]).astype(str)
    number = pd.Series(label).groupby(label).cumcount().to_numpy()
    options = ["--bert", bert, "--new_model", SIZES]
    pipeline = run_finetune(cells[number % 2 == 0].copy(), tmp_path, label_key="cell_type", options=options)
    new = cells[number % 2 == 1, cells.var_names != "GCG"].copy()
    predicted = np.asarray(pipeline.annotate(new).obs["scmmgpt_cell_type"]).astype(str)
    assert (predicted == label[number % 2 == 1])[label[number % 2 == 1] == "alpha"].mean() > 0.9
    assert (predicted == label[number % 2 == 1]).mean() > 0.9
