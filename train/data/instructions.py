r"""Questions and answers about cells, mixed into stage 2: what `tune --instructions FILE` reads.

```
{"messages": [{"role": "user", "content": "<cell>\nWhich cell is this?"},
              {"role": "assistant", "content": "A B cell."}], "cell_ids": ["11400714819323198485"]}
```

A row is a conversation in the chat format of transformers, of JSONL or Parquet. Every `<cell>` in it (or content part
`{"type": "cell"}`) stands for one cell of the corpus's training split, named in reading order by `cell_ids`, the
corpus's own, as integers or strings, or by `barcodes`. The assistant's turns are learned, all others are read.
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
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.batches import BatchDataset, CellSource, Obs
from scmmgpt.train.data.collate import TuningCollator
from scmmgpt.train.data.corpus import CELL_COLUMNS, Corpus, table_to_cells


KEYS = {"cell_ids": "cell_id", "barcodes": "barcode"}  # column of the file -> column of the corpus
SHOWN = 5  # values that an error lists, at most


@dataclass
class Instructions:
    """Conversations and the cells that they are about.

    Args:
        conversations: Messages of each, with string contents.
        cell_rows: For each, its cells by their place in `cells`, in reading order.
        cells: Every cell that is mentioned, once.
    """

    conversations: list[list[dict[str, str]]]
    cell_rows: list[list[int]]
    cells: Cells | None

    def __len__(self) -> int:
        return len(self.conversations)


def read_instructions(path: str, corpus: Corpus, processor: ScMMGPTProcessor) -> Instructions:
    """Read and check a file of conversations, and fetch their cells from the training split.

    Raises:
        ValueError: With the row and its values, if roles are not a system message at most, then user and assistant in
            turn; if placeholders and cells differ in number; if a cell is not in the training split; or if the
            language model's chat template can't render such a conversation.
    """
    conversations, names = [], []
    column = None
    rendered = set()
    for where, row in _rows(Path(path)):
        own = [key for key in KEYS if row.get(key) is not None]
        if len(own) > 1 or (column is not None and own and own != [column]):
            raise ValueError(f"{where} names its cells by {own}; name those of all rows by one of {list(KEYS)}.")
        column = column or (own[0] if own else None)
        messages = _check_messages(row.get("messages"), where, processor)
        cells = list(row[own[0]]) if own else []
        mentioned = sum(message["content"].count(processor.cell_token) for message in messages)
        if mentioned != len(cells):
            raise ValueError(
                f"{where} mentions {mentioned} cells ({processor.cell_token}), but names {len(cells)}: "
                f"{cells[:SHOWN]}. Write {processor.cell_token} once for each."
            )
        roles = tuple(message["role"] for message in messages)
        if roles not in rendered:
            encode_conversation(messages, processor, where)
            rendered.add(roles)
        conversations.append(messages)
        names.append((where, cells))
    if not conversations:
        raise ValueError(f"{path} has no rows.")
    cell_rows, mentioned_cells = _fetch(corpus, KEYS[column or "cell_ids"], names)
    return Instructions(conversations, cell_rows, mentioned_cells)


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """What to call each row in errors, and the row."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of instructions at {path}.")
    if path.suffix == ".parquet":
        for number, row in enumerate(pq.read_table(path).to_pylist()):
            yield f"Row {number} of {path}", row
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not valid JSON: {error}.") from None
            if not isinstance(row, Mapping):
                raise ValueError(f"Line {number} of {path} is not a JSON object, but {type(row).__name__}.")
            yield f"Line {number} of {path}", dict(row)


def _check_messages(messages: Any, where: str, processor: ScMMGPTProcessor) -> list[dict[str, str]]:
    """The messages with string contents, in an order that can be learned."""
    if not messages or not all(message.get("role") and message.get("content") for message in messages):
        raise ValueError(f"{where} has messages {messages!r}; each needs a role and a content.")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"{where} has no assistant turn, so nothing to learn; its roles are {roles}.")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"{where} has the roles {roles}; after one system message at most, user and assistant take turns and "
            "the assistant has the last."
        )
    messages = [{"role": m["role"], "content": m["content"]} for m in processor.flatten_messages(messages)]
    for message in messages:
        if message["role"] == "assistant" and processor.cell_token in message["content"]:
            raise ValueError(
                f"{where}: the assistant writes {processor.cell_token} in {message['content']!r}, but the model is "
                "not to write placeholders. Show cells in the user's turns."
            )
    return messages


def _fetch(corpus: Corpus, column: str, names: list[tuple[str, list]]) -> tuple[list[list[int]], Cells | None]:
    """Places of each row's cells among the cells that are fetched, and these."""
    if column == "cell_id":
        names = [(where, [_cell_id(name, where) for name in own]) for where, own in names]
    wanted = {name for _, own in names for name in own}
    if not wanted:
        return [[] for _ in names], None
    places: dict[Any, int] = {}
    batches = []
    for found, cells in _search(corpus, "train", column, sorted(wanted)):
        for name in found:
            if name in places:
                raise ValueError(f"The barcode {name!r} is that of several cells of {corpus.path}; use `cell_ids`.")
            places[name] = len(places)
        batches.append(cells)
    for where, own in names:
        unknown = [name for name in own if name not in places]
        if unknown:
            held_out = [
                split
                for split in corpus.split_names
                if split != "train" and any(_search(corpus, split, column, unknown))
            ]
            reason = f"some are in the split {held_out[0]!r}, which is not to be trained on" if held_out else "unknown"
            raise ValueError(
                f"{where} names cells that the training split of {corpus.path} has not: {unknown[:SHOWN]} ({reason})."
            )
    return [[places[name] for name in own] for _, own in names], Cells.concatenate(batches)


def _cell_id(name: Any, where: str) -> int:
    try:
        value = int(name)
    except (TypeError, ValueError):
        value = -1
    if isinstance(name, float) or not 0 <= value < 2**64:
        raise ValueError(f"{where}: the cell id {name!r} is no integer of 64 bits; see `cell_id` of the corpus.")
    return value


def _search(corpus: Corpus, split: str, column: str, wanted: list) -> Iterator[tuple[list, Cells]]:
    """The wanted cells of a split, by row groups: their names, and themselves. Other row groups are passed over."""
    for shard in corpus.shards(split):
        with corpus.open_shard(shard) as file:
            for group in range(file.num_row_groups):
                values = file.read_row_group(group, columns=[column])[column]
                found = pc.is_in(values, value_set=pa.array(wanted, type=values.type))
                if pc.any(found).as_py():
                    table = file.read_row_group(group, columns=list(CELL_COLUMNS))
                    yield values.filter(found).to_pylist(), table_to_cells(table.filter(found))


def encode_conversation(
    messages: list[dict[str, str]], processor: ScMMGPTProcessor, where: str
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that are -100 outside the assistant's turns.

    A turn is the same tokens as when it is generated: the prompt as the template writes it, the answer apart from it,
    and the end-of-text token, which is learned too.

    Args:
        messages: With string contents.
        processor: Its tokenizer, chat template, and number of tokens that a cell takes.
        where: What to call the conversation in an error.
    """
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = message["content"].strip()
        prompt = processor.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not prompt.startswith(written) or not whole.startswith(prompt + answer):
            raise ValueError(
                f"{where}: the chat template of the language model writes turn {turn + 1} differently once the "
                f"conversation goes on: {whole[len(written) :]!r} does not continue {prompt[len(written) :]!r} by the "
                "answer. Use a template that only appends."
            )
        rest = prompt[len(written) :].replace(processor.cell_token, processor.cell_token * processor.num_query_tokens)
        special = not ids and not processor.has_special_start(rest)
        prompt_ids = tokenizer(rest, add_special_tokens=special)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids += prompt_ids + answer_ids
        labels += [-100] * len(prompt_ids) + answer_ids
        written = prompt + answer
        if whole[len(written) :].startswith(tokenizer.eos_token):
            written += tokenizer.eos_token
    return ids, labels


class InstructionBatches(BatchDataset):
    """Batches of stage 2 in which conversations take the place of some cells.

    The number of a batch decides which conversations, so that resuming needs no state: ranks deal the conversations
    out in an order that is permuted anew each time through, and each is seen as often as any other.

    Args:
        batches: The batches of a [`CellStream`] with a batch size that conversations are mixed with.
        instructions: The conversations.
        ratio: Share of the places in a batch that they take.
        seed: Of their order.
    """

    def __init__(self, batches: BatchDataset, instructions: Instructions, *, ratio: float, seed: int) -> None:
        super().__init__(batches.source, batches.collate, workers=batches.workers)
        self.batch_size: int = batches.source.order.batch_size  # type: ignore[attr-defined]
        self.instructions, self.ratio, self.seed = instructions, ratio, seed

    def _over(self, source: CellSource) -> "InstructionBatches":
        batches = BatchDataset(source, self.collate, workers=self.workers)
        return InstructionBatches(batches, self.instructions, ratio=self.ratio, seed=self.seed)

    def make_batch(
        self, collate: TuningCollator, cells: Cells, obs: Obs, *, epoch: int, number: int
    ) -> Mapping[str, Any]:
        """Described and generated cells first, then the conversations."""
        chosen = self.conversations_of(number)[: len(cells)]
        kept = slice(0, len(cells) - len(chosen))
        batches = []
        if len(cells) > len(chosen):
            kept_obs = {name: values[kept] for name, values in obs.items()}
            batches.append(dict(collate(cells[kept], kept_obs, epoch=epoch)))
        if chosen:
            batches.append(encode_conversations(self.instructions, chosen, collate, epoch=epoch))
        return append_rows(*batches, processor=collate.processor) if len(batches) > 1 else batches[0]

    def conversations_of(self, number: int) -> list[int]:
        """Numbers of the conversations in a batch of this rank, which is counted from the beginning of epoch 0."""
        first, last = (int(batches * self.batch_size * self.ratio) for batches in (number, number + 1))
        start = first * self.source.world_size + self.source.rank * (last - first)
        places, total = range(start, start + last - first), len(self.instructions)
        times = {place // total for place in places}  # times through all conversations
        orders = {time: permutation(total, self.seed, INSTRUCTION_SEED, time) for time in times}
        return [int(orders[place // total][place % total]) for place in places]


def encode_conversations(
    instructions: Instructions, chosen: list[int], collate: TuningCollator, *, epoch: int
) -> dict[str, torch.Tensor]:
    """Inputs of the chosen conversations: texts padded on the left, and their cells in reading order."""
    processor = collate.processor
    encoded = [encode_conversation(instructions.conversations[i], processor, f"conversation {i}") for i in chosen]
    length = max(len(ids) for ids, _ in encoded)
    rows = {
        "input_ids": [[processor.tokenizer.pad_token_id] * (length - len(ids)) + ids for ids, _ in encoded],
        "attention_mask": [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in encoded],
        "labels": [[-100] * (length - len(labels)) + labels for _, labels in encoded],
    }
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    places = [place for i in chosen for place in instructions.cell_rows[i]]
    if places:
        assert instructions.cells is not None
        cells = instructions.cells[np.array(places)]
        batch |= processor(cells=cells, epoch=epoch, max_genes=collate.max_genes)
    return batch


def append_rows(first: dict, second: dict, *, processor: ScMMGPTProcessor) -> dict[str, torch.Tensor]:
    """Two batches as one, the second without targets: texts padded left, cells right, no target in the new rows."""
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
        length = max(first[name].shape[1], rows.shape[1])
        left = name in ("input_ids", "attention_mask", "labels")
        missing = [length - part.shape[1] for part in (first[name], rows)]
        parts = [
            pad(part, (n, 0) if left else (0, n), value=fill.get(name, 0))
            for part, n in zip((first[name], rows), missing, strict=True)
        ]
        batch[name] = torch.cat(parts)
    # One row per text: genes to be generated, none here.
    for name in ("target_gene_ids", "target_attention_mask"):
        if name in first:
            batch[name] = pad(first[name], (0, 0, 0, len(second["input_ids"])), value=fill.get(name, 0))
    return batch
