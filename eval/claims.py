"""Margins that the published method claims, and the margins that a comparison reaches."""

from collections.abc import Mapping, Sequence
from typing import Any

from scmmgpt.eval.results import markdown


# Task, metric, field of the comparison, margin of the published abstract (arXiv 2503.09427v1), title of the row.
CLAIMS = (
    ("description", "mmd2", "relative", 0.84, "discrepancy of descriptions (MMD²), share below"),
    ("annotation", "accuracy", "relative", 0.205, "accuracy of annotation, share above"),
    ("generation", "knn_accuracy_5", "difference", 0.04, "5-NN accuracy of generated cells, points above"),
)
# Task -> metric, and a row that ignores the cells. A margin over a method that is no better than this row is no claim.
FLOORS = {
    "description": ("named_type_accuracy", "majority label"),
    "annotation": ("accuracy", "majority class"),
    "generation": ("knn_accuracy_5", "shuffled prompts"),
}


def find_claims(tasks: Mapping[str, dict], system: str) -> list[dict]:
    """Compare the claimed margins with those reached against a system.

    A claim has `ours`, `theirs`, claimed `margin`, `reached` margin (None if their discrepancy is within chance),
    `ci`, `missed_by`, largest `possible` margin, and `has_learned`.
    """
    rows = []
    for task, metric, field, margin, title in CLAIMS:
        comparisons = [c for c in tasks[task]["comparisons"] if (c["system"], c["metric"]) == (system, metric)]
        values = {row["system"]: row["value"] for row in tasks[task]["rows"] if row["metric"] == metric}
        if not comparisons:
            continue
        interval = next(row["ci"] for row in tasks[task]["rows"] if (row["system"], row["metric"]) == (system, metric))
        theirs, reached = values[system], comparisons[0][field]
        if interval is not None and interval[0] <= 0:
            reached = None  # a share of a discrepancy that is within chance has no meaning
        row = {"claim": title, "ours": values[tasks[task]["model"]], "theirs": theirs, "margin": margin}
        row |= {"reached": reached, "ci": comparisons[0]["relative_ci" if field == "relative" else "ci"]}
        row["missed_by"] = None if reached is None else max(margin - reached, 0.0)
        room = theirs if metric == "mmd2" else 1 - theirs  # distance to a discrepancy of 0 or an accuracy of 1
        row["possible"] = None if reached is None else room / (theirs if field == "relative" else 1)
        row["has_learned"] = has_learned(tasks[task], system, *FLOORS[task])
        rows.append(row)
    return rows


def has_learned(result: Mapping[str, Any], system: str, metric: str, floor: str) -> bool | None:
    """Whether a system is above the interval of the row `floor`; `None` if either row is missing."""
    rows = {row["system"]: row for row in result["rows"] if row["metric"] == metric}
    if system not in rows or floor not in rows:
        return None
    return rows[system]["value"] > (rows[floor]["ci"] or [0, rows[floor]["value"]])[1]


def markdown_claims(claims: Sequence[dict], system: str) -> str:
    """Format the claims as a Markdown table; margins are x 100."""
    rows = []
    for row in claims:
        if row["reached"] is None:
            reached, verdict = "", "missed: theirs is 0 within the interval"
        else:
            reached = f"{100 * row['reached']:+.1f}"
            if row["ci"] is not None:
                reached += " [{:.1f}, {:.1f}]".format(*(100 * end for end in row["ci"]))
            if "by_seed" in row:
                reached += "; by seed " + ", ".join("none" if x is None else f"{100 * x:+.1f}" for x in row["by_seed"])
            verdict = f"missed by {100 * row['missed_by']:.1f}" if row["missed_by"] else "reached"
        if row["possible"] is not None and row["possible"] < row["margin"]:
            verdict += f" (at most {100 * row['possible']:.1f} is possible)"
        if row["has_learned"] is False:
            verdict += "; theirs has not learned the task"
        values = [f"{row['ours']:.4f}", f"{row['theirs']:.4f}", f"{100 * row['margin']:+.1f}"]
        rows.append([row["claim"], *values, reached, verdict])
    return markdown([f"against {system}", "ours", "theirs", "claimed", "reached", "verdict"], rows)
