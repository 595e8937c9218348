"""Configuration of scMMGPT: a cell language model, a Q-Former bridge and a text language model in one tree.

`ScGPTConfig` describes the cell model alone; `ScMMGPTConfig` composes it with the Q-Former, the causal language
model and the text-to-cell projector. Both validate at construction and serialise to `config.json`.
"""

import copy
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
    "AutoModelForMultimodalLM": "modeling_scmmgpt.ScMMGPTForConditionalGeneration",
    "AutoProcessor": "processing_scmmgpt.ScMMGPTProcessor",
}
# A stage-1 checkpoint holds no language model: `AutoModel` loads the alignment model, and no other class is mapped.
ALIGNMENT_AUTO_MAP = {
    "AutoConfig": "configuration_scmmgpt.ScMMGPTConfig",
    "AutoModel": "modeling_scmmgpt.ScMMGPTForCellTextAlignment",
    "AutoProcessor": "processing_scmmgpt.ScMMGPTProcessor",
}
# The encoder of cells that `scmmgpt export` writes.
ENCODER_AUTO_MAP = {**ALIGNMENT_AUTO_MAP, "AutoModel": "modeling_scmmgpt.ScMMGPTCellEncoder"}
# Task of `transformers.pipeline` -> verb of `pipeline_scmmgpt.ScMMGPTPipeline`.
PIPELINE_TASKS = {
    "cell-annotation": "annotate",
    "cell-description": "describe",
    "cell-generation": "generate",
    "cell-embedding": "embed",
    "cell-search": "search",
}
CELL_EMBEDDINGS = ("cell-text", "cell", "profile")  # what `embed` gives
CELL_AUTO_MAP = {
    "AutoConfig": "configuration_scmmgpt.ScGPTConfig",
    "AutoModel": "modeling_scgpt.ScGPTModel",
    "AutoModelForMaskedLM": "modeling_scgpt.ScGPTForPreTraining",
    "AutoModelForPreTraining": "modeling_scgpt.ScGPTForPreTraining",
    "AutoModelForSequenceClassification": "modeling_scgpt.ScGPTForSequenceClassification",
    "AutoProcessor": "processing_scmmgpt.ScGPTProcessor",
}


class ScGPTConfig(PreTrainedConfig):
    """Configuration of the cell language model, [`ScGPTModel`]. The defaults are scGPT's "whole-human" checkpoint.

    Args:
        vocab_size: Genes plus the special tokens `<pad>`, `<cls>`, `<eoc>`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: scGPT's `embsize`, `nlayers`, `nheads`
            and `d_hid`. Layers are post-norm, and their feed-forward has a ReLU.
        hidden_dropout: Dropout on embeddings, attention output and feed-forward.
        attention_dropout: Dropout on attention weights. scGPT trained with 0.2; any value above 0 rules out PyTorch's
            fused CPU kernel (a training step takes two to four times as long), hence a setting of its own.
        layer_norm_eps: Epsilon of every LayerNorm.
        n_bins: Expression bins: 0 is "not expressed", `1..n_bins-1` are quantile bins.
        max_value: Upper clamp of an expression value before the value encoder.
        pad_value: Expression of `<pad>` and, in scGPT's embedding recipe, of `<cls>`.
        mask_value: Expression of a masked gene in the pre-training objectives.
        use_flag_embedding: Whether the model has scGPT's `flag_encoder` (2 x hidden), which marks the genes to be
            generated in generative pre-training.
        initializer_range: Standard deviation of linear layers' initial weights.
        embedding_range: Gene embeddings start from U(-range, range), as in scGPT.
        pad_token_id, cls_token_id: Ids of `<pad>` and `<cls>` in the gene vocabulary.
    """

    model_type = "scmmgpt_cell"
    base_config_key = "cell_config"
    # What `Trainer.predict` leaves out of the predictions.
    keys_to_ignore_at_inference = [
        *("hidden_states", "attentions", "expression_loss", "mvc_loss"),
        *("masked_loss", "gene_prompt_loss", "cell_prompt_loss"),
    ]

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
            output, scaled or capped as in Cohere, Granite and Gemma at most; such as Llama, Qwen, SmolLM2 or GPT-2.
        text_to_cell_config (`Blip2QFormerConfig` or `dict`): The text-to-cell projector: queries that cross-attend to
            the language model's hidden states. Its `encoder_hidden_size` follows `text_config.hidden_size`.
        num_query_tokens: Q-Former queries per cell.
        cell_tokens: What the language model reads of a cell: the `"queries"` of the Q-Former; `"labels"`, one token of
            the label readout's most probable label; or `"both"`. `tune` sets it. `num_cell_tokens` is the number of
            `<cell>` placeholders per cell.
        num_condition_tokens: Condition tokens from which the cell model generates a cell. The first takes the position
            of `<cls>`.
        projection_dim: Width of the shared cell-text space.
        text_pooling: How the states of a text's tokens become one: `"mean"`, or `"cls"`, the first token's state, as
            published. Before training, `"cls"` hardly differs between texts.
        profile_readout: Whether a stage-1 model adds a linear readout of the cell's whole profile to its features (see
            [`ScMMGPTProfileReadout`]); `finetune` sets it.
        label_readout: `texts` of the labels of [`ScMMGPTLabelReadout`], a linear classifier of cells, and its
            `num_genes`, `num_factors`, of several datasets `num_groups`, `num_others` and `mixes_panels`, with texts
            about genes `num_texts` and `text_width`, with types that have a profile alone `num_profiles` and
            `num_profile_genes`; training sets it.
        cell_embedding: What `embed` gives by default: `"cell-text"`, places in the space shared with texts; `"cell"`,
            the cell model's own; or `"profile"`, from the groups of the label readout without the network (see
            [`ProfileEmbedding`]). `release` sets it.
        cell_token_id: Id of `<cell>` in the language model's tokenizer.
        expression_head: `"mse"` predicts log1p(CP10k); `"nb"` and `"zinb"` predict a (zero-inflated) negative binomial
            of the counts, which can be sampled.
        num_state_components: Components of a cell's state, from which cells are generated (see [`ScMMGPTCellStates`]);
            `None` generates from the expression head alone. `tune` sets it.
        num_state_groups, num_training_states, num_training_texts, num_texts_of_cell: Groups of cells that have a
            profile, training cells whose states the model keeps, to draw cells near them, the distinct texts of all
            and the texts of each; training sets them.
        logit_scale_init: Initial log inverse temperature; the default is ln(1/0.07), as in CLIP.
        matching_batch_size: Cells of a stage-1 batch that enter the matching loss; by default all. Matching costs
            three passes a cell (with its text, a wrong text, a wrong cell), contrast a third of one.
        contrastive_group_size: The published contrast: cells to texts, within groups of this many cells (3), with a
            cell's own text as the only positive. By default the contrast is symmetric, over the whole batch, and all
            texts of one meaning are positives.
        contrastive_weight, matching_weight, captioning_weight, cell_pretraining_weight: Weights of the stage-1 losses.
        language_weight, expression_weight: Weights of the stage-2 losses.
        annotation: Defaults of annotation: `labels` (label -> text), `cl_ids`, and the `matching_weight`,
            `matching_candidates` and `temperature` fixed on validation data; `readout_temperature` and
            `similarity_weight`, the temperature of the label readout and the weight of similarities beside it;
            `terms`, by which other words for the labels are understood; `tissues`, terms likewise, with the labels of
            their cells; `unseen_gate` (or `unseen_bonus`), by which labels without training cells are chosen;
            `doubt`, the share of cells whose scores say nothing; and `novelty`, by which cells of no known type are
            found.
        release: `name` and `version` of a checkpoint that `release` built.
        adapter_bases: Names of the base whose LoRA adapter is merged into these weights. An adapter of that base is
            refused here, since it would count twice.
        custom_pipelines: Task -> pipeline, for `transformers.pipeline`; always the same.
    """

    model_type = "scmmgpt"
    # What `Trainer.predict` leaves out of the predictions: the logits, or the features of cells and texts, are left.
    keys_to_ignore_at_inference = [
        *("past_key_values", "cache", "hidden_states", "attentions", "cell_hidden_states"),
        *("language_loss", "expression_loss"),
        *("contrastive_loss", "matching_loss", "captioning_loss", "cell_pretraining_loss"),
    ]
    sub_configs_defaults = {
        "cell_config": SubConfigSpec(config_class=ScGPTConfig),
        "qformer_config": SubConfigSpec(config_class=Blip2QFormerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "text_to_cell_config": SubConfigSpec(
            config_class=Blip2QFormerConfig,
            init_kwargs={"num_hidden_layers": 2, "cross_attention_frequency": 1},
        ),
    }

    # The name by which trainers of multimodal models look for the token that is never sampled.
    attribute_map = {"image_token_id": "cell_token_id"}

    # Passed as configurations, dictionaries or None; after construction each is a configuration.
    cell_config: Any = None
    qformer_config: Any = None
    text_config: Any = None
    text_to_cell_config: Any = None
    num_query_tokens: int = 32
    cell_tokens: str = "queries"
    num_condition_tokens: int = 8
    projection_dim: int = 256
    text_pooling: str = "mean"
    profile_readout: bool = False
    label_readout: dict | None = None
    cell_embedding: str = "cell-text"
    cell_token_id: int = 32000
    expression_head: str = "mse"
    num_state_components: int | None = None
    num_state_groups: int = 0
    num_training_states: int = 0
    num_training_texts: int = 0
    num_texts_of_cell: int = 0
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
    release: dict | None = None
    adapter_bases: list[str] | None = None
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
        # Never the value given: `transformers.pipeline` replaces the names in it by classes, which can't be saved.
        self.custom_pipelines = {
            task: {"impl": "pipeline_scmmgpt.ScMMGPTPipeline", "pt": ["AutoModel"]} for task in PIPELINE_TASKS
        }
        choices_of = {
            "expression_head": ("mse", "nb", "zinb"),
            "text_pooling": ("mean", "cls"),
            "cell_tokens": ("queries", "labels", "both"),
            "cell_embedding": CELL_EMBEDDINGS,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {choices}.")
        counts = ["num_query_tokens", "num_condition_tokens", "projection_dim"]
        for name in counts if self.num_state_components is None else [*counts, "num_state_components"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.cell_embedding == "profile" and not (self.label_readout or {}).get("num_groups"):
            raise ValueError(
                "cell_embedding is 'profile', but the model has no label readout with groups, which `release` fits; "
                "choose 'cell-text' or 'cell'."
            )
        if self.cell_tokens != "queries" and self.label_readout is None:
            raise ValueError(
                f"cell_tokens is {self.cell_tokens!r}, but the model has no label readout; choose 'queries', or start "
                "from a checkpoint of `align` whose corpus has cell types."
            )

    def __repr__(self) -> str:
        """The configuration as JSON; stored settings of labels are named without their values.

        transformers makes this text at every load, for its log. With all values, it has thousands of lines and takes
        longer than the reading of the file.
        """
        brief = copy.copy(self)
        for name in ("annotation", "label_readout", "release"):
            if (stored := getattr(self, name)) is not None:
                setattr(brief, name, dict.fromkeys(stored, "..."))
        return f"{type(self).__name__} {brief.to_json_string()}"

    @property
    def num_cell_tokens(self) -> int:
        """Tokens of the language model that stand for one cell."""
        return {"queries": self.num_query_tokens, "labels": 1, "both": self.num_query_tokens + 1}[self.cell_tokens]


ScGPTConfig.register_for_auto_class()
ScMMGPTConfig.register_for_auto_class()
