"""Genes that training cells did not measure: [`find_measured`] and [`complete_libraries`].

A panel of some hundred genes has no count of the others, which is not the same as cells that do not express them. A
gene of which a dataset has no count is taken as not measured where cells of the same type, or of kinds of it, of other
datasets have counts of it. Else it is taken as not expressed: files of whole transcriptomes leave out the genes that
none of their cells expresses, and of a type that one panel alone has nothing more is known.
"""

from collections.abc import Callable, Collection

import numpy as np
from scipy import sparse


LIBRARY_ROUNDS = 20  # of the libraries of panels and the profiles of types, each given the other


def find_measured(
    counts: sparse.csr_matrix,
    datasets: np.ndarray,
    types: np.ndarray,
    above: Callable[[str], Collection[str]] = lambda _: (),
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The genes that the cells of a dataset and a type measured.

    Args:
        counts: Raw counts, CSR `(n_cells, n_genes)`.
        datasets, types: Of each cell, str `(n_cells,)`. A type is alike those above and below it.
        above: The broader types of a type.

    Returns:
        The group of each cell, int64 `(n_cells,)`; the genes that each group measured, bool `(n_groups, n_genes)`; and
        for each group the groups of its type and of those alike.

    >>> counts = sparse.csr_matrix(np.array([[5, 0, 0, 0], [3, 7, 1, 0], [0, 4, 0, 0]]))
    >>> datasets, types = np.array(["panel", "whole", "panel"]), np.array(["B", "B", "T"])
    >>> find_measured(counts, datasets, types)[1].astype(int)
    array([[1, 1, 0, 1],
           [1, 1, 1, 1],
           [1, 1, 1, 1]])
    """
    pairs, groups = np.unique(np.stack([datasets, types]).astype(str), axis=1, return_inverse=True)
    groups, n_groups = groups.reshape(-1), pairs.shape[1]
    members = sparse.csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))), (n_groups, len(groups)))
    has = (members @ counts).toarray() > 0
    in_terms = {name: {name, *above(name)} for name in np.unique(pairs[1])}
    alike = [
        np.flatnonzero([name in in_terms[other] or other in in_terms[name] for other in pairs[1]]) for name in pairs[1]
    ]
    of_dataset = {name: has[pairs[0] == name].any(axis=0) for name in np.unique(pairs[0])}
    measured = [
        of_dataset[dataset] | ~has[others].any(axis=0) for dataset, others in zip(pairs[0], alike, strict=True)
    ]
    return groups, np.stack(measured), alike


def complete_libraries(
    counts: sparse.csr_matrix,
    sizes: np.ndarray,
    groups: np.ndarray,
    measured: np.ndarray,
    alike: list[np.ndarray],
) -> np.ndarray:
    """Library sizes as if every gene had been measured, `(n_cells,)`.

    Many panels know the counts of their own genes alone. Their cells are taken for thinner copies of those of their
    type: a profile of the type and a factor of each group are fitted to the mean expression of the genes that the
    groups measured, each given the other. The group of most genes keeps its library sizes.

    Args:
        counts: Raw counts, CSR `(n_cells, n_genes)`.
        sizes: Library sizes as the files have them, `(n_cells,)`.
        groups, measured, alike: Of [`find_measured`].
    """
    n_cells = np.bincount(groups).astype(np.float64)
    members = sparse.csr_matrix((1 / sizes, (groups, np.arange(len(groups)))), (len(n_cells), len(groups)))
    shares = (members @ counts).toarray() / n_cells[:, None]  # mean of count / library
    factors = np.ones(len(n_cells))
    for group, others in enumerate(alike):
        if measured[group].all():
            continue
        share, has, weight, factor = shares[others], measured[others], n_cells[others], np.ones(len(others))
        for _ in range(LIBRARY_ROUNDS):
            profile = weight @ share / np.maximum((weight * factor) @ has, 1e-9)
            factor = share.sum(axis=1) / np.maximum(has @ profile, 1e-9)
        factors[group] = factor[others == group][0] / factor[has.sum(axis=1).argmax()]
    return sizes * factors[groups]
