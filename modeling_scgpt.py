"""scGPT, the cell language model: genes and their expression in, a state per gene and an embedding per cell out.

A cell is a set of tokens: `<cls>` first, then its expressed genes in any order. A token is the sum of a gene embedding
and an encoding of the gene's expression value (a bin, as in scGPT, or whatever the checkpoint was trained on). Tokens
pass through post-norm transformer layers without positions. Two decoders predict expression: one from a gene's own
state, the other (MVC, "masked value for cell") from the cell embedding and a query made of the gene.

`python -m scmmgpt.train convert scgpt` converts the weights of the published scGPT; the outputs are equal to float32
rounding. Training differs in one default: scGPT drops attention weights with probability 0.2, and
`ScGPTConfig.attention_dropout` is 0. Set it to 0.2 to train exactly as scGPT did.

The encoder never computes on padding. Its default path (`attn_implementation="sdpa"`) packs the real tokens of a
batch into one row; see `Packing`. Any other attention implementation of transformers works on the padded batch.

Shapes in comments: B cells of a batch, G genes of the padded batch (`<cls>` among them), K condition tokens in front
of the genes, L = K + G tokens, N tokens of a packed row, C cells of a packed row, D `hidden_size`, H heads.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_scmmgpt import ScGPTConfig


varlen_attn: Any = None  # PyTorch before 2.10 lacks it
with suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn


IGNORED_LABEL = -100  # a label that enters no loss
CPU_PIECE_BYTES = 5_000_000  # of states that run through all layers at once: 10 % faster than the batch


@dataclass
class ScGPTModelOutput(ModelOutput):
    """Output of [`ScGPTModel`].

    Args:
        loss: `expression_loss + mvc_loss`, if `expression_labels` were given.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_conditions + num_genes, hidden_size)`):
            The state of each token; zero where `cell_attention_mask` is 0. Only position 0 with `cls_only=True`.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): The cell embedding: the state at
            position 0, not normalised (scGPT divides it by its length where it compares cells).
        predicted_expression, mvc_expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): Predictions of
            the expression decoder and the MVC decoder in the unit of `expression_labels`, if these were given.
        expression_loss, mvc_loss: The two parts of the loss.
        hidden_states (`tuple[torch.FloatTensor]`): With `output_hidden_states=True`, the embeddings and the states
            after every layer, each shaped and padded like `last_hidden_state`, which is the last of them.
        attentions (`tuple[torch.FloatTensor]`): With `output_attentions=True`, every layer's attention weights,
            `(batch_size, num_attention_heads, length, length)`.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    predicted_expression: Tensor | None = None
    mvc_expression: Tensor | None = None
    expression_loss: Tensor | None = None
    mvc_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def masked_expression_loss(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over the positions that have a label; 0 if there is none.

    Both are `(batch_size, num_genes)`. A label is -100 where nothing is to be predicted: padding, `<cls>`, and genes
    whose value is an input.
    """
    has_label = labels != IGNORED_LABEL
    error = (predicted.float() - labels.float()).masked_fill(~has_label, 0.0)
    return error.square().sum() / has_label.sum().clamp(min=1)


@dataclass
class Segments:
    """Cells that lie one after another in a row of tokens."""

    lengths: list[int]  # tokens of each cell, ascending
    ends: Tensor  # (C + 1,) int32: 0, then where each cell ends

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Segments":
        """Segments of cells of these lengths."""
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))


@dataclass
class Packing:
    """Positions of the real tokens of a padded batch once they are packed into one row, cell after cell.

    Every layer but attention treats each token alone, and runs on the packed row. Attention runs within each cell.
    Cells are packed in order of length: those of equal length are neighbours and share one kernel call. In inference
    on a CPU the row is cut into pieces that stay in the cache.

    Attributes:
        shape: Batch size and length of the padded batch.
        index (`torch.LongTensor` of shape `(num_tokens,)`): Position of each packed token in the flattened padded
            batch; None if the batch has no padding, and packing is only a change of shape.
        rows (`torch.LongTensor` of shape `(num_cells,)`): Which cell of the batch each packed cell is. Cells without
            tokens are left out.
        pieces: The packed cells, piece by piece.
    """

    shape: tuple[int, int]
    index: Tensor | None
    rows: Tensor
    pieces: list[Segments]

    @classmethod
    def of(cls, inputs_embeds: Tensor, attention_mask: Tensor | None) -> "Packing":
        """Plan the packing of `inputs_embeds` (batch_size, length, hidden_size) under a 0/1 mask of its tokens."""
        batch_size, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        index, rows, lengths = None, torch.arange(batch_size, device=device), [length] * batch_size
        if attention_mask is not None:
            sizes, rows = attention_mask.bool().sum(dim=1).sort(stable=True)
            lengths = sizes.tolist()  # here and for the index, the host waits for the device
            if lengths and lengths[0] < length:
                n_empty = lengths.count(0)
                rows, lengths = rows[n_empty:], lengths[n_empty:]
                cells, positions = attention_mask[rows].nonzero(as_tuple=True)
                index = rows[cells] * length + positions
        cut = device.type == "cpu" and not torch.is_grad_enabled()
        most = CPU_PIECE_BYTES // (inputs_embeds.shape[2] * inputs_embeds.element_size())  # tokens
        pieces: list[list[int]] = []
        for size in lengths:
            if not pieces or (cut and sum(pieces[-1]) + size > most):
                pieces.append([])
            pieces[-1].append(size)
        return cls((batch_size, length), index, rows, [Segments.of(piece, device) for piece in pieces])

    def pack(self, padded: Tensor) -> list[Tensor]:
        """(batch_size, length, hidden_size) -> (num_tokens, hidden_size) of each piece."""
        tokens = padded.flatten(0, 1)
        tokens = tokens if self.index is None else tokens[self.index]
        return list(tokens.split([sum(piece.lengths) for piece in self.pieces]))

    def unpack(self, packed: list[Tensor]) -> Tensor:
        """(num_tokens, hidden_size) of each piece -> (batch_size, length, hidden_size), zero where no token is."""
        tokens = torch.cat(packed)
        if self.index is not None:
            empty = tokens.new_zeros(self.shape[0] * self.shape[1], tokens.shape[-1])
            tokens = empty.index_copy(0, self.index, tokens)
        return tokens.unflatten(0, self.shape)

    def unpack_first(self, packed: list[Tensor]) -> Tensor:
        """(num_cells, hidden_size) of each piece -> (batch_size, 1, hidden_size), zero for cells without tokens."""
        tokens = torch.cat(packed)
        return tokens.new_zeros(self.shape[0], tokens.shape[-1]).index_copy(0, self.rows, tokens).unsqueeze(1)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    num_conditions: int | None = None,
) -> Tensor:
    """Attention within each cell of a packed row, without a mask, by the fastest means of the device.

    In half precision on CUDA, one variable-length kernel computes all cells. Elsewhere, each run of cells of equal
    length is one call of the fused `scaled_dot_product_attention`.

    `key` and `value` are `(num_tokens, num_heads, head_dim)`. `query` and the result have the same shape, or only the
    first token of each cell, `(num_cells, num_heads, head_dim)`. `scaling` is the factor of the scores, `dropout` the
    probability of dropping an attention weight. For `num_conditions` see [`attention_by_conditions`].
    """
    first_only = len(query) == len(segments.lengths)
    whole = num_conditions is None
    if whole and _has_varlen_kernel(query) and dropout == 0:
        longest = segments.lengths[-1]
        query_ends, longest_query = segments.ends, longest
        if first_only:
            query_ends, longest_query = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device), 1
        return varlen_attn(query, key, value, query_ends, segments.ends, longest_query, longest, scale=scaling)
    # Runs of cells of equal length are views of (num_cells, length, num_heads, head_dim): cells are neighbours.
    runs = [(length, len(list(cells))) for length, cells in groupby(segments.lengths)]
    key_sizes = [length * num_cells for length, num_cells in runs]
    query_sizes = [num_cells for _, num_cells in runs] if first_only else key_sizes
    states_by_run = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), strict=True)
    outputs = []
    for (_, num_cells), states in zip(runs, states_by_run, strict=True):
        # (num_cells * length, H, D / H) -> (num_cells, H, length, D / H)
        q, k, v = (state.unflatten(0, (num_cells, -1)).transpose(1, 2) for state in states)
        if num_conditions is None:
            output = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        else:
            output = attention_by_conditions(q, k, v, num_conditions, scaling, dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def attention_by_conditions(
    query: Tensor, key: Tensor, value: Tensor, num_conditions: int, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Attention in which conditions attend to all tokens, and a gene to the conditions and itself.

    Genes exchange information through the conditions. The cost is linear in the number of genes, not quadratic.
    `query`, `key` and `value` are `(num_cells, num_heads, num_conditions + num_genes, head_dim)`, conditions first and
    without padding; the result has the same shape.
    """
    conditions, genes = query[:, :, :num_conditions], query[:, :, num_conditions:]
    (condition_keys, own_keys), (condition_values, own_values) = (
        (states[:, :, :num_conditions], states[:, :, num_conditions:]) for states in (key, value)
    )
    attend = nn.functional.scaled_dot_product_attention
    of_conditions = attend(conditions, key, value, dropout_p=dropout, scale=scaling)  # (B, H, K, D / H)
    own_scores = (genes * own_keys).sum(dim=-1, keepdim=True)  # (B, H, G, 1)
    scores = torch.cat([torch.matmul(genes, condition_keys.transpose(-1, -2)), own_scores], dim=-1) * scaling
    # (B, H, G, K + 1): every condition, and last the gene itself
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout).to(value.dtype)
    of_genes = torch.matmul(weights[..., :-1], condition_values) + weights[..., -1:] * own_values
    return torch.cat([of_conditions, of_genes], dim=2)


def _has_varlen_kernel(query: Tensor) -> bool:
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention on heads of the padded batch: the reference, and the only path that returns weights."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (B, H, L, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def check_attentions(output_attentions: bool | None, config: Any) -> None:
    """Refuse to return attention weights where the kernels of `config._attn_implementation` have none."""
    implementation = config._attn_implementation
    if output_attentions and implementation != "eager":
        raise ValueError(
            f"output_attentions is True, but attn_implementation={implementation!r} runs fused kernels, which "
            "return no attention weights; call model.set_attn_implementation('eager') first."
        )


class ScGPTValueLinear(nn.Linear):
    """A linear layer of the value encoder, with scGPT's random initial biases.

    With zero biases the ReLU would be scale-free, and the LayerNorm after it would erase the value.
    """


class ScGPTValueEncoder(nn.Module):
    """Encodes an expression value: a scalar through a two-layer perceptron and a LayerNorm."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.max_value = config.max_value
        self.linear1 = ScGPTValueLinear(1, config.hidden_size)
        self.linear2 = ScGPTValueLinear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, expression: Tensor) -> Tensor:
        """(batch_size, num_genes) -> (batch_size, num_genes, hidden_size)."""
        values = expression.clamp(max=self.max_value).to(self.linear1.weight.dtype)
        hidden_states = self.linear2(nn.functional.relu(self.linear1(values.unsqueeze(-1))))
        return self.dropout(self.norm(hidden_states))


class ScGPTEmbeddings(nn.Module):
    """A token: the gene's embedding, plus the encoding of its value if known, plus the flag of genes to generate."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.gene_embedding: nn.Module = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.gene_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.value_encoder = ScGPTValueEncoder(config)
        self.flag_embedding = nn.Embedding(2, config.hidden_size) if config.use_flag_embedding else None

    def embed_genes(self, gene_ids: Tensor) -> Tensor:
        """(batch_size, num_genes) -> (batch_size, num_genes, hidden_size), without values."""
        return self.gene_norm(self.gene_embedding(gene_ids))

    def forward(
        self, gene_ids: Tensor, expression: Tensor | None = None, generation_mask: Tensor | None = None
    ) -> Tensor:
        """(batch_size, num_genes) each -> (batch_size, num_genes, hidden_size)."""
        embeddings = self.embed_genes(gene_ids)  # (B, G, D)
        values = None if expression is None else self.value_encoder(expression)  # (B, G, D)
        if generation_mask is not None:
            # A gene to be generated has no value: scGPT puts the flag in its place, if the model has one.
            shown = (generation_mask == 0).unsqueeze(-1)  # (B, G, 1)
            values = torch.zeros_like(embeddings) if values is None else values * shown
            if self.flag_embedding is not None:
                values = values + self.flag_embedding(torch.ones_like(gene_ids[:1, :1])) * ~shown
        return embeddings if values is None else embeddings + values


class ScGPTAttention(nn.Module):
    """Multi-head self-attention within a cell, without positions and without a causal mask."""

    is_causal = False

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        queries: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        segments: Segments | None = None,
        num_conditions: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention from `queries` to `hidden_states`, which are the same tokens or more, and the eager weights."""
        # (N, D) packed or (B, L, D) padded -> heads: (N, H, D / H) or (B, L, H, D / H)
        query = self.q_proj(queries).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if segments is not None:
            output = packed_attention(query, key, value, segments, self.scaling, dropout, num_conditions)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            heads_first = (states.transpose(1, 2) for states in (query, key, value))
            output, weights = attend(self, *heads_first, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.out_proj(output.flatten(-2)), weights


class ScGPTLayer(GradientCheckpointingLayer):
    """A post-norm transformer layer with a ReLU feed-forward.

    Tokens are `(batch_size, length, hidden_size)` with an `attention_mask`, or packed, `(num_tokens, hidden_size)`,
    with `segments`. Two arguments are for packed tokens alone: with `first_only` the result holds only the first token
    of each cell, and `num_conditions` is that of [`attention_by_conditions`].
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.attention = ScGPTAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        segments: Segments | None = None,
        first_only: bool = False,
        num_conditions: int | None = None,
    ) -> Tensor:
        """Tokens in, tokens out."""
        queries = hidden_states  # (N, D) packed or (B, L, D) padded
        if first_only and segments is not None:
            queries = hidden_states[segments.ends[:-1]]  # (C, D)
        attended, _ = self.attention(queries, hidden_states, attention_mask, segments, num_conditions)
        queries = self.attention_norm(queries + self.dropout(attended))
        transformed = self.linear2(self.dropout(nn.functional.relu(self.linear1(queries))))
        return self.output_norm(queries + self.dropout(transformed))


def _visibility(generation_mask: Tensor | None, num_conditions: int | None) -> Callable | None:
    """Mask function of the padded batch: which tokens attend to which. None where all attend to all."""
    if num_conditions is not None:  # as in `attention_by_conditions`
        return lambda batch, head, query, key: (query < num_conditions) | (key < num_conditions) | (query == key)
    if generation_mask is not None:  # to itself and to the genes that are not to be generated
        return lambda batch, head, query, key: (generation_mask[batch, key] == 0) | (query == key)
    return None


class ScGPTEncoder(nn.Module):
    """The stack of layers, on the packed batch or, for attention implementations other than SDPA, the padded one."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(ScGPTLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        generation_mask: Tensor | None = None,
        cls_only: bool = False,
        num_conditions: int | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """Encode tokens (batch_size, length, hidden_size); for `num_conditions` see [`attention_by_conditions`].

        Returns:
            The states after the last layer, of the same shape, or length 1 with `cls_only`. Before them, with
            `output_hidden_states`, `inputs_embeds` and the states after every other layer.
        """
        # A compiled graph must not depend on the lengths of the cells, and packing does.
        can_pack = generation_mask is None and not torch.compiler.is_compiling()
        if can_pack and self.config._attn_implementation == "sdpa":
            return self._forward_packed(inputs_embeds, attention_mask, cls_only, num_conditions, output_hidden_states)
        visible = _visibility(generation_mask, num_conditions)
        if visible is not None and "flash" in self.config._attn_implementation:
            # transformers ignores a mask function there, without a warning.
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} lets genes see all others, also those to "
                "be generated; generate with 'sdpa' or 'eager'."
            )
        layer_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, and_mask_function=visible
        )
        states = [inputs_embeds]
        for layer in self.layers:
            states = [*(states if output_hidden_states else ()), layer(states[-1], layer_mask)]
        if attention_mask is not None:
            states = [state.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0) for state in states]
        return (*states[:-1], states[-1][:, :1] if cls_only else states[-1])

    def _forward_packed(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cls_only: bool,
        num_conditions: int | None,
        output_hidden_states: bool,
    ) -> tuple[Tensor, ...]:
        packing = Packing.of(inputs_embeds, attention_mask)
        inner: list[list[Tensor]] = [[] for _ in self.layers] if output_hidden_states else []
        if not packing.pieces:  # no cell has a token
            empty = inputs_embeds * 0
            return (*[empty] * len(inner), empty[:, :1] if cls_only else empty)
        outputs = []
        for hidden_states, segments in zip(packing.pack(inputs_embeds), packing.pieces, strict=True):
            for depth, layer in enumerate(self.layers):
                if output_hidden_states:
                    inner[depth].append(hidden_states)
                # For the embedding alone, the last layer needs every token's key and value, but one query a cell.
                first_only = cls_only and depth == len(self.layers) - 1
                hidden_states = layer(hidden_states, None, segments, first_only, num_conditions)
            outputs.append(hidden_states)
        return (*map(packing.unpack, inner), packing.unpack_first(outputs) if cls_only else packing.unpack(outputs))


class ScGPTExpressionDecoder(nn.Module):
    """Predicts a gene's expression from the gene's state."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch_size, num_genes, hidden_size) -> (batch_size, num_genes)."""
        hidden_states = nn.functional.leaky_relu(self.linear1(hidden_states))
        hidden_states = nn.functional.leaky_relu(self.linear2(hidden_states))
        return self.output_proj(hidden_states).squeeze(-1)


class ScGPTMVCDecoder(nn.Module):
    """Predicts a gene's expression from the cell embedding: the inner product with a query made of the gene."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, cell_embeds: Tensor, gene_embeds: Tensor) -> Tensor:
        """(batch_size, hidden_size), (batch_size, num_genes, hidden_size) -> (batch_size, num_genes)."""
        queries = self.query_proj(gene_embeds).sigmoid()
        # LoRA or quantised, a layer is more than its weight; offloaded, it has its weight only while it runs.
        if type(self.output_proj) is not nn.Linear or self.output_proj.weight.is_meta:
            return torch.matmul(self.output_proj(queries), cell_embeds.unsqueeze(-1)).squeeze(-1)
        # (W q) . c = q . (W' c): one product a cell in place of one a gene.
        projected = torch.matmul(cell_embeds.to(queries.dtype), self.output_proj.weight)  # (B, D)
        return torch.matmul(queries, projected.unsqueeze(-1).to(queries.dtype)).squeeze(-1)


def follow_umask(folder: str | os.PathLike) -> None:
    """Give saved weights the permissions of other new files.

    Safetensors writes through a temporary file that only the owner may read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        if path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)


class ScGPTPreTrainedModel(PreTrainedModel):
    """Initialisation and loading of scGPT."""

    config: ScGPTConfig
    config_class = ScGPTConfig
    base_model_prefix = "cell_model"
    _input_embed_layer = "gene_embedding"
    main_input_name = "gene_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScGPTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"attentions": ScGPTAttention}
    accepts_loss_kwargs = False  # losses are means of the batch, which `Trainer` then divides by accumulation steps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules that own parameters, and skips the containers of remote-code models.
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.embedding_range, self.config.embedding_range)
        elif isinstance(module, ScGPTValueLinear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the weights get the permissions of other new files."""
        super().save_pretrained(save_directory, *args, **kwargs)
        follow_umask(save_directory)


class ScGPTModel(ScGPTPreTrainedModel):
    """scGPT: gene tokens with expression values -> a state per gene, an embedding per cell, and predicted expression.

    For embeddings alone, pass `cls_only=True`. On a CPU that computes in bfloat16, `model.to(torch.bfloat16)` is twice
    as fast, with a cosine of 0.9999 to float32. On other CPUs bfloat16 is many times slower; [`cpu_dtype`] chooses.

    Args:
        config: Sizes and settings.
        add_decoders: Whether the model predicts expression, and so has the two decoders.

    >>> model = ScGPTModel(ScGPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...     intermediate_size=16, pad_token_id=0, cls_token_id=1)).eval()
    >>> gene_ids = torch.tensor([[1, 7, 9], [1, 8, 0]])  # <cls> first, <pad> last
    >>> expression = torch.tensor([[-2.0, 3.0, 50.0], [-2.0, 1.0, -2.0]])
    >>> outputs = model(gene_ids, expression, cell_attention_mask=(gene_ids != 0).long())
    >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape
    (torch.Size([2, 3, 16]), torch.Size([2, 16]))
    """

    def __init__(self, config: ScGPTConfig, add_decoders: bool = True) -> None:
        super().__init__(config)
        self.embeddings = ScGPTEmbeddings(config)
        self.encoder = ScGPTEncoder(config)
        if add_decoders:
            self.expression_decoder = ScGPTExpressionDecoder(config)
            self.mvc_decoder = ScGPTMVCDecoder(config)
        else:
            self.embeddings.flag_embedding = None  # of genes to be decoded
        self.post_init()

    @capture_outputs
    def forward(
        self,
        gene_ids: Tensor,
        expression: Tensor | None = None,
        cell_attention_mask: Tensor | None = None,
        condition_embeds: Tensor | None = None,
        generation_mask: Tensor | None = None,
        cls_only: bool = False,
        expression_labels: Tensor | None = None,
        genes_attend_to: str = "all",
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ScGPTModelOutput:
        """Encode a batch of cells. Row i of a batch equals row i alone, to rounding.

        Args:
            gene_ids (`torch.LongTensor` of shape `(batch_size, num_genes)`): Ids in the gene vocabulary. Position 0 is
                `<cls>`, unless `condition_embeds` stand in its place.
            expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): Value of each gene, in the unit that
                the checkpoint was trained on (scGPT: bins 0..50, -2 at `<cls>`). None if it is to be generated from
                `condition_embeds`.
            cell_attention_mask: `(batch_size, num_genes)`, 1 for a token, 0 for padding, which stands on the right.
            condition_embeds (`torch.FloatTensor` of shape `(batch_size, num_conditions, hidden_size)`): Tokens put in
                front of the genes, such as a cell embedding or the projection of a text.
            generation_mask: `(batch_size, num_genes)`, 1 for a gene to be generated from the others, as in scGPT's
                generative pre-training: its value is not used, and no other token attends to it.
            cls_only: Compute the cell embedding alone: one query per cell in the last layer.
            expression_labels (`torch.FloatTensor` of shape `(batch_size, num_genes)`): True expression where it is to
                be predicted, -100 elsewhere. Adds both decoders' predictions and losses to the output.
            genes_attend_to: `"all"`, or `"conditions"`: a gene attends to the conditions and to itself alone, as the
                hidden genes of scGPT's generative pre-training attend to the shown genes. Conditions attend to all.
                The cost grows with the number of genes, not with its square.
            output_hidden_states, output_attentions: Whether to return `hidden_states` and `attentions`; by default as
                in the configuration. Attentions need `attn_implementation="eager"`.
        """
        if genes_attend_to not in ("all", "conditions"):
            raise ValueError(f"genes_attend_to is {genes_attend_to!r}; choose 'all' or 'conditions'.")
        if genes_attend_to == "conditions" and (condition_embeds is None or generation_mask is not None or cls_only):
            raise ValueError(
                "genes_attend_to='conditions' needs condition_embeds, and neither generation_mask nor cls_only."
            )
        if expression is None and condition_embeds is None:
            raise ValueError("expression is None; pass the genes' values, or condition_embeds to generate them from.")
        if cls_only and expression_labels is not None:
            raise ValueError("cls_only=True computes no gene states, but expression_labels need them; pass one only.")
        check_attentions(
            self.config.output_attentions if output_attentions is None else output_attentions, self.config
        )
        inputs_embeds = self.embeddings(gene_ids, expression, generation_mask)  # (B, G, D)
        num_conditions = 0
        if condition_embeds is not None:
            num_conditions = condition_embeds.shape[1]
            inputs_embeds = torch.cat([condition_embeds.to(inputs_embeds.dtype), inputs_embeds], dim=1)  # (B, L, D)
            if cell_attention_mask is not None:
                cell_attention_mask = nn.functional.pad(cell_attention_mask, (num_conditions, 0), value=1)
            if generation_mask is not None:
                generation_mask = nn.functional.pad(generation_mask, (num_conditions, 0), value=0)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        attended = num_conditions if genes_attend_to == "conditions" else None
        states = self.encoder(
            inputs_embeds, cell_attention_mask, generation_mask, cls_only, attended, output_hidden_states
        )
        hidden_states = states[-1]  # (B, L, D), or (B, 1, D) with `cls_only`
        fields: dict[str, Any] = {"last_hidden_state": hidden_states, "pooler_output": hidden_states[:, 0]}
        if output_hidden_states:
            fields["hidden_states"] = states
        if expression_labels is not None:
            predicted = self.decode_expression(hidden_states[:, num_conditions:])  # (B, G)
            from_cell = self.decode_mvc(hidden_states[:, 0], gene_ids)  # (B, G)
            expression_loss = masked_expression_loss(predicted, expression_labels)
            mvc_loss = masked_expression_loss(from_cell, expression_labels)
            fields |= {"predicted_expression": predicted, "mvc_expression": from_cell}
            fields |= {"expression_loss": expression_loss, "mvc_loss": mvc_loss}
            fields["loss"] = expression_loss + mvc_loss
        return ScGPTModelOutput(**fields)  # all at once: a compiled graph loses fields that are set later

    def decode_expression(self, hidden_states: Tensor) -> Tensor:
        """Expression from gene states: (batch_size, num_genes, hidden_size) -> (batch_size, num_genes)."""
        return self.expression_decoder(hidden_states)

    def decode_mvc(self, cell_embeds: Tensor, gene_ids: Tensor) -> Tensor:
        """Expression of `gene_ids` (batch_size, num_genes) from cell embeddings (batch_size, hidden_size) alone."""
        return self.mvc_decoder(cell_embeds, self.embeddings.embed_genes(gene_ids))

    def generate_expression(
        self,
        gene_ids: Tensor,
        cell_embeds: Tensor,
        cell_attention_mask: Tensor | None = None,
        expression: Tensor | None = None,
    ) -> Tensor:
        """Expression of every gene of a cell given its embedding, in one pass: scGPT's `generate`.

        `cell_embeds`, `(batch_size, hidden_size)`, stand at position 0. The other inputs are those of `forward`, and
        `expression` the known values, if any; their position 0 is not used. The result is `(batch_size, num_genes)`,
        without a meaning at position 0.
        """
        outputs = self(
            gene_ids[:, 1:],
            expression=None if expression is None else expression[:, 1:],
            cell_attention_mask=None if cell_attention_mask is None else cell_attention_mask[:, 1:],
            condition_embeds=cell_embeds.unsqueeze(1),
            return_dict=True,
        )
        return self.decode_expression(outputs.last_hidden_state)


@dataclass
class ScGPTPreTrainingOutput(ModelOutput):
    """Output of [`ScGPTForPreTraining`].

    Args:
        loss: The sum of the losses of the objectives.
        logits (`torch.FloatTensor` of shape `(batch_size, num_genes)`): Each gene's expression, as predicted from the
            shown genes by the expression decoder, in the unit of `expression`; of `"masked"`, if it is an objective.
        masked_loss, gene_prompt_loss, cell_prompt_loss: The loss of each objective; None if it is not used.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    masked_loss: Tensor | None = None
    gene_prompt_loss: Tensor | None = None
    cell_prompt_loss: Tensor | None = None


class ScGPTForPreTraining(ScGPTPreTrainedModel):
    """scGPT with its pre-training objectives, three ways to predict the values of hidden genes.

    - `masked`: `config.mask_value` replaces the hidden values; all tokens attend to each other.
    - `gene_prompt`: a hidden gene carries no value and attends to the shown genes and to itself.
    - `cell_prompt`: no gene carries a value. The cell embedding of a pass above, detached, stands in the place of
      `<cls>`, as in [`~ScGPTModel.generate_expression`].

    The first two train both decoders, the last the expression decoder. `ScGPTModel.from_pretrained` loads checkpoints
    of this class, and `AutoModelForMaskedLM` gives it.

    Args:
        config: Of the cell model; `use_flag_embedding` marks the genes of `gene_prompt`.
        objectives: Which of the three.
    """

    OBJECTIVES = ("masked", "gene_prompt", "cell_prompt")

    def __init__(self, config: ScGPTConfig, objectives: tuple[str, ...] = OBJECTIVES) -> None:
        super().__init__(config)
        if not set(objectives) <= set(self.OBJECTIVES) or not set(objectives) - {"cell_prompt"}:
            raise ValueError(
                f"objectives are {tuple(objectives)}; choose from {self.OBJECTIVES}. 'cell_prompt' needs another "
                "objective beside it, whose pass gives the cell embedding."
            )
        self.objectives = tuple(objectives)
        self.cell_model = ScGPTModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        cell_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ScGPTPreTrainingOutput:
        """Losses of a batch.

        Args:
            gene_ids, cell_attention_mask: `(batch_size, num_genes)`, as in [`ScGPTModel`].
            expression: `(batch_size, num_genes)` values; those with a label are not read.
            labels (`torch.FloatTensor` of shape `(batch_size, num_genes)`): The true value of each hidden gene, and
                -100 elsewhere, so at `<cls>` and at padding. [`ScGPTProcessor`] makes them. Without labels there is no
                loss, and nothing is hidden.
        """
        hidden = torch.zeros_like(expression, dtype=torch.bool) if labels is None else labels != IGNORED_LABEL
        inputs = {"cell_attention_mask": cell_attention_mask, "return_dict": True}
        inputs["expression_labels"] = torch.full_like(expression, IGNORED_LABEL) if labels is None else labels
        passes: list[Any] = []
        losses: dict[str, Tensor] = {}
        if "masked" in self.objectives:
            shown = expression.masked_fill(hidden, self.config.mask_value)
            passes.append(self.cell_model(gene_ids, shown, **inputs))
            losses["masked_loss"] = passes[-1].loss
        if "gene_prompt" in self.objectives:
            passes.append(self.cell_model(gene_ids, expression, generation_mask=hidden, **inputs))
            losses["gene_prompt_loss"] = passes[-1].loss
        logits = passes[0].predicted_expression
        if labels is None:
            return ScGPTPreTrainingOutput(logits=logits)
        if "cell_prompt" in self.objectives:
            prompt = passes[-1].pooler_output.detach()
            generated = self.cell_model.generate_expression(gene_ids, prompt, cell_attention_mask)
            losses["cell_prompt_loss"] = masked_expression_loss(generated, labels)
        return ScGPTPreTrainingOutput(loss=torch.stack(list(losses.values())).sum(), logits=logits, **losses)


class ScGPTClassificationHead(nn.Module):
    """scGPT's classifier of cells: two layers of linear, ReLU and LayerNorm, and a linear layer, on the embedding."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear1, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.linear2, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_proj = nn.Linear(width, cast(int, config.num_labels))

    def forward(self, cell_embeds: Tensor) -> Tensor:
        """(batch_size, hidden_size) -> (batch_size, num_labels)."""
        cell_embeds = self.norm1(nn.functional.relu(self.linear1(cell_embeds)))
        cell_embeds = self.norm2(nn.functional.relu(self.linear2(cell_embeds)))
        return self.output_proj(cell_embeds)


class ScGPTForSequenceClassification(ScGPTPreTrainedModel):
    """scGPT with a classifier of cells, such as their types: `AutoModelForSequenceClassification`.

    A checkpoint of [`ScGPTModel`] loads with a new classifier for `num_labels` or `id2label`. `config.problem_type` is
    that of transformers: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`, and
    follows from the labels if it is None. The decoders of expression are left out. scGPT's published recipe trains all
    weights for 10 epochs at a learning rate of 1e-4, which shrinks by a tenth after each, on batches of 32 cells.

    >>> model = ScGPTForSequenceClassification(ScGPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=16, pad_token_id=0, cls_token_id=1, num_labels=3)).eval()
    >>> expression = torch.tensor([[-2.0, 3.0, 50.0], [-2.0, 1.0, 9.0]])
    >>> model(torch.tensor([[1, 7, 9], [1, 8, 6]]), expression).logits.shape
    torch.Size([2, 3])
    """

    _keys_to_ignore_on_load_unexpected = [r"expression_decoder\.", r"mvc_decoder\.", r"flag_embedding\."]

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        self.cell_model = ScGPTModel(config, add_decoders=False)  # DDP refuses parameters that get no gradient
        self.classifier = ScGPTClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        cell_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Classify cells.

        Args:
            gene_ids, expression, cell_attention_mask: `(batch_size, num_genes)`, as in [`ScGPTModel`].
            labels: Classes, int64 `(batch_size,)`; 0 and 1 of several classes, float `(batch_size, num_labels)`; or
                numbers to predict, float `(batch_size,)` or `(batch_size, num_labels)`.
            output_hidden_states, output_attentions: As in [`ScGPTModel`].
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.cell_model(
            gene_ids,
            expression,
            cell_attention_mask,
            cls_only=not wanted,  # one query a cell in the last layer
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            if labels.dim() == 2 or self.config.num_labels == 1:  # numbers, which may have come as integers
                labels = labels.to(logits.dtype)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


ScGPTModel.register_for_auto_class("AutoModel")
ScGPTForPreTraining.register_for_auto_class("AutoModelForMaskedLM")
ScGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
