"""Cells and their tokenisation, against a plain re-derivation of the algorithm, one cell and one gene at a time."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor

from scmmgpt import feature_extraction_scmmgpt, kernels_scmmgpt
from scmmgpt.cells_scmmgpt import (
    Cells,
    hash_names,
    hash_seed,
    hashes,
    log1p_cp10k,
    normalize_log1p,
    permutation,
)
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor, mask_genes
from scmmgpt.rows_scmmgpt import read_rows


WORD = 2**64
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(params=["compiled", "numpy"])
def path(request, monkeypatch):
    """Both implementations: every test that asks for this runs on each."""
    take_path(monkeypatch, request.param)
    return request.param


def take_path(monkeypatch, path):
    if path == "compiled" and kernels_scmmgpt.njit is None:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(kernels_scmmgpt, "WARM_UP_CELLS", -1 if path == "compiled" else math.inf)


# The reference: Python integers and one np.quantile a cell.


def split_mix(state):
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB % WORD
    return state ^ state >> 31


def reference_hash(cell_id, gene_id, *, seed, epoch, stream=0):
    key = 0
    for part in (seed, epoch, stream):
        key = split_mix((key + 0x9E3779B97F4A7C15 + part) % WORD)
    return split_mix((split_mix(int(cell_id) ^ key) + (int(gene_id) + 1) * 0x9E3779B97F4A7C15) % WORD)


def reference_bins(counts, hashes, n_bins):
    """As the method is described: edges by np.quantile, digitize from both sides, a uniform draw between."""
    edges = np.quantile(counts, np.linspace(0, 1, n_bins - 1))
    upper, lower = np.digitize(counts, edges), np.digitize(counts, edges, right=True)
    uniform = [hash % 2**32 / 2**32 for hash in hashes]
    return [math.ceil(a + u * (float(b) - float(a))) for a, b, u in zip(upper, lower, uniform, strict=True)]


def reference_tokens(cells, extractor, *, epoch=0):
    """Genes and values of every cell, `<cls>` first, without padding."""
    rows = []
    for i in range(len(cells)):
        entries = slice(cells.indptr[i], cells.indptr[i + 1])
        genes, counts = cells.gene_ids[entries], cells.counts[entries]
        hashes = [reference_hash(cells.cell_ids[i], gene, seed=extractor.seed, epoch=epoch) for gene in genes]
        if extractor.value_mode == "binned":
            values = reference_bins(counts, hashes, extractor.n_bins) if len(counts) else []
        elif extractor.value_mode == "log1p":
            total = counts.sum() if cells.total_counts is None else cells.total_counts[i]
            values = [math.log1p(float(count) / float(total) * extractor.target_sum) for count in counts]
        else:
            values = counts.tolist()
        by = [(-float(c) if extractor.selection == "top" else 0.0, h) for c, h in zip(counts, hashes, strict=True)]
        kept = sorted(sorted(range(len(genes)), key=by.__getitem__)[: extractor.max_genes - 1])
        rows.append(
            (
                [extractor.cls_token_id, *(int(genes[k]) for k in kept)],
                [extractor.cls_value, *(float(values[k]) for k in kept)],
            )
        )
    return rows


def assert_tokens(batch, rows):
    """A padded batch holds exactly these rows."""
    for i, (genes, values) in enumerate(rows):
        n = int(batch["cell_attention_mask"][i].sum())
        assert batch["cell_attention_mask"][i].tolist() == [1] * n + [0] * (batch["gene_ids"].shape[1] - n)
        assert batch["gene_ids"][i, :n].tolist() == genes
        np.testing.assert_allclose(batch["expression"][i, :n], values, rtol=1e-6)


def make_cells(n_cells=20, n_genes=400, *, kind="counts", seed=0, density=0.4):
    """Random cells; two of them empty."""
    rng = np.random.default_rng(seed)
    expressed = rng.random((n_cells, n_genes)) < density * rng.random((n_cells, 1))
    expressed[[0, n_cells // 2]] = False
    lengths = expressed.sum(axis=1)
    nnz = lengths.sum()
    counts = {
        "counts": lambda: np.where(rng.random(nnz) < 0.6, 1, rng.geometric(0.05, nnz)).astype(np.uint16),
        "deep": lambda: rng.integers(1, 60000, nnz).astype(np.int32),
        "huge": lambda: rng.integers(1, 2**50, nnz),
        "whole floats": lambda: rng.geometric(0.3, nnz).astype(np.float32),
        "ambient-corrected": lambda: (rng.geometric(0.3, nnz) + rng.random(nnz).round(1)).astype(np.float32),
        "all ones": lambda: np.ones(nnz, dtype=np.uint16),
    }[kind]()
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]),
        (np.nonzero(expressed)[1] + 2).astype(np.uint16),
        counts,
        rng.integers(0, 2**63, n_cells).astype(np.uint64),
    )


KINDS = ["counts", "deep", "huge", "whole floats", "ambient-corrected", "all ones"]


# Against the reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["random", "top"])
@pytest.mark.parametrize("value_mode", ["binned", "log1p", "raw"])
def test_tokens_are_those_of_the_reference(path, kind, selection, value_mode):
    cells = make_cells(kind=kind)
    extractor = ScMMGPTFeatureExtractor(max_genes=60, selection=selection, value_mode=value_mode, seed=7)
    assert_tokens(extractor(cells, epoch=3), reference_tokens(cells, extractor, epoch=3))


@pytest.fixture(scope="module")
def recorded():
    """Bins of the original, recorded: see `references/scgpt_binning.md`."""
    with np.load(Path(__file__).parent / "references" / "scgpt_binning.npz") as arrays:
        return dict(arrays)


def test_bins_are_those_of_the_original_for_the_same_draws(recorded):
    def draw(draws):
        cells = recorded["indptr"].astype(int), recorded["counts"]
        return feature_extraction_scmmgpt._draw_bins(*cells, draws, np.linspace(0, 1, 50))

    draws = recorded["draws"].astype(np.uint64)
    np.testing.assert_array_equal(draw(np.zeros_like(draws)), recorded["highest"])
    np.testing.assert_array_equal(draw(np.full_like(draws, 2**32 - 1)), recorded["lowest"])
    np.testing.assert_array_equal(draw(draws), recorded["bins"])


def test_binning_spreads_ties_evenly_over_their_bins(path):
    # 20,000 genes with one count each: every edge is 1, and so every bin from 1 to 50 is as likely.
    cells = Cells([0, 20_000], np.arange(20_000), np.ones(20_000, dtype=np.uint16), np.array([5], dtype=np.uint64))
    bins = ScMMGPTFeatureExtractor(max_genes=20_001)(cells, return_tensors="np")["expression"][0, 1:].astype(int)
    counts = np.bincount(bins, minlength=51)
    assert counts[0] == 0
    assert len(counts) == 51
    chi_square = ((counts[1:] - 400) ** 2 / 400).sum()
    assert chi_square < 85.4  # 99.9 % point at 49 degrees of freedom


def test_bins_of_a_small_cell_can_be_checked_by_eye(path):
    # Three edges at the quantiles 0, 1/2 and 1 of (1, 2, 3, 4): 1, 2.5 and 4.
    cells = Cells([0, 4], [10, 11, 12, 13], [1, 2, 3, 4], np.array([1], dtype=np.uint64))
    batch = ScMMGPTFeatureExtractor(n_bins=4)(cells)
    assert batch["gene_ids"].tolist() == [[1, 10, 11, 12, 13]]
    assert batch["expression"].tolist() == [[-2.0, 1.0, 1.0, 2.0, 3.0]]
    assert batch["cell_attention_mask"].tolist() == [[1, 1, 1, 1, 1]]


def test_random_selection_takes_every_gene_equally_often(path):
    cells = Cells([0, 40], np.arange(40), np.arange(1, 41), np.array([3], dtype=np.uint64))
    extractor = ScMMGPTFeatureExtractor(max_genes=11, value_mode="raw")
    drawn = np.concatenate([extractor(cells, epoch=epoch)["gene_ids"][0, 1:] for epoch in range(2000)])
    # Binomial(2000, 1/4): mean 500, standard deviation 19.4.
    assert np.abs(np.bincount(drawn, minlength=40) - 500).max() < 4 * 19.4


def test_whole_counts_that_a_float_cannot_hold_stay_apart(path):
    # As float32 the first two would tie; the three edges are 2**24, 2**24 + 1 and 2**24 + 2.
    cells = Cells([0, 3], [10, 11, 12], [2**24, 2**24 + 1, 2**24 + 2], np.array([1], dtype=np.uint64))
    assert ScMMGPTFeatureExtractor(n_bins=4)(cells)["expression"].tolist() == [[-2.0, 1.0, 2.0, 3.0]]


def test_top_selection_keeps_the_largest_counts_and_draws_among_ties(path):
    cells = Cells([0, 6], [2, 3, 4, 5, 6, 7], [9, 1, 1, 7, 1, 1], np.array([3], dtype=np.uint64))
    extractor = ScMMGPTFeatureExtractor(max_genes=4, value_mode="raw", selection="top")
    kept = {tuple(extractor(cells, epoch=epoch)["gene_ids"][0, 1:].tolist()) for epoch in range(60)}
    assert kept == {(2, 3, 5), (2, 4, 5), (2, 5, 6), (2, 5, 7)}


def test_log1p_is_that_of_scanpy():
    scanpy = pytest.importorskip("scanpy")
    anndata = pytest.importorskip("anndata")
    counts = np.random.default_rng(0).poisson(1.0, (10, 30)).astype(np.float32)
    adata = anndata.AnnData(counts.copy())
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    ours = normalize_log1p(read(counts), 1e4)
    np.testing.assert_allclose(ours, adata.X[counts > 0], rtol=1e-6)


def test_log1p_of_a_matrix_is_that_of_its_cells():
    counts = np.array([[3, 0, 7], [0, 0, 0], [1, 0.25, 0]], dtype=np.float32)
    sizes = np.array([20, 0, 0.5])
    expected = [[math.log1p(1500), 0, math.log1p(3500)], [0, 0, 0], [math.log1p(20_000), math.log1p(5000), 0]]
    np.testing.assert_allclose(log1p_cp10k(counts, sizes), expected, rtol=1e-6)
    sparse = log1p_cp10k(sp.csr_matrix(counts), sizes)
    assert sparse.dtype == np.float32
    np.testing.assert_allclose(sparse.toarray(), expected, rtol=1e-6)
    filled = counts > 0
    cells = Cells(np.r_[0, filled.sum(axis=1).cumsum()], np.nonzero(filled)[1], counts[filled], np.arange(3), sizes)
    np.testing.assert_allclose(normalize_log1p(cells), np.array(expected)[filled], rtol=1e-6)


def test_log1p_counts_the_genes_outside_the_vocabulary():
    cells = read(np.array([[3, 7]]), np.array([5, -1]))
    np.testing.assert_allclose(normalize_log1p(cells, 10.0), [math.log1p(3)])


# Invariants


@st.composite
def matrices(draw):
    """Small dense count matrices, integer or float, with empty cells, ties and large counts."""
    n_cells, n_genes = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    values = draw(
        st.sampled_from([[0, 1], [0, 1, 2, 3, 250, 254, 255, 256, 70_000], [0, 0, 0.5, 1.0, 1.5, 2.0, 300.25]])
    )
    flat = draw(st.lists(st.sampled_from(values), min_size=n_cells * n_genes, max_size=n_cells * n_genes))
    dtype = np.float32 if isinstance(values[-1], float) else draw(st.sampled_from([np.int64, np.float32]))
    return np.array(flat, dtype=dtype).reshape(n_cells, n_genes)


extractors = st.builds(
    ScMMGPTFeatureExtractor,
    max_genes=st.integers(2, 40),
    n_bins=st.integers(2, 60),
    value_mode=st.sampled_from(["binned", "log1p", "raw"]),
    selection=st.sampled_from(["random", "top"]),
    seed=st.integers(-3, 2**63),
)


def read(matrix, vocabulary_ids=None):
    ids = np.arange(matrix.shape[1]) + 2 if vocabulary_ids is None else vocabulary_ids
    return Cells.from_csr(sp.csr_matrix(matrix), ids, np.arange(len(matrix), dtype=np.uint64) * np.uint64(977))


@given(matrices(), extractors, st.integers(0, 5))
@settings(max_examples=60, **SETTINGS)
def test_tokens_of_any_matrix_are_those_of_the_reference(path, matrix, extractor, epoch):
    cells = read(matrix)
    assert_tokens(extractor(cells, epoch=epoch), reference_tokens(cells, extractor, epoch=epoch))


@given(matrices(), extractors, st.integers(0, 5))
@settings(max_examples=80, **SETTINGS)
def test_both_paths_give_the_same_bits(matrix, extractor, epoch):
    batches = []
    for path in ("compiled", "numpy"):
        with pytest.MonkeyPatch.context() as patch:
            take_path(patch, path)
            batches.append(extractor(read(matrix), epoch=epoch, return_tensors="np"))
    compiled, portable = batches
    for name in compiled:
        assert compiled[name].dtype == portable[name].dtype
        assert compiled[name].tobytes() == portable[name].tobytes()


@given(matrices(), extractors, st.randoms(use_true_random=False))
@settings(max_examples=40, **SETTINGS)
def test_a_cell_does_not_depend_on_its_batch_or_place(path, matrix, extractor, random):
    cells = read(matrix)
    together = extractor(cells, padding="max_length", return_tensors="np")
    order = list(range(len(cells)))
    random.shuffle(order)
    chunked = [
        extractor(cells[order[i : i + 2]], padding="max_length", return_tensors="np") for i in order if i % 2 == 0
    ]
    places = [place for i in order if i % 2 == 0 for place in order[i : i + 2]]
    for name in together:
        np.testing.assert_array_equal(np.concatenate([chunk[name] for chunk in chunked]), together[name][places])


@given(matrices(), extractors, st.randoms(use_true_random=False))
@settings(max_examples=40, **SETTINGS)
def test_the_order_of_the_columns_does_not_matter(path, matrix, extractor, random):
    order = list(range(matrix.shape[1]))
    random.shuffle(order)
    ids = np.arange(matrix.shape[1]) + 2
    straight, shuffled = read(matrix, ids), read(matrix[:, order], ids[order])
    tokens, other_tokens = (tokens_by_gene(extractor(cells)) for cells in (straight, shuffled))
    np.testing.assert_array_equal([genes for genes, _ in tokens], [genes for genes, _ in other_tokens])
    np.testing.assert_allclose(
        np.concatenate([values for _, values in tokens]),
        np.concatenate([values for _, values in other_tokens]),
        rtol=1e-6,  # of log1p, as the library size is summed in another order
    )
    for name in ("indptr", "gene_ids", "counts"):
        ours, theirs = (getattr(cells.sorted_by_gene(), name) for cells in (straight, shuffled))
        np.testing.assert_array_equal(ours, theirs)


def tokens_by_gene(batch):
    """Genes and values of every cell, padding included, in ascending order of gene."""
    genes, values = batch["gene_ids"].numpy(), batch["expression"].numpy()
    order = np.argsort(genes, axis=1, kind="stable")
    return list(zip(np.take_along_axis(genes, order, 1), np.take_along_axis(values, order, 1), strict=True))


@given(matrices(), extractors)
@settings(max_examples=40, **SETTINGS)
def test_padding_changes_nothing_but_the_width(path, matrix, extractor):
    cells = read(matrix)
    narrow, wide = extractor(cells), extractor(cells, padding="max_length")
    n_tokens = narrow["gene_ids"].shape[1]
    assert wide["gene_ids"].shape == (len(cells), extractor.max_genes)
    for name in narrow:
        assert torch.equal(narrow[name], wide[name][:, :n_tokens])
    assert (wide["gene_ids"][:, n_tokens:] == extractor.pad_token_id).all()
    assert (wide["expression"][:, n_tokens:] == extractor.pad_value).all()
    assert (wide["cell_attention_mask"][:, n_tokens:] == 0).all()


@given(matrices())
@settings(max_examples=40, **SETTINGS)
def test_the_dtypes_of_counts_and_ids_do_not_matter(path, matrix):
    extractor, cells = ScMMGPTFeatureExtractor(max_genes=30), read(matrix)
    expected = extractor(cells)
    for id_dtype in (np.uint16, np.int32, np.int64):
        count_dtypes = [np.float32] if (matrix % 1).any() else [np.float32, np.int32, np.uint32, np.int64]
        for count_dtype in count_dtypes:
            same = Cells(
                cells.indptr, cells.gene_ids.astype(id_dtype), cells.counts.astype(count_dtype), cells.cell_ids
            )
            ours = extractor(same)
            assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["counts", "ambient-corrected"])
def test_library_sizes_are_the_same_bits_on_both_paths(monkeypatch, kind):
    cells = make_cells(n_cells=50, n_genes=2000, kind=kind)
    counts = cells.counts.astype(np.float32)
    matrix = sp.csr_matrix((counts, cells.gene_ids.astype(np.int32), cells.indptr), shape=(50, 2002))
    totals = []
    for path in ("compiled", "numpy"):
        take_path(monkeypatch, path)
        totals.append(Cells.from_csr(matrix, np.arange(2002)).total_counts)
    np.testing.assert_array_equal(*totals)
    np.testing.assert_array_equal(totals[0], cells.library_sizes())
    np.testing.assert_allclose(totals[0], matrix.sum(axis=1).A1, rtol=1e-6)


@given(matrices(), st.randoms(use_true_random=False))
@settings(max_examples=60, **SETTINGS)
def test_both_paths_read_the_same_cells(matrix, random):
    ids = np.array([random.choice([-1, *range(12)]) for _ in range(matrix.shape[1])])
    read_by = {}
    for path in ("compiled", "numpy"):
        with pytest.MonkeyPatch.context() as patch:
            take_path(patch, path)
            read_by[path] = [Cells.from_csr(sp.csr_matrix(matrix), ids), read_rows(matrix, 0, len(matrix))]
    for compiled, portable in zip(*read_by.values(), strict=True):
        for name, array in vars(compiled).items():
            np.testing.assert_array_equal(array, getattr(portable, name))
            assert np.asarray(array).dtype == np.asarray(getattr(portable, name)).dtype


@pytest.mark.parametrize("kind", [">i4", ">f4", ">f8", "float16", "longdouble"])
def test_counts_of_any_type_of_number_are_read(path, kind):
    matrix = np.array([[0, 3, 1], [2, 0, 0]])
    cells = Cells.from_csr(read_rows(matrix.astype(kind), 0, 2), np.array([5, 7, 9]))
    assert cells.gene_ids.tolist() == [7, 9, 5]
    assert cells.counts.tolist() == [3, 1, 2]
    assert cells.counts.dtype.isnative


@pytest.mark.parametrize("largest", [500, 2**17, 2**20])
@pytest.mark.parametrize("repeats", [1, 3])
def test_ids_of_any_vocabulary_are_read_and_summed(path, largest, repeats):
    rng = np.random.default_rng(0)
    genes = np.append(rng.choice(largest, 99, replace=False), largest)
    ids = rng.permutation(np.append(np.repeat(genes, repeats), [-1] * 20))
    matrix = (rng.random((30, len(ids))) < 0.7) * rng.integers(1, 9, (30, len(ids)))
    expected = sp.csr_matrix(np.stack([matrix[:, ids == gene].sum(axis=1) for gene in np.sort(genes)], axis=1))
    cells = Cells.from_csr(sp.csr_matrix(matrix), ids).sorted_by_gene()
    np.testing.assert_array_equal(cells.indptr, expected.indptr)
    np.testing.assert_array_equal(cells.gene_ids, np.sort(genes)[expected.indices])
    np.testing.assert_array_equal(cells.counts, expected.data)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_genes_keep_the_order_of_the_entries_until_they_are_sorted(path, is_reversed):
    ids = np.array([3, -1, 5, 8, -1, 13])
    rows = sp.csr_matrix(np.array([[1, 2, 3, 4, 5, 6], [0, 7, 0, 0, 8, 9], [0, 0, 0, 0, 1, 0]], dtype=np.float32))
    if is_reversed:
        rows = sp.csr_matrix((rows.data[::-1], rows.indices[::-1], [0, 1, 4, 10]), shape=rows.shape)[::-1]
    cells = Cells.from_csr(rows, ids)
    assert cells.indptr.tolist() == [0, 4, 5, 5]
    assert cells.gene_ids.tolist() == ([13, 8, 5, 3, 13] if is_reversed else [3, 5, 8, 13, 13])
    cells = cells.sorted_by_gene()
    assert cells.gene_ids.tolist() == [3, 5, 8, 13, 13]
    assert cells.counts.tolist() == [1, 3, 4, 6, 9]
    assert cells.total_counts.tolist() == [21, 24, 1]
    assert cells.sorted_by_gene() is cells


# The rest of the extractor


def test_threads_do_not_disturb_each_other(path):
    cells = make_cells(n_cells=64)
    extractor = ScMMGPTFeatureExtractor(max_genes=50)
    expected = extractor(cells, padding="max_length")
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda i: extractor(cells[i : i + 8], padding="max_length"), range(0, 64, 8)))
    for name in expected:
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])


def test_kernels_take_over_when_there_is_enough_to_do(monkeypatch):
    if kernels_scmmgpt.njit is None:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(kernels_scmmgpt, "WARM_UP_CELLS", 25)
    monkeypatch.setattr(kernels_scmmgpt, "_n_cells_seen", 0)
    assert [kernels_scmmgpt.kernels_pay(10) for _ in range(4)] == [False, False, True, True]


def test_everything_works_without_numba(tmp_path):
    script = """
import sys
sys.modules["numba"] = None  # its import fails
import numpy as np
from scmmgpt import cells_scmmgpt, kernels_scmmgpt
from scmmgpt import feature_extraction_scmmgpt as module
kernels_scmmgpt.WARM_UP_CELLS = -1
cells = cells_scmmgpt.Cells([0, 1, 2, 3], [2, 3, 4], np.ones(3), np.arange(3))
assert kernels_scmmgpt.njit is None
assert module.ScMMGPTFeatureExtractor(value_mode="raw")(cells)["gene_ids"].tolist() == [[1, 2], [1, 3], [1, 4]]
"""
    folders = os.pathsep.join([str(Path(feature_extraction_scmmgpt.__file__).parents[1]), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": folders})


def test_another_epoch_or_seed_gives_another_draw(path):
    cells = make_cells()
    extractor = ScMMGPTFeatureExtractor(max_genes=30)
    first = extractor(cells)
    assert torch.equal(first["gene_ids"], extractor(cells)["gene_ids"])
    assert not torch.equal(first["gene_ids"], extractor(cells, epoch=1)["gene_ids"])
    assert not torch.equal(first["gene_ids"], ScMMGPTFeatureExtractor(max_genes=30, seed=1)(cells)["gene_ids"])


def test_a_call_may_choose_its_own_selection(path):
    cells = make_cells()
    extractor = ScMMGPTFeatureExtractor(max_genes=50)
    ours = extractor(cells, max_genes=20, selection="top")
    expected = ScMMGPTFeatureExtractor(max_genes=20, selection="top")(cells)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_dtypes_are_those_of_the_model(path):
    batch = ScMMGPTFeatureExtractor()(make_cells())
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "gene_ids": torch.int64,
        "expression": torch.float32,
        "cell_attention_mask": torch.int64,
    }


def test_no_cells_make_an_empty_batch(path):
    batch = ScMMGPTFeatureExtractor()(make_cells()[:0])
    assert batch["gene_ids"].shape == (0, 1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"value_mode": "bins"}, "value_mode is 'bins'; choose one of"),
        ({"selection": "first"}, "selection is 'first'; choose one of"),
        ({"n_bins": 1}, "n_bins is 1"),
        ({"max_genes": 1}, "max_genes is 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        ScMMGPTFeatureExtractor(**argument)


@pytest.mark.parametrize("argument", [{"padding": False}, {"return_tensors": "tf"}, {"selection": "first"}])
def test_calls_that_cannot_work_are_refused(argument):
    with pytest.raises(ValueError, match="choose"):
        ScMMGPTFeatureExtractor()(make_cells(), **argument)


def test_genes_that_repeat_are_refused(path):
    cells = Cells([0, 4], [4, 4, 4, 4], [1, 1, 1, 1], np.arange(1, dtype=np.uint64))
    with pytest.raises(ValueError, match="the same gene twice"):
        ScMMGPTFeatureExtractor(max_genes=3)(cells)


@pytest.mark.parametrize("count", [0.0, -1.0, np.nan])
def test_counts_that_are_none_are_refused(path, count):
    cells = Cells([0, 2], [1, 2], [1.0, count], np.arange(1, dtype=np.uint64))
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        ScMMGPTFeatureExtractor()(cells)


def test_an_extractor_survives_saving_and_loading(tmp_path):
    extractor = ScMMGPTFeatureExtractor(77, 11, "log1p", "top", 1e3, 0.0, -5.0, 9, 3, 4)
    extractor.save_pretrained(tmp_path)
    assert (tmp_path / "feature_extraction_scmmgpt.py").is_file()
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path, trust_remote_code=True)
    ignored = ("auto_map", "feature_extractor_type")
    ours, theirs = ({k: v for k, v in e.to_dict().items() if k not in ignored} for e in (extractor, loaded))
    assert ours == theirs
    cells = make_cells()
    for name, tensor in extractor(cells).items():
        assert torch.equal(tensor, loaded(cells)[name])


# Cells


def test_cells_are_sliced_picked_and_joined():
    cells = make_cells()
    cells.total_counts = np.arange(len(cells), dtype=np.float32)
    picked = cells[np.array([7, 3, 3])]
    for row, source in enumerate([7, 3, 3]):
        ours, theirs = (c.gene_ids[c.indptr[r] : c.indptr[r + 1]] for c, r in ((picked, row), (cells, source)))
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(picked.total_counts, [7, 3, 3])
    mask = np.arange(len(cells)) % 3 == 0
    for same in (cells[::3], cells[mask], Cells.concatenate([cells[i] for i in range(0, len(cells), 3)])):
        for name in ("indptr", "gene_ids", "counts", "cell_ids", "total_counts"):
            np.testing.assert_array_equal(getattr(same, name), getattr(cells[np.flatnonzero(mask)], name))
    assert len(cells[-1]) == 1
    assert len(cells[5:2]) == 0
    with pytest.raises(IndexError, match="Cell 20"):
        cells[20]


def test_joining_keeps_the_library_sizes_that_are_known():
    known = Cells([0, 1], [2], [3], np.array([1], dtype=np.uint64), [10.0])
    unknown = Cells([0, 2], [2, 4], [3, 1], np.array([2], dtype=np.uint64))
    np.testing.assert_array_equal(Cells.concatenate([known, unknown]).total_counts, [10, 4])
    assert Cells.concatenate([unknown, unknown]).total_counts is None


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("indptr", [1, 2], ValueError, "`indptr` must start at 0"),
        ("indptr", [0, 2, 1], ValueError, "`indptr` must start at 0"),
        ("gene_ids", [1.5, 2.0], TypeError, "`gene_ids` has dtype float64"),
        ("gene_ids", [1], ValueError, r"`gene_ids` has shape \(1,\)"),
        ("counts", ["a", "b"], TypeError, "`counts` has dtype"),
        ("cell_ids", [0.5], TypeError, "`cell_ids` has dtype float64"),
        ("total_counts", [1.0, 2.0], ValueError, r"`total_counts` has shape \(2,\)"),
    ],
)
def test_cells_that_do_not_fit_together_are_refused(argument, value, error, message):
    parts = {"indptr": [0, 2], "gene_ids": [1, 2], "counts": [1, 1], "cell_ids": np.array([1], dtype=np.uint64)}
    with pytest.raises(error, match=message):
        Cells(**{**parts, argument: value})


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_matrices_that_hold_no_counts_are_refused(path, value):
    matrix = np.array([[1.0, 0.0], [2.0, value]], dtype=np.float32)
    with pytest.raises(ValueError, match=f"found {value} in row 1, column 1"):
        Cells.from_csr(sp.csr_matrix(matrix), np.arange(2))


def test_stored_zeros_are_no_entries(path):
    data = np.array([0.0, 2.0, 0.0], dtype=np.float32)
    matrix = sp.csr_matrix((data, np.array([0, 1, 0]), np.array([0, 2, 3])), shape=(2, 2))
    cells = Cells.from_csr(matrix, np.array([4, 5]))
    assert cells.indptr.tolist() == [0, 1, 1]
    assert cells.gene_ids.tolist() == [5]


@pytest.mark.parametrize("ids", [np.arange(4), np.ones(3)])
def test_ids_that_do_not_fit_the_matrix_are_refused(ids):
    with pytest.raises(ValueError, match="the matrix has 3 columns"):
        Cells.from_csr(sp.csr_matrix(np.ones((2, 3))), ids)


def test_columns_of_one_gene_are_summed_and_others_counted_in_the_total(path):
    matrix = np.array([[1, 2, 4, 8], [0, 0, 0, 0], [0, 3, 0, 5]])
    cells = Cells.from_csr(sp.csr_matrix(matrix), np.array([9, -1, 9, 5]))
    assert cells.indptr.tolist() == [0, 2, 2, 3]
    assert cells.gene_ids.tolist() == [9, 5, 5]
    assert cells.counts.tolist() == [5, 8, 5]
    assert cells.total_counts.tolist() == [15, 0, 8]


@pytest.mark.parametrize("middle", [5, 9])
def test_entries_of_one_column_are_summed(path, middle):
    """A CSR matrix may hold a column twice in a row; 200 + 100 does not fit its bytes."""
    data = np.array([200, 100, 3, 4, 1], dtype=np.uint8)
    matrix = sp.csr_matrix((data, np.array([1, 1, 2, 0, 0]), np.array([0, 3, 5])), shape=(2, 3))
    cells = Cells.from_csr(matrix, np.array([9, middle, 7]))
    assert cells.indptr.tolist() == [0, 2, 3]
    assert cells.gene_ids.tolist() == [middle, 7, 9]
    assert cells.counts.tolist() == [300, 3, 5]
    assert cells.total_counts.tolist() == [303, 5]


# Names and masks


def test_hashes_of_names_are_stable_and_distinct():
    names = [f"AAACCTGAGCATCATC-{i}" for i in range(5000)]
    hashes = hash_names(names)
    assert hashes.dtype == np.uint64
    assert len(np.unique(hashes)) == len(names)
    np.testing.assert_array_equal(hash_names([*names[::-1], "a much longer name than the others"])[:-1], hashes[::-1])
    assert hash_names(["cell-1", "", "Zelle-ä"]).tolist() == [
        reference_name_hash(name) for name in ("cell-1", "", "Zelle-ä")
    ]


def reference_name_hash(name):
    key = 0
    for part in (0, 0, 3):
        key = split_mix((key + 0x9E3779B97F4A7C15 + part) % WORD)
    state = split_mix(key)
    for character in name:
        state = split_mix((state + ord(character) * 0x9E3779B97F4A7C15) % WORD)
    return state


def test_hashes_are_those_of_their_key():
    def reference(i, *key):
        state = 0
        for part in key:
            state = split_mix(((state ^ part % WORD) + 0x9E3779B97F4A7C15) % WORD)
        return split_mix(((split_mix(i + 0x9E3779B97F4A7C15) ^ state) + 0x9E3779B97F4A7C15) % WORD)

    expected = [reference(i, 3, -1, 2**64 - 1) for i in range(50)]
    assert hashes(50, 3, -1, 2**64 - 1).tolist() == expected
    assert permutation(50, 3, -1, 2**64 - 1).tolist() == sorted(range(50), key=expected.__getitem__)
    for seed, cell_id in ((0, 0), (7, 2**64 - 1), (2**62, 5)):
        assert hash_seed(seed, cell_id) == split_mix((seed * 0x9E3779B97F4A7C15 + cell_id) % WORD) >> 1


@given(matrices(), st.floats(0.01, 1.0), st.integers(0, 3))
@settings(max_examples=40, **SETTINGS)
def test_masks_hide_an_exact_share_of_each_cell(matrix, mask_ratio, epoch):
    cells = read(matrix)
    batch = ScMMGPTFeatureExtractor(max_genes=30)(cells)
    hidden = mask_genes(batch["gene_ids"], batch["cell_attention_mask"], cells.cell_ids, mask_ratio, epoch=epoch)
    assert hidden.dtype == torch.bool
    assert not hidden[:, 0].any()
    assert not hidden[batch["cell_attention_mask"] == 0].any()
    for row, n_genes in enumerate((batch["cell_attention_mask"].sum(dim=1) - 1).tolist()):
        assert hidden[row].sum() == (max(1, math.floor(mask_ratio * n_genes)) if n_genes else 0)


def test_masks_do_not_depend_on_the_batch():
    cells = make_cells()
    batch = ScMMGPTFeatureExtractor(max_genes=50)(cells, return_tensors="np")
    together = mask_genes(batch["gene_ids"], batch["cell_attention_mask"], cells.cell_ids, [0.25, 0.5, 0.75], seed=4)
    for i in range(len(cells)):
        alone = [array[i : i + 1, :45] for array in (batch["gene_ids"], batch["cell_attention_mask"])]
        if alone[1].all():
            continue
        hidden = mask_genes(*alone, cells.cell_ids[i : i + 1], [0.25, 0.5, 0.75], seed=4)
        np.testing.assert_array_equal(hidden[0], together[i, :45])


def test_cells_draw_among_several_mask_ratios():
    n_cells, n_genes = 300, 100
    genes = np.tile(np.arange(n_genes + 1), (n_cells, 1))
    hidden = mask_genes(genes, np.ones_like(genes), np.arange(n_cells, dtype=np.uint64), [0.25, 0.5, 0.75])
    shares, cells = np.unique(hidden.sum(axis=1), return_counts=True)
    assert shares.tolist() == [25, 50, 75]
    assert cells.min() > 70


@pytest.mark.parametrize("mask_ratio", [0.0, 1.2, [0.5, -0.1]])
def test_mask_ratios_outside_0_and_1_are_refused(mask_ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        mask_genes(np.ones((1, 2)), np.ones((1, 2)), np.zeros(1, dtype=np.uint64), mask_ratio)
