"""The processor: cells and texts in, model inputs out, and what a checkpoint remembers of it."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from scmmgpt import cells_scmmgpt
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.processing_scmmgpt import PLAIN_CHAT_TEMPLATE, ScGPTProcessor, ScMMGPTProcessor
from scmmgpt.train import language_model


@pytest.fixture
def processor(text_tokenizer, qformer_tokenizer, gene_tokenizer):
    extractor = ScMMGPTFeatureExtractor(max_genes=20, pad_token_id=0, cls_token_id=1)
    return ScMMGPTProcessor(extractor, text_tokenizer, qformer_tokenizer, gene_tokenizer, num_query_tokens=4)


@pytest.fixture
def cells():
    return Cells(
        indptr=np.array([0, 3, 5]),
        gene_ids=np.array([3, 7, 9, 4, 7]),
        counts=np.array([2, 1, 7, 1, 3]),
        cell_ids=np.array([11, 12], dtype=np.uint64),
        total_counts=np.array([100.0, 50.0], dtype=np.float32),
    )


def test_every_cell_becomes_as_many_placeholders_as_the_model_has_queries(processor, cells):
    batch = processor(text=["this is <cell>", "the cell <cell> is"], cells=cells)
    assert (batch["input_ids"] == processor.cell_token_id).sum(dim=1).tolist() == [4, 4]
    assert batch["gene_ids"].shape[0] == 2


def test_a_batch_is_padded_on_the_left_and_its_rows_are_the_rows_alone(processor):
    texts = ["this is a B cell", "cell"]
    together = processor(text=texts)
    for row, text in enumerate(texts):
        alone = processor(text=text)["input_ids"][0]
        assert together["input_ids"][row, -len(alone) :].tolist() == alone.tolist()
        assert together["attention_mask"][row].sum() == len(alone)
        assert together["attention_mask"][row, -1] == 1


def test_more_placeholders_than_cells_names_both_numbers(processor, cells):
    with pytest.raises(ValueError, match="mention 3 cells .* 2 cells were given"):
        processor(text=["<cell> <cell>", "<cell>"], cells=cells)
    with pytest.raises(ValueError, match="mention 1 cells .* 0 cells were given.*processor.data_collator"):
        processor(text="<cell>")


def test_answers_are_learned_and_prompts_and_empty_answers_are_not(processor):
    batch = processor(text=["this is", "the type is a", "this is"], answers=["a B cell", "monocyte", ""])
    tokenizer = processor.tokenizer
    for row, answer in enumerate(["a B cell", "monocyte"]):
        learned = batch["labels"][row][batch["labels"][row] != -100]
        assert tokenizer.decode(learned[:-1]) == answer
        assert learned[-1] == tokenizer.eos_token_id
    assert (batch["labels"][2] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_prompt_of_training_is_the_prompt_of_generation(processor, cells):
    prompt = processor.render_prompt("describe")
    training = processor(text=[prompt], cells=cells[:1], answers=["a B cell"])
    generation = processor(text=[prompt], cells=cells[:1])
    length = generation["input_ids"].shape[1]
    assert training["input_ids"][0, :length].tolist() == generation["input_ids"][0].tolist()


def test_targets_hold_the_counts_of_every_measured_gene_zeros_included(processor, cells):
    targets = processor.encode_targets(cells, np.array([9, 3, 4, 7]))
    assert targets["target_gene_ids"].tolist() == [[3, 4, 7, 9]] * 2
    assert targets["target_counts"].tolist() == [[2, 0, 1, 7], [0, 1, 3, 0]]
    assert targets["library_size"].tolist() == [100, 50]
    torch.testing.assert_close(targets["target_expression"][0, 0], torch.tensor(2 / 100 * 1e4).log1p())


def test_targets_fill_only_the_rows_of_their_texts(processor, cells):
    batch = processor(text=["this is", "a B cell", "of the"], target_cells=cells, target_rows=[2, 0])
    assert batch["target_attention_mask"].any(dim=1).tolist() == [True, False, True]
    assert batch["target_rows"].tolist() == [2, 0]
    assert batch["library_size"].tolist() == [100, 50]


def test_cells_of_one_text_share_its_genes(processor, cells):
    processor.max_target_genes = 5
    batch = processor(text=["of the", "a B cell"], target_cells=cells, target_rows=[1, 1])
    assert batch["target_attention_mask"].any(dim=1).tolist() == [False, True]
    genes = batch["target_gene_ids"][1].tolist()
    alone = processor.encode_targets(cells, np.array(genes))
    assert batch["target_counts"].tolist() == alone["target_counts"].tolist()


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ([0, 3], ValueError, "from 0 to 3, but there are 2 texts"),
        ([0], ValueError, "2 target cells were given for 1 target rows"),
        ([True, True], TypeError, "row numbers"),
    ],
)
def test_target_rows_must_be_rows_of_the_texts(processor, cells, rows, error, match):
    with pytest.raises(error, match=match):
        processor(text=["this is", "a B cell"], target_cells=cells, target_rows=rows)


def test_a_cells_random_target_genes_do_not_depend_on_its_batch(processor, cells):
    processor.max_target_genes = 5
    together = processor.encode_targets(cells)
    for row in range(2):
        alone = processor.encode_targets(cells[row : row + 1])
        for name in set(together) - {"target_rows"}:
            assert together[name][row : row + 1].tolist() == alone[name].tolist(), name
    assert together["target_gene_ids"].shape == (2, 5)
    assert processor.encode_targets(cells, epoch=1)["target_gene_ids"].tolist() != together["target_gene_ids"].tolist()


def test_an_adata_is_read_as_its_cells(processor, adata):
    cells, _ = processor.read_cells(adata)
    ours, theirs = processor(cells=adata), processor(cells=cells)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_content_parts_stand_for_cells(processor, cells):
    messages = [{"role": "user", "content": [{"type": "cell"}, {"type": "text", "text": "what is this ?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "user : <cell>\nwhat is this ? assistant : "
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"cells": cells[:1]}
    )
    assert (batch["input_ids"] == processor.cell_token_id).sum() == 4


def tokens_of(processor, batch, row=0):
    return processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][row].tolist())


@pytest.fixture
def processor_with_bos(text_tokenizer, qformer_tokenizer, gene_tokenizer):
    """As Llama's and Gemma's: the tokenizer begins every text with `<s>`, and so does the chat template."""
    text_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", text_tokenizer.bos_token_id)]
    )
    text_tokenizer.chat_template = "{{ bos_token }}" + text_tokenizer.chat_template
    extractor = ScMMGPTFeatureExtractor(max_genes=20, pad_token_id=0, cls_token_id=1)
    return ScMMGPTProcessor(extractor, text_tokenizer, qformer_tokenizer, gene_tokenizer, num_query_tokens=4)


def question(words="a cell"):
    return [{"role": "user", "content": [{"type": "cell"}, {"type": "text", "text": words}]}]


def test_a_chat_begins_with_one_bos(processor_with_bos, cells):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    batch = processor_with_bos.apply_chat_template(question(), **options, processor_kwargs={"cells": cells[:1]})
    tokens = "<s> user : <cell> <cell> <cell> <cell> a cell assistant :".split()
    assert tokens_of(processor_with_bos, batch) == tokens
    text = processor_with_bos.apply_chat_template(question(), add_generation_prompt=True)
    assert tokens_of(processor_with_bos, processor_with_bos(text=text, cells=cells[:1])) == tokens
    two = {"cells": cells, "padding": True}
    batch = processor_with_bos.apply_chat_template([question(), question("a B cell")], **options, processor_kwargs=two)
    assert tokens_of(processor_with_bos, batch, 0) == ["<pad>", *tokens]
    assert tokens_of(processor_with_bos, batch, 1) == [*tokens[:8], "B", *tokens[8:]]


def test_a_text_that_begins_with_a_cell_has_a_bos(processor_with_bos, cells):
    batch = processor_with_bos(text="<cell> a B cell", cells=cells[:1])
    assert tokens_of(processor_with_bos, batch)[:3] == ["<s>", "<cell>", "<cell>"]
    batch = processor_with_bos(text="<cell> a B cell", cells=cells[:1], add_special_tokens=False)
    assert tokens_of(processor_with_bos, batch)[:2] == ["<cell>", "<cell>"]


def test_what_the_assistant_says_is_marked(processor, cells):
    messages = [*question(), {"role": "assistant", "content": "a B cell"}]
    batch = processor.apply_chat_template(
        [messages, messages[:1]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"cells": cells},
    )
    said = torch.as_tensor(batch["assistant_masks"]).bool()
    assert (
        processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0][said[0]].tolist()) == "a B cell </s>".split()
    )
    assert not said[1].any()


@pytest.mark.parametrize("template", [PLAIN_CHAT_TEMPLATE, language_model.CHAT_TEMPLATE])
def test_our_own_chat_templates_mark_it_too(processor, template):
    processor.chat_template = template
    messages = [{"role": "user", "content": "this is"}, {"role": "assistant", "content": "a B cell"}]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = processor.apply_chat_template(messages, **options)
    said = torch.as_tensor(batch["assistant_masks"]).bool()
    assert processor.decode(batch["input_ids"][said]).split()[:3] == ["a", "B", "cell"]


def test_a_message_may_hold_its_cell(processor, cells):
    def asked(cell):
        parts = [{"type": "cell", "cell": cell}, {"type": "text", "text": "what is this cell ?"}]
        return [{"role": "user", "content": parts}]

    options = {"tokenize": True, "return_dict": True}
    bare = [question(), question()]
    expected = processor.apply_chat_template(bare, **options, processor_kwargs={"cells": cells[:2]})
    row = cells[1:2].to_rows()[0]
    batch = processor.apply_chat_template([asked(cells[:1]), asked(row)], **options)
    for name in ("gene_ids", "expression", "cell_attention_mask"):
        assert torch.equal(batch[name], expected[name])
    with pytest.raises(ValueError, match="given twice"):
        processor.apply_chat_template(asked(row), **options, processor_kwargs={"cells": cells[:1]})


def test_a_part_of_an_unknown_type_is_named(processor):
    with pytest.raises(ValueError, match="type 'image'; scMMGPT reads 'cell' and 'text'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_the_saved_tokenizer_pads_as_the_processor_does(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == processor.tokenizer.padding_side == "left"


def test_texts_are_truncated_and_padded_as_by_a_tokenizer(processor, cells):
    text = ["<cell> this is a B cell", "<cell> a"]
    batch = processor(text=text, cells=cells, truncation=True, max_length=6)
    assert tokens_of(processor, batch, 0) == ["<cell>"] * 4 + ["this", "is"]
    batch = processor(text=text, cells=cells, padding="max_length", max_length=11, padding_side="right")
    assert tokens_of(processor, batch, 1) == ["<cell>"] * 4 + ["a"] + ["<pad>"] * 6
    assert batch["attention_mask"][1].tolist() == [1] * 5 + [0] * 6
    assert processor(text=text, cells=cells, pad_to_multiple_of=8)["input_ids"].shape == (2, 16)
    batch = processor(text=text, cells=cells, answers=["a B cell", ""], truncation=True, max_length=11)
    assert processor.tokenizer.convert_ids_to_tokens(batch["labels"][0][-2:].tolist()) == ["a", "B"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": True, "max_length": 7}, "Text 0 has 9 tokens, and max_length=7 would cut off some of its 4"),
        ({"max_length": 20}, "max_length=20 needs truncation=True or padding='max_length'"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": False}, "tokens make no tensor without padding"),
        ({"padding": "left"}, "padding is 'left'; choose True"),
    ],
)
def test_a_cell_is_never_cut_and_contradictions_are_refused(processor, cells, options, message):
    with pytest.raises(ValueError, match=message):
        processor(text=["this is a B cell <cell>", "<cell>"], cells=cells, **options)


def test_a_placeholder_is_not_taken_for_an_attack(processor):
    with pytest.raises(ValueError, match="sanitize_control_tokens would turn <cell> into plain text"):
        processor.apply_chat_template([{"role": "user", "content": "<cell>"}], sanitize_control_tokens=True)


def test_no_texts_are_refused(processor):
    with pytest.raises(ValueError, match="text is an empty list"):
        processor([])


@pytest.mark.parametrize("name", ["text", "qformer_text"])
def test_cells_in_the_place_of_texts_are_named(processor, adata, cells, name):
    for value in (adata[:2], cells, [adata[:2]]):
        with pytest.raises(TypeError, match=rf"{type(value).__name__} is not a text.*processor\(cells=...\)"):
            processor(**{name: value})


def test_the_feature_extractor_alone_takes_cells_and_rows_and_no_adata(processor, adata, cells):
    extractor = processor.feature_extractor
    expected = extractor(cells)
    assert all(torch.equal(extractor(cells.to_rows())[name], expected[name]) for name in expected)
    with pytest.raises(TypeError, match=r"AnnData is not Cells.*processor\(cells=adata\)"):
        extractor(adata)


def test_every_key_of_a_call_is_an_input_of_the_model(processor, cells):
    batch = processor(
        ["<cell> is", "a B cell"], cells[:1], answers=["a B cell", ""], qformer_text=["a"] * 2, target_cells=cells[:2]
    )
    assert set(batch) <= set(processor.model_input_names)


def test_an_unknown_argument_is_named(processor):
    with pytest.raises(TypeError, match=r"has no arguments \['trunction'\].* max_genes, .*truncation"):
        processor(text="a cell", trunction=True)


def test_an_unknown_gene_is_named(processor):
    with pytest.raises(ValueError, match="'NOT_A_GENE'"):
        processor.gene_ids_of(["NOT_A_GENE"])


@pytest.mark.parametrize("with_texts", [True, False])
def test_cells_of_another_copy_of_the_class_are_cells(processor, cells, with_texts, monkeypatch):
    name = "scmmgpt.copy_of_cells"  # as the modules of a checkpoint are copies of those of the package
    spec = importlib.util.spec_from_file_location(name, cells_scmmgpt.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)
    theirs = copy.Cells(**vars(cells))
    assert not isinstance(theirs, Cells)
    if not with_texts:
        processor = ScGPTProcessor(processor.feature_extractor, processor.gene_tokenizer)
    ours = processor(cells=cells)
    assert all(torch.equal(ours[key], value) for key, value in processor(cells=theirs).items())


def test_an_unknown_task_names_the_known_ones(processor):
    with pytest.raises(ValueError, match="describe.*generate"):
        processor.render_prompt("translate")


def test_saving_and_loading_changes_nothing(processor, cells, tmp_path):
    processor.prompts["describe"] = "<cell> what is this ?"
    processor.gene_aliases = {"aliases": {"ENSG00000000001": processor.gene_symbols([3])[0]}, "orthologs": {}}
    processor.save_pretrained(tmp_path)
    loaded = ScMMGPTProcessor.from_pretrained(tmp_path)
    assert loaded.prompts == processor.prompts
    assert loaded.gene_ids_of(["ENSG00000000001"]).tolist() == [3]
    arguments = {
        "text": ["this is <cell>", "the cell <cell> is"],
        "cells": cells,
        "answers": ["a B cell", ""],
        "qformer_text": ["a B cell", "monocyte"],
        "target_cells": cells,
    }
    ours, theirs = processor(**arguments), loaded(**arguments)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_prompt_of_a_checkpoint_is_text_and_nothing_in_it_is_interpreted(processor):
    processor.prompts["generate"] = "{text.__class__} {text:>9999999999} { {0} {text}"
    assert "{text.__class__} {text:>9999999999} { {0} a {text} cell" in processor.render_prompt(
        "generate", text="a {text} cell"
    )
