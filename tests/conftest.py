"""Everything that the tests share is small and built here in code: nothing is downloaded, nothing is large."""

import os
from pathlib import Path

import pytest


# Before transformers is imported: a hub id would cost a minute of retries before it failed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from scmmgpt.train import synthetic


@pytest.fixture(scope="session")
def shared_data():
    """Folder of the development data sets, which are not part of the repository."""
    shared = Path(os.environ.get("SCMMGPT_SHARED", Path(__file__).parents[1].parent / "shared")) / "data"
    if not shared.is_dir():
        pytest.skip(f"the development data are absent: {shared} is no folder (set SCMMGPT_SHARED)")
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


@pytest.fixture
def tiny_model(tiny_pipeline):
    """The model of `tiny_pipeline`, in evaluation mode."""
    return tiny_pipeline.model
