"""Descriptions whose every clause is counted: what a cell is, what is notable in it, what else it may be.

    A B cell from blood, shown by MS4A1 (4 counts), CD79A (3) and CD19 (1). Interferon response: ISG15 (9), MX1 (2)
    and IFIT3 (1), more of these genes than 93 % of the 138 other cells of its kind. Unusually high for its kind:
    IGLC2 (9).

Nothing is generated: the model proposes (label, runner-up, genes), and the counts of the file decide. A clause that
they do not support is left out.

| clause | genes | when it is written |
| --- | --- | --- |
| type | expressed markers and evidence of the label | higher in the cells of the label than in the others |
| against | those of another lineage (`LINEAGES`) | at least two, too many to be from other cells |
| programme | those of a published list (`PROGRAMMES`) | several, and far more than in the lower quarter of its kind |
| unusual | any | several times the mean of its kind, above nearly all of it, and no trace of another type |
| alternative | evidence for the runner-up | higher in the runner-up's cells than in those of the label |
| undecided | evidence for both kinds of a broad type | likewise |

The **kind** of a cell is the other cells of the file with the same type clause. A percentile is the share of cells
that express less, in counts per 10,000.
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


# Genes that show a lineage, and the fold of the file's mean that each and all need: less may be from the fluid.
MIN_LINEAGE_GENES, LINEAGE_FOLD = 2, 0.5

NO_TYPE = "No type is shown by its counts; the model proposes {}."
MIN_SCORE = 0.5  # a label of a lower probability gives way to a broader type
MIN_KIND, MIN_RIVAL = 20, 10  # cells, to say what is usual of a type, and to know that it has more of a gene
TYPE_FOLD, TYPE_SHARE = 2.0, 0.1  # of a gene of a type: fold of mean expression, and cells that express it
APART, PSEUDORATE = 1.25, 0.05  # fold of the genes of a type together over any other; counts per 10,000
N_TYPE_GENES, N_GENES = 4, 3  # named in a clause
MIN_PROGRAMME_GENES, PROGRAMME_FOLD, PROGRAMME_PERCENTILE = 3, 3.0, 50
UNUSUAL_COUNT, UNUSUAL_FOLD, UNUSUAL_PERCENTILE = 3, 4.0, 95
# Of another type's expression, from the fluid around a cell or from its neighbours on a slide; and genes of all types.
TRACE, TRACE_ON_SLIDE, OF_ANY_TYPE = 0.2, 1.0, 2.0
GROUP_SHARE, GROUP_FOLD = 0.1, 2.0  # of cells: what is said of a group
COUNTED = 0.95  # of the values are whole numbers, in counts
RECURRENT = 0.01  # cells of the file with two counts of a gene that varies, else a high count is an accident
MIN_ALTERNATIVE = 0.1  # probability
SURPRISE = 15.0  # Poisson deviance of a count: one in 10,000
FLOOR = 0.4  # counts that are expected at least
OF_KIND = 0.25  # of the mean of its kind, for a gene to show the type of a cell
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


IMMUNOGLOBULIN, B_LINEAGE = re.compile(r"IG[HKL][ACDEGMV]|JCHAIN|IGLL5"), "CL:0000945"  # of this lineage alone


@dataclass(frozen=True)
class Clause:
    """A sentence about a cell, and the genes that it rests on.

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


class Proof:
    """Descriptions of the cells of a file, clause by clause.

    Args:
        expression: The counts.
        kinds: str `(n_cells,)`: the type of each cell; "" for none.
        candidates: Genes that speak for the type of each cell, int `(n_cells, n)`, `NONE` for none: the markers that
            it expresses, then the evidence.
        others: Two rows of [`Other`]: of the runner-up, and of a second one where the type is broad.
        within: Type -> Cell Ontology ids of it and of the terms above it.
        excluded: Type -> lineages that no cell of it is of.
        tissues: str `(n_cells,)`: as the file says; "" for unknown.
        called: str `(n_cells,)`: the type that a cell is called where its counts show none; by default its kind.
        elsewhere: Type -> `(n_genes,)`: the highest mean rate of each gene in other types, of reference cells.
        trace: Share of the mean of another type up to which a gene is no news.
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
        while True:  # cells that lose their type clause are of no kind, which changes what the others stand out from
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
            said = {gene for part in self.clauses[cell] for gene in part.genes}
            if genes := [gene for gene in unusual[cell] if gene not in said][:N_GENES]:
                words = f"Unusually high for its kind: {expression.named(genes, cell)}."
                self.clauses[cell].append(Clause("unusual", words, tuple(genes)))
            self.clauses[cell] += self.alternative_clauses(cell)

    def group_by(self, kinds: np.ndarray) -> None:
        """Make these the kinds of the cells."""
        self.kinds = kinds
        self.names = sorted(set(kinds.tolist()) - {""})
        number = {name: i for i, name in enumerate(self.names)}
        self.group = np.array([number.get(kind, NONE) for kind in kinds])
        self.members = [np.flatnonzero(self.group == i) for i in range(len(self.names))]
        self.n = np.bincount(self.group[self.group >= 0], minlength=len(self.names))
        self.sums = self.expression.totals(self.group, len(self.names), self.expression.rates.data)
        self.shares = self.expression.totals(self.group, len(self.names)) / self.n[:, None].clip(min=1)
        self.total = np.asarray(self.expression.rates.sum(axis=0), dtype=np.float64).ravel()
        # A mean cell of the file is added to each kind, so that what few cells share weighs less.
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
        """Whether a cell of one group is none of the other: neither is above the other."""
        above, below = (self.within.get(self.names[group], frozenset({self.names[group]})) for group in (one, other))
        return not above <= below and not below <= above

    def sets_apart(self, group: int, genes: Sequence[int]) -> list[int]:
        """The first of the genes that together are higher in a group than in any other; none if none are.

        They must be so by the mean of the cells and by their pooled counts, in which large cells weigh more.
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
        """Mean rates of a group, `(n_genes,)`."""
        return self.sums[group] / max(self.n[group], 1)

    def type_clause(self, cell: int, candidates: np.ndarray) -> Clause | None:
        """The type, if genes of the cell show it."""
        group = self.group[cell]
        if group == NONE:
            return None
        is_rare = self.n[group] < MIN_KIND  # what so few cells share may be an accident: known markers alone count
        if is_rare and self.against_clauses(cell):
            return None
        genes = list(dict.fromkeys(candidates[: N_MARKERS if is_rare else None].tolist()))
        genes = [gene for gene in genes if gene != NONE and self.expression.tells_types[gene]]
        rates = np.array([self.expression.rate(cell, gene) for gene in genes])
        alike = (self.sums[group][genes] - rates) / (self.n[group] - 1) if self.n[group] > 1 else rates
        others = (self.total - self.sums[group])[genes] / max(len(self.kinds) - self.n[group], 1)
        shows = (alike >= TYPE_FOLD * others) & (alike > 0) & (self.shares[group][genes] >= TYPE_SHARE)
        shows &= rates >= OF_KIND * alike
        genes = self.sets_apart(group, [gene for gene, is_shown in zip(genes, shows, strict=True) if is_shown])
        is_broad = bool(self.others[1].names[cell])
        if not set(genes) & set(candidates[:N_MARKERS].tolist()) or (is_rare and is_broad and len(genes) < 2):
            return None
        noun = article(self.names[group]) + (f" from {self.tissues[cell]}" if self.tissues[cell] else "")
        alone = " alone" if len(genes) == 1 else ""
        words = f"{noun}, shown by {self.expression.named(genes, cell, unit=True)}{alone}."
        return Clause("type", words, tuple(genes))

    def against_clauses(self, cell: int) -> list[Clause]:
        """Lineages that the type of a cell excludes and its genes show."""
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
        """Programmes that each cell expresses far more than the lower quarter of its kind."""
        found: list[list[Clause]] = [[] for _ in self.kinds]
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
                    found[cell].append(Clause("programme", words, tuple(genes)))
        return found

    def traces(self, group: int) -> np.ndarray:
        """Rates of genes up to which the cells of a group may have them from cells of other types, `(n_genes,)`."""
        rivals = self.rivals[group]
        rates = (self.sums[rivals] / self.n[rivals, None]).max(axis=0, initial=0.0)
        others = (self.total - self.sums[group]) / max(len(self.kinds) - self.n[group], 1)
        of_any_type = self.mean(group) <= OF_ANY_TYPE * others
        is_other = self.expression.is_immunoglobulin & (B_LINEAGE not in self.within.get(self.names[group], ()))
        traces = np.maximum(rates, np.where(of_any_type, self.elsewhere.get(self.names[group], 0.0), 0.0))
        return np.where(is_other, np.inf, self.trace * traces)

    def unusual_genes(self) -> list[list[int]]:
        """Genes that each cell expresses far more than its kind, the most surprising first."""
        found: list[list[int]] = [[] for _ in self.kinds]
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
                        found[cell].append(gene)
        return found

    def alternative_clauses(self, cell: int) -> list[Clause]:
        """What else the cell may be, if genes of it speak for it."""
        named = []
        for other in self.others:
            name, against = other.names[cell], other.against[cell]
            if name and (theirs := self.genes_for(name, against, other.genes[cell])):
                named.append((name, theirs))
        words = [
            f"{name}, for which {self.expression.named(theirs, cell)} speak{'s'[: len(theirs) == 1]}"
            for name, theirs in named
        ]
        genes = tuple(gene for _, part in named for gene in part)
        if not self.others[1].names[cell]:
            return [Clause("alternative", f"The alternative is {words[0]}.", genes)] if words else []
        if len(words) < 2:
            return []
        return [Clause("undecided", f"It is undecided between {words[0]}, and {words[1]}.", genes)]

    def genes_for(self, name: str, against: str, candidates: np.ndarray) -> list[int]:
        """Candidates that are higher in the cells of a type than in those of another, none without a known marker."""
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
        """A row for each group of cells, str `(n_cells,)`: `level`, `name`, `cells` and `text`."""
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
            first = kinds[counts.argmax()] if 2 * counts.max() >= n else ""  # a mixture has no genes of its own
            of_first = np.flatnonzero(mine & (self.kinds == first) & bool(first))
            said = [g for cell in of_first for g in self.clauses[cell][0].genes]
            genes, times = np.unique(np.array(said, dtype=int), return_counts=True)
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
        """The programmes of each cell."""
        programmes = ([c.words for c in clauses if c.kind == "programme"] for clauses in self.clauses)
        return [{words.partition(":")[0] for words in found} for found in programmes]

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A row for each gene of each clause of each cell.

        `cell`, `clause` (its number), `kind`, `text`, `gene`, `count`, `percentile` (among the cells of the file) and
        `percentile_of_kind` (among those of its kind).
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
    """Another type that each cell may be.

    Args:
        names: str `(n_cells,)`; "" for none.
        against: str `(n_cells,)`: the type that its genes speak against.
        genes: As `candidates` of [`Proof`].
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
    """What the model says of each cell, for the counts to judge.

    Args:
        cells: All cells.
        explainer: One set of trained labels for each of `kinds`; a kind that means none or nearly all has no evidence.
        gene_ids: int64 `(n_genes,)`, ascending: ids of the columns of the counts.
        kinds: Types of the cells.
        labels: Those of the readout, in its order.
        kind_of_cell: int64 `(n_cells,)`.
        probabilities: `(n_cells, n_labels)`.
        batch_size: Cells at a time.

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
    found: list[list[np.ndarray]] = [[], [], []]
    for start in logging.tqdm(range(0, len(cells), batch_size), desc="Looking for genes", unit="batch", delay=3):
        part = slice(start, start + batch_size)
        batch, own, one, other = cells[part], kind_of_cell[part], first[part], second[part]
        against = np.where(is_broad[part], one, NONE)
        for number, (name, rivals) in enumerate([(own, None), (one, other), (other, against)]):
            if rivals is not None:
                name, rivals = np.maximum(name, 0), np.where(name == NONE, NONE, rivals)
            evidence, _ = explainer(batch, name, rivals)
            markers = np.where(evidence.markers, explainer.markers[name], NONE)
            found[number].append(np.hstack([markers, evidence.genes]))
    names = np.asarray([*kinds, *labels, ""], dtype=object)
    columns = np.append(np.searchsorted(gene_ids, explainer.panel.gene_ids), NONE)
    candidates, *genes = (columns[np.concatenate(parts)] for parts in found)
    second_name, nothing = np.where(is_broad, second, NONE), np.full(len(first), NONE)
    against = np.where(first == NONE, NONE, second)
    return candidates, [
        Other(names[first], names[against], genes[0]),
        Other(names[second_name], names[np.where(is_broad, first, nothing)], genes[1]),
    ]


def terms_above(members: np.ndarray, known: Mapping[str, int], terms: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Ids of the terms whose labels include all of a type's, bool `(n_labels,)`."""
    mine = {name for name, column in known.items() if members[column]}
    return frozenset(term["id"] for term in terms if mine and mine <= set(term["labels"]))


def excluded_lineages(
    members: np.ndarray, known: Mapping[str, int], terms: Sequence[Mapping[str, Any]]
) -> tuple[Lineage, ...]:
    """Lineages that the ontology's terms keep apart from a type with labels `members`, bool `(n_labels,)`.

    None for a type of which no term knows all labels.
    """
    mine = {name for name, column in known.items() if members[column]}
    if not terms_above(members, known, terms):
        return ()
    of_term = {term["id"]: set(term["labels"]) for term in terms}
    return tuple(line for line in LINEAGES if line.term in of_term and not of_term[line.term] & mine)


def tissues_of(obs: Any) -> np.ndarray:
    """The tissue of each cell in words, where `obs` has one, str `(n_cells,)`."""
    if "tissue" not in obs:
        return np.full(len(obs), "", dtype=object)
    words = [str(word) for word in obs["tissue"].astype(object).fillna("")]
    return np.array(["" if word.casefold() in ("", "unknown", "na", "nan") else word for word in words], dtype=object)
