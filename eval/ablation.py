"""Ablate a checkpoint: its linear parts alone (wide), its network alone (deep), and both.

```
python -m scmmgpt.eval ablation --model CHECKPOINT [CHECKPOINT ...] --corpus corpus --output ablation.json
```

Wide parts are the label readout, its token in the language model, and the cell states. Deep parts are
the cell model, the Q-Former, its tokens in the language model, and the expression head. A part is switched off in a
trained checkpoint without retraining, so the remaining parts may rely on the missing part. Rows, on the test split:

* `annotation`: accuracy, after `calibrate` on the validation split for each choice of parts;
* `search`: AUROC of the cells of a type for its text, mean over types; if the readout has no places of labels, the
  standardised scores of both parts are added;
* `descriptions`: share of the descriptions that name the true type;
* `generation`: E-distance and two-sample AUC, for cell states and for the expression head, which are never mixed.

With checkpoints of several seeds, the table has means and standard deviations.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from sklearn.metrics import roc_auc_score

from scmmgpt.commands.errors import number
from scmmgpt.commands.files import write_json
from scmmgpt.eval import baselines, generation, results
from scmmgpt.eval.cells import LabelledCells, ontology_ids, read_splits
from scmmgpt.eval.results import markdown
from scmmgpt.eval.task import task_parser
from scmmgpt.modeling_scmmgpt import ScMMGPTBridgeModel
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.query_scmmgpt import standardised
from scmmgpt.scoring_scmmgpt import mean_similarity
from scmmgpt.train.data.captions import parse_cell_type
from scmmgpt.train.data.corpus import Corpus, open_corpus
from scmmgpt.train.labels import column_of


PARTS = ("wide", "deep", "both")
MAX_NEW_TOKENS = 32
GENERATED = {"energy_distance": "generation, E-distance", "two_sample_auc": "generation, two-sample AUC"}
BESIDE = ("mean profile + Poisson", "real training cells")


@contextmanager
def switched_off(module: torch.nn.Module, name: str) -> Iterator[None]:
    """Set a submodule to None within the context."""
    part = module._modules[name]
    module._modules[name] = None
    try:
        yield
    finally:
        module._modules[name] = part


@contextmanager
def without_places(bridge: ScMMGPTBridgeModel) -> Iterator[None]:
    """Within the context, ignore the places of labels, which the readout otherwise adds to the embeddings of cells."""
    stored = bridge.config.label_readout
    bridge.config.label_readout = {name: value for name, value in (stored or {}).items() if name != "feature_width"}
    try:
        yield
    finally:
        bridge.config.label_readout = stored


@contextmanager
def silent(layer: torch.nn.Module) -> Iterator[None]:
    """Replace the outputs of a layer by 0 within the context."""
    handle = layer.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def labelled_test_cells(corpus: Corpus, label_key: str) -> tuple[AnnData, np.ndarray]:
    """Read the labelled cells of the test split, and their labels `(n_cells,)`."""
    adata = corpus.to_adata("test")
    labels = column_of(adata.obs, label_key)
    known = labels != None  # noqa: E711 (elementwise)
    return adata[known].copy(), labels[known].astype(str)


def annotate(pipeline: ScMMGPTPipeline, corpus: Corpus, label_key: str, parts: str) -> float:
    """Accuracy on the test split; `parts` is one of `PARTS`."""
    bridge, (adata, truth) = pipeline._bridge(), labelled_test_cells(corpus, label_key)
    with ExitStack() as stack:
        if parts == "deep":
            stack.enter_context(without_places(bridge))
            stack.enter_context(switched_off(bridge, "label_readout"))
        stored = dict(pipeline.model.config.annotation or {})
        pipeline.calibrate(corpus.to_adata("validation"), label_key)
        weight = 0.0 if parts == "wide" else None
        found = pipeline.annotate(adata, matching_weight=weight, min_score=0).obs["scmmgpt_cell_type"]
        pipeline.model.config.annotation = stored
    return float((found.astype(str).to_numpy() == truth).mean())


def search(pipeline: ScMMGPTPipeline, corpus: Corpus, label_key: str) -> dict[str, float]:
    """AUROC of the cells of a type for its text, mean over types: part -> value."""
    (adata, truth), config = labelled_test_cells(corpus, label_key), pipeline.model.config
    if "labels" not in (config.annotation or {}):
        raise ValueError("The checkpoint stores no labels; run `scmmgpt calibrate` on the validation split before.")
    texts = {label: text for label, text in config.annotation["labels"].items() if label in truth}
    choice, words = pipeline.processor.choose_input(adata), list(texts.values())
    bridge = pipeline._bridge()
    with without_places(bridge):
        scores = {"deep": pipeline.search_cells(adata, choice, words)[:, : len(words)]}
    if "feature_width" in config.label_readout:
        with silent(bridge.cell_projection):
            scores["wide"] = pipeline.search_cells(adata, choice, words)[:, : len(words)]
        scores["both"] = pipeline.search_cells(adata, choice, words)[:, : len(words)]
    else:
        panel = bridge.label_readout.for_genes(choice.match.measured)
        of_labels = mean_similarity(bridge, pipeline.processor, words, config.label_readout["texts"], panel)
        scores["wide"] = np.concatenate([of_labels(cells) for cells in choice.iter_cells(adata)])
        scores["both"] = np.sum([[standardised(column) for column in of.T] for of in scores.values()], axis=0).T
    return {
        part: float(np.mean([roc_auc_score(truth == label, of[:, i]) for i, label in enumerate(texts)]))
        for part, of in ((part, scores[part]) for part in PARTS)
    }


def describe(pipeline: ScMMGPTPipeline, corpus: Corpus, train: LabelledCells, label_key: str, parts: str) -> float:
    """Share of the descriptions of the test split that name the true type."""
    model, (adata, truth) = pipeline.model.model, labelled_test_cells(corpus, label_key)
    with ExitStack() as stack:
        if parts != "both":
            stack.enter_context(silent(model.label_projection if parts == "deep" else model.language_projection))
        pipeline.describe(adata, max_new_tokens=MAX_NEW_TOKENS)
    ids = ontology_ids(train)
    candidates = {label: ids.get(label) for label in sorted(set(train.labels))}
    named = [parse_cell_type(text, candidates) for text in adata.obs["scmmgpt_description"]]
    return float(np.mean(np.array(named, dtype=object) == truth))


def generate(
    pipeline: ScMMGPTPipeline, train: LabelledCells, test: LabelledCells, n_cells: int, parts: str, seed: int
) -> dict[str, dict[str, float]]:
    """Evaluate generated cells, and the baselines: measure -> system -> value."""
    prompts = pipeline.label_prompts()
    with ExitStack() as stack:
        if parts == "deep":
            stack.enter_context(switched_off(pipeline.model.model, "cell_states"))
        adata = pipeline.generate(prompts, n_cells, seed=seed, do_sample=True)
    sizes, genes = adata.obs["library_size"].to_numpy(), adata.var_names.to_numpy().astype(str)
    cells = generation.GeneratedCells(adata.X.toarray(), np.repeat(list(prompts), n_cells), genes, sizes)
    rows = generation.evaluate_generation(cells, train, test, n_resamples=6, seed=seed)["rows"]
    return {of: {row["system"]: row["value"] for row in rows if row["metric"] == of} for of in GENERATED}


def evaluate(checkpoint: str, corpus: Corpus, label_key: str, n_cells: int, seed: int) -> dict[str, dict[str, float]]:
    """Evaluate one checkpoint: row -> part or baseline -> value."""
    pipeline = ScMMGPTPipeline.from_pretrained(checkpoint)
    if getattr(pipeline._bridge(), "label_readout", None) is None:
        raise ValueError(f"{checkpoint} has no label readout. Name a checkpoint of `align` or `tune` that has one.")
    train, test = read_splits(corpus, label_key=label_key)
    regression = baselines.regression_on_shared_genes(train, test, seed=seed)
    accuracy = float((regression.labels == test.labels).mean())
    rows: dict[str, dict[str, float]] = {
        "annotation": {part: annotate(pipeline, corpus, label_key, part) for part in PARTS},
        "search": search(pipeline, corpus, label_key),
    }
    rows["annotation"]["logistic regression"] = accuracy
    if hasattr(pipeline.model, "generate_cells"):
        if pipeline.model.config.cell_tokens == "both":
            rows["descriptions"] = {part: describe(pipeline, corpus, train, label_key, part) for part in PARTS}
            rows["descriptions"]["logistic regression"] = accuracy
        if pipeline.model.config.num_state_components is not None:
            of = {part: generate(pipeline, train, test, n_cells, part, seed) for part in ("wide", "deep")}
            for measure, name in GENERATED.items():
                rows[name] = {part: values[measure][results.MODEL_NAME] for part, values in of.items()}
                rows[name] |= {system: of["wide"][measure][system] for system in BESIDE}
    return rows


def summarise(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Format a Markdown table: mean and, for several checkpoints, standard deviation."""
    columns = list(dict.fromkeys(name for run in runs for row in run.values() for name in row))
    rows = []
    for row in runs[0]:
        words = [row]
        for name in columns:
            values = [run[row][name] for run in runs if name in run.get(row, {})]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            words.append(f"{np.mean(values):.3f}{spread}" if values else "")
        rows.append(words)
    return markdown(["", *columns], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = task_parser("ablation", "Evaluate the linear parts of a checkpoint, its network, and both.")
    parser.add_argument("--model", nargs="+", required=True, help="checkpoints of `tune`, one for each seed")
    parser.add_argument(
        "--cells-per-label", type=number(int, 2), default=100, help="generated cells of each type (%(default)s)"
    )
    args = parser.parse_args(argv)
    corpus = open_corpus(args.corpus)
    runs = [evaluate(path, corpus, args.label_key, args.cells_per_label, args.seed) for path in args.model]
    about: dict[str, Any] = {"task": "ablation", "corpus": str(args.corpus), "models": list(args.model)}
    write_json(args.output, json.loads(json.dumps({**about, "runs": runs})))
    sys.stdout.write(summarise(runs))
    return 0
