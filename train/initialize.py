"""Starts of training that are computed from the corpus, so that gradient descent need not find them."""

import logging
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import Cells, normalize_log1p
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor


logger = logging.getLogger(__name__)

SVD_CELLS = 50_000  # at most, for the co-expression of genes
PROJECTION_CELLS = 512  # at most, for the start of a projection


class TrainingCells(Protocol):
    """What a new model starts from: a [`Corpus`], or cells in memory."""

    vocabulary: dict[str, int]
    gene_aliases: dict[str, Any]

    def row_groups(self, split: str, columns: list[str] | None = None) -> Iterator[tuple[Cells, Any]]:
        """Cells in groups, and their annotations."""


@torch.no_grad()
def standardize(linear: torch.nn.Linear, inputs: torch.Tensor, *, unit: bool = False) -> None:
    """Start a linear layer from the principal axes of its inputs, centred and scaled to one.

    The states of a BERT hardly differ between texts, and those of a new Q-Former hardly differ between cells. All
    cosine similarities are then near 1, and the contrast ends in the constant solution. The layer therefore starts
    from the differences; `train/LOG.md` has the comparison.

    Args:
        linear: Gets new weights and a new bias; outputs beyond the rank of the inputs keep their weights.
        inputs: float `(n, linear.in_features)`: a sample of the layer's inputs.
        unit: Scale to a variance of one for each output; by default to a variance of one in total.
    """
    mean = inputs.mean(dim=0)
    _, scale, axes = torch.linalg.svd(inputs - mean, full_matrices=False)
    # An axis without variance is rounding noise, which differs between machines.
    rank = min(int((scale > 1e-3 * scale[0]).sum()), linear.out_features)
    size = (linear.out_features if unit else 1) ** 0.5
    linear.weight[:rank] = axes[:rank] * (size * len(inputs) ** 0.5 / scale.norm().clamp(min=1e-6))
    linear.bias.copy_(-linear.weight @ mean)


@torch.no_grad()
def embed_genes_by_coexpression(cell_model: ScGPTModel, corpus: TrainingCells) -> None:
    """Start gene embeddings from the right singular vectors of the training cells' log1p(CP10k), genes standardised.

    Co-expressed genes start close together, which helps with a small corpus. The vectors are scaled to the standard
    deviation of scGPT's own initialisation. Genes without a training cell keep their random embeddings.
    """
    from scipy.sparse import csr_matrix, vstack
    from sklearn.decomposition import TruncatedSVD

    weight: torch.Tensor = cast(torch.nn.Embedding, cell_model.get_input_embeddings()).weight
    pieces: list[csr_matrix] = []
    for cells, _ in corpus.row_groups("train", columns=[]):
        values = normalize_log1p(cells)
        pieces.append(csr_matrix((values, cells.gene_ids, cells.indptr), shape=(len(cells), len(weight))))
        if sum(piece.shape[0] for piece in pieces) >= SVD_CELLS:
            break
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
def start_label_projection(model: ScMMGPTForConditionalGeneration, processor: ScMMGPTProcessor) -> None:
    """Start the directions of the labels at the mean input embeddings of their words, at the norm of token embeddings.

    The language model then reads the label of a cell as if its name were written in the prompt. Names of subtypes
    share most words ("naive thymus-derived CD4-positive, alpha-beta T cell", "... CD8-positive ..."): their means have
    cosines up to 0.99, and a short training confuses them. The directions are therefore the nearest orthogonal ones
    (the polar factor of the matrix of means).
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
def start_from_mean_profile(model: ScMMGPTForConditionalGeneration, gene_means: np.ndarray) -> None:
    """Start the expression head's gene biases from `gene_means`, mean shares of a cell's counts `(vocab_size,)`."""
    rate = torch.from_numpy(np.asarray(gene_means, dtype=np.float32)) * 1e4
    head = model.model.expression_head
    bias = torch.log1p(rate) if head.kind == "mse" else torch.log(rate.clamp(min=1e-4))
    head.gene_bias.weight.copy_(bias[:, None])
    if head.kind != "mse":
        head.projection.weight.mul_(0.1)  # starts near the mean profile
        head.projection.bias.zero_()
