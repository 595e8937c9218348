"""[`ScMMGPTDataCollator`]: rows of a dataset -> batches, for `Trainer`, TRL and custom training loops.

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


CELL_COLUMNS = ("cell_id", "gene_ids", "counts", "total_counts")  # columns of a row with one cell
Columns = Mapping[str, Any]  # name -> one value per row


class ScMMGPTDataCollator(TrainerCallback):
    """Make model inputs from rows; the columns of the rows define the task.

    | column | content | result |
    | --- | --- | --- |
    | `cell_id`, `gene_ids`, `counts`, `total_counts` | one cell, as in a corpus and from `Cells.to_rows` | inputs |
    | `cells` | instead, one cell or several: [`Cells`], an AnnData, such a row, or a list of these | inputs |
    | `messages` | a conversation with `<cell>`, or with a part that holds a cell | `labels`: the assistant's turns |
    | `target` | the cell to generate for messages that end with a user's turn | the expression loss |
    | `prompt`, `chosen`, `rejected` | messages, the better and the worse answer | inputs of `DPOTrainer` of TRL |
    | `caption` | a text that describes the cell | contrast and matching; captions of one `cell_type` are equivalent |
    | `label` | number of the cell's class | `labels` |

    The draws for a cell (genes, bins) depend only on the cell id and the epoch. As a callback of the trainer, the
    collator follows the epochs; otherwise set `epoch`.

    Args:
        processor: The [`ScMMGPTProcessor`] of the checkpoint.
        collate: `collate(cells, columns, epoch=...)` makes the batch, instead of the columns above.
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
        """Set the epoch to the one before the first epoch of this run, which may resume training."""
        self.epoch = int((state.epoch or 0) + 1e-6) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count epochs here: for a dataset without length, `state.epoch` is a fraction of `max_steps`."""
        self.epoch += 1

    @staticmethod
    def with_length(dataset: Any, n_rows: int | None = None) -> "SizedRows":
        """A streamed dataset with a length, so that a trainer resumes in the right epoch; see [`SizedRows`]."""
        return SizedRows(dataset, n_rows)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Make the batch of some rows."""
        cells, columns = read_rows(examples, self.processor)
        return self.collate(cells, columns, epoch=self.epoch)

    def collate_columns(self, cells: Cells | None, columns: Columns, *, epoch: int = 0) -> dict[str, Any]:
        """Make the batch of cells and columns; `columns["cells_per_row"]` is the number of cells of each row, or 1.

        Raises:
            ValueError: If there are no cells and no texts, or a conversation mentions another number of cells.
        """
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
        """The batch of chosen answers, then of rejected answers, as TRL expects; every cell occurs twice."""
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
    """A streamed dataset with a known length.

    For a dataset without length, `Trainer` counts steps only: a resumed run seems to be in the first epoch, skips the
    rest of that epoch, and continues with the second. With a length, `Trainer` finds epoch and step, and calls
    `set_epoch`, which reshuffles a stream of `datasets`, with the right number. On several processes, set
    `accelerator_config={"dispatch_batches": False}`, as batches differ in shape.

    Args:
        dataset: A `datasets.IterableDataset`, or any iterable that can be repeated; `set_epoch` is passed on.
        n_rows: Number of rows; by default the dataset is read once to count its rows.
    """

    def __init__(self, dataset: Any, n_rows: int | None = None) -> None:
        self.dataset = dataset
        self.n_rows = sum(1 for _ in dataset) if n_rows is None else n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the dataset, if the dataset has epochs."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def read_rows(rows: Sequence[Mapping[str, Any]], processor: Any = None) -> tuple[Cells | None, dict[str, Any]]:
    """Cells of all rows in order, and all other columns as object arrays `(n_rows,)`.

    If rows have `cells`, or cells in messages, the columns include `cells_per_row`, int64 `(n_rows,)`. `processor`
    reads AnnData.

    Raises:
        ValueError: If a row lacks a part of its cell.
    """
    if len(rows) and "cells" not in rows[0]:
        in_messages = [cells_in(row["messages"] if "messages" in row else row.get("prompt")) for row in rows]
        if any(in_messages):
            rows = [{**row, "cells": cells} for row, cells in zip(rows, in_messages, strict=True)]
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
    """Hash of the meaning of each caption, int64 `(n_cells,)`: of the CL id, else the cell type, else the caption.

    Captions of one cell type may differ in words, tissue or markers; the contrastive loss treats them as equivalent.
    """
    names = np.array(captions, dtype=object)
    for column in ("cell_type", "cell_type_ontology_term_id"):
        values = np.asarray(columns.get(column, np.full(len(captions), None)), dtype=object)
        is_known = np.array([bool(value) and value != "unknown" for value in values])
        names[is_known] = values[is_known]
    return torch.from_numpy(hash_names(names.astype(str)).view(np.int64))


def encode_conversation(messages: list[dict[str, str]], processor: Any, where: str) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels, which are -100 outside the assistant's turns.

    A turn has the same tokens as in generation: prompt and answer are tokenised separately, and the answer ends with
    the end-of-text token, which is a label, too.

    Args:
        messages: The conversation: `role` and `content` of each turn.
        processor: The processor of the checkpoint.
        where: Name of the conversation in errors.

    Raises:
        ValueError: If the chat template changes earlier turns when the conversation continues.
    """
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    written = ""  # text of the turns so far

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
