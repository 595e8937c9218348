"""Evaluate generated descriptions of held-out cells, with captions that need no language model as baselines.

python -m scmmgpt.eval description --corpus corpus --descriptions descriptions.csv --output description.json
"""

import argparse
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import sacrebleu
from numpy.typing import ArrayLike

from scmmgpt.cells_scmmgpt import Cells, hash_names
from scmmgpt.eval import baselines, results
from scmmgpt.eval.baselines import TypePrediction
from scmmgpt.eval.cells import LabelledCells, match_names, ontology_ids
from scmmgpt.eval.metrics.generated_cell_knn.generated_cell_knn import (
    discrepancy,
    gaussian_kernel,
    kernel_matrices,
    median_distance,
)
from scmmgpt.eval.metrics.text_discrepancy import text_discrepancy as metric
from scmmgpt.eval.task import run_task
from scmmgpt.genes_scmmgpt import GeneIndex


if TYPE_CHECKING:
    from scmmgpt.train.data.captions import CaptionSampler


logger = logging.getLogger(__name__)

BARCODE_COLUMNS = ("barcode", "cell")
TEXT_COLUMNS = ("scmmgpt_description", "description")
MAX_PAIRS = 2000  # kernel matrices are quadratic in the number of texts
N_SAMPLES = 12  # descriptions that the report shows
BLIND_TO_PAIRING = ("mmd2", "sliced_wasserstein")  # metrics that stay the same when descriptions are shuffled

MEASURES = {
    "named_type_accuracy": results.Measure(
        "names true type",
        True,
        "Share of descriptions whose first named cell type, by name or synonym, is the true type.",
    ),
    "type_depth": results.Measure(
        "depth of type",
        True,
        "Mean score of the first named type: 1 for the true type; less for an ancestor in the Cell Ontology, by the "
        "number of steps; 0 for any other type.",
    ),
    "genes_expressed": results.Measure(
        "named genes expressed",
        True,
        "Mean share of the gene mentions in a description that are true of its cell; a repeated mention counts as "
        "false; 0 if no gene is named.",
    ),
    "grounded": results.Measure(
        "grounded",
        True,
        "Share of descriptions in which every gene mention is true of the cell, no gene is repeated, and at least one "
        "gene is named.",
    ),
    "cosine": results.Measure(
        "cosine", True, "Mean cosine of description and reference, as all-MiniLM-L6-v2 sentence embeddings."
    ),
    "mmd2": results.Measure(
        "MMD²",
        False,
        "Unbiased squared maximum mean discrepancy between the embeddings of descriptions and references, with the "
        "median distance between references as bandwidth; 0 on average for equal distributions. MMD² does not depend "
        "on the pairing of descriptions with references.",
    ),
    "sliced_wasserstein": results.Measure(
        "sliced Wasserstein",
        False,
        "Sliced 2-Wasserstein distance between the same embeddings, 200 directions; also independent of the pairing.",
    ),
    "rougeL": results.Measure("ROUGE-L", True, "Mean ROUGE-L F-measure against the reference."),
    "bleu": results.Measure("BLEU", True, "Corpus BLEU against the reference (sacrebleu defaults), 0 to 100."),
}


def evaluate_descriptions(
    descriptions: Sequence[str] | np.ndarray,
    references: Sequence[str],
    cell_types: ArrayLike,
    train_labels: ArrayLike,
    *,
    label_text: Callable[[str], str],
    parse: Callable[[str, Sequence[str]], str | None],
    baseline_labels: ArrayLike | None = None,
    train_texts: Sequence[str] | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
    checks: Mapping[str, Callable[[str, int], float]] | None = None,
    embed: Callable[[Sequence[str]], np.ndarray] = metric.embed_texts,
    names: ArrayLike | None = None,
    n_resamples: int = results.N_RESAMPLES,
    seed: int = 0,
) -> dict:
    """Score descriptions, and as baselines captions that are looked up instead of generated.

    Args:
        descriptions, references, cell_types: Generated text, reference text and true type of each cell.
        train_labels: Types of the training cells.
        label_text: Cell type -> caption of the label alone.
        parse: Text and candidate types -> the type that the text names, or None.
        baseline_labels: Predictions of logistic regression; adds baselines with captions of the predicted types.
        train_texts: Text of each training cell; adds baselines that copy a training text.
        others: System -> text of each cell, for further methods.
        checks: Metric of `MEASURES` -> function of a text and the position of its cell.
        embed: Sentence embedder, texts -> array `(n, d)`.
        names: Barcode of each cell, for the samples.
        seed: Seed of the bootstrap, the control and the drawn captions.

    Returns:
        JSON-able dict: `measures`, `rows`, `comparisons` (see `results.tabulate`), `parsing`, `samples` and sizes.
    """
    texts = ["" if text is None or text != text else str(text) for text in descriptions]
    types, train_types = np.asarray(cell_types).astype(str), np.asarray(train_labels).astype(str)
    if not len(texts) == len(references) == len(types):
        raise ValueError(f"Got {len(texts)} descriptions, {len(references)} references and {len(types)} cell types.")
    rows = _sample_rows(len(types), seed)
    texts, truths, types = [texts[i] for i in rows], [str(references[i]) for i in rows], types[rows]
    predicted, barcodes = (None if v is None else np.asarray(v)[rows] for v in (baseline_labels, names))
    systems = _systems(texts, types, predicted, train_types, train_texts, label_text, seed)
    systems |= {name: (results.BASELINE, [str(of[i]) for i in rows]) for name, of in (others or {}).items()}
    candidates = sorted(set(train_types) | set(types))
    draws = results.bootstrap_draws(len(truths), n_resamples=n_resamples, seed=seed)
    embedded_truths = embed(truths)
    named = {name: [parse(text, candidates) for text in of_system] for name, (_, of_system) in systems.items()}
    estimates = {}
    for name, (_, of_system) in systems.items():
        hits = np.array(named[name], dtype=object) == types
        estimates[name] = _estimates(of_system, truths, hits, embed(of_system), embedded_truths, draws, seed)
        for metric_name, check in (checks or {}).items():
            values = [check(text, row) for text, row in zip(of_system, rows.tolist(), strict=True)]
            estimates[name][metric_name] = results.mean_estimate(np.array(values), draws)
    roles = {name: role for name, (role, _) in systems.items()}
    n_named = [len(metric.cell_types_in_text(text, candidates)) for text in texts]
    result = {"task": "description"} | results.tabulate(MEASURES, roles, estimates)
    result |= {"n": len(truths), "n_given": len(references), "n_resamples": n_resamples, "seed": seed}
    return result | {
        "parsing": {
            "no_type_named": float(np.mean([label is None for label in named[results.MODEL_NAME]])),
            "several_types_named": float(np.mean(np.array(n_named) > 1)),
            "distinct_descriptions": len(set(texts)),
        },
        "samples": _samples(texts, truths, types, named[results.MODEL_NAME], predicted, barcodes),
    }


def _sample_rows(n: int, seed: int) -> np.ndarray:
    """Rows of the pairs to score: all rows, or `MAX_PAIRS` random rows, ascending."""
    if n < 2:
        raise ValueError(f"Texts of {n} cells cannot be compared. Give at least two cells.")
    if n <= MAX_PAIRS:
        return np.arange(n)
    logger.info("Sampled %d of %d descriptions.", MAX_PAIRS, n)
    return np.sort(np.random.default_rng(seed).choice(n, MAX_PAIRS, replace=False))


def _systems(
    texts: list[str],
    types: np.ndarray,
    predicted: np.ndarray | None,
    train_types: np.ndarray,
    train_texts: Sequence[str] | None,
    label_text: Callable[[str], str],
    seed: int,
) -> dict[str, tuple[str, list[str]]]:
    """System -> role and texts: the model, looked-up captions of predicted and of true types, and the control."""
    systems: dict[str, tuple[str, list[str]]] = {results.MODEL_NAME: (results.MODEL, texts)}
    if predicted is not None:
        systems["label of logistic regression"] = (results.BASELINE, [label_text(label) for label in predicted])
    if predicted is not None and train_texts is not None:
        copied = baselines.training_captions(predicted, train_types, train_texts, seed=seed)
        systems["training caption of that label"] = (results.BASELINE, copied)
    majority = baselines.majority_class(train_types, len(types)).labels
    systems["majority label"] = (results.BASELINE, [label_text(label) for label in majority])
    systems["shuffled descriptions"] = (results.CONTROL, baselines.shuffled(texts, seed=seed).tolist())
    systems["label-only caption, true label"] = (results.REFERENCE, [label_text(label) for label in types])
    if train_texts is not None and np.isin(types, train_types).all():
        copied = baselines.training_captions(types, train_types, train_texts, seed=seed + 1)
        systems["training caption of the true type"] = (results.REFERENCE, copied)
    return systems


def _estimates(
    texts: list[str], truths: list[str], hits: np.ndarray, x: np.ndarray, y: np.ndarray, draws: np.ndarray, seed: int
) -> dict[str, results.Estimate]:
    """Estimate all metrics of texts (embeddings `x`) against references `truths` (embeddings `y`)."""
    n = len(truths)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = (x * y).sum(1) / np.maximum(norms, 1e-12)
    kernels = kernel_matrices(functools.partial(gaussian_kernel, bandwidth=median_distance(y)), x, y)
    mmd2 = float(discrepancy(*kernels))
    rouge = metric.rouge_f(texts, truths)[:, metric.ROUGE_TYPES.index("rougeL")]
    bleu = sacrebleu.corpus_bleu(texts, [truths]).score
    return {
        "named_type_accuracy": results.mean_estimate(hits, draws),
        "cosine": results.mean_estimate(cosine, draws),
        "mmd2": results.Estimate(mmd2, n, results.recentre(mmd2, discrepancy(*kernels, wx=draws, wy=draws))),
        "sliced_wasserstein": results.Estimate(metric.sliced_wasserstein(x, y, seed=seed), n),
        "rougeL": results.mean_estimate(rouge, draws),
        "bleu": results.Estimate(bleu, n, _bleu_replicates(texts, truths, draws)),
    }


def _bleu_replicates(texts: list[str], references: list[str], draws: np.ndarray) -> np.ndarray:
    """Corpus BLEU of every bootstrap replicate, from the summed n-gram counts of its sentences."""
    bleu = sacrebleu.BLEU(effective_order=True)
    scored = [bleu.sentence_score(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    statistics = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scored])
    sums, n = (draws @ statistics).astype(int).tolist(), bleu.max_ngram_order
    scores = [bleu.compute_bleu(r[:n], r[n : 2 * n], r[-2], r[-1], bleu.smooth_method) for r in sums]
    return np.array([score.score for score in scores])


def _samples(
    texts: list[str],
    references: list[str],
    types: np.ndarray,
    named: list[str | None],
    predicted: np.ndarray | None,
    barcodes: np.ndarray | None,
) -> list[dict]:
    """Choose `N_SAMPLES` cells to show: one of each type in turn, in the given order, right or wrong."""
    by_type: dict[str, list[int]] = {}
    for i, label in enumerate(types):
        by_type.setdefault(label, []).append(i)
    turns = max(map(len, by_type.values()))
    order = [rows[turn] for turn in range(turns) for rows in by_type.values() if turn < len(rows)]
    return [
        {
            "name": None if barcodes is None else str(barcodes[i]),
            "cell_type": str(types[i]),
            "named": named[i],
            "logistic_regression": None if predicted is None else str(predicted[i]),
            "description": texts[i],
            "reference": references[i],
        }
        for i in order[:N_SAMPLES]
    ]


def read_descriptions(path: str, test: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
    """Read a `.h5ad` file or a table of `scmmgpt describe`: rows of `test`, and the description of each.

    A table has the barcodes in one of `BARCODE_COLUMNS` and the texts in one of `TEXT_COLUMNS`.
    """
    if str(path).endswith(".h5ad"):
        import anndata

        table = anndata.read_h5ad(path, backed="r").obs.rename_axis("barcode").reset_index()
    else:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, sep="\t" if str(path).endswith(".tsv") else ",")
    columns = []
    for names in (BARCODE_COLUMNS, TEXT_COLUMNS):
        present = [name for name in names if name in table]
        if not present:
            raise ValueError(f"{path} has none of the columns {list(names)}; it has {list(table.columns)}.")
        columns.append(table[present[0]].astype(str).to_numpy())
    rows, kept = match_names(columns[0], test, path)
    return rows, columns[1][kept]


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments of this task, which the report also takes."""
    parser.add_argument(
        "--descriptions", required=required, help="described cells: .csv or .h5ad of `scmmgpt describe`"
    )
    parser.add_argument("--templates", default="default", help="caption templates of the training (%(default)s)")


def evaluate_file(
    args: argparse.Namespace, train: LabelledCells, test: LabelledCells, regression: TypePrediction | None = None
) -> dict:
    """Evaluate the described file; logistic regression, if not given for all test cells, is fitted."""
    regression = regression or baselines.regression_on_shared_genes(train, test, seed=args.seed)
    rows, descriptions = read_descriptions(args.descriptions, test)
    predicted = regression.take(rows).labels
    return evaluate_cells(descriptions, args.templates, train, test.take(rows), predicted, seed=args.seed)


def evaluate_cells(
    descriptions: np.ndarray,
    templates: str,
    train: LabelledCells,
    test: LabelledCells,
    predicted: np.ndarray,
    *,
    others: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> dict:
    """Evaluate descriptions of the test cells against answers drawn from the templates (see [`CaptionSampler`]).

    `predicted` are the types of the test cells by logistic regression, `others` the texts of further methods.
    """
    from scmmgpt.train.data.captions import CaptionSampler, parse_cell_type

    term_ids = ontology_ids(train) | ontology_ids(test)
    genes = np.union1d(train.genes, test.genes)
    train, test = train.select_genes(genes), test.select_genes(genes)
    shares = train.counts.multiply(1 / np.maximum(train.total_counts, 1)[:, None])
    sampler = CaptionSampler(templates, gene_means=np.asarray(shares.mean(axis=0)).ravel())
    references = _write_answers(sampler, test)
    return evaluate_descriptions(
        descriptions,
        references,
        test.labels,
        train.labels,
        baseline_labels=predicted,
        train_texts=_write_answers(sampler, train),
        others=others,
        checks=_checks(test, term_ids, references),
        label_text=lambda label: sampler.label_text(label, term_ids.get(label)),
        parse=lambda text, candidates: parse_cell_type(text, {label: term_ids.get(label) for label in candidates}),
        names=test.names,
        seed=seed,
    )


def _write_answers(sampler: "CaptionSampler", cells: LabelledCells) -> list[str]:
    """The reference text of each cell."""
    ids, genes = hash_names(cells.names), np.arange(len(cells.genes))
    counts = Cells.from_csr(cells.counts, genes, ids, cells.total_counts)
    return sampler.answer(cells.obs, counts, cells.genes)


def _checks(
    test: LabelledCells, term_ids: dict[str, str | None], references: Sequence[str]
) -> dict[str, Callable[[str, int], float]]:
    """Make the checks of a text against its cell: of the type, and of genes if the references name genes."""
    from scmmgpt.train.rewards import genes_in_text, score_genes, score_type

    index = GeneIndex({name: i for i, name in enumerate(test.genes)})
    named = functools.cache(lambda text: genes_in_text(text, index))
    expressed = [set(part.tolist()) for part in np.split(test.counts.indices, test.counts.indptr[1:-1])]

    def of_genes(text: str, row: int) -> float:
        return score_genes(named(text), expressed[row])

    def of_type(text: str, row: int) -> float:
        return score_type(text, test.labels[row], term_ids.get(test.labels[row])) or 0.0

    if not any(map(named, references)):  # short templates name no genes, so descriptions need none
        return {"type_depth": of_type}
    return {
        "type_depth": of_type,
        "genes_expressed": of_genes,
        "grounded": lambda text, row: float(of_genes(text, row) == 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    about = "Score descriptions of cells beside captions that need no language model."
    return run_task("description", about, add_arguments, evaluate_file, argv)
