"""Sets of labels with a chosen error rate: what held-out cells promise, and what is refused."""

import anndata
import numpy as np
import pytest

from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.annotation_scmmgpt import fit_label_sets, label_sets, least_error_rate, set_threshold
from scmmgpt.commands.verify import verify_file
from scmmgpt.readers.cell_files import read_file
from scmmgpt.synthetic import synthetic_adata


@pytest.fixture
def pipeline():
    pipeline = synthetic.fitted_pipeline()
    pipeline.calibrate(synthetic_adata(200, seed=3, mean_total=3), "cell_type")
    return pipeline


@pytest.mark.parametrize("n_cells", [20, 57, 300])
@pytest.mark.parametrize("error_rate", [0.05, 0.1, 0.3])
def test_the_true_label_is_missing_at_most_at_the_error_rate(n_cells, error_rate):
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(300):  # labels drawn from the probabilities, whose temperature is then changed: overconfident
        logits = rng.normal(size=(n_cells + 50, 5)) * 2
        truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        sharp = np.exp(3 * logits)
        sharp /= sharp.sum(axis=1, keepdims=True)
        threshold = set_threshold(fit_label_sets(sharp[50:], truth[50:]), error_rate)
        own = sharp[np.arange(50), truth[:50]]
        missed.append((own < threshold).mean())
    promised = np.floor(error_rate * (n_cells + 1) + 1e-9) / (n_cells + 1)
    assert np.mean(missed) == pytest.approx(promised, abs=0.025)
    assert promised <= error_rate


def test_too_few_held_out_cells_give_all_labels():
    stored = fit_label_sets(np.array([[0.9, 0.1]] * 5), np.zeros(5, dtype=int))
    assert set_threshold(stored, 0.1) == 0  # one error in ten needs nine cells
    assert least_error_rate(5) == 0.17  # one of the six cells with the new one
    assert set_threshold(stored, 0.17) > 0 == set_threshold(stored, 0.16)
    assert label_sets(np.array([[0.9, 0.1]]), ["B", "T"], 0.0).tolist() == ["B | T"]


def test_annotate_adds_sets_that_hold_the_label_and_more_at_a_smaller_rate(pipeline):
    adata = synthetic_adata(80, seed=9, mean_total=3)
    sizes = []
    for rate in (0.02, 0.1, 0.4):
        pipeline.annotate(adata, error_rate=rate)
        sets = [text.split(" | ") for text in adata.obs["scmmgpt_label_set"]]
        called = adata.obs["scmmgpt_cell_type"].tolist()  # of a cell without a single count, "Unknown"
        assert all(name in (labels[0], "Unknown") for labels, name in zip(sets, called, strict=True))
        sizes.append(np.mean([len(labels) for labels in sets]))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["B cell"]}, "labels and settings that the checkpoint stores"),
        ({"temperature": 2.0}, "labels and settings that the checkpoint stores"),
        ({"error_rate": 0.9}, "0.01 to 0.5"),
    ],
)
def test_what_breaks_the_promise_is_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.annotate(synthetic_adata(8), **{"error_rate": 0.1, **options})


def test_a_checkpoint_without_held_out_cells_is_refused():
    with pytest.raises(ValueError, match="no thresholds of label sets"):
        synthetic.fitted_pipeline().annotate(synthetic_adata(8), error_rate=0.1)


def test_the_command_gives_the_sets_of_the_pipeline_and_verify_repeats_them(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    synthetic_adata(40, mean_total=3).write_h5ad(tmp_path / "cells.h5ad")
    words = ["annotate", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "model"), "--quiet"]
    assert main([*words, "--error-rate", "0.05", "-o", str(tmp_path / "out.h5ad")]) == 0
    direct = pipeline.annotate(read_file(tmp_path / "cells.h5ad"), error_rate=0.05)
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs["scmmgpt_label_set"]
    assert found.tolist() == direct.obs["scmmgpt_label_set"].tolist()
    assert verify_file(tmp_path / "out.h5ad", pipeline)["results"][0]["changed_cells"] == []
