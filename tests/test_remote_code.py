"""A saved checkpoint is complete: it loads by the auto classes in a process that can not import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scgpt import ScGPTForSequenceClassification
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScGPTProcessor, ScMMGPTProcessor


PROGRAM = """
import json, sys
import anndata, torch
from datasets.fingerprint import Hasher
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoModelForMultimodalLM

path, again, cells = sys.argv[1:]
answers = {}
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, report = auto.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model).__name__ == "ScMMGPTForConditionalGeneration", type(model)
assert type(AutoConfig.from_pretrained(path, trust_remote_code=True)).__name__ == "ScMMGPTConfig"
processor, copy = (AutoProcessor.from_pretrained(path, trust_remote_code=True) for _ in range(2))
assert Hasher.hash(processor) == Hasher.hash(copy)  # so `Dataset.map` finds what it has done before
assert Hasher.hash(model)
for place in (path, again):
    inputs = processor(
        text=[processor.render_prompt("describe")] * 3,
        cells=anndata.read_h5ad(cells)[:3],
        qformer_text=["a B cell"] * 3,
    )
    match = model.match(**{name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")})
    prompt = {name: inputs[name] for name in inputs if not name.startswith("qformer")}
    text = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    answers[place] = {"match": match.tolist(), "text": text.tolist()}
    model.save_pretrained(again)
    processor.save_pretrained(again)
    model = AutoModel.from_pretrained(again, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
print(json.dumps(answers))
"""


CELL_PROGRAM = """
import json, sys
import anndata, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoProcessor

path, cells = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
batch = processor(anndata.read_h5ad(cells)[:3])
model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
masked = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True)
assert masked(**batch).logits.shape == batch["gene_ids"].shape
assert AutoModel.from_pretrained(path, trust_remote_code=True)(**batch).pooler_output.shape == (3, 16)
print(json.dumps({"logits": model(**batch).logits.tolist(), "labels": model.config.id2label}))
"""


@pytest.fixture
def checkpoint(tiny_config, text_tokenizer, qformer_tokenizer, gene_tokenizer, tmp_path):
    torch.manual_seed(0)
    model = ScMMGPTForConditionalGeneration(tiny_config).eval()
    extractor = ScMMGPTFeatureExtractor(max_genes=20, pad_token_id=0, cls_token_id=1)
    processor = ScMMGPTProcessor(extractor, text_tokenizer, qformer_tokenizer, gene_tokenizer, num_query_tokens=4)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return model, processor, tmp_path / "checkpoint"


def run_without_package(program, tmp_path, *arguments):
    """What a program prints last, as JSON, in a process that cannot import this package."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    hide = "import sys\nsys.modules['scmmgpt'] = None  # importing it raises ImportError\n"
    command = [sys.executable, "-c", hide + program, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_a_checkpoint_answers_the_same_where_the_package_is_not_installed(checkpoint, adata, tmp_path):
    model, processor, path = checkpoint
    adata.write_h5ad(tmp_path / "cells.h5ad")
    answers = run_without_package(PROGRAM, tmp_path, path, tmp_path / "again", tmp_path / "cells.h5ad")
    inputs = processor(text=[processor.render_prompt("describe")] * 3, cells=adata[:3], qformer_text=["a B cell"] * 3)
    match = model.match(**{name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")})
    prompt = {name: inputs[name] for name in inputs if not name.startswith("qformer")}
    text = model.generate(**prompt, max_new_tokens=6, do_sample=False).tolist()
    assert len(answers) == 2
    for answer in answers.values():
        assert answer["match"] == pytest.approx(match.tolist(), abs=1e-6)
        assert answer["text"] == text


def test_a_classifier_of_cells_answers_the_same_where_the_package_is_not_installed(
    tiny_cell_config, tiny_processor, adata, tmp_path
):
    tiny_cell_config.id2label = {0: "B cell", 1: "T cell"}
    torch.manual_seed(0)
    model = ScGPTForSequenceClassification(tiny_cell_config).eval()
    processor = ScGPTProcessor(tiny_processor.feature_extractor, tiny_processor.gene_tokenizer)
    model.save_pretrained(tmp_path / "classifier")
    processor.save_pretrained(tmp_path / "classifier")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    answers = run_without_package(CELL_PROGRAM, tmp_path, tmp_path / "classifier", tmp_path / "cells.h5ad")
    expected = model(**processor(adata[:3])).logits
    torch.testing.assert_close(torch.tensor(answers["logits"]), expected, atol=1e-6, rtol=1e-6)
    assert answers["labels"] == {"0": "B cell", "1": "T cell"}


def test_a_checkpoint_holds_every_file_that_it_needs(checkpoint):
    _, _, path = checkpoint
    names = {file.name for file in path.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert {"modeling_scmmgpt.py", "processing_scmmgpt.py", "reading_scmmgpt.py", "readout_scmmgpt.py"} <= code
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    for name in code:
        assert (path / name).read_bytes() == (Path(__file__).parents[1] / name).read_bytes()


def test_a_stage_1_checkpoint_says_that_it_is_one(tiny_config, tmp_path):
    ScMMGPTForCellTextAlignment(tiny_config).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_scmmgpt.ScMMGPTForCellTextAlignment"
    assert "AutoModelForCausalLM" not in auto_map
