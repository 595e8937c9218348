"""Evaluate the annotation of `train release` on datasets, and on cell types, left out of its training.

```
python -m scmmgpt.eval abstention --data ../shared/data --output out.json
python -m scmmgpt.eval abstention --data ../shared/data --leave-out labels --output labels.json
```

* Datasets: readout, novelty, temperature, label sets and smallest score come from the other datasets. A cell of the
  left-out dataset is known if another dataset has its type, else new.
* Labels: all cells of a type, and of broader terms of the type, are left out of all datasets (`eval.untrained`).

Novelty uses all cells of the dataset, as `annotate` does; with `--alone`, it uses one cell at a time. With
`--genes N`, each dataset is annotated with its N most variable genes, because many shared files have no others; the
fitted models are the same.

Measures of known cells: accuracy if every cell gets a label (`forced_accuracy`) and of `annotate`, calibration error
of the score, area under the risk-coverage curve, and coverage of the label sets. Measures of new cells: share of
`Unknown`, share of `Unknown` or a correct broader term, and AUROC of the novelty against known cells of the same
dataset.

One leak remains: the settings that `train.left_out.calibrate` fits to the other datasets come from readouts that were
trained on the left-out dataset.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, diags
from sklearn.metrics import roc_auc_score

from scmmgpt.annotation_scmmgpt import choose_labels, label_sets, least_scores, set_threshold
from scmmgpt.cells_scmmgpt import COUNTS_PER_10K
from scmmgpt.eval import untrained
from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import expected_calibration_error
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.novelty_scmmgpt import first_term
from scmmgpt.tissues_scmmgpt import tissue_prior
from scmmgpt.train import left_out, release
from scmmgpt.train.data import ontology, prepare
from scmmgpt.train.data.gene_tables import build_gene_aliases
from scmmgpt.train.left_out import ABSENT, LeftOut
from scmmgpt.train.pooled import Dataset, fit_pooled_novelty
from scmmgpt.train.references import Reference, TypeProfiles, profiled_tissues, read_types
from scmmgpt.train.release import LabelledSource


logger = logging.getLogger(__name__)

ERROR_RATES = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Sources:
    """The labelled cells of `train release`."""

    names: list[str]  # names of the datasets
    datasets: list[Dataset]
    types: list[str]  # Cell Ontology ids of the labels
    meanings: np.ndarray  # see `fit_pooled_readout`
    reference: Reference | None = None
    profiles: TypeProfiles | None = None
    tissues: Sequence[LabelledSource] = ()  # cells with tissues, one source for each dataset
    profiled: frozenset[tuple[str, str]] = frozenset()  # see `profiled_tissues`

    def tissues_without(self, group: Collection[int]) -> list[dict[str, Any]]:
        """Tissues that a checkpoint trained without the datasets of a group would store."""
        left = [source for number, source in enumerate(self.tissues) if number not in group]
        return release.tissues_of(left, prepare.read_label_table("human"), self.profiled) if left else []

    @cached_property
    def terms(self) -> list[dict[str, Any]]:
        """Terms of the labels and of their ancestors; see [`ontology.label_terms`]."""
        return ontology.label_terms({str(ontology.term_name(term)): term for term in self.types})

    @cached_property
    def in_terms(self) -> list[list[int]]:
        """Positions of the labels of each term."""
        names = [str(ontology.term_name(term)) for term in self.types]
        return [[place for place, name in enumerate(names) if name in term["labels"]] for term in self.terms]


def read_sources(folder: str | Path) -> Sources:
    """Read the datasets of the reviewed table, over the gene vocabulary of the release."""
    table, files = prepare.read_label_table("human"), prepare._expand([str(folder)])
    specs = prepare.reviewed_sources(dict(zip(prepare.name_sources(files), files, strict=True)), table)
    vocabulary = release.shared_vocabulary(specs, folder)
    index = GeneIndex(vocabulary, build_gene_aliases(vocabulary))
    sources = [release.read_labelled(spec, index) for spec in specs]
    datasets, types, meanings = release.pool(sources, table, len(vocabulary))
    placed = release.place_terms(
        sorted({term for source in sources for term in source.terms if term}), table["types"], table.get("broad", ())
    )
    used = [source for source in sources if any(term in placed for term in source.terms)]
    names = [source.name for source in used]
    reference = release.read_profiles(folder, types, table, index, len(vocabulary))
    profiles = read_types(folder, index, len(vocabulary), table.get("broad", ()))
    profiled = frozenset(profiled_tissues(folder))
    return Sources(names, datasets, types, meanings, reference, profiles, used, profiled)


def calibrated(sources: Sources, cells: LeftOut) -> dict[str, Any]:
    """Apply `train.left_out.calibrate`; refuse too few known cells."""
    if not (settings := left_out.calibrate(cells, sources.reference is not None)):
        raise ValueError(f"{int(cells.known.sum())} cells of known types are too few to calibrate on.")
    return settings


def annotate(
    sources: Sources,
    cells: LeftOut,
    settings: dict[str, Any],
    alone: bool = False,
    tissues: Sequence[Mapping[str, Any]] = (),
) -> dict[str, np.ndarray]:
    """Name the cells of one dataset as `annotate` does: the columns of `choose_labels`, and two arrays by label.

    These are `probabilities` `(n_cells, n_labels)`, and `of_sets`, those without the tissue prior, from which label
    sets are made.
    """
    alone = alone or sources.reference is None  # novelty by neighbours needs reference profiles
    unit = settings["lead_unit" if alone else "batch_unit"]
    cells = replace(cells, scores=cells.alone) if alone else left_out.with_neighbours(cells)
    labels = np.flatnonzero((cells.scores > ABSENT).any(axis=0))
    ids = {str(ontology.term_name(sources.types[label])): sources.types[label] for label in labels}
    probabilities = of_sets = left_out.probabilities_of(cells, settings["temperature"], settings["doubt"])
    if tissues and not alone:
        prior = tissue_prior(probabilities[:, labels], list(ids), tissues)
        probabilities = left_out.probabilities_of(cells, settings["temperature"], settings["doubt"], prior)
    novelty = (cells.novelty / np.float32(unit)).clip(min=0)
    least = least_scores(settings["min_score"], novelty)
    broader = first_term(cells.of_terms, unit)
    columns = choose_labels(probabilities[:, labels], list(ids), ids, least, novelty, sources.terms, broader=broader)
    return columns | {"probabilities": probabilities, "of_sets": of_sets}


def known_scores(columns: dict[str, np.ndarray], targets: np.ndarray, types: Sequence[str]) -> dict[str, float]:
    """Number of known cells of a dataset, and means over them: accuracies, and shares of abstention."""
    best = columns["probabilities"].argmax(axis=1)
    answered = columns["cell_type"] != UNKNOWN
    right = columns["cl_id"] == np.asarray(types)[targets]
    return {
        "n_cells": len(targets),
        "forced_accuracy": float((best == targets).mean()),
        "accuracy": float(right.mean()),
        "unknown": float((~answered).mean()),
        "broader_and_right": float((is_broader(columns, targets, types) & answered).mean()),
    }


def is_broader(columns: dict[str, np.ndarray], targets: np.ndarray, types: Sequence[str]) -> np.ndarray:
    """Whether each cell is `Unknown`, or named by an ancestor of its type, bool `(n_cells,)`."""
    above = [set(ontology.ancestors(types[target])) for target in targets]
    unknown = columns["cell_type"] == UNKNOWN
    return np.array([no or term in terms for no, term, terms in zip(unknown, columns["cl_id"], above, strict=True)])


def risk_area(score: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve: mean over k of the error rate of the k cells with the highest scores."""
    order = np.argsort(-score, kind="stable")
    return float((np.cumsum(~right[order]) / np.arange(1, len(order) + 1)).mean())


def summarise_known(
    sources: Sources, cells: LeftOut, probabilities: np.ndarray, sets: dict[float, np.ndarray]
) -> dict[str, Any]:
    """Calibration, risk and coverage of all known cells, with probabilities `(n_cells, n_labels)`.

    `sets` maps an error rate to the members of the label sets, bool `(n_cells, n_labels)`.
    """
    score, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == cells.targets
    of_datasets = {sources.names[number]: cells.datasets == number for number in np.unique(cells.datasets)}
    errors = [expected_calibration_error(score[rows], right[rows]) for rows in of_datasets.values()]
    by_rate = {}
    for rate, of_cells in sets.items():
        covered = of_cells[np.arange(len(score)), cells.targets]
        by_dataset = {name: float(covered[rows].mean()) for name, rows in of_datasets.items()}
        by_rate[str(rate)] = {
            "coverage": float(covered.mean()),
            "coverage_by_dataset": {name: round(value, 3) for name, value in by_dataset.items()},
            "coverage_mean_of_datasets": float(np.mean([*by_dataset.values()])),
            "mean_size": float(of_cells.sum(axis=1).mean()),
        }
    return {
        "calibration_error": expected_calibration_error(score, right),
        "calibration_error_mean_of_datasets": float(np.mean(errors)),
        "risk_area": risk_area(score, right),
        "label_sets": by_rate,
    }


def most_variable(data: Dataset, n_genes: int) -> Dataset:
    """Restrict a dataset to its `n_genes` genes with the highest variance of log1p(CP10k)."""
    logs = (diags(COUNTS_PER_10K / np.asarray(data.counts.sum(axis=1)).ravel().clip(min=1e-9)) @ data.counts).log1p()
    mean = np.asarray(logs.mean(axis=0)).ravel()
    variance = np.asarray(logs.power(2).mean(axis=0)).ravel() - mean**2
    kept = np.sort(data.measured[np.argsort(-variance[data.measured], kind="stable")[:n_genes]])
    here = np.isin(np.arange(data.counts.shape[1]), kept)
    counts = csr_matrix(data.counts @ diags(here.astype(np.float32)))
    counts.eliminate_zeros()
    return replace(data, counts=counts, measured=kept)


def leave_datasets_out(
    sources: Sources,
    cells: LeftOut,
    groups: Sequence[Sequence[int]],
    judged: LeftOut | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Evaluate known and new cells of groups of datasets; the datasets of a group are left out together.

    Args:
        cells: Result of `leave_each_out`, to which the settings are fitted.
        groups: Groups of positions of datasets.
        judged: Cells to name; default: `cells`. For a group of several datasets: the result of `leave_out`.
        alone: See [`annotate`].
    """
    known_rows, new_rows, kept, parts = {}, [], [], []
    sets: dict[float, list[np.ndarray]] = {rate: [] for rate in ERROR_RATES}
    for group in groups:
        settings = calibrated(sources, cells.take(~np.isin(cells.datasets, group)))
        own, tissues = judged or cells, sources.tissues_without(group)
        for number in group:
            mine = own.take(own.datasets == number)
            if not len(mine.targets):
                continue
            columns, known = annotate(sources, mine, settings, alone, tissues), mine.known
            if known.any():
                some = {name: values[known] for name, values in columns.items()}
                known_rows[sources.names[number]] = known_scores(some, mine.targets[known], sources.types)
                if not known.all():
                    area = roc_auc_score(~known, np.nan_to_num(columns["novelty"]))
                    known_rows[sources.names[number]]["auroc_novelty"] = float(area)
                kept.append(mine.take(known))
                parts.append(some["probabilities"])
                for rate in ERROR_RATES:
                    sets[rate].append(members(some["of_sets"], settings, rate))
            new_rows += new_cells(sources, mine, columns, ~known, sources.names[number])
            logger.info("%s left out", sources.names[number])
    if not kept:
        return {"known": {}, "known_together": {}, "new": new_rows}
    of_rates = {rate: np.concatenate(found) for rate, found in sets.items()}
    of_all = summarise_known(sources, LeftOut.join(kept), np.concatenate(parts), of_rates)
    return {"known": known_rows, "known_together": untrained.weighted(known_rows.values()) | of_all, "new": new_rows}


def members(probabilities: np.ndarray, settings: dict[str, Any], rate: float) -> np.ndarray:
    """Whether each label is in the label set of each cell, bool `(n_cells, n_labels)`."""
    names = [str(label) for label in range(probabilities.shape[1])]
    sets = label_sets(probabilities, names, set_threshold(settings["label_sets"], rate))
    return np.array([np.isin(names, words.split(" | ")) for words in sets])


def new_cells(
    sources: Sources, cells: LeftOut, columns: dict[str, np.ndarray], new: np.ndarray, dataset: str
) -> list[dict[str, Any]]:
    """For each type of new cells: shares of `Unknown`, and of `Unknown` or a correct broader term."""
    rows = []
    fine = is_broader(columns, cells.targets, sources.types)
    for target in np.unique(cells.targets[new]):
        mine = new & (cells.targets == target)
        row = {"dataset": dataset, "type": str(ontology.term_name(sources.types[target])), "n_cells": int(mine.sum())}
        unknown = float((columns["cell_type"][mine] == UNKNOWN).mean())
        rows.append(row | {"unknown": unknown, "unknown_or_broader": float(fine[mine].mean())})
    return rows


def leave_labels_out(sources: Sources, cells: LeftOut, alone: bool = False) -> dict[str, Any]:
    """Leave out each label; see [`eval.untrained`]. `cells` is the result of `leave_each_out`."""
    parts = "known_laboratories", "new_laboratory", "own_types", "own_types_without_profile"
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    known: dict[str, dict[str, float]] = {}
    types, whole = np.array(sources.types), fit_for_file(sources, None, {})
    for number, name in enumerate(sources.names):
        data, mine = sources.datasets[number], cells.datasets == number
        rows, truth = cells.rows[mine], types[cells.targets[mine]]
        settings = calibrated(sources, cells.take(~mine))
        new = fit_for_file(sources, number, settings)
        is_known = np.isin(truth, new.types)
        others = sources.profiles and sources.profiles.without(truth[~is_known])
        for part, profiles in (("own_types", sources.profiles), ("own_types_without_profile", others)):
            columns = untrained.annotate_file(new, data, rows, profiles, alone)
            found[part] += [untrained.row_of(columns, truth, term) for term in np.unique(truth[~is_known])]
            if part == "own_types" and is_known.any():
                known[name] = untrained.lost_of(columns, truth, is_known)
        for part, fitted in zip(parts[:2], (replace(whole, settings=settings), new), strict=True):
            for term in np.unique(truth[np.isin(truth, fitted.types)]):
                columns = untrained.annotate_file(fitted.without(term), data, rows, sources.profiles, alone)
                found[part].append(untrained.row_of(columns, truth, term))
        logger.info("labels left out of %s", name)
    means = {part: untrained.mean_of_labels(rows) for part, rows in found.items()}
    return {**means, "known": known, "known_cells": untrained.weighted(known.values())}


def fit_for_file(sources: Sources, left: int | None, settings: dict[str, Any]) -> untrained.Fitted:
    """Fit readout, novelty and tissues to all datasets except number `left` (None: to all datasets)."""
    train = [data for number, data in enumerate(sources.datasets) if number != left]
    readout, own = left_out.fit_known(train, sources.meanings, sources.reference)
    novelty = fit_pooled_novelty(train, train[0].counts.shape[1]) or {}
    tissues = sources.tissues_without(() if left is None else (left,))
    return untrained.Fitted(readout, [sources.types[label] for label in own], novelty, settings, tissues)


def evaluate_left_out(
    folder: str | Path,
    what: str = "datasets",
    together: Sequence[str] = (),
    n_genes: int | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Leave out each dataset, or the datasets of `together` at once, or each label, and evaluate the annotation.

    Args:
        folder: Folder of the files of `train release`.
        what: `"datasets"` or `"labels"`.
        n_genes: Annotate each dataset with its most variable genes; None: all genes.
        alone: Annotate each cell without the other cells of its dataset.

    Returns:
        JSON-able dict. For datasets: `known` (by dataset), `known_together`, `new` (by dataset and type) and the mean
        `new_together`. For labels: see [`leave_labels_out`].
    """
    sources = read_sources(folder)
    missing = set(together) - set(sources.names)
    if missing:
        raise ValueError(f"There are no datasets {sorted(missing)}; there are {sources.names}.")
    data, others = (sources.datasets, sources.meanings), (sources.reference, sources.in_terms)
    cells = left_out.leave_each_out(*data, *others)
    if cells is None:
        raise ValueError(f"{folder} has one dataset of the table; two are needed.")
    if what == "labels":
        return leave_labels_out(sources, cells, alone)
    groups, judged = [[number] for number in range(len(sources.names))], None
    if together:
        groups = [[sources.names.index(name) for name in together]]
        judged = left_out.leave_out(*data, groups[0], *others)
    elif n_genes:
        narrow = [most_variable(part, n_genes) for part in sources.datasets]
        judged = left_out.leave_each_out(*data, *others, narrow)
    result = leave_datasets_out(sources, cells, groups, judged, alone)
    return result | {"new_together": untrained.weighted(result["new"])}
