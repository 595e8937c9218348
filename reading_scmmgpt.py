"""Load an AnnData as `Cells`: which matrix, which genes, and how its values are converted.

`choose_input` samples rows and decides on the matrix, the kind of its values and the genes. `InputChoice.convert`
applies the decision to any chunk of the same data; `read_cells` does both. The report has every decision.

This file travels with the weights, so it imports neither AnnData nor SciPy.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cells_scmmgpt import Cells
from .conversion_scmmgpt import InputChoice
from .genes_scmmgpt import (
    SPECIES,
    GeneIndex,
    GeneMatch,
    are_feature_types,
    check_match,
    check_types,
    classify_features,
    find_species,
    match_genes,
)
from .matrices_scmmgpt import ROUNDED, MatrixVerdict, inspect_rows
from .records_scmmgpt import finish_report, in_few_lines
from .rows_scmmgpt import (
    LARGEST_VALUE,
    CountRows,
    layers_of,
    matrix_of,
    modality_of,
    row_major,
    sample_rows,
    totals_of,
)


logger = logging.getLogger(__name__)

N_TURNED = 200  # names of cells that are looked at for genes
# Layers of velocity pipelines, each with a part of the reads: used only if `layer=` names one.
PARTIAL_LAYERS = frozenset(
    {"spliced", "unspliced", "ambiguous", "mature", "nascent", "ms", "mu", "velocity", "variance_velocity"}
)
COUNT_LAYERS = ("counts", "raw_counts", "count", "umi", "umis", "raw")
GENE_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "symbol", "gene_ids", "gene_id")
TOTAL_COLUMNS = ("total_counts", "n_counts", "nCount_RNA", "nUMI", "n_umi", "n_umis", "raw_sum")
# Droplets without a cell: under this share of the genes of the richest cells, and under so many genes; a matrix is
# called unfiltered if they are a larger share than MAX_EMPTY_SHARE, or if the median barcode has under MIN_CELL_GENES.
# Panels of fewer genes than MIN_DROPLET_GENES are not judged.
EMPTY_SHARE, MAX_EMPTY_GENES, MAX_EMPTY_SHARE, MIN_CELL_GENES, MIN_DROPLET_GENES = 0.05, 50, 0.2, 10, 200
# A matrix of values that are no counts is called smoothed if this share of its expressed genes is above zero, in a
# sample of enough cells and genes. The deepest of 20 measured datasets (CEL-seq2) has 0.60.
SMOOTH_SHARE, MIN_SMOOTH_CELLS, MIN_SMOOTH_GENES = 0.9, 10, 500
FEW_NEGATIVE = 0.01  # share of negative values below which a matrix was not scaled
# Kinds of matrix that `assume=` may name.
ASSUMABLE = ("raw_integer", "raw_float", "normalized", "log1p", "log1p_log1p", "sqrt")


def _find_totals_column(adata: Any) -> str | None:
    """The column of `obs` with the counts per cell over all genes, if there is one.

    It is chosen once for all chunks of the data: a chunk without the missing values of a column would choose another.
    """
    for column in TOTAL_COLUMNS:
        if column in adata.obs:
            totals = np.asarray(adata.obs[column])
            if np.issubdtype(totals.dtype, np.number) and np.isfinite(totals).all() and (totals > 0).any():
                return column
    return None


def choose_input(
    adata: Any,
    gene_index: GeneIndex,
    *,
    layer: str | None = None,
    assume: str | None = None,
    gene_column: str | None = None,
    organism: str | None = None,
    force: bool = False,
    **unknown: Any,
) -> InputChoice:
    """Decide how to read an AnnData: which matrix, what its values are, which variables are genes.

    Args:
        adata: AnnData, in memory, backed or a view; or a MuData, whose `rna` part is read.
        gene_index: The model's genes.
        layer: `X`, `raw` or a layer's name, instead of the best matrix found.
        assume: Kind of that matrix (one of `ASSUMABLE`), instead of the verdict.
        gene_column: Column of `var` with gene names or ids, instead of the best ones found.
        organism: Species (`human`, `mouse`, `Mus musculus`, `NCBITaxon:10090`, ...), instead of what the data say.
        force: Read data of which under 20 % of the genes match.
        unknown: Words that neither a method of the pipeline nor this function knows; an error names them.

    Raises:
        TypeError: if `adata` is not an AnnData, such as a path, or an option is unknown.
        ValueError: if there are no cells, no usable matrix or (almost) no matching genes.
    """
    if unknown:
        raise TypeError(
            f"There is no option {', '.join(map(repr, unknown))}: `help` of the method lists its options, and the "
            "options of the input are layer, assume, gene_column, organism and force."
        )
    adata = modality_of(adata)
    if not hasattr(adata, "n_obs"):
        what = " ".join(repr(adata).split())[:80]  # tables have many lines
        raise TypeError(f"{what} is not an AnnData; read a file first, such as with `anndata.read_h5ad`.")
    n_cells, n_vars = adata.shape
    if not n_cells or not n_vars:
        raise ValueError(f"The data hold {n_cells} cells and {n_vars} variables: there is nothing to read.")

    if organism is not None:
        _check_organism(organism)

    # step 1: which matrix
    found = inspect_matrices(adata, layer=layer, gene_column=gene_column)
    if assume is not None:
        found = [replace(c, verdict=_assume_kind(assume, c.verdict)) if _is_undecided(c.verdict) else c for c in found]
    chosen, why = _choose(found, adata, asked=layer is not None)
    source, verdict = chosen.name, chosen.verdict if assume is None else _assume_kind(assume, chosen.verdict)

    # step 2: which genes
    linear, _ = verdict.linearize(chosen.rows.data)
    match = match_genes(
        chosen.columns,
        gene_index,
        types=chosen.types,
        organism=organism or _declared_organism(adata),
        weights=np.bincount(chosen.rows.indices, weights=linear, minlength=len(chosen.types)),
    )
    try:
        messages = check_match(match, gene_index, force=force)
    except ValueError:
        first = [str(name) for name in adata.obs_names[:N_TURNED]]
        if (n_genes := sum(gene_index.lookup(name)[0] >= 0 for name in first)) > len(first) / 2:
            raise ValueError(
                f"The genes are in the rows: {n_genes} of the first {len(first)} names of cells are genes. Turn the "
                "data: `adata = adata.T`."
            ) from None
        raise

    # step 3: what else is odd
    messages += _matrix_messages(source, verdict) + _smooth_messages(source, verdict, chosen.rows)
    messages += _droplet_messages(chosen.rows, match)
    n_repeated = 0
    if not (names := adata.obs_names.astype(str)).is_unique:
        counted = Counter(names)
        n_repeated = n_cells - len(counted)
        messages.append(
            f"{n_repeated} of {n_cells} barcodes are repeated (such as {counted.most_common(1)[0][0]!r}): cells of "
            "one barcode get equal random draws. Make them unique with `adata.obs_names_make_unique()`."
        )
    messages = in_few_lines(messages)
    for message in messages:
        logger.warning(message)
    candidates = {m.name.replace("/", "_"): m.verdict.to_dict() for m in found}
    report = {
        "matrix": {"chosen": source, "why": why, "candidates": candidates, **verdict.to_dict()},
        "genes": match.report,
        "cells": {"cells": n_cells, "repeated_barcodes": n_repeated},
        "warnings": messages,
    }
    return InputChoice(source, verdict, match, report, _find_totals_column(adata))


def _check_organism(organism: str) -> None:
    if find_species(organism) is None:
        names = ", ".join(f"{species.name} ({species.latin.capitalize()})" for species in SPECIES)
        raise ValueError(f"organism={organism!r} is not a known species; choose one of {names}.")


def _is_undecided(verdict: MatrixVerdict) -> bool:
    """Whether a matrix is refused on account of signs that the user may know better."""
    return verdict.kind == "one_cell" or "share_equal_variance" in verdict.evidence


def _assume_kind(kind: str, found: MatrixVerdict) -> MatrixVerdict:
    """The verdict of the kind that the user passed, with the precision and, for an equal kind, the scale found."""
    kind = {"raw": "raw_integer", "counts": "raw_integer"}.get(kind, kind)
    if kind not in ASSUMABLE:
        raise ValueError(f"assume={kind!r} is not a kind of matrix that can be read; choose one of {ASSUMABLE}.")
    if found.kind in ("invalid", "empty"):
        return found
    if "share_negative" in found.evidence:
        return replace(found, evidence=found.evidence | {"assumed": kind})
    evidence = found.evidence | {"assumed": kind, "found": found.kind}
    if kind == found.kind:
        return replace(found, evidence=evidence)
    logs = {"log1p": 1, "log1p_log1p": 2}.get(kind, 0)
    power = 2 if kind == "sqrt" else 1
    conversion = ROUNDED if kind == "raw_float" else "taken as they are"
    if logs or power > 1:
        conversion = f"{'logarithm' if logs else 'square root'} undone, then as they are: normalised values"
    return MatrixVerdict(
        kind, conversion, evidence, logs=logs, power=power, precision=found.precision, floor=found.floor
    )


@dataclass
class Candidate:
    """A matrix of an AnnData that may be read."""

    name: str  # `X`, `raw` or the layer's name
    verdict: MatrixVerdict
    types: np.ndarray  # str (n_vars,): type of each variable
    columns: dict[str, list[str]]  # columns of names of the variables
    rows: CountRows  # the sampled rows, of genes only


def inspect_matrices(adata: Any, *, layer: str | None = None, gene_column: str | None = None) -> list[Candidate]:
    """The verdict on every matrix of an AnnData (or on `layer` alone), in order of preference among equals."""
    layers = list(layers_of(adata))
    names = [known for name in COUNT_LAYERS for known in layers if known.lower() == name]
    names += ["raw"] if getattr(adata, "raw", None) is not None else []
    names += ["X"] if getattr(adata, "X", None) is not None else []
    names += [name for name in layers if name not in names]
    if layer is not None:
        if layer not in names:
            raise ValueError(f"layer={layer!r} is not in the data; it has {', '.join(names) or 'no matrix at all'}.")
        names = [layer]
    totals, says_log1p = totals_of(adata, _find_totals_column(adata)), "log1p" in getattr(adata, "uns", ())
    candidates, variables = [], {}
    for name in names:
        part, var = ("raw", adata.raw.var) if name == "raw" else ("var", adata.var)
        if part not in variables:
            columns = _gene_columns(var, gene_column)
            variables[part] = columns, _feature_types(var, columns)
        columns, types = variables[part]
        rows = sample_rows(row_major(matrix_of(adata, name))).columns(types == "gene")
        known = None if totals is None else totals[rows.positions]
        verdict = inspect_rows(rows, known, says_log1p=says_log1p and name in ("X", "raw"))
        candidates.append(Candidate(name, verdict, types, columns, rows.above(verdict.floor)))
    return candidates


def _choose(candidates: list[Candidate], adata: Any, *, asked: bool) -> tuple[Candidate, str]:
    """The matrix to read, and why."""
    if not candidates:
        raise ValueError("The data have no matrix at all: neither X, nor raw, nor layers.")
    check_types(np.concatenate([c.types for c in candidates]))
    usable = [c for c in candidates if c.verdict.usable and (asked or c.name.lower() not in PARTIAL_LAYERS)]
    if not usable:
        raise ValueError(" ".join(_describe_unusable(c, adata) for c in candidates))
    if asked:
        return usable[0], "asked for"
    best = min(usable, key=lambda c: _rank(c.verdict))
    why = "the nearest to counts"
    if _rank(best.verdict) == 0:
        # Of matrices that give counts, one of clearly more genes is better than one that holds them as integers.
        exact = [c for c in usable if c.verdict.exact or _rank(c.verdict) == 0]
        most = max(len(c.types) for c in exact)
        if len(best.types) < most / 1.2:
            best = min((c for c in exact if len(c.types) >= most / 1.2), key=lambda c: _rank(c.verdict))
            why = f"it gives the counts of {most} variables"
    others = [f"{c.name}: {c.verdict.kind}, {len(c.types)} variables" for c in candidates if c is not best]
    return best, f"{why} ({'; '.join(others)})" if others else "the only matrix"


def _describe_unusable(candidate: Candidate, adata: Any) -> str:
    """Why a matrix cannot be used, and the way out."""
    name, verdict, e = candidate.name, candidate.verdict, candidate.verdict.evidence
    if verdict.usable:
        return f"{name} holds a part of the reads only; name it with `layer=` to read it."
    if verdict.kind == "empty":
        return f"{name} has no value above zero in {e['cells_sampled']} cells; pass another `layer=`."
    if verdict.kind == "one_cell":
        return (
            f"{name} has one cell, no zeros, and the value {e['floor']:g} in many genes: one cell does not show "
            "whether this value is zero with a pseudo-count, or one count. Read the cell with others of its file; or "
            "pass `assume='log1p'`, for which the value is expression."
        )
    if "share_equal_variance" in e:
        return (
            f"{name} has a standard deviation of about 1 in {e['share_equal_variance']:.0%} of the genes: each gene "
            "was scaled (`sc.pp.scale(zero_center=False)`), so that all are equally high. Keep the counts before "
            "in `adata.layers['counts']` or `adata.raw`; if they have another name, pass `layer=`. If no gene "
            "was scaled, pass `assume=`."
        )
    row, column = e["first_at"]
    gene = next(iter(candidate.columns.values()))[column]
    where = f" (first at cell {str(adata.obs_names[row])!r}, gene {gene!r})"
    if verdict.kind == "scaled" and e["share_negative"] < FEW_NEGATIVE:
        return (
            f"{name} has a few negative values (minimum {e['min']:g}, less than {FEW_NEGATIVE:.0%} of the "
            f"non-zero{where}): expression is never below zero. Find the step that made them (a background that was "
            "subtracted?), or set them to zero. If the counts have another name, pass `layer=`."
        )
    if verdict.kind == "scaled":
        return (
            f"{name} has negative values (minimum {e['min']:g}, {e['share_negative']:.1%} of the non-zero{where}): it "
            "was scaled or batch-corrected, and counts cannot be recovered. Keep the counts before `sc.pp.scale` "
            "in `adata.layers['counts']` or `adata.raw`; if they have another name, pass `layer=`."
        )
    return (
        f"{name} holds {e['nan']} NaN and {e['too_large']} infinite or too large values (above {LARGEST_VALUE:g}) "
        f"in {e['cells_sampled']} cells{where}. Find the step that made them (a division by an empty cell?), or drop "
        "those cells or genes."
    )


def _rank(verdict: MatrixVerdict) -> int:
    """Distance of a matrix from counts; 0 is best."""
    if verdict.evidence.get("binary"):
        return 7
    if verdict.exact:
        return 2
    order = {"raw_integer": 0, "raw_float": 1, "normalized": 3, "log1p": 4, "log1p_log1p": 5, "sqrt": 5, "unknown": 6}
    return order[verdict.kind]


def _gene_columns(var: Any, gene_column: str | None) -> dict[str, list[str]]:
    if gene_column is not None:
        if gene_column in ("index", "var_names"):
            return {"var_names": [str(n) for n in var.index]}
        if gene_column not in var:
            columns_there = ", ".join(map(str, var.columns)) or "no columns"
            raise ValueError(f"gene_column={gene_column!r} is not in var; it has {columns_there}.")
        return {gene_column: [str(n) for n in var[gene_column]]}
    columns = {"var_names": [str(n) for n in var.index]}
    for name in var.columns:
        values = var[name]
        kind = getattr(values.dtype, "kind", "O")
        if kind in "OSUT" or str(values.dtype) in ("category", "string", "str"):
            values = [str(v) for v in values]
            # A column with few distinct words (feature_types, genome, chromosome) does not name genes.
            if str(name).lower() in GENE_COLUMNS or len(set(values)) > 0.5 * len(values):
                columns[str(name)] = values
    return columns


def _declared_organism(adata: Any) -> str | None:
    for column in ("organism_ontology_term_id", "organism", "species"):
        if column in adata.obs:
            values = {str(v) for v in adata.obs[column].unique()}
            if len(values) == 1:
                return values.pop()
        if column in adata.uns and isinstance(adata.uns[column], str):
            return adata.uns[column]
    return None


def _feature_types(var: Any, columns: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Type of each variable, by the file's own column of 10x's types and by its names."""
    stated = ([str(t) for t in var[name]] for name in ("feature_types", "feature_type", "modality") if name in var)
    feature_types = next((values for values in stated if are_feature_types(values)), None)
    genomes = [str(g) for g in var["genome"]] if "genome" in var else None
    types = np.full(len(var), "gene", dtype=object)
    for column, names in columns.items():
        if column != "var_names" and column.lower() not in GENE_COLUMNS:
            continue  # such as the location of each gene, which looks like a peak
        found = classify_features(names, feature_types=feature_types, genomes=genomes)
        types = np.where(types == "gene", found, types)
    return types


def _matrix_messages(source: str, verdict: MatrixVerdict) -> list[str]:
    """Warnings about the values of the chosen matrix."""
    messages = _kind_messages(source, verdict)
    if verdict.floor:
        messages.insert(
            0,
            f"{source} has no zeros, but {verdict.floor:g} in many genes of every cell (a pseudo-count, or a "
            "logarithm with one other than 1?): this value is taken as zero.",
        )
    return messages


def _kind_messages(source: str, verdict: MatrixVerdict) -> list[str]:
    e = verdict.evidence
    if e.get("binary"):
        return [f"{source} holds only 0 and 1: it was binarised, and levels of expression are lost."]
    if verdict.kind == "raw_float":
        return [
            f"{source} holds nearly integer counts ({e.get('share_near_integer', 0):.0%} within 0.15 of an integer; "
            "ambient-corrected or multi-mapped): they are rounded, "
            f"{e.get('share_below_half', 0):.0%} of the values to zero. `assume='normalized'` keeps the fractions."
        ]
    if verdict.exact and not verdict.complete and e.get("target_sum_from") == "assumed":
        what = "logarithms" if verdict.logs else "normalised values"
        return [
            f"{source} holds {what} of some genes, and nothing tells the total to which all genes "
            f"were scaled: {verdict.target_sum:,g} is assumed. Library sizes may be wrong by one factor; counts and "
            "ranks are right. A column of `obs` with the counts of each cell (`total_counts`, `nCount_RNA`) would "
            "settle it."
        ]
    if e.get("share_uncertain", 0) > 0.01:
        return [
            f"{source} is stored so coarsely that {e['share_uncertain']:.1%} of the counts, the largest ones, are "
            "recovered to about 1 % only. Use a file with more digits if there is one."
        ]
    if verdict.kind == "log1p_log1p":
        return [f"{source} is the logarithm of a logarithm: both were undone. Check how the file was made."]
    if verdict.kind == "log1p" and not verdict.exact:
        return [
            f"{source} holds logarithms from which counts cannot be recovered: the values are put back on a linear "
            "scale. Ranks within a cell, and so scGPT's bins, are those of the counts."
        ]
    if verdict.kind == "unknown":
        return [
            f"{source} may be on a linear or a logarithmic scale (values from {e['min']:g} to {e['max']:g}): taken as "
            "linear. Ranks within a cell, and so scGPT's bins, are right either way; `assume=` sets the scale."
        ]
    return []


def _smooth_messages(source: str, verdict: MatrixVerdict, rows: CountRows) -> list[str]:
    """A warning where nearly every gene of a sample of rows is above zero in every cell, as no measured cell shows."""
    n_genes = len(np.unique(rows.indices))
    if (
        rows.shape[0] < MIN_SMOOTH_CELLS
        or n_genes < MIN_SMOOTH_GENES
        or verdict.kind == "raw_integer"
        or verdict.floor
    ):
        return []
    dense = len(rows.data) / (rows.shape[0] * n_genes)
    if dense < SMOOTH_SHARE:
        return []
    return [
        f"{source} has {dense:.0%} of the expressed genes above zero in each cell, and measured cells have far fewer: "
        "the values seem smoothed or imputed (MAGIC, scVI) or pooled. Smoothing removes differences that labels rest "
        "on, so similar types may get one broader label. Pass the counts, for example with `layer=`."
    ]


def _droplet_messages(rows: CountRows, match: GeneMatch) -> list[str]:
    """A warning where most barcodes of a sample of rows have next to no genes: droplets without a cell."""
    detected = np.diff(rows.indptr)
    if match.report["genes"] < MIN_DROPLET_GENES or not len(detected):
        return []
    rich = float(np.quantile(detected, 0.99))
    empty = float((detected < min(MAX_EMPTY_GENES, EMPTY_SHARE * rich)).mean())
    median = float(np.median(detected))
    if median >= MIN_CELL_GENES and empty < MAX_EMPTY_SHARE:
        return []
    return [
        f"The matrix looks unfiltered: half of its barcodes have at most {median:g} genes, and {empty:.0%} have under "
        f"{EMPTY_SHARE:.0%} of the genes of the richest ({rich:.0f}). Such barcodes are droplets without a cell, and "
        "get labels like cells. Pass the filtered matrix, or drop them (in Python: "
        "`sc.pp.filter_cells(adata, min_genes=200)`)."
    ]


def read_cells(adata: Any, gene_index: GeneIndex, **options: Any) -> tuple[Cells, dict[str, Any]]:
    """Load an AnnData, which stays unaltered, as `Cells` and a report.

    `options` are `layer`, `assume`, `gene_column`, `organism` and `force`, as for [`choose_input`].
    """
    choice = choose_input(adata, gene_index, **options)
    cells = choice.convert(modality_of(adata))
    finish_report(choice.report)
    return cells, choice.report
