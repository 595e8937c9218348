"""What the values of an expression matrix are, and how they become counts.

What each kind of matrix gets:

- `raw_integer`: every value is an integer. Taken as it is.
- `raw_float`: values cluster at integers (ambient-corrected, multi-mapped reads). Rounded to the nearest integer.
- `normalized`: totals are constant, or each cell's values are multiples of one unit, or they are plainly fractions on
  a linear scale. With a unit, counts are recovered exactly; else values are taken as they are (ranks do not change).
- `log1p`: the same after `base**x - 1`, or a range that only logarithms have. Undone, then as `normalized`.
- `log1p_log1p`: the same after undoing two logarithms. Undone twice, with a warning.
- `sqrt`: the same after squaring. Squared.
- `scaled`: negative values, or genes of equal variance. Refused: z-scores do not tell zero from low, and genes that
  were each divided by their deviation do not tell high from low.
- `invalid`: NaN or infinite values. Refused, naming the first cell and gene.
- `unknown`: none of these. Taken as they are, with a warning; ranks, and so scGPT's bins, are right on any scale.
- `empty`: no value above zero. Refused.
- `one_cell`: one cell without zeros, whose least value is frequent: zero with a pseudo-count or one count? Refused.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .cells_scmmgpt import segment
from .rows_scmmgpt import LARGEST_VALUE, CountRows, is_expression, row_major, sample_rows


ROUNDED = "rounded to the nearest integer"
MAX_UNIT = 6  # the smallest value of a cell is tried as 1 .. MAX_UNIT counts

MAX_LIBRARY = 1e7  # counts of a cell: more in half of the cells are decimals that were taken for counts
# Logarithms, their base by name and by value, and the power that undoes a root. Squares of counts are counts: last.
SCALES = (
    (0, "e", np.e, 1),
    (1, "e", np.e, 1),
    (1, "2", 2.0, 1),
    (1, "10", 10.0, 1),
    (2, "e", np.e, 1),
    (0, "e", np.e, 2),
)
LIKELY_TOTALS = (1e4, 1e6, 1e5, 1e3)
FREQUENT, N_LOWEST = 0.005, 3  # least share of the values, and number, of integers that values may cluster at
TOTALS_COLUMN = "obs column of totals"
# A matrix is scaled if this share of the genes has a standard deviation of about 1. The largest share of unscaled
# values is 0.84 (panels of 110 to 500 genes, logarithms by size factors); scaled files have 1.00, and 100 cells of a
# scaled file 0.66 to 0.99 (`train/LOG.md`).
SCALED_SHARE, ABOUT_ONE, MIN_SCALED_GENES, MIN_SCALED_CELLS = 0.9, (0.8, 1.25), 100, 20


class Precision(NamedTuple):
    """Rounding of values when they were stored."""

    absolute: float = 0.0  # half the last decimal that is kept
    relative: float = 2.0**-22  # of the number type
    digits: int | None = None  # significant digits that are kept

    def error(self, values: np.ndarray) -> np.ndarray:
        """Half-width of the rounding of each value, all above zero; float64."""
        error = np.maximum(self.absolute, self.relative * values)
        if self.digits is not None:
            error = np.maximum(error, 0.5 * 10.0 ** (np.floor(np.log10(values)) - self.digits + 1))
        return error


@dataclass(frozen=True)
class MatrixVerdict:
    """What the values of a matrix are, the evidence for it, and how they are converted."""

    kind: str  # one of those at the top of this file
    conversion: str | None  # what `convert_rows` does with the values; None if the matrix cannot be used
    evidence: dict[str, Any] = field(default_factory=dict)  # of the sampled rows
    logs: int = 0  # how many times log(1 + x) was applied: 0, 1 or 2
    base: float = np.e  # of the logarithm
    power: int = 1  # of the values once no logarithm is left: 2 undoes a square root
    exact: bool = False  # whether each cell's values are multiples of one unit, so that counts can be recovered
    target_sum: float | None = None  # total per cell before the logarithm, over all genes of the original data
    complete: bool = False  # whether the genes of the matrix are those that the target sum was taken over
    precision: Precision = Precision()
    floor: float = 0.0  # the value that zeros have, such as log(0 + pseudo-count); it is subtracted first

    @property
    def usable(self) -> bool:
        """Whether the values can be converted to counts or to normalised values."""
        return self.conversion is not None

    def linearize(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`values` on a linear scale; see [`linearize`]."""
        return linearize(values, logs=self.logs, base=self.base, precision=self.precision, power=self.power)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as the report holds it."""
        report: dict[str, Any] = {"kind": self.kind, "conversion": self.conversion or "none"}
        report["evidence"] = dict(self.evidence)
        if self.floor:
            report["floor"] = _number(self.floor)
        if self.logs:
            report["log_base"] = "e" if self.base == np.e else f"{self.base:g}"
        if self.target_sum is not None:
            report["target_sum"] = float(self.target_sum)
        return report


def _storage_precision(values: np.ndarray) -> Precision:
    """The rounding of `values`, all above zero, from their type, decimals and significant digits.

    Rounded values (scanpy's `pbmc68k_reduced` keeps three decimals) must not count as evidence against integers.
    """
    # A float logarithm and its inverse each cost about an ulp; four are allowed. Float64 values were often float32.
    kind = values.dtype if np.issubdtype(values.dtype, np.floating) else np.dtype(np.float32)
    relative = 4 * float(max(np.finfo(kind).eps, np.finfo(np.float32).eps / 2))
    sample = np.unique(values[:: max(1, len(values) // 20000)].astype(np.float64))

    def fits(scaled: np.ndarray) -> bool:
        return bool(np.all(np.abs(scaled - np.rint(scaled)) <= np.maximum(1e-6, scaled * relative)))

    magnitude = np.floor(np.log10(sample))
    decimals = next((d for d in range(1, 6) if sample.max() * 10.0**d < 1e6 and fits(sample * 10.0**d)), None)
    digits = next((d for d in range(3, 7) if fits(sample / 10.0 ** (magnitude - d + 1))), None)
    if digits is not None and decimals is not None and magnitude.max() - digits + 1 <= -decimals:
        digits = None  # the decimals say as much
    return Precision(0.0 if decimals is None else 0.5 * 10.0**-decimals, relative, digits)


def linearize(
    values: np.ndarray, *, logs: int, base: float, precision: Precision, power: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Undo `logs` logarithms, then raise to `power`. Returns float64 values and the half-width of their rounding."""
    linear = values.astype(np.float64)
    error = precision.error(linear)
    scale = np.log(base)
    for _ in range(logs):
        with np.errstate(over="ignore", invalid="ignore"):
            linear = np.expm1(linear * scale)
            error = (linear + 1.0) * np.expm1(error * scale)
    return (linear, error) if power == 1 else (linear**power, (linear + error) ** power - linear**power)


class _Units(NamedTuple):
    """Per-cell size of one count, where a cell's values are integer multiples of one unit."""

    unit: np.ndarray  # float64 (n_cells,); NaN where none was found
    counts: np.ndarray  # float64 (nnz,): values / unit, rounded; only meaningful where a unit was found
    evidence: np.ndarray  # float64 (n_cells,): minus log10 of the probability that such a fit is chance


def _find_units(linear: np.ndarray, error: np.ndarray, indptr: np.ndarray, *, weigh: bool = True) -> _Units:
    """Find, for each cell, the largest unit of which all its values are integer multiples.

    In a UMI matrix divided by each cell's total, every value is `k * unit`, and the smallest is nearly always one
    count. The smallest is tried as 1, 2, .. `MAX_UNIT` counts. A value is evidence for or against a unit only if its
    rounding is below 0.1 counts. `weigh=False` skips the evidence where the verdict is known, which saves time.
    """
    n_cells = len(indptr) - 1
    lengths = np.diff(indptr)
    smallest = segment(np.minimum, linear, indptr, np.nan)
    found = np.full(n_cells, np.nan)
    evidence = np.zeros(n_cells)
    counts = np.zeros(len(linear))
    pending, every = np.flatnonzero(lengths), slice(None)
    entries: slice | np.ndarray
    for multiple in range(1, MAX_UNIT + 1):
        if not len(pending):
            break
        entries, pointer = every, indptr
        if len(pending) < n_cells:
            entries = np.repeat(np.isin(np.arange(n_cells), pending), lengths)
            pointer = np.concatenate(([0], np.cumsum(lengths[pending])))
        row_lengths = lengths[pending]
        values, errors = linear[entries], error[entries]
        first = np.repeat(smallest[pending], row_lengths)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = values * (multiple / first)
            # The unit is a stored value too, with the rounding of the smallest one.
            smallest_error = np.repeat(segment(np.minimum, errors, pointer), row_lengths)
            tolerance = 1.5 * (multiple * errors + ratio * smallest_error) / first + 1e-7
            nearest = np.rint(ratio)
            telling = (tolerance < 0.1) & (ratio > multiple * (1 + 1e-4))
            off = telling & ~(np.abs(ratio - nearest) <= tolerance)
        wrong = segment(np.add, off.astype(np.int64), pointer)
        support = np.zeros(len(pending))
        if weigh or multiple > 1:
            chance = np.where(telling, -np.log10(np.minimum(2 * tolerance, 1.0) + 1e-12), 0.0)
            support = segment(np.add, chance, pointer)
        fits = (wrong <= 0.002 * row_lengths) & np.isfinite(segment(np.maximum, ratio, pointer))
        if multiple > 1:
            fits &= support > 3  # each further multiple is another chance to fit by accident
        rows = pending[fits]
        if len(rows):
            # Averaged over all small counts, the unit is far more precise than its one smallest value.
            chosen = np.repeat(fits, row_lengths)
            small = chosen & (tolerance < 0.1)
            total_value = segment(np.add, np.where(small, values, 0.0), pointer)[fits]
            total_count = segment(np.add, np.where(small, nearest, 0.0), pointer)[fits]
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
    """1e4, 1e5, ... if `total` is that within 0.2 %, else the total itself to five digits."""
    return next((likely for likely in LIKELY_TOTALS if abs(total / likely - 1) < 0.002), _number(total))


def inspect_matrix(matrix: Any) -> MatrixVerdict:
    """The verdict on a matrix of expression values, from a sample of its rows; nothing is converted.

    `matrix` is `(n_cells, n_vars)`: a NumPy, SciPy, HDF5, Zarr, Dask or backed AnnData matrix, of genes alone.

    >>> inspect_matrix(np.array([[1, 0, 3], [0, 2, 5]])).kind
    'raw_integer'
    """
    return inspect_rows(sample_rows(row_major(matrix)))


def inspect_rows(
    rows: CountRows, known_totals: np.ndarray | None = None, *, says_log1p: bool = False
) -> MatrixVerdict:
    """The verdict on sampled rows; see [`inspect_matrix`].

    Args:
        rows: Sampled rows, of genes only: proteins are often normalised in another way.
        known_totals: Counts per cell over all genes, `(n_cells,)`: evidence of the target sum where genes are missing.
        says_log1p: Whether the file claims a logarithm (scanpy's `uns["log1p"]`); used where nothing is proven.
    """
    verdict = _inspect_above_zero(rows, known_totals, says_log1p=says_log1p)
    counted = verdict.exact and not verdict.logs and verdict.power == 1
    if counted or verdict.kind == "invalid" or not (floor := rows.floor()):
        return verdict
    if floor > 0 and rows.shape[0] == 1:  # two cells tell: one normalised count has a value of its own in each
        return MatrixVerdict("one_cell", None, verdict.evidence | {"floor": _number(floor)})
    above = replace(_inspect_above_zero(rows.above(floor), known_totals, says_log1p=says_log1p), floor=floor)
    # Scaled values have a least value, too. log(counts + 2) is the logarithm of other integers plus 1, and the square
    # of 2 * sqrt(counts + 3/8) is half an integer.
    return above if above.exact or (floor > 0 and (not verdict.exact or verdict.power > 1)) else verdict


def _inspect_above_zero(rows: CountRows, known_totals: np.ndarray | None, *, says_log1p: bool) -> MatrixVerdict:
    """The verdict on rows where zero is the absence of expression."""
    values = rows.data
    evidence: dict[str, Any] = {"cells_sampled": int(rows.shape[0]), "dtype": str(values.dtype)}
    if not len(values):
        return MatrixVerdict("empty", None, evidence)
    if not is_expression(values, signed=True):
        wrong = ~(np.abs(values.astype(np.float64)) <= LARGEST_VALUE)
        n_nan = int(np.isnan(values).sum())
        evidence |= {"nan": n_nan, "too_large": int(wrong.sum()) - n_nan, "first_at": rows.locate(wrong)}
        return MatrixVerdict("invalid", None, evidence)
    sums = rows.row_sums()
    evidence |= {
        "share_nonzero": _number(len(values) / max(1, rows.shape[0] * rows.shape[1])),
        "min": _number(values.min()),
        "max": _number(values.max()),
        "share_integer": _number((values == np.rint(values)).mean()),
        "total_median": _number(np.median(sums)),
        "total_cv": _number(_spread(sums)),
    }
    if values.min() < 0:
        evidence["share_negative"] = _number((values < 0).mean())
        evidence["first_at"] = rows.locate(values < 0)
        return MatrixVerdict("scaled", None, evidence)
    if evidence["share_integer"] == 1:
        if values.max() == 1:
            evidence["binary"] = True
        return MatrixVerdict("raw_integer", "taken as they are", evidence)
    precision = _storage_precision(values)
    if precision.absolute:
        evidence["decimals"] = round(-np.log10(2 * precision.absolute))
    if precision.digits is not None:
        evidence["digits"] = precision.digits
    fit = _find_scale(rows, precision)
    if fit is not None and evidence["share_integer"] >= 0.5:
        # Counts of which some were corrected, or binary logarithms or roots of counts: 1 stays 1.
        keeps_one = (fit["base"] == 2 or fit["power"] == 2) and fit["integral"] > 0
        fit = fit if keeps_one and np.nanmax(np.abs(fit["unit"] - 1)) < 1e-3 else None
    if fit is not None:
        return _exact_verdict(fit, precision, evidence, known_totals)
    return _plausible_verdict(rows, precision, evidence, says_log1p=says_log1p)


def _find_scale(rows: CountRows, precision: Precision) -> dict[str, Any] | None:
    """The scale on which totals are constant or values are multiples of a unit; `None` if there is none."""
    best, best_score = None, (0, 0.0)
    for logs, name, base, power in SCALES:
        if logs == 1 and rows.data.max() * np.log(base) > 30 or logs == 2 and rows.data.max() > 3.2:
            continue  # more than 1e13 counts of a gene: not this scale
        if power > 1 and best is not None and best["integral"] and not best["logs"]:
            continue  # squares of counts are counts, also of counts that were divided by the length of their cell
        linear, error = linearize(rows.data, logs=logs, base=base, precision=precision, power=power)
        totals = rows.row_sums(linear)
        units = _find_units(linear, error, rows.indptr)
        found = np.isfinite(units.unit)
        integral = float(found[np.diff(rows.indptr) > 0].mean())
        if integral < 0.9 or units.evidence[found].sum() < 6:  # a fit by chance in one data set of a million
            integral = 0.0
        if integral and _is_decimal(units.unit[found], totals[found]):
            integral = 0.0
        n_totals = int((totals > 0).sum())
        constant = n_totals > 1 and _spread(totals) < max(2e-3, 20 * precision.relative)
        constant = constant and not (power > 1 and not integral and abs(np.median(totals) - 1) < 0.01)  # lengths of 1
        # The totals of two or three cells may agree by chance.
        constant = constant and (
            n_totals > 3 or integral > 0 or _nice_total(float(np.median(totals))) in LIKELY_TOTALS
        )
        if (constant + (integral > 0), integral) > best_score:
            best_score = (constant + (integral > 0), integral)
            uncertain = float((error > 0.5 * np.repeat(units.unit, np.diff(rows.indptr))).mean())
            best = {"logs": logs, "name": name, "base": base, "power": power, "totals": totals, "unit": units.unit}
            best |= {"integral": integral, "constant": constant, "uncertain": uncertain}
        if best_score[0] == 2:
            break
    return best


def _is_decimal(unit: np.ndarray, totals: np.ndarray) -> bool:
    """Whether the one unit of all cells is the last decimal of the values, such as 0.01 TPM, and no count."""
    place = np.log10(np.median(unit))
    a_decimal = place < -0.5 and abs(place - np.rint(place)) < 1e-3 and _spread(unit) < 1e-4
    return bool(a_decimal and np.median(totals / unit) > MAX_LIBRARY)


def _exact_verdict(
    fit: dict[str, Any], precision: Precision, evidence: dict, known_totals: np.ndarray | None
) -> MatrixVerdict:
    """A matrix whose scale is proven: constant totals, or integer multiples of a unit, or both."""
    logs, exact, unit, totals = fit["logs"], fit["integral"] > 0, fit["unit"], fit["totals"]
    has_unit = np.isfinite(unit)
    evidence["share_cells_integral"] = _number(fit["integral"])
    if exact and fit["uncertain"] > 1e-3:
        evidence["share_uncertain"] = _number(fit["uncertain"])
    target_sum = None
    if exact and np.all(np.abs(unit[has_unit] - 1) < 1e-3):
        if not logs and fit["power"] == 1:
            evidence["share_near_integer"] = 1.0
            return MatrixVerdict("raw_float", ROUNDED, evidence, precision=precision)
        evidence["unit"] = 1.0  # logarithms or roots of the counts themselves
    elif fit["constant"]:
        target_sum = _nice_total(float(np.median(totals[totals > 0])))
        evidence["target_sum_from"] = "constant totals"
    else:
        target_sum, source = _target_sum(unit[has_unit], totals[has_unit], precision, known_totals, has_unit)
        evidence["target_sum_from"] = source
    if target_sum is not None:
        evidence["target_sum"] = _number(target_sum)
    undo = ("", f"{fit['name']}**x - 1, ", "exp(exp(x) - 1) - 1, ")[logs] if fit["power"] == 1 else "x**2, "
    return MatrixVerdict(
        ("normalized", "log1p", "log1p_log1p")[logs] if fit["power"] == 1 else "sqrt",
        undo + ("each cell divided by its unit: integer counts" if exact else "then as they are: normalised values"),
        evidence,
        logs=logs,
        base=fit["base"],
        power=fit["power"],
        exact=exact,
        target_sum=target_sum,
        complete=fit["constant"],
        precision=precision,
    )


def _target_sum(
    unit: np.ndarray, totals: np.ndarray, precision: Precision, known_totals: np.ndarray | None, has_unit: np.ndarray
) -> tuple[float | None, str]:
    """The total of normalised values before genes were removed, and the evidence for it."""
    if len(unit) > 1 and _spread(unit) < 1e-4:
        return None, "one factor for all cells"
    if known_totals is not None:
        products = known_totals[has_unit] * unit
        if _spread(products) < 0.01:
            return _nice_total(float(np.median(products))), TOTALS_COLUMN
    likely = [total for total in LIKELY_TOTALS if np.all(total / unit >= totals / unit * 0.999)]
    for total in likely:
        sizes = total / unit
        unrounded = not precision.absolute and precision.digits is None
        precise = np.median(sizes) * precision.relative < 5e-3
        if unrounded and precise and np.mean(np.abs(sizes - np.rint(sizes)) < 0.1) > 0.9:
            return total, "library sizes become integers"
    return (likely[0], "assumed") if likely else (None, "unknown")


def _share_near_integer(values: np.ndarray) -> float:
    """Share of values within 0.15 of an integer: of all, or of the lowest frequent integers if these have less.

    By chance 0.30. Counts cluster at low integers above all, while the logarithms of a few genes may lie in one narrow
    range that happens to be around an integer. A value below 0.5 is as near to 0 as any small value, and has no say.
    """
    values = values[values >= 0.5]
    if not len(values):
        return 0.0
    near = np.abs(values - np.rint(values)) <= 0.15
    _, places, sizes = np.unique(np.rint(values), return_inverse=True, return_counts=True)
    frequent = sizes >= min(FREQUENT * len(values), sizes.max())
    lowest = (np.bincount(places, weights=near) / sizes)[frequent][:N_LOWEST]
    return float(min(near.mean(), lowest.mean()))


def _share_of_equal_variance(rows: CountRows) -> float:
    """Share of the genes whose standard deviation is about 1, as `sc.pp.scale(zero_center=False)` leaves them."""
    n_cells, n_vars = rows.shape
    values = rows.data.astype(np.float64)
    n_found, sums, squares = (np.bincount(rows.indices, w, n_vars) for w in (None, values, values**2))
    common = n_found >= max(5, 0.02 * n_cells)
    if n_cells < MIN_SCALED_CELLS or common.sum() < MIN_SCALED_GENES:
        return 0.0
    variance = (squares[common] - sums[common] ** 2 / n_cells) / (n_cells - 1)
    least, most = ABOUT_ONE
    return float(((variance > least**2) & (variance < most**2)).mean())


def _plausible_verdict(rows: CountRows, precision: Precision, evidence: dict, *, says_log1p: bool) -> MatrixVerdict:
    """A matrix without proof of its scale: judged by closeness to integers and by range."""
    values = rows.data.astype(np.float64)
    near = _share_near_integer(values)
    largest, median = float(values.max()), float(np.median(values))
    if (equal := _share_of_equal_variance(rows)) >= SCALED_SHARE:
        return MatrixVerdict("scaled", None, evidence | {"share_equal_variance": _number(equal)}, precision=precision)
    evidence |= {"share_near_integer": _number(near), "max_over_median": _number(largest / median)}
    if near >= 0.5 and largest > 2 and not says_log1p:
        evidence["share_below_half"] = _number((values < 0.5).mean())
        return MatrixVerdict("raw_float", ROUNDED, evidence, precision=precision)
    # Expression spans orders of magnitude; after a logarithm the largest value of a matrix is a few medians.
    if largest <= 25 and (says_log1p or largest <= 15 * median):
        name, base = "e", np.e
        totals = rows.row_sums(np.expm1(values))
        # More than any scale in use or any library: a binary logarithm. Of a selection of genes few cells show it.
        if np.median(totals) > 2e6 or np.quantile(totals, 0.9) > 1e7:
            name, base = "2", 2.0
            totals = rows.row_sums(np.expm1(values * np.log(base)))
        target_sum = next((total for total in LIKELY_TOTALS if totals.max() <= total * 1.001), None)
        evidence |= {"log_from": "uns['log1p']" if says_log1p else "range of values"}
        evidence |= {"target_sum_from": "unknown" if target_sum is None else "assumed"}
        conversion = f"{name}**x - 1, then as they are: normalised values"
        return MatrixVerdict(
            "log1p", conversion, evidence, logs=1, base=base, target_sum=target_sum, precision=precision
        )
    kind = "normalized" if largest > 25 else "unknown"
    return MatrixVerdict(kind, "taken as they are", evidence, precision=precision)


def convert_rows(
    rows: CountRows, verdict: MatrixVerdict, known_totals: np.ndarray | None = None
) -> tuple[CountRows, np.ndarray | None, int]:
    """Convert values to counts, by the rule of their kind (see the list at the top of this file).

    `rows` are those above the floor of the verdict ([`CountRows.above`]).
    `known_totals` are the counts per cell over all genes of the original data, `(n_cells,)`. Returns counts, or
    normalised values where counts cannot be recovered; library sizes, float64 `(n_cells,)`, or `None` if they are the
    sums of the counts; and the number of cells whose counts were not recovered.
    """
    if not verdict.usable:
        raise ValueError(f"The values are {verdict.kind}, which cannot be converted to counts; use another matrix.")
    if verdict.kind == "raw_integer":
        return rows, None, 0
    if verdict.kind == "raw_float":
        counts = np.rint(rows.data).astype(np.float32)
        return replace(rows, data=counts).entries(counts > 0), None, 0
    linear, error = verdict.linearize(rows.data)
    if not is_expression(linear):
        raise ValueError(
            f"Values up to {rows.data.max():g} become larger than any expression once the logarithm is undone: they "
            "are not logarithms. Pass another `assume=`, or none."
        )
    lengths = np.diff(rows.indptr)
    totals, failed = rows.row_sums(linear), 0
    if verdict.target_sum is not None and not verdict.complete:
        totals = np.where(lengths > 0, np.maximum(verdict.target_sum, totals), 0.0)
    if verdict.exact:
        units = _find_units(linear, error, rows.indptr, weigh=False)
        found = np.isfinite(units.unit)
        failed = int((~found & (lengths > 0)).sum())
        linear = np.where(np.repeat(found, lengths), units.counts, linear)
        counted = rows.row_sums(linear)
        if verdict.target_sum is None or verdict.complete:
            totals = np.where(found, counted, totals)
        else:
            sizes = known_totals  # more precise than what rounded values tell
            if sizes is None:
                sizes = np.rint(verdict.target_sum / np.where(found, units.unit, 1.0))
            totals = np.where(found, np.maximum(sizes, counted), totals)
    return CountRows(rows.indptr, rows.indices, linear.astype(np.float32), rows.shape), totals, failed


def _number(value: Any) -> float:
    """A Python float with the digits that a report needs."""
    return float(f"{float(value):.5g}")
