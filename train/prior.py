"""What a checkpoint knows of the labels of a file, as a start of the regression that learns them from few cells.

The label readout of a checkpoint knows some types from many cells of other datasets. [`known_regression`] writes its
scores as a regression of the user's labels on profiles, in the units of `train.readout`: a label has the scores of the
trained labels that it means, in any words, and a label that the checkpoint does not know has none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.evidence_scmmgpt import label_members
from scmmgpt.labels_scmmgpt import profiled_types, with_types
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.train.readout import LinearModel


PRIOR_WEIGHT = 0.1  # of the checkpoint's logits, over eleven datasets left out of it (`train/LOG.md`)


def known_regression(
    readout: ScMMGPTLabelReadout,
    texts: Sequence[str],
    annotation: Mapping[str, Any],
    names: Sequence[str],
    measured: np.ndarray,
    cells: Cells,
    profiles: csr_matrix,
) -> LinearModel | None:
    """The logits of a checkpoint for labels of a file, times `PRIOR_WEIGHT`, as a regression on profiles.

    Args:
        readout: The label readout of the checkpoint.
        texts: Texts of its labels, in order: `config.label_readout["texts"]`.
        annotation: `config.annotation` of the checkpoint.
        names: Labels of the file, or their Cell Ontology ids.
        measured: Vocabulary ids of the genes that the file measures.
        cells: All cells of the file.
        profiles: Their profiles, square roots of shares of counts, float32 `(n_cells, vocab_size)`.

    Returns:
        The regression, or `None` if the checkpoint knows fewer than two of the labels, or none of the genes.
    """
    trained, types = annotation.get("labels", {}), annotation.get("profiles", [])
    named = profiled_types({name: name for name in names}, annotation.get("cl_ids", {}), trained, types)
    some = list(named.values())
    label_of = {text: label for label, text in trained.items()}
    known = [label_of[text] for text in texts if text in label_of]
    if len(known) != len(texts) or not np.isin(readout.gene_ids.numpy(), measured).any():
        return None
    columns = {label: column for column, label in enumerate([*known, *(types[number]["name"] for number in some)])}
    terms = with_types(annotation.get("terms", []), [types[number] for number in some])
    members = owned(label_members(names, columns, terms, annotation))
    if members.any(axis=1).sum() < 2:
        return None
    panel = readout.for_genes(measured, some)
    model = LinearModel(np.zeros((len(names), profiles.shape[1])), members @ panel.bias)
    starts, positions, values = panel.profiles(cells)
    of_panel = csr_matrix((values, positions, starts), shape=(len(cells), len(panel.gene_ids)))
    slopes = slopes_of(of_panel, profiles[:, panel.gene_ids])
    model.weights[:, panel.gene_ids] = members @ (panel.weights * slopes[:, None]).T
    model.weights *= PRIOR_WEIGHT / panel.temperature
    model.bias *= PRIOR_WEIGHT / panel.temperature
    return model


def owned(members: np.ndarray) -> np.ndarray:
    """Members of labels, bool `(n_labels, n_trained)`, where a trained label belongs to the narrowest label alone."""
    widths = np.where(members, members.sum(axis=1, keepdims=True), np.iinfo(np.int64).max)
    return members & (widths == widths.min(axis=0))


def slopes_of(values: csr_matrix, profiles: csr_matrix) -> np.ndarray:
    """Of each gene, the factor from its profiles to `values`, by least squares through zero, float64 `(n_genes,)`.

    A logarithm of a share is nearly proportional to its square root over the few counts that most genes have: the
    scores correlate by 0.97 to 0.998 with the exact ones. A gene without a count has the factor of all genes.
    """
    products = np.asarray(values.multiply(profiles).sum(axis=0), dtype=np.float64).ravel()
    squares = np.asarray(profiles.power(2).sum(axis=0), dtype=np.float64).ravel()
    pooled = products.sum() / max(squares.sum(), np.finfo(np.float64).tiny)
    return np.divide(products, squares, out=np.full(len(squares), pooled), where=squares > 0)
