"""Everything that the tests share is small and built here in code: nothing is downloaded, nothing is large."""

import os
from pathlib import Path

import pytest


# Before transformers is imported: a hub id would cost a minute of retries before it failed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Words that a tiny tokenizer knows: enough for the captions and questions of the tests; the rest is `<unk>`.
WORDS = (
    "a an and are as B blood by CD4 cell cells describe disease expresses from generate healthy in is it killer label "
    "lymphocyte markers monocyte name natural normal of sample state T that the these this tissue type types what "
    "which with . , : ; ? ! - ' ( ) user assistant system"
).split()


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
    from scmmgpt.train.synthetic import synthetic_adata

    return synthetic_adata()


@pytest.fixture(scope="session")
def gene_vocabulary():
    """Gene symbol -> id, the special tokens first, over exactly the genes of `adata`."""
    from scmmgpt.train.synthetic import synthetic_adata

    return {token: i for i, token in enumerate(["<pad>", "<cls>", "<eoc>", *synthetic_adata(4).var_names])}


def word_level_tokenizer(vocabulary, **special_tokens):
    """A tokenizer over whole words, as an ordinary `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special_tokens["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture
def gene_tokenizer(gene_vocabulary):
    """The gene vocabulary as a tokenizer: one token a symbol."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(dict(gene_vocabulary), unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>", cls_token="<cls>")


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}assistant : {% generation %}"
    "{{ message['content'] }} </s> {% endgeneration %}{% else %}{{ message['role'] }} : {{ message['content'] }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def text_tokenizer():
    """The language model's tokenizer: whole words, left-padded, with a chat template."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = word_level_tokenizer(
        vocabulary, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def qformer_tokenizer():
    """The Q-Former's own tokenizer: whole words between `[CLS]` and `[SEP]`, as a BERT expects."""
    from tokenizers.processors import TemplateProcessing

    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = word_level_tokenizer(
        vocabulary, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return tokenizer


@pytest.fixture
def tiny_cell_config(gene_vocabulary):
    """A two-layer cell model over the genes of `adata`, without dropout."""
    from scmmgpt.configuration_scmmgpt import ScGPTConfig

    return ScGPTConfig(
        vocab_size=len(gene_vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout=0.0,
        pad_token_id=gene_vocabulary["<pad>"],
        cls_token_id=gene_vocabulary["<cls>"],
    )


@pytest.fixture
def tiny_llama_config(text_tokenizer):
    """A two-layer Llama over the words of `text_tokenizer` and one more token, `<cell>`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(text_tokenizer.get_vocab()) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=text_tokenizer.pad_token_id,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )


@pytest.fixture
def tiny_config(tiny_cell_config, tiny_llama_config, text_tokenizer, qformer_tokenizer):
    """The whole model in small: four queries, three condition tokens. Ids agree with the tokenizers above."""
    from scmmgpt.configuration_scmmgpt import ScMMGPTConfig

    qformer = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "cross_attention_frequency": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 64,
        "vocab_size": len(qformer_tokenizer.get_vocab()),
        "pad_token_id": qformer_tokenizer.pad_token_id,
    }
    return ScMMGPTConfig(
        cell_config=tiny_cell_config.to_dict(),
        qformer_config=qformer,
        text_config=tiny_llama_config.to_dict(),
        text_to_cell_config={**qformer, "num_hidden_layers": 1},
        num_query_tokens=4,
        num_condition_tokens=3,
        projection_dim=12,
        cell_token_id=len(text_tokenizer.get_vocab()),
    )


@pytest.fixture
def tiny_processor(text_tokenizer, qformer_tokenizer, gene_tokenizer, gene_vocabulary):
    """The processor that belongs to `tiny_model`."""
    from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
    from scmmgpt.processing_scmmgpt import ScMMGPTProcessor

    extractor = ScMMGPTFeatureExtractor(
        max_genes=32, pad_token_id=gene_vocabulary["<pad>"], cls_token_id=gene_vocabulary["<cls>"]
    )
    return ScMMGPTProcessor(extractor, text_tokenizer, qformer_tokenizer, gene_tokenizer, num_query_tokens=4)


@pytest.fixture
def tiny_model(tiny_config):
    """The whole model in small, with random weights, in evaluation mode."""
    import torch

    from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration

    torch.manual_seed(0)
    return ScMMGPTForConditionalGeneration(tiny_config).eval()


@pytest.fixture
def tiny_pipeline(tiny_model, tiny_processor):
    """`tiny_model` and `tiny_processor` on the CPU, ready for AnnData."""
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

    return ScMMGPTPipeline(tiny_model, tiny_processor, device="cpu")
