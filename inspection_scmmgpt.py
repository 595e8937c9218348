"""The input doctor: what an expression matrix holds, which genes it has, and how it becomes `Cells`.

Half of the trouble with single-cell models happens before the first layer: log-normalised values taken for counts, a
gene column that does not match, proteins fed as genes. `plan_input` decides, from a sample of the rows, which matrix
of an AnnData to read, what its values are and which variables are genes of the vocabulary; `InputPlan.convert` applies
the decision to any chunk of the same data; `read_cells` does both. Every decision is in the report, a plain dictionary
that `json.dumps` takes and that `store_report` puts into `uns`.

AnnData and SciPy are used by duck typing only: this file travels with the weights and needs NumPy alone.

What each kind of matrix gets:

- `raw_integer`: every value is an integer. Taken as it is.
- `raw_float`: values cluster at integers (ambient-corrected, multi-mapped reads). Rounded to the nearest integer.
- `normalized`: totals are constant, or each cell's values are multiples of one unit, or they are plainly fractions on
  a linear scale. With a unit, counts are recovered exactly; else values are taken as they are (ranks do not change).
- `log1p`: the same after `base**x - 1`, or a range that only logarithms have. Undone, then as `normalized`.
- `log1p_log1p`: the same after undoing two logarithms. Undone twice, with a warning.
- `scaled`: negative values. Refused: z-scores do not tell zero from low.
- `invalid`: NaN or infinite values. Refused, naming the first cell and gene.
- `unknown`: none of these. Refused unless `assume=` says what it is.
- `empty`: no value above zero. Refused.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


try:
    from .feature_extraction_scmmgpt import Cells, hash_names
except ImportError:
    from feature_extraction_scmmgpt import Cells, hash_names

logger = logging.getLogger(__name__)

KINDS = (
    "raw_integer",
    "raw_float",
    "normalized",
    "log1p",
    "log1p_log1p",
    "scaled",
    "invalid",
    "unknown",
    "empty",
)
# Kinds that a user may assert with `assume=`.
ASSUMABLE = ("raw_integer", "raw_float", "normalized", "log1p", "log1p_log1p")

WARN_SHARE = 0.60  # of genes matched; below it the user is warned
REFUSE_SHARE = 0.20  # of genes matched; below it the input is refused unless forced
MIN_GENES = 20  # a handful of matching genes is an accident, whatever its share

N_SAMPLED_ROWS = 512  # rows looked at for a verdict, in 8 blocks spread over the matrix
N_BLOCKS = 8
CHUNK_ROWS = 8192  # rows converted at a time
DENSE_CHUNK_VALUES = 2**24  # values of a dense matrix looked at at a time
MAX_UNIT = 6  # the smallest value of a cell is tried as 1 .. MAX_UNIT counts

# Kept by velocity pipelines beside the total counts; a part of the reads only, so never chosen unasked.
PARTIAL_LAYERS = frozenset({"spliced", "unspliced", "ambiguous", "ms", "mu", "velocity", "variance_velocity"})
COUNT_LAYERS = ("counts", "raw_counts", "count", "umi", "umis", "raw")
TOTAL_COLUMNS = ("total_counts", "n_counts", "nCount_RNA", "nUMI", "n_umi", "n_umis", "raw_sum")
LOG_BASES = (("e", np.e), ("2", 2.0), ("10", 10.0))
LIKELY_TOTALS = (1e4, 1e6, 1e5, 1e3)


# ---------------------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixVerdict:
    """What the values of a matrix are, why we think so, and what becomes of them.

    Args:
        kind: One of `KINDS`.
        conversion: What `to_counts` does with the values, in words; `None` if the matrix cannot be used.
        evidence: The numbers that the verdict rests on, of the sampled rows.
        logs: How many times `log(1 + x)` was applied (0, 1 or 2).
        base: Base of the logarithm.
        exact: Whether integer counts can be recovered: each cell's values are multiples of one unit.
        target_sum: Total per cell before the logarithm, over all genes of the original data; `None` if not known.
        precision: Absolute and relative rounding of the stored values.
    """

    kind: str
    conversion: str | None
    evidence: dict[str, Any] = field(default_factory=dict)
    logs: int = 0
    base: float = np.e
    exact: bool = False
    target_sum: float | None = None
    precision: tuple[float, float] = (0.0, 2.0**-23)

    @property
    def usable(self) -> bool:
        """Whether counts, or values on their scale, can be had."""
        return self.conversion is not None

    def to_dict(self) -> dict[str, Any]:
        """The verdict as the report holds it."""
        report = {"kind": self.kind, "conversion": self.conversion or "none", "evidence": dict(self.evidence)}
        if self.logs:
            report["log_base"] = "e" if self.base == np.e else f"{self.base:g}"
        if self.target_sum is not None:
            report["target_sum"] = float(self.target_sum)
        return report


@dataclass
class CountRows:
    """Rows of a sparse matrix without zeros: the three arrays of CSR and a shape, free of any sparse library."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    shape: tuple[int, int]

    def columns(self, keep: np.ndarray) -> "CountRows":
        """Rows with the entries of the columns where `keep` (bool, `(n_vars,)`) holds; the shape stays."""
        if keep.all():
            return self
        chosen = keep[self.indices]
        kept = np.concatenate(([0], np.cumsum(chosen)))
        return CountRows(kept[self.indptr], self.indices[chosen], self.data[chosen], self.shape)

    def row_sums(self, values: np.ndarray | None = None) -> np.ndarray:
        """Sum of each row's data, or of `values` in their place; float64 `(n_cells,)`."""
        values = self.data if values is None else values
        return _segment(np.add, values.astype(np.float64, copy=False), self.indptr)


def _segment(ufunc: np.ufunc, values: np.ndarray, indptr: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """Reduce `values` within each row; `empty` for rows without values."""
    filled = np.flatnonzero(np.diff(indptr))
    result = np.full(len(indptr) - 1, empty, dtype=values.dtype)
    if len(filled):
        result[filled] = ufunc.reduceat(values, indptr[filled])
    return result


def _row_major(matrix: Any) -> Any:
    """The matrix in a form whose rows can be sliced; a new object if it had to be converted."""
    if getattr(matrix, "format", "csr") != "csr":
        if hasattr(matrix, "to_memory"):  # AnnData's view of a column-major matrix on disk
            matrix = matrix.to_memory()
        matrix = matrix.tocsr()
    return matrix


def read_rows(matrix: Any, start: int, stop: int) -> CountRows:
    """Rows `start:stop` of a NumPy, SciPy, HDF5, Zarr, Dask or backed AnnData matrix, zeros dropped, never dense.

    The values keep their type; explicit zeros are dropped; nothing in `matrix` changes.
    """
    block = matrix[start:stop]
    for method in ("to_memory", "compute"):
        if hasattr(block, method):
            block = getattr(block, method)()
    if hasattr(block, "tocsr"):
        block = block.tocsr()
        indptr = block.indptr.astype(np.int64)
        rows = CountRows(indptr, np.asarray(block.indices), np.asarray(block.data), tuple(block.shape))
        stored = rows.data != 0
        if not stored.all():
            kept = np.concatenate(([0], np.cumsum(stored)))
            rows = CountRows(kept[indptr], rows.indices[stored], rows.data[stored], rows.shape)
    else:
        block = np.asarray(block)
        if block.ndim != 2:
            raise ValueError(f"The matrix has shape {block.shape}; expected two dimensions, (n_cells, n_genes).")
        row, column = np.nonzero(block)
        indptr = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(block)))))
        rows = CountRows(indptr, column, block[row, column], block.shape)
    if rows.data.dtype == bool:
        rows.data = rows.data.astype(np.int8)
    if not np.issubdtype(rows.data.dtype, np.number) or np.issubdtype(rows.data.dtype, np.complexfloating):
        raise TypeError(
            f"The matrix holds values of type {rows.data.dtype}; expected numbers. "
            "Convert it with `adata.X = adata.X.astype('float32')`, or pass another `layer=`."
        )
    return rows


def sample_rows(matrix: Any, n_rows: int = N_SAMPLED_ROWS) -> CountRows:
    """About `n_rows` rows in contiguous blocks spread evenly over the matrix (cheap for files, always the same)."""
    n_cells, n_vars = matrix.shape
    if n_cells <= n_rows:
        return read_rows(matrix, 0, n_cells)
    size = n_rows // N_BLOCKS
    parts = [read_rows(matrix, s, s + size) for s in np.linspace(0, n_cells - size, N_BLOCKS).astype(int).tolist()]
    lengths = np.concatenate([np.diff(p.indptr) for p in parts])
    return CountRows(
        np.concatenate(([0], np.cumsum(lengths))),
        np.concatenate([p.indices for p in parts]),
        np.concatenate([p.data for p in parts]),
        (len(lengths), n_vars),
    )


def _storage_precision(values: np.ndarray) -> tuple[float, float]:
    """Absolute and relative half-width of the rounding of `values`: by their type, by decimals, by digits.

    Text files and some packages round (scanpy's `pbmc68k_reduced` keeps three decimals); what was rounded away must
    not be mistaken for evidence against integrality.
    """
    # A float logarithm and its inverse each cost about an ulp; four are allowed.
    relative = 4 * float(np.finfo(values.dtype).eps) if np.issubdtype(values.dtype, np.floating) else 2.0**-50
    # float64 data were often float32 once.
    relative = max(relative, 4 * 2.0**-24)
    sample = np.unique(values[:: max(1, len(values) // 20000)].astype(np.float64))
    sample = sample[(sample > 0) & np.isfinite(sample)]
    if not len(sample):
        return 0.0, relative
    for decimals in range(1, 6):
        scaled = sample * 10.0**decimals
        if np.all(np.abs(scaled - np.rint(scaled)) <= np.maximum(1e-6, scaled * relative)) and scaled.max() < 1e6:
            return 0.5 * 10.0**-decimals, relative
    magnitude = np.floor(np.log10(sample))
    for digits in range(3, 7):
        scaled = sample / 10.0 ** (magnitude - digits + 1)
        if np.all(np.abs(scaled - np.rint(scaled)) <= np.maximum(1e-6, scaled * relative)):
            return 0.0, max(relative, 0.5 * 10.0 ** (1 - digits))
    return 0.0, relative


def _linearize(
    values: np.ndarray, *, logs: int, base: float, precision: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Undo `logs` logarithms. Returns float64 values and the half-width that the rounding of each one became."""
    linear = values.astype(np.float64)
    error = np.maximum(precision[0], precision[1] * np.abs(linear))
    scale = np.log(base)
    for _ in range(logs):
        with np.errstate(over="ignore", invalid="ignore"):
            linear = np.expm1(linear * scale)
            error = (linear + 1.0) * np.expm1(error * scale)
    return linear, error


@dataclass
class _Units:
    """Per-cell size of one count, where a cell's values are integer multiples of one unit."""

    unit: np.ndarray  # float64 (n_cells,); NaN where none was found
    counts: np.ndarray  # float64 (nnz,): values / unit, rounded; only meaningful where a unit was found
    evidence: np.ndarray  # float64 (n_cells,): minus log10 of the probability that such a fit is chance


def _find_units(linear: np.ndarray, error: np.ndarray, indptr: np.ndarray) -> _Units:
    """Find, for each cell, the largest unit of which all its values are integer multiples.

    A UMI matrix divided by each cell's total keeps the integers: every value is `k * unit`, and the smallest is nearly
    always one count. The smallest is tried as 1, 2, .. `MAX_UNIT` counts. A value speaks for or against a unit
    only if its rounding leaves it less than 0.1 counts uncertain.
    """
    n_cells = len(indptr) - 1
    lengths = np.diff(indptr)
    smallest = _segment(np.minimum, linear, indptr, np.nan)
    found = np.full(n_cells, np.nan)
    evidence = np.zeros(n_cells)
    counts = np.zeros(len(linear))
    pending = np.flatnonzero(lengths)
    for multiple in range(1, MAX_UNIT + 1):
        if not len(pending):
            break
        if len(pending) == n_cells:
            entries, pointer = slice(None), indptr
        else:
            entries = np.repeat(np.isin(np.arange(n_cells), pending), lengths)
            pointer = np.concatenate(([0], np.cumsum(lengths[pending])))
        row_lengths = lengths[pending]
        values, errors = linear[entries], error[entries]
        first = np.repeat(smallest[pending], row_lengths)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = values * (multiple / first)
            # The unit is a stored value too, with the rounding of the smallest one.
            smallest_error = np.repeat(_segment(np.minimum, errors, pointer), row_lengths)
            tolerance = 1.5 * (multiple * errors + ratio * smallest_error) / first + 1e-7
            nearest = np.rint(ratio)
            telling = (tolerance < 0.1) & (ratio > multiple * (1 + 1e-4))
            off = telling & ~(np.abs(ratio - nearest) <= tolerance)
        chance = np.where(telling, -np.log10(np.minimum(2 * tolerance, 1.0) + 1e-12), 0.0)
        wrong = _segment(np.add, off.astype(np.int64), pointer)
        support = _segment(np.add, chance, pointer)
        fits = (wrong <= 0.002 * row_lengths) & np.isfinite(_segment(np.maximum, ratio, pointer))
        if multiple > 1:
            fits &= support > 3  # each further multiple is another chance to fit by accident
        rows = pending[fits]
        if len(rows):
            # Averaged over all small counts, the unit is far more precise than its one smallest value.
            chosen = np.repeat(fits, row_lengths)
            small = chosen & (tolerance < 0.1)
            total_value = _segment(np.add, np.where(small, values, 0.0), pointer)[fits]
            total_count = _segment(np.add, np.where(small, nearest, 0.0), pointer)[fits]
            with np.errstate(divide="ignore", invalid="ignore"):
                unit = np.where(total_count > 0, total_value / total_count, smallest[rows] / multiple)
            found[rows] = unit
            evidence[rows] = support[fits]
            positions = np.arange(len(linear))[entries][chosen]
            counts[positions] = np.rint(values[chosen] / np.repeat(unit, row_lengths[fits]))
        pending = pending[~fits]
    return _Units(found, counts, evidence)


def _spread(totals: np.ndarray) -> float:
    """Coefficient of variation of the positive entries."""
    totals = totals[totals > 0]
    return float(np.std(totals) / np.mean(totals)) if len(totals) and np.isfinite(totals).all() else np.inf


def _nice_total(total: float) -> float:
    """1e4, 1e5, ... if `total` is that within 1 %, else the total itself."""
    for likely in LIKELY_TOTALS:
        if abs(total / likely - 1) < 0.01:
            return likely
    return float(total)


def inspect_matrix(matrix: Any, *, totals: np.ndarray | None = None) -> MatrixVerdict:
    """Say what a matrix of expression values holds, from a sample of its rows.

    Args:
        matrix: `(n_cells, n_genes)`; NumPy, SciPy, HDF5, Zarr, Dask or backed AnnData matrix.
        totals: Counts per cell over all genes, `(n_cells,)`, where an `obs` column has them: it tells what total
            values were normalised to when only some of the genes are left.

    Returns:
        A verdict with its evidence; nothing is converted yet.

    >>> inspect_matrix(np.array([[1, 0, 3], [0, 2, 5]])).kind
    'raw_integer'
    """
    matrix = _row_major(matrix)
    rows = sample_rows(matrix)
    if totals is not None and matrix.shape[0] > N_SAMPLED_ROWS:
        size = N_SAMPLED_ROWS // N_BLOCKS
        starts = np.linspace(0, matrix.shape[0] - size, N_BLOCKS).astype(int)
        totals = np.concatenate([totals[s : s + size] for s in starts])
    return _inspect_rows(rows, totals)


def _inspect_rows(rows: CountRows, known_totals: np.ndarray | None = None) -> MatrixVerdict:
    values = rows.data
    evidence: dict[str, Any] = {"cells_sampled": int(rows.shape[0]), "dtype": str(values.dtype)}
    if not len(values):
        return MatrixVerdict("empty", None, evidence)
    finite = np.isfinite(values)
    if not finite.all():
        return MatrixVerdict(
            "invalid",
            None,
            evidence | {"nan": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())},
        )
    integer = values == np.rint(values)
    sums = rows.row_sums()
    evidence |= {
        "share_nonzero": _number(len(values) / max(1, rows.shape[0] * rows.shape[1])),
        "min": _number(values.min()),
        "max": _number(values.max()),
        "share_integer": _number(integer.mean()),
        "total_median": _number(np.median(sums)),
        "total_cv": _number(_spread(sums)),
    }
    if values.min() < 0:
        evidence["share_negative"] = _number((values < 0).mean())
        return MatrixVerdict("scaled", None, evidence)
    if integer.all():
        if values.max() == 1:
            evidence["binary"] = True
        return MatrixVerdict("raw_integer", "taken as they are", evidence)

    precision = _storage_precision(values)
    if precision[0]:
        evidence["decimals"] = round(-np.log10(2 * precision[0]))

    # Does the matrix become integer multiples of a unit, or constant totals, on some scale?
    fits = []
    scales = [(0, "e", np.e)] + [(1, name, base) for name, base in LOG_BASES] + [(2, "e", np.e)]
    for logs, name, base in scales:
        if logs == 1 and values.max() * np.log(base) > 30 or logs == 2 and values.max() > 3.2:
            continue  # would be more than 1e13 counts in a gene
        linear, error = _linearize(values, logs=logs, base=base, precision=precision)
        if not np.isfinite(linear).all():
            continue
        totals = rows.row_sums(linear)
        units = _find_units(linear, error, rows.indptr)
        filled = np.diff(rows.indptr) > 0
        share = float(np.isfinite(units.unit[filled]).mean())
        support = float(units.evidence[np.isfinite(units.unit)].sum())
        fits.append(
            {
                "logs": logs,
                "name": name,
                "base": base,
                "totals": totals,
                "units": units,
                "integral": share if support > 6 else 0.0,
                "constant": _spread(totals) < max(2e-3, 20 * precision[1]) and (totals > 0).sum() > 1,
            }
        )
    best = max(fits, key=lambda f: (f["constant"] + (f["integral"] >= 0.9), f["integral"], -f["logs"]))
    if best["constant"] or best["integral"] >= 0.9:
        return _exact_verdict(best, precision, evidence, known_totals)
    return _plausible_verdict(rows, precision, evidence)


def _exact_verdict(
    best: dict, precision: tuple[float, float], evidence: dict, known_totals: np.ndarray | None
) -> MatrixVerdict:
    """A matrix whose scale is proven: constant totals, or integer multiples of a unit, or both."""
    logs, exact = best["logs"], best["integral"] >= 0.9
    unit = best["units"].unit
    has_unit = np.isfinite(unit)
    evidence["share_cells_integral"] = _number(best["integral"])
    kind = ("normalized", "log1p", "log1p_log1p")[logs]
    target_sum = None
    if exact and np.all(np.abs(unit[has_unit] - 1) < 1e-3):
        evidence["unit"] = 1.0  # logarithms of the counts themselves
        if logs == 0:
            evidence["share_near_integer"] = 1.0
            return MatrixVerdict(
                "raw_float", "rounded to the nearest integer", evidence, exact=True, precision=precision
            )
    elif best["constant"]:
        target_sum = _nice_total(float(np.median(best["totals"][best["totals"] > 0])))
        evidence["target_sum_from"] = "constant totals"
    elif exact:
        target_sum, evidence["target_sum_from"] = _target_sum(best, known_totals)
    if target_sum is not None:
        evidence["target_sum"] = _number(target_sum)
    undo = ("", f"{best['name']}**x - 1, ", "exp(exp(x) - 1) - 1, ")[logs]
    tail = "each cell divided by its unit: integer counts" if exact else "taken as they are: normalised values"
    return MatrixVerdict(
        kind,
        undo + tail,
        evidence,
        logs=logs,
        base=best["base"],
        exact=exact,
        target_sum=target_sum,
        precision=precision,
    )


def _target_sum(best: dict, known_totals: np.ndarray | None) -> tuple[float | None, str]:
    """What normalised values summed to before genes were removed."""
    unit = best["units"].unit
    has_unit = np.isfinite(unit)
    counted = best["totals"][has_unit] / unit[has_unit]  # counts of the genes that are left
    if known_totals is not None:
        products = np.asarray(known_totals, dtype=np.float64)[has_unit] * unit[has_unit]
        if _spread(products) < 0.01:
            return _nice_total(float(np.median(products))), "obs column of totals"
    for likely in LIKELY_TOTALS:
        if np.all(likely / unit[has_unit] >= counted * 0.999):
            return likely, "assumed"
    return None, "unknown"


def _plausible_verdict(rows: CountRows, precision: tuple[float, float], evidence: dict) -> MatrixVerdict:
    """A matrix without proof of its scale: judged by closeness to integers and by range."""
    values = rows.data.astype(np.float64)
    away = np.abs(values - np.rint(values))
    near = float((away <= 0.15).mean())  # 0.30 by chance
    largest, median = float(values.max()), float(np.median(values))
    evidence |= {"share_near_integer": _number(near), "max_over_median": _number(largest / median)}
    if near >= 0.5 and largest > 2:
        evidence["share_below_half"] = _number((values < 0.5).mean())
        return MatrixVerdict("raw_float", "rounded to the nearest integer", evidence, precision=precision)
    # Expression spans orders of magnitude; after a logarithm the largest value of a matrix is a few medians.
    if largest <= 25 and largest <= 15 * median:
        totals = rows.row_sums(np.expm1(values))
        target_sum = LIKELY_TOTALS[0] if totals.max() <= LIKELY_TOTALS[0] * 1.001 else None
        return MatrixVerdict(
            "log1p",
            "e**x - 1, taken as they are: normalised values",
            evidence | {"log_base_from": "assumed"},
            logs=1,
            target_sum=target_sum,
            precision=precision,
        )
    if largest > 25:
        return MatrixVerdict("normalized", "taken as they are", evidence, precision=precision)
    return MatrixVerdict("unknown", None, evidence, precision=precision)


def _assumed(kind: str, found: MatrixVerdict) -> MatrixVerdict:
    """The verdict that the user asserts, with what was found out about the same scale."""
    if kind not in ASSUMABLE:
        raise ValueError(f"assume={kind!r} is not a kind of matrix that can be read; choose one of {ASSUMABLE}.")
    if found.kind in ("invalid", "empty"):
        return found
    evidence = found.evidence | {"assumed_by": "user", "found": found.kind}
    if kind == found.kind and found.usable:
        return replace(found, evidence=evidence)
    if found.kind == "scaled":
        raise ValueError(
            f"assume={kind!r}, but the matrix has negative values (minimum {found.evidence['min']}), "
            "which no counts and no normalised values have. Pass a `layer=` from before scaling."
        )
    logs = {"log1p": 1, "log1p_log1p": 2}.get(kind, 0)
    conversion = {
        "raw_integer": "taken as they are",
        "raw_float": "rounded to the nearest integer",
        "normalized": "taken as they are",
    }.get(kind, "logarithm undone, taken as they are")
    return MatrixVerdict(kind, conversion, evidence, logs=logs, precision=found.precision)


def to_counts(matrix: Any, verdict: MatrixVerdict) -> CountRows:
    """Convert a matrix to counts as `verdict` says (see the table at the top of this file).

    Returns:
        Rows whose `data` are counts: integers where they can be had, else normalised values on a linear scale.
    """
    matrix = _row_major(matrix)
    rows = read_rows(matrix, 0, matrix.shape[0])
    return _convert_rows(rows, verdict)[0]


def _convert_rows(rows: CountRows, verdict: MatrixVerdict) -> tuple[CountRows, np.ndarray, int]:
    """Counts, library sizes (float64 `(n_cells,)`) and the number of cells whose counts could not be recovered."""
    if not verdict.usable:
        raise ValueError(_unusable("The matrix", verdict))
    if verdict.kind == "raw_integer":
        return rows, rows.row_sums(), 0
    if verdict.kind == "raw_float":
        counts = np.rint(rows.data)
        kept = counts > 0
        pointer = np.concatenate(([0], np.cumsum(kept)))[rows.indptr]
        rows = CountRows(pointer, rows.indices[kept], counts[kept].astype(np.float32), rows.shape)
        return rows, rows.row_sums(), 0
    linear, error = _linearize(rows.data, logs=verdict.logs, base=verdict.base, precision=verdict.precision)
    lengths = np.diff(rows.indptr)
    totals = rows.row_sums(linear)
    if verdict.target_sum is not None:
        totals = np.where(lengths > 0, np.maximum(verdict.target_sum, totals), 0.0)
    failed = 0
    if verdict.exact:
        units = _find_units(linear, error, rows.indptr)
        found = np.isfinite(units.unit)
        failed = int((~found & (lengths > 0)).sum())
        linear = np.where(np.repeat(found, lengths), units.counts, linear)
        counted = rows.row_sums(linear)
        if verdict.target_sum is None:
            totals = np.where(found, counted, totals)
        else:
            with np.errstate(invalid="ignore"):
                totals = np.where(found, np.maximum(np.rint(verdict.target_sum / units.unit), counted), totals)
    return CountRows(rows.indptr, rows.indices, linear.astype(np.float32), rows.shape), totals, failed


def _number(value: Any) -> float:
    """A Python float with the digits that a report needs."""
    return float(f"{float(value):.5g}")


def _unusable(name: str, verdict: MatrixVerdict) -> str:
    e = verdict.evidence
    if verdict.kind == "scaled":
        return (
            f"{name} has negative values (minimum {e['min']:g}, {e['share_negative']:.1%} of the non-zero ones): it "
            "was scaled or batch-corrected, and counts cannot be recovered. Keep the counts before `sc.pp.scale`, in "
            "`adata.layers['counts']` or `adata.raw`, and pass `layer=` if they have another name."
        )
    if verdict.kind == "invalid":
        return (
            f"{name} holds {e['nan']} NaN and {e['infinite']} infinite values in {e['cells_sampled']} cells. "
            "Find the step that made them (a division by an empty cell?), or drop those cells or genes."
        )
    if verdict.kind == "empty":
        return f"{name} has no value above zero in {e['cells_sampled']} cells. Is it the right layer?"
    return (
        f"{name} is neither counts, nor normalised, nor logarithms that we know: values from {e['min']:g} to "
        f"{e['max']:g}, {e['share_integer']:.1%} integers. Say what it holds with `assume=` ({', '.join(ASSUMABLE)})."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Genes
# ---------------------------------------------------------------------------------------------------------------------

ENSEMBL = re.compile(r"^(ENS[A-Z]{0,4}G\d{11})(?:\.\d+)?(?:_PAR_Y)?$", re.IGNORECASE)
EMBEDDED_ENSEMBL = re.compile(r"(?:^|[_|:;, ])(ENS[A-Z]{0,4}G\d{11})(?:\.\d+)?(?:$|[_|:;, ])")
GENOME_PREFIX = re.compile(r"^(hg19|hg38|GRCh37|GRCh38|mm9|mm10|mm39|GRCm38|GRCm39)[_-]+(?=\S)", re.IGNORECASE)
PEAK = re.compile(r"^(chr)?(\d{1,2}|X|Y|MT?|GL\d+\.\d|KI\d+\.\d)[:_-]\d+[_-]\d+$", re.IGNORECASE)
ANTIBODY = re.compile(
    r"(_|-|\.)?(Total_?Seq[A-D]?|ADT|AB_?Capture|anti(human|mouse))\b|^(ADT|AB|PROT|HTO)[_-]", re.IGNORECASE
)
SPIKE_IN = re.compile(r"^ERCC-\d{5}$")
MADE_UNIQUE = re.compile(r"[-.]\d{1,2}$")
MOUSE_SYMBOL = re.compile(r"^([A-Z][a-z0-9]+|mt-[A-Z][a-z0-9]+|[A-Z][a-z]+[A-Za-z0-9-]*|\d{7}[A-Z]\d{2}Rik)$")
HUMAN_SYMBOL = re.compile(r"^([A-Z][A-Z0-9-]*|C\d+orf\d+)$")

SPECIES_PREFIXES = {
    "ENSG": "human",
    "ENSMUSG": "mouse",
    "ENSMMUG": "rhesus macaque",
    "ENSMFAG": "cynomolgus macaque",
    "ENSSSCG": "pig",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSGALG": "chicken",
}
SPECIES_NAMES = {
    "homo sapiens": "human",
    "ncbitaxon:9606": "human",
    "human": "human",
    "mus musculus": "mouse",
    "ncbitaxon:10090": "mouse",
    "mouse": "mouse",
    "macaca mulatta": "rhesus macaque",
    "ncbitaxon:9544": "rhesus macaque",
    "macaca fascicularis": "cynomolgus macaque",
    "ncbitaxon:9541": "cynomolgus macaque",
    "sus scrofa": "pig",
    "ncbitaxon:9823": "pig",
    "rattus norvegicus": "rat",
    "ncbitaxon:10116": "rat",
}
GENOMES = {"hg": "human", "grch": "human", "mm": "mouse", "grcm": "mouse"}
GENE_FEATURE_TYPES = frozenset({"gene expression", "gene", "rna", "gex", "mrna", ""})
GENE_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "symbol", "gene_ids", "gene_id")


class GeneIndex:
    """The genes that a model knows, and every other name by which a file may call them.

    Args:
        vocabulary: Gene symbol -> id. Names in angle brackets (`<pad>`, `<cls>`) are special tokens, not genes.
        aliases: Other name (previous symbol, alias, Ensembl id without version) -> symbol; or the whole document of
            `gene_aliases.json`, `{"aliases": ..., "orthologs": ...}`.
        orthologs: Species -> its gene symbol -> the human symbol of its one-to-one ortholog.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        aliases: Mapping[str, Any] | None = None,
        orthologs: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.vocabulary = {name: int(i) for name, i in vocabulary.items() if not re.fullmatch(r"<.*>", name)}
        if not self.vocabulary:
            raise ValueError(f"The gene vocabulary has no genes ({len(vocabulary)} entries, all special tokens).")
        aliases = aliases or {}
        if isinstance(aliases.get("aliases"), Mapping):
            aliases, orthologs = aliases["aliases"], aliases.get("orthologs")
        self.aliases = dict(aliases)
        self.orthologs = {species: dict(table) for species, table in (orthologs or {}).items()}
        # `C1orf112` is written `C1ORF112` by some; two symbols that differ by case only stay apart.
        folded = Counter(name.upper() for name in self.vocabulary)
        self._folded = {name.upper(): i for name, i in self.vocabulary.items() if folded[name.upper()] == 1}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """The names beyond the vocabulary, as `gene_aliases.json` stores them."""
        return {"aliases": self.aliases, "orthologs": self.orthologs}

    def lookup(self, name: str, species: str | None = None) -> tuple[int, str]:
        """Id of one name and how it was found: `symbol`, `ensembl`, `alias`, `case`, `ortholog`; -1 if it was not."""
        name = name.strip()
        if species in self.orthologs:
            human = self.orthologs[species].get(name)
            return (self.vocabulary.get(human, -1), "ortholog") if human is not None else (-1, "unmatched")
        found = self.vocabulary.get(name)
        if found is not None:
            return found, "symbol"
        ensembl = ENSEMBL.match(name)
        key = ensembl.group(1).upper() if ensembl else name
        found = self.vocabulary.get(key)  # a vocabulary of Ensembl ids
        if found is None:
            found = self.vocabulary.get(self.aliases.get(key))
        if found is not None:
            return found, "ensembl" if ensembl else "alias"
        if ensembl is None:
            embedded = EMBEDDED_ENSEMBL.search(name)
            if embedded:
                return self.lookup(embedded.group(1))
            if GENOME_PREFIX.match(name):
                return self.lookup(GENOME_PREFIX.sub("", name))
            if "." in name:  # R's make.names writes HLA-A as HLA.A
                found = self.vocabulary.get(name.replace(".", "-"))
                if found is not None:
                    return found, "alias"
            if species in (None, "human"):
                found = self._folded.get(name.upper())
                if found is not None:
                    return found, "case"
        return -1, "unmatched"


@dataclass
class GeneMatch:
    """Which variables of a file are which genes.

    Args:
        ids: int32 `(n_vars,)`: id in the vocabulary, -1 for what is not in it.
        how: `(n_vars,)` of str: symbol, ensembl, alias, case, ortholog, unmatched, or the feature type set aside.
        is_gene: bool `(n_vars,)`: False for antibodies, peaks and other features that were set aside.
        report: What was matched, as plain numbers and strings.
    """

    ids: np.ndarray
    how: np.ndarray
    is_gene: np.ndarray
    report: dict[str, Any]


def detect_species(names: Sequence[str], gene_index: GeneIndex | None = None) -> tuple[str, str]:
    """Species by the genes' names, and the evidence in words. `unknown` if the names do not tell."""
    prefixes = Counter()
    for name in names:
        ensembl = ENSEMBL.match(name) or EMBEDDED_ENSEMBL.search(name)
        if ensembl:
            prefixes[re.match(r"[A-Z]+", ensembl.group(1).upper()).group(0)] += 1
    n = max(1, len(names))
    if sum(prefixes.values()) > 0.3 * n:
        prefix, count = prefixes.most_common(1)[0]
        return SPECIES_PREFIXES.get(prefix, "unknown"), f"{count / n:.0%} of the names start with {prefix}"
    symbols = [GENOME_PREFIX.sub("", name) for name in names]
    mouse = sum(bool(MOUSE_SYMBOL.match(s)) for s in symbols) / n
    human = sum(bool(HUMAN_SYMBOL.match(s)) for s in symbols) / n
    if mouse > 0.5 and mouse > 2 * human:
        return "mouse", f"{mouse:.0%} of the symbols are written as mouse genes are (Cd3e)"
    if human > 0.5 and human > 2 * mouse:
        return "human", f"{human:.0%} of the symbols are written as human genes are (CD3E)"
    return "unknown", f"{human:.0%} of the names look human (CD3E), {mouse:.0%} mouse (Cd3e)"


def classify_features(names: Sequence[str], feature_types: Sequence[str] | None = None) -> np.ndarray:
    """Type of each variable: `gene`, or `antibody`, `peak`, `spike-in`, or the file's own word for another feature."""
    types = np.array(["gene"] * len(names), dtype=object)
    for i, name in enumerate(names):
        if PEAK.match(name):
            types[i] = "peak"
        elif SPIKE_IN.match(name):
            types[i] = "spike-in"
        elif ANTIBODY.search(name) and feature_types is None:
            types[i] = "antibody"
    if feature_types is not None:
        for i, feature_type in enumerate(feature_types):
            word = str(feature_type).strip().lower()
            if "antibod" in word or word in ("protein", "adt", "protein expression"):
                types[i] = "antibody"
            elif word in ("peaks", "peak", "chromatin accessibility"):
                types[i] = "peak"
            elif word not in GENE_FEATURE_TYPES:
                types[i] = word
    return types


def match_genes(
    names: Sequence[str] | Mapping[str, Sequence[str]],
    gene_index: GeneIndex,
    *,
    feature_types: Sequence[str] | None = None,
    organism: str | None = None,
    weights: np.ndarray | None = None,
) -> GeneMatch:
    """Match the variables of a file with the vocabulary.

    Args:
        names: Names of the variables, or several columns of names (the best one is used first, the others fill what it
            leaves open).
        gene_index: The model's genes.
        feature_types: 10x's `feature_types` of each variable; what is not a gene is set aside.
        organism: What the file says it is (name or NCBITaxon id); without it the names decide.
        weights: Expression of each variable, `(n_vars,)`, to weigh what matched.
    """
    columns = dict(names) if isinstance(names, Mapping) else {"var_names": names}
    columns = {key: [str(n).strip() for n in column] for key, column in columns.items()}
    n_vars = len(next(iter(columns.values())))
    types = np.full(n_vars, "gene", dtype=object)
    for column in columns.values():
        found = classify_features(column, feature_types)
        types = np.where(types == "gene", found, types)
    is_gene = types == "gene"

    declared = SPECIES_NAMES.get(str(organism).strip().lower()) if organism is not None else None
    guesses = {k: detect_species([n for n, g in zip(c, is_gene, strict=True) if g]) for k, c in columns.items()}
    detected, why = next((g for g in guesses.values() if g[0] != "unknown"), next(iter(guesses.values())))
    # Macaque and human symbols look alike: only the file can say. Mouse symbols speak for themselves.
    species = detected
    if declared is not None and (detected == "unknown" or declared.endswith("macaque") and detected == "human"):
        species = declared

    results = {}
    for key, column in columns.items():
        results[key] = [gene_index.lookup(n, species) if g else (-1, "") for n, g in zip(column, is_gene, strict=True)]
    order = sorted(results, key=lambda key: -sum(i >= 0 for i, _ in results[key]))
    ids = np.array([i for i, _ in results[order[0]]], dtype=np.int32).reshape(-1)
    how = np.array([h for _, h in results[order[0]]], dtype=object).reshape(-1)
    used = [order[0]]
    for key in order[1:]:
        fill = [v for v in np.flatnonzero((ids < 0) & is_gene) if results[key][v][0] >= 0]
        for v in fill:
            ids[v], how[v] = results[key][v]
        if fill:
            used.append(key)
    # `var_names_make_unique` turned the second MATR3 into MATR3-1: the same gene.
    base = set(columns[order[0]])
    for v in np.flatnonzero((ids < 0) & is_gene):
        name = columns[order[0]][v]
        stem = MADE_UNIQUE.sub("", name)
        if stem != name and stem in base:
            found, _ = gene_index.lookup(stem, species)
            if found >= 0:
                ids[v], how[v] = found, "duplicate"
    how[~is_gene] = types[~is_gene]

    n_genes, matched = int(is_gene.sum()), ids >= 0
    distinct = len(np.unique(ids[matched]))
    report = {
        "variables": n_vars,
        "genes": n_genes,
        "matched": int(matched.sum()),
        "share_matched": _number(matched.sum() / max(1, n_genes)),
        "vocabulary": len(gene_index),
        "vocabulary_measured": distinct,
        "duplicates_summed": int(matched.sum()) - distinct,
        "columns": used,
        "species": species,
        "species_evidence": why,
        "how": {str(k): int(v) for k, v in Counter(how[is_gene].tolist()).items()},
        "set_aside": {str(k): int(v) for k, v in Counter(types[~is_gene].tolist()).items()},
    }
    if declared is not None:
        report["species_declared"] = declared
    unmatched = np.flatnonzero(~matched & is_gene)
    if weights is not None:
        total = float(weights[is_gene].sum())
        report["share_expression_matched"] = _number(weights[matched].sum() / total) if total > 0 else 0.0
        unmatched = unmatched[np.argsort(-weights[unmatched], kind="stable")]
        if total > 0:
            report["largest_unmatched_shares"] = [_number(weights[v] / total) for v in unmatched[:10]]
    report["largest_unmatched"] = [columns[order[0]][v] for v in unmatched[:10]]
    return GeneMatch(ids, how, is_gene, report)


def _check_match(match: GeneMatch, gene_index: GeneIndex, *, force: bool, messages: list[str]) -> None:
    """Warn under 60 % of the genes, refuse under 20 %: of the file's genes or of the vocabulary's, the smaller set."""
    r = match.report
    possible = max(1, min(r["genes"], len(gene_index)))
    share = r["vocabulary_measured"] / possible
    examples = ", ".join(r["largest_unmatched"][:5])
    species = r["species"]
    if species not in ("human", "unknown") and species not in gene_index.orthologs:
        way_out = (
            f"The genes look like {species} ({r['species_evidence']}), and this checkpoint has no ortholog table for "
            f"it (it has: {', '.join(sorted(gene_index.orthologs)) or 'none'}). Map them to human symbols first."
        )
    else:
        way_out = "Name the `var` column of gene symbols or Ensembl ids with `gene_column=`."
    if not r["genes"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in r["set_aside"].items())
        raise ValueError(
            f"None of the {r['variables']} variables is a gene ({kinds or 'no variables'}). "
            "This model reads gene expression: pass the RNA part of the data."
        )
    too_few = (
        r["vocabulary_measured"] < MIN_GENES
        and possible >= MIN_GENES * 2
        or (r["vocabulary_measured"] < MIN_GENES and len(gene_index) >= 10 * MIN_GENES)
    )
    if r["vocabulary_measured"] == 0 or ((share < REFUSE_SHARE or too_few) and not force):
        raise ValueError(
            f"Only {r['vocabulary_measured']} of {possible} genes match the model's vocabulary "
            f"({share:.1%}; unmatched: {examples}). {way_out}"
            + ("" if r["vocabulary_measured"] == 0 else " Or pass `force=True` if that is what you want.")
        )
    if share < WARN_SHARE or too_few:
        messages.append(
            f"{r['vocabulary_measured']} of {possible} genes match the model's vocabulary "
            f"({share:.1%}; unmatched: {examples}). {way_out}"
        )
    declared = r.get("species_declared")
    if declared and species not in (declared, "unknown"):
        messages.append(f"The data say {declared}, but {r['species_evidence']}: read as {species}.")
    if species in gene_index.orthologs:
        messages.append(
            f"{species.capitalize()} genes were mapped to human ones by {r['how'].get('ortholog', 0)} one-to-one "
            f"orthologs of {r['genes']} genes; the model was made for human cells: interpret with caution."
        )


# ---------------------------------------------------------------------------------------------------------------------
# AnnData -> Cells
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class InputPlan:
    """How one dataset is read: decided once, applied to every chunk of it.

    Args:
        source: `X`, `raw` or a layer's name.
        verdict: What that matrix holds.
        match: Its genes.
        report: Everything that was found out; grows while chunks are converted.
    """

    source: str
    verdict: MatrixVerdict
    match: GeneMatch
    report: dict[str, Any]

    def convert(self, adata: Any) -> Cells:
        """Cells of `adata`, or of any chunk of the data that the plan was made for (same variables)."""
        parts = list(self.iter_cells(adata))
        return parts[0] if len(parts) == 1 else Cells.concatenate(parts)

    def iter_cells(self, adata: Any, chunk_size: int | None = None) -> Iterator[Cells]:
        """Cells of `adata`, `chunk_size` at a time (by default as many as are quick to convert at once)."""
        matrix = _row_major(_matrix(adata, self.source))
        n_cells, n_vars = matrix.shape
        if n_vars != len(self.match.ids):
            raise ValueError(
                f"{self.source} has {n_vars} variables, but its plan was made for {len(self.match.ids)}: "
                "chunks of one dataset have the same variables. Make a new plan with `plan_input`."
            )
        if chunk_size is None:
            chunk_size = CHUNK_ROWS
            if not hasattr(matrix[:0], "tocsr"):
                chunk_size = max(1, min(CHUNK_ROWS, DENSE_CHUNK_VALUES // max(1, n_vars)))
        names = [str(n) for n in adata.obs_names]
        var_names = _variables(adata, self.source).index
        cell_ids = hash_names(names)
        for start in range(0, max(n_cells, 1), chunk_size):
            here = slice(start, min(start + chunk_size, n_cells))
            rows = read_rows(matrix, here.start, here.stop)
            _check_values(rows, names[here], var_names, self.source)
            counts, totals, failed = _convert_rows(rows.columns(self.match.is_gene), self.verdict)
            cells = Cells.from_csr(counts, self.match.ids, cell_ids=cell_ids[here])
            cells.total_counts = totals.astype(np.float32)
            self._count(cells, failed)
            yield cells

    def _count(self, cells: Cells, failed: int) -> None:
        lengths = np.diff(cells.indptr)
        report = self.report["cells"]
        report["converted"] = report.get("converted", 0) + len(cells)
        report["without_genes"] = report.get("without_genes", 0) + int((lengths == 0).sum())
        if self.verdict.exact:
            report["counts_not_recovered"] = report.get("counts_not_recovered", 0) + failed


def _matrix(adata: Any, source: str) -> Any:
    if source == "X":
        return adata.X
    return adata.raw.X if source == "raw" else adata.layers[source]


def _variables(adata: Any, source: str) -> Any:
    """The table of variables (`var`) that belongs to a matrix."""
    return adata.raw.var if source == "raw" else adata.var


def _check_values(rows: CountRows, names: Sequence[str], var_names: Any, source: str) -> None:
    """Refuse a value that no count, normalised or log value can be, naming its cell and gene."""
    if np.issubdtype(rows.data.dtype, np.unsignedinteger) or not len(rows.data):
        return
    if rows.data.min() >= 0 and np.isfinite(rows.data.max()):  # NaN fails both
        return
    bad = np.flatnonzero(~np.isfinite(rows.data) | (rows.data < 0))
    cell = int(np.searchsorted(rows.indptr, bad[0], side="right")) - 1
    raise ValueError(
        f"{source} holds {rows.data[bad[0]]} at cell {names[cell]!r}, gene {str(var_names[rows.indices[bad[0]]])!r} "
        f"({len(bad)} such values in these {rows.shape[0]} cells): expression is finite and not negative. "
        "Drop those cells or genes, or pass another `layer=`."
    )


def _known_totals(adata: Any) -> tuple[str | None, np.ndarray | None]:
    for column in TOTAL_COLUMNS:
        if column in adata.obs:
            totals = np.asarray(adata.obs[column])
            if np.issubdtype(totals.dtype, np.number) and np.isfinite(totals).all() and (totals > 0).any():
                return column, totals.astype(np.float64)
    return None, None


def _candidates(adata: Any) -> list[str]:
    """Matrices of an AnnData in the order in which equals are preferred."""
    layers = list(adata.layers.keys())
    counts = [name for name in COUNT_LAYERS for layer in layers if layer.lower() == name]
    counts = [layer for name in counts for layer in layers if layer.lower() == name]
    found = list(dict.fromkeys(counts))
    if getattr(adata, "raw", None) is not None:
        found.append("raw")
    if getattr(adata, "X", None) is not None:
        found.append("X")
    return found + [layer for layer in layers if layer not in found]


def _rank(source: str, verdict: MatrixVerdict) -> int | None:
    """How good a matrix is to read; `None` if it is not to be chosen unasked."""
    if not verdict.usable or source.lower() in PARTIAL_LAYERS:
        return None
    if verdict.evidence.get("binary"):
        return 6
    if verdict.kind == "raw_integer":
        return 0
    if verdict.kind == "raw_float":
        return 1
    return 2 if verdict.exact else {"normalized": 3, "log1p": 4, "log1p_log1p": 5}[verdict.kind]


def plan_input(
    adata: Any,
    gene_index: GeneIndex,
    *,
    layer: str | None = None,
    assume: str | None = None,
    gene_column: str | None = None,
    organism: str | None = None,
    force: bool = False,
) -> InputPlan:
    """Decide how to read an AnnData: which matrix, what its values are, which variables are genes.

    Args:
        adata: AnnData, in memory, backed or a view; or a MuData, whose `rna` part is read.
        gene_index: The model's genes.
        layer: `X`, `raw` or a layer's name, instead of the best matrix found.
        assume: What that matrix holds (one of `ASSUMABLE`), instead of the verdict.
        gene_column: Column of `var` with gene names or ids, instead of the best ones found.
        organism: Species (`human`, `mouse`, `Mus musculus`, `NCBITaxon:10090`, ...), instead of what the data say.
        force: Read data of which under 20 % of the genes match.

    Raises:
        ValueError: if there are no cells, no usable matrix or (almost) no matching genes.
    """
    adata = _modality(adata)
    messages: list[str] = []
    n_cells, n_vars = adata.shape
    if not n_cells or not n_vars:
        raise ValueError(f"The data hold {n_cells} cells and {n_vars} variables: there is nothing to read.")
    column, totals = _known_totals(adata)

    # step 1: which matrix
    names = _candidates(adata)
    if layer is not None:
        if layer not in names:
            raise ValueError(f"layer={layer!r} is not in the data; it has {', '.join(names)}.")
        names = [layer]
    verdicts = {name: inspect_matrix(_matrix(adata, name), totals=totals) for name in names}
    if assume is not None:
        verdicts = {name: _assumed(assume, verdict) for name, verdict in verdicts.items()}
    ranked = {name: _rank(name, verdict) for name, verdict in verdicts.items()}
    if layer is not None and verdicts[layer].usable:
        ranked[layer] = 0
    usable = [name for name in names if ranked[name] is not None]
    if not usable:
        raise ValueError(
            " ".join(_unusable(name, verdict) for name, verdict in verdicts.items() if not verdict.usable)
            or f"Only partial counts were found ({', '.join(names)}): name one with `layer=` to read it all the same."
        )
    source = min(usable, key=lambda name: ranked[name])
    verdict = verdicts[source]

    # step 2: which genes
    var = _variables(adata, source)
    columns = _gene_columns(var, gene_column)
    declared = organism or _declared_organism(adata)
    sample = sample_rows(_row_major(_matrix(adata, source)))
    linear, _ = _linearize(sample.data, logs=verdict.logs, base=verdict.base, precision=verdict.precision)
    weights = np.bincount(sample.indices, weights=linear, minlength=len(var))
    feature_types = None
    for name in ("feature_types", "feature_type", "modality"):
        if name in var:
            feature_types = [str(t) for t in var[name]]
            break
    match = match_genes(columns, gene_index, feature_types=feature_types, organism=declared, weights=weights)
    _check_match(match, gene_index, force=force, messages=messages)

    # step 3: what else is odd
    obs_names = np.asarray([str(n) for n in adata.obs_names], dtype=object)
    n_duplicates = len(obs_names) - len(set(obs_names.tolist()))
    if n_duplicates:
        example = Counter(obs_names.tolist()).most_common(1)[0][0]
        messages.append(
            f"{n_duplicates} of {n_cells} barcodes are repeated (such as {example!r}): cells of the same barcode "
            "share their random draws. Make them unique with `adata.obs_names_make_unique()`."
        )
    messages += _matrix_messages(source, verdict, n_cells)
    report = {
        "matrix": {
            "chosen": source,
            "why": "asked for" if layer is not None else _why(source, verdicts),
            "candidates": {name.replace("/", "_"): v.to_dict() for name, v in verdicts.items()},
            "totals_column": column or "",
        }
        | verdict.to_dict(),
        "genes": match.report,
        "cells": {"cells": n_cells, "duplicated_barcodes": n_duplicates},
        "warnings": messages,
    }
    for message in messages:
        logger.warning(message)
    return InputPlan(source, verdict, match, report)


def _modality(adata: Any) -> Any:
    modalities = getattr(adata, "mod", None)
    if not isinstance(modalities, Mapping):
        return adata
    for name in ("rna", "gex", "RNA", "GEX"):
        if name in modalities:
            return modalities[name]
    raise ValueError(
        f"The MuData has no `rna` modality (it has {', '.join(modalities)}). Pass the AnnData of the RNA."
    )


def _gene_columns(var: Any, gene_column: str | None) -> dict[str, list[str]]:
    if gene_column is not None:
        if gene_column in ("index", "var_names"):
            return {"var_names": [str(n) for n in var.index]}
        if gene_column not in var:
            raise ValueError(f"gene_column={gene_column!r} is not in var; it has {', '.join(map(str, var.columns))}.")
        return {gene_column: [str(n) for n in var[gene_column]]}
    columns = {"var_names": [str(n) for n in var.index]}
    for name in var.columns:
        values = var[name]
        kind = getattr(values.dtype, "kind", "O")
        if kind in "OSUT" or str(values.dtype) in ("category", "string", "str"):
            values = [str(v) for v in values]
            # A column of a few words (feature_types, genome, chromosome) names no genes.
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


def _why(source: str, verdicts: dict[str, MatrixVerdict]) -> str:
    others = ", ".join(f"{name}: {v.kind}" for name, v in verdicts.items() if name != source)
    return f"the nearest to raw counts (others: {others})" if others else "the only matrix"


def _matrix_messages(source: str, verdict: MatrixVerdict, n_cells: int) -> list[str]:
    e, messages = verdict.evidence, []
    if e.get("binary"):
        messages.append(f"{source} holds only 0 and 1: it was binarised, and expression levels are lost.")
    if verdict.kind == "raw_float":
        messages.append(
            f"{source} holds nearly integer counts ({e.get('share_near_integer', 0):.0%} within 0.15 of an integer; "
            "ambient-corrected or multi-mapped): they are rounded. Pass `assume='normalized'` to keep the fractions."
        )
    if verdict.kind == "log1p_log1p":
        messages.append(f"{source} is the logarithm of a logarithm: both were undone. Check how the file was made.")
    if verdict.kind == "log1p" and not verdict.exact:
        messages.append(
            f"{source} looks like log(1 + x) of normalised values; counts cannot be recovered, so the values are "
            "taken back to the linear scale. Ranks within a cell, and so the model's bins, are those of the counts."
        )
    return messages


def read_cells(
    adata: Any,
    gene_index: GeneIndex,
    *,
    layer: str | None = None,
    assume: str | None = None,
    gene_column: str | None = None,
    organism: str | None = None,
    force: bool = False,
) -> tuple[Cells, dict[str, Any]]:
    """Read an AnnData into `Cells`, with a report of what was found and done. See `plan_input` for the arguments.

    The AnnData is not altered; `store_report` writes the report to `uns["scmmgpt"]` if that is wanted.
    """
    adata = _modality(adata)
    plan = plan_input(
        adata,
        gene_index,
        layer=layer,
        assume=assume,
        gene_column=gene_column,
        organism=organism,
        force=force,
    )
    cells = plan.convert(adata)
    finish_report(plan.report)
    return cells, plan.report


def iter_cells(adata: Any, gene_index: GeneIndex, *, chunk_size: int = CHUNK_ROWS, **options: Any) -> Iterator[Cells]:
    """Read (backed) data in chunks of `chunk_size` cells; together they are the cells of `read_cells`.

    Args:
        adata: As for `plan_input`, of which `options` are the keyword arguments.
        gene_index: The model's genes.
        chunk_size: Cells per chunk. It changes no cell.
        **options: `layer`, `assume`, `gene_column`, `organism`, `force`.
    """
    adata = _modality(adata)
    plan = plan_input(adata, gene_index, **options)
    yield from plan.iter_cells(adata, chunk_size)
    finish_report(plan.report)


def finish_report(report: dict[str, Any]) -> None:
    """Add the warnings that only the converted cells can tell."""
    cells = report["cells"]
    converted = cells.get("converted", 0)
    if cells.get("without_genes"):
        if cells["without_genes"] == converted:
            raise ValueError(
                f"None of the {converted} cells expresses a gene of the vocabulary: every value of the matched genes "
                "is zero. Is it the right layer?"
            )
        message = (
            f"{cells['without_genes']} of {converted} cells express no gene of the vocabulary: they are kept, empty."
        )
        report["warnings"].append(message)
        logger.warning(message)
    if cells.get("counts_not_recovered"):
        message = (
            f"In {cells['counts_not_recovered']} of {converted} cells the values are not multiples of one unit: they "
            "keep their normalised values."
        )
        report["warnings"].append(message)
        logger.warning(message)


def store_report(adata: Any, report: dict[str, Any]) -> None:
    """Write a report to `adata.uns["scmmgpt"]["input"]`, in types that `.h5ad` files hold."""
    adata.uns.setdefault("scmmgpt", {})["input"] = _storable(report)


def _storable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k).replace("/", "_"): _storable(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return np.array(value, dtype=object if any(isinstance(v, str) for v in value) else None)
    return value


__all__ = [
    "ASSUMABLE",
    "CountRows",
    "GeneIndex",
    "GeneMatch",
    "InputPlan",
    "KINDS",
    "MatrixVerdict",
    "classify_features",
    "detect_species",
    "finish_report",
    "inspect_matrix",
    "iter_cells",
    "match_genes",
    "plan_input",
    "read_cells",
    "store_report",
    "to_counts",
]
