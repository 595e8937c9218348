"""Evaluate generated descriptions of held-out cells, beside captions that need no language model.

python -m scmmgpt.eval description --corpus corpus --descriptions descriptions.csv --output description.json
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np
import sacrebleu

from scmmgpt.eval import baselines
from scmmgpt.eval.annotation import MODEL_NAME
from scmmgpt.eval.cells import LabelledCells, match_names, read_splits
from scmmgpt.eval.distances import discrepancy, gaussian_kernel, median_distance
from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import (
    ROUGE_TYPES,
    cell_types_in_text,
    embed_texts,
    rouge_f,
    text_scores,
)
from scmmgpt.eval.results import (
    BASELINE,
    CONTROL,
    MODEL,
    N_RESAMPLES,
    REFERENCE,
    Estimate,
    Measure,
    bootstrap_draws,
    format_table,
    mean_estimate,
    recentre,
    tabulate,
)
from scmmgpt.files import write_json


logger = logging.getLogger(__name__)

BARCODE_COLUMNS = ("barcode", "cell")
TEXT_COLUMNS = ("scmmgpt_description", "description")
MAX_PAIRS = 2000  # kernel matrices are quadratic in the number of texts
BLIND_TO_PAIRING = ("mmd2", "sliced_wasserstein")  # metrics that shuffled descriptions cannot change

MEASURES = {
    "named_type_accuracy": Measure(
        "names true type",
        True,
        "Share of descriptions whose first named cell type (or a synonym of it) is the true one.",
    ),
    "cosine": Measure(
        "cosine", True, "Mean cosine of description and reference, as all-MiniLM-L6-v2 sentence embeddings."
    ),
    "mmd2": Measure(
        "MMD²",
        False,
        "Unbiased squared maximum mean discrepancy between the embeddings of descriptions and references, with the "
        "median distance between references as bandwidth; 0 on average for equal distributions. It compares all texts "
        "with all, and cannot see which cell a text belongs to.",
    ),
    "sliced_wasserstein": Measure(
        "sliced Wasserstein",
        False,
        "Sliced 2-Wasserstein distance between the same embeddings, 200 directions; as blind to the pairing.",
    ),
    "rougeL": Measure("ROUGE-L", True, "Mean ROUGE-L F-measure against the reference."),
    "bleu": Measure("BLEU", True, "Corpus BLEU against the reference (sacrebleu defaults), 0 to 100."),
}


def first_named_type(text: str, labels: Sequence[str]) -> str | None:
    """The first cell type that a text names, by its label alone."""
    return next(iter(cell_types_in_text(text, labels)), None)


def evaluate_descriptions(
    descriptions: Sequence[str],
    references: Sequence[str],
    cell_types: Sequence[str],
    train_labels: Sequence[str],
    *,
    baseline_labels: Sequence[str] | None = None,
    train_texts: Sequence[str] | None = None,
    label_text: Callable[[str], str] = "cell type: {}.".format,
    parse: Callable[[str, Sequence[str]], str | None] = first_named_type,
    embed: Callable[[Sequence[str]], np.ndarray] = embed_texts,
    names: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    n_samples: int = 12,
    seed: int = 0,
) -> dict:
    """Score descriptions beside captions that are looked up instead of generated.

    Args:
        descriptions: Generated text of each cell.
        references: Reference text of each cell.
        cell_types: True type of each cell.
        train_labels: Types of the training cells.
        baseline_labels: Type of each cell as logistic regression predicts it; adds the baselines that write from it.
        train_texts: Text of each training cell; adds the baselines that copy one.
        label_text: Writes the label-only caption of a type.
        parse: Finds the type that a text names among candidates.
        embed: Sentence embedder, texts to array `(n, d)`.
        names: Barcodes, for the samples.
        n_resamples: Bootstrap replicates of the intervals.
        n_samples: Cells to show in the report, spread over types.
        seed: Seed of the bootstrap, the control and the drawn captions.

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `parsing`, `samples` and sizes.
    """
    descriptions = ["" if text is None or text != text else str(text) for text in descriptions]
    references, cell_types = [str(text) for text in references], np.asarray(cell_types).astype(str)
    if not len(descriptions) == len(references) == len(cell_types):
        raise ValueError(
            f"Got {len(descriptions)} descriptions, {len(references)} references and {len(cell_types)} cell types."
        )
    if len(references) < 2:
        raise ValueError(f"A comparison of texts needs two cells at least, but got {len(references)}.")
    n_given = len(references)
    if n_given > MAX_PAIRS:
        rows = np.sort(np.random.default_rng(seed).choice(n_given, MAX_PAIRS, replace=False))
        logger.info("Sampled %d of %d descriptions.", MAX_PAIRS, n_given)
        descriptions, references = [descriptions[i] for i in rows], [references[i] for i in rows]
        cell_types = cell_types[rows]
        baseline_labels = None if baseline_labels is None else np.asarray(baseline_labels)[rows]
        names = None if names is None else np.asarray(names)[rows]
    candidates = sorted(set(train_labels) | set(cell_types))
    texts = {MODEL_NAME: (MODEL, descriptions)}
    majority = baselines.majority_class(train_labels, len(references)).labels
    if baseline_labels is not None:
        texts["label of logistic regression"] = (BASELINE, baselines.label_only_captions(baseline_labels, label_text))
        if train_texts is not None:
            texts["training caption of that label"] = (
                BASELINE,
                baselines.training_captions(baseline_labels, train_labels, train_texts, seed=seed),
            )
    texts["majority label"] = (BASELINE, baselines.label_only_captions(majority, label_text))
    texts["shuffled descriptions"] = (CONTROL, baselines.shuffled(descriptions, seed=seed).tolist())
    texts["label-only caption, true label"] = (REFERENCE, baselines.label_only_captions(cell_types, label_text))
    known = np.isin(cell_types, train_labels).all()
    if train_texts is not None and known:
        texts["training caption of the true type"] = (
            REFERENCE,
            baselines.training_captions(cell_types, train_labels, train_texts, seed=seed + 1),
        )
    draws = bootstrap_draws(len(references), n_resamples=n_resamples, seed=seed)
    embedded_references = embed(references)
    parsed = {}
    estimates = {}
    for name, (_, of_system) in texts.items():
        parsed[name] = [parse(text, candidates) for text in of_system]
        estimates[name] = _estimates(
            of_system,
            references,
            np.array(parsed[name], dtype=object) == cell_types,
            embed(of_system),
            embedded_references,
            draws,
            seed,
        )
    result = tabulate(MEASURES, {name: role for name, (role, _) in texts.items()}, estimates)
    regression = texts.get("label of logistic regression", (None, None))[1] and list(baseline_labels)
    return (
        {"task": "description"}
        | result
        | {
            "n": len(references),
            "n_given": n_given,
            "n_resamples": n_resamples,
            "seed": seed,
            "parsing": {
                "no_type_named": float(np.mean([label is None for label in parsed[MODEL_NAME]])),
                "several_types_named": float(
                    np.mean([len(cell_types_in_text(text, candidates)) > 1 for text in descriptions])
                ),
                "distinct_descriptions": len(set(descriptions)),
            },
            "samples": _samples(
                descriptions, references, cell_types, parsed[MODEL_NAME], regression, names, n_samples
            ),
        }
    )


def _estimates(texts, references, named, embedded, embedded_references, draws, seed) -> dict[str, Estimate]:
    n = len(references)
    scores = text_scores(
        texts,
        references,
        prediction_embeddings=embedded,
        reference_embeddings=embedded_references,
        seed=seed,
    )
    cosine = (embedded * embedded_references).sum(1) / np.maximum(
        np.linalg.norm(embedded, axis=1) * np.linalg.norm(embedded_references, axis=1), 1e-12
    )
    bandwidth = median_distance(embedded_references)
    pairs = ((embedded, embedded), (embedded_references, embedded_references), (embedded, embedded_references))
    mmd2 = discrepancy(*(gaussian_kernel(a, b, bandwidth) for a, b in pairs), x_weights=draws, y_weights=draws)
    return {
        "named_type_accuracy": mean_estimate(named, draws),
        "cosine": mean_estimate(cosine, draws),
        "mmd2": Estimate(scores["mmd2"], n, recentre(scores["mmd2"], mmd2)),
        "sliced_wasserstein": Estimate(scores["sliced_wasserstein"], n),
        "rougeL": mean_estimate(rouge_f(texts, references)[:, ROUGE_TYPES.index("rougeL")], draws),
        "bleu": Estimate(scores["bleu"], n, _bleu_replicates(texts, references, draws)),
    }


def _bleu_replicates(texts, references, draws) -> np.ndarray:
    """Corpus BLEU of every replicate, from the n-gram counts of each sentence, which add up."""
    metric = sacrebleu.BLEU()
    sentences = sacrebleu.BLEU(effective_order=True)
    scored = [sentences.sentence_score(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    statistics = draws @ np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scored])
    order = metric.max_ngram_order
    return np.array(
        [
            metric.compute_bleu(
                correct=row[:order].tolist(),
                total=row[order : 2 * order].tolist(),
                sys_len=int(row[-2]),
                ref_len=int(row[-1]),
                smooth_method=metric.smooth_method,
            ).score
            for row in statistics
        ]
    )


def _samples(descriptions, references, cell_types, parsed, regression, names, n_samples) -> list[dict]:
    """Cells to show: one of each type in turn, in the order given, right or wrong alike."""
    by_type: dict[str, list[int]] = {}
    for i, label in enumerate(cell_types):
        by_type.setdefault(label, []).append(i)
    turns = max(map(len, by_type.values()))
    order = [rows[turn] for turn in range(turns) for rows in by_type.values() if turn < len(rows)]
    return [
        {
            "name": None if names is None else str(names[i]),
            "cell_type": str(cell_types[i]),
            "named": parsed[i],
            "logistic_regression": None if not regression else str(regression[i]),
            "description": descriptions[i],
            "reference": references[i],
        }
        for i in order[:n_samples]
    ]


def read_descriptions(path: str, test: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
    """Match descriptions with the cells of the test split by barcode.

    Args:
        path: What `scmmgpt describe` writes: the `.csv` of `--table` or the `.h5ad`. A table has the barcodes in the
            column "barcode" or "cell", and texts in "scmmgpt_description" or "description".
        test: The test split of the corpus.

    Returns:
        Rows of `test`, and the description of each.
    """
    if str(path).endswith(".h5ad"):
        import anndata

        table = anndata.read_h5ad(path, backed="r").obs.rename_axis("barcode").reset_index()
    else:
        import pandas as pd

        table = pd.read_csv(path, dtype=str, keep_default_na=False, sep="\t" if str(path).endswith(".tsv") else ",")
    columns = []
    for names in (BARCODE_COLUMNS, TEXT_COLUMNS):
        found = [name for name in names if name in table]
        if not found:
            raise ValueError(f"{path} has none of the columns {list(names)}; it has {list(table.columns)}.")
        columns.append(table[found[0]].astype(str).to_numpy())
    rows, kept = match_names(columns[0], test, path)
    return rows, columns[1][kept]


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Arguments that say where the descriptions are; shared with the report."""
    parser.add_argument(
        "--descriptions", required=required, help="described cells, the .csv or .h5ad that `scmmgpt describe` writes"
    )
    parser.add_argument("--templates", default="default", help="caption templates of the training (%(default)s)")


def run(
    args: argparse.Namespace, train: LabelledCells, test: LabelledCells, regression: baselines.TypePrediction
) -> dict:
    """Read the descriptions that the arguments name and evaluate them; `regression` covers all test cells."""
    from scmmgpt.cells_scmmgpt import hash_names
    from scmmgpt.train.data.captions import CaptionSampler, parse_cell_type

    rows, descriptions = read_descriptions(args.descriptions, test)
    test, regression = test.take(rows), regression.take(rows)
    term_ids = _term_ids(train) | _term_ids(test)
    sampler = CaptionSampler(args.templates)
    return evaluate_descriptions(
        descriptions,
        sampler.answer(test.obs, cell_ids=hash_names(test.names)),
        test.labels,
        train.labels,
        baseline_labels=regression.labels,
        train_texts=sampler.answer(train.obs, cell_ids=hash_names(train.names)),
        label_text=lambda label: sampler.label_text(label, term_ids.get(label)),
        parse=lambda text, candidates: parse_cell_type(text, {label: term_ids.get(label) for label in candidates}),
        names=test.names,
        seed=args.seed,
    )


def _term_ids(cells: LabelledCells) -> dict[str, str | None]:
    ids = cells.obs.get("cell_type_ontology_term_id")
    if ids is None:
        return {}
    return {label: None if term != term else term for label, term in zip(cells.labels, ids, strict=True)}


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m scmmgpt.eval description`."""
    from scmmgpt.eval.__main__ import task_parser

    parser = task_parser("description", "Score descriptions of cells beside captions that need no language model.")
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    train, test = read_splits(args.corpus, label_key=args.label_key)
    result = run(args, train, test, baselines.regression_on_shared_genes(train, test, seed=args.seed))
    sys.stdout.write(format_table(result))
    write_json(args.output, result)
    return 0
