"""A web page on this machine with the tasks of the pipeline: annotate, search, describe and generate cells.

    python -m scmmgpt.app CHECKPOINT            # serves http://127.0.0.1:7860; nothing leaves the machine

In a Hugging Face Space, which passes no argument, the environment variable `SCMMGPT_MODEL` names the checkpoint. Needs
the extra `app`.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd


try:
    import gradio as gr
except ModuleNotFoundError as error:
    message = "The page needs gradio; install it with `pip install scmmgpt[app]`."
    if __name__ == "__main__":
        sys.exit(f"scmmgpt.app: {message}")
    raise ModuleNotFoundError(message, name="gradio") from error

from scmmgpt.checkpoints import check_checkpoint
from scmmgpt.errors import OneLineParser, number, run_command
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline


SHOWN_ROWS = 50  # cells in a table; the file to download has all


def read(path: str | None) -> anndata.AnnData:
    """Load an uploaded file."""
    if not path:
        raise gr.Error("Choose a file of cells first.")
    try:
        return anndata.read_h5ad(path)
    except (OSError, ValueError) as error:
        raise gr.Error(f"{Path(path).name} can't be read as .h5ad: {error}") from None


def save(adata: anndata.AnnData, name: str) -> str:
    """Write a file to download into a new folder."""
    path = Path(tempfile.mkdtemp(prefix="scmmgpt-"), name)
    adata.write_h5ad(path)
    return str(path)


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the pipeline's errors about an input in the browser."""

    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error)) from None

    return run


def build(pipeline: ScMMGPTPipeline) -> gr.Blocks:
    """The page for one checkpoint."""

    @task
    def annotate(path: str | None, labels: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
        adata = read(path)
        names = [label.strip() for label in labels.split(",") if label.strip()]
        pipeline.annotate(adata, names or None)
        columns = ["scmmgpt_cell_type", "scmmgpt_score", "scmmgpt_entropy"]
        counts = adata.obs["scmmgpt_cell_type"].value_counts().rename_axis("cell type").reset_index(name="cells")
        file = save(adata, f"{Path(path or '').stem}_annotated.h5ad")
        return counts[counts["cells"] > 0], rows_of(adata, columns), file

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

    cell_file = {"label": "Cells (.h5ad)", "file_types": [".h5ad"], "type": "filepath"}
    with gr.Blocks(title="scMMGPT") as page:
        gr.Markdown("# scMMGPT\nSingle cells to text and back. Files stay on the machine that runs this page.")
        with gr.Tab("Annotate"):
            path = gr.File(**cell_file)
            labels = gr.Textbox(label="Candidate cell types, separated by commas; the checkpoint's own if empty")
            button = gr.Button("Annotate", variant="primary")
            tables = [gr.Dataframe(label="Cells per type"), gr.Dataframe(label="First cells")]
            outputs = [*tables, gr.File(label="Result")]
            button.click(annotate, [path, labels], outputs, api_name="annotate")
        with gr.Tab("Search"):
            path = gr.File(**cell_file)
            text = gr.Textbox(label="Description of the wanted cells", placeholder="a cytotoxic lymphocyte")
            top_k = gr.Slider(1, 100, value=10, step=1, label="Cells")
            button = gr.Button("Search", variant="primary")
            button.click(search, [path, text, top_k], gr.Dataframe(label="Best matches"), api_name="search")
        if hasattr(pipeline.model, "generate_cells"):  # not in stage 1, which has no language model
            with gr.Tab("Describe"):
                path = gr.File(**cell_file)
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
    parser.add_argument("model", nargs="?", default=os.environ.get("SCMMGPT_MODEL"), help="folder, or id on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for a whole network")
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860, help="port to listen on (default: 7860)")
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("no checkpoint given; name one, or set SCMMGPT_MODEL.")

    def serve() -> None:
        check_checkpoint(args.model)
        build(ScMMGPTPipeline.from_pretrained(args.model)).launch(server_name=args.host, server_port=args.port)

    return run_command("scmmgpt.app", serve, inputs=[args.model], extra="app")


if __name__ == "__main__":
    sys.exit(main())
