"""Counts of the cells of a file by gene: rates, percentiles, and which genes can say something of a cell."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from .cells_scmmgpt import COUNTS_PER_10K, Cells
from .programmes_scmmgpt import PROGRAMMES


COUNTED = 0.95  # of the values are whole numbers, in counts
RECURRENT = 0.01  # cells of the file with two counts of a gene that varies, else a high count is an accident
# What these genes tell is how the cell was handled and how large it is, more than what it is.
HANDLING = ("MT-", "RPL", "RPS", "MTRNR", "EEF1", "EEF2", "EIF1", "EIF4A", "PABPC", "HNRNP")
HANDLED = frozenset(
    "B2M MALAT1 NEAT1 RPSA RACK1 TPT1 ACTB ACTG1 GAPDH TMSB4X TMSB10 FAU UBA52 UBB UBC NACA BTF3 NPM1 PTMA PFN1 CFL1 "
    "TUBA1B HSP90AB1 HSPA8 FTL FTH1 H3-3A H3-3B".split()
)
# Of the sex of the donor, and of red cells that broke (which are markers of their type): no news about a cell.
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


class Expression:
    """Counts of cells, their rates and percentiles.

    Args:
        cells: All cells of a file.
        gene_ids: int64 `(n_genes,)`: ids of the genes of the columns.
        symbols: Their symbols.
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
        # Values that are no counts are judged as if each cell had 10,000.
        self.scales = np.ones(len(cells)) if self.are_counts else COUNTS_PER_10K / self.sizes
        judged = self.counts.data * np.repeat(self.scales, np.diff(self.counts.indptr))
        two = np.bincount(self.counts.indices[judged >= 2], minlength=len(symbols))
        self.recurs = self.usable & (two > np.maximum(RECURRENT * len(cells), 1)) & ~np.isin(self.symbols, list(DONOR))
        self.is_immunoglobulin = np.array([bool(IMMUNOGLOBULIN.match(name)) for name in symbols], dtype=bool)
        self.sorted: dict[tuple[int, int], np.ndarray] = {}

    def totals(self, groups: np.ndarray, n_groups: int, values: np.ndarray | None = None) -> np.ndarray:
        """Sums of `values` of the entries of groups of cells, by default their number, `(n_groups, n_genes)`.

        Group -1 is none.
        """
        of_entry = np.repeat(groups, np.diff(self.counts.indptr))
        kept = of_entry >= 0
        keys = of_entry[kept] * len(self.symbols) + self.counts.indices[kept]
        weights = None if values is None else values[kept]
        sums = np.bincount(keys, weights, minlength=n_groups * len(self.symbols)).reshape(n_groups, len(self.symbols))
        return sums if weights is None else sums.astype(np.float64)  # of no entries: integers

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
        """The counts per 10,000 of genes `(n_cells, n)` in cells `(n_cells,)`, float32; of gene -1 any number."""
        rows = np.broadcast_to(cells[:, None], genes.shape)
        return np.asarray(self.rates[rows.ravel(), genes.ravel()], dtype=np.float32).reshape(genes.shape)

    def row(self, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """Expressed genes of a cell, ascending, and their counts."""
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
        """Share of the other cells of a group that express a gene less than a cell of it does, 0 to 100."""
        if (group, gene) not in self.sorted:
            entries = slice(self.columns.indptr[gene], self.columns.indptr[gene + 1])
            mine = np.zeros(self.counts.shape[0], dtype=np.float32)
            mine[self.columns.indices[entries]] = self.columns.data[entries]
            self.sorted[group, gene] = np.sort(mine[members])
        below = np.searchsorted(self.sorted[group, gene], self.rate(cell, gene), side="left")
        return 100.0 * below / max(len(members) - 1, 1)
