"""Expression profiles from descriptions: the choices before decoding, and the draws of cells.

1. `labels_and_prompts`, `target_genes`, `library_sizes`, `decide_sampling`: what to generate, checked.
2. `draw_cells` from the states of cells of a checkpoint that has them; else `decode_cells`, which runs the language
   model for each prompt and some genes at a time.

The draws of a cell depend on the seed, its prompt and its number alone.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging

from .configuration_scmmgpt import ScMMGPTConfig
from .labels_scmmgpt import names_known_type
from .modeling_scmmgpt import ScMMGPTForConditionalGeneration
from .processing_scmmgpt import ScMMGPTProcessor
from .states_scmmgpt import ScMMGPTCellStates


logger = logging.get_logger(__name__)

LEAST_OF_LIBRARY = 0.5  # counts of the genes of the model, in a cell
DRAWN_AT_ONCE = 256  # generated cells whose rates over all genes are in memory
GENERATED_CELLS = 1024  # of a prompt that are drawn at a time: genes x 8 bytes each


def labels_and_prompts(prompts: str | Sequence[str] | dict[str, str]) -> tuple[list[str], list[str]]:
    """Labels, the keys of a dict, and texts of the prompts."""
    labels = list(prompts) if isinstance(prompts, dict) else []
    texts = [prompts] if isinstance(prompts, str) else list(prompts.values() if isinstance(prompts, dict) else prompts)
    n_empty = sum(not text.strip() for text in texts)
    if n_empty or not texts:
        raise ValueError(f"Pass one prompt or more; each needs some text, but {n_empty} of {len(texts)} are empty.")
    return labels, texts


def warn_of_unknown_types(prompts: Sequence[str], annotation: Mapping[str, Any]) -> None:
    """Warn of prompts that name no cell type of training, since its genes may not be in the vocabulary.

    `annotation` has the `labels` and `terms` of the checkpoint; without labels there is no warning.
    """
    labels = list(annotation.get("labels", {}))
    unknown = [text for text in prompts if not names_known_type(text, labels, annotation.get("terms", []))]
    if labels and unknown:
        logger.warning(
            f"{len(unknown)} of {len(prompts)} prompts, such as {unknown[0]!r}, name none of the {len(labels)} "
            f"cell types that this checkpoint knows (such as {', '.join(map(repr, labels[:3]))}): the cells are a "
            "guess, and marker genes of another type may not be in its vocabulary."
        )


def warn_of_panels(counts: Any, sizes: np.ndarray) -> None:
    """Warn of cells that hold too few of the counts of their library, since they are drawn like cells of a panel.

    Training cells of a panel of genes have no counts of other genes, and neither have the cells drawn like them.

    Args:
        counts: Counts of all genes of the model, CSR `(n_cells, n_genes)`.
        sizes: Library sizes, `(n_cells,)`.
    """
    n_few = int((np.asarray(counts.sum(axis=1)).ravel() < LEAST_OF_LIBRARY * sizes).sum())
    if n_few:
        logger.warning(
            f"{n_few} of {len(sizes)} cells hold less than half of the counts of their library: they are drawn like "
            "training cells of a panel, which measured few genes. Leave them out, or try a prompt without a tissue."
        )


def decide_sampling(config: ScMMGPTConfig, do_sample: bool | None, n_cells: int) -> bool:
    """Whether counts are drawn: `do_sample`, by default wherever the checkpoint predicts a distribution."""
    can_sample = config.num_state_components is not None or config.expression_head != "mse"
    do_sample = can_sample if do_sample is None else bool(do_sample)
    if do_sample and not can_sample:
        raise ValueError("A mean (expression_head='mse') cannot be sampled; pass do_sample=False.")
    if n_cells > 1 and not do_sample:
        logger.warning(f"Without sampling, the {n_cells} cells of a prompt are equal: each is the predicted mean.")
    return do_sample


def target_genes(processor: ScMMGPTProcessor, genes: str | Sequence[str] | None) -> np.ndarray:
    """Vocabulary ids of the genes to generate, int64 `(n_genes,)`; by default all, ascending."""
    if genes is None:
        return np.sort(np.asarray(list(processor.gene_index.vocabulary.values()), dtype=np.int64))
    genes = [genes] if isinstance(genes, str) else list(genes)
    if not genes:
        raise ValueError("genes is empty; name at least one gene, or pass None for the whole vocabulary.")
    ids = processor.gene_ids_of(genes)
    unique, first = np.unique(ids, return_index=True)
    if len(unique) < len(ids):
        repeated = sorted({genes[i] for i in set(range(len(ids))) - set(first.tolist())})
        raise ValueError(f"{len(ids) - len(unique)} genes are asked for twice: {repeated[:5]}; name each once.")
    return ids


def gene_turns(n_genes: int, max_genes: int) -> list[np.ndarray]:
    """Columns of each turn of decoding: turns are of nearly equal size, each spread over all genes."""
    n_turns = math.ceil(n_genes / max_genes)
    return [np.arange(turn, n_genes, n_turns) for turn in range(n_turns)]


def library_sizes(library_size: float | np.ndarray, n_cells: int) -> np.ndarray:
    """Total counts of the cells of a prompt, float32 `(n_cells,)`."""
    sizes = np.broadcast_to(np.asarray(library_size, dtype=np.float32), (n_cells,)).copy()
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"library_size must be positive counts, but holds {sizes.min()}.")
    return sizes


def draw_cells(
    states: ScMMGPTCellStates,
    text_features: torch.Tensor,
    prompts: list[str],
    n_cells: int,
    gene_ids: np.ndarray,
    sizes: np.ndarray | None,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw states, library sizes and counts of cells.

    Args:
        states: The states of cells of the checkpoint.
        text_features: Features of the prompts, `(len(prompts), projection_dim)`.
        prompts, n_cells: The prompts, and the cells of each.
        gene_ids: Vocabulary ids of the genes, int64 `(n_genes,)`.
        sizes: Library sizes of the cells of a prompt, `(n_cells,)`; None draws them.
        seed: Seed of the draws.

    Yields:
        Counts of the genes, int32 `(n, n_genes)`, and library sizes, float32 `(n,)`, of the next cells. The cells of a
        prompt are consecutive.
    """
    rows, ids = np.repeat(np.arange(len(prompts)), n_cells), cell_ids_of(prompts, n_cells)
    given = None if sizes is None else np.tile(sizes, len(prompts))
    starts = range(0, len(rows), DRAWN_AT_ONCE)
    for start in logging.tqdm(starts, desc="Generating", unit="batch", disable=len(starts) < 2):
        part = slice(start, start + DRAWN_AT_ONCE)
        size = None if given is None else given[part]
        counts, size = states.sample(text_features[rows[part]], ids[part], seed=seed, library_size=size)
        yield counts[:, gene_ids].astype(np.int32), size.astype(np.float32)


def compare_cells(
    states: ScMMGPTCellStates, text_features: torch.Tensor, prompts: list[str], n_cells: int, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compare the cells that [`draw_cells`] draws with training cells, if the checkpoint keeps states of these.

    Returns:
        The distance of each cell to the nearest training cell (see [`ScMMGPTCellStates.compare`]), `(n,)`, and the
        variance of the states of each prompt, over that of training cells around the means of their texts,
        `(len(prompts),)`; NaN for one cell.
    """
    rows = np.repeat(np.arange(len(prompts)), n_cells)
    compared = states.compare(text_features[rows], cell_ids_of(prompts, n_cells), seed=seed)
    if compared is None:
        return None
    distances, places = compared
    places = places.reshape(len(prompts), n_cells, -1)
    enough = n_cells > 1
    return distances, places.var(axis=1, ddof=1).sum(axis=1) if enough else np.full(len(prompts), np.nan)


def decode_cells(
    model: ScMMGPTForConditionalGeneration,
    processor: ScMMGPTProcessor,
    prompts: list[str],
    gene_ids: np.ndarray,
    turns: list[np.ndarray],
    sizes: np.ndarray,
    do_sample: bool,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode the expression of genes with the language model.

    Args:
        model, processor: The checkpoint.
        prompts: The prompts.
        gene_ids: Vocabulary ids of the genes, int64 `(n_genes,)`.
        turns: Columns that are decoded together, see [`gene_turns`].
        sizes: Library sizes of the cells of a prompt, float32 `(n_cells,)`.
        do_sample, seed: Whether counts are drawn, and with which seed.
        batch_size: Cells per batch.

    Yields:
        With sampling, counts, int32 `(n, n_genes)`, of the next cells, and their library sizes; the cells of a prompt
        are consecutive. Else the expected log1p(CP10k), float32 `(n, n_genes)`, of the next prompts: one row for all
        cells of a prompt.
    """
    drawn = len(sizes) if do_sample else 1
    # The draws of a cell are its own, so that the many cells of a prompt may be drawn in parts.
    batch_size = 1 if drawn > GENERATED_CELLS else max(1, batch_size // drawn)
    genes = torch.from_numpy(gene_ids).to(model.device)
    parts = [
        (prompts[start : start + batch_size], range(first, min(first + GENERATED_CELLS, drawn)))
        for start in range(0, len(prompts), batch_size)
        for first in range(0, drawn, GENERATED_CELLS)
    ]
    for batch, numbers in logging.tqdm(parts, desc="Generating", unit="batch", disable=len(parts) < 2):
        library_size = np.tile(sizes[numbers], len(batch))
        values = np.zeros((len(library_size), len(gene_ids)), dtype=np.int32 if do_sample else np.float32)
        inputs = processor(text=[processor.render_prompt("generate", text=prompt) for prompt in batch])
        inputs = inputs.to(model.device)
        for turn, columns in enumerate(turns):
            with torch.inference_mode():
                output = model.generate_cells(
                    **inputs,
                    target_gene_ids=cast(torch.LongTensor, genes[torch.from_numpy(columns)]),
                    library_size=torch.from_numpy(library_size).to(model.device),
                    num_return_cells=len(numbers),
                    do_sample=do_sample,
                    seed=seed + turn,
                    cell_ids=[cell_id(prompt, number) for prompt in batch for number in numbers],
                )
            decoded = output["counts"] if do_sample else output["expression"].float()
            values[:, columns] = decoded.cpu().numpy()
        yield values, library_size


def cell_ids_of(prompts: Sequence[str], n_cells: int) -> np.ndarray:
    """Identities of the cells of all prompts, uint64 `(n,)`; those of a prompt are consecutive."""
    return np.array([cell_id(prompt, number) for prompt in prompts for number in range(n_cells)], dtype=np.uint64)


def cell_id(prompt: str, number: int) -> int:
    """A 63-bit identity of the n-th cell of a prompt, which does not depend on the other prompts."""
    digest = hashlib.blake2b(f"{number}\n{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
