"""Both training stages on a tiny corpus: what is trained, what is not, and that a run can be cut in two."""

import itertools
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.tests.corpora import SHORT, SIZES
from scmmgpt.train import align, curves, states, tune
from scmmgpt.train import language_model as language_models
from scmmgpt.train.convert import load_causal_lm
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.collate import AlignmentCollator
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.data.stream import CellStream
from scmmgpt.train.language_model import train_tokenizer
from scmmgpt.train.trainer import flatten_scalars, frozen_modules


SMALL_PROJECTOR = {"num_condition_tokens": 2, "text_to_cell_config": {"num_hidden_layers": 1}}


@pytest.fixture(autouse=True)
def few_steps_of_states(monkeypatch):
    """States of cells are fitted after each run of stage 2; `test_states.py` tests their fit."""
    monkeypatch.setattr(states, "MAX_FACTOR_STEPS", 20)


def words_of(values):
    """A command line: mappings as JSON."""
    texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in values.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def run_align(corpus, bert, output_dir, model_config=None, **options):
    align_only(corpus, bert, output_dir, model_config, **options)
    return align.ScMMGPTForCellTextAlignment.from_pretrained(output_dir)


def align_only(corpus, bert, output_dir, model_config=None, cells=None, **options):
    values = {
        "corpus": corpus,
        "bert": bert,
        "output_dir": output_dir,
        "cell_config": {**SIZES, "hidden_dropout": 0.0},
        "model_config": {"num_query_tokens": 2, "projection_dim": 8, **(model_config or {})},
        "qformer_config": {"cross_attention_frequency": 1},
        **SHORT,
        "max_steps": 2,
        **options,
    }
    align.main(*align.make_parser().parse_args_and_config(words_of(values)), cells=cells)


def run_tune(corpus, aligned, output_dir, model_config=None, **options):
    tune_only(corpus, aligned, output_dir, model_config, **options)
    return tune.ScMMGPTForConditionalGeneration.from_pretrained(output_dir)


def tune_only(corpus, aligned, output_dir, model_config=None, cells=None, **options):
    values = {
        "corpus": corpus,
        "aligned": aligned,
        "output_dir": output_dir,
        "language_model": "scratch",
        "language_model_config": {**SIZES, "num_key_value_heads": 2},
        "model_config": {**SMALL_PROJECTOR, **(model_config or {})},
        "lora_config": {"lora_dropout": 0},
        **SHORT,
        "max_steps": 2,
        **options,
    }
    tune.main(*tune.make_parser().parse_args_and_config(words_of(values)), cells=cells)


def test_only_frozen_parts_leave_training_mode():
    frozen, trained = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()) for _ in range(2))
    frozen.requires_grad_(False)
    model = torch.nn.ModuleList([torch.nn.Sequential(frozen, trained), torch.nn.Dropout()])
    assert frozen_modules(model) == [frozen, *frozen]
    trained.requires_grad_(False)
    assert frozen_modules(model) == list(model.modules())


@pytest.mark.parametrize("dropout", ["hidden_dropout", "attention_dropout"])
def test_a_frozen_cell_model_gives_a_training_step_the_same_cells_every_time(tiny_config, dropout):
    setattr(tiny_config.cell_config, dropout, 0.5)
    model = ScMMGPTForCellTextAlignment(tiny_config)
    model.cell_model.requires_grad_(False)
    for trained in (False, True):
        model.cell_model.requires_grad_(trained).train()
        for module in frozen_modules(model):
            module.training = False
        gene_ids = torch.tensor([[1, 5, 7, 9]])
        first, second = (model.encode_cells(gene_ids, torch.ones(1, 4)) for _ in range(2))
        assert torch.equal(first, second) != trained


def test_what_tuning_freezes_is_still_at_every_step_and_what_it_trains_is_not(corpus, aligned, tmp_path, monkeypatch):
    compute_loss, noisy = tune.TuneTrainer.compute_loss, []

    def watch(trainer, model, *args, **kwargs):
        loss = compute_loss(trainer, model, *args, **kwargs)
        noisy.append({name for name, module in model.named_modules() if module.training})
        return loss

    monkeypatch.setattr(tune.TuneTrainer, "compute_loss", watch)
    parts, lora = {"cell_model": "decoders"}, {"lora_dropout": 0.1}
    options = {"lora_config": lora, "train_parts": parts, "eval_strategy": "steps", "eval_steps": 1}
    run_tune(corpus, aligned, tmp_path, **options)
    steps = [names for names in noisy if names]
    assert len(steps) == 2 < len(noisy)  # the others are of evaluation
    for names in steps:
        still = ("model.cell_model.encoder.layers.0.attention", "model.qformer.encoder.layer.0.attention.attention")
        trained = ("layers.0.mlp.up_proj.lora_dropout.default", "model.text_to_cell.modules_to_save.default")
        assert not any(name.endswith(still) for name in names)
        assert all(any(name.endswith(part) for name in names) for part in trained)
        assert any(name.endswith("model.cell_model.encoder.layers.0") for name in names)  # else not checkpointed


def log_of(output_dir, name):
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history if name in line]


def test_alignment_trains_on_a_corpus_and_names_its_losses(corpus, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(align, "save_curves", curves.save_curves)
    run_align(corpus, bert, str(tmp_path), max_steps=80, learning_rate=2e-3, eval_strategy="steps", eval_steps=40)
    loss = log_of(tmp_path, "loss")
    assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5])
    components = [log_of(tmp_path, name)[0] for name in ("contrastive_loss", "matching_loss")]
    assert sum(components) == pytest.approx(loss[0], abs=0.01)
    assert 0 <= log_of(tmp_path, "eval_zero_shot_accuracy")[-1] <= 1
    recalls = [log_of(tmp_path, f"eval_cell_to_text_recall_at_{k}")[-1] for k in (1, 5, 10)]
    assert recalls == sorted(recalls)
    assert 0 <= recalls[0] <= recalls[-1] <= 1
    speeds = log_of(tmp_path, "cells_per_second")
    assert len(speeds) == len(loss) - 1  # there is no time before the first line
    assert min(speeds) > 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_recall_equals_that_of_sorted_lists(seed):
    rng = np.random.default_rng(seed)
    similarity, own = rng.random((30, 12)), np.concatenate([np.arange(12), rng.integers(0, 12, 18)])
    scores = align.retrieval_recall(torch.from_numpy(similarity), torch.from_numpy(own))
    for k in (1, 5, 10):
        texts = np.argsort(-similarity, axis=1)[:, :k]
        found = [own[cell] in texts[cell] for cell in range(30)]
        assert scores[f"cell_to_text_recall_at_{k}"] == round(np.mean(found), 4)
        cells = np.argsort(-similarity, axis=0)[:k]
        found = [text in own[cells[:, text]] for text in range(12)]
        assert scores[f"text_to_cell_recall_at_{k}"] == round(np.mean(found), 4)


def zero_shot_of(corpus, aligned, rank=0, world_size=1, shard=False):
    """The scores of an evaluation of a stage-1 checkpoint, its layers sharded as FSDP does it or not."""
    model, processor = ScMMGPTForCellTextAlignment.from_pretrained(aligned), ScMMGPTProcessor.from_pretrained(aligned)
    if shard:
        flatten_scalars(model)
        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for module in [*model.cell_model.encoder.layers, *model.qformer.encoder.layer, model]:
            fully_shard(module, mesh=mesh)
    captions = CaptionSampler("short")
    share = {"batch_size": 2, "shuffle": False, "rank": rank, "world_size": world_size}
    stream = CellStream(open_corpus(corpus), split="validation", **share)
    trainer = SimpleNamespace(
        model=model,
        captions=captions,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        eval_dataset=BatchDataset(stream, AlignmentCollator(processor, captions)),
        args=SimpleNamespace(device="cpu"),
    )
    return [align.AlignTrainer.zero_shot(trainer) for _ in range(2)]  # a second time nothing differs


def test_every_rank_measures_the_same_cells(corpus, aligned):
    scores = [zero_shot_of(corpus, aligned, *share) for share in [(0, 1), (0, 2), (1, 2)]]
    assert scores[0] == scores[1] == scores[2]


def write_zero_shot(corpus, aligned, folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    scores = zero_shot_of(corpus, aligned, rank, torch.distributed.get_world_size(), shard=True)
    (folder / f"{rank}.json").write_text(json.dumps(scores))


def test_a_sharded_model_is_evaluated_like_a_whole_one(corpus, aligned, tmp_path):
    run_ranks(write_zero_shot, corpus, aligned, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == zero_shot_of(corpus, aligned)


def test_a_model_to_which_all_is_the_same_retrieves_nothing():
    scores = align.retrieval_recall(torch.zeros(40, 20), torch.arange(40) % 20)
    assert set(scores.values()) == {0.0}


def test_a_checkpoint_comes_with_a_card_that_says_what_it_is(corpus, bert, tmp_path):
    run_align(corpus, bert, str(tmp_path), eval_strategy="epoch")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert "**A demonstration.** The model was trained on 32 cells" in card.text
    accuracy = log_of(tmp_path, "eval_zero_shot_accuracy")[-1]
    assert f"| zero shot accuracy | {accuracy:.4g} |" in card.text
    assert "8 validation cells of splits" in card.text
    (result,) = [found for found in card.data.eval_results if found.metric_type == "zero_shot_accuracy"]
    assert (result.task_type, result.dataset_split) == ("zero-shot-classification", "validation")
    assert result.metric_value == accuracy


def test_what_is_pushed_is_complete_and_has_this_projects_card(corpus, bert, tmp_path, monkeypatch):
    pushed = []

    def upload(repo_id, folder_path, **kwargs):
        pushed.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    api = SimpleNamespace(upload_folder=upload, create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="me/it"))
    for module in ("transformers.trainer.hf_api", "scmmgpt.train.data.sharing.HfApi"):
        monkeypatch.setattr(module, lambda *args, **kwargs: api)
    run_align(corpus, bert, str(tmp_path), push_to_hub=True, eval_strategy="epoch")
    assert len(pushed) == 1
    assert {"model.safetensors", "modeling_scmmgpt.py", "processor_config.json", "training.json"} <= set(pushed[0])
    assert b"**A demonstration.** The model was trained on 32 cells" in pushed[0]["README.md"]


def test_frozen_pretrained_weights_are_bit_identical_and_all_others_change(corpus, bert, tmp_path):
    args = (corpus, bert)
    before = run_align(*args, str(tmp_path / "before"), pretrained_learning_rate=0, learning_rate=0).state_dict()
    after = run_align(*args, str(tmp_path / "after"), pretrained_learning_rate=0).state_dict()
    _, pretrained, _ = align.qformer_from_bert(bert, cross_attention_frequency=1, encoder_hidden_size=16)
    frozen = {name.replace("embeddings.", "qformer_embeddings.", 1) for name in pretrained if "embeddings" in name}
    frozen |= {name for name in pretrained if name.startswith("qformer.")}
    for name, value in before.items():
        # Without a loss, and a closed form.
        unused = name.startswith(("cell_model.mvc_decoder", "cell_model.expression_decoder", "label_readout."))
        same = torch.equal(value, after[name])
        # A key's bias moves no attention weight, so its gradient is 0 up to rounding. How much the places of labels
        # count beside the network is chosen after training.
        if name == "label_readout.features" or (name.endswith("key.bias") and not same):
            continue
        assert same == (name in frozen or unused or name.endswith("key.bias")), name


@pytest.mark.parametrize("head", ["mse", "nb"])
def test_tuning_trains_both_directions_and_keeps_what_is_frozen(corpus, aligned, tmp_path, head):
    before = align.ScMMGPTForCellTextAlignment.from_pretrained(aligned).state_dict()
    model = run_tune(corpus, aligned, str(tmp_path), {"expression_head": head})
    assert len(log_of(tmp_path, "language_loss")) == len(log_of(tmp_path, "expression_loss")) == 2
    after = model.model.state_dict()
    for name, value in before.items():
        if not name.startswith("cell_model."):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(
        before["cell_model.encoder.layers.0.linear1.weight"], after["cell_model.encoder.layers.0.linear1.weight"]
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_with_decoders_alone_cells_are_read_as_stage_1_reads_them(corpus, aligned, tmp_path):
    before = align.ScMMGPTForCellTextAlignment.from_pretrained(aligned).state_dict()
    model = run_tune(
        corpus, aligned, str(tmp_path), {"expression_head": "mse"}, train_parts={"cell_model": "decoders"}
    )
    after = model.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith(("cell_model.mvc_decoder.", "cell_model.expression_decoder.")) for name in changed)


def test_the_losses_of_a_step_are_those_of_the_models_own_forward(corpus, aligned, tmp_path, monkeypatch):
    """The head scores labelled states alone, which must change nothing."""
    compared = []

    def compare(trainer, resume_from_checkpoint=None):
        trainer.model.eval()
        for batch in itertools.islice(trainer.train_dataset, 2):
            ours = trainer.compute_loss(trainer.model, dict(batch))
            compared.append((ours.item(), trainer.model(**batch).loss.item()))

    monkeypatch.setattr(tune.TuneTrainer, "train", compare)
    run_tune(corpus, aligned, str(tmp_path))
    ours, theirs = zip(*compared, strict=True)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("ratio", [0, 1])
def test_tuning_in_one_direction_alone(corpus, aligned, tmp_path, ratio):
    run_tune(corpus, aligned, str(tmp_path), text_to_cell_ratio=ratio, prompts_per_epoch=1)
    name = "expression_loss" if ratio else "language_loss"
    assert log_of(tmp_path, "loss") == pytest.approx(log_of(tmp_path, name), abs=0.01)


def test_one_step_of_eight_cells_is_eight_accumulated_steps_of_one(corpus, aligned, tmp_path):
    run_tune(corpus, aligned, str(tmp_path / "a"), max_steps=1)
    run_tune(
        corpus, aligned, str(tmp_path / "b"), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    for name in ("loss", "grad_norm"):
        assert log_of(tmp_path / "a", name) == pytest.approx(log_of(tmp_path / "b", name), rel=1e-3)


@pytest.mark.parametrize("which", ["full", "frozen"])
def test_a_language_model_can_be_trained_in_full_or_left_alone(corpus, aligned, tmp_path, which):
    parts = {"language_model": which}
    model = run_tune(corpus, aligned, str(tmp_path / "a"), train_parts=parts)
    again = run_tune(corpus, aligned, str(tmp_path / "b"), train_parts=parts, learning_rate=0)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], again.state_dict()[name]) == (which == "frozen")


def test_beside_lora_the_qformer_is_trained_but_for_its_query_tokens(corpus, aligned, tmp_path):
    before = align.ScMMGPTForCellTextAlignment.from_pretrained(aligned).state_dict()
    changed = {}
    for which in ("full", "lora"):
        parts = {"language_model": which, "qformer": True}
        after = run_tune(corpus, aligned, str(tmp_path / which), train_parts=parts).model.state_dict()
        changed[which] = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"cell_norm.weight", "cell_norm.bias", "qformer.layernorm.weight"} <= changed["lora"]
    differ = {name for name in changed["full"] ^ changed["lora"] if not name.endswith("key.bias")}
    assert differ == {"query_tokens", "query_means"}


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A one-layer Llama, saved in bfloat16 as most are."""
    path = tmp_path_factory.mktemp("language_model")
    tokenizer = train_tokenizer(["This cell is a B cell.", "Generate a monocyte."])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,  # enough for rounding to be seen
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run_in_precision(corpus, aligned, path, monkeypatch, **options):
    """Tune; returns the dtypes that were trained, and a batch's logits before the run is saved and after."""
    seen = {}

    def train(trainer, resume_from_checkpoint=None):
        super(tune.TuneTrainer, trainer).train(resume_from_checkpoint)
        seen["dtypes"] = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        trainer.train_dataset.set_epoch(0)
        seen["batch"] = next(iter(trainer.train_dataset))
        with torch.no_grad():
            seen["logits"] = trainer.model.eval()(**seen["batch"]).logits.float()

    with monkeypatch.context() as patch:
        patch.setattr(tune.TuneTrainer, "train", train)
        model = run_tune(corpus, aligned, path, max_steps=6, learning_rate=3e-3, **options)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        return seen["dtypes"], seen["logits"], model.eval()(**seen["batch"]).logits


def relative_distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("precision", "which", "autocast", "rounding"),
    [
        ("bf16", "lora", False, 0.02),
        ("bf16", "frozen", True, 0.01),
        ("4bit", "lora", True, 0.02),
        ("4bit", "frozen", False, 0.02),
    ],
)
def test_a_language_model_held_in_less_memory_is_tuned_like_one_in_float32(
    corpus, aligned, language_model, tmp_path, monkeypatch, precision, which, autocast, rounding
):
    if precision == "4bit":
        pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    options = {"language_model": language_model, "train_parts": {"language_model": which}, "bf16": autocast}
    run_in_precision(corpus, aligned, tmp_path / "fp32", monkeypatch, **options)
    options["language_model_precision"] = precision
    trained, before, after = run_in_precision(corpus, aligned, tmp_path / "less", monkeypatch, **options)
    assert trained == {torch.float32}
    assert relative_distance(after, before) < 0.03
    for name in ("language_loss", "expression_loss"):
        assert log_of(tmp_path / "less", name) == pytest.approx(log_of(tmp_path / "fp32", name), rel=rounding)
    saved = load_file(tmp_path / "less" / "model.safetensors")
    assert saved["model.language_model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert saved["model.language_projection.0.weight"].dtype == torch.float32


def test_an_adapter_trained_on_bfloat16_weights_loads_on_float32_ones(corpus, aligned, language_model, tmp_path):
    merged = run_tune(
        corpus, aligned, tmp_path, language_model=language_model, language_model_precision="bf16"
    ).state_dict()
    base = tune.join(
        align.ScMMGPTForCellTextAlignment.from_pretrained(aligned),
        load_causal_lm(language_model, dtype=torch.float32)[0],
        tune.ScMMGPTProcessor.from_pretrained(tmp_path),
        tune.TuneModelArguments("", "", model_config=SMALL_PROJECTOR),
    )
    loaded = tune.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, value in merged.items():
        # The first have a new row for `<cell>`; only the base that `tune` saves has the fitted states of cells.
        if not name.startswith(("model.language_model.embed_tokens.", "lm_head.", "model.cell_states.")):
            torch.testing.assert_close(loaded[name], value, rtol=2**-8, atol=1e-6, msg=name)


@pytest.mark.parametrize("which", ["lora", "frozen"])
def test_tuning_in_four_bits_that_is_cut_in_two_ends_like_one_that_is_not(
    corpus, aligned, language_model, tmp_path, which
):
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    options = {
        "language_model": language_model,
        "language_model_precision": "4bit",
        "train_parts": {"language_model": which},
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",  # evaluating must not change what follows
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = run_tune(corpus, aligned, tmp_path / "whole", max_steps=4, **options)
    run_tune(corpus, aligned, tmp_path / "cut", **options)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed = run_tune(corpus, aligned, tmp_path / "cut", max_steps=4, resume_from_checkpoint=checkpoint, **options)
    assert log_of(tmp_path / "whole", "loss") == log_of(tmp_path / "cut", "loss")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], msg=name)
    if which == "frozen":  # on the way the whole model is saved, in 4 bits what is trained in 4 bits
        half = tune.ScMMGPTForConditionalGeneration.from_pretrained(checkpoint)
        in_4bit = [name for name, module in half.named_modules() if type(module).__name__ == "Linear4bit"]
        assert len(in_4bit) == 7
        assert all(name.startswith("model.language_model.layers.0.") for name in in_4bit)


def test_precision_is_refused_where_it_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="trained weights are fp32"):
        tune.TuneModelArguments(
            "", "some/model", train_parts={"language_model": "full"}, language_model_precision="bf16"
        )
    with pytest.raises(ValueError, match="no weights to hold in 4 bits"):
        tune.TuneModelArguments("", "scratch", language_model_precision="4bit")
    monkeypatch.setattr(language_models, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"scmmgpt\[quantized\]"):
        language_models.load_in_4bit("some/model", torch.device("cpu"))


def check_cut(run, tmp_path, cut, steps, **options):
    """A run that is killed after `cut` steps, at a checkpoint, and resumed ends like one that is not."""
    options = {"lr_scheduler_type": "constant", "max_steps": steps, "save_steps": cut, **options}
    options["save_strategy"] = "steps"
    run(str(tmp_path / "whole"), **options)
    # What a kill leaves: the folders, of which one is the checkpoint, and no file of the end.
    for folder in (path for path in (tmp_path / "whole").iterdir() if path.is_dir()):
        shutil.copytree(folder, tmp_path / "cut" / folder.name)
    run(str(tmp_path / "cut"), resume_from_checkpoint=tmp_path / "cut" / f"checkpoint-{cut}", **options)
    for name in ("loss", "epoch", "step"):
        assert log_of(tmp_path / "whole", name) == log_of(tmp_path / "cut", name), name
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_of_other_weights_is_not_resumed(corpus, bert, tmp_path):
    options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    align_only(corpus, bert, str(tmp_path), **options)
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    del weights["text_projection.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['text_projection.weight'\]"):
        align_only(corpus, bert, str(tmp_path), resume_from_checkpoint=tmp_path / "checkpoint-1", **options)


# An epoch is four batches of eight cells, or seven of five: the cuts are in epochs 0, 3, 1 and 3.
@pytest.mark.parametrize(
    ("cut", "steps", "options"),
    [
        (3, 6, {}),
        (13, 17, {}),
        (4, 9, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}),  # 7 batches, 3 steps
        (11, 15, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "balance": "cell_type"}),
    ],
    ids=str,
)
def test_a_run_that_is_cut_in_two_ends_like_one_that_is_not(corpus, bert, tmp_path, cut, steps, options):
    check_cut(lambda path, **settings: align_only(corpus, bert, path, **settings), tmp_path, cut, steps, **options)


@pytest.mark.parametrize(("cut", "steps"), [(4, 7), (8, 9)])
def test_two_processes_that_are_cut_in_two_end_like_ones_that_are_not(corpus, bert, tmp_path, cut, steps):
    """Sixteen cells a rank make four batches, hence two steps an epoch and a cut in epoch 1 or after epoch 3."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 5}
    check_cut(
        lambda path, **settings: run_ranks(align_only, corpus, bert, path, **settings), tmp_path, cut, steps, **options
    )


@pytest.mark.parametrize("command", [align, tune])
def test_label_smoothing_which_the_losses_have_not_is_refused(command):
    required = {"corpus": "c", "output_dir": "o", "label_smoothing_factor": 0.1}
    required |= {"bert": "b"} if command is align else {"aligned": "a", "language_model": "scratch"}
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, but the losses of this command"):
        command.make_parser().parse_args_and_config(words_of(required))


def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_latest_whole_checkpoint(
    corpus, bert, tmp_path, monkeypatch
):
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    align_only(corpus, bert, tmp_path / "whole", **options)
    save, n_saved = align.AlignTrainer._save_rng_state, []

    def die_the_second_time(trainer, output_dir):
        n_saved.append(output_dir)
        if len(n_saved) == 2:
            raise KeyboardInterrupt
        save(trainer, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(align.AlignTrainer, "_save_rng_state", die_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            align_only(corpus, bert, tmp_path / "cut", **options)
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    words = ("--corpus", "c", "--bert", "b", "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "True")
    *_, training_args = align.make_parser().parse_args_and_config(words)
    assert training_args.resume_from_checkpoint == str(tmp_path / "cut" / "checkpoint-2")
    align_only(corpus, bert, tmp_path / "cut", resume_from_checkpoint="latest", **options)
    assert log_of(tmp_path / "whole", "loss") == log_of(tmp_path / "cut", "loss")
    names = {path.name for path in (tmp_path / "cut").iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_without_a_checkpoint_the_latest_is_the_beginning(corpus, bert, tmp_path):
    align_only(corpus, bert, tmp_path / "new", resume_from_checkpoint="latest", max_steps=1)
    assert len(log_of(tmp_path / "new", "loss")) == 1


def test_the_best_checkpoint_is_known_by_its_place_and_old_ones_go(corpus, bert, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 4}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    align_only(corpus, bert, tmp_path, load_best_model_at_end=True, **options)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert len(kept) == 2
    assert Path(state["best_model_checkpoint"]).parent == tmp_path
    assert Path(state["best_model_checkpoint"]).name in kept
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    later = ("label_readout.features", "text_projection.weight", "text_projection.bias")  # turned apart after training
    assert all(torch.equal(value, saved[name]) for name, value in best.items() if name not in later)


def test_tuning_on_conversations_that_is_cut_in_two_ends_like_one_that_is_not(corpus, aligned, tmp_path):
    ids = open_corpus(corpus).obs("train", ["cell_id"])["cell_id"].to_pylist()
    turns = [
        {"role": "user", "content": "<cell> Same as <cell>?"},
        {"role": "assistant", "content": "No, they differ."},
    ]
    rows = [{"messages": turns, "cell_ids": [str(ids[i]), str(ids[i + 1])]} for i in range(5)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"instructions": tmp_path / "chats.jsonl", "instruction_ratio": 0.5}
    check_cut(lambda path, **settings: tune_only(corpus, aligned, path, **settings), tmp_path, 6, 9, **options)
    plain = tmp_path / "plain"
    run_tune(corpus, aligned, str(plain), max_steps=1)
    assert log_of(plain, "language_loss")[0] != log_of(tmp_path / "whole", "language_loss")[0]


@pytest.mark.parametrize("command", [align, tune])
def test_epochs_are_counted_on_a_streamed_dataset(corpus, bert, aligned, tmp_path, monkeypatch, command):
    trainer_class = align.AlignTrainer if command is align else tune.TuneTrainer
    train, seen = trainer_class.train, []
    monkeypatch.setattr(
        trainer_class, "train", lambda self, **options: seen.append(self.train_dataset) or train(self, **options)
    )
    options = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    run, start = (align_only, bert) if command is align else (tune_only, aligned)
    run(corpus, start, str(tmp_path), **options)
    assert isinstance(seen[0], datasets.IterableDataset)
    assert len(seen[0]) == 4
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [line["epoch"] for line in history if "loss" in line] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert {line["epoch"] for line in history if "eval_loss" in line} == {1, 2}


def test_contrasts_differ_in_what_counts_as_right(corpus, bert, tmp_path):
    losses = {}
    for name, fields in {"default": {}, "published": {"contrastive_group_size": 3}}.items():
        run_align(corpus, bert, tmp_path / name, {"matching_weight": 0, **fields})
        losses[name] = log_of(tmp_path / name, "contrastive_loss")
    assert losses["published"][0] < losses["default"][0]  # two wrong texts instead of seven cells' worth of them


def test_gene_embeddings_start_from_co_expression_and_the_text_branch_from_the_bert(corpus, bert, tmp_path):
    model = run_align(corpus, bert, tmp_path, max_steps=1, learning_rate=0)
    genes = model.cell_model.get_input_embeddings().weight[3:]
    rank = torch.linalg.matrix_rank(genes - genes.mean(dim=0))
    assert rank == 16  # as many components as the embeddings are wide
    _, weights, _ = align.qformer_from_bert(bert, cross_attention_frequency=1, encoder_hidden_size=16)
    words = model.qformer_embeddings.word_embeddings.weight
    torch.testing.assert_close(words.data, weights["embeddings.word_embeddings.weight"])


def _one_rank(rank, port, world_size, command, arguments):
    """A process of a run by `torchrun`, which sets these variables."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process it was forked from
    command(*arguments[:-1], **arguments[-1])
    torch.distributed.destroy_process_group()


def run_ranks(command, *arguments, world_size=2, **options):
    """Run a command in processes that talk over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_one_rank, args=(rank, port, world_size, command, (*arguments, options)))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0


@pytest.mark.parametrize("which", ["full", "lora"])
def test_two_processes_tune_like_one(corpus, aligned, tmp_path, which):
    options = {"max_steps": 1, "train_parts": {"language_model": which}, "lr_scheduler_type": "constant"}
    whole = run_tune(corpus, aligned, str(tmp_path / "one"), per_device_train_batch_size=32, **options)
    run_ranks(tune_only, corpus, aligned, str(tmp_path / "two"), per_device_train_batch_size=16, **options)
    halves = tune.ScMMGPTForConditionalGeneration.from_pretrained(tmp_path / "two")
    for name in ("loss", "grad_norm"):
        assert log_of(tmp_path / "two", name) == pytest.approx(log_of(tmp_path / "one", name), rel=1e-3), name
    for name, value in whole.state_dict().items():  # Adam's first step goes by the sign of a gradient alone
        assert (value - halves.state_dict()[name]).abs().max() <= 2e-3 + 1e-6, name
    assert len(log_of(tmp_path / "two", "language_loss")) == len(log_of(tmp_path / "two", "expression_loss")) == 1
