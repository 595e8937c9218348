"""The report of `scmmgpt inspect`: content of a file of cells, whether the file is usable, and the choices of reading.

Every command runs the same checks; `docs/inputs.md` lists them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.commands.checkpoints import root_checkpoint
from scmmgpt.commands.errors import as_options
from scmmgpt.genes_scmmgpt import GeneIndex, detect_species
from scmmgpt.readers.cell_files import CellFile, read_file
from scmmgpt.readers.disk_parts import DiskRows
from scmmgpt.reading_scmmgpt import InputChoice, choose_input, finish_report, inspect_matrices
from scmmgpt.records_scmmgpt import words_of
from scmmgpt.rows_scmmgpt import matrix_of


LABEL_COLUMNS = ("cell_type", "cell_type_ontology_term_id", "tissue", "disease", "assay", "organism", "donor_id")

KIND_WORDS = {
    "raw_integer": "integer counts",
    "raw_float": "nearly integer counts",
    "normalized": "normalised values",
    "log1p": "log(1 + x)",
    "log1p_log1p": "log(1 + x), taken twice",
    "sqrt": "square roots",
    "scaled": "scaled values",
    "invalid": "values that are not numbers",
    "unknown": "values of unclear scale",
    "empty": "nothing",
}


def inspect_file(
    path: str | Path, gene_index: GeneIndex | None = None, *, max_cells: int = 20_000, **options: Any
) -> dict[str, Any]:
    """Report the content of a file, whether the file is usable, and how a command would read it.

    Args:
        path: File or folder of any format that `readers.read_file` opens.
        gene_index: Gene names of a model; default: all human genes of GENCODE v44, and
            without the extra `train`, which has their table, the genes of the checkpoint of this package.
        max_cells: Most cells to convert; of a larger file, eight ranges of rows are converted. The verdict on the
            values always comes from a sample.
        **options: `layer`, `assume`, `gene_column`, `organism`, `force`; see `choose_input`.

    Returns:
        JSON-able dict: `usable`, `error`, `file`, `matrix`, `genes`, `cells`, `obs`, `warnings`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be opened. Faults of its content are in `error` instead.
    """
    vocabulary = "model"
    if gene_index is None:
        gene_index, vocabulary = _reference()
    with read_file(path, backed=True, gene_index=gene_index) as file:
        report: dict[str, Any] = {"usable": True, "error": "", "file": _describe_file(Path(path), file, file.X)}
        report["obs"], warnings = _describe_obs(file)
        try:
            choice = choose_input(file, gene_index, **options)
            report |= choice.report | {"file": _describe_file(Path(path), file, matrix_of(file, choice.source))}
            report["warnings"] += warnings
            report["genes"]["judged_by"] = vocabulary
            report["cells"] |= _describe_cells(file, choice, max_cells)
            finish_report(report)
        except ValueError as error:
            report |= {"usable": False, "error": str(error)}
            report.setdefault("warnings", warnings)
            if "matrix" not in report and file.n_obs and file.n_vars:
                report |= _describe_unusable(file)
    return report


def _reference() -> tuple[GeneIndex, str]:
    from scmmgpt.train.data.gene_tables import reference_gene_index

    try:
        return reference_gene_index(), "GENCODE v44, all human genes"
    except ImportError:  # without the extra `train`
        from scmmgpt.processing_scmmgpt import ScMMGPTProcessor

        return ScMMGPTProcessor.from_pretrained(root_checkpoint()).gene_index, "the checkpoint of this package"


def _describe_file(path: Path, file: CellFile, matrix: Any) -> dict[str, Any]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    if isinstance(matrix, DiskRows):
        layout, in_memory = matrix.layout, matrix.n_bytes
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
        "notes": file.notes,
    }


def _describe_obs(file: CellFile) -> tuple[dict[str, Any], list[str]]:
    """Describe the known columns of `obs`, and collect warnings about the labels."""
    from scmmgpt.train.data.label_checks import check_labels

    columns, warnings = {}, []
    for name in LABEL_COLUMNS:
        if name in file.obs and file.n_obs:
            counts = pd.Series(words_of(file.obs, name)).value_counts()
            share = round(float(counts.iloc[0] / file.n_obs), 4)
            columns[name] = {"values": len(counts), "most_common": str(counts.index[0]), "share": share}
    if "cell_type" in columns:
        try:
            warnings = check_labels(file.obs["cell_type"], "obs['cell_type']")
        except ValueError as error:
            warnings = [str(error)]
    return columns, warnings


def _describe_cells(file: CellFile, choice: InputChoice, max_cells: int) -> dict[str, Any]:
    """Compute statistics of the numbers of genes and counts of the converted cells."""
    parts = [file]
    if file.n_obs > max_cells:  # convert eight ranges, spread over the file
        size = max(1, max_cells // 8)
        starts = np.linspace(0, file.n_obs - size, 8).astype(int).tolist()
        parts = [file[start : start + size] for start in starts]
    measured = [(np.diff(c.indptr), c.library_sizes()) for part in parts for c in choice.iter_cells(part)]
    genes, totals = (np.concatenate(values) for values in zip(*measured, strict=True))
    return choice.report["cells"] | {
        "genes_median": float(np.median(genes)),
        "total_median": float(f"{np.median(totals):.6g}"),
        "total_min": float(f"{totals.min():.6g}"),
        "total_max": float(f"{totals.max():.6g}"),
    }


def _describe_unusable(file: CellFile) -> dict[str, Any]:
    """Describe a file that is not usable: verdicts on its matrices, and species of its genes."""
    matrices = inspect_matrices(file)
    if not matrices:
        return {}
    names = next(iter(matrices[0].columns.values()))
    species, why = detect_species([n for n, t in zip(names, matrices[0].types, strict=True) if t == "gene"])
    kinds, counts = np.unique(matrices[0].types.astype(str), return_counts=True)
    set_aside = {str(k): int(n) for k, n in zip(kinds, counts, strict=True) if k != "gene"}
    return {
        "matrix": {"candidates": {m.name: m.verdict.to_dict() for m in matrices}},
        "genes": {"species": species, "species_evidence": why, "set_aside": set_aside},
    }


# -- text -------------------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """Format a report as text, with options of the command line in its messages."""
    file = report["file"]
    size = f"{file['layout']}, {_bytes(file['bytes'])} on disk, {_bytes(file['bytes_in_memory'])} in memory"
    lines = [f"{Path(file['path']).name}: {file['cells']:,} cells x {file['variables']:,} variables ({size})"]
    lines += [f"  - {note}" for note in file.get("notes", [])]
    lines += _matrix_lines(report.get("matrix", {}))
    lines += _gene_lines(report.get("genes", {}))
    cells = report.get("cells", {})
    if "genes_median" in cells:
        matrix = report["matrix"]
        counts = matrix["kind"].startswith("raw") or "integer counts" in matrix["conversion"]
        unit = "counts" if counts else "on the scale of the values"
        if matrix["evidence"].get("target_sum_from") == "assumed":
            unit += f" if all genes of a cell summed to {matrix['target_sum']:,g}, as assumed"
        totals = f"{cells['total_median']:,g} {unit} ({cells['total_min']:,g} to {cells['total_max']:,g})"
        genes = f"{cells['genes_median']:,g} genes of the vocabulary (of {cells['converted']:,} cells)"
        lines.append(f"  cells: median total {totals}, {genes}")
    for name, column in report["obs"].items():
        values = f"{column['values']:,} value{'' if column['values'] == 1 else 's'}"
        lines.append(f"       {name}: {values}, {column['share']:.0%} {column['most_common']!r}")
    lines += [f"  ! {warning}" for warning in report.get("warnings", [])]
    if report["usable"]:
        lines.append(f"  => can be used: scmmgpt annotate {file['path']} --output annotated.h5ad")
    else:
        lines.append(f"  => cannot be used: {report['error']}")
    return as_options("\n".join(lines))


def _matrix_lines(matrix: dict[str, Any]) -> list[str]:
    lines = []
    for name, verdict in matrix.get("candidates", {}).items():
        chosen = name == matrix.get("chosen")
        lines.append(f"  {'->' if chosen else '  '} {name}: {_kind(verdict)}")
        lines.append(f"       evidence: {_evidence(verdict)}")
        if chosen:
            lines.append(f"       read: {verdict['conversion']} ({matrix['why']})")
    return lines


def _gene_lines(genes: dict[str, Any]) -> list[str]:
    lines = [f"  genes: {genes['species']} ({genes['species_evidence']})"] if genes else []
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
        few = " (a panel, or a selection of genes)" if genes["genes"] < 3000 else ""
        lines.append(
            f"       {genes['vocabulary_measured']:,} genes of the vocabulary were measured{few}; "
            f"the other {absent:,} are absent, not zero"
        )
    if genes.get("set_aside"):
        lines.append(f"       set aside: {', '.join(f'{n:,} {kind}' for kind, n in genes['set_aside'].items())}")
    return lines


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
        return f"{e.get('nan', 0)} NaN, {e.get('too_large', 0)} infinite or too large in {e['cells_sampled']} cells"
    parts = [f"{e['share_integer']:.1%} integers", f"{e['min']:g} to {e['max']:g}"]
    if "share_negative" in e:
        parts.append(f"{e['share_negative']:.1%} negative")
    else:
        parts.append(f"totals {e['total_median']:,g} +- {e['total_cv']:.1%}")
    if e.get("share_cells_integral"):
        parts.append(f"multiples of one unit in {e['share_cells_integral']:.1%} of the cells")
    if "target_sum_from" in e:
        parts.append(f"scale from {e['target_sum_from']}")
    parts += [f"rounded to {e[unit]} {unit}" for unit in ("decimals", "digits") if unit in e]
    if "share_near_integer" in e:
        parts.append(f"{e['share_near_integer']:.0%} near an integer (30% by chance)")
    return ", ".join(parts) + f" ({e['cells_sampled']} cells)"


def _bytes(n: float) -> str:
    power = sum(n >= 1000**k for k in (1, 2, 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
