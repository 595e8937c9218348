"""Compare fine-tuning with common methods, with all labels or with few labelled cells of each label.

```
python -m scmmgpt.eval finetuning --adata cells.h5ad --label-key cell_type --output DIR [-- OPTIONS OF FINETUNE]
```

A stratified quarter of the labelled cells is held out, and no setting is chosen on it. All systems learn from the same
training cells:

* `finetune`: `python -m scmmgpt.train finetune`, then `annotate`, as a user runs them;
* `finetune, unlabelled`: the same, with the other training cells in the file as unlabelled cells;
* with `--checkpoint`, the gain from pre-training: `finetune from the checkpoint`, also with unlabelled cells, and
  `regression with its scores`, whose features are components and log probabilities of the checkpoint's labels;
* `logistic regression`: log1p(CP10k) of all genes, C by cross-validation (with one cell of each label: C = 1);
* `regression on components`: logistic regression on 50 principal components of all training cells, labelled or not;
* `CellTypist`: `celltypist.train` with its defaults on log1p(CP10k);
* `nearest centroid` and `majority class`: the simplest methods.

A seed draws the labelled cells and seeds the system. The setting `all` repeats over seeds on one split; `all, other
splits` holds out other quarters. The outputs in DIR are `results.json` (every run), `results.csv`, `shots.png` and
`table.md`, which is also printed.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scmmgpt.commands.files import write_json
from scmmgpt.eval.annotators import PRETRAINED, LabelBudget, System, make_systems, quieten
from scmmgpt.eval.cells import read_labelled
from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import annotation_scores
from scmmgpt.eval.results import bootstrap_draws, markdown, percentile_interval
from scmmgpt.eval.task import COUNT, NATURAL, read_runs, split_rows, training_parser
from scmmgpt.train.curves import figure_style
from scmmgpt.train.labels import draw_shots


if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

ALL, OTHER_SPLITS = "all", "all, other splits"
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
OURS = (PRETRAINED, "finetune", "finetune, unlabelled")


def draw_runs(labels: np.ndarray, *, shots: Sequence[int], seeds: int, splits: int, test_share: float) -> list[dict]:
    """List all runs: `setting`, `seed`, rows `train` and `test`, and `shown`, the labelled positions in `train`."""
    runs = []
    for split in range(max(splits, 1)):
        train, test = split_rows(labels, test_share=test_share, seed=split)
        everything = np.arange(len(train))
        draws = [(OTHER_SPLITS, split, everything)]
        if split == 0:
            few = ((n, seed, np.random.default_rng([seed, n])) for n in shots for seed in range(seeds))
            draws = [(str(n), seed, draw_shots(labels[train], n, rng)) for n, seed, rng in few]
            draws += [(ALL, seed, everything) for seed in range(seeds if splits else 0)]
        rows = {"train": train, "test": test}
        runs += [{"setting": setting, "seed": seed, "shown": shown, **rows} for setting, seed, shown in draws]
    return runs


def key_of(record: dict) -> tuple[str, int, str]:
    """Fields that identify a run."""
    return record["setting"], record["seed"], record["system"]


def evaluate(
    adata: AnnData, labels: np.ndarray, systems: dict[str, System], runs: list[dict], *, done: Sequence[dict] = ()
) -> Iterator[dict]:
    """Score every system in every run of `draw_runs`; records in `done` are reused.

    Yields:
        Records with `setting`, `seed`, `system`, `accuracy`, `macro_f1`, `seconds` (CPU time of training and
        prediction) and `right` (a string with 1 for each test cell that is right, else 0).
    """
    records = {key_of(record): record for record in done}
    for run in runs:
        full = len(run["shown"]) == len(run["train"])
        truth = labels[run["test"]]
        budget = LabelBudget(adata[run["train"]], labels[run["train"]], run["shown"], adata[run["test"]], run["seed"])
        for name, system in systems.items():
            key = run["setting"], run["seed"], name
            if system.semi_supervised and full:
                continue
            if key not in records:
                earlier = records.get((ALL, 0, name))
                if run["setting"] == ALL and not system.random and earlier is not None:
                    records[key] = {**earlier, "seed": run["seed"]}
                else:
                    start = time.process_time()
                    predicted = system.predict(budget)
                    seconds = time.process_time() - start
                    scores = annotation_scores(predicted, truth)
                    right = "".join("01"[int(hit)] for hit in predicted == truth)
                    record = dict(zip(("setting", "seed", "system"), key, strict=True), seconds=round(seconds, 1))
                    records[key] = {**record, **{m: round(scores[m], 4) for m in METRICS}, "right": right}
            yield records[key]


def summarise(records: list[dict]) -> list[dict]:
    """Mean and standard deviation (`None` for a single run) of each metric over seeds, by setting and system."""
    rows = []
    for (setting, system), group in pd.DataFrame(records).groupby(["setting", "system"], sort=False):
        row: dict[str, Any] = {"setting": setting, "system": system, "runs": len(group)}
        row["seconds"] = round(float(group["seconds"].mean()), 1)
        for metric in METRICS:
            row[metric] = round(float(group[metric].mean()), 4)
            row[f"{metric}_sd"] = round(float(group[metric].std()), 4) if len(group) > 1 else None
        rows.append(row)
    return rows


def compare(records: list[dict], ours: str) -> list[dict]:
    """Difference in accuracy between `ours` and each other system, with the 95 % interval over resampled test cells.

    Differences are averaged over seeds on the same test cells. `all, other splits` has other test cells for each seed,
    and therefore no interval.
    """

    def rights(setting: str, system: str) -> dict[int, np.ndarray]:
        runs = (r for r in records if (r["setting"], r["system"]) == (setting, system))
        return {r["seed"]: np.array(list(r["right"]), dtype=float) for r in runs}

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
            row: dict[str, Any] = {"setting": setting, "system": ours, "against": system}
            row["difference"] = round(by_seed.mean(), 4)
            row["better_in"] = f"{int((by_seed > 0).sum())} of {len(by_seed)}"
            row["interval"] = None
            if setting != OTHER_SPLITS:
                draws = bootstrap_draws(differences.shape[1])
                replicates = draws @ differences.mean(axis=0) / differences.shape[1]
                row["interval"] = [round(end, 4) for end in percentile_interval(replicates) or ()]
            rows.append(row)
    return rows


def table_of(rows: list[dict]) -> str:
    """Format a table of systems x settings for each metric: mean ± standard deviation, the best mean in bold."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    titles = [f"{s} a label" if s.isdigit() else s for s in settings]
    tables = []
    for metric, title in METRICS.items():
        words: dict[str, dict[str, str]] = {}
        best = {s: max(row[metric] for row in rows if row["setting"] == s) for s in settings}
        for row in rows:
            mark, sd = "**" if row[metric] == best[row["setting"]] else "", row[f"{metric}_sd"]
            value = f"{mark}{row[metric]:.3f}{mark}" + ("" if sd is None else f" ± {sd:.3f}")
            words.setdefault(row["system"], {})[row["setting"]] = value
        cells = ([system, *(own.get(setting, "") for setting in settings)] for system, own in words.items())
        tables.append(markdown([title, *titles], cells))
    return "\n".join(tables)


def shots_figure(rows: list[dict]) -> "Figure":
    """Draw accuracy and macro-F1 over the number of labelled cells, with error bars of one standard deviation."""
    from matplotlib.figure import Figure

    settings = [s for s in dict.fromkeys(row["setting"] for row in rows) if s != OTHER_SPLITS]
    systems = [s for s in dict.fromkeys(row["system"] for row in rows) if s != "majority class"]
    row_of = {(row["system"], row["setting"]): row for row in rows}
    with figure_style():
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        for axes, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
            for number, system in enumerate(systems):
                points = [(i, row_of[system, s]) for i, s in enumerate(settings) if (system, s) in row_of]
                x = [i + 0.04 * (number - len(systems) / 2) for i, _ in points]
                y, error = [row[metric] for _, row in points], [row[f"{metric}_sd"] or 0 for _, row in points]
                width, style = (2, "-") if system in OURS else (1, "--")
                axes.errorbar(x, y, error, marker="o", markersize=4, linewidth=width, linestyle=style, label=system)
            axes.set_xticks(range(len(settings)), settings)
            axes.set(xlabel="labelled cells of each type", ylabel=title)
            axes.grid(axis="y", alpha=0.3)
        if systems:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def write_outputs(records: list[dict], about: dict, output: str | Path) -> str:
    """Write `results.json`, `results.csv`, `table.md` and `shots.png`; return the table."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rows = summarise(records)
    comparisons = [row for ours in OURS for row in compare(records, ours)]
    table = table_of(rows)
    write_json(output / "results.json", {**about, "rows": rows, "comparisons": comparisons, "runs": records})
    runs = pd.DataFrame(records).drop(columns="right")
    runs.to_csv(output / "results.csv", index=False, lineterminator="\r\n")
    (output / "table.md").write_text(table, encoding="utf-8")
    shots_figure(rows).savefig(output / "shots.png", dpi=150)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Runs in `results.json` of the output folder are reused."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = training_parser("finetuning", __doc__.split("\n\n")[0])
    parser.epilog = "After `--`: options of finetune."
    parser.add_argument("--shots", type=COUNT, nargs="*", default=[1, 3, 5, 10], help="cells per label (%(default)s)")
    parser.add_argument("--seeds", type=COUNT, default=5, help="repetitions of every setting (%(default)s)")
    parser.add_argument(
        "--splits", type=NATURAL, default=3, help="splits for the setting `all`; 0 leaves it out (%(default)s)"
    )
    parser.add_argument("--systems", nargs="*", help="names of the systems to run; default: all")
    parser.add_argument("--checkpoint", help="checkpoint trained on other cells; adds the systems that start from it")
    args, options = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    quieten()
    adata, labels = read_labelled(args.adata, args.label_key)
    systems = make_systems(args.label_key, options, args.checkpoint)
    unknown = set(args.systems or ()) - set(systems)
    if unknown:
        raise ValueError(f"Unknown systems {sorted(unknown)}. Choose among {list(systems)}.")
    systems = {name: system for name, system in systems.items() if args.systems is None or name in args.systems}
    runs = draw_runs(labels, shots=args.shots, seeds=args.seeds, splits=args.splits, test_share=args.test_share)
    about: dict[str, Any] = {"task": "finetuning", "adata": Path(args.adata).name, "label_key": args.label_key}
    about |= {"n_cells": len(labels), "test_share": args.test_share, "finetune_options": options}
    about |= {} if args.checkpoint is None else {"checkpoint": args.checkpoint}
    path = Path(args.output, "results.json")
    records = {key_of(record): record for record in read_runs(path, about)}
    for record in evaluate(adata, labels, systems, runs, done=list(records.values())):
        records[key_of(record)] = record
        values = (record[name] for name in ("setting", "seed", "system", "accuracy", "macro_f1"))
        logger.info("%s, seed %d, %s: accuracy %.3f, macro-F1 %.3f", *values)
        write_json(path, {**about, "runs": list(records.values())})
    sys.stdout.write(write_outputs(list(records.values()), about, args.output))
    return 0
