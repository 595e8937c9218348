"""Conversations about cells: how they are read, what is learned of them, and how they are mixed with captions."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.align import build_processor
from scmmgpt.train.arguments import AlignModelArguments
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.collate import TuningCollator
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.data.instructions import InstructionBatches, append_rows, encode_conversation, read_instructions
from scmmgpt.train.data.stream import CellStream
from scmmgpt.train.language_model import train_tokenizer


ASK, COMPARE, AGAIN = "<cell>\nWhich cell is this?", "Compare <cell> and <cell>.", "Are you sure?"


@pytest.fixture(scope="module")
def processor(corpus, bert):
    qformer_tokenizer = AutoTokenizer.from_pretrained(bert)
    base = build_processor(open_corpus(corpus), qformer_tokenizer, AlignModelArguments(bert=bert))
    tokenizer = train_tokenizer(["This cell is a B cell of blood."])
    return ScMMGPTProcessor(
        base.feature_extractor, tokenizer, base.qformer_tokenizer, base.gene_tokenizer, num_query_tokens=2
    )


@pytest.fixture(scope="module")
def ids(corpus):
    """Ids of the training cells."""
    return open_corpus(corpus).obs("train", ["cell_id"])["cell_id"].to_pylist()


def conversation(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, corpus, processor):
    return read_instructions(path, open_corpus(corpus), processor, max_tokens=2000)


def batches_of(corpus, processor, instructions, *, ratio, rank=0, world_size=1, batch_size=8):
    stream = CellStream(corpus, batch_size=batch_size, seed=0, rank=rank, world_size=world_size)
    collate = TuningCollator(processor, CaptionSampler("short", seed=0), target_genes=np.arange(3, 33))
    return InstructionBatches(BatchDataset(stream, collate), instructions, ratio=ratio, seed=0)


@pytest.fixture(scope="module")
def rows(ids):
    """Twelve conversations of one, two or no cells."""
    found = [{"messages": conversation(ASK, f"Answer {i}."), "cell_ids": [ids[i]]} for i in range(10)]
    found.append({"messages": conversation(COMPARE, "They differ.", AGAIN, "Yes."), "cell_ids": ids[3:5]})
    found.append({"messages": conversation("What is a B cell?", "A lymphocyte."), "cell_ids": []})
    return found


@pytest.fixture(scope="module")
def instructions(corpus, processor, rows, tmp_path_factory):
    return read(write(tmp_path_factory.mktemp("instructions") / "a.jsonl", rows), corpus, processor)


def test_rows_come_from_jsonl_and_parquet_alike(corpus, processor, rows, tmp_path):
    table = pa.Table.from_pylist([{**row, "cell_ids": list(map(str, row["cell_ids"]))} for row in rows])
    pq.write_table(table, tmp_path / "a.parquet")
    first = read(write(tmp_path / "a.jsonl", rows), corpus, processor)
    second = read(str(tmp_path / "a.parquet"), corpus, processor)
    assert first.conversations == second.conversations
    assert first.cell_rows == second.cell_rows
    assert len(first.cells) == 10
    for row, places in zip(rows, first.cell_rows, strict=True):
        assert first.cells.cell_ids[places].view(np.int64).tolist() == row["cell_ids"]


def test_the_counts_of_a_named_cell_are_those_of_the_corpus(corpus, instructions):
    cells, _ = open_corpus(corpus).load("train", [])
    for i in range(len(instructions.cells)):
        own = cells[int(np.flatnonzero(cells.cell_ids == instructions.cells.cell_ids[i])[0])]
        np.testing.assert_array_equal(instructions.cells[i].gene_ids, own.gene_ids)
        np.testing.assert_array_equal(instructions.cells[i].counts, own.counts)


def test_only_the_assistant_is_learned_turn_by_turn(processor):
    messages = conversation(COMPARE, "They differ.", AGAIN, "Yes.", system="Be brief.")
    ids, labels = encode_conversation(messages, processor, "here")
    learned = processor.tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    assert learned == "They differ.<|end|>Yes.<|end|>"
    text = processor.tokenizer.decode(ids)
    assert text == (
        "<|system|>Be brief.<|user|>Compare <cell><cell> and <cell><cell>.<|assistant|>They differ.<|end|>"
        "<|user|>Are you sure?<|assistant|>Yes.<|end|>"
    )


def test_a_single_turn_is_the_same_tokens_as_a_description(processor):
    messages = conversation(processor.prompts["describe"], "A B cell.")
    ids, labels = encode_conversation(messages, processor, "here")
    text = processor.render_prompt("describe").replace("<cell>", "<cell>" * 2)
    prompt = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = processor.tokenizer("A B cell.", add_special_tokens=False)["input_ids"]
    assert ids == prompt + answer + [processor.tokenizer.eos_token_id]
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": conversation(ASK, "A."), "cell_ids": []}, r"Line 1 of .* mentions 1 cells .* names 0"),
        (
            {"messages": conversation(ASK, "A."), "cell_ids": [5]},
            r"Line 1 of .* training split of .*: \[5\] \(unknown\)",
        ),
        ({"messages": conversation(ASK, "A."), "cell_ids": ["x"]}, r"Line 1 .* cell id 'x' is not an integer"),
        ({"messages": conversation(ASK), "cell_ids": [5]}, r"Line 1 .* no assistant turn.*\['user'\]"),
        ({"messages": conversation("A", "B", "C"), "cell_ids": []}, r"'assistant', 'user'\]; .* take turns"),
        ({"messages": [{"role": "bot", "content": "B"}, {"role": "assistant", "content": "A"}]}, "'bot', 'assistant'"),
        ({"messages": conversation("A", "<cell>"), "cell_ids": [5]}, "the assistant writes <cell>"),
        ({"messages": [{"role": "user"}]}, r"write a list of {role, content}"),
        ({"messages": []}, r"has messages \[\]"),
        ({"messages": "hello"}, "has messages hello"),
        ({"messages": ["hello"]}, "has messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "has messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has messages"),
        ({"messages": conversation(ASK, "A."), "cell_ids": "5"}, "has cell_ids '5'; write a list"),
        ({"messages": conversation("long " * 5000, "A.")}, r"tokens, but the language model takes 2,000"),
        ({"messages": conversation("<cell>", "A"), "cell_ids": [5], "barcodes": ["a"]}, "one of"),
    ],
)
def test_what_can_not_be_learned_names_row_and_values(corpus, processor, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "a.jsonl", [row]), corpus, processor)


@pytest.mark.parametrize("line", [b"{", b'"text"', b"[" * 100_000, b'{"messages": "\xff"}', b"\x00\x01"])
def test_a_line_that_is_no_conversation_is_named(corpus, processor, tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*a\.jsonl is"):
        read(tmp_path / "a.jsonl", corpus, processor)


def test_a_file_that_is_no_parquet_is_named(corpus, processor, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        read(tmp_path / "a.parquet", corpus, processor)


def test_a_held_out_cell_is_refused(corpus, processor, tmp_path):
    held_out = open_corpus(corpus).obs("validation", ["cell_id"])["cell_id"].to_pylist()[0]
    row = {"messages": conversation(ASK, "A."), "cell_ids": [held_out]}
    with pytest.raises(ValueError, match="split 'validation', which is held out"):
        read(write(tmp_path / "a.jsonl", [row]), corpus, processor)


def test_a_template_that_rewrites_what_it_wrote_is_refused(processor):
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    rewriting = ScMMGPTProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        processor.qformer_tokenizer,
        processor.gene_tokenizer,
        chat_template=template,
    )
    with pytest.raises(ValueError, match=r"here: the chat template .* turn 2 differently"):
        encode_conversation(conversation("A", "B"), rewriting, "here")


def test_conversations_take_their_share_and_each_comes_up_equally_often(corpus, processor, instructions):
    seen = []
    for rank in range(2):
        batches = batches_of(corpus, processor, instructions, ratio=0.375, rank=rank, world_size=2, batch_size=4)
        seen += [batches.conversations_of(number) for number in range(4 * len(batches))]
    assert {len(chosen) for chosen in seen} == {1, 2}
    numbers, times = np.unique(np.concatenate(seen), return_counts=True)
    assert numbers.tolist() == list(range(12))
    assert times.tolist() == [4] * 12  # 2 ranks x 16 steps x 1.5 conversations = 4 x 12


def test_a_batch_holds_described_generated_and_discussed_cells(corpus, processor, instructions):
    batches = batches_of(corpus, processor, instructions, ratio=0.5)
    batch = next(iter(batches))
    chosen = batches.conversations_of(0)
    assert len(chosen) == 4
    placeholders = (batch["input_ids"] == processor.cell_token_id).sum()
    assert placeholders == 2 * len(batch["gene_ids"])
    named = [place for i in chosen for place in instructions.cell_rows[i]]
    alone = processor(cells=instructions.cells[np.array(named)])
    width = alone["gene_ids"].shape[1]
    assert torch.equal(batch["gene_ids"][-len(named) :, :width], alone["gene_ids"])
    assert batch["cell_attention_mask"][-len(named) :, width:].sum() == 0
    assert len(batch["target_attention_mask"]) == len(batch["input_ids"])
    assert batch["target_attention_mask"][-4:].sum() == 0
    assert (batch["labels"] != -100)[-4:].any(dim=1).all()


def test_a_resumed_epoch_holds_the_same_conversations(corpus, processor, instructions):
    whole, resumed = (batches_of(corpus, processor, instructions, ratio=0.5) for _ in range(2))
    for batches in (whole, resumed):
        batches.set_epoch(1)
    resumed.skim(2)
    expected, found = list(whole), list(resumed)
    assert len(expected) == len(found) == 4
    for step in (2, 3):
        assert found[step].keys() == expected[step].keys()
        for name, value in expected[step].items():
            assert torch.equal(value, found[step][name]), name


def test_a_single_process_sees_the_same_conversations_on_every_rank(corpus, processor, instructions):
    own = [batches_of(corpus, processor, instructions, ratio=0.5, rank=r, world_size=2) for r in range(2)]
    first, second = (next(iter(batches.of_all_ranks())) for batches in own)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_rows_are_appended_to_the_side_where_nothing_stands(processor):
    first = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]]), "gene_ids": torch.tensor([[1, 7, 8]])}
    second = {
        "input_ids": torch.tensor([[6, 7]]),
        "labels": torch.tensor([[-100, 7]]),
        "gene_ids": torch.tensor([[1]]),
    }
    batch = append_rows(first, second, processor=processor)
    assert batch["input_ids"].tolist() == [[processor.tokenizer.pad_token_id, 5], [6, 7]]
    assert batch["labels"].tolist() == [[-100, 5], [-100, 7]]
    assert batch["gene_ids"].tolist() == [[1, 7, 8], [1, 0, 0]]
