"""Result tables: numbers with intervals, and a verdict for each comparison with a baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


N_RESAMPLES = 1000  # bootstrap replicates; the ends of a 95 % interval then vary by about a tenth of its width
MAX_DRAW_ENTRIES = 20_000_000  # most entries of a table of draws (160 MB)
LEVEL = 0.95

MODEL = "model"  # the checkpoint under evaluation
BASELINE = "baseline"  # a competing method
CONTROL = "control"  # shuffled outputs of the model
REFERENCE = "reference"  # real cells, or a system that is given the true type; not a competitor
MODEL_NAME = "scMMGPT"


@dataclass(frozen=True)
class Measure:
    """A metric: title, direction (`None` if neither direction is better; then `right` is the ideal), definition."""

    title: str
    higher_is_better: bool | None
    about: str
    right: str = "real"  # ideal value if neither direction is better: "1", or "real" for that of real held-out cells


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap replicates. Systems with the same cells share the draw of replicate i."""

    value: float  # on all cells
    n: int  # number of cells (or pairs)
    replicates: np.ndarray | None = None  # values on resampled cells, `(n_resamples,)`; `None`: no interval
    spread: float | None = None  # standard deviation over several draws of the cells, if there are several
    by_type: Mapping[str, float] | None = None  # values of single cell types, if the value is an average over types

    @property
    def interval(self) -> list[float] | None:
        """The 95 % percentile interval, `None` without replicates."""
        return None if self.replicates is None else percentile_interval(self.replicates)


def percentile_interval(replicates: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of bootstrap replicates, ignoring NaN; `None` if all are NaN."""
    finite = np.asarray(replicates)[np.isfinite(replicates)]
    return np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist() if len(finite) else None


def bootstrap_draws(n: int, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw n cells with replacement, `n_resamples` times; return the count of each cell, int `(n_resamples, n)`.

    Above 20,000 cells, the number of draws is reduced so that the table fits in memory.
    """
    n_resamples = min(n_resamples, max(MAX_DRAW_ENTRIES // n, 100))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)


def mean_estimate(values: np.ndarray, draws: np.ndarray, *, weights: np.ndarray | None = None) -> Estimate:
    """The mean of values `(n,)`, equally weighted or by `weights` `(n,)`, with replicates from `bootstrap_draws`."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else weights
    replicates = draws @ (weights * values) / (draws @ weights)
    return Estimate(float(np.average(values, weights=weights)), len(values), replicates)


def mean_over_types(by_type: Mapping[str, float], n: int) -> Estimate:
    """The mean of values of cell types, equally weighted; `n` is the number of their cells."""
    return Estimate(float(np.mean([*by_type.values()])), n, by_type=by_type)


def recentre(value: float, replicates: np.ndarray) -> np.ndarray:
    """Shift replicates so that their mean equals the value; width and shape of the interval do not change.

    Resampling biases some statistics: with repeated cells, means are noisier and bins are emptier, which shifts every
    replicate in one direction.
    """
    finite = np.isfinite(replicates)
    return replicates + (value - replicates[finite].mean()) if finite.any() else replicates


def tabulate(
    measures: Mapping[str, Measure], systems: Mapping[str, str], estimates: Mapping[str, Mapping[str, Estimate]]
) -> dict:
    """Make the rows of a table, and the verdict of each comparison.

    Exactly one system has the role `MODEL`; a system may lack a metric.

    Returns:
        JSON-able dict of `measures`, `model`, `rows` (metric, system, role, value, ci, n) and `comparisons` (metric,
        system, role, difference, ci, relative, relative_ci, verdict). A positive difference means that the model is
        better; `relative` is the difference divided by the value of the other system. The verdict is "better" or
        "worse" if the interval of the difference excludes zero, and "unclear" otherwise.
    """
    (model,) = (name for name, role in systems.items() if role == MODEL)
    rows, comparisons = [], []
    for metric, measure in measures.items():
        for system, role in systems.items():
            estimate = estimates[system].get(metric)
            if estimate is None or not np.isfinite(estimate.value):
                continue
            row = {"metric": metric, "system": system, "role": role}
            measured: dict[str, object] = {"value": estimate.value, "ci": estimate.interval, "n": estimate.n}
            if estimate.spread is not None:
                measured["spread"] = estimate.spread
            rows.append(row | measured)
            ours = estimates[model].get(metric)
            if role in (BASELINE, CONTROL) and ours is not None and measure.higher_is_better is not None:
                comparisons.append(row | _compare(ours, estimate, 1 if measure.higher_is_better else -1))
    return {
        "measures": {name: vars(measure) for name, measure in measures.items()},
        "model": model,
        "rows": rows,
        "comparisons": comparisons,
    }


def _compare(ours: Estimate, theirs: Estimate, sign: int) -> dict:
    interval, relative = None, None
    difference = sign * (ours.value - theirs.value)
    if ours.replicates is not None and theirs.replicates is not None:
        differences = sign * (ours.replicates - theirs.replicates)
        interval = percentile_interval(differences)
        shares = np.divide(
            differences, theirs.replicates, out=np.full(len(differences), np.nan), where=theirs.replicates > 0
        )
        relative = percentile_interval(shares)
    result = {"difference": difference, "ci": interval, "verdict": judge(interval)}
    return result | {"relative": difference / theirs.value if theirs.value > 0 else None, "relative_ci": relative}


def average(tables: Sequence[dict]) -> dict:
    """Average the tables of [`tabulate`] over several seeds; keep the rows and comparisons that all tables have.

    A value is the mean over seeds, and its spread the standard deviation. Interval ends, which come from resampled
    cells, are averaged, too. A relative difference is computed from the means.
    """

    def shared(part: str) -> list[list[dict]]:
        by_seed = [{(row["metric"], row["system"]): row for row in table[part]} for table in tables]
        return [[rows[key] for rows in by_seed] for key in by_seed[0] if all(key in rows for rows in by_seed)]

    def mean(values: Sequence[list[float] | float | None]) -> Any:
        return None if any(value is None for value in values) else np.mean(np.array(values), axis=0).tolist()

    rows, comparisons = [], []
    for group in shared("rows"):
        values = [row["value"] for row in group]
        measured = {"value": mean(values), "ci": mean([row["ci"] for row in group])}
        rows.append({**group[0], **measured, "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None})
    means = {(row["metric"], row["system"]): row["value"] for row in rows}
    for group in shared("comparisons"):
        measured = {name: mean([row[name] for row in group]) for name in ("difference", "ci", "relative_ci")}
        theirs = means[group[0]["metric"], group[0]["system"]]
        measured["relative"] = measured["difference"] / theirs if theirs > 0 else None
        comparisons.append({**group[0], **measured, "verdict": judge(measured["ci"])})
    return {**tables[0], "rows": rows, "comparisons": comparisons}


def judge(interval: Sequence[float] | None) -> str:
    """Verdict of a difference, from its interval."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "unclear"
    return "better" if interval[0] > 0 else "worse"


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table from column titles and rows of words."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_table(result: dict) -> str:
    """Format a result of [`tabulate`] as Markdown: systems x metrics, with spreads and intervals."""
    metrics = [m for m in result["measures"] if any(row["metric"] == m for row in result["rows"])]
    words: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        spread = "" if row.get("spread") is None else f" ± {row['spread']:.3f}"
        interval = "" if row["ci"] is None else " [{:.3f}, {:.3f}]".format(*row["ci"])
        words.setdefault(row["system"], {})[row["metric"]] = f"{row['value']:.3f}{spread}{interval}"
    rows = ([system, *(own.get(metric, "") for metric in metrics)] for system, own in words.items())
    return markdown(["", *(result["measures"][metric]["title"] for metric in metrics)], rows)
