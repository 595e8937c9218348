"""Generation of expression profiles from prompts.

1. `labels_and_prompts`, `target_genes`, `library_sizes`, `decide_sampling`: checks of the arguments.
2. `draw_cells` draws from the cell states of a checkpoint. A checkpoint without cell states uses `decode_cells`, which
   runs the language model for each prompt and for some genes at a time.

The draws of a cell depend only on the seed, the prompt, and the number of the cell.
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

MAX_LIBRARY = 1e8  # counts, which are int32
LEAST_OF_LIBRARY = 0.5  # a cell with a smaller share of its library in the model's genes resembles a cell of a panel
DRAWN_AT_ONCE = 256  # cells of one draw from cell states: their rates over all genes are in memory
GENERATED_CELLS = 1024  # cells of one prompt in one run of the language model, of n_genes x 8 bytes each


def labels_and_prompts(prompts: str | Sequence[str] | dict[str, str]) -> tuple[list[str], list[str]]:
    """Labels (the keys of a dict, else none) and texts of the prompts.

    Raises:
        ValueError: If there is no prompt, or a prompt is empty.
    """
    labels = list(prompts) if isinstance(prompts, dict) else []
    texts = [prompts] if isinstance(prompts, str) else list(prompts.values() if isinstance(prompts, dict) else prompts)
    n_empty = sum(not text.strip() for text in texts)
    if n_empty or not texts:
        which = f"{n_empty:,} of {len(texts):,} prompts {'is' if n_empty == 1 else 'are'} empty"
        which = which if len(texts) > 1 else "The prompt is empty"
        which = which if texts else "There is no prompt"
        raise ValueError(f"{which}: describe a cell, such as 'a B cell from blood'.")
    return labels, texts


def warn_of_unknown_types(prompts: Sequence[str], annotation: Mapping[str, Any]) -> None:
    """Warn of prompts that name no trained cell type: the vocabulary may lack the genes of another type.

    Args:
        prompts: Texts of the prompts.
        annotation: `config.annotation`. Without `labels` there is no warning.
    """
    labels = list(annotation.get("labels", {}))
    unknown = [text for text in prompts if not names_known_type(text, labels, annotation.get("terms", []))]
    if labels and unknown:
        few = f"{unknown[0]!r} names"
        several = f"{len(unknown):,} of {len(prompts):,} prompts, such as {unknown[0]!r}, name"
        logger.warning(
            f"{few if len(unknown) == 1 else several} none of the {len(labels)} cell types that this checkpoint knows "
            f"(such as {', '.join(map(repr, labels[:3]))}): the cells are a guess, and the vocabulary may lack marker "
            "genes of another type."
        )


def warn_of_panels(counts: Any, sizes: np.ndarray) -> None:
    """Warn of generated cells with too few counts for their library size.

    Such cells resemble training cells of a targeted panel, which have no counts of other genes.

    Args:
        counts: CSR `(n_cells, n_genes)`: counts of all genes of the model.
        sizes: `(n_cells,)`: library sizes.
    """
    n_few = int((np.asarray(counts.sum(axis=1)).ravel() < LEAST_OF_LIBRARY * sizes).sum())
    if n_few:
        logger.warning(
            f"{n_few:,} of {len(sizes):,} cells {'holds' if n_few == 1 else 'hold'} less than half of the counts of "
            "the library: such cells resemble training cells of a panel of few genes. Leave them out, or try a prompt "
            "without a tissue."
        )


def decide_sampling(config: ScMMGPTConfig, do_sample: bool | None, n_cells: int) -> bool:
    """Whether counts are sampled: `do_sample`, by default True if the checkpoint predicts a distribution.

    Raises:
        ValueError: If sampling is requested and the checkpoint predicts means.
    """
    can_sample = config.num_state_components is not None or config.expression_head != "mse"
    do_sample = can_sample if do_sample is None else bool(do_sample)
    if do_sample and not can_sample:
        raise ValueError("A mean (expression_head='mse') cannot be sampled; pass do_sample=False.")
    if n_cells > 1 and not do_sample:
        logger.warning(f"Without sampling, the {n_cells} cells of a prompt are equal: every cell is the mean.")
    return do_sample


def target_genes(processor: ScMMGPTProcessor, genes: str | Sequence[str] | None) -> np.ndarray:
    """Vocabulary ids of the genes to generate, int64 `(n_genes,)`; by default all genes, ascending.

    Raises:
        ValueError: If no gene is given, a gene is unknown, or a gene is given twice.
    """
    if genes is None:
        return np.sort(np.asarray(list(processor.gene_index.vocabulary.values()), dtype=np.int64))
    genes = [genes] if isinstance(genes, str) else list(genes)
    if not genes:
        raise ValueError("genes is empty; name at least one gene, or pass None for the whole vocabulary.")
    ids = processor.gene_ids_of(genes)
    unique, first = np.unique(ids, return_index=True)
    if len(unique) < len(ids):
        repeated = sorted({genes[i] for i in set(range(len(ids))) - set(first.tolist())})
        raise ValueError(f"{len(ids) - len(unique)} genes are named twice: {repeated[:5]}; name each gene once.")
    return ids


def gene_turns(n_genes: int, max_genes: int) -> list[np.ndarray]:
    """Columns that are decoded together in each turn: turns of nearly equal size, each spread over all genes."""
    n_turns = math.ceil(n_genes / max_genes)
    return [np.arange(turn, n_genes, n_turns) for turn in range(n_turns)]


def library_sizes(library_size: float | np.ndarray, n_cells: int) -> np.ndarray:
    """Library sizes (total counts) of the cells of a prompt, float32 `(n_cells,)`.

    Raises:
        ValueError: If a library size is not positive, or above `MAX_LIBRARY`.
    """
    sizes = np.broadcast_to(np.asarray(library_size, dtype=np.float32), (n_cells,)).copy()
    if wrong := sizes[~((sizes > 0) & (sizes <= MAX_LIBRARY))].tolist():
        raise ValueError(f"library_size must be positive and at most {MAX_LIBRARY:,.0f}, but holds {wrong[0]:g}.")
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
    """Draw cell states, library sizes and counts, in chunks of cells.

    Args:
        states: The cell states of the checkpoint.
        text_features: `(len(prompts), projection_dim)`: features of the prompts.
        prompts: Texts of the prompts.
        n_cells: Number of cells per prompt.
        gene_ids: int64 `(n_genes,)`: vocabulary ids of the genes.
        sizes: `(n_cells,)`: library sizes of the cells of each prompt; None draws library sizes.
        seed: Seed of the draws.

    Yields:
        Counts, int32 `(n, n_genes)`, and library sizes, float32 `(n,)`, of the next n cells. The cells of a prompt are
        consecutive.
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
    """Compare the cells that [`draw_cells`] draws with training cells.

    Returns:
        The distance of each cell to the nearest training cell (see [`ScMMGPTCellStates.compare`]), `(n,)`; the
        variance of the states of each prompt, divided by the variance of training cells around the means of their
        texts, `(len(prompts),)`, NaN for one cell. None if the checkpoint stores no states of training cells.
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
    """Decode the expression of genes with the language model, in chunks of cells.

    Args:
        model, processor: The checkpoint.
        prompts: Texts of the prompts.
        gene_ids: int64 `(n_genes,)`: vocabulary ids of the genes.
        turns: The result of [`gene_turns`].
        sizes: float32 `(n_cells,)`: library sizes of the cells of each prompt.
        do_sample: Whether counts are sampled.
        seed: Seed of the draws.
        batch_size: Cells per batch.

    Yields:
        With sampling: counts, int32 `(n, n_genes)`, and library sizes, `(n,)`, of the next n cells. The cells of a
        prompt are consecutive. Without sampling: the expected log1p(CP10k), float32 `(n, n_genes)`, and library sizes,
        with one row for each of the next n prompts.
    """
    drawn = len(sizes) if do_sample else 1
    # Cells are drawn independently, so the cells of a prompt can be drawn in parts.
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
    """Cell ids for all prompts, uint64 `(n,)`; ids of one prompt are consecutive in the array."""
    return np.array([cell_id(prompt, number) for prompt in prompts for number in range(n_cells)], dtype=np.uint64)


def cell_id(prompt: str, number: int) -> int:
    """A 63-bit id of a cell, hashed from the prompt and the number of the cell."""
    digest = hashlib.blake2b(f"{number}\n{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
