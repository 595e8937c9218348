"""A web page on this machine with the tasks of the pipeline: annotate, search, describe and generate cells on a map.

    python -m scmmgpt.app                       # serves http://127.0.0.1:7860; nothing leaves the machine
    python -m scmmgpt.app CHECKPOINT            # another checkpoint than that of the package

In a Hugging Face Space, which passes no argument, the environment variable `SCMMGPT_MODEL` names the checkpoint. Needs
the extra `app`.
"""

import functools
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from scmmgpt import pl
from scmmgpt.commands.cell_map import CSS, HTML, SCRIPT, checked_rows, colors_of, draw, nearest_places
from scmmgpt.commands.chat import Chat, has_proof
from scmmgpt.commands.checkpoints import check_checkpoint, root_checkpoint
from scmmgpt.commands.errors import OneLineParser, as_options, number, run_command
from scmmgpt.commands.questions import EXAMPLES
from scmmgpt.commands.writing import make_writable
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file
from scmmgpt.records_scmmgpt import recorded


# Before the import: gradio looks up addresses on the internet at start. Nothing leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
gr: Any = None  # the extra `app` is not installed
with suppress(ModuleNotFoundError):
    import gradio as gr


NO_GRADIO = "The page needs gradio; install it with `pip install scmmgpt[app]`."
NO_CELLS = "Choose a file of cells, or open the example, first."
ANY_TISSUE = "any tissue"
NO_SELECTION = "No cells selected: draw a loop around some."
DESCRIBED = 20  # selected cells that are described; each takes a second
MAX_CELLS = 50_000  # of a file, on the page
MAX_SIZE = "1gb"  # of a file
KEPT = 3600  # seconds that the cells of a browser are kept
SHOWN_GENES = 10  # that speak for a label
SHOWN_KINDS = 6  # kinds of selected cells that are counted
FILE_TYPES = [".h5ad", ".h5", ".h5mu", ".loom", ".csv", ".tsv", ".txt", ".gz"]
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # gradio's own come from Google


class Warnings(logging.Handler):
    """Collects the warnings of the thread that made it, to show them in the browser of that user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record."""
        if record.thread == self.thread:
            self.messages.append(record.getMessage())

    def __enter__(self) -> "Warnings":
        logging.getLogger("scmmgpt").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("scmmgpt").removeHandler(self)


@dataclass
class Session:
    """The cells of one browser. Another browser has another session; it ends an hour after its last use."""

    adata: anndata.AnnData
    name: str  # of the file
    places: np.ndarray  # (n, 2), of the map
    what: str  # the places are of
    color: str | None = None  # column of obs
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # selected, none: all cells
    marks: np.ndarray | None = None  # places of generated cells
    chat: Chat | None = None  # about the selected cells
    turns: list[dict[str, str]] = field(default_factory=list)  # of the chat

    def map(self) -> dict:
        """The value of the map."""
        title = f"{self.name}: {self.adata.n_obs:,} cells. {self.what}."
        if self.color is not None:
            title += f" Colour: {self.color}."
        if self.marks is not None:
            title += " Crosses: generated cells."
        values = None if self.color is None else self.adata.obs[self.color]
        return draw(self.places, title, values, self.marks)

    def chosen(self, most: int) -> anndata.AnnData:
        """A copy of the selected cells, at most `most`; without a selection of the first cells."""
        rows = self.rows if len(self.rows) else np.arange(self.adata.n_obs)
        return self.adata[rows[:most]].copy()


def opened(adata: anndata.AnnData, name: str) -> Session:
    """A session with cells that were just read."""
    if adata.n_obs > MAX_CELLS:
        raise ValueError(
            f"{name} has {adata.n_obs:,} cells, and the page takes at most {MAX_CELLS:,}. The commands read files of "
            "any size: `scmmgpt annotate`, then `scmmgpt report`."
        )
    if adata.n_obs < 5:
        raise ValueError(f"{name} has {adata.n_obs} cells; a map needs 5 or more. Use the command `scmmgpt annotate`.")
    places, _, what = pl.coordinates(adata)
    columns = colors_of(adata.obs)
    known = [name for name in ("scmmgpt_cell_type", "cell_type", "louvain", "leiden") if name in columns]
    return Session(adata, name, np.asarray(places, dtype=float), what, known[0] if known else None)


def example() -> anndata.AnnData:
    """700 blood cells that come with scanpy, and their UMAP."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old file
        return scanpy.datasets.pbmc68k_reduced()


def save(adata: anndata.AnnData, name: str) -> str:
    """Write a file to download into a new folder."""
    path = Path(tempfile.mkdtemp(prefix="scmmgpt-"), name)
    make_writable(adata)
    adata.write_h5ad(path)
    return str(path)


def task(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Add the warnings of a task to its results, as a list in Markdown, and show its errors about an input.

    An uploaded file goes by its name there, not by the folder that it was uploaded to.
    """

    @functools.wraps(function)  # the names of the parameters are those of the page's API
    def run(*args: Any) -> tuple[Any, ...]:
        folders = {f"{Path(arg).parent}{os.sep}" for arg in args if isinstance(arg, str) and os.path.isabs(arg)}

        def shown(message: object) -> str:
            text = " ".join(str(message).split())
            if (reworded := as_options(text)) != text:
                text = f"{reworded} (Options are of the command `scmmgpt annotate`.)"
            return functools.reduce(lambda text, folder: text.replace(folder, ""), folders, text)

        with Warnings() as raised:
            try:
                results = function(*args)
            except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
                raise gr.Error(shown(error)) from None
        return *results, "\n".join(f"- ⚠ {shown(message)}" for message in dict.fromkeys(raised.messages))

    return run


def build(pipeline: ScMMGPTPipeline) -> Any:
    """The page for one checkpoint, a `gradio.Blocks`."""
    tasks = Tasks(pipeline)
    stored = pipeline.model.config.annotation or {}
    known, tissues = list(stored.get("labels", {})), [str(term["name"]) for term in stored.get("tissues") or []]
    examples = f" It knows {', '.join(known[:3])}{', ...' if len(known) > 3 else ''}" if known else ""
    with gr.Blocks(title="scMMGPT", analytics_enabled=False) as page:
        gr.Markdown("# scMMGPT\nSingle cells to text and back. Files stay on the machine that runs this page.")
        session = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                path = gr.File(
                    label="Cells (.h5ad, .h5, .loom, text)", file_types=FILE_TYPES, type="filepath", height=110
                )
                sample = gr.Button("Open the example: 700 blood cells", size="sm")
                cell_map = gr.HTML(html_template=HTML, css_template=CSS, js_on_load=SCRIPT.read_text(encoding="utf-8"))
                color = gr.Dropdown([], label="Colour")
                chosen = gr.Markdown(NO_SELECTION)
                write = gr.Button("Save the cells with their results", size="sm")
                result = gr.File(label="Saved cells", visible=False)
            shown = [session, cell_map, color, chosen]
            with gr.Column(scale=2, min_width=340):
                tasks.notes.render()
                with gr.Tab("Annotate"):
                    text = f"Candidate cell types, one a line; those of the checkpoint if empty.{examples}"
                    labels = gr.Textbox(label=text, lines=4)
                    tissue = gr.Dropdown([ANY_TISSUE, *tissues], label="Labels of the tissue", visible=bool(tissues))
                    text = "Least score; cells below get a broader type or none. 0: as the checkpoint has it"
                    min_score = gr.Slider(0, 1, value=0, step=0.05, label=text)
                    button = gr.Button("Annotate", variant="primary")
                    names, widths = ["cell type", "cells"], ["70%", "30%"]
                    counts = gr.Dataframe(label="Cells per type", headers=names, wrap=True, column_widths=widths)
                    outputs = [*shown, counts]
                    tasks.on(button.click, tasks.annotate, [session, labels, tissue, min_score], outputs)
                with gr.Tab("Search"):
                    text = gr.Textbox(label="Description of the wanted cells", placeholder="a cytotoxic lymphocyte")
                    top_k = gr.Slider(1, 100, value=10, step=1, label="Cells in the table")
                    button = gr.Button("Search", variant="primary")
                    outputs = [*shown, gr.Dataframe(label="Best matches")]
                    tasks.on(button.click, tasks.search, [session, text, top_k], outputs)
                with gr.Tab("Selected"):
                    gr.Markdown("Draw a loop around cells on the map. Without a loop, the first cells are shown.")
                    if pipeline.can_explain:
                        button = gr.Button("Show the evidence for their labels", variant="primary")
                        label, widths = "Genes that speak for each label", ["28%", "12%", "28%", "32%"]
                        table = gr.Dataframe(label=label, wrap=True, column_widths=widths)
                        tasks.on(button.click, tasks.explain, [session], [table])
                    if tasks.can_write or pipeline.can_explain:
                        button = gr.Button("Describe them", variant="primary")
                        label, widths = f"Descriptions, of at most {DESCRIBED} cells", ["28%", "72%"]
                        table = gr.Dataframe(label=label, wrap=True, column_widths=widths)
                        tasks.on(button.click, tasks.describe, [session], [table])
                if pipeline.can_explain:
                    with gr.Tab("Ask"):
                        gr.Markdown(f"Ask about the selected cells, or all. {EXAMPLES}")
                        turns = gr.Chatbot(label="Answers are counted", height=320, buttons=["copy"])  # none shares
                        question = gr.Textbox(label="Question", placeholder="Why not NK cells?")
                        button = gr.Button("Ask", variant="primary")
                        for event in (button.click, question.submit):
                            tasks.on(event, tasks.ask, [session, question], [session, turns, question])
                if tasks.can_write:
                    with gr.Tab("Generate"):
                        prompt = gr.Textbox(label="Description", placeholder="A B cell from blood.")
                        n_cells = gr.Slider(1, 1000, value=20, step=1, label="Cells")
                        button = gr.Button("Generate", variant="primary")
                        outputs = [gr.Dataframe(label="Highest genes"), gr.File(label="Generated cells")]
                        inputs = [session, prompt, n_cells]
                        tasks.on(button.click, tasks.generate, inputs, [session, cell_map, *outputs])
        tasks.on(path.upload, tasks.open, [path], shown)
        tasks.on(sample.click, tasks.example, [], shown)
        tasks.on(color.input, tasks.paint, [session, color], [session, cell_map])
        tasks.on(cell_map.select, tasks.select, [session], [session, chosen])
        tasks.on(write.click, tasks.save, [session], [result])
    return page


class Tasks:
    """Actions of the page's buttons, for the cells of one browser at a time."""

    def __init__(self, pipeline: ScMMGPTPipeline) -> None:
        self.pipeline = pipeline
        self.can_write = hasattr(pipeline.model, "generate_cells")  # stage 1 has no language model
        self.notes: Any = gr.Markdown(render=False)  # where the page shows warnings of the last task

    def on(self, event: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """Connect an event with a task. The model does one task at a time, whoever asks."""
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        event(task(function), inputs, [*outputs, self.notes], api_name=function.__name__, **one_at_a_time)

    def open(self, path: str | None) -> tuple[Any, ...]:
        """Read an uploaded file."""
        if not path:
            raise gr.Error(NO_CELLS)
        return _shown(opened(read_file(path), Path(path).name))

    def example(self) -> tuple[Any, ...]:
        """Open the example."""
        return _shown(opened(example(), "example"))

    def paint(self, session: Session | None, color: str) -> tuple[Session, dict]:
        """Colour the map by a column of `obs`."""
        session = _with_cells(session)
        if color not in session.adata.obs:
            raise ValueError(f"obs has no column {color!r}.")
        session.color = color
        return session, session.map()

    def select(self, session: Session | None, event: "gr.EventData") -> tuple[Session, str]:
        """Keep the cells inside a loop, and say what they are."""
        session = _with_cells(session)
        session.rows, session.chat = checked_rows(event.rows, session.adata.n_obs), None
        if not len(session.rows):
            return session, NO_SELECTION
        if session.color is None or session.adata.obs[session.color].dtype.kind in "fiu":
            return session, f"{len(session.rows):,} cells selected."
        counts = session.adata.obs[session.color].iloc[session.rows].astype(str).value_counts()
        kinds = ", ".join(f"{name} {n:,}" for name, n in counts.head(SHOWN_KINDS).items())
        return session, f"{len(session.rows):,} cells selected: {kinds}{', ...' if len(counts) > SHOWN_KINDS else '.'}"

    def annotate(self, session: Session | None, labels: str, tissue: str, min_score: float) -> tuple[Any, ...]:
        """Annotate all cells."""
        session = _with_cells(session)
        names = [label.strip() for label in labels.splitlines() if label.strip()]
        of = None if tissue == ANY_TISSUE else tissue
        self.pipeline.annotate(session.adata, names or None, min_score=min_score or None, tissue=of)
        session.color = "scmmgpt_cell_type"
        counts = session.adata.obs[session.color].value_counts().rename_axis("cell type").reset_index(name="cells")
        return *_shown(session), counts[counts["cells"] > 0]

    def search(self, session: Session | None, text: str, top_k: int) -> tuple[Any, ...]:
        """Find cells by a text; the score of each colours the map."""
        session = _with_cells(session)
        hits = self.pipeline.search(session.adata, text, top_k=int(top_k), key_added="scmmgpt_search")
        session.color = "scmmgpt_search"
        return *_shown(session), pd.DataFrame(hits)

    def explain(self, session: Session | None) -> tuple[pd.DataFrame]:
        """The genes that speak for the labels of the selected cells."""
        session = _with_cells(session)
        if "scmmgpt_cell_type" not in session.adata.obs:  # of all cells, which decide what is novel
            self.pipeline.annotate(session.adata)
        cells = session.chosen(MAX_CELLS)
        table: dict[str, dict[str, Any]] = {}
        for row in self.pipeline.explain(cells).group_rows():  # the most important gene first
            if row["level"] == "label" and row["term"] > 0:
                about = {"label": row["name"], "cells": row["cells"], "runner-up": row["rival"], "genes": []}
                table.setdefault(row["name"], about)["genes"].append(row["gene"])
        rows = sorted(table.values(), key=lambda row: -row["cells"])
        return (pd.DataFrame([{**row, "genes": ", ".join(row["genes"][:SHOWN_GENES])} for row in rows]),)

    def ask(self, session: Session | None, question: str) -> tuple[Any, ...]:
        """Answer a question about the selected cells; turns go on until others are selected."""
        session = _with_cells(session)
        if not question.strip():
            raise ValueError(f"The question is empty. {EXAMPLES}")
        if session.chat is None:
            rows = session.rows if len(session.rows) else None
            session.chat, session.turns = Chat(self.pipeline, session.adata, rows), []
        answer = session.chat.ask(question.strip())
        session.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
        return session, session.turns, ""

    def describe(self, session: Session | None) -> tuple[pd.DataFrame]:
        """Describe the selected cells: by counts, where the checkpoint can prove what it says."""
        session = _with_cells(session)
        if not self.pipeline.can_explain:
            cells = session.chosen(DESCRIBED)
            self.pipeline.describe(cells)
        else:
            if not has_proof(session.adata):
                self.pipeline.describe(session.adata, proof=True)
            cells = session.chosen(DESCRIBED)
        texts = cells.obs["scmmgpt_description"].rename("description")
        return (texts.rename_axis("cell").reset_index(),)

    def generate(self, session: Session | None, prompt: str, n_cells: int) -> tuple[Any, ...]:
        """Generate cells, and show where they fall among the cells of the map, if there are any."""
        generated = self.pipeline.generate(prompt, int(n_cells))
        mean = np.asarray(generated.X.mean(axis=0)).ravel()
        top = np.argsort(-mean)[:30]
        genes = pd.DataFrame({"gene": generated.var_names[top], "mean log1p(CP10k)": mean[top].astype(float).round(3)})
        if session is None:
            return None, None, genes, save(generated, "generated.h5ad")
        if "X_scmmgpt" not in session.adata.obsm:
            self.pipeline.embed(session.adata)
        of = recorded(session.adata, "scmmgpt", "embed").get("of")  # of a file, not always the default
        self.pipeline.embed(generated, of=of)
        spaces = session.adata.obsm["X_scmmgpt"], generated.obsm["X_scmmgpt"]
        session.marks = nearest_places(session.places, *spaces)
        return session, session.map(), genes, save(generated, "generated.h5ad")

    def save(self, session: Session | None) -> tuple[Any]:
        """Write the cells with all results."""
        session = _with_cells(session)
        return (gr.update(value=save(session.adata, f"{session.name.split('.')[0]}_scmmgpt.h5ad"), visible=True),)


def _with_cells(session: Session | None) -> Session:
    if session is None:
        raise gr.Error(NO_CELLS)
    return session


def _shown(session: Session) -> tuple[Any, ...]:
    """A session, its map, the columns that can colour it, and that nothing is selected."""
    session.rows, session.chat = session.rows[:0], None
    choices = gr.Dropdown(choices=colors_of(session.adata.obs), value=session.color)
    return session, session.map(), choices, NO_SELECTION


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
        page = build(ScMMGPTPipeline.from_pretrained(model))
        look = gr.themes.Default(**FONTS)
        page.launch(server_name=args.host, server_port=args.port, max_file_size=MAX_SIZE, theme=look)

    return run_command("scmmgpt.app", serve, inputs=[args.model], extra="app")


if __name__ == "__main__":
    sys.exit(main())
