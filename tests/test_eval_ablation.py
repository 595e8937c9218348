"""The parts of a checkpoint, switched off one at a time."""

import numpy as np
import pytest
import torch

from scmmgpt.eval import ablation
from scmmgpt.synthetic import synthetic_adata
from scmmgpt.tests.test_cell_tokens import inputs_of, pipeline_reading


def test_a_part_that_is_off_says_nothing_and_comes_back():
    pipeline = pipeline_reading("both")
    model, inputs = pipeline.model.model, inputs_of(pipeline, synthetic_adata(3))
    cells = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}

    def silent_tokens():
        with torch.inference_mode():
            return (model.get_cell_tokens(**cells) == 0).all(dim=(0, 2)).tolist()

    with ablation.silent(model.label_projection):
        assert silent_tokens() == [False] * 4 + [True]
    with ablation.silent(model.language_projection):
        assert silent_tokens() == [True] * 4 + [False]
    assert silent_tokens() == [False] * 5
    with ablation.switched_off(model, "label_readout"):
        assert model.label_readout is None
    assert model.label_readout is not None


def test_the_table_has_means_and_spreads_of_checkpoints():
    runs = [{"search": {"wide": 0.5, "deep": 0.25}, "annotation": {"both": 1.0}}, {"search": {"wide": 0.7}}]
    assert ablation.summarise(runs).splitlines()[2:] == [
        "| search | 0.600 ± 0.141 | 0.250 |  |",
        "| annotation |  |  | 1.000 |",
    ]


def test_a_checkpoint_without_a_readout_is_refused(monkeypatch, tiny_pipeline):
    monkeypatch.setattr(ablation.ScMMGPTPipeline, "from_pretrained", lambda _: tiny_pipeline)
    with pytest.raises(ValueError, match="old has no label readout"):
        ablation.evaluate("old", None, "cell_type", 2, 0)


def test_search_is_measured_by_each_part_and_by_both():
    pipeline = pipeline_reading("both")
    adata = synthetic_adata(30)
    pipeline.model.config.annotation = {"labels": {"B cell": "a B cell", "monocyte": "a monocyte"}}
    adata.obs["cell_type"] = np.array(["B cell", "monocyte", "T cell"])[np.arange(30) % 3]

    class Corpus:
        def to_adata(self, split):
            return adata

    found = ablation.search(pipeline, Corpus(), "cell_type")
    assert list(found) == ["wide", "deep", "both"]
    assert all(0 <= value <= 1 for value in found.values())
    # Where the readout places cells among texts, both is the search of the checkpoint itself.
    width = pipeline.model.config.projection_dim
    pipeline.model.model.label_readout.set_features(torch.randn(3, width))
    pipeline.model.config.label_readout["feature_width"] = width
    placed = ablation.search(pipeline, Corpus(), "cell_type")
    assert placed["deep"] == found["deep"]
    assert "feature_width" in pipeline.model.config.label_readout


def test_cells_without_a_label_are_not_counted(monkeypatch):
    pipeline, adata = pipeline_reading("both"), synthetic_adata(6)
    adata.obs["cell_type"] = ["B cell", None, "monocyte", np.nan, "B cell", None]

    class Corpus:
        def to_adata(self, split):
            return adata

    def name_all(cells, **_):
        cells.obs["scmmgpt_cell_type"] = "B cell"
        return cells

    monkeypatch.setattr(pipeline, "calibrate", lambda *_: None)
    monkeypatch.setattr(pipeline, "annotate", name_all)
    assert ablation.annotate(pipeline, Corpus(), "cell_type", "both") == pytest.approx(2 / 3)
