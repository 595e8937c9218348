"""Reference profiles: mean expression of cell types of many organs, in addition to the cells of the datasets.

- Profiles of labelled types join the training of a readout as one more dataset.
- Profiles of other types are classes without a label. From them a readout learns to tell the cells of its labels from
  other cells, so that a cell of an organ that no dataset covers is novel (`readout_scmmgpt.PanelReadout.novelty`).
- A checkpoint also stores the profiles of single types, which name novel cells (`profiles_scmmgpt`).

`data/tables/reference_profiles.json` gives the Cell Ontology term of each profile.
"""

import html
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scmmgpt.cells_scmmgpt import COUNTS_PER_10K
from scmmgpt.commands.files import read_json
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.train.data.prepare import TABLES
from scmmgpt.train.pooled import Dataset


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Mean profiles: one for each type, and one for each class of other cells."""

    counts: csr_matrix  # (n_profiles, vocabulary size), counts per 10,000 of the genes of the file
    measured: np.ndarray  # int64: vocabulary ids, ascending
    meanings: np.ndarray  # (n_profiles, n_labels + n_others): shares of the labels, or 1 for a class of other cells
    n_labels: int

    def without(self, label: int) -> "Reference":
        """Leave out the profiles with a share of a label."""
        kept = self.meanings[:, label] == 0
        return replace(self, counts=self.counts[kept], meanings=self.meanings[kept])

    def join(
        self, datasets: Sequence[Dataset], meanings: np.ndarray, labels: np.ndarray
    ) -> tuple[list[Dataset], np.ndarray]:
        """Add the profiles as one more dataset, for `fit_pooled_readout`; leave out profiles of other labels.

        `meanings` are the shares of the labels in each target of the datasets, `(n_targets, len(labels))`, and
        `labels` the positions of these labels among all labels of the reference.

        Returns:
            The datasets, and their `meanings` `(n_targets + n_profiles, len(labels) + n_others)`.
        """
        shares = self.meanings[:, [*labels, *range(self.n_labels, self.meanings.shape[1])]]
        kept = shares.sum(axis=1) > 0
        shares = shares[kept] / shares[kept].sum(axis=1, keepdims=True)
        of_cells = np.pad(meanings, ((0, 0), (0, shares.shape[1] - len(labels))))
        profiles = Dataset(self.counts[kept], self.measured, len(meanings) + np.arange(len(shares)))
        return [*datasets, profiles], np.concatenate([of_cells, shares])


def reference_table() -> dict[str, Any]:
    """Read the reviewed table of reference profiles: the file name, and the Cell Ontology term of each profile."""
    return read_json(TABLES / "reference_profiles.json", dict)


def reference_genes(folder: str | Path, index: GeneIndex) -> np.ndarray:
    """Vocabulary ids of the genes of the profiles, int64, ascending; empty if the folder has no profiles."""
    path = Path(folder, reference_table()["file"])
    names = pd.read_csv(path, usecols=[0]).iloc[:, 0] if path.is_file() else ()
    ids = np.array([index.lookup(str(gene))[0] for gene in names], dtype=np.int64)
    return np.unique(ids[ids >= 0])


def read_reference(
    folder: str | Path,
    types: Sequence[str],
    place: Callable[[Sequence[str]], Mapping[str, Any]],
    index: GeneIndex,
    n_genes: int,
) -> Reference | None:
    """Read the reference profiles over the genes of a vocabulary; None if the folder has no profiles.

    Args:
        types: Cell Ontology ids of the labels.
        place: Function: terms of profiles -> for each term, the ids of `types` that share the profile.
        n_genes: Size of the vocabulary.
    """
    table = reference_table()
    path = Path(folder, table["file"])
    if not path.is_file():
        logger.info("There are no reference profiles, %s: novelty comes from the cells alone.", path)
        return None
    means, measured = mean_profiles(path, {**table["types"], **table["others"]}, index, n_genes)
    placed, rows, meanings = place(list(table["types"])), [], []
    others = [kind for kind in means if kind in table["others"]]
    for kind, mean in means.items():
        share = np.zeros(len(types) + len(others))
        if kind in others:
            share[len(types) + others.index(kind)] = 1
        elif kind in placed:
            share[[list(types).index(term) for term in placed[kind]]] = 1 / len(placed[kind])
        else:
            continue
        rows.append(mean)
        meanings.append(share)
    counts = csr_matrix(np.stack(rows).astype(np.float32))
    return Reference(counts, measured, np.stack(meanings), len(types))


@dataclass(frozen=True)
class TypeProfiles:
    """Mean profiles of single types, by which a readout names types without training cells."""

    terms: list[str]  # Cell Ontology ids
    counts: np.ndarray  # (n_types, vocabulary size), counts per 10,000 of the genes of the file
    measured: np.ndarray  # int64: vocabulary ids, ascending
    others: list[int]  # for each type, its class of other cells as numbered in `Reference`; -1 for none

    def without(self, known: Collection[str]) -> "TypeProfiles":
        """Leave out the types in `known`, which have training cells."""
        kept = [place for place, term in enumerate(self.terms) if term not in known]
        others = [self.others[place] for place in kept]
        return TypeProfiles([self.terms[place] for place in kept], self.counts[kept], self.measured, others)

    def add_to(self, readout: ScMMGPTLabelReadout) -> None:
        """Store the profiles in a readout as log1p, on the scale of the means of its groups."""
        arrays = readout.arrays()
        shares = np.bincount(arrays["gene_ids"], arrays["shares"], minlength=self.counts.shape[1])
        known = self.measured[shares[self.measured] > 0]
        counts = self.counts[:, known]
        profiles = np.log1p(COUNTS_PER_10K * shares[known].sum() * counts / counts.sum(axis=1, keepdims=True))
        readout.set_profiles(profiles, np.searchsorted(arrays["gene_ids"], known), self.others)


def read_types(folder: str | Path, index: GeneIndex, n_genes: int, broad: Collection[str] = ()) -> TypeProfiles | None:
    """Read the profiles of all types of the table except the terms in `broad`; None if the folder has no profiles."""
    table = reference_table()
    path = Path(folder, table["file"])
    if not path.is_file():
        return None
    names = {term: names for term, names in {**table["types"], **table["untrained"]}.items() if term not in broad}
    means, measured = mean_profiles(path, names, index, n_genes)
    kinds = {name: place for place, kind in enumerate(sorted(table["others"])) for name in table["others"][kind]}
    others = [kinds.get(names[term][0], -1) for term in means]
    return TypeProfiles(list(means), np.stack(list(means.values())), measured, others)


def mean_profiles(
    path: Path, kinds: Mapping[str, Sequence[str]], index: GeneIndex, n_genes: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Average the profiles of each kind in a table of genes x profiles, as means of log1p(CP10k).

    A kind is a term, or a class of other cells; `kinds` maps it to the names of its profiles, see [`type_name`].

    Returns:
        Kind -> mean profile in counts per 10,000, float64 `(n_genes,)`, sorted by kind; and the vocabulary ids of the
        genes of the table, ascending.
    """
    kind_of = {name: kind for kind, names in kinds.items() for name in names}
    profiles = pd.read_csv(path, index_col=0)
    kind_of_column = np.array([kind_of.get(type_name(column), "") for column in profiles.columns])
    left_out = reference_table()["left_out"]
    kind_of_column[[any(re.search(part, column) for part in left_out) for column in profiles.columns]] = ""
    values = np.log1p(COUNTS_PER_10K * (profiles / profiles.sum()).to_numpy().T)
    ids = np.array([index.lookup(str(gene))[0] for gene in profiles.index])
    means = {}
    for kind in sorted({*kind_of_column} - {""}):
        mean = np.expm1(values[kind_of_column == kind].mean(axis=0))
        means[str(kind)] = np.bincount(ids[ids >= 0], mean[ids >= 0], minlength=n_genes)
    return means, np.unique(ids[ids >= 0])


def profiled_tissues(folder: str | Path) -> set[tuple[str, str]]:
    """Pairs (UBERON id of a tissue, Cell Ontology id of a profile from it); empty if the folder has no profiles."""
    table = reference_table()
    path = Path(folder, table["file"])
    if not path.is_file():
        return set()
    term_of = {name: term for kind in ("types", "untrained") for term, names in table[kind].items() for name in names}
    tissue_of = {part: tissue for tissue, parts in table["tissues"].items() for part in parts}
    pairs = set()
    for column in pd.read_csv(path, nrows=0, index_col=0):
        if not any(re.search(part, column) for part in table["left_out"]):
            tissue = tissue_of.get(column.split("_")[-1].rstrip("-.0123456789"))
            pairs.add((tissue, term_of.get(type_name(column))))
    return {(tissue, term) for tissue, term in pairs if tissue and term}


def type_name(column: str) -> str:
    """Read the type of a profile from the name of its column, in the spelling of the reviewed table.

    >>> type_name("Loop of henle _SPP1 high_AdultKidney2")
    'loop of henle'
    """
    return " ".join(html.unescape(column).split("_")[0].strip("; \n").lower().split())
