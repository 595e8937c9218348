"""Labelled cells in memory: [`CellTable`], from a file or from datasets, and [`LabelledBatches`] to train on."""

import dataclasses
import logging
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.readers.cell_files import read_file
from scmmgpt.reading_scmmgpt import choose_input, read_cells
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.blocks import Obs
from scmmgpt.train.data.corpus import Corpus, open_corpus
from scmmgpt.train.data.streamed import open_cells


logger = logging.getLogger(__name__)

READ_AT_ONCE = 4096  # cells of a dataset


@dataclasses.dataclass
class CellTable:
    """Cells with annotations, and how to read them.

    Args:
        adata: The cells.
        options: Of [`read_cells`].
        cell_ids, total_counts: See [`Cells`]; by default those that [`read_cells`] finds.
        n_train: First rows, which are for training, where the others are to be held out; `None` leaves that open.
    """

    adata: anndata.AnnData
    options: Mapping[str, Any]
    cell_ids: np.ndarray | None = None
    total_counts: np.ndarray | None = None
    n_train: int | None = None

    def read(self, gene_index: GeneIndex) -> Cells:
        """The cells in another vocabulary."""
        cells, _ = read_cells(self.adata, gene_index, **self.options)
        kept = {"cell_ids": self.cell_ids, "total_counts": self.total_counts}
        return dataclasses.replace(cells, **{name: value for name, value in kept.items() if value is not None})

    def measured(self, gene_index: GeneIndex) -> np.ndarray:
        """Ids of the measured genes in a vocabulary, ascending."""
        ids = choose_input(self.adata, gene_index, **self.options).match.ids
        return np.unique(ids[ids >= 0])


def open_table(source: str, options: Mapping[str, Any], cells: Mapping[str, Any] | None = None) -> CellTable:
    """The cells of a file, of a corpus, or of datasets.

    Args:
        source: File of cells; or corpus, whose training cells are read, and whose validation cells are held out.
        options: Of [`read_cells`].
        cells: Split -> dataset in place of the cells of the corpus `source`; see [`open_cells`]. Its `gene_ids` are of
            the corpus's vocabulary. A split "validation" is held out.
    """
    if cells is None and not Path(source, "manifest.json").is_file():
        return CellTable(read_file(source), options)
    corpus = open_corpus(source)
    if cells is None:
        cells = dict.fromkeys(corpus.split_names, corpus)
    if "train" not in cells:
        raise ValueError(f"There is no split 'train' to train on; the splits are {list(cells)}. Add it.")
    parts = [_read_split(cells[split], split) for split in ("train", "validation") if cells.get(split) is not None]
    both = Cells.concatenate([part for part, _ in parts])
    obs = pd.concat([table for _, table in parts], ignore_index=True)
    adata = _to_adata(both, obs, corpus)
    n_train = len(parts[0][0]) if len(parts) > 1 else None
    return CellTable(adata, options, both.cell_ids, both.library_sizes(), n_train)


def _read_split(cells: Any, split: str) -> tuple[Cells, pd.DataFrame]:
    """All cells of a split in their own order, and their annotations."""
    source = open_cells(cells, split, batch_size=READ_AT_ONCE, shuffle=False)
    batches = [(batch, pd.DataFrame(obs)) for batch, obs, _ in source.batches()]
    return Cells.concatenate([batch for batch, _ in batches]), pd.concat([obs for _, obs in batches])


def _to_adata(cells: Cells, obs: pd.DataFrame, corpus: Corpus) -> anndata.AnnData:
    """Counts of the genes that occur, in the order of the corpus's vocabulary."""
    symbols = corpus.gene_symbols
    counts = cells.to_csr(len(symbols)).astype(np.float32)
    occur = np.flatnonzero(counts.getnnz(axis=0))
    obs = obs.set_axis(cells.cell_ids.astype(str), axis=0)
    return anndata.AnnData(counts[:, occur], obs=obs, var=pd.DataFrame(index=symbols[occur].astype(str)))


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
