"""Configuration of scMMGPT: a cell language model, a Q-Former bridge and a text language model in one tree.

`ScGPTConfig` describes the cell model alone; `ScMMGPTConfig` composes it with the Q-Former, the causal language
model and the text-to-cell projector. Both validate at construction and serialise to `config.json`.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig


# Written into every `config.json`: `save_pretrained` alone would map only the class that is being saved.
AUTO_MAP = {
    "AutoConfig": "configuration_scmmgpt.ScMMGPTConfig",
    "AutoModel": "modeling_scmmgpt.ScMMGPTForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_scmmgpt.ScMMGPTForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_scmmgpt.ScMMGPTForConditionalGeneration",
    "AutoProcessor": "processing_scmmgpt.ScMMGPTProcessor",
}
# A stage-1 checkpoint holds no language model, so every auto class answers with the alignment model.
ALIGNMENT_AUTO_MAP = {
    "AutoConfig": "configuration_scmmgpt.ScMMGPTConfig",
    "AutoModel": "modeling_scmmgpt.ScMMGPTForCellTextAlignment",
    "AutoProcessor": "processing_scmmgpt.ScMMGPTProcessor",
}
# Task -> verb of `pipeline_scmmgpt.ScMMGPTPipeline`, and how `transformers.pipeline` finds it in a checkpoint.
PIPELINE_TASKS = {
    "cell-annotation": "annotate",
    "cell-description": "describe",
    "cell-generation": "generate",
    "cell-embedding": "embed",
    "cell-search": "search",
}
PIPELINE = {"impl": "pipeline_scmmgpt.ScMMGPTPipeline", "pt": ["AutoModel"]}
CELL_AUTO_MAP = {
    "AutoConfig": "configuration_scmmgpt.ScGPTConfig",
    "AutoModel": "modeling_scgpt.ScGPTModel",
}

EXPRESSION_HEADS = ("mse", "nb", "zinb")
TEXT_POOLINGS = ("mean", "cls")


class ScGPTConfig(PreTrainedConfig):
    """Configuration of the cell language model, [`ScGPTModel`]. The defaults are scGPT's "whole-human" checkpoint.

    Args:
        vocab_size (`int`, defaults to 60697): Genes plus the special tokens `<pad>`, `<cls>`, `<eoc>`.
        hidden_size (`int`, defaults to 512): Width of a gene token (scGPT `embsize`).
        num_hidden_layers (`int`, defaults to 12): Post-norm transformer layers (scGPT `nlayers`).
        num_attention_heads (`int`, defaults to 8): Attention heads (scGPT `nheads`).
        intermediate_size (`int`, defaults to 512): Feed-forward width (scGPT `d_hid`), with a ReLU.
        hidden_dropout (`float`, defaults to 0.2): Dropout on embeddings, attention output and feed-forward.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention weights. scGPT trained with 0.2; any value
            above 0 rules out PyTorch's fused CPU kernel (3.7x slower training step), hence a setting of its own.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.
        n_bins (`int`, defaults to 51): Expression bins: 0 is "not expressed", `1..n_bins-1` are quantile bins.
        max_value (`float`, defaults to 512): Upper clamp of an expression value before the value encoder.
        pad_value (`float`, defaults to -2): Expression of `<pad>` and, in scGPT's embedding recipe, of `<cls>`.
        mask_value (`float`, defaults to -1): Expression of a masked gene in the pre-training objectives.
        use_flag_embedding (`bool`, defaults to False): Whether the model has scGPT's `flag_encoder` (2 x hidden),
            which marks the genes to be generated in generative pre-training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of linear layers' initial weights.
        embedding_range (`float`, defaults to 0.1): Gene embeddings start from U(-range, range), as in scGPT.
        pad_token_id, cls_token_id (`int`): Ids of `<pad>` and `<cls>` in the gene vocabulary.
    """

    model_type = "scmmgpt_cell"
    base_config_key = "cell_config"

    vocab_size: int = 60697
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 512
    hidden_dropout: float | int = 0.2
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    n_bins: int = 51
    max_value: float | int = 512
    pad_value: float | int = -2
    mask_value: float | int = -1
    use_flag_embedding: bool = False
    initializer_range: float = 0.02
    embedding_range: float = 0.1
    pad_token_id: int | None = 60694
    cls_token_id: int | None = 60695

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): every head has the same width."
            )
        for name in ("pad_token_id", "cls_token_id"):
            token_id = getattr(self, name)
            if token_id is None or not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name} is {token_id}, outside the gene vocabulary of {self.vocab_size} tokens.")
        if not getattr(self, "auto_map", None):
            self.auto_map = dict(CELL_AUTO_MAP)


class ScMMGPTConfig(PreTrainedConfig):
    """Configuration of the whole of scMMGPT, [`ScMMGPTForConditionalGeneration`], and of its stage-1 part.

    Args:
        cell_config (`ScGPTConfig` or `dict`): The cell language model.
        qformer_config (`Blip2QFormerConfig` or `dict`): The cell-to-text bridge with its text branch. Its
            `encoder_hidden_size` always follows `cell_config.hidden_size`, and its text branch is always on.
        text_config (`PreTrainedConfig` or `dict`): A causal language model of transformers whose logits are its head's
            output, neither scaled nor capped, such as Llama, Mistral, Qwen2, SmolLM2 or GPT-2.
        text_to_cell_config (`Blip2QFormerConfig` or `dict`): The text-to-cell projector: queries that cross-attend to
            the language model's hidden states. Its `encoder_hidden_size` follows `text_config.hidden_size`.
        num_query_tokens (`int`, defaults to 32): Q-Former queries, and `<cell>` placeholders, per cell.
        num_condition_tokens (`int`, defaults to 8): Condition tokens that the cell model reads when it generates.
            The first stands where `<cls>` stands in a cell.
        projection_dim (`int`, defaults to 256): Width of the shared cell-text space.
        text_pooling (`str`, defaults to `"mean"`): How a text's states become one: `"mean"` over its tokens, or
            `"cls"`, the first token's state, as published. Before training, `"cls"` hardly differs between texts.
        profile_readout (`bool`, defaults to `False`): Whether cells of a stage-1 model also reach the shared space by
            a linear readout of their whole profile (see [`ScMMGPTProfileReadout`]); `finetune` sets it.
        cell_token_id (`int`): Id of `<cell>` in the language model's tokenizer.
        expression_head (`str`, defaults to `"mse"`): `"mse"` predicts log1p(CP10k); `"nb"` and `"zinb"` predict a
            (zero-inflated) negative binomial of the counts, which can be sampled.
        logit_scale_init (`float`, defaults to 2.6593): Initial log inverse temperature, ln(1/0.07) as in CLIP.
        matching_batch_size (`int`, *optional*): Cells of a stage-1 batch that enter the matching loss; by default all.
            Matching costs three passes a cell (with its text, a wrong text, a wrong cell), contrast a third of one.
        contrastive_group_size (`int`, *optional*): The published contrast: cells to texts, within groups of so many
            cells (3), with a cell's own text as the only positive. By default the contrast is symmetric, over the
            whole batch, and all texts of one meaning are positives.
        contrastive_weight, matching_weight, captioning_weight, cell_pretraining_weight (`float`): Stage-1 weights.
        language_weight, expression_weight (`float`): Stage-2 weights.
        annotation (`dict`, *optional*): How cells are annotated by default: `labels` (label -> text), `cl_ids`, and
            the `matching_weight`, `matching_candidates` and `temperature` fixed on validation data.
        custom_pipelines (`dict`): Task -> pipeline, for `transformers.pipeline`; always the same.
    """

    model_type = "scmmgpt"
    sub_configs_defaults = {
        "cell_config": SubConfigSpec(config_class=ScGPTConfig),
        "qformer_config": SubConfigSpec(config_class=Blip2QFormerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "text_to_cell_config": SubConfigSpec(
            config_class=Blip2QFormerConfig,
            init_kwargs={"num_hidden_layers": 2, "cross_attention_frequency": 1},
        ),
    }

    # Passed as configurations, dictionaries or None; after construction each is a configuration.
    cell_config: Any = None
    qformer_config: Any = None
    text_config: Any = None
    text_to_cell_config: Any = None
    num_query_tokens: int = 32
    num_condition_tokens: int = 8
    projection_dim: int = 256
    text_pooling: str = "mean"
    profile_readout: bool = False
    cell_token_id: int = 32000
    expression_head: str = "mse"
    logit_scale_init: float | int = 2.6593
    matching_batch_size: int | None = None
    contrastive_group_size: int | None = None
    contrastive_weight: float | int = 1.0
    matching_weight: float | int = 1.0
    captioning_weight: float | int = 0.0
    cell_pretraining_weight: float | int = 0.0
    language_weight: float | int = 1.0
    expression_weight: float | int = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    annotation: dict | None = None
    custom_pipelines: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.qformer_config.encoder_hidden_size = self.cell_config.hidden_size
        self.qformer_config.use_qformer_text_input = True
        self.text_to_cell_config.encoder_hidden_size = self.text_config.hidden_size
        # The head is tied where the language model ties it (as transformers' LLaVA does).
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        if not getattr(self, "auto_map", None):
            self.auto_map = dict(AUTO_MAP)
        # Always as written here: `transformers.pipeline` replaces the names in it by classes, which can't be saved.
        self.custom_pipelines = {task: dict(PIPELINE) for task in PIPELINE_TASKS}
        if self.expression_head not in EXPRESSION_HEADS:
            raise ValueError(f"expression_head is {self.expression_head!r}; choose one of {EXPRESSION_HEADS}.")
        if self.text_pooling not in TEXT_POOLINGS:
            raise ValueError(f"text_pooling is {self.text_pooling!r}; choose one of {TEXT_POOLINGS}.")
        for name in ("num_query_tokens", "num_condition_tokens", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


ScGPTConfig.register_for_auto_class()
ScMMGPTConfig.register_for_auto_class()

__all__ = [
    "ALIGNMENT_AUTO_MAP",
    "AUTO_MAP",
    "CELL_AUTO_MAP",
    "EXPRESSION_HEADS",
    "PIPELINE_TASKS",
    "ScGPTConfig",
    "ScMMGPTConfig",
]
