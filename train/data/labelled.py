"""Batches of labelled cells in memory: [`LabelledBatches`], on which `finetune` trains and validates."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.blocks import Obs


@dataclasses.dataclass
class LabelledCells:
    """Cells in memory as a source of batches.

    Args:
        targets: Number of each cell's label, int64 `(n_cells,)`.
        seed: Seed of the order, which differs between epochs; `None` keeps the cells in their order.
        batch_size, rank, world_size: See [`CellStream`].
    """

    cells: Cells
    targets: np.ndarray
    batch_size: int
    seed: int | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def n_cells(self) -> int:
        """Cells of an epoch, over all ranks."""
        return len(self.cells)

    def __len__(self) -> int:
        per_rank = -(-self.n_cells // self.world_size)
        return -(-per_rank // self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[Cells, Obs, int], None, None]:
        """Yield cells, their `target`s, and the epoch of random draws, which is always 0 without a seed."""
        order = np.arange(self.n_cells)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        # All ranks take equally many steps: where the division leaves a remainder, a few cells occur twice.
        per_rank = -(-len(order) // self.world_size)
        own = np.resize(order, per_rank * self.world_size)[self.rank :: self.world_size]
        for step in range(start, len(self)):
            rows = own[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.cells[rows], {"target": self.targets[rows]}, 0 if self.seed is None else epoch

    def for_rank(self, rank: int, world_size: int) -> "LabelledCells":
        """The same cells in the share of another rank."""
        return dataclasses.replace(self, rank=rank, world_size=world_size)

    def identity(self) -> dict:
        """Settings that a position in an epoch depends on."""
        return {"batch_size": self.batch_size, "seed": self.seed, "world_size": self.world_size}


class LabelledBatches(BatchDataset):
    """Inputs of labelled cells, and the texts of all labels in every batch.

    Args:
        cells, targets, order: See [`LabelledCells`]; `order` needs `batch_size`.
        texts: Text of every label.
    """

    def __init__(
        self, processor: ScMMGPTProcessor, cells: Cells, targets: np.ndarray, texts: Sequence[str], **order: Any
    ) -> None:
        self.targets = torch.from_numpy(targets)
        self.text_inputs = dict(processor(qformer_text=list(texts)))
        source = LabelledCells(cells, targets, **order)
        super().__init__(source, partial(collate_labelled, processor, self.text_inputs))


def collate_labelled(
    processor: ScMMGPTProcessor, text_inputs: Mapping[str, torch.Tensor], cells: Cells, obs: Obs, *, epoch: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of the model, and `labels` int64 `(n_cells,)`."""
    return {**processor(cells=cells, epoch=epoch), **text_inputs, "labels": torch.from_numpy(obs["target"])}
