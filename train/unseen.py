"""Fit the parts for labels without training cells (`unseen_scmmgpt`): a gate, and gene directions from gene texts.

The gate is a logistic regression, fitted on episodes that each leave one trained label out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.machine_scmmgpt import cpu_dtype
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout, panel_profiles
from scmmgpt.scoring_scmmgpt import text_states
from scmmgpt.train.data.gene_tables import load_gene_texts
from scmmgpt.unseen_scmmgpt import MIN_BATCH, Gate, LabelSpace, half_distances, log_depth


MIN_LABELS = 3  # an episode needs two labels beside the one that is left out
GATE_CELLS = 5000  # most cells for the fit of the gate
EMBEDDED: dict[bytes, dict[str, np.ndarray]] = {}  # cache: fingerprint of the encoder -> text -> embedding
# Prior for the seven weights of the gate, because few labels give too few episodes to fit seven weights: the mean of
# the unit-length weights in five other datasets (`lymphoid_ref`, `liver_he`, `hnscc_puram`, `spatial_cosmx_lung_left`,
# `tonsil_pbmc_lr_panel`). The prior counts as `COMMON_EPISODES` episodes; train/LOG.md has the choice of both.
COMMON_WEIGHTS = np.array([0.571, 0.322, 0.200, 0.240, 0.231, 0.394, 0.112])
COMMON_EPISODES = 9
GENE_TEXTS = 4000  # most variable genes whose texts are embedded: texts take minutes, other genes hardly change a sum


def fit_gate(
    readout: ScMMGPTLabelReadout,
    cells: Cells,
    targets: np.ndarray,
    texts: np.ndarray,
    named: Sequence[dict[int, int]],
    seed: int = 0,
) -> Gate | None:
    """Fit the gate that weighs the evidence for a label without training cells.

    1. Each episode leaves out one label, and predicts the mean of the label from its text.
    2. A logistic regression over all episodes finds the weights of the seven columns of evidence for the left-out
       label. The weights are shrunk towards `COMMON_WEIGHTS`; slope and offset are then fitted again.
    3. With `MIN_BATCH` cells or more, a second regression gives separate weights for a batch of cells: there the
       predicted mean has moved towards the most similar cells of the batch.

    The distance of a cell to the mean of its own label is corrected as if the cell were not in the mean. Within an
    episode, the cells of the left-out label weigh as much as all other cells. Every label and every episode has the
    same weight.

    Args:
        readout, cells, targets: Statistics of the training cells, the cells, and their labels, int64 `(n_cells,)`.
        texts: Embeddings of the labels' texts, `(n_labels, width)`.
        named: For each label, the genes that its text names.
        seed: Seed of the sample of `GATE_CELLS` cells, if there are more.

    Returns:
        The gate, or None if fewer than `MIN_LABELS` labels have two cells or more.
    """
    n_labels = len(texts)
    if n_labels < MIN_LABELS:
        return None
    cells, targets, counts = _cells_of_gate(cells, targets, n_labels, seed)
    if np.count_nonzero(counts) < MIN_LABELS:
        return None
    arrays = readout.arrays()
    here = np.ones(len(arrays["gene_ids"]), bool)
    share = float(arrays["shares"].sum())
    ragged = panel_profiles(cells, arrays["gene_ids"], share)
    trained, _, _ = LabelSpace.of(arrays, here, texts, texts, named).products(ragged)
    # If a mean of n cells leaves out the cell itself, the squared distance of the cell grows by (n / (n - 1)) ** 2.
    rows = np.repeat(np.arange(len(cells)), np.diff(ragged[0]))
    half = np.bincount(rows, weights=ragged[2].astype(np.float64) ** 2, minlength=len(cells)) / 2
    own = np.arange(len(cells)), targets
    growth = (counts / np.maximum(counts - 1, 1)) ** 2
    trained[own] = (trained[own] + half) * growth[targets] - half
    depth = log_depth(cells, arrays["gene_ids"], share)
    curve = np.polyfit(depth, trained[own], 2)
    expected = np.polyval(curve, depth)

    episodes = []
    for label in np.flatnonzero(counts).tolist():
        others = np.delete(np.arange(n_labels), label)
        means = arrays["centroids"][others]
        part = {**arrays, "centroids": means, "mean": means.mean(axis=0)}
        left = LabelSpace.of(part, here, texts[others], texts[[label]], [named[label]])
        episodes.append((left, trained[:, others], left.products(ragged)[2]))

    def collect(batch_gate: Gate | None = None) -> np.ndarray:
        """Evidence of all cells in all episodes, `(n_episodes * n_cells, 7)`; with a gate, that of a batch."""
        pieces = []
        for left, seen, of_genes in episodes:
            if batch_gate is not None:
                left = left.read_batch(batch_gate, ragged, seen, of_genes, expected)
            pieces.append(left.evidence(seen, half_distances(ragged, left.predicted), of_genes, expected)[:, 0])
        return np.concatenate(pieces)

    labels = np.flatnonzero(counts)
    is_of_label = targets == labels[:, None]  # (n_episodes, n_cells)
    weight = np.where(is_of_label, 1.0, 1 / max(len(labels) - 1, 1)) / counts[targets]

    def fit(evidence: np.ndarray) -> tuple[np.ndarray, float]:
        model = LogisticRegression(C=1.0)
        model.fit(evidence, is_of_label.ravel(), sample_weight=weight.ravel() / weight.mean())
        return model.coef_[0].clip(min=0), float(model.intercept_[0])

    evidence = collect()
    scale = evidence.std(axis=0)
    scale[scale == 0] = 1
    weights = towards_common(fit(evidence / scale)[0], len(labels))
    slope, offset = fit(evidence / scale @ weights[:, None])
    gate = Gate((weights * slope).tolist(), offset, scale.tolist(), curve.tolist())
    if len(cells) < MIN_BATCH:
        return gate
    batch_weights, batch_offset = fit(collect(gate) / scale)
    return replace(gate, batch_weights=batch_weights.tolist(), batch_offset=batch_offset)


def towards_common(weights: np.ndarray, n_episodes: int) -> np.ndarray:
    """Shrink the weights `(7,)` of a gate, for evidence of unit variance, towards `COMMON_WEIGHTS`."""
    common = np.linalg.norm(weights) * COMMON_WEIGHTS
    return (n_episodes * weights + COMMON_EPISODES * common) / (n_episodes + COMMON_EPISODES)


def _cells_of_gate(
    cells: Cells, targets: np.ndarray, n_labels: int, seed: int
) -> tuple[Cells, np.ndarray, np.ndarray]:
    """Sample at most `GATE_CELLS` cells; drop labels with one cell, because the cell equals the mean of its label.

    Return also their labels, and the number of cells of each label `(n_labels,)`, 0 for dropped labels.
    """
    if len(cells) > GATE_CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(len(cells), GATE_CELLS, replace=False))
        cells, targets = cells[rows], targets[rows]
    counts = np.bincount(targets, minlength=n_labels)
    several = counts[targets] > 1
    return cells[np.flatnonzero(several)], targets[several], np.where(counts > 1, counts, 0)


def embed_gene_texts(
    readout: ScMMGPTLabelReadout, tables: Sequence[Mapping[int, str]], embed: Callable[[list[str]], np.ndarray]
) -> np.ndarray:
    """Embed texts about genes: centre the embeddings of each table, then average over the tables that have the gene.

    A table maps vocabulary ids to texts of one kind, such as summaries or names; the genes are those of the readout.
    `embed` turns texts into embeddings `(n_texts, width)`.

    Returns:
        float64 `(num_genes, width)`; 0 for genes without a text, and for genes with a text that are not among the
        `GENE_TEXTS` most variable.
    """
    arrays = readout.arrays()
    ids, variance = arrays["gene_ids"], (arrays["factors"] ** 2).sum(axis=0) + arrays["noise"]
    with_text = np.flatnonzero(np.isin(ids, [gene for table in tables for gene in table]))
    chosen = with_text[np.argsort(-variance[with_text], kind="stable")[:GENE_TEXTS]]
    if not len(chosen):
        raise ValueError("None of the genes that have a text is expressed in the training cells.")
    sums: np.ndarray = np.zeros(())
    counts = np.zeros((len(ids), 1))
    for table in tables:
        places = [place for place in chosen.tolist() if int(ids[place]) in table]
        if places:
            embeddings = embed_once(embed, [table[int(ids[place])] for place in places])
            directions = np.zeros((len(ids), embeddings.shape[1]))
            directions[places] = embeddings - embeddings.mean(axis=0)
            sums, counts[places] = sums + directions, counts[places] + 1
    return sums / np.maximum(counts, 1)


def embed_once(embed: Callable[[list[str]], np.ndarray], texts: list[str]) -> np.ndarray:
    """Call `embed` only for texts that the same encoder has not embedded in this process.

    An evaluation fine-tunes dozens of models that start from one BERT.
    """
    known = EMBEDDED.setdefault(embed(["cell"]).tobytes(), {})  # the embedding of "cell" identifies the encoder
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        known.update(zip(new, embed(new), strict=True))
    return np.stack([known[text] for text in texts])


def add_gene_texts(model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, path: str | Path | None) -> None:
    """Set the gene directions of a model's label readout from the table at `path`; do nothing without readout or path.

    The format of the table is that of [`load_gene_texts`].
    """
    if path is None or getattr(model, "label_readout", None) is None:
        return
    lookup = processor.gene_index.lookup
    tables = [{lookup(symbol)[0]: text for symbol, text in table.items()} for table in load_gene_texts(path)]
    device = model.logit_scale.device.type
    half = device == "cpu" and cpu_dtype(torch.bfloat16) == torch.bfloat16  # thousands of texts take minutes

    def embed(texts: list[str]) -> np.ndarray:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return text_states(model, processor, texts)

    directions = embed_gene_texts(model.label_readout, tables, embed)
    model.label_readout.set_gene_texts(directions)
    sizes = dict(zip(("num_texts", "text_width"), model.label_readout.gene_texts.shape, strict=True))
    model.config.label_readout = {**(model.config.label_readout or {}), **sizes}
