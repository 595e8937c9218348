"""Captions of cells: what the text side of the model reads, drawn from templates over obs and the Cell Ontology.

Templates are versioned data (`train/data/templates/*.json`). A caption is a pure function of the template set, seed,
epoch, cell id, obs values and counts of one cell: no batch, worker or rank changes it, and another epoch draws another
text.

    sampler = CaptionSampler(gene_means=means)
    texts = sampler.caption(obs, cells, gene_symbols, epoch=0, cell_ids=cells.cell_ids)
    prompts = [sampler.label_text("B cell"), sampler.label_text("natural killer cell")]

Fields of a template: `cell_type`, `a_cell_type` (with its article), `a_synonym`, `definition`, `first_definition`
(its first sentence), `definition_phrase` (the same, to follow "is"), `tissue`, `disease`, `stage`, `sex`, `assay`,
`donor` (a phrase of disease, stage and sex), `origin` (tissue and donor), `markers`. A capital first letter
(`{A_cell_type}`) capitalises the value.
"""

import bisect
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from scmmgpt.cells_scmmgpt import RandomStream, cell_keys
from scmmgpt.train.data import ontology as terms


TEMPLATES = Path(__file__).parent / "templates"

# The obs columns that captions read; each may have a partner `<column>_ontology_term_id`.
CAPTION_COLUMNS = ("cell_type", "tissue", "disease", "development_stage", "sex", "assay", "organism")

# Genes that mark the state or the chemistry of a sample rather than a cell type, or that no text ever names.
UNINFORMATIVE_GENES = re.compile(
    r"^(MT-|MT(ATP\d|CO\d|ND\d|CYB|RNR)|RPL|RPS|MRPL|MRPS|MALAT1$|NEAT1$|XIST$|TSIX$|ERCC-|LINC|MIR\d|SNOR"
    r"|ENS[A-Z]*G\d|A[CLFP]\d{5,}|RP\d+-|CT[ABCD]-|C\d+orf|LOC\d|.*-AS\d$|.*-IT\d$|<)"
)
AGE_ADJECTIVE = re.compile(r"\d+-(year|month|week)-old|adult|fetal|embryonic|newborn|adolescent|pediatric")
NUM_MARKERS = 5
# Smallest deviance residual of a marker, in standard deviations.
MIN_RESIDUAL = 3.0
# Counts vary between cells of one type by more than sampling: size of the negative binomial that allows for it.
DISPERSION_SIZE = 10.0
# Smallest expected count. Lower ones would let two stray molecules of any rare gene pass for a marker.
MIN_EXPECTED = 0.2
# About 100 MB of captions; more distinct ones are written anew.
MAX_CACHED_TEXTS = 200_000
# No smaller count can reach `MIN_RESIDUAL`; leaving them out early saves most of the work.
MIN_MARKER_COUNT = 3


def with_article(phrase):
    """Put "a" or "an" before a phrase by how its first word sounds: "a B cell", "an NK cell", "a unipotent cell"."""
    word = re.match(r"[^\W_]*", phrase)[0]
    spelled_out = len(word) > 1 and word.isupper() and word not in {"MAIT", "MAST"}
    if spelled_out or len(word) == 1:
        vowel = word[0] in "AEFHILMNORSX"
    else:
        vowel = word[:1].lower() in set("aeiou") and not re.match(r"(uni|eu|ure|use|one)", word.lower())
    return f"{'an' if vowel else 'a'} {phrase}"


def _first_sentence(text):
    # A full stop ends a sentence before a capital, unless it closes an abbreviation.
    end = re.search(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\b[A-Z])\.(?=\s+[A-Z])", text)
    return text[: end.end()] if end else text


def _join(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _donor(disease, stage, sex, organism):
    """Say whom the sample is of, e.g. "a healthy 45-year-old male donor"; None if nothing is known."""
    healthy = disease == "normal"
    age, late = None, None
    if stage:
        short = re.sub(r"\s*(human )?stage$", "", re.sub(r"\s*\([^)]*\)", "", stage))
        age, late = (short, None) if AGE_ADJECTIVE.fullmatch(short) else (None, stage)
    known = {"Homo sapiens": None, "Mus musculus": "mouse"}.get(organism, organism)
    if not (healthy or disease or stage or sex):
        return None
    sex = sex if sex in {"male", "female"} else None
    words = ["healthy" if healthy else None, age, sex, known, "donor"]
    phrase = with_article(" ".join(word for word in words if word))
    if late:
        phrase += f" at the {late}" if late.endswith("stage") else f" ({late})"
    return phrase if healthy or not disease else f"{phrase} with {disease}"


def read_gene_means(corpus: str | Path) -> np.ndarray:
    """Read the mean share of each gene in the counts of a training cell, float64 `(vocab_size,)`, from a corpus."""
    import pyarrow.parquet as pq

    path = Path(corpus) / "genes.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{corpus} has no genes.parquet; a corpus that `prepare` builds has one.")
    table = pq.read_table(path, columns=["gene_id", "mean_share"])
    means = np.zeros(table["gene_id"].to_numpy().max() + 1)
    means[table["gene_id"].to_numpy()] = table["mean_share"].to_numpy()
    return means


def find_markers(cells, gene_symbols, gene_means, *, num_markers=NUM_MARKERS):
    """Find the genes that set each cell apart: counts far above those that the corpus mean predicts for its depth.

    Genes are ranked by the deviance residual of a negative binomial count whose mean is the cell's total times the
    gene's mean share; mitochondrial, ribosomal and unnamed genes are left out, and two molecules are no evidence.

    Args:
        cells: `Cells` of `n_cells` cells, raw counts.
        gene_symbols: Symbols by vocabulary id, sequence of `vocab_size` strings.
        gene_means: float array `(vocab_size,)`: mean share of each gene in a cell's counts.
        num_markers: Most genes to return for a cell.

    Returns:
        List of `n_cells` lists of at most `num_markers` symbols, the most distinctive first.
    """
    informative = _informative(gene_symbols if isinstance(gene_symbols, tuple) else tuple(gene_symbols))
    totals = cells.library_sizes().astype(np.float64)
    rows = np.repeat(np.arange(len(cells)), np.diff(cells.indptr))
    kept = (cells.counts >= MIN_MARKER_COUNT) & informative[cells.gene_ids]
    rows, ids, counts = rows[kept], cells.gene_ids[kept], cells.counts[kept].astype(np.float64)
    expected = np.maximum(gene_means[ids] * totals[rows], MIN_EXPECTED)
    excess = np.log((counts + DISPERSION_SIZE) / (expected + DISPERSION_SIZE))
    deviance = counts * np.log(counts / expected) - (counts + DISPERSION_SIZE) * excess
    residual = np.sqrt(2 * np.maximum(deviance, 0))
    kept = (counts > expected) & (residual >= MIN_RESIDUAL)
    rows, ids, residual = rows[kept], ids[kept], residual[kept]
    # Ties go to the smaller id: the order never depends on the batch.
    order = np.lexsort((ids, -residual, rows))
    rows, ids = rows[order], ids[order]
    starts = np.searchsorted(rows, np.arange(len(cells) + 1))
    ends = np.minimum(starts[1:], starts[:-1] + num_markers)
    return [[gene_symbols[i] for i in ids[start:end]] for start, end in zip(starts[:-1], ends, strict=True)]


@functools.lru_cache(maxsize=4)
def _informative(gene_symbols):
    return np.array([UNINFORMATIVE_GENES.match(symbol) is None for symbol in gene_symbols])


class _Template:
    """One template: its text in pieces, which fields it cannot do without, and its weight."""

    def __init__(self, text, weight, source):
        self.text, self.weight = text, float(weight)
        self.pieces = re.findall(r"\[[^\[\]]*\]|[^\[\]]+", text)
        if "".join(self.pieces) != text:
            raise ValueError(
                f"Template {text!r} of {source} has nested or unbalanced brackets; use one level of them."
            )
        self.required = frozenset(f for piece in self.pieces if piece[0] != "[" for f in _fields(piece))
        self.fields = frozenset(_fields(text))
        self.names_type = bool(self.required & {"cell_type", "a_cell_type"})
        if unknown := self.fields - _FIELDS:
            raise ValueError(
                f"Template {text!r} of {source} uses unknown fields {sorted(unknown)}; "
                f"the known ones are {sorted(_FIELDS)}."
            )

    def render(self, values):
        parts = []
        for piece in self.pieces:
            if piece[0] == "[":
                piece = piece[1:-1] if all(values.get(field) for field in _fields(piece)) else ""
            parts.append(re.sub(r"\{(\w+)\}", lambda m: _value(values, m[1]), piece))
        return re.sub(r" {2,}", " ", "".join(parts)).strip()


def _fields(text):
    return [field[0].lower() + field[1:] for field in re.findall(r"\{(\w+)\}", text)]


def _value(values, field):
    value = values[field[0].lower() + field[1:]]
    return value[0].upper() + value[1:] if field[0].isupper() else value


_FIELDS = frozenset(
    "cell_type a_cell_type a_synonym definition first_definition definition_phrase tissue disease stage sex assay "
    "donor origin markers".split()
)


class CaptionSampler:
    """Write captions, class prompts and answers about cells.

    Args:
        templates: Name of a set in `train/data/templates` ("default", or "paper" for the published model's single
            template) or the path of a JSON file like those.
        seed: Seed of the drawing.
        ontology: Whether to use definitions, synonyms and ids of the Cell Ontology. Without it captions use obs alone.
        gene_means: float array `(vocab_size,)`: mean share of each gene in a cell's counts, as
            `read_gene_means` reads it from a corpus. Without it no caption names marker genes.
    """

    def __init__(self, templates="default", *, seed=0, ontology=True, gene_means=None):
        path = Path(templates)
        if path.suffix != ".json":
            path = TEMPLATES / f"{templates}.json"
        if not path.is_file():
            sets = sorted(p.stem for p in TEMPLATES.glob("*.json") if p.stem != "labels")
            raise FileNotFoundError(f"No caption templates at {path}. Give the path of a JSON file, or one of {sets}.")
        data = json.loads(path.read_text(encoding="utf-8"))
        self.name, self.version = data["name"], data["version"]
        self.seed, self.ontology, self.gene_means = seed, ontology, gene_means
        self._captions = [_Template(t["text"], t.get("weight", 1), path) for t in data["captions"]]
        self._answers = [_Template(t["text"], t.get("weight", 1), path) for t in data["answers"]]
        self._label = _Template(data["label"], 1, path)
        self._values = {}  # obs combination -> field values
        self._choices = {}  # (templates, obs combination, has markers) -> templates that can be drawn
        self._texts = {}  # (template, obs combination, synonym) -> text

    def caption(self, obs, cells=None, gene_symbols=None, *, epoch=0, cell_ids=None):
        """Caption each cell of a batch.

        Args:
            obs: Columns of obs strings by name (`cell_type`, `cell_type_ontology_term_id`, `tissue`, ...), each a
                sequence of `n_cells` values; None, "" and "unknown" are missing, and so are absent columns.
            cells: `Cells` of the batch, for marker genes; needs `gene_symbols` and the sampler's `gene_means`.
            gene_symbols: Symbols by vocabulary id.
            epoch: Another epoch draws other captions.
            cell_ids: uint64 `(n_cells,)`; default `cells.cell_ids`.

        Returns:
            List of `n_cells` captions.
        """
        return self._write(self._captions, obs, cells, gene_symbols, epoch, cell_ids)

    def answer(self, obs, cells=None, gene_symbols=None, *, epoch=0, cell_ids=None):
        """Write the short description that stage 2 learns to generate, with the type in words that parse back.

        The arguments are those of `caption`, and `parse_cell_type` reads the label from the text again.
        """
        return self._write(self._answers, obs, cells, gene_symbols, epoch, cell_ids)

    def label_text(self, cell_type, cell_type_ontology_term_id=None):
        """The class prompt of a cell type: name and definition, the same text for all cells and epochs.

        >>> CaptionSampler().label_text("B cell")
        'cell type: B cell. A lymphocyte of B lineage that is capable of B cell mediated immunity.'
        """
        values = self._describe((cell_type, cell_type_ontology_term_id) + (None,) * (2 * len(CAPTION_COLUMNS) - 2))
        if not values["cell_type"]:
            raise ValueError(f"A class prompt needs a cell type, but got {cell_type!r}. Leave unknown types out.")
        return self._label.render(values)

    def _write(self, templates, obs, cells, gene_symbols, epoch, cell_ids):
        if cell_ids is None:
            if cells is None:
                raise ValueError("Captions are drawn by cell id: pass `cell_ids` or `cells`.")
            cell_ids = cells.cell_ids
        n_cells = len(cell_ids)
        columns = []
        for column in CAPTION_COLUMNS:
            for name in (column, f"{column}_ontology_term_id"):
                values = obs.get(name)
                if values is not None and len(values) != n_cells:
                    raise ValueError(f"obs[{name!r}] has {len(values)} values for {n_cells} cells; pass one per cell.")
                columns.append([None] * n_cells if values is None else values)
        markers = [[]] * n_cells
        uses_markers = any("markers" in template.fields for template in templates)
        if uses_markers and cells is not None and gene_symbols is not None and self.gene_means is not None:
            markers = find_markers(cells, gene_symbols, self.gene_means)
        ids = np.asarray(cell_ids).astype(np.uint64)
        draws = cell_keys(ids, seed=self.seed, epoch=epoch, stream=RandomStream.CAPTION)
        spins = (draws >> np.uint64(32)).astype(np.float64) / 2**32
        others = (draws & np.uint64(0xFFFFFFFF)).tolist()
        rows = zip(*columns, strict=True)
        return [
            self._write_one(templates, combination, genes, spin, other)
            for combination, genes, spin, other in zip(rows, markers, spins.tolist(), others, strict=True)
        ]

    def _write_one(self, templates, combination, genes, spin, other):
        """Draw and fill one template. `spin` in [0, 1) chooses the template, the integer `other` the synonym."""
        key = (id(templates), combination, bool(genes))
        if key not in self._choices:
            self._choices[key] = self._eligible(templates, combination, bool(genes))
        choices, cumulative, synonyms = self._choices[key]
        template = choices[bisect.bisect_right(cumulative, spin)]
        synonym = synonyms[other % len(synonyms)] if synonyms else None
        key = (template, combination, synonym, bool(genes))
        if key not in self._texts:
            if len(self._texts) >= MAX_CACHED_TEXTS:
                self._texts.clear()
            # U+0000 occurs in no text; the markers, which alone differ between cells, take its place below.
            marked = {"a_synonym": with_article(synonym) if synonym else None, "markers": "\0" if genes else None}
            self._texts[key] = template.render(self._describe(combination) | marked)
        return self._texts[key].replace("\0", _join(genes)) if genes else self._texts[key]

    def _eligible(self, templates, combination, has_markers):
        values = self._describe(combination)
        synonyms = values["synonyms"]
        known = {field for field, value in values.items() if value}
        known |= {"a_synonym"} if synonyms else set()
        known |= {"markers"} if has_markers else set()
        # A cell of known type is never given a text that leaves the type out.
        typed = "cell_type" in known
        choices = [t for t in templates if t.required <= known and t.names_type == typed]
        if not choices:
            raise ValueError(
                f"No template of the set {self.name!r} fits a cell of which only {sorted(known)} is known. "
                "Add one that needs no more than that."
            )
        weights = np.cumsum([t.weight for t in choices])
        return choices, (weights / weights[-1]).tolist(), synonyms

    def _describe(self, combination):
        """Field values of one combination of obs values; looked up in the ontologies once."""
        if combination in self._values:
            return self._values[combination]
        names, ids = {}, {}
        for i, column in enumerate(CAPTION_COLUMNS):
            label, term_id = combination[2 * i], combination[2 * i + 1]
            if self.ontology:
                term = terms.resolve(column, label, term_id)
                names[column], ids[column] = term.name, term.term_id
            else:
                names[column], ids[column] = None if terms.is_missing(label) else str(label), None
        cell_type, definition, synonyms = names["cell_type"], None, ()
        if ids["cell_type"]:
            definition, synonyms = terms.definition(ids["cell_type"]), terms.synonyms(ids["cell_type"])
        first = _first_sentence(definition) if definition else None
        phrase = first and re.match(r"(A|An|Any|The|One) (?!cell type|class)", first)
        tissue = names["tissue"]
        donor = _donor(names["disease"], names["development_stage"], names["sex"], names["organism"])
        self._values[combination] = {
            "cell_type": cell_type,
            "a_cell_type": with_article(cell_type) if cell_type else None,
            "definition": definition,
            "first_definition": first,
            "definition_phrase": first[0].lower() + first[1:].rstrip(".") if phrase else None,
            "synonyms": synonyms,
            "tissue": tissue,
            "origin": f"the {tissue} of {donor}" if tissue and donor else tissue or donor,
            "disease": "none" if names["disease"] == "normal" else names["disease"],
            "stage": names["development_stage"],
            "sex": names["sex"],
            "assay": names["assay"],
            "donor": donor,
        }
        return self._values[combination]


def parse_cell_type(text: str, candidates: Iterable[str] | Mapping[str, str | None], *, ontology=True) -> str | None:
    """Read the cell type that a text names: the candidate whose name or synonym comes first, the longest of those.

    A description names its type before it defines it, and the definition may name other types.

    Args:
        text: A generated description.
        candidates: Candidate labels, or a mapping from label to Cell Ontology id.
        ontology: Whether synonyms of the candidates count. One that two candidates share does not.

    Returns:
        One of the labels, or None if the text names none of them.

    >>> parse_cell_type("This cell is a CD14-positive monocyte.", ["monocyte", "CD14-positive monocyte", "B cell"])
    'CD14-positive monocyte'
    """
    items = candidates.items() if isinstance(candidates, Mapping) else ((label, None) for label in candidates)
    pattern, labels = _candidate_pattern(tuple(items), ontology)
    found = pattern.search(terms.normalize_label(text))
    return labels[found[1]] if found else None


@functools.lru_cache(maxsize=64)
def _candidate_pattern(candidates, ontology):
    labels = {terms.normalize_label(label): label for label, _ in candidates}
    if len(labels) != len(candidates):
        raise ValueError(f"Two of the candidates {[c for c, _ in candidates]} are spelled alike; pass each once.")
    aliases = {}
    for label, term_id in candidates if ontology else ():
        term = terms.resolve("cell_type", label, term_id)
        names = (term.name, *terms.all_synonyms(term.term_id)) if term.term_id else ()
        # Shorter synonyms ("PD", "AB") are other things in a text.
        for alias in {key for key in map(terms.normalize_label, names) if len(key) > 2} - labels.keys():
            aliases.setdefault(alias, set()).add(label)
    labels |= {alias: owners.pop() for alias, owners in aliases.items() if len(owners) == 1}
    longest_first = sorted(labels, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, longest_first)) or '(?!)'})s?\b"), labels
