"""Result tables: every number with its interval beside the baselines, and a verdict for each comparison."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


N_RESAMPLES = 1000  # bootstrap replicates; the ends of a 95 % interval then vary by about a tenth of its width
MAX_DRAW_ENTRIES = 20_000_000  # of a table of draws, 160 MB
LEVEL = 0.95

MODEL = "model"  # the checkpoint under evaluation
BASELINE = "baseline"  # a simple method that needs no such model
CONTROL = "control"  # the outputs of the model, shuffled
REFERENCE = "reference"  # real cells, or a system that knows the true type: a yardstick, not a rival
MODEL_NAME = "scMMGPT"


@dataclass(frozen=True)
class Measure:
    """A metric: its title, whether higher is better (`None`: the value `right` is), and its definition."""

    title: str
    higher_is_better: bool | None
    about: str
    right: str = "real"  # where neither direction is better: "1", or "real" for the value of real held-out cells


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap replicates; replicate i is of the same draw for all systems with the same cells."""

    value: float  # on all cells
    n: int  # number of cells (or pairs)
    replicates: np.ndarray | None = None  # values on resampled cells, `(n_resamples,)`; `None`: no interval
    spread: float | None = None  # standard deviation over draws of the cells themselves, where there are several

    @property
    def interval(self) -> list[float] | None:
        """The 95 % percentile interval, `None` without replicates."""
        return None if self.replicates is None else percentile_interval(self.replicates)


def percentile_interval(replicates: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of bootstrap replicates without NaN; `None` where all are NaN."""
    finite = np.asarray(replicates)[np.isfinite(replicates)]
    return np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist() if len(finite) else None


def bootstrap_draws(n: int, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of n cells occurs in each draw with replacement, int array of shape `(n_resamples, n)`.

    Above 20,000 cells there are fewer draws, so that the table fits in memory; the intervals of many cells are narrow.
    """
    n_resamples = min(n_resamples, max(MAX_DRAW_ENTRIES // n, 100))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)


def mean_estimate(values: np.ndarray, draws: np.ndarray, *, weights: np.ndarray | None = None) -> Estimate:
    """The mean of values `(n,)`, equally weighted or by `weights` `(n,)`, with replicates from `bootstrap_draws`."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else weights
    replicates = draws @ (weights * values) / (draws @ weights)
    return Estimate(float(np.average(values, weights=weights)), len(values), replicates)


def recentre(value: float, replicates: np.ndarray) -> np.ndarray:
    """Shift replicates so that their mean is the value; the width and shape of the interval stay.

    Resampling biases some statistics: repeated cells make means noisier and bins emptier, and push every replicate to
    one side of the value.
    """
    finite = np.isfinite(replicates)
    return replicates + (value - replicates[finite].mean()) if finite.any() else replicates


def tabulate(
    measures: Mapping[str, Measure], systems: Mapping[str, str], estimates: Mapping[str, Mapping[str, Estimate]]
) -> dict:
    """Rows of a table and the verdict of each comparison.

    Args:
        measures: Metric -> its definition.
        systems: System -> its role; exactly one is the model.
        estimates: `{system: {metric: Estimate}}`; a system may lack a metric.

    Returns:
        JSON-able dict of `measures`, `rows` (metric, system, role, value, ci, n) and `comparisons` (metric, system,
        role, difference, ci, relative, relative_ci, verdict). A difference is above zero where the model is better,
        and is relative to the value of the other system. The verdict is "better" or "worse" where the interval of
        the difference excludes zero, "unclear" otherwise.
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
    """One table of the tables of several seeds, as [`tabulate`] writes them: rows and comparisons that all have.

    A value is the mean of the seeds and its spread their standard deviation. The interval, over resampled cells, has
    the means of the ends of the seeds' intervals. A relative difference is that of the means.
    """

    def shared(part: str) -> list[list[dict]]:
        found = [{(row["metric"], row["system"]): row for row in table[part]} for table in tables]
        return [[rows[key] for rows in found] for key in found[0] if all(key in rows for rows in found)]

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
    """The verdict of a difference."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "unclear"
    return "better" if interval[0] > 0 else "worse"


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: a title for each column, and a word for each column of a row."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_table(result: dict) -> str:
    """A result as [`tabulate`] writes it, in Markdown: systems by metrics, with spreads and intervals."""
    metrics = [m for m in result["measures"] if any(row["metric"] == m for row in result["rows"])]
    words: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        spread = "" if row.get("spread") is None else f" ± {row['spread']:.3f}"
        interval = "" if row["ci"] is None else " [{:.3f}, {:.3f}]".format(*row["ci"])
        words.setdefault(row["system"], {})[row["metric"]] = f"{row['value']:.3f}{spread}{interval}"
    rows = ([system, *(own.get(metric, "") for metric in metrics)] for system, own in words.items())
    return markdown(["", *(result["measures"][metric]["title"] for metric in metrics)], rows)
