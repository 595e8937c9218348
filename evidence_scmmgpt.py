"""The genes that drove a label: exact terms of the linear readout, as functions of arrays.

The readout scores a label by a sum over genes (`readout_scmmgpt`), so log odds of two labels are a sum over genes,
too:

    term = (weight of the label - weight of the rival) * (value of the cell - midpoint) / temperature
    log odds (label : rival) = sum of the terms + log odds at the midpoint, which are near 0

The midpoint lies halfway between the mean training cells of both labels. Without it, genes that every cell expresses
strongly would lead every list. Only genes with a greater weight for the label are named. The rival is the best label
that the given label does not mean. A label that means several trained labels ("T cell") has their mean weights. Terms
are linear, so the mean cell of a group (label or cluster) explains the group.

The **markers** of a label are the genes that best separate its mean training cell from the mean of all other labels,
by weight times difference. A label with strong terms and silent markers is doubtful.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cells_scmmgpt import COUNTS_PER_10K, Cells, sorting_order
from .labels_scmmgpt import ABBREVIATIONS, TISSUE_WORDS, broader_labels, normalize_label, term_of, trained_labels_of
from .readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout
from .regression_scmmgpt import sum_weights


N_GENES = N_MARKERS = 10  # genes that are named for a cell; markers of a label
LEAST_MARKER = 0.01  # of the best marker's difference in weight times difference in mean; below it, a gene is noise
EXACT = 2.0**20  # values are rounded to multiples of 1 / EXACT: sums over 10**9 cells are exact in any order
LEVELS, LOWEST, HIGHEST = 128, 0.05, 2000.0  # expression levels: logarithmic steps of CP10k
NONE = -1  # no set of labels, or no gene
# A label of several types, of no type, or of cells of low quality.
OF_NO_ONE_TYPE = re.compile(r"[/&|]|\b(and|or|not|no|mixed|doublets?|multiplets?|low.quality)\b", re.IGNORECASE)
GENE = re.compile(r"[A-Z][A-Z0-9-]*\d[A-Z0-9-]*|[A-Z]{4,}")  # a gene after a type: "T cell GZMK"; not "NK", "DC"
SPELT_ALIKE = 0.85  # similarity ratio of `difflib` from which a name may be a misspelling of another
LEVEL = re.compile(r"high|hi|low|lo", re.IGNORECASE)  # level of a gene: "C1QB_high"
LEVELLED = re.compile(r"[A-Z][A-Z0-9-]+")  # a gene before a level: "LTB_high"
STATE = re.compile(r"^((activated|quiescent|resting|cycling|proliferating|immature|mature|inflamed|stressed) )+")


@dataclass
class CellEvidence:
    """Evidence of a batch of cells, each for one set of labels. Empty places hold `NONE` or 0.

    Args:
        genes: int32 `(n_cells, N_GENES)`: positions in `gene_ids` of the panel, the largest term first.
        terms: float32 `(n_cells, N_GENES)`: log odds, above 0.
        counts: float32 `(n_cells, N_GENES)`.
        levels: uint8 `(n_cells, N_GENES)`: see [`level_of`].
        rivals: int32 `(n_cells,)`: number of the rival's set.
        markers: bool `(n_cells, N_MARKERS)`: which markers of its set a cell expresses.
    """

    genes: np.ndarray
    terms: np.ndarray
    counts: np.ndarray
    levels: np.ndarray
    rivals: np.ndarray
    markers: np.ndarray

    @classmethod
    def empty(cls, n_cells: int) -> "CellEvidence":
        """Empty evidence of `n_cells` cells."""
        genes = np.full((n_cells, N_GENES), NONE, dtype=np.int32)
        zeros = np.zeros((n_cells, N_GENES), dtype=np.float32)
        rivals, markers = np.full(n_cells, NONE, dtype=np.int32), np.zeros((n_cells, N_MARKERS), dtype=bool)
        return cls(genes, zeros, zeros.copy(), zeros.astype(np.uint8), rivals, markers)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """The fields as arrays of two dimensions, with a prefix, for a file of arrays."""
        return {f"evidence_{name}": value.reshape(len(self.rivals), -1) for name, value in vars(self).items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "CellEvidence":
        """The inverse of [`as_arrays`]."""
        fields = {name: arrays[f"evidence_{name}"] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "rivals": fields["rivals"][:, 0]})

    def put(self, rows: np.ndarray, part: "CellEvidence") -> None:
        """Set the evidence of the cells `rows`."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[rows] = getattr(part, name)


def level_of(counts: np.ndarray, library_sizes: np.ndarray) -> np.ndarray:
    """The expression level of each entry, uint8 from 1 to `LEVELS` - 1; level 0 means no count.

    Args:
        counts: `(nnz,)`: raw counts above 0.
        library_sizes: `(nnz,)`: library size of the cell of each entry.
    """
    rate = np.clip(counts / library_sizes.clip(min=1e-9) * COUNTS_PER_10K, LOWEST, HIGHEST)
    steps = np.log(rate / LOWEST) / np.log(HIGHEST / LOWEST) * (LEVELS - 2)
    return (1 + steps).astype(np.uint8)


def largest_entries(rows: np.ndarray, values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The `n` largest positive entries of each row in descending order; the sort is stable.

    Args:
        rows: int64 `(nnz,)`, ascending.
        values: float32 `(nnz,)`.
        n: Most entries per row.

    Returns:
        Positions of the entries, and their ranks within the row (0 to `n` - 1), int64 `(n_entries,)` each.

    >>> entries, places = largest_entries(np.array([0, 0, 0, 1]), np.array([1, 3, -2, 4], dtype=np.float32), 2)
    >>> entries.tolist(), places.tolist()
    ([1, 0, 3], [0, 1, 0])
    """
    positive = np.flatnonzero(values > 0)
    # Positive floats sort like their bits, and integers sort several times faster.
    entries = positive[sorting_order(~values[positive].astype(np.float32).view(np.uint32), rows[positive])]
    lengths = np.bincount(rows[positive])
    places = np.arange(len(positive)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return entries[places < n], places[places < n]


def find_markers(weights: np.ndarray, centroids: np.ndarray, n: int = N_MARKERS) -> np.ndarray:
    """The genes that best separate each label from the mean of the others, int32 `(n_labels, n)`, padded by `NONE`.

    Args:
        weights: float `(n_genes, n_labels)`.
        centroids: float `(n_labels, n_genes)`: mean profiles.
    """
    n_labels = len(centroids)
    markers = np.full((n_labels, n), NONE, dtype=np.int32)
    if n_labels < 2:
        return markers
    others = (centroids.sum(axis=0) - centroids) / (n_labels - 1)
    difference = weights.T - (weights.sum(axis=1) - weights.T) / (n_labels - 1)
    strength = np.where((difference > 0) & (centroids > others), difference * (centroids - others), 0.0)
    for label, row in enumerate(strength):
        best = np.argsort(-row, kind="stable")[:n]
        best = best[row[best] > LEAST_MARKER * row.max()]
        markers[label, : len(best)] = best
    return markers


@dataclass
class Explainer:
    """Terms of sets of labels, for the genes of one file.

    A set holds the trained labels that a label of the file means. One set for each trained label follows.

    Args:
        panel: The readout for these genes.
        members: bool `(n_sets, n_labels)`; a set of no label or of all labels has no evidence.
        weights, centroids: float32 `(n_genes, n_sets)`: mean weights and mean profiles of the members, in the units
            of the panel's profiles.
        markers: int32 `(n_sets, N_MARKERS)`: positions in `panel.gene_ids`, see [`find_markers`].
        competing: bool `(n_labels,)`: the labels that may be the rival.
    """

    panel: PanelReadout
    members: np.ndarray
    weights: np.ndarray
    centroids: np.ndarray
    markers: np.ndarray
    competing: np.ndarray

    def __post_init__(self) -> None:
        self.first_label = len(self.members) - self.members.shape[1]
        self.marker_places = np.full((len(self.members), len(self.panel.gene_ids)), NONE, dtype=np.int8)
        for row, markers in zip(self.marker_places, self.markers, strict=True):
            row[markers[markers >= 0]] = np.flatnonzero(markers >= 0)

    @classmethod
    def of(
        cls,
        readout: ScMMGPTLabelReadout,
        measured: np.ndarray,
        members: np.ndarray,
        profiles: Sequence[int] = (),
        competing: np.ndarray | None = None,
    ) -> "Explainer":
        """Build from the sets `members`, bool `(n_given, n_labels)`, and the vocabulary ids `measured` of a file.

        `profiles` are the numbers of profiled types, which follow the trained labels. By default all labels compete.
        """
        panel = readout.for_genes(measured, profiles)
        here = np.isin(readout.gene_ids.cpu().numpy(), panel.gene_ids)
        centroids = readout.mean_profiles(profiles, here)[:, here].astype(np.float32)
        members = np.concatenate([members, np.eye(members.shape[1], dtype=bool)])
        shares = (members / members.sum(axis=1, keepdims=True).clip(min=1)).astype(np.float32)
        markers = np.full((len(members), N_MARKERS), NONE, dtype=np.int32)
        for number, mine in enumerate(members):
            if mine.any() and not mine.all():  # the other labels are the second set
                pair = np.stack([mine / mine.sum(), ~mine / (~mine).sum()])
                markers[number] = find_markers(panel.weights @ pair.T, pair @ centroids)[0]
        competing = np.ones(members.shape[1], bool) if competing is None else competing
        return cls(panel, members, panel.weights @ shares.T, centroids.T @ shares.T, markers, competing)

    def find_rivals(self, scores: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The set of the best-scored label outside each row's own set, int64 `(n_rows,)`; `NONE` if there is none.

        Competing labels come first; other labels are rivals only if no competing label is outside the own set.
        """
        mine = self.members[own]
        out = mine | ~self.competing
        out = np.where(out.all(axis=1, keepdims=True), mine, out)
        rivals = np.where(out, -np.inf, scores).argmax(axis=1) + self.first_label
        return np.where(mine.all(axis=1) | ~mine.any(axis=1), NONE, rivals)

    def __call__(
        self, cells: Cells, own: np.ndarray, rivals: np.ndarray | None = None
    ) -> tuple[CellEvidence, tuple[np.ndarray, ...]]:
        """Evidence of a batch, and its ragged entries: rows, positions, values and levels.

        Args:
            cells: Raw counts.
            own: int64 `(n_cells,)`: the set that each cell is explained for.
            rivals: int64 `(n_cells,)`: the rival's set, `NONE` for no evidence; by default [`find_rivals`].
        """
        panel, n = self.panel, len(cells)
        indptr, positions, values = panel.profiles(cells)
        rows = np.repeat(np.arange(n), np.diff(indptr))
        counts = cells.counts[np.isin(cells.gene_ids, panel.gene_ids)].astype(np.float32)
        levels = level_of(counts, cells.library_sizes()[rows])
        if rivals is None:
            rivals = self.find_rivals(sum_weights(indptr, positions, values, panel.weights) + panel.bias, own)
        terms, speaks = self.terms(positions, values, own[rows], rivals[rows])
        entries, places = largest_entries(rows, terms * (speaks & (rivals[rows] != NONE)), N_GENES)
        evidence = CellEvidence.empty(n)
        evidence.rivals[:] = rivals
        marker = self.marker_places[own[rows], positions]
        evidence.markers[rows[marker >= 0], marker[marker >= 0]] = True
        for array, of_entry in ((evidence.genes, positions), (evidence.terms, terms), (evidence.counts, counts)):
            array[rows[entries], places] = of_entry[entries]
        evidence.levels[rows[entries], places] = levels[entries]
        return evidence, (rows, positions, values, levels)

    def terms(self, genes: Any, values: Any, own: Any, rival: Any) -> tuple[np.ndarray, np.ndarray]:
        """Terms of log odds for the sets `own` against the sets `rival`, and whether the label's weight is greater.

        A gene of smaller weight has a positive term if its value is low: its absence speaks against the rival.
        """
        weights = (self.weights[genes, own] - self.weights[genes, rival]) / np.float32(self.panel.temperature)
        halfway = (self.centroids[genes, own] + self.centroids[genes, rival]) / 2
        return weights * (values - halfway), weights > 0

    def marker_odds(
        self, rows: np.ndarray, positions: np.ndarray, values: np.ndarray, own: np.ndarray, rivals: np.ndarray
    ) -> np.ndarray:
        """Log odds by the markers of both sets alone, expressed and silent markers, float32 `(n_cells,)`."""
        mine = (self.marker_places[own[rows], positions] >= 0) | (self.marker_places[rivals[rows], positions] >= 0)
        rows, positions, values = rows[mine], positions[mine], values[mine]
        pair = own[rows], rivals[rows]
        gained = self.terms(positions, values, *pair)[0] - self.terms(positions, 0.0, *pair)[0]
        odds = np.bincount(rows, weights=gained, minlength=len(own))
        pairs, numbers = np.unique(np.stack([own, rivals]), axis=1, return_inverse=True)
        silent = np.zeros(pairs.shape[1])
        for number, (one, other) in enumerate(pairs.T):
            markers = np.union1d(self.markers[one], self.markers[other])
            silent[number] = self.terms(markers[markers >= 0], 0.0, one, other)[0].sum()
        return (odds + silent[numbers.ravel()]).astype(np.float32)


def label_members(
    labels: Sequence[str],
    known: Mapping[str, int],
    terms: Sequence[Mapping[str, Any]],
    stored: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """The trained labels that each label means, in any words, bool `(len(labels), len(known))`.

    A kind of a trained label means the trained label: "CD14+ Monocytes" are monocytes. A label of several types, or of
    no type ("NK/T cell", "not T cell"), has a meaning only if an ontology term has the name.

    Args:
        labels: Labels of a file.
        known: Trained label -> column.
        terms: As in [`trained_labels_of`].
        stored: `config.annotation`, as in [`labels_in_other_words`].
    """
    members = np.zeros((len(labels), len(known)), dtype=bool)
    words = {*ABBREVIATIONS, *(word for term in terms for name in term["names"] for word in name.split())}
    tissues = {name for term in (stored or {}).get("tissues", []) for name in term["names"]}
    for row, label in enumerate(labels):
        meant = trained_labels_of(label, None, list(known), terms)
        if not meant:
            label = without_genes(label, words, tissues)
            meant = trained_labels_of(label, None, list(known), terms)
        if not meant and not OF_NO_ONE_TYPE.search(label.replace("_", " ")):
            meant = _as_written(label, known, terms) or labels_in_other_words(label, list(known), terms, stored or {})
        members[row, [known[name] for name in meant if name in known]] = True
    return members


def _as_written(label: str, known: Collection[str], terms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trained labels of the broader type that a label ends with, or of an abbreviated type; empty if unclear."""
    return broader_labels(label, list(known), terms) or labels_in_short(label, terms)


def labels_in_other_words(
    label: str, known: Sequence[str], terms: Sequence[Mapping[str, Any]], stored: Mapping[str, Any]
) -> list[str]:
    """Trained labels of a type in the words of a file; empty if the meaning is ambiguous.

    The readings, in order: a kind of a trained label ("VSMC"); an abbreviation ("MNP", `ABBREVIATIONS`); the words of
    a name in another order ("T_CD4"); a tissue before or after a type ("Monocyte Liver"); two types that form one
    term, or of which one is above the other; an unknown word before an abbreviated type ("CD14 Mono").

    Args:
        label, known, terms: As in [`trained_labels_of`].
        stored: `kinds` and `tissues`, terms; both may be missing.

    >>> terms = [{"id": "CL:0000624", "names": ["cd4 t cell"], "labels": ["CD4 T"]}]
    >>> liver = {"id": "UBERON:0002107", "names": ["liver"], "labels": ["CD4 T"]}
    >>> labels_in_other_words("Liver T_CD4", ["CD4 T", "B"], terms, {"tissues": [liver]})
    ['CD4 T']
    """
    if kind := term_of(label, stored.get("kinds", [])):
        return [name for name in kind["labels"] if name in known]

    def named(part: Sequence[str]) -> list[str]:
        return trained_labels_of(" ".join(part), None, known, terms) or _in_order(part, terms)

    def read(part: Sequence[str]) -> list[str]:
        text = " ".join(part)
        return [] if OF_NO_ONE_TYPE.search(text) else named(part) or _as_written(text, known, terms)

    shorts = [word if word in ABBREVIATIONS else word.removesuffix("s") for word in normalize_label(label).split()]
    words = [word for short in shorts for word in ABBREVIATIONS.get(short, short).split()]
    tissues = {name for term in stored.get("tissues", []) for name in term["names"]}
    if " ".join(words) in tissues:
        return []
    if meant := named(words):
        return meant
    for cut in range(1, len(words)):
        for part, place in ((words[:cut], words[cut:]), (words[cut:], words[:cut])):
            if " ".join(place) in tissues and (meant := read(part)):
                return meant
    if len(shorts) == 2:
        one, other = (read(ABBREVIATIONS.get(short, short).split()) for short in shorts)
        if one and other:
            return _together(one, other, terms)
    return read(words)


def _in_order(words: Sequence[str], terms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trained labels of the only type with a name of these words, in any order, with or without "cell"."""
    if len(words) < 2:
        return []
    wanted = sorted(words), sorted([*words, "cell"])
    named = [list(term["labels"]) for term in terms if any(sorted(name.split()) in wanted for name in term["names"])]
    return named[0] if named and all(set(labels) == set(named[0]) for labels in named) else []


def _together(one: Sequence[str], other: Sequence[str], terms: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels of the narrower of two nested types, or of two types that together form a term; else none."""
    if set(one) <= set(other) or set(other) <= set(one):
        return list(one if len(one) <= len(other) else other)
    both = {*one, *other}
    return sorted(both) if any(set(term["labels"]) == both for term in terms) else []


def without_genes(label: str, words: Collection[str], tissues: Collection[str] = ()) -> str:
    """A label without the genes at its end, which files add to distinguish clusters of a type.

    A tissue after the genes is removed, too; a tissue directly after a type stays.

    Args:
        label: A label of a file.
        words: Words in names of types: such a word is no gene.
        tissues: Normalized names of tissues.

    >>> [without_genes(label, {"cell"}) for label in ("B Cell CD79A", "Macrophage C1QB_high", "B CELL", "CD4 T")]
    ['B Cell', 'Macrophage', 'B CELL', 'CD4 T']
    >>> labels = "T Cell LTB_high Liver", "B MS4A1+", "T CD4+", "GZMK_high Liver"
    >>> [without_genes(label, {"cell", "cd4"}, {"liver"}) for label in labels]
    ['T Cell', 'B', 'T CD4+', 'GZMK_high Liver']
    """
    parts = label.replace("_", " ").split()
    ends = [len(parts), *(cut for cut in range(1, len(parts)) if normalize_label(" ".join(parts[cut:])) in tissues)]
    for whole in ends:
        end = whole
        while end > 1:
            has_level = end > 2 and LEVEL.fullmatch(parts[end - 1])
            gene = parts[end - 2 if has_level else end - 1].rstrip("+-")
            is_gene = (LEVELLED if has_level else GENE).fullmatch(gene)
            if not is_gene or normalize_label(gene) in words:
                break
            end -= 2 if has_level else 1
        if end < whole:
            return " ".join(parts[:end])
    return label


def labels_in_short(label: str, terms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trained labels of a type that is named without the organ or "cell": "delta cell", "NK" or "activated stellate".

    Empty if the name fits types that are not nested.

    >>> labels_in_short("proliferating_Alpha", [{"names": ["pancreatic alpha cell"], "labels": ["A"]}])
    ['A']
    >>> labels_in_short("Alpha cells", [{"names": ["alpha cell of islet of langerhans"], "labels": ["A"]}])
    ['A']
    """
    words = re.sub(" cells?$", "", STATE.sub("", normalize_label(label)))
    name = f"{words} cell"
    is_whole = re.compile(re.escape(name)).fullmatch
    is_part = re.compile(rf"{re.escape(name)} of .*|.* {re.escape(name)}").fullmatch
    for fits in (is_whole, is_part) if len(words) > 1 and words not in TISSUE_WORDS else ():
        if fitting := [set(term["labels"]) for term in terms if any(map(fits, term["names"]))]:
            narrowest = min(fitting, key=len)
            return sorted(narrowest) if all(narrowest <= other for other in fitting) else []
    return []


def likely_label(label: str, known: Collection[str], terms: Sequence[Mapping[str, Any]]) -> str | None:
    """The type that an unknown label probably means: an abbreviated name ("beta") or a misspelt name ("B cel").

    >>> likely_label("B cel", ["B cell"], []), likely_label("hepatoblast", ["hepatocyte"], [])
    ('B cell', None)
    """
    short = labels_in_short(label, terms)
    if len(short) == 1:
        return short[0]
    names = {normalize_label(name): name for name in [*(name for term in terms for name in term["names"]), *known]}
    near = difflib.get_close_matches(normalize_label(label), names, n=1, cutoff=SPELT_ALIKE)
    return names[near[0]] if near else None


def percentiles(histogram: np.ndarray, n_cells: int, genes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Percentiles of expression levels among the cells of a file; cells at the same level count half.

    Args:
        histogram: int64 `(n_genes, LEVELS)`: number of cells at each level; level 0 is computed from `n_cells`.
        n_cells: Number of cells in the file.
        genes, levels: int arrays of one shape.

    >>> percentiles(np.array([[0, 4, 2]]), 10, np.array([0, 0]), np.array([1, 2])).tolist()
    [60.0, 90.0]
    """
    histogram = histogram.copy()
    histogram[:, 0] = n_cells - histogram[:, 1:].sum(axis=1)
    below = np.cumsum(histogram, axis=1) - histogram / 2
    return 100 * below[genes, levels] / max(n_cells, 1)


class Evidence:
    """The evidence of the cells of a file, and of groups of cells: labels, and clusters if given.

    [`add`] takes cells. [`add_sums`] takes the sums of a part of the file that another process has read.

    Args:
        explainer: One set of trained labels for each name of `sets`.
        sets: Given labels; `set_of_cell`, int64 `(n_cells,)`, has the number of each cell's label.
        labels: Labels of the readout.
        clusters: str `(n_cells,)`, or None. A cluster is explained for its commonest label.
        symbols: Vocabulary ids -> symbols of genes.
    """

    def __init__(
        self,
        explainer: Explainer,
        sets: Sequence[str],
        set_of_cell: np.ndarray,
        labels: Sequence[str],
        clusters: np.ndarray | None,
        symbols: Callable[[list[int]], Sequence[str]],
    ) -> None:
        self.explainer, self.sets, self.set_of_cell = explainer, list(sets), set_of_cell
        self.names = np.asarray([*sets, *labels, ""], dtype=object)  # names of all sets; the last one is for `NONE`
        genes = explainer.panel.gene_ids
        self.genes = np.asarray([*symbols(genes.tolist()), ""], dtype=object)
        self.of_cells = CellEvidence.empty(0)
        self.parts: Callable[[], Iterable[tuple[int, CellEvidence]]] = lambda: [(0, self.of_cells)]
        self.histogram = np.zeros((len(genes), LEVELS), dtype=np.int64)
        self.groups = [Groups("label", self.sets, np.arange(len(sets)), set_of_cell, len(genes))]
        if clusters is not None:
            names, numbers = np.unique(clusters, return_inverse=True)
            votes = [np.bincount(set_of_cell[numbers == i]).argmax() for i in range(len(names))]
            self.groups.append(Groups("cluster", names.tolist(), np.asarray(votes), numbers, len(genes)))

    def add(self, numbers: np.ndarray, cells: Cells) -> None:
        """Add the evidence of cells; `numbers` are their rows in the file."""
        if not len(self.of_cells.rivals):
            self.of_cells = CellEvidence.empty(len(self.set_of_cell))
        evidence, (rows, positions, values, levels) = self.explainer(cells, self.set_of_cell[numbers])
        self.of_cells.put(numbers, evidence)
        keys = positions * LEVELS + levels
        self.histogram += np.bincount(keys, minlength=self.histogram.size).reshape(self.histogram.shape)
        for groups in self.groups:
            groups.add(groups.group_of_cell[numbers], rows, positions, values)

    def sums(self) -> dict[str, np.ndarray]:
        """The sums over cells that [`add_sums`] takes: the histogram of levels, and names and sums of groups."""
        sums: dict[str, np.ndarray] = {"histogram": self.histogram.astype(np.int32)}
        for groups in self.groups:
            sums |= {f"{groups.level}_names": np.asarray(groups.names, dtype=str)}
            sums |= {f"{groups.level}_profiles": groups.profiles, f"{groups.level}_expressing": groups.expressing}
        return sums

    def add_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """Add the [`sums`] of a part of the cells, whose groups are a subset of all groups."""
        self.histogram += sums["histogram"]
        for groups in self.groups:
            rows = np.searchsorted(groups.names, sums[f"{groups.level}_names"])
            groups.profiles[rows] += sums[f"{groups.level}_profiles"]
            groups.expressing[rows] += sums[f"{groups.level}_expressing"]

    def columns(self) -> dict[str, np.ndarray]:
        """Columns of `obs` for the cells of [`add`].

        `evidence` (genes, the largest term first) and `rival`, str `(n_cells,)`; `marker_support`, float32
        `(n_cells,)`, the share of the label's markers that a cell expresses, NaN without markers.
        """
        cells = self.of_cells
        genes = np.asarray([", ".join(row[row != ""]) for row in self.genes[cells.genes]], dtype=str)
        total = (self.explainer.markers >= 0).sum(axis=1)[self.set_of_cell].astype(np.float32)
        support = cells.markers.sum(axis=1).astype(np.float32) / np.where(total > 0, total, np.float32(np.nan))
        return {"evidence": genes, "rival": self.names[cells.rivals].astype(str), "marker_support": support}

    def group_rows(self) -> list[dict[str, Any]]:
        """The rows of all groups, see [`Groups.rows`]."""
        return [row for groups in self.groups for row in groups.rows(self)]

    def cell_rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A row for each gene that drove the label of a cell, and for each marker that the cell lacks.

        `level` ("cell"), `name`, `cells` (1), `label`, `rival`, `gene`, `term`, `count`, `percentile` (of expression
        among the cells of the file, 0 to 100) and `marker`.
        """
        silent = percentiles(self.histogram, len(names), np.arange(len(self.histogram)), np.array(0))
        for first, cells in self.parts():
            percentile = percentiles(self.histogram, len(names), cells.genes, cells.levels)
            for i, own in enumerate(self.set_of_cell[first : first + len(cells.rivals)].tolist()):
                if cells.rivals[i] == NONE:
                    continue
                about = {"level": "cell", "name": str(names[first + i]), "cells": 1, "label": self.sets[own]}
                about["rival"] = self.names[cells.rivals[i]]
                markers = self.explainer.markers[own]
                for place, gene in enumerate(cells.genes[i].tolist()):
                    if gene != NONE:
                        numbers = (values[i, place] for values in (cells.terms, cells.counts, percentile))
                        term, count, among = (round(float(value), 4) for value in numbers)
                        values = {"term": term, "count": count, "percentile": among, "marker": gene in markers}
                        yield {**about, "gene": self.genes[gene], **values}
                for gene in markers[(markers >= 0) & ~cells.markers[i]].tolist():
                    values = {"term": 0.0, "count": 0.0, "percentile": round(float(silent[gene]), 4), "marker": True}
                    yield {**about, "gene": self.genes[gene], **values}


class Groups:
    """Groups of cells, explained by their mean cells.

    Args:
        level: "label" or "cluster".
        names: Names of the groups.
        sets: int64 `(n_groups,)`: number of the label that each group is explained for.
        group_of_cell: int64 `(n_cells,)`.
        n_genes: Number of genes of the panel.
    """

    def __init__(
        self, level: str, names: Sequence[str], sets: np.ndarray, group_of_cell: np.ndarray, n_genes: int
    ) -> None:
        self.level, self.names, self.sets, self.group_of_cell = level, list(names), sets, group_of_cell
        self.cells = np.bincount(group_of_cell, minlength=len(names))
        self.profiles = np.zeros((len(names), n_genes))  # sums
        self.expressing = np.zeros((len(names), n_genes), dtype=np.int64)  # cells with a count

    def add(self, groups: np.ndarray, rows: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
        """Add the ragged profiles of cells; `groups`, int `(n_cells,)`, are the groups of the cells."""
        keys, shape = groups[rows] * self.profiles.shape[1] + positions, self.profiles.shape
        values = np.rint(values * EXACT) / EXACT
        self.profiles += np.bincount(keys, weights=values, minlength=self.profiles.size).reshape(shape)
        self.expressing += np.bincount(keys, minlength=self.profiles.size).reshape(shape)

    def rows(self, evidence: Evidence) -> Iterator[dict[str, Any]]:
        """A row for each gene that drove the label of a group, and for each marker of the label.

        `level`, `name`, `cells`, `label`, `rival`, `gene`, `term` (of the mean cell), `expressing` (share of the
        group's cells with a count), `elsewhere` (share of all other cells with a count) and `marker`.
        """
        explainer, panel = evidence.explainer, evidence.explainer.panel
        for number, name in enumerate(self.names):
            own, n = self.sets[number], self.cells[number]
            mean = self.profiles[number] / n
            (rival,) = explainer.find_rivals((mean @ panel.weights + panel.bias)[None], own[None])
            if rival == NONE:
                continue
            terms, speaks = explainer.terms(slice(None), mean, own, rival)
            best, markers = np.argsort(-terms * speaks, kind="stable")[:N_GENES], explainer.markers[own]
            elsewhere = (self.expressing.sum(axis=0) - self.expressing[number]) / max(self.cells.sum() - n, 1)
            about = {"level": self.level, "name": name, "cells": int(n), "label": evidence.sets[own]}
            about["rival"] = evidence.names[rival]
            for gene in dict.fromkeys([*best[(terms * speaks)[best] > 0].tolist(), *markers[markers >= 0].tolist()]):
                numbers = terms[gene], self.expressing[number, gene] / n, elsewhere[gene]
                term, here, there = (round(float(value), 6) for value in numbers)  # the page rounds again
                values = {"term": term, "expressing": here, "elsewhere": there, "marker": gene in markers}
                yield {**about, "gene": evidence.genes[gene], **values}
