"""What goes to the Hub comes back: corpus, checkpoint, adapter and metric, by way of a local stand-in of the Hub."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from scmmgpt.tests.hub import run_client, serve_hub
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.data.dataset_card import dataset_card
from scmmgpt.train.data.sharing import write_space


@pytest.fixture
def hub():
    with serve_hub() as (hub, endpoint):
        yield hub, endpoint


@pytest.fixture
def shared_corpus(corpus, tmp_path):
    """A corpus as `prepare` leaves it: with a card, a lock and a fast copy."""
    path = shutil.copytree(corpus, tmp_path / "cells")
    manifest = open_corpus(path).manifest
    source = {"name": "synthetic", "licence": "CC0", "n_kept": 40, "genes": {"matched": 30, "measured": 30}}
    manifest.sources = [{**source, "values": {"kind": "counts"}}]
    manifest.dropped, manifest.notes, manifest.command = {"cells": {}}, {"split": "by hand"}, "by hand"
    (path / "README.md").write_text(dataset_card("cells", manifest))
    (path / ".lock").write_text("1")
    (path / "cache").mkdir()
    (path / "cache" / "train.arrow").write_text("fast")
    return path


ROUND_TRIP_OF_A_CORPUS = """
import sys
from datasets import load_dataset
from scmmgpt.train.data.corpus import open_corpus

own = open_corpus(sys.argv[1])
name = own.push_to_hub("cells")
assert name == "me/cells", name
again = open_corpus(name)
assert again.repo_id == name
assert again.manifest == own.manifest
ours, theirs = own.load("train")[0], again.load("train")[0]
assert (ours.counts == theirs.counts).all() and (ours.cell_ids == theirs.cell_ids).all()
stream = load_dataset(name, split="train", streaming=True)
assert stream.info.splits["train"].num_examples == 32
assert stream.features["cell_id"].dtype == "int64", stream.features
assert stream.features["gene_ids"].feature.dtype == "uint16"
rows = list(stream)
assert [row["cell_id"] % 2**64 for row in rows] == ours.cell_ids.tolist()
assert len(load_dataset(name, split="validation")) == 8
"""


def test_a_corpus_is_a_dataset_of_the_hub(hub, shared_corpus, tmp_path):
    hub, endpoint = hub
    run_client(ROUND_TRIP_OF_A_CORPUS, endpoint, tmp_path, shared_corpus)
    names = set(hub.files("me/cells", "dataset"))
    assert {"README.md", "manifest.json", "vocab.json", "splits.json", "genes.parquet"} <= names
    assert not [name for name in names if "lock" in name or name.startswith("cache")]


def test_the_folder_of_a_corpus_loads_by_its_path(shared_corpus, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(shared_corpus), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features == open_corpus(shared_corpus).features()
    assert len(rows) == 32
    front = yaml.safe_load((shared_corpus / "README.md").read_text().split("---")[1])
    assert [split["num_examples"] for split in front["dataset_info"]["splits"]] == [32, 8]


def test_a_corpus_that_is_nowhere_says_so():
    with pytest.raises(FileNotFoundError, match="me/cells is neither a folder nor a corpus of the Hub"):
        open_corpus("me/cells")


ALIGN_ON_A_CORPUS_OF_THE_HUB = """
import sys
from scmmgpt.tests.test_train import align_only
from scmmgpt.train.data.corpus import open_corpus

corpus, bert = sys.argv[1:]
open_corpus(corpus).push_to_hub("me/cells")
align_only("me/cells", bert, "run", eval_strategy="epoch", push_to_hub=True, hub_model_id="me/aligned")
"""


def test_a_run_on_a_corpus_of_the_hub_names_the_corpus_and_its_results(hub, shared_corpus, bert, tmp_path):
    hub, endpoint = hub
    run_client(ALIGN_ON_A_CORPUS_OF_THE_HUB, endpoint, tmp_path, shared_corpus, bert)
    files = hub.files("me/aligned")
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["me/cells"]
    measured = {
        entry["dataset"]["task_id"]: entry["value"] for entry in yaml.safe_load(files[".eval_results/align.yaml"])
    }
    assert measured["eval_zero_shot_accuracy"] == next(
        result.metric_value for result in card.data.eval_results if result.metric_type == "zero_shot_accuracy"
    )


def test_the_folder_of_a_space_runs_as_it_is(tiny_pipeline, tmp_path):
    """With the modules that it carries; the library that draws the page is replaced by one that draws nothing."""
    tiny_pipeline.save_pretrained(tmp_path / "checkpoint")
    folder = write_space(tmp_path / "page", str(tmp_path / "checkpoint"))
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [str(tmp_path / "checkpoint")])
    script = (
        "import runpy, sys, unittest.mock\n"
        "gradio = sys.modules['gradio'] = unittest.mock.MagicMock()\n"
        "gradio.Error = ValueError\n"
        "for name in ('Chatbot', 'Dataframe', 'File', 'HTML', 'Progress'):  # that the page asks parts about\n"
        "    members = {'__init__': lambda self, *of, **options: None, '__getattr__': lambda self, name: gradio}\n"
        "    setattr(gradio, name, type(name, (), members))\n"
        "runpy.run_path('app.py', run_name='__main__')\n"
        "print(gradio.Blocks.return_value.__enter__.return_value.launch.call_args)\n"
        "print(sys.modules['scmmgpt'].__file__)\n"
        "import scmmgpt.eval.figures\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.0.0.0" in done.stdout
    assert str(folder / "scmmgpt" / "__init__.py") in done.stdout
    assert any(line.startswith("gradio") for line in (folder / "requirements.txt").read_text().splitlines())


TUNE_AND_PUSH = """
import json
import sys
from scmmgpt.tests.test_train import tune_only

corpus, aligned = sys.argv[1:]
tune_only(corpus, aligned, "run", push_to_hub=True, hub_model_id="me/described", eval_strategy="epoch")
"""
LOAD_FROM_THE_HUB = """
import sys
sys.modules["scmmgpt"] = None  # importing it raises ImportError
import re
import torch
from huggingface_hub import ModelCard

shown = {}
for name in ("me/described", "me/described-adapter"):
    (code,) = re.findall("```python(.*?)```", ModelCard.load(name).text, flags=re.DOTALL)
    exec(code, shown)
    shown[name] = shown["model"].eval()
merged, adapted, processor = shown["me/described"], shown["me/described-adapter"], shown["processor"]
batch = processor(text="a cell")
torch.testing.assert_close(adapted(**batch).logits, merged(**batch).logits, rtol=1e-4, atol=1e-5)
try:
    merged.load_adapter("me/described-adapter")
except ValueError as error:
    print(error)
"""


def test_checkpoint_base_and_adapter_are_pushed_and_load_without_the_package(hub, corpus, aligned, tmp_path):
    hub, endpoint = hub
    run_client(TUNE_AND_PUSH, endpoint, tmp_path, corpus, aligned)
    ids = {name for _, name in hub.repos}
    assert ids == {"me/described", "me/described-base", "me/described-adapter"}
    checkpoint, adapter = hub.files("me/described"), hub.files("me/described-adapter")
    assert {"model.safetensors", "modeling_scmmgpt.py", "collator_scmmgpt.py", "training.json"} <= set(checkpoint)
    assert not [name for name in checkpoint if name.startswith(("base/", "adapter", "checkpoint-"))]
    named = json.loads(adapter["adapter_config.json"])
    assert named["base_model_name_or_path"] == "me/described-base"
    assert named["revision"] == hub.commit_of("model", "me/described-base")
    cards = {
        name: ModelCard(hub.files(f"me/described{name}")["README.md"].decode()) for name in ("", "-adapter", "-base")
    }
    assert cards[""].data.library_name == "transformers"
    assert cards["-adapter"].data.library_name == "peft"
    assert 'from_pretrained("me/described-base", revision=revision' in cards["-base"].text
    assert cards["-adapter"].data.base_model in ("me/described-base", ["me/described-base"])
    printed = run_client(LOAD_FROM_THE_HUB, endpoint, tmp_path)
    assert "merged into this checkpoint already" in printed


PUSH_A_METRIC = """
import sys
import evaluate
from huggingface_hub import snapshot_download
from scmmgpt.train.data.sharing import push_folder

push_folder(sys.argv[1], "me/cell_type_annotation", repo_type="space")
folder = snapshot_download("me/cell_type_annotation", repo_type="space", local_dir="back/cell_type_annotation")
print(evaluate.load("back/cell_type_annotation", cache_dir="cache").compute(predictions=[1, 2], references=[1, 1]))
"""


def test_the_folder_of_a_metric_comes_back(hub, tmp_path):
    from scmmgpt.tests.test_eval_metrics import METRICS

    printed = run_client(PUSH_A_METRIC, hub[1], tmp_path, METRICS / "cell_type_annotation")
    assert "'accuracy': 0.5" in printed
