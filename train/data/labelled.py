"""Labelled cells in memory: [`CellTable`], from a file or from datasets, and [`LabelledBatches`] to train on."""

import dataclasses
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


READ_AT_ONCE = 4096  # cells per read of a dataset


@dataclasses.dataclass
class CellTable:
    """Annotated cells, and the keyword arguments of [`read_cells`] that turn them into [`Cells`]."""

    adata: anndata.AnnData
    options: Mapping[str, Any]
    cell_ids: np.ndarray | None = None  # see `Cells`; default: as `read_cells` derives them from `adata`
    total_counts: np.ndarray | None = None  # likewise
    n_train: int | None = None  # number of training rows, which come first; the others are held out. None: not split

    def read(self, gene_index: GeneIndex) -> Cells:
        """Convert the cells to raw counts of the genes of `gene_index`."""
        cells, _ = read_cells(self.adata, gene_index, **self.options)
        given = {"cell_ids": self.cell_ids, "total_counts": self.total_counts}
        return dataclasses.replace(cells, **{name: value for name, value in given.items() if value is not None})

    def measured(self, gene_index: GeneIndex) -> np.ndarray:
        """Ids of the genes of `gene_index` that the cells measure, ascending int32 `(n_genes,)`."""
        ids = choose_input(self.adata, gene_index, **self.options).match.ids
        return np.unique(ids[ids >= 0])


def open_table(source: str, options: Mapping[str, Any], cells: Mapping[str, Any] | None = None) -> CellTable:
    """Open the cells of a file, of a corpus, or of datasets.

    Args:
        source: File of cells, or a corpus: its training split is read, and its validation split is held out.
        options: Keyword arguments of [`read_cells`].
        cells: Split -> dataset that replaces the cells of the corpus `source`; see [`open_cells`]. The `gene_ids` of
            the dataset are ids of the corpus's vocabulary. The split "validation" is held out.
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
    """AnnData of raw counts; its genes are those with a count in any cell, in the order of the vocabulary."""
    symbols = corpus.gene_symbols
    counts = cells.to_csr(len(symbols)).astype(np.float32)
    occur = np.flatnonzero(counts.getnnz(axis=0))
    obs = obs.set_axis(cells.cell_ids.astype(str), axis=0)
    return anndata.AnnData(counts[:, occur], obs=obs, var=pd.DataFrame(index=symbols[occur].astype(str)))


@dataclasses.dataclass
class LabelledCells:
    """Cells in memory, with the index of each cell's label, int64 `(n_cells,)`, as a source of batches.

    The seed is that of the order, which differs between epochs; `None` keeps the cells in their order.
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
        """Yield cells, their `target`s, and the epoch that seeds random draws; without a seed, this epoch is 0."""
        order = np.arange(self.n_cells)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        # All ranks take the same number of steps. If the cells do not divide evenly, a few cells occur twice.
        per_rank = -(-len(order) // self.world_size)
        own = np.resize(order, per_rank * self.world_size)[self.rank :: self.world_size]
        for step in range(start, len(self)):
            rows = own[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.cells[rows], {"target": self.targets[rows]}, 0 if self.seed is None else epoch

    def for_rank(self, rank: int, world_size: int) -> "LabelledCells":
        """Return the share of rank `rank` of `world_size` of the same cells."""
        return dataclasses.replace(self, rank=rank, world_size=world_size)

    def identity(self) -> dict:
        """Settings that determine which cells a position in an epoch stands for."""
        return {"batch_size": self.batch_size, "seed": self.seed, "world_size": self.world_size}


class LabelledBatches(BatchDataset):
    """Batches of [`LabelledCells`] as model inputs; every batch also holds the `texts` of all labels."""

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
