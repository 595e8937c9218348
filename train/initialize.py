"""Where training starts from: what can be computed from the corpus need not be learned by gradient descent."""

import logging

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import normalize_log1p
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.train.data.corpus import Corpus
from scmmgpt.train.data.gene_tables import load_hgnc


logger = logging.getLogger(__name__)

SVD_CELLS = 50_000  # cells that the co-expression of genes is read from, at most
NAMES_PER_BATCH, NAME_TOKENS = 512, 24
PROJECTION_CELLS = 512  # cells that the start of a projection is computed from, at most


@torch.no_grad()
def standardize(linear: torch.nn.Linear, inputs: torch.Tensor, *, unit: bool = False) -> None:
    """Start a linear layer from the principal axes of its inputs, centred and scaled to one.

    A BERT answers nearly the same for every text, as a fresh Q-Former does for every cell; cosine similarities are
    then all 1, and contrast settles in the constant solution. What is left here are the differences. `train/LOG.md`
    has the comparison.

    Args:
        linear: Its weight and bias are set; output units beyond the inputs' rank keep their weights.
        inputs: `(n, linear.in_features)` of what it will read.
        unit: Scale to a variance of one per output, not in all.
    """
    mean = inputs.mean(dim=0)
    _, scale, axes = torch.linalg.svd(inputs - mean, full_matrices=False)
    # An axis along which nothing varies is rounding noise: no start to build on, and another one on every machine.
    rank = min(int((scale > 1e-3 * scale[0]).sum()), linear.out_features)
    size = (linear.out_features if unit else 1) ** 0.5
    linear.weight[:rank] = axes[:rank] * (size * len(inputs) ** 0.5 / scale.norm().clamp(min=1e-6))
    linear.bias.copy_(-linear.weight @ mean)


@torch.no_grad()
def embed_genes_by_coexpression(cell_model: ScGPTModel, corpus: Corpus) -> None:
    """Start gene embeddings from the right singular vectors of the training cells' log1p(CP10k), genes standardised.

    Genes that rise and fall together start close together, so a small corpus need not teach that. The vectors are
    scaled to the spread of scGPT's own initialisation; genes without a training cell keep theirs.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD

    weight = cell_model.get_input_embeddings().weight
    pieces, total = [], 0
    for cells, _ in corpus.row_groups("train", columns=[]):
        values = normalize_log1p(cells)
        pieces.append((values, cells.gene_ids.astype(np.int64), np.diff(cells.indptr)))
        total += len(cells)
        if total >= SVD_CELLS:
            break
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([lengths for *_, lengths in pieces]))])
    values, genes = (np.concatenate(arrays) for arrays in list(zip(*pieces, strict=True))[:2])
    matrix = csr_matrix((values, genes, indptr), shape=(len(indptr) - 1, len(weight)))
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2, 0))
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
def embed_genes_by_name(model, tokenizer, vocabulary: dict[str, int]) -> None:
    """Start gene embeddings from the principal axes of what the text branch makes of the genes' symbols and names.

    Names come from HGNC where its table is at hand (see `gene_tables.load_hgnc`), such as "CD14: CD14 molecule". The
    vectors are scaled to the spread of scGPT's own initialisation; special tokens keep theirs.

    Args:
        model: A stage-1 model; its text branch reads, the gene embeddings of its cell model are set.
        tokenizer: The text branch's.
        vocabulary: Gene symbol -> id.
    """
    weight = model.cell_model.get_input_embeddings().weight
    names = {record.symbol: record.name for record in load_hgnc() if record.name}
    genes = {gene: i for gene, i in vocabulary.items() if not gene.startswith("<")}
    texts = [f"{gene}: {names[gene]}" if gene in names else gene for gene in genes]
    order = np.argsort([len(text) for text in texts], kind="stable")  # texts of one length together: no padding
    states = torch.empty(len(texts), model.config.qformer_config.hidden_size)
    model.eval()
    for start in range(0, len(order), NAMES_PER_BATCH):
        rows = order[start : start + NAMES_PER_BATCH]
        inputs = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=NAME_TOKENS, return_tensors="pt"
        )
        states[torch.from_numpy(rows)] = model.read_texts(inputs["input_ids"], inputs["attention_mask"])
    model.train()
    states -= states.mean(dim=0)
    axes = torch.linalg.eigh(states.t() @ states)[1].flip(1)[:, : weight.shape[1]]
    vectors = states @ axes
    rows = torch.tensor(list(genes.values()))
    weight[rows, : vectors.shape[1]] = vectors / vectors.std() * weight[rows].std()
    logger.info("Started %d gene embeddings from the genes' names, %d of them in full", len(genes), len(names))


@torch.no_grad()
def start_from_mean_profile(model: ScMMGPTForConditionalGeneration, gene_means: np.ndarray) -> None:
    """Gene biases of the expression head: the training cells' mean profile, which training then improves on.

    Args:
        model: Its expression head's biases are set.
        gene_means: float `(vocab_size,)`: mean share of each gene in a cell's counts.
    """
    rate = torch.from_numpy(np.asarray(gene_means, dtype=np.float32)) * 1e4
    head = model.model.expression_head
    bias = torch.log1p(rate) if head.kind == "mse" else torch.log(rate.clamp(min=1e-4))
    head.gene_bias.weight.copy_(bias[:, None])
    if head.kind != "mse":
        head.projection.weight.mul_(0.1)  # begin near the mean profile
        head.projection.bias.zero_()
