"""scMMGPT: losses, the Q-Former bridge, cell-text alignment (stage 1) and the generative model (stage 2).

Read it bottom-up: `ScMMGPTForConditionalGeneration.forward` -> `ScMMGPTModel.forward` -> `ScMMGPTBridgeModel`.
Masks are 1 where a token is attended to. Expression values are what the processor makes of the counts (51 bins unless
configured otherwise); targets of text-to-cell generation are log1p(CP10k) or raw counts, as each docstring says.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerModel,
    Blip2QFormerMultiHeadAttention,
    Blip2TextEmbeddings,
)
from transformers.utils import torch_compilable_check


try:  # as a package or as remote code
    from .configuration_scmmgpt import ALIGNMENT_AUTO_MAP, AUTO_MAP, ScMMGPTConfig
    from .modeling_scgpt import ScGPTModel, eager_attention_forward
except ImportError:  # as a flat module in a clone
    from configuration_scmmgpt import ALIGNMENT_AUTO_MAP, AUTO_MAP, ScMMGPTConfig
    from modeling_scgpt import ScGPTModel, eager_attention_forward


MAX_LOGIT_SCALE = 4.6052  # ln(100), the ceiling of CLIP's learned inverse temperature
COUNTS_PER_10K = 1e4  # "CP10k": the scale of every normalised expression value in this file
MAX_LOG_RATE = 9.2103  # ln(1e4): no gene has more than all of a cell's counts per 10k
IGNORE_INDEX = -100

CELL_INPUTS = ("gene_ids", "expression", "cell_attention_mask")


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class AlignmentOutput(ModelOutput):
    """Output of [`ScMMGPTForCellTextAlignment`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): Weighted sum of the losses below that have a weight.
        contrastive_loss, matching_loss, captioning_loss, cell_pretraining_loss (`torch.FloatTensor` of shape `(1,)`):
            The components, unweighted; `None` where the weight is 0.
        cell_features (`torch.FloatTensor` of shape `(batch_size, num_query_tokens, projection_dim)`): L2-normalised.
        text_features (`torch.FloatTensor` of shape `(batch_size, projection_dim)`): L2-normalised.
    """

    loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    matching_loss: torch.FloatTensor | None = None
    captioning_loss: torch.FloatTensor | None = None
    cell_pretraining_loss: torch.FloatTensor | None = None
    cell_features: torch.FloatTensor | None = None
    text_features: torch.FloatTensor | None = None


@dataclass
class ScMMGPTModelOutput(ModelOutput):
    """Output of [`ScMMGPTModel`]: the language model's states and, for rows with target genes, the expression."""

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    cell_hidden_states: torch.FloatTensor | None = None
    expression_loss: torch.FloatTensor | None = None


@dataclass
class ScMMGPTCausalLMOutput(ModelOutput):
    """Output of [`ScMMGPTForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): `language_weight * language_loss + expression_weight *
            expression_loss`, over the components that the batch has.
        language_loss (`torch.FloatTensor` of shape `(1,)`): Cross-entropy of `labels`; `None` without labels.
        expression_loss (`torch.FloatTensor` of shape `(1,)`): Loss of the target genes; `None` without targets.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_config.vocab_size)`).
    """

    loss: torch.FloatTensor | None = None
    language_loss: torch.FloatTensor | None = None
    expression_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    cell_hidden_states: torch.FloatTensor | None = None


@dataclass
class CellGenerationOutput(ModelOutput):
    """Cells generated from text.

    Args:
        expression (`torch.FloatTensor` of shape `(num_cells, num_genes)`): Expected log1p(CP10k) of each gene.
        counts (`torch.LongTensor` of shape `(num_cells, num_genes)`): Sampled counts; `None` unless sampled.
    """

    expression: torch.FloatTensor | None = None
    counts: torch.LongTensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of features, logits and targets
# ---------------------------------------------------------------------------------------------------------------------


def cell_text_similarity(cell_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every cell with every text: a cell's best query answers, as in BLIP-2.

    Args:
        cell_features: `(num_cells, num_query_tokens, projection_dim)`, L2-normalised.
        text_features: `(num_texts, projection_dim)`, L2-normalised.

    Returns:
        `(num_cells, num_texts)`, between -1 and 1.
    """
    return torch.einsum("cqd,td->cqt", cell_features, text_features).amax(dim=1)


def contrastive_loss(similarity: torch.Tensor, logit_scale: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE with several positives a row: cross-entropy against the normalised `targets`.

    Args:
        similarity: `(num_cells, num_texts)` cosine similarities.
        logit_scale: Scalar that multiplies them (the inverse temperature, not its logarithm).
        targets: `(num_cells, num_texts)`, >= 0: 1 where the text describes the cell, 0 where it does not, in between
            where it is nearly right. Every row and column needs a positive entry.

    >>> similarity = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> same = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> round(contrastive_loss(similarity, torch.tensor(100.0), same).item(), 4)  # 2 of 3 rows have two right answers
    0.4621
    """
    logits = similarity.float() * logit_scale
    targets = targets.to(logits.dtype)
    cell_to_text = F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True))
    text_to_cell = F.cross_entropy(logits.t(), targets.t() / targets.t().sum(dim=1, keepdim=True))
    return (cell_to_text + text_to_cell) / 2


def paired_contrastive_loss(similarity: torch.Tensor, logit_scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """InfoNCE as published: from cells to texts, within groups of cells, only a cell's own text being right.

    Kept for comparison. Cells of one type in one group are taught to tell apart what nothing tells apart.

    Args:
        similarity: `(num_cells, num_cells)` cosine similarities, of cell i with the text of cell j.
        logit_scale: Scalar that multiplies them.
        group_size: Cells per group, in the order of the batch; those that fill no group are left out.

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


def sample_hard_negatives(logits: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one wrong column per row, the likelier the more similar it is.

    Args:
        logits: `(rows, columns)` scaled similarities.
        allowed: `(rows, columns)` bool, true where the column is a wrong answer for the row.

    Returns:
        `(rows_with_a_negative,)` row indices and the column drawn for each. A row without a wrong column is left out.
    """
    rows = allowed.any(dim=1).nonzero(as_tuple=True)[0]
    if not len(rows):
        return rows, rows
    probabilities = logits[rows].float().masked_fill(~allowed[rows], float("-inf")).softmax(dim=1)
    return rows, torch.multinomial(probabilities, 1).squeeze(1)


def negative_binomial_nll(
    counts: torch.Tensor, mean: torch.Tensor, dispersion: torch.Tensor, dropout_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Negative log-likelihood of counts under NB(mean, dispersion), or ZINB if `dropout_logits` is given.

    Args:
        counts: Any shape, >= 0.
        mean: Same shape, > 0: expected count of the NB part.
        dispersion: Same shape, > 0: inverse dispersion theta; the variance is `mean + mean**2 / theta`.
        dropout_logits: Same shape: logit of an extra zero.
    """
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
        return -log_likelihood
    kept = F.logsigmoid(-dropout_logits)
    extra_zero = torch.logaddexp(F.logsigmoid(dropout_logits), kept + log_zero)
    return -torch.where(counts > 0, kept + log_likelihood, extra_zero)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the entries where `mask` is 1: 0 (with a gradient of 0) if there are none."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def additive_mask(attend: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `attend` is 1, a very negative number elsewhere.

    The Q-Former takes a four-dimensional mask as it is. From a two-dimensional one it would make rows for queries and
    text, while only the queries look at the cell.
    """
    return torch.zeros(attend.shape, dtype=dtype, device=attend.device).masked_fill(
        ~attend.bool(), torch.finfo(dtype).min
    )


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor over ranks; the gradient of every rank's loss flows back to where the rows came from."""

    @staticmethod
    def forward(ctx, tensor):
        gathered = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, tensor.contiguous())
        ctx.rows = len(tensor)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        start = torch.distributed.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's rows of all ranks, in rank order, with gradients; the tensor itself in a single process.

    Every rank must hold the same number of rows.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            return _AllGather.apply(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# The bridge: cell model + Q-Former + shared space
# ---------------------------------------------------------------------------------------------------------------------


class ScMMGPTPreTrainedModel(PreTrainedModel):
    """Initialisation and the settings that all scMMGPT classes share."""

    config_class = ScMMGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["ScGPTLayer", "Blip2QFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ScMMGPTBridgeModel):
            init.normal_(module.query_tokens, std=self.config.initializer_range)
            init.zeros_(module.query_means)
            init.constant_(module.logit_scale, self.config.logit_scale_init)
        elif isinstance(module, ScMMGPTProfileReadout):
            init.zeros_(module.gene_weights.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ScMMGPTTextToCellProjector):
            init.normal_(module.query_tokens)  # a LayerNorm follows; smaller ones would be lost in the first steps
            init.zeros_(module.query_means)
        elif isinstance(module, Blip2TextEmbeddings):
            # A non-persistent buffer: loading starts from the meta device, which leaves it uninitialised.
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1], device="cpu").expand((1, -1)))


class ScMMGPTProfileReadout(nn.Module):
    """A cell's whole expression profile -> shared space, linearly: every gene has a direction, weighted by its value.

    With few labelled cells a linear model of all genes is hard to beat, and no attention over 1,200 of them is needed
    to be one. What it reads is the square root of each gene's share of the counts (`hellinger_profile`). It begins as
    0, and adds to what the queries say.
    """

    def __init__(self, config: ScMMGPTConfig):
        super().__init__()
        self.gene_weights = nn.Embedding(config.cell_config.vocab_size, config.projection_dim)
        self.bias = nn.Parameter(torch.zeros(config.projection_dim))

    def forward(self, profile_gene_ids: torch.Tensor, profile: torch.Tensor) -> torch.Tensor:
        """`(num_cells, projection_dim)` of gene ids and values, both `(num_cells, num_genes)`; padding is 0."""
        weights = self.gene_weights.weight
        return (
            F.embedding_bag(profile_gene_ids, weights, per_sample_weights=profile.to(weights), mode="sum") + self.bias
        )


class ScMMGPTCellAttention(Blip2QFormerMultiHeadAttention):
    """The Q-Former's cross-attention, which projects a cell's genes once for all queries that read them.

    Keys and values depend on the cell alone, and with a thousand genes to 32 queries they are most of the work. In
    matching a cell is read with several texts, and before that alone.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        readers: torch.Tensor | None = None,
        projected: dict | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the class it replaces, but for two arguments.

        Args:
            hidden_states: `(num_rows, num_query_tokens, hidden_size)`.
            attention_mask: Of the self-attention; not used.
            encoder_hidden_states: `(num_cells, num_genes, encoder_hidden_size)`.
            encoder_attention_mask: `(num_cells, 1, 1, num_genes)`, added to the scores.
            readers: `(num_rows,)`: which cell each row reads; by default row i reads cell i.
            projected: Keys and values by module: those of an earlier call on the same cells are taken from here, and
                those of this call are left here.
            kwargs: For the attention function.
        """

        def by_head(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        if projected is None or self not in projected:
            states = by_head(self.key(encoder_hidden_states)), by_head(self.value(encoder_hidden_states))
            if projected is not None:
                projected[self] = states
        else:
            states = projected[self]
        if readers is not None:  # not `states[readers]`, whose gradient is added up element by element
            states = [state.index_select(0, readers) for state in states]
            if encoder_attention_mask is not None:
                encoder_attention_mask = encoder_attention_mask.index_select(0, readers)
        queries = by_head(self.query(hidden_states))
        # In bfloat16 on a CPU fused attention is as slow as in float32, and matrix products are 2.5 times as fast.
        implementation = self.config._attn_implementation
        if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
            implementation = "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            queries,
            *states,
            encoder_attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.flatten(2), weights


class ScMMGPTBridgeModel(ScMMGPTPreTrainedModel):
    """The parts that stage 1 trains and stage 2 keeps: cell model, Q-Former with text branch, contrast and matching.

    A checkpoint of the alignment model loads into the generative model by these key names.
    """

    def __init__(self, config: ScMMGPTConfig):
        super().__init__(config)
        width = config.qformer_config.hidden_size
        self.cell_model = ScGPTModel._from_config(config.cell_config)
        self.cell_norm = nn.LayerNorm(config.cell_config.hidden_size, eps=config.cell_config.layer_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        for layer in self.qformer.encoder.layer:
            if layer.has_cross_attention:  # with the weights and names that it has
                layer.crossattention.attention.__class__ = ScMMGPTCellAttention
        self.qformer_embeddings = Blip2TextEmbeddings(config.qformer_config)
        # What each query answers to the average cell. It is much larger than what cells differ in, and is taken out.
        self.query_means = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.cell_projection = nn.Linear(width, config.projection_dim)
        self.text_projection = nn.Linear(width, config.projection_dim)
        self.matching_head = nn.Linear(width, 2)
        if config.profile_readout:
            self.profile_readout = ScMMGPTProfileReadout(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def encode_cells(
        self, gene_ids: torch.Tensor, expression: torch.Tensor, cell_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gene states of cells, `(num_cells, num_genes, cell_config.hidden_size)`, as the Q-Former reads them."""
        outputs = self.cell_model(gene_ids=gene_ids, expression=expression, cell_attention_mask=cell_attention_mask)
        return self.cell_norm(outputs.last_hidden_state)

    def query_cells(
        self,
        cell_states: torch.Tensor,
        cell_attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        readers: torch.Tensor | None = None,
        projected: dict | None = None,
    ) -> torch.Tensor:
        """Let the queries read cells, alone or together with a text.

        Args:
            cell_states: `(num_cells, num_genes, cell_config.hidden_size)` from `encode_cells`.
            cell_attention_mask: `(num_cells, num_genes)`.
            text_embeds: `(num_rows, text_length, qformer_config.hidden_size)`, to read a text beside the cell.
            qformer_attention_mask: `(num_rows, text_length)`, or a float mask that is added to the attention scores,
                `(num_rows, 1, num_query_tokens + text_length, num_query_tokens + text_length)`.
            readers: `(num_rows,)`: which cell each row reads; by default row i reads cell i.
            projected: See [`ScMMGPTCellAttention`].

        Returns:
            `(num_rows, num_query_tokens [+ text_length], qformer_config.hidden_size)`.
        """
        queries = self.query_tokens.expand(len(cell_states if readers is None else readers), -1, -1)
        attention_mask = None
        if text_embeds is not None:
            attention_mask = qformer_attention_mask
            if attention_mask.dim() == 2:
                attention_mask = F.pad(attention_mask, (queries.shape[1], 0), value=1)
            queries = torch.cat([queries, text_embeds.to(queries.dtype)], dim=1)
        if cell_attention_mask is not None:
            cell_attention_mask = additive_mask(cell_attention_mask[:, None, None], cell_states.dtype)
        return self.qformer(
            query_embeds=queries,
            query_length=self.config.num_query_tokens,
            attention_mask=attention_mask,
            encoder_hidden_states=cell_states,
            encoder_attention_mask=cell_attention_mask,
            readers=readers,
            projected=projected,
        ).last_hidden_state

    def project_cells(
        self,
        query_states: torch.Tensor,
        profile_gene_ids: torch.Tensor | None = None,
        profile: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query states -> shared space, `(num_cells, num_query_tokens, projection_dim)`, L2-normalised.

        Raises:
            ValueError: If the model reads profiles but none is given.
        """
        features = self.cell_projection(query_states - self.query_means)
        if self.config.profile_readout:
            if profile is None:
                raise ValueError(
                    "This checkpoint also reads each cell's whole profile (`profile_gene_ids`, `profile`), but got "
                    "none; let its own processor make the inputs, or set `return_profile` of the feature extractor."
                )
            features = features + self.profile_readout(profile_gene_ids, profile)[:, None]
        return F.normalize(features, dim=-1)

    def get_cell_features(
        self,
        gene_ids: torch.Tensor,
        expression: torch.Tensor,
        cell_attention_mask: torch.Tensor | None = None,
        profile_gene_ids: torch.Tensor | None = None,
        profile: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cells in the shared space: `(num_cells, num_query_tokens, projection_dim)`, L2-normalised.

        Args:
            gene_ids (`torch.LongTensor` of shape `(num_cells, num_genes)`): Ids in the gene vocabulary.
            expression (`torch.FloatTensor` of shape `(num_cells, num_genes)`): Values as the processor makes them.
            cell_attention_mask (`torch.LongTensor` of shape `(num_cells, num_genes)`): 1 = a gene, 0 = padding.
            profile_gene_ids, profile (`torch.Tensor` of shape `(num_cells, num_expressed_genes)`): All expressed genes
                and their values, if `config.profile_readout`.
        """
        cell_states = self.encode_cells(gene_ids, expression, cell_attention_mask)
        return self.project_cells(self.query_cells(cell_states, cell_attention_mask), profile_gene_ids, profile)

    def get_text_features(
        self, qformer_input_ids: torch.Tensor, qformer_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Texts in the shared space: `(num_texts, projection_dim)`, L2-normalised."""
        return self.project_texts(self.read_texts(qformer_input_ids, qformer_attention_mask))

    def read_texts(
        self,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One state per text, `(num_texts, qformer_config.hidden_size)`, pooled as `config.text_pooling` says.

        Args:
            qformer_input_ids, qformer_attention_mask: `(num_texts, text_length)`.
            text_embeds: `(num_texts, text_length, qformer_config.hidden_size)`, where they are at hand.
        """
        if text_embeds is None:
            text_embeds = self.qformer_embeddings(input_ids=qformer_input_ids)
        states = self.qformer(
            query_embeds=text_embeds, query_length=0, attention_mask=qformer_attention_mask
        ).last_hidden_state
        if self.config.text_pooling == "cls":
            return states[:, 0]
        if qformer_attention_mask is None:
            return states.mean(dim=1)
        weights = qformer_attention_mask.to(states.dtype)[..., None]
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def project_texts(self, text_states: torch.Tensor) -> torch.Tensor:
        """Text states -> shared space, `(num_texts, projection_dim)`, L2-normalised."""
        return F.normalize(self.text_projection(text_states), dim=-1)

    def match(
        self,
        gene_ids: torch.Tensor,
        expression: torch.Tensor,
        cell_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        **profiles,
    ) -> torch.Tensor:
        """Probability that a text describes a cell, from both read together.

        Args:
            profiles: `profile_gene_ids` and `profile`, as the processor makes them; matching does not read them.
            pairs (`torch.LongTensor` of shape `(num_pairs, 2)`): Which cell with which text; by default the first with
                the first, the second with the second, and so on. A cell in many pairs is encoded once.

        Returns:
            `(num_pairs,)` between 0 and 1.
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
        cell_states = self.encode_cells(gene_ids, expression, cell_attention_mask)
        text_embeds = self.qformer_embeddings(input_ids=qformer_input_ids)
        cells, texts = pairs.unbind(dim=1)
        logits = self.matching_logits(
            cell_states, cell_attention_mask, text_embeds[texts], qformer_attention_mask[texts], readers=cells
        )
        return logits.softmax(dim=-1)[:, 1]

    def matching_logits(
        self,
        cell_states: torch.Tensor,
        cell_attention_mask: torch.Tensor,
        text_embeds: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        **reading,
    ) -> torch.Tensor:
        """`(num_pairs, 2)` logits of "no match" and "match", averaged over the queries; see `query_cells`."""
        states = self.query_cells(cell_states, cell_attention_mask, text_embeds, qformer_attention_mask, **reading)
        return self.matching_head(states[:, : self.config.num_query_tokens]).mean(dim=1)


class ScMMGPTForCellTextAlignment(ScMMGPTBridgeModel):
    """Stage 1: learn which texts describe which cells, by contrast and by matching.

    Needs no language model. `config.text_config` is not used and not trained.
    """

    def __init__(self, config: ScMMGPTConfig):
        super().__init__(config)
        config.auto_map = dict(ALIGNMENT_AUTO_MAP)
        self.post_init()

    def get_input_embeddings(self):
        return self.qformer_embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.qformer_embeddings.word_embeddings = value

    def forward(
        self,
        gene_ids: torch.LongTensor,
        expression: torch.FloatTensor,
        qformer_input_ids: torch.LongTensor,
        cell_attention_mask: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        text_ids: torch.LongTensor | None = None,
        text_similarity: torch.FloatTensor | None = None,
        masked_expression: torch.FloatTensor | None = None,
        expression_labels: torch.FloatTensor | None = None,
        profile_gene_ids: torch.LongTensor | None = None,
        profile: torch.FloatTensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> AlignmentOutput:
        r"""
        Args:
            gene_ids, expression, cell_attention_mask: `(batch_size, num_genes)`, one cell a row.
            qformer_input_ids, qformer_attention_mask: `(batch_size, text_length)`, the text of the same row's cell.
            text_ids (`torch.LongTensor` of shape `(batch_size,)`): Equal where two texts mean the same, so that they
                are never negatives of each other. By default, where their tokens are equal.
            text_similarity (`torch.FloatTensor` of shape `(batch_size, batch_size)`): Optional soft targets in 0..1
                between texts (for instance from an ontology), used off the positives. Single process only.
            masked_expression, expression_labels (`torch.FloatTensor` of shape `(batch_size, num_genes)`): The cells
                with some values hidden, and the values to recover (-100 elsewhere), if
                `config.cell_pretraining_weight > 0`.
            profile_gene_ids, profile (`torch.Tensor` of shape `(batch_size, num_expressed_genes)`): As for
                `get_cell_features`.
            return_loss: Without it the features alone are returned, and texts need not go with cells in pairs.
        """
        config = self.config
        if cell_attention_mask is None:
            cell_attention_mask = torch.ones_like(gene_ids)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)

        # step 1: cells and texts, each alone, into the shared space
        cell_states = self.encode_cells(gene_ids, expression, cell_attention_mask)
        # Checkpointing gives up what a pass computed; then nothing of it can be kept for the next.
        projected = None if self.training and self.qformer.encoder.gradient_checkpointing else {}
        query_states = self.query_cells(cell_states, cell_attention_mask, projected=projected)
        cell_features = self.project_cells(query_states, profile_gene_ids, profile)
        text_embeds = self.qformer_embeddings(input_ids=qformer_input_ids)
        text_states = self.read_texts(qformer_input_ids, qformer_attention_mask, text_embeds)
        text_features = self.project_texts(text_states)
        output = AlignmentOutput(cell_features=cell_features, text_features=text_features)
        if not return_loss:
            return output

        if text_ids is None:
            same = (qformer_input_ids[:, None] * qformer_attention_mask[:, None]) == (
                qformer_input_ids[None] * qformer_attention_mask[None]
            )
            text_ids = same.all(dim=-1).int().argmax(dim=1)  # the first row with the same tokens
        logit_scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        losses = {}

        # step 2: contrast over the whole batch of all ranks
        if config.contrastive_weight:
            all_ids = gather_rows(text_ids)
            targets = (all_ids[:, None] == all_ids[None]).float()
            if text_similarity is not None:
                targets = torch.maximum(targets, text_similarity.to(targets))
            similarity = cell_text_similarity(gather_rows(cell_features), gather_rows(text_features))
            if config.contrastive_group_size is None:
                losses["contrastive"] = contrastive_loss(similarity, logit_scale, targets)
            else:
                group_size = config.contrastive_group_size
                losses["contrastive"] = paired_contrastive_loss(similarity, logit_scale, group_size)

        # step 3: matching of true pairs against each cell with a wrong text and each text with a wrong cell
        if config.matching_weight:
            with torch.no_grad():
                logits = cell_text_similarity(cell_features, text_features) * logit_scale
                wrong = text_ids[:, None] != text_ids[None]
                rows, wrong_texts = sample_hard_negatives(logits, wrong)
                columns, wrong_cells = sample_hard_negatives(logits.t(), wrong.t())
            true_pairs = torch.arange(len(gene_ids), device=gene_ids.device)[: config.matching_batch_size]
            rows, wrong_texts, columns, wrong_cells = (
                x[: config.matching_batch_size] for x in (rows, wrong_texts, columns, wrong_cells)
            )
            cells = torch.cat([true_pairs, rows, wrong_cells])
            texts = torch.cat([true_pairs, wrong_texts, columns])
            is_match = (torch.arange(len(cells), device=gene_ids.device) < len(true_pairs)).long()
            matching_logits = self.matching_logits(
                cell_states,
                cell_attention_mask,
                text_embeds.index_select(0, texts),
                qformer_attention_mask[texts],
                readers=cells,
                projected=projected,
            )
            losses["matching"] = F.cross_entropy(matching_logits.float(), is_match)

        # step 4: captioning, each word from the queries and the words before it
        if config.captioning_weight:
            losses["captioning"] = self.captioning_loss(
                cell_states, cell_attention_mask, text_embeds, qformer_input_ids, qformer_attention_mask, projected
            )

        # step 5: the cell model's own masked-expression objective
        if config.cell_pretraining_weight and masked_expression is not None:
            losses["cell_pretraining"] = self.cell_model(
                gene_ids=gene_ids,
                expression=masked_expression,
                cell_attention_mask=cell_attention_mask,
                expression_labels=expression_labels,
            ).loss

        for name, loss in losses.items():
            output[f"{name}_loss"] = loss
        output["loss"] = sum(getattr(config, f"{name}_weight") * loss for name, loss in losses.items())
        return output

    def captioning_loss(
        self,
        cell_states: torch.Tensor,
        cell_attention_mask: torch.Tensor,
        text_embeds: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        projected: dict | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of each text token given the queries and the tokens before it; the embeddings are the head."""
        num_queries, length = self.config.num_query_tokens, qformer_input_ids.shape[1]
        total = num_queries + length
        visible = torch.ones(total, total, dtype=torch.bool, device=text_embeds.device).tril()
        visible[:, :num_queries] = True  # queries see each other and no text; words see all queries
        visible = visible[None] & F.pad(qformer_attention_mask.bool(), (num_queries, 0), value=True)[:, None]
        visible = visible | torch.eye(total, dtype=torch.bool, device=text_embeds.device)  # no empty softmax
        mask = additive_mask(visible[:, None], text_embeds.dtype)
        states = self.query_cells(cell_states, cell_attention_mask, text_embeds, mask, projected=projected)
        states = states[:, num_queries:]
        logits = F.linear(states[:, :-1], self.qformer_embeddings.word_embeddings.weight)
        labels = qformer_input_ids[:, 1:].masked_fill(qformer_attention_mask[:, 1:] == 0, IGNORE_INDEX)
        return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX)


# ---------------------------------------------------------------------------------------------------------------------
# Text to cell
# ---------------------------------------------------------------------------------------------------------------------


class ScMMGPTTextToCellProjector(nn.Module):
    """Learned queries cross-attend to the language model's states and become condition tokens of the cell model.

    The state of the prompt's last token, which has read all of it, is added to every query: texts differ in it from
    the start, while a fresh cross-attention averages their differences away.
    """

    def __init__(self, config: ScMMGPTConfig):
        super().__init__()
        width = config.text_to_cell_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_condition_tokens, width))
        self.query_means = nn.Parameter(torch.zeros(1, config.num_condition_tokens, width))  # as in the bridge
        self.summary_projection = nn.Linear(config.text_config.hidden_size, width)
        self.qformer = Blip2QFormerModel._from_config(config.text_to_cell_config)
        self.projection = nn.Linear(width, config.cell_config.hidden_size)

    def forward(self, text_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(batch_size, sequence_length, text width)` -> `(batch_size, num_condition_tokens, cell width)`."""
        return self.projection(self.read(text_states, attention_mask) - self.query_means)

    @staticmethod
    def summarize(text_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """State of the last token that is attended to, `(batch_size, text width)`, padded left or right."""
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (positions * attention_mask.long()).argmax(dim=1)
        return text_states[torch.arange(len(text_states), device=text_states.device), last]

    def read(self, text_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The queries' states, `(batch_size, num_condition_tokens, text_to_cell_config.hidden_size)`."""
        text_states = text_states.to(self.query_tokens.dtype)  # a frozen language model may be held in another
        queries = self.query_tokens + self.summary_projection(self.summarize(text_states, attention_mask))[:, None]
        return self.qformer(
            query_embeds=queries,
            encoder_hidden_states=text_states,
            encoder_attention_mask=attention_mask,
        ).last_hidden_state


class ScMMGPTExpressionHead(nn.Module):
    """Gene states -> expression. Each gene has a bias of its own, so training starts from a mean profile if given one.

    `mse` reads log1p(CP10k) off scGPT's expression decoder; `nb` and `zinb` predict a gene's rate per 10k counts, its
    dispersion and (`zinb`) the logit of an extra zero. scGPT's MVC decoder, which reads the cell embedding in place of
    the gene's state, adds to the prediction.
    """

    def __init__(self, config: ScMMGPTConfig):
        super().__init__()
        self.kind = config.expression_head
        self.gene_bias = nn.Embedding(config.cell_config.vocab_size, 1)
        if self.kind != "mse":
            self.projection = nn.Linear(config.cell_config.hidden_size, {"nb": 2, "zinb": 3}[self.kind])

    def forward(
        self,
        gene_states: torch.Tensor,
        gene_ids: torch.Tensor,
        from_cell: torch.Tensor,
        decoded: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Parameters of the expression distribution, each `(batch_size, num_genes)` in float32.

        Args:
            gene_states: `(batch_size, num_genes, cell width)`.
            gene_ids: `(batch_size, num_genes)`.
            from_cell: `(batch_size, num_genes)`, scGPT's MVC decoder on the cell embedding.
            decoded: `(batch_size, num_genes)`, scGPT's expression decoder on the same states (`mse` only).
        """
        bias = self.gene_bias(gene_ids).squeeze(-1).float() + from_cell.float()
        if self.kind == "mse":
            return {"expression": decoded.float() + bias}
        log_rate, log_dispersion, *dropout_logits = self.projection(gene_states).float().unbind(dim=-1)
        log_rate = (log_rate + bias).clamp(min=-MAX_LOG_RATE, max=MAX_LOG_RATE)
        parameters = {
            "expression": torch.log1p(log_rate.exp()),
            "rate": log_rate.exp(),  # counts per 10k of the NB part
            "dispersion": F.softplus(log_dispersion) + 1e-4,
        }
        if dropout_logits:
            parameters["dropout_logits"] = dropout_logits[0]
            kept = torch.sigmoid(-dropout_logits[0])
            parameters["expression"] = torch.log1p(parameters["rate"] * kept)
        return parameters

    def loss(
        self,
        parameters: dict[str, torch.Tensor],
        mask: torch.Tensor,
        target_expression: torch.Tensor | None,
        target_counts: torch.Tensor | None,
        library_size: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mean loss over the target genes: squared error of log1p(CP10k), or the counts' negative log-likelihood."""
        if self.kind == "mse":
            if target_expression is None:
                raise ValueError(
                    "The mse expression head is trained on `target_expression` (log1p CP10k); none given."
                )
            return masked_mean((parameters["expression"] - target_expression.float()).square(), mask)
        if target_counts is None or library_size is None:
            raise ValueError(
                f"The {self.kind} expression head is trained on `target_counts` and `library_size`; "
                "at least one is missing."
            )
        mean = parameters["rate"] * library_size.float()[:, None] / COUNTS_PER_10K
        nll = negative_binomial_nll(
            target_counts.float(), mean + 1e-8, parameters["dispersion"], parameters.get("dropout_logits")
        )
        return masked_mean(nll, mask)

    def sample(
        self, parameters: dict[str, torch.Tensor], library_size: torch.Tensor, seeds: list[int]
    ) -> torch.Tensor:
        """Counts, `(batch_size, num_genes)` int64; each row is drawn from its own seed, so no batch changes a cell."""
        mean = (parameters["rate"] * library_size[:, None] / COUNTS_PER_10K).cpu()
        dispersion = parameters["dispersion"].cpu()
        dropout = parameters.get("dropout_logits")
        dropout = None if dropout is None else torch.sigmoid(dropout).cpu()
        counts = torch.empty_like(mean)
        for row, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            gamma = torch._standard_gamma(dispersion[row], generator=generator)
            counts[row] = torch.poisson(gamma * mean[row] / dispersion[row], generator=generator)
            if dropout is not None:
                counts[row] *= torch.rand(dropout[row].shape, generator=generator) >= dropout[row]
        return counts.long().to(library_size.device)


# ---------------------------------------------------------------------------------------------------------------------
# The generative model
# ---------------------------------------------------------------------------------------------------------------------


class ScMMGPTModel(ScMMGPTBridgeModel):
    """The bridge, the headless language model and both projectors.

    Args:
        config: Sizes of the parts.
        language_model: The headless language model, which is taken over; by default a new one of `config.text_config`.
    """

    def __init__(self, config: ScMMGPTConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        width, text_width = config.qformer_config.hidden_size, config.text_config.hidden_size
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        self.language_projection = nn.Sequential(
            nn.Linear(width, config.projection_dim), nn.ReLU(), nn.Linear(config.projection_dim, text_width)
        )
        self.text_to_cell = ScMMGPTTextToCellProjector(config)
        self.expression_head = ScMMGPTExpressionHead(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_cell_tokens(
        self, gene_ids: torch.Tensor, expression: torch.Tensor, cell_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cells as the language model reads them: `(num_cells, num_query_tokens, text_config.hidden_size)`."""
        cell_states = self.encode_cells(gene_ids, expression, cell_attention_mask)
        return self.language_projection(self.query_cells(cell_states, cell_attention_mask) - self.query_means)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        gene_ids: torch.LongTensor | None = None,
        expression: torch.FloatTensor | None = None,
        cell_attention_mask: torch.LongTensor | None = None,
        target_gene_ids: torch.LongTensor | None = None,
        target_attention_mask: torch.LongTensor | None = None,
        target_rows: torch.LongTensor | None = None,
        target_expression: torch.FloatTensor | None = None,
        target_counts: torch.Tensor | None = None,
        library_size: torch.FloatTensor | None = None,
        **kwargs,
    ) -> ScMMGPTModelOutput:
        """See [`ScMMGPTForConditionalGeneration.forward`] for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        # step 1: cells take the place of their placeholders, in reading order
        cell_tokens = None
        if gene_ids is not None:
            cell_tokens = self.get_cell_tokens(gene_ids, expression, cell_attention_mask).to(inputs_embeds)
            placeholders = self.find_placeholders(input_ids, inputs_embeds)
            torch_compilable_check(
                placeholders.sum() * cell_tokens.shape[-1] == cell_tokens.numel(),
                lambda: (
                    f"The text has {int(placeholders.sum())} cell placeholder tokens, but {len(gene_ids)} cells x "
                    f"{self.config.num_query_tokens} tokens were given; let the processor expand `<cell>`."
                ),
            )
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], cell_tokens)

        # step 2: the language model reads text and cells alike
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

        # step 3: rows with target genes generate cells; a row is decoded once, however many cells it is to fit
        expression_loss = None
        if target_gene_ids is not None:
            if target_attention_mask is None:
                target_attention_mask = torch.ones_like(target_gene_ids)
            if target_rows is None:
                target_rows = torch.arange(len(target_gene_ids), device=target_gene_ids.device)
            rows = target_attention_mask.any(dim=1).nonzero(as_tuple=True)[0]
            if not len(rows):
                rows = rows.new_zeros(1)  # a fully masked row: a loss of 0 that still reaches every parameter (DDP)
            if attention_mask is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
            parameters = self.decode_cells(
                outputs.last_hidden_state[rows],
                attention_mask[rows],
                target_gene_ids[rows],
                target_attention_mask[rows],
            )
            decoded = torch.searchsorted(rows, target_rows).clamp(max=len(rows) - 1)
            expression_loss = self.expression_head.loss(
                {name: value[decoded] for name, value in parameters.items()},
                target_attention_mask[target_rows],
                target_expression,
                target_counts,
                library_size,
            )

        return ScMMGPTModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cell_hidden_states=cell_tokens,
            expression_loss=expression_loss,
        )

    def find_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """`(batch_size, sequence_length)` bool: where a `<cell>` token stands."""
        if input_ids is not None:
            return input_ids == self.config.cell_token_id
        token = torch.full((), self.config.cell_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def decode_cells(
        self,
        text_states: torch.Tensor,
        attention_mask: torch.Tensor,
        gene_ids: torch.Tensor,
        gene_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The expression distribution of the asked genes under a text; nothing of any target cell enters.

        Args:
            text_states: `(batch_size, sequence_length, text_config.hidden_size)`, the language model's last states.
            attention_mask: `(batch_size, sequence_length)`.
            gene_ids, gene_attention_mask: `(batch_size, num_genes)`.

        Returns:
            Parameters by name, each `(batch_size, num_genes)`: see [`ScMMGPTExpressionHead`].
        """
        condition_embeds = self.text_to_cell(text_states, attention_mask)
        outputs = self.cell_model(
            gene_ids=gene_ids,
            cell_attention_mask=gene_attention_mask,
            condition_embeds=condition_embeds,
            genes_attend_to="conditions",
        )
        gene_states = outputs.last_hidden_state[:, condition_embeds.shape[1] :]
        # Among a thousand genes a few condition tokens get little attention; the cell embedding reaches every gene.
        from_cell = self.cell_model.decode_mvc(outputs.pooler_output, gene_ids)
        decoded = self.cell_model.decode_expression(gene_states) if self.config.expression_head == "mse" else None
        return self.expression_head(gene_states, gene_ids, from_cell, decoded)


class ScMMGPTForConditionalGeneration(ScMMGPTPreTrainedModel, GenerationMixin):
    """scMMGPT as an ordinary causal language model that also reads cells (`generate`) and writes them
    (`generate_cells`).

    Args:
        config: Sizes of the parts.
        language_model: The causal language model, which is taken over; by default a new one of `config.text_config`.
    """

    def __init__(self, config: ScMMGPTConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        config.auto_map = dict(AUTO_MAP)
        if language_model is None:
            self.model = ScMMGPTModel(config)
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        else:
            for module in language_model.modules():
                module._is_hf_initialized = True  # else one put in by hand would be drawn anew
            self.model = ScMMGPTModel(config, language_model.base_model)
            self.lm_head = language_model.get_output_embeddings()
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()
        self.forbid_placeholders()

    def forbid_placeholders(self):
        """Keep the model from writing `<cell>`: there would be no cell behind it."""
        if self.generation_config is None:
            self.generation_config = GenerationConfig()
        self.generation_config.suppress_tokens = [self.config.cell_token_id]

    @classmethod
    def from_components(
        cls, alignment: ScMMGPTForCellTextAlignment, language_model: PreTrainedModel, **config_updates
    ) -> "ScMMGPTForConditionalGeneration":
        """Join a stage-1 model and a causal language model into a stage-2 model, weights and all.

        What neither brings (the two projectors and the expression head) is freshly initialised.

        Args:
            alignment: Trained stage-1 model. Its weights are copied; new parts take its dtype.
            language_model: Any `AutoModelForCausalLM` whose embeddings already have a row for `<cell>`. Its modules
                and configuration are taken over, not copied, on the device, in the dtype and quantised as they are:
                what trains the new model changes this one.
            config_updates: Fields of [`ScMMGPTConfig`], at least `cell_token_id`.

        Raises:
            ValueError: If a weight of either component has no place in the model, or the language model does more
                than multiply by its head, as Gemma 2, Granite and Cohere do.
        """
        if language_model.get_output_embeddings().bias is not None:
            raise ValueError("The head of the language model has a bias, for which scMMGPT has no place.")
        if not _has_plain_logits(language_model):
            raise ValueError(
                f"A {language_model.config.model_type!r} language model scales or caps what comes out of its head, "
                "for which scMMGPT has no place; Llama, Qwen2, Mistral or SmolLM2 do not."
            )
        values = alignment.config.to_dict()
        values.update(text_config=language_model.config.to_dict(), auto_map=dict(AUTO_MAP), architectures=None)
        values.update(config_updates)
        values["tie_word_embeddings"] = language_model.config.tie_word_embeddings
        values["profile_readout"] = False  # it serves annotation with a fine-tuned checkpoint; no query reads it
        config = alignment.config.__class__(**values)
        config.text_config = language_model.config  # itself: a new composite would reset how it attends
        with torch.device(language_model.device):
            model = cls._from_config(config, dtype=alignment.dtype, language_model=language_model)

        new_parts = ("language_model.", "language_projection.", "text_to_cell.", "expression_head.")
        weights = {k: v for k, v in alignment.state_dict().items() if not k.startswith("profile_readout.")}
        report = model.model.load_state_dict(weights, strict=False)
        missing = [key for key in report.missing_keys if not key.startswith(new_parts)]
        if missing or report.unexpected_keys:
            raise ValueError(
                f"The stage-1 model does not fit: missing {missing}, unexpected {report.unexpected_keys}."
            )
        if language_model.generation_config is not None:
            model.generation_config = GenerationConfig(
                eos_token_id=language_model.generation_config.eos_token_id,
                pad_token_id=language_model.generation_config.pad_token_id,
                bos_token_id=language_model.generation_config.bos_token_id,
            )
        model.forbid_placeholders()
        return model

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_cell_features(self, *args, **kwargs) -> torch.Tensor:
        """See [`ScMMGPTBridgeModel.get_cell_features`]."""
        return self.model.get_cell_features(*args, **kwargs)

    def get_text_features(self, *args, **kwargs) -> torch.Tensor:
        """See [`ScMMGPTBridgeModel.get_text_features`]."""
        return self.model.get_text_features(*args, **kwargs)

    def match(self, *args, **kwargs) -> torch.Tensor:
        """See [`ScMMGPTBridgeModel.match`]."""
        return self.model.match(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        gene_ids: torch.LongTensor | None = None,
        expression: torch.FloatTensor | None = None,
        cell_attention_mask: torch.LongTensor | None = None,
        target_gene_ids: torch.LongTensor | None = None,
        target_attention_mask: torch.LongTensor | None = None,
        target_rows: torch.LongTensor | None = None,
        target_expression: torch.FloatTensor | None = None,
        target_counts: torch.Tensor | None = None,
        library_size: torch.FloatTensor | None = None,
        **kwargs,
    ) -> ScMMGPTCausalLMOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, logits_to_keep: As in any
                causal language model of transformers. `labels` is -100 where no word is to be learned.
            gene_ids, expression, cell_attention_mask: `(num_cells, num_genes)`: all cells of the batch in reading
                order, each standing for `num_query_tokens` placeholders in `input_ids`.
            target_gene_ids, target_attention_mask: `(batch_size, num_genes)`: genes that row's text should generate. A
                row whose mask is all 0 generates none.
            target_rows (`torch.LongTensor` of shape `(num_targets,)`): The row whose text should generate each target
                cell. One text may have many cells to fit; it is read and decoded once. By default one cell per row.
            target_expression (`torch.FloatTensor` of shape `(num_targets, num_genes)`): log1p(CP10k) of its row's
                genes, for the `mse` head.
            target_counts (`torch.Tensor` of shape `(num_targets, num_genes)`): Raw counts, for `nb` and `zinb`.
            library_size (`torch.FloatTensor` of shape `(num_targets,)`): Total counts of the target cell.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            gene_ids=gene_ids,
            expression=expression,
            cell_attention_mask=cell_attention_mask,
            target_gene_ids=target_gene_ids,
            target_attention_mask=target_attention_mask,
            target_rows=target_rows,
            target_expression=target_expression,
            target_counts=target_counts,
            library_size=library_size,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])

        loss, language_loss = None, None
        if labels is not None:
            language_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            loss = self.config.language_weight * language_loss
        if outputs.expression_loss is not None:
            loss = (0 if loss is None else loss) + self.config.expression_weight * outputs.expression_loss

        return ScMMGPTCausalLMOutput(
            loss=loss,
            language_loss=language_loss,
            expression_loss=outputs.expression_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cell_hidden_states=outputs.cell_hidden_states,
        )

    @torch.no_grad()
    def generate_cells(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        target_gene_ids: torch.LongTensor,
        library_size: torch.Tensor | float | None = None,
        num_return_cells: int = 1,
        do_sample: bool = False,
        seed: int = 0,
        cell_ids: list[int] | None = None,
        **cell_inputs,
    ) -> CellGenerationOutput:
        """Generate cells from prompts; a prompt is read and decoded once, however many cells are drawn from it.

        Args:
            input_ids, attention_mask: `(batch_size, sequence_length)` prompts; left padding, as for `generate`.
            target_gene_ids: `(num_genes,)` or `(batch_size, num_genes)`: the genes to generate. What is predicted of
                one depends a little on which others are asked with it, since the conditions see them all.
            library_size: Total counts of a cell, one number or `(batch_size * num_return_cells,)`; needed to sample
                counts.
            num_return_cells: Cells of each prompt; those of one prompt follow each other.
            do_sample: Also draw counts (`nb` and `zinb` heads).
            seed, cell_ids: A cell's draw depends on `seed` and its id alone (by default its row number), so any batch
                gives the same cell.
            cell_inputs: `gene_ids`, `expression`, `cell_attention_mask` of cells that the prompts mention.

        Returns:
            [`CellGenerationOutput`] of `batch_size * num_return_cells` rows.

        Raises:
            ValueError: If counts are asked of the `mse` head or without a library size.
        """
        if target_gene_ids.dim() == 1:
            target_gene_ids = target_gene_ids.expand(len(input_ids), -1)
        if do_sample and self.config.expression_head == "mse":
            raise ValueError(
                "This checkpoint has the mse expression head, which predicts a mean and cannot be sampled; "
                "use do_sample=False or a checkpoint with expression_head='nb'."
            )
        if do_sample and library_size is None:
            raise ValueError("do_sample=True draws counts, which needs `library_size`, the total counts of a cell.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)  # as `generate` numbers left padding
        text_states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **cell_inputs,
        ).last_hidden_state
        parameters = self.model.decode_cells(text_states, attention_mask, target_gene_ids)
        parameters = {name: value.repeat_interleave(num_return_cells, dim=0) for name, value in parameters.items()}
        counts = None
        if do_sample:
            n_cells = len(input_ids) * num_return_cells
            library_size = torch.as_tensor(library_size, dtype=torch.float32, device=input_ids.device)
            seeds = [hash_seed(seed, cell_id) for cell_id in (cell_ids or range(n_cells))]
            counts = self.model.expression_head.sample(parameters, library_size.expand(n_cells), seeds)
        return CellGenerationOutput(expression=parameters["expression"].clamp(min=0), counts=counts)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        gene_ids=None,
        expression=None,
        cell_attention_mask=None,
        **kwargs,
    ):
        """Cells are read once, with the prompt; afterwards they live in the cache."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs.update(gene_ids=gene_ids, expression=expression, cell_attention_mask=cell_attention_mask)
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat samples for beams. A sample's cells repeat as a block: A B A B, not A A B B."""
        cells = {name: model_kwargs.pop(name) for name in CELL_INPUTS if model_kwargs.get(name) is not None}
        if cells and expand_size > 1 and input_ids is not None:
            placeholders = (input_ids == self.config.cell_token_id).sum(dim=1)
            cells_per_row = (placeholders // self.config.num_query_tokens).tolist()
            blocks = torch.arange(len(cells["gene_ids"]), device=input_ids.device).split(cells_per_row)
            order = torch.cat([block.repeat(expand_size) for block in blocks])
            cells = {name: value[order] for name, value in cells.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **cells}


@torch.no_grad()
def _has_plain_logits(language_model: PreTrainedModel) -> bool:
    """Whether logits are what the head makes of the last states; tried on a few tokens."""
    if language_model.device.type == "meta":
        return True
    was_training = language_model.training
    language_model.eval()
    tokens = torch.arange(4, device=language_model.device)[None]  # one alone might be padding, whose logits are 0
    states = language_model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    expected = language_model.get_output_embeddings()(states).float()
    logits = language_model(input_ids=tokens, use_cache=False).logits.float()
    language_model.train(was_training)
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def hash_seed(seed: int, cell_id: int) -> int:
    """A 63-bit seed from two integers (splitmix64's mixing constants), well spread for neighbouring ids."""
    value = (int(seed) * 0x9E3779B97F4A7C15 + int(cell_id)) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1


ScMMGPTForCellTextAlignment.register_for_auto_class("AutoModel")
ScMMGPTForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "AlignmentOutput",
    "CellGenerationOutput",
    "ScMMGPTCausalLMOutput",
    "ScMMGPTForCellTextAlignment",
    "ScMMGPTForConditionalGeneration",
    "ScMMGPTModel",
    "ScMMGPTModelOutput",
    "ScMMGPTPreTrainedModel",
    "cell_text_similarity",
    "contrastive_loss",
    "negative_binomial_nll",
    "sample_hard_negatives",
]
