"""The page in the browser gives what the pipeline gives, and says what is wrong with an input."""

import anndata
import pytest


gradio = pytest.importorskip("gradio", reason="the page needs gradio, which the extra `app` installs")

from scmmgpt.app import build  # noqa: E402 (gradio first)


@pytest.fixture
def tasks(tiny_pipeline):
    """The functions behind the buttons, by name."""
    return {function.api_name: function.fn for function in build(tiny_pipeline).fns.values()}


@pytest.fixture
def path(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


def test_annotating_gives_the_types_and_a_file_with_all_cells(tasks, path, adata):
    counts, first, file = tasks["annotate"](path, "B cell, T cell")
    assert counts["cells"].sum() == adata.n_obs
    annotated = anndata.read_h5ad(file)
    assert set(annotated.obs["scmmgpt_cell_type"]) <= {"B cell", "T cell"}
    assert first["cell"].tolist() == annotated.obs_names[: len(first)].tolist()


def test_cells_are_described_found_and_generated(tasks, path):
    assert len(tasks["describe"](path, 3, "")) == 3
    assert len(tasks["search"](path, "a B cell", 4)) == 4
    genes, file = tasks["generate"]("a B cell", 2)
    assert anndata.read_h5ad(file).n_obs == 2
    assert len(genes) > 0


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("annotate", (None, ""), "Choose a file"),
        ("generate", ("  ", 2), "needs some text"),
    ],
)
def test_a_bad_input_is_said_in_the_browser(tasks, name, arguments, match):
    with pytest.raises(gradio.Error, match=match):
        tasks[name](*arguments)


def test_a_file_that_holds_no_cells_is_named(tasks, tmp_path):
    (tmp_path / "x.h5ad").write_text("nothing")
    with pytest.raises(gradio.Error, match=r"x\.h5ad can.*t be read"):
        tasks["search"](str(tmp_path / "x.h5ad"), "a B cell", 1)
