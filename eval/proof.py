r"""Check descriptions against counts, and measure which planted false statements the check finds.

```
python -m scmmgpt.eval proof --model CHECKPOINT --cells cells.h5ad --output out.json
```

The check uses only texts and counts: no labels, scores or model. The kind of a cell is the set of cells whose texts
name the same type. A sentence is unsupported if it has another form than the sentences of `describe --proof`, if a
gene does not have the stated count, or if its condition does not hold:

| sentence | supported if |
| --- | --- |
| type | each gene has a higher mean in the kind than in all other cells; no other kind of ten cells or more has a \
higher naive Bayes likelihood of these genes; the text mentions the genes of a lineage that excludes the type |
| against | the genes are those of a lineage that the cell expresses, and the type excludes the lineage |
| programme | three genes of the list are named; the expression of the cell exceeds the stated share of the kind, and \
half of the kind; the counts are twice those of the lower quartile, significantly |
| unusual | each gene has twice the mean of the kind, and exceeds nine in ten cells of the kind |
| alternative, undecided | each gene has a higher mean in cells of its type than in cells of the other type |

For a type with fewer than 20 cells, the file does not show which counts are usual. Lineage genes then decide
(`LINEAGES`: CD3 and T cell receptor chains refute "natural killer cell"). If the cell does not express a lineage of
the type, a text without a fault is not decidable.

False statements are planted in true texts one at a time: see `LIES`. With `--sample`, the command draws descriptions
from several files for a human reader, with the genes that stand out in each cell.
"""

import functools
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

from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.results import write_table
from scmmgpt.eval.task import COUNT, NATURAL, write_result
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
ROUNDING = 1e-3  # relative rounding error of a count in a text
HIGH = 95  # percentage of the kind that a planted statement claims for a programme
MIN_KIND, MIN_RIVAL = 20, 10  # fewest cells of a kind that show what is usual, and of a kind that refutes another
SMOOTHING = 0.1  # pseudocount of each gene in naive Bayes
FEW, CHANCE = 0.4, 1e-3  # smallest expected count of a programme, and the significance level of its Poisson test
Lie: TypeAlias = Callable[["Checker", int, np.random.Generator], str | None]


def sentences(text: str) -> list[str]:
    """Split a text into sentences."""
    return re.split(r"(?<=\.) (?=[A-Z])", text)


def kind_of(text: str) -> str:
    """Type that the first sentence of a text names; "" for none."""
    match = SENTENCES["type"].fullmatch(sentences(text)[0])
    return match["kind"] if match else ""


@functools.cache
def term_of(name: str) -> str:
    """Cell Ontology id of a type; the name itself if the ontology lacks the type."""
    return ontology.match_label("cell_type", name)[0] or name


@functools.cache
def lineage(name: str) -> frozenset[str]:
    """Cell Ontology ids of a type (a name, or the id of a lineage) and of its ancestors; see [`term_of`]."""
    term = name if name in LINEAGE_TERMS.values() else term_of(name)
    return frozenset([term, *(ontology.ancestors(term) if term.startswith("CL:") else ())])


class Checker:
    """Checks texts, one for each cell, against the counts of a file.

    `counts` are raw counts `(n_cells, n_genes)`, `sizes` the library sizes `(n_cells,)`.
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
        """Whether two types exclude each other: no type of the file is a subtype of both.

        A type and its ancestor don't exclude each other. Neither do "phagocyte" and "myeloid cell" if the file has
        macrophages.
        """
        both = lineage(one) | lineage(other)
        return not any(both <= lineage(name) for name in (one, other, *self.kinds))

    def better_kinds(self, kind: str, genes: Sequence[str]) -> list[str]:
        """List the kinds, among those that exclude `kind`, with a higher naive Bayes likelihood of the genes."""
        columns = [self.column[gene] for gene in genes]
        rivals = [name for name, cells in self.kinds.items() if cells.sum() >= MIN_RIVAL and self.excludes(name, kind)]
        own = self.log_shares[kind][columns].sum() if kind in self.log_shares else -np.inf
        return [name for name in rivals if self.log_shares[name][columns].sum() > own]

    def rates(self, name: str) -> np.ndarray:
        """Share of a gene, or of the genes of a programme, in the counts of every cell, float64 `(n_cells,)`."""
        if name not in self.known:
            columns = [self.column[gene] for gene in LISTS.get(name, {name}) if gene in self.column]
            self.known[name] = np.asarray(self.counts[:, columns].sum(axis=1)).ravel() / self.sizes
        return self.known[name]

    def lineages_against(self, cell: int, kind: str) -> dict[str, list[str]]:
        """Lineages that a cell expresses although its type excludes them: lineage -> expressed genes."""
        against = {}
        for name, genes in self.lineages(cell).items():
            term = LINEAGE_TERMS[name]
            if term not in lineage(kind) and term_of(kind) not in lineage(term):
                against[name] = genes
        return against

    def lineages(self, cell: int) -> dict[str, list[str]]:
        """Lineages that a cell expresses: lineage -> genes at `LINEAGE_FOLD` times the mean of the file or more."""
        expressed = {}
        for line in LINEAGES:
            genes = [gene for gene in line.genes if gene in self.column]
            here, usual = ({gene: of(self.rates(gene)) for gene in genes} for of in (lambda r: r[cell], np.mean))
            shown = [gene for gene in genes if here[gene] > 0 and here[gene] >= LINEAGE_FOLD * usual[gene]]
            if len(shown) >= MIN_LINEAGE_GENES and sum(here.values()) >= LINEAGE_FOLD * sum(usual.values()):
                expressed[line.name] = shown
        return expressed

    def is_rare(self, kind: str) -> bool:
        """Whether the file has fewer than `MIN_KIND` cells of a type."""
        return kind not in self.kinds or self.kinds[kind].sum() < MIN_KIND

    def verdict(self, cell: int, text: str) -> str:
        """Judge a text about a cell: "supported", "unsupported" or "not decidable"."""
        if self.faults(cell, text):
            return "unsupported"
        kind = kind_of(text)
        shown = {above for name in self.lineages(cell) for above in lineage(LINEAGE_TERMS[name])}
        return "not decidable" if kind and self.is_rare(kind) and term_of(kind) not in shown else "supported"

    def faults(self, cell: int, text: str) -> list[str]:
        """List the contradictions between a text about a cell and the counts."""
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
                mentions = "" if self.is_rare(kind) else text  # of a rare type, a mentioned lineage counts, too
                against = self.lineages_against(cell, kind).items()
                found += [f"{g} speak against {kind}" for name, g in against if f"genes of {name}." not in mentions]
            elif form == "against":
                if names != self.lineages_against(cell, kind).get(parts["lineage"]):
                    found.append(f"{names} do not speak against {kind}")
            elif form == "programme":
                found += self.programme_faults(cell, parts, names, others)
            elif form == "unusual":
                found += [f"{gene} is usual" for gene in names if not self.is_unusual(cell, gene, others)]
            elif form in ("alternative", "undecided"):
                one, other = parts.get("one") or parts["other"], parts["other"] if form == "undecided" else kind
                if one == other or one not in self.kinds or other not in self.kinds:
                    found.append(f"{one} is not an alternative to {other}")
                    continue
                for mine, theirs, shown in ((one, other, names), (other, one, [gene for gene, _ in more])):
                    pair = self.kinds[mine], self.kinds[theirs]
                    found += [f"{gene} is not of {mine}" for gene in shown if not self.is_higher(gene, *pair, cell)]
        return found

    def has(self, cell: int, gene: str, count: float) -> bool:
        """Whether a gene has this count in a cell, and the count is above 0."""
        if gene not in self.column or not count > 0:
            return False
        return abs(self.by_cell[cell, self.column[gene]] - count) <= ROUNDING * count

    def standing_out(self, cell: int) -> str:
        """List, as text, the ten genes furthest above the mean of the file, with counts and percentiles.

        Genes are ranked by share * log(share / mean share).
        """
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
        """Whether the mean share of a gene is higher in `group` than in `rest` (bool masks), without the cell."""
        rates, means = self.rates(gene), []
        for cells in (group, rest):
            n = cells.sum() - cells[cell]
            means.append((rates[cells].sum() - rates[cell] * cells[cell]) / n if n else 0.0)
        return means[0] > means[1] or not group.any()  # the only cell of a kind can't be compared

    def is_unusual(self, cell: int, gene: str, others: np.ndarray) -> bool:
        """Whether a cell has twice the mean share of a gene among `others`, and more than nine in ten of them."""
        rates = self.rates(gene)
        usual = rates[others]
        return len(usual) > 0 and rates[cell] >= 2 * usual.mean() and (usual < rates[cell]).mean() >= 0.9

    def programme_faults(self, cell: int, parts: dict[str, str], names: list[str], others: np.ndarray) -> list[str]:
        """List the faults of a sentence about a programme."""
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


# -- planted false statements -----------------------------------------------------------------------------------------


def other_type(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """Replace the type by one that excludes it; keep the genes."""
    text = checker.texts[cell]
    kind = kind_of(text)
    names = [name for name in checker.kinds if kind and checker.excludes(name, kind)]
    if not names:
        return None
    lie = text.replace(f" {kind}", f" {rng.choice(names)}", 1)
    return re.sub(r"^An? (?=[aeiou])", "An ", re.sub(r"^An? ", "A ", lie))


def other_markers(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """Replace type and genes by those of a cell of another type."""
    kind = kind_of(checker.texts[cell])
    strangers: Any = np.flatnonzero(~checker.kinds[kind]) if kind else []
    strangers = [i for i in strangers if kind_of(checker.texts[i])]
    if not strangers:
        return None
    first = sentences(checker.texts[rng.choice(strangers)])[0]
    return " ".join([first, *sentences(checker.texts[cell])[1:]])


def silent_gene(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """Replace a named gene by a gene without a count."""
    named = list(re.finditer(GENE, checker.texts[cell]))
    silent = np.setdiff1d(np.arange(len(checker.symbols)), checker.by_cell[cell].indices)
    if not named or not len(silent):
        return None
    place = named[rng.integers(len(named))]
    gene = checker.symbols[rng.choice(silent)]
    return checker.texts[cell][: place.start(1)] + gene + checker.texts[cell][place.end(1) :]


def other_programme(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """Replace the name of a programme by the name of another programme."""
    named = [phrase for phrase in LISTS if f"{phrase}:" in checker.texts[cell]]
    if not named:
        return None
    phrase = rng.choice([phrase for phrase in LISTS if phrase not in named])
    return checker.texts[cell].replace(f"{rng.choice(named)}:", f"{phrase}:")


def strange_programme(checker: Checker, cell: int, rng: np.random.Generator) -> str | None:
    """Add a programme that is not high in the cell, with true counts of its genes and a false percentage."""
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
    """Take the text of another cell of the same type."""
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
    """Describe cells with proof, and make a [`Checker`] of the texts and the counts of all genes."""
    pipeline.describe(adata, proof=True)
    cells, _ = pipeline.processor.read_cells(adata)
    ids = np.unique(cells.gene_ids)
    matrix = cells.to_csr(int(ids.max()) + 1)[:, ids]
    texts = adata.obs["scmmgpt_description"].tolist()
    return Checker(texts, matrix, pipeline.processor.gene_symbols(ids.tolist()), cells.library_sizes())


def sample_rows(
    pipeline: ScMMGPTPipeline, paths: Sequence[str], n_cells: int, label_keys: Sequence[str], seed: int
) -> Iterator[dict[str, str]]:
    """Draw cells at random, the same number from each file, and describe them for a human reader.

    Yields:
        Rows of `file`, `cell`, `given` (value of the first of the columns `label_keys` in the file), `text`, `verdict`
        of the check, and `genes` (see [`Checker.standing_out`]).
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
    """Describe cells, check every description, and plant each false statement of `LIES` in every possible cell.

    Returns:
        JSON-able dict: `n_cells`, `clauses` (mean per cell), `no_type`, `unsupported` and `not_decidable` (shares of
        the descriptions), `faults` (of five texts) and `lies`: statement -> `told` (number planted), `not_decidable`
        and `caught` (share of the decidable texts that the check finds unsupported).
    """
    checker = describe(pipeline, adata)
    texts = checker.texts
    faults = {i: faults_of for i, text in enumerate(texts) if (faults_of := checker.faults(i, text))}
    rng, lies = np.random.default_rng(seed), {}
    for name, lie in LIES.items():
        told = [(cell, text) for cell in range(len(texts)) if (text := lie(checker, cell, rng)) is not None]
        verdicts = [checker.verdict(cell, text) for cell, text in told]
        n, open_ = verdicts.count("unsupported"), verdicts.count("not decidable")
        caught = n / (len(told) - open_) if len(told) > open_ else None
        lies[name] = {"told": len(told), "not_decidable": open_, "caught": caught}
    return {
        "n_cells": len(texts),
        "clauses": float(np.mean([len(sentences(text)) for text in texts])),
        "no_type": float(np.mean([not kind_of(text) for text in texts])),
        "unsupported": len(faults) / len(texts),
        "not_decidable": float(np.mean([checker.verdict(i, text) == "not decidable" for i, text in enumerate(texts)])),
        "faults": {texts[i]: faults_of for i, faults_of in list(faults.items())[:5]},
        "lies": lies,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval proof", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint with a label readout")
    parser.add_argument("--cells", required=True, nargs="+", help="file of cells, or several")
    text = "skip the check, and write this number of descriptions, drawn from all files, for a human reader"
    parser.add_argument("--sample", type=COUNT, metavar="N", help=text)
    text = "obs columns of labels to show with the descriptions; the first column in a file is used (%(default)s)"
    parser.add_argument("--label-keys", nargs="+", default=["cell_type"], metavar="COLUMN", help=text)
    parser.add_argument("--seed", type=NATURAL, default=0, help="seed of the draws (%(default)s)")
    parser.add_argument("--output", help="JSON file to write; with --sample a table")
    args = parser.parse_args(argv)
    pipeline = ScMMGPTPipeline.from_pretrained(args.model)
    if args.sample is not None:
        table = pd.DataFrame(sample_rows(pipeline, args.cells, args.sample, args.label_keys, args.seed))
        if args.output:
            write_table(Path(args.output), table)
        sys.stdout.write("\n\n".join("\n".join(map(str, row[1:])) for row in table.itertuples()) + "\n")
        return 0
    by_file = {Path(path).stem: evaluate_proof(pipeline, read_file(path), args.seed) for path in args.cells}
    result = by_file if len(by_file) > 1 else next(iter(by_file.values()))
    return write_result(result, args.output)
