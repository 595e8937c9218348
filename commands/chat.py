"""Questions about a selection of cells, answered by numbers that are counted for them.

    > Do they express CD4?
    CD4: counts in 13 % of the 90 selected cells, in 2 % of the 610 other cells.

The words of a question choose a topic, and the genes, types and columns of `obs` that it names choose what is counted
(`questions`). Nothing is generated. "And CD8?" asks the last question again, "of the B cells" about other cells.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.commands.conditions import rows_where
from scmmgpt.commands.questions import EXAMPLES, TOPICS, Group, Question, QuestionReader
from scmmgpt.commands.type_names import broader_types, names_of_types
from scmmgpt.evidence_scmmgpt import NONE
from scmmgpt.expression_scmmgpt import join, share
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.programmes_scmmgpt import PROGRAMMES
from scmmgpt.proof_scmmgpt import MIN_PROGRAMME_GENES, MIN_SCORE, TYPE_FOLD, TYPE_SHARE, Proof
from scmmgpt.records_scmmgpt import recorded, words_of


STATES = (  # words that ask for each of PROGRAMMES
    r"cycl|divid|prolif|mito|replicating|phase|\bG[012]",
    r"interferon|\bifn|vir(us|al)",
    "inflam|cytokine",
    "stress|dissoc|heat",
    "cytotox|(?<!natural )kill|effector",
    r"activat|\bresting|quiescen",
    "exhaust|inhib|dysfunc",
)
COLUMNS = ("tissue", "donor_id", "donor", "sample", "batch", "condition", "disease", "assay", "leiden", "louvain")
RAREST = re.compile(r"\b(rare\w*|least|fewest|smallest|scarcest)\b", re.IGNORECASE)
LOWEST = re.compile(r"\b(lowest|least|weakest|fewest|smallest)\b", re.IGNORECASE)
LIKENESS = "`scmmgpt search`, or Search on the page, orders cells by likeness to cells or to words."
POINTERS = {  # what others answer
    r"\b(doublet|multiplet)": "`scanpy.pp.scrublet` looks for doublets.",
    r"\b(plot|draw|umap|heatmap)": "`scmmgpt report` and the page draw the cells.",
    r"\b(like|closest|nearest|similar|resembl)": LIKENESS,
}
N_NAMED, N_PARTS, MAX_KINDS, SILENT = 5, 6, 60, 0.1  # genes and values of an answer; kinds of a column; as in reports


@dataclass
class Answer:
    """An answer, and the topic that was understood ("" for none)."""

    text: str
    topic: str = ""


def rows_of(obs: pd.DataFrame, select: Any) -> np.ndarray:
    """Which cells are selected, bool `(n_obs,)`: by a condition as for [`rows_where`], names or rows; None: all.

    Raises:
        ValueError: If it selects no cell, or is no condition on columns of `obs`.
    """
    mask = np.zeros(len(obs), dtype=bool)
    if isinstance(select, str):
        mask = rows_where(obs, select)
    else:
        rows: Any = slice(None) if select is None else np.asarray(select)
        if select is not None and rows.dtype.kind in "OU":
            if len(absent := sorted(set(rows.tolist()) - set(obs.index))):
                raise ValueError(f"There are no cells named {absent[:3]}.")
            rows = obs.index.isin(rows)
        elif select is not None and not rows.size:
            raise ValueError("No cell is selected.")
        mask[rows] = True
    if not mask.any():
        raise ValueError("The data hold no cells." if select is None else f"No cell is selected by {select!r}.")
    return mask


class Chat:
    """Questions about cells of one file, turn by turn.

    Labels are added to `adata` where they are missing.

    Args:
        pipeline: With a label readout.
        adata: All cells: those that are not selected are what the selection is compared with.
        select: See [`rows_of`].
        proof: Of the labels of all cells, by `pipeline.prove`; by default it is computed.
        read_kwargs: How to read the cells, as for `ScMMGPTPipeline.annotate`.
    """

    def __init__(
        self, pipeline: Any, adata: Any, select: Any = None, proof: Proof | None = None, **read_kwargs: Any
    ) -> None:
        if not pipeline.can_explain:
            raise ValueError("This checkpoint has no label readout, whose markers and evidence the answers are about.")
        self.selected = rows_of(adata.obs, select)
        if not {"scmmgpt_cell_type", "scmmgpt_score"} <= set(adata.obs):
            pipeline.annotate(adata, **read_kwargs)
        choice = pipeline.processor.choose_input(adata, **read_kwargs)
        proof = pipeline.prove(adata, choice) if proof is None else proof
        self.cells, self.expression, self.obs = proof.proposals.cells, proof.expression, adata.obs
        self.expressed = self.expression.counts > 0  # a CSR matrix whose entries are all above 0
        self.labels = pipeline.called_types(adata, choice)["cell_type"].astype(str)
        # Scores are missing with their labels where files were joined.
        self.scores = self.obs["scmmgpt_score"].fillna(0.0).to_numpy()
        settings = pipeline.model.config.annotation or {"labels": {}}
        terms = [term for term in settings.get("terms", []) if len(term["labels"]) < len(settings["labels"])]
        sets = np.unique([*self.labels, *settings["labels"], *(term["name"] for term in terms)])
        self.candidates, self.probabilities = (
            recorded(adata, "scmmgpt", "annotate").get("labels"),
            adata.obsm.get("scmmgpt_probabilities"),
        )
        evidence = pipeline.evidence_of(
            choice, self.labels, sets, called=np.unique(self.labels), candidates=self.candidates
        )
        self.explainer, self.set_names, self.panel_genes = evidence.explainer, evidence.names, evidence.genes
        self.programmes = {p.phrase: has for p, has in zip(PROGRAMMES, proof.programmes, strict=True)}
        own = [name for name in self.obs if not name.startswith("scmmgpt_") and not name.endswith("ontology_term_id")]
        self.columns = {c: words_of(self.obs, c) for c in own if self.obs[c].nunique() <= MAX_KINDS}
        self.never_called = [p["name"] for p in settings.get("profiles", []) if p["name"] not in sets]
        gene_index, values = pipeline.processor.gene_index, {name: set(words) for name, words in self.columns.items()}
        types, self.stands_for = names_of_types(sets.tolist(), terms, settings, gene_index)
        self.above = broader_types(terms, settings)
        self.read = QuestionReader(types, values, gene_index)
        self.asked = Question("")

    def ask(self, text: str) -> Answer:
        """Answer a question."""
        asked, stand_ins = self.known(self.read(text, self.asked))
        if asked.unread or not asked.topic:
            self.asked = self.asked if not asked.unread else Question("")  # "and NK cells?" follows no such question
            words = ", ".join(f'"{word}"' for word in dict.fromkeys(asked.unread))
            known = f" ({words}: no gene, label, column or subject of these answers)" if words else ""
            others = [f" {said}" for word, said in POINTERS.items() if re.search(word, text, re.IGNORECASE)]
            return Answer(f"The counts do not answer that{known}.{''.join(others)} You can ask: {EXAMPLES}")
        start = f'Read as "{asked.text}": ' if asked.is_misspelt else ""
        start += "".join(
            f"The checkpoint does not tell {kind} from {label}: the answer is about {label}. "
            for kind, label in stand_ins.items()
        )
        if never := [name for kind, name in asked.groups if kind == "type" and name in self.never_called]:
            return Answer(
                f"{start}No cell of the file is called {never[0]}. The checkpoint knows this type by a reference "
                "profile alone, and names a cell by the profile where this type leads over all others.",
                asked.topic,
            )
        self.asked = asked
        if not self.subject[0].any():
            return Answer(f"{start}The file has {self.subject[1].replace('the 0 ', 'no ', 1)}.", asked.topic)
        return Answer(start + getattr(self, f"_{asked.topic}")(), asked.topic)

    def known(self, asked: Question) -> tuple[Question, dict[str, str]]:
        """A question with labels in place of kinds that the checkpoint does not tell from them, and these kinds."""
        named = [kind for column, kind in asked.groups if column == "type"]
        stand_ins = {kind: self.stands_for[kind] for kind in dict.fromkeys(named) if kind in self.stands_for}

        def label_of(group: Group) -> Group:
            return ("type", stand_ins[group[1]]) if group[0] == "type" and group[1] in stand_ins else group

        groups, denied = (list(dict.fromkeys(map(label_of, part))) for part in (asked.groups, asked.denied))
        roles = {role: label_of(group) for role, group in asked.roles.items()}
        return replace(asked, groups=groups, denied=denied, roles=roles), stand_ins

    # -- cells --------------------------------------------------------------------------------------------------------

    def mask(self, group: Group) -> np.ndarray:
        """The cells of a group, bool `(n_cells,)`."""
        column, value = group
        if column != "type":
            return self.columns[column] == value
        return np.isin(self.labels, [label for label in set(self.labels) if self.is_kind(label, value)])

    def is_kind(self, label: str, of: str) -> bool:
        """Whether a label is a type or a kind of it."""
        mine, theirs = (self.explainer.members[self.number(name)] for name in (label, of))
        is_below = of in self.above.get(label, ()) or bool(mine.any() and not (mine & ~theirs).any())
        return label == of or is_below

    def number(self, name: str) -> int:
        """The number of the set of a type."""
        return int(np.flatnonzero(self.set_names == name)[0])

    @property
    def subject(self) -> tuple[np.ndarray, str]:
        """The cells that are asked about, and what to call them."""
        group = self.asked.roles.get("subject")
        mask = self.selected if group is None else self.mask(group)
        return mask, _named(mask, "" if mask.all() else "selected " if group is None else group)

    @property
    def others(self) -> tuple[np.ndarray, str]:
        """The cells that those are compared with, and what to call them."""
        group = self.asked.roles.get("reference")
        mask = ~self.subject[0] if group is None else self.mask(group)
        return mask, _named(mask, "other " if group is None else group)

    def shares(self, genes: Sequence[str], mask: np.ndarray, other: np.ndarray) -> str:
        """Genes with the shares of cells that have counts of them, here and elsewhere, in words."""
        columns = [self.expression.column_of[gene] for gene in genes]
        here = [share(value) for value in self.expressing(mask)[columns]]
        there = [f" against {share(value)}" if other.any() else "" for value in self.expressing(other)[columns]]
        return join([f"{gene} ({a}{b})" for gene, a, b in zip(genes, here, there, strict=True)])

    def expressing(self, mask: np.ndarray) -> np.ndarray:
        """The share of cells that have counts of each gene, `(n_genes,)`."""
        return np.bincount(self.expressed[mask].indices, minlength=len(self.expression.symbols)) / max(mask.sum(), 1)

    def commonest(self) -> tuple[str, np.ndarray]:
        """The commonest label of the cells that are asked about, and those of them that have it."""
        mask, _ = self.subject
        label = str(pd.Series(self.labels[mask]).value_counts().index[0])
        return label, mask & (self.labels == label)

    def evidence(self, rival: str = "") -> tuple[str, str]:
        """A type, by default the runner-up of the commonest label, and the genes that speak against it."""
        label, mask = self.commonest()
        own, panel = self.number(label), self.explainer.panel
        _, positions, values = panel.profiles(self.cells[np.flatnonzero(mask)])
        mean = np.bincount(positions, values, minlength=len(panel.gene_ids)) / mask.sum()
        scores = (mean @ panel.weights + panel.bias)[None]
        other = self.number(rival) if rival else self.explainer.find_rivals(scores, np.array([own]))[0]
        if other == NONE or not self.explainer.members[own].any():
            return "", ""
        (_, who), rival = self.subject, str(self.set_names[other])
        terms, speaks = self.explainer.terms(slice(None), mean, own, other)
        best = [gene for gene in np.argsort(-terms * speaks, kind="stable")[:N_NAMED] if (terms * speaks)[gene] > 0]
        there = self.mask(("type", rival)) & ~mask
        genes = self.shares(self.panel_genes[best].tolist(), mask, there) if best else "none"
        mine = _named(mask, ("type", label)) if self.selected.all() else f"{mask.sum():,} of {who}"
        of = f"{mine} and of {_named(there, ('type', rival))}" if there.any() else mine
        return rival, f"Genes that speak for {label} and against {rival}: {genes} (shares of {of})."

    def markers(self, name: str, mask: np.ndarray, other: np.ndarray, only_theirs: bool = False) -> tuple[str, str]:
        """Markers of a type that cells express, and those that fewer than a tenth of them do, in words; "" for none.

        With `only_theirs` markers that the `other` cells, if there are any, have no more than these are left out.
        """
        symbols = self.panel_genes[[gene for gene in self.explainer.markers[self.number(name)] if gene != NONE]]
        columns = [self.expression.column_of[gene] for gene in symbols]
        here, there = self.expressing(mask)[columns], self.expressing(other)[columns]
        kept = there > here if only_theirs and other.any() else np.ones(len(symbols), dtype=bool)
        lists = (symbols[kept & part].tolist() for part in (here >= SILENT, here < SILENT))
        expressed, missing = (self.shares(genes, mask, other) if genes else "" for genes in lists)
        return expressed, missing

    def parts(self, values: np.ndarray, mask: np.ndarray, rarest: bool = False) -> str:
        """The commonest values of cells with their shares, or the rarest, in words."""
        counts = pd.Series(values[mask]).value_counts(ascending=rarest)
        parts = [f"{name} ({share(n / mask.sum())})" for name, n in counts.head(N_PARTS).items()]
        return join([*parts, f"{len(counts) - N_PARTS} more"] if len(counts) > N_PARTS else parts)

    def called(self, group: Group) -> str:
        """How many of the cells are of a group, in words."""
        mask, who = self.subject
        is_denied = group in self.asked.denied and self.asked.topic in ("types", "column")
        n = int(((self.mask(group) ^ is_denied) & mask).sum())
        what = f"called {group[1]} or a kind of it" if group[0] == "type" else f"of {group[0]} {group[1]}"
        verb = f"{'is' if n == 1 else 'are'}{' not' if is_denied else ''}"
        here = self.labels[mask & self.mask(group)] if group[0] == "type" and not is_denied else np.array([])
        kinds = f": {self.parts(here, np.ones(n, dtype=bool))}" if n and set(here) - {group[1]} else ""
        return f"{n:,} of {who} ({share(n / mask.sum())}) {verb} {what}{kinds}."

    # -- answers ------------------------------------------------------------------------------------------------------

    def _types(self) -> str:
        (mask, who), target = self.subject, self.asked.roles.get("target")
        if target is not None:
            several = [group for group in self.asked.groups if (group[0] == "type") == (target[0] == "type")]
            several = [group for group in several if group != self.asked.roles.get("subject")]
            if len(several) > 1 and set(several) <= set(self.asked.denied):
                return self._none_of(several)
            return " ".join(self.called(group) for group in ([target] if len(several) < 2 else several))
        if RAREST.search(self.asked.text):
            return f"Labels of {who}, the rarest first: {self.parts(self.labels, mask, rarest=True)}."
        found = set(self.labels[mask])
        types = f", {len(found - {UNKNOWN})} types{f' and {UNKNOWN}' if UNKNOWN in found else ''}"
        return f"Labels of {who}{types if len(found) > N_PARTS else ''}: {self.parts(self.labels, mask)}."

    def _none_of(self, groups: Sequence[Group]) -> str:
        """How many of the cells are of none of some groups, in words."""
        mask, who = self.subject
        rest = mask & ~np.logical_or.reduce([self.mask(group) for group in groups])
        names = " nor ".join(name for _, name in groups)
        parts = f": {self.parts(self.labels, rest)}" if rest.any() else ""
        return f"{rest.sum():,} of {who} ({share(rest.sum() / mask.sum())}) are neither {names}{parts}."

    def _gene(self) -> str:
        if absent := [gene for gene in self.asked.genes if gene not in self.expression.column_of]:
            said, asked = [f"The file does not measure {gene}." for gene in dict.fromkeys(absent)], self.asked
            genes = [gene for gene in asked.genes if gene not in absent]
            self.asked = replace(asked, genes=genes, without=asked.without - set(absent))
            said += [self._gene()] if genes else []
            self.asked = asked  # a question that follows is about all of them
            return " ".join(said)
        if self.asked.each or len(self.asked.groups) > 1:
            return " ".join(self._gene_of_each(gene) for gene in self.asked.genes)
        return " ".join([*map(self._gene_here, self.asked.genes), *self._together()])

    def _gene_here(self, gene: str) -> str:
        """A gene in the cells that are asked about, and in the others."""
        (mask, who), (other, rest) = self.subject, self.others
        rates = self.rates(gene)
        words = f"{gene}: counts in {share((rates[mask] > 0).mean())} of {who}"
        words += f" ({_rate(rates[mask])} per 10,000 counts on average)"
        if other.any():
            words += f", in {share((rates[other] > 0).mean())} of {rest} ({_rate(rates[other])})"
            if middle := np.median(rates[mask]):
                words += f"; {share((rates[other] < middle).mean())} of {rest} have less than the median of {who}"
        return f"{words}."

    def _gene_of_each(self, gene: str) -> str:
        """A gene in each group that a question names, or in each type or value of a column, the highest mean first."""
        rates, mask = self.rates(gene), self.subject[0]
        groups = [(_named(part, group), part) for group in self.asked.groups if (part := self.mask(group)).any()]
        if self.asked.each:
            groups = self.groups_of(mask if len(self.asked.groups) < 2 else self.selected)
        groups.sort(key=lambda group: float(rates[group[1]].mean()), reverse=not LOWEST.search(self.asked.text))
        parts = [f"{name} ({share((rates[m] > 0).mean())}, {_rate(rates[m])})" for name, m in groups[:N_PARTS]]
        more = [f"{len(groups) - N_PARTS} more"] if len(groups) > N_PARTS else []
        start = f"{gene}, share of cells with counts and mean per 10,000 counts"
        return f"{start}: {join([*parts, *more])}."

    def _together(self) -> list[str]:
        """How many of the cells express all genes of a question, or any, but none of those that it denies."""
        (mask, who), genes, without = self.subject, self.asked.genes, self.asked.without
        if len(genes) < 2 and not without:
            return []
        on = {gene: self.rates(gene)[mask] > 0 for gene in dict.fromkeys(genes)}
        wanted = [gene for gene in on if gene not in without]
        either = " or " if re.search(r"\bor\b", self.asked.text, re.IGNORECASE) else " and "
        join_all = np.logical_or if either == " or " else np.logical_and
        found = join_all.reduce([on[gene] for gene in wanted]) if wanted else np.ones(mask.sum(), dtype=bool)
        for gene in without & set(on):
            found &= ~on[gene]
        words = (
            either.join(wanted) + (" without " if wanted else "No counts of ") * bool(without) + " and ".join(without)
        )
        return [f"{words}: {found.sum():,} of {who} ({share(found.mean())})."]

    def rates(self, gene: str) -> np.ndarray:
        """A gene's counts per 10,000, `(n_cells,)`."""
        return self.expression.rates[:, [self.expression.column_of[gene]]].toarray().ravel()

    def groups_of(self, mask: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """The labels of cells, or the values of the column that is asked for, each with its cells."""
        values = self.labels if self.asked.each == "type" else self.columns[self.asked.each]
        column = "" if self.asked.each == "type" else f"{self.asked.each} "
        return [(f"{column}{value}", mask & (values == value)) for value in np.unique(values[mask])]

    def _genes(self) -> str:
        (mask, who), (other, rest), said = self.subject, self.others, []
        if not other.any():
            return f"There are no cells to compare {who} with: select some, or name a type."
        here, there = self.expressing(mask), self.expressing(other)
        means = [np.asarray(self.expression.rates[part].mean(axis=0)).ravel() for part in (mask, other)]
        for word, (one, two), gap in (("higher", means, here - there), ("lower", means[::-1], there - here)):
            tells = (one >= TYPE_FOLD * two) & (gap >= TYPE_SHARE) & self.expression.usable
            if best := [gene for gene in np.argsort(-gap, kind="stable")[:100] if tells[gene]][:N_NAMED]:
                said.append(f"{word} in {self.shares(self.expression.symbols[best].tolist(), mask, other)}")
        if not said:
            return f"No gene tells {who} from {rest}: twofold, and in {share(TYPE_SHARE)} more of the cells."
        return f"Against {rest}, {who} are {', and '.join(said)}."

    def _why_unknown(self) -> str:
        """What made cells Unknown: novelty, or a probability that is too low."""
        mask, who = self.subject
        novelty = self.obs.get("scmmgpt_novelty", pd.Series(np.nan, index=self.obs.index)).to_numpy()[mask]
        n, score = int((novelty > 1).sum()), self.scores[mask]
        words = f"{n:,} of {who} are unlike every label of the checkpoint (novelty above 1)"
        return (
            f"{words}; the mean probability of the others is {score[~(novelty > 1)].mean():.2f}."
            if n < len(score)
            else f"{words}."
        )

    def _why(self) -> str:
        target = self.asked.roles.get("target")
        if target is not None and target[1] == "Unknown":
            self.asked.roles["subject"] = self.asked.roles.pop("target")
        elif target is not None and self.selected.all() and self.mask(target).any():  # "why fibroblast?"
            self.asked.roles["subject"] = target
        if self.commonest()[0] == "Unknown":
            return self._why_unknown()
        (label, _), target, (rival, genes) = self.commonest(), self.asked.roles.get("target"), self.evidence()
        if target is not None and not self.is_kind(label, target[1]):
            return self._whynot()
        if not rival:
            return f"The model has no evidence for the label {label}."
        return f"{self.called(('type', label))} {genes}"

    def _whynot(self) -> str:
        several = [group for group in self.asked.groups if group[0] == "type"]
        if len(several) == 2:  # "why B cells and not plasma cells?"
            self.asked.roles |= {"subject": several[0], "target": several[1]}
            if not self.subject[0].any():
                return f"The file has {self.subject[1].replace('the 0 ', 'no ', 1)}."
        target, (label, mine), (mask, who) = self.asked.roles["target"], self.commonest(), self.subject
        said = []
        if target[0] != "type":  # "why not delta?", which is a label of the file
            names = pd.Series(self.labels[self.mask(target)]).value_counts()
            said = [f"Of {_named(self.mask(target), target)} {names.iloc[0]:,} are called {names.index[0]}."]
            target = "type", str(names.index[0])
        said.append(self.called(target))
        if self.is_kind(label, target[1]):
            return " ".join(said)
        if mine.sum() < mask.sum():
            said.append(f"The commonest label of {who} is {label}, of {mine.sum():,}.")
        theirs = self.mask(target) & ~mine
        said.append(self.evidence(target[1])[1])
        if missing := self.markers(target[1], mine, theirs, only_theirs=True)[1]:
            against = f", against the share of {_named(theirs, target)}" if theirs.any() else ""
            few = f"Markers of {target[1]} that fewer than {share(SILENT)} of the former have"
            said.append(f"{few}{against}: {missing}.")
        return " ".join(filter(None, said))

    def _like(self) -> str:
        mask, target = self.subject[0], self.asked.roles.get("target") or self.asked.roles["subject"]
        said, rest = [self.called(target)], mask & ~self.mask(target)
        if len(odds := self.probability_of(target[1])) and rest.any():
            groups = [(name, rest & (self.labels == name)) for name in np.unique(self.labels[rest])]
            means = {_counted(name, part): odds[part].mean() for name, part in groups}
            said.append(f"Mean probability of {target[1]} in the others: {self.ranked(means, '{:.2g}'.format)}.")
        return " ".join([*said, LIKENESS])

    def probability_of(self, name: str) -> np.ndarray:
        """The probability of a type or its kinds in each cell; empty where the labels of the file have none."""
        labels = [str(label) for label in np.atleast_1d(self.candidates if self.candidates is not None else [])]
        known = set(self.set_names.tolist())
        columns = [i for i, label in enumerate(labels) if label in known and self.is_kind(label, name)]
        if self.probabilities is None or not columns or self.probabilities.shape[1] != len(labels):
            return np.zeros(0)
        return np.nan_to_num(np.asarray(self.probabilities)[:, columns]).sum(axis=1)

    def _markers(self) -> str:
        if self.selected.all() and "target" in self.asked.roles:  # of those cells, where none are selected
            self.asked.roles.setdefault("subject", self.asked.roles["target"])
            if not self.subject[0].any():
                del self.asked.roles["subject"]
        name = self.asked.roles.get("target", ("type", self.commonest()[0]))[1]
        (mask, who), (other, rest) = self.subject, self.others
        expressed, missing = self.markers(name, mask, other)
        of = f"{who}{f', against the share of {rest}' if other.any() else ''}"
        few = f"In fewer than {share(SILENT)}: {missing or 'none'}."
        return f"Markers of {name} by the share of {of}: {expressed or 'none'}. {few}"

    def _alternatives(self) -> str:
        rival, _ = self.evidence()
        if not rival:
            return f"There is no runner-up to the label {self.commonest()[0]}."
        self.asked.roles["target"] = ("type", rival)
        return f"The runner-up is {rival}. {self._whynot()}"

    def _sure(self) -> str:
        (mask, who), score = self.subject, self.scores
        if self.asked.each:
            means = {_counted(name, part): score[part].mean() for name, part in self.groups_of(mask)}
            return f"Mean probability of the labels: {self.ranked(means, '{:.2f}'.format)}."
        score = score[mask]
        low, unknown = share((score < MIN_SCORE).mean()), share((self.labels[mask] == "Unknown").mean())
        words = f"The mean probability of the labels of {who} is {score.mean():.2f}"
        return f"{words}; for {low} it is below {MIN_SCORE}, and {unknown} are Unknown."

    def _state(self) -> str:
        several = [group for group in self.asked.groups if group[0] == "type" and self.mask(group).any()]
        if len(several) > 1:  # "are NK cells more cytotoxic than CD8 T cells?"
            return " ".join(map(self._state_of, several))
        return self._state_of(self.asked.roles.get("subject"))

    def _state_of(self, group: Group | None) -> str:
        """The programmes of a group, or of the selected cells."""
        self.asked.roles |= {} if group is None else {"subject": group}
        (mask, who), (other, rest), said = self.subject, self.others, []
        words = dict(zip(PROGRAMMES, STATES, strict=True))
        asked = [programme for programme in words if re.search(words[programme], self.asked.text, re.IGNORECASE)]
        for programme in asked or words:
            genes = [self.expression.column_of[gene] for gene in programme.genes if gene in self.expression.column_of]
            several = self.expressed[:, genes].sum(axis=1).A1 >= MIN_PROGRAMME_GENES
            usual = self.programmes[programme.phrase]
            if self.asked.each and asked:
                shares = {_counted(name, part): several[part].mean() for name, part in self.groups_of(mask)}
                start = f"{programme.phrase}, share of cells with counts of {MIN_PROGRAMME_GENES} or more of its genes"
                said.append(f"{start}: {self.ranked(shares, share)}.")
            elif asked or usual[mask].any():
                here, *there = (
                    f"{share(several[part].mean())}, {share(usual[part].mean())}"
                    for part in (mask, other)
                    if part.any()
                )
                said.append(f"{programme.phrase} {here}{''.join(f' (of {rest} {words})' for words in there)}.")
        if self.asked.each and asked:
            return " ".join(said)
        start = f"Of {who}, the share with counts of {MIN_PROGRAMME_GENES} or more genes of a programme, and the "
        return f"{start}share with more of it than is usual for their type: {' '.join(said) or 'none of the latter.'}"

    def ranked(self, values: dict[str, float], in_words: Callable[[float], str]) -> str:
        """Names with their values in words, the highest first, or the lowest where the question asks for it."""
        names = sorted(values, key=lambda name: values[name], reverse=not LOWEST.search(self.asked.text))
        return join([f"{name}: {in_words(values[name])}" for name in names[:N_PARTS]])

    def _column(self) -> str:
        (mask, who), target = self.subject, self.asked.roles.get("target")
        if target is not None and target[0] != "type":
            return self.called(target)
        columns = self.asked.columns or [name for name in COLUMNS if name in self.columns]
        parts = [f"{name}: {self.parts(self.columns[name], mask)}" for name in dict.fromkeys(columns)]
        named = None if self.asked.columns else TOPICS["column"].search(self.asked.text)
        start = f'No column of obs is called "{named.group()}". ' if named else ""
        return f"{start}Of {who}: {'; '.join(parts)}." if parts else f"{start}It has {join(list(self.columns))}."

    def _quality(self) -> str:
        mask, who = self.subject
        handling = np.char.startswith(self.expression.symbols.astype(str), "MT-")
        counts, genes = self.cells.library_sizes(), np.diff(self.cells.indptr)
        in_mitochondria = self.expression.counts[:, handling].sum(axis=1).A1

        def words(part: np.ndarray) -> str:
            mito = share(in_mitochondria[part].sum() / max(counts[part].sum(), 1))
            middle = f"{np.median(counts[part]):,.0f} counts and {np.median(genes[part]):,.0f} genes"
            return f"{middle}; {mito} of the counts are mitochondrial" if handling.any() else middle

        if self.asked.each:
            by = (
                in_mitochondria / np.maximum(counts, 1)
                if re.search("mito", self.asked.text, re.IGNORECASE)
                else genes
                if re.search(r"\bgenes\b", self.asked.text, re.IGNORECASE)
                else counts
            )
            is_lowest = bool(LOWEST.search(self.asked.text))
            groups = self.groups_of(mask)
            groups.sort(key=lambda group: float(np.median(by[group[1]])), reverse=not is_lowest)
            parts = [f"{name}: {words(part)}" for name, part in groups[:N_PARTS]]
            return f"Medians of {who}, the {'lowest' if is_lowest else 'highest'} first. {'. '.join(parts)}."
        measured = f" The file measures {len(self.expression.symbols):,} genes of the model"
        measured += "." if handling.any() else ", none of them mitochondrial."
        return f"The median of {who} is {words(mask)}.{measured}"

    def _describe(self) -> str:
        return " ".join([self._types(), self._why(), self._state()])


def _rate(rates: np.ndarray) -> str:
    """The mean of rates in words."""
    mean = float(rates.mean())
    return f"{mean:,.0f}" if mean >= 10 else f"{mean:.2g}"


def _named(mask: np.ndarray, group: str | Group) -> str:
    """Cells in words: "the 70 selected cells", "the 15 cells called B cell"."""
    n, before = int(mask.sum()), group if isinstance(group, str) else ""
    after = "" if isinstance(group, str) else f" called {group[1]}" if group[0] == "type" else f" of {' '.join(group)}"
    return f"the {n:,} {before}cell{'s' if n != 1 else ''}{after}"


def _counted(name: str, mask: np.ndarray) -> str:
    """A group with its number of cells."""
    return f"{name} ({mask.sum():,} {'cell' if mask.sum() == 1 else 'cells'})"


def answers(chat: Chat, questions: Iterable[str] | None, as_list: bool) -> Iterator[tuple[Any, list[str]]]:
    """Each answer with its lines, or all as a list; without questions, lines of standard input are."""
    asked = map(str.strip, read_lines() if questions is None else questions)
    found = ({"question": text, **vars(chat.ask(text))} for text in asked)
    if as_list:
        yield list(found), []
        return
    for row in found:
        yield row, [*([] if questions is None else [f"> {row['question']}"]), row["text"], ""]


def read_lines() -> Iterator[str]:
    """Questions of standard input, until it ends."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
