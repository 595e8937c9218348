"""Captions of cells: training texts drawn from templates (`train/data/templates/*.json`) over obs and Cell Ontology.

A caption depends on the template set, the seed, the epoch, and the id, obs values and counts of its cell, but on no
batch, worker or rank.

    sampler = CaptionSampler(gene_means=means)
    texts = sampler.caption(obs, cells, gene_symbols, epoch=0, cell_ids=cells.cell_ids)
    prompts = [sampler.label_text("B cell"), sampler.label_text("natural killer cell")]

A template has fields in braces: `{cell_type}`, `{a_cell_type}` (with its article), `{a_synonym}`, `{definition}`,
`{first_definition}` (first sentence of the definition), `{definition_phrase}` (first sentence, in a form that follows
"is"), `{tissue}`, `{disease}`, `{stage}`, `{sex}`, `{assay}`, `{donor}` (a phrase of disease, stage and sex),
`{origin}` (tissue and donor) and `{markers}`. A capital first letter (`{A_cell_type}`) capitalises the value. A piece
in square brackets is left out if one of its fields is unknown.
"""

import bisect
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scmmgpt.cells_scmmgpt import Cells, RandomStream, cell_keys
from scmmgpt.commands.files import read_json
from scmmgpt.train.data import ontology as terms


Obs = Mapping[str, Any]  # obs column -> one value per cell
Symbols = Sequence[str] | np.ndarray  # gene symbol of every vocabulary id
Combination = tuple[Any, ...]  # label and ontology id of each of `CAPTION_COLUMNS`, for one cell

TEMPLATES = Path(__file__).parent / "templates"

# Obs columns of captions; each may have a column of ids, `<column>_ontology_term_id`.
CAPTION_COLUMNS = ("cell_type", "tissue", "disease", "development_stage", "sex", "assay", "organism")

# Genes of the state or the chemistry of a sample rather than of a cell type, and genes that texts never name.
UNINFORMATIVE_GENES = re.compile(
    r"^(MT-|MT(ATP\d|CO\d|ND\d|CYB|RNR)|RPL|RPS|MRPL|MRPS|MALAT1$|NEAT1$|XIST$|TSIX$|ERCC-|LINC|MIR\d|SNOR"
    r"|ENS[A-Z]*G\d|A[CLFP]\d{5,}|RP\d+-|CT[ABCD]-|C\d+orf|LOC\d|.*-AS\d$|.*-IT\d$|<)"
)
AGE_ADJECTIVE = re.compile(r"\d+-(year|month|week)-old|adult|fetal|embryonic|newborn|adolescent|pediatric")
NUM_MARKERS = 5
MIN_RESIDUAL = 3.0  # smallest deviance residual of a marker, in standard deviations
DISPERSION_SIZE = 10.0  # size of the negative binomial: counts vary between cells of one type by more than sampling
MIN_EXPECTED = 0.2  # smallest expected count: below it, two stray molecules of a rare gene would make a marker
MIN_MARKER_COUNT = 3  # no smaller count can reach `MIN_RESIDUAL`; the early cut saves most of the work
MAX_CACHED_TEXTS = 200_000  # about 100 MB


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase by how its first word sounds: "a B cell", "an NK cell", "a unipotent cell"."""
    word = re.split(r"[\W_]", phrase, maxsplit=1)[0]
    spelled_out = len(word) > 1 and word.isupper() and word not in {"MAIT", "MAST"}
    if spelled_out or len(word) == 1:
        vowel = word[0] in "AEFHILMNORSX"
    else:
        vowel = word[:1].lower() in set("aeiou") and not re.match(r"(uni|eu|ure|use|one)", word.lower())
    return f"{'an' if vowel else 'a'} {phrase}"


def _first_sentence(text: str) -> str:
    # A full stop ends a sentence before a capital, unless it closes an abbreviation.
    end = re.search(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\b[A-Z])\.(?=\s+[A-Z])", text)
    return text[: end.end()] if end else text


def _donor(disease: str | None, stage: str | None, sex: str | None, organism: str | None) -> str | None:
    """Describe the donor of a sample, e.g. "a healthy 45-year-old male donor"; return None if nothing is known."""
    if not (disease or stage or sex):
        return None
    short = re.sub(r"\s*(human )?stage$", "", re.sub(r"\s*\([^)]*\)", "", stage or ""))
    age, late = (short, None) if AGE_ADJECTIVE.fullmatch(short) else (None, stage)
    species = {"Homo sapiens": None, "Mus musculus": "mouse"}.get(organism or "", organism)
    sex = sex if sex in {"male", "female"} else None
    words = ["healthy" if disease == "normal" else None, age, sex, species, "donor"]
    phrase = with_article(" ".join(word for word in words if word))
    if late:
        phrase += f" at the {late}" if late.endswith("stage") else f" ({late})"
    return phrase if disease in ("normal", None) else f"{phrase} with {disease}"


def read_gene_means(corpus: str | Path) -> np.ndarray:
    """Read each gene's mean share of the counts of a training cell from a corpus, float64 `(vocab_size,)`."""
    import pyarrow.parquet as pq

    path = Path(corpus) / "genes.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{corpus} has no genes.parquet. Build the corpus by `prepare`, which writes it.")
    table = pq.read_table(path, columns=["gene_id", "mean_share"])
    ids = table["gene_id"].to_numpy()
    means = np.zeros(ids.max() + 1)
    means[ids] = table["mean_share"].to_numpy()
    return means


def find_markers(cells: Cells, gene_symbols: Symbols, gene_means: np.ndarray) -> list[list[str]]:
    """Find, for each cell, at most `NUM_MARKERS` genes with counts far above those of an average cell of its size.

    Genes are ranked by the deviance residual of a negative binomial count with mean library size * mean share, from
    the mean share of each gene in a cell's counts, float `(vocab_size,)`. Mitochondrial, ribosomal and unnamed genes,
    and genes of one or two counts, are left out.
    """
    informative = _informative(tuple(gene_symbols))
    totals = cells.library_sizes().astype(np.float64)
    rows = cells.rows()
    kept = (cells.counts >= MIN_MARKER_COUNT) & informative[cells.gene_ids]
    rows, ids, counts = rows[kept], cells.gene_ids[kept], cells.counts[kept].astype(np.float64)
    expected = np.maximum(gene_means[ids] * totals[rows], MIN_EXPECTED)
    excess = np.log((counts + DISPERSION_SIZE) / (expected + DISPERSION_SIZE))
    deviance = counts * np.log(counts / expected) - (counts + DISPERSION_SIZE) * excess
    residual = np.sqrt(2 * np.maximum(deviance, 0))
    kept = (counts > expected) & (residual >= MIN_RESIDUAL)
    rows, ids, residual = rows[kept], ids[kept], residual[kept]
    # Ties go to the smaller id, whatever the batch.
    order = np.lexsort((ids, -residual, rows))
    rows, ids = rows[order], ids[order]
    starts = np.searchsorted(rows, np.arange(len(cells) + 1))
    ends = np.minimum(starts[1:], starts[:-1] + NUM_MARKERS)
    return [[gene_symbols[i] for i in ids[start:end]] for start, end in zip(starts[:-1], ends, strict=True)]


@functools.lru_cache(maxsize=4)
def _informative(gene_symbols: tuple[str, ...]) -> np.ndarray:
    return np.array([UNINFORMATIVE_GENES.match(symbol) is None for symbol in gene_symbols])


class _Template:
    """One template: the pieces of its text, its required fields, and its weight in the draw."""

    def __init__(self, text: str, weight: float, source: Path) -> None:
        self.text, self.weight = text, float(weight)
        self.pieces = re.findall(r"\[[^\[\]]*\]|[^\[\]]+", text)
        if "".join(self.pieces) != text:
            raise ValueError(f"Template {text!r} of {source} has nested or unbalanced brackets; use one level.")
        self.required = frozenset(f for piece in self.pieces if piece[0] != "[" for f in _fields(piece))
        self.fields = frozenset(_fields(text))
        self.names_type = bool(self.required & {"cell_type", "a_cell_type"})
        if unknown := self.fields - _FIELDS:
            raise ValueError(
                f"Template {text!r} of {source} has unknown fields {sorted(unknown)}; choose among {sorted(_FIELDS)}."
            )

    def render(self, values: Mapping[str, Any]) -> str:
        parts = []
        for piece in self.pieces:
            if piece[0] == "[":
                piece = piece[1:-1] if all(values.get(field) for field in _fields(piece)) else ""
            parts.append(re.sub(r"\{(\w+)\}", lambda m: _value(values, m[1]), piece))
        return re.sub(r" {2,}", " ", "".join(parts)).strip()


def _fields(text: str) -> list[str]:
    return [field[0].lower() + field[1:] for field in re.findall(r"\{(\w+)\}", text)]


def _value(values: Mapping[str, Any], field: str) -> str:
    value = values[field[0].lower() + field[1:]]
    return value[0].upper() + value[1:] if field[0].isupper() else value


_FIELDS = frozenset(
    "cell_type a_cell_type a_synonym definition first_definition definition_phrase tissue disease stage sex assay "
    "donor origin markers".split()
)


class CaptionSampler:
    """Writes captions, class prompts and answers about cells.

    Args:
        templates: Name of a set in `train/data/templates` ("default", or "paper" for the published model's single
            template), or path of a JSON file of the same form.
        seed: Seed of the draws.
        gene_means: Mean share of each gene in a cell's counts, float `(vocab_size,)`, from `read_gene_means`. Captions
            have no marker genes without them.
    """

    def __init__(
        self, templates: str | Path = "default", *, seed: int = 0, gene_means: np.ndarray | None = None
    ) -> None:
        path = Path(templates)
        if path.suffix != ".json":
            path = TEMPLATES / f"{templates}.json"
        if not path.is_file():
            sets = sorted(p.stem for p in TEMPLATES.glob("*.json") if p.stem != "labels")
            raise FileNotFoundError(f"There is no {path}. Give the path of a template file, or one of {sets}.")
        data = read_json(path)
        self.name, self.seed, self.gene_means = data["name"], seed, gene_means
        self._captions = [_Template(t["text"], t.get("weight", 1), path) for t in data["captions"]]
        self._answers = [_Template(t["text"], t.get("weight", 1), path) for t in data["answers"]]
        self._label = _Template(data["label"], 1, path)
        self._values: dict[Combination, dict[str, Any]] = {}  # -> field values
        # (templates, combination, has markers) -> eligible templates, their cumulative weights, synonyms
        self._choices: dict[tuple, tuple[list[_Template], list[float], Sequence[str]]] = {}
        self._texts: dict[tuple, str] = {}  # (template, combination, synonym, has markers) -> text

    def caption(
        self,
        obs: Obs,
        cells: Cells | None = None,
        gene_symbols: Symbols | None = None,
        *,
        epoch: int = 0,
        cell_ids: np.ndarray | None = None,
        answers: bool = False,
    ) -> list[str]:
        """Draw a caption for each of `n_cells` cells.

        Args:
            obs: Columns by name (`cell_type`, `cell_type_ontology_term_id`, `tissue`, ...), each a sequence of
                `n_cells` strings. An absent column is unknown, and so is a value of None, "" or "unknown".
            cells: Raw counts, for marker genes, which also need `gene_symbols` and the sampler's `gene_means`.
            gene_symbols: Symbol of each vocabulary id.
            epoch: Number of the epoch, which seeds the draws.
            cell_ids: uint64 `(n_cells,)`; default: `cells.cell_ids`.
            answers: Whether to draw from the set's answers instead of its captions.
        """
        if cell_ids is None:
            if cells is None:
                raise ValueError("Captions are drawn by cell id: pass `cell_ids` or `cells`.")
            cell_ids = cells.cell_ids
        n_cells = len(cell_ids)
        templates = self._answers if answers else self._captions
        columns = []
        for column in CAPTION_COLUMNS:
            for name in (column, f"{column}_ontology_term_id"):
                values = obs.get(name)
                if values is not None and len(values) != n_cells:
                    raise ValueError(f"obs[{name!r}] has {len(values)} values for {n_cells} cells; pass one per cell.")
                columns.append([None] * n_cells if values is None else values)
        markers: list[list[str]] = [[]] * n_cells
        uses_markers = any("markers" in template.fields for template in templates)
        if uses_markers and cells is not None and gene_symbols is not None and self.gene_means is not None:
            markers = find_markers(cells, gene_symbols, self.gene_means)
        ids = np.asarray(cell_ids).astype(np.uint64)
        draws = cell_keys(ids, seed=self.seed, epoch=epoch, stream=RandomStream.CAPTION)
        spins = (draws >> np.uint64(32)).astype(np.float64) / 2**32
        others = (draws & np.uint64(0xFFFFFFFF)).tolist()
        combinations = zip(*columns, strict=True)
        rows = zip(combinations, markers, spins.tolist(), others, strict=True)
        return [self._write_one(templates, *row) for row in rows]

    # Short descriptions, which stage 2 learns to generate; `parse_cell_type` finds the type in an answer.
    answer = functools.partialmethod(caption, answers=True)

    def label_text(self, cell_type: str, cell_type_ontology_term_id: str | None = None) -> str:
        """Return the class prompt of a cell type: name and definition, the same text for all cells and epochs.

        >>> CaptionSampler().label_text("B cell")
        'cell type: B cell. A lymphocyte of B lineage that is capable of B cell mediated immunity.'
        """
        values = self._describe((cell_type, cell_type_ontology_term_id) + (None,) * (2 * len(CAPTION_COLUMNS) - 2))
        if not values["cell_type"]:
            raise ValueError(f"A class prompt needs a cell type, not {cell_type!r}. Leave unknown types out.")
        return self._label.render(values)

    def _write_one(
        self, templates: list[_Template], combination: Combination, genes: list[str], spin: float, other: int
    ) -> str:
        """Draw and fill one template: `spin` in [0, 1) chooses the template, and the integer `other` the synonym."""
        key = (id(templates), combination, bool(genes))
        if key not in self._choices:
            self._choices[key] = self._eligible(templates, combination, bool(genes))
        choices, cumulative, synonyms = self._choices[key]
        template = choices[bisect.bisect_right(cumulative, spin)]
        synonym = synonyms[other % len(synonyms)] if synonyms else None
        text_key = (template, combination, synonym, bool(genes))
        if text_key not in self._texts:
            if len(self._texts) >= MAX_CACHED_TEXTS:
                self._texts.clear()
            # In the cached text, U+0000, which no text contains, stands for the markers, which differ between cells.
            marked = {"a_synonym": with_article(synonym) if synonym else None, "markers": "\0" if genes else None}
            self._texts[text_key] = template.render(self._describe(combination) | marked)
        listed = " and ".join([", ".join(genes[:-1]), genes[-1]] if len(genes) > 1 else genes)
        return self._texts[text_key].replace("\0", listed)

    def _eligible(
        self, templates: list[_Template], combination: Combination, has_markers: bool
    ) -> tuple[list[_Template], list[float], Sequence[str]]:
        """Return the templates that a cell's known fields can fill, their cumulative weights, and the synonyms."""
        values = self._describe(combination)
        synonyms = values["synonyms"]
        available = values | {"a_synonym": bool(synonyms), "markers": has_markers}
        known = {field for field, value in available.items() if value}
        # If the type is known, the text always names the type.
        choices = [t for t in templates if t.required <= known and t.names_type == ("cell_type" in known)]
        if not choices:
            raise ValueError(
                f"No template of the set {self.name!r} fits a cell with the known fields {sorted(known)}. "
                "Add one that requires no other field."
            )
        weights = np.cumsum([t.weight for t in choices])
        return choices, (weights / weights[-1]).tolist(), synonyms

    def _describe(self, combination: Combination) -> dict[str, Any]:
        """Return the field values of a combination; look them up in the ontologies once."""
        if combination in self._values:
            return self._values[combination]
        names: dict[str, str | None] = {}
        type_id = None
        for column, label, term_id in zip(CAPTION_COLUMNS, combination[::2], combination[1::2], strict=True):
            term = terms.resolve(column, label, term_id)
            names[column] = term.name
            type_id = term.term_id if column == "cell_type" else type_id
        cell_type = names["cell_type"]
        definition = terms.definition(type_id) if type_id else None
        first = _first_sentence(definition) if definition else None
        phrase = first and re.match(r"(A|An|Any|The|One) (?!cell type|class)", first)
        tissue = names["tissue"]
        donor = _donor(names["disease"], names["development_stage"], names["sex"], names["organism"])
        self._values[combination] = {
            "cell_type": cell_type,
            "a_cell_type": with_article(cell_type) if cell_type else None,
            "definition": definition,
            "first_definition": first,
            "definition_phrase": first[0].lower() + first[1:].rstrip(".") if first and phrase else None,
            "synonyms": terms.synonyms(type_id) if type_id else (),
            "tissue": tissue,
            "origin": f"the {tissue} of {donor}" if tissue and donor else tissue or donor,
            "disease": "none" if names["disease"] == "normal" else names["disease"],
            "stage": names["development_stage"],
            "sex": names["sex"],
            "assay": names["assay"],
            "donor": donor,
        }
        return self._values[combination]


def parse_cell_type(text: str, candidates: Iterable[str] | Mapping[str, str | None]) -> str | None:
    """Find the cell type of a text: the candidate whose name or synonym comes first, the longest of these, or None.

    The first name counts, because a description names its type before the definition, which may name other types.
    Candidates are labels, or label -> Cell Ontology id. A synonym of two candidates counts for neither.

    >>> parse_cell_type("This cell is a CD14-positive monocyte.", ["monocyte", "CD14-positive monocyte", "B cell"])
    'CD14-positive monocyte'
    """
    term_ids = candidates if isinstance(candidates, Mapping) else {}
    pattern, labels = _candidate_pattern(tuple((label, term_ids.get(label)) for label in candidates))
    found = pattern.search(terms.normalize_label(text))
    return labels[found[1]] if found else None


@functools.lru_cache(maxsize=64)
def _candidate_pattern(candidates: tuple[tuple[str, str | None], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    labels = {terms.normalize_label(label): label for label, _ in candidates}
    if len(labels) != len(candidates):
        raise ValueError(f"Two of the candidates {[c for c, _ in candidates]} are spelled alike. Pass each one once.")
    aliases: dict[str, set[str]] = {}
    for label, term_id in candidates:
        term = terms.resolve("cell_type", label, term_id)
        names = (term.name or "", *terms.all_synonyms(term.term_id)) if term.term_id else ()
        # Shorter synonyms ("PD", "AB") mean other things in a text.
        for alias in {key for key in map(terms.normalize_label, names) if len(key) > 2} - labels.keys():
            aliases.setdefault(alias, set()).add(label)
    labels |= {alias: owners.pop() for alias, owners in aliases.items() if len(owners) == 1}
    longest_first = sorted(labels, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, longest_first)) or '(?!)'})s?\b"), labels
