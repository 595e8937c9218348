import json

import numpy as np
import pytest
import torch

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.tests.corpora import write_corpus
from scmmgpt.train import align, pretrain
from scmmgpt.train.data.corpus import open_corpus


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def corpus_path(tmp_path, adata, gene_vocabulary):
    ids = np.array([gene_vocabulary[name] for name in adata.var_names])
    cells = Cells.from_csr(adata.X, ids)
    obs = {"barcode": adata.obs_names.to_numpy()}
    parts = {"train": slice(0, 48), "validation": slice(48, 60)}
    write_corpus(
        tmp_path / "corpus",
        gene_vocabulary,
        {split: (cells[part], {name: column[part] for name, column in obs.items()}) for split, part in parts.items()},
    )
    return tmp_path / "corpus"


def run(corpus_path, output, *options):
    arguments = [
        *("--corpus", str(corpus_path), "--output_dir", str(output), "--max_steps", "6", "--report_to", "none"),
        *("--per_device_train_batch_size", "8", "--save_strategy", "no", "--logging_steps", "2", "--use_cpu"),
        *options,
    ]
    pretrain.main(*pretrain.make_parser().parse_args_and_config(arguments))
    return output


def test_pre_training_writes_a_cell_model_with_all_that_it_needs(corpus_path, gene_vocabulary, tmp_path):
    options = ("--cell_config", json.dumps(SIZES), "--eval_strategy", "steps", "--eval_steps", "3")
    output = run(corpus_path, tmp_path / "cell", *options)
    model, report = ScGPTModel.from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    assert model.config.use_flag_embedding
    assert json.loads((output / "vocab.json").read_text()) == gene_vocabulary
    extractor = ScMMGPTFeatureExtractor.from_pretrained(output)
    assert (extractor.cls_token_id, extractor.value_mode) == (gene_vocabulary["<cls>"], "binned")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    names = {name for line in log for name in line}
    for objective in ("masked_loss", "gene_prompt_loss", "cell_prompt_loss"):
        assert {objective, f"eval_{objective}"} <= names


def test_pre_training_learns(corpus_path, tmp_path):
    options = ("--cell_config", json.dumps(SIZES), "--max_steps", "60", "--learning_rate", "3e-3")
    output = run(corpus_path, tmp_path / "cell", *options, "--objectives", "masked", "--logging_steps", "10")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_batch_can_be_a_number_of_tokens(corpus_path, tmp_path):
    options = ("--cell_config", json.dumps(SIZES), "--max_genes", "20", "--token_budget", "100")
    output = run(corpus_path, tmp_path / "cell", *options)
    assert ScMMGPTFeatureExtractor.from_pretrained(output).max_genes == 20


def test_pre_training_continues_a_checkpoint_of_any_precision_in_float32(corpus_path, tmp_path):
    first = run(corpus_path, tmp_path / "first", "--cell_config", json.dumps(SIZES))
    before = ScGPTModel.from_pretrained(first, dtype=torch.bfloat16)
    before.save_pretrained(first)
    second = run(corpus_path, tmp_path / "second", "--cell_model", str(first), "--learning_rate", "0")
    after = ScGPTModel.from_pretrained(second)
    for name, value in before.float().state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert after.dtype == torch.float32
    chosen = align.AlignModelArguments(bert="", cell_model=str(first))
    cell_model, config = align.load_cell_model(open_corpus(corpus_path), chosen)
    assert cell_model.dtype == config.dtype == torch.float32


def test_a_checkpoint_of_other_genes_is_refused(corpus_path, tmp_path, gene_vocabulary):
    first = run(corpus_path, tmp_path / "first", "--cell_config", json.dumps(SIZES))
    symbols = list(gene_vocabulary)
    symbols[3], symbols[4] = symbols[4], symbols[3]
    (first / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    with pytest.raises(ValueError, match="another gene vocabulary than .*, 2 with another id .*. Prepare"):
        run(corpus_path, tmp_path / "second", "--cell_model", str(first))


def test_hidden_genes_are_a_share_of_the_expressed_ones(corpus_path):
    corpus = open_corpus(corpus_path)
    cells, _ = corpus.load("train")
    extractor = ScMMGPTFeatureExtractor(pad_token_id=0, cls_token_id=1)
    batch = pretrain.collate_masked(extractor, [0.5], cells, {}, epoch=1)
    hidden, mask = batch["labels"] != -100, batch["cell_attention_mask"].bool()
    assert torch.equal(batch["labels"][hidden], batch["expression"][hidden])
    assert not (hidden & ~mask).any()
    assert not hidden[:, 0].any()
    torch.testing.assert_close(hidden.sum(1), (mask.sum(1) - 1) // 2)
