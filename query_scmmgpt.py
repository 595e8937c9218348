"""Search texts, split into wanted cells, denials, and levels of genes and programmes.

The embedding of "T cells without CD8" is near the cells that the text excludes, and the embedding of "T cells with
high interferon" is near all T cells. Denials and levels are therefore scored separately: genes and programmes by
expression, other words by similarity. All scores are in standard deviations over the searched cells.

| words | score |
| --- | --- |
| without, lacking, but not, `, not`, `-negative` | minus a gene or programme; minus another text, if it fits better |
| high, higher, more, strong; low, lower, less, fewer X | plus or minus a gene or a programme |
| more X than Y | X minus Y; X alone if Y is no gene or programme ("than usual") |
| more like X than Y | the difference of two similarities |
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .cells_scmmgpt import Cells
from .genes_scmmgpt import GeneIndex
from .labels_scmmgpt import ABBREVIATIONS, EVERYDAY
from .programmes_scmmgpt import PROGRAMMES
from .unseen_scmmgpt import named_genes


EITHER = re.compile(r"\s+(?:and|or|nor)\s+(?:an?\s+)?|\s*/\s*")
LEVELS = dict.fromkeys(("high", "higher", "more", "strong", "stronger"), 1)
LEVELS |= dict.fromkeys(("low", "lower", "less", "fewer"), -1)
ANY_LEVEL = "|".join(LEVELS)
DENIAL = re.compile(
    r",?\s*\b(?:without|lacking|excluding|negative for|except(?: for)?|but (?:not|no)|^(?:anything|everything|all) but"
    r"|(?:which|that) is not(?= an? )|(?:(?:which|that) are not(?= [^,;.]*s\b)|^not?|(?<=, )not)"
    rf"(?! (?:{ANY_LEVEL}|expressing|showing|having|with)\b))"
    r"\s+(?:an?\s+)?(?P<after>[^,;.]+)"
    r"|(?P<before>\b[\w-]+?)-negative\b",
    re.IGNORECASE,
)
ANY_CELL = re.compile(r"(?:an?|any|all|the)?\s*cells?", re.IGNORECASE)
LEVEL = re.compile(
    r"(?:,?\s*\b(?:and|with|showing|expressing|(?:which|that) (?:is|are|has|have|show|shows|express|expresses)))*"
    rf",?\s*(?:\b(?P<not>not|no|never)\s+(?:(?:expressing|showing|having|with)\s+)?)?"
    rf"(?:\ban?\s+)?\b(?P<level>{ANY_LEVEL})\s+(?P<like>like\s+)?(?:(?:expression|levels?)\s+of\s+)?(?:an?\s+)?"
    rf"(?P<what>[^,;.]+?)(?:\s+than\s+(?:an?\s+)?(?P<than>[^,;.]+?))?(?=\s*(?:$|[,;.]|\band\s+(?:{ANY_LEVEL})\b))",
    re.IGNORECASE,
)
DENIED_LEVEL = re.compile(rf"(?P<level>{ANY_LEVEL})\s+(?:(?:expression|levels?)\s+of\s+)?(?P<what>.+)", re.IGNORECASE)
SYMBOL = re.compile(r"(?=.*\d)[A-Z][A-Z0-9-]{2,}")
# Words around the name of a programme: "a type I interferon response".
AROUND = re.compile(r"^type i |[ -](?:response|signature|programme|program|signall?ing|genes|activity|expression)$")
COUNTS_PER_10K = 1e4
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
STEM = 6  # letters of a stem, so that "antibodies" equals "antibody"
MIN_VOCABULARY = 500  # a checkpoint with fewer words cannot tell that a word is unknown
# Words without meaning for a search. "a" is an article: the A cell needs a capital letter.
COMMON = frozenset(
    """a after al all also an and any are as at be been before being between both but by can cell cells do each
    end few for from get had has have having he high higher how if in into is it its kind kinds lacking less
    let low lower may more most my negative no not of off on one or other out positive so some st such than
    that the their them these they this those through to top two type types us via was we were what when where
    which who whose why with within without you""".split()
)
# Words of states, and of training captions, that are in no name of a type.
STATES = frozenset("cancer tumour tumor malignant neoplastic dividing".split())
LETTERS = ("b", "d", "t")  # names of types that users also write in lower case


@dataclass(frozen=True)
class Level:
    """A comparison: `high` should exceed `low`.

    Args:
        high, low: Genes or programmes, or other words if `is_text`; "" for nothing.
        is_text: Whether similarities are compared, not expression.
    """

    high: str
    low: str
    is_text: bool = False


@dataclass(frozen=True)
class Query:
    """A search text in parts.

    Args:
        wanted: The text without its denials and levels; "" for any cells.
        denied: Terms that the cells should lack.
        levels: Comparisons.
    """

    wanted: str
    denied: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()


def _ordered(level: str, what: str, than: str, *, denied: bool) -> tuple[str, str]:
    """`high` and `low` of a [`Level`]: in order for "more A than B", reversed for "less", and again if denied."""
    return (what, than) if (LEVELS[level.casefold()] > 0) != denied else (than, what)


def read_query(text: str, is_expressed: Callable[[str], bool] = lambda term: False) -> Query:
    """Split a search text into wanted cells, denials and levels.

    Args:
        text: The search text.
        is_expressed: Whether a term names measured genes or a programme. Other words after "high" stay in the text.

    >>> read_query("T cells without CD8 or CD25, high interferon")
    Query(wanted='T cells, high interferon', denied=('CD8', 'CD25'), levels=())
    >>> read_query("T cells with more CD8A than CD4", lambda term: term in ("CD8A", "CD4"))
    Query(wanted='T cells', denied=(), levels=(Level(high='CD8A', low='CD4', is_text=False),))

    Raises:
        ValueError: If the text has denials only.
    """
    denied, levels = [], []
    for match in DENIAL.finditer(text):
        for term in map(str.strip, EITHER.split(match["after"] or match["before"])):
            level = DENIED_LEVEL.fullmatch(term)
            if level and is_expressed(level["what"]):  # "without low CD4"
                levels.append(Level(*_ordered(level["level"], level["what"], "", denied=True)))
            else:
                denied.append(term)
    rest = DENIAL.sub("", text)

    def take(match: re.Match) -> str:
        what, than = match["what"].strip(), (match["than"] or "").strip()
        is_text = bool(match["like"] and than)
        if not (is_text or is_expressed(what)):
            return match.group()
        than = than if is_text or is_expressed(than) else ""
        levels.append(Level(*_ordered(match["level"], what, than, denied=bool(match["not"])), is_text))
        return ""

    rest = LEVEL.sub(take, rest)
    wanted = " ".join(rest.split()).strip(" ,;.") if denied or levels else text
    if not wanted and not levels:
        raise ValueError(f"{text!r} names only what cells lack: name the wanted cells, as in 'cells without ...'.")
    wanted = "" if (denied or levels) and ANY_CELL.fullmatch(wanted) else wanted
    return Query(wanted, tuple(denied), tuple(levels))


@dataclass
class Part:
    """The terms of one search text, as positions in `texts` and `genes` of a [`Search`]."""

    wanted: int | None = None
    denied_texts: list[int] = field(default_factory=list)
    denied_genes: list[int] = field(default_factory=list)
    similar: list[tuple[int | None, int | None]] = field(default_factory=list)  # pairs of texts: high, low
    expressed: list[tuple[int | None, int | None]] = field(default_factory=list)  # pairs of groups of genes: high, low

    def score(self, similarity: np.ndarray, expressed: np.ndarray) -> np.ndarray:
        """Scores of cells, float32 `(n_cells,)`.

        Args:
            similarity: `(n_cells, n_texts)`.
            expressed: `(n_cells, n_groups)`: the result of [`Search.expression`].
        """
        if self == Part(self.wanted) and self.wanted is not None:
            return similarity[:, self.wanted]
        nothing = np.zeros(len(similarity))
        wanted = nothing if self.wanted is None else similarity[:, self.wanted]
        texts, genes = list(similarity[:, self.denied_texts].T), list(expressed[:, self.denied_genes].T)
        # Of any cells, the best are those least like what is denied: no wanted text is there for it to fit better.
        score = combine(nothing, [], [*texts, *genes]) if self.wanted is None else combine(wanted, texts, genes)
        for values, pairs in ((similarity, self.similar), (expressed, self.expressed)):
            for more, less in pairs:
                high, low = (nothing if i is None else values[:, i] for i in (more, less))
                score = score + standardised(high - low)
        return score.astype(np.float32)


class Search:
    """The scores of several search texts for the cells of one file.

    Args:
        texts: The search texts.
        gene_index: Genes of the model.
        measured: Vocabulary ids of the genes that the file measures; by default all.

    Attributes:
        texts: Texts whose similarity with cells is needed.
        genes: Groups of genes (vocabulary ids) whose expression is needed.
        absent: Words that name genes of the model, none of which the file measures.
        unknown: Words that look like genes and are no gene of the model.
    """

    def __init__(self, texts: Sequence[str], gene_index: GeneIndex, measured: np.ndarray | None = None) -> None:
        self.texts: list[str] = []
        self.genes: list[np.ndarray] = []
        self.gene_index, self.measured = gene_index, measured
        self.queries = [read_query(text, lambda term: len(self.genes_of(term)) > 0) for text in texts]
        self.absent = sorted({word.strip(",.;") for word in " ".join(texts).split() if self._is_absent(word)})
        self.unknown = sorted(set(map(self._unknown, " ".join(texts).split())) - {""})
        self._parts: list[Part] = []
        for query in self.queries:
            part = Part()
            if query.wanted:
                part.wanted = self._add(self.texts, query.wanted)
            for term in query.denied:
                if len(genes := self.genes_of(term)):
                    part.denied_genes.append(self._add(self.genes, genes))
                else:
                    part.denied_texts.append(self._add(self.texts, term))
            for level in query.levels:
                items: list = self.texts if level.is_text else self.genes
                terms = [term if level.is_text else self.genes_of(term) for term in (level.high, level.low)]
                pair = [self._add(items, term) if len(term) else None for term in terms]
                (part.similar if level.is_text else part.expressed).append((pair[0], pair[1]))
            self._parts.append(part)

    def genes_of(self, term: str) -> np.ndarray:
        """Vocabulary ids of the measured genes that a term names: the genes of a programme, or symbols."""
        words = AROUND.sub("", AROUND.sub("", term.casefold().strip()))
        symbols = next((programme.genes for programme in PROGRAMMES if words in programme.words), ())
        ids = [self.gene_index.lookup(symbol)[0] for symbol in symbols]
        for word in [] if symbols else EITHER.split(term):
            named = list(named_genes(word, self.gene_index))
            ids += named or [self.gene_index.vocabulary.get(word.strip(), -1)]
        genes = np.unique(np.array([i for i in ids if i >= 0], dtype=np.int64))
        return genes if self.measured is None else np.intersect1d(genes, self.measured)

    def _is_absent(self, word: str) -> bool:
        """Whether a word names genes of the model, and the file measures none of these genes."""
        genes = list(named_genes(word, self.gene_index))
        return self.measured is not None and bool(genes) and not np.isin(genes, self.measured).any()

    def _unknown(self, word: str) -> str:
        """The part of a word that looks like a gene symbol and is no gene of the model ("CD300X"); "" for none."""
        stem = re.sub(r"-?(negative|positive|low|high|dim)\b.*", "", word.strip(",.;()"), flags=re.IGNORECASE)
        return stem if SYMBOL.fullmatch(stem) and not named_genes(stem, self.gene_index) else ""

    @staticmethod
    def _add(items: list, item: object) -> int:
        items.append(item)
        return len(items) - 1

    def expression(self, cells: Cells) -> np.ndarray:
        """log1p(CP10k) of the sum of each group of genes, float32 `(n_cells, n_groups)`."""
        rows, sizes = cells.rows(), cells.library_sizes().clip(min=1)
        groups = [np.isin(cells.gene_ids, genes) for genes in self.genes]
        counts = [np.bincount(rows[here], cells.counts[here], minlength=len(cells)) for here in groups]
        columns = [np.log1p(COUNTS_PER_10K * values / sizes) for values in counts]
        return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(cells), 0), np.float32)

    def scores(self, columns: np.ndarray) -> np.ndarray:
        """Scores, float32 `(n_cells, n_texts)`; the score of a text without denials and levels is its similarity.

        Args:
            columns: `(n_cells, len(texts) + len(genes))`: similarities with `texts`, then the result of
                [`expression`].
        """
        similarity, expressed = np.split(columns, [len(self.texts)], axis=1)
        return np.stack([part.score(similarity, expressed) for part in self._parts], axis=1)


def vocabulary_of(stored: Mapping[str, Any]) -> frozenset[str]:
    """Stems of the words in names and texts of the types, tissues and programmes that a checkpoint knows.

    Args:
        stored: `config.annotation`.
    """
    named = [term for key in ("terms", "kinds", "profiles", "tissues") for term in stored.get(key) or []]
    texts = [text for pair in (stored.get("labels") or {}).items() for text in pair]
    texts += [text for term in named for text in (*term["names"], term.get("text", ""))]
    texts += [text for pair in (*ABBREVIATIONS.items(), *EVERYDAY.items()) for text in pair]
    texts += [text for programme in PROGRAMMES for text in (programme.phrase, *programme.words)]
    words = {word for text in texts for word in WORD.findall(text.casefold())}
    return frozenset(map(_stem, (words | STATES) - COMMON))


def is_understood(text: str, vocabulary: Collection[str], gene_index: GeneIndex) -> bool:
    """Whether a text has a word that the checkpoint knows, or a gene symbol in capitals.

    >>> known = vocabulary_of({"labels": {"plasma cell": "A cell that secretes antibodies."}})
    >>> [is_understood(text, known, GeneIndex({"LYZ": 0})) for text in ("an antibody", "LYZ", "the weather")]
    [True, True, False]
    """
    if named_genes(text, gene_index):
        return True
    for word in WORD.findall(text):
        plain = word.casefold()
        if word.isupper() and len(word) > 1 and word in gene_index.vocabulary:
            return True
        parts = [part for part in (plain, *plain.split("-")) if part not in COMMON and not part.isdigit()]
        if any(_is_known(part, vocabulary) for part in parts if len(part) > 1 or part in LETTERS or word.isupper()):
            return True
    return False


def _is_known(word: str, vocabulary: Collection[str]) -> bool:
    """Whether the stem of a word is known; a stem of five letters ("micro") may be a prefix of a known stem."""
    stem = _stem(word)
    return stem in vocabulary or (len(stem) == STEM - 1 and any(longer.startswith(stem) for longer in vocabulary))


def _stem(word: str) -> str:
    return (word.removesuffix("s") if len(word) > 3 else word)[:STEM]


def combine(wanted: np.ndarray, similar: Sequence[np.ndarray], expressed: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of cells, float32 `(n_cells,)`, in standard deviations.

    Expression of a denied gene is subtracted. A denied text is subtracted only by how much better it fits a cell than
    the wanted text: similar types of cells would otherwise cancel.

    Args:
        wanted: `(n_cells,)`: similarity with the wanted text.
        similar: Similarities with the denied texts, each `(n_cells,)`.
        expressed: Expression of the denied genes, each `(n_cells,)`.
    """
    score = fit = standardised(wanted)
    for values in similar:
        score = score - (standardised(values) - fit).clip(min=0)
    for values in expressed:
        score = score - standardised(values)
    return score.astype(np.float32)


def standardised(values: np.ndarray) -> np.ndarray:
    """Z-scores, float64; 0 if all values are equal."""
    values = values.astype(np.float64)
    return (values - values.mean()) / max(float(values.std()), 1e-12)
