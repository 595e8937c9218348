"""Build the checkpoint at the root of the repository from public cells and the texts of this project.

```
python -m scmmgpt.train release --data ../shared/data --output results/release
make release
```

1. `prepare` reads the files in the reviewed table (`train/data/tables/human_sets.json`) into one corpus. Its genes are
   those that at least `MIN_SOURCES` files measure, and those of the reference profiles that at least one file has.
2. `align` trains a small cell model and Q-Former.
3. The readout of cell types is fitted over all datasets and reference profiles, with novelty and the gate for
   untrained labels. Temperature, doubt, label sets, least score and unit of novelty are fitted to held-out datasets,
   each scored by a readout of the other datasets.
4. `tune` trains a small language model from scratch on captions, and fits the cell states for generation.
5. OUTPUT/checkpoint gets the model in bfloat16 and `checkpoint.md` (training data and limits), at most `MAX_BYTES`.

Complete steps are not repeated. The sizes are in `train/configs/*_release.yaml`.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import vstack

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.files import filled_folder, write_json
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.scoring_scmmgpt import text_states
from scmmgpt.train import align, left_out, tune
from scmmgpt.train.data import ontology, prepare
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import SPECIAL_TOKENS, Corpus, open_corpus
from scmmgpt.train.data.gene_tables import reference_gene_index
from scmmgpt.train.data.sources import FileSource, SourceSpec, resolve_labels
from scmmgpt.train.pooled import TEMPERATURE, Dataset, fit_pooled_novelty
from scmmgpt.train.references import (
    Reference,
    TypeProfiles,
    profiled_tissues,
    read_reference,
    read_types,
    reference_genes,
    reference_table,
)
from scmmgpt.train.unseen import add_gene_texts, fit_gate
from scmmgpt.unseen_scmmgpt import Gate, named_genes


logger = logging.getLogger(__name__)

NAME, VERSION = "scmmgpt-human", "0.10.0"
MIN_SOURCES = 3  # that measure a gene of the vocabulary
MAX_CELLS = 100  # of a label of a dataset, for the readout
MAX_BYTES = 64_000_000
COMMAND = "python -m scmmgpt.train release --data ../shared/data --output results/release"
SUMMARIES = "tables/gene_summary_human.csv.gz"  # in the folder of the data
CONFIGS = Path(__file__).parent / "configs"
LIMITS = (
    "Types that rest on one dataset are known from one laboratory only. Malignant cells are none of the types, and "
    "are mostly called epithelial. Descriptions come from a language model of a few million parameters that has read "
    "captions alone. Generated cells lie near the states of training cells. The model is not a medical device."
)
TRAINED_CODE = ("*.py", "README.md", "runs", "adapter", "training_args.bin", "*.png", "trainer_state.json")


@dataclass(frozen=True)
class LabelledSource:
    """Labelled cells of a file, at most `MAX_CELLS` of each label."""

    name: str
    cells: Cells
    measured: np.ndarray  # vocabulary ids of the genes that the file measures, ascending
    terms: np.ndarray  # ids of the Cell Ontology, str (n_cells,)
    tissues: np.ndarray  # ids of tissues, str (n_cells,); "" if unknown


def make_parser(prog: str = "python -m scmmgpt.train release") -> argparse.ArgumentParser:
    """Make the parser of `release`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=prog, description=__doc__, formatter_class=raw)
    parser.add_argument("--data", required=True, help="folder with the files of the table")
    parser.add_argument("--output", required=True, help="folder for corpus, training stages and checkpoint")
    parser.add_argument("--labels", default="human", metavar="TABLE", help="reviewed table of labels (%(default)s)")
    parser.add_argument("--align-config", default=str(CONFIGS / "align_release.yaml"), help="sizes and steps of align")
    parser.add_argument("--tune-config", default=str(CONFIGS / "tune_release.yaml"), help="sizes and steps of tune")
    return parser


def main(args: argparse.Namespace) -> Path:
    """Run the steps that are not complete, and return the folder of the checkpoint.

    Raises:
        ValueError: If the folder has steps of another version, or the checkpoint exceeds `MAX_BYTES`.
    """
    output, table = Path(args.output), prepare.read_label_table(args.labels)
    files = prepare._expand([args.data])
    specs = prepare.reviewed_sources(dict(zip(prepare.name_sources(files), files, strict=True)), table)
    output.mkdir(parents=True, exist_ok=True)
    version = output / "version"
    if (output / "corpus").exists() and (not version.is_file() or version.read_text() != VERSION):
        raise ValueError(f"{output} has steps of another version than {VERSION}. Delete it or pass another folder.")
    version.write_text(VERSION)
    corpus = build_corpus(args, specs, output)
    aligned, annotating, tuned = (output / name for name in ("aligned", "annotating", "tuned"))
    if not (aligned / "config.json").is_file():
        words = ["--config", args.align_config, "--corpus", str(corpus.path), "--output_dir", str(aligned)]
        align.main(*align.make_parser().parse_args_and_config(words), fit_readout=lambda *_, **__: None)
    if not (annotating / "config.json").is_file():
        add_readout(aligned, annotating, specs, table, Path(args.data))
    if not (tuned / "config.json").is_file():
        words = ["--config", args.tune_config, "--corpus", str(corpus.path), "--aligned", str(annotating)]
        tune.main(*tune.make_parser().parse_args_and_config([*words, "--output_dir", str(tuned)]))
    return write_checkpoint(tuned, output / "checkpoint", corpus, table)


def build_corpus(args: argparse.Namespace, specs: Sequence[SourceSpec], output: Path) -> Corpus:
    """Build the corpus over the shared genes, or open it."""
    vocabulary = output / "vocab.json"
    if not vocabulary.is_file():
        write_json(vocabulary, shared_vocabulary(specs, args.data))
    words = [args.data, "--labels", args.labels, "--vocabulary", str(vocabulary), "--output", str(output / "corpus")]
    words += ["--split-by", "cell"]  # every cell type has training cells; `eval crossdata` leaves datasets out
    prepare.main(prepare.make_parser().parse_args(words))
    return open_corpus(output / "corpus")


def shared_vocabulary(specs: Sequence[SourceSpec], folder: str | Path) -> dict[str, int]:
    """Token -> id, for special tokens and the genes that `MIN_SOURCES` sources measure.

    A gene of the reference profiles needs one source only: few sources of other organs measure markers of one organ,
    such as INS.
    """
    index = reference_gene_index()
    measured = [np.unique(FileSource(spec).choose(index).match.measured) for spec in specs]
    genes, n_sources = np.unique(np.concatenate(measured), return_counts=True)
    shared = n_sources >= min(MIN_SOURCES, len(specs))
    shared |= np.isin(genes, reference_genes(folder, index))
    symbols = {i: symbol for symbol, i in index.vocabulary.items()}
    shared_symbols = sorted(symbols[gene] for gene in genes[shared].tolist())
    return {name: i for i, name in enumerate([*SPECIAL_TOKENS, *shared_symbols])}


def read_labelled(spec: SourceSpec, index: GeneIndex) -> LabelledSource:
    """Read the cells of a source that have a Cell Ontology term, at most `MAX_CELLS` of each original label."""
    source = FileSource(spec)
    choice, obs = source.choose(index), source.obs()
    labels = resolve_labels(obs).fillna("")
    terms, tissues = (labels[f"{name}_ontology_term_id"].to_numpy(dtype=str) for name in ("cell_type", "tissue"))
    own = obs["cell_type"].fillna("").to_numpy(dtype=str)
    rng = np.random.default_rng(0)
    names = sorted(set(own[terms != ""]))
    drawn = [rng.permutation(np.flatnonzero((own == name) & (terms != "")))[:MAX_CELLS] for name in names]
    rows = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *drawn]))
    cells = source.cells(0, source.n_cells, choice)[rows]
    return LabelledSource(spec.name, cells, choice.match.measured, terms[rows], tissues[rows])


def place_terms(terms: Sequence[str], types: Sequence[str], broad: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Map each term to types: itself, the narrowest type above it or, for a broad term, all types below it.

    Args:
        terms: Ids of the Cell Ontology that cells have.
        types: Ids of the types of the readout.
        broad: Ids of terms that stand for all types below them.

    Returns:
        Term -> types. Types below a broad term are left out if no other term maps to them; so are terms without types.
    """
    own: dict[str, tuple[str, ...]] = {}
    for term in terms:
        above = [name for name in types if name in (term, *ontology.ancestors(term))]
        narrowest = [name for name in above if not any(name in ontology.ancestors(other) for other in above)]
        if narrowest and term not in broad:
            own[term] = (narrowest[0],)
    present = {name for names in own.values() for name in names}
    below = {
        term: tuple(name for name in types if name in present and term in ontology.ancestors(name)) for term in broad
    }
    return own | {term: below[term] for term in terms if below.get(term)}


def pool(
    sources: Sequence[LabelledSource], table: Mapping[str, Any], n_genes: int
) -> tuple[list[Dataset], list[str], np.ndarray]:
    """Pool the sources for `fit_pooled_readout`.

    Args:
        sources: Labelled cells of each file.
        table: The reviewed table, with `types` and `broad`.
        n_genes: Size of the vocabulary.

    Returns:
        The datasets with cells of a type, the types with cells, and the shares of types in each target, float64
        `(n_targets, n_types)`.
    """
    terms = sorted({term for source in sources for term in source.terms if term})
    placed = place_terms(terms, table["types"], table.get("broad", ()))
    types = [name for name in table["types"] if (name,) in placed.values()]
    targets = sorted(set(placed.values()))
    meanings = np.array([[name in names for name in types] for names in targets], dtype=float)
    datasets = []
    for source in sources:
        rows = np.flatnonzero([term in placed for term in source.terms])
        if len(rows):
            codes = np.array([targets.index(placed[term]) for term in source.terms[rows]])
            datasets.append(Dataset(source.cells[rows].to_csr(n_genes), np.unique(source.measured), codes))
    return datasets, types, meanings / meanings.sum(axis=1, keepdims=True)


def read_profiles(
    folder: str | Path, types: Sequence[str], table: Mapping[str, Any], index: GeneIndex, n_genes: int
) -> Reference | None:
    """Read reference profiles of the types and of other cells; None if the folder has none."""

    def place(terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return place_terms([*types, *terms], types, table.get("broad", ()))

    return read_reference(folder, types, place, index, n_genes)


def tissues_of(
    sources: Sequence[LabelledSource], table: Mapping[str, Any], profiled: Collection[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """The tissues of cells and profiles, with the types that each has, as `annotation["tissues"]` of a checkpoint.

    `profiled` are pairs of a tissue and a type.
    """
    pairs = {pair for source in sources for pair in zip(source.tissues, source.terms, strict=True)} | set(profiled)
    placed = place_terms(sorted({term for _, term in pairs if term}), table["types"], table.get("broad", ()))
    return ontology.tissue_terms(
        (tissue, str(ontology.term_name(name))) for tissue, term in pairs for name in placed.get(term, ())
    )


def add_readout(
    aligned: Path, output: Path, specs: Sequence[SourceSpec], table: Mapping[str, Any], data: Path
) -> None:
    """Write the aligned checkpoint with the readout of types over all sources, and what `annotate` needs beside it."""
    model = ScMMGPTForCellTextAlignment.from_pretrained(str(aligned.absolute())).eval()
    processor = ScMMGPTProcessor.from_pretrained(str(aligned.absolute()))
    n_genes = model.config.cell_config.vocab_size
    sources = [read_labelled(spec, processor.gene_index) for spec in specs]
    datasets, types, meanings = pool(sources, table, n_genes)
    names, sampler = [str(ontology.term_name(term)) for term in types], CaptionSampler()
    texts = [sampler.label_text(name, term) for name, term in zip(names, types, strict=True)]
    reference = read_profiles(data, types, table, processor.gene_index, n_genes)
    fitted = left_out.calibrate(left_out.leave_each_out(datasets, meanings, reference), reference is not None)
    temperature = fitted.pop("temperature", TEMPERATURE)
    units = {name: fitted.pop(name, 1.0) for name in ("lead_unit", "batch_unit")}
    others = {} if reference is None else units
    model.label_readout, _ = left_out.fit_known(datasets, meanings, reference)
    model.label_readout.temperature.fill_(temperature)
    model.config.label_readout = {"texts": texts, "labels": names, **model.label_readout.sizes()}
    model.config.cell_embedding = "profile"
    summaries = Path(data, SUMMARIES)
    add_gene_texts(model, processor, str(summaries) if summaries.is_file() else None)
    gate = fit_pooled_gate(model, processor, datasets, meanings)
    ids = dict(zip(names, types, strict=True))
    profiles = read_types(data, processor.gene_index, n_genes, table.get("broad", ()))
    model.config.annotation = {
        "labels": dict(zip(names, texts, strict=True)),
        "cl_ids": ids,
        "matching_weight": 0.0,
        "matching_candidates": len(names),
        "temperature": 1.0,
        "readout_temperature": 1.0,
        "similarity_weight": 0.0,
        "unseen_gate": None if gate is None else vars(gate),
        "terms": ontology.label_terms(ids),
        "kinds": ontology.terms_below(ids, () if profiles is None else profiles.terms),
        "tissues": tissues_of(sources, table, profiled_tissues(data)),
        "novelty": (fit_pooled_novelty(datasets, n_genes) or {}) | others,
        "refines": True,  # by the cells of a file, as the cells were that the settings are fitted to
        **fitted,
        **({} if profiles is None else add_profiles(model, profiles.without(types), types)),
    }
    with filled_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def add_profiles(
    model: ScMMGPTForCellTextAlignment, profiles: TypeProfiles, labels: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Add the profiles of types without cells to the label readout.

    Args:
        model: The model, changed in place.
        profiles: Profiles of the types.
        labels: Ids of the trained types.

    Returns:
        Settings of `annotate` for these types, `profiles`.
    """
    profiles.add_to(model.label_readout)
    sizes = dict(zip(("num_profiles", "num_profile_genes"), model.label_readout.profiles.shape, strict=True))
    model.config.label_readout = {**(model.config.label_readout or {}), **sizes}
    sampler, types = CaptionSampler(), []
    for term_id in profiles.terms:
        name = str(ontology.term_name(term_id))
        (term,) = (term for term in ontology.label_terms({name: term_id}) if term["id"] == term_id)
        types.append({**term, "text": sampler.label_text(name, term_id), "above": ontology.shared(term_id, labels)})
    return {"profiles": types}


def fit_pooled_gate(
    model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, datasets: Sequence[Dataset], meanings: np.ndarray
) -> Gate | None:
    """Fit the gate for untrained labels to the cells whose target is a single type."""
    counts = vstack([data.counts for data in datasets], format="csr")
    codes = np.concatenate([data.targets for data in datasets])
    rows = np.flatnonzero((meanings[codes] == 1).any(axis=1))
    cells = Cells.from_csr(counts[rows], np.arange(counts.shape[1]))
    texts = (model.config.label_readout or {})["texts"]
    named = [named_genes(text, processor.gene_index) for text in texts]
    states = text_states(model, processor, texts)
    return fit_gate(model.label_readout, cells, meanings[codes[rows]].argmax(axis=1), states, named)


def write_checkpoint(tuned: Path, output: Path, corpus: Corpus, table: Mapping[str, Any]) -> Path:
    """Write the checkpoint in bfloat16.

    Raises:
        ValueError: If the checkpoint exceeds `MAX_BYTES`.
    """
    pipeline = ScMMGPTPipeline.from_pretrained(str(tuned.absolute()), device="cpu", dtype=torch.float32)
    model: Any = pipeline.model
    model.config.release = {"name": NAME, "version": VERSION}
    # Other buffers keep their dtypes: the readout stores float16 where the precision suffices.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    if (states := model.model.cell_states) is not None:
        states.training_states = states.training_states.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    if output.exists():
        shutil.rmtree(output)
    with filled_folder(str(output)) as folder:
        pipeline.save_pretrained(folder)
        for path in Path(folder).rglob("tokenizer_config.json"):  # `local_files_only` is of the machine, not the model
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("local_files_only", None)
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for pattern in TRAINED_CODE:
            for path in Path(folder).glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (Path(folder) / "checkpoint.md").write_text(describe(corpus, table, model), encoding="utf-8")
    n_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    logger.info("%s has %.1f MB.", output, n_bytes / 1e6)
    if n_bytes > MAX_BYTES:
        raise ValueError(f"{output} has {n_bytes:,} bytes, more than {MAX_BYTES:,}. Make the model smaller.")
    return output


def describe(corpus: Corpus, table: Mapping[str, Any], model: Any) -> str:
    """Text of `checkpoint.md`: training data, cell types and limits."""
    manifest = corpus.manifest
    splits = ", ".join(f"{split} {corpus.n_cells(split):,}" for split in corpus.split_names)
    n_cells = sum(corpus.n_cells(split) for split in corpus.split_names)
    alone = [known["name"] for known in model.config.annotation.get("profiles", ())]
    lines = [
        f"# {NAME} {VERSION}",
        "",
        f"The checkpoint at the root of the repository. `{COMMAND}` builds it from public data. It was trained on "
        f"{n_cells:,} human cells ({splits}; divided by {manifest.split_by}) over "
        f"{len(corpus.vocabulary) - len(SPECIAL_TOKENS):,} genes, and names "
        f"{len(model.config.annotation['labels'])} cell types. It has {sum(p.numel() for p in model.parameters()):,} "
        "parameters in bfloat16; the language model is new, and the text encoder starts from MiniLM-L6.",
        "",
        "| dataset | cells | genes | source | licence |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for source in manifest.sources:
        paper = table["sets"].get(source["name"], {}).get("paper", "")
        row = source["name"], f"{source['n_kept']:,}", f"{source['genes']['matched']:,}", paper, source["licence"]
        lines.append(f"| {' | '.join(row)} |")
    if (model.config.label_readout or {}).get("num_others"):
        profiles = reference_table()
        lines.append(f"| {profiles['name']} | | | {profiles['paper']} | {profiles['licence']} |")
    lines += [
        "",
        "Cell types: " + ", ".join(sorted(model.config.annotation["labels"])) + ".",
        *(["", "Named by a profile alone: " + ", ".join(sorted(alone)) + "."] if alone else []),
        "",
        "## Limits",
        "",
        LIMITS,
    ]
    return "\n".join(lines) + "\n"
