"""Everything that the tests share is small and built here in code: nothing is downloaded, nothing is large."""

import gc
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


# Before transformers is imported: a hub id would cost a minute of retries before it failed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_matrix

from scmmgpt import synthetic
from scmmgpt.cells_scmmgpt import Cells, hash_names
from scmmgpt.tests.corpora import write_corpus


TYPES = {"B cell": "CL:0000236", "T cell": "CL:0000084", "monocyte": "CL:0000576"}


def pytest_collection_finish():
    """Leave the modules out of garbage collections, of which each training run orders one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_level():
    """A command's main sets the package's level for its process: here it ends with the test that ran it."""
    package = logging.getLogger("scmmgpt")
    package.setLevel(logging.NOTSET)
    yield
    package.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Leave out the picture of the curves, a third of the time of a short run; `test_train.py` tests the picture."""
    if align := sys.modules.get("scmmgpt.train.align"):
        monkeypatch.setattr(align, "save_curves", lambda *args: None)


@pytest.fixture(scope="session")
def shared_data():
    """Folder of the development data sets, which are not part of the repository."""
    shared = Path(os.environ.get("SCMMGPT_SHARED", Path(__file__).parents[1].parent / "shared")) / "data"
    if not shared.is_dir():
        pytest.skip(f"the development data are absent: {shared} is not a folder (set SCMMGPT_SHARED)")
    return shared


@pytest.fixture
def adata():
    """Sixty synthetic cells of four types over forty genes: raw counts in CSR."""
    return synthetic.synthetic_adata()


@pytest.fixture
def gene_vocabulary():
    """Gene symbol -> id, the special tokens first, over exactly the genes of `adata`."""
    return synthetic.tiny_gene_vocabulary()


@pytest.fixture
def gene_tokenizer():
    """The gene vocabulary as a tokenizer: one token a symbol."""
    return synthetic.tiny_gene_tokenizer()


@pytest.fixture
def text_tokenizer():
    """The language model's tokenizer: whole words, left-padded, with a chat template."""
    return synthetic.tiny_text_tokenizer()


@pytest.fixture
def qformer_tokenizer():
    """The Q-Former's own tokenizer: whole words between `[CLS]` and `[SEP]`, as a BERT expects."""
    return synthetic.tiny_qformer_tokenizer()


@pytest.fixture
def tiny_cell_config():
    """A two-layer cell model over the genes of `adata`, without dropout."""
    return synthetic.tiny_cell_config()


@pytest.fixture
def tiny_llama_config():
    """A two-layer Llama over the words of `text_tokenizer` and one more token, `<cell>`."""
    return synthetic.tiny_llama_config()


@pytest.fixture
def tiny_config():
    """The whole model in small: four queries, three condition tokens. Ids agree with the tokenizers above."""
    return synthetic.tiny_config()


@pytest.fixture
def tiny_processor():
    """The processor that belongs to `tiny_model`."""
    return synthetic.tiny_processor()


@pytest.fixture
def tiny_pipeline():
    """The whole model in small, with random weights, and its processor, ready for AnnData."""
    return synthetic.tiny_pipeline()


@pytest.fixture(scope="module")
def pipeline():
    """The tiny pipeline whose label readout knows four types, one for each file of tests."""
    return synthetic.fitted_pipeline()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some kilobytes, or changes its size; returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(kilobytes):
        how = "remount," if disk.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs", str(disk)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this user cannot mount a file system")
        return disk

    yield resize
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def labelled_checkpoint(tmp_path_factory):
    """The folder of the tiny pipeline with two labels, which no test alters."""
    pipeline = synthetic.tiny_pipeline()
    pipeline.model.config.annotation = {"labels": {"B": "a B cell", "T": "a T cell"}, "cl_ids": {"B": "CL:0000236"}}
    path = tmp_path_factory.mktemp("labelled") / "checkpoint"
    pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture
def checkpoint(labelled_checkpoint, tmp_path):
    """A copy of it in the test's folder, which the test may alter."""
    return str(shutil.copytree(labelled_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def tiny_model(tiny_pipeline):
    """The model of `tiny_pipeline`, in evaluation mode."""
    return tiny_pipeline.model


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A one-layer BERT over bytes-like words, saved as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    words = "cell type a is this of the . , : B T monocyte lymphocyte lineage blood that capable immunity in".split()
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty cells of three types with planted markers, over thirty genes."""
    path = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    types = np.array(list(TYPES))[np.arange(40) % 3]
    counts = rng.poisson(1.0, (40, 30))
    for row, name in enumerate(types):
        block = list(TYPES).index(name) * 5
        counts[row, block : block + 5] += rng.poisson(12, 5)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<cls>", "<eoc>", *(f"GENE{i}" for i in range(30))])}
    cells = Cells.from_csr(csr_matrix(counts), np.arange(3, 33), cell_ids=hash_names([f"cell{i}" for i in range(40)]))
    obs = {
        "cell_type": types,
        "cell_type_ontology_term_id": [TYPES[name] for name in types],
        "tissue": ["blood"] * 40,
        "dataset_id": ["synthetic"] * 40,
    }
    take = lambda a, b: (cells[a:b], {name: list(values[a:b]) for name, values in obs.items()})  # noqa: E731
    write_corpus(path, vocabulary, {"train": take(0, 32), "validation": take(32, 40)}, row_group_size=8)
    shares = counts[:32] / counts[:32].sum(axis=1, keepdims=True)
    means = np.concatenate([np.zeros(3), shares.mean(axis=0)])
    pq.write_table(pa.table({"gene_id": np.arange(33), "mean_share": means}), path / "genes.parquet")
    return str(path)


@pytest.fixture(scope="session")
def aligned(corpus, bert, tmp_path_factory):
    """A stage-1 checkpoint after two steps on the corpus."""
    from scmmgpt.tests.test_train import run_align

    path = str(tmp_path_factory.mktemp("aligned"))
    run_align(corpus, bert, path)
    return path
