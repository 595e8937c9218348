"""Compare our method with published methods trained on one corpus from the same parts, in one table for each task.

```
python -m scmmgpt.eval all --corpus results/demo/corpus --gene-texts gene_summary_human.csv.gz --output DIR
```

The outputs in DIR are the trained models, `results.json` and `report.md`; finished parts are reused. With `--seeds 3`
these outputs are in `DIR/seed-0` and so on, and DIR has the means over seeds with their spread.

* ours: `align`, `tune` and `calibrate` with the two configurations, then `annotate`, `describe` and `generate`;
* the methods of `eval/methods.py`, with the same CPU time for training as ours; `--time-factor` gives
  *Cell2Sentence-style* more time, because its sentences are long;
* logistic regression, ridge regression, CellTypist, and mean profiles with Poisson or negative binomial counts.

All systems learn from the training split, and are compared on the test split. `report.md` begins with the margins that
the published method claims over the best other method, here against *Cell2Sentence-style*: discrepancy of
descriptions, accuracy of annotation, and 5-NN accuracy of generated cells.
"""

import argparse
import functools
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler, normalize

from scmmgpt.cells_scmmgpt import hash_names
from scmmgpt.commands.errors import number
from scmmgpt.commands.files import read_json, write_json
from scmmgpt.eval import (
    annotation,
    annotators,
    baselines,
    clustering,
    description,
    generation,
    methods,
    results,
    retrieval,
)
from scmmgpt.eval.baselines import TypePrediction
from scmmgpt.eval.cells import LabelledCells, match_names, ontology_ids, read_splits
from scmmgpt.eval.claims import find_claims, markdown_claims
from scmmgpt.eval.generation import GeneratedCells
from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import embed_texts
from scmmgpt.eval.provenance import describe_corpus, read_training
from scmmgpt.eval.task import COUNT, SEVERAL, task_parser
from scmmgpt.modeling_scmmgpt import cell_text_similarity
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.train import align, tune
from scmmgpt.train.data.captions import CaptionSampler, parse_cell_type
from scmmgpt.train.data.corpus import Corpus, open_corpus


logger = logging.getLogger(__name__)

CONFIGS = Path(align.__file__).parent / "configs"
SENTENCES, CONTRAST, GENES = "Cell2Sentence-style", "LangCell-style", "GenePT-style"
AUTOENCODER = "scVI-style"
MAX_NEW_TOKENS = 48  # of a description
TASKS = ("annotation", "description", "generation", "retrieval", "clustering")
BATCH_KEYS = ("dataset_id", "donor_id")  # the first of these columns with several values is the batch


@dataclass(frozen=True)
class Study:
    """The cells that all methods share, and the folder of the trained methods."""

    corpus: Corpus
    train: LabelledCells
    test: LabelledCells
    output: Path
    args: argparse.Namespace

    @functools.cached_property
    def by_genes(self) -> tuple[np.ndarray, np.ndarray]:
        """GenePT's embeddings of training and test cells, cached, because embedding the gene texts takes minutes."""
        train, test = methods.embed_by_genes([self.train, self.test], self.args.gene_texts)
        return train, test

    def words(self, config: str, folder: Path) -> list[str]:
        """Words of the command line of a training command."""
        words = ["--config", config, "--corpus", str(self.corpus.path), "--output_dir", str(folder.absolute())]
        return [*words, "--seed", str(self.args.seed), "--report_to", "none", "--disable_tqdm", "true"]

    def once(self, name: str, train: Callable[[Path], None]) -> tuple[Path, float]:
        """Train a method unless its folder is complete; return the folder and the CPU seconds of the training."""
        folder, note = self.output / name, self.output / name / "seconds.json"
        if not note.is_file():
            start = time.process_time()
            train(folder)
            write_json(note, {"seconds": time.process_time() - start})
        return folder, float(read_json(note)["seconds"])


def calibrate(study: Study, checkpoint: Path) -> ScMMGPTPipeline:
    """Run `scmmgpt calibrate` on the validation split, or on the training split if there is none."""
    from scmmgpt.commands.calibration import calibrate_checkpoint

    pipeline = ScMMGPTPipeline.from_pretrained(str(checkpoint.absolute()))
    split = "validation" if "validation" in study.corpus.split_names else "train"
    cells, source = study.corpus.to_adata(split), study.corpus.path
    calibrate_checkpoint(pipeline, cells, str(checkpoint), source, study.args.label_key, {})
    return pipeline


def run_align(study: Study, folder: Path, *more: str, **options: Any) -> None:
    """Run stage 1 with further words of the command line, and options of [`align.main`]."""
    words = [*study.words(study.args.align_config, folder), *more]
    align.main(*align.make_parser().parse_args_and_config(words), **options)


def train_ours(study: Study) -> tuple[ScMMGPTPipeline, float, int]:
    """Train our checkpoint; return it, the CPU seconds of both stages, and the stage-1 steps of the same time."""
    aligned, first = study.once("aligned", lambda folder: run_align(study, folder))

    def second_stage(folder: Path) -> None:
        words = [*study.words(study.args.tune_config, folder), "--aligned", str(aligned.absolute())]
        tune.main(*tune.make_parser().parse_args_and_config(words))

    tuned, second = study.once("tuned", second_stage)
    steps = read_training([aligned])[0]["steps"]
    return calibrate(study, tuned), first + second, round(steps * (first + second) / first)


def by_name(study: Study, adata: AnnData, column: str) -> np.ndarray:
    """Values of an obs column of the annotated test split, in the order of the test cells; None for missing cells."""
    rows, kept = match_names(adata.obs_names, study.test, "the test split")
    values = np.full(len(study.test), None, dtype=object)
    values[rows] = adata.obs[column].to_numpy()[kept]
    return values


@dataclass(frozen=True)
class Trained:
    """Our model and the compared methods, trained."""

    pipeline: ScMMGPTPipeline  # ours
    contrast: ScMMGPTPipeline  # LangCell-style
    sentences: methods.CellSentenceModel  # Cell2Sentence-style
    templates: str  # caption templates of the descriptions that both language models learned
    seconds: dict[str, float]  # CPU time of training by system


def train_all(study: Study) -> Trained:
    """Train all methods, or load the methods that are already trained."""
    pipeline, seconds, steps = train_ours(study)
    words = [*study.words(study.args.tune_config, study.output / "cell2sentence"), "--aligned", "none"]
    data_args, model_args, training_args = tune.make_parser().parse_args_and_config(words)
    captions = align.make_captions(study.corpus, data_args, training_args)

    def sentences(folder: Path) -> None:
        limit = seconds * study.args.time_factor
        methods.train_cell2sentence(study.train, captions, model_args, training_args, folder, seconds=limit)

    def contrast(folder: Path) -> None:
        run_align(study, folder, "--max_steps", str(steps), fit_readout=lambda *_, **__: None)

    of_sentences, first = study.once("cell2sentence", sentences)
    of_contrast, second = study.once("langcell", contrast)
    return Trained(
        pipeline,
        calibrate(study, of_contrast),
        methods.load_cell2sentence(of_sentences, study.train),
        data_args.templates,
        {results.MODEL_NAME: seconds, SENTENCES: first, CONTRAST: second},
    )


def annotate(study: Study, pipeline: ScMMGPTPipeline) -> TypePrediction:
    """Annotate the test cells by `scmmgpt annotate`: labels and scores."""
    adata = pipeline.annotate(study.corpus.to_adata("test"))
    labels, scores = (by_name(study, adata, f"scmmgpt_{name}") for name in ("cell_type", "score"))
    return TypePrediction(labels.astype(str), scores.astype(float))


def evaluate_texts(study: Study, trained: Trained) -> dict[str, dict]:
    """Evaluate annotation and description. The annotation of Cell2Sentence-style is the type that its text names."""
    train, test, seed = study.train, study.test, study.args.seed
    regression = baselines.regression_on_shared_genes(train, test, seed=seed)
    told = trained.sentences.describe(test, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    candidates = ontology_ids(train)
    named = [parse_cell_type(text, candidates) or annotation.UNKNOWN for text in told]
    others = {SENTENCES: TypePrediction(np.array(named)), CONTRAST: annotate(study, trained.contrast)}
    ours = annotate(study, trained.pipeline)
    annotated = annotation.evaluate_annotation(
        ours.labels,
        test.labels,
        train,
        test,
        confidences=ours.confidences,
        regression=regression,
        others=others | linear_annotation(study),
        seed=seed,
    )
    adata = trained.pipeline.describe(study.corpus.to_adata("test"), max_new_tokens=MAX_NEW_TOKENS)
    texts = by_name(study, adata, "scmmgpt_description")
    of_texts = description.evaluate_cells(
        texts, trained.templates, train, test, regression.labels, others={SENTENCES: told}, seed=seed
    )
    return {"annotation": annotated, "description": of_texts}


def linear_annotation(study: Study) -> dict[str, TypePrediction]:
    """Annotate the test cells by GenePT's embedding with a linear head, by ridge regression, and by CellTypist."""
    train, test, seed = study.train, study.test, study.args.seed
    scaler = StandardScaler().fit(study.by_genes[0])  # the penalty depends on the scale
    x, y = map(scaler.transform, study.by_genes)
    predictions = {GENES: baselines.logistic_regression(x, train.labels, y, seed=seed)}
    genes = np.intersect1d(train.genes, test.genes)
    both = [cells.select_genes(genes) for cells in (train, test)]
    predictions["ridge"] = methods.ridge(both[0].expression, train.labels, both[1].expression)
    files = [AnnData(cells.counts) for cells in both]
    budget = annotators.LabelBudget(files[0], train.labels, np.arange(len(train)), files[1], seed)
    return predictions | {"CellTypist": TypePrediction(annotators.celltypist(budget))}


def evaluate_generation(study: Study, trained: Trained) -> dict:
    """Evaluate generated cells of each type.

    The reference "real training cells as sentences" shows the loss from the conversion to sentences and back.
    """
    train, seed, n = study.train, study.args.seed, study.args.cells_per_label
    prompts = trained.pipeline.label_prompts()
    generated = GeneratedCells.of(trained.pipeline.generate(prompts, n, seed=seed), list(prompts))
    labels = generated.prompts
    sentences = trained.sentences.sentences
    real = sentences.write(train, seed=seed)
    texts = np.repeat(list(prompts.values()), n).tolist()
    longest = 1 + max(len(trained.sentences.tokenizer(text)["input_ids"]) for text in real)  # one for the end token
    written = trained.sentences.generate(texts, max_new_tokens=longest, seed=seed)
    known = labels[np.isin(labels, train.labels)]
    noisy = baselines.negative_binomial_cells(known, train, seed=seed)
    others = {
        SENTENCES: (results.BASELINE, GeneratedCells(written, labels, train.genes)),
        "mean profile + negative binomial": (results.BASELINE, GeneratedCells(noisy, known, train.genes)),
        "real training cells as sentences": (
            results.REFERENCE,
            GeneratedCells(sentences.read(real), train.labels, train.genes),
        ),
    }
    if importlib.util.find_spec("scvi") is None:
        logger.warning("The row of scVI is left out, because scvi-tools (extra `integration`) is not installed.")
    else:
        limit = trained.seconds[results.MODEL_NAME]
        folder, seconds = study.once("scvi", lambda path: methods.train_scvi(train, path, seconds=limit, seed=seed))
        trained.seconds[AUTOENCODER] = seconds
        drawn = methods.scvi_cells(known, train, folder, seed=seed)
        others[AUTOENCODER] = (results.BASELINE, GeneratedCells(drawn, known, train.genes))
    return generation.evaluate_generation(generated, train, study.test, others=others, seed=seed)


def evaluate_spaces(study: Study, trained: Trained) -> dict[str, dict]:
    """Evaluate retrieval among captions of the test cells, and clusters of the test cells, for all embeddings."""
    train, test, seed = study.train, study.test, study.args.seed
    sampler = CaptionSampler(seed=seed)
    captions = sampler.caption(test.obs, cell_ids=hash_names(test.names))
    pairs = sorted(set(zip(captions, test.labels, strict=True)))
    texts, types = [text for text, _ in pairs], np.array([label for _, label in pairs])
    genes = np.intersect1d(train.genes, test.genes)
    x, y = (cells.select_genes(genes).expression.toarray() for cells in (train, test))
    embedded = embed_texts(texts)
    learned = embed_texts(sampler.caption(train.obs, cell_ids=hash_names(train.names)))
    mapped = RidgeCV(alphas=np.logspace(0, 5, 11)).fit(x, learned).predict(y)
    ours, theirs = (place(study, pipeline, texts) for pipeline in (trained.pipeline, trained.contrast))
    similarities = {
        results.MODEL_NAME: ours[0],
        CONTRAST: theirs[0],
        GENES: study.by_genes[1] @ embedded.T,
        "ridge to embeddings of captions": normalize(mapped) @ embedded.T,
    }
    spaces = {results.MODEL_NAME: ours[1], CONTRAST: theirs[1], GENES: study.by_genes[1]}
    spaces["principal components"] = clustering.components(x, y, seed=seed)
    batches = next((test.obs[key] for key in BATCH_KEYS if len(set(test.obs.get(key, ()))) > 1), None)
    return {
        "retrieval": retrieval.evaluate_retrieval(similarities, test.labels, types, seed=seed),
        "clustering": clustering.evaluate_clustering(
            spaces, test.labels, None if batches is None else batches.astype(str), seed=seed
        ),
    }


def place(study: Study, pipeline: ScMMGPTPipeline, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Compute similarities of test cells and texts `(n_cells, n_texts)`, and embeddings of the test cells.

    The similarities are those of `scmmgpt search` without denials: a caption whose definition denies a marker would
    otherwise have a score on another scale than the other captions of the same cell.
    """
    adata = study.corpus.to_adata("test")
    choice = pipeline.processor.choose_input(adata)
    cells, features_of = choice.convert(adata), pipeline.features_of(choice)
    with torch.inference_mode():
        pieces = [features_of(cells[start : start + 64]).float().cpu() for start in range(0, len(cells), 64)]
        features = torch.cat(pieces)
        similarity = cell_text_similarity(features, torch.from_numpy(pipeline.embed_texts(texts)))
    rows, kept = match_names(adata.obs_names, study.test, "the test split")
    order = kept[np.argsort(rows)]
    return similarity.numpy()[order], normalize(features.mean(dim=1).numpy())[order]


def report(document: Mapping[str, Any]) -> str:
    """Format all tables as Markdown."""
    corpus = document["corpus"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in document["seconds"].items())
    parts = [
        "# Ours and the methods of others",
        f"Corpus `{corpus['path']}`, splits sha256 `{(corpus['splits sha256'] or 'none')[:16]}`, "
        f"seed {document['seed']}. Processor seconds of training: {seconds}. Candidates of annotation: all "
        f"{document['n_candidates']} labels of the training cells.",
        markdown_claims(document["claims"], SENTENCES),
    ]
    for task in TASKS:
        parts += [f"## {task.capitalize()}", results.markdown_table(document[task])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = task_parser("all", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--align-config", default=str(CONFIGS / "align_tiny.yaml"), help="YAML of stage 1 (%(default)s)"
    )
    parser.add_argument("--tune-config", default=str(CONFIGS / "tune_tiny.yaml"), help="YAML of stage 2 (%(default)s)")
    parser.add_argument("--gene-texts", help="table of gene summaries for GenePT-style; default: names of the genes")
    parser.add_argument(
        "--cells-per-label", type=SEVERAL, default=100, help="cells to generate of each type (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=COUNT, default=1, help="seeds to run, from --seed on, and to average (%(default)s)"
    )
    parser.add_argument(
        "--time-factor",
        type=number(float, 0, above=True),
        default=1.0,
        help="CPU time of Cell2Sentence-style training, as a multiple of ours (%(default)s)",
    )
    return parser


def compare_methods(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Run all tasks with one seed, and write the results to `output`; existing results are read instead."""
    corpus = open_corpus(args.corpus)
    output.mkdir(parents=True, exist_ok=True)
    study = Study(corpus, *read_splits(corpus, label_key=args.label_key), output, args)
    options = {name: value for name, value in vars(args).items() if name not in ("corpus", "output", "seeds")}
    about = {"corpus": describe_corpus(corpus), **options}
    stamp, path = output / "study.json", output / "results.json"
    if stamp.is_file() and read_json(stamp) != about:
        raise ValueError(f"{output} holds methods of another corpus or other options. Give another --output.")
    if path.is_file():
        return read_json(path)
    write_json(stamp, about)
    trained = train_all(study)
    logger.info("Annotating and describing %d test cells", len(study.test))
    tasks = evaluate_texts(study, trained)
    logger.info("Generating %d cells of each type", args.cells_per_label)
    tasks["generation"] = evaluate_generation(study, trained)
    logger.info("Searching and clustering")
    tasks |= evaluate_spaces(study, trained)
    about |= {"seconds": trained.seconds, "n_candidates": len(set(study.train.labels))}
    document = {"task": "all", **about, "claims": find_claims(tasks, SENTENCES), **tasks}
    write_json(path, document)
    return document


def average_seeds(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the documents of several seeds: means of all tables, and the margins that the means reach."""
    tasks = {task: results.average([document[task] for document in documents]) for task in TASKS}
    seconds = [document["seconds"] for document in documents]
    about: dict[str, Any] = {"seed": ", ".join(str(document["seed"]) for document in documents)}
    about["seconds"] = {name: np.mean([of[name] for of in seconds]) for name in seconds[0]}
    claims = find_claims(tasks, SENTENCES)
    for row in claims:
        of_seeds = [next(own for own in document["claims"] if own["claim"] == row["claim"]) for document in documents]
        row["by_seed"] = [own["reached"] for own in of_seeds]
    return {**documents[0], **about, **tasks, "claims": claims}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    annotators.quieten()
    output = Path(args.output)
    if args.seeds == 1:
        document = compare_methods(args, output)
    else:
        seeds = range(args.seed, args.seed + args.seeds)
        runs = [compare_methods(argparse.Namespace(**{**vars(args), "seed": n}), output / f"seed-{n}") for n in seeds]
        document = average_seeds(runs)
        write_json(output / "results.json", document)
    text = report(document)
    (output / "report.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0
