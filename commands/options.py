"""Options of the commands of `scmmgpt`."""

import argparse
from pathlib import Path
from typing import Any

from scmmgpt.commands.errors import OneLineParser, number


FORMATS = "cells: .h5ad, .zarr, 10x .h5 or folder, .loom, .csv"
CELLS_PER_PARTITION = 16_384
CHECKPOINT_HELP = "folder, or model id on the Hub (default: the checkpoint of this package)"
READ_HELP = {
    "layer": "matrix to read: a layer, 'X' or 'raw' (default: the best matrix)",
    "assume": "kind of the matrix's values, if the verdict of `scmmgpt inspect` is wrong (for example log1p)",
    "gene_column": "column of var with gene symbols or Ensembl ids (default: the best column)",
    "organism": "organism of the cells (default: detected)",
}


def add_annotation(parser: argparse.ArgumentParser) -> None:
    """Options of `annotate`."""
    add_input(parser, count="+")
    add_output(parser)
    add_partitions(parser)
    text = "candidate labels; or a file: .txt (one per line), .csv/.tsv with label, text, cl_id, .json {label: text}"
    parser.add_argument(
        "--labels", nargs="+", action="extend", metavar="LABEL", help=f"{text} (default: labels of the checkpoint)"
    )
    text = "tissue, such as lung: restricts the candidates to labels of this tissue"
    parser.add_argument("--tissue", metavar="NAME", help=text)
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters; adds majority labels")
    parser.add_argument(
        "--min-score",
        type=number(float, 0, 1),
        metavar="P",
        help="cells of lower probability get a broader type or Unknown (default: from the checkpoint; 0: never)",
    )
    text = "add label sets that lack the true label in at most this share of cells (0.01 to 0.5)"
    parser.add_argument("--error-rate", type=number(float, 0, 1), metavar="P", help=text)
    text = "table of the genes behind each label"
    parser.add_argument("--evidence", type=Path, metavar="OUT.csv", help=text)
    parser.add_argument(
        "--matching-weight", type=number(float, 0, 1), metavar="W", help="0: similarity only .. 1: matching decides"
    )
    text = "read all cells first, and adapt labels without training cells to their most similar cells; "
    text += "--no-read-batch: annotate each cell alone (default: other cells of the file refine labels and novelty)"
    parser.add_argument("--read-batch", action=argparse.BooleanOptionalAction, help=text)


def add_description(parser: argparse.ArgumentParser) -> None:
    """Options of `describe`."""
    add_input(parser)
    add_output(parser)
    parser.add_argument("--prompt", help="a question about one cell (default: the prompt of training)")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), default=64, metavar="N", help="longest description (default: 64)"
    )
    text = "describe by counts instead of the language model; table of the genes and counts of every clause"
    parser.add_argument("--proof", type=Path, metavar="OUT.csv", help=text)
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters to describe (--proof)")
    parser.add_argument("--reference", action="store_true", help="also write a caption from obs, for comparison")
    parser.add_argument("--templates", default="default", metavar="NAME", help="caption templates (default: default)")
    parser.add_argument(
        "--num-beams", type=number(int, 1), default=1, metavar="N", help="width of beam search (default: 1, greedy)"
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Options of `chat`."""
    add_input(parser)
    text = "condition on columns of obs that selects the cells, e.g., 'leiden == \"3\"' (default: all cells)"
    parser.add_argument("--select", metavar="CONDITION", help=text)
    text = "questions (default: from standard input, one per line)"
    parser.add_argument("--ask", nargs="+", action="extend", metavar="QUESTION", help=text)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Options of `search`."""
    add_input(parser, count="?")
    add_partitions(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--text", help="description of the wanted cells")
    text = "names of cells of FILE; finds the most similar other cells of FILE, or of --index"
    wanted.add_argument("--like", nargs="+", action="extend", metavar="CELL", help=text)
    how = "score by similarity in the shared space, or by expression of the genes with the nearest texts"
    parser.add_argument("--by", choices=("similarity", "genes"), default="similarity", help=how)
    text = "search this index of `scmmgpt index`; FILE is then needed for --like only"
    parser.add_argument("--index", type=Path, metavar="FOLDER", help=text)
    parser.add_argument(
        "--where", metavar="CONDITION", help="condition on cells of the index, e.g., \"tissue == 'lung'\""
    )
    text = "file with every cell's score in obs['scmmgpt_search']"
    parser.add_argument("--output", "-o", type=Path, metavar="OUT.h5ad", help=text)
    parser.add_argument("--top-k", type=number(int, 1), default=10, metavar="K", help="number of hits (default: 10)")


def add_index(parser: argparse.ArgumentParser) -> None:
    """Options of `index`."""
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE", help="results of `scmmgpt embed`")
    text = "folder of the index; cells are added to an existing index"
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER", help=text)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    add_workers(parser)


def add_inspection(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("file", type=Path, metavar="FILE", help=FORMATS)
    text = "checkpoint with the vocabulary (default: all human genes)"
    parser.add_argument("--model", metavar="CHECKPOINT", help=text)
    text = "cells to convert (default: 20000)"
    parser.add_argument("--max-cells", type=number(int, 1), default=20_000, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_reading(parser)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="description of a cell")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="descriptions, one per line")
    parser.add_argument("--stored-labels", action="store_true", help="one prompt for each label of the checkpoint")
    add_model(parser)
    add_output(parser, table=False)
    parser.add_argument("--n-cells", type=number(int, 1), default=1, metavar="N", help="cells per prompt (default: 1)")
    genes = parser.add_mutually_exclusive_group()
    genes.add_argument(
        "--genes", nargs="+", action="extend", metavar="GENE", help="symbols, aliases or Ensembl ids (default: all)"
    )
    genes.add_argument("--genes-of", type=Path, metavar="FILE", help="use the genes of this file in the vocabulary")
    parser.add_argument(
        "--library-size",
        type=number(float, 0, above=True),
        metavar="N",
        help="counts of a sampled cell (default: as in training)",
    )
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the sampling (default: 0)")


def add_model(parser: argparse.ArgumentParser, required: bool = False, default: str | None = None) -> None:
    """Options of the checkpoint, and of summary and progress.

    Args:
        required: Whether `--model` is required.
        default: Description of the default, if it is not the checkpoint of the package.
    """
    text = "folder, or model id on the Hub" if required else CHECKPOINT_HELP
    text = text if default is None else f"folder, or model id on the Hub (default: {default})"
    parser.set_defaults(has_own_model=not required and default is None)
    add_checkpoint(parser, text, required)
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def add_checkpoint(parser: argparse.ArgumentParser, text: str = CHECKPOINT_HELP, required: bool = False) -> None:
    """Options of the checkpoint, its device and its batch size."""
    parser.add_argument("--model", required=required, metavar="CHECKPOINT", help=text)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    parser.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", help="cells per batch; lower it if memory runs out"
    )


def add_input(
    parser: argparse.ArgumentParser, split: str = "test", count: str | None = None, writes_model: bool = False
) -> None:
    """Options of the file of cells, the split, the checkpoint, and reading.

    Args:
        split: Default split of a corpus.
        count: `nargs` of argparse: None for one file, `"+"` for several files, `"?"` for at most one file.
        writes_model: Whether the command writes to the checkpoint, which is then required.
    """
    text = f"{FORMATS}, or a corpus{'; or folders of them' if count == '+' else ''}"
    parser.add_argument("file", type=Path, metavar="FILE", help=text, nargs=count)
    add_split(parser, split)
    add_model(parser, required=writes_model)
    add_reading(parser)


def add_split(parser: argparse.ArgumentParser, default: str = "test") -> None:
    """Option of the split of a corpus; `given_split` of the arguments is set if the user named a split."""
    text = "split of a corpus (default: %(default)s)"
    parser.add_argument("--split", default=default, action=GivenSplit, help=text)


class GivenSplit(argparse.Action):
    """Store a split as `split` and `given_split`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Store the split twice."""
        namespace.split = namespace.given_split = values


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options of reading the file of cells."""
    reading = parser.add_argument_group("reading", "how to read FILE; `scmmgpt inspect FILE` shows the choices made")
    for name, text in READ_HELP.items():
        reading.add_argument(f"--{name.replace('_', '-')}", metavar="NAME", help=text)
    reading.add_argument("--force", action="store_true", help="read FILE even if few genes match")


def add_output(parser: argparse.ArgumentParser, table: bool = True, columns: bool = True) -> None:
    """Options of the output files.

    Args:
        table: Whether the command has `--table`.
        columns: Whether the table has the new columns of `obs`; otherwise it ranks labels, clusters and cells.
    """
    parser.add_argument(
        "--output", "-o", type=Path, required=True, metavar="OUT.h5ad", help="file to write: cells with results"
    )
    if table:
        text = (
            "also write the added columns of obs as a table"
            if columns
            else "ranked table of labels, clusters and doubtful cells"
        )
        parser.add_argument("--table", type=Path, metavar="OUT.csv", help=text)
    if table and columns:
        text = "columns of obs to add to --table"
        parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="COLUMN", help=text)


def add_partitions(parser: argparse.ArgumentParser) -> None:
    """Options of workers and partitions."""
    group = add_workers(parser)
    text = f"most cells of a partition, a multiple of 4,096; does not change results (default: {CELLS_PER_PARTITION})"
    group.add_argument(
        "--cells-per-partition", type=number(int, 1), default=CELLS_PER_PARTITION, metavar="N", help=text
    )
    if isinstance(parser, OneLineParser):
        parser.rare |= {"cluster", "cells_per_partition", "matching_weight", "read_batch", "assume", "gene_column"}


def add_workers(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of workers; return their group."""
    group = parser.add_argument_group("many cells", "the same command continues a stopped run; see docs/scale.md")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--workers", type=number(int, 1), metavar="N", help="processes of this machine")
    where.add_argument("--cluster", metavar="ADDRESS", help="scheduler of a Dask cluster that sees the same folders")
    return group


def add_audit(parser: argparse.ArgumentParser) -> None:
    """Options of `audit`."""
    add_input(parser)
    add_output(parser, columns=False)
    add_partitions(parser)
    parser.add_argument("--label-key", default="cell_type", metavar="COLUMN", help="given labels (default: cell_type)")
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters, which are also ranked")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Options of `verify`."""
    parser.add_argument("file", type=Path, metavar="OUT.h5ad", help="result of a command")
    add_model(parser, default="the checkpoint in the receipt")
    text = "original input of the result (default: the cells in OUT.h5ad)"
    parser.add_argument("--input", type=Path, metavar="FILE", help=text)
    add_split(parser)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    parser.add_argument("file", type=Path, metavar="FILE", help=f"result of a command; or {FORMATS}")
    add_split(parser)
    add_model(parser, default="the checkpoint of this package, for cells without results")
    add_reading(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.html", help="page to write")
    parser.add_argument("--label-key", metavar="COLUMN", help="column of obs with given labels, for comparison")
    parser.add_argument(
        "--cluster-key", metavar="COLUMN", help="column of obs with clusters, for cells without results"
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add_input(parser)
    verbs = ("annotate", "audit", "embed", "search")
    parser.add_argument("--verb", choices=verbs, default="annotate", help="command (default: annotate)")
    text = "given labels, for audit (default: cell_type)"
    parser.add_argument("--label-key", default="cell_type", metavar="COLUMN", help=text)
    parser.add_argument("--text", default="a T cell", help="description of the wanted cells, for search")
    parser.add_argument("--cells", type=number(int, 1), metavar="N", help="number of cells (default: as in FILE)")
    text = "numbers of processes or GPUs (default: 1, and the number of cores)"
    parser.add_argument("--workers", type=number(int, 1), nargs="+", metavar="N", help=text)
    text = "seconds of measurement (default: 20)"
    parser.add_argument("--seconds", type=number(float, 0, above=True), default=20.0, metavar="S", help=text)


def add_mcp(parser: argparse.ArgumentParser) -> None:
    """Options of `mcp`."""
    text = "folder of the files that an agent may read and add to"
    parser.add_argument("--folder", type=Path, required=True, metavar="FOLDER", help=text)
    add_checkpoint(parser)
