"""Plant wrong labels in held-out cells, and measure the precision of the ranking by `audit`.

```
python -m scmmgpt.eval audit --adata cells.h5ad --label-key cell_type --output DIR
python -m scmmgpt.eval audit --adata cells.h5ad --label-key cell_type --output DIR --model .
```

`finetune` learns from three quarters of the cells, and the other quarter is audited. With `--model`, all cells are
audited by the given checkpoint, without fine-tuning. A share of the labels of the audited cells is replaced: by any
other label ("any"), or by the label that the model finds most probable after the true label ("near"). The replacement
never shares a type of the checkpoint with the true label ("T cell" is not wrong for a CD4 T cell). With k replaced
labels, precision at k is the share of replaced labels among the k cells ranked first. Labels that are wrong in the
file itself count against every system.

Systems and their ranking scores:

* audit: score of `audit`, which combines log odds of file and model;
* model alone: log odds of the checkpoint, which saw the training cells, or with `--model` no cell of the file;
* regression of the audit alone: log odds of the file, cross-validated on the given labels;
* markers: mean standardised expression of the ten marker genes of the best other label, minus that of the given label.
  The markers come from a t-test on the training cells; with `--model`, on the audited cells with the given labels;
* cross-validated regression of scikit-learn: log odds from a regression with default penalty, cross-validated on the
  given labels of the audited cells, as in confident learning;
* random: hashed order.

With `--model`, cells are left out, and counted, if their label means no type of the checkpoint or has fewer than five
cells. If the file does not hold counts, recovered counts are used for all systems.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scanpy
from anndata import AnnData
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from scmmgpt.audit_scmmgpt import CONTRADICTED
from scmmgpt.cells_scmmgpt import hashes
from scmmgpt.commands.errors import number
from scmmgpt.commands.files import write_json
from scmmgpt.eval.annotators import expression, run_finetune
from scmmgpt.eval.cells import read_labelled
from scmmgpt.eval.results import markdown
from scmmgpt.eval.task import COUNT, split_rows, training_parser
from scmmgpt.evidence_scmmgpt import label_members
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import read_file
from scmmgpt.train.labels import column_of


N_MARKERS = 10
COMPONENTS = 50
FOLDS = 5  # folds of the regression on the labels of the file; a label needs a cell in each fold
KINDS = ("any", "near")


def plant(
    truth: np.ndarray, share: float, seed: int, nearest: np.ndarray | None = None, same: np.ndarray | None = None
) -> np.ndarray:
    """Replace a share of the labels `(n_cells,)`, at least one.

    A replacement is that of `nearest` `(n_cells,)`, or else a random other label. Pairs of the sorted labels in
    `same`, bool `(n_labels, n_labels)`, don't replace each other.
    """
    given, names = truth.copy(), np.unique(truth)
    same = np.eye(len(names), dtype=bool) if same is None else same
    rng = np.random.default_rng(seed)
    for i in rng.choice(len(truth), max(1, round(share * len(truth))), replace=False):
        others = names[~same[np.searchsorted(names, truth[i])]]
        given[i] = rng.choice(others) if nearest is None else nearest[i]
    return given


def precision_at(score: np.ndarray, is_planted: np.ndarray, k: int) -> float:
    """Share of planted labels among the `k` cells with the highest scores; NaN ranks last."""
    first = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[:k]
    return float(is_planted[first].mean())


def marker_scores(train: AnnData, labels: np.ndarray, test: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Mean standardised expression of the markers of each label, `(n_cells, n_labels)`, and the sorted labels."""
    known = AnnData(expression(train), var=train.var[[]])
    known.obs["label"] = labels
    known.obs["label"] = known.obs["label"].astype("category")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fold changes of genes without counts, which are not used
        scanpy.tl.rank_genes_groups(known, "label", method="t-test", n_genes=N_MARKERS)
    names = np.unique(labels)
    genes = {name: known.uns["rank_genes_groups"]["names"][name].tolist() for name in names}
    chosen = sorted({gene for row in genes.values() for gene in row})
    values = expression(test)[:, test.var_names.get_indexer(chosen)].toarray()
    values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-6)
    return np.stack([values[:, [chosen.index(g) for g in genes[name]]].mean(axis=1) for name in names], axis=1), names


def best_other(values: np.ndarray, names: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Highest of the values `(n_cells, n_labels)` of another label minus that of the given label, `(n_cells,)`."""
    own = names == given[:, None]
    return np.where(own, -np.inf, values).max(axis=1) - np.where(own, values, -np.inf).max(axis=1)


def confident_scores(test: AnnData, given: np.ndarray, seed: int) -> np.ndarray:
    """Log odds against the given labels, from a regression cross-validated on the given labels, `(n_cells,)`."""
    points = TruncatedSVD(min(COMPONENTS, test.n_vars - 1), random_state=seed).fit_transform(expression(test))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=2000)
    p = cross_val_predict(model, points / points.std(), given, cv=folds, method="predict_proba")
    return best_other(np.log(p.clip(min=1e-9)), np.unique(given), given)


def meanings(pipeline: ScMMGPTPipeline, names: np.ndarray) -> np.ndarray:
    """Labels of the checkpoint that each label of a file means, bool `(len(names), n_labels)`."""
    labels = list(pipeline.annotation_settings()["labels"])
    stored = pipeline.model.config.annotation or {}
    numbers = {name: i for i, name in enumerate(labels)}
    return label_members(names.tolist(), numbers, stored.get("terms", []), stored)


def overlap(members: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Pairs of labels that share a type of the checkpoint, bool `(n_names, n_names)`; `members` is from [`meanings`].

    A label that shares a type with every other label is refused, because no label can replace it.
    """
    same: np.ndarray = (members[:, None] & members).any(axis=2) | np.eye(len(names), dtype=bool)
    if same.all(axis=1).any():
        alone = names[same.all(axis=1)].tolist()
        raise ValueError(
            f"No wrong label can be planted for {alone[0]!r}: each of the {len(names)} labels "
            f"({', '.join(names[:5])}) shares a type with it. Name a column with types that exclude each other."
        )
    return same


def evaluate_audit(
    pipeline: ScMMGPTPipeline,
    test: AnnData,
    truth: np.ndarray,
    counts: AnnData,
    train: tuple[AnnData, np.ndarray] | None = None,
    *,
    share: float = 0.05,
    seeds: int = 5,
) -> dict[str, Any]:
    """Plant wrong labels in `test`, and rank them by every system.

    Args:
        test: Cells to audit; their true labels are `truth`, `(n_cells,)`.
        counts: The same cells with counts in `X`, for the baselines.
        train: Cells with counts, and their labels, for the markers; default: `counts` with the given labels.
        share: Share of the labels to replace, in each of `seeds` draws.

    Returns:
        JSON-able dict: `n_cells`, `n_planted`, and `kinds`: kind of replacement -> `precision` by system (a list over
        seeds), and `precision` and `recall` of the verdict "contradicted".
    """
    names = np.unique(truth)
    members = meanings(pipeline, names)
    same = overlap(members, names)
    annotated = pipeline.annotate(test.copy())
    p = np.asarray(annotated.obsm["scmmgpt_probabilities"]) @ members.T
    nearest = names[np.where(same[np.searchsorted(names, truth)], -1, p).argmax(axis=1)]
    markers = None if train is None else marker_scores(*train, counts)
    n_planted = max(1, round(share * len(truth)))
    result: dict[str, Any] = {"n_cells": len(truth), "n_planted": n_planted, "kinds": {}}
    for kind in KINDS:
        by_system: dict[str, list[float]] = {}
        verdicts = []
        for seed in range(seeds):
            given = plant(truth, share, seed, nearest if kind == "near" else None, same)
            cells = test.copy()
            cells.obs["given"] = given
            audit = pipeline.audit(cells, "given")
            is_planted = given != truth
            scores = {
                "audit: file and model": audit.score,
                "model alone": audit.odds,
                "regression of the audit alone": audit.file_odds,
                "markers of the labels": best_other(*(markers or marker_scores(counts, given, counts)), given),
                "cross-validated regression of scikit-learn": confident_scores(counts, given, seed),
                "random": hashes(len(truth), seed).astype(float),
            }
            for system, score in scores.items():
                by_system.setdefault(system, []).append(round(precision_at(score, is_planted, n_planted), 4))
            bad = audit.verdict == CONTRADICTED
            hits = float((bad & is_planted).sum())
            verdicts.append((hits / max(bad.sum(), 1), hits / is_planted.sum()))
        precision, recall = np.mean(verdicts, axis=0)
        verdict = {"precision": round(float(precision), 4), "recall": round(float(recall), 4)}
        result["kinds"][kind] = {"precision": by_system, CONTRADICTED: verdict}
    return result


def judge_finetuned(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune on a part of the cells, and audit the other cells."""
    adata, labels = read_labelled(args.adata, args.label_key)
    train, test = split_rows(labels, test_share=args.test_share)
    with tempfile.TemporaryDirectory() as folder:
        cells = adata[train].copy()
        cells.obs["label"] = labels[train]
        pipeline = run_finetune(cells, folder, label_key="label")
    judged = adata[test].copy()
    known = adata[train].copy(), labels[train]
    return evaluate_audit(pipeline, judged, labels[test], judged, known, share=args.share, seeds=args.seeds)


def judge_all(args: argparse.Namespace) -> dict[str, Any]:
    """Audit all cells by a given checkpoint."""
    pipeline = ScMMGPTPipeline.from_pretrained(args.model)
    adata: Any = read_file(args.adata)
    labels = np.array([label or "" for label in column_of(adata.obs, args.label_key)], dtype=str)
    names, n_of = np.unique(labels, return_counts=True)
    usable = meanings(pipeline, names).any(axis=1) & (n_of >= FOLDS)
    left_out = {str(name): int(n) for name, n in zip(names[~usable], n_of[~usable], strict=True)}
    if usable.sum() < 2:
        raise ValueError(
            f"obs[{args.label_key!r}] of {args.adata} has {usable.sum()} labels that mean a type of the checkpoint "
            f"and have {FOLDS} cells; two or more are needed. Left out: {', '.join(list(left_out)[:5]) or 'none'}."
        )
    rows = np.flatnonzero(np.isin(labels, names[usable]))
    adata = adata[rows].copy()
    choice = pipeline.processor.choose_input(adata)
    values = choice.convert(adata).to_csr(max(pipeline.processor.gene_index.vocabulary.values()) + 1)
    values = values[:, np.flatnonzero(values.getnnz(axis=0))]
    counts = AnnData(values, obs=adata.obs[[]])
    result = evaluate_audit(pipeline, adata, labels[rows], counts, share=args.share, seeds=args.seeds)
    return {"model": str(args.model), "left_out": left_out, **result}


def table(result: dict[str, Any]) -> str:
    """Format precision at k, mean ± standard deviation over seeds, with one line for each system."""
    of_kinds = [result["kinds"][kind] for kind in KINDS]
    rows = []
    for system in of_kinds[0]["precision"]:
        values = [of_kind["precision"][system] for of_kind in of_kinds]
        rows.append([system, *(f"{np.mean(v):.3f} ± {np.std(v):.3f}" for v in values)])
    verdicts = [of_kind[CONTRADICTED] for of_kind in of_kinds]
    called = [f"{verdict['precision']:.3f}, {verdict['recall']:.3f}" for verdict in verdicts]
    rows.append(["called contradicted: precision, recall", *called])
    return markdown([f"precision at {result['n_planted']}", *KINDS], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = training_parser("audit", __doc__)
    parser.add_argument(
        "--share", type=number(float, 0, 0.5, above=True), default=0.05, help="share of wrong labels (%(default)s)"
    )
    parser.add_argument("--seeds", type=COUNT, default=5, help="draws of wrong labels (%(default)s)")
    text = "audit all cells by this checkpoint, `.` for the checkpoint of the package (default: fine-tune a new one)"
    parser.add_argument("--model", metavar="CHECKPOINT", help=text)
    args = parser.parse_args(argv)
    result = judge_finetuned(args) if args.model is None else judge_all(args)
    output = Path(args.output)
    write_json(output / "results.json", {**result, "adata": str(args.adata), "label_key": args.label_key})
    (output / "table.md").write_text(table(result), encoding="utf-8")
    sizes = {name: result[name] for name in ("n_cells", "n_planted", "left_out") if name in result}
    sys.stdout.write(table(result) + json.dumps(sizes) + "\n")
    return 0
