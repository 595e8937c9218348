r"""Check descriptions against counts, and count the lies that the check finds.

```
python -m scmmgpt.eval proof --model CHECKPOINT --cells cells.h5ad --output out.json
```

The check reads texts and counts alone: no label, no score, no model. A sentence of another form than those of
`describe --proof` is unsupported, and so is one with a gene that does not have the stated count. The other cells of
the file whose texts name the same type are the kind of a cell.

| sentence | supported if |
| --- | --- |
| type | each gene is higher in the kind than in all other cells, and all together are more probable in it than in \
any other kind of ten cells or more, by naive Bayes over the counts of all kinds; the text names the genes of a \
lineage that excludes it |
| against | the genes are those of the lineage that the cell expresses, and the type excludes it |
| programme | it names three genes of the list; the cell is above the stated share of its kind, and above half of \
it, and has twice the counts of its lower quarter, by more than chance |
| unusual | each gene is at twice the mean of the kind, and above nine in ten of it |
| alternative, undecided | each gene is higher in the cells of its type than in those of the other type |

Of a type with fewer than 20 cells, the counts of the file do not say what is usual. There, genes of one lineage
decide (`LINEAGES`: CD3 and T cell receptor chains refute "natural killer cell"). Where they are silent, a text without
a fault is not decidable, which is neither supported nor unsupported.

Lies are planted one at a time among true texts: see `LIES`. With `--sample` the command draws descriptions of several
files for a reader, beside the genes that stand out in each cell.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.stats import poisson
from sklearn.naive_bayes import MultinomialNB

from scmmgpt.commands.errors import OneLineParser, number
from scmmgpt.commands.files import write_json
from scmmgpt.commands.results import write_table
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.programmes_scmmgpt import LINEAGES, PROGRAMMES
from scmmgpt.proof_scmmgpt import LINEAGE_FOLD, MIN_LINEAGE_GENES
from scmmgpt.readers.cell_files import read_file
from scmmgpt.train.data import ontology


GENE = r"([^\s(),]+) \(([\d.e+-]+)(?: counts?)?\)"
LIST = rf"{GENE}(?:(?:, | and ){GENE})*"
PATTERNS = {
    "type": rf"An? (?P<kind>.+?)(?: from (?P<tissue>.+?))?, shown by (?P<genes>{LIST})(?: alone)?\.",
    "none": r"No type is shown by its counts; the model proposes [^.]+\.",
    "against": rf"Against it speak (?P<genes>{LIST}), genes of (?P<lineage>.+)\.",
    "programme": rf"(?P<phrase>[^:]+): (?P<genes>{LIST}), more of these genes than (?P<share>\d+ %|all) of the "
    r"(?P<n>\d+) other cells of its kind\.",
    "unusual": rf"Unusually high for its kind: (?P<genes>{LIST})\.",
    "alternative": rf"The alternative is (?P<other>.+), for which (?P<genes>{LIST}) speaks?\.",
    "undecided": rf"It is undecided between (?P<one>.+), for which (?P<genes>{LIST}) speaks?, and (?P<other>.+), for "
    rf"which (?P<more>{LIST}) speaks?\.",
}
LINEAGE_TERMS = {lineage.name: lineage.term for lineage in LINEAGES}
SENTENCES = {kind: re.compile(pattern) for kind, pattern in PATTERNS.items()}
LISTS = {programme.phrase: set(programme.genes) for programme in PROGRAMMES}
ROUNDING = 1e-3  # of a count in words
HIGH = 95  # share of its kind that a lie claims for a programme
MIN_KIND, MIN_RIVAL = 20, 10  # cells of a kind that are usual of it, and of one that refutes another
SMOOTHING = 0.1  # counts added to each gene
FEW, CHANCE = 0.4, 1e-3  # counts of a programme that are expected at least; probability of so many
Lie: TypeAlias = Callable[["Checker", int, np.random.Generator], str | None]


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return re.split(r"(?<=\.) (?=[A-Z])", text)


def kind_of(text: str) -> str:
    """The type that a text names; "" for none."""
    match = SENTENCES["type"].fullmatch(sentences(text)[0])
    return match["kind"] if match else ""


@functools.cache
def term_of(name: str) -> str:
    """The Cell Ontology id of a type; the name itself if it has none."""
    return ontology.match_label("cell_type", name)[0] or name


@functools.cache
def lineage(name: str) -> frozenset[str]:
    """The Cell Ontology ids of a type, or of an id, and of all types above it; the name itself if it has none."""
    term = name if name in LINEAGE_TERMS.values() else term_of(name)
    return frozenset([term, *(ontology.ancestors(term) if term.startswith("CL:") else ())])


class Checker:
    """Texts and counts of the cells of a file.

    Args:
        texts: Of the cells.
        counts: `(n_cells, n_genes)`.
        symbols: Of the genes.
        sizes: Library sizes `(n_cells,)`.
    """

    def __init__(self, texts: Sequence[str], counts: csr_matrix, symbols: Sequence[str], sizes: np.ndarray) -> None:
        self.texts, self.symbols = list(texts), list(symbols)
        self.column = {name: i for i, name in enumerate(symbols)}
        self.counts, self.sizes = counts.tocsc(), np.asarray(sizes, dtype=float).clip(min=1e-9)
        self.by_cell = counts.tocsr()
        kinds = np.array([kind_of(text) for text in texts], dtype=object)
        self.kinds = {name: kinds == name for name in sorted(set(kinds.tolist()) - {""})}
        self.known: dict[str, np.ndarray] = {}
        self.log_shares: dict[str, np.ndarray] = {}
        if self.kinds:
            bayes = MultinomialNB(alpha=SMOOTHING).fit(self.by_cell[kinds != ""], kinds[kinds != ""].astype(str))
            self.log_shares = dict(zip(bayes.classes_.tolist(), bayes.feature_log_prob_, strict=True))

    def excludes(self, one: str, other: str) -> bool:
        """Whether a cell of one type is none of the other: no type of the file is both.

        A type and one above it don't exclude each other, nor do phagocytes and myeloid cells beside macrophages.
        """
        both = lineage(one) | lineage(other)
        return not any(both <= lineage(name) for name in (one, other, *self.kinds))

    def better_kinds(self, kind: str, genes: Sequence[str]) -> list[str]:
        """Kinds in which genes are together more probable than in one that excludes them."""
        columns = [self.column[gene] for gene in genes]
        rivals = [name for name, cells in self.kinds.items() if cells.sum() >= MIN_RIVAL and self.excludes(name, kind)]
        own = self.log_shares[kind][columns].sum() if kind in self.log_shares else -np.inf
        return [name for name in rivals if self.log_shares[name][columns].sum() > own]

    def rates(self, name: str) -> np.ndarray:
        """Share of a gene, or of the genes of a programme, in every cell."""
        if name not in self.known:
            columns = [self.column[gene] for gene in LISTS.get(name, {name}) if gene in self.column]
            self.known[name] = np.asarray(self.counts[:, columns].sum(axis=1)).ravel() / self.sizes
        return self.known[name]

    def lineages_against(self, cell: int, kind: str) -> dict[str, list[str]]:
        """Lineages that a type excludes and a cell shows, with their genes."""
        found = {}
        for name, genes in self.lineages(cell).items():
            term = LINEAGE_TERMS[name]
            if term not in lineage(kind) and term_of(kind) not in lineage(term):
                found[name] = genes
        return found

    def lineages(self, cell: int) -> dict[str, list[str]]:
        """Lineages that a cell shows, with their genes."""
        found = {}
        for line in LINEAGES:
            genes = [gene for gene in line.genes if gene in self.column]
            here, usual = ({gene: of(self.rates(gene)) for gene in genes} for of in (lambda r: r[cell], np.mean))
            shown = [gene for gene in genes if here[gene] > 0 and here[gene] >= LINEAGE_FOLD * usual[gene]]
            if len(shown) >= MIN_LINEAGE_GENES and sum(here.values()) >= LINEAGE_FOLD * sum(usual.values()):
                found[line.name] = shown
        return found

    def is_rare(self, kind: str) -> bool:
        """Whether the file has too few cells of a type to know what is usual of it."""
        return kind not in self.kinds or self.kinds[kind].sum() < MIN_KIND

    def verdict(self, cell: int, text: str) -> str:
        """Of the counts on a text about a cell: "supported", "unsupported" or "not decidable"."""
        if self.faults(cell, text):
            return "unsupported"
        kind = kind_of(text)
        shown = {above for name in self.lineages(cell) for above in lineage(LINEAGE_TERMS[name])}
        return "not decidable" if kind and self.is_rare(kind) and term_of(kind) not in shown else "supported"

    def faults(self, cell: int, text: str) -> list[str]:
        """What the counts contradict in a text about a cell; nothing if they contradict none of it."""
        found: list[str] = []
        kind = kind_of(text)
        others = self.kinds.get(kind, np.zeros(len(self.sizes), bool)).copy()
        others[cell] = False
        for place, sentence in enumerate(sentences(text)):
            matches = {name: match for name, form in SENTENCES.items() if (match := form.fullmatch(sentence))}
            if len(matches) != 1 or (next(iter(matches)) in ("type", "none")) != (place == 0):
                found.append(f"no such sentence: {sentence}")
                continue
            form, match = next(iter(matches.items()))
            parts = match.groupdict()
            genes = re.findall(GENE, parts.get("genes") or "")
            more = re.findall(GENE, parts.get("more") or "")
            if wrong := [gene for gene, count in genes + more if not self.has(cell, gene, float(count))]:
                found.append(f"other counts of {wrong}")
                continue
            names = [gene for gene, _ in genes]
            if form == "type":
                found += [f"{g} is not of {kind}" for g in names if not self.is_higher(g, others, ~others, cell)]
                found += [f"{names} speak for {name}" for name in self.better_kinds(kind, names)]
                found += self.lineage_faults(cell, kind, text)
            elif form == "against":
                found += self.against_faults(cell, kind, names, parts["lineage"])
            elif form == "programme":
                found += self.programme_faults(cell, parts, names, others)
            elif form == "unusual":
                found += [f"{gene} is usual" for gene in names if not self.is_unusual(cell, gene, others)]
            elif form in ("alternative", "undecided"):
                one, other = parts.get("one") or parts["other"], parts["other"] if form == "undecided" else kind
                if one == other or one not in self.kinds or other not in self.kinds:
                    found.append(f"{one} is not an alternative to {other}")
                    continue
                pair = self.kinds[one], self.kinds[other]
                found += [f"{gene} is not of {one}" for gene in names if not self.is_higher(gene, *pair, cell)]
                found += [
                    f"{gene} is not of {other}" for gene, _ in more if not self.is_higher(gene, *pair[::-1], cell)
                ]
        return found

    def lineage_faults(self, cell: int, kind: str, text: str) -> list[str]:
        """Genes of lineages that a type excludes, if the text names them not, or the type has few cells."""
        against = self.lineages_against(cell, kind)
        said = text if not self.is_rare(kind) else ""
        return [f"{genes} speak against {kind}" for name, genes in against.items() if f"genes of {name}." not in said]

    def against_faults(self, cell: int, kind: str, names: list[str], line: str) -> list[str]:
        """What is wrong with a sentence about another lineage."""
        return [] if names == self.lineages_against(cell, kind).get(line) else [f"{names} do not speak against {kind}"]

    def has(self, cell: int, gene: str, count: float) -> bool:
        """Whether a gene has this count in a cell, and any."""
        if gene not in self.column or not count > 0:
            return False
        return abs(self.by_cell[cell, self.column[gene]] - count) <= ROUNDING * count

    def standing_out(self, cell: int) -> str:
        """The ten genes of a cell furthest above the mean of the file, with counts and percentiles, in words."""
        row = self.by_cell[cell]
        shares = row.data / self.sizes[cell]
        usual = np.asarray(self.counts.multiply(1 / self.sizes[:, None]).tocsc()[:, row.indices].mean(axis=0)).ravel()
        best = np.argsort(-shares * np.log(shares / usual), kind="stable")[:10]
        words = []
        for gene, count in zip(row.indices[best], row.data[best], strict=True):
            rates = self.rates(self.symbols[gene])
            words.append(f"{self.symbols[gene]} {count:.4g} ({(rates < rates[cell]).mean():.0%})")
        return ", ".join(words)

    def is_higher(self, gene: str, group: np.ndarray, rest: np.ndarray, cell: int) -> bool:
        """Whether the mean of a gene is higher in one group of cells than in another, both without a cell."""
        rates, means = self.rates(gene), []
        for cells in (group, rest):
            n = cells.sum() - cells[cell]
            means.append((rates[cells].sum() - rates[cell] * cells[cell]) / n if n else 0.0)
        return means[0] > means[1] or not group.any()  # an only cell has nothing to be compared with

    def is_unusual(self, cell: int, gene: str, others: np.ndarray) -> bool:
        """Whether a gene of a cell is far above its kind."""
        rates = self.rates(gene)
        usual = rates[others]
        return len(usual) > 0 and rates[cell] >= 2 * usual.mean() and (usual < rates[cell]).mean() >= 0.9

    def programme_faults(self, cell: int, parts: dict[str, str], names: list[str], others: np.ndarray) -> list[str]:
        """What is wrong with a sentence about a programme."""
        if parts["phrase"] not in LISTS:
            return [f"no such programme: {parts['phrase']}"]
        if strange := [gene for gene in names if gene not in LISTS[parts["phrase"]]]:
            return [f"{strange} are not of the programme"]
        rates = self.rates(parts["phrase"])
        usual, share = rates[others], 100 if parts["share"] == "all" else int(parts["share"].removesuffix(" %"))
        if int(parts["n"]) != len(usual):
            return ["another number of cells"]
        below = (usual < rates[cell] * (1 + 1e-6)).mean() * 100 + 1e-6
        expected = np.quantile(usual, 0.25) * self.sizes[cell] if len(usual) else np.inf
        count = rates[cell] * self.sizes[cell]
        by_chance = poisson.sf(count - 1, max(expected, FEW))
        high = share >= 50 and below >= share and count >= 2 * expected and by_chance < CHANCE
        return [] if high and len(names) >= 3 else ["the programme is not high"]


# -- lies -------------------------------------------------------------------------------------------------------------


def other_type(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """The name of another type, with the genes of the cell."""
    text = checker.texts[cell]
    kind = kind_of(text)
    names = [name for name in checker.kinds if kind and checker.excludes(name, kind)]
    if not names:
        return None
    lie = text.replace(f" {kind}", f" {rng.choice(names)}", 1)
    return re.sub(r"^An? (?=[aeiou])", "An ", re.sub(r"^An? ", "A ", lie))


def other_markers(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """Type and genes of a cell of another type."""
    kind = kind_of(checker.texts[cell])
    strangers: Any = np.flatnonzero(~checker.kinds[kind]) if kind else []
    strangers = [i for i in strangers if kind_of(checker.texts[i])]
    if not strangers:
        return None
    first = sentences(checker.texts[rng.choice(strangers)])[0]
    return " ".join([first, *sentences(checker.texts[cell])[1:]])


def silent_gene(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """A gene without a count, in place of one that is named."""
    found = list(re.finditer(GENE, checker.texts[cell]))
    silent = np.setdiff1d(np.arange(len(checker.symbols)), checker.by_cell[cell].indices)
    if not found or not len(silent):
        return None
    place = found[rng.integers(len(found))]
    gene = checker.symbols[rng.choice(silent)]
    return checker.texts[cell][: place.start(1)] + gene + checker.texts[cell][place.end(1) :]


def other_programme(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """A programme under the name of another one."""
    named = [phrase for phrase in LISTS if f"{phrase}:" in checker.texts[cell]]
    if not named:
        return None
    phrase = rng.choice([phrase for phrase in LISTS if phrase not in named])
    return checker.texts[cell].replace(f"{rng.choice(named)}:", f"{phrase}:")


def strange_programme(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """A programme that the cell does not show, with its own counts of the genes, and a place high in its kind."""
    text = checker.texts[cell]
    kind = kind_of(text)
    phrases = [phrase for phrase in LISTS if f"{phrase}:" not in text]
    if not kind or not phrases:
        return None
    phrase = str(rng.choice(phrases))
    row = checker.by_cell[cell]
    counts = {
        checker.symbols[i]: v
        for i, v in zip(row.indices, row.data, strict=True)
        if checker.symbols[i] in LISTS[phrase]
    }
    if not counts:
        return None
    named = sorted(counts, key=lambda gene: -counts[gene])[:4]
    others = checker.kinds[kind].copy()
    others[cell] = False
    rates = checker.rates(phrase)
    if not others.any() or (rates[others] < rates[cell]).mean() * 100 >= HIGH:
        return None
    words = [f"{gene} ({counts[gene]:.4g})" for gene in named]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    lie = f"{phrase}: {listed}, more of these genes than {HIGH} % of the {others.sum()} other cells of its kind."
    first, *rest = sentences(text)
    return " ".join([first, lie, *rest])


def other_cell(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """The text of another cell of the same type."""
    kind = kind_of(checker.texts[cell])
    alike: Any = np.flatnonzero(checker.kinds[kind]) if kind else []
    alike = [i for i in alike if checker.texts[i] != checker.texts[cell]]
    return checker.texts[rng.choice(alike)] if alike else None


LIES: dict[str, Lie] = {
    "another type": other_type,
    "another type and its markers": other_markers,
    "a gene without counts": silent_gene,
    "another programme": other_programme,
    "a programme that is not shown": strange_programme,
    "another cell of the type": other_cell,
}


def describe(pipeline: ScMMGPTPipeline, adata: Any) -> Checker:
    """Describe cells with proof, for a check of the texts against their counts."""
    pipeline.describe(adata, proof=True)
    cells, _ = pipeline.processor.read_cells(adata)
    ids = np.unique(cells.gene_ids)
    matrix = cells.to_csr(int(ids.max()) + 1)[:, ids]
    texts = adata.obs["scmmgpt_description"].tolist()
    return Checker(texts, matrix, pipeline.processor.gene_symbols(ids.tolist()), cells.library_sizes())


def sample_rows(
    pipeline: ScMMGPTPipeline, paths: Sequence[str], n_cells: int, label_keys: Sequence[str], seed: int
) -> Iterator[dict[str, str]]:
    """Descriptions of cells drawn at random, as many of each file, beside what a reader needs to judge them.

    `file`, `cell`, `given` (the first of the columns `label_keys` that the file has), `text`, `verdict` of the check,
    and `genes`: those that stand out most against the mean of the file, with counts and percentiles among its cells.
    """
    rng = np.random.default_rng(seed)
    for place, path in enumerate(paths):
        adata = read_file(path)
        checker = describe(pipeline, adata)
        n = min(n_cells // len(paths) + (place < n_cells % len(paths)), adata.n_obs)
        given = next((key for key in label_keys if key in adata.obs), None)
        for cell in sorted(rng.choice(adata.n_obs, n, replace=False)):
            yield {
                "file": Path(path).stem,
                "cell": str(adata.obs_names[cell]),
                "given": "" if given is None else str(adata.obs[given].iloc[cell]),
                "text": checker.texts[cell],
                "verdict": checker.verdict(cell, checker.texts[cell]),
                "genes": checker.standing_out(cell),
            }


def evaluate_proof(pipeline: ScMMGPTPipeline, adata: Any, seed: int = 0) -> dict[str, Any]:
    """Describe cells, check every description, and plant each kind of lie in every cell where it can be told.

    Returns:
        JSON-able dict: `n_cells`, `clauses` (a cell), `unsupported` and `not_decidable` (shares of the descriptions),
        `faults` (some of them) and, by lie, `told`, `not_decidable` and `caught` (share of those that are decidable).
    """
    checker = describe(pipeline, adata)
    texts = checker.texts
    faults = {i: found for i, text in enumerate(texts) if (found := checker.faults(i, text))}
    rng, lies = np.random.default_rng(seed), {}
    for name, lie in LIES.items():
        told = [(cell, text) for cell in range(len(texts)) if (text := lie(checker, cell, rng)) is not None]
        found = [checker.verdict(cell, text) for cell, text in told]
        n, open_ = found.count("unsupported"), found.count("not decidable")
        caught = n / (len(told) - open_) if len(told) > open_ else None
        lies[name] = {"told": len(told), "not_decidable": open_, "caught": caught}
    return {
        "n_cells": len(texts),
        "clauses": float(np.mean([len(sentences(text)) for text in texts])),
        "no_type": float(np.mean([not kind_of(text) for text in texts])),
        "unsupported": len(faults) / len(texts),
        "not_decidable": float(np.mean([checker.verdict(i, text) == "not decidable" for i, text in enumerate(texts)])),
        "faults": {texts[i]: found for i, found in list(faults.items())[:5]},
        "lies": lies,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval proof", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint with a label readout")
    parser.add_argument("--cells", required=True, nargs="+", help="file of cells, or several")
    text = "write so many descriptions to read, drawn from all files, in place of the check"
    parser.add_argument("--sample", type=number(int, 1), metavar="N", help=text)
    text = "columns of obs with labels to show beside them, the first that a file has (%(default)s)"
    parser.add_argument("--label-keys", nargs="+", default=["cell_type"], metavar="COLUMN", help=text)
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the draws (%(default)s)")
    parser.add_argument("--output", help="JSON file to write; with --sample a table")
    args = parser.parse_args(argv)
    pipeline = ScMMGPTPipeline.from_pretrained(args.model)
    if args.sample is not None:
        table = pd.DataFrame(sample_rows(pipeline, args.cells, args.sample, args.label_keys, args.seed))
        if args.output:
            write_table(Path(args.output), table)
        sys.stdout.write("\n\n".join("\n".join(map(str, row[1:])) for row in table.itertuples()) + "\n")
        return 0
    found = {Path(path).stem: evaluate_proof(pipeline, read_file(path), args.seed) for path in args.cells}
    result = found if len(found) > 1 else next(iter(found.values()))
    if args.output:
        write_json(args.output, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0
