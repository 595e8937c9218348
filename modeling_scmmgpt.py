"""scMMGPT: losses, the Q-Former bridge, cell-text alignment (stage 1) and the generative model (stage 2).

The way of a batch: `ScMMGPTForConditionalGeneration.forward` -> `ScMMGPTModel.forward` -> `ScMMGPTBridgeModel`.
Masks are 1 where a token is attended to. Cells enter with the processor's values (51 bins unless configured
otherwise); targets of text-to-cell generation are log1p(CP10k) or raw counts, as each docstring says.

Shapes in comments: B rows of a batch, C cells, G gene tokens of a cell, T text tokens, Q queries of a cell
(`num_query_tokens`), K condition tokens, D width of the cell model, W width of the Q-Former, L width of the language
model, P `projection_dim`.
"""

import copy
import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerModel,
    Blip2QFormerMultiHeadAttention,
)
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .cells_scmmgpt import COUNTS_PER_10K, hash_seed, show_module
from .configuration_scmmgpt import ALIGNMENT_AUTO_MAP, AUTO_MAP, ScMMGPTConfig
from .modeling_scgpt import IGNORED_LABEL, ScGPTModel, check_attentions, eager_attention_forward, follow_umask
from .readout_scmmgpt import ScMMGPTLabelReadout
from .states_scmmgpt import ScMMGPTCellStates


# The ceiling of the logarithm of the learned inverse temperature, as in CLIP (Radford et al. 2021, section 2.5).
MAX_LOGIT_SCALE = math.log(100)
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # the number whose multiples are most evenly spread (Knuth 1973, section 6.4)
CELL_INPUTS = ("gene_ids", "expression", "cell_attention_mask")  # of the cell model
PROMPT_CELL_INPUTS = (*CELL_INPUTS, "profile_gene_ids", "profile", "readout_scores")  # the last three are optional
# Parts that stage 2 adds to those of stage 1.
NEW_PARTS = (
    "language_model",
    "language_projection",
    "label_projection",
    "text_to_cell",
    "expression_head",
    "cell_states",
)
OTHER_PARTS = r"(?!model\.language_model\.).+"  # names of all modules that are not of the language model
LOSS_INPUTS = ("num_items_in_batch", "shift_labels", "ignore_index")  # of transformers' `loss_function`
# Linear layers that LoRA adapts, by their names in Llama and its kin, Phi, GPT-2 and GPT-NeoX.
LORA_LAYERS = (
    "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv_proj gate_up_proj fc1 fc2 "
    "c_attn c_proj c_fc query_key_value dense dense_h_to_4h dense_4h_to_h"
).split()


# -- Outputs ----------------------------------------------------------------------------------------------------------


@dataclass
class AlignmentOutput(ModelOutput):
    """Output of [`ScMMGPTForCellTextAlignment`].

    Args:
        loss: Weighted sum of the losses below that have a weight.
        contrastive_loss, matching_loss, captioning_loss, cell_pretraining_loss: The components, unweighted; `None`
            where the weight is 0.
        cell_features (`torch.FloatTensor` of shape `(batch_size, num_query_tokens, projection_dim)`): L2-normalised.
        text_features (`torch.FloatTensor` of shape `(batch_size, projection_dim)`): L2-normalised.
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    captioning_loss: Tensor | None = None
    cell_pretraining_loss: Tensor | None = None
    cell_features: Tensor | None = None
    text_features: Tensor | None = None


@dataclass
class ScMMGPTModelOutput(BaseModelOutputWithPast):
    """Output of [`ScMMGPTModel`]: that of the language model and, for rows with target genes, the expression loss.

    Args:
        cell_hidden_states (`torch.FloatTensor` of shape `(num_cells, num_cell_tokens, text_config.hidden_size)`):
            The cells as inputs of the language model.
        expression_loss: Loss of the target genes; `None` without targets.
    """

    cell_hidden_states: Tensor | None = None
    expression_loss: Tensor | None = None


@dataclass
class ScMMGPTCausalLMOutput(CausalLMOutputWithPast):
    """Output of [`ScMMGPTForConditionalGeneration`], with the additions of [`ScMMGPTModelOutput`].

    Args:
        loss: `language_weight * language_loss + expression_weight * expression_loss`, over the components that the
            batch has.
        language_loss: Cross-entropy of `labels`, 0 if all are -100; `None` without labels.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_config.vocab_size)`).
    """

    language_loss: Tensor | None = None
    expression_loss: Tensor | None = None
    cell_hidden_states: Tensor | None = None


@dataclass
class CellGenerationOutput(ModelOutput):
    """Cells generated from text.

    Args:
        expression (`torch.FloatTensor` of shape `(num_cells, num_genes)`): Expected log1p(CP10k) of each gene.
        counts (`torch.LongTensor` of shape `(num_cells, num_genes)`): Sampled counts; `None` unless sampled.
    """

    expression: Tensor | None = None
    counts: Tensor | None = None


def check_keywords(model: nn.Module, kwargs: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse keywords of a model's `forward` that are not among the `known` ones, unless they are None or False."""
    for name, value in kwargs.items():
        if name not in known and value is not None and value is not False:
            *inputs, _ = inspect.signature(model.forward).parameters
            raise TypeError(f"{name!r} is not an input of {type(model).__name__}; it takes {', '.join(inputs)}.")


# -- Losses: pure functions of features, logits and targets -----------------------------------------------------------


def cell_text_similarity(cell_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosine similarity of every cell with every text: the maximum over the cell's queries, as in BLIP-2.

    From `(num_cells, num_query_tokens, projection_dim)` and `(num_texts, projection_dim)`, both L2-normalised, to
    `(num_cells, num_texts)`, between -1 and 1.
    """
    return torch.einsum("cqd,td->cqt", cell_features, text_features).amax(dim=1)


def contrastive_loss(similarity: Tensor, logit_scale: Tensor, targets: Tensor) -> Tensor:
    """Symmetric InfoNCE with several positives a row: cross-entropy against the normalised `targets`.

    Args:
        similarity: `(num_cells, num_texts)` cosine similarities.
        logit_scale: Factor of the similarities (the inverse temperature, not its logarithm).
        targets: `(num_cells, num_texts)`, 1 where the text describes the cell, else 0; no row or column is all 0.

    >>> similarity = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> same = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> round(contrastive_loss(similarity, torch.tensor(100.0), same).item(), 4)  # 2 of 3 rows have two positives
    0.4621
    """
    logits = similarity.float() * logit_scale
    targets = targets.to(logits.dtype)
    cell_to_text = F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True))
    text_to_cell = F.cross_entropy(logits.t(), targets.t() / targets.t().sum(dim=1, keepdim=True))
    return (cell_to_text + text_to_cell) / 2


def paired_contrastive_loss(similarity: Tensor, logit_scale: Tensor, group_size: int) -> Tensor:
    """InfoNCE as published: from cells to texts, within groups of cells, with a cell's own text as the only positive.

    Reproduces the paper. Two cells of one type in one group are negatives of each other, though their texts agree.
    `similarity` is `(num_cells, num_cells)`, of cell i with the text of cell j. Groups are `group_size` cells in the
    order of the batch; an incomplete last group is left out.

    >>> round(paired_contrastive_loss(torch.zeros(7, 7), torch.tensor(1.0), 3).item(), 4)  # ln 3
    1.0986
    """
    group_size = min(group_size, len(similarity))
    groups = len(similarity) // group_size
    end = groups * group_size
    blocks = similarity[:end, :end].unflatten(0, (groups, group_size)).unflatten(2, (groups, group_size))
    logits = torch.diagonal(blocks, dim1=0, dim2=2).float() * logit_scale  # (group_size, group_size, groups)
    targets = torch.arange(group_size, device=logits.device)[:, None].expand(-1, groups)
    return F.cross_entropy(logits, targets)


def sample_hard_negatives(logits: Tensor, allowed: Tensor, fixed: bool = False) -> tuple[Tensor, Tensor]:
    """Draw one negative column per row, with the softmax of the logits as probabilities.

    `logits` are scaled similarities, `(rows, columns)`; `allowed` is true where the column is a negative of the row.
    The draws are from torch's global generator. `fixed` draws depend on the number of the row alone, so that two
    evaluations agree on all devices: the multiples of the golden ratio, modulo 1, are evenly spread for any number of
    rows. Returns the column drawn for each row, and whether the row has a negative; a row without one draws any.
    """
    has_negative = allowed.any(dim=1)
    barred = ~allowed & has_negative[:, None]
    probabilities = logits.float().masked_fill(barred, float("-inf")).softmax(dim=1)
    if not fixed:
        return torch.multinomial(probabilities, 1).squeeze(1), has_negative
    heights = probabilities.cumsum(dim=1)
    draws = torch.arange(1, len(logits) + 1, device=logits.device)[:, None] * GOLDEN_RATIO % 1
    columns = torch.searchsorted(heights, draws * heights[:, -1:], right=True).squeeze(1)
    return columns, has_negative


def negative_binomial_nll(
    counts: Tensor, mean: Tensor, dispersion: Tensor, dropout_logits: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of counts under NB(mean, dispersion), or ZINB if `dropout_logits` is given.

    `mean` > 0 is the expected count of the NB part; `dispersion` > 0 is the inverse dispersion theta: the variance is
    `mean + mean**2 / theta`. `dropout_logits` are the logits of an extra zero. All have the shape of `counts`.
    """
    dtype = mean.dtype
    if mean.device.type != "mps":  # which has no float64; in float32 a dispersion above 1e5 leaves no digit of lgamma
        counts, mean, dispersion = counts.double(), mean.double(), dispersion.double()
    log_norm = torch.log(dispersion + mean)
    log_zero = dispersion * (torch.log(dispersion) - log_norm)  # log P(0)
    log_likelihood = (
        log_zero
        + counts * (torch.log(mean) - log_norm)
        + torch.lgamma(counts + dispersion)
        - torch.lgamma(dispersion)
        - torch.lgamma(counts + 1)
    )
    if dropout_logits is None:
        return -log_likelihood.to(dtype)
    kept = F.logsigmoid(-dropout_logits).to(log_zero.dtype)
    extra_zero = torch.logaddexp(F.logsigmoid(dropout_logits).to(log_zero.dtype), kept + log_zero)
    return -torch.where(counts > 0, kept + log_likelihood, extra_zero).to(dtype)


def additive_mask(attend: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `attend` is 1, a very negative number elsewhere.

    The Q-Former uses a four-dimensional mask unchanged. It would expand a two-dimensional one over queries and text,
    while only the queries attend to the cell.
    """
    zeros = torch.zeros(attend.shape, dtype=dtype, device=attend.device)
    return zeros.masked_fill(~attend.bool(), torch.finfo(dtype).min)


def scale_logits(logits: Tensor, text_config: Any) -> Tensor:
    """The output of a language model's head -> its logits: scaled in Cohere and Granite, capped in Gemma 2 and 3."""
    scale, divisor = getattr(text_config, "logit_scale", None), getattr(text_config, "logits_scaling", None)
    cap = getattr(text_config, "final_logit_softcapping", None)
    logits = logits if scale is None else logits * scale
    logits = logits if divisor is None else logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap


def hash_texts(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A 64-bit hash of each text, `(num_texts,)`: equal for equal tokens, with any padding and on every rank."""
    is_token = attention_mask.bool()
    powers = torch.where(is_token, 0x5851F42D4C957F2D, 1).cumprod(dim=1)  # modulo 2**64; the multiplier is Knuth's
    return ((input_ids + 1) * powers * is_token).sum(dim=1)


def gather_rows(tensor: Tensor) -> Tensor:
    """The tensor's rows of all ranks, in rank order, with gradients; the tensor itself in a single process.

    The gradient of a row is summed over the losses of all ranks. Every rank must hold the same number of rows.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return tensor
    try:
        from torch.distributed._functional_collectives import all_gather_single_autograd as all_gather
    except ImportError:  # PyTorch before 2.13
        from torch.distributed._functional_collectives import all_gather_tensor_autograd as all_gather
    return all_gather(tensor.contiguous(), 0, cast(Any, distributed.group.WORLD))


# -- The bridge: cell model + Q-Former + shared space -----------------------------------------------------------------


class ScMMGPTPreTrainedModel(PreTrainedModel):
    """Initialisation, and the settings of all scMMGPT classes."""

    config: ScMMGPTConfig
    config_class = ScMMGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True  # of the language model: see `without_flash`
    _supports_attention_backend = True
    _no_split_modules = ["ScGPTLayer", "Blip2QFormerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    accepts_loss_kwargs = False  # losses are means of the batch, which `Trainer` then divides by accumulation steps

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in transformers; one name of flash attention sets that of the language model, see `without_flash`."""
        if isinstance(attn_implementation, str):
            parts = dict.fromkeys(self.config.sub_configs, attn_implementation)
            attn_implementation = {"": attn_implementation, **without_flash(parts)}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScMMGPTBridgeModel):
            init.normal_(module.query_tokens, std=self.config.initializer_range)
            init.zeros_(module.query_means)
            init.constant_(module.logit_scale, self.config.logit_scale_init)
        elif isinstance(module, ScMMGPTProfileReadout):
            init.zeros_(module.gene_weights.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ScMMGPTCellStates):
            init.zeros_(module.state_noise)
            init.ones_(module.state_scale)
        elif isinstance(module, ScMMGPTTextToCellProjector):
            init.normal_(module.query_tokens)  # a LayerNorm follows; smaller tokens would be lost in the first steps
            init.zeros_(module.query_means)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the weights get the permissions of other new files."""
        super().save_pretrained(save_directory, *args, **kwargs)
        follow_umask(save_directory)


def without_flash(implementations: Mapping[str, str | None]) -> dict[str, str | None]:
    """Attention of each sub-configuration: flash attention of the language model, SDPA in its place elsewhere.

    The Q-Former adds masks that flash attention does not take, and so does the cell model where it generates; where it
    encodes, its SDPA path calls the same variable-length kernel (`packed_attention`).
    """
    return {
        part: "sdpa" if part != "text_config" and "flash" in (name or "") else name
        for part, name in implementations.items()
    }


class ScMMGPTProfileReadout(nn.Module):
    """A linear readout: the sum of the genes' directions in the shared space, weighted by their values.

    With few labelled cells a linear model of all genes is hard to beat. The values are the square roots of the genes'
    shares of the cell's counts (`hellinger_profile`). The readout starts at 0 and is added to every query's feature.
    """

    def __init__(self, config: ScMMGPTConfig) -> None:
        super().__init__()
        self.gene_weights = nn.EmbeddingBag(config.cell_config.vocab_size, config.projection_dim, mode="sum")
        self.bias = nn.Parameter(torch.zeros(config.projection_dim))

    def forward(self, profile_gene_ids: Tensor, profile: Tensor) -> Tensor:
        """`(num_cells, projection_dim)` of gene ids and values, both `(num_cells, num_genes)`; padding is 0."""
        profile = profile.to(self.gene_weights.weight.dtype)
        return self.gene_weights(profile_gene_ids, per_sample_weights=profile) + self.bias


class ScMMGPTTextEmbeddings(nn.Module):
    """Embeddings of the words and positions of the Q-Former's texts, as in BLIP-2, whose class can't be offloaded."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        words: Any = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.word_embeddings = words
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`(num_texts, text_length)` -> `(num_texts, text_length, hidden_size)`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)


def with_own_weights(method: Callable) -> Callable:
    """Load the weights of an offloaded module for one of its methods, as accelerate does for `forward`.

    A submodule loads its weights when it runs.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is None or not self.query_tokens.is_meta:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return run


class ScMMGPTCellAttention(Blip2QFormerMultiHeadAttention):
    """The Q-Former's cross-attention, which computes the keys and values of a cell once for several passes.

    Keys and values depend on the cell alone, and are most of the work: a cell has a thousand genes for 32 queries. The
    contrast computes both once for each cell, and matching uses them again with several texts.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cell_rows: Tensor | None = None,
        projected: dict | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As in the class that it replaces; `attention_mask`, the mask of the self-attention, is not used.

        Args:
            hidden_states: `(num_rows, num_query_tokens, hidden_size)`.
            encoder_hidden_states: `(num_cells, num_genes, encoder_hidden_size)`.
            encoder_attention_mask: `(num_cells, 1, 1, num_genes)`, added to the scores.
            cell_rows: `(num_rows,)`: the cell that each row attends to; by default cell i for row i.
            projected: Keys and values by module. A module without an entry adds its own; the others use their entry.
        """

        def by_head(states: Tensor) -> Tensor:  # (rows, tokens, W) -> (rows, heads, tokens, W / heads)
            return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        projected = {} if projected is None else projected
        if self not in projected:
            projected[self] = [by_head(project(encoder_hidden_states)) for project in (self.key, self.value)]
        states = projected[self]
        if cell_rows is not None:  # not `states[cell_rows]`, whose gradient is added up element by element
            states = [state.index_select(0, cell_rows) for state in states]  # (num_rows, heads, G, W / heads)
            if encoder_attention_mask is not None:
                encoder_attention_mask = encoder_attention_mask.index_select(0, cell_rows)
        queries = by_head(self.query(hidden_states))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, queries, *states, encoder_attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return output.flatten(2), weights


class ScMMGPTBridgeModel(ScMMGPTPreTrainedModel):
    """The parts that stage 1 trains and stage 2 keeps: cell model, Q-Former with text branch, contrast and matching.

    A checkpoint of the alignment model loads into the generative model by these key names.
    """

    main_input_name = "gene_ids"

    def __init__(self, config: ScMMGPTConfig) -> None:
        super().__init__(config)
        parts: dict[str, str | None] = {
            name: getattr(config, name)._attn_implementation for name in config.sub_configs
        }
        for name, implementation in without_flash(parts).items():
            getattr(config, name)._attn_implementation = implementation
        width = config.qformer_config.hidden_size
        self.cell_model = ScGPTModel._from_config(config.cell_config)
        self.cell_norm = nn.LayerNorm(config.cell_config.hidden_size, eps=config.cell_config.layer_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        for layer in self.qformer.encoder.layer:
            if layer.has_cross_attention:  # its weights keep their names
                layer.crossattention.attention.__class__ = ScMMGPTCellAttention
        self.qformer_embeddings = ScMMGPTTextEmbeddings(config.qformer_config)
        # The mean state of each query over cells is subtracted: it is much larger than the differences between cells.
        self.query_means = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.cell_projection = nn.Linear(width, config.projection_dim)
        self.text_projection = nn.Linear(width, config.projection_dim)
        self.matching_head = nn.Linear(width, 2)
        if config.profile_readout:
            self.profile_readout = ScMMGPTProfileReadout(config)
        if config.label_readout is not None:
            sizes = {name: size for name, size in config.label_readout.items() if name not in ("texts", "labels")}
            self.label_readout = ScMMGPTLabelReadout(len(config.label_readout["texts"]), **sizes)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def encode_cells(self, gene_ids: Tensor, expression: Tensor, cell_attention_mask: Tensor | None = None) -> Tensor:
        """Gene states of cells, `(num_cells, num_genes, cell_config.hidden_size)`: the input of the Q-Former."""
        outputs = self.cell_model(gene_ids=gene_ids, expression=expression, cell_attention_mask=cell_attention_mask)
        return self.cell_norm(outputs.last_hidden_state)  # (C, G, D)

    def resize_gene_embeddings(self, vocab_size: int) -> None:
        """Add genes to the vocabulary: a new gene starts with the mean of each table that has a row for every gene.

        Labels that a readout gives do not depend on a new gene. The processor adds the names by `add_genes`.

        Raises:
            ValueError: If the vocabulary has more genes already.
        """
        if vocab_size < self.config.cell_config.vocab_size:
            raise ValueError(f"The vocabulary has {self.config.cell_config.vocab_size} genes, more than {vocab_size}.")
        for name, table in self.named_modules():
            if isinstance(table, nn.Embedding | nn.EmbeddingBag) and name.rpartition(".")[2].startswith("gene_"):
                weight = table.weight.data
                new = weight.mean(dim=0, keepdim=True).expand(vocab_size - len(weight), -1)
                table.weight = nn.Parameter(torch.cat([weight, new]), requires_grad=table.weight.requires_grad)
                table.num_embeddings = vocab_size
        self.config.cell_config.vocab_size = vocab_size

    @with_own_weights
    def query_cells(
        self,
        gene_states: Tensor,
        cell_attention_mask: Tensor | None = None,
        text_embeds: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        cell_rows: Tensor | None = None,
        projected: dict | None = None,
    ) -> Tensor:
        """The queries' states after cross-attention to cells, each alone or together with a text.

        The result is `(num_rows, num_query_tokens [+ text_length], qformer_config.hidden_size)`.

        Args:
            gene_states: `(num_cells, num_genes, cell_config.hidden_size)` from `encode_cells`.
            cell_attention_mask: `(num_cells, num_genes)`.
            text_embeds: `(num_rows, text_length, qformer_config.hidden_size)`, texts for the queries to attend to.
            qformer_attention_mask: `(num_rows, text_length)`, or a float mask that is added to the attention scores,
                `(num_rows, 1, num_query_tokens + text_length, num_query_tokens + text_length)`.
            cell_rows, projected: See [`ScMMGPTCellAttention`].
        """
        num_rows = (gene_states if cell_rows is None else cell_rows).shape[0]  # `len` would fix it in an export
        queries = self.query_tokens.expand(num_rows, -1, -1)  # (rows, Q, W)
        if text_embeds is not None:
            queries = torch.cat([queries, text_embeds.to(queries.dtype)], dim=1)  # (rows, Q + T, W)
            if qformer_attention_mask is not None and qformer_attention_mask.dim() == 2:
                qformer_attention_mask = F.pad(qformer_attention_mask, (self.config.num_query_tokens, 0), value=1)
        if cell_attention_mask is not None:
            cell_attention_mask = additive_mask(cell_attention_mask[:, None, None], gene_states.dtype)
        return self.qformer(
            query_embeds=queries,
            query_length=self.config.num_query_tokens,
            attention_mask=qformer_attention_mask,
            encoder_hidden_states=gene_states,
            encoder_attention_mask=cell_attention_mask,
            cell_rows=cell_rows,
            projected=projected,
        ).last_hidden_state

    @with_own_weights
    def project_cells(
        self,
        query_states: Tensor,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
        readout_scores: Tensor | None = None,
    ) -> Tensor:
        """Query states -> shared space, `(num_cells, num_query_tokens, projection_dim)`, L2-normalised.

        A label readout with places of its labels adds their mean, by probability, to every query's feature.
        """
        features = self.cell_projection(query_states - self.query_means)  # (C, Q, P)
        if self.config.profile_readout:
            if profile is None:
                raise ValueError(
                    "This checkpoint needs each cell's whole profile (`profile_gene_ids`, `profile`), and got none; "
                    "make the inputs with its own processor, or set `return_profile` of the feature extractor."
                )
            features = features + self.profile_readout(profile_gene_ids, profile)[:, None]
        if "feature_width" in (self.config.label_readout or {}):
            scores = self.read_labels(profile_gene_ids, profile, readout_scores)
            features = features + self.label_readout.place(scores).to(features.dtype)[:, None]
        return F.normalize(features, dim=-1)

    def read_labels(
        self, profile_gene_ids: Tensor | None, profile: Tensor | None, readout_scores: Tensor | None
    ) -> Tensor:
        """Log probabilities of the labels: those that are given, else those of the profile; see `get_cell_tokens`."""
        if readout_scores is not None:
            return readout_scores
        if profile_gene_ids is None or profile is None:
            raise ValueError(
                "This checkpoint reads labels from each cell's whole profile (`profile_gene_ids`, `profile`), "
                "and got none; make the inputs with its own processor."
            )
        return self.label_readout(profile_gene_ids, profile)

    def get_cell_features(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        cell_attention_mask: Tensor | None = None,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
        return_dict: bool = False,
        readout_scores: Tensor | None = None,
    ) -> Any:
        """Cells in the shared space: `(num_cells, num_query_tokens, projection_dim)`, L2-normalised.

        Args:
            gene_ids, expression, cell_attention_mask: `(num_cells, num_genes)`, as the processor makes them: ids in
                the gene vocabulary, values, and 1 for a gene, 0 for padding.
            profile_gene_ids, profile (`torch.Tensor` of shape `(num_cells, num_expressed_genes)`): All expressed genes
                and their values, if `config.profile_readout` or a label readout with places of its labels needs them.
            return_dict: Whether to return an output, as such methods of transformers do: the features are its
                `pooler_output`, and the states of the queries its `last_hidden_state`.
            readout_scores: As for `get_cell_tokens`, in place of the profile for the label readout.
        """
        gene_states = self.encode_cells(gene_ids, expression, cell_attention_mask)
        states = self.query_cells(gene_states, cell_attention_mask)
        features = self.project_cells(states, profile_gene_ids, profile, readout_scores)
        return BaseModelOutputWithPooling(states, features) if return_dict else features

    def get_profile_embeddings(
        self,
        profile_gene_ids: Tensor,
        profile: Tensor,
        gene_ids: Tensor | None = None,
        expression: Tensor | None = None,
        cell_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Places of cells among the groups of the label readout, `(num_cells, num_groups)`, L2-normalised.

        Genes that are not in the profile count as measured; `ScMMGPTPipeline.embed` knows which genes a file has.

        Args:
            profile_gene_ids, profile: As for `get_cell_features`.
            gene_ids, expression, cell_attention_mask: Not used; the processor makes them of every cell.

        Raises:
            ValueError: If the checkpoint has no label readout with groups.
        """
        if self.config.label_readout is None:
            raise ValueError("This checkpoint has no label readout, which `release` fits; use `get_cell_features`.")
        return self.label_readout.embed(profile_gene_ids, profile)

    def get_text_features(
        self, qformer_input_ids: Tensor, qformer_attention_mask: Tensor | None = None, return_dict: bool = False
    ) -> Any:
        """Texts in the shared space: `(num_texts, projection_dim)`, L2-normalised.

        With `return_dict`, as `get_cell_features`; the `last_hidden_state` is the pooled state of each text.
        """
        states = self.encode_texts(self.qformer_embeddings(input_ids=qformer_input_ids), qformer_attention_mask)
        features = self.project_texts(states)
        return BaseModelOutputWithPooling(states, features) if return_dict else features

    def inverse_temperature(self) -> Tensor:
        """Factor of the cosine similarities, at most 100."""
        scale = self.logit_scale
        clamped = scale + (scale.clamp(max=MAX_LOGIT_SCALE) - scale).detach()
        if clamped.requires_grad:  # above the ceiling, only a gradient that leads back passes
            clamped.register_hook(lambda grad: torch.where(scale > MAX_LOGIT_SCALE, grad.clamp(min=0), grad))
        return clamped.exp()

    def encode_texts(self, text_embeds: Tensor, qformer_attention_mask: Tensor | None = None) -> Tensor:
        """One state per text, `(num_texts, qformer_config.hidden_size)`, pooled by `config.text_pooling`.

        `text_embeds`, `(num_texts, text_length, qformer_config.hidden_size)`, come from `qformer_embeddings`.
        """
        states = self.qformer(
            query_embeds=text_embeds, query_length=0, attention_mask=qformer_attention_mask
        ).last_hidden_state  # (B, T, W)
        if self.config.text_pooling == "cls":
            return states[:, 0]
        if qformer_attention_mask is None:
            return states.mean(dim=1)
        weights = qformer_attention_mask.to(states.dtype)[..., None]
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def project_texts(self, text_states: Tensor) -> Tensor:
        """Text states -> shared space, `(num_texts, projection_dim)`, L2-normalised."""
        return F.normalize(self.text_projection(text_states), dim=-1)

    def match(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        cell_attention_mask: Tensor | None = None,
        *,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor | None = None,
        pairs: Tensor | None = None,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
    ) -> Tensor:
        """Probability that a text describes a cell, by the matching head, `(num_pairs,)`.

        Args:
            pairs (`torch.LongTensor` of shape `(num_pairs, 2)`): Row of the cell and row of the text; by default cell
                i with text i. A cell in many pairs is encoded once.
            profile_gene_ids, profile: Not used; the processor may add them.
        """
        if pairs is None:
            if len(gene_ids) != len(qformer_input_ids):
                raise ValueError(
                    f"{len(gene_ids)} cells and {len(qformer_input_ids)} texts do not pair up; pass `pairs`, for "
                    "instance torch.cartesian_prod(torch.arange(n_cells), torch.arange(n_texts))."
                )
            pairs = torch.arange(len(gene_ids), device=gene_ids.device)[:, None].expand(-1, 2)
        if cell_attention_mask is None:
            cell_attention_mask = torch.ones_like(gene_ids)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        gene_states = self.encode_cells(gene_ids, expression, cell_attention_mask)
        text_embeds = self.qformer_embeddings(input_ids=qformer_input_ids)
        cells, texts = pairs.unbind(dim=1)
        logits = self.matching_logits(
            gene_states, cell_attention_mask, text_embeds[texts], qformer_attention_mask[texts], cell_rows=cells
        )
        return logits.softmax(dim=-1)[:, 1]

    def matching_logits(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """`(num_pairs, 2)` logits of "no match" and "match", averaged over the queries; inputs as in `query_cells`."""
        states = self.query_cells(*inputs, **kwargs)
        return self.matching_head(states[:, : self.config.num_query_tokens]).mean(dim=1)  # (pairs, Q, 2) -> (pairs, 2)


class ScMMGPTForCellTextAlignment(ScMMGPTBridgeModel):
    """Stage 1: learn which texts describe which cells, by contrast and by matching.

    There is no language model, and `config.text_config` is not used.
    """

    def __init__(self, config: ScMMGPTConfig) -> None:
        super().__init__(config)
        config.auto_map, config.problem_type = dict(ALIGNMENT_AUTO_MAP), None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.qformer_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer_embeddings.word_embeddings = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the Q-Former's word embeddings; transformers would note their number in `text_config`."""
        text_vocab_size = self.config.text_config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.text_config.vocab_size = text_vocab_size
        self.config.qformer_config.vocab_size = embeddings.num_embeddings
        return embeddings

    @can_return_tuple
    def forward(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        qformer_input_ids: Tensor,
        cell_attention_mask: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        text_ids: Tensor | None = None,
        masked_expression: Tensor | None = None,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> AlignmentOutput:
        r"""
        Args:
            gene_ids, expression, cell_attention_mask: `(batch_size, num_genes)`, one cell a row.
            qformer_input_ids, qformer_attention_mask: `(batch_size, text_length)`, the text of the same row's cell.
            text_ids (`torch.LongTensor` of shape `(batch_size,)`): Equal where two texts mean the same, so that they
                are never negatives of each other, on all ranks. By default, where their tokens are equal.
            masked_expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): The cells with some values
                hidden, if `config.cell_pretraining_weight > 0`. The values to recover (-100 elsewhere) are the keyword
                `expression_labels`; `Trainer` computes no loss if a parameter named like a label is missing.
            profile_gene_ids, profile (`torch.Tensor` of shape `(batch_size, num_expressed_genes)`): As for
                `get_cell_features`.
            return_loss: If false, only the features are returned, and the numbers of cells and texts may differ.
            kwargs: `expression_labels`, and `num_items_in_batch`, which `Trainer` may pass and which is not used. Any
                other keyword is a TypeError unless its value is None or False.
        """
        check_keywords(self, kwargs, ("expression_labels", "num_items_in_batch"))
        if cell_attention_mask is None:
            cell_attention_mask = torch.ones_like(gene_ids)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)

        # step 1: cells and texts, each alone, into the shared space
        gene_states = self.encode_cells(gene_ids, expression, cell_attention_mask)  # (B, G, D)
        # Keys and values are kept for the next passes, unless gradient checkpointing should save their memory.
        checkpointing = self.training and self.qformer.encoder.gradient_checkpointing
        projected: dict | None = None if checkpointing else {}
        query_states = self.query_cells(gene_states, cell_attention_mask, projected=projected)  # (B, Q, W)
        cell_features = self.project_cells(query_states, profile_gene_ids, profile)  # (B, Q, P)
        text_embeds = self.qformer_embeddings(input_ids=qformer_input_ids)  # (B, T, W)
        text_features = self.project_texts(self.encode_texts(text_embeds, qformer_attention_mask))  # (B, P)
        features = {"cell_features": cell_features, "text_features": text_features}
        if not return_loss:
            return AlignmentOutput(**features)

        if text_ids is None:
            text_ids = hash_texts(qformer_input_ids, qformer_attention_mask)
        pairs = gene_states, cell_attention_mask, text_embeds, qformer_attention_mask
        losses: dict[str, Tensor] = {}
        # step 2: contrast over the whole batch of all ranks
        if self.config.contrastive_weight:
            losses["contrastive"] = self.contrastive_loss(cell_features, text_features, text_ids)
        # step 3: matching of true pairs against each cell with a wrong text and each text with a wrong cell
        if self.config.matching_weight:
            similarity = cell_text_similarity(cell_features, text_features)  # (B, B)
            losses["matching"] = self.matching_loss(similarity, text_ids, *pairs, projected)
        # step 4: captioning, each word from the queries and the words before it
        if self.config.captioning_weight:
            losses["captioning"] = self.captioning_loss(*pairs, qformer_input_ids, projected)
        # step 5: the cell model's own masked-expression objective
        if self.config.cell_pretraining_weight and masked_expression is not None:
            losses["cell_pretraining"] = self.cell_model(
                gene_ids, masked_expression, cell_attention_mask, expression_labels=kwargs["expression_labels"]
            ).loss

        total = sum(getattr(self.config, f"{name}_weight") * loss for name, loss in losses.items())
        # All fields at once: a compiled graph loses those that are set later.
        return AlignmentOutput(loss=total, **{f"{name}_loss": loss for name, loss in losses.items()}, **features)

    def contrastive_loss(self, cell_features: Tensor, text_features: Tensor, text_ids: Tensor) -> Tensor:
        """Contrast of `(batch_size, num_query_tokens, projection_dim)` cells and `(batch_size, projection_dim)` texts.

        The batches of all ranks make one batch. `text_ids` are those of `forward`.
        """
        similarity = cell_text_similarity(gather_rows(cell_features), gather_rows(text_features))  # (ranks B, ranks B)
        if self.config.contrastive_group_size is not None:
            return paired_contrastive_loss(similarity, self.inverse_temperature(), self.config.contrastive_group_size)
        text_ids = gather_rows(text_ids)
        return contrastive_loss(similarity, self.inverse_temperature(), text_ids[:, None] == text_ids[None])

    def matching_loss(
        self,
        similarity: Tensor,
        text_ids: Tensor,
        gene_states: Tensor,
        cell_attention_mask: Tensor,
        text_embeds: Tensor,
        qformer_attention_mask: Tensor,
        projected: dict | None = None,
    ) -> Tensor:
        """Cross-entropy of "match" for true pairs and "no match" for hard negatives, within the batch of one rank.

        `similarity`, `(batch_size, batch_size)`, by which negatives are drawn, gets no gradient. `text_ids` are those
        of `forward`, and the other arguments those of `query_cells`. An evaluation repeats its draws.
        """
        size = self.config.matching_batch_size
        with torch.no_grad():
            logits = similarity * self.inverse_temperature()
            wrong = text_ids[:, None] != text_ids[None]  # (B, B)
            wrong_texts, has_wrong_text = sample_hard_negatives(logits, wrong, fixed=not self.training)
            wrong_cells, has_wrong_cell = sample_hard_negatives(logits.t(), wrong.t(), fixed=not self.training)
        rows = torch.arange(len(gene_states), device=gene_states.device)[:size]
        cells = torch.cat([rows, rows, wrong_cells[:size]])
        texts = torch.cat([rows, wrong_texts[:size], rows])
        has_negative = torch.cat([has_wrong_text[:size], has_wrong_cell[:size]])
        is_match = torch.cat([torch.ones_like(rows), torch.where(has_negative, 0, IGNORED_LABEL)])
        texts_of_pairs = text_embeds.index_select(0, texts), qformer_attention_mask[texts]
        matching_logits = self.matching_logits(
            gene_states, cell_attention_mask, *texts_of_pairs, cell_rows=cells, projected=projected
        )
        return F.cross_entropy(matching_logits.float(), is_match, ignore_index=IGNORED_LABEL)

    def captioning_loss(
        self,
        gene_states: Tensor,
        cell_attention_mask: Tensor,
        text_embeds: Tensor,
        qformer_attention_mask: Tensor,
        qformer_input_ids: Tensor,
        projected: dict | None = None,
    ) -> Tensor:
        """Cross-entropy of each text token given the queries and the tokens before it; the embeddings are the head."""
        num_queries = self.config.num_query_tokens
        total = num_queries + qformer_input_ids.shape[1]
        visible = torch.ones(total, total, dtype=torch.bool, device=text_embeds.device).tril()
        visible[:, :num_queries] = True  # queries attend to each other only, words to all queries as well
        visible = visible[None] & F.pad(qformer_attention_mask.bool(), (num_queries, 0), value=True)[:, None]
        visible = visible | torch.eye(total, dtype=torch.bool, device=text_embeds.device)  # no empty softmax
        mask = additive_mask(visible[:, None], text_embeds.dtype)
        states = self.query_cells(gene_states, cell_attention_mask, text_embeds, mask, projected=projected)
        states = states[:, num_queries:]  # (B, T, W)
        logits = F.linear(states[:, :-1], self.qformer_embeddings.word_embeddings.weight)  # (B, T - 1, vocabulary)
        labels = qformer_input_ids[:, 1:].masked_fill(qformer_attention_mask[:, 1:] == 0, IGNORED_LABEL)
        return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL)


# -- Text to cell -----------------------------------------------------------------------------------------------------


class ScMMGPTTextToCellProjector(nn.Module):
    """Learned queries cross-attend to the language model's states and become condition tokens of the cell model.

    The state of the prompt's last token, which has attended to the whole prompt, is added to every query. It differs
    between texts before any training, while the output of an untrained cross-attention hardly does.
    """

    def __init__(self, config: ScMMGPTConfig) -> None:
        super().__init__()
        width = config.text_to_cell_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_condition_tokens, width))
        self.query_means = nn.Parameter(torch.zeros(1, config.num_condition_tokens, width))  # as in the bridge
        self.summary_projection = nn.Linear(config.text_config.hidden_size, width)
        self.qformer = Blip2QFormerModel._from_config(config.text_to_cell_config)
        self.projection = nn.Linear(width, config.cell_config.hidden_size)

    def forward(self, text_states: Tensor, attention_mask: Tensor) -> Tensor:
        """`(batch_size, sequence_length, text width)` -> `(batch_size, num_condition_tokens, cell width)`."""
        return self.projection(self.query_texts(text_states, attention_mask) - self.query_means)

    @staticmethod
    def summarize(text_states: Tensor, attention_mask: Tensor) -> Tensor:
        """State of the last token that is attended to, `(batch_size, text width)`, padded left or right."""
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (positions * attention_mask.long()).argmax(dim=1)
        return text_states[torch.arange(len(text_states), device=text_states.device), last]

    def query_texts(self, text_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The queries' states, `(batch_size, num_condition_tokens, text_to_cell_config.hidden_size)`."""
        text_states = text_states.to(self.query_tokens.dtype)  # the language model may be held in another dtype
        queries = self.query_tokens + self.summary_projection(self.summarize(text_states, attention_mask))[:, None]
        return self.qformer(
            query_embeds=queries, encoder_hidden_states=text_states, encoder_attention_mask=attention_mask
        ).last_hidden_state


class ScMMGPTExpressionHead(nn.Module):
    """Gene states -> expression. Each gene has a bias, which training can initialise with a mean profile.

    `mse` takes log1p(CP10k) from scGPT's expression decoder; `nb` and `zinb` predict a gene's rate per 10k counts, its
    dispersion and (`zinb`) the logit of an extra zero. The output of scGPT's MVC decoder, a function of the cell
    embedding and the gene, is added to log1p(CP10k) or to the logarithm of the rate.
    """

    def __init__(self, config: ScMMGPTConfig) -> None:
        super().__init__()
        self.kind = config.expression_head
        self.gene_bias = nn.Embedding(config.cell_config.vocab_size, 1)
        if self.kind != "mse":
            self.projection = nn.Linear(config.cell_config.hidden_size, {"nb": 2, "zinb": 3}[self.kind])

    def forward(
        self, gene_states: Tensor, gene_ids: Tensor, from_cell: Tensor, decoded: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Parameters of the expression distribution, each `(batch_size, num_genes)` in float32.

        `gene_states` are `(batch_size, num_genes, cell width)`, the other inputs `(batch_size, num_genes)`.
        `from_cell` comes from scGPT's MVC decoder, and `decoded` (`mse` only) from its expression decoder.
        """
        bias = self.gene_bias(gene_ids).squeeze(-1).float() + from_cell.float()  # (B, G)
        if decoded is not None:
            return {"expression": decoded.float() + bias}
        log_rate, log_dispersion, *dropout_logits = self.projection(gene_states).float().unbind(dim=-1)
        max_log_rate = math.log(COUNTS_PER_10K)  # no gene has more than all of a cell's counts
        rate = (log_rate + bias).clamp(min=-max_log_rate, max=max_log_rate).exp()  # counts per 10k of the NB part
        parameters = {"rate": rate, "dispersion": F.softplus(log_dispersion) + 1e-4}
        if dropout_logits:
            parameters["dropout_logits"] = dropout_logits[0]
            rate = rate * torch.sigmoid(-dropout_logits[0])
        parameters["expression"] = torch.log1p(rate)
        return parameters

    def loss(
        self,
        parameters: dict[str, Tensor],
        mask: Tensor,
        target_expression: Tensor | None,
        target_counts: Tensor | None,
        library_size: Tensor | None,
    ) -> Tensor:
        """Mean over the target genes, 0 without any: squared error of log1p(CP10k), or the counts' NLL."""
        if self.kind == "mse":
            if target_expression is None:
                raise ValueError("target_expression (log1p CP10k) is None; the mse expression head is trained on it.")
            losses = (parameters["expression"] - target_expression.float()).square()
        else:
            if target_counts is None or library_size is None:
                raise ValueError(
                    f"target_counts or library_size is None; give both to train the {self.kind} expression head."
                )
            mean = parameters["rate"] * library_size.float()[:, None] / COUNTS_PER_10K + 1e-8
            losses = negative_binomial_nll(
                target_counts.float(), mean, parameters["dispersion"], parameters.get("dropout_logits")
            )
        mask = mask.to(losses.dtype)
        return (losses * mask).sum() / mask.sum().clamp(min=1)

    def sample(self, parameters: dict[str, Tensor], library_size: Tensor, seeds: list[int]) -> Tensor:
        """Counts, `(batch_size, num_genes)` int64; each row is drawn from its own seed, so no batch changes a cell."""
        mean = (parameters["rate"] * library_size[:, None] / COUNTS_PER_10K).cpu()
        dispersion = parameters["dispersion"].cpu()
        dropout = torch.sigmoid(parameters["dropout_logits"]).cpu() if "dropout_logits" in parameters else None
        counts = torch.empty_like(mean)
        for row, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            gamma = torch._standard_gamma(dispersion[row], generator=generator)
            counts[row] = torch.poisson(gamma * mean[row] / dispersion[row], generator=generator)
            if dropout is not None:
                counts[row] *= torch.rand(dropout[row].shape, generator=generator) >= dropout[row]
        return counts.long().to(library_size.device)


# -- The generative model ---------------------------------------------------------------------------------------------


class ScMMGPTCellEncoder(ScMMGPTBridgeModel):
    """The bridge and its projection into the language model, for engines that serve the language model alone."""

    def __init__(self, config: ScMMGPTConfig) -> None:
        super().__init__(config)
        width, text_width = config.qformer_config.hidden_size, config.text_config.hidden_size
        self.language_projection = nn.Sequential(
            nn.Linear(width, config.projection_dim), nn.ReLU(), nn.Linear(config.projection_dim, text_width)
        )
        if config.cell_tokens != "queries":  # the direction of each label among the inputs of the language model
            n_labels = len((config.label_readout or {})["texts"])
            self.label_projection = nn.Linear(n_labels, text_width, bias=False)
        self.post_init()

    @with_own_weights
    def get_cell_tokens(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        cell_attention_mask: Tensor | None = None,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
        readout_scores: Tensor | None = None,
    ) -> Tensor:
        """Cells as inputs of the language model: `(num_cells, num_cell_tokens, text_config.hidden_size)`.

        These are the queries' states and, as the last token, the direction of the most probable label, as
        `config.cell_tokens` has it. A mean of directions would not do: the readout is nearly certain of the cells that
        it was fitted to, so the language model learns no mixtures, and may take one of two labels for a third.

        Args:
            gene_ids, expression, cell_attention_mask: As for `get_cell_features`.
            profile_gene_ids, profile (`torch.Tensor` of shape `(num_cells, num_expressed_genes)`): All expressed genes
                and the square roots of their shares, from which the label readout takes probabilities.
            readout_scores (`torch.FloatTensor` of shape `(num_cells, num_labels)`): Log probabilities of the labels in
                place of those, for instance of a readout that was solved for the genes of a file. (`Trainer` would
                take an input with "label" in its name for a target.)
        """
        tokens = []
        if self.config.cell_tokens != "labels":
            gene_states = self.encode_cells(gene_ids, expression, cell_attention_mask)  # (C, G, D)
            queries = self.query_cells(gene_states, cell_attention_mask) - self.query_means  # (C, Q, W)
            tokens.append(self.language_projection(queries))
        if self.config.cell_tokens != "queries":
            scores = self.read_labels(profile_gene_ids, profile, readout_scores)
            label = F.one_hot(scores.argmax(dim=-1), scores.shape[-1])
            tokens.append(self.label_projection(label.to(self.label_projection.weight.dtype))[:, None])
        return torch.cat(tokens, dim=1)

    def forward(self, gene_ids: Tensor, expression: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `get_cell_tokens`."""
        return self.get_cell_tokens(gene_ids, expression, *args, **kwargs)


class ScMMGPTModel(ScMMGPTCellEncoder):
    """The bridge, the headless language model and both projectors.

    `language_model`, the headless language model, is not copied; by default it is a new one of `config.text_config`.
    """

    main_input_name = "input_ids"
    language_model: Any  # of transformers, of any kind

    def __init__(self, config: ScMMGPTConfig, language_model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        named = inspect.signature(self.language_model.forward).parameters
        self.language_inputs = frozenset((*named, *TransformersKwargs.__optional_keys__, "cache", "past_key_values"))
        self.text_to_cell = ScMMGPTTextToCellProjector(config)
        self.expression_head = ScMMGPTExpressionHead(config)
        self.cell_states = None if config.num_state_components is None else ScMMGPTCellStates(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        gene_ids: Tensor | None = None,
        expression: Tensor | None = None,
        cell_attention_mask: Tensor | None = None,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
        readout_scores: Tensor | None = None,
        target_gene_ids: Tensor | None = None,
        target_attention_mask: Tensor | None = None,
        target_rows: Tensor | None = None,
        target_expression: Tensor | None = None,
        target_counts: Tensor | None = None,
        library_size: Tensor | None = None,
        **kwargs: Any,
    ) -> ScMMGPTModelOutput:
        """See [`ScMMGPTForConditionalGeneration.forward`]. `kwargs`, such as the cache, go to the language model."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass one of input_ids and inputs_embeds.")
        check_keywords(self, kwargs, self.language_inputs)
        check_attentions(kwargs.get("output_attentions"), self.config.text_config)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, L)

        # step 1: cells replace their placeholders, in the order of the text
        cell_tokens = None
        if gene_ids is not None and expression is not None:
            others = cell_attention_mask, profile_gene_ids, profile, readout_scores
            cell_tokens = self.get_cell_tokens(gene_ids, expression, *others)  # (C, tokens of a cell, L)
            cell_tokens = cell_tokens.to(inputs_embeds)
            placeholders = self.find_placeholders(input_ids, inputs_embeds, gene_ids.shape[0])  # (B, T)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], cell_tokens)
        elif input_ids is not None and input_ids.shape[1] > 1:  # a prompt; generation goes on token by token
            self.find_placeholders(input_ids, inputs_embeds, 0)

        # step 2: the language model encodes text and cells alike; position 0 is the first token that is not padding
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )  # last_hidden_state: (B, T, L)

        # step 3: rows with target genes generate cells
        expression_loss = None
        if target_gene_ids is not None:
            parameters, mask = self.decode_target_rows(
                outputs.last_hidden_state, attention_mask, target_gene_ids, target_attention_mask, target_rows
            )
            targets = target_expression, target_counts, library_size
            expression_loss = self.expression_head.loss(parameters, mask, *targets)
        fields = {name: value for name, value in outputs.items() if name in ScMMGPTModelOutput.__dataclass_fields__}
        return ScMMGPTModelOutput(**fields, cell_hidden_states=cell_tokens, expression_loss=expression_loss)

    def find_placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_cells: int) -> Tensor:
        """`(batch_size, sequence_length)` bool: the `<cell>` tokens, which must be as many as the cells' tokens."""
        if input_ids is not None:
            placeholders = input_ids == self.config.cell_token_id
        else:
            assert inputs_embeds is not None
            token = torch.full((), self.config.cell_token_id, dtype=torch.long, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)
        torch_compilable_check(
            placeholders.sum() == num_cells * self.config.num_cell_tokens,
            lambda: (
                f"The text has {int(placeholders.sum())} cell placeholder tokens, but {num_cells} cells x "
                f"{self.config.num_cell_tokens} tokens were given; expand `<cell>` with the processor."
            ),
        )
        return placeholders

    def decode_cells(
        self, text_states: Tensor, attention_mask: Tensor, gene_ids: Tensor, gene_attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The expression distribution of the genes given a text; no value of a target cell enters.

        `text_states` are the last states of the language model, `(batch_size, sequence_length, width)`; gene ids and
        their mask are `(batch_size, num_genes)`. For the result see [`ScMMGPTExpressionHead`].
        """
        conditions = self.text_to_cell(text_states, attention_mask)  # (B, K, D)
        outputs = self.cell_model(
            gene_ids,
            cell_attention_mask=gene_attention_mask,
            condition_embeds=conditions,
            genes_attend_to="conditions",
        )
        gene_states = outputs.last_hidden_state[:, conditions.shape[1] :]  # (B, G, D)
        # Among a thousand genes a few condition tokens get little attention; the cell embedding reaches every gene.
        from_cell = self.cell_model.decode_mvc(outputs.pooler_output, gene_ids)  # (B, G)
        decoded = self.cell_model.decode_expression(gene_states) if self.config.expression_head == "mse" else None
        return self.expression_head(gene_states, gene_ids, from_cell, decoded)

    def decode_target_rows(
        self,
        text_states: Tensor,
        attention_mask: Tensor | None,
        target_gene_ids: Tensor,
        target_attention_mask: Tensor | None,
        target_rows: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The expression distribution of each target cell, and the mask of its genes.

        A row with target genes is decoded once, however many cells it has, and a row without them not at all. For the
        arguments see [`ScMMGPTForConditionalGeneration.forward`].
        """
        if target_attention_mask is None:
            target_attention_mask = torch.ones_like(target_gene_ids)
        if target_rows is None:
            target_rows = torch.arange(len(target_gene_ids), device=target_gene_ids.device)
        if attention_mask is None:
            attention_mask = torch.ones(text_states.shape[:2], dtype=torch.long, device=text_states.device)
        if torch.compiler.is_compiling():  # a compiled graph must not depend on the number of rows with targets
            parameters = self.decode_cells(text_states, attention_mask, target_gene_ids, target_attention_mask)
            return {name: value[target_rows] for name, value in parameters.items()}, target_attention_mask[target_rows]
        rows = target_attention_mask.any(dim=1).nonzero(as_tuple=True)[0]
        if not len(rows):
            rows = rows.new_zeros(1)  # a fully masked row: a loss of 0 that still reaches every parameter (DDP)
        parameters = self.decode_cells(
            text_states[rows], attention_mask[rows], target_gene_ids[rows], target_attention_mask[rows]
        )
        decoded = torch.searchsorted(rows, target_rows).clamp(max=len(rows) - 1)
        return {name: value[decoded] for name, value in parameters.items()}, target_attention_mask[target_rows]


def of_part(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of [`ScMMGPTModel`] as one of the model that holds it as `model`, with its signature and docstring."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, method.__name__)(*args, **kwargs)

    return call


def _refuse_merged_adapters(model: "ScMMGPTForConditionalGeneration", *_: Any) -> None:
    """Refuse an adapter of the base whose adapter is merged into the weights: it would count twice."""
    for adapter in getattr(model, "peft_config", {}).values():
        base = getattr(adapter, "base_model_name_or_path", None)
        if base is not None and base in (model.config.adapter_bases or []):
            raise ValueError(
                f"An adapter of {base!r} is merged into this checkpoint already, and would count twice. Load the "
                "adapter on that base, for instance by `AutoPeftModelForCausalLM.from_pretrained(ADAPTER, "
                "trust_remote_code=True)`, or use the checkpoint without an adapter."
            )


class ScMMGPTForConditionalGeneration(ScMMGPTPreTrainedModel, GenerationMixin):
    """A causal language model whose prompts may contain cells (`generate`), and which generates cells
    (`generate_cells`).

    `language_model`, the causal language model, is not copied; by default it is a new one of `config.text_config`.

    Attributes:
        lora_target_modules: Linear layers of the language model alone, for `peft.LoraConfig(target_modules=...)`:
            PEFT's `"all-linear"`, and bare names such as `q_proj`, match layers of the other parts too.
    """

    lora_target_modules = rf".*language_model\..*\.({'|'.join(LORA_LAYERS)})"
    get_cell_features = of_part(ScMMGPTModel.get_cell_features)
    get_cell_tokens = of_part(ScMMGPTModel.get_cell_tokens)
    get_profile_embeddings = of_part(ScMMGPTModel.get_profile_embeddings)
    get_text_features = of_part(ScMMGPTModel.get_text_features)
    match = of_part(ScMMGPTModel.match)
    resize_gene_embeddings = of_part(ScMMGPTModel.resize_gene_embeddings)

    def __init__(self, config: ScMMGPTConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if "peft.utils.constants" in sys.modules:  # the default of a `LoraConfig` without `target_modules`
            defaults = sys.modules["peft.utils.constants"].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            defaults[config.model_type] = self.lora_target_modules
        config.auto_map = dict(AUTO_MAP)
        # `Trainer` smooths labels outside of the model: without the shift to the next token, which only transformers'
        # own classes get, and without the expression loss. For this type it warns instead, and takes the model's loss.
        config.problem_type = "multi_label_classification"
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            module: Any
            for module in language_model.modules():
                module._is_hf_initialized = True  # else `post_init` would initialise it again
        self.model = ScMMGPTModel(config, language_model.base_model)
        self.lm_head = language_model.get_output_embeddings()
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()
        self.forbid_placeholders()
        self.register_load_state_dict_pre_hook(_refuse_merged_adapters)  # `PeftModel` loads by `load_state_dict`

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; an adapter that is merged into these weights already is refused."""
        report = super().load_adapter(*args, **kwargs)
        _refuse_merged_adapters(self)
        return report

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As in transformers. By default, `quantization_config` holds for the layers of the language model alone.

        The other parts are small, and some quantised layers can't compute them. A list of modules not to convert in
        the configuration (`llm_int8_skip_modules`, `modules_to_not_convert`) takes precedence.
        """
        if quantization_config is not None:
            quantization_config = quantize_language_model_only(quantization_config)
            kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(*args, **kwargs)

    def forbid_placeholders(self) -> None:
        """Never generate `<cell>`, which would be a placeholder without a cell."""
        if self.generation_config is None:
            self.generation_config = GenerationConfig()
        self.generation_config.suppress_tokens = [self.config.cell_token_id]

    @classmethod
    def from_components(
        cls, alignment: ScMMGPTForCellTextAlignment, language_model: PreTrainedModel, **config_updates: Any
    ) -> "ScMMGPTForConditionalGeneration":
        """Join a stage-1 model and a causal language model, with their weights, into a stage-2 model.

        The parts that neither has (the two projectors, the expression head and the states of cells) are freshly
        initialised.

        Args:
            alignment: Trained stage-1 model. Its weights are copied; new parts take its dtype.
            language_model: Any `AutoModelForCausalLM` whose embeddings already have a row for `<cell>`. Its modules
                and configuration are not copied and keep their device, dtype and quantisation: training the new model
                changes this one.
            config_updates: Fields of [`ScMMGPTConfig`], at least `cell_token_id`.

        Raises:
            ValueError: If a weight of either component has no place in the model, or if the logits of the language
                model are not its head's output, scaled and capped as [`scale_logits`] does.
        """
        if not _has_known_logits(language_model):
            raise ValueError(
                f"A {language_model.config.model_type!r} language model changes the output of its head in a way that "
                "scMMGPT does not know; choose for instance Llama, Qwen, Mistral, Gemma or SmolLM."
            )
        values = alignment.config.to_dict()
        values.update(text_config=language_model.config.to_dict(), auto_map=dict(AUTO_MAP), architectures=None)
        values.update(config_updates)
        values["tie_word_embeddings"] = language_model.config.tie_word_embeddings
        values["profile_readout"] = False  # of fine-tuned annotation only; the language model has no input from it
        config = alignment.config.__class__(**values)
        config.text_config = language_model.config  # itself: a copy would lose its attention implementation
        with torch.device(language_model.device):
            model = cls._from_config(config, dtype=alignment.dtype, language_model=language_model)

        new_parts = tuple(f"{name}." for name in NEW_PARTS)
        weights = {k: v for k, v in alignment.state_dict().items() if not k.startswith("profile_readout.")}
        report = model.model.load_state_dict(weights, strict=False)
        missing = [key for key in report.missing_keys if not key.startswith(new_parts)]
        if missing or report.unexpected_keys:
            raise ValueError(
                f"The stage-1 weights do not fit: missing {missing}, unexpected {report.unexpected_keys}."
            )
        if language_model.generation_config is not None:
            names = ("eos_token_id", "pad_token_id", "bos_token_id")
            model.generation_config = GenerationConfig(
                **{name: getattr(language_model.generation_config, name) for name in names}
            )
        model.forbid_placeholders()
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        gene_ids: Tensor | None = None,
        expression: Tensor | None = None,
        cell_attention_mask: Tensor | None = None,
        profile_gene_ids: Tensor | None = None,
        profile: Tensor | None = None,
        readout_scores: Tensor | None = None,
        target_gene_ids: Tensor | None = None,
        target_attention_mask: Tensor | None = None,
        target_rows: Tensor | None = None,
        target_expression: Tensor | None = None,
        target_counts: Tensor | None = None,
        library_size: Tensor | None = None,
        **kwargs: Any,
    ) -> ScMMGPTCausalLMOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, logits_to_keep: As in any
                causal language model of transformers. `labels` is -100 where no token is a target.
            cache: `past_key_values` as transformers 5.24 and later call it.
            gene_ids, expression, cell_attention_mask: `(num_cells, num_genes)`: all cells of the batch in the order of
                the texts, each for `config.num_cell_tokens` placeholders in `input_ids`.
            profile_gene_ids, profile, readout_scores: See `get_cell_tokens`; not used unless the language model reads
                labels (`config.cell_tokens`).
            target_gene_ids, target_attention_mask: `(batch_size, num_genes)`: genes to generate from the row's text. A
                row whose mask is all 0 has none.
            target_rows (`torch.LongTensor` of shape `(num_targets,)`): The row of each target cell's text; by default
                one cell per row. A text with many target cells is encoded and decoded once.
            target_expression (`torch.FloatTensor` of shape `(num_targets, num_genes)`): log1p(CP10k) of its row's
                genes, for the `mse` head.
            target_counts (`torch.Tensor` of shape `(num_targets, num_genes)`): Raw counts, for `nb` and `zinb`.
            library_size (`torch.FloatTensor` of shape `(num_targets,)`): Total counts of the target cell.
        """
        check_keywords(self, kwargs, self.model.language_inputs.union(LOSS_INPUTS))
        caches = {"past_key_values": past_key_values, "cache": cache}
        kwargs.update({name: value for name, value in caches.items() if value is not None})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            gene_ids=gene_ids,
            expression=expression,
            cell_attention_mask=cell_attention_mask,
            profile_gene_ids=profile_gene_ids,
            profile=profile,
            readout_scores=readout_scores,
            target_gene_ids=target_gene_ids,
            target_attention_mask=target_attention_mask,
            target_rows=target_rows,
            target_expression=target_expression,
            target_counts=target_counts,
            library_size=library_size,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name not in LOSS_INPUTS},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # (B, T or fewer, vocabulary)
        logits = scale_logits(logits, self.config.text_config)

        loss, language_loss = None, None
        if labels is not None:
            language_loss = self.language_loss(logits, labels, **kwargs)
            loss = self.config.language_weight * language_loss
        if outputs.expression_loss is not None:
            loss = (0 if loss is None else loss) + self.config.expression_weight * outputs.expression_loss

        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return ScMMGPTCausalLMOutput(loss=loss, language_loss=language_loss, logits=logits, **fields)

    def language_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        ignore_index: int = IGNORED_LABEL,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Cross-entropy of the next token: the mean over the tokens with a label, 0 without any.

        A batch has none where all of its prompts ask for cells.

        Args:
            logits: `(batch_size, sequence_length, vocab_size)`.
            labels: `(batch_size, sequence_length)`, `ignore_index` where no token is a target.
            shift_labels: The label of the next token at each place, in place of `labels`.
            num_items_in_batch: Number of labels to divide the sum by, in place of that of this batch.
        """
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum().clamp(min=1)
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.text_config.vocab_size,
            shift_labels=shift_labels,
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )

    @torch.no_grad()
    def generate_cells(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        target_gene_ids: Tensor | Sequence[int],
        library_size: Tensor | float | None = None,
        num_return_cells: int = 1,
        do_sample: bool = False,
        seed: int = 0,
        cell_ids: Iterable[int] | None = None,
        **cell_inputs: Tensor,
    ) -> CellGenerationOutput:
        """Generate `batch_size * num_return_cells` cells; those of one prompt follow each other.

        A prompt is encoded and decoded once, however many cells it has.

        Args:
            input_ids, attention_mask: `(batch_size, sequence_length)` prompts; left padding, as for `generate`.
            target_gene_ids: `(num_genes,)` or `(batch_size, num_genes)`: the genes to generate, for instance by the
                processor's `gene_ids_of`. The prediction for one gene depends a little on the others, since the
                condition tokens attend to all of them.
            library_size: Total counts of a cell, one number or `(batch_size * num_return_cells,)`; needed to sample.
            num_return_cells: Cells of each prompt.
            do_sample: Also draw counts (`nb` and `zinb` heads).
            seed, cell_ids: The counts of a cell depend on `seed` and its id (by default its row number), not on the
                rest of the batch.
            cell_inputs: `gene_ids`, `expression` and other inputs of cells in the prompts.

        Raises:
            ValueError: If counts are to be sampled from the `mse` head or without a library size.
        """
        target_gene_ids = torch.as_tensor(target_gene_ids, device=input_ids.device)
        if target_gene_ids.dim() == 1:
            target_gene_ids = target_gene_ids.expand(len(input_ids), -1)
        if do_sample and self.config.expression_head == "mse":
            raise ValueError(
                "do_sample is True, but the mse expression head of this checkpoint predicts a mean, which cannot be "
                "sampled; use do_sample=False or a checkpoint with expression_head='nb'."
            )
        if do_sample and library_size is None:
            raise ValueError("do_sample is True, but library_size is None; pass the total counts of a cell.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask, **cell_inputs}
        text_states = self.model(**prompts, use_cache=False, return_dict=True).last_hidden_state  # (B, T, L)
        parameters = self.model.decode_cells(text_states, attention_mask, target_gene_ids)
        parameters = {name: value.repeat_interleave(num_return_cells, dim=0) for name, value in parameters.items()}
        counts = None
        if do_sample:
            n_cells = len(input_ids) * num_return_cells
            library_size = torch.as_tensor(library_size, dtype=torch.float32, device=input_ids.device)
            seeds = [hash_seed(seed, cell_id) for cell_id in (range(n_cells) if cell_ids is None else cell_ids)]
            counts = self.model.expression_head.sample(parameters, library_size.expand(n_cells), seeds)
        return CellGenerationOutput(expression=parameters["expression"].clamp(min=0), counts=counts)

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Any = None, is_first_iteration: Any = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass the cells with the prompt only: afterwards the cache holds them."""
        cells = {name: kwargs.pop(name, None) for name in PROMPT_CELL_INPUTS}
        for name in ("tokenizer", "assistant_tokenizer"):  # of `stop_strings`; transformers leaves it to the model
            kwargs.pop(name, None)
        # A model that assists another one gets the prompt in what counts as a later iteration.
        length = args[0] if args else kwargs.get("next_sequence_length")
        whole = length is None or (inputs_embeds is None and length >= input_ids.shape[1])
        kwargs.update(inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration)
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return {**inputs, **cells} if is_first_iteration or whole else inputs

    def _prefill(self, input_ids: Tensor, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which splits the prompt for `prefill_chunk_size`, but not the cells."""
        inputs = kwargs.get("model_kwargs", args[0] if args else {})
        if generation_config.prefill_chunk_size is not None and inputs.get("gene_ids") is not None:
            raise ValueError("prefill_chunk_size would split the prompt but not its cells; leave it out.")
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat samples for beams. A sample's cells repeat as a block: A B A B, not A A B B."""
        cells = {name: model_kwargs.pop(name) for name in PROMPT_CELL_INPUTS if model_kwargs.get(name) is not None}
        if cells and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            placeholders = self.model.find_placeholders(
                input_ids if embeds is None else None, embeds, len(cells["gene_ids"])
            )
            cells_per_row = (placeholders.sum(dim=1) // self.config.num_cell_tokens).tolist()
            blocks = torch.arange(len(cells["gene_ids"]), device=placeholders.device).split(cells_per_row)
            order = torch.cat([block.repeat(expand_size) for block in blocks])
            cells = {name: value[order] for name, value in cells.items()}
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **cells}


def quantize_language_model_only(quantization_config: Any) -> Any:
    """A copy of a quantisation's configuration that leaves out all but the language model's layers.

    If the configuration lists modules that are not to be converted, it is returned as it is.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if getattr(quantization_config, name, []) in (None, ["lm_head"]):
            quantization_config = copy.deepcopy(quantization_config)
            setattr(quantization_config, name, [OTHER_PARTS])
    return quantization_config


@torch.no_grad()
def _has_known_logits(language_model: PreTrainedModel) -> bool:
    """Whether the logits are those that [`scale_logits`] makes of the head's output; tried on a few tokens."""
    if language_model.device.type == "meta":
        return True
    was_training = language_model.training
    language_model.eval()
    tokens = torch.arange(4, device=language_model.device)[None]  # one alone might be padding, whose logits are 0
    states = language_model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    expected = scale_logits(language_model.get_output_embeddings()(states), language_model.config).float()
    logits = language_model(input_ids=tokens, use_cache=False).logits.float()
    language_model.train(was_training)
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


show_module(__name__)
ScMMGPTForCellTextAlignment.register_for_auto_class("AutoModel")
ScMMGPTCellEncoder.register_for_auto_class("AutoModel")
ScMMGPTForConditionalGeneration.register_for_auto_class("AutoModel")
