"""What a matrix holds, which genes it has, and how it becomes `Cells`."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scmmgpt.inspection_scmmgpt import GeneIndex, inspect_matrix, read_cells, to_counts


SYMBOLS = [f"GENE{i}" for i in range(300)]


@pytest.fixture
def gene_index():
    vocabulary = {"<pad>": 0, "<cls>": 1, "<eoc>": 2} | {symbol: i + 3 for i, symbol in enumerate(SYMBOLS)}
    return GeneIndex(vocabulary, {f"ENSG{i:011d}": symbol for i, symbol in enumerate(SYMBOLS)})


@pytest.fixture
def counts():
    """UMI-like counts of 40 cells and 300 genes; every cell and gene has some."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.4, 2.0, 300) * rng.lognormal(0, 0.5, (40, 1))
    counts = rng.poisson(mean).astype(np.float32)
    counts[:, 0] += 1
    return counts


def make_adata(matrix, names=SYMBOLS):
    adata = ad.AnnData(sp.csr_matrix(matrix))
    adata.var_names = names
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    return adata


def normalized(counts, total=1e4):
    return counts / counts.sum(axis=1, keepdims=True) * total


@pytest.mark.parametrize(
    ("transform", "kind"),
    [
        (lambda c: c, "raw_integer"),
        (lambda c: normalized(c), "normalized"),
        (lambda c: np.log1p(normalized(c)), "log1p"),
        (lambda c: np.log2(1 + normalized(c, 1e6)), "log1p"),
        (lambda c: np.log1p(np.log1p(normalized(c))), "log1p_log1p"),
        (lambda c: np.log1p(normalized(c)) - 0.5, "scaled"),
    ],
)
def test_the_state_of_a_matrix_is_recognised(counts, transform, kind):
    assert inspect_matrix(transform(counts)).kind == kind


@pytest.mark.parametrize(
    "transform", [normalized, lambda c: np.log1p(normalized(c)), lambda c: np.log2(1 + normalized(c, 1e6))]
)
def test_counts_come_back_from_normalised_values(counts, transform):
    matrix = sp.csr_matrix(transform(counts).astype(np.float32))
    rows = to_counts(matrix, inspect_matrix(matrix))
    recovered = sp.csr_matrix((rows.data, rows.indices, rows.indptr), rows.shape).toarray()
    np.testing.assert_array_equal(recovered, counts)


def test_cells_hold_the_counts_of_the_matched_genes(counts, gene_index):
    cells, report = read_cells(make_adata(counts), gene_index)
    assert len(cells) == 40
    np.testing.assert_array_equal(cells.gene_ids[: cells.indptr[1]], np.flatnonzero(counts[0]) + 3)
    np.testing.assert_array_equal(cells.counts[: cells.indptr[1]], counts[0][counts[0] > 0])
    np.testing.assert_array_equal(cells.total_counts, counts.sum(axis=1))
    assert report["genes"]["share_matched"] == 1.0


def test_almost_no_matching_genes_is_refused(counts, gene_index):
    names = [*SYMBOLS[:9], *(f"PROBE{i}" for i in range(291))]
    with pytest.raises(ValueError, match=r"Only 9 of 300 genes match .*gene_column"):
        read_cells(make_adata(counts, names), gene_index)
