"""What the language model reads of a cell: the queries of the Q-Former, and the labels of the readout as one token."""

import numpy as np
import pytest
import torch

from scmmgpt.configuration_scmmgpt import ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.synthetic import synthetic_adata, tiny_config, tiny_processor
from scmmgpt.train.initialize import start_label_projection


LABELS = ["B cell", "T cell", "monocyte"]


def pipeline_reading(cell_tokens):
    """A tiny pipeline with a readout of three labels, whose language model reads `cell_tokens`."""
    config = tiny_config()
    genes = np.arange(3, config.cell_config.vocab_size)
    sizes = {"num_genes": len(genes), "num_factors": 2}
    config.label_readout = {"texts": [f"a {label}" for label in LABELS], "labels": LABELS, **sizes}
    config.cell_tokens = cell_tokens
    torch.manual_seed(0)
    model = ScMMGPTForConditionalGeneration(config)
    readout, rng = model.model.label_readout, np.random.default_rng(0)
    readout.gene_ids.copy_(torch.from_numpy(genes))
    readout.weights.copy_(torch.from_numpy(rng.normal(0, 0.05, readout.weights.shape)))
    readout.factors.copy_(torch.from_numpy(rng.normal(0, 1, readout.factors.shape)))
    readout.shares.fill_(1 / len(genes))
    processor = tiny_processor()
    processor.num_cell_tokens = config.num_cell_tokens
    processor.feature_extractor.return_profile = cell_tokens != "queries"
    return ScMMGPTPipeline(model, processor, device="cpu")


@pytest.fixture
def pipeline():
    return pipeline_reading("both")


def inputs_of(pipeline, adata):
    return pipeline.processor(["what is <cell> ?"] * len(adata), pipeline.processor.read_cells(adata)[0])


@pytest.mark.parametrize(("cell_tokens", "number"), [("queries", 4), ("labels", 1), ("both", 5)])
def test_a_cell_has_as_many_placeholders_as_tokens(cell_tokens, number):
    pipeline = pipeline_reading(cell_tokens)
    assert pipeline.model.config.num_cell_tokens == number
    inputs = inputs_of(pipeline, synthetic_adata(3))
    assert (inputs["input_ids"] == pipeline.processor.cell_token_id).sum(dim=1).tolist() == [number] * 3
    assert pipeline.model(**inputs).cell_hidden_states.shape == (3, number, 32)
    has_table = any("label_projection" in name for name in pipeline.model.state_dict())
    assert has_table == (cell_tokens != "queries")


def test_the_last_token_is_the_direction_of_the_most_probable_label(pipeline):
    adata = synthetic_adata(40)
    cells = pipeline.processor.read_cells(adata)[0]
    best = pipeline.model.model.label_readout.for_genes()(cells).argmax(axis=1)
    assert len(set(best)) > 1
    tokens = pipeline.model(**inputs_of(pipeline, adata)).cell_hidden_states[:, -1]
    torch.testing.assert_close(tokens, pipeline.model.model.label_projection.weight.t()[best])


def test_a_cell_between_two_labels_is_read_as_one_of_them(pipeline):
    inputs = inputs_of(pipeline, synthetic_adata(2))
    doubtful = torch.tensor([[0.50, 0.49, 0.01], [0.01, 0.49, 0.50]]).log()
    tokens = pipeline.model(**inputs, readout_scores=doubtful).cell_hidden_states[:, -1]
    torch.testing.assert_close(tokens, pipeline.model.model.label_projection.weight[:, [0, 2]].t())


def test_labels_alone_are_read_without_the_transformer(monkeypatch):
    pipeline = pipeline_reading("labels")
    monkeypatch.setattr(pipeline.model.model, "encode_cells", None)
    described = pipeline.describe(synthetic_adata(2), max_new_tokens=2)
    assert len(described.obs["scmmgpt_description"]) == 2


def test_cells_of_one_label_are_described_once_where_labels_alone_are_read(monkeypatch):
    pipeline, adata = pipeline_reading("labels"), synthetic_adata(40)
    labels = pipeline.model.model.label_readout.for_genes()(pipeline.processor.read_cells(adata)[0]).argmax(axis=1)
    generate, asked = pipeline.model.generate, []
    monkeypatch.setattr(pipeline.model, "generate", lambda **kw: asked.append(len(kw["input_ids"])) or generate(**kw))
    texts = pipeline.describe(adata, max_new_tokens=4, batch_size=7).obs["scmmgpt_description"].to_numpy()
    assert sum(asked) == len(set(labels)) > 1
    for row in range(5):
        alone = pipeline.describe(adata[[row]].copy(), max_new_tokens=4).obs["scmmgpt_description"]
        assert alone.item() == texts[row]
    asked.clear()
    pipeline.describe(adata, max_new_tokens=4, do_sample=True)
    assert sum(asked) == 40


def test_a_cell_is_read_alike_alone_and_in_a_batch(pipeline):
    adata = synthetic_adata(4)
    together = pipeline.model(**inputs_of(pipeline, adata))
    alone = pipeline.model(**inputs_of(pipeline, adata[2]))
    torch.testing.assert_close(together.cell_hidden_states[2:3], alone.cell_hidden_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.logits[2:3], alone.logits, rtol=1e-4, atol=1e-5)


def test_beams_keep_the_labels_of_their_cells(pipeline):
    adata = synthetic_adata(3)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = pipeline.model.generate(**inputs_of(pipeline, adata), **options)
    for row in range(3):
        alone = pipeline.model.generate(**inputs_of(pipeline, adata[row]), **options)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_a_description_takes_the_readout_that_is_solved_for_the_genes_of_the_file(pipeline, monkeypatch):
    adata = synthetic_adata(6)[:, 4:].copy()
    seen = []
    monkeypatch.setattr(pipeline.model, "generate", lambda **kw: seen.append(kw) or kw["input_ids"].repeat(1, 2))
    pipeline.describe(adata)
    choice = pipeline.processor.choose_input(adata)
    cells = pipeline.processor.read_cells(adata)[0]
    order = np.argsort(-np.diff(cells.indptr), kind="stable")
    readout = pipeline.model.model.label_readout
    np.testing.assert_allclose(
        seen[0]["readout_scores"].numpy(), readout.for_genes(choice.match.measured)(cells[order]), rtol=1e-5
    )
    assert np.abs(readout.for_genes()(cells[order]) - seen[0]["readout_scores"].numpy()).max() > 1e-2


def test_given_scores_take_the_place_of_the_profile_and_one_of_them_is_needed(pipeline):
    inputs = inputs_of(pipeline, synthetic_adata(2))
    profile = inputs.pop("profile_gene_ids"), inputs.pop("profile")
    with pytest.raises(ValueError, match="reads labels from each cell's whole profile"):
        pipeline.model(**inputs)
    sure = torch.tensor([[0.0, -1e4, -1e4], [-1e4, -1e4, 0.0]])
    tokens = pipeline.model(**inputs, readout_scores=sure).cell_hidden_states[:, -1]
    torch.testing.assert_close(tokens, pipeline.model.model.label_projection.weight[:, [0, 2]].t())
    assert profile[0].shape == profile[1].shape


def test_directions_start_near_the_words_of_their_labels_and_at_right_angles(pipeline):
    start_label_projection(pipeline.model, pipeline.processor)
    embeddings = pipeline.model.get_input_embeddings().weight
    directions = pipeline.model.model.label_projection.weight.t()
    norms = embeddings.norm(dim=1).mean()
    torch.testing.assert_close(directions @ directions.t(), torch.eye(3) * norms**2, rtol=1e-4, atol=1e-5)
    names = [f" {label}" for label in LABELS]
    ids = pipeline.processor.tokenizer(names, add_special_tokens=False)["input_ids"]
    words = torch.stack([embeddings[tokens].mean(dim=0) for tokens in ids])
    similarity = torch.cosine_similarity(directions[:, None], words[None], dim=2)
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2]
    assert similarity.diagonal().min() > 0.7


def test_saving_keeps_the_labels_and_the_number_of_placeholders(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = ScMMGPTPipeline.from_pretrained(str(tmp_path), device="cpu")
    assert loaded.processor.num_cell_tokens == 5
    assert loaded.processor.feature_extractor.return_profile
    adata = synthetic_adata(3)
    ours, theirs = (each.model(**inputs_of(each, adata)).logits for each in (pipeline, loaded))
    torch.testing.assert_close(ours, theirs)


def test_labels_need_a_readout():
    with pytest.raises(ValueError, match="the model has no label readout"):
        ScMMGPTConfig(cell_tokens="labels")


def test_a_description_keeps_to_the_type_that_a_cell_is_called(monkeypatch, caplog):
    pipeline, adata = pipeline_reading("labels"), synthetic_adata(5)
    pipeline.model.config.annotation = {
        "labels": {label: f"a {label}" for label in LABELS},
        "terms": [{"id": "CL:0000542", "name": "lymphocyte", "names": ["lymphocyte"], "labels": LABELS[:2]}],
    }
    adata.obs["scmmgpt_cell_type"] = ["monocyte", "Unknown", "hepatocyte", "lymphocyte", "B cell"]
    adata.obs["scmmgpt_by_profile"] = [False, False, True, False, False]
    asked = []
    monkeypatch.setattr(pipeline.model, "generate", lambda **kw: asked.append(kw["readout_scores"]) or kw["input_ids"])
    said = {0: "A B cell.", 2: "Monocytes of blood."}
    monkeypatch.setattr(pipeline.processor, "batch_decode", lambda ids, **kw: [said[int(i)] for i in labels_of(asked)])
    texts = pipeline.describe(adata).obs["scmmgpt_description"].tolist()
    assert sorted(labels_of(asked)) == [0, 2]  # of the cells of trained labels alone
    assert texts == [
        "Monocytes of blood.",
        "The type of this cell is unknown.",
        "This cell is a hepatocyte, by the reference profile of the type.",
        "This cell is a lymphocyte.",
        "A B cell.",
    ]
    said[2] = "This cell is a malignant cell."
    assert pipeline.describe(adata).obs["scmmgpt_description"].iloc[0] == "This cell is a monocyte."
    assert "does not name the type of 1 of 5 cells" in caplog.text


def test_a_type_by_its_profile_is_no_trained_label_that_is_above_it():
    pipeline = pipeline_reading("labels")
    pipeline.model.config.annotation = {
        "labels": {label: f"a {label}" for label in LABELS},
        "terms": [{"id": "CL:0000576", "name": "monocyte", "names": ["monocyte", "blast"], "labels": ["monocyte"]}],
        "profiles": [
            {"id": "CL:1", "name": "big blast", "names": ["big blast"], "labels": ["big blast"], "text": "x"}
        ],
    }
    called = {"cell_type": np.array(["big blast", "blast", "monocyte"])}
    assert pipeline._labels_called(called).tolist() == [-1, 2, 2]
    assert pipeline._labels_called({**called, "by_profile": np.array([True, True, False])}).tolist() == [-1, -1, 2]


def test_cells_without_a_type_in_a_joined_file_are_unknown(pipeline):
    adata = synthetic_adata(3)
    adata.obs["scmmgpt_cell_type"] = ["monocyte", np.nan, "big blast"]
    adata.obs["scmmgpt_by_profile"] = np.array([False, np.nan, True], dtype=object)
    called = pipeline.called_types(adata, None)
    assert called["cell_type"].tolist() == ["monocyte", "Unknown", "big blast"]
    assert called["by_profile"].tolist() == [False, False, True]


def labels_of(asked):
    return asked[-1].argmax(dim=1).tolist()
