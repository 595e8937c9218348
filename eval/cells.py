"""Real cells with labels for evaluation: sparse counts, gene symbols and types, from a corpus or an `.h5ad`."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from scmmgpt.cells_scmmgpt import Cells, log1p_cp10k


if TYPE_CHECKING:
    from anndata import AnnData

    from scmmgpt.train.data.corpus import Corpus


logger = logging.getLogger(__name__)

MAX_CELLS = 50_000  # most cells of a split; more cells do not improve the baselines, and need more memory


@dataclass(frozen=True)
class LabelledCells:
    """Cells of one split."""

    counts: sparse.csr_matrix  # raw counts, float32 `(n_cells, n_genes)`
    total_counts: np.ndarray  # library size over all genes of the source, float64 `(n_cells,)`
    genes: np.ndarray  # gene symbols, `(n_genes,)`
    labels: np.ndarray  # cell types, `(n_cells,)`
    names: np.ndarray  # barcodes, `(n_cells,)`
    obs: dict = field(default_factory=dict)  # annotations for captions, column name -> array `(n_cells,)`

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def expression(self) -> sparse.csr_matrix:
        """log1p of counts per 10,000 of the library size, CSR float32 of shape `(n_cells, n_genes)`."""
        return log1p_cp10k(self.counts, self.total_counts)

    def take(self, rows: np.ndarray) -> "LabelledCells":
        """The cells at `rows`, in that order."""
        of_cells = ("counts", "total_counts", "labels", "names")
        taken: dict[str, Any] = {name: getattr(self, name)[rows] for name in of_cells}
        return replace(self, **taken, obs={name: values[rows] for name, values in self.obs.items()})

    def select_genes(self, genes: np.ndarray) -> "LabelledCells":
        """Select genes, in this order. Genes that the cells lack become zeros; library sizes do not change."""
        columns, counts = pd.Index(self.genes).get_indexer(genes), self.counts
        if (columns < 0).any():  # -1 stands for the column of zeros, which is the last one
            zeros = sparse.csr_matrix((len(self), 1), dtype=np.float32)
            counts = sparse.hstack([counts, zeros], format="csc")
        return replace(self, counts=sparse.csr_matrix(counts[:, columns]), genes=np.asarray(genes))


def read_splits(
    corpus: "Corpus | str | Path", *, label_key: str = "cell_type", held_out: str = "test"
) -> tuple[LabelledCells, LabelledCells]:
    """Read the training cells and the cells of the split `held_out` of a corpus (open, or a path)."""
    if isinstance(corpus, str | Path):
        from scmmgpt.train.data.corpus import open_corpus

        corpus = open_corpus(corpus)
    return read_split(corpus, "train", label_key=label_key), read_split(corpus, held_out, label_key=label_key)


def read_split(corpus: "Corpus", split: str, *, label_key: str) -> LabelledCells:
    """Read the labelled cells of a split, at most `MAX_CELLS` at random, over the genes with a count in the split.

    Cells without a type in the obs column `label_key` are left out with a warning.

    Raises:
        ValueError: If the corpus has no such column, or no cell has a type.
    """
    n_cells = corpus.n_cells(split)
    chosen = np.arange(n_cells)
    if n_cells > MAX_CELLS:
        chosen = np.sort(np.random.default_rng(0).choice(n_cells, MAX_CELLS, replace=False))
        logger.info("Sampled %d of the %d cells of split %r.", MAX_CELLS, n_cells, split)
    blocks, tables, first = [], [], 0
    for block, table in corpus.row_groups(split):
        rows = chosen[(chosen >= first) & (chosen < first + len(block))] - first
        first += len(block)
        if len(rows):
            blocks.append(block[rows])
            tables.append(table.take(rows).to_pandas().astype(object))
    cells, obs = Cells.concatenate(blocks), pd.concat(tables, ignore_index=True)
    if label_key not in obs:
        raise ValueError(f"The corpus has no column {label_key!r}; it has {', '.join(obs.columns)}.")
    symbols = corpus.gene_symbols
    counts = cells.to_csr(len(symbols))
    used = np.flatnonzero(counts.getnnz(axis=0))
    labelled = obs[label_key].notna().to_numpy()
    if not labelled.any():
        raise ValueError(f"No cell of split {split!r} has a {label_key!r}. Name the column of the true types.")
    if not labelled.all():
        logger.warning("Left out %d cells of split %r without %r.", (~labelled).sum(), split, label_key)
    obs = obs[labelled]
    return LabelledCells(
        counts=counts[labelled][:, used],
        total_counts=cells.library_sizes()[labelled].astype(np.float64),
        genes=symbols[used].astype(str),
        labels=obs[label_key].to_numpy().astype(str),
        names=obs["barcode"].to_numpy().astype(str),
        obs={name: obs[name].where(obs[name].notna(), None).to_numpy() for name in obs.columns},
    )


def read_labelled(path: str | Path, label_key: str) -> tuple["AnnData", np.ndarray]:
    """Read the labelled cells of a corpus or of a file, and their labels, str `(n_obs,)`.

    Raises:
        ValueError: If `X` does not hold counts.
    """
    from scmmgpt.readers.cell_files import read_file
    from scmmgpt.train.labels import column_of

    if (Path(path) / "manifest.json").is_file():
        from anndata import concat

        from scmmgpt.train.data.corpus import open_corpus

        corpus = open_corpus(path)
        adata: AnnData = concat([corpus.to_adata(split) for split in corpus.split_names])
    else:
        adata = read_file(path)
    labels = column_of(adata.obs, label_key)
    known = labels != None  # noqa: E711 (elementwise)
    adata = adata[known].copy()
    values = sparse.csr_matrix(adata.X).data
    if (values < 0).any() or not np.array_equal(values, np.round(values)):
        raise ValueError(f"X of {path} holds no counts. Put counts into X: every system normalises them itself.")
    return adata, labels[known].astype(str)


def match_names(names: ArrayLike, test: LabelledCells, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Find the cells of the file `source` in the held-out split, by barcode.

    Returns:
        Rows of `test`, and the matching rows of the file, int arrays of equal length.

    Raises:
        ValueError: If barcodes repeat, or none matches.
    """
    index, barcodes = pd.Index(test.names), np.asarray(names).astype(str)
    if not index.is_unique:
        raise ValueError(
            f"The held-out split has {index.duplicated().sum()} barcodes twice: results cannot be matched to its "
            "cells. Make barcodes unique (for example by a sample prefix) and prepare the corpus again."
        )
    n_repeated = len(barcodes) - len(set(barcodes))
    if n_repeated:
        raise ValueError(f"{source} has {n_repeated} barcodes twice. Keep one row of each cell.")
    rows = index.get_indexer(barcodes)
    kept = np.flatnonzero(rows >= 0)
    if not len(kept):
        raise ValueError(
            f"None of the {len(barcodes)} cells of {source} is in the held-out split of the corpus ({len(test)} "
            f"cells, such as {str(test.names[0])!r}). Evaluate the held-out cells."
        )
    if len(kept) < len(barcodes):
        n_unknown = len(barcodes) - len(kept)
        logger.warning("Left out %d of %d cells of %s: not in the held-out split.", n_unknown, len(barcodes), source)
    if len(kept) < len(test):
        logger.warning("%d of %d held-out cells are not in %s.", len(test) - len(kept), len(test), source)
    return rows[kept], kept


def ontology_ids(cells: LabelledCells) -> dict[str, str | None]:
    """Cell type -> Cell Ontology id, or None; empty without the obs column of ids."""
    ids = cells.obs.get("cell_type_ontology_term_id")
    if ids is None:
        return {}
    return {label: None if term != term else term for label, term in zip(cells.labels, ids, strict=True)}
