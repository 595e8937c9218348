"""Options of the commands of `scmmgpt`: groups that several commands share, and the options of each command."""

import argparse
from pathlib import Path
from typing import Any

from scmmgpt.commands.errors import OneLineParser, number


FORMATS = "cells: .h5ad, .zarr, 10x .h5 or folder, .loom, .csv"
CELLS_PER_PARTITION = 16_384
CHECKPOINT_HELP = "folder, or Hub model id (default: of this package)"
READ_HELP = {
    "layer": "matrix to read: a layer, 'X' or 'raw' (default: the best one found)",
    "assume": "kind of the values, such as log1p, if the verdict of `scmmgpt inspect` is wrong",
    "gene_column": "column of var with gene symbols or Ensembl ids (default: the best one found)",
    "organism": "organism of the cells (default: detected)",
}


def add_annotation(parser: argparse.ArgumentParser) -> None:
    """Options of `annotate`."""
    add_input(parser, count="+")
    add_output(parser)
    add_partitions(parser)
    text = "candidate labels; or a file: .txt (a label a line), .csv/.tsv (label, text, cl_id), .json ({label: text})"
    parser.add_argument(
        "--labels", nargs="+", action="extend", metavar="LABEL", help=f"{text} (default: the labels of the checkpoint)"
    )
    text = "choose from the labels of this tissue, such as lung"
    parser.add_argument("--tissue", metavar="NAME", help=text)
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of clusters; adds the majority label of each")
    parser.add_argument(
        "--min-score",
        type=number(float, 0, 1),
        metavar="P",
        help="cells with a lower score get a broader type or Unknown (default: of the checkpoint; 0: never)",
    )
    text = "add sets of labels that lack the true label in this share of cells (0.01 to 0.5)"
    parser.add_argument("--error-rate", type=number(float, 0, 1), metavar="P", help=text)
    text = "table to write: the genes behind each label"
    parser.add_argument("--evidence", type=Path, metavar="OUT.csv", help=text)
    parser.add_argument(
        "--matching-weight",
        type=number(float, 0, 1),
        metavar="W",
        help="weight of the matching head: 0 (similarity alone) to 1",
    )
    text = "also use all cells to correct labels that were never trained; --no-read-batch: judge each cell alone "
    text += "(default: other cells of the file refine labels and novelty)"
    parser.add_argument("--read-batch", action=argparse.BooleanOptionalAction, help=text)


def add_description(parser: argparse.ArgumentParser) -> None:
    """Options of `describe`."""
    add_input(parser)
    add_output(parser)
    parser.add_argument("--prompt", help="question about the cell (default: the prompt of training)")
    parser.add_argument(
        "--max-new-tokens",
        type=number(int, 1),
        default=64,
        metavar="N",
        help="most tokens of a description (default: 64)",
    )
    text = "describe by counts, without the language model; table to write: genes and counts of each clause"
    parser.add_argument("--proof", type=Path, metavar="OUT.csv", help=text)
    parser.add_argument(
        "--cluster-key", metavar="COLUMN", help="column of obs with clusters to describe, with --proof"
    )
    parser.add_argument("--reference", action="store_true", help="also write a caption from obs, for comparison")
    parser.add_argument("--templates", default="default", metavar="NAME", help="caption templates (default: default)")
    parser.add_argument(
        "--num-beams", type=number(int, 1), default=1, metavar="N", help="beams of the search (default: 1, greedy)"
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Options of `chat`."""
    add_input(parser)
    text = "selection by columns of obs, such as 'leiden == \"3\"' (default: all cells); compared with all other cells"
    parser.add_argument("--select", metavar="CONDITION", help=text)
    text = "questions (default: the lines of standard input)"
    parser.add_argument("--ask", nargs="+", action="extend", metavar="QUESTION", help=text)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Options of `search`."""
    add_input(parser, count="?")
    add_partitions(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--text", help="description of the wanted cells")
    text = "names of cells of FILE; finds similar cells of FILE, or of --index"
    wanted.add_argument("--like", nargs="+", action="extend", metavar="CELL", help=text)
    how = "score by similarity in the shared space, or by the expression of genes with similar texts"
    parser.add_argument("--by", choices=("similarity", "genes"), default="similarity", help=how)
    text = "search this index of `scmmgpt index` in place of FILE; FILE is then needed for --like alone"
    parser.add_argument("--index", type=Path, metavar="FOLDER", help=text)
    parser.add_argument(
        "--where", metavar="CONDITION", help="search only cells of the index with, for instance, \"tissue == 'lung'\""
    )
    text = "file to write: all cells, with scores in obs['scmmgpt_search']"
    parser.add_argument("--output", "-o", type=Path, metavar="OUT.h5ad", help=text)
    parser.add_argument("--top-k", type=number(int, 1), default=10, metavar="K", help="number of hits (default: 10)")


def add_index(parser: argparse.ArgumentParser) -> None:
    """Options of `index`."""
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE", help="results of `scmmgpt embed`")
    text = "folder of the index; an existing index gets the new cells"
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER", help=text)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    add_workers(parser)


def add_inspection(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("file", type=Path, metavar="FILE", help=FORMATS)
    text = "checkpoint whose genes are matched (default: all human genes)"
    parser.add_argument("--model", metavar="CHECKPOINT", help=text)
    text = "cells to convert (default: 20000)"
    parser.add_argument("--max-cells", type=number(int, 1), default=20_000, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_reading(parser)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="description of a cell")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="file of descriptions, one a line")
    parser.add_argument("--stored-labels", action="store_true", help="use one prompt for each label of the checkpoint")
    add_model(parser)
    add_output(parser, table=False)
    parser.add_argument("--n-cells", type=number(int, 1), default=1, metavar="N", help="cells per prompt (default: 1)")
    genes = parser.add_mutually_exclusive_group()
    genes.add_argument(
        "--genes", nargs="+", action="extend", metavar="GENE", help="symbols, aliases or Ensembl ids (default: all)"
    )
    genes.add_argument("--genes-of", type=Path, metavar="FILE", help="the genes of this file")
    parser.add_argument(
        "--library-size",
        type=number(float, 0, above=True),
        metavar="N",
        help="total counts of a generated cell (default: as in training)",
    )
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of all draws (default: 0)")


def add_model(parser: argparse.ArgumentParser, required: bool = False, default: str | None = None) -> None:
    """Options of the checkpoint and of the output; `default` is in words, if not the checkpoint of the package."""
    text = "folder, or model id on the Hub" if required else CHECKPOINT_HELP
    text = text if default is None else f"folder, or model id on the Hub (default: {default})"
    parser.set_defaults(has_own_model=not required and default is None)
    add_checkpoint(parser, text, required)
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def add_checkpoint(parser: argparse.ArgumentParser, text: str = CHECKPOINT_HELP, required: bool = False) -> None:
    """The checkpoint, its device and its batch size."""
    parser.add_argument("--model", required=required, metavar="CHECKPOINT", help=text)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    parser.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", help="cells per batch; use a lower number if memory runs out"
    )


def add_input(
    parser: argparse.ArgumentParser, split: str = "test", count: str | None = None, writes_model: bool = False
) -> None:
    """The file of cells, the split, the model, and the options of reading.

    `count` is the `nargs` of argparse: `None` for one file, `"+"` for several files, `"?"` for at most one file.
    """
    text = f"{FORMATS}, or a corpus{'; or folders of them' if count == '+' else ''}"
    parser.add_argument("file", type=Path, metavar="FILE", help=text, nargs=count)
    add_split(parser, split)
    add_model(parser, required=writes_model)
    add_reading(parser)


def add_split(parser: argparse.ArgumentParser, default: str = "test") -> None:
    """The split of a corpus; `given_split` of the arguments is the split that a user named."""
    text = "split of a corpus (default: %(default)s)"
    parser.add_argument("--split", default=default, action=GivenSplit, help=text)


class GivenSplit(argparse.Action):
    """Store a split, and that it was named."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Store both."""
        namespace.split = namespace.given_split = values


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options of reading the file of cells."""
    reading = parser.add_argument_group("reading", "how to read FILE; `scmmgpt inspect FILE` shows the choices made")
    for name, text in READ_HELP.items():
        reading.add_argument(f"--{name.replace('_', '-')}", metavar="NAME", help=text)
    reading.add_argument("--force", action="store_true", help="read FILE even if few genes match")


def add_output(parser: argparse.ArgumentParser, table: bool = True, columns: bool = True) -> None:
    """Files of the result."""
    parser.add_argument(
        "--output", "-o", type=Path, required=True, metavar="OUT.h5ad", help="file to write: the cells with results"
    )
    if table:
        text = (
            "table to write: the added columns of obs"
            if columns
            else "table to write: labels, clusters and doubtful cells, ranked"
        )
        parser.add_argument("--table", type=Path, metavar="OUT.csv", help=text)
    if table and columns:
        text = "further columns of obs for --table"
        parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="COLUMN", help=text)


def add_partitions(parser: argparse.ArgumentParser) -> None:
    """Options for many cells: workers and partitions."""
    group = add_workers(parser)
    text = f"cells of a partition, in steps of 4,096; no result depends on it (default: {CELLS_PER_PARTITION})"
    group.add_argument(
        "--cells-per-partition", type=number(int, 1), default=CELLS_PER_PARTITION, metavar="N", help=text
    )
    if isinstance(parser, OneLineParser):
        parser.rare |= {"cluster", "cells_per_partition", "matching_weight", "read_batch", "assume", "gene_column"}


def add_workers(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of workers."""
    group = parser.add_argument_group("many cells", "a second run continues a stopped run; see docs/scale.md")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--workers", type=number(int, 1), metavar="N", help="processes of this machine")
    where.add_argument("--cluster", metavar="ADDRESS", help="scheduler of a Dask cluster that sees the same folders")
    return group


def add_audit(parser: argparse.ArgumentParser) -> None:
    """Options of `audit`."""
    add_input(parser)
    add_output(parser, columns=False)
    add_partitions(parser)
    parser.add_argument(
        "--label-key", default="cell_type", metavar="COLUMN", help="column with given labels (default: cell_type)"
    )
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters; ranks clusters, too")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Options of `verify`."""
    parser.add_argument("file", type=Path, metavar="OUT.h5ad", help="result of a command")
    add_model(parser, default="the checkpoint of the receipt")
    text = "file that the result was computed from (default: the cells in OUT.h5ad)"
    parser.add_argument("--input", type=Path, metavar="FILE", help=text)
    add_split(parser)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    parser.add_argument("file", type=Path, metavar="FILE", help=f"result of a command; or {FORMATS}")
    add_split(parser)
    add_model(parser, default="the checkpoint of this package; only cells without results need a checkpoint")
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
    parser.add_argument("--verb", choices=verbs, default="annotate", help="command to plan (default: annotate)")
    text = "column of obs with given labels, with --verb audit (default: cell_type)"
    parser.add_argument("--label-key", default="cell_type", metavar="COLUMN", help=text)
    parser.add_argument("--text", default="a T cell", help="text to search for, with --verb search")
    parser.add_argument(
        "--cells", type=number(int, 1), metavar="N", help="number of cells to plan for (default: the cells of FILE)"
    )
    text = "numbers of processes or GPUs to plan for (default: 1, and the number of cores)"
    parser.add_argument("--workers", type=number(int, 1), nargs="+", metavar="N", help=text)
    text = "seconds of measurement (default: 20)"
    parser.add_argument("--seconds", type=number(float, 0, above=True), default=20.0, metavar="S", help=text)


def add_mcp(parser: argparse.ArgumentParser) -> None:
    """Options of `mcp`."""
    text = "folder in which an agent may read files and write new files"
    parser.add_argument("--folder", type=Path, required=True, metavar="FOLDER", help=text)
    add_checkpoint(parser)
