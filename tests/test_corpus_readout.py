"""The linear readout that stage 1 gives to a model."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.scoring_scmmgpt import encode_texts
from scmmgpt.synthetic import tiny_pipeline
from scmmgpt.train.corpus_readout import choose_places, codes_of, fit_corpus_readout, place_labels, set_apart
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.unseen import add_gene_texts


def model_for(corpus):
    """A stage-1 model with random weights for the genes of a corpus."""
    config = tiny_pipeline().model.config
    config.cell_config.vocab_size = len(corpus.vocabulary)
    return ScMMGPTForCellTextAlignment(config)


@pytest.fixture
def fitted(corpus, monkeypatch):
    """A corpus, a processor of its genes, and a model with a readout of its types."""
    corpus, processor = open_corpus(corpus), tiny_pipeline().processor
    monkeypatch.setattr(type(processor), "gene_index", GeneIndex(corpus.vocabulary))
    model = model_for(corpus).eval()
    fit_corpus_readout(model, corpus)
    return corpus, processor, model


def test_the_readout_names_the_types_of_training_cells_and_survives_saving(corpus, tmp_path):
    corpus = open_corpus(corpus)
    model = model_for(corpus)
    scores = fit_corpus_readout(model, corpus)
    cells, table = corpus.load("train", ["cell_type"])
    labels = sorted(set(table.column(0).to_pylist()) - {None})
    truth = codes_of(table.column(0).to_pylist(), labels)
    assert (model.label_readout.for_genes()(cells).argmax(axis=1) == truth)[truth >= 0].mean() > 0.9
    assert len(model.config.label_readout["texts"]) == len(labels)
    assert "validation" not in scores or 0 <= scores["validation"]["accuracy"] <= 1

    model.save_pretrained(tmp_path)
    loaded = ScMMGPTForCellTextAlignment.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.label_readout.for_genes()(cells), model.label_readout.for_genes()(cells))


def test_texts_about_genes_are_kept_with_the_readout(fitted, tmp_path):
    corpus, processor, model = fitted
    one, other = (corpus.gene_symbols[gene] for gene in model.label_readout.gene_ids[:2])
    rows = f"{one},B cells have it.\n{other},A monocyte of human blood has it.\nNOGENE,Nothing.\n"
    (tmp_path / "genes.csv").write_text(f"symbol,summary\n{rows}")
    add_gene_texts(model, processor, tmp_path / "genes.csv")
    assert model.config.label_readout["text_width"] == model.config.qformer_config.hidden_size
    model.save_pretrained(tmp_path / "saved")
    loaded = ScMMGPTForCellTextAlignment.from_pretrained(tmp_path / "saved")
    texts = loaded.label_readout.arrays()["gene_texts"]
    np.testing.assert_array_equal(texts, model.label_readout.arrays()["gene_texts"])
    assert len(texts) == model.config.label_readout["num_genes"]
    stored = loaded.label_readout.gene_texts
    assert 0 < len(stored) == texts.any(axis=1).sum() < len(texts)  # only genes that have a text


def test_an_older_checkpoint_with_a_row_of_texts_for_each_gene_loads_and_keeps_it(corpus, tmp_path):
    corpus = open_corpus(corpus)
    model = model_for(corpus)
    fit_corpus_readout(model, corpus)
    old, n_genes = model.label_readout, model.config.label_readout["num_genes"]
    texts = np.arange(n_genes * 3).reshape(n_genes, 3) * (np.arange(n_genes) % 2)[:, None]
    old.register_buffer("gene_texts", torch.tensor(texts).half())
    model.config.label_readout = {**model.config.label_readout, "text_width": 3}
    for folder in ("old", "saved_again"):
        model.save_pretrained(tmp_path / folder)
        model, found = ScMMGPTForCellTextAlignment.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        np.testing.assert_array_equal(model.label_readout.arrays()["gene_texts"], texts)


def test_a_cell_is_placed_at_the_texts_of_its_labels_by_their_probability(fitted, tmp_path):
    corpus, processor, model = fitted
    place_labels(model, processor, weight=1000.0)  # what the network adds is nothing beside it
    cells, _ = corpus.load("train", ["cell_type"])
    inputs = processor(cells=cells)
    texts = encode_texts(model, processor, model.config.label_readout["texts"])
    scores = model.label_readout(inputs["profile_gene_ids"], inputs["profile"])
    places = torch.nn.functional.normalize(scores.exp() @ texts)
    with torch.no_grad():
        features = model.get_cell_features(**inputs)
        torch.testing.assert_close(features, places[:, None].expand_as(features), atol=0.02, rtol=0)
        sure = torch.full((len(cells), len(texts)), -1e9)
        sure[:, 0] = 0.0
        of_first = model.get_cell_features(**inputs, readout_scores=sure)
    torch.testing.assert_close(of_first, texts[0].expand_as(of_first), atol=0.02, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = ScMMGPTForCellTextAlignment.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.get_cell_features(**inputs), features)


def test_the_weight_of_the_places_is_the_smallest_that_is_as_good_as_the_best(fitted):
    corpus, processor, model = fitted
    assert choose_places(model_for(corpus), processor, corpus, CaptionSampler()) == {}  # without a readout
    losses = choose_places(model, processor, corpus, CaptionSampler())
    weight = model.label_readout.features.norm(dim=1)
    chosen = min(losses, key=lambda value: abs(value - weight[0].item()))
    np.testing.assert_allclose(weight, chosen, rtol=1e-5)
    assert chosen <= min(losses, key=lambda value: losses[value])
    assert losses[chosen] <= losses[0.0]


def test_labels_are_set_apart_and_texts_come_to_the_place_of_their_label(fitted):
    corpus, processor, model = fitted
    place_labels(model, processor)
    places, texts = model.label_readout.features.clone(), model.config.label_readout["texts"]
    set_apart(model, processor, corpus, CaptionSampler())
    apart = model.label_readout.features
    assert (apart @ apart.T).tril(-1).max() < (places @ places.T).tril(-1).max()
    torch.testing.assert_close(apart.norm(dim=1), torch.ones(len(texts)))
    nearest = (encode_texts(model, processor, texts) @ apart.T).argmax(dim=1)
    assert nearest.tolist() == list(range(len(texts)))


def test_a_corpus_of_one_type_leaves_the_model_as_it_is(corpus, monkeypatch):
    corpus = open_corpus(corpus)
    cells, _ = corpus.load("train", ["cell_type"])
    table = pa.table({"cell_type": ["B cell"] * len(cells), "cell_type_ontology_term_id": [None] * len(cells)})
    monkeypatch.setattr(type(corpus), "sample", lambda *args, **kwargs: (cells, table))
    model = model_for(corpus)
    assert fit_corpus_readout(model, corpus) == {}
    assert model.config.label_readout is None


def test_a_sample_of_a_split_is_as_large_as_asked_and_the_same_for_a_seed(corpus):
    corpus = open_corpus(corpus)
    cells, table = corpus.sample("train", 5, ["cell_type"], seed=1)
    again, _ = corpus.sample("train", 5, ["cell_type"], seed=1)
    assert len(cells) == len(table) == 5
    np.testing.assert_array_equal(cells.cell_ids, again.cell_ids)
    assert len(corpus.sample("train", 10**9)[0]) == corpus.n_cells("train")
