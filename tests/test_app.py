"""The page in the browser gives what the pipeline gives, and says what is wrong with an input."""

import gc
import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from scmmgpt import app, synthetic
from scmmgpt.app import ANY_TISSUE, build, opened
from scmmgpt.commands import cell_map, page_session
from scmmgpt.commands.page_words import unbroken


gradio = pytest.importorskip("gradio", reason="the page needs gradio, which the extra `app` installs")


def tasks_of(pipeline):
    """The functions behind the buttons, by name."""
    return {function.api_name: function.fn for function in build(pipeline).fns.values()}


@pytest.fixture
def tasks(tiny_pipeline):
    return tasks_of(tiny_pipeline)


@pytest.fixture
def path(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


@pytest.fixture
def session(tasks, path):
    return tasks["open"](path)[0]


def test_annotating_colours_the_map_and_counts_the_types(tasks, session, adata):
    _, drawn, _, _, counts, _ = tasks["annotate"](session, "B cell\nT cell\n\n", ANY_TISSUE, 0)
    assert counts["cells"].sum() == adata.n_obs
    assert set(counts["cell type"]) <= {"B cell", "T cell"}
    assert len(drawn["x"]) == len(drawn["y"]) == len(drawn["color"]) == adata.n_obs
    assert {text.split(" (")[0] for text, _, _ in drawn["legend"]} == set(counts["cell type"])


def test_saved_cells_have_all_that_was_read_and_found(tasks, session, adata):
    tasks["annotate"](session, "B cell\nT cell", ANY_TISSUE, 0)
    saved = anndata.read_h5ad(tasks["save"](session)[1]["value"])
    assert saved.obs_names.tolist() == adata.obs_names.tolist()
    assert set(adata.obs) | {"scmmgpt_cell_type"} <= set(saved.obs)
    assert "X_umap" in saved.obsm


def test_the_labels_of_a_tissue_are_the_candidates(tiny_pipeline, path):
    labels = {name: f"A {name}." for name in ("B cell", "T cell", "neuron")}
    blood = {"id": "UBERON:0000178", "name": "blood", "names": ["blood"], "labels": ["B cell", "T cell"]}
    tiny_pipeline.model.config.annotation = {"labels": labels, "tissues": [blood]}
    tasks = tasks_of(tiny_pipeline)
    session = tasks["open"](path)[0]
    tasks["annotate"](session, "", "blood", 0)
    assert set(session.adata.obs["scmmgpt_cell_type"]) <= {"B cell", "T cell"}
    assert session.adata.uns["scmmgpt"]["annotate"]["labels"].tolist() == ["B cell", "T cell"]


def test_a_label_may_have_a_comma(tasks, session):
    tasks["annotate"](session, "naive thymus-derived CD4-positive, alpha-beta T cell\nB cell", ANY_TISSUE, 0)
    labels = session.adata.uns["scmmgpt"]["annotate"]["labels"].tolist()
    assert labels == ["naive thymus-derived CD4-positive, alpha-beta T cell", "B cell"]


def test_a_loop_selects_cells_that_are_then_described_and_explained(tasks, session):
    session.color = "cell_type"
    _, drawn, said, _ = tasks["select"](session, SimpleNamespace(rows=[3, 1, 3, -1, 10**9, True, "2", None]))
    assert drawn["rows"] == [1, 3]
    assert session.rows.tolist() == [1, 3]  # what is not a row of the file is left out
    assert said.startswith("2 cells selected: ")
    assert tasks["describe"](session)[1]["cell"].tolist() == session.adata.obs_names[[1, 3]].tolist()
    _, drawn, said, _ = tasks["select"](session, SimpleNamespace(rows=[]))
    assert drawn["rows"] == []
    assert said == page_session.NO_SELECTION


def test_selected_cells_are_described_as_by_the_command_and_all_cells_are_judged_once(monkeypatch):
    pipeline = synthetic.fitted_pipeline()
    tasks = tasks_of(pipeline)
    cells = synthetic.synthetic_adata(240)
    session = opened(cells.copy(), "cells.h5ad")
    pipeline.annotate(cells)
    pipeline.describe(cells, proof=True)
    whole = cells.obs["scmmgpt_description"].to_numpy()
    judged, prove = [], pipeline.prove
    monkeypatch.setattr(pipeline, "prove", lambda *args, **named: judged.append(1) or prove(*args, **named))
    tasks["annotate"](session, "", ANY_TISSUE, 0)
    for rows in ([3, 8, 60], [8, 200]):
        tasks["select"](session, SimpleNamespace(rows=rows))
        assert tasks["describe"](session)[1]["description"].tolist() == [*map(unbroken, whole[rows])]
    tasks["ask"](session, "Are they dividing?")
    assert len(judged) == 1
    described = session.adata.obs["scmmgpt_description"]
    assert np.flatnonzero(described != "").tolist() == [3, 8, 60, 200]
    tasks["annotate"](session, "B cell\nT cell", ANY_TISSUE, 0)  # descriptions of other labels go
    assert "scmmgpt_description" not in session.adata.obs
    tasks["describe"](session)
    assert len(judged) == 2


def test_evidence_names_genes_of_the_labels_of_selected_cells():
    pipeline = synthetic.fitted_pipeline()
    tasks = tasks_of(pipeline)
    cells = opened(synthetic.synthetic_adata(), "cells.h5ad")
    _, table, _ = tasks["explain"](cells)
    assert list(table) == app.EVIDENCE
    genes = dict(zip(table["cell type (cells)"], table["genes"], strict=True))
    assert len(genes) == 4
    assert "CD19" in genes["B cell (15)"]


def test_a_search_colours_the_map_by_its_score(tasks, session):
    _, drawn, _, _, hits, _ = tasks["search"](session, "a B cell", 4)
    assert len(hits) == 4
    assert drawn["color"][session.adata.obs_names.get_loc(hits["cell"][0])] == max(drawn["color"])
    assert drawn["title"].endswith("Colour: match with “a B cell”.")


def test_cells_like_the_selected_ones_are_found(tasks, session, tiny_pipeline, adata):
    with pytest.raises(gradio.Error, match="No cells selected"):
        tasks["like"](session, 4)
    tasks["select"](session, SimpleNamespace(rows=[3]))
    _, drawn, _, _, hits, _ = tasks["like"](session, 4)
    assert hits["cell"].tolist() == [h["cell"] for h in tiny_pipeline.search(adata, like=adata.obs_names[3], top_k=4)]
    assert drawn["title"].endswith(f"Colour: match with {adata.obs_names[3]}.")


def test_searches_place_the_cells_of_a_session_once(tiny_pipeline, tasks, session, adata, monkeypatch):
    cell_model = tiny_pipeline._bridge().cell_model
    texts, alone = ("a B cell", "a T cell without MS4A1"), []
    for text in texts:
        tiny_pipeline.search(adata, text, key_added="alone")
        alone.append(adata.obs["alone"].to_numpy())
    passes, forward = [], cell_model.forward
    monkeypatch.setattr(cell_model, "forward", lambda *of, **named: passes.append(1) or forward(*of, **named))
    tasks["search"](session, "more CD3D than MS4A1", 4)
    assert not passes  # counts alone decide
    for text, scores in zip(texts, alone, strict=True):
        tasks["search"](session, text, 4)
        np.testing.assert_allclose(session.adata.obs["scmmgpt_search"], scores, rtol=1e-4, atol=1e-5)
        before = len(passes)
    assert before  # the first text
    tasks["search"](session, "a monocyte", 4)
    assert len(passes) == before


def test_generated_cells_are_marked_on_the_map(tasks, session):
    _, drawn, genes, file, _ = tasks["generate"](session, "a B cell", 3)
    assert anndata.read_h5ad(file).n_obs == len(drawn["marks"]["x"]) == 3
    said = drawn["title"].split("Crosses: generated cells, each at a cell that is like it: ")[1].removesuffix(".")
    counts = {name: int(n) for name, n in (part.rsplit(" ", 1) for part in said.split(", "))}
    assert sum(counts.values()) == 3
    assert set(counts) <= set(session.adata.obs[session.color])
    crosses, cells = (set(zip(places["x"], places["y"], strict=True)) for places in (drawn["marks"], drawn))
    assert crosses <= cells  # and none between groups, where no cell is
    assert all(len(str(value)) <= 6 for value in genes["mean log1p(CP10k)"])  # three digits, of a double
    assert tasks["generate"](None, "a B cell", 2)[0] is None  # no cells are needed


def test_a_table_can_be_searched_too(tasks, adata, tmp_path):
    adata.to_df().to_csv(tmp_path / "cells.csv")
    session = tasks["open"](str(tmp_path / "cells.csv"))[0]
    assert len(tasks["search"](session, "a B cell", 4)[4]) == 4


def test_warnings_are_shown_beside_the_result(tasks, session):
    assert "one label, 'B cell'" in tasks["annotate"](session, "B cell", ANY_TISSUE, 0)[-1]


def test_a_user_sees_no_warning_of_another():
    with app.Warnings() as warnings:
        warnings.thread += 1
        logging.getLogger("scmmgpt.reading_scmmgpt").warning("of somebody else")
    assert warnings.messages == []


def test_two_users_have_their_own_cells(tasks, path):
    one, two = tasks["open"](path)[0], tasks["open"](path)[0]
    tasks["annotate"](one, "B cell\nT cell", ANY_TISSUE, 0)
    assert "scmmgpt_cell_type" not in two.adata.obs


def test_a_session_comes_back_by_its_secret_alone(tasks, path):
    session, *_, secret, _ = tasks["open"](path)
    restored, drawn, _, _, again, counts, turns, _ = tasks["restore"](secret)
    assert restored is session
    assert (len(secret), again, len(drawn["x"]), len(counts), turns) == (43, secret, session.adata.n_obs, 0, [])
    tasks["annotate"](session, "B cell\nT cell", ANY_TISSUE, 0)
    assert tasks["restore"](secret)[5]["cells"].sum() == session.adata.n_obs
    for guess in ("", secret[:-1], session.name, path):
        _, _, _, _, forgotten, _, _, said = tasks["restore"](guess)
        assert forgotten == ""
        assert (app.GONE in said) == bool(guess)  # who comes for the first time has lost nothing
    del session, restored
    gc.collect()
    assert app.GONE in tasks["restore"](secret)[-1]  # nothing but gradio's state keeps cells


def test_every_task_about_cells_renews_their_time(tiny_pipeline):
    for function in build(tiny_pipeline).fns.values():
        states = [
            [block for block in of if isinstance(block, gradio.State)] for of in (function.inputs, function.outputs)
        ]
        assert set(states[0]) <= set(states[1]), function.api_name


def test_a_map_of_the_file_without_places_is_made_anew(adata):
    adata.obsm["X_umap"] = np.full((adata.n_obs, 2), np.nan)
    session = opened(adata, "cells.h5ad")
    assert np.isfinite(session.places).all()
    assert session.what == "UMAP of principal components"


def test_files_that_no_task_could_read_are_refused_when_they_are_opened(tasks, adata, tmp_path, monkeypatch):
    empty, scaled, none = adata.copy(), adata.copy(), adata[:0].copy()
    empty.X, scaled.X = None, adata.X.toarray() - 1.0
    for name, cells, words in (
        ("no-matrix", empty, "no matrix at all"),
        ("scaled", scaled, "negative values"),
        ("no-cells", none, r"no-cells\.h5ad has no cells"),
    ):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        with pytest.raises(gradio.Error, match=words):
            tasks["open"](str(tmp_path / f"{name}.h5ad"))
    adata.write_h5ad(tmp_path / "many.h5ad")
    monkeypatch.setattr(app, "MAX_CELLS", adata.n_obs - 1)
    monkeypatch.setattr("scmmgpt.readers.cell_files._read_h5ad", lambda path: pytest.fail("read before it is refused"))
    with pytest.raises(gradio.Error, match=r"many\.h5ad has .* at most .*`scmmgpt annotate`"):
        tasks["open"](str(tmp_path / "many.h5ad"))


def test_few_cells_are_opened_without_a_umap_and_annotated(tasks, adata, tmp_path):
    adata[:1].copy().write_h5ad(tmp_path / "one.h5ad")
    session, drawn, *_ = tasks["open"](str(tmp_path / "one.h5ad"))
    assert drawn["title"].startswith("one.h5ad: 1 cell. ")
    assert tasks["annotate"](session, "B cell\nT cell", ANY_TISSUE, 0)[4]["cells"].tolist() == [1]


def test_a_matrix_that_is_a_layer_alone_has_a_map(adata):
    adata.layers["counts"], adata.X = adata.X, None
    assert opened(adata, "cells.h5ad").places.shape == (adata.n_obs, 2)


def test_who_passes_the_empty_field_of_colours_sees_no_error(tasks):
    assert tasks["paint"](None, None)[-1] == ""


def test_a_selection_stays_with_its_cells(tasks, session):
    tasks["select"](session, SimpleNamespace(rows=[1, 3]))
    for drawn in (
        tasks["annotate"](session, "B cell\nT cell", ANY_TISSUE, 0)[1],
        tasks["search"](session, "a B cell", 4)[1],
        tasks["paint"](session, "cell_type")[1],
        tasks["generate"](session, "a B cell", 3)[1],
    ):
        assert drawn["rows"] == [1, 3]


def test_what_is_saved_leaves_no_second_copy(tasks, session, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert anndata.read_h5ad(tasks["save"](session)[1]["value"]).n_obs == session.adata.n_obs
    assert list(tmp_path.glob("scmmgpt-*")) == []


def test_labels_and_a_tissue_at_once_are_named_as_the_fields_of_the_page(tasks, session):
    with pytest.raises(gradio.Error, match='"Cell types" and "Tissue" both choose'):
        tasks["annotate"](session, "B cell", "blood", 0)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Pass `min_score=`, or more `labels=`.", 'Pass "Minimum score", or more "Cell types".'),
        ("`tissue='lung'` chooses among the others.", "\"Tissue\" 'lung' chooses among the others."),
        ("Pass another `layer=`.", "Pass another `--layer`. Options that begin with -- are those of the command"),
        ("Write it again; `--debug` shows where it happened.", "Write it again."),
        ("Unpack it: pass the folder.", "Unpack it: pass the folder. The page opens files alone; the command"),
        ("Write `adata = adata.T`.", "Write `adata = adata.T`. Here `adata` is the file in Python"),
    ],
)
def test_remedies_are_those_of_the_page(said, shown):
    assert app.on_page(said).startswith(shown)


def test_colours_of_a_map_are_the_commonest_first_and_numbers_grow_darker():
    places, kinds = np.arange(12.0).reshape(6, 2), pd.Series(list("bbbaca"))
    drawn = cell_map.draw(places, "", kinds)
    assert [(text, index) for text, _, index in drawn["legend"]] == [("b (3)", 1), ("a (2)", 2), ("c (1)", 3)]
    assert drawn["color"] == [1, 1, 1, 2, 3, 2]  # what is rare is drawn last
    assert (min(drawn["x"]), max(drawn["x"])) == (min(drawn["y"]), max(drawn["y"])) == (0, 1000)
    drawn = cell_map.draw(places, "", pd.Series(np.arange(6.0)))
    light = [sum(to_rgb(drawn["palette"][i])) for i in drawn["color"]]
    assert light == sorted(light, reverse=True)
    assert [index for _, _, index in drawn["legend"]] == [None, None]


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("open", (None,), "Choose a file"),
        ("annotate", (None, "", ANY_TISSUE, 0), "Choose a file"),
        ("generate", (None, "  ", 2), "The prompt is empty"),
    ],
)
def test_a_bad_input_is_said_in_the_browser(tasks, name, arguments, match):
    with pytest.raises(gradio.Error, match=match):
        tasks[name](*arguments)


def test_a_file_that_holds_no_cells_is_named(tasks, tmp_path):
    (tmp_path / "x.h5ad").write_text("nothing")
    with pytest.raises(gradio.Error, match=r"x\.h5ad") as caught:
        tasks["open"](str(tmp_path / "x.h5ad"))
    assert str(tmp_path) not in str(caught.value)  # the folder of an upload says nothing to a user


def test_parameters_of_the_pages_api_have_names(tasks):
    assert list(inspect.signature(tasks["search"]).parameters) == ["session", "text", "top_k", "progress"]


def test_the_page_does_not_call_home(tasks, tiny_pipeline):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert build(tiny_pipeline).analytics_enabled is False


def test_files_of_the_page_are_of_its_user_alone_and_gone_after_it(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    files = tmp_path / "files"
    files.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scmmgpt.app", str(tmp_path / "model"), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(files)}) as page:
        assert f"127.0.0.1:{port}".encode() in page.stdout.readline()
        (folder,) = files.glob("scmmgpt-page-*")
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "cells.h5ad").write_text("of a user")
        page.terminate()
    assert page.returncode == 128 + signal.SIGTERM
    assert not folder.exists()
    assert not [path for path in files.rglob("*") if path.is_file()]


def test_without_gradio_one_line_says_what_to_install():
    hide = "import sys; sys.modules['gradio'] = None; from scmmgpt import app; sys.exit(app.main(['nowhere']))"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("install it with `pip install scmmgpt[app]`.")


def test_questions_are_about_the_selected_cells_until_others_are_selected():
    page = build(synthetic.fitted_pipeline())
    chats = [block for block in page.blocks.values() if block.get_block_name() == "chatbot"]
    assert [block.buttons for block in chats] == [["copy"]]  # "share" would send the turns away
    tasks = {function.api_name: function.fn for function in page.fns.values()}
    cells = opened(synthetic.synthetic_adata(80), "cells.h5ad")
    tasks["select"](cells, SimpleNamespace(rows=[0, 4, 8]))
    _, turns, _, _ = tasks["ask"](cells, "What are they?")
    assert turns[-1]["content"] == "Labels of the 3 selected cells: B cell (100\N{NO-BREAK SPACE}%)."
    assert [turn["role"] for turn in tasks["ask"](cells, "Do they express CD19?")[1]] == ["user", "assistant"] * 2
    tasks["select"](cells, SimpleNamespace(rows=[1, 5]))
    _, turns, _, _ = tasks["ask"](cells, "What are they?")
    assert [turn["content"] for turn in turns[1:]] == [
        "Labels of the 2 selected cells: T cell (100\N{NO-BREAK SPACE}%)."
    ]
    with pytest.raises(Exception, match="The question is empty"):
        tasks["ask"](cells, " ")
