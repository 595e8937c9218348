"""Fit the gate of labels that were never trained (`unseen_scmmgpt`) on episodes that leave one trained label out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout, panel_profiles
from scmmgpt.unseen_scmmgpt import MIN_BATCH, Gate, LabelSpace, half_distances, log_depth


MIN_LABELS = 3  # an episode needs two labels beside the one that is left out
GATE_CELLS = 5000  # at most


def fit_gate(
    readout: ScMMGPTLabelReadout,
    cells: Cells,
    targets: np.ndarray,
    texts: np.ndarray,
    named: Sequence[dict[int, int]],
    seed: int = 0,
) -> Gate | None:
    """Leave out each label in turn, predict it from its text, and learn which evidence finds its cells.

    A cell's own label's mean leaves the cell out. Within an episode the cells of the left-out label weigh as much as
    all others, and every label and every episode the same.

    Args:
        readout: The statistics of the training cells.
        cells, targets: Training cells and their labels.
        texts: Embeddings of the labels' texts, `(n_labels, width)`.
        named: Genes that each text names.
        seed: Draws `GATE_CELLS` of more cells.

    Returns:
        The gate, or None for fewer than `MIN_LABELS` labels of two cells or more.
    """
    n_labels = len(texts)
    if n_labels < MIN_LABELS:
        return None
    if len(cells) > GATE_CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(len(cells), GATE_CELLS, replace=False))
        cells, targets = cells[rows], targets[rows]
    counts = np.bincount(targets, minlength=n_labels)
    if (counts > 1).sum() < MIN_LABELS:  # the only cell of a label is its mean
        return None
    cells, targets = cells[np.flatnonzero(counts[targets] > 1)], targets[counts[targets] > 1]
    counts = np.where(counts > 1, counts, 0)
    arrays = readout.arrays()
    here = np.ones(len(arrays["gene_ids"]), bool)
    share = float(arrays["shares"].sum())
    ragged = panel_profiles(cells, arrays["gene_ids"], share)
    space = LabelSpace.of(arrays, here, texts, texts, named)
    trained, _, of_genes = space.products(ragged)
    # Without the cell itself its distance from the mean of n cells grows by (n / (n - 1)) squared.
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
        episodes.append((left, trained[:, others], of_genes[:, [label]]))

    def collect(read: Gate | None = None) -> np.ndarray:
        """Evidence of all cells in all episodes, `(n_episodes * n_cells, 3)`; with `read`, after the batch."""
        pieces = []
        for left, seen, of_label in episodes:
            if read is not None:
                left = left.read_batch(read, ragged, seen, of_label, expected)
            new = half_distances(ragged, left.predicted)
            pieces.append(left.evidence(seen, new, of_label, expected)[:, 0])
        return np.concatenate(pieces)

    labels = np.flatnonzero(counts)
    is_of_label = targets == labels[:, None]  # (n_episodes, n_cells)
    weight = np.where(is_of_label, 1.0, 1 / max(len(labels) - 1, 1)) / counts[targets]

    def fit(evidence: np.ndarray) -> tuple[list[float], float]:
        model = LogisticRegression(C=1.0)
        model.fit(evidence / scale, is_of_label.ravel(), sample_weight=weight.ravel() / weight.mean())
        return model.coef_[0].clip(min=0).tolist(), float(model.intercept_[0])

    evidence = collect()
    scale = evidence.std(axis=0)
    scale[scale == 0] = 1
    weights, offset = fit(evidence)
    gate = Gate(weights, offset, scale.tolist(), curve.tolist())
    if len(cells) < MIN_BATCH:
        return gate
    batch_weights, batch_offset = fit(collect(read=gate))
    return replace(gate, batch_weights=batch_weights, batch_offset=batch_offset)
