"""scGPT, the cell language model: genes and their expression in, one state a gene and one embedding a cell out.

A cell is a set of tokens, `<cls>` first, then its expressed genes in any order. A token is the sum of a gene embedding
and of an encoding of the gene's expression value (a bin, as in scGPT, or whatever the checkpoint was trained on), and
passes through post-norm transformer layers without positions. Two decoders predict expression: one from a gene's own
state, the other (MVC, "masked value for cell") from the cell embedding and a query made of the gene.

Weights of the published scGPT load after `python -m scmmgpt.train convert scgpt`, and give its outputs to float32
rounding. Training deviates in one default: scGPT drops attention weights with probability 0.2, while
`ScGPTConfig.attention_dropout` is 0, because any attention dropout rules out the fused attention kernels (a CPU
training step is 2.7 times slower with it). Set `attention_dropout` to 0.2 to train exactly as scGPT did.

The encoder never computes on padding. Its default path (`attn_implementation="sdpa"`) packs the real tokens of a
batch into one row; see `Packing`. Any other attention implementation of transformers works on the padded batch.

Shapes in comments: B cells of a batch, G genes of the padded batch (`<cls>` among them), K condition tokens put in
front of the genes, L = K + G tokens, N tokens of a packed row, C cells of a packed row, D `hidden_size`, H heads.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput


try:
    from .configuration_scmmgpt import ScGPTConfig
except ImportError:
    from configuration_scmmgpt import ScGPTConfig

varlen_attn: Any = None  # PyTorch before 2.10 lacks it
with suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn


IGNORED_LABEL = -100  # an expression label that enters no loss
CPU_PIECE_TOKENS = 2400  # tokens that run through all layers at once: 5 MB of float32 states, 10 % faster than 20,000


@dataclass
class ScGPTModelOutput(ModelOutput):
    """What [`ScGPTModel`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): `expression_loss + mvc_loss`, if `expression_labels` were given.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_conditions + num_genes, hidden_size)`):
            The state of each token; zero where `cell_attention_mask` is 0. Only position 0 with `cls_only=True`.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): The cell embedding: the state at
            position 0, not normalised (scGPT divides it by its length where it compares cells).
        predicted_expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): The expression decoder's values,
            in the unit of the labels, if there are any.
        mvc_expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): The MVC decoder's values, likewise.
        expression_loss, mvc_loss (`torch.FloatTensor` of shape `(1,)`): The two parts of the loss.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    predicted_expression: Tensor | None = None
    mvc_expression: Tensor | None = None
    expression_loss: Tensor | None = None
    mvc_loss: Tensor | None = None


def masked_expression_loss(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over the positions that have a label.

    Args:
        predicted (`torch.FloatTensor` of shape `(batch_size, num_genes)`): Predicted expression.
        labels (`torch.FloatTensor` of shape `(batch_size, num_genes)`): True expression in the same unit, -100 where
            nothing is to be predicted: padding, `<cls>`, and genes whose value the model was shown.

    Returns:
        `torch.FloatTensor` of shape `()`; 0 if no position has a label.
    """
    has_label = labels != IGNORED_LABEL
    error = (predicted.float() - labels.float()).masked_fill(~has_label, 0.0)
    return error.square().sum() / has_label.sum().clamp(min=1)


@dataclass
class Segments:
    """Cells that lie one after another in a row of tokens.

    Attributes:
        lengths (`list[int]`): Number of tokens of each cell, ascending.
        ends (`torch.IntTensor` of shape `(num_cells + 1,)`): 0, then where each cell ends.
    """

    lengths: list[int]
    ends: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Segments":
        """Segments of cells of these lengths."""
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))


@dataclass
class Packing:
    """Where the real tokens of a padded batch lie once they are packed into one row, cell after cell.

    Every layer but attention treats tokens alone, so it runs on the packed row and no work is spent on padding.
    Attention runs within each cell. Cells are packed in order of length: those of equal length are neighbours and
    share one kernel call. In inference on a CPU the row is cut into pieces that stay in the cache.

    Attributes:
        shape (`tuple[int, int]`): Batch size and length of the padded batch.
        index (`torch.LongTensor` of shape `(num_tokens,)`): Position of each packed token in the flattened padded
            batch; None if the batch has no padding, and packing is only a change of shape.
        rows (`torch.LongTensor` of shape `(num_cells,)`): Which cell of the batch each packed cell is. Cells without
            tokens are left out.
        pieces (`list[Segments]`): The packed cells, piece by piece.
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
        if attention_mask is None or bool(attention_mask.all()):
            index, rows, lengths = None, torch.arange(batch_size, device=device), [length] * batch_size
        else:
            sizes, rows = attention_mask.bool().sum(dim=1).sort(stable=True)
            rows, lengths = rows[sizes > 0], sizes[sizes > 0].tolist()
            cells, positions = attention_mask[rows].nonzero(as_tuple=True)
            index = rows[cells] * length + positions
        cut = device.type == "cpu" and not torch.is_grad_enabled()
        pieces: list[list[int]] = []
        for size in lengths:
            if not pieces or (cut and sum(pieces[-1]) + size > CPU_PIECE_TOKENS):
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


def per_head_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one cell as plain matrix products, one head at a time: CPU, bfloat16, no gradient.

    PyTorch's fused CPU attention gains nothing from bfloat16, its matrix product 2.5 times the speed of float32.
    Tensors are `(num_tokens, num_heads, head_dim)`, `query` is already scaled and may have fewer tokens.
    """
    output = torch.empty_like(query)  # (N, H, D / H)
    for head in range(query.shape[1]):
        weights = torch.mm(query[:, head], key[:, head].T).softmax(dim=-1)  # (N, N)
        output[:, head] = torch.mm(weights, value[:, head])
    return output


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    num_conditions: int | None = None,
) -> Tensor:
    """Attention within each cell of a packed row, by the fastest means of the device.

    On CUDA in half precision it is one variable-length kernel; elsewhere each run of cells of equal length is one call
    of the fused `scaled_dot_product_attention`, and on CPU in bfloat16 see [`per_head_attention`]. No mask anywhere.

    Args:
        query (`torch.Tensor` of shape `(num_tokens or num_cells, num_heads, head_dim)`): Packed tokens, or only the
            first token of each cell.
        key (`torch.Tensor` of shape `(num_tokens, num_heads, head_dim)`): Packed tokens.
        value (`torch.Tensor` of shape `(num_tokens, num_heads, head_dim)`): Packed tokens.
        segments ([`Segments`]): Where the cells lie.
        scaling (`float`): Factor of the scores.
        dropout (`float`): Probability of dropping an attention weight.
        num_conditions (`int`, *optional*): See [`attention_by_conditions`].

    Returns:
        `torch.Tensor` of the shape of `query`.
    """
    first_only = len(query) == len(segments.lengths)
    whole = num_conditions is None
    if whole and _has_varlen_kernel(query) and dropout == 0:
        longest = segments.lengths[-1]
        query_ends, longest_query = segments.ends, longest
        if first_only:
            query_ends, longest_query = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device), 1
        return varlen_attn(query, key, value, query_ends, segments.ends, longest_query, longest, scale=scaling)
    if whole and query.device.type == "cpu" and query.dtype == torch.bfloat16 and not query.requires_grad:
        lengths = segments.lengths
        queries = (query * scaling).split(1 if first_only else lengths)
        return torch.cat(list(map(per_head_attention, queries, key.split(lengths), value.split(lengths))))
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

    Args:
        query, key, value (`torch.Tensor` of shape `(num_cells, num_heads, num_conditions + num_genes, head_dim)`):
            Conditions first; no padding.
        num_conditions (`int`): How many there are.
        scaling (`float`): Factor of the scores.
        dropout (`float`): Probability of dropping an attention weight.

    Returns:
        `torch.Tensor` of the shape of `query`.
    """
    conditions, genes = query[:, :, :num_conditions], query[:, :, num_conditions:]
    (condition_keys, own_keys), (condition_values, own_values) = (
        (states[:, :, :num_conditions], states[:, :, num_conditions:]) for states in (key, value)
    )
    of_conditions = nn.functional.scaled_dot_product_attention(
        conditions, key, value, dropout_p=dropout, scale=scaling
    )  # (B, H, K, D / H)
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
    """Attention written out, on heads of the padded batch: the reference, and the only path that returns weights."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (B, H, L, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ScGPTValueLinear(nn.Linear):
    """A linear layer of the value encoder. It starts as in scGPT, with random biases.

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
            # A gene to be generated has no value: in its place scGPT puts the flag, if the model has one.
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
    ) -> Tensor:
        """Attend from `queries` to `hidden_states`, which are the same tokens or more; see [`ScGPTLayer`]."""
        # (N, D) packed or (B, L, D) padded -> heads: (N, H, D / H) or (B, L, H, D / H)
        query = self.q_proj(queries).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        dropout = self.config.attention_dropout if self.training else 0.0
        if segments is not None:
            output = packed_attention(query, key, value, segments, self.scaling, dropout, num_conditions)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            heads_first = (states.transpose(1, 2) for states in (query, key, value))
            output, _ = attend(self, *heads_first, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.out_proj(output.flatten(-2))


class ScGPTLayer(GradientCheckpointingLayer):
    """A post-norm transformer layer with a ReLU feed-forward.

    Tokens are `(batch_size, length, hidden_size)` with an `attention_mask`, or packed, `(num_tokens, hidden_size)`,
    with `segments`. With `first_only` (packed alone) the result holds only the first token of each cell;
    `num_conditions` (packed alone) is that of [`attention_by_conditions`].
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
        attended = self.attention(queries, hidden_states, attention_mask, segments, num_conditions)
        queries = self.attention_norm(queries + self.dropout(attended))
        transformed = self.linear2(self.dropout(nn.functional.relu(self.linear1(queries))))
        return self.output_norm(queries + self.dropout(transformed))


def _shown_genes_are_visible(generation_mask: Tensor) -> Callable:
    """Mask function: a token attends to itself and to the genes that are not to be generated."""
    return lambda batch, head, query, key: (generation_mask[batch, key] == 0) | (query == key)


def _conditions_are_visible(num_conditions: int) -> Callable:
    """Mask function: as [`attention_by_conditions`]."""
    return lambda batch, head, query, key: (query < num_conditions) | (key < num_conditions) | (query == key)


class ScGPTEncoder(nn.Module):
    """The stack of layers, on the packed batch or, for attention implementations other than SDPA, the padded one."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(ScGPTLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        generation_mask: Tensor | None = None,
        cls_only: bool = False,
        num_conditions: int | None = None,
    ) -> Tensor:
        """Encode tokens (batch_size, length, hidden_size); returns the same shape, or length 1 with `cls_only`.

        With `num_conditions`, see [`attention_by_conditions`].
        """
        # A compiled graph must not depend on the lengths of the cells, and packing does.
        can_pack = generation_mask is None and not torch.compiler.is_compiling()
        if can_pack and self.config._attn_implementation == "sdpa":
            return self._forward_packed(inputs_embeds, attention_mask, cls_only, num_conditions)
        return self._forward_padded(inputs_embeds, attention_mask, generation_mask, cls_only, num_conditions)

    def _forward_packed(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, cls_only: bool, num_conditions: int | None
    ) -> Tensor:
        packing = Packing.of(inputs_embeds, attention_mask)
        if not packing.pieces:  # no cell has a token
            return inputs_embeds[:, :1] * 0 if cls_only else inputs_embeds * 0
        outputs = []
        for hidden_states, segments in zip(packing.pack(inputs_embeds), packing.pieces, strict=True):
            for layer in self.layers[:-1]:
                hidden_states = layer(hidden_states, segments=segments, num_conditions=num_conditions)
            # For the embedding alone, the last layer needs every token's key and value, but one query a cell.
            last = self.layers[-1]
            outputs.append(last(hidden_states, segments=segments, first_only=cls_only, num_conditions=num_conditions))
        return packing.unpack_first(outputs) if cls_only else packing.unpack(outputs)

    def _forward_padded(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        generation_mask: Tensor | None,
        cls_only: bool,
        num_conditions: int | None,
    ) -> Tensor:
        visible = None
        if num_conditions is not None:
            visible = _conditions_are_visible(num_conditions)
        elif generation_mask is not None:
            visible = _shown_genes_are_visible(generation_mask)
        if visible is not None and "flash" in self.config._attn_implementation:
            # transformers ignores a mask function there, without a warning.
            raise ValueError("Flash attention lets genes see all others; generate by 'sdpa' or 'eager' attention.")
        layer_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, and_mask_function=visible
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask)
        if attention_mask is not None:
            hidden_states = hidden_states.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)
        return hidden_states[:, :1] if cls_only else hidden_states


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


class ScGPTPreTrainedModel(PreTrainedModel):
    """Initialisation and loading of scGPT."""

    config: ScGPTConfig
    config_class = ScGPTConfig
    base_model_prefix = "cell_model"
    main_input_name = "gene_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScGPTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only modules that own parameters come by here: transformers passes over containers of remote-code models.
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.embedding_range, self.config.embedding_range)
        elif isinstance(module, ScGPTValueLinear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)


class ScGPTModel(ScGPTPreTrainedModel):
    """scGPT: gene tokens with expression values -> a state per gene, an embedding per cell, and expression back.

    For embeddings alone, pass `cls_only=True`; on a CPU that computes in bfloat16, `model.to(torch.bfloat16)` is
    another 2.8 times as fast, at a cosine of 0.9999 to float32.

    >>> model = ScGPTModel(ScGPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...     intermediate_size=16, pad_token_id=0, cls_token_id=1)).eval()
    >>> gene_ids = torch.tensor([[1, 7, 9], [1, 8, 0]])  # <cls> first, <pad> last
    >>> expression = torch.tensor([[-2.0, 3.0, 50.0], [-2.0, 1.0, -2.0]])
    >>> outputs = model(gene_ids, expression, cell_attention_mask=(gene_ids != 0).long())
    >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape
    (torch.Size([2, 3, 16]), torch.Size([2, 16]))
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        self.embeddings = ScGPTEmbeddings(config)
        self.encoder = ScGPTEncoder(config)
        self.expression_decoder = ScGPTExpressionDecoder(config)
        self.mvc_decoder = ScGPTMVCDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The gene embedding."""
        return self.embeddings.gene_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the gene embedding."""
        self.embeddings.gene_embedding = value

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
    ) -> ScGPTModelOutput:
        """Encode a batch of cells.

        Row i of a batch equals row i alone, to rounding.

        Args:
            gene_ids (`torch.LongTensor` of shape `(batch_size, num_genes)`): Ids in the gene vocabulary. Position 0 is
                `<cls>`, unless `condition_embeds` stand in its place.
            expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): Value of each gene, in the unit that
                the checkpoint was trained on (scGPT: bins 0..50, -2 at `<cls>`). May be left out with
                `condition_embeds`: the expression is then what is to be generated.
            cell_attention_mask (`torch.LongTensor` of shape `(batch_size, num_genes)`): 1 for a token, 0 for padding,
                which stands on the right.
            condition_embeds (`torch.FloatTensor` of shape `(batch_size, num_conditions, hidden_size)`): Tokens put in
                front of the genes, such as a cell embedding or the projection of a text.
            generation_mask (`torch.LongTensor` of shape `(batch_size, num_genes)`): 1 for a gene to be generated
                from the others, as in scGPT's generative pre-training: its value is not read, and no other token
                attends to it. Runs on the padded batch.
            cls_only (`bool`, defaults to False): Compute the cell embedding alone: one query a cell in the last layer.
            expression_labels (`torch.FloatTensor` of shape `(batch_size, num_genes)`): True expression where it is to
                be predicted, -100 elsewhere. Adds both decoders' predictions and losses to the output.
            genes_attend_to (`str`, defaults to `"all"`): With `"conditions"` a gene attends to the conditions and to
                itself alone, as a gene that scGPT's generative pre-training hides does to the genes that it shows.
                Conditions attend to all. The cost grows with the number of genes, not with its square.
        """
        if genes_attend_to not in ("all", "conditions"):
            raise ValueError(f"genes_attend_to is {genes_attend_to!r}; choose 'all' or 'conditions'.")
        by_conditions = genes_attend_to == "conditions"
        if by_conditions and (condition_embeds is None or generation_mask is not None or cls_only):
            raise ValueError(
                "genes_attend_to='conditions' needs condition_embeds, and neither generation_mask nor cls_only."
            )
        if expression is None and condition_embeds is None:
            raise ValueError(
                "expression is None: a cell is its genes and their values. "
                "Pass expression, or condition_embeds to generate it from."
            )
        if cls_only and expression_labels is not None:
            raise ValueError("cls_only=True computes no gene states, but expression_labels need them: pass one.")
        inputs_embeds = self.embeddings(gene_ids, expression, generation_mask)  # (B, G, D)
        num_conditions = 0
        if condition_embeds is not None:
            num_conditions = condition_embeds.shape[1]
            inputs_embeds = torch.cat([condition_embeds.to(inputs_embeds.dtype), inputs_embeds], dim=1)  # (B, L, D)
            if cell_attention_mask is not None:
                cell_attention_mask = nn.functional.pad(cell_attention_mask, (num_conditions, 0), value=1)
            if generation_mask is not None:
                generation_mask = nn.functional.pad(generation_mask, (num_conditions, 0), value=0)
        hidden_states = self.encoder(
            inputs_embeds,
            cell_attention_mask,
            generation_mask,
            cls_only,
            num_conditions=num_conditions if by_conditions else None,
        )  # (B, L, D), or (B, 1, D) with `cls_only`
        outputs = ScGPTModelOutput(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])
        if expression_labels is not None:
            predicted = self.decode_expression(hidden_states[:, num_conditions:])  # (B, G)
            from_cell = self.decode_mvc(hidden_states[:, 0], gene_ids)  # (B, G)
            expression_loss = masked_expression_loss(predicted, expression_labels)
            mvc_loss = masked_expression_loss(from_cell, expression_labels)
            outputs["predicted_expression"], outputs["mvc_expression"] = predicted, from_cell
            outputs["expression_loss"], outputs["mvc_loss"] = expression_loss, mvc_loss
            outputs["loss"] = expression_loss + mvc_loss
        return outputs

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
        """Expression of every gene of a cell known by its embedding, in one pass: scGPT's `generate`.

        Args:
            gene_ids (`torch.LongTensor` of shape `(batch_size, num_genes)`): Position 0 is overwritten.
            cell_embeds (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): Stands in position 0.
            cell_attention_mask (`torch.LongTensor` of shape `(batch_size, num_genes)`): 1 for a token, 0 for padding.
            expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): Known values, if any.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_genes)`: Predicted values; position 0 has no meaning.
        """
        outputs = self(
            gene_ids[:, 1:],
            expression=None if expression is None else expression[:, 1:],
            cell_attention_mask=None if cell_attention_mask is None else cell_attention_mask[:, 1:],
            condition_embeds=cell_embeds.unsqueeze(1),
        )
        return self.decode_expression(outputs.last_hidden_state)


@dataclass
class ScGPTPreTrainingOutput(ModelOutput):
    """What [`ScGPTForPreTraining`] returns: the sum of the losses, and each objective's own."""

    loss: Tensor | None = None
    masked_loss: Tensor | None = None
    gene_prompt_loss: Tensor | None = None
    cell_prompt_loss: Tensor | None = None


class ScGPTForPreTraining(ScGPTPreTrainedModel):
    """scGPT with its pre-training objectives, three ways to predict the values of hidden genes.

    - `masked`: `config.mask_value` replaces the hidden values; all tokens attend to each other.
    - `gene_prompt`: a hidden gene carries no value and attends to the shown genes and to itself.
    - `cell_prompt`: no gene carries a value. The cell embedding of a pass above, detached, stands in the place of
      `<cls>`, as in [`~ScGPTModel.generate_expression`].

    The first two train both decoders, the last the expression decoder. `ScGPTModel.from_pretrained` loads its
    checkpoints.

    Args:
        config ([`ScGPTConfig`]): Of the cell model; `use_flag_embedding` marks the genes of `gene_prompt`.
        objectives (`tuple[str]`, *optional*): Which of the three; all by default.
    """

    OBJECTIVES = ("masked", "gene_prompt", "cell_prompt")

    def __init__(self, config: ScGPTConfig, objectives: tuple[str, ...] = OBJECTIVES) -> None:
        super().__init__(config)
        if not set(objectives) <= set(self.OBJECTIVES) or not set(objectives) - {"cell_prompt"}:
            raise ValueError(
                f"objectives are {tuple(objectives)}; choose from {self.OBJECTIVES}, and 'cell_prompt' only beside "
                "another, which the cell embedding comes from."
            )
        self.objectives = tuple(objectives)
        self.cell_model = ScGPTModel(config)
        self.post_init()

    def forward(
        self,
        gene_ids: Tensor,
        expression: Tensor,
        cell_attention_mask: Tensor,
        hidden_genes: Tensor,
        return_loss: bool = True,
    ) -> ScGPTPreTrainingOutput:
        """Losses of a batch.

        Args:
            gene_ids (`torch.LongTensor` of shape `(batch_size, num_genes)`): As in [`ScGPTModel`].
            expression (`torch.FloatTensor` of shape `(batch_size, num_genes)`): True values, hidden ones included.
            cell_attention_mask (`torch.LongTensor` of shape `(batch_size, num_genes)`): 1 for a token, 0 for padding.
            hidden_genes (`torch.BoolTensor` of shape `(batch_size, num_genes)`): True where the value is to be
                predicted; never at `<cls>` or padding.
            return_loss (`bool`): Always true: it tells `Trainer` that there is a loss without labels.
        """
        labels = expression.masked_fill(~hidden_genes, IGNORED_LABEL)
        losses: dict[str, Tensor] = {}
        if "masked" in self.objectives:
            shown = expression.masked_fill(hidden_genes, self.config.mask_value)
            outputs = self.cell_model(gene_ids, shown, cell_attention_mask, expression_labels=labels)
            losses["masked_loss"] = outputs.loss
        if "gene_prompt" in self.objectives:
            outputs = self.cell_model(
                gene_ids, expression, cell_attention_mask, generation_mask=hidden_genes, expression_labels=labels
            )
            losses["gene_prompt_loss"] = outputs.loss
        if "cell_prompt" in self.objectives:
            prompt = outputs.pooler_output.detach()
            generated = self.cell_model.generate_expression(gene_ids, prompt, cell_attention_mask)
            losses["cell_prompt_loss"] = masked_expression_loss(generated, labels)
        return ScGPTPreTrainingOutput(loss=torch.stack(list(losses.values())).sum(), **losses)


ScGPTModel.register_for_auto_class("AutoModel")

__all__ = [
    "ScGPTForPreTraining",
    "ScGPTModel",
    "ScGPTModelOutput",
    "ScGPTPreTrainedModel",
    "ScGPTPreTrainingOutput",
    "masked_expression_loss",
]
