"""Write a self-contained HTML page and `metrics.json`, with baselines for every number.

    python -m scmmgpt.eval report --corpus corpus --annotated annotated.h5ad --descriptions descriptions.csv \
        --generated generated.h5ad --training runs/align runs/tune --checkpoint runs/tune --output results/demo

The page needs no network, is readable on a phone and on paper, and begins with the comparisons that the model loses.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from scmmgpt.commands.files import whole_file, write_json
from scmmgpt.commands.pages import render_page
from scmmgpt.eval import annotation, baselines, description, generation
from scmmgpt.eval.cells import read_splits
from scmmgpt.eval.pictures import annotation_pictures, generation_pictures, training_pictures
from scmmgpt.eval.provenance import describe_evaluation, read_training
from scmmgpt.eval.results import BASELINE, CONTROL, MODEL, REFERENCE
from scmmgpt.eval.task import task_parser


logger = logging.getLogger(__name__)

# k-NN accuracy is not the headline of generation, because copies of the mean profile exceed real cells.
HEADLINES = {"annotation": "accuracy", "description": "named_type_accuracy", "generation": "energy_distance"}
QUESTIONS = {
    "annotation": "Does the model name the type of a held-out cell?",
    "description": "Do the descriptions name the type of a held-out cell?",
    "generation": "Are generated cells like real cells of the prompted type?",
}

# Decimals of a metric on the page, 3 for all others.
DIGITS = {
    "bleu": 1,
    "energy_distance": 2,
    "largest_eigenvalue": 1,
    "detected_genes": 1,
    "library_size": 0,
    "nearest_training_cell": 2,
}


def verdicts(results: dict[str, dict]) -> dict[str, list[dict]]:
    """Group the comparisons with baselines by verdict ("worse", "unclear", "better").

    "control" has the comparisons with a control that the model does not win.
    """
    sorted_out: dict[str, list[dict]] = {"worse": [], "unclear": [], "better": [], "control": []}
    for task, result in results.items():
        values = {(row["system"], row["metric"]): row["value"] for row in result["rows"]}
        for comparison in result["comparisons"]:
            if comparison["ci"] is None:
                continue
            metric = comparison["metric"]
            entry = {"task": task, "digits": DIGITS.get(metric, 3)} | comparison
            entry |= {"title": result["measures"][metric]["title"], "ours": values[result["model"], metric]}
            entry["theirs"] = values[comparison["system"], metric]
            if comparison["role"] == BASELINE:
                sorted_out[comparison["verdict"]].append(entry)
            elif comparison["verdict"] != "better" and metric not in description.BLIND_TO_PAIRING:
                sorted_out["control"].append(entry)
    return sorted_out


def best_row(result: dict, metric: str, roles: Sequence[str]) -> dict | None:
    """Best row of a metric among systems of these roles; `None` without rows, or if neither direction is better."""
    higher = result["measures"][metric]["higher_is_better"]
    rows = [row for row in result["rows"] if row["metric"] == metric and row["role"] in roles and higher is not None]
    return max(rows, key=lambda row: row["value"] if higher else -row["value"], default=None)


def headline(task: str, result: dict) -> dict:
    """Main number of a task, with the best baseline, the control and the reference."""
    metric = next(m for m in (HEADLINES[task], *result["measures"]) if any(r["metric"] == m for r in result["rows"]))
    first = {row["role"]: row for row in reversed(result["rows"]) if row["metric"] == metric}
    best = best_row(result, metric, [BASELINE])
    comparisons = {c["system"]: c for c in result["comparisons"] if c["metric"] == metric}
    return {
        "task": task,
        "question": QUESTIONS[task],
        "title": result["measures"][metric]["title"],
        "higher_is_better": result["measures"][metric]["higher_is_better"],
        "model": first[MODEL],
        "best": best,
        "comparison": None if best is None else comparisons[best["system"]],
        "control": first.get(CONTROL),
        "reference": first.get(REFERENCE),
    }


def table(result: dict) -> dict:
    """Table of a result: systems x metrics; each cell has its verdict, and the best cell of a column is marked."""
    metrics = [m for m in result["measures"] if any(row["metric"] == m for row in result["rows"])]
    verdict = {(c["system"], c["metric"]): c["verdict"] for c in result["comparisons"] if c["ci"] is not None}
    cells = {(row["system"], row["metric"]): row for row in result["rows"]}
    best = {metric: best_row(result, metric, [MODEL, BASELINE]) for metric in metrics}

    def cell(system: str, metric: str) -> dict:
        row = cells.get((system, metric))
        is_best = row is not None and row is best[metric]
        return {"row": row, "verdict": verdict.get((system, metric)), "best": is_best, "digits": DIGITS.get(metric, 3)}

    roles = {row["system"]: row["role"] for row in result["rows"]}
    return {
        "metrics": [{"name": m, **result["measures"][m]} for m in metrics],
        "systems": [{"name": s, "role": role, "cells": [cell(s, m) for m in metrics]} for s, role in roles.items()],
    }


def render(results: dict[str, dict], pictures: dict, provenance: dict, *, title: str, note: str | None = None) -> str:
    """Render the HTML page from the result of each task, its pictures by name, and those of training (a list)."""
    return render_page(
        "report.html",
        title=title,
        note=note,
        results=results,
        headlines=[headline(task, result) for task, result in results.items()],
        verdicts=verdicts(results),
        tables={task: table(result) for task, result in results.items()},
        pictures=pictures,
        provenance=provenance,
    )


def write_report(args: argparse.Namespace, argv: Sequence[str]) -> dict:
    """Evaluate all given files, write `report.html` and `metrics.json`, and return the result of each task."""
    from scmmgpt.train.data.corpus import open_corpus

    outputs = {"annotation": args.annotated, "description": args.descriptions, "generation": args.generated}
    outputs = {task: path for task, path in outputs.items() if path}
    if not outputs:
        raise ValueError("Nothing to report. Give --annotated, --descriptions or --generated, or several of them.")
    for path in outputs.values():
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path!r}. Run the command that writes it first.")
    runs = read_training(args.training)
    corpus = open_corpus(args.corpus)
    train, test = read_splits(corpus, label_key=args.label_key)
    results: dict[str, dict] = {}
    pictures: dict[str, Any] = {"training": training_pictures(runs)}
    with tqdm(total=len(outputs) + 1, desc="Evaluating", unit="step") as progress:
        regression = baselines.regression_on_shared_genes(train, test, seed=args.seed)
        progress.update()
        for task in outputs:
            progress.set_postfix_str(task)
            if task == "annotation":
                results[task] = annotation.evaluate_file(args, train, test, regression)
                pictures[task] = annotation_pictures(results[task])
            elif task == "description":
                results[task] = description.evaluate_file(args, train, test, regression)
                pictures[task] = {}
            else:
                generated = generation.read_generated(args.generated, prompt_key=args.prompt_key)
                results[task] = generation.evaluate_generation(generated, train, test, seed=args.seed)
                pictures[task] = generation_pictures(generated, train, test, seed=args.seed)
            progress.update()
    command = " ".join(["python -m scmmgpt.eval report", *argv])
    provenance = describe_evaluation(
        corpus, list(outputs.values()), command=command, checkpoint=args.checkpoint, runs=runs, seed=args.seed
    )
    provenance["bootstrap replicates"] = next(iter(results.values()))["n_resamples"]
    if "warning" in provenance:
        logger.warning("%s", provenance["warning"])
    page = render(results, pictures, provenance, title=args.title, note=args.note)
    output = Path(args.output)
    write_json(output / "metrics.json", {**results, "provenance": provenance})
    with whole_file(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = task_parser("report", "Evaluate all outputs and write report.html and metrics.json.")
    for module in (annotation, description, generation):
        module.add_arguments(parser, required=False)
    parser.add_argument("--training", nargs="*", default=[], help="folders of training runs, for their curves")
    parser.add_argument("--checkpoint", help="folder of the checkpoint that made the outputs")
    parser.add_argument("--title", default="scMMGPT report", help="heading of the page (%(default)s)")
    parser.add_argument("--note", help="remark on the checkpoint, shown on the page")
    args = parser.parse_args(argv)
    for task, result in write_report(args, argv).items():
        line = headline(task, result)
        best = line["best"]
        sys.stdout.write(
            f"{task}: {line['title']} {line['model']['value']:.3f}, best baseline {best['value']:.3f} "
            f"({best['system']}), control {line['control']['value']:.3f}\n"
        )
    sys.stdout.write(f"{Path(args.output) / 'report.html'}\n")
    return 0
