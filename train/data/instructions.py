r"""Conversations about cells, to mix into stage 2: the file of `tune --instructions FILE`.

```
{"messages": [{"role": "user", "content": "<cell>\nWhich cell is this?"},
              {"role": "assistant", "content": "A B cell."}], "cell_ids": ["11400714819323198485"]}
```

A row of the file, JSONL or Parquet, is a conversation in the chat format of transformers. Every `<cell>` in the
conversation (or content part `{"type": "cell"}`) stands for one cell of the corpus's training split. `cell_ids` names
these cells in the order of the text, by the corpus's `cell_id` as integer or string; `barcodes` may take its place.
The loss is on the assistant's turns alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from scmmgpt.cells_scmmgpt import INSTRUCTION_SEED, Cells, permutation
from scmmgpt.collator_scmmgpt import encode_conversation, pad_conversations
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.batches import BatchDataset, CellSource
from scmmgpt.train.data.blocks import Obs
from scmmgpt.train.data.collate import TuningCollator
from scmmgpt.train.data.corpus import CELL_COLUMNS, Corpus, table_to_cells


KEYS = {"cell_ids": "cell_id", "barcodes": "barcode"}  # column of the file -> column of the corpus
SHOWN = 5  # most values that an error lists
BYTES_PER_CHARACTER = 4  # at most, in UTF-8; a byte is at most one token


@dataclass
class Instructions:
    """Conversations, messages with string contents, and their cells.

    `cells` are the distinct cells of all conversations (`None` if there are none). `cell_rows` are the cells of each
    conversation, as positions in `cells`, in the order of the text.
    """

    conversations: list[list[dict[str, str]]]
    cell_rows: list[list[int]]
    cells: Cells | None

    def __len__(self) -> int:
        return len(self.conversations)


def read_instructions(
    path: str, corpus: Corpus, processor: ScMMGPTProcessor, *, max_tokens: int | None = None
) -> Instructions:
    """Read and check a file of conversations, and load their cells from the training split.

    Errors name row and values. Refused are other roles than user and assistant in turn, after at most one system
    message; numbers of placeholders and cells that differ; cells outside the training split; conversations of more
    than `max_tokens` (default: the limit of the language model's tokenizer); and what the chat template can't render.
    """
    conversations, names, column = [], [], None
    limit = processor.tokenizer.model_max_length if max_tokens is None else max_tokens
    rendered = set()  # roles of conversations for which the chat template was checked
    for where, row in _rows(Path(path)):
        own = [key for key in KEYS if row.get(key) is not None]
        if len(own) > 1 or (column is not None and own and own != [column]):
            raise ValueError(f"{where} names its cells by {own}; name the cells of all rows by one of {list(KEYS)}.")
        column = column or (own[0] if own else None)
        messages = _check_messages(row.get("messages"), where, processor)
        cells = row[own[0]] if own else []
        if not isinstance(cells, list):
            raise ValueError(f"{where} has {own[0]} {cells!r}; write a list.")
        mentioned = sum(message["content"].count(processor.cell_token) for message in messages)
        if mentioned != len(cells):
            raise ValueError(
                f"{where} mentions {mentioned} cells ({processor.cell_token}), but names {len(cells)}: "
                f"{cells[:SHOWN]}. Write {processor.cell_token} once for each."
            )
        roles = tuple(message["role"] for message in messages)
        length = sum(len(message["content"]) for message in messages) + mentioned * processor.num_cell_tokens
        if roles not in rendered or length * BYTES_PER_CHARACTER > limit:
            n_tokens = len(encode_conversation(messages, processor, where)[0])
            rendered.add(roles)
            if n_tokens > limit:
                raise ValueError(
                    f"{where} has {n_tokens:,} tokens, but the language model takes {limit:,}. Shorten the turns, or "
                    "divide the conversation."
                )
        conversations.append(messages)
        names.append((where, cells))
    if not conversations:
        raise ValueError(f"{path} has no rows.")
    cell_rows, mentioned_cells = _fetch(corpus, KEYS[column or "cell_ids"], names)
    return Instructions(conversations, cell_rows, mentioned_cells)


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the name of each row, for error messages, and its content."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of conversations at {path}.")
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet ({error}). Write or copy it again.") from None
        yield from ((f"Row {number} of {path}", row) for number, row in enumerate(rows))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"Line {number} of {path} is not JSON in UTF-8: {error}.") from None
            except RecursionError:
                raise ValueError(f"Line {number} of {path} is nested too deep; write a conversation a line.") from None
            if not isinstance(row, dict):
                raise ValueError(f"Line {number} of {path} is a {type(row).__name__}; write a JSON object a line.")
            yield f"Line {number} of {path}", row


def _check_messages(messages: Any, where: str, processor: ScMMGPTProcessor) -> list[dict[str, str]]:
    """Return the messages with string contents; refuse other orders of roles, and placeholders of the assistant."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f"{where} has messages {str(messages)[:200]}; write a list of {{role, content}}, where a content is a "
            'text or a list of {"type": "text", "text": ...} and {"type": "cell"}.'
        )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"{where} has no assistant turn to learn from; its roles are {roles}.")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"{where} has the roles {roles}; after at most one system message, user and assistant take turns, and "
            "the last turn is the assistant's."
        )
    messages = [{"role": m["role"], "content": m["content"]} for m in processor.flatten_messages(messages)]
    for message in messages:
        if message["role"] == "assistant" and processor.cell_token in message["content"]:
            raise ValueError(
                f"{where}: the assistant writes {processor.cell_token} in {message['content']!r}, but the model must "
                "not learn to write placeholders. Show cells in the user's turns."
            )
    return messages


def _is_message(message: Any) -> bool:
    """Whether a value is a message: a role, and a text or a list of parts as content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list) and content:
        return all(
            isinstance(part, dict) and (part.get("type") == "cell" or isinstance(part.get("text"), str))
            for part in content
        )
    return isinstance(content, str) and bool(content)


def _fetch(corpus: Corpus, column: str, names: list[tuple[str, list]]) -> tuple[list[list[int]], Cells | None]:
    """Positions of each row's cells among the cells of all rows, and the cells of all rows."""
    if column == "cell_id":
        names = [(where, [_cell_id(name, where) for name in own]) for where, own in names]
    wanted = {name for _, own in names for name in own}
    if not wanted:
        return [[] for _ in names], None
    places: dict[Any, int] = {}
    batches = []
    for matched, cells in _search(corpus, "train", column, sorted(wanted)):
        for name in matched:
            if name in places:
                raise ValueError(f"Several cells of {corpus.path} have the barcode {name!r}; use `cell_ids`.")
            places[name] = len(places)
        batches.append(cells)
    for where, own in names:
        unknown = [name for name in own if name not in places]
        if unknown:
            others = [split for split in corpus.split_names if split != "train"]
            held_out = [split for split in others if any(_search(corpus, split, column, unknown))]
            reason = f"some are in the split {held_out[0]!r}, which is held out" if held_out else "unknown"
            raise ValueError(
                f"{where} names cells that are not in the training split of {corpus.path}: {unknown[:SHOWN]} "
                f"({reason}). Leave the row out, or name cells of the training split."
            )
    return [[places[name] for name in own] for _, own in names], Cells.concatenate(batches)


def _cell_id(name: Any, where: str) -> int:
    """Return a cell id as an unsigned integer; the corpus stores the same 64 bits as a signed integer."""
    try:
        value = int(name)
    except (TypeError, ValueError):
        value = 2**64
    if isinstance(name, float) or not -(2**63) <= value < 2**64:
        raise ValueError(
            f"{where}: the cell id {name!r} is not an integer of 64 bits; copy it from the corpus's `cell_id`."
        )
    return value % 2**64


def _search(corpus: Corpus, split: str, column: str, wanted: list) -> Iterator[tuple[list, Cells]]:
    """Yield names and cells of the wanted cells of a split by row group; skip row groups without a wanted cell."""
    for shard in corpus.shards(split):
        with corpus.open_shard(shard) as file:
            for group in range(file.num_row_groups):
                values = file.read_row_group(group, columns=[column])[column]
                if column == "cell_id":
                    values = pa.chunked_array([values.to_numpy().view(np.uint64)])
                is_wanted = pc.is_in(values, value_set=pa.array(wanted, type=values.type))
                if pc.any(is_wanted).as_py():
                    table = file.read_row_group(group, columns=list(CELL_COLUMNS))
                    yield values.filter(is_wanted).to_pylist(), table_to_cells(table.filter(is_wanted))


class InstructionBatches(BatchDataset):
    """Batches of stage 2 in which conversations take the place of a share (`ratio`) of the cells.

    The number of a batch determines its conversations, so resuming needs no state. The conversations are dealt to
    batches and ranks in a random order. Each pass through all conversations draws a new order, so every conversation
    occurs equally often. The stream of `batches` has a `batch_size`.
    """

    def __init__(self, batches: BatchDataset, instructions: Instructions, *, ratio: float, seed: int) -> None:
        super().__init__(batches.source, batches.collate)
        self.batch_size: int = batches.source.batch_size  # type: ignore[attr-defined]
        self.instructions, self.ratio, self.seed = instructions, ratio, seed

    def _over(self, source: CellSource) -> "InstructionBatches":
        return InstructionBatches(super()._over(source), self.instructions, ratio=self.ratio, seed=self.seed)

    def make_batch(
        self, collate: TuningCollator, cells: Cells, obs: Obs, *, epoch: int, number: int
    ) -> Mapping[str, Any]:
        """Described and generated cells first, then the conversations."""
        chosen = self.conversations_of(number)[: len(cells)]
        n_kept = len(cells) - len(chosen)
        if not chosen:
            return collate(cells, obs, epoch=epoch)
        discussed = encode_conversations(self.instructions, chosen, collate, epoch=epoch)
        if n_kept == 0:
            return discussed
        kept = collate(cells[:n_kept], {name: values[:n_kept] for name, values in obs.items()}, epoch=epoch)
        return append_rows(kept, discussed, processor=collate.processor)

    def conversations_of(self, number: int) -> list[int]:
        """Indices of the conversations in a batch of this rank; `number` counts batches from the start of epoch 0."""
        first, last = (int(n_batches * self.batch_size * self.ratio) for n_batches in (number, number + 1))
        start = first * self.source.world_size + self.source.rank * (last - first)
        total = len(self.instructions)
        places = [divmod(i, total) for i in range(start, start + last - first)]  # pass, and place in its order
        orders = {n: permutation(total, self.seed, INSTRUCTION_SEED, n) for n in {n for n, _ in places}}
        return [int(orders[n][place]) for n, place in places]


def encode_conversations(
    instructions: Instructions, chosen: list[int], collate: TuningCollator, *, epoch: int
) -> dict[str, torch.Tensor]:
    """Inputs of the chosen conversations: texts padded on the left, and their cells in the order of the texts."""
    processor = collate.processor
    encoded = [encode_conversation(instructions.conversations[i], processor, f"conversation {i}") for i in chosen]
    batch = pad_conversations(encoded, processor)
    places = [place for i in chosen for place in instructions.cell_rows[i]]
    if places and instructions.cells is not None:
        batch |= processor(cells=instructions.cells[np.array(places)], epoch=epoch)
    return batch


def append_rows(first: dict, second: dict, *, processor: ScMMGPTProcessor) -> dict[str, torch.Tensor]:
    """Join two batches; the second has no target cells. Texts are padded on the left, cells on the right."""
    fill = {
        "input_ids": processor.tokenizer.pad_token_id,
        "labels": -100,
        "gene_ids": processor.feature_extractor.pad_token_id,
        "expression": processor.feature_extractor.pad_value,
        "target_gene_ids": processor.feature_extractor.pad_token_id,
    }
    pad = torch.nn.functional.pad
    batch = dict(first)
    for name, rows in second.items():
        if name not in first:
            batch[name] = rows
            continue
        parts, length = [], max(first[name].shape[1], rows.shape[1])
        for part in (first[name], rows):
            n = length - part.shape[1]
            sides = (n, 0) if name in ("input_ids", "attention_mask", "labels") else (0, n)
            parts.append(pad(part, sides, value=fill.get(name, 0)))
        batch[name] = torch.cat(parts)
    # Target genes have a row per text; the rows of the second batch are empty.
    for name in ("target_gene_ids", "target_attention_mask"):
        if name in first:
            batch[name] = pad(first[name], (0, 0, 0, len(second["input_ids"])), value=fill.get(name, 0))
    return batch
