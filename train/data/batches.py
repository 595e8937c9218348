"""Finished batches as a `datasets.IterableDataset`: [`BatchDataset`], which every trainer of this package reads.

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
    accelerator_config={"dispatch_batches": False},  # every rank reads its own share
)
trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=operator.itemgetter(0))
```

**Ranks.** A dataset reads the share of its stream's own rank. Of a stream that was opened for one process,
`dataset.shard(n, r)` reads the share of rank `r`; accelerate calls this for every rank of a plain `Trainer`.
(`datasets.distributed.split_dataset_by_node` gives each rank every n-th batch of the whole, which costs n times the
reading.)

**Epochs** all have as many batches as the first, `len(dataset)`, since trainers ask once. Where the order of the cells
has epochs of other lengths (balancing, token budgets), the batches simply go on: epoch `e` of the dataset begins after
`e * len(dataset)` batches of the order. No batch is lost and none comes twice.

**Resuming** is exact in every epoch. A plain `Trainer` makes the batches that were trained on and throws them away;
the trainers of this package call [`BatchDataset.skim`], which makes none of them. In a loop of your own, `state_dict`
holds the position.
"""

import collections
import copy
import itertools
import queue
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

import datasets
import torch
from datasets.iterable_dataset import ExamplesIterable

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train.data.blocks import Obs


class CellSource(Protocol):
    """Where the cells of batches come from: [`CellStream`], or anything that has the same few members."""

    rank: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def n_cells(self) -> int:
        """Cells of an epoch, over all ranks."""

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[Cells, Obs, int], None, None]:
        """Cells, annotations, and the epoch of their random draws, from batch `start` of an epoch to its end."""

    def for_rank(self, rank: int, world_size: int) -> Self:
        """The same cells as another rank reads them."""

    def identity(self) -> dict:
        """What a position within an epoch depends on, JSON-able."""


class BatchDataset(datasets.IterableDataset, torch.utils.data.IterableDataset):
    """Finished batches of a source of cells; they are made ahead of the consumer in threads.

    Args:
        source: The cells.
        collate: `collate(cells, obs, epoch=...)` returns the model's inputs by name. Each thread works with a copy,
            since tokenizers don't serve two threads at a time.
        workers: Threads that collate. Two results per thread wait.
    """

    def __init__(self, source: CellSource, collate: Callable[..., Mapping[str, Any]], *, workers: int = 1) -> None:
        self.source, self.workers = source, workers
        self.collate: Any = collate  # callers know its kind
        self.n_cells_read = 0  # in all epochs
        self._step = 0  # batches of this epoch that were handed out
        self._goes_on = False  # whether the next iteration begins at `_step`, not at the beginning
        self._n_skimmed = 0
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
        """Ranks that the dataset can be dealt out to."""
        return max(self.source.world_size, len(self))

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> "BatchDataset":
        """The share of rank `index` of `num_shards`; of a dataset that is this share already, itself."""
        own = self.source.rank, self.source.world_size
        if own == (index, num_shards):
            return self
        if own != (0, 1):
            raise ValueError(f"This dataset is the share of rank {own[0]} of {own[1]}; it can't be divided again.")
        return self._over(self.source.for_rank(index, num_shards))

    def of_all_ranks(self) -> "BatchDataset":
        """The batches that a single process would see: the same on every rank."""
        return self._over(self.source.for_rank(0, 1))

    def _over(self, source: CellSource) -> "BatchDataset":
        return BatchDataset(source, self.collate, workers=self.workers)

    # Position

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; its order and its random draws are its own. A position loaded within it is kept."""
        if epoch != self.epoch:
            self._step, self._goes_on = 0, False
        super().set_epoch(epoch)

    def skim(self, n_batches: int) -> None:
        """Let the next iteration yield empty batches in place of the first: whoever asks throws them away."""
        self._n_skimmed = n_batches

    def state_dict(self) -> dict:
        """The position, JSON-able and the same on all ranks, with what it depends on."""
        return {"epoch": self.epoch, "step": self._step, **self.source.identity()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go to a saved position: the next iteration yields what was not handed out before."""
        for name, value in self.source.identity().items():
            if state_dict.get(name, value) != value:
                raise ValueError(
                    f"The state was saved with {name}={state_dict[name]!r}, but this stream has {value!r}: the "
                    "position would mean other cells. Use the same setting, or start at an epoch with `set_epoch`."
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
        """Finish one batch, in a thread; `number` counts the batches of this rank from the beginning of epoch 0."""
        return collate(cells, obs, epoch=epoch)

    def _make_ahead(self, start: int) -> Generator[tuple[int, Mapping[str, Any]], None, None]:
        """Numbers of cells and finished batches, in order."""
        collators: queue.SimpleQueue[Callable] = queue.SimpleQueue()
        for _ in range(self.workers):
            collators.put(copy.deepcopy(self.collate))

        def make(number: int, cells: Cells, obs: Obs, epoch: int) -> tuple[int, Mapping[str, Any]]:
            collate = collators.get()
            try:
                return len(cells), self.make_batch(collate, cells, obs, epoch=epoch, number=number)
            finally:
                collators.put(collate)

        pending: collections.deque[Future] = collections.deque()
        numbers = itertools.count(self.epoch * len(self) + start)
        source, executor = self.source.batches(self.epoch, start), ThreadPoolExecutor(self.workers)
        try:
            for cells, obs, epoch in source:
                pending.append(executor.submit(make, next(numbers), cells, obs, epoch))
                if len(pending) > 2 * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            source.close()

    def _examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """For what `datasets` derives from this one, such as `map`."""
        yield from enumerate(iter(self))
