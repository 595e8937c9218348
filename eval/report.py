"""One self-contained HTML page and `metrics.json`: every number beside its baselines.

    python -m scmmgpt.eval report --corpus corpus --annotated annotated.h5ad --descriptions descriptions.csv \
        --generated generated.h5ad --training runs/align runs/tune --checkpoint runs/tune --output results/demo

The page needs no network and reads on a phone and in print. It opens with what the model loses.
"""

import argparse
import datetime
import hashlib
import json
import logging
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import numpy as np
from tqdm.auto import tqdm

from scmmgpt.eval import annotation, baselines, description, figures, generation
from scmmgpt.eval.cells import LabelledCells, read_split
from scmmgpt.eval.metrics.generated_cell_knn.generated_cell_knn import fit_cell_space
from scmmgpt.eval.results import BASELINE, CONTROL, MODEL, REFERENCE
from scmmgpt.files import whole_file, write_json


logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = (
    "scmmgpt torch transformers peft trl datasets numpy scipy scikit-learn POT sacrebleu rouge-score scanpy umap-learn"
).split()
MAX_ON_MAP = 2000  # cells of each kind on the UMAP
# Of generated cells the distance, not the k-NN accuracy, which a copied mean profile wins even over real cells.
HEADLINES = {"annotation": "accuracy", "description": "named_type_accuracy", "generation": "energy_distance"}
QUESTIONS = {
    "annotation": "Does it name the type of a cell it has never seen?",
    "description": "Do its words say what the cell is?",
    "generation": "Are the cells it writes like real cells of the type it was asked for?",
}


# ---------------------------------------------------------------------------------------------------------------------
# From results to what the page says
# ---------------------------------------------------------------------------------------------------------------------


def digits(metric: str) -> int:
    """Decimals that a metric is shown with."""
    return {"bleu": 1, "energy_distance": 2}.get(metric, 3)


def verdicts(results: dict[str, dict]) -> dict[str, list[dict]]:
    """Sort every comparison with a baseline or control by its verdict.

    Returns:
        `{"worse", "unclear", "better", "control"}`, each a list of task, metric, system, difference and interval;
        "control" holds comparisons with shuffled answers that the model does not clearly win.
    """
    sorted_out: dict[str, list[dict]] = {"worse": [], "unclear": [], "better": [], "control": []}
    for task, result in results.items():
        values = {(row["system"], row["metric"]): row["value"] for row in result["rows"]}
        for comparison in result["comparisons"]:
            if comparison["ci"] is None:
                continue
            entry = {
                "task": task,
                "title": result["measures"][comparison["metric"]]["title"],
                "ours": values[result["model"], comparison["metric"]],
                "theirs": values[comparison["system"], comparison["metric"]],
                "digits": digits(comparison["metric"]),
            } | comparison
            if comparison["role"] == BASELINE:
                sorted_out[comparison["verdict"]].append(entry)
            elif comparison["verdict"] != "better" and comparison["metric"] not in description.BLIND_TO_PAIRING:
                sorted_out["control"].append(entry)
    return sorted_out


def headline(task: str, result: dict) -> dict:
    """The one number of a task, its best baseline and its control, and what they say together."""
    metric = next(m for m in (HEADLINES[task], *result["measures"]) if any(r["metric"] == m for r in result["rows"]))
    rows = [row for row in result["rows"] if row["metric"] == metric]
    higher = result["measures"][metric]["higher_is_better"]
    by_role = {role: [row for row in rows if row["role"] == role] for role in (MODEL, BASELINE, CONTROL, REFERENCE)}
    best = max(by_role[BASELINE], key=lambda row: row["value"] if higher else -row["value"], default=None)
    comparisons = {c["system"]: c for c in result["comparisons"] if c["metric"] == metric}
    return {
        "task": task,
        "question": QUESTIONS[task],
        "title": result["measures"][metric]["title"],
        "higher_is_better": higher,
        "model": by_role[MODEL][0],
        "best": best,
        "comparison": None if best is None else comparisons[best["system"]],
        "control": next(iter(by_role[CONTROL]), None),
        "reference": next(iter(by_role[REFERENCE]), None),
    }


def table(result: dict) -> dict:
    """Rows (systems) and columns (metrics) of a result, each cell with its verdict, the best of a column marked."""
    metrics = [m for m in result["measures"] if any(row["metric"] == m for row in result["rows"])]
    verdict = {(c["system"], c["metric"]): c["verdict"] for c in result["comparisons"] if c["ci"] is not None}
    cells = {(row["system"], row["metric"]): row for row in result["rows"]}
    best = {}
    for metric in metrics:
        higher = result["measures"][metric]["higher_is_better"]
        rivals = [row for row in result["rows"] if row["metric"] == metric and row["role"] in (MODEL, BASELINE)]
        if higher is not None:
            best[metric] = max(rivals, key=lambda row: row["value"] if higher else -row["value"])["system"]
    systems = list(dict.fromkeys((row["system"], row["role"]) for row in result["rows"]))
    return {
        "metrics": [{"name": m, **result["measures"][m]} for m in metrics],
        "systems": [
            {
                "name": system,
                "role": role,
                "cells": [
                    {
                        "row": cells.get((system, m)),
                        "verdict": verdict.get((system, m)),
                        "best": best.get(m) == system,
                        "digits": digits(m),
                    }
                    for m in metrics
                ],
            }
            for system, role in systems
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Provenance
# ---------------------------------------------------------------------------------------------------------------------


def sha256(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_checkpoint(path: str | Path) -> dict:
    """What a checkpoint is, read from its `config.json` and the headers of its weights; nothing is loaded."""
    from safetensors import safe_open

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json. Name the folder that `save_pretrained` wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parameters = 0
    for weights in sorted(folder.glob("*.safetensors")):
        with safe_open(weights, framework="np") as file:
            parameters += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())
    cell, text, qformer = (config.get(f"{part}_config") or {} for part in ("cell", "text", "qformer"))
    return {
        "path": str(folder),
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "parameters": parameters or None,
        "cell model": _size(cell),
        "Q-Former": _size(qformer),
        "language model": _size(text, text.get("_name_or_path") or text.get("model_type")),
        "query tokens": config.get("num_query_tokens"),
        "expression head": config.get("expression_head"),
        "config sha256": sha256(folder / "config.json"),
    }


def trained_elsewhere(checkpoint: str | Path, corpus) -> str | None:
    """A warning if the checkpoint's `training.json` names a corpus other than the one evaluated on, else `None`.

    Another corpus has another split: cells that are held out here may have been trained on there.
    """
    log = Path(checkpoint) / "training.json"
    if not log.is_file():
        return None
    trained_on = Path(json.loads(log.read_text(encoding="utf-8")).get("data", {}).get("corpus") or "")
    manifest = trained_on / "manifest.json"
    if not manifest.is_file() or sha256(manifest) == sha256(corpus.path / "manifest.json"):
        return None
    return (
        f"The checkpoint was trained on {trained_on}, not on {corpus.path}: "
        "cells that are held out here may be among those it has seen."
    )


def _size(config: dict, name: str | None = None) -> str | None:
    if not config:
        return None
    size = f"{config.get('num_hidden_layers', '?')} layers, {config.get('hidden_size', '?')} wide"
    return f"{Path(name).name}: {size}" if name else size


def recorded_settings(paths: Sequence[str | None]) -> dict[str, dict]:
    """What the commands noted in `uns["scmmgpt"]` of the `.h5ad` files: verb -> its settings with a single value."""
    import anndata

    settings: dict[str, dict] = {}
    for path in filter(lambda path: path and str(path).endswith(".h5ad"), paths):
        noted = anndata.read_h5ad(path, backed="r").uns.get("scmmgpt", {})
        for verb in ("annotate", "describe", "generate"):
            single = {name: np.asarray(value) for name, value in dict(noted.get(verb, {})).items()}
            single = {name: value.item() for name, value in single.items() if value.ndim == 0}
            settings |= {verb: single} if single else {}
    return settings


def describe_corpus(corpus) -> dict:
    """Where the cells come from and how they were divided."""
    manifest = corpus.manifest
    return {
        "path": str(corpus.path),
        "manifest sha256": sha256(corpus.path / "manifest.json"),
        "splits sha256": manifest.splits_hash,
        "gene vocabulary sha256": manifest.vocabulary_hash,
        "split by": manifest.split_by,
        "cells": {split: corpus.n_cells(split) for split in corpus.split_names},
        "sources": [source.get("name") or source.get("dataset_id") or str(source) for source in manifest.sources],
        "command": manifest.command,
    }


def read_training(folders: Sequence[str]) -> list[dict]:
    """The log of each training run: `trainer_state.json` in the folder, or in its last checkpoint."""
    runs = []
    for folder in map(Path, folders):
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        path = folder / "trainer_state.json"
        path = path if path.is_file() else states[-1] if states else None
        if path is None:
            raise FileNotFoundError(f"{folder} has no trainer_state.json, nor a checkpoint-* with one.")
        state = json.loads(path.read_text(encoding="utf-8"))
        runs.append({"name": folder.name, "steps": state.get("global_step"), "history": state.get("log_history", [])})
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def annotation_pictures(result: dict) -> dict:
    """Figures of the annotation section, each a data URI with its alternative text."""
    counts = np.array(result["confusion"]["counts"])
    right = int(sum(counts[i, i] for i in range(len(counts))))
    worst = [
        (counts[i, j], result["confusion"]["labels"][i], result["confusion"]["columns"][j])
        for i in range(counts.shape[0])
        for j in range(counts.shape[1])
        if i != j
    ]
    n, true, predicted = max(worst, default=(0, "", ""))
    slip = f" The commonest error is {true} called {predicted}, {n} cells." if n else ""
    pictures = {
        "confusion": {
            "src": figures.data_uri(figures.confusion_figure(result["confusion"])),
            "alt": f"Confusion matrix of {counts.sum()} held-out cells; {right} lie on the diagonal.{slip}",
            "caption": "Confusion matrix: true types down, predicted across. Numbers are cells, shade is the share of "
            f"the true type.{slip}",
        }
    }
    if result["calibration"]:
        pictures["calibration"] = {
            "src": figures.data_uri(figures.calibration_figure(result["calibration"])),
            "alt": "Accuracy against confidence in "
            + ", ".join(f"{b['confidence']:.2f}: {b['accuracy']:.2f}" for b in result["calibration"]),
            "caption": "Calibration: on the dashed line, confidence is what it claims. Larger points hold more cells.",
        }
    return pictures


def generation_pictures(
    matrix: np.ndarray, prompts: np.ndarray, genes: np.ndarray, train: LabelledCells, test: LabelledCells, *, seed: int
) -> dict:
    """Figures of the generation section, each a data URI with its alternative text.

    Args:
        matrix: Generated log1p(CP10k), shape `(n_generated, n_genes)`.
        prompts: Types asked for.
        genes: Symbols of the columns.
        train: Training cells: they define the space and the markers.
        test: Held-out cells.
        seed: Seed of the map and of the cells shown on it.
    """
    matrix, train, test = generation.align_genes(matrix, genes, train, test)
    rng = np.random.default_rng(seed)
    mine = np.sort(rng.permutation(len(matrix))[:MAX_ON_MAP])
    theirs = np.sort(rng.permutation(len(test))[:MAX_ON_MAP])
    space = fit_cell_space(train.expression, seed=seed)
    points = np.concatenate([space.transform(test.expression[theirs]), space.transform(matrix[mine])])
    coordinates = figures.umap_coordinates(points, seed=seed)
    real, generated = coordinates[: len(theirs)], coordinates[len(theirs) :]
    colors = figures.type_colors([*test.labels, *prompts])
    by_type, by_origin = figures.umap_figures(real, test.labels[theirs], generated, prompts[mine], colors)
    markers = figures.marker_genes(train)
    column = {gene: i for i, gene in enumerate(train.genes)}
    columns = [column[gene] for _, gene in markers]
    types = [
        label for label in dict.fromkeys(label for label, _ in markers) if label in test.labels and label in prompts
    ]
    real_means = np.stack([np.asarray(test.expression[test.labels == t][:, columns].mean(0)).ravel() for t in types])
    generated_means = np.stack([matrix[prompts == t][:, columns].mean(0) for t in types])
    match = float(np.corrcoef(real_means.ravel(), generated_means.ravel())[0, 1])
    return {
        "umap_type": {
            "src": figures.data_uri(by_type),
            "alt": f"UMAP of {len(theirs)} real held-out cells and {len(mine)} generated cells, coloured by type.",
            "caption": "Real held-out cells (circles) and generated cells (triangles) on one UMAP, by type.",
        },
        "umap_origin": {
            "src": figures.data_uri(by_origin),
            "alt": "The same UMAP coloured by origin: real cells grey, generated cells orange.",
            "caption": "The same map by origin. Where orange covers no grey, cells were generated that do not exist; "
            "where grey stands alone, real variety is missing.",
        },
        "markers": {
            "src": figures.data_uri(figures.marker_figure(markers, types, real_means, generated_means)),
            "alt": f"Heat map of {len(markers)} marker genes by {len(types)} types, real above generated; the two "
            f"correlate by {match:.2f}.",
            "caption": f"Mean expression of marker genes (found in training cells) by type, real held-out cells above "
            f"generated ones, each gene relative to its largest real mean. "
            f"Correlation of the two panels: {match:.2f}.",
        },
    }


def training_pictures(runs: Sequence[dict]) -> list[dict]:
    """A figure a run with its alternative text; runs that logged no loss are left out."""
    pictures = []
    for run in runs:
        figure = figures.training_figure(run["history"])
        if figure is None:
            logger.warning("The training log of %r holds no loss.", run["name"])
            continue
        losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
        change = f" The loss went from {losses[0]:.3g} to {losses[-1]:.3g}." if losses else ""
        pictures.append(
            {
                "src": figures.data_uri(figure),
                "alt": f"Training losses of {run['name']} over {run['steps']} steps.{change}",
                "caption": f"{run['name']}: losses over {run['steps']} optimiser steps.{change}",
            }
        )
    return pictures


def render(results: dict[str, dict], pictures: dict, provenance: dict, *, title: str, note: str | None = None) -> str:
    """The HTML page.

    Args:
        results: Task -> result of its `evaluate_*`.
        pictures: Task -> name -> `{"src", "alt", "caption"}`; "training" -> a list of them.
        provenance: What `metrics.json` records of inputs, versions and seeds.
        title: Heading of the page.
        note: A sentence on what the checkpoint is and is not.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits=3: (
        "–" if value is None else f"{value:.{digits}f}".replace("-", "−")
    )
    environment.filters["signed"] = lambda value, digits=3: f"{value:+.{digits}f}".replace("-", "−")
    return environment.get_template("report.html").render(
        title=title,
        note=note,
        results=results,
        headlines=[headline(task, result) for task, result in results.items()],
        verdicts=verdicts(results),
        tables={task: table(result) for task, result in results.items()},
        pictures=pictures,
        provenance=provenance,
    )


def write_report(args: argparse.Namespace) -> dict:
    """Evaluate what the arguments name and write `report.html` and `metrics.json` into the output folder.

    Returns:
        What `metrics.json` holds.
    """
    from scmmgpt.train.data.corpus import open_corpus

    tasks = [
        t
        for t, path in (
            ("annotation", args.annotated),
            ("description", args.descriptions),
            ("generation", args.generated),
        )
        if path
    ]
    if not tasks:
        raise ValueError("Nothing to report: give --annotated, --descriptions or --generated, or several of them.")
    for path in filter(None, (args.annotated, args.descriptions, args.generated)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path!r}.")
    runs = read_training(args.training)
    corpus = open_corpus(args.corpus)
    train, test = (read_split(corpus, split, label_key=args.label_key) for split in ("train", "test"))
    results, pictures = {}, {}
    with tqdm(total=len(tasks) + 2, desc="Evaluating", unit="step") as progress:
        regression = baselines.regression_on_shared_genes(train, test, seed=args.seed)
        progress.update()
        if "annotation" in tasks:
            progress.set_postfix_str("annotation")
            results["annotation"] = annotation.run(args, train, test, regression)
            pictures["annotation"] = annotation_pictures(results["annotation"])
            progress.update()
        if "description" in tasks:
            progress.set_postfix_str("description")
            results["description"] = description.run(args, train, test, regression)
            pictures["description"] = {}
            progress.update()
        if "generation" in tasks:
            progress.set_postfix_str("generation")
            generated = generation.read_generated(args.generated, prompt_key=args.prompt_key)
            results["generation"] = generation.evaluate_generation(*generated, train, test, seed=args.seed)
            pictures["generation"] = generation_pictures(*generated, train, test, seed=args.seed)
            progress.update()
        progress.set_postfix_str("report")
        pictures["training"] = training_pictures(runs)
        provenance = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m scmmgpt.eval report", *args.argv]),
            "corpus": describe_corpus(corpus),
            "checkpoint": None if args.checkpoint is None else describe_checkpoint(args.checkpoint),
            "files": {
                str(path): sha256(path) for path in filter(None, (args.annotated, args.descriptions, args.generated))
            },
            "settings": recorded_settings([args.annotated, args.descriptions, args.generated]),
            "training": [{"name": run["name"], "steps": run["steps"]} for run in runs],
            "versions": installed_versions(),
            "seed": args.seed,
            "bootstrap replicates": next(iter(results.values()))["n_resamples"],
        }
        warning = None if args.checkpoint is None else trained_elsewhere(args.checkpoint, corpus)
        if warning:
            logger.warning("%s", warning)
            provenance["warning"] = warning
        page = render(results, pictures, provenance, title=args.title, note=args.note)
        metrics = {**results, "provenance": provenance}
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "metrics.json", metrics)
        with whole_file(output / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
        progress.update()
    return metrics


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m scmmgpt.eval report`."""
    from scmmgpt.eval.__main__ import task_parser

    parser = task_parser("report", "Evaluate all outputs and write report.html and metrics.json.")
    annotation.add_arguments(parser, required=False)
    description.add_arguments(parser, required=False)
    generation.add_arguments(parser, required=False)
    parser.add_argument("--training", nargs="*", default=[], help="folders of training runs, for their curves")
    parser.add_argument("--checkpoint", help="folder of the checkpoint that made the outputs")
    parser.add_argument("--title", default="scMMGPT report", help="heading of the page (%(default)s)")
    parser.add_argument("--note", help="a sentence on what the checkpoint is and is not")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(argv)
    args.argv = argv
    metrics = write_report(args)
    for task in ("annotation", "description", "generation"):
        if task in metrics:
            line = headline(task, metrics[task])
            best = line["best"]
            sys.stdout.write(
                f"{task}: {line['title']} {line['model']['value']:.3f}, best baseline {best['value']:.3f} "
                f"({best['system']}), control {line['control']['value']:.3f}\n"
            )
    sys.stdout.write(f"{Path(args.output) / 'report.html'}\n")
    return 0
