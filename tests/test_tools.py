"""`import scmmgpt as sm`: tools and plots in the manner of scverse."""

import itertools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import matplotlib.figure
import numpy as np
import pytest

import scmmgpt as sm
from scmmgpt import synthetic
from scmmgpt.eval import figures
from scmmgpt.synthetic import synthetic_adata


@pytest.fixture
def annotated(pipeline):
    adata = synthetic_adata()
    sm.tl.annotate(adata, model=pipeline)
    return adata


def texts_of(figure):
    """All words of a figure."""
    return {text.get_text().replace("\n", " ") for text in figure.findobj(matplotlib.text.Text)}


def test_the_package_loads_nothing_heavy_until_a_tool_is_used():
    code = "import sys, scmmgpt as sm; print('torch' in sys.modules, 'tl' in dir(sm), callable(sm.read))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "True"]


def test_annotate_adds_labels_and_evidence_in_place_and_returns_none(pipeline):
    adata = synthetic_adata()
    assert sm.tl.annotate(adata, model=pipeline, cluster_key="donor_id") is None
    assert (adata.obs["scmmgpt_cell_type"].astype(str) == adata.obs["cell_type"].astype(str)).all()
    assert adata.obs["scmmgpt_evidence"].str.len().min() > 0
    assert "scmmgpt_cell_type_majority" in adata.obs


def test_a_copy_leaves_the_original_as_it_is(pipeline):
    adata = synthetic_adata()
    names = list(adata.obs)
    copy = sm.tl.annotate(adata, model=pipeline, copy=True, evidence=False)
    assert list(adata.obs) == names
    assert "scmmgpt_cell_type" in copy.obs
    assert "scmmgpt_evidence" not in copy.obs


def test_a_copy_of_a_file_on_disk_is_in_memory(pipeline, tmp_path):
    synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    names, copy = list(adata.obs), sm.tl.annotate(adata, model=pipeline, copy=True)
    assert list(adata.obs) == names
    assert not copy.isbacked
    assert (copy.obs["scmmgpt_cell_type"].astype(str) == copy.obs["cell_type"].astype(str)).all()
    adata.file.close()


@pytest.mark.parametrize("verb", ["annotate", "embed", "audit"])
def test_a_view_of_a_file_on_disk_is_refused_before_the_work(pipeline, tmp_path, monkeypatch, verb):
    synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert len(sm.tl.search(adata[::2], "a B cell", model=pipeline)) > 0  # adds nothing
    monkeypatch.setattr(pipeline.processor, "choose_input", None)
    options = {"label_key": "cell_type"} if verb == "audit" else {}
    with pytest.raises(ValueError, match=re.escape("pass `adata.to_memory()`")):
        getattr(sm.tl, verb)(adata[::2], model=pipeline, **options)
    adata.file.close()


@pytest.mark.parametrize(
    ("verb", "options", "error"),
    [
        ("annotate", {"key_added": "a/b"}, "key_added is 'a/b'; it must not be blank, and must have no slash"),
        ("embed", {"key_added": ""}, "key_added is ''; it must not be blank"),
        ("annotate", {"key_added": None}, "key_added is None; it must be a text"),
        ("annotate", {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ("annotate", {"labels": ["B cell", float("nan")]}, "labels has nan, which is no text; remove missing values"),
        ("annotate", {"labels": {"B cell": None}}, "labels has None, which is no text"),
        ("search", {"text": "a B cell", "top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ("search", {"text": "a B cell", "top_k": 0}, "top_k is 0; it must be at least 1"),
    ],
)
def test_values_of_another_kind_are_refused_by_their_names(pipeline, verb, options, error):
    adata = synthetic_adata()
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        getattr(sm.tl, verb)(adata, model=pipeline, **options)
    assert not any(name.startswith("scmmgpt") for name in [*adata.obs, *adata.obsm, *adata.uns])


def test_a_table_in_place_of_an_anndata_is_an_error_of_one_line(pipeline):
    with pytest.raises(TypeError, match="is not an AnnData") as raised:
        sm.tl.annotate(synthetic_adata().to_df(), model=pipeline)
    assert "\n" not in str(raised.value)


def test_another_key_serves_evidence_too(pipeline):
    adata = synthetic_adata()
    sm.tl.annotate(adata, model=pipeline, key_added="mine")
    assert {"mine_cell_type", "mine_evidence"} <= set(adata.obs)


def test_the_other_tools_are_those_of_the_pipeline(pipeline):
    adata = synthetic_adata()
    sm.tl.embed(adata, model=pipeline)
    assert adata.obsm["X_scmmgpt"].shape == (60, 12)
    assert sm.tl.describe(adata, model=pipeline, copy=True, max_new_tokens=2).obs["scmmgpt_description"].size == 60
    assert len(sm.tl.search(adata, "a B cell", model=pipeline, top_k=3)) == 3
    assert sm.tl.generate("a B cell", model=pipeline, genes=["CD19"]).shape == (1, 1)
    assert sm.tl.audit(adata, "cell_type", model=pipeline).summary()["supported"] == 60


def test_a_checkpoint_is_loaded_once_and_again_after_a_change(pipeline, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    pipeline.save_pretrained(path)
    first = sm.tl.load(path)
    monkeypatch.setenv("SCMMGPT_MODEL", str(path))
    assert sm.tl.load() is first
    (path / "config.json").write_text((path / "config.json").read_text() + "\n")
    assert sm.tl.load() is not first
    adata = synthetic_adata()
    sm.tl.annotate(adata)
    adata.write_h5ad(tmp_path / "out.h5ad")
    assert sm.tl.verify(tmp_path / "out.h5ad")["verified"]


def test_no_checkpoint_is_one_clear_error(monkeypatch):
    monkeypatch.delenv("SCMMGPT_MODEL", raising=False)
    monkeypatch.setattr("scmmgpt.commands.checkpoints.__file__", "/nowhere/commands/checkpoints.py")
    with pytest.raises(FileNotFoundError, match="model is missing"):
        sm.tl.annotate(synthetic_adata())
    with pytest.raises(FileNotFoundError, match="no folder"):
        sm.tl.annotate(synthetic_adata(), model="./nowhere")


def test_read_opens_a_file(tmp_path):
    synthetic_adata(8).write_h5ad(tmp_path / "cells.h5ad")
    assert sm.read(tmp_path / "cells.h5ad").shape == (8, 40)


def test_umap_draws_words_and_numbers_and_keeps_the_places(annotated, monkeypatch):
    # The compilation of UMAP takes longer than all other tests of this file; principal components stand for it.
    monkeypatch.setattr("scmmgpt.eval.figures.umap_coordinates", lambda points, seed: points[:, :2])
    figure = sm.pl.umap(annotated, ["scmmgpt_cell_type", "scmmgpt_score"])
    assert {"scmmgpt_cell_type", "scmmgpt_score", "B cell", "monocyte"} <= texts_of(figure)
    places = annotated.obsm["X_umap"].copy()
    of_types = [places[annotated.obs["cell_type"] == name].mean(axis=0) for name in synthetic.MARKERS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(of_types, 2)) > places.std(axis=0).min() / 2
    annotated.obsm["X_umap"] += 1
    found, rows, what = sm.pl.coordinates(annotated)
    np.testing.assert_array_equal(found, places + 1)
    assert (len(rows), what) == (60, "UMAP of the file")
    with pytest.raises(ValueError, match="no column"):
        sm.pl.umap(annotated, "nothing")


@pytest.mark.parametrize("n", [5, 60])
def test_umap_takes_exact_neighbours_and_searches_none(n, monkeypatch):
    taken = {}

    class Reducer:  # its compilation takes longer than all other tests of this file
        def __init__(self, n_neighbors, **options):
            taken.update(options, n_neighbors=n_neighbors)

        def fit_transform(self, points):
            return points[:, :2]

    points = np.random.default_rng(0).normal(size=(n, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns about optional back ends when it is imported
        monkeypatch.setattr("umap.UMAP", Reducer)
        figures.umap_coordinates(points)
    indices, distances = taken["precomputed_knn"]
    of_pairs = np.linalg.norm(points[:, None] - points, axis=2)
    assert indices.shape == (n, taken["n_neighbors"]) == (n, min(15, n - 1))
    np.testing.assert_array_equal(indices[:, 0], np.arange(n))  # each point is its own nearest neighbour
    np.testing.assert_allclose(distances, np.sort(of_pairs, axis=1)[:, : indices.shape[1]], atol=1e-5)


def test_evidence_draws_the_genes_of_each_label(annotated):
    words = texts_of(sm.pl.evidence(annotated))
    assert {"CD19", "CD3E", "GNLY", "LYZ", "B cell"} <= words
    assert "LYZ" not in texts_of(sm.pl.evidence(annotated, ["B cell"]))
    with pytest.raises(ValueError, match="no evidence for"):
        sm.pl.evidence(annotated, ["martian"])
    with pytest.raises(ValueError, match="has no evidence"):
        sm.pl.evidence(synthetic_adata())


def test_confusion_counts_given_by_predicted_labels(annotated):
    assert "15" in texts_of(sm.pl.confusion(annotated, "cell_type"))
    with pytest.raises(ValueError, match="no column"):
        sm.pl.confusion(annotated, "nothing")


def test_the_python_of_the_page_runs(pipeline, tmp_path, monkeypatch):
    page = Path(sm.__file__).parent / "docs" / "trust.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    pipeline.save_pretrained(tmp_path / "CHECKPOINT")
    adata = synthetic_adata()
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(60, 2))
    adata.obs["leiden"] = adata.obs["donor_id"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block.replace('"CHECKPOINT"', '"./CHECKPOINT"'), names)
    assert (tmp_path / "annotated.h5ad").is_file()
