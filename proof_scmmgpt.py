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

from .cells_scmmgpt import COUNTS_PER_10K
from .evidence_scmmgpt import N_MARKERS, NONE
from .expression_scmmgpt import Expression, join
from .programmes_scmmgpt import LINEAGES, PROGRAMMES, Lineage, Programme
from .proposals_scmmgpt import Other, Proposals


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
SURPRISE = 15.0  # Poisson deviance of a count: one in 10,000
FLOOR = 0.4  # counts that are expected at least
OF_KIND = 0.25  # of the mean of its kind, for a gene to show the type of a cell
CELLS_AT_ONCE = 2048  # whose genes are compared together
B_LINEAGE = "CL:0000945"  # of immunoglobulins alone


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


def article(noun: str, a: str = "A") -> str:
    """A noun with "A" or "An", or `a`, by its first letter."""
    return f"{a}{'n' * (noun[0] in 'aeiouAEIO')} {noun}"


class Proof:
    """Descriptions of the cells of a file, clause by clause.

    What the other cells of the file decide is computed once, for all cells; the clauses of a cell are made when they
    are asked for.

    Args:
        expression: The counts.
        kinds: str `(n_cells,)`: the type of each cell; "" for none.
        proposals: What the model says of the cells.
        within: Type -> Cell Ontology ids of it and of the terms above it.
        excluded: Type -> lineages that no cell of it is of.
        tissues: str `(n_cells,)`: as the file says; "" for unknown.
        called: str `(n_cells,)`: the type that a cell is called where its counts show none; by default its kind.
        elsewhere: Type -> `(n_genes,)`: the highest mean rate of each gene in other types, of reference cells.
        trace: Share of the mean of another type up to which a gene is no news.

    Attributes:
        asked: The types of the cells that were given.
        kinds: The type of each cell that its counts show; "" for none.
        shown: int64 `(n_cells, N_TYPE_GENES)`: genes that show it, `NONE` for none.
        programmes: bool `(n_programmes, n_cells)`: which cells have more of `PROGRAMMES` than is usual for their type.
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
        while True:  # cells that lose their type clause are of no kind, which changes what the others stand out from
            self.group_by(kinds)
            self.shown = self.genes_of_types()
            kinds, before = np.where(self.shown[:, 0] == NONE, "", kinds), kinds
            if (kinds == before).all():
                break
        self.programmes = np.zeros((len(PROGRAMMES), len(kinds)), dtype=bool)
        self.below = np.zeros(self.programmes.shape, dtype=np.int8)  # per cent of the other cells of its kind
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
        """The clauses of one cell, whose other types are at a place of `others`."""
        if self.group[cell] == NONE:
            return [Clause("type", NO_TYPE.format(self.called[cell] or "none"))]
        clauses = [self.type_clause(cell), *self.against_clauses(cell), *self.programme_clauses(cell)]
        said = {gene for part in clauses for gene in part.genes}
        if genes := [gene for gene in self.unusual_genes(cell) if gene not in said][:N_GENES]:
            words = f"Unusually high for its kind: {self.expression.named(genes, cell)}."
            clauses.append(Clause("unusual", words, tuple(genes)))
        return clauses + self.alternative_clauses(cell, others, place)

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

    def genes_of_types(self) -> np.ndarray:
        """Genes that show the type of each cell, int64 `(n_cells, N_TYPE_GENES)`, `NONE` for none."""
        shown = np.full((len(self.kinds), N_TYPE_GENES), NONE)
        for group, members in enumerate(self.members):
            for start in range(0, len(members), CELLS_AT_ONCE):
                some = members[start : start + CELLS_AT_ONCE]
                shown[some] = self.genes_of_type(group, some)
        return shown

    def genes_of_type(self, group: int, cells: np.ndarray) -> np.ndarray:
        """The same for cells of one group."""
        is_rare = self.n[group] < MIN_KIND  # what so few cells share may be an accident: known markers alone count
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
        """The first of the genes of cells that together are higher in their group than in any other; none if none are.

        They must be so by the mean of the cells and by their pooled counts, in which large cells weigh more.

        Args:
            group: Of the cells.
            genes: int64 `(n_cells, n)`.
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
        for chosen in (best, first):  # the first, where they set the group apart
            kept = np.take_along_axis(shows, chosen, axis=1)
            sums = np.where(kept, ratios[:, np.take_along_axis(at, chosen, axis=1)], 0.0).sum(axis=2).min(axis=0)
            apart = kept.any(axis=1) & (sums >= np.log(APART))
            found[apart] = _taken(genes, chosen, shows)[apart]
        return found

    def mean(self, group: int) -> np.ndarray:
        """Mean rates of a group, `(n_genes,)`."""
        return self.sums[group] / max(self.n[group], 1)

    def type_clause(self, cell: int) -> Clause:
        """The type, which genes of the cell show."""
        genes = [gene for gene in self.shown[cell].tolist() if gene != NONE]
        noun = article(str(self.kinds[cell])) + (f" from {self.tissues[cell]}" if self.tissues[cell] else "")
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
        """Rates of genes up to which the cells of a group may have them from cells of other types, `(n_genes,)`."""
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
            f"{name}, for which {self.expression.named(theirs, cell)} speak{'s'[: len(theirs) == 1]}"
            for name, theirs in named
        ]
        genes = tuple(gene for _, part in named for gene in part)
        if not self.proposals.is_broad[cell]:
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

    def texts(self, rows: Iterable[int] | None = None) -> np.ndarray:
        """Descriptions of cells, by default of all, str `(n_rows,)`."""
        found = self.clauses(range(len(self.kinds)) if rows is None else rows)
        return np.array([" ".join(clause.words for clause in clauses) for clauses in found], dtype=object)

    def group_rows(self, level: str, groups: np.ndarray) -> Iterator[dict[str, Any]]:
        """A row for each group of cells, str `(n_cells,)`: `level`, `name`, `cells` and `text`."""
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
                f"{counts[k] / n:.0%} {kinds[k]}"
                for k in np.argsort(-counts, kind="stable")[:2]
                if kinds[k] and counts[k] >= GROUP_SHARE * n
            ]
            first = kinds[counts.argmax()] if 2 * counts.max() >= n else ""  # a mixture has no genes of its own
            of_first = np.flatnonzero(mine & (self.kinds == first) & bool(first))
            said = self.shown[of_first][self.shown[of_first] != NONE]
            genes, times = np.unique(said, return_counts=True)
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
                    any(c.kind == "against" and c.words.endswith(f" {lineage.name}.") for c in of_cells[cell])
                    for cell in np.flatnonzero(mine)
                )
                if against >= GROUP_SHARE * n:
                    text += f" In {against / n:.0%} of its cells, genes of {lineage.name} speak against the type."
            yield {"level": level, "name": str(name), "cells": n, "text": re.sub(r"(?<=\d)%", " %", text)}

    def rows(self, names: Sequence[str], rows: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """A row for each gene of each clause of cells, by default of all; `names` are those of all cells.

        `cell`, `clause` (its number), `kind`, `text`, `gene`, `count`, `percentile` (among the cells of the file) and
        `percentile_of_kind` (among those of its kind).
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


def _taken(genes: np.ndarray, chosen: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The chosen entries of each row of genes, `NONE` for those that are not kept, int64 `(n_cells, N_TYPE_GENES)`."""
    found = np.full((len(genes), N_TYPE_GENES), NONE)
    is_kept = np.take_along_axis(kept, chosen, axis=1)
    found[:, : chosen.shape[1]] = np.where(is_kept, np.take_along_axis(genes, chosen, axis=1), NONE)
    return found
