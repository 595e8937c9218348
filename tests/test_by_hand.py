"""What docs/training.md shows runs as it stands: `Trainer`, PEFT and TRL on one's own cells."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment


PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
SECTION = PAGE.split("## In your own code")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # which transformers sets on machines without a GPU, too
def test_the_page_runs_as_it_stands(corpus, bert, adata, tiny_pipeline, tiny_config, tmp_path, monkeypatch):
    """Block after block, since each uses names of those before; the first ones are names that the page explains."""
    monkeypatch.chdir(tmp_path)
    tiny_pipeline.save_pretrained("checkpoint")
    torch.manual_seed(0)
    ScMMGPTForCellTextAlignment(tiny_config).save_pretrained("stage 1")
    tiny_pipeline.processor.save_pretrained("stage 1")
    names = {"checkpoint": str(tmp_path / "checkpoint"), "aligned": str(tmp_path / "stage 1"), "adata": adata}
    names |= {"corpus": corpus, "bert": bert}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/training.md, block {number}", "exec"), names)
        losses = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
        assert np.isfinite(losses).all(), number


@pytest.fixture
def rows(tiny_processor, adata):
    cells, _ = tiny_processor.read_cells(adata[:3].copy())
    turns = [
        [{"role": "user", "content": "<cell> a"}, {"role": "assistant", "content": name}] for name in ("b", "a", "b")
    ]
    return [{"cells": cells[i], "messages": turns[i]} for i in range(3)]


def test_the_assistants_words_alone_are_learned(tiny_processor, rows):
    batch = tiny_processor.data_collator()(rows)
    learned = [ids[ids != -100].tolist() for ids in batch["labels"]]
    tokenizer = tiny_processor.tokenizer
    assert learned == [[tokenizer.convert_tokens_to_ids(name), tokenizer.eos_token_id] for name in ("b", "a", "b")]
    assert len(batch["gene_ids"]) == 3
    assert ((batch["input_ids"] == tiny_processor.cell_token_id).sum(1) == tiny_processor.num_query_tokens).all()


def test_rows_in_every_form_give_the_same_batch(tiny_processor, rows, adata):
    collator = tiny_processor.data_collator()
    ours = collator(rows)
    as_rows = [{**row, "cells": row["cells"].to_rows()} for row in rows]
    as_row = [{"messages": row["messages"], **row["cells"].to_rows()[0]} for row in rows]
    as_adata = [{**row, "cells": adata[i : i + 1].copy()} for i, row in enumerate(rows)]
    as_parts = []
    for row in rows:
        parts = [{"type": "cell", "cell": row["cells"].to_rows()[0]}, {"type": "text", "text": "a"}]
        as_parts.append({"messages": [{"role": "user", "content": parts}, row["messages"][1]]})
    for theirs in (collator(as_rows), collator(as_row), collator(as_adata), collator(as_parts)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name


def test_a_row_may_have_several_cells_or_none(tiny_processor, rows):
    two = {"cells": Cells.concatenate([rows[0]["cells"], rows[1]["cells"]])}
    two["messages"] = [{"role": "user", "content": "<cell> a <cell>"}, {"role": "assistant", "content": "b"}]
    none = {"cells": [], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    batch = tiny_processor.data_collator()([two, none, rows[2]])
    shown = (batch["input_ids"] == tiny_processor.cell_token_id).sum(1) // tiny_processor.num_query_tokens
    assert shown.tolist() == [2, 0, 1]
    assert len(batch["gene_ids"]) == 3


def test_a_row_whose_cells_and_placeholders_differ_is_refused(tiny_processor, rows):
    rows[1]["cells"] = []
    with pytest.raises(ValueError, match="row 1 mention 1 cells .*, but the row has 0"):
        tiny_processor.data_collator()(rows)


def test_a_target_is_what_the_prompt_generates(tiny_model, tiny_processor, rows):
    prompt = [{"role": "user", "content": "Generate a"}]
    generated = [{"cells": [], "messages": prompt, "target": rows[i]["cells"]} for i in range(2)]
    described = [{**row, "target": None} for row in rows[2:]]
    batch = tiny_processor.data_collator()(described + generated)
    assert batch["target_rows"].tolist() == [1, 2]
    outputs = tiny_model(**batch)
    assert outputs.expression_loss > 0
    assert outputs.language_loss > 0


def test_a_batch_that_only_generates_has_no_language_loss(tiny_model, tiny_processor, rows):
    prompt = [{"role": "user", "content": "Generate a"}]
    generated = [{"cells": [], "messages": prompt, "target": rows[i]["cells"]} for i in range(2)]
    outputs = tiny_model(**tiny_processor.data_collator()(generated))
    assert outputs.language_loss == 0
    assert outputs.loss == tiny_model.config.expression_weight * outputs.expression_loss > 0
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in tiny_model.parameters() if p.grad is not None)


def test_columns_that_a_trainer_drops_are_asked_for(tiny_processor, rows):
    dropped = [{"gene_ids": rows[0]["cells"].gene_ids}]
    with pytest.raises(ValueError, match="no 'cell_id'.*remove_unused_columns=False"):
        tiny_processor.data_collator()(dropped)


def test_preferences_come_chosen_first_with_their_cells_twice(tiny_processor, rows):
    pairs = [
        {"cells": row["cells"], "prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": other}
        for row, other in zip(rows, [[{"role": "assistant", "content": "a b"}]] * 3, strict=True)
    ]
    batch = tiny_processor.data_collator()(pairs)
    assert batch["completion_mask"].sum(1).tolist() == [2, 2, 2, 3, 3, 3]
    assert torch.equal(batch["gene_ids"][:3], batch["gene_ids"][3:])
    assert not {"ref_chosen_logps", "ref_rejected_logps"} & set(batch)
    known = [{**pair, "ref_chosen_logps": -1.5, "ref_rejected_logps": -float(i)} for i, pair in enumerate(pairs)]
    batch = tiny_processor.data_collator()(known)
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -1.5, -1.5]
    assert batch["ref_rejected_logps"].tolist() == [0, -1, -2]


def test_labels_are_numbers_of_classes(tiny_processor, rows):
    batch = tiny_processor.data_collator()([{"cells": row["cells"], "label": i} for i, row in enumerate(rows)])
    assert batch["labels"].tolist() == [0, 1, 2]


def test_rows_without_anything_to_learn_say_what_they_have(tiny_processor):
    with pytest.raises(ValueError, match=r"their columns are \['colour'\]"):
        tiny_processor.data_collator()([{"colour": "blue"}])
