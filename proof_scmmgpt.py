"""Descriptions of cells in which counts support every clause: the type, notable genes, and alternatives.

    A B cell from blood, shown by MS4A1 (4 counts), CD79A (3) and CD19 (1). Interferon response: ISG15 (9), MX1 (2)
    and IFIT3 (1), more of these genes than 93 % of the 138 other cells of its kind. Unusually high for its kind:
    IGLC2 (9).

No text is generated: the model proposes labels and genes, and the counts of the file decide. A clause without support
in the counts is left out.

| clause | genes | condition |
| --- | --- | --- |
| type | expressed markers and evidence of the label | higher in the cells of the label than in other cells |
| against | genes of another lineage (`LINEAGES`) | at least two, and more than ambient RNA explains |
| programme | genes of a published list (`PROGRAMMES`) | several, and far above the lower quartile of the kind |
| unusual | any | several times the mean of the kind, above nearly all of its cells, no trace of another type |
| alternative | evidence for the runner-up | higher in the runner-up's cells than in the label's cells |
| undecided | evidence for both kinds of a broad type | higher in the cells of each kind than in the other's |

The **kind** of a cell consists of the cells of the file with the same type clause. A percentile is the share of cells
with a lower expression, in CP10k.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from .cells_scmmgpt import COUNTS_PER_10K, Cells
from .evidence_scmmgpt import N_MARKERS, NONE, Explainer
from .programmes_scmmgpt import LINEAGES, PROGRAMMES, Lineage


# An opposing lineage needs this number of expressed genes. Each gene, and their sum, needs this fold of the file's
# mean: ambient RNA may explain less.
MIN_LINEAGE_GENES, LINEAGE_FOLD = 2, 0.5

NO_TYPE = "No type is shown by its counts; the model proposes {}."
MIN_SCORE = 0.5  # a label of a lower probability is replaced by a broader type
MIN_KIND, MIN_RIVAL = 20, 10  # cells that a kind needs to define what is usual, and to be compared with other kinds
TYPE_FOLD, TYPE_SHARE = 2.0, 0.1  # a gene of a type: least fold over other cells, least share of expressing cells
APART, PSEUDORATE = 1.25, 0.05  # least fold of a type's genes together over each other type; pseudocount in CP10k
N_TYPE_GENES, N_GENES = 4, 3  # most genes of a clause
MIN_PROGRAMME_GENES, PROGRAMME_FOLD, PROGRAMME_PERCENTILE = 3, 3.0, 50
UNUSUAL_COUNT, UNUSUAL_FOLD, UNUSUAL_PERCENTILE = 3, 4.0, 95
# Shares of another type's mean that ambient RNA, or a neighbour on a slide, may leave; fold of a gene of one type.
TRACE, TRACE_ON_SLIDE, OF_ANY_TYPE = 0.2, 1.0, 2.0
GROUP_SHARE, GROUP_FOLD = 0.1, 2.0  # least share of a group's cells, and fold over other cells, for a sentence
COUNTED = 0.95  # a matrix with this share of whole numbers holds counts
RECURRENT = 0.01  # a gene needs two counts in this share of the cells; otherwise a high count is an accident
MIN_ALTERNATIVE = 0.1  # least probability of a runner-up
SURPRISE = 15.0  # Poisson deviance of a count with a probability of about 1 in 10,000
FLOOR = 0.4  # least expected count
OF_KIND = 0.25  # a gene shows the type of a cell from this share of the kind's mean
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


# Only B cells and plasma cells express immunoglobulins; in other cells they are ambient.
IMMUNOGLOBULIN, B_LINEAGE = re.compile(r"IG[HKL][ACDEGMV]|JCHAIN|IGLL5"), "CL:0000945"


@dataclass(frozen=True)
class Clause:
    """A sentence about a cell, and the genes that support the sentence.

    Args:
        kind: "type", "against", "programme", "unusual", "alternative" or "undecided".
        words: The sentence.
        genes: Columns of the counts.
    """

    kind: str
    words: str
    genes: tuple[int, ...] = ()


def surprise(counts: Any, expected: Any) -> Any:
    """Poisson deviance of counts above expectation, 0 below."""
    expected = np.maximum(expected, FLOOR)
    counts = np.maximum(counts, expected)
    return 2 * (counts * np.log(counts / expected) - (counts - expected))


def join(parts: Sequence[str]) -> str:
    """A list in words.

    >>> join(["a", "b", "c"])
    'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def article(noun: str, a: str = "A") -> str:
    """A noun with "A" or "An", or `a`, by its first letter."""
    return f"{a}{'n' * (noun[0] in 'aeiouAEIO')} {noun}"


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


class Proof:
    """Descriptions of the cells of a file, clause by clause.

    Args:
        expression: The counts.
        kinds: str `(n_cells,)`: the proposed type of each cell; "" for none.
        candidates: int `(n_cells, n)`: columns of genes that speak for the type, `NONE` for none. Expressed markers
            come first, then the evidence.
        others: Two [`Other`]: the runner-up, and a second alternative for cells of a broad type.
        within: Type -> Cell Ontology ids of the type and of all terms above the type.
        excluded: Type -> lineages that the type is no part of.
        tissues: str `(n_cells,)`: tissues of the file; "" for unknown.
        called: str `(n_cells,)`: the type that is named for a cell without a type clause; by default `kinds`.
        elsewhere: Type -> `(n_genes,)`: the highest mean rate of each gene in other types, in reference cells.
        trace: Share of the mean of another type up to which a gene may be ambient.
    """

    def __init__(
        self,
        expression: Expression,
        kinds: np.ndarray,
        candidates: np.ndarray,
        others: Sequence["Other"],
        within: Mapping[str, frozenset[str]],
        excluded: Mapping[str, Sequence[Lineage]],
        tissues: np.ndarray,
        called: np.ndarray | None = None,
        elsewhere: Mapping[str, np.ndarray] | None = None,
        trace: float = TRACE,
    ) -> None:
        self.elsewhere, self.excluded, self.trace = elsewhere or {}, excluded, trace
        self.expression, self.others, self.within, self.tissues = expression, others, within, tissues
        n_cells, proposed = len(kinds), (kinds if called is None else called).tolist()
        self.clauses: list[list[Clause]] = [[] for _ in range(n_cells)]
        while True:  # cells without a type clause leave their kind, which changes the means of the kinds
            self.group_by(kinds)
            rows = logging.tqdm(range(n_cells), desc="Proving types", unit="cell", delay=3)
            typed = [self.type_clause(cell, candidates[cell]) for cell in rows]
            kinds, before = np.where([clause is None for clause in typed], "", kinds), kinds
            if (kinds == before).all():
                break
        programmes, unusual = self.programme_clauses(), self.unusual_genes()
        for cell, (clause, word) in enumerate(zip(typed, proposed, strict=True)):
            if clause is None:
                self.clauses[cell] = [Clause("type", NO_TYPE.format(word or "none"))]
                continue
            self.clauses[cell] = [clause, *self.against_clauses(cell), *programmes[cell]]
            mentioned = {gene for part in self.clauses[cell] for gene in part.genes}
            if genes := [gene for gene in unusual[cell] if gene not in mentioned][:N_GENES]:
                words = f"Unusually high for its kind: {expression.named(genes, cell)}."
                self.clauses[cell].append(Clause("unusual", words, tuple(genes)))
            self.clauses[cell] += self.alternative_clauses(cell)

    def group_by(self, kinds: np.ndarray) -> None:
        """Set the kinds of the cells, and compute sums, shares and rivals of each kind."""
        self.kinds = kinds
        self.names = sorted(set(kinds.tolist()) - {""})
        number = {name: i for i, name in enumerate(self.names)}
        self.group = np.array([number.get(kind, NONE) for kind in kinds])
        self.members = [np.flatnonzero(self.group == i) for i in range(len(self.names))]
        self.n = np.bincount(self.group[self.group >= 0], minlength=len(self.names))
        self.sums = self.expression.totals(self.group, len(self.names), self.expression.rates.data)
        self.shares = self.expression.totals(self.group, len(self.names)) / self.n[:, None].clip(min=1)
        self.total = np.asarray(self.expression.rates.sum(axis=0), dtype=np.float64).ravel()
        # One mean cell of the file joins each kind: it shrinks the means of small kinds.
        counts = self.expression.totals(self.group, len(self.names), self.expression.counts.data)
        sizes = np.bincount(self.group[self.group >= 0], self.expression.sizes[self.group >= 0], len(self.names))
        means = (self.sums + self.total / len(kinds)) / (self.n[:, None] + 1)
        counts += np.asarray(self.expression.counts.sum(axis=0)).ravel() / len(kinds)
        pooled = COUNTS_PER_10K * counts / (sizes[:, None] + self.expression.sizes.mean())
        self.logs = np.log(np.stack([means, pooled]) + PSEUDORATE)
        self.rivals = [
            np.array([i for i, n in enumerate(self.n) if n >= MIN_RIVAL and self.excludes(i, own)], dtype=int)
            for own in range(len(self.names))
        ]
        self.expression.sorted.clear()

    def excludes(self, one: int, other: int) -> bool:
        """Whether two groups exclude each other: neither type is above the other."""
        above, below = (self.within.get(self.names[group], frozenset({self.names[group]})) for group in (one, other))
        return not above <= below and not below <= above

    def sets_apart(self, group: int, genes: Sequence[int]) -> list[int]:
        """The first `N_TYPE_GENES` genes, or else the best ones, if higher together in a group than in each rival.

        Mean rates and pooled counts, in which large cells weigh more, must both be higher. Empty if they are not.
        """
        rivals = self.rivals[group]
        if not len(rivals):
            return list(genes[:N_TYPE_GENES])
        ratios = np.concatenate([logs[group, genes] - logs[rivals][:, genes] for logs in self.logs])
        best = np.argsort(-ratios.min(axis=0), kind="stable")
        for chosen in (np.arange(len(genes)), best):
            chosen = chosen[:N_TYPE_GENES]
            if len(chosen) and ratios[:, chosen].sum(axis=1).min() >= np.log(APART):
                return [genes[i] for i in chosen]
        return []

    def mean(self, group: int) -> np.ndarray:
        """Mean rates of a group, CP10k, `(n_genes,)`."""
        return self.sums[group] / max(self.n[group], 1)

    def type_clause(self, cell: int, candidates: np.ndarray) -> Clause | None:
        """The clause of the type, if genes of the cell show the type."""
        group = self.group[cell]
        if group == NONE:
            return None
        is_rare = self.n[group] < MIN_KIND  # genes that few cells share may be an accident: only known markers count
        if is_rare and self.against_clauses(cell):
            return None
        genes = list(dict.fromkeys(candidates[: N_MARKERS if is_rare else None].tolist()))
        genes = [gene for gene in genes if gene != NONE and self.expression.tells_types[gene]]
        rates = np.array([self.expression.rate(cell, gene) for gene in genes])
        in_kind = (self.sums[group][genes] - rates) / (self.n[group] - 1) if self.n[group] > 1 else rates
        others = (self.total - self.sums[group])[genes] / max(len(self.kinds) - self.n[group], 1)
        shows = (in_kind >= TYPE_FOLD * others) & (in_kind > 0) & (self.shares[group][genes] >= TYPE_SHARE)
        shows &= rates >= OF_KIND * in_kind
        genes = self.sets_apart(group, [gene for gene, is_shown in zip(genes, shows, strict=True) if is_shown])
        is_broad = bool(self.others[1].names[cell])
        if not set(genes) & set(candidates[:N_MARKERS].tolist()) or (is_rare and is_broad and len(genes) < 2):
            return None
        noun = article(self.names[group]) + (f" from {self.tissues[cell]}" if self.tissues[cell] else "")
        alone = " alone" if len(genes) == 1 else ""
        words = f"{noun}, shown by {self.expression.named(genes, cell, unit=True)}{alone}."
        return Clause("type", words, tuple(genes))

    def against_clauses(self, cell: int) -> list[Clause]:
        """Clauses of lineages that the type of a cell excludes, and that genes of the cell show."""
        clauses, expression = [], self.expression
        for lineage in self.excluded.get(self.names[self.group[cell]], ()):
            columns = [expression.column_of[gene] for gene in lineage.genes if gene in expression.column_of]
            rates = np.array([expression.rate(cell, gene) for gene in columns])
            least = LINEAGE_FOLD * self.total[columns] / len(self.kinds)
            genes = [columns[i] for i in np.flatnonzero((rates > 0) & (rates >= least))]
            if rates.sum() >= least.sum() and len(genes) >= MIN_LINEAGE_GENES:
                words = f"Against it speak {expression.named(genes, cell)}, genes of {lineage.name}."
                clauses.append(Clause("against", words, tuple(genes)))
        return clauses

    def programme_clauses(self) -> list[list[Clause]]:
        """Clauses of the programmes that each cell expresses far above the lower quartile of its kind."""
        clauses: list[list[Clause]] = [[] for _ in self.kinds]
        expression = self.expression
        for programme in PROGRAMMES:
            columns = [expression.column_of[gene] for gene in programme.genes if gene in expression.column_of]
            part = expression.counts[:, columns].tocsr()
            totals = np.asarray(part.sum(axis=1)).ravel()
            rates = totals / expression.sizes * COUNTS_PER_10K
            distinct = np.diff(part.indptr)
            for group, members in enumerate(self.members):
                allowed = not programme.within or set(programme.within) & self.within.get(self.names[group], set())
                if len(members) <= MIN_KIND or not allowed:
                    continue
                mine = rates[members]
                expected = np.quantile(mine, 0.25) * expression.sizes[members] / COUNTS_PER_10K
                below = np.searchsorted(np.sort(mine), mine, side="left") * 100 // (len(members) - 1)
                is_high = totals[members] >= PROGRAMME_FOLD * expected
                rare = surprise(totals[members], expected) >= SURPRISE
                rare = rare if expression.are_counts else below >= UNUSUAL_PERCENTILE
                is_high &= rare & (below >= PROGRAMME_PERCENTILE)
                for place in np.flatnonzero(is_high & (distinct[members] >= MIN_PROGRAMME_GENES)):
                    cell = members[place]
                    counts = part[cell].toarray().ravel()
                    genes = [columns[i] for i in np.argsort(-counts, kind="stable")[:N_TYPE_GENES] if counts[i]]
                    share = "all" if below[place] == 100 else f"{below[place]} %"
                    words = (
                        f"{programme.phrase}: {expression.named(genes, cell)}, more of these genes than "
                        f"{share} of the {len(members) - 1} other cells of its kind."
                    )
                    clauses[cell].append(Clause("programme", words, tuple(genes)))
        return clauses

    def traces(self, group: int) -> np.ndarray:
        """Rates up to which a gene in a cell of a group may come from cells of other types, CP10k, `(n_genes,)`."""
        rivals = self.rivals[group]
        rates = (self.sums[rivals] / self.n[rivals, None]).max(axis=0, initial=0.0)
        others = (self.total - self.sums[group]) / max(len(self.kinds) - self.n[group], 1)
        of_any_type = self.mean(group) <= OF_ANY_TYPE * others
        is_other = self.expression.is_immunoglobulin & (B_LINEAGE not in self.within.get(self.names[group], ()))
        traces = np.maximum(rates, np.where(of_any_type, self.elsewhere.get(self.names[group], 0.0), 0.0))
        return np.where(is_other, np.inf, self.trace * traces)

    def unusual_genes(self) -> list[list[int]]:
        """Genes that each cell expresses far above its kind, the highest deviance first."""
        unusual: list[list[int]] = [[] for _ in self.kinds]
        expression = self.expression
        for group, members in enumerate(self.members):
            if len(members) <= MIN_KIND:
                continue
            traces = self.traces(group)
            for cell in logging.tqdm(members.tolist(), desc=f"Comparing {self.names[group]}", unit="cell", delay=3):
                genes, counts = expression.row(cell)
                rates = expression.rates[cell, genes].toarray().ravel()
                others = (self.sums[group][genes] - rates) / (self.n[group] - 1)
                counts = counts * expression.scales[cell]
                expected = np.maximum(others, 0) * expression.sizes[cell] * expression.scales[cell] / COUNTS_PER_10K
                high = (counts >= UNUSUAL_COUNT) & (counts >= UNUSUAL_FOLD * expected) & expression.recurs[genes]
                high &= rates > traces[genes]
                deviance = np.where(high, surprise(counts, expected), 0.0)
                for entry in np.argsort(-deviance, kind="stable")[: 3 * N_GENES]:
                    gene = int(genes[entry])
                    if deviance[entry] >= SURPRISE and (
                        expression.percentile(cell, gene, group, members) >= UNUSUAL_PERCENTILE
                    ):
                        unusual[cell].append(gene)
        return unusual

    def alternative_clauses(self, cell: int) -> list[Clause]:
        """The clause of an alternative type, if genes of the cell speak for the type."""
        named = []
        for other in self.others:
            name, against = other.names[cell], other.against[cell]
            if name and (genes_of := self.genes_for(name, against, other.genes[cell])):
                named.append((name, genes_of))
        words = [
            f"{name}, for which {self.expression.named(genes_of, cell)} speak{'s'[: len(genes_of) == 1]}"
            for name, genes_of in named
        ]
        genes = tuple(gene for _, part in named for gene in part)
        if not self.others[1].names[cell]:
            return [Clause("alternative", f"The alternative is {words[0]}.", genes)] if words else []
        if len(words) < 2:
            return []
        return [Clause("undecided", f"It is undecided between {words[0]}, and {words[1]}.", genes)]

    def genes_for(self, name: str, against: str, candidates: np.ndarray) -> list[int]:
        """Candidates that are higher in the cells of a type than in cells of another; empty without a known marker."""
        if name not in self.names or against not in self.names:
            return []
        pair = self.names.index(name), self.names.index(against)
        if min(self.n[list(pair)]) < MIN_KIND:
            return []
        one, other = (self.mean(group) for group in pair)
        speaks = (one >= TYPE_FOLD * other) & (self.shares[pair[0]] >= TYPE_SHARE) & self.expression.tells_types
        genes = [gene for gene in dict.fromkeys(candidates.tolist()) if gene != NONE and speaks[gene]][:N_GENES]
        return genes if set(genes) & set(candidates[:N_MARKERS].tolist()) else []

    def texts(self) -> np.ndarray:
        """Descriptions of the cells, str `(n_cells,)`."""
        return np.array([" ".join(clause.words for clause in clauses) for clauses in self.clauses], dtype=object)

    def group_rows(self, level: str, groups: np.ndarray) -> Iterator[dict[str, Any]]:
        """A row of `level`, `name`, `cells` and `text` for each group; `groups` is str `(n_cells,)`."""
        names, numbers = np.unique(groups.astype(str), return_inverse=True)
        n_cells = np.bincount(numbers)
        expressing = self.expression.totals(numbers, len(names))
        shares = expressing / n_cells[:, None]
        shown = {p.phrase: np.array([p.phrase in clauses for clauses in self.phrases()]) for p in PROGRAMMES}
        for i, name in enumerate(names):
            mine = numbers == i
            n, others = int(n_cells[i]), len(mine) - int(n_cells[i])
            elsewhere = (expressing.sum(axis=0) - expressing[i]) / max(others, 1)
            kinds, counts = np.unique(self.kinds[mine].astype(str), return_counts=True)
            parts = [
                f"{counts[k] / n:.0%} {kinds[k]}"
                for k in np.argsort(-counts, kind="stable")[:2]
                if kinds[k] and counts[k] >= GROUP_SHARE * n
            ]
            first = kinds[counts.argmax()] if 2 * counts.max() >= n else ""  # a mixture has no typical genes
            of_first = np.flatnonzero(mine & (self.kinds == first) & bool(first))
            mentioned = [g for cell in of_first for g in self.clauses[cell][0].genes]
            genes, times = np.unique(np.array(mentioned, dtype=int), return_counts=True)
            best = genes[np.argsort(-times, kind="stable")]
            best = best[shares[i, best] >= elsewhere[best] + GROUP_SHARE]
            of_genes = [
                f"{self.expression.symbols[g]} ({shares[i, g]:.0%} of its cells"
                + (f", {elsewhere[g]:.0%} of the others)" if others else ")")
                for g in best[:N_TYPE_GENES]
            ]
            text = f"{n} {'cell' if n == 1 else 'cells'}, "
            text += join(parts) if parts else "without a type that their counts show"
            text += f", shown by {join(of_genes)}." if parts and of_genes else "."
            for phrase, has in shown.items():
                here, there = has[mine].mean(), has[~mine].mean() if others else 0.0
                if here >= GROUP_SHARE and here >= GROUP_FOLD * there:
                    text += f" {phrase} in {here:.0%} of its cells"
                    text += f", and in {there:.0%} of the others." if others else "."
            for lineage in LINEAGES:
                against = sum(
                    any(c.kind == "against" and c.words.endswith(f" {lineage.name}.") for c in self.clauses[cell])
                    for cell in np.flatnonzero(mine)
                )
                if against >= GROUP_SHARE * n:
                    text += f" In {against / n:.0%} of its cells, genes of {lineage.name} speak against the type."
            yield {"level": level, "name": str(name), "cells": n, "text": re.sub(r"(?<=\d)%", " %", text)}

    def phrases(self) -> list[set[str]]:
        """Phrases of the programmes of each cell."""
        programmes = ([c.words for c in clauses if c.kind == "programme"] for clauses in self.clauses)
        return [{words.partition(":")[0] for words in of_cell} for of_cell in programmes]

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A row for each gene of each clause of each cell.

        `cell`, `clause` (a number), `kind`, `text`, `gene`, `count`, `percentile` (among the cells of the file) and
        `percentile_of_kind` (among the cells of the kind).
        """
        everything = np.arange(len(self.kinds))
        for cell, clauses in enumerate(self.clauses):
            group = self.group[cell]
            for number, clause in enumerate(clauses):
                about = {"cell": str(names[cell]), "clause": number, "kind": clause.kind, "text": clause.words}
                for gene in clause.genes:
                    among = self.expression.percentile(cell, gene, NONE, everything)
                    of_kind = self.expression.percentile(cell, gene, group, self.members[group])
                    yield {
                        **about,
                        "gene": self.expression.symbols[gene],
                        "count": round(self.expression.count(cell, gene), 4),
                        "percentile": round(among, 2),
                        "percentile_of_kind": round(of_kind, 2),
                    }


@dataclass
class Other:
    """An alternative type for each cell.

    Args:
        names: str `(n_cells,)`: the alternative; "" for none.
        against: str `(n_cells,)`: the type that the alternative is compared with.
        genes: As `candidates` in [`Proof`], for the alternative.
    """

    names: np.ndarray
    against: np.ndarray
    genes: np.ndarray


def propose(
    cells: Cells,
    explainer: Explainer,
    gene_ids: np.ndarray,
    kinds: Sequence[str],
    labels: Sequence[str],
    kind_of_cell: np.ndarray,
    probabilities: np.ndarray,
    batch_size: int,
) -> tuple[np.ndarray, list[Other]]:
    """The model's proposals, which [`Proof`] checks against the counts: genes of the type, and alternatives.

    Args:
        cells: All cells.
        explainer: One set of trained labels for each of `kinds`; an empty set has no evidence.
        gene_ids: int64 `(n_genes,)`, ascending: vocabulary ids of the columns of the counts.
        kinds: Types of the cells.
        labels: Labels of the readout, in order.
        kind_of_cell: int64 `(n_cells,)`: positions in `kinds`.
        probabilities: `(n_cells, n_labels)`.
        batch_size: Cells per batch.

    Returns:
        `candidates` and `others` of [`Proof`].
    """
    mine = explainer.members[kind_of_cell]
    is_broad = mine.sum(axis=1) > 1
    inside = np.argsort(-np.where(mine, probabilities, -1), axis=1, kind="stable")[:, :2] + explainer.first_label
    outside = np.where(mine, -1, probabilities)
    first = np.where(outside.max(axis=1) >= MIN_ALTERNATIVE, outside.argmax(axis=1) + explainer.first_label, NONE)
    first = np.where(is_broad, inside[:, 0], np.where(mine.any(axis=1), first, NONE))
    second = np.where(is_broad, inside[:, 1], kind_of_cell)
    genes_of: list[list[np.ndarray]] = [[], [], []]
    for start in logging.tqdm(range(0, len(cells), batch_size), desc="Looking for genes", unit="batch", delay=3):
        part = slice(start, start + batch_size)
        batch, own, one, other = cells[part], kind_of_cell[part], first[part], second[part]
        against = np.where(is_broad[part], one, NONE)
        for number, (name, rivals) in enumerate([(own, None), (one, other), (other, against)]):
            if rivals is not None:
                name, rivals = np.maximum(name, 0), np.where(name == NONE, NONE, rivals)
            evidence, _ = explainer(batch, name, rivals)
            markers = np.where(evidence.markers, explainer.markers[name], NONE)
            genes_of[number].append(np.hstack([markers, evidence.genes]))
    names = np.asarray([*kinds, *labels, ""], dtype=object)
    columns = np.append(np.searchsorted(gene_ids, explainer.panel.gene_ids), NONE)
    candidates, *genes = (columns[np.concatenate(parts)] for parts in genes_of)
    second_name, nothing = np.where(is_broad, second, NONE), np.full(len(first), NONE)
    against = np.where(first == NONE, NONE, second)
    return candidates, [
        Other(names[first], names[against], genes[0]),
        Other(names[second_name], names[np.where(is_broad, first, nothing)], genes[1]),
    ]


def terms_above(members: np.ndarray, known: Mapping[str, int], terms: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Ids of the terms whose labels include all labels of a type; `members` is bool `(n_labels,)`."""
    mine = {name for name, column in known.items() if members[column]}
    return frozenset(term["id"] for term in terms if mine and mine <= set(term["labels"]))


def excluded_lineages(
    members: np.ndarray, known: Mapping[str, int], terms: Sequence[Mapping[str, Any]]
) -> tuple[Lineage, ...]:
    """Lineages whose terms share no label with a type; `members`, bool `(n_labels,)`, are the labels of the type.

    Empty for a type that no term includes.
    """
    mine = {name for name, column in known.items() if members[column]}
    if not terms_above(members, known, terms):
        return ()
    of_term = {term["id"]: set(term["labels"]) for term in terms}
    return tuple(line for line in LINEAGES if line.term in of_term and not of_term[line.term] & mine)


def tissues_of(obs: Any) -> np.ndarray:
    """The column `tissue` of `obs`, str `(n_cells,)`; "" for an unknown or missing tissue."""
    if "tissue" not in obs:
        return np.full(len(obs), "", dtype=object)
    words = [str(word) for word in obs["tissue"].astype(object).fillna("")]
    return np.array(["" if word.casefold() in ("", "unknown", "na", "nan") else word for word in words], dtype=object)
