"""Untrained labels: scores of cells for a label that is given by a text alone.

An untrained label has no training cells. Seven kinds of evidence replace the cells:

* **place**: ridge regression from the texts of the trained labels to their mean profiles predicts a profile for the
  untrained label. The margin of a cell is the smallest signed distance from the planes that lie halfway between the
  predicted profile and the profile of a trained label;
* **novelty**: the distance between the cell and the nearest mean profile of training, minus the distance that the
  depth of the cell explains;
* **named genes**: expression of the genes that the text names. A gene after "lacks", or before "-negative", counts
  against the cell;
* **similar genes**: expression of the genes whose own texts, such as NCBI's summaries, are more similar to the label's
  text than to the texts of the trained labels; needs a checkpoint with texts of genes;
* **pairs**: as similar genes, against one trained label at a time and its mean profile; the minimum counts;
* **relatives**: text similarity of the untrained label with the trained labels nearest to the cell, as a rank;
* **doubt**: the entropy of the closeness of the cell to the trained labels.

A logistic **gate** decides between the untrained label and all trained labels together. `finetune` fits the gate on
episodes that leave one trained label out. The readout decides among the trained labels (`readout_scmmgpt`): one
softmax over all labels would hardly ever choose an untrained one.

A batch of cells locates an untrained label better than the text alone. `read_batch` moves the predicted profile
towards the cells that are most similar to the label. A second gate then decides, which is fitted on episodes after
`read_batch`.
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


SEARCH_GENES = 20  # number of genes, by similarity of their texts, that score a search text
LEAST_SHARE = 0.01  # labels with a smaller share of the cells are left out of warnings
WEAK_LABELS = 2  # number of pairs of labels that warnings name, those of the most cells; `uns` has all
# `read_batch` averages this share of the most similar cells, mixes the mean with the predicted profile by this weight,
# repeats both this number of times, and needs this number of cells.
BATCH_SHARE, BATCH_WEIGHT, BATCH_ROUNDS, MIN_BATCH = 0.1, 0.7, 2, 60
NEARNESS = 0.05  # share of the variance between labels: excess half squared distance at which closeness falls to 1/e
EQUAL_TEXTS = 1e-6  # a difference of two texts below this share of the greatest norm is rounding error
NEVER = -100.0  # log probability of a text that is neither a trained nor an untrained label
WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[0-9A-Z]+)*")
GENE_WORD = re.compile(r"[A-Z][A-Z0-9-]*\d[A-Z0-9-]*|[A-Z][A-Z0-9-]{3,}")  # CD19, FOXP3, GNLY; no English word
# Antigens that several genes encode, and antigens whose name is an HGNC alias of two genes (CD25: IL2RA, ISG20).
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
    """Predict the mean profiles of untrained labels by ridge regression from texts to profiles, both centred.

    The penalty is the mean squared norm of the centred texts of the trained labels.

    Args:
        centroids: `(n_trained, n_genes)`: mean profiles of the trained labels.
        texts: `(n_trained, width)`: embeddings of the texts of the trained labels.
        new_texts: `(n_new, width)`: embeddings of the texts of the untrained labels.

    Returns:
        `(n_new, n_genes)`, in the units of `centroids`.
    """
    mean, offset = centroids.mean(axis=0), texts.mean(axis=0)
    kernel = (texts - offset) @ (texts - offset).T
    ridge = max(np.trace(kernel) / len(texts), 1e-9) * np.eye(len(texts))  # all texts equal: predict the mean
    weights = np.linalg.solve(kernel + ridge, (texts - offset) @ (new_texts - offset).T)
    return mean + weights.T @ (centroids - mean)


def named_genes(text: str, gene_index: GeneIndex) -> dict[int, int]:
    """Vocabulary ids of the genes that a text names -> 1, or -1 if the text says that the cell lacks the gene.

    >>> index = GeneIndex({"CD19": 3, "IL2RA": 4, "CD8A": 5, "CD8B": 6})
    >>> named_genes("A cell that is CD8-positive, CD19-positive and CD25-negative.", index)
    {5: 1, 6: 1, 3: 1, 4: -1}
    """
    signs: dict[int, int] = {}
    for match in WORD.finditer(text):
        word = match.group()
        if not GENE_WORD.fullmatch(word) and word not in ANTIGENS:
            continue
        spellings = (word, word.replace("-", ""))  # GATA-3 is GATA3
        genes = [i for i, _ in map(gene_index.lookup, ANTIGENS.get(word, spellings)) if i >= 0]
        sign = -1 if is_denied(text, match) else 1
        for gene in genes if word in ANTIGENS else genes[:1]:
            signs.setdefault(gene, sign)
    return signs


def is_denied(text: str, gene: re.Match) -> bool:
    """Whether a text says that the cell lacks the gene that `gene` matched."""
    return bool(ABSENT_AFTER.match(text[gene.end() :]) or ABSENT_BEFORE.search(text[: gene.start()]))


@dataclass
class Gate:
    """A logistic gate: log odds of an untrained label = evidence / `scale` @ `weights` + `offset`.

    Args:
        weights: A weight for each column of the evidence.
        offset: The intercept.
        scale: A divisor for each column of the evidence.
        depth: Coefficients of a quadratic in the logarithm of a cell's counts, highest power first: the novelty that
            depth explains.
        batch_weights, batch_offset: Replace `weights` and `offset` after [`LabelSpace.read_batch`]. Without
            `batch_weights`, the gate stays as it is.
    """

    weights: list[float]
    offset: float
    scale: list[float]
    depth: list[float]
    batch_weights: list[float] | None = None
    batch_offset: float = 0.0

    def for_batch(self) -> "Gate":
        """The gate for evidence after [`LabelSpace.read_batch`]."""
        if self.batch_weights is None:
            return self
        return replace(self, weights=self.batch_weights, offset=self.batch_offset)

    def __call__(self, evidence: np.ndarray) -> np.ndarray:
        """Log odds `(...,)` of unscaled evidence `(..., 7)`; the gate of an older checkpoint reads fewer columns."""
        return evidence[..., : len(self.scale)] / np.asarray(self.scale) @ np.asarray(self.weights) + self.offset


@dataclass
class LabelSpace:
    """Trained and untrained labels in the space of profiles, over the genes of a file. Arrays are float64.

    The products of profiles with `named`, and with the contrasts of `similar`, have unit variance if genes are
    independent.

    Args:
        centroids: `(n_trained, n_genes)`: mean profiles of the trained labels.
        predicted: `(n_new, n_genes)`: profiles of the untrained labels, predicted from their texts.
        mean: `(n_genes,)`: the mean profile.
        named: `(n_new, n_genes)`: weights of the genes that a text names; negative for a gene that the cell lacks.
        similar: `(n_new + n_trained, n_genes)`: similarity of each gene's text with the text of each label.
        contrasts: `(n_new, 1 + n_trained, n_new + n_trained)`: weights of the rows of `similar`. The first contrast of
            an untrained label is against the mean of the trained labels, the others against one trained label each.
        ranks: `(n_new, n_trained)`: rank of the text similarity of two labels, from 0 to 1 (most similar).
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
        """The space for the genes of a file.

        Args:
            arrays: The result of [`ScMMGPTLabelReadout.arrays`].
            here: bool `(num_genes,)`: which genes of the readout the file measures.
            texts, new_texts: Embeddings of texts, see [`predict_centroids`].
            named: For each untrained label, the result of [`named_genes`].
        """
        centroids, mean = arrays["centroids"][:, here], arrays["mean"][here]
        genes = arrays["gene_ids"][here]
        deviation = np.sqrt((arrays["factors"][:, here] ** 2).sum(axis=0) + arrays["noise"][here])
        by_name = np.zeros((len(new_texts), len(genes)))
        for row, signs in enumerate(named):
            ids = np.array([gene for gene in signs if gene in set(genes.tolist())], dtype=np.int64)
            if len(ids):
                places = np.searchsorted(genes, ids)
                by_name[row, places] = [signs[int(gene)] for gene in ids] / deviation[places] / np.sqrt(len(ids))
        n_new, n_texts = len(new_texts), len(new_texts) + len(texts)
        similar = np.zeros((n_texts, len(genes)))
        if "gene_texts" in arrays:
            gene_texts = arrays["gene_texts"][here]
            has_text = gene_texts.any(axis=1)
            similar = np.concatenate([new_texts, texts]) @ gene_texts.T * has_text
            similar -= similar.sum(axis=1, keepdims=True) / max(has_text.sum(), 1) * has_text
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
        """Distances and gene evidence of cells.

        Args:
            ragged: The result of [`panel_profiles`].

        Returns:
            [`half_distances`] to the trained profiles, `(n_cells, n_trained)`, and to the predicted profiles,
            `(n_cells, n_new)`; evidence of named genes, similar genes and pairs, `(n_cells, n_new, 3)`.
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
        """All evidence, `(n_cells, n_new, 7)`: margin, novelty, named and similar genes, pairs, relatives, doubt.

        Args:
            trained, new, of_genes: The results of [`products`].
            expected: `(n_cells,)`: the novelty that the depth of a cell explains.
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
        """Move each predicted profile towards the mean of the cells with the highest log odds of the gate.

        Args:
            gate: The gate for evidence of single cells.
            ragged: The result of [`panel_profiles`] for `MIN_BATCH` cells or more.
            trained, of_genes, expected: As in [`evidence`].

        Returns:
            The same space with new `predicted` profiles.
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
    """Scores of trained and untrained labels together, for the genes of one file.

    The scores of a cell depend on that cell alone.
    """

    readout: PanelReadout
    space: LabelSpace
    gate: Gate

    def __call__(self, cells: Cells) -> np.ndarray:
        """Log probabilities, float32 `(n_cells, n_trained + n_new)`: the trained labels, then the untrained ones."""
        ragged, expected = self._profiles(cells)
        odds = self.gate(self.space.evidence(*self.space.products(ragged), expected))
        logits = np.concatenate([np.zeros((len(odds), 1)), odds], axis=1)  # the trained labels together have logit 0
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return np.concatenate([self.readout(cells) + logits[:, :1], logits[:, 1:]], axis=1).astype(np.float32)

    def read_batch(self, cells: Cells) -> "UnseenLabels":
        """These scores with predicted profiles from a batch of cells; see [`LabelSpace.read_batch`]."""
        ragged, expected = self._profiles(cells)
        trained, _, of_genes = self.space.products(ragged)
        space = self.space.read_batch(self.gate, ragged, trained, of_genes, expected)
        return self.after_batch(space.predicted)

    def after_batch(self, predicted: np.ndarray) -> "UnseenLabels":
        """These scores with the profiles `(n_new, n_genes)` of another call of [`read_batch`], and the second gate."""
        return replace(self, space=replace(self.space, predicted=predicted), gate=self.gate.for_batch())

    def _profiles(self, cells: Cells) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """Ragged profiles, and the novelty that depth explains, `(n_cells,)`."""
        genes, share = self.readout.gene_ids, self.readout.share
        return panel_profiles(cells, genes, share), np.polyval(self.gate.depth, log_depth(cells, genes, share))


def sum_products(ragged: tuple[np.ndarray, np.ndarray, np.ndarray], table: np.ndarray) -> np.ndarray:
    """Products of ragged profiles with the rows of a table `(n, n_genes)`, float64 `(n_cells, n)`."""
    return sum_weights(*ragged, np.ascontiguousarray(table.T, dtype=np.float32)).astype(np.float64)


def half_distances(ragged: tuple[np.ndarray, np.ndarray, np.ndarray], profiles: np.ndarray) -> np.ndarray:
    """Half the squared Euclidean distance to each profile, minus half the squared norm of the cell, `(n_cells, n)`.

    The norm of the cell is the same for all profiles, so differences between profiles are exact.
    """
    return (profiles**2).sum(axis=1) / 2 - sum_products(ragged, profiles)


def log_depth(cells: Cells, gene_ids: np.ndarray, share: float) -> np.ndarray:
    """Natural logarithm of the counts that a cell would have in a whole transcriptome, `(n_cells,)`.

    Args:
        cells: Raw counts.
        gene_ids: Vocabulary ids of the genes of the file.
        share: Share of the counts that these genes are expected to have.
    """
    is_measured = np.isin(cells.gene_ids, gene_ids)
    rows = cells.rows()[is_measured]
    totals = np.bincount(rows, weights=cells.counts[is_measured], minlength=len(cells))
    return np.log(totals.clip(min=1e-9) / max(share, 1e-9))


@dataclass
class GeneSearch:
    """Search by genes: scores of texts for cells, for the genes of one file.

    A text that names a cell type is scored by the markers of the type. Another text is scored by the genes whose own
    texts are most similar. Gene texts work for conditions that no training cell shows, such as a stimulation. They
    fail for cell types, as the small text encoder compares words and letters ("B cell" is similar to CYB5B and NFIB).

    Args:
        gene_ids, share: As in [`PanelReadout`].
        weights: float64 `(n_texts, n_genes)`: 0 except for the markers or `SEARCH_GENES` genes of each text.
        offset: float64 `(n_texts,)`: the score of the mean profile before centring.
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
        """The search for a file.

        Args:
            readout: A readout with texts of genes.
            measured: Vocabulary ids of the genes that the file measures.
            texts: `(n_texts, width)`: embeddings of the texts to search for.
            markers: For each text, vocabulary ids of the markers of the cell type that the text names; empty if the
                text names no type.

        Raises:
            ValueError: If the file measures no gene that has a text.
        """
        arrays = readout.arrays()
        here = np.isin(arrays["gene_ids"], measured)
        gene_texts = arrays["gene_texts"][here]
        with_text = np.flatnonzero(gene_texts.any(axis=1))
        if not len(with_text):
            raise ValueError("The file measures no gene that this checkpoint has a text about; search by similarity.")
        similarity = texts @ gene_texts[with_text].T
        similarity -= similarity.mean(axis=1, keepdims=True)
        weights = np.zeros((len(texts), int(here.sum())))
        for row, values in enumerate(similarity):
            best = np.argsort(-values, kind="stable")[:SEARCH_GENES]
            weights[row, with_text[best]] = values[best].clip(min=0)
            if markers is not None and len(markers[row]):
                weights[row] = np.isin(arrays["gene_ids"][here], markers[row])
        # Expression counts in standard deviations; otherwise a few genes that vary in all cells would decide.
        deviation = np.sqrt((arrays["factors"][:, here] ** 2).sum(axis=0) + arrays["noise"][here])
        weights /= np.linalg.norm(weights, axis=1, keepdims=True).clip(min=1e-9) * deviation
        share = float(arrays["shares"][here].sum())
        return cls(arrays["gene_ids"][here], share, weights, weights @ arrays["mean"][here])

    def __call__(self, cells: Cells) -> np.ndarray:
        """Scores, float32 `(n_cells, n_texts)`: 0 at the mean profile, in standard deviations over cells, roughly."""
        ragged = panel_profiles(cells, self.gene_ids, self.share)
        return (sum_products(ragged, self.weights) - self.offset).astype(np.float32)


@dataclass
class TextScores:
    """Scores of the texts of trained and untrained labels, for the genes of one file.

    Args:
        panel: The readout of the trained labels among the texts, in the order of training.
        scores: [`UnseenLabels`] if a label is untrained, else `panel`.
        columns: int64 `(n_texts,)`: the column of each text in `scores`; -1 for a text without a column.
    """

    panel: PanelReadout
    scores: "PanelReadout | UnseenLabels"
    columns: np.ndarray

    @property
    def has_new_labels(self) -> bool:
        """Whether a text belongs to an untrained label."""
        return self.scores is not self.panel

    def read_batch(self, cells: Cells) -> "TextScores":
        """These scores after [`UnseenLabels.read_batch`]; unchanged without untrained labels."""
        unseen = self.scores
        return replace(self, scores=unseen.read_batch(cells)) if isinstance(unseen, UnseenLabels) else self

    def after_batch(self, predicted: np.ndarray) -> "TextScores":
        """These scores after [`UnseenLabels.after_batch`]; unchanged without untrained labels."""
        unseen = self.scores
        return replace(self, scores=unseen.after_batch(predicted)) if isinstance(unseen, UnseenLabels) else self

    @property
    def predicted(self) -> np.ndarray:
        """Predicted profiles of the untrained labels, `(n_new, n_genes)`."""
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
        """The scores for a file.

        Args:
            readout: The label readout of the checkpoint.
            trained: Texts of the labels of the readout.
            texts: The texts to score.
            unseen: bool `(n_texts,)`: whether the label of the text means no trained label.
            measured: Vocabulary ids of the genes that the file measures.
            gate: Fields of [`Gate`], if the checkpoint has a gate.
            gene_index: Names of genes -> vocabulary ids.
            embed: Texts -> embeddings, float64 `(n_texts, width)`.
            profiled: Text -> number of the reference profile, for types without training cells.

        Returns:
            None if no text is of a trained label, or if a label is untrained and the checkpoint has no gate.
        """
        profiled = profiled or {}
        labels = [*trained, *profiled]
        scored = [number for number, text in enumerate(labels) if text in texts]
        new = [text for text, is_new in zip(texts, unseen, strict=True) if is_new]
        if not scored or (new and gate is None):
            return None
        panel = readout.for_genes(measured, list(profiled.values())).select(scored)
        place = {text: column for column, text in enumerate([*(labels[number] for number in scored), *new])}
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
            names: Names of the labels of `panel`.
            n_cells: Label -> number of cells, or sum of probabilities. Labels with less than `LEAST_SHARE` of the
                cells are left out.
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
