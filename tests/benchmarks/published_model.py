"""The modules of the published scMMGPT, from checkouts, as its own constructors build them: `test_training_step.py`.

`SCMMGPT_BENCHMARK_REFERENCE`, `SCMMGPT_BENCHMARK_SCGPT` and `SCMMGPT_BENCHMARK_LAVIS` name checkouts of
https://github.com/syr-cn/scMMGPT, https://github.com/bowang-lab/scGPT and https://github.com/salesforce/LAVIS. What
runs is their code: `Blip2Qformer.forward` and `Blip2Llama.forward` of scMMGPT over scGPT's `TransformerModel` (on
PyTorch's `nn.TransformerEncoder`: flash-attn is absent), LAVIS's `BertModel` as Q-Former, scMMGPT's
`GeneExpressionModel`, and the `LlamaForCausalLM` of transformers under PEFT, which its constructor takes for
TinyLlama.

The code does not run as it is. Bypassed are:

- the constructors, which read files that are not published (weights, gene vocabulary, tokenizers); the parts are built
  from configurations, with the settings that the constructors pass and random weights;
- pytorch_lightning, flash-attn and the packages of LAVIS and scGPT around the files named above: empty stand-ins;
- three functions that transformers has dropped since: the head mask (of none), the pruning of heads (never called) and
  the inversion of the cross-attention mask, written out below.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


CHECKOUTS = {
    "SCMMGPT_BENCHMARK_REFERENCE": "https://github.com/syr-cn/scMMGPT",
    "SCMMGPT_BENCHMARK_SCGPT": "https://github.com/bowang-lab/scGPT",
    "SCMMGPT_BENCHMARK_LAVIS": "https://github.com/salesforce/LAVIS",
}
QFORMER = "lavis.models.blip2_models.Qformer"


def absent_checkout() -> str | None:
    """What is missing, in words."""
    for variable, address in CHECKOUTS.items():
        if variable not in os.environ:
            return f"{variable} names no checkout of {address}"
    return None


def package(name: str, *folders: Path, **attributes) -> types.ModuleType:
    """A package of these folders without its `__init__`, which imports more than is needed."""
    module = types.ModuleType(name)
    module.__path__ = list(map(str, folders))
    vars(module).update(attributes)
    return module


@contextlib.contextmanager
def dropped_functions():
    """What LAVIS imports from `transformers.modeling_utils`, some of which has moved or gone."""
    from transformers import modeling_utils, pytorch_utils

    names = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
    added = [name for name in names if not hasattr(modeling_utils, name)]
    for name in added:
        setattr(modeling_utils, name, getattr(pytorch_utils, name, None))
    yield
    for name in added:
        delattr(modeling_utils, name)


@dataclass
class Published:
    """The published classes: `Blip2Qformer`, `Blip2Llama`, `GeneExpressionModel`; scGPT's and LAVIS's."""

    stage1: type
    stage2: type
    expression_model: type
    projection: type
    cell_encoder: type
    layer_norm: type
    transformer: type
    qformer: type


class Base(nn.Module):
    """What LAVIS's `BaseModel` is to the classes above."""

    @property
    def device(self):
        return next(self.parameters()).device


def load() -> Published:
    """Import the classes; nothing stays in `sys.modules`."""
    reference, scgpt, lavis = (Path(os.environ[name]) for name in CHECKOUTS)
    outputs = lavis / "lavis" / "models" / "blip_models"
    qformers = lavis / "lavis" / "models" / "blip2_models"
    nothing = dict.fromkeys(("download_cached_file", "is_url", "is_dist_avail_and_initialized", "GeneVocab"))
    stand_ins = {
        "model": package("model", reference / "model"),
        "scgpt": package("scgpt", scgpt / "scgpt", logger=logging.getLogger("scgpt")),
        "scgpt.model": package("scgpt.model", scgpt / "scgpt" / "model"),
        "scgpt.tokenizer": package("scgpt.tokenizer"),
        "scgpt.tokenizer.gene_tokenizer": package("scgpt.tokenizer.gene_tokenizer", **nothing),
        "lavis": package("lavis"),
        "lavis.common": package("lavis.common"),
        "lavis.common.dist_utils": package("lavis.common.dist_utils", **nothing),
        "lavis.common.utils": package("lavis.common.utils", **nothing),
        "lavis.models": package("lavis.models"),
        "lavis.models.base_model": package("lavis.models.base_model", BaseModel=Base),
        "lavis.models.blip_models": package("lavis.models.blip_models", outputs),
        "lavis.models.blip2_models": package("lavis.models.blip2_models", qformers),
        "lavis.models.blip2_models.blip2": package("lavis.models.blip2_models.blip2", disabled_train=None),
        "pytorch_lightning": package("pytorch_lightning"),
        "pytorch_lightning.utilities": package("pytorch_lightning.utilities", distributed=None),
        "flash_attn.models": package("flash_attn.models"),
        "flash_attn.models.bert": package("flash_attn.models.bert", BertForPreTraining=None),
        "model.modeling_llama": package("model.modeling_llama", LlamaForCausalLM=None),
    }
    before = set(sys.modules)
    sys.modules.update(stand_ins)
    try:
        with dropped_functions():
            transformer = importlib.import_module("scgpt.model.model")
            stand_ins["scgpt.model"].TransformerModel = transformer.TransformerModel
            stand_ins["scgpt.model"].ExprDecoder = transformer.ExprDecoder
            qformer = importlib.import_module(QFORMER)
            stage1 = importlib.import_module("model.blip2qformer")
            stage2 = importlib.import_module("model.blip2_llama")
            base = sys.modules["model.blip2"]
            cell_encoder = sys.modules["model.cell_encoder"]
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {"model", "scgpt", "lavis", "pytorch_lightning", "flash_attn"}:
                del sys.modules[name]
    qformer.BertModel.all_tied_weights_keys = {}
    qformer.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
    qformer.BertModel.invert_attention_mask = lambda self, mask: (
        (1 - mask[:, None, None].to(self.dtype)) * torch.finfo(self.dtype).min
    )
    return Published(
        stage1=stage1.Blip2Qformer,
        stage2=stage2.Blip2Llama,
        expression_model=stage2.GeneExpressionModel,
        projection=stage2.MLP_Model,
        cell_encoder=cell_encoder.CellEncoder,
        layer_norm=base.LayerNorm,
        transformer=transformer.TransformerModel,
        qformer=qformer.BertModel,
    )


def assemble(cls: type, **parts):
    """An object of a published class from its parts, past its constructor."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def build_cell_encoder(published: Published, config):
    """Their `CellEncoder` in the shape of our `ScGPTConfig`, with the dropout of 0.2 that it sets."""
    transformer = published.transformer(
        ntoken=config.vocab_size,
        d_model=config.hidden_size,
        nhead=config.num_attention_heads,
        d_hid=config.intermediate_size,
        nlayers=config.num_hidden_layers,
        vocab={"<pad>": config.pad_token_id},
        dropout=0.2,
        pad_value=-2,
        do_mvc=True,
        n_input_bins=51,
        ecs_threshold=0.0,
    )
    del transformer.cls_decoder
    return assemble(published.cell_encoder, model=transformer, num_features=config.hidden_size)


def build_qformer(published: Published, config, num_query_tokens: int):
    """Their `Qformer` in the shape of our `Blip2QFormerConfig`; the head, which no step uses, is left out."""
    from transformers import BertConfig

    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings layer_norm_eps pad_token_id"
    )
    bert = BertConfig(**{name: getattr(config, name) for name in names.split()})
    bert.encoder_width = config.encoder_hidden_size
    bert.add_cross_attention = True
    bert.cross_attention_freq = config.cross_attention_frequency
    bert.query_length = num_query_tokens
    qformer = nn.Module()
    qformer.config, qformer.bert = bert, published.qformer(bert)
    return qformer


def build_stage1(published: Published, config):
    """Their stage-1 model in the shape of our `ScMMGPTConfig`, with the settings of `scripts/stage1_train.sh`."""
    qformer = build_qformer(published, config.qformer_config, config.num_query_tokens)
    width = config.qformer_config.hidden_size
    model = assemble(
        published.stage1,
        gtm=True,
        lm=False,
        cell_encoder=build_cell_encoder(published, config.cell_config),
        ln_gene=published.layer_norm(config.cell_config.hidden_size),
        tune_gene_encoder=True,
        Qformer=qformer,
        query_tokens=nn.Parameter(torch.randn(1, config.num_query_tokens, width) * 0.02),
        cell_proj=nn.Linear(width, config.projection_dim),
        text_proj=nn.Linear(width, config.projection_dim),
        gtm_head=nn.Linear(width, 2),
        temperature=0.1,
        batch_size_contrast=3,
    )
    model.contrast_func = model.contrast_batch
    return model


def build_stage2(published: Published, config, language_model):
    """Their stage-2 model over a causal language model, with the settings of `scripts/stage2_train.sh`."""
    from peft import LoraConfig, TaskType, get_peft_model

    qformer = build_qformer(published, config.qformer_config, config.num_query_tokens)
    qformer.bert.embeddings.word_embeddings = qformer.bert.embeddings.position_embeddings = None
    for layer in qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None
    cell_encoder = build_cell_encoder(published, config.cell_config)
    for frozen in (cell_encoder, qformer):
        frozen.requires_grad_(False).eval()
        frozen.train = lambda mode=True, module=frozen: module
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    text_width = config.text_config.hidden_size
    return assemble(
        published.stage2,
        valrank=False,
        use_sentence=False,
        train_decoder=True,
        tune_gene_encoder=False,
        tune_Qformer=False,
        cell_encoder=cell_encoder,
        ln_gene=published.layer_norm(config.cell_config.hidden_size),
        Qformer=qformer,
        query_tokens=nn.Parameter(torch.randn(1, config.num_query_tokens, config.qformer_config.hidden_size) * 0.02),
        llm_model=get_peft_model(language_model, lora),
        llm_proj=published.projection(config.qformer_config.hidden_size, 256, text_width),
        expr_decoder=published.expression_model(70000, 512, text_width, 512),
    )


def our_names(model, num_layers: int) -> dict[str, torch.Tensor]:
    """The weights that both implementations have, by our names."""
    from scmmgpt.train.convert import convert_scgpt_weights

    cells, _ = convert_scgpt_weights(model.cell_encoder.model.state_dict(), num_layers)
    weights = {f"cell_model.{name}": value for name, value in cells.items()}
    for name, value in model.Qformer.bert.state_dict().items():
        name = name.replace("attention.self.", "attention.attention.")
        if name.startswith("embeddings.LayerNorm"):
            name = name.replace("embeddings.LayerNorm", "qformer.layernorm")
        elif name.startswith("embeddings."):
            name = f"qformer_{name}"
        else:
            name = f"qformer.{name}"
        weights[name] = value
    weights.pop("qformer_embeddings.position_ids", None)
    weights["query_tokens"] = model.query_tokens
    modules = {"ln_gene": "cell_norm", "cell_proj": "cell_projection", "text_proj": "text_projection"}
    for theirs, ours in {**modules, "gtm_head": "matching_head"}.items():
        if hasattr(model, theirs):
            weights |= {f"{ours}.{name}": value for name, value in getattr(model, theirs).state_dict().items()}
    return weights
