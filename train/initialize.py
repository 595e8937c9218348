"""Initial weights computed from the corpus in closed form, which gradient descent then need not learn."""

import logging
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import Cells, normalize_log1p
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.corpus import first_groups


logger = logging.getLogger(__name__)

SVD_CELLS = 50_000  # cells for the co-expression of genes
PROJECTION_CELLS = 512  # cells for the initial weights of a projection
PROMPT_CELLS = 128  # cells whose prompts give the initial weights of the text-to-cell projection


class TrainingCells(Protocol):
    """Interface of the cells for the initial weights of a new model: a [`Corpus`], or cells in memory."""

    vocabulary: dict[str, int]
    gene_aliases: dict[str, Any]

    def row_groups(self, split: str, columns: list[str] | None = None) -> Iterator[tuple[Cells, Any]]:
        """Yield groups of cells, and their annotations."""


@torch.no_grad()
def standardize(linear: torch.nn.Linear, inputs: torch.Tensor, *, unit: bool = False) -> None:
    """Set a linear layer to the principal axes of its inputs `(n, linear.in_features)`, centred and scaled.

    The states of a BERT hardly differ between texts, and the states of a new Q-Former hardly differ between cells. All
    cosine similarities of a random projection are therefore near 1, and contrastive training collapses to a constant
    solution. `train/LOG.md` has the comparison.

    With `unit`, each output has on average variance one; otherwise, the variances of all outputs sum to one. Outputs
    beyond the rank of the inputs keep their weights.
    """
    mean = inputs.mean(dim=0)
    _, scale, axes = torch.linalg.svd(inputs - mean, full_matrices=False)
    # An axis without variance is rounding noise, which differs between machines.
    rank = min(int((scale > 1e-3 * scale[0]).sum()), linear.out_features)
    size = (linear.out_features if unit else 1) ** 0.5
    linear.weight[:rank] = axes[:rank] * (size * len(inputs) ** 0.5 / scale.norm().clamp(min=1e-6))
    linear.bias.copy_(-linear.weight @ mean)


@torch.no_grad()
def standardize_projections(model: ScMMGPTForCellTextAlignment, dataset: BatchDataset) -> None:
    """Apply [`standardize`] to both projections into the shared space, on the first cells and texts of a dataset."""
    model.eval()
    query_pieces, text_states = [], []
    for batch in dataset:
        gene_states = model.encode_cells(batch["gene_ids"], batch["expression"], batch["cell_attention_mask"])
        query_pieces.append(model.query_cells(gene_states, batch["cell_attention_mask"]))
        text_embeds = model.qformer_embeddings(input_ids=batch["qformer_input_ids"])
        text_states.append(model.encode_texts(text_embeds, batch["qformer_attention_mask"]))
        if sum(map(len, text_states)) >= PROJECTION_CELLS:
            break
    query_states = torch.cat(query_pieces)
    model.query_means.copy_(query_states.mean(dim=0, keepdim=True))
    standardize(model.cell_projection, (query_states - model.query_means).flatten(0, 1))
    standardize(model.text_projection, torch.cat(text_states))
    model.train()


@torch.no_grad()
def embed_genes_by_coexpression(cell_model: ScGPTModel, corpus: TrainingCells) -> None:
    """Set gene embeddings to the right singular vectors of the training cells' log1p(CP10k), genes of unit variance.

    Co-expressed genes then have similar embeddings, which helps with a small corpus. The vectors are scaled to the
    standard deviation of scGPT's initialisation. Genes of constant expression keep their random embeddings.
    """
    from scipy.sparse import csr_matrix, vstack
    from sklearn.decomposition import TruncatedSVD

    weight: torch.Tensor = cast(torch.nn.Embedding, cell_model.get_input_embeddings()).weight
    pieces: list[csr_matrix] = []
    for cells, _ in first_groups(corpus.row_groups("train", columns=[]), SVD_CELLS):
        values = normalize_log1p(cells)
        pieces.append(csr_matrix((values, cells.gene_ids, cells.indptr), shape=(len(cells), len(weight))))
    matrix = vstack(pieces, format="csr")
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    mean_square = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel()
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
    seen = deviation > 0
    matrix = matrix.multiply(np.where(seen, 1 / np.maximum(deviation, 1e-6), 0)[None]).tocsr()
    rank = min(weight.shape[1], matrix.shape[0] - 1, int(seen.sum()) - 1)
    svd = TruncatedSVD(rank, random_state=0).fit(matrix)
    vectors = torch.from_numpy((svd.components_ * svd.singular_values_[:, None]).T.copy()).to(weight)[seen]
    rows = torch.from_numpy(np.flatnonzero(seen))
    target = weight[rows].std()
    weight[rows, :rank] = vectors / vectors.std() * target
    logger.info("Started %d gene embeddings from the co-expression in %d cells", len(rows), matrix.shape[0])


@torch.no_grad()
def standardize_language_projection(model: ScMMGPTForConditionalGeneration, dataset: BatchDataset) -> None:
    """Set the projection into the language model: principal axes of its inputs, outputs as long as token embeddings.

    The first layer is set by [`standardize`]; the last layer is scaled.
    """
    model.eval()
    pieces: list[torch.Tensor] = []
    for cells, *_ in first_groups(dataset.source.batches(), PROJECTION_CELLS):
        inputs = dataset.collate.processor(cells=cells).to(model.device)
        mask = inputs["cell_attention_mask"]
        gene_states = model.model.encode_cells(inputs["gene_ids"], inputs["expression"], mask)
        pieces.append(model.model.query_cells(gene_states, mask))
    projection: Any = model.model.language_projection
    first, last = projection[0], projection[2]
    states = (torch.cat(pieces) - model.model.query_means).flatten(0, 1)
    standardize(first, states)
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.float().norm(dim=1).mean()
    last.weight.mul_(size / projection(states).norm(dim=1).mean())
    model.train()


@torch.no_grad()
def start_label_projection(model: ScMMGPTForConditionalGeneration, processor: ScMMGPTProcessor) -> None:
    """Set the direction of each label from the mean input embedding of the tokens of its name.

    To the language model, the label of a cell then looks like its name in the prompt. Names of subtypes share most
    words ("naive thymus-derived CD4-positive, alpha-beta T cell", "... CD8-positive ..."): their mean embeddings have
    cosines up to 0.99, and a short training confuses the labels. The mean embeddings are therefore replaced by the
    nearest orthogonal directions (the polar factor of the matrix of means), as long as token embeddings on average.
    """
    readout: Any = model.config.label_readout
    embeddings: Any = model.get_input_embeddings()
    names = [f" {name}" for name in readout.get("labels", readout["texts"])]
    ids = processor.tokenizer(names, add_special_tokens=False)["input_ids"]
    words = [embeddings(torch.tensor(tokens, device=model.device)).float().mean(dim=0) for tokens in ids]
    left, _, right = torch.linalg.svd(torch.nn.functional.normalize(torch.stack(words)), full_matrices=False)
    directions = torch.nn.functional.normalize(left @ right)  # of length 1 already, unless labels outnumber dimensions
    size = embeddings.weight.float().norm(dim=1).mean()
    model.model.label_projection.weight.copy_((directions * size).t())


@torch.no_grad()
def standardize_text_to_cell(model: ScMMGPTForConditionalGeneration, dataset: BatchDataset) -> None:
    """Apply [`standardize`] to the projections of the text-to-cell Q-Former, on the distinct prompts of a dataset."""
    model.eval()
    parts = model.model
    prompts: dict[tuple[int, ...], None] = {}
    n_cells = 0
    for batch in dataset:
        if n_cells >= PROMPT_CELLS:  # counts cells, so that the weights do not depend on the batch size
            break
        generates = batch["target_attention_mask"].any(dim=1)
        n_cells += int((~generates).sum()) + len(batch["target_rows"])
        for ids, mask in zip(batch["input_ids"][generates], batch["attention_mask"][generates], strict=True):
            prompts.setdefault(tuple(ids[mask.bool()].tolist()))
    if prompts:
        inputs = dataset.collate.processor.tokenizer.pad(
            {"input_ids": [list(prompt) for prompt in prompts]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        states = parts.language_model(**inputs, use_cache=False).last_hidden_state.float()
        mask = inputs["attention_mask"]
        summaries = parts.text_to_cell.summarize(states, mask)
        standardize(parts.text_to_cell.summary_projection, summaries, unit=True)
        queries = parts.text_to_cell.query_texts(states, mask)
        parts.text_to_cell.query_means.copy_(queries.mean(dim=0, keepdim=True))
        # Each channel of a condition token gets variance one, like the channels of gene tokens.
        standardize(parts.text_to_cell.projection, (queries - parts.text_to_cell.query_means).flatten(0, 1), unit=True)
    model.train()


@torch.no_grad()
def start_from_mean_profile(model: ScMMGPTForConditionalGeneration, gene_means: np.ndarray) -> None:
    """Set the gene biases of the expression head to the mean profile `(vocab_size,)` of [`read_gene_means`]."""
    rate = torch.from_numpy(np.asarray(gene_means, dtype=np.float32)) * 1e4
    head = model.model.expression_head
    bias = torch.log1p(rate) if head.kind == "mse" else torch.log(rate.clamp(min=1e-4))
    head.gene_bias.weight.copy_(bias[:, None])
    if head.kind != "mse":
        head.projection.weight.mul_(0.1)  # keeps the first predictions near the mean profile
        head.projection.bias.zero_()
