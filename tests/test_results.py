"""What a command writes is its input with results added, and no matrix has to fit in memory for it."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix

from scmmgpt.__main__ import main
from scmmgpt.commands import results
from scmmgpt.generation_scmmgpt import labels_and_prompts
from scmmgpt.readers.cell_files import CellFile, read_file


@pytest.fixture
def full(adata):
    """Cells with something in every part of an AnnData."""
    adata.layers["mine"] = csc_matrix(adata.X)
    adata.raw = adata.copy()
    adata.obsm["X_pca"] = np.arange(120.0).reshape(60, 2)
    adata.varm["loadings"] = np.ones((adata.n_vars, 2))
    adata.obsp["near"] = adata.X @ adata.X.T
    adata.uns["mine"] = {"a": np.array([1, 2])}
    return adata


def test_a_result_has_everything_of_the_input(full, checkpoint, tmp_path, monkeypatch):
    full.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    monkeypatch.setattr(CellFile, "to_memory", lambda self: pytest.fail("the matrices were loaded whole"))
    out = tmp_path / "annotated.h5ad"
    assert main(["annotate", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", str(out), "--quiet"]) == 0
    assert main(["embed", str(out), "--model", checkpoint, "-o", str(tmp_path / "embedded.h5ad"), "--quiet"]) == 0
    result = anndata.read_h5ad(tmp_path / "embedded.h5ad")
    assert set(result.obs["scmmgpt_cell_type"]) <= {"B", "T"}
    assert result.obsm["X_scmmgpt"].shape == (60, 12)
    assert set(result.uns["scmmgpt"]) >= {"annotate", "embed", "input"}
    assert result.obs[full.obs.columns].equals(full.obs)
    assert result.var.equals(full.var)
    assert (result.X != full.X).nnz == 0
    assert (result.raw.X != full.raw.X).nnz == 0
    assert (result.layers["mine"] != full.layers["mine"]).nnz == 0
    assert (result.obsp["near"] != full.obsp["near"]).nnz == 0
    np.testing.assert_array_equal(result.obsm["X_pca"], full.obsm["X_pca"])
    np.testing.assert_array_equal(result.varm["loadings"], full.varm["loadings"])
    np.testing.assert_array_equal(result.uns["mine"]["a"], [1, 2])


def test_cells_on_disk_get_the_answers_of_cells_in_memory(tiny_pipeline, adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    labels = {"B": "a B cell", "T": "a T cell"}
    tiny_pipeline.annotate(adata, labels)
    with read_file(tmp_path / "cells.h5ad", backed=True) as file:
        tiny_pipeline.annotate(file, labels)
        np.testing.assert_array_equal(file.obsm["scmmgpt_probabilities"], adata.obsm["scmmgpt_probabilities"])
        assert file.obs["scmmgpt_cell_type"].equals(adata.obs["scmmgpt_cell_type"])


def test_chunks_change_no_answer(tiny_pipeline, adata, monkeypatch):
    whole = tiny_pipeline.embed(adata.copy()).obsm["X_scmmgpt"]
    monkeypatch.setattr("scmmgpt.passes_scmmgpt.SORTED_CELLS", 14)
    monkeypatch.setattr("scmmgpt.conversion_scmmgpt.CHUNK_ROWS", 7)
    np.testing.assert_allclose(tiny_pipeline.embed(adata).obsm["X_scmmgpt"], whole, atol=1e-6)


def test_a_file_is_copied_by_what_it_holds_and_not_by_its_name(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5")
    (tmp_path / "text.h5ad").write_text("nothing")
    assert results.can_copy(tmp_path / "cells.h5")
    assert not results.can_copy(tmp_path / "text.h5ad")
    assert not results.can_copy(tmp_path)


def test_a_file_of_the_first_format_of_anndata_is_annotated(adata, checkpoint, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    rows = np.zeros(adata.n_obs, dtype=[("X_pca", "f4", (2,)), ("X_umap", "f4", (2,))])
    rows["X_umap"] = np.arange(2 * adata.n_obs).reshape(-1, 2)
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:  # as in scanpy's own example, of 2018
        del file["obsm"]
        file["obsm"] = rows
    out = tmp_path / "out.h5ad"
    assert main(["annotate", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", str(out)]) == 0
    written = anndata.read_h5ad(out)
    assert written.obs["scmmgpt_cell_type"].notna().all()
    np.testing.assert_array_equal(written.obsm["X_umap"], rows["X_umap"])


def test_a_truncated_file_is_called_so_by_the_commands_that_copy_files(adata, checkpoint, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    half = (tmp_path / "cells.h5ad").read_bytes()[:9000]
    (tmp_path / "cells.h5ad").write_bytes(half)
    out = tmp_path / "out.h5ad"
    assert main(["annotate", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", str(out)]) == 2
    assert "is truncated: 9,000 of" in capsys.readouterr().err
    assert not out.exists()


def test_search_writes_the_score_of_every_cell_and_hits_with_a_scale(adata, checkpoint, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "found.h5ad"
    arguments = ["search", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "--text", "a B cell", "-o", str(out)]
    assert main([*arguments, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    scores = anndata.read_h5ad(out).obs["scmmgpt_search"].to_numpy()
    best = hits[0]
    assert best["score"] == pytest.approx(scores.max(), abs=1e-5)
    assert best["z"] == pytest.approx((scores.max() - scores.mean()) / scores.std(), abs=2e-3)


def test_cells_of_a_prompt_are_the_same_drawn_in_parts(monkeypatch):
    from scmmgpt import synthetic

    pipeline = synthetic.tiny_pipeline(expression_head="nb")
    whole = pipeline.generate(["a B cell", "a T cell"], 5)
    monkeypatch.setattr("scmmgpt.generation_scmmgpt.GENERATED_CELLS", 2)
    parts = pipeline.generate(["a B cell", "a T cell"], 5)
    assert (whole.layers["counts"] != parts.layers["counts"]).nnz == 0
    assert (abs(whole.X - parts.X) > 1e-6).nnz == 0


def test_a_prompt_that_names_no_known_type_is_doubted(tiny_pipeline, monkeypatch):
    said = []
    monkeypatch.setattr("scmmgpt.generation_scmmgpt.logger.warning", said.append)
    tiny_pipeline.model.config.annotation = {"labels": {"B cell": "a B cell", "T cell": "a T cell"}}
    tiny_pipeline.generate("Some B cells from blood.", genes=["CD19"])
    assert not said
    tiny_pipeline.generate("A pancreatic beta cell.", genes=["CD19"])
    assert "'A pancreatic beta cell.' names none of the 2 cell types" in said[0]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("  ", "The prompt is empty: "),
        ([], "There is no prompt: "),
        (["a B cell", ""], "1 of 2 prompts is empty: "),
        ({"a": "", "b": " ", "c": "B"}, "2 of 3 prompts are empty: "),
    ],
)
def test_prompts_without_words_are_counted(prompts, says):
    with pytest.raises(ValueError, match=says):
        labels_and_prompts(prompts)


def test_a_table_of_many_rows_is_written_in_parts_compressed_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr("scmmgpt.commands.results.ROWS_AT_ONCE", 3)
    rows = [{"name": f"a, {i}", "value": i} for i in range(8)]
    for name in ("table.csv", "table.tsv", "table.csv.gz"):
        results.write_table(tmp_path / name, iter(rows))
        read = pd.read_csv(tmp_path / name, sep="\t" if name.endswith(".tsv") else ",")
        assert read.to_dict("records") == rows
    results.write_table(tmp_path / "table.csv", [])
    assert (tmp_path / "table.csv").read_text().strip() in ("", '""')
