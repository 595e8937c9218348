"""What is in a file of cells, can it be used, and what will be done with it.

    scmmgpt inspect cells.h5ad
    scmmgpt inspect filtered_feature_bc_matrix/ --model CHECKPOINT --json

The same checks run inside every command; here they only report. Exit status 0: usable; 2: not.

What each input gets:

| input                                                | verdict                | what is done                        |
| ---------------------------------------------------- | ---------------------- | ----------------------------------- |
| integer counts                                       | `raw_integer`          | taken                               |
| SoupX, CellBender, Salmon: nearly integers           | `raw_float`            | rounded, with a warning             |
| CP10k, CPM, any total, of UMI counts                 | `normalized`, exact    | integer counts recovered            |
| TPM, imputed, batch-corrected, without negatives     | `normalized`           | taken as they are                   |
| log1p (base e, 2 or 10) of normalised UMI counts     | `log1p`, exact         | integer counts recovered            |
| log1p of the counts themselves                       | `log1p`, exact         | integer counts recovered            |
| log1p of TPM or of corrected values                  | `log1p`                | logarithm undone, with a warning    |
| log1p taken twice                                    | `log1p_log1p`          | both undone, with a warning         |
| fractions of unclear scale                           | `unknown`              | taken as they are, with a warning   |
| only 0 and 1                                         | `raw_integer`, binary  | taken, with a warning               |
| scaled (negative values)                             | `scaled`               | refused if there is no other matrix |
| NaN or infinite values                               | `invalid`              | refused, cell and gene named        |
| no value above zero                                  | `empty`                | refused                             |
| no cells, or no variables                            |                        | refused                             |
| genes by symbol, old symbol, Ensembl id, a mixture   | how many by which      | matched; duplicates summed          |
| under 60 % of the genes matched                      | the largest unmatched  | warning                             |
| under 20 % matched, or under 20 genes                | the same, a way out    | refused, unless `--force`           |
| mouse, macaque or pig genes                          | the species, and why   | one-to-one orthologs, a warning     |
| another species than the file says                   | both                   | warning                             |
| species without an ortholog table                    | the species, and why   | refused where names do not match    |
| antibodies, peaks, spike-ins, control probes         | how many of each       | set aside, never read as genes      |
| nothing but antibodies or peaks                      | how many of each       | refused                             |
| human and mouse mapped together                      | `mouse genome`         | mouse genes set aside               |
| a panel of few genes (Xenium, MERFISH)               | how many were measured | the others are absent, not zero     |
| cells without any gene of the vocabulary             | how many               | kept, empty, with a warning         |
| the same barcode twice                               | how many, an example   | warning                             |
| one label for all cells                              | the label              | warning                             |
| a missing, empty, truncated or foreign file          |                        | one error that says which           |
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scmmgpt.genes_scmmgpt import GeneIndex, detect_species
from scmmgpt.readers import CellFile, DiskRows, read_file
from scmmgpt.reading_scmmgpt import (
    ASSUMABLE,
    check_labels,
    choose_input,
    finish_report,
    inspect_matrices,
    matrix_of,
)


ERROR = 2
MAX_CELLS = 20_000  # cells converted for a report; of a larger file a part of each eighth is
N_PARTS = 8
LABEL_COLUMNS = ("cell_type", "cell_type_ontology_term_id", "tissue", "disease", "assay", "organism", "donor_id")
FEW_GENES = 3000  # below it a file is a panel or a selection of genes

KIND_WORDS = {
    "raw_integer": "integer counts",
    "raw_float": "nearly integer counts",
    "normalized": "normalised values",
    "log1p": "log(1 + x)",
    "log1p_log1p": "log(1 + x), taken twice",
    "scaled": "scaled values",
    "invalid": "values that are no numbers",
    "unknown": "values of unclear scale",
    "empty": "nothing",
}


def inspect_file(
    path: str | Path, gene_index: GeneIndex | None = None, *, max_cells: int = MAX_CELLS, **options: Any
) -> dict[str, Any]:
    """Find out what is in a file, whether it can be used, and how it would be read.

    Args:
        path: File or folder of any format that `readers.read_file` opens.
        gene_index: The genes of a model. Without it, all human genes of GENCODE v44, if their table is installed.
        max_cells: Cells to convert; the matrix is judged by a sample in any case.
        **options: `layer`, `assume`, `gene_column`, `organism`, `force`, as for `choose_input`.

    Returns:
        A dictionary that `json.dumps` takes: `usable`, `error`, `file`, `matrix`, `genes`, `cells`, `obs`, `warnings`.

    Raises:
        FileNotFoundError, ValueError: if the file cannot be opened at all. What is wrong with its contents is in
            `error`.
    """
    vocabulary = "model"
    if gene_index is None:
        gene_index, vocabulary = _reference()
    with read_file(path, backed=True) as file:
        report: dict[str, Any] = {"usable": True, "error": "", "file": _describe_file(Path(path), file, file.X)}
        report["obs"], warnings = _describe_obs(file)
        try:
            plan = choose_input(file, gene_index, **options)
            report |= plan.report | {"file": _describe_file(Path(path), file, matrix_of(file, plan.source))}
            report["warnings"] += warnings
            report["genes"]["judged_by"] = vocabulary
            report["cells"] |= _describe_cells(file, plan, max_cells)
            finish_report(report)
        except ValueError as error:
            report |= {"usable": False, "error": str(error)}
            report.setdefault("warnings", warnings)
            if "matrix" not in report and file.n_obs and file.n_vars:
                report |= _describe_unusable(file)
    return report


def _reference() -> tuple[GeneIndex, str]:
    from scmmgpt.train.data.gene_tables import reference_gene_index

    return reference_gene_index(), "GENCODE v44, all human genes"


def _describe_file(path: Path, file: CellFile, matrix: Any) -> dict[str, Any]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    if isinstance(matrix, DiskRows):
        layout = "sparse, by column" if matrix.by_column else "sparse, by row"
        in_memory = matrix.data.shape[0] * (matrix.data.dtype.itemsize + matrix.indices.dtype.itemsize)
    elif hasattr(matrix, "nnz"):
        layout, in_memory = "sparse, by row", matrix.data.nbytes + matrix.indices.nbytes
    else:
        layout = "dense"
        in_memory = 0 if matrix is None else int(np.prod(matrix.shape)) * np.dtype(matrix.dtype).itemsize
    return {
        "path": str(path),
        "bytes": sum(p.stat().st_size for p in files),
        "cells": file.n_obs,
        "variables": file.n_vars,
        "layout": layout,
        "bytes_in_memory": int(in_memory),
    }


def _describe_obs(file: CellFile) -> tuple[dict[str, Any], list[str]]:
    """The columns of `obs` that say what the cells are."""
    columns, warnings = {}, []
    for name in LABEL_COLUMNS:
        if name in file.obs and file.n_obs:
            values = file.obs[name].astype(str)
            counts = values.value_counts()
            columns[name] = {
                "values": len(counts),
                "most_common": str(counts.index[0]),
                "share": round(float(counts.iloc[0] / file.n_obs), 4),
            }
    if "cell_type" in columns:
        try:
            warnings = check_labels(file.obs["cell_type"].astype(str).tolist(), "cell_type")
        except ValueError as error:
            warnings = [str(error)]
    return columns, warnings


def _describe_cells(file: CellFile, plan: Any, max_cells: int) -> dict[str, Any]:
    """Convert the cells, or parts of a large file, and summarise them."""
    if file.n_obs <= max_cells:
        parts = [file]
    else:
        size = max(1, max_cells // N_PARTS)
        starts = np.linspace(0, file.n_obs - size, N_PARTS).astype(int).tolist()
        parts = [file[start : start + size] for start in starts]
    genes, totals = [], []
    for part in parts:
        for cells in plan.iter_cells(part):
            genes.append(np.diff(cells.indptr))
            totals.append(cells.library_sizes())
    genes, totals = np.concatenate(genes), np.concatenate(totals)
    return plan.report["cells"] | {
        "genes_median": float(np.median(genes)),
        "total_median": float(f"{np.median(totals):.6g}"),
        "total_min": float(f"{totals.min():.6g}"),
        "total_max": float(f"{totals.max():.6g}"),
    }


def _describe_unusable(file: CellFile) -> dict[str, Any]:
    """What can be said of a file that cannot be used."""
    found = inspect_matrices(file)
    if not found:
        return {}
    names = next(iter(found[0].columns.values()))
    species, why = detect_species([n for n, t in zip(names, found[0].types, strict=True) if t == "gene"])
    kinds, counts = np.unique(found[0].types.astype(str), return_counts=True)
    set_aside = {str(k): int(n) for k, n in zip(kinds, counts, strict=True) if k != "gene"}
    return {
        "matrix": {"candidates": {m.name: m.verdict.to_dict() for m in found}},
        "genes": {"species": species, "species_evidence": why, "set_aside": set_aside},
    }


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """A report as text for people."""
    file, lines = report["file"], []
    size = f"{file['layout']}, {_bytes(file['bytes'])} on disk, {_bytes(file['bytes_in_memory'])} in memory"
    lines.append(f"{Path(file['path']).name}: {file['cells']:,} cells x {file['variables']:,} variables ({size})")

    matrix = report.get("matrix", {})
    for name, verdict in matrix.get("candidates", {}).items():
        mark = "->" if name == matrix.get("chosen") else "  "
        lines.append(f"  {mark} {name}: {_kind(verdict)}")
        lines.append(f"       evidence: {_evidence(verdict)}")
        if name == matrix.get("chosen"):
            lines.append(f"       read: {verdict['conversion']} ({matrix['why']})")

    genes = report.get("genes", {})
    if genes:
        lines.append(f"  genes: {genes['species']} ({genes['species_evidence']})")
    if "matched" in genes:
        share = genes.get("share_expression_matched")
        weighed = "" if share is None else f", with {share:.1%} of the expression"
        lines.append(
            f"       {genes['matched']:,} of {genes['genes']:,} match ({genes['share_matched']:.1%}){weighed}; "
            f"judged by {genes['judged_by']}, column {' + '.join(genes['columns'])}"
        )
        how = ", ".join(f"{n:,} by {kind}" for kind, n in genes["how"].items() if kind != "unmatched")
        lines.append(f"       found: {how}; {genes['duplicates_summed']:,} duplicates summed")
        if genes["largest_unmatched"]:
            lines.append(f"       not matched, the largest first: {', '.join(genes['largest_unmatched'][:6])}")
        absent = genes["vocabulary"] - genes["vocabulary_measured"]
        few = " (a panel, or a selection of genes)" if genes["genes"] < FEW_GENES else ""
        lines.append(
            f"       {genes['vocabulary_measured']:,} genes of the vocabulary were measured{few}; "
            f"the other {absent:,} are absent, not zero"
        )
    if genes.get("set_aside"):
        lines.append(f"       set aside: {', '.join(f'{n:,} {kind}' for kind, n in genes['set_aside'].items())}")

    cells = report.get("cells", {})
    if "genes_median" in cells:
        counts = matrix["kind"].startswith("raw") or "integer counts" in matrix["conversion"]
        unit = "counts" if counts else "on the scale of the values"
        lines.append(
            f"  cells: median total {cells['total_median']:,g} {unit} ({cells['total_min']:,g} to "
            f"{cells['total_max']:,g}), "
            f"{cells['genes_median']:,g} genes of the vocabulary (of {cells['converted']:,} cells)"
        )
    for name, column in report["obs"].items():
        lines.append(f"       {name}: {column['values']} values, {column['share']:.0%} {column['most_common']!r}")
    lines += [f"  ! {warning}" for warning in report.get("warnings", [])]
    lines.append(f"  => can be used: scmmgpt annotate {file['path']} --model CHECKPOINT --output annotated.h5ad")
    if not report["usable"]:
        lines[-1] = f"  => cannot be used: {report['error']}"
    return "\n".join(lines) + "\n"


def _kind(verdict: dict[str, Any]) -> str:
    words, evidence = KIND_WORDS[verdict["kind"]], verdict["evidence"]
    base, total = verdict.get("log_base"), verdict.get("target_sum")
    if base not in (None, "e"):
        words = words.replace("log", f"log{base}")
    if total is not None and verdict["kind"] != "raw_integer":
        certain = "" if evidence.get("target_sum_from") != "assumed" else ", assumed"
        words += f" of values scaled to {total:,g} a cell{certain}" if base else f", {total:,g} a cell{certain}"
    elif evidence.get("unit") == 1.0:
        words += " of counts"
    return words + (" (0 and 1 only)" if evidence.get("binary") else "")


def _evidence(verdict: dict[str, Any]) -> str:
    e = verdict["evidence"]
    if "min" not in e:
        return f"{e.get('nan', 0)} NaN, {e.get('too_large', 0)} infinite or senseless in {e['cells_sampled']} cells"
    parts = [f"{e['share_integer']:.1%} integers", f"{e['min']:g} to {e['max']:g}"]
    if "share_negative" in e:
        parts.append(f"{e['share_negative']:.1%} negative")
    else:
        parts.append(f"totals {e['total_median']:,g} +- {e['total_cv']:.1%}")
    if e.get("share_cells_integral"):
        parts.append(f"multiples of one unit in {e['share_cells_integral']:.1%} of the cells")
    if "target_sum_from" in e:
        parts.append(f"scale from {e['target_sum_from']}")
    if "decimals" in e:
        parts.append(f"rounded to {e['decimals']} decimals")
    if "digits" in e:
        parts.append(f"rounded to {e['digits']} digits")
    if "share_near_integer" in e:
        parts.append(f"{e['share_near_integer']:.0%} near an integer (30% by chance)")
    return ", ".join(parts) + f" ({e['cells_sampled']} cells)"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `scmmgpt inspect`."""
    parser.add_argument("file", type=Path, help="file or folder of cells (.h5ad, .zarr, 10x .h5 or mtx, .loom, .csv)")
    parser.add_argument("--model", help="checkpoint whose genes the file is judged by (default: all human genes)")
    parser.add_argument("--layer", help="matrix to read: a layer, 'X' or 'raw' (default: found out)")
    parser.add_argument("--assume", choices=ASSUMABLE, help="what the matrix holds, where the verdict is wrong")
    parser.add_argument("--gene-column", help="column of var with gene symbols or Ensembl ids (default: found out)")
    parser.add_argument("--organism", help="organism of the cells (default: found out)")
    parser.add_argument("--force", action="store_true", help="judge also a file of which hardly a gene matches")
    parser.add_argument("--max-cells", type=int, default=MAX_CELLS, help="cells to convert (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `scmmgpt inspect`."""
    parser = argparse.ArgumentParser(
        prog="scmmgpt inspect", description="Say what is in a file and whether and how it can be used."
    )
    add_arguments(parser)
    return parser


def main(args: argparse.Namespace | list[str] | None = None) -> int:
    """Run `scmmgpt inspect`; returns the exit status."""
    if not isinstance(args, argparse.Namespace):
        args = make_parser().parse_args(args)
    options = {name: getattr(args, name) for name in ("layer", "assume", "gene_column", "organism", "force")}
    try:
        gene_index = None if args.model is None else _gene_index(args.model)
        with _warnings_unlogged():
            report = inspect_file(args.file, gene_index, max_cells=args.max_cells, **options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.json:
            _write(json.dumps({"usable": False, "error": str(error)}) + "\n")
        else:
            sys.stderr.write(f"scmmgpt inspect: {error}\n")
        return ERROR
    _write(json.dumps(report, indent=2) + "\n" if args.json else render(report))
    return 0 if report["usable"] else ERROR


@contextmanager
def _warnings_unlogged() -> Iterator[None]:
    """The report has the warnings; whoever calls `main` in a process of their own keeps their log as it was."""
    package = logging.getLogger("scmmgpt")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _gene_index(model: str) -> GeneIndex:
    from scmmgpt.processing_scmmgpt import ScMMGPTProcessor

    return ScMMGPTProcessor.from_pretrained(model).gene_index


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
