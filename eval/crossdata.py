"""Annotate across datasets: leave out each dataset in turn, and annotate it by systems that learn from the others.

```
python -m scmmgpt.eval crossdata --data ../shared/data --output DIR
```

The folder `--data` has `.h5ad` files and `tables/label_classes.json`: file -> column of labels, and label -> coarse
class and Cell Ontology id (`fine`). Labels without a class are left out. All systems are trained on the same cells, at
most `--max-cells` of a label of a dataset. Candidates are all classes of the training datasets or, with
`--candidates present`, the classes of the left-out dataset. No text is used. Classes that no other dataset has are not
scored.

A second table restricts the candidates of a cell to the classes of its tissue, by the rule of `annotate --tissue`:
classes of cells of this tissue or of blood in any dataset, the left-out dataset included.

* `pooled readout`: `train.pooled` on the training datasets, solved for the genes of the left-out dataset and refined
  by its cells without their labels, as in `annotate`;
* `pooled readout, by types`: fitted to the Cell Ontology terms within the classes; probabilities of terms are summed;
* `pooled readout, by types, each cell alone`: the same without the refinement by other cells;
* `pooled readout, by types, with reference profiles`: as in the released checkpoint, with mean profiles of the types
  and of other cells as additional training data (`train.references`); no other system has these data;
* `logistic regression`: balanced, on log1p(CP10k) of the 4,000 (2,000) most variable genes that the left-out dataset
  measures; C is chosen by leaving out thirds of the training datasets;
* `CellTypist`: `celltypist.train` with its defaults on log1p(CP10k) of the same genes.

The outputs in DIR are `results.json` and `table.md`: macro-F1 of each dataset, and the mean with its 95 % interval
over resampled cells; for `--level fine` also hierarchical F1. `eval_results.yaml` has the means of our systems in the
format of `.eval_results` on the Hub.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from anndata import AnnData
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold

from scmmgpt.cells_scmmgpt import Cells, log1p_cp10k
from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.files import write_json
from scmmgpt.eval import annotators, baselines
from scmmgpt.eval.annotation import hierarchical_f1, resampled_scores
from scmmgpt.eval.results import markdown, percentile_interval
from scmmgpt.eval.task import COUNT, SHARE, read_runs
from scmmgpt.labels_scmmgpt import term_of
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.refinement_scmmgpt import refine_by_cells
from scmmgpt.train import release
from scmmgpt.train.data import ontology
from scmmgpt.train.data.gene_tables import reference_gene_index
from scmmgpt.train.data.prepare import read_label_table
from scmmgpt.train.pooled import Dataset, fit_pooled_readout
from scmmgpt.train.references import reference_table


logger = logging.getLogger(__name__)

INVERSE_PENALTIES = (0.003, 0.03, 0.3)  # C of logistic regression
N_FOLDS = 3  # folds of training datasets for the choice of C
N_RESAMPLES = 500
MODEL = "pooled readout"
WITH_PROFILES = f"{MODEL}, by types, with reference profiles"
DATASET = "scmmgpt/human_sets"  # name of the datasets of `train/data/tables/human_sets.json` in `.eval_results`


@dataclass(frozen=True)
class LabelledSet:
    """The labelled cells of a file, over the genes of GENCODE."""

    name: str
    cells: Cells
    measured: np.ndarray  # int64: ids of the genes that the file measures
    labels: np.ndarray  # (n_cells,) of str
    types: np.ndarray  # (n_cells,) of str: types within a label, such as terms of the Cell Ontology; "" if unknown
    tissues: np.ndarray  # (n_cells,) of str: names of tissues; "" if unknown

    def take(self, rows: np.ndarray) -> "LabelledSet":
        """Select cells by row."""
        kept = {name: getattr(self, name)[rows] for name in ("cells", "labels", "types", "tissues")}
        return replace(self, **kept)

    def dataset(self, n_genes: int, targets: Sequence[Any], own: Sequence[Any] | None = None) -> Dataset:
        """The cells whose label, or else value of `own`, is one of `targets`, over a vocabulary of `n_genes`."""
        number_of = {target: number for number, target in enumerate(targets)}
        places = np.array([number_of.get(value, -1) for value in (self.labels if own is None else own)], dtype=int)
        rows = np.flatnonzero(places >= 0)
        return Dataset(self.cells[rows].to_csr(n_genes), self.measured, places[rows])


@dataclass(frozen=True)
class LeftOutSet:
    """A left-out dataset to annotate, and the training datasets."""

    train: list[LabelledSet]
    test: LabelledSet
    classes: list[str]  # candidates, sorted; every class of `test` is among them
    n_genes: int  # size of the vocabulary
    of_tissue: np.ndarray  # bool (n_cells, n_classes): classes of the tissue of each cell
    folder: str | Path = ""  # folder of the data, with the reference profiles

    def datasets(self) -> list[Dataset]:
        """Training cells of the candidate classes, by dataset, with targets in `classes`."""
        parts = (part.dataset(self.n_genes, self.classes) for part in self.train)
        return [data for data in parts if len(data.targets)]


def read_sets(folder: str | Path, level: str, max_cells: int) -> tuple[list[LabelledSet], int]:
    """Read the datasets of `label_classes.json`; return them and the size of the gene vocabulary.

    The level is `coarse` or `fine`. At most `max_cells` cells of a label of a file are drawn at random.
    """
    from scmmgpt.readers.cell_files import read_file
    from scmmgpt.reading_scmmgpt import choose_input
    from scmmgpt.train.labels import column_of, draw_shots

    path = Path(folder, "tables", "label_classes.json")
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; the folder of --data needs this table of classes.")
    index, reviewed = reference_gene_index(), read_label_table("human")["sets"]
    sets = []
    for name, table in json.loads(path.read_text(encoding="utf-8")).items():
        adata = read_file(Path(folder, f"{name}.h5ad"))
        own = column_of(adata.obs, table["_col"])
        classes, types = (
            np.array([(table.get(label) or {}).get(key) or "" for label in own], dtype=object).astype(str)
            for key in (level, "fine")
        )
        known = np.flatnonzero(classes != "")
        rows = known[draw_shots(own[known].astype(str), max_cells, np.random.default_rng(0))]
        choice = choose_input(adata, index)
        tissue = reviewed.get(name, {}).get("constants", {}).get("tissue")
        tissues = np.full(len(own), tissue or "", dtype=object)
        if tissue is None and "tissue" in adata.obs:
            tissues = adata.obs["tissue"].astype(object).fillna("").to_numpy()
        part = LabelledSet(name, choice.convert(adata), choice.match.measured, classes, types, tissues.astype(str))
        sets.append(part.take(rows))
    return sets, max(index.vocabulary.values()) + 1


def leave_out(
    sets: Sequence[LabelledSet], name: str, candidates: str, n_genes: int, folder: str | Path = ""
) -> LeftOutSet:
    """Leave out one dataset; drop its cells of classes that no other dataset has."""
    train = [part for part in sets if part.name != name]
    (test,) = (part for part in sets if part.name == name)
    known = sorted({label for part in train for label in part.labels})
    test = test.take(np.flatnonzero(np.isin(test.labels, known)))
    classes = sorted(set(test.labels)) if candidates == "present" else known
    return LeftOutSet(train, test, classes, n_genes, tissue_candidates(sets, test.tissues, classes), folder)


def tissue_candidates(sets: Sequence[LabelledSet], tissues: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Classes of each cell's tissue, bool `(n_cells, n_classes)`; all classes for a tissue without labelled cells."""
    terms = ontology.tissue_terms(pair for part in sets for pair in zip(part.tissues, part.labels, strict=True))
    rows = {}
    for name in set(tissues):
        own = term_of(name, terms)
        rows[name] = np.isin(classes, classes if own is None else own["labels"])
    return np.array([rows[name] for name in tissues]).reshape(-1, len(classes))


def thin(part: LabelledSet, share: float, seed: int = 0) -> LabelledSet:
    """Draw a share of the cells of each label, at least one cell."""
    rng = np.random.default_rng(seed)
    of_labels = [rng.permutation(np.flatnonzero(part.labels == label)) for label in np.unique(part.labels)]
    rows = np.sort(np.concatenate([rows[: max(round(share * len(rows)), 1)] for rows in of_labels]))
    return part.take(rows)


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Unweighted mean F1 of the classes in `truth`."""
    return float(f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0))


def pooled(case: LeftOutSet) -> np.ndarray:
    """Scores of the pooled readout, refined by the cells of the left-out dataset, `(n_cells, n_classes)`."""
    readout = fit_pooled_readout(case.datasets(), len(case.classes))
    panel = readout.for_genes(case.test.measured)
    return refine_by_cells(readout, panel, case.test.cells)(case.test.cells)


def pooled_by_types(case: LeftOutSet, *, alone: bool = False, profiles: bool = False) -> np.ndarray:
    """Class probabilities of the pooled readout of types, `(n_cells, n_classes)`; types of a class are summed.

    With `alone`, the other cells do not refine the readout. `profiles`: see [`fit_by_types`].
    """
    readout, types = fit_by_types(case, profiles)
    panel = readout.for_genes(case.test.measured)
    panel = panel if alone else refine_by_cells(readout, panel, case.test.cells)
    probabilities = np.exp(panel(case.test.cells))
    of_class = np.array([[label == name for name in case.classes] for label, _ in types], dtype=float)
    return probabilities @ of_class


def fit_by_types(case: LeftOutSet, profiles: bool) -> tuple[ScMMGPTLabelReadout, list[tuple[str, str]]]:
    """Fit the pooled readout to the types within the classes; return it and its labels, pairs (class, type).

    A cell of unknown type is divided evenly among the types of its class. With `profiles`, reference profiles of the
    types and of other cells join the datasets, as in the released checkpoint.
    """
    kinds = sorted({pair for part in case.train for pair in zip(part.labels, part.types, strict=True)})
    kinds = [pair for pair in kinds if pair[0] in case.classes]
    known = {label for label, kind in kinds if kind}
    types = [pair for pair in kinds if pair[1] or pair[0] not in known]
    meanings = np.array([[own == pair or (not pair[1] and own[0] == pair[0]) for own in types] for pair in kinds])
    pairs = [list(zip(part.labels, part.types, strict=True)) for part in case.train]
    parts = [part.dataset(case.n_genes, kinds, own) for part, own in zip(case.train, pairs, strict=True)]
    datasets = [data for data in parts if len(data.targets)]
    shares = meanings / meanings.sum(axis=1, keepdims=True)
    if profiles:
        names = [kind or label for label, kind in types]
        table, index = read_label_table("human"), reference_gene_index()
        if (reference := release.read_profiles(case.folder, names, table, index, case.n_genes)) is not None:
            datasets, shares = reference.join(datasets, shares, np.arange(len(types)))
    return fit_pooled_readout(datasets, len(types), meanings=shares), types


def shared_expression(case: LeftOutSet, n_genes: int) -> tuple[sparse.csr_matrix, np.ndarray, sparse.csr_matrix]:
    """log1p(CP10k) of the `n_genes` most variable measured genes: training cells, training labels, test cells.

    The genes are among those that the left-out dataset measures; their variance is that of the training cells.
    """
    parts = case.datasets()
    genes = case.test.measured

    def expression(counts: sparse.csr_matrix) -> sparse.csr_matrix:
        counts = counts[:, genes]
        return log1p_cp10k(counts, np.asarray(counts.sum(axis=1)).ravel())

    train = sparse.vstack([expression(part.counts) for part in parts], format="csr")
    variance = np.asarray(train.power(2).mean(axis=0)).ravel() - np.asarray(train.mean(axis=0)).ravel() ** 2
    chosen = np.sort(np.argsort(-variance, kind="stable")[:n_genes])
    labels = np.concatenate([np.asarray(case.classes)[part.targets] for part in parts])
    return train[:, chosen], labels, expression(case.test.cells.to_csr(case.n_genes))[:, chosen]


def logistic_regression(case: LeftOutSet, *, n_genes: int) -> np.ndarray:
    """Log probabilities of balanced logistic regression, `(n_cells, n_classes)`."""
    train, labels, test = shared_expression(case, n_genes)
    parts = case.datasets()
    groups = np.repeat(np.arange(len(parts)), [len(part.targets) for part in parts])
    scores = dict.fromkeys(INVERSE_PENALTIES, 0.0)
    for fitting, rest in GroupKFold(min(N_FOLDS, len(parts))).split(train, labels, groups) if len(parts) > 1 else ():
        model = new_regression()
        for c in INVERSE_PENALTIES:
            baselines.fit_quietly(model.set_params(C=c), train[fitting], labels[fitting])
            scores[c] += known_f1(model, train[rest], labels[rest])
    best = max(scores, key=scores.__getitem__)
    logger.info("%s: C %g of %s", case.test.name, best, scores)
    model = new_regression().set_params(C=best, tol=1e-4)
    return baselines.fit_quietly(model, train, labels).predict_log_proba(test)


def new_regression() -> LogisticRegression:
    """Make a balanced regression that starts from the coefficients of its last fit, with a loose tolerance."""
    return LogisticRegression(class_weight="balanced", warm_start=True, tol=1e-3, max_iter=baselines.MAX_ITERATIONS)


def known_f1(model: Any, rows: sparse.csr_matrix, truth: np.ndarray) -> float:
    """[`macro_f1`] of the rows whose class is among the model's classes; 1 if there are none."""
    known = np.isin(truth, model.classes_)
    return macro_f1(truth[known], model.predict(rows[known])) if known.any() else 1.0


def celltypist(case: LeftOutSet, *, n_genes: int) -> np.ndarray:
    """Scores of CellTypist with its default training, `(n_cells, n_classes)`."""
    train, labels, test = shared_expression(case, n_genes)
    both = [AnnData(sparse.csr_matrix(matrix.expm1())) for matrix in (train, test)]  # `celltypist_scores` takes counts
    budget = annotators.LabelBudget(both[0], labels, np.arange(len(labels)), both[1], 0)
    return annotators.celltypist_scores(budget)[case.classes].to_numpy()


# System -> function that returns scores of the classes, (n_cells, n_classes).
SYSTEMS: dict[str, Callable[[LeftOutSet], np.ndarray]] = {
    MODEL: pooled,
    f"{MODEL}, by types": pooled_by_types,
    f"{MODEL}, by types, each cell alone": lambda case: pooled_by_types(case, alone=True),
    WITH_PROFILES: lambda case: pooled_by_types(case, profiles=True),
    "logistic regression, 4,000 genes": lambda case: logistic_regression(case, n_genes=4000),
    "logistic regression, 2,000 genes": lambda case: logistic_regression(case, n_genes=2000),
    "CellTypist, 4,000 genes": lambda case: celltypist(case, n_genes=4000),
}


def summarise(records: Sequence[dict], truths: dict[str, np.ndarray], key: str = "predicted") -> list[dict]:
    """Summarise each system: macro-F1 by dataset, mean, interval, and the lead of our system over it.

    Our system is the one with reference profiles, as in the released checkpoint, or else `MODEL`. Resampled cells are
    the same for both systems of a lead. `key` is the field of the predictions in a record.

    Returns:
        Rows with `system`, `mean`, `by_set`, `interval`, `lead`, `lead_interval` and `lead_by_set` (lead and interval
        in each dataset); for classes that are Cell Ontology ids also `hierarchical` (F1 by dataset).
    """
    of_system: dict[str, dict[str, np.ndarray]] = {}
    for record in records:
        of_system.setdefault(record["system"], {})[record["set"]] = np.asarray(record[key])
    draws = {}
    for place, (name, truth) in enumerate(truths.items()):
        drawn = np.random.default_rng([0, place]).integers(len(truth), size=(N_RESAMPLES, len(truth)))
        draws[name] = np.stack([np.bincount(cells, minlength=len(truth)) for cells in drawn])

    def replicates(predicted: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
        scores = [resampled_scores(predicted[name], truths[name], draws[name]) for name in names]
        return np.mean([of_set["macro_f1"] for of_set in scores], axis=0)

    own = WITH_PROFILES if WITH_PROFILES in of_system else MODEL
    rows, ours = [], of_system.get(own, {})
    for system, predicted in of_system.items():
        names = [name for name in truths if name in predicted]
        scores = {name: macro_f1(truths[name], predicted[name]) for name in names}
        row: dict[str, Any] = {"system": system, "mean": float(np.mean(list(scores.values()))), "by_set": scores}
        row["interval"] = percentile_interval(replicates(predicted, names))
        if system != own and set(names) <= set(ours):
            leads = {n: replicates(ours, [n]) - replicates(predicted, [n]) for n in names}
            means = {n: macro_f1(truths[n], ours[n]) - scores[n] for n in names}
            row["lead"] = float(np.mean(list(means.values())))
            row["lead_interval"] = percentile_interval(np.mean(list(leads.values()), axis=0))
            row["lead_by_set"] = {n: [means[n], percentile_interval(leads[n])] for n in names}
        ids = {label: label for name in names for label in truths[name] if label.startswith("CL:")}
        if ids:
            of_sets = {name: hierarchical_f1(predicted[name], truths[name], ids, draws[name]) for name in names}
            row["hierarchical"] = {name: estimate.value for name, estimate in of_sets.items()}
        rows.append(row)
    return rows


def markdown_table(rows: Sequence[dict]) -> str:
    """Format a Markdown table of systems x datasets, macro-F1 x 100."""
    names = list(rows[0]["by_set"])

    def with_interval(value: str, interval: Sequence[float]) -> str:
        return f"{value} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

    def by_set(scores: Mapping[str, float]) -> list[str]:
        return [f"{100 * scores[name]:.0f}" if name in scores else "" for name in names]

    lines = []
    for row in rows:
        mean = with_interval(f"{100 * row['mean']:.1f}", row["interval"])
        lead = with_interval(f"{100 * row['lead']:+.1f}", row["lead_interval"]) if "lead" in row else ""
        lines.append([row["system"], mean, lead, *by_set(row["by_set"])])
        if f1 := row.get("hierarchical"):
            mean = f"{100 * np.mean(list(f1.values())):.1f}"
            lines.append([f"{row['system']}, hierarchical F1", mean, "", *by_set(f1)])
    return markdown(["", "mean", "lead of ours", *names], lines)


def eval_results(rows: Sequence[dict], notes: str) -> list[dict[str, Any]]:
    """Convert the mean macro-F1 of our systems that annotated all datasets to the Hub's `.eval_results` format."""
    n_sets = max(len(row["by_set"]) for row in rows)
    entries = [
        EvalResultEntry(DATASET, "macro_f1", round(row["mean"], 4), notes=f"{row['system']}; {notes}")
        for row in rows
        if row["system"].startswith(MODEL) and len(row["by_set"]) == n_sets
    ]
    return eval_result_entries_to_yaml(entries)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval crossdata", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of .h5ad files with tables/label_classes.json")
    parser.add_argument("--output", required=True, help="folder for results.json and table.md")
    parser.add_argument("--level", choices=("coarse", "fine"), default="coarse", help="labels to score (%(default)s)")
    parser.add_argument("--candidates", choices=("all", "present"), default="all", help="candidate classes")
    parser.add_argument("--max-cells", type=COUNT, default=100, help="cells of each label of a dataset (%(default)s)")
    parser.add_argument(
        "--train-share",
        type=SHARE,
        default=1.0,
        help="share of the training cells of each label of a dataset, for a learning curve (%(default)s)",
    )
    parser.add_argument("--sets", nargs="*", help="datasets to leave out (default: each in turn)")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, help="systems (default: all that the data allow)")
    return parser


def chosen_systems(names: Sequence[str] | None, folder: str | Path) -> list[str]:
    """Check the named systems (default: all). The system with reference profiles needs their file."""
    path = Path(folder, reference_table()["file"])
    if names is None:
        return [system for system in SYSTEMS if system != WITH_PROFILES or path.is_file()]
    if WITH_PROFILES in names and not path.is_file():
        raise FileNotFoundError(f"There is no {path}, which {WITH_PROFILES!r} needs; leave it out of --systems.")
    return list(names)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Runs in `results.json` of the output folder are reused."""
    args = make_parser().parse_args(argv)
    annotators.quieten()
    systems = chosen_systems(args.systems, args.data)
    sets, n_genes = read_sets(args.data, args.level, args.max_cells)
    unknown = sorted(set(args.sets or ()) - {part.name for part in sets})
    if unknown:
        raise ValueError(f"--sets names {unknown}, but the datasets are {[part.name for part in sets]}.")
    about: dict[str, Any] = {"task": "crossdata", "level": args.level, "candidates": args.candidates}
    about |= {"max_cells": args.max_cells} | ({} if args.train_share == 1 else {"train_share": args.train_share})
    about["cells"] = {part.name: len(part.labels) for part in sets}
    path = Path(args.output, "results.json")
    records = read_runs(path, about)
    done = {(record["system"], record["set"]) for record in records}
    truths: dict[str, np.ndarray] = {}
    for part in sets:
        if args.sets and part.name not in args.sets:
            continue
        case = leave_out(sets, part.name, args.candidates, n_genes, args.data)
        if len(case.test.labels) == 0 or len(case.classes) < 2:
            logger.warning("%s is left out: no two of its classes are in other datasets.", part.name)
            continue
        truths[part.name] = case.test.labels
        if args.train_share < 1:
            case = replace(case, train=[thin(other, args.train_share) for other in case.train])
        for system in systems:
            if (system, part.name) in done:
                continue
            scores, names = SYSTEMS[system](case), np.asarray(case.classes)
            predicted, of_tissue = (
                names[np.where(kept, scores, -np.inf).argmax(axis=1)] for kept in (True, case.of_tissue)
            )
            record = {"predicted": predicted.tolist(), "of_tissue": of_tissue.tolist()}
            records.append({"system": system, "set": part.name, **record})
            logger.info("%s, %s: macro-F1 %.3f", part.name, system, macro_f1(case.test.labels, predicted))
            write_json(path, {**about, "runs": records})
    kept = [record for record in records if record["set"] in truths]
    rows, restricted = (summarise(kept, truths, key) for key in ("predicted", "of_tissue"))
    table = f"{markdown_table(rows)}\nCandidates of each cell's tissue:\n\n{markdown_table(restricted)}"
    write_json(path, {**about, "rows": rows, "rows_of_tissue": restricted, "runs": records})
    Path(args.output, "table.md").write_text(table, encoding="utf-8")
    notes = f"{args.level} classes, {args.candidates} candidates, {len(truths)} sets left out in turn"
    entries = yaml.safe_dump(eval_results(rows, notes), sort_keys=False)
    Path(args.output, "eval_results.yaml").write_text(entries, encoding="utf-8")
    sys.stdout.write(table)
    return 0
