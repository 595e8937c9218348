"""A text to search for, in what cells should be and what they should lack: "T cells without CD8".

An embedding of such a text is near the very cells that it excludes. The denied words are therefore scored apart: genes
by their expression, anything else by its similarity. All terms are in standard deviations over the searched cells.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


try:
    from .cells_scmmgpt import Cells
    from .genes_scmmgpt import GeneIndex
    from .unseen_scmmgpt import named_genes
except ImportError:  # beside the other files of a checkpoint
    from cells_scmmgpt import Cells
    from genes_scmmgpt import GeneIndex
    from unseen_scmmgpt import named_genes


DENIAL = re.compile(
    r",?\s*\b(?:without|lacking|excluding|negative for|except(?: for)?|but (?:not|no)"
    r"|(?:which|that) (?:is|are) not(?= an? )|(?<=, )not)\s+(?:an?\s+)?(?P<after>[^,;.]+)"
    r"|(?P<before>\b[\w-]+?)-negative\b",
    re.IGNORECASE,
)
EITHER = re.compile(r"\s+(?:and|or|nor)\s+(?:an?\s+)?|\s*/\s*")
COUNTS_PER_10K = 1e4


@dataclass(frozen=True)
class Query:
    """What a text asks for.

    Args:
        wanted: The text without its denials.
        denied: Terms that the cells should lack.
    """

    wanted: str
    denied: tuple[str, ...] = ()


def read_query(text: str) -> Query:
    """Split a text into what is wanted and what is denied.

    >>> read_query("T cells without CD8 or CD25, high interferon")
    Query(wanted='T cells, high interferon', denied=('CD8', 'CD25'))
    >>> read_query("CD8-negative lymphocytes, not a B cell")
    Query(wanted='lymphocytes', denied=('CD8', 'B cell'))

    Raises:
        ValueError: If nothing is wanted.
    """
    denied = []
    for match in DENIAL.finditer(text):
        denied += [term.strip() for term in EITHER.split(match["after"] or match["before"])]
    wanted = " ".join(DENIAL.sub("", text).split()).strip(" ,;.") if denied else text
    if not wanted:
        raise ValueError(f"{text!r} says what cells lack, and not which cells are wanted: write 'cells without ...'.")
    return Query(wanted, tuple(denied))


class Search:
    """The scores of several texts for the cells of one file.

    Args:
        texts: What is searched for.
        gene_index: Genes of the model.
        measured: Vocabulary ids of the genes that the file measures.
    """

    def __init__(self, texts: Sequence[str], gene_index: GeneIndex, measured: np.ndarray) -> None:
        self.texts: list[str] = []  # to embed
        self.genes: list[np.ndarray] = []  # to look at together, a group for each term that names some
        self._parts: list[tuple[int, list[int], list[int]]] = []  # of a text: wanted, texts denied, groups denied
        for text in texts:
            query = read_query(text)
            similar, expressed = [], []
            wanted = self._add(self.texts, query.wanted)
            for term in query.denied:
                named = np.array(list(named_genes(term, gene_index)), dtype=np.int64)
                genes = np.intersect1d(named, measured)
                if len(genes):
                    expressed.append(self._add(self.genes, genes))
                else:
                    similar.append(self._add(self.texts, term))
            self._parts.append((wanted, similar, expressed))

    @staticmethod
    def _add(items: list, item: object) -> int:
        items.append(item)
        return len(items) - 1

    def expression(self, cells: Cells) -> np.ndarray:
        """log1p of the counts per ten thousand of each group of genes, float32 `(n_cells, n_groups)`."""
        rows, sizes = cells.rows(), cells.library_sizes().clip(min=1)
        groups = [np.isin(cells.gene_ids, genes) for genes in self.genes]
        counts = [np.bincount(rows[here], cells.counts[here], minlength=len(cells)) for here in groups]
        columns = [np.log1p(COUNTS_PER_10K * values / sizes) for values in counts]
        return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(cells), 0), np.float32)

    def scores(self, columns: np.ndarray) -> np.ndarray:
        """Scores, float32 `(n_cells, n_texts)`: a similarity where nothing is denied, else those of [`combine`].

        Args:
            columns: Similarities with `texts`, then results of [`expression`], of all cells.
        """
        similarity, expressed = np.split(columns, [len(self.texts)], axis=1)
        scored = [
            combine(similarity[:, wanted], list(similarity[:, texts].T), list(expressed[:, genes].T))
            if texts or genes
            else similarity[:, wanted]
            for wanted, texts, genes in self._parts
        ]
        return np.stack(scored, axis=1)


def combine(wanted: np.ndarray, similar: Sequence[np.ndarray], expressed: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of cells, float32 `(n_cells,)`, in standard deviations.

    A gene that should be absent counts against a cell. A denied text counts against the cells that it fits better than
    the wanted text does, by the difference: kinds of cells that are alike would else cancel.

    Args:
        wanted: Similarity with the wanted text, `(n_cells,)`.
        similar, expressed: Similarities with denied texts, and expression of denied genes.
    """
    score = fit = standardised(wanted)
    for values in similar:
        score = score - (standardised(values) - fit).clip(min=0)
    for values in expressed:
        score = score - standardised(values)
    return score.astype(np.float32)


def standardised(values: np.ndarray) -> np.ndarray:
    """Deviations from the mean in standard deviations; 0 where all are equal."""
    values = values.astype(np.float64)
    return (values - values.mean()) / max(float(values.std()), 1e-12)
