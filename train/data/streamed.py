"""Cells of a streamed dataset in the order of the dataset: [`StreamedCells`].

```python
cells = load_dataset("me/corpus", split="train", streaming=True).shuffle(seed=0, buffer_size=10_000)
dataset = BatchDataset(open_cells(cells, batch_size=64), collate)
```
"""

import dataclasses
from collections.abc import Generator
from typing import Any

import datasets
import numpy as np

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.blocks import Obs, check_columns, table_to_examples
from scmmgpt.train.data.corpus import OBS_COLUMNS
from scmmgpt.train.data.stream import CellStream


# Settings of `CellStream` that a streamed dataset, which has its own order, does not take.
ORDER_OF_CELLS = ("shuffle", "balance", "token_budget", "max_genes", "temperature", "seed")


@dataclasses.dataclass
class StreamedCells:
    """A streamed dataset as a source of batches.

    A step takes the next `batch_size * world_size` rows; rank `r` gets the `r`-th `batch_size` rows of them, as in
    transformers' `Trainer`. If `shuffle` was called on the dataset, every epoch has another order. Resuming reads the
    epoch up to the saved position without collating; the position is exact if the dataset yields the same rows again.

    Args:
        dataset: A `datasets.IterableDataset` with a cell in every row; see [`table_to_examples`].
        columns: See [`CellStream`].
        n_cells: Rows of an epoch; default: one pass over the dataset counts the rows.

    Raises:
        ValueError: If the dataset lacks a column of cells, or has too few cells for one batch on every rank.
    """

    dataset: datasets.IterableDataset
    batch_size: int
    columns: list[str] | None = None
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    n_cells: int = 0

    def __post_init__(self) -> None:
        names = self.dataset.column_names  # None after `map`, which may change them
        if names is not None:
            check_columns(names)
        if not self.n_cells:
            rows = self.dataset if names is None else self.dataset.select_columns(["cell_id"])
            self.n_cells = sum(len(table) for table in rows.with_format("arrow").iter(4096))
        if not len(self):
            raise ValueError(
                f"The dataset has {self.n_cells} cells, which make no batch of {self.batch_size} for each of "
                f"{self.world_size} processes. Lower batch_size, or keep the last batch."
            )

    def __len__(self) -> int:
        step = self.batch_size * self.world_size
        return self.n_cells // step if self.drop_last else -(-self.n_cells // step)

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[Cells, Obs, int], None, None]:
        """Yield cells, annotations and the epoch, from batch `start` of an epoch to its end."""
        tables = self.dataset.with_format("arrow")
        tables.set_epoch(epoch)
        for number, table in enumerate(tables.iter(self.batch_size * self.world_size)):
            if number < start:
                continue
            if number >= len(self):
                break
            size = self.batch_size
            if len(table) < size * self.world_size:  # in the last step, too, all ranks get the same number of cells
                size = -(-len(table) // self.world_size)
                table = table.take(np.resize(np.arange(len(table)), size * self.world_size))
            yield *self._read(table.slice(self.rank * size, size)), epoch

    def _read(self, table: Any) -> tuple[Cells, Obs]:
        names = self.columns
        if names is None:
            known = [name for name in OBS_COLUMNS if name != "barcode"]
            others = [name for name in table_to_examples(table.slice(0, 1))[1] if name not in known]
            names = known + others
        return table_to_examples(table, names)

    def for_rank(self, rank: int, world_size: int) -> "StreamedCells":
        """Return the share of rank `rank` of `world_size` of the same cells."""
        return dataclasses.replace(self, rank=rank, world_size=world_size)

    def identity(self) -> dict:
        """Settings that determine which cells a position in an epoch stands for."""
        names = ("batch_size", "drop_last", "world_size", "n_cells")
        return {name: getattr(self, name) for name in names}


def open_cells(cells: Any, split: str = "train", **settings: Any) -> CellStream | StreamedCells:
    """Open a corpus, a map-style dataset or a streamed dataset as a source of batches.

    `cells` and `settings` are those of [`CellStream`]. A `datasets.IterableDataset` keeps its own order: settings of
    `ORDER_OF_CELLS` have no effect, except that `balance` and `token_budget`, which need random access, are refused.
    """
    if not isinstance(cells, datasets.IterableDataset):
        return CellStream(cells, split, **settings)
    for name in ("balance", "token_budget"):
        if settings.get(name) is not None:
            raise ValueError(
                f"{name} is {settings[name]!r}, but a streamed dataset has no random access. Pass a corpus or a "
                f"map-style dataset, or leave {name} out."
            )
    return StreamedCells(cells, **{name: value for name, value in settings.items() if name not in ORDER_OF_CELLS})
