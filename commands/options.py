"""Options that several commands of `scmmgpt` share, or that one has many of."""

import argparse
from pathlib import Path
from typing import Any

from scmmgpt.commands.errors import OneLineParser, number


FORMATS = "cells: .h5ad, .zarr, 10x .h5 or folder, .loom, .csv"
CELLS_PER_PARTITION = 16_384
CHECKPOINT_HELP = "folder, or model id on the Hub (default: that of this package)"
READ_HELP = {
    "layer": "matrix to read: a layer, 'X' or 'raw' (default: the best one found)",
    "assume": "kind of the matrix's values, where the verdict of `scmmgpt inspect` is wrong (for instance log1p)",
    "gene_column": "column of var with gene symbols or Ensembl ids (default: the best one found)",
    "organism": "organism of the cells (default: detected)",
}


def add_annotation(parser: argparse.ArgumentParser) -> None:
    """Options of `annotate`."""
    add_input(parser, count="+")
    add_output(parser)
    add_partitions(parser)
    text = "candidate labels; or a file: .txt, a label a line; .csv/.tsv with label, text, cl_id; .json {label: text}"
    parser.add_argument(
        "--labels", nargs="+", action="extend", metavar="LABEL", help=f"{text} (default: those of the checkpoint)"
    )
    text = "choose from the labels of this tissue, such as lung"
    parser.add_argument("--tissue", metavar="NAME", help=text)
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters: adds majority labels")
    parser.add_argument(
        "--min-score",
        type=number(float, 0, 1),
        metavar="P",
        help="cells of a lower probability get a broader type or Unknown (default: of the checkpoint; 0: never)",
    )
    text = "add the labels that together hold the true one, except in this share of cells (0.01 to 0.5)"
    parser.add_argument("--error-rate", type=number(float, 0, 1), metavar="P", help=text)
    text = "table of the genes that drove each label"
    parser.add_argument("--evidence", type=Path, metavar="OUT.csv", help=text)
    parser.add_argument(
        "--matching-weight", type=number(float, 0, 1), metavar="W", help="0 = similarity alone .. 1 = matching decides"
    )
    text = "look at all cells first, and correct labels that were never trained by the cells most like them; "
    text += "--no-read-batch: judge each cell alone (default: other cells of the file refine labels and novelty)"
    parser.add_argument("--read-batch", action=argparse.BooleanOptionalAction, help=text)


def add_description(parser: argparse.ArgumentParser) -> None:
    """Options of `describe`."""
    add_input(parser)
    add_output(parser)
    parser.add_argument("--prompt", help="a question about one cell (default: the prompt of training)")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), default=64, metavar="N", help="longest description (default: 64)"
    )
    text = "describe by counts, in place of the language model, and write the genes and counts of every clause"
    parser.add_argument("--proof", type=Path, metavar="OUT.csv", help=text)
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters to describe (--proof)")
    parser.add_argument("--reference", action="store_true", help="also write a caption from obs, to compare")
    parser.add_argument("--templates", default="default", metavar="NAME", help="caption templates (default: default)")
    parser.add_argument(
        "--num-beams", type=number(int, 1), default=1, metavar="N", help="beams of the search (default: 1, greedy)"
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Options of `chat`."""
    add_input(parser)
    text = "the cells, by columns of obs, e.g., 'leiden == \"3\"' (default: all); the others are compared with them"
    parser.add_argument("--select", metavar="CONDITION", help=text)
    text = "questions (default: a line of standard input each)"
    parser.add_argument("--ask", nargs="+", action="extend", metavar="QUESTION", help=text)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Options of `search`."""
    add_input(parser, count="?")
    add_partitions(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--text", help="description of the wanted cells")
    text = "names of cells of FILE that the wanted cells are like; with --index, the others of the index"
    wanted.add_argument("--like", nargs="+", action="extend", metavar="CELL", help=text)
    how = "score by similarity in the shared space, or by expression of the genes whose texts are nearest"
    parser.add_argument("--by", choices=("similarity", "genes"), default="similarity", help=how)
    text = "search an index of `scmmgpt index` in place of FILE, which then has the cells of --like alone"
    parser.add_argument("--index", type=Path, metavar="FOLDER", help=text)
    parser.add_argument(
        "--where", metavar="CONDITION", help="search cells of the index with, e.g., \"tissue == 'lung'\""
    )
    text = "file with every cell's score in obs['scmmgpt_search']"
    parser.add_argument("--output", "-o", type=Path, metavar="OUT.h5ad", help=text)
    parser.add_argument("--top-k", type=number(int, 1), default=10, metavar="K", help="number of hits (default: 10)")


def add_index(parser: argparse.ArgumentParser) -> None:
    """Options of `index`."""
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE", help="results of `scmmgpt embed`")
    text = "folder of the index; cells are added to one that exists"
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
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="descriptions, one a line")
    parser.add_argument("--stored-labels", action="store_true", help="one prompt for each label of the checkpoint")
    add_model(parser)
    add_output(parser, table=False)
    parser.add_argument("--n-cells", type=number(int, 1), default=1, metavar="N", help="cells per prompt (default: 1)")
    genes = parser.add_mutually_exclusive_group()
    genes.add_argument(
        "--genes", nargs="+", action="extend", metavar="GENE", help="symbols, aliases or Ensembl ids (default: all)"
    )
    genes.add_argument("--genes-of", type=Path, metavar="FILE", help="genes of this file in the vocabulary")
    parser.add_argument(
        "--library-size",
        type=number(float, 0, above=True),
        metavar="N",
        help="counts of a sampled cell (default: of training)",
    )
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the sampling (default: 0)")


def add_model(parser: argparse.ArgumentParser, required: bool = False, default: str | None = None) -> None:
    """Options of the checkpoint and of how it runs; `default` in words, if it is not that of the package."""
    text = "folder, or model id on the Hub" if required else CHECKPOINT_HELP
    text = text if default is None else f"folder, or model id on the Hub (default: {default})"
    parser.set_defaults(has_own_model=not required and default is None)
    add_checkpoint(parser, text, required)
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def add_checkpoint(parser: argparse.ArgumentParser, text: str = CHECKPOINT_HELP, required: bool = False) -> None:
    """The checkpoint, and where and in which batches it runs."""
    parser.add_argument("--model", required=required, metavar="CHECKPOINT", help=text)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    parser.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", help="cells per batch; lower it if memory runs out"
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
    """The split of a corpus; `given_split` of the arguments is the one that a user named."""
    text = "split of a corpus (default: %(default)s)"
    parser.add_argument("--split", default=default, action=GivenSplit, help=text)


class GivenSplit(argparse.Action):
    """Store a split, and that it was named."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Store both."""
        namespace.split = namespace.given_split = values


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How to read the file of cells."""
    reading = parser.add_argument_group("reading", "how to read FILE; `scmmgpt inspect FILE` shows the choices made")
    for name, text in READ_HELP.items():
        reading.add_argument(f"--{name.replace('_', '-')}", metavar="NAME", help=text)
    reading.add_argument("--force", action="store_true", help="read FILE even if few genes match")


def add_output(parser: argparse.ArgumentParser, table: bool = True, columns: bool = True) -> None:
    """Files of the result."""
    parser.add_argument(
        "--output", "-o", type=Path, required=True, metavar="OUT.h5ad", help="file to write: cells with results"
    )
    if table:
        text = (
            "also write the added columns of obs as a table"
            if columns
            else "table of labels, clusters and doubtful cells, ranked"
        )
        parser.add_argument("--table", type=Path, metavar="OUT.csv", help=text)
    if table and columns:
        text = "columns of obs to add to --table"
        parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="COLUMN", help=text)


def add_partitions(parser: argparse.ArgumentParser) -> None:
    """Where the work is done, for many cells, and in which parts."""
    group = add_workers(parser)
    text = f"most cells of a partition, in steps of 4,096; changes no result (default: {CELLS_PER_PARTITION})"
    group.add_argument(
        "--cells-per-partition", type=number(int, 1), default=CELLS_PER_PARTITION, metavar="N", help=text
    )
    if isinstance(parser, OneLineParser):
        parser.rare |= {"cluster", "cells_per_partition", "matching_weight", "read_batch", "assume", "gene_column"}


def add_workers(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where the work is done."""
    group = parser.add_argument_group("many cells", "a second run goes on where one stopped; see docs/scale.md")
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
    parser.add_argument("--cluster-key", metavar="COLUMN", help="column of obs with clusters, to rank them too")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Options of `verify`."""
    parser.add_argument("file", type=Path, metavar="OUT.h5ad", help="result of a command")
    add_model(parser, default="the one that the receipt names")
    text = "cells that the result was computed from (default: those in OUT.h5ad)"
    parser.add_argument("--input", type=Path, metavar="FILE", help=text)
    add_split(parser)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    parser.add_argument("file", type=Path, metavar="FILE", help=f"result of a command; or {FORMATS}")
    add_split(parser)
    add_model(parser, default="that of this package, for cells without results")
    add_reading(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.html", help="page to write")
    parser.add_argument("--label-key", metavar="COLUMN", help="column of obs with given labels, to compare")
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
    parser.add_argument("--cells", type=number(int, 1), metavar="N", help="cells to plan for (default: those of FILE)")
    text = "processes or GPUs (default: 1, and the cores)"
    parser.add_argument("--workers", type=number(int, 1), nargs="+", metavar="N", help=text)
    text = "time to measure for (default: 20)"
    parser.add_argument("--seconds", type=number(float, 0, above=True), default=20.0, metavar="S", help=text)


def add_mcp(parser: argparse.ArgumentParser) -> None:
    """Options of `mcp`."""
    text = "folder of the files that an agent may read and add to"
    parser.add_argument("--folder", type=Path, required=True, metavar="FOLDER", help=text)
    add_checkpoint(parser)
