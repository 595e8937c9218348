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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from .cells_scmmgpt import COUNTS_PER_10K
from .evidence_scmmgpt import N_MARKERS, NONE
from .expression_scmmgpt import Expression, join, share
from .programmes_scmmgpt import LINEAGES, PROGRAMMES, Lineage, Programme
from .proposals_scmmgpt import Other, Proposals


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
SURPRISE = 15.0  # Poisson deviance of a count with a probability of about 1 in 10,000
FLOOR = 0.4  # least expected count
OF_KIND = 0.25  # a gene shows the type of a cell from this share of the kind's mean
CELLS_AT_ONCE = 2048  # cells in a batch of the comparison of genes
B_LINEAGE = "CL:0000945"  # only B cells and plasma cells express immunoglobulins; in other cells they are ambient


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


def article(noun: str, a: str = "A") -> str:
    """A noun with "A" or "An", or `a`, by its first letter."""
    return f"{a}{'n' * (noun[0] in 'aeiouAEIO')} {noun}"


class Proof:
    """Descriptions of the cells of a file, clause by clause.

    Statistics over all cells are computed once. The clauses of a cell are made on demand.

    Args:
        expression: The counts.
        kinds: str `(n_cells,)`: the proposed type of each cell; "" for none.
        proposals: The proposals of the model.
        within: Type -> Cell Ontology ids of the type and of all terms above the type.
        excluded: Type -> lineages that the type is no part of.
        tissues: str `(n_cells,)`: tissues of the file; "" for unknown.
        called: str `(n_cells,)`: the type that is named for a cell without a type clause; by default `kinds`.
        elsewhere: Type -> `(n_genes,)`: the highest mean rate of each gene in other types, in reference cells.
        trace: Share of the mean of another type up to which a gene may be ambient.

    Attributes:
        asked: The proposed types.
        kinds: str `(n_cells,)`: the type that the counts of each cell show; "" for none.
        shown: int64 `(n_cells, N_TYPE_GENES)`: columns of genes that show the type, `NONE` for none.
        programmes: bool `(n_programmes, n_cells)`: whether a cell expresses a programme unusually for its type.
    """

    def __init__(
        self,
        expression: Expression,
        kinds: np.ndarray,
        proposals: Proposals,
        within: Mapping[str, frozenset[str]],
        excluded: Mapping[str, Sequence[Lineage]],
        tissues: np.ndarray,
        called: np.ndarray | None = None,
        elsewhere: Mapping[str, np.ndarray] | None = None,
        trace: float = TRACE,
    ) -> None:
        self.elsewhere, self.excluded, self.trace = elsewhere or {}, excluded, trace
        self.expression, self.proposals, self.within, self.tissues = expression, proposals, within, tissues
        self.asked, self.called = kinds, kinds if called is None else called
        while True:  # cells without a type clause leave their kind, which changes the means of the kinds
            self.group_by(kinds)
            self.shown = self.genes_of_types()
            kinds, before = np.where(self.shown[:, 0] == NONE, "", kinds), kinds
            if (kinds == before).all():
                break
        self.programmes = np.zeros((len(PROGRAMMES), len(kinds)), dtype=bool)
        self.below = np.zeros(self.programmes.shape, dtype=np.int8)  # percentage of the other cells of the kind
        for number, programme in enumerate(PROGRAMMES):
            self.find_programme(number, programme)
        self.said: dict[int, list[Clause]] = {}
        self.traced: dict[int, np.ndarray] = {}

    def clauses(self, rows: Iterable[int]) -> list[list[Clause]]:
        """The clauses of the cells `rows`, in order."""
        rows = list(rows)
        new = np.array([cell for cell in rows if cell not in self.said], dtype=np.int64)
        others = self.proposals.others(new)
        for place, cell in enumerate(logging.tqdm(new.tolist(), desc="Describing", unit="cell", delay=3)):
            self.said[cell] = self.clauses_of(cell, others, place)
        return [self.said[cell] for cell in rows]

    def clauses_of(self, cell: int, others: Sequence[Other], place: int) -> list[Clause]:
        """The clauses of one cell; its alternative types are at position `place` of `others`."""
        if self.group[cell] == NONE:
            return [Clause("type", NO_TYPE.format(self.called[cell] or "none"))]
        clauses = [self.type_clause(cell), *self.against_clauses(cell), *self.programme_clauses(cell)]
        mentioned = {gene for part in clauses for gene in part.genes}
        if genes := [gene for gene in self.unusual_genes(cell) if gene not in mentioned][:N_GENES]:
            words = f"Unusually high for its kind: {self.expression.named(genes, cell)}."
            clauses.append(Clause("unusual", words, tuple(genes)))
        return clauses + self.alternative_clauses(cell, others, place)

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

    def genes_of_types(self) -> np.ndarray:
        """Genes that show the type of each cell, int64 `(n_cells, N_TYPE_GENES)`, `NONE` for none."""
        shown = np.full((len(self.kinds), N_TYPE_GENES), NONE)
        for group, members in enumerate(self.members):
            for start in range(0, len(members), CELLS_AT_ONCE):
                some = members[start : start + CELLS_AT_ONCE]
                shown[some] = self.genes_of_type(group, some)
        return shown

    def genes_of_type(self, group: int, cells: np.ndarray) -> np.ndarray:
        """The same for cells of one group, int64 `(n_cells, N_TYPE_GENES)`."""
        is_rare = self.n[group] < MIN_KIND  # genes that few cells share may be an accident: only markers count
        genes = self.proposals.candidates[cells][:, : N_MARKERS if is_rare else None]
        again = (genes[:, :, None] == genes[:, None, :]).argmax(axis=2) < np.arange(genes.shape[1])
        usable = (genes != NONE) & ~again & self.expression.tells_types[genes]
        rates = self.expression.rates_of(cells, genes)
        alike = (self.sums[group][genes] - rates) / (self.n[group] - 1) if self.n[group] > 1 else rates
        others = (self.total - self.sums[group])[genes] / max(len(self.kinds) - self.n[group], 1)
        shows = usable & (alike >= TYPE_FOLD * others) & (alike > 0) & (self.shares[group][genes] >= TYPE_SHARE)
        shown = self.sets_apart(group, genes, shows & (rates >= OF_KIND * alike))
        markers = self.proposals.candidates[cells][:, :N_MARKERS]
        fails = ~((shown[:, :, None] == markers[:, None, :]) & (shown != NONE)[:, :, None]).any(axis=(1, 2))
        if is_rare:
            fails |= self.proposals.is_broad[cells] & ((shown != NONE).sum(axis=1) < 2)
            fails |= np.array([bool(self.against_clauses(cell)) for cell in cells.tolist()])
        return np.where(fails[:, None], NONE, shown)

    def sets_apart(self, group: int, genes: np.ndarray, shows: np.ndarray) -> np.ndarray:
        """The first `N_TYPE_GENES` genes, or else the best ones, if higher together in a group than in each rival.

        Mean rates and pooled counts, in which large cells weigh more, must both be higher.

        Args:
            group: Group of the cells.
            genes: int64 `(n_cells, n)`: columns.
            shows: bool `(n_cells, n)`: the genes to choose from.

        Returns:
            int64 `(n_cells, N_TYPE_GENES)`, `NONE` for none.
        """
        first = np.argsort(~shows, axis=1, kind="stable")[:, :N_TYPE_GENES]
        rivals = self.rivals[group]
        if not len(rivals):
            return _taken(genes, first, shows)
        columns, at = np.unique(genes, return_inverse=True)
        at = at.reshape(genes.shape)
        ratios = np.concatenate([logs[group, columns] - logs[rivals][:, columns] for logs in self.logs])
        least = np.where(shows, ratios.min(axis=0)[at], -np.inf)
        best = np.argsort(-least, axis=1, kind="stable")[:, :N_TYPE_GENES]
        found = np.full((len(genes), N_TYPE_GENES), NONE)
        for chosen in (best, first):  # the first genes have priority
            kept = np.take_along_axis(shows, chosen, axis=1)
            sums = np.where(kept, ratios[:, np.take_along_axis(at, chosen, axis=1)], 0.0).sum(axis=2).min(axis=0)
            apart = kept.any(axis=1) & (sums >= np.log(APART))
            found[apart] = _taken(genes, chosen, shows)[apart]
        return found

    def mean(self, group: int) -> np.ndarray:
        """Mean rates of a group, CP10k, `(n_genes,)`."""
        return self.sums[group] / max(self.n[group], 1)

    def type_clause(self, cell: int) -> Clause:
        """The type, which genes of the cell show."""
        genes = [gene for gene in self.shown[cell].tolist() if gene != NONE]
        noun = article(str(self.kinds[cell])) + (f" from {self.tissues[cell]}" if self.tissues[cell] else "")
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

    def find_programme(self, number: int, programme: Programme) -> None:
        """Set which cells express a programme far more than the lower quarter of their kind."""
        expression = self.expression
        part = expression.counts[:, self.columns_of(programme)].tocsr()
        totals = np.asarray(part.sum(axis=1)).ravel()
        rates, distinct = totals / expression.sizes * COUNTS_PER_10K, np.diff(part.indptr)
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
            is_high &= rare & (below >= PROGRAMME_PERCENTILE) & (distinct[members] >= MIN_PROGRAMME_GENES)
            self.programmes[number, members], self.below[number, members] = is_high, below

    def columns_of(self, programme: Programme) -> list[int]:
        """The genes of a programme that the file has."""
        column_of = self.expression.column_of
        return [column_of[gene] for gene in programme.genes if gene in column_of]

    def programme_clauses(self, cell: int) -> list[Clause]:
        """Programmes that a cell expresses far more than the lower quarter of its kind."""
        found = []
        for number in np.flatnonzero(self.programmes[:, cell]).tolist():
            columns = self.columns_of(PROGRAMMES[number])
            counts = np.array(self.expression.count_of(columns, cell))
            genes = [columns[i] for i in np.argsort(-counts, kind="stable")[:N_TYPE_GENES] if counts[i]]
            below = self.below[number, cell]
            words = (
                f"{PROGRAMMES[number].phrase}: {self.expression.named(genes, cell)}, more of these genes than "
                f"{'all' if below == 100 else f'{below} %'} of the {self.n[self.group[cell]] - 1} other cells of its "
                "kind."
            )
            found.append(Clause("programme", words, tuple(genes)))
        return found

    def traces(self, group: int) -> np.ndarray:
        """Rates up to which a gene in a cell of a group may come from cells of other types, CP10k, `(n_genes,)`."""
        rivals = self.rivals[group]
        rates = (self.sums[rivals] / self.n[rivals, None]).max(axis=0, initial=0.0)
        others = (self.total - self.sums[group]) / max(len(self.kinds) - self.n[group], 1)
        of_any_type = self.mean(group) <= OF_ANY_TYPE * others
        is_other = self.expression.is_immunoglobulin & (B_LINEAGE not in self.within.get(self.names[group], ()))
        traces = np.maximum(rates, np.where(of_any_type, self.elsewhere.get(self.names[group], 0.0), 0.0))
        return np.where(is_other, np.inf, self.trace * traces)

    def unusual_genes(self, cell: int) -> list[int]:
        """Genes that a cell expresses far more than its kind, the most surprising first."""
        group, expression = int(self.group[cell]), self.expression
        members = self.members[group]
        if len(members) <= MIN_KIND:
            return []
        if group not in self.traced:
            self.traced[group] = self.traces(group)
        genes, counts = expression.row(cell)
        rates = expression.rates.data[expression.rates.indptr[cell] : expression.rates.indptr[cell + 1]]
        others = (self.sums[group][genes] - rates) / (self.n[group] - 1)
        counts = counts * expression.scales[cell]
        expected = np.maximum(others, 0) * expression.sizes[cell] * expression.scales[cell] / COUNTS_PER_10K
        high = (counts >= UNUSUAL_COUNT) & (counts >= UNUSUAL_FOLD * expected) & expression.recurs[genes]
        high &= rates > self.traced[group][genes]
        deviance = np.where(high, surprise(counts, expected), 0.0)
        return [
            int(genes[entry])
            for entry in np.argsort(-deviance, kind="stable")[: 3 * N_GENES]
            if deviance[entry] >= SURPRISE
            and expression.percentile(cell, int(genes[entry]), group, members) >= UNUSUAL_PERCENTILE
        ]

    def alternative_clauses(self, cell: int, others: Sequence[Other], place: int) -> list[Clause]:
        """What else the cell may be, if genes of it speak for it."""
        named = []
        for other in others:
            name, against = other.names[place], other.against[place]
            if name and (theirs := self.genes_for(name, against, other.genes[place])):
                named.append((name, theirs))
        words = [
            f"{name}, for which {self.expression.named(genes_of, cell)} speak{'s'[: len(genes_of) == 1]}"
            for name, genes_of in named
        ]
        genes = tuple(gene for _, part in named for gene in part)
        if not self.proposals.is_broad[cell]:
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

    def texts(self, rows: Iterable[int] | None = None) -> np.ndarray:
        """Descriptions of cells, by default of all, str `(n_rows,)`."""
        found = self.clauses(range(len(self.kinds)) if rows is None else rows)
        return np.array([" ".join(clause.words for clause in clauses) for clauses in found], dtype=object)

    def group_rows(self, level: str, groups: np.ndarray) -> Iterator[dict[str, Any]]:
        """A row of `level`, `name`, `cells` and `text` for each group; `groups` is str `(n_cells,)`."""
        names, numbers = np.unique(groups.astype(str), return_inverse=True)
        n_cells = np.bincount(numbers)
        expressing = self.expression.totals(numbers, len(names))
        shares = expressing / n_cells[:, None]
        shown = {p.phrase: has for p, has in zip(PROGRAMMES, self.programmes, strict=True)}
        of_cells = self.clauses(range(len(self.kinds)))
        for i, name in enumerate(names):
            mine = numbers == i
            n, others = int(n_cells[i]), len(mine) - int(n_cells[i])
            elsewhere = (expressing.sum(axis=0) - expressing[i]) / max(others, 1)
            kinds, counts = np.unique(self.kinds[mine].astype(str), return_counts=True)
            parts = [
                f"{share(counts[k] / n)} {kinds[k]}"
                for k in np.argsort(-counts, kind="stable")[:2]
                if kinds[k] and counts[k] >= GROUP_SHARE * n
            ]
            first = kinds[counts.argmax()] if 2 * counts.max() >= n else ""  # a mixture has no typical genes
            of_first = np.flatnonzero(mine & (self.kinds == first) & bool(first))
            said = self.shown[of_first][self.shown[of_first] != NONE]
            genes, times = np.unique(said, return_counts=True)
            best = genes[np.argsort(-times, kind="stable")]
            best = best[shares[i, best] >= elsewhere[best] + GROUP_SHARE]
            of_genes = [
                f"{self.expression.symbols[g]} ({share(shares[i, g])} of its cells"
                + (f", {share(elsewhere[g])} of the others)" if others else ")")
                for g in best[:N_TYPE_GENES]
            ]
            text = f"{n:,} {'cell' if n == 1 else 'cells'}, "
            text += join(parts) if parts else "without a type that their counts show"
            text += f", shown by {join(of_genes)}." if parts and of_genes else "."
            for phrase, has in shown.items():
                here, there = has[mine].mean(), has[~mine].mean() if others else 0.0
                if here >= GROUP_SHARE and here >= GROUP_FOLD * there:
                    text += f" {phrase} in {share(here)} of its cells"
                    text += f", and in {share(there)} of the others." if others else "."
            for lineage in LINEAGES:
                against = sum(
                    any(c.kind == "against" and c.words.endswith(f" {lineage.name}.") for c in of_cells[cell])
                    for cell in np.flatnonzero(mine)
                )
                if against >= GROUP_SHARE * n:
                    text += f" In {share(against / n)} of its cells, genes of {lineage.name} speak against the type."
            yield {"level": level, "name": str(name), "cells": n, "text": text}

    def rows(self, names: Sequence[str], rows: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """A row for each gene of each clause of cells, by default of all; `names` are those of all cells.

        `cell`, `clause` (a number), `kind`, `text`, `gene`, `count`, `percentile` (among the cells of the file) and
        `percentile_of_kind` (among the cells of the kind).
        """
        rows = list(range(len(self.kinds)) if rows is None else rows)
        everything = np.arange(len(self.kinds))
        for cell, clauses in zip(rows, self.clauses(rows), strict=True):
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


def _taken(genes: np.ndarray, chosen: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The chosen entries of each row of genes, `NONE` for those that are not kept, int64 `(n_cells, N_TYPE_GENES)`."""
    found = np.full((len(genes), N_TYPE_GENES), NONE)
    is_kept = np.take_along_axis(kept, chosen, axis=1)
    found[:, : chosen.shape[1]] = np.where(is_kept, np.take_along_axis(genes, chosen, axis=1), NONE)
    return found
