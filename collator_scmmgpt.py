"""Rows of a dataset -> batches of scMMGPT: [`ScMMGPTDataCollator`], for `Trainer`, TRL and loops of one's own.

```python
collator = processor.data_collator()
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[collator])
```
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from .cells_scmmgpt import Cells, cells_in, cells_of, hash_names


CELL_COLUMNS = ("cell_id", "gene_ids", "counts", "total_counts")  # of a row that is one cell
Columns = Mapping[str, Any]  # name -> one value a row


class ScMMGPTDataCollator(TrainerCallback):
    """Makes the inputs of a model from rows; the columns of the rows define the task.

    | column | content | gives |
    | --- | --- | --- |
    | `cell_id`, `gene_ids`, `counts`, `total_counts` | a cell, as in a corpus and by `Cells.to_rows` | inputs |
    | `cells` | in their place one or several: [`Cells`], an AnnData, such a row, or a list of these | inputs |
    | `messages` | a conversation, with a `<cell>` or a part that holds a cell | `labels`: the assistant's turns |
    | `target` | the cell that the messages, which end with the user's turn, ask for | the expression loss |
    | `prompt`, `chosen`, `rejected` | messages, the better answer, the worse one | what TRL's `DPOTrainer` takes |
    | `caption` | a text that fits the cell | contrast and matching; rows of one `cell_type` have one meaning |
    | `label` | number of the cell's class | `labels` |

    Draws for a cell (genes, bins) depend on its id and the epoch, and on no other cell. As a callback of the trainer
    the collator follows the epochs; otherwise set `epoch`.

    Args:
        processor: The checkpoint's [`ScMMGPTProcessor`].
        collate: `collate(cells, columns, epoch=...)` makes the batch, in place of the columns above.
        target_genes: Vocabulary ids of the genes that were measured in target cells; by default the whole vocabulary.
    """

    def __init__(
        self,
        processor: Any,
        collate: Callable[..., Mapping[str, Any]] | None = None,
        *,
        target_genes: np.ndarray | None = None,
    ) -> None:
        self.processor, self.target_genes = processor, target_genes
        self.collate = self.collate_columns if collate is None else collate
        self.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the epoch to begin with, or to go on in."""
        self.epoch = int((state.epoch or 0) + 1e-6) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the trainer, which counts epochs in fractions of `max_steps` where the dataset has no length."""
        self.epoch += 1

    @staticmethod
    def with_length(dataset: Any, n_rows: int | None = None) -> "SizedRows":
        """A streamed dataset with the length by which a trainer resumes in the right epoch; see [`SizedRows`]."""
        return SizedRows(dataset, n_rows)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The batch of some rows."""
        cells, columns = read_rows(examples, self.processor)
        return self.collate(cells, columns, epoch=self.epoch)

    def collate_columns(self, cells: Cells | None, columns: Columns, *, epoch: int = 0) -> dict[str, Any]:
        """The batch of cells and columns; `columns["cells_per_row"]` counts the cells of each row (default: one)."""
        if "chosen" in columns:
            return self._preferences(cells, columns, epoch)
        batch: dict[str, Any] = {}
        if cells is not None and len(cells):
            batch.update(self.processor(cells=cells, epoch=epoch))
        if "messages" in columns:
            batch.update(self._conversations(columns["messages"], columns, cells))
            batch.update(self._targets(columns, epoch))
        if "caption" in columns:
            captions = [str(caption) for caption in columns["caption"]]
            batch.update(self.processor(qformer_text=captions))
            batch["text_ids"] = type_ids(columns, captions)
        if "label" in columns and "messages" not in columns:
            batch["labels"] = torch.as_tensor(np.asarray(columns["label"], dtype=np.int64))
        if not batch:
            raise ValueError(
                f"The rows have no cells and no texts; their columns are {sorted(columns)}. `ScMMGPTDataCollator` "
                "lists the columns that it reads."
            )
        return batch

    def _conversations(
        self, conversations: Sequence[list], columns: Columns, cells: Cells | None
    ) -> dict[str, torch.Tensor]:
        n_cells = columns.get("cells_per_row")
        if n_cells is None:
            n_cells = np.full(len(conversations), int(cells is not None))
        encoded = []
        for row, messages in enumerate(conversations):
            messages = self.processor.flatten_messages(list(messages))
            mentioned = sum(message["content"].count(self.processor.cell_token) for message in messages)
            if mentioned != n_cells[row]:
                raise ValueError(
                    f"The messages of row {row} mention {mentioned} cells ({self.processor.cell_token}), but the row "
                    f"has {n_cells[row]}. Write {self.processor.cell_token} once for each cell."
                )
            encoded.append(encode_conversation(messages, self.processor, f"row {row}"))
        return pad_conversations(encoded, self.processor)

    def _targets(self, columns: Columns, epoch: int) -> dict[str, torch.Tensor]:
        if "target" not in columns:
            return {}
        targets = [cells_of(value, self.processor) for value in columns["target"]]
        rows = [row for row, cells in enumerate(targets) for _ in range(len(cells))]
        if not rows:
            return {}
        joined = Cells.concatenate([cells for cells in targets if len(cells)])
        options = {"rows": np.array(rows), "n_rows": len(targets), "epoch": epoch}
        return self.processor.encode_targets(joined, self.target_genes, **options)

    def _preferences(self, cells: Cells | None, columns: Columns, epoch: int) -> dict[str, torch.Tensor]:
        """Chosen answers first, then rejected ones, in TRL's order; every cell occurs twice."""
        prompts = columns.get("prompt", [[]] * len(columns["chosen"]))
        conversations = [
            [*prompt, *answer]
            for name in ("chosen", "rejected")
            for prompt, answer in zip(prompts, columns[name], strict=True)
        ]
        twice = dict(columns)
        if columns.get("cells_per_row") is not None:
            twice["cells_per_row"] = np.tile(columns["cells_per_row"], 2)
        batch = self._conversations(conversations, twice, cells)
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        for name in ("ref_chosen_logps", "ref_rejected_logps"):  # of `DPOConfig(precompute_ref_log_probs=True)`
            if name in columns:
                batch[name] = torch.as_tensor(columns[name].astype(np.float32))
        if cells is not None and len(cells):
            batch.update(self.processor(cells=Cells.concatenate([cells, cells]), epoch=epoch))
        return batch


class SizedRows(torch.utils.data.IterableDataset):
    """A streamed dataset whose length is known.

    `Trainer` counts steps alone where a dataset has no length: it takes a resumed run for one in the first epoch,
    skips that epoch, and goes on with the second. With the length it finds epoch and step, and `set_epoch`, which
    shuffles a stream of `datasets` anew, has the right number. On several processes, set
    `accelerator_config={"dispatch_batches": False}`, since batches differ in shape.

    Args:
        dataset: A `datasets.IterableDataset`, or any iterable that repeats itself; `set_epoch` is passed on.
        n_rows: Number of rows; by default counted, which reads the dataset once.
    """

    def __init__(self, dataset: Any, n_rows: int | None = None) -> None:
        self.dataset = dataset
        self.n_rows = sum(1 for _ in dataset) if n_rows is None else n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the dataset, if the dataset has epochs."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def read_rows(rows: Sequence[Mapping[str, Any]], processor: Any = None) -> tuple[Cells | None, dict[str, Any]]:
    """Cells of all rows in order, and every other column as an object array `(n_rows,)`.

    Where rows have `cells`, `cells_per_row`, int64 `(n_rows,)`, is among the columns. `processor` reads AnnData.

    Raises:
        ValueError: If a row lacks a part of its cell.
    """
    if len(rows) and "cells" not in rows[0]:
        held = [cells_in(row["messages"] if "messages" in row else row.get("prompt")) for row in rows]
        if any(held):
            rows = [{**row, "cells": cells} for row, cells in zip(rows, held, strict=True)]
    names = [name for name in rows[0] if name not in CELL_COLUMNS and name != "cells"] if len(rows) else []
    columns: dict[str, Any] = {}
    for name in names:
        columns[name] = np.empty(len(rows), dtype=object)
        columns[name][:] = [row[name] for row in rows]
    if len(rows) and "cells" in rows[0]:
        pieces = [cells_of(row["cells"], processor) for row in rows]
        columns["cells_per_row"] = np.array([len(piece) for piece in pieces])
        return Cells.concatenate(pieces), columns
    if len(rows) and ("gene_ids" in rows[0] or "counts" in rows[0]):
        return Cells.from_rows(rows), columns
    return None, columns


def type_ids(columns: Columns, captions: Sequence[str]) -> torch.Tensor:
    """Hash of each caption's meaning, int64 `(n_cells,)`: of the CL id, the cell type, or the caption, as known.

    Two captions of one cell type may differ in words, tissue or markers; the contrast treats both as right.
    """
    names = np.array(captions, dtype=object)
    for column in ("cell_type", "cell_type_ontology_term_id"):
        values = np.asarray(columns.get(column, np.full(len(captions), None)), dtype=object)
        known = np.array([bool(value) and value != "unknown" for value in values])
        names[known] = values[known]
    return torch.from_numpy(hash_names(names.astype(str)).view(np.int64))


def encode_conversation(messages: list[dict[str, str]], processor: Any, where: str) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that are -100 outside the assistant's turns.

    A turn has the same tokens as in generation: prompt and answer are tokenised separately, and the answer ends with
    the end-of-text token, which is learned too. `where` names the conversation in errors.
    """
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    written = ""  # text of all turns so far

    def add_prompt(prompt: str) -> None:
        rest = prompt[len(written) :].replace(processor.cell_token, processor.cell_token * processor.num_cell_tokens)
        special = not ids and not processor.has_special_start(rest)
        prompt_ids = tokenizer(rest, add_special_tokens=special)["input_ids"]
        ids.extend(prompt_ids)
        labels.extend([-100] * len(prompt_ids))

    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = message["content"].strip()
        prompt = processor.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not prompt.startswith(written) or not whole.startswith(prompt + answer):
            raise ValueError(
                f"{where}: the chat template of the language model writes turn {turn + 1} differently when the "
                f"conversation continues: {whole[len(written) :]!r} is not {prompt[len(written) :]!r} and the answer. "
                "Use a template that only appends text."
            )
        add_prompt(prompt)
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids.extend(answer_ids)
        labels.extend(answer_ids)
        written = prompt + answer
        if whole[len(written) :].startswith(tokenizer.eos_token):
            written += tokenizer.eos_token
    if messages[-1]["role"] != "assistant":
        add_prompt(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return ids, labels


def pad_conversations(encoded: Sequence[tuple[list[int], list[int]]], processor: Any) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of conversations, int64 `(n, longest)`, padded on the left."""
    ids, labels = (list(rows) for rows in zip(*encoded, strict=True))
    return processor.pad_rows({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})
