"""A web page on this machine with the tasks of the pipeline: annotate, search, describe and generate cells.

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from scmmgpt.commands.checkpoints import check_checkpoint, root_checkpoint
from scmmgpt.commands.errors import OneLineParser, number, run_command
from scmmgpt.commands.writing import make_writable
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file


# Before the import: gradio looks up addresses on the internet at start. Nothing leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
gr: Any = None  # the extra `app` is not installed
with suppress(ModuleNotFoundError):
    import gradio as gr


NO_GRADIO = "The page needs gradio; install it with `pip install scmmgpt[app]`."
SHOWN_ROWS = 50  # cells in a table; the file to download has all
FILE_TYPES = [".h5ad", ".h5", ".h5mu", ".loom", ".csv", ".tsv", ".txt", ".gz"]
ANNOTATED = ["scmmgpt_cell_type", "scmmgpt_score", "scmmgpt_entropy"]
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


def read(path: str | None) -> anndata.AnnData:
    """Load an uploaded file."""
    if not path:
        raise gr.Error("Choose a file of cells first.")
    return read_file(path)


def save(adata: anndata.AnnData, name: str) -> str:
    """Write a file to download into a new folder."""
    path = Path(tempfile.mkdtemp(prefix="scmmgpt-"), name)
    make_writable(adata)
    adata.write_h5ad(path)
    return str(path)


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the warnings of a task, and its errors about an input, in the browser.

    An uploaded file goes by its name there, not by the folder that it was uploaded to.
    """

    @functools.wraps(function)  # the names of the parameters are those of the page's API
    def run(*args: Any) -> Any:
        folders = {f"{Path(arg).parent}{os.sep}" for arg in args if isinstance(arg, str) and os.path.isabs(arg)}

        def shown(message: object) -> str:
            text = " ".join(str(message).split())
            return functools.reduce(lambda text, folder: text.replace(folder, ""), folders, text)

        with Warnings() as warnings:
            try:
                return function(*args)
            except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
                raise gr.Error(shown(error)) from None
            finally:
                for message in dict.fromkeys(warnings.messages):
                    gr.Warning(shown(message), duration=None)

    return run


def build(pipeline: ScMMGPTPipeline) -> Any:
    """The page for one checkpoint, a `gradio.Blocks`."""

    @task
    def annotate(path: str | None, labels: str, min_score: float) -> tuple[pd.DataFrame, pd.DataFrame, str]:
        adata = read(path)
        names = [label.strip() for label in labels.splitlines() if label.strip()]
        pipeline.annotate(adata, names or None, min_score=min_score or None)
        counts = adata.obs["scmmgpt_cell_type"].value_counts().rename_axis("cell type").reset_index(name="cells")
        file = save(adata, f"{Path(path or '').stem}_annotated.h5ad")
        return counts[counts["cells"] > 0], rows_of(adata, ANNOTATED), file

    @task
    def describe(path: str | None, n_cells: int, question: str) -> pd.DataFrame:
        adata = read(path)[: int(n_cells)].copy()
        pipeline.describe(adata, question.strip() or None)
        return rows_of(adata, ["scmmgpt_description"])

    @task
    def search(path: str | None, text: str, top_k: int) -> pd.DataFrame:
        return pd.DataFrame(pipeline.search(read(path), text, top_k=int(top_k)))

    @task
    def generate(prompt: str, n_cells: int) -> tuple[pd.DataFrame, str]:
        adata = pipeline.generate(prompt, int(n_cells))
        mean = np.asarray(adata.X.mean(axis=0)).ravel()
        top = np.argsort(-mean)[:30]
        genes = pd.DataFrame({"gene": adata.var_names[top], "mean log1p(CP10k)": mean[top].round(3)})
        return genes, save(adata, "generated.h5ad")

    known = list((pipeline.model.config.annotation or {}).get("labels", {}))
    examples = f" It knows {', '.join(known[:3])}{', ...' if len(known) > 3 else ''}" if known else ""
    with gr.Blocks(title="scMMGPT", analytics_enabled=False) as page:
        gr.Markdown("# scMMGPT\nSingle cells to text and back. Files stay on the machine that runs this page.")
        path = gr.File(label=f"Cells ({', '.join(FILE_TYPES)})", file_types=FILE_TYPES, type="filepath")
        with gr.Tab("Annotate"):
            text = f"Candidate cell types, one a line; those of the checkpoint if empty.{examples}"
            labels = gr.Textbox(label=text, lines=4)
            min_score = gr.Slider(
                0, 1, value=0, step=0.05, label="Least score; cells below get a broader type or none"
            )
            button = gr.Button("Annotate", variant="primary")
            counts = gr.Dataframe(label="Cells per type", headers=["cell type", "cells"])
            first = gr.Dataframe(label="First cells", headers=["cell", *ANNOTATED])
            outputs = [counts, first, gr.File(label="Result")]
            button.click(annotate, [path, labels, min_score], outputs, api_name="annotate")
        with gr.Tab("Search"):
            text = gr.Textbox(label="Description of the wanted cells", placeholder="a cytotoxic lymphocyte")
            top_k = gr.Slider(1, 100, value=10, step=1, label="Cells")
            button = gr.Button("Search", variant="primary")
            button.click(search, [path, text, top_k], gr.Dataframe(label="Best matches"), api_name="search")
        if hasattr(pipeline.model, "generate_cells"):  # not in stage 1, which has no language model
            with gr.Tab("Describe"):
                n_cells = gr.Slider(1, SHOWN_ROWS, value=8, step=1, label="Number of cells, from the first")
                question = gr.Textbox(label="Question about a cell; the prompt of training if empty")
                button = gr.Button("Describe", variant="primary")
                table = gr.Dataframe(label="Descriptions", wrap=True)
                button.click(describe, [path, n_cells, question], table, api_name="describe")
            with gr.Tab("Generate"):
                prompt = gr.Textbox(label="Description", placeholder="A B cell from blood.")
                n_cells = gr.Slider(1, 1000, value=20, step=1, label="Cells")
                button = gr.Button("Generate", variant="primary")
                outputs = [gr.Dataframe(label="Highest genes"), gr.File(label="Generated cells")]
                button.click(generate, [prompt, n_cells], outputs, api_name="generate")
    return page


def rows_of(adata: anndata.AnnData, columns: list[str]) -> pd.DataFrame:
    """The first cells with some columns of `obs`, as a table to show."""
    return adata.obs[columns].head(SHOWN_ROWS).rename_axis("cell").reset_index()


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
        page.launch(server_name=args.host, server_port=args.port, theme=gr.themes.Default(**FONTS))

    return run_command("scmmgpt.app", serve, inputs=[args.model], extra="app")


if __name__ == "__main__":
    sys.exit(main())
