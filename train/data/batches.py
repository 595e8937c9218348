"""Finished batches as a `datasets.IterableDataset`: [`BatchDataset`], the dataset of every trainer of this package.

```python
stream = CellStream("corpus", batch_size=64, rank=rank, world_size=world_size)
dataset = BatchDataset(stream, collate)
loader = DataLoader(dataset, batch_size=None)       # one example is one batch
```

With a plain `transformers.Trainer`, or TRL's trainers:

```python
arguments = TrainingArguments(
    per_device_train_batch_size=1,                   # one example is one batch
    remove_unused_columns=False,
    accelerator_config={"dispatch_batches": False},  # each rank loads its own share
)
trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=operator.itemgetter(0))
```

**Ranks.** A dataset has the batches of its stream's rank. If the stream was opened for one process,
`dataset.shard(n, r)` is the share of rank `r` of `n`; accelerate calls `shard` on every rank of a plain `Trainer`.
(`datasets.distributed.split_dataset_by_node` also works, but decodes the whole epoch on every rank.)

**Epochs** of the dataset all have `len(dataset)` batches, because trainers take the length once. With balancing or
token budgets, epochs of the order differ in length. Epoch `e` of the dataset then begins after `e * len(dataset)`
batches of the order; no batch is lost or repeated.

**Resuming** is exact in every epoch. A plain `Trainer` collates the batches that precede the checkpoint, and discards
them. The trainers of this package call [`BatchDataset.skim`], which skips them without collating. In a custom loop,
`state_dict` holds the position.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, Self

import datasets
import torch
from datasets.iterable_dataset import ExamplesIterable

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.blocks import Obs, results_ahead


class CellSource(Protocol):
    """Source of the cells of batches: [`CellStream`], [`StreamedCells`], or [`LabelledCells`] from memory."""

    rank: int

    @property
    def world_size(self) -> int: ...  # noqa: D102 - as in `CellStream`

    @property
    def n_cells(self) -> int: ...  # noqa: D102

    def __len__(self) -> int: ...

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[Cells, Obs, int], None, None]: ...  # noqa: D102

    def for_rank(self, rank: int, world_size: int) -> Self: ...  # noqa: D102

    def identity(self) -> dict: ...  # noqa: D102


class BatchDataset(datasets.IterableDataset, torch.utils.data.IterableDataset):
    """Finished batches of a source of cells; a thread collates up to three batches ahead of the consumer.

    Args:
        source: The cells.
        collate: `collate(cells, obs, epoch=...)` returns the model's inputs by name. The thread has a copy of
            `collate`, because tokenizers must not be used by two threads at a time.
    """

    def __init__(self, source: CellSource, collate: Callable[..., Mapping[str, Any]]) -> None:
        self.source = source
        self.collate: Any = collate  # `Any`, since callers use members of their own collators
        self.n_cells_read = 0  # cells of all batches so far, over all epochs
        self._step = 0  # batches that this epoch has yielded
        self._goes_on = False  # whether the next iteration begins at `_step` instead of 0
        self._n_skimmed = 0  # empty batches at the start of the next iteration
        super().__init__(ExamplesIterable(self._examples, {}))

    def __len__(self) -> int:
        """Batches of this rank in every epoch."""
        return len(self.source)

    @property
    def n_cells(self) -> int:
        """Cells of an epoch, over all ranks."""
        return self.source.n_cells

    @property
    def num_shards(self) -> int:
        """Most ranks that can share the dataset."""
        return max(self.source.world_size, len(self))

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> "BatchDataset":
        """Return the share of rank `index` of `num_shards`; a dataset that already is this share returns itself."""
        own = self.source.rank, self.source.world_size
        if own == (index, num_shards):
            return self
        if own != (0, 1):
            raise ValueError(
                f"This dataset is the share of rank {own[0]} of {own[1]} and can't be divided again. Call `shard` on "
                "the dataset of a single process."
            )
        return self._over(self.source.for_rank(index, num_shards))

    def of_all_ranks(self) -> "BatchDataset":
        """Return all batches, undivided, for every rank."""
        return self._over(self.source.for_rank(0, 1))

    def _over(self, source: CellSource) -> "BatchDataset":
        return BatchDataset(source, self.collate)

    # Position

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which seeds order and random draws. A loaded position in the same epoch is kept."""
        if epoch != self.epoch:
            self._step, self._goes_on = 0, False
        super().set_epoch(epoch)

    def skim(self, n_batches: int) -> None:
        """Let the next iteration yield `n_batches` empty batches first, for a consumer that discards them."""
        self._n_skimmed = n_batches

    def state_dict(self) -> dict:
        """Position, and the settings that give the position its meaning, as JSON types; the same on all ranks."""
        return {"epoch": self.epoch, "step": self._step, **self.source.identity()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved position: the next iteration begins with the first batch that was not yet yielded.

        A position of a stream with other settings or other cells is refused.
        """
        for name, value in self.source.identity().items():
            if state_dict.get(name, value) != value:
                raise ValueError(
                    f"The state was saved with {name}={state_dict[name]!r}, but this stream has {value!r}: the saved "
                    "position stands for other cells. Use the same setting, or start an epoch with `set_epoch`."
                )
        self.set_epoch(int(state_dict["epoch"]))
        self._step, self._goes_on = int(state_dict["step"]), True

    # Iteration

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        start = self._step if self._goes_on else 0
        n_skimmed = self._n_skimmed
        self._step, self._goes_on, self._n_skimmed = start, False, 0
        batches = self._make_ahead(start + n_skimmed)
        worker = torch.utils.data.get_worker_info()
        own = batches if worker is None else itertools.islice(batches, worker.id, None, worker.num_workers)
        try:
            for n_cells, batch in itertools.chain(itertools.repeat((0, {}), n_skimmed), own):
                self._step += 1
                self.n_cells_read += n_cells
                yield batch
        finally:
            batches.close()

    def make_batch(self, collate: Any, cells: Cells, obs: Obs, *, epoch: int, number: int) -> Mapping[str, Any]:
        """Collate one batch, in the thread; `number` counts the batches of this rank from the start of epoch 0."""
        return collate(cells, obs, epoch=epoch)

    def _make_ahead(self, start: int) -> Generator[tuple[int, Mapping[str, Any]], None, None]:
        """Yield the number of cells and the model inputs of each batch, in order."""
        collate = copy.deepcopy(self.collate)

        def make(number: int, cells: Cells, obs: Obs, epoch: int) -> tuple[int, Mapping[str, Any]]:
            return len(cells), self.make_batch(collate, cells, obs, epoch=epoch, number=number)

        source, executor = self.source.batches(self.epoch, start), ThreadPoolExecutor(1)
        numbered = enumerate(source, self.epoch * len(self) + start)
        try:
            yield from results_ahead(executor, (functools.partial(make, n, *batch) for n, batch in numbered), 3)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            source.close()

    def _examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Numbered batches, for the datasets that `map` and other methods derive from this dataset."""
        yield from enumerate(iter(self))
