"""Batches of labelled cells in memory: what `finetune` trains on and validates with."""

import copy
from collections.abc import Generator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.batches import BatchDataset


class LabelledBatches(BatchDataset):
    """Inputs of labelled cells, and the texts of all labels in every batch.

    Args:
        processor: Makes every input.
        cells: The cells.
        targets: int64 `(n_cells,)`.
        texts: Of all labels.
        batch_size: Cells per batch.
        seed: Of the order, which is another one in every epoch; `None` keeps the cells in theirs.
        rank, world_size: This process, of how many.
    """

    def __init__(
        self,
        processor: ScMMGPTProcessor,
        cells: Cells,
        targets: np.ndarray,
        texts: Sequence[str],
        *,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.targets = torch.from_numpy(targets)
        self.text_inputs = dict(processor(qformer_text=list(texts)))
        source = LabelledCells(cells, targets, batch_size, seed, rank, world_size)
        super().__init__(source, partial(collate_labelled, processor, self.text_inputs))


class LabelledCells:
    """The source of [`LabelledBatches`]; see there for the arguments."""

    def __init__(
        self, cells: Cells, targets: np.ndarray, batch_size: int, seed: int | None, rank: int, world_size: int
    ) -> None:
        self.cells, self.targets, self.n_cells = cells, targets, len(cells)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size

    def __len__(self) -> int:
        per_rank = -(-self.n_cells // self.world_size)
        return -(-per_rank // self.batch_size)

    def batches(
        self, epoch: int = 0, start: int = 0
    ) -> Generator[tuple[Cells, dict[str, np.ndarray], int], None, None]:
        """Cells, their `target`s, and the epoch of their random draws: always the same one without a seed."""
        order = np.arange(self.n_cells)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        # Every rank takes as many steps; the last ones repeat a few cells where the number does not divide.
        per_rank = -(-len(order) // self.world_size)
        own = np.resize(order, per_rank * self.world_size)[self.rank :: self.world_size]
        for step in range(start, len(self)):
            rows = own[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.cells[rows], {"target": self.targets[rows]}, 0 if self.seed is None else epoch

    def for_rank(self, rank: int, world_size: int) -> "LabelledCells":
        """The same cells as another rank reads them."""
        other = copy.copy(self)
        other.rank, other.world_size = rank, world_size
        return other

    def identity(self) -> dict:
        """What a position within an epoch depends on."""
        return {"batch_size": self.batch_size, "seed": self.seed, "world_size": self.world_size}


def collate_labelled(
    processor: ScMMGPTProcessor,
    text_inputs: Mapping[str, torch.Tensor],
    cells: Cells,
    obs: Mapping[str, np.ndarray],
    *,
    epoch: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs of the model, and `labels` int64 `(n_cells,)`."""
    return {**processor(cells=cells, epoch=epoch), **text_inputs, "labels": torch.from_numpy(obs["target"])}
