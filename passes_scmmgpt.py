"""Passes of a checkpoint over the cells of an AnnData, batch by batch.

The result of a cell does not depend on the batch, so a batch takes cells of similar length, in any order.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging

from .cells_scmmgpt import Cells, CellsHash
from .conversion_scmmgpt import InputChoice
from .evidence_scmmgpt import label_members
from .labels_scmmgpt import profiled_types, with_types
from .machine_scmmgpt import best_device
from .modeling_scmmgpt import ScMMGPTBridgeModel, ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from .processing_scmmgpt import ScMMGPTProcessor
from .receipt_scmmgpt import Signer
from .records_scmmgpt import record


logger = logging.get_logger(__name__)


CellFunction = Callable[[Cells], tuple[torch.Tensor, ...]]  # a batch of cells -> tensors with one row per cell
SORTED_CELLS = 4096  # cells that are sorted by length together, so that batches need little padding
LINEAR_BATCH = 512  # cells of a batch without padding: the size of a chunk of a file


def whole_number(value: Any, name: str) -> int:
    """A number of things, at least 1.

    Raises:
        TypeError: If the value is not an integer.
        ValueError: If the value is below 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number.") from None
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1.")
    return number


class CellPasses:
    """A checkpoint on a device, with passes over cells. [`ScMMGPTPipeline`] documents the arguments."""

    def __init__(
        self,
        model: ScMMGPTForConditionalGeneration | ScMMGPTForCellTextAlignment,
        processor: ScMMGPTProcessor,
        device: str | int | torch.device | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(device, int):
            device = f"cuda:{device}" if device >= 0 else "cpu"
        self.device = torch.device(device or best_device())
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.processor = processor
        self.batch_size = batch_size
        self.signer = Signer(self.model, processor)

    def _bridge(self) -> ScMMGPTBridgeModel:
        """The part that both kinds of checkpoint share: cell model, Q-Former, contrast and matching."""
        return cast(ScMMGPTBridgeModel, getattr(self.model, "model", self.model))

    def _language_model(self, verb: str) -> ScMMGPTForConditionalGeneration:
        """The model; ValueError if it has no language model, which `verb` needs."""
        if not hasattr(self.model, "generate_cells"):
            by_counts = "; `proof=True` describes by counts" if verb == "describe" else ""
            raise ValueError(
                f"This checkpoint comes from `align` or `finetune` and has no language model, so it cannot {verb}"
                f"{by_counts}. Train stage 2 with `python -m scmmgpt.train tune`."
            )
        return cast(ScMMGPTForConditionalGeneration, self.model)

    def _batch_size(self, given: int | None, default: int) -> int:
        sizes = (size for size in (given, self.batch_size, default) if size is not None)
        return whole_number(next(sizes), "batch_size")

    def _inputs(self, cells: Cells) -> dict[str, Any]:
        """Model inputs of a batch of cells, on the device."""
        return dict(self.processor(cells=cells).to(self.device))

    def _chunks(self, adata: Any, choice: InputChoice) -> Iterator[Cells]:
        """The cells of an AnnData in chunks; after the last chunk, their hash is in the report of `choice`."""
        cells_hash = CellsHash()
        for part in choice.iter_cells(adata):
            cells_hash.update(part)
            yield part
        choice.report["cells"]["hash"] = cells_hash.hexdigest()

    def _batches(
        self, chunks: Iterable[Cells], batch_size: int, what: str, total: int, alike: bool = True
    ) -> Iterator[tuple[np.ndarray, Cells]]:
        """Row numbers and cells of each batch: cells of similar length, longest first; in order without `alike`."""
        first = 0
        with logging.tqdm(desc=what, unit="cell", total=total, delay=3) as progress:
            for chunk in _joined(chunks) if alike else chunks:
                order = np.argsort(-np.diff(chunk.indptr), kind="stable") if alike else np.arange(len(chunk))
                for start in range(0, len(order), batch_size):
                    rows = order[start : start + batch_size]
                    yield first + rows, chunk[rows if alike else slice(start, start + batch_size)]
                    progress.update(len(rows))
                first += len(chunk)

    def _map_cells(
        self,
        function: CellFunction,
        chunks: Iterable[Cells],
        batch_size: int,
        what: str,
        total: int,
        alike: bool = True,
    ) -> list[np.ndarray]:
        """Apply `function` to all cells, batch by batch; float32 arrays in the order of the cells.

        `alike` puts cells of similar length into a batch, for functions that pad cells.
        """
        rows, results = [], []
        for numbers, cells in self._batches(chunks, batch_size, what, total, alike):
            with torch.inference_mode():
                results.append([output.float().cpu().numpy() for output in function(cells)])
            rows.append(numbers)
        joined = [np.concatenate(parts) for parts in zip(*results, strict=True)]
        order = np.argsort(np.concatenate(rows))
        return [part[order] for part in joined] if alike else joined

    def _readout_columns(self) -> dict[str, int]:
        """Trained label -> column of the label readout, in the order of the columns."""
        texts, stored = (
            self.model.config.label_readout["texts"],
            (self.model.config.annotation or {}).get("labels", {}),
        )
        label_of = {text: label for label, text in stored.items()}
        return {label_of.get(text, text): column for column, text in enumerate(texts)}

    def meanings(
        self, sets: Sequence[str], called: Sequence[str] | None = None
    ) -> tuple[np.ndarray, dict[str, int], list[Mapping[str, Any]], list[int]]:
        """The labels of the readout that labels in any words mean.

        Args:
            sets: Labels in any words.
            called: Labels that may name profiled types; by default `sets`.

        Returns:
            `members`, bool `(len(sets), n_labels)`: which labels each of `sets` means; label -> column, for trained
            labels and then for profiled types that are named; terms as in [`trained_labels_of`]; the numbers of these
            profiled types.
        """
        columns, stored = self._readout_columns(), self.model.config.annotation or {}
        terms, types = stored.get("terms", []), stored.get("profiles", [])
        labels = {name: name for name in (sets if called is None else called)}
        numbers = list(profiled_types(labels, stored.get("cl_ids", {}), columns, types).values())
        columns |= {types[number]["name"]: len(columns) + place for place, number in enumerate(numbers)}
        terms = with_types(terms, [types[number] for number in numbers])
        return label_members(sets, columns, terms, stored), columns, terms, numbers

    def _record(self, adata: Any, key: str, report: dict[str, Any] | None, **done: Any) -> Any:
        """Add the settings of a verb, the checkpoint, and the report of the input to `uns`."""
        return record(adata, key, report, **done, checkpoint=str(self.model.config._name_or_path or ""))


def _joined(chunks: Iterable[Cells]) -> Iterator[Cells]:
    """The cells of chunks in order, joined to at most `SORTED_CELLS` cells, unless one chunk has more."""
    # `type(part)` and not `Cells`: a checkpoint may load each file twice.
    parts: list[Cells] = []
    for part in chunks:
        parts.append(part)
        if sum(map(len, parts)) + len(part) > SORTED_CELLS:
            yield type(part).concatenate(parts)
            parts = []
    if parts:
        yield type(parts[0]).concatenate(parts)


def uncounted(choice: InputChoice) -> InputChoice:
    """A copy of a choice with a copy of the report, so that a second pass does not count the cells twice."""
    return replace(choice, report=copy.deepcopy(choice.report))
