"""The cells of a file as one more dataset of the readout: cells that stand for a label, what their means change."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack
from scipy.special import log_softmax

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.refinement_scmmgpt import (
    BACKGROUND,
    FILE_WEIGHT,
    LEAST_LEAD,
    LEAST_ROOT,
    LIKELIHOOD_WEIGHT,
    SHRINKING_CELLS,
    FileMeans,
)


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.train.pooled import Dataset, fit_pooled_readout


N_GENES, N_LABELS = 40, 3


def rates_of(targets, scale):
    """Four markers of each of three labels among genes of all; a laboratory scales each gene."""
    rates = np.full((len(targets), N_GENES), 2.0)
    for label in range(N_LABELS):
        rates[targets == label, 4 * label : 4 * label + 4] = 12
    return rates * scale


def dataset(seed, n_each=40, strength=1.5):
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(N_LABELS), n_each)
    counts = rng.poisson(rates_of(targets, strength ** rng.uniform(-1, 1, N_GENES))).astype(np.float32)
    return Dataset(csr_matrix(counts), np.arange(N_GENES), targets)


def cells_of(data):
    return Cells.from_csr(data.counts, np.arange(N_GENES))


@pytest.fixture(scope="module")
def readout():
    return fit_pooled_readout([dataset(0), dataset(1)], N_LABELS)


def dense(ragged, n_genes):
    indptr, positions, values = ragged
    return csr_matrix((values, positions, indptr), shape=(len(indptr) - 1, n_genes)).toarray()


@pytest.mark.parametrize("genes", [np.arange(N_GENES), np.arange(9)])
def test_means_are_of_the_cells_whose_best_label_leads_clearly(readout, genes):
    panel, cells = readout.for_genes(genes), cells_of(dataset(2))
    scores, profiles = panel.scores(cells), dense(panel.profiles(cells), len(genes))
    file = FileMeans.of(panel, cells)
    for label in range(N_LABELS):
        others = np.delete(scores, label, axis=1).max(axis=1)
        mine = scores[:, label] - others >= LEAST_LEAD
        assert file.n_cells[label] == mine.sum()
        np.testing.assert_allclose(file.means[label], profiles[mine].mean(axis=0), rtol=1e-5)
    assert 0 < file.n_cells.sum() < len(cells) or len(genes) == N_GENES


def test_cells_without_a_count_stand_for_no_label(readout):
    panel, counts = readout.for_genes(), dataset(2).counts
    panel.bias = panel.bias + np.float32([0.5, 0, 0])  # of an empty cell the first label leads
    with_empty = vstack([counts, csr_matrix((7, N_GENES), dtype=np.float32)]).tocsr()
    without, file = (FileMeans.of(panel, Cells.from_csr(of, np.arange(N_GENES))) for of in (counts, with_empty))
    np.testing.assert_array_equal(file.n_cells, without.n_cells)
    np.testing.assert_array_equal(file.means, without.means)


@pytest.mark.parametrize("genes", [np.arange(N_GENES), np.arange(9)])
def test_the_refined_weights_are_the_ridge_regression_of_groups_and_file(readout, genes):
    panel, cells = readout.for_genes(genes), cells_of(dataset(2))
    file = FileMeans.of(panel, cells)
    file.n_cells[1] = 0  # a label that no cell of the file stands for
    refined = file.refine(readout, panel, range(N_LABELS))
    a, here, expected = readout.arrays(), np.isin(np.arange(N_GENES), genes), []
    share = FILE_WEIGHT * file.n_cells / (file.n_cells + SHRINKING_CELLS)
    for version in readout.versions(a, here):
        rows = np.concatenate([version["groups"][:, here], file.means[[0, 2]]])
        labels = np.concatenate([version["group_labels"], np.eye(N_LABELS)[[0, 2]]])
        weights = np.concatenate([a["group_weights"], share[[0, 2]] / N_LABELS])
        weights *= labels @ (1 / (1 + share))  # a label has a third of the weight again
        x, y = rows - version["group_mean"][here], labels - 1 / N_LABELS
        factors = a["factors"][:, here]
        matrix = x.T @ (weights[:, None] * x) + factors.T @ factors + np.diag(a["noise"][here])
        expected.append(np.linalg.solve(matrix, x.T @ (weights[:, None] * y)))
    np.testing.assert_allclose(refined.file_weights, np.mean(expected, axis=0), atol=1e-5)
    np.testing.assert_array_equal(refined.scores(cells), panel.scores(cells))  # novelty is of the cell by itself
    assert np.abs(refined(cells) - panel(cells)).max() > 1e-3


def test_cells_of_another_laboratory_are_named_better_once_the_file_was_read(readout):
    alone, read = [], []
    for seed in range(10):
        data = dataset(seed + 10, strength=4)  # its genes differ up to four times from those of training
        panel, cells = readout.for_genes(), cells_of(data)
        refined = FileMeans.of(panel, cells).refine(readout, panel, range(N_LABELS))
        for found, which in ((alone, panel), (read, refined)):
            found.append(np.mean(which(cells).argmax(axis=1) == data.targets))
    assert np.mean(read) > np.mean(alone) + 0.01
    assert min(np.subtract(read, alone)) > -0.02


def test_a_cell_has_the_same_probabilities_in_any_batch_of_its_file(readout):
    panel, cells = readout.for_genes(), cells_of(dataset(2))
    refined = FileMeans.of(panel, cells).refine(readout, panel, range(N_LABELS))
    np.testing.assert_array_equal(refined(cells)[5:9], refined(cells[5:9]))


def test_candidates_alone_stand_for_labels_and_keep_their_order(readout):
    panel, cells = readout.for_genes().select([2, 0]), cells_of(dataset(2))
    file = FileMeans.of(panel, cells)
    assert file.means.shape == (2, N_GENES)
    of_two = file.refine(readout, panel, [2, 0])
    whole = FileMeans(file.means[[1, 0, 0]], file.n_cells[[1, 0, 0]] * np.array([1, 0, 1]))
    of_three = whole.refine(readout, readout.for_genes(), range(3)).select([2, 0])
    np.testing.assert_allclose(of_two.file_weights, of_three.file_weights, atol=1e-6)
    np.testing.assert_allclose(of_two.file_bias, of_three.file_bias, atol=1e-6)


def test_a_panel_weighs_in_the_likelihood_of_the_roots_of_the_counts(readout):
    panel, cells = readout.for_genes(np.arange(9)), cells_of(dataset(2))
    refined = FileMeans.of(panel, cells).refine(readout, panel, range(N_LABELS))
    a, profiles = readout.arrays(), dense(panel.profiles(cells), 9)
    roots = np.sqrt(np.expm1(profiles))
    typical = [np.expm1(a["groups"][a["group_labels"][:, label] > 0, :9]).mean(axis=0) for label in range(N_LABELS)]
    typical = np.sqrt(typical) + BACKGROUND * np.sqrt(np.expm1(a["group_mean"][:9])) + LEAST_ROOT
    likelihood = roots / roots.sum(axis=1, keepdims=True) @ np.log(typical / typical.sum(axis=1, keepdims=True)).T
    scores = profiles @ refined.file_weights + refined.file_bias + LIKELIHOOD_WEIGHT * likelihood
    expected = log_softmax(scores / panel.temperature, axis=1)
    np.testing.assert_allclose(refined(cells), expected, atol=1e-4)
    assert FileMeans.of(readout.for_genes(), cells).refine(readout, readout.for_genes(), range(3)).file_shares is None
    nothing = refined(Cells.from_csr(csr_matrix((1, N_GENES), dtype=np.float32), np.arange(N_GENES)))
    assert np.isfinite(nothing).all()
