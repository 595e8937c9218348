"""Counts of the cells of a file by gene: rates, percentiles, and the genes that descriptions may use."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from .cells_scmmgpt import COUNTS_PER_10K, Cells
from .programmes_scmmgpt import PROGRAMMES


COUNTED = 0.95  # a matrix with this share of whole numbers holds counts
RECURRENT = 0.01  # a gene needs two counts in this share of the cells; otherwise a high count is an accident
# Genes that depend on the handling and the size of a cell more than on its type.
HANDLING = ("MT-", "RPL", "RPS", "MTRNR", "EEF1", "EEF2", "EIF1", "EIF4A", "PABPC", "HNRNP")
HANDLED = frozenset(
    "B2M MALAT1 NEAT1 RPSA RACK1 TPT1 ACTB ACTG1 GAPDH TMSB4X TMSB10 FAU UBA52 UBB UBC NACA BTF3 NPM1 PTMA PFN1 CFL1 "
    "TUBA1B HSP90AB1 HSPA8 FTL FTH1 H3-3A H3-3B".split()
)
# Genes of the donor's sex and of lysed red cells say nothing unusual about a cell (haemoglobins remain markers).
DONOR = frozenset(
    "XIST TSIX RPS4Y1 DDX3Y UTY EIF1AY KDM5D USP9Y ZFY TMSB4Y NLGN4Y HBA1 HBA2 HBB HBD HBG1 HBG2 HBM".split()
)
IMMUNOGLOBULIN = re.compile(r"IG[HKL][ACDEGMV]|JCHAIN|IGLL5")


def join(parts: Sequence[str]) -> str:
    """A list in words.

    >>> join(["a", "b", "c"])
    'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def share(value: float) -> str:
    """A share in words; what is not none or not all is not called so.

    >>> share(0.0004), share(0.0006), share(0.254), share(0.999), share(0.9996), share(1.0)
    ('<0.1 %', '0.1 %', '25 %', '99.9 %', '>99.9 %', '100 %')
    """
    percent = 100 * float(value)
    if 0 < percent < 0.05 or 99.95 < percent < 100:
        return "<0.1 %" if percent < 1 else ">99.9 %"
    is_edge = 0 < percent < 1 or 99 < percent < 100
    return f"{min(max(percent, 0.1), 99.9):.1f} %" if is_edge else f"{percent:.0f} %"


class Expression:
    """Counts of the cells of a file, with rates (CP10k) and percentiles.

    Args:
        cells: All cells of the file.
        gene_ids: int64 `(n_genes,)`: vocabulary ids of the columns.
        symbols: Gene symbols of the columns.
    """

    def __init__(self, cells: Cells, gene_ids: np.ndarray, symbols: Sequence[str]) -> None:
        matrix = cells.to_csr(int(max(gene_ids.max(initial=0), cells.gene_ids.max(initial=0))) + 1)
        self.counts = matrix[:, gene_ids].tocsr()
        self.counts.sort_indices()
        self.sizes = cells.library_sizes().clip(min=1e-9)
        self.rates = self.counts.copy()
        self.rates.data *= np.float32(COUNTS_PER_10K) / np.repeat(self.sizes, np.diff(self.counts.indptr))
        self.columns = self.rates.tocsc()
        self.symbols = np.asarray(symbols, dtype=object)
        self.column_of = {name: column for column, name in enumerate(symbols)}
        self.usable = np.array([not name.startswith(HANDLING) and name not in HANDLED for name in symbols])
        states = {gene for programme in PROGRAMMES if not programme.within for gene in programme.genes}
        self.tells_types = self.usable & ~np.isin(self.symbols, list(states))  # a state is not a type
        self.are_counts = bool((self.counts.data == np.rint(self.counts.data)).mean() >= COUNTED)
        # Values that are no counts are scaled to 10,000 per cell.
        self.scales = np.ones(len(cells)) if self.are_counts else COUNTS_PER_10K / self.sizes
        judged = self.counts.data * np.repeat(self.scales, np.diff(self.counts.indptr))
        two = np.bincount(self.counts.indices[judged >= 2], minlength=len(symbols))
        self.recurs = self.usable & (two > np.maximum(RECURRENT * len(cells), 1)) & ~np.isin(self.symbols, list(DONOR))
        self.is_immunoglobulin = np.array([bool(IMMUNOGLOBULIN.match(name)) for name in symbols], dtype=bool)
        self.sorted: dict[tuple[int, int], np.ndarray] = {}

    def totals(self, groups: np.ndarray, n_groups: int, values: np.ndarray | None = None) -> np.ndarray:
        """Sums of `values` by group and gene, `(n_groups, n_genes)`; by default numbers of entries.

        `groups` is `(n_cells,)`, -1 for a cell without a group; `values` is aligned with the entries of `counts`.
        """
        of_entry = np.repeat(groups, np.diff(self.counts.indptr))
        grouped = of_entry >= 0
        keys = of_entry[grouped] * len(self.symbols) + self.counts.indices[grouped]
        weights = None if values is None else values[grouped]
        sums = np.bincount(keys, weights, minlength=n_groups * len(self.symbols)).reshape(n_groups, len(self.symbols))
        return sums if weights is None else sums.astype(np.float64)  # NumPy returns integers for no entries

    def count(self, cell: int, gene: int) -> float:
        """The count of a gene in a cell."""
        genes, counts = self.row(cell)
        place = np.searchsorted(genes, gene)
        return float(counts[place]) if place < len(genes) and genes[place] == gene else 0.0

    def rate(self, cell: int, gene: int) -> np.float32:
        """The counts per 10,000 of a gene in a cell."""
        return np.float32(self.count(cell, gene)) * (np.float32(COUNTS_PER_10K) / self.sizes[cell])

    def count_of(self, genes: Iterable[int], cell: int) -> list[float]:
        """The counts of genes in a cell."""
        return [self.count(cell, gene) for gene in genes]

    def rates_of(self, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """CP10k of `genes` in `cells`, float32 `(n_cells, n)`; the value of gene -1 has no meaning.

        Args:
            cells: int `(n_cells,)`: positions of cells.
            genes: int `(n_cells, n)`: columns.
        """
        rows = np.broadcast_to(cells[:, None], genes.shape)
        return np.asarray(self.rates[rows.ravel(), genes.ravel()], dtype=np.float32).reshape(genes.shape)

    def row(self, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the expressed genes of a cell, ascending, and their counts."""
        entries = slice(self.counts.indptr[cell], self.counts.indptr[cell + 1])
        return self.counts.indices[entries], self.counts.data[entries]

    def named(self, genes: Iterable[int], cell: int, unit: bool = False) -> str:
        """Genes with their counts in a cell, in words."""
        values = [(f"{value:.0f}" if value >= 1000 else f"{value:.4g}") for value in self.count_of(genes, cell)]
        words = [f"{self.symbols[gene]} ({value})" for gene, value in zip(genes, values, strict=True)]
        if unit and self.are_counts:
            words[0] = words[0].replace(")", " count)" if values[0] == "1" else " counts)")
        return join(words)

    def percentile(self, cell: int, gene: int, group: int, members: np.ndarray) -> float:
        """Percentage of the other cells of a group in which a gene has a lower rate than in the given cell."""
        if (group, gene) not in self.sorted:
            entries = slice(self.columns.indptr[gene], self.columns.indptr[gene + 1])
            mine = np.zeros(self.counts.shape[0], dtype=np.float32)
            mine[self.columns.indices[entries]] = self.columns.data[entries]
            self.sorted[group, gene] = np.sort(mine[members])
        below = np.searchsorted(self.sorted[group, gene], self.rate(cell, gene), side="left")
        return 100.0 * below / max(len(members) - 1, 1)
