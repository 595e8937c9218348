"""Evaluate cell type annotation against held-out labels, with baselines on the same split.

python -m scmmgpt.eval annotation --corpus corpus --annotated annotated.h5ad --output annotation.json
"""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from scmmgpt.eval import baselines, results
from scmmgpt.eval.baselines import TypePrediction
from scmmgpt.eval.cells import LabelledCells, match_names, ontology_ids
from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import N_BINS, annotation_scores
from scmmgpt.eval.task import run_task


UNKNOWN = "unknown"  # stands for a missing prediction

MEASURES = {
    "accuracy": results.Measure("accuracy", True, "Share of cells with the right type."),
    "macro_f1": results.Measure(
        "macro F1", True, "Unweighted mean F1 of the true types: rare types have the same weight as frequent types."
    ),
    "weighted_f1": results.Measure(
        "weighted F1", True, "Mean F1 of the true types, weighted by their numbers of cells."
    ),
    "balanced_accuracy": results.Measure("balanced accuracy", True, "Unweighted mean recall of the true types."),
    "hierarchical_f1": results.Measure(
        "hierarchical F1",
        True,
        "F1, over all cells, between two sets of Cell Ontology terms: the predicted type with its ancestors, and the "
        "true type with its ancestors. A related type is partly right. A label without a term is a set of one.",
    ),
    "ece": results.Measure(
        "calibration error",
        False,
        "Mean gap between confidence and accuracy over 15 bins of confidence; 0 is perfect.",
    ),
}


def evaluate_annotation(
    predictions: ArrayLike,
    truth: ArrayLike,
    train: LabelledCells,
    test: LabelledCells,
    *,
    confidences: np.ndarray | None = None,
    regression: TypePrediction | None = None,
    others: Mapping[str, TypePrediction] | None = None,
    n_resamples: int = results.N_RESAMPLES,
    seed: int = 0,
) -> dict:
    """Score predicted types and the baselines.

    Args:
        predictions, truth: Predicted and true type of each cell of `test`; a missing prediction counts as wrong.
        train: The training cells of the model, for the baselines.
        confidences: Confidence in [0, 1] of each prediction, or `None`.
        regression: Prediction of logistic regression for the test cells; fitted if None.
        others: System -> prediction for the test cells, for further methods.
        seed: Seed of the bootstrap, the shuffled control and the choice of C.

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `per_type`, `confusion` (labels and
        counts, true types down, predicted across), `calibration`, `baseline_choices` and sizes.
    """
    predictions, truth = _as_labels(predictions), np.asarray(truth).astype(str)
    if not len(truth) == len(predictions) == len(test):
        raise ValueError(f"Got {len(predictions)} predictions and {len(truth)} true types for {len(test)} cells.")
    regression = regression or baselines.regression_on_shared_genes(train, test, seed=seed)
    genes = np.intersect1d(train.genes, test.genes)
    x_train, x_test = train.select_genes(genes).expression, test.select_genes(genes).expression
    candidates = {
        results.MODEL_NAME: (results.MODEL, predictions, confidences),
        **{name: (results.BASELINE, _as_labels(p.labels), p.confidences) for name, p in (others or {}).items()},
        "logistic regression": (results.BASELINE, regression.labels, regression.confidences),
        "nearest centroid": (results.BASELINE, baselines.nearest_centroid(x_train, train.labels, x_test).labels, None),
        "majority class": (results.BASELINE, baselines.majority_class(train.labels, len(test)).labels, None),
        "shuffled labels": (results.CONTROL, baselines.shuffled(predictions, seed=seed).astype(str), None),
    }
    draws = results.bootstrap_draws(len(truth), n_resamples=n_resamples, seed=seed)
    estimates = {name: _estimates(labels, truth, conf, draws) for name, (_, labels, conf) in candidates.items()}
    for name, (_, labels, _) in candidates.items():
        estimates[name]["hierarchical_f1"] = hierarchical_f1(labels, truth, ontology_ids(train), draws)
    roles = {name: role for name, (role, _, _) in candidates.items()}
    result = {"task": "annotation"} | results.tabulate(MEASURES, roles, estimates)
    result |= {"n_test": len(truth), "n_train": len(train), "n_genes": len(genes)}
    return result | {
        "n_resamples": n_resamples,
        "seed": seed,
        "baseline_choices": {"logistic regression": regression.choices},
        "per_type": _per_type(truth, train.labels, predictions, regression.labels),
        "confusion": _confusion(truth, predictions),
        "calibration": None if confidences is None else _calibration(confidences, predictions == truth),
    }


def _as_labels(values: ArrayLike) -> np.ndarray:
    labels = np.asarray(values, dtype=object)
    missing = np.array([label is None or label != label or label == "" for label in labels], dtype=bool)
    return np.where(missing, UNKNOWN, labels).astype(str)


def _estimates(
    predictions: np.ndarray, truth: np.ndarray, confidences: np.ndarray | None, draws: np.ndarray
) -> dict[str, results.Estimate]:
    scores = annotation_scores(predictions, truth, confidences)
    replicates = resampled_scores(predictions, truth, draws)
    if confidences is not None:
        replicates["ece"] = _calibration_errors(np.asarray(confidences), predictions == truth, draws)
        replicates["ece"] = results.recentre(scores["ece"], replicates["ece"]).clip(min=0)
    return {name: results.Estimate(value, len(truth), replicates[name]) for name, value in scores.items()}


def hierarchical_f1(
    predictions: np.ndarray, truth: np.ndarray, term_ids: Mapping[str, str | None], draws: np.ndarray
) -> results.Estimate:
    """F1 between the Cell Ontology terms, with ancestors, of predicted and true labels.

    `term_ids` maps labels to Cell Ontology ids; labels without an id are matched by name. `draws` has the counts of
    the cells in bootstrap draws, `(n_draws, n_cells)`.
    """
    from scmmgpt.train.data import ontology

    def lineage(label: str) -> set[str]:
        term = term_ids.get(label)
        if not term or not ontology.ancestors(term):  # obs may hold an id such as "unknown"
            term = ontology.match_label("cell_type", label)[0]
        if label.lower() == UNKNOWN:
            return set()
        return {label} if term is None else {term, *ontology.ancestors(term)} - {ontology.ROOT_TYPE}

    lineages = {label: lineage(label) for label in {*predictions, *truth}}
    pairs = [(lineages[named], lineages[true]) for named, true in zip(predictions, truth, strict=True)]
    shared, sizes = (np.array(n, float) for n in zip(*((len(a & b), len(a) + len(b)) for a, b in pairs), strict=True))
    return results.Estimate(2 * shared.sum() / sizes.sum(), len(truth), 2 * (draws @ shared) / (draws @ sizes))


def resampled_scores(predictions: np.ndarray, truth: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of bootstrap draws, `(n_draws,)` each; `draws` has the counts of the cells, `(n_draws, n_cells)`."""
    labels, rows = np.unique(truth), np.arange(len(truth))
    # One product sums the draws of cells by entry of the confusion matrix, whose last column counts other types.
    columns = np.where(np.isin(predictions, labels), np.searchsorted(labels, predictions), len(labels))
    code = np.searchsorted(labels, truth) * (len(labels) + 1) + columns
    shape = len(truth), len(labels) * (len(labels) + 1)
    confusion = draws @ sparse.csr_matrix((np.ones(len(truth)), (rows, code)), shape=shape)
    confusion = confusion.reshape(len(draws), len(labels), len(labels) + 1)
    support = confusion.sum(2)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    predicted = confusion[:, :, :-1].sum(1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    present = support > 0  # a replicate may lack a rare type; its averages then run over the other types
    recall = hits / np.maximum(support, 1)
    return {
        "accuracy": hits.sum(1) / support.sum(1),
        "macro_f1": (f1 * present).sum(1) / present.sum(1),
        "weighted_f1": (f1 * support).sum(1) / support.sum(1),
        "balanced_accuracy": (recall * present).sum(1) / present.sum(1),
    }


def _calibration_errors(confidences: np.ndarray, correct: np.ndarray, draws: np.ndarray) -> np.ndarray:
    bins = np.minimum((confidences * N_BINS).astype(int), N_BINS - 1)
    gaps = np.zeros((len(bins), N_BINS))
    gaps[np.arange(len(bins)), bins] = correct - confidences
    return np.abs(draws @ gaps).sum(1) / draws.sum(1)


def _per_type(
    truth: np.ndarray, train_labels: np.ndarray, predictions: np.ndarray, regression_labels: np.ndarray
) -> list[dict]:
    rows = []
    for label in np.unique(truth):
        of_type = truth == label
        n_test = int(of_type.sum())
        row: dict = {"type": str(label), "n_train": int((train_labels == label).sum()), "n_test": n_test}
        for name, labels in ((results.MODEL_NAME, predictions), ("logistic regression", regression_labels)):
            hits, named = int((labels[of_type] == label).sum()), int((labels == label).sum())
            row[name] = {"recall": hits / n_test, "precision": hits / named if named else None}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["n_test"])


def _confusion(truth: np.ndarray, predictions: np.ndarray) -> dict:
    labels = sorted(set(truth), key=lambda label: (-(truth == label).sum(), label))
    columns = labels + sorted(set(predictions) - set(labels))
    counts = [[int(((truth == t) & (predictions == p)).sum()) for p in columns] for t in labels]
    return {"labels": [str(label) for label in labels], "columns": [str(c) for c in columns], "counts": counts}


def _calibration(confidences: np.ndarray, correct: np.ndarray) -> list[dict]:
    """Mean confidence and accuracy in each of ten bins of confidence."""
    confidences = np.asarray(confidences, dtype=np.float64)
    bins = np.minimum((confidences * 10).astype(int), 9)
    of_bins = [(confidences[bins == b], correct[bins == b]) for b in np.unique(bins)]
    return [{"confidence": float(c.mean()), "accuracy": float(np.mean(right)), "n": len(c)} for c, right in of_bins]


def read_annotated(
    path: str, test: LabelledCells, prediction_key: str, score_key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read an annotated `.h5ad` file: rows of `test`, their predicted labels, and the confidences or None."""
    import anndata

    obs = anndata.read_h5ad(path, backed="r").obs
    if prediction_key not in obs:
        raise ValueError(
            f"{path} has no obs column {prediction_key!r}; it has {sorted(obs.columns)}. "
            "Annotate it first (`scmmgpt annotate`), or name the column with --prediction-key."
        )
    rows, kept = match_names(obs.index.astype(str), test, path)
    part = obs.iloc[kept]
    scores = part[score_key].to_numpy(dtype=np.float64) if score_key in part else None
    return rows, _as_labels(part[prediction_key]), scores


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of this task, which the report also takes."""
    parser.add_argument("--annotated", required=required, help="annotated .h5ad of the held-out cells")
    parser.add_argument(
        "--prediction-key", default="scmmgpt_cell_type", help="obs column of predictions (%(default)s)"
    )
    parser.add_argument("--score-key", default="scmmgpt_score", help="obs column of confidences (%(default)s)")


def evaluate_file(
    args: argparse.Namespace, train: LabelledCells, test: LabelledCells, regression: TypePrediction | None = None
) -> dict:
    """Evaluate the annotated file; logistic regression, if not given for all test cells, is fitted."""
    regression = regression or baselines.regression_on_shared_genes(train, test, seed=args.seed)
    rows, predictions, scores = read_annotated(args.annotated, test, args.prediction_key, args.score_key)
    test, regression = test.take(rows), regression.take(rows)
    return evaluate_annotation(
        predictions, test.labels, train, test, confidences=scores, regression=regression, seed=args.seed
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    about = "Score predicted cell types beside baselines on the same split."
    return run_task("annotation", about, add_arguments, evaluate_file, argv)
