"""Outputs of a command: checks before the work; the result and its summary after the work."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmmgpt.commands.errors import reworded
from scmmgpt.commands.files import TABLES, check_file, check_folder, check_paths, check_results, table_suffix
from scmmgpt.commands.sources import Source, outputs_of


if TYPE_CHECKING:
    import anndata

Args = argparse.Namespace


def several_outputs(args: Args) -> dict[Source, Path]:
    """Return source -> output for a command that computes in partitions; empty for one file without `--workers`.

    For a single file, `args.file` becomes the path instead of a list.
    """
    files = args.file if isinstance(args.file, list) else [args.file]
    outputs = outputs_of(files, args.split, args.model, args.output)
    if len(outputs) > 1:
        check_folder(args.output)
        check_results([source.path for source in outputs], outputs.values())
        check_tables(args)
        return outputs
    args.file = next(iter(outputs)).path
    check_outputs(args)
    return outputs if args.workers or args.cluster else {}


def check_outputs(args: Args) -> None:
    """Refuse, before the work, outputs that cannot be written or would replace an input."""
    output = getattr(args, "output", None)
    if output is not None and output.suffix != ".h5ad":
        raise ValueError(f"--output is {str(output)!r}; its name must end in .h5ad.")
    check_tables(args)
    if output is not None:
        check_file(output)


def check_tables(args: Args) -> None:
    """Refuse outputs that would replace an input or each other, and tables that cannot be written."""
    tables = {f"--{name}": getattr(args, name, None) for name in ("table", "evidence", "proof")}
    for option, table in tables.items():
        if table is not None and table_suffix(table) not in TABLES:
            raise ValueError(f"{option} is {str(table)!r}; its name must end in .csv, .tsv or .txt.")
    if getattr(args, "columns", None) and args.table is None:
        raise ValueError("--columns are those of --table, which is not named. Name it; --output has all columns.")
    inputs = {name: getattr(args, name, None) for name in ("file", "model", "labels", "prompts_file", "genes_of")}
    named = {"FILE" if name == "file" else f"--{name.replace('_', '-')}": value for name, value in inputs.items()}
    check_paths(named, {"--output": getattr(args, "output", None), **tables})
    for table in filter(None, tables.values()):
        check_file(table)


def finish(
    args: Args,
    adata: "anndata.AnnData",
    summary: dict[str, Any],
    rows: Any = None,
    tables: Mapping[Path, Any] | None = None,
) -> None:
    """Write the result, the table (`rows`, or else the new columns of `obs`), further tables, and the summary."""
    from scmmgpt.commands.results import after, table_of, write_cells, write_table

    if hasattr(args, "identity"):
        adata.uns["scmmgpt"] = {**adata.uns.get("scmmgpt", {}), "model": args.identity}
    write_cells(adata, getattr(args, "file", args.output), args.output)
    with after([args.output]):
        for path, of_path in (tables or {}).items():
            write_table(path, of_path)
        if getattr(args, "table", None) is not None and rows is not None:
            write_table(args.table, rows)
        elif getattr(args, "table", None) is not None:
            table = table_of(adata, args.columns, short=args.command == "describe")
            write_table(args.table, table, index_label="barcode")
    write(args, {"output": str(args.output), **summary})


def write(args: Args, result: Any, lines: Iterable[str] | None = None) -> None:
    """Write a result to stdout, as JSON or as lines (default: one entry per line); logs and errors go to stderr."""
    if lines is None:
        lines = (f"{name}: {value}" for name, value in result.items())
    try:
        sys.stdout.write(reworded(json.dumps(result, indent=2) if args.json else "\n".join(lines)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
