"""Small synthetic cells and a tiny random model, offline and reproducible, for tests, documentation and first trials.

`synthetic_adata` draws annotated cells of known types. `tiny_pipeline` has a tiny model of all parts over the same
genes, with random weights: every call works, and the results are meaningless.
"""

from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from scmmgpt.configuration_scmmgpt import ScGPTConfig, ScMMGPTConfig
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout, panel_profiles
from scmmgpt.regression_scmmgpt import sum_weights


# Cell type -> (Cell Ontology id, marker genes). All types express the background genes equally.
MARKERS = {
    "B cell": ("CL:0000236", ["CD19", "CD79A", "CD79B", "MS4A1"]),
    "T cell": ("CL:0000084", ["CD3D", "CD3E", "IL7R", "TRAC"]),
    "natural killer cell": ("CL:0000623", ["GNLY", "KLRD1", "NKG7", "PRF1"]),
    "monocyte": ("CL:0000576", ["CD14", "FCN1", "LYZ", "S100A9"]),
}
BACKGROUND = (
    "ACTB", "ACTG1", "B2M", "CFL1", "EEF1A1", "EEF2", "FAU", "FTH1", "FTL", "GAPDH", "HSP90AB1", "MALAT1",
    "PABPC1", "PFN1", "PTMA", "RPL10", "RPL13", "RPLP0", "RPS18", "RPS27", "TMSB10", "TMSB4X", "TPT1", "UBC",
)  # fmt: skip
ANNOTATIONS = {  # the same for all cells
    "tissue": ("blood", "UBERON:0000178"),
    "disease": ("normal", "PATO:0000461"),
    "assay": ("10x 3' v3", "EFO:0009922"),
    "sex": ("female", "PATO:0000383"),
    "organism": ("Homo sapiens", "NCBITaxon:9606"),
}
# Vocabulary of the tiny tokenizers, for the captions and questions of the tests; other words are `<unk>`.
WORDS = (
    "a an and are as B blood by CD4 cell cells describe disease expresses from generate healthy in is it killer label "
    "lymphocyte markers monocyte name natural normal of sample state T that the these this tissue type types what "
    "which with . , : ; ? ! - ' ( ) user assistant system"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}assistant : {% generation %}"
    "{{ message['content'] }} </s> {% endgeneration %}{% else %}{{ message['role'] }} : {{ message['content'] }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}


def synthetic_adata(n_obs: int = 60, *, seed: int = 0, mean_total: float = 200.0) -> anndata.AnnData:
    """Draw cells of four blood types over forty genes. The markers of a type are twentyfold higher in its cells.

    Args:
        n_obs: Number of cells; types alternate.
        seed: Seed of the Poisson counts and of the library sizes.
        mean_total: Median library size.

    Returns:
        `AnnData` of shape `(n_obs, 40)`: raw counts (CSR, float32) in `X`, gene symbols as `var_names`, and in `obs`
        the columns of CELLxGENE that captions use, with two donors.

    >>> adata = synthetic_adata(8)
    >>> adata.shape, adata.obs["cell_type"].iloc[0]
    ((8, 40), 'B cell')
    """
    rng = np.random.default_rng(seed)
    types = list(MARKERS)
    genes = sorted({gene for _, markers in MARKERS.values() for gene in markers} | set(BACKGROUND))
    labels = np.resize(types, n_obs)

    profiles = np.ones((len(types), len(genes)))
    for row, (_, markers) in enumerate(MARKERS.values()):
        profiles[row, [genes.index(gene) for gene in markers]] = 20.0
    profiles /= profiles.sum(axis=1, keepdims=True)
    totals = mean_total * rng.lognormal(sigma=0.2, size=(n_obs, 1))
    counts = rng.poisson(totals * profiles[np.arange(n_obs) % len(types)]).astype(np.float32)

    obs = pd.DataFrame({"cell_type": pd.Categorical(labels)}, index=[f"cell-{i}" for i in range(n_obs)])
    obs["cell_type_ontology_term_id"] = pd.Categorical([MARKERS[label][0] for label in labels])
    for name, (word, term) in ANNOTATIONS.items():
        obs[name], obs[f"{name}_ontology_term_id"] = word, term
    obs["donor_id"] = np.where(np.arange(n_obs) < n_obs // 2, "donor-1", "donor-2")
    return anndata.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))


def tiny_gene_vocabulary() -> dict[str, int]:
    """Gene symbol -> id, for the special tokens and the genes of `synthetic_adata`."""
    return {token: i for i, token in enumerate(["<pad>", "<cls>", "<eoc>", *synthetic_adata(4).var_names])}


def tiny_gene_tokenizer() -> PreTrainedTokenizerFast:
    """The gene vocabulary as a tokenizer, with one token per symbol."""
    backend = Tokenizer(models.WordLevel(tiny_gene_vocabulary(), unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>", cls_token="<cls>")


def _word_tokenizer(padding_side: str, **special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words. The special tokens have the first ids, in the order of the arguments."""
    vocabulary = {token: i for i, token in enumerate([*special_tokens.values(), *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special_tokens["unk_token"]))
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **special_tokens)


def tiny_text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the language model: whole words, left-padded, with a chat template."""
    tokenizer = _word_tokenizer("left", pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qformer_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the Q-Former: whole words between `[CLS]` and `[SEP]`, as in BERT."""
    tokenizer = _word_tokenizer("right", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def tiny_cell_config() -> ScGPTConfig:
    """A two-layer cell model over the genes of `synthetic_adata`, without dropout."""
    sizes: dict[str, Any] = {"vocab_size": len(tiny_gene_vocabulary()), "hidden_size": 16, "intermediate_size": 24}
    return ScGPTConfig(**sizes, **TWO_LAYERS, hidden_dropout=0.0, pad_token_id=0, cls_token_id=1)


def tiny_llama_config() -> LlamaConfig:
    """A two-layer Llama over the words of `tiny_text_tokenizer` and the token `<cell>`."""
    tokenizer = tiny_text_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer.get_vocab()) + 1, "hidden_size": 32, "intermediate_size": 48}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    options: dict[str, Any] = {"num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": True}
    return LlamaConfig(**sizes, **TWO_LAYERS, **tokens, **options)


def tiny_config() -> ScMMGPTConfig:
    """A tiny configuration of all parts: four queries, three condition tokens, ids of the tiny tokenizers."""
    tokenizer = tiny_qformer_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer.get_vocab()), "hidden_size": 24, "intermediate_size": 32}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"cross_attention_frequency": 1, "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    qformer = {**sizes, **TWO_LAYERS, **no_dropout, **options}
    return ScMMGPTConfig(
        cell_config=tiny_cell_config().to_dict(),
        qformer_config=qformer,
        text_config=tiny_llama_config().to_dict(),
        text_to_cell_config={**qformer, "num_hidden_layers": 1},
        num_query_tokens=4,
        num_condition_tokens=3,
        projection_dim=12,
        cell_token_id=len(tiny_text_tokenizer().get_vocab()),
    )


def tiny_processor() -> ScMMGPTProcessor:
    """The processor for `tiny_config`, with sequences of at most 32 tokens."""
    extractor = ScMMGPTFeatureExtractor(max_genes=32, pad_token_id=0, cls_token_id=1)
    tokenizers = (tiny_text_tokenizer(), tiny_qformer_tokenizer(), tiny_gene_tokenizer())
    return ScMMGPTProcessor(extractor, *tokenizers, num_query_tokens=4)


def tiny_pipeline(**config: Any) -> ScMMGPTPipeline:
    """A tiny model of all parts with random weights, on the CPU.

    `config` sets fields of [`ScMMGPTConfig`], such as `expression_head="nb"`.
    >>> tiny_pipeline().generate("a B cell", genes=["CD19", "LYZ"]).shape
    (1, 2)
    """
    configuration = tiny_config()
    for name, value in config.items():
        setattr(configuration, name, value)
    torch.manual_seed(0)
    return ScMMGPTPipeline(ScMMGPTForConditionalGeneration(configuration), tiny_processor(), device="cpu")


def fitted_pipeline() -> ScMMGPTPipeline:
    """The tiny pipeline with a label readout of the four types of `synthetic_adata`, by nearest centroids.

    Labels and evidence are meaningful; descriptions and embeddings are not.

    >>> adata = fitted_pipeline().annotate(synthetic_adata(8))
    >>> bool((adata.obs["scmmgpt_cell_type"] == adata.obs["cell_type"]).all())
    True
    """
    pipeline, adata = tiny_pipeline(), synthetic_adata(400, seed=1)
    cells, _ = pipeline.processor.read_cells(adata)
    genes, types = np.unique(cells.gene_ids).astype(np.int64), list(MARKERS)
    profiles = sum_weights(*panel_profiles(cells, genes, 1.0), np.eye(len(genes), dtype=np.float32))
    centroids = np.stack([profiles[np.asarray(adata.obs["cell_type"]) == name].mean(axis=0) for name in types])
    mean = centroids.mean(axis=0)
    readout = ScMMGPTLabelReadout.from_statistics(
        gene_ids=genes,
        weights=(centroids - mean) / 40,
        bias=-((centroids**2).sum(axis=1) - (mean**2).sum()) / 80,
        centroids=centroids,
        factors=np.linalg.svd(profiles - mean, full_matrices=False)[2][:4],
        mean=mean,
        noise=profiles.var(axis=0),
        shares=(profiles**2).mean(axis=0) / (profiles**2).sum(axis=1).mean(),
        temperature=np.ones(()),
    )
    texts = {name: f"cell type : {name} ." for name in types}
    model: Any = pipeline.model
    model.model.label_readout = readout
    sizes = {"num_genes": len(genes), "num_factors": len(readout.factors)}
    model.config.label_readout = {"texts": list(texts.values()), **sizes}
    ids = {name: MARKERS[name][0] for name in types}
    terms = [{"id": "CL:0000542", "name": "lymphocyte", "names": ["lymphocyte"], "labels": types[:3]}]
    settings = {"matching_weight": 0.0, "temperature": 1.0, "readout_temperature": 1.0}
    model.config.annotation = {"labels": texts, "cl_ids": ids, "terms": terms, **settings}
    return pipeline
