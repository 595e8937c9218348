"""The page in the browser gives what the pipeline gives, and says what is wrong with an input."""

import inspect
import logging
import os
import subprocess
import sys

import anndata
import pytest

from scmmgpt import app
from scmmgpt.app import build


@pytest.fixture
def said():
    """Warnings that the browser showed."""
    return []


@pytest.fixture
def tasks(tiny_pipeline, said, monkeypatch):
    """The functions behind the buttons, by name."""
    pytest.importorskip("gradio", reason="the page needs gradio, which the extra `app` installs")
    monkeypatch.setattr("gradio.Warning", lambda message, **_: said.append(message))
    return {function.api_name: function.fn for function in build(tiny_pipeline).fns.values()}


@pytest.fixture
def path(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


def test_annotating_gives_the_types_and_a_file_with_all_cells(tasks, path, adata):
    counts, first, file = tasks["annotate"](path, "B cell\nT cell\n\n", 0)
    assert counts["cells"].sum() == adata.n_obs
    annotated = anndata.read_h5ad(file)
    assert set(annotated.obs["scmmgpt_cell_type"]) <= {"B cell", "T cell"}
    assert first["cell"].tolist() == annotated.obs_names[: len(first)].tolist()


def test_a_label_may_have_a_comma(tasks, path):
    _, _, file = tasks["annotate"](path, "naive thymus-derived CD4-positive, alpha-beta T cell\nB cell", 0)
    labels = anndata.read_h5ad(file).uns["scmmgpt"]["annotate"]["labels"].tolist()
    assert labels == ["naive thymus-derived CD4-positive, alpha-beta T cell", "B cell"]


def test_cells_are_described_found_and_generated(tasks, path):
    assert len(tasks["describe"](path, 3, "")) == 3
    assert len(tasks["search"](path, "a B cell", 4)) == 4
    genes, file = tasks["generate"]("a B cell", 2)
    assert anndata.read_h5ad(file).n_obs == 2
    assert len(genes) > 0


def test_a_table_can_be_searched_too(tasks, adata, tmp_path):
    adata.to_df().to_csv(tmp_path / "cells.csv")
    assert len(tasks["search"](str(tmp_path / "cells.csv"), "a B cell", 4)) == 4


def test_warnings_are_shown_in_the_browser(tasks, path, said):
    tasks["annotate"](path, "B cell", 0)
    assert any("one label, 'B cell'" in message for message in said)


def test_a_user_sees_no_warning_of_another():
    with app.Warnings() as warnings:
        warnings.thread += 1
        logging.getLogger("scmmgpt.reading_scmmgpt").warning("of somebody else")
    assert warnings.messages == []


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("annotate", (None, "", 0), "Choose a file"),
        ("generate", ("  ", 2), "needs some text"),
    ],
)
def test_a_bad_input_is_said_in_the_browser(tasks, name, arguments, match):
    gradio = pytest.importorskip("gradio")
    with pytest.raises(gradio.Error, match=match):
        tasks[name](*arguments)


def test_a_file_that_holds_no_cells_is_named(tasks, tmp_path):
    gradio = pytest.importorskip("gradio")
    (tmp_path / "x.h5ad").write_text("nothing")
    with pytest.raises(gradio.Error, match=r"x\.h5ad") as caught:
        tasks["search"](str(tmp_path / "x.h5ad"), "a B cell", 1)
    assert str(tmp_path) not in str(caught.value)  # the folder of an upload says nothing to a user


def test_parameters_of_the_pages_api_have_names(tasks):
    assert list(inspect.signature(tasks["search"]).parameters) == ["path", "text", "top_k"]


def test_the_page_does_not_call_home(tasks, tiny_pipeline):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert build(tiny_pipeline).analytics_enabled is False


def test_without_gradio_one_line_says_what_to_install():
    hide = "import sys; sys.modules['gradio'] = None; from scmmgpt import app; sys.exit(app.main(['nowhere']))"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("install it with `pip install scmmgpt[app]`.")
