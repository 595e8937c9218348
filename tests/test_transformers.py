"""What users of transformers expect of the models: auto classes, a plain `Trainer`, and the conventions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.modeling_scgpt import ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel
from scmmgpt.processing_scmmgpt import ScGPTProcessor


ROOT = Path(__file__).parents[1]
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def cell_processor(tiny_processor):
    return ScGPTProcessor(tiny_processor.feature_extractor, tiny_processor.gene_tokenizer)


@pytest.fixture
def cell_checkpoint(tiny_cell_config, cell_processor, tmp_path):
    """A checkpoint of the cell model alone."""
    torch.manual_seed(0)
    ScGPTModel(tiny_cell_config).save_pretrained(tmp_path / "cell")
    cell_processor.save_pretrained(tmp_path / "cell")
    return str(tmp_path / "cell")


# -- scGPT by the auto classes ----------------------------------------------------------------------------------------


def test_every_auto_class_loads_a_checkpoint_of_the_cell_model(cell_checkpoint, adata):
    processor = AutoProcessor.from_pretrained(cell_checkpoint, trust_remote_code=True)
    assert type(processor).__name__ == "ScGPTProcessor"
    batch = processor(adata[:3])
    whole = ScGPTModel.from_pretrained(cell_checkpoint).eval()(**batch).pooler_output
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        model, report = auto.from_pretrained(cell_checkpoint, trust_remote_code=True, output_loading_info=True)
        assert not report["unexpected_keys"]
        assert all(name.startswith("classifier.") for name in report["missing_keys"])
        backbone = model.eval() if auto is AutoModel else model.eval().cell_model
        torch.testing.assert_close(backbone(**batch).pooler_output, whole)


@pytest.mark.parametrize("kind", [ScGPTForPreTraining, ScGPTForSequenceClassification])
def test_a_saved_model_of_the_cell_model_maps_every_auto_class(tiny_cell_config, tmp_path, kind):
    expected = ScGPTConfig(**tiny_cell_config.to_dict()).auto_map
    kind(tiny_cell_config).save_pretrained(tmp_path)
    assert ScGPTConfig.from_pretrained(tmp_path).auto_map == expected
    assert {path.name for path in tmp_path.glob("*.py")} >= {"modeling_scgpt.py", "configuration_scmmgpt.py"}


def test_a_cell_processor_reads_anndata_as_the_whole_processor_does(cell_processor, tiny_processor, adata):
    ours, theirs = cell_processor(adata[:4]), tiny_processor(cells=adata[:4])
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hidden_genes_have_a_label_and_no_other_gene_has(cell_processor, adata):
    shown, batch = cell_processor(adata[:5]), cell_processor(adata[:5], mask_ratio=0.4, epoch=0)
    hidden = batch["labels"] != -100
    genes = shown["cell_attention_mask"].sum(1) - 1
    assert hidden.sum(1).tolist() == (genes * 0.4).floor().long().tolist()
    assert not hidden[:, 0].any()
    assert torch.equal(batch["labels"][hidden], shown["expression"][hidden])
    with pytest.raises(ValueError, match="labels and mask_ratio are both given"):
        cell_processor(adata[:5], labels=[0] * 5, mask_ratio=0.4)


def test_labels_of_cells_are_numbers_one_for_each(cell_processor, adata):
    assert cell_processor(adata[:2], labels=[1, 0])["labels"].dtype == torch.int64
    assert cell_processor(adata[:2], labels=[1.5, 0.5])["labels"].dtype == torch.float32
    with pytest.raises(ValueError, match="3 labels of type int64 were given for 2 cells"):
        cell_processor(adata[:2], labels=[1, 0, 1])
    with pytest.raises(ValueError, match=r"labels of type .*label2id\[name\]"):
        cell_processor(adata[:2], labels=["B cell", "T cell"])


# -- classification ---------------------------------------------------------------------------------------------------


def classifier(config, **fields):
    torch.manual_seed(0)
    return ScGPTForSequenceClassification(ScGPTConfig(**{**config.to_dict(), **fields})).eval()


def test_classes_are_learned_by_cross_entropy(tiny_cell_config, cell_processor, adata):
    model = classifier(tiny_cell_config, id2label={0: "a", 1: "b", 2: "c"})
    outputs = model(**cell_processor(adata[:4], labels=[0, 2, 1, 1]))
    assert outputs.logits.shape == (4, 3)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 2, 1, 1]))
    torch.testing.assert_close(outputs.loss, expected)
    alone = model(**cell_processor(adata[2:3])).logits
    torch.testing.assert_close(outputs.logits[2:3], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem", "loss"),
    [
        ([[1, 0, 1], [0, 0, 1]], 3, "multi_label_classification", torch.nn.BCEWithLogitsLoss()),
        ([0.5, 2.0], 1, "regression", torch.nn.MSELoss()),
        ([1, 2], 1, "regression", torch.nn.MSELoss()),
    ],
)
def test_the_problem_follows_from_the_labels(
    tiny_cell_config, cell_processor, adata, labels, num_labels, problem, loss
):
    model = classifier(tiny_cell_config, num_labels=num_labels)
    outputs = model(**cell_processor(adata[:2], labels=labels))
    assert model.config.problem_type == problem
    logits = outputs.logits.squeeze(-1) if num_labels == 1 else outputs.logits
    torch.testing.assert_close(outputs.loss, loss(logits, torch.tensor(labels).float()))


def test_every_parameter_of_a_classifier_is_trained(tiny_cell_config, cell_processor, adata):
    model = classifier(tiny_cell_config, num_labels=2, use_flag_embedding=True)
    model(**cell_processor(adata[:4], labels=[0, 1, 0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not [name for name, _ in model.named_parameters() if "decoder" in name or "flag" in name]


def test_hidden_states_and_attentions_of_a_classifier(tiny_cell_config, cell_processor, adata):
    model = classifier(tiny_cell_config, num_labels=2)
    model.set_attn_implementation("eager")
    batch = cell_processor(adata[:3])
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert outputs.attentions[0].shape == (3, 2, *[batch["gene_ids"].shape[1]] * 2)
    torch.testing.assert_close(outputs.logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert len(model(**batch, return_dict=False)) == 1


# -- a plain Trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_options_of_the_trainer_hold_for_a_classifier(tiny_cell_config, cell_processor, adata, tmp_path, options):
    cells, _ = cell_processor.read_cells(adata)
    labels = np.arange(60) % 4

    def train(**options):
        model = classifier(tiny_cell_config, num_labels=4)
        sizes = {
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        }
        arguments = TrainingArguments(str(tmp_path), **QUIET, **(sizes | options))
        collate = lambda rows: cell_processor(cells[rows], labels[rows])  # noqa: E731
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=range(16), eval_dataset=range(16, 32))
        trainer.train()
        return model, trainer

    model, trainer = train(**options)
    predicted = trainer.predict(range(16, 32))
    assert predicted.predictions.shape == (16, 4)
    assert predicted.label_ids.tolist() == labels[16:32].tolist()
    rows = np.arange(16, 32)
    expected = torch.nn.functional.cross_entropy(
        model(**cell_processor(cells[rows])).logits,
        torch.as_tensor(labels[rows]),
        label_smoothing=options.get("label_smoothing_factor", 0.0),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=2e-2 if "bf16" in options else 1e-4)
    if "gradient_accumulation_steps" in options or "gradient_checkpointing" in options:
        for (name, ours), theirs in zip(model.named_parameters(), train()[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)


def test_predictions_of_pre_training_are_values_of_genes(tiny_cell_config, cell_processor, adata, tmp_path):
    torch.manual_seed(0)
    model = ScGPTForPreTraining(tiny_cell_config)
    cells, _ = cell_processor.read_cells(adata)
    seen = {}

    def measure(prediction):
        hidden = prediction.label_ids != -100
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"mse": float(((prediction.predictions - prediction.label_ids)[hidden] ** 2).mean())}

    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **QUIET, max_steps=2),
        data_collator=lambda rows: cell_processor(cells[rows], mask_ratio=0.4),
        train_dataset=range(16),
        eval_dataset=range(16, 20),
        compute_metrics=measure,
    )
    trainer.train()
    metrics = trainer.evaluate()
    batch = cell_processor(cells[16:20], mask_ratio=0.4)
    outputs = model.eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    hidden = batch["labels"] != -100
    expected = (outputs.logits - batch["labels"])[hidden].square().mean().item()
    assert metrics["eval_mse"] == pytest.approx(expected, rel=1e-5)


def test_a_model_of_pre_training_predicts_without_labels(tiny_cell_config, cell_processor, adata):
    torch.manual_seed(0)
    model = ScGPTForPreTraining(tiny_cell_config).eval()
    batch = cell_processor(adata[:3], mask_ratio=0.4)
    labels = batch.pop("labels")
    shown = batch["expression"].masked_fill(labels != -100, model.config.mask_value)
    outputs = model(batch["gene_ids"], shown, batch["cell_attention_mask"])
    assert outputs.loss is None
    torch.testing.assert_close(outputs.logits, model(**batch, labels=labels).logits)
