"""Reference profiles: mean expression of the cell types of many organs, beside cells of the datasets.

Profiles of known types are one more laboratory of these types. The others are no labels: with them a readout learns
what the cells of its labels are not, so that a cell of an organ that no dataset has is not given the least unlike
label (`readout_scmmgpt.PanelReadout.novelty`). A checkpoint keeps those of single types too, to name cells by them
(`profiles_scmmgpt`). `data/tables/reference_profiles.json` says what each profile is.
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
    """Mean profiles, one of each type or kind of other cells."""

    counts: csr_matrix  # (n_profiles, vocabulary size), counts per 10,000 of the genes of the file
    measured: np.ndarray  # int64: vocabulary ids, ascending
    meanings: np.ndarray  # (n_profiles, n_labels + n_others): shares of labels, or one kind of other cells
    n_labels: int

    def without(self, label: int) -> "Reference":
        """The reference without the profiles of a label."""
        kept = self.meanings[:, label] == 0
        return replace(self, counts=self.counts[kept], meanings=self.meanings[kept])

    def join(
        self, datasets: Sequence[Dataset], meanings: np.ndarray, labels: np.ndarray
    ) -> tuple[list[Dataset], np.ndarray]:
        """Datasets and `meanings` over some labels, for `fit_pooled_readout`, with the profiles as one more dataset.

        Profiles of labels that are not among `labels` are left out.
        """
        shares = self.meanings[:, [*labels, *range(self.n_labels, self.meanings.shape[1])]]
        kept = shares.sum(axis=1) > 0
        shares = shares[kept] / shares[kept].sum(axis=1, keepdims=True)
        of_cells = np.pad(meanings, ((0, 0), (0, shares.shape[1] - len(labels))))
        profiles = Dataset(self.counts[kept], self.measured, len(meanings) + np.arange(len(shares)))
        return [*datasets, profiles], np.concatenate([of_cells, shares])


def reference_table() -> dict[str, Any]:
    """The reviewed table of reference profiles: the file, and the Cell Ontology term of each profile."""
    return read_json(TABLES / "reference_profiles.json", dict)


def reference_genes(folder: str | Path, index: GeneIndex) -> np.ndarray:
    """Vocabulary ids of the genes that the profiles have, int64, ascending; none if the folder has no such file."""
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
    """The profiles, over the genes of a vocabulary; None if the folder has no such file.

    Args:
        folder: Of the data.
        types: Cell Ontology ids of the labels.
        place: Terms -> the types that each counts for.
        index: The genes.
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
    """Mean profiles of single types, for a readout to name the types by that none of its cells has."""

    terms: list[str]  # Cell Ontology ids
    counts: np.ndarray  # (n_types, vocabulary size), counts per 10,000 of the genes of the file
    measured: np.ndarray  # int64: vocabulary ids, ascending
    others: list[int]  # the kind of other cells that a type is part of, as a `Reference` numbers them; -1 for none

    def without(self, known: Collection[str]) -> "TypeProfiles":
        """The types that are not known by cells."""
        kept = [place for place, term in enumerate(self.terms) if term not in known]
        others = [self.others[place] for place in kept]
        return TypeProfiles([self.terms[place] for place in kept], self.counts[kept], self.measured, others)

    def add_to(self, readout: ScMMGPTLabelReadout) -> None:
        """Keep the profiles in a readout, on the scale of its groups."""
        arrays = readout.arrays()
        shares = np.bincount(arrays["gene_ids"], arrays["shares"], minlength=self.counts.shape[1])
        known = self.measured[shares[self.measured] > 0]
        counts = self.counts[:, known]
        profiles = np.log1p(COUNTS_PER_10K * shares[known].sum() * counts / counts.sum(axis=1, keepdims=True))
        readout.set_profiles(profiles, np.searchsorted(arrays["gene_ids"], known), self.others)


def read_types(folder: str | Path, index: GeneIndex, n_genes: int, broad: Collection[str] = ()) -> TypeProfiles | None:
    """The profiles of all types of the table that are not `broad`; None if the folder has no such file."""
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
    """Kind -> counts per 10,000 of its mean profile `(n_genes,)`, sorted by kind; and the genes of the file, ids.

    `kinds` are the names of the profiles of each kind. The mean is that of logarithms.
    """
    kind_of = {name: kind for kind, names in kinds.items() for name in names}
    profiles = pd.read_csv(path, index_col=0)
    found = np.array([kind_of.get(type_name(column), "") for column in profiles.columns])
    left_out = reference_table()["left_out"]
    found[[any(re.search(part, column) for part in left_out) for column in profiles.columns]] = ""
    values = np.log1p(COUNTS_PER_10K * (profiles / profiles.sum()).to_numpy().T)
    ids = np.array([index.lookup(str(gene))[0] for gene in profiles.index])
    means = {}
    for kind in sorted({*found} - {""}):
        mean = np.expm1(values[found == kind].mean(axis=0))
        means[str(kind)] = np.bincount(ids[ids >= 0], mean[ids >= 0], minlength=n_genes)
    return means, np.unique(ids[ids >= 0])


def profiled_tissues(folder: str | Path) -> set[tuple[str, str]]:
    """Pairs of a tissue, UBERON id, and a type that a profile of it has; empty if the folder has no such file."""
    table = reference_table()
    path = Path(folder, table["file"])
    if not path.is_file():
        return set()
    term_of = {name: term for kind in ("types", "untrained") for term, names in table[kind].items() for name in names}
    tissue_of = {part: tissue for tissue, parts in table["tissues"].items() for part in parts}
    found = set()
    for column in pd.read_csv(path, nrows=0, index_col=0):
        if not any(re.search(part, column) for part in table["left_out"]):
            tissue = tissue_of.get(column.split("_")[-1].rstrip("-.0123456789"))
            found.add((tissue, term_of.get(type_name(column))))
    return {(tissue, term) for tissue, term in found if tissue and term}


def type_name(column: str) -> str:
    """The type of a profile, as the table spells it, from the name of a column.

    >>> type_name("Loop of henle _SPP1 high_AdultKidney2")
    'loop of henle'
    """
    return " ".join(html.unescape(column).split("_")[0].strip("; \n").lower().split())
