"""Export a checkpoint in two parts, for engines that serve language models and accept embeddings as prompts.

The tuned language model becomes a plain causal language model of transformers without custom code, which vLLM, SGLang
and the converter of llama.cpp load. The cell encoder computes the embeddings that replace `<cell>` in a prompt; see
docs/transformers.md.
"""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scmmgpt.commands.files import whole_folder
from scmmgpt.configuration_scmmgpt import ENCODER_AUTO_MAP, ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import ScMMGPTCellEncoder, ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor


def export_checkpoint(checkpoint: str, output: Path) -> dict[str, str]:
    """Write `language_model` and `cell_encoder` of a checkpoint to a new folder; return the two paths.

    Raises:
        ValueError: If the checkpoint has no language model.
        FileExistsError: If the folder exists.
    """
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists already; name a new folder.")
    kind = ScMMGPTForConditionalGeneration.__name__
    architectures = ScMMGPTConfig.from_pretrained(checkpoint).architectures
    if architectures != [kind]:
        raise ValueError(f"{checkpoint!r} holds {architectures} and no language model; name a checkpoint of `tune`.")
    model = ScMMGPTForConditionalGeneration.from_pretrained(checkpoint)
    processor = ScMMGPTProcessor.from_pretrained(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        plain_language_model(model).save_pretrained(folder / "language_model")
        processor.tokenizer.chat_template = processor.chat_template
        processor.tokenizer.save_pretrained(folder / "language_model")
        cell_encoder(model).save_pretrained(folder / "cell_encoder")
        processor.save_pretrained(folder / "cell_encoder")
    return {name: str(output / name) for name in ("language_model", "cell_encoder")}


def plain_language_model(model: ScMMGPTForConditionalGeneration) -> PreTrainedModel:
    """Wrap the language model in its class of transformers, with the same modules and generation settings."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config), dtype=model.dtype)
    setattr(plain, plain.base_model_prefix, model.model.language_model)
    plain.set_output_embeddings(model.lm_head)
    plain.generation_config = model.generation_config
    return plain.eval()


def cell_encoder(model: ScMMGPTForConditionalGeneration) -> ScMMGPTCellEncoder:
    """Extract the parts that turn cells into inputs of the language model, with the same weights."""
    config = copy.deepcopy(model.config)
    config.auto_map = dict(ENCODER_AUTO_MAP)
    with torch.device("meta"):
        encoder = ScMMGPTCellEncoder(config)
    weights = model.model.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()}, assign=True)
    return encoder.eval()
