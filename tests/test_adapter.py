"""The adapter of stage 2: it names a base that exists, loads on that base alone, and has a card."""

import json

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.tests.test_remote_code import run_without_package
from scmmgpt.tests.test_train import tune_only
from scmmgpt.train.data.corpus import open_corpus


@pytest.fixture(scope="module")
def tuned(corpus, aligned, tmp_path_factory):
    """A LoRA run with a checkpoint on the way."""
    path = tmp_path_factory.mktemp("tuned")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
    tune_only(corpus, aligned, str(path), **saving)
    return path


@pytest.fixture
def batch(tuned, corpus):
    """Two cells that are described."""
    processor = ScMMGPTProcessor.from_pretrained(tuned)
    cells, _ = open_corpus(corpus).load("train", columns=[])
    prompt = processor.render_prompt("describe")
    return processor(text=[prompt] * 2, cells=cells[:2])


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**batch).logits


def test_the_adapter_loads_with_its_base_and_equals_the_merged_checkpoint(tuned, batch):
    merged = logits_of(ScMMGPTForConditionalGeneration.from_pretrained(tuned), batch)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tuned / "adapter", trust_remote_code=True)
    torch.testing.assert_close(logits_of(loaded, batch), merged, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tuned / "base", trust_remote_code=True)
    by_hand = logits_of(peft.PeftModel.from_pretrained(base, tuned / "adapter"), batch)
    torch.testing.assert_close(by_hand, merged, rtol=1e-4, atol=1e-5)
    by_transformers = AutoModelForCausalLM.from_pretrained(tuned / "adapter", trust_remote_code=True)
    torch.testing.assert_close(logits_of(by_transformers, batch), merged, rtol=1e-4, atol=1e-5)
    without = logits_of(AutoModelForCausalLM.from_pretrained(tuned / "base", trust_remote_code=True), batch)
    assert (without - merged).abs().max() > 0.01


def test_the_adapter_of_a_step_on_the_way_loads_with_the_same_base(tuned, batch):
    names = {
        json.loads((tuned / folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        for folder in ("adapter", "checkpoint-2", "checkpoint-4")
    }
    assert names == {str(tuned / "base")}
    last = logits_of(
        peft.AutoPeftModelForCausalLM.from_pretrained(tuned / "checkpoint-4", trust_remote_code=True), batch
    )
    merged = logits_of(ScMMGPTForConditionalGeneration.from_pretrained(tuned), batch)
    torch.testing.assert_close(last, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", ["adapter", "checkpoint-2"])
def test_an_adapter_that_is_merged_already_is_refused(tuned, folder):
    merged = ScMMGPTForConditionalGeneration.from_pretrained(tuned)
    with pytest.raises(ValueError, match="merged into this checkpoint already"):
        peft.PeftModel.from_pretrained(merged, tuned / folder)
    merged = ScMMGPTForConditionalGeneration.from_pretrained(tuned)
    with pytest.raises(ValueError, match="merged into this checkpoint already"):
        merged.load_adapter(str(tuned / folder))


def test_a_merged_checkpoint_takes_a_new_adapter(tuned, batch, tmp_path):
    merged = ScMMGPTForConditionalGeneration.from_pretrained(tuned)
    new = peft.get_peft_model(merged, peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    before = logits_of(new, batch)
    new.save_pretrained(tmp_path / "new")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=True)
    torch.testing.assert_close(logits_of(loaded, batch), before)


def test_by_default_lora_adapts_the_language_model_alone(tiny_model):
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(r=2))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 7 * 2  # two layers of seven linear layers, each with A and B
    assert all(".language_model.layers." in name for name in names)


@pytest.mark.parametrize("folder", ["adapter", "checkpoint-2"])
def test_the_card_of_an_adapter_names_base_and_library(tuned, folder):
    card = ModelCard.load(tuned / folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == str(tuned / "base")
    assert "32 cells" in card.text
    assert "AutoPeftModelForCausalLM" in card.text
    assert "[More Information Needed]" not in card.text


PROGRAM = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM

adapter, batch = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True).eval()
print(json.dumps(model(**torch.load(batch)).logits.tolist()))
"""


def test_the_adapter_loads_without_the_package(tuned, batch, tmp_path):
    """Where only the files of the checkpoint are, by the snippet of the card."""
    torch.save(dict(batch), tmp_path / "batch.pt")
    logits = run_without_package(PROGRAM, tmp_path, tuned / "adapter", tmp_path / "batch.pt")
    merged = logits_of(ScMMGPTForConditionalGeneration.from_pretrained(tuned), batch)
    torch.testing.assert_close(torch.tensor(logits), merged, rtol=1e-4, atol=1e-5)


def test_weights_have_the_permissions_of_other_files(tuned):
    for folder in ("", "base", "adapter", "checkpoint-2"):
        modes = {path.stat().st_mode & 0o777 for path in (tuned / folder).iterdir() if path.is_file()}
        assert len(modes) == 1, (folder, modes)
    assert np.array_equal(modes.pop() & 0o400, 0o400)
