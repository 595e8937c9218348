"""Fine-tuning beside what a lab would do otherwise: all labels, or a few cells of each, on one held-out quarter.

```
python -m scmmgpt.eval finetuning --adata cells.h5ad --label-key cell_type --output DIR [-- OPTIONS OF FINETUNE]
```

A quarter of the labelled cells is put aside, stratified, and nothing is chosen on it. Every system learns from the
same cells of the rest:

* `finetune`: `python -m scmmgpt.train finetune`, then `annotate`, as a user runs them;
* `finetune, unlabelled`: the same, and the other training cells are in the file without their labels;
* `logistic regression`: log1p(CP10k) of all genes, C by cross-validation (with one cell of each label: C = 1);
* `regression on components`: the same on 50 principal components of all training cells, labelled or not;
* `CellTypist`: `celltypist.train` with its defaults on log1p(CP10k);
* `nearest centroid` and `majority class`: the floors.

Seeds draw the labelled cells and whatever a system draws itself. `all cells` repeats over seeds on one split;
`all cells, other splits` moves the quarter itself. DIR gets `results.json` (every run), `results.csv`, `shots.png` and
`table.md`, which is printed.
"""

import argparse
import csv
import functools
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anndata import AnnData
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split

from scmmgpt.eval import baselines
from scmmgpt.eval.cells import TARGET_SUM
from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import annotation_scores
from scmmgpt.eval.results import bootstrap_draws, percentile_interval
from scmmgpt.files import write_json


logger = logging.getLogger(__name__)

ALL, OTHER_SPLITS = "all", "all, other splits"
FOLDS = 4  # of the cross-validation that chooses C; fewer where a label has fewer cells
COMPONENTS = 50  # scanpy's default number of principal components
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
OURS = ("finetune", "finetune, unlabelled")


@dataclass(frozen=True)
class Task:
    """What a system gets: it names the type of every test cell.

    Args:
        adata: All cells of the training part, with counts in `X`.
        labels: Their labels, `(n_obs,)`.
        shown: Rows whose labels may be read.
        test: The cells to name.
        seed: Of whatever the system draws.
    """

    adata: AnnData
    labels: np.ndarray
    shown: np.ndarray
    test: AnnData
    seed: int


# ---------------------------------------------------------------------------------------------------------------------
# Systems: a task -> the label of every test cell
# ---------------------------------------------------------------------------------------------------------------------


def run_finetune(adata: AnnData, output: str | Path, *, label_key: str, seed: int = 0, options: Sequence[str] = ()):
    """`python -m scmmgpt.train finetune` in this process, and the pipeline of the checkpoint that it wrote.

    Args:
        adata: What is written as the command's `--adata`.
        output: Folder for that file and the checkpoint.
        label_key: Column of labels.
        seed: `--seed`.
        options: More words of the command line.
    """
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
    from scmmgpt.train import finetune

    path = Path(output, "cells.h5ad")
    adata.write_h5ad(path)
    words = ["--adata", path, "--label_key", label_key, "--output_dir", Path(output, "checkpoint"), "--seed", seed]
    words += ["--save_strategy", "no", "--disable_tqdm", True, *options]
    finetune.main(*finetune.make_parser().parse_args_and_config([str(word) for word in words]))
    return ScMMGPTPipeline.from_pretrained(str(Path(output, "checkpoint").resolve()))


def finetuned(task: Task, *, label_key: str, options: Sequence[str] = (), unlabelled: bool = False) -> np.ndarray:
    """Our fine-tuning. With `unlabelled`, cells whose label is not shown stay in the file, without it."""
    labels = np.full(task.adata.n_obs, None, dtype=object)
    labels[task.shown] = task.labels[task.shown]
    adata = task.adata.copy()
    adata.obs[label_key] = labels
    if not unlabelled:
        adata = adata[task.shown].copy()
    shots = np.unique(task.labels[task.shown], return_counts=True)[1].max()
    few = ["--shots", shots] if len(task.shown) < task.adata.n_obs else []
    with tempfile.TemporaryDirectory() as folder:
        pipeline = run_finetune(adata, folder, label_key=label_key, seed=task.seed, options=[*few, *options])
    return np.asarray(pipeline.annotate(task.test.copy()).obs["scmmgpt_cell_type"]).astype(str)


def log1p_cp10k(adata: AnnData) -> sparse.csr_matrix:
    """log1p of counts per 10,000, all genes of the file, CSR float32 `(n_obs, n_vars)`."""
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    totals = np.maximum(np.asarray(counts.sum(axis=1)), 1)
    return sparse.csr_matrix(counts.multiply(TARGET_SUM / totals), dtype=np.float32).log1p()


def cross_validated_regression(train, labels: np.ndarray, test, *, seed: int = 0) -> np.ndarray:
    """Multinomial logistic regression, C by cross-validated accuracy (the smallest among equals).

    Args:
        train: `(n_train, n_features)`, dense or CSR.
        labels: `(n_train,)`.
        test: `(n_cells, n_features)`.
        seed: Of the folds. A label with a single cell leaves nothing to choose on; C is then scikit-learn's, 1.
    """
    model = LogisticRegression(warm_start=True, max_iter=baselines.MAX_ITERATIONS, tol=1e-3)

    def fit(rows, inverse_penalties):
        for model.C in inverse_penalties:
            yield model.fit(train[rows], labels[rows])

    n_folds = min(FOLDS, np.unique(labels, return_counts=True)[1].min())
    best = 1.0
    with warnings.catch_warnings():
        # An unfinished fit of a weakly penalised model is a candidate like any other; the folds judge it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if n_folds > 1:
            right = np.zeros(len(baselines.INVERSE_PENALTIES))
            folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
            for fitting, held_out in folds.split(labels, labels):
                for i, fitted in enumerate(fit(fitting, baselines.INVERSE_PENALTIES)):
                    right[i] += (fitted.predict(train[held_out]) == labels[held_out]).sum()
            best = baselines.INVERSE_PENALTIES[right.argmax()]
        logger.info("Logistic regression: C = %g", best)
        return next(fit(np.arange(len(labels)), [best])).predict(test)


def regression(task: Task) -> np.ndarray:
    """Logistic regression on all genes."""
    train = log1p_cp10k(task.adata[task.shown])
    return cross_validated_regression(train, task.labels[task.shown], log1p_cp10k(task.test), seed=task.seed)


def component_regression(task: Task) -> np.ndarray:
    """Logistic regression on principal components of all training cells' log1p(CP10k)."""
    from sklearn.decomposition import PCA

    everything = log1p_cp10k(task.adata)
    pca = PCA(min(COMPONENTS, *(n - 1 for n in everything.shape)), svd_solver="arpack", random_state=0)
    train = pca.fit_transform(everything)[task.shown]
    test = pca.transform(log1p_cp10k(task.test))
    return cross_validated_regression(train, task.labels[task.shown], test, seed=task.seed)


class _OneVersusRest:
    """What `celltypist.train` asks scikit-learn for by `multi_class="ovr"`, which scikit-learn 1.8 took out."""

    def __init__(self, multi_class="ovr", n_jobs=None, **options):
        self.options = options

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        x = np.asarray(x)
        targets = self.classes_ if len(self.classes_) > 2 else self.classes_[1:]
        models = [LogisticRegression(**self.options).fit(x, np.asarray(y) == target) for target in targets]
        self.coef_ = np.concatenate([model.coef_ for model in models])
        self.intercept_ = np.concatenate([model.intercept_ for model in models])
        return self

    def decision_function(self, x):
        scores = np.asarray(x) @ self.coef_.T + self.intercept_
        return scores if len(self.classes_) > 2 else scores[:, 0]


def celltypist(task: Task) -> np.ndarray:
    """CellTypist trained with its defaults, one label a cell."""
    import inspect
    import sys

    import celltypist as package

    def normalised(adata):
        return AnnData(log1p_cp10k(adata), obs=adata.obs, var=adata.var)

    module = sys.modules["celltypist.train"]
    theirs = module.LogisticRegression
    if "multi_class" not in inspect.signature(LogisticRegression).parameters:
        module.LogisticRegression = _OneVersusRest
    package.logger.set_level(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = package.train(normalised(task.adata[task.shown]), labels=task.labels[task.shown], n_jobs=1)
            answer = package.annotate(normalised(task.test), model=model)
    finally:
        module.LogisticRegression = theirs
    return answer.predicted_labels["predicted_labels"].to_numpy().astype(str)


def centroid(task: Task) -> np.ndarray:
    """The label whose mean log1p(CP10k) is nearest."""
    train = log1p_cp10k(task.adata[task.shown])
    with warnings.catch_warnings():
        # With one cell of each label scikit-learn divides by 0 in a number that this metric does not use.
        warnings.simplefilter("ignore", RuntimeWarning)
        return baselines.nearest_centroid(train, task.labels[task.shown], log1p_cp10k(task.test)).labels


def majority(task: Task) -> np.ndarray:
    """The commonest label, of equals the first by name."""
    return baselines.majority_class(task.labels[task.shown], task.test.n_obs).labels


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        predict: Task -> labels of the test cells.
        random: Whether a seed changes the answer on the same cells.
        semi: Whether it reads cells without labels, so that it says nothing new where all labels are shown.
    """

    predict: Callable[[Task], np.ndarray]
    random: bool = False
    semi: bool = False


def make_systems(label_key: str, options: Sequence[str]) -> dict[str, System]:
    """All systems by name, in the order of the table."""
    ours = functools.partial(finetuned, label_key=label_key, options=options)
    return {
        "finetune": System(ours, random=True),
        "finetune, unlabelled": System(functools.partial(ours, unlabelled=True), random=True, semi=True),
        "logistic regression": System(regression, random=True),
        "regression on components": System(component_regression, random=True),
        "CellTypist": System(celltypist),
        "nearest centroid": System(centroid),
        "majority class": System(majority),
    }


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` cells of every label (of all its cells where it has fewer), ascending."""
    rng = np.random.default_rng([seed, shots])
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def plan_runs(labels: np.ndarray, *, shots: Sequence[int], seeds: int, splits: int, test_share: float) -> list[dict]:
    """Every setting: its name, seed, and the rows to train on, to show labels of, and to test on."""

    def parts(split):
        rows = np.arange(len(labels))
        return [np.sort(p) for p in train_test_split(rows, test_size=test_share, stratify=labels, random_state=split)]

    train, test = parts(0)
    runs = []
    for n in shots:
        for seed in range(seeds):
            shown = draw_shots(labels[train], n, seed)
            runs.append({"setting": str(n), "seed": seed, "train": train, "shown": shown, "test": test})
    for seed in range(seeds):
        runs.append({"setting": ALL, "seed": seed, "train": train, "shown": np.arange(len(train)), "test": test})
    for split in range(1, splits):
        train, test = parts(split)
        shown = np.arange(len(train))
        runs.append({"setting": OTHER_SPLITS, "seed": split, "train": train, "shown": shown, "test": test})
    return runs


def evaluate(adata: AnnData, labels: np.ndarray, systems: dict[str, System], runs: list[dict], *, done=()) -> list:
    """Scores of every system in every run.

    Args:
        adata: All cells, counts in `X`.
        labels: `(n_obs,)`.
        systems: By name.
        runs: From `plan_runs`.
        done: Records of an earlier call, which are not computed again.

    Yields:
        Records with `setting`, `seed`, `system`, `accuracy`, `macro_f1`, `seconds` (of processor time, for training
        and naming the test cells) and `right` (a string of 0 and 1 over the test cells).
    """
    records = {(r["setting"], r["seed"], r["system"]): r for r in done}
    for run in runs:
        full = len(run["shown"]) == len(run["train"])
        truth = labels[run["test"]]
        task = Task(adata[run["train"]], labels[run["train"]], run["shown"], adata[run["test"]], run["seed"])
        for name, system in systems.items():
            key = run["setting"], run["seed"], name
            if system.semi and full:
                continue
            if key not in records:
                earlier = records.get((ALL, 0, name))
                if run["setting"] == ALL and not system.random and earlier is not None:
                    records[key] = {**earlier, "seed": run["seed"]}
                else:
                    start = time.process_time()
                    predicted = system.predict(task)
                    seconds = time.process_time() - start
                    scores = annotation_scores(predicted, truth)
                    right = "".join("01"[int(hit)] for hit in predicted == truth)
                    record = dict(zip(("setting", "seed", "system"), key, strict=True), seconds=round(seconds, 1))
                    records[key] = {**record, **{m: round(scores[m], 4) for m in METRICS}, "right": right}
            yield records[key]


def summarise(records: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of each metric, by setting and system; `sd` is `None` of a single run."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["setting"], record["system"]), []).append(record)
    rows = []
    for (setting, system), group in groups.items():
        row = {"setting": setting, "system": system, "runs": len(group)}
        row["seconds"] = round(float(np.mean([record["seconds"] for record in group])), 1)
        for metric in METRICS:
            values = [record[metric] for record in group]
            row[metric] = round(float(np.mean(values)), 4)
            row[f"{metric}_sd"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
        rows.append(row)
    return rows


def compare(records: list[dict], ours: str) -> list[dict]:
    """Accuracy of `ours` minus every other system's, with the 95 % interval over resampled test cells.

    Differences are means over seeds, on the same test cells; settings that move the test cells have no interval.
    """

    def rights(setting, system):
        found = (r for r in records if (r["setting"], r["system"]) == (setting, system))
        return {r["seed"]: np.array(list(r["right"]), dtype=float) for r in found}

    rows = []
    for setting in dict.fromkeys(record["setting"] for record in records):
        mine = rights(setting, ours)
        for system in dict.fromkeys(record["system"] for record in records):
            theirs = rights(setting, system)
            seeds = sorted(mine.keys() & theirs.keys())
            if system == ours or not seeds:
                continue
            differences = np.array([mine[seed] - theirs[seed] for seed in seeds])
            by_seed = differences.mean(axis=1)
            row = {"setting": setting, "system": ours, "against": system, "difference": round(by_seed.mean(), 4)}
            row["better_in"] = f"{int((by_seed > 0).sum())} of {len(by_seed)}"
            row["interval"] = None
            if setting != OTHER_SPLITS:
                draws = bootstrap_draws(differences.shape[1])
                replicates = draws @ differences.mean(axis=0) / differences.shape[1]
                row["interval"] = [round(end, 4) for end in percentile_interval(replicates)]
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def markdown_table(rows: list[dict]) -> str:
    """A table of systems by settings for each metric: mean ± standard deviation."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    found = {(row["system"], row["setting"]): row for row in rows}
    titles = [f"{s} a label" if s.isdigit() else s for s in settings]
    lines = []
    for metric, title in METRICS.items():
        lines += [f"| {title} | {' | '.join(titles)} |", "| --- |" + " --- |" * len(settings)]
        best = {s: max(found[system, s][metric] for system in systems if (system, s) in found) for s in settings}
        for system in systems:
            cells = []
            for setting in settings:
                row = found.get((system, setting))
                if row is None:
                    cells.append("")
                    continue
                mark = "**" if row[metric] == best[setting] else ""
                sd = row[f"{metric}_sd"]
                cells.append(f"{mark}{row[metric]:.3f}{mark}" + ("" if sd is None else f" ± {sd:.3f}"))
            lines.append(f"| {system} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def shots_figure(rows: list[dict]):
    """Accuracy and macro-F1 over the number of labelled cells, a line a system, bars of one standard deviation."""
    import matplotlib
    from matplotlib.figure import Figure

    from scmmgpt.eval.figures import STYLE

    settings = [s for s in dict.fromkeys(row["setting"] for row in rows) if s != OTHER_SPLITS]
    systems = [s for s in dict.fromkeys(row["system"] for row in rows) if s != "majority class"]
    found = {(row["system"], row["setting"]): row for row in rows}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        for axes, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
            for number, system in enumerate(systems):
                points = [(i, found[system, s]) for i, s in enumerate(settings) if (system, s) in found]
                axes.errorbar(
                    [i + 0.04 * (number - len(systems) / 2) for i, _ in points],
                    [row[metric] for _, row in points],
                    [row[f"{metric}_sd"] or 0 for _, row in points],
                    marker="o",
                    markersize=4,
                    linewidth=2 if system in OURS else 1,
                    linestyle="-" if system in OURS else "--",
                    label=system,
                )
            axes.set_xticks(range(len(settings)), settings)
            axes.set(xlabel="labelled cells of each type", ylabel=title)
            axes.grid(axis="y", alpha=0.3)
        if systems:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def write_outputs(records: list[dict], about: dict, output: str | Path) -> str:
    """Write `results.json`, `results.csv`, `table.md` and `shots.png`; returns the table."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rows = summarise(records)
    comparisons = [row for ours in OURS for row in compare(records, ours)]
    table = markdown_table(rows)
    write_json(output / "results.json", {**about, "rows": rows, "comparisons": comparisons, "runs": records})
    with (output / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in records[0] if name != "right"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    (output / "table.md").write_text(table, encoding="utf-8")
    shots_figure(rows).savefig(output / "shots.png", dpi=150)
    return table


def read_labelled(path: str, label_key: str) -> tuple[AnnData, np.ndarray]:
    """The labelled cells of a file of counts, and their labels.

    Raises:
        ValueError: If `X` holds anything but counts, which every system here normalises itself.
    """
    from scmmgpt.readers import read_file
    from scmmgpt.train.finetune import column_of

    adata = read_file(path)
    labels = column_of(adata.obs, label_key)
    known = labels != None  # noqa: E711 (elementwise)
    adata = adata[known].copy()
    values = sparse.csr_matrix(adata.X).data
    if (values < 0).any() or not np.array_equal(values, np.round(values)):
        raise ValueError(f"X of {path} holds no counts; all systems start from them. Put the counts into X.")
    return adata, labels[known].astype(str)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m scmmgpt.eval finetuning`."""
    parser = argparse.ArgumentParser(
        prog="python -m scmmgpt.eval finetuning",
        description=__doc__.split("\n\n")[0],
        epilog="After `--`: finetune's.",
    )
    parser.add_argument("--adata", required=True, help="labelled cells with counts in X")
    parser.add_argument("--label-key", default="cell_type", help="column of obs with the labels (%(default)s)")
    parser.add_argument("--output", required=True, help="folder for results.json, results.csv, table.md, shots.png")
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 3, 5, 10], help="cells per label (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of every setting (%(default)s)")
    parser.add_argument("--splits", type=int, default=3, help="with all labels, so many splits in all (%(default)s)")
    parser.add_argument("--test-share", type=float, default=0.25, help="share of the cells to test on (%(default)s)")
    parser.add_argument("--systems", nargs="*", help="names of the systems to run; by default all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. What DIR/results.json has already is not computed again."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args, options = make_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    quieten()
    adata, labels = read_labelled(args.adata, args.label_key)
    systems = make_systems(args.label_key, options)
    unknown = set(args.systems or ()) - set(systems)
    if unknown:
        raise ValueError(f"There are no systems {sorted(unknown)}; there are {list(systems)}.")
    systems = {name: system for name, system in systems.items() if args.systems is None or name in args.systems}
    runs = plan_runs(labels, shots=args.shots, seeds=args.seeds, splits=args.splits, test_share=args.test_share)
    about = {"task": "finetuning", "adata": Path(args.adata).name, "label_key": args.label_key}
    about |= {"n_cells": len(labels), "test_share": args.test_share, "finetune_options": options}
    earlier, path = [], Path(args.output, "results.json")
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        if any(document[name] != value for name, value in about.items()):
            raise ValueError(f"{path} is of other cells or options; give another --output.")
        earlier = document["runs"]
    records = []
    for record in evaluate(adata, labels, systems, runs, done=earlier):
        records.append(record)
        logger.info(
            "%s, seed %d, %s: accuracy %.3f, macro-F1 %.3f",
            *(record[name] for name in ("setting", "seed", "system", "accuracy", "macro_f1")),
        )
        write_json(path, {**about, "runs": records})
    sys.stdout.write(write_outputs(records, about, args.output))
    return 0


def quieten() -> None:
    """Dozens of trainings in one process: no bars, and of finetune's own lines warnings alone."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("scmmgpt.train").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
