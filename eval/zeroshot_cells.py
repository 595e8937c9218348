"""Generate cells of labels without training cells from the texts of the labels.

For each left-out label, cell states (`scmmgpt.train.states`, as in `tune`) are fitted to the cells of the other labels
and the embeddings of their texts. The text of the left-out label then generates cells. The measures are those of
`scmmgpt.eval generation`. The rows "mean profile + Poisson" and "real training cells" use cells of the left-out label;
the rows "ridge + Poisson" and "cells of the nearest text" do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from scmmgpt.cells_scmmgpt import log1p_cp10k
from scmmgpt.eval import generation, results
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.train.states import TextedCells, fit_states, new_states
from scmmgpt.unseen_scmmgpt import predict_centroids


NUM_COMPONENTS = 16  # as in the small configurations of `tune`

Cells = tuple[np.ndarray, np.ndarray]  # counts `(n, n_genes)` and library sizes `(n,)`


@dataclass(frozen=True)
class Prompt:
    """A left-out label with its text, and the cells of the other labels."""

    train: LabelledCells  # cells of the other labels
    of_cell: np.ndarray  # label of each cell, a row of `texts`, int64 `(n_cells,)`
    texts: np.ndarray  # unit-length embeddings of the texts of all labels, float64 `(n_labels, width)`
    left_out: int  # row of the left-out label in `texts`

    @property
    def seen(self) -> np.ndarray:
        """Labels with training cells, ascending int64."""
        return np.unique(self.of_cell)


def from_states(prompt: Prompt, n: int, seed: int) -> Cells:
    """Draw cells from cell states fitted to the training cells and their texts."""
    train = prompt.train
    torch.manual_seed(seed)
    states = new_states(len(train.genes), NUM_COMPONENTS, prompt.texts.shape[1])
    features = torch.from_numpy(prompt.texts.astype(np.float32))
    fit_states(states, TextedCells(train.counts, train.total_counts, features, prompt.of_cell[:, None]), seed=seed)
    return states.sample(features[[prompt.left_out]].expand(n, -1), np.arange(n), seed=seed)


def by_ridge(prompt: Prompt, n: int, seed: int) -> Cells:
    """Draw Poisson counts around the profile predicted from the text, with library sizes of training cells."""
    rng, train = np.random.default_rng(seed), prompt.train
    cells = [train.take(np.flatnonzero(prompt.of_cell == label)) for label in prompt.seen]
    shares = np.stack([np.asarray(own.counts.sum(axis=0)).ravel() / own.total_counts.sum() for own in cells])
    texts = prompt.texts[prompt.seen], prompt.texts[[prompt.left_out]]
    profile = predict_centroids(shares, *texts)[0].clip(min=0)
    sizes = rng.choice(train.total_counts, n)
    return rng.poisson(sizes[:, None] * profile / profile.sum()), sizes


def of_nearest_text(prompt: Prompt, n: int, seed: int) -> Cells:
    """Draw training cells of the label with the most similar text."""
    nearest = prompt.seen[(prompt.texts[prompt.seen] @ prompt.texts[prompt.left_out]).argmax()]
    rows = np.random.default_rng(seed).choice(np.flatnonzero(prompt.of_cell == nearest), n)
    return prompt.train.counts[rows].toarray(), prompt.train.total_counts[rows]


SYSTEMS: dict[str, Callable[[Prompt, int, int], Cells]] = {
    results.MODEL_NAME: from_states,
    "ridge + Poisson": by_ridge,
    "cells of the nearest text": of_nearest_text,
}


def labelled(adata: AnnData, labels: np.ndarray) -> LabelledCells:
    """Convert an AnnData with counts in `X`, and labels `(n_obs,)`, to [`LabelledCells`]."""
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    names = adata.obs_names.to_numpy().astype(str)
    return LabelledCells(counts, totals, adata.var_names.to_numpy().astype(str), labels, names, {})


def evaluate_cells(
    train: LabelledCells, test: LabelledCells, names: Sequence[str], texts: np.ndarray, n_cells: int, seed: int
) -> dict:
    """Leave out each label in turn, generate cells from its text, and evaluate the cells of all labels together.

    Args:
        train, test: Cells of all labels, over the same genes.
        names: The labels.
        texts: Unit-length embeddings of the texts of the labels, float64 `(n_labels, width)`.
        n_cells: Cells to generate for each label.
        seed: Seed of all random draws.

    Returns:
        As [`generation.evaluate_generation`].
    """
    targets = np.array([list(names).index(label) for label in train.labels])
    parts: dict[str, list[Cells]] = {system: [] for system in SYSTEMS}
    for left_out in range(len(names)):
        kept = np.flatnonzero(targets != left_out)
        prompt = Prompt(train.take(kept), targets[kept], texts, left_out)
        for system, draw in SYSTEMS.items():
            parts[system].append(draw(prompt, n_cells, seed))
    prompts = np.repeat(np.asarray(names), n_cells)
    generated = {}
    for system, pieces in parts.items():
        counts, sizes = (np.concatenate(of) for of in zip(*pieces, strict=True))
        generated[system] = generation.GeneratedCells(log1p_cp10k(counts, sizes), prompts, train.genes, sizes)
    ours = generated.pop(results.MODEL_NAME)
    others = {system: (results.BASELINE, cells) for system, cells in generated.items()}
    return generation.evaluate_generation(ours, train, test, others=others, seed=seed)
