"""Match the variables of a file with the genes of a vocabulary.

`GeneIndex` finds a gene by symbol, previous symbol, alias, Ensembl id with or without version, or one-to-one ortholog
of another species. `match_genes` matches all variables of a file by the best column of names, and reports the matched
share of the genes and of the expression. `classify_features` sets antibodies, peaks and control probes aside. A gene
that a file does not measure is absent, not zero.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np


WARN_SHARE = 0.60  # a smaller share of matched genes gives a warning
REFUSE_SHARE = 0.20  # a smaller share of matched genes is an error, unless forced
N_EXAMPLES = 10  # unmatched genes in a report
MIN_GENES = 20  # fewer matches may be chance, whatever their share

ENSEMBL = re.compile(r"^(ENS[A-Z]{0,4}G\d{11})(?:\.\d+)?(?:_PAR_Y)?$", re.IGNORECASE)
EMBEDDED_ENSEMBL = re.compile(r"(?:^|[-_|:;,.( ]+)(ENS[A-Z]{0,4}G\d{11})(?:\.\d+)?(?:$|[-_|:;,.) ]+)")
GENOME = re.compile(r"^(hg\d+|GRCh\d+|mm\d+|GRCm\d+)(?:$|[_-]+(?=\S)|\b)", re.IGNORECASE)
PEAK = re.compile(r"^(chr)?(\d{1,2}|X|Y|MT?|GL\d+\.\d|KI\d+\.\d)[:_-]\d+[_-]\d+$", re.IGNORECASE)
# Antibodies and sample tags: TotalSeq, ADT and HTO; AbSeq of BD (`CD3:UCHT1|CD3E|AHS0231|pAbO`, also with the
# punctuation replaced by R); names that end in the sequence of a tag.
ANTIBODY = re.compile(
    r"(Total_?-?Seq[_-]?[A-D]?|Total[A-D]|ADT|anti[_-]?(human|mouse))\b|^(ADT|AB|PROT|HTO|CITE|Hashtag)[_.-]|"
    r"^(HTO|Hashtag)[_.-]?\d|[|._:-](pAbO|stAbO)$|\bAHS\d{4}\b|^SampleTag\d|[._-](?-i:[ACGT]{15})$",
    re.IGNORECASE,
)
# Proteins under names that no gene has: CD45RA, IgG1, "PD-L1 (CD274)", "HLA-A,B,C". Other proteins of the same file
# may have names of genes (CD4, CD19).
PROTEIN = re.compile(
    r"^CD45R[AO]\b|^((Mouse|Rat|Human|Hamster)[ _.-]?)?Ig(G|M|A|D)\d?[abc]?([ _.,-]|$)|\(CD\d+[a-z]*\)$|"
    r"^HLA[ -]?A[,/ -]+B[,/ -]+C\b"
)
MIN_PROTEINS = 3  # least number of such names
# Spike-ins, control probes and codewords, and the rows of htseq-count and STAR that are no genes.
CONTROL = re.compile(
    r"^(ERCC-\d{5}|(Blank|BLANK)[-_]?\d+|FalseCode\d+|Negative\d+|"
    r"(NegControl|NegPrb|SystemControl|(Unassigned|Deprecated)Codeword|antisense_|Intergenic_Region_).*|"
    r"__(no_feature|ambiguous|too_low_aQual|not_aligned|alignment_not_unique)|"
    r"N_(unmapped|multimapping|noFeature|ambiguous))$"
)
MADE_UNIQUE = re.compile(r"[-.]\d$")
EXCEL_DATE = re.compile(r"^(?:(\d{1,2})-(Mar|Sep)|(Mar|Sep)-0?(\d{1,2}))$")
MOUSE_SYMBOL = re.compile(r"^([A-Z][a-z0-9]+|mt-[A-Z][a-z0-9]+|[A-Z][a-z]+[A-Za-z0-9-]*|\d{7}[A-Z]\d{2}Rik)$")
HUMAN_SYMBOL = re.compile(r"^([A-Z][A-Z0-9.-]*|C\d+orf\d+)$")
# Names of mouse genes in capitals that no human gene has: predicted genes, RIKEN clones, haemoglobins, MHC,
# pseudogenes.
MOUSE_CAPITALS = re.compile(
    r"^(GM\d{3,5}|\d{7}[A-Z]\d{2}RIK|HB[AB]-(A|B[HST]|X|Y)\d?|H2-(?!KE)[A-Z]+\d*|[A-Z0-9]+-PS\d*)$"
)
MIN_MOUSE_CAPITALS = 3  # least number of such names; none of 25 human files has more than one (GM140)


class Species(NamedTuple):
    """Signs of a species in a file: declared name or taxon, prefix of gene ids, and spelling of symbols."""

    name: str
    latin: str
    taxon: str
    ensembl: str  # prefix of gene ids
    spelt_as: str | None  # human or mouse, if symbols have the same capitals; None for another spelling


SPECIES = (
    Species("human", "homo sapiens", "ncbitaxon:9606", "ENSG", "human"),  # CD3E
    Species("mouse", "mus musculus", "ncbitaxon:10090", "ENSMUSG", "mouse"),  # Cd3e
    Species("rhesus macaque", "macaca mulatta", "ncbitaxon:9544", "ENSMMUG", "human"),
    Species("cynomolgus macaque", "macaca fascicularis", "ncbitaxon:9541", "ENSMFAG", "human"),
    Species("pig", "sus scrofa", "ncbitaxon:9823", "ENSSSCG", "human"),
    Species("rat", "rattus norvegicus", "ncbitaxon:10116", "ENSRNOG", "mouse"),
    Species("zebrafish", "danio rerio", "ncbitaxon:7955", "ENSDARG", None),
    Species("chicken", "gallus gallus", "ncbitaxon:9031", "ENSGALG", "human"),
    Species("fruit fly", "drosophila melanogaster", "ncbitaxon:7227", "FBgn", None),
    Species("worm", "caenorhabditis elegans", "ncbitaxon:6239", "WBGene", None),
)
# Patterns of names that only one species has, and the least share of such names in a file of the species: annotation
# ids of FlyBase (CG14995, lncRNA:CR45845), and names of worm genes (unc-119, col-12).
OWN_NAMES = {
    "fruit fly": (re.compile(r"(?:.+:)?C[GR]\d{4,5}"), 0.05),
    "worm": (re.compile(r"[a-z]{3,4}-\d+(?:\.\d+)?"), 0.2),
}
OTHER_IDS = {
    "NCBI gene ids": re.compile(r"\d+"),
    "genes of C. elegans": re.compile(r"WBGene\d+"),
    "genes of the fruit fly": re.compile(r"FBgn\d+"),
}
# Words in a column of feature types. Biotypes (`protein_coding`, `lncRNA`) are no feature types.
GENE_FEATURE_TYPES = frozenset({"gene expression", "gene", "genes", "rna", "gex", "mrna", "", "nan"})
FEATURE_TYPES = {
    **dict.fromkeys(GENE_FEATURE_TYPES, "gene"),
    **dict.fromkeys(("antibody capture", "antibody", "antibodies", "protein", "proteins", "prot", "adt"), "antibody"),
    **dict.fromkeys(("peaks", "peak", "chromatin accessibility", "atac"), "peak"),
    **dict.fromkeys(("spike-in", "control probe", "negative control"), "control"),
}


class GeneIndex:
    """The genes of a vocabulary, with all other names of each gene.

    Args:
        vocabulary: Gene symbol -> id. Names in angle brackets (`<pad>`, `<cls>`) are special tokens, not genes.
        aliases: Other name (previous symbol, alias, Ensembl id without version) -> symbol; or the contents of
            `gene_aliases.json`, `{"aliases": ..., "orthologs": ...}`.
        orthologs: Species -> gene symbol or id of the species -> name of the one-to-one ortholog in the vocabulary.

    Raises:
        ValueError: If the vocabulary has special tokens only.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        aliases: Mapping[str, Any] | None = None,
        orthologs: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.vocabulary = {name: int(i) for name, i in vocabulary.items() if name[:1] != "<" or name[-1] != ">"}
        if not self.vocabulary:
            raise ValueError(f"The gene vocabulary has no genes ({len(vocabulary)} entries, all special tokens).")
        aliases = aliases or {}
        if isinstance(aliases.get("aliases"), Mapping):
            aliases, orthologs = aliases["aliases"], aliases.get("orthologs")
        self.aliases = dict(aliases)
        self.orthologs = {species: dict(table) for species, table in (orthologs or {}).items()}
        self.species = detect_species(list(self.vocabulary))[0]

    # The next two tables are made on first use: workers match no genes, and most files are of one species.

    @cached_property
    def _folded(self) -> dict[str, int]:
        """Symbol in capitals -> id: some files have `C1ORF112` for `C1orf112`.

        Symbols that differ in case only are left out.
        """
        return {key: self.vocabulary[name] for key, name in _folded_keys(self.vocabulary).items()}

    @cached_property
    def _folded_orthologs(self) -> dict[str, dict[str, str]]:
        """Species -> name in capitals -> name, as `_folded`."""
        return {species: _folded_keys(table) for species, table in self.orthologs.items()}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def translates(self, species: str | None) -> bool:
        """Whether orthologs map genes of `species` to the vocabulary."""
        return species in self.orthologs and species != self.species

    def lookup(self, name: str, species: str | None = None) -> tuple[int, str]:
        """Find one gene.

        Args:
            name: Symbol, alias, Ensembl id with or without version, or a symbol joined with an Ensembl id.
            species: Species of the file; `None` for the species of the vocabulary.

        Returns:
            Id in the vocabulary, or -1; kind of the match: `symbol`, `ensembl`, `alias`, `case`, `excel date`,
            `ortholog` or `unmatched`.
        """
        name = name.strip()
        ensembl = ENSEMBL.match(name)
        key = ensembl.group(1).upper() if ensembl else name
        if species is not None and self.translates(species):
            table, in_one_case = self.orthologs[species], name.islower() or name.isupper()
            folded = self._folded_orthologs[species].get(name.upper(), key) if in_one_case else key
            names = (key, _embedded(name), EMBEDDED_ENSEMBL.sub("", name), folded)
            found = next(
                (self.vocabulary[table[n]] for n in names if n in table and table[n] in self.vocabulary), None
            )
            return (-1, "unmatched") if found is None else (found, "ortholog")
        if key in self.vocabulary:  # a vocabulary has symbols or Ensembl ids
            return self.vocabulary[key], "ensembl" if ensembl else "symbol"
        found = self.vocabulary.get(self.aliases.get(key, ""))
        if found is not None:
            return found, "ensembl" if ensembl else "alias"
        if ensembl:
            return -1, "unmatched"
        embedded = _embedded(name)
        if embedded is not None:
            found, how = self.lookup(embedded)
            rest = EMBEDDED_ENSEMBL.sub("", name)
            return (found, how) if found >= 0 or not rest else self.lookup(rest)  # a retired id: match the symbol
        for changed in (name.replace(".", "-"), name.replace("-", "_")):  # undo changes of make.names (R) and Seurat
            if changed in self.vocabulary:
                return self.vocabulary[changed], "alias"
        date = EXCEL_DATE.match(name)
        if date:
            return self._from_date(date.group(1) or date.group(4), date.group(2) or date.group(3))
        found = self._folded.get(name.upper()) if species in (None, self.species) else None
        return (-1, "unmatched") if found is None else (found, "case")

    def _from_date(self, number: str, month: str) -> tuple[int, str]:
        """The match of a gene that a spreadsheet turned into a date, such as SEPT2.

        1-Mar and 2-Mar have no match: they may be MARCH1 or MARC1, MARCH2 or MARC2.
        """
        n = int(number)
        names = (f"SEPTIN{n}", f"SEPT{n}") if month == "Sep" else (f"MARCHF{n}", f"MARCH{n}") if n > 2 else ()
        found = next((self.vocabulary[name] for name in names if name in self.vocabulary), None)
        return (-1, "unmatched") if found is None else (found, "excel date")


def _folded_keys(names: Mapping[str, Any]) -> dict[str, str]:
    """Name in capitals -> name, for names that are unique in capitals."""
    capitals = [name.upper() for name in names]
    times = Counter(capitals)
    return {key: name for key, name in zip(capitals, names, strict=True) if times[key] == 1}


def _embedded(name: str) -> str | None:
    """The Ensembl id in a name such as `CD3E_ENSG00000198851`."""
    found = EMBEDDED_ENSEMBL.search(name)
    return found.group(1).upper() if found else None


@dataclass
class GeneMatch:
    """The match of a file's variables with the vocabulary."""

    ids: np.ndarray  # int32 `(n_vars,)`: id in the vocabulary, or -1
    how: np.ndarray  # str `(n_vars,)`: kind of the match (`GeneIndex.lookup`), or the feature type set aside
    is_gene: np.ndarray  # bool `(n_vars,)`: False for antibodies, peaks and other features set aside
    report: dict[str, Any]  # numbers and examples, in JSON types

    @property
    def measured(self) -> np.ndarray:
        """Vocabulary ids of the genes that the file measures, ascending."""
        return np.unique(self.ids[self.ids >= 0])


def detect_species(names: Sequence[str]) -> tuple[str, str]:
    """Detect the species of gene names: the species, or `unknown`, and the evidence in words."""
    names = names[:: 1 + len(names) // 4000]
    n = max(1, len(names))
    ids = (ENSEMBL.match(name) or EMBEDDED_ENSEMBL.search(name) for name in names)
    prefixes = Counter(ensembl.group(1).upper()[:-11] for ensembl in ids if ensembl)  # ids without the number
    prefix, count = prefixes.most_common(1)[0] if prefixes else ("", 0)
    # In a file of symbols, only genes without a symbol have ids: 5 % of ids prove a species, human excepted.
    if count > (0.5 if prefix == "ENSG" else 0.05) * n:
        species = next((candidate.name for candidate in SPECIES if candidate.ensembl == prefix), "unknown")
        return species, f"{count / n:.0%} of the names start with {prefix}"
    for species, (own, least) in OWN_NAMES.items():
        matches = [name for name in names if own.fullmatch(name)]
        if len(matches) > least * n:
            return species, f"{len(matches) / n:.0%} of the names have a form that no other species has ({matches[0]})"
    mouse = sum(bool(MOUSE_SYMBOL.match(name)) for name in names) / n
    human = sum(bool(HUMAN_SYMBOL.match(name)) for name in names) / n
    if mouse > 0.4 and mouse > 2 * human:
        return "mouse", f"{mouse:.0%} of the names are spelt like mouse symbols (Cd3e)"
    in_capitals = [name for name in names if MOUSE_CAPITALS.match(name)]
    if human > 0.4 and human > 2 * mouse and len(in_capitals) >= MIN_MOUSE_CAPITALS:
        return "mouse", f"{len(in_capitals)} of the names are mouse genes in capitals ({in_capitals[0]})"
    if human > 0.4 and human > 2 * mouse:
        return "human", f"{human:.0%} of the names are spelt like human symbols (CD3E)"
    return "unknown", f"{human:.0%} of the names are spelt like human symbols (CD3E), {mouse:.0%} like mouse (Cd3e)"


def find_species(word: Any) -> Species | None:
    """The species of a word such as `human`, `Homo_sapiens`, `NCBITaxon:9606` or `9606`; `None` if unknown."""
    word = str(word).strip().lower().replace("_", " ")
    taxon = re.fullmatch(r"(?:ncbitaxon[: ])?(\d+)", word)
    word = f"ncbitaxon:{taxon[1]}" if taxon else word
    return next((s for s in SPECIES if word in (s.name, s.latin, s.taxon) or s.latin in word), None)


def _species(columns: Mapping[str, Sequence[str]], organism: str | None) -> tuple[str, str, str]:
    """Species of the genes; species that the data declare ("" for none); evidence for the species of the genes."""
    found = find_species(organism)
    word = str(organism or "").strip()
    declared = "" if word.casefold() in ("unknown", "na", "nan", "none") else found.name if found else word
    guesses = [guess for guess in (detect_species(names) for names in columns.values()) if guess[0] != "unknown"]
    if not guesses:
        why = f"the data declare {declared}" if declared else "the names are ambiguous"
        return found.name if found else "unknown", declared, why
    # Ids prove a species. Spelling does not, so a declared species with the same spelling has priority.
    species, why = next((guess for guess in guesses if "start with" in guess[1]), guesses[0])
    if found is not None and "start with" not in why and species == found.spelt_as:
        return found.name, declared, why
    return species, declared, why


def classify_features(
    names: Sequence[str], *, feature_types: Sequence[str] | None = None, genomes: Sequence[str] | None = None
) -> np.ndarray:
    """Type of each variable, `(n_vars,)` of str.

    Args:
        names: Names of the variables.
        feature_types: The column `feature_types` of 10x. Without the column, names identify antibodies.
        genomes: Genome of each variable, for a mixture of species; by default the prefix of the name.

    Returns:
        `gene`, `antibody`, `peak`, `control`, `mouse genome` (in a mixture with human), or the word of the file.
    """
    types = np.full(len(names), "gene", dtype=object)
    for i, name in enumerate(names):
        if CONTROL.match(name):
            types[i] = "control"
        elif PEAK.match(name):
            types[i] = "peak"
        elif feature_types is None and ANTIBODY.search(name):
            types[i] = "antibody"
    for i, feature_type in enumerate(() if feature_types is None else feature_types):
        word = str(feature_type).strip().lower()
        kind = FEATURE_TYPES.get(word, word)
        if kind in ("antibody", "peak") or (kind != "gene" and types[i] == "gene"):
            types[i] = kind
    matches = [GENOME.match(str(name)) for name in (names if genomes is None else genomes)]
    mouse = np.array([m is not None and m.group(1).lower().startswith(("mm", "grcm")) for m in matches], dtype=bool)
    if mouse.any() and any(m is not None and m.group(1).lower().startswith(("hg", "grch")) for m in matches):
        types[mouse & (types == "gene")] = "mouse genome"
    return types


def are_feature_types(values: Sequence[str]) -> bool:
    """Whether a column holds the feature types of 10x, and not biotypes, for which CELLxGENE uses the same name."""
    words = {str(value).strip().lower() for value in values}
    return "gene expression" in words or words <= FEATURE_TYPES.keys()


def match_genes(
    columns: Mapping[str, Sequence[str]],
    gene_index: GeneIndex,
    *,
    types: np.ndarray,
    organism: str | None,
    weights: np.ndarray,
) -> GeneMatch:
    """Match the variables of a file with the vocabulary.

    Args:
        columns: Columns with names of the variables. The best column is used first, the others for unmatched
            variables.
        gene_index: The genes of the model.
        types: The result of [`classify_features`]; all types except `gene` are set aside.
        organism: Species that the data declare (name or NCBITaxon id), overruled by names that identify another
            species.
        weights: `(n_vars,)`: expression of each variable, for the matched share of the expression.
    """
    columns = {key: [GENOME.sub("", str(n).strip()) or str(n) for n in column] for key, column in columns.items()}
    is_gene = types == "gene"
    genes = np.flatnonzero(is_gene).tolist()
    species, declared, why = _species({key: [column[v] for v in genes] for key, column in columns.items()}, organism)

    # step 1: the best column, then the others for unmatched variables
    results = {key: {v: gene_index.lookup(column[v], species) for v in genes} for key, column in columns.items()}
    n_found = {key: sum(i >= 0 for i, _ in result.values()) for key, result in results.items()}
    order = sorted(results, key=lambda key: -n_found[key])
    ids, how = np.full(len(types), -1, dtype=np.int32), types.astype(object)
    used: list[str] = []
    for key in order:
        fill = [v for v in genes if ids[v] < 0 and (not used or results[key][v][0] >= 0)]
        if not used or (fill and n_found[key] >= REFUSE_SHARE * len(genes)):
            used.append(key)
            for v in fill:
                ids[v], how[v] = results[key][v]

    # step 2: `var_names_make_unique` turned the second MATR3 into MATR3-1, which is the same gene
    best = columns[order[0]]
    for v in [v for v in genes if ids[v] < 0]:
        stem = MADE_UNIQUE.sub("", best[v])
        if stem != best[v]:
            gene, kind = gene_index.lookup(stem, species)
            if kind in ("symbol", "ortholog"):
                ids[v], how[v] = gene, "made unique"

    report = {"columns": used, "species": species, "species_evidence": why, "species_declared": declared}
    match = GeneMatch(ids, how, is_gene, report)
    report |= _count_matches(match, best, len(gene_index), weights)
    return match


def _count_matches(match: GeneMatch, names: Sequence[str], n_vocabulary: int, weights: np.ndarray) -> dict[str, Any]:
    """Numbers of matched variables, their share of the expression, and the unmatched genes of highest expression."""
    matched, is_gene = match.ids >= 0, match.is_gene
    n_matched, n_genes, distinct = int(matched.sum()), int(is_gene.sum()), len(np.unique(match.ids[matched]))
    counts: dict[str, Any] = {
        "variables": len(match.ids),
        "genes": n_genes,
        "matched": n_matched,
        "share_matched": round(n_matched / max(1, n_genes), 5),
        "vocabulary": n_vocabulary,
        "vocabulary_measured": distinct,
        "duplicates_summed": n_matched - distinct,
        "how": {str(k): int(v) for k, v in Counter(match.how[is_gene].tolist()).items()},
        "set_aside": {str(k): int(v) for k, v in Counter(match.how[~is_gene].tolist()).items()},
    }
    proteins = [names[v] for v in np.flatnonzero(is_gene).tolist() if PROTEIN.search(names[v])]
    if len(proteins) >= MIN_PROTEINS:
        counts["like_proteins"] = proteins[:N_EXAMPLES]
    unmatched = np.flatnonzero(~matched & is_gene)
    total = float(weights[is_gene].sum())
    if total > 0:
        counts["share_expression_matched"] = round(float(weights[matched].sum() / total), 5)
        unmatched = unmatched[np.argsort(-weights[unmatched], kind="stable")]
        counts["largest_unmatched_shares"] = [round(float(weights[v] / total), 7) for v in unmatched[:N_EXAMPLES]]
    counts["largest_unmatched"] = [names[v] for v in unmatched[:N_EXAMPLES].tolist()]
    return counts


def check_types(types: np.ndarray) -> None:
    """Raise ValueError if no variable is a gene; `types` is the result of [`classify_features`]."""
    if not (types == "gene").any():
        kinds = ", ".join(f"{n} of type {str(kind)!r}" for kind, n in Counter(types.tolist()).items())
        raise ValueError(f"No variable is a gene ({kinds}); pass the RNA part of the data.")


def _words_around(names: Sequence[str], gene_index: GeneIndex) -> tuple[str, str] | None:
    """What stands before and after the gene in each of some names, such as `rna_` or `b'` and `'`; None for nothing.

    >>> _words_around(["b'CD3E'", "b'CD19'"], GeneIndex({"CD3E": 0, "CD19": 1}))
    ("b'", "'")
    """
    before = commonprefix(list(names))
    after = commonprefix([name[::-1] for name in names])[::-1]
    lengths = sorted(product(range(len(before) + 1), range(len(after) + 1)), key=sum)
    for first, last in lengths[1:]:
        found = (gene_index.lookup(name[first : len(name) - last])[0] for name in names)
        if 2 * sum(number >= 0 for number in found) > len(names):
            return before[:first], after[len(after) - last :]
    return None


def check_match(match: GeneMatch, gene_index: GeneIndex, *, force: bool) -> list[str]:
    """Refuse a poor match, unless `force` is True, and return warnings.

    The denominator of the matched share is the number of genes of the file or of the vocabulary, whichever is smaller:
    neither a panel of 300 genes nor a vocabulary of 800 genes is a mistake.

    Raises:
        ValueError: If no gene matches. Without `force`, also if less than `REFUSE_SHARE` of the genes match, or fewer
            than `MIN_GENES` genes of a large vocabulary.
    """
    r = match.report
    n_genes, n_known, measured, species = r["genes"], len(gene_index), r["vocabulary_measured"], r["species"]
    possible = min(n_genes, n_known)
    share = measured / possible
    foreign = species not in ("unknown", gene_index.species) and gene_index.species != "unknown"
    few = measured < MIN_GENES <= n_known / 10
    largest = f"unmatched genes of the highest expression: {', '.join(r['largest_unmatched'][:5])}"
    details = f"{share:.1%}; {largest}" if r["largest_unmatched"] else f"{share:.1%}"
    finding = f"Only {measured} of {possible} genes match the model's vocabulary ({details}). "
    way_out = "Name the column of `var` that has gene symbols or Ensembl ids with `gene_column=`."
    examples = r["largest_unmatched"]
    in_lower_case = [name for name in examples if name.islower() and gene_index.lookup(name.upper())[0] >= 0]
    is_strange = species == "unknown" and r["species_declared"] and share < REFUSE_SHARE
    if is_strange:
        way_out = (
            f"The data declare {r['species_declared']}, a species without an ortholog table (the model has: "
            f"{', '.join(sorted(gene_index.orthologs)) or 'none'}): map the genes to {gene_index.species} genes first."
        )
    elif share < REFUSE_SHARE and (around := _words_around(examples, gene_index)) is not None:
        removals = zip(("prefix", "suffix"), around, strict=True)
        code = "".join(f".str.remove{end}({word!r})" for end, word in removals if word)
        way_out = f"They match without what is around each gene: write `adata.var_names = adata.var_names{code}`."
    elif species == "unknown" and 2 * len(in_lower_case) > len(examples):
        way_out = (
            f"The names match in capitals ({in_lower_case[0].upper()}): name the species with `organism=`, or, if the "
            f"cells are {gene_index.species}, write `adata.var_names = adata.var_names.str.upper()`."
        )
    elif kinds := [kind for kind, ids in OTHER_IDS.items() if examples and all(map(ids.fullmatch, examples))]:
        way_out = f"The names are {kinds[0]}: map the names to {gene_index.species} symbols or Ensembl ids first."
    elif foreign and not gene_index.translates(species):
        way_out = (
            f"These are {species} genes ({r['species_evidence']}), and the model has no ortholog table for {species} "
            f"(it has: {', '.join(sorted(gene_index.orthologs)) or 'none'}): map to {gene_index.species} genes first."
        )
    elif foreign:
        way_out = (
            f"The names were read as {species} genes ({r['species_evidence']}); name another species with "
            "`organism=`, or the column of `var` that has symbols with `gene_column=`."
        )
    elif share >= WARN_SHARE:
        way_out = "The names are right, but the file has few genes: pass a file that has more of the model's genes."
    elif measured >= MIN_GENES:  # matches that are no chance: the column is right, and the model knows few genes
        if n_known < n_genes:
            finding = f"The file has only {measured} of the {n_known} genes that the model knows ({share:.1%}). "
        way_out = (
            f"The model knows {n_known} genes and ignores the others; a model that was trained on more genes, or on "
            "such cells, reads more. If another column of `var` has better names, pass the column with `gene_column=`."
        )
    finding += way_out
    if measured == 0 or ((share < REFUSE_SHARE or few) and not force):
        by_force = " Or pass `force=True` to read the matching genes." if measured and not is_strange else ""
        raise ValueError(finding + by_force)
    messages = [finding] if share < WARN_SHARE or few else []
    if not messages and r.get("share_expression_matched", 1.0) < WARN_SHARE:
        messages.append(
            f"The genes that match the model's vocabulary hold only {r['share_expression_matched']:.1%} of the "
            f"expression; {largest}."
        )
    if proteins := r.get("like_proteins"):
        messages.append(
            f"Some columns have names of proteins ({', '.join(proteins[:3])}), and nothing tells proteins from genes: "
            "a protein that has the name of a gene (CD4, CD19) is read as that gene. Leave proteins out, or write "
            "'Antibody Capture' for them and 'Gene Expression' for genes in `adata.var['feature_types']`."
        )
    is_species = find_species(r["species_declared"]) or re.fullmatch("[A-Z][a-z]+ [a-z]+", r["species_declared"])
    if is_species and species not in ("unknown", r["species_declared"]):
        messages.append(f"The data declare {r['species_declared']}, but {r['species_evidence']}: read as {species}.")
    if foreign:
        by = "one-to-one orthologs" if gene_index.translates(species) else "symbols of equal spelling"
        messages.append(
            f"{r['matched']} of {r['genes']} {species} genes were mapped by {by}; the model was trained on "
            f"{gene_index.species} cells: interpret the results with caution."
        )
    return messages
