"""A web page on this machine with the tasks of the pipeline: annotate, search, describe and generate cells on a map.

    python -m scmmgpt.app                       # serves http://127.0.0.1:7860; nothing leaves the machine
    python -m scmmgpt.app CHECKPOINT            # another checkpoint than that of the package

In a Hugging Face Space, which passes no argument, the environment variable `SCMMGPT_MODEL` names the checkpoint. Needs
the extra `app`.
"""

import functools
import inspect
import logging
import os
import signal
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import anndata
import numpy as np
import pandas as pd
from transformers.utils import logging as progress_logging

from scmmgpt import pl
from scmmgpt.commands.cell_map import CSS, HTML, SCRIPT, checked_rows, colors_of, nearest_rows
from scmmgpt.commands.chat import Chat
from scmmgpt.commands.checkpoints import check_checkpoint, root_checkpoint
from scmmgpt.commands.errors import CHECKED, OneLineParser, explain, number, run_command
from scmmgpt.commands.page_session import DESCRIPTION, NO_SELECTION, SEARCHED, Session
from scmmgpt.commands.page_words import FIELDS, Warnings, as_text, named_labels, on_page, unbroken
from scmmgpt.commands.questions import EXAMPLES
from scmmgpt.commands.writing import make_writable, nullable_strings
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import is_table, read_file
from scmmgpt.records_scmmgpt import in_few_lines, recorded


# Before the import: gradio looks up addresses on the internet at start. Nothing leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
gr: Any = None  # the extra `app` is not installed
with suppress(ModuleNotFoundError):
    import gradio as gr


logger = logging.getLogger("scmmgpt.app")  # where the page is run as a command, too
NO_GRADIO = "The page needs gradio; install it with `pip install scmmgpt[app]`."
NO_CELLS = "Choose a file of cells, or open the example, first."
ANY_TISSUE = "any tissue"
INTRODUCTION = """# scMMGPT
Open a file of single cells (.h5ad, .h5 of 10x, .h5mu, .loom, .csv, .tsv), then annotate the cells, search them by a
sentence, or ask about some of them. Files stay on the machine that runs this page."""
DESCRIBED = 20  # selected cells that are described
MIN_CELLS = 5  # of a UMAP
MAX_CELLS = 50_000  # of a file, on the page
MAX_SIZE = "1gb"  # of a file
READING = 30  # seconds that an error is shown, above what the tasks after it say
KEPT = 3600  # seconds that the cells and files of a browser are kept
STORE = "scmmgpt"  # key of a browser's secret in sessionStorage, which a tab keeps over reloads, as its copies do
GONE = (
    "The cells of this tab are gone: the page keeps cells for an hour, and not over its own restart. Open them again."
)
MIN_WIDTH = 340  # pixels of a column
HITS = ["cell", "match", "annotated type"]
EVIDENCE = ["cell type (cells)", "against", "genes"]
MEAN_EXPRESSION = "mean log1p(CP10k)"
SHOWN_GENES = 10  # that speak for a label
SHOWN_QUERY = 80  # characters of a search
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
# Gradio measures the tabs in a hidden row; those that a column has no room for are behind a menu. Without a width
# in the hidden row none is behind the menu, and the row that is shown wraps. Gradio's badge of an error lies on the
# title of the map, and repeats the message beside it. Its sliders and dropdowns do not show the focus of the keyboard.
STYLE = """
.wrap > .error, .wrap > .clear-status { display: none }
input[type=range]:focus-visible, .wrap-inner:has(input:focus-visible) { outline: 2px solid #2563eb;
                                                                        outline-offset: 2px }
.tab-container.visually-hidden button { width: 0; padding: 0; overflow: hidden }
.tab-container[role=tablist] { flex-wrap: wrap; height: auto; overflow: visible }
.tab-container[role=tablist] button { padding: 4px 5px; margin: 0 }
table td, table td * { word-break: normal; overflow-wrap: anywhere; hyphens: auto }
"""
# Gradio opens the list of a dropdown again when the Tab key leaves the dropdown, and the list covers the map.
KEYS = """() => window.addEventListener("keydown", (event) => {
    if (event.key === "Tab" && event.target.role === "combobox") event.stopPropagation();
}, true)"""
# Gradio's own fonts come from Google. Its tables are in `font_mono`, in which names of types fill a narrow column.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["system-ui", "sans-serif"]}


def check_size(n_cells: int, name: str) -> None:
    """Refuse a file of no cells, and of more than `MAX_CELLS`."""
    if not n_cells:
        raise ValueError(f"{name} has no cells. Check the step that wrote the file.")
    if n_cells > MAX_CELLS:
        raise ValueError(
            f"{name} has {n_cells:,} cells, and the page takes at most {MAX_CELLS:,}. The commands read files of "
            "any size: `scmmgpt annotate`, then `scmmgpt report`."
        )


def opened(adata: anndata.AnnData, name: str) -> Session:
    """A session with cells that were just read."""
    check_size(adata.n_obs, name)
    if adata.n_obs < MIN_CELLS:
        places, what = np.c_[np.arange(adata.n_obs), np.zeros(adata.n_obs)], "They are too few for a UMAP: a row"
    else:
        with progress_logging.tqdm(desc=f"Placing {adata.n_obs:,} cells on a map", total=1, delay=3) as progress:
            places, _, what = pl.coordinates(adata)
            progress.update()
    columns = colors_of(adata.obs)
    known = [name for name in ("scmmgpt_cell_type", "cell_type", "louvain", "leiden") if name in columns]
    return Session(adata, name, np.asarray(places, dtype=float), what, known[0] if known else None)


def example() -> anndata.AnnData:
    """700 blood cells that come with scanpy, and their UMAP."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old file
        return scanpy.datasets.pbmc68k_reduced()


def task(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Add the warnings of a task to its results, as a list in Markdown, and show its errors about an input.

    An uploaded file goes by its name there, not by the folder that it was uploaded to. The page shows the progress
    that a command would show in its terminal.
    """
    progress = inspect.Parameter("progress", POSITIONAL, default=gr.Progress(track_tqdm=True))

    @functools.wraps(function)
    def run(*args: Any) -> tuple[Any, ...]:
        args = tuple(arg for arg in args if not isinstance(arg, gr.Progress))
        folders = {f"{Path(arg).parent}{os.sep}" for arg in args if isinstance(arg, str) and os.path.isabs(arg)}

        def shown(message: object) -> str:
            text = as_text(on_page(" ".join(str(message).split())))
            return functools.reduce(lambda text, folder: text.replace(folder, ""), folders, text)

        with Warnings() as raised:
            try:
                results = function(*args)
            except gr.Error:
                raise
            except Exception as error:  # a library may raise anything about a file that is broken
                is_foreseen = isinstance(error, CHECKED)
                said = shown(explain(error, extra="app"))
                raise gr.Error(said, duration=READING, print_exception=not is_foreseen) from error
        return *results, "\n".join(f"- ⚠ {shown(message)}" for message in in_few_lines(raised.messages))

    parameters = inspect.signature(function).parameters.values()  # their names are those of the page's API
    vars(run)["__signature__"] = inspect.Signature([*parameters, progress])
    return run


def build(pipeline: ScMMGPTPipeline) -> Any:
    """The page for one checkpoint, a `gradio.Blocks`."""
    tasks, ui = Tasks(pipeline), SimpleNamespace()
    with gr.Blocks(title="scMMGPT", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        ui.page = page
        gr.Markdown(INTRODUCTION)
        ui.session = gr.State(None, time_to_live=KEPT)
        ui.secret = gr.Textbox(visible=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=MIN_WIDTH):
                lay_out_map(ui, tasks)
            with gr.Column(scale=2, min_width=MIN_WIDTH):
                lay_out_tabs(ui, tasks)
        connect(ui, tasks)
    return page


def lay_out_map(ui: SimpleNamespace, tasks: "Tasks") -> None:
    """The file, its cells on a map, and what is saved."""
    ui.path = gr.File(label="File of cells", type="filepath", height=140)
    ui.sample = gr.Button("Open the example: 700 blood cells", size="sm")
    ui.map = gr.HTML(html_template=HTML, css_template=CSS, js_on_load=SCRIPT.read_text(encoding="utf-8"))
    ui.chosen = gr.Markdown(NO_SELECTION)
    ui.color = gr.Dropdown([], label="Colour of the cells")
    ui.save = gr.Button("Save the cells with their results", size="sm")
    tasks.saved.render()


def lay_out_tabs(ui: SimpleNamespace, tasks: "Tasks") -> None:
    """A tab for each task, with its fields, button and results."""
    stored = tasks.pipeline.model.config.annotation or {}
    known, tissues = list(stored.get("labels", {})), [str(term["name"]) for term in stored.get("tissues") or []]
    examples = "\n".join(["for example:", *known[:3]]) if known else ""
    tasks.notes.render()
    with gr.Tab("Annotate"):
        text = f"{FIELDS['labels']} to choose from, one a line. Empty: all that the model knows"
        ui.labels = gr.Textbox(label=text, placeholder=examples, lines=4)
        ui.tissue = gr.Dropdown([ANY_TISSUE, *tissues], label=FIELDS["tissue"], visible=bool(tissues))
        text = f"{FIELDS['min_score']}: a cell below it gets a broader type or none. 0: the model decides"
        ui.min_score = gr.Slider(0, 1, value=0, step=0.05, label=text)
        ui.annotate = gr.Button("Annotate", variant="primary")
        names, widths = ["cell type", "cells"], ["70%", "30%"]
        ui.counts = gr.Dataframe(label="Cells per type", headers=names, wrap=True, column_widths=widths)
    with gr.Tab("Search"):
        ui.query = gr.Textbox(label="Which cells are wanted?", placeholder="a cytotoxic lymphocyte")
        ui.top_k = gr.Slider(1, 100, value=10, step=1, label="Cells in the table")
        ui.search = gr.Button("Search", variant="primary")
        ui.like = gr.Button("More like the selected cells")
        ui.hits = gr.Dataframe(label="Best matches", headers=HITS, wrap=True, column_widths=["42%", "18%", "40%"])
    with gr.Tab("Selected", visible=tasks.can_write or tasks.can_explain):
        gr.Markdown("About the cells that are selected on the map; without a selection, about all.")
        ui.explain = gr.Button("Why these types?", variant="primary", visible=tasks.can_explain)
        names, widths = list(EVIDENCE), ["30%", "26%", "44%"]
        label = "Genes that speak for each type, against the type that is next"
        ui.evidence = gr.Dataframe(
            label=label, headers=names, wrap=True, column_widths=widths, visible=tasks.can_explain
        )
        ui.describe = gr.Button("Describe the cells", variant="primary")
        names, widths = ["cell", "description"], ["36%", "64%"]
        ui.texts = gr.Dataframe(
            label=f"Descriptions, of {DESCRIBED} cells at most", headers=names, wrap=True, column_widths=widths
        )
    with gr.Tab("Ask", visible=tasks.can_explain):
        gr.Markdown(f"Ask about the selected cells, or all. {EXAMPLES}")
        ui.turns = gr.Chatbot(show_label=False, height=420, buttons=["copy"])  # none shares
        ui.question = gr.Textbox(label="Question", placeholder="Why not NK cells?")
        ui.ask = gr.Button("Ask", variant="primary")
    with gr.Tab("Generate", visible=tasks.can_write):
        ui.prompt = gr.Textbox(label="Description of the new cells", placeholder="A B cell from blood.")
        ui.n_cells = gr.Slider(1, 1000, value=20, step=1, label="Number of cells")
        ui.generate = gr.Button("Generate", variant="primary")
        ui.genes = gr.Dataframe(label="Genes with most expression", headers=["gene", MEAN_EXPRESSION])
        ui.made = gr.File(label="Generated cells")


def connect(ui: SimpleNamespace, tasks: "Tasks") -> None:
    """Connect buttons and fields with their tasks."""
    drawn = [ui.session, ui.map, ui.chosen]
    shown = [*drawn, ui.color]
    begun = [*shown, ui.secret]
    of_selected = [ui.evidence, ui.texts, ui.turns]
    of_file = [*of_selected, ui.counts, ui.hits, ui.genes, ui.made]
    read = f"() => [sessionStorage.getItem({STORE!r}) ?? '']"
    tasks.on([ui.page.load], tasks.restore, [ui.secret], [*begun, ui.counts, ui.turns], changes=False, js=read)
    keep = f"(secret) => sessionStorage.setItem({STORE!r}, secret)"
    gr.on([ui.secret.change], None, ui.secret, None, js=keep, api_visibility="private")
    done = tasks.on([ui.path.upload], tasks.open, [ui.path], begun, clears=of_file)
    done.then(lambda: None, None, ui.path, queue=False, api_visibility="private")  # free for the next file
    tasks.on([ui.sample.click], tasks.example, [], begun, clears=of_file)
    tasks.on([ui.color.input], tasks.paint, [ui.session, ui.color], drawn, changes=False, is_long=False)
    tasks.on([ui.map.select], tasks.select, [ui.session], drawn, clears=of_selected, changes=False, is_long=False)
    inputs = [ui.session, ui.labels, ui.tissue, ui.min_score]
    tasks.on([ui.annotate.click], tasks.annotate, inputs, [*shown, ui.counts], clears=of_selected)
    inputs, outputs = [ui.session, ui.query, ui.top_k], [*shown, ui.hits]
    tasks.on([ui.search.click, ui.query.submit], tasks.search, inputs, outputs)
    tasks.on([ui.like.click], tasks.like, [ui.session, ui.top_k], outputs)
    tasks.on([ui.explain.click], tasks.explain, [ui.session], [ui.session, ui.evidence])
    tasks.on([ui.describe.click], tasks.describe, [ui.session], [ui.session, ui.texts])
    outputs = [ui.session, ui.turns, ui.question]
    tasks.on([ui.ask.click, ui.question.submit], tasks.ask, [ui.session, ui.question], outputs)
    tasks.on([ui.turns.clear], tasks.forget, [ui.session], [ui.session], changes=False, is_long=False)
    inputs, outputs = [ui.session, ui.prompt, ui.n_cells], [ui.session, ui.map, ui.genes, ui.made]
    tasks.on([ui.generate.click, ui.prompt.submit], tasks.generate, inputs, outputs)
    tasks.on([ui.save.click], tasks.save, [ui.session], [ui.session, tasks.saved], changes=False)


class Tasks:
    """Actions of the page's buttons, for the cells of one browser at a time."""

    def __init__(self, pipeline: ScMMGPTPipeline) -> None:
        self.pipeline = pipeline
        self.can_explain = pipeline.can_explain
        self.sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()  # by secret; gradio ends them
        self.can_write = hasattr(pipeline.model, "generate_cells")  # stage 1 has no language model
        self.notes: Any = gr.Markdown(render=False)  # where the page shows warnings of the last task
        self.saved: Any = gr.File(label="Saved cells", visible=False, render=False)

    def on(
        self,
        events: Sequence[Any],
        function: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any],
        clears: Sequence[Any] = (),
        changes: bool = True,
        is_long: bool = True,
        js: str | None = None,
    ) -> Any:
        """Connect events with a task. The model does one task at a time, whoever asks.

        A task about cells has the session among its outputs, too: gradio counts `KEPT` from the last output.

        A task that succeeds empties the results of other cells or labels, `clears`, and, if it `changes` the cells,
        takes away the file that was saved before.
        """
        done = gr.on(
            events,
            task(function),
            inputs,
            [*outputs, self.notes],
            api_name=function.__name__,
            concurrency_limit=1,
            concurrency_id="model",
            show_progress_on=[
                part for part in outputs if isinstance(part, gr.HTML | gr.Dataframe | gr.File | gr.Chatbot)
            ],
            show_progress="full" if is_long else "hidden",
            js=js,
        )
        gone: dict[Any, Any] = dict.fromkeys(clears)
        if changes:
            gone[self.saved] = gr.update(value=None, visible=False)
        if gone:
            done.success(lambda: gone, None, list(gone), queue=False, show_progress="hidden", api_visibility="private")
        return done

    def written(self, adata: anndata.AnnData, name: str) -> str:
        """A file to download, which the page deletes after `KEPT` seconds."""
        make_writable(adata)
        with tempfile.TemporaryDirectory(prefix="scmmgpt-") as folder, nullable_strings():
            adata.write_h5ad(Path(folder, name))
            return str(self.saved.move_resource_to_block_cache(Path(folder, name)))

    def open(self, path: str | None) -> tuple[Any, ...]:
        """Read an uploaded file."""
        if not path:
            raise gr.Error(NO_CELLS)
        name, genes = Path(path).name, self.pipeline.processor.gene_index
        if not is_table(Path(path)):  # a table has its number of cells after it is read
            with read_file(path, backed=True, gene_index=genes) as file:
                check_size(len(file.obs_names), name)
        adata = read_file(path, gene_index=genes)
        check_size(adata.n_obs, name)
        self.pipeline.processor.choose_input(adata)  # what it says of matrix and genes is said at once
        return self.begun(opened(adata, name))

    def example(self) -> tuple[Any, ...]:
        """Open the example."""
        return self.begun(opened(example(), "example"))

    def begun(self, session: Session) -> tuple[Any, ...]:
        """What `_shown` gives of a new session, and the secret that brings the session back."""
        self.sessions[session.secret] = session
        return *_shown(session), session.secret

    def restore(self, secret: str) -> tuple[Any, ...]:
        """Bring back the cells of a browser after a reload of the page; a task that still runs is waited for."""
        session = self.sessions.get(secret)
        if session is None:
            if secret:
                logger.warning(GONE)
            return *[gr.skip()] * 4, "", gr.skip(), gr.skip()
        return *_shown(session), secret, session.counts(), session.turns

    def paint(self, session: Session | None, color: str | None) -> tuple[Any, ...]:
        """Colour the map by a column of `obs`."""
        if session is None or color is None:  # who leaves an empty field has chosen nothing
            return gr.skip(), gr.skip(), gr.skip()
        if color not in session.adata.obs:
            raise ValueError(f"obs has no column {color!r}.")
        session.color = color
        return session, session.map(), session.said()

    def select(self, session: Session | None, event: "gr.EventData") -> tuple[Any, ...]:
        """Keep the cells that are selected on the map, and say what they are."""
        session = _with_cells(session)
        session.rows, session.chat = checked_rows(event.rows, session.adata.n_obs), None
        return session, session.map(), session.said()

    def annotate(self, session: Session | None, labels: str, tissue: str, min_score: float) -> tuple[Any, ...]:
        """Annotate all cells."""
        session = _with_cells(session)
        names = named_labels(labels, self.pipeline.model.config.annotation or {})
        of = None if tissue == ANY_TISSUE else tissue
        if names and of:
            both = " and ".join(f'"{FIELDS[name]}"' for name in ("labels", "tissue"))
            raise ValueError(
                f"{both} both choose the cell types: empty the first, or set the second to {ANY_TISSUE!r}."
            )
        self.pipeline.annotate(session.adata, names or None, min_score=min_score or None, tissue=of)
        session.relabelled("scmmgpt_cell_type")
        return *_shown(session), session.counts()

    def label(self, session: Session) -> None:
        """Annotate all cells as by default, for a task that needs labels; the colour stays."""
        self.pipeline.annotate(session.adata)
        session.relabelled(session.color)

    def search(self, session: Session | None, text: str, top_k: int) -> tuple[Any, ...]:
        """Find cells by a text; the score of each colours the map."""
        session = _with_cells(session)
        choice = self.pipeline.processor.choose_input(session.adata)

        def places() -> np.ndarray:
            if session.placed is None:  # the cells stay, and the next search needs no network
                session.placed = self.pipeline.place_cells(session.adata, choice)
            return session.placed

        columns = self.pipeline.search_cells(session.adata, choice, text, places=places)
        (hits,) = self.pipeline.add_search(session.adata, choice, columns, text, int(top_k), key_added=SEARCHED)
        return _found(session, hits, f"“{textwrap.shorten(text, SHOWN_QUERY, placeholder=' …')}”")

    def like(self, session: Session | None, top_k: int) -> tuple[Any, ...]:
        """Find the cells that are most like the selected ones."""
        session = _with_cells(session)
        if not len(names := session.adata.obs_names[session.rows]):
            raise gr.Error(NO_SELECTION)
        hits = self.pipeline.search(session.adata, None, int(top_k), like=list(names), key_added=SEARCHED)
        return _found(session, hits, names[0] if len(names) == 1 else f"{len(names):,} selected cells")

    def explain(self, session: Session | None) -> tuple[Session, pd.DataFrame]:
        """The genes that speak for the labels of the selected cells."""
        session = _with_cells(session)
        if "scmmgpt_cell_type" not in session.adata.obs:  # of all cells, which decide what is novel
            self.label(session)
        cells = session.chosen(MAX_CELLS)
        table: dict[str, dict[str, Any]] = {}
        for row in self.pipeline.explain(cells).group_rows():  # the most important gene first
            if row["level"] == "label" and row["term"] > 0:
                about = {"cells": row["cells"], "against": row["rival"], "genes": []}
                table.setdefault(row["name"], about)["genes"].append(row["gene"])
        rows = [
            (f"{name} ({row['cells']:,})", row["against"], ", ".join(row["genes"][:SHOWN_GENES]))
            for name, row in sorted(table.items(), key=lambda item: -item[1]["cells"])
        ]
        return session, pd.DataFrame(rows, columns=EVIDENCE)

    def ask(self, session: Session | None, question: str) -> tuple[Any, ...]:
        """Answer a question about the selected cells; turns go on until others are selected."""
        session = _with_cells(session)
        if not question.strip():
            raise ValueError(f"The question is empty. {EXAMPLES}")
        if session.chat is None:
            rows = session.rows if len(session.rows) else None
            if "scmmgpt_cell_type" not in session.adata.obs:
                self.label(session)
            session.chat, session.turns = Chat(self.pipeline, session.adata, rows, session.proved(self.pipeline)), []
        answer = as_text(unbroken(session.chat.ask(question.strip()).text))
        session.turns += [
            {"role": "user", "content": as_text(question)},
            {"role": "assistant", "content": answer},
        ]
        return session, session.turns, ""

    def forget(self, session: Session | None) -> tuple[Session]:
        """End the turns that the browser has emptied."""
        session = _with_cells(session)
        session.chat, session.turns = None, []
        return (session,)

    def describe(self, session: Session | None) -> tuple[Session, pd.DataFrame]:
        """Describe the selected cells: by counts, where the checkpoint can prove what it says."""
        session = _with_cells(session)
        if self.can_explain:
            texts = session.describe(self.pipeline, DESCRIBED)
        else:
            texts = self.pipeline.describe(session.chosen(DESCRIBED)).obs[DESCRIPTION]
        return session, texts.map(unbroken).rename("description").rename_axis("cell").reset_index()

    def generate(self, session: Session | None, prompt: str, n_cells: int) -> tuple[Any, ...]:
        """Generate cells, and show where they fall among the cells of the map, if there are any."""
        generated = self.pipeline.generate(prompt, int(n_cells))
        mean = np.asarray(generated.X.mean(axis=0)).ravel()
        top = np.argsort(-mean)[:30]
        genes = pd.DataFrame({"gene": generated.var_names[top], MEAN_EXPRESSION: mean[top].astype(float).round(3)})
        if session is None:
            return None, None, genes, self.written(generated, "generated.h5ad")
        if "X_scmmgpt" not in session.adata.obsm:
            self.pipeline.embed(session.adata)
        of = recorded(session.adata, "scmmgpt", "embed").get("of")  # of a file, not always the default
        self.pipeline.embed(generated, of=of)
        spaces = session.adata.obsm["X_scmmgpt"], generated.obsm["X_scmmgpt"]
        session.marks = nearest_rows(session.places, *spaces)
        return session, session.map(), genes, self.written(generated, "generated.h5ad")

    def save(self, session: Session | None) -> tuple[Any, ...]:
        """Write the cells with all results."""
        session = _with_cells(session)
        path = self.written(session.adata, f"{session.name.split('.')[0]}_scmmgpt.h5ad")
        return session, gr.update(value=path, visible=True)


def _with_cells(session: Session | None) -> Session:
    if session is None:
        raise gr.Error(NO_CELLS)
    return session


def _shown(session: Session) -> tuple[Any, ...]:
    """A session, its map, what is selected, and the columns that can colour the map."""
    columns = [(session.name_of(column), column) for column in colors_of(session.adata.obs)]
    return session, session.map(), session.said(), gr.Dropdown(choices=columns, value=session.color)


def _found(session: Session, hits: list[dict[str, Any]], query: str) -> tuple[Any, ...]:
    """A session whose map has the scores of a search, and the table of the best cells."""
    session.color, session.query = SEARCHED, query
    found, scores = [hit["index"] for hit in hits], [round(hit["score"], 2) for hit in hits]
    obs = session.adata.obs.iloc[found]
    types = obs["scmmgpt_cell_type"].astype(str) if "scmmgpt_cell_type" in obs else "–"
    return *_shown(session), pd.DataFrame(dict(zip(HITS, (obs.index, scores, types), strict=True)))


def launch(page: Any, host: str, port: int | None = None, max_size: str | int = MAX_SIZE) -> str:
    """Serve a page, and return its address. The browser stores the secret of a session alone."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=max_size,
        theme=gr.themes.Default(**FONTS),
        css=STYLE,
        js=KEYS,
        footer_links=[],
        run_history=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return str(address)


def main(argv: list[str] | None = None) -> int:
    """Serve the page; returns the exit status."""
    parser = OneLineParser(prog="python -m scmmgpt.app", description=__doc__.splitlines()[0])
    text = "folder, or id on the Hub (default: the checkpoint of this package)"
    parser.add_argument("model", nargs="?", default=os.environ.get("SCMMGPT_MODEL"), help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for a whole network")
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860, help="port to listen on (default: 7860)")
    args = parser.parse_args(argv)

    def serve() -> None:
        if gr is None:
            raise ModuleNotFoundError(NO_GRADIO, name="gradio")
        model = args.model or root_checkpoint()
        check_checkpoint(model)
        pipeline = ScMMGPTPipeline.from_pretrained(model)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl+C: files are deleted
        # Gradio's own folder is open to all users of the machine, and stays there after the page.
        with tempfile.TemporaryDirectory(prefix="scmmgpt-page-", ignore_cleanup_errors=True) as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder
            page = build(pipeline)
            sys.stdout.write(f"The page is at {launch(page, args.host, args.port)} until you press Ctrl+C.\n")
            sys.stdout.flush()
            page.block_thread()

    return run_command("scmmgpt.app", serve, inputs=[args.model], extra="app")


if __name__ == "__main__":
    sys.exit(main())
