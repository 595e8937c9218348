"""The language model of stage 2: loaded, quantised to 4 bits, or new with its own tokenizer; and its LoRA."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import dequantize_and_replace
from transformers.utils import is_bitsandbytes_available

from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.train.arguments import TuneModelArguments
from scmmgpt.train.convert import load_causal_lm, resolve_source
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import Corpus, first_groups


SCRATCH_CELLS = 10_000  # cells whose captions and answers train the tokenizer of a new language model
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_language_model(
    corpus: Corpus, captions: CaptionSampler, model_args: TuneModelArguments, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model and its tokenizer, or make a new small one (`scratch`)."""
    if model_args.language_model_precision == "4bit":
        return load_in_4bit(model_args.language_model, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model_args.language_model_precision]
    if model_args.language_model != "scratch":
        return load_causal_lm(model_args.language_model, dtype=dtype)
    texts = caption_texts(corpus, captions)
    return new_language_model(texts, model_args.language_model_config, dtype=dtype)


def new_language_model(
    texts: Sequence[str], sizes: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a small Llama with random weights (`sizes`: `LlamaConfig`) and a tokenizer trained on the texts."""
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,  # one more for `<cell>`
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype), tokenizer


def caption_texts(corpus: Corpus, captions: CaptionSampler) -> list[str]:
    """Draw a caption and an answer for each of the first training cells, about `SCRATCH_CELLS`."""
    texts: list[str] = []
    for cells, table in first_groups(corpus.row_groups("train"), SCRATCH_CELLS):
        obs = {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names}
        texts += captions.caption(obs, cell_ids=cells.cell_ids)
        texts += captions.answer(obs, cells, corpus.gene_symbols)
    return texts


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 2,000 tokens, with a chat template, for a new language model."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, 2000, min_frequency=0, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
    )


def load_in_4bit(source: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model onto a device, with layers in NF4 as in QLoRA, and its tokenizer.

    Embeddings, norms and head are float32; the layers compute in bfloat16.
    """
    if not is_bitsandbytes_available() or device.type not in import_module("bitsandbytes").supported_torch_devices:
        raise ImportError(
            f"language_model_precision '4bit' needs a bitsandbytes that supports {device.type!r}: "
            "`pip install -U 'scmmgpt[quantized]'`. 'bf16' halves the memory without it."
        )
    if resolve_source(source)[1] is not None:
        raise ValueError(
            f"{source} is a GGUF file, which language_model_precision '4bit' cannot load; convert it first by `python "
            "-m scmmgpt.train convert lm`."
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    language_model, tokenizer = load_causal_lm(
        source, dtype=torch.bfloat16, quantization_config=settings, device_map={"": str(device)}
    )
    layers: Iterator[Any] = language_model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU with AVX512-BF16, evaluation would repack the weights and block gradients afterwards.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(language_model, use_gradient_checkpointing=False), tokenizer


def skip_other_parts(model: ScMMGPTForConditionalGeneration) -> None:
    """Exclude the head and all parts other than the language model from quantisation when a checkpoint is loaded."""
    others = [f"model.{name}" for name, _ in model.model.named_children() if name != "language_model"]
    model.config.text_config.quantization_config.llm_int8_skip_modules = ["lm_head", *others]


def dequantize(model: ScMMGPTForConditionalGeneration) -> None:
    """Turn 4-bit weights of the language model into bfloat16, in place, so that the merged LoRA isn't quantised."""
    config = model.config.text_config
    dequantize_and_replace(model.model.language_model, config.quantization_config, dtype=torch.bfloat16)
    del config.quantization_config


def add_lora(model_args: TuneModelArguments, saved_parts: Sequence[str]) -> LoraConfig | None:
    """Make the PEFT configuration; `None` if the language model is trained in full or frozen.

    `saved_parts` are trained in full and saved with the adapter.
    """
    if model_args.trained.language_model != "lora":
        return None
    saved = [f"model.{part}" for part in saved_parts]  # full names: the text-to-cell projector also has a `qformer`
    targets = ScMMGPTForConditionalGeneration.lora_target_modules
    fields: dict[str, Any] = {"target_modules": targets, "modules_to_save": saved, "task_type": "CAUSAL_LM"}
    return LoraConfig(**fields | model_args.lora_config)
