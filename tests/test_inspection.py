"""What a matrix holds, which genes it has, and how it becomes `Cells`."""

import json
import warnings
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scmmgpt import reading_scmmgpt
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.genes_scmmgpt import PROTEIN, GeneIndex, classify_features, detect_species, find_species
from scmmgpt.matrices_scmmgpt import convert_rows, inspect_matrix
from scmmgpt.reading_scmmgpt import choose_input, inspect_matrices, read_cells
from scmmgpt.records_scmmgpt import need_columns, storable
from scmmgpt.rows_scmmgpt import layers_of, read_rows
from scmmgpt.train.data.label_checks import check_labels


N_CELLS, N_GENES = 40, 300
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
ENSEMBL = [f"ENSG{i:011d}" for i in range(N_GENES)]
MOUSE = [f"Gene{i}" for i in range(N_GENES)]


@pytest.fixture(scope="module")
def gene_index():
    vocabulary = {"<pad>": 0, "<cls>": 1, "<eoc>": 2} | {symbol: i + 3 for i, symbol in enumerate(SYMBOLS)}
    aliases = dict(zip(ENSEMBL, SYMBOLS, strict=True)) | {"OLD7": "GENE7"}
    return GeneIndex(vocabulary, aliases, {"mouse": dict(zip(MOUSE, SYMBOLS, strict=True))})


def umi_counts(rng, n_cells=N_CELLS):
    """UMI-like counts of cells of very different depth; every cell has a gene of one count, as UMI data do."""
    mean = rng.gamma(0.4, 2.0, N_GENES) * rng.lognormal(0, 0.5, (n_cells, 1))
    counts = rng.poisson(mean)
    counts[:, 0] += 1
    counts[:, 1] = 1
    return counts


@pytest.fixture(scope="module")
def counts():
    return umi_counts(np.random.default_rng(0))


def make_adata(matrix, names=SYMBOLS):
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(matrix.shape[0])])
    return ad.AnnData(matrix, obs, pd.DataFrame(index=list(names)))


def to_counts(matrix):
    """The rows of a matrix as counts, whatever its values are."""
    verdict = inspect_matrix(matrix)
    return convert_rows(read_rows(matrix, 0, matrix.shape[0]).above(verdict.floor), verdict)[0]


def scaled_to(counts, total=1e4):
    return counts / counts.sum(axis=1, keepdims=True) * total


def ambient_corrected(counts):
    return counts - np.where(counts > 0, np.random.default_rng(1).uniform(0, 0.14, counts.shape), 0)


def median_scaled(counts):
    return scaled_to(counts, np.median(counts.sum(axis=1)))


KINDS = {  # of the states of a matrix
    "raw": "raw_integer",
    "ambient-corrected": "raw_float",
    **dict.fromkeys(["CP10k", "CPM", "median total"], "normalized"),
    **dict.fromkeys(["log1p CP10k", "log2 CPM", "log10 CP10k", "log1p counts"], "log1p"),
    "log1p twice": "log1p_log1p",
    **dict.fromkeys(["square root of CP10k", "square root of the median total", "square root of counts"], "sqrt"),
}
STATES = {
    "raw": lambda c: c,
    "ambient-corrected": ambient_corrected,
    "CP10k": scaled_to,
    "CPM": lambda c: scaled_to(c, 1e6),
    "median total": median_scaled,
    "log1p CP10k": lambda c: np.log1p(scaled_to(c)),
    "log2 CPM": lambda c: np.log2(1 + scaled_to(c, 1e6)),
    "log10 CP10k": lambda c: np.log10(1 + scaled_to(c)),
    "log1p counts": np.log1p,
    "log1p twice": lambda c: np.log1p(np.log1p(scaled_to(c))),
    "square root of CP10k": lambda c: np.sqrt(scaled_to(c)),
    "square root of the median total": lambda c: np.sqrt(median_scaled(c)),
    "square root of counts": np.sqrt,
}
LAYOUTS = {
    "dense": lambda m: m,
    "CSR": sp.csr_matrix,
    "CSC": sp.csc_matrix,
    "sparse array": sp.csr_array,
    "Fortran order": np.asfortranarray,
}


def tpm_like(rng):
    """Fractions without a unit, over four orders of magnitude, as RSEM gives them."""
    return np.where(rng.uniform(size=(N_CELLS, N_GENES)) < 0.5, rng.lognormal(2, 2, (N_CELLS, N_GENES)), 0)


def assert_same_cells(ours, theirs):
    ours, theirs = ours.sorted_by_gene(), theirs.sorted_by_gene()
    for name in ("indptr", "gene_ids", "counts", "cell_ids", "total_counts"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


def same_features(ours, theirs, **options):
    extractor = ScMMGPTFeatureExtractor(max_genes=100, **options)
    ours, theirs = extractor(ours, return_tensors="np"), extractor(theirs, return_tensors="np")
    return all(np.array_equal(ours[key], theirs[key]) for key in theirs)


# ---------------------------------------------------------------------------------------------------------------------
# The state of a matrix
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "kind"), [("raw", "normalized"), ("log1p CP10k", "log1p")])
def test_cells_of_length_1_are_no_square_roots_of_constant_totals(counts, state, kind):
    values = STATES[state](counts)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    assert inspect_matrix(values.astype(np.float32)).kind == kind


@pytest.mark.parametrize(
    ("matrix", "kind"),
    [
        (np.array([[0.0, -1.5], [2.0, 0.3]]), "scaled"),
        (np.array([[0.0, np.nan], [2.0, 0.3]]), "invalid"),
        (np.array([[0.0, np.inf], [2.0, 0.3]]), "invalid"),
        (np.array([[0.5, -np.inf]]), "invalid"),
        (np.zeros((3, 4)), "empty"),
        (tpm_like(np.random.default_rng(0)), "normalized"),
        (np.log1p(tpm_like(np.random.default_rng(0))), "log1p"),
    ],
)
def test_matrices_that_hold_no_counts_are_recognised(matrix, kind):
    assert inspect_matrix(matrix).kind == kind


@pytest.mark.parametrize("digits", [2, 4])
def test_decimals_of_tpm_are_not_taken_for_counts(digits):
    rng = np.random.default_rng(3)
    tpm = rng.lognormal(3, 2, (40, 300)) * (rng.random((40, 300)) < 0.5)
    tpm = (tpm / tpm.sum(axis=1, keepdims=True) * rng.uniform(6e5, 9e5, (40, 1))).round(digits)
    verdict = inspect_matrix(np.log2(1 + tpm))
    assert verdict.kind == "log1p"
    assert not verdict.exact


@pytest.mark.parametrize("peak", [3.0, 5.0, 6.0])
def test_logarithms_of_few_genes_around_one_integer_are_not_counts(peak):
    rng = np.random.default_rng(5)
    values = np.where(rng.random((200, 60)) < 0.3, rng.normal(peak, 0.2, (200, 60)), 0)
    assert inspect_matrix(values.astype(np.float32)).kind == "log1p"


def test_counts_of_which_a_part_was_corrected_are_counts_whatever_their_size():
    rng = np.random.default_rng(6)
    counts = rng.poisson(rng.gamma(0.5, 6, (1, 80)), (200, 80)) * rng.uniform(0.985, 1, (200, 80))
    assert inspect_matrix(counts.astype(np.float32)).kind == "raw_float"


def test_small_values_of_a_logarithm_are_not_near_an_integer():
    rng = np.random.default_rng(4)
    values = np.where(rng.random((40, 300)) < 0.6, rng.exponential(0.02, (40, 300)), rng.exponential(1.5, (40, 300)))
    assert inspect_matrix(np.round(values.clip(max=7), 6)).kind != "raw_float"


def test_base_and_total_of_a_logarithm_are_found(counts):
    verdict = inspect_matrix(np.log2(1 + scaled_to(counts, 1e6)))
    assert (verdict.base, verdict.target_sum, verdict.exact) == (2.0, 1e6, True)


def test_a_binary_logarithm_of_a_selection_of_genes_is_told_by_its_largest_cells():
    rng = np.random.default_rng(5)
    tpm = rng.lognormal(3, 1.5, (50, 300)) * (rng.random((50, 300)) < 0.6)
    shares = np.where(np.arange(50) < 15, 4e5, 8e3)  # of 1e6: most cells express little of the selection
    logs = np.log2(1 + tpm / tpm.sum(axis=1, keepdims=True) * shares[:, None] * rng.uniform(0.5, 1, (50, 1)))
    assert np.median(np.expm1(logs).sum(axis=1)) < 2e6  # the middle cell alone says nothing
    assert inspect_matrix(logs).base == 2


def test_a_natural_logarithm_of_estimated_counts_of_deep_libraries_is_no_binary_one():
    rng = np.random.default_rng(5)
    shares = rng.lognormal(0, 2, (100, 300)) * (rng.random((100, 300)) < 0.6)
    libraries = rng.lognormal(np.log(9e5), 0.8, (100, 1))  # reads of a cell; a tenth of the cells has over 2.5 million
    logs = np.log1p(shares / shares.sum(axis=1, keepdims=True) * libraries)
    assert np.quantile(np.expm1(logs).sum(axis=1), 0.9) > 2e6
    assert inspect_matrix(logs).base == np.e


@pytest.mark.parametrize("pseudo_count", [0.1, 0.5, 2, 10])
@pytest.mark.parametrize("log", [np.log, np.log2, np.log10])
def test_counts_are_recovered_from_logarithms_with_any_pseudo_count(counts, gene_index, log, pseudo_count):
    adata = make_adata(log(scaled_to(counts) + pseudo_count).astype(np.float32))
    cells, report = read_cells(adata, gene_index)
    expected, _ = read_cells(make_adata(counts), gene_index)
    np.testing.assert_array_equal(cells.counts, expected.counts)
    np.testing.assert_array_equal(cells.gene_ids, expected.gene_ids)
    assert report["matrix"]["floor"] == pytest.approx(log(pseudo_count), abs=1e-4)
    assert "this value is taken as zero" in report["warnings"][0]


@pytest.mark.parametrize("pseudo_count", [2, 3])
@pytest.mark.parametrize("log", [np.log, np.log2])
def test_a_pseudo_count_of_counts_is_not_counted(counts, log, pseudo_count):
    np.testing.assert_array_equal(to_counts(log(counts + pseudo_count)).data, counts[counts > 0])


@pytest.mark.parametrize("n_cells", [2, 5, 9])
def test_few_cells_with_a_pseudo_count_are_read_as_many_are(counts, gene_index, n_cells):
    normalised = np.log2(scaled_to(counts) + 0.5)
    for matrix in (normalised, np.log(counts + 2)):
        few, many = inspect_matrix(matrix[:n_cells]), inspect_matrix(matrix)
        assert (few.kind, few.floor, few.exact) == (many.kind, many.floor, many.exact)
    with pytest.raises(ValueError, match="one cell does not show .* pass `assume='log1p'`"):
        read_cells(make_adata(np.log(counts[:1] + 2)), gene_index)
    cells, _ = read_cells(make_adata(np.log(counts[:1] + 2)), gene_index, assume="log1p")
    assert len(cells.counts) == N_GENES


def test_binary_logarithms_of_counts_are_no_corrected_counts(counts):
    sparse = np.minimum(counts, np.random.default_rng(6).poisson(0.4, counts.shape) + 1) * (counts > 0)
    logs = np.log2(1 + sparse).astype(np.float32)
    assert (logs[logs > 0] == np.rint(logs[logs > 0])).mean() > 0.5
    np.testing.assert_array_equal(to_counts(logs).data, sparse[sparse > 0])


def test_scaled_values_are_no_logarithm_though_they_have_a_least_value(counts):
    log = np.log1p(scaled_to(counts))
    assert inspect_matrix((log - log.mean()) / log.std()).kind == "scaled"
    assert inspect_matrix(1.5 * (log - log.min(0)) / (np.ptp(log, axis=0) + 1e-9) - 0.75).kind == "scaled"


def test_counts_without_zeros_keep_their_least_value(counts, gene_index):
    filtered = counts + np.random.default_rng(5).poisson(6, counts.shape)
    filtered = filtered[:, filtered.min(axis=0) > 0]
    assert inspect_matrix(filtered).floor == inspect_matrix(np.log1p(filtered)).floor == 0
    few = np.maximum(counts[:5], 1)  # genes that five cells have may have one count in many
    cells, _ = read_cells(make_adata(few), gene_index)
    assert cells.counts.min() == 1


def test_zeros_and_ones_are_called_binary(counts):
    assert inspect_matrix((counts > 0).astype(np.int8)).evidence["binary"]


def test_counts_of_halves_are_not_taken_for_normalised_values(counts):
    halves = counts.astype(float)
    halves[::2, ::3] += 0.5
    assert inspect_matrix(halves).kind == "raw_float"


@pytest.mark.parametrize(
    "rounded",
    [
        lambda m: np.round(m, 3),
        lambda m: np.round(m, 5),
        np.vectorize(lambda x: float(f"{x:.4g}")),
        np.vectorize(lambda x: float(f"{x:.5g}")),
        np.float16,
    ],
    ids=["3 decimals", "5 decimals", "4 digits", "5 digits", "float16"],
)
@pytest.mark.parametrize("state", ["CP10k", "log1p CP10k"])
def test_rounded_values_still_give_the_counts(counts, state, rounded):
    matrix = rounded(STATES[state](counts))
    np.testing.assert_array_equal(to_counts(matrix).data, counts[counts > 0])


def test_smallest_values_of_several_counts_are_found_out(counts):
    matrix = scaled_to(np.where(counts == 1, 0, counts)[:, 2:])
    enough = (matrix > 0).sum(axis=1) > 20
    rows = to_counts(matrix[enough])
    expected = np.where(counts == 1, 0, counts)[enough, 2:]
    np.testing.assert_array_equal(rows.data, expected[expected > 0])


def test_library_sizes_of_a_few_genes_come_from_the_column_of_totals(counts, gene_index):
    adata = make_adata(np.log1p(scaled_to(counts, 2000))[:, :100].astype(np.float32), SYMBOLS[:100])
    adata.obs["n_counts"] = counts.sum(axis=1)
    cells, report = read_cells(adata, gene_index)
    np.testing.assert_array_equal(cells.total_counts, counts.sum(axis=1))
    assert report["matrix"]["target_sum"] == 2000


def test_a_chunk_takes_its_library_sizes_from_the_column_that_the_whole_file_has(counts, gene_index):
    adata = make_adata(np.log1p(scaled_to(counts, 2000))[:, :100].astype(np.float32), SYMBOLS[:100])
    adata.obs["total_counts"] = 3.0 * counts.sum(axis=1)
    adata.obs["n_counts"] = counts.sum(axis=1)
    adata.obs.loc["cell30", "total_counts"] = np.nan  # outside of the chunk
    choice = choose_input(adata, gene_index)
    np.testing.assert_array_equal(choice.convert(adata[:20]).total_counts, counts[:20].sum(axis=1))


def test_library_sizes_of_a_few_genes_come_from_the_unit(counts, gene_index):
    adata = make_adata(np.log1p(scaled_to(counts))[:, :100].astype(np.float32), SYMBOLS[:100])
    cells, report = read_cells(adata, gene_index)
    np.testing.assert_array_equal(cells.total_counts, counts.sum(axis=1))
    assert report["matrix"]["evidence"]["target_sum_from"] == "library sizes become integers"


# ---------------------------------------------------------------------------------------------------------------------
# The same cells, however they come
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_recognised_and_gives_the_same_cells(counts, gene_index, state):
    raw, _ = read_cells(make_adata(counts), gene_index)
    cells, report = read_cells(make_adata(sp.csr_matrix(STATES[state](counts).astype(np.float32))), gene_index)
    assert report["matrix"]["kind"] == KINDS[state]
    assert_same_cells(cells, raw)
    assert same_features(cells, raw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint16", "int64", "float32", "float64"])
def test_every_layout_and_type_gives_the_same_cells(counts, gene_index, layout, dtype):
    raw, _ = read_cells(make_adata(counts), gene_index)
    cells, _ = read_cells(make_adata(LAYOUTS[layout](counts.astype(dtype))), gene_index)
    assert_same_cells(cells, raw)


@pytest.mark.parametrize(
    "names",
    [
        ENSEMBL,
        [f"{name}.{i % 20}" for i, name in enumerate(ENSEMBL)],
        [symbol if i % 3 else name for i, (symbol, name) in enumerate(zip(SYMBOLS, ENSEMBL, strict=True))],
        [f"{symbol}_{name}" for symbol, name in zip(SYMBOLS, ENSEMBL, strict=True)],
        [f"GRCh38_{symbol}" for symbol in SYMBOLS],
        [f"hg19___{name}" for name in ENSEMBL],
        [symbol.replace("GENE", "Gene") if i == 5 else symbol for i, symbol in enumerate(SYMBOLS)],
        ["OLD7" if symbol == "GENE7" else symbol for symbol in SYMBOLS],
        MOUSE,
    ],
    ids=["ids", "versioned", "mixed", "joined", "genome", "genome and id", "case", "previous symbol", "mouse"],
)
def test_every_kind_of_gene_name_gives_the_same_cells(counts, gene_index, names):
    raw, _ = read_cells(make_adata(counts), gene_index)
    cells, _ = read_cells(make_adata(counts, names), gene_index)
    assert_same_cells(cells, raw)


def test_names_in_lower_case_are_read_if_the_species_is_named(counts, gene_index):
    raw, _ = read_cells(make_adata(counts), gene_index)
    lower = make_adata(counts, [name.lower() for name in MOUSE])
    assert_same_cells(read_cells(lower, gene_index, organism="mouse")[0], raw)  # by orthologs
    assert_same_cells(read_cells(lower, gene_index, organism="human")[0], raw)  # zebrafish writes lower case too


def test_mouse_names_in_capitals_are_read_as_mouse_where_only_mouse_has_some(counts, gene_index):
    raw, _ = read_cells(make_adata(counts), gene_index)
    foreign = ["GM10925", "HBB-BT", "1700012B09RIK"]
    more = np.hstack([counts, np.zeros((N_CELLS, len(foreign)), counts.dtype)])
    cells, report = read_cells(make_adata(more, [name.upper() for name in MOUSE] + foreign), gene_index)
    assert report["genes"]["species"] == "mouse"
    assert report["genes"]["how"]["ortholog"] == N_GENES
    assert_same_cells(cells, raw)


def test_shuffled_genes_give_the_same_cells(counts, gene_index):
    order = np.random.default_rng(2).permutation(N_GENES)
    raw, _ = read_cells(make_adata(counts), gene_index)
    cells, _ = read_cells(make_adata(counts[:, order], [SYMBOLS[i] for i in order]), gene_index)
    assert_same_cells(cells, raw)


def test_names_in_a_column_fill_what_the_index_leaves_open(counts, gene_index):
    adata = make_adata(counts, [symbol if i % 2 else f"PROBE{i}" for i, symbol in enumerate(SYMBOLS)])
    adata.var["gene_ids"] = ENSEMBL
    cells, report = read_cells(adata, gene_index)
    assert report["genes"]["share_matched"] == 1.0
    assert_same_cells(cells, read_cells(make_adata(counts), gene_index)[0])


@pytest.mark.parametrize("rows", [slice(5, 20), np.random.default_rng(2).permutation(N_CELLS)], ids=["part", "mix"])
def test_a_view_gives_the_cells_of_its_rows(counts, gene_index, rows):
    adata = make_adata(sp.csr_matrix(np.log1p(scaled_to(counts)).astype(np.float32)))
    assert_same_cells(read_cells(adata[rows], gene_index)[0], read_cells(adata, gene_index)[0][rows])


@pytest.mark.parametrize("layout", ["dense", "CSR", "CSC"])
def test_a_backed_file_gives_the_cells_of_memory(counts, gene_index, layout, tmp_path):
    adata = make_adata(LAYOUTS[layout](np.log1p(scaled_to(counts)).astype(np.float32)))
    adata.raw = adata
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for layer in ("X", "raw"):
        assert_same_cells(read_cells(backed, gene_index, layer=layer)[0], read_cells(adata, gene_index)[0])
    backed.file.close()


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 40, 1000])
def test_any_chunk_size_gives_the_same_cells(counts, gene_index, chunk_rows, monkeypatch):
    adata = make_adata(sp.csr_matrix(np.log1p(scaled_to(counts)).astype(np.float32)))
    cells, _ = read_cells(adata, gene_index)
    monkeypatch.setattr("scmmgpt.conversion_scmmgpt.CHUNK_ROWS", chunk_rows)
    chunks = list(choose_input(adata, gene_index).iter_cells(adata))
    assert len(chunks) == -(-len(cells) // chunk_rows)
    assert_same_cells(Cells.concatenate(chunks), cells)
    assert_same_cells(read_cells(adata, gene_index)[0], cells)


def test_a_choice_reads_any_chunk_of_its_data(counts, gene_index):
    adata = make_adata(sp.csr_matrix(scaled_to(counts).astype(np.float32)))
    choice = choose_input(adata, gene_index)
    cells = Cells.concatenate([choice.convert(adata[chunk]) for chunk in (slice(3), slice(3, 3), slice(3, None))])
    assert_same_cells(cells, read_cells(adata, gene_index)[0])


@pytest.mark.parametrize("warm_up", [-1, 10**9], ids=["compiled", "numpy"])
@pytest.mark.parametrize(
    "stored",
    [np.asfortranarray, lambda m: m.astype(">f4"), lambda m: np.repeat(m, 2, axis=1)[:, ::2], sp.csr_matrix],
    ids=["column-major", "big-endian", "view", "CSR"],
)
def test_rows_are_the_same_however_they_are_stored(counts, stored, warm_up, monkeypatch):
    monkeypatch.setattr("scmmgpt.kernels_scmmgpt.WARM_UP_CELLS", warm_up)
    matrix = counts.astype(np.float32)
    rows, expected = read_rows(stored(matrix), 5, 30), sp.csr_matrix(matrix[5:30])
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))


@pytest.mark.parametrize("warm_up", [-1, 10**9], ids=["compiled", "numpy"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.uint8])
@pytest.mark.parametrize("n_vars", [1, 6, 128, 131, 300])
def test_a_dense_matrix_of_counts_gives_the_cells_of_a_sparse_one(
    counts, gene_index, n_vars, kind, warm_up, monkeypatch
):
    monkeypatch.setattr("scmmgpt.kernels_scmmgpt.WARM_UP_CELLS", warm_up)
    matrix = np.minimum(counts[:, :n_vars], 250).astype(kind)
    names = ["unknown" if i % 5 == 4 else name for i, name in enumerate(SYMBOLS[:n_vars])]
    with warnings.catch_warnings(action="ignore"):  # the unknown names are one
        stored = make_adata(matrix, names), make_adata(sp.csr_matrix(matrix), names)
        cells, expected = (read_cells(adata, gene_index, force=True)[0] for adata in stored)
    assert_same_cells(cells, expected)
    assert cells.counts.dtype == expected.counts.dtype
    np.testing.assert_array_equal(cells.total_counts, matrix.sum(axis=1, dtype=np.float64))


@pytest.mark.parametrize("warm_up", [-1, 10**9], ids=["compiled", "numpy"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e11])
@pytest.mark.parametrize("column", [7, 9])
def test_a_wrong_value_outside_the_sample_is_refused_by_cell_and_gene(
    counts, gene_index, column, value, warm_up, monkeypatch
):
    monkeypatch.setattr("scmmgpt.kernels_scmmgpt.WARM_UP_CELLS", warm_up)
    names = ["unknown" if i == 9 else name for i, name in enumerate(SYMBOLS)]  # its counts are part of the total
    choice = choose_input(make_adata(counts.astype(np.float32), names), gene_index)
    wrong = counts.astype(np.float32)
    wrong[5, column] = value
    with pytest.raises(ValueError, match=f"cell 'cell5', gene '{names[column]}'"):
        choice.convert(make_adata(wrong, names))


def test_a_logarithm_without_a_unit_changes_no_bin(gene_index):
    values = tpm_like(np.random.default_rng(0))
    linear, _ = read_cells(make_adata(values), gene_index)
    logarithm, report = read_cells(make_adata(np.log1p(values)), gene_index)
    assert report["matrix"]["kind"] == "log1p"
    assert same_features(logarithm, linear)


@pytest.mark.parametrize("warm_up", [-1, 10**9], ids=["compiled", "numpy"])
@pytest.mark.parametrize("chunk_rows", [7, 512])
@pytest.mark.parametrize("layout", ["dense", "CSR"])
def test_duplicated_genes_are_summed(counts, gene_index, layout, chunk_rows, warm_up, monkeypatch):
    monkeypatch.setattr("scmmgpt.kernels_scmmgpt.WARM_UP_CELLS", warm_up)
    monkeypatch.setattr("scmmgpt.conversion_scmmgpt.CHUNK_ROWS", chunk_rows)
    names = [*SYMBOLS[:298], "GENE5", "GENE6-1"]
    with pytest.warns(UserWarning, match="not unique"):
        adata = make_adata(LAYOUTS[layout](counts), names)
    cells, report = read_cells(adata, gene_index)
    dense = np.zeros((N_CELLS, N_GENES + 3))
    dense[np.repeat(np.arange(N_CELLS), np.diff(cells.indptr)), cells.gene_ids] = cells.counts
    np.testing.assert_array_equal(dense[:, 8], counts[:, 5] + counts[:, 298])
    np.testing.assert_array_equal(dense[:, 9], counts[:, 6] + counts[:, 299])
    assert report["genes"]["duplicates_summed"] == 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    state=st.sampled_from(list(STATES)),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(["float32", "float64"]),
    n_cells=st.integers(2, 25),
)
# Two cells whose values, taken for logarithms, have the same total by chance.
@example(seed=5871747, state="ambient-corrected", layout="dense", dtype="float32", n_cells=2)
def test_whatever_was_done_to_counts_is_undone(gene_index, seed, state, layout, dtype, n_cells):
    counts = umi_counts(np.random.default_rng(seed), n_cells)
    raw, _ = read_cells(make_adata(counts), gene_index)
    cells, _ = read_cells(make_adata(LAYOUTS[layout](STATES[state](counts).astype(dtype))), gene_index)
    assert_same_cells(cells, raw)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    matrix=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int32, np.uint8, np.bool_]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    ),
    sparse=st.booleans(),
)
def test_any_matrix_is_read_or_refused_in_words(matrix, sparse):
    names = SYMBOLS[: matrix.shape[1]]
    index = GeneIndex({name: i for i, name in enumerate(names)})
    before = matrix.copy()
    adata = make_adata(sp.csr_matrix(matrix) if sparse else matrix, names)
    try:
        cells, report = read_cells(adata, index)
    except ValueError as error:
        assert len(str(error)) > 30  # noqa: PT017 (either outcome is right)
    else:
        assert len(cells) == len(matrix)
        assert (cells.counts > 0).all()
        assert np.isfinite(cells.counts).all()
        json.dumps(report, allow_nan=False)
    np.testing.assert_array_equal(matrix, before)


# ---------------------------------------------------------------------------------------------------------------------
# Which matrix
# ---------------------------------------------------------------------------------------------------------------------


def test_counts_in_a_layer_are_preferred_to_their_logarithm(counts, gene_index):
    adata = make_adata(np.log1p(scaled_to(counts)))
    adata.layers["counts"] = counts
    adata.layers["spliced"] = counts // 2
    assert read_cells(adata, gene_index)[1]["matrix"]["chosen"] == "counts"


def test_a_part_of_the_reads_is_never_chosen_unasked(counts, gene_index):
    adata = make_adata(np.log1p(tpm_like(np.random.default_rng(0))))
    adata.layers["spliced"] = counts
    assert read_cells(adata, gene_index)[1]["matrix"]["chosen"] == "X"
    assert read_cells(adata, gene_index, layer="spliced")[1]["matrix"]["chosen"] == "spliced"


def test_raw_is_read_where_x_is_scaled(counts, gene_index):
    adata = make_adata(np.log1p(scaled_to(counts)))
    adata.raw = adata
    adata.X = adata.X - adata.X.mean(axis=0)
    cells, report = read_cells(adata, gene_index)
    assert report["matrix"]["chosen"] == "raw"
    np.testing.assert_array_equal(cells.total_counts, counts.sum(axis=1))


def test_counts_of_all_genes_are_preferred_to_counts_of_some(counts, gene_index):
    adata = make_adata(np.log1p(scaled_to(counts)).astype(np.float32))
    adata.raw = adata
    adata = adata[:, :100].copy()
    adata.layers["counts"] = counts[:, :100]
    _, report = read_cells(adata, gene_index)
    assert report["matrix"]["chosen"] == "raw"
    assert "300 variables" in report["matrix"]["why"]


def test_the_users_layer_and_assumption_win(counts, gene_index):
    adata = make_adata(counts)
    adata.layers["corrected"] = ambient_corrected(counts)
    cells, report = read_cells(adata, gene_index, layer="corrected", assume="normalized")
    assert (report["matrix"]["chosen"], report["matrix"]["why"]) == ("corrected", "asked for")
    assert report["matrix"]["evidence"]["found"] == "raw_float"
    np.testing.assert_allclose(cells.counts, adata.layers["corrected"][counts > 0], rtol=1e-6)


def test_an_assumption_speaks_of_the_matrix_that_is_read(counts, gene_index):
    adata = make_adata(ambient_corrected(counts))
    adata.raw = adata
    adata.layers["counts"] = counts - counts.mean(axis=0)
    adata.X = np.log1p(tpm_like(np.random.default_rng(0)))
    _, report = read_cells(adata, gene_index, assume="normalized")
    assert (report["matrix"]["chosen"], report["matrix"]["kind"]) == ("raw", "normalized")
    assert report["matrix"]["candidates"]["raw"]["kind"] == "raw_float"


def test_cells_of_another_kind_keep_their_values(counts, gene_index):
    matrix = scaled_to(counts)
    matrix[7] = scaled_to(tpm_like(np.random.default_rng(0)))[7]
    cells, report = read_cells(make_adata(matrix), gene_index)
    assert report["cells"]["counts_not_recovered"] == 1
    assert "In 1 of 40 cells the values are not multiples of one unit" in report["warnings"][0]
    assert cells.total_counts[7] == pytest.approx(1e4)
    np.testing.assert_array_equal(cells[8].counts, counts[8][counts[8] > 0])


def test_an_assumption_that_cannot_be_true_is_refused(counts, gene_index):
    with pytest.raises(ValueError, match="they are not logarithms"):
        read_cells(make_adata(counts * 10.0), gene_index, assume="log1p")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "nothing"}, "layer='nothing' is not in the data; it has X"),
        ({"assume": "tpm"}, r"assume='tpm'.*choose one of"),
        ({"gene_column": "nothing"}, "gene_column='nothing' is not in var"),
    ],
)
def test_an_option_that_names_nothing_is_refused(counts, gene_index, options, words):
    with pytest.raises(ValueError, match=words):
        read_cells(make_adata(counts), gene_index, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Genes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_report_weighs_genes_by_their_expression(counts, gene_index):
    counts = counts.copy()
    counts[:, 299] = 10_000
    _, report = read_cells(make_adata(counts, [*SYMBOLS[:299], "UNKNOWN1"]), gene_index)
    assert report["genes"]["share_matched"] == pytest.approx(299 / 300, abs=1e-4)
    assert report["genes"]["share_expression_matched"] < 0.1
    assert report["genes"]["largest_unmatched"] == ["UNKNOWN1"]
    assert "of the expression" in report["warnings"][0]


def test_few_matching_genes_warn_and_hardly_any_are_refused(counts, gene_index):
    def named(n):
        return make_adata(counts, [*SYMBOLS[:n], *(f"PROBE{i}" for i in range(N_GENES - n))])

    assert not read_cells(named(200), gene_index)[1]["warnings"]
    assert "Only 150 of 300 genes match" in read_cells(named(150), gene_index)[1]["warnings"][0]
    with pytest.raises(ValueError, match=r"Only 9 of 300 genes match .*gene_column=.*force=True"):
        read_cells(named(9), gene_index)
    assert read_cells(named(9), gene_index, force=True)[1]["genes"]["matched"] == 9
    with pytest.raises(ValueError, match="Only 0 of 300"):
        read_cells(named(0), gene_index, force=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.T, r"The genes are in the rows: 200 of the first 200 names of cells are genes.*adata\.T"),
        (
            lambda a: renamed(a, [name.lower() for name in SYMBOLS]),
            r"The names match in capitals \(GENE\d+\): .*str\.upper",
        ),
        (
            lambda a: renamed(a, [f"wb-{i}" for i in range(N_GENES)], organism="C. elegans"),
            r"The data declare C\. elegans",
        ),
        (
            lambda a: renamed(a, [f"WBGene{i:08d}" for i in range(N_GENES)]),
            r"The names are genes of C\. elegans: map the names",
        ),
        (lambda a: renamed(a, [str(100 + i) for i in range(N_GENES)]), "The names are NCBI gene ids: map the names"),
        (
            lambda a: renamed(a, [f"CG{10000 + i}" for i in range(N_GENES)]),
            "These are fruit fly genes .* no ortholog table",
        ),
        (
            lambda a: renamed(a, [f"b'{name}'" for name in SYMBOLS]),
            r"""without what is around each gene: .*\.str\.removeprefix\("b'"\)\.str\.removesuffix\("'"\)""",
        ),
        (lambda a: renamed(a, [f"rna_{name}" for name in SYMBOLS]), r"\.str\.removeprefix\('rna_'\)`"),
        (lambda a: renamed(a, [f"unc-{i}" for i in range(N_GENES)]), "These are worm genes .* no ortholog table"),
    ],
)
def test_names_that_match_nothing_are_understood(counts, gene_index, change, words):
    adata = change(ad.AnnData(counts, var=pd.DataFrame(index=SYMBOLS)))
    with pytest.raises(ValueError, match=words):
        choose_input(adata, gene_index)


def renamed(adata, names, **obs):
    """Cells with other names of genes."""
    return ad.AnnData(adata.X, obs=adata.obs.assign(**obs), var=pd.DataFrame(index=names))


def test_a_column_that_is_not_there_is_answered_by_those_that_are():
    obs = pd.DataFrame({"cell_type": ["a"]})
    with pytest.raises(ValueError, match=r"no column 'celltype'; it has \['cell_type'\]. Do you mean 'cell_type'\?"):
        need_columns(obs, "cell_type", "celltype")
    with pytest.raises(ValueError, match=r"no column 'cell_type'; it has \['scmmgpt_cell_type', 'louvain'\]\.$"):
        need_columns(
            pd.DataFrame({"scmmgpt_cell_type": [""], "louvain": [""]}), "cell_type"
        )  # no label that was given
    with pytest.raises(ValueError, match=r"obs has no columns \['a', 'b'\]; it has no columns\.$"):
        need_columns(obs[[]], "a", "b")


def test_a_poor_match_says_which_number_is_small(counts, gene_index):
    with pytest.raises(ValueError, match=r"Only 7 of 7 genes match .*\(100\.0%\)\. The names are right.*few genes"):
        read_cells(make_adata(counts[:, :7], SYMBOLS[:7]), gene_index)
    few = GeneIndex({symbol: i for i, symbol in enumerate([*SYMBOLS[:40], *(f"OTHER{i}" for i in range(60))])})
    warning = read_cells(make_adata(counts), few)[1]["warnings"][0]
    assert warning.startswith("The file has only 40 of the 100 genes that the model knows (40.0%). The model knows")
    assert "PROBE" not in warning


def test_an_id_that_was_retired_is_found_by_the_symbol_beside_it(counts, gene_index):
    retired = [f"ENSG{90000000000 + i:011d}" for i in range(N_GENES)]
    raw, _ = read_cells(make_adata(counts), gene_index)
    for names in (
        [f"{symbol}_{name}" for symbol, name in zip(SYMBOLS, retired, strict=True)],
        [f"{name}.3|{symbol}" for symbol, name in zip(SYMBOLS, retired, strict=True)],
        [f"{symbol} ({name})" for symbol, name in zip(SYMBOLS, retired, strict=True)],
    ):
        assert_same_cells(read_cells(make_adata(counts, names), gene_index)[0], raw)


def test_a_species_that_is_not_known_is_refused_by_the_list(counts, gene_index):
    with pytest.raises(ValueError, match=r"organism='mice' is not a known species; choose one of human .*mouse"):
        read_cells(make_adata(counts), gene_index, organism="mice")
    words = ("mouse", "Mus musculus", "Mus_musculus", "NCBITaxon:10090", "NCBITaxon_10090", "10090")
    assert {find_species(word).name for word in words} == {"mouse"}


@pytest.mark.parametrize(
    ("values", "aside"),
    [
        (["protein_coding"] * 150 + ["lncRNA"] * 150, 0),
        (["gene"] * 299 + ["spike-in"], 1),
        (["rna"] * 298 + ["prot"] * 2, 2),
        (["Gene Expression"] * 298 + ["Multiplexing Capture"] * 2, 2),
        (["mRNA"] * 150 + ["rRNA"] * 150, 0),
    ],
    ids=["biotypes", "spike-ins", "modalities", "10x", "biotypes with a word of ours"],
)
def test_a_column_of_types_is_used_only_if_its_words_are_types(counts, gene_index, values, aside):
    adata = make_adata(counts)
    adata.var["feature_type"] = values
    assert sum(read_cells(adata, gene_index)[1]["genes"]["set_aside"].values()) == aside


def test_the_location_of_a_gene_is_no_peak(counts, gene_index):
    adata = make_adata(counts)
    adata.var["interval"] = [f"chr1:{i}-{i + 99}" for i in range(N_GENES)]
    assert not read_cells(adata, gene_index)[1]["genes"]["set_aside"]


def test_droplets_without_cells_are_warned_of(counts, gene_index):
    droplets = sp.random(400, N_GENES, 0.005, rng=np.random.default_rng(0), data_rvs=np.ones)
    warnings = read_cells(make_adata(sp.vstack([counts, droplets]).tocsr()), gene_index)[1]["warnings"]
    assert "looks unfiltered" in warnings[0]


def test_an_assumed_total_is_said(counts, gene_index):
    values = np.round(np.log1p(scaled_to(counts)), 3)[:, :100].astype(np.float32)
    _, report = read_cells(make_adata(values, SYMBOLS[:100]), gene_index)
    assert report["matrix"]["evidence"]["target_sum_from"] == "assumed"
    assert any("10,000 is assumed" in warning for warning in report["warnings"])


def test_a_panel_is_no_mistake_and_its_other_genes_are_absent(counts, gene_index):
    cells, report = read_cells(make_adata(counts[:, :50], SYMBOLS[:50]), gene_index)
    assert not report["warnings"]
    assert report["genes"]["vocabulary_measured"] == 50
    assert set(np.unique(cells.gene_ids)) <= set(range(3, 53))


def test_proteins_and_peaks_are_set_aside(counts, gene_index):
    matrix = np.hstack([counts, np.full((N_CELLS, 3), -1.5)])  # CLR-normalised proteins
    adata = make_adata(matrix, [*SYMBOLS, "CD3", "CD19", "chr1:100-200"])
    adata.var["feature_types"] = ["Gene Expression"] * N_GENES + ["Antibody Capture"] * 2 + ["Peaks"]
    cells, report = read_cells(adata, gene_index)
    assert report["genes"]["set_aside"] == {"antibody": 2, "peak": 1}
    assert_same_cells(cells, read_cells(make_adata(counts), gene_index)[0])


def test_features_are_known_by_their_names_too():
    names = ["CD3E", "CD3_TotalSeqB", "ADT-CD4", "chr1:100-200", "X-5-9", "ERCC-00002", "Blank-7", "HLA-A"]
    types = ["gene", "antibody", "antibody", "peak", "peak", "control", "control", "gene"]
    assert list(classify_features(names)) == types
    tags = [
        "CD3:UCHT1|CD3E|AHS0231|pAbO",
        "CD4.SK3.CD4.AHS0032.pAbO",
        "HTO_3",
        "CD8-GCTGCGCTTTCCATT",
        "SampleTag01_hs",
    ]
    assert set(classify_features(tags)) == {"antibody"}
    controls = ["__no_feature", "__ambiguous", "N_multimapping", "BLANK_0122", "NegControlProbe_00042", "Blank-12"]
    controls += ["FalseCode105", "Negative17", "antisense_PROKR2", "Intergenic_Region_1067", "UnassignedCodeword_0007"]
    assert set(classify_features(controls)) == {"control"}
    genes = ["ABCA1", "HTOP", "PROTAC1", "ADTRP", "CD3D", "TOTAL1", "RP11-34P13.7", "GATA3-AS1", "AB019441.29"]
    assert set(classify_features(genes)) == {"gene"}


def test_proteins_beside_genes_that_only_their_names_show_bring_a_warning(counts, gene_index):
    proteins = ["IgG1", "CD45RA", "PD-L1 (CD274)", "HLA-A,B,C", "GENE3-1"]
    adata = make_adata(np.c_[counts, counts[:, :5]], [*SYMBOLS, *proteins])
    warned = " ".join(read_cells(adata, gene_index)[1]["warnings"])
    assert "Some columns have names of proteins (IgG1, CD45RA, PD-L1 (CD274))" in warned
    adata.var["feature_types"] = ["Gene Expression"] * len(SYMBOLS) + ["Antibody Capture"] * len(proteins)
    _, report = read_cells(adata, gene_index)
    assert report["genes"]["set_aside"] == {"antibody": 5}
    assert "proteins" not in " ".join(report["warnings"])
    genes = ["IGHG1", "Ighg1", "IGHM", "Igha", "HLA-A", "CD45", "CD8A", "IGLL5", "Igd", "IGFBP7"]
    assert not any(map(PROTEIN.search, genes))


def test_a_matrix_of_proteins_is_refused(counts, gene_index):
    adata = make_adata(counts[:, :3], ["CD3", "CD4", "CD19"])
    adata.var["feature_types"] = "Antibody Capture"
    with pytest.raises(ValueError, match=r"No variable is a gene \(3 of type 'antibody'\).*RNA part"):
        read_cells(adata, gene_index)


def test_the_mouse_genes_of_a_mixture_are_set_aside(counts, gene_index):
    names = [*(f"hg19_{symbol}" for symbol in SYMBOLS), *(f"mm10_{symbol}" for symbol in MOUSE)]
    cells, report = read_cells(make_adata(np.hstack([counts, counts]), names), gene_index)
    assert report["genes"]["set_aside"] == {"mouse genome": N_GENES}
    assert_same_cells(cells, read_cells(make_adata(counts), gene_index)[0])


@pytest.mark.parametrize(
    ("names", "species"),
    [
        (["CD3E", "MS4A1", "HLA-A", "C1orf112", "RP11-34P13.7"], "human"),
        (["CD3E", "MS4A1", "GM140", "HBA-T2", "HBA-T3", "H2-KE2", "H2-KE4", "H2-KE6"], "human"),  # old human names
        (["Cd3e", "Ms4a1", "H2-K1", "mt-Nd1", "1700012B09Rik"], "mouse"),
        (["CD3E", "MS4A1", "ACTB", "GM10925", "HBB-BT", "1700012B09RIK", "RPS23-PS1"], "mouse"),
        (["ENSG00000198851", "ENSG00000156738.1"], "human"),
        (["ENSMUSG00000032093", "ENSMUSG00000024673.5"], "mouse"),
        (["ENSMMUG00000000001"], "rhesus macaque"),
        (["CD3E", "MS4A1", "ACTB", "ENSMMUG00000000001"], "rhesus macaque"),
        (["CD3E", "MS4A1", "ACTB", "ENSG00000198851"], "human"),
        (["probe_1", "probe_2"], "unknown"),
    ],
)
def test_the_species_is_read_off_the_names(names, species):
    assert detect_species(names)[0] == species


def test_mouse_given_as_human_is_said(counts, gene_index):
    adata = make_adata(counts, MOUSE)
    adata.obs["organism"] = "Homo sapiens"
    _, report = read_cells(adata, gene_index)
    assert report["genes"]["species"] == "mouse"
    assert report["genes"]["how"] == {"ortholog": N_GENES}
    assert any("The data declare human" in warning and "read as mouse" in warning for warning in report["warnings"])
    assert any("one-to-one orthologs" in warning for warning in report["warnings"])


@pytest.mark.parametrize("organism", ["Human (Homo sapiens)", "H. sapiens", "hg38", "n/a"])
def test_human_in_other_words_is_no_contradiction(counts, gene_index, organism):
    adata = make_adata(counts, [f"GENE{i}" for i in range(N_GENES)])
    adata.obs["organism"] = organism
    _, report = read_cells(adata, gene_index)
    assert report["genes"]["species"] == "human"
    assert not any("The data declare" in warning for warning in report["warnings"])


def test_mouse_without_orthologs_is_refused_by_name(counts, gene_index):
    with pytest.raises(ValueError, match=r"These are mouse genes .*no ortholog table for mouse \(it has: none\)"):
        read_cells(make_adata(counts, MOUSE), GeneIndex(gene_index.vocabulary))


def test_macaque_is_believed_where_symbols_look_human(counts, gene_index):
    index = GeneIndex(gene_index.vocabulary, {}, {"rhesus macaque": {f"MACQ{i}": s for i, s in enumerate(SYMBOLS)}})
    adata = make_adata(counts, [f"MACQ{i}" for i in range(N_GENES)])
    _, report = read_cells(adata, index, organism="Macaca mulatta")
    assert report["genes"]["how"] == {"ortholog": N_GENES}


def test_a_mouse_vocabulary_reads_mouse_genes_directly(counts):
    index = GeneIndex({name: i for i, name in enumerate(MOUSE)}, {}, {"mouse": {}})
    _, report = read_cells(make_adata(counts, MOUSE), index)
    assert report["genes"]["how"] == {"symbol": N_GENES}
    assert not report["warnings"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("HLA.A", "alias"),
        ("Y-RNA", "alias"),
        ("2-Sep", "excel date"),
        ("Mar-05", "excel date"),
        ("1-Mar", "unmatched"),
    ],
)
def test_names_that_other_programs_changed_are_found(name, how):
    index = GeneIndex({n: i for i, n in enumerate(["HLA-A", "Y_RNA", "SEPTIN2", "MARCHF5", "MARCHF1", "MARC1"])})
    assert index.lookup(name)[1] == how


# ---------------------------------------------------------------------------------------------------------------------
# Wrong files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["dense", "CSR"])
def test_values_that_are_no_numbers_are_refused_by_cell_and_gene(counts, gene_index, value, layout):
    matrix = counts.astype(np.float32)
    matrix[3, 17] = value
    with pytest.raises(ValueError, match=r"cell 'cell3', gene 'GENE17'"):
        read_cells(make_adata(LAYOUTS[layout](matrix)), gene_index)


@pytest.mark.parametrize(
    ("matrix", "error", "words"),
    [
        (np.eye(4, N_GENES) - 2.5, ValueError, r"X has negative values.*layers\['counts'\].*layer="),
        (np.zeros((4, N_GENES)), ValueError, "no value above zero"),
        (np.zeros((0, N_GENES)), ValueError, "0 cells and 300 variables"),
        (np.full((1, N_GENES), "B cell", dtype=object), TypeError, "type object; expected numbers"),
    ],
    ids=["scaled", "zeros", "no cells", "words"],
)
def test_a_matrix_without_counts_is_refused_with_a_way_out(gene_index, matrix, error, words):
    adata = make_adata(matrix)
    with pytest.raises(error, match=words):
        read_cells(adata, gene_index)


def test_a_few_negative_values_are_no_sign_of_scaling(counts, gene_index):
    counts = counts.astype(np.float32)
    counts[3, 17] = -1
    with pytest.raises(
        ValueError, match=r"few negative values \(minimum -1, less than 1% .* gene 'GENE17'\)\): expr"
    ) as said:
        read_cells(make_adata(counts), gene_index)
    assert "scale" not in str(said.value)


@pytest.mark.parametrize("logs", [False, True])
def test_smoothed_values_bring_a_warning_and_measured_ones_of_the_same_cells_none(gene_index, logs, monkeypatch):
    monkeypatch.setattr(reading_scmmgpt, "MIN_SMOOTH_GENES", 50)
    rng = np.random.default_rng(0)
    counts = umi_counts(rng).astype(np.float64)
    shares = counts / counts.sum(axis=1, keepdims=True)
    weights = rng.dirichlet(np.ones(len(counts)), size=len(counts))
    for values, is_smooth in ((shares, False), (weights @ shares, True)):
        values = np.log1p(1e4 * values) if logs else 1e4 * values
        warned = " ".join(read_cells(make_adata(values), gene_index)[1]["warnings"])
        assert ("X has 100% of the expressed genes above zero in each cell" in warned) == is_smooth


def test_genes_that_were_each_divided_by_their_deviation_are_refused_unless_their_kind_is_given(counts, gene_index):
    logs = np.log1p(scaled_to(counts))
    deviations = logs.std(axis=0, ddof=1)
    scaled = make_adata(logs / np.where(deviations, deviations, 1))
    with pytest.raises(ValueError, match=r"a standard deviation of about 1 in 100% of the genes.*layers\['counts'\]"):
        read_cells(scaled, gene_index)
    assert read_cells(scaled, gene_index, assume="log1p")[1]["matrix"]["kind"] == "log1p"


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: 2 * np.sqrt(x + 3 / 8)], ids=["plus 1", "Anscombe"])
def test_counts_that_are_nowhere_zero_have_zeros_again(counts, gene_index, change):
    sparse = np.where(counts > np.quantile(counts, 0.75), counts, 0)
    expected = read_cells(make_adata(sparse), gene_index)[0]
    cells, report = read_cells(make_adata(change(sparse)), gene_index)
    assert "this value is taken as zero" in report["warnings"][0]
    assert cells.gene_ids.tolist() == expected.gene_ids.tolist()
    assert pd.Series(cells.counts).corr(pd.Series(expected.counts), method="spearman") > 0.95


def test_cells_without_a_gene_are_kept_and_counted(counts, gene_index):
    counts = counts.copy()
    counts[5] = 0
    cells, report = read_cells(make_adata(np.log1p(counts)), gene_index)
    assert len(cells) == N_CELLS
    assert cells.total_counts[5] == 0
    assert "1 of 40 cells express no gene" in report["warnings"][0]


def test_repeated_barcodes_are_warned_of(counts, gene_index):
    adata = make_adata(counts)
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    assert "1 of 40 barcodes are repeated (such as 'same')" in read_cells(adata, gene_index)[1]["warnings"][0]


def test_labels_are_looked_at_before_they_are_learned():
    assert not check_labels(["B", "T", "B", "T"], "cell_type")
    assert "cell_type has one label for all cells ('B')" in check_labels(["B", "B"], "cell_type")[0]
    assert "1 of 5 cells have no label" in check_labels(["B", "T", "B", "T", np.nan], "cell_type")[0]
    assert "codes, not names" in check_labels(["0", "1", "0", "1"], "cell_type")[0]
    with pytest.raises(ValueError, match="None of the 2 cells has a label in cell_type"):
        check_labels([None, ""], "cell_type")


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind
# ---------------------------------------------------------------------------------------------------------------------


def test_the_users_data_are_not_altered(counts, gene_index):
    adata = make_adata(sp.csc_matrix(np.log1p(scaled_to(counts))))
    adata.layers["counts"] = sp.csr_matrix(counts)
    adata.layers["counts"].has_sorted_indices = False
    before = adata.copy()
    read_cells(adata, gene_index)
    assert not adata.uns
    for ours, theirs in ((adata.X, before.X), (adata.layers["counts"], before.layers["counts"])):
        assert type(ours) is type(theirs)
        for name in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_the_report_is_json_and_survives_a_file(counts, gene_index, tmp_path):
    adata = make_adata(ambient_corrected(counts), [*SYMBOLS[:299], "a/b"])
    adata.layers["a/b"] = counts - 5
    _, report = read_cells(adata, gene_index, layer="X")
    assert json.loads(json.dumps(report)) == report
    del adata.layers["a/b"]
    adata.var_names = SYMBOLS
    adata.uns["scmmgpt"] = {"input": storable(report)}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    stored = ad.read_h5ad(tmp_path / "cells.h5ad").uns["scmmgpt"]["input"]
    assert stored["matrix"]["kind"] == "raw_float"
    assert list(stored["warnings"]) == report["warnings"]


# ---------------------------------------------------------------------------------------------------------------------
# Real data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def human_genes():
    pytest.importorskip("celltypist", reason="its gene tables are read", exc_type=ImportError)
    from scmmgpt.train.data.gene_tables import reference_gene_index

    return reference_gene_index()


@pytest.mark.parametrize(
    ("name", "kind", "share", "how"),
    [
        ("kang_pbmc_unlabelled", "raw_integer", 0.9, "symbol"),
        ("lung_cell_lines", "raw_integer", 0.99, "ensembl"),
        ("oligodendroglioma", "normalized", 0.9, "symbol"),
        ("pbmc_facs", "raw_integer", 0.97, "ensembl"),
    ],
)
def test_what_is_said_of_real_data_is_right(shared_data, human_genes, name, kind, share, how):
    cells, report = read_cells(ad.read_h5ad(shared_data / f"{name}.h5ad"), human_genes)
    assert report["matrix"]["kind"] == kind
    assert report["genes"]["species"] == "human"
    assert report["genes"]["share_matched"] > share
    assert max(report["genes"]["how"], key=report["genes"]["how"].get) == how
    assert not report["warnings"]


def test_logarithms_of_real_counts_give_the_counts(shared_data, human_genes):
    adata = ad.read_h5ad(shared_data / "pbmc_facs.h5ad")[::10].copy()
    raw, _ = read_cells(adata, human_genes)
    adata.X.data = np.log1p(adata.X.data / np.repeat(adata.X.sum(axis=1).A1, np.diff(adata.X.indptr)) * 1e4)
    assert_same_cells(read_cells(adata, human_genes)[0], raw)


def test_the_counts_of_scanpys_bundled_data_are_recovered(human_genes):
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.datasets.pbmc68k_reduced()
    cells, report = read_cells(adata, human_genes)
    assert report["matrix"]["chosen"] == "raw"
    np.testing.assert_array_equal(cells.total_counts, adata.obs["n_counts"])
    assert (cells.counts == np.rint(cells.counts)).all()
    # Putting the counts through the same steps gives back what the file holds, to its three decimals.
    values = to_counts(adata.raw.X).data
    again = np.log1p(values / np.repeat(adata.obs["n_counts"].to_numpy(), np.diff(adata.raw.X.indptr)) * 1e4)
    np.testing.assert_allclose(again, adata.raw.X.data, atol=6e-4)


def test_layers_are_those_with_a_name():
    x, counts = np.ones((2, 3)), np.zeros((2, 3))
    as_of_anndata_0_13 = SimpleNamespace(layers={None: x, "counts": counts})  # lists X among the layers
    assert layers_of(as_of_anndata_0_13) == {"counts": counts}
    assert list(layers_of(ad.AnnData(x, layers={"counts": counts}))) == ["counts"]


def test_an_adata_whose_layers_list_x_is_read_once():
    adata = ad.AnnData(np.random.default_rng(0).poisson(2.0, (30, 50)).astype("float32"))
    cells = SimpleNamespace(X=adata.X, raw=None, obs=adata.obs, var=adata.var, layers={None: adata.X})
    assert [candidate.name for candidate in inspect_matrices(cells)] == ["X"]
