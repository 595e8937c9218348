"""Embeddings by the groups of the label readout: a closed form, for the genes that a file has."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.sparse import csr_matrix
from sklearn.neighbors import NearestNeighbors

from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.index import add_files
from scmmgpt.configuration_scmmgpt import ScMMGPTConfig
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.regression_scmmgpt import scale_groups
from scmmgpt.train.pooled import Dataset, fit_pooled_readout


ROOT = Path(__file__).parents[1]
LINES = ROOT.parent / "shared" / "data" / "lung_cell_lines.h5ad"


@pytest.fixture(scope="module")
def pipeline():
    """The fitted tiny pipeline, with a readout of two datasets, of which one lacks some genes."""
    pipeline, datasets = synthetic.fitted_pipeline(), []
    size = pipeline.model.config.cell_config.vocab_size
    for seed in (1, 2):
        adata = synthetic.synthetic_adata(200, seed=seed)
        part = adata[:, : adata.n_vars - 4 * (seed - 1)].copy()
        choice = pipeline.processor.choose_input(part)
        targets = np.array([list(synthetic.MARKERS).index(name) for name in adata.obs["cell_type"]])
        datasets.append(Dataset(choice.convert(part).to_csr(size), choice.match.measured, targets))
    readout = fit_pooled_readout(datasets, len(synthetic.MARKERS))
    pipeline.model.model.label_readout = readout
    pipeline.model.config.label_readout = {**pipeline.model.config.label_readout, **readout.sizes()}
    pipeline.model.config.cell_embedding = "profile"
    return pipeline


@pytest.fixture
def readout(pipeline):
    return pipeline.model.model.label_readout


def by_least_squares(a, profiles, here):
    """The embedding of dense log1p(CP10k) over the genes `here`, from its definition."""
    scaled = a if here.all() else scale_groups(a, here)
    roots = np.sqrt(a["group_weights"])[:, None]
    groups = roots * (scaled["groups"] - scaled["group_mean"])[:, here]
    parts = np.concatenate([groups, a["factors"][:, here]])
    precision = 1 / np.sqrt(a["noise"][here])
    rows = np.concatenate([precision[:, None] * parts.T, np.eye(len(parts))])
    wanted = (precision * (profiles - scaled["group_mean"][here])).T
    found = np.linalg.lstsq(rows, np.concatenate([wanted, np.zeros((len(parts), len(profiles)))]), rcond=None)[0]
    whole = roots * (a["groups"] - a["group_mean"])
    places = found[: len(groups)].T @ np.real(sqrtm(sqrtm(whole @ whole.T)))
    return places / np.linalg.norm(places, axis=1, keepdims=True)


@pytest.mark.parametrize("n_absent", [0, 1, 9])
def test_a_place_is_the_ridge_regression_of_the_genes_at_hand_on_groups_and_factors(readout, n_absent):
    a, rng = readout.arrays(), np.random.default_rng(0)
    genes = np.sort(rng.permutation(a["gene_ids"])[n_absent:])
    here = np.isin(a["gene_ids"], genes)
    counts = rng.poisson(3.0, (20, len(genes))).astype(np.float32)
    solved = readout.embedding_for(genes)
    embedded = solved(Cells.from_csr(csr_matrix(counts), genes))
    scaled = np.log1p(1e4 * a["shares"][here].sum() * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(embedded, by_least_squares(a, scaled, here), atol=2e-4)
    assert embedded.dtype == np.float32
    assert embedded.shape == (20, readout.num_groups)


def test_a_cell_has_the_bits_that_it_has_alone(pipeline):
    adata = synthetic.synthetic_adata(60, seed=7)
    together = pipeline.embed(adata.copy()).obsm["X_scmmgpt"]
    np.testing.assert_array_equal(pipeline.embed(adata.copy(), batch_size=1).obsm["X_scmmgpt"], together)
    np.testing.assert_array_equal(pipeline.embed(adata[5:6].copy()).obsm["X_scmmgpt"], together[5:6])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_cells_of_one_type_lie_together_and_files_of_other_genes_in_the_same_space(pipeline):
    adata = synthetic.synthetic_adata(80, seed=7)
    panel = adata[:, np.arange(adata.n_vars) % 5 != 4].copy()
    points = np.concatenate([pipeline.embed(cells).obsm["X_scmmgpt"] for cells in (adata, panel)])
    types = np.tile(np.asarray(adata.obs["cell_type"]).astype(str), 2)
    nearest = NearestNeighbors(n_neighbors=1).fit(points[:80]).kneighbors(points[80:])[1][:, 0]
    assert (types[nearest] == types[80:]).mean() > 0.95


def test_the_model_embeds_what_the_processor_makes(pipeline):
    cells, _ = pipeline.processor.read_cells(synthetic.synthetic_adata(12, seed=7))
    pipeline.processor.feature_extractor.return_profile = True
    inputs = pipeline.processor(cells=cells)
    expected = pipeline.model.model.label_readout.embedding_for()(cells)
    np.testing.assert_allclose(pipeline.model.get_profile_embeddings(**inputs).numpy(), expected, atol=1e-5)
    alone = {name: inputs[name] for name in ("profile_gene_ids", "profile")}
    assert torch.equal(pipeline.model.get_profile_embeddings(**alone), pipeline.model.get_profile_embeddings(**inputs))
    with pytest.raises(ValueError, match="has no label readout.*use `get_cell_features`"):
        synthetic.tiny_pipeline().model.get_profile_embeddings(**inputs)


def test_a_change_of_the_groups_changes_the_embedding(readout):
    counts = csr_matrix(np.eye(3, len(readout.gene_ids), dtype=np.float32) + 1)
    cells = Cells.from_csr(counts, readout.arrays()["gene_ids"])
    before = readout.embedding_for()(cells)
    readout.groups.mul_(2)
    assert np.abs(readout.embedding_for()(cells) - before).max() > 1e-3
    readout.groups.div_(2)
    np.testing.assert_array_equal(readout.embedding_for()(cells), before)


def test_partitions_have_the_same_bits_and_an_index_finds_like_cells(pipeline, tmp_path, monkeypatch, caplog, capsys):
    for name in ("passes_scmmgpt.SORTED_CELLS", "conversion_scmmgpt.CHUNK_ROWS", "conversion_scmmgpt.CACHED_ROWS"):
        monkeypatch.setattr(f"scmmgpt.{name}", 7)
    pipeline.model.save_pretrained(tmp_path / "model")
    pipeline.processor.save_pretrained(tmp_path / "model")
    synthetic.synthetic_adata(60, seed=7).write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "model"), "--device", "cpu", "-o"]
    assert main([*words, str(tmp_path / "whole.h5ad")]) == 0
    assert main([*words, str(tmp_path / "parts.h5ad"), "--workers", "1", "--cells-per-partition", "14"]) == 0
    whole, parts = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("whole", "parts"))
    np.testing.assert_array_equal(parts.obsm["X_scmmgpt"], whole.obsm["X_scmmgpt"])
    assert parts.uns["scmmgpt"]["embed"]["of"] == "profile"
    assert main(["verify", str(tmp_path / "parts.h5ad"), "--device", "cpu"]) == 0
    pytest.importorskip("faiss", reason="the extra `index` installs FAISS")
    add_files(tmp_path / "index", [tmp_path / "whole.h5ad"])
    assert "cannot be compared with texts. The index finds similar cells" in caplog.text
    assert main(["search", "--index", str(tmp_path / "index"), "--text", "a B cell", *words[2:6]]) == 2
    assert "embedded as 'profile', which cannot be compared with texts" in capsys.readouterr().err
    like = ["--like", "cell-3", "--top-k", "5", "--json", *words[2:6]]
    assert main(["search", words[1], "--index", str(tmp_path / "index"), *like]) == 0
    of_index = json.loads(capsys.readouterr().out)
    assert main(["search", words[1], *like]) == 0
    of_file = json.loads(capsys.readouterr().out)
    assert [hit["row"] for hit in of_index] == [hit["index"] for hit in of_file]
    assert [hit["score"] for hit in of_index] == pytest.approx([hit["score"] for hit in of_file], abs=1e-5)


def test_a_checkpoint_without_the_setting_embeds_as_before_and_one_without_groups_says_so(adata):
    old = synthetic.fitted_pipeline()
    assert old.embed(adata.copy()).uns["scmmgpt"]["embed"]["of"] == "cell-text"
    with pytest.raises(ValueError, match="no groups of cells"):
        old.embed(adata.copy(), of="profile")
    with pytest.raises(ValueError, match="choose one of"):
        old.embed(adata.copy(), of="genes")
    with pytest.raises(ValueError, match="label readout with groups"):
        ScMMGPTConfig(cell_embedding="profile")
    with pytest.raises(ValueError, match="no groups to embed"):
        ScMMGPTLabelReadout(2, 3, 1).embedding_for()


def test_lung_cancer_lines_that_no_training_cell_is_of_lie_apart():
    if not LINES.is_file() or not (ROOT / "model.safetensors").is_file():
        pytest.skip("needs ../shared/data/lung_cell_lines.h5ad and the checkpoint at the root")
    torch.manual_seed(0)
    lines = anndata.read_h5ad(LINES)[::7].copy()
    root = ScMMGPTPipeline.from_pretrained(str(ROOT), device="cpu")

    def accuracy(of):
        points = root.embed(lines.copy(), of=of).obsm["X_scmmgpt"]
        nearest = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points)[1][:, 1]
        types = np.asarray(lines.obs["cell_line"]).astype(str)
        return (types[nearest] == types).mean()

    assert accuracy(None) == accuracy("profile") > max(accuracy("cell-text") + 0.05, 0.93)
