"""Labels that were never trained: how their texts place cells among the trained labels.

A label that is given by a text alone has no cells. Seven kinds of evidence replace them:

* **place**: ridge regression from the texts of the trained labels to their mean profiles predicts its mean profile.
  The margin of a cell is its distance from the plane halfway between that profile and the nearest trained one;
* **novelty**: the distance of the cell from the nearest mean profile of training, less what its depth explains;
* **named genes**: how strongly the cell expresses genes that the text names ("lacks CD25" and "CD25-negative" count
  against the cell);
* **similar genes**: how strongly the cell expresses genes whose own texts, such as NCBI's summaries, are more like the
  text than like those of the trained labels, if the checkpoint was made with texts of genes;
* **pairs**: the same against each trained label alone, from its mean profile; the least of them counts;
* **relatives**: the rank, among the trained labels, of the nearest ones by the likeness of their texts with the text;
* **doubt**: how evenly the nearest trained labels share the cell, as the entropy of their closeness.

A logistic **gate** decides between the label and all trained ones. It is fitted in `finetune` on episodes that leave
one trained label out. Among the trained labels, the readout decides (`readout_scmmgpt`): one softmax over both would
hardly ever choose a label that was not trained.

The cells of a batch tell more than a text where the label is. `read_batch` moves the predicted profile towards the
cells that are most like the label; a second gate, fitted to episodes in which the same was done, then decides.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cells_scmmgpt import Cells
from .genes_scmmgpt import GeneIndex
from .readout_scmmgpt import PanelReadout, ScMMGPTLabelReadout, panel_profiles
from .records_scmmgpt import some_of
from .regression_scmmgpt import sum_weights


SEARCH_GENES = 20  # whose texts are nearest to a text that is searched for
LEAST_SHARE = 0.01  # of the cells, for a label to be a candidate in a warning
WEAK_LABELS = 2  # that warnings name, those with the least evidence; `uns` has all
# Of a batch: the share of the most similar cells, their weight against the text, rounds, and fewest cells to read.
BATCH_SHARE, BATCH_WEIGHT, BATCH_ROUNDS, MIN_BATCH = 0.1, 0.7, 2, 60
NEARNESS = 0.05  # of the variance between labels: half a squared distance at which a label counts 1/e of the nearest
EQUAL_TEXTS = 1e-6  # of the greatest length: a shorter difference of two texts is rounding
NEVER = -100.0  # log probability of a text of no label
WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[0-9A-Z]+)*")
GENE_WORD = re.compile(r"[A-Z][A-Z0-9-]*\d[A-Z0-9-]*|[A-Z][A-Z0-9-]{3,}")  # CD19, FOXP3, GNLY; no word of prose
# Antigens of several genes, and those whose alias HGNC gives to two (ISG20 was called CD25 as well).
ANTIGENS = {
    "CD1": ("CD1A", "CD1B", "CD1C"),
    "CD3": ("CD3D", "CD3E", "CD3G"),
    "CD8": ("CD8A", "CD8B"),
    "CD16": ("FCGR3A", "FCGR3B"),
    "CD25": ("IL2RA",),
    "CD32": ("FCGR2A", "FCGR2B", "FCGR2C"),
    "CD79": ("CD79A", "CD79B"),
    "CD98": ("SLC3A2", "SLC7A5"),
}
ABSENT_BEFORE = re.compile(r"\b(lack\w*|without|absence of|negative for)[^\w.;]+(?:[\w-]+[^\w.;]+){0,7}$")
ABSENT_AFTER = re.compile(r"^\W*(negative|neg\b|-\B|low|lo\b|dim\b)", re.IGNORECASE)


def predict_centroids(centroids: np.ndarray, texts: np.ndarray, new_texts: np.ndarray) -> np.ndarray:
    """Mean profiles of labels that have texts alone, by ridge regression from texts to profiles, both centred.

    The penalty is the mean squared length of a centred text, or a trifle where all texts are equal.

    Args:
        centroids: `(n_trained, n_genes)`.
        texts: Embeddings of the trained labels' texts, `(n_trained, width)`.
        new_texts: Embeddings `(n_new, width)`.

    Returns:
        `(n_new, n_genes)`.
    """
    mean, offset = centroids.mean(axis=0), texts.mean(axis=0)
    kernel = (texts - offset) @ (texts - offset).T
    ridge = max(np.trace(kernel) / len(texts), 1e-9) * np.eye(len(texts))  # equal texts predict the mean
    weights = np.linalg.solve(kernel + ridge, (texts - offset) @ (new_texts - offset).T)
    return mean + weights.T @ (centroids - mean)


def named_genes(text: str, gene_index: GeneIndex) -> dict[int, int]:
    """Genes that a text names -> 1, or -1 where the cell should lack them.

    >>> index = GeneIndex({"CD19": 3, "IL2RA": 4, "CD8A": 5, "CD8B": 6})
    >>> named_genes("A cell that is CD8-positive, CD19-positive and CD25-negative.", index)
    {5: 1, 6: 1, 3: 1, 4: -1}
    """
    found: dict[int, int] = {}
    for match in WORD.finditer(text):
        word = match.group()
        if not GENE_WORD.fullmatch(word) and word not in ANTIGENS:
            continue
        spellings = (word, word.replace("-", ""))  # GATA-3 is GATA3
        genes = [i for i, _ in map(gene_index.lookup, ANTIGENS.get(word, spellings)) if i >= 0]
        sign = -1 if is_denied(text, match) else 1
        for gene in genes if word in ANTIGENS else genes[:1]:
            found.setdefault(gene, sign)
    return found


def is_denied(text: str, gene: re.Match) -> bool:
    """Whether a text says that the cell lacks a gene, which a match found in the text."""
    return bool(ABSENT_AFTER.match(text[gene.end() :]) or ABSENT_BEFORE.search(text[: gene.start()]))


@dataclass
class Gate:
    """The fitted gate: log odds of an untrained label = `weights` times the evidence + `offset`.

    `scale` divides each column of the evidence, and `depth` holds the coefficients of a quadratic in the logarithm of
    a cell's counts that is subtracted from its novelty. `batch_weights` and `batch_offset` are for evidence after
    [`LabelSpace.read_batch`]; a gate without them has the other weights there too.
    """

    weights: list[float]
    offset: float
    scale: list[float]
    depth: list[float]
    batch_weights: list[float] | None = None
    batch_offset: float = 0.0

    def for_batch(self) -> "Gate":
        """The gate for evidence after a batch was read."""
        if self.batch_weights is None:
            return self
        return replace(self, weights=self.batch_weights, offset=self.batch_offset)

    def __call__(self, evidence: np.ndarray) -> np.ndarray:
        """Log odds `(...,)` of evidence `(..., 7)`, not yet scaled; older gates know the first ones."""
        return evidence[..., : len(self.scale)] / np.asarray(self.scale) @ np.asarray(self.weights) + self.offset


@dataclass
class LabelSpace:
    """Trained and untrained labels in the space of profiles over the genes at hand.

    Args:
        centroids: float64 `(n_trained, n_genes)`.
        predicted: float64 `(n_new, n_genes)`: the profiles that the texts of untrained labels predict.
        mean: float64 `(n_genes,)`: the mean profile.
        named: float64 `(n_new, n_genes)`: genes that a text names, negative where the cell should lack them.
        similar: float64 `(n_new + n_trained, n_genes)`: similarity of each gene's text with the text of each label.
        contrasts: float64 `(n_new, 1 + n_trained, n_new + n_trained)`: differences of the rows of `similar` between a
            label and all trained ones together, and between it and each. The products of profiles with `named` and
            with contrasts have unit variance if genes are independent.
        ranks: float64 `(n_new, n_trained)`: of the likeness of the labels' texts, from 0 to 1, the most alike.
    """

    centroids: np.ndarray
    predicted: np.ndarray
    mean: np.ndarray
    named: np.ndarray
    similar: np.ndarray
    contrasts: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(
        cls,
        arrays: dict[str, np.ndarray],
        here: np.ndarray,
        texts: np.ndarray,
        new_texts: np.ndarray,
        named: Sequence[dict[int, int]],
    ) -> "LabelSpace":
        """From the statistics of a readout.

        Args:
            arrays: Of [`ScMMGPTLabelReadout`].
            here: bool `(num_genes,)`: the genes at hand.
            texts, new_texts: Embeddings of texts, see [`predict_centroids`].
            named: Genes that each new text names, as of [`named_genes`].
        """
        centroids, mean = arrays["centroids"][:, here], arrays["mean"][here]
        genes = arrays["gene_ids"][here]
        deviation = np.sqrt((arrays["factors"][:, here] ** 2).sum(axis=0) + arrays["noise"][here])
        by_name = np.zeros((len(new_texts), len(genes)))
        for row, found in enumerate(named):
            ids = np.array([gene for gene in found if gene in set(genes.tolist())], dtype=np.int64)
            if len(ids):
                places = np.searchsorted(genes, ids)
                by_name[row, places] = [found[int(gene)] for gene in ids] / deviation[places] / np.sqrt(len(ids))
        n_new, n_texts = len(new_texts), len(new_texts) + len(texts)
        similar = np.zeros((n_texts, len(genes)))
        if "gene_texts" in arrays:
            gene_texts = arrays["gene_texts"][here]
            known = gene_texts.any(axis=1)
            similar = np.concatenate([new_texts, texts]) @ gene_texts.T * known
            similar -= similar.sum(axis=1, keepdims=True) / max(known.sum(), 1) * known
        single = np.eye(n_texts)
        trained = np.concatenate([single[n_new:].mean(axis=0, keepdims=True), single[n_new:]])
        contrasts = single[:n_new, None] - trained
        squares = np.einsum("ijk,kl,ijl->ij", contrasts, (similar * deviation**2) @ similar.T, contrasts)
        lengths = np.sqrt(squares.clip(min=0))
        unequal = lengths > EQUAL_TEXTS * np.linalg.norm(similar * deviation, axis=1).max()
        contrasts *= np.divide(unequal, lengths, where=unequal, out=np.zeros_like(lengths))[..., None]
        ranks = (new_texts @ texts.T).argsort(axis=1, kind="stable").argsort(axis=1) / max(len(texts) - 1, 1)
        predicted = predict_centroids(centroids, texts, new_texts)
        return cls(centroids, predicted, mean, by_name, similar, contrasts, ranks)

    def products(self, ragged: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Half squared distances to trained and to predicted profiles, less half the cell's length; and genes.

        The former are `(n_cells, n)`, the evidence of genes `(n_cells, n_new, 3)`: named, similar, and in pairs.
        `ragged` is the result of [`panel_profiles`].
        """
        n_new, table = len(self.named), np.concatenate([self.named, self.similar])
        of_genes = sum_products(ragged, table) - table @ self.mean
        pairs = np.einsum("nt,ijt->nij", of_genes[:, n_new:], self.contrasts)
        of_labels = (self.centroids - self.mean) @ self.similar.T
        pairs[:, :, 1:] -= np.einsum("jt,ijt->ij", of_labels, self.contrasts[:, 1:])
        evidence = np.stack([of_genes[:, :n_new], pairs[:, :, 0], pairs[:, :, 1:].min(axis=2)], axis=2)
        return half_distances(ragged, self.centroids), half_distances(ragged, self.predicted), evidence

    def evidence(
        self, trained: np.ndarray, new: np.ndarray, of_genes: np.ndarray, expected: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Margin, novelty, genes named, similar and in pairs, relatives and doubt, `(n_cells, n_new, 7)`.

        The first arguments are those of `products`; `expected` is the novelty that a cell's depth explains.
        """
        cross = ((self.predicted[:, None] - self.centroids[None]) ** 2).sum(axis=2)  # (n_new, n_trained)
        distances = np.sqrt(cross).clip(min=1e-6)
        margins = ((trained[:, None] - new[:, :, None]) / distances).min(axis=2)
        nearest = trained.min(axis=1, keepdims=True)
        novelty = np.broadcast_to(nearest - np.reshape(expected, (-1, 1)), margins.shape)
        between = ((self.centroids - self.centroids.mean(axis=0)) ** 2).sum(axis=1).mean()
        closeness = np.exp((nearest - trained) / max(NEARNESS * between, 1e-9))
        closeness /= closeness.sum(axis=1, keepdims=True)
        doubt = -(closeness * np.log(closeness.clip(min=1e-12))).sum(axis=1, keepdims=True)
        last = np.stack([closeness @ self.ranks.T, np.broadcast_to(doubt, margins.shape)], axis=2)
        return np.concatenate([np.stack([margins, novelty], axis=2), of_genes, last], axis=2)

    def read_batch(
        self,
        gate: Gate,
        ragged: tuple[np.ndarray, np.ndarray, np.ndarray],
        trained: np.ndarray,
        of_genes: np.ndarray,
        expected: np.ndarray | float = 0.0,
    ) -> "LabelSpace":
        """Move each predicted profile towards the mean of the cells of a batch that the gate finds most like it.

        Args:
            gate: For evidence of single cells.
            ragged: Profiles of the batch, as of [`panel_profiles`], of `MIN_BATCH` cells or more.
            trained, of_genes, expected: As for `evidence`.
        """
        rows = np.repeat(np.arange(len(trained)), np.diff(ragged[0]))
        n_similar = round(BATCH_SHARE * len(trained))
        space = self
        for _ in range(BATCH_ROUNDS):
            odds = gate(space.evidence(trained, half_distances(ragged, space.predicted), of_genes, expected))
            means = np.empty_like(self.predicted)
            for label, best in enumerate(np.argsort(-odds, axis=0, kind="stable")[:n_similar].T):
                similar = np.isin(rows, best)
                sums = np.bincount(ragged[1][similar], ragged[2][similar], self.predicted.shape[1])
                means[label] = sums / len(best)
            space = replace(space, predicted=(1 - BATCH_WEIGHT) * space.predicted + BATCH_WEIGHT * means)
        return space


@dataclass
class UnseenLabels:
    """Scores of trained and untrained labels together, for the genes of one file. A cell's depend on it alone."""

    readout: PanelReadout
    space: LabelSpace
    gate: Gate

    def __call__(self, cells: Cells) -> np.ndarray:
        """Log probabilities, float32 `(n_cells, n_trained + n_new)`: the trained labels, then the new ones."""
        ragged, expected = self._profiles(cells)
        odds = self.gate(self.space.evidence(*self.space.products(ragged), expected))
        logits = np.concatenate([np.zeros((len(odds), 1)), odds], axis=1)  # of all trained labels together: 0
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return np.concatenate([self.readout(cells) + logits[:, :1], logits[:, 1:]], axis=1).astype(np.float32)

    def read_batch(self, cells: Cells) -> "UnseenLabels":
        """The same scores after a look at a batch of cells."""
        ragged, expected = self._profiles(cells)
        trained, _, of_genes = self.space.products(ragged)
        space = self.space.read_batch(self.gate, ragged, trained, of_genes, expected)
        return self.after_batch(space.predicted)

    def after_batch(self, predicted: np.ndarray) -> "UnseenLabels":
        """The same scores with the profiles `(n_new, n_genes)` that [`read_batch`] found."""
        return replace(self, space=replace(self.space, predicted=predicted), gate=self.gate.for_batch())

    def _profiles(self, cells: Cells) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """Ragged profiles, and the novelty that depth explains."""
        genes, share = self.readout.gene_ids, self.readout.share
        return panel_profiles(cells, genes, share), np.polyval(self.gate.depth, log_depth(cells, genes, share))


def sum_products(ragged: tuple[np.ndarray, np.ndarray, np.ndarray], table: np.ndarray) -> np.ndarray:
    """Products of ragged profiles with the rows of a table `(n, n_genes)`, float64 `(n_cells, n)`."""
    return sum_weights(*ragged, np.ascontiguousarray(table.T, dtype=np.float32)).astype(np.float64)


def half_distances(ragged: tuple[np.ndarray, np.ndarray, np.ndarray], profiles: np.ndarray) -> np.ndarray:
    """Half squared distances to profiles `(n, n_genes)`, less half the cell's squared length, `(n_cells, n)`."""
    return (profiles**2).sum(axis=1) / 2 - sum_products(ragged, profiles)


def log_depth(cells: Cells, gene_ids: np.ndarray, share: float) -> np.ndarray:
    """Logarithm of the counts that a cell would have in a whole transcriptome, `(n_cells,)`."""
    known = np.isin(cells.gene_ids, gene_ids)
    rows = cells.rows()[known]
    totals = np.bincount(rows, weights=cells.counts[known], minlength=len(cells))
    return np.log(totals.clip(min=1e-9) / max(share, 1e-9))


@dataclass
class GeneSearch:
    """Scores of texts by genes, for the genes of one file: the markers of a type that a text names, or else the genes
    whose own texts are nearest.

    The small encoder of texts finds genes by their words and letters ("B cell" is near CYB5B and NFIB), which serves
    conditions and no types.

    A condition that no training cell shows, such as a stimulation, moves genes that texts know.

    Args:
        gene_ids, share: As for [`PanelReadout`].
        weights: float64 `(n_texts, n_genes)`, 0 for all but `SEARCH_GENES` genes of each text.
        offset: float64 `(n_texts,)`: the product of the mean profile.
    """

    gene_ids: np.ndarray
    share: float
    weights: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(
        cls,
        readout: ScMMGPTLabelReadout,
        measured: np.ndarray,
        texts: np.ndarray,
        markers: Sequence[np.ndarray] | None = None,
    ) -> "GeneSearch":
        """From a readout with texts about genes, for the genes that a file measures.

        Args:
            readout: The readout.
            measured: Vocabulary ids of the genes that the file measures.
            texts: Embeddings of the texts to search for, `(n_texts, width)`.
            markers: For each text vocabulary ids of the markers of the type that it names; none for other texts.
        """
        arrays = readout.arrays()
        here = np.isin(arrays["gene_ids"], measured)
        gene_texts = arrays["gene_texts"][here]
        known = np.flatnonzero(gene_texts.any(axis=1))
        if not len(known):
            raise ValueError("The file measures no gene that this checkpoint has a text about; search by similarity.")
        similarity = texts @ gene_texts[known].T
        similarity -= similarity.mean(axis=1, keepdims=True)
        weights = np.zeros((len(texts), int(here.sum())))
        for row, values in enumerate(similarity):
            best = np.argsort(-values, kind="stable")[:SEARCH_GENES]
            weights[row, known[best]] = values[best].clip(min=0)
            if markers is not None and len(markers[row]):
                weights[row] = np.isin(arrays["gene_ids"][here], markers[row])
        # In standard deviations: else a few genes that vary among all cells decide.
        deviation = np.sqrt((arrays["factors"][:, here] ** 2).sum(axis=0) + arrays["noise"][here])
        weights /= np.linalg.norm(weights, axis=1, keepdims=True).clip(min=1e-9) * deviation
        share = float(arrays["shares"][here].sum())
        return cls(arrays["gene_ids"][here], share, weights, weights @ arrays["mean"][here])

    def __call__(self, cells: Cells) -> np.ndarray:
        """Scores, float32 `(n_cells, n_texts)`: 0 at the mean profile, 1 about a standard deviation of cells."""
        ragged = panel_profiles(cells, self.gene_ids, self.share)
        return (sum_products(ragged, self.weights) - self.offset).astype(np.float32)


@dataclass
class TextScores:
    """Scores of texts, some of trained labels and some of new ones, for the genes of one file.

    Args:
        panel: The readout of the trained labels among the texts, in the order of training.
        scores: `panel`, or with new labels [`UnseenLabels`].
        columns: int64 `(n_texts,)`: the column of `scores` of each text, -1 for a text of neither.
    """

    panel: PanelReadout
    scores: "PanelReadout | UnseenLabels"
    columns: np.ndarray

    @property
    def has_new_labels(self) -> bool:
        """Whether labels that were never trained are among the texts."""
        return self.scores is not self.panel

    def read_batch(self, cells: Cells) -> "TextScores":
        """The same scores after a look at a batch of cells; see [`UnseenLabels`]."""
        unseen = self.scores
        return replace(self, scores=unseen.read_batch(cells)) if isinstance(unseen, UnseenLabels) else self

    def after_batch(self, predicted: np.ndarray) -> "TextScores":
        """The same scores with the profiles of new labels that `read_batch` found elsewhere."""
        unseen = self.scores
        return replace(self, scores=unseen.after_batch(predicted)) if isinstance(unseen, UnseenLabels) else self

    @property
    def predicted(self) -> np.ndarray:
        """Profiles of the new labels, `(n_new, n_genes)`."""
        unseen = self.scores
        return unseen.space.predicted if isinstance(unseen, UnseenLabels) else np.empty((0, 0))

    @classmethod
    def of(
        cls,
        readout: ScMMGPTLabelReadout,
        trained: Sequence[str],
        texts: Sequence[str],
        unseen: np.ndarray,
        measured: np.ndarray,
        gate: dict[str, Any] | None,
        gene_index: GeneIndex,
        embed: Callable[[Sequence[str]], np.ndarray],
        profiled: Mapping[str, int] | None = None,
    ) -> "TextScores | None":
        """From a checkpoint's readout.

        Args:
            readout: The readout.
            trained: The texts of its labels.
            texts: The texts to score.
            unseen: bool `(n_texts,)`: texts of labels that mean no trained one.
            measured: Vocabulary ids of the genes that the file measures.
            gate: Fields of [`Gate`], if the checkpoint has one.
            gene_index: Names of genes.
            embed: Texts -> embeddings, float64 `(n_texts, width)`.
            profiled: Text -> number of the profile, of labels that have a profile and no cells.

        Returns:
            None if there are new labels and no gate, or no trained label.
        """
        profiled = profiled or {}
        labels = [*trained, *profiled]
        known = [number for number, text in enumerate(labels) if text in texts]
        new = [text for text, is_new in zip(texts, unseen, strict=True) if is_new]
        if not known or (new and gate is None):
            return None
        panel = readout.for_genes(measured, list(profiled.values())).select(known)
        place = {text: column for column, text in enumerate([*(labels[number] for number in known), *new])}
        columns = np.array([place.get(text, -1) for text in texts])
        if not new or gate is None:
            return cls(panel, panel, columns)
        arrays = readout.arrays()
        here = np.isin(arrays["gene_ids"], panel.gene_ids)
        named = [named_genes(text, gene_index) for text in new]
        space = LabelSpace.of(arrays, here, embed(trained), embed(new), named)
        return cls(panel, UnseenLabels(panel, space, Gate(**gate)), columns)

    def weak_labels(
        self, names: Sequence[str], n_cells: Mapping[str, float], gene_symbols: Callable[[list[int]], Sequence[str]]
    ) -> tuple[list[str], list[str]]:
        """Labels whose decisive genes the file lacks, and a warning of them, those of the most cells first.

        Args:
            names: The trained labels of `panel`, in words.
            n_cells: Label -> cells that have it, as a count or as the sum of its probabilities. A label of less than
                one cell in a hundred is no candidate for the others.
            gene_symbols: Vocabulary ids -> symbols.
        """
        expected = np.array([n_cells.get(name, 0) for name in names])
        weak = self.panel.weak_labels(expected >= LEAST_SHARE * expected.sum())
        by_cells = sorted(weak, key=lambda label: -expected[[label, weak[label][0]]].sum())
        pairs = {frozenset((label, weak[label][0])): label for label in reversed(by_cells)}  # each pair once
        told = []
        for label in reversed(pairs.values()):
            other, evidence, absent = weak[label]
            genes = ", ".join(gene_symbols(absent))
            told.append(
                f"{genes} ({names[label]!r} from {names[other]!r}: {max(evidence, 0):.0%} of the evidence left)"
            )
        lacking = some_of(told, WEAK_LABELS) + (" pairs of labels" if len(told) > WEAK_LABELS else "")
        said = f"The file lacks genes that tell labels apart, and the scores are lower for it: {lacking}."
        return [names[label] for label in weak], [said] if told else []

    def __call__(self, cells: Cells) -> np.ndarray:
        """Log probabilities, float32 `(n_cells, n_texts)`."""
        return np.where(self.columns >= 0, self.scores(cells)[:, self.columns], np.float32(NEVER))
