"""What users of transformers expect of the models: auto classes, a plain `Trainer`, and the conventions."""

import copy
import inspect
import re
import shutil
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from scmmgpt import synthetic
from scmmgpt.commands.serving import export_checkpoint
from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.modeling_scgpt import ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel
from scmmgpt.modeling_scmmgpt import (
    ScMMGPTCellEncoder,
    ScMMGPTForCellTextAlignment,
    ScMMGPTForConditionalGeneration,
    ScMMGPTModel,
    quantize_language_model_only,
)
from scmmgpt.processing_scmmgpt import ScGPTProcessor
from scmmgpt.train.language_model import train_tokenizer


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


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", ["masked", "aligned", "tuned"])
def test_options_of_the_trainer_hold_for_every_model(
    tiny_config, tiny_processor, cell_processor, adata, tmp_path, kind, options
):
    cells, _ = tiny_processor.read_cells(adata)
    names = ["a " + str(name) for name in adata.obs["cell_type"]]

    def collate(rows):
        texts = [names[row] for row in rows]
        if kind == "masked":
            return cell_processor(cells[rows], mask_ratio=0.4)
        if kind == "aligned":
            return tiny_processor(cells=cells[rows], qformer_text=texts)
        prompts = ["what is <cell> ?"] * len(rows)
        return tiny_processor(prompts, cells[rows], answers=texts, target_cells=cells[rows])

    def train(**options):
        torch.manual_seed(0)
        if kind == "masked":
            model = ScGPTForPreTraining(tiny_config.cell_config)
        else:
            model = {"aligned": ScMMGPTForCellTextAlignment, "tuned": ScMMGPTForConditionalGeneration}[kind](
                tiny_config
            )
        arguments = TrainingArguments(str(tmp_path), **QUIET, max_steps=2, learning_rate=1e-3, **options)
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=range(16), eval_dataset=range(16, 24))
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    assert train(**options) == pytest.approx(train(), rel=5e-2 if "bf16" in options else 1e-4)


@pytest.mark.parametrize("by_token", [False, True])
def test_every_token_of_accumulated_batches_weighs_the_same_on_request(
    tiny_model, tiny_processor, adata, tmp_path, by_token
):
    cells, _ = tiny_processor.read_cells(adata)
    start, steps = tiny_model.state_dict(), []
    for size in (8, 2):
        model = copy.deepcopy(tiny_model)
        model.accepts_loss_kwargs = by_token
        options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 1}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}

        def collate(rows):
            return tiny_processor(["a <cell>"] * len(rows), cells[rows], answers=["a " * (row + 1) for row in rows])

        Trainer(
            model, TrainingArguments(str(tmp_path), **QUIET, **options), data_collator=collate, train_dataset=range(8)
        ).train()
        steps.append(torch.cat([(value - start[name]).flatten() for name, value in model.state_dict().items()]))
    difference = (steps[0] - steps[1]).norm() / steps[0].norm()
    assert difference < 1e-3 if by_token else difference > 1e-2


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


def test_predictions_of_stage_1_are_features_of_cells_and_texts(tiny_config, tiny_processor, adata, tmp_path):
    torch.manual_seed(0)
    model = ScMMGPTForCellTextAlignment(tiny_config)
    cells, _ = tiny_processor.read_cells(adata)
    batch = tiny_processor(cells=cells[:4], qformer_text=["a B cell", "a monocyte"] * 2)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **QUIET), data_collator=lambda rows: dict(batch))
    found, labels, metrics = trainer.predict(range(4))
    outputs = model.eval()(**batch)
    np.testing.assert_allclose(found[0], outputs.cell_features.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], outputs.text_features.detach(), rtol=1e-5, atol=1e-6)
    assert len(found) == 2
    assert metrics["test_loss"] > 0


def test_a_model_of_pre_training_predicts_without_labels(tiny_cell_config, cell_processor, adata):
    torch.manual_seed(0)
    model = ScGPTForPreTraining(tiny_cell_config).eval()
    batch = cell_processor(adata[:3], mask_ratio=0.4)
    labels = batch.pop("labels")
    shown = batch["expression"].masked_fill(labels != -100, model.config.mask_value)
    outputs = model(batch["gene_ids"], shown, batch["cell_attention_mask"])
    assert outputs.loss is None
    torch.testing.assert_close(outputs.logits, model(**batch, labels=labels).logits)


# -- conventions of the whole model -----------------------------------------------------------------------------------


@pytest.fixture
def inputs(tiny_processor, adata):
    """Two prompts with a cell each, of different lengths, and two texts of the Q-Former."""
    text = ["<cell> this is", "describe the cell <cell> : what is this ?"]
    return tiny_processor(text=text, cells=adata[:2], qformer_text=["a B cell", "monocyte"])


def prompts_of(inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("qformer")}


def targets_of(model, n=2):
    gene_ids = torch.arange(3, 13).expand(n, -1)
    return {"target_gene_ids": gene_ids, "target_expression": torch.linspace(0, 2, 10).expand(n, -1)}


def test_keywords_that_nobody_knows_are_refused(tiny_model, inputs):
    with pytest.raises(TypeError, match="'expresion' is not an input of ScMMGPTForCond.*; it takes .*labels"):
        tiny_model(**prompts_of(inputs), expresion=inputs["expression"])
    assert tiny_model(**prompts_of(inputs), use_cache=False, output_hidden_states=True).hidden_states is not None


def test_attentions_need_eager_attention(tiny_model, inputs):
    with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"):
        tiny_model(**prompts_of(inputs), output_attentions=True)
    tiny_model.set_attn_implementation("eager")
    attentions = tiny_model(**prompts_of(inputs), output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    assert [tuple(weights.shape) for weights in attentions] == [(2, 2, length, length)] * 2


def test_features_are_tensors_or_outputs(tiny_model, inputs):
    cells = {name: inputs[name] for name in ("gene_ids", "expression", "cell_attention_mask")}
    texts = {name: inputs[name] for name in inputs if name.startswith("qformer")}
    for get, features, width in ((tiny_model.get_cell_features, cells, 24), (tiny_model.get_text_features, texts, 24)):
        output = get(**features, return_dict=True)
        torch.testing.assert_close(output.pooler_output, get(**features))
        assert output.last_hidden_state.shape[-1] == width


def test_the_mean_of_the_language_loss_is_that_of_the_labels(tiny_model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = tiny_model(**prompts_of(inputs), labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert outputs.loss == outputs.language_loss == expected
    n_labels = (labels[:, 1:] != -100).sum()
    shares = tiny_model(**prompts_of(inputs), labels=labels, num_items_in_batch=2 * n_labels)
    torch.testing.assert_close(shares.loss, expected / 2)
    shifted = tiny_model(**prompts_of(inputs), labels=labels, shift_labels=labels.roll(-1, dims=1))
    rolled = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.roll(-1, dims=1).flatten())
    torch.testing.assert_close(shifted.loss, rolled)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["language_projection"]}, "IA3"], ids=str
)
def test_adapters_of_layers_train_and_merge(tiny_model, inputs, tmp_path, settings):
    peft = pytest.importorskip("peft")
    kinds = {"target_modules": tiny_model.lora_target_modules, "task_type": "CAUSAL_LM"}
    if settings == "IA3":
        chosen = peft.IA3Config(**kinds, feedforward_modules=[])
    else:
        chosen = peft.LoraConfig(r=2, **kinds, **settings)
    base = copy.deepcopy(tiny_model)
    adapted = peft.get_peft_model(tiny_model, chosen)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(**prompts_of(inputs), labels=labels).loss.backward()
        optimizer.step()
    logits = adapted.eval()(**prompts_of(inputs)).logits
    assert (logits - base(**prompts_of(inputs)).logits).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(**prompts_of(inputs)).logits, logits)
    torch.testing.assert_close(adapted.merge_and_unload()(**prompts_of(inputs)).logits, logits, atol=1e-4, rtol=1e-4)


def test_a_loaded_model_and_its_processor_make_a_pipeline(tiny_pipeline, adata):
    made = tiny_pipeline.processor.pipeline(tiny_pipeline.model, task="cell-embedding")
    expected = tiny_pipeline.embed(adata.copy()).obsm["X_scmmgpt"]
    np.testing.assert_array_equal(made(adata.copy()).obsm["X_scmmgpt"], expected)


@pytest.mark.parametrize("name", ["get_cell_features", "get_cell_tokens", "get_profile_embeddings", "match"])
def test_methods_of_the_parts_show_what_they_take(name):
    whole, part = (getattr(kind, name) for kind in (ScMMGPTForConditionalGeneration, ScMMGPTModel))
    assert inspect.signature(whole) == inspect.signature(part)
    assert whole.__doc__ == part.__doc__


def test_genes_to_generate_are_taken_as_the_processor_names_them(tiny_model, tiny_processor):
    prompt, genes = tiny_processor(["a B cell"]), tiny_processor.gene_ids_of(["CD19", "CD3E"])
    expected = tiny_model.generate_cells(**prompt, target_gene_ids=torch.as_tensor(genes)).expression
    for form in (genes, genes.tolist()):
        assert torch.equal(tiny_model.generate_cells(**prompt, target_gene_ids=form).expression, expected)


def test_flash_attention_of_the_whole_is_that_of_the_language_model(tiny_config, tmp_path, monkeypatch):
    def check(self, name, *args, **kwargs):  # as if flash-attn were installed
        assert self._supports_flash_attn or name != "flash_attention_2", type(self)
        return name

    torch.manual_seed(0)
    ScMMGPTForConditionalGeneration(tiny_config).save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    monkeypatch.setattr(PreTrainedModel, "get_correct_attn_implementation", check)
    flash = "flash_attention_2"
    parts = ("text_config", "cell_config", "qformer_config", "text_to_cell_config")
    model = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=flash)
    assert [getattr(model.config, part)._attn_implementation for part in parts] == [flash, "sdpa", "sdpa", "sdpa"]
    model.set_attn_implementation("eager")
    assert [getattr(model.config, part)._attn_implementation for part in parts] == ["eager"] * 4
    model.set_attn_implementation(flash)
    assert [getattr(model.config, part)._attn_implementation for part in parts] == [flash, "sdpa", "sdpa", "sdpa"]


def test_flex_attention_of_the_whole_is_refused(tiny_config, tmp_path):
    ScMMGPTForConditionalGeneration(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support an attention implementation .* flex_attention"):
        ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")


@pytest.mark.parametrize("settings", [QuantoConfig(weights="int8"), BitsAndBytesConfig(load_in_8bit=True)])
@pytest.mark.parametrize("as_dict", [False, True])
def test_quantisation_converts_the_layers_of_the_language_model_alone(tiny_model, settings, as_dict):
    chosen = quantize_language_model_only(settings.to_dict() if as_dict else settings)
    assert quantize_language_model_only(chosen) is chosen  # the caller's choice
    field = "llm_int8_skip_modules" if hasattr(settings, "load_in_8bit") else "modules_to_not_convert"
    assert getattr(settings, field) is None
    linear = [name for name, module in tiny_model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = [name for name in linear if should_convert_module(name, getattr(chosen, field))]
    assert len(converted) == 14  # seven in each of two layers
    assert all(name.startswith("model.language_model.layers.") for name in converted)


def test_a_language_model_in_eight_bits_generates(tiny_model, inputs, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    tiny_model.save_pretrained(tmp_path / "whole")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    whole = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path / "whole", quantization_config=settings)
    whole.save_pretrained(tmp_path / "small")
    for model in (whole, ScMMGPTForConditionalGeneration.from_pretrained(tmp_path / "small")):
        assert sum(type(module).__name__ == "Linear8bitLt" for module in model.modules()) == 14
        torch.testing.assert_close(
            model(**prompts_of(inputs)).logits.float(), tiny_model(**prompts_of(inputs)).logits, atol=0.05, rtol=0.1
        )


def test_an_offloaded_model_answers_the_same(tiny_model, inputs):
    cells = {name: inputs[name] for name in ("gene_ids", "expression", "cell_attention_mask")}
    texts = {name: inputs[name] for name in inputs if name.startswith("qformer")}
    genes = torch.arange(3, 13)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    @torch.no_grad()
    def answers():
        return [
            tiny_model(**prompts_of(inputs), **targets_of(tiny_model), labels=labels).loss,
            tiny_model.generate(**prompts_of(inputs), max_new_tokens=4, do_sample=False),
            tiny_model.get_cell_features(**cells),
            tiny_model.get_text_features(**texts),
            tiny_model.match(**cells, **texts),
            tiny_model.model.get_cell_tokens(**cells),
            tiny_model.generate_cells(**prompts_of(inputs), target_gene_ids=genes).expression,
        ]

    expected = answers()
    accelerate.cpu_offload(tiny_model, execution_device=torch.device("cpu"))
    assert tiny_model.model.query_tokens.is_meta
    for ours, theirs in zip(answers(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_all_losses_compile_as_one_graph(tiny_model, tiny_config, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    batch = {**prompts_of(inputs), **targets_of(tiny_model), "labels": labels}
    batch["target_attention_mask"] = torch.stack([torch.ones(10), torch.zeros(10)]).long()
    compiled = torch.compile(tiny_model, fullgraph=True, backend="eager")(**batch).loss
    torch.testing.assert_close(compiled, tiny_model(**batch).loss)
    torch._dynamo.reset()
    model = ScMMGPTForCellTextAlignment(tiny_config).eval()
    pairs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**pairs)
    torch.testing.assert_close(compiled.loss, model(**pairs).loss)  # two pairs: each has one possible negative


def test_beams_from_embeddings_repeat_whole_prompts_with_their_cells(tiny_model, tiny_processor, adata):
    text = ["<cell> and <cell> are", "is this a B cell ? <cell>"]
    inputs = tiny_processor(text=text, cells=adata[:3])
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    expected = tiny_model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    ids = inputs.pop("input_ids")
    embeds = tiny_model.get_input_embeddings()(ids)
    assert torch.equal(tiny_model.generate(inputs_embeds=embeds, **inputs, **options), expected)


def test_sampled_sequences_of_a_prompt_are_those_of_the_prompt_repeated(tiny_model, tiny_processor, adata):
    text = ["<cell> and <cell> are", "is this a B cell ? <cell>"]
    options = {"do_sample": True, "max_new_tokens": 5}
    torch.manual_seed(0)
    inputs = tiny_processor(text=text, cells=adata[:3])
    several = tiny_model.generate(**inputs, **options, num_return_sequences=2, return_dict_in_generate=True)
    torch.manual_seed(0)
    repeated = tiny_processor(text=[text[0], text[0], text[1], text[1]], cells=adata[[0, 1, 0, 1, 2, 2]])
    assert torch.equal(several.sequences, tiny_model.generate(**repeated, **options))
    assert not torch.equal(several.sequences[0], several.sequences[1])


def test_generation_stops_at_a_string(tiny_model, inputs):
    tokenizer = train_tokenizer(["a cell"])  # of bytes: that of the tests knows no prefixes of words
    prompts = prompts_of(inputs)
    length, options = prompts["input_ids"].shape[1], {"max_new_tokens": 6, "do_sample": False}
    whole = tiny_model.generate(**prompts, **options)
    words = [tokenizer.convert_ids_to_tokens(int(token)) for token in whole[:, length]]  # the first of each row
    stopped = tiny_model.generate(**prompts, **options, stop_strings=words, tokenizer=tokenizer)
    assert torch.equal(stopped, whole[:, : length + 1])


def test_an_exported_graph_takes_batches_of_any_size(tiny_model, inputs):
    tiny_model.config.text_config.use_cache = False
    prompts = prompts_of(inputs)
    shapes = {name: {0: torch.export.Dim("batch", min=2, max=64)} for name in prompts}
    graph = torch.export.export(tiny_model, (), prompts, dynamic_shapes=shapes, strict=False)
    three = {name: torch.cat([value, value[:1]]) for name, value in prompts.items()}
    torch.testing.assert_close(graph.module()(**three).logits, tiny_model(**three).logits)


def test_new_genes_reload_and_change_no_old_one(tiny_config, tiny_processor, inputs, tmp_path):
    torch.manual_seed(0)
    tiny_config.num_state_components = 3
    model = ScMMGPTForConditionalGeneration(tiny_config).eval()
    old = tiny_config.cell_config.vocab_size
    batch = {**prompts_of(inputs), **targets_of(model)}
    expected = model(**batch)
    model.resize_gene_embeddings(tiny_processor.add_genes(["NEW1", "NEW2"]))
    for part in (model, tiny_processor):
        part.save_pretrained(tmp_path)
    loaded, report = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    outputs = loaded.eval()(**batch)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.expression_loss, expected.expression_loss)
    processor = type(tiny_processor).from_pretrained(tmp_path)
    new = processor.gene_ids_of(["NEW1", "NEW2"])
    assert new.tolist() == [old, old + 1] == tiny_processor.gene_ids_of(["NEW1", "NEW2"]).tolist()
    genes = loaded.generate_cells(**prompts_of(inputs), target_gene_ids=torch.from_numpy(new)).expression
    assert genes.isfinite().all()
    with pytest.raises(ValueError, match=f"has {old + 2} genes, more than 3"):
        loaded.resize_gene_embeddings(3)


def test_a_prompt_with_cells_is_not_split_into_chunks(tiny_model, inputs):
    with pytest.raises(ValueError, match="prefill_chunk_size would split the prompt but not its cells"):
        tiny_model.generate(**prompts_of(inputs), max_new_tokens=2, prefill_chunk_size=4)
    words = {"input_ids": torch.arange(5, 15)[None], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(tiny_model.generate(**words, prefill_chunk_size=4), tiny_model.generate(**words))


def test_cells_are_drawn_by_ids_in_an_array(inputs):
    model = synthetic.tiny_pipeline(expression_head="nb").model
    options = {"target_gene_ids": torch.arange(3, 13), "library_size": 500.0, "do_sample": True}
    ids = np.array([2**63 + 5, 7], dtype=np.uint64)
    counts = model.generate_cells(**prompts_of(inputs), **options, cell_ids=ids).counts
    assert torch.equal(counts, model.generate_cells(**prompts_of(inputs), **options, cell_ids=[2**63 + 5, 7]).counts)


def test_new_words_of_the_language_model_reload(tiny_model, inputs, tmp_path):
    size = tiny_model.config.text_config.vocab_size
    expected = tiny_model(**prompts_of(inputs)).logits
    tiny_model.resize_token_embeddings(size + 7)
    tiny_model.save_pretrained(tmp_path)
    loaded, report = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.text_config.vocab_size == size + 7
    torch.testing.assert_close(loaded.eval()(**prompts_of(inputs)).logits[..., :size], expected)


def test_a_plain_trainer_warns_of_label_smoothing_and_keeps_the_whole_loss(tiny_model, inputs, tmp_path):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    batch = {**prompts_of(inputs), **targets_of(tiny_model), "labels": labels}
    arguments = TrainingArguments(str(tmp_path), **QUIET, label_smoothing_factor=0.1, remove_unused_columns=False)
    with pytest.warns(UserWarning, match="Disabling label smoothing"):
        trainer = Trainer(tiny_model, arguments, data_collator=lambda rows: dict(batch), eval_dataset=range(2))
    metrics = trainer.evaluate()
    outputs = tiny_model(**batch)
    assert outputs.expression_loss > 0
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert trainer.predict(range(2)).predictions.shape == outputs.logits.shape


# -- language models --------------------------------------------------------------------------------------------------


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}
LANGUAGE_MODELS = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 6},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "smollm3": GROUPED | {"no_rope_layer_interval": 2},
    "gemma2": GROUPED | {"sliding_window": 6, "final_logit_softcapping": 0.7, "attn_logit_softcapping": 5.0},
    "gemma3_text": GROUPED | {"sliding_window": 6, "final_logit_softcapping": 0.7},
    "phi": {**SIZES, **TOKENS},  # its head has a bias
    "phi3": GROUPED | {"tie_word_embeddings": False},
    "granite": GROUPED | {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "cohere": GROUPED | {"logit_scale": 0.25},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, **TOKENS},
    "gpt_neox": {**SIZES, **TOKENS, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_model_of_any_kind_is_trained_and_generates_as_it_would_alone(tiny_config, inputs, tmp_path, kind):
    torch.manual_seed(0)
    alignment = ScMMGPTForCellTextAlignment(tiny_config)
    config = AutoConfig.for_model(kind, **LANGUAGE_MODELS[kind])
    language_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in language_model.named_parameters():
        if not name.endswith("norm.weight"):  # the positions of the usual initialisation hardly matter
            torch.nn.init.normal_(weight, std=0.3)
    words = torch.randint(5, 55, (2, 9))
    expected = language_model(input_ids=words, labels=words)
    generated = language_model.generate(words, max_new_tokens=4, do_sample=False, suppress_tokens=[59])
    model = ScMMGPTForConditionalGeneration.from_components(alignment, language_model, cell_token_id=59).eval()
    model.save_pretrained(tmp_path)
    loaded, report = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for ours in (model, loaded.eval()):
        outputs = ours(input_ids=words, labels=words)
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.generate(words, max_new_tokens=4, do_sample=False), generated)
    batch = prompts_of(inputs)  # the first row is padded on the left
    together, attended = model(**batch).logits[0], batch["attention_mask"][0].bool()
    cells = {name: batch[name][:1] for name in ("gene_ids", "expression", "cell_attention_mask")}
    alone = {"input_ids": batch["input_ids"][:1, attended], "attention_mask": batch["attention_mask"][:1, attended]}
    torch.testing.assert_close(model(**alone, **cells).logits[0], together[attended], atol=1e-4, rtol=1e-4)
    options = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options)[0, -4:], model.generate(**alone, **cells, **options)[0, -4:])


# -- serving, and the examples of the documentation -------------------------------------------------------------------


def folders_of_the_examples(pipeline, cell_processor, adata, path):
    """What the examples of the page name: small checkpoints, cells, and the metrics."""
    adata.write_h5ad(path / "cells.h5ad")
    shutil.copytree(ROOT / "eval" / "metrics", path / "eval" / "metrics")
    torch.manual_seed(0)
    ScGPTModel(pipeline.model.config.cell_config).save_pretrained(path / "checkpoints" / "scgpt")
    cell_processor.save_pretrained(path / "checkpoints" / "scgpt")
    alignment = ScMMGPTForCellTextAlignment(synthetic.tiny_config())
    for model, name in ((alignment, "aligned"), (pipeline.model, "tuned")):
        model.save_pretrained(path / "checkpoints" / name)
        pipeline.processor.save_pretrained(path / "checkpoints" / name)
    export_checkpoint(str(path / "checkpoints" / "tuned"), path / "exported")


def examples():
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    for section in re.split(r"\n##+ ", page)[1:]:
        for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
            yield pytest.param(code, id=section.splitlines()[0])


@pytest.mark.parametrize("code", examples())
def test_an_example_of_the_documentation_runs(
    code, tiny_pipeline, cell_processor, adata, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folders_of_the_examples(tiny_pipeline, cell_processor, adata, tmp_path)
    code = code.replace("TrainingArguments(", "TrainingArguments(use_cpu=True, report_to='none', output_dir=")
    exec(compile(code, "docs/transformers.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_row_of_the_table_names_a_test_that_exists():
    table = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8").split("| feature | state | test |")[1]
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    known = {*sources, *re.findall(r"^def (test_\w+)", "\n".join(sources.values()), flags=re.MULTILINE)}
    for row in table.strip().splitlines()[1:]:
        named = re.findall(r"`(test_\w+(?:\.py)?)`", row.rsplit("|", 2)[1])
        assert named, row
        assert set(named) <= known, row


def test_an_exported_language_model_is_transformers_own_and_generates_the_same(tiny_pipeline, adata, tmp_path):
    model, processor = tiny_pipeline.model.eval(), tiny_pipeline.processor
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    paths = export_checkpoint(str(tmp_path / "whole"), tmp_path / "exported")
    with pytest.raises(FileExistsError, match="exists already"):
        export_checkpoint(str(tmp_path / "whole"), tmp_path / "exported")
    language_model, report = AutoModelForCausalLM.from_pretrained(paths["language_model"], output_loading_info=True)
    assert not any(report.values())
    assert type(language_model).__name__ == "LlamaForCausalLM"
    assert not list(Path(paths["language_model"]).glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(paths["language_model"])
    assert tokenizer.chat_template == processor.chat_template
    encoder, report = ScMMGPTCellEncoder.from_pretrained(paths["cell_encoder"], output_loading_info=True)
    assert not any(report.values())

    inputs = processor(["<cell> this is", "what is <cell> and <cell> ?"], adata[:3])
    ids = inputs["input_ids"]
    embeds = language_model.get_input_embeddings()(ids).detach()
    cells = {name: inputs[name] for name in ("gene_ids", "expression", "cell_attention_mask")}
    embeds[ids == processor.cell_token_id] = encoder(**cells).detach().flatten(0, 1)
    options = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(language_model.generate(inputs_embeds=embeds, **options), expected)


def test_a_stage_1_checkpoint_cannot_be_exported(tiny_config, tmp_path):
    ScMMGPTForCellTextAlignment(tiny_config).save_pretrained(tmp_path / "aligned")
    with pytest.raises(ValueError, match="and no language model; name a checkpoint of `tune`"):
        export_checkpoint(str(tmp_path / "aligned"), tmp_path / "exported")
